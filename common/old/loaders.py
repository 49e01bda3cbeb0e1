"""Volumes and images in and out: NIfTI, PNG, JPG, BMP, TIF, geometry, normalisation, padding, prepared sets, splits.

Conventions, the same in the whole repository:
  axes         nibabel's order x, y, z; channels first: an image is [C, X, Y, Z], a label [X, Y, Z];
               2D images as a screen shows them: [C, Y, X] and [Y, X], row 0 on top
  orientation  prepared volumes are RAS+: x grows to the patient's right, y to the front, z to the head
  lengths      millimetres; spacing is (sx, sy, sz) in the order of the array's axes
  affine       4 x 4 float64, voxel index -> millimetres, of voxel *centres*
  prepared     image float16 in [0, 1] (2D: uint8 as published), label uint8 with consecutive values 0..K (where
               dataset.json names one, a value `ignore` too), 2D also instances int32; all C-contiguous .npy files
  slices       a prepared kind of their own, see there: volumes whose axial slices are squares, Fortran-contiguous
"""

import contextlib
import gzip
import io
import json
import os
import pickle  # for the restricted reader of CIFAR-10 alone; a test holds this file to it
import re
import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from scipy.special import ndtri

from common import InputError

# Word in a folder's name -> the preparation to propose, the first that fits.
TOOLS = {"corrupt": "corrupt", "celeba": "ffhq34", "ffhq": "ffhq34"}
TOOLS |= {name: name for name in ("brats", "prostate", "amos", "flare22", "glas", "monuseg")}
FORMAT = 1  # of dataset.json; raised when an older reader could not read a newer folder
GZIP_RATIO = 1032  # no deflate stream grows by more than this (zlib's documentation)
CHUNK = 1 << 22  # bytes read at a time
PERCENTILES = {
    "kind": "percentile",
    "lower": 1.0,
    "upper": 99.0,
    "zero_fraction": 0.1,
}  # the rule for MR

# --- NIfTI -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nifti:
    """One NIfTI file in memory, its scaling (scl_slope, scl_inter) applied.

    data: [X, Y, Z] or [X, Y, Z, C], the file's own axis order; integers where they are exact, else float32.
    affine: 4 x 4 float64, mm. spacing: mm, lengths of the affine's columns. header: nibabel's, kept for writing.
    """

    data: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, ...]
    header: Any
    path: Path


def read_nifti(path: str | os.PathLike) -> Nifti:
    """Read a .nii or .nii.gz file (told apart by content, not by name) to its last byte.

    Returns: Nifti. Warns where the file holds no position (sform and qform code 0), two positions more than
    half a voxel apart, or another unit than mm.
    Raises: InputError, one line with the file's name, for whatever is wrong with it: absent, empty, not NIfTI,
    truncated, checksum, size not plausible (refused before memory is taken), number type, NaN or Inf, affine.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size == 0:
            raise InputError(
                f"{path}: the file is empty (0 bytes), expected a NIfTI volume; copy it again"
            )
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            header, buffer = _read_stream(
                gzip.GzipFile(fileobj=raw) if packed else raw, path, size, packed
            )
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(
            f"{path}: the gzip stream is damaged or cut off ({text}); copy it again"
        ) from e
    except OSError as e:
        raise InputError(
            f"{path}: cannot be read ({e.strerror or e}), expected a NIfTI file; check the path"
        ) from e
    affine = _affine_of(header, path)
    data = _scaled(header, buffer, path)
    return Nifti(
        data, affine, tuple(float(s) for s in nib.affines.voxel_sizes(affine)), header, path
    )


def _read_stream(stream: Any, path: Path, size: int, packed: bool) -> tuple[Any, bytearray]:
    """Header and voxel bytes from an open stream that is read to its end, so that the checksum is tested."""
    header = _parse_header(stream.read(540), path)
    shape, dtype = _shape_of(header, path), _dtype_of(header, path)
    start = int(header["vox_offset"])
    need = int(np.prod(shape, dtype=object)) * dtype.itemsize
    claim = f"{path}: the header promises {' x '.join(map(str, shape))} voxels ({need:,} bytes)"
    remedy = "the file is cut off or its header is damaged; copy it again"
    if need + start > (size * GZIP_RATIO if packed else size):
        raise InputError(f"{claim}, more than the file of {size:,} bytes can hold; {remedy}")
    if need * 3 > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise InputError(
            f"{claim}, too many for {memory:,} bytes of memory; crop or resample it first"
        )
    stream.seek(0)
    stream.read(start)
    buffer = bytearray()
    while len(buffer) < need and (part := stream.read(min(CHUNK, need - len(buffer)))):
        buffer += part
    while stream.read(CHUNK):  # on to the end: a gzip checksum is tested only there
        pass
    if len(buffer) < need:
        raise InputError(f"{claim}, the file holds {len(buffer):,} bytes of them; {remedy}")
    return header, buffer


def _parse_header(block: bytes, path: Path) -> Any:
    """nibabel header (NIfTI-1 or 2, either byte order) from a file's first bytes. Raises InputError."""
    if block.lstrip()[:1] == b"<":
        raise InputError(
            f"{path}: holds an HTML or XML page, not a NIfTI volume (a failed download?); get it again"
        )
    for kind, size, magic in (
        (nib.Nifti1Header, 348, block[344:348]),
        (nib.Nifti2Header, 540, block[4:12]),
    ):
        if int.from_bytes(block[:4], "little") != size and int.from_bytes(block[:4], "big") != size:
            continue
        if magic[:3] not in (b"n+1", b"n+2"):
            raise InputError(
                f"{path}: header without the mark of a single-file NIfTI (n+1); save it as .nii.gz"
            )
        if len(block) < size:
            break
        try:
            return kind(block[:size], check=False)
        except (HeaderDataError, ImageFileError, ValueError) as e:
            raise InputError(f"{path}: the header cannot be read ({e}); copy the file again") from e
    raise InputError(
        f"{path}: starts with {block[:8]!r}, expected a NIfTI header; copy it again or convert it"
    )


def _shape_of(header: Any, path: Path) -> tuple[int, ...]:
    """Shape as Python integers, axes of length 1 after the third left out."""
    dim = [int(d) for d in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise InputError(
            f"{path}: the header's dim is {dim}, expected 1 to 7 axes of length >= 1; copy it again"
        )
    first = header.single_vox_offset
    if not first <= header["vox_offset"] < 2**40:  # also false for NaN
        raise InputError(
            f"{path}: the header's vox_offset is {header['vox_offset']}, expected {first}; copy it again"
        )
    shape = dim[1 : dim[0] + 1]
    return tuple(shape[:3] + [n for n in shape[3:] if n > 1])


def _dtype_of(header: Any, path: Path) -> np.dtype:
    """Number type of the stored voxels; real numbers of at most 8 bytes only."""
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as e:
        raise InputError(
            f"{path}: unknown number type code {int(header['datatype'])}; convert it to float32"
        ) from e
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"{path}: voxels are of type {dtype}, expected integers or floats; convert it to float32"
        )
    return dtype


def _affine_of(header: Any, path: Path) -> np.ndarray:
    """Affine [4, 4] float64 in mm; warns where it is a guess. Raises InputError where it cannot be inverted."""
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        warnings.warn(
            f"{path}: sform and qform code are both 0: the file does not say where left and right are; "
            "taken as LAS from the voxel sizes, as nibabel does",
            stacklevel=3,
        )
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        unit = header.get_xyzt_units()[0]
    except (HeaderDataError, ValueError, KeyError) as e:
        raise InputError(
            f"{path}: the header's orientation cannot be read ({e}); repair or convert it"
        ) from e
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise InputError(
            f"{path}: the affine {matrix_text(affine)} cannot be inverted; repair the header"
        )
    if unit not in ("unknown", "mm"):
        warnings.warn(
            f"{path}: the header's length unit is {unit}; its numbers are taken as mm", stacklevel=3
        )
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        _warn_if_apart(affine, header, path)
    return affine


def _warn_if_apart(affine: np.ndarray, header: Any, path: Path) -> None:
    """Warns where qform places a corner of the volume more than half a voxel from where `affine`, the sform, does."""
    try:
        offset = affine - header.get_qform()  # [4, 4]
    except (HeaderDataError, ValueError):
        return  # the sform is used, whatever the qform holds
    corners = np.array([*np.ndindex(2, 2, 2)]) * (
        np.array([*header.get_data_shape(), 1, 1])[:3] - 1
    )  # [8, 3]
    mm = float(np.abs(corners @ offset[:3, :3].T + offset[:3, 3]).max())
    if mm > np.linalg.norm(affine[:3, :3], axis=0).min() / 2:
        warnings.warn(
            f"{path}: sform and qform place a corner {mm:.1f} mm apart; the sform is used, as nibabel does "
            "(other programs use the qform)",
            stacklevel=4,
        )


def _scaled(header: Any, buffer: bytearray, path: Path) -> np.ndarray:
    """Voxels with scl_slope and scl_inter applied: integers where exact, else float32; all finite."""
    shape = _shape_of(header, path)
    data = np.frombuffer(buffer, _dtype_of(header, path)).reshape(shape, order="F")
    data = data.astype(data.dtype.newbyteorder("="), copy=False)
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as e:
        raise InputError(
            f"{path}: scl_slope or scl_inter is not a number ({e}); repair the header"
        ) from e
    slope, inter = 1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter)
    if data.dtype.kind == "f":
        bad = data.size - np.count_nonzero(np.isfinite(data))
        if bad:
            raise InputError(
                f"{path}: {bad:,} voxels are NaN or Inf, expected numbers; replace them or leave it out"
            )
    if (slope, inter) != (1.0, 0.0):
        whole = (
            data.dtype.kind in "iu"
            and slope.is_integer()
            and inter.is_integer()
            and abs(slope) + abs(inter) < 1e6
        )
        if whole and data.dtype.itemsize <= 4:
            data = data.astype(np.int64) * int(slope) + int(inter)
        else:
            data = data.astype(np.float64) * slope + inter
    if data.dtype.kind == "f" and data.dtype != np.float32:
        if max(abs(float(data.max())), abs(float(data.min()))) > np.finfo(np.float32).max:
            raise InputError(
                f"{path}: values up to {float(np.abs(data).max()):g} do not fit float32; rescale it"
            )
        data = data.astype(np.float32)
    return data


def channels_first(nifti: Nifti) -> np.ndarray:
    """[X, Y, Z] -> [1, X, Y, Z]; [X, Y, Z, C] (channels last, as Decathlon stores them) -> [C, X, Y, Z].

    Raises: InputError for 2D and for five and more axes.
    """
    if nifti.data.ndim == 3:
        return nifti.data[None]
    if nifti.data.ndim == 4:
        return np.moveaxis(nifti.data, -1, 0)
    raise InputError(
        f"{nifti.path}: {_dims(nifti.data)}, expected 3D, or 4D with channels last; convert it"
    )


def as_volume(nifti: Nifti) -> np.ndarray:
    """[X, Y, Z] of a file that must be 3D. Raises: InputError for any other number of axes."""
    if nifti.data.ndim != 3:
        raise InputError(
            f"{nifti.path}: {_dims(nifti.data)}, expected one 3D volume; give one file for each volume"
        )
    return nifti.data


def _dims(data: np.ndarray) -> str:
    return f"the volume is {data.ndim}D, {' x '.join(map(str, data.shape))}"


def write_nifti(path: str | os.PathLike, array: np.ndarray, like: Nifti, dtype: Any) -> None:
    """Write [X, Y, Z] on the grid of `like`: same affine, q/s-form matrices and codes; scl_slope 1, scl_inter 0.

    The file appears complete or not at all. A name ending in .gz is compressed (same bytes for the same input).
    Raises: InputError where the file cannot be written, or `path` is `like`'s own file.
    """
    path, dtype = Path(path), np.dtype(dtype)
    if array.shape != like.data.shape[:3]:
        raise ValueError(
            f"array {array.shape} is not on the grid {like.data.shape[:3]} of {like.path}"
        )
    check_not_input(path, [like.path])
    header = like.header.copy()
    header.set_data_dtype(dtype)
    header.set_data_shape(array.shape)
    header["descrip"] = OURS
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"], header["cal_max"] = 0, 0  # the input's display range would hide a mask
    header["intent_code"] = 0
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    stored = np.asarray(array).astype(header.get_data_dtype())  # in the header's byte order
    gap = header.single_vox_offset - len(header.binaryblock)
    blob = header.binaryblock + bytes(gap) + stored.tobytes(order="F")
    atomic_write(path, gzip.compress(blob, 6, mtime=0) if path.name.endswith(".gz") else blob)


OURS = (
    b"diffusion models for medical segmentation"  # in each NIfTI and PNG that may be written again
)


def check_output(output: Path, inputs: Iterable[str | os.PathLike]) -> None:
    """check_not_input, and InputError where another program's file is there, such as a true mask."""
    check_not_input(output, inputs)
    if not output.exists():
        return
    try:
        if output.suffix.lower() == ".png":
            with Image.open(output, formats=["PNG"]) as image:
                ours = image.info.get("Software") == OURS.decode()
        else:
            ours = bytes(nib.load(output).header["descrip"]).rstrip(b"\0") == OURS  # type: ignore[index]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zlib.error,
        nib.filebasedimages.ImageFileError,
    ):
        ours = False
    if not ours:
        raise InputError(
            f"{output}: is there and was not written by `predict`; choose another --output, or remove it"
        )


def check_not_input(output: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> None:
    """Raise InputError where `output` is one of the inputs, also by a link; to be called before the work begins."""
    for file in map(Path, inputs):
        if Path(output).exists() and file.exists() and file.samefile(output):
            raise InputError(
                f"{output}: the output would overwrite the input {file}; choose another output"
            )


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


def atomic_write(path: Path, blob: bytes) -> None:
    """Write a file by way of a temporary one in the same folder, so that it is whole or absent. Raises InputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(
            f"{path}: cannot be written ({e.strerror or e}); free space or choose another place"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# --- images ----------------------------------------------------------------------------------------------------------

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "TIFF",
)  # Pillow's names; no other decoder sees a user's file


def read_image(path: str | os.PathLike, blob: bytes | None = None) -> np.ndarray:
    """Read a PNG, JPG, BMP or TIF (told apart by content) -> uint8 [C, Y, X], C = 1 (grey) or 3 (RGB).

    blob: the file's bytes, where `path` only names it (a member of an archive). Alpha is dropped, a palette becomes
    its colours, a rotation in a camera's tags is not applied.
    Raises: InputError, one line with the file's name: absent, empty, not such an image, cut off, more than 8 bits a
    channel, another colour space than grey and RGB, several pages, more pixels than Pillow thinks safe.
    """
    with _opened(path, blob) as image:
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise InputError(
                f"{path}: colours are of kind {image.mode}, expected 8-bit grey or RGB; convert it"
            )
        grey = image.mode in ("1", "L", "LA")
        array = np.asarray(image.convert("L" if grey else "RGB"))  # [Y, X] or [Y, X, 3]
    return np.ascontiguousarray(array[None] if grey else array.transpose(2, 0, 1))  # [C, Y, X]


def read_mask(path: str | os.PathLike, blob: bytes | None = None) -> np.ndarray:
    """Read a mask of object numbers or classes -> int32 [Y, X], 0 = background. blob: as read_image.

    Grey of 1, 8 or 16 bits counts as it is stored, a palette image by its indices, RGB only where it is grey.
    Raises: InputError as read_image; and for JPEG, which changes numbers, for colours, and for a palette whose index 0
    is not black: its indices number colours, not objects.
    """
    with _opened(path, blob, deep=True) as image:
        if image.format == "JPEG":
            raise InputError(
                f"{path}: a mask in JPEG, whose loss changes the numbers; get it as PNG or BMP"
            )
        if image.mode == "P":
            first = tuple((image.getpalette("RGB") or [0, 0, 0])[:3])
            if first != (0, 0, 0):
                raise InputError(f"{path}: a palette whose index 0 is the colour {first}, expected black, the "
                                 "background; save the object numbers as 8-bit or 16-bit grey")  # fmt: skip
        elif image.mode not in ("1", "L", "I;16", "I;16B", "I;16L", "I", "RGB", "RGBA"):
            raise InputError(
                f"{path}: a mask of kind {image.mode}, expected 8-bit or 16-bit grey; convert it"
            )
        array = np.asarray(image)
    if array.ndim == 3:
        if (array[..., :3] != array[..., :1]).any():
            raise InputError(
                f"{path}: a mask in colours, expected grey values that number objects; convert it"
            )
        array = array[..., 0]
    if array.size and int(array.min()) < 0:
        raise InputError(
            f"{path}: a mask with the value {int(array.min())}, expected 0 or more; correct it"
        )
    return np.ascontiguousarray(array, np.int32)


@contextlib.contextmanager
def _opened(
    path: str | os.PathLike, blob: bytes | None, deep: bool = False
) -> Iterator[Image.Image]:
    """A Pillow image that is decoded to its end. deep: 16 bits are allowed. Raises: InputError as read_image."""
    try:
        blob = Path(path).read_bytes() if blob is None else blob
    except OSError as e:
        raise InputError(
            f"{path}: cannot be read ({e.strerror or e}), expected an image; check the path"
        ) from e
    if not blob:
        raise InputError(f"{path}: the file is empty (0 bytes), expected an image; copy it again")
    if blob.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: holds a Git LFS pointer, not the image; fetch the file itself")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged tags; damaged pixels raise
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(
                io.BytesIO(blob), formats=IMAGE_FORMATS
            ) as image:  # reads the header only
                stored = (
                    str(image.tile[0][3]) if image.tile else ""
                )  # before decoding, which forgets it
                if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                    raise InputError(
                        f"{path}: holds {image.n_frames} pages, expected one image; save them one by one"
                    )
                # Pillow cuts colours of 16 bits to 8 without a word
                wide = image.mode.startswith(("I", "F")) or (
                    ";16" in stored and image.format in ("PNG", "TIFF")
                )
                if wide and not (deep and image.mode.startswith("I")):
                    kind = "floating point" if image.mode == "F" else "16 bits or more"
                    raise InputError(
                        f"{path}: {kind} a channel, expected 8; convert it and mind the range"
                    )
                image.load()
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise InputError(f"{path}: claims more than {Image.MAX_IMAGE_PIXELS:,} pixels, expected a field of view, "
                         "not a whole slide (or the header is damaged); cut it into fields") from e  # fmt: skip
    except UnidentifiedImageError as e:
        if blob.startswith((b"\x89PNG", b"\xff\xd8", b"BM", b"II*\0", b"MM\0*")):
            raise InputError(
                f"{path}: the image is damaged or cut off at {len(blob):,} bytes; copy it again"
            ) from e
        what = (
            "an HTML or XML page (a failed download?)"
            if blob.lstrip()[:1] == b"<"
            else f"{blob[:8]!r} at its start"
        )
        raise InputError(
            f"{path}: {what}, expected a PNG, JPG, BMP or TIF image; get it again or convert it"
        ) from e
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        TypeError,
        LookupError,
        ArithmeticError,
        struct.error,
    ) as e:
        text = " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{path}: the image is damaged or cut off ({text}); copy it again") from e
    except MemoryError as e:
        raise InputError(f"{path}: does not fit the memory; cut it into fields") from e


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Reads numpy arrays of numbers, lists, dicts, bytes, str and int; refuses every other name that a file asks for.

    A pickle is a program. Names of functions and classes reach it through find_class alone, so that nothing can be
    called but what stands there.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _plain_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _plain_dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _plain_array(*_: Any) -> np.ndarray:
    """What _reconstruct does for an array, whatever it is asked for: an empty one, filled by the state that follows."""
    return np.ndarray((0,), np.uint8)


def _plain_dtype(code: Any, *_: Any) -> np.dtype:
    """Number types only: an array of objects could hold anything."""
    if np.dtype(code).kind not in "biuf":
        raise pickle.UnpicklingError(f"holds an array of {code!r}")
    return np.dtype(code)


def _latin1(text: str, coding: str) -> bytes:
    if coding != "latin1":
        raise pickle.UnpicklingError(f"asks for the coding {coding!r}")
    return text.encode("latin1")


def read_cifar10(folder: str | os.PathLike) -> dict[str, Any]:
    """Read cifar-10-batches-py as unpacked, or a part of it: any of data_batch_1..5, and test_batch, batches.meta.

    Returns: train_images, test_images uint8 [N, 3, 32, 32] (RGB, [C, Y, X]); train_labels, test_labels int64 [N] in
    0..9; classes, ten names; files, the batches that were read. Checksums are not compared, so that a part will do.
    Raises: InputError, one line, for a missing or damaged file, or one that holds more than plain numbers and text.
    """
    folder = Path(folder)
    train = [folder / f"data_batch_{i}" for i in range(1, 6)]
    train = [file for file in train if file.is_file()]
    if not train:
        packed = (
            "unpack cifar-10-python.tar.gz first"
            if [*folder.glob("*.tar.gz")]
            else "check the path"
        )
        raise InputError(
            f"{folder}: holds no data_batch_1 to 5, expected cifar-10-batches-py; {packed}"
        )
    names = _read_plain(folder / "batches.meta").get("label_names")
    if (
        not isinstance(names, list)
        or len(names) != 10
        or not all(isinstance(name, str) for name in names)
    ):
        raise InputError(
            f"{folder / 'batches.meta'}: label_names is {names!r}, expected ten names; get it again"
        )
    parts = [_cifar_batch(file) for file in train]
    images, labels = _cifar_batch(folder / "test_batch")
    return {
        "train_images": np.concatenate([part[0] for part in parts]),
        "train_labels": np.concatenate([part[1] for part in parts]),
        "test_images": images,
        "test_labels": labels,
        "classes": names,
        "files": [file.name for file in [*train, folder / "test_batch"]],
    }


class Cifar:
    """CIFAR-10 with the interface of prepared images, without labels of pixels: for pre-training and `probe`."""

    def __init__(self, folder: Path):
        self.content, self.name, self.ignore = read_cifar10(folder), "cifar10", None
        self.channels, self.classes = ["red", "green", "blue"], {}  # type: list[str], dict[str, int]
        self.splits = {
            s: [f"{s}_{i}" for i in range(len(self.content[f"{s}_images"]))]
            for s in ("train", "test")
        }
        plain = {
            "label_values": {"0": 0},
            "normalisation": {"kind": "none"},
            "statistics": {},
            "orientation": "YX",
        }
        self.meta: dict[str, Any] = plain | {
            "name": self.name,
            "channels": self.channels,
            "classes": {},
        }
        self.meta |= {
            "spacing": None,
            "splits": self.splits | {"pretrain": self.splits["train"]},
        }  # not the test images

    def cases(self, split: str, limit: int | None = None) -> list[str]:
        return self.meta["splits"].get(split, [])[:limit]

    def image(self, case: str) -> np.ndarray:
        split, i = case.split("_")
        return self.content[f"{split}_images"][int(i)]

    def shape(self, case: str) -> tuple[int, ...]:
        return self.image(case).shape[1:]

    def has_label(self, case: str) -> bool:
        return False


def _cifar_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 3, 32, 32], labels int64 [N]) of one batch."""
    batch = _read_plain(file)
    data, labels = batch.get("data"), batch.get("labels", [])
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != 3072
    ):
        found = (
            f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        )
        raise InputError(f"{file}: data is {found}, expected uint8 (N, 3072); get it again")
    sound = isinstance(labels, list) and all(isinstance(v, int) and 0 <= v < 10 for v in labels)
    if not sound or len(labels) != len(data):
        raise InputError(
            f"{file}: labels do not fit, expected {len(data)} integers of 0 to 9; get it again"
        )
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.int64)  # red, green, blue; row by row


def _read_plain(file: Path) -> dict:
    """The dict in a pickle of plain values, with str keys, whichever Python wrote it. Raises: InputError."""
    try:
        with open(file, "rb") as f:
            value = _PlainUnpickler(f, encoding="latin1").load()
    except OSError as e:
        raise InputError(
            f"{file}: cannot be read ({e.strerror or e}), expected a CIFAR-10 batch; copy it"
        ) from e
    except Exception as e:  # a damaged pickle may raise anything
        text = " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{file}: not a CIFAR-10 batch, or damaged ({text}); get it again") from e
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a {type(value).__name__}, expected a dict; get it again")
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: part for key, part in value.items()
    }


# --- geometry --------------------------------------------------------------------------------------------------------


def matrix_text(affine: np.ndarray) -> str:
    """The first three rows of an affine on one line."""
    return (
        "[" + ", ".join("[" + ", ".join(f"{v:.6g}" for v in row) + "]" for row in affine[:3]) + "]"
    )


def check_same_grid(
    image: Nifti, label: Nifti, tolerance_mm: float = 1e-3, allow_affine_mismatch: bool = False
) -> None:
    """Raise InputError unless both files have the same shape (first three axes), spacing and affine.

    tolerance_mm: for each entry of the matrix. allow_affine_mismatch: where only the affine differs, warn instead;
    the caller then uses the image's affine for both. Codes of q- and s-form are not compared, only matrices.
    """
    a, b = image.data.shape[:3], label.data.shape[:3]
    if a != b:
        shapes = f"shape {' x '.join(map(str, b))}, while {image.path.name} has {' x '.join(map(str, a))}"
        raise InputError(
            f"{label.path}: {shapes}; expected the same grid, pair the right files or resample one"
        )
    if np.abs(image.affine - label.affine).max() <= tolerance_mm:
        return
    what = f"affine {matrix_text(label.affine)}, while {image.path.name} has {matrix_text(image.affine)}"
    if np.abs(np.subtract(image.spacing, label.spacing)).max() > tolerance_mm:
        what = f"spacing {_mm(label.spacing)}, while {image.path.name} has {_mm(image.spacing)}; {what}"
    if np.abs(np.abs(label.affine[:3, :3]) - np.eye(3)).max() <= tolerance_mm:
        what += " (identity-like: perhaps saved without its geometry)"
    if not allow_affine_mismatch:
        raise InputError(
            f"{label.path}: {what}; expected at most {tolerance_mm:g} mm between them; "
            "if the voxels do lie on each other, prepare with --allow-affine-mismatch, or correct the header"
        )
    warnings.warn(f"{label.path}: {what}; the image's affine is used for both", stacklevel=2)


def _mm(spacing: Iterable[float]) -> str:
    return " x ".join(f"{s:g}" for s in spacing) + " mm"


Orientation = tuple[
    tuple[int, bool], ...
]  # for each axis of the file: its place in RAS order, whether it is flipped


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, Orientation]:
    """Bring [..., X, Y, Z] to the axis order and directions nearest to RAS+, without interpolation.

    Returns: array (a view), its affine [4, 4], and what `from_ras` needs. An oblique affine stays oblique.
    """
    axes = nib.io_orientation(affine)  # [3, 2]: for each input axis its output axis, and +1 or -1
    undo = tuple((int(place), bool(sign < 0)) for place, sign in axes)
    new_affine = np.asarray(affine, np.float64) @ nib.orientations.inv_ornt_aff(
        axes, array.shape[-3:]
    )
    lead = array.ndim - 3
    flips = [slice(None)] * lead + [slice(None, None, -1 if flip else 1) for _, flip in undo]
    order = sorted(range(3), key=lambda axis: undo[axis][0])
    return (
        array[tuple(flips)].transpose(*range(lead), *(lead + axis for axis in order)),
        new_affine,
        undo,
    )


def from_ras(array: np.ndarray, undo: Orientation) -> np.ndarray:
    """The exact inverse of `to_ras` for [..., X, Y, Z]; a view."""
    lead = array.ndim - 3
    array = array.transpose(*range(lead), *(lead + place for place, _ in undo))
    return array[
        tuple([slice(None)] * lead + [slice(None, None, -1 if flip else 1) for _, flip in undo])
    ]


def orientation_name(affine: np.ndarray) -> str:
    """Three letters, the directions in which the axes grow, such as LAS."""
    return "".join(nib.aff2axcodes(affine))


def resample(
    array: np.ndarray, affine: np.ndarray, spacing: Sequence[float], order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bring [..., X, Y, Z] to `spacing` (mm); order 1 is linear (images), 0 nearest (labels).

    The new length is round(n s / s'), at least 1. Outer edges, not centres, are aligned: the first voxel's centre
    moves by (s' - s) / 2 along each axis. Outside the old centres the border value holds. No smoothing before.
    Returns: array (float32 for order 1, its own type for order 0) and affine [4, 4].
    """
    old = nib.affines.voxel_sizes(affine)
    ratio = np.asarray(spacing, np.float64) / old
    if np.abs(ratio - 1).max() < 1e-5:
        return (array.astype(np.float32, copy=False) if order else array), np.asarray(
            affine, np.float64
        )
    shape = tuple(max(1, round(n / r)) for n, r in zip(array.shape[-3:], ratio))
    step = np.eye(4)
    step[:3, :3] = np.diag(ratio)
    step[:3, 3] = (ratio - 1) / 2  # in old voxels
    new_affine = np.asarray(affine, np.float64) @ step
    return resample_to(array, affine, shape, new_affine, order), new_affine


def resample_to(
    array: np.ndarray,
    affine: np.ndarray,
    target_shape: Sequence[int],
    target_affine: np.ndarray,
    order: int,
) -> np.ndarray:
    """Read [..., X, Y, Z] at the voxel centres of another grid; order and borders as in `resample`."""
    step = np.linalg.inv(affine) @ target_affine  # target voxel -> source voxel
    diagonal = np.allclose(step[:3, :3], np.diag(np.diag(step[:3, :3])), atol=1e-9)
    matrix = (
        np.diag(step[:3, :3]) if diagonal else step[:3, :3]
    )  # a diagonal is a quicker routine of scipy
    shape, lead = tuple(int(n) for n in target_shape), array.shape[:-3]
    if array.shape[-3:] == shape and np.allclose(step, np.eye(4), atol=1e-6):
        return array.astype(np.float32) if order else array.copy()
    out = np.empty((int(np.prod(lead)), *shape), np.float32 if order else array.dtype)
    for source, target in zip(array.reshape(-1, *array.shape[-3:]), out):
        source = source.astype(np.float32, copy=False) if order else source
        ndimage.affine_transform(
            source, matrix, step[:3, 3], shape, target, order=order, mode="nearest"
        )
    return out.reshape(*lead, *shape)


# --- normalisation ---------------------------------------------------------------------------------------------------


def normalise(image: np.ndarray, spec: dict) -> np.ndarray:
    """Bring the channels of [C, X, Y, Z] to [0, 1] as dataset.json["normalisation"] says.

    spec["channels"]: for each channel either
      {"kind": "percentile", "lower": 1, "upper": 99, "zero_fraction": 0.1}: percentiles of this very volume, over
        the voxels that are not 0 where at least that fraction is exactly 0 (they stay 0), else over all voxels;
      {"kind": "window", "low": a, "high": b}: the same window for every volume (CT).
    A volume that is constant gives 0. It is meant for the publisher's own grid, before resampling blurs the zeros.
    {"kind": "none"} instead of a list of channels: the values are in [0, 1] already and are only clipped (phantoms).
    Returns: float32 [C, X, Y, Z]. Raises: InputError where the number of channels is another.
    """
    if spec.get("kind") == "none":
        return np.clip(image.astype(np.float32), 0, 1)
    rules = spec["channels"]
    if len(rules) != len(image):
        raise InputError(
            f"the image has {len(image)} channels, expected {len(rules)}; give one for each"
        )
    out = np.zeros(image.shape, np.float32)
    for values, rule, target in zip(image, rules, out):
        keep_zeros = False
        if rule["kind"] == "window":
            low, high = float(rule["low"]), float(rule["high"])
        elif rule["kind"] == "percentile":
            zeros = values.size - np.count_nonzero(values)
            keep_zeros = rule["zero_fraction"] * values.size <= zeros < values.size
            some = values[values != 0] if keep_zeros else values
            low, high = (float(p) for p in percentiles_of(some, rule))
        else:
            raise InputError(
                f"unknown normalisation {rule['kind']!r}, expected percentile or window"
            )
        if high <= low:
            continue
        for plane, result in zip(
            values, target
        ):  # plane by plane: float64 copies of a whole CT are gigabytes
            result[:] = np.clip((plane.astype(np.float64) - low) / (high - low), 0, 1)
            if keep_zeros:
                result[plane == 0] = 0
    return out


# --- windows and padding ---------------------------------------------------------------------------------------------


def read_window(
    array: np.ndarray, start: Sequence[int], size: Sequence[int], fill: float = 0
) -> np.ndarray:
    """Cut [..., *size] out of [..., X, Y, Z], which may be a memory map: only the window is read from disk.

    start: first voxel on each of the last axes; may be negative, and the window may reach beyond the end: such
    voxels get `fill`, as if the volume were padded. Returns: a new array of the same type.
    """
    axes = len(size)
    inner, place = [slice(None)] * (array.ndim - axes), [slice(None)] * (array.ndim - axes)
    for first, length, extent in zip(start, size, array.shape[array.ndim - axes :]):
        low = max(first, 0)
        high = max(min(first + length, extent), low)  # high = low where the window lies outside
        inner.append(slice(low, high))
        place.append(slice(low - first, high - first))
    out = np.full((*array.shape[: array.ndim - axes], *size), fill, array.dtype)
    out[tuple(place)] = array[tuple(inner)]
    return out


def symmetric_pad(shape: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    """Voxels in front of each axis when `shape` is padded to `target`: floor((target - n) / 2), the rest behind.

    Negative where the target is smaller (a crop). `read_window(volume, [-f for f in front], target)` pads.
    """
    return tuple((t - n) // 2 for n, t in zip(shape, target))


def centre_crop(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The inverse of padding with `symmetric_pad`: [..., *target] -> [..., *shape]."""
    front = symmetric_pad(shape, array.shape[array.ndim - len(shape) :])
    return read_window(array, front, shape)


# --- prepared data ---------------------------------------------------------------------------------------------------


class Prepared:
    """A prepared folder. Arrays are opened memory-mapped at each call: no open files pile up, no image is read whole.

    name: str. channels: names. classes: name -> value 1..K in the label (0 is background and has no entry).
    scored: name -> value, or values whose union counts: what scores are of. axes: 3, or 2 where the cases are images.
    ignore: the value in the label that no score counts, or None. meta: all of dataset.json.
    """

    def __init__(self, root: Path, meta: dict):
        self.root, self.meta = root, meta
        self.axes: int = min((len(facts["shape"]) for facts in meta["cases"].values()), default=3)
        self.ignore: int | None = meta.get("ignore")
        self.name: str = meta["name"]
        self.channels: list[str] = list(meta["channels"])
        self.classes: dict[str, int] = dict(meta["classes"])
        self._known_labels: set[str] = set()  # cases whose label was seen to hold no foreign value

    @property
    def scored(self) -> dict[str, int | list[int]]:
        """The regions where dataset.json names some (unions of labels that may overlap), else the classes."""
        return dict(self.meta.get("regions") or self.classes)

    def cases(self, split: str, limit: int | None = None) -> list[str]:
        """Case ids of train, val, test, or what else dataset.json lists, at most `limit`. Raises: InputError."""
        if split not in self.meta["splits"]:
            raise InputError(
                f"{self.root}: no split {split!r}, expected one of {', '.join(self.meta['splits'])}"
            )
        return list(self.meta["splits"][split])[:limit]

    def image(self, case: str) -> np.ndarray:
        """Memory map [C, X, Y, Z] float16 in [0, 1]; 2D: [C, Y, X] uint8."""
        return self._open(case, "image.npy")

    def label(self, case: str) -> np.ndarray:
        """Memory map [X, Y, Z], 2D [Y, X], uint8. It is read whole once, to see that all its values are known.

        Raises: InputError where the case has no label, or one with a value that is no class.
        """
        if not self.has_label(case):
            raise InputError(
                f"{self.root}: case {case} has no label, expected label.npy; use a labelled split"
            )
        label = self._open(case, "label.npy")
        if case not in self._known_labels:
            known = sorted(
                {0, *self.classes.values()} | ({self.ignore} if self.ignore is not None else set())
            )
            if label.max(initial=0) > max(self.classes.values(), default=0):  # they are consecutive
                found = [
                    (v, n)
                    for v, n in enumerate(np.bincount(np.ravel(label)))
                    if n and v not in known
                ]
                if found:
                    values = ", ".join(f"the value {v} in {n} voxels" for v, n in found)
                    raise InputError(
                        f"{self.root}/cases/{case}/label.npy holds {values}; dataset.json knows {known}; prepare the "
                        "data again"
                    )
            self._known_labels.add(case)
        return label

    def has_label(self, case: str) -> bool:
        return (self.root / "cases" / case / "label.npy").exists()

    def instances(self, case: str) -> np.ndarray | None:
        """Memory map [Y, X] int32 of object numbers, 0 = background, gaps allowed; None where the set has none."""
        return (
            self._open(case, "instances.npy")
            if self._case(case).get("objects") is not None
            else None
        )

    def spacing(self, case: str) -> tuple[float, ...]:
        """(sx, sy, sz) in mm; 2D: (1, 1), lengths count in pixels."""
        return tuple(float(s) for s in self._case(case).get("spacing_mm", (1, 1)))

    def affine(self, case: str) -> np.ndarray:
        """[4, 4] float64, prepared voxel -> mm. Volumes only."""
        return np.asarray(self._case(case)["affine"], np.float64)

    def shape(self, case: str) -> tuple[int, ...]:
        """(X, Y, Z); 2D: (Y, X)."""
        return tuple(int(n) for n in self._case(case)["shape"])

    def _case(self, case: str) -> dict:
        if case not in self.meta["cases"]:
            raise InputError(f"{self.root}: no case {case!r} in dataset.json; check the name")
        return self.meta["cases"][case]

    def _open(self, case: str, name: str) -> np.ndarray:
        path = self.root / "cases" / case / name
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as e:
            raise InputError(f"{path}: missing, expected an array; prepare the data again") from e
        except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as e:
            raise InputError(
                f"{path}: not a readable array ({e}); remove its folder and prepare again"
            ) from e


def open_prepared(path: str | os.PathLike, flags: str = "") -> Prepared:
    """Open a prepared folder, or one of `Slices`, and check each array's presence, shape and type (headers only).

    flags: more of the command that is proposed where nothing is prepared.
    Raises: InputError; where nothing is prepared it holds the command that prepares, else it lists all faults.
    """
    root = Path(path)
    file = root / "dataset.json"
    tool = next((tool for word, tool in TOOLS.items() if word in root.name), "msd")
    command = f"prepare it first: python -m data_prep.{tool} --src DIR --dst {root}{flags if tool == 'msd' else ''}"
    if not file.exists():
        what = "is empty" if root.is_dir() and not any(root.iterdir()) else "holds no dataset.json"
        if (root / "prepare.json").exists():
            what, command = (
                "was not prepared to its end",
                "run the same preparation again, it continues",
            )
        raise InputError(
            f"{root}: the data folder {what if root.is_dir() else 'does not exist'}; {command}"
        )
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["format"] > FORMAT:
            raise InputError(
                f"{file}: format {meta['format']}, expected at most {FORMAT}; use newer code"
            )
        data = (Slices if "slices" in meta else Prepared)(root, meta)
        for name, values in meta.get("regions", {}).items():
            if not values or not {*values} <= {*data.classes.values()}:
                raise ValueError(
                    f"region {name} is {values}, expected some of {[*data.classes.values()]}"
                )
        _check_splits(meta["splits"], meta["cases"])
        _ = [meta[key] for key in ("normalisation", "label_values")]
        faults = [
            fault
            for case, facts in meta["cases"].items()
            for fault in _array_faults(data, case, facts)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"{file}: not a description of prepared data ({type(e).__name__}: {e}); {command}"
        ) from e
    if faults:
        more = f" (and {len(faults) - 20} more)" if len(faults) > 20 else ""
        listed = "; ".join(faults[:20]) + more
        raise InputError(
            f"{root}: {len(faults)} faults: {listed}; remove these cases' folders and {command}"
        )
    return data


def _check_splits(splits: dict, cases: dict) -> None:
    """ValueError where a split names a case that is not there, or what is learnt is also validated or tested."""
    for name, ids in splits.items():
        if unknown := [case for case in ids if case not in cases]:
            raise ValueError(f"split {name} names {unknown[0]}, which is no case")
        if name in ("val", "test") and (both := set(ids) & set(splits.get("train", ()))):
            raise ValueError(f"{min(both)} is in the splits train and {name}")


def _array_faults(data: Prepared, case: str, facts: dict) -> list[str]:
    """What is wrong with the arrays of one case, in words."""
    faults = []
    shape = tuple(facts["shape"])
    ct_slices = isinstance(data, Slices) and data.meta["normalisation"]["kind"] == "hu"
    stored = np.dtype(np.uint8 if len(shape) == 2 else np.int16 if ct_slices else np.float16)
    wanted: list[tuple[str, tuple, np.dtype]] = [
        ("image.npy", (len(data.channels), *shape), stored)
    ]
    if facts["labelled"]:
        wanted.append(("label.npy", shape, np.dtype(np.uint8)))
    if facts.get("objects") is not None:
        wanted.append(("instances.npy", shape, np.dtype(np.int32)))
    for name, expected, dtype in wanted:
        try:
            array = data._open(case, name)
        except InputError as e:
            faults.append(str(e).split(";")[0])
            continue
        if array.shape != expected or array.dtype != dtype:
            faults.append(
                f"{case}/{name} is {array.dtype} {array.shape}, expected {dtype} {expected}"
            )
    return faults


def data_record(data: Prepared) -> dict:
    """The entry `data` of a checkpoint: all that `load_for_prediction` needs, in plain Python types.

    spacing: the common target spacing in mm, or None where each case keeps its own. Only where the set names them:
    grid; regions, what validation scores (a network may be evaluated on data with others); channel_suffixes, see
    `find_inputs`; ignore, the label value that nothing counts; slices, {"side": pixels}; reduce, see `shrink`.
    """
    keys = (
        "name",
        "channels",
        "classes",
        "label_values",
        "spacing",
        "orientation",
        "normalisation",
        "statistics",
    )
    more = [
        key
        for key in ("grid", "regions", "channel_suffixes", "ignore", "slices")
        if key in data.meta
    ]
    record = json.loads(json.dumps({key: data.meta[key] for key in (*keys, *more)}))
    reduce = data.meta.get("settings", {}).get("reduce", 1)
    return record | ({"reduce": reduce} if reduce > 1 else {})


def shrink(image: np.ndarray, k: int) -> np.ndarray:
    """Means of k x k pixels: uint8 [C, Y, X] -> [C, Y // k, X // k]; what is left over at the end is cut off."""
    rows, columns = (n // k for n in image.shape[1:])
    blocks = image[:, : rows * k, : columns * k].reshape(len(image), rows, k, columns, k)
    return np.floor(blocks.mean((2, 4)) + 0.5).astype(np.uint8)


def make_splits(
    ids: Iterable[str], seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> dict[str, list[str]]:
    """Sorted ids, shuffled by numpy's RandomState(seed): first train, then val, the rest test.

    At least one case each from three cases on; two give train and val, one gives train.
    """
    order = sorted(ids)
    n = len(order)
    np.random.RandomState(seed).shuffle(order)  # the generator of the published splits
    val = min(max(1, round(n * fractions[1])), max(n - 1, 0))
    train = min(max(1, round(n * fractions[0])), max(n - val - 1, min(n, 1)))
    return {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}


# --- prediction ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restore:
    """The way back from the network's grid to the grid of a user's file. like: that file (its first channel's)."""

    like: Nifti
    undo: Orientation
    native_shape: tuple[int, ...]  # RAS order
    native_affine: np.ndarray
    affine: np.ndarray  # of the network's grid
    label_values: dict[int, int]  # prepared -> published

    def mask(self, array: np.ndarray) -> np.ndarray:
        """uint8 [X, Y, Z] of prepared values -> the file's grid with the published values (uint8 where they fit)."""
        array = np.asarray(array, np.uint8)
        native = resample_to(array, self.affine, self.native_shape, self.native_affine, order=0)
        highest = max(self.label_values.values())
        table = np.zeros(max(self.label_values) + 1, np.uint8 if highest < 256 else np.uint16)
        for prepared, published in self.label_values.items():
            table[prepared] = published
        return np.ascontiguousarray(table[from_ras(native, self.undo)])

    def map(self, array: np.ndarray) -> np.ndarray:
        """float [..., X, Y, Z] -> float32 in the file's grid, linearly."""
        native = resample_to(array, self.affine, self.native_shape, self.native_affine, order=1)
        return np.ascontiguousarray(from_ras(native, self.undo))


def load_for_prediction(
    paths: Sequence[str | os.PathLike], record: dict
) -> tuple[np.ndarray, Restore]:
    """One case for a trained network: read, normalise, reorient and resample as the training data were.

    paths: one file for each channel, in the order of record["channels"], or a single 4D file. record: `data_record`.
    Returns: image [C, X, Y, Z] float32 in [0, 1] on the network's grid, and the way back.
    Raises: InputError for a wrong number of channels, 2D, 4D where 3D is meant, channels on different grids.
    """
    files = [read_nifti(p) for p in paths]
    image = stack_channels(files, record["channels"])
    image = normalise(image, record["normalisation"])
    ras, native_affine, undo = to_ras(image, files[0].affine)
    grid, affine = (ras, native_affine)
    if record["spacing"]:
        grid, affine = resample(ras, native_affine, record["spacing"], order=1)
    grid = np.ascontiguousarray(grid, np.float16).astype(
        np.float32
    )  # as coarse as the prepared files
    values = {int(k): int(v) for k, v in record["label_values"].items()}
    return grid, Restore(files[0], undo, ras.shape[1:], native_affine, affine, values)


def stack_channels(
    files: Sequence[Nifti], channels: Sequence[str], allow_affine_mismatch: bool = False
) -> np.ndarray:
    """[C, X, Y, Z] from one file for each channel, or from one 4D file. Raises: as load_for_prediction."""
    names = f"{len(channels)} channel{'s' * (len(channels) != 1)} ({', '.join(channels)})"
    if len(files) == 1:
        image = channels_first(files[0])
    else:
        for file in files[1:]:
            as_volume(file)
            check_same_grid(files[0], file, allow_affine_mismatch=allow_affine_mismatch)
        image = np.stack([as_volume(file) for file in files])
    if len(image) != len(channels):
        shape = _dims(files[0].data) if len(files) == 1 else f"and {len(files) - 1} more files"
        raise InputError(
            f"{files[0].path}: {shape}: channels found {len(image)}, expected {names}; give exactly these"
        )
    return image


def natural_key(name: str) -> list:
    """Sort key with which case2 comes before case10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def nifti_stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def find_inputs(
    paths: Sequence[str | os.PathLike],
    channels: int | Sequence[str],
    suffixes: Mapping[str, Sequence[str]] | None = None,
) -> list[tuple[str, list[Path]]]:
    """The cases among files, or in folders, for `predict`: [(case name, its files in channel order)], sorted.

    Files x_0000.nii.gz, x_0001.nii.gz … are the channels of case x; so are files whose names end in _ or - and a word
    of a channel, in capitals or not (x_t1.nii.gz, x-T2.nii.gz), and t1.nii.gz, t2.nii.gz in a folder x. Where such
    words tell the channels, the order of `paths` does not count, files of other names are left out with a warning,
    and a folder that holds no volume is searched below. Where names do not tell, as many files as the network has
    channels, each 3D, are one case in the order given. In folders, names that begin with . or _ are left out.
    channels: number or names. suffixes: words of a channel; without them its name is its word.
    Raises: InputError for a missing path, a folder without volumes, a channel without a file or with two.
    """
    n = channels if isinstance(channels, int) else len(channels)
    words = {} if isinstance(channels, int) else _channel_words(channels, suffixes)
    given = [Path(p) for p in paths]
    if missing := [str(p) for p in given if not p.exists()]:
        raise InputError(f"{', '.join(missing)}: no such file or folder; check the path")
    files: list[Path] = []
    for p in given:
        if not p.is_dir() and not _is_volume(p.name):
            raise InputError(
                f"{p}: no .nii or .nii.gz file (or its name begins with . or _); convert or rename it"
            )
        files += _volumes(p, words) if p.is_dir() else [p]
    if not files:
        named = f", nor below it one named as CASE_{' or CASE_'.join(words)}" if words else ""
        what = f"no .nii or .nii.gz file found{named}; give files or a folder of them"
        raise InputError(f"{', '.join(map(str, given))}: {what}")
    found, rest = _numbered_cases(files, n)
    told = {f: at for f in rest if (at := _told_by_word(f, words))}
    # files given one by one, and some of them of any name: as long as the others do not tell another order
    in_order = 1 < n == len(rest) == len(given) > len(told)
    in_order = in_order and all(told.get(f, ("", i))[1] == i for i, f in enumerate(rest))
    if in_order and all(read_nifti(f).data.ndim == 3 for f in rest):
        found.append((nifti_stem(rest[0]), rest))
    elif told and not isinstance(channels, int):
        found += _worded_cases(told, channels, words)
        if left := sorted((f.name for f in rest if f not in told), key=natural_key):
            listed = ", ".join(left[:5]) + ", …" * (len(left) > 5)
            warnings.warn(
                f"left out, since their names tell no channel: {len(left)} files ({listed})",
                stacklevel=2,
            )
    else:
        found += [(nifti_stem(f), [f]) for f in rest]
    names = [name for name, _ in found]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{', '.join(double)}: found more than once; rename, or predict the folders one by one"
        )
    return sorted(found, key=lambda case: natural_key(case[0]))


def _is_volume(name: str) -> bool:
    return name[0] not in "._" and re.search(r"\.nii(\.gz)?$", name) is not None


def _volumes(folder: Path, words: Mapping[str, int]) -> list[Path]:
    """NIfTI files in a folder; where it holds none and names below it tell channels, all that lie below it.

    A folder x.nii, as some unpackers make, stands for the file in it. Raises: InputError where one cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}); check the rights"
        ) from error

    own: list[Path] = []
    below: list[Path] = []
    seen = set()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        place = (
            own
            if Path(top) == folder or (Path(top).parent == folder and _is_volume(Path(top).name))
            else below
        )
        place += [
            file for name in names if _is_volume(name) and (file := Path(top, name)).is_file()
        ]
        folders[:] = [
            name
            for name in folders
            if _is_volume(name) or (words and not own and name[0] not in "._")
        ]
    return own or (below if any(_told_by_word(file, words) for file in below) else [])


def _numbered_cases(
    files: Sequence[Path], n: int
) -> tuple[list[tuple[str, list[Path]]], list[Path]]:
    """Cases whose files are x_0000 to n - 1, and the other files. Raises: InputError for an incomplete one."""
    groups: dict[tuple[str, str], dict[int, Path]] = {}
    for file in files:
        if match := re.fullmatch(r"(.+)_(\d{4})", nifti_stem(file)):
            groups.setdefault((str(file.parent), match[1]), {})[int(match[2])] = file
    found: list[tuple[str, list[Path]]] = []
    for (_, name), group in groups.items():
        if 0 not in group:  # x_0001 alone is a case's number, not a channel's
            continue
        if sorted(group) != list(range(n)):
            have = ", ".join(f"{i:04d}" for i in sorted(group))
            raise InputError(
                f"{group[0]}: channel files {have} of {name}, expected 0000 to {n - 1:04d}; complete it"
            )
        found.append((name, [group[i] for i in range(n)]))
    taken = {f for _, group in found for f in group}
    return found, [f for f in files if f not in taken]


def _channel_words(
    channels: Sequence[str], suffixes: Mapping[str, Sequence[str]] | None
) -> dict[str, int]:
    """Word in small letters -> place of its channel; empty where words do not tell one channel from another.

    So it is where two channels share a word, where there is one channel, and where a channel's name has no letter:
    x_1.nii.gz is rather a case's number. The last two do not hold for words that a set names itself.
    """
    pairs = [
        (word.lower(), i)
        for i, name in enumerate(channels)
        for word in (suffixes or {}).get(name, [name])
    ]
    words = dict(pairs)
    unsure = not suffixes and (
        len(channels) < 2 or not all(re.search(r"[^\W\d_]", word) for word in words)
    )
    return {} if unsure or len(words) < len(set(pairs)) else words


def _told_by_word(file: Path, words: Mapping[str, int]) -> tuple[str, int] | None:
    """(case, place of the channel) of a file named x_WORD, x-WORD, or WORD in a folder x; else None."""
    folder = Path(os.path.abspath(file)).parent
    stem = nifti_stem(file)
    if _is_volume(folder.name):  # an unpacker's folder, whose file may have any name
        stem, folder = nifti_stem(folder), folder.parent
    # the shortest x: of words such as b50 and adc-b50 the longer one counts
    match = re.fullmatch(
        rf"(?:(.+?)[_-])??({'|'.join(map(re.escape, words))})", stem, re.IGNORECASE
    )
    return (
        (match[1] or folder.name, words[match[2].lower()])
        if match and match[2].lower() in words
        else None
    )


def _worded_cases(
    told: Mapping[Path, tuple[str, int]], channels: Sequence[str], words: Mapping[str, int]
) -> list[tuple[str, list[Path]]]:
    """Cases of files whose names tell their channel. Raises: InputError that lists all missing and double files."""
    cases: dict[str, dict[int, list[Path]]] = {}
    for file, (case, place) in sorted(told.items()):
        cases.setdefault(case, {}).setdefault(place, []).append(file)
    faults = []
    for case in sorted(cases, key=natural_key):
        folder = min(file.parent for files in cases[case].values() for file in files)
        for place, channel in enumerate(channels):
            files = cases[case].get(place, [])
            wanted = " or ".join(f"{case}_{word}.nii.gz" for word in words if words[word] == place)
            if not files:
                faults.append(f"{folder}: case {case} has no {channel}, expected {wanted}")
            elif len(files) > 1:
                listed = " and ".join(map(str, files))
                faults.append(
                    f"{folder}: case {case} has {len(files)} files for {channel}, expected one: {listed}"
                )
    if faults:
        more = f" (and {len(faults) - 20} more faults)" * (len(faults) > 20)
        remedy = "add, rename or take away files, or predict the other cases by themselves"
        raise InputError(f"{' | '.join(faults[:20])}{more}; {remedy}")
    return [
        (case, [group[place][0] for place in range(len(channels))]) for case, group in cases.items()
    ]


# --- phantoms --------------------------------------------------------------------------------------------------------

# Normals of the lamellae of class 1, 2, ...: the 13 lines through a voxel and its neighbours; the first four lie in
# the plane, so 2D images share them (and repeat them with a wider period from class 5 on). Every pair is >= 35 degrees
# apart. Mirroring an axis keeps classes 1, 2 and 5 but turns diagonal classes into each other, as it would left and
# right organs.
NORMALS = np.array(
    [
        (1, 0, 0),
        (0, 1, 0),
        (1, 1, 0),
        (1, -1, 0),
        (0, 0, 1),
        (1, 0, 1),
        (0, 1, 1),
        (1, 0, -1),
        (0, 1, -1),
        (1, 1, 1),
        (1, 1, -1),
        (1, -1, 1),
        (-1, 1, 1),
    ],
    dtype=float,
)
PERIOD = 4.5  # of the lamellae, in voxels of the coarsest axis that their normal has a part in
TEXTURE_SD = 0.14  # of lamellae and of tissue alike; the image lies in [0, 1]
CONTRAST = (0.03, 0.12)  # |mean of a blob - mean of the tissue|; the sign is drawn too


def _smooth_field(rng, shape, modes):
    """Random sum of `modes[a]` cosines along each axis a -> float32 [*shape], mean 0, SD 1."""
    field = rng.standard_normal(modes)
    for n, m in zip(shape, modes):
        wave = np.cos(np.pi * np.outer(np.arange(m), (np.arange(n) + 0.5) / n))  # [m, n]
        field = np.tensordot(
            field, wave, axes=(0, 0)
        )  # the axis just done moves to the end: after all, the old order
    field -= field.mean()
    return (field / (field.std() + 1e-8)).astype(np.float32)


def _place_blobs(rng, extent, spacing, classes):
    """Centres and half axes in mm of `classes` organs, then of as many distractors + 1: two arrays [N, ndim]."""
    ndim, count = len(extent), 2 * classes + 1
    sphere = np.pi if ndim == 2 else 4 * np.pi / 3
    radius = min(
        (0.3 * np.prod(extent) / count / sphere) ** (1 / ndim), 0.25 * extent.min()
    )  # blobs fill 30 %
    stretch = rng.uniform(-0.2, 0.2, (count, ndim))
    half = (
        radius
        * rng.uniform(0.88, 1.12, (count, 1))
        * np.exp(stretch - stretch.mean(1, keepdims=True))
    )
    half[classes : 2 * classes] = half[:classes]  # each organ has a distractor of its own size
    # Anatomical prior: class k's home, in fractions of the box; the irrational steps spread any number of classes.
    k = np.arange(classes)
    home = np.stack(
        [(k + 0.5) / classes, (0.3 + 0.4142 * k) % 1, (0.3 + 0.6180 * k) % 1][:ndim], axis=1
    )
    centres = np.zeros((0, ndim))
    for i in range(count):
        margin = np.maximum(
            0.15 * extent, 0.75 * half[i]
        )  # keeps most of the blob, and its centre, in the body
        if i < classes:
            tries = (0.5 + 0.6 * (home[i] - 0.5) + 0.08 * rng.standard_normal((60, ndim))) * extent
        else:
            tries = rng.random((60, ndim)) * extent
        # On a voxel's centre, where the blob's level is 0, so that even a tiny blob has one voxel.
        tries = (np.floor(np.clip(tries, margin, extent - margin) / spacing) + 0.5) * spacing
        distance = np.linalg.norm(tries[:, None] - centres[None], axis=2)  # [60, i]
        gap = (distance - 1.1 * (half[i].mean() + half[:i].mean(1))).min(
            1, initial=0
        )  # 0: touches no other blob
        centres = np.vstack(
            [centres, tries[gap.argmax()]]
        )  # the first free place, else the least crowded
    return centres, half


def phantom(
    seed: int, index: int, shape=(48, 48, 32), spacing=(1.0, 1.0, 1.5), channels=1, classes=2
) -> tuple[np.ndarray, np.ndarray]:
    """Draw toy scan `index` -> image float32 [C, *shape] in [0, 1], label uint8 [*shape] with values 0..classes.

    Blobs of random contrast lie in noisy tissue. An organ is told from a distractor of the same size and contrast, and
    from the other organs, by its lamellae: their direction is the class. Lamellae and tissue have the same Gaussian
    distribution of intensities, so no threshold finds them; each class also has a usual place. `shape` has 2 or 3
    axes, `spacing` is in mm (anatomy is drawn in mm: the same box at another spacing holds the same organs),
    `classes` is 1..13. All depends on (seed, index) and these arguments only, not on earlier calls; seed, index >= 0.
    """
    shape, spacing = tuple(shape), np.asarray(spacing, float)[: len(shape)]
    if len(shape) not in (2, 3) or len(spacing) != len(shape) or not 1 <= classes <= len(NORMALS):
        raise ValueError(
            f"phantom: shape {shape}, spacing {spacing}, {classes} classes; expected 2 or 3 axes, a "
            f"spacing for each and 1 to {len(NORMALS)} classes; change these arguments"
        )
    rng = np.random.default_rng((seed, index))
    ndim, extent = len(shape), np.array(shape) * spacing  # mm

    # 1. Anatomy, before any draw whose size depends on the voxels.
    centres, half = _place_blobs(rng, extent, spacing, classes)
    modes = 2 + np.ceil(extent / (1.5 * half.mean())).astype(int)
    bumps = np.clip(_smooth_field(rng, shape, modes), -2, 2)
    axes = [
        ((np.arange(n) + 0.5) * s).astype(np.float32) for n, s in zip(shape, spacing)
    ]  # mm, voxel centres
    level = np.full(
        shape, np.inf, np.float32
    )  # of the nearest blob: 0 at its centre, 1 on its surface
    owner = np.full(shape, -1, np.int8)  # which blob that is
    for i, (centre, h) in enumerate(zip(centres, half)):
        lo = np.maximum(np.floor((centre - 2 * h) / spacing), 0).astype(int)
        box = tuple(
            slice(a, b) for a, b in zip(lo, np.ceil((centre + 2 * h) / spacing).astype(int))
        )
        offsets = np.ix_(*[(x[b] - c) / r for x, b, c, r in zip(axes, box, centre, h)])
        mine = np.sqrt(sum(o**2 for o in offsets)) * (1 + 0.15 * bumps[box])
        nearer = mine < level[box]  # blobs that meet share the border where their levels are equal
        level[box][nearer] = mine[nearer]
        owner[box][nearer] = i
    # A rounded box, cut off by the first and last slice in 3D, as a scan of a trunk is.
    body = (
        sum(np.abs(u) ** 4 for u in np.ix_(*[2 * x / e - 1 for x, e in zip(axes[:2], extent)]))
        < 0.85
    )
    body = body.reshape(body.shape + (1,) * (ndim - 2))  # [X, Y] or [X, Y, 1]
    owner[(level > 1) | ~body] = -1
    label = np.where(owner < classes, owner + 1, 0).astype(np.uint8)
    contrast = rng.choice((-1, 1), (channels, len(half))) * rng.uniform(
        *CONTRAST, (channels, len(half))
    )
    contrast[:, classes : 2 * classes] = contrast[
        :, :classes
    ]  # the distractor of the same size has the same contrast
    tissue = rng.uniform(0.42, 0.52, channels)
    bias = 1 + 0.08 * np.clip(_smooth_field(rng, shape, (3,) * ndim), -2, 2)

    # 2. Texture: correlated noise, and in organ k lamellae across its normal, slightly tilted and bent.
    blur = 0.18 * PERIOD * spacing.max() / spacing
    texture = ndimage.gaussian_filter(
        rng.standard_normal(shape, dtype=np.float32), np.minimum(blur, 2.0), mode="wrap"
    )
    texture /= texture.std()
    for k in range(classes):
        normal = NORMALS[k % (4 if ndim == 2 else 13), :ndim]
        period = PERIOD * spacing[normal != 0].max() * 1.5 ** (k // 4 if ndim == 2 else 0)  # mm
        normal = normal / np.linalg.norm(normal) + 0.08 * rng.standard_normal(ndim)
        inside = np.nonzero(label == k + 1)
        turns = (
            sum(n * x[at] for n, x, at in zip(normal, axes, inside)) / period
            + 0.12 * bumps[inside]
            + rng.random()
        )
        # A triangle wave is uniform on [0, 1]; the normal quantile gives it the tissue's Gaussian distribution.
        texture[inside] = ndtri(0.01 + 0.98 * np.abs(2 * (turns % 1) - 1))

    # 3. Image: the body in dark air, a thin dark capsule round each blob, bias field, noise of the scanner.
    capsule = np.exp(-(((level - 1) * half.mean() / spacing.min()) ** 2))
    image = np.empty((channels, *shape), np.float32)
    for c in range(channels):
        step = np.append(contrast[c], 0.0).astype(np.float32)[
            owner
        ]  # owner -1 reads the 0 at the end
        inside = tissue[c] + step + TEXTURE_SD * texture - 0.08 * capsule
        image[c] = np.where(body, inside, 0.06) * bias
        image[c] += rng.uniform(0.015, 0.03) * rng.standard_normal(shape, dtype=np.float32)
    return np.clip(image, 0, 1), label


class Phantoms:
    """`--data synthetic`: the interface of `Prepared` over phantoms that are drawn when asked for and then kept.

    seed: of all phantoms; counts: cases in train, val and test. Nothing is read or written.
    """

    def __init__(
        self,
        seed: int = 0,
        counts: tuple[int, int, int] = (64, 4, 10),
        shape: tuple[int, ...] = (48, 48, 32),
    ):
        self.root, self.name, self.seed, self.grid = Path("."), "synthetic", seed, shape
        self.classes = {"striped across x": 1, "striped across y": 2}
        self.channels = ["intensity"]
        names = [f"phantom_{i:04d}" for i in range(sum(counts))]
        first, second = counts[0], counts[0] + counts[1]
        self.meta: dict[str, Any] = {
            "format": FORMAT,
            "name": "synthetic",
            "source": f"phantoms of seed {seed}",
            "channels": self.channels,
            "classes": self.classes,
            "label_values": {"0": 0, "1": 1, "2": 2},
            "normalisation": {"kind": "none"},
            "statistics": {"shape_median": list(shape), "spacing_median_mm": [1.0, 1.0, 1.5]},
            "orientation": "RAS",
            "spacing": [1.0, 1.0, 1.5],  # mm
            "splits": {"train": names[:first], "val": names[first:second], "test": names[second:]},
        }
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def scored(self) -> dict[str, int | list[int]]:
        """What scores are of: the classes."""
        return dict(self.classes)

    def cases(self, split: str, limit: int | None = None) -> list[str]:
        return self.meta["splits"][split][:limit]

    def _draw(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        if case not in self._kept:
            self._kept[case] = phantom(
                self.seed, int(case.split("_")[1]), self.grid, self.meta["spacing"]
            )
        return self._kept[case]

    def image(self, case: str) -> np.ndarray:
        return self._draw(case)[0]

    def label(self, case: str) -> np.ndarray:
        return self._draw(case)[1]

    def has_label(self, case: str) -> bool:
        return True

    def shape(self, case: str) -> tuple[int, ...]:
        return self.grid

    def spacing(self, case: str) -> tuple[float, ...]:
        return tuple(self.meta["spacing"])

    def affine(self, case: str) -> np.ndarray:
        return np.diag([*self.spacing(case), 1.0])


def open_data(name: str, seed: int = 0, axes: int = 3) -> Prepared | Phantoms:
    """`--data`: `synthetic`, a prepared folder, or the name of one below data/. InputError where it is none of them.

    axes: 3 where the script works on volumes, 2 where it works on images; a folder of the other kind is refused.
    """
    if name == "synthetic":
        return Phantoms(seed)
    folder = Path(name)
    data = open_prepared(
        folder
        if (folder / "dataset.json").exists() or folder.is_absolute()
        else Path("data") / name
    )
    if isinstance(data, Slices):
        wanted = {2: "images", 3: "volumes"}[axes]
        raise InputError(
            f"{data.root}: holds slices, expected {wanted}; prepare without --as-slices to another folder"
        )
    if data.axes != axes:
        kinds = {2: "images", 3: "volumes"}
        raise InputError(
            f"{data.root}: holds {kinds[data.axes]}, expected {kinds[axes]}; choose another --data"
        )
    return data


def write_on_grid(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a mask or map [X, Y, Z] of a prepared case as NIfTI, in its own number type; affine: the case's."""
    image = nib.Nifti1Image(np.zeros(array.shape, np.uint8), affine)
    spacing = tuple(float(v) for v in nib.affines.voxel_sizes(affine))
    nowhere = Path()  # the grid is no file's, so the mask may be written again
    like = Nifti(np.asarray(image.dataobj), affine, spacing, image.header, nowhere)
    write_nifti(path, array, like, array.dtype)


# --- slices ----------------------------------------------------------------------------------------------------------

FOV_FLOOR = -1024  # HU; scanners fill what lies outside their field of view with -2000 or -3024


def as_display(array: np.ndarray) -> np.ndarray:
    """Axial RAS slice [X, Y, ...] -> [rows, columns, ...], a view: front on top, the patient's right on the left."""
    return array.swapaxes(0, 1)[::-1, ::-1]


def from_display(array: np.ndarray) -> np.ndarray:
    """[rows, columns, ...] -> [X, Y, ...], the exact inverse of `as_display`. A view."""
    return array[::-1, ::-1].swapaxes(0, 1)


def linear_weights(n: int, m: int, ratio: float) -> np.ndarray:
    """[m, n] float32: each row reads n samples at one of m places, linearly; ratio: new distance / old.

    Outer edges are aligned (half-pixel centres: place i is (i + 1/2) ratio - 1/2), beyond the old centres the border
    value holds, and nothing is smoothed before: torch's interpolate with align_corners=False, antialias=False.
    """
    at = np.clip((np.arange(m) + 0.5) * ratio - 0.5, 0, n - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n))).astype(np.float32)


def nearest_index(n: int, m: int, ratio: float) -> np.ndarray:
    """[m] integers: the nearest of n samples for each place of `linear_weights`."""
    return np.clip(np.floor((np.arange(m) + 0.5) * ratio), 0, n - 1).astype(int)


@dataclass(frozen=True)
class SliceGrid:
    """How one RAS volume becomes square slices, and back: padded to a square, resized, slices respaced.

    shape: (X, Y, Z) of the volume. side: pixels. ratio: distance of the new slices / of the old ones, 1 keeps them.
    """

    shape: tuple[int, ...]
    side: int
    ratio: float = 1.0

    @classmethod
    def of(
        cls, shape: Sequence[int], affine: np.ndarray, side: int, spacing: Sequence[float] | None
    ) -> "SliceGrid":
        """spacing: mm, RAS order, of which only the distance of slices counts; within 1 % of it they are kept."""
        ratio = spacing[2] / float(nib.affines.voxel_sizes(affine)[2]) if spacing else 1.0
        return cls(tuple(shape), side, ratio if abs(ratio - 1) > 0.01 else 1.0)

    @property
    def depth(self) -> int:
        """Number of slices."""
        return max(1, round(self.shape[2] / self.ratio))

    @property
    def square(self) -> int:
        """Pixels of the padded slice's side."""
        return max(self.shape[:2])

    @property
    def front(self) -> tuple[int, ...]:
        """Pixels of padding in front of x and y."""
        return symmetric_pad(self.shape[:2], (self.square, self.square))

    def affine(self, native: np.ndarray) -> np.ndarray:
        """[4, 4] of the slices, from that of the volume."""
        ratio = np.array([self.square / self.side, self.square / self.side, self.ratio])
        step = np.diag([*ratio, 1.0])
        step[:3, 3] = (ratio - 1) / 2 - [*self.front, 0]  # first centre, in old voxels
        return np.asarray(native, np.float64) @ step

    def image(self, volume: np.ndarray, fill: float, floor: float = -np.inf) -> np.ndarray:
        """[X, Y, Z] -> float32 [side, side, depth], linearly; fill: of the padding; floor: lower values are raised."""
        weights = linear_weights(self.square, self.side, self.square / self.side)
        out = np.empty((self.side, self.side, self.shape[2]), np.float32)
        start = [-f for f in self.front]
        for k in range(self.shape[2]):  # slice by slice: a float copy of a whole CT is large
            plane = np.maximum(volume[:, :, k].astype(np.float32), np.float32(floor))
            out[:, :, k] = (
                weights @ read_window(plane, start, (self.square, self.square), fill) @ weights.T
            )
        return (
            out
            if self.ratio == 1
            else out @ linear_weights(self.shape[2], self.depth, self.ratio).T
        )

    def label(self, volume: np.ndarray) -> np.ndarray:
        """[X, Y, Z] -> [side, side, depth] of the same type, nearest; the padding is 0."""
        plane = nearest_index(self.square, self.side, self.square / self.side)
        padded = read_window(
            volume, [*(-f for f in self.front), 0], (self.square, self.square, self.shape[2])
        )
        return padded[np.ix_(plane, plane, nearest_index(self.shape[2], self.depth, self.ratio))]

    def classes(self, logits: np.ndarray) -> np.ndarray:
        """Logits [depth, C, side, side] in display orientation -> uint8 [X, Y, Z] of the most likely classes.

        Each slice is resized linearly before the maximum is taken, which keeps edges finer than a resized mask has;
        a slice of the volume takes the nearest of `depth`. Needs memory for C slices of the volume.
        """
        weights = linear_weights(self.side, self.square, self.side / self.square)
        x, y = (
            weights[f : f + n] for f, n in zip(self.front, self.shape)
        )  # the padding is never computed
        out = np.empty(self.shape, np.uint8)
        source = nearest_index(self.depth, self.shape[2], 1 / self.ratio)
        for k in np.unique(source):
            plane = np.asarray(logits[k], np.float32)[:, ::-1, ::-1].swapaxes(
                1, 2
            )  # [C, side x, side y]
            out[:, :, source == k] = (x @ plane @ y.T).argmax(0)[..., None]
        return out


def check_intensities(nifti: Nifti, ct: bool) -> None:
    """Raise InputError where values cannot be Hounsfield units (ct), or counted as whole numbers of 16 bits."""
    low, high = float(nifti.data.min()), float(nifti.data.max())
    found = f"{nifti.path}: intensities from {low:g} to {high:g}"
    if ct and low >= 0:
        remedy = "name the modality MR, or subtract 1024"
        raise InputError(
            f"{found}, expected Hounsfield units, which fall below 0; MR, a label, or HU + 1024? {remedy}"
        )
    if low < -32768 or high > 32767 or high - low < 100:
        wanted = "Hounsfield units" if ct else "a range of 100 or more, of 16 bits"
        remedy = "get the original values" if ct else "use --norm case"
        raise InputError(f"{found}, expected {wanted}; {remedy}")


def slices_of(volume: np.ndarray, grid: SliceGrid, rule: dict) -> np.ndarray:
    """RAS [X, Y, Z] -> [side, side, depth] as it is stored; rule: dataset.json["normalisation"] of slices.

    {"kind": "hu", "low", "high", "fov_pad"}: int16 HU, with "raise" nothing below -1024, padded with low.
    {"kind": "percentile-slices", "lower", "upper"}: float16 in [-1, 1], between the two percentiles of this very volume
      over all its voxels, or between the rule's own "low" and "high" where it has them (--norm corpus).
    """
    if rule["kind"] == "hu":
        floor = FOV_FLOOR if rule["fov_pad"] == "raise" else -np.inf
        return np.rint(grid.image(volume, rule["low"], floor)).astype(np.int16)
    window = [rule["low"], rule["high"]] if "low" in rule else percentiles_of(volume, rule)
    low, high = (float(v) for v in window)
    return to_unit(grid.image(volume, low), low, high).astype(np.float16)


def percentiles_of(volume: np.ndarray, rule: dict) -> np.ndarray:
    """The rule's `lower` and `upper` percentile of all values; numpy's differences of 16-bit integers would wrap."""
    narrow = volume.dtype.kind in "iu" and volume.dtype.itemsize < 4
    return np.percentile(
        volume.astype(np.int32) if narrow else volume, [rule["lower"], rule["upper"]]
    )


def to_unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip to [low, high] and bring to float32 in [-1, 1]; all -1 where high = low (a constant volume)."""
    return 2 * (np.clip(values, low, high).astype(np.float32) - low) / max(high - low, 1e-12) - 1


def stored_to_unit(stored: np.ndarray, rule: dict) -> np.ndarray:
    """What `slices_of` gave -> float32 in [-1, 1], what networks see."""
    return (
        to_unit(stored, rule["low"], rule["high"])
        if rule["kind"] == "hu"
        else stored.astype(np.float32)
    )


class Slices(Prepared):
    """A prepared folder of square axial slices; all else as `Prepared`.

    image(case) [1, X, Y, Z], X = Y = side: int16 HU (CT) or float16 in [-1, 1]; label(case) [X, Y, Z] uint8. Both are
    memory maps in Fortran order, so that a slice [..., k] lies in one piece on the disk.
    """

    @property
    def side(self) -> int:
        """Pixels."""
        return int(self.meta["slices"]["side"])

    def depth(self, case: str) -> int:
        """Number of slices."""
        return self.shape(case)[2]

    def slice(self, case: str, k: int) -> np.ndarray:
        """Slice k, counted from the feet -> float32 [side, side] in [-1, 1], as on a screen (`as_display`)."""
        stored = as_display(self.image(case)[0, :, :, k])
        return np.ascontiguousarray(stored_to_unit(stored, self.meta["normalisation"]))

    def slice_label(self, case: str, k: int) -> np.ndarray:
        """uint8 [side, side] of the same slice, as on a screen."""
        return np.ascontiguousarray(as_display(self.label(case)[:, :, k]))


@dataclass(frozen=True)
class SliceRestore:
    """The way back from slices to the grid of a user's file. like: that file."""

    like: Nifti
    undo: Orientation
    grid: SliceGrid
    label_values: dict[int, int]  # prepared -> published

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """float32 [Z, C, side, side] -> [X, Y, Z] of the file with the published values (uint8 where they fit)."""
        expected = (self.grid.depth, len(self.label_values), self.grid.side, self.grid.side)
        if logits.shape != expected:
            raise ValueError(
                f"logits {tuple(logits.shape)} of {self.like.path}, expected {expected}"
            )
        highest = max(self.label_values.values())
        table = np.zeros(len(self.label_values), np.uint8 if highest < 256 else np.uint16)
        for prepared, published in self.label_values.items():
            table[prepared] = published
        return np.ascontiguousarray(table[from_ras(self.grid.classes(logits), self.undo)])


def load_slices_for_prediction(
    path: str | os.PathLike, record: dict
) -> tuple[np.ndarray, SliceRestore]:
    """One volume for a trained network: what the preparation of slices does, to a raw file.

    record: `data_record` of slices. Returns: float32 [Z, side, side] in [-1, 1], display orientation, and the way back.
    Raises: InputError for 2D, 4D, and where a CT is expected values that are no Hounsfield units.
    """
    file, rule = read_nifti(path), record["normalisation"]
    image = stack_channels([file], record["channels"])
    if rule["kind"] == "hu" or "low" in rule:
        check_intensities(file, rule["kind"] == "hu")
    volume, affine, undo = to_ras(image[0], file.affine)
    grid = SliceGrid.of(volume.shape, affine, record["slices"]["side"], record["spacing"])
    x = stored_to_unit(as_display(slices_of(volume, grid, rule)), rule)  # [side, side, Z]
    values = {int(k): int(v) for k, v in record["label_values"].items()}
    return np.ascontiguousarray(np.moveaxis(x, 2, 0)), SliceRestore(file, undo, grid, values)


def open_slices(name: str, seed: int = 0, side: int = 32) -> "Slices | CtPhantoms":
    """`--data` of a script that works on slices: as `open_data`. seed, side: of the synthetic ones.

    Raises: InputError; where the folder holds volumes or images, with the command that makes slices.
    """
    if name == "synthetic":
        return CtPhantoms(seed, side)
    folder = Path(name)
    folder = (
        folder
        if (folder / "dataset.json").exists() or folder.is_absolute()
        else Path("data") / name
    )
    data = open_prepared(folder, " --as-slices")
    if not isinstance(data, Slices):
        kind = "volumes" if data.axes == 3 else "images"
        command = f"python -m data_prep.msd --src DIR --dst {data.root}-slices --as-slices"
        raise InputError(f"{data.root}: holds {kind}, expected slices; prepare them: {command}")
    return data


# --- fake bodies -----------------------------------------------------------------------------------------------------

CT_ORGANS = ("liver", "spleen", "left kidney", "right kidney")
CT_FIELD, CT_DEPTH = 320.0, 12  # mm across a slice; slices, 8 mm apart
# Places of the organs in units of the body's half widths (x to the patient's right, y to the front) and of half the
# scanned height (z to the head), and half axes in the same units.
CT_PLACES = ((0.42, 0.12, 0.35), (-0.58, -0.38, 0.30), (-0.36, -0.42, -0.45), (0.36, -0.42, -0.55))
CT_HALVES = ((0.40, 0.52, 0.75), (0.17, 0.26, 0.50), (0.16, 0.20, 0.50), (0.16, 0.20, 0.50))


def ct_phantom(seed: int, index: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Draw toy CT `index` -> HU int16 [side, side, 12], label uint8 of the same shape, values of CT_ORGANS from 1 on.

    RAS, 320 / side mm in the plane, 8 mm slices; the same anatomy at every side. Skin, fat, muscle wall, spine, ribs,
    lungs above, and in the fat of the belly four organs among bowel loops, vessels and a stomach of the same HU give or
    take 20, under noise of SD 12: an organ is told by its place and shape. All depends on (seed, index) only.
    """
    rng = np.random.default_rng((seed, index, 4))
    # 1. Anatomy, before any draw whose size depends on the pixels.
    width = np.array(
        [rng.uniform(125, 150), rng.uniform(90, 112), 8.0 * CT_DEPTH / 2]
    )  # mm, half axes, half height
    centre = rng.normal(0, (4, 4, 0)) - (
        0,
        0,
        rng.uniform(-6, 6),
    )  # the body's, mm from the middle of the scan
    spots = np.array(CT_PLACES) + rng.normal(0, (0.04, 0.04, 0.12), (4, 3))
    halves = np.array(CT_HALVES) * rng.uniform(0.82, 1.18, (4, 3))
    loops = rng.integers(
        9, 14
    )  # stomach, bowel: anywhere in front of the spine, the organs lie over them
    loop_spots = rng.uniform((-0.65, -0.35, -1.1), (0.65, 0.62, 0.9), (loops, 3))
    loop_halves = rng.uniform(0.10, 0.24, (loops, 3)) * (1, 1.2, 2.0)
    organ_hu = (58, 50, 44) + rng.normal(0, (7, 7, 5))  # liver, spleen, both kidneys
    loop_hu, muscle, fat = rng.uniform(25, 75, loops), rng.uniform(48, 62), rng.uniform(-112, -92)
    bumps = 1 + 0.10 * np.clip(_smooth_field(rng, (side, side, CT_DEPTH), (9, 9, 4)), -2, 2)
    ribs, turn = rng.integers(7, 10), rng.uniform(0, 2 * np.pi)

    # 2. Drawn from the back to the front; u: place in units of the body.
    extent = np.array([CT_FIELD, CT_FIELD, 8.0 * CT_DEPTH])  # mm
    at = [((np.arange(n) + 0.5) / n - 0.5) * e for n, e in zip((side, side, CT_DEPTH), extent)]
    u = np.ix_(*(((a - c) / w).astype(np.float32) for a, c, w in zip(at, centre, width)))

    def level(spot: Sequence[float], half: Sequence[float]) -> np.ndarray:
        """[X, Y, Z]: 0 in the middle of a bent ellipsoid, below 1 inside."""
        return np.sqrt(sum(np.square((x - s) / h) for x, s, h in zip(u, spot, half))) * bumps

    radius = np.hypot(u[0], u[1])  # [X, Y, 1]
    image = np.full((side, side, CT_DEPTH), -1000, np.float32)
    label = np.zeros(image.shape, np.uint8)
    for edge, value in ((1.0, fat), (0.88, muscle), (0.78, fat)):
        image[np.broadcast_to(radius < edge, image.shape)] = value
    rib = (np.abs(radius - 0.83) < 0.05) & (
        np.cos(ribs * np.arctan2(u[1], u[0]) + turn + 2 * u[2]) > 0.75
    )
    image[rib] = 380
    for spot, half, value in zip(loop_spots, loop_halves, loop_hu):
        image[(level(spot, half) < 1) & (radius < 0.78)] = value
    for organ, (spot, half) in enumerate(zip(spots, halves), 1):
        inside = (level(spot, half) < 1) & (radius < 0.80)
        image[inside], label[inside] = organ_hu[min(organ - 1, 2)], organ
    for way in (-1, 1):  # lungs: their bases reach into the upper slices, over liver and spleen
        lung = (level((0.42 * way, 0.0, 1.45), (0.36, 0.62, 0.85)) < 1) & (radius < 0.80)
        image[lung], label[lung] = -850, 0
    for spot, half, value in (
        ((0, -0.62), 0.17, 420),
        ((-0.04, -0.33), 0.08, organ_hu[0] + 8),
    ):  # spine, aorta
        tube = np.broadcast_to(np.hypot(u[0] - spot[0], u[1] - spot[1]) < half, image.shape)
        image[tube], label[tube] = value, 0

    # 3. The scanner: a slight blur in the plane, noise.
    image = ndimage.gaussian_filter(image, (0.5, 0.5, 0)) + 12 * rng.standard_normal(image.shape)
    return np.rint(np.clip(image, FOV_FLOOR, 3071)).astype(np.int16), label


class CtPhantoms(Slices):
    """`--data synthetic` of scripts that work on slices: `Slices` over drawn CT, kept once drawn; no files.

    48 cases without label for pre-training, and 12, 2 and 24 labelled ones in train, val and test.
    """

    def __init__(self, seed: int = 0, side: int = 32):
        names = [f"ct_{i:03d}" for i in range(86)]
        splits = {
            "train": names[:12],
            "val": names[12:14],
            "test": names[14:38],
            "unlabelled": names[38:],
        }
        splits["pretrain"] = splits["unlabelled"] + splits["train"]
        spacing = [CT_FIELD / side, CT_FIELD / side, 8.0]  # mm
        facts = {
            "shape": [side, side, CT_DEPTH],
            "spacing_mm": spacing,
            "affine": np.diag([*spacing, 1.0]).tolist(),
        }
        meta: dict[str, Any] = {
            "format": FORMAT,
            "name": "synthetic",
            "source": f"phantoms of seed {seed}",
            "channels": ["CT"],
            "classes": {name: value for value, name in enumerate(CT_ORGANS, 1)},
            "label_values": {str(value): value for value in range(len(CT_ORGANS) + 1)},
            "slices": {"side": side},
            "spacing": spacing,
            "orientation": "RAS",
            "normalisation": {
                "kind": "hu",
                "low": -1000.0,
                "high": 400.0,
                "percentiles": [0.5, 99.5],
                "fov_pad": "raise",
            },
            "statistics": {
                "slices": {split: CT_DEPTH * len(cases) for split, cases in splits.items()}
            },
            "splits": splits,
            "cases": {
                name: {**facts, "labelled": name not in splits["unlabelled"]} for name in names
            },
        }
        super().__init__(Path("."), meta)
        self.seed = seed
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def has_label(self, case: str) -> bool:
        return self._case(case)["labelled"]

    def _open(self, case: str, name: str) -> np.ndarray:
        self._case(case)  # refuses unknown names
        if case not in self._kept:
            image, label = ct_phantom(self.seed, int(case.split("_")[1]), self.side)
            self._kept[case] = np.asfortranarray(image[None]), np.asfortranarray(label)
        return self._kept[case][name == "label.npy"]


# --- fake tissue -----------------------------------------------------------------------------------------------------


def tissue(
    seed: int, index: int, shape: tuple[int, int] = (112, 144)
) -> tuple[np.ndarray, np.ndarray]:
    """Draw toy section `index` -> image uint8 [3, Y, X] (RGB), gland numbers int32 [Y, X], 0 = outside.

    3 to 8 glands (bent ellipses: pale lumen, wall of the ground's own pink, a rim of dark nuclei) in fibrous ground
    with loose nuclei and pale gaps, so that no colour belongs to glands alone. The stain differs from image to image.
    """
    rng = np.random.default_rng((seed, index, 2))
    y, x = np.indices(shape).astype(np.float32)
    number, level = np.zeros(shape, np.int32), np.full(shape, np.inf, np.float32)
    bumps = np.clip(_smooth_field(rng, shape, (7, 9)), -2, 2)
    centres: list[tuple[float, float, float]] = []
    wanted = int(rng.integers(3, 9))
    for _ in range(200):
        half = rng.uniform(14, 24)
        cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        if len(centres) == wanted or any(
            np.hypot(cy - a, cx - b) < 1.05 * (half + r) for a, b, r in centres
        ):
            continue
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(1, 1.4)
        u = (np.cos(turn) * (y - cy) + np.sin(turn) * (x - cx)) / half * stretch
        v = (np.cos(turn) * (x - cx) - np.sin(turn) * (y - cy)) / half
        mine = np.hypot(u, v) * (1 + 0.1 * bumps)
        centres.append((cy, cx, half))
        number[(mine < 1) & (mine < level)] = len(centres)
        level = np.minimum(level, mine)
    fibres = ndimage.gaussian_filter(rng.standard_normal(shape), (1, 5)) * 9 * np.sqrt(5)
    gaps = _smooth_field(rng, shape, (10, 14)) > 1.3  # pale, as lumina are
    pale = np.where(level < 1, level < 0.45, gaps & (level > 1.25))
    # Nuclei: crowded along the walls' outer half, loose outside; dark discs of radius 1.8 about random points.
    crowd = np.where(
        (level > 0.68) & (level < 0.98), 0.09, np.where((level > 1.15) & ~gaps, 0.016, 0.0)
    )
    nuclei = ndimage.distance_transform_edt(rng.random(shape) >= crowd) < 1.8
    ground = np.array([0.86, 0.60, 0.74])[:, None, None] + 0.02 * fibres  # [3, Y, X]
    ground = np.where(pale, np.array([0.93, 0.88, 0.92])[:, None, None], ground)
    image = np.where(nuclei & ~pale, np.array([0.42, 0.28, 0.58])[:, None, None], ground)
    image = ndimage.gaussian_filter(image, (0, 0.6, 0.6)) ** rng.uniform(
        0.75, 1.35, (3, 1, 1)
    )  # stain
    image = image + 0.02 * rng.standard_normal(image.shape)
    return np.clip(255 * image, 0, 255).astype(np.uint8), number


class Tissue:
    """`--data synthetic` of scripts that work on images: the interface of `Prepared` over drawn sections."""

    def __init__(
        self, seed: int = 0, counts: tuple[int, int] = (32, 10), shape: tuple[int, int] = (112, 144)
    ):
        self.root, self.name, self.seed, self.grid, self.ignore = (
            Path("."),
            "synthetic",
            seed,
            shape,
            None,
        )
        self.axes, self.classes, self.channels = 2, {"gland": 1}, ["red", "green", "blue"]
        names = [f"tissue_{i:03d}" for i in range(sum(counts))]
        self.meta: dict[str, Any] = {
            "format": FORMAT,
            "name": "synthetic",
            "channels": self.channels,
            "classes": self.classes,
            "label_values": {"0": 0, "1": 1},
            "normalisation": {"kind": "none"},
            "statistics": {},
            "orientation": "YX",
            "spacing": None,
            "splits": {
                "train": names[: counts[0]],
                "val": [],
                "test": names[counts[0] :],
                "pretrain": names,
            },
        }
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def scored(self) -> dict[str, int | list[int]]:
        return dict(self.classes)

    def cases(self, split: str, limit: int | None = None) -> list[str]:
        if split not in self.meta["splits"]:
            raise InputError(
                f"synthetic: no split {split!r}, expected one of {', '.join(self.meta['splits'])}"
            )
        return self.meta["splits"][split][:limit]

    def _draw(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        if case not in self._kept:
            self._kept[case] = tissue(self.seed, int(case.split("_")[1]), self.grid)
        return self._kept[case]

    def image(self, case: str) -> np.ndarray:
        return self._draw(case)[0]

    def instances(self, case: str) -> np.ndarray:
        return self._draw(case)[1]

    def label(self, case: str) -> np.ndarray:
        return (self._draw(case)[1] > 0).astype(np.uint8)

    def has_label(self, case: str) -> bool:
        return True

    def shape(self, case: str) -> tuple[int, ...]:
        return self.grid

    def spacing(self, case: str) -> tuple[float, ...]:
        return (1.0, 1.0)
