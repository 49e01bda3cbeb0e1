#!/usr/bin/env bash
# Figure 5 of the PatchDDM paper: Dice and HD95 over sampling steps x ensemble size, with the network
# evaluations of each cell, from the hippocampus checkpoint of results/patchddm_table1.sh. Then
# Heun's method, whose 2 S - 1 evaluations stand beside DDIM's S at equal cost. A row that was
# sampled is not sampled again. Shorter: LIMIT=1 MOST=20 EVALUATIONS=20.
# The paper's own setting: python -m results.patchddm_grid --data brats --out runs/brats-patch \
#   --sampling-steps 1000,100,50,20,10,5 --ensemble 15 --max-evaluations 0
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=${DATA:-hippocampus}
RUN=${RUN:-runs/table1-$DATA-patch}
OUT=${OUT:-runs/figure5-$DATA}
LIMIT=${LIMIT:-4}               # cases
MOST=${MOST:-1000}              # steps of the longest row, which has one member
EVALUATIONS=${EVALUATIONS:-150} # of the network, a case; larger cells are left out, as in the paper

grid() {
  $PYTHON -m results.patchddm_grid --data "$DATA" --checkpoint "$RUN" --out "$OUT" \
    --limit "$LIMIT" --quiet "$@"
}
grid --sampling-steps "$MOST" --ensemble 1 --max-evaluations 0 >/dev/null
grid --sampling-steps "$MOST",100,50,39,20,19,10,9,5,1 --max-evaluations "$EVALUATIONS"
grid --sampling-steps 20,10,5 --heun --max-evaluations "$EVALUATIONS"
