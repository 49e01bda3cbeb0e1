#!/usr/bin/env bash
# Figure 7 of the PatchDDM paper: of VOLUMES test cases and the models patch, full and half the image,
# the truth, three members, the mean and the variance of ENSEMBLE members, from the checkpoints of
# results/patchddm_table1.sh. DATA=brats2mm CHANNEL=t1ce is the paper's own picture. The mean is that
# of the class CLASS, the first one by default. Shorter: VOLUMES=1 ENSEMBLE=3.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=${DATA:-hippocampus}
MODELS=${MODELS:-patch full half}
VOLUMES=${VOLUMES:-3}
ENSEMBLE=${ENSEMBLE:-15}
FIGURE=${FIGURE:-results/patchddm_figure7.png}

for model in $MODELS; do
  run=runs/table1-$DATA-$model
  out=runs/figure7-$DATA-$model
  [ -e "$out/test-$VOLUMES/summary.json" ] ||
    $PYTHON patchddm.py evaluate --data "$DATA" --checkpoint "$run" --out "$out" --limit "$VOLUMES" \
      --ensemble "$ENSEMBLE" --save all --quiet
done
$PYTHON - "$FIGURE" "$DATA" "$VOLUMES" "${CHANNEL:-}" "${CLASS:-}" $MODELS <<'PROGRAM'
import sys

import numpy as np

from common import figures, loaders

path, name, volumes, channel, class_name, *models = sys.argv[1:]
data = loaders.open_data(name)
channel = data.channels.index(channel) if channel else 0
class_name = class_name or next(iter(data.classes))
plain = loaders.file_names([f"mean_{class_name}"])[f"mean_{class_name}"]
prepared = {int(v): int(k) for k, v in data.meta["label_values"].items()}  # published -> prepared
colours = figures.class_colours(len(data.classes))
rows = {}
for case in loaders.cases_to_score(data, "test", int(volumes)):
    truth = np.asarray(data.label(case))
    z = int((truth > 0).sum(axis=(0, 1)).argmax())  # the slice with the largest object
    image = figures.radiological(np.asarray(data.image(case))[channel, :, :, z].astype(np.float32))

    def mask(array):
        labels = np.vectorize(prepared.get)(array[:, :, z])
        return figures.overlay(image, figures.radiological(labels), colours)

    def grey(array, highest):
        values = figures.radiological(array[:, :, z]) / max(highest, 1e-9)
        return np.repeat(np.rint(255 * values).astype(np.uint8)[..., None], 3, axis=2)

    for model in models:
        folder = f"runs/figure7-{name}-{model}/test-{volumes}/predictions"
        members = [loaders.read_nifti(f"{folder}/members/{case}_{n}.nii.gz").data for n in range(3)]
        mean = loaders.read_nifti(f"{folder}/maps/{case}_{plain}.nii.gz").data
        variance = loaders.read_nifti(f"{folder}/maps/{case}_variance.nii.gz").data
        maps = [grey(mean, 1), grey(variance, variance.max())]
        rows[f"{case}, {model}"] = [image, mask(truth), *map(mask, members), *maps]
titles = [data.channels[channel], "truth", "E1", "E2", "E3", f"mean, {class_name}", "variance / maximum"]
print(figures.montage(rows, titles, path, f"{name}, test cases"))
PROGRAM
