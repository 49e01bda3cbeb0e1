#!/usr/bin/env bash
# Figure 7 of the PatchDDM paper: image, truth, three members, the mask of the mean and the variance of 15 members divided
# by its maximum, for the first test case, from a checkpoint of results/patchddm_table1.sh (DATA=brats2mm for the other).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=${DATA:-hippocampus}
RUN=runs/table1-$DATA-patch
[ -e "$RUN/best.pt" ] && WEIGHTS=$RUN/best.pt || WEIGHTS=$RUN/last.pt
OUT=runs/figure7-$DATA
$PYTHON patchddm.py evaluate --data "$DATA" --checkpoint "$WEIGHTS" --out "$OUT" --ensemble 15 --limit 1 --save-members --save-maps --quiet
ls "$OUT/figures"
