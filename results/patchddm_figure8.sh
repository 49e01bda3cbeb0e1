#!/usr/bin/env bash
# Figure 8 of the PatchDDM paper: Dice and HD95 of validation and test cases against the steps of training, one member. One
# training, which each round continues and of whose end it keeps a copy. The paper's own setting: PRESET=paper on a GPU,
# DATA=brats and LENGTHS in hundreds of thousands. Wants data/hippocampus; can be stopped and continued by running it again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=${DATA:-hippocampus}
PRESET=${PRESET:-laptop}
LENGTHS=${LENGTHS:-500 1000 2000 4000 9000}
OUT=runs/figure8-$DATA
FLAGS="--data $DATA --preset $PRESET --quiet"

for STEPS in $LENGTHS; do
  if [ ! -e $OUT-$STEPS/last.pt ]; then
    $PYTHON patchddm.py train $FLAGS --lr-schedule constant --eval-every 1000000 --steps $STEPS --out $OUT
    mkdir -p $OUT-$STEPS
    cp $OUT/config.json $OUT-$STEPS/
    cp $OUT/last.pt $OUT-$STEPS/part.pt && mv $OUT-$STEPS/part.pt $OUT-$STEPS/last.pt # whole, or not there
  fi
  [ -e $OUT-$STEPS/val/summary.json ] || $PYTHON patchddm.py evaluate $FLAGS --split val --out $OUT-$STEPS
  [ -e $OUT-$STEPS/summary.json ] || $PYTHON patchddm.py evaluate $FLAGS --out $OUT-$STEPS
done
$PYTHON - $OUT $LENGTHS <<'PROGRAM'
import sys

from common import figures, metrics

out, lengths = sys.argv[1], [int(n) for n in sys.argv[2:]]
for key, title in (("dice", "mean Dice"), ("hd95_mm", "mean HD95, mm")):
    lines = {}
    for name, folder in (("validation", "val/"), ("test", "")):
        found = [metrics.read_summary(f"{out}-{n}/{folder}summary.json")["mean"][key]["mean"] for n in lengths]
        lines[name] = lengths, found
        print(title, name, *(f"{n}: {v:.3f}" for n, v in zip(lengths, found)))
    print(figures.curves(lines, f"{out}-{key}.png", "", "steps of training", title, dots=True))
PROGRAM
