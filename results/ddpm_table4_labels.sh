#!/usr/bin/env bash
# Tables 3 (rows "ours"), 4 and 5 of the paper: 4, 39, 388 labelled slices (0.1, 1, 10 %) and all; scratch, decoder and
# DDPM-Seg; beside them linear, full and the controls with a random start. t = 0 throughout (linear 200); both Dice terms;
# five draws of 4, three of 39 and 388, one of all. Scratch is also tried with other learning rates. Which of them counts
# can be read from validation cases: prepare with --split-sizes 36,4,10 and set VAL=1; without, all 40 cases are trained
# on, as in the paper. Its decoder M with 388 slices has t = 200: here beside t = 0.
# Wants data/flare22, the checkpoints of results/ddpm_table1.sh, and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
VAL=${VAL:-}
OUT=runs/ddpm-flare22

for VARIANT in S M L; do
  RUN=$OUT-c128-250000
  [ $VARIANT = L ] && RUN=$OUT-c256-300000
  for LABELS in 4 39 388 all; do
    DRAWS="0 1 2"
    [ $LABELS = 4 ] && DRAWS="0 1 2 3 4"
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
      for LR in 1e-4 3e-4 1e-3; do
        for SPLIT in ${VAL:+val} test; do
          $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels $LABELS --draw $DRAW --strategy scratch --lr $LR --variant $VARIANT --split $SPLIT --out $RUN
        done
      done
    done
  done
done
for DRAW in 0 1 2; do
  $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels 388 --draw $DRAW --strategy decoder --t 200 --variant M --out $OUT-c128-250000
done
for RUN in $OUT-c128-250000 $OUT-c256-300000; do
  VARIANT=S
  [ $RUN = $OUT-c256-300000 ] && VARIANT=L
  for LABELS in 4 39; do
    DRAWS="0 1 2"
    [ $LABELS = 4 ] && DRAWS="0 1 2 3 4"
    for DRAW in $DRAWS; do
      $PYTHON ddpm_pretrain_finetune.py ddpmseg --quiet --data flare22 --labels $LABELS --draw $DRAW --variant $VARIANT --out $RUN
    done
  done
  shopt -s nullglob
  $PYTHON -m results.draws $RUN/finetune-*-{joint,per-class}{,-random}{,-t200}{,-M,-L}-draw? $RUN/ddpmseg-* --plot $RUN/labels.png --csv $RUN/labels.csv
  for LABELS in 4 39 388 all; do
    [ -z "$VAL" ] || $PYTHON -m common.metrics table $RUN/finetune-$LABELS-scratch-joint*-draw?/val/summary.json --metric dice --seeds
    # each organ, as in table 5
    $PYTHON -m common.metrics table $RUN/finetune-$LABELS-{scratch,decoder,full,linear}-joint{,-M,-L}-draw?/summary.json \
      $RUN/ddpmseg-$LABELS-draw?/summary.json --metric dice iou --seeds
    for LR in 0.0001 0.0003 0.001; do
      $PYTHON -m results.draws $RUN/finetune-$LABELS-scratch-joint{,-M,-L}{,-lr*}-draw? $RUN/finetune-$LABELS-{decoder,full}-joint{,-M,-L}-draw? \
        --against "scratch, lr=$LR"
    done
  done
done
