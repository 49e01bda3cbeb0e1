"""What a few labels suffice for, and how much of that hangs on which slices were drawn.

Tables 3 to 5 of the label-efficiency paper: Dice by number of labels, as mean±SD over the draws of
labelled slices, and the differences from one method, paired by draw. Reads the folders that
fine-tuning leaves (labels.json, config.json, metrics.csv).

    python -m results.draws 'runs/ft-*' --plot dice.png --csv dice.csv
    python -m results.draws 'runs/ft-*' --against 'scratch, lr=0.001'
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from common import InputError, tables
from common.metrics import NAN, SCORES
from common.tables import Row, nan_mean, number

# Ways to run one strategy. What of these differs between its runs of one setting becomes part of
# the method's name.
VARIED = ("init", "t", "input", "lr", "steps")
LOST = 0.01  # a class with a mean Dice below it is lost: never found, or a few stray voxels of it


class Run(NamedTuple):
    """A fine-tuned run. setting: number of labels, kind of Dice loss, variant of the network."""

    path: Path
    setting: tuple[int, str, str]
    draw: int
    percent: float
    slices: list[tuple[str, int]]
    config: dict[str, Any]
    cases: list[str]
    classes: list[str]
    scores: dict[str, Any]


def t_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return n, mean, sd (over n - 1), low and high of the 95 % t-interval of the mean, positive.

    positive: how many are above 0. Below 2 values sd, low and high are NaN. The interval takes the
    values for independent and near normal.
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    mean = float(nan_mean(x))
    sd = NAN
    half = NAN
    if n > 1:
        sd = float(x.std(ddof=1))
        half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    interval = {"low": mean - half, "high": mean + half}
    return {"n": n, "mean": mean, "sd": sd, **interval, "positive": int((x > 0).sum())}


def over_classes(rows: Sequence[Row]) -> dict[str, Any]:
    """Return Dice and IoU with equal weight for each class: mean over cases, then over classes.

    (summary.json has the other order: each case weighs the same.) A class that no case has on
    either side is left out. A lost class counts with its 0; dice_of_others is the mean without.
    """
    _, classes, (values,), _ = tables.as_arrays(rows)
    means = nan_mean(values, axis=0)  # [class, SCORES]
    dices = means[:, SCORES.index("dice")]
    lost = dices < LOST  # False for NaN
    return {
        "dice": float(nan_mean(dices)),
        "iou": float(nan_mean(means[:, SCORES.index("iou")])),
        "dice_of_others": float(nan_mean(dices[~lost])),
        "lost": [name for name, is_lost in zip(classes, lost) if is_lost],
    }


def read_run(path: Path) -> Run:
    """Return a run. Raise InputError where fine-tuning did not write the folder."""
    try:
        labels = json.loads((path / "labels.json").read_text(encoding="utf-8"))
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config["strategy"] == "scratch":  # its network knows no t and starts from nothing
            config |= {"t": None, "init": None}
        _ = [config[key] for key in ("init", "t", "lr")]
        setting = (int(labels["n"]), str(config["dice"]), str(config["variant"]))
        slices = sorted((str(case), int(k)) for case, k in labels["slices"])
        facts = (path, setting, int(config["draw"]), float(labels["percent"]), slices, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: labels.json and config.json cannot be used ({type(error).__name__}: {error});"
            " expected what fine-tuning writes; name its run folders only"
        ) from error
    (file,) = tables.score_files([str(path)]).values()
    rows = tables.read_metrics_csv(file)
    cases = sorted({row["case"] for row in rows})
    classes = sorted({row["class"] for row in rows})
    return Run(*facts, cases, classes, over_classes(rows))


def method_names(runs: Sequence[Run]) -> list[str]:
    """Return each run's method: strategy, random start, and what of VARIED tells runs apart."""
    names = []
    for run in runs:
        name = run.config["strategy"]
        if run.config["init"] == "none":
            name += ", random start" if name == "full" else ", random encoder"
        names.append(name)
    for strategy in set(names):
        alike = [i for i, name in enumerate(names) if name == strategy]
        settings = {runs[i].setting for i in alike}
        for key in VARIED:
            values = {(runs[i].setting, str(runs[i].config.get(key))) for i in alike}
            if len(values) > len(settings):
                for i in alike:
                    names[i] += f", {key}={runs[i].config.get(key)}"
    return names


def check_runs(runs: Sequence[Run], methods: Sequence[str]) -> None:
    """Raise InputError unless the runs can be paired.

    All have one test set, no two are one draw of one method, and a draw has the same slices in all
    methods.
    """
    first = runs[0]
    by_method: dict[tuple, Run] = {}
    by_draw: dict[tuple, Run] = {}
    for run, method in zip(runs, methods):
        differ = set(run.cases) ^ set(first.cases) | set(run.classes) ^ set(first.classes)
        if differ:
            raise InputError(
                f"{run.path} and {first.path} were tested on different cases or classes: "
                f"{tables.some(sorted(differ))} in one only; evaluate all on one split"
            )
        n = run.setting[0]
        twin = by_method.setdefault((run.setting, method, run.draw), run)
        if twin is not run:
            raise InputError(
                f"{twin.path} and {run.path} are both draw {run.draw} of {method} with {n} labels; "
                "expected one run a draw; leave one out"
            )
        twin = by_draw.setdefault((n, run.draw), run)
        if twin.slices != run.slices:
            raise InputError(
                f"{twin.path} and {run.path} are both draw {run.draw} of {n} labels but hold "
                "different slices; train both again on one version of the data"
            )


def summarise(runs: Sequence[Run], methods: Sequence[str], against: str) -> list[dict[str, Any]]:
    """Return a row for each setting and method, and its paired differences from `against`.

    dice, iou and dice_of_others are means over the draws, with their _sd; lost is the mean number
    of lost classes; diff_... is the t_interval of the Dice minus that of `against` in the same
    setting, over the draws that both have.
    """
    groups: dict[tuple, dict[int, Run]] = {}
    for run, method in zip(runs, methods):
        groups.setdefault((*run.setting, method), {})[run.draw] = run
    rows = []
    for (n, loss, variant, method), draws in sorted(groups.items()):
        row = {"method": method, "labels": n, "percent": next(iter(draws.values())).percent}
        row |= {"dice_loss": loss, "variant": variant, "draws": len(draws)}
        for key in ("dice", "iou", "dice_of_others"):
            values = [run.scores[key] for run in draws.values()]
            entry = t_interval([value for value in values if not math.isnan(value)])
            row |= {key: entry["mean"], f"{key}_sd": entry["sd"]}
        row["lost"] = sum(len(run.scores["lost"]) for run in draws.values()) / len(draws)
        base = groups.get((n, loss, variant, against), {})
        pairs = [draw for draw in draws if draw in base and method != against]
        differences = [draws[d].scores["dice"] - base[d].scores["dice"] for d in pairs]
        row |= {f"diff_{key}": value for key, value in t_interval(differences).items()}
        rows.append(row)
    return rows


def show(args: Any) -> None:
    """Print both tables; write the CSV and the picture."""
    runs = [read_run(path) for pattern in args.runs for path in tables.paths_of(pattern)]
    methods = method_names(runs)
    check_runs(runs, methods)
    if args.against not in methods:
        raise InputError(
            f"--against {args.against} is no method here; expected one of: "
            f"{' | '.join(sorted(set(methods)))}"
        )
    rows = summarise(runs, methods, args.against)
    if args.csv:
        tables.write_metrics_csv(args.csv, rows, list(rows[0]))
    means = [["method", "labels", "%", "Dice loss", "variant", "draws"]]
    means[0] += ["Dice", "IoU", "Dice without lost", "lost"]
    pairs = [[f"minus {args.against}", "labels", "Dice loss", "variant", "draws"]]
    pairs[0] += ["Dice", "SD", "95 % interval", "above 0"]
    for row in rows:
        setting = [row["method"], str(row["labels"])]
        kind = [row["dice_loss"], row["variant"]]
        cells = [*setting, f"{row['percent']:.3g}", *kind, str(row["draws"])]
        for key in ("dice", "iou", "dice_of_others"):
            cells.append(tables.mean_sd({"mean": row[key], "sd": row[f"{key}_sd"]}, "dice"))
        means.append([*cells, f"{row['lost']:.3g}"])
        if row["method"] == args.against:
            continue
        n = row["diff_n"]
        interval = f"{row['diff_low']:+.3f} to {row['diff_high']:+.3f}" if n > 1 else "no interval"
        cells = [f"{row['diff_mean']:+.3f}" if n else "-", number(row["diff_sd"], "dice")]
        pairs.append([*setting, *kind, str(n), *cells, interval, f"{row['diff_positive']}/{n}"])
    gap = "\n\n" if args.markdown else "\n"
    tables.say(
        f"{tables.layout(means, args.markdown)}{gap}mean±SD over draws of a run's mean over "
        f"{len(runs[0].cases)} cases, then over {len(runs[0].classes)} classes; lost: classes a "
        f"draw with a Dice below {LOST}, which the first two means count"
    )
    if len(pairs) > 1:
        tables.say(
            f"\n{tables.layout(pairs, args.markdown)}{gap}paired over the draws that both have; "
            "95 % t-interval over draws, not over cases"
        )
    if args.plot:
        plot(runs, methods, args.plot)


def plot(runs: Sequence[Run], methods: Sequence[str], path: str) -> None:
    """Draw Dice against the number of labels: a dot a run, a line through a method's means."""
    from common import figures

    losses = {run.setting[1] for run in runs}
    variants = {run.setting[2] for run in runs}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for method, run in sorted(zip(methods, runs), key=lambda pair: (pair[0], pair[1].setting)):
        name = method
        if len(losses) > 1:
            name += f", {run.setting[1]}"
        if len(variants) > 1:
            name += f", {run.setting[2]}"
        labels, dices = curves.setdefault(name, ([], []))
        labels.append(run.setting[0])
        dices.append(run.scores["dice"])
    panels = {"Dice, mean over cases, then classes": curves}
    tables.say(str(figures.lines(path, panels, "", "labelled slices", log=("labelled slices",))))


def make_parser() -> tables.Parser:
    """Return the command line."""
    parser = tables.Parser("python -m results.draws", description=__doc__.split("\n")[0])
    parser.set_defaults(run=show)
    help = "run folder of fine-tuning, or 'runs/x-?' in quotes"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=help)
    help = "method that the differences are from (default scratch)"
    parser.add_argument("--against", default="scratch", metavar="METHOD", help=help)
    help = "draw Dice against labels with all points, as PNG"
    parser.add_argument("--plot", default="", metavar="FILE", help=help)
    help = "write the rows of both tables with all digits"
    parser.add_argument("--csv", default="", metavar="FILE", help=help)
    parser.add_argument("--markdown", action="store_true", help="write the tables as Markdown")
    return parser


def main(argv: Sequence[str]) -> int:
    """Return the exit code."""
    return tables.run("draws", make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
