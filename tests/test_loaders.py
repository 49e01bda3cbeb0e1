"""NIfTI in and out, geometry, normalisation, windows, prepared folders, splits, and the way back from a prediction."""

import ast
import gzip
import itertools
import json
import os
import pickle
import re
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

from common import InputError
from common.old import loaders
from common.old.loaders import (
    centre_crop,
    channels_first,
    check_not_input,
    check_same_grid,
    data_record,
    find_inputs,
    from_ras,
    load_for_prediction,
    make_splits,
    normalise,
    open_prepared,
    orientation_name,
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
    """Column i has length spacing[i] and points along world axis axes[i], forwards or backwards."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign, length) in enumerate(zip(axes, signs, spacing)):
        affine[axis, column] = sign * length
    affine[:3, 3] = origin
    return affine


def oblique(angle: float = 0.3) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    turn = np.eye(4)
    turn[:2, :2] = [[c, -s], [s, c]]
    return turn


def noise(shape=(7, 6, 5), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def error_of(function, *args, **kwargs) -> str:
    """The text of the InputError; it must be one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("real", "named"), [(".nii", ".nii.gz"), (".nii.gz", ".nii")])
def test_read_nifti_tells_gzip_by_content_not_by_name(tmp_path, real, named):
    made = save(tmp_path / f"made{real}", noise())
    other = made.rename(tmp_path / f"other{named}")
    np.testing.assert_array_equal(read_nifti(other).data, noise())


@pytest.mark.parametrize("kept", [1, 3, 11, 60, 0.3, 0.9, -9, -8, -5, -1])
def test_read_nifti_names_a_truncated_gzip_wherever_it_is_cut(tmp_path, kept):
    file = save(tmp_path / "cut.nii.gz", noise((20, 20, 20)))
    blob = file.read_bytes()
    file.write_bytes(blob[: int(kept * len(blob)) if isinstance(kept, float) else kept])
    text = error_of(read_nifti, file)
    assert text.startswith(f"{file}: ") and ("cut off" in text or "expected a NIfTI header" in text)


def test_read_nifti_finds_a_flipped_checksum(tmp_path):
    file = save(tmp_path / "crc.nii.gz", noise())
    blob = bytearray(file.read_bytes())
    blob[-6] ^= 1  # the last 8 bytes are CRC and length
    file.write_bytes(blob)
    assert error_of(read_nifti, file).startswith(
        f"{file}: the gzip stream is damaged or cut off (CRC check failed"
    )


@pytest.mark.parametrize("behind", [False, True])
def test_read_nifti_finds_damage_inside_and_behind_the_voxels(tmp_path, behind):
    file = save(tmp_path / "x.nii.gz", noise((16, 16, 16)))
    blob = bytearray(file.read_bytes())
    blob = blob + b"garbage" if behind else blob[:2000] + bytes(64) + blob[2064:]
    file.write_bytes(blob)
    assert "damaged or cut off" in error_of(read_nifti, file)


def test_read_nifti_names_an_empty_file(tmp_path):
    file = tmp_path / "zero.nii.gz"
    file.touch()
    assert (
        error_of(read_nifti, file)
        == f"{file}: the file is empty (0 bytes), expected a NIfTI volume; copy it again"
    )


def test_read_nifti_names_a_missing_file(tmp_path):
    file = tmp_path / "none.nii"
    assert error_of(read_nifti, file).startswith(
        f"{file}: cannot be read (No such file or directory)"
    )


def test_read_nifti_names_a_web_page(tmp_path):
    file = tmp_path / "page.nii.gz"
    file.write_text("\n<!DOCTYPE html><html>404</html>")
    assert error_of(read_nifti, file).startswith(
        f"{file}: holds an HTML or XML page, not a NIfTI volume"
    )


@pytest.mark.parametrize("content", [b"PK\x03\x04" * 200, b"ObjectType = Image\n", bytes(400)])
def test_read_nifti_names_other_content(tmp_path, content):
    file = tmp_path / "other.nii"
    file.write_bytes(content)
    assert "expected a NIfTI header" in error_of(read_nifti, file)


@pytest.mark.parametrize("packed", [False, True])
def test_read_nifti_refuses_a_header_of_32767_cubed_before_taking_memory(tmp_path, packed):
    file = save(tmp_path / "huge.nii", noise())
    blob = bytearray(file.read_bytes())
    blob[40:48] = np.array([3, 32767, 32767, 32767], "<i2").tobytes()
    file.write_bytes(gzip.compress(blob) if packed else blob)
    tracemalloc.start()
    try:
        text = error_of(read_nifti, file)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert (
        f"{file}: the header promises 32767 x 32767 x 32767 voxels (140,724,603,846,652 bytes), more than"
        in text
    )


def test_read_nifti_refuses_what_memory_cannot_hold(tmp_path, monkeypatch):
    file = save(tmp_path / "x.nii", noise())
    monkeypatch.setattr(os, "sysconf", lambda name: 30)
    assert "too many for 900 bytes of memory" in error_of(read_nifti, file)


def test_read_nifti_refuses_a_gzip_that_promises_more_than_it_holds(tmp_path):
    file = save(tmp_path / "x.nii", noise((10, 10, 10)))
    blob = bytearray(file.read_bytes())
    blob[46:48] = np.array([11], "<i2").tobytes()
    (packed := tmp_path / "x.nii.gz").write_bytes(gzip.compress(blob))
    assert "promises 10 x 10 x 11 voxels (4,400 bytes), the file holds 4,000 bytes" in error_of(
        read_nifti, packed
    )


def test_read_nifti_refuses_a_plain_file_short_by_one_byte(tmp_path):
    file = save(tmp_path / "x.nii", noise())
    file.write_bytes(file.read_bytes()[:-1])
    assert "promises 7 x 6 x 5 voxels (840 bytes), more than the file of 1,191 bytes" in error_of(
        read_nifti, file
    )


@pytest.mark.parametrize(("at", "value", "type_", "text"), [
    (40, [3, 0, 6, 5], "<i2", "expected 1 to 7 axes of length >= 1"),
    (40, [3, -7, 6, 5], "<i2", "expected 1 to 7 axes of length >= 1"),
    (40, [9, 7, 6, 5], "<i2", "expected 1 to 7 axes of length >= 1"),
    (70, [128], "<i2", "expected integers or floats"),  # RGB
    (70, [777], "<i2", "unknown number type code 777"),
    (108, [16.0], "<f4", "vox_offset is 16.0, expected 352"),
    (108, [np.nan], "<f4", "vox_offset is nan, expected 352"),
    (280, [0.0, 0, 0, 0], "<f4", "cannot be inverted"),
    (280, [np.nan], "<f4", "cannot be inverted"),
    (344, [0x31696E], "<i4", "without the mark of a single-file NIfTI"),
])  # fmt: skip
def test_read_nifti_names_a_damaged_header_field(tmp_path, at, value, type_, text):
    file = save(tmp_path / "x.nii", noise())
    blob = bytearray(file.read_bytes())
    field = np.array(value, type_).tobytes()
    blob[at : at + len(field)] = field
    file.write_bytes(blob)
    found = error_of(read_nifti, file)
    assert found.startswith(f"{file}: ") and text in found


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_read_nifti_counts_voxels_that_are_no_numbers(tmp_path, value):
    array = noise()
    array.flat[[3, 50, 77]] = value
    file = save(tmp_path / "nan.nii.gz", array)
    assert error_of(read_nifti, file).startswith(
        f"{file}: 3 voxels are NaN or Inf, expected numbers"
    )


def test_read_nifti_applies_an_offset_to_unsigned_ct_exactly(tmp_path):
    stored = np.arange(0, 4000, 100, dtype=np.uint16).reshape(4, 5, 2)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, file := tmp_path / "ct.nii.gz")
    data = read_nifti(file).data
    assert data.dtype.kind == "i"
    np.testing.assert_array_equal(data, stored.astype(int) - 1024)


def test_read_nifti_applies_a_fractional_slope(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, file := tmp_path / "x.nii")
    np.testing.assert_allclose(read_nifti(file).data.ravel(), np.arange(60) * 0.5 + 10)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_read_nifti_reads_both_versions_and_byte_orders(tmp_path, kind, order):
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    array = np.arange(210, dtype=np.int16).reshape(7, 6, 5)
    nib.save(kind(array, affine_of((1, 2, 0)), header), file := tmp_path / "x.nii")
    length = {nib.Nifti1Image: 348, nib.Nifti2Image: 540}[kind]
    assert file.read_bytes()[:4] == np.array(length, f"{order}i4").tobytes()
    found = read_nifti(file)
    np.testing.assert_array_equal(found.data, array)
    np.testing.assert_allclose(found.affine, affine_of((1, 2, 0)))
    write_nifti(tmp_path / "y.nii.gz", found.data, found, np.uint8)
    again = nib.load(tmp_path / "y.nii.gz")
    np.testing.assert_array_equal(np.asarray(again.dataobj), array)
    assert type(again) is kind


def test_read_nifti_warns_where_the_file_holds_no_position(tmp_path):
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.header["sform_code"], image.header["qform_code"] = 0, 0
    blob = bytearray(image.to_bytes())
    blob[252:256] = bytes(4)
    (file := tmp_path / "x.nii").write_bytes(blob)
    with pytest.warns(UserWarning, match=re.escape(f"{file}: sform and qform code are both 0")):
        assert orientation_name(read_nifti(file).affine) == "LAS"


@pytest.mark.parametrize("shift, warned", [(0.7, True), (0.4, False)])  # mm, of voxels of 1 mm
def test_read_nifti_warns_where_sform_and_qform_differ_by_more_than_half_a_voxel(
    tmp_path, shift, warned
):
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.set_qform(np.eye(4), code=1)
    image.set_sform(nib.affines.from_matvec(np.eye(3), [shift, 0, 0]), code=1)
    nib.save(image, file := tmp_path / "x.nii")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_nifti(file).affine[0, 3] == pytest.approx(shift)
    texts = [str(w.message) for w in caught]
    assert texts == [f"{file}: sform and qform place a corner {shift} mm apart; the sform is used, as nibabel does "
                     "(other programs use the qform)"] * warned  # fmt: skip


def test_read_nifti_measures_sform_and_qform_at_the_far_corner(tmp_path):
    image = nib.Nifti1Image(noise((7, 6, 5)), np.eye(4))
    image.set_qform(np.eye(4), code=1)
    image.set_sform(np.diag([1.2, 1, 1, 1]), code=1)  # 0.2 mm a voxel along 6 steps
    nib.save(image, file := tmp_path / "x.nii")
    with pytest.warns(UserWarning, match=re.escape("a corner 1.2 mm apart")):
        read_nifti(file)


def test_read_nifti_warns_of_other_units(tmp_path):
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.header.set_xyzt_units("micron")
    nib.save(image, file := tmp_path / "x.nii")
    with pytest.warns(UserWarning, match="length unit is micron"):
        read_nifti(file)


def test_read_nifti_gives_spacing_along_the_arrays_axes(tmp_path):
    file = save(tmp_path / "x.nii", noise(), affine_of((2, 0, 1), (1, -1, 1), (0.5, 2.0, 3.0)))
    np.testing.assert_allclose(read_nifti(file).spacing, (0.5, 2.0, 3.0))


def test_channels_first_moves_the_last_axis_to_the_front(tmp_path):
    array = noise((7, 6, 5, 2))
    np.testing.assert_array_equal(
        channels_first(read_nifti(save(tmp_path / "x.nii", array)))[1], array[..., 1]
    )


def test_channels_first_leaves_out_trailing_single_axes(tmp_path):
    assert channels_first(read_nifti(save(tmp_path / "x.nii", noise((7, 6, 5, 1, 1))))).shape == (
        1,
        7,
        6,
        5,
    )


def test_channels_first_names_a_2d_image(tmp_path):
    file = save(tmp_path / "flat.nii", noise((7, 6)))
    text = error_of(lambda: channels_first(read_nifti(file)))
    assert text.startswith(f"{file}: the volume is 2D, 7 x 6, expected 3D")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_write_nifti_keeps_grid_matrices_and_codes(tmp_path):
    image = nib.Nifti1Image(noise(), affine_of((1, 0, 2), (-1, 1, 1), (0.7, 0.8, 3)))
    image.set_qform(image.affine, code=2)
    image.set_sform(oblique() @ image.affine, code=4)
    image.header.set_slope_inter(3, 5)
    nib.save(image, tmp_path / "in.nii.gz")
    with pytest.warns(UserWarning, match="sform and qform"):
        like = read_nifti(tmp_path / "in.nii.gz")
    mask = (like.data > like.data.mean()).astype(np.uint8) * 4
    write_nifti(tmp_path / "out.nii.gz", mask, like, np.uint8)
    before, after = nib.load(tmp_path / "in.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(after.dataobj), mask)
    np.testing.assert_array_equal(after.affine, before.affine)
    for form in ("get_sform", "get_qform"):
        (old, old_code), (new, new_code) = (
            getattr(before, form)(coded=True),
            getattr(after, form)(coded=True),
        )
        np.testing.assert_array_equal(old, new)
        assert old_code == new_code
    blob = gzip.decompress((tmp_path / "out.nii.gz").read_bytes())
    assert np.frombuffer(blob[112:120], "<f4").tolist() == [1.0, 0.0]  # scl_slope, scl_inter


def test_write_nifti_never_writes_onto_its_input(tmp_path):
    file = save(tmp_path / "in.nii", noise())
    before = file.read_bytes()
    (link := tmp_path / "link.nii").symlink_to(file)
    like = read_nifti(file)
    for target in (file, link):
        text = error_of(write_nifti, target, like.data, like, np.float32)
        assert text.startswith(f"{target}: the output would overwrite the input {file}")
    assert file.read_bytes() == before
    assert error_of(check_not_input, link, [tmp_path / "none", file]).startswith(
        f"{link}: the output would overwrite"
    )


def test_write_nifti_leaves_the_old_file_where_the_disk_is_full(tmp_path, monkeypatch):
    like = read_nifti(save(tmp_path / "in.nii", noise()))
    target = tmp_path / "out.nii"
    target.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = error_of(write_nifti, target, like.data, like, np.float32)
    assert text.startswith(f"{target}: cannot be written (No space left on device)")
    assert target.read_bytes() == b"old"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.nii", "out.nii"]


def test_write_nifti_gives_the_same_bytes_twice(tmp_path):
    like = read_nifti(save(tmp_path / "in.nii", noise()))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, like.data, like, np.float32)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


# --- geometry --------------------------------------------------------------------------------------------------------


def pair(tmp_path, label_shape=(7, 6, 5), label_affine=None, image_affine=None):
    image = read_nifti(
        save(tmp_path / "image.nii", noise(), affine_of() if image_affine is None else image_affine)
    )
    affine = affine_of() if label_affine is None else label_affine
    return image, read_nifti(save(tmp_path / "label.nii", np.zeros(label_shape, np.uint8), affine))


def test_check_same_grid_prints_both_shapes(tmp_path):
    text = error_of(check_same_grid, *pair(tmp_path, (7, 6, 4)), allow_affine_mismatch=True)
    assert f"{tmp_path / 'label.nii'}: shape 7 x 6 x 4, while image.nii has 7 x 6 x 5" in text


def test_check_same_grid_prints_both_spacings(tmp_path):
    text = error_of(check_same_grid, *pair(tmp_path, label_affine=affine_of(spacing=(1, 1, 1.5))))
    assert (
        f"{tmp_path / 'label.nii'}: spacing 1 x 1 x 1.5 mm, while image.nii has 1 x 1 x 1 mm"
        in text
    )


def test_check_same_grid_prints_both_affines_and_the_flag(tmp_path):
    text = error_of(
        check_same_grid,
        *pair(tmp_path, label_affine=np.eye(4), image_affine=affine_of(signs=(-1, -1, 1))),
    )
    assert (
        "affine [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], while image.nii has [[-1, 0, 0, -11], "
        in text
    )
    assert "identity-like" in text and "--allow-affine-mismatch" in text


@pytest.mark.parametrize(("shift", "same"), [(0.0009, True), (0.0011, False)])
def test_check_same_grid_tolerates_a_thousandth_of_a_millimetre(tmp_path, shift, same):
    files = pair(tmp_path, label_affine=affine_of(origin=(-11 + shift, 7, 3)))
    if same:
        check_same_grid(*files)
    else:
        assert "affine" in error_of(check_same_grid, *files)


def test_check_same_grid_says_an_allowed_mismatch_aloud(tmp_path):
    with pytest.warns(UserWarning, match="the image's affine is used for both"):
        check_same_grid(*pair(tmp_path, label_affine=np.eye(4)), allow_affine_mismatch=True)


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_to_ras_and_back_is_exact_for_each_orientation(axes, signs, angle):
    affine = oblique(angle) @ affine_of(axes, signs, (0.7, 1.1, 2.5))
    array = noise((2, 4, 5, 6))
    ras, new, undo = to_ras(array, affine)
    assert orientation_name(new) == "RAS"
    np.testing.assert_array_equal(from_ras(ras, undo), array)
    # the same voxel stays at the same millimetre
    for index in [(0, 0, 0), (3, 1, 5), (1, 4, 2)]:
        here = np.argwhere(ras[1] == array[(1, *index)])[0]
        np.testing.assert_allclose(new @ [*here, 1], affine @ [*index, 1], atol=1e-9)


def test_resample_aligns_the_outer_edges():
    affine = affine_of(spacing=(1, 2, 3))
    array, new = resample(noise((8, 6, 10)), affine, (2.0, 1.0, 3.0), order=1)
    assert array.shape == (4, 12, 10)
    np.testing.assert_allclose(new[:3, 3], [-11 + 0.5, 7 - 0.5, 3])  # (s' - s) / 2
    np.testing.assert_allclose(np.diag(new)[:3], (2, 1, 3))


def test_resample_length_is_rounded_and_at_least_one():
    array, _ = resample(noise((7, 6, 2)), np.eye(4), (2.0, 4.0, 9.0), order=1)
    assert array.shape == (4, 2, 1)  # 3.5, 1.5 and 0.2: round half to even, and never 0


@pytest.mark.parametrize("spacing", [(0.5, 1.3, 2.2), (1.7, 0.6, 0.9)])
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_resample_keeps_a_ramp_at_its_millimetres(spacing, angle):
    affine = oblique(angle) @ affine_of((1, 0, 2), (-1, 1, 1), (1.0, 1.2, 2.0))
    index = np.stack(np.meshgrid(*map(np.arange, (12, 11, 10)), indexing="ij"), axis=-1)
    ramp = ((index @ affine[:3, :3].T + affine[:3, 3]) @ [1.0, 2.0, 3.0]).astype(np.float32)
    out, new = resample(ramp[None], affine, spacing, order=1)
    index = np.stack(np.meshgrid(*map(np.arange, out.shape[1:]), indexing="ij"), axis=-1)
    expected = (index @ new[:3, :3].T + new[:3, 3]) @ [1.0, 2.0, 3.0]
    inner = (slice(3, -3),) * 3
    np.testing.assert_allclose(out[0][inner], expected[inner], rtol=1e-4, atol=1e-3)


def test_resample_nearest_invents_no_label():
    label = np.random.default_rng(0).choice([0, 4, 9], (9, 8, 7)).astype(np.uint8)
    out, _ = resample(label, np.eye(4), (0.7, 1.3, 2.1), order=0)
    assert out.dtype == np.uint8 and set(np.unique(out)) <= {0, 4, 9}


def test_resample_to_undoes_a_finer_grid_exactly():
    label = np.random.default_rng(0).integers(0, 5, (9, 8, 7)).astype(np.uint8)
    affine = affine_of(spacing=(1, 1, 2.5))
    fine, grid = resample(label, affine, (0.5, 0.4, 1.0), order=0)
    np.testing.assert_array_equal(resample_to(fine, grid, label.shape, affine, order=0), label)


def test_resample_to_the_same_spacing_changes_nothing():
    array = noise()
    out, affine = resample(array, affine_of(), (1, 1, 1), order=1)
    np.testing.assert_array_equal(out, array)
    np.testing.assert_array_equal(affine, affine_of())


# --- normalisation ---------------------------------------------------------------------------------------------------


def test_normalise_uses_percentiles_of_the_nonzero_voxels_where_a_tenth_is_zero():
    values = np.zeros((1, 10, 10, 10), np.float32)
    values[0, 5:] = noise((5, 10, 10))
    low, high = np.percentile(values[0, 5:], [1, 99])
    out = normalise(values, MR)
    np.testing.assert_allclose(
        out[0, 5:], np.clip((values[0, 5:] - low) / (high - low), 0, 1), atol=1e-6
    )
    assert (out[0, :5] == 0).all()


@pytest.mark.parametrize(("zeros", "over_all"), [(99, True), (100, False)])
def test_normalise_changes_the_rule_at_a_tenth_of_zeros(zeros, over_all):
    values = -noise((1, 10, 10, 10))  # all below 0, so that a 0 is the brightest
    values.flat[:zeros] = 0
    out = normalise(values, MR)
    assert (out.flat[:zeros] == (1 if over_all else 0)).all()


@pytest.mark.parametrize("value", [0, 7.5, 1.7e6])
def test_normalise_gives_zeros_for_a_constant_volume(value):
    assert (normalise(np.full((1, 4, 4, 4), value, np.float32), MR) == 0).all()


def test_normalise_clips_ct_to_the_window():
    ct = np.array([-2000, -100, 0, 100, 3000], np.int16).reshape(1, 5, 1, 1)
    out = normalise(ct, {"channels": [{"kind": "window", "low": -100, "high": 100}]})
    assert out.dtype == np.float32 and out.ravel().tolist() == [0, 0, 0.5, 1, 1]


def test_normalise_keeps_small_differences_of_large_numbers():
    values = (1.7e6 + np.arange(1000.0).reshape(1, 10, 10, 10) / 8).astype(np.float32)
    assert len(np.unique(normalise(values, MR))) > 950


def test_normalise_names_a_wrong_number_of_channels():
    assert (
        error_of(normalise, noise((2, 3, 3, 3)), MR)
        == "the image has 2 channels, expected 1; give one for each"
    )


# --- windows ---------------------------------------------------------------------------------------------------------


def test_read_window_equals_padding_and_cutting():
    rng = np.random.default_rng(0)
    array = rng.integers(1, 99, (2, 6, 7, 8))
    padded = np.pad(array, ((0, 0), (20, 20), (20, 20), (20, 20)), constant_values=-5)
    for _ in range(300):
        start, size = rng.integers(-12, 14, 3), rng.integers(1, 12, 3)
        expected = padded[(slice(None), *(slice(s + 20, s + 20 + n) for s, n in zip(start, size)))]
        found = read_window(array, tuple(start), tuple(size), fill=-5)
        np.testing.assert_array_equal(found, expected)


def test_symmetric_pad_puts_the_odd_voxel_behind():
    assert symmetric_pad((240, 240, 155), (256, 256, 256)) == (8, 8, 50)


def test_centre_crop_undoes_symmetric_padding():
    array = noise((2, 5, 6, 7))
    front = symmetric_pad(array.shape[1:], (8, 9, 7))
    padded = read_window(array, [-f for f in front], (8, 9, 7))
    np.testing.assert_array_equal(centre_crop(padded, (5, 6, 7)), array)


# --- prepared folders ------------------------------------------------------------------------------------------------


def prepared(root: Path, shape=(6, 7, 8), channels=1, **meta) -> Path:
    """Three labelled cases a, b, c and one without label, u."""
    facts = {}
    for i, case in enumerate("abcu"):
        (folder := root / "cases" / case).mkdir(parents=True)
        np.save(
            folder / "image.npy",
            np.clip(noise((channels, *shape), i) / 200, 0, 1).astype(np.float16),
        )
        if case != "u":
            np.save(folder / "label.npy", (noise(shape, i) > 100).astype(np.uint8))
        facts[case] = {
            "shape": shape,
            "spacing_mm": (1, 1, 2),
            "affine": affine_of().tolist(),
            "labelled": case != "u",
        }
    splits = {"train": ["a"], "val": ["b"], "test": ["c"], "unlabelled": ["u"]}
    record = {
        "format": 1,
        "name": "toy",
        "source": "",
        "channels": ["MR"] * channels,
        "classes": {"organ": 1},
    }
    record |= {
        "label_values": {"0": 0, "1": 4},
        "spacing": None,
        "orientation": "RAS",
        "normalisation": MR,
    }
    record |= {"statistics": {}, "splits": splits, "cases": facts} | meta
    (root / "dataset.json").write_text(json.dumps(record))
    return root


def test_open_prepared_gives_memory_maps_and_geometry(tmp_path):
    data = open_prepared(prepared(tmp_path))
    assert isinstance(data.image("a"), np.memmap) and data.image("a").shape == (1, 6, 7, 8)
    assert data.label("a").dtype == np.uint8
    assert (data.cases("train"), data.cases("test", 0), data.shape("a")) == (["a"], [], (6, 7, 8))
    assert data.spacing("a") == (1.0, 1.0, 2.0) and data.affine("a").shape == (4, 4)


def test_open_prepared_prints_the_command_where_nothing_is_prepared(tmp_path):
    command = "prepare it first: python -m data_prep.msd --src DIR --dst"
    missing = tmp_path / "none"
    assert (
        error_of(open_prepared, missing)
        == f"{missing}: the data folder does not exist; {command} {missing}"
    )
    assert (
        error_of(open_prepared, tmp_path)
        == f"{tmp_path}: the data folder is empty; {command} {tmp_path}"
    )


def test_open_prepared_tells_an_unfinished_preparation(tmp_path):
    (tmp_path / "prepare.json").write_text("{}")
    assert "was not prepared to its end; run the same preparation again" in error_of(
        open_prepared, tmp_path
    )


def test_open_prepared_lists_all_faults_at_once(tmp_path):
    cases = prepared(tmp_path) / "cases"
    (cases / "a" / "image.npy").unlink()
    np.save(cases / "b" / "label.npy", np.zeros((6, 7, 8), np.int64))
    np.save(cases / "c" / "image.npy", np.zeros((1, 6, 7, 9), np.float16))
    blob = (cases / "u" / "image.npy").read_bytes()
    (cases / "u" / "image.npy").write_bytes(blob[:-1])
    text = error_of(open_prepared, tmp_path)
    assert f"{tmp_path}: 4 faults: {cases / 'a' / 'image.npy'}: missing" in text
    assert "b/label.npy is int64 (6, 7, 8), expected uint8 (6, 7, 8)" in text
    assert "c/image.npy is float16 (1, 6, 7, 9), expected float16 (1, 6, 7, 8)" in text
    assert f"{cases / 'u' / 'image.npy'}: not a readable array" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}'])
def test_open_prepared_names_a_damaged_description(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    assert f"{tmp_path / 'dataset.json'}: not a description of prepared data" in error_of(
        open_prepared, tmp_path
    )


def test_open_prepared_refuses_a_newer_format(tmp_path):
    text = error_of(open_prepared, prepared(tmp_path, format=9))
    assert text == f"{tmp_path / 'dataset.json'}: format 9, expected at most 1; use newer code"


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train": ["a"], "val": ["b"], "test": ["x"]}, "split test names x, which is no case"),
        ({"train": ["a", "c"], "val": ["b"], "test": ["c"]}, "c is in the splits train and test"),
        ({"train": ["a", "b"], "val": ["b"], "test": ["c"]}, "b is in the splits train and val"),
    ],
)
def test_open_prepared_names_splits_that_cannot_be(tmp_path, splits, words):
    assert words in error_of(open_prepared, prepared(tmp_path, splits=splits))


@pytest.mark.parametrize("key", ["splits", "normalisation", "label_values"])
def test_open_prepared_names_what_its_description_lacks(tmp_path, key):
    file = prepared(tmp_path) / "dataset.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    assert f"not a description of prepared data (KeyError: '{key}')" in error_of(
        open_prepared, tmp_path
    )


def test_prepared_label_names_a_case_without_one(tmp_path):
    data = open_prepared(prepared(tmp_path))
    assert not data.has_label("u")
    assert f"{tmp_path}: case u has no label, expected label.npy" in error_of(data.label, "u")


@pytest.mark.parametrize(("ignore", "known"), [(None, "[0, 1]"), (255, "[0, 1, 255]")])
def test_prepared_label_names_foreign_values(tmp_path, ignore, known):
    data = open_prepared(prepared(tmp_path, **({"ignore": ignore} if ignore else {})))
    file = tmp_path / "cases/b/label.npy"
    label = np.load(file)
    label[0, 0, :3], label[1, 0, :2] = 2, 9
    label[2, 0, 0] = 255 if ignore else 0
    np.save(file, label)
    data.label("a")
    assert error_of(data.label, "b") == (
        f"{file} holds the value 2 in 3 voxels, the value 9 in 2 voxels; dataset.json knows {known}; prepare the data "
        "again"
    )
    label[label > 1] = 0
    label[2, 0, 0] = ignore or 0
    np.save(file, label)
    assert data.label("b").max() == (ignore or 1)


def test_prepared_cases_names_an_unknown_split(tmp_path):
    text = error_of(open_prepared(prepared(tmp_path)).cases, "dev")
    assert text == f"{tmp_path}: no split 'dev', expected one of train, val, test, unlabelled"


def test_prepared_patch_of_a_256_cube_is_read_in_5_ms_and_without_the_rest(tmp_path):
    data = open_prepared(prepared(tmp_path, (256, 256, 256)))
    size, times = (64, 64, 64), []
    before = resident_bytes()
    for i in range(9):
        image, start = data.image("a"), (20 * i - 10, 10, 100)
        begin = time.perf_counter()
        window = read_window(image, start, size)
        times.append(time.perf_counter() - begin)
        after = resident_bytes()
        assert window.shape == (1, *size)
        if before and i == 0:  # mapped pages count as resident once touched
            assert after - before < 0.5 * image.nbytes
        del image
    assert sorted(times)[4] < 0.005


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def test_prepared_keeps_no_file_open(tmp_path):
    data = open_prepared(prepared(tmp_path))
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files cannot be counted on this system")
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        np.array(data.image("a"))
    assert len(os.listdir("/proc/self/fd")) <= count + 1


def test_data_record_holds_plain_types_and_all_that_predict_needs(tmp_path):
    record = data_record(open_prepared(prepared(tmp_path, grid=[8, 8, 8])))
    assert ast.literal_eval(repr(record)) == record
    keys = {
        "channels",
        "classes",
        "label_values",
        "spacing",
        "orientation",
        "normalisation",
        "statistics",
        "grid",
    }
    assert keys <= set(record)


def test_data_record_passes_on_regions_and_words_where_the_set_has_them(tmp_path):
    more = {"regions": {"all": [1]}, "channel_suffixes": {"MR": ["mr", "t1"]}}
    record = data_record(open_prepared(prepared(tmp_path / "a", **more)))
    assert {k: record.get(k) for k in more} == more
    assert not more.keys() & data_record(open_prepared(prepared(tmp_path / "b"))).keys()


def test_scored_are_the_regions_where_the_set_names_some_else_the_classes(tmp_path):
    classes, regions = {"core": 1, "rim": 2}, {"all": [1, 2], "core": [1]}
    assert open_prepared(prepared(tmp_path / "a", classes=classes)).scored == classes
    assert (
        open_prepared(prepared(tmp_path / "b", classes=classes, regions=regions)).scored == regions
    )
    phantoms = loaders.Phantoms()
    assert phantoms.scored == phantoms.classes


@pytest.mark.parametrize("values", [[], [1, 3], [0, 1]])
def test_open_prepared_refuses_a_region_of_values_that_are_no_class(tmp_path, values):
    folder = prepared(tmp_path, classes={"core": 1, "rim": 2}, regions={"all": values})
    assert f"region all is {values}, expected some of [1, 2]" in error_of(open_prepared, folder)


def test_make_splits_gives_the_published_brats_validation_set():
    splits = make_splits(range(1, 370))
    assert [len(splits[k]) for k in ("train", "val", "test")] == [295, 37, 37]
    assert sorted(splits["val"])[:8] == [29, 32, 33, 39, 43, 54, 58, 83]
    assert sorted(splits["test"])[-5:] == [336, 338, 340, 354, 356, 360][-5:]


@pytest.mark.parametrize(
    ("n", "sizes"),
    [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (16, (13, 2, 1))],
)
def test_make_splits_leaves_no_split_empty_from_three_cases_on(n, sizes):
    splits = make_splits([f"{i:02d}" for i in range(n)])
    assert tuple(map(len, splits.values())) == sizes
    assert sorted(itertools.chain(*splits.values())) == [f"{i:02d}" for i in range(n)]


def test_make_splits_does_not_depend_on_the_order_given():
    ids = [f"{i:03d}" for i in range(40)]
    assert make_splits(ids) == make_splits(reversed(ids)) != make_splits(ids, seed=1)


# --- prediction ------------------------------------------------------------------------------------------------------

RECORD = {
    "channels": ["MR"],
    "label_values": {"0": 0, "1": 1, "2": 4},
    "spacing": None,
    "normalisation": MR,
}


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_restore_gives_back_a_mask_exactly_from_a_finer_grid_in_each_orientation(
    tmp_path, axes, signs
):
    affine = oblique(0.2) @ affine_of(axes, signs, (1.0, 1.5, 2.0))
    file = save(tmp_path / "x.nii", noise((6, 5, 4)), affine)
    published = np.random.default_rng(1).choice([0, 1, 4], (6, 5, 4)).astype(np.uint8)
    image, restore = load_for_prediction([file], RECORD | {"spacing": [0.5, 0.5, 0.5]})
    ras, ras_affine, _ = to_ras(np.where(published == 4, 2, published).astype(np.uint8), affine)
    network, _ = resample(ras, ras_affine, (0.5, 0.5, 0.5), order=0)
    assert network.shape == image.shape[1:] and image.dtype == np.float32
    mask = restore.mask(network)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, published)
    assert restore.map(image).shape == (1, 6, 5, 4)


def test_restore_map_puts_a_ramp_back_where_it_was(tmp_path):
    affine = affine_of((2, 0, 1), (-1, 1, -1), (1.0, 1.5, 2.0))
    file = save(tmp_path / "x.nii", noise((12, 11, 10)), affine)
    _, restore = load_for_prediction([file], RECORD | {"spacing": [1.2, 0.8, 1.0]})
    index = np.stack(np.meshgrid(*map(np.arange, (12, 11, 10)), indexing="ij"), axis=-1)
    ramp = ((index @ affine[:3, :3].T) @ [1.0, 2.0, 3.0]).astype(np.float32)
    network, _ = resample(*to_ras(ramp, affine)[:2], (1.2, 0.8, 1.0), order=1)
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(restore.map(network)[inner], ramp[inner], atol=1e-3)


def test_load_for_prediction_reads_channels_from_files_or_from_one_4d_file(tmp_path):
    array = noise((6, 5, 4, 2))
    record = RECORD | {
        "channels": ["T2", "ADC"],
        "normalisation": {"channels": [loaders.PERCENTILES] * 2},
    }
    single, _ = load_for_prediction([save(tmp_path / "both.nii", array)], record)
    files = [save(tmp_path / f"x_{i:04d}.nii", array[..., i]) for i in range(2)]
    several, restore = load_for_prediction(files, record)
    np.testing.assert_array_equal(single, several)
    assert restore.mask(np.ones((6, 5, 4))).shape == (6, 5, 4)


def test_load_for_prediction_names_a_wrong_number_of_channels(tmp_path):
    file = save(tmp_path / "x.nii", noise((6, 5, 4, 2)))
    text = error_of(load_for_prediction, [file], RECORD)
    found = "the volume is 4D, 6 x 5 x 4 x 2: channels found 2"
    assert text == f"{file}: {found}, expected 1 channel (MR); give exactly these"


def test_load_for_prediction_names_a_4d_file_among_channel_files(tmp_path):
    a, b = save(tmp_path / "a.nii", noise((6, 5, 4))), save(tmp_path / "b.nii", noise((6, 5, 4, 3)))
    text = error_of(load_for_prediction, [a, b], RECORD | {"channels": ["T2", "ADC"]})
    assert text.startswith(f"{b}: the volume is 4D, 6 x 5 x 4 x 3, expected one 3D volume")


def test_load_for_prediction_names_a_2d_file(tmp_path):
    file = save(tmp_path / "x.nii", noise((6, 5)))
    assert "the volume is 2D, 6 x 5, expected 3D" in error_of(load_for_prediction, [file], RECORD)


def test_load_for_prediction_names_channels_on_different_grids(tmp_path):
    files = [
        save(tmp_path / "a.nii", noise()),
        save(tmp_path / "b.nii", noise(), affine_of(spacing=(1, 1, 3))),
    ]
    text = error_of(load_for_prediction, files, RECORD | {"channels": ["T2", "ADC"]})
    assert text.startswith(f"{files[1]}: spacing 1 x 1 x 3 mm, while a.nii has 1 x 1 x 1 mm")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def test_find_inputs_sorts_by_number_and_leaves_out_dot_files(tmp_path):
    touch(
        tmp_path,
        "case10.nii.gz",
        "case2.nii",
        "._case2.nii.gz",
        ".DS_Store",
        "notes.txt",
        "case1.nii.gz",
    )
    assert [name for name, _ in find_inputs([tmp_path], 1)] == ["case1", "case2", "case10"]


@pytest.mark.parametrize("name", ["b.mha", "_c.nii.gz", "D.NII.GZ"])
def test_find_inputs_drops_no_file_that_was_named(tmp_path, name):
    for file in ("a.nii.gz", name):
        (tmp_path / file).touch()
    text = error_of(find_inputs, [tmp_path / "a.nii.gz", tmp_path / name], 1)
    assert text.startswith(f"{tmp_path / name}: no .nii or .nii.gz file")


def test_a_foreign_file_is_not_written_over_and_an_own_one_is(tmp_path):
    image, label = pair(tmp_path)
    target = tmp_path / "mask.nii.gz"
    loaders.check_output(target, [image.path])
    loaders.write_nifti(target, np.zeros((7, 6, 5)), image, np.uint8)
    loaders.check_output(target, [image.path])
    text = error_of(loaders.check_output, label.path, [image.path])
    assert text.startswith(f"{label.path}: is there and was not written by `predict`")
    target.write_bytes(b"no NIfTI")
    assert "was not written by" in error_of(loaders.check_output, target, [image.path])
    assert "would overwrite the input" in error_of(loaders.check_output, image.path, [image.path])
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "true.png")
    assert "was not written by" in error_of(
        loaders.check_output, tmp_path / "true.png", [image.path]
    )


def test_find_inputs_groups_channel_files(tmp_path):
    touch(tmp_path, "b_0001.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz")
    found = find_inputs([tmp_path], ["T2", "ADC"])
    assert [(name, [f.name for f in files]) for name, files in found] == [
        ("a", ["a_0000.nii.gz", "a_0001.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
    ]


def test_find_inputs_takes_case_numbers_of_four_digits_for_cases(tmp_path):
    touch(tmp_path, "amos_0001.nii.gz", "amos_0002.nii.gz")
    assert [name for name, _ in find_inputs([tmp_path], 1)] == ["amos_0001", "amos_0002"]


def test_find_inputs_names_an_incomplete_set_of_channels(tmp_path):
    touch(tmp_path, "a_0000.nii.gz")
    text = error_of(find_inputs, [tmp_path], 2)
    assert (
        text
        == f"{tmp_path / 'a_0000.nii.gz'}: channel files 0000 of a, expected 0000 to 0001; complete it"
    )


def test_find_inputs_takes_as_many_files_as_channels_for_one_case(tmp_path):
    files = [save(tmp_path / f"{name}.nii", noise()) for name in ("t2", "adc")]
    assert find_inputs(files, 2) == [("t2", files)]  # in the order given


def test_find_inputs_names_what_is_not_there(tmp_path):
    assert error_of(find_inputs, [tmp_path / "x.nii"], 1).startswith(
        f"{tmp_path / 'x.nii'}: no such file or folder"
    )
    assert error_of(find_inputs, [tmp_path], 1).startswith(
        f"{tmp_path}: no .nii or .nii.gz file found"
    )


def test_find_inputs_refuses_one_name_twice(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        touch(tmp_path / folder, "case.nii")
    assert error_of(find_inputs, [tmp_path / "a", tmp_path / "b"], 1).startswith(
        "case: found more than once"
    )


BRATS = ["t1", "t1ce", "t2", "flair"]
SUFFIXES = {
    "t1": ["t1", "t1n"],
    "t1ce": ["t1ce", "t1c"],
    "t2": ["t2", "t2w"],
    "flair": ["flair", "t2f"],
}


def named(found: list[tuple[str, list[Path]]]) -> list[tuple[str, list[str]]]:
    return [(case, [f.name for f in files]) for case, files in found]


def test_find_inputs_tells_channels_by_their_names_in_any_order(tmp_path):
    touch(
        tmp_path,
        "b_ADC.nii.gz",
        "b_t2.nii",
        "a-adc.nii",
        "a-x_T2.nii.gz",
        "a-x-Adc.nii",
        "a_T2.nii.gz",
    )
    found = [("a", ["a_T2.nii.gz", "a-adc.nii"]), ("a-x", ["a-x_T2.nii.gz", "a-x-Adc.nii"])]
    found.append(("b", ["b_t2.nii", "b_ADC.nii.gz"]))
    assert named(find_inputs([tmp_path], ["T2", "ADC"])) == found
    for order in itertools.permutations([tmp_path / "b_ADC.nii.gz", tmp_path / "b_t2.nii"]):
        assert named(find_inputs(order, ["T2", "ADC"])) == found[2:]


def test_find_inputs_tells_channels_by_a_sets_own_words(tmp_path):
    touch(
        tmp_path,
        *(f"p-001_{name}.nii" for name in BRATS),
        *(f"q-t1c-{w}.nii" for w in ("T2F", "t1n", "t2w", "t1c")),
    )
    assert named(find_inputs([tmp_path], BRATS, SUFFIXES)) == [
        ("p-001", [f"p-001_{name}.nii" for name in BRATS]),
        ("q-t1c", ["q-t1c-t1n.nii", "q-t1c-t1c.nii", "q-t1c-t2w.nii", "q-t1c-T2F.nii"]),
    ]


def test_find_inputs_takes_the_longest_word_and_the_folder_of_a_bare_one(tmp_path):
    (folder := tmp_path / "p7").mkdir()
    touch(folder, "adc-b50.nii", "b50.nii", "p8_adc-b50.nii", "p8-b50.nii")
    found = [("p7", ["b50.nii", "adc-b50.nii"]), ("p8", ["p8-b50.nii", "p8_adc-b50.nii"])]
    assert named(find_inputs([folder], ["b50", "ADC-b50"])) == found


def test_find_inputs_searches_below_a_folder_without_volumes_and_says_what_it_leaves_out(tmp_path):
    for case in ("x/HGG/p10", "x/LGG/p2"):
        (tmp_path / case).mkdir(parents=True)
        touch(
            tmp_path / case,
            *(f"{Path(case).name}_{w}.nii.gz" for w in ("T2", "ADC", "seg")),
            "._p_T2.nii.gz",
        )
    (tmp_path / "x/__MACOSX").mkdir()
    touch(tmp_path / "x/__MACOSX", "p3_T2.nii.gz")
    (tmp_path / "x/LGG/loop").symlink_to(tmp_path / "x")
    with pytest.warns(UserWarning) as said:
        found = find_inputs([tmp_path], ["T2", "ADC"])
    assert [case for case, _ in found] == ["p2", "p10"]
    text = "left out, since their names tell no channel: 2 files (p2_seg.nii.gz, p10_seg.nii.gz)"
    assert [str(w.message) for w in said] == [text]
    touch(tmp_path / "x", "p9.nii.gz")  # a folder that holds a volume itself is not searched
    assert named(find_inputs([tmp_path / "x"], ["T2", "ADC"])) == [("p9", ["p9.nii.gz"])]


def test_find_inputs_takes_an_unpackers_folder_for_the_file_in_it(tmp_path):
    (folder := tmp_path / "p1_ADC.nii").mkdir()
    touch(folder, "0057_brain.nii")
    touch(tmp_path, "p1_T2.nii")
    for paths in (
        [tmp_path],
        [folder, tmp_path / "p1_T2.nii"],
        [folder / "0057_brain.nii", tmp_path / "p1_T2.nii"],
    ):
        assert named(find_inputs(paths, ["T2", "ADC"])) == [("p1", ["p1_T2.nii", "0057_brain.nii"])]


@pytest.mark.parametrize("channels", [2, ["MR", "MR"], ["MR", "mr"], ["1", "2"], ["MR"]])
def test_find_inputs_does_not_guess_where_names_are_no_words(tmp_path, channels):
    touch(tmp_path, "x_1.nii", "x_2.nii", "x_MR.nii")
    assert [case for case, _ in find_inputs([tmp_path], channels)] == ["x_1", "x_2", "x_MR"]


def test_find_inputs_does_not_search_below_where_no_name_tells(tmp_path):
    (tmp_path / "labels").mkdir()
    touch(tmp_path / "labels", "x.nii.gz")
    for channels in (["MR"], ["T2", "ADC"]):
        assert "no .nii or .nii.gz file found" in error_of(find_inputs, [tmp_path], channels)


def test_find_inputs_names_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    assert (
        error_of(find_inputs, [tmp_path], 1)
        == f"{tmp_path}: cannot be read (Permission denied); check the rights"
    )


def test_find_inputs_keeps_the_order_given_unless_a_name_tells_another(tmp_path):
    some = [save(tmp_path / name, noise()) for name in ("x_T2.nii", "scan.nii")]
    assert find_inputs(some, ["T2", "ADC"]) == [("x_T2", some)]
    text = error_of(find_inputs, some[::-1], ["T2", "ADC"])
    assert text.startswith(f"{tmp_path}: case x has no ADC, expected x_adc.nii.gz; add, rename")


def test_find_inputs_lists_all_missing_and_double_files(tmp_path):
    (tmp_path / "more").mkdir()
    touch(tmp_path, "a_T2.nii", "b_ADC.nii", "b_T2.nii", "c_ADC.nii.gz")
    touch(tmp_path / "more", "b_T2.nii.gz")
    text = error_of(find_inputs, [tmp_path, tmp_path / "more"], ["T2", "ADC"])
    assert text == (
        f"{tmp_path}: case a has no ADC, expected a_adc.nii.gz | "
        f"{tmp_path}: case b has 2 files for T2, expected one: {tmp_path / 'b_T2.nii'} and "
        f"{tmp_path / 'more/b_T2.nii.gz'} | {tmp_path}: case c has no T2, expected c_t2.nii.gz; "
        "add, rename or take away files, or predict the other cases by themselves"
    )


def test_loaders_do_not_import_torch():
    tree = ast.parse(Path(loaders.__file__).read_text(encoding="utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(name.split(".")[0] == "torch" for name in names)


def test_reading_a_sound_file_says_nothing(tmp_path):
    file = save(tmp_path / "x.nii.gz", noise())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_nifti(file)


# --- images ----------------------------------------------------------------------------------------------------------


def tissue(shape=(20, 30, 3), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def draw(file: Path, array: np.ndarray, **options) -> Path:
    Image.fromarray(array).save(file, **options)
    return file


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif"])
def test_read_image_gives_channels_first_and_every_value(tmp_path, name):
    image = loaders.read_image(draw(tmp_path / name, tissue()))
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, tissue().transpose(2, 0, 1))


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_deflate"])
def test_read_image_unpacks_tif(tmp_path, compression):
    image = loaders.read_image(draw(tmp_path / "x.tif", tissue(), compression=compression))
    np.testing.assert_array_equal(image, tissue().transpose(2, 0, 1))


def test_read_image_reads_jpg(tmp_path):
    smooth = np.tile(np.arange(0, 240, 8, dtype=np.uint8)[:, None, None], (1, 20, 3))
    image = loaders.read_image(draw(tmp_path / "x.jpg", smooth, quality=95))
    assert (
        image.shape == (3, 30, 20)
        and np.abs(image.astype(int) - smooth.transpose(2, 0, 1)).max() < 6
    )


def test_read_image_tells_the_format_by_content(tmp_path):
    file = draw(tmp_path / "x.png", tissue()).rename(tmp_path / "x.jpg")
    np.testing.assert_array_equal(loaders.read_image(file), tissue().transpose(2, 0, 1))


def test_read_image_reads_bytes_that_a_path_only_names(tmp_path):
    blob = draw(tmp_path / "x.png", tissue()).read_bytes()
    np.testing.assert_array_equal(
        loaders.read_image("a.zip/x.png", blob), tissue().transpose(2, 0, 1)
    )


def test_read_image_keeps_grey_as_one_channel(tmp_path):
    grey = tissue((20, 30))
    np.testing.assert_array_equal(loaders.read_image(draw(tmp_path / "x.png", grey)), grey[None])


def test_read_image_drops_alpha_without_blending(tmp_path):
    rgba = tissue((20, 30, 4))
    image = loaders.read_image(draw(tmp_path / "x.png", rgba))
    np.testing.assert_array_equal(image, rgba[..., :3].transpose(2, 0, 1))


def test_read_image_turns_a_palette_into_its_colours(tmp_path):
    few = np.array([[10, 200, 30], [250, 0, 90]], np.uint8)[tissue((20, 30)) % 2]
    Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "x.png")
    np.testing.assert_array_equal(loaders.read_image(tmp_path / "x.png"), few.transpose(2, 0, 1))


def png_of_16_bits(file: Path, shape=(4, 5)) -> Path:
    """An RGB PNG with 16 bits a channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + bytes(shape[1] * 6) for _ in range(shape[0]))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", shape[1], shape[0], 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return file


def test_read_image_refuses_16_bit_grey(tmp_path):
    file = draw(tmp_path / "x.png", tissue((4, 5)).astype(np.uint16))
    assert (
        error_of(loaders.read_image, file)
        == f"{file}: 16 bits or more a channel, expected 8; convert it and mind the range"
    )


def test_read_image_refuses_16_bit_colour_which_pillow_would_halve(tmp_path):
    file = png_of_16_bits(tmp_path / "x.png")
    assert Image.open(file).mode == "RGB" and "16 bits or more a channel" in error_of(
        loaders.read_image, file
    )


def test_read_image_refuses_floats_and_cmyk(tmp_path):
    assert "floating point" in error_of(
        loaders.read_image, draw(tmp_path / "x.tif", np.ones((4, 5), np.float32))
    )
    Image.new("CMYK", (4, 5)).save(tmp_path / "y.jpg")
    assert "colours are of kind CMYK, expected 8-bit grey or RGB" in error_of(
        loaders.read_image, tmp_path / "y.jpg"
    )


def test_read_image_refuses_a_tif_of_two_pages(tmp_path):
    one = Image.fromarray(tissue())
    one.save(tmp_path / "x.tif", save_all=True, append_images=[one])
    assert "holds 2 pages, expected one image" in error_of(loaders.read_image, tmp_path / "x.tif")


@pytest.mark.parametrize("kind", ["png", "bmp", "jpg", "tif", "lzw.tif"])
@pytest.mark.parametrize("kept", [10, 0.3, 0.6, 0.95])
def test_read_image_names_half_a_file(tmp_path, kind, kept):
    file = draw(
        tmp_path / f"x.{kind}", tissue(), **({"compression": "tiff_lzw"} if "lzw" in kind else {})
    )
    blob = file.read_bytes()
    file.write_bytes(blob[: int(kept * len(blob)) if isinstance(kept, float) else kept])
    text = error_of(loaders.read_image, file)
    assert text.startswith(f"{file}: the image is damaged or cut off") and text.endswith(
        "; copy it again"
    )


def test_read_image_names_a_jpg_without_its_last_bytes(tmp_path):
    file = draw(tmp_path / "x.jpg", tissue())
    file.write_bytes(file.read_bytes()[:-2])
    assert "cut off" in error_of(loaders.read_image, file)


@pytest.mark.parametrize("side", [10000, 30000])  # Pillow only warns of the first
def test_read_image_refuses_a_decompression_bomb_before_taking_memory(tmp_path, side):
    file = tmp_path / "bomb.png"
    blob = bytearray(png_of_16_bits(file).read_bytes())
    blob[16:33] = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0) + bytes(4)
    blob[29:33] = struct.pack(">I", zlib.crc32(blob[12:29]))
    file.write_bytes(blob)
    tracemalloc.start()
    try:
        assert error_of(loaders.read_image, file).startswith(
            f"{file}: claims more than 89,478,485 pixels"
        )
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_read_image_says_what_else_it_found(tmp_path):
    file = tmp_path / "x.png"
    for content, words in [
        (b"", "the file is empty (0 bytes)"),
        (b"<!DOCTYPE html>", "an HTML or XML page (a failed download?), expected a PNG"),
        (b"version https://git-lfs.github.com/spec/v1", "holds a Git LFS pointer"),
        (
            b"GIF89a" + bytes(90),
            "b'GIF89a\\x00\\x00' at its start, expected a PNG, JPG, BMP or TIF image",
        ),
    ]:
        file.write_bytes(content)
        assert error_of(loaders.read_image, file).startswith(f"{file}: {words}")
    assert "cannot be read (No such file" in error_of(loaders.read_image, tmp_path / "none.png")


def test_read_mask_keeps_object_numbers_of_8_and_16_bits(tmp_path):
    ids = np.arange(600).reshape(20, 30)
    small, large = draw(tmp_path / "a.bmp", (ids % 256).astype(np.uint8)), tmp_path / "b.png"
    draw(large, ids.astype(np.uint16))
    np.testing.assert_array_equal(loaders.read_mask(small), ids % 256)
    np.testing.assert_array_equal(loaders.read_mask(large), ids)
    assert loaders.read_mask(large).dtype == np.int32


def test_read_mask_takes_indices_of_a_palette_whose_first_colour_is_black(tmp_path):
    mask = Image.fromarray(tissue((20, 30)) % 3).convert("L")
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "x.png")
    np.testing.assert_array_equal(loaders.read_mask(tmp_path / "x.png"), tissue((20, 30)) % 3)


def test_read_mask_refuses_a_palette_that_numbers_colours(tmp_path):
    mask = Image.fromarray(tissue((20, 30)) % 3).convert("L")
    mask.putpalette([255, 255, 255, 0, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "x.png")
    text = error_of(loaders.read_mask, tmp_path / "x.png")
    assert "a palette whose index 0 is the colour (255, 255, 255), expected black" in text


def test_read_mask_takes_rgb_only_where_it_is_grey(tmp_path):
    grey = np.repeat(tissue((20, 30, 1)), 3, axis=2)
    np.testing.assert_array_equal(loaders.read_mask(draw(tmp_path / "a.png", grey)), grey[..., 0])
    assert "a mask in colours" in error_of(loaders.read_mask, draw(tmp_path / "b.png", tissue()))


def test_read_mask_refuses_jpeg(tmp_path):
    assert "a mask in JPEG" in error_of(
        loaders.read_mask, draw(tmp_path / "x.jpg", tissue((20, 30)))
    )


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


def python_2_pickle(entries: dict[str, object]) -> bytes:
    """A dict as Python 2 pickles it (protocol 2): str as bytes, arrays by numpy.core.multiarray._reconstruct."""
    text = b"\x80\x02}"
    for key, value in entries.items():
        text += short(key.encode()) + written(value) + b"s"
    return text + b"."


def short(text: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(text)) + text


def written(value) -> bytes:
    if isinstance(value, np.ndarray):
        shape = b"".join(b"J" + struct.pack("<i", n) for n in value.shape)
        dtype = (
            b"cnumpy\ndtype\n("
            + short(b"u1")
            + b"K\x00K\x01tR(K\x03"
            + short(b"|")
            + b"NNN"
            + 2 * MINUS
            + b"K\x00tb"
        )
        start = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + short(b"b") + b"tR"
        )
        return start + b"(K\x01(" + shape + b"t" + dtype + b"\x89" + short(value.tobytes()) + b"tb"
    if isinstance(value, list):
        return b"](" + b"".join(written(v) for v in value) + b"e"
    return b"J" + struct.pack("<i", value) if isinstance(value, int) else short(str(value).encode())


MINUS = b"J\xff\xff\xff\xff"
TEN = [f"kind {i}" for i in range(10)]


def cifar(root: Path, **files: bytes) -> Path:
    """cifar-10-batches-py with two training batches of 3 images and a test batch of 2."""
    root.mkdir(exist_ok=True)
    for seed, (name, n) in enumerate(
        {"data_batch_1": 3, "data_batch_3": 3, "test_batch": 2}.items()
    ):
        batch = {
            "batch_label": name,
            "labels": list(range(n)),
            "data": tissue((n, 3072), seed),
            "filenames": ["a"] * n,
        }
        (root / name).write_bytes(python_2_pickle(batch))
    (root / "batches.meta").write_bytes(python_2_pickle({"label_names": TEN, "num_vis": 3072}))
    for name, blob in files.items():
        (root / name).write_bytes(blob)
    return root


def test_read_cifar10_gives_images_channels_first_and_all_batches_that_are_there(tmp_path):
    data = loaders.read_cifar10(cifar(tmp_path))
    assert data["train_images"].shape == (6, 3, 32, 32) and data["test_images"].shape == (
        2,
        3,
        32,
        32,
    )
    assert data["train_labels"].tolist() == [0, 1, 2, 0, 1, 2] and data["classes"] == TEN
    assert data["files"] == ["data_batch_1", "data_batch_3", "test_batch"]
    raw = tissue((3, 3072), 1)  # of data_batch_3
    assert data["train_images"][4, 1, 2, 5] == raw[1, 1024 + 2 * 32 + 5]  # green, row 2, column 5


def test_read_cifar10_reads_what_python_3_wrote(tmp_path):
    batch = {b"labels": [7, 8], b"data": tissue((2, 3072))}
    data = loaders.read_cifar10(cifar(tmp_path, test_batch=pickle.dumps(batch, protocol=2)))
    np.testing.assert_array_equal(data["test_images"].reshape(2, -1), batch[b"data"])


class Command:
    def __reduce__(self):
        return os.system, ("touch called",)


@pytest.mark.parametrize(
    "value",
    [
        Command(),
        np.array([Command()], object),
        np.array([1, "a"], object),
        Path("x"),
        np.float64(1),
        {1, 2},
        np.ma.zeros(3),
        print,
    ],
)
def test_read_cifar10_calls_nothing_that_a_file_asks_for(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path / "c", test_batch=pickle.dumps({"data": value}, protocol=2))
    assert "not a CIFAR-10 batch, or damaged (" in error_of(loaders.read_cifar10, tmp_path / "c")
    assert not (tmp_path / "called").exists()


def test_read_cifar10_names_half_a_file(tmp_path):
    blob = (cifar(tmp_path) / "data_batch_1").read_bytes()
    for n in (0, 1, 40, 200, 5000, len(blob) - 1):
        (tmp_path / "data_batch_1").write_bytes(blob[:n])
        assert f"{tmp_path / 'data_batch_1'}: not a CIFAR-10 batch" in error_of(
            loaders.read_cifar10, tmp_path
        )


def test_read_cifar10_names_labels_that_do_not_fit(tmp_path):
    batch = python_2_pickle({"labels": [1, 10, 2], "data": tissue((3, 3072))})
    text = error_of(loaders.read_cifar10, cifar(tmp_path, data_batch_1=batch))
    assert (
        text
        == f"{tmp_path / 'data_batch_1'}: labels do not fit, expected 3 integers of 0 to 9; get it again"
    )


def test_read_cifar10_names_a_folder_that_is_still_packed(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    assert error_of(loaders.read_cifar10, tmp_path).endswith("unpack cifar-10-python.tar.gz first")


# --- prepared images -------------------------------------------------------------------------------------------------


def prepared_2d(root: Path, shape=(6, 7), **meta) -> Path:
    """Two labelled images, one of them with objects, and one unlabelled."""
    record = {
        "format": 1,
        "name": "p2",
        "channels": ["red", "green", "blue"],
        "classes": {"gland": 1},
    }
    record |= {
        "label_values": {"0": 0, "1": 1},
        "spacing": None,
        "orientation": "YX",
        "normalisation": {"kind": "none"},
    }
    record |= {
        "statistics": {},
        "splits": {"train": ["a", "b"], "pretrain": ["a", "b", "u"]},
        "cases": {},
    }
    for name in "abu":
        (root / "cases" / name).mkdir(parents=True)
        np.save(root / "cases" / name / "image.npy", np.zeros((3, *shape), np.uint8))
        if name != "u":
            np.save(root / "cases" / name / "label.npy", np.zeros(shape, np.uint8))
        if name == "a":
            np.save(root / "cases" / name / "instances.npy", np.full(shape, 300, np.int32))
        record["cases"][name] = {"shape": list(shape), "labelled": name != "u"} | (
            {"objects": 1} if name == "a" else {}
        )
    (root / "dataset.json").write_text(json.dumps(record | meta))
    return root


def test_open_prepared_opens_images_labels_and_instances(tmp_path):
    data = open_prepared(prepared_2d(tmp_path, ignore=255))
    assert (data.axes, data.ignore, data.shape("a"), data.spacing("a")) == (
        2,
        255,
        (6, 7),
        (1.0, 1.0),
    )
    assert (
        data.image("u").shape == (3, 6, 7)
        and data.label("b").shape == (6, 7)
        and not data.has_label("u")
    )
    assert data.instances("a").max() == 300 and data.instances("b") is None
    assert data.cases("pretrain") == ["a", "b", "u"]


def test_open_prepared_names_wrong_arrays_of_images(tmp_path):
    prepared_2d(tmp_path)
    np.save(tmp_path / "cases" / "a" / "instances.npy", np.zeros((6, 7), np.uint8))
    np.save(tmp_path / "cases" / "b" / "image.npy", np.zeros((3, 6, 7), np.float16))
    text = error_of(open_prepared, tmp_path)
    assert "a/instances.npy is uint8 (6, 7), expected int32 (6, 7)" in text
    assert "b/image.npy is float16 (3, 6, 7), expected uint8 (3, 6, 7)" in text


def test_data_record_of_images_holds_what_predict_needs(tmp_path):
    record = data_record(open_prepared(prepared_2d(tmp_path, ignore=255)))
    assert record["channels"] == ["red", "green", "blue"] and record["ignore"] == 255


def test_open_data_refuses_images_where_volumes_are_meant_and_the_reverse(tmp_path):
    flat, deep = prepared_2d(tmp_path / "flat"), prepared(tmp_path / "deep")
    assert "holds images, expected volumes; choose another --data" in error_of(
        loaders.open_data, str(flat)
    )
    assert "holds volumes, expected images" in error_of(loaders.open_data, str(deep), 0, 2)
    assert loaders.open_data(str(flat), axes=2).axes == 2


def test_percentiles_of_16_bits_do_not_wrap():
    values = np.array([-32768, 0, 5, 32767], np.int16)
    found = loaders.percentiles_of(values, {"lower": 1, "upper": 99})
    np.testing.assert_array_equal(found, np.percentile(values.astype(np.float64), [1, 99]))
