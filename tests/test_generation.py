"""Metrics of generated images: the specification's values, closed forms, definitions point by point, refusals."""

import time

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from common import InputError
from common.old import metrics

SQUARE = np.array([(0, 0), (2, 0), (0, 2), (2, 2)], float)
REAL, FAKE = (np.array(v, float)[:, None] for v in ([0, 1, 2, 3, 4], [0.5, 1.5, 2.5, 20, 21]))
ONE = np.zeros(1), np.ones((1, 1))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# --- Frechet distance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (ONE, (np.ones(1), np.full((1, 1), 4.0)), 2),
        ((np.zeros(3), np.diag([1.0, 4, 9])), (np.array([1, 2, 2]), np.diag([4.0, 4, 1])), 14),
        (
            (np.zeros(2), np.array([[2, 1], [1, 2]])),
            (np.zeros(2), np.diag([3.0, 1])),
            8 - 2 * np.sqrt(14),
        ),
    ],
    ids=["one dimension", "diagonal", "do not commute"],
)
def test_frechet_from_moments_matches_the_specification(a, b, expected):
    assert metrics.frechet_from_moments(*a, *b) == pytest.approx(expected, abs=1e-12)
    assert metrics.frechet_from_moments(*b, *a) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (SQUARE, SQUARE + (3, 4), 25),
        (SQUARE, SQUARE * 2, 14 / 3),
        (np.eye(5)[:3], np.eye(5)[[3, 4, 0]], 16 / 9),
        (SQUARE, SQUARE[::-1], 0),
    ],
    ids=["shifted", "doubled", "fewer images than features", "the same"],
)
def test_frechet_distance_matches_the_specification(a, b, expected):
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sizes", [(50, 70), (50, 7), (7, 5)], ids=str)
def test_frechet_distance_equals_that_of_its_moments_for_any_number_of_images(sizes):
    a, b = normal(0, sizes[0], 12) @ normal(1, 12, 12), normal(2, sizes[1], 12) + 0.3
    moments = [part for x in (a, b) for part in (x.mean(axis=0), np.cov(x.T))]
    assert metrics.frechet_distance(a, b) == pytest.approx(
        metrics.frechet_from_moments(*moments), rel=1e-6
    )


def test_frechet_distance_of_a_singular_set_to_its_shifted_self_is_exact():
    a = 1e3 * normal(0, 40, 200)
    assert metrics.frechet_distance(a, a + 1) == pytest.approx(
        200, abs=1e-3
    )  # by roots of eigenvalues 10 and more off


def test_frechet_distance_of_float32_features_is_computed_in_float64():
    a, b = (normal(seed, 100, 4).astype(np.float32) + 1000 for seed in (0, 1))
    assert metrics.frechet_distance(a, b) == metrics.frechet_distance(
        a.astype(float), b.astype(float)
    )


def test_frechet_floor_of_200_images_with_64_features_is_eleven():
    floor = [
        metrics.frechet_distance(normal(2 * s, 200, 64), normal(2 * s + 1, 200, 64))
        for s in range(5)
    ]
    assert np.mean(floor) == pytest.approx(11.1, abs=0.3)


def test_frechet_distance_of_2000_images_takes_under_two_seconds():
    a, b = normal(0, 2000, 768), normal(1, 2000, 768)
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process: others may share the core
        assert metrics.frechet_distance(a, b) == pytest.approx(149, abs=2)
        times.append(time.process_time() - start)
    assert min(times) < 2


@pytest.mark.parametrize(
    "a, b, parts",
    [
        (SQUARE[:1], SQUARE, ("a has shape (1, 2)", "at least 2", "make more images")),
        (SQUARE, np.zeros((4, 3)), ("b has shape (4, 3)", "one D", "the same way")),
        (SQUARE[:, 0], SQUARE[:, 0], ("a has shape (4,)", "[N, D]")),
        (
            SQUARE,
            np.where(SQUARE > 1, np.nan, SQUARE),
            ("3 of 4 rows of b", "not finite", "look at"),
        ),
    ],
    ids=["one image", "widths", "no features", "nan"],
)
def test_frechet_distance_refuses_what_it_cannot_compare(a, b, parts):
    with pytest.raises(InputError) as error:
        metrics.frechet_distance(a, b)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_frechet_from_moments_refuses_a_covariance_of_another_size():
    with pytest.raises(InputError, match=r"expected \[D, D\]"):
        metrics.frechet_from_moments(np.zeros(3), np.zeros((2, 3)), np.zeros(3), np.eye(3))


# --- precision and recall --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, expected", [(3, (0.6, 1.0, 0.75)), (1, (0.6, 0.8, 0.6857142857))])
def test_precision_recall_matches_the_specification(k, expected):
    result = metrics.precision_recall(REAL, FAKE, k)
    assert [result[key] for key in ("precision", "recall", "f1")] == pytest.approx(
        expected, abs=1e-9
    )
    assert result["zero_radii"] == 0


def test_precision_recall_of_two_sets_from_one_distribution_is_not_one():
    results = [
        metrics.precision_recall(normal(2 * s, 500, 16), normal(2 * s + 1, 500, 16))
        for s in range(4)
    ]
    for key in ("precision", "recall"):
        assert np.mean([r[key] for r in results]) == pytest.approx(0.77, abs=0.02)


def test_precision_recall_in_blocks_equals_the_definition():
    real, fake = normal(0, 600, 3), 0.6 * normal(1, 300, 3) + 0.5  # more than one block each
    radius = [np.sort(cdist(x, x), axis=1)[:, 3] for x in (real, fake)]
    between = cdist(real, fake)
    result = metrics.precision_recall(real, fake)
    assert result["precision"] == (between <= radius[0][:, None]).any(axis=0).mean() < 1
    assert result["recall"] == (between <= radius[1]).any(axis=1).mean() < 1


def test_precision_recall_counts_the_edge_of_a_ball_as_inside():
    result = metrics.precision_recall(
        np.array([[0.0], [1]]), np.array([[2.0], [5]]), 1
    )  # radii 1 and 3
    assert (result["precision"], result["recall"]) == (0.5, 1)


def test_precision_recall_of_sets_far_apart_is_zero_with_its_f1():
    result = metrics.precision_recall(REAL, REAL + 1000)
    assert (result["precision"], result["recall"], result["f1"]) == (0, 0, 0)


def test_precision_recall_counts_the_copies_whose_radius_is_zero():
    copies = np.concatenate((normal(0, 20, 768), normal(1, 1, 768).repeat(4, axis=0)))
    assert metrics.precision_recall(normal(2, 20, 768), copies)["zero_radii"] == 4
    assert metrics.precision_recall(copies, normal(2, 20, 768))["zero_radii"] == 4
    assert (
        metrics.precision_recall(copies[:-1], normal(2, 20, 768))["zero_radii"] == 0
    )  # three alike: 3rd is another


def test_precision_recall_refuses_fewer_images_than_neighbours():
    with pytest.raises(InputError, match=r"fake has shape \(3, 1\).*at least 4"):
        metrics.precision_recall(REAL, FAKE[:3])
    with pytest.raises(InputError, match="k is 0; expected 1"):
        metrics.precision_recall(REAL, FAKE, 0)


# --- memorisation ----------------------------------------------------------------------------------------------------


def test_memorisation_is_the_ratio_of_the_median_distances_to_the_nearest_training_image():
    train, held, made = (
        np.array(v, float)[:, None] for v in ([0, 10, 20], [2, 14, 100], [1, 10.5, 30])
    )
    assert metrics.memorisation(made, train, held) == {"ratio": 0.25, "generated": 1.0, "held": 4.0}


def test_memorisation_is_near_one_for_new_images_and_near_zero_for_copies():
    train, held, new = (normal(seed, 300, 32) for seed in range(3))
    assert metrics.memorisation(new, train, held)["ratio"] == pytest.approx(1, abs=0.03)
    assert metrics.memorisation(train + 0.01 * new, train, held)["ratio"] < 0.02


def test_memorisation_refuses_held_out_images_that_were_trained_on():
    train = normal(0, 20, 4)
    with pytest.raises(
        InputError, match=r"copies of training images; expected .*; check the split"
    ):
        metrics.memorisation(normal(1, 20, 4), train, train[:10])
