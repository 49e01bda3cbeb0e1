#!/usr/bin/env bash
# Figure 6 of the paper: k-means of the features of each decoder block, without any label, on images of GlaS. From the
# networks of results/mdm_table1.sh; PRESET=laptop for those of results/mdm_glas.sh (OUT=runs/mdm-glas, DATA=glas-small).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
DATA=${DATA:-glas}
OUT=${OUT:-runs/mdm-glas}

for METHOD in mdm ddpm; do
  $PYTHON masked_diffusion.py cluster --quiet --data $DATA --preset $PRESET --method $METHOD --k 3 --out $OUT-$METHOD
done
