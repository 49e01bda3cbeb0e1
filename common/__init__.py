"""What the four scripts share. It teaches nothing about a paper and calls no script back."""

import contextlib
import importlib.metadata
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__version__ = "0.2.0"


class InputError(Exception):
    """Bad input of a user: one line that says what is wrong, what was expected and what to do.

    The scripts print it without a traceback and leave with exit code 2.
    """


def version() -> dict[str, str]:
    """Return the versions of this package and of torch, and the commit where git knows one."""
    root = Path(__file__).parents[1]
    commit = ""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=5)
            commit = answer.stdout.strip()
    return {"version": __version__, "commit": commit, "torch": importlib.metadata.version("torch")}


def atomic_write(
    path: Path | str, content: bytes | Callable[[BinaryIO], object], previous: Path | None = None
) -> None:
    """Write a file so that at each moment a whole one is there: the old or the new.

    content: bytes, or a function that writes into an open file. previous: where the old file goes.
    Raises InputError where the disk is full or read-only; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{path} cannot be written ({reason}); nothing there was changed; "
            "free space or choose another place, then run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    # A power cut undoes the rename unless the folder is written, too. Windows has no such call.
    with contextlib.suppress(OSError, AttributeError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
