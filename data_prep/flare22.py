"""Prepare the abdominal CT of FLARE22 (MICCAI 2022) as axial slices: 13 organs, and scans without labels.

  python -m data_prep.flare22 --src FLARE22 --dst data/flare22 --workers 8
  python -m data_prep.flare22 --src FLARE22 --check                   list all faults, compare counts, write nothing
  python -m data_prep.flare22 --make-fake /tmp/fake                   a tiny copy of the layout

Names     FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz and labels/FLARE22_Tr_0001.nii.gz; without labels
          Case_00001_0000.nii.gz, cases 1-1000 in FLARE22_UnlabeledCase1-1000 (also given in parts), and 1001-2000.
          Files are found by their names wherever they lie below --src; others are left out and counted.
Labels    1 liver, 2 right kidney, 3 spleen, 4 pancreas, 5 aorta, 6 inferior vena cava, 7 right adrenal gland, 8 left
          adrenal gland, 9 gallbladder, 10 esophagus, 11 stomach, 12 duodenum, 13 left kidney. The order is not that of
          AMOS22 or BTCV.
Splits    The paper (arXiv 2402.15216) trains on 40 of the 50 labelled cases and tests on 10, without saying which: here
          a permutation with seed 0, no validation (--split-sizes). pretrain is the unlabelled cases 1-1000; later ones
          are prepared, and left to the split `unlabelled`.
Window    Percentiles 0.5 and 99.5 of all voxels of pretrain, background included, on the grid of the files. Where none
          of the cases 1-1000 is there: of the later ones (pretrain is these and train), or else of train. What lies
          below -1024 HU is raised to it before (--fov-pad).
Spacing   nnU-Net's rule, for labelled and unlabelled cases by themselves; it only sets the distance of slices, since
          each is resized to 256 x 256 whatever its field of view.
Counts    The manifest prints the numbers of cases and slices beside the publisher's and the paper's. The paper does not
          say how it came by its numbers of slices, so that another spacing may be the reason where they differ.
Stored    int16 HU, RAS+, [1, 256, 256, Z]: 131 kB a slice, 27 GB for the paper's.
Unseen    The download itself was not at hand: names and label values are as the publisher's pages give them, and were
          only tried with files made like it.
"""

import argparse
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from common import InputError
from common.loaders import natural_key
from common.synthetic import ct_phantom
from data_prep import _prepare
from data_prep._prepare import Case, Source, some

CLASSES = (
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)
PRETRAIN = 1000  # the last unlabelled case that the paper trains on
CASES = {"labelled cases": 50, "unlabelled cases 1-1000": PRETRAIN}
SLICES = {"pretrain": 207_029, "train": 3879, "test": 915}  # of the paper


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List the files of FLARE22 below a folder; faults of single cases are collected, not raised.

    options: of _prepare.add_slice_flags. Raises: InputError where there is no such file.
    """
    if not src.is_dir():
        raise InputError(f"{src}: no such folder, expected FLARE22 as published; check --src")
    faults: list[str] = []
    images, labels, notes = find_files(src, faults)
    if not images and not faults:
        packed = "unpack the archives first" if [*src.rglob("*.zip")] else "check --src"
        wanted = "files such as FLARE22_Tr_0001_0000.nii.gz and Case_00001_0000.nii.gz"
        raise InputError(f"{src}: holds no case of FLARE22, expected {wanted}; {packed}")
    cases = []
    for case, file in images.items():
        label = labels.pop(case, None)
        if case.startswith("FLARE22_Tr_") and label is None:
            faults.append(
                f"{file}: has no label, expected {case}.nii.gz in labels; copy it, or take the image away"
            )
        else:
            cases.append(Case(case, (file,), label))
    faults += [
        f"{f}: a label without image, expected {c}_0000.nii.gz in images; copy it"
        for c, f in labels.items()
    ]
    cases.sort(key=lambda case: natural_key(case.id))
    pretrain = [
        case.id for case in cases if not case.label and int(case.id.split("_")[1]) <= PRETRAIN
    ]
    if not pretrain:
        later = any(not case.label for case in cases)
        what = "later unlabelled cases, pre-training train too" if later else "train"
        notes.append(
            f"{src}: no unlabelled case 1-1000: pre-training and the window will use {what}"
        )
    labelled = [case.id for case in cases if case.label]
    return Source(
        name="flare22",
        channels=("CT",),
        ct=(True,),
        classes={name: value for value, name in enumerate(CLASSES, 1)},
        label_values={value: value for value in range(len(CLASSES) + 1)},
        label_map={value: value for value in range(len(CLASSES) + 1)},
        cases=tuple(cases),
        faults=tuple(faults),
        notes=tuple(notes),
        splits=split(labelled),
        counts=dict(zip(CASES, zip((len(labelled), len(pretrain)), CASES.values()))),
        slices=_prepare.slice_settings(options),
        pretrain=tuple(pretrain),
        published_slices=SLICES,
    )


def find_files(src: Path, faults: list[str]) -> tuple[dict[str, Path], dict[str, Path], list[str]]:
    """Images and labels by case, and notes on what else lies there; a case that is there twice is a fault."""
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    others = []
    for _, name, file in _prepare.nifti_files(src, faults):
        match = re.fullmatch(
            r"(FLARE22_Tr_\d{4}|Case_\d{5})(_0000)?\.nii(\.gz)?", name, re.IGNORECASE
        )
        if match is None or (match[1].startswith("Case") and not match[2]):
            others.append(name)
            continue
        found = images if match[2] else labels
        if match[1] in found:
            faults.append(
                f"{file}: is there twice, also {found[match[1]]}, expected one; remove the other"
            )
        found[match[1]] = file
    return (
        images,
        labels,
        [f"{src}: {len(others)} other files, left out: {some(others)}"] if others else [],
    )


def split(labelled: list[str]) -> dict[str, list[str]]:
    """Four fifths for training, a fifth for the test, none for validation; shuffled by seed 0."""
    order = [case for part in _prepare.make_splits(labelled).values() for case in part]
    cut = len(order) - round(len(order) / 5)
    return {"train": order[:cut], "val": [], "test": order[cut:]}


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def make_fake(root: Path, _: str) -> None:
    """Write 5 labelled cases, and cases 1-6 and 1001 without label, from phantoms of 40 x 40 to 40 x 32 in the plane.

    Labelled: the second is stored in LAS, the third has a float32 label. Unlabelled: the first has -2000 HU outside a
    round field of view, the second fewer rows, the third slices of half the distance, the fourth float32 values.
    """
    for index in range(5):
        hu, organs = ct_phantom(1, index, 40)
        label = np.array([0, 1, 3, 13, 2], np.uint8)[organs]  # the phantom's order
        for value in (4, 5, 6, 7, 8, 9, 10, 11, 12):  # the other organs: blocks in a row
            block = np.s_[3 * value - 6 : 3 * value - 3, 24:27, 6:8]
            label[block], hu[block] = value, 60
        stem = f"FLARE22_Tr_{index + 1:04d}"
        _write(root / "FLARE22_LabeledCase50" / "images" / f"{stem}_0000.nii.gz", hu, index == 1)
        labels = label.astype(np.float32 if index == 2 else np.uint8)
        _write(root / "FLARE22_LabeledCase50" / "labels" / f"{stem}.nii.gz", labels, index == 1)
    for number in (1, 2, 3, 4, 5, 6, 1001):
        hu = ct_phantom(2, number, 40)[0]
        if number == 1:
            x, y = np.ogrid[-19.5:20, -19.5:20]
            hu[np.hypot(x, y) > 19.5] = -2000
        values = {2: hu[:, 4:-4], 3: np.repeat(hu, 2, axis=2), 4: hu + np.float32(0.25)}.get(
            number, hu
        )
        folder = f"FLARE22_UnlabeledCase{'1-1000' if number <= PRETRAIN else '1001-2000'}"
        _write(
            root / folder / f"Case_{number:05d}_0000.nii.gz",
            values,
            False,
            4.0 if number == 3 else 8.0,
        )
    (root / "FLARE22_UnlabeledCase1-1000" / "._Case_00001_0000.nii.gz").write_bytes(
        b"\x00 a Mac's resource fork"
    )


def _write(path: Path, values: np.ndarray, las: bool, distance: float = 8.0) -> None:
    """distance: of slices, mm. las: the same body, stored from right to left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([8.0, 8.0, distance, 1.0])
    if las:
        values, affine = (
            values[::-1],
            affine @ np.array([[-1, 0, 0, 39], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
        )
    nib.save(nib.Nifti1Image(values, affine), path)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""

    def add_flags(parser: _prepare.Parser) -> None:
        _prepare.add_slice_flags(parser, norm=False)

    return _prepare.main(
        argv, "flare22", __doc__ or "", read_source, make_fake, add_flags=add_flags
    )


if __name__ == "__main__":
    sys.exit(main())
