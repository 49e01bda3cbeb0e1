"""patchddm.py as a user runs it: train, stop, continue, evaluate, predict, two processes, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CommandLine

import patchddm
from common import InputError
from common.old import loaders, metrics, runtime

ROOT = Path(__file__).parents[1]
NET = [
    "--num-channels",
    "4",
    "--channel-mult",
    "1,2",
    "--num-groups",
    "2",
    "--patch",
    "16",
    "--batch",
    "2",
]
FAST = [*NET, "--sampling-steps", "2", "--limit", "1", "--quiet", "--amp", "off", "--device", "cpu"]
CLI = CommandLine("patchddm", patchddm.main)
run, weights, assert_same = CLI.run, CLI.weights, CLI.assert_same


@pytest.fixture(scope="session")
def trained(fake, tmp_path_factory) -> Path:
    """A run folder with two steps of training on the fake data."""
    out = tmp_path_factory.mktemp("trained") / "run"
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        "--out",
        str(out),
        *FAST,
        "--steps",
        "2",
    ]
    assert patchddm.main([*argv, "--eval-every", "2"]) == 0
    return out


# --- the whole story -------------------------------------------------------------------------------------------------


def test_bare_run_trains_scores_and_draws(tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        patchddm.main([*FAST, "--out", str(out), "--steps", "3", "--ensemble", "2", "--save-maps"])
        == 0
    )
    text = capsys.readouterr().out
    assert (
        "PatchDDM (Bieder et al. 2023)" in text and "differs   D1" in text and "target x0" in text
    )
    assert "ensemble of 1" in text and "ensemble of 2" in text and "threshold / interval" in text
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
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
        "figures/phantom_0068.png",
        "figures/phantom_0068_steps.png",
        "predictions/phantom_0068.nii.gz",
    } <= names
    assert {"predictions/maps/phantom_0068_variance.nii.gz", "metrics_ensemble1.csv"} <= names
    assert not [n for n in names if n.endswith(".tmp")]
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["mean"]["dice"]["mean"] <= 1 and summary["mean"]["dice"]["n"] == 1


def test_same_command_again_trains_no_further(tmp_path, capsys):
    argv = ["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "2"]
    assert patchddm.main(argv) == 0
    before = (tmp_path / "run/last.pt").read_bytes()
    assert patchddm.main(argv) == 0
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert patchddm.main([*argv[:-1], "3"]) == 0  # more steps continue
    assert runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")["step"] == 3


def test_other_settings_are_refused_and_overwrite_starts_again(tmp_path):
    argv = ["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert patchddm.main(argv) == 0
    refused = run(*argv, "--lr", "0.5")
    assert refused.returncode == 2 and "--lr was 0.002 and is 0.5" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert patchddm.main([*argv, "--lr", "0.5", "--overwrite"]) == 0
    assert runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")["config"]["lr"] == 0.5


def test_overwrite_throws_nothing_away_before_its_input_is_read(tmp_path):
    argv = ["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert patchddm.main(argv) == 0
    refused = run(*argv, "--overwrite", "--init", str(tmp_path / "missing.pt"))
    assert refused.returncode == 2 and (tmp_path / "run/last.pt").exists()
    assert patchddm.main([*argv, "--overwrite", "--init", str(tmp_path / "run/last.pt")]) == 0


def test_continuing_with_another_number_format_works(tmp_path):
    argv = ["train", *FAST, "--out", str(tmp_path / "run")]
    assert patchddm.main([*argv, "--steps", "1"]) == 0
    assert patchddm.main([*argv, "--steps", "2", "--amp", "fp16"]) == 0
    assert patchddm.main([*argv, "--steps", "3", "--amp", "bf16"]) == 0
    assert runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")["step"] == 3


def test_other_data_under_the_same_name_are_noticed(tmp_path, fake):
    data = tmp_path / "data"
    shutil.copytree(fake / "prepared", data)
    argv = [
        "train",
        "--data",
        str(data),
        "--preset",
        "tiny",
        *FAST,
        "--out",
        str(tmp_path / "run"),
        "--steps",
    ]
    assert patchddm.main([*argv, "1"]) == 0
    meta = json.loads((data / "dataset.json").read_text())
    meta["label_values"] = {k: 7 * v for k, v in meta["label_values"].items()}
    (data / "dataset.json").write_text(json.dumps(meta))
    refused = run(*argv, "2")
    assert refused.returncode == 2 and "data with other label_values" in refused.stderr


def test_overwrite_leaves_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    refused = run("train", *FAST, "--out", str(tmp_path), "--steps", "1", "--overwrite")
    assert refused.returncode == 2 and "no config.json" in refused.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_accumulation_changes_memory_not_the_result(tmp_path):
    for k in ("1", "2"):
        argv = ["train", *FAST, "--out", str(tmp_path / k), "--steps", "2", "--accumulate", k]
        assert patchddm.main(argv) == 0
    left, right = weights(tmp_path / "1"), weights(tmp_path / "2")
    for k in left:
        torch.testing.assert_close(left[k], right[k], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["full", "half"])
def test_baselines_train_and_score_at_full_resolution(tmp_path, method, fake):
    argv = [
        *FAST,
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        "--method",
        method,
        "--out",
        str(tmp_path / "r"),
    ]
    assert patchddm.main([*argv, "--steps", "1", "--save-maps"]) == 0
    data = loaders.open_prepared(fake / "prepared")
    case = data.cases("test")[0]
    for name in (f"{case}.nii.gz", f"maps/{case}_variance.nii.gz"):
        assert nib.load(tmp_path / "r/predictions" / name).shape == data.shape(case)


def test_minutes_end_a_run_early(tmp_path):
    assert (
        patchddm.main(
            ["train", *FAST, "--out", str(tmp_path / "a"), "--steps", "9999", "--minutes", "0.02"]
        )
        == 0
    )
    state = runtime.load_checkpoint(tmp_path / "a/last.pt", "patchddm")
    assert 1 <= state["step"] < 9999 and state["seconds"] >= 1.2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_number_formats_train(tmp_path, amp):
    argv = ["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "4", "--amp", amp]
    assert patchddm.main(argv) == 0
    state = runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")
    assert bool(state["scaler"]) == (amp == "fp16")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state["model"].values())
    assert (state["model"]["out.2.weight"] != 0).any()


def spoiled_loss(monkeypatch, bad_calls):
    plain, calls = patchddm.diffusion_loss, iter(range(10_000))

    def loss(*args):
        return plain(*args) * (float("nan") if next(calls) in bad_calls else 1.0)

    monkeypatch.setattr(patchddm, "diffusion_loss", loss)


def test_step_without_a_finite_gradient_is_skipped_and_counted(tmp_path, monkeypatch):
    spoiled_loss(monkeypatch, {1, 2})
    assert patchddm.main(["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "4"]) == 0
    state = runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")
    assert state["skipped"] == [2, 0, 2] and state["optimizer"]["state"][0]["step"] == 2
    assert all(v.isfinite().all() for v in state["model"].values())


def test_twenty_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    spoiled_loss(
        monkeypatch, set(range(3, 10)) | set(range(11, 99))
    )  # seven, then a good one, then too many
    with pytest.raises(InputError, match="no finite gradient in 20 steps before step 31"):
        patchddm.main(["train", *FAST, "--out", str(tmp_path / "run"), "--steps", "99"])


def test_workers_do_not_change_the_result(tmp_path):
    for n in ("0", "2"):
        argv = ["train", *FAST, "--out", str(tmp_path / n), "--steps", "2", "--workers", n]
        assert patchddm.main(argv) == 0
    assert_same(tmp_path / "0", tmp_path / "2")


@pytest.mark.parametrize("split", ["val", "train"])
def test_foreign_label_values_are_refused(tmp_path, fake, capsys, split):
    shutil.copytree(fake / "prepared", tmp_path / "data")
    for case in loaders.open_prepared(tmp_path / "data").cases(split):
        label = np.load(tmp_path / "data/cases" / case / "label.npy")
        label[0, 0, 0] = 7
        np.save(tmp_path / "data/cases" / case / "label.npy", label)
    argv = [
        "train",
        *FAST,
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "2",
    ]
    argv += ["--workers", "2"]  # values of training cases are met by the processes that load them
    assert "label.npy holds the value 7 in 1 voxels" in CLI.refused(capsys, *argv)


# --- stopping and continuing -----------------------------------------------------------------------------------------


def stop_and_continue(
    tmp_path: Path, signals: list[signal.Signals], processes: int = 1, workers: str = "0"
) -> None:
    argv = [
        "train",
        *FAST,
        "--workers",
        workers,
        "--steps",
        "24",
        "--save-every",
        "1",
        "--eval-every",
        "10",
    ]
    argv.remove("--quiet")
    done = run(*argv, "--out", str(tmp_path / "whole"), processes=processes)
    assert done.returncode == 0, done.stderr
    CLI.stop_and_continue(
        *argv, out=tmp_path / "cut", signals=signals, processes=processes, group=processes == 1
    )
    assert_same(tmp_path / "whole", tmp_path / "cut")
    logs = [(tmp_path / f"{name}/log.csv").read_text().splitlines() for name in ("whole", "cut")]
    validated = [[line.split(",")[0] for line in log[1:] if not line.endswith(",")] for log in logs]
    assert validated[0] == validated[1] == ["10", "20", "24"]  # none lost, none twice
    best = [
        runtime.load_checkpoint(tmp_path / name / "best.pt", "patchddm")["step"]
        for name in ("whole", "cut")
    ]
    assert best[0] == best[1]


def test_run_that_each_signal_stopped_continues_to_the_same_weights(tmp_path):
    stop_and_continue(tmp_path, [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])


def test_stopped_run_with_loading_processes_continues_to_the_same_weights(tmp_path):
    stop_and_continue(tmp_path, [signal.SIGTERM], workers="2")


def test_a_killed_loading_process_is_one_line_and_ends_the_run(tmp_path):
    argv = [
        "train",
        *FAST,
        "--workers",
        "2",
        "--steps",
        "100000",
        "--save-every",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        CLI.words(*argv),
        cwd=ROOT,
        env=CLI.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    children, begin = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.time()
    while not (tmp_path / "run/last.pt").exists() and time.time() - begin < 60:
        time.sleep(0.05)
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list the children of a process")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert (
        error.startswith("patchddm: a process that loads data has ended") and "--workers" in error
    )


def test_stopped_run_of_two_processes_continues_to_the_same_weights(tmp_path):
    stop_and_continue(tmp_path, [signal.SIGTERM], processes=2)


def test_two_processes_train_as_one(tmp_path):
    argv = ["train", *FAST, "--steps", "3", "--batch", "4"]
    assert run(*argv, "--out", str(tmp_path / "one")).returncode == 0
    two = run(*argv, "--out", str(tmp_path / "two"), "--accumulate", "2", processes=2)
    assert two.returncode == 0, two.stderr
    assert "2 processes x 2 parts x 1" in two.stdout and two.stdout.count("PatchDDM (Bieder") == 1
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    for k in left:
        torch.testing.assert_close(left[k], right[k], atol=2e-5, rtol=1e-3)


def test_two_processes_raise_the_papers_batch_of_one_aloud(tmp_path):
    argv = [
        "train",
        "--preset",
        "paper",
        *FAST,
        "--workers",
        "0",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    at = argv.index("--batch")
    done = run(*argv[:at], *argv[at + 2 :], processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch of 1 becomes 2") == 1
    assert runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")["config"]["batch"] == 2


def test_two_processes_evaluate_as_one(tmp_path, fake, trained):
    argv = [
        "evaluate",
        "--checkpoint",
        str(trained / "best.pt"),
        "--data",
        str(fake / "prepared"),
        "--split",
        "train",
    ]
    argv += ["--limit", "3", "--ensemble", "2", "--device", "cpu", "--amp", "off", "--quiet"]
    for n in (1, 2):
        done = run(*argv, "--out", str(tmp_path / str(n)), processes=n)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1/metrics.csv").read_text() == (tmp_path / "2/metrics.csv").read_text()
    assert len((tmp_path / "1/metrics.csv").read_text().splitlines()) == 1 + 3 * 2


def test_error_under_torchrun_is_one_line_and_ends_all_within_a_minute(tmp_path):
    begin = time.time()
    done = run(
        "train",
        *FAST,
        "--out",
        str(tmp_path / "run"),
        "--data",
        str(tmp_path / "none"),
        processes=2,
    )
    assert done.returncode != 0 and time.time() - begin < 60
    assert (
        done.stderr.count("patchddm: ") == 1 and "does not exist; prepare it first" in done.stderr
    )


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_starts_from_our_and_from_public_weights(tmp_path, trained, fake):
    state = runtime.load_checkpoint(trained / "best.pt", "patchddm")
    torch.save(state["ema"], tmp_path / "public.pt")  # the public form: a bare state dict
    for name, file in (("ours", trained / "best.pt"), ("public", tmp_path / "public.pt")):
        argv = [
            "train",
            "--data",
            str(fake / "prepared"),
            "--preset",
            "tiny",
            *FAST,
            "--steps",
            "1",
            "--lr",
            "1e-12",
        ]
        assert (
            patchddm.main(
                [*argv, "--out", str(tmp_path / name), "--init", str(file), "--weight-decay", "0"]
            )
            == 0
        )
        got = runtime.load_checkpoint(tmp_path / name / "last.pt", "patchddm")["model"]
        for k, v in state["ema"].items():
            torch.testing.assert_close(got[k], v, atol=1e-6, rtol=0)


def test_init_that_does_not_fit_names_tensor_and_flags(tmp_path, trained):
    argv = [
        "train",
        *FAST,
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--init",
        str(trained / "best.pt"),
    ]
    done = run(*argv, "--coords", "off")
    assert done.returncode == 2
    assert (
        "input_blocks.0.0.weight is (4, 7, 3, 3, 3) in the checkpoint and (4, 4, 3, 3, 3)"
        in done.stderr
    )
    assert "--coords" in done.stderr and done.stderr.count("\n") == 1


# --- evaluate and predict --------------------------------------------------------------------------------------------


def test_evaluate_scores_the_masks_that_it_writes(tmp_path, fake, trained):
    argv = ["evaluate", "--checkpoint", str(trained / "best.pt"), "--data", str(fake / "prepared")]
    assert (
        patchddm.main(
            [*argv, "--out", str(tmp_path / "e"), "--save-members", "--ensemble", "2", "--quiet"]
        )
        == 0
    )
    data = loaders.open_prepared(fake / "prepared")
    case = data.cases("test")[0]
    mask = nib.load(tmp_path / f"e/predictions/{case}.nii.gz")
    assert mask.shape == data.shape(case)
    np.testing.assert_allclose(mask.affine, data.affine(case), atol=1e-5)
    row = (tmp_path / "e/metrics.csv").read_text().splitlines()[1].split(",")
    value = next(iter(data.classes.values()))
    pred, true = np.asarray(mask.dataobj) == value, np.asarray(data.label(case)) == value
    total = pred.sum() + true.sum()
    assert row[0] == case and float(row[2]) == pytest.approx(
        2 * (pred & true).sum() / total, abs=1e-5
    )
    assert (tmp_path / f"e/predictions/members/{case}_1.nii.gz").exists()


def test_evaluate_of_another_runs_checkpoint_writes_beside_it(tmp_path, fake, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "copy")
    argv = [
        "evaluate",
        "--checkpoint",
        "copy/best.pt",
        "--data",
        str(fake / "prepared"),
        "--limit",
        "1",
        "--quiet",
    ]
    assert patchddm.main(argv) == 0
    assert (tmp_path / "copy/test-1/metrics.csv").exists() and [
        p.name for p in tmp_path.iterdir()
    ] == ["copy"]


def test_scores_are_made_again_and_those_of_other_cases_stand_apart(tmp_path, fake, trained):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(fake / "prepared", tmp_path / "other")
    argv = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--quiet"]  # a folder: its best.pt
    mine = [*argv, "--data", str(fake / "prepared")]
    assert (
        patchddm.main(mine) == 0 and patchddm.main(mine) == 0
    )  # the second time over its own masks
    before = (tmp_path / "run/metrics.csv").read_bytes()
    assert patchddm.main([*mine, "--split", "val"]) == 0
    assert patchddm.main([*argv, "--data", str(tmp_path / "other"), "--limit", "1"]) == 0
    assert (tmp_path / "run/metrics.csv").read_bytes() == before
    folders = {p.parent.name for p in (tmp_path / "run").glob("*/metrics.csv")}
    assert folders == {"val", "other-test-1"}


def test_bare_run_asks_for_test_cases_before_it_trains(tmp_path, fake):
    shutil.copytree(fake / "prepared", tmp_path / "data")
    meta = json.loads((tmp_path / "data/dataset.json").read_text())
    meta["splits"] |= {"test": []}
    (tmp_path / "data/dataset.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="no labelled case in its split test"):
        patchddm.main(
            [
                "--data",
                str(tmp_path / "data"),
                "--preset",
                "tiny",
                *FAST,
                "--out",
                str(tmp_path / "run"),
            ]
        )
    assert not (tmp_path / "run").exists()


def test_validation_case_without_label_is_left_out(tmp_path, fake):
    shutil.copytree(fake / "prepared", tmp_path / "data")
    meta = json.loads((tmp_path / "data/dataset.json").read_text())
    case = meta["splits"]["val"][0]
    meta["cases"][case] |= {"labelled": False}
    (tmp_path / "data/dataset.json").write_text(json.dumps(meta))
    (tmp_path / "data/cases" / case / "label.npy").unlink()
    argv = [
        "train",
        "--data",
        str(tmp_path / "data"),
        "--preset",
        "tiny",
        *FAST,
        "--out",
        str(tmp_path / "run"),
    ]
    assert patchddm.main([*argv, "--steps", "1", "--eval-every", "1"]) == 0
    assert (tmp_path / "run/last.pt").exists()


def test_evaluate_refuses_flags_that_belong_to_training(tmp_path, trained):
    done = run(
        "evaluate",
        "--checkpoint",
        str(trained / "best.pt"),
        "--num-channels",
        "8",
        "--out",
        str(tmp_path / "e"),
    )
    assert done.returncode == 2 and "trained with --num-channels 4" in done.stderr


def test_predict_returns_masks_in_the_geometry_of_the_input(tmp_path, fake, trained):
    raw = sorted(p for p in (fake / "src/imagesTr").iterdir() if not p.name.startswith("."))
    only_checkpoint = tmp_path / "moved.pt"
    shutil.copy(trained / "best.pt", only_checkpoint)
    argv = [
        "predict",
        "--checkpoint",
        str(only_checkpoint),
        "--save-maps",
        "--save-members",
        "--quiet",
    ]
    assert (
        patchddm.main(
            [*argv, "--image", str(fake / "src/imagesTr"), "--output", str(tmp_path / "out")]
        )
        == 0
    )
    orientations = set()
    for path in raw:
        image, mask = nib.load(path), nib.load(tmp_path / "out" / path.name)
        assert mask.shape == image.shape[:3] and mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert mask.header["qform_code"] == image.header["qform_code"]
        assert mask.header["sform_code"] == image.header["sform_code"]
        stem = path.name.removesuffix(".nii.gz")
        assert nib.load(tmp_path / f"out/maps/{stem}_variance.nii.gz").shape == mask.shape
        assert (tmp_path / f"out/members/{stem}_0.nii.gz").exists()
        orientations.add(nib.aff2axcodes(image.affine))
    assert len(orientations) > 1


def test_predicted_folder_is_scored_as_evaluate_scores(tmp_path, fake, trained):
    argv = [
        "predict",
        "--checkpoint",
        str(trained / "best.pt"),
        "--save-maps",
        "--quiet",
        "--amp",
        "off",
    ]
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir(), labels.mkdir()
    case = loaders.open_prepared(fake / "prepared").cases("test")[0]
    shutil.copy(
        next(p for p in (fake / "src/imagesTr").iterdir() if p.name.startswith(case)), images
    )
    shutil.copy(
        next(p for p in (fake / "src/labelsTr").iterdir() if p.name.startswith(case)), labels
    )
    assert patchddm.main([*argv, "--image", str(images), "--output", str(tmp_path / "masks")]) == 0
    argv = [
        "--pred",
        str(tmp_path / "masks"),
        "--true",
        str(labels),
        "--out",
        str(tmp_path / "scores"),
    ]
    assert metrics.main(["score", *argv]) == 0
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
        patchddm.main(
            ["evaluate", *common, "--data", str(fake / "prepared"), "--out", str(tmp_path / "e")]
        )
        == 0
    )
    scored = [r["dice"] for r in metrics.read_metrics_csv(tmp_path / "scores/metrics.csv")]
    evaluated = [
        r["dice"] for r in metrics.read_metrics_csv(tmp_path / "e/metrics.csv") if r["case"] == case
    ]
    assert scored == pytest.approx(evaluated, abs=1e-9) and len(scored) == 2


def test_predict_agrees_with_evaluate(tmp_path, fake, trained):
    """The same case through predict (raw file) and through evaluate (prepared arrays) gives the same mask."""
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
        patchddm.main(
            ["evaluate", *common, "--data", str(fake / "prepared"), "--out", str(tmp_path / "e")]
        )
        == 0
    )
    source = next(p for p in (fake / "src/imagesTr").iterdir() if p.name.startswith(case))
    assert (
        patchddm.main(
            ["predict", *common, "--image", str(source), "--output", str(tmp_path / "p.nii.gz")]
        )
        == 0
    )
    ras = nib.as_closest_canonical(nib.load(tmp_path / "p.nii.gz"))
    mine = np.asarray(nib.load(tmp_path / f"e/predictions/{case}.nii.gz").dataobj)
    published = np.vectorize(lambda v: int(data.meta["label_values"][str(v)]))(mine)
    np.testing.assert_array_equal(np.asarray(ras.dataobj), published)
    assert len(np.unique(published)) > 1


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda i, o: (i, i), "input"),
        (lambda i, o: (i.parent, o / "one.nii.gz"), "is one file"),
        (lambda i, o: (o / "none.nii.gz", o / "out.nii.gz"), "none.nii.gz"),
    ],
)
def test_predict_refuses_bad_paths(tmp_path, fake, trained, change, words):
    source = sorted(p for p in (fake / "src/imagesTr").iterdir() if not p.name.startswith("."))[0]
    before = source.read_bytes()
    image, output = change(source, tmp_path)
    argv = [
        "predict",
        "--checkpoint",
        str(trained / "best.pt"),
        "--image",
        str(image),
        "--output",
        str(output),
    ]
    done = run(*argv)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert source.read_bytes() == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["truncated", "html", "2d", "nan"])
def test_predict_refuses_damaged_images_in_one_line(tmp_path, fake, trained, kind):
    source = sorted(p for p in (fake / "src/imagesTr").iterdir() if not p.name.startswith("."))[0]
    bad = tmp_path / "bad.nii.gz"
    if kind == "truncated":
        bad.write_bytes(source.read_bytes()[:-100])
    elif kind == "html":
        bad.write_text("<!DOCTYPE html><html>sign in</html>")
    elif kind == "2d":
        nib.save(nib.Nifti1Image(np.zeros((16, 16), np.float32), np.eye(4)), bad)
    else:
        nib.save(nib.Nifti1Image(np.full((16, 16, 16), np.nan, np.float32), np.eye(4)), bad)
    argv = ["--image", str(bad), "--output", str(tmp_path / "out.nii.gz")]
    done = run("predict", "--checkpoint", str(trained / "best.pt"), *argv)
    assert done.returncode == 2 and "bad.nii.gz" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.nii.gz").exists()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--data", "nowhere"], "python -m data_prep.msd"),
        (["--learning-rate", "1"], "unknown flag --learning-rate"),
        (["--device", "cuda:x"], "--device is cuda:x"),
        (["--out", "README.md"], "README.md"),
        (["--batch", "0"], "--batch is 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--patch", "30"], "cannot be halved 2 times"),
        (["--batch", "3", "--accumulate", "2"], "use a multiple of 2"),
        (["--init", "missing.pt"], "missing.pt does not exist"),
        (
            ["train", "--checkpoint", "x.pt"],
            "--checkpoint is for evaluate, predict, sample, grid; train ignores it",
        ),
        (["--image", "x.nii.gz"], "--image is for predict; the bare run ignores it"),
        (
            ["predict", "--split", "val"],
            "--split is for the bare run, evaluate, grid; predict ignores it",
        ),
        (["evaluate", "--out", "nowhere"], "does not exist; train first"),
    ],
)
def test_bad_flags_are_one_line_and_2(tmp_path, argv, words):
    out = [] if "--out" in argv else ["--out", str(tmp_path / "run")]
    done = run(*argv, *out)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert (
        done.stderr.startswith("patchddm: ")
        and done.stderr.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_empty_data_folder_prints_the_command(tmp_path):
    done = run("--data", str(tmp_path), "--out", str(tmp_path / "run"))
    assert (
        done.returncode == 2
        and "is empty" in done.stderr
        and "python -m data_prep.msd --src" in done.stderr
    )


def test_volume_smaller_than_a_patch_is_padded_and_said_once(tmp_path, fake, capsys):
    argv = [
        "train",
        "--data",
        str(fake / "prepared"),
        "--preset",
        "tiny",
        *FAST,
        "--patch",
        "64",
        "--batch",
        "1",
    ]
    assert patchddm.main([*argv, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("smaller than the patch") == 1


def test_disk_full_while_saving_keeps_the_old_checkpoint(tmp_path):
    argv = ["train", *FAST, "--out", str(tmp_path / "run"), "--save-every", "1"]
    assert patchddm.main([*argv, "--steps", "2"]) == 0
    CLI.refuses_full_disk(*argv, "--steps", "5", out=tmp_path / "run")
    assert runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")["step"] == 2
    assert patchddm.main([*argv, "--steps", "3"]) == 0


@pytest.mark.slow
def test_bare_run_reaches_its_dice_in_five_minutes(tmp_path):
    begin = time.time()
    command = [sys.executable, "patchddm.py", "--quiet", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and time.time() - begin < 300, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    best = [
        float(v)
        for v in re.findall(r"(0\.\d+) / 0\.\d+", done.stdout.split("threshold / interval")[1])
    ]
    assert summary["mean"]["dice"]["mean"] >= 0.75 and max(best) < 0.4 and len(best) == 2
