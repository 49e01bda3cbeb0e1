"""Prepare the CT volumes of AMOS22 (Zenodo 7155725 and 7262581): fifteen abdominal organs.

  python -m data_prep.amos --src amos22 --dst data/amos
  python -m data_prep.amos --src amos22 --check                      list all faults, compare counts, write nothing
  python -m data_prep.amos --src amos22 --dst data/amos-small --spacing 4.5,4.5,5   for a laptop
  python -m data_prep.amos --make-fake /tmp/fake --layout few        a tiny copy of the layout; full: all 360 cases

Names     amos22.zip unpacked: dataset.json with the lists training and validation, imagesTr labelsTr imagesVa labelsVa,
          amos_0001.nii.gz (or .nii) for image and label alike. --src may be the folder above. CT or MR is told by the
          number alone: up to 500 it is CT, and only CT is prepared. imagesTs has no labels and is never read.
Labels    1 spleen, 2 right kidney, 3 left kidney, 4 gall bladder, 5 esophagus, 6 liver, 7 stomach, 8 aorta ("arota"
          in dataset.json), 9 postcava, 10 pancreas, 11 right adrenal gland, 12 left adrenal gland, 13 duodenum,
          14 bladder, 15 prostate/uterus. The order is not that of FLARE22 or BTCV.
Splits    The paper's: train is the CT of training (200). Of the CT of validation, in the order of dataset.json, the
          first tenth is val (10), the rest test (90).
Counts    200 and 100 labelled CT. Another number is refused; with --subset it is only said, cases that are listed but
          absent are left out, and all others stay in the split that the whole list gives them.
Stored    RAS+, 1.5 x 1.5 x 5 mm (--spacing), (clip(HU, -991, 362) + 991) / 1353 for every case. Axes longer than
          192 x 128 x 128 voxels are cut to it; dataset.json names that grid, to which the scripts pad with 0, which is
          -991 HU, when they read. With another spacing the window keeps its millimetres, to the nearest 16 voxels.
--crop    label   centred on the box round the labelled voxels, as the paper's code does: it looks at the truth, also of
                  test cases, and the few labelled voxels outside are not scored; the manifest counts them
          centre  centred on the volume: honest, and what can be done without a label
          none    nothing is cut; whole volumes, for windows that slide over them
Unseen    The download itself was not at hand: folders, numbers, label values and the order of the lists in dataset.json
          are as public code reads them, and were only tried with files made like it.
"""

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from common import InputError
from common.loaders import natural_key, nifti_stem
from data_prep import _prepare
from data_prep._prepare import Case, Source, some

LAYOUTS = ("full", "few")
CLASSES = (
    "spleen",
    "right kidney",
    "left kidney",
    "gall bladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate/uterus",
)
LAST_CT = 500  # higher numbers are MR
SPACING, SIZE = (1.5, 1.5, 5.0), (192, 128, 128)  # mm, voxels; RAS order
LISTED = {"training": 200, "validation": 100}  # CT with labels in the two lists of dataset.json
PUBLISHED = {"train": 200, "val": 10, "test": 90}
RULE = {"kind": "window", "low": -991.0, "high": 362.0}  # HU
REMEDY = "get amos22.zip again, or pass --subset to prepare what is there"


@dataclass(frozen=True)
class Entry:
    """One CT of dataset.json: its name, such as amos_0001, and where its files should be."""

    case: str
    image: Path
    label: Path


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List the CT of dataset.json; faults of single cases are collected, not raised.

    options: spacing, crop, subset. Raises: InputError where dataset.json is missing or cannot be understood.
    """
    file = find_list(src)
    meta = read_list(file)
    faults = label_faults(file, meta.get("labels"))
    lists: dict[str, list[Entry]] = {}
    notes = []
    for part in ("training", "validation"):
        lists[part], mr = read_part(file, meta, part, faults)
        notes += [f"{file}: MR of {part}, left out: {mr}"] if mr else []
    faults += repeated(file, lists)
    cases, absent, missing = look_for_files(file.parent, lists, options.subset)
    faults += missing
    if absent:
        notes.append(
            f"{file}: listed cases without files, left out: {len(absent)} ({some(absent)})"
        )
    there = {case.id for case in cases}
    if not there and not faults:
        raise InputError(
            f"{file}: lists no CT that is here, expected files such as imagesTr/amos_0001.nii.gz; check --src"
        )
    wrong = [
        f"{len(lists[part])} CT of {part}, expected {n}"
        for part, n in LISTED.items()
        if len(lists[part]) != n
    ]
    if wrong and not options.subset:
        faults.append(f"{file}: lists {' and '.join(wrong)}; {REMEDY}")
    splits = {
        part: [e.case for e in entries if e.case in there]
        for part, entries in split_lists(lists).items()
    }
    return Source(
        name="amos",
        channels=("CT",),
        ct=(True,),
        classes={name: value for value, name in enumerate(CLASSES, 1)},
        label_values={value: value for value in range(len(CLASSES) + 1)},
        label_map={value: value for value in range(len(CLASSES) + 1)},
        cases=tuple(sorted(cases, key=lambda case: natural_key(case.id))),
        faults=tuple(faults),
        notes=tuple(notes),
        rules=(RULE,),
        crop={"kind": options.crop, "size": _prepare.window_of(options.spacing, SPACING, SIZE)},
        splits=splits,
        counts={part: (len(splits[part]), published) for part, published in PUBLISHED.items()},
    )


# --- dataset.json ----------------------------------------------------------------------------------------------------


def find_list(src: Path) -> Path:
    """dataset.json of the folder, or of the only folder in it that has one. Raises: InputError."""
    if not src.is_dir():
        raise InputError(f"{src}: no such folder, expected amos22 as published; check --src")
    found = [f for f in (src / "dataset.json", *sorted(src.glob("*/dataset.json"))) if f.is_file()]
    if found and (len(found) == 1 or found[0].parent == src):
        return found[0]
    if found:
        raise InputError(
            f"{src}: holds {len(found)} folders with a dataset.json, expected one; check --src"
        )
    if older := [*src.glob("task?_dataset.json"), *src.glob("*/task?_dataset.json")]:
        what = f"of a release that gave no labels of validation cases ({older[0].name}), expected dataset.json"
        raise InputError(f"{src}: {what}; get amos22.zip of Zenodo 7262581")
    packed = "unpack amos22.zip first" if list(src.glob("*.zip")) else "check --src"
    raise InputError(f"{src}: holds no dataset.json, expected amos22 as published; {packed}")


def read_list(file: Path) -> dict[str, Any]:
    """dataset.json as a dict with both lists. Raises: InputError."""
    try:
        meta = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise InputError(f"{file}: not JSON ({e}); get it again") from e
    lacks = [
        key
        for key in ("training", "validation")
        if not isinstance(meta, dict) or not isinstance(meta.get(key), list)
    ]
    if lacks:
        raise InputError(
            f"{file}: has no list {' and no list '.join(lacks)}, expected both; get it again"
        )
    return meta


def label_faults(file: Path, labels: Any) -> list[str]:
    """A fault for each organ that dataset.json numbers otherwise; where it has no labels, none."""
    if labels is None:
        return []
    if not isinstance(labels, dict):
        return [f"{file}: labels is {labels!r}, expected numbers and names; get it again"]
    faults = []
    for value, wanted in enumerate(CLASSES, 1):
        name = labels.get(str(value))
        if name is None or letters(name) != letters(wanted):
            faults.append(
                f"{file}: label {value} is {name!r}, expected {wanted}; is it another data set?"
            )
    return faults


def letters(name: Any) -> str:
    """A name without case, blanks and signs; with the publisher's arota put right."""
    return re.sub("[^a-z]", "", str(name).lower()).replace("arota", "aorta")


def read_part(file: Path, meta: dict, part: str, faults: list[str]) -> tuple[list[Entry], int]:
    """The CT of a list, in its order, and the number of MR in it; faults are collected."""
    entries, mr = [], 0
    for listed in meta[part]:
        paths = listed if isinstance(listed, dict) else {"image": listed}
        image, label = paths.get("image"), paths.get("label")
        if not isinstance(image, str) or not isinstance(label, str | None):
            faults.append(f"{file}: {part} has {listed!r}, expected image and label; correct it")
            continue
        case = nifti_stem(Path(image))
        number = re.fullmatch(r"amos_(\d+)", case)
        if number is None:
            wanted = "expected a name such as amos_0001, whose number tells CT from MR"
            faults.append(f"{file}: {part} has {image}, {wanted}; rename it")
        elif int(number[1]) > LAST_CT:
            mr += 1
        elif label and nifti_stem(Path(label)) != case:
            faults.append(
                f"{file}: {part} pairs {image} with {label}, expected the same name; correct it"
            )
        else:
            folder = "labelsTr" if part == "training" else "labelsVa"
            entries.append(
                Entry(
                    case,
                    file.parent / image,
                    file.parent / (label or f"{folder}/{Path(image).name}"),
                )
            )
    return entries, mr


def repeated(file: Path, lists: dict[str, list[Entry]]) -> list[str]:
    """A fault for each case that is listed more than once."""
    faults: list[str] = []
    seen: dict[str, str] = {}
    for part, entries in lists.items():
        for entry in entries:
            if entry.case in seen:
                where = (
                    f"in {part}"
                    if seen[entry.case] == part
                    else f"in {seen[entry.case]} and {part}"
                )
                faults.append(
                    f"{file}: {entry.case} is there twice, {where}, expected once; remove one"
                )
            seen[entry.case] = part
    return faults


def look_for_files(
    root: Path, lists: dict[str, list[Entry]], subset: bool
) -> tuple[list[Case], list[str], list[str]]:
    """Cases with both files; names of those with none, where a subset is allowed; and faults."""
    cases: dict[str, Case] = {}
    absent, faults = [], []
    for part, entries in lists.items():
        files = {entry: (on_disk(entry.image), on_disk(entry.label)) for entry in entries}
        if (
            len(entries) > 1
            and not any(label for _, label in files.values())
            and any(i for i, _ in files.values())
        ):
            folder = entries[0].label.parent
            what = f"holds none of the labels of {len(entries)} CT of {part}, and an early release has none"
            faults.append(
                f"{folder}: {what}; get amos22.zip of Zenodo 7262581, which has {folder.name}"
            )
            continue
        for entry, (image, label) in files.items():
            if image and label:
                cases[entry.case] = Case(entry.case, (image,), label)
            elif subset and not image and not label:
                absent.append(entry.case)
            else:
                hint = "" if image or label else ", or pass --subset"
                for path, there in ((entry.image, image), (entry.label, label)):
                    if not there:
                        faults.append(
                            f"{path}: missing, {entry.case} of {part} needs it; copy it{hint}"
                        )
    return list(cases.values()), absent, faults


def on_disk(path: Path) -> Path | None:
    """The file, also where it was unpacked to .nii or packed again."""
    other = path.with_name(path.name[:-3] if path.name.endswith(".gz") else f"{path.name}.gz")
    return next((p for p in (path, other) if p.is_file()), None)


def split_lists(lists: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """train, val and test of the lists training and validation, see Splits above."""
    tenth = len(lists["validation"]) // 10
    return {
        "train": lists["training"],
        "val": lists["validation"][:tenth],
        "test": lists["validation"][tenth:],
    }


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def make_fake(root: Path, layout: str) -> None:
    """Write small volumes in the published names: full with 240 + 120 cases, few with 6 + 20 CT and 2 + 2 MR.

    The first four CT of training: one too wide for the window, one stored in LAS, one with a float32 label, one whose
    air is -3024. MR are listed between the CT.
    """
    from common.synthetic import phantom

    n, m, mr = (200, 100, (40, 20)) if layout == "full" else (6, 20, (2, 2))
    drawn = [phantom(0, index, (24, 20, 16), (1.5, 1.5, 2.5), classes=13) for index in range(4)]
    for _, label in drawn:
        label[2:6, 2:6, 2:5], label[-6:-2, 2:6, 2:5] = 14, 15
    meta: dict[str, Any] = {
        "name": "AMOS",
        "description": "phantoms, made by a program",
        "licence": "none needed",
    }
    meta |= {
        "modality": {"0": "CT"},
        "labels": {"0": "background"} | {str(v): c for v, c in enumerate(CLASSES, 1)},
    }
    meta["labels"]["8"] = "arota"
    ct, others = iter(range(1, n + m + 1)), iter(range(LAST_CT + 1, LAST_CT + sum(mr) + 1))
    for part, folder, count, extra in (
        ("training", "Tr", n, mr[0]),
        ("validation", "Va", m, mr[1]),
    ):
        numbers = [next(ct) for _ in range(count)]
        numbers[1:1] = [next(others) for _ in range(extra)]
        names = [f"amos_{number:04d}.nii.gz" for number in numbers]
        meta[part] = [
            {"image": f"./images{folder}/{x}", "label": f"./labels{folder}/{x}"} for x in names
        ]
        meta[f"num{part.capitalize()}"] = len(names)
        for number, name in zip(numbers, names):
            write_fake(root, folder, name, number, drawn)
    meta["test"] = [{"image": "./imagesTs/amos_0499.nii.gz"}]
    (root / "imagesTs").mkdir()
    shutil.copy(root / "imagesTr" / "amos_0001.nii.gz", root / "imagesTs" / "amos_0499.nii.gz")
    (root / "imagesTr" / "._amos_0001.nii.gz").write_bytes(
        b"\x00\x05\x16\x07 a Mac's resource fork"
    )
    (root / "dataset.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def write_fake(
    root: Path, folder: str, name: str, number: int, drawn: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Image and label of one case."""
    image, label = drawn[number % len(drawn)]
    affine = np.diag([1.5, 1.5, 2.5, 1.0])
    affine[:3, 3] = (-18, -15, -20)
    if number == 1:
        affine[0, 0] = 15.0  # 360 mm, the window has 288
    if number == 2:
        affine[0, 0] = -1.5
    hu = np.round(1800 * image[0] - 1100).astype(np.int16)
    if number == 4:
        hu[:3] = -3024
    dtype = np.float32 if number == 3 else np.uint8
    for kind, values in (("images", hu), ("labels", label.astype(dtype))):
        (root / f"{kind}{folder}").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine), root / f"{kind}{folder}" / name)


def add_flags(parser: _prepare.Parser) -> None:
    _prepare.add_window_flags(parser, SPACING)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(argv, "amos", __doc__ or "", read_source, make_fake, LAYOUTS, add_flags)


if __name__ == "__main__":
    sys.exit(main())
