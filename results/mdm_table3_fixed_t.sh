#!/usr/bin/env bash
# Table 3 of the paper: one level of corruption in pre-training and features (DDPM t = 250, MDM t = 50) instead of all.
# The rows with all levels are those of results/mdm_table1.sh. Wants data/glas and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
ACCUMULATE=${ACCUMULATE:-8} # a step of the paper's network keeps 2.3 GB a crop; with PRESET=laptop use 1
SPLIT=${SPLIT:-test}
OUT=runs/mdm-glas

$PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data glas --preset $PRESET --method ddpm --fixed-t 250 --out $OUT-ddpm-t250
$PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data glas --preset $PRESET --method mdm --fixed-t 50 --out $OUT-mdm-t50
for LABELS in 85 8; do
  $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --labels $LABELS --method ddpm --out $OUT-ddpm-t250
  $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --labels $LABELS --method mdm --out $OUT-mdm-t50
done
