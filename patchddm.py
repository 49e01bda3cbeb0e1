"""PatchDDM: train a 3D diffusion model on patches, sample the whole volume at once.

Paper
    F. Bieder, J. Wolleb, A. Durrer, R. Sandkühler, P. C. Cattin: Memory-Efficient 3D Denoising Diffusion Models for
    Medical Image Processing. MIDL 2023.

Idea
    A segmentation mask is generated from noise by a diffusion model that sees the image as extra input channels.
    A 3D network with attention and concatenated skips does not fit a GPU at full resolution, so (1) the attention
    goes, (2) skips are averaged instead of concatenated, which lets the network take any input size, (3) training
    sees random patches, an eighth of the volume, together with three channels that say where in the volume each
    voxel lies, and (4) sampling runs on the whole volume in one piece: no tiles, no seams. Different starting noise
    gives different masks; their mean is the result, their variance says where the model is unsure.

Symbols
    x_0        x0    [B, K', *P]   mask: K' = 1 channel in {0, 1}, or K + 1 one-hot channels for K > 1 classes
    x_t        xt    [B, K', *P]   mask with noise, t = 1..T (t = 0: no noise)
    eps        eps   [B, K', *P]   standard normal noise
    b          cond  [B, C + 3, *P]  image in [-1, 1], then the coordinates x, y, z in [-1, 1]
    abar_t     abar[t]             product of 1 - beta_s for s = 1..t, abar[0] = 1
    eps_theta  model([cond, xt], t - 1)   the network; it is fed the index t - 1 = 0..T-1, as the public code does
    P is the patch (X, Y, Z in voxels) in training and the whole padded volume in sampling.

Equations
    (1) q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    (2) q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    (3) p(x_{t-1} | x_t) = N(mu_theta, Sigma_theta)
    (4) L = || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2
    (5) x_{t-1} = sqrt(abar_{t-1}) (x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t)
                  + sqrt(1 - abar_{t-1}) eps_theta

Differs
    D1  betas run from 1e-4 (t = 1) to 0.02 (t = T); the paper prints the two ends exchanged.
    D2  S steps visit T, T - T/S, ..., T/S and end at 0. The public code's grid (--timesteps code) spends its last
        evaluation on nothing and leaves 0.01 eps in the result.
    D3  eps is computed again from the clipped x0, as in the public code (the paper does not say).
    D4  several classes: K + 1 one-hot channels and the largest wins; the paper has one class.
    D5  noise is a function of (seed, case, member); the public code starts every case from the same noise.
    D6  --target x0 and v besides eps. An error of the mask at t = 500 weighs 0.085 in the eps loss and 0.0003 at
        t = 900, where sampling decides the mask; so eps learns it slowly, and the small presets predict x0.
    D7  the small presets use a larger learning rate with warm-up and cosine, EMA and gradient clipping.
    D8  masks come back in the geometry of the input; the public code writes the padded grid without its geometry.
    D9  the network is fed images in [-1, 1] and coordinates of the whole padded volume, as in the public code; the
        paper says [0, 1]. Percentiles are those of the brain where the background is exactly 0.
    D10 --method half is scored at full size, enlarged on the grid that belongs to how it was reduced; the public
        code scores at half size.
    D11 --task generate: the paper's outlook. x_0 is the image in [-1, 1], the condition the coordinates alone.
    D12 the small presets: fewer levels and channels. Sampling computes in the number format of --amp (public code:
        fp32). --method full and half train on cases padded to the largest, and sample each padded for itself.

Usage
    python patchddm.py                                            all of it on phantoms: train, sample, score
    python -m data_prep.msd --src Task04_Hippocampus --dst data/hippocampus
    python patchddm.py train --data hippocampus --preset laptop
    python patchddm.py evaluate --data hippocampus --preset laptop --ensemble 5
    python patchddm.py predict --data hippocampus --preset laptop --image scan.nii.gz --output mask.nii.gz
    python patchddm.py grid --data hippocampus --preset laptop --sampling-steps 50,20,5 --ensemble 1,3,5   figure 5
    python patchddm.py profile --preset paper                     table 1: memory and seconds of one evaluation here
    python patchddm.py train --data hippocampus --preset laptop --task generate --out runs/generate    then `sample`
    python patchddm.py --data brats                               the paper's setting: one GPU, batch 1
    torchrun --nproc_per_node=4 patchddm.py --data brats          four GPUs, batch 4

Expect
    The bare run takes about four minutes on two cores of a server CPU and prints Dice and HD95 of ten unseen phantoms
    (mean foreground Dice about 0.88), beside the best Dice that any intensity threshold could reach (0.16).
"""

import copy
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from common import InputError
from common.old import figures, loaders, metrics, runtime
from common.old.runtime import Ranks, flag, noise, say, seed_of
from common.old.unet import (
    Downsample,
    EmbedSequential,
    GroupNorm,
    ResBlock,
    Upsample,
    conv,
    fast_layout,
    lean_forward,
    timestep_embedding,
    zero_module,
)

T = 1000  # diffusion steps; t = 1..T throughout this file, but for what the network is fed: the index t - 1
LOG_EVERY = 50  # steps
NESTED = (1, 3, 5, 7, 15)  # ensemble sizes reported on the way to --ensemble (table 3)

# =====================================================================================================================
# Config
# =====================================================================================================================


@dataclass(frozen=True)
class Config:
    """All flags. The defaults are the paper's (`--preset paper`); sections and tables are the paper's too."""

    # fmt: off
    data: str = flag("synthetic", "`synthetic`, a name below data/, or a prepared folder")
    preset: Literal["tiny", "laptop", "paper"] = flag("paper", "defaults of all other flags; tiny for synthetic data")
    out: str = flag("", "run folder; empty: runs/patchddm-DATA-PRESET")
    init: str = flag("", "start from these weights: one of our checkpoints or a public state dict")
    overwrite: bool = flag(False, "throw the run folder's old contents away")
    quiet: bool = flag(False, "no progress bars; one line at each evaluation")
    seed: int = flag(0, "of weights, order of cases, patches, noise")
    device: str = flag("auto", "auto | cpu | cuda | cuda:N")
    amp: Literal["auto", "bf16", "fp16", "off"] = flag("auto", "number format of convolutions (public code: fp16)")
    compile: bool = flag(False, "torch.compile the training network")
    recompute: bool = flag(False, "keep block inputs only for backward: less memory, x 4/3 time")
    split_devices: str = flag("", "A,B, as cuda:0,cuda:1: the decoder of the two finest levels lies on B (public code)")
    workers: int = flag(4, "processes that load patches, per rank; 0: in the training process")
    # network (section 2.2 and the public code)
    num_channels: int = flag(29, "width C of the first level")
    channel_mult: tuple[int, ...] = flag((1, 3, 4, 4, 4, 4, 4), "width of each level in units of C")
    num_res_blocks: int = flag(2, "residual blocks a level")
    num_groups: int = flag(29, "groups of each group norm")
    skips: Literal["average", "concat"] = flag("average", "how a skip meets the decoder (section 2.2)")
    # patches (section 2.3) and the baselines
    task: Literal["segment", "generate"] = flag("segment", "generate: images instead of masks, from coordinates alone")
    method: Literal["patch", "full", "half"] = flag("patch", "train on patches, whole or half-size volumes")
    half_pool: Literal["stride", "mean"] = flag("stride", "half: every second voxel (public code), or means of 2x2x2")
    patch: tuple[int, ...] = flag((128,), "patch size in voxels, N or N,N,N (paper: 128 of 256)")
    patch_dist: Literal["paper", "code", "uniform"] = flag("paper", "distribution of patch starts (appendix A)")
    coords: Literal["auto", "on", "off"] = flag("auto", "coordinate channels; auto: on for patches only")
    # diffusion (section 2.1)
    target: Literal["eps", "x0", "v"] = flag("eps", "what the network predicts (paper: eps)")
    mask_range: Literal["01", "pm1"] = flag("01", "values of the mask: 0 and 1 (public code), or -1 and 1")
    clip: Literal["unit", "mask", "off"] = flag("unit", "range of the predicted x0: [-1, 1], [0, 1], none")
    # training (section 3)
    steps: int = flag(4_450_000, "optimisation steps (paper: 420 h, about 4.45 million)")
    minutes: float = flag(0.0, "stop after so many minutes of training; 0: no limit")
    batch: int = flag(1, "patches a step, over all processes and accumulation")
    accumulate: int = flag(1, "split the batch into so many parts, one after the other")
    lr: float = flag(1e-5, "learning rate (paper: 1e-5)")
    lr_schedule: Literal["constant", "cosine"] = flag("constant", "cosine: with 2 % warm-up (paper: constant)")
    weight_decay: float = flag(0.01, "of AdamW (paper: its default, 0.01)")
    ema: float = flag(0.0, "decay of the averaged weights used for sampling; 0: off (paper: none)")
    grad_clip: float = flag(0.0, "largest gradient norm; 0: off (paper: none)")
    eval_every: int = flag(50_000, "steps between validations")
    save_every: int = flag(1000, "steps between saves")
    # sampling and evaluation (sections 2.4 and 4.3)
    sampler: Literal["ddim", "ddpm", "heun"] = flag("ddim", "ddim (paper), ddpm = ddim with eta 1, heun (section 5)")
    timesteps: Literal["trailing", "code"] = flag("trailing", "trailing: T, T - T/S, ..., 0; code: the public code's")
    sampling_steps: int = flag(20, "steps S of one sample, 1..1000 (paper: 1000, and 20 in figure 5)", many=True)
    eta: float = flag(0.0, "noise of the reverse process, 0..1 (paper: 0)")
    ensemble: int = flag(1, "members: samples from different noise (paper: 1 to 15); sample: volumes", many=True)
    max_evaluations: int = flag(0, "grid: leave out cells of more network evaluations a case; 0: none")
    slab: int = flag(0, "sampling: norm and convolution in slabs of so many slices: less memory; 0: off")
    save_members: bool = flag(False, "evaluate, predict: write each member's mask")
    save_maps: bool = flag(False, "evaluate, predict: write mean and variance maps")
    checkpoint: str = flag("", "weights to use; empty: OUT/best.pt, else OUT/last.pt")
    split: Literal["train", "val", "test"] = flag("test", "evaluate, grid: which cases")
    limit: int = flag(0, "evaluate, grid, validation: at most so many cases; 0: all")
    image: tuple[str, ...] = flag((), "predict: NIfTI files (one per channel, or 4D) or one folder")
    output: str = flag("", "predict: file (for one image) or folder; sample: folder")
    # fmt: on

    @property
    def patch_size(self) -> tuple[int, ...]:
        return self.patch * 3 if len(self.patch) == 1 else self.patch

    @property
    def with_coords(self) -> bool:
        return self.coords == "on" or (self.coords == "auto" and self.method == "patch")

    @property
    def multiple(self) -> int:
        """Each side of a volume must be a multiple of this: the levels halve it, and --method half once more."""
        return 2 ** (len(self.channel_mult) - (self.method != "half"))

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/patchddm-{Path(self.data).name}-{self.preset}")

    def check_lowest_level(self, size: Sequence[int], what: str) -> None:
        """InputError where an input of `size` has one voxel at the lowest level and a norm one value a group there."""
        widths = [self.num_channels * m for m in self.channel_mult]
        narrow = min(widths[-2:] if self.skips == "average" else widths[-1:])
        voxels = math.prod(n >> (len(widths) - 1) for n in size)
        if voxels * narrow == self.num_groups:
            raise InputError(
                f"{what} leaves one voxel at the lowest level, one value a group of the norm with "
                f"--num-groups {self.num_groups}; use a larger patch or volume, fewer levels or fewer groups"
            )

    def __post_init__(self) -> None:
        """Ranges and the rules between flags; InputError names the flag."""
        for name in (
            "num_channels",
            "num_res_blocks",
            "num_groups",
            "steps",
            "batch",
            "accumulate",
            "ensemble",
        ):
            runtime.check_range(self, name, 1)
        for name in ("eval_every", "save_every"):
            runtime.check_range(self, name, 1)
        for name in (
            "minutes",
            "weight_decay",
            "grad_clip",
            "workers",
            "limit",
            "seed",
            "max_evaluations",
            "slab",
        ):
            runtime.check_range(self, name, 0)
        runtime.check_range(self, "lr", 0, 1, open_low=True)
        runtime.check_range(self, "ema", 0, 0.999999)
        runtime.check_range(self, "eta", 0, 1)
        runtime.check_range(self, "sampling_steps", 1, T)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(
                f"--device is {self.device}, expected auto, cpu, cuda or cuda:N; correct the flag"
            )
        if not re.fullmatch(r"|(cpu|cuda:\d+),(cpu|cuda:\d+)", self.split_devices):
            raise InputError(
                f"--split-devices is {self.split_devices}, expected A,B, each cpu or cuda:N"
            )
        if len(self.patch) not in (1, 3) or min(self.patch) < 1:
            raise InputError(f"--patch is {self.patch}, expected N or N,N,N with N of 1 or more")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                f"--channel-mult is {self.channel_mult}, expected whole numbers of 1 or more"
            )
        step, patches = 2 ** (len(self.channel_mult) - 1), self.method == "patch"
        if patches and any(p % step for p in self.patch):
            raise InputError(
                f"--patch {self.patch_size} cannot be halved {len(self.channel_mult) - 1} times (--channel-mult has "
                f"{len(self.channel_mult)} levels); use multiples of {step}, or fewer levels"
            )
        widths = [self.num_channels * m for m in self.channel_mult] + [self.num_channels]
        for width in widths:
            if width % self.num_groups:
                raise InputError(
                    f"--num-groups {self.num_groups} does not divide the width {width}; choose a divisor of it"
                )
        if patches:
            self.check_lowest_level(self.patch_size, f"--patch {self.patch_size}")
        if self.mask_range == "pm1" and self.clip == "mask":
            raise InputError("--clip mask cuts off the -1 of --mask-range pm1; use --clip unit")
        if self.task == "generate" and (self.clip == "mask" or self.mask_range == "pm1"):
            raise InputError(
                "--task generate has images in [-1, 1], no mask; leave --mask-range and --clip mask out"
            )
        if self.timesteps == "code" and 1 in np.atleast_1d(self.sampling_steps):
            raise InputError(
                "--timesteps code is not defined for --sampling-steps 1; use 2 or more"
            )
        if self.sampler == "heun" and self.eta:
            raise InputError("--sampler heun follows the noise-free equation; use --eta 0")
        if self.skips == "concat" and self.channel_mult[0] != 1:
            raise InputError(
                "--skips concat needs --channel-mult to begin with 1; use it, or --skips average"
            )


SMALL = {
    "target": "x0",
    "lr_schedule": "cosine",
    "grad_clip": 1.0,
    "workers": 0,
    "sampling_steps": 10,
}  # D6, D7
SMALL |= {
    "channel_mult": (1, 2, 4),
    "num_res_blocks": 1,
    "num_groups": 8,
    "patch": (32,),
    "batch": 4,
}  # D12
LAPTOP = {
    "num_channels": 16,
    "lr": 1e-3,
    "ema": 0.999,
    "steps": 9000,
    "eval_every": 1500,
    "save_every": 300,
}
TINY = {
    "num_channels": 16,
    "lr": 2e-3,
    "ema": 0.99,
    "steps": 900,
    "eval_every": 300,
    "save_every": 100,
}
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "laptop": SMALL | LAPTOP, "tiny": SMALL | TINY}

# =====================================================================================================================
# Model
# =====================================================================================================================


class UNet(nn.Module):
    """The 3D U-Net of section 2.2: residual blocks, no attention, averaged skips.

    Called as model(x, index): x [B, C_in, X, Y, Z] with sides that are multiples of 2^(levels - 1), index [B] is t - 1;
    returns [B, C_out, X, Y, Z]. Parameter names are the public code's.
    """

    def __init__(self, config: Config, in_channels: int, out_channels: int):
        super().__init__()
        c, mult, groups = config.num_channels, config.channel_mult, config.num_groups
        self.in_channels, self.width = in_channels, c
        self.average, self.recompute = config.skips == "average", config.recompute
        self.time_embed = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))

        def block(a: int, b: int) -> ResBlock:
            return ResBlock(3, a, b, 4 * c, groups)

        # Encoder. The output of each of its blocks, the first convolution and the Downs included, is a skip.
        self.input_blocks = nn.ModuleList([EmbedSequential(conv(3, in_channels, c))])
        skips, width = [c], c  # widths
        for level, m in enumerate(mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(EmbedSequential(block(width, c * m)))
                width = c * m
                skips.append(width)
            if level < len(mult) - 1:
                self.input_blocks.append(EmbedSequential(Downsample(3, width)))
                skips.append(width)
        self.middle_block = EmbedSequential(block(width, width), block(width, width))

        # Decoder. A block that averages must come out as wide as the skip it meets next, so the last block of a
        # level already has the finer level's width; a block that concatenates has its own level's width.
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(config.num_res_blocks + 1):
                skip = skips.pop()
                wide = (skips[-1] if skips else c) if self.average else c * m
                layers: list[nn.Module] = [block(width if self.average else width + skip, wide)]
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(3, wide))
                self.output_blocks.append(EmbedSequential(*layers))
                width = wide
        self.out = nn.Sequential(
            GroupNorm(groups, c), nn.SiLU(), zero_module(conv(3, c, out_channels))
        )

    def run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(
                block, x, emb, use_reentrant=False, preserve_rng_state=False
            )  # no dropout here
        return block(x, emb)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(index, self.width))  # [B, 4C]
        skips = []
        for block in self.input_blocks:
            x = self.run(block, x, emb)  # [B, C m, X / 2^level, ...]
            skips.append(x)
        x = self.run(self.middle_block, x, emb)
        for block in self.output_blocks:
            where = next(
                block.parameters()
            ).device  # another one for the last blocks with --split-devices
            x, skip, emb = (v.to(where) for v in (x, skips.pop(), emb))
            x = (x + skip) / 2 if self.average else torch.cat([x, skip], dim=1)
            x = self.run(block, x, emb)
        return self.out(x.to(index.device))  # [B, C_out, X, Y, Z]


def build_model(config: Config, in_channels: int, out_channels: int) -> UNet:
    """The network; in_channels = image channels + 3 (coordinates) + mask channels, in this order."""
    return UNet(config, in_channels, out_channels)


def network_for(config: Config, record: dict[str, Any], device: torch.device) -> UNet:
    """The network for the data that `record` describes (the `data` entry of a checkpoint), on its device or devices."""
    k = x0_channels(config, record)
    image = len(record["channels"]) if config.task == "segment" else 0
    model = build_model(config, image + 3 * config.with_coords + k, k).to(device)
    if (
        config.split_devices
    ):  # the decoder of levels 1 and 0, as in the public code; its head stays on the first device
        model.output_blocks[-2 * (config.num_res_blocks + 1) :].to(
            torch.device(config.split_devices.split(",")[1])
        )
    return model


def check_memory(
    config: Config,
    record: dict[str, Any],
    shape: Sequence[int],
    batch: int,
    training: bool,
    device: torch.device,
) -> None:
    """InputError where a forward pass over [batch, ., *shape] needs more memory than is free: one line, with flags.

    Training needs at least what is kept for backward, counted on tensors without storage. Sampling needs four maps of
    the first level at once, or 3.4 in slabs.
    """
    dtype = runtime.number_format(config.amp, device)[0] or torch.float32
    if training:
        with torch.device("meta"):
            model = (
                network_for(replace(config, split_devices=""), record, torch.device("meta"))
                .to(dtype)
                .train()
            )
            x = torch.empty(batch, model.in_channels, *shape, dtype=dtype)
            needed = runtime.kept_for_backward_gb(lambda: model(x, torch.zeros(batch)))
    else:
        needed = (
            (3.4 if config.slab else 4)
            * batch
            * config.num_channels
            * math.prod(shape)
            * dtype.itemsize
            / 1e9
        )
    devices = set(config.split_devices.split(",")) if config.split_devices else {str(device)}
    free = sum(runtime.free_memory_gb(torch.device(d)) for d in devices)
    if needed > free:
        less = "--recompute, --batch, --patch" if training else "--slab 16, --method half"
        raise InputError(
            f"{'training on' if training else 'sampling'} {batch} x {'x'.join(map(str, shape))} voxels needs about "
            f"{needed:.1f} GB, {device} has {free:.1f} GB free; try {less}, --amp bf16 or a smaller --num-channels"
        )


def check_sampling(
    config: Config,
    record: dict[str, Any],
    shape: Sequence[int],
    grid: Sequence[int] | None,
    device: torch.device,
) -> None:
    """check_memory for sampling a volume of `shape`, padded as it will be."""
    full = padded_shape(shape, config, grid)
    full = tuple(n // 2 for n in full) if config.method == "half" else full
    check_memory(config, record, full, 1, False, device)


# =====================================================================================================================
# Diffusion: schedule, q, loss
# =====================================================================================================================


def abar_table() -> np.ndarray:
    """abar[t] for t = 0..T in float64; beta_t is linear from 1e-4 (t = 1) to 0.02 (t = T)."""
    beta = np.linspace(1e-4, 0.02, T)  # D1
    return np.concatenate([[1.0], np.cumprod(1 - beta)])  # [T + 1]


ABAR = abar_table()


@cache
def roots(device: torch.device) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar) in float64, [T + 1], once on each device."""
    return torch.tensor(np.sqrt(ABAR), device=device), torch.tensor(
        np.sqrt(1 - ABAR), device=device
    )


def signal_and_noise(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) for t [B], each [B, 1, 1, 1, 1] in the number type of `like`, fp32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    a, b = (root[t].to(dtype).reshape(-1, *(1,) * (like.ndim - 1)) for root in roots(t.device))
    return a, b


def q_sample(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t from x_0 in one step; t [B] in 1..T."""
    a, b = signal_and_noise(t, x0)
    return a * x0 + b * eps  # eq. (2), which is eq. (1) applied t times


def target_of(kind: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict: eps (the paper), x0, or v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    if kind == "eps":
        return eps
    a, b = signal_and_noise(t, x0)
    return x0 if kind == "x0" else a * eps - b * x0  # D6


def x0_of(kind: str, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The mask that a network output stands for."""
    a, b = signal_and_noise(t, xt)
    if kind == "eps":
        return (xt - b * output) / a  # the bracket of eq. (5)
    return output if kind == "x0" else a * xt - b * output  # D6


def diffusion_loss(
    model: nn.Module, kind: str, cond: Tensor, x0: Tensor, t: Tensor, eps: Tensor
) -> Tensor:
    """Mean over voxels and channels of (target - output)^2, unweighted: [B] in fp32."""
    xt = q_sample(x0, eps, t)
    output = model(torch.cat([cond, xt], dim=1), t - 1).float()  # [B, K', *P]
    return (target_of(kind, x0, eps, t) - output).square().flatten(1).mean(dim=1)  # eq. (4)


# =====================================================================================================================
# Data: patches, coordinates, masks as channels
# =====================================================================================================================


def mask_channels(record: dict[str, Any]) -> int:
    """K' of the mask: 1 for one class, else K + 1 with the background first."""
    k = len(record["classes"])
    return 1 if k == 1 else k + 1  # D4


def x0_channels(config: Config, record: dict[str, Any]) -> int:
    """K' of what is sampled: the channels of the mask, or with --task generate those of the image."""
    return mask_channels(record) if config.task == "segment" else len(record["channels"])


def mask_to_x0(label: Tensor, channels: int, mask_range: str = "01") -> Tensor:
    """[B, X, Y, Z] integers -> [B, K', X, Y, Z] fp32 in {0, 1}, or {-1, 1} with --mask-range pm1."""
    if channels == 1:
        x0 = (label > 0).float()[:, None]
    else:
        x0 = F.one_hot(label.long(), channels).movedim(-1, 1).float()  # D4
    return x0 if mask_range == "01" else 2 * x0 - 1


def x0_to_mask(x0: Tensor) -> Tensor:
    """[K', X, Y, Z] continuous -> [X, Y, Z] uint8: above 0.5, or the largest channel (a tie goes to the lower one)."""
    return ((x0[0] > 0.5) if len(x0) == 1 else x0.argmax(dim=0)).to(torch.uint8)  # D4


def padded_shape(
    shape: Sequence[int], config: Config, whole: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The grid that a volume is padded to: at least the patch, each side a multiple of what the levels can halve.

    whole: a grid that the prepared data name for all cases (BraTS: 256^3).
    """
    patch = config.patch_size if config.method == "patch" else shape
    least = [max(*sides) for sides in zip(shape, patch, whole or shape)]
    full = tuple(-(-n // config.multiple) * config.multiple for n in least)
    half = 2 if config.method == "half" else 1
    config.check_lowest_level([n // half for n in full], f"a volume of {'x'.join(map(str, shape))}")
    return full


def draw_start(rng: np.random.Generator, size: int, patch: int, kind: str) -> int:
    """First voxel of a patch on one axis, 0..size - patch (appendix A, figure 6: the centre is favoured)."""
    n = size - patch
    if kind == "uniform":
        return int(rng.integers(0, n + 1))
    if kind == "code":  # quarters instead of the paper's thirds
        q = (n + 2) // 4
        return int(rng.integers(0, q + 1) + rng.integers(0, n - q + 1))
    z = rng.uniform(-1 / 3, 1 / 3) + rng.uniform(-2 / 3, 2 / 3)  # in [-1, 1], a trapezoid
    return math.floor((z + 1) / 2 * n + 0.5)


def coordinates(
    full: Sequence[int], start: Sequence[int], size: Sequence[int], out: np.ndarray | None = None
) -> np.ndarray:
    """[3, *size] fp32: position of each voxel in the whole padded volume, -1 at its first voxel, +1 at its last.

    Made for the volume and cut with the patch, so that a patch knows where it lies (section 2.3). out: to write into.
    """
    out = np.empty((3, *size), np.float32) if out is None else out
    for k, (d, s, n) in enumerate(zip(full, start, size)):
        axis = np.linspace(-1, 1, d)[s : s + n] if d > 1 else np.zeros(1)
        out[k] = axis.reshape(
            [n if i == k else 1 for i in range(3)]
        )  # [n, 1, 1], [1, n, 1] or [1, 1, n]
    return out


def condition(
    image: np.ndarray, full: Sequence[int], start: Sequence[int], size: Sequence[int], coords: bool
) -> np.ndarray:
    """The condition b of one patch, or of the whole volume with start 0 and size = full: [C (+ 3), *size] fp32.

    image: [C, X, Y, Z] in [0, 1], possibly a memory map of which only the patch is read. The volume is padded
    symmetrically with background to `full` without ever being copied; the network sees [-1, 1].
    """
    front = loaders.symmetric_pad(image.shape[1:], full)
    window = loaders.read_window(image, [s - f for s, f in zip(start, front)], size)  # [C, *size]
    cond = np.empty((len(image) + 3 * coords, *size), np.float32)
    cond[: len(image)] = window
    cond[: len(image)] *= 2
    cond[: len(image)] -= 1  # D9
    if coords:
        coordinates(full, start, size, out=cond[len(image) :])
    return cond


def halve(image: np.ndarray, pool: str) -> np.ndarray:
    """[C, X, Y, Z] -> [C, X / 2, Y / 2, Z / 2]: every second voxel, or the mean of 2 x 2 x 2 (--half-pool)."""
    if pool == "stride":
        return np.ascontiguousarray(image[:, ::2, ::2, ::2])
    c, x, y, z = (n if i == 0 else n // 2 for i, n in enumerate(image.shape))
    return image.reshape(c, x, 2, y, 2, z, 2).mean(axis=(2, 4, 6))


def halve_label(label: np.ndarray, pool: str) -> np.ndarray:
    """[X, Y, Z] -> [X / 2, Y / 2, Z / 2]: every second voxel, or the largest share of the eight (ties: the lower)."""
    if pool == "stride":
        return halve(label[None], pool)[0]
    return (
        np.stack([halve((label == v)[None], pool)[0] for v in range(int(label.max()) + 1)])
        .argmax(0)
        .astype(np.uint8)
    )


def double(x: Tensor, pool: str) -> Tensor:
    """[K', X, Y, Z] -> [K', 2 X, 2 Y, 2 Z] linearly, on the grid that belongs to `halve`.

    stride: coarse voxel k lies at fine voxel 2 k; mean: at 2 k + 0.5. The other grid shifts the mask by half a voxel.
    """
    if pool == "mean":  # D10
        return F.interpolate(x[None], scale_factor=2, mode="trilinear", align_corners=False)[0]
    for axis in (1, 2, 3):
        after = torch.cat(
            [x.narrow(axis, 1, x.shape[axis] - 1), x.narrow(axis, x.shape[axis] - 1, 1)], dim=axis
        )
        x = torch.stack([x, (x + after) / 2], dim=axis + 1).flatten(axis, axis + 1)
    return x


class Patches(Dataset):
    """Sample n = 0, 1, 2, ... of the training, a patch or a whole volume: all of it is a function of (seed, n).

    n counts over the global batches, so the number of processes, workers and restarts changes nothing.
    """

    def __init__(self, data: Any, config: Config):
        self.data, self.config = data, config
        self.cases = [
            c for c in data.cases("train") if config.task == "generate" or data.has_label(c)
        ]
        if not self.cases:
            raise InputError(
                f"{config.data} has no labelled training case; prepare data with labels"
            )
        shapes = [data.shape(c) for c in self.cases]
        self.grid = data.meta.get("grid")
        if config.method != "patch":  # whole volumes of one size, so that they can share a batch
            self.grid = self.grid or [max(sides) for sides in zip(*shapes)]

    def largest(self) -> tuple[int, ...]:
        """(X, Y, Z) of the largest sample, as the network sees it."""
        shapes = [padded_shape(self.data.shape(c), self.config, self.grid) for c in self.cases]
        whole = max(shapes, key=math.prod)
        if self.config.method == "half":
            return tuple(n // 2 for n in whole)
        return self.config.patch_size if self.config.method == "patch" else whole

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Condition [C (+ 3), *P] fp32, label [*P] uint8, t in 1..T, and n.

        With --task generate the image moves: condition [3, *P] (or no channel), then the image [C, *P] in [-1, 1].
        """
        config = self.config
        epoch, place = divmod(n, len(self.cases))
        order = np.random.default_rng(seed_of(config.seed, "order", epoch)).permutation(
            len(self.cases)
        )
        case = self.cases[order[place]]
        rng = np.random.default_rng(seed_of(config.seed, "patch", n))
        image, shape = self.data.image(case), self.data.shape(case)
        full = padded_shape(shape, config, self.grid)
        size = config.patch_size if config.method == "patch" else full
        start = [draw_start(rng, d, p, config.patch_dist) for d, p in zip(full, size)]
        cond = condition(image, full, start, size, config.with_coords)
        cond = halve(cond, config.half_pool) if config.method == "half" else cond
        t = int(rng.integers(1, T + 1))  # uniform on 1..T
        if config.task == "generate":
            return cond[len(image) :], cond[: len(image)], t, n  # D11
        front = loaders.symmetric_pad(shape, full)
        label = loaders.read_window(
            self.data.label(case), [s - f for s, f in zip(start, front)], size
        )
        return (
            cond,
            halve_label(label, config.half_pool) if config.method == "half" else label,
            t,
            n,
        )


class Sharded(Sampler):
    """Index lists of this process, one a forward pass: step s has samples s B .. s B + B - 1 of all processes."""

    def __init__(self, config: Config, ranks: Ranks, step: int):
        self.config, self.ranks, self.step = config, ranks, step

    def __iter__(self) -> Iterator[list[int]]:
        part = self.config.batch // (self.ranks.world * self.config.accumulate)
        for step in range(self.step, self.config.steps):
            for k in range(self.config.accumulate):
                first = (
                    step * self.config.batch + (self.ranks.rank * self.config.accumulate + k) * part
                )
                yield list(range(first, first + part))


# =====================================================================================================================
# Train
# =====================================================================================================================


def learning_rate(config: Config, step: int) -> float:
    """Constant (paper), or a linear warm-up over 2 % of the steps and a half cosine to zero."""
    if config.lr_schedule == "constant":
        return config.lr
    warm = max(1, config.steps // 50)
    done = max(0.0, (step - warm) / max(1, config.steps - warm))
    return config.lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * done)))  # D7


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + n) / (10 + n)): young averages forget their start."""
    d = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


class Training:
    """What training changes, which is what a checkpoint holds: saved, restored, and nothing else."""

    def __init__(
        self,
        config: Config,
        record: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,
    ):
        torch.manual_seed(seed_of(config.seed, "weights") % 2**32)
        self.config, self.record, self.device, self.dtype = config, record, device, dtype
        self.model = fast_layout(network_for(config, record, device), config.compile)
        self.ema = (
            copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema else self.model
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        # The scaler also finds gradients that are not finite, and a fused optimiser then leaves the weights alone
        # without the host having to ask; so it stays on, with scale 1, where the numbers need no scaling.
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**16 if dtype == torch.float16 else 1.0
        )
        self.step, self.seconds = 0, 0.0
        self.skipped = torch.zeros(
            3, device=device
        )  # steps without a finite gradient: all, in a row, most in a row
        self.best = {"dice": -1.0, "step": 0, "seen": 0}  # seen: the newest step that was validated

    def save(self, name: str) -> None:
        contents = {
            "format": runtime.FORMAT,
            "script": "patchddm",
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.config.ema else {},
            "optimizer": self.optimizer.state_dict() if name == "last.pt" else {},
            "scaler": self.scaler.state_dict() if self.dtype == torch.float16 else {},
            "step": self.step,
            "seconds": self.seconds,  # of training, over all restarts
            "skipped": self.skipped.tolist(),
            "best": self.best,
            "data": self.record,
        }
        out = self.config.run_folder
        runtime.save_checkpoint(
            out / name, contents, out / "last.prev.pt" if name == "last.pt" else None
        )

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.config.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.dtype == torch.float16 and state["scaler"]:  # not where --amp changed meanwhile
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.skipped.copy_(torch.tensor(state["skipped"]))
        self.skipped[2] = self.skipped[1]  # the row that ended a run may be over now
        self.best = state["best"]


def train_step(
    run: Training, net: Any, batches: Iterator[Any], ranks: Ranks, losses_by_t: runtime.LossByTime
) -> Tensor:
    """One optimisation step of the global batch; returns the gradient norm before clipping.

    net: run.model, wrapped for DDP and torch.compile. A step without a finite gradient changes no weight.
    """
    config, device, dtype = run.config, run.device, run.dtype
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    for part in range(config.accumulate):
        cond, label, t, n = next(batches)  # [B, C + 3, *P], [B, *P], [B], [B]
        cond, label, t = (v.to(device, non_blocking=True) for v in (cond, label, t))
        x0 = label  # [B, K', *P] with --task generate, else made here
        if config.task == "segment":
            x0 = mask_to_x0(label, mask_channels(run.record), config.mask_range)  # [B, K', *P]
        eps = noise(config.seed, "noise", n.tolist(), x0.shape[1:], device)
        alone = (
            ranks.world == 1 or part == config.accumulate - 1
        )  # gradients travel with the last part only
        with nullcontext() if alone else net.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses = diffusion_loss(net, config.target, cond, x0, t, eps)  # [B]
            run.scaler.scale(losses.mean() / config.accumulate).backward()
        losses_by_t.add(t, losses.detach())
    run.scaler.unscale_(run.optimizer)
    parameters = list(run.model.parameters())
    if config.grad_clip:
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    run.scaler.step(
        run.optimizer
    )  # does nothing where the norm is not finite, on all processes alike
    run.scaler.update(None if dtype == torch.float16 else 1.0)
    bad, (total, row, most) = (~torch.isfinite(norm)).float(), run.skipped.unbind()
    row = (row + 1) * bad
    run.skipped = torch.stack([total + bad, row, torch.maximum(most, row)])  # stays on the device
    run.step += 1
    if config.ema:
        update_ema(run.ema, run.model, config.ema, run.step)
    return norm


def train(config: Config, data: Any, ranks: Ranks, stop: runtime.StopFlag) -> int:
    """The training loop. Returns 0, or 130 / 143 after a signal, with everything saved."""
    device, out, record = ranks.device, config.run_folder, loaders.data_record(data)
    dtype, reason = runtime.number_format(config.amp, device)

    # 1. what is needed, and the checkpoint to continue from; nothing is written or thrown away before all is there
    patches = Patches(data, config)
    share = config.batch // (ranks.world * config.accumulate)
    state = (
        None
        if config.overwrite
        else runtime.find_run(out, "patchddm", asdict(config), MAY_DIFFER, record, ranks)
    )
    if state is None or state["step"] < config.steps:
        check_memory(config, record, patches.largest(), share, True, device)
        for case in validation_cases(config, data):  # are sampled whole
            check_sampling(config, record, data.shape(case), data.meta.get("grid"), device)
            data.label(case)  # refuses foreign values
    run = Training(config, record, device, dtype)
    if state is not None:
        run.restore(state)
    elif config.init:
        runtime.load_start(config.init, "patchddm", run.model)
        run.ema.load_state_dict(run.model.state_dict())
    runtime.make_run(out, asdict(config), config.overwrite, ranks)
    runtime.check_same_weights(run.model, ranks, "at the start")
    print_header(config, data, ranks, run, reason)

    # 2. all processes work on parts of one global batch; DDP averages their gradients
    net: Any = DistributedDataParallel(run.model) if ranks.world > 1 else run.model
    net = torch.compile(net) if config.compile else net
    net.train()
    loader = DataLoader(
        patches,
        batch_sampler=Sharded(config, ranks, run.step),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=runtime.ignore_signals,
    )
    log = runtime.Log(
        out / "log.csv", [*COLUMNS, *(f"val_dice_{c}" for c in data.scored)], run.step, ranks.first
    )
    batches, losses_by_t, clock = (
        iter(loader),
        runtime.LossByTime(T, device),
        (run.step, run.seconds),
    )
    limit, time_up, signal = 60 * config.minutes or math.inf, False, 0
    bar = tqdm(
        total=config.steps,
        initial=run.step,
        unit="step",
        disable=config.quiet or not ranks.first or None,
    )

    while True:
        # 3. validate when it is due; a run stopped before it did so does it first thing when continued
        finished = run.step >= config.steps or time_up or run.seconds >= limit
        due = run.step % config.eval_every == 0 or finished
        if due and run.step > run.best["seen"] and validation_cases(config, data):
            validate(run, data, ranks, stop, log)
            signal, _ = stop.agreed(ranks)
        if finished or signal:
            break

        # 4. one step
        begin = time.perf_counter()
        norm = train_step(run, net, batches, ranks, losses_by_t)
        run.seconds += time.perf_counter() - begin
        bar.update()

        # 5. log, save, stop
        if (device.type == "cpu" or run.step % LOG_EVERY == 0) and run.skipped[
            2
        ] >= 20:  # a GPU is not asked each step
            raise InputError(f"no finite gradient in 20 steps before step {run.step}; use --amp off, or begin "
                             "anew with a lower --lr")  # fmt: skip
        signal, time_up = stop.agreed(ranks, run.seconds >= limit)
        if run.step % LOG_EVERY == 0 or run.step in (10, config.steps) or time_up:
            rate = (run.step - clock[0]) / (run.seconds - clock[1])  # steps a second
            row = {
                "step": run.step,
                "seconds": run.seconds,
                "lr": learning_rate(config, run.step - 1),
            }
            row |= {
                "grad_norm": float(norm),
                "skipped": int(run.skipped[0]),
                "memory_gb": runtime.peak_memory_gb(device),
            }
            row |= {
                "samples_per_s": rate * config.batch,
                "left_s": (config.steps - run.step) / rate,
            }
            log.row(row | losses_by_t.row(ranks), silent=config.quiet)
            clock = (run.step, run.seconds)
        if ranks.first and (
            run.step % config.save_every == 0 or signal or time_up or run.step == config.steps
        ):
            run.save("last.pt")
    bar.close()
    runtime.check_same_weights(run.model, ranks, "at the end")
    if signal:
        again = "the same command" + " without --overwrite" * config.overwrite
        say(
            f"stopped by signal {signal}; step {run.step} is saved in {out}, {again} continues",
            ranks,
        )
        return 128 + signal
    if ranks.first:
        title = f"PatchDDM, {Path(config.data).name}, target {config.target}"
        figures.loss_curve(out / "log.csv", out / "loss.png", title=title)
    return 0


COLUMNS = [
    "step",
    "seconds",
    "loss",
    "loss_q1",
    "loss_q2",
    "loss_q3",
    "loss_q4",
    "lr",
    "grad_norm",
    "samples_per_s",
]
COLUMNS += ["memory_gb", "left_s", "skipped", "val_dice"]


def validation_cases(config: Config, data: Any) -> list[str]:
    """The labelled cases of val, at most --limit; none where images are generated."""
    cases = data.cases("val", config.limit or None) if config.task == "segment" else []
    return [case for case in cases if data.has_label(case)]


def validate(
    run: Training, data: Any, ranks: Ranks, stop: runtime.StopFlag, log: runtime.Log
) -> None:
    """Foreground Dice of the validation cases, one member with fixed noise; keeps the best weights as best.pt.

    The step is saved before, since this can take long. A signal in between leaves the validation undone.
    """
    if ranks.first:
        run.save("last.pt")
    config = replace(run.config, ensemble=1)
    net = Network(config, run.ema.eval(), run.record, run.device, run.dtype, run.step)
    rows = score_cases(net, data, ranks, validation_cases(config, data), None, (1,), stop)
    run.model.train()
    if rows is None:
        return
    summary = metrics.summarise(rows[1])
    dice = summary["mean"]["dice"]["mean"]
    better = dice > run.best["dice"]
    run.best = {"dice": dice, "step": run.step} if better else run.best
    run.best |= {"seen": run.step}
    for name in ["best.pt"] * better + ["last.pt"]:
        if ranks.first:
            run.save(name)
    row = {f"val_dice_{c}": v["dice"]["mean"] for c, v in summary["classes"].items()}
    log.row({"step": run.step, "seconds": run.seconds, "val_dice": dice} | row)


def print_header(config: Config, data: Any, ranks: Ranks, run: Training, reason: str) -> None:
    """What this run is, before it starts."""
    counts = ", ".join(f"{len(data.cases(s))} {s}" for s in ("train", "val", "test"))
    share = f"{ranks.world} processes x {config.accumulate} parts x {config.batch // (ranks.world * config.accumulate)}"
    parameters, patch = (
        sum(p.numel() for p in run.model.parameters()),
        "x".join(map(str, config.patch_size)),
    )
    paper, notes = Config(), ["D1", "D5", "D8", "D9", "D12"]
    notes += ["D2"] * (config.timesteps == "trailing") + ["D3"] * (config.clip != "off")
    notes += ["D4"] * (len(data.classes) > 1 and config.task == "segment") + ["D6"] * (
        config.target != "eps"
    )
    notes += ["D10"] * (config.method == "half") + ["D11"] * (config.task == "generate")
    notes += ["D7"] * any(
        getattr(config, k) != getattr(paper, k) for k in ("lr", "lr_schedule", "ema", "grad_clip")
    )
    what = f"patch {patch}" if config.method == "patch" else f"{config.method} volumes"
    small = [
        c
        for c in data.cases("train")
        if config.method == "patch" and any(n < p for n, p in zip(data.shape(c), config.patch_size))
    ]
    lines = [f"PatchDDM (Bieder et al. 2023) -> {config.run_folder}"]
    lines += [
        f"  data      {config.data}: {counts}; {', '.join(data.channels)}; classes {', '.join(data.classes)}"
    ]
    if small:
        lines += [
            f"            {len(small)} training cases are smaller than the patch: padded with background"
        ]
    lines += [f"  network   {parameters:,} parameters, {config.num_groups} groups a norm, {what}"]
    lines += [
        f"  training  step {run.step} to {config.steps}, batch {config.batch} = {share}; target {config.target}"
    ]
    memory = runtime.peak_memory_gb(ranks.device)
    lines += [
        f"  device    {ranks.device}, {'fp32' if run.dtype is None else str(run.dtype)[6:]} ({reason}), {memory:.1f} GB"
    ]
    lines += [
        f"  differs   {' '.join(sorted(notes, key=lambda d: int(d[1:])))} (see the top of patchddm.py)"
    ]
    lines += ["  time      left_s in the first lines below"] * (
        run.step < config.steps and not config.quiet
    )
    say("\n".join(lines), ranks)


# =====================================================================================================================
# Sample
# =====================================================================================================================


def timesteps(steps: int, kind: str = "trailing") -> list[int]:
    """S + 1 times from T down to 0: tau_i = (T i + S // 2) // S, i = S..0.

    code: T, ..., 1 evenly, and 1 once more: its abar is held constant past the end, so the last step goes nowhere.
    """
    if kind == "code":
        return [round(i) + 1 for i in np.linspace(T - 1, 0, steps)] + [1]
    return [(T * i + steps // 2) // steps for i in range(steps, -1, -1)]  # D2


def eps_of(x0: Tensor, xt: Tensor, t: int) -> Tensor:
    """The noise that leads from x0 to x_t; with a clipped x0 it is not what the network said."""
    return (xt - math.sqrt(ABAR[t]) * x0) / math.sqrt(1 - ABAR[t])  # D3


def ddim_step(x0: Tensor, xt: Tensor, t: int, s: int, eta: float, z: Tensor | None) -> Tensor:
    """From x_t to x_s, s < t, given the (clipped) prediction of x_0; at eta 0 and s = t - 1 this is equation 5.

    z: standard normal, needed where eta > 0 and s > 0. At s = 0 the result is x0.
    """
    if s == 0:
        return x0
    a_t, a_s = ABAR[t], ABAR[s]
    e = eps_of(x0, xt, t)
    sigma = (
        eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    )  # eq. (3): Sigma is sigma^2 I
    x = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - sigma**2) * e  # eq. (5)
    return x if z is None or sigma == 0 else x + sigma * z


def heun_step(
    x0: Tensor, xt: Tensor, t: int, s: int, look: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """From x_t to x_s by the mean of the slopes at both ends; look(x, t) is the network's clipped prediction of x_0.

    With y = x / sqrt(abar) and g = sqrt(1 - abar) / sqrt(abar), DDIM is Euler's step of dy / dg = eps, and this is the
    second-order step (the paper's outlook; Karras et al. 2022). At s = 0 there is no network: Euler.
    """
    euler = ddim_step(x0, xt, t, s, 0.0, None)
    if s == 0:
        return euler
    y, h = xt / math.sqrt(ABAR[t]), math.sqrt(1 / ABAR[s] - 1) - math.sqrt(1 / ABAR[t] - 1)
    slope = (eps_of(x0, xt, t) + eps_of(look(euler, s), euler, s)) / 2
    return math.sqrt(ABAR[s]) * (y + h * slope)


def evaluations(sampler: str, steps: int, kind: str = "trailing") -> int:
    """Evaluations of the network for one sample: S, of Heun's method S more, but for a step that ends at 0."""
    return steps + (sampler == "heun") * sum(s > 0 for s in timesteps(steps, kind)[1:])


def sample(
    f: Callable[[Tensor, Tensor], Tensor],
    xt: Tensor,
    config: Config,
    draw: Callable[[], Tensor],
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_0 from x_T = xt ~ N(0, I), [1, K', X, Y, Z]; the state stays in the number type of xt (fp32 or wider).

    f(xt, index [1]) is the network with its condition, called `evaluations` times; draw() gives standard normal
    noise like xt; watch is shown t, x_t and the predicted x_0 of each step.
    """
    eta = 1.0 if config.sampler == "ddpm" else config.eta
    low, high = {"unit": (-1.0, 1.0), "mask": (0.0, 1.0), "off": (-math.inf, math.inf)}[config.clip]

    def look(x: Tensor, t: int) -> Tensor:
        tt = torch.full((1,), t, device=x.device)
        return x0_of(config.target, f(x, tt - 1), x, tt).clamp(low, high)

    for t, s in pairwise(timesteps(config.sampling_steps, config.timesteps)):
        x0 = look(xt, t)
        if watch is not None:
            watch(t, xt, x0)
        if config.sampler == "heun":
            xt = heun_step(x0, xt, t, s, look)
        else:
            xt = ddim_step(x0, xt, t, s, eta, draw() if eta > 0 and s > 0 else None)
    return xt


@dataclass(frozen=True)
class Network:
    """A network with what sampling needs to know. record: the `data` entry of a checkpoint; dtype: of autocast."""

    config: Config
    model: UNet
    record: dict[str, Any]
    device: torch.device
    dtype: torch.dtype | None
    step: int


@torch.no_grad()
def sample_member(net: Network, cond: Tensor, case: str, number: int, watch: Any = None) -> Tensor:
    """Member `number` of a case, the whole volume at once: [K', *S] fp32 in [0, 1].

    cond: [C (+ 3), *S]. The noise is drawn on the CPU from (seed, case, number), so it is the same on every device.
    The network runs in its lean form, which gives the same numbers with about half of the memory.
    """
    config = net.config
    shape = (1, x0_channels(config, net.record), *cond.shape[1:])
    generator = torch.Generator().manual_seed(seed_of(config.seed, "sample", case, number))  # D5
    fed = torch.cat(
        [cond[None], torch.empty(shape, device=cond.device)], dim=1
    )  # [1, C (+ 3) + K', *S]
    total = evaluations(config.sampler, config.sampling_steps, config.timesteps)
    silent = config.quiet or os.environ.get("RANK", "0") != "0" or None
    bar = tqdm(
        total=total,
        desc=f"{case} {number}",
        unit="evaluation",
        leave=False,
        delay=5,
        disable=silent,
    )

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(net.device)

    def f(xt: Tensor, index: Tensor) -> Tensor:
        fed[:, len(cond) :] = xt  # the input is put together once, and then only x_t changes
        bar.update()
        with torch.autocast(net.device.type, net.dtype, enabled=net.dtype is not None):
            return lean_forward(net.model, [fed], index, config.slab).float()

    with bar:
        x0 = sample(f, draw(), config, draw, watch)[0]
    return ((x0 + 1) / 2 if config.mask_range == "pm1" or config.task == "generate" else x0).clamp(
        0, 1
    )


@dataclass(frozen=True)
class Ensemble:
    """Result of `size` members: mean [K', *S], variance [*S], and the newest member [K', *S], all in [0, 1]."""

    size: int
    mean: Tensor
    variance: Tensor
    member: Tensor


def sample_ensemble(net: Network, cond: Tensor, case: str, watch: Any = None) -> Iterator[Ensemble]:
    """Sample --ensemble members one after the other and yield the result so far after each (section 2.4).

    Variance with ddof 0; of several channels half the sum, which for two exclusive channels is the variance of one.
    """

    def grow(
        x: Tensor,
    ) -> Tensor:  # what was sampled at half the size comes out at full size, still continuous
        return double(x, net.config.half_pool) if net.config.method == "half" else x

    mean = square = torch.zeros(())
    for n in range(1, net.config.ensemble + 1):
        member = sample_member(net, cond, case, n - 1, watch if n == 1 else None)
        delta = member - mean
        mean = mean + delta / n
        square = square + delta * (
            member - mean
        )  # running sum of squared differences from the mean
        variance = square.sum(dim=0, keepdim=True) / n / (1 if len(member) == 1 else 2)
        yield Ensemble(n, grow(mean), grow(variance)[0], grow(member))


def generate(config: Config, ranks: Ranks) -> int:
    """--task generate: --ensemble volumes out of nothing, the whole grid at once, from a network that saw patches.

    A volume has the data's median shape and spacing and values in [0, 1]; each channel is a NIfTI file.
    """
    if config.output.endswith((".nii", ".nii.gz")):
        raise InputError(f"--output {config.output}: sample writes several files; give a folder")
    net = load_network(config, ranks)
    statistics, grid = net.record["statistics"], net.record.get("grid")
    shape = [round(n) for n in statistics["shape_median"]]
    check_sampling(config, net.record, shape, grid, net.device)
    full = padded_shape(shape, config, grid)
    front = loaders.symmetric_pad(shape, full)
    inside = tuple(slice(f, f + n) for f, n in zip(front, shape))
    cond = (
        coordinates(full, (0, 0, 0), full)
        if config.with_coords
        else np.zeros((0, *full), np.float32)
    )
    cond = halve(cond, config.half_pool) if config.method == "half" else cond
    out, slices = Path(config.output) if config.output else config.run_folder / "predictions", []
    affine = np.diag([*statistics["spacing_median_mm"], 1.0])  # RAS, mm
    for n in range(ranks.rank, config.ensemble, ranks.world):
        begin, volume = (
            time.perf_counter(),
            sample_member(net, torch.from_numpy(cond).to(net.device), "generate", n),
        )
        volume = (double(volume, config.half_pool) if config.method == "half" else volume)[
            :, inside[0], inside[1], inside[2]
        ]
        for channel, values in enumerate(volume.cpu().numpy()):
            loaders.write_on_grid(out / f"sample_{n}_{channel:04d}.nii.gz", values, affine)
        slices.append((n, figures.radiological(volume[0, :, :, shape[2] // 2].cpu().numpy())))
        say(
            f"{out / f'sample_{n}_0000.nii.gz'}: {' x '.join(map(str, shape))}, {time.perf_counter() - begin:.1f} s"
        )
    pairs = sorted(
        (pair for part in runtime.gather(slices, ranks) for pair in part), key=lambda pair: pair[0]
    )
    if ranks.first:
        titles, title = (
            [f"sample {n}" for n, _ in pairs],
            f"{net.record['name']}, middle slices, step {net.step}",
        )
        figures.montage([picture for _, picture in pairs], titles, out / "samples.png", title=title)
    return 0


# =====================================================================================================================
# Evaluate
# =====================================================================================================================


def whole_volume(image: np.ndarray, net: Network, grid: Sequence[int] | None) -> tuple[Tensor, Any]:
    """The condition of the whole padded volume, [C (+ 3), *S], and the slices that cut the volume out of it again."""
    full = padded_shape(image.shape[1:], net.config, grid)
    front = loaders.symmetric_pad(image.shape[1:], full)
    whole = condition(image, full, (0, 0, 0), full, net.config.with_coords)
    whole = halve(whole, net.config.half_pool) if net.config.method == "half" else whole
    check_sampling(net.config, net.record, image.shape[1:], grid, net.device)
    return torch.from_numpy(whole).to(net.device), tuple(
        slice(f, f + n) for f, n in zip(front, image.shape[1:])
    )


def score_cases(
    net: Network,
    data: Any,
    ranks: Ranks,
    cases: Sequence[str],
    out: Path | None,
    sizes: Sequence[int],
    stop: runtime.StopFlag | None = None,
) -> dict[int, list[dict[str, Any]]] | None:
    """Sample and score `cases`, shared over the processes: ensemble size -> rows of metrics.csv, in order of cases.

    sizes: of the ensembles, up to --ensemble; they are nested, the first n members of the same ones. out: run folder
    for masks, maps and pictures; None: nothing is written. None is returned where a signal came.
    """
    config = net.config
    rows: dict[int, dict[str, Any]] = {n: {} for n in sizes}
    turns = range(ranks.rank, ranks.rank + len(cases), ranks.world)  # equally many on each process
    for i in tqdm(
        turns, desc="cases", leave=False, disable=config.quiet or not ranks.first or None
    ):
        if stop is not None and stop.agreed(ranks)[0]:
            return None
        if i >= len(cases):
            continue
        case, truth = cases[i], np.asarray(data.label(cases[i]))
        cond, inside = whole_volume(data.image(case), net, net.record.get("grid"))
        diary = (
            figures.Diary(truth, inside, max(data.classes.values()))
            if out and i == 0 and config.method != "half"
            else None
        )
        for result in sample_ensemble(net, cond, case, diary):
            if result.size in rows:
                mask = x0_to_mask(result.mean)[inside].cpu().numpy()
                rows[result.size][case] = metrics.evaluate_case(
                    case, mask, truth, data.spacing(case), data.scored
                )
            member = x0_to_mask(result.member)[inside].cpu().numpy()
            if diary is not None and result.size <= 3:
                diary.members.append(member)
            if out and config.save_members:
                name = f"predictions/members/{case}_{result.size - 1}.nii.gz"
                loaders.write_on_grid(out / name, member, data.affine(case))
        if out:
            loaders.write_on_grid(out / f"predictions/{case}.nii.gz", mask, data.affine(case))
            for name, values in maps_of(result, net, inside).items():
                loaders.write_on_grid(
                    out / f"predictions/maps/{case}_{name}.nii.gz", values, data.affine(case)
                )
        if out and diary is not None:
            image, variance = np.asarray(data.image(case))[0], result.variance[inside].cpu().numpy()
            figures.case_sheet(
                out / "figures",
                case,
                image,
                mask,
                data.spacing(case),
                data.classes,
                diary,
                variance,
            )
    parts = runtime.gather(rows, ranks)
    return {
        n: [row for case in cases for part in parts for row in part[n].get(case, [])] for n in rows
    }


def maps_of(result: Ensemble, net: Network, inside: Any) -> dict[str, np.ndarray]:
    """With --save-maps: name -> [X, Y, Z] fp32, the mean of each channel and the variance; else nothing."""
    if not net.config.save_maps:
        return {}
    names = ["background"] * (len(result.mean) > 1) + [
        re.sub(r"\W+", "-", name) for name in net.record["classes"]
    ]
    maps = {f"mean_{name}": mean for name, mean in zip(names, result.mean)} | {
        "variance": result.variance
    }
    return {name: values[inside].cpu().numpy() for name, values in maps.items()}


def cases_to_score(config: Config, data: Any) -> list[str]:
    cases = [
        case for case in data.cases(config.split, config.limit or None) if data.has_label(case)
    ]
    if not cases:
        raise InputError(
            f"{config.data} has no labelled case in its split {config.split}; choose another --split"
        )
    for case in cases:
        data.label(case)  # refuses foreign values before anything is sampled
    return cases


def check_same_data(net: Network, config: Config, data: Any) -> None:
    here = loaders.data_record(data)
    for key in ("channels", "classes", "spacing", "normalisation"):
        if net.record[key] != here[key]:
            raise InputError(
                f"{config.data} has {key} {here[key]}, the checkpoint {net.record[key]}; prepare them alike"
            )


def evaluate(config: Config, data: Any, ranks: Ranks, out: Path | None = None) -> int:
    """Score a split on the prepared grid: prints the table, writes metrics.csv, summary.json, masks, pictures."""
    net, cases = load_network(config, ranks), cases_to_score(config, data)
    check_same_data(net, config, data)
    out, begin = (
        out or runtime.scores_folder(config, checkpoint_path(config), "patchddm"),
        time.perf_counter(),
    )
    sizes = sorted({n for n in NESTED if n < config.ensemble} | {config.ensemble})
    by_size: Any = score_cases(net, data, ranks, cases, out, sizes)
    dice: dict[str, list[float]] = {}
    if not ranks.first:
        return 0
    how = f"{config.sampler}, {config.sampling_steps} steps, target {config.target}, weights of step {net.step}"
    say(
        f"\n{config.split} split of {config.data}, {len(cases)} cases, {how}, {time.perf_counter() - begin:.0f} s"
    )
    for n, rows in by_size.items():
        summary, suffix = metrics.summarise(rows), "" if n == config.ensemble else f"_ensemble{n}"
        metrics.write_metrics_csv(out / f"metrics{suffix}.csv", rows)
        metrics.write_summary(out / f"summary{suffix}.json", summary)
        say(f"\nensemble of {n}\n{metrics.format_summary(summary)}")
        by_class = summary["classes"] | {"mean": summary["mean"]}
        dice |= {c: dice.get(c, []) + [v["dice"]["mean"]] for c, v in by_class.items()}
    if len(sizes) > 1:  # figure 4
        lines = {c: (sizes, values) for c, values in dice.items()}
        figures.curves(
            lines,
            out / "figures/ensemble.png",
            "Dice and ensemble size",
            "members",
            "Dice",
            dots=True,
        )
    if config.data == "synthetic":  # what intensity alone could reach, chosen with the truth
        images, labels = [data.image(c)[0] for c in cases], [data.label(c) for c in cases]
        best = [
            metrics.best_interval_dice(images, labels, value) for value in data.classes.values()
        ]
        text = ", ".join(
            f"{c} {b['threshold']:.3f} / {b['interval']:.3f}" for c, b in zip(data.classes, best)
        )
        say(
            f"\nbest Dice of any threshold / interval of intensity on these cases, chosen with the truth: {text}"
        )
    say(f"\nmasks, pictures and tables are in {out}")
    return 0


def load_network(config: Config, ranks: Ranks) -> Network:
    """The network of a checkpoint, with its averaged weights if it has them."""
    state = runtime.load_checkpoint(checkpoint_path(config), "patchddm")
    model = network_for(config, state["data"], ranks.device)
    model.load_state_dict(state["ema"] or state["model"])
    model = fast_layout(model).eval()
    dtype, _ = runtime.number_format(config.amp, ranks.device)
    return Network(config, model, state["data"], ranks.device, dtype, state["step"])


def grid(config: Config, data: Any, ranks: Ranks) -> int:
    """Figure 5: scores over steps x ensemble size, beside the network evaluations that each cell costs.

    Each member is sampled once; size n scores the first n. Cells go to grid.csv row by row, and what stands there for
    the same weights, cases and sampler is not sampled again. All others stay, but for rows in an older form; those of
    the same weights and cases are compared at equal evaluations.
    """
    net, cases, path = (
        load_network(config, ranks),
        cases_to_score(config, data),
        config.run_folder / "grid.csv",
    )
    check_same_data(net, config, data)
    steps, sizes = (
        sorted(set(np.atleast_1d(v).tolist())) for v in (config.sampling_steps, config.ensemble)
    )
    weights = zlib.crc32(
        b"".join(v.float().cpu().numpy().tobytes() for v in net.model.state_dict().values())
    )
    what: dict[str, Any] = {
        "weights": f"step {net.step}, {weights:08x}",
        "data": config.data,
        "split": config.split,
    }
    what |= {"cases": len(cases), "seed": config.seed, "clip": config.clip}
    how = {"timesteps": config.timesteps, "eta": config.eta, "sampler": config.sampler}
    cells = runtime.read_csv(path)
    if any("sampling_steps" not in c for c in cells):
        raise InputError(
            f"{path} has no column sampling_steps, has another program written it? Move it away"
        )
    cells = [c for c in cells if "data" in c]  # not those of an older form
    for s in steps:
        cost = evaluations(config.sampler, s, config.timesteps)
        fits = [
            n for n in sizes if not config.max_evaluations or n * cost <= config.max_evaluations
        ]
        key = {k: str(v) for k, v in (what | how | {"sampling_steps": s}).items()}
        known = [int(c["ensemble"]) for c in cells if all(c.get(k) == v for k, v in key.items())]
        if set(fits) <= set(known):
            continue
        begin, setting = time.perf_counter(), replace(config, sampling_steps=s, ensemble=max(fits))
        by_size = score_cases(replace(net, config=setting), data, ranks, cases, None, fits)
        seconds = time.perf_counter() - begin
        cells = [
            c
            for c in cells
            if int(c["ensemble"]) not in fits or any(c.get(k) != v for k, v in key.items())
        ]
        for n, rows in (by_size or {}).items():
            mean = metrics.summarise(rows)["mean"]
            scores = {
                f"{m}_{k}": f"{mean[m][k]:.6g}"
                for m in ("dice", "hd95_mm", "hd95_pooled_mm")
                for k in ("mean", "sd")
            }
            cost_of = {
                "ensemble": str(n),
                "evaluations": str(n * cost),
                "seconds": f"{seconds * n / max(fits):.1f}",
            }
            cells.append(key | cost_of | scores)
        if ranks.first:
            runtime.write_csv(path, cells)
    if ranks.first:
        cells = [c for c in cells if all(c.get(k) == str(v) for k, v in what.items())]
        show_grid(
            [c for c in cells if all(c[k] == str(v) for k, v in how.items())], steps, sizes, config
        )
        show_equal(cells)
        say(f"\nall cells are in {path}")
    return 0


def show_grid(
    cells: list[dict[str, str]], steps: list[int], sizes: list[int], config: Config
) -> None:
    """Print Dice and HD95 with the evaluations of each cell, and draw both as heat maps."""
    at = {(int(c["sampling_steps"]), int(c["ensemble"])): c for c in cells}
    once = {s: evaluations(config.sampler, s, config.timesteps) for s in steps}
    cost = [[f"{n * once[s]} evaluations" for n in sizes] for s in steps]
    for metric, unit, digits in (("dice", "Dice", 3), ("hd95_mm", "mm", 2)):
        values = [
            [float(at[s, n][f"{metric}_mean"]) if (s, n) in at else math.nan for n in sizes]
            for s in steps
        ]
        say(
            f"\n{metric} by steps and ensemble, in brackets the network evaluations; {config.sampler}"
        )
        say("steps  " + "".join(f"{f'ensemble {n}':>18}" for n in sizes))
        for s, row in zip(steps, values):
            texts = [
                "-" if math.isnan(v) else f"{v:.{digits}f} ({n * once[s]})"
                for v, n in zip(row, sizes)
            ]
            say(f"{s:<7}" + "".join(f"{text:>18}" for text in texts))
        file, title = (
            config.run_folder / f"figures/grid_{config.sampler}_{metric}.png",
            f"{metric}, {config.sampler}",
        )
        names = [f"{s} steps" for s in steps], [f"ensemble {n}" for n in sizes]
        figures.heat_map(
            np.array(values), *names, file, title, unit=unit, fmt=f"{{:.{digits}f}}", below=cost
        )


def show_equal(cells: list[dict[str, str]]) -> None:
    """Print side by side what costs the same number of network evaluations, the best first."""
    costs = sorted({int(c["evaluations"]) for c in cells})
    for cost in costs:
        same = [c for c in cells if int(c["evaluations"]) == cost]
        same.sort(key=lambda c: -float(c["dice_mean"]))
        names = []
        for c in same:
            how = (
                c["sampler"]
                + " code" * (c["timesteps"] == "code")
                + f" eta {c['eta']}" * (float(c["eta"]) > 0)
            )
            names.append(
                f"{how} {c['sampling_steps']} x {c['ensemble']} {float(c['dice_mean']):.3f}"
            )
        if len(same) > 1:
            say(f"Dice at {cost} evaluations (steps x ensemble): " + ", ".join(names))


PROFILE, WIDTHS = (
    ("method", "phase", "form", "voxels", "seconds", "GB", "in all", ""),
    (6, 9, 28, 16, 9, 7, 7, 0),
)


def profile(config: Config, data: Any, ranks: Ranks, given: dict[str, Any]) -> int:
    """Table 1: seconds and memory of one network evaluation in training and in sampling, on this device.

    Whole volumes are those of --data; without --data they are twice the patch along each axis, as in the paper, with
    four channels and one class. Every --method, unless one is given. Memory is what comes on top of the weights.
    """
    record = (
        loaders.data_record(data)
        if data
        else {"channels": ["t1", "t1ce", "t2", "flair"], "classes": {"tumour": 1}}
    )
    rows = []
    say("  ".join(f"{word:<{w}}" for word, w in zip(PROFILE, WIDTHS)))
    for method in [config.method] if "method" in given else ["patch", "full", "half"]:
        base = replace(config, method=method)  # type: ignore[arg-type]
        sizes = (
            [data.shape(c) for c in data.cases("train")]
            if data
            else [tuple(2 * n for n in config.patch_size)]
        )
        whole = padded_shape(
            [max(n) for n in zip(*sizes)], base, data.meta.get("grid") if data else None
        )
        whole = tuple(n // 2 for n in whole) if method == "half" else whole
        seen = config.patch_size if method == "patch" else whole
        for recompute in (False, True):
            for compiled in (False, True) if config.compile else (False,):
                name = "plain" + " --recompute" * recompute + " --compile" * compiled
                trial = replace(base, recompute=recompute, compile=compiled)
                rows.append(profile_row(trial, record, "training", name, seen, ranks.device))
        for name, slab in (
            ("plain", -1),
            ("lean", 0),
            (f"lean --slab {config.slab or 16}", config.slab or 16),
        ):
            rows.append(profile_row(base, record, "sampling", name, whole, ranks.device, slab))
        runtime.write_csv(config.run_folder / "profile.csv", rows)
    say(f"\nwritten to {config.run_folder / 'profile.csv'}")
    return 0


def profile_row(
    config: Config,
    record: dict[str, Any],
    phase: str,
    name: str,
    shape: Sequence[int],
    device: torch.device,
    slab: int = 0,
) -> dict[str, str]:
    """Measure, print and return one row of `profile`; slab -1: the plain forward pass."""
    dtype, training = runtime.number_format(config.amp, device)[0], phase == "training"
    batch = config.batch if training else 1
    row = {
        "method": config.method,
        "phase": phase,
        "form": name,
        "voxels": f"{batch}x" + "x".join(map(str, shape)),
    }
    try:
        check_memory(replace(config, slab=max(slab, 0)), record, shape, batch, training, device)
        model = fast_layout(network_for(config, record, device), config.compile).train(training)
        x = torch.zeros(batch, model.in_channels, *shape, device=device)
        net, t = (
            torch.compile(model) if config.compile and training else model,
            torch.zeros(batch, device=device),
        )

        def call() -> None:
            with (
                torch.autocast(device.type, dtype, enabled=dtype is not None),
                torch.set_grad_enabled(training),
            ):
                y = net(x, t) if training or slab < 0 else lean_forward(model, [x], t, slab)
            if training:
                y.float().square().mean().backward()
                model.zero_grad(set_to_none=True)

        trials = [runtime.measure(call, device)]
        trials += (
            [runtime.measure(call, device) for _ in range(3)] if trials[0][0] < 5 else []
        )  # the first warms up
        seconds, memory = np.median([s for s, _ in trials[1:] or trials]), max(m for _, m in trials)
        total = runtime.peak_memory_gb(device)
        row |= {
            "seconds": f"{seconds:.3f}",
            "memory_gb": f"{memory:.2f}",
            "process_gb": f"{total:.2f}",
            "note": "",
        }
    except (InputError, RuntimeError) as error:  # the check before it knows a lower bound only
        full = runtime.lacks_memory(error)
        if not (full or isinstance(error, InputError)):
            raise
        note = "out of memory" if full else str(error).split(";")[0]
        row |= {"seconds": "", "memory_gb": "", "process_gb": "", "note": note}
    say("  ".join(f"{v:<{w}}" for v, w in zip(row.values(), WIDTHS)))
    return row


# =====================================================================================================================
# Predict
# =====================================================================================================================


def predict(config: Config, ranks: Ranks) -> int:
    """Masks for NIfTI files or a folder of them, in the input's grid and with the published label values."""
    if not config.image or not config.output:
        raise InputError(
            "predict needs --image FILE... (or one folder) and --output FILE (or folder)"
        )
    net = load_network(config, ranks)
    names = net.record["channels"], net.record.get("channel_suffixes")
    inputs = loaders.find_inputs([Path(p) for p in config.image], *names)
    output = Path(config.output)
    to_file = output.name.endswith((".nii", ".nii.gz"))
    if to_file and len(inputs) > 1:
        raise InputError(
            f"--output {output} is one file, --image names {len(inputs)} images; give a folder"
        )
    say(f"{checkpoint_path(config)}: {net.record['name']}, step {net.step}", ranks)
    for case, paths in inputs[ranks.rank :: ranks.world]:
        target = output if to_file else output / f"{case}.nii.gz"
        loaders.check_output(target, paths)
        image, restore = loaders.load_for_prediction(
            paths, net.record
        )  # [C, X, Y, Z] on the network's grid
        cond, inside = whole_volume(image, net, net.record.get("grid"))
        stem = target.name.removesuffix(".gz").removesuffix(".nii")
        ending = target.name[len(stem) :]  # .nii or .nii.gz
        files = {}  # what --save-members and --save-maps add lies in folders beside the masks
        for result in sample_ensemble(net, cond, case):
            if config.save_members:
                member = restore.mask(x0_to_mask(result.member)[inside].cpu().numpy())
                files[f"members/{stem}_{result.size - 1}"] = member
        files[stem] = mask = restore.mask(x0_to_mask(result.mean)[inside].cpu().numpy())  # D8
        files |= {
            f"maps/{stem}_{name}": restore.map(v)
            for name, v in maps_of(result, net, inside).items()
        }
        for name, array in files.items():
            loaders.write_nifti(target.parent / f"{name}{ending}", array, restore.like, array.dtype)
        values = {
            name: int(net.record["label_values"][str(v)])
            for name, v in net.record["classes"].items()
        }
        say(
            f"{target}: voxels of "
            + ", ".join(f"{name} {int((mask == v).sum())}" for name, v in values.items())
        )
    return 0


# =====================================================================================================================
# Command line
# =====================================================================================================================

VERBS = ("train", "evaluate", "predict", "sample", "grid", "profile")
# Flag -> the verbs that look at it, "" being the bare run; given to others it is refused.
ONLY: dict[str, tuple[str, ...]] = {
    "image": ("predict",),
    "output": ("predict", "sample"),
    "max_evaluations": ("grid",),
}
ONLY |= {"checkpoint": ("evaluate", "predict", "sample", "grid"), "split": ("", "evaluate", "grid")}
ONLY |= {"limit": ("", "train", "evaluate", "grid"), "save_maps": ("", "evaluate", "predict")}
ONLY |= {"save_members": ("", "evaluate", "predict")}
# ONCE: how a trained network is used this time, neither kept from a training nor compared on continuing it.
ONCE = {
    "checkpoint",
    "split",
    "ensemble",
    "save_members",
    "save_maps",
    "image",
    "output",
    "overwrite",
    "quiet",
}
ONCE |= {"device", "amp", "workers", "max_evaluations", "slab", "split_devices"}
# MAY_DIFFER: on continuing a run, since they change where, how fast and how long, not what.
MAY_DIFFER = ONCE | {
    "out",
    "preset",
    "steps",
    "minutes",
    "compile",
    "recompute",
    "accumulate",
    "eval_every",
}
MAY_DIFFER |= {"save_every"}
# USE: for the verbs that use a trained network; other flags are refused where they differ from its training.
USE = ONCE | {
    "data",
    "preset",
    "out",
    "seed",
    "limit",
    "sampler",
    "sampling_steps",
    "timesteps",
    "eta",
    "clip",
}
USE |= {"recompute", "compile"}


def checkpoint_path(config: Config) -> Path:
    return runtime.checkpoint_file(config.checkpoint, config.run_folder)


def check_split(config: Config, given: Mapping[str, Any], ranks: Ranks) -> None:
    """InputError where --split-devices cannot work: several processes, no such GPU, autocast on two kinds of device."""
    if ranks.world > 1:
        raise InputError(
            f"--split-devices is for one process, {ranks.world} run here; start without torchrun"
        )
    names = config.split_devices.split(",")
    if given.get("device", names[0]) != names[0]:
        raise InputError(
            f"--split-devices begins with {names[0]}, --device is {given['device']}; leave one out"
        )
    for name in names:
        index, there = (
            int(name.partition(":")[2] or -1),
            torch.cuda.device_count() if torch.cuda.is_available() else 0,
        )
        if index >= there:
            raise InputError(
                f"--split-devices names {name}, but {there} GPUs are here; correct the flag"
            )
    kinds = {name.partition(":")[0] for name in names}
    if len(kinds) > 1 and runtime.number_format(config.amp, ranks.device)[0] is not None:
        raise InputError(
            "--split-devices over a CPU and a GPU computes in fp32 only; add --amp off"
        )


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").split("\n\n")[0]
    verb, config, given = runtime.parse_flags(Config, argv, VERBS, PRESETS, about, ONLY)
    for name in ("sampling_steps", "ensemble"):
        if verb != "grid" and isinstance(getattr(config, name), tuple):
            raise InputError(
                f"--{name.replace('_', '-')} takes one number here; only the verb grid takes several"
            )
    if verb in ("evaluate", "predict", "sample", "grid"):
        config = runtime.trained_config(
            config, given, checkpoint_path(config), "patchddm", USE, ONCE | {"limit"}
        )
        if (config.task == "generate") != (verb == "sample"):
            other = (
                "use the verb sample" if config.task == "generate" else "train with --task generate"
            )
            raise InputError(
                f"{verb} cannot use a network trained with --task {config.task}; {other}"
            )
    elif config.init:
        network = runtime.network_flags(Path(config.init), "patchddm")
        config = replace(config, **{k: v for k, v in network.items() if k not in given})
    device = config.split_devices.split(",")[0] or config.device
    ranks, stop = runtime.start_processes(device), runtime.StopFlag()
    if config.split_devices:
        check_split(config, given, ranks)
    try:
        if verb in ("", "train"):
            data, config = (
                loaders.open_data(config.data),
                runtime.shared_batch(config, given, ranks, config.run_folder),
            )
            if not verb and config.task == "segment":
                cases_to_score(config, data)  # before the training: are there some
            code = train(config, data, ranks, stop)
            stop.restore()  # from here on there is nothing to save
            if verb == "" and code == 0:
                used = replace(config, checkpoint="")
                segment = config.task == "segment"
                scores = metrics.scores_folder(config.run_folder, config.split, config.limit)
                code = evaluate(used, data, ranks, scores) if segment else generate(used, ranks)
        else:
            stop.restore()
            if verb == "predict":
                code = predict(config, ranks)
            elif verb == "sample":
                code = generate(config, ranks)
            elif verb == "profile":
                code = profile(
                    config,
                    loaders.open_data(config.data) if "data" in given else None,
                    ranks,
                    given,
                )
            else:
                code = (grid if verb == "grid" else evaluate)(
                    config, loaders.open_data(config.data), ranks
                )
    finally:
        stop.restore()
    runtime.stop_processes()
    return code


if __name__ == "__main__":
    sys.exit(runtime.run_main("patchddm", main, sys.argv[1:]))
