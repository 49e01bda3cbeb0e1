"""Are large classes the easier ones? Spearman's rho of the share of a class against its Dice.

The statistic under table 1 of the recycling papers, whose figure 3 shows the shares. Wants at least
three classes; reads the summary.json of each run, since a metrics.csv has no shares.

    python -m results.class_shares runs/a runs/b --plot classes.png
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from common import InputError, tables
from common.metrics import NAN


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Return rho and its two-sided p: over all pairings for n <= 9 (exact), else by scipy's t.

    The t approximation is too small for few values (n = 8, rho = 0.83: 0.0102, exact 0.0154). NaN
    below three values, and where all of a list are equal.
    """
    n = len(x)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"rho": NAN, "p": NAN, "exact": True}
    rho, p = stats.spearmanr(x, y)
    if n > 9:
        return {"rho": float(rho), "p": float(p), "exact": False}
    ranks_x = stats.rankdata(x) - (n + 1) / 2
    ranks_y = stats.rankdata(y) - (n + 1) / 2

    def strength(ranks: np.ndarray, axis: int) -> np.ndarray:
        return abs((ranks * ranks_y).sum(axis=axis))

    test = stats.permutation_test(
        (ranks_x,), strength, permutation_type="pairings", n_resamples=np.inf, alternative="greater"
    )
    return {"rho": float(rho), "p": float(test.pvalue), "exact": True}


def show(args: Any) -> None:
    """Print rho of each run, and draw Dice over the classes by size."""
    curves = {}
    orders = set()
    for run in [run for pattern in args.runs for run in tables.paths_of(pattern)]:
        file = run / "summary.json" if run.is_dir() else run
        if not file.is_file():
            raise InputError(f"{run} holds no summary.json; run evaluate first")
        summary = tables.read_summary(file)
        dices = {name: entry["dice"]["mean"] for name, entry in summary["classes"].items()}
        shares = {n: s for n, s in summary["share"].items() if not math.isnan(s + dices[n])}
        order = sorted(shares, key=lambda name: shares[name])  # the smallest class first
        test = rank_correlation([shares[n] for n in order], [dices[n] for n in order])
        if math.isnan(test["rho"]):
            tables.say(f"{run}: no order among {len(order)} classes")
        else:
            method = "exact" if test["exact"] else "t approximation"
            tables.say(
                f"{run}: Spearman of class share against Dice {test['rho']:.2f}, "
                f"p = {test['p']:.3g} ({len(order)} classes, {method})"
            )
        curves[str(run)] = (range(1, len(order) + 1), [dices[n] for n in order])
        orders.add(tuple(order))
    if args.plot:
        from common import figures

        if len(orders) > 1:
            raise InputError("the runs differ in the order of the classes by share; plot one each")
        names = ", ".join(f"{i} {name}" for i, name in enumerate(orders.pop(), 1))
        x_name = f"class, smallest share first: {names}"
        tables.say(str(figures.lines(args.plot, {"mean Dice": curves}, "", x_name)))


def make_parser() -> tables.Parser:
    """Return the command line."""
    parser = tables.Parser("python -m results.class_shares", description=__doc__.split("\n")[0])
    parser.set_defaults(run=show)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder or summary.json")
    help = "draw the Dice of the classes by size, as PNG"
    parser.add_argument("--plot", default="", metavar="FILE", help=help)
    return parser


def main(argv: Sequence[str]) -> int:
    """Return the exit code."""
    return tables.run("class_shares", make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
