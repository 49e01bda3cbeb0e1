"""Files in, masks out: NIfTI, images, geometry, normalisation, prepared data, prediction.

Conventions, the same in the whole repository:
  axes         x, y, z as nibabel; channels first: an image is [C, X, Y, Z], a label [X, Y, Z];
               2D images as a screen shows them: [C, Y, X] and [Y, X], row 0 on top
  orientation  prepared volumes are RAS+: x grows to the patient's right, y to the front, z up
  lengths      mm; spacing is (sx, sy, sz) in the order of the array's axes
  affine       4 x 4 float64, voxel index -> mm, of voxel centres
  prepared     image float16 in [0, 1] (2D: uint8 as published), label uint8 with values 0..K (and
               `ignore` where dataset.json names one), 2D also instances int32; .npy files
  slices       a prepared kind of their own: square axial slices of volumes, see slices_of
"""

import colorsys
import contextlib
import functools
import gzip
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

from common import InputError, atomic_write, synthetic


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong with a file into an InputError, one line that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; check the path") from error
    except Exception as error:  # a damaged file may raise anything
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path}: damaged or cut off ({text}); copy it again") from error


# --- NIfTI -------------------------------------------------------------------------------------

REAL_TYPES = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)  # integers, floats of 32 and 64 bits
MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
GZIP_RATIO = 1032  # no deflate stream grows by more than this (zlib's documentation)


@dataclass(frozen=True)
class Nifti:
    """One NIfTI file in memory, its scaling (scl_slope, scl_inter) applied.

    data: [X, Y, Z] or [X, Y, Z, C], the file's axis order; integers as stored, else float32.
    spacing: mm, lengths of the affine's columns. header: nibabel's, kept for writing.
    """

    data: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, ...]
    header: Any
    path: Path


def read_nifti(path: Path | str) -> Nifti:
    """Read a .nii or .nii.gz file, told apart by content.

    Warns where the file holds no position, or two positions that are apart, or lengths in metres
    or micrometres, which become mm. Raises InputError for whatever is wrong with it.
    """
    path = Path(path)
    with reading(path), nib.imageglobals.LoggingOutputSuppressor():
        kind, content = _unpacked(path)
        image = kind.from_bytes(content)
        unit = image.header.get_xyzt_units()[0]
        affine = np.array(image.affine, np.float64)
        affine[:3] *= MILLIMETRES[unit]
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise InputError(f"affine {matrix_text(affine)} cannot be inverted; repair the header")
        with np.errstate(over="ignore"):
            data = np.asanyarray(image.dataobj).reshape(_axes(image.header))
            native = (
                np.dtype(np.float32) if data.dtype.kind == "f" else data.dtype.newbyteorder("=")
            )
            data = data.astype(native, copy=False)
        bad = data.size - np.count_nonzero(np.isfinite(data))
        if bad:
            raise InputError(f"{bad:,} voxels are NaN or Inf (as float32); replace them")
    if unit in ("meter", "micron"):
        warnings.warn(f"{path}: lengths are in {unit}, converted to mm", stacklevel=2)
    _warn_of_position(image, path)
    spacing = tuple(float(s) for s in nib.affines.voxel_sizes(affine))
    return Nifti(data, affine, spacing, image.header, path)


def _unpacked(path: Path) -> tuple[Any, bytes]:
    """Return nibabel's class for the file and its bytes, unpacked.

    A header that promises more than the file can hold is refused before memory is taken. The
    stream is read to its end, where gzip has its checksum.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        start = stream.read(540)
        if not start:
            raise InputError("the file is empty, expected a NIfTI volume; copy it again")
        if start.lstrip()[:1] == b"<":
            raise InputError("holds an HTML or XML page, not a volume (a failed download?)")
        second = start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # 540, the length of the header
        kind = nib.Nifti2Image if second else nib.Nifti1Image
        header = kind.header_class(start[: kind.header_class.sizeof_hdr])
        shape = _axes(header)
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise InputError(f"the volume is {len(shape)}D, {by(shape)}, expected 3D; convert it")
        if int(header["datatype"]) not in REAL_TYPES:
            numbers = header.get_value_label("datatype")
            raise InputError(f"voxels are {numbers}, expected integers or floats; convert it")
        voxels = int(np.prod(shape, dtype=object))
        promised = int(header["vox_offset"]) + voxels * header.get_data_dtype().itemsize
        content = b""
        if promised <= size * (GZIP_RATIO if packed else 1):
            stream.seek(0)
            content = stream.read(promised)
            while stream.read(1 << 22):
                pass
    if len(content) < promised:
        claim = f"the header promises {by(shape)} voxels ({promised:,} bytes)"
        raise InputError(f"{claim}, the file holds fewer; it is cut off or damaged, copy it again")
    return kind, content


def _axes(header: Any) -> list[int]:
    """Return the shape, without axes of length 1 after the third."""
    shape = [int(n) for n in header.get_data_shape()]
    return shape[:3] + [n for n in shape[3:] if n > 1]


def _warn_of_position(image: Any, path: Path) -> None:
    """Warn where sform and qform are both absent, or place a corner over half a voxel apart."""
    sform = image.header.get_sform(coded=True)[0]
    qform = None
    with contextlib.suppress(Exception):  # the sform is used, whatever the qform holds
        qform = image.header.get_qform(coded=True)[0]
    if sform is None and qform is None:
        text = "sform and qform code are 0: the file does not say where left and right are"
        warnings.warn(f"{path}: {text}; taken from the voxel sizes, as nibabel does", stacklevel=3)
    if sform is None or qform is None:
        return
    offset = sform - qform  # [4, 4]
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(image.shape[:3]) - 1)  # [8, 3]
    apart = float(np.abs(corners @ offset[:3, :3].T + offset[:3, 3]).max())
    if apart > nib.affines.voxel_sizes(sform).min() / 2:
        text = f"sform and qform place a corner {apart:.1f} mm apart; the sform is used"
        warnings.warn(f"{path}: {text} (other programs use the qform)", stacklevel=3)


def write_nifti(path: Path | str, array: np.ndarray, like: Nifti, dtype: Any) -> None:
    """Write [X, Y, Z] on the grid of `like`: the same matrices and codes, no scaling.

    The file appears complete or not at all; a name ending in .gz is compressed.
    """
    if array.shape != like.data.shape[:3]:
        raise ValueError(f"array {array.shape} is not on the grid {like.data.shape} of {like.path}")
    header = like.header.copy()
    header.extensions.clear()
    header.set_data_dtype(dtype)
    for field in ("cal_min", "cal_max", "intent_code"):
        header[field] = 0  # the input's display range would hide a mask
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    _write_image(path, kind(np.asarray(array, dtype), None, header))


def write_on_grid(path: Path | str, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a mask or map [X, Y, Z] of a prepared case as NIfTI; affine: the case's."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    _write_image(path, image)


def _write_image(path: Path | str, image: Any) -> None:
    content = image.to_bytes()
    if str(path).lower().endswith(".gz"):
        content = gzip.compress(content, 6, mtime=0)  # the same bytes for the same input
    atomic_write(path, content)


def as_volume(file: Nifti) -> np.ndarray:
    """Return [X, Y, Z]. Raises InputError for a 4D file."""
    if file.data.ndim != 3:
        text = f"the volume is 4D, {by(file.data.shape)}, expected one 3D volume"
        raise InputError(f"{file.path}: {text}; give one file for each")
    return file.data


def stack_channels(
    files: Sequence[Nifti], channels: Sequence[str], allow_affine_mismatch: bool = False
) -> np.ndarray:
    """Return [C, X, Y, Z] from one file for each channel, or from one 4D file.

    Raises InputError for another number of channels, and for channels on different grids.
    """
    if len(files) == 1:
        data = files[0].data
        image = np.moveaxis(data.reshape(*data.shape[:3], -1), 3, 0)
    else:
        for file in files[1:]:
            check_same_grid(files[0], file, allow_affine_mismatch=allow_affine_mismatch)
        image = np.stack([as_volume(file) for file in files])
    if len(image) != len(channels):
        expected = f"expected {len(channels)} ({', '.join(channels)})"
        raise InputError(f"{files[0].path}: {len(image)} channels, {expected}; give exactly these")
    return image


# --- images ------------------------------------------------------------------------------------

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # no other decoder sees a user's file


def read_image(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """Read a PNG, JPEG, BMP or TIFF, told by content -> uint8 [C, Y, X], C = 1 (grey) or 3 (RGB).

    content: the file's bytes, where `path` only names it (in an archive). Alpha is dropped, a
    palette becomes its colours, a rotation in a camera's tags is not applied. Raises InputError.
    """
    with reading(path):
        image = _decoded(path, content, deep=False)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise InputError(f"colours are {image.mode}, expected 8-bit grey or RGB; convert it")
        if image.mode in ("1", "L", "LA"):
            return np.array(image.convert("L"))[None]  # [1, Y, X]
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def read_mask(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """Read a mask of object numbers or classes -> int32 [Y, X], 0 = background.

    Grey of 1, 8 or 16 bits counts as stored, a palette by its indices, RGB only where it is grey.
    Raises InputError; also for JPEG, which changes numbers, and for a palette whose index 0 is not
    black: its indices number colours, not objects.
    """
    with reading(path):
        image = _decoded(path, content, deep=True)
        array = np.asarray(image)
        if image.format == "JPEG":
            raise InputError("a mask in JPEG, whose loss changes the numbers; get it as PNG or BMP")
        if image.mode == "P" and (image.getpalette("RGB") or [0])[:3] != [0, 0, 0]:
            raise InputError(
                "a palette whose index 0 is not black, the background; save it as grey"
            )
        if image.mode not in ("1", "L", "P", "I;16", "I;16B", "I;16L", "I", "RGB", "RGBA"):
            raise InputError(f"a mask of kind {image.mode}, expected 8 or 16-bit grey; convert it")
        if array.ndim == 3 and (array[..., :3] != array[..., :1]).any():
            raise InputError("a mask in colours, expected grey values; convert it")
        if array.min(initial=0) < 0:
            raise InputError(f"a mask with the value {array.min()}, expected 0 or more")
        return np.ascontiguousarray(array.reshape(*array.shape[:2], -1)[..., 0], np.int32)


def _decoded(path: Path | str, content: bytes | None, deep: bool) -> Image.Image:
    """Return a Pillow image, decoded to its end. deep: 16 bits are allowed."""
    content = Path(path).read_bytes() if content is None else content
    if not content:
        raise InputError("the file is empty, expected an image; copy it again")
    if content.lstrip()[:1] == b"<":
        raise InputError("holds an HTML or XML page, not an image (a failed download?)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of damaged tags; damaged pixels raise
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)  # the header only
        stored = str(image.tile[0][3]) if image.tile else ""  # decoding forgets it
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise InputError("holds several pages, expected one image; save them one by one")
        # Pillow cuts colours of 16 bits to 8 without a word.
        wide = image.mode.startswith(("I", "F")) or ";16" in stored
        if wide and not (deep and image.mode.startswith("I")):
            raise InputError("more than 8 bits a channel; convert it and mind the range")
        image.load()
    return image


def write_png(path: Path | str, array: np.ndarray, palette: Sequence[int] = ()) -> None:
    """Write uint8 [Y, X] or [Y, X, 3], or uint16 [Y, X], as PNG; palette: r, g, b of each index."""
    image = Image.fromarray(np.ascontiguousarray(array))
    if palette:
        image.putpalette(palette)  # a grey image becomes one of indices
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())


def write_png_mask(path: Path | str, mask: np.ndarray, values: Sequence[int]) -> None:
    """Write [Y, X] with the published `values`, background first, so that every viewer shows it.

    One class: 0 and 255. Several: a palette, the index being the value, one colour a class.
    """
    if len(values) == 2:
        write_png(path, np.where(mask == values[1], 255, 0).astype(np.uint8))
        return
    palette = np.zeros((256, 3), int)
    for number, value in enumerate(values[1:]):
        colour = colorsys.hsv_to_rgb(0.618 * number % 1, 0.75, 0.95)
        palette[value % 256] = np.rint(255 * np.array(colour))
    write_png(path, mask, palette.ravel().tolist() if max(values) < 256 else ())


# --- geometry ----------------------------------------------------------------------------------

Orientation = tuple[tuple[int, bool], ...]  # a file's axis -> (place in RAS order, flipped)


def matrix_text(affine: np.ndarray) -> str:
    """Return the first three rows of an affine on one line."""
    rows = ["[" + ", ".join(f"{v:.6g}" for v in row) + "]" for row in affine[:3]]
    return f"[{', '.join(rows)}]"


def by(shape: Iterable[int]) -> str:
    """Return `24 x 20 x 12`."""
    return " x ".join(map(str, shape))


def size_text(spacing: Iterable[float]) -> str:
    """Return `1 x 1 x 2.5 mm`."""
    return " x ".join(f"{s:.4g}" for s in spacing) + " mm"


def check_same_grid(
    image: Nifti, label: Nifti, tolerance_mm: float = 1e-3, allow_affine_mismatch: bool = False
) -> None:
    """Raise InputError unless both files have the same shape (first three axes) and affine.

    tolerance_mm: for each entry of the matrix. allow_affine_mismatch: where only the affine
    differs, warn instead; the caller then uses the image's affine for both.
    """
    shape = label.data.shape[:3]
    expected = image.data.shape[:3]
    if shape != expected:
        text = f"shape {by(shape)}, while {image.path.name} has {by(expected)}"
        raise InputError(f"{label.path}: {text}; pair the right files or resample one")
    if np.abs(image.affine - label.affine).max() <= tolerance_mm:
        return
    text = f"affine {matrix_text(label.affine)}, while {image.path.name} has "
    text += matrix_text(image.affine)
    if np.abs(np.subtract(image.spacing, label.spacing)).max() > tolerance_mm:
        sizes = f"{size_text(label.spacing)}, while {image.path.name} has "
        sizes += size_text(image.spacing)
        text = f"spacing {sizes}; {text}"
    if np.abs(np.abs(label.affine[:3, :3]) - np.eye(3)).max() <= tolerance_mm:
        text += " (identity-like: perhaps saved without its geometry)"
    if not allow_affine_mismatch:
        remedy = "if the voxels do lie on each other, prepare with --allow-affine-mismatch"
        raise InputError(f"{label.path}: {text}; {remedy}, or correct the header")
    warnings.warn(f"{label.path}: {text}; the image's affine is used for both", stacklevel=2)


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, Orientation]:
    """Bring [..., X, Y, Z] to the axis order and directions nearest to RAS+, no interpolation.

    Returns the array (a view), its affine [4, 4], and what `from_ras` needs. An oblique affine
    stays oblique.
    """
    axes = nib.io_orientation(affine)  # [3, 2]: for each axis its place, and +1 or -1
    undo = tuple((int(place), bool(sign < 0)) for place, sign in axes)
    moved = nib.orientations.inv_ornt_aff(axes, array.shape[-3:])
    lead = array.ndim - 3
    order = [*range(lead), *(lead + axis for axis in np.argsort(axes[:, 0]))]
    return _flipped(array, undo).transpose(order), np.asarray(affine, np.float64) @ moved, undo


def from_ras(array: np.ndarray, undo: Orientation) -> np.ndarray:
    """Return the exact inverse of `to_ras` for [..., X, Y, Z]; a view."""
    lead = array.ndim - 3
    order = [*range(lead), *(lead + place for place, _ in undo)]
    return _flipped(array.transpose(order), undo)


def _flipped(array: np.ndarray, undo: Orientation) -> np.ndarray:
    axes = tuple(axis - 3 for axis, (_, flip) in enumerate(undo) if flip)
    return np.flip(array, axes)


def resample(
    array: np.ndarray, affine: np.ndarray, spacing: Sequence[float], order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bring [..., X, Y, Z] to `spacing` (mm); order 1 is linear (images), 0 nearest (labels).

    The new length is round(n s / s'), at least 1. Outer edges, not centres, are aligned: the first
    centre moves by (s' - s) / 2 along each axis. Outside the old centres the border value holds;
    nothing is smoothed before. Returns array (float32 for order 1) and affine [4, 4].
    """
    affine = np.asarray(affine, np.float64)
    ratio = np.asarray(spacing, np.float64) / nib.affines.voxel_sizes(affine)
    shape = [max(1, round(n / r)) for n, r in zip(array.shape[-3:], ratio)]
    if np.abs(ratio - 1).max() < 1e-5:
        return resample_to(array, affine, array.shape[-3:], affine, order), affine
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = (ratio - 1) / 2  # in old voxels
    return resample_to(array, affine, shape, affine @ step, order), affine @ step


def resample_to(
    array: np.ndarray,
    affine: np.ndarray,
    target_shape: Sequence[int],
    target_affine: np.ndarray,
    order: int,
) -> np.ndarray:
    """Read [..., X, Y, Z] at the voxel centres of another grid; order and borders as `resample`."""
    step = np.linalg.inv(affine) @ target_affine  # target voxel -> source voxel
    shape = tuple(int(n) for n in target_shape)
    dtype = np.dtype(np.float32) if order else array.dtype
    if array.shape[-3:] == shape and np.allclose(step, np.eye(4), atol=1e-6):
        return array.astype(dtype)
    matrix = step[:3, :3]
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-9):
        matrix = np.diag(matrix)  # a quicker routine of scipy
    out = np.empty((*array.shape[:-3], *shape), dtype)
    for index in np.ndindex(array.shape[:-3]):
        source = array[index].astype(dtype, copy=False)
        ndimage.affine_transform(
            source, matrix, step[:3, 3], shape, out[index], order=order, mode="nearest"
        )
    return out


def read_window(
    array: np.ndarray, start: Sequence[int], size: Sequence[int], fill: float = 0
) -> np.ndarray:
    """Cut [..., *size] out of [..., X, Y, Z]; of a memory map only the window is read from disk.

    start: first voxel on each of the last axes. It may be negative, and the window may reach
    beyond the end: such voxels get `fill`. Returns a new array of the same type.
    """
    source: list[Any] = [...]
    target: list[Any] = [...]
    lead = array.ndim - len(size)
    for first, length, extent in zip(start, size, array.shape[lead:]):
        low = max(first, 0)
        high = max(min(first + length, extent), low)  # high = low where the window lies outside
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    out = np.full((*array.shape[:lead], *size), fill, array.dtype)
    out[tuple(target)] = array[tuple(source)]
    return out


def symmetric_pad(shape: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    """Return the voxels in front of each axis when `shape` is padded to `target`.

    That is floor((target - n) / 2), the rest lies behind; negative where the target is smaller.
    `read_window(volume, [-f for f in front], target)` pads.
    """
    return tuple((t - n) // 2 for n, t in zip(shape, target))


def centre_crop(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Undo padding with `symmetric_pad`: [..., *target] -> [..., *shape]."""
    front = symmetric_pad(shape, array.shape[array.ndim - len(shape) :])
    return read_window(array, front, shape)


# --- normalisation -----------------------------------------------------------------------------

# The rule for MR, see normalise.
PERCENTILES = {"kind": "percentile", "lower": 1.0, "upper": 99.0, "zero_fraction": 0.1}
FOV_FLOOR = -1024  # HU; scanners fill what lies outside their field of view with -2000 or -3024


def normalise(image: np.ndarray, spec: dict, names: Sequence[object] = ()) -> np.ndarray:
    """Bring the channels of [C, X, Y, Z] to [0, 1] as dataset.json["normalisation"] says.

    spec["channels"]: for each channel either
      {"kind": "percentile", "lower": 1, "upper": 99, "zero_fraction": 0.1}: percentiles of this
        very volume, over the voxels that are not 0 where at least that fraction is exactly 0 (they
        stay 0), else over all voxels;
      {"kind": "window", "low": a, "high": b}: the same window for every volume (CT).
    {"kind": "none"} instead: the values are in [0, 1] already and only clipped (phantoms).
    For the publisher's own grid, before resampling blurs the zeros. names: of the channels' files,
    for the warnings of `value_window`. Returns float32 [C, X, Y, Z].
    """
    if spec.get("kind") == "none":
        return np.clip(image.astype(np.float32), 0, 1)
    rules = spec["channels"]
    if len(rules) != len(image):
        raise InputError(f"the image has {len(image)} channels, expected {len(rules)}")
    if len(names) != len(image):  # one 4D file, or none
        names = [" ".join([*map(str, names), f"channel {c}"]) for c in range(len(image))]
    out = np.zeros(image.shape, np.float32)
    for c, (values, rule) in enumerate(zip(image, rules)):
        keep_zeros = False
        if rule["kind"] == "percentile":
            zeros = values.size - np.count_nonzero(values)
            keep_zeros = rule["zero_fraction"] * values.size <= zeros < values.size
            low, high = percentiles_of(values[values != 0] if keep_zeros else values, rule)
        else:
            low, high = rule["low"], rule["high"]
        keep_zeros = keep_zeros and low < high
        low, high = value_window(values, low, high, names[c])
        for plane, result in zip(values, out[c]):  # float64 copies of a whole CT are gigabytes
            result[:] = to_range(plane, low, high)
            if keep_zeros:
                result[plane == 0] = 0
    return out


def to_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Bring [low, high] to [0, 1], clipped; all 0 where high = low."""
    return np.clip((values.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)


def percentiles_of(values: np.ndarray, rule: dict) -> tuple[float, float]:
    """Return the rule's `lower` and `upper` percentile of all values."""
    if values.dtype.kind in "iu" and values.dtype.itemsize < 4:
        values = values.astype(np.int32)  # numpy's differences of 16-bit integers would wrap
    low, high = np.percentile(values, [rule["lower"], rule["upper"]])
    return float(low), float(high)


def value_window(values: np.ndarray, low: float, high: float, name: object) -> tuple[float, float]:
    """Return low and high; where they leave no range, the least and the largest value, and warn.

    A mask as a channel, a map with few values: the percentiles meet, but there is something to see.
    """
    if low < high:
        return low, high
    least = float(values.min())
    largest = float(values.max())
    text = f"the window from {low:g} to {high:g} is empty, scaled from {least:g} to {largest:g}"
    if least == largest:
        text = f"a constant channel, all values are {least:g}"
    warnings.warn(f"{name}: {text}", stacklevel=3)
    return least, largest


def check_intensities(nifti: Nifti, ct: bool) -> None:
    """Raise InputError unless values can be Hounsfield units (ct), or 16-bit whole numbers."""
    low = float(nifti.data.min())
    high = float(nifti.data.max())
    text = f"{nifti.path}: intensities from {low:g} to {high:g}"
    if ct and low >= 0:
        remedy = "MR, a label, or HU + 1024? name the modality MR, or subtract 1024"
        raise InputError(f"{text}, expected Hounsfield units, which fall below 0; {remedy}")
    if low < -32768 or high > 32767 or high - low < 100:
        expected = "a range of 100 or more, of 16 bits; use --norm case"
        if ct:
            expected = "Hounsfield units; get the original values"
        raise InputError(f"{text}, expected {expected}")


def shrink(image: np.ndarray, k: int) -> np.ndarray:
    """Return means of k x k pixels: uint8 [C, Y, X] -> [C, Y // k, X // k]; the rest is cut off."""
    rows = image.shape[1] // k
    columns = image.shape[2] // k
    blocks = image[:, : rows * k, : columns * k].reshape(len(image), rows, k, columns, k)
    return np.floor(blocks.mean((2, 4)) + 0.5).astype(np.uint8)


# --- slices ------------------------------------------------------------------------------------


def as_display(array: np.ndarray) -> np.ndarray:
    """Turn an axial RAS slice [X, Y, ...] to [rows, columns, ...]; the front on top, right left."""
    return array.swapaxes(0, 1)[::-1, ::-1]


def from_display(array: np.ndarray) -> np.ndarray:
    """Return the exact inverse of `as_display`."""
    return array[::-1, ::-1].swapaxes(0, 1)


def axis_weights(n: int, m: int, ratio: float, area: bool = False) -> np.ndarray:
    """Return [m, n] float32: each row reads n pixels at one of m places; ratio: new size / old.

    Outer edges are aligned: place i is (i + 1/2) ratio - 1/2; beyond the old centres the border
    value holds. Linear between two pixels, or (area) the mean of what a new pixel covers.
    """
    pixels = np.arange(n)
    if area:
        edges = np.arange(m + 1)[:, None] * ratio
        covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
        return (np.maximum(covered, 0) / ratio).astype(np.float32)
    place = np.clip((np.arange(m) + 0.5) * ratio - 0.5, 0, n - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - pixels)).astype(np.float32)


def nearest_index(n: int, m: int, ratio: float) -> np.ndarray:
    """Return [m] integers: the nearest of n samples for each place of `axis_weights`."""
    return np.clip(np.floor((np.arange(m) + 0.5) * ratio), 0, n - 1).astype(int)


class SliceGrid:
    """How one RAS volume becomes square slices: padded, resized in the plane, respaced.

    shape: (X, Y, Z) of the volume. side: pixels. spacing: mm, of which only the distance of slices
    counts; within 1 % of it, or for None, they are kept. affine: [4, 4] of the slices.
    """

    def __init__(
        self, shape: Sequence[int], native: np.ndarray, side: int, spacing: Sequence[float] | None
    ):
        self.shape = tuple(shape)
        self.side = side
        self.ratio = 1.0  # distance of the new slices / of the old
        if spacing:
            self.ratio = spacing[2] / float(nib.affines.voxel_sizes(native)[2])
        if abs(self.ratio - 1) <= 0.01:
            self.ratio = 1.0
        self.depth = max(1, round(self.shape[2] / self.ratio))
        self.square = max(self.shape[:2])
        self.front = symmetric_pad(self.shape[:2], (self.square, self.square))
        ratio = np.array([self.square / side, self.square / side, self.ratio])
        step = np.diag([*ratio, 1.0])
        step[:3, 3] = (ratio - 1) / 2 - [*self.front, 0]  # first centre, in old voxels
        self.affine = np.asarray(native, np.float64) @ step

    def _padded(self, volume: np.ndarray, fill: float) -> np.ndarray:
        start = [*(-f for f in self.front), 0]
        return read_window(volume, start, (self.square, self.square, volume.shape[2]), fill)

    def image(self, volume: np.ndarray, fill: float, floor: float = -np.inf) -> np.ndarray:
        """Resize [X, Y, Z] -> float32 [side, side, depth]: area means, or linear to enlarge.

        fill: of the padding. floor: lower values are raised to it.
        """
        smaller = self.side < self.square
        weights = axis_weights(self.square, self.side, self.square / self.side, area=smaller)
        out = np.empty((self.side, self.side, self.shape[2]), np.float32)
        for k in range(self.shape[2]):  # slice by slice: a float copy of a whole CT is large
            plane = np.maximum(volume[:, :, k : k + 1].astype(np.float32), np.float32(floor))
            out[:, :, k] = weights @ self._padded(plane, fill)[:, :, 0] @ weights.T
        if self.ratio == 1:
            return out
        return out @ axis_weights(self.shape[2], self.depth, self.ratio).T

    def label(self, volume: np.ndarray) -> np.ndarray:
        """Resize [X, Y, Z] -> [side, side, depth] of the same type, nearest; the padding is 0."""
        plane = nearest_index(self.square, self.side, self.square / self.side)
        depth = nearest_index(self.shape[2], self.depth, self.ratio)
        return self._padded(volume, 0)[np.ix_(plane, plane, depth)]


def slices_of(volume: np.ndarray, grid: SliceGrid, rule: dict, name: object = "") -> np.ndarray:
    """Turn RAS [X, Y, Z] to [side, side, depth] as stored; rule: the normalisation of slices.

    {"kind": "hu", "low", "high", "fov_pad"}: int16 HU, with "raise" nothing below -1024, padded
      with low.
    {"kind": "percentile-slices", "lower", "upper"}: float16 in [-1, 1] between two percentiles of
      this very volume over all its voxels, or between "low" and "high" where the rule has them.
    """
    if rule["kind"] == "hu":
        floor = FOV_FLOOR if rule["fov_pad"] == "raise" else -np.inf
        return np.rint(grid.image(volume, rule["low"], floor)).astype(np.int16)
    if "low" in rule:
        low, high = rule["low"], rule["high"]
    else:
        low, high = value_window(volume, *percentiles_of(volume, rule), name)
    return to_unit(grid.image(volume, low), low, high).astype(np.float16)


def to_unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip to [low, high] and bring to float32 in [-1, 1]; all -1 where high = low."""
    return 2 * (np.clip(values, low, high).astype(np.float32) - low) / max(high - low, 1e-12) - 1


def stored_to_unit(stored: np.ndarray, rule: dict) -> np.ndarray:
    """Bring what `slices_of` gave to float32 in [-1, 1], what networks see."""
    if rule["kind"] == "hu":
        return to_unit(stored, rule["low"], rule["high"])
    return stored.astype(np.float32)


# --- prepared data -----------------------------------------------------------------------------

FORMAT = 1  # of dataset.json; raised when an older reader could not read a newer folder
# Word in a folder's name -> the preparation to propose.
TOOLS = {"brats": "brats", "prostate": "prostate", "amos": "amos", "flare22": "flare22"}
TOOLS |= {"glas": "glas", "monuseg": "monuseg", "ffhq": "ffhq34", "celeba": "ffhq34"}


class Prepared:
    """A prepared data set: volumes, slices of them, or images.

    meta: the content of dataset.json. read(case, name): the array `image`, `label` or `instances`;
    a folder opens its file memory-mapped, synthetic data are drawn. root: the folder, or None.
    classes: name -> value 1..K in the label. scored: name -> value, or values whose union counts.
    axes: 3, or 2 for images. ignore: the value in the label that no score counts, or None.
    """

    def __init__(
        self, meta: dict, read: Callable[[str, str], np.ndarray], root: Path | None = None
    ):
        self.meta = meta
        self.read = read
        self.root = root
        self.place = str(root or meta["name"])  # for messages
        self.name: str = meta["name"]
        self.channels: list[str] = list(meta["channels"])
        self.classes: dict[str, int] = dict(meta["classes"])
        # regions: unions of classes that may overlap, where dataset.json names some
        self.scored: dict[str, int | list[int]] = dict(meta.get("regions") or self.classes)
        self.axes = 2 if meta["orientation"] == "YX" else 3
        self.kind = "images" if self.axes == 2 else "volumes"
        if "slices" in meta:
            self.kind = "slices"
        self.ignore: int | None = meta.get("ignore")
        self._checked: set[str] = set()  # cases whose label holds no foreign value

    def cases(self, split: str, limit: int = 0) -> list[str]:
        """Return the ids of a split, or of `all`; at most `limit`, 0 for no limit."""
        splits = {**self.meta["splits"], "all": list(self.meta["cases"])}
        if split not in splits:
            raise InputError(f"{self.place}: no split {split}, expected one of {', '.join(splits)}")
        return list(splits[split])[: limit or None]

    def facts(self, case: str) -> dict:
        """Return what dataset.json says of a case."""
        if case not in self.meta["cases"]:
            raise InputError(f"{self.place}: no case {case}; check the name")
        return self.meta["cases"][case]

    def image(self, case: str) -> np.ndarray:
        """Return [C, X, Y, Z] in [0, 1]; of images [C, Y, X] uint8; of slices see slices_of."""
        self.facts(case)
        return self.read(case, "image")

    def label(self, case: str) -> np.ndarray:
        """Return [X, Y, Z] or [Y, X] uint8; read whole once, to see that all values are known."""
        if not self.has_label(case):
            raise InputError(f"{self.place}: case {case} has no label; use a labelled split")
        label = self.read(case, "label")
        if case not in self._checked:
            known = {0, *self.classes.values(), self.ignore or 0}
            counts = np.bincount(np.ravel(label), minlength=256)
            foreign = [v for v in np.flatnonzero(counts).tolist() if v not in known]
            if foreign:
                text = ", ".join(f"the value {v} in {counts[v]} voxels" for v in foreign)
                text = f"the label of {case} holds {text}; dataset.json knows {sorted(known)}"
                raise InputError(f"{self.place}: {text}; prepare the data again")
            self._checked.add(case)
        return label

    def instances(self, case: str) -> np.ndarray | None:
        """Return [Y, X] int32 of object numbers, 0 = background; None where the set has none."""
        if self.facts(case).get("objects") is None:
            return None
        return self.read(case, "instances")

    def has_label(self, case: str) -> bool:
        return bool(self.facts(case)["labelled"])

    def spacing(self, case: str) -> tuple[float, ...]:
        """Return (sx, sy, sz) in mm; of images (1, 1): lengths count in pixels."""
        return tuple(float(s) for s in self.facts(case).get("spacing_mm", (1, 1)))

    def affine(self, case: str) -> np.ndarray:
        """Return [4, 4] float64, prepared voxel -> mm. Not of images."""
        return np.asarray(self.facts(case)["affine"], np.float64)

    def shape(self, case: str) -> tuple[int, ...]:
        """Return (X, Y, Z), of images (Y, X)."""
        return tuple(int(n) for n in self.facts(case)["shape"])

    @property
    def side(self) -> int:
        """Pixels of a slice's side; this and what follows is of slices only."""
        return int(self.meta["slices"]["side"])

    def depth(self, case: str) -> int:
        """Number of slices."""
        return self.shape(case)[2]

    def slice(self, case: str, k: int) -> np.ndarray:
        """Return slice k from the feet, float32 [side, side] in [-1, 1], as on a screen."""
        stored = as_display(self.image(case)[0, :, :, k])
        return np.ascontiguousarray(stored_to_unit(stored, self.meta["normalisation"]))

    def slice_label(self, case: str, k: int) -> np.ndarray:
        """Return uint8 [side, side] of the same slice."""
        return np.ascontiguousarray(as_display(self.label(case)[:, :, k]))


def read_array(root: Path, case: str, name: str) -> np.ndarray:
    """Open one array of a prepared folder, memory-mapped. Raises InputError."""
    path = root / "cases" / case / f"{name}.npy"
    with reading(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def open_data(name: Path | str, kind: str = "volumes", seed: int = 0) -> Prepared:
    """Open `synthetic`, a prepared folder, or the name of one below data/.

    kind: volumes, images or slices. Checks splits, and each array's presence, shape and type (the
    headers only). Raises InputError, with the command that prepares where there is nothing, or
    with all faults of the set.
    """
    if name == "synthetic":
        draw = {"volumes": synthetic.volumes, "slices": synthetic.slices}
        return Prepared(*draw.get(kind, synthetic.images)(seed))
    root = Path(name)
    if not root.is_absolute() and not (root / "dataset.json").exists():
        root = Path("data") / name
    tool = next((tool for word, tool in TOOLS.items() if word in root.name), "msd")
    command = f"prepare it: python -m data_prep.{tool} --src DIR --dst {root}"
    if kind == "slices" and tool == "msd":
        command += " --as-slices"
    if (root / "prepare.json").exists() and not (root / "dataset.json").exists():
        raise InputError(f"{root}: was not prepared to its end; run the same preparation again")
    if not (root / "dataset.json").exists():
        raise InputError(f"{root}: no dataset.json in this folder of {Path.cwd()}; {command}")
    with reading(root / "dataset.json"):
        meta = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        if meta["format"] > FORMAT:
            raise InputError(f"format {meta['format']}, expected {FORMAT}; use newer code")
        data = Prepared(meta, functools.partial(read_array, root), root)
        data_record(data)  # a missing entry is a KeyError
        faults = _split_faults(data) + _array_faults(data)
    if data.kind != kind:
        raise InputError(
            f"{root}: holds {data.kind}, expected {kind}; choose another, or {command}"
        )
    if faults:
        listed = "; ".join(faults[:20]) + ("; ..." if len(faults) > 20 else "")
        raise InputError(f"{root}: {len(faults)} faults: {listed}; correct them or {command}")
    return data


def _split_faults(data: Prepared) -> list[str]:
    """Return in words where splits overlap, repeat or name unknown cases, and wrong regions."""
    faults = []
    splits = data.meta["splits"]
    for name, ids in splits.items():
        for case in dict.fromkeys(ids):
            if case not in data.meta["cases"]:
                faults.append(f"split {name} names {case}, which is no case")
            if ids.count(case) > 1:
                faults.append(f"split {name} lists {case} twice")
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        common = set(splits.get(one, ())) & set(splits.get(other, ()))
        faults += [f"{case} is in the splits {one} and {other}" for case in sorted(common)]
    known = sorted(data.classes.values())
    for name, values in data.meta.get("regions", {}).items():
        if not values or not {*values} <= {*known}:
            faults.append(f"region {name} is {values}, expected some of {known}")
    return faults


def _array_faults(data: Prepared) -> list[str]:
    """Return in words what is wrong with the arrays on disk."""
    dtype = np.uint8 if data.kind == "images" else np.float16
    if data.meta["normalisation"].get("kind") == "hu":
        dtype = np.int16
    faults = []
    for case, facts in data.meta["cases"].items():
        shape = tuple(facts["shape"])
        expected: dict[str, tuple] = {"image": ((len(data.channels), *shape), dtype)}
        if facts["labelled"]:
            expected["label"] = (shape, np.uint8)
        if facts.get("objects") is not None:
            expected["instances"] = (shape, np.int32)
        for name, (size, kind) in expected.items():
            try:
                array = data.read(case, name)
            except InputError as error:
                faults.append(str(error).partition(";")[0])
                continue
            if array.shape != size or array.dtype != kind:
                text = f"{case}/{name}.npy is {array.dtype} {array.shape}"
                faults.append(f"{text}, expected {np.dtype(kind)} {size}")
    return faults


def data_record(data: Prepared) -> dict:
    """Return what a checkpoint keeps of its data, in plain types: all that `Scans` needs.

    spacing: the set's target spacing in mm, or None where each case keeps its own. cases: the ids
    of train and val. spacings_mm: of volumes, the range and the median over the training cases.
    """
    keys = "name channels classes label_values spacing orientation normalisation statistics"
    optional = "grid regions channel_suffixes ignore slices allow_affine_mismatch"
    record = {key: data.meta[key] for key in keys.split()}
    record |= {key: data.meta[key] for key in optional.split() if key in data.meta}
    record["cases"] = {part: data.meta["splits"].get(part, []) for part in ("train", "val")}
    reduce = data.meta.get("settings", {}).get("reduce", 1)
    if reduce > 1:
        record["reduce"] = reduce  # images: see shrink
    if data.kind == "volumes" and record["cases"]["train"]:
        spacings = [data.spacing(case) for case in record["cases"]["train"]]
        record["spacings_mm"] = {
            "min": np.min(spacings, axis=0).tolist(),
            "median": np.median(spacings, axis=0).tolist(),
            "max": np.max(spacings, axis=0).tolist(),
        }
    return json.loads(json.dumps(record))


def seen_cases(record: dict, data: Prepared, cases: Sequence[str]) -> list[str]:
    """Return those of the cases that a network was trained or validated on."""
    if record["name"] != data.name:
        return []
    seen = {case for ids in record["cases"].values() for case in ids}
    return [case for case in cases if case in seen]


def held_out(record: dict, data: Prepared, split: str, limit: int = 0) -> tuple[list[str], str]:
    """Return the labelled cases of a split, and a remark where the network has seen them.

    Raises InputError for data that are prepared otherwise than the network's, and for cases of its
    training or validation unless split is train or val.
    """
    cases = cases_to_score(data, split, limit)
    check_alike(record, data)
    seen = seen_cases(record, data, cases)
    if seen and split not in ("train", "val"):
        raise InputError(
            f"{len(seen)} of {len(cases)} cases of {split} were in this network's training or "
            f"validation, such as {seen[0]}; have the splits moved? Score other cases"
        )
    return cases, " (seen in training)" if seen else ""


def check_alike(record: dict, data: Prepared) -> None:
    """Raise InputError unless the data are prepared as those that a network was trained on."""
    prepared = data_record(data)
    keys = ["channels", "classes", "normalisation", "slices", "reduce"]
    keys += ["spacing"] if data.kind == "volumes" else []
    for key in keys:
        if record.get(key) != prepared.get(key):
            text = f"{key} is {prepared.get(key)}, the network was trained with {record.get(key)}"
            raise InputError(f"{data.place}: {text}; prepare the data alike")
    cases = data.cases("all")
    if record["spacing"] or "spacings_mm" not in record or seen_cases(record, data, cases):
        return  # test cases of its own set may lie outside the range of the training cases
    for case in cases:
        if is_other_size(data.spacing(case), record["spacings_mm"]):
            trained = f"the network was trained on {size_text(record['spacings_mm']['median'])}"
            text = f"voxels of {case} are {size_text(data.spacing(case))}, {trained}"
            raise InputError(f"{data.place}: {text}; prepare the data with that --spacing")


def is_other_size(spacing: Sequence[float], trained: dict) -> bool:
    """Whether a spacing lies outside the range of the training spacings by over a tenth."""
    low = 0.9 * np.array(trained["min"])
    high = 1.1 * np.array(trained["max"])
    return bool((np.array(spacing) < low).any() or (np.array(spacing) > high).any())


def cases_to_score(data: Prepared, split: str, limit: int = 0) -> list[str]:
    """Return the labelled cases of a split. Raises InputError for none, and for foreign values."""
    cases = [case for case in data.cases(split, limit) if data.has_label(case)]
    if not cases:
        parts = ", ".join(name for name, ids in data.meta["splits"].items() if ids)
        raise InputError(f"{data.place}: no labelled case in {split}; choose among {parts}")
    faults = []
    for case in cases:
        try:
            data.label(case)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError(" | ".join(faults))
    return cases


# --- finding what to predict -------------------------------------------------------------------

NIFTI_ENDING = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)


def nifti_stem(path: Path) -> str:
    """Return the file name without .nii or .nii.gz."""
    return NIFTI_ENDING.sub("", path.name)


def natural_key(name: str) -> list:
    """Sort key with which case2 comes before case10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, its own first, without those that a Mac's archiver leaves.

    Follows links, but no link back to a folder above. Raises InputError where it cannot look.
    """

    def refuse(error: OSError) -> None:
        text = f"{error.filename}: cannot be read ({error.strerror}); check the rights"
        raise InputError(text) from error

    seen = set()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(top)
        visible = [f for f in folders if f[0] != "." and f != "__MACOSX"]
        folders[:] = [] if real in seen else sorted(visible, key=natural_key)
        if real not in seen:
            yield from (Path(top, name) for name in sorted(names) if name[0] != ".")
        seen.add(real)


def published_path(file: Path) -> Path:
    """Return the folder x.nii that some unpackers make round one file, or the file itself."""
    return file.parent if NIFTI_ENDING.search(file.parent.name) else file


def list_files(
    paths: Sequence[Path | str], ending: re.Pattern, tells: Callable[[Path], object]
) -> tuple[list[Path], list[Path]]:
    """Return the files of these endings, named or in folders, and the others in the folders.

    Where a folder holds no such file itself, those below it are taken of which `tells` is true.
    """
    chosen: list[Path] = []
    others: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder in {Path.cwd()}; check the path")
        if not path.is_dir() and not ending.search(path.name):
            raise InputError(f"{path}: the ending is none of those that are read; convert it")
        below = list(walk_files(path)) if path.is_dir() else [path]
        listed = [f for f in below if path in (f, f.parent, published_path(f).parent)]
        files = [f for f in listed if ending.search(f.name)]
        if not files:
            listed = below
            files = [f for f in below if ending.search(f.name) and tells(f)]
        chosen += files
        others += sorted(set(listed) - set(files))
    if not chosen:
        names = "NIfTI file (.nii, .nii.gz)" if ending is NIFTI_ENDING else "image"
        raise InputError(
            f"{', '.join(map(str, paths))}: no {names} is there, nor below it one whose name tells "
            "its channel; give files, or the folder that holds them"
        )
    return chosen, others


def find_inputs(
    paths: Sequence[Path | str],
    channels: Sequence[str],
    suffixes: Mapping[str, Sequence[str]] | None = None,
) -> list[tuple[str, list[Path]]]:
    """Return the cases among files, or in folders: [(name, its files in channel order)], sorted.

    Files x_0000.nii.gz, x_0001.nii.gz, ... are the channels of case x (for a network of one
    channel x_0000 alone is; with x_0001 they are numbers of cases). So are files whose names end
    in _ or - and a word of a channel, in capitals or not, and t1.nii.gz, t2.nii.gz in a folder x.
    Where words tell the channels, a folder that holds no volume is searched below. Where names do
    not tell, as many files as channels, given one by one, are one case in this order; else each
    file is one. suffixes: words of a channel; without them its name is its word. Files that are
    not used are named in a warning. Raises InputError with all missing and double files.
    """
    words = _channel_words(channels, suffixes)

    def place(file: Path) -> tuple[str, int] | None:
        return _word_of(published_path(file), words)

    volumes, others = list_files(paths, NIFTI_ENDING, place)
    places = {file: place(file) for file in volumes}  # file -> case, channel
    numbered: dict[str, dict[Path, int]] = {}
    for file in volumes:
        match = re.fullmatch(r"(.+)_(\d{4})", nifti_stem(published_path(file)))
        if match:
            numbered.setdefault(match[1], {})[file] = int(match[2])
    for case, numbers in numbered.items():
        if 0 in numbers.values() and (len(channels) > 1 or len(numbers) == 1):
            places |= {file: (case, number) for file, number in numbers.items()}

    plain = [file for file in volumes if places[file] is None]
    if plain and 1 < len(channels) == len(volumes) == len(paths):
        order = [(places[file] or ("", i))[1] for i, file in enumerate(volumes)]
        if order == list(range(len(channels))):
            return [(nifti_stem(volumes[0]), volumes)]
    if len(plain) < len(volumes) and words:
        others += plain
        plain = []
    cases: dict[str, dict[int, list[Path]]] = {}
    for file, told in places.items():
        if told:
            cases.setdefault(told[0], {}).setdefault(told[1], []).append(file)
    inputs = [(nifti_stem(published_path(file)), [file]) for file in plain]
    return _sorted_inputs(inputs + _complete_cases(cases, channels, words), others)


def find_images(paths: Sequence[Path | str]) -> list[tuple[str, list[Path]]]:
    """Return [(name, [file])] of images, or of those in folders, as find_inputs."""
    ending = re.compile(rf"({'|'.join(map(re.escape, IMAGE_ENDINGS))})$", re.IGNORECASE)
    images, others = list_files(paths, ending, lambda file: False)
    return _sorted_inputs([(file.stem, [file]) for file in images], others)


def _sorted_inputs(
    inputs: list[tuple[str, list[Path]]], others: list[Path]
) -> list[tuple[str, list[Path]]]:
    """Return the inputs by name. Warns of unused files. Raises InputError for doubles."""
    names = [name for name, _ in inputs]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        text = f"{', '.join(double)}: found more than once, would become one mask"
        raise InputError(f"{text}; rename, or predict them one by one")
    if others:
        first = ", ".join(sorted((f.name for f in others), key=natural_key)[:5])
        dots = ", ..." if len(others) > 5 else ""
        warnings.warn(f"not used: {len(others)} files ({first}{dots})", stacklevel=3)
    return sorted(inputs, key=lambda item: natural_key(item[0]))


def _channel_words(
    channels: Sequence[str], suffixes: Mapping[str, Sequence[str]] | None
) -> dict[str, int]:
    """Return word in small letters -> place of its channel; empty where words do not tell them.

    So it is where two channels share a word, where there is one channel, and where a channel's
    name has no letter: x_1.nii.gz is rather a case's number. The last two do not hold for words
    that a set names itself.
    """
    words: dict[str, int] = {}
    for place, name in enumerate(channels):
        for word in (suffixes or {}).get(name, [name]):
            if words.setdefault(word.lower(), place) != place:
                return {}
    unsure = len(channels) < 2 or not all(re.search(r"[^\W\d_]", word) for word in words)
    return {} if unsure and not suffixes else words


def _word_of(file: Path, words: Mapping[str, int]) -> tuple[str, int] | None:
    """Return (case, channel) of a file x_WORD, x-WORD, or WORD in a folder x; else None."""
    stem = nifti_stem(file)
    for word in sorted(words, key=len, reverse=True):  # of b50 and adc-b50 the longer one counts
        if stem.lower() == word:
            return Path(os.path.abspath(file)).parent.name, words[word]
        if stem.lower().endswith(("_" + word, "-" + word)):
            return stem[: -len(word) - 1], words[word]
    return None


def _complete_cases(
    cases: Mapping[str, Mapping[int, list[Path]]],
    channels: Sequence[str],
    words: dict[str, int],
) -> list[tuple[str, list[Path]]]:
    """Return the cases with one file a channel. Raises InputError with all faults of all."""
    endings = {place: word for word, place in reversed(words.items())}
    faults = []
    for case, files in sorted(cases.items(), key=lambda item: natural_key(item[0])):
        for place in sorted({*range(len(channels)), *files}):
            number = len(files.get(place, []))
            if place >= len(channels):
                faults.append(f"{case} has a channel {place}, expected {len(channels)} channels")
            elif number == 0:
                name = f"{case}_{endings.get(place, f'{place:04d}')}.nii.gz"
                faults.append(f"{case} has no {channels[place]}, expected {name}")
            elif number > 1:
                several = " and ".join(map(str, files[place]))
                faults.append(f"{case} has {number} files for {channels[place]}: {several}")
    if faults:
        listed = " | ".join(faults[:20]) + (" | ..." if len(faults) > 20 else "")
        raise InputError(
            f"{len(faults)} faults in the inputs: {listed}; add, rename or remove files"
        )
    places = range(len(channels))
    return [(case, [files[place][0] for place in places]) for case, files in cases.items()]


# --- cases in, masks out -----------------------------------------------------------------------


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name one that any disk takes, all different, also without capitals."""
    plain: dict[str, str] = {}
    for name in names:
        text = re.sub(r"[^\w+-]+", "-", name)
        while text.lower() in [other.lower() for other in plain.values()]:
            text += "-2"
        plain[name] = text
    return plain


def published_values(label_values: Mapping[str, int]) -> np.ndarray:
    """Return the publisher's value of each prepared value 0..K: uint8, or uint16 from 256 on."""
    values = [label_values[str(k)] for k in range(len(label_values))]
    return np.array(values, np.uint8 if max(values) < 256 else np.uint16)


def save_files(
    target: Path,
    mask: np.ndarray,
    maps: Mapping[str, np.ndarray],
    members: Sequence[np.ndarray],
    write: Callable[[Path, np.ndarray], None],
    overwrite: bool,
) -> list[str]:
    """Write the mask to target, and maps/STEM_NAME and members/STEM_N beside it.

    Returns the names of the files that were there and are left as they are.
    """
    ending = re.search(r"(\.nii(\.gz)?|\.png)?$", target.name)[0]  # type: ignore[index]
    stem = target.name.removesuffix(ending)
    files = {target: mask}
    for name, plain in file_names(maps).items():
        files[target.parent / "maps" / f"{stem}_{plain}{ending}"] = maps[name]
    for number, member in enumerate(members):
        files[target.parent / "members" / f"{stem}_{number}{ending}"] = member
    left = []
    for file, array in files.items():
        if file.exists() and not overwrite:
            left.append(file.name)
        else:
            write(file, array)
    return left


def save_case(
    folder: Path,
    data: Prepared,
    case: str,
    mask: np.ndarray,
    maps: Mapping[str, np.ndarray],
    members: Sequence[np.ndarray],
    save: str,
) -> None:
    """Write one case of a prepared set: its mask with the publisher's values, and by `save` more.

    save: masks; maps: also maps; all: also each member's mask.
    """

    def write(path: Path, array: np.ndarray) -> None:
        write_on_grid(path, array, data.affine(case))

    values = published_values(data.meta["label_values"])
    masks = [values[member] for member in members] if save == "all" else []
    shown = {} if save == "masks" else maps
    save_files(folder / f"{case}.nii.gz", values[mask], shown, masks, write, overwrite=True)


class Scan:
    """One input of a prediction: what the network sees, and the way back to the input's grid.

    name: of the case. image: see VolumeScan and ImageScan. note: one line to print, or ''.
    """

    target = Path()  # where save writes the mask; set by Scans
    overwrite = False

    def __init__(self, name: str, image: np.ndarray, record: dict, note: str = ""):
        self.name = name
        self.image = image
        self.note = note
        self.classes: dict[str, int] = record["classes"]
        self.values = published_values(record["label_values"])

    def map(self, array: np.ndarray) -> np.ndarray:
        """Bring a map from the network's grid to the input's, linearly: float32."""
        raise NotImplementedError

    def mask(self, prob: np.ndarray) -> np.ndarray:
        """Return the mask on the input's grid with the publisher's values.

        prob: one channel (foreground, above 0.5), or all classes with background first (the
        largest; of equal ones the lowest). Probabilities are interpolated, then compared: edges
        stay finer than those of an interpolated mask. One channel at a time, to save memory.
        """
        if len(prob) not in (1, len(self.values)):
            raise ValueError(f"{len(prob)} channels, expected 1 or {len(self.values)}")
        highest = self.map(prob[0])
        mask = np.zeros(highest.shape, np.uint8)
        if len(prob) == 1:
            mask[highest > 0.5] = 1
        for value in range(1, len(prob)):
            channel = self.map(prob[value])
            mask[channel > highest] = value
            np.maximum(highest, channel, out=highest)
        return self.values[mask]

    def save(
        self,
        mask: np.ndarray,
        maps: Mapping[str, np.ndarray] | None = None,
        members: Mapping[object, np.ndarray] | None = None,
    ) -> str:
        """Write the mask, maps/STEM_NAME and members/STEM_N; all on the input's grid.

        Returns one line: the file, and the size of each class.
        """
        masks = list((members or {}).values())
        left = save_files(self.target, mask, maps or {}, masks, self._write, self.overwrite)
        counts = {name: int((mask == self.values[v]).sum()) for name, v in self.classes.items()}
        line = f"{self.target}: " + ", ".join(f"{n} {self._size(c)}" for n, c in counts.items())
        return line + (f"; left as they are: {', '.join(left)}" if left else "")

    def _write(self, path: Path, array: np.ndarray) -> None:
        raise NotImplementedError

    def _size(self, count: int) -> str:
        return f"{count:,} pixels"


class VolumeScan(Scan):
    """A volume. image: [C, X, Y, Z] float32 in [0, 1] on the network's grid.

    files: one for each channel, or one 4D file.
    """

    def __init__(self, name: str, files: Sequence[Nifti], record: dict):
        self.like = files[0]
        allow = bool(record.get("allow_affine_mismatch"))
        image = stack_channels(files, record["channels"], allow)
        image, note = self._seen(image, [file.path for file in files], record)
        super().__init__(name, np.ascontiguousarray(image, np.float32), record, note)

    def _seen(self, image: np.ndarray, names: list[Path], record: dict) -> tuple[np.ndarray, str]:
        """Return what the network sees, and a note. Sets the grids for the way back."""
        image = normalise(image, record["normalisation"], names)
        image, self.native, self.undo = to_ras(image, self.like.affine)
        self.shape = image.shape[1:]
        self.affine = self.native  # of the network's grid
        note = ""
        spacing = record["spacing"]
        sizes = nib.affines.voxel_sizes(self.native)
        trained = record.get("spacings_mm")
        if not spacing and trained and is_other_size(sizes, trained):
            spacing = trained["median"]
            note = f"voxels of {size_text(sizes)} are resampled to {size_text(spacing)}"
            note = f"{names[0]}: {note}, on which the network was trained"
            factor = np.maximum(sizes / spacing, spacing / sizes).max()
            if factor >= 2:
                note = f"warning: {note}; check the mask"
        if spacing:
            image, self.affine = resample(image, self.native, spacing, order=1)
        return image.astype(np.float16), note  # as coarse as the prepared files

    def map(self, array: np.ndarray) -> np.ndarray:
        native = resample_to(array, self.affine, self.shape, self.native, order=1)
        return np.ascontiguousarray(from_ras(native, self.undo))

    def _write(self, path: Path, array: np.ndarray) -> None:
        write_nifti(path, array, self.like, array.dtype)

    def _size(self, count: int) -> str:
        return f"{count * np.prod(self.like.spacing) / 1000:.2f} ml"


def scan_of_array(image: np.ndarray, spacing: Sequence[float], record: dict) -> VolumeScan:
    """Return the scan of an array with the scanner's values, in RAS order.

    image: [X, Y, Z] or [C, X, Y, Z]. spacing: mm of each axis.
    """
    image = np.asarray(image)
    if image.ndim == 4:
        image = np.moveaxis(image, 0, -1)  # [X, Y, Z, C], as in a file
    affine = np.diag([*spacing, 1.0])
    return VolumeScan("array", [Nifti(image, affine, tuple(spacing), None, Path("array"))], record)


class SliceScan(VolumeScan):
    """A volume for a network of slices. image: [Z, side, side] in [-1, 1], as on a screen."""

    def _seen(self, image: np.ndarray, names: list[Path], record: dict) -> tuple[np.ndarray, str]:
        rule = record["normalisation"]
        if rule["kind"] == "hu" or "low" in rule:
            check_intensities(self.like, rule["kind"] == "hu")
        volume, self.native, self.undo = to_ras(image[0], self.like.affine)
        self.shape = volume.shape
        grid = SliceGrid(self.shape, self.native, record["slices"]["side"], record["spacing"])
        self.affine = grid.affine
        stored = slices_of(volume, grid, rule, names[0])
        return np.moveaxis(as_display(stored_to_unit(stored, rule)), 2, 0), ""

    def mask(self, prob: np.ndarray) -> np.ndarray:
        """As of a volume; prob: [Z, C, side, side]."""
        return super().mask(prob.swapaxes(0, 1))

    def map(self, array: np.ndarray) -> np.ndarray:
        """As of a volume; array: [Z, side, side]."""
        return super().map(from_display(np.moveaxis(array, 0, 2)))


class ImageScan(Scan):
    """A 2D image: uint8 [C, Y, X], made `reduce` times smaller where the training images were."""

    def __init__(self, name: str, path: Path, record: dict):
        image = read_image(path)
        channels = record["channels"]
        self.shape = image.shape[1:]
        self.reduce = record.get("reduce", 1)
        if len(image) != len(channels):
            text = f"{len(image)} channels, expected {len(channels)} ({', '.join(channels)})"
            raise InputError(f"{path}: {text}; convert it")
        if min(self.shape) < self.reduce:
            text = f"{self.shape[1]} x {self.shape[0]} pixels"
            raise InputError(f"{path}: {text}, too few to be made {self.reduce} times smaller")
        super().__init__(name, shrink(image, self.reduce), record)

    def map(self, array: np.ndarray) -> np.ndarray:
        if self.reduce == 1:
            return array.astype(np.float32)
        rows = axis_weights(array.shape[0], self.shape[0], 1 / self.reduce)
        columns = axis_weights(array.shape[1], self.shape[1], 1 / self.reduce)
        return rows @ array.astype(np.float32) @ columns.T

    def _write(self, path: Path, array: np.ndarray) -> None:
        if array.dtype == np.float32:
            write_png(path, np.rint(255 * np.clip(array, 0, 1)).astype(np.uint8))
        elif array.ndim == 3:
            write_png(path, array)
        else:
            write_png_mask(path, array, self.values.tolist())


class Scans:
    """Cases in, masks on their grid out: checks all that can be checked before the work begins.

    paths: files or folders. output: a file for one input, else a folder. record: data_record of
    the network. notes: lines to print at the start. faults: of inputs that could not be read.

        scans = Scans(paths, output, record, overwrite)
        for scan in scans.share(rank, world):
            print(scan.save(scan.mask(network(scan.image))))
        scans.finish(scans.faults)
    """

    def __init__(
        self, paths: Sequence[Path | str], output: Path | str, record: dict, overwrite: bool
    ):
        self.record = record
        self.overwrite = overwrite
        self.faults: list[str] = []
        self.flat = record["orientation"] == "YX"
        output = Path(output)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.flat:
                inputs = find_images(paths)
            else:
                inputs = find_inputs(paths, record["channels"], record.get("channel_suffixes"))
        self.notes = [str(warning.message) for warning in caught]
        self.count = len(inputs)
        single = self._single(output)
        if single and self.count > 1:
            raise InputError(f"{output}: one file for {self.count} inputs; give a folder")
        sources = [file for _, files in inputs for file in files]
        folders = {file.parent.resolve() for file in sources} | {Path(p).resolve() for p in paths}
        if not single and output.resolve() in folders:
            raise InputError(f"{output}: holds the inputs; choose another folder for the output")
        self.inputs = []
        left = []
        for name, files in inputs:
            target = single or output / f"{name}{'.png' if self.flat else '.nii.gz'}"
            if target.exists() and any(target.samefile(file) for file in sources):
                raise InputError(f"{target}: the output would replace an input; choose another")
            if target.exists() and not overwrite:
                left.append(target.name)
            else:
                self.inputs.append((name, files, target))
        if left and single:
            raise InputError(
                f"{single}: is there already; choose another --output, or add --overwrite"
            )
        if left:
            names = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            text = f"{len(left)} of {self.count} masks are there and left as they are ({names})"
            self.notes.append(f"{output}: {text}; --overwrite replaces them")

    def _single(self, output: Path) -> Path | None:
        """Return the output where it is a file, None for a folder. Raises InputError."""
        endings = [".png"] if self.flat else [".nii.gz", ".nii"]
        for ending in endings:
            if output.name.lower().endswith(ending) and not output.is_dir():
                return output.with_name(output.name[: -len(ending)] + ending)
        if re.search(r"\.[A-Za-z]\w*$", output.name) and not output.is_dir():
            raise InputError(f"{output}: masks are {' or '.join(endings)}; or give a folder")
        return None

    def share(self, rank: int = 0, world: int = 1) -> Iterator[Scan]:
        """Yield this process's scans; one that cannot be read goes to `faults`."""
        for name, files, target in self.inputs[rank::world]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    scan = self._read(name, files)
                except InputError as error:
                    self.faults.append(str(error))
                    continue
            texts = [str(warning.message) for warning in caught] + [scan.note]
            scan.note = "; ".join(text for text in texts if text)
            scan.target = target
            scan.overwrite = self.overwrite
            yield scan

    def _read(self, name: str, files: Sequence[Path]) -> Scan:
        if self.flat:
            return ImageScan(name, files[0], self.record)
        volumes = [read_nifti(file) for file in files]
        if "slices" in self.record:
            return SliceScan(name, volumes, self.record)
        return VolumeScan(name, volumes, self.record)

    def finish(self, faults: Sequence[str]) -> None:
        """Raise InputError where inputs of any process could not be read, after all the others."""
        if faults:
            text = f"{len(faults)} of {self.count} inputs were left out"
            raise InputError(f"{text}: {' | '.join(faults)}")
