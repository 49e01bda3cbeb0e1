#!/usr/bin/env bash
# Table 1 (version 1) and table 2 (version 2) of the paper: 2D and 3D, U-net and diffusion, on both data sets.
# Each row is one command, 12,500 steps of batch 8, and can be stopped and continued by running this file again.
# Wants data/prostate and data/amos, and a GPU; with several, put torchrun --nproc_per_node=N for $PYTHON in the rows.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=runs/diffseg3d
METRICS="dice nsd_valid nsd hd95_mm centroid_mm"

RUN=$OUT-prostate
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 2 --method unet --out $RUN-2d-unet
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 2 --out $RUN-2d
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --method unet --out $RUN-3d-unet
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --out $RUN-3d
$PYTHON -m common.metrics table $RUN-2d-unet $RUN-2d $RUN-3d-unet $RUN-3d --metric $METRICS --plot $RUN-classes.png
$PYTHON -m common.metrics compare $RUN-2d-unet $RUN-2d
$PYTHON -m common.metrics compare $RUN-3d-unet $RUN-3d

RUN=$OUT-amos
$PYTHON diffseg3d_recycle.py --quiet --data amos --translate 10,10,10 --dims 2 --method unet --out $RUN-2d-unet
$PYTHON diffseg3d_recycle.py --quiet --data amos --translate 10,10,10 --dims 2 --out $RUN-2d
$PYTHON diffseg3d_recycle.py --quiet --data amos --translate 10,10,10 --method unet --out $RUN-3d-unet
$PYTHON diffseg3d_recycle.py --quiet --data amos --translate 10,10,10 --out $RUN-3d
$PYTHON -m common.metrics table $RUN-2d-unet $RUN-2d $RUN-3d-unet $RUN-3d --metric $METRICS --plot $RUN-classes.png
$PYTHON -m common.metrics compare $RUN-2d-unet $RUN-2d
$PYTHON -m common.metrics compare $RUN-3d-unet $RUN-3d
