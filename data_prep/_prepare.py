"""What all data preparations share: check everything, prepare each case, continue after a stop, print a manifest.

A preparation (`data_prep/msd.py` and its siblings) only knows its publisher's layout: it turns a folder into a
`Source`, a plain list of cases. Everything from there to the prepared folder is done here, in two passes: the first
reads every file and collects every fault before a byte is written, the second writes one case after the other. Sets of
2D images bring a function that reads one case; a path may then lead into a zip archive, as in x.zip/folder/y.tif.
Volumes may also become square slices, see the section on them.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import tokenize
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from common import InputError, atomic_write
from common.loaders import (
    FORMAT,
    FOV_FLOOR,
    NIFTI_ENDING,
    PERCENTILES,
    Nifti,
    SliceGrid,
    as_volume,
    check_intensities,
    check_same_grid,
    natural_key,
    normalise,
    published_path,
    read_nifti,
    resample,
    shrink,
    slices_of,
    stack_channels,
    to_ras,
    walk_files,
)

MEMBER = 1 << 29  # bytes, the largest file that is unpacked from an archive
ROUNDING = 1e-3  # a float label this close to an integer was one; farther off it was interpolated
MANY = 12  # splits, or unknown values of a label; more are counted, not named
NO_ROOM = "does not fit the memory; use fewer --workers"
QUANTILES = np.linspace(0, 1, 1001)  # of the foreground of one CT, the same weight for each case


@dataclass(frozen=True)
class Case:
    """One volume: its id, one image file for each channel (or one 4D file), its label file or None."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [*self.images, *([self.label] if self.label else [])]


@dataclass(frozen=True)
class Flat:
    """One 2D case as it is stored: image uint8 [C, Y, X]; label uint8 and numbers of objects int32 [Y, X], or None.

    facts: more of this case for dataset.json.
    """

    image: np.ndarray
    label: np.ndarray | None = None
    instances: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A publisher's folder, read. label_map: published value -> prepared value, for every value that may occur."""

    name: str
    channels: tuple[str, ...]
    ct: tuple[bool, ...]  # for each channel: absolute units, one window for all cases
    classes: dict[str, int]  # name -> prepared value, 1..K; background, 0, has no entry
    label_values: dict[int, int]  # prepared value -> published value
    label_map: dict[int, int]
    cases: tuple[Case, ...]
    faults: tuple[str, ...] = ()  # found while listing
    notes: tuple[str, ...] = ()
    rules: tuple[dict, ...] | None = (
        None  # how each channel is normalised, where that is fixed; None: found, see ct
    )
    crop: dict | None = None  # {"kind": "label"|"centre"|"none", "size": [X, Y, Z]}, see crop_start
    splits: dict[str, list[str]] | None = (
        None  # of the labelled cases: train, val, test; None: make_splits
    )
    patient: Callable[[str], str] = str  # case id -> patient, whose cases stay in one split
    grids: dict[tuple[int, ...], tuple[int, ...]] = field(
        default_factory=dict
    )  # shape of all cases -> virtual grid
    counts: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # what -> found here, published
    entries: dict[str, Any] = field(default_factory=dict)  # more of dataset.json
    read: Callable[..., Flat | None] | None = (
        None  # 2D: (case, report) -> what is stored, or None with faults reported
    )
    check: Callable[..., Any] | None = (
        None  # 2D: what the first pass calls instead, where `read` takes long
    )
    settings: dict[str, Any] = field(default_factory=dict)  # 2D: flags that change what is stored
    slices: dict | None = (
        None  # {"side", "spacing", "norm", "fov_pad"}: the volumes become slices, see slice_settings
    )
    pretrain: tuple[
        str, ...
    ] = ()  # slices: cases to pre-train on; none: those without label, and train
    published_slices: dict[str, int] = field(default_factory=dict)  # split -> slices in the paper

    @property
    def fits_window(self) -> bool:
        """Whether a window of intensities has to be found from the foreground of the training cases."""
        return any(self.ct) and self.rules is None and not self.slices


@dataclass
class Report:
    """What a pass found about one case: faults stop the preparation, notes are only said."""

    id: str
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)


# --- files -----------------------------------------------------------------------------------------------------------


def nifti_files(src: Path, faults: list[str]) -> Iterator[tuple[Path, str, Path]]:
    """(folder, published name, file) of every NIfTI below src; a folder x.nii stands for the one file in it."""
    inside: dict[Path, list[Path]] = {}
    for file in walk_files(src):
        if NIFTI_ENDING.search(file.name):
            inside.setdefault(published_path(file), []).append(file)
    for path, files in inside.items():
        if len(files) == 1:
            yield path.parent, path.name, files[0]
        else:
            what = f"a folder with {len(files)} NIfTI files"
            faults.append(f"{path}: {what}, expected a file, or one in it; unpack it again")


def plain_files(src: Path) -> Iterator[Path]:
    """Every file below src, also in zip archives, sorted; without those that a Mac's archiver leaves.

    Raises: InputError where there is no such folder or archive, or an archive cannot be opened.
    """
    if not src.exists():
        raise InputError(f"{src}: no such file or folder; check --src")
    for file in [src] if src.is_file() else sorted(walk_files(src)):
        if file.suffix.lower() == ".zip":
            with _unzip(file) as packed:
                names = [info.filename for info in packed.infolist() if not info.is_dir()]
            inside = [
                Path(file, name) for name in names if not name.startswith("/")
            ]  # "/x" would leave the archive
        else:
            inside = [file]
        for path in inside:
            parts = path.relative_to(src).parts
            if "__MACOSX" not in parts and not any(part.startswith(".") for part in parts):
                yield path


@contextlib.contextmanager
def _unzip(file: Path) -> Iterator[zipfile.ZipFile]:
    """An open archive. Raises: InputError for whatever is wrong with it."""
    try:
        with zipfile.ZipFile(file) as packed:
            yield packed
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        KeyError,
        RuntimeError,
        NotImplementedError,
    ) as e:
        with open(file, "rb") as f:
            page = f.read(64).lstrip()[:1] == b"<"
        what = (
            "an HTML page, left by a download that failed" if page else f"damaged or cut off ({e})"
        )
        raise InputError(f"{file}: {what}, expected a zip archive; get it again") from e


def in_archive(path: Path) -> tuple[Path, str] | None:
    """(archive, name in it) of a path that leads into a zip archive; None for a plain file."""
    for parent in path.parents:
        if parent.suffix.lower() == ".zip" and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def read_bytes(path: Path) -> bytes:
    """A file's contents, also out of a zip archive. Raises: InputError."""
    if (where := in_archive(path)) is None:
        try:
            return path.read_bytes()
        except OSError as e:
            raise InputError(
                f"{path}: cannot be read ({e.strerror or e}); check path and rights"
            ) from e
    with _unzip(where[0]) as packed:
        if (size := packed.getinfo(where[1]).file_size) > MEMBER:
            raise InputError(
                f"{path}: {size:,} bytes unpacked, expected at most {MEMBER:,}; check the archive"
            )
        return packed.read(where[1])


def is_case_name(case: str) -> bool:
    """Whether a case can be the name of a folder everywhere: letters, digits, - and _ (. and + inside)."""
    return re.fullmatch(r"[^\W_][\w.+-]*", case) is not None


def size(array: np.ndarray) -> str:
    """Width x height of [..., Y, X], as image viewers say it."""
    return f"{array.shape[-1]} x {array.shape[-2]}"


def some(names: list[str]) -> str:
    """The first five, and dots where there are more."""
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


# --- one case --------------------------------------------------------------------------------------------------------


def clean_label(
    values: np.ndarray, known: dict[int, int], path: Path
) -> tuple[np.ndarray, list[str]]:
    """Published label values to prepared ones, uint8, same shape; and what is wrong with them, in words.

    Floats within 1e-3 of an integer are that integer; an astype without rounding would make 3 of 3.9999.
    """
    faults = []
    if values.dtype.kind == "f":
        rounded = np.rint(values)
        off = np.abs(values - rounded) >= ROUNDING
        if count := int(off.sum()):
            some = ", ".join(f"{v:g}" for v in np.unique(values[off])[:5])
            faults.append(f"{path}: {count:,} label voxels are not integers ({some}), expected whole numbers; "
                          "was it interpolated linearly? get the original")  # fmt: skip
        values = np.clip(np.where(off, 0, rounded), -(2**62), 2**62).astype(np.int64)
    table, legal = np.zeros(max(known) + 1, np.uint8), np.zeros(max(known) + 1, bool)
    for published, prepared in known.items():
        table[published], legal[published] = prepared, True
    inside = (values >= 0) & (values <= max(known))
    index = np.where(inside, values, 0)
    unknown = values[~(inside & legal[index])]
    wanted = ", ".join(str(k) for k in sorted(known))
    found = list(zip(*(a.tolist() for a in np.unique(unknown, return_counts=True))))
    for value, count in found[:MANY]:
        kind = "negative" if value < 0 else "unknown"
        faults.append(
            f"{path}: {kind} label value {value} in {count:,} voxels, expected {wanted}; correct the label"
        )
    if len(found) > MANY:
        faults.append(f"{path}: and {len(found) - MANY} more such values; is this an image?")
    return table[index], faults


def load_case(
    source: Source, case: Case, allow: bool, report: Report
) -> tuple[np.ndarray, np.ndarray | None, Nifti] | None:
    """Read one case: image [C, X, Y, Z], prepared label [X, Y, Z] or None, and the first image file.

    allow: an affine that differs between files of one shape is said, not refused. Faults go into the report, each of
    them; then the return value is None.
    """
    with noting(report):
        files = [attempt(report, read_nifti, path) for path in case.images]
        label_file = attempt(report, read_nifti, case.label) if case.label else None
        image = labels = None
        if all(files):
            for other in files[1:]:
                attempt(report, check_same_grid, files[0], other, allow_affine_mismatch=allow)
            if not report.faults or len(files) == 1:
                image = attempt(report, stack_channels, files, source.channels, allow)
        if (
            label_file is not None
            and (volume := attempt(report, as_volume, label_file)) is not None
        ):
            if (
                files[0] is not None and files[0].data.ndim > 2
            ):  # 2D is a fault that is named already
                attempt(report, check_same_grid, files[0], label_file, allow_affine_mismatch=allow)
            labels, wrong = clean_label(volume, source.label_map, label_file.path)
            report.faults += wrong
    return None if report.faults or image is None else (image, labels, files[0])


@contextlib.contextmanager
def noting(report: Report) -> Iterator[None]:
    """Warnings become notes of the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    texts = dict.fromkeys(str(warning.message) for warning in caught)
    report.notes += [text for text in texts if text not in report.notes]


def attempt(report: Report, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The function's value; or None, and the report has one fault more."""
    try:
        return function(*args, **kwargs)
    except InputError as e:
        if str(e) not in report.faults:
            report.faults.append(str(e))
    except MemoryError:
        what = (
            args[0][0].path
            if isinstance(args[0], list)
            else args[0].path
            if isinstance(args[0], Nifti)
            else args[0]
        )
        report.faults.append(f"{what}: {NO_ROOM}")
    return None


def read_flat(report: Report, reader: Callable[[Path, bytes], Any], path: Path) -> Any:
    """reader(path, contents) of a file that may lie in an archive; or None, and the report has one fault more."""
    blob = attempt(report, read_bytes, path)
    return None if blob is None else attempt(report, reader, path, blob)


def add_reduce(parser: "Parser") -> None:
    """--reduce K, for `reduced`."""
    parser.add_argument(
        "--reduce",
        type=parse_reduce,
        default=1,
        metavar="K",
        help="K times smaller images, see above",
    )


def parse_reduce(text: str) -> int:
    if not re.fullmatch(r"[1-9]|1[0-6]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 16")
    return int(text)


def reduced(image: np.ndarray, objects: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean colours of k x k pixels and the number of their middle one: [3, Y, X], [Y, X] -> sides divided by k."""
    small = shrink(image, k)
    return small, objects[k // 2 :: k, k // 2 :: k][: small.shape[1], : small.shape[2]]


def check_case(source: Source, case: Case, allow: bool) -> Report:
    """First pass: read all files of a case, write nothing. facts["quantiles"]: of each CT channel's foreground."""
    report = Report(case.id)
    try:
        if source.read:
            attempt(report, source.check or source.read, case, report)
        else:
            (check_slices if source.slices else check_volume)(source, case, allow, report)
    except MemoryError:
        report.faults.append(f"{case.id}: {NO_ROOM}")
    return report


def check_volume(source: Source, case: Case, allow: bool, report: Report) -> None:
    """First pass of a case whose volumes stay volumes."""
    loaded = load_case(source, case, allow, report)
    if loaded is not None:
        image, labels, first = loaded
        for channel, ct in zip(image, source.ct):
            if ct and (low := float(channel.min())) >= 0:
                report.notes.append(
                    f"{first.path}: no value is below {low:g}; are these Hounsfield units?"
                )
        if labels is not None and source.fits_window and labels.any():
            inside = [channel[labels > 0] if ct else None for channel, ct in zip(image, source.ct)]
            report.facts["quantiles"] = [
                None if v is None else np.quantile(v, QUANTILES).tolist() for v in inside
            ]
            report.facts["ranges"] = [[float(c.min()), float(c.max())] for c in image]


def crop_start(shape: Sequence[int], size: Sequence[int], label: np.ndarray | None) -> list[int]:
    """First voxel on each axis when [X, Y, Z] is cut to `size`; 0 where the axis is not longer.

    The window is centred on the bounding box of the label's foreground, which is not 0: it begins at
    ceil((first + last) / 2 - size / 2), moved back inside the volume. Without label or foreground it is centred on the
    volume, as loaders.symmetric_pad is: floor((n - size) / 2) voxels lie in front of it.
    """
    start = []
    for axis, (n, target) in enumerate(zip(shape, size)):
        first, last = 0, n - 1
        if label is not None and label.any():
            first, last = np.flatnonzero(label.any(axis=tuple({0, 1, 2} - {axis})))[
                [0, -1]
            ].tolist()
        start.append(min(max(math.ceil((first + last - target) / 2), 0), max(n - target, 0)))
    return start


def cut(
    image: np.ndarray, labels: np.ndarray | None, affine: np.ndarray, crop: dict
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, dict]:
    """Cut the axes that are longer than crop["size"]; shorter ones are left for the scripts to pad when they read.

    Returns: image [C, X, Y, Z], label [X, Y, Z], affine, and what was cut, for dataset.json: shape before, start, and
    how many labelled voxels lie outside.
    """
    shape = image.shape[1:]
    start = crop_start(shape, crop["size"], labels if crop["kind"] == "label" else None)
    inside = tuple(slice(first, first + n) for first, n in zip(start, crop["size"]))
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array(start)
    lost = (
        None if labels is None else int(np.count_nonzero(labels) - np.count_nonzero(labels[inside]))
    )
    facts = {"shape": list(shape), "start": start, "label_voxels_outside": lost}
    return (
        image[..., inside[0], inside[1], inside[2]],
        None if labels is None else labels[inside],
        affine,
        facts,
    )


def volume_case(
    source: Source, case: Case, recipe: dict, report: Report
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays of a volume as they are stored, by name, and what dataset.json says of it; None with faults."""
    loaded = load_case(source, case, recipe["allow_affine_mismatch"], report)
    if loaded is None:
        return None
    image, labels, first = loaded
    with noting(report):
        image = normalise(image, recipe["normalisation"], case.images)
    image, affine, _ = to_ras(image, first.affine)
    if labels is not None:
        labels, _, _ = to_ras(labels, first.affine)
    if recipe["spacing"]:
        native = affine
        image, affine = resample(image, native, recipe["spacing"], order=1)
        if labels is not None:
            labels, _ = resample(labels, native, recipe["spacing"], order=0)
    outside = {}
    if (crop := recipe.get("crop", {"kind": "none"}))["kind"] != "none":
        image, labels, affine, outside["crop"] = cut(image, labels, affine, crop)
    arrays = {"image": np.ascontiguousarray(image, np.float16)}
    if labels is not None:
        arrays["label"] = np.ascontiguousarray(labels, np.uint8)
    return arrays, {**volume_facts(source, image.shape[1:], affine, labels, first), **outside}


def volume_facts(
    source: Source,
    shape: Sequence[int],
    affine: np.ndarray,
    labels: np.ndarray | None,
    first: Nifti,
) -> dict[str, Any]:
    """What dataset.json says of a volume: its prepared grid, what it was before, its label."""
    return {
        "shape": list(shape),
        "spacing_mm": [round(float(np.linalg.norm(affine[:3, axis])), 6) for axis in range(3)],
        "affine": affine.tolist(),
        "labelled": labels is not None,
        "original": original_of(first),
        "label_voxels": None
        if labels is None
        else np.bincount(labels.ravel(), minlength=max(source.label_values) + 1).tolist(),
    }


def original_of(first: Nifti) -> dict[str, Any]:
    """Shape, spacing and orientation of a file as it was published."""
    return {
        "shape": list(first.data.shape[:3]),
        "spacing_mm": [round(s, 6) for s in first.spacing],
        "orientation": "".join(nib.aff2axcodes(first.affine)),
    }


def flat_case(
    source: Source, case: Case, report: Report
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """As volume_case, of a 2D image. facts["objects"]: how many there are, where the set tells them apart."""
    assert source.read
    flat = attempt(report, source.read, case, report)
    if flat is None or report.faults:
        return None
    arrays = {"image": np.ascontiguousarray(flat.image, np.uint8)}
    facts = {
        "shape": list(flat.image.shape[1:]),
        "labelled": flat.label is not None,
        "label_voxels": None,
    }
    if flat.label is not None:
        arrays["label"] = np.ascontiguousarray(flat.label, np.uint8)
        counted = flat.label[flat.label != source.entries.get("ignore", -1)]
        facts["label_voxels"] = np.bincount(
            counted, minlength=max(source.label_values) + 1
        ).tolist()
    if flat.instances is not None:
        arrays["instances"] = np.ascontiguousarray(flat.instances, np.int32)
        facts["objects"] = int(np.count_nonzero(np.unique(flat.instances)))
    return arrays, {**facts, **flat.facts}


def prepare_case(source: Source, case: Case, recipe: dict, folder: Path) -> Report:
    """Second pass: write cases/ID with the arrays and case.json; the folder appears whole or not at all."""
    report = Report(case.id)
    sources = file_facts(
        case
    )  # before reading, so that a file that changes meanwhile counts as changed
    if source.read:
        made = flat_case(source, case, report)
    else:
        made = (slice_case if source.slices else volume_case)(source, case, recipe, report)
    if made is None:
        return report
    arrays, facts = made
    report.facts = {**facts, "sources": sources}
    temporary = folder / f".{case.id}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir(parents=True)
        for name, array in arrays.items():
            _save(temporary / f"{name}.npy", array)
        record = {"recipe": recipe, "facts": report.facts, "notes": report.notes}
        atomic_write(temporary / "case.json", json.dumps(record).encode())
        shutil.rmtree(folder / case.id, ignore_errors=True)
        temporary.rename(folder / case.id)
    except OSError as e:
        raise InputError(
            f"{folder / case.id}: cannot be written ({e.strerror or e}); free space and run again"
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _save(path: Path, array: np.ndarray) -> None:
    """An .npy file of a C- or Fortran-contiguous array, on the disk when this returns. Raises: OSError.

    Not np.save: on a full disk it loses the last block without an error (numpy 2.4, tofile ignores fclose).
    """
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(array))
        f.write(array.data if array.flags.c_contiguous else array.T.data)
        f.flush()
        os.fsync(f.fileno())  # the rename that follows must not overtake the data


def file_facts(case: Case) -> list[dict]:
    """Path, size and modification time (in an archive: checksum) of each file: what tells whether one has changed."""
    facts = []
    for path in case.files:
        if (where := in_archive(path)) is None:
            facts.append(
                {
                    "path": str(path.absolute()),
                    "bytes": (s := path.stat()).st_size,
                    "mtime_ns": s.st_mtime_ns,
                }
            )
        else:
            with _unzip(where[0]) as packed:
                info = packed.getinfo(where[1])
            facts.append({"path": str(path.absolute()), "bytes": info.file_size, "crc32": info.CRC})
    return facts


def finished(case: Case, folder: Path) -> dict | None:
    """The record of a case that an earlier run has written from these very files, its arrays whole; or None."""
    try:
        record = json.loads((folder / case.id / "case.json").read_text(encoding="utf-8"))
        facts = record["facts"]
        names = ["image"] + ["label"] * facts["labelled"] + ["instances"] * ("objects" in facts)
        for name in names:
            np.load(
                folder / case.id / f"{name}.npy", mmap_mode="r", allow_pickle=False
            )  # refuses a file cut short
        return record if facts["sources"] == file_facts(case) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError, tokenize.TokenError):
        return None


# --- slices ----------------------------------------------------------------------------------------------------------
#
# Volumes as squares of pixels, for networks of 2D images that are pre-trained on many unlabelled scans (Huang et al.,
# arXiv 2402.15216). Order: RAS; the percentiles; padding to a square and resizing in the plane, respacing of slices;
# CT is stored as int16 HU, clipped and scaled when it is read, so that other windows stay possible.

CORPUS_PERCENTILES = (0.5, 99.5)


def slice_settings(options: argparse.Namespace) -> dict:
    """Source.slices of the flags of add_slice_flags, with their defaults."""
    spacing = options.spacing or "rule"
    return {
        "side": options.side or 256,
        "spacing": spacing if isinstance(spacing, str) else list(spacing),
        "norm": getattr(options, "norm", None) or "case",
        "fov_pad": options.fov_pad or "raise",
    }


def check_slices(source: Source, case: Case, allow: bool, report: Report) -> None:
    """First pass of a case. facts: original; where a window is counted, histogram and raised, see `histogram`."""
    loaded = load_case(source, case, allow, report)
    if loaded is None:
        return
    image, _, first = loaded
    assert source.slices
    report.facts["original"] = original_of(first)
    if not source.ct[0] and source.slices["norm"] == "case":
        return
    attempt(report, check_intensities, first, source.ct[0])
    if not report.faults:
        raises = source.ct[0] and source.slices["fov_pad"] == "raise"
        report.facts["histogram"], report.facts["raised"] = histogram(
            image[0], FOV_FLOOR if raises else -32768
        )
        if first.data.dtype.kind == "f" and (image != np.rint(image)).any():
            report.notes.append(
                "some intensities are no whole numbers; they are rounded before they are counted"
            )


def histogram(volume: np.ndarray, floor: int) -> tuple[np.ndarray, int]:
    """int64 [65536], how often each whole number from -32768 on occurs in [X, Y, Z]; and how many lay below `floor`.

    Those are counted as `floor`. The values must fit 16 bits.
    """
    counts, raised = np.zeros(65536, np.int64), 0
    for k in range(volume.shape[2]):
        values = np.rint(volume[:, :, k]).astype(np.int64)
        raised += int((values < floor).sum())
        counts += np.bincount(np.maximum(values, floor).ravel() + 32768, minlength=65536)
    return counts, raised


def percentile_of(counts: np.ndarray, q: float) -> float:
    """What np.percentile gives for all the values that `histogram` counted."""
    n = int(counts.sum())
    rank = q / 100 * (n - 1)
    first = math.floor(rank)
    a, b = np.searchsorted(np.cumsum(counts), [first, min(first + 1, n - 1)], side="right") - 32768
    return float(a + (rank - first) * (b - a))


@dataclass
class Corpus:
    """The intensities of the volumes that a window is made from, in the memory of one histogram however many they are.

    ids: those cases. lacks: of them, whose histogram is still to come. window: low, high, voxels, raised, once known;
    it is kept in window.json beside `key`, which tells whether settings or files have changed since.
    """

    rule: dict  # normalisation without the window
    ids: set[str]
    file: Path
    key: str
    window: dict | None = None
    counts: np.ndarray = field(default_factory=lambda: np.zeros(65536, np.int64))
    raised: int = 0

    def __post_init__(self) -> None:
        self.lacks = set() if self.window else set(self.ids)

    def take(self, report: Report) -> None:
        """Add a report's histogram, and drop it there."""
        own = report.facts.pop("histogram", None)
        if own is not None and report.id in self.lacks:
            self.lacks.remove(report.id)
            self.counts += own
            self.raised += report.facts["raised"]

    def normalisation(self) -> dict:
        """dataset.json["normalisation"]. Raises: InputError where all voxels are the same."""
        if not self.ids:
            return self.rule
        if self.window is None:
            assert not self.lacks
            low, high = (percentile_of(self.counts, q) for q in CORPUS_PERCENTILES)
            self.window = {
                "low": low,
                "high": high,
                "voxels": int(self.counts.sum()),
                "raised": self.raised,
            }
        low, high = self.window["low"], self.window["high"]
        if high <= low:
            raise InputError(f"{self.file.parent}: percentiles 0.5 and 99.5 of all voxels are both {low:g}, expected "
                             "a range; check the images")  # fmt: skip
        return {**self.rule, "low": low, "high": high}

    def save(self) -> None:
        if self.window:
            atomic_write(self.file, json.dumps({"key": self.key, **self.window}).encode())


def corpus_of(source: Source, splits: dict[str, list[str]], dst: Path) -> Corpus:
    """What the window is made from: the unlabelled cases of pre-training, or, where there are none, train.

    It also adds the split `pretrain`. Nothing is counted for MR with --norm case.
    """
    assert source.slices
    splits["pretrain"] = list(source.pretrain) or splits["unlabelled"] + splits["train"]
    ids = set(splits["pretrain"]) & set(splits["unlabelled"]) or set(splits["train"])
    low, high = CORPUS_PERCENTILES
    rule: dict[str, Any] = {"kind": "percentile-slices", "lower": low, "upper": high}
    if source.ct[0]:
        rule = {"kind": "hu", "percentiles": [low, high], "fov_pad": source.slices["fov_pad"]}
    elif source.slices["norm"] == "case":
        ids = set()
    files = [file_facts(case) for case in source.cases if case.id in ids]
    key = hashlib.sha256(json.dumps([rule, files]).encode()).hexdigest()
    file = dst / "window.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        window = (
            {name: saved[name] for name in ("low", "high", "voxels", "raised")}
            if saved["key"] == key
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        window = None
    return Corpus(rule, ids, file, key, window)


def target_spacing(
    shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]]
) -> list[float]:
    """nnU-Net's rule, mm, RAS order: the median of each axis over the cases; of one that is much coarser, less.

    Where the largest median is more than 3 times the next, and that axis has less than a third of the voxels of the
    others (medians), its 10th percentile is taken, but not less than the next.
    """
    target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(target.argmax())
    others = [axis for axis in range(3) if axis != worst]
    if target[worst] > 3 * target[others].max() and size[worst] * 3 < size[others].min():
        target[worst] = max(np.percentile(np.array(spacings)[:, worst], 10), target[others].max())
    return [round(float(s), 6) for s in target]


def slice_spacing(
    source: Source, reports: dict[str, Report], done: dict[str, dict]
) -> dict[str, list[float] | None]:
    """Spacing of the labelled and of the other cases, by --spacing; None: each keeps its own."""
    assert source.slices
    wanted, out = source.slices["spacing"], {}
    for part, labelled in (("labelled", True), ("unlabelled", False)):
        cases = [case.id for case in source.cases if (case.label is not None) == labelled]
        found = [
            (reports[c].facts if c in reports else done[c]["facts"])["original"] for c in cases
        ]
        out[part] = None if wanted == "native" or not cases else wanted
        if wanted == "rule" and cases:
            shapes, spacings = zip(*map(_ras_geometry, found))
            out[part] = target_spacing(shapes, spacings)
    return out


def _ras_geometry(original: dict) -> tuple[list[int], list[float]]:
    """Shape and spacing of a file, in RAS order."""
    order = [
        next(i for i, way in enumerate(original["orientation"]) if way in ends)
        for ends in ("LR", "PA", "IS")
    ]
    return [original["shape"][i] for i in order], [original["spacing_mm"][i] for i in order]


def slice_case(
    source: Source, case: Case, recipe: dict, report: Report
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """As volume_case: image [1, side, side, Z] as loaders.slices_of gives it, label [side, side, Z], Fortran order."""
    loaded = load_case(source, case, recipe["allow_affine_mismatch"], report)
    if loaded is None:
        return None
    image, labels, first = loaded
    volume, native, _ = to_ras(image[0], first.affine)
    spacing = recipe["spacing"]["labelled" if case.label else "unlabelled"]
    grid = SliceGrid(volume.shape, native, recipe["slices"]["side"], spacing)
    with noting(report):
        stored = slices_of(volume, grid, recipe["normalisation"], case.images[0])
    arrays = {"image": np.asfortranarray(stored[None])}
    if labels is not None:
        labels = grid.label(to_ras(labels, first.affine)[0])
        arrays["label"] = np.asfortranarray(labels)
    return arrays, volume_facts(source, stored.shape, grid.affine, labels, first)


def slice_entries(source: Source, recipe: dict) -> dict[str, Any]:
    """More of dataset.json; spacing: what `predict` respaces to, so that of the labelled cases where there are any."""
    spacing = recipe["spacing"]
    return {
        "slices": {"side": recipe["slices"]["side"]},
        "spacing": spacing[
            "labelled" if any(case.label for case in source.cases) else "unlabelled"
        ],
        **({"published_slices": source.published_slices} if source.published_slices else {}),
    }


def slice_statistics(recipe: dict, splits: dict, records: dict, corpus: Corpus) -> dict[str, Any]:
    """More of the statistics: slices of each split, the spacing asked for, and what the window was made from."""
    slices = {
        split: sum(records[case]["shape"][2] for case in ids) for split, ids in splits.items()
    }
    out: dict[str, Any] = {"slices": slices, "target_spacing_mm": recipe["spacing"]}
    if corpus.window:
        out |= {
            "window_cases": len(corpus.ids),
            "voxels": corpus.window["voxels"],
            "raised": corpus.window["raised"],
        }
    return out


def slices_text(meta: dict) -> list[str]:
    """Lines of the manifest: slices of each split beside the paper's, their distance, the window and its voxels."""
    if "slices" not in meta:
        return []
    s, published = meta["statistics"], meta.get("published_slices", {})
    beside = {split: f" (paper {n:,})" for split, n in published.items()}
    parts = [f"{split} {n:,}{beside.get(split, '')}" for split, n in s["slices"].items()]
    targets = [f"{part} {v[2]:g} mm" for part, v in s["target_spacing_mm"].items() if v]
    lines = [
        f"  slices       {', '.join(parts)}",
        f"  distance     {', '.join(targets) or 'of each file'}",
    ]
    rule = meta["normalisation"]
    if "voxels" in s:
        unit = " HU" if rule["kind"] == "hu" else ""
        what = f"{rule['low']:g} to {rule['high']:g}{unit}, percentiles 0.5 and 99.5 of {s['voxels']:,} voxels"
        raised = (
            f"; {s['raised']:,} of them raised to {FOV_FLOOR}"
            if rule.get("fov_pad") == "raise"
            else ""
        )
        lines.append(f"  window       {what} of {s['window_cases']} cases{raised}")
    return lines


# --- many cases ------------------------------------------------------------------------------------------------------


def _start_worker(parent: int) -> None:
    """End when the parent is gone: a killed parent says no goodbye."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def over_cases(
    function: Callable, jobs: list[tuple], workers: int, title: str, quiet: bool
) -> Iterator[Report]:
    """Call function(*job) for each job, in this process or in `workers`, with a progress bar; yields in any order."""
    with tqdm(total=len(jobs), desc=title, unit="case", file=sys.stderr, disable=quiet) as bar:
        if workers <= 1:
            for job in jobs:
                yield function(*job)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")  # fork beside tqdm's thread can hang
        pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
        try:
            waiting: set[Future] = set()
            queue = iter(jobs)
            while True:
                # a short queue, so that a stop does not wait for many cases; the range comes first in zip, which
                # would else take a job and drop it
                with _sigint_blocked():
                    waiting |= {
                        pool.submit(function, *job)
                        for _, job in zip(range(2 * workers - len(waiting)), queue)
                    }
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    bar.update()
        except BrokenProcessPool as e:
            raise InputError(
                "a worker process was killed (out of memory?); run again with fewer --workers"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Workers started in here inherit the blocked signal: Ctrl-C reaches all processes, and the parent answers it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def normalisation_of(
    source: Source, train: list[str], facts: dict[str, dict], notes: list[str]
) -> dict:
    """The rule for each channel: the source's own; else percentiles of each volume (MR), or one window for all (CT).

    The window is the 0.5th and 99.5th percentile of the labelled foreground of the training cases; each case counts
    the same, by 1001 quantiles of its own. Where these meet (a binary CT), it is the range of all their voxels.
    facts: of the first pass, by case.
    """
    rules: list[dict] = [dict(rule) for rule in source.rules or ()]
    if rules:
        return {"channels": rules}
    labelled = [facts[case] for case in train if facts.get(case, {}).get("quantiles")]
    for channel, ct in enumerate(source.ct):
        if not ct:
            rules.append(dict(PERCENTILES))
            continue
        if not labelled:
            raise InputError(
                f"{source.name}: no training case has a labelled voxel, expected some for the CT window; add labels"
            )
        pooled = np.concatenate([case["quantiles"][channel] for case in labelled])
        low, high = (round(float(p), 3) for p in np.percentile(pooled, [0.5, 99.5]))
        if low >= high:
            ranges = np.array([case["ranges"][channel] for case in labelled])
            text = (
                f"{source.name}: the labelled voxels of {source.channels[channel]} are all {low:g}"
            )
            low, high = float(ranges[:, 0].min()), float(ranges[:, 1].max())
            if low >= high:
                raise InputError(f"{text}, as all other voxels; check the images")
            notes.append(f"{text}; the window is the range of all voxels, {low:g} to {high:g}")
        rules.append({"kind": "window", "low": low, "high": high})
    return {"channels": rules}


def statistics_of(cases: dict[str, dict], classes: dict[str, int]) -> dict:
    """Sizes, spacing and label histogram over all prepared cases."""
    shapes = np.array([facts["shape"] for facts in cases.values()])
    spacings = np.array([facts["spacing_mm"] for facts in cases.values() if "spacing_mm" in facts])
    labelled = [facts["label_voxels"] for facts in cases.values() if facts["labelled"]]
    counts = np.sum(labelled, axis=0) if labelled else np.zeros(max(classes.values()) + 1, int)
    present = np.sum(np.array(labelled) > 0, axis=0) if labelled else np.zeros_like(counts)
    names = {0: "background"} | {value: name for name, value in classes.items()}
    return {
        "shape_min": shapes.min(axis=0).tolist(),
        "shape_median": np.median(shapes, axis=0).tolist(),
        "shape_max": shapes.max(axis=0).tolist(),
        **(
            {
                "spacing_min_mm": spacings.min(axis=0).tolist(),
                "spacing_median_mm": np.median(spacings, axis=0).tolist(),
                "spacing_max_mm": spacings.max(axis=0).tolist(),
            }
            if len(spacings)
            else {}
        ),
        "label_voxels": {names[value]: int(n) for value, n in enumerate(counts)},
        "label_cases": {names[value]: int(n) for value, n in enumerate(present)},
    }


def counts_of(source: Source) -> dict[str, dict[str, int]]:
    """The entry `counts` of dataset.json."""
    return {
        name: {"found": found, "published": published}
        for name, (found, published) in source.counts.items()
    }


def counts_text(counts: dict[str, dict[str, int]]) -> list[str]:
    """A line of the manifest: what is here beside what was published."""
    parts = [f"{name} {n['found']} of {n['published']}" for name, n in counts.items()]
    return [f"  published    {', '.join(parts)}"] if parts else []


def crop_text(meta: dict) -> list[str]:
    """A line of the manifest: how many cases were cut, and what of their labels that cost."""
    if "crop" not in meta:
        return []
    crop, cases = meta["crop"], meta["cases"].values()
    size = " x ".join(map(str, crop["size"]))
    if crop["kind"] == "none":
        return [f"  crop         none; {size} would be the published window"]
    cut_cases = [c for c in cases if c["crop"]["shape"] != c["shape"]]
    lost = [n for c in cut_cases if (n := c["crop"]["label_voxels_outside"])]
    what = f"{len(cut_cases)} cases were larger, {sum(lost):,} labelled voxels of {len(lost)} cases lie outside"
    return [f"  crop         {crop['kind']}, {size}: {what}"]


def objects_text(meta: dict) -> list[str]:
    """A line of the manifest: how many objects each split has, where the set tells them apart."""
    parts = []
    for split, ids in (
        meta["splits"].items() if len(meta["splits"]) <= MANY else [("all", meta["cases"])]
    ):
        numbers = [n for case in ids if (n := meta["cases"][case].get("objects")) is not None]
        parts += [f"{split} {sum(numbers):,} in {len(numbers)} images"] if numbers else []
    return [f"  objects      {', '.join(parts)}"] if parts else []


def manifest(meta: dict, root: Path) -> str:
    """The lines printed at the end of a preparation."""
    s, cases = meta["statistics"], meta["cases"]
    splits = ", ".join(f"{len(ids)} {name}" for name, ids in meta["splits"].items())
    if len(meta["splits"]) > MANY:
        splits = f"{sum(map(bool, meta['splits'].values()))} splits"
    size = sum(f.stat().st_size for f in (root / "cases").rglob("*.npy"))
    total = max(1, sum(s["label_voxels"].values()))

    def row(values: list[float]) -> str:
        return " x ".join(f"{v:g}" for v in values)

    flat = meta["orientation"] == "YX"
    lines = [
        f"{meta['name']}: {len(cases)} cases ({splits}), {size / 1e6:.1f} MB in {root}",
        f"  channels     {', '.join(meta['channels'])}",
        f"  shape        min {row(s['shape_min'])}, median {row(s['shape_median'])}, max {row(s['shape_max'])}",
    ]
    if not flat:
        orientations = sorted({facts["original"]["orientation"] for facts in cases.values()})
        lines += [
            f"  spacing mm   min {row(s['spacing_min_mm'])}, median {row(s['spacing_median_mm'])}, "
            f"max {row(s['spacing_max_mm'])}",
            f"  orientation  {', '.join(orientations)} -> {meta['orientation']}",
        ]
    lines += [
        *objects_text(meta),
        *crop_text(meta),
        *counts_text(meta.get("counts", {})),
        *slices_text(meta),
    ]
    for name, value in [("background", 0), *meta["classes"].items()]:
        n = s["label_voxels"][name]
        published = meta["label_values"][str(value)]
        lines.append(
            f"  label {value} (published {published}) {name}: {n:,} {'pixels' if flat else 'voxels'}, "
            f"{100 * n / total:.2f} %, in {s['label_cases'][name]} cases"
        )
    return "\n".join(lines)


# --- the run ---------------------------------------------------------------------------------------------------------


class Faults(InputError):
    """More than one fault, each a line of its own."""

    def __init__(self, faults: list[str], closing: str):
        super().__init__(closing)
        self.faults = faults


def check_all(
    source: Source, todo: list[Case], options: argparse.Namespace, corpus: "Corpus | None" = None
) -> dict[str, Report]:
    """Read every file of the cases; returns a report for each. Raises: InputError, Faults with all that was found.

    corpus: takes the histograms out of the reports as they come in, so that they do not pile up.
    """
    lean = replace(source, cases=())  # travels with each job
    jobs = [(lean, case, options.allow_affine_mismatch) for case in todo]
    reports = {}
    for report in over_cases(check_case, jobs, options.workers, "check", options.quiet):
        if corpus:
            corpus.take(report)
        reports[report.id] = report
    faults = list(source.faults) + [fault for case in todo for fault in reports[case.id].faults]
    bad = sum(bool(r.faults) for r in reports.values())
    if len(faults) == 1:
        raise InputError(f"{faults[0]}; nothing was written")
    if faults:
        raise Faults(
            faults,
            f"{len(faults)} faults, in {bad} cases and the list; correct them; nothing was written",
        )
    return reports


def setup_of(source: Source, options: argparse.Namespace, tool: str) -> dict:
    """What must be the same for a run to continue another one's folder."""
    return {
        "format": FORMAT,
        "tool": tool,
        "source": str(Path(options.src).resolve()),
        "channels": list(source.channels),
        "label_map": {str(k): v for k, v in source.label_map.items()},
        "spacing": list(options.spacing) if options.spacing and not source.slices else None,
        "allow_affine_mismatch": options.allow_affine_mismatch,
        **({"crop": source.crop} if source.crop else {}),
        **({"settings": source.settings} if source.settings else {}),
        **({"slices": source.slices} if source.slices else {}),
        **(
            {"unlabelled": str(Path(more).resolve())}
            if (more := getattr(options, "unlabelled", None))
            else {}
        ),
    }


def check_destination(dst: Path, setup: dict, splits: dict[str, list[str]]) -> None:
    """Raise InputError where dst holds something other than an earlier run of the same set-up.

    Or where a case would go to another split: what was trained on it would be tested on it.
    """
    if not dst.exists() or (dst.is_dir() and all(file.name[0] == "." for file in dst.iterdir())):
        return
    try:
        earlier = dict(json.loads((dst / "prepare.json").read_text(encoding="utf-8")))
        before = earlier.pop("splits", None)
        if before is None:  # an earlier version wrote neither
            setup = {key: value for key, value in setup.items() if key != "unlabelled"}
            before = (
                json.loads((dst / "dataset.json").read_text(encoding="utf-8"))["splits"]
                if (dst / "dataset.json").exists()
                else {}
            )
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(
            f"{dst}: holds other files, expected an empty or new folder; choose another --dst"
        ) from None
    for key in {**earlier, **setup}:
        was, now = earlier.get(key), setup.get(key)
        if was != now:
            raise InputError(
                f"{dst}: was prepared with {key} {was}, now {now}; remove it or choose another --dst"
            )
    old, new = (
        {c: part for part, ids in s.items() if part != "pretrain" for c in ids}
        for s in (before, splits)
    )
    if moved := [case for case in old if case in new and old[case] != new[case]]:
        case = moved[0]
        raise InputError(f"{dst}: {len(moved)} cases would go to another split, such as {case} from {old[case]} to "
                         f"{new[case]}; networks would be tested on what they learnt; use another --dst")  # fmt: skip


def lock_folder(folder: Path) -> int | None:
    """A handle that keeps `folder` to this process until it is closed or the process ends; None: another one has it.

    On one machine only; where there are no locks (Windows, some network drives) all are let in.
    """
    try:
        import fcntl
    except ImportError:
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        pass
    return handle


@contextlib.contextmanager
def alone_in(dst: Path) -> Iterator[None]:
    """InputError where another run is writing to dst. The system ends the lock with the process, however that ends."""
    dst.mkdir(parents=True, exist_ok=True)
    handle = lock_folder(dst)
    if handle is None:
        raise InputError(
            f"{dst}: another run is preparing it; wait for it, or choose another --dst"
        )
    try:
        yield
    finally:
        os.close(handle)


def make_splits(
    ids: Iterable[Any], seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> dict[str, list[Any]]:
    """Sorted ids, shuffled by numpy's RandomState(seed): first train, then val, the rest test.

    At least one case each from three cases on; two give train and val, one gives train.
    """
    order = sorted(ids)
    n = len(order)
    np.random.RandomState(seed).shuffle(order)  # the generator of the published splits
    val = min(max(1, round(n * fractions[1])), max(n - 1, 0))
    train = min(max(1, round(n * fractions[0])), max(n - val - 1, min(n, 1)))
    return {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}


def splits_of(source: Source, sizes: tuple[int, ...] | None) -> dict[str, list[str]]:
    """Labelled cases of train, val and test: the source's own splits, or their shuffled order cut by --split-sizes."""
    splits = dict(source.splits or make_splits(case.id for case in source.cases if case.label))
    if not sizes:
        return splits
    order = [case for part in ("train", "val", "test") for case in splits[part]]
    if sum(sizes) != len(order):
        text = ",".join(map(str, sizes))
        raise InputError(
            f"--split-sizes {text} are {sum(sizes)} cases, {len(order)} have a label; make the sums equal"
        )
    ends = np.cumsum(sizes).tolist()
    for end in ends:
        if 0 < end < len(order) and source.patient(order[end - 1]) == source.patient(order[end]):
            raise InputError(
                f"--split-sizes divides {order[end - 1]} from {order[end]}, the same patient; change by one"
            )
    return {
        part: order[end - n : end] for part, n, end in zip(("train", "val", "test"), sizes, ends)
    }


def prepare(source: Source, options: argparse.Namespace, tool: str) -> str:
    """Check all, prepare what is not yet there, write dataset.json last. Returns the manifest."""
    dst, setup = Path(options.dst), setup_of(source, options, tool)
    # where cases are at fault, or only checked, their number may be another: faults come first
    splits = splits_of(source, None if source.faults or options.check else options.split_sizes)
    splits["unlabelled"] = sorted(
        (case.id for case in source.cases if not case.label), key=natural_key
    )
    if not options.check:
        check_destination(dst, setup, splits if not source.faults else {})
    folder = dst / "cases"
    done = {} if options.check else {c.id: r for c in source.cases if (r := finished(c, folder))}
    corpus = corpus_of(source, splits, dst) if source.slices else None
    reports = check_all(source, [c for c in source.cases if c.id not in done], options, corpus)
    printed = list(source.notes)
    for lines in [r.notes for r in reports.values()] + [r["notes"] for r in done.values()]:
        printed += lines
    print_notes(tool, printed)
    if options.check:
        done_text = f"{tool}: {len(reports)} cases checked, no faults; nothing was written"
        return "\n".join([done_text, *counts_text(counts_of(source))])

    # finished cases are read again where a window is made from all of them
    fitted = set(splits["train"]) if source.fits_window else corpus.lacks if corpus else set()
    if fitted & done.keys():
        reports |= check_all(
            source, [c for c in source.cases if c.id in done and c.id in fitted], options, corpus
        )
    if corpus:
        normalisation, spacing = corpus.normalisation(), slice_spacing(source, reports, done)
    else:
        facts = {report.id: report.facts for report in reports.values()}
        of_window: list[str] = []
        normalisation = normalisation_of(source, splits.get("train", []), facts, of_window)
        print_notes(tool, of_window)
        spacing = setup["spacing"]
    recipe = {
        "normalisation": normalisation,
        "spacing": spacing,
        "allow_affine_mismatch": options.allow_affine_mismatch,
        "label_map": setup["label_map"],
        **({"crop": source.crop} if source.crop else {}),
        **({"settings": source.settings} if source.settings else {}),
        **({"slices": source.slices} if source.slices else {}),
    }
    records = {case: record["facts"] for case, record in done.items() if record["recipe"] == recipe}
    todo = [case for case in source.cases if case.id not in records]
    if records:
        print(
            f"{tool}: {len(records)} cases are there from an earlier run, {len(todo)} to do",
            file=sys.stderr,
        )
    with alone_in(dst):
        check_destination(dst, setup, splits)  # another run may have ended since it was looked at
        if todo:
            (dst / "dataset.json").unlink(
                missing_ok=True
            )  # it would describe cases that are about to change
        atomic_write(
            dst / "prepare.json", json.dumps({**setup, "splits": splits}, indent=1).encode()
        )
        if corpus:
            corpus.save()
        new_notes: list[str] = []
        jobs = [(replace(source, cases=()), case, recipe, folder) for case in todo]
        for report in over_cases(prepare_case, jobs, options.workers, "prepare", options.quiet):
            if report.faults:
                raise Faults(
                    report.faults, f"{report.id} could be read before: has it changed? run again"
                )
            records[report.id] = report.facts
            new_notes += [note for note in report.notes if note not in printed]
        print_notes(tool, new_notes)
        return _finish(source, dst, setup, recipe, splits, records, corpus)


def print_notes(tool: str, notes: list[str]) -> None:
    """One line each, on stderr; the same note once."""
    for note in dict.fromkeys(notes):
        print(f"{tool}: note: {note}", file=sys.stderr)


def _finish(
    source: Source,
    dst: Path,
    setup: dict,
    recipe: dict,
    splits: dict,
    records: dict,
    corpus: "Corpus | None",
) -> str:
    """Write dataset.json, after which the folder counts as prepared. Returns the manifest."""
    records = {
        case.id: records[case.id] for case in source.cases
    }  # the same bytes whatever the order of work
    shapes = {tuple(facts["shape"]) for facts in records.values()}
    grid = source.grids.get(min(shapes)) if len(shapes) == 1 else None
    if source.crop and source.crop["kind"] != "none":
        grid = source.crop["size"]
    meta = {
        "format": FORMAT,
        "name": source.name,
        "source": setup["source"],
        "channels": list(source.channels),
        "classes": source.classes,
        "label_values": {str(k): v for k, v in source.label_values.items()},
        "spacing": setup["spacing"],
        **(slice_entries(source, recipe) if source.slices else {}),
        **({"grid": list(grid)} if grid else {}),
        **({"allow_affine_mismatch": True} if setup["allow_affine_mismatch"] else {}),
        **({"crop": source.crop} if source.crop else {}),
        "orientation": "YX" if source.read else "RAS",
        "normalisation": recipe["normalisation"],
        "statistics": {
            **statistics_of(records, source.classes),
            **(slice_statistics(recipe, splits, records, corpus) if corpus else {}),
        },
        **({"counts": counts_of(source)} if source.counts else {}),
        **({"settings": source.settings} if source.settings else {}),
        **source.entries,
        "splits": splits,
        "cases": records,
    }
    text = manifest(meta, dst)
    meta["manifest"] = text.splitlines()[1:]
    atomic_write(dst / "dataset.json", json.dumps(meta, indent=1).encode())
    return text


class Parser(argparse.ArgumentParser):
    """An unknown flag is an InputError, so that it is one line and exit code 2 like every other."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see --help")


def parse_spacing(text: str) -> tuple[float, ...]:
    """`1,1,2.5` in mm, or one number for all axes."""
    numbers = [float(part) for part in text.split(",")]
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    if len(numbers) != 3 or not all(0.01 <= n <= 100 for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one or three numbers of 0.01 to 100 mm, such as 1,1,2.5"
        )
    return tuple(numbers)


def parse_sizes(text: str) -> tuple[int, ...]:
    """`9,0,4`: cases of train, val and test."""
    numbers = text.split(",")
    if len(numbers) != 3 or not all(n.isdigit() for n in numbers) or int(numbers[0]) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not three counts of train, val and test cases, such as 9,0,4"
        )
    return tuple(map(int, numbers))


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def add_window_flags(parser: Parser, spacing: tuple[float, ...]) -> None:
    """The flags of a set whose publisher or paper gives a spacing, a window and counts."""
    parser.set_defaults(spacing=spacing)
    parser.add_argument(
        "--crop",
        choices=("label", "centre", "none"),
        default="label",
        help="longer axes are cut, see above",
    )
    parser.add_argument(
        "--subset",
        action="store_true",
        help="accept fewer cases than published; absent ones are left out",
    )


def add_slice_flags(parser: Parser, norm: bool = True) -> None:
    """The flags of sets that become slices; norm: where they may be MR."""
    parser.add_argument(
        "--side", type=parse_side, metavar="N", help="pixels of a slice's side (default 256)"
    )
    parser.add_argument(
        "--spacing",
        type=parse_slice_spacing,
        metavar="rule|native|X,Y,Z",
        help="mm, RAS order; of slices only Z counts, each is resized to N x N whatever its field of view (default "
        "rule: nnU-Net's, for labelled and other cases by themselves); native keeps the slices",
    )
    parser.add_argument(
        "--fov-pad",
        choices=("raise", "keep"),
        help="CT below -1024 HU is what a scanner writes outside its field of view: raised to -1024 (default), or kept",
    )
    if norm:
        parser.add_argument(
            "--norm",
            choices=("case", "corpus"),
            help="MR: percentiles of each case (default), or the same for all",
        )


def parse_side(text: str) -> int:
    """Pixels: networks halve a slice up to five times."""
    if not text.isdigit() or int(text) % 32 or not 32 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32 from 32 to 1024")
    return int(text)


def parse_slice_spacing(text: str) -> str | tuple[float, ...]:
    """rule, native, or mm."""
    return text if text in ("rule", "native") else parse_spacing(text)


def window_of(
    spacing: Sequence[float], published: Sequence[float], size: Sequence[int]
) -> list[int]:
    """`size` voxels of the published spacing, in voxels of another: the nearest multiple of 16, at least 16."""
    return [
        max(16, 16 * round(n * old / new / 16)) for n, old, new in zip(size, published, spacing)
    ]


def add_volume_flags(p: Parser) -> None:
    """The flags that make no sense for 2D images."""
    p.add_argument(
        "--spacing", type=parse_spacing, metavar="X,Y,Z", help="resample to this, mm, RAS order"
    )
    p.add_argument(
        "--split-sizes",
        type=parse_sizes,
        metavar="N,N,N",
        help="cases of train, val, test (default: 80/10/10 %%)",
    )
    p.add_argument(
        "--allow-affine-mismatch",
        action="store_true",
        help="where shapes agree and affines do not, use the first image's affine for all files of the case",
    )


def parser_of(tool: str, description: str, layouts: tuple[str, ...], flat: bool = False) -> Parser:
    """The flags that all preparations have; flat: without those that only volumes need."""
    p = Parser(
        prog=f"python -m data_prep.{tool}",
        description=description,
        allow_abbrev=False,
        conflict_handler="resolve",  # add_slice_flags gives --spacing more values
    )
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--src", metavar="DIR", help="the publisher's folder")
    p.add_argument(
        "--dst",
        metavar="DIR",
        help="the prepared folder, data/NAME; the same command again continues",
    )
    p.add_argument(
        "--check", action="store_true", help="read all files, list all faults, write nothing"
    )
    p.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default 1)")
    p.set_defaults(spacing=None, split_sizes=None, allow_affine_mismatch=False)
    if not flat:
        add_volume_flags(p)
    p.add_argument(
        "--make-fake",
        metavar="DIR",
        help="write a tiny legal copy of the publisher's layout and stop",
    )
    if layouts:
        p.add_argument("--layout", choices=layouts, default=layouts[0], help="of --make-fake")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


def main(
    argv: list[str] | None,
    tool: str,
    description: str,
    read_source: Callable[..., Source],
    make_fake: Callable[[Path, str], None],
    layouts: tuple[str, ...] = (),
    add_flags: Callable[[Parser], None] | None = None,
    flat: bool = False,
) -> int:
    """Run a preparation from its command line; returns the exit code (0, 2, 130, 143, or 1 for a defect of ours).

    read_source(src) lists the folder; where add_flags gives the parser more flags, it is read_source(src, options).
    flat: the set is of 2D images.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _stop_signals():
            parser = parser_of(tool, description, layouts, flat)
            if add_flags:
                add_flags(parser)
            options = parser.parse_args(argv)
            if options.make_fake:
                target = Path(options.make_fake)
                if target.exists() and (not target.is_dir() or any(target.iterdir())):
                    raise InputError(
                        f"{target}: is not empty, expected a new folder; choose another"
                    )
                make_fake(target, getattr(options, "layout", ""))
                print(f"{tool}: wrote {target}")
                return 0
            if not options.src or not (options.dst or options.check):
                raise InputError(
                    "--src and --dst are needed (or --src and --check, or --make-fake); see --help"
                )
            options.dst = options.dst or ""
            source = read_source(Path(options.src), *([options] if add_flags else []))
            text = prepare(source, options, tool)
            try:
                print(text, flush=True)
            except BrokenPipeError:  # `| head`: all is prepared, only nobody reads on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    except InputError as e:
        for line in [*getattr(e, "faults", []), str(e)]:
            print(f"{tool}: {line}", file=sys.stderr)
        return 2
    except OSError as e:
        print(
            f"{tool}: {e.filename or 'a file'}: {e.strerror or e}; check path, rights and space",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as e:
        return int(e.code or 0)
    except Exception:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM leaves by an exception, as SIGINT does, so that the case in work is cleaned up. Then 143."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
