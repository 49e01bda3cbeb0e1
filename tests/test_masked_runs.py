"""masked_diffusion.py as a user runs it: pre-train, continue, segment, evaluate, predict, two processes, faults."""

import json
import shutil
import signal
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CommandLine, table
from PIL import Image

import masked_diffusion as M
from common import InputError
from common.old import loaders, metrics, runtime

ROOT, TISSUE = Path(__file__).parents[1], loaders.Tissue
NET = [
    "--channel-mult",
    "1,1",
    "--num-res-blocks",
    "1",
    "--attention-resolutions",
    "2",
    "--crop",
    "32",
]
NET += ["--num-head-channels", "32"]
FAST = [*NET, "--tile", "8", "--batch", "2", "--quiet", "--amp", "off", "--device", "cpu"]
LATER = [
    "--blocks",
    "0,1,2",
    "--runs",
    "2",
    "--labels",
    "3",
    "--classifier-steps",
    "3",
    "--limit",
    "2",
]
CLI = CommandLine("masked_diffusion", M.main)
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
    # Adam makes whole steps of gradients that are rounding alone, so weights may differ by some steps of --lr 1e-4, but
    # not in common; the gradients themselves (in Adam's mean) are compared as one vector.
    for part, off in (("model.", 4e-4), ("ema.", 4e-4)):
        assert (
            max(
                [float((left[k] - right[k]).abs().max()) for k in left if k.startswith(part)]
                or [0.0]
            )
            < off
        )
    mean = [
        torch.cat([v.flatten() for k, v in side.items() if k.endswith(".exp_avg")])
        for side in (left, right)
    ]
    assert float((mean[0] - mean[1]).norm()) < 0.03 * float(mean[0].norm())


@pytest.fixture(autouse=True)
def small_tissue(monkeypatch):
    """`--data synthetic` of one process: fewer and smaller sections."""
    monkeypatch.setattr(loaders, "Tissue", lambda: TISSUE(0, (4, 3), (40, 56)))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared folder of sections of different sizes, one smaller than a crop, one without label."""
    root = tmp_path_factory.mktemp("sections") / "toy"
    sizes = [(40, 56), (28, 60), (48, 48), (40, 40), (36, 50), (33, 64)]
    names, cases = [f"s{i}" for i in range(len(sizes))], {}
    for i, (name, size) in enumerate(zip(names, sizes)):
        image, objects = loaders.tissue(1, i, size)
        folder = root / "cases" / name
        folder.mkdir(parents=True)
        np.save(folder / "image.npy", image)
        if i != 5:
            np.save(folder / "label.npy", (objects > 0).astype(np.uint8))
            np.save(folder / "instances.npy", objects)
        cases[name] = {
            "shape": size,
            "labelled": i != 5,
            "objects": int(objects.max()) if i != 5 else None,
        }
    meta = dict(
        TISSUE(0, (1, 1), (8, 8)).meta, name="toy", cases=cases, label_values={"0": 0, "1": 7}
    )
    meta["splits"] = {"train": names[:3], "val": [], "testA": names[3:5], "unlabelled": names[5:]}
    (root / "dataset.json").write_text(json.dumps(meta))
    return root


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory) -> Path:
    """A run folder: a few steps of pre-training, and two classifiers on three labels."""
    out = tmp_path_factory.mktemp("trained_masked") / "run"
    argv = ["--data", str(prepared), "--preset", "tiny", "--out", str(out)]
    assert M.main(["pretrain", *argv, *FAST, "--steps", "4"]) == 0
    assert M.main(["segment", *argv, *LATER, "--split", "testA", "--quiet", "--amp", "off"]) == 0
    return out


# --- the whole story -------------------------------------------------------------------------------------------------


def test_bare_run_pretrains_segments_and_prints_the_floors(tmp_path, capsys):
    out = tmp_path / "run"
    assert M.main([*FAST, *LATER, "--out", str(out), "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert (
        "MDM (Pan et al. 2023), mdm" in text
        and "differs   D4 D10 D11 " in text
        and "differs   D2 D7 D8 D9 D14 D15" in text
        and "3 of them test" in text
    )
    assert (
        text.count("note: 2 of these 2 images may have been seen in pre-training, without labels")
        == 1
    )
    assert (
        text.count(
            "note: SD: over classifiers on one pre-trained network, with the same labelled images"
        )
        == 1
    )
    assert text.count("note: SD: over networks") == 1  # of random weights, a network a run
    side = text.split("side by side")[1]
    for row in (
        "MDM, 3 labels",
        "random features, 3 labels",
        "all foreground",
        "colour alone",
        "the truth itself",
    ):
        assert side.count(row) == 1, row
    assert all(
        word in side
        for word in ("Dice", "IoU", "d/(2-d)", "object Dice", "AJI", "AJI binary", "mIoU", "±")
    )
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"config.json", "log.csv", "last.pt", "loss.png", "figures/reconstructions.png"} <= names
    for folder in ("segment-3", "segment-3-random"):
        found = {n.removeprefix(folder + "/") for n in names if n.startswith(folder + "/")}
        assert {
            "table.csv",
            "metrics.csv",
            "summary.json",
            "objects.csv",
            "figures/segmentations.png",
        } <= found
        assert {"run0/last.pt", "run1/metrics.csv", "predictions/tissue_004.png"} <= found
        assert ("backbone.pt" in found) == (folder == "segment-3")
    assert not [n for n in names if n.endswith((".tmp", ".npy"))]
    before = (out / "segment-3-random/table.csv").read_text()
    argv = [
        "evaluate",
        "--out",
        str(out),
        "--labels",
        "3",
        "--checkpoint",
        "none",
        "--limit",
        "2",
        "--quiet",
    ]
    assert (
        M.main([*argv, "--amp", "off"]) == 0
        and (out / "segment-3-random/table.csv").read_text() == before
    )
    rows = metrics.read_metrics_csv(out / "segment-3/metrics.csv")
    runs = [metrics.read_metrics_csv(out / f"segment-3/run{r}/metrics.csv") for r in range(2)]
    assert (
        rows[0]["dice"] == pytest.approx(np.mean([r[0]["dice"] for r in runs])) and len(rows) == 2
    )


@pytest.mark.parametrize("method", ["ddpm", "mae"])
def test_other_methods_pretrain_and_segment(tmp_path, capsys, method):
    argv = [*FAST, "--method", method, "--out", str(tmp_path / "run")]
    assert M.main(["pretrain", *argv, "--steps", "2"]) == 0
    later = [*LATER] if method == "ddpm" else [w for w in LATER if w not in ("--blocks", "0,1,2")]
    assert (
        M.main(["segment", *later, "--out", str(tmp_path / "run"), "--runs", "1", "--quiet"]) == 0
    )
    text = capsys.readouterr().out
    assert f"{method.upper()}, 3 labels" in text and ("t (250,)" in text) == (method == "ddpm")
    assert M.main(["reconstruct", "--out", str(tmp_path / "run"), "--limit", "1", "--quiet"]) == 0
    assert len(table(tmp_path / "run/reconstructions.csv")) == 3
    if method == "mae":  # its learning rate depends on the number of steps
        assert "--steps was 2 and is 3" in refused(capsys, "pretrain", *argv, "--steps", "3")


def test_scale_of_the_features_is_kept_with_each_run(trained, prepared):
    ranks = runtime.Ranks(0, 1, 0, torch.device("cpu"))
    config = M.Config(
        **runtime.load_checkpoint(trained / "segment-3/run0/last.pt", M.SCRIPT)["config"]
    )
    data = loaders.open_data(str(prepared), axes=2)
    for run_ in M.load_runs(config, M.run_files(trained / "segment-3"), ranks)[0]:
        again = M.standardised(
            replace(run_.net, scale=None), data, M.labelled_cases(data, config), run_.seed
        )
        for kept, expected in zip(run_.net.scale, again.scale):
            torch.testing.assert_close(kept, expected)


def test_supervised_row_trains_a_network_a_run_and_continues(tmp_path, capsys):
    argv = ["segment", *FAST, "--method", "unet", "--labels", "3", "--runs", "2", "--limit", "2"]
    argv += ["--out", str(tmp_path / "run"), "--steps", "2"]
    assert M.main(argv) == 0
    text = capsys.readouterr().out
    assert "labels of 3 images" in text and "U-Net, supervised, 3 labels" in text and "D5" in text
    folder = tmp_path / "run/segment-3-unet"
    before = (folder / "run1/last.pt").read_bytes()
    assert M.main(argv) == 0 and (folder / "run1/last.pt").read_bytes() == before
    assert "--labels was 3 and is 2" not in refused(
        capsys, *argv, "--lr", "0.5"
    )  # another folder for other labels
    assert "--lr was 0.001 and is 0.5" in refused(capsys, *argv, "--lr", "0.5")


def test_natural_protocol_votes_and_leaves_no_features_behind(tmp_path, capsys, monkeypatch):
    square = TISSUE(0, (4, 3), (32, 32))
    monkeypatch.setattr(loaders, "Tissue", lambda: square)
    argv = ["--out", str(tmp_path / "run")]
    assert M.main(["pretrain", *FAST, *argv, "--steps", "1"]) == 0
    later = [
        *argv,
        "--protocol",
        "natural",
        "--ensemble",
        "2",
        "--blocks",
        "0,1",
        "--labels",
        "2",
        "--limit",
        "2",
    ]
    assert M.main(["segment", *later, "--runs", "1", "--classifier-steps", "5", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "member 0: 5 steps" in text and "member 1: 5 steps" in text and "norm standard" in text
    assert not list(tmp_path.rglob("*.npy"))
    assert all(float(r["uncertainty"]) >= 0 for r in table(tmp_path / "run/segment-2/objects.csv"))


# --- continuing ------------------------------------------------------------------------------------------------------


def test_same_command_again_trains_no_further_and_other_settings_are_refused(tmp_path, capsys):
    argv = ["pretrain", *FAST, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert M.main(argv) == 0
    before = (tmp_path / "run/last.pt").read_bytes()
    assert M.main(argv) == 0
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert [r["step"] for r in table(tmp_path / "run/log.csv") if r["val_loss"]] == [
        "1"
    ]  # not looked at again
    assert (
        M.main([*argv[:-1], "2", "--amp", "bf16"]) == 0
    )  # more steps continue, in another number format
    assert step_of(tmp_path / "run") == 2
    assert M.main([*argv[:-1], "2", "--labels", "4"]) == 0  # what pre-training does not look at
    assert "--tile was 8 and is 4" in refused(capsys, *argv, "--tile", "4")
    error = refused(capsys, *argv, "--overwrite", "--init", str(tmp_path / "missing.pt"))
    assert "missing.pt does not exist" in error and step_of(tmp_path / "run") == 2
    assert M.main([*argv, "--tile", "4", "--overwrite"]) == 0
    assert step_of(tmp_path / "run") == 1


def test_stopped_and_killed_run_continues_to_the_same_weights(tmp_path):
    argv = [
        "pretrain",
        "--data",
        "synthetic",
        *FAST,
        "--steps",
        "16",
        "--save-every",
        "1",
        "--eval-every",
        "6",
    ]
    argv += ["--ema", "0.9"]
    assert run(*argv, "--out", str(tmp_path / "whole")).returncode == 0
    CLI.stop_and_continue(*argv, out=tmp_path / "cut", signals=[signal.SIGTERM, signal.SIGKILL])
    assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = [table(tmp_path / name / "log.csv") for name in ("whole", "cut")]
    held = [[(r["step"], r["val_loss"]) for r in log if r["val_loss"]] for log in rows]
    assert held[0] == held[1] and [s for s, _ in held[0]] == ["6", "12", "16"]  # none lost or twice


@pytest.mark.parametrize("method", ["mdm", "ddpm"])
def test_accumulation_and_workers_do_not_change_the_result(tmp_path, method):
    argv = ["pretrain", *FAST, "--method", method, "--steps", "2", "--lr", "1e-4"]
    for name, more in {
        "a": [],
        "b": ["--accumulate", "2", "--workers", "1", "--recompute"],
    }.items():
        assert M.main([*argv, "--out", str(tmp_path / name), *more]) == 0
    assert_close(tmp_path / "a", tmp_path / "b")


def test_two_processes_train_and_score_as_one(tmp_path, prepared):
    argv = [
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        *FAST,
        *LATER,
        "--split",
        "testA",
        "--steps",
        "2",
    ]
    argv += ["--batch", "4", "--lr", "1e-4"]  # a third step is rounding alone
    assert M.main([*argv, "--out", str(tmp_path / "one")]) == 0
    two = run(*argv, "--out", str(tmp_path / "two"), "--accumulate", "2", processes=2)
    assert two.returncode == 0, two.stderr
    assert (
        "2 processes x 2 parts x 1" in two.stdout and two.stdout.count("MDM (Pan et al. 2023)") == 1
    )
    assert_close(tmp_path / "one", tmp_path / "two")
    one, both = (
        metrics.read_metrics_csv(tmp_path / n / "segment-3/metrics.csv") for n in ("one", "two")
    )
    assert [r["case"] for r in one] == [r["case"] for r in both] == ["s3", "s4"]
    np.testing.assert_allclose([r["dice"] for r in one], [r["dice"] for r in both], atol=2e-2)


def test_a_batch_larger_than_the_data_trains(tmp_path):
    argv = ["pretrain", *FAST, "--batch", "9", "--steps", "1", "--out", str(tmp_path / "run")]
    assert M.main(argv) == 0 and step_of(tmp_path / "run") == 1  # seven sections


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_number_formats_train(tmp_path, amp):
    assert (
        M.main(["pretrain", *FAST, "--out", str(tmp_path / "run"), "--steps", "1", "--amp", amp])
        == 0
    )
    state = runtime.load_checkpoint(tmp_path / "run/last.pt", "masked_diffusion")
    assert bool(state["scaler"]) == (amp == "fp16")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state["model"].values())


def test_steps_without_a_finite_gradient_are_skipped_and_twenty_end_the_run(tmp_path, monkeypatch):
    plain, calls = M.training_loss, iter(range(10_000))
    bad = {1, 2} | set(range(4, 99))
    monkeypatch.setattr(
        M, "training_loss", lambda *a: plain(*a) * (float("nan") if next(calls) in bad else 1.0)
    )
    argv = ["pretrain", *FAST, "--out", str(tmp_path / "run"), "--save-every", "4", "--steps", "99"]
    with pytest.raises(InputError, match="no finite gradient in 20 steps before step 24"):
        M.main(argv)
    state = runtime.load_checkpoint(tmp_path / "run/last.prev.pt", "masked_diffusion")
    assert (
        state["step"] == 16
        and state["skipped"][0] == 14
        and state["optimizer"]["state"][0]["step"] == 2
    )
    assert all(v.isfinite().all() for v in state["model"].values())


def test_finished_classifiers_are_kept_and_a_missing_one_is_trained_again(
    trained, prepared, tmp_path, capsys
):
    out = tmp_path / "copy"
    argv = [
        "segment",
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        "--checkpoint",
        str(trained / "last.pt"),
    ]
    argv += [*LATER, "--split", "testA", "--quiet", "--amp", "off", "--out", str(out)]
    assert M.main(argv) == 0
    first, second = (out / f"segment-3/run{r}/last.pt" for r in range(2))
    stamp, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    assert M.main(argv) == 0
    assert first.stat().st_mtime_ns == stamp and len(second.read_bytes()) == len(content)
    a, b = (torch.load(f, weights_only=True)["model"]["0"]["first.weight"] for f in (first, second))
    expected = torch.load(trained / "segment-3/run1/last.pt", weights_only=True)["model"]["0"][
        "first.weight"
    ]
    assert torch.equal(b, expected) and not torch.equal(a, b)
    before = (out / "segment-3/config.json").read_text()
    assert "--classifier-lr was 0.001 and is 0.5" in refused(
        capsys, *argv, "--classifier-lr", "0.5"
    )
    assert (out / "segment-3/config.json").read_text() == before  # a refusal changes nothing
    assert (
        M.main([*argv, "--accumulate", "3"]) == 0
    )  # of pre-training alone, whose batch it would change


def test_runs_of_one_folder_share_the_frozen_network(trained):
    config = M.Config(
        **runtime.load_checkpoint(trained / "segment-3/run0/last.pt", M.SCRIPT)["config"]
    )
    ranks = runtime.Ranks(0, 1, 0, torch.device("cpu"))
    runs = M.load_runs(config, M.run_files(trained / "segment-3"), ranks)[0]
    assert [r.seed for r in runs] == [0, 1] and runs[0].net.model is runs[1].net.model


def test_classifiers_of_earlier_weights_are_not_mixed_with_new_ones(
    trained, prepared, tmp_path, capsys
):
    argv = [
        "pretrain",
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        *FAST,
        "--out",
        str(tmp_path / "run"),
    ]
    later = [
        "segment",
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        "--out",
        str(tmp_path / "run"),
        *LATER,
    ]
    later += ["--split", "testA", "--runs", "1", "--quiet"]
    assert (
        M.main([*argv, "--steps", "1"]) == 0
        and M.main(later) == 0
        and M.main([*argv, "--steps", "3"]) == 0
    )
    assert "holds other weights than --checkpoint" in refused(capsys, *later)
    assert M.main([*later, "--overwrite"]) == 0


# --- evaluate, predict and the pictures ------------------------------------------------------------------------------


def test_evaluate_gives_what_segment_gave(trained, prepared, tmp_path):
    argv = [
        "evaluate",
        "--checkpoint",
        str(trained / "segment-3"),
        "--data",
        str(prepared),
        "--split",
        "testA",
    ]
    assert (
        M.main(
            [*argv, "--preset", "tiny", "--out", str(tmp_path / "again"), "--quiet", "--amp", "off"]
        )
        == 0
    )
    for name in ("metrics.csv", "table.csv", "objects.csv"):
        assert (tmp_path / "again" / name).read_text() == (trained / "segment-3" / name).read_text()
    before = (trained / "segment-3/table.csv").read_text()
    argv = [
        "evaluate",
        "--out",
        str(trained),
        "--labels",
        "3",
        "--data",
        str(prepared),
        "--split",
        "testA",
        "--quiet",
    ]
    (trained / "segment-3/table.csv").unlink()
    assert (
        M.main([*argv, "--amp", "off", "--preset", "tiny"]) == 0
        and not (trained / "table.csv").exists()
    )
    assert (trained / "segment-3/table.csv").read_text() == before
    other = [
        "--split",
        "train",
        "--limit",
        "1",
        "--preset",
        "tiny",
    ]  # beside the others, not over them
    assert M.main([*argv, *other]) == 0 and (trained / "segment-3/table.csv").read_text() == before
    assert {r["split"] for r in table(trained / "segment-3/train-1/table.csv")} == {"train"}
    assert {r["split"] for r in table(trained / "segment-3/table.csv")} == {"testA"}
    one = [
        "evaluate",
        "--checkpoint",
        str(trained / "segment-3/run1/last.pt"),
        "--data",
        str(prepared),
    ]
    one += ["--split", "testA", "--limit", "1", "--quiet", "--preset", "tiny", "--save-members"]
    assert M.main([*one, "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one/predictions/run1/s3.png").exists()
    assert [r["run"] for r in table(tmp_path / "one/table.csv") if r["run"]] == ["1"]


def test_scores_on_other_data_stand_beside_those_of_segment(trained, prepared, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "other")
    meta = json.loads((prepared / "dataset.json").read_text())
    meta["splits"] |= {
        "train": meta["splits"]["train"][:1]
    }  # fewer labelled images than the classifier learned from
    (tmp_path / "other/dataset.json").write_text(json.dumps(meta))
    before = (trained / "segment-3/table.csv").read_text()
    argv = [
        "evaluate",
        "--checkpoint",
        str(trained / "segment-3"),
        "--preset",
        "tiny",
        "--split",
        "testA",
        "--quiet",
    ]
    assert M.main([*argv, "--data", str(tmp_path / "other"), "--labels", "1"]) == 0
    assert (trained / "segment-3/table.csv").read_text() == before
    names = [r["name"] for r in table(trained / "segment-3/other-testA/table.csv")]
    assert (
        names.count("MDM, 3 labels") == 2 and "colour alone" in names
    )  # not the one label of the flag
    assert "MDM, 3 labels" in capsys.readouterr().out


def test_table_says_what_was_taken_from_the_paper(prepared):
    data = loaders.open_data(str(prepared), axes=2)
    net = SimpleNamespace(random=False)
    paper = M.Config(data=str(prepared))
    notes = M.caveats(paper, data, ["s3"], [net])
    assert notes[-1] == "t, blocks, tile, loss: as in the paper, which chose on its test images"
    other = replace(paper, tile=4, ssim_range="unit", blocks=(1, 2))
    assert (
        M.caveats(other, data, ["s3"], [net])[-1]
        == "t: as in the paper, which chose on its test images"
    )
    assert "as in the paper" not in " ".join(
        M.caveats(replace(other, fixed_t=9), data, ["s3"], [net])
    )


def save_images(folder: Path) -> list[Path]:
    rgb = loaders.tissue(3, 0, (45, 70))[0].transpose(1, 2, 0)
    folder.mkdir()
    for name in ("a.png", "b.tif", "c.jpg", "d.bmp"):
        Image.fromarray(rgb).save(folder / name)
    Image.fromarray(rgb[:11, :9]).save(folder / "e.png")
    return sorted(folder.iterdir())


def test_predict_reads_a_folder_of_all_kinds_and_sizes(trained, tmp_path):
    save_images(tmp_path / "in")
    argv = ["predict", "--checkpoint", str(trained / "segment-3"), "--preset", "tiny", "--quiet"]
    assert M.main([*argv, "--image", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    masks = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "out").glob("*.png")}
    assert {n: m.shape for n, m in masks.items()} == {f"{s}.png": (45, 70) for s in "abcd"} | {
        "e.png": (11, 9)
    }
    assert all(
        set(np.unique(m)) <= {0, 7} and m.dtype == np.uint8 for m in masks.values()
    )  # the published value
    maps = {p.name for p in (tmp_path / "out/maps").iterdir()}
    assert {"a_gland.png", "a_overlay.png", "e_overlay.png"} <= maps and len(maps) == 10
    prob = np.asarray(Image.open(tmp_path / "out/maps/a_gland.png"))
    assert ((prob > 128) <= (masks["a.png"] == 7)).all()


def test_images_are_reduced_as_those_of_the_training_and_masks_enlarged_again(
    trained, prepared, tmp_path, capsys
):
    shutil.copytree(trained / "segment-3", tmp_path / "segment-3")
    for file in (tmp_path / "segment-3").glob("run*/last.pt"):
        state = runtime.load_checkpoint(file, M.SCRIPT)
        torch.save(state | {"data": state["data"] | {"reduce": 3}}, file)
    (tmp_path / "in").mkdir()
    small = np.random.default_rng(0).integers(0, 256, (14, 20, 3)).astype(np.uint8)
    large = np.pad(small.repeat(3, 0).repeat(3, 1), ((0, 2), (0, 1), (0, 0)), mode="edge")
    masks = []
    for folder, image in ((trained / "segment-3", small), (tmp_path / "segment-3", large)):
        Image.fromarray(image).save(tmp_path / "in/a.png")
        argv = [
            "predict",
            "--checkpoint",
            str(folder),
            "--preset",
            "tiny",
            "--image",
            str(tmp_path / "in/a.png"),
        ]
        assert M.main([*argv, "--output", str(tmp_path / "out/mask.png")]) == 0
        masks.append(
            [
                np.asarray(Image.open(tmp_path / "out" / n))
                for n in ("mask.png", "maps/mask_gland.png")
            ]
        )
    assert "made 3 times smaller" in capsys.readouterr().out and masks[1][0].shape == (44, 61)
    for one, other in zip(*masks):
        assert np.array_equal(
            np.pad(one.repeat(3, 0).repeat(3, 1), ((0, 2), (0, 1)), mode="edge"), other
        )
    argv = [
        "evaluate",
        "--checkpoint",
        str(tmp_path / "segment-3"),
        "--data",
        str(prepared),
        "--split",
        "testA",
    ]
    assert "--reduce 1, the classifier's with 3" in refused(
        capsys, *argv, "--out", str(tmp_path / "e")
    )


def test_predict_writes_one_file_and_no_maps_where_told(trained, tmp_path):
    save_images(tmp_path / "in")
    argv = [
        "predict",
        "--checkpoint",
        str(trained / "segment-3/run1/last.pt"),
        "--preset",
        "tiny",
        "--no-save-maps",
    ]
    assert (
        M.main(
            [*argv, "--image", str(tmp_path / "in/a.png"), "--output", str(tmp_path / "x/mask.png")]
        )
        == 0
    )
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["mask.png"]


def test_predict_refuses_a_place_for_masks_that_is_no_png_and_an_empty_folder(
    trained, tmp_path, capsys
):
    save_images(tmp_path / "in")
    argv = ["predict", "--checkpoint", str(trained / "segment-3"), "--preset", "tiny", "--image"]
    error = refused(
        capsys, *argv, str(tmp_path / "in/a.png"), "--output", str(tmp_path / "mask.jpg")
    )
    assert "mask.jpg: masks are PNG" in error and not (tmp_path / "mask.jpg").exists()
    (tmp_path / "empty").mkdir()
    error = refused(capsys, *argv, str(tmp_path / "empty"), "--output", str(tmp_path / "out"))
    assert f"{tmp_path / 'empty'}: no .png" in error


def test_predict_names_each_bad_file_and_does_the_others(trained, tmp_path, capsys):
    folder = tmp_path / "in"
    files = save_images(folder)
    (folder / "half.png").write_bytes(files[0].read_bytes()[:300])
    Image.fromarray(np.zeros((30, 30), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(folder / "grey.png")
    argv = ["predict", "--checkpoint", str(trained / "segment-3"), "--preset", "tiny", "--quiet"]
    error = refused(capsys, *argv, "--image", str(folder), "--output", str(tmp_path / "out"))
    assert "3 of 8 images were left out" in error and "cut off" in error and "16 bits" in error
    assert (
        "1 channel, expected 3 (RGB)" in error and len(list((tmp_path / "out").glob("*.png"))) == 5
    )


def test_reconstruct_and_cluster_draw(trained, prepared, tmp_path, capsys):
    argv = [
        "--checkpoint",
        str(trained / "last.pt"),
        "--data",
        str(prepared),
        "--split",
        "testA",
        "--limit",
        "2",
    ]
    argv += ["--out", str(tmp_path / "look"), "--quiet", "--preset", "tiny"]
    assert M.main(["reconstruct", *argv, "--ratio", "0.25,0.75"]) == 0
    rows = table(tmp_path / "look/reconstructions.csv")
    assert [r["ratio"] for r in rows] == ["0.25", "0.75"] * 2 and all(
        0 <= float(r["flipped"]) <= 1 for r in rows
    )
    assert "25% hidden, 2 images: psnr" in capsys.readouterr().out
    assert M.main(["cluster", *argv, "--blocks", "1,2", "--k", "3"]) == 0
    assert Image.open(tmp_path / "look/figures/clusters.png").size[0] > 300


def cifar_folder(folder: Path, count: int = 20) -> Path:
    import pickle

    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("data_batch_1", count), ("test_batch", 10)):
        labels = [int(v) for v in rng.integers(0, 10, n)]
        data = (np.array(labels)[:, None] * 25 + rng.integers(0, 10, (n, 3072))).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}, 2))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, 2)
    )
    return folder


def test_probe_pretrains_on_cifar_and_tells_classes_of_plain_colours(tmp_path, capsys):
    data = cifar_folder(tmp_path / "cifar-10-batches-py")
    argv = ["--data", str(data), "--out", str(tmp_path / "run"), "--quiet"]
    assert M.main(["pretrain", *argv, "--preset", "tiny", *FAST, "--steps", "2"]) == 0
    assert "20 images without labels, 0 of them test images" in capsys.readouterr().out
    assert M.main(["probe", *argv, "--preset", "tiny", "--blocks", "0,1"]) == 0
    rows = table(tmp_path / "run/probe.csv")
    assert [(r["t"], r["block"]) for r in rows] == [(t, b) for t in ("0", "50") for b in "01"]
    assert "linear probe:" in capsys.readouterr().out


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        (["pretrain", "--crop", "50"], "--crop 50 is not a multiple of 4, which --tile asks for"),
        (["pretrain", "--method", "unet"], "--method unet learns from labels"),
        (
            ["pretrain", "--checkpoint", "x.pt"],
            "--checkpoint is for segment, evaluate, predict, reconstruct, cluster",
        ),
        (["segment", "--image", "x.png"], "--image is for predict; segment ignores it"),
        (
            ["--labels", "99"],
            "--labels 99: synthetic has 4 labelled training images",
        ),  # not after the pre-training
        (["--split", "valid"], "no split 'valid'"),
        (["pretrain", "--lables", "3"], "unknown flag --lables; did you mean --labels?"),
        (["pretrain", "--data", "nowhere"], "data/nowhere: the data folder does not exist"),
        (["segment", "--out", "nothing/here"], "last.pt does not exist"),
        (
            ["segment", "--checkpoint", "none", "--labels", "99"],
            "--labels 99: synthetic has 4 labelled training images",
        ),
        (["segment", "--checkpoint", "none", "--split", "valid"], "no split 'valid'"),
        (["evaluate", "--out", "nothing/here"], "holds no classifier (run0/last.pt)"),
        (["predict"], "holds no classifier"),
        (["reconstruct", "--method", "unet"], "reconstruct needs a pre-trained network"),
        (
            ["cluster", "--checkpoint", "none", "--split", "val"],
            "has no image in its split val; has train, test",
        ),
        (["probe", "--checkpoint", "none"], "probe needs CIFAR-10, --data synthetic is none"),
        (
            ["segment", "--checkpoint", "none", "--channel-mult", "1,2,2,2"],
            "this network has blocks 0 to 11",
        ),
        (["pretrain", "--batch", "3", "--accumulate", "2"], "--batch 3 cannot be shared"),
        (
            ["pretrain", "--num-channels", "1024", "--batch", "4096"],
            "training on 4096 crops of 64 x 64 needs about",
        ),
    ],
)
def test_bad_flags_and_data_are_refused_in_one_line(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_volumes_are_refused(capsys, tmp_path, prepared):
    meta = json.loads((prepared / "dataset.json").read_text())
    meta["cases"] = {"v": {"shape": [4, 4, 4], "labelled": False}}
    meta["splits"] = {"train": ["v"], "val": [], "test": []}
    folder = tmp_path / "volumes/cases/v"
    folder.mkdir(parents=True)
    np.save(folder / "image.npy", np.zeros((3, 4, 4, 4), np.float16))
    (tmp_path / "volumes/dataset.json").write_text(json.dumps(meta))
    assert "holds volumes, expected images" in refused(
        capsys, "pretrain", "--data", str(tmp_path / "volumes")
    )


def test_another_network_or_a_damaged_file_is_refused(capsys, trained, prepared, tmp_path):
    argv = [
        "segment",
        "--data",
        str(prepared),
        "--out",
        str(tmp_path / "x"),
        "--split",
        "testA",
        "--preset",
        "tiny",
    ]
    assert "was trained with --tile 8" in refused(
        capsys, *argv, "--checkpoint", str(trained / "last.pt"), "--tile", "4"
    )
    (tmp_path / "half.pt").write_bytes((trained / "last.pt").read_bytes()[:5000])
    assert "half.pt is damaged" in refused(capsys, *argv, "--checkpoint", str(tmp_path / "half.pt"))
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    assert "no U-Net of this kind" in refused(
        capsys, *argv, "--checkpoint", str(tmp_path / "other.pt")
    )
    argv = [
        "evaluate",
        "--checkpoint",
        str(trained / "segment-3"),
        "--data",
        str(prepared),
        "--preset",
        "tiny",
    ]
    error = refused(capsys, *argv, "--crop", "64")
    assert "was trained with --crop 32" in error
    for verb, flags in (("evaluate", []), ("predict", ["--image", "x.png", "--output", "y.png"])):
        error = refused(capsys, verb, "--checkpoint", str(trained / "last.pt"), *flags)
        assert "last.pt is a pre-trained network, not a classifier" in error
    argv = [
        "--data",
        str(prepared),
        "--out",
        str(tmp_path / "x"),
        "--split",
        "testA",
        "--preset",
        "tiny",
    ]
    for verb in ("segment", "reconstruct"):
        error = refused(
            capsys, verb, *argv, "--checkpoint", str(trained / "segment-3/run0/last.pt")
        )
        assert "run0/last.pt is a classifier, expected a pre-trained network" in error


def test_supervised_network_is_no_pretrained_one(capsys, prepared, tmp_path):
    argv = ["--data", str(prepared), "--split", "testA", "--preset", "tiny", "--quiet"]
    supervised = [
        "--method",
        "unet",
        "--labels",
        "3",
        "--runs",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "a"),
    ]
    assert M.main(["segment", *argv, *FAST, *supervised]) == 0
    for verb in ("segment", "reconstruct"):
        file = tmp_path / "a/segment-3-unet/run0/last.pt"
        error = refused(
            capsys, verb, *argv, "--checkpoint", str(file), "--out", str(tmp_path / "b")
        )
        assert (
            "is a supervised network, expected a pre-trained network" in error
            and not (tmp_path / "b").exists()
        )


def test_data_without_a_training_split_can_be_scored_and_not_trained_on(
    capsys, trained, prepared, tmp_path
):
    shutil.copytree(prepared, tmp_path / "tests")
    meta = json.loads((prepared / "dataset.json").read_text())
    meta["splits"] = {"testA": meta["splits"]["testA"]}
    (tmp_path / "tests/dataset.json").write_text(json.dumps(meta))
    argv = ["--data", str(tmp_path / "tests"), "--preset", "tiny", "--quiet"]
    error = refused(
        capsys, "pretrain", *argv, "--pretrain-on", "train", "--out", str(tmp_path / "x")
    )
    assert "has no image to train on" in error
    argv += [
        "--checkpoint",
        str(trained / "segment-3"),
        "--split",
        "testA",
        "--out",
        str(tmp_path / "y"),
    ]
    assert M.main(["evaluate", *argv]) == 0


def test_run_folder_that_cannot_be_made_is_one_line(capsys, trained, prepared, tmp_path):
    (tmp_path / "file").write_text("")
    argv = [
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        "--split",
        "testA",
        "--checkpoint",
        str(trained),
    ]
    for verb in ("reconstruct", "cluster"):
        flags = ["--blocks", "1"] if verb == "cluster" else []
        assert str(tmp_path / "file") in refused(
            capsys, verb, *argv, *flags, "--out", str(tmp_path / "file/run")
        )


def test_public_weights_can_be_segmented_with(trained, prepared, tmp_path, capsys):
    state = torch.load(trained / "last.pt", weights_only=True)["ema"]
    torch.save(state, tmp_path / "public.pt")
    argv = [
        "segment",
        "--data",
        str(prepared),
        "--out",
        str(tmp_path / "x"),
        "--split",
        "testA",
        "--preset",
        "tiny",
    ]
    assert M.main([*argv, *FAST, *LATER, "--checkpoint", str(tmp_path / "public.pt")]) == 0
    ours, theirs = ((p / "segment-3/metrics.csv").read_text() for p in (trained, tmp_path / "x"))
    assert ours == theirs
    torch.save(
        state | {k: torch.cat([state[k]] * 2) for k in ("out.2.weight", "out.2.bias")},
        tmp_path / "six.pt",
    )
    error = refused(capsys, *argv, *FAST, *LATER, "--checkpoint", str(tmp_path / "six.pt"))
    assert "6 output channels" in error and "--method ddpm" in error
    init = [
        "pretrain",
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        *FAST,
        "--steps",
        "1",
        "--lr",
        "1e-9",
    ]
    init += ["--out", str(tmp_path / "y")]
    assert M.main([*init, "--init", str(tmp_path / "public.pt")]) == 0
    found = torch.load(tmp_path / "y/last.pt", weights_only=True)
    for weights_ in (found["model"], found["ema"]):
        assert all(torch.allclose(weights_[k], state[k], atol=1e-7) for k in state)


def test_a_full_disk_leaves_the_last_save_and_says_so(tmp_path, monkeypatch, capsys):
    argv = ["pretrain", *FAST, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert M.main(argv) == 0

    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in refused(capsys, *argv[:-1], "2")
    monkeypatch.undo()
    assert step_of(tmp_path / "run") == 1


# --- memory, flags ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can set a process's memory maximum back"
)
def test_memory_does_not_depend_on_the_number_of_labelled_images():
    config = replace(M.Config(**M.PRESETS["tiny"]), stop="steps", quiet=True)
    net = M.frozen(
        config,
        M.fresh(config, {"channels": list("rgb")}),
        runtime.Ranks(0, 1, 0, torch.device("cpu")),
    )
    data, peaks = loaders.Tissue(), []
    for n in (4, 40):
        fit = replace(config, classifier_steps=40)
        cases = [data.cases("train")[i % 4] for i in range(n)]
        peaks.append(
            runtime.measure(
                lambda c=cases, f=fit: M.fit_medical(f, net, data, c, 0, "x"), net.device
            )[1]
        )
    assert peaks[1] < 1.1 * peaks[0] + 0.01, peaks


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can set a process's memory maximum back"
)
def test_an_image_of_a_thousand_pixels_is_segmented_in_two_gigabytes():
    config = replace(
        M.Config(data="x", preset="laptop", **{**M.PRESETS["laptop"], "crop": 256}), quiet=True
    )
    net = M.frozen(
        config,
        M.fresh(config, {"channels": list("rgb")}),
        runtime.Ranks(0, 1, 0, torch.device("cpu")),
    )
    run_ = M.Run(0, net, [M.PixelClassifier(net.widths(), 2).eval()])
    image = np.zeros((3, 1000, 1000), np.uint8)
    _, peak = runtime.measure(lambda: M.segment_image(run_, image, "x"), net.device)
    assert peak < 2, peak


def two_steps(**flags) -> torch.Tensor:
    """All (averaged) weights after two steps, as one vector."""
    config = replace(
        M.Config(**M.PRESETS["tiny"]), channel_mult=(1, 1), num_res_blocks=1, num_head_channels=32
    )
    config = replace(config, crop=16, batch=2, steps=4, attention_resolutions=(2,))
    config = replace(config, **flags)
    data = loaders.Tissue()
    training = M.Training(config, loaders.data_record(data), torch.device("cpu"), None)
    ranks = runtime.Ranks(0, 1, 0, torch.device("cpu"))
    cases = (
        M.labelled_cases(data, config)
        if config.method == "unet"
        else M.pretraining_cases(data, config)
    )
    loader = torch.utils.data.DataLoader(
        M.Crops(data, config, cases), batch_sampler=M.Sharded(config, ranks, 0)
    )
    batches, by_t = iter(loader), runtime.LossByTime(M.T, ranks.device)
    for _ in range(2):
        M.train_step(training, training.model, batches, ranks, by_t)
    assert training.skipped[0] == 0 and np.isfinite(list(by_t.row(ranks).values())).all()
    return torch.cat([p.detach().flatten() for p in training.ema.parameters()])


@cache
def plain() -> torch.Tensor:
    return two_steps()


@pytest.mark.parametrize(
    "flags",
    [
        {"seed": 1},
        {"method": "ddpm"},
        {"loss": "mse"},
        {"loss": "l1"},
        {"ssim_window": 7},
        {"ssim_L": 2.0},
        {"ssim_range": "signed"},
        {"tile": 8},
        {"fixed_t": 50},
        {"pretrain_on": "train"},
        {"crop": 32},
        {"lr": 1e-2},
        {"grad_clip": 1e-9},
        {"ema": 0.0},
        {"batch": 4},
        {"attention_resolutions": ()},
        {"num_head_channels": 16},
        {"num_groups": 16},
        {"method": "unet", "labels": 2},
    ],
)
def test_each_flag_of_the_training_changes_it(flags):
    other = two_steps(**flags)
    assert other.shape != plain().shape or not torch.equal(other, plain())


@pytest.mark.parametrize(
    "a, b",
    [
        ({"method": "ddpm"}, {"method": "ddpm", "schedule": "linear"}),
        ({"method": "ddpm"}, {"method": "ddpm", "target": "x0"}),
        ({"method": "mae"}, {"method": "mae", "ratio": (0.5,)}),
        ({"method": "mae"}, {"method": "mae", "loss": "ssim"}),
        ({"method": "unet", "labels": 2}, {"method": "unet", "labels": 2, "draw": "1"}),
    ],
)
def test_flags_of_one_method_change_it(a, b):
    assert not torch.equal(two_steps(**a), two_steps(**b))


@pytest.mark.parametrize(
    "flags",
    [
        {"feature_t": (250,)},
        {"feature_mask": "off"},
        {"feature_norm": "rms"},
        {"blocks": (1, 2)},
        {"pixels": 50},
        {"crops": 2},
        {"classifier_lr": 1e-2},
        {"classifier_norm": "batch"},
        {"classifier_steps": 5},
        {"stop": "medical", "stop_epoch": 0},
    ],
)
def test_each_flag_of_the_classifier_changes_it(flags):
    found = []
    for more in ({}, flags):
        config = replace(
            M.Config(**M.PRESETS["tiny"]), channel_mult=(1, 1), num_head_channels=32, crop=16
        )
        config = replace(
            config,
            attention_resolutions=(2,),
            blocks=(0, 1),
            classifier_steps=3,
            pixels=100,
            quiet=True,
        )
        config = replace(config, **more)
        data = loaders.Tissue()
        net = M.frozen(
            config,
            M.fresh(config, loaders.data_record(data)),
            runtime.Ranks(0, 1, 0, torch.device("cpu")),
        )
        found.append(M.fit_medical(config, net, data, data.cases("train")[:2], 0, "x").first.weight)
    assert found[0].shape != found[1].shape or not torch.equal(found[0], found[1])


# --- what is already there -------------------------------------------------------------------------------------------


def test_segment_on_fewer_images_leaves_the_scores_that_are_there(trained, prepared):
    argv = [
        "segment",
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        "--out",
        str(trained),
        *LATER[:-2],
        "--quiet",
    ]
    argv += ["--amp", "off", "--split", "testA"]
    before = (trained / "segment-3/table.csv").read_text()
    assert json.loads((trained / "segment-3/scored.json").read_text())["split"] == "testA"
    assert M.main([*argv, "--limit", "1"]) == 0
    assert (trained / "segment-3/table.csv").read_text() == before
    assert (trained / "segment-3/testA-1/table.csv").exists()


def test_classifiers_of_other_settings_do_not_join_a_folder(trained, prepared, capsys):
    argv = [
        "segment",
        "--data",
        str(prepared),
        "--preset",
        "tiny",
        "--out",
        str(trained),
        *LATER,
        "--quiet",
    ]
    argv += ["--amp", "off", "--split", "testA", "--seed", "10", "--feature-t", "250"]
    assert "--feature-t was" in refused(capsys, *argv)


def test_protocol_of_the_classifiers_is_kept_by_name(trained):
    assert (
        runtime.load_checkpoint(trained / "segment-3/run0/last.pt", M.SCRIPT)["config"]["protocol"]
        == "medical"
    )


def test_longer_bare_run_is_refused_before_it_trains(tmp_path, capsys):
    argv = [*FAST, *LATER, "--out", str(tmp_path / "run")]
    assert M.main([*argv, "--steps", "1"]) == 0
    before = (tmp_path / "run/last.pt").read_bytes()
    assert "holds classifiers of step 1, --steps 2 would train on" in refused(
        capsys, *argv, "--steps", "2"
    )
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_starts_that_a_method_does_not_look_at_are_refused(trained, prepared, capsys):
    argv = ["segment", "--data", str(prepared), "--preset", "tiny", "--quiet", "--amp", "off"]
    assert "--init is for pretrain and for --method unet" in refused(
        capsys, *argv, "--init", str(trained / "last.pt")
    )
    error = refused(capsys, *argv, "--method", "unet", "--checkpoint", str(trained / "last.pt"))
    assert "--method unet has no pre-trained network" in error


def test_only_numbered_folders_are_runs(tmp_path):
    for name in ("run10", "run2", "run-glas"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    assert [f.parent.name for f in M.run_files(tmp_path)] == ["run2", "run10"]
