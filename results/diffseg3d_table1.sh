#!/usr/bin/env bash
# Tables 1 and 3 of version 1, table 2 of version 2: 2D and 3D, U-net and diffusion, on both sets.
# Each row is one command, 12,500 steps of batch 8, and can be stopped and continued by running this
# file again. Wants data/prostate and data/amos, and a GPU; with several, put
# torchrun --nproc_per_node=N for $PYTHON in the rows. At a laptop's size: PRESET=laptop, and
# DATA="chaos hippocampus" or any other prepared sets.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
FLAGS="--quiet --preset ${PRESET:-paper}"
METRICS="dice nsd_valid nsd hd95_mm centroid_mm"

for SET in ${DATA:-prostate amos}; do
  D=runs/diffseg3d-$SET
  $PYTHON -m results.diffseg_rivals $FLAGS --data $SET --dims 2 --method unet --out $D-2d-unet
  $PYTHON -m results.diffseg_rivals $FLAGS --data $SET --dims 2 --out $D-2d
  $PYTHON diffseg3d_recycle.py $FLAGS --data $SET --method unet --out $D-3d-unet
  $PYTHON diffseg3d_recycle.py $FLAGS --data $SET --out $D-3d
  $PYTHON -m common.metrics table $D-2d-unet $D-2d $D-3d-unet $D-3d --metric $METRICS
  # Spearman's rho of the share of a class against its Dice, and figure 3
  $PYTHON -m results.class_shares $D-2d-unet $D-2d $D-3d-unet $D-3d --plot $D-classes.png
  $PYTHON -m common.metrics compare $D-2d-unet $D-2d
  $PYTHON -m common.metrics compare $D-3d-unet $D-3d
done
