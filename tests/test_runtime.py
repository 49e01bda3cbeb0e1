"""Saving, loading, flags, log, seeds: what keeps a run safe."""

import csv
import fcntl
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from common import InputError
from common.old import runtime
from common.old.runtime import Ranks, flag

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def complete_state(**changes):
    state = {key: {} for key in runtime.CHECKPOINT_KEYS} | {
        "format": runtime.FORMAT,
        "script": "patchddm",
        "step": 3,
    }
    return state | changes


# --- saving ----------------------------------------------------------------------------------------------------------


def test_save_keeps_the_old_file_as_previous(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for step in (1, 2, 3):
        runtime.save_checkpoint(path, complete_state(step=step), previous)
    assert runtime.load_checkpoint(path, "patchddm")["step"] == 3
    assert runtime.load_checkpoint(previous, "patchddm")["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.prev.pt", "last.pt"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("file write failed")]
)
def test_failed_save_leaves_the_old_checkpoint_and_says_so(tmp_path, monkeypatch, error):
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    runtime.save_checkpoint(path, complete_state(step=1), previous)

    def half_written(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(InputError, match=r"last\.pt cannot be written .*untouched; free space"):
        runtime.save_checkpoint(path, complete_state(step=2), previous)
    assert runtime.load_checkpoint(path, "patchddm")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full"
)
def test_a_device_that_is_really_full_is_reported(tmp_path):
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot be written"):
        runtime.save_checkpoint(tmp_path / "last.pt", complete_state())
    assert not (tmp_path / "last.pt").exists()


def test_process_killed_inside_a_save_leaves_a_loadable_checkpoint(tmp_path):
    runtime.save_checkpoint(tmp_path / "last.pt", complete_state(step=1))
    code = (
        "import os, signal, sys, torch\nfrom pathlib import Path\nfrom common.old import runtime\n"
        "def half(f):\n    f.write(b'x' * 1000); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "runtime.write_atomic(Path(sys.argv[1]), half, Path(sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "last.pt", tmp_path / "last.prev.pt"]
    assert subprocess.run(arguments, cwd=Path(__file__).parents[1]).returncode == -signal.SIGKILL
    newest = runtime.load_newest(tmp_path, "patchddm")
    assert newest is not None and newest["step"] == 1


# --- loading ---------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["MALICE"])),)


def test_malicious_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MALICE", str(tmp_path / "owned"))
    torch.save({"model": Malicious()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=f"{name} .*(not opened|damaged)"):
            runtime.load_tensors(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_truncated_checkpoint_is_refused_at_every_length(tmp_path):
    path = tmp_path / "last.pt"
    runtime.save_checkpoint(path, complete_state(model={"w": torch.randn(50)}))
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"last\.pt"):
            runtime.load_checkpoint(path, "patchddm")


@pytest.mark.parametrize(
    "state, words",
    [
        (complete_state(format=runtime.FORMAT + 1), "use a newer version"),
        (complete_state(format="1"), "use a newer version"),
        (
            complete_state(script="masked_diffusion"),
            "belongs to masked_diffusion.py, this is patchddm.py",
        ),
        ({k: v for k, v in complete_state().items() if k != "optimizer"}, "lacks optimizer"),
        ({"conv.weight": torch.zeros(1)}, "public weights go to --init"),
        ([1, 2], "not a checkpoint"),
    ],
)
def test_foreign_checkpoint_is_refused_by_name(tmp_path, state, words):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words):
        runtime.load_checkpoint(tmp_path / "x.pt", "patchddm")


def test_missing_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="does not exist; train first"):
        runtime.load_checkpoint(tmp_path / "no.pt", "patchddm")


def test_damaged_newest_checkpoint_falls_back_to_the_previous_one_aloud(tmp_path, capsys):
    assert runtime.load_newest(tmp_path, "patchddm") is None
    for step in (1, 2):
        runtime.save_checkpoint(
            tmp_path / "last.pt", complete_state(step=step), tmp_path / "last.prev.pt"
        )
    (tmp_path / "last.pt").write_bytes(b"damaged")
    newest = runtime.load_newest(tmp_path, "patchddm")
    assert newest is not None and newest["step"] == 1
    assert "Continuing from last.prev.pt" in capsys.readouterr().out
    (tmp_path / "last.prev.pt").unlink()
    with pytest.raises(InputError, match=r"last\.pt"):
        runtime.load_newest(tmp_path, "patchddm")


@pytest.mark.parametrize(
    "entry, words",
    [({"format": 99}, "has format 99"), ({"script": "other"}, "belongs to other.py")],
)
def test_checkpoint_of_another_program_is_refused_and_the_previous_one_not_taken(
    entry, words, tmp_path
):
    for step in (1, 2):
        runtime.save_checkpoint(
            tmp_path / "last.pt", complete_state(step=step), tmp_path / "last.prev.pt"
        )
    torch.save(complete_state(step=3) | entry, tmp_path / "last.pt")
    with pytest.raises(InputError, match=words):
        runtime.load_newest(tmp_path, "patchddm")


def test_loss_of_a_row_leaves_out_what_is_not_finite():
    losses = runtime.LossByTime(4, torch.device("cpu"))
    losses.add(torch.tensor([1, 2, 4]), torch.tensor([1.0, float("nan"), 3.0]))
    row = losses.row(runtime.Ranks(0, 1, 0, torch.device("cpu")))
    assert row == {"loss": 2.0, "loss_q1": 1.0, "loss_q4": 3.0}


def test_error_of_the_system_is_one_line(capsys, tmp_path):
    for error, words in (
        (OSError(28, "No space left on device"), "No space left"),
        (PermissionError(13, "no", "f"), "f: no"),
    ):

        def main(argv, error=error):
            raise error

        assert runtime.run_main("x", main, []) == 2 and words in capsys.readouterr().err


def test_other_settings_are_refused_with_a_list(tmp_path):
    old, new = {"lr": 1e-5, "batch": 1, "steps": 10}, {"lr": 1e-4, "batch": 2, "steps": 20}
    with pytest.raises(InputError, match=r"--lr was 1e-05 and is 0.0001, --batch was 1 and is 2\)"):
        runtime.check_same_config(old, new, {"steps"}, tmp_path)
    runtime.check_same_config(old, {**old, "steps": 5}, {"steps"}, tmp_path)


# --- log -------------------------------------------------------------------------------------------------------------


def test_log_of_a_continued_run_has_each_step_once(tmp_path):
    path = tmp_path / "log.csv"
    log = runtime.Log(path, ["step", "loss", "val_dice"], 0, True)
    for step in (1, 2, 3):
        log.row({"step": step, "loss": 0.123456789 * step}, silent=True)
    with open(path, "a") as f:
        f.write("4,0.")  # killed while writing
    log = runtime.Log(path, ["step", "loss", "val_dice"], 2, True)
    log.row({"step": 3, "loss": 9.0, "val_dice": 0.5})
    rows = list(csv.DictReader(path.open()))
    assert [r["step"] for r in rows] == ["1", "2", "3"]
    assert (
        rows[0]["loss"] == "0.123457" and rows[0]["val_dice"] == "" and rows[2]["val_dice"] == "0.5"
    )


def test_log_survives_commas_in_class_names(tmp_path):
    columns = ["step", "val_dice_cyst, left"]
    runtime.Log(tmp_path / "log.csv", columns, 0, True).row(
        {"step": 1, columns[1]: 0.5}, silent=True
    )
    runtime.Log(tmp_path / "log.csv", columns, 1, True)
    assert list(csv.DictReader((tmp_path / "log.csv").open())) == [{"step": "1", columns[1]: "0.5"}]


def test_loss_by_time_sorts_losses_into_quartiles():
    losses = runtime.LossByTime(1000, torch.device("cpu"))
    losses.add(torch.tensor([1, 250, 251, 1000]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert losses.row(ALONE) == {"loss": 4.0, "loss_q1": 2.0, "loss_q2": 5.0, "loss_q4": 7.0}
    assert losses.row(ALONE) == {"loss": 0.0}


def test_console_shows_the_numbers_of_the_log(tmp_path, capsys):
    runtime.Log(tmp_path / "log.csv", ["step", "loss"], 0, True).row({"step": 7, "loss": 0.5})
    assert capsys.readouterr().out == "step 7  loss 0.5\n"


def test_closed_stdout_does_not_stop_a_run():
    code = "import sys\nfrom common.old.runtime import say\n"
    code += "sys.stdout.close()\nsay('a')\nsay('b')\nsys.stderr.write('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "alive"


# --- flags, seeds, signals -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    data: str = flag("synthetic", "100 % help")
    preset: Literal["tiny", "paper"] = flag("paper", "p")
    lr: float = flag(1e-5, "rate")
    mult: tuple[int, ...] = flag((1, 2), "tuple")
    image: tuple[str, ...] = flag((), "files")
    fast: bool = flag(False, "pair")


PRESETS = {"tiny": {"lr": 0.5}, "paper": {}}


def parse(*argv):
    return runtime.parse_flags(Flags, argv, ("train", "predict"), PRESETS, "about")


def test_flags_come_from_given_then_preset_then_default():
    verb, config, given = parse("train", "--mult", "1,2,4", "--fast")
    assert (verb, config.lr, config.mult, config.fast, config.preset) == (
        "train",
        0.5,
        (1, 2, 4),
        True,
        "tiny",
    )
    assert given == {"mult": (1, 2, 4), "fast": True}
    assert parse("--data", "brats")[1] == Flags(data="brats")
    assert parse("--data", "brats", "--preset", "tiny", "--lr", "0.1")[1].lr == 0.1
    assert parse("predict", "--image", "a", "b", "--no-fast")[1].image == ("a", "b")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--nope", "1"], "--nope"),
        (["--lr", "fast"], "--lr"),
        (["--mult", "1,x"], "--mult"),
        (["--preset", "huge"], "--preset"),
        (["dance"], "dance"),
        (["--la", "1"], "--la"),
    ],
)
def test_unknown_flags_are_refused_by_name(argv, words):
    with pytest.raises(InputError, match=words):
        parse(*argv)


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as leave:
        parse("--help")
    text = capsys.readouterr().out
    assert leave.value.code == 0 and "100 % help (default: synthetic)" in " ".join(text.split())
    assert all(f"--{name}" in text for name in ("data", "lr", "mult", "no-fast"))


def test_range_check_refuses_nan_and_names_the_bound():
    for value, words in (
        (float("nan"), "nan, expected a number above 0 up to 1"),
        (0.0, "above 0"),
        (2.0, "up to 1"),
    ):
        with pytest.raises(InputError, match=words):
            runtime.check_range(Flags(lr=value), "lr", 0, 1, open_low=True)


def test_seeds_depend_on_every_part():
    seeds = {
        runtime.seed_of(*parts)
        for parts in ((0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a", "1"))
    }
    assert len(seeds) == 5 and all(0 <= s < 2**63 for s in seeds)
    assert runtime.seed_of(0, "noise", 3) == runtime.seed_of(0, "noise", 3)


def test_stop_flag_catches_and_gives_back():
    before = signal.getsignal(signal.SIGTERM)
    stop = runtime.StopFlag()
    assert stop.agreed(ALONE) == (0, False) and stop.agreed(ALONE, time_is_up=True) == (0, True)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed(ALONE) == (signal.SIGTERM, False)
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_run_main_turns_bad_input_into_one_line_and_2(capsys):
    def bad(argv):
        raise InputError("x is 1; use 2")

    assert runtime.run_main("name", bad, []) == 2
    assert capsys.readouterr().err == "name: x is 1; use 2\n"
    with pytest.raises(ZeroDivisionError):
        runtime.run_main("name", lambda argv: 1 // 0, [])


def test_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"--device cuda.*use --device cpu"):
        runtime.start_processes("cuda")


def test_amp_off_is_fp32_and_names_its_reason():
    assert runtime.number_format("off", torch.device("cpu")) == (None, "--amp off")
    assert runtime.number_format("fp16", torch.device("cpu"))[0] == torch.float16


# --- memory, batches, folders of scores ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_of_a_container_counts_pages_that_can_be_dropped(tmp_path, version):
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    limit, used = [
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.max", "memory.current"),
    ][version - 1]
    (folder / limit).write_text("16000\n")
    (folder / used).write_text("15000\n")
    (folder / "memory.stat").write_text("anon 2000\ninactive_file 9000\n")
    assert runtime.free_in_container(tmp_path) == 16000 - 15000 + 9000
    (folder / limit).write_text("max\n")
    assert runtime.free_in_container(tmp_path) == float("inf")


@dataclass(frozen=True)
class Batched:
    run_folder: Path
    batch: int = 1
    accumulate: int = 1
    overwrite: bool = False
    data: str = "a"
    split: str = "test"
    limit: int = 0


def test_a_raised_batch_stays_when_a_run_is_continued_on_fewer_processes(tmp_path):
    four = Ranks(0, 4, 0, torch.device("cpu"))
    raised = runtime.shared_batch(Batched(tmp_path), {}, four, tmp_path)
    assert raised.batch == 4
    runtime.write_json(tmp_path / "config.json", {"batch": raised.batch})
    assert (
        runtime.shared_batch(Batched(tmp_path), {}, ALONE, tmp_path).batch == 1
    )  # nothing was saved
    (tmp_path / "last.pt").touch()
    for config, given, batch in (
        (Batched(tmp_path), {}, 4),
        (Batched(tmp_path, batch=8), {}, 8),
        (Batched(tmp_path, batch=2), {"batch": 2}, 2),
        (Batched(tmp_path, overwrite=True), {}, 1),
    ):
        assert runtime.shared_batch(config, given, ALONE, tmp_path).batch == batch
    assert runtime.shared_batch(Batched(tmp_path), {}, ALONE, tmp_path / "finetune").batch == 1


def test_scores_of_the_last_weights_lie_apart_from_those_of_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = complete_state(config={"data": "a"})
    (tmp_path / "run").mkdir()
    runtime.save_checkpoint(tmp_path / "run/last.pt", state)
    config = Batched(Path("run"))
    assert runtime.scores_folder(config, tmp_path / "run/last.pt", "patchddm") == Path("run")
    runtime.save_checkpoint(tmp_path / "run/best.pt", state)
    assert runtime.scores_folder(config, tmp_path / "run/best.pt", "patchddm") == Path("run")
    assert runtime.scores_folder(config, tmp_path / "run/last.pt", "patchddm") == Path(
        "run/test-last"
    )
    val = Batched(Path("run"), split="val", limit=3)
    assert runtime.scores_folder(val, tmp_path / "run/best.pt", "patchddm") == Path("run/val-3")


def test_a_folder_with_a_profile_alone_can_become_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile.csv").write_text("method\n")
    runtime.make_run(tmp_path / "run", {"a": 1}, True, ALONE)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["config.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files but no run"):
        runtime.make_run(tmp_path / "other", {"a": 1}, True, ALONE)


def test_lack_of_memory_on_a_cpu_is_one_line(capsys):
    def full(argv):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    assert runtime.run_main("patchddm", full, []) == 2
    line = capsys.readouterr().err
    assert (
        line.startswith("patchddm: out of memory (")
        and "lower --batch" in line
        and line.count("\n") == 1
    )


# --- faults from outside ---------------------------------------------------------------------------------------------


def test_a_changed_bit_in_the_weights_is_noticed(tmp_path, capsys):
    last, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for step in (1, 2):
        runtime.save_checkpoint(
            last, complete_state(step=step, model={"w": torch.full((1000,), 7.0)}), previous
        )
    content = bytearray(last.read_bytes())
    at = content.index(torch.full((100,), 7.0).numpy().tobytes())
    content[at + 40] ^= 1
    last.write_bytes(content)
    assert not torch.equal(
        runtime.load_tensors(last)["model"]["w"], torch.full((1000,), 7.0)
    )  # torch does not notice
    with pytest.raises(runtime.DamagedError, match="does not fit its checksum"):
        runtime.load_checkpoint(last, "patchddm")
    assert runtime.load_newest(tmp_path, "patchddm")["step"] == 1
    assert "Continuing from last.prev.pt" in capsys.readouterr().out


def test_two_trainings_do_not_write_into_one_folder(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path; import torch; from common.old import runtime\n"
        f"runtime.make_run(Path({str(tmp_path / 'run')!r}), {{'a': 2}}, True, "
        "runtime.Ranks(0, 1, 0, torch.device('cpu')))"
    )
    runtime.make_run(tmp_path / "run", {"a": 1}, False, ALONE)
    runtime.make_run(tmp_path / "run", {"a": 1}, False, ALONE)  # the same process again
    for held in (True, False):
        if not held:
            runtime.stop_processes()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert ("another run is writing to" in done.stderr) == held == bool(done.returncode)
        assert (
            tmp_path / "run/config.json"
        ).read_text().strip() == f'{{\n "a": {1 if held else 2}\n}}'


def test_a_run_takes_no_folder_that_holds_other_things(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    for out, words in ((Path("."), "the folder you are in"), (tmp_path, "the folder you are in"),
                       (tmp_path / "work", "the folder you are in")):  # fmt: skip
        for overwrite in (False, True):
            with pytest.raises(InputError, match=words):
                runtime.make_run(out, {}, overwrite, ALONE)
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(InputError, match="holds files but no run"):
        runtime.make_run(tmp_path / "work", {}, True, ALONE)
    assert [f.name for f in (tmp_path / "work").iterdir()] == ["thesis.txt"]


def test_overwrite_leaves_what_no_run_has_written(tmp_path):
    run = tmp_path / "run"
    for name in (
        "log.csv",
        "finetune/config.json",
        "val/metrics.csv",
        "figures/a.png",
        "job.out",
        "data/scan.npy",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    runtime.make_run(run, {"a": 1}, False, ALONE)  # a queue's file does not stand in the way
    assert (run / "log.csv").exists()
    runtime.make_run(run, {"a": 2}, True, ALONE)
    assert sorted(f.name for f in run.iterdir()) == ["config.json", "data", "job.out"]
    assert (run / "data/scan.npy").exists() and json.loads((run / "config.json").read_text()) == {
        "a": 2
    }


def test_overwrite_does_not_take_a_subfolder_from_another_run(tmp_path):
    inner = tmp_path / "run/finetune"
    runtime.make_run(tmp_path / "run", {}, False, ALONE)
    inner.mkdir()
    (inner / "config.json").write_text("{}")
    handle = os.open(inner, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match=r"another run is writing to .*finetune"):
        runtime.make_run(tmp_path / "run", {}, True, ALONE)
    os.close(handle)
    assert inner.exists()
    runtime.make_run(tmp_path / "run", {}, True, ALONE)
    assert not inner.exists()


def test_loading_processes_do_not_hold_the_folder(tmp_path):
    runtime.make_run(tmp_path / "run", {}, False, ALONE)
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: (runtime.ignore_signals(0), time.sleep(60))
    )
    worker.start()
    time.sleep(0.5)
    runtime.stop_processes()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    try:
        fcntl.flock(
            handle, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # the worker lives, and the folder is free
        assert worker.is_alive()
    finally:
        os.close(handle)
        worker.kill()
        worker.join()


def test_weights_that_cannot_be_continued_are_not_overwritten(tmp_path):
    runtime.save_checkpoint(tmp_path / "best.pt", complete_state(config={}, data={}))
    with pytest.raises(InputError, match=r"holds best.pt but no last.pt.*use evaluate"):
        runtime.find_run(tmp_path, "patchddm", {"steps": 5}, (), {}, ALONE)
    (tmp_path / "best.pt").rename(tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"no optimiser .*use evaluate"):
        runtime.find_run(tmp_path, "patchddm", {"steps": 5}, (), {}, ALONE)
    state = complete_state(config={}, data={}, optimizer={"state": {}})
    runtime.save_checkpoint(tmp_path / "last.pt", state)
    assert runtime.find_run(tmp_path, "patchddm", {"steps": 5}, ["steps"], {}, ALONE)["step"] == 3


def test_a_damaged_log_loses_nothing_unsaid(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b'step,loss\n1,0.5\n2,0.4.1\n\xff3,0.3\n4,"0.2\n5,0.1\0\n')
    runtime.Log(path, ["step", "loss"], 5, True)
    assert path.read_text() == "step,loss\n1,0.5\n2,\n4,\n5,0.1\n"
    path.write_text("step;loss\n1;0.5\n")
    with pytest.raises(InputError, match="does not begin with the names of its columns"):
        runtime.Log(path, ["step", "loss"], 4, True)
    assert path.read_text() == "step;loss\n1;0.5\n"


def test_second_ctrl_c_stops_at_once_but_not_under_torchrun(capfd, monkeypatch):
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = runtime.StopFlag()
    try:
        os.kill(
            os.getpid(), signal.SIGTERM
        )  # of a queue: the first Ctrl-C after it is still the first
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # half a second later: the same key, twice
        assert (
            stop.signal == signal.SIGTERM
            and capfd.readouterr().err.count("stopping after this step") == 1
        )
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = runtime.StopFlag()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)  # a closed terminal
        assert stop.signal == signal.SIGINT
    finally:
        stop.restore()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_DFL


def test_end_of_another_process_is_one_line(capsys, monkeypatch):
    def lost(argv):
        raise RuntimeError(
            "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
        )

    with pytest.raises(RuntimeError):
        runtime.run_main("name", lost, [])
    left = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", left.append)
    runtime.run_main("name", lost, [])
    assert left == [2] and capsys.readouterr().err.count("another of the processes has ended") == 1


def test_a_table_with_missing_cells_is_refused_by_its_line(tmp_path):
    path = tmp_path / "grid.csv"
    runtime.write_csv(path, [{"a": "1", "b": ""}, {"a": "2", "b": "x"}])
    assert runtime.read_csv(path) == [{"a": "1", "b": ""}, {"a": "2", "b": "x"}]
    for line in ("3\n", "3,y,z\n"):
        path.write_text("a,b\n1,\n" + line)
        with pytest.raises(InputError, match=r"grid\.csv, line 3: not as many cells"):
            runtime.read_csv(path)
