"""patchddm.py as a user runs it: train, stop, continue, evaluate, predict, two processes, bad input."""

import json
import os
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
from conftest import ROOT, CommandLine, table

import patchddm
from common import loaders, runtime, tables

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
FAST = [*NET, "--quiet", "--amp", "off", "--device", "cpu"]
USE = ["--sampling-steps", "2", "--quiet", "--amp", "off"]
CLI = CommandLine("patchddm", patchddm.main)


def train(data: Path, out: Path, *argv: str) -> list[str]:
    words = ["train", "--data", str(data), "--preset", "tiny", "--out", str(out), *FAST, *argv]
    return words


@pytest.fixture(scope="session")
def trained(fake, tmp_path_factory) -> Path:
    """A run folder with two steps of training on the fake data."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert patchddm.main(train(fake / "prepared", out, "--steps", "2")) == 0
    return out


@pytest.fixture
def data(fake) -> Path:
    return fake / "prepared"


# --- the whole story ------------------------------------------------------------------------------


def test_default_run_trains_scores_draws_and_is_not_repeated(tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*FAST, "--out", str(out), "--steps", "3", "--limit", "1", "--sampling-steps", "2"]
    argv += ["--ensemble", "2", "--save", "all"]
    assert patchddm.main(argv) == 0
    text = capsys.readouterr().out
    assert "PatchDDM (Bieder et al. 2023)" in text and "target x0 (eps)" in text
    assert "ensemble of 1" in text and "ensemble of 2" in text and "threshold" in text
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"config.json", "log.csv", "last.pt", "best.pt", "loss.png"} <= names
    assert {"test-1/metrics.csv", "test-1/summary.json", "test-1/metrics_ensemble1.csv"} <= names
    shown = "test-1/figures/phantom_0068"
    assert {f"{shown}.png", f"{shown}_steps.png", f"{shown}_ensemble.png"} <= names
    masks = "test-1/predictions"
    assert {f"{masks}/phantom_0068.nii.gz", f"{masks}/maps/phantom_0068_variance.nii.gz"} <= names
    assert f"{masks}/members/phantom_0068_1.nii.gz" in names
    assert not [n for n in names if n.endswith(".tmp")]

    again = [*FAST, "--out", str(out), "--steps", "3", "--limit", "1"]
    assert patchddm.main(again) == 0
    text = capsys.readouterr().out
    assert "has made all of its 3 steps" in text and "nothing is sampled again" in text


def test_other_settings_are_refused_and_overwrite_starts_again(tmp_path, data):
    argv = train(data, tmp_path / "run", "--steps", "1")
    assert patchddm.main(argv) == 0
    refused = CLI.run(*argv, "--lr", "0.5")
    assert refused.returncode == 2 and "--lr was 0.002, is 0.5" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert patchddm.main([*argv, "--lr", "0.5", "--overwrite"]) == 0
    assert CLI.state_of(tmp_path / "run")["config"]["lr"] == 0.5


def test_more_steps_continue_and_say_what_the_learning_rate_does(tmp_path, data, capsys):
    argv = train(data, tmp_path / "run", "--steps")
    assert patchddm.main([*argv, "1"]) == 0
    assert patchddm.main([*argv, "2"]) == 0
    assert "--steps was 1 and is 2" in capsys.readouterr().out
    assert CLI.step_of(tmp_path / "run") == 2
    refused = CLI.run(*argv, "1")
    assert refused.returncode == 2 and "has made 2 steps, more than --steps 1" in refused.stderr


def test_overwrite_deletes_nothing_before_its_input_is_read(tmp_path, data):
    out = tmp_path / "run"
    argv = train(data, out, "--steps", "1")
    assert patchddm.main(argv) == 0
    refused = CLI.run(*argv, "--overwrite", "--init", str(tmp_path / "missing.pt"))
    assert refused.returncode == 2 and (out / "last.pt").exists()
    assert patchddm.main([*argv, "--overwrite", "--init", str(out / "last.pt")]) == 0


def test_overwrite_leaves_a_folder_that_is_no_run(tmp_path, data):
    (tmp_path / "thesis.txt").write_text("years")
    refused = CLI.run(*train(data, tmp_path, "--steps", "1", "--overwrite"))
    assert refused.returncode == 2 and "no run" in refused.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_continuing_with_another_dtype_works(tmp_path, data):
    argv = train(data, tmp_path / "run")
    for step, amp in enumerate(("off", "fp16", "bf16"), 1):
        assert patchddm.main([*argv, "--steps", str(step), "--amp", amp]) == 0
    assert CLI.step_of(tmp_path / "run") == 3


def test_moved_splits_and_other_data_are_refused_by_name(tmp_path, data):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    argv = train(copy, tmp_path / "run", "--steps")
    assert patchddm.main([*argv, "1"]) == 0
    file = copy / "dataset.json"
    meta = json.loads(file.read_text())
    splits = meta["splits"]
    splits["train"], splits["test"] = splits["train"][1:], splits["test"] + splits["train"][:1]
    file.write_text(json.dumps(meta))
    refused = CLI.run(*argv, "2")
    assert refused.returncode == 2 and "data with other cases" in refused.stderr
    words = ["evaluate", "--data", str(copy), "--checkpoint", str(tmp_path / "run"), *USE]
    refused = CLI.run(*words)
    assert refused.returncode == 2 and "training or validation" in refused.stderr
    done = CLI.run(*words, "--split", "train")
    assert done.returncode == 0 and "(seen in training)" in done.stdout, done.stderr


def test_accumulation_changes_memory_not_the_result(tmp_path, data):
    for k in ("1", "2"):
        assert patchddm.main(train(data, tmp_path / k, "--steps", "2", "--accumulate", k)) == 0
    left, right = CLI.weights(tmp_path / "1"), CLI.weights(tmp_path / "2")
    for k in left:
        torch.testing.assert_close(left[k], right[k], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["full", "half"])
def test_baselines_train_and_score_at_full_size(tmp_path, method, data):
    argv = [w for w in train(data, tmp_path / "r", "--method", method, "--steps", "1")[1:]]
    assert patchddm.main([*argv, "--save", "maps", "--sampling-steps", "2", "--limit", "1"]) == 0
    prepared = loaders.open_data(str(data))
    case = prepared.cases("test")[0]
    for name in (f"{case}.nii.gz", f"maps/{case}_variance.nii.gz"):
        shape = nib.load(tmp_path / "r/test-1/predictions" / name).shape
        assert shape == prepared.shape(case)


def test_minutes_end_a_run_early_and_it_stays_ended(tmp_path, data):
    argv = train(data, tmp_path / "a", "--steps", "9999", "--minutes", "0.02")
    assert patchddm.main(argv) == 0
    state = CLI.state_of(tmp_path / "a")
    assert 1 <= state["step"] < 9999 and state["seconds"] >= 1.2
    assert patchddm.main(argv) == 0
    assert CLI.step_of(tmp_path / "a") == state["step"]


def test_checkpoint_says_who_made_it_and_what_it_has_seen(trained, data):
    state = CLI.state_of(trained, "best.pt")
    assert {"command", "version", "torch", "device", "date"} <= set(state["made_by"])
    prepared = loaders.open_data(str(data))
    for split in ("train", "val"):
        assert state["data"]["cases"][split] == prepared.cases(split)
    assert state["optimizer"] == {} and set(state["data"]["spacings_mm"]) == {
        "min",
        "median",
        "max",
    }
    assert "made_by" in json.loads((trained / "config.json").read_text())


# --- faults in training ---------------------------------------------------------------------------


def spoil(monkeypatch, bad: range) -> None:
    """The loss of these calls is not finite."""
    loss, calls = patchddm.diffusion_loss, []

    def spoiled(*argv):
        calls.append(1)
        return loss(*argv) * (float("nan") if len(calls) - 1 in bad else 1)

    monkeypatch.setattr(patchddm, "diffusion_loss", spoiled)


def test_step_without_a_finite_gradient_changes_nothing(tmp_path, monkeypatch, data):
    assert patchddm.main(train(data, tmp_path / "a", "--steps", "1")) == 0
    before = CLI.weights(tmp_path / "a")
    spoil(monkeypatch, range(0, 1))
    assert patchddm.main(train(data, tmp_path / "a", "--steps", "2")) == 0
    after = CLI.weights(tmp_path / "a")
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    assert table(tmp_path / "a/log.csv")[-2]["skipped"] == "1"


def test_twenty_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch, capsys, data):
    spoil(monkeypatch, range(3, 99))
    line = CLI.refused(capsys, *train(data, tmp_path / "a", "--steps", "60"))
    assert "no finite gradient in 20 steps before step 23" in line


def test_workers_do_not_change_the_result(tmp_path, data):
    for k in ("0", "2"):
        assert patchddm.main(train(data, tmp_path / k, "--steps", "3", "--workers", k)) == 0
    CLI.assert_same(tmp_path / "0", tmp_path / "2")


def test_foreign_label_values_are_refused(tmp_path, data, capsys):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    case = loaders.open_data(str(copy)).cases("val")[0]
    label = np.load(copy / f"cases/{case}/label.npy")
    label[0, 0, 0] = 99
    np.save(copy / f"cases/{case}/label.npy", label)
    line = CLI.refused(capsys, *train(copy, tmp_path / "a", "--steps", "1"))
    assert case in line and "99" in line


@pytest.fixture(scope="session")
def whole(fake, tmp_path_factory) -> Path:
    """Twelve steps without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    argv = train(fake / "prepared", out, "--steps", "12", "--eval-every", "4", "--save-every", "1")
    assert CLI.run(*argv).returncode == 0
    return out


@pytest.mark.parametrize("processes, workers", [(1, "0"), (1, "2"), (2, "0")])
def test_stopped_run_continues_to_the_same_weights(tmp_path, data, whole, processes, workers):
    argv = train(data, tmp_path / "a", "--steps", "12", "--eval-every", "4", "--save-every", "1")
    argv += ["--workers", workers]
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
    if processes == 2:
        signals = [signal.SIGTERM]
    CLI.stop_and_continue(*argv, out=tmp_path / "a", signals=signals, processes=processes)
    if processes == 1:
        CLI.assert_same(tmp_path / "a", whole)
    left, right = CLI.weights(tmp_path / "a"), CLI.weights(whole)
    for k in left:  # two processes add gradients in another order
        torch.testing.assert_close(left[k], right[k], atol=1e-3, rtol=1e-2)
    steps = [row["step"] for row in table(tmp_path / "a/log.csv") if row["loss"]]
    assert steps[-1] == "12" and len(set(steps)) == len(steps)  # besides, a row for each stop


def test_full_disk_leaves_the_old_checkpoint(tmp_path, data):
    out = tmp_path / "a"
    assert patchddm.main(train(data, out, "--steps", "1")) == 0
    CLI.refuses_full_disk(*train(data, out, "--steps", "3", "--save-every", "1"), out=out)
    assert CLI.step_of(out) == 1


def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, data, capsys):
    out = tmp_path / "a"
    assert patchddm.main(train(data, out, "--steps", "2", "--save-every", "1")) == 0
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-100])
    assert patchddm.main(train(data, out, "--steps", "3")) == 0
    assert "continuing from" in capsys.readouterr().out
    assert CLI.step_of(out) == 3


def test_second_training_to_a_folder_is_refused(tmp_path, data):
    out = tmp_path / "a"
    argv = train(data, out, "--steps", "100000", "--save-every", "1")
    first = subprocess.Popen(CLI.words(*argv), cwd=ROOT, env=CLI.environment)
    try:
        begin = time.time()
        while not (out / "last.pt").exists() and time.time() - begin < 60:
            time.sleep(0.05)
        second = CLI.run(*argv)
        assert second.returncode == 2 and "another run is writing" in second.stderr
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130


def test_error_under_torchrun_is_one_line_and_ends_all(tmp_path, data):
    begin = time.time()
    argv = train(data, tmp_path / "a", "--steps", "1", "--device", "cuda:0")
    done = CLI.run(*argv, processes=2)
    assert done.returncode != 0 and time.time() - begin < 60
    assert done.stderr.count("patchddm: --device cuda:0 names one GPU for 2 processes") == 1


def test_two_processes_evaluate_as_one(tmp_path, data, trained):
    for k in (1, 2):
        argv = ["evaluate", "--data", str(data), "--checkpoint", str(trained), *USE]
        done = CLI.run(*argv, "--out", str(tmp_path / str(k)), processes=k)
        assert done.returncode == 0, done.stderr
    one, two = (table(tmp_path / k / "metrics.csv") for k in ("1", "2"))
    assert one == two and len(one) == 2


def test_two_processes_raise_the_batch_of_a_preset_aloud(tmp_path, data):
    argv = [w for w in train(data, tmp_path / "a", "--steps", "1")]
    at = argv.index("--batch")
    del argv[at : at + 2]
    done = CLI.run(*argv, "--accumulate", "3", processes=2)
    assert done.returncode == 0 and "raised from 4 to 6" in done.stdout, done.stderr


# --- weights of others ----------------------------------------------------------------------------


def test_public_weights_are_evaluated_without_training_and_groups_are_asked_for(
    tmp_path, trained, data
):
    weights = CLI.state_of(trained)["ema"]
    torch.save({f"module.{k}": v for k, v in weights.items()}, tmp_path / "public.pt")
    argv = ["evaluate", "--data", str(data), "--init", str(tmp_path / "public.pt"), *USE]
    argv += ["--out", str(tmp_path / "a"), "--preset", "tiny"]
    asked = CLI.run(*argv)
    assert asked.returncode == 2 and "add --num-groups" in asked.stderr
    argv += ["--num-groups", "2"]
    assert patchddm.main([*argv, "--sampling-steps", "1", "--save", "masks"]) == 0
    assert json.loads((tmp_path / "a/summary.json").read_text())["mean"]["dice"]["n"] == 1


def test_init_that_does_not_fit_names_the_tensor(tmp_path, trained, data, capsys):
    argv = train(data, tmp_path / "a", "--steps", "1", "--init", str(trained / "last.pt"))
    line = CLI.refused(capsys, *argv, "--coords", "off")
    assert "input_blocks.0.0.weight" in line


# --- evaluate and predict -------------------------------------------------------------------------


def test_evaluate_writes_publishers_values_and_scores_what_it_writes(tmp_path, data, trained):
    argv = ["evaluate", "--data", str(data), "--checkpoint", str(trained / "last.pt"), *USE]
    assert patchddm.main([*argv, "--out", str(tmp_path / "a")]) == 0
    prepared = loaders.open_data(str(data))
    values = {int(k): v for k, v in prepared.meta["label_values"].items()}
    rows = {(r["case"], r["class"]): r for r in table(tmp_path / "a/metrics.csv")}
    for case in prepared.cases("test"):
        mask = np.asarray(nib.load(tmp_path / f"a/predictions/{case}.nii.gz").dataobj)
        assert set(np.unique(mask)) <= set(values.values())
        for name, value in prepared.classes.items():
            ml = (mask == values[value]).sum() * np.prod(prepared.spacing(case)) / 1000
            assert float(rows[case, name]["volume_pred_ml"]) == pytest.approx(ml)


def test_scores_of_other_cases_stand_apart(tmp_path, data, trained):
    argv = ["evaluate", "--data", str(data), "--checkpoint", str(trained), *USE]
    argv += ["--out", str(tmp_path / "s")]
    for more in ([], ["--limit", "1"], ["--split", "val"]):
        assert patchddm.main([*argv, *more]) == 0
    found = {str(f.parent.relative_to(tmp_path / "s")) for f in tmp_path.rglob("summary.json")}
    assert found == {".", "test-1", "val"}
    assert tables.read_summary(tmp_path / "s/summary.json")["images"] == 1


def raw_scan(fake: Path) -> Path:
    return sorted((fake / "src").rglob("imagesT*/[a-z]*.nii.gz"))[0]


def test_predict_keeps_grid_and_leaves_existing_masks(tmp_path, fake, trained, capsys):
    scan = raw_scan(fake)
    out = tmp_path / "mask.nii.gz"
    argv = ["predict", "--checkpoint", str(trained), "--image", str(scan), "--output", str(out)]
    assert patchddm.main([*argv, *USE]) == 0
    assert " ml" in capsys.readouterr().out
    mask, image = nib.load(out), nib.load(scan)
    assert mask.shape == image.shape[:3]
    np.testing.assert_allclose(mask.affine, image.affine)
    before = out.read_bytes()
    line = CLI.refused(capsys, *argv, *USE)
    assert "mask.nii.gz" in line and out.read_bytes() == before
    assert patchddm.main([*argv, *USE, "--overwrite"]) == 0


def test_predict_of_a_folder_goes_on_after_a_damaged_file(tmp_path, fake, trained, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        shutil.copy(raw_scan(fake), folder / f"case{n}.nii.gz")
    (folder / "case1.nii.gz").write_bytes((folder / "case1.nii.gz").read_bytes()[:300])
    argv = ["predict", "--checkpoint", str(trained), "--image", str(folder), *USE]
    line = CLI.refused(capsys, *argv, "--output", str(tmp_path / "out"))
    assert "case1" in line
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["case0.nii.gz", "case2.nii.gz"]


def test_predict_from_python_equals_predict_of_the_file(tmp_path, fake, trained):
    """But for the noise, which is drawn by the name of a case."""
    network = patchddm.load(str(trained), "cpu")
    file = nib.as_closest_canonical(nib.load(raw_scan(fake)))
    mask = network.predict_array(np.asarray(file.dataobj), file.header.get_zooms()[:3])
    assert mask.shape == file.shape
    assert set(np.unique(mask)) <= set(network.record["label_values"].values())


def test_too_large_for_the_device_is_one_line(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 1e-4)
    line = CLI.refused(capsys, *train(data, tmp_path / "a", "--steps", "1"))
    assert "needs about" in line and "--accumulate" in line


def test_run_without_a_terminal_and_with_closed_stdout_ends_well(tmp_path, data):
    argv = CLI.words(*train(data, tmp_path / "a", "--steps", "1"))
    code = f"import os, sys; os.close(1); os.execv(sys.executable, {argv!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=CLI.environment)
    assert done.returncode == 0 and (tmp_path / "a/last.pt").exists()
    assert os.path.getsize(tmp_path / "a/loss.png") > 1000
