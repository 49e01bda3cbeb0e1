#!/usr/bin/env bash
# Figure 6 of the paper: k-means of the features of each decoder block, without any label, on images of GlaS. From the
# networks of results/mdm_table1.sh; for those of results/mdm_glas.sh PRESET=laptop DATA=glas-small
# RUNS="runs/mdm-glas-mdm-0 runs/mdm-glas-ddpm-0".
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
DATA=${DATA:-glas}
RUNS=${RUNS:-runs/mdm-glas-mdm runs/mdm-glas-ddpm}

for RUN in $RUNS; do
  $PYTHON masked_diffusion.py cluster --quiet --data $DATA --preset $PRESET --k 3 --out $RUN
done
