"""Plumbing that is the same in all scripts and teaches nothing about a paper.

Processes and device, the stop flag, atomic saving and checked loading, the log, seeds, and flags made from a
dataclass. Plain functions that call no script; the training loop, its data parallelism and its number formats
stand in the scripts.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import time
import types
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import InputError
from common.old.loaders import lock_folder
from common.old.unet import load_public, public_flags

FORMAT = 1  # of checkpoints; raised when an old program could misread a new file
CHECKPOINT_KEYS = (
    "format",
    "script",
    "config",
    "model",
    "ema",
    "optimizer",
    "scaler",
    "step",
    "best",
    "data",
)

# ---------------------------------------------------------------------------------------------------------------------
# Processes and device
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who this process is: its number, how many there are, its number on this machine, its device."""

    rank: int
    world: int
    local: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_processes(device: str) -> Ranks:
    """Read torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK), choose the device, join the process group.

    device: auto | cpu | cuda | cuda:N. Raises InputError for a device that is not there.
    """
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        n = torch.cuda.device_count()
        index = int(device[5:]) if ":" in device else local
        if index >= n:
            raise InputError(
                f"--device {device}: process {rank} needs GPU {index}, {n} found here; use --device cpu"
            )
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    if world > 1 and not dist.is_initialized():
        # A process waits as long as another one samples; torchrun itself ends all of them when one fails.
        backend, patience = (
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
            timedelta(days=7),
        )
        dist.init_process_group(backend, timeout=patience)
    return Ranks(rank, world, local, torch.device(device))


def stop_processes() -> None:
    while _held:
        os.close(_held.popitem()[1])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """The values of all processes, in order of rank."""
    values: list[Any] = [value] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(values, value)
    return values


def check_same_weights(model: torch.nn.Module, ranks: Ranks, when: str) -> str:
    """SHA-256 of all parameters; InputError where the processes do not hold the same weights."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().to("cpu", torch.float32).numpy().tobytes())
    found = gather(digest.hexdigest(), ranks)
    if len(set(found)) > 1:
        raise InputError(
            f"the processes hold different weights {when}: {[d[:12] for d in found]}; where several machines train, "
            "all must see the same --out, data and program"
        )
    return found[0]


def number_format(amp: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """`--amp` -> (autocast's type or None for fp32, the reason in words)."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp], f"--amp {amp}"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU computes in bf16"
        return torch.float16, "the GPU is older than bf16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return torch.bfloat16, "the CPU computes in bf16"
    return None, "the CPU does not compute in bf16"


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GB: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def measure(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds that `call()` takes, and GB that it needs at its peak above what is there before; its result included.

    CUDA: memory of tensors (not what the allocator holds in reserve). CPU: resident memory of the process, which has
    in it the copies that kernels make for themselves; only Linux can set its maximum back (proc(5), clear_refs), on
    others the second number is nan. `peak_memory_gb` begins anew as well.
    """

    def resident(key: str) -> float:
        return (
            int(
                next(
                    line for line in status.read_text().splitlines() if line.startswith(key)
                ).split()[1]
            )
            * 1024
        )

    status, gpu, before = Path("/proc/self/status"), device.type == "cuda", math.nan
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(
                0
            )  # else the call gets memory that earlier ones have freed, and looks frugal
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
        except (OSError, AttributeError):  # not allowed everywhere; a C library other than glibc
            pass
    begin = time.perf_counter()
    result = call()
    if gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    peak = (
        torch.cuda.max_memory_allocated(device)
        if gpu
        else 0.0
        if math.isnan(before)
        else resident("VmHWM")
    )
    del result
    return seconds, (peak - before) / 1e9


def free_memory_gb(device: torch.device) -> float:
    """Memory in GB that a new tensor could take: free on the GPU, available here within the container's limit."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + reserved) / 1e9
    free = math.inf
    if (info := Path("/proc/meminfo")).exists():
        free = 1024 * int(info.read_text().split("MemAvailable:")[1].split()[0])
    return min(free, free_in_container(Path("/sys/fs/cgroup"))) / 1e9


def free_in_container(group: Path) -> float:
    """Bytes up to the limit of a cgroup (version 2 or 1); file pages that the kernel may drop count as free."""
    for limit, used, folder in (
        ("memory.max", "memory.current", group),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", group / "memory"),
    ):
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()).isdigit():
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return int(most) - int((folder / used).read_text()) + cached
    return math.inf


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed; that of a tensor on the CPU is a plain RuntimeError."""
    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


def kept_for_backward_gb(forward: Callable[[], Any]) -> float:
    """GB of the distinct tensors that autograd keeps during `forward`, parameters not counted; also on `meta`."""
    storages: dict[int, int] = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter):
            storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        kept = forward()
    del kept
    return sum(storages.values()) / 1e9


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a function of its parts alone, e.g. (seed, "step", step, sample)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def noise(
    seed: int, name: str, ns: Sequence[int | str], shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Standard normal [B, *shape] on the device; each n has its own generator: equal on one process and on four."""
    generator = torch.Generator(device)
    return torch.stack(
        [
            torch.randn(
                *shape, device=device, generator=generator.manual_seed(seed_of(seed, name, n))
            )
            for n in ns
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and leaving
# ---------------------------------------------------------------------------------------------------------------------


class StopFlag:
    """A signal to stop sets a flag; the loop asks at the end of a step and all processes get the same answer.

    A second Ctrl-C ends at once, for what cannot be waited for. Not under torchrun, which sends the first one again.
    """

    def __init__(self) -> None:
        self.signal, self.interrupted, self.alone = 0, 0.0, "WORLD_SIZE" not in os.environ
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup wants it
            numbers.append(signal.SIGHUP)  # the terminal was closed
        self.before = {n: signal.signal(n, self._set) for n in numbers}

    def restore(self) -> None:
        """Give the signals back their old meaning once there is nothing left to save."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and self.alone:
            if self.interrupted and time.monotonic() - self.interrupted > 1:
                raise KeyboardInterrupt
            if not self.interrupted:
                self.interrupted = time.monotonic()
                text = b"\nstopping after this step, then all is saved; Ctrl-C again stops at once, without saving\n"
                with contextlib.suppress(OSError):
                    os.write(2, text)  # print may be at work just now
        self.signal = max(self.signal, number)

    def agreed(self, ranks: Ranks, time_is_up: bool = False) -> tuple[int, bool]:
        """(number of the signal or 0, whether the time is up), the same on all processes."""
        if ranks.world == 1:
            return self.signal, time_is_up
        flags = torch.tensor([self.signal, int(time_is_up)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags[0]), bool(flags[1])


def ignore_signals(worker: int) -> None:
    """For processes that load data: a signal to the whole group must not end them before the training has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for handle in (
        _held.values()
    ):  # else these processes would hold the folder for a moment longer than the training
        os.close(handle)


def end_loading_processes() -> None:
    """Kill those that an error has left: they ignore the SIGTERM by which Python ends its children before it waits."""
    if children := multiprocessing.active_children():
        before = signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # where torch would raise for each of them
        for child in children:
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def say(text: str, ranks: Ranks | None = None) -> None:
    """Print from the first process; a closed or full stdout never stops a run."""
    if ranks is not None and not ranks.first:
        return
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def run_main(name: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Call `main`; InputError becomes one line `NAME: what is wrong; what to do` on stderr and exit code 2.

    Under torchrun the first process prints the line; another one waits, to be ended by torchrun, and speaks only if
    it is alone with its error. So does an error of the system (no permission, no such folder, disk full). Every other
    exception, but for lost processes, is a defect of ours and keeps its traceback (exit code 1).
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    try:
        return main(argv)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if rank:  # the first process has most likely met the same, or ended and thereby caused this
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(15)
        if isinstance(error, OSError) and error.errno is not None:
            where = f"{error.filename}: " if error.filename is not None else ""
            error = InputError(
                f"{where}{error.strerror}; check the path, its permissions and the free space"
            )
        if lacks_memory(error):
            remedy = "lower --batch or --num-channels, split the batch by --accumulate, or use --recompute"
            error = InputError(f"out of memory ({_first_line(error)}); {remedy}")
        if "DataLoader worker (pid" in str(
            error
        ):  # killed, mostly for lack of memory or of room in /dev/shm
            remedy = "give fewer --workers, or more (shared) memory; the same command continues"
            error = InputError(
                f"a process that loads data has ended ({_first_line(error)}); {remedy}"
            )
        if world > 1 and (
            "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error)
        ):
            error = InputError(
                "another of the processes has ended, see its message; the same command continues"
            )
        if not isinstance(error, InputError):
            raise
        line = (
            str(error).strip().splitlines()[-1].removeprefix("common.InputError: ")
        )  # one raised in a worker has more
        print(f"{name}: {line}", file=sys.stderr, flush=True)
        code = 2
    finally:
        end_loading_processes()
    if world > 1:
        os._exit(code)  # leaving the process group in order would wait for the others
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading
# ---------------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, write: Callable[[Any], None], previous: Path | None = None) -> None:
    """Write a file so that at each moment a whole one is there: the old or the new.

    Temporary file in the same folder, flush, fsync; the old file moves to `previous` (if given); rename; fsync of the
    folder, since the rename itself is lost in a power cut otherwise. InputError if the disk is full or read-only:
    the old file is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        kept = (
            "the file that was there is untouched" if path.exists() else "nothing was there before"
        )
        raise InputError(
            f"{path} cannot be written ({_first_line(error)}); {kept}; free space, then run again"
        ) from error
    if previous is not None and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    write_atomic(path, lambda f: torch.save(dict(state), f), previous)


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, lambda f: f.write((json.dumps(content, indent=1) + "\n").encode()))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with equal keys, which become the header; the folder is made. InputError on a full disk."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda f: f.write(text.getvalue().encode()))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of `write_csv`, all values as text; none where there is no file. InputError where cells are missing."""
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as f:
        try:
            rows = list(csv.DictReader(f))
        except csv.Error as error:
            raise InputError(f"{path} is no table ({error}); mend it or move it away") from error
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(
                f"{path}, line {number}: not as many cells as the first line has; mend it or move it away"
            )
    return rows


class DamagedError(InputError):
    """A checkpoint that was not written to its end, or not read to it."""


def load_tensors(path: Path) -> Any:
    """`torch.load` that runs no code (weights_only) and names what is wrong with a file (InputError)."""
    if not path.is_file():
        raise InputError(
            f"checkpoint {path} does not exist; train first, or name another with --checkpoint or --init"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"{path} holds something other than tensors and plain values, or is not a checkpoint, and was not opened "
            f"({_first_line(error)}); use a file written by this program"
        ) from error
    except (
        RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error,
    ) as error:  # fmt: skip
        raise DamagedError(
            f"{path} is damaged or not a checkpoint ({_first_line(error)}); use another file"
        ) from error


def load_checkpoint(path: Path, script: str) -> dict[str, Any]:
    """One of our checkpoints, whole; InputError names damage, a missing part, a newer format or another script."""
    state = load_tensors(path)
    try:
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()  # torch.load does not look at the checksums
    except zipfile.BadZipFile:  # in the older format
        bad = None
    except (
        NotImplementedError,
        RuntimeError,
        zlib.error,
        EOFError,
        struct.error,
        ValueError,
    ) as error:
        bad = _first_line(error)
    if bad:
        raise DamagedError(f"{path} is damaged ({bad} does not fit its checksum); use another file")
    if not isinstance(state, dict) or "format" not in state:
        raise InputError(
            f"{path} is not a checkpoint of this program (no `format`); public weights go to --init"
        )
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise InputError(
            f"{path} has format {state['format']}, this program reads up to {FORMAT}; use a newer version"
        )
    missing = [k for k in CHECKPOINT_KEYS if k not in state]
    if missing:
        raise DamagedError(
            f"{path} lacks {', '.join(missing)}; it was not written to its end; use another file"
        )
    if state["script"] != script:
        raise InputError(
            f"{path} belongs to {state['script']}.py, this is {script}.py; run that script, or choose another"
        )
    return state


def load_start(path: str, script: str, model: torch.nn.Module) -> None:
    """--init: weights of one of our checkpoints (the averaged ones if it has them) or of a public state dict."""
    state = load_tensors(Path(path))
    if isinstance(state, dict) and "format" in state:
        state = load_checkpoint(Path(path), script)
        state = state["ema"] or state["model"]
    try:
        load_public(model, state)
    except (ValueError, AttributeError) as error:
        raise InputError(f"--init {path} does not fit: {error}") from error


def network_flags(path: Path, script: str) -> dict[str, Any]:
    """The flags that shape the network of the weights given to --init, ours or public."""
    state = load_tensors(path)
    if isinstance(state, dict) and "format" in state:
        config = load_checkpoint(path, script)["config"]
        return {
            k: config[k]
            for k in ("num_channels", "channel_mult", "num_res_blocks", "num_groups", "skips")
        }
    try:
        return public_flags(state)
    except (KeyError, IndexError, AttributeError) as error:
        raise InputError(
            f"--init {path} has no {error}, so it is no U-Net of this kind; use another file"
        ) from error


def checkpoint_file(
    given: str, folder: Path, names: Sequence[str] = ("best.pt", "last.pt")
) -> Path:
    """The file that --checkpoint names; of a run folder, its own or the run's, the first of `names` that is there."""
    path = Path(given) if given else folder
    if given and not path.is_dir():
        return path
    return next((path / name for name in names if (path / name).exists()), path / names[-1])


def scores_folder(config: Any, checkpoint: Path, script: str) -> Path:
    """Where `evaluate` writes: beside the checkpoint if it scores all test cases of the data that it was trained on.

    Other data, another split, fewer cases, or the last weights where the best are there, get a folder of their own, so
    that no scores are written over others. An --out elsewhere is taken as it is.
    """
    if config.run_folder.resolve() != checkpoint.parent.resolve():
        return config.run_folder
    trained = load_checkpoint(checkpoint, script)["config"]["data"]
    name = (
        f"{Path(config.data).name}-" * (config.data != trained)
        + config.split
        + f"-{config.limit}" * (config.limit > 0)
    )
    name += "-last" * (checkpoint.name == "last.pt" and checkpoint.with_name("best.pt").exists())
    return config.run_folder / name if name != "test" else config.run_folder


def trained_config(
    config: Any,
    given: Mapping[str, Any],
    path: Path,
    script: str,
    use: Iterable[str],
    once: Iterable[str],
) -> Any:
    """For verbs that use a trained network: the settings of its training, changed by the given flags.

    use: flags that may differ from the training, InputError names the others; once: flags not kept from the training.
    Results go beside the checkpoint unless --out is given.
    """
    saved = load_checkpoint(path, script)["config"]
    fixed = [
        f"--{k.replace('_', '-')} {saved.get(k)}"
        for k in given
        if k not in use and given[k] != saved.get(k)
    ]
    if fixed:
        raise InputError(f"{path} was trained with {', '.join(fixed)}; leave these flags out")
    fields = {field.name for field in dataclasses.fields(config)} - set(once)
    return type(config)(
        **{**{k: v for k, v in saved.items() if k in fields}, "out": str(path.parent), **given}
    )


def load_newest(out: Path, script: str, ranks: Ranks | None = None) -> dict[str, Any] | None:
    """The checkpoint to continue from: last.pt, or last.prev.pt where last.pt is damaged or absent; None if neither."""
    last, previous = out / "last.pt", out / "last.prev.pt"
    if not last.exists() and not previous.exists():
        return None
    if not last.exists():
        say(f"note: {last} is absent. Continuing from {previous.name}.", ranks)
        return load_checkpoint(previous, script)
    try:
        return load_checkpoint(last, script)
    except (
        DamagedError
    ) as error:  # of a newer program or another script: it is no accident, and is refused
        if not previous.exists():
            raise
        say(f"note: {error}. Continuing from {previous.name}.", ranks)
        return load_checkpoint(previous, script)


def check_same_config(
    old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Iterable[str], out: Path
) -> None:
    """Refuse to continue a run with other settings; InputError lists each differing flag with both values."""
    allowed = set(may_differ)
    keys = [k for k in {**old, **new} if k not in allowed and old.get(k) != new.get(k)]
    if keys:
        rows = ", ".join(
            f"--{k.replace('_', '-')} was {old.get(k)} and is {new.get(k)}" for k in keys
        )
        raise InputError(
            f"{out} holds a run with other settings ({rows}); use them, another --out, or --overwrite"
        )


def find_run(
    out: Path,
    script: str,
    config: Mapping[str, Any],
    may_differ: Iterable[str],
    record: Mapping[str, Any],
    ranks: Ranks,
) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a new run.

    InputError: other settings, other data, fewer steps, weights that cannot be continued.
    """
    state = load_newest(out, script, ranks)
    if state is None and (out / "best.pt").exists():
        raise InputError(
            f"{out} holds best.pt but no last.pt to continue from; use evaluate, another --out, or --overwrite"
        )
    if state is not None:
        if not state["optimizer"] and state.get("stage") != "ddpmseg":
            raise InputError(
                f"the checkpoint in {out} holds weights but no optimiser (a copy of best.pt?) and cannot be continued; "
                "use evaluate, or begin in another --out"
            )
        check_same_config(state["config"], config, may_differ, out)
        if state["step"] > config["steps"]:
            raise InputError(
                f"{out} has made {state['step']} steps, more than --steps {config['steps']}; ask for at least as many, "
                "or use another --out, or --overwrite"
            )
        if state["data"] != record:
            keys = [k for k in record if state["data"].get(k) != record[k]]
            raise InputError(
                f"{out} was trained on data with other {', '.join(keys)}; use another --out, or --overwrite"
            )
    return state


_held: dict[Path, int] = {}  # folders that this process writes to, open
RUN_FOLDERS = {"figures", "predictions", "samples.part"}
RUN_FILES = {"config.json", "last.pt", "last.prev.pt", "best.pt", "metrics.csv", "summary.json"}
RUN_SUFFIXES = {".pt", ".csv", ".json", ".npy", ".png", ".gz", ".tmp"}


def hold(out: Path) -> None:
    """InputError where another process of this machine writes to `out`. The lock ends with the process in any case."""
    if out.resolve() in _held:
        return
    handle = lock_folder(out)
    if handle is None:
        raise InputError(f"another run is writing to {out}; wait for it, or choose another --out")
    _held[out.resolve()] = handle


def make_run(out: Path, config: Mapping[str, Any], overwrite: bool, ranks: Ranks) -> None:
    """Make the run folder with its config.json; with `overwrite` a run that is there is thrown away first.

    What no run has written is left in the folder. InputError where it holds no run, or another process writes to it.
    """
    if ranks.first:
        if Path.cwd().resolve().is_relative_to(out.resolve()):
            raise InputError(
                f"--out {out} is the folder you are in, or above it; name one of its own for the run"
            )
        if overwrite and out.is_symlink():
            raise InputError(
                f"--out {out} is a link, which --overwrite leaves alone; name the folder itself, or another"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {out} cannot be made ({error.strerror}); choose another"
            ) from error
        hold(out)
        if overwrite:
            _throw_away(out)
        write_json(out / "config.json", dict(config))
    if ranks.world > 1:
        dist.barrier()


def _throw_away(out: Path) -> None:
    """Remove the run in `out` with the runs and scores below it; InputError where there is none, or one is in use."""
    names = {f.name for f in out.iterdir()} - {"profile.csv"}
    if any(name[0] != "." for name in names) and not names & RUN_FILES:
        raise InputError(
            f"{out} holds files but no run (no config.json) and is left alone; choose another --out"
        )
    for file in out.glob("*/**/config.json"):
        if file.parent.resolve() in _held:
            continue
        handle = lock_folder(file.parent)
        if handle is None:
            raise InputError(
                f"another run is writing to {file.parent}; wait for it before --overwrite"
            )
        os.close(handle)
    for file in sorted(
        out.iterdir(), key=lambda f: f.name == "config.json"
    ):  # last: a stopped removal can be repeated
        if file.is_dir() and not file.is_symlink():
            if file.name in RUN_FOLDERS or {f.name for f in file.iterdir()} & RUN_FILES:
                shutil.rmtree(file)
        elif file.suffix in RUN_SUFFIXES:
            file.unlink()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:160]


def _number_or_empty(text: str | None) -> str:
    """A cell as it is, or empty where it holds no number."""
    try:
        float(text or "")
    except ValueError:
        return ""
    return text or ""


class Log:
    """log.csv and the console: the same numbers in both. A continued run drops the rows after its checkpoint."""

    def __init__(self, path: Path, columns: Sequence[str], step: int, active: bool):
        self.path, self.columns, self.active = path, list(columns), active
        if not active:
            return
        rows: list[list[str]] = []
        if step and path.exists():
            with open(path, newline="", errors="replace") as f:
                lines = (line.replace("\0", "") for line in f)
                header = next(csv.reader(lines), [])
                if header and "step" not in header:
                    raise InputError(
                        f"{path} does not begin with the names of its columns, has another program written it? Restore "
                        "it, or move it away"
                    )
                # Cells are numbers: an open quote, which is damage, must not swallow the rows behind it.
                for row in csv.DictReader(lines, header, quoting=csv.QUOTE_NONE):
                    if (row.get("step") or "").isdigit() and int(row["step"]) <= step:
                        rows.append([_number_or_empty(row.get(c)) for c in self.columns])
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([self.columns, *rows])
        write_atomic(path, lambda f: f.write(text.getvalue().encode()))

    def row(self, values: Mapping[str, float | int], silent: bool = False) -> None:
        """Append one row and print it unless `silent`; a column without a value stays empty; six digits."""
        if not self.active:
            return
        found = [values.get(c, "") for c in self.columns]
        cells = [format(v, ".6g") if isinstance(v, float) else str(v) for v in found]
        try:
            with open(self.path, "a", newline="") as f:
                csv.writer(f, lineterminator="\n").writerow(cells)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({_first_line(error)}); free space, then run again"
            ) from error
        if not silent:
            say("  ".join(f"{c} {v}" for c, v in zip(self.columns, cells) if v != ""))


class LossByTime:
    """Loss per sample since the last row, also by quartile of t: where in the noise it arises. Stays on the device.

    Losses that are not finite are left out: the step that they belong to is skipped.
    """

    def __init__(self, steps: int, device: torch.device):
        self.steps, self.sums = steps, torch.zeros(2, 4, device=device)  # losses, samples

    def add(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """t: [B] in 1..steps, losses: [B]."""
        good = losses.isfinite()
        self.sums.index_add_(
            1,
            (t - 1) * 4 // self.steps,
            torch.stack([losses.where(good, 0), good.to(losses.dtype)]),
        )

    def row(self, ranks: Ranks) -> dict[str, float]:
        """`loss` and `loss_q1` .. `loss_q4` over all processes; starts again from nothing."""
        if ranks.world > 1:
            dist.all_reduce(self.sums)
        total, count = self.sums.tolist()
        self.sums.zero_()
        row = {"loss": sum(total) / max(sum(count), 1)}
        return row | {f"loss_q{i + 1}": total[i] / count[i] for i in range(4) if count[i]}


# ---------------------------------------------------------------------------------------------------------------------
# Flags from a dataclass
# ---------------------------------------------------------------------------------------------------------------------


def flag(default: Any, text: str, many: bool = False) -> Any:
    """A dataclass field with its help: unit, range, the paper's value. many: a verb also takes N,N,... for it."""
    return dataclasses.field(default=default, metadata={"help": text, "many": many})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message}; see --help")


def _tuple_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"comma-separated {kind.__name__}"
    return parse


def _one_or_many(text: str) -> int | tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    return values[0] if len(values) == 1 else values


def make_parser(config: type, verbs: Sequence[str], description: str) -> argparse.ArgumentParser:
    """`SCRIPT.py [VERB] [--flag value ...]` from a dataclass whose fields were made with `flag`.

    int, float, str, Path-like str, Literal (choices), bool (--flag / --no-flag), tuple[int, ...] (1,2,4) and
    tuple[str, ...] (several words). Flags that are not given are absent from the result, so presets can fill in.
    """
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "verb",
        nargs="?",
        choices=["", *verbs],
        default="",
        metavar="VERB",
        help=f"{' | '.join(verbs)}; none: all of it",
    )
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind: Any = hints[field.name]
        text = field.metadata["help"] + f" (default: {field.default})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is str:
            options |= {"nargs": "+", "metavar": "PATH"}
        elif typing.get_origin(kind) is tuple:
            options |= {"type": _tuple_of(typing.get_args(kind)[0]), "metavar": "N,N"}
        elif field.metadata["many"]:
            options |= {"type": _one_or_many, "metavar": "N"}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    return parser


def parse_flags(
    config: type,
    argv: Sequence[str],
    verbs: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    description: str,
    only: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, Any, dict[str, Any]]:
    """(verb, the resolved config, the flags that were given). The preset fills in what was not given.

    Without --preset: `tiny` for synthetic data, else `paper`. only: flag -> the verbs that look at it ("": the bare
    run). InputError for unknown flags, bad values, and flags that the verb would ignore.
    """
    parser = make_parser(config, verbs, description)
    known = list(parser._option_string_actions)
    for word in (w.split("=")[0] for w in argv if w.startswith("--")):
        if word not in known:  # said here, since argparse would blame the value that follows
            close = difflib.get_close_matches(word, known, 1)
            raise InputError(
                f"unknown flag {word}; " + (f"did you mean {close[0]}?" if close else "see --help")
            )
    given = vars(parser.parse_args(list(argv)))
    verb = given.pop("verb")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for name, users in (only or {}).items():
        if name in given and verb not in users:
            where = ", ".join(user or "the bare run" for user in users)
            raise InputError(
                f"--{name.replace('_', '-')} is for {where}; {verb or 'the bare run'} ignores it: leave it out"
            )
    synthetic = given.get("data", "synthetic") == "synthetic"
    preset = given.get("preset", "tiny" if synthetic else "paper")
    return verb, config(**{**presets[preset], "preset": preset, **given}), given


def shared_batch(config: Any, given: Mapping[str, Any], ranks: Ranks, folder: Path) -> Any:
    """The config with a batch that processes and accumulation can share: a preset's is raised, a given one refused.

    folder: of the run. Where one was begun there with a raised batch, it keeps that on however many processes it is
    continued.
    """
    share = ranks.world * config.accumulate
    if (
        "batch" not in given
        and not config.overwrite
        and (begun := _begun_batch(folder)) > config.batch
    ):
        config = dataclasses.replace(config, batch=begun)
    if config.batch % share == 0:
        return config
    batch = -(-config.batch // share) * share
    if "batch" in given:
        raise InputError(
            f"--batch {config.batch} cannot be shared by {ranks.world} processes x --accumulate {config.accumulate}; "
            f"use a multiple of {share}, for example {batch}"
        )
    say(
        f"note: the preset's batch of {config.batch} becomes {batch}, so that all processes have work (--batch)",
        ranks,
    )
    return dataclasses.replace(config, batch=batch)


def _begun_batch(folder: Path) -> int:
    """The batch of the run in `folder`; 0 where none has saved anything."""
    try:
        begun = json.loads((folder / "config.json").read_text(encoding="utf-8"))["batch"]
        return int(begun) if (folder / "last.pt").exists() else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def check_range(
    config: Any, name: str, low: float, high: float = math.inf, open_low: bool = False
) -> None:
    """InputError unless low <= value < inf (low < value with open_low) and value <= high; NaN is refused."""
    value = getattr(config, name)
    values = value if isinstance(value, tuple) else (value,)
    if any(not math.isfinite(v) or v < low or v > high or (open_low and v == low) for v in values):
        bounds = f"a number {'above' if open_low else 'from'} {low:g}" + (
            "" if high == math.inf else f" up to {high:g}"
        )
        raise InputError(
            f"--{name.replace('_', '-')} is {value}, expected {bounds}; correct the flag"
        )
