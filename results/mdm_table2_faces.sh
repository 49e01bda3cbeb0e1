#!/usr/bin/env bash
# Table 2 of the paper: mIoU on FFHQ-34 and CelebA-19, whose pixels are labelled with the network of FFHQ. data/ffhq34
# holds the 70,000 images of FFHQ at 256 x 256 as unlabelled cases. Wants a GPU, for weeks; a public checkpoint of FFHQ
# does instead of a pre-training by DDPM: segment --method ddpm --schedule linear --checkpoint FILE.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
ACCUMULATE=${ACCUMULATE:-8} # a step of the network keeps 2.3 GB a crop, at width 256 more
OUT=runs/mdm-ffhq

$PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data ffhq34 --steps 100000 --out $OUT-mdm
$PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data ffhq34 --steps 100000 --method ddpm --schedule linear --num-channels 256 --out $OUT-ddpm
$PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data ffhq34 --steps 100000 --method mae --out $OUT-mae
for DATA in ffhq34 celeba19; do
  for METHOD in mdm ddpm mae; do
    $PYTHON masked_diffusion.py segment --quiet --data $DATA --preset paper --protocol natural --labels 20 --checkpoint $OUT-$METHOD/last.pt --out $OUT-$METHOD-$DATA
  done
done
