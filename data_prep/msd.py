"""Prepare a Medical Segmentation Decathlon or nnU-Net raw (version 1 or 2) folder.

  python -m data_prep.msd --src Task04_Hippocampus --dst data/hippocampus
  python -m data_prep.msd --src Task04_Hippocampus --check          list all faults, write nothing
  python -m data_prep.msd --make-fake /tmp/fake --layout nnunet     a tiny legal copy of the layout
  python -m data_prep.msd --src Task09_Spleen --dst data/spleen --as-slices --unlabelled MORE_CT

Both kinds of dataset.json are read: the Decathlon's (labels number -> name, lists `training` and `test`) and nnU-Net's
(labels name -> number, files found by their names, one file `CASE_0000.nii.gz` for each channel). A 4D image has its
channels last. A channel named CT gets one intensity window for all cases, every other one percentiles of its own
volume. Names that begin with . or _ (left by a Mac's archiver) are never read. BTCV as published, which has no
dataset.json, is read as well: RawData/Training/img/img0001.nii.gz, label/label0001.nii.gz.

--as-slices makes square axial slices of --side pixels, what ddpm_pretrain_finetune trains on: of CT int16 HU, with one
window for all (percentiles 0.5 and 99.5 of all voxels of the cases without label, or of train where all have one), of
MR values in [-1, 1] by the same two percentiles of each case. --unlabelled is a folder of further volumes to pre-train
on, of any names; the split `pretrain` is these, those of imagesTs, and train.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from common import InputError
from common.loaders import NIFTI_ENDING, natural_key, nifti_stem
from data_prep import _prepare
from data_prep._prepare import Case, Source

LAYOUTS = ("msd", "nnunet")
BTCV = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List a folder, and that of --unlabelled; faults of single cases are collected, not raised.

    Raises: InputError where dataset.json is missing or cannot be understood, or the flags do not fit.
    """
    btcv = (src / "RawData" / "Training" / "img").is_dir()
    source = read_btcv(src / "RawData") if btcv else read_labelled(src)
    if options.unlabelled:
        source = add_unlabelled(source, Path(options.unlabelled))
    if options.as_slices:
        if len(source.channels) > 1:
            names = ", ".join(source.channels)
            raise InputError(
                f"{src}: has the channels {names}, expected one for --as-slices; leave that out"
            )
        return replace(source, slices=_prepare.slice_settings(options))
    lost = [flag for flag in ("side", "fov_pad", "norm") if getattr(options, flag)]
    if lost or options.spacing == "rule":
        flag = f"--{lost[0].replace('_', '-')}" if lost else "--spacing rule"
        raise InputError(f"{flag} is for slices only; add --as-slices, or leave it out")
    options.spacing = None if options.spacing == "native" else options.spacing
    return source


def add_unlabelled(source: Source, folder: Path) -> Source:
    """With every NIfTI below the folder as one more case without label, x_0000.nii.gz as case x."""
    faults, known, cases = (
        list(source.faults),
        {case.id.lower() for case in source.cases},
        list(source.cases),
    )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected NIfTI volumes; check --unlabelled")
    for _, name, file in _prepare.nifti_files(folder, faults):
        case = re.sub(r"_0000$", "", nifti_stem(Path(name)))
        if not _prepare.is_case_name(case):
            faults.append(
                f"{file}: case name {case!r}, expected letters, digits, - and _; rename it"
            )
        elif case.lower() in known:
            faults.append(
                f"{file}: there is a case {case} already, expected names of their own; rename or remove it"
            )
        else:
            cases.append(Case(case, (file,)))
        known.add(case.lower())
    if len(cases) == len(source.cases) and faults == list(source.faults):
        raise InputError(
            f"{folder}: holds no .nii or .nii.gz file, expected volumes; check --unlabelled"
        )
    return replace(
        source, cases=tuple(sorted(cases, key=lambda c: natural_key(c.id))), faults=tuple(faults)
    )


def read_btcv(raw: Path) -> Source:
    """The CT of BTCV as published: Training with 13 organs, Testing without labels, where it is there."""
    labels = {f.name.replace("label", "img"): f for f in volumes(raw / "Training" / "label")}
    cases, faults = [], []
    for file in volumes(raw / "Training" / "img"):
        if label := labels.pop(file.name, None):
            cases.append(Case(nifti_stem(file), (file,), label))
        else:
            wanted = raw / "Training" / "label" / file.name.replace("img", "label")
            faults.append(f"{wanted}: missing, {file.name} of Training needs it; copy it")
    faults += [
        f"{f}: a label without {image} in Training/img; copy it or remove it"
        for image, f in labels.items()
    ]
    cases += [
        Case(nifti_stem(f), (f,))
        for name in ("Testing", "Test")
        for f in volumes(raw / name / "img")
    ]
    if not cases and not faults:
        raise InputError(
            f"{raw}: no volumes found, expected img0001.nii.gz in Training/img; check --src"
        )
    names = [case.id for case in cases]
    faults += [
        f"{raw}: {name} is there twice; remove one"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    values = {value: value for value in range(len(BTCV) + 1)}
    classes = {name: value for value, name in enumerate(BTCV, 1)}
    return Source("BTCV", ("CT",), (True,), classes, values, values, tuple(cases), tuple(faults))


def read_labelled(src: Path) -> Source:
    """A folder with dataset.json. Raises: as read_source."""
    file = src / "dataset.json"
    if not file.is_file():
        what = "holds no dataset.json" if src.is_dir() else "no such folder"
        raise InputError(f"{src}: {what}, expected a Decathlon or nnU-Net raw folder; check --src")
    try:
        meta = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise InputError(f"{file}: not JSON ({e}); get it again") from e
    if not isinstance(meta, dict):
        raise InputError(
            f"{file}: holds a {type(meta).__name__}, expected an object with labels; get it again"
        )
    ending = meta.get("file_ending", ".nii.gz")
    if ending not in (".nii", ".nii.gz"):
        raise InputError(
            f"{file}: file_ending is {ending}, expected .nii.gz or .nii; convert the images to NIfTI"
        )
    classes = read_labels(meta.get("labels"), file)
    channels = read_channels(meta, file)
    cases, faults, notes = list_cases(src, meta, len(channels))
    splits = published_splits(meta, cases, notes)
    if not cases and not faults:
        raise InputError(f"{src}: no cases found, expected files in imagesTr; check --src")
    published = sorted(classes.values())
    label_map = {value: prepared for prepared, value in enumerate(published)}
    return Source(
        name=str(meta.get("name") or src.resolve().name),
        channels=tuple(channels),
        ct=tuple(re.match(r"ct\b", name.strip(), re.IGNORECASE) is not None for name in channels),
        classes={
            name: label_map[value]
            for name, value in sorted(classes.items(), key=lambda item: item[1])
            if value
        },
        label_values=dict(enumerate(published)),
        label_map=label_map,
        cases=tuple(sorted(cases, key=lambda case: natural_key(case.id))),
        faults=tuple(faults),
        notes=tuple(notes),
        splits=splits,
    )


def published_splits(
    meta: dict, cases: list[Case], notes: list[str]
) -> dict[str, list[str]] | None:
    """Where `test` lists labels: these cases are the test set, and the others are divided; else None."""
    tests = meta["test"] if isinstance(meta.get("test"), list) else []
    listed = [entry for entry in tests if isinstance(entry, dict) and entry.get("label")]
    names = {nifti_stem(Path(str(entry.get("image")))) for entry in listed}
    labelled = [case.id for case in cases if case.label]
    if not (test := [name for name in labelled if name in names]):
        return None
    notes.append(
        f"the {len(test)} labelled cases that dataset.json lists as test are the test set (without --split-sizes)"
    )
    parts = _prepare.make_splits([name for name in labelled if name not in names])
    return {
        "train": parts["train"] + parts["test"],
        "val": parts["val"],
        "test": sorted(test, key=natural_key),
    }


def read_labels(labels: Any, file: Path) -> dict[str, int]:
    """{name: published value} from either kind of `labels`; background, 0, is added where it is left out.

    Raises: InputError for regions (lists of values), ignore labels, doubled or negative values.
    """
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"{file}: labels is {labels!r}, expected names and numbers; complete it")
    if all(str(key).lstrip("-").isdigit() for key in labels):  # Decathlon: number -> name
        pairs = [(str(name), int(key)) for key, name in labels.items()]
    else:
        pairs = []
        for name, value in labels.items():
            if isinstance(value, list):
                raise InputError(
                    f"{file}: label {name} is a region, {value}; expected one number a class, "
                    "because classes must exclude each other here; list the parts as classes"
                )
            if name == "ignore":
                raise InputError(
                    f"{file}: has an ignore label ({value}), expected none, no script knows it; remove it"
                )
            if isinstance(value, bool) or not str(value).lstrip("-").isdigit():
                raise InputError(
                    f"{file}: label {name} has the value {value!r}, expected an integer; correct it"
                )
            pairs.append((str(name), int(value)))
    if 0 not in [value for _, value in pairs]:
        pairs.insert(0, ("background", 0))
    names, values = [name for name, _ in pairs], [value for _, value in pairs]
    if len(set(names)) < len(names) or len(set(values)) < len(values) or min(values) < 0:
        raise InputError(
            f"{file}: labels {labels} repeat a name or a value, or have a negative one; correct them"
        )
    if any(name.lower() == "background" and value != 0 for name, value in pairs):
        raise InputError(
            f"{file}: labels {labels} give background another value than 0; correct them"
        )
    if max(values) > 65535:
        raise InputError(
            f"{file}: labels go up to {max(values)}, expected at most 65535, 16 bits; number them anew"
        )
    if len(pairs) < 2 or len(pairs) > 256:
        raise InputError(
            f"{file}: {len(pairs)} labels with background, expected 2 to 256; correct them"
        )
    return dict(pairs)


def read_channels(meta: dict, file: Path) -> list[str]:
    """Names in channel order from `channel_names` (nnU-Net 2) or `modality`. Raises: InputError."""
    entry = meta.get("channel_names", meta.get("modality"))
    if (
        isinstance(entry, dict)
        and sorted(map(str, entry)) == sorted(str(i) for i in range(len(entry)))
        and entry
    ):
        named = {str(key): str(name) for key, name in entry.items()}
        return [named[str(i)] for i in range(len(named))]
    raise InputError(
        f'{file}: modality or channel_names is {entry!r}, expected {{"0": NAME, …}}; complete it'
    )


# --- cases -----------------------------------------------------------------------------------------------------------


def volumes(folder: Path) -> list[Path]:
    """NIfTI files of a folder in natural order, without a Mac's `._` files."""
    if not folder.is_dir():
        return []
    files = [f for f in folder.iterdir() if f.name[0] != "." and NIFTI_ENDING.search(f.name)]
    return sorted(files, key=lambda f: natural_key(f.name))


def list_cases(src: Path, meta: dict, channels: int) -> tuple[list[Case], list[str], list[str]]:
    """Cases, faults and notes, by the lists in dataset.json where it has them, else by the files' names."""
    if isinstance(meta.get("dataset"), dict):
        cases, faults = _explicit_cases(src, meta["dataset"])
    elif meta.get("training"):
        cases, faults = _listed_cases(src, meta, channels)
    else:
        cases, faults = _found_cases(src, channels)
    seen: dict[str, Case] = {}
    for case in cases:
        if not _prepare.is_case_name(case.id):
            faults.append(
                f"{src}: case name {case.id!r}, expected letters, digits, - and _; rename it"
            )
        elif case.id.lower() in seen:  # some disks do not tell A from a
            faults.append(f"{src}: case {case.id} is there twice; remove one")
        seen[case.id.lower()] = case
    used = {f.resolve() for case in cases for f in case.files}
    folders = [src / name for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")]
    files = [f for folder in folders if folder.is_dir() for f in sorted(folder.iterdir())]
    extra = [
        f"{f.parent.name}/{f.name}" for f in files if f.name[0] != "." and f.resolve() not in used
    ]
    notes = []
    if extra:
        notes.append(
            f"{src}: {len(extra)} files are left out, no case has them: {_prepare.some(extra)}"
        )
    labelled = sum(case.label is not None for case in cases)
    if str(meta.get("numTraining", labelled)) != str(labelled):
        notes.append(
            f"{src / 'dataset.json'}: numTraining is {meta['numTraining']}, labelled cases are {labelled}"
        )
    return list(seen.values()), faults, notes


def _absent(paths: list[Path], case: str) -> list[str]:
    """A fault for each file that is not on disk."""
    absent = [p for p in paths if not p.is_file()]
    return [
        f"{p}: missing, case {case} of dataset.json needs it; copy it or take it off the list"
        for p in absent
    ]


def _explicit_cases(src: Path, entries: dict) -> tuple[list[Case], list[str]]:
    """nnU-Net 2's `dataset`: case -> {"images": [...], "label": ...}, paths relative to the folder."""
    cases, faults = [], []
    for name, entry in entries.items():
        paths = entry.get("images") if isinstance(entry, dict) else None
        named = isinstance(paths, list) and paths and all(isinstance(p, str) for p in paths)
        if not named or not isinstance(entry.get("label", ""), str | None):
            faults.append(
                f"{src / 'dataset.json'}: case {name} is {entry!r}, expected images and label; correct it"
            )
            continue
        label = src / entry["label"] if entry.get("label") else None
        case = Case(str(name), tuple(src / p for p in entry["images"]), label)
        absent = _absent(case.files, case.id)
        faults += absent
        cases += [] if absent else [case]
    return cases, faults


def _listed_cases(src: Path, meta: dict, channels: int) -> tuple[list[Case], list[str]]:
    """The Decathlon's `training` and `test`; version 1 of nnU-Net lists CASE.nii.gz and means CASE_0000.nii.gz."""
    cases, faults = [], []
    for key in ("training", "test"):
        if not isinstance(meta.get(key) or [], list):
            faults.append(
                f"{src / 'dataset.json'}: {key} is {meta[key]!r}, expected a list of cases; correct it"
            )
            continue
        for entry in meta.get(key) or []:
            image = entry.get("image") if isinstance(entry, dict) else entry
            label = entry.get("label") if isinstance(entry, dict) else None
            if not isinstance(image, str) or (key == "training" and not isinstance(label, str)):
                faults.append(
                    f"{src / 'dataset.json'}: {key} has {entry!r}, expected image and label; correct it"
                )
                continue
            path = src / image
            name, ending = nifti_stem(path), path.name[len(nifti_stem(path)) :]
            split = tuple(path.with_name(f"{name}_{i:04d}{ending}") for i in range(channels))
            images = split if not path.is_file() and split[0].is_file() else (path,)
            case = Case(name, images, src / label if isinstance(label, str) else None)
            absent = _absent(case.files, case.id)
            faults += absent
            cases += [] if absent else [case]
    return cases, faults


def _found_cases(src: Path, channels: int) -> tuple[list[Case], list[str]]:
    """nnU-Net 2 without lists: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, and imagesTs without labels."""
    cases, faults = [], []
    labels: dict[str, Path] = {}
    for file in volumes(src / "labelsTr"):
        if (stem := nifti_stem(file)) in labels:
            faults.append(f"{file}: there is {labels[stem].name} as well; remove one")
        labels[stem] = file
    for folder in ("imagesTr", "imagesTs"):
        groups: dict[str, dict[int, Path]] = {}
        for file in volumes(src / folder):
            match = re.fullmatch(r"(.+)_(\d{4})", nifti_stem(file))
            if match is None:
                faults.append(
                    f"{file}: name without a channel's number, expected such as CASE_0000.nii.gz; rename it"
                )
                continue
            group = groups.setdefault(match[1], {})
            if int(match[2]) in group:
                faults.append(f"{file}: there is {group[int(match[2])].name} as well; remove one")
            group[int(match[2])] = file
        for name, group in groups.items():
            label = labels.pop(name, None) if folder == "imagesTr" else None
            if sorted(group) != list(range(channels)):
                have = ", ".join(f"{i:04d}" for i in sorted(group))
                wanted = f"expected 0000 to {channels - 1:04d}"
                faults.append(f"{src / folder / name}: channel files {have}, {wanted}; complete it")
            elif folder == "imagesTr" and label is None:
                faults.append(
                    f"{src / 'labelsTr' / name}.nii.gz: missing, case {name} of imagesTr needs it; copy it"
                )
            else:
                cases.append(Case(name, tuple(group[i] for i in range(channels)), label))
    for name, label in labels.items():
        faults.append(
            f"{label}: a label without image, expected {name}_0000 in imagesTr; copy it or remove the label"
        )
    return cases, faults


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def make_fake(root: Path, layout: str) -> None:
    """Write 10 labelled cases and 1 without label, from phantoms: some LAS, all anisotropic, one float32 label."""
    from common.synthetic import phantom

    channels, names = (1, ["MRI"]) if layout == "msd" else (2, ["T2", "ADC"])
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    stems = [f"fake_{i:03d}" for i in range(1, 12)]
    for index, stem in enumerate(stems):
        image, label = phantom(
            0, index, shape=(24 + index % 3, 28, 16), channels=channels, classes=2
        )
        affine = np.diag([-1.0 if index % 3 == 1 else 1.0, 1.0, 2.0, 1.0])  # every third is LAS
        affine[:3, 3] = (-12, -14, -16)
        folder = "imagesTs" if index == 10 else "imagesTr"
        for channel, values in enumerate(image):
            ending = "" if layout == "msd" else f"_{channel:04d}"
            stored = np.round(values * 1000 * (1 + index)).astype(np.int16)
            nib.save(nib.Nifti1Image(stored, affine), root / folder / f"{stem}{ending}.nii.gz")
        if index < 10:
            dtype = np.float32 if index == 2 else np.uint8
            nib.save(
                nib.Nifti1Image(label.astype(dtype), affine), root / "labelsTr" / f"{stem}.nii.gz"
            )
    (root / "imagesTr" / f"._{stems[0]}.nii.gz").write_bytes(
        b"\x00\x05\x16\x07 a Mac's resource fork"
    )
    meta: dict[str, Any] = {
        "name": "Fake",
        "description": "phantoms, made by a program",
        "licence": "none needed",
    }
    if layout == "msd":
        meta |= {
            "tensorImageSize": "3D",
            "modality": {str(i): name for i, name in enumerate(names)},
        }
        meta |= {
            "labels": {"0": "background", "1": "core", "2": "shell"},
            "numTraining": 10,
            "numTest": 1,
        }
        paths = [
            {"image": f"./imagesTr/{s}.nii.gz", "label": f"./labelsTr/{s}.nii.gz"}
            for s in stems[:10]
        ]
        meta |= {"training": paths, "test": [f"./imagesTs/{stems[10]}.nii.gz"]}
    else:
        meta |= {
            "channel_names": {str(i): name for i, name in enumerate(names)},
            "file_ending": ".nii.gz",
        }
        meta |= {"labels": {"background": 0, "core": 1, "shell": 2}, "numTraining": 10}
    (root / "dataset.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def add_flags(parser: _prepare.Parser) -> None:
    parser.add_argument(
        "--unlabelled", metavar="DIR", help="a folder of further volumes without labels"
    )
    parser.add_argument(
        "--as-slices", action="store_true", help="square axial slices instead of volumes, see above"
    )
    _prepare.add_slice_flags(parser)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(argv, "msd", __doc__ or "", read_source, make_fake, LAYOUTS, add_flags)


if __name__ == "__main__":
    sys.exit(main())
