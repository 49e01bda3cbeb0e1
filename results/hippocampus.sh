#!/usr/bin/env bash
# The hippocampus rows of the README. SRC is the unpacked Task04_Hippocampus folder of the Medical Segmentation Decathlon.
# Two trainings of about half an hour on two cores; each can be stopped and continued by running this file again.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the unpacked Task04_Hippocampus folder}
PYTHON=${PYTHON:-python}
X0=runs/patchddm-hippocampus-laptop
EPS=runs/patchddm-hippocampus-laptop-eps

[ -e data/hippocampus/dataset.json ] ||
  $PYTHON -m data_prep.msd --src "$SRC" --dst data/hippocampus

$PYTHON patchddm.py train --data hippocampus --preset laptop --out $X0 --quiet
$PYTHON patchddm.py evaluate --data hippocampus --preset laptop --out $X0 --ensemble 5 --save-maps --quiet
$PYTHON patchddm.py train --data hippocampus --preset laptop --target eps --out $EPS --quiet
$PYTHON patchddm.py evaluate --data hippocampus --preset laptop --out $EPS --ensemble 5 --quiet

$PYTHON -m common.metrics table $X0/summary_ensemble1.json $X0/summary.json $EPS/summary_ensemble1.json $EPS/summary.json
$PYTHON -m common.metrics compare $EPS/metrics.csv $X0/metrics.csv
