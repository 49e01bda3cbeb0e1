#!/usr/bin/env bash
# Hippocampus: the rows of the recycling paper's tables on real volumes, at equal optimisation time. What diffusion gives
# that the U-net does not is in results/diffseg3d_uncertainty.sh. SRC is the unpacked Task04_Hippocampus folder.
# A recycled step is two passes forward and one back, 4/3 of a U-net's: 2,400 steps stand beside 3,200. Each training
# takes about 27 minutes of one core (15 of two); all can be stopped and continued by running this file again.
# SEEDS="0 1 2" repeats the rows of the first table; those of the second have seed 0, which must be among them.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the unpacked Task04_Hippocampus folder}
PYTHON=${PYTHON:-python}
SEEDS=${SEEDS:-0 1 2}
D=runs/diffseg3d-hippocampus
FLAGS="--data hippocampus --preset laptop --quiet"
METRICS="dice hd95_mm nsd"

[ -e data/hippocampus/dataset.json ] ||
  $PYTHON -m data_prep.msd --src "$SRC" --dst data/hippocampus

for S in $SEEDS; do
  # (a) recycled
  $PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --seed "$S" --steps 2400 --out $D-prev-"$S"
  # (b) not recycled
  $PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --seed "$S" --steps 3200 --recycle none --out $D-none-"$S"
  # (d) U-net; its first norm takes the range of the image away, so it keeps the paper's
  $PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --seed "$S" --steps 3200 --method unet --image-range 0,1 \
    --out $D-unet-"$S"
  for ROW in prev none unet; do
    $PYTHON diffseg3d_recycle.py evaluate $FLAGS --out $D-$ROW-"$S" --save maps
  done
done
# (c) predicts the noise
$PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --steps 2400 --target eps --out $D-eps-0
# (e) trained on 1000 noise levels
$PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --steps 2400 --train-K 1000 --out $D-1000-0
# (f) recycled from pure noise
$PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --steps 2400 --recycle max --out $D-max-0
# (a) and (b) with the paper's range of the image
$PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --steps 2400 --image-range 0,1 --out $D-narrow-prev-0
$PYTHON diffseg3d_recycle.py train $FLAGS --eval-every 400 --steps 3200 --image-range 0,1 --recycle none --out $D-narrow-none-0
for ROW in eps 1000 max narrow-prev narrow-none; do
  $PYTHON diffseg3d_recycle.py evaluate $FLAGS --out $D-$ROW-0
done

$PYTHON -m common.metrics table --seeds --markdown $D-{prev,none,unet}-? $D-{eps,1000,max,narrow-prev,narrow-none}-0 --metric $METRICS
for ROW in none unet; do
  $PYTHON -m common.metrics compare "$D-$ROW-?" "$D-prev-?" --metric $METRICS
done
for ROW in eps 1000 max narrow-prev; do
  $PYTHON -m common.metrics compare $D-$ROW-0 $D-prev-0 --metric $METRICS
done
$PYTHON -m common.metrics compare $D-narrow-none-0 $D-narrow-prev-0 --metric $METRICS
for ROW in prev-0 none-0 eps-0 1000-0 max-0 narrow-prev-0 narrow-none-0; do
  echo "Dice after each sampling step, $ROW"
  awk -F, 'NR > 1 { s[$2] += ($3 + $4) / 2; n[$2]++ } END { for (k in s) printf "  k = %d  %.3f\n", k, s[k] / n[k] }' \
    $D-$ROW/dice_by_step.csv | sort -r
done
