#!/usr/bin/env bash
# MoNuSeg on a laptop: nuclei with 3 and with all labelled images; rows MDM, DDPM, the same network untrained, supervised.
# SRC holds the publisher's archives or folders, of which images of half the width and height are made. Pre-training sees
# the training images, with and without polygons, and no test image: 1,500 steps of 16 crops of 64 pixels, half an hour of
# one core; the supervised network takes as many. Under each table stands what perfect masks reach when nuclei that touch
# are not parted (`the truth itself`). Nothing is chosen on test images. All can be stopped and continued by running this
# file again.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the folder of MoNuSeg}
PYTHON=${PYTHON:-python}
D=runs/mdm-monuseg
FLAGS="--data monuseg-small --preset laptop --pretrain-on train --steps 1500 --quiet"

[ -e data/monuseg-small/dataset.json ] ||
  $PYTHON -m data_prep.monuseg --src "$SRC" --dst data/monuseg-small --subset --reduce 2

$PYTHON masked_diffusion.py pretrain $FLAGS --out $D-mdm
$PYTHON masked_diffusion.py pretrain $FLAGS --method ddpm --out $D-ddpm
$PYTHON masked_diffusion.py reconstruct $FLAGS --limit 10 --out $D-mdm
for LABELS in 3 0; do
  $PYTHON masked_diffusion.py segment $FLAGS --labels $LABELS --stop-epoch 30 --out $D-mdm
  $PYTHON masked_diffusion.py segment $FLAGS --labels $LABELS --stop-epoch 30 --method ddpm --out $D-ddpm
  $PYTHON masked_diffusion.py segment $FLAGS --labels $LABELS --stop-epoch 30 --checkpoint none --out $D-random
  $PYTHON masked_diffusion.py segment $FLAGS --labels $LABELS --method unet --runs 1 --out $D-unet
  NAME=$([ "$LABELS" = 0 ] && echo all || echo "$LABELS")
  $PYTHON -m common.metrics compare $D-ddpm/segment-"$NAME" $D-mdm/segment-"$NAME" --metric dice
  $PYTHON -m common.metrics compare $D-random/segment-"$NAME"-random $D-mdm/segment-"$NAME" --metric dice
done
