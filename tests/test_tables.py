"""metrics.csv, summary.json, statistics against scipy, and the commands table and compare."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from common import InputError, metrics, tables

ROOT = Path(__file__).resolve().parents[1]
ONE = (1.0, 1.0, 1.0)
nan = math.nan


def cube(*start):
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[tuple(slice(s, s + 4) for s in start)] = 1
    return mask


def labelled_cases():
    """Four images, two classes; each status occurs."""
    both, empty, shifted = cube(3, 3, 3), 0 * cube(3, 3, 3), cube(4, 3, 3)
    pairs = {
        "a": [(shifted, both), (empty, empty)],
        "b": [(both, both), (empty, both)],
        "c": [(empty, empty), (empty, empty)],
        "d": [(both, empty), (shifted, both)],
    }
    rows = []
    for case, classes in pairs.items():
        for name, (pred, true) in zip(("one", "two"), classes, strict=True):
            rows += metrics.evaluate_case(case, pred, true, ONE, {name: 1})
    return rows


def row(case, name="c", dice=0.8, **values):
    """A row of metrics.csv; NaN where nothing is given."""
    empty = dict.fromkeys(metrics.COLUMNS, nan) | {"volume_pred_ml": 1.0, "volume_true_ml": 1.0}
    return empty | {"case": case, "class": name, "dice": dice, "iou": dice} | values


@pytest.fixture
def run(tmp_path):
    """Writes a run folder of rows and returns its path."""

    def make(name, rows):
        tables.report(tmp_path / name, rows)
        return tmp_path / name

    return make


def call(capsys, *words):
    code = tables.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def cells(text, name):
    """The cells of the first line that begins with a name."""
    return next(line for line in text.splitlines() if line.startswith(str(name))).split()


# --- rows and summaries --------------------------------------------------------------------------


def test_summary_counts_each_pair_once():
    summary = tables.summarise(labelled_cases())
    assert (summary["images"], summary["images_dropped"], summary["n_valid"]) == (4, 1, 3)
    entries = {**summary["classes"], "mean": summary["mean"]}
    keys = ("n", "n_missed", "n_spurious", "n_excluded")
    counts = {name: [entry["dice"][key] for key in keys] for name, entry in entries.items()}
    assert counts == {"one": [3, 0, 1, 1], "two": [2, 1, 0, 2], "mean": [3, 1, 1, 3]}
    assert summary["classes"]["one"]["hd95_mm"]["n"] == 2
    assert summary["share"] == {"one": pytest.approx(64 / 1728 / 2), "two": pytest.approx(1 / 54)}


def test_summary_averages_classes_within_an_image_first():
    summary = tables.summarise(labelled_cases())
    per_image = [0.75, (1 + 0) / 2, (0 + 0.75) / 2]  # a has class one alone; c is dropped
    assert summary["mean"]["dice"]["mean"] == pytest.approx(np.mean(per_image))
    assert summary["mean"]["dice"]["sd"] == pytest.approx(np.std(per_image, ddof=1))
    assert summary["mean"]["dice"]["median"] == pytest.approx(0.5)
    assert summary["classes"]["one"]["dice"]["mean"] == pytest.approx((0.75 + 1 + 0) / 3)
    assert summary["mean"]["hd95_mm"]["mean"] == pytest.approx(np.mean([1, 0, 1]))
    single = summary["classes"]["two"]["hd95_mm"]  # one value: no spread, no interval
    assert single["mean"] == single["median"] == 1
    assert np.isnan([single["sd"], *single["ci95"]]).all()


def test_summary_leaves_one_sided_pairs_out_of_valid_nsd():
    entry = tables.summarise(labelled_cases())["classes"]["one"]
    assert entry["nsd"]["mean"] == pytest.approx(2 / 3) and entry["nsd"]["n"] == 3
    assert entry["nsd_valid"]["mean"] == 1 and entry["nsd_valid"]["n"] == 2


@pytest.mark.parametrize("spoil", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: []])
def test_summary_refuses_rows_that_are_missing_or_double(spoil):
    with pytest.raises(InputError, match="expected one for each case and class"):
        tables.summarise(spoil(labelled_cases()))


def test_report_writes_what_reads_back_and_returns_the_table(tmp_path):
    rows = labelled_cases()
    rows[0]["case"] = rows[1]["case"] = 'a,"quoted"'
    text = tables.report(tmp_path, rows, "_3")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics_3.csv", "summary_3.json"]
    back = tables.read_metrics_csv(tmp_path / "metrics_3.csv")
    for one, two in zip(rows, back, strict=True):
        assert str({c: one[c] for c in metrics.COLUMNS}) == str(two)  # NaN is equal to itself
    assert "nan" not in (tmp_path / "metrics_3.csv").read_text()
    summary = tables.summarise(rows)
    assert str(tables.read_summary(tmp_path / "summary_3.json")) == str(summary)
    raw = json.loads((tmp_path / "summary_3.json").read_text(), parse_constant=pytest.fail)
    assert raw["classes"]["two"]["hd95_mm"]["sd"] is None
    assert [*raw["mean"]["dice"]] == (
        ["mean", "sd", "median", "ci95", "n", "n_missed", "n_spurious", "n_excluded"]
    )
    header, first, second, mean = (line.split() for line in text.splitlines()[:4])
    assert header[1:4] == ["Dice", "IoU", "HD95"] and header[-3:] == [
        "missed",
        "spurious",
        "excluded",
    ]
    assert first[:2] == ["one", "0.583±0.520"] and first[-4:] == ["3", "0", "1", "1"]
    assert second[3] == "1.00" and mean[-4:] == ["3", "1", "1", "3"]


def test_damaged_score_files_are_named_with_their_line(tmp_path):
    tables.report(tmp_path, [row("x"), row("y")])
    file = tmp_path / "metrics.csv"
    text = file.read_text()
    for spoiled, message in (
        (text.replace("\ny,c,0.8", "\ny,c,many"), "line 3: .*many"),
        (text.replace("hd95_mm", "hausdorff"), "hd95_mm"),
        (text[: text.index("\ny,") + 8], "line 3: too few cells"),
        (text[: text.index("\n") + 1], "no rows"),
    ):
        file.write_text(spoiled)
        with pytest.raises(InputError, match=message):
            tables.read_metrics_csv(file)
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(InputError, match="is no summary"):
        tables.read_summary(tmp_path / "summary.json")


# --- statistics ----------------------------------------------------------------------------------


def test_interval_of_a_mean_is_near_the_textbook_and_the_same_each_time():
    x = np.random.default_rng(3).normal(0.8, 0.1, 60)
    low, high = tables.statistics(x)["ci95"]
    half = 1.96 * x.std(ddof=1) / math.sqrt(60)
    assert [low, high] == pytest.approx([x.mean() - half, x.mean() + half], abs=0.15 * half)
    assert [low, high] == tables.statistics(x.copy())["ci95"]


def test_interval_draws_groups_and_runs_not_images():
    """20 images of 4 patients: the spread of the mean is that of 4 patients, and of 3 seeds."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(4), 5)
    patients = rng.normal(0, 1, 4)[groups]
    spread = tables.resampled_means(patients[None], groups).std()
    assert spread == pytest.approx(patients[::5].std() / math.sqrt(4), rel=0.05)
    assert tables.resampled_means(patients[None]).std() < 0.6 * spread
    seeds = np.array([[-1.0], [0.0], [1.0]]) + np.zeros(20)
    spread = tables.resampled_means(seeds, groups).std()
    assert spread == pytest.approx(np.std([-1, 0, 1]) / math.sqrt(3), rel=0.05)
    holes = tables.resampled_means(np.array([[1.0, nan, 1.0], [1.0, 1.0, 1.0]]))
    assert holes[~np.isnan(holes)] == pytest.approx(1)  # what a drawn run lacks is left out
    both = tables.resampled_means(patients + seeds, groups)
    assert both.std() == pytest.approx(np.hypot(spread, patients[::5].std() / 2), rel=0.05)


def test_paired_tests_equal_scipy_and_leave_nan_pairs_out():
    rng = np.random.default_rng(1)
    a = rng.random(25)
    b = a + rng.normal(0.05, 0.1, 25)
    a[3], b[7] = nan, nan
    keep = [i for i in range(25) if i not in (3, 7)]
    result = tables.paired_tests(a, b)
    assert result["n"] == 23 and result["note"] == ""
    assert result["difference"] == pytest.approx((b[keep] - a[keep]).mean())
    assert result["ci95"][0] < result["difference"] < result["ci95"][1]
    assert result["p_t"] == pytest.approx(stats.ttest_rel(a[keep], b[keep]).pvalue)
    assert result["p_wilcoxon"] == pytest.approx(stats.wilcoxon(a[keep], b[keep]).pvalue)


def test_paired_tests_of_groups_count_each_group_once():
    rng = np.random.default_rng(2)
    groups = np.array([7, 7, 7, 2, 2, 5, 9, 9])  # any numbers
    a, b = rng.random(8), rng.random(8)
    means = [(b - a)[groups == g].mean() for g in (2, 5, 7, 9)]
    result = tables.paired_tests(a, b, groups)
    assert result["p_t"] == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert result["difference"] == pytest.approx((b - a).mean()) and result["n"] == 8
    some = np.where(np.arange(8) == 3, nan, b)  # of equal seeds, one lacks a case
    same = tables.paired_tests(np.stack([a, a]), np.stack([b, b, some]), groups)
    assert same["ci95"] == pytest.approx(result["ci95"], abs=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "b, note",
    [
        ([0.5, 0.6, 0.8], "identical: no test"),
        ([0.6, 0.7, 0.9], "every difference is the same: no t-test"),
        ([nan, nan, 0.9], "fewer than 2 pairs: no test"),
        ([nan] * 3, "fewer than 2 pairs: no test"),
    ],
)
def test_paired_tests_say_so_where_no_test_can_be_made(b, note):
    result = tables.paired_tests(np.array([0.5, 0.6, 0.8]), np.array(b))
    assert result["note"] == note and math.isnan(result["p_t"])


def test_groups_come_from_a_pattern_or_a_file(tmp_path):
    cases = ["A-1-x", "B-2-x", "A-1-y"]
    assert tables.groups_of(cases, "^[A-Z]-.").tolist() == [0, 1, 0]
    assert tables.groups_of(cases, "-(.)$").tolist() == [0, 0, 1]
    assert len(set(tables.groups_of(cases, ""))) == 3
    (tmp_path / "g.csv").write_text("name,patient\nA-1-x,p\nA-1-y,q\nB-2-x,p\n")
    assert tables.groups_of(cases, str(tmp_path / "g.csv")).tolist() == [0, 0, 1]
    for pattern, message in (("^A", "B-2-x"), ("(", "no regular expression")):
        with pytest.raises(InputError, match=message):
            tables.groups_of(cases, pattern)


# --- commands ------------------------------------------------------------------------------------

LOG = """step,seconds,loss,memory_gb,val_dice
10,30,0.5,1.25,
50,70,0.4,2.5,
50,70,,,0.3
60,78.5,0.3,2.25,
"""


def test_table_prints_a_row_a_run_with_time_and_memory(run, capsys):
    a = run("a", [row("x", hd95_mm=2.0), row("y", dice=0.6, hd95_mm=nan, volume_pred_ml=0.0)])
    b = run("b", [row("x"), row("x", "d", 0.4)])
    (a / "log.csv").write_text(LOG)
    code, out, err = call(capsys, "table", a, b / "summary.json", "--markdown")
    header, _, one, two = ([c.strip() for c in s.split("|")[1:-1]] for s in out.splitlines()[:4])
    assert (code, err) == (0, "") and header[-3:] == ["steps", "s/step", "memory GB"]
    assert header[:4] == ["run", "n", "Dice c", "Dice d"]
    assert one[:4] == [str(a), "2", "0.700±0.141", "-"] and one[5] == "2.00 (1/0)"
    assert one[-3:] == ["60", "1.31", "2.5"] and two[-3:] == ["", "", ""]  # 78.5 / 60
    assert two[:5] == [str(b), "1", "0.800", "0.400", "0.600"]
    _, out, _ = call(capsys, "table", b, "--metric", "dice")
    assert "s/step" not in out and cells(out, b)[1:3] == ["1", "0.800"]
    (a / "log.csv").write_text(LOG.replace("2.5,", "much,"))
    assert "line 3" in call(capsys, "table", a)[2]


def test_table_over_seeds_gives_the_spread_of_the_means_and_counts_what_was_missed(run, capsys):
    lost = row("y", dice=0.0, volume_pred_ml=0.0)
    runs = [run(f"a-{i}", [row("x", dice=0.5 + i / 10), lost]) for i in (0, 1)]
    runs.append(run("b-0", [row("x", dice=0.9, hd95_mm=3.0), lost]))
    code, out, _ = call(capsys, "table", *runs, "--seeds", "--group", ".")
    sets = {s.split()[0][-3:]: s for s in out.splitlines() if "-* " in s}
    assert code == 0 and f"0.275±{0.05 * 2**-0.5:.3f} [0.000 to 0.600]" in sets["a-*"]
    assert "- (2/0)" in sets["a-*"] and "0.450 [" in sets["b-*"] and "3.00 (1/0)" in sets["b-*"]


def test_compare_prints_the_tests_of_scipy_on_cases_paired_by_name(run, capsys):
    rng = np.random.default_rng(0)
    dice = {name: rng.random(8) for name in ("a-0", "a-1", "b-0")}
    for name, values in dice.items():
        rows = [row(f"case{i}", dice=d) for i, d in enumerate(values)]
        folder = run(name, rows[::-1] if name == "b-0" else rows)
    a, b = folder.parent / "a-?", folder
    code, out, err = call(capsys, "compare", a, b)
    x, y = np.mean([dice["a-0"], dice["a-1"]], axis=0), dice["b-0"]
    line = cells(out, "mean")
    assert (code, err) == (0, "") and "A is the mean of 2 runs, B of 1" in out
    assert line[1:5] == ["8", *(f"{v:.3f}" for v in (x.mean(), y.mean(), y.mean() - x.mean()))]
    assert f"{stats.ttest_rel(x, y).pvalue:.3g}" in line
    assert f"{stats.wilcoxon(x, y).pvalue:.3g}" in line
    assert "HD95 (mm)" in out and "fewer than 2 pairs" in out  # there are no distances
    assert "identical: no test" in call(capsys, "compare", b, b, "--metric", "dice")[1]


def test_compare_leaves_a_class_that_one_run_missed_out_of_both_mean_distances(run, capsys):
    def rows(**lesion):  # organ 2 mm off everywhere; the lesion 6 mm off, or missed
        kinds = (("organ", {"hd95_mm": 2.0, "nsd": 1.0}), ("lesion", lesion))
        return [row(case, name, **values) for case in "pq" for name, values in kinds]

    a = run("a", rows(hd95_mm=6.0, nsd=0.6))
    b = run("b", rows(hd95_mm=nan, nsd=0.0, volume_pred_ml=0.0))
    _, out, _ = call(capsys, "compare", a, b, "--metric", "hd95_mm")
    assert cells(out, "mean")[1:5] == ["2", "2.00", "2.00", "0.00"] and "0/0  2/0" in out
    _, out, _ = call(capsys, "compare", a, b, "--metric", "nsd_valid")
    assert cells(out, "mean")[2:5] == ["1.000", "1.000", "0.000"]


def test_compare_with_groups_says_how_many_there_are(run, capsys):
    a = run("a", [row(f"{p}-{i}", dice=0.1 * i) for p in "pqr" for i in range(3)])
    b = run("b", [row(f"{p}-{i}", dice=0.1 * i + 0.02 * i * i) for p in "pqr" for i in range(3)])
    _, out, _ = call(capsys, "compare", a, b, "--group", "^.", "--metric", "dice")
    assert "9 cases of 3 groups" in out and "every difference is the same" in out


def test_bad_input_of_table_and_compare_is_one_line(run, tmp_path, capsys):
    a, b = run("a", [row("x"), row("y")]), run("b", [row("x"), row("z")])
    run("c/test-4", [row("x")])
    for words, *parts in (
        (("table", "none"), f"none does not exist in {Path.cwd()}"),
        (("table", tmp_path / "q-?"), "q-? does not exist"),
        (("table", tmp_path / "c"), "holds no metrics.csv", str(tmp_path / "c/test-4")),
        (("table", a, "--metric", "best"), "invalid choice"),
        (("compare", a, b), "different cases or classes: y, z in one only", "one split"),
        (("draw",), "invalid choice"),
        ((), "required"),
    ):
        code, _, err = call(capsys, *words)
        assert code == 2 and err.startswith("metrics: ") and err.count("\n") == 1, err
        assert [part for part in parts if part not in err] == []


@pytest.mark.parametrize("coding", ["ascii", "latin-1", "utf-8"])
def test_table_is_printed_whatever_stdout_can_encode(run, coding):
    words = [
        sys.executable,
        "-m",
        "common.metrics",
        "table",
        run("Ω", [row("x"), row("y", dice=0.6)]),
    ]
    environment = os.environ | {"PYTHONIOENCODING": coding, "PYTHONUTF8": "0"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, env=environment, timeout=60)
    sign = "+-" if coding == "ascii" else "±"
    assert done.returncode == 0 and f"0.700{sign}0.141" in done.stdout.decode(coding), done.stderr
