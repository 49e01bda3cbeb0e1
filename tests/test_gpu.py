"""What only a CUDA device can show; skipped elsewhere. And torch.compile, which takes minutes (-m slow)."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import ddpm_pretrain_finetune as ddpm
import diffseg3d_recycle as diffseg
import masked_diffusion
import patchddm
from common.old import loaders, metrics, runtime
from common.old.unet import GroupNorm, lean_forward

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
FAST = [*NET, "--sampling-steps", "2", "--limit", "1", "--quiet"]
NETWORK = {"num_channels": 4, "channel_mult": (1, 2), "num_groups": 2, "patch": (8,), "batch": 2}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, none is here")


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch):
    """Convolutions in fp32, not TF32, so that they can be compared with the CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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
    torch.testing.assert_close(
        y.float().cpu(), expected, atol=3e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
    )
    if dtype != torch.float32:
        assert max(t.numel() for t in kept if t.dtype == torch.float32) <= 8


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu_saves_and_continues(tmp_path, amp):
    argv = [
        "train",
        *FAST,
        "--device",
        "cuda",
        "--amp",
        amp,
        "--out",
        str(tmp_path / "run"),
        "--workers",
        "2",
    ]
    assert patchddm.main([*argv, "--steps", "2"]) == 0
    assert patchddm.main([*argv, "--steps", "4"]) == 0
    assert patchddm.main([*argv, "--steps", "5", "--device", "cpu", "--amp", "off"]) == 0
    state = runtime.load_checkpoint(tmp_path / "run/last.pt", "patchddm")
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("amp, target", [("bf16", "eps"), ("fp16", "x0"), ("off", "v")])
def test_a_training_step_never_waits_for_the_gpu(amp, target):
    """PyTorch raises at whatever would make the host wait (cuda sync debug mode)."""
    device, data = torch.device("cuda:0"), loaders.Phantoms(0, (3, 1, 1), shape=(16, 16, 16))
    config = patchddm.Config(**NETWORK, amp=amp, target=target, ema=0.9, grad_clip=1.0)
    ranks, dtype = runtime.Ranks(0, 1, 0, device), runtime.number_format(amp, device)[0]
    run = patchddm.Training(config, loaders.data_record(data), device, dtype)
    batches = iter(DataLoader(patchddm.Patches(data, config), 2, sampler=range(8), pin_memory=True))
    losses = runtime.LossByTime(1000, device)
    patchddm.train_step(
        run, run.model, batches, ranks, losses
    )  # tables and the optimiser's state are made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            patchddm.train_step(run, run.model, batches, ranks, losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.skipped.tolist()[0] == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"recycle": "self-condition", "amp": "fp16"},
        {"method": "unet", "image_noise": 0.1},
        {"target": "eps"},
    ],
)
def test_a_recycled_step_never_waits_for_the_gpu(flags):
    device, data = torch.device("cuda:0"), loaders.Phantoms(0, (3, 1, 1), shape=(16, 16, 16))
    config = diffseg.Config(
        num_channels=4, channel_mult=(1, 2), size=(16, 16, 16), batch=2, **flags
    )
    ranks, dtype = runtime.Ranks(0, 1, 0, device), runtime.number_format(config.amp, device)[0]
    run = diffseg.Training(config, loaders.data_record(data), device, dtype)
    batches = iter(DataLoader(diffseg.Volumes(data, config), 2, sampler=range(12), pin_memory=True))
    losses = runtime.LossByTime(1000, device)
    for number in range(
        6
    ):  # tables, the optimiser's state and both sides of the coin are met in the first
        torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
        try:
            diffseg.train_step(run, run.model, run.model, batches, ranks, losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.skipped.tolist()[0] == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "flags",
    [{}, {"method": "ddpm", "amp": "fp16"}, {"method": "mae", "vit": "small"}, {"loss": "l1"}],
)
def test_a_masked_step_never_waits_for_the_gpu(flags):
    small = {
        "num_channels": 32,
        "channel_mult": (1, 1),
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
    }
    small |= {"num_head_channels": 32, "crop": 32, "tile": 8, "batch": 2}
    device, data = torch.device("cuda:0"), loaders.Tissue(0, (4, 2), (40, 56))
    config = masked_diffusion.Config(**small, **flags)
    ranks, dtype = runtime.Ranks(0, 1, 0, device), runtime.number_format(config.amp, device)[0]
    run = masked_diffusion.Training(config, loaders.data_record(data), device, dtype)
    crops = masked_diffusion.Crops(data, config, data.cases("train"))
    batches, losses = (
        iter(DataLoader(crops, 2, sampler=range(8), pin_memory=True)),
        runtime.LossByTime(1000, device),
    )
    for number in range(4):  # tables and the optimiser's state are made in the first
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            masked_diffusion.train_step(run, run.model, batches, ranks, losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.skipped.tolist()[0] == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "stage, flags",
    [
        ("pretrain", {}),
        ("pretrain", {"amp": "fp16", "arch": "ddpm"}),
        ("finetune", {}),
        ("finetune", {"strategy": "scratch", "dice": "per-class"}),
    ],
)
def test_a_step_on_slices_never_waits_for_the_gpu(stage, flags):
    small = {
        "num_channels": 32,
        "channel_mult": (1, 1),
        "num_res_blocks": 1,
        "num_head_channels": 32,
        "size": 16,
    }
    device, data = torch.device("cuda:0"), loaders.CtPhantoms(0, side=16)
    config = ddpm.Config(**small, batch=2, blocks=(1,), **flags)
    ranks, dtype = runtime.Ranks(0, 1, 0, device), runtime.number_format(config.amp, device)[0]
    run = ddpm.Training(stage, config, loaders.data_record(data), device, dtype)
    slices = ddpm.Samples(data, config, ddpm.pretraining_slices(data), stage == "finetune")
    if stage == "finetune":
        slices.slices = ddpm.labelled_slices(data, config)[0]
    batches, losses = (
        iter(DataLoader(slices, 2, sampler=range(8), pin_memory=True)),
        runtime.LossByTime(1000, device),
    )
    run.model.train()
    for number in range(4):  # tables and the optimiser's state are made in the first
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            ddpm.train_step(run, run.model, batches, ranks, losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.skipped.tolist()[0] == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_recycled_training_on_a_gpu_continues_and_samples_as_the_cpu(tmp_path, amp):
    argv = [
        "--num-channels",
        "4",
        "--channel-mult",
        "1,2",
        "--size",
        "16,16,16",
        "--batch",
        "2",
        "--limit",
        "1",
        "--quiet",
    ]
    argv += ["--out", str(tmp_path / "run")]
    for device, steps in (("cuda", "2"), ("cuda", "4"), ("cpu", "5")):
        assert (
            diffseg.main(
                [
                    "train",
                    *argv,
                    "--amp",
                    amp if device == "cuda" else "off",
                    "--device",
                    device,
                    "--steps",
                    steps,
                ]
            )
            == 0
        )
    state = runtime.load_checkpoint(tmp_path / "run/last.pt", "diffseg3d_recycle")
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["model"].values())
    dices = []
    for device in ("cuda", "cpu"):  # noise is drawn on the CPU: the same sample on both
        assert diffseg.main(["evaluate", *argv, "--amp", "off", "--device", device]) == 0
        dices.append(
            [row["dice"] for row in metrics.read_metrics_csv(tmp_path / "run/test-1/metrics.csv")]
        )
    assert dices[0] == pytest.approx(dices[1], abs=0.02)


@pytest.mark.gpu
@gpu
def test_the_decoder_on_a_second_device_gives_the_same_numbers():
    record = {"channels": ["a"], "classes": {"x": 1}}
    x, t = torch.randn(1, 5, 16, 16, 16), torch.tensor([500])
    results = []
    for split in ("", "cuda:0,cpu", "cpu,cuda:0"):
        torch.manual_seed(0)
        device = torch.device(split.split(",")[0] or "cpu")
        net = patchddm.network_for(patchddm.Config(**NETWORK, split_devices=split), record, device)
        head = torch.randn(
            net.out[2].weight.shape, generator=torch.Generator().manual_seed(0)
        )  # the same on all devices
        with torch.no_grad():
            net.out[2].weight.copy_(head)
            results += [
                net(x.to(device), t.to(device)).cpu(),
                lean_forward(net, [x.to(device)], t.to(device)).cpu(),
            ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_lean_on_a_gpu_is_the_plain_result_from_less_memory(amp):
    device = torch.device("cuda:0")
    dtype = runtime.number_format(amp, device)[0]
    net = patchddm.build_model(patchddm.Config(channel_mult=(1, 3, 4)), 8, 1).to(device).eval()
    torch.nn.init.normal_(net.out[2].weight)
    x, t = torch.randn(1, 8, 64, 64, 64, device=device), torch.zeros(1, device=device)
    found = {}
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
        for form in (None, 0, 16):
            call = lambda form=form: net(x, t) if form is None else lean_forward(net, [x], t, form)  # noqa: E731
            result = call().float()
            found[form] = (result, runtime.measure(call, device)[1])
    torch.testing.assert_close(
        found[0][0], found[None][0], atol=0 if dtype else 1e-5, rtol=0 if dtype else 1e-4
    )
    torch.testing.assert_close(
        found[16][0], found[None][0], atol=5e-2 if dtype else 1e-4, rtol=5e-2 if dtype else 1e-4
    )
    assert found[0][1] < 0.8 * found[None][1] and found[16][1] < 0.7 * found[None][1]


@pytest.mark.slow
def test_compiled_training_has_nearly_the_plain_weights(tmp_path):
    states = []
    for flag in ("--no-compile", "--compile"):
        argv = [
            "train",
            *FAST,
            "--device",
            "cpu",
            "--amp",
            "off",
            "--out",
            str(tmp_path / flag),
            "--steps",
            "3",
            flag,
        ]
        assert patchddm.main(argv) == 0
        states.append(runtime.load_checkpoint(tmp_path / flag / "last.pt", "patchddm")["model"])
    for k in states[0]:
        torch.testing.assert_close(states[0][k], states[1][k], atol=1e-4, rtol=1e-2)
