"""Metrics against the specification's values, brute force and masks drawn by hand; their files and command line."""

import json
import math
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats
from scipy.spatial.distance import cdist

from common import InputError
from common.old import loaders, metrics

ROOT = Path(__file__).resolve().parents[1]
ONE = (1.0, 1.0, 1.0)


def cube(start, size=4, shape=(12, 12, 12)):
    """A cube of `size` voxels whose first voxel is `start`."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def brute(pred, true, spacing, tolerance=1.0):
    """The definitions, word for word: erosion, then every distance between two surface voxels."""
    surfaces = []
    for mask in (pred, true):
        eroded = ndimage.binary_erosion(
            mask, ndimage.generate_binary_structure(mask.ndim, 1), border_value=0
        )
        surfaces.append(np.argwhere(mask & ~eroded) * np.asarray(spacing))
    between = cdist(*surfaces)
    a, b = between.min(axis=1), between.min(axis=0)
    both = np.concatenate((a, b))
    centres = [np.argwhere(mask).mean(axis=0) * np.asarray(spacing) for mask in (pred, true)]
    return {
        "hd95_mm": max(np.percentile(a, 95), np.percentile(b, 95)),
        "hd95_pooled_mm": np.percentile(both, 95),
        "nsd": np.mean(both <= tolerance + 1e-9),
        "assd_mm": both.mean(),
        "centroid_mm": np.linalg.norm(centres[0] - centres[1]),
    }


def force(monkeypatch, path):
    """Take one of the two algorithms whatever its expected cost, and see that the other one is not called."""
    other = "distance_transform_edt" if path == "tree" else "cKDTree"
    monkeypatch.setattr(metrics, "COST_TRANSFORM", math.inf if path == "tree" else 0.0)
    monkeypatch.setattr(metrics, other, lambda *a, **k: pytest.fail(f"{other} was called"))


def random_pair(shape, seed, density=0.15):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < density, rng.random(shape) < density / 2


# --- values of the specification -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift, spacing, expected",
    [
        ((1, 0, 0), ONE, {"nsd": 1, "hd95_mm": 1, "centroid_mm": 1, "assd_mm": 0.357142857}),
        (
            (1, 0, 0),
            (0.75, 0.75, 2.5),
            {"nsd": 1, "hd95_mm": 0.75, "centroid_mm": 0.75, "assd_mm": 0.267857143},
        ),
        (
            (0, 0, 1),
            (0.75, 0.75, 2.5),
            {"nsd": 0.714285714, "hd95_mm": 2.5, "centroid_mm": 2.5, "assd_mm": 0.767857143},
        ),
        (
            (1, 0, 0),
            (1.5, 1.5, 5),
            {"nsd": 0.642857143, "hd95_mm": 1.5, "centroid_mm": 1.5, "assd_mm": 0.535714286},
        ),
    ],
)
def test_surface_scores_of_a_shifted_cube_match_the_specification(shift, spacing, expected):
    true, pred = cube((3, 3, 3)), cube(np.add((3, 3, 3), shift))
    scores = metrics.surface_scores(pred, true, spacing)
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    assert metrics.dice(pred, true) == 0.75


def test_surface_scores_with_one_far_voxel_match_the_specification():
    true = cube((3, 3, 3))
    pred = true.copy()
    pred[10, 10, 10] = True
    scores = metrics.surface_scores(pred, true, ONE)
    assert scores["nsd"] == pytest.approx(0.991150442, abs=1e-9)
    assert scores["hd95_mm"] == 0
    assert scores["centroid_mm"] == pytest.approx(0.146558145, abs=1e-9)
    assert scores["assd_mm"] * 113 == pytest.approx(
        6.928203230, abs=1e-8
    )  # the far voxel's distance is all there is
    assert metrics.dice(pred, true) == pytest.approx(0.992248062, abs=1e-9)


def twenty(change):
    true = np.zeros((20, 20, 20), dtype=bool)
    true[6:12, 4:10, 4:10] = True
    pred = true.copy()
    change(pred)
    return pred, true


@pytest.mark.parametrize(
    "corner, dice, largest, pooled",
    [
        (np.s_[0:2, 0:2, 18:20], 0.981818182, 1.381122732, 0),
        (np.s_[0:4, 0:4, 16:20], 0.870967742, 30.385003845, 27.752472933),
    ],
)
def test_hd95_with_a_false_island_matches_the_specification_in_both_kinds(
    corner, dice, largest, pooled
):
    pred, true = twenty(lambda m: m.__setitem__(corner, True))
    assert metrics.dice(pred, true) == pytest.approx(dice, abs=1e-9)
    assert metrics.hd95(pred, true, (1, 1, 3)) == pytest.approx(largest, abs=1e-9)
    assert metrics.hd95(pred, true, (1, 1, 3), kind="pooled") == pytest.approx(pooled, abs=1e-9)


def test_hd95_of_a_cube_shifted_by_two_voxels_is_two_in_both_kinds():
    _, true = twenty(lambda m: None)
    pred = np.roll(true, -2, axis=0)
    assert metrics.dice(pred, true) == pytest.approx(2 / 3)
    assert [metrics.hd95(pred, true, (1, 1, 3), kind) for kind in ("max", "pooled")] == [2, 2]


def test_hd95_of_one_slice_uses_the_spacing_of_its_axis():
    pred, true = twenty(lambda m: m.__setitem__(np.s_[7:], False))
    assert metrics.dice(pred, true) == pytest.approx(2 / 7)
    assert [metrics.hd95(pred, true, (2, 1, 1), kind) for kind in ("max", "pooled")] == [10, 10]


def test_diagonal_matches_the_specification():
    assert metrics.diagonal_mm((256, 256, 48), (0.75, 0.75, 2.5)) == pytest.approx(
        296.86, abs=0.005
    )


# --- brute force, both algorithms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tree", "transform"])
@pytest.mark.parametrize(
    "shape, spacing", [((9, 11, 7), (0.7, 1.3, 2.9)), ((14, 9, 12), ONE), ((23, 31), (0.6, 1.7))]
)
def test_surface_scores_equal_brute_force_by_both_algorithms(monkeypatch, path, shape, spacing):
    force(monkeypatch, path)
    for seed in range(4):
        pred, true = random_pair(shape, seed)
        if seed % 2:  # connected masks with an inside, beside the scattered ones
            pred, true = (ndimage.binary_dilation(m, iterations=2) for m in (pred & true, true))
        if pred.any() and true.any():
            expected = brute(pred, true, spacing)
            assert metrics.surface_scores(pred, true, spacing) == pytest.approx(expected, abs=1e-9)


def test_single_metrics_equal_brute_force():
    pred, true = random_pair((8, 9, 10), 5)
    spacing, expected = (0.7, 1.3, 2.9), brute(pred, true, (0.7, 1.3, 2.9), tolerance=1.5)
    assert metrics.hd95(pred, true, spacing) == pytest.approx(expected["hd95_mm"])
    assert metrics.hd95(pred, true, spacing, kind="pooled") == pytest.approx(
        expected["hd95_pooled_mm"]
    )
    assert metrics.assd(pred, true, spacing) == pytest.approx(expected["assd_mm"])
    assert metrics.nsd(pred, true, spacing, tolerance_mm=1.5) == pytest.approx(expected["nsd"])
    assert metrics.centroid_distance(pred, true, spacing) == pytest.approx(expected["centroid_mm"])


def test_cost_rule_takes_the_tree_for_near_surfaces_and_the_transform_for_concentric_ones(
    monkeypatch,
):
    grid = np.stack(np.meshgrid(*[np.arange(-24, 25)] * 3, indexing="ij"))
    radius = np.linalg.norm(grid, axis=0)
    near, small, large = np.linalg.norm(grid - 1, axis=0) < 21, radius < 10, radius < 22
    calls = []
    original = metrics.distance_transform_edt
    monkeypatch.setattr(
        metrics, "distance_transform_edt", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    metrics.surface_scores(near, large, ONE)
    assert not calls
    metrics.surface_scores(small, large, ONE)
    assert calls


def test_surface_scores_are_the_same_for_fortran_order_and_for_swapped_arguments():
    pred, true = random_pair((9, 11, 7), 1)
    spacing = (0.7, 1.3, 2.9)
    expected = metrics.surface_scores(pred, true, spacing)
    assert metrics.surface_scores(
        np.asfortranarray(pred), np.asfortranarray(true), spacing
    ) == pytest.approx(expected)
    assert metrics.surface_scores(np.asfortranarray(pred), true, spacing) == pytest.approx(expected)
    assert metrics.surface_scores(true, pred, spacing) == pytest.approx(expected)


# --- masks drawn by hand ---------------------------------------------------------------------------------------------


def draw(*lines):
    return np.array([[c == "#" for c in line] for line in lines])


def test_surface_counts_voxels_at_the_border_of_the_image():
    assert np.count_nonzero(metrics._surface(cube((0, 0, 0)))) == 56
    assert np.count_nonzero(metrics._surface(cube((3, 3, 3)))) == 56
    full = np.ones((5, 5), dtype=bool)
    assert np.array_equal(metrics._surface(full), draw("#####", "#...#", "#...#", "#...#", "#####"))
    centre = draw(".....", ".....", "..#..", ".....", ".....")
    # the full image's surface is its frame: 16 voxels at distances 2 and sqrt(5) and sqrt(8)
    assert metrics.surface_scores(full, centre, (1, 1))["hd95_mm"] == pytest.approx(math.sqrt(8))


def test_surface_uses_the_cross_not_the_full_neighbourhood():
    mask = draw(".###.", "#####", "#####", "#####", ".###.")
    assert np.array_equal(metrics._surface(mask), draw(".###.", "#...#", "#...#", "#...#", ".###."))


def test_surface_scores_of_drawn_2d_masks_are_known():
    pred, true = draw("......", ".##...", "......"), draw("......", ".##.#.", "......")
    scores = metrics.surface_scores(pred, true, (3.0, 0.5))
    assert scores["assd_mm"] == pytest.approx(
        1.0 / 5
    )  # 0 0 from P, 0 0 and two columns of 0.5 from G
    assert scores["nsd"] == 1
    assert metrics.nsd(pred, true, (3.0, 0.5), tolerance_mm=0.9) == pytest.approx(4 / 5)
    assert scores["hd95_mm"] == pytest.approx(0.9)  # 95th percentile of 0 0 1
    assert scores["hd95_pooled_mm"] == pytest.approx(0.8)  # of 0 0 0 0 1
    assert scores["centroid_mm"] == pytest.approx((7 / 3 - 1.5) * 0.5)
    assert metrics.dice(pred, true) == pytest.approx(4 / 5)
    assert metrics.iou(pred, true) == pytest.approx(2 / 3)


@pytest.mark.parametrize("path", ["tree", "transform"])
def test_nsd_counts_a_distance_equal_to_the_tolerance_in_any_place_of_the_grid(monkeypatch, path):
    force(monkeypatch, path)
    for start in range(
        3, 40
    ):  # index * 0.1 is rounded differently at each index; 3 * float32(0.1) is above 0.3
        pred, true = np.zeros((50, 3), dtype=bool), np.zeros((50, 3), dtype=bool)
        pred[start, 1], true[start + 3, 1] = True, True
        assert metrics.nsd(pred, true, (float(np.float32(0.1)), 1.0), tolerance_mm=0.3) == 1
        assert metrics.nsd(pred, true, (0.1, 1.0), tolerance_mm=0.29) == 0


def test_volume_is_in_millilitres():
    assert metrics.volume_ml(cube((0, 0, 0), 10), (1, 2, 0.5)) == 1.0
    assert metrics.volume_ml(np.ones((10, 10), dtype=bool), (2, 5)) == 1.0
    assert metrics.volume_ml(np.zeros((3, 3), dtype=bool), (2, 5)) == 0


# --- empty masks and bad arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pred, true, share", [(False, True, 0), (True, False, 0), (False, False, math.nan)]
)
def test_empty_masks_give_the_values_of_the_table(pred, true, share):
    p, t = np.full((4, 4, 4), pred), np.full((4, 4, 4), true)
    scores = metrics.surface_scores(p, t, ONE)
    for value in (metrics.dice(p, t), metrics.iou(p, t), metrics.nsd(p, t, ONE), scores.pop("nsd")):
        assert value == pytest.approx(share, nan_ok=True)
    assert set(scores) == {"hd95_mm", "hd95_pooled_mm", "assd_mm", "centroid_mm"}
    singles = [
        metrics.hd95(p, t, ONE),
        metrics.assd(p, t, ONE),
        metrics.centroid_distance(p, t, ONE),
    ]
    assert np.isnan([*scores.values(), *singles]).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: metrics.dice(m, m[1:]), "same grid"),
        (lambda m: metrics.iou(m[..., 1:], m), "same grid"),
        (lambda m: metrics.dice(m * 2, m), "values other than 0 and 1"),
        (lambda m: metrics.assd(m, m * 0.5, ONE), "values other than 0 and 1"),
        (lambda m: metrics.hd95(m, m, (1, 1)), "3 positive numbers"),
        (lambda m: metrics.nsd(m, m, (1, 1, 0)), "3 positive numbers"),
        (lambda m: metrics.volume_ml(m, (1, 1, math.nan)), "3 positive numbers"),
        (lambda m: metrics.hd95(m, m, ONE, kind="mean"), "'max' or 'pooled'"),
        (lambda m: metrics.nsd(m, m, ONE, tolerance_mm=-1), "0 or more"),
        (lambda m: metrics.evaluate_case("a", m * 1.0, m * 1, ONE, {"x": 1}), "integer labels"),
        (lambda m: metrics.evaluate_case("a", m * 1, m[1:] * 1, ONE, {"x": 1}), "same grid"),
        (lambda m: metrics.best_interval_dice([m * 2.0], [m * 1], 1), r"intensities in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused_in_three_parts(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(cube((3, 3, 3)))
    assert "; expected " in str(error.value) and str(error.value).count(";") >= 2


def test_masks_of_zeros_and_ones_are_taken_as_boolean():
    a, b = cube((3, 3, 3)), cube((4, 3, 3))
    assert metrics.dice(a.astype(np.uint8), b.astype(np.float32)) == 0.75


# --- rows, files, aggregation ----------------------------------------------------------------------------------------


def labelled_cases():
    """Four images, two classes; each status occurs: [image][class] = (dice of P and G, status)."""
    both, empty = cube((3, 3, 3)), np.zeros((12, 12, 12), dtype=bool)
    shifted = cube((4, 3, 3))
    pairs = {
        "a": [(shifted, both), (empty, empty)],
        "b": [(both, both), (empty, both)],
        "c": [(empty, empty), (empty, empty)],
        "d": [(both, empty), (shifted, both)],
    }
    rows = []
    for case, classes in pairs.items():
        for name, (pred, true) in zip(("one", "two"), classes, strict=True):
            rows += metrics.evaluate_case(
                case, pred.astype(np.uint8) * 3, true.astype(np.int64) * 3, ONE, {name: 3}
            )
    return rows


def test_evaluate_case_gives_the_columns_in_order_and_the_values_of_the_single_metrics():
    rng = np.random.default_rng(0)
    pred, true = (
        rng.integers(0, 4, (9, 8, 7), dtype=np.uint8),
        rng.integers(0, 4, (9, 8, 7), dtype=np.int16),
    )
    spacing = (0.7, 1.3, 2.9)
    rows = metrics.evaluate_case("x", pred, true, spacing, {"a": 1, "c": 3}, tolerance_mm=0.8)
    header = "case,class,dice,iou,hd95_mm,hd95_pooled_mm,nsd,assd_mm,centroid_mm,volume_true_ml,volume_pred_ml"
    assert [",".join(row) for row in rows] == [
        f"{header},share"
    ] * 2  # the last one is not for the file
    assert [row["share"] for row in rows] == [(true == value).mean() for value in (1, 3)]
    assert [(row["case"], row["class"]) for row in rows] == [("x", "a"), ("x", "c")]
    p, t = pred == 3, true == 3
    expected = {
        "dice": metrics.dice(p, t),
        "iou": metrics.iou(p, t),
        **brute(p, t, spacing, tolerance=0.8),
        "volume_true_ml": metrics.volume_ml(t, spacing),
        "volume_pred_ml": metrics.volume_ml(p, spacing),
    }
    assert {k: rows[1][k] for k in expected} == pytest.approx(expected)


def test_evaluate_case_scores_unions_that_lie_inside_each_other():
    true = np.array([[[0, 0, 2, 2, 1, 4, 4, 2]]], dtype=np.uint8)  # one row of eight voxels
    pred = np.array([[[0, 2, 2, 1, 4, 4, 0, 0]]], dtype=np.uint8)
    regions = {"whole": [1, 2, 4], "core": (1, 4), "enhancing": 4, "rest": [0, 2]}
    rows = metrics.evaluate_case("x", pred, true, (1.0, 1.0, 2.0), regions)
    # voxels of P, of G, of both: whole 5, 6, 4; core 3, 3, 2; enhancing 2, 2, 1; rest, with the background, 5, 5, 4
    assert [row["class"] for row in rows] == list(regions)
    assert [row["dice"] for row in rows] == pytest.approx(
        [2 * 4 / 11, 2 * 2 / 6, 2 * 1 / 4, 2 * 4 / 10]
    )
    assert [row["iou"] for row in rows] == pytest.approx([4 / 7, 2 / 4, 1 / 3, 4 / 6])
    assert [row["volume_pred_ml"] * 500 for row in rows] == pytest.approx([5, 3, 2, 5])
    assert [row["volume_true_ml"] * 500 for row in rows] == pytest.approx([6, 3, 2, 5])
    # P 1..5 and G 2..7: P's 1 is 2 mm off, G's 6 and 7 are 2 and 4 mm off; a row has only surface voxels
    assert rows[0]["assd_mm"] == pytest.approx((2 + 2 + 4) / 11)
    assert rows[1]["centroid_mm"] == pytest.approx(2.0) and rows[2]["centroid_mm"] == pytest.approx(
        2.0
    )


def test_evaluate_case_of_one_value_is_the_same_as_a_list_or_numpy_number():
    rng = np.random.default_rng(1)
    pred, true = rng.integers(0, 3, (2, 6, 7, 8))
    rows = [
        metrics.evaluate_case("x", pred, true, ONE, {"a": v}) for v in (2, [2], (2, 2), np.int64(2))
    ]
    assert all(row == rows[0] for row in rows)
    with pytest.raises(ValueError, match="class a has no label value"):
        metrics.evaluate_case("x", pred, true, ONE, {"a": []})


def test_summary_counts_each_pair_once():
    summary = metrics.summarise(labelled_cases())
    assert summary["images"] == 4 and summary["images_dropped"] == 1
    for name, entry in summary["classes"].items():
        distance = entry["hd95_mm"]
        assert (
            distance["n"] + distance["n_missed"] + distance["n_spurious"] + distance["n_excluded"]
            == 4
        ), name
    counts = {
        name: [entry["dice"][k] for k in ("n", "n_missed", "n_spurious", "n_excluded")]
        for name, entry in [*summary["classes"].items(), ("mean", summary["mean"])]
    }
    assert counts == {"one": [3, 0, 1, 1], "two": [2, 1, 0, 2], "mean": [3, 1, 1, 3]}
    assert summary["n_valid"] + 1 + 1 + 3 == 4 * 2


def test_summary_averages_classes_within_an_image_first():
    summary = metrics.summarise(labelled_cases())
    per_image = [0.75, (1 + 0) / 2, (0 + 0.75) / 2]  # a has class one alone; c is dropped
    assert summary["mean"]["dice"]["mean"] == pytest.approx(
        np.mean(per_image)
    )  # not the mean of 0.75, 1, 0, 0, 0.75
    assert summary["mean"]["dice"]["sd"] == pytest.approx(np.std(per_image, ddof=1))
    assert summary["mean"]["dice"]["median"] == pytest.approx(0.5)
    assert summary["classes"]["one"]["dice"]["mean"] == pytest.approx((0.75 + 1 + 0) / 3)
    assert summary["mean"]["hd95_mm"]["mean"] == pytest.approx(np.mean([1, 0, 1]))
    single = summary["classes"]["two"]["hd95_mm"]  # one value: no spread, no interval
    assert (
        single["mean"] == single["median"] == 1 and np.isnan([single["sd"], *single["ci95"]]).all()
    )


def test_summary_nsd_valid_leaves_one_sided_pairs_out():
    entry = metrics.summarise(labelled_cases())["classes"]["one"]
    assert entry["nsd"]["mean"] == pytest.approx(2 / 3) and entry["nsd"]["n"] == 3
    assert entry["nsd_valid"]["mean"] == 1 and entry["nsd_valid"]["n"] == 2


def test_summary_gives_missed_and_spurious_pairs_the_diagonal_when_asked():
    rows = labelled_cases()
    entry = metrics.summarise(rows, {"a": 1.0, "b": 20.0, "c": 1.0, "d": 30.0})["classes"]
    assert entry["one"]["hd95_mm"]["mean"] == pytest.approx((1 + 0 + 30) / 3)
    assert entry["two"]["centroid_mm"]["mean"] == pytest.approx((20 + 1) / 2)
    assert metrics.summarise(rows, 30.0)["classes"]["one"]["assd_mm"]["n"] == 3


def test_summary_interval_is_a_deterministic_bootstrap_of_the_mean():
    x = np.random.default_rng(3).normal(0.8, 0.1, 60)
    low, high = metrics._bootstrap(x)
    assert [low, high] == metrics._bootstrap(x.copy())
    half = (
        1.96 * x.std(ddof=1) / math.sqrt(60)
    )  # for 60 normal values close to the textbook's interval
    assert low == pytest.approx(x.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.15 * half)


@pytest.mark.parametrize("spoil", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: []])
def test_summary_refuses_rows_that_are_missing_or_double(spoil):
    with pytest.raises(InputError, match="expected one per case and class"):
        metrics.summarise(spoil(labelled_cases()))


def test_metrics_csv_reads_back_the_same_rows_with_nan_as_an_empty_cell(tmp_path):
    rows = labelled_cases()
    rows[0]["case"] = rows[1]["case"] = 'a,"quoted"'
    metrics.write_metrics_csv(tmp_path / "metrics.csv", rows)
    back = metrics.read_metrics_csv(tmp_path / "metrics.csv")
    assert len(back) == len(rows)
    for one, two in zip(rows, back, strict=True):
        assert list(two) == list(metrics.COLUMNS)
        assert [two["case"], two["class"]] == [one["case"], one["class"]]
        np.testing.assert_array_equal(
            [two[c] for c in metrics.COLUMNS[2:]], [one[c] for c in metrics.COLUMNS[2:]]
        )
    text = (tmp_path / "metrics.csv").read_text()
    assert ",,,,,,," in text and "nan" not in text
    assert [file.name for file in tmp_path.iterdir()] == [
        "metrics.csv"
    ]  # no temporary file is left


def test_metrics_csv_with_a_wrong_header_or_cell_is_refused(tmp_path):
    file = tmp_path / "metrics.csv"
    metrics.write_metrics_csv(file, labelled_cases())
    text = file.read_text()
    file.write_text(text.replace("0.75", "many"))
    with pytest.raises(InputError, match=r"line 2: .*many"):
        metrics.read_metrics_csv(file)
    file.write_text(text.replace("hd95_mm", "hausdorff"))
    with pytest.raises(InputError, match="lacks columns"):
        metrics.read_metrics_csv(file)


def test_summary_file_is_valid_json_with_null_and_reads_back(tmp_path):
    summary = metrics.summarise(labelled_cases())
    metrics.write_summary(tmp_path / "summary.json", summary)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    raw = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert raw["classes"]["two"]["hd95_mm"]["sd"] is None
    assert raw["classes"]["two"]["hd95_mm"]["ci95"] == [None, None]
    assert set(raw["mean"]["dice"]) == {
        "mean",
        "sd",
        "median",
        "ci95",
        "n",
        "n_missed",
        "n_spurious",
        "n_excluded",
    }
    back = metrics.read_summary(tmp_path / "summary.json")
    assert str(back) == str(summary)  # as text, because NaN is not equal to itself


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    metrics.write_summary(file, {"old": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        metrics.write_summary(file, {"new": 1})
    assert json.loads(file.read_text()) == {"old": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["summary.json"]


def test_printed_summary_has_the_counters_beside_the_distances():
    lines = metrics.format_summary(metrics.summarise(labelled_cases())).splitlines()
    assert lines[0].split() == [
        "class",
        "Dice",
        "IoU",
        "HD95",
        "HD95",
        "pooled",
        "NSD",
        "ASSD",
        "centroid",
        "n",
        "missed",
        "spurious",
        "excluded",
    ]
    assert lines[1].split()[:2] == ["one", "0.583±0.520"] and lines[1].split()[-4:] == [
        "3",
        "0",
        "1",
        "1",
    ]
    assert lines[2].split()[3] == "1.00" and lines[2].split()[-4:] == ["2", "1", "0", "2"]
    assert lines[3].split()[0] == "mean" and lines[3].split()[-4:] == ["3", "1", "1", "3"]


# --- the best rule on intensity --------------------------------------------------------------------------------------


def test_best_interval_equals_a_search_over_all_rules():
    rng = np.random.default_rng(0)
    images = [rng.random((6, 5, 4)) for _ in range(3)]
    labels = [rng.integers(0, 3, (6, 5, 4)) for _ in range(2)] + [np.zeros((6, 5, 4), dtype=int)]
    best = {"threshold": 0.0, "interval": 0.0}
    for low in range(9):
        for high in range(low, 9):
            for inside in (True, False):
                preds = [((i >= low / 8) & (i < high / 8)) == inside for i in images]
                scores = [
                    metrics.dice(p, label == 2) for p, label in zip(preds, labels, strict=True)
                ]
                mean = float(np.mean([s for s in scores if s == s]))
                for kind in ("interval", "threshold")[: 2 if low == 0 or high == 8 else 1]:
                    best[kind] = max(best[kind], mean)
    assert best["threshold"] < best["interval"]
    assert metrics.best_interval_dice(images, labels, 2, bins=8) == pytest.approx(best)


def test_best_interval_separates_a_class_between_two_others():
    image = np.linspace(0, 1, 60).reshape(3, 4, 5)
    middle = ((image > 0.25) & (image < 0.75)).astype(int)
    assert metrics.best_interval_dice([image], [middle], 1)["interval"] == 1
    assert (
        metrics.best_interval_dice([image], [1 - middle], 1)["interval"] == 1
    )  # the complement of an interval
    assert metrics.best_interval_dice([image], [middle], 1)["threshold"] == pytest.approx(
        0.8, abs=0.01
    )
    assert metrics.best_interval_dice([image], [(image > 0.5).astype(int)], 1)["threshold"] == 1
    assert metrics.best_interval_dice([image], [(image < 0.5).astype(int)], 1)["threshold"] == 1
    assert np.isnan(list(metrics.best_interval_dice([image], [middle], 7).values())).all()


# --- paired tests ----------------------------------------------------------------------------------------------------


def test_paired_tests_equal_scipy_and_leave_nan_pairs_out():
    rng = np.random.default_rng(1)
    a = rng.random(25)
    b = a + rng.normal(0.05, 0.1, 25)
    a[3], b[7] = math.nan, math.nan
    keep = [i for i in range(25) if i not in (3, 7)]
    result = metrics.paired_tests(a, b)
    assert result["n"] == 23 and result["note"] == ""
    assert result["difference"] == pytest.approx((b[keep] - a[keep]).mean())
    assert result["ci95"][0] < result["difference"] < result["ci95"][1]
    assert result["p_t"] == pytest.approx(stats.ttest_rel(a[keep], b[keep]).pvalue)
    assert result["p_wilcoxon"] == pytest.approx(stats.wilcoxon(a[keep], b[keep]).pvalue)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "b, note",
    [
        ([0.5, 0.6, 0.8], "identical: no test"),
        ([0.6, 0.7, 0.9], "every difference is the same: no t-test"),
        ([math.nan, math.nan, 0.9], "fewer than 2 pairs: no test"),
        ([math.nan] * 3, "fewer than 2 pairs: no test"),
    ],
)
def test_paired_tests_say_so_where_no_test_can_be_made(b, note):
    result = metrics.paired_tests(np.array([0.5, 0.6, 0.8]), np.array(b))
    assert result["note"] == note and math.isnan(result["p_t"])


# --- command line ----------------------------------------------------------------------------------------------------


def command(*words):
    """Run the module as a user does; (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "common.metrics", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={"PYTHONIOENCODING": "utf-8", "PATH": ""},
    )
    return done.returncode, done.stdout, done.stderr


def call(capsys, *words):
    """The same within this process, which is faster."""
    code = metrics.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def one_line(code, err, *parts):
    assert (
        code == 2
        and err.startswith("metrics: ")
        and err.count("\n") == 1
        and "Traceback" not in err
    )
    for part in parts:
        assert part in err


@pytest.fixture
def run_folder(tmp_path):
    """Writes a run folder with metrics.csv (and summary.json) of noisy cubes; returns its path."""

    def make(name, seed, cases=6, summary=True):
        rng = np.random.default_rng(seed)
        rows = []
        for case in range(cases):
            pred = np.roll(
                cube((3, 3, 3)) | (rng.random((12, 12, 12)) < 0.005), rng.integers(0, 3), axis=0
            )
            rows += metrics.evaluate_case(
                f"case{case}", pred * 1, cube((3, 3, 3)) * 1, ONE, {"organ": 1, "lesion": 2}
            )
        folder = tmp_path / name
        folder.mkdir()
        metrics.write_metrics_csv(folder / "metrics.csv", rows)
        if summary:
            metrics.write_summary(folder / "summary.json", metrics.summarise(rows))
        return folder

    return make


def test_table_prints_one_row_a_run(run_folder):
    a, b = run_folder("a", 1), run_folder("b", 2, summary=False)
    code, out, err = command("table", a, b / "metrics.csv")
    assert (code, err) == (0, "")
    header, *rows = out.splitlines()[:3]
    dice = metrics.read_summary(a / "summary.json")["mean"]["dice"]
    assert [row.split()[0] for row in rows] == [str(a), str(b)]
    assert f"{dice['mean']:.3f}±{dice['sd']:.3f}" in rows[0]
    assert "Dice organ" in header and "HD95 mean" in header
    assert "(0/0)" in rows[0]  # missed/spurious beside each distance


def test_table_as_markdown_has_equal_columns(run_folder, capsys):
    code, out, _ = call(capsys, "table", run_folder("a", 1), "--markdown", "--metric", "nsd")
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and len(lines) == 3
    assert {line.count("|") for line in lines} == {6} and set(lines[1]) <= set("|-: ")


LOG = """step,seconds,loss,memory_gb,val_dice
10,30,0.5,1.25,
50,70,0.4,2.5,
50,70,,,0.3
60,78.5,0.3,2.25,
"""


def test_table_adds_steps_time_and_memory_of_the_logs(run_folder, capsys):
    a, b, c = (run_folder(name, i) for i, name in enumerate("abc"))
    (a / "log.csv").write_text(LOG)
    (c / "log.csv").write_text("epoch,seconds\n1,5\n")  # of another program
    (a / "summary.json").rename(a / "summary_ensemble1.json")
    files = a / "summary_ensemble1.json", b, c
    code, out, err = call(capsys, "table", *files, "--metric", "dice", "--markdown")
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[:5]
    )
    assert (code, err) == (0, "") and header[-3:] == ["steps", "s/step", "memory GB"]
    assert [row[-3:] for row in rows] == [["60", "1.31", "2.5"], [""] * 3, [""] * 3]  # 78.5 / 60
    assert "s/step: training seconds over steps, without validation; memory: peak" in out
    code, out, _ = call(capsys, "table", *files, "--metric", "dice")
    assert out.splitlines()[1].split()[-3:] == ["60", "1.31", "2.5"]
    _, out, _ = call(capsys, "table", b, c)  # no log says anything: no empty columns
    assert "s/step" not in out


def test_table_names_the_line_of_a_log_that_is_no_number(run_folder, capsys):
    (a := run_folder("a", 1)).joinpath("log.csv").write_text(LOG.replace("2.5,", "much,"))
    code, _, err = call(capsys, "table", a)
    one_line(code, err, f"{a / 'log.csv'} line 3", "much", "expected numbers")


def test_compare_prints_the_tests_of_scipy_over_the_shared_cases(run_folder):
    a, b = run_folder("a", 1, cases=8), run_folder("b", 2)
    code, out, err = command("compare", a, b, "--shared")
    assert (code, err) == (0, "")
    assert "6 cases paired; unpaired: 2 only in A, 0 only in B" in out
    x, y = (
        [
            row["dice"]
            for row in metrics.read_metrics_csv(f / "metrics.csv")
            if row["class"] == "organ"
        ][:6]
        for f in (a, b)
    )
    row = next(line for line in out.splitlines() if line.startswith("organ"))
    assert f"{stats.ttest_rel(x, y).pvalue:.3g}" in row.split()
    assert f"{stats.wilcoxon(x, y).pvalue:.3g}" in row.split()
    assert f"{np.mean(y) - np.mean(x):.3f}" in row.split()
    assert "HD95 (mm)" in out and "fewer than 2 pairs" in out  # of the class that no image has


def test_compare_of_a_run_with_itself_says_identical(run_folder, capsys):
    a = run_folder("a", 1)
    code, out, _ = call(capsys, "compare", a, a, "--metric", "dice")
    assert code == 0 and "identical: no test" in out and "HD95" not in out


def test_compare_leaves_a_class_that_one_run_missed_out_of_both_mean_distances(tmp_path, capsys):
    def rows(lesion):  # organ 2 mm off everywhere; the lesion 6 mm off, or missed
        out = []
        for case in "pq":
            row = dict.fromkeys(metrics.COLUMNS, 1.0) | {"case": case}
            out += [
                row | {"class": "organ", "hd95_mm": 2.0},
                row
                | {
                    "class": "lesion",
                    "hd95_mm": lesion,
                    "volume_pred_ml": 0.0 if lesion != lesion else 1.0,
                },
            ]
        return out

    metrics.write_metrics_csv(tmp_path / "a.csv", rows(6.0))
    metrics.write_metrics_csv(tmp_path / "b.csv", rows(math.nan))
    _, out, _ = call(
        capsys, "compare", tmp_path / "a.csv", tmp_path / "b.csv", "--metric", "hd95_mm"
    )
    mean = next(line for line in out.splitlines() if line.startswith("mean"))
    assert mean.split()[1:5] == ["2", "2.00", "2.00", "0.00"] and "0/0  2/0" in mean


def test_compare_refuses_runs_of_different_cases(run_folder, capsys):
    a, b = run_folder("a", 1, cases=8), run_folder("b", 2)
    code, _, err = call(capsys, "compare", a, b)
    one_line(code, err, "case6, case7 (2) in one only", "--shared")


def test_compare_of_seeds_tests_the_mean_of_each_case(run_folder, tmp_path, capsys):
    for name, seed in (("a-0", 1), ("a-1", 2), ("b-0", 3)):
        run_folder(name, seed)
    _, out, _ = call(capsys, "compare", tmp_path / "a-?", tmp_path / "b-0", "--metric", "dice")
    dice = {
        f: [
            r["dice"]
            for r in metrics.read_metrics_csv(tmp_path / f / "metrics.csv")
            if r["class"] == "organ"
        ]
        for f in ("a-0", "a-1", "b-0")
    }
    p = stats.ttest_rel(np.mean([dice["a-0"], dice["a-1"]], axis=0), dice["b-0"]).pvalue
    assert f"{p:.3g}" in next(line for line in out.splitlines() if line.startswith("organ")).split()
    assert "A is the mean of 2 runs, B of 1" in out
    code, _, err = call(capsys, "compare", tmp_path / "c-?", tmp_path / "b-0")
    one_line(code, err, "c-? matches nothing")


def test_compare_of_seeds_refuses_runs_of_different_cases(run_folder, tmp_path, capsys):
    run_folder("a-0", 1)
    run_folder("a-1", 1, cases=7)
    code, _, err = call(capsys, "compare", tmp_path / "a-?", run_folder("b", 2))
    one_line(code, err, "a-1 and", "different cases or classes")


def test_table_over_seeds_gives_the_spread_of_the_means(run_folder, capsys):
    runs = [run_folder(name, seed) for name, seed in (("a-0", 1), ("a-1", 2), ("b-0", 3))]
    _, out, _ = call(capsys, "table", *runs, "--metric", "dice", "--seeds")
    means = [metrics.read_summary(run / "summary.json")["mean"]["dice"]["mean"] for run in runs]
    rows = {
        line.split()[0].rpartition("/")[2]: line.split()
        for line in out.splitlines()
        if "-*" in line
    }
    assert (
        rows["a-*"][1] == "2"
        and rows["a-*"][-1] == f"{np.mean(means[:2]):.3f}±{np.std(means[:2], ddof=1):.3f}"
    )
    assert rows["b-*"][1] == "1" and rows["b-*"][-1] == f"{means[2]:.3f}"


# The paper's eight classes: rho of two orders with the p of both kinds (spec, section 1).
@pytest.mark.parametrize(
    ("order", "rho", "exact", "approximate"),
    [
        ((2, 1, 4, 3, 7, 5, 8, 6), 0.8333, 0.0154, 0.0102),
        ((3, 1, 2, 6, 4, 5, 7, 8), 0.8571, 0.0107, 0.0065),
    ],
)
def test_rank_correlation_of_eight_classes_is_exact(order, rho, exact, approximate):
    r = metrics.rank_correlation(range(1, 9), order)
    assert r["exact"] and r["n"] == 8
    assert r["rho"] == pytest.approx(rho, abs=1e-4) and r["rho"] == pytest.approx(
        stats.spearmanr(range(8), order)[0]
    )
    assert r["p"] == pytest.approx(exact, abs=6e-5)
    assert stats.spearmanr(range(8), order)[1] == pytest.approx(approximate, abs=6e-5)


def test_rank_correlation_is_two_sided():
    down = metrics.rank_correlation(range(8), [-v for v in (3, 1, 2, 6, 4, 5, 7, 8)])
    assert down["rho"] == pytest.approx(-0.8571, abs=1e-4) and down["p"] == pytest.approx(
        0.0107, abs=6e-5
    )


def test_rank_correlation_with_ties_counts_every_pairing():
    x, y = [1, 2, 2, 4, 5], [2.0, 1.0, 3.0, 3.0, 9.0]
    r = metrics.rank_correlation(x, y)
    every = [stats.spearmanr(x, p)[0] for p in permutations(y)]
    assert r["p"] == pytest.approx(np.mean(np.abs(every) >= abs(r["rho"]) - 1e-9))


def test_rank_correlation_of_many_classes_uses_the_t_approximation():
    x, y = np.arange(12), np.random.default_rng(0).permutation(12)
    r = metrics.rank_correlation(x, y)
    assert (r["exact"], r["rho"], r["p"]) == (
        False,
        pytest.approx(stats.spearmanr(x, y)[0]),
        stats.spearmanr(x, y)[1],
    )


@pytest.mark.parametrize(("x", "y"), [([1, 2], [2, 1]), ([1, 2, 3], [5, 5, 5]), ([], [])])
def test_rank_correlation_without_an_order_is_nan(x, y):
    r = metrics.rank_correlation(x, y)
    assert math.isnan(r["rho"]) and math.isnan(r["p"]) and r["n"] == len(x)


def three_balls(folder, shift):
    """A run of three cubes of edge 1, 3 and 5 voxels, each `shift` too far along the first axis."""
    true = np.zeros((20, 12, 28), int)
    for value, edge in ((3, 1), (1, 3), (2, 5)):
        true[2 : 2 + edge, 2 : 2 + edge, 7 * value : 7 * value + edge] = value
    rows = []
    for case in "pq":
        rows += metrics.evaluate_case(
            case, np.roll(true, shift, 0), true, ONE, {"small": 3, "middle": 1, "large": 2}
        )
    folder.mkdir()
    metrics.write_metrics_csv(folder / "metrics.csv", rows)
    metrics.write_summary(folder / "summary.json", metrics.summarise(rows))
    return folder, true


def test_summary_holds_the_share_of_each_class(tmp_path):
    folder, true = three_balls(tmp_path / "a", 1)
    share = metrics.read_summary(folder / "summary.json")["share"]
    assert metrics._by_share(metrics.read_summary(folder / "summary.json"), list(share)) == [
        "small",
        "middle",
        "large",
    ]
    assert share == {
        name: pytest.approx((true == v).mean())
        for name, v in (("small", 3), ("middle", 1), ("large", 2))
    }


def test_table_prints_whether_large_classes_are_easier_and_draws_them(tmp_path, capsys):
    (a, _), (b, _) = three_balls(tmp_path / "a", 1), three_balls(tmp_path / "b", 2)
    picture = tmp_path / "classes.png"
    code, out, _ = call(capsys, "table", a, b, "--plot", picture)
    assert (
        code == 0
        and f"{a}: Spearman of class share against Dice 1.00, p = 0.333 (3 classes, exact)" in out
    )
    with Image.open(picture) as image:
        assert min(image.size) > 200
    code, out, err = call(capsys, "table", a / "metrics.csv", "--plot", picture)
    one_line(code, err, "--plot met 0 orders", "knows no shares")
    assert "Spearman" not in out


def test_bad_input_of_table_and_compare_is_one_line(run_folder, tmp_path, capsys):
    a, b = run_folder("a", 1), run_folder("b", 1)
    text = (b / "metrics.csv").read_text()
    (b / "metrics.csv").write_text(text.replace("case", "other").replace("other,", "case,", 1))
    code, _, err = command("compare", a, b)
    one_line(code, err, "share 0 cases", "evaluate both runs")
    (b / "summary.json").write_text("[1]")
    for words, part in (
        (("table", tmp_path / "none"), "does not exist"),
        (("table", tmp_path), "a run folder"),
        (("table", b), "is no summary.json"),
        (("table", a, "--metric", "best"), "invalid choice"),
        (("draw",), "invalid choice"),
        ((), "required"),
    ):
        code, _, err = call(capsys, *words)
        one_line(code, err, part)


def save_nifti(path, labels, spacing=ONE, shift=0.0, dtype=np.uint8):
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = shift
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(labels.astype(dtype), affine), path)


def test_score_of_nifti_folders_uses_the_header_spacing_and_writes_both_files(tmp_path):
    true = cube((3, 3, 3)) * 1 + cube((8, 8, 8)) * 2
    for case, pred in (("one", np.roll(true, 1, axis=2)), ("two", true)):
        save_nifti(tmp_path / "pred" / f"{case}.nii.gz", pred, (0.75, 0.75, 2.5))
        save_nifti(
            tmp_path / "true" / f"{case}_0000.nii", true, (0.75, 0.75, 2.5), dtype=np.float32
        )
    code, out, err = command(
        "score",
        "--pred",
        tmp_path / "pred",
        "--true",
        tmp_path / "true",
        "--classes",
        "organ=1",
        "lesion=2",
        "absent=9",
        "--out",
        tmp_path / "out",
    )
    assert (code, err) == (0, "")
    assert "organ" in out and "Units: mm" in out
    rows = metrics.read_metrics_csv(tmp_path / "out" / "metrics.csv")
    assert [r["case"] for r in rows] == ["one"] * 3 + ["two"] * 3
    assert [r["class"] for r in rows] == ["organ", "lesion", "absent"] * 2
    assert rows[0]["hd95_mm"] == 2.5 and rows[0]["nsd"] == pytest.approx(0.714285714)
    assert rows[0]["volume_true_ml"] == pytest.approx(64 * 0.75 * 0.75 * 2.5 / 1000)
    summary = metrics.read_summary(tmp_path / "out" / "summary.json")
    assert summary["classes"]["organ"]["dice"]["mean"] == pytest.approx((0.75 + 1) / 2)
    assert summary["classes"]["absent"]["dice"]["n_excluded"] == 2


def test_score_takes_unions_of_label_values(tmp_path, capsys):
    true = cube((3, 3, 3)) * 1 + cube((8, 8, 8)) * 4
    save_nifti(tmp_path / "pred" / "a.nii", np.where(true == 1, 2, true))
    save_nifti(tmp_path / "true" / "a.nii", true)
    words = (
        "score",
        "--pred",
        tmp_path / "pred",
        "--true",
        tmp_path / "true",
        "--out",
        tmp_path / "out",
    )
    code, _, err = call(capsys, *words, "--classes", "whole tumour=1+2+4", "core=1+4,enhancing=4")
    assert (code, err) == (0, "")
    rows = metrics.read_metrics_csv(tmp_path / "out" / "metrics.csv")
    first, second = (true == 1).sum(), (true == 4).sum()
    assert [r["class"] for r in rows] == ["whole tumour", "core", "enhancing"]
    assert [r["dice"] for r in rows] == pytest.approx([1, 2 * second / (first + 2 * second), 1])


def test_score_without_classes_takes_every_value_of_any_file(tmp_path, capsys):
    save_nifti(tmp_path / "pred" / "a.nii", cube((3, 3, 3)) * 2)
    save_nifti(tmp_path / "true" / "a.nii", cube((3, 3, 3)) * 2)
    save_nifti(tmp_path / "pred" / "b.nii", cube((3, 3, 3)) * 10)
    save_nifti(tmp_path / "true" / "b.nii", cube((3, 3, 3)) * 0)
    words = (
        "score",
        "--pred",
        tmp_path / "pred",
        "--true",
        tmp_path / "true",
        "--out",
        tmp_path / "out",
    )
    code, _, _ = call(capsys, *words, "--empty-distance", "diagonal")
    assert code == 0
    rows = metrics.read_metrics_csv(tmp_path / "out" / "metrics.csv")
    assert [(r["case"], r["class"]) for r in rows] == [
        ("a", "2"),
        ("a", "10"),
        ("b", "2"),
        ("b", "10"),
    ]
    summary = metrics.read_summary(tmp_path / "out" / "summary.json")
    assert [summary["classes"]["10"]["dice"][k] for k in ("n_spurious", "n_excluded")] == [1, 1]
    assert summary["classes"]["10"]["hd95_mm"]["mean"] == pytest.approx(math.sqrt(3) * 12)
    code, _, err = call(capsys, *words)
    one_line(code, err, "metrics.csv exists", "--overwrite")
    assert call(capsys, *words, "--overwrite")[0] == 0


def test_score_of_png_folders_is_in_pixels(tmp_path, capsys):
    for side, column in (("pred", 4), ("true", 2)):
        (tmp_path / side).mkdir()
        mask = np.zeros((20, 10), dtype=np.uint8)
        mask[5:15, column] = 255
        Image.fromarray(mask).save(tmp_path / side / "slide.png")
    words = (
        "score",
        "--pred",
        tmp_path / "pred",
        "--true",
        tmp_path / "true",
        "--classes",
        "gland=255",
    )
    code, out, _ = call(capsys, *words)
    row = next(line for line in out.splitlines() if line.startswith("gland"))
    assert code == 0 and "Units: pixels" in out
    assert row.split() == [
        "gland",
        "0.000",
        "0.000",
        "2.00",
        "2.00",
        "0.000",
        "2.00",
        "2.00",
        "1",
        "0",
        "0",
        "0",
    ]


def test_score_names_every_faulty_case_in_one_line_and_writes_nothing(tmp_path):
    mask = cube((3, 3, 3)) * 1
    for case in ("good", "shape", "affine", "fraction", "damaged", "alone"):
        save_nifti(tmp_path / "true" / f"{case}.nii.gz", mask)
        if case != "alone":
            save_nifti(
                tmp_path / "pred" / f"{case}.nii.gz",
                mask[1:] if case == "shape" else mask,
                shift=0.002 if case == "affine" else 0.0005,
            )
    save_nifti(tmp_path / "pred" / "fraction.nii.gz", mask * 0.5, dtype=np.float32)
    file = tmp_path / "pred" / "damaged.nii.gz"
    file.write_bytes(file.read_bytes()[:-40])
    words = ("--pred", tmp_path / "pred", "--true", tmp_path / "true", "--out", tmp_path / "out")
    code, _, err = command("score", *words)
    one_line(
        code,
        err,
        "5 faulty cases",
        "shape: prediction has shape (11, 12, 12)",
        "affine: affines differ by 0.002 mm",
        "fraction: prediction fraction.nii.gz has label values that are not integers",
        "damaged: prediction",
        "alone: no file in",
    )
    assert "good" not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, damage",
    [
        ("nii.gz", lambda b: b""),
        ("nii.gz", lambda b: b[:-40]),
        ("nii.gz", lambda b: b[:-6] + bytes(6)),
        ("nii.gz", lambda b: b[:1000] + b"damage" + b[1006:]),
        ("nii", lambda b: b[:-40]),
        ("nii", lambda b: b[:200]),
        ("nii", lambda b: b"no image"),
        ("png", lambda b: b[:-30]),
        ("png", lambda b: b"no image"),
    ],
    ids=[
        "empty",
        "cut",
        "checksum",
        "changed",
        "cut-nii",
        "header-nii",
        "other-nii",
        "cut-png",
        "other-png",
    ],
)
def test_score_names_a_damaged_file(tmp_path, capsys, kind, damage):
    labels = np.random.default_rng(0).integers(0, 5, (20, 20, 20), dtype=np.uint8)
    for side in ("pred", "true"):
        if kind == "png":
            (tmp_path / side).mkdir()
            Image.fromarray(labels[0]).save(tmp_path / side / "case.png")
        else:
            save_nifti(tmp_path / side / f"case.{kind}", labels)
    file = tmp_path / "true" / f"case.{kind}"
    file.write_bytes(damage(file.read_bytes()))
    code, _, err = call(capsys, "score", "--pred", tmp_path / "pred", "--true", tmp_path / "true")
    one_line(code, err, f"case: truth case.{kind} cannot be read")


def test_score_refuses_folders_and_classes_that_cannot_be_used(tmp_path, capsys):
    save_nifti(tmp_path / "true" / "a.nii", cube((3, 3, 3)) * 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "png").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "png" / "a.png")
    for pred, true, more, part in (
        ("empty", "true", (), "has no .nii"),
        ("none", "true", (), "is no folder"),
        ("png", "true", (), "both PNG and NIfTI"),
        ("png", "png", (), "expected one channel"),
        ("true", "true", ("--classes", "organ"), "NAME=VALUE"),
        ("true", "true", ("--classes", "organ=1+"), "NAME=VALUE+VALUE for a union"),
    ):
        code, _, err = call(
            capsys, "score", "--pred", tmp_path / pred, "--true", tmp_path / true, *more
        )
        one_line(code, err, part)


def test_module_needs_no_torch():
    code = "import sys, common.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# --- calibration ------------------------------------------------------------------------------------------------------


def binary(p):
    """Probabilities [2, X, Y, Z] of background and foreground."""
    p = np.asarray(p, float)
    return np.stack([1 - p, p])


def test_calibration_error_is_zero_where_confidence_is_accuracy_and_their_gap_elsewhere():
    truth = np.ones((10, 10, 10), int)
    truth[0, :2] = 0  # 20 of 1000 voxels are wrong below
    for confidence in (0.999, 0.98, 0.75):
        r = metrics.calibration([(binary(np.full(truth.shape, confidence)), truth, ONE)])
        assert r["ece"] == pytest.approx(abs(confidence - 0.98)) and r["error"] == pytest.approx(
            0.02
        )


def test_calibration_counts_the_voxels_near_the_foreground_only():
    truth = np.zeros((40, 3, 3), int)
    truth[20] = 1  # one slice, found well; all else is background within so many mm or not
    prob = np.full(truth.shape, 0.01)
    prob[20] = 0.99
    prob[14] = 0.49  # still background
    for margin, spacing, reached in (
        (5, ONE, False),
        (6, ONE, True),
        (6, (2, 1, 1), False),
        (12, (2, 1, 1), True),
    ):
        r = metrics.calibration([(binary(prob), truth, spacing)], margin)
        doubtful = [share for entropy, _, share in r["bins"] if entropy > 0.9]
        assert doubtful == ([pytest.approx(1 / 13)] if reached else [])


def test_calibration_entropy_is_a_share_of_log_c_and_errors_are_counted_by_it():
    truth = np.ones((4, 5, 5), int)
    truth[0] = 0
    truth[1] = 2
    prob = np.zeros((3, 4, 5, 5))
    prob[:, :2] = np.array([0.25, 0.5, 0.25]).reshape(
        3, 1, 1, 1
    )  # wrong in both slices, entropy 0.946 (spec)
    prob[1, 2:] = 1
    r = metrics.calibration([(prob, truth, ONE)])
    assert r["bins"] == [(0, 0, 0.5), (pytest.approx(0.946394630, abs=1e-8), 1, 0.5)]
    assert r["auroc"] == 1 and r["error"] == 0.5


def test_calibration_auroc_equals_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    truth, p = rng.integers(0, 2, (6, 6, 6)), np.round(rng.random((6, 6, 6)), 1)
    r = metrics.calibration([(binary(p), truth, ONE)], 99)
    doubt, wrong = (
        np.abs(p - 0.5).round(3).ravel(),
        ((p > 0.5) != truth).ravel(),
    )  # 0.5: background, the first
    pairs = doubt[~wrong][:, None] - doubt[wrong][None]  # positive: the right one is surer
    assert r["auroc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_calibration_over_cases_correlates_entropy_and_foreground_dice():
    truth = np.zeros((8, 8, 8), int)
    truth[2:6, 2:6, 2:6] = 1
    cases = []
    for missed, false, p in ((0, 0, 0.95), (1, 0, 0.9), (0, 150, 0.8), (3, 0, 0.7)):
        prob = truth * p
        prob[2 : 2 + missed] = 0.0
        prob.reshape(-1)[np.flatnonzero(truth == 0)[:false]] = (
            p  # spoils the Dice of the background more
        )
        cases.append((binary(prob), truth, ONE))
    nothing = np.zeros_like(truth)
    r = metrics.calibration(
        [*cases[::-1], (binary(0.0 * truth), nothing, ONE)], 99
    )  # where nothing is there: no case
    dices = [metrics.dice(c[0].argmax(0) == 1, truth == 1) for c in cases]
    doubt = [stats.entropy(c[0], axis=0).mean() for c in cases]
    assert r["n"] == 4 and r["rho"] == pytest.approx(stats.spearmanr(doubt, dices)[0])


def run_with_maps(folder, shift, data):
    """A run folder with the probabilities of two phantoms: the truth, blurred and moved."""
    phantoms = loaders.open_data(data)
    (folder / "predictions/maps").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": data}))
    for case in phantoms.cases("test")[:2]:
        truth = np.asarray(phantoms.label(case))
        onehot = np.stack([truth == v for v in (0, *phantoms.classes.values())]).astype(np.float32)
        prob = np.roll(ndimage.gaussian_filter(onehot, (0, 1, 1, 1)), shift, 1)
        for name, p in zip(
            ["background", *(name.replace(" ", "-") for name in phantoms.classes)], prob
        ):
            file = folder / f"predictions/maps/{case}_mean_{name}.nii.gz"
            loaders.write_on_grid(file, p / prob.sum(0), phantoms.affine(case))
    return folder


def test_calibration_command_reads_maps_and_averages_runs(tmp_path, capsys):
    for name, shift in (("a-0", 1), ("a-1", -1), ("b", 3)):
        run_with_maps(tmp_path / name, shift, "synthetic")
    picture = tmp_path / "calibration.png"
    code, out, _ = call(
        capsys,
        "calibration",
        tmp_path / "a-0",
        tmp_path / "a-?",
        tmp_path / "b",
        "--plot",
        picture,
        "--margin",
        2,
    )
    one, mean, far = (line.split() for line in out.splitlines()[1:4])
    assert (
        code == 0
        and [one[1], mean[1], far[1]] == ["1", "2", "1"]
        and [one[2], far[2]] == ["2", "2"]
    )
    assert (
        float(mean[4]) < float(one[4]) < float(far[4])
    )  # share of wrong voxels: the shifts cancel in the mean
    assert picture.exists()


def test_calibration_without_maps_or_of_different_cases_is_one_line(tmp_path, capsys):
    a, b = (run_with_maps(tmp_path / name, 1, "synthetic") for name in "ab")
    next((b / "predictions/maps").glob("*_mean_background.nii.gz")).unlink()
    code, _, err = call(capsys, "calibration", tmp_path / "?")
    one_line(code, err, f"{b}/predictions/maps", "1 cases", "2 cases", "--save-maps")
    (a / "config.json").unlink()
    code, _, err = call(capsys, "calibration", a)
    one_line(code, err, "config.json", "--data")
    assert call(capsys, "calibration", a, "--data", "synthetic")[0] == 0


def test_calibration_names_a_map_on_another_grid_than_the_truth(tmp_path, capsys):
    run_with_maps(tmp_path / "a", 1, "synthetic")
    file = sorted((tmp_path / "a/predictions/maps").glob("*_mean_striped-across-x.nii.gz"))[0]
    loaders.write_on_grid(file, np.zeros((4, 5, 6), np.float32), np.eye(4))
    code, _, err = call(capsys, "calibration", tmp_path / "a")
    one_line(code, err, str(file), "a grid of (4, 5, 6)", "--data")


# --- what a review found ---------------------------------------------------------------------------------------------


def case_row(case: str, name: str, dice: float, nsd: float, pred: float = 1.0) -> dict:
    row = dict.fromkeys(metrics.COLUMNS, float("nan")) | {
        "case": case,
        "class": name,
        "dice": dice,
        "iou": dice,
    }
    return row | {"nsd": nsd, "volume_pred_ml": pred, "volume_true_ml": 1.0}


def written(folder, rows) -> str:
    folder.mkdir()
    metrics.write_metrics_csv(folder / "metrics.csv", rows)
    metrics.write_summary(folder / "summary.json", metrics.summarise(rows))
    return str(folder)


def test_valid_nsd_is_compared_where_both_found_the_structure(tmp_path, capsys):
    a = [
        case_row(c, n, *v)
        for c in "xyz"
        for n, v in (("easy", (1.0, 1.0)), ("hard", (0.0, 0.0, 0.0)))
    ]
    b = [case_row(c, n, *v) for c in "xyz" for n, v in (("easy", (1.0, 1.0)), ("hard", (0.6, 0.6)))]
    folders = [written(tmp_path / name, rows) for name, rows in (("a", a), ("b", b))]
    assert metrics.main(["compare", *folders, "--metric", "nsd_valid"]) == 0
    mean = next(
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mean")
    )
    assert mean[2:5] == [
        "1.000",
        "1.000",
        "0.000",
    ]  # the hard class, which A never found, counts for neither


def test_table_over_seeds_leaves_out_a_seed_that_missed_all_and_counts_it(tmp_path, capsys):
    good = [case_row("x", "c", 0.8, 0.9) | {"hd95_mm": 2.0}]
    lost = [case_row("x", "c", 0.0, 0.0, 0.0)]
    folders = [written(tmp_path / f"run-{i}", rows) for i, rows in enumerate((good, lost))]
    assert metrics.main(["table", *folders, "--seeds", "--metric", "hd95_mm"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "run-*" in line)
    assert "2.00 (1/0)" in line


def test_cut_row_of_a_metrics_csv_is_refused(tmp_path, capsys):
    folder = written(tmp_path / "a", [case_row("x", "c", 0.8, 0.9), case_row("y", "c", 0.8, 0.9)])
    file = tmp_path / "a/metrics.csv"
    file.write_text(file.read_text()[: file.read_text().index("\ny,") + 8])
    assert metrics.main(["table", str(file)]) == 2
    assert "line 3 has too few cells" in capsys.readouterr().err and folder


@pytest.mark.parametrize("flags, words", [
    (["--classes", "a=1", "a=2"], "--classes names a twice"),
    (["--tolerance", "-1"], "--tolerance is -1"),
    (["--instances", "--out", "x"], "--instances prints object scores alone"),
])  # fmt: skip
def test_flags_of_score_that_contradict_are_refused(tmp_path, flags, words, capsys):
    assert metrics.main(["score", "--pred", str(tmp_path), "--true", str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err


def test_scores_of_fewer_cases_do_not_replace_all(tmp_path):
    folder, mask = metrics.scores_folder, np.ones((2, 2, 2), np.uint8)
    assert folder(tmp_path, "test", 2) == tmp_path and folder(tmp_path, "val") == tmp_path / "val"
    rows = [
        row
        for case in "abc"
        for row in metrics.evaluate_case(case, mask, mask, (1, 1, 1), {"organ": 1})
    ]
    metrics.write_summary(tmp_path / "summary.json", metrics.summarise(rows))
    assert folder(tmp_path, "test", 2) == tmp_path / "test-2"
    assert folder(tmp_path, "test", 3) == folder(tmp_path, "test") == tmp_path
