#!/usr/bin/env bash
# Table 6 of the paper: features at other times. The pre-trained networks are those of results/mdm_table1.sh.
# Wants data/glas and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
ACCUMULATE=${ACCUMULATE:-8} # a step of the paper's network keeps 2.3 GB a crop; with PRESET=laptop use 1
SPLIT=${SPLIT:-test}
OUT=runs/mdm-glas

for METHOD in ddpm mdm; do
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data glas --preset $PRESET --method $METHOD --out $OUT-$METHOD
  for TIMES in 0 50 150 250 650 50,150,250; do
    for LABELS in 85 8; do
      $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --method $METHOD --labels $LABELS --feature-t $TIMES --checkpoint $OUT-$METHOD/last.pt --out $OUT-$METHOD-features-$TIMES
    done
  done
done
