"""Prepare GlaS (Warwick-QU, contest of MICCAI 2015): glands in H&E sections of the colon.

  python -m data_prep.glas --src "Warwick QU Dataset (Released 2016_07_08)" --dst data/glas
  python -m data_prep.glas --src DIR --check                  list all faults, compare counts, write nothing
  python -m data_prep.glas --src DIR --dst data/glas --subset fewer images of a part than published
  python -m data_prep.glas --make-fake /tmp/fake --layout few a tiny copy of the layout; full: all 165 images

Names     train_1 … train_85, testA_1 … testA_60, testB_1 … testB_20, anywhere below --src or in a zip archive: NAME.bmp
          and NAME_anno.bmp as published, or copies in PNG, TIF and, of images alone, JPG. Grade.csv where it is there.
Labels    0 background, 1 gland; instances.npy holds the numbers of the annotation, which may have gaps. The published
          testB_3, 11, 18 and 19 have one number for all glands; there the pieces (4 neighbours) are numbered.
Splits    train, testA, testB, test (A and B), and pretrain: all images, since pre-training needs no labels. Names in
          the order of text (train_1, train_10, train_11, …), so that the first eight of train are the 10 % that public
          code takes. There is no val. Train and test share patients; dataset.json names them where Grade.csv does.
Counts    85, 60 and 20. A part that is absent as a whole is left out; one in pieces is refused without --subset.
Stored    uint8 as published, [3, Y, X]; sizes differ.
--reduce  K: pixels K times as wide and high, for small machines: means of K x K pixels, numbers of the middle one
          (K even: of that right and below it); what is left over at the right and lower end is cut off.
"""

import argparse
import csv
import functools
import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from common import InputError
from common.loaders import read_image, read_mask
from common.metrics import components
from data_prep import _prepare
from data_prep._prepare import Case, Flat, Report, Source, some

LAYOUTS = ("full", "few")
PUBLISHED = {"train": 85, "testA": 60, "testB": 20}
NAME = re.compile(
    r"((train|testA|testB)_([1-9]\d*))(_anno)?\.(bmp|png|jpg|jpeg|tif|tiff)", re.IGNORECASE
)
ONE_ID = ("testB_3", "testB_11", "testB_18", "testB_19")
FOLDER = "Warwick QU Dataset (Released 2016_07_08)"


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List the images and annotations; faults of single cases are collected, not raised.

    options: reduce, subset. Raises: InputError where nothing of GlaS is there.
    """
    files: dict[str, dict[str, list[Path]]] = {}
    tables: list[Path] = []
    notes, other = [], 0
    for file in _prepare.plain_files(src):
        if match := NAME.fullmatch(file.name):
            case = (
                f"{match[2].lower().replace('testa', 'testA').replace('testb', 'testB')}_{match[3]}"
            )
            files.setdefault(case, {}).setdefault("annotation" if match[4] else "image", []).append(
                file
            )
        elif file.name.lower() == "grade.csv":
            tables.append(file)
        else:
            other += 1
    if not files:
        raise InputError(
            f"{src}: no train_1.bmp, testA_1.bmp or the like below it, expected {FOLDER}; check --src"
        )
    grades = read_grades(tables[0]) if tables else {}
    notes += [] if grades else [f"{src}: no Grade.csv, patients and grades are not known"]
    notes += [f"{src}: {other} files of other names, left out"] if other else []
    cases, faults = pair_files(files, tables[:1])
    names = {part: sorted(c.id for c in cases if c.id.startswith(f"{part}_")) for part in PUBLISHED}
    for part, published in PUBLISHED.items():
        here = sum(case.startswith(f"{part}_") for case in files)
        beyond = [
            case
            for case in files
            if case.startswith(f"{part}_") and int(case.split("_")[1]) > published
        ]
        if beyond:
            faults.append(
                f"{src}: {some(sorted(beyond))}, expected {part}_1 to {part}_{published}; is it GlaS?"
            )
        elif 0 < here < published and not options.subset:
            faults.append(
                f"{src}: {here} images of {part}, expected {published}; get all, or pass --subset"
            )
        elif not here:
            notes.append(f"{src}: no image of {part}")
    test = sorted(names["testA"] + names["testB"])
    return Source(
        name="glas",
        channels=("red", "green", "blue"),
        ct=(False,) * 3,
        classes={"gland": 1},
        label_values={0: 0, 1: 1},
        label_map={0: 0, 1: 1},
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        faults=tuple(faults),
        notes=tuple(notes),
        rules=({"kind": "none"},) * 3,
        splits={**names, "test": test, "pretrain": sorted(names["train"] + test), "val": []},
        counts={part: (len(names[part]), published) for part, published in PUBLISHED.items()},
        read=functools.partial(read_case, grades, options.reduce),
        settings={"reduce": options.reduce} if options.reduce > 1 else {},
    )


def pair_files(
    files: dict[str, dict[str, list[Path]]], tables: list[Path]
) -> tuple[list[Case], list[str]]:
    """Cases with one image and one annotation; and a fault for each file that is missing or there twice.

    tables: Grade.csv, a file of every case: what is stored depends on it.
    """
    cases, faults = [], []
    for case, found in sorted(files.items()):
        double = {kind: paths for kind, paths in found.items() if len(paths) > 1}
        faults += [
            f"{p[0]}: {p[1]} is of the same name, expected one {kind}; remove one"
            for kind, p in double.items()
        ]
        if "image" not in found:
            faults.append(
                f"{found['annotation'][0]}: an annotation without image, expected {case}.bmp; copy it"
            )
        elif "annotation" not in found:
            faults.append(
                f"{found['image'][0]}: has no annotation, expected {case}_anno.bmp; copy it"
            )
        elif not double:
            cases.append(Case(case, (found["image"][0], *tables), found["annotation"][0]))
    return cases, faults


def read_grades(file: Path) -> dict[str, dict[str, str]]:
    """Case -> patient and grade, of Grade.csv with its leading blanks. Raises: InputError."""
    text = _prepare.read_bytes(file).decode("utf-8-sig", errors="replace")
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    if not rows or rows[0][:3] != ["name", "patient ID", "grade (GlaS)"]:
        raise InputError(
            f"{file}: begins {rows[:1]}, expected name, patient ID, grade (GlaS); get it again"
        )
    return {row[0]: {"patient": row[1], "grade": row[2]} for row in rows[1:] if len(row) >= 3}


def read_case(
    grades: dict[str, dict[str, str]], reduce: int, case: Case, report: Report
) -> Flat | None:
    """Image, gland or not, and objects of one case, `reduce` times smaller; faults and notes go into the report."""
    assert case.label
    image = _prepare.read_flat(report, read_image, case.images[0])
    objects = _prepare.read_flat(report, read_mask, case.label)
    if image is None or objects is None:
        return None
    if len(image) != 3:
        report.faults.append(
            f"{case.images[0]}: a grey image, expected colours; is it the annotation?"
        )
    if image.shape[1:] != objects.shape:
        report.faults.append(f"{case.label}: {_prepare.size(objects)} pixels, the image has {_prepare.size(image)}, "
                             "expected the same; get both again")  # fmt: skip
    if not objects.any():
        report.notes.append(f"{case.label}: no gland")
    ids = np.unique(objects[objects > 0])
    pieces = components(objects > 0)
    if len(ids) == 1 and pieces.max() > 1:
        if case.id in ONE_ID:
            objects = pieces
        what = (
            "which are numbered here"
            if case.id in ONE_ID
            else "taken as one object; is it a binary copy?"
        )
        report.notes.append(f"{case.label}: one number for {pieces.max()} separate pieces, {what}")
    if report.faults:
        return None
    image, objects = _prepare.reduced(image, objects, reduce)
    return Flat(image, (objects > 0).astype(np.uint8), objects, grades.get(case.id, {}))


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def make_fake(root: Path, layout: str) -> None:
    """Write small images in the published names: full with 85 + 60 + 20 of them, few with 10 + 3 + 3.

    Discs on a ground of another colour; sizes differ, numbers have gaps, testB_3 has one number for all discs.
    """
    counts = PUBLISHED if layout == "full" else {"train": 10, "testA": 3, "testB": 3}
    folder = root / FOLDER
    folder.mkdir(parents=True)
    rows = ["name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"]
    for part, count in counts.items():
        for number in range(1, count + 1):
            rng = np.random.default_rng([number, len(part), part == "testB"])
            image, objects = draw_glands(rng, (36 + 2 * (number % 3), 48))
            if part == "testB" and number == 3:
                objects = (objects > 0).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{part}_{number}.bmp")
            Image.fromarray(objects).save(folder / f"{part}_{number}_anno.bmp")
    for name in sorted(
        f"{part}_{number}" for part, count in counts.items() for number in range(1, count + 1)
    ):
        rows.append(f"{name}, {len(name)}, benign, healthy")
    (folder / "Grade.csv").write_bytes("\r\n".join([*rows, ""]).encode())
    (folder / "._train_1.bmp").write_bytes(b"\x00\x05\x16\x07 a Mac's resource fork")


def draw_glands(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [Y, X, 3], numbers uint8 [Y, X]) of three discs that do not touch."""
    y, x = np.indices(shape)
    objects = np.zeros(shape, np.uint8)
    for k, centre in enumerate((8, 24, 40)):
        radius = rng.uniform(3, 6)
        objects[(y - rng.uniform(8, shape[0] - 8)) ** 2 + (x - centre) ** 2 < radius**2] = (
            1,
            2,
            5,
        )[k]
    colour = np.where(objects[..., None] > 0, (150, 90, 160), (225, 170, 200))  # [Y, X, 3]
    return np.clip(colour + rng.normal(0, 12, (*shape, 3)), 0, 255).astype(np.uint8), objects


def add_flags(parser: _prepare.Parser) -> None:
    parser.add_argument("--subset", action="store_true", help="accept fewer images than published")
    _prepare.add_reduce(parser)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(
        argv, "glas", __doc__ or "", read_source, make_fake, LAYOUTS, add_flags, flat=True
    )


if __name__ == "__main__":
    sys.exit(main())
