#!/usr/bin/env bash
# Table 1 of the paper: 2000 generated against 2000 real slices after 50,000 to 300,000 steps, c = 128 and 256.
# Our columns are fd_rand and its like (D8); give FEATURES=inception:FILE for fid and sfid. Wants data/flare22 and a GPU;
# with several, put torchrun --nproc_per_node=N for $PYTHON. One of 80 GB takes the batch of c = 256 in two parts
# (ACCUMULATE). Finished stages are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
FEATURES=${FEATURES:-rand}
ACCUMULATE=${ACCUMULATE:-2}
OUT=runs/ddpm-flare22

for C in 128 256; do
  RUN=$OUT-c$C
  for STEPS in 50000 100000 150000 200000 250000 300000; do
    [ -e $RUN-$STEPS/last.pt ] && continue
    $PYTHON ddpm_pretrain_finetune.py pretrain --quiet --data flare22 --num-channels $C --lr-steps 300000 --steps $STEPS --accumulate $ACCUMULATE --out $RUN
    mkdir -p $RUN-$STEPS
    cp $RUN/config.json $RUN-$STEPS/
    cp $RUN/last.pt $RUN-$STEPS/part.pt && mv $RUN-$STEPS/part.pt $RUN-$STEPS/last.pt # whole, or not there
  done
  for STEPS in 50000 100000 150000 200000 250000 300000; do
    [ -e $RUN-$STEPS/samples.npy ] || $PYTHON ddpm_pretrain_finetune.py sample --quiet --data flare22 --num-samples 2000 --out $RUN-$STEPS
    $PYTHON ddpm_pretrain_finetune.py score --quiet --data flare22 --features $FEATURES --out $RUN-$STEPS
  done
done
