"""Lean inference: the plain network's numbers from less memory."""

import math
import weakref
from collections import Counter
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import patchddm as P
from common.old import runtime, unet


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and their largest sum; works on `meta`, where nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()  # tensors on each storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
                self.now += size * (self.count[key] == 0)
                self.count[key] += 1
                weakref.finalize(tensor, self.drop, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, key: int, size: int) -> None:
        self.count[key] -= 1
        self.now -= size * (self.count[key] == 0)


def network(seed: int = 0, outputs: int = 2, **flags) -> P.UNet:
    """A small network none of whose layers is zero, as new ones are."""
    torch.manual_seed(seed)
    settings = {
        "num_channels": 6,
        "channel_mult": (1, 2, 3),
        "num_groups": 3,
        "num_res_blocks": 2,
        "patch": (8,),
    }
    net = P.build_model(P.Config(**settings | flags), 4, outputs).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.3)
    return net


def all_kept(net: P.UNet, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The plainest form: no skip is let go."""
    emb = net.time_embed(unet.timestep_embedding(t, net.width))
    skips = []
    for block in net.input_blocks:
        x = block(x, emb)
        skips.append(x)
    x = net.middle_block(x, emb)
    for block, skip in zip(net.output_blocks, reversed(skips)):
        x = (x + skip) / 2
        x = block(x, emb)
    return net.out(x)


def peak(net: P.UNet, x: torch.Tensor, form: int | None) -> int:
    t = torch.zeros(1, device=x.device)
    with Live() as live, torch.no_grad():
        all_kept(net, x, t) if form is None else unet.lean_forward(net, [x], t, form)
    return live.peak


SKIPS, LAYOUTS = ("average", "concat"), (torch.contiguous_format, torch.channels_last_3d)


@pytest.mark.parametrize(
    "skips, layout, number", [*product(SKIPS, LAYOUTS, (None, torch.bfloat16))]
)
def test_lean_is_the_plain_result_bit_by_bit(skips, layout, number):
    net = network(skips=skips).to(memory_format=layout)
    x, t = torch.randn(2, 4, 8, 12, 16), torch.tensor([3, 700])
    kept = x.clone()
    with torch.no_grad(), torch.autocast("cpu", number, enabled=number is not None):
        plain, lean = net(x, t), unet.lean_forward(net, [x], t)
    assert lean.dtype == plain.dtype and torch.equal(lean, plain) and plain.std() > 0.01
    assert torch.equal(x, kept)


@pytest.mark.parametrize("slab", [1, 2, 3, 5, 7, 8, 100])
def test_slabs_give_the_plain_result_up_to_rounding(slab):
    net = network(num_res_blocks=1)
    x, t = torch.randn(2, 4, 8, 12, 16) + 3, torch.tensor([3, 700])
    with torch.no_grad():
        plain = net(x, t)
    lean = unet.lean_forward(net, [x], t, slab)
    assert (lean - plain).abs().max() < 1e-5 * plain.abs().max()


def test_slabs_see_the_volumes_ends_and_their_neighbours():
    """A spike at a slab's border and one in the first slice reach what the convolutions of the plain form reach."""
    net = network(num_res_blocks=1)
    x, t = torch.zeros(1, 4, 16, 8, 8), torch.tensor([5])
    for at in (0, 3, 4, 15):
        spiked = x.clone()
        spiked[:, :, at, 4, 4] = 50
        with torch.no_grad():
            plain = net(spiked, t)
        assert (
            unet.lean_forward(net, [spiked], t, 4) - plain
        ).abs().max() < 1e-5 * plain.abs().max()


def test_a_network_trained_for_scale_and_shift_or_attention_is_read_the_same():
    """What other scripts put together: both forms of time, attention after a block, resampling blocks."""

    class Other(torch.nn.Module):
        def __init__(self, resample: bool):
            super().__init__()
            self.width, self.average = 8, False
            self.time_embed = torch.nn.Linear(8, 32)

            def block(a: int, b: int, r=None) -> unet.ResBlock:
                return unet.ResBlock(2, a, b, 32, 4, scale_shift=True, resample=r)

            down = block(8, 8, "down") if resample else unet.Downsample(2, 8)
            up = block(16, 16, "up") if resample else unet.Upsample(2, 16)
            self.input_blocks = torch.nn.ModuleList(
                [
                    unet.EmbedSequential(unet.conv(2, 3, 8)),
                    unet.EmbedSequential(block(8, 8)),
                    unet.EmbedSequential(down),
                    unet.EmbedSequential(block(8, 16), unet.AttentionBlock(16, 8, 4)),
                ]
            )
            self.middle_block = unet.EmbedSequential(
                block(16, 16), unet.AttentionBlock(16, 8, 4), block(16, 16)
            )
            self.output_blocks = torch.nn.ModuleList(
                [
                    unet.EmbedSequential(block(32, 16)),
                    unet.EmbedSequential(block(24, 16), up),
                    unet.EmbedSequential(block(24, 8)),
                    unet.EmbedSequential(block(16, 8)),
                ]
            )
            self.out = torch.nn.Sequential(
                unet.GroupNorm(4, 8), torch.nn.SiLU(), unet.conv(2, 8, 2)
            )

        def forward(self, x, t):
            emb, skips = self.time_embed(unet.timestep_embedding(t, 8)), []
            for block in self.input_blocks:
                x = block(x, emb)
                skips.append(x)
            x = self.middle_block(x, emb)
            for block in self.output_blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), emb)
            return self.out(x)

    for resample in (False, True):
        torch.manual_seed(1)
        net = Other(resample).eval()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 9])
        with torch.no_grad():
            plain = net(x, t)
        assert torch.equal(unet.lean_forward(net, [x], t), plain)
    with pytest.raises(ValueError, match="slabs are for 3D"):
        unet.lean_forward(net, [x], t, 4)


@pytest.mark.parametrize("form, most, maps", [(0, 0.66, 4.01), (16, 0.56, 3.46)])
def test_peak_of_the_papers_network_at_256(form, most, maps):
    """Of the plain network's tensors (the input not counted), as bytes of what is alive, without computing anything."""
    with torch.device("meta"):
        net, x = P.build_model(P.Config(), 8, 1).eval(), torch.empty(1, 8, 256, 256, 256)
        plain = peak(net, x, None)
        one = 29 * 256**3 * 4  # a map of the first level
        assert 7.9 < plain / one < 8.3
        assert peak(net, x, form) < min(most * plain, maps * one)
        net.bfloat16()
        net.time_embed.float()
        for block in net.modules():
            if isinstance(block, unet.ResBlock):
                block.emb_layers.float()
        half = peak(net, x.bfloat16(), form)
        assert half < 0.52 * most * plain


def test_measure_sees_time_and_memory():
    seconds, gb = runtime.measure(lambda: torch.ones(50_000_000).add_(1), torch.device("cpu"))
    assert 0 < seconds < 20 and (math.isnan(gb) or 0.19 < gb < 0.35)
    _, small = runtime.measure(lambda: torch.ones(10), torch.device("cpu"))
    assert math.isnan(small) or small < 0.02
