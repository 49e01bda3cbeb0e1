"""The phantoms: a function of (seed, index), all classes in each, and not solvable by intensity."""

import numpy as np
import pytest

from common.old.loaders import phantom


def dice(a, b):
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


def intensity_dice(cases, k, bins=128):
    """Mean Dice over cases of the best threshold (either side) and of the best interval for class k, truth known."""
    table = []
    for image, label in cases:
        level = np.minimum((image[0] * bins).astype(int), bins - 1)
        truth = label == k
        hits = np.r_[0, np.bincount(level[truth], minlength=bins).cumsum()]
        size = np.r_[0, np.bincount(level.ravel(), minlength=bins).cumsum()]
        overlap, chosen = hits[None] - hits[:, None], size[None] - size[:, None]  # [from, to]
        table.append(np.where(chosen >= 0, 2 * overlap / np.maximum(chosen + truth.sum(), 1), 0))
    mean = np.mean(table, axis=0)
    own = [t.max() for t in table]  # each case with its own best interval
    return max(mean[0].max(), mean[:, -1].max()), mean.max(), own


def test_phantom_depends_on_seed_and_index_alone():
    image, label = phantom(3, 5)
    phantom(3, 6)
    np.random.seed(0)  # noqa: NPY002  (the global generator must not matter)
    again, label_again = phantom(3, 5)
    assert np.array_equal(image, again) and np.array_equal(label, label_again)
    for other in (phantom(3, 6), phantom(4, 5), phantom(5, 3)):
        assert not np.array_equal(image, other[0]) and not np.array_equal(label, other[1])


def test_phantom_does_not_touch_the_global_generator():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    phantom(0, 0, shape=(16, 16))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    "shape, spacing, channels, classes",
    [
        ((48, 48, 32), (1.0, 1.0, 1.5), 1, 2),
        ((64, 48), (1.0, 1.0), 1, 4),
        ((64, 64), (0.7, 0.7), 3, 13),
        ((32, 40, 16), (0.8, 0.8, 3.0), 4, 3),
        ((16, 16, 16), (1.0, 1.0, 1.0), 1, 13),
        ((16, 16), (2.0, 1.0), 1, 13),
        ((17, 31, 23), (0.2, 0.3, 0.5), 2, 1),
        ((96, 96, 16), (1.0, 1.0, 5.0), 1, 5),
    ],
)
def test_phantom_types_ranges_and_all_classes(shape, spacing, channels, classes):
    for index in range(6):
        image, label = phantom(1, index, shape, spacing, channels, classes)
        assert image.shape == (channels, *shape) and image.dtype == np.float32
        assert label.shape == tuple(shape) and label.dtype == np.uint8
        assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
        assert (
            np.bincount(label.ravel(), minlength=classes + 1) > 0
        ).all() and label.max() == classes
        assert (
            np.mean((image == 0) | (image == 1)) < 0.04
        )  # little is clipped, even of 256 pixels with 13 classes


def test_phantom_every_class_has_a_sensible_size_in_50_phantoms():
    share = np.array(
        [np.bincount(phantom(7, i)[1].ravel(), minlength=3) / (48 * 48 * 32) for i in range(50)]
    )
    assert share[:, 1:].min() > 0.02 and share[:, 1:].max() < 0.15 and share[:, 0].min() > 0.75


def test_phantom_channels_show_the_same_anatomy_differently():
    image, label = phantom(0, 2, channels=3)
    inside = label == 1
    assert np.corrcoef(image[0][inside], image[1][inside])[0, 1] > 0.7  # same lamellae
    assert len({round(float(c[inside].mean()), 3) for c in image}) == 3
    assert not np.array_equal(image[0], image[1])


def test_phantom_keeps_its_extent_in_mm_at_another_spacing():
    fine = phantom(2, 1, (48, 48, 48), (1.0, 1.0, 1.0))[1]
    flat = phantom(2, 1, (48, 48, 16), (1.0, 1.0, 3.0))[1]
    for k in (1, 2):
        assert dice(fine[:, :, 1::3] == k, flat == k) > 0.85
        # An organ is about as thick as wide in mm, so three times flatter in voxels.
        x, _, z = (np.ptp(axis) + 1 for axis in np.nonzero(flat == k))
        assert 0.5 < 3 * z / x < 2


def test_phantom_classes_have_a_usual_place():
    centres = np.array(
        [
            [np.mean(np.nonzero(label == k), axis=1) / label.shape for k in (1, 2)]
            for label in (phantom(0, i)[1] for i in range(20))
        ]
    )  # [case, class, axis]
    assert (centres[:, 0, 0] < centres[:, 1, 0]).mean() > 0.9
    assert centres.std(0).min() > 0.02  # but not a fixed one


@pytest.mark.parametrize(
    "classes, shape", [(1, (48, 48, 32)), (2, (48, 48, 32)), (4, (48, 48, 32)), (2, (64, 64))]
)
def test_phantom_is_not_solved_by_intensity(classes, shape):
    cases = [phantom(0, i, shape, classes=classes) for i in range(12)]
    for k in range(1, classes + 1):
        threshold, interval, own = intensity_dice(cases, k)
        assert threshold < 0.35 and interval < 0.35, (k, threshold, interval)
        assert np.mean(own) < 0.5 and max(own) < 0.75, (k, own)


def test_phantom_is_solved_by_the_direction_of_its_lamellae():
    """Energy of differences along x against y, averaged nearby: larger in class 1, smaller in class 2."""
    scores = []
    for i in range(6):
        image, label = phantom(0, i)
        dx, dy, _ = np.gradient(image[0])
        ratio = [np.mean(dx[label == k] ** 2) / np.mean(dy[label == k] ** 2) for k in (1, 0, 2)]
        scores.append(ratio)
    scores = np.array(scores)
    assert (scores[:, 0] > 2 * scores[:, 1]).all() and (scores[:, 1] > 2 * scores[:, 2]).all()


def test_phantom_refuses_what_it_cannot_draw():
    for bad in (
        {"classes": 14},
        {"classes": 0},
        {"shape": (16,)},
        {"shape": (16, 16, 16), "spacing": (1.0, 1.0)},
    ):
        with pytest.raises(ValueError, match=r"expected .*; change"):
            phantom(0, 0, **bad)
