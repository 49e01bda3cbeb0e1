"""Where a program runs and what it leaves behind: processes, device, one run folder, checkpoints.

The training loop, its data parallelism and its mixed precision stand in the scripts. `Run` owns a
folder; it knows no network, no loss and no loop, and calls nothing back.
"""

import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm import tqdm

from common import InputError, atomic_write, flags, loaders, unet, version

FORMAT = 2  # of checkpoints; raised when an old program could misread a new file
KEYS = ("format", "script", "config", "model", "ema", "optimizer", "step", "best", "data")
LOG_EVERY = 50  # steps
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]

# --------------------------------------------------------------------------------------------------
# Processes, device, precision, memory
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The place of this process among those that torchrun has started."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def merge(self, rows: dict) -> dict:
        """Return the entries of all processes' dicts in one."""
        merged = {}
        for part in self.gather(rows):
            merged.update(part)
        return merged

    def share(
        self, cases: Sequence[str], quiet: bool = True, stopped: Callable[[], bool] | None = None
    ) -> Iterator[str]:
        """Yield the cases of this process, under a bar; it ends early when all are to stop."""
        turns = range(self.rank, self.rank + len(cases), self.world)  # as many on each process
        hide = quiet or not self.first
        for i in tqdm(turns, desc="cases", leave=False, disable=hide or None):
            if stopped is not None and stopped():
                return
            if i < len(cases):
                yield cases[i]

    def max(self, *numbers: float) -> list[float]:
        """Return the largest of each number over all processes."""
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start(device: str) -> Ranks:
    """Choose the device and join the other processes. device: auto | cpu | cuda | cuda:N | mps."""
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = "cpu"
        if torch.backends.mps.is_available():
            device = "mps"
        if torch.cuda.is_available():
            device = "cuda"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise InputError(f"--device is {device}; expected auto, cpu, cuda, cuda:N or mps")
    if index and world > 1:
        raise InputError(
            f"--device {device} names one GPU for {world} processes; use --device cuda, "
            "and CUDA_VISIBLE_DEVICES to choose the GPUs"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: no such device here; use --device cpu")
    if kind == "cuda":
        number = int(index or local)
        if number >= torch.cuda.device_count():
            raise InputError(
                f"--device {device}: process {rank} needs GPU {number}, "
                f"{torch.cuda.device_count()} are here; use --device cpu, or fewer processes"
            )
        device = f"cuda:{number}"
        torch.cuda.set_device(number)
    if world > 1 and not dist.is_initialized():
        # A process waits while another one samples; torchrun itself ends all when one fails.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Ranks(rank, world, torch.device(device))


def autocast_dtype(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return autocast's dtype for --amp, None for fp32, and the reason in words."""
    if amp != "auto":
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
        return dtypes[amp], f"{'fp32' if amp == 'off' else amp}, as --amp says"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "bf16, in which the GPU computes"
        return torch.float16, "fp16, since the GPU has no bf16"
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        features = cpuinfo.read_text() if cpuinfo.exists() else ""
        if "avx512_bf16" in features or "amx_bf16" in features:
            return torch.bfloat16, "bf16, in which the CPU computes"
    return None, "fp32, since the device has no bf16"


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory so far in GB: of tensors on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory_gb(device: torch.device) -> float:
    """Return the memory in GB that new tensors could take; inf where nobody tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) / 1e9
    free = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):  # a container's limit; file pages can go
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free / 1e9


def check_memory(
    model: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device,
    training: bool,
    remedy: str,
) -> None:
    """Raise InputError where model(x, t), x of this shape, needs more memory than is free.

    It runs on the device `meta`, whose tensors have a shape and no storage. Training needs what
    autograd keeps, and 16 bytes a parameter. Sampling needs about four maps of the largest size.
    """
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def largest(module: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes[0] = max(sizes.get(0, 0), 4 * output.untyped_storage().nbytes())

    bare = copy.deepcopy(model).to("meta", dtype or torch.float32)
    x = torch.empty(tuple(shape), dtype=dtype or torch.float32, device="meta")
    t = torch.zeros(shape[0], device="meta")
    if training:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            kept = bare.train()(x, t)
        del kept
    else:
        for module in bare.modules():
            module.register_forward_hook(largest)
        with torch.no_grad():
            bare(x, t)
    weights = sum(p.numel() for p in model.parameters())
    needed = (sum(sizes.values()) + (16 if training else 4) * weights) / 1e9
    free = free_memory_gb(device)
    if needed > free:
        raise InputError(
            f"{'training' if training else 'sampling'} on {' x '.join(map(str, shape))} needs "
            f"about {needed:.1f} GB, {device} has {free:.1f} GB free; {remedy}"
        )


# --------------------------------------------------------------------------------------------------
# Randomness as a function of numbers: the same on one process and on eight, and when continued
# --------------------------------------------------------------------------------------------------


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that is a function of its parts alone, e.g. (seed, "noise", n)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def noise(
    seed: int, name: str, ns: Sequence[int], shape: Sequence[int], device: torch.device
) -> Tensor:
    """Return standard normal noise [B, *shape] on the device, a function of (seed, name, n)."""
    generator = torch.Generator(device)
    samples = []
    for n in ns:
        generator.manual_seed(seed_of(seed, name, n))
        samples.append(torch.randn(*shape, device=device, generator=generator))
    return torch.stack(samples)


class Shards(Sampler):
    """The sample numbers of this process, one list a forward pass.

    Step s of the training has the samples s B to s B + B - 1; each process takes its share of them,
    in `accumulate` parts. So processes, workers and restarts do not change what a step sees.
    """

    def __init__(self, batch: int, accumulate: int, ranks: Ranks, step: int, steps: int):
        self.batch, self.accumulate, self.ranks = batch, accumulate, ranks
        self.step, self.steps = step, steps

    def __iter__(self) -> Iterator[list[int]]:
        part = self.batch // (self.ranks.world * self.accumulate)
        for step in range(self.step, self.steps):
            for k in range(self.accumulate):
                first = step * self.batch + (self.ranks.rank * self.accumulate + k) * part
                yield list(range(first, first + part))


def share_batch(config: Any, given: Mapping[str, Any], ranks: Ranks) -> Any:
    """Return the config with a batch that all processes and parts can share.

    A preset's batch is raised. Raises InputError for one that was given.
    """
    parts = ranks.world * config.accumulate
    batch = math.ceil(config.batch / parts) * parts
    if batch == config.batch:
        return config
    if "batch" in given:
        raise InputError(
            f"--batch {config.batch} cannot be shared by {ranks.world} processes x "
            f"--accumulate {config.accumulate}; use a multiple of {parts}, such as {batch}"
        )
    say(f"note: the batch is raised from {config.batch} to {batch}, so that all have work", ranks)
    return dataclasses.replace(config, batch=batch)


def same_weights(model: nn.Module, ranks: Ranks, when: str) -> None:
    """Raise InputError where the processes do not hold the same weights."""
    if ranks.world == 1:
        return
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().to("cpu", torch.float32).numpy().tobytes())
    if len(set(ranks.gather(digest.hexdigest()))) > 1:
        raise InputError(
            f"the processes hold different weights {when}; all machines must see the same --out, "
            "data and program"
        )


# --------------------------------------------------------------------------------------------------
# One run, one folder
# --------------------------------------------------------------------------------------------------

COLUMNS = ["step", "seconds", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "lr", "grad_norm"]
COLUMNS += ["samples_per_s", "memory_gb", "left_s", "skipped"]
RUN_FILES = {"config.json", "log.csv", "last.pt", "last.prev.pt", "best.pt", "summary.json"}
RUN_FILES |= {"metrics.csv", "loss.png"}
RUN_FOLDERS = {"figures", "predictions"}


class Run:
    """A run folder: config.json, log.csv, last.pt, last.prev.pt, best.pt, and the signals to stop.

    config: has run_folder, overwrite, quiet, steps, minutes and batch. record: of the data.
    columns: of log.csv, besides the usual ones.
    """

    def __init__(
        self, config: Any, script: str, record: dict, ranks: Ranks, columns: Sequence[str] = ()
    ):
        self.config, self.script, self.record, self.ranks = config, script, record, ranks
        self.out = Path(config.run_folder)
        self.columns = [*COLUMNS, *columns]
        self.parts: dict[str, Any] = {}
        self.seconds = 0.0  # of training, over all restarts
        self.best = -math.inf  # the highest score of a validation
        self.validated = 0  # the newest step that was validated
        self.stale = 0  # validations since the best one
        self.skipped = 0  # steps without a finite gradient
        self.skipped_in_a_row = 0
        self.losses = torch.zeros(2, 4, device=ranks.device)  # sums and counts by quartile of t
        self.logged = (0, 0.0)  # step and seconds of the newest row
        self.time_up = False
        self.signal = 0
        self.interrupted = 0.0
        self.handlers = {n: signal.signal(n, self._stop) for n in SIGNALS if not _ignored(n)}
        if ranks.first:
            _claim(self.out)
            if config.overwrite:
                _clear(self.out)
        ranks.barrier()

    def keep(self, **parts: Any) -> None:
        """Say what a checkpoint holds: anything with state_dict and load_state_dict."""
        self.parts = parts

    def resume(self) -> int:
        """Load the newest whole checkpoint into what is kept. Return its step, 0 for a new run.

        Raises InputError where the folder's run has other settings, other data or more steps.
        """
        config, step = self.config, 0
        state = newest_checkpoint(self.out, self.script, self.ranks)
        if state is not None:
            step = state["step"]
            self._check(state)
            for name, part in self.parts.items():
                if state.get(name):  # a scaler's is empty where --amp has changed
                    part.load_state_dict(state[name])
            for name in ("seconds", "best", "validated", "stale", "skipped"):
                setattr(self, name, state[name])
        if self.ranks.first:
            content = {**dataclasses.asdict(config), "made_by": made_by(self.ranks.device)}
            text = json.dumps(content, indent=1) + "\n"
            atomic_write(self.out / "config.json", text.encode())
            self._write_log(read_log(self.out / "log.csv", step))
        self.logged = (step, self.seconds)
        hide = config.quiet or not self.ranks.first
        self.bar = tqdm(total=config.steps, initial=step, unit="step", disable=hide or None)
        if step >= config.steps:
            say(f"{self.out} has made all of its {step} steps", self.ranks)
        return step

    def _check(self, state: dict) -> None:
        """Raise InputError where this checkpoint cannot be continued with this config and data."""
        steps, before = self.config.steps, state["config"]["steps"]
        flags.check_same(self.config, state["config"], self.out)
        differ = [k for k in self.record if state["data"].get(k) != self.record[k]]
        if differ:
            raise InputError(
                f"{self.out} was trained on data with other {', '.join(differ)}; "
                "use another --out, or --overwrite"
            )
        if state["step"] > steps:
            raise InputError(
                f"{self.out} has made {state['step']} steps, more than --steps {steps}; "
                "ask for at least as many, or use another --out, or --overwrite"
            )
        if not state["optimizer"]:
            raise InputError(
                f"{self.out}/last.pt holds no optimiser (a copy of best.pt?) and cannot be "
                "continued; evaluate it, or begin in another --out"
            )
        if before != steps:
            text = f"note: --steps was {before} and is {steps}; a learning rate that falls until "
            say(text + "the last step is that of the new length from here on", self.ranks)

    def print_header(
        self, title: str, data: Any, model: nn.Module, step: int, reason: str, differs: str
    ) -> None:
        """Print what this run is before it starts."""
        config, device = self.config, self.ranks.device
        counts = ", ".join(f"{len(data.cases(s))} {s}" for s in data.meta["splits"])
        differs = f"  differs   {differs or 'in nothing'} (in brackets the paper)"
        parts = self.ranks.world * config.accumulate
        say(
            f"{title} -> {self.out}\n"
            f"  data      {data.name}: {counts}; {', '.join(data.channels)}; "
            f"classes {', '.join(data.classes)}\n"
            f"  network   {sum(p.numel() for p in model.parameters()):,} parameters\n"
            f"  training  step {step} to {config.steps}, batch {config.batch} = {self.ranks.world} "
            f"processes x {config.accumulate} parts x {config.batch // parts}\n"
            f"  device    {device}, {reason}, {peak_memory_gb(device):.1f} GB\n"
            + textwrap.fill(differs, 100, subsequent_indent=12 * " "),
            self.ranks,
        )

    def save(self, step: int, name: str = "last.pt") -> None:
        """Write last.pt, whose predecessor is kept, or best.pt, which cannot be continued."""
        if not self.ranks.first:
            return
        state = {
            "format": FORMAT,
            "script": self.script,
            "config": dataclasses.asdict(self.config),
            "data": self.record,
            "made_by": made_by(self.ranks.device),
            "step": step,
            "seconds": self.seconds,
            "best": self.best,
            "validated": self.validated,
            "stale": self.stale,
            "skipped": self.skipped,
        }
        for key, part in self.parts.items():
            needed = name == "last.pt" or key in ("model", "ema")
            state[key] = part.state_dict() if needed else {}
        previous = self.out / "last.prev.pt" if name == "last.pt" else None
        atomic_write(self.out / name, lambda file: torch.save(state, file), previous)

    def save_best(self, step: int, score: float) -> None:
        """Take the score of a validation; write best.pt where it is above all before."""
        self.validated = step
        self.stale += 1
        if score > self.best:
            self.best, self.stale = score, 0
            self.save(step, "best.pt")
        self.save(step)

    def stopped(self) -> bool:
        """Return whether any process got a signal, and set time_up, the same on all of them."""
        limit = 60 * self.config.minutes or math.inf
        number, late = self.ranks.max(self.signal, self.seconds >= limit)
        self.signal, self.time_up = int(number), bool(late)
        return self.signal > 0

    def count_skip(self, step: int, finite: bool) -> None:
        """Count the steps that changed nothing. Raises InputError after 20 in a row."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 20:
            raise InputError(
                f"no finite gradient in 20 steps before step {step}; use --amp off, "
                "or begin anew with a lower --lr"
            )

    def collect(self, loss: Tensor, level: Tensor) -> None:
        """Add the losses of samples, [B], with noise of the level t / T in (0, 1], [B]."""
        quartile = (level.to(loss.device) * 4).ceil().long().clamp(1, 4) - 1
        finite = loss.isfinite()
        pair = torch.stack([loss.detach().where(finite, 0), finite.to(loss.dtype)])
        self.losses.index_add_(1, quartile, pair.to(self.losses.dtype))

    def log(self, step: int, **numbers: Any) -> None:
        """Write and print a row where one is due: every 50 steps, at step 10 and at the end."""
        self.bar.update()
        end = step == self.config.steps or self.time_up or self.signal
        if step % LOG_EVERY and step != 10 and not end:
            return
        if self.ranks.world > 1:
            dist.all_reduce(self.losses)
        total, count = self.losses.tolist()  # a GPU is waited for only here
        self.losses.zero_()
        rate = (step - self.logged[0]) / max(self.seconds - self.logged[1], 1e-9)
        self.logged = (step, self.seconds)
        left = (self.config.steps - step) / rate
        row = {"loss": sum(total) / max(sum(count), 1), **numbers}
        row |= {f"loss_q{i + 1}": total[i] / count[i] for i in range(4) if count[i]}
        row |= {"samples_per_s": rate * self.config.batch, "left_s": left, "skipped": self.skipped}
        row["memory_gb"] = peak_memory_gb(self.ranks.device)
        self.write_row(step, **row)
        if not self.config.quiet:
            line = f"step {step}/{self.config.steps}  loss {row['loss']:.3g}  lr {row['lr']:.1e}  "
            line += f"{rate:.2g}/s  {row['memory_gb']:.1f} GB  {duration(left)} left"
            say(line, self.ranks)

    def write_row(self, step: int, **numbers: Any) -> None:
        """Append a row to log.csv; a column without a number stays empty."""
        if not self.ranks.first:
            return
        row = {"step": step, "seconds": self.seconds, **numbers}
        cells = [row.get(column, "") for column in self.columns]
        texts = [cell if isinstance(cell, int | str) else f"{float(cell):.6g}" for cell in cells]
        try:
            with open(self.out / "log.csv", "a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(texts)
        except OSError as error:
            raise InputError(
                f"{self.out}/log.csv: {error.strerror}; free space, then run again"
            ) from error

    def _write_log(self, rows: Sequence[Mapping[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, "", "ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.out / "log.csv", text.getvalue().encode())

    def _stop(self, number: int, frame: Any) -> None:
        """Remember a signal. A second Ctrl-C ends at once, but for torchrun, which repeats it."""
        if number == signal.SIGINT and self.ranks.world == 1:
            now = time.monotonic()
            if self.interrupted and now - self.interrupted > 1:
                raise KeyboardInterrupt
            if not self.interrupted:
                self.interrupted = now
                text = b"\nstopping after this step; Ctrl-C again stops at once, without saving\n"
                with contextlib.suppress(OSError):
                    os.write(2, text)  # print may be at work just now
        self.signal = max(self.signal, number)

    def finish(self, step: int) -> int:
        """Close the bar, release the folder and the signals. Return 0, or 128 + signal."""
        self.bar.close()
        if self.out.resolve() in _held:
            os.close(_held.pop(self.out.resolve()))
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if not self.signal:
            return 0
        say(f"stopped; step {step} is saved in {self.out}, the same command continues", self.ranks)
        return 128 + self.signal


def _ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN  # as nohup wants it


def read_log(path: Path, step: int) -> list[dict[str, str]]:
    """Return the rows of a log.csv up to a step; damaged ones are left out."""
    if not step or not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        lines = [line.replace("\0", "") for line in file]
    rows = csv.DictReader(lines, quoting=csv.QUOTE_NONE)
    return [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= step]


def made_by(device: torch.device) -> dict[str, str]:
    """Return who made a file: the command, the versions, the device, the time."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": command, **version(), "device": str(device), "date": date}


_held: dict[Path, int] = {}  # run folders that this process writes to -> open handle


def _lock(folder: Path) -> int | None:
    """Return a handle that locks a folder until it is closed; None where another process has it.

    It locks on one machine only, and not at all on Windows and some network drives.
    """
    try:
        import fcntl
    except ImportError:
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass  # a file system without locks
    return handle


def _claim(out: Path) -> None:
    """Make a run folder and lock it. Raises InputError where another run writes to it."""
    if Path.cwd().resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out {out} is the folder you are in, or above it; name another one")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be made ({error.strerror}); choose another"
        ) from error
    if out.resolve() not in _held:
        handle = _lock(out)
        if handle is None:
            raise InputError(f"another run is writing to {out}; wait for it, or use another --out")
        _held[out.resolve()] = handle


def _clear(out: Path) -> None:
    """Delete the run in a folder, and runs and scores below it. What no run wrote is left alone."""
    if out.is_symlink():
        raise InputError(f"--out {out} is a link, which --overwrite leaves alone; name the folder")
    names = {f.name for f in out.iterdir() if not f.name.startswith(".")}
    if names and not names & RUN_FILES:
        raise InputError(f"{out} holds files but no run, and is left alone; use another --out")
    for config in out.glob("*/**/config.json"):
        handle = _lock(config.parent)
        if handle is None and config.parent.resolve() not in _held:
            raise InputError(f"another run is writing to {config.parent}; wait for it")
        if handle is not None:
            os.close(handle)
    # config.json goes last, so that a removal that was stopped can be repeated.
    for file in sorted(out.iterdir(), key=lambda f: f.name == "config.json"):
        if file.is_dir() and not file.is_symlink():
            if file.name in RUN_FOLDERS or {f.name for f in file.iterdir()} & RUN_FILES:
                shutil.rmtree(file)
        elif file.name in RUN_FILES or file.suffix in (".pt", ".csv", ".tmp"):
            file.unlink()


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


class DamagedError(InputError):
    """A checkpoint that was not written, or not read, to its end."""


def load_tensors(path: Path | str) -> Any:
    """Read a file of torch.save. No code in it is run. Raises InputError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; train first, or name another checkpoint")
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise DamagedError(f"{path} is damaged ({damaged}); use another file")
    except zipfile.BadZipFile:
        pass  # torch's older format, or none at all
    except (NotImplementedError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise DamagedError(f"{path} is damaged ({first_line(error)}); use another file") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"{path} is no checkpoint, or holds more than tensors and plain values, and was not "
            f"opened ({first_line(error)}); use a file written by this program"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise DamagedError(
            f"{path} is damaged or no checkpoint ({first_line(error)}); use another file"
        ) from error


def load_checkpoint(path: Path | str, script: str) -> dict[str, Any]:
    """Read one of our checkpoints. Raises InputError for damage, and for another script's."""
    state = load_tensors(path)
    if not isinstance(state, dict) or "format" not in state:
        raise InputError(f"{path} is not written by this program; public weights go to --init")
    if state["format"] != FORMAT:
        raise InputError(
            f"{path} has format {state['format']}, this program reads {FORMAT}; "
            "use the version of the program that wrote it"
        )
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise DamagedError(f"{path} lacks {', '.join(missing)}; use another file")
    if state["script"] != script:
        raise InputError(
            f"{path} belongs to {state['script']}.py, this is {script}.py; choose another"
        )
    return state


def load_start(
    path: str, script: str, model: nn.Module | None = None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the weights of --init and, where the file is one of our checkpoints, its config.

    They are loaded into `model`, where it is given. Raises InputError where they do not fit.
    """
    state, config = load_tensors(path), None
    if isinstance(state, dict) and "format" in state:
        checkpoint = load_checkpoint(path, script)
        state, config = checkpoint["ema"] or checkpoint["model"], checkpoint["config"]
    if model is not None:
        load_weights(model, state, path)
    return state, config


def load_weights(model: nn.Module, state: dict[str, Tensor], path: object) -> None:
    """Load weights, ours or public ones. Raises InputError where they do not fit."""
    try:
        unet.load_public(model, state)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} does not fit the network: {error}") from error


def with_start(config: Any, given: Mapping[str, Any], script: str) -> Any:
    """Return the config with the network of --init, but for flags that are given.

    Shapes tell the sizes of public weights, but not the flags of part `start`: raises InputError
    where one of these is not given.
    """
    weights, saved = load_start(config.init, script)
    if saved is None:
        try:
            saved = unet.sizes_of(weights)
        except (KeyError, IndexError, AttributeError) as error:
            text = f"--init {config.init} is no U-Net of this kind: it lacks {error}"
            raise InputError(text) from error
        untold = flags.names(type(config), "start")
        missing = [flags.word(name) for name in untold if name not in given]
        if missing:
            text = f"--init {config.init} does not tell {', '.join(missing)} of its network"
            raise InputError(f"{text}; add {missing[0]}, which its authors state")
    fixed = {n: saved[n] for n in flags.names(type(config), "model", "start") if n in saved}
    return dataclasses.replace(config, **{n: given.get(n, value) for n, value in fixed.items()})


def newest_checkpoint(out: Path, script: str, ranks: Ranks) -> dict[str, Any] | None:
    """Read last.pt, or last.prev.pt where last.pt is damaged or gone. None: a new run."""
    last, previous = out / "last.pt", out / "last.prev.pt"
    if last.exists():
        try:
            return load_checkpoint(last, script)
        except DamagedError as error:
            if not previous.exists():
                raise
            say(f"note: {error}", ranks)
    if previous.exists():
        say(f"note: continuing from {previous}", ranks)
        return load_checkpoint(previous, script)
    if (out / "best.pt").exists():
        raise InputError(
            f"{out} holds best.pt but no last.pt to continue from; evaluate it, "
            "use another --out, or --overwrite"
        )
    return None


def checkpoint_file(checkpoint: str, run_folder: Path) -> Path:
    """Return the file of --checkpoint; of a folder, by default the run's, best.pt or last.pt."""
    path = Path(checkpoint) if checkpoint else run_folder
    if checkpoint and not path.is_dir():
        return path
    return path / "best.pt" if (path / "best.pt").exists() else path / "last.pt"


def load_trained(
    Config: type, presets: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], script: str
) -> tuple[Any, dict[str, Any]]:
    """Return the config for using the network that the flags name, and its checkpoint.

    The network and its training are those of the checkpoint; results go beside it without --out.
    Public weights of --init are a checkpoint of step 0; they know the prepared data by --data, but
    not the cases that they were trained on.
    """
    config = flags.configure(Config, presets, given)
    if config.init and not config.checkpoint:
        weights, saved = load_start(config.init, script)
        if saved is None:
            record = {**loaders.data_record(loaders.open_data(config.data)), "cases": {}}
            return with_start(config, given, script), {"data": record, "ema": weights, "step": 0}
        given = {"checkpoint": config.init, **given}
        config = flags.configure(Config, presets, given)
    path = checkpoint_file(config.checkpoint, Path(config.run_folder))
    state = load_checkpoint(path, script)
    given = {"out": str(path.parent), **given}
    return flags.as_trained(Config, presets, given, state["config"]), state


def scores_folder(config: Any, other: str = "") -> Path:
    """Return where scores go: OUT for all test cases of the run's own data, else a folder below.

    other: what else differs, such as the name of other data. So no scores replace others.
    """
    limit = str(config.limit or "")
    name = "-".join(part for part in (other, config.split, limit) if part)
    return Path(config.run_folder) / ("" if name == "test" else name)


def is_scored(config: Any, given: Mapping[str, Any], ranks: Ranks) -> bool:
    """Return whether the scores of these weights are there, and nothing new is asked for."""
    scores = scores_folder(config) / "summary.json"
    weights = checkpoint_file("", Path(config.run_folder))
    asked = set(flags.names(type(config), "use", "evaluate")) & set(given) - {"split", "limit"}
    if asked or not scores.exists() or scores.stat().st_mtime < weights.stat().st_mtime:
        return False
    say(f"its scores are in {scores.parent}, nothing is sampled again", ranks)
    return True


def scans(config: Any, record: dict, ranks: Ranks) -> Iterator[loaders.Scan]:
    """Yield this process's scans of --image, on the network's grid. record: of the network's data.

    Raises InputError for what can be checked before the work begins, and after the last scan for
    files that could not be read.
    """
    if not config.image or not config.output:
        raise InputError("predict needs --image FILE... (or a folder) and --output FILE or FOLDER")
    inputs = loaders.Scans(config.image, config.output, record, config.overwrite)
    for note in inputs.notes:
        say(note, ranks)
    for scan in inputs.share(ranks.rank, ranks.world):
        if scan.note:
            say(scan.note)
        yield scan
    inputs.finish([fault for part in ranks.gather(inputs.faults) for fault in part])


# --------------------------------------------------------------------------------------------------
# Speaking and leaving
# --------------------------------------------------------------------------------------------------


def say(text: str, ranks: Ranks | None = None) -> None:
    """Print from rank 0, above a progress bar. A closed or full stdout never stops a run."""
    if ranks is not None and not ranks.first:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    if sys.stdout is None:  # closed before the program began
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def duration(seconds: float) -> str:
    """Return a time as a person says it: 40 s, 8 min, 3.5 h, 2.1 days."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 160 characters."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:160]


def ignore_signals(worker: int) -> None:
    """For DataLoader workers: a signal to the group must not end them before the run is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for handle in _held.values():  # else they hold the run folder a moment longer than the run
        os.close(handle)


def leave() -> None:
    """Release the run folders and leave the other processes in order."""
    while _held:
        os.close(_held.popitem()[1])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed; that of a tensor on the CPU is a plain RuntimeError."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def run_main(script: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Call main and return the exit code; bad input becomes one line on stderr and the code 2.

    A defect of ours keeps its traceback. Under torchrun the other processes wait for rank 0, which
    has most likely met the same.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    try:
        code = main(argv)
        leave()
        return code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = user_error(error, world)
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(15)  # torchrun ends this process meanwhile
        if line is None:
            raise
        with contextlib.suppress(OSError, ValueError):
            print(f"{script}: {line}", file=sys.stderr, flush=True)
        code = 2
    finally:
        # DataLoader workers that an error has left ignore the signal by which Python ends them.
        for child in multiprocessing.active_children():
            child.kill()
    if world > 1:
        os._exit(code)  # the other processes may never reach the end of the group
    return code


def user_error(error: Exception, world: int) -> str | None:
    """Return the line for an error that a user can mend; None for a defect of ours."""
    text = str(error)
    if isinstance(error, InputError):
        return text.strip().splitlines()[-1].removeprefix("common.InputError: ")  # of a worker
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}; check the path, its permissions and the free space"
    if out_of_memory(error):
        remedy = "lower --batch, or use --accumulate or --recompute"
        return f"out of memory ({first_line(error)}); {remedy}"
    if "DataLoader worker (pid" in text:  # killed, mostly for lack of memory
        return f"a DataLoader worker was killed ({first_line(error)}); use fewer --workers"
    if world > 1 and ("Connection closed by peer" in text or "Connection reset by peer" in text):
        return "another process has ended, see its message; the same command continues"
    return None
