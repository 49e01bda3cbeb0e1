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
# IoU against severity: means over the kinds, and over the classifiers of each
$PYTHON - $OUT "$KINDS" <<'END'
import csv
import sys
from pathlib import Path
from statistics import mean

from common import figures

out, kinds = sys.argv[1], sys.argv[2].split()
lines = {}
for method in ("mdm", "ddpm", "mae"):
    found = []
    for severity in range(1, 6):
        tables = [Path(f"{out}-{method}/corrupt-{kind}-{severity}/table.csv") for kind in kinds]
        found.append(mean(float(row["iou"]) for table in tables for row in csv.DictReader(table.open()) if row["run"]))
    print(method, *(f"severity {s}: {v:.4f}" for s, v in enumerate(found, 1)))
    lines[method.upper()] = list(range(1, 6)), found
print(figures.curves(lines, f"{out}-corrupt.png", "", "severity", "mean IoU", dots=True))
END
