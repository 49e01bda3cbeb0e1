"""DiffSeg3D with recycling: 3D multiclass segmentation by diffusion in five steps, trained on its own predictions.

Paper
    Y. Fu, Y. Li, S. U. Saeed, M. J. Clarkson, Y. Hu: Importance of Aligning Training Strategy with Evaluation for
    Diffusion Models in 3D Multiclass Segmentation. DGM4MICCAI 2023, arXiv 2303.06040 (v1: the 2D networks too).

Idea
    A segmentation mask is generated from noise by a diffusion model that sees the image. Usually such a model is
    trained on the true mask with noise; where the noise is small the mask shines through and the network learns to
    copy it. In use there is no true mask to copy. So (1) training makes x_k from the network's own prediction at the
    noisier step k + 1 ("recycling": two passes, gradient through the second only), (2) the network predicts the mask
    instead of the noise, which (3) allows the Dice loss, and (4) it is trained on the five noise levels that sampling
    visits. --method unet is the same network without x_k and time: the baseline.

Symbols
    I            image  [B, M, X, Y, Z]  M channels in [0, 1]
    x_0          x0     [B, C, X, Y, Z]  mask: 1 in the channel of its class, else -1; C classes, background first
    x_k          xk     [B, C, X, Y, Z]  mask with noise, k = 1..K (k = 0: no noise), never clipped
    eps_k        eps    [B, C, X, Y, Z]  standard normal noise
    t_k          t[k]                    step of the original T = 1000 that k stands for; K = 5: 1, 251, 501, 750, 1000
    abar_k       abar[k]                 product of 1 - beta_s for s = 1..t_k; abar[0] = 1
    beta_k, alpha_k, btilde_k            1 - abar_k / abar_{k-1}; 1 - beta_k; beta_k (1 - abar_{k-1}) / (1 - abar_k)
    x_{0,theta}  x0hat  [B, C, X, Y, Z]  the predicted mask: 2 softmax(logits) - 1, or eq. (10) of predicted noise

Equations
    (1) mu = sqrt(abar_{k-1}) beta_k / (1 - abar_k) x_{0,theta} + sqrt(alpha_k) (1 - abar_{k-1}) / (1 - abar_k) x_k
    (2) mu = (x_k - beta_k / sqrt(1 - abar_k) eps_theta) / sqrt(alpha_k), which is (1) with x_{0,theta} of (10)
    (3) x_{k+1} = sqrt(abar_{k+1}) x_0 + sqrt(1 - abar_{k+1}) eps_{k+1}
    (4) x_{0,theta} = StopGradient(x_{0,theta}(I, k + 1, x_{k+1}))
    (5) x_k = sqrt(abar_k) x_{0,theta} + sqrt(1 - abar_k) eps_k
    (6) L = L_seg(x_0, x_{0,theta}(I, k, x_k)), L_seg = cross-entropy + Dice
    (7) L = || eps_k - eps_theta(I, k, x_k) ||^2, with --target eps added to (6), 0.1 times
    (8) x_{k+1} as in (3), with --target eps
    (9) eps_{k+1,theta} = StopGradient(eps_theta(I, k + 1, x_{k+1}))
    (10) x_{0,theta} = (x_{k+1} - sqrt(1 - abar_{k+1}) eps_{k+1,theta}) / sqrt(abar_{k+1})
    (11) x_k as in (5)

Differs
    D1  t_k is an even grid from 1 to T, and btilde_k is made of abar_k. Version 2 prints btilde with values of the fine
        schedule; the public code of the paper's numbers has four levels instead of five (--schedule code-v1).
    D2  the network is fed t_k (1..1000), added after the norm of a block. The public code adds it before, where the
        norm takes every constant away again: its network cannot see the time (--time-inject pre-norm).
    D3  the variance of a sampling step is btilde_k, as in the paper; the public code has beta_k (--variance large).
    D4  --target eps: x0hat is clipped to [-1, 1] in sampling and recycling, else an error of the noise is multiplied
        by 157 at k = K; the public code does not (--clip-x0 off).
    D5  recycling at k = K starts from K itself with noise of its own, as in the public code; the paper does not say.
    D6  the Dice loss is a mean over the classes that a volume holds, then over volumes; a volume without foreground
        counts as 0. The public code pools what one device holds, and skips the step.
    D7  the best checkpoint is chosen by the Dice of the foreground; the public code counts the background too.
    D8  augmentation turns and scales in mm, and shifts so that the foreground stays inside; the public code works in
        voxels (5 degrees become 16 at 0.75 x 0.75 x 2.5 mm) and limits the shift with the wrong sign. Its shift is 8 %
        of --size, on amos 15,10,10 voxels; the public code's is 10,10,10, which results/diffseg3d_table1.sh gives.
    D9  noise is a function of (seed, case, member); the public code starts every case from the same noise.
    D10 an ensemble is the mean probability; the public code lets the masks vote (--combine vote).
    D11 a volume larger than --size: training cuts a window at random, sampling slides it with Gaussian weights over
        probabilities, the noise being one field for the volume. The paper crops all volumes to one size.
    D12 images come scaled to [0, 1] by data_prep (fixed window for CT, percentiles for MR; the paper's own MR set by
        minimum and maximum of the whole volume) instead of by those after cropping; predict never crops.
    D13 the small presets: smaller network and batch, larger learning rate that falls until the last step. Of fewer than
        1,000 steps a tenth is warm-up.
    D14 the small presets: the image is spread from [0, 1] to [-2.5, 2.5]. Beside noise of SD 1 it otherwise makes
        a few per cent of what the first norm lets through, and training begins with getting it back.

Usage
    python diffseg3d_recycle.py                    on phantoms: recycled, not recycled and U-net, trained and scored
    python -m data_prep.msd --src Task04_Hippocampus --dst data/hippocampus
    python diffseg3d_recycle.py train --data hippocampus --preset laptop
    python diffseg3d_recycle.py evaluate --data hippocampus --preset laptop --ensemble 5
    python diffseg3d_recycle.py predict --data hippocampus --preset laptop --image scan.nii.gz --output mask.nii.gz
    torchrun --nproc_per_node=8 diffseg3d_recycle.py --data prostate       the paper's setting

Expect
    The bare run takes about four and a half minutes on two cores of a server CPU (bf16). On ten unseen
    phantoms it prints a mean foreground Dice of 0.94 recycled, 0.92 not recycled and 0.95 for the U-net, and the Dice
    after each sampling step: from k = 5 to k = 1 it holds (recycled), or falls from 0.922 to 0.916 (not recycled).
"""

import copy
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from common.old.unet import GroupNorm, fast_layout, timestep_embedding

SCRIPT = "diffseg3d_recycle"
T = 1000  # diffusion steps of the original schedule; t = 1..T, and k = 1..K of them, throughout this file
LOG_EVERY = 50  # steps

# =====================================================================================================================
# Config
# =====================================================================================================================


@dataclass(frozen=True)
class Config:
    """All flags. The defaults are the paper's (`--preset paper`); sections and tables are those of version 2."""

    # fmt: off
    data: str = flag("synthetic", "`synthetic`, a name below data/, or a prepared folder")
    preset: Literal["tiny", "laptop", "paper"] = flag("paper", "defaults of all other flags; tiny for synthetic data")
    out: str = flag("", "run folder; empty: runs/diffseg3d_recycle-DATA-PRESET")
    init: str = flag("", "start from the weights of this checkpoint, which also sets the network's flags")
    overwrite: bool = flag(False, "throw the run folder's old contents away")
    quiet: bool = flag(False, "no progress bars; one line at each evaluation")
    seed: int = flag(0, "of weights, order of cases, augmentation, noise")
    device: str = flag("auto", "auto | cpu | cuda | cuda:N")
    amp: Literal["auto", "bf16", "fp16", "off"] = flag("auto", "number format of convolutions (paper: bf16)")
    compile: bool = flag(False, "torch.compile the training network")
    recompute: bool = flag(False, "keep block inputs only for backward: less memory, x 4/3 time (public code: on)")
    workers: int = flag(4, "processes that load volumes, per rank; 0: in the training process")
    # network (section 4, implementation)
    method: Literal["diffusion", "unet"] = flag("diffusion", "unet: the baseline, no x_k and no time (table 2)")
    dims: int = flag(3, "2: slices across the last axis, together in one batch; 3 (v1, table 1)")
    num_channels: int = flag(32, "unit of --channel-mult (public code: 32)")
    channel_mult: tuple[int, ...] = flag((1, 2, 4, 8), "widths of the levels below full size, which has the first")
    time_inject: Literal["post-norm", "pre-norm"] = flag("post-norm", "where the time enters; pre-norm: nowhere (D2)")
    size: tuple[int, ...] = flag((), "voxels X,Y,Z in training; empty: the largest case, rounded up for the levels")
    image_range: tuple[float, ...] = flag((0.0, 1.0), "where the network gets the image's [0, 1] (paper: 0,1; D14)")
    # diffusion (sections 3.1, 3.2, 3.4)
    target: Literal["x0", "eps"] = flag("x0", "what the network predicts: the mask, or the noise (table 3a)")
    recycle: Literal["prev", "max", "none", "recursive", "self-condition"] = flag(
        "prev", "what x_k is made of: the prediction at k + 1, at K, the truth (table 1), or as others do it")
    dice: Literal["on", "off"] = flag("on", "Dice loss beside the cross-entropy (table 3b)")
    train_K: int = flag(5, "noise levels in training, 2..1000 (paper: 5; table 3c: 1000)")
    schedule: Literal["paper", "code-v1"] = flag("paper", "code-v1: the levels of the public code of March 2023 (D1)")
    # training (section 4); augmentation is drawn for each volume and axis
    rotate: float = flag(0.088, "largest turn about each axis in radians (public code: 0.088, 5 degrees)")
    translate: tuple[int, ...] = flag((), "largest shift in voxels X,Y,Z; empty: 8 % of --size (public code: 20,20,4)")
    scale: float = flag(0.15, "largest change of size along each axis (public code: 0.15)")
    image_noise: float = flag(0.0, "largest SD of noise on an image's [0, 1], drawn for each (public code: none)")
    steps: int = flag(12_500, "optimisation steps (paper: 12500)")
    minutes: float = flag(0.0, "stop after so many minutes of training; 0: no limit")
    batch: int = flag(8, "volumes a step, over all processes and accumulation (public code: 8)")
    accumulate: int = flag(1, "split the batch into so many parts, one after the other")
    lr: float = flag(1e-4, "largest learning rate, after at most 100 steps of warm-up (public code: 1e-4)")
    lr_steps: int = flag(10_000, "step where its cosine ends at lr / 100; 0: the last (public code: 10000)")
    weight_decay: float = flag(1e-8, "of AdamW (public code: 1e-8)")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: off (public code: 1)")
    ema: float = flag(0.0, "decay of the averaged weights used for sampling; 0: off (public code: off)")
    eval_every: int = flag(500, "steps between validations (public code: 500)")
    save_every: int = flag(500, "steps between saves")
    # sampling and evaluation
    sampler: Literal["ddpm", "ddim"] = flag("ddpm", "reverse process (paper: ddpm)")
    sampling_steps: int = flag(5, "noise levels K of sampling (paper: 5): as in training, or any after --train-K 1000")
    variance: Literal["small", "large"] = flag("small", "ddpm: btilde_k (paper) or beta_k (for --schedule code-v1)")
    eta: float = flag(0.0, "noise of ddim, 0..1")
    clip_x0: Literal["on", "off"] = flag("on", "--target eps: x0hat is clipped to [-1, 1] (D4)")
    ensemble: int = flag(1, "members: samples from different noise")
    combine: Literal["mean", "vote"] = flag("mean", "ensemble: mean probability, or majority of masks (public code)")
    save_members: bool = flag(False, "evaluate, predict: write each member's mask")
    save_maps: bool = flag(False, "evaluate, predict: write probabilities and their entropy")
    checkpoint: str = flag("", "evaluate, predict: weights; empty: OUT/best.pt, else OUT/last.pt")
    split: Literal["train", "val", "test"] = flag("test", "evaluate: which cases")
    limit: int = flag(0, "evaluate and validation: at most so many cases; 0: all")
    image: tuple[str, ...] = flag((), "predict: NIfTI files (one per channel, or 4D) or one folder")
    output: str = flag("", "predict: file (for one image) or folder")
    # fmt: on

    @property
    def widths(self) -> list[int]:
        return [self.num_channels * m for m in self.channel_mult]

    @property
    def stride(self) -> int:
        """How many voxels of an axis end in one at the lowest level."""
        return 2 ** len(self.channel_mult)

    @property
    def passes(self) -> int:
        """Backward passes of a training step."""
        return self.train_K if self.recycle == "recursive" and self.method == "diffusion" else 1

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{SCRIPT}-{Path(self.data).name}-{self.preset}")

    def __post_init__(self) -> None:
        """Ranges and the rules between flags; InputError names the flag."""
        for name in ("num_channels", "steps", "batch", "accumulate", "ensemble"):
            runtime.check_range(self, name, 1)
        for name in ("eval_every", "save_every"):
            runtime.check_range(self, name, 1)
        for name in (
            "minutes",
            "lr_steps",
            "weight_decay",
            "grad_clip",
            "workers",
            "limit",
            "seed",
        ):
            runtime.check_range(self, name, 0)
        for name in ("train_K", "sampling_steps"):
            runtime.check_range(self, name, 2, T)
        runtime.check_range(self, "dims", 2, 3)
        runtime.check_range(self, "lr", 0, 1, open_low=True)
        runtime.check_range(self, "ema", 0, 0.999999)
        runtime.check_range(self, "eta", 0, 1)
        runtime.check_range(self, "rotate", 0, 3.2)
        runtime.check_range(self, "scale", 0, 0.9)
        runtime.check_range(self, "image_noise", 0, 1)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(
                f"--device is {self.device}, expected auto, cpu, cuda or cuda:N; correct the flag"
            )
        for name in ("size", "translate"):
            if len(getattr(self, name)) not in (0, 3) or min(getattr(self, name), default=0) < 0:
                raise InputError(
                    f"--{name} is {getattr(self, name)}, expected X,Y,Z; give three numbers of 0 or more"
                )
        if len(self.image_range) != 2 or self.image_range[0] >= self.image_range[1]:
            raise InputError(
                f"--image-range is {self.image_range}, expected LEAST,GREATEST, as --image-range=-2.5,2.5"
            )
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                f"--channel-mult is {self.channel_mult}, expected whole numbers of 1 or more"
            )
        if short := [n for n in self.size[: self.dims] if n < self.stride]:
            raise InputError(
                f"--size {self.size} has an axis of {short[0]} voxels, shorter than the network's stride of "
                f"{self.stride} ({len(self.channel_mult)} levels in --channel-mult); use a larger size or fewer levels"
            )
        if self.size and math.prod(-(-n // self.stride) for n in self.size[: self.dims]) == 1:
            raise InputError(
                f"--size {self.size} leaves one voxel at the lowest level, and the norm needs two; use a larger size "
                "or fewer levels in --channel-mult"
            )
        if self.method == "unet" and self.target == "eps":
            raise InputError("--method unet has no noise to predict; use --target x0")
        if self.eta and self.sampler != "ddim":
            raise InputError("--eta belongs to --sampler ddim; ddpm has --variance")


SMALL: dict[str, Any] = {"num_channels": 12, "lr_steps": 0, "workers": 0}  # D13
SMALL |= {"image_range": (-2.5, 2.5)}  # D14
LAPTOP = {"batch": 2, "lr": 1e-3, "steps": 2000, "eval_every": 250, "save_every": 250}
TINY = {"channel_mult": (1, 2, 4), "size": (32, 32, 32), "batch": 4, "lr": 3e-3}
TINY |= {"steps": 500, "eval_every": 250, "save_every": 100}
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "laptop": SMALL | LAPTOP, "tiny": SMALL | TINY}

# =====================================================================================================================
# Model
# =====================================================================================================================

CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def instance_norm(channels: int) -> nn.Module:
    """Per sample and channel over space, eps 1e-5, with scale and offset: a group norm of one channel a group."""
    return GroupNorm(channels, channels)


class ResBlock(nn.Module):
    """GELU(h + x), h = conv-norm-GELU-conv-norm(x) and the time: as wide as its input, activation after the sum."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.conv1, self.conv2 = (
            CONV[config.dims](width, width, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norm1, self.norm2 = instance_norm(width), instance_norm(width)
        self.pre_norm, self.dims = config.time_inject == "pre-norm", config.dims
        if config.method == "diffusion":
            self.time = nn.Linear(4 * config.widths[0], width)

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:  # [B, c, *S] -> [B, c, *S]
        h = self.conv2(gelu(self.norm1(self.conv1(x))))
        if emb is None:
            return gelu(self.norm2(h) + x)
        b = (
            self.time(gelu(emb)).to(h.dtype).reshape(len(h), -1, *(1,) * self.dims)
        )  # [B, c, 1, ...]
        h = self.norm2(h + b) if self.pre_norm else self.norm2(h) + b  # D2
        return gelu(h + x)


class UNet(nn.Module):
    """The U-net of section 4: one block a level, strided convolutions down, transposed ones up, skips added.

    Called as model(x, t): x [B, C_in, X, Y, Z] of any size, t [B] in 1..T (ignored with --method unet); returns
    [B, C_out, X, Y, Z]. With --dims 2 the slices along Z go through a 2D network together.
    """

    def __init__(self, config: Config, in_channels: int, out_channels: int):
        super().__init__()
        dims, widths = config.dims, config.widths
        self.dims, self.recompute, self.timed = dims, config.recompute, config.method == "diffusion"
        self.emb_channels = 4 * widths[0]
        self.stem = nn.Sequential(
            CONV[dims](in_channels, widths[0], 3, padding=1, bias=False),
            instance_norm(widths[0]),
            nn.GELU("tanh"),
        )
        self.first = ResBlock(config, widths[0])
        self.downs = nn.ModuleList(
            nn.Sequential(CONV[dims](a, b, 2, stride=2, bias=False), instance_norm(b))
            for a, b in zip([widths[0], *widths], widths)
        )
        self.down_blocks = nn.ModuleList(ResBlock(config, w) for w in widths)
        upward = [*widths[::-1], widths[0]]  # 256, 128, 64, 32, 32
        self.ups = nn.ModuleList(UP[dims](a, b, 2, stride=2) for a, b in pairwise(upward))
        self.up_blocks = nn.ModuleList(ResBlock(config, w) for w in upward[1:])
        self.head = CONV[dims](widths[0], out_channels, 1)
        for m in self.modules():  # haiku's start; nothing begins at zero
            if isinstance(m, (CONV[dims], UP[dims], nn.Linear)):
                up = isinstance(m, UP[dims])
                sd = (
                    m.weight[:, 0] if up else m.weight[0]
                ).numel() ** -0.5  # 1 / sqrt(kernel x inputs)
                nn.init.trunc_normal_(m.weight, std=sd, a=-2 * sd, b=2 * sd)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def run(self, block: nn.Module, x: Tensor, emb: Tensor | None) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(
                block, x, emb, use_reentrant=False, preserve_rng_state=False
            )  # no dropout here
        return block(x, emb)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.dims == 2 and x.ndim == 5:
            batch, depth = x.shape[0], x.shape[-1]
            slices = x.movedim(-1, 1).flatten(0, 1)  # [B Z, C_in, X, Y]
            out = self.forward(slices, t.repeat_interleave(depth))
            return out.unflatten(0, (batch, depth)).movedim(1, -1)  # [B, C_out, X, Y, Z]
        emb = (
            timestep_embedding(t, self.emb_channels).to(x.dtype) if self.timed else None
        )  # [B, 4c]
        x = self.run(self.first, self.stem(x), emb)  # [B, c, *S]
        skips = []
        for down, block in zip(self.downs, self.down_blocks):
            skips.append(x)
            odd = [n % 2 for n in reversed(x.shape[2:])]
            if any(
                odd
            ):  # one zero voxel at the end of each odd axis, as JAX's "same" padding has it
                x = F.pad(x, [v for o in odd for v in (0, o)])
            x = self.run(block, down(x), emb)  # [B, c m, *ceil(S / 2)]
        for up, block in zip(self.ups, self.up_blocks):
            skip = skips.pop()
            cut = tuple(slice(n) for n in (None, None, *skip.shape[2:]))
            x = up(x)[cut]  # [B, c m', *S], cropped to the skip
            x = self.run(block, x + skip, emb)
        return self.head(x)  # [B, C_out, *S]


def build_model(config: Config, in_channels: int, out_channels: int) -> nn.Module:
    """The network; in_channels = image channels, then (diffusion) those of x_k, then (self-condition) of x0hat."""
    return UNet(config, in_channels, out_channels)


def network_for(config: Config, record: dict[str, Any]) -> nn.Module:
    """The network for the data that `record` describes (the `data` entry of a checkpoint)."""
    c = 1 + len(record["classes"])
    masks = 0 if config.method == "unet" else 2 if config.recycle == "self-condition" else 1
    return build_model(config, len(record["channels"]) + masks * c, c)


def check_memory(config: Config, record: dict[str, Any], ranks: Ranks) -> None:
    """InputError where a step needs more memory than is free: counted on tensors without storage."""
    if config.recompute:
        return
    device, share = ranks.device, config.batch // ranks.world
    dtype, batch = (
        runtime.number_format(config.amp, device)[0] or torch.float32,
        share // config.accumulate,
    )
    with torch.device("meta"):
        model = network_for(config, record).to(dtype).train()
        width = next(p for p in model.parameters() if p.ndim > 3).shape[1]
        x = torch.empty(batch, width, *config.size, dtype=dtype)
        maps = runtime.kept_for_backward_gb(lambda: model(x, torch.zeros(batch)))
    # Weights, their gradient, average and two moments, 4 bytes each, do not shrink with the batch.
    needed, free = (
        maps + 20e-9 * sum(p.numel() for p in model.parameters()),
        runtime.free_memory_gb(device),
    )
    if needed > free:
        split = f"--accumulate {share}, " if config.accumulate < share else ""
        size = "x".join(map(str, config.size))
        raise InputError(f"training on {batch} x {size} voxels needs about {needed:.1f} GB, {device} has {free:.1f} GB "
                         f"free; try {split}--recompute, a lower --batch or a smaller --size")  # fmt: skip


# A network with its number format: f(image, xk, t, prev) -> logits or noise [B, C, X, Y, Z] in fp32.
Call = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


def caller(model: Any, dtype: torch.dtype | None, image_range: Sequence[float] = (0, 1)) -> Call:
    """The channels put together, autocast for this one pass: what a pass without gradient casts is never reused."""
    low, high = image_range

    def f(image: Tensor, xk: Tensor | None, t: Tensor, prev: Tensor | None = None) -> Tensor:
        image = low + (high - low) * image  # D14
        x = torch.cat(
            [v for v in (image, xk, prev) if v is not None], dim=1
        )  # [B, M + C (+ C), X, Y, Z]
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            return model(x, t).float()

    return f


# =====================================================================================================================
# Diffusion: schedule, q, recycling, loss
# =====================================================================================================================


@dataclass(frozen=True)
class Schedule:
    """Tables [K + 1] over k = 0..K; t integer, the others float64."""

    K: int
    t: Tensor
    abar: Tensor
    beta: Tensor
    btilde: Tensor
    c0: Tensor  # of x_0 and
    cx: Tensor  # of x_k in the mean of x_{k-1}


@cache
def schedule(steps: int, kind: str, device: torch.device) -> Schedule:
    """K = `steps` levels of the original T; beta of the original is linear from 1e-4 (t = 1) to 0.02 (t = T)."""
    fine = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, T))])  # abar of t = 0..T
    if kind == "paper":  # D1: rounded half up
        t = np.array(
            [0] + [1 + (2 * k * (T - 1) + steps - 1) // (2 * (steps - 1)) for k in range(steps)]
        )
        abar = fine[t]
    else:  # every (T / K)th; of these K the K - 1 ratios, multiplied up again; the last one stands for two
        t = np.arange(steps + 1) * (T // steps)
        levels = np.cumprod(fine[t[2:]] / fine[t[1:-1]])  # [K - 1]
        abar = np.concatenate([[1.0], levels, levels[-1:]])
    before = np.concatenate([[1.0], abar[:-1]])  # abar_{k-1}
    beta, noisy = 1 - abar / before, np.where(abar < 1, 1 - abar, 1)
    btilde = (1 - before) / noisy * beta
    c0 = np.sqrt(before) * beta / noisy
    cx = np.sqrt(1 - beta) * (1 - before) / noisy
    return Schedule(
        steps, *(torch.tensor(v, device=device) for v in (t, abar, beta, btilde, c0, cx))
    )


def at(table: Tensor, k: Tensor, like: Tensor) -> Tensor:
    """table[k] for k [B] as [B, 1, 1, 1, 1], in the number type of `like`."""
    return table[k].to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def q_sample(s: Schedule, x0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
    """x_k from a mask and noise; k [B] in 1..K."""
    return (
        at(s.abar.sqrt(), k, x0) * x0 + at((1 - s.abar).sqrt(), k, x0) * eps
    )  # eq. (3), eq. (5), eq. (8), eq. (11)


def x0_of(s: Schedule, target: str, output: Tensor, xk: Tensor, k: Tensor) -> Tensor:
    """The mask that a network output stands for: [B, C, X, Y, Z], in [-1, 1] for logits, anything for noise."""
    if target == "x0":
        return 2 * output.softmax(dim=1) - 1
    return (xk - at((1 - s.abar).sqrt(), k, xk) * output) / at(s.abar.sqrt(), k, xk)  # eq. (10)


def x0hat_of(config: Config, s: Schedule, output: Tensor, xk: Tensor, k: Tensor) -> Tensor:
    """The mask as recycling and sampling use it."""
    x0 = x0_of(s, config.target, output, xk, k)
    return x0.clamp(-1, 1) if config.clip_x0 == "on" else x0  # D4


def posterior_mean(s: Schedule, x0: Tensor, xk: Tensor, k: Tensor) -> Tensor:
    """Mean of x_{k-1} given x_k and x_0. Eq. (2) is eq. (1) with eq. (10) put in: only this one is computed."""
    return at(s.c0, k, xk) * x0 + at(s.cx, k, xk) * xk  # eq. (1), and so eq. (2)


def segmentation_loss(logits: Tensor, label: Tensor, dice: bool) -> Tensor:
    """[B] from logits [B, C, X, Y, Z] and label [B, X, Y, Z]: cross-entropy, plus Dice over the foreground classes.

    Dice of a class is 1 - 2 sum(p y) / (sum(p) + sum(y)) over the volume; classes that it does not hold are left out.
    """
    ce = F.cross_entropy(logits, label.long(), reduction="none").flatten(1).mean(dim=1)  # [B]
    if not dice:
        return ce
    values = torch.arange(1, logits.shape[1], device=label.device).reshape(1, -1, 1, 1, 1)
    y = (label[:, None] == values).flatten(2)  # [B, C - 1, X Y Z]
    p = logits.softmax(dim=1)[:, 1:].flatten(2)
    true = y.sum(dim=2)  # [B, C - 1]
    loss = 1 - 2 * (p * y).sum(dim=2) / (p.sum(dim=2) + true).clamp(min=1)
    present = true > 0
    return ce + (loss * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)  # D6


def diffusion_loss(
    config: Config, s: Schedule, output: Tensor, label: Tensor, xk: Tensor, eps: Tensor, k: Tensor
) -> Tensor:
    """[B] of one network output; eps: the noise in x_k. The truth is the true mask, whatever x_k was made of."""
    if config.target == "x0":
        return segmentation_loss(output, label, config.dice == "on")  # eq. (6)
    p = (x0_of(s, "eps", output, xk, k) + 1) / 2
    seg = segmentation_loss(
        p.clamp(1e-5, 1).log(), label, config.dice == "on"
    )  # eq. (6); the softmax normalises
    return seg + 0.1 * (output - eps).square().flatten(1).mean(dim=1)  # eq. (7)


class Batch(NamedTuple):
    """Of B volumes; the last four are a function of (seed, n)."""

    image: Tensor  # [B, M, X, Y, Z]
    label: Tensor  # [B, X, Y, Z]
    affine: Tensor  # [B, 3, 4] of the augmentation
    k: Tensor  # [B] in 1..K
    coin: Tensor  # [B] bool, for self-conditioning
    n: Tensor  # [B]


def training_losses(
    f: Call, look: Call, config: Config, batch: Batch, draw: Callable[[str], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield losses [B] and times t [B]: once, or K times with --recycle recursive.

    A generator, since each pass of the chain wants its backward before the next begins.
    f: the network; look: the same without DDP, for passes without gradient. draw(name): noise [B, C, X, Y, Z].
    """
    image, label, k = batch.image, batch.label, batch.k
    s = schedule(config.train_K, config.schedule, image.device)
    if config.method == "unet":
        t = torch.full_like(k, T)
        yield segmentation_loss(f(image, None, t, None), label, config.dice == "on"), t
        return
    if config.recycle == "recursive":
        yield from recursive_losses(f, config, batch, draw)
        return
    eps = draw("eps")
    x0 = source = mask_to_x0(
        label, eps.shape[1]
    )  # source: what x_k is made of, the truth or a prediction
    if config.recycle in ("prev", "max"):
        j = (k + 1).clamp(max=s.K) if config.recycle == "prev" else torch.full_like(k, s.K)  # D5
        xj = q_sample(s, x0, draw("eps of the first pass"), j)
        with torch.no_grad():  # eq. (4), eq. (9)
            source = x0hat_of(config, s, look(image, xj, s.t[j], None), xj, j)
    xk = q_sample(s, source, eps, k)
    prev = torch.zeros_like(x0) if config.recycle == "self-condition" else None
    if (
        prev is not None and batch.coin.any()
    ):  # half of the samples are shown what the network made of the same x_k
        some = batch.coin.nonzero()[:, 0].to(image.device, non_blocking=True)
        with torch.no_grad():
            output = look(image[some], xk[some], s.t[k[some]], prev[some])
            prev[some] = x0hat_of(config, s, output, xk[some], k[some])
    output = f(image, xk, s.t[k], prev)
    yield diffusion_loss(config, s, output, label, xk, eps, k), s.t[k]


def recursive_losses(
    f: Call, config: Config, batch: Batch, draw: Callable[[str], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Down the whole chain from pure noise, a loss at each step; the truth enters through the losses only."""
    s = schedule(config.train_K, config.schedule, batch.image.device)
    xk = eps = draw("eps")
    for number in range(s.K, 0, -1):
        k = torch.full_like(batch.k, number)
        output = f(batch.image, xk, s.t[k], None)
        yield diffusion_loss(config, s, output, batch.label, xk, eps, k), s.t[k]
        if number > 1:
            eps = draw(f"eps {number - 1}")
            xk = q_sample(s, x0hat_of(config, s, output.detach(), xk, k), eps, k - 1)


# =====================================================================================================================
# Data: volumes, augmentation, masks as channels
# =====================================================================================================================


def mask_to_x0(label: Tensor, channels: int) -> Tensor:
    """[B, X, Y, Z] integers -> [B, C, X, Y, Z] fp32 in {-1, 1}, background first."""
    values = torch.arange(channels, device=label.device).reshape(1, -1, 1, 1, 1)
    return 2.0 * (label[:, None] == values) - 1


def training_size(config: Config, data: Any) -> tuple[int, ...]:
    """--size, or the grid that holds each training case, its axes multiples of the network's stride."""
    if config.size:
        return config.size
    least = [max(sides) for sides in zip(*(data.shape(c) for c in data.cases("train")))]
    return tuple(-(-n // config.stride) * config.stride for n in least)


def affine_of(
    angles: Sequence[float], scales: Sequence[float], spacing: Sequence[float]
) -> np.ndarray:
    """[3, 3] in voxels from a turn (radians, about x, then y, then z) and scaling, both in mm: A = D^-1 S R D."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    d = np.asarray(spacing, float)
    return (np.asarray(scales)[:, None] * (rz @ ry @ rx)) * d / d[:, None]  # D8


def pull(a: np.ndarray, shift: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """[3, 4], the input voxel that an output voxel p reads: c + A (p - c - shift), c the centre of the volume.

    An object at q is thus found at c + shift + A^-1 (q - c).
    """
    c = (np.asarray(shape) - 1) / 2
    return np.concatenate([a, (c - a @ (c + shift))[:, None]], axis=1)


def draw_affine(
    rng: np.random.Generator, label: np.ndarray, spacing: Sequence[float], config: Config
) -> np.ndarray:
    """[3, 4]: a random turn, scaling and shift; the shift keeps the box round the foreground inside the volume."""
    shape, u = np.array(label.shape), rng.uniform(-1, 1, (3, 3))
    most = np.array(config.translate or [math.floor(0.08 * n + 0.5) for n in label.shape], float)
    a = affine_of(u[0] * config.rotate, 1 + u[1] * config.scale, spacing)
    low, high = -most, most
    if label.any():
        sides = [
            np.flatnonzero(label.any(axis=other))[[0, -1]] for other in ((1, 2), (0, 2), (0, 1))
        ]
        c = (shape - 1) / 2
        corners = (
            c + (np.array(list(product(*sides))) - c) @ np.linalg.inv(a).T
        )  # [8, 3], where they come to lie
        low, high = (
            np.maximum(low, -corners.min(axis=0)),
            np.minimum(high, shape - 1 - corners.max(axis=0)),
        )  # D8
    middle, half = (low + high) / 2, np.maximum(high - low, 0) / 2
    return pull(a, middle + u[2] * half, label.shape)


def augment(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, image (linear) and label (nearest) resampled there by each sample's affine; outside 0.

    coin and n stay where they are: they are asked for values, and a GPU would have to be waited for.
    """
    still = bool((batch.affine == torch.eye(3, 4)).all())
    image, label, affine, k = (v.to(device, non_blocking=True) for v in batch[:4])
    batch = batch._replace(image=image, label=label, affine=affine, k=k)
    if still:
        return batch
    affine, shape = affine.float(), label.shape[1:]
    axes = [torch.arange(n, dtype=torch.float32, device=affine.device) for n in shape]
    p = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [X, Y, Z, 3]
    p = p @ affine[:, None, None, :, :3].mT + affine[:, None, None, None, :, 3]  # [B, X, Y, Z, 3]
    # -1 and 1 are the centres of the first and the last voxel; grid_sample wants the last axis first.
    last = (torch.tensor(shape) - 1).clamp(min=1).to(device, non_blocking=True)
    grid = (2 * p / last - 1).flip(-1)
    image = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    moved = F.grid_sample(
        label[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=True
    )
    return batch._replace(image=image, label=moved[:, 0].to(label.dtype))


def with_image_noise(batch: Batch, config: Config) -> Batch:
    """Noise on each image, its SD uniform in 0..--image-noise; a function of (seed, n). x_k has noise of its own."""
    ns = batch.n.tolist()
    sd = [
        config.image_noise
        * np.random.default_rng(seed_of(config.seed, "SD of image noise", n)).random()
        for n in ns
    ]
    eps = noise(
        config.seed, "image noise", ns, batch.image.shape[1:], batch.image.device
    )  # [B, M, X, Y, Z]
    sds = torch.tensor(sd, dtype=eps.dtype).to(eps.device, non_blocking=True)  # [B]
    return batch._replace(image=batch.image + eps * sds.reshape(-1, 1, 1, 1, 1))


class Volumes(Dataset):
    """Sample n = 0, 1, 2, ... of the training: all of it is a function of (seed, n).

    n counts over the global batches, so the number of processes, workers and restarts changes nothing.
    """

    def __init__(self, data: Any, config: Config):
        self.data, self.config = data, config
        self.cases = [c for c in data.cases("train") if data.has_label(c)]
        if not self.cases:
            raise InputError(
                f"{config.data} has no labelled training case; prepare data with labels"
            )

    def __getitem__(self, n: int) -> Batch:
        config = self.config
        epoch, place = divmod(n, len(self.cases))
        order = np.random.default_rng(seed_of(config.seed, "order", epoch)).permutation(
            len(self.cases)
        )
        case = self.cases[order[place]]
        rng = np.random.default_rng(seed_of(config.seed, "volume", n))
        image, label = self.data.image(case), self.data.label(case)
        # Smaller axes are padded symmetrically with 0, of larger ones a random part is taken.
        start = [
            int(rng.integers(0, have - want + 1)) if have > want else -((want - have) // 2)
            for have, want in zip(label.shape, config.size)
        ]  # D11
        image, label = (loaders.read_window(v, start, config.size) for v in (image, label))
        affine = draw_affine(rng, label, self.data.spacing(case), config)
        k, coin = int(rng.integers(1, config.train_K + 1)), bool(rng.random() < 0.5)
        return Batch(image.astype(np.float32), label, affine, k, coin, n)  # type: ignore[arg-type]  # D12


def absent_classes(data: Any, cases: Sequence[str]) -> list[str]:
    """The classes that no case holds; InputError names cases whose label holds a value that no class has."""
    found: set[int] = set()
    faults = []
    for case in cases:
        try:
            found.update(np.flatnonzero(np.bincount(np.ravel(data.label(case)))).tolist())
        except InputError as error:
            faults.append(str(error))
    if faults:
        more = f"; and {len(faults) - 3} more cases" if len(faults) > 3 else ""
        raise InputError("; ".join(faults[:3]) + more)
    return [name for name, value in data.classes.items() if value not in found]


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
    """lr / 10 -> lr in 100 steps, then a half cosine to lr / 100 at --lr-steps, where it stays."""
    end = config.lr_steps or config.steps
    warm = min(100, end // 10)  # D13
    if step < warm:
        return config.lr * (0.1 + 0.9 * step / warm)
    done = min((step - warm) / max(1, end - warm), 1.0)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


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
        self.model = fast_layout(network_for(config, record).to(device), config.compile)
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
            "script": SCRIPT,
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
    run: Training,
    net: Any,
    look: Any,
    batches: Iterator[Any],
    ranks: Ranks,
    losses_by_t: runtime.LossByTime,
) -> Tensor:
    """One optimisation step of the global batch; returns the gradient norm before clipping.

    net, look: run.model with and without DDP, compiled or not. A step without a finite gradient changes no weight.
    """
    config, device = run.config, run.device
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    for part in range(config.accumulate):
        batch = augment(Batch(*next(batches)), device)
        if config.image_noise:
            batch = with_image_noise(batch, config)
        shape, ns = (1 + len(run.record["classes"]), *batch.label.shape[1:]), batch.n.tolist()
        draw = partial(noise, config.seed, ns=ns, shape=shape, device=device)  # [B, C, X, Y, Z]
        f, first = (caller(m, run.dtype, config.image_range) for m in (net, look))
        losses = training_losses(f, first, config, batch, draw)
        for number in range(1, config.passes + 1):
            last = part == config.accumulate - 1 and number == config.passes
            with (
                nullcontext() if ranks.world == 1 or last else net.no_sync()
            ):  # gradients travel with the last pass
                loss, t = next(losses)  # [B], [B]
                run.scaler.scale(loss.mean() / (config.accumulate * config.passes)).backward()
            losses_by_t.add(t, loss.detach())
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    run.scaler.step(
        run.optimizer
    )  # does nothing where the norm is not finite, on all processes alike
    run.scaler.update(None if run.dtype == torch.float16 else 1.0)
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
    volumes = Volumes(data, config)
    absent = absent_classes(data, volumes.cases)
    absent_classes(data, validation_cases(config, data))
    state = (
        None
        if config.overwrite
        else runtime.find_run(out, SCRIPT, asdict(config), MAY_DIFFER, record, ranks)
    )
    if state is None or state["step"] < config.steps:
        check_memory(config, record, ranks)
    run = Training(config, record, device, dtype)
    if state is not None:
        run.restore(state)
    elif config.init:
        runtime.load_start(config.init, SCRIPT, run.model)
        run.ema.load_state_dict(run.model.state_dict())
    runtime.make_run(out, asdict(config), config.overwrite, ranks)
    runtime.check_same_weights(run.model, ranks, "at the start")
    print_header(config, data, ranks, run, reason, absent)

    # 2. all processes work on parts of one global batch; DDP averages their gradients
    look: Any = torch.compile(run.model) if config.compile else run.model
    net: Any = DistributedDataParallel(look) if ranks.world > 1 else look
    net.train()
    loader = DataLoader(
        volumes,
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
        norm = train_step(run, net, look, batches, ranks, losses_by_t)
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
        how = f"recycle {config.recycle}" if config.method == "diffusion" else "U-net"
        title = f"DiffSeg3D, {Path(config.data).name}, {how}"
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
    """The labelled cases of val, at most --limit."""
    return [case for case in data.cases("val", config.limit or None) if data.has_label(case)]


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
    scores = score_cases(net, data, ranks, validation_cases(config, data), None, stop)
    run.model.train()
    if scores is None:
        return
    summary = metrics.summarise(scores.rows[1])
    dice = summary["mean"]["dice"]["mean"]
    better = dice >= run.best["dice"]  # D7; of equals the later one
    run.best = {"dice": dice, "step": run.step} if better else run.best
    run.best |= {"seen": run.step}
    for name in ["best.pt"] * better + ["last.pt"]:
        if ranks.first:
            run.save(name)
    row = {f"val_dice_{c}": v["dice"]["mean"] for c, v in summary["classes"].items()}
    log.row({"step": run.step, "seconds": run.seconds, "val_dice": dice} | row)


def print_header(
    config: Config, data: Any, ranks: Ranks, run: Training, reason: str, absent: Sequence[str]
) -> None:
    """What this run is, before it starts. absent: classes that no training case holds."""
    counts = ", ".join(f"{len(data.cases(s))} {s}" for s in ("train", "val", "test"))
    share = f"{ranks.world} processes x {config.accumulate} parts x {config.batch // (ranks.world * config.accumulate)}"
    parameters, size = (
        sum(p.numel() for p in run.model.parameters()),
        "x".join(map(str, config.size)),
    )
    paper, diffusion = Config(), config.method == "diffusion"
    larger = [
        c for c in data.cases("train") if any(n > s for n, s in zip(data.shape(c), config.size))
    ]
    small = any(
        getattr(config, k) != getattr(paper, k)
        for k in ("num_channels", "channel_mult", "batch", "lr", "lr_steps")
    )
    notes = {
        "D6": config.dice == "on",
        "D7": True,
        "D8": True,
        "D11": bool(larger),
        "D12": True,
        "D13": small,
        "D14": config.image_range != (0, 1),
    }
    if diffusion:
        notes |= {
            "D1": config.schedule == "paper",
            "D2": config.time_inject == "post-norm",
            "D9": True,
        }
        notes |= {"D10": config.combine == "mean"}
        notes |= {
            "D3": config.variance == "small",
            "D4": config.target == "eps" and config.clip_x0 == "on",
        }
        notes |= {"D5": config.recycle == "prev"}
    what = f"{config.method}, {config.dims}D, volumes of {size}"
    how = (
        f"; target {config.target}, recycle {config.recycle}, K = {config.train_K}"
        if diffusion
        else ""
    )
    lines = [f"DiffSeg3D with recycling (Fu et al. 2023) -> {config.run_folder}"]
    lines += [
        f"  data      {config.data}: {counts}; {', '.join(data.channels)}; classes {', '.join(data.classes)}"
    ]
    if larger:
        lines += [
            f"            {len(larger)} training cases are larger than {size}: a random part of them is taken"
        ]
    if absent:
        lines += [
            f"            warning: no training case holds {', '.join(absent)}; it will not be learnt"
        ]
    lines += [f"  network   {parameters:,} parameters, {what}"]
    lines += [f"  training  step {run.step} to {config.steps}, batch {config.batch} = {share}{how}"]
    memory = runtime.peak_memory_gb(ranks.device)
    number = "fp32" if run.dtype is None else str(run.dtype)[6:]
    lines += [f"  device    {ranks.device}, {number} ({reason}), {memory:.1f} GB"]
    lines += [
        f"  differs   {' '.join(sorted((d for d in notes if notes[d]), key=lambda d: int(d[1:])))} (see the top)"
    ]
    lines += ["  time      left_s in the first lines below"] * (
        run.step < config.steps and not config.quiet
    )
    say("\n".join(lines), ranks)


# =====================================================================================================================
# Sample
# =====================================================================================================================


def ddpm_step(s: Schedule, x0: Tensor, xk: Tensor, k: Tensor, variance: str, z: Tensor) -> Tensor:
    """From x_k to x_{k-1}; variance: small (btilde) or large (beta); z: standard normal."""
    sd = (s.btilde if variance == "small" else s.beta).sqrt()  # D3
    return posterior_mean(s, x0, xk, k) + at(sd, k, xk) * z


def ddim_step(s: Schedule, x0: Tensor, xk: Tensor, k: Tensor, eta: float, z: Tensor) -> Tensor:
    """From x_k to x_{k-1} without noise (eta 0), with that of ddpm (eta 1), or in between."""
    before = torch.cat([s.abar[:1], s.abar[:-1]])  # abar_{k-1}
    variance = eta**2 * s.btilde
    e = (xk - at(s.abar.sqrt(), k, xk) * x0) / at(
        (1 - s.abar).sqrt(), k, xk
    )  # the noise that leads from x0 to x_k
    rest = at((1 - before - variance).clamp(min=0).sqrt(), k, xk)
    return at(before.sqrt(), k, xk) * x0 + rest * e + at(variance.sqrt(), k, xk) * z


def sample(
    f: Call,
    image: Tensor,
    noise_of: Callable[[int], Tensor],
    config: Config,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (k, x0hat) for k = K..1, from x_K = noise_of(K); the last one is the result. All [B, C, X, Y, Z].

    noise_of(k): the standard normal noise that is added in making x_k. watch is shown t_k, x_k and x0hat.
    """
    if config.method == "unet":
        yield (
            1,
            2 * f(image, None, torch.ones(len(image), device=image.device), None).softmax(dim=1)
            - 1,
        )
        return
    s = schedule(config.sampling_steps, config.schedule, image.device)
    xk = noise_of(s.K)
    prev = torch.zeros_like(xk) if config.recycle == "self-condition" else None
    for j in range(s.K, 0, -1):
        k = torch.full((len(image),), j, device=image.device)
        x0 = x0hat_of(config, s, f(image, xk, s.t[k], prev), xk, k)
        if watch is not None:
            watch(int(s.t[j]), xk, x0)
        yield j, x0
        if j == 1:
            return
        z = noise_of(j - 1) if config.sampler == "ddpm" or config.eta > 0 else torch.zeros_like(xk)
        if config.sampler == "ddim":
            xk = ddim_step(s, x0, xk, k, config.eta, z)
        else:
            xk = ddpm_step(s, x0, xk, k, config.variance, z)
        prev = None if prev is None else x0


def probability(config: Config, x0: Tensor) -> Tensor:
    """x0hat [B, C, X, Y, Z] -> probabilities that sum to 1 over the channels."""
    p = (x0 + 1) / 2
    if config.target == "x0":
        return p
    if config.clip_x0 == "off":  # the largest channel stays the largest, as in the public code
        p = p - p.amin(dim=1, keepdim=True).clamp(max=0) + 1e-8
    p = (
        p.clamp(min=1e-8) if config.clip_x0 == "off" else p.clamp(1e-8, 1)
    )  # where no channel says yes: all alike
    return p / p.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Network:
    """A network with what sampling needs to know. record: the `data` entry of a checkpoint; dtype: of autocast."""

    config: Config
    model: nn.Module
    record: dict[str, Any]
    device: torch.device
    dtype: torch.dtype | None
    step: int


def padded(shape: Sequence[int], config: Config) -> tuple[list[int], list[int], tuple[slice, ...]]:
    """(grid of at least --size, window, the slices that cut the volume out of the grid again)."""
    window = [
        *config.size[:2],
        shape[2] if config.dims == 2 else config.size[2],
    ]  # 2D: windows in the plane
    full = [max(n, w) for n, w in zip(shape, window)]
    front = loaders.symmetric_pad(shape, full)
    return full, window, tuple(slice(f, f + n) for f, n in zip(front, shape))


def windows(full: Sequence[int], window: Sequence[int]) -> list[tuple[slice, ...]]:
    """Half overlapping windows that cover the grid; the last one of each axis ends with it."""
    starts = [[*range(0, n - w, max(1, w // 2)), n - w] for n, w in zip(full, window)]  # D11
    return [tuple(slice(a, a + w) for a, w in zip(corner, window)) for corner in product(*starts)]


def gaussian(window: Sequence[int]) -> Tensor:
    """Weights [*window]: sigma is an eighth of each axis, and nowhere less than 1e-3 of the largest."""
    w = torch.ones(())
    for n in window:
        w = w[..., None] * torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2)
    return w.clamp(min=1e-3 * float(w.max()))


@torch.no_grad()
def sample_member(
    net: Network, image: Tensor, case: str, number: int, watch: Any = None
) -> dict[int, Tensor]:
    """Member `number` of a case: k -> probabilities [C, X, Y, Z] after step k, up to ten of them; k = 1 is the result.

    image: [M, X, Y, Z]. Each noise field is drawn for the whole volume on the CPU from (seed, case, number, k), so
    windows that overlap agree on it, and it is the same on every device. watch: for volumes of one window.
    """
    config, channels = net.config, 1 + len(net.record["classes"])
    full, window, inside = padded(image.shape[1:], config)
    whole, cut_out = torch.zeros(len(image), *full, device=net.device), (slice(None), *inside)
    whole[cut_out] = image.to(net.device)  # [M, *full]
    places, f = windows(full, window), caller(net.model, net.dtype, config.image_range)

    def field(k: int) -> Tensor:  # [C, *full]
        generator = torch.Generator().manual_seed(
            seed_of(config.seed, "sample", case, number, k)
        )  # D9
        return torch.randn(channels, *full, generator=generator)

    field = cache(field) if len(places) > 1 else field  # type: ignore[assignment]

    def noise_of(place: tuple[slice, ...], k: int) -> Tensor:  # [1, C, *window]
        cut = (slice(None), *place)
        return field(k)[cut][None].to(net.device)

    keep = {round(k) for k in np.linspace(1, config.sampling_steps, min(config.sampling_steps, 10))}
    total: dict[int, Tensor] = {}
    weight = (
        gaussian(window).to(net.device) if len(places) > 1 else torch.ones((), device=net.device)
    )
    weights = torch.zeros(full, device=net.device)
    for place in places:
        cut = (slice(None), *place)
        weights[place] += weight
        for k, x0 in sample(f, whole[cut][None], partial(noise_of, place), config, watch):
            if k == 1 or (
                number == 0 and k in keep
            ):  # the steps on the way are kept of the first member only
                total.setdefault(k, torch.zeros(channels, *full, device=net.device))
                total[k][cut] += weight * probability(config, x0)[0]
    return {k: (v / weights)[cut_out] for k, v in total.items()}


@dataclass(frozen=True)
class Ensemble:
    """Result of `size` members: mask [X, Y, Z] uint8, mean probability [C, X, Y, Z]; the newest member's mask.

    steps: k -> mask of the first member after step k.
    """

    size: int
    mask: Tensor
    prob: Tensor
    member: Tensor
    steps: dict[int, Tensor]


def mask_of(prob: Tensor) -> Tensor:
    """[C, X, Y, Z] -> [X, Y, Z] uint8: the largest channel, of equals the lower one."""
    return prob.argmax(dim=0).to(torch.uint8)


def entropy(prob: Tensor) -> Tensor:
    """[C, X, Y, Z] -> [X, Y, Z]: 0 where one class is sure, 1 where all are equally likely."""
    return torch.special.entr(prob).sum(dim=0) / math.log(len(prob))


def sample_ensemble(
    net: Network, image: Tensor, case: str, watch: Any = None
) -> Iterator[Ensemble]:
    """Sample --ensemble members one after the other and yield the result so far after each."""
    mean = votes = torch.zeros(())
    steps: dict[int, Tensor] = {}
    for n in range(1, net.config.ensemble + 1):
        probs = sample_member(net, image, case, n - 1, watch if n == 1 else None)
        steps = steps or {k: mask_of(p) for k, p in probs.items()}
        mean, member = mean + (probs[1] - mean) / n, mask_of(probs[1])
        if net.config.combine == "vote":
            votes = votes + (mask_to_x0(member[None], len(mean))[0] + 1) / 2
        yield Ensemble(
            n, mask_of(votes if net.config.combine == "vote" else mean), mean, member, steps
        )  # D10


# =====================================================================================================================
# Evaluate
# =====================================================================================================================


class Scores(NamedTuple):
    """rows: ensemble size -> rows of metrics.csv; steps: a row for each case and k, in order of cases."""

    rows: dict[int, list[dict[str, Any]]]
    steps: list[dict[str, Any]]


def score_cases(
    net: Network,
    data: Any,
    ranks: Ranks,
    cases: Sequence[str],
    out: Path | None,
    stop: runtime.StopFlag | None = None,
) -> Scores | None:
    """Sample and score `cases`, shared over the processes; also the Dice after each sampling step.

    out: run folder for masks, maps and pictures; None: nothing is written. None is returned where a signal came.
    """
    config = net.config
    found: dict[Any, Any] = {n: {} for n in (1, config.ensemble)} | {"steps": {}}
    turns = range(ranks.rank, ranks.rank + len(cases), ranks.world)  # equally many on each process
    for i in tqdm(
        turns, desc="cases", leave=False, disable=config.quiet or not ranks.first or None
    ):
        if stop is not None and stop.agreed(ranks)[0]:
            return None
        if i >= len(cases):
            continue
        case, truth = cases[i], np.asarray(data.label(cases[i]))
        image = torch.from_numpy(np.asarray(data.image(case), np.float32))  # [M, X, Y, Z]
        full, window, inside = padded(truth.shape, config)
        diary = figures.Diary(truth, inside, max(data.classes.values())) if out and i == 0 else None
        for result in sample_ensemble(net, image, case, diary if full == window else None):
            if result.size in found:
                mask = result.mask.cpu().numpy()
                found[result.size][case] = metrics.evaluate_case(
                    case, mask, truth, data.spacing(case), data.scored
                )
            if out and config.save_members:
                member = out / f"predictions/members/{case}_{result.size - 1}.nii.gz"
                loaders.write_on_grid(member, result.member.cpu().numpy(), data.affine(case))
        found["steps"][case] = [
            {"case": case, "k": k}
            | {c: metrics.dice(m == v, truth == v) for c, v in data.classes.items()}
            for k, m in (
                (k, m.cpu().numpy()) for k, m in sorted(result.steps.items(), reverse=True)
            )
        ]
        if out:
            loaders.write_on_grid(out / f"predictions/{case}.nii.gz", mask, data.affine(case))
            for name, values in maps_of(result, net).items():
                loaders.write_on_grid(
                    out / f"predictions/maps/{case}_{name}.nii.gz", values, data.affine(case)
                )
        if out and diary is not None:
            draw_case(out / "figures", case, data, mask, result, diary)
    parts = runtime.gather(found, ranks)
    joined = {
        key: [row for case in cases for part in parts for row in part[key].get(case, [])]
        for key in found
    }
    return Scores({n: joined[n] for n in (1, config.ensemble)}, joined["steps"])


def draw_case(
    folder: Path, case: str, data: Any, mask: np.ndarray, result: Ensemble, diary: figures.Diary
) -> None:
    """Masks over slices, the way from noise to mask, and the image beside the entropy of the probabilities."""
    image, spacing = np.asarray(data.image(case))[0].astype(np.float32), data.spacing(case)
    if diary.frames:
        figures.case_sheet(
            folder, case, image, mask, spacing, data.classes, diary, np.zeros(1)
        )  # no variance
    else:
        masks = {"truth": diary.truth, "prediction": mask}
        figures.mask_slices(image, masks, folder / f"{case}.png", spacing, data.classes, title=case)
    pair = [
        figures.radiological(v[:, :, diary.z]) for v in (image, entropy(result.prob).cpu().numpy())
    ]
    figures.montage(pair, ["image", "entropy"], folder / f"{case}_entropy.png", title=case)


def maps_of(result: Ensemble, net: Network) -> dict[str, np.ndarray]:
    """With --save-maps: name -> [X, Y, Z] fp32, the mean probability of each channel and the entropy; else nothing."""
    if not net.config.save_maps:
        return {}
    names = ["background", *(re.sub(r"\W+", "-", name) for name in net.record["classes"])]
    maps = {f"mean_{name}": p for name, p in zip(names, result.prob)} | {
        "entropy": entropy(result.prob)
    }
    return {name: values.cpu().numpy() for name, values in maps.items()}


def cases_to_score(config: Config, data: Any) -> list[str]:
    cases = [
        case for case in data.cases(config.split, config.limit or None) if data.has_label(case)
    ]
    if not cases:
        raise InputError(
            f"{config.data} has no labelled case in its split {config.split}; choose another --split"
        )
    absent_classes(data, cases)
    return cases


def evaluate(config: Config, data: Any, ranks: Ranks, out: Path | None = None) -> int:
    """Score a split on the prepared grid: prints the table, writes metrics.csv, summary.json, masks, pictures."""
    net, here = load_network(config, ranks), loaders.data_record(data)
    for key in ("channels", "classes", "spacing", "normalisation"):
        if net.record[key] != here[key]:
            raise InputError(
                f"{config.data} has {key} {here[key]}, the checkpoint {net.record[key]}; prepare them alike"
            )
    out, cases = (
        out or runtime.scores_folder(config, checkpoint_path(config), SCRIPT),
        cases_to_score(config, data),
    )
    begin = time.perf_counter()
    scores = score_cases(net, data, ranks, cases, out)
    if not ranks.first:
        return 0
    assert scores is not None  # without a StopFlag
    how = f"{config.sampler}, {config.sampling_steps} steps, recycle {config.recycle}, target {config.target}"
    how = f"{how if config.method == 'diffusion' else 'U-net'}, weights of step {net.step}"
    say(
        f"\n{config.split} split of {config.data}, {len(cases)} cases, {how}, {time.perf_counter() - begin:.0f} s"
    )
    for n, rows in scores.rows.items():
        summary, suffix = metrics.summarise(rows), "" if n == config.ensemble else f"_ensemble{n}"
        metrics.write_metrics_csv(out / f"metrics{suffix}.csv", rows)
        metrics.write_summary(out / f"summary{suffix}.json", summary)
        say(f"\nensemble of {n}\n{metrics.format_summary(summary)}")
    log = runtime.Log(out / "dice_by_step.csv", ["case", "k", *data.classes], 0, True)
    by_k: dict[int, list[float]] = {}
    for row in scores.steps:
        log.row(row, silent=True)
        values = [
            row[c] for c in data.classes if not math.isnan(row[c])
        ]  # a class that neither mask holds has none
        by_k.setdefault(row["k"], []).extend([float(np.mean(values))] if values else [])
    if config.method == "diffusion":
        shown = ", ".join(f"k = {k} {np.mean(v):.3f}" for k, v in by_k.items() if v)
        say(f"\nDice after each sampling step (first member): {shown}")
    say(f"masks, pictures and tables are in {out}")
    return 0


def load_network(config: Config, ranks: Ranks) -> Network:
    """The network of a checkpoint, with its averaged weights if it has them."""
    state = runtime.load_checkpoint(checkpoint_path(config), SCRIPT)
    model = network_for(config, state["data"])
    model.load_state_dict(state["ema"] or state["model"])
    model = fast_layout(model.to(ranks.device)).eval()
    dtype, _ = runtime.number_format(config.amp, ranks.device)
    return Network(config, model, state["data"], ranks.device, dtype, state["step"])


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
        )  # [M, X, Y, Z] on the network's grid
        stem = target.name.removesuffix(".gz").removesuffix(".nii")
        ending = target.name[len(stem) :]  # .nii or .nii.gz
        files = {}  # what --save-members and --save-maps add lies in folders beside the masks
        for result in sample_ensemble(net, torch.from_numpy(image), case):
            if config.save_members:
                files[f"members/{stem}_{result.size - 1}"] = restore.mask(
                    result.member.cpu().numpy()
                )
        files[stem] = mask = restore.mask(result.mask.cpu().numpy())
        files |= {f"maps/{stem}_{name}": restore.map(v) for name, v in maps_of(result, net).items()}
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

VERBS = ("train", "evaluate", "predict")
# Flag -> the verbs that look at it, "" being the bare run; given to others it is refused.
ONLY: dict[str, tuple[str, ...]] = {
    "image": ("predict",),
    "output": ("predict",),
    "checkpoint": ("evaluate", "predict"),
}
ONLY |= {"split": ("", "evaluate"), "limit": ("", "train", "evaluate")}
ONLY |= {
    k: ("", "evaluate", "predict") for k in ("ensemble", "combine", "save_members", "save_maps")
}
# NETWORK: what the weights of --init were trained as, taken over unless given.
NETWORK = (
    "method",
    "dims",
    "num_channels",
    "channel_mult",
    "time_inject",
    "target",
    "recycle",
    "size",
    "image_range",
)
# ONCE: how a trained network is used this time, neither kept from a training nor compared on continuing it.
ONCE = {
    "checkpoint",
    "split",
    "ensemble",
    "combine",
    "save_members",
    "save_maps",
    "image",
    "output",
    "overwrite",
}
ONCE |= {"quiet", "device", "amp", "workers"}
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
# USE: for evaluate and predict; other flags are refused where they differ from the training.
USE = ONCE | {"data", "preset", "out", "seed", "limit", "recompute"}
USE |= {"sampler", "sampling_steps", "variance", "eta", "clip_x0"}
# The rows of the bare run, which are table 1 and table 2 in small: folder below the run folder -> flags.
STORY: dict[str, dict[str, Any]] = {"": {}, "not-recycled": {"recycle": "none"}}
STORY |= {"unet": {"method": "unet", "target": "x0"}}


def check_levels(config: Config) -> None:
    """Rules between the noise levels of training and of sampling; for evaluate the former are the checkpoint's."""
    if config.method == "unet":  # has none
        return
    if config.sampling_steps != config.train_K != T:
        raise InputError(
            f"--sampling-steps {config.sampling_steps}, but --train-K {config.train_K} knows its own {config.train_K} "
            f"noise levels only; use --sampling-steps {config.train_K}, or train with --train-K {T}"
        )
    if config.schedule == "code-v1" and (T % config.train_K or T % config.sampling_steps):
        raise InputError(
            f"--schedule code-v1 needs --train-K and --sampling-steps that divide {T}; use 5"
        )


def checkpoint_path(config: Config) -> Path:
    return runtime.checkpoint_file(config.checkpoint, config.run_folder)


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").split("\n\n")[0]
    verb, config, given = runtime.parse_flags(Config, argv, VERBS, PRESETS, about, ONLY)
    if verb in ("evaluate", "predict"):
        config = runtime.trained_config(
            config, given, checkpoint_path(config), SCRIPT, USE, ONCE | {"limit"}
        )
    elif config.init:
        config = replace(config, init=str(runtime.checkpoint_file(config.init, config.run_folder)))
        state = runtime.load_tensors(Path(config.init))
        if isinstance(state, dict) and "format" in state:  # one of ours
            old = runtime.load_checkpoint(Path(config.init), SCRIPT)["config"]
            config = replace(config, **{k: old[k] for k in NETWORK if k not in given and k in old})
    check_levels(config)
    ranks, stop = runtime.start_processes(config.device), runtime.StopFlag()
    try:
        if verb == "predict":
            stop.restore()
            code = predict(config, ranks)
        else:
            data: Any = loaders.open_data(config.data)
            config = replace(config, size=training_size(config, data))
            if verb != "evaluate":
                config = runtime.shared_batch(config, given, ranks, config.run_folder)
            bare = verb == "" and config.data == "synthetic" and config.preset == "tiny"
            rows = STORY if bare and not {"method", "recycle", "init"} & given.keys() else {"": {}}
            runs = [
                replace(config, out=str(config.run_folder / name), **flags)
                for name, flags in rows.items()
            ]
            code, record = 0, loaders.data_record(data)
            if (
                not verb
            ):  # before the training: are there cases to score, and can each row be continued
                cases_to_score(config, data)
                for run in runs if not config.overwrite else ():
                    runtime.find_run(run.run_folder, SCRIPT, asdict(run), MAY_DIFFER, record, ranks)
            for run in runs if verb in ("", "train") else ():
                code = code or train(run, data, ranks, stop)
            stop.restore()  # from here on there is nothing to save
            folders = [
                metrics.scores_folder(run.run_folder, config.split, config.limit) for run in runs
            ]
            for run, folder in zip(runs, folders) if verb in ("", "evaluate") and code == 0 else ():
                evaluate(run, data, ranks, None if verb else folder)
            if len(runs) > 1 and code == 0 and ranks.first:
                say("\nthe rows side by side: recycled (the paper), not recycled, U-net")
                metrics.main(["table", *map(str, folders)])
    finally:
        stop.restore()
    runtime.stop_processes()
    return code


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
