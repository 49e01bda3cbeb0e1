"""Square slices of volumes: geometry there and back, windows, the prepared folder, prediction, phantoms, each fault."""

import argparse
import json
import math
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import InputError
from common.old import loaders
from common.old.loaders import (
    CtPhantoms,
    SliceGrid,
    as_display,
    data_record,
    from_display,
    load_slices_for_prediction,
    open_data,
    open_prepared,
    open_slices,
)
from data_prep import _prepare, msd
from data_prep._prepare import histogram, percentile_of, target_spacing

LAS = np.array([[-1, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # of 24 voxels along x


def body(index: int, shape: tuple[int, ...] = (24, 20, 6)) -> tuple[np.ndarray, np.ndarray]:
    """HU int16 with air of -1000 and an organ, and its label: 1, and 4 in one half."""
    rng = np.random.default_rng(index)
    label = np.zeros(shape, np.uint8)
    label[4:12, 5:15, 1:5], label[8:12, 5:15, 1:5] = 1, 4
    hu = np.where(label > 0, 60, -100) + rng.integers(-40, 40, shape)
    hu[:3] = -1000
    return hu.astype(np.int16), label


def save(
    path: Path, array: np.ndarray, spacing: tuple[float, ...] = (2, 2, 5), las: bool = False
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    nib.save(nib.Nifti1Image(array[::-1] if las else array, affine @ LAS if las else affine), path)


@pytest.fixture
def ct(tmp_path) -> Path:
    """src: 5 labelled CT, the second in LAS, the third with slices of 10 mm; more: 2 of 4 and 5 mm, one padded."""
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
    meta = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "left": 1, "right": 4},
        "file_ending": ".nii.gz",
    }
    (src / "dataset.json").write_text(json.dumps(meta))
    return src


def run(src: Path, dst: Path, *flags: object) -> int:
    return msd.main(
        [
            "--src",
            str(src),
            "--dst",
            str(dst),
            "--as-slices",
            "--side",
            "32",
            "--quiet",
            *map(str, flags),
        ]
    )


def both(ct: Path, *flags: object) -> loaders.Slices:
    """The CT prepared with the unlabelled ones."""
    dst = ct.parent / "prepared"
    assert run(ct, dst, "--unlabelled", ct.parent / "more", *flags) == 0
    return open_slices(str(dst))


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
    return F.interpolate(
        torch.tensor(planes, dtype=torch.float32)[None], (size, size), mode=mode, **flags
    )[0].numpy()


def squared(file: Path, fill: float) -> np.ndarray:
    """A file of 24 x 20 x Z, padded and resized by torch -> [32, 32, Z]."""
    volume = raw(file)
    square = np.full((24, 24, volume.shape[2]), fill)
    square[:, 2:22] = volume
    return resized(square.transpose(2, 0, 1), 32).transpose(1, 2, 0)


# --- geometry --------------------------------------------------------------------------------------------------------


def test_as_display_puts_front_on_top_and_right_on_the_left():
    plane = np.zeros((3, 4))  # RAS: x to the right, y to the front
    plane[2, 3] = 1  # right, front
    shown = as_display(plane)
    assert shown.shape == (4, 3) and shown[0, 0] == 1
    np.testing.assert_array_equal(as_display(plane), plane.T[::-1, ::-1])


def test_from_display_inverts_as_display():
    plane = np.random.default_rng(0).random((3, 4, 2))
    np.testing.assert_array_equal(from_display(as_display(plane)), plane)


@pytest.mark.parametrize(("n", "m"), [(20, 8), (8, 20), (17, 32), (5, 5), (1, 4)])
def test_linear_weights_are_torchs_bilinear(n, m):
    plane = np.random.default_rng(n).random((n, n)).astype(np.float32)
    weights = loaders.linear_weights(n, m, n / m)
    np.testing.assert_allclose(weights @ plane @ weights.T, resized(plane[None], m)[0], atol=2e-6)


@pytest.mark.parametrize(("n", "m"), [(20, 8), (8, 20), (17, 32)])
def test_nearest_index_is_torchs_nearest_exact(n, m):
    index = loaders.nearest_index(n, m, n / m)
    expected = F.interpolate(
        torch.arange(n, dtype=torch.float32)[None, None], m, mode="nearest-exact"
    )[0, 0]
    np.testing.assert_array_equal(index, expected.numpy())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(12, 9, 8), (9, 12, 8)])
def test_slice_grid_affine_tells_where_pixels_lie(axis, shape):
    """An image of its own coordinate in mm still tells it after padding, resizing and respacing."""
    affine = np.array([[2, 0, 0, -7], [0, 1.5, 0, 11], [0, 0, 3, 5], [0, 0, 0, 1.0]])
    place = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    grid = SliceGrid.of(shape, affine, 32, (9, 9, 2.0))
    image, new = grid.image(place[..., axis], fill=-1e6), grid.affine(affine)
    assert image.shape == (32, 32, 12) and nib.affines.voxel_sizes(new)[2] == pytest.approx(2)
    expected = np.moveaxis(np.indices(image.shape), 0, -1) @ new[:3, :3].T + new[:3, 3]
    low, high = place[..., axis].min(), place[..., axis].max()
    wanted = np.clip(expected[..., axis], low, high)  # beyond the outer centres the border holds
    inside = image > -500  # of the padding, or next to it
    assert 0.6 < inside.mean() < 0.8
    np.testing.assert_allclose(image[inside], wanted[inside], atol=1e-4)


def test_slice_grid_pads_to_a_square_with_the_fill():
    volume = np.random.default_rng(0).random((6, 11, 2)).astype(np.float32)
    square = np.full((11, 11, 2), -3, np.float32)
    square[2:8] = volume  # 2 in front, 3 behind
    image = SliceGrid(volume.shape, 32).image(volume, -3)
    np.testing.assert_allclose(
        image, resized(square.transpose(2, 0, 1), 32).transpose(1, 2, 0), atol=2e-6
    )


def test_slice_grid_label_is_nearest_and_0_outside():
    label = np.random.default_rng(0).integers(1, 5, (6, 11, 3)).astype(np.uint8)
    square = np.zeros((11, 11, 3), np.uint8)
    square[2:8] = label
    found = SliceGrid(label.shape, 32).label(label)
    np.testing.assert_array_equal(
        found, resized(square.transpose(2, 0, 1), 32, "nearest-exact").transpose(1, 2, 0)
    )
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("distance", "depth"), [(5.049, 10), (4.951, 10), (5.06, 10), (4.0, 12), (10.0, 5)]
)
def test_slice_grid_respaces_only_beyond_one_percent(distance, depth):
    grid = SliceGrid.of((8, 8, 10), np.diag([1, 1, 5, 1.0]), 32, (1, 1, distance))
    assert grid.depth == depth and (grid.ratio == 1) == (abs(distance / 5 - 1) <= 0.01)


def test_classes_resizes_logits_before_the_maximum():
    logits = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    grid = SliceGrid((20, 20, 2), 8)
    wanted = [as_display(plane) for plane in grid.classes(logits).transpose(2, 0, 1)]
    for k, expected in enumerate(wanted):
        np.testing.assert_array_equal(expected, resized(logits[k], 20).argmax(0))


def test_classes_undoes_padding_and_respacing():
    label = np.random.default_rng(0).integers(0, 3, (9, 20, 12)).astype(np.uint8)
    label = label.repeat(2, 0)[:17].repeat(2, 2)[..., :12]  # pairs of equal slices
    grid = SliceGrid(label.shape, 80, 2.0)  # 4 pixels for one, half of the slices
    small = grid.label(label)
    logits = np.stack(
        [
            np.eye(3, dtype=np.float32)[as_display(small[..., k])].transpose(2, 0, 1)
            for k in range(6)
        ]
    )
    np.testing.assert_array_equal(grid.classes(logits), label)


# --- windows ---------------------------------------------------------------------------------------------------------

SPEC = [-1024] * 6 + [-100] * 10 + [0] * 3 + [50] * 70 + [300] * 9 + [1200] * 2
ODD = [-1000, -990, -5, 3, 7, 40, 41, 60, 200, 900, 1500]


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [(SPEC, 0.5, -1024), (SPEC, 5.5, -612.82), (SPEC, 98.5, 763.5), (SPEC, 99.5, 1200), (ODD, 0.5, -999.5),
     (ODD, 99.5, 1470)],
)  # fmt: skip
def test_percentile_of_gives_the_known_values(values, q, expected):
    counts, _ = histogram(np.array(values).reshape(-1, 1, 1), -32768)
    assert percentile_of(counts, q) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("q", [0, 0.5, 37.3, 50, 99.5, 100])
def test_percentile_of_many_volumes_is_numpys(q):
    rng = np.random.default_rng(0)
    volumes = [rng.integers(-1000, 1500, (n, 7, 3)).astype(np.int16) for n in (3, 8, 11)]
    counts = sum(histogram(volume, -32768)[0] for volume in volumes)
    expected = np.percentile(np.concatenate([v.ravel() for v in volumes]), q)
    assert percentile_of(counts, q) == pytest.approx(expected, abs=1e-9)


def test_histogram_raises_and_counts_what_lies_below_the_floor():
    counts, raised = histogram(
        np.array([-3024, -1025, -1024, 7.6], np.float32).reshape(2, 1, 2), -1024
    )
    assert (
        raised == 2 and counts[32768 - 1024] == 3 and counts[32768 + 8] == 1 and counts.sum() == 4
    )


def test_target_spacing_is_the_median_of_each_axis():
    spacings = [[0.7, 0.7, 2.5], [0.8, 0.8, 1.0], [0.9, 0.9, 5.0]]
    assert target_spacing([[512, 512, 300]] * 3, spacings) == [0.8, 0.8, 2.5]


def test_target_spacing_of_a_coarse_axis_is_its_tenth_percentile():
    spacings = [[0.8, 0.8, z] for z in (2.5, 3.0, 5.0, 5.0, 5.0, 6.0)]
    assert target_spacing([[512, 512, 100]] * 6, spacings) == [0.8, 0.8, 2.75]
    assert target_spacing([[512, 512, 200]] * 6, spacings) == [
        0.8,
        0.8,
        5.0,
    ]  # not a third of the voxels


def test_target_spacing_of_a_coarse_axis_is_not_finer_than_the_others():
    assert target_spacing([[512, 512, 100]] * 5, [[0.8, 0.8, z] for z in (0.5, 0.5, 5, 5, 5)]) == [
        0.8,
        0.8,
        0.8,
    ]


# --- the prepared folder ---------------------------------------------------------------------------------------------


def test_ct_window_is_the_percentiles_of_all_unlabelled_voxels(ct):
    data = both(ct)
    values = np.concatenate(
        [raw(f).ravel() for f in sorted((ct.parent / "more").rglob("*.nii.gz"))]
    )
    assert (values == -3024).any()
    low, high = np.percentile(np.maximum(values, -1024), [0.5, 99.5])
    rule, s = data.meta["normalisation"], data.meta["statistics"]
    assert rule["kind"] == "hu" and rule["percentiles"] == [0.5, 99.5]
    assert (rule["low"], rule["high"]) == pytest.approx((low, high), abs=1e-9)
    assert (s["voxels"], s["raised"]) == (values.size, (values < -1024).sum())


def test_ct_window_without_unlabelled_cases_is_of_train(ct, tmp_path):
    assert run(ct, tmp_path / "p", "--split-sizes", "3,1,1") == 0
    data = open_slices(str(tmp_path / "p"))
    train = np.concatenate(
        [raw(ct / "imagesTr" / f"{c}_0000.nii.gz").ravel() for c in data.cases("train")]
    )
    assert data.meta["normalisation"]["high"] == pytest.approx(np.percentile(train, 99.5), abs=1e-9)
    assert data.cases("pretrain") == data.cases("train")


def test_fov_pad_keep_counts_and_stores_the_files_values(ct):
    data = both(ct, "--fov-pad", "keep")
    assert data.meta["normalisation"]["low"] == -3024 and data.image("u1")[0, 16, 27, 0] == -3024
    assert data.meta["statistics"]["raised"] == 0


def test_fov_pad_is_raised_where_it_is_stored(ct):
    assert (
        both(ct).image("u1")[0, 16, 27, 0] == -1024
    )  # in the file; the padding to a square begins at 29.3


def test_ct_slices_are_hounsfield_units_each_in_one_piece(ct):
    data = both(ct)
    image, label = data.image("c0"), data.label("c0")
    assert (image.dtype, image.shape) == (np.int16, (1, 32, 32, 6)) and isinstance(image, np.memmap)
    assert image[0, :, :, 2].flags.f_contiguous and label[:, :, 2].flags.f_contiguous
    assert (label.dtype, label.shape) == (np.uint8, (32, 32, 6))
    assert (data.side, data.depth("c0"), data.shape("c0")) == (32, 6, (32, 32, 6))


def test_ct_slice_is_scaled_by_the_window_and_turned_to_the_screen(ct):
    data = both(ct)
    rule = data.meta["normalisation"]
    stored = np.clip(data.image("c0")[0, :, :, 3].astype(float), rule["low"], rule["high"])
    x = data.slice("c0", 3)
    assert x.dtype == np.float32 and x.shape == (32, 32) and x.flags.c_contiguous
    expected = 2 * (stored - rule["low"]) / (rule["high"] - rule["low"]) - 1
    np.testing.assert_allclose(x, expected.T[::-1, ::-1], atol=1e-6)
    np.testing.assert_array_equal(
        data.slice_label("c0", 3), data.label("c0")[:, :, 3].T[::-1, ::-1]
    )


def test_ct_slices_are_rounded_to_the_nearest_unit(ct):
    data = both(ct)
    exact = squared(ct / "imagesTr" / "c0_0000.nii.gz", data.meta["normalisation"]["low"])
    assert np.abs(data.image("c0")[0] - exact).max() <= 0.501


def test_to_unit_gives_the_known_values():
    x = loaders.to_unit(
        np.array([-1200, -1024, -668, -500, -312, -134, 40, 200, 400, 900]), -1024, 400
    )
    known = [-1, -1, -0.5, -0.2640449438, 0, 0.25, 0.4943820225, 0.7191011236, 1, 1]
    np.testing.assert_allclose(x, known, atol=1e-7)
    assert x.dtype == np.float32


def test_las_and_ras_copies_give_the_same_slices(ct):
    hu, label = body(0)
    save(ct / "imagesTr" / "c1_0000.nii.gz", hu, las=True)
    save(ct / "labelsTr" / "c1.nii.gz", label, las=True)
    data = both(ct)
    np.testing.assert_array_equal(data.image("c1"), data.image("c0"))
    np.testing.assert_array_equal(data.label("c1"), data.label("c0"))


def test_label_lies_on_its_organ(ct):
    data = both(ct)
    for case in ("c0", "c1", "c2"):
        organ = data.label(case) > 0
        assert (
            np.median(data.image(case)[0][organ])
            > 30
            > -60
            > np.median(data.image(case)[0][~organ])
        )


def test_spacing_rule_is_of_labelled_and_unlabelled_cases_by_themselves(ct):
    data = both(ct)
    assert data.meta["statistics"]["target_spacing_mm"] == {
        "labelled": [2, 2, 5],
        "unlabelled": [2, 2, 4.5],
    }
    assert data.meta["spacing"] == [2, 2, 5]
    assert [data.depth(c) for c in ("c0", "c2", "u0", "u1")] == [6, 12, 5, 8]
    assert data.spacing("c2")[2] == 5 and data.spacing("u0")[2] == 4.5


@pytest.mark.parametrize(
    ("spacing", "depths"), [("native", [6, 6, 6, 7]), ("9,9,2.5", [12, 24, 10, 14])]
)
def test_spacing_flag_moves_slices_only(ct, spacing, depths):
    data = both(ct, "--spacing", spacing)
    assert [data.depth(c) for c in ("c0", "c2", "u0", "u1")] == depths
    assert data.spacing("c0")[:2] == (1.5, 1.5)  # 24 x 2 mm in 32 pixels
    assert data.meta["spacing"] == (None if spacing == "native" else [9, 9, 2.5])


def test_splits_and_slices_of_each_are_written_and_printed(ct, capsys):
    data = both(ct)
    splits = data.meta["splits"]
    assert splits["unlabelled"] == ["u0", "u1"] and splits["pretrain"] == [
        "u0",
        "u1",
        *splits["train"],
    ]
    assert not set(splits["pretrain"]) & set(splits["val"] + splits["test"])
    counts = {split: sum(data.depth(c) for c in cases) for split, cases in splits.items()}
    assert data.meta["statistics"]["slices"] == counts and data.meta["slices"] == {"side": 32}
    out = capsys.readouterr().out
    assert (
        f"unlabelled 13, pretrain {counts['pretrain']}" in out
        and "672 of them raised to -1024" in out
    )


def test_mr_slices_lie_between_the_percentiles_of_their_own_volume(ct):
    edit(ct, channel_names={"0": "T1"})
    data = both(ct)
    rule = data.meta["normalisation"]
    assert rule == {"kind": "percentile-slices", "lower": 0.5, "upper": 99.5}
    file, stored = ct / "imagesTr" / "c0_0000.nii.gz", data.image("c0")
    low, high = np.percentile(raw(file), [0.5, 99.5])
    expected = 2 * (np.clip(squared(file, low), low, high) - low) / (high - low) - 1
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored[0], expected, atol=1e-3)
    np.testing.assert_allclose(data.slice("c0", 2), expected[..., 2].T[::-1, ::-1], atol=1e-3)


def test_norm_corpus_gives_all_mr_one_window(ct):
    edit(ct, channel_names={"0": "T1"})
    data = both(ct, "--norm", "corpus")
    values = np.concatenate(
        [raw(f).ravel() for f in (ct.parent / "more").rglob("*.nii.gz")]
    )  # nothing is raised: no HU
    rule = data.meta["normalisation"]
    assert rule["kind"] == "percentile-slices"
    low, high = np.percentile(values, [0.5, 99.5])
    assert (rule["low"], rule["high"]) == pytest.approx((low, high), abs=1e-9)
    planes = squared(ct / "imagesTr" / "c0_0000.nii.gz", low)
    expected = 2 * (np.clip(planes, low, high) - low) / (high - low) - 1
    np.testing.assert_allclose(data.image("c0")[0], expected, atol=1e-3)


def test_rounding_of_float_intensities_is_said_once(ct, capsys):
    for i in range(2):
        hu, _ = body(20 + i)
        save(ct.parent / "more" / f"f{i}.nii.gz", hu + np.float32(0.3))
    both(ct)
    assert capsys.readouterr().err.count("rounded before they are counted") == 1


def test_workers_change_no_byte(ct, tmp_path):
    for n in (1, 2):
        assert run(ct, tmp_path / str(n), "--unlabelled", ct.parent / "more", "--workers", n) == 0
    for file in sorted((tmp_path / "1").rglob("*")):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "2" / file.relative_to(tmp_path / "1")).read_bytes()
            ), file


def test_histograms_do_not_pile_up(ct, monkeypatch):
    kept = []
    check_all = _prepare.check_all
    monkeypatch.setattr(_prepare, "check_all", lambda *a: kept.append(check_all(*a)) or kept[-1])
    both(ct)
    assert len(kept[0]) == 7 and not any("histogram" in report.facts for report in kept[0].values())


def test_continuing_reads_finished_cases_no_more(ct, monkeypatch):
    data = both(ct)
    before = (data.root / "dataset.json").read_bytes()
    for case in ("u1", "c3"):
        shutil.rmtree(data.root / "cases" / case)
    read, load = [], _prepare.load_case
    monkeypatch.setattr(
        _prepare,
        "load_case",
        lambda source, case, *a: read.append(case.id) or load(source, case, *a),
    )
    both(ct)
    assert sorted(read) == ["c3", "c3", "u1", "u1"]  # each checked and prepared
    assert (data.root / "dataset.json").read_bytes() == before


def test_a_changed_unlabelled_case_changes_the_window_and_all_cases(ct):
    high = both(ct).meta["normalisation"]["high"]
    save(ct.parent / "more" / "deeper" / "u0.nii.gz", body(10)[0] * 2)
    data = both(ct)
    assert data.meta["normalisation"]["high"] > high + 20
    values = np.concatenate([raw(f).ravel() for f in (ct.parent / "more").rglob("*.nii.gz")])
    assert data.meta["normalisation"]["high"] == pytest.approx(
        np.percentile(values, 99.5), abs=1e-9
    )


def test_other_slice_flags_are_refused_in_the_same_folder(ct, capsys):
    data = both(ct)
    line = refused(capsys, "--src", ct, "--dst", data.root, "--as-slices", "--side", 64)
    assert "was prepared with slices" in line and "choose another --dst" in line


def test_btcv_is_read_as_published(tmp_path):
    for kind in ("img", "label"):
        save(
            tmp_path / "RawData" / "Training" / kind / f"{kind}0001.nii.gz",
            body(0)[kind == "label"],
        )
    save(tmp_path / "RawData" / "Testing" / "img" / "img0061.nii.gz", body(1)[0])
    save(
        tmp_path / "RawData" / "Test" / "img" / "img0062.nii.gz", body(1)[0]
    )  # it is called so too
    options = argparse.Namespace(
        as_slices=True, unlabelled=None, spacing=None, side=None, norm=None, fov_pad=None
    )
    source = msd.read_source(tmp_path, options)
    assert [(c.id, c.label is None) for c in source.cases] == [
        ("img0001", False),
        ("img0061", True),
        ("img0062", True),
    ]
    assert source.classes["liver"] == 6 and source.ct == (True,) and len(source.classes) == 13
    save(tmp_path / "RawData" / "Test" / "img" / "img0061.nii.gz", body(1)[0])
    assert "img0061 is there twice" in msd.read_source(tmp_path, options).faults[0]
    (tmp_path / "RawData" / "Test" / "img" / "img0061.nii.gz").unlink()
    (tmp_path / "RawData" / "Training" / "label" / "label0001.nii.gz").unlink()
    assert "label0001.nii.gz: missing" in msd.read_source(tmp_path, options).faults[0]


def test_btcv_without_volumes_is_refused(tmp_path):
    (tmp_path / "RawData/Training/img").mkdir(parents=True)
    options = argparse.Namespace(
        as_slices=True, unlabelled=None, spacing=None, side=None, norm=None, fov_pad=None
    )
    with pytest.raises(InputError, match=r"no volumes found, expected img0001\.nii\.gz"):
        msd.read_source(tmp_path, options)


def test_the_folder_of_unlabelled_scans_must_stay_the_same(ct, tmp_path, capsys):
    flags = [
        "--src",
        str(ct),
        "--dst",
        str(tmp_path / "v"),
        "--as-slices",
        "--side",
        "64",
        "--quiet",
    ]
    assert msd.main([*flags, "--unlabelled", str(tmp_path / "more")]) == 0
    assert msd.main(flags) == 2 and "was prepared with unlabelled" in capsys.readouterr().err
    assert json.loads((tmp_path / "v/dataset.json").read_text())["splits"]["unlabelled"] == [
        "u0",
        "u1",
    ]


def test_unlabelled_cases_may_join_volumes_too(ct, tmp_path):
    flags = [
        "--src",
        str(ct),
        "--dst",
        str(tmp_path / "v"),
        "--unlabelled",
        str(tmp_path / "more"),
        "--quiet",
    ]
    assert msd.main([*flags, "--spacing", "native"]) == 0
    assert open_data(str(tmp_path / "v")).cases("unlabelled") == ["u0", "u1"]


# --- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
@pytest.mark.parametrize("channel", ["CT", "T1"])
def test_prediction_sees_what_was_prepared(ct, case, channel):
    """Of a plain case, one in LAS, one whose slices are respaced; none is square."""
    edit(ct, channel_names={"0": channel})
    data = both(ct)
    x, _ = load_slices_for_prediction(ct / "imagesTr" / f"{case}_0000.nii.gz", data_record(data))
    assert x.dtype == np.float32 and x.flags.c_contiguous
    np.testing.assert_array_equal(
        x, np.stack([data.slice(case, k) for k in range(data.depth(case))])
    )


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_prediction_returns_published_values_on_the_files_grid(ct, tmp_path, case):
    data = both(ct)
    _, way = load_slices_for_prediction(ct / "imagesTr" / f"{case}_0000.nii.gz", data_record(data))
    labels = [data.slice_label(case, k) for k in range(data.depth(case))]
    mask = way.mask(
        np.stack([np.eye(3, dtype=np.float32)[label].transpose(2, 0, 1) for label in labels])
    )
    loaders.write_nifti(tmp_path / "out.nii.gz", mask, way.like, mask.dtype)
    true = raw(ct / "labelsTr" / f"{case}.nii.gz")
    assert mask.dtype == np.uint8 and mask.shape == true.shape and set(np.unique(mask)) == {0, 1, 4}
    for value in (1, 4):
        assert (
            2
            * ((mask == value) & (true == value)).sum()
            / ((mask == value).sum() + (true == value).sum())
            > 0.94
        )


def test_prediction_refuses_logits_of_another_shape(ct):
    data = both(ct)
    _, way = load_slices_for_prediction(ct / "imagesTr" / "c0_0000.nii.gz", data_record(data))
    with pytest.raises(ValueError, match=r"\(6, 2, 32, 32\).*expected \(6, 3, 32, 32\)"):
        way.mask(np.zeros((6, 2, 32, 32), np.float32))


@pytest.mark.parametrize(
    ("change", "text"),
    [(lambda v: v + 1024, "MR, a label, or HU [+] 1024"), (lambda v: v / np.float32(1000), "expected Hounsfield units"),
     (lambda v: v[:, :, 0], "the volume is 2D"), (lambda v: np.stack([v, v], 3), "channels found 2")],
)  # fmt: skip
def test_prediction_refuses_what_is_no_ct(ct, tmp_path, change, text):
    record = data_record(both(ct))
    save(tmp_path / "x.nii.gz", change(body(0)[0]))
    with pytest.raises(InputError, match=text):
        load_slices_for_prediction(tmp_path / "x.nii.gz", record)


def test_prediction_of_mr_takes_any_range(ct, tmp_path):
    edit(ct, channel_names={"0": "T1"})
    record = data_record(both(ct))
    save(tmp_path / "x.nii.gz", (body(0)[0] + 1000) / np.float32(1000))
    x, _ = load_slices_for_prediction(tmp_path / "x.nii.gz", record)
    assert x.min() == -1 and x.max() == 1


def test_data_record_holds_the_slices_in_plain_types(ct):
    record = data_record(both(ct))
    assert record["slices"] == {"side": 32} and json.loads(json.dumps(record)) == record


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [(lambda v: v + 1024, "which fall below 0; MR, a label, or HU + 1024? name the modality MR, or subtract 1024"),
     (lambda v: v / np.float32(1000), "intensities from -1 to 0.099, expected Hounsfield units; get the original"),
     (lambda v: v.astype(np.int32) * 100, "intensities from -100000 to 9900, expected Hounsfield units")],
)  # fmt: skip
def test_ct_of_other_intensities_is_refused_by_name(ct, capsys, tmp_path, change, text):
    save(ct.parent / "more" / "deeper" / "u1.nii.gz", change(body(0)[0]))
    line = refused(
        capsys,
        "--src",
        ct,
        "--dst",
        tmp_path / "p",
        "--as-slices",
        "--unlabelled",
        ct.parent / "more",
    )
    assert "u1.nii.gz: intensities" in line and text in line and not (tmp_path / "p").exists()


def test_norm_corpus_refuses_values_it_cannot_count(ct, capsys, tmp_path):
    edit(ct, channel_names={"0": "T1"})
    save(ct / "imagesTr" / "c0_0000.nii.gz", body(0)[0] / np.float32(1000))
    line = refused(capsys, "--src", ct, "--dst", tmp_path / "p", "--as-slices", "--norm", "corpus")
    assert "c0_0000.nii.gz: intensities from" in line and "use --norm case" in line


@pytest.mark.parametrize("side", ["100", "0", "x", "2048"])
def test_side_must_be_a_multiple_of_32(ct, capsys, side):
    line = refused(capsys, "--src", ct, "--check", "--as-slices", "--side", side)
    assert "is not a multiple of 32 from 32 to 1024" in line


@pytest.mark.parametrize(
    "flags", [("--side", "64"), ("--norm", "corpus"), ("--fov-pad", "keep"), ("--spacing", "rule")]
)
def test_flags_of_slices_need_as_slices(ct, capsys, flags):
    line = refused(capsys, "--src", ct, "--check", *flags)
    assert flags[0] in line and "add --as-slices" in line


def test_slices_of_several_channels_are_refused(ct, capsys):
    edit(ct, channel_names={"0": "T1", "1": "T2"})
    for f in sorted((ct / "imagesTr").iterdir()):
        shutil.copy(f, f.with_name(f.name.replace("_0000", "_0001")))
    line = refused(capsys, "--src", ct, "--check", "--as-slices")
    assert "has the channels T1, T2, expected one for --as-slices" in line


def test_unlabelled_folder_must_hold_volumes_of_other_names(ct, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, text in (("no", "no such folder"), ("empty", "holds no .nii or .nii.gz file")):
        line = refused(
            capsys, "--src", ct, "--check", "--as-slices", "--unlabelled", tmp_path / folder
        )
        assert text in line and "check --unlabelled" in line
    save(tmp_path / "empty" / "C0_0000.nii.gz", body(0)[0])
    line = refused(
        capsys, "--src", ct, "--check", "--as-slices", "--unlabelled", tmp_path / "empty"
    )
    assert "C0_0000.nii.gz: there is a case C0 already, expected names of their own" in line


def test_a_missing_label_is_named_before_split_sizes(ct, capsys, tmp_path):
    (ct / "labelsTr" / "c4.nii.gz").unlink()
    line = refused(
        capsys, "--src", ct, "--dst", tmp_path / "p", "--as-slices", "--split-sizes", "3,1,1"
    )
    assert "c4.nii.gz: missing" in line


def test_open_slices_refuses_volumes_with_the_command(fake):
    with pytest.raises(
        InputError, match=r"holds volumes, expected slices; prepare them: .*--as-slices"
    ):
        open_slices(str(fake / "prepared"))


def test_open_slices_of_nothing_gives_the_command(tmp_path):
    with pytest.raises(InputError, match=r"data_prep\.msd --src DIR --dst .*chaos --as-slices"):
        open_slices(str(tmp_path / "chaos"))
    with pytest.raises(InputError, match=r"data_prep\.flare22 --src DIR --dst .*flare22$"):
        open_slices(str(tmp_path / "flare22"))


@pytest.mark.parametrize(("axes", "kind"), [(2, "images"), (3, "volumes")])
def test_open_data_refuses_slices(ct, axes, kind):
    data = both(ct)
    with pytest.raises(
        InputError, match=f"holds slices, expected {kind}; prepare without --as-slices"
    ):
        open_data(str(data.root), axes=axes)


def test_open_prepared_names_an_array_of_another_type(ct):
    data = both(ct)
    np.save(data.root / "cases" / "c0" / "image.npy", np.zeros((1, 32, 32, 6), np.float16))
    with pytest.raises(InputError, match=r"c0/image.npy is float16 .*expected int16"):
        open_prepared(data.root)


# --- phantoms --------------------------------------------------------------------------------------------------------


def test_ct_phantoms_have_the_interface_of_slices():
    data = open_slices("synthetic", seed=3)
    assert isinstance(data, CtPhantoms) and (data.name, data.side, data.channels) == (
        "synthetic",
        32,
        ["CT"],
    )
    sizes = {"train": 12, "val": 2, "test": 24, "unlabelled": 48, "pretrain": 60}
    assert {split: len(data.cases(split)) for split in data.meta["splits"]} == sizes
    case = data.cases("test")[0]
    assert data.image(case).shape == (1, 32, 32, 12) and data.image(case).dtype == np.int16
    assert (
        data.image(case)[0, :, :, 3].flags.f_contiguous
        and data.label(case)[:, :, 3].flags.f_contiguous
    )
    assert (data.shape(case), data.depth(case), data.spacing(case)) == (
        (32, 32, 12),
        12,
        (10, 10, 8),
    )
    assert data.slice(case, 5).shape == data.slice_label(case, 5).shape == (32, 32)
    assert data_record(data)["slices"] == {"side": 32} and list(data.scored) == list(data.classes)


def test_ct_phantoms_without_label_say_so():
    data = CtPhantoms()
    case = data.cases("unlabelled")[0]
    assert not data.has_label(case) and data.has_label(data.cases("train")[0])
    with pytest.raises(InputError, match="has no label"):
        data.label(case)
    with pytest.raises(InputError, match="no case 'ct_999'"):
        data.image("ct_999")


def test_ct_phantom_is_a_function_of_seed_and_index():
    a, b = loaders.ct_phantom(1, 2), loaders.ct_phantom(1, 2)
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    for other in (loaders.ct_phantom(1, 3), loaders.ct_phantom(2, 2)):
        assert (other[1] != a[1]).mean() > 0.01


def test_ct_phantom_has_its_organs_in_place():
    """x grows to the right, y to the front, z to the head; millimetres would do, fractions of the grid are easier."""
    for index in range(20):
        _, label = loaders.ct_phantom(0, index)
        liver, spleen, left, right = (
            np.argwhere(label == v).mean(0) / label.shape for v in range(1, 5)
        )
        assert liver[0] > 0.5 > spleen[0] and right[0] > 0.5 > left[0]
        assert max(left[1], right[1], spleen[1]) < 0.5 and min(liver[2], spleen[2]) > max(
            left[2], right[2]
        )


def test_ct_phantom_has_the_tissues_of_a_ct():
    for index in range(5):
        hu, label = loaders.ct_phantom(0, index, 64)
        assert hu[0, 0].max() < -900 and hu.max() > 300
        body = hu[12:-12, 14:-14]
        shares = [
            ((body > a) & (body < b)).mean()
            for a, b in ((-900, -780), (-140, -60), (10, 90), (300, 500))
        ]
        assert min(shares) > 0.01
        for value in range(1, 5):
            assert 20 < np.median(hu[label == value]) < 80


def test_ct_phantom_keeps_its_anatomy_at_another_side():
    (_, small), (_, large) = loaders.ct_phantom(0, 4, 32), loaders.ct_phantom(0, 4, 128)
    for value in range(1, 5):
        assert (large == value).mean() == pytest.approx((small == value).mean(), rel=0.15)


def test_ct_phantom_organs_cannot_be_told_by_a_threshold():
    cases = [loaders.ct_phantom(0, index) for index in range(10)]
    hu, label = np.concatenate([c[0] for c in cases]), np.concatenate([c[1] for c in cases])
    for value in range(1, 5):
        best = 0.0
        for low in range(-20, 80, 10):
            for high in range(low + 10, 120, 10):
                found = (hu >= low) & (hu < high)
                best = max(
                    best,
                    2 * (found & (label == value)).sum() / (found.sum() + (label == value).sum()),
                )
        assert best < 0.55 and not math.isclose(best, 0)
