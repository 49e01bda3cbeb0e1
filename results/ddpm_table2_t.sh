#!/usr/bin/env bash
# Table 2 of the paper: all labels, scratch, decoder and linear, the frozen time t from 0 to 1000, networks S, M, L.
# The paper takes the best t on its test set; all rows are shown here, and none is chosen. Wants data/flare22, the
# checkpoints of results/ddpm_table1.sh (250,000 steps for c = 128, 300,000 for c = 256), and a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=runs/ddpm-flare22

for VARIANT in S M L; do
  RUN=$OUT-c128-250000
  [ $VARIANT = L ] && RUN=$OUT-c256-300000
  $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels all --strategy scratch --variant $VARIANT --out $RUN
  for T in 0 100 200 300 400 500 600 700 800 900 1000; do
    $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels all --strategy decoder --t $T --variant $VARIANT --out $RUN
    $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels all --strategy linear --t $T --variant $VARIANT --out $RUN
    # a control of ours: the network is shown noise of level t, as in its pre-training
    [ $T = 1000 ] || $PYTHON ddpm_pretrain_finetune.py finetune --quiet --data flare22 --labels all --strategy decoder --t $T --input noised --variant $VARIANT --out $RUN
  done
done
shopt -s nullglob
$PYTHON -m results.draws $OUT-c*/finetune-all-scratch-joint{,-M,-L}-draw0 \
  $OUT-c*/finetune-all-{decoder,linear}-joint{,-M,-L,-noised,-M-noised,-L-noised,-t*}-draw0
