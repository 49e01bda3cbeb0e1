#!/usr/bin/env bash
# Abdominal MR, four organs, anisotropic: the four main rows of the recycling paper at equal optimisation time. SRC is a
# folder of the CHAOS T2-SPIR volumes in the Decathlon's layout (16 cases: 10 to train, 2 to validate, 4 to test, which
# says little). Resampled in the plane to 4 mm, 80 x 80 x 48 voxels with the padding. Each training takes an hour or two of
# one core; all can be stopped and continued by running this file again.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the folder of CHAOS T2 volumes}
PYTHON=${PYTHON:-python}
D=runs/diffseg3d-chaos
FLAGS="--data chaos --preset laptop --quiet"
METRICS="dice hd95_mm nsd"

[ -e data/chaos/dataset.json ] ||
  $PYTHON -m data_prep.msd --src "$SRC" --dst data/chaos --spacing 4,4,7.7 --split-sizes 10,2,4

$PYTHON diffseg3d_recycle.py train $FLAGS --steps 1200 --eval-every 300 --out $D-prev-0
$PYTHON diffseg3d_recycle.py train $FLAGS --steps 1600 --eval-every 400 --recycle none --out $D-none-0
$PYTHON diffseg3d_recycle.py train $FLAGS --steps 1200 --eval-every 300 --target eps --out $D-eps-0
$PYTHON diffseg3d_recycle.py train $FLAGS --steps 1600 --eval-every 400 --method unet --out $D-unet-0
for ROW in prev none eps unet; do
  $PYTHON diffseg3d_recycle.py evaluate $FLAGS --out $D-$ROW-0
done
$PYTHON -m common.metrics table --markdown $D-{prev,none,eps,unet}-0 --metric $METRICS
$PYTHON -m results.class_shares $D-{prev,none,eps,unet}-0 --plot results/diffseg3d_chaos.png
for ROW in none eps unet; do
  $PYTHON -m common.metrics compare $D-$ROW-0 $D-prev-0 --metric $METRICS
done
