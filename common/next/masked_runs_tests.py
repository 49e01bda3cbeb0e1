"""masked_diffusion.py as a user runs it: pre-train, stop, continue, segment, evaluate, predict."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, CommandLine, table
from PIL import Image

import masked_diffusion as M
from common import loaders, metrics, runtime, synthetic, tables

NET = ["--channel-mult", "1,2", "--num-res-blocks", "1", "--attention-resolutions", "2"]
NET += ["--crop", "32", "--tile", "8", "--batch", "2"]
FAST = [*NET, "--quiet", "--amp", "off", "--device", "cpu", "--preset", "tiny"]
LATER = ["--blocks", "0,1,2", "--labels", "3", "--finetune-steps", "3"]
USE = ["--quiet", "--amp", "off", "--device", "cpu"]
CLI = CommandLine("masked_diffusion", M.main)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A prepared folder of sections of different sizes: the first undrawn, the last unlabelled."""
    root = tmp_path_factory.mktemp("sections") / "toy"
    sizes = [(40, 40), (40, 56), (28, 60), (48, 48), (40, 40), (36, 50), (33, 64)]
    names = [f"s{i}" for i in range(len(sizes))]
    cases = {}
    for i, (name, size) in enumerate(zip(names, sizes)):
        image, objects = synthetic.tissue(1, i, size)
        objects[:] = 0 if i == 0 else objects
        folder = root / "cases" / name
        folder.mkdir(parents=True)
        np.save(folder / "image.npy", image)
        labelled = name != "s6"
        if labelled:
            np.save(folder / "label.npy", (objects > 0).astype(np.uint8))
            np.save(folder / "instances.npy", objects)
        cases[name] = {"shape": size, "labelled": labelled, "objects": 1 if labelled else None}
        cases[name]["patient"] = "p" if name in ("s1", "s4") else name
    meta, _ = synthetic.images()
    meta |= {"name": "toy", "cases": cases, "label_values": {"0": 0, "1": 7}}
    meta["splits"] = {"train": names[:4], "val": [], "testA": names[4:6], "unlabelled": names[6:]}
    (root / "dataset.json").write_text(json.dumps(meta))
    return root


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> Path:
    """A run folder: a few steps of pre-training, and a classifier on three labelled images."""
    out = tmp_path_factory.mktemp("trained_masked") / "run"
    argv = ["--data", str(data), "--out", str(out), *FAST]
    assert M.main(["pretrain", *argv, "--steps", "4", "--eval-every", "2"]) == 0
    assert M.main(["segment", *argv, *LATER]) == 0
    return out


def assert_close(a: Path, b: Path) -> None:
    """Adam makes whole steps of gradients that are rounding alone, but not in common."""
    left, right = CLI.weights(a), CLI.weights(b)
    assert left.keys() == right.keys() and len(left) > 100
    for key in left:
        if key.startswith(("model.", "ema.")):
            assert float((left[key] - right[key]).abs().max()) < 4e-4, key
    moments = [[v.flatten() for k, v in s.items() if k.endswith(".exp_avg")] for s in (left, right)]
    one, other = (torch.cat(m) for m in moments)
    assert float((one - other).norm()) < 0.03 * float(one.norm())


# --- the whole story ------------------------------------------------------------------------------


def test_default_run_tells_the_story_and_is_not_repeated(tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*FAST, *LATER, "--out", str(out), "--steps", "2", "--limit", "2"]
    assert M.main(argv) == 0
    text = capsys.readouterr().out
    for words in (
        "3 trainings and their scores, about",
        "1 of 3: pre-training, 2 steps",
        "2 of 3: segment, method mdm",
        "3 of 3: segment, method none",
        "38 to train on, 10 of them test images; 4 held out, whose loss chooses best.pt",
        "8 pixels, crops 32",
        "step 2: val loss",
        "3 labelled images (0 more hold nothing drawn)",
        "note: pre-training saw 2 of these images, without labels",
        "Dice of colour alone",
        "AJI of perfect masks",
    ):
        assert words in text, words
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"config.json", "log.csv", "last.pt", "best.pt", "loss.png"} <= names
    for folder in ("segment-3-0", "segment-3-none-0"):
        scores = {"metrics.csv", "summary.json", "others.csv", "predictions/tissue_032.png"}
        assert {f"{folder}/test-2/{name}" for name in scores} <= names
        assert {f"{folder}/last.pt", f"{folder}/test-2/figures/tissue_033.png"} <= names
    assert not [n for n in names if n.endswith((".tmp", ".npy"))]
    assert M.main(argv) == 0
    text = capsys.readouterr().out
    assert text.count("has made all of its") == 3 and text.count("nothing is sampled again") == 2


def test_pretrained_file_is_read_once_a_command(trained, data, tmp_path, monkeypatch):
    read = []
    load = runtime.load_tensors
    monkeypatch.setattr(runtime, "load_tensors", lambda path: read.append(path) or load(path))
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    argv = ["--data", str(data), "--out", str(copy), *FAST, *LATER, "--overwrite"]
    assert M.main(["segment", *argv]) == 0 and read == [copy / "best.pt"]
    read.clear()
    assert M.main(["evaluate", "--out", str(copy), "--split", "testA", *USE]) == 0
    assert read == [copy / "segment-3-0/last.pt"]


@pytest.mark.parametrize("method", ["ddpm", "none", "unet", "finetune"])
def test_other_rows_train_and_are_scored(tmp_path, trained, data, capsys, method):
    out = tmp_path / "run"
    argv = ["--data", str(data), "--out", str(out), *FAST]
    row = ["--finetune"] if method == "finetune" else ["--method", method]
    if method == "ddpm":
        assert M.main(["pretrain", *argv, *row, "--steps", "2"]) == 0
    if method == "finetune":
        row += ["--checkpoint", str(trained)]
    assert M.main(["segment", *argv, *row, *LATER]) == 0
    kind = "" if method == "ddpm" else f"-{method}"
    capsys.readouterr()
    assert M.main(["evaluate", "--out", str(out), "--split", "testA", *USE]) == 0
    text = capsys.readouterr().out
    assert (out / f"segment-3{kind}-0/testA/summary.json").exists()
    assert ("pre-training saw 2 of these images" in text) == (method in ("ddpm", "finetune"))
    part = "whole network" if method in ("unet", "finetune") else "classifier"
    assert f"{part} of seed 0 after 3 steps on 3 labelled images" in text


def test_finetuning_begins_with_the_pretrained_weights_but_for_the_head(trained, data, tmp_path):
    argv = ["--data", str(data), "--out", str(tmp_path), *FAST, *LATER, "--lr", "1e-9"]
    assert M.main(["segment", *argv, "--finetune", "--checkpoint", str(trained / "last.pt")]) == 0
    found = CLI.state_of(tmp_path / "segment-3-finetune-0")["model"]
    pretrained = CLI.state_of(trained)["ema"]
    for name, value in found.items():
        same = value.shape == pretrained[name].shape and torch.allclose(value, pretrained[name])
        assert same != name.startswith("out.2."), name


def test_undrawn_images_are_left_out_and_a_list_is_taken(trained, data, tmp_path, capsys):
    state = CLI.state_of(trained / "segment-3-0")
    assert state["data"]["cases"]["train"] == ["s1", "s2", "s3"]
    held = CLI.state_of(trained)["data"]["cases"]["val"]
    assert len(held) == 1 and held[0] not in ("s4", "s5")
    file = tmp_path / "mine.json"
    file.write_text('["s3", "s1"]')
    argv = ["--data", str(data), "--out", str(tmp_path / "run"), *FAST, *LATER, "--method", "none"]
    assert M.main(["segment", *argv, "--labels-file", str(file)]) == 0
    state = CLI.state_of(tmp_path / "run/segment-mine-none-0")
    assert state["data"]["cases"]["train"] == ["s3", "s1"]
    error = CLI.refused(capsys, "segment", *argv, "--labels", "4")
    assert "something is drawn on 3 of 4" in error


def test_best_checkpoint_is_by_the_held_out_loss_and_patience_stops(tmp_path, capsys, data):
    argv = ["pretrain", "--data", str(data), *FAST, "--eval-every", "1", "--patience", "2"]
    # A learning rate that ruins the network: the first validation is the best one.
    out = tmp_path / "run"
    assert M.main([*argv, "--out", str(out), "--steps", "30", "--lr", "0.3", "--ema", "0"]) == 0
    rows = [row for row in table(out / "log.csv") if row["val_loss"]]
    losses = [float(row["val_loss"]) for row in rows]
    best = int(np.argmin(losses))
    assert CLI.state_of(out, "best.pt")["step"] == int(rows[best]["step"])
    assert len(rows) == best + 3 < 30 and CLI.step_of(out) == len(rows)
    before = (out / "last.pt").read_bytes()
    assert M.main([*argv, "--out", str(out), "--steps", "30", "--lr", "0.3", "--ema", "0"]) == 0
    assert torch.load(out / "last.pt", weights_only=True)["step"] == len(rows) and before

    assert M.main([*argv, "--out", str(tmp_path / "all"), "--steps", "2", "--held-out", "0"]) == 0
    assert "training_crop_loss" in table(tmp_path / "all/log.csv")[0]
    assert "none held out" in capsys.readouterr().out and not (tmp_path / "all/best.pt").exists()


# --- continuing -----------------------------------------------------------------------------------


def test_same_command_again_trains_no_further_and_other_settings_are_refused(tmp_path, capsys):
    argv = ["pretrain", *FAST, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert M.main(argv) == 0
    assert M.main(argv) == 0 and CLI.step_of(tmp_path / "run") == 1
    assert len([r for r in table(tmp_path / "run/log.csv") if r["val_loss"]]) == 1
    assert M.main([*argv[:-1], "2", "--amp", "bf16"]) == 0 and CLI.step_of(tmp_path / "run") == 2
    assert "--tile was 8, is 4" in CLI.refused(capsys, *argv, "--tile", "4")
    missing = ["--overwrite", "--init", str(tmp_path / "missing.pt")]
    assert "missing.pt does not exist" in CLI.refused(capsys, *argv, *missing)
    assert M.main([*argv, "--tile", "4", "--overwrite"]) == 0 and CLI.step_of(tmp_path / "run") == 1


def test_stopped_and_killed_run_continues_to_the_same_weights(tmp_path):
    argv = ["pretrain", *FAST, "--steps", "16", "--save-every", "1", "--eval-every", "6"]
    argv += ["--ema", "0.9", "--augment", "on"]
    assert CLI.run(*argv, "--out", str(tmp_path / "whole")).returncode == 0
    CLI.stop_and_continue(*argv, out=tmp_path / "cut", signals=[signal.SIGTERM, signal.SIGKILL])
    CLI.assert_same(tmp_path / "whole", tmp_path / "cut")
    logs = [table(tmp_path / name / "log.csv") for name in ("whole", "cut")]
    held = [[(r["step"], r["val_loss"]) for r in log if r["val_loss"]] for log in logs]
    assert held[0] == held[1] and [s for s, _ in held[0]] == ["6", "12", "16"]


@pytest.mark.parametrize("method", ["mdm", "ddpm"])
def test_accumulation_and_workers_do_not_change_the_result(tmp_path, method):
    argv = ["pretrain", *FAST, "--method", method, "--steps", "2", "--lr", "1e-4"]
    assert M.main([*argv, "--out", str(tmp_path / "a")]) == 0
    more = ["--accumulate", "2", "--workers", "1", "--recompute"]
    assert M.main([*argv, *more, "--out", str(tmp_path / "b")]) == 0
    assert_close(tmp_path / "a", tmp_path / "b")


def test_two_processes_train_and_score_as_one(tmp_path, data):
    argv = ["--data", str(data), *FAST, *LATER, "--split", "testA", "--steps", "2"]
    argv += ["--batch", "4", "--lr", "1e-4"]  # a third step is rounding alone
    assert M.main([*argv, "--out", str(tmp_path / "one")]) == 0
    two = CLI.run(*argv, "--out", str(tmp_path / "two"), "--accumulate", "2", processes=2)
    assert two.returncode == 0, two.stderr
    assert "2 processes x 2 parts x 1" in two.stdout
    assert two.stdout.count("MDM (Pan et al. 2023)") == 1
    assert_close(tmp_path / "one", tmp_path / "two")
    files = [tmp_path / n / "segment-3-0/testA/metrics.csv" for n in ("one", "two")]
    one, both = (tables.read_metrics_csv(file) for file in files)
    assert [r["case"] for r in one] == [r["case"] for r in both] == ["s4", "s5"]
    for a, b in zip(one, both):
        assert a["dice"] == pytest.approx(b["dice"], abs=0.02)


def test_a_batch_larger_than_the_data_trains(tmp_path, data):
    argv = ["pretrain", "--data", str(data), *FAST, "--steps", "1", "--batch", "9"]
    assert M.main([*argv, "--out", str(tmp_path)]) == 0 and CLI.step_of(tmp_path) == 1


def test_classifier_is_the_same_for_the_same_seed_and_of_other_weights_refused(
    trained, data, tmp_path, capsys
):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    argv = ["segment", "--data", str(data), "--out", str(copy), *FAST, *LATER]
    first = CLI.state_of(copy / "segment-3-0")["classifier"]
    assert M.main([*argv, "--overwrite"]) == 0
    again = CLI.state_of(copy / "segment-3-0")["classifier"]
    assert M.main([*argv, "--seed", "1"]) == 0
    other = CLI.state_of(copy / "segment-3-1")["classifier"]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])
    assert "other feature_t" in CLI.refused(capsys, *argv, "--feature-t", "0")
    last = ["--checkpoint", str(copy / "last.pt")]
    state = CLI.state_of(copy)
    state["ema"]["out.2.bias"] += 1
    torch.save(state, copy / "last.pt")
    assert "other weights" in CLI.refused(capsys, *argv, *last)


# --- evaluate, predict ----------------------------------------------------------------------------


def test_evaluate_names_the_segmentation_or_asks_for_it(trained, data, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    argv = ["--out", str(copy), "--split", "testA", *USE]
    assert M.main(["evaluate", *argv]) == 0
    text = capsys.readouterr().out
    assert "pre-training saw 2 of these images" in text
    assert "1 patients are among the labelled images, too" in text
    rows = tables.read_metrics_csv(copy / "segment-3-0/testA/metrics.csv")
    for row in rows:
        mask = np.asarray(Image.open(copy / f"segment-3-0/testA/predictions/{row['case']}.png"))
        truth = np.load(data / "cases" / row["case"] / "label.npy")
        assert set(np.unique(mask)) <= {0, 255}
        assert row["dice"] == pytest.approx(metrics.dice(mask > 0, truth > 0))
    shutil.copytree(copy / "segment-3-0", copy / "segment-8-0")
    error = CLI.refused(capsys, "evaluate", *argv)
    assert "2 trained segmentations (segment-3-0, segment-8-0)" in error
    assert M.main(["evaluate", *argv, "--checkpoint", str(copy / "segment-8-0")]) == 0
    error = CLI.refused(capsys, "evaluate", *argv, "--checkpoint", str(copy))
    assert "is a pre-trained network; run segment first" in error
    error = CLI.refused(
        capsys, "segment", *argv[:2], *USE, "--checkpoint", str(copy / "segment-3-0")
    )
    assert "is no pre-trained network" in error


def test_predict_reads_a_folder_of_all_kinds_and_sizes(trained, tmp_path, capsys):
    images = tmp_path / "in"
    images.mkdir()
    for i, ending in enumerate(("png", "jpg", "tif", "bmp")):
        picture = synthetic.tissue(2, i, (20 + 15 * i, 70))[0].transpose(1, 2, 0)
        Image.fromarray(picture).save(images / f"slide{i}.{ending}")
    (images / "bad.png").write_bytes(b"no picture")
    argv = ["predict", "--out", str(trained), "--image", str(images), *USE]
    error = CLI.refused(capsys, *argv, "--output", str(tmp_path / "masks"), "--save", "maps")
    assert "1 of 5 inputs were left out" in error and "bad.png" in error
    for i in range(4):
        mask = np.asarray(Image.open(tmp_path / f"masks/slide{i}.png"))
        prob = np.asarray(Image.open(tmp_path / f"masks/maps/slide{i}_gland.png"))
        assert mask.shape == prob.shape == (20 + 15 * i, 70) and set(np.unique(mask)) <= {0, 255}
        assert ((prob > 128) <= (mask > 0)).all() and ((prob < 127) <= (mask == 0)).all()


def test_network_loaded_in_python_predicts_as_the_command(trained, tmp_path):
    image = synthetic.tissue(2, 0, (50, 40))[0]
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "array.png")  # its name draws masks
    argv = ["predict", "--out", str(trained), "--image", str(tmp_path / "array.png"), *USE]
    assert M.main([*argv, "--output", str(tmp_path / "mask.png")]) == 0
    mask = M.load(str(trained / "segment-3-0"), "cpu").predict_array(image, (1, 1))
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 7}
    assert (np.asarray(mask > 0) != (found > 0)).mean() < 0.02  # bf16 where the CPU has it


def test_images_are_reduced_as_those_of_the_training_and_masks_enlarged_again(trained, tmp_path):
    state = CLI.state_of(trained / "segment-3-0")
    state["data"]["reduce"] = 2
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run/last.pt")
    image = np.repeat(np.repeat(synthetic.tissue(2, 0, (40, 36))[0], 2, 1), 2, 2)
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "x.png")
    argv = ["predict", "--image", str(tmp_path / "x.png"), "--output", str(tmp_path / "m.png")]
    assert M.main([*argv, "--checkpoint", str(tmp_path / "run"), *USE]) == 0
    assert Image.open(tmp_path / "m.png").size == (72, 80)


# --- public weights, bad input --------------------------------------------------------------------


def test_public_weights_can_be_segmented_with_and_pretrained_from(trained, data, tmp_path, capsys):
    state = torch.load(trained / "best.pt", weights_only=True)["ema"]
    state = {f"module.{name}": value for name, value in state.items()}
    torch.save(state, tmp_path / "public.pt")
    init = ["--data", str(data), *FAST, "--init", str(tmp_path / "public.pt")]
    assert M.main(["segment", *init, *LATER, "--out", str(tmp_path / "x")]) == 0
    ours, theirs = (CLI.state_of(p / "segment-3-0") for p in (trained, tmp_path / "x"))
    assert all(torch.equal(v, theirs["classifier"][k]) for k, v in ours["classifier"].items())
    argv = ["pretrain", *init, "--steps", "1", "--lr", "1e-9", "--out", str(tmp_path / "y")]
    assert M.main(argv) == 0
    found = CLI.state_of(tmp_path / "y")["ema"]
    assert all(
        torch.allclose(v, found[k.removeprefix("module.")], atol=1e-7) for k, v in state.items()
    )
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    error = CLI.refused(
        capsys, *argv[:-1], str(tmp_path / "z"), "--init", str(tmp_path / "other.pt")
    )
    assert "is no U-Net of this kind" in error


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train"], "train is no verb; use pretrain, segment, evaluate, predict"),
        (["pretrain", "--labels", "3"], "--labels is a flag of segment"),
        (
            ["pretrain", "--method", "unet"],
            "--method unet has no pre-training; use the verb segment",
        ),
        (["segment", "--out", "missing"], "train first"),
        (["segment", "--method", "none", "--blocks", "8,18"], "this network has 0 to 17"),
        (["evaluate", "--out", "missing"], "holds 0 trained segmentations"),
    ],
)
def test_bad_flags_are_refused_in_one_line(capsys, argv, message):
    assert message in CLI.refused(capsys, *argv)


def test_another_network_is_refused(capsys, trained, data):
    argv = ["segment", "--data", str(data), "--out", str(trained), *FAST, *LATER]
    assert "--tile is 4, the pre-trained network has 8" in CLI.refused(capsys, *argv, "--tile", "4")


def test_loss_of_the_classifier_that_is_no_number_ends_with_one_line(
    trained, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(M.F, "cross_entropy", lambda logits, *rest, **more: logits.sum() * np.nan)
    argv = ["segment", "--data", str(data), "--out", str(tmp_path), *FAST, *LATER]
    error = CLI.refused(capsys, *argv, "--checkpoint", str(trained))
    assert "the classifier's loss is nan" in error


# --- memory, flags --------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_of_fifty_images_stay_below_a_gigabyte():
    """Resident memory of a process that takes one step on each of 50 images of 256 x 256 pixels."""
    code = (
        "import resource, types, numpy as np, torch, masked_diffusion as M\n"
        "from common import unet\n"
        "torch.set_num_threads(1)\n"
        "rng = np.random.default_rng(0)\n"
        "data = types.SimpleNamespace(image=lambda c: rng.integers(0, 255, (3, 256, 256), np.uint8),"
        " label=lambda c: np.zeros((256, 256), np.uint8))\n"
        "f = M.Features(unet.UNet(3, 3, 32, (1, 1, 2, 2, 4, 4), 2, [3, 4, 5]).eval())\n"
        "c = M.PixelClassifier(f.widths(256), 2)\n"
        "for _, last, maps, label in M.crop_steps(f, data, list(range(50)), 256):\n"
        "    torch.nn.functional.cross_entropy(c.on_maps(maps, (256, 256)), label).backward()\n"
        "    if last: break\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1, done.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1"],
        ["--method", "ddpm"],
        ["--method", "ddpm", "--schedule", "linear"],
        ["--method", "ddpm", "--target", "x0"],
        ["--loss", "mse"],
        ["--ssim-range", "signed"],
        ["--tile", "4"],
        ["--fixed-t", "50"],
        ["--pretrain-on", "train"],
        ["--held-out", "0"],
        ["--augment", "on"],
        ["--lr", "1e-2"],
        ["--grad-clip", "1e-9"],
        ["--ema", "0"],
    ],
)
def test_each_flag_of_the_pretraining_changes_it(data, tmp_path, flags):
    argv = ["pretrain", "--data", str(data), *FAST, "--steps", "2", "--ema", "0.9"]
    sums = []
    for name, more in (("a", []), ("b", flags)):
        assert M.main([*argv, *more, "--out", str(tmp_path / name)]) == 0
        sums.append(CLI.state_of(tmp_path / name)["ema"])
    assert any(not torch.equal(v, sums[1][k]) for k, v in sums[0].items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--labels", "2"],
        ["--blocks", "1,2"],
        ["--feature-t", "500"],
        ["--feature-mask", "off"],
        ["--feature-norm", "l2"],
        ["--classifier-norm", "batch"],
        ["--crops", "2"],
        ["--finetune-steps", "2"],
        ["--finetune-steps", "0", "--stop-epoch", "0"],
    ],
)
def test_each_flag_of_the_classifier_changes_it(trained, data, tmp_path, flags):
    argv = ["segment", "--data", str(data), "--out", str(tmp_path), *FAST, *LATER, *flags]
    assert M.main([*argv, "--checkpoint", str(trained)]) == 0
    (folder,) = tmp_path.glob("segment-*")
    plain = CLI.state_of(trained / "segment-3-0")["classifier"]["first.weight"]
    found = CLI.state_of(folder)["classifier"]["first.weight"]
    assert plain.shape != found.shape or not torch.equal(plain, found)
    loaders.check_alike(CLI.state_of(folder)["data"], loaders.open_data(data, "images"))
