"""Prepare the cross-institution male pelvic structures (Zenodo 7013610): T2 MR of the prostate, eight structures.

  python -m data_prep.prostate --src DIR --dst data/prostate         DIR holds data/ and institution.txt
  python -m data_prep.prostate --src DIR --check                     list all faults, compare counts, write nothing
  python -m data_prep.prostate --src DIR --dst data/prostate-small --spacing 2.4,2.4,2.5   for a laptop
  python -m data_prep.prostate --make-fake /tmp/fake --layout few    a tiny copy of the layout; full: all 589 cases

Names     ID_img.nii and ID_mask.nii, or .nii.gz, anywhere below --src (data.zip unpacked), and institution.txt, a
          file of its own in the record: a line "ID INSTITUTION" a case, no header. An id is text; where it is written
          with zeros in front in one place and without in the other, the file's name is taken and a note says so.
Labels    1 BladderMask (bladder), 2 BoneMask (bone), 3 ObdInternMask (obturator internus), 4 TZ (transition zone),
          5 CG (central gland), 6 RectumMask (rectum), 7 SV (seminal vesicle), 8 NVB (neurovascular bundle).
Splits    The paper's: of the n cases of an institution, in the order of institution.txt, the first 2 are val, those
          up to number floor(0.75 n) - 2 train, the rest test: 411/14/164. (Its code takes the 2 off twice, so here.)
Counts    589 cases of 7 institutions. Another number is refused; with --subset it is only said, cases that are listed
          but absent are left out, and all others stay in the split that the whole list gives them.
Stored    RAS+, 0.75 x 0.75 x 2.5 mm (--spacing), each volume scaled by its own minimum and maximum. Axes longer than
          256 x 256 x 48 voxels are cut to it; dataset.json names that grid, to which the scripts pad when they read.
          With another spacing the window keeps its millimetres, to the nearest 16 voxels.
--crop    label   centred on the box round the labelled voxels, as the paper's code does: it looks at the truth, also of
                  test cases, and the few labelled voxels outside are not scored; the manifest counts them
          centre  centred on the volume: honest, and what can be done without a label
          none    nothing is cut; whole volumes, for windows that slide over them
Unseen    The download itself was not at hand: inner folders, .nii or .nii.gz, zeros in front of ids, the values in
          the masks and the order of institution.txt are as public code reads them, only tried with files made like it.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from common import InputError
from common.loaders import natural_key, nifti_stem
from data_prep import _prepare
from data_prep._prepare import Case, Source, nifti_files, some

LAYOUTS = ("full", "few")
CLASSES = ("BladderMask", "BoneMask", "ObdInternMask", "TZ", "CG", "RectumMask", "SV", "NVB")
INSTITUTIONS = ("UCL", "Prostate3T", "ProstateDx", "ProstateMRI", "bergen", "Nijmegen", "Rutgers")
SPACING, SIZE = (0.75, 0.75, 2.5), (256, 256, 48)  # mm, voxels; RAS order
PUBLISHED = {"cases": 589, "institutions": 7, "train": 411, "val": 14, "test": 164}
# Minimum to maximum of the volume: with zero_fraction 1 zeros never count apart.
RULE = {"kind": "percentile", "lower": 0.0, "upper": 100.0, "zero_fraction": 1.0}


@dataclass
class Found:
    """The files of one case, as its names tell."""

    img: list[Path] = field(default_factory=list)
    mask: list[Path] = field(default_factory=list)


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List the record's files; faults of single cases are collected, not raised.

    options: spacing, crop, subset. Raises: InputError where institution.txt or all cases are missing.
    """
    if not src.is_dir():
        raise InputError(f"{src}: no such folder, expected data/ and institution.txt; check --src")
    faults: list[str] = []
    found, spare = find_files(src, faults)
    if not found:
        packed = "unpack data.zip first" if list(src.rglob("*.zip")) else "check --src"
        raise InputError(f"{src}: no case found, expected files such as data/ID_img.nii; {packed}")
    table = find_table(src)
    listed = read_table(table, options.subset, faults)
    names, notes = match_ids(listed, found)
    cases, absent = [], []
    for case in listed:
        name = names.get(case)
        if name is None and options.subset:
            absent.append(case)
        elif name is None:
            remedy = f"copy both files, take the line out of {table.name}, or pass --subset"
            faults.append(
                f"{table}: case {case} has no files, expected {case}_img.nii and {case}_mask.nii; {remedy}"
            )
        elif wrong := case_faults(name, found[name]):
            faults += wrong
        else:
            cases.append(Case(name, (found[name].img[0],), found[name].mask[0]))
    for name in sorted(found.keys() - set(names.values()), key=natural_key):
        where = (found[name].img + found[name].mask)[0]
        faults.append(
            f"{where}: case {name} is not in {table}, expected a line with its institution; complete it"
        )
    if spare:
        notes.append(
            f"{src}: other NIfTI files, left out: {len(spare)} ({some([f.name for f in spare])})"
        )
    if absent:
        notes.append(
            f"{table}: listed cases without files, left out: {len(absent)} ({some(absent)})"
        )
    there = {case.id for case in cases}
    whole = split_institutions(listed)
    splits = {
        part: [names[case] for case in ids if names.get(case) in there]
        for part, ids in whole.items()
    }
    rest = {"cases": len(listed), "institutions": len(set(listed.values()))}
    faults += count_faults(
        table, rest | {part: len(ids) for part, ids in whole.items()}, options.subset
    )
    where_from = {
        names[case]: institution for case, institution in listed.items() if names.get(case) in there
    }
    counts = {"cases": len(cases), "institutions": len(set(where_from.values()))}
    counts |= {part: len(ids) for part, ids in splits.items()}
    size = _prepare.window_of(options.spacing, SPACING, SIZE)
    return Source(
        name="prostate",
        channels=("T2",),
        ct=(False,),
        classes={name: value for value, name in enumerate(CLASSES, 1)},
        label_values={value: value for value in range(len(CLASSES) + 1)},
        label_map={value: value for value in range(len(CLASSES) + 1)},
        cases=tuple(sorted(cases, key=lambda case: natural_key(case.id))),
        faults=tuple(faults),
        notes=tuple(notes),
        rules=(RULE,),
        crop={"kind": options.crop, "size": size},
        splits=splits,
        counts={name: (counts[name], published) for name, published in PUBLISHED.items()},
        entries={"institutions": where_from},
    )


# --- files and institutions ------------------------------------------------------------------------------------------


def find_files(src: Path, faults: list[str]) -> tuple[dict[str, Found], list[Path]]:
    """id -> its files, and NIfTI files of other names."""
    found: dict[str, Found] = {}
    spare = []
    for _, name, file in nifti_files(src, faults):
        case, _, kind = nifti_stem(Path(name)).rpartition("_")
        if not case or kind not in ("img", "mask"):
            spare.append(file)
            continue
        getattr(found.setdefault(case, Found()), kind).append(file)
    return found, spare


def find_table(src: Path) -> Path:
    """institution.txt in the folder, beside it or below it. Raises: InputError where there is none."""
    for folder in (
        src,
        *sorted(f.parent for f in src.rglob("institution.txt")),
        src.resolve().parent,
    ):
        if (folder / "institution.txt").is_file():
            return folder / "institution.txt"
    what = "holds no institution.txt, expected the list of cases and institutions, a file of its own in the record"
    raise InputError(f"{src}: {what}; download it into this folder")


def read_table(file: Path, subset: bool, faults: list[str]) -> dict[str, str]:
    """id -> institution, in the order of the file; faults are collected with their line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"{file}: cannot be read as text ({e}), expected lines such as 001 UCL; get it again"
        ) from e
    listed: dict[str, tuple[str, int]] = {}  # id -> institution, line
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        where = f"{file}: line {number}"
        if len(words) != 2:
            faults.append(
                f"{where} is {line.strip()!r}, expected an id and an institution; correct it"
            )
            continue
        case, institution = words
        if case in listed:
            other, earlier = listed[case]
            remedy = "keep the right one" if other != institution else "remove one"
            both = f"gives {case} to {institution}, line {earlier} to {other}, expected one line for each id"
            faults.append(f"{where} {both}; {remedy}")
        elif institution not in INSTITUTIONS and not subset:
            faults.append(
                f"{where}: institution {institution!r}, expected {', '.join(INSTITUTIONS)}; correct it"
            )
        listed.setdefault(case, (institution, number))
    if not listed:
        first = f"begins with {lines[0].strip()!r}" if lines else "is empty"
        raise InputError(
            f"{file}: {first}, expected lines of an id and an institution such as 001 UCL; get it again"
        )
    return {case: institution for case, (institution, _) in listed.items()}


def match_ids(listed: Iterable[str], found: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Listed id -> the id in the files' names, where there is one; and a note where only zeros in front differ."""
    short: dict[str, list[str]] = {}
    for name in found:
        short.setdefault(name.lstrip("0"), []).append(name)
    exact = {case: case for case in listed if case in short.get(case.lstrip("0"), [])}
    loose: dict[str, str] = {}
    for case in listed:
        left = [name for name in short.get(case.lstrip("0"), []) if name not in exact]
        if case not in exact and len(left) == 1 and left[0] not in loose.values():
            loose[case] = left[0]
    listing = some([f"{case} = {name}" for case, name in loose.items()])
    notes = (
        [f"ids that agree only without the zeros in front: {len(loose)} ({listing})"]
        if loose
        else []
    )
    return exact | loose, notes


def case_faults(case: str, files: Found) -> list[str]:
    """What is wrong with a case's list of files."""
    where = (files.img + files.mask)[0].parent
    faults = []
    if not _prepare.is_case_name(case):
        faults.append(f"{where}: case name {case!r}, expected letters, digits, - and _; rename it")
    for kind, own in (("img", files.img), ("mask", files.mask)):
        if not own:
            name = f"{case}_{kind}.nii or .nii.gz"
            faults.append(
                f"{where}: case {case} has no {'image' if kind == 'img' else 'label'}, expected {name}; copy it"
            )
        elif len(own) > 1:
            listing = ", ".join(map(str, own))
            faults.append(
                f"{where}: case {case} has {len(own)} files for {kind}, expected 1: {listing}; remove one"
            )
    return faults


def split_institutions(listed: dict[str, str]) -> dict[str, list[str]]:
    """train, val and test of {id: institution}, see Splits above; an institution of less than 7 has no train."""
    groups: dict[str, list[str]] = {}
    for case, institution in listed.items():
        groups.setdefault(institution, []).append(case)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for ids in groups.values():
        end = max(
            3 * len(ids) // 4 - 2, 2
        )  # never in front of val, which in the public code are tested as well
        splits["train"] += ids[2:end]
        splits["val"] += ids[:2]
        splits["test"] += ids[end:]
    return splits


def count_faults(table: Path, counts: dict[str, int], subset: bool) -> list[str]:
    """A fault where the list is not the published one."""
    if subset or counts == PUBLISHED:
        return []
    wrong = [
        f"{name} {n}, expected {PUBLISHED[name]}"
        for name, n in counts.items()
        if n != PUBLISHED[name]
    ]
    return [
        f"{table}: {'; '.join(wrong)}, as published; get it again, or pass --subset to prepare what is there"
    ]


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def make_fake(root: Path, layout: str) -> None:
    """Write small volumes in the record's names: full with the published counts, few with 8 cases of 2 institutions.

    Cases take turns in institution.txt. Of the first eight one is too wide for the window, one too high, one is stored
    in LPS, one has a float32 mask.
    """
    from common.synthetic import phantom

    sizes = (
        (185, 33, 57, 50, 60, 104, 100) if layout == "full" else (8, 8)
    )  # 589, with 411/14/164 in the splits
    turns = [(turn, name) for name, n in zip(INSTITUTIONS, sizes) for turn in range(n)]
    lines = [
        f"{index:04d} {name}"
        for index, (_, name) in enumerate(sorted(turns, key=lambda t: t[0]), 1)
    ]
    (root / "data").mkdir(parents=True)
    (root / "institution.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    drawn = [
        phantom(0, index, (24, 20, 12), (1.0, 1.0, 3.0), classes=len(CLASSES)) for index in range(8)
    ]
    for index, line in enumerate(lines):
        image, label = drawn[index % 8]
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        affine[:3, 3] = (-12, -10, -18)
        if index == 2:
            affine[0, 0] = 9.0  # 216 mm, the window has 192
        if index == 3:
            affine[2, 2] = 12.0  # 144 mm, the window has 120
        if index == 4:
            affine[0, 0] = affine[1, 1] = -1.0
        stored = np.round(image[0] * 400 * (1 + index % 5) + 7).astype(np.int16)
        case = root / "data" / line.split()[0]
        nib.save(nib.Nifti1Image(stored, affine), f"{case}_img.nii")
        nib.save(
            nib.Nifti1Image(label.astype(np.float32 if index == 5 else np.uint8), affine),
            f"{case}_mask.nii",
        )
    (root / "data" / "._0001_img.nii").write_bytes(b"\x00\x05\x16\x07 a Mac's resource fork")


def add_flags(parser: _prepare.Parser) -> None:
    _prepare.add_window_flags(parser, SPACING)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(
        argv, "prostate", __doc__ or "", read_source, make_fake, LAYOUTS, add_flags
    )


if __name__ == "__main__":
    sys.exit(main())
