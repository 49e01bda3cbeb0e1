"""Scores of runs: metrics.csv and summary.json, and the commands that read them.

    python -m common.metrics table runs/a runs/b               one row a run, with time and memory
    python -m common.metrics table --seeds runs/a-? runs/b-?   also means over the seeds
    python -m common.metrics compare runs/a runs/b             paired tests, B minus A
    python -m common.metrics compare 'runs/a-?' 'runs/b-?'     ... of the means over seeds
    python -m common.metrics score --pred DIR --true DIR       two folders: see common/score.py

table and compare take --group '^[^-]+-[^-]+': cases whose names match alike are of one patient.
Intervals then draw patients instead of cases, and tests count each patient once.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from scipy import stats

from common import InputError, atomic_write
from common.metrics import COLUMNS, DISTANCES, NAN, SCORES

TITLES = {"dice": "Dice", "iou": "IoU", "hd95_mm": "HD95", "hd95_pooled_mm": "HD95 pooled"}
TITLES |= {"nsd": "NSD", "nsd_valid": "NSD valid", "assd_mm": "ASSD", "centroid_mm": "centroid"}
Row = Mapping[str, Any]

# --------------------------------------------------------------------------------------------------
# Rows in; metrics.csv, summary.json and a table out
# --------------------------------------------------------------------------------------------------


def report(folder: Path | str, rows: Sequence[Row], suffix: str = "") -> str:
    """Write metrics{suffix}.csv and summary{suffix}.json; return the table to print.

    rows: of metrics.evaluate_case.
    """
    summary = summarise(rows)
    write_metrics_csv(Path(folder) / f"metrics{suffix}.csv", rows)
    write_summary(Path(folder) / f"summary{suffix}.json", summary)
    return format_summary(summary)


def write_metrics_csv(
    path: Path | str, rows: Iterable[Row], columns: Sequence[str] = COLUMNS
) -> None:
    """Write the columns of the rows, numbers with all digits, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if row[c] != row[c] else row[c] for c in columns])
    atomic_write(path, text.getvalue().encode())


def read_metrics_csv(path: Path | str) -> list[dict[str, Any]]:
    """Return the rows, an empty cell as NaN. Raise InputError for a damaged file."""
    rows = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for cells in csv.DictReader(file):
                if None in cells.values():
                    raise ValueError("too few cells, as where a file is cut off")
                numbers = {c: float(cells[c] or NAN) for c in COLUMNS[2:]}
                rows.append({"case": cells["case"], "class": cells["class"], **numbers})
    except (ValueError, KeyError) as error:
        place = f"{path} line {len(rows) + 2}: {error}"
        raise InputError(f"{place}; expected {','.join(COLUMNS)}; run evaluate again") from error
    if not rows:
        raise InputError(f"{path} has no rows; expected one a case and class; run evaluate again")
    return rows


class Scores(NamedTuple):
    """Scores of one run or several. status: 0 valid, 1 missed, 2 spurious, 3 both sides empty."""

    cases: list[str]
    classes: list[str]
    values: np.ndarray  # [run, case, class, SCORES]
    status: np.ndarray  # [run, case, class]


def as_arrays(rows: Sequence[Row]) -> Scores:
    """Return the scores of a run. Raise InputError unless each case has one row a class."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    classes = list(dict.fromkeys(row["class"] for row in rows))
    by_key = {(row["case"], row["class"]): row for row in rows}
    if not rows or not len(rows) == len(by_key) == len(cases) * len(classes):
        raise InputError(
            f"{len(rows)} rows for {len(cases)} cases and {len(classes)} classes; expected one for "
            "each case and class; join no files of different classes"
        )
    values = np.full((1, len(cases), len(classes), len(SCORES)), NAN)
    status = np.zeros((1, len(cases), len(classes)), int)
    for i, case in enumerate(cases):
        for j, name in enumerate(classes):
            row = dict(by_key[case, name])
            pair = int(row["volume_pred_ml"] == 0) + 2 * int(row["volume_true_ml"] == 0)
            row["nsd_valid"] = row["nsd"] if pair == 0 else NAN
            status[0, i, j] = pair
            values[0, i, j] = [row[score] for score in SCORES]
    return Scores(cases, classes, values, status)


def nan_mean(values: np.ndarray, axis: int | None = None) -> Any:
    """Return the mean of what is not NaN; NaN where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis)


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Return mean, sd (over n - 1), median, ci95 and n of what is not NaN."""
    x = values[~np.isnan(values)]
    entry = {"mean": NAN, "sd": NAN, "median": NAN, "ci95": [NAN, NAN], "n": len(x)}
    if len(x) > 0:
        entry |= {"mean": float(x.mean()), "median": float(np.median(x))}
    if len(x) > 1:
        entry |= {"sd": float(x.std(ddof=1)), "ci95": interval(resampled_means(x[None]))}
    return entry


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the content of summary.json: statistics of each class, and of "mean" over classes.

    A class: over images. "mean": over images, too, of the image's mean over its classes that are
    not NaN; its n counts images, its n_missed, n_spurious and n_excluded pairs of masks. share:
    mean over images of |G| / all voxels, NaN for rows that were read from a metrics.csv.
    images x classes = n_valid + n_missed + n_spurious + n_excluded.
    """
    cases, classes, (values,), (status,) = as_arrays(rows)
    values = np.concatenate([values, nan_mean(values, axis=1)[:, None]], axis=1)
    entries = []
    for j in range(len(classes) + 1):
        pairs = status[:, j] if j < len(classes) else status
        counts = {
            "n_missed": int((pairs == 1).sum()),
            "n_spurious": int((pairs == 2).sum()),
            "n_excluded": int((pairs == 3).sum()),
        }
        entries.append({s: statistics(values[:, j, k]) | counts for k, s in enumerate(SCORES)})
    shares = {name: [r.get("share", NAN) for r in rows if r["class"] == name] for name in classes}
    return {
        "classes": dict(zip(classes, entries)),
        "mean": entries[-1],
        "images": len(cases),
        "images_dropped": int((status == 3).all(axis=1).sum()),  # no class on either side
        "n_valid": int((status == 0).sum()),
        "share": {name: float(np.mean(shares[name])) for name in classes},
    }


def write_summary(path: Path | str, summary: Row) -> None:
    """Write summary.json; NaN becomes null, since JSON has no NaN."""
    content = json.loads(json.dumps(summary), parse_constant=lambda word: None)
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def read_summary(path: Path | str) -> dict[str, Any]:
    """Return the content of a summary.json, null as NaN. Raise InputError where it is none."""

    def with_nan(entry: dict[str, Any]) -> dict[str, Any]:
        for key, value in entry.items():
            if value is None:
                entry[key] = NAN
            if key == "ci95":
                entry[key] = [NAN if bound is None else bound for bound in value]
        return entry

    try:
        summary = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=with_nan)
        _ = [entry["dice"]["mean"] for entry in (summary["mean"], *summary["classes"].values())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no summary.json ({error}); run evaluate again") from error
    return summary


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


def draw_counts(n: int, samples: int, seed: Sequence[int]) -> np.ndarray:
    """Return how often each of n things is in n draws with replacement, [samples, n]."""
    drawn = np.random.default_rng(seed).integers(0, n, (samples, n))
    cells = drawn + n * np.arange(samples)[:, None]
    return np.bincount(cells.ravel(), minlength=samples * n).reshape(samples, n)


def resampled_means(
    values: np.ndarray, groups: np.ndarray | None = None, stream: int = 0, samples: int = 2000
) -> np.ndarray:
    """Return means, [samples], of values [run, case] with runs and groups of cases drawn anew.

    A mean is over the runs, then over the cases; NaN is left out. groups: [case], numbers from 0;
    the cases of a group are drawn together. The cases drawn are the same for the same groups, so
    that means of two methods can be subtracted; the runs drawn differ with `stream`.
    """
    if groups is None:
        groups = np.arange(values.shape[1])
    run_weight = draw_counts(len(values), samples, [1, stream])  # [samples, run]
    case_weight = draw_counts(groups.max() + 1, samples, [0])[:, groups]  # [samples, case]
    count = run_weight @ ~np.isnan(values)  # [samples, case]: drawn runs that have a value
    means = run_weight @ np.nan_to_num(values) / np.maximum(count, 1)  # [samples, case]
    case_weight = np.where(count > 0, case_weight, 0)
    with np.errstate(invalid="ignore"):
        return (case_weight * means).sum(axis=1) / case_weight.sum(axis=1)


def interval(means: np.ndarray) -> list[float]:
    """Return the 95 % percentile interval of resampled means."""
    return [float(value) for value in np.nanpercentile(means, (2.5, 97.5))]


def paired_tests(a: np.ndarray, b: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    """Compare two methods on the same cases: scores [case] or, of several runs, [run, case].

    Cases without a score on either side are left out. groups: [case], numbers; a group gives the
    tests one difference, the mean over its cases. Returns n, mean_a, mean_b, difference (b - a),
    ci95 (bootstrap over groups and runs), p_t (two-sided paired t-test), p_wilcoxon (signed ranks,
    zeros dropped) and note, which says why there is no test; its p is then NaN.
    """
    a = np.atleast_2d(a)
    b = np.atleast_2d(b)
    difference = nan_mean(b, axis=0) - nan_mean(a, axis=0)  # [case]
    valid = ~np.isnan(difference)
    difference = difference[valid]
    groups = np.arange(len(valid)) if groups is None else groups
    _, groups = np.unique(groups[valid], return_inverse=True)
    result: dict[str, Any] = {
        "n": len(difference),
        "mean_a": float(nan_mean(nan_mean(a[:, valid], axis=0))),
        "mean_b": float(nan_mean(nan_mean(b[:, valid], axis=0))),
        "difference": float(nan_mean(difference)),
        "ci95": [NAN, NAN],
        "p_t": NAN,
        "p_wilcoxon": NAN,
        "note": "",
    }
    # Images of one patient are no independent trials.
    per_group = np.bincount(groups, difference) / np.bincount(groups)
    if len(per_group) < 2:
        return result | {"note": "fewer than 2 pairs: no test"}
    means_a = resampled_means(a[:, valid], groups, stream=0)
    means_b = resampled_means(b[:, valid], groups, stream=1)
    result["ci95"] = interval(means_b - means_a)
    if not per_group.any():
        return result | {"note": "identical: no test"}
    result["p_wilcoxon"] = float(stats.wilcoxon(per_group).pvalue)
    if np.ptp(per_group) <= 1e-9 * np.abs(per_group).max():  # rounding; t would divide by it
        return result | {"note": "every difference is the same: no t-test"}
    result["p_t"] = float(stats.ttest_1samp(per_group, 0).pvalue)
    return result


def groups_of(cases: Sequence[str], pattern: str) -> np.ndarray:
    """Return the number of each case's group, [case]; without a pattern each is its own.

    pattern: a regular expression, whose match (or first bracket) in the case's name is the group,
    or a CSV file with case and group in its first two columns, as GlaS has it. Raises InputError.
    """
    if not pattern:
        return np.arange(len(cases))
    names = {}
    try:
        if pattern.endswith(".csv"):
            rows = csv.reader(Path(pattern).read_text(encoding="utf-8").splitlines())
            names = {row[0]: row[1] for row in rows if len(row) > 1}
        else:
            matches = [(case, re.search(pattern, case)) for case in cases]
            names = {case: match[match.re.groups and 1] for case, match in matches if match}
    except re.error as error:
        raise InputError(f"--group {pattern} is no regular expression ({error})") from error
    outside = [case for case in cases if case not in names]
    if outside:
        raise InputError(f"--group {pattern} gives {some(outside)} no group; expected one for each")
    return np.unique([names[case] for case in cases], return_inverse=True)[1]


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print what stdout can encode; a closed or full stdout stops nothing."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if not "±".encode(encoding, "ignore"):
        text = text.replace("±", "+-")
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def some(names: Sequence[str]) -> str:
    """Return the first five names and, of more, how many there are."""
    if len(names) <= 5:
        return ", ".join(names)
    return f"{', '.join(names[:5])}, ... ({len(names)})"


def layout(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Return rows of cells, header first, as aligned text or as Markdown; first column left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        rule = ["-" * max(widths[0], 3), *("-" * max(w - 1, 2) + ":" for w in widths[1:])]
        lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def number(value: float, score: str) -> str:
    """Return three digits after the point, or two for mm; - for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if score in DISTANCES else f"{value:.3f}"


def mean_sd(entry: Row, score: str) -> str:
    """Return mean±SD of statistics; the mean alone for one value, - for none."""
    if math.isnan(entry["sd"]):
        return number(entry["mean"], score)
    return f"{number(entry['mean'], score)}±{number(entry['sd'], score)}"


def format_summary(summary: Row) -> str:
    """Return the table of a run: a row for each class and for the mean, counts of pairs behind."""
    shown = [score for score in SCORES if score != "nsd_valid"]
    rows = [["class", *(TITLES[s] for s in shown), "n", "missed", "spurious", "excluded"]]
    for name, entry in [*summary["classes"].items(), ("mean", summary["mean"])]:
        counts = [str(entry["dice"][k]) for k in ("n", "n_missed", "n_spurious", "n_excluded")]
        rows.append([name, *(mean_sd(entry[s], s) for s in shown), *counts])
    return (
        f"{layout(rows)}\nmean±SD over images. Distances leave missed and spurious pairs out, "
        "Dice, IoU and NSD count them as 0. Last row: n images, counts of pairs."
    )


# --------------------------------------------------------------------------------------------------
# table and compare: runs that were scored
# --------------------------------------------------------------------------------------------------


def paths_of(pattern: str) -> list[Path]:
    """Return the path itself, or all that a pattern with * or ? names. InputError for none."""
    paths = [pattern] if Path(pattern).exists() else sorted(glob(pattern))
    if not paths:
        raise InputError(f"{pattern} does not exist in {Path.cwd()}; check the path")
    return [Path(path) for path in paths]


def score_files(patterns: Iterable[str]) -> dict[str, Path]:
    """Return run -> its metrics.csv. A pattern is a path, or has * or ? in it.

    A path is a run folder, a metrics.csv, or a summary.json with its metrics.csv beside it.
    """
    files = {}
    for pattern in patterns:
        for path in paths_of(pattern):
            file = path / "metrics.csv" if path.is_dir() else path
            if file.suffix == ".json":
                file = file.with_name(file.stem.replace("summary", "metrics") + ".csv")
            if not file.is_file():
                below = [str(f.parent) for f in sorted(file.parent.glob("*/metrics.csv"))]
                hint = f"but {some(below)} do; name those" if below else "run evaluate first"
                raise InputError(f"{path} holds no {file.name}, {hint}")
            run = path.parent if path.name in ("metrics.csv", "summary.json") else path
            files[str(run)] = file
    return files


def read_runs(files: Sequence[Path]) -> Scores:
    """Return the scores of several runs, cases sorted by name.

    Raises InputError where cases or classes differ.
    """
    runs = []
    for file in files:
        runs.append(as_arrays(sorted(read_metrics_csv(file), key=lambda row: row["case"])))
        names, expected = [*runs[-1].cases, *runs[-1].classes], [*runs[0].cases, *runs[0].classes]
        if names != expected:
            raise InputError(
                f"{file} and {files[0]} hold different cases or classes: "
                f"{some(sorted({*names} ^ {*expected}))} in one only; evaluate both on one split"
            )
    values = np.concatenate([run.values for run in runs])
    return Scores(runs[0].cases, runs[0].classes, values, np.concatenate([r.status for r in runs]))


def of_class(scores: Scores, score: str, name: str) -> tuple[np.ndarray, str]:
    """Return the values [run, case] of a class, or of "mean", and its counts, missed/spurious."""
    picked = [j for j, other in enumerate(scores.classes) if name in (other, "mean")]
    values = scores.values[..., picked, SCORES.index(score)]  # [run, case, class]
    status = scores.status[..., picked]
    return nan_mean(values, axis=2), f"{(status == 1).sum()}/{(status == 2).sum()}"


def cell(values: np.ndarray, counts: str, score: str) -> str:
    """Return mean±SD, with the counts behind a distance."""
    text = mean_sd(statistics(values), score)
    return f"{text} ({counts})" if score in DISTANCES else text


def training_cells(log: Path) -> list[str]:
    """Return steps, seconds a step and peak memory in GB of a log.csv; empty without one.

    All seconds of the training over all steps, without validation: a comparison at equal time
    needs the time that was spent.
    """
    if not log.is_file():
        return ["", "", ""]
    highest = {"step": 0.0, "seconds": 0.0, "memory_gb": 0.0}
    with open(log, encoding="utf-8", errors="replace", newline="") as file:
        for line, cells in enumerate(csv.DictReader(file), 2):
            try:
                for name, value in highest.items():
                    highest[name] = max(value, float(cells.get(name) or 0))
            except ValueError as error:
                raise InputError(f"{log} line {line}: {error}; expected numbers") from error
    steps, seconds, memory = highest.values()
    pace = seconds / steps if steps else 0
    texts = [f"{steps:.0f}", f"{pace:.3g}", f"{memory:.3g}"]
    return ["" if text == "0" else text for text in texts]


def table(args: argparse.Namespace) -> None:
    """Print a row a run, mean±SD of each class and of their mean, and what the training took."""
    files = score_files(args.files)
    runs = {run: read_runs([file]) for run, file in files.items()}
    classes = dict.fromkeys(name for scores in runs.values() for name in scores.classes)
    columns = [(score, name) for score in args.metric for name in [*classes, "mean"]]
    titles = [f"{TITLES[score]} {name}" for score, name in columns]
    rows = [["run", "n", *titles, "steps", "s/step", "memory GB"]]
    for run, scores in runs.items():
        values, _ = of_class(scores, "dice", "mean")
        cells = [run, str(np.count_nonzero(~np.isnan(values)))]
        for score, name in columns:
            cells.append(cell(*of_class(scores, score, name), score))
        rows.append(cells + training_cells(files[run].with_name("log.csv")))
    note = "mean±SD over n images"
    if set(args.metric) & set(DISTANCES):
        note += "; distances in mm (missed/spurious pairs, which they leave out)"
    if any(any(row[-3:]) for row in rows[1:]):
        note += "; s/step: training seconds over steps, without validation; memory: peak"
    else:
        rows = [row[:-3] for row in rows]
    gap = "\n\n" if args.markdown else "\n"
    say(f"{layout(rows, args.markdown)}{gap}{note}")
    if not args.seeds:
        return

    sets: dict[str, list[Path]] = {}
    for run, file in files.items():
        sets.setdefault(re.sub(r"\d+(?=\D*$)", "*", run), []).append(file)
    rows = [["runs", "runs in all", *titles]]
    for run, members in sets.items():
        scores = read_runs(members)
        groups = groups_of(scores.cases, args.group)
        cells = [run, str(len(members))]
        for score, name in columns:
            values, counts = of_class(scores, score, name)
            cells.append(cell(nan_mean(values, axis=1), counts, score))
            if args.group:
                low, high = interval(resampled_means(values, groups))
                cells[-1] += f" [{number(low, score)} to {number(high, score)}]"
        rows.append(cells)
    note = "mean±SD over the means of runs that differ in their last number only"
    if args.group:
        note += "; [95 % interval] with runs and groups of cases drawn anew"
    say(f"\n{layout(rows, args.markdown)}{gap}{note}")


def compare(args: argparse.Namespace) -> None:
    """Print paired tests of each class and of the mean over classes; several runs are averaged."""
    files_a = list(score_files([args.a]).values())
    files_b = list(score_files([args.b]).values())
    scores = read_runs(files_a + files_b)
    groups = groups_of(scores.cases, args.group)
    of_groups = f" of {groups.max() + 1} groups" if args.group else ""
    say(f"A = {args.a}\nB = {args.b}\n{len(scores.cases)} cases{of_groups}, paired")
    if len(scores.values) > 2:
        say(
            f"A is the mean of {len(files_a)} runs, B of {len(files_b)}, case by case; intervals "
            "draw the runs anew, too; missed and spurious are those of all runs"
        )
    for score in (*DISTANCES, "nsd_valid"):
        # A structure that one run misses counts in none: else it would change that mean alone.
        values = scores.values[..., SCORES.index(score)]
        values[:, np.isnan(values).any(axis=0)] = NAN
    n = len(files_a)
    a = scores._replace(values=scores.values[:n], status=scores.status[:n])
    b = scores._replace(values=scores.values[n:], status=scores.status[n:])
    for score in args.metric:
        rows = [["class", "n", "A", "B", "B-A", "95% interval", "p (t)", "p (Wilcoxon)"]]
        rows[0] += ["missed/spurious A", "B", ""]
        for name in [*scores.classes, "mean"]:
            values_a, counts_a = of_class(a, score, name)
            values_b, counts_b = of_class(b, score, name)
            test = paired_tests(values_a, values_b, groups)
            cells = [number(test[key], score) for key in ("mean_a", "mean_b", "difference")]
            low, high = (number(value, score) for value in test["ci95"])
            cells.append("-" if low == "-" else f"{low} to {high}")
            for p in (test["p_t"], test["p_wilcoxon"]):
                cells.append("-" if math.isnan(p) else f"{p:.3g}")
            rows.append([name, str(test["n"]), *cells, counts_a, counts_b, test["note"]])
        unit = " (mm)" if score in DISTANCES else ""
        say(f"\n{TITLES[score]}{unit}\n{layout(rows)}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as InputError: one line, as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def make_parser() -> Parser:
    """Return the command line; the parsed `run` is the function to call with the flags."""
    from common import score  # which imports this module

    parser = Parser("python -m common.metrics", description="Tables, tests and scores of masks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("table", help="one row a run: mean and SD of each class")
    verb.set_defaults(run=table)
    verb.add_argument(
        "files", nargs="+", metavar="FILE", help="run folder, or a file of its scores"
    )
    verb.add_argument("--markdown", action="store_true", help="write the table as Markdown")
    verb.add_argument("--seeds", action="store_true", help="also over runs that differ in a number")
    add_shared_flags(verb)
    verb = verbs.add_parser("compare", help="paired t-test, Wilcoxon test, interval of B - A")
    verb.set_defaults(run=compare)
    verb.add_argument("a", metavar="A", help="run folder; 'runs/x-?' in quotes: mean of several")
    verb.add_argument("b", metavar="B", help="likewise")
    add_shared_flags(verb)
    verb = verbs.add_parser("score", help="score two folders of masks, paired by name")
    verb.set_defaults(run=score.score)
    score.add_flags(verb)
    return parser


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add --metric and --group."""
    metric = parser.add_argument("--metric", nargs="+", choices=SCORES, metavar="NAME")
    metric.default = ["dice", "hd95_mm"]
    metric.help = f"of {', '.join(SCORES)}; default: dice hd95_mm"
    help = "cases whose names match alike are one patient's; or a CSV file of case and patient"
    parser.add_argument("--group", default="", metavar="REGEX", help=help)


def run(name: str, parser: Parser, argv: Sequence[str]) -> int:
    """Call the function that the parser sets as `run`, with the flags.

    Returns the exit code: 0 done, 2 bad input (one line on stderr), 130 Ctrl-C.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"note: {message}")
            args = parser.parse_args(argv)
            args.run(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        text = str(error)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}; check the path and its permissions"
    with contextlib.suppress(OSError, ValueError):
        print(f"{name}: {text}", file=sys.stderr, flush=True)
    return 2


def main(argv: Sequence[str]) -> int:
    """Run table, compare or score; return the exit code."""
    return run("metrics", make_parser(), argv)
