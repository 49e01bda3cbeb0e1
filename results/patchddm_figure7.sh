#!/usr/bin/env bash
# Figure 7 of the PatchDDM paper: image, truth, three members, the mask of the mean and the variance of 15 members divided
# by its maximum, for the first test case of the 2 mm BraTS set, from the checkpoint of results/patchddm_table1.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUN=runs/table1-brats2mm-patch
[ -e $RUN/best.pt ] && WEIGHTS=$RUN/best.pt || WEIGHTS=$RUN/last.pt
OUT=runs/figure7-brats2mm
mkdir -p $OUT
$PYTHON patchddm.py evaluate --data brats2mm --checkpoint $WEIGHTS --out $OUT --ensemble 15 --limit 1 --save-members --save-maps --quiet
ls $OUT/figures
