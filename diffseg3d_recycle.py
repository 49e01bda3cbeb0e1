"""DiffSeg3D with recycling: 3D segmentation by diffusion in five steps, trained on its own output.

Paper
    Y. Fu, Y. Li, S. U. Saeed, M. J. Clarkson, Y. Hu: Importance of Aligning Training Strategy with
    Evaluation for Diffusion Models in 3D Multiclass Segmentation. DGM4MICCAI 2023.

Idea
    A diffusion model makes a mask out of noise and sees the image as extra channels. It is usually
    trained on the true mask with noise. With little noise the truth still shows, and the network
    learns to copy it. In use there is no truth. So (1) x_k is made of the network's own prediction
    at the noisier step k + 1: "recycling", two passes, a gradient through the second only; (2) the
    mask is predicted, not the noise, with (3) a Dice loss, (4) on the five levels of sampling.

Symbols
    I         image  [B, M, *S]  M channels in [0, 1], spread to --image-range; S = (X, Y, Z)
    x_0       x0     [B, C, *S]  mask: 1 in the channel of its class, else -1; background first
    x_k       xk     [B, C, *S]  mask with noise, k = 1..K; k = 0 is the mask; never clipped
    eps_k     eps    [B, C, *S]  standard normal noise
    t_k       t[k]   step of the original T = 1000; K = 5: 1, 251, 501, 750, 1000
    abar_k    abar[k]    product of 1 - beta_s for s = 1..t_k; abar[0] = 1
    btilde_k  btilde[k]  beta_k (1 - abar_{k-1}) / (1 - abar_k), beta_k = 1 - abar_k / abar_{k-1}
    alpha_k = 1 - beta_k; x_{0,theta} is the predicted mask, 2 softmax(logits) - 1 or eq. (10)

Equations
    (1) mu = sqrt(abar_{k-1}) beta_k / (1 - abar_k) x_{0,theta}
             + sqrt(alpha_k) (1 - abar_{k-1}) / (1 - abar_k) x_k
    (2) mu = (x_k - beta_k / sqrt(1 - abar_k) eps_theta) / sqrt(alpha_k): (1) with (10) put in
    (3) x_{k+1} = sqrt(abar_{k+1}) x_0 + sqrt(1 - abar_{k+1}) eps_{k+1}
    (4) x_{0,theta} = StopGradient(x_{0,theta}(I, k + 1, x_{k+1}))
    (5) x_k = sqrt(abar_k) x_{0,theta} + sqrt(1 - abar_k) eps_k
    (6) L = L_seg(x_0, x_{0,theta}(I, k, x_k)), L_seg = cross-entropy + Dice
    (7) L = || eps_k - eps_theta(I, k, x_k) ||^2, 0.1 times beside (6); (7) to (11) predict noise
    (8) x_{k+1} as in (3)
    (9) eps_{k+1,theta} = StopGradient(eps_theta(I, k + 1, x_{k+1}))
    (10) x_{0,theta} = (x_{k+1} - sqrt(1 - abar_{k+1}) eps_{k+1,theta}) / sqrt(abar_{k+1})
    (11) x_k as in (5)

Differs
    D1  t_k is an even grid from 1 to T, and btilde_k is made of abar_k. Version 2 prints btilde of
        the fine schedule; the public code has four levels and visits the last one twice.
    D2  The time is added after a block's norm. In the public code it is added before, and the norm
        takes every constant away: that network cannot see the time.
    D3  A sampling step has the variance btilde_k, as in the paper; in the public code beta_k.
    D4  A mask of predicted noise is clipped to [-1, 1]; else errors at k = K count 157 times.
    D5  Recycling at k = K starts from K with other noise, as in the public code.
    D6  The Dice loss is a mean over the classes that a volume holds; the public code pools volumes.
    D7  The best checkpoint is by foreground Dice; in the public code background counts, too.
    D8  Augmentation works in mm, shifts by up to 8 % of an axis and keeps the foreground inside.
        The public code works in voxels (5 degrees become 16) and shifts by fixed numbers of them.
    D9  Noise is a function of (seed, case, member, k); in the public code all cases have the same.
    D10 An ensemble is the mean probability; in the public code the masks vote.
    D11 Volumes larger than --size: random windows in training; in sampling the mean of windows at
        each step. The paper crops all volumes to one size.
    D12 Images are scaled by data_prep, not after cropping; predict never crops.
    D13 All presets but paper have a smaller batch, and a larger rate that warms up and falls until
        the last step; tiny and laptop also have a smaller network.
    D14 All presets but paper spread the image to [-2.5, 2.5]; else noise of SD 1 drowns it.

Usage
    python diffseg3d_recycle.py                            train, sample and score on phantoms
    python -m data_prep.msd --src Task04_Hippocampus --dst data/hippocampus
    python diffseg3d_recycle.py train --data hippocampus
    python diffseg3d_recycle.py evaluate --data hippocampus --ensemble 5
    python diffseg3d_recycle.py predict --data hippocampus --image scan.nii.gz --output mask.nii.gz
    torchrun --nproc_per_node=8 diffseg3d_recycle.py --data prostate --preset paper
    python -m results.diffseg_rivals --recycle recursive   how others make x_k; 2D networks
    results/diffseg3d_story.sh trains it recycled, not recycled and as a U-net, side by side.

Expect
    The default run takes about two minutes on two cores of a server CPU. It prints scores of ten
    unseen phantoms, mean Dice 0.93 to 0.95, and the Dice after each step, from k = 5 to k = 1.
"""

import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from common import InputError, figures, flags, loaders, metrics, runtime, tables, unet
from common.flags import flag
from common.runtime import Ranks, noise, say, seed_of

SCRIPT = "diffseg3d_recycle"
T = 1000  # steps of the original schedule; t = 1..T, and k = 1..K of them, in this file

# ==================================================================================================
# Config
# ==================================================================================================


@dataclass(frozen=True)
class Config(flags.RunFlags):
    """The flags of the method; flags.RunFlags has those of every script, such as --data.

    flag(default, help, part, smallest, largest). The defaults are the paper's, the tables those of
    version 2.
    """

    script = SCRIPT
    method: Literal["diffusion", "unet"] = flag("diffusion", "unet: the baseline, table 2", "model")
    num_channels: int = flag(32, "width at full size, unit of --channel-mult", "model", 1)
    channel_mult: tuple[int, ...] = flag((1, 2, 4, 8), "widths of the levels below", "model", 1)
    image_range: tuple[float, ...] = flag((0.0, 1.0), "LOW,HIGH of the image (D14)", "model")
    target: Literal["x0", "eps"] = flag("x0", "predict mask or noise, table 3a", "model")
    recycle: Literal["prev", "max", "none"] = flag("prev", "from k + 1, K, never, table 1", "train")
    dice: Literal["on", "off"] = flag("on", "Dice loss beside cross-entropy, table 3b", "train")
    train_K: int = flag(5, "noise levels in training, table 3c: 1000", "train", 2, T)
    seed: int = flag(0, "of weights, order, augmentation and noise", "train", 0)
    size: tuple[int, ...] = flag((), "voxels X,Y,Z (D11); default: whole volumes", "train", 1)
    augment: Literal["on", "off"] = flag("on", "turn, scale and shift (D8)", "train")
    batch: int = flag(8, "volumes of a step, over all processes", "train", 1)
    lr: float = flag(1e-4, "largest learning rate", "train", 1e-12, 1)
    lr_steps: int = flag(10_000, "step where it is down to lr / 100; 0: the last", "train", 0)
    ema: float = flag(0.0, "decay of the averaged weights; 0: off", "train", 0, 0.999999)
    steps: int = flag(12_500, "optimisation steps", "speed", 1)
    eval_every: int = flag(500, "steps between validations", "speed", 1)
    save_every: int = flag(500, "steps between saves", "speed", 1)
    sampling_steps: int = flag(0, "K; 0: as trained, or 5 after --train-K 1000", "use", 0, T)
    eta: float = flag(1.0, "noise of a step: 0 DDIM, 1 DDPM (paper)", "use", 0, 1)
    ensemble: int = flag(1, "members: samples from different noise", "use", 1)
    save: Literal["masks", "maps", "all"] = flag("masks", "maps: means too; all: members", "use")

    @property
    def K(self) -> int:
        """Noise levels of sampling. The U-net's are one step, which does not look at x_k."""
        trained = 5 if self.train_K == T else self.train_K
        return 1 if self.method == "unet" else self.sampling_steps or trained

    def __post_init__(self) -> None:
        """Check the ranges, then the rules between flags. Raises InputError that names the flag."""
        flags.check_ranges(self)
        if len(self.size) not in (0, 3) or len(self.image_range) != 2:
            raise InputError("--size is X,Y,Z and --image-range LOW,HIGH; give as many numbers")
        if self.method == "unet" and self.target == "eps":
            raise InputError("--method unet has no noise to predict; use --target x0")
        known = self.sampling_steps == self.train_K or self.train_K == T
        if self.sampling_steps == 1 or (self.sampling_steps and not known):
            text = f"--sampling-steps is {self.sampling_steps}, the levels of the training are "
            raise InputError(f"{text}{self.train_K}; leave it out, or train with --train-K 1000")


SMALL: dict[str, Any] = {"num_channels": 12, "lr_steps": 0, "workers": 0}  # D13
SMALL |= {"image_range": (-2.5, 2.5), "eval_every": 250}  # D14
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": SMALL
    | {"channel_mult": (1, 2, 4), "size": (32, 32, 32), "batch": 4, "lr": 3e-3}
    | {"steps": 500, "save_every": 100},
    "laptop": SMALL | {"batch": 2, "lr": 1e-3, "steps": 2000, "save_every": 250},
    # The paper's network, one night on a GPU of 24 GB: about 0.6 s a step. It was not run.
    "gpu": {"image_range": (-2.5, 2.5), "lr_steps": 0, "batch": 2, "lr": 5e-4, "steps": 40_000},
    "paper": {},
}

# ==================================================================================================
# Model
# ==================================================================================================


def gelu(x: Tensor) -> Tensor:
    """Return GELU in its tanh form, written into x where no gradient is needed."""
    if torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    return torch.ops.aten.gelu_(x, approximate="tanh")


class ResBlock(nn.Module):
    """GELU(h + x), h = conv-norm-GELU-conv-norm(x) + time; a norm's group is one channel."""

    def __init__(self, width: int, emb: int):  # emb: width of the time embedding, 0 for none
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.norm1 = unet.GroupNorm(width, width)
        self.norm2 = unet.GroupNorm(width, width)
        if emb:
            self.time = nn.Linear(emb, width)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:  # [B, c, *S], [B, emb]
        h = self.norm2(self.conv2(gelu(self.norm1(self.conv1(x)))))
        if emb is not None:
            time = self.time(emb).to(h.dtype)
            h = unet.plus(h, time[(...,) + (None,) * (h.ndim - 2)])  # [B, c, 1, ...]  # D2
        return gelu(unet.plus(h, x))


class UNet(nn.Module):
    """The U-net of section 4: a block a level, strided convolutions, transposed ones, added skips.

    Called as model(x, t): x [B, C, *S] of any size, of which the first in_channels count, and t [B]
    in 1..T, which counts if `timed`. Returns [B, C_out, *S]. mult: widths below full size.
    """

    def __init__(self, in_channels, out_channels, width=32, mult=(1, 2, 4, 8), timed=True):
        super().__init__()
        self.in_channels, self.recompute = in_channels, False
        self.emb = emb = 4 * width if timed else 0  # width of the time embedding
        down = [width, *(width * m for m in mult)]  # 32, 32, 64, 128, 256
        up = [*down[:0:-1], width]  # 256, 128, 64, 32, 32
        stem = nn.Conv3d(in_channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, unet.GroupNorm(width, width))
        self.first = ResBlock(width, emb)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv3d(a, b, 2, stride=2, bias=False), unet.GroupNorm(b, b))
            for a, b in pairwise(down)
        )
        self.down_blocks = nn.ModuleList(ResBlock(c, emb) for c in down[1:])
        self.ups = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, stride=2) for a, b in pairwise(up))
        self.up_blocks = nn.ModuleList(ResBlock(c, emb) for c in up[1:])
        self.head = nn.Conv3d(width, out_channels, 1)
        self.apply(start_as_haiku)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x[:, : self.in_channels]  # the baseline does not look at x_k
        emb = gelu(unet.timestep_embedding(t, self.emb)).to(x.dtype) if self.emb else None
        x = unet.run(self.first, gelu(self.stem(x)), emb, self.recompute)  # [B, width, *S]
        skips = []
        for down, block in zip(self.downs, self.down_blocks):
            skips.append(x)
            # JAX's padding: a zero voxel behind each odd axis; F.pad wants the last axis first.
            odd = [n % 2 for n in reversed(x.shape[2:])]
            if any(odd):
                x = F.pad(x, [side for n in odd for side in (0, n)])
            x = unet.run(block, down(x), emb, self.recompute)  # [B, width m, *ceil(S / 2)]
        for up, block in zip(self.ups, self.up_blocks):
            inside = tuple(slice(n) for n in (None, None, *skips[-1].shape[2:]))
            x = unet.plus(up(x)[inside], skips.pop())  # [B, width m', *S]
            x = unet.run(block, x, emb, self.recompute)
        return self.head(x)  # [B, C_out, *S]


def start_as_haiku(m: nn.Module) -> None:
    """Draw weights from a normal cut at 2 sigma, sigma = 1 / sqrt(inputs). Biases start at 0."""
    if isinstance(m, nn.modules.conv._ConvNd | nn.Linear):
        # A weight is [out, in, *kernel], of a transposed convolution [in, out, *kernel].
        inputs = m.weight[:, 0] if getattr(m, "transposed", False) else m.weight[0]
        sd = inputs.numel() ** -0.5
        nn.init.trunc_normal_(m.weight, std=sd, a=-2 * sd, b=2 * sd)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


def build_model(config: Config, in_channels: int, out_channels: int) -> UNet:
    """Return the network; in_channels: of the image and, for diffusion, of x_k, in this order."""
    timed = config.method == "diffusion"
    model = UNet(in_channels, out_channels, config.num_channels, config.channel_mult, timed)
    model.recompute = config.recompute
    return model


# ==================================================================================================
# Diffusion: schedule, q, recycling, loss
# ==================================================================================================


class Schedule(NamedTuple):
    """Tables [K + 1] over k = 0..K: t is integer, the others are float64."""

    t: Tensor
    abar: Tensor
    btilde: Tensor


@cache
def schedule(K: int, device: torch.device) -> Schedule:
    """Return K levels of the original T, whose beta rises from 1e-4 (t = 1) to 0.02 (t = T)."""
    fine = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, T))])  # abar of t = 0..T
    grid = 1 + np.arange(K) * (T - 1) / max(K - 1, 1)
    t = np.concatenate([[0], np.floor(grid + 0.5).astype(int)])  # D1
    abar = fine[t]
    before = np.concatenate([[1.0], abar[:-1]])  # abar_{k-1}
    btilde = (1 - abar / before) * (1 - before) / np.where(abar < 1, 1 - abar, 1)
    return Schedule(*(torch.tensor(table, device=device) for table in (t, abar, btilde)))


def at(values: Tensor, volume: Tensor) -> Tensor:
    """Return one value a sample, [B], as [B, 1, 1, 1, 1] in the dtype of a volume."""
    return values.to(volume.dtype).reshape(-1, *(1,) * (volume.ndim - 1))


def q_sample(s: Schedule, x0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
    """Return x_k: the mask x0 with noise eps of the level k [B] in 1..K."""
    abar = s.abar[k]
    return at(abar.sqrt(), x0) * x0 + at((1 - abar).sqrt(), x0) * eps


def x0_of(s: Schedule, target: str, output: Tensor, xk: Tensor, k: Tensor) -> Tensor:
    """Return the predicted mask x_{0,theta}; from logits it lies in [-1, 1], else it may not."""
    if target == "x0":
        return 2 * output.softmax(dim=1) - 1
    abar = s.abar[k]
    return (xk - at((1 - abar).sqrt(), xk) * output) / at(abar.sqrt(), xk)  # eq. (10)


def mask_to_x0(label: Tensor, channels: int) -> Tensor:
    """Turn labels [B, X, Y, Z] into x0 [B, C, X, Y, Z] in {-1, 1}, fp32, background first."""
    values = torch.arange(channels, device=label.device).reshape(1, -1, 1, 1, 1)
    return 2.0 * (label[:, None] == values) - 1


def segmentation_loss(logits: Tensor, label: Tensor, dice: bool = True) -> Tensor:
    """Return cross-entropy plus Dice loss, [B], of logits [B, C, *S] and label [B, *S]."""
    ce = F.cross_entropy(logits, label.long(), reduction="none").flatten(1).mean(dim=1)  # [B]
    if not dice:
        return ce
    y = (mask_to_x0(label, logits.shape[1])[:, 1:] > 0).flatten(2)  # [B, C - 1, X Y Z]
    p = logits.softmax(dim=1)[:, 1:].flatten(2)
    true = y.sum(dim=2)  # [B, C - 1]
    loss = 1 - 2 * (p * y).sum(dim=2) / (p.sum(dim=2) + true).clamp(min=1)
    present = true > 0
    return ce + (loss * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)  # D6


def diffusion_loss(s, target, output, label, xk, eps, k, dice=True) -> Tensor:
    """Return the loss [B] of an output for x_k; the truth is the mask, whatever made x_k."""
    if target == "x0":
        return segmentation_loss(output, label, dice)  # eq. (6)
    prob = (x0_of(s, target, output, xk, k) + 1) / 2
    loss = segmentation_loss(
        prob.clamp(1e-5, 1).log(), label, dice
    )  # its softmax rescales to sum 1
    return loss + 0.1 * (output - eps).square().flatten(1).mean(dim=1)  # eq. (7)


def recycling_loss(
    model, image, label, k, eps, other_eps, K=5, recycle="prev", target="x0", dice=True
) -> Tensor:
    """Return the loss of a training step, fp32 [B]: two passes, a gradient through the second.

    model(x, t) is fed image and x_k, [B, M + C, *S], and t_k; it gives logits (target x0) or noise
    (eps), [B, C, *S]. image [B, M, *S], label [B, *S], k [B] in 1..K; eps, other_eps: noise of the
    second and of the first pass, [B, C, *S]. recycle none: the usual training, one pass.
    Under autocast use cache_enabled=False: the first pass would cache cast weights without a
    gradient, and the second would use them.
    """
    s = schedule(K, image.device)
    x0 = mask_to_x0(label, eps.shape[1])
    source = x0  # what x_k is made of
    if recycle != "none":
        above = (k + 1).clamp(max=K) if recycle == "prev" else torch.full_like(k, K)  # D5
        x_above = q_sample(s, x0, other_eps, above)  # eq. (3), eq. (8)
        with torch.no_grad():
            output = model(torch.cat([image, x_above], dim=1), s.t[above]).float()
            source = x0_of(s, target, output, x_above, above).clamp(-1, 1)  # eq. (4), eq. (9)  # D4
    xk = q_sample(s, source, eps, k)  # eq. (5), eq. (11)
    output = model(torch.cat([image, xk], dim=1), s.t[k]).float()
    return diffusion_loss(s, target, output, label, xk, eps, k, dice)


# ==================================================================================================
# Data: volumes and their augmentation
# ==================================================================================================


def draw_affine(rng, label, spacing, rotate=0.088, scale=0.15, shift=0.08) -> np.ndarray:
    """Draw theta [3, 4]: for each axis a turn (radians), a scaling and a shift (part of the axis).

    Output voxel p reads c + A (p - c - tau), c the centre, tau the shift: an object at q comes to
    lie at c + tau + A^-1 (q - c). theta says so from -1 to 1 in the order z, y, x.
    """
    shape, d = np.array(label.shape), np.asarray(spacing, float)
    c = (shape - 1) / 2
    u = rng.uniform(-1, 1, (3, 3))
    turn = Rotation.from_euler("xyz", u[0] * rotate).as_matrix()
    a = (1 + u[1] * scale)[:, None] * turn * d / d[:, None]  # in mm, then in voxels
    high = np.floor(shift * shape + 0.5)
    low = -high
    if label.any():  # the box round the foreground, turned and scaled, stays inside  # D8
        sides = [np.flatnonzero(label.any(axis=axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))]
        corners = c + (np.array(list(product(*sides))) - c) @ np.linalg.inv(a).T  # [8, 3]
        low = np.maximum(low, -corners.min(axis=0))
        high = np.minimum(high, shape - 1 - corners.max(axis=0))
    tau = (low + high) / 2 + u[2] * np.maximum(high - low, 0) / 2  # it may fit nowhere: high < low
    half = np.maximum(c, 0.5)[:, None]
    theta = np.concatenate([a * half.T, -(a @ tau)[:, None]], axis=1) / half
    return theta[::-1, [2, 1, 0, 3]].copy()


@dataclass
class Volumes(Dataset):
    """Training samples n = 0, 1, 2, ...: each is a function of (seed, n), and n never ends."""

    data: Any  # see loaders.open_data: image(case) [M, X, Y, Z] in [0, 1], label(case)  # D12
    cases: list[str]
    size: Sequence[int]
    K: int = 5
    augmented: bool = True
    seed: int = 0

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
        """Return image [M, *size], label [*size], theta [3, 4], k in 1..K, and n."""
        epoch, place = divmod(n, len(self.cases))
        order = np.random.default_rng(seed_of(self.seed, "order", epoch))
        case = self.cases[order.permutation(len(self.cases))[place]]
        rng = np.random.default_rng(seed_of(self.seed, "volume", n))

        image, label = self.data.image(case), self.data.label(case)
        # A shorter axis is padded with 0 on both sides, of a longer one a random part is taken.
        start = [-front for front in loaders.symmetric_pad(label.shape, self.size)]
        for axis, (length, side) in enumerate(zip(label.shape, self.size)):
            if length > side:
                start[axis] = int(rng.integers(0, length - side + 1))  # D11
        image = loaders.read_window(image, start, self.size).astype(np.float32)
        label = loaders.read_window(label, start, self.size)
        spacing = self.data.spacing(case)
        theta = draw_affine(rng, label, spacing) if self.augmented else np.eye(3, 4)
        return image, label, theta, int(rng.integers(1, self.K + 1)), n


# ==================================================================================================
# Train
# ==================================================================================================


def train(config: Config, data: Any, ranks: Ranks) -> int:
    """Train the network. Returns 0, or 130 or 143 after a signal, with everything saved."""
    device = ranks.device
    dtype, reason = runtime.autocast_dtype(config.amp, device)
    record = loaders.data_record(data)
    cases = loaders.cases_to_score(data, "train")
    record["size"] = size = training_size(config, record, [data.shape(case) for case in cases])
    volumes = Volumes(data, cases, size, config.train_K, config.augment == "on", config.seed)
    val_cases = [case for case in data.cases("val") if data.has_label(case)]
    # The U-net is fed x_k, too, and reads only the image: one pass.
    recycle = config.recycle if config.method == "diffusion" else "none"
    warn_of_absent_classes(data, cases, ranks)

    # The network, its running average (what validation, evaluate and predict use), the optimiser.
    torch.manual_seed(seed_of(config.seed, "weights") % 2**32)
    model = network_for(config, record).to(device)
    if config.init:
        runtime.load_start(config.init, SCRIPT, model)
    shape = (config.batch // (ranks.world * config.accumulate), model.in_channels, *size)
    remedy = "try --accumulate, --recompute, or a smaller --size or --num-channels"
    runtime.check_memory(model, shape, dtype, device, True, remedy)
    model = unet.fast_layout(model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # The run folder. A checkpoint holds what is named here; the same command continues from it.
    columns = ["val_dice", *(f"val_dice_{name}" for name in data.scored)]
    run = runtime.Run(config, SCRIPT, record, ranks, columns)
    run.keep(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    step = run.resume()  # 0 for a new run
    differs = flags.departures(config, Config())
    run.print_header("DiffSeg3D, recycling (Fu et al. 2023)", data, model, step, reason, differs)

    # All processes work on parts of one global batch, and DDP averages their gradients.
    runtime.same_weights(model, ranks, "at the start")
    net: Any = DistributedDataParallel(model) if ranks.world > 1 else model
    net = torch.compile(net) if config.compile else net
    net.train()
    loader = DataLoader(
        volumes,
        batch_sampler=runtime.Shards(config.batch, config.accumulate, ranks, step, config.steps),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=runtime.ignore_signals,
    )
    batches = iter(loader)
    run.stopped()  # a resumed run may have used up its --minutes: sets run.time_up
    last = step == config.steps or run.time_up

    while True:
        # Validate when it is due. A run that was stopped in a validation begins with it.
        if (step % config.eval_every == 0 or last) and step > run.validated and val_cases:
            run.save(step)  # a validation can take long
            network = Network(replace(config, ensemble=1), ema, record, device, dtype, step)
            rows = score_cases(network, data, val_cases, ranks, stopped=run.stopped)
            if rows is not None:
                summary = tables.summarise(rows[1])
                dice = [v["dice"]["mean"] for v in (summary["mean"], *summary["classes"].values())]
                run.write_row(step, **dict(zip(columns, dice)))
                run.save_best(step, dice[0])  # D7
                say(f"step {step}: validation Dice {dice[0]:.3f}", ranks)
        if last or run.signal:
            break

        begin = time.perf_counter()
        lr = learning_rate(step, config.steps, config.lr, config.lr_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # One global batch: the share of this process, in config.accumulate parts.
        for part in range(config.accumulate):
            image, label, theta, k, n = next(batches)  # [B, M, *S], [B, *S], [B, 3, 4], [B], [B]
            image = image.to(device, non_blocking=True)
            label = label.to(device, non_blocking=True)
            k = k.to(device, non_blocking=True)
            if config.augment == "on":
                image, label = augment(image, label, theta)
            low, high = config.image_range
            image = low + (high - low) * image  # D14
            shape = (1 + len(record["classes"]), *size)
            eps = noise(config.seed, "eps", n.tolist(), shape, device)
            other = noise(config.seed, "eps of the first pass", n.tolist(), shape, device)
            # Gradients are shared between the processes with the last part only.
            shared = ranks.world == 1 or part == config.accumulate - 1
            with nullcontext() if shared else net.no_sync():
                # No cache: the second pass would use weights cast without gradient in the first.
                with torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False):
                    loss = recycling_loss(
                        net, image, label, k, eps, other,
                        config.train_K, recycle, config.target, config.dice == "on",
                    )  # [B]  # fmt: skip
                scaler.scale(loss.mean() / config.accumulate).backward()
            run.collect(loss, schedule(config.train_K, device).t[k] / T)  # for the log

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        finite = bool(norm.isfinite())  # the same on all processes
        if finite:  # else the step changes nothing, and the scaler lowers its scale
            scaler.step(optimizer)
            update_ema(ema, model, config.ema, step)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        run.seconds += time.perf_counter() - begin

        run.count_skip(step, finite)  # ends the run after 20 in a row
        stopped = run.stopped()  # Ctrl-C or SIGTERM on any process; also sets run.time_up
        last = step == config.steps or run.time_up
        run.log(step, lr=lr, grad_norm=norm)
        if stopped or last or step % config.save_every == 0:
            run.save(step)

    runtime.same_weights(model, ranks, "at the end")
    if ranks.first:
        figures.loss_curve(run.out / "log.csv", run.out / "loss.png", f"DiffSeg3D, {data.name}")
    return run.finish(step)  # the exit code


def augment(image: Tensor, label: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return image [B, M, *S] (linear) and label [B, *S] (nearest) moved by theta; outside 0."""
    theta = theta.to(image.device, torch.float32, non_blocking=True)
    grid = F.affine_grid(theta, [len(image), 1, *label.shape[1:]], align_corners=True)
    image = F.grid_sample(image, grid, mode="bilinear", align_corners=True)
    moved = F.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=True)
    return image, moved[:, 0].to(label.dtype)


def learning_rate(step: int, steps: int, lr: float, lr_steps: int) -> float:
    """Return lr / 10 rising to lr in 100 steps, then half a cosine to lr / 100, where it stays."""
    end = lr_steps or steps
    warm = min(100, end // 10)  # D13
    if step < warm:
        return lr * (0.1 + 0.9 * step / warm)
    done = min((step - warm) / max(1, end - warm), 1.0)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + n) / (10 + n)) after n updates.

    A young average forgets its random start sooner.
    """
    d = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def training_size(config: Config, record: dict[str, Any], shapes: Sequence) -> list[int]:
    """Return --size, else the grid that the data name, else what holds the largest case."""
    stride = 2 ** len(config.channel_mult)
    least = [math.ceil(max(sides) / stride) * stride for sides in zip(*shapes)]
    size = list(config.size or record.get("grid", least))
    if max(size) <= stride:
        text = f"{size} voxels leave one at the lowest level, and the norm needs two"
        raise InputError(f"{text}; use a larger --size, or fewer levels in --channel-mult")
    return size


def warn_of_absent_classes(data: Any, cases: Sequence[str], ranks: Ranks) -> None:
    values = np.concatenate([np.unique(data.label(case)) for case in cases])
    for name, value in data.classes.items():
        if value not in values:
            say(f"warning: no training case holds {name}; it will not be learnt", ranks)


def network_for(config: Config, record: dict[str, Any]) -> UNet:
    """Return the network for the data that a checkpoint's record describes."""
    masks = 1 + len(record["classes"])
    inputs = len(record["channels"]) + (masks if config.method == "diffusion" else 0)
    return build_model(config, inputs, masks)


# ==================================================================================================
# Sample
# ==================================================================================================


def ddim_step(s: Schedule, x0: Tensor, xk: Tensor, k: Tensor, eta: float, z: Tensor) -> Tensor:
    """Return x_{k-1} from x_k, k [B], and the predicted mask x0. z: standard normal noise.

    eta 0 is DDIM. eta 1 is DDPM, the posterior of eq. (1): its variance is btilde_k, and eps gets
    the factor sqrt(alpha_k) (1 - abar_{k-1}) / sqrt(1 - abar_k), so x_k and x_0 get those of (1).
    """
    abar, before = s.abar[k], s.abar[k - 1]
    variance = eta**2 * s.btilde[k]  # D3
    eps = (xk - at(abar.sqrt(), xk) * x0) / at((1 - abar).sqrt(), xk)  # leads from x_0 to x_k
    rest = (1 - before - variance).clamp(min=0)
    mean = at(before.sqrt(), xk) * x0 + at(rest.sqrt(), xk) * eps  # eq. (1), eq. (2)
    return mean + at(variance.sqrt(), xk) * z


@torch.no_grad()
def sample(f, noise_of, K=5, target="x0", eta=1.0, watch=None) -> Iterator[tuple[int, Tensor]]:
    """Yield (k, predicted mask [B, C, *S] in [-1, 1]) for k = K..1; the last one is the result.

    f(xk, t) is the network with its image, t [B]. noise_of(k): standard normal noise that goes into
    x_k; sampling starts from noise_of(K). watch: is shown t_k, x_k and the mask.
    """
    xk = noise_of(K)
    s = schedule(K, xk.device)
    for j in range(K, 0, -1):
        k = torch.full((len(xk),), j, device=xk.device)
        x0 = x0_of(s, target, f(xk, s.t[k]), xk, k).clamp(-1, 1)  # D4
        if watch is not None:
            watch(int(s.t[j]), xk, x0)
        yield j, x0
        if j > 1:
            z = noise_of(j - 1) if eta > 0 else torch.zeros_like(xk)
            xk = ddim_step(s, x0, xk, k, eta, z)


def windows(full: Sequence[int], size: Sequence[int]) -> list[tuple[slice, ...]]:
    """Return windows that cover the grid and overlap by half; the last one ends at the edge."""
    starts = [[*range(0, n - w, max(1, w // 2)), n - w] for n, w in zip(full, size)]
    return [tuple(slice(a, a + w) for a, w in zip(corner, size)) for corner in product(*starts)]


def gaussian(full: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return a window's weights, [*size], at least 1e-3 of the largest; sigma: 1/8 of an axis.

    An axis that one window covers is weighted evenly.
    """
    weights = torch.ones(())
    for n, w in zip(full, size):
        line = torch.exp(-0.5 * ((torch.arange(w) - (w - 1) / 2) / (w / 8)) ** 2)
        weights = weights[..., None] * (line if n > w else torch.ones(w))
    return weights.clamp(min=1e-3 * float(weights.max()))


def in_windows(model, image, xk, t, size, target="x0") -> Tensor:
    """Return the output of the network for a whole volume, [B, C, *S], one window after another.

    model: see recycling_loss. image: [B, M, *S]. Where windows overlap, probabilities (or predicted
    noise) are averaged; the logarithm turns probabilities into logits again.
    """
    full = image.shape[2:]
    places = windows(full, size)
    if len(places) == 1:
        return model(torch.cat([image, xk], dim=1), t).float()
    weight = gaussian(full, size).to(image.device)
    weights = torch.zeros(full, device=image.device)
    total = torch.zeros_like(xk)
    for place in places:
        cut: Any = (..., *place)
        output = model(torch.cat([image[cut], xk[cut]], dim=1), t).float()
        total[cut] += weight * (output if target == "eps" else output.softmax(dim=1))
        weights[place] += weight
    mean = total.div_(weights)
    return mean if target == "eps" else mean.clamp(min=1e-8).log()  # D11


def mask_of(prob: Tensor) -> Tensor:
    """Turn [C, X, Y, Z] into labels uint8: the largest channel, on a tie the lower one."""
    return prob.argmax(dim=0).to(torch.uint8)


@dataclass(frozen=True)
class Network:
    """A trained UNet, `model`, with what sampling needs. record: of the data it was trained on."""

    config: Config
    model: UNet
    record: dict[str, Any]
    device: torch.device
    dtype: torch.dtype | None
    step: int

    def whole_volume(self, image: np.ndarray) -> tuple[Tensor, tuple[slice, ...]]:
        """Return the image padded to at least a window, [M, *S], and the slices that cut it.

        image: [M, X, Y, Z] in [0, 1] on the network's grid.
        """
        shape, window = image.shape[1:], self.record["size"]
        size = (1, self.model.in_channels, *window)
        remedy = "try --amp bf16, or train with a smaller --size"
        runtime.check_memory(self.model, size, self.dtype, self.device, False, remedy)
        full = [max(n, w) for n, w in zip(shape, window)]
        front = loaders.symmetric_pad(shape, full)
        padded = loaders.read_window(image, [-f for f in front], full).astype(np.float32)
        inside = [slice(f, f + n) for f, n in zip(front, shape)]
        low, high = self.config.image_range
        spread = torch.from_numpy(low + (high - low) * padded)
        return spread.to(self.device), (slice(None), *inside)

    @torch.no_grad()
    def sample_member(self, image, case, number, watch=None) -> tuple[Tensor, dict[int, Tensor]]:
        """Return one sample, probabilities [C, *S], and k -> its mask after step k, at most ten.

        The noise of a step is drawn on the CPU from (seed, case, number, k), the same on every
        device, and is freed after use.
        """
        config = self.config
        shape = (1, 1 + len(self.record["classes"]), *image.shape[1:])

        def noise_of(k: int) -> Tensor:
            seed = seed_of(config.seed, "sample", case, number, k)
            generator = torch.Generator().manual_seed(seed)  # D9
            return torch.randn(shape, generator=generator).to(self.device)

        def f(xk: Tensor, t: Tensor) -> Tensor:
            size = self.record["size"]
            with torch.autocast(self.device.type, self.dtype, self.dtype is not None):
                return in_windows(self.model, image[None], xk, t, size, config.target)

        kept = {round(k) for k in np.linspace(1, config.K, min(config.K, 10))}
        masks = {}
        for k, x0 in sample(f, noise_of, config.K, config.target, config.eta, watch):
            if k in kept:
                masks[k] = mask_of(x0[0])
        prob = ((x0[0] + 1) / 2).clamp(min=1e-8)  # with target eps all may be -1
        return prob / prob.sum(dim=0), masks

    def sample_ensemble(self, image, case, watch=None) -> Iterator[tuple[Tensor, Tensor, dict]]:
        """Yield after each member the mean probability [C, *S], the member's, its masks by step."""
        mean = torch.zeros((), device=self.device)
        for n in range(1, self.config.ensemble + 1):
            member, masks = self.sample_member(image, case, n - 1, watch if n == 1 else None)
            mean = mean + (member - mean) / n  # D10
            yield mean, member, masks

    def predict_array(self, image: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """Return the mask of one volume as integers [X, Y, Z], with the publisher's label values.

        image: [X, Y, Z] or [C, X, Y, Z] with the scanner's values, in RAS order; spacing: in mm.
        """
        scan = loaders.scan_of_array(image, spacing, self.record)
        padded, inside = self.whole_volume(scan.image)
        *_, (mean, _, _) = self.sample_ensemble(padded, scan.name)
        return scan.mask(mean[inside].cpu().numpy())


# ==================================================================================================
# Evaluate
# ==================================================================================================


def score_cases(network, data, cases, ranks, out=None, stopped=None) -> dict[Any, list] | None:
    """Sample and score cases, shared over the processes; None after a signal.

    Returns rows of metrics.csv for the first member, 1, and for the ensemble, its size; and for
    "steps" the Dice of the first member after each step. out: folder for masks, or None.
    """
    config = network.config
    rows: dict[Any, list[dict[str, Any]]] = {}
    for case in ranks.share(cases, config.quiet, stopped):
        truth = np.asarray(data.label(case))
        image, inside = network.whole_volume(data.image(case))
        trace = None
        if out is not None and case == cases[0]:
            trace = figures.Trace(truth, inside[1:])
        members = []
        for mean, member, masks in network.sample_ensemble(image, case, trace):
            members.append(mask_of(member[inside]).cpu().numpy())
            mask = mask_of(mean[inside]).cpu().numpy()
            if len(members) in (1, config.ensemble):
                spacing = data.spacing(case)
                scores = metrics.evaluate_case(case, mask, truth, spacing, data.scored)
                rows[len(members), case] = scores
            if len(members) == 1:
                rows["steps", case] = []
                for k in masks:
                    after = masks[k][inside[1:]].cpu().numpy()
                    dice = {
                        c: metrics.dice(after == v, truth == v) for c, v in data.classes.items()
                    }
                    rows["steps", case].append({"case": case, "k": k, **dice})
        if out is not None:
            maps = maps_of(mean[inside], network.record)
            loaders.save_case(out / "predictions", data, case, mask, maps, members, config.save)
        if trace is not None:
            figures.case_sheet(out / "figures", data, case, mask, members, maps, trace.frames)
    if stopped is not None and stopped():
        return None
    rows = ranks.merge(rows)
    parts = (1, config.ensemble, "steps")
    return {part: [row for case in cases for row in rows[part, case]] for part in parts}


def maps_of(prob: Tensor, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return name -> [X, Y, Z] fp32: the mean of each channel of [C, X, Y, Z], and the entropy.

    The entropy is 0 where one class is sure and 1 where all are equally likely.
    """
    names = ["background", *record["classes"]]
    maps = dict(zip((f"mean_{name}" for name in names), prob))
    maps["entropy"] = torch.special.entr(prob).sum(dim=0) / math.log(len(prob))
    return {name: values.cpu().numpy() for name, values in maps.items()}


def evaluate(network: Network, data: Any, ranks: Ranks, out: Path) -> int:
    """Score a split on the prepared grid: print the table, write metrics, masks and pictures."""
    config = network.config
    cases, seen = loaders.held_out(network.record, data, config.split, config.limit)
    begin = time.perf_counter()
    rows = score_cases(network, data, cases, ranks, out)
    if not ranks.first or rows is None:
        return 0
    seconds = time.perf_counter() - begin
    kind = "U-net"
    if config.method == "diffusion":
        kind = f"recycle {config.recycle}, {config.K} steps, eta {config.eta:g}"
    say(
        f"\n{config.split} split of {data.name}{seen}, {len(cases)} cases, {seconds:.0f} s\n"
        f"{kind}, weights of step {network.step}"
    )
    for size in sorted({1, config.ensemble}):
        suffix = "" if size == config.ensemble else f"_ensemble{size}"
        say(f"\nensemble of {size}\n{tables.report(out, rows[size], suffix)}")
    columns = ["case", "k", *data.classes]
    tables.write_metrics_csv(out / "dice_by_step.csv", rows["steps"], columns)
    means = []
    for k in dict.fromkeys(row["k"] for row in rows["steps"]):
        dice = [row[c] for row in rows["steps"] if row["k"] == k for c in data.classes]
        means.append(f"k = {k} {np.nanmean(dice):.3f}")
    say("\nDice after each step of the first member: " + ", ".join(means))
    say(f"\nmasks, pictures and tables are in {out}")
    return 0


# ==================================================================================================
# Predict
# ==================================================================================================


def predict(network: Network, ranks: Ranks) -> int:
    """Write masks for NIfTI files, on their own grid and with the publisher's label values."""
    config = network.config
    for scan in runtime.scans(config, network.record, ranks):
        image, inside = network.whole_volume(scan.image)
        members: dict[object, np.ndarray] = {}
        for mean, member, _ in network.sample_ensemble(image, scan.name):
            prob = mean[inside]
            if config.save == "all":
                members[len(members)] = scan.mask(member[inside].cpu().numpy())
        # Probabilities go back to the scan's own grid, linearly, and to its directions. There the
        # largest becomes the mask, with the label values of the data's publisher.
        mask = scan.mask(prob.cpu().numpy())
        maps = {}
        if config.save != "masks":
            maps = maps_of(prob, network.record)
            maps = {name: scan.map(values) for name, values in maps.items()}
        say(scan.save(mask, maps, members))
    return 0


# ==================================================================================================
# Command line
# ==================================================================================================

VERBS = {
    "": ("run", "model", "train", "speed", "use", "evaluate"),
    "train": ("run", "model", "train", "speed"),
    "evaluate": ("run", "use", "evaluate"),
    "predict": ("run", "use", "predict"),
}


def load_network(given: dict[str, Any], ranks: Ranks) -> Network:
    """Return the network that the flags name: of --checkpoint, of --init, or of the run."""
    config, state = runtime.load_trained(Config, PRESETS, given, SCRIPT)
    model = network_for(config, state["data"])
    runtime.load_weights(model, state["ema"], config.init or config.checkpoint)
    model = unet.fast_layout(model.to(ranks.device)).eval().requires_grad_(False)
    dtype, _ = runtime.autocast_dtype(config.amp, ranks.device)
    return Network(config, model, state["data"], ranks.device, dtype, state["step"])


def load(path: str, device: str = "auto") -> Network:
    """Return the network of a checkpoint, for its predict_array."""
    return load_network({"checkpoint": str(path), "quiet": True}, runtime.start(device))


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n\n")[0]
    verb, given = flags.parse(Config, argv, VERBS, PRESETS, about)
    ranks = runtime.start(given.get("device", "auto"))
    if verb == "predict":
        return predict(load_network(given, ranks), ranks)
    if verb == "evaluate":
        network = load_network(given, ranks)
        data = loaders.open_data(network.config.data)
        other = data.name if data.name != network.record["name"] else ""
        return evaluate(network, data, ranks, runtime.scores_folder(network.config, other))

    config = flags.configure(Config, PRESETS, given)
    if config.init:
        config = runtime.with_start(config, given, SCRIPT)
    config = runtime.share_batch(config, given, ranks)
    data = loaders.open_data(config.data)
    if not verb:
        loaders.cases_to_score(data, config.split, config.limit)  # fail now, not after the training
    code = train(config, data, ranks)
    if verb or code or runtime.is_scored(config, given, ranks):
        return code
    network = load_network({**given, "checkpoint": str(config.run_folder)}, ranks)
    return evaluate(network, data, ranks, runtime.scores_folder(config))


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
