#!/usr/bin/env bash
# GlaS on a laptop: does masking as pre-training help to segment glands with 8 and 85 labelled images? Rows MDM, DDPM, MDM
# with the paper's SSIM, MAE (small), the same network untrained, and supervised; floors stand under each table.
# SRC holds the images, REDUCE times as large as they are used (2: copies at half resolution; 4: as published): a window of
# 64 pixels then shows what one of 256 does in the paper. 3,000 steps of 16 crops take an hour of one core, MAE's 7,000 too;
# the supervised network has 1,500.
# Test images are those of testA; what was chosen (size, SSIM, classifier) was chosen on training images beyond the eight.
# All can be stopped and continued by running this file again. SEEDS=0 leaves the second pre-training of MDM and DDPM out.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the folder of GlaS images}
REDUCE=${REDUCE:-2}
PYTHON=${PYTHON:-python}
SEEDS=${SEEDS:-0 1}
D=runs/mdm-glas
FLAGS="--data glas-small --preset laptop --quiet"

[ -e data/glas-small/dataset.json ] ||
  $PYTHON -m data_prep.glas --src "$SRC" --dst data/glas-small --subset --reduce "$REDUCE"

for S in $SEEDS; do
  $PYTHON masked_diffusion.py pretrain $FLAGS --seed "$S" --out $D-mdm-"$S"
  $PYTHON masked_diffusion.py pretrain $FLAGS --seed "$S" --method ddpm --out $D-ddpm-"$S"
done
$PYTHON masked_diffusion.py pretrain $FLAGS --ssim-range signed --out $D-signed-0
$PYTHON masked_diffusion.py pretrain $FLAGS --method mae --lr 1e-3 --steps 7000 --out $D-mae-0
for ROW in mdm-0 signed-0; do
  $PYTHON masked_diffusion.py reconstruct $FLAGS --split testA --limit 20 --out $D-$ROW
done

for LABELS in 8 85; do
  for S in $SEEDS; do
    $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --seed "$S" --out $D-mdm-"$S"
    $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --seed "$S" --method ddpm --out $D-ddpm-"$S"
  done
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --out $D-signed-0
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --method mae --out $D-mae-0
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --checkpoint none --out $D-random-0
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --method unet --runs 1 --steps 1500 --out $D-unet-0
  # The classifier as published: batch norm, and features divided by the Frobenius norm of a window.
  $PYTHON masked_diffusion.py segment $FLAGS --split testA --labels $LABELS --classifier-norm batch --feature-norm l2 \
    --checkpoint $D-mdm-0/last.pt --out $D-mdm-0-published
  $PYTHON -m common.metrics compare "$D-ddpm-?/segment-$LABELS" "$D-mdm-?/segment-$LABELS" --metric dice # mean over seeds
  for ROW in "mdm-?" "ddpm-?" signed-0 mae-0; do
    $PYTHON -m common.metrics compare $D-random-0/segment-$LABELS-random "$D-$ROW/segment-$LABELS" --metric dice
    $PYTHON -m common.metrics compare $D-unet-0/segment-$LABELS-unet "$D-$ROW/segment-$LABELS" --metric dice
  done
  for ROW in signed-0 mae-0; do
    $PYTHON -m common.metrics compare $D-$ROW/segment-$LABELS "$D-mdm-?/segment-$LABELS" --metric dice
  done
  $PYTHON -m common.metrics compare $D-mdm-0-published/segment-$LABELS $D-mdm-0/segment-$LABELS --metric dice
done
$PYTHON -m common.metrics compare $D-mdm-0/segment-8 $D-mdm-0/segment-85 --metric dice
