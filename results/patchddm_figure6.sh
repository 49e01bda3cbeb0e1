#!/usr/bin/env bash
# Figure 6 of the PatchDDM paper: where patches of 128 voxels start in 256, by DRAWS draws of what
# the training calls, beside the paper's density, a trapezoid. Seconds; no data are needed.
set -euo pipefail
cd "$(dirname "$0")/.."
${PYTHON:-python} - "${FIGURE:-results/patchddm_figure6.png}" "${DRAWS:-200000}" <<'PROGRAM'
import sys

import numpy as np

import patchddm
from common import figures

path, draws = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
starts = np.arange(129)
z = np.abs(2 * starts / 128 - 1)
density = np.where(z <= 1 / 3, 3 / 4, 9 / 8 * (1 - z)) * 2 / 128
drawn = [patchddm.draw_start(rng, 256, 128) for _ in range(draws)]
share = np.bincount(drawn, minlength=129) / draws
print(f"mean {np.mean(drawn):.2f}, variance {np.var(drawn):.1f}, P(0) {share[0]:.5f}, P(64) {share[64]:.5f}")
curves = {"density of the paper": (starts, density), f"{draws:,} draws": (starts, share)}
print(figures.lines(path, {"probability": curves}, "First voxel of a patch", "start"))
PROGRAM
