"""Label efficiency over draws: hand-made run folders, t-intervals against scipy, refusals."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from common import metrics, tables
from results import draws


def score_rows(dice, cases=("c0", "c1")):
    """Rows with this Dice of each class in all cases; None: held by the case, never predicted."""
    rows = []
    for case, (name, value) in [(case, item) for case in cases for item in dice.items()]:
        row = dict.fromkeys(metrics.COLUMNS, math.nan) | {"case": case, "class": name, "nsd": 0.0}
        row |= {"volume_true_ml": 1.0, "volume_pred_ml": float(value is not None)}
        rows.append(row | {"dice": value or 0.0, "iou": (value or 0.0) ** 2})
    return rows


@pytest.fixture
def run(tmp_path):
    """Writes a run folder as fine-tuning does and returns its path."""

    def make(strategy, n, draw, dice, cases=("c0", "c1"), slices=None, **config):
        folder = tmp_path / "-".join(map(str, (strategy, n, draw, *config.values())))
        folder.mkdir()
        known = {"strategy": strategy, "draw": draw, "dice": "joint", "variant": "S", "lr": 1e-4}
        known |= {"init": "pre.pt", "t": 0, "steps": 10 * n} | config
        (folder / "config.json").write_text(json.dumps(known))
        slices = slices or [[f"case{draw}", k] for k in range(n)]
        labels = {"n": n, "of": 350, "percent": n / 3.5, "slices": slices}
        (folder / "labels.json").write_text(json.dumps(labels))
        tables.write_metrics_csv(folder / "metrics.csv", score_rows({"a": dice}, cases))
        return folder

    return make


@pytest.fixture
def runs(run):
    """Three draws of 4 labels by two strategies, and one run of each on all 350."""
    for draw, (a, b) in enumerate(((0.3, 0.5), (0.35, 0.45), (0.4, 0.7))):
        run("scratch", 4, draw, a)
        run("decoder", 4, draw, b)
    run("scratch", 350, 0, 0.8)
    return run("decoder", 350, 0, 0.75).parent


def call(capsys, *words):
    code = draws.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def lines(text, *words):
    """The cells of the lines that begin with these words."""
    rows = [line.split() for line in text.splitlines()]
    return [row for row in rows if row[: len(words)] == list(words)]


def test_t_interval_equals_scipy():
    x = np.random.default_rng(0).normal(0.1, 0.2, 7).tolist()
    r = draws.t_interval(x)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert [r["low"], r["high"], r["sd"]] == pytest.approx([low, high, np.std(x, ddof=1)])
    assert (r["n"], r["positive"]) == (7, sum(v > 0 for v in x))
    assert math.isnan(draws.t_interval([0.2])["low"]) and draws.t_interval([0.2])["mean"] == 0.2


def test_over_classes_weighs_classes_alike_and_counts_a_lost_one_as_zero():
    r = draws.over_classes(score_rows({"a": 0.9, "b": 0.6, "stray": 0.0099, "poor": 0.0101}))
    assert r["lost"] == ["stray"] and r["dice"] == pytest.approx(1.52 / 4)
    assert r["dice_of_others"] == pytest.approx(1.5101 / 3)
    rows = score_rows({"a": 0.9, "rare": 0.1}, ["c0"]) + score_rows({"a": 0.7, "rare": 0}, ["c1"])
    rows[-1] |= {"dice": math.nan, "iou": math.nan}  # c1 has no such class
    assert draws.over_classes(rows)["dice"] == pytest.approx((0.8 + 0.1) / 2)  # not 0.6 by case
    assert draws.over_classes(rows)["iou"] == pytest.approx((0.65 + 0.01) / 2)


def test_draws_prints_means_and_paired_differences(runs, tmp_path, capsys):
    code, out, _ = call(capsys, f"{runs}/*-?", "--csv", tmp_path / "rows.csv")
    means, pairs = lines(out, "decoder", "4")
    sd = np.std([0.5, 0.45, 0.7], ddof=1)
    assert code == 0 and means[5:7] == ["3", f"0.550±{sd:.3f}"] and means[2] == "1.14"
    d = [0.2, 0.1, 0.3]
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert pairs[4:] == ["3", "+0.200", "0.100", f"{low:+.3f}", "to", f"{high:+.3f}", "3/3"]
    assert lines(out, "decoder", "350")[1][4:] == ["1", "-0.050", "-", "no", "interval", "0/1"]
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    names = [(row["labels"], row["method"]) for row in rows]
    assert names == [(n, method) for n in ("4", "350") for method in ("decoder", "scratch")]
    assert float(rows[0]["diff_mean"]) == pytest.approx(0.2, abs=1e-12)
    assert rows[2]["diff_low"] == ""  # one draw
    out = call(capsys, f"{runs}/*-?", "--against", "decoder", "--markdown")[1]
    assert "| scratch |" in out.replace("  ", "") and "+0.050" in out


def test_draws_pairs_what_both_have_of_one_setting(run):
    paths = [run("scratch", 4, draw, 0.1 * draw) for draw in (1, 2)]
    paths += [run("full", 4, draw, 0.1 * draw + 0.2) for draw in (2, 3)]
    paths += [run("scratch", 4, 2, 0.1, variant="L"), run("full", 4, 2, 0.7, variant="L")]
    found = [draws.read_run(path) for path in paths]
    rows = draws.summarise(found, draws.method_names(found), "scratch")
    differences = [(r["draws"], r["diff_n"], r["diff_mean"]) for r in rows if r["method"] == "full"]
    assert differences == [(1, 1, pytest.approx(0.6)), (2, 1, pytest.approx(0.2))]


def test_draws_names_what_differs_between_runs_of_one_strategy(run):
    paths = [run("linear", 4, 0, 0.1, t=200), run("linear", 4, 0, 0.2, t=300)]
    paths += [run("decoder", 4, 0, 0.1), run("decoder", 39, 0, 0.1)]  # steps differ by labels
    paths += [run("decoder", 4, 0, 0.1, init="none"), run("full", 4, 0, 0.1, init="none")]
    paths += [run("scratch", 4, 0, 0.1, lr=lr, t=t) for lr, t in ((1e-4, 0), (3e-4, 200))]
    names = draws.method_names([draws.read_run(path) for path in paths])
    assert names[:4] == ["linear, t=200", "linear, t=300", "decoder", "decoder"]
    assert names[4:6] == ["decoder, random encoder", "full, random start"]
    assert names[6:] == ["scratch, lr=0.0001", "scratch, lr=0.0003"]


def test_draws_refuses_runs_that_cannot_be_paired(run, capsys):
    a = run("scratch", 2, 0, 0.1)
    unscored, odd = run("full", 4, 9, 0.1), run("full", 4, 8, 0.1)
    (unscored / "metrics.csv").unlink()
    (odd / "labels.json").write_text("[1]")
    for other, message in (
        (run("decoder", 2, 0, 0.1, cases=("c0", "c2")), "c1, c2 in one only"),
        (run("decoder", 2, 0, 0.1, slices=[["case0", 0], ["case0", 7]], x=1), "different slices"),
        (run("scratch", 2, 0, 0.2, seed=1), "both draw 0 of scratch with 2 labels"),
        (unscored, "holds no metrics.csv"),
        (odd, "expected what fine-tuning writes"),
    ):
        code, _, err = call(capsys, a, other)
        assert code == 2 and message in err and str(other) in err and err.count("\n") == 1
    same = run("decoder", 2, 0, 0.1, slices=[["case0", 1], ["case0", 0]], x=2)  # another order
    assert call(capsys, a, same)[0] == 0
    assert "expected one of: decoder | scratch" in call(capsys, a, same, "--against", "full")[2]


def test_draws_picture_has_a_curve_for_each_method(runs, tmp_path, monkeypatch, capsys):
    curves = {}
    figure = type("figures", (), {"lines": lambda path, panels, *a, **k: curves.update(panels)})
    monkeypatch.setattr("common.figures", figure, raising=False)
    assert call(capsys, f"{runs}/*-?", "--plot", tmp_path / "d.png")[0] == 0
    (curve,) = curves.values()
    assert curve["scratch"] == ([4, 4, 4, 350], pytest.approx([0.3, 0.35, 0.4, 0.8]))
