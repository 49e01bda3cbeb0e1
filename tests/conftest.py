"""The repository's root on the path, so that `python -m pytest` and `pytest` both find it; one thread a test.

And what the tests of all scripts' command lines share.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # before numpy is there: its threads wait for each other by spinning

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from common import runtime  # noqa: E402  (found by the line above)
from data_prep import msd  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        default="1/1",
        metavar="I/N",
        help="every Nth of the test files, beginning with the Ith",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--part I/N: two of them at once take two cores. Files stay whole, since their tests share trained networks."""
    part, parts = (int(n) for n in config.getoption("--part").split("/"))
    # Tests that run scripts take longest, so these files are dealt out first.
    files = sorted(
        {item.path for item in items}, key=lambda path: (not path.stem.endswith("_runs"), path.name)
    )
    mine = set(files[part - 1 :: parts])
    config.hook.pytest_deselected(items=[item for item in items if item.path not in mine])
    items[:] = [item for item in items if item.path in mine]


class CommandLine:
    """A script as a user runs it; name: without .py, main: its own."""

    def __init__(self, name: str, main: Callable[[Sequence[str]], int]):
        self.name, self.main = name, main
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def words(self, *argv: str, processes: int = 1) -> list[str]:
        """The command, under torchrun for several processes."""
        if processes == 1:
            return [sys.executable, f"{self.name}.py", *argv]
        # It finds itself a free port. One looked up here could be taken by another test before it starts.
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
        ]
        return [*launcher, f"--nproc_per_node={processes}", f"{self.name}.py", *argv]

    def run(
        self, *argv: str, processes: int = 1, timeout: float = 180
    ) -> subprocess.CompletedProcess:
        words = self.words(*argv, processes=processes)
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=self.environment
        )

    def refused(self, capsys, *argv: str) -> str:
        """The one line that this command line is refused with."""
        capsys.readouterr()
        assert runtime.run_main(self.name, self.main, argv) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{self.name}: ") and error.count("\n") == 1, error
        return error

    def stop_and_continue(
        self,
        *argv: str,
        out: Path,
        signals: Sequence[signal.Signals],
        processes: int = 1,
        group: bool = False,
    ) -> None:
        """Run into `out`, sending one of `signals` at a random moment after a save, and again until it ends by itself.

        group: to all that the run started, as a terminal and a queue do.
        """
        last, wait, stops = out / "last.pt", random.Random(0), 0
        for how in (*signals, None):
            process = subprocess.Popen(
                self.words(*argv, "--out", str(out), processes=processes),
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            begin, before = time.time(), last.stat().st_mtime if last.exists() else 0
            while how is not None and process.poll() is None and time.time() - begin < 60:
                if last.exists() and last.stat().st_mtime > before:
                    time.sleep(wait.uniform(0.0, 0.1))
                    os.killpg(process.pid, how) if group else process.send_signal(how)
                    break
                time.sleep(0.01)
            _, error = process.communicate(timeout=120)
            if process.returncode == 0:
                break
            stops += 1
            if processes == 1:
                assert how and process.returncode == (
                    -how if how == signal.SIGKILL else 128 + how
                ), error
        assert stops == len(signals) and process.returncode == 0, error

    def refuses_full_disk(self, *argv: str, out: Path) -> None:
        """Of a command line that continues in `out`, whose save does not fit: a file may be half of last.pt here."""
        size = (out / "last.pt").stat().st_size
        limited = f"ulimit -f {size // 2048}; exec {' '.join(self.words(*argv))}"
        words = ["bash", "-c", limited]
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=self.environment
        )
        assert done.returncode == 2 and "last.pt cannot be written" in done.stderr, done.stderr

    def state_of(self, out: Path, name: str = "last.pt") -> dict:
        return torch.load(out / name, weights_only=True)

    def step_of(self, out: Path) -> int:
        return self.state_of(out)["step"]

    def weights(self, out: Path) -> dict[str, torch.Tensor]:
        """Return weights, averaged weights and Adam's moments of last.pt."""
        state = self.state_of(out)
        tensors = {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()}
        for i, moments in state["optimizer"]["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        return tensors

    def assert_same(self, a: Path, b: Path) -> None:
        """Equal bit by bit."""
        left, right = self.weights(a), self.weights(b)
        assert left.keys() == right.keys() and len(left) > 100
        assert [k for k in left if not torch.equal(left[k], right[k])] == []


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="session")
def fake(tmp_path_factory) -> Path:
    """A prepared data set made from the publisher's layout: some cases LAS, anisotropic, published labels kept."""
    folder = tmp_path_factory.mktemp("fake")
    assert msd.main(["--make-fake", str(folder / "src")]) == 0
    assert msd.main(["--src", str(folder / "src"), "--dst", str(folder / "prepared")]) == 0
    return folder
