"""A command line from a dataclass. Each field says what it is for, its range, and its part.

    part    read by                         when a run is continued   with a trained network
    run     every verb                      may change                from the command line
    model   train, and whatever loads it    must be the same          from the checkpoint
    start   every verb: what the shapes of  must be the same          from the checkpoint
            --init do not tell
    train   train                           must be the same          from the checkpoint
    speed   train                           may change                not read

Any other part belongs to the verbs that list it, and is taken from the command line.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import InputError, version

FIXED = ("model", "start", "train")  # the parts that a checkpoint decides


def flag(default: Any, help: str, part: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return a dataclass field. low, high: its range, for each number of a tuple."""
    metadata = {"help": help, "part": part, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The flags that teach nothing about a paper, the same in all scripts."""

    # fmt: off
    data: str = flag("synthetic", "synthetic, a name below data/, or a prepared folder", "run")
    preset: typing.Literal["tiny", "laptop", "gpu", "paper"] = flag(
        "paper", "values of the other flags", "run")
    out: str = flag("", "run folder; default runs/SCRIPT-DATA-PRESET", "run")
    init: str = flag("", "start from these weights, ours or public ones", "run")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", "run")
    amp: typing.Literal["auto", "bf16", "fp16", "off"] = flag("auto", "dtype of autocast", "run")
    workers: int = flag(4, "DataLoader workers of a process", "run", 0)
    overwrite: bool = flag(False, "delete an earlier run, or replace existing masks", "run")
    quiet: bool = flag(False, "no bars, and one line at each validation", "run")
    minutes: float = flag(0.0, "stop after M minutes of training; 0: no limit", "speed", 0)
    accumulate: int = flag(1, "split a batch into parts that fit the memory", "speed", 1)
    recompute: bool = flag(False, "recompute blocks in backward: a third of the memory", "speed")
    compile: bool = flag(False, "torch.compile the network in training", "speed")
    checkpoint: str = flag("", "file or folder; default best.pt, else last.pt", "use")
    split: typing.Literal["train", "val", "test", "all"] = flag("test", "which cases", "evaluate")
    limit: int = flag(0, "at most so many cases; 0: all", "evaluate", 0)
    image: tuple[str, ...] = flag((), "files, or one folder", "predict")
    output: str = flag("", "file for one image, or a folder", "predict")
    # fmt: on

    script: typing.ClassVar[str] = ""  # the name of the script, in the default of --out

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{self.script}-{Path(self.data).name}-{self.preset}")


def word(name: str) -> str:
    """Return the flag of a field: num_channels -> --num-channels."""
    return "--" + name.replace("_", "-")


def text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_ranges(config: Any) -> None:
    """Raise InputError that names the first flag outside its range. Call it in __post_init__."""
    for f in dataclasses.fields(config):
        low, high = f.metadata["low"], f.metadata["high"]
        value = getattr(config, f.name)
        values = value if isinstance(value, tuple) else (value,)
        numbers = [v for v in values if isinstance(v, int | float)]
        if all(low <= v <= high for v in numbers):  # False for NaN, too
            continue
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise InputError(f"{word(f.name)} is {text(value)}; expected a number {limits}")


class Parser(argparse.ArgumentParser):
    """One verb's parser, with a help that has a line a flag and the presets side by side."""

    summary = ""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        return self.summary


def parse(
    Config: type,
    argv: Sequence[str],
    verbs: Mapping[str, Sequence[str]],
    presets: Mapping[str, Mapping[str, Any]],
    description: str,
) -> tuple[str, dict[str, Any]]:
    """Return the verb and the flags that were given, name -> value.

    verbs: name -> the parts that it reads; "" is the run without a verb, which reads all of them.
    Raises InputError for a word that is no flag of this verb, and for a value of another type.
    """
    script = sys.argv[0].replace("\\", "/").rpartition("/")[2]
    parsers = {verb: Parser(f"{script} {verb}".strip(), allow_abbrev=False) for verb in verbs}
    for verb, parser in parsers.items():
        hints = typing.get_type_hints(Config)
        every = dataclasses.fields(Config)
        fields = [f for part in verbs[verb] for f in every if f.metadata["part"] == part]
        for f in fields:
            options = {"default": argparse.SUPPRESS, **argument(hints[f.name])}
            parser.add_argument(word(f.name), **options)
        numbers = version()
        line = f"{script} {numbers['version']} {numbers['commit']}, torch {numbers['torch']}"
        parser.add_argument("--version", action="version", version=line.replace(" ,", ","))
        parser.summary = help_text(script, verb, verbs, description, fields, hints, presets)

    words = list(argv)
    verb = ""
    if words and words[0] and not words[0].startswith("-"):
        verb = words.pop(0)
    if verb not in verbs:
        raise InputError(f"{verb} is no verb; use {', '.join(filter(None, verbs))}, or none")
    check_words(words, verb, parsers)
    given = vars(parsers[verb].parse_args(words))
    return verb, {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def argument(kind: Any) -> dict[str, Any]:
    """Return argparse's options for a field of this type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"choices": inner}
    if origin is tuple and inner[0] is str:
        return {"nargs": "+"}
    if origin is tuple:
        numbers = inner[0]

        def split(words: str) -> tuple[Any, ...]:
            return tuple(numbers(part) for part in words.split(","))

        split.__name__ = f"comma-separated {numbers.__name__}"
        return {"type": split}
    return {"type": kind}


def check_words(words: Sequence[str], verb: str, parsers: Mapping[str, Parser]) -> None:
    """Raise InputError for a word that begins with -- and is no flag of the verb."""
    known = {v: list(p._option_string_actions) for v, p in parsers.items()}
    for name in (w.partition("=")[0] for w in words if w.startswith("--")):
        if name in known[verb]:
            continue
        users = [v for v in parsers if v and name in known[v]]
        if users:
            raise InputError(f"{name} is a flag of {', '.join(users)}, not of {verb}; leave it out")
        # A typing error must not end in the loss of a run.
        choices = [k for k in known[verb] if k not in ("--overwrite", "--no-overwrite")]
        close = difflib.get_close_matches(name, choices, 1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else "see --help"
        raise InputError(f"unknown flag {name}; {hint}")


def help_text(
    script: str,
    verb: str,
    verbs: Mapping[str, Sequence[str]],
    description: str,
    fields: Sequence[Any],
    hints: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the help of one verb in 80 columns: groups by part, the presets' values behind."""
    names = " | ".join(v for v in verbs if v)
    names = f"[{names}]" if names else ""
    lines = [*textwrap.wrap(description, 80), ""]
    lines += [" ".join(["usage:", script, verb or names, "[--flag value ...]"]).replace("  ", " ")]
    if names and not verb:
        lines += [f"Without a verb: all of it. Flags of one verb: {script} VERB --help"]
    lines += [f"Values in brackets are the presets': {', '.join(presets)} (or of all)."]
    for part in dict.fromkeys(f.metadata["part"] for f in fields):
        lines += ["", part]
        for f in (f for f in fields if f.metadata["part"] == part):
            values = [text({f.name: f.default, **preset}[f.name]) for preset in presets.values()]
            same = len(set(values)) == 1
            shown = values[0] if same else " ".join(v or "-" for v in values)
            tail = f" [{shown}]" if shown and f.default is not False else ""
            choices = ""
            if typing.get_origin(hints[f.name]) is typing.Literal:
                choices = " | ".join(typing.get_args(hints[f.name])) + "; "
            lines += textwrap.wrap(
                f"{word(f.name):<23} {choices}{f.metadata['help']}{tail}",
                79,
                initial_indent="  ",
                subsequent_indent=" " * 26,
                break_on_hyphens=False,
            )
    return "\n".join(lines) + "\n"


def configure(
    Config: type, presets: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> Any:
    """Return the config: the preset's values, changed by the flags that were given.

    Without --preset: tiny for synthetic data, else gpu where there is a GPU and laptop without one.
    """
    real = "gpu" if torch.cuda.is_available() else "laptop"
    synthetic = given.get("data", "synthetic") == "synthetic"
    preset = given.get("preset", "tiny" if synthetic else real)
    return Config(**{**presets[preset], "preset": preset, **given})


def names(Config: type, *parts: str) -> list[str]:
    """Return the fields of these parts."""
    return [f.name for f in dataclasses.fields(Config) if f.metadata["part"] in parts]


def as_trained(
    Config: type,
    presets: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> Any:
    """Return the config for using a network: model and training from its checkpoint's config.

    The rest comes from the command line; what is not given there from the preset of the training.
    """
    kept = {name: saved[name] for name in names(Config, *FIXED) if name in saved}
    preset = given.get("preset", saved["preset"])
    start = {**presets[preset], "preset": preset, "data": saved["data"]}
    return Config(**{**start, **given, **kept})


def check_same(config: Any, saved: Mapping[str, Any], where: Any) -> None:
    """Raise InputError unless a run goes on with the network and the training it began with."""
    fixed = names(type(config), *FIXED)
    differ = [n for n in fixed if saved.get(n) != getattr(config, n)]
    if differ:
        rows = [
            f"{word(n)} was {text(saved.get(n))}, is {text(getattr(config, n))}" for n in differ
        ]
        raise InputError(
            f"{where} holds a run with other settings ({'; '.join(rows)}); "
            "use those, another --out, or --overwrite"
        )


def departures(config: Any, paper: Any) -> str:
    """Return what this run changes from the paper's settings: `target x0 (paper: eps), ...`."""
    pairs = [(n, getattr(config, n), getattr(paper, n)) for n in names(type(config), *FIXED)]
    return ", ".join(
        f"{n.replace('_', ' ')} {text(value)} ({text(other) or 'none'})"
        for n, value, other in pairs
        if value != other and n != "seed"
    )
