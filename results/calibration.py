"""Does a run know where it is wrong? Confidence and entropy of its result against its errors.

For results/diffseg3d_uncertainty.md: what a diffusion model's spread is worth beside a U-net's
softmax, and one network's members beside several networks. Runs are evaluated with --save maps
before, which leaves OUT/predictions/maps/CASE_mean_CLASS.nii.gz.

    python -m results.calibration runs/a 'runs/b-?'            quoted: their mean probability
    python -m results.calibration runs/a --plot errors.png     share of errors by entropy

ECE    expected calibration error (Guo et al. 2017): over ten bins of the confidence, which is the
       largest probability, the mean of |accuracy - confidence|, weighted by the voxels of a bin
AUROC  probability that a wrong voxel has more entropy than a right one, ties count half
rho    Spearman's over the cases, between the mean entropy and the mean Dice of the foreground
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage, special, stats

from common import InputError, loaders, metrics, tables
from common.metrics import NAN

Case = tuple[np.ndarray, np.ndarray, Sequence[float]]


def calibration(cases: Iterable[Case], margin_mm: float = 3.0) -> dict[str, Any]:
    """Return how well probabilities tell errors, near the foreground of the truth or the result.

    Far background is left out: it is right and sure, and nearly all of a volume. cases: (prob
    [C, X, Y, Z] that sums to 1, background first; truth [X, Y, Z]; spacing in mm). Returns ece,
    auroc (NaN without right or wrong voxels), error (share of wrong voxels), rho and its p, n
    cases, and bins: (mean entropy, share of wrong voxels, share of voxels) for tenths of the
    entropy, which is divided by log C. A case without any foreground is left out.
    """
    entropies = []
    confidences = []
    wrongs = []
    case_entropy = []
    case_dice = []
    for prob, truth, spacing in cases:
        result = prob.argmax(axis=0)
        background = (truth == 0) & (result == 0)
        if background.all():
            continue
        near = ndimage.distance_transform_edt(background, spacing) <= margin_mm
        entropies.append(special.entr(prob[:, near]).sum(axis=0) / math.log(len(prob)))
        confidences.append(prob[:, near].max(axis=0))
        wrongs.append((result != truth)[near])
        dices = [metrics.dice(result == c, truth == c) for c in range(1, len(prob))]
        case_entropy.append(entropies[-1].mean())
        case_dice.append(tables.nan_mean(np.array(dices)))
    if not entropies:
        raise InputError("no case has foreground, in the truth or in the result; check the run")
    entropy = np.concatenate(entropies)
    confidence = np.concatenate(confidences)
    wrong = np.concatenate(wrongs)

    ece = 0.0
    for inside in tenths(confidence):
        ece += abs((~wrong[inside]).mean() - confidence[inside].mean()) * inside.mean()
    bins = []
    for inside in tenths(entropy):
        bins.append((entropy[inside].mean(), wrong[inside].mean(), inside.mean()))
    auroc = NAN
    if wrong.any() and not wrong.all():
        pairs = wrong.sum() * (~wrong).sum()
        auroc = stats.mannwhitneyu(entropy[wrong], entropy[~wrong]).statistic / pairs
    rho, p = NAN, NAN
    if len(case_dice) > 2:
        rho, p = stats.spearmanr(case_entropy, case_dice)
    scores = {"ece": ece, "error": wrong.mean(), "auroc": auroc, "rho": rho, "p": p}
    return {**scores, "n": len(case_dice), "bins": bins}


def tenths(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield which values, in [0, 1], lie in each tenth that holds any."""
    index = np.clip((values * 10).astype(int), 0, 9)
    for k in range(10):
        if (index == k).any():
            yield index == k


def read_cases(runs: Sequence[Path], data: str) -> Iterator[Case]:
    """Yield the mean probability over the runs, the truth and the spacing of each case.

    data: --data of the truth; empty: as in the first run's config.json. Raises InputError where
    the runs hold no maps, or maps of different cases or grids.
    """
    config = runs[0] / "config.json"
    try:
        data = data or json.loads(config.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config} names no data ({error}); name it with --data") from error
    truth = loaders.open_data(data)
    names = loaders.file_names(["background", *truth.classes]).values()
    ending = "_mean_background.nii.gz"
    cases: list[list[str]] = []
    for run in runs:
        files = sorted((run / "predictions/maps").glob(f"*{ending}"))
        cases.append([file.name.removesuffix(ending) for file in files])
        if not cases[-1] or cases[-1] != cases[0]:
            raise InputError(
                f"{run}/predictions/maps has {len(cases[-1])} cases with probabilities, {runs[0]} "
                f"{len(cases[0])}; expected the same in all runs; evaluate with --save maps"
            )
    for case in cases[0]:
        label = np.asarray(truth.label(case))
        prob = np.zeros((len(names), *label.shape))
        for run in runs:
            for c, name in enumerate(names):
                file = run / f"predictions/maps/{case}_mean_{name}.nii.gz"
                values = loaders.read_nifti(file).data
                if values.shape != label.shape:
                    raise InputError(
                        f"{file} has a grid of {values.shape}, the truth of {label.shape}; "
                        "name the data that evaluate scored with --data"
                    )
                prob[c] += values / len(runs)
        yield prob, label, truth.spacing(case)


def show(args: Any) -> None:
    """Print a row for each run, or set of runs whose probabilities are averaged."""
    if args.margin < 0:
        raise InputError(f"--margin is {args.margin:g}; expected mm of 0 or more")
    rows = [["run", "runs", "n", "ECE", "wrong", "AUROC of entropy", "rho entropy, Dice", "p"]]
    curves = {}
    for pattern in args.runs:
        runs = tables.paths_of(pattern)
        scores = calibration(read_cases(runs, args.data), args.margin)
        cells = [f"{scores[key]:.3f}" for key in ("ece", "error", "auroc")]
        cells += [f"{scores['rho']:.2f}", f"{scores['p']:.2g}"]
        cells = ["-" if cell == "nan" else cell for cell in cells]
        rows.append([pattern, str(len(runs)), str(scores["n"]), *cells])
        enough = [entry for entry in scores["bins"] if entry[2] >= 0.001]  # not of a few voxels
        percent = [100 * entropy for entropy, _, _ in enough]
        curves[Path(pattern).name] = (percent, [error for _, error, _ in enough])
    gap = "\n\n" if args.markdown else "\n"
    tables.say(
        f"{tables.layout(rows, args.markdown)}{gap}voxels within {args.margin:g} mm of true "
        "or found foreground; p: t approximation over cases"
    )
    if args.plot:
        from common import figures

        x_name = "entropy of the probabilities, % of the largest possible"
        tables.say(str(figures.lines(args.plot, {"share of wrong voxels": curves}, "", x_name)))


def make_parser() -> tables.Parser:
    """Return the command line."""
    parser = tables.Parser("python -m results.calibration", description=__doc__.split("\n")[0])
    parser.set_defaults(run=show)
    help = "run folder evaluated with --save maps; 'runs/x-?' in quotes: their mean probability"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=help)
    help = "prepared data of the truth; default: the run's own"
    parser.add_argument("--data", default="", metavar="NAME", help=help)
    help = "round the foreground, in mm (default 3)"
    parser.add_argument("--margin", type=float, default=3.0, metavar="MM", help=help)
    help = "draw the share of errors by entropy, as PNG"
    parser.add_argument("--plot", default="", metavar="FILE", help=help)
    parser.add_argument("--markdown", action="store_true", help="write the table as Markdown")
    return parser


def main(argv: Sequence[str]) -> int:
    """Return the exit code."""
    return tables.run("calibration", make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
