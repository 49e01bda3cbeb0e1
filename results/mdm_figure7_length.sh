#!/usr/bin/env bash
# Figure 7 of the paper: scores against the length of pre-training, GlaS with 8 and 85 labels. One training, which each
# round continues and of whose end it keeps a copy; the paper gives no numbers. Wants data/glas and a GPU. Can be
# stopped and continued by running this file again; a length is not added below one that was reached.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
ACCUMULATE=${ACCUMULATE:-8} # a step of the paper's network keeps 2.3 GB a crop; with PRESET=laptop use 1
SPLIT=${SPLIT:-test}
LENGTHS=${LENGTHS:-1000 2500 5000 10000 20000}
OUT=runs/mdm-glas-length

for STEPS in $LENGTHS; do
  [ -e $OUT-$STEPS/last.pt ] && continue
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data glas --preset $PRESET --steps $STEPS --out $OUT
  mkdir -p $OUT-$STEPS
  cp $OUT/config.json $OUT-$STEPS/
  cp $OUT/last.pt $OUT-$STEPS/part.pt && mv $OUT-$STEPS/part.pt $OUT-$STEPS/last.pt # whole, or not there
done
for STEPS in $LENGTHS; do
  for LABELS in 85 8; do
    $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --labels $LABELS --out $OUT-$STEPS
  done
done
