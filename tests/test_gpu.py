"""What only a CUDA device can show; skipped elsewhere. And torch.compile, which takes minutes (-m slow)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import patchddm
from common import runtime
from common.unet import GroupNorm

NET = ["--num-channels", "4", "--channel-mult", "1,2", "--num-groups", "2", "--patch", "16", "--batch", "2"]
FAST = [*NET, "--sampling-steps", "2", "--limit", "1", "--quiet"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, none is here")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groupnorm_on_a_gpu_equals_the_cpu_and_keeps_no_fp32_copy(dtype):
    torch.manual_seed(0)
    norm = GroupNorm(4, 8)
    x = torch.randn(2, 8, 9, 10, 11).to(dtype)
    expected = norm(x.float())
    norm, x = norm.cuda(), x.cuda().requires_grad_()
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with hooks, torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        y = norm(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype and torch.isfinite(x.grad).all()
    torch.testing.assert_close(y.float().cpu(), expected, atol=3e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2)
    if dtype != torch.float32:
        assert max(t.numel() for t in kept if t.dtype == torch.float32) <= 8


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu_saves_and_continues(tmp_path, amp):
    argv = ["train", *FAST, "--device", "cuda", "--amp", amp, "--out", str(tmp_path / "run"), "--workers", "2"]
    assert patchddm.main([*argv, "--steps", "2"]) == 0
    assert patchddm.main([*argv, "--steps", "4"]) == 0
    assert patchddm.main([*argv, "--steps", "5", "--device", "cpu", "--amp", "off"]) == 0
    state = runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.slow
def test_compiled_training_has_nearly_the_plain_weights(tmp_path):
    states = []
    for flag in ("--no-compile", "--compile"):
        argv = ["train", *FAST, "--device", "cpu", "--amp", "off", "--out", str(tmp_path / flag), "--steps", "3", flag]
        assert patchddm.main(argv) == 0
        states.append(runtime.load_checkpoint(tmp_path / flag / "last.pt", "patchddm")["model"])
    for k in states[0]:
        torch.testing.assert_close(states[0][k], states[1][k], atol=1e-4, rtol=1e-2)
