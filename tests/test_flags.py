"""The command line: what each verb takes, what a continued run and a trained network take over."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from common import InputError, flags
from common.flags import flag


@dataclass(frozen=True)
class Config(flags.RunFlags):
    width: int = flag(8, "width of the network", "model", 1, 64)
    mult: tuple[int, ...] = flag((1, 2), "widths of the levels", "model", 1)
    lr: float = flag(1e-3, "learning rate", "train", 0, 1)
    kind: Literal["a", "b"] = flag("a", "which", "train")
    steps: int = flag(100, "optimisation steps", "speed", 1)
    members: int = flag(1, "samples", "use", 1)

    def __post_init__(self) -> None:
        flags.check_ranges(self)


PRESETS: dict[str, dict[str, Any]] = {"tiny": {"lr": 0.1, "members": 3}, "laptop": {"width": 4}}
PRESETS |= {"gpu": {"width": 5}, "paper": {}}
VERBS = {
    "": ("run", "model", "train", "speed", "use"),
    "train": ("run", "model", "train", "speed"),
    "evaluate": ("run", "use"),
}


def parse(*argv: str) -> tuple[str, dict[str, Any]]:
    return flags.parse(Config, argv, VERBS, PRESETS, "A program.")


def configure(*argv: str) -> Config:
    return flags.configure(Config, PRESETS, parse(*argv)[1])


def test_values_come_from_the_flag_then_the_preset_then_the_default():
    config = configure("train", "--lr", "0.2")
    assert (config.preset, config.lr, config.members, config.width) == ("tiny", 0.2, 3, 8)
    assert configure("train", "--preset", "paper").lr == 1e-3


def test_real_data_take_laptop_or_gpu_by_the_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert configure("train", "--data", "brats").preset == "laptop"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert configure("train", "--data", "brats").width == 5


def test_types_are_those_of_the_fields():
    verb, given = parse("--mult", "1,3,4", "--kind", "b", "--no-quiet", "--members", "2")
    assert verb == ""
    assert given == {"mult": (1, 3, 4), "kind": "b", "quiet": False, "members": 2}


@pytest.mark.parametrize(
    "argv, words",
    [
        (("train", "--members", "2"), "--members is a flag of evaluate, not of train"),
        (("evaluate", "--widt", "2"), "unknown flag --widt; see --help"),
        (("train", "--widt", "2"), "did you mean --width"),
        (
            (
                "train",
                "--overwrit",
            ),
            "unknown flag --overwrit; see --help",
        ),
        (("train", "--lr", "fast"), "invalid float value: 'fast'"),
        (("train", "--kind", "c"), "invalid choice: 'c'"),
        (("trian",), "trian is no verb; use train, evaluate, or none"),
    ],
)
def test_unknown_words_are_refused_by_name(argv, words):
    with pytest.raises(InputError, match=words):
        parse(*argv)


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--width", "65"), "--width is 65; expected a number from 1 to 64"),
        (("--mult", "1,0"), "--mult is 1,0; expected a number of at least 1"),
        (("--lr", "nan"), "--lr is nan"),
        (("--lr", "-1"), "--lr is -1"),
    ],
)
def test_numbers_outside_their_range_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        configure("train", *argv)


def test_help_of_a_verb_has_its_flags_in_80_columns(capsys):
    for verb in ("train", "evaluate"):
        with pytest.raises(SystemExit):
            parse(verb, "--help")
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        assert ("--members" in text) == (verb == "evaluate")
        assert ("--lr" in text) == (verb == "train")
        if verb == "train":
            assert "[0.1 0.001 0.001 0.001]" in text and "a | b; which [a]" in text


def test_version_names_package_and_torch(capsys):
    with pytest.raises(SystemExit):
        parse("--version")
    assert "0.2.0" in capsys.readouterr().out


SAVED = {"width": 16, "mult": (1, 2), "lr": 0.5, "kind": "a", "preset": "paper", "data": "brats"}


def test_trained_network_keeps_model_and_training_and_takes_use_from_the_command():
    _, given = parse("evaluate", "--members", "7")
    config = flags.as_trained(Config, PRESETS, given, SAVED)
    assert (config.width, config.lr, config.data, config.members) == (16, 0.5, "brats", 7)
    _, given = parse("evaluate", "--preset", "tiny", "--data", "other")
    config = flags.as_trained(Config, PRESETS, given, SAVED)
    assert (config.members, config.data, config.lr) == (3, "other", 0.5)


def test_continuing_lists_what_differs_of_model_and_training_only():
    config = configure("train", "--preset", "paper", "--steps", "7", "--width", "16")
    flags.check_same(config, {**SAVED, "lr": 1e-3, "steps": 3, "members": 9}, "runs/a")
    with pytest.raises(InputError, match=r"--lr was 0\.5, is 0\.001"):
        flags.check_same(config, SAVED, "runs/a")


def test_departures_are_computed_from_the_papers_values():
    config = configure("train", "--lr", "0.1", "--mult", "1,4")
    assert flags.departures(config, Config()) == "mult 1,4 (1,2), lr 0.1 (0.001)"
