#!/usr/bin/env bash
# Tables 2 and 4 of version 1, tables 1 and 3 of version 2: what recycling, mask prediction, the Dice
# loss and five steps each do. Each row differs by one flag from the default row, which
# results/diffseg3d_table1.sh trains as well. Wants data/prostate and data/amos, and a GPU; with
# several, put torchrun --nproc_per_node=N for $PYTHON in the rows. At a laptop's size:
# PRESET=laptop DATA=hippocampus OTHER=chaos.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
FLAGS="--quiet --preset ${PRESET:-paper}"
METRICS="dice nsd_valid nsd hd95_mm centroid_mm"
SET=${DATA:-prostate}
OTHER=${OTHER:-amos}

D=runs/diffseg3d-$SET-2d
$PYTHON -m results.diffseg_rivals $FLAGS --data $SET --dims 2 --out $D
$PYTHON -m results.diffseg_rivals $FLAGS --data $SET --dims 2 --target eps --out $D-eps
$PYTHON -m results.diffseg_rivals $FLAGS --data $SET --dims 2 --dice off --out $D-nodice
$PYTHON -m results.diffseg_rivals $FLAGS --data $SET --dims 2 --recycle none --out $D-norecycle
$PYTHON -m results.diffseg_rivals $FLAGS --data $SET --dims 2 --train-K 1000 --out $D-1000
D=runs/diffseg3d-$SET-3d
$PYTHON diffseg3d_recycle.py $FLAGS --data $SET --out $D
$PYTHON diffseg3d_recycle.py $FLAGS --data $SET --target eps --out $D-eps
$PYTHON diffseg3d_recycle.py $FLAGS --data $SET --dice off --out $D-nodice
$PYTHON diffseg3d_recycle.py $FLAGS --data $SET --recycle none --out $D-norecycle
$PYTHON diffseg3d_recycle.py $FLAGS --data $SET --train-K 1000 --out $D-1000
# Table 1 of version 2 has recycling on the second set, too.
$PYTHON diffseg3d_recycle.py $FLAGS --data $OTHER --out runs/diffseg3d-$OTHER-3d
$PYTHON diffseg3d_recycle.py $FLAGS --data $OTHER --recycle none --out runs/diffseg3d-$OTHER-3d-norecycle

for BASE in runs/diffseg3d-$SET-2d runs/diffseg3d-$SET-3d; do
  $PYTHON -m common.metrics table $BASE $BASE-eps $BASE-nodice $BASE-norecycle $BASE-1000 --metric $METRICS
  for ROW in eps nodice norecycle 1000; do
    $PYTHON -m common.metrics compare $BASE-$ROW $BASE
  done
done
$PYTHON -m common.metrics compare runs/diffseg3d-$OTHER-3d-norecycle runs/diffseg3d-$OTHER-3d
