"""Pieces that are worth copying run alone: copied with what they need into an empty file."""

import subprocess
import sys

import pytest
from pieces import ROOT, copied

PIECES = {
    "PatchDDM's network": (
        "patchddm.py",
        ["UNet"],
        "import torch\n"
        "y = UNet(5, 1, 4, (1, 2), 1, 4)(torch.zeros(1, 5, 8, 8, 8), torch.tensor([3]))\n"
        "assert y.shape == (1, 1, 8, 8, 8)",
    ),
    "its sampler": (
        "patchddm.py",
        ["sample", "timesteps"],
        "import torch\n"
        "x = sample(lambda x, t: torch.ones_like(x), torch.randn(1, 1, 4, 4, 4), timesteps(5), 'x0')\n"
        "assert torch.equal(x, torch.ones_like(x))",
    ),
    "its coordinate patches": (
        "patchddm.py",
        ["Patches"],
        "import types\n"
        "image = np.random.rand(1, 9, 9, 9)\n"
        "data = types.SimpleNamespace(image=lambda c: image, label=lambda c: image[0] > 0.5)\n"
        "cond, label, t, n = Patches(data, ['a'], (4, 4, 4), (4, 4, 4))[0]\n"
        "assert cond.shape == (4, 4, 4, 4) and (abs(cond[1:]) <= 1).all()\n"
        "assert ((cond[0] > 0) == label).all()",
    ),
    "the recycling loss": (
        "diffseg3d_recycle.py",
        ["recycling_loss"],
        "times = []\n"
        "def model(x, t):\n"
        "    times.append(t.tolist())\n"
        "    return torch.zeros(1, 3, 4, 4, 4, requires_grad=True)\n"
        "eps = torch.randn(2, 1, 3, 4, 4, 4)\n"
        "label = torch.ones(1, 4, 4, 4)\n"
        "loss = recycling_loss(model, torch.zeros(1, 1, 4, 4, 4), label, torch.tensor([2]), *eps)\n"
        "assert times == [[501], [251]] and abs(loss.item() - 1.0986 - 0.5) < 1e-3",
    ),
    "surface distances": (
        "common/metrics.py",
        ["surface_scores"],
        "a = np.zeros((20, 20, 20), bool); a[6:12, 4:10, 4:10] = True\n"
        "b = np.roll(a, 2, axis=0)\n"
        "assert surface_scores(b, a, (1, 1, 3))['hd95_mm'] == 2",
    ),
}


@pytest.mark.parametrize("name", PIECES)
def test_piece_runs_alone(name, tmp_path):
    file, names, use = PIECES[name]
    text = copied(ROOT / file, *names)
    assert "common" not in text
    (tmp_path / "piece.py").write_text(f"{text}\n{use}\n")
    done = subprocess.run(
        [sys.executable, "piece.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
