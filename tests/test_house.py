"""The rules of the house: what stays in a script, what stays out of common/, tags, flags, commands."""

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import flags

ROOT = Path(__file__).parents[1]
NAMES = ("patchddm", "diffseg3d_recycle", "masked_diffusion", "ddpm_pretrain_finetune")
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES]
# A script that still uses the former plumbing follows fewer rules.
MOVED = [script for script in SCRIPTS if "common.old" not in script.read_text()]
COMMON = sorted((ROOT / "common").glob("*.py"))
BANNERS = ["Config", "Model", "Diffusion", "Data", "Train", "Sample", "Evaluate", "Predict"]
BANNERS += ["Command line"]
MDM = ["Config", "Model", "Masks", "Data", "Pre-train", "Features", "Classifier", "Evaluate"]
MDM += ["Predict", "Command line"]
DDPM = ["Config", "Model", "Diffusion", "Data", "Pre-train", "Sample", "Fine-tune", "Evaluate"]
DDPM += ["Predict", "Command line"]
OF = {"masked_diffusion": MDM, "ddpm_pretrain_finetune": DDPM}
LESSON = ["DistributedDataParallel", "no_sync", "GradScaler", "clip_grad_norm_", "optim.Adam"]
LESSON += [".backward("]
HEADINGS = ["Paper", "Idea", "Symbols", "Equations", "Differs", "Usage", "Expect"]
PACKAGES = {"torch", "numpy", "nibabel", "PIL", "scipy", "tqdm"}
# Flags of some scripts that mean the same in all of them, so common/ may name them.
SHARED = {"seed", "batch", "lr", "ema", "steps", "save", "ensemble", "eval_every", "save_every"}
SHARED |= {"patience", "augment", "recompute", "grad_clip", "num_channels"}
by_script = pytest.mark.parametrize("script", MOVED, ids=lambda p: p.stem)


def sources() -> list[Path]:
    words = ["git", "ls-files", "*.py"]
    files = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.split()
    tracked = [ROOT / f for f in files if (ROOT / f).exists()]
    return tracked or [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


@by_script
def test_script_has_the_banners_in_order(script):
    banners = re.findall(r"^# =+\n# ([A-Z][a-z-]+(?: line)?)", script.read_text(), re.MULTILINE)
    assert banners == OF.get(script.stem, BANNERS)


@by_script
def test_script_holds_the_lesson(script):
    text = script.read_text()
    assert [word for word in LESSON if word not in text] == []


def test_common_holds_no_lesson_and_knows_no_script():
    own = set()
    for script in MOVED:
        Config = importlib.import_module(script.stem).Config
        own |= {f.name for f in dataclasses.fields(Config)}
    own -= {f.name for f in dataclasses.fields(flags.RunFlags)} | SHARED
    for file in COMMON:
        text = file.read_text()
        assert [word for word in LESSON if word in text] == [], file
        assert [name for name in NAMES if name in text] == [], file
        words = set(re.findall(r"--[a-z][a-z-]+", text))
        assert words & {flags.word(name) for name in own} == set(), file
        verbs = ("pretrain", "finetune", "segment")
        assert not re.search(rf"\b({'|'.join(verbs)})\b", re.sub(r'"pretrain"', "", text)), file


@by_script
def test_script_stays_short_and_trains_early(script):
    """The budget in lines, with 5 % room. Where one is passed, take out a concept."""
    budget = {"patchddm": 850, "diffseg3d_recycle": 930, "masked_diffusion": 1040}
    lines = script.read_text().splitlines()
    assert len(lines) <= 1.05 * budget.get(script.stem, 960)
    assert max(map(len, lines)) <= 100
    first = next(n for n, line in enumerate(lines, 1) if ".backward(" in line)
    assert first <= 0.62 * len(lines)


@by_script
def test_docstring_has_its_headings(script):
    assert [line for line in docstring(script).splitlines() if line in HEADINGS] == HEADINGS


@by_script
def test_difference_and_equation_tags_agree_with_the_docstring(script):
    doc = docstring(script)
    tags = "\n".join(re.findall(r"#(.*)$", script.read_text().split('"""', 2)[2], re.MULTILINE))
    assert set(re.findall(r"^ +(D\d+) ", doc, re.MULTILINE)) == set(re.findall(r"\b(D\d+)\b", tags))
    listed = set(re.findall(r"^ +\((\d+)\) ", doc, re.MULTILINE))
    assert listed and listed == set(re.findall(r"eq\. \((\d+)\)", tags))


@by_script
def test_every_flag_is_read(script):
    Config = importlib.import_module(script.stem).Config
    text = script.read_text() + (ROOT / "common/runtime.py").read_text()
    reads = set(re.findall(r"(?<=config\.)\w+|(?<=self\.)\w+", text))
    assert {f.name for f in dataclasses.fields(Config)} - reads - {"preset"} == set()


@by_script
def test_presets_are_valid_and_every_flag_is_in_a_verb(script):
    module = importlib.import_module(script.stem)
    assert list(module.PRESETS) == ["tiny", "laptop", "gpu", "paper"]
    for preset in module.PRESETS.values():
        module.Config(**preset)
    parts = {part for verb in module.VERBS.values() for part in verb}
    assert {f.metadata["part"] for f in dataclasses.fields(module.Config)} <= parts
    assert all(f.metadata["help"] for f in dataclasses.fields(module.Config))


@by_script
@pytest.mark.parametrize("verb, longest", [("train", 100), ("evaluate", 50), ("predict", 50)])
def test_help_fits_its_screens(script, verb, longest, capsys):
    module = importlib.import_module(script.stem)
    if verb not in module.VERBS:
        verb = "pretrain"
    with pytest.raises(SystemExit):
        module.main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= longest and max(map(len, lines)) <= 80


@by_script
def test_only_what_starts_a_command_sees_the_config(script):
    """What computes takes plain arguments, so that it can be copied alone."""
    tree = ast.parse(script.read_text())
    takes = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(a.arg == "config" for a in node.args.args)
    ]
    assert len(takes) <= 8, takes


def test_only_the_six_packages_are_imported():
    roots = set()
    for file in [*SCRIPTS, *COMMON, *(ROOT / "data_prep").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add((node.module or "").split(".")[0])
    ours = {"common", "data_prep", *NAMES}
    assert roots - set(sys.stdlib_module_names) - PACKAGES - ours == set()


def test_nothing_is_unpickled():
    for file in sources():
        if "old" in file.parts or file.parent.name == "tests":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "pickle":
                    assert node.attr == "UnpicklingError", file
                if node.attr == "load" and node.value.id == "torch":
                    assert "weights_only=True" in file.read_text(), file


@by_script
def test_script_can_be_taken_away_with_common(script, tmp_path):
    shutil.copy(script, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "old")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=ignore)
    words = [sys.executable, script.name, "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--data" in done.stdout, done.stderr


# --- documented commands --------------------------------------------------------------------------


def with_loops(text: str) -> str:
    """A shell file with the first value of each `for NAME in ...`, or a default, for $NAME."""
    first = dict(re.findall(r"\$\{(\w+):-([^\s}]+)", text))
    first |= dict(re.findall(r"for (\w+) in ([^\s;$]+)", text))
    first.pop("PYTHON", None)
    return re.sub(r"\$(\w+)\b", lambda match: first.get(match[1], match[0]), text)


def commands() -> list[str]:
    """Every command of README.md, of the scripts' docstrings and of results/*.sh, one a line."""
    text = (ROOT / "README.md").read_text()
    text += "".join(with_loops(f.read_text()) for f in sorted((ROOT / "results").glob("*.sh")))
    text += "".join(docstring(s) for s in SCRIPTS)
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(python|torchrun|\$PYTHON) ", part)]


def test_readme_names_the_commands_of_each_part():
    text = "\n".join(commands())
    parts = ("patchddm.py", "data_prep.msd", "common.metrics", "torchrun", "pytest")
    assert all(part in text for part in parts)


@pytest.mark.parametrize("command", commands())
def test_documented_command_parses(command):
    words = shlex.split(re.split(r"\s{2,}|\s#|;| \| |&&", command)[0])
    stem = next((w.removesuffix(".py") for w in words if w.endswith(".py")), "")
    if words[1] == "-m" and words[0] != "torchrun":
        assert words[2] in ("pytest", "venv", "pip") or importlib.util.find_spec(words[2])
    elif stem in [script.stem for script in MOVED]:
        module = importlib.import_module(stem)
        argv = words[words.index(f"{stem}.py") + 1 :]
        fields = dataclasses.fields(module.Config)
        choices = {flags.word(f.name) for f in fields if "Literal" in str(f.type)}
        kept: list[str] = []
        for at, word in enumerate(argv):
            if word in choices and argv[at + 1].startswith("$"):
                continue
            if word.startswith("$") and not argv[at - 1].startswith("--"):
                continue
            if word.startswith("$") and argv[at - 1] in choices:
                continue
            kept.append(re.sub(r"\$\{?\w+\}?", "1", word) if word.startswith("$") else word)
        _, given = flags.parse(module.Config, kept, module.VERBS, module.PRESETS, "")
        flags.configure(module.Config, module.PRESETS, given)
    else:
        assert (ROOT / f"{stem}.py").exists() or stem == "", command
