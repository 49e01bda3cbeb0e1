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

from common.old import metrics, runtime

ROOT = Path(__file__).parents[1]
NAMES = ("patchddm", "diffseg3d_recycle", "masked_diffusion", "ddpm_pretrain_finetune")
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES if (ROOT / f"{name}.py").exists()]
BANNERS = [
    "Config",
    "Model",
    "Diffusion",
    "Data",
    "Train",
    "Sample",
    "Evaluate",
    "Predict",
    "Command line",
]
LESSON = [
    "DistributedDataParallel",
    "no_sync",
    "GradScaler",
    "clip_grad_norm_",
    "optim.Adam",
    ".backward(",
]
HEADINGS = ["Paper", "Idea", "Symbols", "Equations", "Differs", "Usage", "Expect"]
LONGEST = 80  # lines of a function; only the training loop of a script may be longer
PACKAGES = {"torch", "numpy", "nibabel", "PIL", "scipy", "tqdm"}
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)


def sources() -> list[Path]:
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    return [ROOT / f for f in files if (ROOT / f).exists()] or [
        *ROOT.glob("*.py"),
        *ROOT.glob("*/*.py"),
    ]


def test_there_is_a_script():
    assert ROOT / "patchddm.py" in SCRIPTS


@by_script
def test_script_has_the_banners_in_order(script):
    found = re.findall(r"^# =+\n# ([A-Z][a-z]+(?: line)?)", script.read_text(), re.MULTILINE)
    assert found == BANNERS


@by_script
def test_script_holds_the_lesson(script):
    text = script.read_text()
    assert [word for word in LESSON if word not in text] == []


def test_common_holds_no_lesson():
    for file in (ROOT / "common").rglob("*.py"):
        text = file.read_text()
        assert [word for word in LESSON if word in text] == [], file
        assert not re.search(rf"^\s*(from|import) ({'|'.join(NAMES)})\b", text, re.MULTILINE), file


@by_script
def test_docstring_has_its_headings(script):
    doc = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert [line for line in doc.splitlines() if line in HEADINGS] == HEADINGS


@by_script
def test_difference_and_equation_tags_agree_with_the_docstring(script):
    text = script.read_text()
    doc = ast.get_docstring(ast.parse(text)) or ""
    code = text.split('"""', 2)[2]
    tags = "\n".join(comments(code))
    assert set(re.findall(r"^ +(D\d+) ", doc, re.MULTILINE)) == set(re.findall(r"\b(D\d+)\b", tags))
    listed = set(re.findall(r"^ +\((\d+)\) ", doc, re.MULTILINE))
    assert listed and listed == set(re.findall(r"eq\. \((\d+)\)", tags))


def comments(code: str) -> list[str]:
    return re.findall(r"#(.*)$", code, re.MULTILINE)


@by_script
def test_every_flag_is_read(script):
    module = importlib.import_module(script.stem)
    text = script.read_text()
    reads = set(re.findall(r"\b(?:config|self)\.([A-Za-z_0-9]+)", text))
    names = {f.name for f in dataclasses.fields(module.Config)}
    assert names - reads - {"preset"} == set()


@by_script
def test_every_flag_has_a_help_and_the_parser_takes_its_default(script):
    module = importlib.import_module(script.stem)
    parser = runtime.make_parser(module.Config, module.VERBS, "")
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(module.Config):
        assert field.metadata["help"] and f"--{field.name.replace('_', '-')}" in text


@by_script
def test_presets_are_valid_configs(script):
    module = importlib.import_module(script.stem)
    assert set(module.PRESETS) == {"tiny", "laptop", "paper"}
    for preset in module.PRESETS.values():
        module.Config(**preset)


def test_no_function_is_longer_than_a_screen_and_a_half():
    long = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "train":
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{file.name}:{node.name} {lines}"] if lines > LONGEST else []
    assert long == []


def test_only_the_six_packages_are_imported():
    found = set()
    for file in [*SCRIPTS, *(ROOT / "common").rglob("*.py"), *(ROOT / "data_prep").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) - {"common", "data_prep"} <= PACKAGES


def test_no_unsafe_load_and_no_pickle():
    for file in sources():
        if file.parent.name != "tests":
            text = file.read_text()
            assert "pickle.load" not in text and "allow_pickle=True" not in text, file
            assert all(
                "weights_only=True" in call for call in re.findall(r"torch\.load\(.*", text)
            ), file


def pickle_words(file: Path) -> list[str]:
    """What a file takes from the module pickle, in order; an import of a part of it by name counts as "from"."""
    words = []
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "pickle"
        ):
            words.append(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            words.append("from")
        if isinstance(node, ast.Import):
            words += ["as" for alias in node.names if alias.name == "pickle" and alias.asname]
    return words


def test_only_the_restricted_reader_unpickles():
    found = {
        f.name: set(pickle_words(f))
        for f in sources()
        if f.parent.name != "tests" and pickle_words(f)
    }
    assert found == {
        "runtime.py": {"UnpicklingError"},
        "loaders.py": {"Unpickler", "UnpicklingError"},
    }
    tree = ast.parse((ROOT / "common" / "old" / "loaders.py").read_text())
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "Unpickler"]
    bases = [base for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for base in n.bases]
    assert len(uses) == 1 and uses[0] in bases  # subclassed once, never called as it is


@by_script
def test_script_can_be_taken_away_with_common(script, tmp_path):
    shutil.copy(script, tmp_path)
    shutil.copytree(
        ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__")
    )
    done = subprocess.run(
        [sys.executable, script.name, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--data" in done.stdout, done.stderr


def with_loops(text: str) -> str:
    """A shell file with the first value of each `for NAME in ...`, or a default, in the place of $NAME."""
    first = dict(re.findall(r"\$\{(\w+):-([^\s}]+)", text)) | dict(
        re.findall(r"for (\w+) in ([^\s;$]+)", text)
    )
    first.pop("PYTHON", None)
    return re.sub(r"\$(\w+)\b", lambda found: first.get(found[1], found[0]), text)


def commands() -> list[str]:
    """Every command of README.md, of the scripts' docstrings and of results/*.sh, one a line."""
    text = (ROOT / "README.md").read_text()
    text += "".join(with_loops(f.read_text()) for f in sorted((ROOT / "results").glob("*.sh")))
    text += "".join(ast.get_docstring(ast.parse(s.read_text())) or "" for s in SCRIPTS)
    parts = [
        part.strip() for line in text.replace("\\\n", " ").splitlines() for part in line.split("&&")
    ]
    return [part for part in parts if re.match(r"(python|torchrun|\$PYTHON) ", part)]


def test_readme_names_the_commands_of_each_part():
    found = "\n".join(commands())
    assert all(
        part in found
        for part in ("patchddm.py", "data_prep.msd", "common.metrics", "torchrun", "pytest")
    )


@pytest.mark.parametrize("command", commands())
def test_documented_command_parses(command):
    words = shlex.split(re.split(r"\s{2,}|\s#|;| \| |&&", command)[0])
    stem = next((w.removesuffix(".py") for w in words if w.endswith(".py")), "")
    if words[1] == "-m" and words[0] != "torchrun":
        assert words[2] in ("pytest", "venv", "pip") or importlib.util.find_spec(words[2])
        if words[2] == "common.metrics":
            metrics.make_parser().parse_args(
                [re.sub(r"^\$METRICS$", "dice", word) for word in words[3:]]
            )
        return
    if stem in NAMES:
        module = importlib.import_module(stem)
        argv = words[words.index(f"{stem}.py") + 1 :]
        choices = {
            f"--{f.name.replace('_', '-')}"
            for f in dataclasses.fields(module.Config)
            if "Literal" in str(f.type)
        }
        argv = [
            w for at, w in enumerate(argv) if not (w in choices and argv[at + 1].startswith("$"))
        ]
        argv = [
            w
            for at, w in enumerate(argv)
            if not (w.startswith("$") and not argv[at - 1].startswith("--"))
        ]
        argv = [re.sub(r"\$\{?\w+\}?", "8", w) if w.startswith("$") else w for w in argv]
        runtime.parse_flags(module.Config, argv, module.VERBS, module.PRESETS, "", module.ONLY)
    else:
        assert (ROOT / f"{stem}.py").exists() or stem == "", command
