"""ddpm_pretrain_finetune.py as a user runs it: pre-train, sample, score, fine-tune, DDPM-Seg, predict, faults."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, CommandLine, table
from PIL import Image

import ddpm_pretrain_finetune as P
from common import InputError
from common.old import loaders, metrics, runtime
from data_prep import msd

NET = [
    "--size",
    "32",
    "--channel-mult",
    "1,1",
    "--num-res-blocks",
    "1",
    "--attention-resolutions",
    "16",
]
FAST = [*NET, "--batch", "2", "--quiet", "--amp", "off", "--device", "cpu", "--preset", "tiny"]
PLAIN = ["--quiet", "--amp", "off", "--device", "cpu", "--preset", "tiny"]
PHANTOMS = loaders.CtPhantoms
CLI = CommandLine("ddpm_pretrain_finetune", P.main)
run, refused, weights, assert_same, step_of = (
    CLI.run,
    CLI.refused,
    CLI.weights,
    CLI.assert_same,
    CLI.step_of,
)


def state_of(out: Path, name: str = "last.pt") -> dict:
    return runtime.load_checkpoint(out / name, "ddpm_pretrain_finetune")


@pytest.fixture(autouse=True)
def few_phantoms(monkeypatch):
    """`--data synthetic` of one process: fewer cases."""

    def few(*args, **flags):
        data = PHANTOMS(*args, **flags)
        splits = data.meta["splits"]
        for name, n in (("unlabelled", 3), ("train", 3), ("val", 1), ("test", 2)):
            splits[name] = splits[name][:n]
        splits["pretrain"] = splits["unlabelled"] + splits["train"]
        return data

    monkeypatch.setattr(loaders, "CtPhantoms", few)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A data set of slices made from the publisher's layout."""
    folder = tmp_path_factory.mktemp("fake_slices")
    assert msd.main(["--make-fake", str(folder / "src")]) == 0
    argv = [
        "--src",
        str(folder / "src"),
        "--dst",
        str(folder / "slices"),
        "--as-slices",
        "--side",
        "32",
    ]
    assert msd.main([*argv, "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory) -> Path:
    """A run folder: three steps of pre-training, and two fine-tuned networks."""
    out = tmp_path_factory.mktemp("trained_ddpm") / "run"
    argv = ["--data", str(prepared / "slices"), "--out", str(out)]
    assert P.main(["pretrain", *FAST, *argv, "--steps", "3"]) == 0
    for strategy in ("decoder", "scratch"):
        assert P.main(["finetune", *PLAIN, *argv, "--steps", "2", "--strategy", strategy]) == 0
    return out


def folder_of(trained: Path, strategy: str = "decoder") -> Path:
    return trained / f"finetune-4-{strategy}-per-class-draw0"


# --- the whole story -------------------------------------------------------------------------------------------------


def test_bare_run_pretrains_samples_finetunes_and_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(P, "fine_steps", lambda *a: 1)
    out = tmp_path / "run"
    flags = ["--num-samples", "6", "--sampling-steps", "2"]
    assert P.main([*FAST, *flags, "--out", str(out), "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert (
        "DDPM pre-training, few labels (Huang et al. 2025), pretrain" in text
        and "differs   D1 D2 D3 D8 D12" in text
    )
    assert (
        "yardstick" in text
        and "fd_rand" in text
        and "memorised" in text
        and "real slices (floor)" in text
    )
    assert (
        text.count("finetune ->") == 9 and "the same slices, with and without pre-training" in text
    )
    assert "minus scratch" in text and "decoder, random encoder" in text and "95 % interval" in text
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "log.csv",
        "last.pt",
        "loss.png",
        "samples.npy",
        "figures/samples_lung.png",
    } <= names
    for draw in range(3):
        for name in ("scratch-per-class", "decoder-per-class", "decoder-per-class-random"):
            folder = f"finetune-4-{name}-draw{draw}"
            found = {n.removeprefix(folder + "/") for n in names if n.startswith(folder + "/")}
            assert {
                "metrics.csv",
                "metrics_slices.csv",
                "summary.json",
                "labels.json",
                "log.csv",
                "loss.png",
            } <= found
    assert not [n for n in names if n.endswith(".tmp")]


def test_strategies_of_a_draw_learn_from_the_same_slices(trained):
    a, b = (
        json.loads((folder_of(trained, s) / "labels.json").read_text())
        for s in ("decoder", "scratch")
    )
    assert (
        a == b
        and len(a["slices"]) == a["n"] == 4
        and a["percent"] == pytest.approx(100 * 4 / a["of"])
    )


def test_finetuning_starts_from_the_averaged_weights_and_keeps_the_encoder(trained):
    ours, start = state_of(folder_of(trained))["model"], state_of(trained)
    for name, value in start["ema"].items():
        if name.startswith(("input_blocks", "middle_block", "time_embed")):
            assert torch.equal(ours[f"net.{name}"], value), name
        elif name.startswith("output_blocks") and "emb_layers" not in name and value.ndim > 1:
            assert not torch.equal(ours[f"net.{name}"], value), name
    assert not any(
        torch.equal(v, start["model"][k])
        for k, v in start["ema"].items()
        if v.ndim == 4 and v.any()
    )


def test_raw_weights_and_random_start_are_flags(trained, prepared, capsys):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--out",
        str(trained),
        "--steps",
        "1",
    ]
    assert P.main([*argv, "--init-weights", "raw", "--draw", "7"]) == 0
    raw = state_of(trained / "finetune-4-decoder-per-class-draw7")["model"]
    assert torch.equal(
        raw["net.input_blocks.0.0.weight"], state_of(trained)["model"]["input_blocks.0.0.weight"]
    )
    assert P.main([*argv, *NET, "--init", "none"]) == 0
    other = state_of(trained / "finetune-4-decoder-per-class-random-draw0")["model"]
    assert not torch.equal(other["net.input_blocks.0.0.weight"], raw["net.input_blocks.0.0.weight"])
    assert "D9" in capsys.readouterr().out


def test_finetuning_again_does_nothing_twice(trained, prepared, capsys):
    out = folder_of(trained)
    before = (out / "last.pt").read_bytes(), (out / "metrics.csv").stat().st_mtime_ns
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--out",
        str(trained),
        "--steps",
        "2",
    ]
    assert P.main(argv) == 0
    assert ((out / "last.pt").read_bytes(), (out / "metrics.csv").stat().st_mtime_ns) == before
    assert "trained and scored already" in capsys.readouterr().out
    assert "--lr-schedule was linear and is const" in refused(
        capsys, *argv, "--lr-schedule", "const"
    )


def test_slices_table_has_rows_of_slices_with_the_organ_only(trained, prepared):
    rows = table(folder_of(trained) / "metrics_slices.csv")
    data = loaders.open_slices(str(prepared / "slices"))
    for row in rows[:5]:
        case, k = row["case"], int(row["slice"])
        truth = np.asarray(data.label(case))[:, :, k] == data.classes[row["class"]]
        assert 0 <= float(row["dice"]) <= 1 and (truth.any() or float(row["dice"]) == 0)
    assert list(rows[0]) == ["case", "slice", "class", "dice", "iou"]


# --- continuing ------------------------------------------------------------------------------------------------------


def test_same_command_again_trains_no_further_and_other_settings_are_refused(tmp_path, capsys):
    argv = ["pretrain", *FAST, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert P.main(argv) == 0
    before = (tmp_path / "run/last.pt").read_bytes()
    assert P.main(argv) == 0 and (tmp_path / "run/last.pt").read_bytes() == before
    assert [r["step"] for r in table(tmp_path / "run/log.csv") if r["val_loss"]] == ["1"]
    assert P.main([*argv[:-1], "2"]) == 0 and step_of(tmp_path / "run") == 2
    assert "--schedule was linear and is cosine" in refused(capsys, *argv, "--schedule", "cosine")
    assert (
        P.main([*argv, "--schedule", "cosine", "--overwrite"]) == 0
        and step_of(tmp_path / "run") == 1
    )


def test_stopped_and_killed_pretraining_continues_to_the_same_weights(tmp_path):
    argv = [
        "pretrain",
        "--data",
        "synthetic",
        *FAST,
        "--steps",
        "14",
        "--save-every",
        "1",
        "--eval-every",
        "6",
    ]
    assert run(*argv, "--out", str(tmp_path / "whole")).returncode == 0
    CLI.stop_and_continue(*argv, out=tmp_path / "cut", signals=[signal.SIGTERM, signal.SIGKILL])
    assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = [table(tmp_path / name / "log.csv") for name in ("whole", "cut")]
    held = [[(r["step"], r["val_loss"]) for r in log if r["val_loss"]] for log in rows]
    assert held[0] == held[1] and [s for s, _ in held[0]] == ["6", "12", "14"]


def test_stopped_finetuning_continues_to_the_same_weights(trained, prepared, tmp_path, monkeypatch):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--init",
        str(trained / "last.pt"),
        "--strategy",
    ]
    argv += ["full", "--steps", "5", "--save-every", "1"]
    assert P.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    plain, count = P.train_step, iter(range(99))

    def stopping(*args):
        if next(count) == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(P, "train_step", stopping)
    assert P.main([*argv, "--out", str(tmp_path / "cut")]) == 143
    name = "finetune-4-full-per-class-draw0"
    assert (
        step_of(tmp_path / "cut" / name) == 3
        and not (tmp_path / "cut" / name / "metrics.csv").exists()
    )
    assert P.main([*argv, "--out", str(tmp_path / "cut")]) == 0
    assert_same(tmp_path / "whole" / name, tmp_path / "cut" / name)


def assert_close(a: Path, b: Path, off: float) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert (
        max(
            float((left[k].float() - right[k].float()).abs().max())
            for k in left
            if k.startswith("model")
        )
        < off
    )
    mean = [
        torch.cat([v.flatten() for k, v in side.items() if k.endswith(".exp_avg")])
        for side in (left, right)
    ]
    assert float((mean[0] - mean[1]).norm()) < 1e-3 * float(mean[0].norm())


def test_accumulation_and_workers_do_not_change_the_result(tmp_path):
    argv = ["pretrain", *FAST, "--steps", "2"]
    for name, more in {
        "a": [],
        "b": ["--accumulate", "2", "--workers", "1", "--recompute"],
    }.items():
        assert P.main([*argv, "--out", str(tmp_path / name), *more]) == 0
    assert_close(tmp_path / "a", tmp_path / "b", 8e-4)


def test_two_processes_pretrain_finetune_and_score_as_one(tmp_path, prepared):
    argv = ["--data", str(prepared / "slices")]
    first = [*FAST, *argv, "--batch", "4", "--steps", "2"]
    later = [*PLAIN, *argv, "--steps", "2", "--strategy", "full", "--dice", "per-class"]
    assert P.main(["pretrain", *first, "--out", str(tmp_path / "one")]) == 0
    assert P.main(["finetune", *later, "--out", str(tmp_path / "one")]) == 0
    two = run("pretrain", *first, "--out", str(tmp_path / "two"), processes=2)
    assert two.returncode == 0 and "2 processes x 1 parts x 2" in two.stdout, two.stderr
    assert_close(tmp_path / "one", tmp_path / "two", 8e-4)
    start = ["--init", str(tmp_path / "one/last.pt")]
    two = run("finetune", *later, *start, "--out", str(tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    name = "finetune-4-full-per-class-draw0"
    assert_close(
        tmp_path / "one" / name, tmp_path / "two" / name, 8e-3
    )  # Dice and batch norm are of the whole batch
    rows = [metrics.read_metrics_csv(tmp_path / n / name / "metrics.csv") for n in ("one", "two")]
    assert [(r["case"], r["class"]) for r in rows[0]] == [(r["case"], r["class"]) for r in rows[1]]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_number_formats_train(tmp_path, amp):
    assert (
        P.main(["pretrain", *FAST, "--out", str(tmp_path / "run"), "--steps", "1", "--amp", amp])
        == 0
    )
    state = state_of(tmp_path / "run")
    assert bool(state["scaler"]) == (amp == "fp16")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state["model"].values())


def test_steps_without_a_finite_gradient_are_skipped_and_twenty_end_the_run(tmp_path, monkeypatch):
    plain, calls = P.noise_loss, iter(range(10_000))
    bad = {1, 2} | set(range(4, 99))
    monkeypatch.setattr(
        P, "noise_loss", lambda *a: plain(*a) * (float("nan") if next(calls) in bad else 1.0)
    )
    monkeypatch.setattr(P, "look_at_held", lambda *a: None)
    argv = ["pretrain", *FAST, "--out", str(tmp_path / "run"), "--save-every", "4", "--steps", "99"]
    with pytest.raises(InputError, match="no finite gradient in 20 steps before step 24"):
        P.main(argv)
    state = state_of(tmp_path / "run", "last.prev.pt")
    assert (
        state["step"] == 16
        and state["skipped"][0] == 14
        and all(v.isfinite().all() for v in state["model"].values())
    )


def test_select_val_evaluates_the_best_weights(trained, prepared, tmp_path):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--init",
        str(trained / "last.pt"),
        "--steps",
        "4",
    ]
    argv += ["--select", "val", "--eval-every", "2", "--out", str(tmp_path / "run")]
    assert P.main(argv) == 0
    out = tmp_path / "run/finetune-4-decoder-per-class-draw0"
    log = [(int(r["step"]), float(r["val_dice"])) for r in table(out / "log.csv") if r["val_dice"]]
    assert [s for s, _ in log] == [2, 4]
    best = max(log, key=lambda row: (row[1], row[0]))  # of equals the later
    assert state_of(out, "best.pt")["step"] == best[0]
    assert (
        P.checkpoint_path(P.Config(checkpoint=str(out))).name == "best.pt"
    )  # what `evaluate` takes of the folder


def test_select_val_wants_validation_cases(trained, capsys, monkeypatch):
    monkeypatch.setattr(
        loaders.Slices,
        "cases",
        lambda self, split: [] if split == "val" else self.meta["splits"][split],
    )
    argv = ["finetune", *PLAIN, *DATA(trained), "--out", str(trained), "--select", "val"]
    assert "has no validation case; prepare some with --split-sizes" in refused(capsys, *argv)


def test_scores_of_another_split_have_a_folder_of_their_own(trained, prepared, capsys):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--out",
        str(trained),
        "--steps",
        "2",
    ]
    before = (folder_of(trained) / "metrics.csv").read_text()
    capsys.readouterr()
    assert (
        P.main([*argv, "--split", "val"]) == 0 and "scored already" not in capsys.readouterr().out
    )
    assert (folder_of(trained) / "metrics.csv").read_text() == before
    assert (folder_of(trained) / "val/metrics.csv").exists()
    assert P.main([*argv, "--split", "val"]) == 0 and "scored already" in capsys.readouterr().out


def test_scores_of_fewer_cases_have_a_folder_of_their_own(trained, prepared):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--out",
        str(trained),
        "--steps",
        "2",
    ]
    argv += ["--split", "train"]
    assert P.main(argv) == 0
    before = (folder_of(trained) / "train/metrics.csv").read_text()
    assert P.main([*argv, "--limit", "1"]) == 0
    assert (folder_of(trained) / "train/metrics.csv").read_text() == before
    assert len({r["case"] for r in table(folder_of(trained) / "train-1/metrics.csv")}) == 1


def test_finetuning_from_weights_that_went_on_is_refused(prepared, tmp_path, capsys):
    argv = ["--data", str(prepared / "slices"), "--out", str(tmp_path / "run")]
    assert P.main(["pretrain", *FAST, *argv, "--steps", "1"]) == 0
    assert P.main(["finetune", *PLAIN, *argv, "--steps", "1"]) == 0
    votes = ["ddpmseg", *PLAIN, *argv, "--members", "1", "--epochs", "1", "--t-list", "50"]
    assert P.main(votes) == 0
    assert P.main(["pretrain", *FAST, *argv, "--steps", "2"]) == 0
    error = refused(capsys, "finetune", *PLAIN, *argv, "--steps", "1")
    assert "at step [1], which is at [2] now" in error and "--overwrite" in error
    assert "at step [1], which is at [2] now" in refused(capsys, *votes)
    assert P.main(["finetune", *PLAIN, *argv, "--steps", "1", "--overwrite"]) == 0


def test_random_start_has_the_pretrained_networks_shape(trained, prepared):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--out",
        str(trained),
        "--steps",
        "1",
    ]
    assert P.main([*argv, "--init", "none", "--strategy", "full"]) == 0
    a, b = (state_of(trained / f"finetune-4-{s}-per-class-{d}")["model"] for s, d in
            (("full", "random-draw0"), ("decoder", "draw0")))  # fmt: skip
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_preset_is_that_of_the_pretraining(trained, prepared, tmp_path):
    argv = [
        "finetune",
        "--data",
        str(prepared / "slices"),
        "--init",
        str(trained / "last.pt"),
        "--steps",
        "1",
    ]
    assert (
        P.main([*argv, "--out", str(tmp_path), "--quiet"]) == 0
    )  # no --preset: without tiny's it would be the paper's
    config = json.loads((tmp_path / "finetune-4-decoder-per-class-draw0/config.json").read_text())
    assert (
        config["preset"] == "tiny"
        and config["lr"] == P.FINETUNE["tiny"]["lr"]
        and config["dice"] == "per-class"
    )


def test_level_beyond_the_trained_ones_is_allowed_and_said(trained, prepared, tmp_path, capsys):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--out",
        str(trained),
        "--steps",
        "1",
        "--limit",
        "1",
    ]
    assert (
        P.main([*argv, "--t", "999"]) == 0
        and "one beyond the last trained level" not in capsys.readouterr().out
    )
    assert P.main([*argv, "--t", "1000"]) == 0
    assert "t = 1000 is one beyond the last trained level, 999" in capsys.readouterr().out


def test_run_without_all_of_its_scores_is_scored_again(trained, prepared, tmp_path, capsys):
    argv = [
        "finetune",
        *PLAIN,
        "--data",
        str(prepared / "slices"),
        "--out",
        str(trained),
        "--steps",
        "2",
    ]
    assert P.main(argv) == 0 and "trained and scored already" in capsys.readouterr().out
    folder = folder_of(trained)
    times = {
        name: (folder / name).stat().st_mtime_ns
        for name in ("metrics.csv", "metrics_slices.csv", "summary.json")
    }
    assert (
        max(times, key=lambda name: times[name]) == "summary.json"
    )  # what says that all is there comes last


# --- samples and their scores ----------------------------------------------------------------------------------------


def test_samples_are_hounsfield_units_and_pictures(trained, tmp_path):
    argv = [
        "sample",
        *PLAIN,
        "--checkpoint",
        str(trained / "last.pt"),
        "--num-samples",
        "5",
        "--sampling-steps",
        "2",
    ]
    assert P.main([*argv, "--out", str(tmp_path / "s"), *DATA(trained)]) == 0
    x = np.load(tmp_path / "s/samples.npy")
    assert x.shape == (5, 32, 32) and x.dtype == np.float32 and np.isfinite(x).all()
    assert [p.name for p in (tmp_path / "s/figures").iterdir()]
    assert P.main([*argv, "--out", str(tmp_path / "t"), *DATA(trained)]) == 0
    assert np.array_equal(x, np.load(tmp_path / "t/samples.npy"))


def DATA(trained: Path) -> list[str]:
    return ["--data", json.loads((trained / "config.json").read_text())["data"]]


def test_interrupted_sampling_makes_what_is_missing(trained, tmp_path, monkeypatch):
    argv = [
        "sample",
        *PLAIN,
        "--checkpoint",
        str(trained / "last.pt"),
        "--num-samples",
        "5",
        "--sampling-steps",
        "2",
    ]
    # One slice a batch: convolutions of another batch size may differ in the last bit.
    monkeypatch.setattr(P, "AT_ONCE", 1)
    assert P.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    made, asked, write = P.generate, [], P.write_array

    def listed(net, numbers, quiet=True):
        asked.append(list(numbers))
        return made(net, numbers, quiet)

    def full(file, array):
        if file.name == "3.npy":
            raise InputError("disk full")
        write(file, array)

    monkeypatch.setattr(P, "generate", listed)
    monkeypatch.setattr(P, "write_array", full)
    with pytest.raises(InputError):
        P.main([*argv, "--out", str(tmp_path / "s")])
    monkeypatch.setattr(P, "write_array", write)
    assert P.main([*argv, "--out", str(tmp_path / "s")]) == 0
    whole, mended = (np.load(tmp_path / name / "samples.npy") for name in ("whole", "s"))
    assert asked == [[0, 1, 2, 3, 4], [3, 4]] and np.array_equal(whole, mended)
    monkeypatch.setattr(P, "write_array", full)
    with pytest.raises(InputError):
        P.main([*argv, "--out", str(tmp_path / "s")])
    monkeypatch.setattr(P, "write_array", write)
    assert (
        P.main([*argv, "--out", str(tmp_path / "s"), "--seed", "1"]) == 0
    )  # slices of seed 0 are not taken for these
    assert asked[-1] == [0, 1, 2, 3, 4] and not np.array_equal(
        whole, np.load(tmp_path / "s/samples.npy")
    )


def test_ct_samples_are_shown_in_two_windows(tmp_path):
    argv = [*FAST, "--out", str(tmp_path / "run")]
    assert P.main(["pretrain", *argv, "--steps", "1"]) == 0
    assert (
        P.main(
            [
                "sample",
                *PLAIN,
                "--out",
                str(tmp_path / "run"),
                "--num-samples",
                "4",
                "--sampling-steps",
                "1",
            ]
        )
        == 0
    )
    names = sorted(p.name for p in (tmp_path / "run/figures").glob("samples*"))
    assert names == ["samples_abdomen.png", "samples_lung.png"]
    assert np.asarray(Image.open(tmp_path / "run/figures/samples_lung.png")).shape == (64, 64)
    low, high = (loaders.CtPhantoms(0).meta["normalisation"][k] for k in ("low", "high"))
    x = np.load(tmp_path / "run/samples.npy")
    assert low - 1 <= x.min() and x.max() <= high + 1 and x.min() < -300


def test_real_slices_given_as_samples_score_near_the_floor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loaders, "CtPhantoms", PHANTOMS)  # all of them
    data = loaders.CtPhantoms(0, side=32)
    every = P.pretraining_slices(data)
    x = P.stack(data, [every[i] for i in range(0, len(every), 3)])
    np.save(tmp_path / "real.npy", P.hounsfield(x, loaders.data_record(data)).astype(np.float32))
    noise = np.random.default_rng(0).uniform(-1000, 400, x.shape).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    found = {}
    for name in ("real", "noise"):
        argv = ["score", *FAST, "--output", str(tmp_path / f"{name}.npy"), "--out", str(tmp_path)]
        assert P.main(argv) == 0
        found[name] = table(tmp_path / "score_rand.csv")
    near, floor = (float(found["real"][i]["fd_rand"]) for i in (0, 1))
    assert near < 1.5 * floor and float(found["noise"][0]["fd_rand"]) > 5 * floor
    assert (
        float(found["noise"][0]["precision_rand"]) == 0 < float(found["real"][0]["precision_rand"])
    )
    assert float(found["real"][0]["memorised"]) < 0.05  # they are pre-training slices
    assert "real slices (floor)" in capsys.readouterr().out


def test_features_of_an_encoder_are_named_by_its_file(trained, tmp_path, capsys):
    np.save(
        tmp_path / "samples.npy",
        np.random.default_rng(0).uniform(-1, 1, (8, 32, 32)).astype(np.float32),
    )
    argv = ["score", *PLAIN, *DATA(trained), *NET, "--out", str(tmp_path), "--features"]
    assert P.main([*argv, f"encoder:{trained / 'last.pt'}"]) == 0
    (file,) = tmp_path.glob("score_enc-*.csv")
    assert (
        any(k.startswith("fd_enc-") for k in table(file)[0])
        and "SHA-256" in table(file)[0]["features"]
    )
    assert "of the very network that is scored" not in capsys.readouterr().out
    config = P.Config(
        features=f"encoder:{trained / 'last.pt'}", out=str(trained), device="cpu", amp="off"
    )
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    found, spatial = P.feature_network(config, P.Ranks(0, 1, 0, torch.device("cpu")))[0](x)
    assert "of the very network that is scored" in capsys.readouterr().out
    net = P.load_network(P.replace(config, checkpoint=str(trained / "last.pt")), "pretrain",
                         P.Ranks(0, 1, 0, torch.device("cpu")))[0].model  # fmt: skip
    with torch.no_grad():
        middle = net.encode(x, torch.zeros(2))[0]
    torch.testing.assert_close(found, middle.mean((2, 3)))
    assert spatial is None


def test_copies_among_samples_and_noisy_settings_are_said(trained, tmp_path, capsys):
    slices = np.random.default_rng(0).uniform(-1, 1, (8, 32, 32)).astype(np.float32)
    np.save(tmp_path / "samples.npy", np.concatenate([slices[:1]] * 5 + [slices]))
    assert P.main(["score", *PLAIN, *DATA(trained), *NET, "--out", str(tmp_path)]) == 0
    assert "have three exact copies in their own set" in capsys.readouterr().out
    argv = [
        "sample",
        *PLAIN,
        "--checkpoint",
        str(trained / "last.pt"),
        "--out",
        str(tmp_path / "s"),
        "--sampler",
        "ddpm",
    ]
    assert (
        P.main([*argv, "--num-samples", "1", "--sampling-steps", "2", "--variance", "large"]) == 0
    )
    assert "--variance large with 2 steps gives noisy slices" in capsys.readouterr().out


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)


class Inception(torch.nn.Module):
    """Stands for NVIDIA's: 16-bit colours in, features and a map of 17 x 17 out where they are asked for."""

    def forward(
        self, x: torch.Tensor, return_features: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert return_features and x.shape[1] == 3
        return x.flatten(1)[:, :4], torch.arange(768.0)[None, :, None, None].expand(
            x.shape[0], -1, 17, 17
        )


def test_a_torchscript_that_knows_the_word_is_asked_for_features(tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "net.pt")
    config = P.Config(features=f"inception:{tmp_path / 'net.pt'}")
    call, suffix, what = P.feature_network(config, P.Ranks(0, 1, 0, torch.device("cpu")))
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    found, spatial = call(x)
    torch.testing.assert_close(found, (x.flatten(1)[:, :4] + 1) * 127.5)
    assert (
        spatial.shape == (2, 7 * 17 * 17)
        and spatial[0, -1] == 6
        and suffix == ""
        and "SHA-256" in what
    )
    with pytest.raises(
        RuntimeError
    ):  # its own fault, of colours that are not three, is not taken for the missing word
        call(x.expand(-1, 2, -1, -1))


def test_a_users_torchscript_gives_fid_and_a_state_dict_is_refused(trained, tmp_path, capsys):
    np.save(
        tmp_path / "samples.npy",
        np.random.default_rng(0).uniform(-1, 1, (8, 32, 32)).astype(np.float32),
    )
    torch.jit.script(Doubled()).save(tmp_path / "net.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "dict.pth")
    argv = ["score", *PLAIN, *DATA(trained), *NET, "--out", str(tmp_path), "--features"]
    assert P.main([*argv, f"inception:{tmp_path / 'net.pt'}"]) == 0
    row = table(tmp_path / "score_inception.csv")[0]
    assert {"fid", "sfid", "precision"} <= set(row) and row["features"].startswith(
        "net.pt SHA-256 "
    )
    assert "SHA-256" in capsys.readouterr().out
    assert "is no TorchScript" in refused(capsys, *argv, f"inception:{tmp_path / 'dict.pth'}")


# --- DDPM-Seg, evaluate, predict --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def voted(trained) -> Path:
    argv = [
        "ddpmseg",
        *PLAIN,
        *DATA(trained),
        "--out",
        str(trained),
        "--members",
        "2",
        "--epochs",
        "1",
        "--t-list",
        "50",
    ]
    assert P.main([*argv, "--blocks", "1,3"]) == 0
    return trained / "ddpmseg-4-draw0"


def test_ddpmseg_leaves_scores_and_no_features_behind(voted, trained):
    assert (voted / "summary.json").exists() and not list(voted.glob("*.npy"))
    state = state_of(voted)
    assert state["stage"] == "ddpmseg" and state["step"] == 2
    assert torch.equal(state["model"]["net.middle_block.0.in_layers.2.weight"],
                       state_of(trained)["ema"]["middle_block.0.in_layers.2.weight"])  # fmt: skip


def test_stopped_ddpmseg_keeps_its_finished_members(voted, trained, monkeypatch):
    argv = [
        "ddpmseg",
        *PLAIN,
        *DATA(trained),
        "--out",
        str(trained),
        "--members",
        "2",
        "--epochs",
        "1",
        "--t-list",
        "50",
    ]
    argv += ["--blocks", "1,3", "--draw", "1"]
    plain, seen = P.fit_member, []

    def counting(config, store, classes, member):
        seen.append(member)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(config, store, classes, member)

    monkeypatch.setattr(P, "fit_member", counting)
    with pytest.raises(KeyboardInterrupt):
        P.main(argv)
    assert not list((trained / "ddpmseg-4-draw1").glob("*.npy"))
    assert P.main(argv) == 0 and seen == [0, 1, 1]


def test_two_processes_vote_as_one(voted, trained, tmp_path):
    argv = [
        "ddpmseg",
        *PLAIN,
        *DATA(trained),
        "--init",
        str(trained / "last.pt"),
        "--out",
        str(tmp_path / "two"),
    ]
    two = run(
        *argv, "--members", "2", "--epochs", "1", "--t-list", "50", "--blocks", "1,3", processes=2
    )
    assert two.returncode == 0, two.stderr
    one, both = (state_of(out)["model"] for out in (voted, tmp_path / "two/ddpmseg-4-draw0"))
    assert all(torch.equal(one[k], both[k]) for k in one)


def test_random_features_of_ddpmseg_are_no_linear_map(trained):
    argv = [
        "ddpmseg",
        *PLAIN,
        *DATA(trained),
        "--out",
        str(trained),
        "--init",
        "none",
        "--members",
        "1",
    ]
    assert P.main([*argv, "--epochs", "1", "--t-list", "50"]) == 0
    state = state_of(trained / "ddpmseg-4-random-draw0")["model"]
    assert float(state["net.middle_block.0.out_layers.3.weight"].abs().max()) > 0


def test_labels_above_255_are_written_as_published(trained, tmp_path, monkeypatch):
    data = loaders.open_slices(DATA(trained)[1], side=32)
    data.meta["label_values"] = {
        "0": 0,
        "1": 300,
        **{k: int(v) for k, v in data.meta["label_values"].items() if k > "1"},
    }
    monkeypatch.setattr(P, "segment_case", lambda net, data, case: np.asarray(data.label(case)))
    P.score_cases(
        None, data, data.cases("test")[:1], P.Ranks(0, 1, 0, torch.device("cpu")), tmp_path
    )
    (file,) = (tmp_path / "predictions").iterdir()
    assert np.asarray(nib.load(file).dataobj).max() == 300


def test_evaluate_gives_what_finetune_gave(trained, tmp_path):
    argv = [
        "evaluate",
        *PLAIN,
        "--checkpoint",
        str(folder_of(trained) / "last.pt"),
        "--out",
        str(tmp_path / "again"),
    ]
    assert P.main([*argv, *DATA(trained)]) == 0
    for name in ("metrics.csv", "metrics_slices.csv"):
        assert (tmp_path / "again" / name).read_text() == (folder_of(trained) / name).read_text()


def raw_image(prepared: Path) -> Path:
    return sorted((prepared / "src/imagesTr").glob("[!.]*.nii.gz"))[0]


@pytest.mark.parametrize("kind", ["finetune", "ddpmseg"])
def test_predict_writes_published_values_in_the_files_grid(
    trained, voted, prepared, tmp_path, kind
):
    checkpoint = (folder_of(trained) if kind == "finetune" else voted) / "last.pt"
    image = raw_image(prepared)
    argv = ["predict", *PLAIN, "--checkpoint", str(checkpoint), "--image", str(image), "--output"]
    assert P.main([*argv, str(tmp_path / "mask.nii.gz")]) == 0
    mask, like = nib.load(tmp_path / "mask.nii.gz"), nib.load(image)
    assert mask.shape == like.shape[:3] and np.array_equal(mask.affine, like.affine)
    values = json.loads((prepared / "slices/dataset.json").read_text())["label_values"]
    assert set(np.unique(np.asarray(mask.dataobj)).tolist()) <= set(values.values())


def test_predict_shows_the_network_what_the_preparation_stored(trained, prepared):
    data = loaders.open_slices(str(prepared / "slices"))
    case = data.cases("test")[0]
    image = next(
        p
        for p in (prepared / "src/imagesTr").glob("*.nii.gz")
        if loaders.nifti_stem(p).startswith(case)
    )
    record = state_of(folder_of(trained))["data"]
    x, _ = loaders.load_slices_for_prediction(image, record)
    stored = np.stack([data.slice(case, k) for k in range(data.depth(case))])
    assert x.shape == stored.shape and float(np.abs(x - stored).max()) < 2e-3


# --- faults ----------------------------------------------------------------------------------------------------------


def test_wrong_stage_is_refused_by_name(trained, prepared, tmp_path, capsys):
    image, target = str(raw_image(prepared)), str(tmp_path / "m.nii.gz")
    error = refused(
        capsys,
        "predict",
        "--checkpoint",
        str(trained / "last.pt"),
        "--image",
        image,
        "--output",
        target,
    )
    assert "is a checkpoint of `pretrain`" in error and "fine-tuned" in error
    fine = str(folder_of(trained) / "last.pt")
    assert "is a checkpoint of `finetune`" in refused(capsys, "sample", "--checkpoint", fine)
    assert "is a checkpoint of `finetune`" in refused(
        capsys, "finetune", *PLAIN, *DATA(trained), "--init", fine
    )


def test_other_network_flags_than_those_of_the_pretraining_are_refused(trained, capsys):
    argv = ["finetune", *PLAIN, *DATA(trained), "--out", str(trained)]
    assert "was pre-trained with --num-res-blocks 1" in refused(
        capsys, *argv, "--num-res-blocks", "2"
    )


def test_size_of_the_data_and_of_the_network_must_agree(trained, capsys):
    argv = ["pretrain", *FAST, *DATA(trained), "--size", "16"]
    assert "holds slices of side 32, --size is 16" in refused(capsys, *argv)


def test_labelled_data_of_another_scale_are_refused(trained, prepared, tmp_path, capsys):
    other = tmp_path / "other"
    argv = [
        "--src",
        str(prepared / "src"),
        "--dst",
        str(other),
        "--as-slices",
        "--side",
        "64",
        "--quiet",
    ]
    assert msd.main(argv) == 0
    error = refused(
        capsys,
        "finetune",
        *PLAIN,
        "--data",
        str(other),
        "--init",
        str(trained / "last.pt"),
        "--out",
        str(tmp_path),
    )
    assert "holds slices of side 64, --size is 32" in error
    state = state_of(trained)
    state["data"]["normalisation"] = {"kind": "hu", "low": -1, "high": 1}
    runtime.save_checkpoint(tmp_path / "start.pt", state)
    argv = [
        "finetune",
        *PLAIN,
        *DATA(trained),
        "--init",
        str(tmp_path / "start.pt"),
        "--out",
        str(tmp_path / "x"),
    ]
    error = refused(capsys, *argv)
    assert "was pre-trained on data with normalisation" in error and "--unlabelled" in error


def test_volumes_instead_of_slices_are_refused_with_the_command(fake, capsys):
    error = refused(capsys, "pretrain", *FAST, "--data", str(fake / "prepared"))
    assert "--as-slices" in error


def test_more_labels_than_there_are_is_refused(trained, capsys):
    argv = ["finetune", *PLAIN, *DATA(trained), "--out", str(trained), "--labels", "99999"]
    assert "labelled training slices; lower it" in refused(capsys, *argv)


def test_colour_network_is_refused_naming_both_layers(trained, tmp_path, capsys):
    rgb = P.UNet(P.Config(**P.PRESETS["tiny"]), 3, 6).state_dict()
    torch.save(rgb, tmp_path / "rgb.pt")
    error = refused(
        capsys,
        "pretrain",
        "--init",
        str(tmp_path / "rgb.pt"),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    )
    assert "input_blocks.0.0.weight" in error and "out.2.weight" in error and "one channel" in error


def test_public_state_dict_of_one_channel_is_a_start(tmp_path):
    config = P.Config(**P.PRESETS["tiny"])
    state = {f"module.{k}": v for k, v in P.UNet(config, 1, 1).state_dict().items()}
    torch.save(state, tmp_path / "start.pt")
    argv = [
        "pretrain",
        "--init",
        str(tmp_path / "start.pt"),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
        "--steps",
        "1",
    ]
    assert P.main([*argv, "--lr", "1e-9", "--amp", "off"]) == 0
    found = state_of(tmp_path / "run")["model"]
    assert (
        float(
            (found["input_blocks.0.0.weight"] - state["module.input_blocks.0.0.weight"]).abs().max()
        )
        < 1e-6
    )


def test_flags_that_a_verb_ignores_are_refused(capsys):
    assert "--checkpoint is for sample, score, evaluate, predict; finetune ignores it" in refused(
        capsys, "finetune", "--checkpoint", "x.pt"
    )
    assert "--sampler is for the bare run, sample; pretrain ignores it" in refused(
        capsys, "pretrain", "--sampler", "ddim"
    )
    assert "pretrain ignores it" in refused(capsys, "pretrain", "--labels", "39")
    assert "ddpmseg ignores it" in refused(capsys, "ddpmseg", "--lr", "1e-2")


def test_no_samples_is_one_line(tmp_path, capsys):
    assert "no samples" in refused(capsys, "score", *FAST, "--out", str(tmp_path))
    np.save(tmp_path / "samples.npy", np.zeros((5, 16, 16), np.float32))
    assert "holds (5, 16, 16), expected" in refused(capsys, "score", *FAST, "--out", str(tmp_path))
    np.save(tmp_path / "samples.npy", np.full((5, 32, 32), np.nan, np.float32))
    assert "holds NaN or infinity" in refused(capsys, "score", *FAST, "--out", str(tmp_path))


def test_one_scan_in_all_is_no_floor(tmp_path, capsys, monkeypatch):
    def one(*args, **flags):
        data = PHANTOMS(*args, **flags)
        splits = data.meta["splits"]
        splits |= {name: [] for name in splits} | {
            "train": splits["train"][:1],
            "pretrain": splits["train"][:1],
        }
        return data

    monkeypatch.setattr(loaders, "CtPhantoms", one)
    np.save(tmp_path / "samples.npy", np.zeros((5, 32, 32), np.float32))
    assert "has 1 scan in all" in refused(capsys, "score", *FAST, "--out", str(tmp_path))


def test_maps_of_one_pixel_are_refused(capsys):
    error = refused(capsys, "pretrain", "--channel-mult", "1,1,1,1,1,1", "--preset", "tiny")
    assert "--size 32 is not a multiple of 32 and at least 64, which 6 levels ask for" in error


def test_predict_takes_a_folder(trained, prepared, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.nii.gz").write_bytes(raw_image(prepared).read_bytes())
    argv = [
        "predict",
        *PLAIN,
        "--checkpoint",
        str(folder_of(trained) / "last.pt"),
        "--image",
        str(folder),
    ]
    assert P.main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_predict_refuses_to_overwrite_its_input(trained, prepared, capsys):
    image = str(raw_image(prepared))
    argv = [
        "predict",
        *PLAIN,
        "--checkpoint",
        str(folder_of(trained) / "last.pt"),
        "--image",
        image,
        "--output",
        image,
    ]
    before = Path(image).read_bytes()
    assert (
        "would overwrite the input" in refused(capsys, *argv) and Path(image).read_bytes() == before
    )


def test_disk_full_while_saving_keeps_the_old_checkpoint(tmp_path):
    argv = ["pretrain", "--data", "synthetic", *FAST, "--out", str(tmp_path / "run")]
    assert P.main([*argv, "--steps", "1"]) == 0
    CLI.refuses_full_disk(*argv, "--steps", "2", out=tmp_path / "run")
    assert step_of(tmp_path / "run") == 1


def test_accumulation_of_finetuning_is_refused(trained, capsys):
    argv = ["finetune", *PLAIN, *DATA(trained), "--out", str(trained), "--accumulate", "2"]
    assert "--accumulate are for pretrain" in refused(capsys, *argv)


@pytest.mark.slow
def test_bare_run_takes_less_than_five_minutes_and_prints_its_table(tmp_path):
    begin = time.time()
    words = [sys.executable, "ddpm_pretrain_finetune.py", "--quiet", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and time.time() - begin < 300, done.stderr
    rows = re.findall(
        r"^(decoder|decoder, random encoder|scratch) +4 .* 3 +(0\.\d+)", done.stdout, re.MULTILINE
    )
    dice = {name: float(value) for name, value in rows}
    assert dice["decoder"] > 0.4 > dice["decoder, random encoder"]
