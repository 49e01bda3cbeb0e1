"""The golden test: what the four scripts compute today, pinned through their command lines alone.

Each script trains for a few steps on synthetic data, scores a case or two and predicts one image
that is drawn here, once in fp32 and once with the default --amp. golden.json holds the losses of
log.csv, SHA-256 of the weights of last.pt, the mean Dice of summary.json and SHA-256 of the
predicted mask. Bits depend on the processor and on torch, so these values are kept by machine. On a
machine that golden.json does not know, losses and Dice are compared with the room of the LOOSE
constants, hashes are not, and a warning says so.

A change of results that is meant is declared by `python tests/test_golden.py --write SCRIPT`;
without SCRIPT, all four.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden.json")


def training(steps: int) -> str:
    """Flags of a training that looks at validation cases and saves at its end only."""
    ends = f"--steps {steps} --eval-every {steps} --save-every {steps}"
    return f"--data synthetic --preset tiny --seed 0 --workers 0 {ends}"


# Today's verbs, in order. OUT, IMAGE and MASK are filled in; a word with * becomes the one path
# that it matches. Twelve steps: the log has rows of step 10 and of the last. Few steps of
# fine-tuning find no organ, 60 find some.
COMMANDS: dict[str, tuple[str, ...]] = {
    "patchddm": (
        f"train {training(12)}",
        "evaluate --limit 1 --sampling-steps 3 --ensemble 2",
        "predict --sampling-steps 3 --ensemble 2 --image IMAGE --output MASK",
    ),
    "diffseg3d_recycle": (
        f"train {training(12)}",
        "evaluate --limit 1",
        "predict --ensemble 2 --image IMAGE --output MASK",
    ),
    "masked_diffusion": (
        f"pretrain {training(12)}",
        "segment --limit 1",
        "evaluate --limit 2",
        "predict --image IMAGE --output MASK",
    ),
    "ddpm_pretrain_finetune": (
        f"pretrain {training(12)}",
        f"finetune {training(60)} --limit 1",
        "evaluate --limit 2 --checkpoint OUT/finetune*/last.pt",
        "predict --image IMAGE --output MASK --checkpoint OUT/finetune*/last.pt",
    ),
}
# How many of these commands run, where not all: 600 steps of classifiers take 15 s, and they are
# fp32 with any --amp.
FIRST = {("masked_diffusion", "off"): 1}
# Verbs that train -> where in OUT the weights are. The log lies beside them, where there is one.
WEIGHTS = {
    "train": "last.pt",
    "pretrain": "last.pt",
    "segment": "segment*/run0/last.pt",
    "finetune": "finetune*/last.pt",
}
# The other two predict volume.nii.gz.
IMAGES = {"masked_diffusion": "tissue.png", "ddpm_pretrain_finetune": "ct.nii.gz"}
AMPS = {"off": "--amp off", "default": ""}

SAME = 1e-6  # relative, of losses and Dice on a machine that golden.json knows
LOOSE = {"off": 1e-3, "default": 2e-2}  # relative, of losses on another machine
# The same for fine-tuning, step 10 and later rows: batch norm over four slices makes other rounding
# grow, to 0.006 after ten steps and 0.15 after 60 (fp32, AVX2 beside AVX512).
LOOSE_FINETUNE = (2e-2, 0.3)
LOOSE_DICE = 0.1  # absolute

# One process imports the script; each command is then a process of its own in the state after the
# import, so that all together import once. The two parts of torch would else be imported by almost
# every command.
RUNNER = """
import gc, glob, importlib, json, os, sys, traceback
import torch._dynamo, torch._refs
main = importlib.import_module(sys.argv[1]).main
gc.freeze()
for argv in json.loads(sys.argv[2]):
    found = [glob.glob(word) if "*" in word else [word] for word in argv]
    if any(len(paths) != 1 for paths in found):
        sys.exit(f"{argv}: a word with * has to match one path, found {found}")
    child = os.fork()
    if not child:
        code = 1
        try:
            code = main([paths[0] for paths in found])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"{argv} ended with {code}")
"""


def machine() -> str:
    """What bits depend on. A virtual machine may hide the processor's name, but not its numbers."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f", family {facts['cpu family']} model {facts.get('model')}"
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {name}"


# --- images, from whole numbers alone, so that they are the same everywhere ----------------------


def grain(*at: np.ndarray) -> np.ndarray:
    """Noise in 0..1."""
    return sum(k * x for k, x in zip((73, 179, 283), at)) ** 2 % 101 / 100


def ball(at: np.ndarray, centre: tuple[int, ...], half: tuple[int, ...]) -> np.ndarray:
    return sum(((x - c) / h) ** 2 for x, c, h in zip(at, centre, half)) < 1


def volume() -> np.ndarray:
    """Tissue with two striped balls, in 0..1."""
    at = x, y, z = np.indices((28, 24, 18))
    image = 35 + 25 * grain(x, y, z)
    for stripe, centre in ((x, (8, 11, 8)), (y, (19, 14, 9))):
        image = np.where(ball(at, centre, (6, 6, 5)), 40 + 10 * (stripe % 4), image)
    image = np.where(ball(at, (14, 12, 9), (14, 12, 40)), image, 6)
    return (np.rint(image) / 100).astype(np.float32)


def ct() -> np.ndarray:
    """A body in HU."""
    at = np.indices((40, 40, 8))
    image = np.full(at.shape[1:], -1000)
    image[ball(at, (20, 20, 4), (17, 13, 99))] = -100
    image[ball(at, (20, 20, 4), (14, 10, 99))] = 0
    for value, centre, half in (
        (58, (27, 21, 5), (6, 6, 4)),
        (50, (12, 16, 5), (3, 4, 4)),
        (420, (20, 12, 4), (2, 2, 9)),
    ):
        image[ball(at, centre, half)] = value
    return (image + np.rint(20 * grain(*at))).astype(np.int16)


def tissue() -> np.ndarray:
    """Pink ground, pale discs with dark rims."""
    at = np.indices((96, 120))
    image = np.stack([np.full(at.shape[1:], value) for value in (210, 150, 185)], axis=2)
    for centre in ((30, 30), (60, 85)):
        image[ball(at, centre, (20, 24))] = (110, 70, 145)
        image[ball(at, centre, (13, 16))] = (235, 225, 235)
    return (image + np.rint(20 * grain(*at))[:, :, None]).astype(np.uint8)


def write_image(file: Path) -> None:
    if file.suffix == ".png":
        Image.fromarray(tissue()).save(file)
        return
    # The first axis runs to the left.
    array, x, y, z = (ct(), -8, 8, 8) if file.name == "ct.nii.gz" else (volume(), -1.2, 1.2, 1.6)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([x, y, z, 1.0])), file)


# --- what is pinned ------------------------------------------------------------------------------

# losses, weights; where the script predicted also dice, mask and foreground (a share, for readers)
Pinned = dict[str, Any]


def run(script: str, folder: Path) -> dict[str, Pinned]:
    """Run the script's commands in both number formats: name in AMPS -> what is pinned."""
    image = folder / IMAGES.get(script, "volume.nii.gz")
    write_image(image)
    mask = "mask.png" if image.suffix == ".png" else "mask.nii.gz"
    commands = {amp: COMMANDS[script][: FIRST.get((script, amp))] for amp in AMPS}
    argvs = []
    for amp, flags in AMPS.items():
        paths = {"OUT": folder / amp, "IMAGE": image, "MASK": folder / amp / mask}
        for command in commands[amp]:
            words = f"{command} {flags} --out OUT --quiet".split()
            argvs.append([with_paths(word, paths) for word in words])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    for name in ("TRIM", "MMAP"):  # a tenth faster
        environment[f"MALLOC_{name}_THRESHOLD_"] = "4000000000"
    words = [sys.executable, "-c", RUNNER, script, json.dumps(argvs)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return {amp: pinned(commands[amp], folder / amp, folder / amp / mask) for amp in AMPS}


def with_paths(word: str, paths: Mapping[str, Path]) -> str:
    return re.sub("|".join(paths), lambda found: str(paths[found[0]]), word)


def pinned(commands: Sequence[str], out: Path, mask: Path) -> Pinned:
    verbs = [command.split()[0] for command in commands]
    losses: dict[str, float] = {}
    weights: dict[str, str] = {}
    for verb in (verb for verb in verbs if verb in WEIGHTS):
        (last,) = out.glob(WEIGHTS[verb])
        for cell, value in losses_of(last.with_name("log.csv")).items():
            losses[f"{verb}, {cell}"] = value
        state = torch.load(last, map_location="cpu", weights_only=True)
        for part in (part for part in ("model", "ema") if state.get(part)):
            weights[f"{verb}, {part}"] = sha256_of(state[part])
    found: Pinned = {"losses": losses, "weights": weights}
    if "evaluate" in verbs:
        files = out.rglob("summary.json")  # other verbs score too: the last to be written counts
        scores = max(files, key=lambda file: file.stat().st_mtime_ns)
        found["dice"] = json.loads(scores.read_text())["mean"]["dice"]["mean"]
    if "predict" in verbs:
        picture = mask.suffix == ".png"
        array = np.asarray(Image.open(mask) if picture else nibabel.load(mask).dataobj)
        assert array.dtype == np.uint8, f"{mask.name} is {array.dtype}"
        found["mask"] = hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()
        found["foreground"] = round(float((array > 0).mean()), 6)
    return found


def losses_of(log: Path) -> dict[str, float]:
    """The logged losses of training and validation."""
    rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
    return {
        f"step {row['step']} {c}": float(row[c])
        for row in rows
        for c in ("loss", "val_loss")
        if row.get(c)
    }


def sha256_of(state: Mapping[str, Any]) -> str:
    """Of names and fp32 bytes of all tensors, in order of names; state: one state dict or several."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                add(f"{name}.{key}" if name else key, value[key])
        else:
            digest.update(name.encode() + value.float().contiguous().numpy().tobytes())

    add("", state)
    return digest.hexdigest()


def differences(found: Pinned, golden: Pinned, amp: str, known: bool) -> list[str]:
    """What differs, a line each. known: the machine is the one of the golden values."""
    lines = []
    for cell in sorted(found["losses"].keys() | golden["losses"].keys()):
        value, expected = found["losses"].get(cell, math.nan), golden["losses"].get(cell, math.nan)
        room = SAME if known else LOOSE[amp]
        if not known and cell.startswith("finetune"):
            room = LOOSE_FINETUNE["step 10 " not in cell]
        if not math.isclose(value, expected, rel_tol=room):
            lines.append(f"{cell} is {value}, expected {expected}, with room of {room:g}")
    value, expected = found.get("dice", -1.0), golden.get("dice", -1.0)  # -1: was not evaluated
    if not math.isclose(value, expected, rel_tol=SAME, abs_tol=0 if known else LOOSE_DICE):
        lines.append(f"mean Dice is {value}, expected {expected}")
    if not known:
        return lines
    for part in sorted(found["weights"].keys() | golden["weights"].keys()):
        if found["weights"].get(part) != golden["weights"].get(part):
            lines.append(f"weights ({part}) are others")
    if found.get("mask") != golden.get("mask"):
        now, was = found.get("foreground"), golden.get("foreground")
        lines.append(f"the mask is another; foreground {now}, was {was}")
    return lines


@pytest.mark.parametrize("script", COMMANDS)
def test_results_are_those_of_golden_json(script: str, tmp_path: Path):
    declare = f"a change that is meant is declared by python tests/test_golden.py --write {script}"
    golden, here = json.loads(GOLDEN.read_text()).get(script), machine()
    assert golden, f"golden.json has nothing of {script}; {declare}"
    known = here in golden
    there = here if known else next(iter(golden))
    if not known:
        text = f"{script}: golden.json knows {there}, not {here}; "
        text += "losses and Dice are compared with room, hashes are not"
        warnings.warn(text, stacklevel=1)
    found, lines = run(script, tmp_path), []
    for amp in AMPS:
        like = amp
        if not known and found[amp]["losses"] == found["off"]["losses"]:
            like = "off"  # this processor has no bf16, so that the default is fp32
        expected = golden[there][amp] | {"losses": golden[there][like]["losses"]}
        lines += [f"amp {amp}: {line}" for line in differences(found[amp], expected, like, known)]
    assert not lines, "\n".join([f"{script}:", *lines, declare])


def write(scripts: Sequence[str]) -> None:
    """Values of other machines stay while those of this one do; else they are out of date."""
    golden, here = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}, machine()
    for script in scripts:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = run(script, Path(folder))
        old = golden.get(script, {})
        same = found == old.get(here, found)
        golden[script] = (old if same else {}) | {here: found}
        change = "new" if here not in old else "as before" if same else "changed"
        print(f"{script}: {change}, {time.perf_counter() - begin:.0f} s", flush=True)
    golden = {script: golden[script] for script in COMMANDS if script in golden}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--write",
        nargs="?",
        const="all",
        required=True,
        choices=[*COMMANDS, "all"],
        metavar="SCRIPT",
    )
    chosen = parser.parse_args().write
    write(list(COMMANDS) if chosen == "all" else [chosen])
