"""Blocks of the U-Net that the public diffusion codes share (guided-diffusion and its descendants).

Blocks, not networks: each script puts its own network together from them. Parameter names and shapes are those of
the public state dicts, so public checkpoints load (`load_public`). Everything works in two and three dimensions:
tensors are [B, C, X, Y] or [B, C, X, Y, Z], the spatial sizes written as `*S` below.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(dims: int, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """Convolution with zero padding that keeps the size at stride 1; `dims` is 1, 2 or 3."""
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return layer(c_in, c_out, kernel, stride=stride, padding=kernel // 2)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter to zero: a residual branch that starts as nothing, a head that starts at 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of the fed time: [cos(t f_k), sin(t f_k)], f_k = max_period^(-k / (dim // 2)).

    t: [B], any number type, in the units the network was trained with (no scaling here). Returns fp32 [B, dim]; an
    odd `dim` ends with one zero column. Source: Ho et al. 2020 in the public codes' order (cosines first).
    """
    half = dim // 2
    freq = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)  # [half]
    angle = t.float()[:, None] * freq[None]  # [B, half]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2))  # [B, dim]


class _GroupNorm(torch.autograd.Function):
    """Group norm with fp32 sums that keeps for backward its input as it came, 16-bit or not, and nothing else.

    Autocast would make an fp32 copy of a 16-bit input and keep it: twice the memory of the input itself, in every
    norm of the network. Here a copy lives only while the kernel runs. Backward works on contiguous copies: with
    channels last, the CPU kernel takes five times as long as the copying.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
        # The CPU kernel takes a 16-bit input with fp32 parameters and sums in fp32, the CUDA kernel does not.
        wide = x.float() if x.is_cuda and x.dtype != torch.float64 else x
        n, c, size = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.ops.aten.native_group_norm(wide, weight, bias, n, c, size, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # mean, rstd: [B, groups]
        ctx.groups = groups
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, weight, mean, rstd = ctx.saved_tensors
        n, c, size = x.shape[0], x.shape[1], x[0, 0].numel()
        wide, up = x.contiguous(), grad.contiguous()
        if x.is_cuda and x.dtype != torch.float64:
            wide, up = wide.float(), up.float()
        dx, dw, db = torch.ops.aten.native_group_norm_backward(
            up, wide, mean, rstd, weight, n, c, size, ctx.groups, [True] * 3
        )
        return torch.empty_like(x).copy_(dx), dw, db, None, None  # in the layout of x


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` (eps 1e-5, affine) with statistics in fp32 and the input's number type going in and out.

    Raises ValueError where a group would hold one single value: PyTorch raises at batch 1 and silently returns the
    bias at larger batches.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() == self.num_groups:
            raise ValueError(
                f"GroupNorm({self.num_groups}) meets a {tuple(x.shape[1:])} map, one value a group: a larger patch, "
                "fewer levels (--channel-mult) or fewer groups (--num-groups) are needed"
            )
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class Upsample(nn.Module):
    """Nearest neighbour, twice as large along every axis, then (optionally) a 3^dims convolution."""

    def __init__(self, dims: int, channels: int, use_conv: bool = True):
        super().__init__()
        self.conv = conv(dims, channels, channels) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *S] -> [B, C, *2S]
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Half the size along every axis: a convolution of stride 2, or the mean of 2^dims values."""

    def __init__(self, dims: int, channels: int, use_conv: bool = True):
        super().__init__()
        pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims]
        self.op = conv(dims, channels, channels, stride=2) if use_conv else pool(2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *S] -> [B, C, *S/2]
        return self.op(x)


class ResBlock(nn.Module):
    """norm-SiLU-conv, the time, norm-SiLU-(dropout)-conv, plus the shortcut.

    dims: 2 or 3. emb_channels: width of the time embedding, None for a network without time. groups: of both norms.
    scale_shift: the time scales and shifts the second norm's output, h (1 + s) + b, instead of being added before
    it. resample: "up" or "down" doubles or halves the map inside the block (nearest, mean), in both branches.
    The last convolution starts at zero, so a new block is its shortcut (which starts as a random 1^dims convolution
    where the width changes).
    Source: Dhariwal & Nichol 2021; the additive form is Bieder et al. 2023's.
    """

    def __init__(
        self,
        dims: int,
        c_in: int,
        c_out: int,
        emb_channels: int | None,
        groups: int,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: Literal["up", "down"] | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in), nn.SiLU(), conv(dims, c_in, c_out))
        if emb_channels is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, c_out * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out), nn.SiLU(), nn.Dropout(dropout), zero_module(conv(dims, c_out, c_out))
        )
        self.skip_connection = nn.Identity() if c_in == c_out else conv(dims, c_in, c_out, kernel=1)
        self.resample: nn.Module | None = None
        if resample is not None:
            self.resample = (Upsample if resample == "up" else Downsample)(dims, c_in, use_conv=False)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x: [B, c_in, *S], emb: [B, emb_channels] or None; returns [B, c_out, *S'] (S' = S, 2S or S/2)."""
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)  # [B, c_out, *S']
        norm, *rest = self.out_layers
        if emb is None:
            h = norm(h)
        else:
            e = self.emb_layers(emb).to(h.dtype)
            e = e[(...,) + (None,) * (h.ndim - 2)]  # [B, c_out or 2 c_out, 1, ...]
            if self.scale_shift:
                scale, shift = e.chunk(2, dim=1)
                h = norm(h) * (1 + scale) + shift
            else:
                h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a map, plus the shortcut; the projection starts at zero.

    head_channels: width of a head (`channels` must be a multiple). heads_first: the 3C outputs of `qkv` are ordered
    [head, (q, k, v), channel], the public codes' default ("old") order; False is [(q, k, v), head, channel].
    The order cannot be read from a checkpoint. Source: Dhariwal & Nichol 2021.
    """

    def __init__(self, channels: int, head_channels: int, groups: int, heads_first: bool = True):
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"attention over {channels} channels in heads of {head_channels}: not a multiple; "
                "choose --num-head-channels or --num-channels so that it divides"
            )
        self.heads, self.heads_first = channels // head_channels, heads_first
        self.norm = GroupNorm(groups, channels)
        self.qkv = conv(1, channels, 3 * channels, kernel=1)
        self.proj_out = zero_module(conv(1, channels, channels, kernel=1))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *S] -> [B, C, *S]
        b, c = x.shape[:2]
        qkv = self.qkv(self.norm(x).reshape(b, c, -1))  # [B, 3C, N], N = number of positions
        if self.heads_first:
            qkv = qkv.reshape(b, self.heads, 3, c // self.heads, -1).permute(2, 0, 1, 4, 3)
        else:
            qkv = qkv.reshape(b, 3, self.heads, c // self.heads, -1).permute(1, 0, 2, 4, 3)
        q, k, v = qkv.unbind(0)  # each [B, heads, N, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C / heads)) v
        h = h.transpose(2, 3).reshape(b, c, -1)  # [B, C, N]
        return x + self.proj_out(h).reshape(x.shape)


class EmbedSequential(nn.Sequential):
    """A sequence that hands the time embedding to its ResBlocks and to nothing else."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


# Which flags decide the shape of a tensor, by a part of its name; the first match counts.
_FLAGS = (
    ("input_blocks.0.0.", "--num-channels and the inputs (image channels of the data, --coords, number of classes)"),
    ("out.2.", "--num-channels and the outputs (number of classes, --task)"),
    ("time_embed.", "--num-channels"),
    ("qkv", "--attention-resolutions, --num-head-channels"),
    ("proj_out", "--attention-resolutions, --num-head-channels"),
    ("emb_layers", "--num-channels, --channel-mult, and additive or scale-shift time"),
    ("output_blocks.", "--num-channels, --channel-mult, --num-res-blocks, --skips"),
    ("", "--num-channels, --channel-mult, --num-res-blocks"),
)


def load_public(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a public state dict (guided-diffusion's key layout) into `model`, strictly.

    state: name -> tensor; any float type, the prefix `module.` of data-parallel training is dropped. Nothing is
    loaded in part: ValueError names the first tensor that is missing, left over or of another shape, both shapes,
    and the flags that set it. The number of groups of the norms cannot be seen in a state dict.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    own = model.state_dict()
    for name in [*own, *(k for k in state if k not in own)]:
        here = tuple(own[name].shape) if name in own else None
        there = tuple(state[name].shape) if name in state else None
        if here != there:
            flags = next(text for part, text in _FLAGS if part in name)
            raise ValueError(
                f"{name} is {there or 'absent'} in the checkpoint and {here or 'absent'} in this network "
                f"({len(state)} and {len(own)} tensors); it is set by {flags}"
            )
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def public_flags(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Network flags read off the shapes of a public state dict with convolutional up and down sampling.

    Returns num_channels, channel_mult, num_res_blocks, skips, and num_groups = num_channels: the groups cannot be seen,
    this is PatchDDM's rule. Raises KeyError or IndexError where `state` is no such network.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    c = state["input_blocks.0.0.weight"].shape[0]
    mult: list[int] = []
    blocks, k = 0, 1
    while f"input_blocks.{k}.0.in_layers.2.weight" in state or f"input_blocks.{k}.0.op.weight" in state:
        if f"input_blocks.{k}.0.op.weight" not in state:
            width = state[f"input_blocks.{k}.0.in_layers.2.weight"].shape[0]
            first = k == 1 or f"input_blocks.{k - 1}.0.op.weight" in state
            mult, blocks = (mult + [width // c], 1) if first else (mult, blocks + 1)
        k += 1
    average = state["output_blocks.0.0.in_layers.0.weight"].shape[0] == mult[-1] * c
    skips = "average" if average else "concat"
    return {"num_channels": c, "channel_mult": tuple(mult), "num_res_blocks": blocks, "num_groups": c, "skips": skips}
