#!/usr/bin/env bash
# Figure 7 of the paper: scores against the length of pre-training, GlaS with 8 and 85 labels. One training, which each
# round continues; the paper gives no numbers. Wants data/glas and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
SPLIT=${SPLIT:-test}
LENGTHS=${LENGTHS:-1000 2500 5000 10000 20000}
OUT=runs/mdm-glas-length

for STEPS in $LENGTHS; do
  $PYTHON masked_diffusion.py pretrain --quiet --data glas --preset $PRESET --steps $STEPS --out $OUT
  for LABELS in 85 8; do
    $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --labels $LABELS --checkpoint $OUT/last.pt --out $OUT-$STEPS
  done
done
