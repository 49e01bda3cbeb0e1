"""diffseg3d_recycle.py as a user runs it: train, stop, continue, evaluate, predict, two processes, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CommandLine, table

import diffseg3d_recycle as D
from common import InputError
from common.old import loaders, metrics, runtime

ROOT = Path(__file__).parents[1]
NET = [
    "--num-channels",
    "4",
    "--channel-mult",
    "1,2",
    "--size",
    "24,24,16",
    "--batch",
    "2",
    "--recycle",
    "prev",
]
FAST = [*NET, "--limit", "1", "--quiet", "--amp", "off", "--device", "cpu"]
CLI = CommandLine("diffseg3d_recycle", D.main)
run, refused, weights, assert_same, step_of = (
    CLI.run,
    CLI.refused,
    CLI.weights,
    CLI.assert_same,
    CLI.step_of,
)


def assert_close(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and len(left) > 100
    for k in left:
        torch.testing.assert_close(left[k], right[k], atol=2e-5, rtol=1e-3)


@pytest.fixture(autouse=True)
def small_phantoms(monkeypatch):
    """`--data synthetic` of one process: fewer and smaller phantoms, of the training size."""
    plain = loaders.open_data

    def open_data(name: str):
        return (
            loaders.Phantoms(0, (6, 2, 2), shape=(24, 24, 16))
            if name == "synthetic"
            else plain(name)
        )

    monkeypatch.setattr(loaders, "open_data", open_data)


@pytest.fixture(scope="session")
def trained(fake, tmp_path_factory) -> Path:
    """A run folder with a few steps of training on the fake data."""
    out = tmp_path_factory.mktemp("trained_diffseg") / "run"
    argv = ["train", "--data", str(fake / "prepared"), "--preset", "tiny", "--out", str(out), *FAST]
    assert D.main([*argv, "--steps", "6", "--eval-every", "6"]) == 0
    return out


# --- the whole story -------------------------------------------------------------------------------------------------


def test_bare_run_trains_and_scores_three_networks_side_by_side(tmp_path, capsys):
    out = tmp_path / "run"
    fast = [w for w in FAST if w not in ("--recycle", "prev")]
    assert D.main([*fast, "--out", str(out), "--steps", "2", "--ensemble", "2", "--save-maps"]) == 0
    text = capsys.readouterr().out
    assert (
        text.count("DiffSeg3D with recycling (Fu et al. 2023)") == 3 and "differs   D1 D2" in text
    )
    assert "recycle prev" in text and "recycle none" in text and "U-net, weights" in text
    assert (
        "ensemble of 1" in text
        and "ensemble of 2" in text
        and text.count("Dice after each sampling step (first member): k = 5") == 2
    )
    rows = [
        line.split()[0] for line in text.split("side by side")[1].splitlines() if str(out) in line
    ]
    assert rows == [str(out), str(out / "not-recycled"), str(out / "unet")]
    for folder in (out, out / "not-recycled", out / "unet"):
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert {
            "config.json",
            "log.csv",
            "last.pt",
            "best.pt",
            "metrics.csv",
            "summary.json",
            "loss.png",
        } <= names
        assert {
            "figures/phantom_0008.png",
            "figures/phantom_0008_entropy.png",
            "dice_by_step.csv",
        } <= names
        assert ("figures/phantom_0008_steps.png" in names) == (folder.name != "unet")
        assert {
            "predictions/phantom_0008.nii.gz",
            "predictions/maps/phantom_0008_entropy.nii.gz",
        } <= names
        assert not [n for n in names if n.endswith(".tmp")]
        assert json.loads((folder / "summary.json").read_text())["mean"]["dice"]["n"] == 1


def test_larger_volumes_are_trained_on_windows_and_scored_whole(tmp_path, capsys):
    argv = [
        *FAST,
        "--size",
        "16,16,16",
        "--batch",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert D.main(argv) == 0
    text = capsys.readouterr().out
    assert "6 training cases are larger than 16x16x16" in text and "D11" in text
    assert nib.load(tmp_path / "run/predictions/phantom_0008.nii.gz").shape == (24, 24, 16)
    assert not (
        tmp_path / "run/figures/phantom_0008_steps.png"
    ).exists()  # there is no one chain of steps to show


def test_same_command_again_trains_no_further_and_other_settings_are_refused(tmp_path, capsys):
    argv = ["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert D.main(argv) == 0
    before = (tmp_path / "run/last.pt").read_bytes()
    assert D.main(argv) == 0
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert (
        D.main([*argv[:-1], "2", "--amp", "bf16"]) == 0
    )  # more steps continue, in another number format
    assert step_of(tmp_path / "run") == 2
    error = refused(capsys, *argv)  # or else weights of two steps would pass for those of one
    assert "has made 2 steps, more than --steps 1" in error
    assert "--recycle was prev and is max" in refused(capsys, *argv, "--recycle", "max")
    assert "--lr was 0.003 and is 0.5" in refused(capsys, *argv, "--lr", "0.5")
    error = refused(capsys, *argv, "--overwrite", "--init", str(tmp_path / "missing.pt"))
    assert "missing.pt does not exist" in error and step_of(tmp_path / "run") == 2
    assert D.main([*argv, "--lr", "0.5", "--overwrite"]) == 0
    assert step_of(tmp_path / "run") == 1


@pytest.mark.parametrize("recycle", ["prev", "recursive", "self-condition"])
def test_accumulation_and_workers_do_not_change_the_result(tmp_path, recycle):
    argv = ["train", *FAST, "--recycle", recycle, "--steps", "2", "--lr", "1e-4"]
    for name, flags in {
        "a": [],
        "b": ["--accumulate", "2", "--workers", "1", "--recompute"],
    }.items():
        assert D.main([*argv, "--out", str(tmp_path / name), *flags]) == 0
    assert_close(tmp_path / "a", tmp_path / "b")


def test_minutes_end_a_run_early(tmp_path):
    assert (
        D.main(
            ["train", *FAST, "--out", str(tmp_path / "a"), "--steps", "9999", "--minutes", "0.02"]
        )
        == 0
    )
    state = runtime.load_checkpoint(tmp_path / "a/last.pt", "diffseg3d_recycle")
    assert 1 <= state["step"] < 9999 and state["seconds"] >= 1.2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_number_formats_train(tmp_path, amp):
    assert (
        D.main(["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "3", "--amp", amp]) == 0
    )
    state = runtime.load_checkpoint(tmp_path / "run/last.pt", "diffseg3d_recycle")
    assert bool(state["scaler"]) == (amp == "fp16")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state["model"].values())


def spoiled_loss(monkeypatch, bad_calls):
    plain, calls = D.diffusion_loss, iter(range(10_000))

    def loss(*args):
        return plain(*args) * (float("nan") if next(calls) in bad_calls else 1.0)

    monkeypatch.setattr(D, "diffusion_loss", loss)


def test_steps_without_a_finite_gradient_are_skipped_and_twenty_end_the_run(tmp_path, monkeypatch):
    spoiled_loss(monkeypatch, {1, 2} | set(range(4, 99)))
    argv = ["train", *FAST, "--out", str(tmp_path / "run"), "--save-every", "4"]
    with pytest.raises(InputError, match="no finite gradient in 20 steps before step 24"):
        D.main([*argv, "--steps", "99"])
    state = runtime.load_checkpoint(tmp_path / "run/last.prev.pt", "diffseg3d_recycle")
    assert (
        state["step"] == 16
        and state["skipped"] == [14, 12, 12]
        and state["optimizer"]["state"][0]["step"] == 2
    )
    assert all(v.isfinite().all() for v in state["model"].values())


# --- stopping and continuing -----------------------------------------------------------------------------------------


def test_stopped_and_killed_run_continues_to_the_same_weights(tmp_path, fake):
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--steps",
        "24",
        "--save-every",
        "1",
        "--eval-every",
        "10",
        "--ema",
        "0.9",
    ]
    assert D.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    CLI.stop_and_continue(*argv, out=tmp_path / "cut", signals=[signal.SIGTERM, signal.SIGKILL])
    assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = [table(tmp_path / name / "log.csv") for name in ("whole", "cut")]
    validated = [[(r["step"], r["val_dice"]) for r in log if r["val_dice"]] for log in rows]
    assert validated[0] == validated[1] and [s for s, _ in validated[0]] == [
        "10",
        "20",
        "24",
    ]  # none lost or twice
    best = [
        runtime.load_checkpoint(tmp_path / n / "best.pt", "diffseg3d_recycle")["step"]
        for n in ("whole", "cut")
    ]
    assert best[0] == best[1]


def test_two_processes_train_and_evaluate_as_one(tmp_path, fake):
    argv = [
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--split",
        "train",
        "--steps",
        "3",
    ]
    argv += ["--batch", "4", "--limit", "2", "--lr", "1e-4"]
    assert D.main([*argv, "--out", str(tmp_path / "one")]) == 0
    two = run(*argv, "--out", str(tmp_path / "two"), "--accumulate", "2", processes=2)
    assert two.returncode == 0, two.stderr
    assert (
        "2 processes x 2 parts x 1" in two.stdout
        and two.stdout.count("DiffSeg3D with recycling") == 1
    )
    assert_close(tmp_path / "one", tmp_path / "two")
    one, both = (
        metrics.read_metrics_csv(tmp_path / n / "train/metrics.csv") for n in ("one", "two")
    )
    assert [(r["case"], r["class"]) for r in one] == [
        (r["case"], r["class"]) for r in both
    ] and len(one) == 4
    np.testing.assert_allclose([r["dice"] for r in one], [r["dice"] for r in both], atol=5e-3)


def test_two_processes_send_the_gradients_of_a_chain_once(tmp_path, fake):
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--recycle",
        "recursive",
    ]
    argv += ["--steps", "2", "--lr", "1e-4"]
    assert D.main([*argv, "--out", str(tmp_path / "one")]) == 0
    two = run(*argv, "--out", str(tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    assert_close(tmp_path / "one", tmp_path / "two")


# --- flags -----------------------------------------------------------------------------------------------------------


def two_steps(**flags) -> torch.Tensor:
    """All weights (or the averaged ones) after two steps on phantoms, as one vector."""
    config = replace(
        D.Config(**D.PRESETS["tiny"]), num_channels=4, channel_mult=(1, 2), size=(8, 8, 8), steps=4
    )
    config = replace(config, batch=2, lr=1e-3)
    config = replace(config, **flags)
    data = loaders.Phantoms(0, (4, 1, 1), shape=(12, 12, 8))
    training = D.Training(config, loaders.data_record(data), torch.device("cpu"), None)
    ranks = runtime.Ranks(0, 1, 0, torch.device("cpu"))
    loader = torch.utils.data.DataLoader(
        D.Volumes(data, config), batch_sampler=D.Sharded(config, ranks, 0)
    )
    batches, by_t = iter(loader), runtime.LossByTime(D.T, ranks.device)
    for _ in range(2):
        D.train_step(training, training.model, training.model, batches, ranks, by_t)
    assert not training.skipped.any() and np.isfinite(list(by_t.row(ranks).values())).all()
    return torch.cat([p.detach().flatten() for p in training.ema.parameters()])


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return two_steps()


@pytest.mark.parametrize(
    "flags",
    [
        {"seed": 1},
        {"method": "unet"},
        {"dims": 2},
        {"num_channels": 6},
        {"channel_mult": (1,)},
        {"time_inject": "pre-norm"},
        {"size": (8, 8, 4)},
        {"image_range": (0.0, 1.0)},
        {"target": "eps"},
        {"recycle": "max"},
        {"recycle": "none"},
        {"recycle": "recursive"},
        {"recycle": "self-condition"},
        {"dice": "off"},
        {"train_K": 1000},
        {"schedule": "code-v1"},
        {"rotate": 0.5},
        {"translate": (3, 3, 3)},
        {"scale": 0.0},
        {"image_noise": 0.1},
        {"batch": 4},
        {"lr": 1e-4},
        {"lr_steps": 400},
        {"weight_decay": 0.5},
        {"grad_clip": 1e-9},
        {"ema": 0.9},
    ],
    ids=str,
)
def test_flag_changes_the_training(plain, flags):
    changed = two_steps(**flags)
    assert changed.shape != plain.shape or (changed - plain).abs().max() > 1e-7


def test_network_trains_with_channels_last_on_a_cpu():
    config = replace(
        D.Config(**D.PRESETS["tiny"]), num_channels=4, channel_mult=(1, 2), size=(8, 8, 8)
    )
    record = {"channels": ["a"], "classes": {"b": 1}}
    model = D.Training(config, record, torch.device("cpu"), None).model
    assert model.first.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not model.first.conv1.weight.is_contiguous()


def test_clipping_changes_the_training_on_noise():
    assert not torch.equal(two_steps(target="eps"), two_steps(target="eps", clip_x0="off"))


PAIRS = {
    "recycle": ["prev", "max", "none", "recursive", "self-condition"],
    "target": ["x0", "eps"],
    "dims": [2, 3],
    "dice": ["on", "off"],
    "schedule": ["paper", "code-v1"],
    "sampler": ["ddpm", "ddim"],
    "clip_x0": ["on", "off"],
}


@pytest.mark.parametrize(
    "recycle, target, dims", list(product(PAIRS["recycle"], PAIRS["target"], PAIRS["dims"]))
)
def test_combinations_train_and_sample(recycle, target, dims):
    """The other flags run through their values, so that each pair of values occurs."""
    i = PAIRS["recycle"].index(recycle) + 2 * (target == "eps") + dims
    rest = {
        k: PAIRS[k][(i >> n) % 2] for n, k in enumerate(("dice", "schedule", "sampler", "clip_x0"))
    }
    flags = {"recycle": recycle, "target": target, "dims": dims, **rest}
    assert two_steps(**flags).isfinite().all()
    config = replace(
        D.Config(**D.PRESETS["tiny"]), num_channels=4, channel_mult=(1, 2), size=(8, 8, 8), **flags
    )
    record = {"channels": ["a"], "classes": {"b": 1, "c": 2}}
    net = D.Network(config, D.network_for(config, record), record, torch.device("cpu"), None, 0)
    probs = D.sample_member(net, torch.rand(1, 8, 8, 8), "case", 0)
    assert list(sorted(probs)) == [1, 2, 3, 4, 5] and probs[1].isfinite().all()
    torch.testing.assert_close(probs[1].sum(dim=0), torch.ones(8, 8, 8), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "flags",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7},
        {"variance": "large"},
        {"seed": 1},
        {"sampling_steps": 9},
        {"schedule": "code-v1"},
        {"ensemble": 2},
        {"clip_x0": "off"},
    ],
    ids=str,
)
def test_flag_changes_the_samples(flags):
    torch.manual_seed(0)
    base = replace(
        D.Config(train_K=1000, target="eps"), num_channels=4, channel_mult=(1, 2), size=(8, 8, 8)
    )
    record = {"channels": ["a"], "classes": {"b": 1, "c": 2}}
    model, image = D.network_for(base, record), torch.rand(1, 8, 8, 8)
    sampled = {}
    for key in ("base", "other"):
        config = base if key == "base" else replace(base, **flags)
        net = D.Network(config, model, record, torch.device("cpu"), None, 0)
        *_, sampled[key] = D.sample_ensemble(net, image, "case")
    assert not torch.equal(sampled["base"].prob, sampled["other"].prob)


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_starts_from_weights_and_takes_over_the_network(tmp_path, trained, fake, capsys):
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        "--quiet",
        "--amp",
        "off",
        "--limit",
        "1",
    ]
    argv += [
        "--steps",
        "1",
        "--lr",
        "1e-12",
        "--init",
        str(trained / "best.pt"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert D.main(argv) == 0
    start = runtime.load_checkpoint(trained / "best.pt", "diffseg3d_recycle")["model"]
    got = runtime.load_checkpoint(tmp_path / "run/last.pt", "diffseg3d_recycle")
    assert got["config"]["channel_mult"] == (1, 2) and got["config"]["size"] == (24, 24, 16)
    for k, v in start.items():
        torch.testing.assert_close(got["model"][k], v, atol=1e-6, rtol=0)
    error = refused(capsys, *argv, "--overwrite", "--num-channels", "6")
    assert "does not fit" in error and "stem.0.weight" in error


# --- evaluate and predict --------------------------------------------------------------------------------------------


def test_evaluate_scores_the_masks_that_it_writes_and_each_step(tmp_path, fake, trained):
    argv = [
        "evaluate",
        "--checkpoint",
        str(trained / "best.pt"),
        "--data",
        str(fake / "prepared"),
        "--quiet",
    ]
    assert D.main([*argv, "--out", str(tmp_path / "e"), "--save-members", "--ensemble", "2"]) == 0
    data = loaders.open_prepared(fake / "prepared")
    case = data.cases("test")[0]
    mask = nib.load(tmp_path / f"e/predictions/{case}.nii.gz")
    assert mask.shape == data.shape(case)
    np.testing.assert_allclose(mask.affine, data.affine(case), atol=1e-5)
    row = metrics.read_metrics_csv(tmp_path / "e/metrics.csv")[0]
    value = data.classes[row["class"]]
    pred, true = np.asarray(mask.dataobj) == value, np.asarray(data.label(case)) == value
    assert row["case"] == case and row["dice"] == pytest.approx(metrics.dice(pred, true), abs=1e-6)
    member = nib.load(tmp_path / f"e/predictions/members/{case}_1.nii.gz")
    assert member.shape == mask.shape
    steps = table(tmp_path / "e/dice_by_step.csv")
    assert [r["k"] for r in steps if r["case"] == case] == ["5", "4", "3", "2", "1"]
    first = {
        r["class"]: r["dice"]
        for r in metrics.read_metrics_csv(tmp_path / "e/metrics_ensemble1.csv")
        if r["case"] == case
    }
    last = next(r for r in steps if r["case"] == case and r["k"] == "1")
    assert {c: float(last[c]) for c in first} == pytest.approx(first, abs=1e-5)


def test_scores_are_made_again_and_those_of_other_cases_stand_apart(tmp_path, fake, trained):
    shutil.copytree(trained, tmp_path / "run")
    argv = [
        "evaluate",
        "--checkpoint",
        str(tmp_path / "run"),
        "--data",
        str(fake / "prepared"),
        "--quiet",
    ]
    assert D.main(argv) == 0 and D.main(argv) == 0  # the second time over its own masks
    before = (tmp_path / "run/dice_by_step.csv").read_bytes()
    assert D.main([*argv, "--split", "val"]) == 0
    assert (tmp_path / "run/dice_by_step.csv").read_bytes() == before
    assert (tmp_path / "run/val/dice_by_step.csv").exists() and (
        tmp_path / "run/val/predictions"
    ).is_dir()


def test_bare_run_checks_what_it_will_score_before_it_trains(tmp_path, fake, capsys):
    shutil.copytree(fake / "prepared", tmp_path / "data")
    file = tmp_path / "data/dataset.json"
    meta = json.loads(file.read_text())
    argv = [
        *FAST,
        "--data",
        str(tmp_path / "data"),
        "--preset",
        "tiny",
        "--out",
        str(tmp_path / "run"),
    ]
    file.write_text(json.dumps(meta | {"splits": meta["splits"] | {"test": []}}))
    assert "no labelled case in its split test" in refused(capsys, *argv)
    file.write_text(json.dumps(meta))
    label = tmp_path / "data/cases" / meta["splits"]["test"][0] / "label.npy"
    wrong = np.load(label)
    wrong[0, 0, 0] = 7
    np.save(label, wrong)
    assert "holds the value 7 in 1 voxels" in refused(capsys, *argv)
    assert not (tmp_path / "run").exists()


def test_bare_run_of_predicted_noise_has_its_unet(tmp_path):
    fast = [w for w in FAST if w not in ("--recycle", "prev")]
    assert D.main([*fast, "--target", "eps", "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    configs = [json.loads((tmp_path / "run" / row / "config.json").read_text()) for row in D.STORY]
    assert [(c["method"], c["target"]) for c in configs] == [("diffusion", "eps")] * 2 + [
        ("unet", "x0")
    ]


def test_predict_keeps_dots_of_a_name(tmp_path, fake, trained):
    source = next(
        p
        for p in sorted((fake / "src/imagesTr").iterdir())
        if p.name.endswith(".nii.gz") and p.name[0] != "."
    )
    shutil.copy(source, tmp_path / "b.nii.corr.nii.gz")
    argv = [
        "predict",
        "--checkpoint",
        str(trained / "best.pt"),
        "--image",
        str(tmp_path / "b.nii.corr.nii.gz"),
        "--quiet",
    ]
    assert D.main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.nii.corr.nii.gz"]


def test_evaluate_refuses_what_belongs_to_training(tmp_path, trained, capsys):
    argv = ["evaluate", "--checkpoint", str(trained / "best.pt"), "--out", str(tmp_path / "e")]
    assert "trained with --num-channels 4" in refused(capsys, *argv, "--num-channels", "8")
    assert "--train-K 5 knows its own 5 noise levels only" in refused(
        capsys, *argv, "--sampling-steps", "10"
    )


def test_network_of_1000_levels_is_sampled_with_any_number(tmp_path, fake):
    argv = [
        *FAST,
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        "--out",
        str(tmp_path / "run"),
    ]
    assert D.main(["train", *argv, "--train-K", "1000", "--steps", "1"]) == 0
    common = [
        "evaluate",
        "--checkpoint",
        str(tmp_path / "run/last.pt"),
        "--data",
        str(fake / "prepared"),
        "--quiet",
    ]
    assert (
        D.main([*common, "--sampling-steps", "12", "--limit", "1", "--out", str(tmp_path / "e")])
        == 0
    )
    assert len(table(tmp_path / "e/dice_by_step.csv")) == 10  # of twelve


def test_predict_returns_masks_in_the_geometry_of_the_input(tmp_path, fake, trained):
    raw = sorted(p for p in (fake / "src/imagesTr").iterdir() if not p.name.startswith("."))
    shutil.copy(trained / "best.pt", tmp_path / "moved.pt")
    argv = [
        "predict",
        "--checkpoint",
        str(tmp_path / "moved.pt"),
        "--save-maps",
        "--save-members",
        "--quiet",
    ]
    assert (
        D.main([*argv, "--image", str(fake / "src/imagesTr"), "--output", str(tmp_path / "out")])
        == 0
    )
    orientations = set()
    for path in raw:
        image, mask = nib.load(path), nib.load(tmp_path / "out" / path.name)
        assert mask.shape == image.shape[:3] and mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, image.affine)
        stem = path.name.removesuffix(".nii.gz")
        entropy = np.asarray(nib.load(tmp_path / f"out/maps/{stem}_entropy.nii.gz").dataobj)
        assert entropy.shape == mask.shape and entropy.min() >= 0 and entropy.max() <= 1.0001
        assert (tmp_path / f"out/members/{stem}_0.nii.gz").exists()
        orientations.add(nib.aff2axcodes(image.affine))
    assert len(orientations) > 1


def test_predict_agrees_with_evaluate(tmp_path, fake, trained):
    data = loaders.open_prepared(fake / "prepared")
    case = data.cases("test")[0]
    common = [
        "--checkpoint",
        str(trained / "best.pt"),
        "--quiet",
        "--amp",
        "off",
        "--device",
        "cpu",
    ]
    assert (
        D.main(
            ["evaluate", *common, "--data", str(fake / "prepared"), "--out", str(tmp_path / "e")]
        )
        == 0
    )
    source = next(p for p in (fake / "src/imagesTr").iterdir() if p.name.startswith(case))
    assert (
        D.main(["predict", *common, "--image", str(source), "--output", str(tmp_path / "p.nii.gz")])
        == 0
    )
    ras = nib.as_closest_canonical(nib.load(tmp_path / "p.nii.gz"))
    mine = np.asarray(nib.load(tmp_path / f"e/predictions/{case}.nii.gz").dataobj)
    published = np.vectorize(lambda v: int(data.meta["label_values"][str(v)]))(mine)
    np.testing.assert_array_equal(np.asarray(ras.dataobj), published)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated", "cut off"),
        ("html", "HTML"),
        ("2d", "2D"),
        ("nan", "NaN"),
        ("channels", "expected 1 channel"),
    ],
)
def test_predict_refuses_damaged_images_in_one_line(tmp_path, fake, trained, kind, words, capsys):
    source = sorted(p for p in (fake / "src/imagesTr").iterdir() if not p.name.startswith("."))[0]
    bad = tmp_path / "bad.nii.gz"
    if kind == "truncated":
        bad.write_bytes(source.read_bytes()[:-100])
    elif kind == "html":
        bad.write_text("<!DOCTYPE html><html>sign in</html>")
    else:
        shape = {"2d": (16, 16), "nan": (16, 16, 16), "channels": (16, 16, 16, 3)}[kind]
        nib.save(
            nib.Nifti1Image(np.full(shape, np.nan if kind == "nan" else 1, np.float32), np.eye(4)),
            bad,
        )
    argv = ["predict", "--checkpoint", str(trained / "best.pt"), "--image", str(bad)]
    error = refused(capsys, *argv, "--output", str(tmp_path / "out.nii.gz"))
    assert "bad.nii.gz" in error and words in error and not (tmp_path / "out.nii.gz").exists()
    assert "would overwrite the input" in refused(capsys, *argv, "--output", str(bad))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--data", "nowhere"], "python -m data_prep.msd"),
        (["--train-k", "5"], "did you mean --train-K?"),
        (["--recycle", "always"], "invalid choice"),
        (["--size", "8,8,8"], "shorter than the network's stride of 16"),
        (["--sampling-steps", "4"], "use --sampling-steps 5, or train with --train-K 1000"),
        (["--batch", "3", "--accumulate", "2"], "use a multiple of 2"),
        (["--init", "missing.pt"], "missing.pt does not exist"),
        (["evaluate"], "does not exist; train first"),
        (["predict"], "does not exist; train first"),
        (["--dims", "4"], "--dims is 4"),
    ],
)
def test_bad_flags_are_one_line_and_2(tmp_path, argv, words, capsys):
    more = ["--channel-mult", "1,2,4,8"] if "--size" in argv else []
    assert words in refused(capsys, *argv, *more, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unknown_label_values_are_named_and_absent_classes_warned_of(tmp_path, fake, capsys):
    data = tmp_path / "data"
    shutil.copytree(fake / "prepared", data)
    prepared = loaders.open_prepared(data)
    argv = [
        "train",
        "--data",
        str(data),
        "--preset",
        "tiny",
        *FAST,
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    name, value = list(prepared.classes.items())[-1]
    for case in prepared.cases("train"):
        label = np.array(prepared.label(case))
        label[label == value] = 0
        np.save(data / "cases" / case / "label.npy", label)
    assert D.main(argv) == 0
    assert (
        f"warning: no training case holds {name}; it will not be learnt" in capsys.readouterr().out
    )
    case = prepared.cases("train")[0]
    label = np.array(prepared.label(case))
    label[:3, 0, 0] = 9
    np.save(data / "cases" / case / "label.npy", label)
    error = refused(capsys, *argv, "--overwrite")
    assert (
        f"{case}/label.npy holds the value 9 in 3 voxels" in error
        and (tmp_path / "run/last.pt").exists()
    )


def test_disk_full_while_saving_keeps_the_old_checkpoint(tmp_path, fake):
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--out",
        str(tmp_path / "run"),
        "--save-every",
        "1",
    ]
    assert D.main([*argv, "--steps", "2"]) == 0
    CLI.refuses_full_disk(*argv, "--steps", "5", out=tmp_path / "run")
    assert step_of(tmp_path / "run") == 2
    (tmp_path / "run/last.pt").write_bytes(
        b"damaged"
    )  # the newest file: the one before it is taken
    assert D.main([*argv, "--steps", "3"]) == 0 and step_of(tmp_path / "run") == 3


@pytest.mark.slow
def test_bare_run_reaches_its_dice_in_five_minutes(tmp_path):
    begin = time.time()
    words = [sys.executable, "diffseg3d_recycle.py", "--quiet", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and time.time() - begin < 300, done.stderr
    dice = [
        json.loads((tmp_path / "run" / name / "summary.json").read_text())["mean"]["dice"]["mean"]
        for name in ("", "not-recycled", "unet")
    ]
    assert dice[0] > 0.9 and dice[2] > 0.92


def test_scores_of_another_split_leave_those_of_the_test(tmp_path, fake):
    argv = [
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert D.main(argv) == 0
    before = (tmp_path / "run/metrics.csv").read_bytes()
    assert D.main([*argv, "--split", "val"]) == 0
    assert (tmp_path / "run/metrics.csv").read_bytes() == before and (
        tmp_path / "run/val/metrics.csv"
    ).exists()


def test_too_little_memory_is_said_before_the_training(tmp_path, fake, capsys, monkeypatch):
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--out",
        str(tmp_path / "run"),
    ]
    assert D.main([*argv, "--steps", "1"]) == 0
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 1e-6)
    assert D.main([*argv, "--steps", "1"]) == 0  # there is nothing left to train
    error = CLI.refused(capsys, *argv, "--steps", "2")
    assert (
        "training on 2 x " in error and "voxels needs about" in error and "a lower --batch" in error
    )


def test_a_file_that_is_no_start_is_named(tmp_path, fake, capsys):
    torch.save({"a": torch.zeros(2)}, tmp_path / "public.pt")
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--out",
        str(tmp_path / "run"),
    ]
    error = CLI.refused(capsys, *argv, "--init", str(tmp_path / "public.pt"))
    assert "public.pt does not fit" in error and "go to --init" not in error
