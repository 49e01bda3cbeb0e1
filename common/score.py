"""Scores of any two folders of masks: NIfTI volumes or images, paired by name.

    python -m common.metrics score --pred DIR --true DIR       every label value is a class
    python -m common.metrics score ... --classes whole=1+2+4 core=1+4       unions of label values
    python -m common.metrics score ... --instances             values are object ids: AJI and others

One file that cannot be read does not stop it: the others are scored, and it is named at the end.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import InputError, loaders, metrics, tables
from common.metrics import COLUMNS, NAN
from common.tables import Row, say, some

MASK = re.compile(r"(.+?)\.(nii|nii\.gz|png|tif|tiff|bmp)", re.IGNORECASE)
# What publishers add to a case's name: a_seg (BraTS), a_anno (GlaS); label0006 (BTCV), a_0000.
MARK = re.compile(r"[_-](seg|anno|mask|label)$", re.IGNORECASE)
AFFIX = re.compile(r"^(img|label)(?=\d)|_0000$", re.IGNORECASE)


def mask_files(folder: str) -> dict[str, list[Path]]:
    """Return case -> its masks. Raise InputError where there is none.

    Where names end in _seg, _anno, _mask or _label, only they are masks. They may lie in folders
    below, as BraTS has them.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder} is no folder in {Path.cwd()}; expected masks; check the path")
    masks = {f: MASK.fullmatch(f.name) for f in loaders.walk_files(root)}
    names = {file: match[1] for file, match in masks.items() if match}
    marked = {file: MARK.sub("", name) for file, name in names.items() if MARK.search(name)}
    direct = {file: name for file, name in names.items() if file.parent == root}
    marked_direct = {file: name for file, name in marked.items() if file.parent == root}
    names = marked_direct or direct or marked
    if not names:
        raise InputError(f"{folder} has no .nii, .nii.gz, .png, .tif or .bmp masks; check the path")
    cases: dict[str, list[Path]] = {}
    for file, name in names.items():
        cases.setdefault(AFFIX.sub("", name), []).append(file)
    others = Counter(f.suffix for f in masks if f.parent == root and f not in names)
    if others:
        listed = ", ".join(f"{count} {ending}" for ending, count in others.items())
        say(f"{folder}: not taken for masks: {listed}")
    return cases


def read_labels(files: Sequence[Path]) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    """Return integer labels, spacing (of images 1 pixel) and affine of the only mask of a case."""
    if len(files) > 1:
        raise InputError(f"two masks, {files[0]} and {files[1]}; expected one; remove the other")
    file = files[0]
    if not loaders.NIFTI_ENDING.search(file.name):
        return loaders.read_mask(file), (1.0, 1.0), np.eye(4)
    volume = loaders.read_nifti(file)
    labels = np.rint(loaders.as_volume(volume))
    if np.abs(volume.data - labels).max() > 1e-3:
        raise InputError(f"{file}: values are not integers; expected labels")
    return labels.astype(np.int32), volume.spacing, volume.affine


def sound_pairs(
    pred_folder: str, true_folder: str, faults: list[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, tuple[float, ...]]]:
    """Yield case, pred, true and spacing of each pair of masks; add the other cases to faults."""
    preds = mask_files(pred_folder)
    trues = mask_files(true_folder)
    for case in sorted({*preds, *trues}, key=loaders.natural_key):
        try:
            for folder, files in ((pred_folder, preds), (true_folder, trues)):
                if case not in files:
                    raise InputError(f"no mask in {folder}")
            pred, _, affine_pred = read_labels(preds[case])
            true, spacing, affine_true = read_labels(trues[case])
            if pred.shape != true.shape:
                raise InputError(f"prediction has shape {pred.shape}, truth has {true.shape}")
            apart = np.abs(affine_pred - affine_true).max()
            if apart > 1e-3:
                raise InputError(f"affines differ by {apart:.3g} mm, expected at most 0.001")
        except InputError as error:
            faults.append(f"{case}: {error}")
            continue
        yield case, pred, true, spacing


def parse_classes(words: Sequence[str]) -> dict[str, list[int]]:
    """Return name -> label values of NAME=VALUE and NAME=VALUE+VALUE words."""
    classes: dict[str, list[int]] = {}
    for part in ",".join(words).split(","):
        if not part:
            continue
        name, _, values = part.partition("=")
        if name in classes:
            raise InputError(f"--classes names {name} twice; give one name to each class")
        try:
            classes[name] = [int(value) for value in values.split("+")]
        except ValueError as error:
            raise InputError(
                f"--classes {part} is not understood; expected NAME=VALUE, or NAME=VALUE+VALUE for "
                "a union; write for example --classes liver=1+2 tumour=2"
            ) from error
    return classes


def classes_beside(folder: str) -> dict[str, list[int]]:
    """Return the classes of nnU-Net's dataset.json in a folder or beside it; {} without one."""
    for file in (Path(folder) / "dataset.json", Path(folder).resolve().parent / "dataset.json"):
        try:
            labels = json.loads(file.read_text(encoding="utf-8"))["labels"]
            # {"liver": 1, "whole": [1, 2]}, or as in the Decathlon {"1": "liver"}
            pairs = [(v, k) if str(k).isdigit() else (k, v) for k, v in labels.items()]
            classes = {str(name): np.atleast_1d(v).astype(int).tolist() for name, v in pairs}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # absent, or of another program
        say(f"classes: {file}")
        return {name: values for name, values in classes.items() if values != [0]}
    return {}


def score(args: argparse.Namespace) -> None:
    """Print the scores of all pairs of masks, then name what could not be paired or read."""
    classes = parse_classes(args.classes)
    if args.tolerance < 0:
        raise InputError(f"--tolerance is {args.tolerance:g}; expected mm of 0 or more")
    if args.instances and (classes or args.out or args.tolerance != 1):
        raise InputError("--instances prints object scores alone; leave the other flags out")
    for name in ("metrics.csv", "summary.json"):
        if args.out and not args.overwrite and (Path(args.out) / name).exists():
            raise InputError(f"{args.out}/{name} exists; choose another --out, or add --overwrite")
    faults: list[str] = []
    pairs = sound_pairs(args.pred, args.true, faults)
    text = ""
    if args.instances:
        text = instance_table(list(pairs))
    else:
        classes = classes or classes_beside(args.true) or classes_beside(args.pred)
        rows, note = class_rows(pairs, classes, args.tolerance)
        if rows and args.out:
            text = f"{tables.report(args.out, rows)}\n{note}"
        elif rows:
            text = f"{tables.format_summary(tables.summarise(rows))}\n{note}"
    if text:
        say(text)
    if faults:
        raise InputError(f"not scored, {len(faults)} cases: {' | '.join(faults)}")
    if not text:
        raise InputError("all masks are empty; expected label values above 0; check the folders")


def class_rows(
    pairs: Iterable[tuple], classes: Mapping[str, Sequence[Any]], tolerance_mm: float
) -> tuple[list[Row], str]:
    """Return a row for each case and class, and a note on units and values.

    Without classes each value is one. The class "ignore" has the value of voxels that count not.
    """
    ignore = classes["ignore"][0] if "ignore" in classes else None
    classes = {name: values for name, values in classes.items() if name != "ignore"}
    rows = {}
    present: set[int] = set()
    units = set()
    for case, pred, true, spacing in pairs:
        values = sorted({*np.unique(pred).tolist(), *np.unique(true).tolist()} - {0, ignore})
        present.update(values)
        units.add("pixels (images have no spacing)" if true.ndim == 2 else "mm")
        named = classes or {str(value): [value] for value in values}
        rows[case] = metrics.evaluate_case(case, pred, true, spacing, named, tolerance_mm, ignore)
    note = f"Units: {' and '.join(sorted(units))}; scored on the grid of the files."
    if classes:
        unnamed = present - {value for values in classes.values() for value in values}
        if unnamed:
            note += f" Values of no class: {some([str(value) for value in sorted(unnamed)])}."
        return [row for case in rows for row in rows[case]], note
    # A value that a case has on neither side has no row yet.
    empty = dict.fromkeys(COLUMNS, NAN) | {"volume_true_ml": 0.0, "volume_pred_ml": 0.0}
    complete: list[Row] = []
    for case, of_case in rows.items():
        by_class = {row["class"]: row for row in of_case}
        for name in map(str, sorted(present)):
            blank = {**empty, "case": case, "class": name, "share": 0.0}
            complete.append(by_class.get(name, blank))
    return complete, note


def instance_table(pairs: Sequence[tuple]) -> str:
    """Return the object scores, a row an image, and their mean±SD.

    A side whose maps all have one value is binary; its connected pieces are the objects.
    """
    if not pairs:
        return ""
    sides = []
    for side, k in (("pred", 1), ("true", 2)):
        maps = [pair[k] for pair in pairs]
        if all(len(np.unique(ids[ids != 0])) <= 1 for ids in maps):
            say(f"{side}: one value a mask, so that its connected pieces are the objects")
            maps = [metrics.components(ids != 0) for ids in maps]
        sides.append(maps)
    rows = [["image", "true objects", "predicted", "Dice", "IoU", "AJI", "object Dice"]]
    values = []
    for pair, pred, true in zip(pairs, *sides):
        values.append([metrics.dice(pred != 0, true != 0), metrics.aji_binary(pred, true)])
        values[-1] += [metrics.aji(pred, true), metrics.object_dice(pred, true)]
        objects = [str(len(np.unique(ids[ids != 0]))) for ids in (true, pred)]
        rows.append([pair[0], *objects, *(f"{value:.4f}" for value in values[-1])])
    means = [tables.statistics(np.array(column)) for column in zip(*values)]
    rows.append(
        [
            f"mean±SD, n = {means[0]['n']}",
            "",
            "",
            *(f"{m['mean']:.4f}±{m['sd']:.4f}" for m in means),
        ]
    )
    return tables.layout(rows)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of score."""
    parser.add_argument("--pred", required=True, metavar="DIR", help="predicted masks")
    parser.add_argument("--true", required=True, metavar="DIR", help="reference masks")
    help = "or NAME=VALUE+VALUE; ignore=VALUE: not scored; default: dataset.json's, or each value"
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME=VALUE", help=help)
    help = "values are object ids: print Dice, IoU, AJI and object Dice of each image"
    parser.add_argument("--instances", action="store_true", help=help)
    help = "of NSD, in mm (default 1)"
    parser.add_argument("--tolerance", type=float, default=1.0, metavar="MM", help=help)
    parser.add_argument("--out", metavar="DIR", help="write metrics.csv and summary.json there")
    parser.add_argument("--overwrite", action="store_true", help="replace these files in --out")
