#!/usr/bin/env bash
# Table 3 and figure 4 of the PatchDDM paper: Dice and HD95 against the size of the ensemble, from
# the checkpoints of results/patchddm_table1.sh. Sizes are nested: ENSEMBLE members are sampled, and
# 1, 3, 5, 7 are the first of them. Shorter: DATASETS=hippocampus ENSEMBLE=3 LIMIT=2.
# The paper's own setting, for METHOD patch, full and half:
# python patchddm.py evaluate --data brats --ensemble 15 --sampling-steps 1000 --out runs/brats-METHOD
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATASETS=${DATASETS:-hippocampus brats2mm}
ENSEMBLE=${ENSEMBLE:-15}
FIGURE=${FIGURE:-results/patchddm_figure4.png}
SCORES=${LIMIT:+/test-$LIMIT} # fewer cases are scored in a folder of their own

sizes=
for n in 1 3 5 7; do [ $n -ge "$ENSEMBLE" ] || sizes="$sizes summary_ensemble$n.json"; done
sizes="$sizes summary.json"
for data in $DATASETS; do
  files=
  for name in patch full half; do
    run=runs/table1-$data-$name
    [ -e $run/best.pt ] && weights=$run/best.pt || weights=$run/last.pt
    out=runs/table3-$data-$name
    [ $out$SCORES/summary.json -nt $weights ] ||
      $PYTHON patchddm.py evaluate --data "$data" --checkpoint $weights --out $out \
        --ensemble "$ENSEMBLE" ${LIMIT:+--limit "$LIMIT"} --quiet
    for size in $sizes; do files="$files $out$SCORES/$size"; done
  done
  $PYTHON -m common.metrics table $files
done
$PYTHON - "$FIGURE" "$ENSEMBLE" "$SCORES" ${DATASETS%% *} <<'PROGRAM'
import sys

from common import figures, tables

path, ensemble, scores, data = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
names = {n: f"summary_ensemble{n}.json" for n in (1, 3, 5, 7) if n < ensemble}
names[ensemble] = "summary.json"
panels = {}
for key, title in (("dice", "mean Dice"), ("hd95_mm", "mean HD95, mm")):
    panels[title] = {}
    for method in ("patch", "full", "half"):
        folder = f"runs/table3-{data}-{method}{scores}"
        means = [tables.read_summary(f"{folder}/{name}")["mean"][key]["mean"] for name in names.values()]
        panels[title][method] = [*names], means
print(figures.lines(path, panels, f"{data}, test cases", "members of the ensemble"))
PROGRAM
