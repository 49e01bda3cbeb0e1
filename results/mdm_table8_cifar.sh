#!/usr/bin/env bash
# Table 8 of the paper: a linear layer on frozen features tells CIFAR-10's classes. Neither paper nor code says how; here
# as in DDAE (Xiang et al. 2023), whose row the paper quotes: a U-Net of width 128 with tiles of 4, one block and time of
# features chosen on a tenth of the training images. Wants the unpacked folder data/cifar-10-batches-py and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
STEPS=${STEPS:-100000}
OUT=runs/mdm-cifar

$PYTHON masked_diffusion.py pretrain --quiet --data cifar-10-batches-py --num-channels 128 --channel-mult 1,2,2,2 --attention-resolutions 2 --crop 32 --tile 4 --steps $STEPS --method ddpm --out $OUT-ddpm
$PYTHON masked_diffusion.py pretrain --quiet --data cifar-10-batches-py --num-channels 128 --channel-mult 1,2,2,2 --attention-resolutions 2 --crop 32 --tile 4 --steps $STEPS --out $OUT-mdm
$PYTHON masked_diffusion.py probe --data cifar-10-batches-py --method ddpm --blocks 3,4,5,6,7,8 --feature-t 0,11,50 --out $OUT-ddpm
$PYTHON masked_diffusion.py probe --data cifar-10-batches-py --blocks 3,4,5,6,7,8 --feature-t 0,50 --out $OUT-mdm
