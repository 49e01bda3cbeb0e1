#!/usr/bin/env bash
# Figure 8 of the paper: IoU on corrupted test images, 15 corruptions of 5 severities; classifiers of results/mdm_table1.sh
# on 85 labels, trained on clean images. The paper gives no numbers. Wants data/glas and, made from it by
# `python -m data_prep.corrupt`, data/glas-corrupt with a split for each corruption and severity.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=runs/mdm-glas
KINDS="gaussian_noise shot_noise impulse_noise speckle_noise gaussian_blur defocus_blur glass_blur contrast brightness"
KINDS="$KINDS saturate jpeg pixelate elastic frost spatter"

for METHOD in mdm ddpm mae; do
  for KIND in $KINDS; do
    for SEVERITY in 1 2 3 4 5; do
      $PYTHON masked_diffusion.py evaluate --quiet --data glas-corrupt --split $KIND-$SEVERITY --checkpoint $OUT-$METHOD/segment-85 --out $OUT-$METHOD/corrupt-$KIND-$SEVERITY
    done
  done
done
