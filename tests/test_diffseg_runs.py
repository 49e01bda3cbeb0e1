"""diffseg3d_recycle.py as a user runs it: train, stop, continue, evaluate, predict, bad input."""

import json
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CommandLine, table

import diffseg3d_recycle as D
from common import loaders, metrics, runtime, tables

NET = ["--num-channels", "4", "--channel-mult", "1,2", "--size", "24,24,16", "--batch", "2"]
FAST = [*NET, "--quiet", "--amp", "off", "--device", "cpu"]
USE = ["--quiet", "--amp", "off", "--device", "cpu"]
CLI = CommandLine("diffseg3d_recycle", D.main)


def train(data: Path, out: Path, *argv: str) -> list[str]:
    return ["train", "--data", str(data), "--preset", "tiny", "--out", str(out), *FAST, *argv]


@pytest.fixture(scope="session")
def trained(fake, tmp_path_factory) -> Path:
    """A run folder with six steps of training on the fake data."""
    out = tmp_path_factory.mktemp("trained_diffseg") / "run"
    assert D.main(train(fake / "prepared", out, "--steps", "6")) == 0
    return out


@pytest.fixture
def data(fake) -> Path:
    return fake / "prepared"


def with_meta(data: Path, copy: Path, **entries) -> Path:
    """Copy prepared data, with other entries in dataset.json."""
    shutil.copytree(data, copy, dirs_exist_ok=True)
    meta = json.loads((data / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**meta, **entries}))
    return copy


# --- training -------------------------------------------------------------------------------------


def test_default_run_trains_scores_draws_and_is_not_repeated(tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*FAST, "--out", str(out), "--steps", "2", "--limit", "1"]
    assert D.main([*argv, "--ensemble", "2", "--save", "all"]) == 0
    text = capsys.readouterr().out
    assert "recycling (Fu et al. 2023)" in text and "image range -2.5,2.5 (0.0,1.0)" in text
    assert "ensemble of 1" in text and "ensemble of 2" in text
    assert "Dice after each step of the first member: k = 5 0" in text
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"config.json", "log.csv", "last.pt", "best.pt", "loss.png"} <= names
    for name in ("metrics.csv", "metrics_ensemble1.csv", "summary.json", "dice_by_step.csv"):
        assert f"test-1/{name}" in names
    shown = "test-1/figures/phantom_0068"
    assert {f"{shown}.png", f"{shown}_steps.png", f"{shown}_ensemble.png"} <= names
    saved = "test-1/predictions"
    assert {f"{saved}/phantom_0068.nii.gz", f"{saved}/maps/phantom_0068_entropy.nii.gz"} <= names
    assert f"{saved}/members/phantom_0068_1.nii.gz" in names
    rows = {r["class"]: r["dice"] for r in table(out / "test-1/metrics_ensemble1.csv")}
    steps = table(out / "test-1/dice_by_step.csv")
    assert [r["k"] for r in steps] == ["5", "4", "3", "2", "1"]
    assert {name: steps[-1][name] for name in rows} == rows  # k = 1 is the result
    assert D.main(argv) == 0
    assert "nothing is sampled again" in capsys.readouterr().out


def test_stopped_and_killed_run_continues_to_the_same_weights(tmp_path, data):
    argv = ["--steps", "24", "--save-every", "1", "--eval-every", "10", "--ema", "0.9"]
    assert D.main(train(data, tmp_path / "whole", *argv)) == 0
    words = train(data, tmp_path / "cut", *argv)
    signals = [signal.SIGTERM, signal.SIGKILL]
    CLI.stop_and_continue(*words, out=tmp_path / "cut", signals=signals)
    CLI.assert_same(tmp_path / "whole", tmp_path / "cut")
    logs = [table(tmp_path / name / "log.csv") for name in ("whole", "cut")]
    dice = [[(r["step"], r["val_dice"]) for r in log if r["val_dice"]] for log in logs]
    assert dice[0] == dice[1] and [step for step, _ in dice[0]] == ["10", "20", "24"]


def test_best_is_the_first_of_equal_scores(tmp_path, data, monkeypatch):
    scores = iter([0.5, 0.7, 0.7, 0.6])

    def summarise(rows):
        entry = {"dice": {"mean": next(scores)}}
        return {"mean": entry, "classes": {}}

    monkeypatch.setattr(tables, "summarise", summarise)
    assert D.main(train(data, tmp_path / "a", "--steps", "4", "--eval-every", "1")) == 0
    assert CLI.state_of(tmp_path / "a", "best.pt")["step"] == 2


def assert_close(a: Path, b: Path) -> None:
    left, right = CLI.weights(a), CLI.weights(b)
    assert left.keys() == right.keys() and len(left) > 100
    for k in left:
        torch.testing.assert_close(left[k], right[k], atol=2e-5, rtol=1e-3)


def test_two_processes_train_and_evaluate_as_one(tmp_path, data):
    argv = ["--steps", "3", "--batch", "4", "--lr", "1e-4", "--split", "train", "--limit", "2"]
    one, two = (train(data, tmp_path / n, *argv)[1:] for n in ("one", "two"))
    assert D.main(one) == 0
    done = CLI.run(*two, "--accumulate", "2", "--workers", "1", "--recompute", processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 2 parts x 1" in done.stdout
    assert_close(tmp_path / "one", tmp_path / "two")
    rows = [table(tmp_path / n / "train-2/metrics.csv") for n in ("one", "two")]
    assert [(r["case"], r["class"]) for r in rows[0]] == [(r["case"], r["class"]) for r in rows[1]]
    dice = [[float(r["dice"] or 0) for r in part] for part in rows]
    np.testing.assert_allclose(dice[0], dice[1], atol=5e-3)


BASE: dict[Path, torch.Tensor] = {}


def weights_after(data: Path, out: Path, *argv: str) -> torch.Tensor:
    assert D.main(train(data, out, "--steps", "2", *argv)) == 0
    return torch.cat([v.flatten() for v in CLI.state_of(out)["ema"].values()])


@pytest.mark.parametrize(
    "flags",
    ["--seed 1", "--method unet", "--image-range 0,1", "--target eps", "--recycle max", "--lr 1e-4"]
    + ["--recycle none", "--dice off", "--train-K 1000", "--size 16,16,16", "--augment off"]
    + ["--lr-steps 400", "--ema 0.9", "--batch 4", "--num-channels 6", "--channel-mult 1"],
)
def test_flag_changes_the_training(tmp_path, data, flags):
    if data not in BASE:
        BASE[data] = weights_after(data, tmp_path / "base")
    other = weights_after(data, tmp_path / "other", *flags.split())
    assert other.isfinite().all()
    assert other.shape != BASE[data].shape or (other - BASE[data]).abs().max() > 1e-7


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_first_pass_in_16_bits_leaves_every_weight_its_gradient(tmp_path, data, amp):
    assert D.main(train(data, tmp_path / "a", "--steps", "2", "--amp", amp)) == 0
    state = CLI.state_of(tmp_path / "a")
    assert bool(state["scaler"]) == (amp == "fp16")
    if amp == "bf16":  # fp16 skips the first steps until its scale fits
        assert all(moment["exp_avg"].any() for moment in state["optimizer"]["state"].values())


def test_absent_classes_are_warned_of_and_too_little_memory_is_one_line(
    tmp_path, data, capsys, monkeypatch
):
    copy = with_meta(data, tmp_path / "data")
    prepared = loaders.open_data(str(copy))
    name, value = list(prepared.classes.items())[-1]
    for case in prepared.cases("train"):
        label = np.array(prepared.label(case))
        np.save(copy / f"cases/{case}/label.npy", np.where(label == value, 0, label))
    assert D.main(train(copy, tmp_path / "a", "--steps", "1")) == 0
    assert f"no training case holds {name}; it will not be learnt" in capsys.readouterr().out
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 1e-4)
    line = CLI.refused(capsys, *train(data, tmp_path / "b", "--steps", "1"))
    assert "needs about" in line and "--size" in line


def test_init_starts_from_weights_and_takes_over_the_network(tmp_path, trained, data, capsys):
    start = train(data, tmp_path / "a", "--steps", "1", "--lr", "1e-12")
    start += ["--init", str(trained / "last.pt")]
    at = start.index("--num-channels")
    del start[at : at + 4]  # and --channel-mult
    assert D.main(start) == 0
    before, after = CLI.state_of(trained)["ema"], CLI.state_of(tmp_path / "a")["model"]
    for k in before:
        torch.testing.assert_close(after[k], before[k], atol=1e-6, rtol=0)
    line = CLI.refused(capsys, *start, "--overwrite", "--num-channels", "6")
    assert "does not fit" in line and "stem.0.weight" in line


# --- evaluate and predict -------------------------------------------------------------------------


def test_evaluate_scores_what_it_writes_in_the_publishers_values(tmp_path, data, trained):
    argv = ["evaluate", "--data", str(data), "--checkpoint", str(trained), *USE]
    for more in ([], ["--split", "val"], ["--eta", "0"]):
        folder = tmp_path / ("ddim" if "--eta" in more else "s")
        assert D.main([*argv, "--out", str(folder), *more]) == 0
    prepared = loaders.open_data(str(data))
    values = {int(k): v for k, v in prepared.meta["label_values"].items()}
    rows = {(r["case"], r["class"]): r for r in table(tmp_path / "s/metrics.csv")}
    for case in prepared.cases("test"):
        mask = np.asarray(nib.load(tmp_path / f"s/predictions/{case}.nii.gz").dataobj)
        assert set(np.unique(mask)) <= set(values.values())
        for name, value in prepared.classes.items():
            dice = metrics.dice(mask == values[value], np.asarray(prepared.label(case)) == value)
            assert float(rows[case, name]["dice"]) == pytest.approx(dice, abs=1e-6)
    assert (tmp_path / "s/val/metrics.csv").exists()
    files = [(tmp_path / n / "dice_by_step.csv").read_text() for n in ("s", "ddim")]
    assert files[0] != files[1]


def test_cases_of_the_training_are_refused_unless_asked_for(tmp_path, data, trained, capsys):
    splits = json.loads((data / "dataset.json").read_text())["splits"]
    moved = {"train": splits["train"][1:], "val": splits["val"]}
    moved["test"] = splits["test"] + splits["train"][:1]
    copy = with_meta(data, tmp_path / "data", splits=moved)
    argv = ["evaluate", "--data", str(copy), "--checkpoint", str(trained), *USE]
    assert "training or validation" in CLI.refused(capsys, *argv)
    assert D.main([*argv, "--split", "train", "--limit", "1", "--out", str(tmp_path / "e")]) == 0
    assert "(seen in training)" in capsys.readouterr().out
    with_meta(data, copy, name="another")
    argv = [*argv, "--split", "all", "--out", str(tmp_path / "e")]
    assert D.main(argv) == 0
    cases = {row["case"] for row in table(tmp_path / "e/another-all/metrics.csv")}
    assert cases > {*splits["train"], *splits["val"]}


def test_predict_keeps_the_grid_and_agrees_with_evaluate(tmp_path, fake, data, trained, capsys):
    raw = sorted(p for p in (fake / "src/imagesTr").iterdir() if not p.name.startswith("."))
    out = tmp_path / "out"
    argv = ["predict", "--checkpoint", str(trained), *USE, "--save", "all"]
    argv += ["--image", str(fake / "src/imagesTr"), "--output", str(out)]
    assert D.main(argv) == 0
    assert " ml" in capsys.readouterr().out
    orientations = set()
    for path in raw:
        image, mask = nib.load(path), nib.load(out / path.name)
        assert mask.shape == image.shape[:3]
        np.testing.assert_array_equal(mask.affine, image.affine)
        stem = path.name.removesuffix(".nii.gz")
        entropy = np.asarray(nib.load(out / f"maps/{stem}_entropy.nii.gz").dataobj)
        assert entropy.shape == mask.shape and 0 <= entropy.min() <= entropy.max() <= 1.0001
        assert (out / f"members/{stem}_0.nii.gz").exists()
        orientations.add(nib.aff2axcodes(image.affine))
    assert len(orientations) > 1
    argv = ["evaluate", "--checkpoint", str(trained), *USE, "--data", str(data)]
    assert D.main([*argv, "--out", str(tmp_path / "e")]) == 0
    case = loaders.open_data(str(data)).cases("test")[0]
    source = next(p for p in raw if p.name.startswith(case))
    ras = nib.as_closest_canonical(nib.load(out / source.name))
    mine = nib.load(tmp_path / f"e/predictions/{case}.nii.gz")
    np.testing.assert_array_equal(np.asarray(ras.dataobj), np.asarray(mine.dataobj))


def test_network_from_python_gives_publishers_values_on_the_arrays_grid(fake, trained):
    network = D.load(str(trained), "cpu")
    path = next(p for p in (fake / "src/imagesTr").iterdir() if p.name[0] != ".")
    file = nib.as_closest_canonical(nib.load(path))
    mask = network.predict_array(np.asarray(file.dataobj), file.header.get_zooms()[:3])
    assert mask.shape == file.shape
    assert set(np.unique(mask)) <= set(network.record["label_values"].values())


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--train-k", "5"], "did you mean --train-K?"),
        (["train", "--split", "test"], "not of train"),
        (["--recycle", "always"], "invalid choice"),
        (["--size", "4,4,4", "--channel-mult", "1,2"], "leave one at the lowest level"),
        (["evaluate"], "does not exist; train first"),
    ],
)
def test_bad_flags_are_one_line_and_2(tmp_path, argv, words, capsys):
    assert words in CLI.refused(capsys, *argv, "--out", str(tmp_path / "run"))
