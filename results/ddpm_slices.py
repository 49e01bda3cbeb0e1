"""Dice of single slices: what comes closest to the averages of the label-efficiency paper.

    python -m results.ddpm_slices RUN/finetune-4-decoder-draw0 RUN/finetune-4-scratch-draw0

The paper does not say how it averages. Its IoU suggests single slices, where the script scores
whole cases. Reads the masks that `finetune` and `evaluate` leave in RUN/predictions, and the data
of the run. Prints for each organ the mean over the slices on which truth or prediction show it,
then the mean over organs. All slices go to RUN/metrics_slices.csv.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import InputError, loaders, metrics, tables

COLUMNS = ["case", "slice", "class", "dice", "iou"]


def slice_rows(
    case: str, mask: np.ndarray, truth: np.ndarray, classes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a row for each slice and organ that mask or truth [X, Y, Z] shows there."""
    rows = []
    for name, value in classes.items():
        p = np.isin(mask, value)
        g = np.isin(truth, value)
        for k in np.flatnonzero((p | g).any(axis=(0, 1))):
            dice = metrics.dice(p[:, :, k], g[:, :, k])
            row = {"case": case, "slice": int(k), "class": name, "dice": dice}
            rows.append(row | {"iou": metrics.iou_from_dice(dice)})
    return rows


def run_rows(folder: Path, data: Any) -> list[dict[str, Any]]:
    """Return the rows of all cases of a run. Raises InputError where it left no masks."""
    files = sorted(folder.glob("predictions/*.nii.gz"))
    if not files:
        raise InputError(f"{folder}/predictions holds no masks; run finetune or evaluate first")
    values = {int(value): int(key) for key, value in data.meta["label_values"].items()}
    rows = []
    for file in files:
        case = loaders.nifti_stem(file)
        published = loaders.read_nifti(file).data
        mask = np.zeros(published.shape, np.uint8)
        for value, prepared in values.items():
            mask[published == value] = prepared
        rows += slice_rows(case, mask, np.asarray(data.label(case)), data.scored)
    return rows


def show(args: Namespace) -> None:
    """Print a row a run, and write all slices."""
    lines: list[list[str]] = []
    for folder in map(Path, args.runs):
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is no run folder; name one that finetune wrote")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        data = loaders.open_data(args.data or config["data"], "slices")
        rows = run_rows(folder, data)
        tables.write_metrics_csv(folder / "metrics_slices.csv", rows, COLUMNS)
        if not lines:
            lines.append(["run", "slices", *data.scored, "Dice mean", "IoU mean"])
        means: dict[str, list[float]] = {"dice": [], "iou": []}
        for name in data.scored:
            for score, values in means.items():
                chosen = [row[score] for row in rows if row["class"] == name]
                values.append(float(tables.nan_mean(np.array(chosen or [np.nan]))))
        cells = [tables.number(value, "dice") for value in means["dice"]]
        averages = [tables.number(float(np.nanmean(v)), "dice") for v in means.values()]
        lines.append([str(folder), str(len(rows)), *cells, *averages])
    tables.say(tables.layout(lines))


def main(argv: Sequence[str]) -> int:
    """Return the exit code."""
    parser = tables.Parser("python -m results.ddpm_slices", description=__doc__.split("\n")[0])
    parser.set_defaults(run=show)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of fine-tuning")
    parser.add_argument("--data", default="", help="the prepared slices; default those of the run")
    return tables.run("ddpm_slices", parser, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
