"""Measures of generated images: the specification's values, closed forms, definitions, refusals."""

import time

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from common import InputError
from results.ddpm_score import (
    frechet_distance,
    frechet_from_moments,
    memorisation,
    precision_recall,
)

SQUARE = np.array([(0, 0), (2, 0), (0, 2), (2, 2)], float)
REAL, FAKE = (np.array(v, float)[:, None] for v in ([0, 1, 2, 3, 4], [0.5, 1.5, 2.5, 20, 21]))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(
    "mean_a, cov_a, mean_b, cov_b, expected",
    [
        ([0], [[1]], [1], [[4]], 2),
        ([0, 0, 0], np.diag([1, 4, 9]), [1, 2, 2], np.diag([4, 4, 1]), 14),
        ([0, 0], [[2, 1], [1, 2]], [0, 0], np.diag([3, 1]), 8 - 2 * 14**0.5),  # do not commute
    ],
)
def test_frechet_from_moments_matches_the_specification(mean_a, cov_a, mean_b, cov_b, expected):
    a, b = (np.array(mean_a), np.array(cov_a)), (np.array(mean_b), np.array(cov_b))
    assert frechet_from_moments(*a, *b) == pytest.approx(expected, abs=1e-12)
    assert frechet_from_moments(*b, *a) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (SQUARE, SQUARE + (3, 4), 25),
        (SQUARE, SQUARE * 2, 14 / 3),
        (np.eye(5)[:3], np.eye(5)[[3, 4, 0]], 16 / 9),  # fewer images than features
        (SQUARE, SQUARE[::-1], 0),
    ],
)
def test_frechet_distance_matches_the_specification(a, b, expected):
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sizes", [(50, 70), (50, 7), (7, 5)], ids=str)
def test_frechet_distance_equals_that_of_its_moments_for_any_number_of_images(sizes):
    a, b = normal(0, sizes[0], 12) @ normal(1, 12, 12), normal(2, sizes[1], 12) + 0.3
    moments = [part for x in (a, b) for part in (x.mean(axis=0), np.cov(x.T))]
    assert frechet_distance(a, b) == pytest.approx(frechet_from_moments(*moments), rel=1e-6)


def test_frechet_distance_of_a_singular_set_to_its_shifted_self_is_exact():
    a = 1e3 * normal(0, 40, 200)  # by roots of eigenvalues it would be 10 and more off
    assert frechet_distance(a, a + 1) == pytest.approx(200, abs=1e-3)


def test_frechet_distance_of_2000_images_takes_under_half_a_second():
    a, b = normal(0, 2000, 768), normal(1, 2000, 768)
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process: others may share the core
        assert frechet_distance(a, b) == pytest.approx(149, abs=2)  # about D^2 / 2N is the floor
        times.append(time.process_time() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "a, b, message",
    [
        (SQUARE[:1], SQUARE, r"a has shape \(1, 2\).*at least 2"),
        (SQUARE, np.zeros((4, 3)), r"b has shape \(4, 3\).*one D"),
        (SQUARE[:, 0], SQUARE[:, 0], r"a has shape \(4,\).*\[N, D\]"),
        (SQUARE, np.where(SQUARE > 1, np.nan, SQUARE), "3 of 4 rows of b are not finite"),
    ],
)
def test_frechet_distance_refuses_what_it_cannot_compare(a, b, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize("k, expected", [(3, (0.6, 1.0, 0.75)), (1, (0.6, 0.8, 0.6857142857))])
def test_precision_recall_matches_the_specification(k, expected):
    result = precision_recall(REAL, FAKE, k)
    assert [*result.values()] == pytest.approx([*expected, 0], abs=1e-9)


def test_precision_recall_in_blocks_equals_the_definition():
    real, fake = normal(0, 600, 3), 0.6 * normal(1, 300, 3) + 0.5  # more than one block each
    radius = [np.sort(cdist(x, x), axis=1)[:, 3] for x in (real, fake)]
    between = cdist(real, fake)
    result = precision_recall(real, fake)
    assert result["precision"] == (between <= radius[0][:, None]).any(axis=0).mean() < 1
    assert result["recall"] == (between <= radius[1]).any(axis=1).mean() < 1


def test_precision_recall_counts_the_edge_of_a_ball_as_inside():
    result = precision_recall(np.array([[0.0], [1]]), np.array([[2.0], [5]]), 1)  # radii 1 and 3
    assert (result["precision"], result["recall"]) == (0.5, 1)
    assert precision_recall(REAL, REAL + 1000)["f1"] == 0


def test_precision_recall_counts_the_copies_whose_radius_is_zero():
    copies = np.concatenate((normal(0, 20, 768), normal(1, 1, 768).repeat(4, axis=0)))
    assert precision_recall(normal(2, 20, 768), copies)["zero_radii"] == 4
    assert precision_recall(normal(2, 20, 768), copies[:-1])["zero_radii"] == 0  # of three alike


def test_precision_recall_refuses_fewer_images_than_neighbours():
    with pytest.raises(InputError, match=r"fake has shape \(3, 1\).*at least 4"):
        precision_recall(REAL, FAKE[:3])
    with pytest.raises(InputError, match="k is 0; expected 1"):
        precision_recall(REAL, FAKE, 0)


def test_memorisation_is_the_ratio_of_the_median_distances_to_the_nearest_training_image():
    sets = ([1, 10.5, 30], [0, 10, 20], [2, 14, 100])  # made, trained on, held out
    result = memorisation(*(np.array(v, float)[:, None] for v in sets))
    assert result == {"ratio": 0.25, "generated": 1.0, "held": 4.0}


def test_memorisation_refuses_held_out_images_that_were_trained_on():
    train = normal(0, 20, 4)
    with pytest.raises(InputError, match="copies of training images"):
        memorisation(normal(1, 20, 4), train, train[:10])
