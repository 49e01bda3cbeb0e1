#!/usr/bin/env bash
# Table 1 (version 1) and table 2 (version 2) of the paper: 2D and 3D, U-net and diffusion, on both data sets.
# Each row is one command, 12,500 steps of batch 8, and can be stopped and continued by running this file again.
# Wants data/prostate and data/amos, and a GPU; with several, put torchrun --nproc_per_node=N for $PYTHON in the rows.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=runs/diffseg3d
METRICS="dice nsd_valid nsd hd95_mm centroid_mm"

for DATA in prostate amos; do
  $PYTHON diffseg3d_recycle.py --quiet --data $DATA --dims 2 --method unet --out $OUT-$DATA-2d-unet
  $PYTHON diffseg3d_recycle.py --quiet --data $DATA --dims 2 --out $OUT-$DATA-2d
  $PYTHON diffseg3d_recycle.py --quiet --data $DATA --method unet --out $OUT-$DATA-3d-unet
  $PYTHON diffseg3d_recycle.py --quiet --data $DATA --out $OUT-$DATA-3d
  $PYTHON -m common.metrics table $OUT-$DATA-2d-unet $OUT-$DATA-2d $OUT-$DATA-3d-unet $OUT-$DATA-3d --metric $METRICS
  $PYTHON -m common.metrics compare $OUT-$DATA-2d-unet $OUT-$DATA-2d
  $PYTHON -m common.metrics compare $OUT-$DATA-3d-unet $OUT-$DATA-3d
done
