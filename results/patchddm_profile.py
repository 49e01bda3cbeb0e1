"""Table 1 of the PatchDDM paper: seconds and memory of one network evaluation, on this device.

    python -m results.patchddm_profile --preset paper
    python -m results.patchddm_profile --preset laptop --data hippocampus --method patch --compile

For patches, whole volumes and volumes of half size: forward and backward of one training step, and
one evaluation in sampling. Without --data a whole volume has twice the patch along each axis, four
channels and one class, as in the paper. The rows also go to OUT/profile.csv.
"""

import ctypes
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchddm
from common import InputError, flags, loaders, runtime, tables, unet
from common.flags import flag
from common.runtime import say

NAME = "patchddm_profile"
BRATS = {"channels": ["t1", "t1ce", "t2", "flair"], "classes": {"tumour": 1}}
COLUMNS = ["method", "phase", "form", "input", "seconds", "gb", "total_gb", "note"]
WIDTHS = (8, 10, 13, 18, 9, 8, 10, 0)  # of a printed column


@dataclass(frozen=True)
class Config(patchddm.Config):
    """The flags of the network, and those two of the training that matter here."""

    batch: int = flag(1, "samples of a training step", "profile", 1)
    compile: bool = flag(False, "also measure the compiled network in training", "profile")

    script = NAME


def resident_gb(key: str) -> float:
    """Return the resident memory of this process on Linux: VmRSS, or its peak VmHWM."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0]) / 1e9


def start_peak(device: torch.device) -> float:
    """Let the peak of memory begin anew. Return the GB in use now, NaN where nobody tells."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e9
    if device.type == "cpu":
        # A call that takes memory which earlier ones have freed would look frugal: it goes back to
        # the system first. This is glibc's and Linux's; other systems raise one of these errors.
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            return resident_gb("VmRSS")
    return math.nan


def measure(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the seconds of call(), and the GB of its peak above those in use before.

    CUDA: memory of tensors. CPU: resident memory of the process, in which are also the copies that
    kernels make for themselves.
    """
    before = start_peak(device)
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
    seconds = time.perf_counter() - begin
    peak = math.nan
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
    elif not math.isnan(before):
        peak = resident_gb("VmHWM")
    del result  # not earlier, since it is a part of the peak
    return seconds, peak - before


def evaluate_once(
    config: patchddm.Config,
    record: dict[str, Any],
    phase: str,
    form: str,
    size: Sequence[int],
    device: torch.device,
) -> dict[str, str]:
    """Return the seconds of one evaluation, its GB, and its GB with what is held all the time.

    size: of the input in voxels. Raises InputError, or torch's error, where memory is too small.
    """
    training = phase == "training"
    dtype, _ = runtime.autocast_dtype(config.amp, device)
    model = patchddm.network_for(config, record)
    shape = (config.batch if training else 1, model.in_channels, *size)
    runtime.check_memory(model, shape, dtype, device, training, "measure on another device")
    model = unet.fast_layout(model.to(device)).train(training).requires_grad_(training)
    net: Any = torch.compile(model) if config.compile else model
    x = torch.zeros(shape, device=device)
    index = torch.zeros(shape[0], device=device)

    def call() -> None:
        # The lean form writes into tensors that nobody reads again. The plain form of sampling has
        # gradients switched on, so it does not; but no weight wants one, so it keeps nothing.
        grad = torch.set_grad_enabled(form != "lean")
        with grad, torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = net(x, index)
        if training:
            output.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

    trials = [measure(call, device)]  # it also warms up, or compiles
    if config.compile or trials[0][0] < 5:
        trials = [measure(call, device) for _ in range(3)]
    seconds = float(np.median([seconds for seconds, _ in trials]))
    memory = max(gb for _, gb in trials)
    # Weights are there before, in training also two moments of AdamW; gradients are in the peak.
    held = 4 * sum(p.numel() for p in model.parameters()) / 1e9
    total = memory + held * (3 if training else 1)
    return {"seconds": f"{seconds:.3f}", "gb": f"{memory:.2f}", "total_gb": f"{total:.2f}"}


def whole_size(config: patchddm.Config, data: loaders.Prepared | None) -> tuple[int, ...]:
    """Return the voxels of the network's input for a whole volume: the largest training case."""
    shapes = [tuple(2 * n for n in config.patch_size)]  # the paper: 256 and 128
    grid: dict[str, Any] = {}
    if data is not None:
        shapes = [data.shape(case) for case in data.cases("train")]
        grid = {"grid": data.meta.get("grid")}
    largest = [max(sides) for sides in zip(*shapes)]
    least = patchddm.least_grid(config, grid, shapes)
    size = patchddm.padded_shape(largest, config.multiple, least)
    return tuple(n // 2 for n in size) if config.half else size


def say_row(cells: Sequence[str]) -> None:
    say("".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS)).rstrip())


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n\n")[0]
    verbs = {"": ("run", "model", "start", "profile")}
    _, given = flags.parse(Config, argv, verbs, patchddm.PRESETS, about)
    config = flags.configure(Config, patchddm.PRESETS, given)
    device = runtime.start(config.device).device
    data = loaders.open_data(config.data) if "data" in given else None
    record = BRATS if data is None else loaders.data_record(data)
    methods = [config.method] if "method" in given else ["patch", "full", "half"]
    forms = [("training", "plain"), ("training", "--recompute")]
    if config.compile:
        forms.append(("training", "--compile"))
    forms += [("sampling", "plain"), ("sampling", "lean")]

    rows: list[dict[str, str]] = []
    say_row(COLUMNS)
    for method, (phase, form) in product(methods, forms):
        setting = replace(config, method=method)  # type: ignore[arg-type]
        setting = replace(setting, recompute=form == "--recompute", compile=form == "--compile")
        size = whole_size(setting, data)
        if method == "patch" and phase == "training":
            size = setting.patch_size
        batch = config.batch if phase == "training" else 1
        row = dict.fromkeys(COLUMNS, "")
        row |= {"method": method, "phase": phase, "form": form}
        row["input"] = "x".join(map(str, (batch, *size)))
        try:
            row |= evaluate_once(setting, record, phase, form, size, device)
        except InputError as error:
            row["note"] = str(error).partition(";")[0]
        except (RuntimeError, MemoryError) as error:
            if not runtime.out_of_memory(error):
                raise
            row["note"] = "out of memory"
        say_row(list(row.values()))
        rows.append(row)
        tables.write_metrics_csv(config.run_folder / "profile.csv", rows, COLUMNS)
    say("\ngb: above the weights; total_gb: with the weights, and with AdamW's moments in training")
    say(f"written to {config.run_folder / 'profile.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run_main(NAME, main, sys.argv[1:]))
