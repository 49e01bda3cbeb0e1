"""Drawn data: functions of (seed, index), all classes in each, not solvable by intensity."""

import hashlib

import numpy as np
import pytest

from common import synthetic
from common.loaders import data_record, open_data
from common.synthetic import ct_phantom, phantom, tissue


def dice(a, b):
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


def interval_dice(cases, k, bins=128):
    """Best mean Dice of one interval of the intensity for class k, and of one for each case."""
    table = []
    for image, label in cases:
        low, high = image.min(), image.max()
        level = np.minimum(((image - low) / (high - low) * bins).astype(int), bins - 1)
        truth = label == k
        hits = np.r_[0, np.bincount(level[truth], minlength=bins).cumsum()]
        size = np.r_[0, np.bincount(level.ravel(), minlength=bins).cumsum()]
        overlap = hits[None] - hits[:, None]  # [from, to]
        chosen = size[None] - size[:, None]
        table.append(np.where(chosen >= 0, 2 * overlap / np.maximum(chosen + truth.sum(), 1), 0))
    return np.mean(table, axis=0).max(), [t.max() for t in table]


@pytest.mark.parametrize(
    ("draw", "digest"),
    [
        (lambda: phantom(0, 0), "6c9dd7d3d46eacb0"),
        (lambda: phantom(3, 5, (64, 48), (1.0, 1.0), 1, 4), "de8b516f9c56bc86"),
        (lambda: phantom(3, 5, (32, 40, 16), (0.8, 0.8, 3.0), 4, 3), "708af015699602a5"),
        (lambda: phantom(0, 0, (64, 64), (0.7, 0.7), 3, 13), "4a90846a123007b7"),
        (lambda: ct_phantom(1, 2, 32), "e40a53b0bebb5cf6"),
        (lambda: ct_phantom(0, 11, 64), "89ea162a898225a8"),
        (lambda: tissue(1, 2), "9929c03728deb34d"),
        (lambda: tissue(0, 3, (96, 64)), "924385553fbce2c6"),
    ],
)
def test_drawn_arrays_stay_the_same_bit_by_bit(draw, digest):
    """Results of runs on synthetic data are compared over versions."""
    digest_of = hashlib.sha256()
    for array in draw():
        digest_of.update(str((array.dtype.str, array.shape)).encode() + array.tobytes())
    assert digest_of.hexdigest()[:16] == digest


@pytest.mark.parametrize("draw", [phantom, ct_phantom, tissue])
def test_drawn_arrays_are_functions_of_seed_and_index(draw):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw(3, 5)[1]
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(draw(3, 5)[1], first)
    for other in (draw(3, 6), draw(4, 5), draw(5, 3)):
        assert (other[1] != first).mean() > 0.01


@pytest.mark.parametrize(
    "shape, spacing, channels, classes",
    [
        ((48, 48, 32), (1.0, 1.0, 1.5), 1, 2),
        ((64, 64), (0.7, 0.7), 3, 13),
        ((16, 16, 16), (1.0, 1.0, 1.0), 1, 13),
        ((16, 16), (2.0, 1.0), 1, 13),
        ((17, 31, 23), (0.2, 0.3, 0.5), 2, 1),
    ],
)
def test_phantom_types_ranges_and_all_classes(shape, spacing, channels, classes):
    for index in range(6):
        image, label = phantom(1, index, shape, spacing, channels, classes)
        assert image.shape == (channels, *shape) and image.dtype == np.float32
        assert label.shape == tuple(shape) and label.dtype == np.uint8
        assert image.min() >= 0 and image.max() <= 1
        assert (np.bincount(label.ravel(), minlength=classes + 1) > 0).all()
        assert np.mean((image == 0) | (image == 1)) < 0.04  # little is clipped


def test_phantom_every_class_has_a_sensible_size_and_a_usual_place():
    labels = [phantom(7, i)[1] for i in range(20)]
    share = np.array([np.bincount(label.ravel(), minlength=3) / label.size for label in labels])
    assert share[:, 1:].min() > 0.02 and share[:, 1:].max() < 0.15
    centres = np.array(
        [[np.mean(np.nonzero(label == k)[0]) / 48 for k in (1, 2)] for label in labels]
    )
    assert (centres[:, 0] < centres[:, 1]).mean() > 0.9 and centres.std(0).min() > 0.02


def test_phantom_keeps_its_extent_in_mm_at_another_spacing():
    fine = phantom(2, 1, (48, 48, 48), (1.0, 1.0, 1.0))[1]
    flat = phantom(2, 1, (48, 48, 16), (1.0, 1.0, 3.0))[1]
    for k in (1, 2):
        assert dice(fine[:, :, 1::3] == k, flat == k) > 0.85


@pytest.mark.parametrize("classes, shape", [(1, (48, 48, 32)), (4, (48, 48, 32)), (2, (64, 64))])
def test_phantom_is_not_solved_by_intensity(classes, shape):
    cases = [phantom(0, i, shape, classes=classes) for i in range(12)]
    for k in range(1, classes + 1):
        mean, best = interval_dice([(image[0], label) for image, label in cases], k)
        assert mean < 0.35 and np.mean(best) < 0.5 and max(best) < 0.75, (k, mean, best)


def test_phantom_is_solved_by_the_direction_of_its_stripes():
    """Energy of differences along x against y: larger in class 1, smaller in class 2."""
    for i in range(6):
        image, label = phantom(0, i)
        dx, dy, _ = np.gradient(image[0])
        ratio = [np.mean(dx[label == k] ** 2) / np.mean(dy[label == k] ** 2) for k in (1, 0, 2)]
        assert ratio[0] > 2 * ratio[1] > 4 * ratio[2]


def test_phantom_refuses_what_it_cannot_draw():
    for bad in ({"classes": 14}, {"classes": 0}, {"shape": (16,)}, {"spacing": (1.0, 1.0)}):
        with pytest.raises(ValueError, match=r"expected .*; change"):
            phantom(0, 0, **bad)


def test_ct_phantom_has_its_organs_in_place_and_the_tissues_of_a_ct():
    for index in range(10):
        hu, label = ct_phantom(0, index, 64)
        centres = [np.argwhere(label == v).mean(0) / label.shape for v in range(1, 5)]
        liver, spleen, left, right = centres  # x to the right, y to the front, z to the head
        assert liver[0] > 0.5 > spleen[0] and right[0] > 0.5 > left[0]
        assert max(left[1], right[1], spleen[1]) < 0.5
        assert min(liver[2], spleen[2]) > max(left[2], right[2])
        assert hu[0, 0].max() < -900 and hu.max() > 300
        assert all(20 < np.median(hu[label == v]) < 80 for v in range(1, 5))


def test_ct_phantom_keeps_its_anatomy_at_another_side_and_needs_more_than_a_window():
    small = ct_phantom(0, 4, 32)[1]
    large = ct_phantom(0, 4, 128)[1]
    cases = [ct_phantom(0, index) for index in range(10)]
    for value in range(1, 5):
        assert (large == value).mean() == pytest.approx((small == value).mean(), rel=0.15)
        assert 0 < interval_dice(cases, value)[0] < 0.55


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "sizes"),
    [
        ("volumes", (1, 48, 48, 32), np.float32, {"train": 64, "val": 4, "test": 10}),
        ("slices", (1, 32, 32, 12), np.int16, {"train": 12, "test": 24, "pretrain": 60}),
        ("images", (3, 112, 144), np.uint8, {"train": 32, "val": 0, "pretrain": 42}),
    ],
)
def test_synthetic_sets_read_as_prepared_ones(kind, shape, dtype, sizes):
    data = open_data("synthetic", kind, seed=3)
    assert (data.kind, data.name) == (kind, "synthetic")
    assert {split: len(data.cases(split)) for split in sizes} == sizes
    case = data.cases("train")[1]
    assert data.image(case).shape == shape and data.image(case).dtype == dtype
    assert data.label(case).shape == data.shape(case) == shape[1:]
    assert data.image(case) is data.image(case)  # drawn once
    assert data_record(data)["cases"]["train"] == data.cases("train")
    if kind == "slices":
        assert data.image(case)[0, :, :, 3].flags.f_contiguous
        assert not data.has_label(data.cases("unlabelled")[0])
        assert synthetic.slices(0, 64)[0]["slices"] == {"side": 64}
    if kind == "images":
        np.testing.assert_array_equal(data.instances(case) > 0, data.label(case))
