#!/usr/bin/env bash
# Figure 8 of the PatchDDM paper: Dice and HD95 of validation and test cases against the steps of
# training, one member. One training, which each round continues and of whose end it keeps a copy.
# Running the file again continues. Shorter: LENGTHS="20 40" LIMIT=1. The paper's own setting:
# PRESET=paper on a GPU, DATA=brats, LENGTHS in hundreds of thousands.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=${DATA:-hippocampus}
PRESET=${PRESET:-laptop}
LENGTHS=${LENGTHS:-500 1000 2000 4000 9000}
OUT=${OUT:-runs/figure8-$DATA}
FLAGS="--data $DATA --preset $PRESET --quiet"

for STEPS in $LENGTHS; do
  if [ ! -e $OUT-$STEPS/last.pt ]; then
    $PYTHON patchddm.py train $FLAGS --lr-schedule constant --eval-every 1000000 --steps $STEPS --out $OUT
    mkdir -p $OUT-$STEPS
    cp $OUT/last.pt $OUT-$STEPS/part.pt && mv $OUT-$STEPS/part.pt $OUT-$STEPS/last.pt # whole, or not there
  fi
  for split in val test; do
    scores=$OUT-$STEPS/$split${LIMIT:+-$LIMIT}
    [ $split$LIMIT = test ] && scores=$OUT-$STEPS
    [ -e $scores/summary.json ] ||
      $PYTHON patchddm.py evaluate $FLAGS --split $split ${LIMIT:+--limit "$LIMIT"} --out $OUT-$STEPS
  done
done
$PYTHON - $OUT "${LIMIT:-}" $LENGTHS <<'PROGRAM'
import sys

from common import figures, tables

out, limit, *lengths = sys.argv[1:]
folders = {"validation": "val", "test": ""}
if limit:
    folders = {"validation": f"val-{limit}", "test": f"test-{limit}"}
panels = {}
for key, title in (("dice", "mean Dice"), ("hd95_mm", "mean HD95, mm")):
    panels[title] = {}
    for name, folder in folders.items():
        files = [f"{out}-{steps}/{folder}/summary.json" for steps in lengths]
        means = [tables.read_summary(file)["mean"][key]["mean"] for file in files]
        panels[title][name] = [int(steps) for steps in lengths], means
        print(title, name, *(f"{steps}: {mean:.3f}" for steps, mean in zip(lengths, means)))
print(figures.lines(f"{out}.png", panels, "", "steps of training"))
PROGRAM
