#!/usr/bin/env bash
# Table 2 of the paper: mIoU on FFHQ-34 and CelebA-19, whose pixels are labelled with the network of FFHQ. data/ffhq34
# holds the 70,000 images of FFHQ at 256 x 256 as unlabelled cases. Wants a GPU, for weeks; a public checkpoint of FFHQ
# does instead of a pre-training: segment --checkpoint FILE --num-channels 256.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=runs/mdm-ffhq

$PYTHON masked_diffusion.py pretrain --quiet --data ffhq34 --steps 100000 --out $OUT-mdm
$PYTHON masked_diffusion.py pretrain --quiet --data ffhq34 --steps 100000 --method ddpm --schedule linear --num-channels 256 --out $OUT-ddpm
$PYTHON masked_diffusion.py pretrain --quiet --data ffhq34 --steps 100000 --method mae --out $OUT-mae
for DATA in ffhq34 celeba19; do
  for METHOD in mdm ddpm mae; do
    $PYTHON masked_diffusion.py segment --quiet --data $DATA --preset paper --protocol natural --labels 20 --checkpoint $OUT-$METHOD/last.pt --out $OUT-$METHOD-$DATA
  done
done
