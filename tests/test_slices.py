"""Square slices of volumes: geometry there and back, windows, the prepared folder, prediction."""

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import InputError, loaders
from common.loaders import Prepared, SliceGrid, SliceScan, as_display, data_record, open_data
from data_prep import _prepare, msd

LAS = np.array([[-1, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # 24 voxels along x


def body(index: int, shape: tuple[int, ...] = (24, 20, 6)) -> tuple[np.ndarray, np.ndarray]:
    """HU int16 with air of -1000 and an organ, and its label: 1, and 4 in one half."""
    rng = np.random.default_rng(index)
    label = np.zeros(shape, np.uint8)
    label[4:12, 5:15, 1:5] = 1
    label[8:12, 5:15, 1:5] = 4
    hu = np.where(label > 0, 60, -100) + rng.integers(-40, 40, shape)
    hu[:3] = -1000
    return hu.astype(np.int16), label


def save(path: Path, array: np.ndarray, spacing=(2, 2, 5), las: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    nib.save(nib.Nifti1Image(array[::-1] if las else array, affine @ LAS if las else affine), path)


@pytest.fixture
def ct(tmp_path) -> Path:
    """5 labelled CT, the second in LAS, the third with slices of 10 mm; 2 unlabelled, one padded."""
    src = tmp_path / "src"
    for i in range(5):
        hu, label = body(i)
        save(src / "imagesTr" / f"c{i}_0000.nii.gz", hu, (2, 2, 10 if i == 2 else 5), i == 1)
        save(src / "labelsTr" / f"c{i}.nii.gz", label, (2, 2, 10 if i == 2 else 5), i == 1)
    for i in range(2):
        hu, _ = body(10 + i, (24, 20, 6 + i))
        if i:
            hu[:, -4:] = -3024
        save(tmp_path / "more" / "deeper" / f"u{i}.nii.gz", hu, (2, 2, 4 + i))
    labels = {"background": 0, "left": 1, "right": 4}
    meta = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (src / "dataset.json").write_text(json.dumps(meta))
    return src


def run(src: Path, dst: Path, *flags: object) -> int:
    words = ["--src", src, "--dst", dst, "--as-slices", "--side", 32, "--quiet", *flags]
    return msd.main([str(word) for word in words])


def both(ct: Path, *flags: object) -> Prepared:
    """The CT prepared with the unlabelled ones."""
    assert run(ct, ct.parent / "prepared", "--unlabelled", ct.parent / "more", *flags) == 0
    return open_data(ct.parent / "prepared", "slices")


def refused(capsys, *flags: object) -> str:
    """The one line that a preparation of slices is refused with."""
    capsys.readouterr()
    assert msd.main([*map(str, flags), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("msd: ") and error.count("\n") == 1, error
    return error


def edit(src: Path, **entries) -> None:
    file = src / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def raw(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj).astype(np.int64)


def resized(planes: np.ndarray, size: int, mode: str = "bilinear") -> np.ndarray:
    """[N, H, W] by torch."""
    flags = {"align_corners": False} if mode == "bilinear" else {}
    planes = torch.tensor(planes, dtype=torch.float32)[None]
    return F.interpolate(planes, (size, size), mode=mode, **flags)[0].numpy()


def squared(file: Path, fill: float) -> np.ndarray:
    """A file of 24 x 20 x Z, padded and enlarged by torch -> [32, 32, Z]."""
    volume = raw(file)
    square = np.full((24, 24, volume.shape[2]), fill)
    square[:, 2:22] = volume
    return resized(square.transpose(2, 0, 1), 32).transpose(1, 2, 0)


# --- geometry ----------------------------------------------------------------------------------


def test_as_display_puts_front_on_top_and_right_on_the_left():
    plane = np.zeros((3, 4))  # RAS: x to the right, y to the front
    plane[2, 3] = 1  # right, front
    shown = as_display(plane)
    assert shown.shape == (4, 3) and shown[0, 0] == 1
    plane = np.random.default_rng(0).random((3, 4, 2))
    np.testing.assert_array_equal(loaders.from_display(as_display(plane)), plane)


@pytest.mark.parametrize(("n", "m"), [(20, 8), (8, 20), (17, 32), (5, 5), (1, 4)])
def test_axis_weights_are_torchs_bilinear(n, m):
    plane = np.random.default_rng(n).random((n, n)).astype(np.float32)
    weights = loaders.axis_weights(n, m, n / m)
    np.testing.assert_allclose(weights @ plane @ weights.T, resized(plane[None], m)[0], atol=2e-6)


@pytest.mark.parametrize(("n", "m"), [(256, 64), (24, 8), (20, 8), (33, 32)])
def test_axis_weights_of_an_area_are_means_of_what_a_pixel_covers(n, m):
    """Against pixels cut to n m parts, whatever the ratio."""
    line = np.random.default_rng(n).random(n)
    expected = line.repeat(m).reshape(m, n).mean(1)
    weights = loaders.axis_weights(n, m, n / m, area=True)
    np.testing.assert_allclose(weights @ line, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(20, 8), (8, 20), (17, 32)])
def test_nearest_index_is_torchs_nearest_exact(n, m):
    line = torch.arange(n, dtype=torch.float32)[None, None]
    expected = F.interpolate(line, m, mode="nearest-exact")[0, 0].numpy()
    np.testing.assert_array_equal(loaders.nearest_index(n, m, n / m), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(12, 9, 8), (9, 12, 8)])
def test_slice_grid_affine_tells_where_pixels_lie(axis, shape):
    """An image of its own coordinate in mm still tells it after padding, resizing, respacing."""
    affine = np.array([[2, 0, 0, -7], [0, 1.5, 0, 11], [0, 0, 3, 5], [0, 0, 0, 1.0]])
    place = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    grid = SliceGrid(shape, affine, 32, (9, 9, 2.0))
    image = grid.image(place[..., axis], fill=-1e6)
    assert image.shape == (32, 32, 12)
    assert nib.affines.voxel_sizes(grid.affine)[2] == pytest.approx(2)
    expected = np.moveaxis(np.indices(image.shape), 0, -1) @ grid.affine[:3, :3].T
    expected = (expected + grid.affine[:3, 3])[..., axis]
    # beyond the outer centres the border holds
    expected = np.clip(expected, place[..., axis].min(), place[..., axis].max())
    inside = image > -500  # else of the padding, or next to it
    assert 0.6 < inside.mean() < 0.8
    np.testing.assert_allclose(image[inside], expected[inside], atol=1e-4)


@pytest.mark.parametrize("side", [32, 4])
def test_slice_grid_pads_to_a_square_enlarges_linearly_and_shrinks_by_area(side):
    volume = np.random.default_rng(0).random((6, 11, 2)).astype(np.float32)
    square = np.full((11, 11, 2), -3, np.float32)
    square[2:8] = volume  # 2 in front, 3 behind
    planes = square.transpose(2, 0, 1)
    if side == 32:
        expected = resized(planes, 32)
    else:
        parts = planes.repeat(4, 1).repeat(4, 2)  # each pixel in 4 x 4
        expected = parts.reshape(2, 4, 11, 4, 11).mean((2, 4))
    image = SliceGrid(volume.shape, np.eye(4), side, None).image(volume, -3)
    np.testing.assert_allclose(image, expected.transpose(1, 2, 0), atol=2e-6)


def test_slice_grid_label_is_nearest_and_0_outside():
    label = np.random.default_rng(0).integers(1, 5, (6, 11, 3)).astype(np.uint8)
    square = np.zeros((11, 11, 3), np.uint8)
    square[2:8] = label
    small = SliceGrid(label.shape, np.eye(4), 32, None).label(label)
    expected = resized(square.transpose(2, 0, 1), 32, "nearest-exact").transpose(1, 2, 0)
    np.testing.assert_array_equal(small, expected)
    assert small.dtype == np.uint8


@pytest.mark.parametrize(
    ("distance", "depth"), [(5.049, 10), (4.951, 10), (5.06, 10), (4.0, 12), (10.0, 5)]
)
def test_slice_grid_respaces_only_beyond_one_percent(distance, depth):
    grid = SliceGrid((8, 8, 10), np.diag([1, 1, 5, 1.0]), 32, (1, 1, distance))
    assert grid.depth == depth and (grid.ratio == 1) == (abs(distance / 5 - 1) <= 0.01)


# --- windows -----------------------------------------------------------------------------------

SPEC = [-1024] * 6 + [-100] * 10 + [0] * 3 + [50] * 70 + [300] * 9 + [1200] * 2


@pytest.mark.parametrize(
    ("q", "expected"), [(0.5, -1024), (5.5, -612.82), (98.5, 763.5), (99.5, 1200)]
)
def test_percentile_of_gives_the_known_values(q, expected):
    counts, _ = _prepare.histogram(np.array(SPEC).reshape(-1, 1, 1), -32768)
    assert _prepare.percentile_of(counts, q) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("q", [0, 0.5, 37.3, 50, 99.5, 100])
def test_percentile_of_many_volumes_is_numpys(q):
    rng = np.random.default_rng(0)
    volumes = [rng.integers(-1000, 1500, (n, 7, 3)).astype(np.int16) for n in (3, 8, 11)]
    counts = sum(_prepare.histogram(volume, -32768)[0] for volume in volumes)
    expected = np.percentile(np.concatenate([v.ravel() for v in volumes]), q)
    assert _prepare.percentile_of(counts, q) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("depth", "distances", "expected"),
    [
        (300, (2.5, 1.0, 5.0), 2.5),
        (100, (2.5, 3.0, 5.0, 5.0, 5.0, 6.0), 2.75),  # coarse: the 10th percentile
        (200, (2.5, 3.0, 5.0, 5.0, 5.0, 6.0), 5.0),  # not a third of the voxels
        (100, (0.5, 0.5, 5, 5, 5), 0.8),  # not finer than the other axes
    ],
)
def test_target_spacing_is_nnunets_rule(depth, distances, expected):
    spacings = [[0.8, 0.8, z] for z in distances]
    target = _prepare.target_spacing([[512, 512, depth]] * len(spacings), spacings)
    assert target == [0.8, 0.8, expected]


# --- the prepared folder -----------------------------------------------------------------------


def test_ct_window_is_the_percentiles_of_all_unlabelled_voxels(ct, capsys):
    data = both(ct)
    files = sorted((ct.parent / "more").rglob("*.nii.gz"))
    values = np.concatenate([raw(f).ravel() for f in files])
    low, high = np.percentile(np.maximum(values, -1024), [0.5, 99.5])
    rule = data.meta["normalisation"]
    assert rule["kind"] == "hu" and rule["percentiles"] == [0.5, 99.5]
    assert (rule["low"], rule["high"]) == pytest.approx((low, high), abs=1e-9)
    statistics = data.meta["statistics"]
    assert (statistics["voxels"], statistics["raised"]) == (values.size, (values < -1024).sum())
    assert "672 of them raised to -1024" in capsys.readouterr().out
    assert data.image("u1")[0, 16, 27, 0] == -1024  # raised also where it is stored


def test_ct_window_without_unlabelled_cases_is_of_train(ct, tmp_path):
    assert run(ct, tmp_path / "p", "--split-sizes", "3,1,1") == 0
    data = open_data(tmp_path / "p", "slices")
    files = [ct / "imagesTr" / f"{case}_0000.nii.gz" for case in data.cases("train")]
    expected = np.percentile(np.concatenate([raw(f).ravel() for f in files]), 99.5)
    assert data.meta["normalisation"]["high"] == pytest.approx(expected, abs=1e-9)
    assert data.cases("pretrain") == data.cases("train")


def test_fov_pad_keep_counts_and_stores_the_files_values(ct):
    data = both(ct, "--fov-pad", "keep")
    assert data.meta["normalisation"]["low"] == -3024 and data.image("u1")[0, 16, 27, 0] == -3024


def test_ct_slices_are_hounsfield_units_each_in_one_piece(ct):
    data = both(ct)
    image = data.image("c0")
    assert (image.dtype, image.shape) == (np.int16, (1, 32, 32, 6)) and isinstance(image, np.memmap)
    assert image[0, :, :, 2].flags.f_contiguous and data.label("c0")[:, :, 2].flags.f_contiguous
    assert (data.kind, data.side, data.depth("c0")) == ("slices", 32, 6)
    exact = squared(ct / "imagesTr" / "c0_0000.nii.gz", data.meta["normalisation"]["low"])
    assert np.abs(image[0] - exact).max() <= 0.501


def test_ct_slice_is_scaled_by_the_window_and_turned_to_the_screen(ct):
    data = both(ct)
    low = data.meta["normalisation"]["low"]
    high = data.meta["normalisation"]["high"]
    stored = np.clip(data.image("c0")[0, :, :, 3].astype(float), low, high)
    x = data.slice("c0", 3)
    assert x.dtype == np.float32 and x.flags.c_contiguous
    np.testing.assert_allclose(x, (2 * (stored - low) / (high - low) - 1).T[::-1, ::-1], atol=1e-6)
    shown = data.label("c0")[:, :, 3].T[::-1, ::-1]
    np.testing.assert_array_equal(data.slice_label("c0", 3), shown)


def test_to_unit_gives_the_known_values():
    x = loaders.to_unit(np.array([-1200, -1024, -668, -312, 40, 400, 900]), -1024, 400)
    np.testing.assert_allclose(x, [-1, -1, -0.5, 0, 0.4943820225, 1, 1], atol=1e-7)
    assert x.dtype == np.float32


def test_las_and_ras_copies_give_the_same_slices(ct):
    hu, label = body(0)
    save(ct / "imagesTr" / "c1_0000.nii.gz", hu, las=True)
    save(ct / "labelsTr" / "c1.nii.gz", label, las=True)
    data = both(ct)
    np.testing.assert_array_equal(data.image("c1"), data.image("c0"))
    np.testing.assert_array_equal(data.label("c1"), data.label("c0"))


@pytest.mark.parametrize(
    ("spacing", "stored", "depths"),
    [("rule", [2, 2, 5], [6, 12, 5, 8]), ("native", None, [6, 6, 6, 7]),
     ("9,9,2.5", [9, 9, 2.5], [12, 24, 10, 14])],
)  # fmt: skip
def test_spacing_moves_slices_only_of_labelled_and_other_cases_apart(ct, spacing, stored, depths):
    data = both(ct, "--spacing", spacing)
    assert [data.depth(case) for case in ("c0", "c2", "u0", "u1")] == depths
    assert data.spacing("c0")[:2] == (1.5, 1.5)  # 24 x 2 mm in 32 pixels
    assert data.meta["spacing"] == stored


def test_splits_and_slices_of_each_are_written_and_printed(ct, capsys):
    data = both(ct)
    splits = data.meta["splits"]
    assert splits["pretrain"] == ["u0", "u1", *splits["train"]]
    counts = {split: sum(map(data.depth, cases)) for split, cases in splits.items()}
    assert data.meta["statistics"]["slices"] == counts
    assert f"unlabelled 13, pretrain {counts['pretrain']}" in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["case", "corpus"])
def test_mr_slices_lie_between_percentiles_of_the_volume_or_of_all(ct, norm):
    edit(ct, channel_names={"0": "T1"})
    data = both(ct, "--norm", norm)
    file = ct / "imagesTr" / "c0_0000.nii.gz"
    files = [file] if norm == "case" else sorted((ct.parent / "more").rglob("*.nii.gz"))
    low, high = np.percentile(np.concatenate([raw(f).ravel() for f in files]), [0.5, 99.5])
    expected = 2 * (np.clip(squared(file, low), low, high) - low) / (high - low) - 1
    assert data.image("c0").dtype == np.float16
    np.testing.assert_allclose(data.image("c0")[0], expected, atol=1e-3)
    np.testing.assert_allclose(data.slice("c0", 2), expected[..., 2].T[::-1, ::-1], atol=1e-3)


def test_mr_slices_of_a_sparse_map_keep_it_and_say_so(ct, capsys):
    edit(ct, channel_names={"0": "T1"})
    sparse = np.zeros((24, 20, 6), np.int16)
    sparse[5, 5, 2:4] = (100, 300)
    save(ct / "imagesTr" / "c0_0000.nii.gz", sparse)
    assert len(np.unique(both(ct).image("c0"))) > 3
    text = "c0_0000.nii.gz: the window from 0 to 0 is empty, scaled from 0 to 300"
    assert text in capsys.readouterr().err


def test_workers_change_no_byte(ct, tmp_path):
    for n in (1, 2):
        assert run(ct, tmp_path / str(n), "--unlabelled", ct.parent / "more", "--workers", n) == 0
    for file in sorted((tmp_path / "1").rglob("*")):
        other = tmp_path / "2" / file.relative_to(tmp_path / "1")
        assert file.is_dir() or file.read_bytes() == other.read_bytes(), file


def test_a_changed_unlabelled_case_changes_the_window(ct):
    high = both(ct).meta["normalisation"]["high"]
    save(ct.parent / "more" / "deeper" / "u0.nii.gz", body(10)[0] * 2)
    assert both(ct).meta["normalisation"]["high"] > high + 20


def test_btcv_is_read_as_published(tmp_path):
    folder = tmp_path / "RawData"
    for i, name in enumerate(("img/img", "label/label")):
        save(folder / f"Training/{name}0001.nii.gz", body(0)[i])
    save(folder / "Testing/img/img0061.nii.gz", body(1)[0])
    save(folder / "Test/img/img0062.nii.gz", body(1)[0])  # it is called so too
    options = argparse.Namespace(as_slices=True, unlabelled=None, spacing=None, side=None)
    options.norm = options.fov_pad = None
    source = msd.read_source(tmp_path, options)
    labelled = {case.id: case.label is not None for case in source.cases}
    assert labelled == {"img0001": True, "img0061": False, "img0062": False}
    assert source.classes["liver"] == 6 and source.ct == (True,) and len(source.classes) == 13
    save(folder / "Test/img/img0061.nii.gz", body(1)[0])
    assert "img0061 is there twice" in msd.read_source(tmp_path, options).faults[0]
    (folder / "Test/img/img0061.nii.gz").unlink()
    (folder / "Training/label/label0001.nii.gz").unlink()
    assert "label0001.nii.gz: missing" in msd.read_source(tmp_path, options).faults[0]


# --- prediction --------------------------------------------------------------------------------


def scan_of(file: Path, data: Prepared) -> SliceScan:
    return SliceScan("x", [loaders.read_nifti(file)], data_record(data))


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
@pytest.mark.parametrize("channel", ["CT", "T1"])
def test_prediction_sees_what_was_prepared(ct, case, channel):
    """Of a plain case, one in LAS, one whose slices are respaced; none is square."""
    edit(ct, channel_names={"0": channel})
    data = both(ct)
    x = scan_of(ct / "imagesTr" / f"{case}_0000.nii.gz", data).image
    assert x.dtype == np.float32 and x.flags.c_contiguous
    slices = [data.slice(case, k) for k in range(data.depth(case))]
    np.testing.assert_array_equal(x, np.stack(slices))


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_prediction_returns_published_values_on_the_files_grid(ct, case):
    data = both(ct)
    scan = scan_of(ct / "imagesTr" / f"{case}_0000.nii.gz", data)
    labels = np.stack([data.slice_label(case, k) for k in range(data.depth(case))])
    prob = np.moveaxis(np.eye(3, dtype=np.float32)[labels], 3, 1)  # [Z, C, side, side]
    mask = scan.mask(prob)
    true = raw(ct / "labelsTr" / f"{case}.nii.gz")
    assert mask.dtype == np.uint8 and mask.shape == true.shape and set(np.unique(mask)) == {0, 1, 4}
    for value in (1, 4):
        overlap = ((mask == value) & (true == value)).sum()
        assert 2 * overlap / ((mask == value).sum() + (true == value).sum()) > 0.94
    with pytest.raises(ValueError, match="2 channels, expected 1 or 3"):
        scan.mask(prob[:, :2])


def test_prediction_interpolates_before_the_maximum():
    logits = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    record = {"channels": ["T1"], "classes": {"a": 1, "b": 2}, "slices": {"side": 8}}
    record |= {"label_values": {"0": 0, "1": 1, "2": 2}, "spacing": None}
    record["normalisation"] = {"kind": "percentile-slices", "lower": 0.5, "upper": 99.5}
    volume = np.random.default_rng(0).random((20, 20, 2))
    file = loaders.Nifti(volume, np.eye(4), (1, 1, 1), None, Path("x.nii"))
    mask = SliceScan("x", [file], record).mask(logits)
    for k in range(2):
        np.testing.assert_array_equal(as_display(mask[..., k]), resized(logits[k], 20).argmax(0))


@pytest.mark.parametrize(
    ("change", "text"),
    [(lambda v: v + 1024, "MR, a label, or HU [+] 1024"),
     (lambda v: v / np.float32(1000), "expected Hounsfield units"),
     (lambda v: np.stack([v, v], 3), "2 channels, expected 1")],
)  # fmt: skip
def test_prediction_refuses_what_is_no_ct(ct, tmp_path, change, text):
    data = both(ct)
    save(tmp_path / "x.nii.gz", change(body(0)[0]))
    with pytest.raises(InputError, match=text):
        scan_of(tmp_path / "x.nii.gz", data)


# --- faults ------------------------------------------------------------------------------------


def test_ct_of_other_intensities_is_refused_by_name(ct, capsys, tmp_path):
    save(ct.parent / "more" / "deeper" / "u1.nii.gz", body(0)[0] + 1024)
    flags = ["--as-slices", "--unlabelled", ct.parent / "more"]
    line = refused(capsys, "--src", ct, "--dst", tmp_path / "p", *flags)
    assert "u1.nii.gz: intensities" in line and "name the modality MR, or subtract 1024" in line
    assert not (tmp_path / "p").exists()


def test_norm_corpus_refuses_values_it_cannot_count(ct, capsys, tmp_path):
    edit(ct, channel_names={"0": "T1"})
    save(ct / "imagesTr" / "c0_0000.nii.gz", body(0)[0] / np.float32(1000))
    flags = ["--as-slices", "--norm", "corpus"]
    line = refused(capsys, "--src", ct, "--dst", tmp_path / "p", *flags)
    assert "c0_0000.nii.gz: intensities from" in line and "use --norm case" in line


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--as-slices", "--side", "100"), "is not a multiple of 32 from 32 to 1024"),
        (("--norm", "corpus"), "--norm is for slices only; add --as-slices"),
        (("--spacing", "rule"), "--spacing rule is for slices only; add --as-slices"),
        (("--as-slices", "--unlabelled", "no"), "no: no such folder"),
    ],
)
def test_flags_that_do_not_fit_are_refused(ct, capsys, flags, text):
    assert text in refused(capsys, "--src", ct, "--check", *flags)


def test_unlabelled_scans_need_names_of_their_own_and_may_join_volumes(ct, capsys, tmp_path):
    flags = ["--src", str(ct), "--dst", str(tmp_path / "v"), "--quiet"]
    assert msd.main([*flags, "--unlabelled", str(tmp_path / "more")]) == 0
    assert open_data(tmp_path / "v").cases("unlabelled") == ["u0", "u1"]
    with pytest.raises(InputError, match=r"holds volumes, expected slices.*--as-slices"):
        open_data(tmp_path / "v", "slices")
    assert "was prepared with unlabelled" in refused(capsys, *flags)
    save(tmp_path / "more" / "C0_0000.nii.gz", body(0)[0])
    line = refused(capsys, "--src", ct, "--check", "--unlabelled", tmp_path / "more")
    assert "C0_0000.nii.gz: there is a case C0 already" in line
