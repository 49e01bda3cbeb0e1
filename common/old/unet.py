"""Blocks of the U-Net that the public diffusion codes share (guided-diffusion and its descendants).

Blocks, not networks: each script puts its own network together from them. Parameter names and shapes are those of
the public state dicts, so public checkpoints load (`load_public`). Everything works in two and three dimensions:
tensors are [B, C, X, Y] or [B, C, X, Y, Z], the spatial sizes written as `*S` below.
"""

import errno
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
    module.starts_at_zero = True  # type: ignore[assignment]  # for redraw_zeros
    return module


def redraw_zeros(model: nn.Module) -> None:
    """Give each layer that started at zero (zero_module) PyTorch's usual random weights instead.

    A network whose branches are all zero is a linear map of its input and does not see t: a poor control for what
    training adds to it.
    """
    for module in model.modules():
        if getattr(module, "starts_at_zero", False):
            module.reset_parameters()  # type: ignore[operator]


def fast_layout(model: Any, compiled: bool = False) -> Any:
    """Channels last on a CPU, where a step then takes a tenth to a third less; torch.compile chooses by itself."""
    sample = next(p for p in model.parameters() if p.ndim > 3)
    if sample.device.type != "cpu" or compiled:
        return model
    return model.to(
        memory_format=torch.channels_last_3d if sample.ndim == 5 else torch.channels_last
    )


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of the fed time: [cos(t f_k), sin(t f_k)], f_k = max_period^(-k / (dim // 2)).

    t: [B], any number type, in the units the network was trained with (no scaling here). Returns fp32 [B, dim]; an
    odd `dim` ends with one zero column. Source: Ho et al. 2020 in the public codes' order (cosines first).
    """
    half = dim // 2
    freq = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )  # [half]
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
            self.emb_layers = nn.Sequential(
                nn.SiLU(), nn.Linear(emb_channels, c_out * (2 if scale_shift else 1))
            )
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv(dims, c_out, c_out)),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else conv(dims, c_in, c_out, kernel=1)
        self.resample: nn.Module | None = None
        if resample is not None:
            self.resample = (Upsample if resample == "up" else Downsample)(
                dims, c_in, use_conv=False
            )

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


# ---------------------------------------------------------------------------------------------------------------------
# Features of single pixels
# ---------------------------------------------------------------------------------------------------------------------
# What few-shot classifiers of diffusion features share. A bilinear enlargement and a linear layer can change places,
# W up(f) + b = up(W f) + b, so that the enlarged features, gigabytes an image, need never exist.


def up(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, c, h, w] -> [B, c, H, W], linearly between pixel centres, as features are enlarged."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pixels_of(x: Tensor, where: Tensor, size: Sequence[int]) -> Tensor:
    """The rows of up(x, size) at pixels `where` [P, 2] (row, column), without enlarging: [1, c, h, w] -> [P, c]."""
    rows, columns = where[:, 0], where[:, 1]
    at = torch.stack(
        [(2 * columns + 1) / size[1] - 1, (2 * rows + 1) / size[0] - 1], dim=1
    )  # [P, 2], x first
    # border, not zeros: centres of the outermost pixels lie outside those of the native map
    found = F.grid_sample(
        x, at.to(x)[None, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return found[0, :, 0].T


class PixelClassifier(nn.Module):
    """Three layers on the feature vector of a pixel; ReLU, then batch norm, as the public codes order them.

    widths: channels of each feature map, in order; their sum is the vector's length. classes: with background.
    batch_norm: False leaves it out, and draws the weights so that their outputs have the inputs' variance (He et al.).
    Source: Baranchuk et al. 2022.
    """

    def __init__(self, widths: Sequence[int], classes: int, batch_norm: bool = True):
        super().__init__()
        a, b = (128, 32) if classes < 30 else (256, 128)
        self.widths = list(widths)
        self.first = nn.Linear(sum(widths), a)
        norm = nn.BatchNorm1d if batch_norm else nn.Identity
        self.rest = nn.Sequential(
            nn.ReLU(), norm(a), nn.Linear(a, b), nn.ReLU(), norm(b), nn.Linear(b, classes)
        )
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02 if batch_norm else math.sqrt(2 / m.in_features))
                nn.init.zeros_(m.bias)

    def enlarge(
        self, maps: Sequence[Tensor], by: Tensor, size: Sequence[int], where: Tensor | None = None
    ) -> Tensor:
        """W up(f) / by + b for all pixels of a window [H W, a], or for those in `where` [P, 2]: [P, a].

        maps: [1, c, h, w] each. The layer works on the native maps, and only its few channels are enlarged.
        """
        sums: dict[tuple[int, ...], Tensor] = {}  # maps of one size are enlarged once, as their sum
        for f, weight in zip(maps, self.first.weight.split(self.widths, dim=1)):
            f = f.contiguous(
                memory_format=torch.channels_last
            )  # then rows of pixels need no copy below
            small = F.conv2d(f, (weight / by)[..., None, None])  # [1, a, h, w]
            sums[small.shape[2:]] = (
                sums[small.shape[2:]] + small if small.shape[2:] in sums else small
            )
        if where is not None:
            return self.first.bias + sum(
                pixels_of(small, where, size) for small in sums.values()
            )  # [P, a]
        total: Any = sum(up(small, size) for small in sums.values())  # [1, a, H, W]
        return total.permute(0, 2, 3, 1).flatten(0, 2) + self.first.bias  # [H W, a]

    def forward(
        self, maps: Sequence[Tensor], by: Tensor, size: Sequence[int], where: Tensor | None = None
    ) -> Tensor:
        return self.rest(self.enlarge(maps, by, size, where))  # [P, classes]


class FeatureStore:
    """Native maps of all labelled images in one memory-mapped file, fp16, and their pixels by number.

    file: made anew, left to the caller to remove; count: of images; size: (rows, columns) of each. A pixel's neighbours
    lie together on disk ([image, row, column, channel]), so that a batch of random pixels reads little. Classes of 1
    to 19 pixels in an image are not learned from, as in the public codes, nor is the value 255.
    """

    def __init__(self, file: Path, count: int, size: tuple[int, int]):
        self.file, self.count, self.size = file, count, size
        self.shapes: list[tuple[int, ...]] = []  # [c, h, w] of each map
        self.starts: list[int] = []  # in the file, of each map of each image
        self.labels: list[np.ndarray] = []
        self.divisors: list[float] = []

    @cached_property
    def label(self) -> np.ndarray:
        """[all pixels] uint8, once all images are there."""
        return np.concatenate(self.labels)

    @cached_property
    def pixels(self) -> np.ndarray:
        """Numbers of the pixels to learn from."""
        return np.nonzero(self.label != 255)[0]

    def add(self, maps: Sequence[Tensor], by: float, label: np.ndarray) -> None:
        """maps [1, c, h, w], what divides them, and the classes [rows, columns] of the next image."""
        if not self.shapes:
            self.shapes = [tuple(m.shape[1:]) for m in maps]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            total = sum(m.numel() for m in maps) * self.count
            self.values = np.lib.format.open_memmap(self.file, "w+", np.float16, (total,))
            if hasattr(
                os, "posix_fallocate"
            ):  # a map that outgrows the disk would end the process without a word
                with open(self.file, "r+b") as f:
                    try:
                        os.posix_fallocate(f.fileno(), 0, self.file.stat().st_size)
                    except OSError as error:
                        if error.errno in (
                            errno.ENOSPC,
                            errno.EDQUOT,
                            errno.EFBIG,
                        ):  # else it cannot be told here
                            raise OSError(error.errno, error.strerror, str(self.file)) from error
        at = len(self.divisors) * sum(m.numel() for m in maps)
        for m in maps:
            self.starts.append(at)
            small = m[0].permute(1, 2, 0).clamp(-65504, 65504).half()  # what fp16 holds
            self.values[at : at + m.numel()] = small.cpu().numpy().ravel()
            at += m.numel()
        label = np.array(label, np.uint8).ravel()
        counts = np.bincount(label, minlength=256)
        label[np.isin(label, np.nonzero((counts > 0) & (counts < 20))[0])] = 255
        self.labels.append(label)
        self.divisors.append(by)

    def gather(self, pixels: np.ndarray) -> np.ndarray:
        """Feature vectors [P, D] fp32 of pixels (numbers over all images): bilinear between their four neighbours."""
        image, inside = np.divmod(pixels, self.size[0] * self.size[1])
        rows, columns = np.divmod(inside, self.size[1])
        parts = []
        for k, (c, h, w) in enumerate(self.shapes):
            y, x = (
                (v + 0.5) * n / full - 0.5 for v, n, full in zip((rows, columns), (h, w), self.size)
            )
            y, x = np.clip(y, 0, h - 1), np.clip(x, 0, w - 1)
            y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
            fy, fx = (y - y0).astype(np.float32)[:, None], (x - x0).astype(np.float32)[:, None]
            first = np.array(self.starts)[image * len(self.shapes) + k]

            def read(yy: np.ndarray, xx: np.ndarray) -> np.ndarray:
                at = first + (np.minimum(yy, h - 1) * w + np.minimum(xx, w - 1)) * c  # noqa: B023  (used at once)
                return self.values[at[:, None] + np.arange(c)].astype(np.float32)  # [P, c]  # noqa: B023

            top = (1 - fx) * read(y0, x0) + fx * read(y0, x0 + 1)
            bottom = (1 - fx) * read(y0 + 1, x0) + fx * read(y0 + 1, x0 + 1)
            parts.append((1 - fy) * top + fy * bottom)
        return np.concatenate(parts, axis=1) / np.array(self.divisors, np.float32)[image][:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Lean inference
# ---------------------------------------------------------------------------------------------------------------------
# The plain forward keeps much that nobody reads again. Here a tensor goes with its last use, a sum is written into one
# of its terms, the cheapest skip is computed twice, and with slabs the input of a convolution never exists as a whole.


def _slabs(
    make: Callable[[int, int], Tensor], size: int, slab: int, layer: Any, into: Tensor | None = None
) -> Tensor:
    """A 3^3 convolution of stride 1, `slab` slices of its output at a time: a new tensor, or added to `into`.

    make(a, b): slices a..b-1 along X of the convolution's input, [B, C, b - a, Y, Z]. size: of its X axis.
    """
    add = into is not None
    for lo in range(0, size, slab):
        hi = min(lo + slab, size)
        a, b = max(lo - 1, 0), min(hi + 1, size)  # one more slice on each side, where there is one
        part = make(a, b)
        if b - a < hi - lo + 2:  # zeros stand at the ends of the volume, never between two slabs
            part = F.pad(part, (0, 0, 0, 0, a - lo + 1, hi + 1 - b))
        part = F.conv3d(part, layer.weight, layer.bias, padding=(0, 1, 1))  # [B, C', hi - lo, Y, Z]
        if into is None:
            layout = torch.channels_last_3d if part.stride(1) == 1 else torch.contiguous_format
            shape = (*part.shape[:2], size, *part.shape[3:])
            into = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        target = into[:, :, lo:hi]
        (target.add_ if add else target.copy_)(part)
    assert into is not None
    return into


def _norm_silu(norm: Any, x: Tensor, film: Sequence[Tensor]) -> Callable[[int, int], Tensor]:
    """SiLU(norm(x)), or SiLU(norm(x) (1 + film[0]) + film[1]), as a function of the slices asked for.

    The statistics are those of the whole map: mean and variance of each slice and channel in fp32, put together in
    float64 as the mean of the variances plus the variance of the means, which a mean far from 0 cannot spoil.
    """
    b, c, size, *plane = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    # One tensor for all: small ones between large ones that come and go leave gigabytes of holes in a CPU's memory.
    moments = torch.empty(2, size, b, c, dtype=torch.float64, device=x.device)
    for i, piece in enumerate(x.unbind(2)):  # [B, C, Y, Z]
        piece = piece.to(wide)
        mean = piece.mean((2, 3), keepdim=True)
        moments[0, i], moments[1, i] = mean[..., 0, 0], (piece - mean).square_().mean((2, 3))
    means, variances = moments.reshape(2, size, b, norm.num_groups, -1)
    centre = means.mean((0, 3), keepdim=True)  # [1, B, groups, 1]
    var = (variances + (means - centre) ** 2).mean((0, 3), keepdim=True)
    centre, var = (v.expand_as(means[:1]).flatten().to(wide) for v in (centre, var))  # [B C]
    weight, bias = (
        p.to(wide).repeat(b, 1)[..., None, None, None] for p in (norm.weight, norm.bias)
    )  # [B, C, 1, 1, 1]
    if film:
        weight, bias = weight * (1 + film[0]), bias * (1 + film[0]) + film[1]

    def make(lo: int, hi: int) -> Tensor:
        # Once its statistics are known, group norm is batch norm in eval mode, of one sample with B C channels.
        part = x[:, :, lo:hi].reshape(1, b * c, hi - lo, *plane)
        part = F.batch_norm(part, centre, var, weight.flatten(), bias.flatten(), eps=norm.eps)
        return F.silu(part, inplace=True).reshape(b, c, hi - lo, *plane)

    return make


def _norm_silu_conv(
    norm: Any,
    layer: Any,
    x: list[Tensor],
    slab: int,
    film: Sequence[Tensor] = (),
    into: Tensor | None = None,
) -> Tensor:
    """layer(SiLU(norm(x) (1 + film[0]) + film[1])), added to `into` if given. The list x may be emptied."""
    if 0 < slab < x[0].shape[2]:
        return _slabs(_norm_silu(norm, x[0], film), x[0].shape[2], slab, layer, into)
    h = norm(x.pop())
    if film:
        h.mul_(1 + film[0]).add_(film[1])
    h = layer(F.silu(h, inplace=True))
    return h if into is None else into.add_(h) if into.dtype == h.dtype else into + h


def _lean_block(block: Any, x: list[Tensor], emb: Tensor, slab: int, own: bool) -> None:
    """Put a block's output in the place of its input, the one tensor in the list x, and into it where it is `own`."""
    h = x.pop()
    device = next(block.parameters(), h).device  # a network may be spread over several GPUs
    h, emb = h.to(device), emb.to(device)
    for layer in block:
        if isinstance(layer, ResBlock):
            hidden = [_norm_silu_conv(layer.in_layers[0], layer.in_layers[2], [h], slab)]
            e = layer.emb_layers(emb).to(hidden[0].dtype)[(...,) + (None,) * (h.ndim - 2)]
            film = e.chunk(2, dim=1) if layer.scale_shift else ()
            if not film:
                hidden[0].add_(e)
            short = layer.skip_connection(h)
            h = h.clone() if short is h and not own else short
            h = _norm_silu_conv(
                layer.out_layers[0], layer.out_layers[3], hidden, slab, film, into=h
            )
            del short, hidden
        elif not isinstance(layer, Upsample) or layer.conv is None:
            h = layer(h)
        elif 0 < slab < 2 * h.shape[2]:

            def make(a: int, b: int, h: Tensor = h) -> Tensor:
                up = F.interpolate(h[:, :, a // 2 : (b + 1) // 2], scale_factor=2, mode="nearest")
                return up[:, :, a % 2 : a % 2 + b - a]

            h = _slabs(make, 2 * h.shape[2], slab, layer.conv)
        else:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = layer.conv(h)
        own = True  # by now it is a tensor made here
    x.append(h)


@torch.no_grad()
def lean_forward(model: Any, x: list[Tensor], t: Tensor, slab: int = 0) -> Tensor:
    """`model(x, t)` in eval mode, with few full-resolution tensors at a time.

    model: a U-Net of these blocks with time_embed, width, average, input_blocks, middle_block, output_blocks and out
    (where a ResBlock resamples it is simply called). x: a list of one tensor [B, C_in, *S], taken out at its last use
    and never written into. t: [B]. slab: 0 gives the plain result bit by bit; N > 0 works in slabs of N slices along
    X, 3D only, the result equal up to rounding. Returns [B, C_out, *S] on the device of x.
    The network of Bieder et al. 2023 at 256^3 holds at most 7.0 maps of full resolution (each 1.95 GB in fp32, 0.97 GB
    in bf16, the input not counted) when called, 4.0 here, 3.4 with slabs of 16. Without slabs a GPU holds more in 16
    bits, since its norm works on an fp32 copy.
    """
    if slab and x[0].ndim != 5:
        raise ValueError(
            f"slab={slab} meets an input of shape {tuple(x[0].shape)}; slabs are for 3D, use slab=0"
        )
    if any(isinstance(m, ResBlock) and m.resample is not None for m in model.modules()):
        return model(x.pop(), t)
    device, (first, *encoder) = x[0].device, model.input_blocks
    emb = model.time_embed(timestep_embedding(t, model.width))  # [B, 4C]
    h, skips = (
        [first(x[0])],
        [],
    )  # a list of one, since a variable of each caller would keep its tensor alive
    for i, block in enumerate(encoder):
        _lean_block(
            block, h, emb, slab, own=i == 0
        )  # the input of every other block is a skip that is kept
        skips.append(h[0])
    _lean_block(model.middle_block, h, emb, slab, own=False)
    for block in model.output_blocks:
        # The first convolution's output would be the skip kept longest, and it is the cheapest to make again.
        skip = (skips.pop() if skips else first(x.pop())).to(h[0].device)
        if model.average and h[0].dtype == skip.dtype:
            h[0].add_(skip).mul_(0.5)
        else:
            h = [(h.pop() + skip) / 2 if model.average else torch.cat([h.pop(), skip], dim=1)]
        del skip  # or it lives until the next block has ended
        _lean_block(block, h, emb, slab, own=True)
    norm, _, layer = model.out
    return _norm_silu_conv(norm, layer, [h.pop().to(norm.weight.device)], slab).to(device)


# Which flags decide the shape of a tensor, by a part of its name; the first match counts.
_FLAGS = (
    (
        "input_blocks.0.0.",
        "--num-channels and the inputs (image channels of the data, --coords, number of classes)",
    ),
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
    while (
        f"input_blocks.{k}.0.in_layers.2.weight" in state
        or f"input_blocks.{k}.0.op.weight" in state
    ):
        if f"input_blocks.{k}.0.op.weight" not in state:
            width = state[f"input_blocks.{k}.0.in_layers.2.weight"].shape[0]
            first = k == 1 or f"input_blocks.{k - 1}.0.op.weight" in state
            mult, blocks = (mult + [width // c], 1) if first else (mult, blocks + 1)
        k += 1
    average = state["output_blocks.0.0.in_layers.0.weight"].shape[0] == mult[-1] * c
    skips = "average" if average else "concat"
    return {
        "num_channels": c,
        "channel_mult": tuple(mult),
        "num_res_blocks": blocks,
        "num_groups": c,
        "skips": skips,
    }
