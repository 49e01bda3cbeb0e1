"""Blocks of the U-Net that the public diffusion codes share, and guided-diffusion's 2D network.

Names and shapes of the parameters are those of the public state dicts, so public checkpoints load.
All blocks work in two and three dimensions: a map is [B, C, *S], with S = (Y, X) or (X, Y, Z).

Without gradients a block writes into tensors that nobody reads again, so sampling a whole volume
needs about half of the memory. The numbers stay the same.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import InputError


def conv(dims: int, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """Return a convolution with zero padding, which keeps the size at stride 1; dims: 1, 2, 3."""
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return layer(c_in, c_out, kernel, stride=stride, padding=kernel // 2)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter to zero: a residual branch that adds nothing, a head that gives 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    module.starts_at_zero = True  # type: ignore[assignment]
    return module


def redraw_zeros(model: nn.Module) -> None:
    """Give each layer of zero_module random weights, for a control that was never trained.

    A network whose residual branches are all zero is a linear map of its input, too poor a control.
    """
    for module in model.modules():
        if getattr(module, "starts_at_zero", False):
            module.reset_parameters()  # type: ignore[operator]


def fast_layout(model: Any) -> Any:
    """Return the model with channels last on a CPU, where a step then takes up to a third less."""
    weight = next(p for p in model.parameters() if p.ndim > 3)
    if weight.device.type != "cpu":
        return model
    last = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
    return model.to(memory_format=last)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Return [cos(t f_k), sin(t f_k)], f_k = max_period^(-k / (dim // 2)), fp32 [B, dim].

    t: [B], in the units that the network was trained with. An odd `dim` ends with a zero column.
    Source: Ho et al. 2020, in the public codes' order.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    freq = torch.exp(-math.log(max_period) * k / half)  # [half]
    angle = t.float()[:, None] * freq[None]  # [B, half]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2))  # [B, dim]


def plus(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b, written into `a` where no gradient is needed."""
    if torch.is_grad_enabled() or a.dtype != b.dtype:
        return a + b
    return a.add_(b)


class _GroupNorm(torch.autograd.Function):
    """Group norm in fp32 that keeps a 16-bit input for backward as it is.

    Autocast would keep an fp32 copy of it: twice the memory of the input, in every norm.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
        # The CPU's kernel takes 16-bit input with fp32 parameters, the GPU's does not.
        wide = x.float() if x.is_cuda and x.dtype != torch.float64 else x
        n, c, size = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.ops.aten.native_group_norm(
            wide, weight, bias, n, c, size, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)  # mean, rstd: [B, groups]
        ctx.groups = groups
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, weight, mean, rstd = ctx.saved_tensors
        n, c, size = x.shape[0], x.shape[1], x[0, 0].numel()
        # With channels last, the CPU's kernel takes five times as long as these copies.
        wide, up = x.contiguous(), grad.contiguous()
        if x.is_cuda and x.dtype != torch.float64:
            wide, up = wide.float(), up.float()
        dx, dw, db = torch.ops.aten.native_group_norm_backward(
            up, wide, mean, rstd, weight, n, c, size, ctx.groups, [True] * 3
        )
        return torch.empty_like(x).copy_(dx), dw, db, None, None


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with statistics in fp32; the output has the input's dtype.

    Raises InputError where a group would hold one single value, for which PyTorch returns the bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() == self.num_groups:
            raise InputError(
                f"a norm of {self.num_groups} groups meets a map {tuple(x.shape[1:])}, one value a "
                "group; use a larger patch or image, fewer levels or fewer groups"
            )
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class Upsample(nn.Module):
    """Nearest neighbour, twice as large along every axis, then (optionally) a convolution."""

    def __init__(self, dims: int, channels: int, use_conv: bool = True):
        super().__init__()
        self.conv = conv(dims, channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *S] -> [B, C, *2S]
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Half the size along every axis: a convolution of stride 2, or the mean of 2^dims values."""

    def __init__(self, dims: int, channels: int, use_conv: bool = True):
        super().__init__()
        pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims]
        self.op = conv(dims, channels, channels, stride=2) if use_conv else pool(2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *S] -> [B, C, *S/2]
        return self.op(x)


class ResBlock(nn.Module):
    """norm-SiLU-conv, the time, norm-SiLU-conv, plus the shortcut.

    emb_channels: width of the time embedding, None for a network without time. The time is added
    before the second norm or, with scale_shift, scales and shifts its output: h (1 + s) + b.
    resample: the block doubles or halves the map, in both branches. The last convolution starts at
    zero, so a new block is its shortcut. Source: Dhariwal & Nichol 2021; additive: Bieder 2023.
    """

    def __init__(
        self,
        dims: int,
        c_in: int,
        c_out: int,
        emb_channels: int | None,
        groups: int,
        scale_shift: bool = False,
        resample: Literal["up", "down"] | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in), nn.SiLU(), conv(dims, c_in, c_out))
        if emb_channels is not None:
            wide = 2 * c_out if scale_shift else c_out
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, wide))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out),
            nn.SiLU(),
            nn.Identity(),  # dropout in the public codes
            zero_module(conv(dims, c_out, c_out)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if c_in != c_out:
            self.skip_connection = conv(dims, c_in, c_out, kernel=1)
        self.resample: nn.Module | None = None
        if resample is not None:
            layer = Upsample if resample == "up" else Downsample
            self.resample = layer(dims, c_in, use_conv=False)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x: [B, c_in, *S], emb: [B, emb_channels]. Return [B, c_out, *S'], S' = S, 2S or S/2."""
        lean = not torch.is_grad_enabled()
        h = F.silu(self.in_layers[0](x), inplace=lean)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)  # [B, c_out, *S']
        norm = self.out_layers[0]
        if emb is None:
            h = norm(h)
        else:
            e = self.emb_layers(emb).to(h.dtype)
            e = e[(...,) + (None,) * (h.ndim - 2)]  # [B, c_out or 2 c_out, 1, ...]
            if self.scale_shift:
                scale, shift = e.chunk(2, dim=1)
                h = norm(h)
                h = h.mul_(1 + scale) if lean else h * (1 + scale)
                h = plus(h, shift)
            else:
                h = norm(plus(h, e))
        h = self.out_layers[3](F.silu(h, inplace=lean))
        return plus(h, self.skip_connection(x))


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a map, plus the shortcut; the projection starts at 0.

    heads_first: the 3C outputs of `qkv` are ordered [head, (q, k, v), channel], the public codes'
    default; else [(q, k, v), head, channel]. A checkpoint does not tell the order.
    Raises ValueError unless head_channels divides channels. Source: Dhariwal & Nichol 2021.
    """

    def __init__(self, channels: int, head_channels: int, groups: int, heads_first: bool = True):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"heads of {head_channels} channels do not divide {channels}")
        self.heads, self.heads_first = channels // head_channels, heads_first
        self.norm = GroupNorm(groups, channels)
        self.qkv = conv(1, channels, 3 * channels, kernel=1)
        self.proj_out = zero_module(conv(1, channels, channels, kernel=1))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *S] -> [B, C, *S]
        b, c = x.shape[:2]
        qkv = self.qkv(self.norm(x).reshape(b, c, -1))  # [B, 3C, N], N positions
        if self.heads_first:
            qkv = qkv.reshape(b, self.heads, 3, c // self.heads, -1).permute(2, 0, 1, 4, 3)
        else:
            qkv = qkv.reshape(b, 3, self.heads, c // self.heads, -1).permute(1, 0, 2, 4, 3)
        q, k, v = qkv.unbind(0)  # each [B, heads, N, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C / heads)) v
        h = self.proj_out(h.transpose(2, 3).reshape(b, c, -1))  # [B, C, N]
        return plus(h.reshape(x.shape), x)


class EmbedSequential(nn.Sequential):
    """A sequence that hands the time embedding to its ResBlocks and to nothing else."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def run(block: nn.Module, x: Tensor, emb: Tensor | None, recompute: bool) -> Tensor:
    """Return block(x, emb). recompute: backward computes it again and keeps nothing inside."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, emb, use_reentrant=False, preserve_rng_state=False)
    return block(x, emb)


class UNet(nn.Module):
    """guided-diffusion's 2D U-Net: residual blocks, attention at coarse maps, concatenated skips.

    Called as model(x, t): x [B, C_in, Y, X], sides multiples of 2^(levels - 1); t [B], from 0 on.
    Returns [B, C_out, Y, X]. attention: levels, 0 for the finest, whose blocks attend; the middle
    always does. adm: time scales and shifts, blocks resample, heads of head_channels; else time is
    added, convolutions resample, and attention has one head (Ho et al. 2020). timed: False leaves
    out all that belongs to t.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        mult: tuple[int, ...],
        num_res_blocks: int,
        attention: Collection[int],
        head_channels: int = 64,
        groups: int = 32,
        adm: bool = True,
        timed: bool = True,
        recompute: bool = False,
    ):
        super().__init__()
        self.width, self.timed, self.recompute = width, timed, recompute
        emb = 4 * width if timed else None
        if timed:
            self.time_embed = nn.Sequential(
                nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
            )

        def block(a: int, b: int) -> ResBlock:
            return ResBlock(2, a, b, emb, groups, scale_shift=adm)

        def attend(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, head_channels if adm else channels, groups)

        def down(channels: int) -> nn.Module:
            if adm:
                return ResBlock(2, channels, channels, emb, groups, True, resample="down")
            return Downsample(2, channels)

        def up(channels: int) -> nn.Module:
            if adm:
                return ResBlock(2, channels, channels, emb, groups, True, resample="up")
            return Upsample(2, channels)

        # Encoder. The output of every block is a skip; a level ends with a block that halves.
        self.input_blocks = nn.ModuleList([EmbedSequential(conv(2, in_channels, width))])
        skips, c = [width], width  # channels
        for level, m in enumerate(mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(c, width * m)]
                c = width * m
                if level in attention:
                    layers.append(attend(c))
                self.input_blocks.append(EmbedSequential(*layers))
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(EmbedSequential(down(c)))
                skips.append(c)
        self.middle_block = EmbedSequential(block(c, c), attend(c), block(c, c))

        # Decoder. Block k is output_blocks[k]; the last one of a level doubles the map.
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(num_res_blocks + 1):
                layers = [block(c + skips.pop(), width * m)]
                c = width * m
                if level in attention:
                    layers.append(attend(c))
                if level > 0 and i == num_res_blocks:
                    layers.append(up(c))
                self.output_blocks.append(EmbedSequential(*layers))
        head = zero_module(conv(2, c, out_channels))
        self.out = nn.Sequential(GroupNorm(groups, c), nn.SiLU(), head)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Return the middle block's output, the skips from fine to coarse, the embedded time."""
        emb = self.time_embed(timestep_embedding(t, self.width)) if self.timed else None  # [B, 4c]
        skips = []
        for block in self.input_blocks:
            x = run(block, x, emb, self.recompute)  # [B, c m, Y / 2^level, X / 2^level]
            skips.append(x)
        return run(self.middle_block, x, emb, self.recompute), skips, emb

    def decode(
        self, x: Tensor, skips: list[Tensor], emb: Tensor | None, blocks: Collection[int] = ()
    ) -> list[Tensor]:
        """Return the outputs of these decoder blocks, or of the last one, [B, c, Y, X].

        Takes the skips out of their list, and stops after the last block that is asked for.
        """
        wanted = blocks or [len(self.output_blocks) - 1]
        maps = {}
        for k, block in enumerate(self.output_blocks[: max(wanted) + 1]):
            x = run(block, torch.cat([x, skips.pop()], dim=1), emb, self.recompute)
            if k in wanted:
                maps[k] = x
        return [maps[k] for k in wanted]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.decode(*self.encode(x, t))[0])  # [B, C_out, Y, X]


# --------------------------------------------------------------------------------------------------
# Public state dicts
# --------------------------------------------------------------------------------------------------


def load_public(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a public state dict (guided-diffusion's key layout) into the model, all of it.

    The prefix `module.` of data-parallel training is dropped. Raises ValueError that names the
    first tensor that is missing, left over or of another shape; nothing is loaded then.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    ours = model.state_dict()
    for name in [*ours, *(k for k in state if k not in ours)]:
        here = tuple(ours[name].shape) if name in ours else "absent"
        there = tuple(state[name].shape) if name in state else "absent"
        if here != there:
            raise ValueError(
                f"{name} is {there} in the file and {here} in this network "
                f"({len(state)} and {len(ours)} tensors)"
            )
    model.load_state_dict({name: value.to(ours[name].dtype) for name, value in state.items()})


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the network's sizes off a public state dict with convolutions that resample.

    Returns in_channels, out_channels, num_channels, channel_mult, num_res_blocks, skips. The number
    of groups of a norm cannot be read. Raises KeyError where it is no such network.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    c, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    mult: list[int] = []
    counts: list[int] = []  # blocks of each level
    level_starts = True
    k = 1
    while (
        f"input_blocks.{k}.0.op.weight" in state
        or f"input_blocks.{k}.0.in_layers.2.weight" in state
    ):
        if f"input_blocks.{k}.0.op.weight" in state:
            level_starts = True
        elif level_starts:
            mult.append(state[f"input_blocks.{k}.0.in_layers.2.weight"].shape[0] // c)
            counts.append(1)
            level_starts = False
        else:
            counts[-1] += 1
        k += 1
    meets = state["output_blocks.0.0.in_layers.0.weight"].shape[0]  # channels, with their skip
    return {
        "in_channels": in_channels,
        "out_channels": state["out.2.weight"].shape[0],
        "num_channels": c,
        "channel_mult": tuple(mult),
        "num_res_blocks": counts[0],
        "skips": "average" if meets == mult[-1] * c else "concat",
    }
