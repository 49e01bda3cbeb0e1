"""Object metrics and mean IoU: the specification's hand examples, the definitions word for word, empty maps, time."""

import time

import numpy as np
import pytest
from PIL import Image

from common.old import metrics


def drawn(text: str) -> np.ndarray:
    """Rows of digits, . = 0."""
    return np.array([[int(c) for c in row.replace(".", "0")] for row in text.split("|")])


TRUE = drawn("11..22..|11..22..|....22..|........|333.....|333.....")
PRED = drawn("555..99.|555..99.|.....99.|7.......|7.44...2|7.44...2")
TWO, ONE = drawn("11.22|11.22"), drawn("33333|33333")


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


def random_maps(seed, shape=(40, 50), ids=12):
    """Two maps of patches with ids in any order and with gaps."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(2):
        coarse = rng.choice([0, 0, 0, *rng.integers(1, 5000, ids)], (shape[0] // 5, shape[1] // 5))
        maps.append(np.roll(np.kron(coarse, np.ones((5, 5), int)), rng.integers(0, 5, 2), (0, 1)))
    return maps


def test_hand_example_has_the_specified_values():
    scores = metrics.object_scores(PRED, TRUE)
    assert scores["dice"] == pytest.approx(0.594595, abs=1e-6)
    assert scores["iou"] == metrics.aji_binary(PRED, TRUE) == pytest.approx(0.423077, abs=1e-6)
    assert scores["aji"] == pytest.approx(9 / 28, abs=1e-12)


def test_object_dice_of_the_hand_example_gives_the_tie_to_the_smaller_id():
    assert metrics.object_dice(PRED, TRUE) == pytest.approx(0.524306, abs=1e-6)
    swapped = PRED.copy()
    swapped[PRED == 7], swapped[PRED == 4] = 4, 7
    assert metrics.object_dice(swapped, TRUE) != pytest.approx(0.524306, abs=1e-3)


def test_merged_objects_have_the_specified_values():
    scores = metrics.object_scores(ONE, TWO)
    assert scores["aji"] == pytest.approx(0.4) and scores["iou"] == pytest.approx(0.8)
    assert scores["object_dice"] == pytest.approx(0.571429, abs=1e-6)


def test_aji_of_a_split_object_has_the_specified_value():
    assert metrics.aji(TWO, ONE) == pytest.approx(0.285714, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_aji_equals_the_definition(seed):
    pred, true = random_maps(seed)
    assert metrics.aji(pred, true) == pytest.approx(brute_aji(pred, true), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_object_dice_equals_the_definition(seed):
    pred, true = random_maps(seed)
    assert metrics.object_dice(pred, true) == pytest.approx(
        brute_object_dice(pred, true), abs=1e-12
    )


def test_aji_takes_the_smallest_id_of_partners_with_equal_iou():
    true = drawn("1111....")
    assert metrics.aji(drawn("3.444444"), true) == pytest.approx(1 / (4 + 6))  # 1/4 and 2/8
    assert metrics.aji(drawn("4.333333"), true) == pytest.approx(2 / (8 + 1))


def test_aji_lets_one_prediction_serve_two_objects():
    assert metrics.aji(drawn("3333"), drawn("1122")) == pytest.approx(4 / 8)


TRUE_LONG, PRED_LONG = (
    drawn("111111.........."),
    drawn("2233333333333333"),
)  # 2: 2 of 6 pixels; 3: 4 of 16


def test_aji_picks_the_partner_by_iou():
    assert metrics.aji(PRED_LONG, TRUE_LONG) == pytest.approx(2 / (6 + 14))


def test_object_dice_picks_the_partner_by_pixels():
    expected = (2 / 16 * 4 / 8 + 14 / 16 * 8 / 20 + 8 / 20) / 2  # 2 and 3 with 1, 1 with 3
    assert metrics.object_dice(PRED_LONG, TRUE_LONG) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [metrics.aji, metrics.object_dice, metrics.aji_binary])
def test_metric_of_empty_maps(metric):
    empty = np.zeros_like(TRUE)
    assert metric(empty, TRUE) == 0 and metric(TRUE, empty) == 0 and np.isnan(metric(empty, empty))


@pytest.mark.parametrize("metric", [metrics.aji, metrics.object_dice])
def test_metric_of_the_same_map_is_one_whatever_the_ids_are(metric):
    other = np.where(TRUE > 0, 4000 - 1000 * TRUE, 0).astype(np.uint16)
    assert metric(TRUE, TRUE) == metric(other, TRUE.astype(np.int32)) == 1


def test_object_metrics_of_binary_maps_are_the_plain_ones():
    p, t = (PRED > 0).astype(np.uint8), (TRUE > 0).astype(np.uint8)
    assert metrics.aji(p, t) == pytest.approx(metrics.iou(p, t)) == metrics.aji_binary(PRED, TRUE)
    assert metrics.object_dice(p, t) == pytest.approx(metrics.dice(p, t))


@pytest.mark.parametrize("wrong", [TRUE - 1, TRUE.astype(float), TRUE.astype(np.int64) << 31])
def test_aji_refuses_what_is_no_instance_map(wrong):
    with pytest.raises(ValueError, match="expected a map of object ids"):
        metrics.aji(wrong, TRUE)


def test_aji_refuses_unequal_shapes():
    with pytest.raises(ValueError, match="expected the same grid"):
        metrics.aji(TRUE[1:], TRUE)


def test_aji_of_1000_nuclei_in_a_million_pixels_takes_less_than_300_ms():
    rows, columns = np.indices((1000, 1000)) // 31  # 1024 squares
    inside = (np.indices((1000, 1000)) % 31 < 24).all(0)
    true = np.where(inside, rows * 33 + columns + 1, 0).astype(np.int32)
    pred = np.roll(true, (5, 7), (0, 1))
    assert len(np.unique(true)) > 1000
    times = []
    for _ in range(5):
        begin = time.process_time()  # of this process: others may share the core
        metrics.aji(pred, true)
        times.append(time.process_time() - begin)
    assert min(times) < 0.3


def test_components_have_four_neighbours():
    assert metrics.components(drawn("11..|..1.|..11")).tolist() == drawn("11..|..2.|..22").tolist()


def test_components_below_a_size_become_background():
    assert (
        metrics.components(drawn("11.11|11..1"), min_pixels=4).tolist()
        == drawn("11...|11...").tolist()
    )


def test_iou_from_dice_has_the_specified_values():
    assert metrics.iou_from_dice(0.9195) == pytest.approx(0.850995, abs=1e-6)
    assert metrics.iou_from_dice(0.8101) == pytest.approx(0.680814, abs=1e-6)


def test_iou_from_dice_of_a_mean_is_below_the_mean_iou():
    values = np.array([0.2, 0.9])
    assert (
        metrics.iou_from_dice(values.mean())
        < np.mean([metrics.iou_from_dice(v) for v in values]) - 0.05
    )


TRUTH, ANSWER = np.array([0, 0, 1, 1, 255, 2]), np.array([0, 1, 1, 1, 2, 2])


def test_miou_leaves_out_ignored_pixels_and_absent_classes():
    assert metrics.miou(metrics.class_counts(ANSWER, TRUTH, 4)) == pytest.approx(0.722222, abs=1e-6)


def test_miou_as_public_code_counts_both():
    counts = metrics.class_counts(ANSWER, TRUTH, 4, drop=False)
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


@pytest.mark.parametrize(
    ("pred", "true"), [([0, 4], [0, 1]), ([0, 1], [0, 7]), ([0.0, 1.0], [0, 1])]
)
def test_class_counts_refuse_what_is_no_class(pred, true):
    with pytest.raises(ValueError, match="expected integers of 0 to 3"):
        metrics.class_counts(np.array(pred), np.array(true), 4)


def test_score_prints_object_metrics_of_instance_maps(tmp_path, capsys):
    for folder, array in (("pred", PRED), ("true", TRUE)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array.astype(np.uint16) * 300).save(
            tmp_path / folder / "a.png"
        )  # ids above 255
    flags = [
        "score",
        "--pred",
        str(tmp_path / "pred"),
        "--true",
        str(tmp_path / "true"),
        "--instances",
    ]
    assert metrics.main(flags) == 0
    out = capsys.readouterr().out
    assert "0.3214" in out and "0.5243" in out and "0.5946" in out
    assert [w for w in out.splitlines()[-2].split() if w][:3] == ["a", "3", "5"]
