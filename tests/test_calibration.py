"""Calibration against hand-made probabilities, and Spearman's p against the specification's."""

import json
from itertools import permutations

import numpy as np
import pytest
from scipy import ndimage, stats

from common import loaders, metrics, tables
from results import calibration, class_shares

ONE = (1.0, 1.0, 1.0)


def binary(p):
    """Probabilities [2, X, Y, Z] of background and foreground."""
    return np.stack([1 - np.asarray(p, float), np.asarray(p, float)])


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    truth = np.ones((10, 10, 10), int)
    truth[0, :2] = 0  # 20 of 1000 voxels are wrong below
    for confidence in (0.999, 0.98, 0.75):
        cases = [(binary(np.full(truth.shape, confidence)), truth, ONE)]
        r = calibration.calibration(cases)
        assert r["ece"] == pytest.approx(abs(confidence - 0.98))
        assert r["error"] == pytest.approx(0.02)


def test_calibration_counts_the_voxels_near_the_foreground_only():
    truth = np.zeros((40, 3, 3), int)
    truth[20] = 1
    prob = np.full(truth.shape, 0.01)
    prob[20] = 0.99
    prob[14] = 0.49  # still background, 6 voxels away
    for margin, spacing, reached in (
        (5, ONE, 0),
        (6, ONE, 1),
        (6, (2, 1, 1), 0),
        (12, (2, 1, 1), 1),
    ):
        r = calibration.calibration([(binary(prob), truth, spacing)], margin)
        doubtful = [share for entropy, _, share in r["bins"] if entropy > 0.9]
        assert doubtful == [pytest.approx(1 / 13)] * reached


def test_calibration_entropy_is_a_share_of_log_c_and_errors_are_counted_by_it():
    truth = np.ones((4, 5, 5), int)
    truth[0], truth[1] = 0, 2
    prob = np.zeros((3, 4, 5, 5))
    prob[:, :2] = np.array([0.25, 0.5, 0.25]).reshape(3, 1, 1, 1)  # wrong in both slices
    prob[1, 2:] = 1
    r = calibration.calibration([(prob, truth, ONE)])
    assert r["bins"] == [(0, 0, 0.5), (pytest.approx(0.946394630, abs=1e-8), 1, 0.5)]
    assert r["auroc"] == 1 and r["error"] == 0.5


def test_calibration_auroc_equals_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    truth, p = rng.integers(0, 2, (6, 6, 6)), np.round(rng.random((6, 6, 6)), 1)
    r = calibration.calibration([(binary(p), truth, ONE)], 99)
    sure, wrong = np.abs(p - 0.5).round(3).ravel(), ((p > 0.5) != truth).ravel()
    pairs = sure[~wrong][:, None] - sure[wrong][None]  # positive: the right one is surer
    assert r["auroc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_calibration_over_cases_correlates_entropy_and_foreground_dice():
    truth = np.zeros((8, 8, 8), int)
    truth[2:6, 2:6, 2:6] = 1
    cases = []
    for missed, spurious, p in ((0, 0, 0.95), (1, 0, 0.9), (0, 150, 0.8), (3, 0, 0.7)):
        prob = truth * p
        prob[2 : 2 + missed] = 0.0
        prob.reshape(-1)[np.flatnonzero(truth == 0)[:spurious]] = p
        cases.append((binary(prob), truth, ONE))
    nothing = (binary(0.0 * truth), 0 * truth, ONE)  # no case
    r = calibration.calibration([*cases, nothing], 99)
    dices = [metrics.dice(c[0].argmax(0) == 1, truth == 1) for c in cases]
    doubt = [stats.entropy(c[0], axis=0).mean() for c in cases]
    assert r["n"] == 4 and r["rho"] == pytest.approx(stats.spearmanr(doubt, dices)[0])


def run_with_maps(folder, shift):
    """A run folder with the probabilities of two phantoms: the truth, blurred and moved."""
    data = loaders.open_data("synthetic")
    (folder / "predictions/maps").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": "synthetic"}))
    for case in data.cases("test")[:2]:
        onehot = np.stack([data.label(case) == v for v in (0, *data.classes.values())]) * 1.0
        prob = np.roll(ndimage.gaussian_filter(onehot, (0, 1, 1, 1)), shift, 1)
        for name, p in zip(loaders.file_names(["background", *data.classes]).values(), prob):
            file = folder / f"predictions/maps/{case}_mean_{name}.nii.gz"
            loaders.write_on_grid(file, (p / prob.sum(0)).astype(np.float32), data.affine(case))
    return folder


def call(capsys, *words):
    code = calibration.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_calibration_command_averages_the_maps_of_runs(tmp_path, capsys):
    for name, shift in (("a-0", 1), ("a-1", -1), ("b", 3)):
        run_with_maps(tmp_path / name, shift)
    patterns = [tmp_path / name for name in ("a-0", "a-?", "b")]
    code, out, _ = call(capsys, *patterns, "--margin", 2)
    one, mean, far = (line.split() for line in out.splitlines()[1:4])
    assert code == 0 and [one[1], mean[1], far[1]] == ["1", "2", "1"] and one[2] == "2"
    assert float(mean[4]) < float(one[4]) < float(far[4])  # the shifts cancel in the mean


def test_calibration_names_what_is_wrong_with_the_maps(tmp_path, capsys):
    a, b = (run_with_maps(tmp_path / name, 1) for name in "ab")
    next((b / "predictions/maps").glob("*_mean_background.nii.gz")).unlink()
    assert f"{b}/predictions/maps has 1 cases" in call(capsys, tmp_path / "?")[2]
    file = sorted((a / "predictions/maps").glob("*_mean_*.nii.gz"))[-1]
    loaders.write_on_grid(file, np.zeros((4, 5, 6), np.float32), np.eye(4))
    assert f"{file} has a grid of (4, 5, 6)" in call(capsys, a)[2]
    (a / "config.json").unlink()
    code, _, err = call(capsys, a)
    assert code == 2 and "--data" in err and err.count("\n") == 1


# --- larger classes, easier classes? -------------------------------------------------------------


@pytest.mark.parametrize(  # the paper's eight classes: two orders with the p of both kinds
    "order, rho, exact, approximate",
    [
        ((2, 1, 4, 3, 7, 5, 8, 6), 0.8333, 0.0154, 0.0102),
        ((3, 1, 2, 6, 4, 5, 7, 8), 0.8571, 0.0107, 0.0065),
    ],
)
def test_rank_correlation_of_eight_classes_is_exact_and_two_sided(order, rho, exact, approximate):
    for sign in (1, -1):
        r = class_shares.rank_correlation(range(8), [sign * v for v in order])
        assert r["exact"] and r["rho"] == pytest.approx(sign * rho, abs=1e-4)
        assert r["p"] == pytest.approx(exact, abs=6e-5)
    assert stats.spearmanr(range(8), order)[1] == pytest.approx(approximate, abs=6e-5)


def test_rank_correlation_with_ties_counts_every_pairing():
    x, y = [1, 2, 2, 4, 5], [2.0, 1.0, 3.0, 3.0, 9.0]
    r = class_shares.rank_correlation(x, y)
    every = np.abs([stats.spearmanr(x, p)[0] for p in permutations(y)])
    assert r["p"] == pytest.approx(np.mean(every >= abs(r["rho"]) - 1e-9))
    assert not class_shares.rank_correlation(range(12), list(np.sin(range(12))))["exact"]
    assert np.isnan(class_shares.rank_correlation([1, 2, 3], [5, 5, 5])["p"])


def test_class_shares_prints_whether_large_classes_are_the_easier_ones(tmp_path, capsys):
    true = np.zeros((20, 12, 28), int)
    for value, edge in ((3, 1), (1, 3), (2, 5)):  # cubes, of which one voxel layer is missed
        true[2 : 2 + edge, 2 : 2 + edge, 7 * value : 7 * value + edge] = value
    classes = {"large": 2, "small": 3, "middle": 1}
    rows = metrics.evaluate_case("p", np.roll(true, 1, 0), true, ONE, classes)
    tables.report(tmp_path / "a", rows)
    assert class_shares.main([str(tmp_path / "a")]) == 0
    expected = "Spearman of class share against Dice 1.00, p = 0.333 (3 classes, exact)"
    assert f"{tmp_path}/a: {expected}" in capsys.readouterr().out
