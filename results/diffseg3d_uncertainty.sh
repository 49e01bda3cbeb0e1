#!/usr/bin/env bash
# What a diffusion model gives that a U-net does not, on the checkpoints of results/diffseg3d_hippocampus.sh: whether its
# entropy tells its errors, what members from other noise add, and what is left of it on noisy and on darkened images.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
D=runs/diffseg3d-hippocampus
FLAGS="--preset laptop --quiet"

# 1. five members from other noise of one network, beside three networks from other seeds
for ROW in prev none; do
  $PYTHON diffseg3d_recycle.py evaluate $FLAGS --data hippocampus --checkpoint $D-$ROW-0/best.pt --ensemble 5 --save maps --out $D-members-$ROW
done
$PYTHON -m results.calibration $D-prev-0 $D-members-prev "$D-prev-?" $D-none-0 $D-members-none "$D-none-?" $D-unet-0 "$D-unet-?" \
  --data hippocampus --plot results/diffseg3d_uncertainty.png

# 2. the test images with Gaussian noise, or with another contrast: image ** gamma, in [0, 1]
$PYTHON - <<'PYTHON_END'
import json, shutil
from pathlib import Path
import numpy as np

source = Path("data/hippocampus")
for name, sd, gamma in (("noise05", 0.05, 1), ("noise10", 0.1, 1), ("noise20", 0.2, 1), ("gamma05", 0, 0.5), ("gamma20", 0, 2)):
    folder = source.with_name(f"hippocampus-{name}")
    if (folder / "dataset.json").exists():
        continue
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=lambda *_: ["dataset.json"])
    for number, case in enumerate(json.loads((source / "dataset.json").read_text())["splits"]["test"]):
        file = folder / "cases" / case / "image.npy"
        image = np.load(source / "cases" / case / "image.npy").astype(np.float32) ** gamma
        image += sd * np.random.default_rng(number).standard_normal(image.shape, np.float32)
        np.save(file, image.clip(0, 1).astype(np.float16))
    shutil.copy(source / "dataset.json", folder)  # the last: a folder with it is whole
PYTHON_END
# The control: a U-net that saw noise of any SD up to 0.2 in training, in half of the steps of the others
$PYTHON -m results.diffseg_rivals train $FLAGS --data hippocampus --eval-every 400 --steps 1600 --method unet --image-range 0,1 \
  --image-noise 0.2 --out $D-unet-noise-0
for NAME in hippocampus hippocampus-noise05 hippocampus-noise10 hippocampus-noise20; do
  $PYTHON -m results.diffseg_rivals evaluate $FLAGS --data $NAME --checkpoint $D-unet-noise-0/best.pt --out runs/diffseg3d-$NAME-unet-noise-0
done
for NAME in noise05 noise10 noise20 gamma05 gamma20; do
  for ROW in prev none unet; do
    for S in 0 1 2; do
      $PYTHON diffseg3d_recycle.py evaluate $FLAGS --data hippocampus-$NAME --checkpoint $D-$ROW-$S/best.pt --out $D-$NAME-$ROW-$S
    done
  done
  $PYTHON -m common.metrics table --seeds $D-$NAME-{prev,none,unet}-? --metric dice hd95_mm | sed -n '/runs in all/,$p'
  for S in 0 2; do
    $PYTHON -m common.metrics compare $D-$NAME-unet-$S $D-$NAME-prev-$S --metric dice
  done
done
$PYTHON diffseg3d_recycle.py evaluate $FLAGS --data hippocampus-noise20 --checkpoint $D-max-0/best.pt --out $D-noise20-max-0
for OTHER in $D-noise20-unet-2 $D-noise20-prev-2 $D-noise20-max-0; do
  $PYTHON -m common.metrics compare $D-noise20-unet-noise-0 $OTHER --metric dice
done
$PYTHON -m common.metrics compare $D-unet-2 $D-unet-noise-0 --metric dice
$PYTHON - <<'PYTHON_END'
from pathlib import Path
from common import figures, tables

lines = {}
for row, name in (("prev", "recycled"), ("none", "not recycled"), ("unet", "U-net")):
    x, y = [], []
    for percent in (0, 5, 10, 20):
        noise = f"-noise{percent:02}" if percent else ""
        files = [Path(f"runs/diffseg3d-hippocampus{noise}-{row}-{seed}/summary.json") for seed in (0, 1, 2)]
        means = [tables.read_summary(file)["mean"]["dice"]["mean"] for file in files if file.exists()]
        x.append(percent)
        y.append(sum(means) / len(means))
    lines[name] = (x, y)
x_name = "SD of the noise in the test images, % of their range"
print(figures.lines("results/diffseg3d_noise.png", {"mean Dice": lines}, "", x_name))
PYTHON_END
