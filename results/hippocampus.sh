#!/usr/bin/env bash
# The hippocampus rows of the README: PatchDDM with the targets x0 and eps. SRC is the unpacked
# Task04_Hippocampus of the Medical Segmentation Decathlon. Two trainings of about half an hour on
# two cores. Each can be stopped, and this file continues it. Shorter: STEPS=50 LIMIT=2 ENSEMBLE=2.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-laptop}
ENSEMBLE=${ENSEMBLE:-5}
X0=runs/patchddm-hippocampus-$PRESET
EPS=$X0-eps

[ -e data/hippocampus/dataset.json ] ||
  $PYTHON -m data_prep.msd --src "${SRC:?set SRC to the Task04_Hippocampus folder}" --dst data/hippocampus

train() { # TARGET OUT
  $PYTHON patchddm.py train --data hippocampus --preset "$PRESET" --target "$1" --out "$2" \
    ${STEPS:+--steps "$STEPS"} --quiet
}
evaluate() { # OUT FLAGS...
  $PYTHON patchddm.py evaluate --data hippocampus --preset "$PRESET" --out "$@" \
    --ensemble "$ENSEMBLE" ${LIMIT:+--limit "$LIMIT"} --quiet
}
train x0 "$X0"
evaluate "$X0" --save maps
train eps "$EPS"
evaluate "$EPS"

SCORES=${LIMIT:+/test-$LIMIT} # fewer cases are scored in a folder of their own
$PYTHON -m common.metrics table {"$X0","$EPS"}"$SCORES"/summary{_ensemble1,}.json
$PYTHON -m common.metrics compare "$EPS$SCORES" "$X0$SCORES"
