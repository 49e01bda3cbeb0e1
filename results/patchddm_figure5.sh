#!/usr/bin/env bash
# Figure 5 of the PatchDDM paper: Dice and HD95 over sampling steps x ensemble size, with the network evaluations of
# each cell, from the hippocampus checkpoint of results/patchddm_table1.sh; then Heun's method, whose 2 S - 1 evaluations
# stand beside DDIM's S at equal cost. A row that was sampled is not sampled again.
# The paper's own setting: python patchddm.py grid --data brats --sampling-steps 1000,100,50,20,10,5 --ensemble 1,3,5,7,15
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUN=runs/table1-hippocampus-patch
[ -e $RUN/best.pt ] && WEIGHTS=$RUN/best.pt || WEIGHTS=$RUN/last.pt
OUT=runs/figure5-hippocampus
LIMIT=${LIMIT:-4}              # cases
EVALUATIONS=${EVALUATIONS:-150} # of the network, a case; larger cells are left out, as some are in the paper

$PYTHON patchddm.py grid --data hippocampus --checkpoint $WEIGHTS --out $OUT --limit "$LIMIT" --sampling-steps 1000 --ensemble 1 \
  --quiet >/dev/null
$PYTHON patchddm.py grid --data hippocampus --checkpoint $WEIGHTS --out $OUT --limit "$LIMIT" --max-evaluations "$EVALUATIONS" \
  --sampling-steps 1000,100,50,39,20,19,10,9,5,1 --ensemble 1,3,5,7,15 --quiet
$PYTHON patchddm.py grid --data hippocampus --checkpoint $WEIGHTS --out $OUT --limit "$LIMIT" --max-evaluations "$EVALUATIONS" \
  --sampling-steps 20,10,5 --ensemble 1,3,5,7,15 --sampler heun --quiet
