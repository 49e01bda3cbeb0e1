"""Figure 5 of the PatchDDM paper: scores over sampling steps x size of the ensemble.

    python -m results.patchddm_grid --data hippocampus
    python -m results.patchddm_grid --data hippocampus --sampling-steps 20,10,5 --heun
    python -m results.patchddm_grid --data brats --max-evaluations 0                all cells

Prints Dice and HD95 of each cell with the network evaluations that it costs, draws both as heat
maps, and compares cells that cost the same. A row of the grid goes to OUT/grid.csv as soon as it is
sampled. What stands there for the same network, cases, dtype and sampler is not sampled again, so
the same command continues after an interruption.
"""

import csv
import hashlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchddm
from common import InputError, figures, flags, loaders, runtime, tables
from common.flags import flag
from common.runtime import Ranks, say

NAME = "patchddm_grid"
NETWORK = ("weights", "data", "split", "cases", "content", "dtype", "seed")  # and what it is shown
SAMPLER = ("eta", "heun")
STATISTICS = ["dice_mean", "dice_sd", "hd95_mm_mean", "hd95_mm_sd"]
STATISTICS += ["hd95_pooled_mm_mean", "hd95_pooled_mm_sd"]
COLUMNS = [*NETWORK, *SAMPLER, "sampling_steps", "ensemble", "evaluations", "seconds", *STATISTICS]
Row = dict[str, str]


@dataclass(frozen=True)
class Config(flags.RunFlags):
    """The flags of the grid; the network comes from --checkpoint or --init."""

    sampling_steps: tuple[int, ...] = flag((5, 10, 20, 50, 100, 1000), "rows", "grid", 1, 1000)
    max_evaluations: int = flag(150, "leave out cells that cost more; 0: none", "grid", 0)
    ensemble: int = flag(15, "the last column; those before are 1, 3, 5, 7", "use", 1)
    eta: float = flag(0.0, "noise of a step: 0 DDIM (paper), 1 DDPM", "use", 0, 1)
    heun: bool = flag(False, "second-order steps, 2 S - 1 evaluations", "use")

    @property
    def sizes(self) -> list[int]:
        """The columns. Small ensembles are the first members of the largest one."""
        return sorted({n for n in patchddm.ENSEMBLES if n < self.ensemble} | {self.ensemble})

    def __post_init__(self) -> None:
        flags.check_ranges(self)


def evaluations(steps: int, heun: bool) -> int:
    """Return how often one sample evaluates the network; Heun's last step, to t = 0, does once."""
    return 2 * steps - 1 if heun else steps


def hash_network(network: patchddm.Network) -> str:
    """Return a hash of the weights, of how the network is used, and of the grid it is padded to."""
    names = flags.names(patchddm.Config, "model", "start")
    settings = [(name, getattr(network.config, name)) for name in names]
    digest = hashlib.sha256(repr((settings, list(network.record["least"]))).encode())
    for name, weight in network.model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def hash_cases(data: loaders.Prepared, cases: Sequence[str]) -> str:
    """Return a hash of the cases: names, voxel sizes, images, labels, and the classes scored."""
    digest = hashlib.sha256(repr(data.scored).encode())
    for case in cases:
        digest.update(repr((case, data.spacing(case))).encode())
        for array in (data.image(case), data.label(case)):
            digest.update(repr((array.shape, array.dtype)).encode())
            digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:12]


def key_of(network: patchddm.Network, data: loaders.Prepared, cases: Sequence[str]) -> Row:
    """Return the columns NETWORK and SAMPLER. Rows with the same ones need no new sampling."""
    config = network.config
    return {
        "weights": f"step {network.step} {hash_network(network)}",
        "data": data.name,
        "split": config.split,
        "cases": str(len(cases)),
        "content": hash_cases(data, cases),
        "dtype": str(network.dtype or torch.float32).removeprefix("torch."),
        "seed": str(config.seed),
        "eta": str(config.eta),
        "heun": flags.text(config.heun),
    }


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a grid.csv, none where there is no file. Raise InputError for another."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != COLUMNS:
        raise InputError(
            f"{path} has the columns {reader.fieldnames}, expected {COLUMNS}; "
            "move it away, or use --overwrite"
        )
    return rows


def fill(
    grid: Config,
    network: patchddm.Network,
    data: loaders.Prepared,
    cases: Sequence[str],
    ranks: Ranks,
    path: Path,
) -> tuple[Row, list[Row]]:
    """Sample what is missing in grid.csv. Return the key of this network, and all rows."""
    rows = [] if grid.overwrite else read_rows(path)
    key = key_of(network, data, cases)
    for steps in sorted(set(grid.sampling_steps)):
        cost = evaluations(steps, grid.heun)
        limit = grid.max_evaluations or math.inf
        sizes = [n for n in grid.sizes if n * cost <= limit]
        row_key = {**key, "sampling_steps": str(steps)}
        known = [int(row["ensemble"]) for row in rows if row_key.items() <= row.items()]
        if set(sizes) <= set(known):
            continue
        begin = time.perf_counter()
        config = replace(network.config, sampling_steps=steps, ensemble=max(sizes))
        scores = patchddm.score_cases(replace(network, config=config), data, cases, ranks)
        seconds = time.perf_counter() - begin
        for n, scores_of_size in (scores or {}).items():
            cell = {**row_key, "ensemble": str(n), "evaluations": str(n * cost)}
            rows = [row for row in rows if not cell.items() <= row.items()]
            cell["seconds"] = f"{seconds * n / max(sizes):.1f}"
            mean = tables.summarise(scores_of_size)["mean"]
            for name in STATISTICS:
                score, _, statistic = name.rpartition("_")
                cell[name] = f"{mean[score][statistic]:.6g}"
            rows.append(cell)
        if ranks.first:
            tables.write_metrics_csv(path, rows, COLUMNS)
    return key, rows


def name_of(row: Mapping[str, str]) -> str:
    """Return the sampler in words."""
    if row["heun"] == "on":
        return "heun"
    return "ddim" if float(row["eta"]) == 0 else f"eta {row['eta']}"


def show(grid: Config, key: Row, rows: Sequence[Row], out: Path) -> None:
    """Print Dice and HD95 with the evaluations of each cell, and draw both as heat maps."""
    sampler = name_of(key)
    cells = {}
    for row in rows:
        if key.items() <= row.items():
            cells[int(row["sampling_steps"]), int(row["ensemble"])] = row
    all_steps, sizes = sorted(set(grid.sampling_steps)), grid.sizes
    for score, unit in (("dice", "Dice"), ("hd95_mm", "HD95, mm")):
        values = np.full((len(all_steps), len(sizes)), math.nan)
        texts = [["steps", *(f"ensemble {n}" for n in sizes)]]
        for i, steps in enumerate(all_steps):
            texts.append([str(steps)])
            for j, n in enumerate(sizes):
                text = "-"
                if (steps, n) in cells:
                    row = cells[steps, n]
                    values[i, j] = float(row[f"{score}_mean"])
                    text = f"{tables.number(values[i, j], score)} ({row['evaluations']})"
                texts[-1].append(text)
        say(f"\n{unit} by steps and ensemble, in brackets the network evaluations; {sampler}")
        say(tables.layout(texts))
        costs = [evaluations(steps, grid.heun) for steps in all_steps]
        names = [f"{s} steps, cost {cost}" for s, cost in zip(all_steps, costs)]
        columns = [f"ensemble {n}" for n in sizes]
        file = out / f"figures/grid_{sampler.replace(' ', '')}_{score}.png"
        figures.heat_map(values, names, columns, file, f"{unit}, {sampler}", unit)


def compare(key: Row, rows: Sequence[Row]) -> None:
    """Print beside each other what costs the same number of network evaluations, the best first."""
    same_network = {name: key[name] for name in NETWORK}
    rows = [row for row in rows if same_network.items() <= row.items()]
    for cost in sorted({int(row["evaluations"]) for row in rows}):
        equal = [row for row in rows if int(row["evaluations"]) == cost]
        equal.sort(key=lambda row: -float(row["dice_mean"]))
        texts = []
        for row in equal:
            dice = float(row["dice_mean"])
            texts.append(f"{name_of(row)} {row['sampling_steps']} x {row['ensemble']} {dice:.3f}")
        if len(texts) > 1:
            say(f"Dice at {cost} evaluations (steps x ensemble): {', '.join(texts)}")


def main(argv: Sequence[str]) -> int:
    presets: dict[str, dict[str, Any]] = {name: {} for name in patchddm.PRESETS}
    verbs = {"": ("run", "grid", "use", "evaluate")}
    _, given = flags.parse(Config, argv, verbs, presets, (__doc__ or "").partition("\n\n")[0])
    grid = Config(**given)
    ranks = runtime.start(grid.device)
    own = flags.names(Config, "grid")
    given = {name: value for name, value in given.items() if name not in own}
    network = patchddm.load_network(given, ranks)
    data = loaders.open_data(network.config.data)
    cases, _ = loaders.held_out(network.record, data, grid.split, grid.limit)

    path = network.config.run_folder / "grid.csv"
    key, rows = fill(grid, network, data, cases, ranks, path)
    if ranks.first:
        show(grid, key, rows, path.parent)
        say("")
        compare(key, rows)
        say(f"\nall cells are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run_main(NAME, main, sys.argv[1:]))
