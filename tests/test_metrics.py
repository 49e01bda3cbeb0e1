"""Measures against the specification's values, brute force and masks drawn by hand."""

import math
import subprocess
import sys
import time
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from common import metrics

ROOT = Path(__file__).resolve().parents[1]
ONE = (1.0, 1.0, 1.0)
nan = math.nan


def cube(start, size=4, shape=(12, 12, 12)):
    """A cube of `size` voxels whose first voxel is `start`."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def drawn(text):
    """Rows of digits, split at |; # = 1, . = 0."""
    rows = text.replace(".", "0").replace("#", "1").split("|")
    return np.array([[int(digit) for digit in row] for row in rows])


def random_pair(shape, seed, density=0.15):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < density, rng.random(shape) < density / 2


def brute(pred, true, spacing, tolerance=1.0):
    """The definitions, word for word: erosion, then every distance between two surface voxels."""
    surfaces = []
    for mask in (pred, true):
        cross = ndimage.generate_binary_structure(mask.ndim, 1)
        eroded = ndimage.binary_erosion(mask, cross, border_value=0)
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


# --- surfaces ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift, spacing, nsd, hd95, centroid, assd",
    [
        ((1, 0, 0), ONE, 1, 1, 1, 0.357142857),
        ((1, 0, 0), (0.75, 0.75, 2.5), 1, 0.75, 0.75, 0.267857143),
        ((0, 0, 1), (0.75, 0.75, 2.5), 0.714285714, 2.5, 2.5, 0.767857143),
        ((1, 0, 0), (1.5, 1.5, 5), 0.642857143, 1.5, 1.5, 0.535714286),
    ],
)
def test_surface_scores_of_a_shifted_cube_match_the_specification(
    shift, spacing, nsd, hd95, centroid, assd
):
    true, pred = cube((3, 3, 3)), cube(np.add((3, 3, 3), shift))
    scores = metrics.surface_scores(pred, true, spacing)
    expected = {"nsd": nsd, "hd95_mm": hd95, "centroid_mm": centroid, "assd_mm": assd}
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    assert metrics.dice(pred, true) == 0.75


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
    true = np.zeros((20, 20, 20), dtype=bool)
    true[6:12, 4:10, 4:10] = True
    pred = true.copy()
    pred[corner] = True
    assert metrics.dice(pred, true) == pytest.approx(dice, abs=1e-9)
    assert metrics.hd95(pred, true, (1, 1, 3)) == pytest.approx(largest, abs=1e-9)
    assert metrics.hd95(true, pred, (1, 1, 3)) == pytest.approx(largest, abs=1e-9)
    assert metrics.hd95(pred, true, (1, 1, 3), kind="pooled") == pytest.approx(pooled, abs=1e-9)


@pytest.mark.parametrize(
    "shape, spacing", [((9, 11, 7), (0.7, 1.3, 2.9)), ((14, 9, 12), ONE), ((23, 31), (0.6, 1.7))]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_surface_scores_equal_brute_force(shape, spacing, order):
    for seed in range(4):
        pred, true = random_pair(shape, seed)
        if seed % 2:  # connected masks with an inside, beside the scattered ones
            pred, true = (ndimage.binary_dilation(m, iterations=2) for m in (pred & true, true))
        pred = np.asarray(pred, order=order)
        expected = brute(pred, true, spacing, 1.5)
        assert metrics.surface_scores(pred, true, spacing, 1.5) == pytest.approx(expected, abs=1e-9)
        assert metrics.nsd(true, pred, spacing, tolerance_mm=1.5) == pytest.approx(expected["nsd"])
        assert metrics.assd(pred, true, spacing) == pytest.approx(expected["assd_mm"])
        centroid = metrics.centroid_distance(pred, true, spacing)
        assert centroid == pytest.approx(expected["centroid_mm"])


def test_surface_counts_mask_voxels_at_the_border_of_the_image():
    full, centre = np.ones((5, 5), bool), drawn(".....|.....|..#..|.....|.....") > 0
    # The full image's surface is its frame: 16 voxels at distances 2, sqrt(5) and sqrt(8).
    assert metrics.hd95(full, centre, (1, 1)) == pytest.approx(math.sqrt(8))
    assert len(metrics.surface_points(cube((0, 0, 0)), np.array(ONE))) == 56


def test_surface_scores_of_drawn_2d_masks_are_known():
    pred, true = drawn("......|.##...|......"), drawn("......|.##.#.|......")
    scores = metrics.surface_scores(pred, true, (3.0, 0.5))
    assert scores["assd_mm"] == pytest.approx(1.0 / 5)  # 0 0 from P; 0 0, two columns of 0.5 from G
    assert scores["nsd"] == 1
    assert metrics.nsd(pred, true, (3.0, 0.5), tolerance_mm=0.9) == pytest.approx(4 / 5)
    assert scores["hd95_mm"] == pytest.approx(0.9)  # 95th percentile of 0 0 1
    assert scores["hd95_pooled_mm"] == pytest.approx(0.8)  # of 0 0 0 0 1
    assert scores["centroid_mm"] == pytest.approx((7 / 3 - 1.5) * 0.5)
    assert metrics.dice(pred, true) == pytest.approx(4 / 5)
    assert metrics.iou(pred, true) == pytest.approx(2 / 3)


def test_nsd_counts_a_distance_equal_to_the_tolerance_in_any_place_of_the_grid():
    for start in range(3, 40):  # index * 0.1 is rounded differently at each index
        pred, true = np.zeros((50, 3), bool), np.zeros((50, 3), bool)
        pred[start, 1], true[start + 3, 1] = True, True
        assert metrics.nsd(pred, true, (float(np.float32(0.1)), 1.0), tolerance_mm=0.3) == 1
        assert metrics.nsd(pred, true, (0.1, 1.0), tolerance_mm=0.29) == 0


def test_volume_is_in_millilitres():
    assert metrics.volume_ml(cube((0, 0, 0), 10), (1, 2, 0.5)) == 1.0
    assert metrics.volume_ml(np.ones((10, 10), bool), (2, 5)) == 1.0
    assert metrics.volume_ml(np.zeros((3, 3), bool), (2, 5)) == 0


@pytest.mark.parametrize("p, g, share", [(False, True, 0), (True, False, 0), (False, False, nan)])
def test_empty_masks_give_the_values_of_the_table(p, g, share):
    pred, true = np.full((4, 4, 4), p), np.full((4, 4, 4), g)
    scores = metrics.surface_scores(pred, true, ONE)
    for value in (metrics.dice(pred, true), metrics.iou(pred, true), scores.pop("nsd")):
        assert value == pytest.approx(share, nan_ok=True)
    assert set(scores) == set(metrics.DISTANCES) and np.isnan(list(scores.values())).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: metrics.dice(m, m[1:]), "true has"),
        (lambda m: metrics.iou(m[..., 1:], m), "true has"),
        (lambda m: metrics.dice(m * 2, m), "mask of 0 and 1"),
        (lambda m: metrics.assd(m, m * 0.5, ONE), "mask of 0 and 1"),
        (lambda m: metrics.hd95(m, m, (1, 1)), "3 positive numbers"),
        (lambda m: metrics.nsd(m, m, (1, 1, 0)), "3 positive numbers"),
        (lambda m: metrics.volume_ml(m, (1, 1, nan)), "3 positive numbers"),
        (lambda m: metrics.nsd(m, m, ONE, tolerance_mm=-1), "0 or more"),
        (lambda m: metrics.evaluate_case("a", m * 1.0, m * 1, ONE, {"x": 1}), "integer labels"),
        (lambda m: metrics.evaluate_case("a", m * 1, m[1:] * 1, ONE, {"x": 1}), "true has"),
        (lambda m: metrics.evaluate_case("a", m * 1, m * 1, ONE, {"x": []}), "no label value"),
        (lambda m: metrics.best_interval_dice([m * 2.0], [m * 1], 1), r"\[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(cube((3, 3, 3)))


def test_masks_of_zeros_and_ones_are_taken_as_boolean():
    a, b = cube((3, 3, 3)), cube((4, 3, 3))
    assert metrics.dice(a.astype(np.uint8), b.astype(np.float32)) == 0.75


# --- cases ---------------------------------------------------------------------------------------


def test_evaluate_case_gives_the_columns_in_order_and_the_values_of_the_single_metrics():
    rng = np.random.default_rng(0)
    pred = rng.integers(0, 4, (9, 8, 7), dtype=np.uint8)
    true = rng.integers(0, 4, (9, 8, 7), dtype=np.int16)
    spacing = (0.7, 1.3, 2.9)
    rows = metrics.evaluate_case("x", pred, true, spacing, {"a": 1, "c": 3}, tolerance_mm=0.8)
    header = "case,class,dice,iou,hd95_mm,hd95_pooled_mm,nsd,assd_mm,centroid_mm,volume_true_ml"
    assert [*rows[0]] == [*header.split(","), "volume_pred_ml", "share"]
    assert [row["share"] for row in rows] == [(true == value).mean() for value in (1, 3)]
    assert [(row["case"], row["class"]) for row in rows] == [("x", "a"), ("x", "c")]
    p, t = pred == 3, true == 3
    expected = {"dice": metrics.dice(p, t), "iou": metrics.iou(p, t), **brute(p, t, spacing, 0.8)}
    expected["volume_true_ml"] = metrics.volume_ml(t, spacing)
    expected["volume_pred_ml"] = metrics.volume_ml(p, spacing)
    assert {k: rows[1][k] for k in expected} == pytest.approx(expected)


def test_evaluate_case_scores_unions_that_lie_inside_each_other():
    true = np.array([[[0, 0, 2, 2, 1, 4, 4, 2]]], dtype=np.uint8)  # one row of eight voxels
    pred = np.array([[[0, 2, 2, 1, 4, 4, 0, 0]]], dtype=np.uint8)
    regions = {"whole": [1, 2, 4], "core": (1, 4), "enhancing": np.int64(4), "rest": [0, 2]}
    rows = metrics.evaluate_case("x", pred, true, (1.0, 1.0, 2.0), regions)
    # Voxels of P, of G, of both: whole 5 6 4; core 3 3 2; enhancing 2 2 1; rest 5 5 4.
    dices = [2 * 4 / 11, 2 * 2 / 6, 2 * 1 / 4, 2 * 4 / 10]
    assert [row["dice"] for row in rows] == pytest.approx(dices)
    assert [row["volume_pred_ml"] * 500 for row in rows] == pytest.approx([5, 3, 2, 5])
    assert [row["volume_true_ml"] * 500 for row in rows] == pytest.approx([6, 3, 2, 5])
    # P 1..5 and G 2..7: P's 1 is 2 mm off, G's 6 and 7 are 2 and 4 mm off.
    assert rows[0]["assd_mm"] == pytest.approx((2 + 2 + 4) / 11)
    assert rows[1]["centroid_mm"] == pytest.approx(2.0)


def test_evaluate_case_does_not_score_ignored_voxels():
    true = np.array([[1, 1, 0, 9, 9, 9]])
    pred = np.array([[1, 0, 0, 1, 1, 0]])
    (row,) = metrics.evaluate_case("x", pred, true, (1, 1), {"a": 1}, ignore=9)
    assert row["dice"] == pytest.approx(2 / 3) and row["volume_pred_ml"] == pytest.approx(0.001)


def test_best_interval_equals_a_search_over_all_rules():
    rng = np.random.default_rng(0)
    images = [rng.random((6, 5, 4)) for _ in range(3)]
    labels = [rng.integers(0, 3, (6, 5, 4)) for _ in range(2)] + [np.zeros((6, 5, 4), int)]
    best = {"threshold": 0.0, "interval": 0.0}
    for low, high in combinations_with_replacement(range(9), 2):
        for inside in (True, False):
            preds = [((i >= low / 8) & (i < high / 8)) == inside for i in images]
            dices = [metrics.dice(p, label == 2) for p, label in zip(preds, labels, strict=True)]
            mean = float(np.nanmean(dices))
            best["interval"] = max(best["interval"], mean)
            if low == 0 or high == 8:
                best["threshold"] = max(best["threshold"], mean)
    assert best["threshold"] < best["interval"]
    assert metrics.best_interval_dice(images, labels, 2, bins=8) == pytest.approx(best)
    assert np.isnan(list(metrics.best_interval_dice(images, labels, 7).values())).all()


# --- instances -----------------------------------------------------------------------------------

TRUE = drawn("11..22..|11..22..|....22..|........|333.....|333.....")
PRED = drawn("555..99.|555..99.|.....99.|7.......|7.44...2|7.44...2")
TWO, WHOLE = drawn("11.22|11.22"), drawn("33333|33333")


def brute_aji(pred, true):
    """Kumar's rule, object by object."""
    used, c, u = set(), 0, 0
    for g in [i for i in np.unique(true) if i]:
        touching = [p for p in np.unique(pred[true == g]) if p]
        if not touching:
            u += (true == g).sum()
            continue
        both = [((true == g) & (pred == p)).sum() for p in touching]
        either = [((true == g) | (pred == p)).sum() for p in touching]
        best = max(range(len(touching)), key=lambda i: (both[i] / either[i], -i))
        c, u = c + both[best], u + either[best]
        used.add(touching[best])
    return c / (u + sum((pred == p).sum() for p in np.unique(pred) if p and p not in used))


def brute_object_dice(pred, true):
    """Half the sum of both directions, object by object."""
    total = 0.0
    for a, b in ((pred, true), (true, pred)):
        for i in [i for i in np.unique(a) if i]:
            ids = [j for j in np.unique(b[a == i]) if j]
            if ids:
                j = max(ids, key=lambda j: (((a == i) & (b == j)).sum(), -j))
                score = 2 * ((a == i) & (b == j)).sum() / ((a == i).sum() + (b == j).sum())
                total += (a == i).sum() / (a > 0).sum() * score
    return total / 2


@pytest.mark.parametrize("seed", range(6))
def test_object_measures_equal_their_definitions(seed):
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(2):  # patches with ids in any order and with gaps
        coarse = rng.choice([0, 0, 0, *rng.integers(1, 5000, 12)], (8, 10))
        maps.append(np.roll(np.kron(coarse, np.ones((5, 5), int)), rng.integers(0, 5, 2), (0, 1)))
    assert metrics.aji(*maps) == pytest.approx(brute_aji(*maps), abs=1e-12)
    assert metrics.object_dice(*maps) == pytest.approx(brute_object_dice(*maps), abs=1e-12)


def test_object_measures_of_the_hand_example_have_the_specified_values():
    assert metrics.aji_binary(PRED, TRUE) == pytest.approx(0.423077, abs=1e-6)
    assert metrics.aji(PRED, TRUE) == pytest.approx(9 / 28, abs=1e-12)
    assert metrics.object_dice(PRED, TRUE) == pytest.approx(0.524306, abs=1e-6)
    swapped = np.where(PRED == 7, 4, np.where(PRED == 4, 7, PRED))  # the tie goes to the smaller id
    assert metrics.object_dice(swapped, TRUE) != pytest.approx(0.524306, abs=1e-3)


def test_object_measures_of_merged_and_split_objects_have_the_specified_values():
    assert metrics.aji(WHOLE, TWO) == pytest.approx(0.4)
    assert metrics.aji_binary(WHOLE, TWO) == pytest.approx(0.8)
    assert metrics.object_dice(WHOLE, TWO) == pytest.approx(0.571429, abs=1e-6)
    assert metrics.aji(TWO, WHOLE) == pytest.approx(0.285714, abs=1e-6)


def test_aji_picks_the_partner_by_iou_and_object_dice_by_pixels():
    true, pred = drawn("111111.........."), drawn("2233333333333333")  # 2: 2 of 6; 3: 4 of 16
    assert metrics.aji(pred, true) == pytest.approx(2 / (6 + 14))
    expected = (2 / 16 * 4 / 8 + 14 / 16 * 8 / 20 + 8 / 20) / 2  # 2 and 3 with 1, 1 with 3
    assert metrics.object_dice(pred, true) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [metrics.aji, metrics.object_dice, metrics.aji_binary])
def test_object_measures_of_empty_and_equal_maps(measure):
    empty = np.zeros_like(TRUE)
    other = np.where(TRUE > 0, 4000 - 1000 * TRUE, 0).astype(np.uint16)
    assert measure(empty, TRUE) == 0 and measure(TRUE, empty) == 0
    assert np.isnan(measure(empty, empty)) and measure(other, TRUE.astype(np.int32)) == 1


@pytest.mark.parametrize("wrong", [TRUE - 1, TRUE.astype(float), TRUE << 31])
def test_aji_refuses_what_is_no_instance_map(wrong):
    with pytest.raises(ValueError, match="expected a map of object ids"):
        metrics.aji(wrong, TRUE)


def test_aji_of_1000_nuclei_in_a_million_pixels_takes_less_than_300_ms():
    rows, columns = np.indices((1000, 1000)) // 31  # 1024 squares
    inside = (np.indices((1000, 1000)) % 31 < 24).all(0)
    true = np.where(inside, rows * 33 + columns + 1, 0).astype(np.int32)
    pred = np.roll(true, (5, 7), (0, 1))
    times = []
    for _ in range(5):
        begin = time.process_time()  # of this process: others may share the core
        metrics.aji(pred, true)
        times.append(time.process_time() - begin)
    assert min(times) < 0.3


def test_components_have_four_neighbours_and_small_ones_become_background():
    assert metrics.components(drawn("11..|..1.|..11")).tolist() == drawn("11..|..2.|..22").tolist()
    pieces = metrics.components(drawn("1.11.1|1.11.."), min_pixels=2)
    assert pieces.tolist() == drawn("1.22..|1.22..").tolist()
    pieces = metrics.components(drawn("1.11.1|1.11.."), min_pixels=3)
    assert pieces.tolist() == drawn("..22..|..22..").tolist()  # the other keeps its number


# --- classes over many images --------------------------------------------------------------------

TRUTH, ANSWER = np.array([0, 0, 1, 1, 255, 2]), np.array([0, 1, 1, 1, 2, 2])


def test_miou_has_the_specified_values():
    assert metrics.miou(metrics.class_counts(ANSWER, TRUTH, 4)) == pytest.approx(0.722222, abs=1e-6)
    counts = metrics.class_counts(ANSWER, TRUTH, 4, drop=False)  # as public code
    assert metrics.miou(counts, absent=0) == pytest.approx(0.416667, abs=1e-6)


def test_miou_sums_over_images_before_it_divides():
    a = metrics.class_counts(np.array([1, 1, 1, 0]), np.array([1, 1, 1, 1]), 2)
    b = metrics.class_counts(np.array([0, 0]), np.array([1, 0]), 2)
    assert metrics.miou(a + b) == pytest.approx((1 / 3 + 3 / 5) / 2)


def test_class_counts_may_ignore_a_value_that_is_a_class():
    counts = metrics.class_counts(np.array([0, 1, 0]), np.array([0, 1, 1]), 2, ignore=0)
    assert counts.tolist() == [[0, 1], [1, 2]]


def test_miou_of_nothing_is_nan():
    assert np.isnan(metrics.miou(metrics.class_counts(np.zeros(3, int), np.full(3, 255), 2)))


@pytest.mark.parametrize("pred, true", [([0, 4], [0, 1]), ([0, 1], [0, 7]), ([0.0, 1.0], [0, 1])])
def test_class_counts_refuse_what_is_no_class(pred, true):
    with pytest.raises(ValueError, match="expected integers of 0 to 3"):
        metrics.class_counts(np.array(pred), np.array(true), 4)


def test_iou_from_dice_has_the_specified_values():
    assert metrics.iou_from_dice(0.9195) == pytest.approx(0.850995, abs=1e-6)
    assert metrics.iou_from_dice(0.8101) == pytest.approx(0.680814, abs=1e-6)


def test_metrics_and_tables_need_no_torch():
    code = "import sys, common.metrics, common.score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
