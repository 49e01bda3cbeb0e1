"""Prepare BraTS (brain tumours in T1, T1 with contrast, T2 and FLAIR) as published in 2017-2021 and 2023.

  python -m data_prep.brats --src MICCAI_BraTS2020_TrainingData --dst data/brats
  python -m data_prep.brats --src DIR --check                    list all faults, write nothing
  python -m data_prep.brats --make-fake /tmp/fake --layout 2023  a tiny legal copy of the layout

Names     CASE_{t1,t1ce,t2,flair,seg} or CASE-{t1n,t1c,t2w,t2f,seg}, .nii or .nii.gz, anywhere below --src: with or
          without HGG and LGG, nested by an unpacker, x.nii being a folder with the file in it. Channels are stored in
          the order t1, t1ce, t2, flair. Names that begin with . or _ (left by a Mac's archiver) are never read. Case
          355 of 2020 has a label of another name: where a case has no label and one NIfTI file is left over in its
          folder, that file is the label, and a note says so. The words for the channels stand in dataset.json as
          `channel_suffixes`, so that a network of one year predicts files named as in another.
Labels    1 necrotic core, 2 oedema, and enhancing tumour, which is 4 until 2021 and 3 from 2023 on. Which of the two
          it is, is decided once from all label files, since a case without enhancing tumour cannot tell. Both in one
          set are refused: in 2024 a 4 is the cavity left by surgery, which is another task.
--classes whole    one class, all tumour (the PatchDDM paper's task); a prediction is written back as 1
          all      the three labels as three classes; a prediction has the published values again, 4 where it was 4
          regions  the labels of `all`, and in dataset.json an entry `regions` with the unions that the challenge
                   scores: whole tumour 1+2+3, tumour core 1+3, enhancing tumour 3 (prepared values). They lie
                   inside each other, so no label map can hold them: a network still learns three classes, and a
                   prediction has their published values; validation and evaluate score the unions instead.
Splits    80/10/10 of the patients; two dates of a patient (2023: -000, -001) stay together. For all 369 cases of 2020
          this gives the 295/37/37 of PatchDDM's authors. Cases without label (the validation folders) are prepared
          as `unlabelled`. Two years in one folder are refused, since they share patients under other names.
Stored    The native grid. Where all cases are 240 x 240 x 155, dataset.json names the grid 256 x 256 x 256, to which
          the scripts pad when they read. Each channel is scaled by percentiles 1 and 99 of its voxels that are not 0.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from common import InputError
from common.loaders import natural_key, nifti_stem, read_nifti
from data_prep import _prepare
from data_prep._prepare import Case, Report, Source, make_splits, nifti_files, some

LAYOUTS = ("2020", "2018", "2021", "2023")
CHANNELS = ("t1", "t1ce", "t2", "flair")
SUFFIXES = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}  # names from 2023 on -> ours
NAME = re.compile(r"(.+)(?:_(t1|t1ce|t2|flair|seg)|-(t1n|t1c|t2w|t2f|seg))")
CLASSES = {
    "necrotic core": 1,
    "oedema": 2,
    "enhancing tumour": 3,
}  # prepared values of `all` and `regions`
REGIONS = {
    "whole tumour": [1, 2, 3],
    "tumour core": [1, 3],
    "enhancing tumour": [3],
}  # unions of these
# The paper pads 8, 8, 50 voxels in front and 8, 8, 51 behind.
GRIDS: dict[tuple[int, ...], tuple[int, ...]] = {(240, 240, 155): (256, 256, 256)}
AUTHORS = {f"BraTS20_Training_{number:03d}" for number in range(1, 370)}


@dataclass
class Found:
    """The files of one case, as its names tell."""

    id: str
    files: dict[str, list[Path]] = field(
        default_factory=dict
    )  # a channel, or seg -> one file, if all is well
    folders: set[Path] = field(default_factory=set)
    odd: list[Path] = field(
        default_factory=list
    )  # NIfTI files of other names, in a folder that is this case's alone
    hyphens: bool = False  # named as from 2023 on


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List a publisher's folder and read its labels once; faults of single cases are collected, not raised.

    options: classes, workers, quiet. Raises: InputError where no case is found.
    """
    if not src.is_dir():
        raise InputError(f"{src}: no such folder, expected BraTS as published; check --src")
    found, spare, faults = find_cases(src)
    if not found and not faults:
        archives = [f.name for f in sorted(src.rglob("*")) if f.suffix in (".tar", ".zip", ".tgz")]
        remedy = f"unpack {archives[0]} first" if archives else "check --src"
        raise InputError(
            f"{src}: no BraTS case found, expected files such as CASE_flair.nii.gz; {remedy}"
        )
    faults += family_faults(src, found)
    cases, notes = [], names_told(found)
    for case in found:
        own = case_faults(case, src)
        faults += own
        if own:
            continue
        label = case.files.get("seg", [None])[0]
        if label is None and case.odd and not is_validation(case, src):
            label = case.odd[0]
            notes.append(
                f"{label}: taken as the label of case {case.id}, which has no seg and no other file left"
            )
        cases.append(Case(case.id, tuple(case.files[channel][0] for channel in CHANNELS), label))
    used = {case.label for case in cases}
    left = [file for file in spare if file not in used]
    if left:
        notes.append(
            f"{src}: other NIfTI files, left out: {len(left)} ({some([f.name for f in left])})"
        )
    bare = [case.id for case in cases if not case.label]
    if bare:
        notes.append(
            f"{src}: cases without label, prepared as unlabelled: {len(bare)} ({some(bare)})"
        )
    highest, fault, said_label = enhancing_value(
        cases, any(case.hyphens for case in found), options
    )
    labelled = [case.id for case in cases if case.label]
    if set(labelled) == AUTHORS:
        notes.append("all 369 cases of 2020 are here: split as by PatchDDM's authors, 295/37/37")
    classes, label_values, label_map = label_tables(options.classes, highest)
    regions = {"regions": REGIONS} if options.classes == "regions" else {}
    return Source(
        name=family(found[0].id) if found else "BraTS",
        channels=CHANNELS,
        ct=(False,) * len(CHANNELS),
        classes=classes,
        label_values=label_values,
        label_map=label_map,
        cases=tuple(cases),
        faults=(*faults, *fault),
        notes=(*notes, *said_label),
        splits=split_patients(labelled),
        patient=patient_of,
        grids=GRIDS,
        entries={"channel_suffixes": channel_suffixes(), **regions},
    )


# --- files -----------------------------------------------------------------------------------------------------------


def find_cases(src: Path) -> tuple[list[Found], list[Path], list[str]]:
    """Cases in natural order; NIfTI files of other names; and faults."""
    cases: dict[str, Found] = {}
    spare: dict[Path, list[Path]] = {}
    faults: list[str] = []
    for folder, name, file in nifti_files(src, faults):
        match = NAME.fullmatch(nifti_stem(Path(name)))
        if match is None:
            spare.setdefault(folder, []).append(file)
            continue
        role = match[2] or SUFFIXES.get(match[3], match[3])
        case = cases.setdefault(match[1], Found(match[1]))
        case.files.setdefault(role, []).append(file)
        case.folders.add(folder)
        case.hyphens |= match[3] is not None
    shared = Counter(folder for case in cases.values() for folder in case.folders)
    for case in cases.values():
        case.odd = [
            f
            for folder in sorted(case.folders)
            if shared[folder] == 1
            for f in spare.get(folder, [])
        ]
    found = sorted(cases.values(), key=lambda case: natural_key(case.id))
    return found, [file for files in spare.values() for file in files], faults


def channel_suffixes() -> dict[str, list[str]]:
    """Channel -> the words that end the names of its files, of all years."""
    return {
        channel: [channel, *(new for new, ours in SUFFIXES.items() if ours == channel)]
        for channel in CHANNELS
    }


def is_validation(case: Found, src: Path) -> bool:
    """Whether the name of the case or of a folder says so: a mask beside such a case is somebody's prediction."""
    folders = [part for folder in case.folders for part in folder.relative_to(src).parts]
    return any("validation" in name.lower() for name in (case.id, src.name, *folders))


def case_faults(case: Found, src: Path) -> list[str]:
    """What is wrong with a case's list of files, each fault with its folder."""
    where, mark = min(case.folders), "-" if case.hyphens else "_"
    published = (
        {ours: name for name, ours in SUFFIXES.items()}
        if case.hyphens
        else {name: name for name in CHANNELS}
    )
    faults = []
    if not _prepare.is_case_name(case.id):
        faults.append(
            f"{where}: case name {case.id!r}, expected letters, digits, - and _; rename it"
        )
    for role, files in case.files.items():
        if len(files) > 1:
            listed = ", ".join(map(str, files))
            faults.append(
                f"{where}: case {case.id} has {len(files)} files for {role}, expected 1: {listed}; remove one"
            )
    for channel in CHANNELS:
        if channel not in case.files:
            wanted = f"{case.id}{mark}{published[channel]}.nii.gz or .nii"
            faults.append(f"{where}: case {case.id} has no {channel}, expected {wanted}; copy it")
    if "seg" not in case.files and len(case.odd) > 1 and not is_validation(case, src):
        what = f"has no seg, and {len(case.odd)} other NIfTI files ({some([f.name for f in case.odd])}), expected 1"
        faults.append(f"{where}: case {case.id} {what}; name the label {case.id}{mark}seg.nii.gz")
    return faults


def names_told(found: list[Found]) -> list[str]:
    """One line for each style of names: which file is which channel."""
    new = ", ".join(f"-{name} = {ours}" for name, ours in SUFFIXES.items())
    old = ", ".join(f"_{name}" for name in CHANNELS)
    lines = {True: f"channels from files named {new}", False: f"channels from files named {old}"}
    return [lines[hyphens] for hyphens in sorted({case.hyphens for case in found})]


# --- patients --------------------------------------------------------------------------------------------------------


def family(case: str) -> str:
    """The part of a case's name that tells year and task: Brats18, BraTS20, BraTS2021, BraTS-GLI; else BraTS."""
    match = re.match(r"brats(\d+|-[a-z]+)", case, re.IGNORECASE)
    return match[0] if match else "BraTS"


def patient_of(case: str) -> str:
    """The case's name without the number of its date: BraTS-GLI-00003-001, Brats18_CBICA_ABE_1."""
    dated = re.fullmatch(r"(brats-[a-z]+-\d+)-\d+|(brats1\d_.+)_\d+", case, re.IGNORECASE)
    return (dated[1] or dated[2]) if dated else case


def family_faults(src: Path, found: list[Found]) -> list[str]:
    """A fault where several years or tasks lie below src."""
    counts = Counter(family(case.id) for case in found)
    if len(counts) < 2:
        return []
    listed = ", ".join(f"{n} of {name}" for name, n in counts.items())
    what = f"{src}: cases of several years or tasks ({listed}), expected one"
    return [
        f"{what}: they share patients, who would be in train and in test; prepare each by itself"
    ]


def split_patients(cases: Iterable[str]) -> dict[str, list[str]]:
    """make_splits over patients instead of cases; the same where each has one date."""
    patients: dict[str, list[str]] = {}
    for case in cases:
        patients.setdefault(patient_of(case), []).append(case)
    return {
        part: [case for name in names for case in patients[name]]
        for part, names in make_splits(patients).items()
    }


# --- labels ----------------------------------------------------------------------------------------------------------


def label_tables(
    classes: str, highest: tuple[int, ...]
) -> tuple[dict[str, int], dict[int, int], dict[int, int]]:
    """classes, label_values and label_map of a Source. highest: published values of the enhancing tumour."""
    if classes == "whole":
        return (
            {"whole tumour": 1},
            {0: 0, 1: 1},
            {value: min(value, 1) for value in (0, 1, 2, *highest)},
        )
    return (
        CLASSES,
        {0: 0, 1: 1, 2: 2, 3: highest[0]},
        {0: 0, 1: 1, 2: 2} | dict.fromkeys(highest, 3),
    )


def values_of(case: Case) -> Report:
    """facts["values"]: the values in a case's label file; empty where it cannot be read, which the check will say."""
    try:
        data = read_nifti(case.files[-1]).data
    except InputError:
        return Report(case.id, facts={"values": []})
    data = data if data.dtype.kind in "iu" else np.rint(data)
    if data.dtype == np.uint8:  # a count is ten times as fast as a sort
        return Report(
            case.id, facts={"values": np.flatnonzero(np.bincount(data.ravel(order="K"))).tolist()}
        )
    return Report(case.id, facts={"values": np.unique(data).tolist()})


def enhancing_value(
    cases: list[Case], hyphens: bool, options: argparse.Namespace
) -> tuple[tuple[int, ...], list[str], list[str]]:
    """Which of 3 and 4 is the enhancing tumour in this set: the value (or both, with a fault), faults and notes.

    hyphens: the files are named as from 2023 on.
    """
    labelled = [case for case in cases if case.label]
    if not labelled:
        return ((3,) if hyphens else (4,)), [], []
    found: dict[int, list[str]] = {3: [], 4: []}
    jobs = [(case,) for case in labelled]
    for report in _prepare.over_cases(
        values_of, jobs, options.workers, "label values", options.quiet
    ):
        for value in found.keys() & set(report.facts["values"]):
            found[value].append(report.id)
    three, four = (sorted(found[value], key=natural_key) for value in (3, 4))
    meaning = "4 is the enhancing tumour until 2021 and the cavity left by surgery in 2024"
    if three and four:
        what = f"label value 3 in {len(three)} cases (first {three[0]}) and 4 in {len(four)} (first {four[0]})"
        return (
            (4, 3),
            [f"{what}, expected only one of them, {meaning}; prepare one year by itself"],
            [],
        )
    if four and hyphens:
        what = f"label value 4 in {len(four)} cases (first {four[0]}) whose files are named as from 2023 on"
        return (4,), [f"{what}, expected 0, 1, 2, 3: {meaning}; prepare 2017-2021 or 2023"], []
    if three or four:
        value = 3 if three else 4
        return (value,), [], [f"labels are 0, 1, 2, {value}: {value} is the enhancing tumour, in "
                              f"{len(found[value])} of {len(labelled)} cases"]  # fmt: skip
    value = 3 if hyphens else 4
    return (
        (value,),
        [],
        [f"no label holds a 3 or 4; by the files' names the enhancing tumour would be {value}"],
    )


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def fake_names(layout: str) -> dict[str, str]:
    """Case -> folder below the root, as that year's archive or its common copy has them."""
    if layout == "2018":
        sites = [
            "2013_2",
            "2013_10",
            "CBICA_AAB",
            "CBICA_ABE",
            "TCIA01_131",
            "TCIA02_151",
            "TCIA05_277",
        ]
        root = "MICCAI_BraTS_2018_Data_Training"
        names = {f"Brats18_{site}_1": f"{root}/HGG" for site in sites}
        names |= {f"Brats18_TCIA10_{number}_1": f"{root}/LGG" for number in (103, 109, 130)}
        return names | {"Brats18_UAB_3448_1": "MICCAI_BraTS_2018_Data_Validation"}
    if layout == "2020":
        names = {f"BraTS20_Training_{n:03d}": "BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData"
                 for n in (*range(1, 10), 355)}  # fmt: skip
        inner = "BraTS2020_ValidationData/MICCAI_BraTS2020_ValidationData"
        return names | {"BraTS20_Validation_001": inner}
    if layout == "2021":
        names = {
            f"BraTS2021_{n:05d}": "BraTS2021_Training_Data"
            for n in (0, 2, 3, 5, 6, 8, 9, 11, 12, 14)
        }
        return names | {"BraTS2021_00001": "BraTS2021_ValidationData"}
    dates = [(n, 0) for n in (0, 2, 3, 5, 6, 8, 9)] + [(n, 1) for n in (2, 5, 9)]
    root = "ASNR-MICCAI-BraTS2023-GLI-Challenge"
    names = {f"BraTS-GLI-{n:05d}-{date:03d}": f"{root}-TrainingData" for n, date in sorted(dates)}
    return names | {"BraTS-GLI-00001-000": f"{root}-ValidationData"}


def make_fake(root: Path, layout: str) -> None:
    """Write 10 labelled cases and 1 without label, from phantoms in LPS with zeros round the head.

    2018: grades, qform codes that differ, an int16 label. 2020: nested, .nii, the label of case 355, a folder that
    holds its file. 2021: flat. 2023: hyphens, label 3, two dates of some patients.
    """
    from common.synthetic import phantom

    shape = (24, 28, 16)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # LPS
    affine[1, 3] = shape[1] - 1
    axes = np.ix_(*[2 * (np.arange(n) + 0.5) / n - 1 for n in shape])
    brain = (
        sum(np.abs(u) ** 4 for u in axes) < 0.85
    )  # [X, Y, Z], a rounded box; all else is exactly 0
    hyphens, ending = layout == "2023", ".nii" if layout == "2020" else ".nii.gz"
    suffixes = [*(SUFFIXES if hyphens else CHANNELS), "seg"]
    for index, (case, folder) in enumerate(fake_names(layout).items()):
        image, label = phantom(0, index, shape, (1.0, 1.0, 1.0), channels=4, classes=3)
        volumes = [
            np.where(brain, np.round(300 * (1 + index) * np.maximum(v, 0.01)), 0) for v in image
        ]
        published = np.array([0, 1, 2, 3 if hyphens else 4], np.uint8)[label * brain]
        for name, values in zip(suffixes, [*volumes, published]):
            if name == "seg" and "alidation" in folder:
                continue
            dtype = np.int16 if name != "seg" or "_2013_" in case else np.uint8
            file = nib.Nifti1Image(values.astype(dtype), affine)
            file.set_sform(affine, 1 if name == "seg" else 2)
            file.set_qform(affine, 1 if name == "seg" else 2)
            path = root / folder / case / f"{case}{'-' if hyphens else '_'}{name}{ending}"
            if path.name == "BraTS20_Training_355_seg.nii":
                path = path.with_name("W39_1998.09.19_Segm.nii")
            if path.name == "BraTS20_Training_003_t2.nii":
                path = path / path.name
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(file, path)
    first = sorted(root.rglob("*flair*" if not hyphens else "*t2f*"))[0]
    first.with_name(f"._{first.name}").write_bytes(b"\x00\x05\x16\x07 a Mac's resource fork")
    (root / next(iter(fake_names(layout).values())) / "name_mapping.csv").write_text(
        "Grade,BraTS_ID\n"
    )


def add_flags(parser: _prepare.Parser) -> None:
    choices = ("whole", "regions", "all")
    parser.add_argument(
        "--classes",
        choices=choices,
        default="whole",
        help="what to segment, see above; default whole",
    )


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(argv, "brats", __doc__ or "", read_source, make_fake, LAYOUTS, add_flags)


if __name__ == "__main__":
    sys.exit(main())
