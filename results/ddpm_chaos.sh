#!/usr/bin/env bash
# Label efficiency on CHAOS (T2-SPIR, 16 volumes, 4 organs) on a laptop: pre-training on the 10 training volumes without
# labels, then 4, 39 and all of their slices; five draws of 4 (DDPM-Seg three), three of 39; t = 0 (linear 200, DDPM-Seg
# 50, 150, 250), nothing chosen on test cases. One pre-training, and one initialisation for all draws. Slices are not
# mirrored: the two kidneys differ by their side alone. 346 slices are soon known by heart: what follows the comparison of
# stages starts from the one with the least error of the noise in slices of the validation volumes.
# Prepare: python -m data_prep.msd --src CHAOS_T2 --dst data/chaos64 --as-slices --side 64 --split-sizes 10,2,4
# Pre-training is made in stages and can be stopped and continued; so can the rest, by running this file again. JOBS=2
# fine-tunes two networks at once, each on its share of the cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
STAGES=${STAGES:-500 1000 2000 5000 10000 20000}
JOBS=${JOBS:-1}
RUN=runs/ddpm-chaos64
FLAGS="--quiet --data chaos64 --preset laptop"

for STEPS in $STAGES; do
  [ -e $RUN-$STEPS/last.pt ] && continue
  $PYTHON ddpm_pretrain_finetune.py pretrain $FLAGS --flip off --lr-steps 20000 --eval-every 250 --steps $STEPS --out $RUN
  mkdir -p $RUN-$STEPS
  cp $RUN/config.json $RUN/log.csv $RUN-$STEPS/
  cp $RUN/last.pt $RUN-$STEPS/part.pt && mv $RUN-$STEPS/part.pt $RUN-$STEPS/last.pt # whole, or not there
done
tail -n 1 $RUN/log.csv | cut -d, -f1,2 # steps and seconds of the pre-training

RUNNING=()
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # where one fails or is stopped, the others save and stop
tune() { # DRAW LABELS STRATEGY FLAGS...; waits while JOBS are at work
  if [ ${#RUNNING[@]} -ge "$JOBS" ]; then
    wait "${RUNNING[0]}" # ends this file where it failed
    RUNNING=("${RUNNING[@]:1}")
  fi
  (
    [ "$JOBS" = 1 ] || export OMP_NUM_THREADS=$(($(nproc) > JOBS ? $(nproc) / JOBS : 1))
    exec $PYTHON ddpm_pretrain_finetune.py finetune $FLAGS --draw "$1" --labels "$2" --strategy "$3" "${@:4}"
  ) &
  RUNNING+=($!)
}
settle() { # until all are done; stops here where one of them failed
  for JOB in "${RUNNING[@]}"; do wait "$JOB"; done
  RUNNING=()
}

# What the length of the pre-training is worth: samples, and four labels, at each stage. Samples by 250 steps of DDPM: the
# brightness that the first steps guess is wrong so early in training, and DDIM never corrects it.
for DRAW in 0 1 2 3 4; do
  tune $DRAW 4 scratch --out $RUN
done
STAGED=("$RUN/finetune-4-scratch-per-class-draw?")
for STEPS in $STAGES; do
  settle
  [ -e $RUN-$STEPS/samples.npy ] || $PYTHON ddpm_pretrain_finetune.py sample $FLAGS --num-samples 128 --sampler ddpm --sampling-steps 250 --out $RUN-$STEPS
  $PYTHON ddpm_pretrain_finetune.py score $FLAGS --out $RUN-$STEPS
  for DRAW in 0 1 2 3 4; do
    for STRATEGY in decoder full; do
      tune $DRAW 4 $STRATEGY --out $RUN-$STEPS
    done
  done
  STAGED+=("$RUN-$STEPS/finetune-4-decoder-per-class-draw?" "$RUN-$STEPS/finetune-4-full-per-class-draw?")
done
settle
$PYTHON -m results.draws "${STAGED[@]}"
# Slices that each stage draws, below slices of validation and test volumes; the distance of the two and its floor.
$PYTHON - $RUN $STAGES <<'END'
import csv
import sys
from pathlib import Path

import numpy as np

from common import figures, loaders

run, stages, data = sys.argv[1], sys.argv[2:], loaders.open_slices("chaos64", side=64)
held = [case for split in ("val", "test") for case in data.cases(split)]
images = [data.slice(case, data.depth(case) // 2) for case in held]
titles = ["real"] * len(images)
for steps in stages:
    images += list(np.load(f"{run}-{steps}/samples.npy")[: len(held)])
    titles += [f"{steps} steps"] * len(held)
    for row in csv.DictReader(Path(f"{run}-{steps}/score_rand.csv").open()):
        print(steps, *(f"{k} {v}" for k, v in row.items() if v))
print(figures.montage(images, titles, "results/ddpm_chaos_samples.png", columns=len(held), limits=(-1, 1)))
END

# The stage of the least error: the other Dice term, linear, the controls from random weights, and more labels.
BEST=$RUN-$(awk -F, -v stages=" $STAGES " 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "val_loss") v = i }
  NR > 1 && $v != "" && index(stages, " " $1 " ") && (best == "" || $v < least) { best = $1; least = $v }
  END { print best }' $RUN/log.csv)
echo "least error: $BEST"
for DRAW in 0 1 2 3 4; do
  tune $DRAW 4 scratch --dice joint --out $RUN
  for STRATEGY in decoder full; do
    tune $DRAW 4 $STRATEGY --dice joint --out $BEST
    tune $DRAW 4 $STRATEGY --init none --out $BEST
  done
  tune $DRAW 4 linear --out $BEST
done
for DRAW in 0 1 2; do
  tune $DRAW 39 scratch --out $RUN
  tune $DRAW 39 decoder --out $BEST
  tune $DRAW 39 full --out $BEST
done
tune 0 all scratch --out $RUN
tune 0 all decoder --out $BEST
tune 0 all full --out $BEST

# Scratch with other learning rates; the validation cases say which one counts, the test cases what it is worth.
for SPLIT in val test; do
  for DRAW in 0 1 2 3 4; do
    for LR in 3e-4 1e-3 3e-3; do
      tune $DRAW 4 scratch --lr $LR --split $SPLIT --out $RUN
    done
  done
  settle
done
$PYTHON -m common.metrics table $RUN/finetune-4-scratch-per-class*-draw?/val/summary.json --metric dice --seeds
for LR in 0.0003 0.001 0.003; do
  $PYTHON -m results.draws "$RUN/finetune-4-scratch-per-class*-draw?" "$BEST/finetune-4-decoder-per-class-draw?" \
    "$BEST/finetune-4-full-per-class-draw?" --against "scratch, lr=$LR"
done
for DRAW in 0 1 2; do
  $PYTHON ddpm_pretrain_finetune.py ddpmseg $FLAGS --labels 4 --draw $DRAW --out $BEST
done
$PYTHON -m results.draws "$RUN/finetune-*-scratch-per-class-draw?" "$BEST/finetune-*-per-class-draw?" "$BEST/finetune-*-random-draw?" "$BEST/ddpmseg-*" \
  --plot results/ddpm_chaos.png
# Each organ.
for LABELS in 4 39 all; do
  $PYTHON -m common.metrics table --metric dice iou --seeds $RUN/finetune-$LABELS-scratch-per-class-draw?/summary.json \
    $BEST/finetune-$LABELS-{decoder,full}-per-class-draw?/summary.json
done
$PYTHON -m common.metrics table --metric dice iou --seeds $BEST/{finetune-4-linear-per-class,ddpmseg-4}-draw?/summary.json
for STRATEGY in decoder full; do
  WORD=$([ $STRATEGY = full ] && echo start || echo encoder)
  $PYTHON -m results.draws "$BEST/finetune-4-$STRATEGY-per-class-draw?" "$BEST/finetune-4-$STRATEGY-per-class-random-draw?" \
    --against "$STRATEGY, random $WORD"
done
$PYTHON -m results.draws "$RUN/finetune-4-scratch-joint-draw?" "$BEST/finetune-4-*-joint-draw?"
