#!/usr/bin/env bash
# Table 3 and figure 4 of the PatchDDM paper: Dice and HD95 against the size of the ensemble, from the checkpoints of
# results/patchddm_table1.sh. Sizes are nested: 15 members are sampled, and 1, 3, 5, 7 are the first of them.
# The paper's own setting: python patchddm.py evaluate --data brats --ensemble 15 --sampling-steps 1000 --save-members
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

row() { # DATA NAME
  run=runs/table1-$1-$2
  [ -e $run/best.pt ] && weights=$run/best.pt || weights=$run/last.pt
  [ runs/table3-$1-$2/summary.json -nt $weights ] ||
    $PYTHON patchddm.py evaluate --data "$1" --checkpoint "$weights" --out runs/table3-$1-$2 --ensemble 15 --quiet
}
for data in hippocampus brats2mm; do
  for name in patch full half; do row $data $name; done
done
for data in hippocampus brats2mm; do
  $PYTHON -m common.metrics table runs/table3-$data-{patch,full,half}/summary{_ensemble1,_ensemble3,_ensemble5,_ensemble7,}.json
done
$PYTHON - <<'PROGRAM'
from common import figures, metrics

sizes = [1, 3, 5, 7, 15]
for key, title, file in (("dice", "mean Dice", "figure4"), ("hd95_mm", "mean HD95, mm", "figure4_hd95")):
    lines = {}
    for name in ("patch", "full", "half"):
        runs = [f"runs/table3-hippocampus-{name}/summary{f'_ensemble{n}' if n < 15 else ''}.json" for n in sizes]
        lines[name] = sizes, [metrics.read_summary(run)["mean"][key]["mean"] for run in runs]
    figures.curves(lines, f"results/patchddm_{file}.png", "Hippocampus, test", "members", title, dots=True)
PROGRAM
