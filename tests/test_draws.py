"""Label efficiency over draws: hand-made run folders, t-intervals against scipy, the picture by its pixels."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from common import InputError
from common.old import figures, metrics

ORANGE, BLUE = figures.PALETTE[:2]


def score_rows(dice, cases=("c0", "c1")):
    """Rows with this Dice of each class, the same in all cases; None: held by the case, but never predicted."""
    empty = dict.fromkeys(metrics.COLUMNS[4:], math.nan)
    return [
        {
            **empty,
            "case": case,
            "class": name,
            "dice": value or 0.0,
            "iou": (value or 0.0) ** 2,
            "nsd": 0.0,
        }
        | {"volume_true_ml": 1.0, "volume_pred_ml": float(value is not None)}
        for case in cases
        for name, value in dice.items()
    ]


@pytest.fixture
def run(tmp_path):
    """Writes a run folder as finetune does and returns its path; scores: the Dice of organ a, or class -> value."""

    def make(strategy, n, draw, scores, cases=("c0", "c1"), slices=None, **config):
        folder = tmp_path / "-".join(map(str, (strategy, n, draw, *config.values())))
        folder.mkdir()
        known = {
            "strategy": strategy,
            "labels": str(n),
            "draw": draw,
            "dice": "joint",
            "variant": "S",
            "lr": 1e-4,
        }
        known |= {"init": "pre.pt", "t": 0, "steps": 10 * n} | config
        (folder / "config.json").write_text(json.dumps(known))
        picked = slices or [[f"case{draw}", k] for k in range(n)]
        labels = {"n": n, "of": 350, "percent": n / 3.5, "slices": picked}
        (folder / "labels.json").write_text(json.dumps(labels))
        rows = score_rows(scores if isinstance(scores, dict) else {"a": scores}, cases)
        metrics.write_metrics_csv(folder / "metrics.csv", rows)
        return folder

    return make


def call(capsys, *words):
    """(exit code, stdout, stderr) of the verb."""
    code = metrics.main(["draws", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(capsys, words, *parts):
    code, out, err = call(capsys, *words)
    assert code == 2 and not out and err.startswith("metrics: ") and err.count("\n") == 1
    assert [part for part in parts if part not in err] == [], err


def table_line(text, *words):
    """The cells of the only line that holds all words, in this order, split at two spaces or more."""
    (line,) = [line for line in text.splitlines() if line.split()[: len(words)] == list(words)]
    return [cell for cell in line.split("  ") if cell.strip()]


# --- t-interval ------------------------------------------------------------------------------------------------------


def test_t_interval_of_five_draws_takes_t_2776():
    d = [0.1, 0.2, -0.05, 0.3, 0.15]
    r = metrics.t_interval(d)
    half = 2.776 * np.std(d, ddof=1) / math.sqrt(5)
    assert (r["n"], r["positive"]) == (5, 4)
    assert [r["mean"], r["low"], r["high"]] == pytest.approx(
        [0.14, 0.14 - half, 0.14 + half], abs=1e-4
    )


def test_t_interval_equals_scipy():
    d = np.random.default_rng(0).normal(0.1, 0.2, 7)
    r = metrics.t_interval(d)
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert [r["low"], r["high"], r["sd"]] == pytest.approx([low, high, np.std(d, ddof=1)])


def test_t_interval_of_one_draw_is_its_value_without_an_interval():
    r = metrics.t_interval([0.2])
    assert (r["n"], r["mean"], r["positive"]) == (1, 0.2, 1)
    assert all(math.isnan(r[key]) for key in ("sd", "low", "high"))


# --- one run ---------------------------------------------------------------------------------------------------------


def test_over_classes_counts_a_lost_class_as_zero_and_names_it():
    r = metrics.over_classes(score_rows({"a": 0.9, "b": 0.6, "lost": None}))
    assert [r["dice"], r["iou"], r["found_dice"]] == pytest.approx([0.5, 0.39, 0.75])
    assert r["lost"] == ["lost"]


def test_over_classes_calls_a_class_lost_below_one_percent_only():
    r = metrics.over_classes(score_rows({"a": 0.9, "stray": 0.0099, "poor": 0.0101}))
    assert r["lost"] == ["stray"] and r["found_dice"] == pytest.approx(0.45505)


def test_over_classes_keeps_a_class_that_one_case_finds():
    rows = score_rows({"a": 0.8}, ["c0"]) + score_rows({"a": None}, ["c1"])
    r = metrics.over_classes(rows)
    assert (r["dice"], r["found_dice"], r["lost"]) == (0.4, 0.4, [])


def test_over_classes_leaves_out_what_no_case_holds_and_none_is_given():
    rows = score_rows({"a": 0.8, "absent": None})
    for row in rows[1::2]:
        row |= {"dice": math.nan, "iou": math.nan, "volume_true_ml": 0.0}
    r = metrics.over_classes(rows)
    assert (r["dice"], r["found_dice"], r["lost"]) == (0.8, 0.8, [])


def test_over_classes_weighs_classes_alike_however_many_cases_hold_them():
    rows = score_rows({"a": 0.9, "rare": 0.1}, ["c0"]) + score_rows(
        {"a": 0.7, "rare": None}, ["c1"]
    )
    rows[-1] |= {"dice": math.nan, "iou": math.nan, "volume_true_ml": 0.0}
    assert metrics.over_classes(rows)["dice"] == pytest.approx(
        (0.8 + 0.1) / 2
    )  # per case first: (0.5 + 0.7) / 2


# --- tables ----------------------------------------------------------------------------------------------------------

SCRATCH, DECODER = (0.3, 0.35, 0.4), (0.5, 0.45, 0.7)


@pytest.fixture
def runs(run):
    """Three draws of 4 labels by two strategies, and one run of each on all 350."""
    for draw, (a, b) in enumerate(zip(SCRATCH, DECODER)):
        run("scratch", 4, draw, a)
        run("decoder", 4, draw, {"a": b})
    run("scratch", 350, 0, 0.8)
    return run("decoder", 350, 0, 0.75).parent


def test_draws_prints_mean_and_sd_over_the_draws(runs, capsys):
    code, out, err = call(capsys, f"{runs}/*-?")
    assert (code, err) == (0, "")
    cells = table_line(out, "decoder", "4", "1.14")
    assert [c.strip() for c in cells[3:]] == [
        "joint",
        "S",
        "3",
        "0.550±0.132",
        "0.314±0.154",
        "0.550±0.132",
        "0",
    ]
    assert "over 2 cases, then over 1 classes" in out


def test_draws_prints_paired_differences_with_their_t_interval_and_signs(runs, capsys):
    out = call(capsys, f"{runs}/*")[1]
    d = np.subtract(DECODER, SCRATCH)
    low, high = stats.ttest_1samp(d, 0).confidence_interval()
    cells = [c.strip() for c in table_line(out, "decoder", "4", "joint")]
    expected = [f"{d.mean():+.3f}", f"{d.std(ddof=1):.3f}", f"{low:+.3f} to {high:+.3f}", "3/3"]
    assert cells[4:] == ["3", *expected]


def test_draws_says_that_one_run_has_no_interval(runs, capsys):
    out = call(capsys, f"{runs}/*")[1]
    assert [c.strip() for c in table_line(out, "decoder", "350", "joint")][4:] == [
        "1",
        "-0.050",
        "-",
        "no interval",
        "0/1",
    ]


def test_draws_pairs_only_the_draws_that_both_have(run, capsys):
    paths = [run("scratch", 4, draw, 0.1 * draw) for draw in (1, 2)]
    paths += [run("decoder", 4, draw, 0.1 * draw + 0.2) for draw in (2, 3)]
    rows = metrics.draws(named(paths), "scratch")
    assert (rows[0]["draws"], rows[0]["diff_n"], rows[0]["diff_mean"]) == (2, 1, pytest.approx(0.2))


def named(paths):
    """The runs of these folders as the verb reads them."""
    found = [metrics._read_draw(str(path)) for path in paths]
    metrics._name_methods(found)
    return found


def test_draws_pairs_each_dice_loss_and_variant_with_its_own(run):
    paths = []
    for k, (dice, variant) in enumerate((("joint", "S"), ("per-class", "S"), ("joint", "L"))):
        paths.append(run("scratch", 4, 0, 0.1, dice=dice, variant=variant))
        paths.append(run("full", 4, 0, 0.2 + 0.1 * k, dice=dice, variant=variant))
    rows = [r for r in metrics.draws(named(paths), "scratch") if r["method"] == "full"]
    found = {(r["dice_loss"], r["variant"]): r["diff_mean"] for r in rows}
    assert found == pytest.approx(
        {("joint", "S"): 0.1, ("per-class", "S"): 0.2, ("joint", "L"): 0.3}
    )


def test_draws_names_what_differs_between_runs_of_one_strategy(run):
    paths = [
        run("linear", 4, 0, 0.1, t=200),
        run("linear", 4, 0, 0.2, t=300),
        run("linear", 39, 0, 0.2, t=200),
    ]
    paths += [
        run("decoder", 4, 0, 0.1),
        run("decoder", 39, 0, 0.1),
        run("decoder", 4, 0, 0.1, init="none"),
    ]
    paths += [run("scratch", 4, 0, 0.1, lr=lr) for lr in (1e-4, 3e-4)]
    methods = [r["method"] for r in named(paths)]
    assert methods[:3] == [
        "linear, t=200",
        "linear, t=300",
        "linear, t=200",
    ]  # also where there is one t only
    assert methods[3:6] == [
        "decoder",
        "decoder",
        "decoder, random encoder",
    ]  # its steps differ by labels: no method
    assert methods[6:] == ["scratch, lr=0.0001", "scratch, lr=0.0003"]


def test_draws_of_scratch_ignore_t_and_init(run):
    paths = [
        run("scratch", 4, draw, 0.1, t=t, init=init)
        for draw, t, init in ((0, 0, "none"), (1, 200, "a.pt"))
    ]
    assert [r["method"] for r in named(paths)] == ["scratch", "scratch"]


def test_draws_writes_the_rows_as_csv_with_all_digits(runs, tmp_path, capsys):
    assert call(capsys, f"{runs}/*-?", "--csv", tmp_path / "rows.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(r["labels"], r["method"]) for r in rows] == [
        (n, method) for n in ("4", "350") for method in ("decoder", "scratch")
    ]
    assert float(rows[0]["dice_sd"]) == pytest.approx(np.std(DECODER, ddof=1), abs=1e-12)
    assert float(rows[0]["diff_mean"]) == pytest.approx(0.2, abs=1e-12)
    assert rows[2]["diff_low"] == ""  # one draw


def test_draws_against_another_method_changes_the_sign(runs, capsys):
    out = call(capsys, f"{runs}/*-?", "--against", "decoder")[1]
    assert table_line(out, "scratch", "350", "joint")[5].strip() == "+0.050"


def test_draws_as_markdown_has_equal_columns(runs, capsys):
    out = call(capsys, f"{runs}/*-?", "--markdown")[1]
    first, second = (
        {line.count("|") for line in part if line.startswith("|")}
        for part in (out.splitlines()[:6], out.splitlines()[6:])
    )
    assert first == {11} and second == {10}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_draws_refuses_different_test_cases(run, capsys):
    a, b = run("scratch", 4, 0, 0.1), run("decoder", 4, 0, 0.1, cases=("c0", "c2"))
    refused(capsys, (a, b), str(a), str(b), "different cases", "c1 a", "one split")


def test_draws_refuses_different_slices_in_one_draw(run, capsys):
    a, b = run("scratch", 2, 0, 0.1), run("decoder", 2, 0, 0.1, slices=[["case0", 0], ["case0", 7]])
    refused(
        capsys, (a, b), str(a), str(b), "draw 0 of 2 labels", "different slices", "train both again"
    )


def test_draws_takes_the_same_slices_in_another_order(run, capsys):
    a, b = run("scratch", 2, 0, 0.1), run("decoder", 2, 0, 0.1, slices=[["case0", 1], ["case0", 0]])
    assert call(capsys, a, b)[0] == 0


def test_draws_refuses_two_runs_of_one_draw(run, capsys):
    a, b = run("scratch", 4, 0, 0.1), run("scratch", 4, 0, 0.2, seed=1)
    refused(capsys, (a, b), str(a), str(b), "both draw 0 of scratch with 4 labels", "leave one out")


def test_draws_names_the_methods_where_against_is_none_of_them(run, capsys):
    paths = [run("scratch", 4, 0, 0.1, lr=lr) for lr in (1e-4, 3e-4)]
    refused(capsys, paths, "--against scratch", "scratch, lr=0.0001 | scratch, lr=0.0003")


@pytest.mark.parametrize(
    "file, text",
    [
        (
            "config.json",
            '{"strategy": "full", "dice": "joint", "variant": "S", "draw": 0, "t": 0, "lr": 1}',
        ),
        ("labels.json", "[1]"),
        ("labels.json", "{"),
        ("config.json", None),
    ],
    ids=["keys", "list", "damaged", "gone"],
)
def test_draws_refuses_a_folder_that_finetune_did_not_write(run, capsys, file, text):
    folder = run("scratch", 4, 0, 0.1)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    refused(capsys, [folder], str(folder), "cannot be used", "expected what finetune writes")


def test_draws_refuses_a_run_that_was_not_evaluated(run, capsys):
    folder = run("scratch", 4, 0, 0.1)
    (folder / "metrics.csv").unlink()
    refused(capsys, [folder], str(folder), "metrics.csv", "run evaluate first")


# --- picture ---------------------------------------------------------------------------------------------------------


def spot(path, n, dice, n_range, dice_range):
    """Colour of the pixel where a point belongs: the panel is 620 x 300 at (86, 42), with 4 % of room on each side."""
    x, y = (
        (value - low) / (high - low)
        for value, (low, high) in ((np.log10(n), np.log10(n_range)), (dice, dice_range))
    )
    column, row = 86 + (0.04 + x) / 1.08 * 620, 42 + (1.04 - y) / 1.08 * 300
    return Image.open(path).convert("RGB").getpixel((round(column), round(row)))


def test_draws_picture_has_every_run_at_its_place_over_logarithmic_labels(run, tmp_path, capsys):
    points = {
        "decoder": [(4, 0.5), (4, 0.9), (40, 0.6), (400, 0.8)],
        "scratch": [(4, 0.1), (4, 0.3), (40, 0.4)],
    }
    paths = [
        run(s, n, draw, dice) for s, found in points.items() for draw, (n, dice) in enumerate(found)
    ]
    assert call(capsys, *paths, "--plot", tmp_path / "d.png")[0] == 0
    for (_, found), colour in zip(points.items(), (ORANGE, BLUE)):
        assert [spot(tmp_path / "d.png", n, d, (4, 400), (0.1, 0.9)) for n, d in found] == [
            colour
        ] * len(found)


def test_scatter_line_runs_through_the_means(tmp_path):
    path = figures.scatter({"m": ([4, 4, 400, 400], [0.1, 0.5, 0.5, 0.9])}, tmp_path / "s.png")
    limits = (4, 400), (0.1, 0.9)
    assert spot(path, 40, 0.5, *limits) == ORANGE  # halfway between the means 0.3 and 0.7
    assert spot(path, 40, 0.3, *limits) != ORANGE and spot(path, 40, 0.7, *limits) != ORANGE


def test_scatter_of_one_place_draws_no_mean_that_looks_like_a_point(tmp_path):
    path = figures.scatter({"m": ([4, 4, 4], [0.1, 0.2, 0.9])}, tmp_path / "s.png")
    inside = np.asarray(Image.open(path).convert("RGB"))[42:342, 90:700]
    rows = np.flatnonzero(np.ptp(inside, axis=-1).any(axis=1))  # those with any colour
    assert np.count_nonzero(np.diff(rows) > 1) == 2  # three dots, and no line from one to the next


def test_scatter_has_a_tick_at_each_number_of_labels_and_one_legend_entry_a_name(
    tmp_path, monkeypatch
):
    written, legend = [], []
    write, real = figures._write, figures._legend
    monkeypatch.setattr(
        figures,
        "_write",
        lambda c, xy, lines, *a, **k: (written.extend(lines), write(c, xy, lines, *a, **k)),
    )
    monkeypatch.setattr(
        figures, "_legend", lambda entries: (legend.extend(entries), real(entries))[1]
    )
    figures.scatter(
        {"a": ([4, 39, 350], [0.1, 0.2, 0.3]), "b": ([4, 39], [0.1, 0.2])}, tmp_path / "s.png"
    )
    assert [w for w in written if w in ("4", "39", "350", "100", "1", "2")] == ["4", "39", "350"]
    assert legend == [("a", ORANGE), ("b", BLUE)]


@pytest.mark.parametrize(
    "points", [{}, {"a": ([4], [math.nan])}, {"a": ([0, 4], [0.1, 0.2])}], ids=str
)
def test_scatter_refuses_what_has_no_place(points, tmp_path):
    with pytest.raises(ValueError, match="expected one or more, each with x above 0"):
        figures.scatter(points, tmp_path / "s.png")


def test_scatter_leaves_out_points_that_are_not_finite(tmp_path):
    path = figures.scatter({"m": ([4, 4, 400, 400], [0.1, math.nan, 0.9, 0.9])}, tmp_path / "s.png")
    assert spot(path, 40, 0.5, (4, 400), (0.1, 0.9)) == ORANGE


def test_over_classes_refuses_a_case_without_one_of_the_classes():
    with pytest.raises(InputError, match="expected one per case and class"):
        metrics.over_classes(score_rows({"a": 0.9, "b": 0.6})[:-1])
