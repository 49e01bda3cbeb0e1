"""NIfTI and images in and out, geometry, normalisation, prepared sets, and the way back of masks."""

import ast
import gzip
import itertools
import json
import pickle
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from common import InputError, loaders
from common.loaders import (
    Prepared,
    Scans,
    VolumeScan,
    check_same_grid,
    data_record,
    find_inputs,
    from_ras,
    normalise,
    open_data,
    read_image,
    read_mask,
    read_nifti,
    read_window,
    resample,
    resample_to,
    symmetric_pad,
    to_ras,
    write_nifti,
)

MR = {"channels": [loaders.PERCENTILES]}
ORIENTATIONS = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def affine_of(
    axes=(0, 1, 2), signs=(1, 1, 1), spacing=(1.0, 1.0, 1.0), origin=(-11.0, 7.0, 3.0)
) -> np.ndarray:
    """Column i has length spacing[i] and points along world axis axes[i], forwards or back."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign, length) in enumerate(zip(axes, signs, spacing)):
        affine[axis, column] = sign * length
    affine[:3, 3] = origin
    return affine


def oblique(angle: float = 0.3) -> np.ndarray:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


def noise(shape=(7, 6, 5), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def places(shape, affine) -> np.ndarray:
    """[*shape, 3]: the mm of every voxel's centre."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def patched(file: Path, at: int, value, kind: str) -> Path:
    """A field of an unpacked NIfTI header overwritten."""
    blob = bytearray(file.read_bytes())
    field = np.array(value, kind).tobytes()
    blob[at : at + len(field)] = field
    file.write_bytes(blob)
    return file


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def error_of(function, *args, **kwargs) -> str:
    """The text of the InputError; it must be one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without_memory(function, *args) -> str:
    """As error_of, of a function that refuses before it takes memory."""
    tracemalloc.start()
    try:
        text = error_of(function, *args)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    return text


def warnings_of(function, *args, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(warning.message) for warning in caught]


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("real", "named"), [(".nii", ".nii.gz"), (".nii.gz", ".nii")])
def test_read_nifti_tells_gzip_by_content_and_says_nothing_of_a_sound_file(tmp_path, real, named):
    file = save(tmp_path / f"made{real}", noise()).rename(tmp_path / f"other{named}")
    assert warnings_of(read_nifti, file) == []
    np.testing.assert_array_equal(read_nifti(file).data, noise())


@pytest.mark.parametrize("kept", [1, 3, 11, 60, 0.3, 0.9, -9, -8, -5, -1])
def test_read_nifti_names_a_truncated_gzip_wherever_it_is_cut(tmp_path, kept):
    file = save(tmp_path / "cut.nii.gz", noise((20, 20, 20)))
    blob = file.read_bytes()
    file.write_bytes(blob[: int(kept * len(blob)) if isinstance(kept, float) else kept])
    assert error_of(read_nifti, file).startswith(f"{file}: damaged or cut off")


@pytest.mark.parametrize("place", ["checksum", "voxels", "behind"])
def test_read_nifti_finds_damage_of_a_gzip(tmp_path, place):
    blob = bytearray(save(tmp_path / "x.nii.gz", noise((16, 16, 16))).read_bytes())
    blob[-6] ^= place == "checksum"  # the last 8 bytes are CRC and length
    blob[2000:2064] = bytes(64) if place == "voxels" else blob[2000:2064]
    (tmp_path / "x.nii.gz").write_bytes(blob + b"garbage" * (place == "behind"))
    assert "x.nii.gz: damaged or cut off" in error_of(read_nifti, tmp_path / "x.nii.gz")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "holds an HTML or XML page"),
        (b"PK\x03\x04" * 200, "damaged or cut off"),
        (b"ObjectType = Image\n", "damaged or cut off"),
        (bytes(400), "damaged or cut off"),
    ],
)
def test_read_nifti_says_what_else_a_file_holds(tmp_path, content, words):
    (file := tmp_path / "x.nii.gz").write_bytes(content)
    assert error_of(read_nifti, file).startswith(f"{file}: {words}")
    assert "there is no such file" in error_of(read_nifti, tmp_path / "none.nii")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(32767, 32767, 32767), (7, 6, 30000)])
def test_read_nifti_refuses_a_promised_size_before_taking_memory(tmp_path, packed, shape):
    file = patched(save(tmp_path / "huge.nii", noise()), 40, [3, *shape], "<i2")
    if packed:
        file.write_bytes(gzip.compress(file.read_bytes()))
    text = f"{file}: the header promises {' x '.join(map(str, shape))} voxels"
    assert text in without_memory(read_nifti, file)


@pytest.mark.parametrize("packed", [False, True])
def test_read_nifti_refuses_a_file_short_by_one_byte(tmp_path, packed):
    file = save(tmp_path / "x.nii", noise())
    blob = file.read_bytes()[:-1]
    file.write_bytes(gzip.compress(blob) if packed else blob)
    text = "the header promises 7 x 6 x 5 voxels (1,192 bytes), the file holds fewer"
    assert text in error_of(read_nifti, file)


@pytest.mark.parametrize(
    ("at", "value", "kind", "words"),
    [
        (40, [2, 7, 6, 1], "<i2", "the volume is 2D, 7 x 6, expected 3D"),
        (40, [5, 7, 6, 5, 1, 1], "<i2", ""),
        (40, [3, 0, 6, 5], "<i2", "expected 3D"),
        (40, [3, -7, 6, 5], "<i2", "expected 3D"),
        (40, [9, 7, 6, 5], "<i2", "damaged"),
        (70, [128], "<i2", "voxels are RGB, expected integers or floats"),
        (70, [32], "<i2", "voxels are complex64"),
        (70, [777], "<i2", "data code 777 not recognized"),
        (108, [16.0], "<f4", "damaged"),
        (108, [np.nan], "<f4", "damaged"),
        (280, [0.0, 0, 0, 0], "<f4", "cannot be inverted"),
        (280, [np.nan], "<f4", "cannot be inverted"),
    ],
)
def test_read_nifti_names_a_damaged_header_field(tmp_path, at, value, kind, words):
    file = patched(save(tmp_path / "x.nii", noise()), at, value, kind)
    if not words:  # axes of length 1 after the third are left out
        assert read_nifti(file).data.shape == (7, 6, 5)
        return
    text = error_of(read_nifti, file)
    assert text.startswith(f"{file}: ") and words in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_read_nifti_counts_voxels_that_are_no_numbers(tmp_path, value):
    array = noise().astype(np.float64)
    array.flat[[3, 50, 77]] = value
    file = save(tmp_path / "nan.nii.gz", array)
    assert error_of(read_nifti, file).startswith(f"{file}: 3 voxels are NaN or Inf")


@pytest.mark.parametrize(("slope", "inter"), [(1, -1024), (0.5, 10)])
def test_read_nifti_applies_slope_and_offset_and_writing_drops_them(tmp_path, slope, inter):
    stored = np.arange(0, 4000, 100, dtype=np.uint16).reshape(4, 5, 2)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(slope, inter)
    nib.save(image, file := tmp_path / "ct.nii.gz")
    nifti = read_nifti(file)
    np.testing.assert_array_equal(nifti.data, stored.astype(float) * slope + inter)
    write_nifti(tmp_path / "y.nii.gz", nifti.data > 0, nifti, np.uint8)
    np.testing.assert_array_equal(read_nifti(tmp_path / "y.nii.gz").data, nifti.data > 0)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_read_nifti_reads_both_versions_and_byte_orders(tmp_path, kind, order):
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    array = np.arange(210, dtype=np.int16).reshape(7, 6, 5)
    nib.save(kind(array, affine_of((1, 2, 0)), header), file := tmp_path / "x.nii")
    nifti = read_nifti(file)
    np.testing.assert_array_equal(nifti.data, array)
    assert nifti.data.dtype == np.int16 and nifti.data.dtype.isnative
    np.testing.assert_allclose(nifti.affine, affine_of((1, 2, 0)))
    write_nifti(tmp_path / "y.nii.gz", array, nifti, np.uint8)
    again = nib.load(tmp_path / "y.nii.gz")
    np.testing.assert_array_equal(np.asarray(again.dataobj), array)
    assert type(again) is kind


def test_read_nifti_warns_of_no_position_and_takes_nibabels(tmp_path):
    file = patched(save(tmp_path / "x.nii", noise()), 252, [0, 0], "<i2")  # both codes
    patched(file, 80, [-2, 3, 4], "<f4")  # pixdim
    with pytest.warns(UserWarning, match="sform and qform code are 0"):
        nifti = read_nifti(file)
    np.testing.assert_array_equal(nifti.affine, nib.load(file).affine)
    assert "".join(nib.aff2axcodes(nifti.affine)) == "LAS" and nifti.spacing == (2, 3, 4)


@pytest.mark.parametrize(
    ("sform", "warned"),
    [
        (nib.affines.from_matvec(np.eye(3), [0.7, 0, 0]), "0.7"),
        (nib.affines.from_matvec(np.eye(3), [0.4, 0, 0]), ""),
        (np.diag([1.2, 1, 1, 1]), "1.2"),  # 0.2 mm a voxel along 6 steps, at the far corner
    ],
)
def test_read_nifti_warns_where_sform_and_qform_are_over_half_a_voxel_apart(
    tmp_path, sform, warned
):
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.set_qform(np.eye(4), code=1)
    image.set_sform(sform, code=1)
    nib.save(image, file := tmp_path / "x.nii")
    texts = warnings_of(read_nifti, file)
    assert len(texts) == bool(warned)
    assert all(f"place a corner {warned} mm apart; the sform is used" in text for text in texts)
    np.testing.assert_allclose(read_nifti(file).affine, sform)


@pytest.mark.parametrize(("unit", "mm"), [("micron", 0.001), ("meter", 1000)])
def test_read_nifti_converts_units_and_masks_lie_on_the_files_own_grid(tmp_path, unit, mm):
    image = nib.Nifti1Image(noise(), affine_of(spacing=(2, 3, 4)))
    image.header.set_xyzt_units(unit)
    nib.save(image, file := tmp_path / "x.nii")
    with pytest.warns(UserWarning, match=f"lengths are in {unit}, converted to mm"):
        nifti = read_nifti(file)
    np.testing.assert_allclose(nifti.spacing, (2 * mm, 3 * mm, 4 * mm))
    np.testing.assert_allclose(nifti.affine[:3, 3], np.array((-11, 7, 3)) * mm)
    write_nifti(tmp_path / "y.nii", noise() > 100, nifti, np.uint8)
    again = nib.load(tmp_path / "y.nii")
    np.testing.assert_array_equal(again.affine, image.affine)
    assert again.header.get_xyzt_units()[0] == unit


def test_read_nifti_takes_the_spacing_from_the_affine_never_from_pixdim(tmp_path):
    file = save(tmp_path / "x.nii", noise(), affine_of((2, 0, 1), (1, -1, 1), (0.5, 2.0, 3.0)))
    patched(file, 80, [1, 1, 1], "<f4")  # pixdim
    np.testing.assert_allclose(read_nifti(file).spacing, (0.5, 2.0, 3.0))


# --- writing -----------------------------------------------------------------------------------


def test_write_nifti_keeps_grid_matrices_and_codes(tmp_path):
    image = nib.Nifti1Image(noise(), affine_of((1, 0, 2), (-1, 1, 1), (0.7, 0.8, 3)))
    image.set_qform(image.affine, code=2)
    image.set_sform(oblique() @ image.affine, code=4)
    image.header["cal_max"] = 500
    nib.save(image, tmp_path / "in.nii.gz")
    with pytest.warns(UserWarning, match="sform and qform"):
        like = read_nifti(tmp_path / "in.nii.gz")
    mask = (like.data > like.data.mean()).astype(np.uint8) * 4
    write_nifti(tmp_path / "out.nii.gz", mask, like, np.uint8)
    before = nib.load(tmp_path / "in.nii.gz")
    after = nib.load(tmp_path / "out.nii.gz")
    assert after.get_data_dtype() == np.uint8 and after.header["cal_max"] == 0
    np.testing.assert_array_equal(np.asarray(after.dataobj), mask)
    for form in ("get_sform", "get_qform"):
        old, old_code = getattr(before, form)(coded=True)
        new, new_code = getattr(after, form)(coded=True)
        np.testing.assert_array_equal(old, new)
        assert old_code == new_code


def test_write_on_grid_writes_the_cases_affine(tmp_path):
    affine = oblique() @ affine_of(spacing=(1, 2, 3))
    loaders.write_on_grid(tmp_path / "x.nii.gz", noise(), affine)
    np.testing.assert_allclose(read_nifti(tmp_path / "x.nii.gz").affine, affine, atol=1e-6)


# --- geometry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "affine", "words"),
    [
        ((7, 6, 4), affine_of(), "shape 7 x 6 x 4, while image.nii has 7 x 6 x 5"),
        ((7, 6, 5), affine_of(spacing=(1, 1, 2)), "spacing 1 x 1 x 2 mm, while image.nii has 1"),
        ((7, 6, 5), affine_of(origin=(-11, 7, 3.01)), "affine [[1, 0, 0, -11]"),
        ((7, 6, 5), np.eye(4), "identity-like: perhaps saved without its geometry"),
        ((7, 6, 5), affine_of(origin=(-11, 7, 3.0005)), ""),
    ],
)
def test_check_same_grid_names_the_difference(tmp_path, shape, affine, words):
    image = read_nifti(save(tmp_path / "image.nii", noise(), affine_of()))
    label = read_nifti(save(tmp_path / "label.nii", noise(shape), affine))
    if words:
        text = error_of(check_same_grid, image, label)
        assert text.startswith(f"{label.path}: ") and words in text
    else:
        check_same_grid(image, label)


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_to_ras_and_back_is_exact_for_each_orientation(axes, signs):
    affine = oblique() @ affine_of(axes, signs, (0.7, 1.1, 2.5))
    array = noise((2, 4, 5, 6))
    ras, new, undo = to_ras(array, affine)
    assert "".join(nib.aff2axcodes(new)) == "RAS"
    np.testing.assert_array_equal(from_ras(ras, undo), array)
    for index in [(0, 0, 0), (3, 1, 5), (1, 4, 2)]:  # the same voxel stays at the same mm
        moved = np.argwhere(ras[1] == array[(1, *index)])[0]
        np.testing.assert_allclose(new @ [*moved, 1], affine @ [*index, 1], atol=1e-9)


def test_resample_aligns_the_outer_edges_and_rounds_the_length():
    array, new = resample(noise((8, 6, 10)), affine_of(spacing=(1, 2, 3)), (2.0, 1.0, 3.0), order=1)
    assert array.shape == (4, 12, 10)
    np.testing.assert_allclose(new[:3, 3], [-11 + 0.5, 7 - 0.5, 3])  # (s' - s) / 2
    array, _ = resample(noise((7, 6, 2)), np.eye(4), (2.0, 4.0, 9.0), order=1)
    assert array.shape == (4, 2, 1)  # 3.5, 1.5 and 0.2: half to even, and never 0


@pytest.mark.parametrize("spacing", [(0.5, 1.3, 2.2), (1.7, 0.6, 0.9)])
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_resample_keeps_a_ramp_at_its_millimetres(spacing, angle):
    affine = oblique(angle) @ affine_of((1, 0, 2), (-1, 1, 1), (1.0, 1.2, 2.0))
    ramp = (places((12, 11, 10), affine) @ [1.0, 2.0, 3.0]).astype(np.float32)
    out, new = resample(ramp[None], affine, spacing, order=1)
    expected = places(out.shape[1:], new) @ [1.0, 2.0, 3.0]
    inner = (slice(3, -3),) * 3
    np.testing.assert_allclose(out[0][inner], expected[inner], rtol=1e-4, atol=1e-3)


def test_resample_nearest_invents_no_label_and_is_undone_exactly():
    label = np.random.default_rng(0).choice([0, 4, 9], (9, 8, 7)).astype(np.uint8)
    affine = affine_of(spacing=(1, 1, 2.5))
    fine, grid = resample(label, affine, (0.5, 0.4, 1.0), order=0)
    assert fine.dtype == np.uint8 and set(np.unique(fine)) == {0, 4, 9}
    np.testing.assert_array_equal(resample_to(fine, grid, label.shape, affine, order=0), label)


def test_read_window_equals_padding_and_cutting():
    rng = np.random.default_rng(0)
    array = rng.integers(1, 99, (2, 6, 7, 8))
    padded = np.pad(array, ((0, 0), (20, 20), (20, 20), (20, 20)), constant_values=-5)
    for _ in range(300):
        start = rng.integers(-12, 14, 3)
        size = rng.integers(1, 12, 3)
        inside = (slice(None), *(slice(s + 20, s + 20 + n) for s, n in zip(start, size)))
        np.testing.assert_array_equal(read_window(array, start, size, -5), padded[inside])


def test_symmetric_pad_puts_the_odd_voxel_behind_and_centre_crop_undoes_it():
    assert symmetric_pad((240, 240, 155), (256, 256, 256)) == (8, 8, 50)
    array = noise((2, 5, 6, 7))
    front = symmetric_pad(array.shape[1:], (8, 9, 7))
    padded = read_window(array, [-f for f in front], (8, 9, 7))
    np.testing.assert_array_equal(loaders.centre_crop(padded, (5, 6, 7)), array)


# --- normalisation -----------------------------------------------------------------------------


def test_normalise_uses_percentiles_of_the_nonzero_voxels_where_a_tenth_is_zero():
    values = np.zeros((1, 10, 10, 10), np.float32)
    values[0, 5:] = noise((5, 10, 10))
    low, high = np.percentile(values[0, 5:], [1, 99])
    out = normalise(values, MR)
    expected = np.clip((values[0, 5:] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(out[0, 5:], expected, atol=1e-6)
    assert (out[0, :5] == 0).all()


@pytest.mark.parametrize(("zeros", "over_all"), [(99, True), (100, False)])
def test_normalise_changes_the_rule_at_a_tenth_of_zeros(zeros, over_all):
    values = -noise((1, 10, 10, 10))  # all below 0, so that a 0 is the brightest
    values.flat[:zeros] = 0
    assert (normalise(values, MR).flat[:zeros] == (1 if over_all else 0)).all()


@pytest.mark.parametrize("levels", [(0, 0, 1), (0, 0, -5), (7, 7, 9), (0, 7, 9)])
def test_normalise_takes_minimum_and_maximum_where_the_window_collapses(levels):
    """A mask as a channel, also below 0; one value nearly everywhere, with zeros and without."""
    rest = 200 if levels[0] == levels[1] == 0 else 5
    values = np.repeat(levels, (300, 700 - rest, rest)).reshape(1, 10, 10, 10)
    expected = (values - values.min()) / (values.max() - values.min())
    with pytest.warns(UserWarning, match=r"^x.nii: the window from .* is empty, scaled from"):
        np.testing.assert_allclose(normalise(values, MR, ["x.nii"]), expected, atol=1e-6)


@pytest.mark.parametrize("value", [0, 7.5, 1.7e6])
def test_normalise_gives_zeros_for_a_constant_channel_and_names_it(value):
    with pytest.warns(
        UserWarning,
        match=f"channel 0: a constant channel, all values are {value:g}".replace("+", "[+]"),
    ):
        out = normalise(np.full((1, 4, 4, 4), value, np.float64), MR)
    assert (out == 0).all()


def test_normalise_clips_ct_to_the_window():
    ct = np.array([-2000, -100, 0, 100, 3000], np.int16).reshape(1, 5, 1, 1)
    out = normalise(ct, {"channels": [{"kind": "window", "low": -100, "high": 100}]})
    assert out.dtype == np.float32 and out.ravel().tolist() == [0, 0, 0.5, 1, 1]


def test_normalise_keeps_small_differences_of_large_numbers():
    values = (1.7e6 + np.arange(1000.0).reshape(1, 10, 10, 10) / 8).astype(np.float32)
    assert len(np.unique(normalise(values, MR))) > 950


def test_normalise_names_a_wrong_number_of_channels():
    assert "has 2 channels, expected 1" in error_of(normalise, noise((2, 3, 3, 3)), MR)


def test_percentiles_of_are_numpys_and_16_bits_do_not_wrap():
    values = np.array([-32768, 0, 5, 32767], np.int16)
    expected = np.percentile(values.astype(np.float64), [1, 99])
    np.testing.assert_array_equal(
        loaders.percentiles_of(values, {"lower": 1, "upper": 99}), expected
    )


# --- prepared data -----------------------------------------------------------------------------


def meta_of(shape=(6, 7, 8), channels=1, **entries) -> dict:
    """Three labelled cases a, b, c and one without label, u."""
    facts = {"shape": list(shape), "spacing_mm": [1, 1, 2], "affine": affine_of().tolist()}
    meta = {"format": 1, "name": "toy", "channels": ["MR"] * channels, "classes": {"organ": 1}}
    meta |= {"label_values": {"0": 0, "1": 4}, "spacing": None, "orientation": "RAS"}
    meta |= {"normalisation": MR, "statistics": {}}
    meta["splits"] = {"train": ["a"], "val": ["b"], "test": ["c"], "unlabelled": ["u"]}
    meta["cases"] = {case: {**facts, "labelled": case != "u"} for case in "abcu"}
    return meta | entries


def prepared(root: Path, shape=(6, 7, 8), channels=1, **entries) -> Path:
    meta = meta_of(shape, channels, **entries)
    flat = meta["orientation"] == "YX"
    for i, (case, facts) in enumerate(meta["cases"].items()):
        (folder := root / "cases" / case).mkdir(parents=True)
        image = np.clip(noise((channels, *shape), i) / 200, 0, 1)
        np.save(folder / "image.npy", image.astype(np.uint8 if flat else np.float16))
        if facts["labelled"]:
            np.save(folder / "label.npy", (noise(shape, i) > 100).astype(np.uint8))
        if "objects" in facts:
            np.save(folder / "instances.npy", np.full(shape, 300, np.int32))
    (root / "dataset.json").write_text(json.dumps(meta))
    return root


def flat_entries(shape=(6, 7)) -> dict:
    facts = {"shape": list(shape), "labelled": True}
    cases = {"a": {**facts, "objects": 1}, "b": facts, "u": {**facts, "labelled": False}}
    splits = {"train": ["a", "b"], "pretrain": ["a", "b", "u"]}
    plain = {"kind": "none"}
    return {"orientation": "YX", "cases": cases, "splits": splits, "normalisation": plain}


def test_open_data_gives_memory_maps_and_geometry(tmp_path):
    data = open_data(prepared(tmp_path))
    assert isinstance(data.image("a"), np.memmap) and data.image("a").shape == (1, 6, 7, 8)
    assert data.label("a").dtype == np.uint8 and data.instances("a") is None
    assert (data.kind, data.axes, data.shape("a")) == ("volumes", 3, (6, 7, 8))
    assert data.cases("train") == ["a"] and data.cases("all", 2) == ["a", "b"]
    assert data.spacing("a") == (1.0, 1.0, 2.0) and data.affine("a").shape == (4, 4)


def test_open_data_opens_images_and_refuses_another_kind(tmp_path):
    folder = prepared(tmp_path / "flat", (6, 7), 3, ignore=255, **flat_entries())
    data = open_data(folder, "images")
    assert (data.axes, data.ignore, data.spacing("a")) == (2, 255, (1.0, 1.0))
    assert data.image("u").shape == (3, 6, 7) and not data.has_label("u")
    assert data.instances("a").max() == 300 and data.instances("b") is None
    assert "holds images, expected volumes" in error_of(open_data, folder)


def test_open_data_survives_a_worker_process(tmp_path):
    for data in (open_data(prepared(tmp_path)), open_data("synthetic")):
        again = pickle.loads(pickle.dumps(data))
        case = data.cases("train")[0]
        np.testing.assert_array_equal(again.image(case), data.image(case))


def test_open_data_prints_the_command_where_nothing_is_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = error_of(open_data, "toy")
    assert f"no dataset.json in this folder of {tmp_path}" in text
    assert text.endswith("prepare it: python -m data_prep.msd --src DIR --dst data/toy")
    assert error_of(open_data, "my_chaos", "slices").endswith("data/my_chaos --as-slices")
    assert "data_prep.flare22 --src" in error_of(open_data, "flare22", "slices")
    touch(tmp_path, "data/toy/prepare.json")
    assert "was not prepared to its end; run the same" in error_of(open_data, "toy")


def test_open_data_lists_all_faults_at_once(tmp_path):
    splits = {"train": ["a", "a"], "val": ["b"], "test": ["c", "x", "b"]}
    cases = prepared(tmp_path, splits=splits, regions={"all": [1, 3]}) / "cases"
    (cases / "a" / "image.npy").unlink()
    np.save(cases / "b" / "label.npy", np.zeros((6, 7, 8), np.int64))
    np.save(cases / "c" / "image.npy", np.zeros((1, 6, 7, 9), np.float16))
    blob = (cases / "u" / "image.npy").read_bytes()
    (cases / "u" / "image.npy").write_bytes(blob[:-1])
    text = error_of(open_data, tmp_path)
    for words in (
        "8 faults: split train lists a twice; split test names x, which is no case",
        "b is in the splits val and test; region all is [1, 3], expected some of [1]",
        f"{cases / 'a' / 'image.npy'}: there is no such file",
        "b/label.npy is int64 (6, 7, 8), expected uint8 (6, 7, 8)",
        "c/image.npy is float16 (1, 6, 7, 9), expected float16 (1, 6, 7, 8)",
        f"{cases / 'u' / 'image.npy'}: damaged or cut off",
    ):
        assert words in text, text


@pytest.mark.parametrize("one", ["train", "val", "test"])
@pytest.mark.parametrize("other", ["train", "val", "test"])
def test_open_data_refuses_a_case_in_two_splits(tmp_path, one, other):
    splits = {"train": ["a"], "val": ["b"], "test": ["c"]}
    splits[other] = [*splits[other], *splits[one]]
    text = error_of(open_data, prepared(tmp_path, splits=splits))
    assert ("twice" if one == other else f"{splits[one][0]} is in the splits") in text


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "JSONDecodeError"), ("{}", "KeyError: 'format'"), ('{"format": 9}', "use newer code")],
)
def test_open_data_names_a_damaged_description(tmp_path, content, words):
    (file := tmp_path / "dataset.json").write_text(content)
    text = error_of(open_data, tmp_path)
    assert text.startswith(f"{file}: ") and words in text


@pytest.mark.parametrize(("ignore", "known"), [(None, "[0, 1]"), (255, "[0, 1, 255]")])
def test_label_names_foreign_values_and_cases_to_score_all_of_them(tmp_path, ignore, known):
    data = open_data(prepared(tmp_path, **({"ignore": ignore} if ignore else {})))
    for case in "bc":
        label = np.load(file := tmp_path / f"cases/{case}/label.npy")
        label[0, 0, :3] = 2
        label[1, 0, :2] = 9
        label[2, 0, 0] = ignore or 0
        np.save(file, label)
    assert data.label("a").max() == 1
    text = error_of(data.label, "b")
    assert "the label of b holds the value 2 in 3 voxels, the value 9 in 2 voxels;" in text
    assert f"dataset.json knows {known}" in text
    text = error_of(loaders.cases_to_score, data, "all")
    assert "the label of b" in text and "the label of c" in text


def test_cases_to_score_are_the_labelled_ones(tmp_path):
    data = open_data(prepared(tmp_path))
    assert loaders.cases_to_score(data, "all") == ["a", "b", "c"]
    assert loaders.cases_to_score(data, "all", 2) == ["a", "b"]
    assert "no labelled case in unlabelled" in error_of(loaders.cases_to_score, data, "unlabelled")
    assert "no split dev, expected one of train, val" in error_of(data.cases, "dev")
    assert "case u has no label" in error_of(data.label, "u")
    assert "no case x" in error_of(data.image, "x")


def test_scored_are_the_regions_where_the_set_names_some_else_the_classes(tmp_path):
    classes = {"core": 1, "rim": 2}
    regions = {"all": [1, 2], "core": [1]}
    assert Prepared(meta_of(classes=classes), np.zeros).scored == classes
    assert Prepared(meta_of(classes=classes, regions=regions), np.zeros).scored == regions


def test_prepared_patch_of_a_256_cube_is_read_in_1_ms(tmp_path):
    entries = {"cases": {"a": meta_of((256, 256, 256))["cases"]["a"]}, "splits": {"train": ["a"]}}
    data = open_data(prepared(tmp_path, (256, 256, 256), **entries))
    times = []
    for i in range(9):
        begin = time.perf_counter()
        window = read_window(data.image("a"), (20 * i - 10, 10, 100), (64, 64, 64))
        times.append(time.perf_counter() - begin)
    assert window.shape == (1, 64, 64, 64) and min(times) < 0.001


def test_data_record_holds_plain_types_and_all_that_predict_needs():
    meta = meta_of(grid=[8, 8, 8], channel_suffixes={"MR": ["t1"]}, settings={"reduce": 2})
    meta["splits"]["train"] = ["a", "c"]
    meta["cases"]["c"] = {**meta["cases"]["c"], "spacing_mm": [1, 3, 4]}
    record = data_record(Prepared(meta, np.zeros))
    assert ast.literal_eval(repr(record)) == record
    assert record["cases"] == {"train": ["a", "c"], "val": ["b"]} and record["reduce"] == 2
    expected = {"min": [1, 1, 2], "median": [1, 2, 3], "max": [1, 3, 4]}
    assert record["spacings_mm"] == expected and record["grid"] == [8, 8, 8]
    assert record["channel_suffixes"] == {"MR": ["t1"]} and "regions" not in record


def test_seen_cases_are_those_of_the_same_set_that_were_trained_or_validated_on():
    data = Prepared(meta_of(), np.zeros)
    record = data_record(data)
    assert loaders.seen_cases(record, data, ["c", "b", "a", "u"]) == ["b", "a"]
    assert loaders.seen_cases(record | {"name": "x"}, data, ["a", "b"]) == []


@pytest.mark.parametrize("key", ["channels", "classes", "spacing", "normalisation"])
def test_check_alike_names_what_was_prepared_otherwise(key):
    data = Prepared(meta_of(), np.zeros)
    record = data_record(data)
    loaders.check_alike(record, data)
    text = error_of(loaders.check_alike, record | {key: "other"}, data)
    assert f"toy: {key} is {record[key]}, the network was trained with other" in text


@pytest.mark.parametrize(
    ("size", "alike"),
    [([1, 1, 2], True), ([0.91, 1, 2.19], True), ([0.89, 1, 2], False), ([1, 1, 2.21], False)],
)
def test_check_alike_compares_voxel_sizes_of_native_spacing(size, alike):
    data = Prepared(meta_of(), np.zeros)
    record = data_record(data) | {"name": "trained"}
    data.meta["cases"]["c"] = {**data.meta["cases"]["c"], "spacing_mm": size}
    if alike:
        loaders.check_alike(record, data)
    else:
        text = error_of(loaders.check_alike, record, data)
        assert f"voxels of c are {' x '.join(map(str, size))} mm, the network was" in text
        assert "trained on 1 x 1 x 2 mm" in text
        data.meta["spacing"] = record["spacing"] = [1, 1, 2]  # resampled: nothing to compare
        loaders.check_alike(record, data)


# --- finding what to predict -------------------------------------------------------------------

BRATS = ["t1", "t1ce", "t2", "flair"]
SUFFIXES = {"t1": ["t1", "t1n"], "t1ce": ["t1ce", "t1c"], "t2": ["t2", "t2w"]}
SUFFIXES |= {"flair": ["flair", "t2f"]}


def named(paths, channels, suffixes=None) -> list[tuple[str, list[str]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = find_inputs(paths, channels, suffixes)
    return [(case, [f.name for f in files]) for case, files in inputs]


def test_find_inputs_sorts_by_number_takes_any_ending_and_names_what_it_leaves(tmp_path):
    files = ("case10.nii.gz", "case2.nii", "._case2.nii.gz", ".DS_Store", "__MACOSX/case1.nii")
    touch(tmp_path, *files, "_b.NII.GZ", "notes.txt", "a.mha")
    names = [case for case, _ in named([tmp_path], ["MR"])]
    assert names == ["_b", "case2", "case10"]
    assert warnings_of(find_inputs, [tmp_path], ["MR"]) == ["not used: 2 files (a.mha, notes.txt)"]
    text = error_of(find_inputs, [tmp_path / "a.mha"], ["MR"])
    assert text.startswith(f"{tmp_path / 'a.mha'}: the ending is none of those")


def test_find_inputs_groups_channel_files_also_below_brackets(tmp_path):
    folder = tmp_path / "set [1]"
    touch(folder, "b_0001.nii.gz", "b_0000.nii.gz", "a_0000.NII.GZ", "a_0001.nii.gz")
    expected = [
        ("a", ["a_0000.NII.GZ", "a_0001.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
    ]
    assert named([folder], ["T2", "ADC"]) == expected


def test_find_inputs_takes_numbers_for_cases_where_there_is_one_channel(tmp_path):
    touch(tmp_path, "scan_0000.nii.gz", "scan_0001.nii.gz", "amos_0001.nii.gz", "x_0000.nii")
    expected = ["amos_0001", "scan_0000", "scan_0001", "x"]
    assert [case for case, _ in named([tmp_path], ["MR"])] == expected
    assert [case for case, _ in named(sorted(tmp_path.iterdir()), ["MR"])] == expected


def test_find_inputs_lists_all_missing_and_double_files(tmp_path):
    touch(tmp_path, "a_0000.nii", "b_ADC.nii", "b_T2.nii", "c_0000.nii", "c_0001.nii", "c_0002.nii")
    touch(tmp_path / "other", "b_T2.nii.gz")
    text = error_of(find_inputs, [tmp_path, tmp_path / "other"], ["T2", "ADC"])
    assert text.startswith("3 faults in the inputs: a has no ADC, expected a_adc.nii.gz | ")
    assert f"b has 2 files for T2: {tmp_path / 'b_T2.nii'} and " in text
    assert "c has a channel 2, expected 2 channels; add, rename" in text


def test_find_inputs_takes_as_many_files_as_channels_in_the_order_given(tmp_path):
    files = [touch(tmp_path, name) / name for name in ("x_T2.nii", "scan.nii")]
    assert named(files, ["T2", "ADC"]) == [("x_T2", ["x_T2.nii", "scan.nii"])]
    assert "x has no ADC" in error_of(find_inputs, files[::-1], ["T2", "ADC"])  # T2 is the second
    plain = [touch(tmp_path, name) / name for name in ("one.nii", "two.nii")]
    assert named(plain, ["T2", "ADC"]) == [("one", ["one.nii", "two.nii"])]
    assert [case for case, _ in named(plain, ["1", "2"])] == ["one"]
    assert [case for case, _ in named(plain, ["MR"])] == ["one", "two"]


def test_find_inputs_names_what_is_not_there_and_one_name_twice(tmp_path):
    assert "x.nii: no such file or folder" in error_of(find_inputs, [tmp_path / "x.nii"], ["MR"])
    assert "no NIfTI file (.nii, .nii.gz) is there" in error_of(find_inputs, [tmp_path], ["MR"])
    touch(tmp_path, "a/case.nii", "b/case.nii")
    text = error_of(find_inputs, [tmp_path / "a", tmp_path / "b"], ["MR"])
    assert text.startswith("case: found more than once")


def test_find_inputs_tells_channels_by_words_in_any_order(tmp_path):
    touch(tmp_path, *(f"p-001_{name}.nii" for name in BRATS))
    touch(tmp_path, *(f"q-t1c-{word}.nii" for word in ("T2F", "t1n", "t2w", "t1c")))
    expected = [("p-001", [f"p-001_{name}.nii" for name in BRATS])]
    expected += [("q-t1c", ["q-t1c-t1n.nii", "q-t1c-t1c.nii", "q-t1c-t2w.nii", "q-t1c-T2F.nii"])]
    assert named([tmp_path], BRATS, SUFFIXES) == expected
    for order in itertools.permutations(tmp_path.glob("p-*")):
        assert named(order, BRATS, SUFFIXES) == expected[:1]


def test_find_inputs_takes_the_longest_word_and_the_folder_of_a_bare_one(tmp_path):
    touch(folder := tmp_path / "p7", "adc-b50.nii", "b50.nii", "p8_adc-b50.nii", "p8-b50.nii")
    expected = [("p7", ["b50.nii", "adc-b50.nii"]), ("p8", ["p8-b50.nii", "p8_adc-b50.nii"])]
    assert named([folder], ["b50", "ADC-b50"]) == expected


def test_find_inputs_searches_below_a_folder_without_volumes_where_words_tell(tmp_path):
    for case in ("x/HGG/p10", "x/LGG/p2"):
        words = ("T2", "ADC", "seg")
        touch(tmp_path / case, *(f"{Path(case).name}_{word}.nii.gz" for word in words))
    (tmp_path / "x/LGG/loop").symlink_to(tmp_path / "x")
    touch(tmp_path / "x/LGG/p2", "p3_T2.nii/0057_brain.nii", "p3_ADC.nii")  # an unpacker's folder
    expected = [("p2", ["p2_T2.nii.gz", "p2_ADC.nii.gz"]), ("p3", ["0057_brain.nii", "p3_ADC.nii"])]
    assert named([tmp_path], ["T2", "ADC"])[:2] == expected
    text = "not used: 2 files (p2_seg.nii.gz, p10_seg.nii.gz)"
    assert warnings_of(find_inputs, [tmp_path], ["T2", "ADC"]) == [text]
    assert "no NIfTI file" in error_of(find_inputs, [tmp_path], ["MR"])
    touch(tmp_path / "x", "p9.nii.gz")  # a folder that holds a volume itself is not searched
    assert named([tmp_path / "x"], ["T2", "ADC"]) == [("p9", ["p9.nii.gz"])]


# --- cases in, masks out -----------------------------------------------------------------------

RECORD = {"name": "toy", "channels": ["MR"], "classes": {"core": 1, "rim": 2}, "spacing": None}
RECORD |= {"label_values": {"0": 0, "1": 1, "2": 4}, "normalisation": MR, "orientation": "RAS"}
FLAT = RECORD | {"channels": ["red", "green", "blue"], "orientation": "YX"}


def onehot(label: np.ndarray, classes: int = 3) -> np.ndarray:
    return np.moveaxis(np.eye(classes, dtype=np.float32)[label], -1, 0)


def scan_of(array, affine, **entries) -> VolumeScan:
    spacing = tuple(nib.affines.voxel_sizes(affine))
    file = loaders.Nifti(array, affine, spacing, None, Path("x.nii"))
    return VolumeScan("x", [file], RECORD | entries)


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_mask_comes_back_voxel_exact_in_each_orientation_with_published_values(axes, signs):
    affine = oblique(0.2) @ affine_of(axes, signs, (1.0, 1.5, 2.0))
    published = np.random.default_rng(1).choice([0, 1, 4], (6, 5, 4)).astype(np.uint8)
    scan = scan_of(noise((6, 5, 4)), affine)
    ras = to_ras(np.where(published == 4, 2, published), affine)[0]
    assert scan.image.shape == (1, *ras.shape) and scan.image.dtype == np.float32
    mask = scan.mask(onehot(ras))
    assert mask.dtype == np.uint8 and mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, published)


@pytest.mark.parametrize("radius", [6, 15])  # mm
@pytest.mark.parametrize(
    ("file", "network"),
    [(1.0, (1, 1, 1.5)), (0.8, (1, 1, 1.5)), (1.0, (1.6, 1.6, 1.6)), ((0.6, 0.6, 3), (1, 1, 1.5))],
)
def test_mask_of_interpolated_probabilities_keeps_a_sphere(file, network, radius):
    """Of a network that knows the distance to the edge of the sphere, within half a voxel."""
    sizes = np.broadcast_to(file, 3)
    shape = [round(44 / s) for s in sizes]
    affine = affine_of(spacing=sizes, origin=(-22, -22, -22))
    sphere = np.linalg.norm(places(shape, affine) - 0.3, axis=-1) < radius
    scan = scan_of(noise(shape), affine, spacing=list(network))
    distance = np.linalg.norm(places(scan.image.shape[1:], scan.affine) - 0.3, axis=-1) - radius
    prob = 1 / (1 + np.exp(np.clip(4 * distance / np.mean(network), -50, 50)))

    def dice(mask: np.ndarray) -> float:
        return 2 * (sphere & mask).sum() / (sphere.sum() + mask.sum())

    linear = dice(scan.mask(prob[None]) == 1)
    nearest = dice(resample_to(distance < 0, scan.affine, shape, affine, order=0))
    assert linear > 0.98 and nearest < linear - 0.01
    assert linear == dice(scan.mask(np.stack([1 - prob, prob, 0 * prob])) == 1)


def test_mask_gives_ties_to_the_lower_class_and_needs_more_than_half():
    scan = scan_of(noise((2, 2, 2)), np.eye(4))
    prob = np.zeros((3, 2, 2, 2), np.float32)
    prob[:, 0] = 1 / 3
    prob[1:, 1] = 0.5
    assert scan.mask(prob)[0].max() == 0 and (scan.mask(prob)[1] == 1).all()
    assert scan.mask(np.full((1, 2, 2, 2), 0.5, np.float32)).max() == 0
    with pytest.raises(ValueError, match="2 channels, expected 1 or 3"):
        scan.mask(prob[:2])


def test_map_puts_a_ramp_back_where_it_was():
    affine = affine_of((2, 0, 1), (-1, 1, -1), (1.0, 1.5, 2.0))
    scan = scan_of(noise((12, 11, 10)), affine, spacing=[1.2, 0.8, 1.0])
    network = places(scan.image.shape[1:], scan.affine) @ [1.0, 2.0, 3.0]
    ramp = places((12, 11, 10), affine) @ [1.0, 2.0, 3.0]
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(scan.map(network)[inner], ramp[inner], atol=1e-3)


TRAINED = {"min": [0.9, 1, 2], "median": [1, 1, 2], "max": [1, 1.2, 2]}


@pytest.mark.parametrize(
    ("size", "resampled", "warned"),
    [
        ((1, 1, 2), False, False),
        ((0.82, 1.31, 2.19), False, False),  # within a tenth of the range
        ((0.8, 1, 2), True, False),
        ((1, 1.33, 2), True, False),
        ((1, 1, 4), True, True),
        ((0.5, 1, 2), True, True),
    ],
)
def test_scan_of_another_voxel_size_is_resampled_and_comes_back(size, resampled, warned):
    shape = (12, 10, 8)
    scan = scan_of(noise(shape), affine_of((0, 1, 2), (-1, 1, 1), size), spacings_mm=TRAINED)
    spacing = nib.affines.voxel_sizes(scan.affine)
    np.testing.assert_allclose(spacing, TRAINED["median"] if resampled else size)
    assert bool(scan.note) == resampled and scan.note.startswith("warning: ") == warned
    sizes = f"voxels of {' x '.join(map(str, size))} mm are resampled to 1 x 1 x 2 mm"
    assert not resampled or sizes in scan.note
    assert scan.mask(np.ones((1, *scan.image.shape[1:]), np.float32)).shape == shape
    assert scan_of(noise(shape), affine_of(spacing=size), spacing=[1, 1, 2]).note == ""


def test_scan_reads_channels_from_files_or_from_one_4d_file(tmp_path):
    array = noise((6, 5, 4, 2))
    two = {"channels": ["T2", "ADC"], "normalisation": {"channels": [loaders.PERCENTILES] * 2}}
    record = RECORD | two
    whole = VolumeScan("x", [read_nifti(save(tmp_path / "both.nii", array))], record)
    files = [read_nifti(save(tmp_path / f"{i}.nii", array[..., i])) for i in range(2)]
    np.testing.assert_array_equal(VolumeScan("x", files, record).image, whole.image)
    assert "2 channels, expected 1 (MR)" in error_of(VolumeScan, "x", files, RECORD)
    moved = read_nifti(save(tmp_path / "moved.nii", array[..., 1], affine_of()))
    assert "prepare with --allow-" in error_of(VolumeScan, "x", [files[0], moved], record)
    with pytest.warns(UserWarning, match="the image's affine is used for both"):
        VolumeScan("x", [files[0], moved], record | {"allow_affine_mismatch": True})
    text = error_of(VolumeScan, "x", [files[0], read_nifti(tmp_path / "both.nii")], record)
    assert "the volume is 4D, 6 x 5 x 4 x 2, expected one 3D volume" in text


@pytest.fixture
def source(tmp_path) -> Path:
    for i in range(3):
        save(tmp_path / "in" / f"c{i}.nii.gz", noise(seed=i), affine_of(spacing=(1, 2, 4)))
    return tmp_path / "in"


def predict(scans: Scans, rank: int = 0, world: int = 1) -> list[str]:
    return [
        scan.save(scan.mask(np.ones((1, *scan.image.shape[1:]), np.float32)))
        for scan in scans.share(rank, world)
    ]


def test_scans_write_masks_maps_and_members_and_say_the_volume(source, tmp_path):
    scan = next(Scans([source], tmp_path / "out", RECORD, False).share())
    prob = onehot(np.ones((7, 6, 5), int))
    maps = {"ER+": scan.map(prob[0]), "ER-": scan.map(prob[1]), "a/b": prob[2]}
    line = scan.save(scan.mask(prob), maps, {0: scan.mask(prob), 1: scan.mask(prob)})
    assert line == f"{tmp_path / 'out/c0.nii.gz'}: core 1.68 ml, rim 0.00 ml"  # 210 x 8 mm^3
    names = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.gz")}
    maps_named = {"maps/c0_ER+.nii.gz", "maps/c0_ER-.nii.gz", "maps/c0_a-b.nii.gz"}
    assert names == {"c0.nii.gz", "members/c0_0.nii.gz", "members/c0_1.nii.gz"} | maps_named
    assert read_nifti(tmp_path / "out/maps/c0_ER-.nii.gz").data.dtype == np.float32
    assert loaders.file_names(["a b", "A-B"]) == {"a b": "a-b", "A-B": "A-B-2"}


def test_scans_go_on_after_a_damaged_file_and_name_it_at_the_end(source, tmp_path):
    (source / "c1.nii.gz").write_bytes((source / "c1.nii.gz").read_bytes()[:100])
    scans = Scans([source], tmp_path / "out", RECORD, False)
    assert len(predict(scans)) == 2 and not (tmp_path / "out/c1.nii.gz").exists()
    text = error_of(scans.finish, scans.faults)
    assert text.startswith(f"1 of 3 inputs were left out: {source / 'c1.nii.gz'}: damaged")
    scans.finish([])


def test_scans_are_shared_without_a_rest(source, tmp_path):
    scans = Scans([source], tmp_path / "out", RECORD, False)
    names = [[scan.name for scan in scans.share(rank, 2)] for rank in range(2)]
    assert names == [["c0", "c2"], ["c1"]]


def test_scans_leave_existing_masks_alone_unless_told_otherwise(source, tmp_path):
    touch(tmp_path / "out", "c1.nii.gz", "maps/c2_x.nii.gz")
    scans = Scans([source], tmp_path / "out", RECORD, False)
    assert "1 of 3 masks are there and left as they are (c1.nii.gz)" in scans.notes[0]
    assert len(predict(scans)) == 2 and (tmp_path / "out/c1.nii.gz").read_bytes() == b""
    text = error_of(Scans, [source / "c1.nii.gz"], tmp_path / "out/c1.nii.gz", RECORD, False)
    assert "is there already" in text and "overwrite" in text
    assert len(predict(Scans([source], tmp_path / "out", RECORD, True))) == 3
    assert (tmp_path / "out/c1.nii.gz").stat().st_size > 0
    scan = next(Scans([source], tmp_path / "new", RECORD, False).share())
    touch(tmp_path / "new", "maps/c0_x.nii.gz")
    line = scan.save(scan.mask(onehot(np.ones((7, 6, 5), int))), {"x": noise()})
    assert line.endswith("; left as they are: c0_x.nii.gz")


def test_scans_never_write_onto_their_inputs(source, tmp_path):
    file = source / "c0.nii.gz"
    (link := tmp_path / "link.nii.gz").symlink_to(file)
    (folder := tmp_path / "same").symlink_to(source)
    before = file.read_bytes()
    for output in (file, link):
        assert "would replace an input" in error_of(Scans, [file], output, RECORD, True)
    for output in (source, folder, f"{source}/"):
        assert "holds the inputs" in error_of(Scans, [source], output, RECORD, True)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["mask.nrrd", "mask.mha", "mask.png", "m.tar.gz", "mask.hdr"])
def test_scans_refuse_other_endings(source, tmp_path, name):
    text = error_of(Scans, [source / "c0.nii.gz"], tmp_path / name, RECORD, False)
    assert "masks are .nii.gz or .nii" in text and not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("name", "written"),
    [("m.NII.GZ", "m.nii.gz"), ("m.Nii", "m.nii"), ("v1.2", "v1.2/c0.nii.gz")],
)
def test_scans_take_endings_in_capitals_and_folders(source, tmp_path, name, written):
    predict(Scans([source / "c0.nii.gz"], tmp_path / name, RECORD, False))
    assert read_nifti(tmp_path / written).data.shape == (7, 6, 5)
    text = error_of(Scans, [source], tmp_path / "m.nii", RECORD, False)
    assert "one file for 3 inputs; give a folder" in text


def test_scans_note_what_reading_warned_of(tmp_path):
    save(tmp_path / "in/flat.nii", np.full((4, 4, 4), 3, np.int16))
    touch(tmp_path / "in", "notes.txt")
    scans = Scans([tmp_path / "in"], tmp_path / "out", RECORD, False)
    assert scans.notes == ["not used: 1 files (notes.txt)"]
    note = next(scans.share()).note
    assert note == f"{tmp_path / 'in/flat.nii'}: a constant channel, all values are 3"


def colours(shape=(20, 30, 3), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def draw(file: Path, array: np.ndarray, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)
    return file


def test_scans_of_images_write_palettes_or_black_and_white(tmp_path):
    draw(tmp_path / "in/a.PNG", colours())
    draw(tmp_path / "in/b.tif", colours())
    label = np.random.default_rng(0).integers(0, 3, (20, 30))
    scans = Scans([tmp_path / "in"], tmp_path / "out", FLAT, False)
    for scan in scans.share():
        np.testing.assert_array_equal(scan.image, colours().transpose(2, 0, 1))
        mask = scan.mask(onehot(label))
        line = scan.save(mask, {"p": np.full((20, 30), 0.5, np.float32), "rgb": colours()})
    assert line.endswith(
        f"b.png: core {(label == 1).sum()} pixels, rim {(label == 2).sum()} pixels"
    )
    with Image.open(tmp_path / "out/a.png") as image:
        assert image.mode == "P" and len({*np.asarray(image.convert("RGB")).reshape(-1, 3)[0]}) >= 1
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) == 3
    np.testing.assert_array_equal(read_mask(tmp_path / "out/a.png"), np.array([0, 1, 4])[label])
    assert read_mask(tmp_path / "out/maps/a_p.png").max() == 128
    np.testing.assert_array_equal(
        read_image(tmp_path / "out/maps/a_rgb.png"), colours().transpose(2, 0, 1)
    )
    one = FLAT | {"classes": {"gland": 1}, "label_values": {"0": 0, "1": 7}}
    scan = next(Scans([tmp_path / "in/a.PNG"], tmp_path / "m.png", one, False).share())
    scan.save(scan.mask(onehot(label)[1:2]))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), (label == 1) * 255)


def test_scans_of_images_name_other_channels_and_enlarge_reduced_masks(tmp_path):
    draw(tmp_path / "grey.png", colours((20, 30)))
    scans = Scans([tmp_path / "grey.png"], tmp_path / "m.png", FLAT, False)
    assert list(scans.share()) == [] and "1 channels, expected 3 (red," in scans.faults[0]
    draw(tmp_path / "a.png", colours((21, 31, 3)))
    reduced = FLAT | {"reduce": 2}
    scan = next(Scans([tmp_path / "a.png"], tmp_path / "m.png", reduced, False).share())
    assert scan.image.shape == (3, 10, 15)
    label = np.zeros((10, 15), int)
    label[2:5, 3:8] = 1
    mask = scan.mask(onehot(label))
    assert mask.shape == (21, 31) and (mask[4:10, 6:16] == 1).sum() >= 56  # of 60, corners round
    assert mask.sum() == (mask[4:10, 6:16] == 1).sum()


# --- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "lzw.tif"])
def test_read_image_gives_channels_first_and_every_value_told_by_content(tmp_path, name):
    options = {"compression": "tiff_lzw"} if "lzw" in name else {}
    file = draw(tmp_path / name, colours(), **options).rename(tmp_path / "x.jpg")
    image = read_image(file)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, colours().transpose(2, 0, 1))
    np.testing.assert_array_equal(read_image("a.zip/x.png", file.read_bytes()), image)


def test_read_image_keeps_grey_drops_alpha_and_turns_a_palette_into_colours(tmp_path):
    grey = colours((20, 30))
    np.testing.assert_array_equal(read_image(draw(tmp_path / "a.png", grey)), grey[None])
    rgba = colours((20, 30, 4))
    image = read_image(draw(tmp_path / "b.png", rgba))
    np.testing.assert_array_equal(image, rgba[..., :3].transpose(2, 0, 1))
    few = np.array([[10, 200, 30], [250, 0, 90]], np.uint8)[grey % 2]
    Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "c.png")
    np.testing.assert_array_equal(read_image(tmp_path / "c.png"), few.transpose(2, 0, 1))


def png_of(file: Path, width: int, height: int, depth: int, rows: bytes) -> Path:
    """An RGB PNG of any claim; Pillow cannot write 16 bits a channel."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return file


def test_read_image_refuses_what_it_would_not_read_right(tmp_path):
    page = Image.fromarray(colours())
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    Image.new("CMYK", (4, 5)).save(tmp_path / "cmyk.jpg")
    deep = png_of(tmp_path / "deep.png", 5, 4, 16, b"".join(b"\0" + bytes(30) for _ in range(4)))
    assert Image.open(deep).mode == "RGB"  # Pillow would halve it
    for file, words in [
        (tmp_path / "pages.tif", "holds several pages, expected one image"),
        (tmp_path / "cmyk.jpg", "colours are CMYK, expected 8-bit grey or RGB"),
        (deep, "more than 8 bits a channel"),
        (draw(tmp_path / "grey.png", colours((4, 5)).astype(np.uint16)), "more than 8 bits"),
        (draw(tmp_path / "x.tif", np.ones((4, 5), np.float32)), "more than 8 bits a channel"),
        (tmp_path / "none.png", "there is no such file"),
    ]:
        assert error_of(read_image, file).startswith(f"{file}: {words}")
    for content, words in [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "holds an HTML or XML page"),
        (b"GIF89a" + bytes(90), "damaged or cut off (UnidentifiedImageError"),
    ]:
        (file := tmp_path / "y.png").write_bytes(content)
        assert error_of(read_image, file).startswith(f"{file}: {words}")


@pytest.mark.parametrize("kind", ["png", "bmp", "jpg", "tif", "lzw.tif"])
@pytest.mark.parametrize("kept", [10, 0.3, 0.95])
def test_read_image_names_half_a_file(tmp_path, kind, kept):
    options = {"compression": "tiff_lzw"} if "lzw" in kind else {}
    file = draw(tmp_path / f"x.{kind}", colours(), **options)
    blob = file.read_bytes()
    file.write_bytes(blob[: int(kept * len(blob)) if isinstance(kept, float) else kept])
    assert error_of(read_image, file).startswith(f"{file}: damaged or cut off")


@pytest.mark.parametrize("side", [10000, 30000])  # Pillow only warns of the first
def test_read_image_refuses_a_decompression_bomb_before_taking_memory(tmp_path, side):
    file = png_of(tmp_path / "bomb.png", side, side, 8, bytes(100))
    assert "DecompressionBomb" in without_memory(read_image, file)


def test_read_mask_keeps_numbers_of_8_and_16_bits_palettes_and_grey_rgb(tmp_path):
    ids = np.arange(600).reshape(20, 30)
    np.testing.assert_array_equal(
        read_mask(draw(tmp_path / "a.bmp", (ids % 256).astype(np.uint8))), ids % 256
    )
    deep = read_mask(draw(tmp_path / "b.png", ids.astype(np.uint16)))
    np.testing.assert_array_equal(deep, ids)
    assert deep.dtype == np.int32
    mask = Image.fromarray(colours((20, 30)) % 3)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "c.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "c.png"), colours((20, 30)) % 3)
    grey = np.repeat(colours((20, 30, 1)), 3, axis=2)
    np.testing.assert_array_equal(read_mask(draw(tmp_path / "d.png", grey)), grey[..., 0])


def test_read_mask_refuses_colours_and_jpeg(tmp_path):
    mask = Image.fromarray(colours((20, 30)) % 3)
    mask.putpalette([255, 255, 255, 0, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "p.png")
    assert "a palette whose index 0 is not black" in error_of(read_mask, tmp_path / "p.png")
    assert "a mask in colours" in error_of(read_mask, draw(tmp_path / "c.png", colours()))
    assert "a mask in JPEG" in error_of(read_mask, draw(tmp_path / "j.jpg", colours((20, 30))))


def test_shrink_takes_means_and_cuts_the_rest():
    image = np.arange(35, dtype=np.uint8).reshape(1, 5, 7)
    expected = [[4, 6, 8], [18, 20, 22]]  # 0 + 1 + 7 + 8 = 16, rounded half up
    np.testing.assert_array_equal(loaders.shrink(image, 2)[0], expected)


def test_loaders_import_neither_torch_nor_pickle():
    tree = ast.parse(Path(loaders.__file__).read_text(encoding="utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"torch", "pickle", "resource", "fcntl"}
