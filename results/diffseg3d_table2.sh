#!/usr/bin/env bash
# Table 2 (version 1), tables 1 and 3 (version 2) of the paper: what recycling, mask prediction, the Dice loss and five
# steps each do. Each row differs by one flag from the default row, which results/diffseg3d_table1.sh trains as well.
# Wants data/prostate and data/amos, and a GPU; with several, put torchrun --nproc_per_node=N for $PYTHON in the rows.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=runs/diffseg3d
METRICS="dice nsd_valid nsd hd95_mm centroid_mm"

$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 2 --out $OUT-prostate-2d
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 2 --target eps --out $OUT-prostate-2d-eps
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 2 --dice off --out $OUT-prostate-2d-nodice
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 2 --recycle none --out $OUT-prostate-2d-norecycle
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 2 --train-K 1000 --out $OUT-prostate-2d-1000
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 3 --out $OUT-prostate-3d
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 3 --target eps --out $OUT-prostate-3d-eps
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 3 --dice off --out $OUT-prostate-3d-nodice
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 3 --recycle none --out $OUT-prostate-3d-norecycle
$PYTHON diffseg3d_recycle.py --quiet --data prostate --translate 20,20,4 --dims 3 --train-K 1000 --out $OUT-prostate-3d-1000
$PYTHON diffseg3d_recycle.py --quiet --data amos --translate 10,10,10 --out $OUT-amos-3d
$PYTHON diffseg3d_recycle.py --quiet --data amos --translate 10,10,10 --recycle none --out $OUT-amos-3d-norecycle

for BASE in $OUT-prostate-2d $OUT-prostate-3d; do
  $PYTHON -m common.metrics table $BASE $BASE-eps $BASE-nodice $BASE-norecycle $BASE-1000 --metric $METRICS
  for ROW in eps nodice norecycle 1000; do
    $PYTHON -m common.metrics compare $BASE-$ROW $BASE
  done
done
$PYTHON -m common.metrics compare $OUT-amos-3d-norecycle $OUT-amos-3d
