#!/usr/bin/env bash
# Two choices of the PatchDDM paper, at a laptop's size. Section 3: the learning rate with the best
# Dice of the validation cases after STEPS steps, from 1e-6 to 1e-3 (paper: 150,000 steps, 1e-5 is
# chosen). Section 2.2: averaged skips allow a network that is 1.6 times as wide in the same memory
# (paper: 29 with average against 18 with concat). Both train for MINUTES, and the profile says what
# they need. Running the file again continues. Shorter: DATA=synthetic STEPS=20 MINUTES=0.1 LIMIT=1.
# The paper's own setting: PRESET=paper DATA=brats STEPS=150000 MINUTES=25200
#   WIDTHS="average:29:29 concat:18:18" on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=${DATA:-hippocampus}
PRESET=${PRESET:-laptop}
RATES=${RATES:-1e-6 1e-5 1e-4 1e-3}
STEPS=${STEPS:-1000}
MINUTES=${MINUTES:-10}
WIDTHS=${WIDTHS:-average:16:8 concat:10:5} # skips:channels:groups
FLAGS="--data $DATA --preset $PRESET --quiet"
TRAIN="$FLAGS --lr-schedule constant --eval-every 1000000000"

runs=
for rate in $RATES; do
  out=runs/search-$DATA-lr-$rate
  $PYTHON patchddm.py train $TRAIN --lr "$rate" --steps "$STEPS" --out "$out"
  $PYTHON patchddm.py evaluate $FLAGS --split val ${LIMIT:+--limit "$LIMIT"} --out "$out"
  runs="$runs $out/val${LIMIT:+-$LIMIT}"
done
$PYTHON -m common.metrics table $runs

runs=
for row in $WIDTHS; do
  IFS=: read -r skips channels groups <<<"$row"
  network="--skips $skips --num-channels $channels --num-groups $groups"
  out=runs/search-$DATA-$skips-$channels
  $PYTHON -m results.patchddm_profile --preset "$PRESET" --method patch $network --out "$out-profile"
  $PYTHON patchddm.py train $TRAIN $network --minutes "$MINUTES" --steps 100000000 --out "$out"
  $PYTHON patchddm.py evaluate $FLAGS ${LIMIT:+--limit "$LIMIT"} --out "$out"
  runs="$runs $out${LIMIT:+/test-$LIMIT}"
done
$PYTHON -m common.metrics table $runs
$PYTHON -m common.metrics compare $runs --metric dice hd95_mm
