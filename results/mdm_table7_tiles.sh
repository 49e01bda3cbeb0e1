#!/usr/bin/env bash
# Table 7 of the paper: tiles of 4, 8 and 16 pixels. The row of 8 is results/mdm_table1.sh's, trained here again.
# Wants data/glas and a GPU. At half resolution (preset laptop) the same areas are --tile 2, 4 and 8.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
ACCUMULATE=${ACCUMULATE:-8} # a step of the paper's network keeps 2.3 GB a crop; with PRESET=laptop use 1
SPLIT=${SPLIT:-test}
TILES=${TILES:-4 8 16}
OUT=runs/mdm-glas-mdm-tile

for TILE in $TILES; do
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data glas --preset $PRESET --tile $TILE --out $OUT$TILE
  for LABELS in 85 8; do
    $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --labels $LABELS --out $OUT$TILE
  done
done
