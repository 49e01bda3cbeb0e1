#!/usr/bin/env bash
# Table 1 of the paper: GlaS with 85 and 8 labels, MoNuSeg with 30 and 3; the rows MDM, DDPM, MAE and supervised U-Net,
# and two floors of ours: the same network without pre-training, and (in every table printed) all-foreground and colour.
# Wants data/glas and data/monuseg, and a GPU; with several, put torchrun --nproc_per_node=N for $PYTHON in the rows.
# MAE has the length that its checkpoints name, 2,000 and 2,441 epochs (of 165 and 44 images, 128 a step): MAE_STEPS.
# Each row can be stopped and continued by running this file again. SPLIT=testA leaves the 20 images of testB
# out; a second SPLIT goes to folders below the first's, and what is compared at the end is the first.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PRESET=${PRESET:-paper}
ACCUMULATE=${ACCUMULATE:-8} # a step of the paper's network keeps 2.3 GB a crop; with PRESET=laptop use 1
SPLIT=${SPLIT:-test}
OUT=runs/mdm

for DATA in glas monuseg; do
  for METHOD in mdm ddpm; do
    $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --method $METHOD --out $OUT-$DATA-$METHOD
  done
  MAE=${MAE_STEPS:-$([ $DATA = glas ] && echo 2578 || echo 839)}
  $PYTHON masked_diffusion.py pretrain --quiet --accumulate $ACCUMULATE --data $DATA --preset $PRESET --method mae --steps $MAE --out $OUT-$DATA-mae
done

for LABELS in 85 8; do
  for METHOD in mdm ddpm mae; do
    $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --method $METHOD --labels $LABELS --out $OUT-glas-$METHOD
  done
  $PYTHON masked_diffusion.py segment --quiet --accumulate $ACCUMULATE --data glas --preset $PRESET --split $SPLIT --method unet --labels $LABELS --out $OUT-glas-unet
  $PYTHON masked_diffusion.py segment --quiet --data glas --preset $PRESET --split $SPLIT --checkpoint none --labels $LABELS --out $OUT-glas-random
done

for LABELS in 0 3; do
  for METHOD in mdm ddpm mae; do
    $PYTHON masked_diffusion.py segment --quiet --data monuseg --preset $PRESET --method $METHOD --labels $LABELS --stop-epoch 30 --out $OUT-monuseg-$METHOD
  done
  $PYTHON masked_diffusion.py segment --quiet --accumulate $ACCUMULATE --data monuseg --preset $PRESET --method unet --labels $LABELS --out $OUT-monuseg-unet
  $PYTHON masked_diffusion.py segment --quiet --data monuseg --preset $PRESET --checkpoint none --labels $LABELS --stop-epoch 30 --out $OUT-monuseg-random
done

$PYTHON -m common.metrics compare $OUT-glas-ddpm/segment-8 $OUT-glas-mdm/segment-8
$PYTHON -m common.metrics compare $OUT-glas-random/segment-8-random $OUT-glas-mdm/segment-8
$PYTHON -m common.metrics compare $OUT-monuseg-ddpm/segment-3 $OUT-monuseg-mdm/segment-3
