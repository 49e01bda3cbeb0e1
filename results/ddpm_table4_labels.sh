#!/usr/bin/env bash
# Tables 3 (rows "ours"), 4 and 5 of the paper: 0.1, 1, 10 % of the labels and all; scratch, decoder, DDPM-Seg; beside
# them full and the controls with a random start. t = 0 throughout; both Dice terms; five draws of 0.1 %, three of more,
# and scratch with three learning rates, of which the best on validation cases counts (prepare with --split-sizes 36,4,10).
# Wants data/flare22, the checkpoints of results/ddpm_table1.sh, and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=runs/ddpm-flare22

for VARIANT in S M L; do
  RUN=$OUT-c128-250000
  [ $VARIANT = L ] && RUN=$OUT-c256-300000
  for LABELS in 0.1% 1% 10% all; do
    DRAWS="0 1 2"
    [ $LABELS = 0.1% ] && DRAWS="0 1 2 3 4"
    [ $LABELS = all ] && DRAWS=0
    for DRAW in $DRAWS; do
      for DICE in joint per-class; do
        for STRATEGY in scratch decoder full linear; do
          $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels $LABELS --draw $DRAW --dice $DICE --strategy $STRATEGY --variant $VARIANT --out $RUN
        done
        for STRATEGY in decoder full; do
          $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels $LABELS --draw $DRAW --dice $DICE --strategy $STRATEGY --variant $VARIANT --init none --out $RUN
        done
      done
      for LR in 3e-4 1e-3; do
        $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels $LABELS --draw $DRAW --strategy scratch --lr $LR --variant $VARIANT --split val --out $RUN
      done
    done
  done
done
for RUN in $OUT-c128-250000 $OUT-c256-300000; do
  for LABELS in 0.1% 1%; do
    $PYTHON ddpm_pretrain_finetune.py ddpmseg --quiet --data flare22 --labels $LABELS --out $RUN
  done
  $PYTHON -m common.metrics draws "$RUN/finetune-*" --plot $RUN/labels.png --csv $RUN/labels.csv
done
