#!/usr/bin/env bash
# Figure 6 of the PatchDDM paper: where patches of 128 voxels start in 256, by 200,000 draws of what the training calls,
# beside the paper's density (a trapezoid); and the same for --patch-dist code and uniform. Seconds; no data needed.
set -euo pipefail
cd "$(dirname "$0")/.."
${PYTHON:-python} - <<'PROGRAM'
import numpy as np

import patchddm
from common import figures

rng, n = np.random.default_rng(0), 128
starts = np.arange(n + 1)
z = np.abs(2 * starts / n - 1)
lines = {"density of the paper": (starts, np.where(z <= 1 / 3, 3 / 4, 9 / 8 * (1 - z)) * 2 / n)}
for kind in ("paper", "code", "uniform"):
    drawn = [patchddm.draw_start(rng, 256, 128, kind) for _ in range(200_000)]
    share = np.bincount(drawn, minlength=n + 1) / len(drawn)
    lines[f"--patch-dist {kind}"] = (starts, share)
    print(f"{kind:8} mean {np.mean(drawn):.2f}, variance {np.var(drawn):.1f}, P(0) {share[0]:.5f}, P(64) {share[64]:.5f}")
figures.curves(lines, "results/patchddm_figure6.png", "First voxel of a patch", "start", "probability")
PROGRAM
