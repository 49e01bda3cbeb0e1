#!/usr/bin/env bash
# GlaS on a laptop: does masking as pre-training help to segment glands with 8 and 85 labelled images? Rows MDM, DDPM, MAE
# (small), MDM with the SSIM that sees the sign, the same network untrained, and supervised; floors stand under each
# table. SRC holds the images at half resolution (a 64-pixel window then shows 79 micrometres); tiles of 4 pixels, as 8 at full.
# The preset's 3,000 steps of 16 crops of 64 pixels; MAE's steps are cheaper, its number and rate are guesses, not yet timed.
# Test images are those of testA; nothing is chosen on them. All can be stopped and continued by running this file again.
# SEEDS=0 leaves the second pre-training of MDM and DDPM out.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the folder of GlaS images}
PYTHON=${PYTHON:-python}
SEEDS=${SEEDS:-0 1}
D=runs/mdm-glas64
FLAGS="--data glas --preset laptop --quiet"

[ -e data/glas/dataset.json ] || $PYTHON -m data_prep.glas --src "$SRC" --dst data/glas --subset

for S in $SEEDS; do
  $PYTHON masked_diffusion.py pretrain $FLAGS --seed "$S" --out $D-mdm-"$S"
  $PYTHON masked_diffusion.py pretrain $FLAGS --seed "$S" --method ddpm --out $D-ddpm-"$S"
done
$PYTHON masked_diffusion.py pretrain $FLAGS --ssim-range unit --out $D-unit-0
$PYTHON masked_diffusion.py pretrain $FLAGS --method mae --lr 1e-3 --steps 12000 --out $D-mae-0
for ROW in mdm-0 unit-0; do
  $PYTHON masked_diffusion.py reconstruct $FLAGS --split testA --limit 20 --out $D-$ROW
done

for LABELS in 8 85; do
  for S in $SEEDS; do
    $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --seed "$S" --out $D-mdm-"$S"
    $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --seed "$S" --method ddpm --out $D-ddpm-"$S"
  done
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --out $D-unit-0
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --method mae --out $D-mae-0
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --checkpoint none --out $D-random-0
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --method unet --runs 1 --out $D-unet-0
  $PYTHON -m common.metrics compare $D-ddpm-0/segment-$LABELS $D-mdm-0/segment-$LABELS --metric dice
  $PYTHON -m common.metrics compare $D-random-0/segment-$LABELS-random $D-mdm-0/segment-$LABELS --metric dice
done
