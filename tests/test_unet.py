"""The blocks against closed forms and against public networks' weights, inputs and outputs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from common.unet import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    UNet,
    Upsample,
    _GroupNorm,
    load_public,
    redraw_zeros,
    timestep_embedding,
)

FIXTURES = (
    Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / "shared")) / "data" / "fixtures"
)
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(),
    reason="public networks' weights and outputs are not beside this checkout (SHARED_DIR)",
)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers in every parameter, those that start at zero included."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return module


def test_timestep_embedding_equals_spec_values():
    e5 = timestep_embedding(torch.tensor([7]), 5)[0]
    expected = torch.tensor([0.753902254343, 0.997551000253, 0.656986598719, 0.069942847338, 0.0])
    torch.testing.assert_close(e5, expected, atol=1e-6, rtol=0)
    e29 = timestep_embedding(torch.tensor([500]), 29)[0]
    assert e29.shape == (29,) and e29[-1] == 0
    picked = e29[[0, 1, 14, 15]]
    expected = torch.tensor([-0.883849273431, 0.206170699338, -0.467771805322, 0.978516041123])
    torch.testing.assert_close(picked, expected, atol=3e-5, rtol=0)  # 500 rad in fp32: 3e-5


def test_timestep_embedding_separates_neighbouring_times():
    e = timestep_embedding(torch.arange(1000), 32)
    assert torch.cdist(e, e).fill_diagonal_(9).min() > 0.01


def test_groupnorm_equals_closed_form():
    x = torch.randn(2, 6, 3, 4, 5)
    norm = GroupNorm(3, 6)
    randomise(norm)
    g = x.reshape(2, 3, -1)
    z = (
        (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    ).reshape(x.shape)
    expected = z * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]
    torch.testing.assert_close(norm(x), expected, atol=2e-6, rtol=1e-5)


def test_groupnorm_of_16_bit_sums_in_fp32_and_keeps_no_fp32_copy():
    x = (
        (torch.randn(1, 8, 20, 20, 20) * 0.1 + 30).to(torch.bfloat16).requires_grad_()
    )  # mean far above the spread
    norm = GroupNorm(8, 8)
    reference = F.group_norm(x.detach().float(), 8, norm.weight, norm.bias)
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - reference).abs().max() < 0.04  # bf16 rounding of values up to 4
    assert max(t.numel() for t in kept if t.dtype == torch.float32) <= 8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groupnorm_has_the_gradients_of_the_formula_in_any_layout(layout, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6, 7).to(dtype).to(memory_format=layout)
    w, b, up = torch.randn(8), torch.randn(8), torch.randn(x.shape).to(dtype)
    results = []
    for forward in (
        lambda x, w, b: _GroupNorm.apply(x, w, b, 4, 1e-5),
        lambda x, w, b: F.group_norm(x.float(), 4, w, b).to(x.dtype),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = forward(*leaves)
        y.backward(up)
        results.append([y.detach(), *(t.grad for t in leaves)])
    assert results[0][1].stride() == x.stride()
    for ours, reference in zip(*results):
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            ours, reference, atol=tolerance, rtol=tolerance, check_stride=False
        )


def test_groupnorm_refuses_one_value_a_group():
    with pytest.raises(InputError, match="one value a group"):
        GroupNorm(4, 4)(torch.randn(2, 4, 1, 1, 1))
    GroupNorm(2, 4)(torch.randn(1, 4, 1, 1, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_upsample_repeats_and_downsample_averages(dims):
    x = torch.randn(1, 2, *(4,) * dims)
    up = Upsample(dims, 2, use_conv=False)(x)
    expected = x
    for axis in range(2, 2 + dims):
        expected = expected.repeat_interleave(2, dim=axis)
    assert torch.equal(up, expected)
    torch.testing.assert_close(Downsample(dims, 2, use_conv=False)(up), x)
    assert Downsample(dims, 2)(x).shape == (1, 2, *(2,) * dims)
    assert Upsample(dims, 2)(x).shape == (1, 2, *(8,) * dims)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_resblock_equals_its_formula(dims, scale_shift):
    block = randomise(ResBlock(dims, 4, 6, 8, groups=2, scale_shift=scale_shift))
    x, emb = torch.randn(2, 4, *(5,) * dims), torch.randn(2, 8)
    F_conv = {2: F.conv2d, 3: F.conv3d}[dims]
    p = dict(block.named_parameters())
    h = F.silu(F.group_norm(x, 2, p["in_layers.0.weight"], p["in_layers.0.bias"]))
    h = F_conv(h, p["in_layers.2.weight"], p["in_layers.2.bias"], padding=1)
    e = (F.silu(emb) @ p["emb_layers.1.weight"].T + p["emb_layers.1.bias"]).reshape(
        2, -1, *(1,) * dims
    )
    if scale_shift:
        h = (
            F.group_norm(h, 2, p["out_layers.0.weight"], p["out_layers.0.bias"]) * (1 + e[:, :6])
            + e[:, 6:]
        )
    else:
        h = F.group_norm(h + e, 2, p["out_layers.0.weight"], p["out_layers.0.bias"])
    h = F_conv(F.silu(h), p["out_layers.3.weight"], p["out_layers.3.bias"], padding=1)
    expected = F_conv(x, p["skip_connection.weight"], p["skip_connection.bias"]) + h
    torch.testing.assert_close(block(x, emb), expected, atol=1e-4, rtol=1e-4)


def test_resblock_starts_as_its_shortcut():
    x, emb = torch.randn(1, 4, 6, 6, 6), torch.randn(1, 8)
    assert torch.equal(ResBlock(3, 4, 4, 8, groups=4)(x, emb), x)


def test_resblock_without_time_has_no_time_layers():
    block = ResBlock(2, 4, 4, None, groups=2)
    assert not [k for k in block.state_dict() if k.startswith("emb")]
    assert block(torch.randn(1, 4, 6, 6)).shape == (1, 4, 6, 6)


@pytest.mark.parametrize("scale_shift, resample", [(False, None), (True, None), (True, "up")])
def test_blocks_without_gradients_give_the_same_and_spare_their_input(scale_shift, resample):
    block = randomise(ResBlock(2, 4, 6, 8, 2, scale_shift, resample))
    attention = randomise(AttentionBlock(6, 3, 2))
    x, emb = torch.randn(2, 4, 6, 6), torch.randn(2, 8)
    kept = x.clone()
    plain = attention(block(x, emb)).detach()
    with torch.no_grad():
        assert torch.equal(attention(block(x, emb)), plain)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("heads_first", [True, False])
def test_attention_equals_explicit_softmax(heads_first):
    block = randomise(AttentionBlock(8, 4, groups=2, heads_first=heads_first))
    x = torch.randn(2, 8, 3, 5)
    qkv = block.qkv(block.norm(x).reshape(2, 8, 15))  # [2, 24, 15]
    heads = []
    for i in range(2):
        if heads_first:
            q, k, v = qkv[:, 12 * i : 12 * i + 12].chunk(3, dim=1)
        else:
            q, k, v = (qkv[:, 8 * j + 4 * i : 8 * j + 4 * i + 4] for j in range(3))
        weight = torch.softmax(q.transpose(1, 2) @ k / 4**0.5, dim=-1)  # [2, 15, 15]
        heads.append((weight @ v.transpose(1, 2)).transpose(1, 2))
    expected = x + block.proj_out(torch.cat(heads, dim=1)).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, atol=1e-4, rtol=1e-4)


@needs_fixtures
def test_public_2d_network_agrees_at_every_decoder_block():
    z = np.load(FIXTURES / "guided_diffusion_2d_tiny.npz")
    info = json.loads((FIXTURES / "guided_diffusion_2d_tiny.json").read_text())
    model = UNet(3, 6, 32, (1, 2), 2, attention={1}, head_channels=16)
    state = {k: torch.from_numpy(z[k]) for k in z.files if "." in k and not k.startswith("act/")}
    load_public(model, state)
    assert sum(p.numel() for p in model.parameters()) == info["parameters"]
    x, t = torch.from_numpy(z["x"]), torch.from_numpy(z["t"])
    with torch.no_grad():
        middle, skips, emb = model.encode(x, t)
        maps = {"middle_block": middle, "time_embed": emb}
        for k, values in enumerate(model.decode(middle, skips, emb, range(6))):
            maps[f"output_blocks.{k}"] = values
        out = model(x, t)
        out_b = model(x, torch.from_numpy(z["t_b"]))
    compared = [key for key in z.files if key.startswith("act/")]
    assert len(compared) == 8
    for key in compared:
        torch.testing.assert_close(maps[key[4:]], torch.from_numpy(z[key]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out, torch.from_numpy(z["out"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out_b, torch.from_numpy(z["out_b"]), atol=1e-5, rtol=0)


def test_network_without_time_ignores_it_and_recompute_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = UNet(1, 1, 8, (1, 2), 1, {1}, groups=4, adm=False, timed=False, recompute=recompute)
        redraw_zeros(model)
        x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        out = model(x, torch.tensor([3]))
        assert torch.equal(out, model(x, torch.tensor([900]))) and out.abs().max() > 0
        out.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_decoder_stops_after_the_last_block_asked_for_and_keeps_its_maps():
    model = randomise(UNet(1, 1, 8, (1, 2), 1, set(), head_channels=8, groups=4))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    with torch.no_grad():
        every = model.decode(*model.encode(x, t), range(4))
        some = model.decode(*model.encode(x, t), [2, 0])
    assert torch.equal(some[0], every[2]) and torch.equal(some[1], every[0])


def test_load_public_names_the_first_mismatch():
    model = nn.Sequential()
    model.add_module("time_embed", nn.Linear(4, 8))
    good = {k: v.clone() for k, v in model.state_dict().items()}
    load_public(model, {f"module.{k}": v.half() for k, v in good.items()})
    with pytest.raises(
        ValueError, match=r"time_embed\.weight is \(1, 4\) in the file and \(8, 4\)"
    ):
        load_public(model, {**good, "time_embed.weight": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match=r"time_embed\.weight is absent in the file"):
        load_public(model, {k: v for k, v in good.items() if k != "time_embed.weight"})
    with pytest.raises(ValueError, match=r"extra is \(1,\) in the file and absent"):
        load_public(model, {**good, "extra": torch.zeros(1)})


def test_load_public_loads_nothing_after_a_mismatch():
    model = nn.Linear(3, 3)
    before = model.weight.clone()
    with pytest.raises(ValueError):
        load_public(model, {"weight": torch.ones(3, 3), "bias": torch.ones(4)})
    assert torch.equal(model.weight, before)
