"""Saving, loading, log, seeds, stop, memory: what keeps a run safe."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from common import InputError, atomic_write, flags, runtime
from common.flags import flag
from common.runtime import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config(flags.RunFlags):
    lr: float = flag(0.1, "learning rate", "train")
    batch: int = flag(4, "samples of a step", "train")
    steps: int = flag(100, "optimisation steps", "speed")

    @property
    def run_folder(self) -> Path:
        return Path(self.out)


RECORD = {"name": "d", "classes": {"a": 1}}


def start(out: Path, record: dict = RECORD, **values) -> tuple[runtime.Run, nn.Module, int]:
    """A run of a small network, as a script makes it."""
    run = runtime.Run(Config(out=str(out), quiet=True, **values), "script", record, ALONE)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    run.keep(model=model, ema=model, optimizer=optimizer)
    return run, model, run.resume()


def train(out: Path, steps: int, **values) -> runtime.Run:
    run, model, begun = start(out, **values)
    for step in range(begun + 1, steps + 1):
        model(torch.ones(1, 3)).sum().backward()
        run.parts["optimizer"].step()
        run.collect(torch.tensor([float(step)]), torch.tensor([0.5]))
        run.seconds += 0.5
        run.log(step, lr=0.1, grad_norm=1.0)
        run.save(step)
    run.finish(steps)
    return run


# --- saving ---------------------------------------------------------------------------------------


def test_save_keeps_the_predecessor_and_best_has_no_optimiser(tmp_path):
    run = train(tmp_path / "r", 3)
    run.save_best(3, 0.5)
    files = {f.name for f in (tmp_path / "r").iterdir()}
    assert files == {"config.json", "log.csv", "last.pt", "last.prev.pt", "best.pt"}
    assert runtime.load_checkpoint(tmp_path / "r/last.prev.pt", "script")["step"] == 3
    assert runtime.load_checkpoint(tmp_path / "r/best.pt", "script")["optimizer"] == {}


def test_best_is_kept_where_a_later_score_is_equal_or_nan(tmp_path):
    run, _model, _ = start(tmp_path / "r")
    for step, score in ((1, 0.5), (2, 0.5), (3, float("nan")), (4, 0.4)):
        run.save_best(step, score)
    assert runtime.load_checkpoint(tmp_path / "r/best.pt", "script")["step"] == 1
    assert run.stale == 3 and run.validated == 4
    run.save_best(5, 0.6)
    assert run.stale == 0 and run.best == 0.6
    run.finish(5)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("write failed")])
def test_failed_write_leaves_the_old_file_and_says_so(tmp_path, error):
    path = tmp_path / "last.pt"
    atomic_write(path, b"old")

    def half(file):
        file.write(b"half")
        raise error

    with pytest.raises(InputError, match=r"last\.pt cannot be written .*nothing there was changed"):
        atomic_write(path, half, tmp_path / "last.prev.pt")
    assert path.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_process_killed_inside_a_save_leaves_a_loadable_checkpoint(tmp_path):
    train(tmp_path / "r", 1)
    code = (
        "import os, signal, sys\nfrom common import atomic_write\n"
        "def half(f):\n    f.write(b'x' * 1000); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(sys.argv[1], half)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "r/last.pt")]
    assert subprocess.run(words, cwd=ROOT).returncode == -signal.SIGKILL
    assert start(tmp_path / "r")[2] == 1


# --- loading --------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["MALICE"])),)


def test_malicious_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MALICE", str(tmp_path / "owned"))
    torch.save({"model": Malicious()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=f"{name} "):
            runtime.load_tensors(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_damage_is_noticed_at_every_length_and_in_every_bit(tmp_path):
    train(tmp_path / "r", 1)
    path = tmp_path / "r/last.pt"
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"last\.pt"):
            runtime.load_checkpoint(path, "script")
    for at in (100, len(whole) // 3, len(whole) // 2):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            state = runtime.load_checkpoint(path, "script")
        except InputError:
            continue
        path.write_bytes(whole)  # the bit stood between the parts
        again = runtime.load_checkpoint(path, "script")
        assert all(torch.equal(state["model"][k], again["model"][k]) for k in state["model"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": runtime.FORMAT + 1}, "use the version of the program that wrote it"),
        ({"script": "other"}, "belongs to other.py, this is script.py"),
        ({"optimizer": None}, "lacks optimizer"),
    ],
)
def test_foreign_checkpoint_is_refused_by_name(tmp_path, change, words):
    train(tmp_path / "r", 1)
    state = {**torch.load(tmp_path / "r/last.pt", weights_only=True), **change}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words):
        runtime.load_checkpoint(tmp_path / "x.pt", "script")


def test_continued_run_has_its_numbers_and_weights(tmp_path):
    run = train(tmp_path / "r", 12)
    weights = run.parts["model"].weight.clone()
    again, model, step = start(tmp_path / "r")
    assert step == 12 and again.seconds == 6.0 and torch.equal(model.weight, weights)
    again.finish(12)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"lr": 0.5}, "--lr was 0.1, is 0.5"),
        ({"steps": 1}, "has made 2 steps, more than --steps 1"),
        ({"record": {**RECORD, "classes": {"b": 1}}}, "data with other classes"),
    ],
)
def test_run_with_other_settings_is_not_continued(tmp_path, values, words):
    train(tmp_path / "r", 2)
    with pytest.raises(InputError, match=words):
        start(tmp_path / "r", **values)


def test_copy_of_best_is_not_continued(tmp_path):
    run = train(tmp_path / "r", 2)
    run.save_best(2, 1.0)
    (tmp_path / "r/best.pt").rename(tmp_path / "r/last.pt")
    with pytest.raises(InputError, match="holds no optimiser"):
        start(tmp_path / "r")


def test_best_without_last_is_not_overwritten_by_a_new_run(tmp_path):
    run = train(tmp_path / "r", 2)
    run.save_best(2, 1.0)
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / "r" / name).unlink()
    with pytest.raises(InputError, match=r"best\.pt but no last\.pt"):
        start(tmp_path / "r")


# --- log ------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_log_has_each_step_once_and_the_mean_loss_since_the_last_row(tmp_path):
    train(tmp_path / "r", 60)
    log = rows(tmp_path / "r/log.csv")
    assert [row["step"] for row in log] == ["10", "50"]
    assert float(log[0]["loss"]) == pytest.approx(5.5)
    assert float(log[1]["loss"]) == pytest.approx(30.5) == float(log[1]["loss_q2"])
    assert float(log[1]["samples_per_s"]) == pytest.approx(4 / 0.5)
    (tmp_path / "r/log.csv").open("a").write("70,1,2\\n\\0damage")
    train(tmp_path / "r", 100)
    assert [row["step"] for row in rows(tmp_path / "r/log.csv")] == ["10", "50", "100"]


def test_losses_are_sorted_into_quartiles_of_t_and_bad_ones_left_out(tmp_path):
    run, _, _ = start(tmp_path / "r")
    level = torch.tensor([0.001, 0.25, 0.251, 0.5, 0.75, 0.76, 1.0])
    run.collect(torch.tensor([1.0, 3.0, 5.0, float("nan"), 2.0, 4.0, 6.0]), level)
    run.log(10, lr=0.1)
    row = rows(tmp_path / "r/log.csv")[0]
    assert [float(row[f"loss_q{q}"]) for q in (1, 2, 3, 4)] == [2.0, 5.0, 2.0, 5.0]
    run.finish(10)


def test_console_line_fits_100_columns(tmp_path, capsys):
    config = Config(out=str(tmp_path / "r"), steps=4_450_000)
    run = runtime.Run(config, "script", RECORD, ALONE)
    run.keep(model=nn.Linear(1, 1), optimizer=torch.optim.AdamW(nn.Linear(1, 1).parameters()))
    run.resume()
    run.seconds = 5.0
    run.collect(torch.tensor([0.05312]), torch.tensor([0.5]))
    run.log(1_000_000, lr=2e-3)
    run.finish(1)
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("step"))
    assert line.startswith("step 1000000/4450000  loss 0.0531  lr 2.0e-03") and len(line) <= 100


def test_durations_are_said_as_a_person_says_them():
    assert [runtime.duration(s) for s in (40, 480, 3 * 3600, 3 * 86400)] == [
        "40 s", "8 min", "3.0 h", "3.0 days"
    ]  # fmt: skip


# --- folders --------------------------------------------------------------------------------------


def test_overwrite_leaves_what_no_run_has_written(tmp_path):
    out = tmp_path / "r"
    train(out, 1)
    (out / "notes.txt").write_text("mine")
    train(out / "test-4", 1)
    start(out, overwrite=True)[0].finish(0)
    assert (out / "notes.txt").exists() and not (out / "test-4").exists()
    assert not (out / "last.pt").exists()


def test_folder_without_a_run_is_not_cleared(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.txt").write_text("years")
    with pytest.raises(InputError, match="no run"):
        start(tmp_path / "r", overwrite=True)


def test_working_folder_is_no_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="folder you are in"):
        start(Path("."))


def test_two_trainings_do_not_write_into_one_folder(tmp_path):
    run, _, _ = start(tmp_path / "r")
    code = (
        "import sys; sys.path.insert(0, 'tests')\nfrom pathlib import Path\n"
        "import test_runtime as t\nt.start(Path(sys.argv[1]))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "r")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    run.finish(0)
    assert "another run is writing" in done.stderr
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "another run is writing" not in done.stderr


def test_scores_of_other_cases_have_a_folder_of_their_own():
    folder = lambda other="", **v: str(runtime.scores_folder(Config(out="r", **v), other))  # noqa: E731
    assert folder() == "r" and folder(limit=4) == "r/test-4" and folder(split="val") == "r/val"
    assert folder("brats") == "r/brats-test"


def test_finished_and_scored_run_is_not_scored_again(tmp_path):
    run = train(tmp_path / "r", 1)
    assert not runtime.is_scored(run.config, {}, ALONE)
    (tmp_path / "r/summary.json").write_text("{}")
    assert runtime.is_scored(run.config, {}, ALONE)
    assert not runtime.is_scored(run.config, {"checkpoint": "x"}, ALONE)


# --- signals, errors, device ----------------------------------------------------------------------


def test_signal_is_agreed_on_and_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run, _, _ = start(tmp_path / "r")
    assert not run.stopped()
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.stopped() and run.finish(3) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_minutes_are_counted_over_all_restarts(tmp_path):
    run = train(tmp_path / "r", 3, minutes=0.02)  # 1.5 s
    assert not run.stopped() and run.time_up
    again, _, _ = start(tmp_path / "r", minutes=0.03)
    assert not again.stopped() and not again.time_up
    again.finish(3)


@pytest.mark.parametrize(
    "error, line",
    [
        (InputError("a is b; do c"), "script: a is b; do c"),
        (FileNotFoundError(2, "No such file or directory", "x.nii"), "script: x.nii: No such file"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 GB"), "script: out of memory"),
        (RuntimeError("DataLoader worker (pid 3) was killed"), "script: a DataLoader worker"),
    ],
)
def test_error_of_a_user_is_one_line_and_2(capsys, error, line):
    def main(argv):
        raise error

    assert runtime.run_main("script", main, []) == 2
    text = capsys.readouterr().err
    assert text.startswith(line) and text.count("\n") == 1


def test_defect_keeps_its_traceback():
    def main(argv):
        raise IndexError("ours")

    with pytest.raises(IndexError):
        runtime.run_main("script", main, [])


def test_closed_and_narrow_stdout_do_not_stop_a_run():
    code = "import sys\nfrom common.runtime import say\nsay('±')\nsys.stdout.close()\nsay('a')\n"
    code += "sys.stderr.write('alive')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "alive" and done.stdout == "?\n"


@pytest.mark.parametrize("device", ["cuda:7", "tpu", "cpu:1", "mps"])
def test_device_that_is_not_there_is_refused(device):
    with pytest.raises(InputError, match="--device"):
        runtime.start(device)


def test_one_gpu_for_two_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="names one GPU for 2 processes"):
        runtime.start("cuda:0")


def test_dtype_has_its_reason():
    assert runtime.autocast_dtype("off", CPU) == (None, "fp32, as --amp says")
    assert runtime.autocast_dtype("bf16", CPU)[0] == torch.bfloat16
    dtype, reason = runtime.autocast_dtype("auto", CPU)
    assert reason.startswith("fp32" if dtype is None else "bf16")


def test_modules_load_where_windows_lacks_them():
    code = (
        "import sys, os, signal\n"
        "for name in ('resource', 'fcntl'): sys.modules[name] = None\n"
        "del os.sysconf, os.O_DIRECTORY, signal.SIGHUP\n"
        "import torch\nfrom pathlib import Path\nfrom common import atomic_write, runtime\n"
        "atomic_write(Path(sys.argv[1]) / 'a', b'x')\n"
        "print(runtime.peak_memory_gb(torch.device('cpu')))\n"
        "print(runtime._lock(Path(sys.argv[1])) is not None)\n"
    )
    words = [sys.executable, "-c", code, str(ROOT / "tests")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    (ROOT / "tests/a").unlink()
    assert done.stdout.split() == ["nan", "True"], done.stderr


# --- memory, seeds --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 1, 3, padding=1)

    def forward(self, x, t):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("training, needed", [(True, 9 * 4 * 64**3), (False, 4 * 8 * 4 * 64**3)])
def test_memory_is_counted_without_being_taken(monkeypatch, training, needed):
    needed = needed / 1e9

    def check(free):
        monkeypatch.setattr(runtime, "free_memory_gb", lambda device: free)
        runtime.check_memory(Net(), (1, 1, 64, 64, 64), None, CPU, training, "try less")

    check(1.05 * needed)
    with pytest.raises(InputError, match=r"needs about .* GB .*try less"):
        check(0.95 * needed)


def test_seeds_depend_on_every_part():
    seeds = [
        runtime.seed_of(*parts) for parts in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1))
    ]
    assert len(set(seeds)) == 4 and runtime.seed_of(0, "a", 1) == seeds[0]


def test_noise_depends_on_the_samples_number_only():
    both = runtime.noise(0, "noise", [4, 9], (2, 3), CPU)
    assert torch.equal(runtime.noise(0, "noise", [9], (2, 3), CPU)[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(runtime.noise(1, "noise", [4], (2, 3), CPU)[0], both[0])


def test_cases_are_shared_and_all_processes_take_as_many_turns():
    asked = [0, 0]

    def stopped(rank):
        asked[rank] += 1
        return False

    cases = ["a", "b", "c"]
    shares = [list(Ranks(r, 2, CPU).share(cases, True, lambda r=r: stopped(r))) for r in (0, 1)]
    assert shares == [["a", "c"], ["b"]] and asked == [2, 2]


def test_batch_is_raised_or_refused(capsys):
    config = Config(accumulate=3)
    assert runtime.share_batch(config, {}, ALONE).batch == 6
    assert "raised from 4 to 6" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"use a multiple of 3, such as 6"):
        runtime.share_batch(config, {"batch": 4}, ALONE)


def test_config_is_written_with_its_maker(tmp_path):
    start(tmp_path / "r")[0].finish(0)
    content = json.loads((tmp_path / "r/config.json").read_text())
    assert content["lr"] == 0.1 and content["made_by"]["torch"] == torch.__version__
