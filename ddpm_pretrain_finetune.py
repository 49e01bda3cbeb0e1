"""DDPM pre-training on unlabelled CT slices, then a multi-organ segmentation network from a few labelled ones.

Paper
    Y. Huang et al.: Label-efficient multi-organ segmentation with a diffusion model. arXiv 2402.15216v2, 2025.
    No code of the authors is known; the network is guided-diffusion's, the rival DDPM-Seg is Baranchuk et al. 2022.

Idea
    A network that takes noise out of CT slices has to know anatomy, and it learns from scans without labels. Its U-Net
    is then turned into a segmentation network: the time t is fixed, the last layer is exchanged for a small head, and
    a part of it is trained on very few labelled slices: the head alone (`linear`, the paper's word: the head has two
    hidden layers), the decoder and the head (`decoder`, the paper's choice), all of it (`full`), or the same network
    from random weights (`scratch`, without all that belongs to t). Whether pre-training pays is the difference
    decoder - scratch on the same slices, over several draws of them.

Symbols
    x_0       x0      [B, 1, H, W]   slice in [-1, 1]: 2 (HU - p_lo) / (p_hi - p_lo) - 1, clipped; p_lo, p_hi: the
                                     0.5th and 99.5th percentile of all voxels of the pre-training scans
    t         t       [B]            0..T-1 here, 1..T in the paper's equations: x_t of t = 0 has one step of noise
    beta_t    beta    [T]            variance added at t; alpha = 1 - beta, abar their product for 0..t
    eps       eps     [B, 1, H, W]   standard normal noise; eps_theta = model(xt, t)
    g         onehot  [B, C, H, W]   truth; y = prob, the softmax; C = organs + 1, background is class 0
    c, h      num_channels, hidden   width of the first level; of the head
    w         0.5                    weight of cross-entropy beside Dice

Equations
    (1) q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    (2) q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    (3) p(x_{t-1} | x_t) = N(mu(x_t, t), sigma_t^2 I)
    (4) mu = (x_t - beta_t / sqrt(1 - abar_t) eps_theta) / sqrt(alpha_t), written by way of x_0, which is clipped
    (5) L_noise = mean of (eps - eps_theta)^2 over batch and pixels
    (6) L_seg = w L_CE + (1 - w) L_Dice
    (7) L_CE = - mean over pixels of log y of the true class
    (8) L_Dice = 1 - (2 sum g y + e) / (sum g + sum y + e), the sums over classes and pixels, e = 1e-5

Differs
    D1  betas: linear from 1e-4 to 0.02. The paper gives these ends and a `cosine annealing scheduler`; the two
        readings of it are --schedule cosine and cosine-anneal.
    D2  network: guided-diffusion's for 256 x 256 (attention at sides 32, 16, 8). The paper says U-Net with scale and
        shift by t; its 8,448 features of DDPM-Seg fit these widths at c = 256 (4,224 at 128). --arch ddpm is Ho et
        al.'s. Variance fixed (--variance), not learned. Kernels of the head: 3, 3, 1 (paper: in a figure).
    D3  the average of the weights warms up, d = min(ema, (1 + n) / (10 + n)); else a short run keeps its start.
    D4  eq. (8) over a softmax with background is 1 - mean of the true class' probability: a mean absolute error that
        does not see imbalance (--dice joint, the paper preset). The small presets use `per-class`: the mean over
        the organs present in the batch. joint-fg: eq. (8) without background.
    D5  base learning rate 1e-4, falling to a tenth; head ten times that (paper: ten times, base unknown). 1,000 steps
        on 4 slices with every strategy (paper: says it of decoder, so that its scratch may have had 10,000).
    D6  the labelled slices are drawn so that the first four show every organ (paper: chosen by hand); larger subsets
        contain them (paper: random).
    D7  scores: Dice per case and organ in 3D, on the prepared grid of slices; an organ never found, or found where
        there is none, counts 0. Per slice beside it. Paper: unclear.
    D8  no Inception weights: the distances come from a fixed random network (fd_rand) or from one you name. The real
        slices are of scans that the network has not seen (paper: of the unlabelled scans).
    D9  --strategy full and --init none are not in the paper: they tell weights from architecture. Layers that a new
        network starts at zero are drawn at random where --init none freezes them: a frozen part that is linear and
        does not see t would be no control.
    D10 t = 0 (linear: 200), the best t of the paper's table 2 (S), found on its test set; none is chosen here.
        The paper's t, 0..1000, is read as the number that is embedded; 1000 was then never trained. Transfer starts
        from the last step (paper: from 250,000 at c = 128).
    D11 ddpmseg keeps the maps at their own size, in fp16, and works on them before enlarging: the same numbers but
        for rounding, 22 times fewer of them, in half the bytes.
    D12 the small presets: narrow network, small slices, EMA 0.999, fewer steps, a larger learning rate (fine-tuning
        on a laptop 3e-4, tiny 1e-3 in both stages), DDIM. tiny does not mirror: features that cannot tell left from
        right cannot tell the kidneys apart.

Usage
    python ddpm_pretrain_finetune.py                              all of it on CT phantoms
    python -m data_prep.flare22 --src FLARE22 --dst data/flare22
    torchrun --nproc_per_node=4 ddpm_pretrain_finetune.py pretrain --data flare22
    python ddpm_pretrain_finetune.py finetune --data flare22 --labels 4 --strategy decoder
    python ddpm_pretrain_finetune.py finetune --data flare22 --labels 4 --strategy scratch
    python ddpm_pretrain_finetune.py ddpmseg --data flare22 --labels 4
    python ddpm_pretrain_finetune.py sample --data flare22 --sampler ddim --sampling-steps 50
    python ddpm_pretrain_finetune.py score --data flare22
    python ddpm_pretrain_finetune.py evaluate --checkpoint RUN/finetune-4-decoder-joint-draw0/last.pt --split train
    python ddpm_pretrain_finetune.py predict --checkpoint FILE --image ct.nii.gz --output mask.nii.gz
    python -m results.draws runs/ddpm_pretrain_finetune-flare22-paper/finetune-*

Expect
    The bare run takes four and a half minutes on two cores of a server CPU, two of them pre-training (600 steps), and
    prints the Dice of four organs in 24 unseen scans after learning from 4 slices, over three draws of them: decoder
    0.48, the same from random weights (the control) 0.28, scratch 0.45 (one thread; on two, where sums are rounded
    otherwise, decoder 0.49 and scratch 0.39: differences of this size are chance). The 16 samples show bodies, their
    brightness is still off. With few volumes look at val_loss and stop when it rises: with the 10 of CHAOS that was
    after 1,000 of the laptop's 20,000 steps (results/ddpm_chaos.md).
"""

import copy
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from common import InputError
from common.old import figures, loaders, metrics, runtime
from common.old.runtime import Ranks, flag, noise, say, seed_of
from common.old.unet import (
    AttentionBlock,
    Downsample,
    EmbedSequential,
    FeatureStore,
    GroupNorm,
    PixelClassifier,
    ResBlock,
    Upsample,
    conv,
    fast_layout,
    load_public,
    redraw_zeros,
    timestep_embedding,
    zero_module,
)

SCRIPT = "ddpm_pretrain_finetune"
T = 1000  # noise levels; t = 0..T-1 throughout this file
LOG_EVERY = 50  # steps
GROUPS = 32  # of every group norm
AT_ONCE = 16  # slices in one forward pass without gradient
NEAREST_AMONG = 20_000  # pre-training slices among which the nearest to a sample is looked for
PROBES = (
    50,
    100,
    300,
    500,
)  # levels at which slices that are held out are denoised during pre-training
WINDOWS = {"lung": (-500, 1400), "abdomen": (40, 350)}  # level and width in HU

# =====================================================================================================================
# Config
# =====================================================================================================================


@dataclass(frozen=True)
class Config:
    """All flags. The defaults are the paper's pre-training with c = 128 (`--preset paper`); see FINETUNE below."""

    # fmt: off
    data: str = flag("synthetic", "`synthetic`, a name below data/, or a prepared folder of slices")
    preset: Literal["tiny", "laptop", "paper"] = flag("paper", "defaults of all other flags; tiny for synthetic data")
    out: str = flag("", "run folder of the pre-training; empty: runs/ddpm_pretrain_finetune-DATA-PRESET")
    init: str = flag("", "start weights, ours or public; finetune, ddpmseg: empty is OUT/last.pt, or `none`")
    init_weights: Literal["ema", "raw"] = flag("ema", "of --init: averaged or last weights")
    overwrite: bool = flag(False, "throw the run folder's old contents away")
    quiet: bool = flag(False, "no progress bars; one line at each evaluation")
    seed: int = flag(0, "of weights, order, noise")
    device: str = flag("auto", "auto | cpu | cuda | cuda:N")
    amp: Literal["auto", "bf16", "fp16", "off"] = flag("auto", "number format of convolutions")
    compile: bool = flag(False, "torch.compile the training network")
    recompute: bool = flag(False, "keep block inputs only for backward: less memory, x 4/3 time")
    workers: int = flag(4, "processes that load slices, per rank; 0: in the training process")
    # network (guided-diffusion's)
    arch: Literal["adm", "ddpm"] = flag("adm", "ddpm: additive time, conv up/down, attention at 16, one head (D2)")
    size: int = flag(256, "side of the slices in pixels; that of the prepared data (paper: 256)")
    num_channels: int = flag(128, "width c of the first level (paper: 128 or 256)")
    channel_mult: tuple[int, ...] = flag((1, 1, 2, 2, 4, 4), "width of each level in units of c")
    num_res_blocks: int = flag(2, "residual blocks a level")
    num_head_channels: int = flag(64, "channels of an attention head (adm)")
    attention_resolutions: tuple[int, ...] = flag((32, 16, 8), "sides of maps with attention (adm), in pixels")
    # diffusion
    schedule: Literal["linear", "cosine", "cosine-anneal"] = flag("linear", "betas (D1)")
    flip: Literal["on", "off"] = flag("on", "pretrain: mirror left and right with p = 0.5 (paper: on)")
    # training
    steps: int = flag(300_000, "optimisation steps (paper: 300,000; finetune: all 30,000, four 1,000, else 10,000)")
    minutes: float = flag(0.0, "stop after so many minutes of training; 0: no limit")
    batch: int = flag(32, "slices a step, over all processes and accumulation (paper: not stated; finetune 4)")
    accumulate: int = flag(1, "pretrain: split the batch into so many parts, one after the other")
    lr: float = flag(2e-4, "learning rate (paper: 2e-4, linearly to 2e-5; finetune: 1e-4 to a tenth, D5)")
    lr_steps: int = flag(0, "steps over which the rate falls; 0: --steps")
    lr_schedule: Literal["linear", "const"] = flag("linear", "course of the learning rate")
    ema: float = flag(0.9999, "pretrain: decay of the averaged weights; 0: off (paper: 0.9999)")
    eval_every: int = flag(5000, "steps between looks at held-out slices")
    save_every: int = flag(1000, "steps between saves")
    # fine-tuning
    strategy: Literal["decoder", "linear", "full", "scratch", "ddpmseg"] = flag("decoder", "what is trained")
    labels: str = flag("4", "labelled slices: a number, `all`, or a share such as 1% (paper: 4, 39, 388, all)")
    draw: int = flag(0, "which slices these are: seed of the draw")
    t: int = flag(-1, "time given to the network, 0..1000; -1: 0, linear 200 (paper: best on its test set)")
    input: Literal["clean", "noised"] = flag("clean", "the slice, or one with noise of level t (a control)")
    variant: Literal["S", "M", "L"] = flag("S", "width: S c = h = 128, M h = 2 c, L c = h = 256")
    dice: Literal["joint", "joint-fg", "per-class"] = flag("joint", "the Dice term (D4)")
    select: Literal["last", "val"] = flag("last", "weights that count: the last, or the best on validation cases")
    # ddpmseg
    blocks: tuple[int, ...] = flag((5, 6, 7, 8, 12), "decoder blocks whose outputs are features")
    t_list: tuple[int, ...] = flag((50, 150, 250), "times of the features")
    members: int = flag(10, "classifiers that vote")
    epochs: int = flag(100, "of a classifier, at most, over all labelled pixels")
    # sampling and scores of samples
    sampler: Literal["ddpm", "ddim"] = flag("ddpm", "reverse process")
    sampling_steps: int = flag(0, "steps of it; 0: all 1000")
    eta: float = flag(0.0, "ddim: 0 deterministic .. 1")
    variance: Literal["small", "large"] = flag("small", "ddpm: posterior variance, or beta")
    num_samples: int = flag(64, "sample: slices to generate (paper: 2000)")
    features: str = flag("rand", "score: rand, encoder:CHECKPOINT, or inception:TORCHSCRIPT")
    # evaluation and use
    checkpoint: str = flag("", "sample, score: pre-trained weights; evaluate, predict: fine-tuned ones")
    split: str = flag("test", "which cases: a split's name")
    limit: int = flag(0, "at most so many cases; 0: all")
    image: tuple[str, ...] = flag((), "predict: CT or MR volumes, NIfTI files or one folder")
    output: str = flag("", "predict: file (for one image) or folder; score: the samples, empty: OUT/samples.npy")
    # fmt: on

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{SCRIPT}-{Path(self.data).name}-{self.preset}")

    @property
    def finetune_folder(self) -> Path:
        """Below the pre-training's; its name holds what differs between the runs that one compares."""
        parts = ["finetune", self.labels.replace("%", "pc"), self.strategy, self.dice]
        parts += ["random"] * (self.init == "none" and self.strategy != "scratch")
        parts += [f"t{self.time}"] * (self.time != replace(self, t=-1).time) + [self.variant] * (
            self.variant != "S"
        )
        parts += ["noised"] * (self.input == "noised")
        default = FINETUNE[self.preset]
        parts += [f"lr{self.lr:g}"] * (self.lr != default["lr"]) + [f"seed{self.seed}"] * (
            self.seed != 0
        )
        return self.run_folder / "-".join([*parts, f"draw{self.draw}"])

    @property
    def ddpmseg_folder(self) -> Path:
        random = "random-" * (self.init == "none")
        return self.run_folder / f"ddpmseg-{self.labels.replace('%', 'pc')}-{random}draw{self.draw}"

    @property
    def time(self) -> int:
        return self.t if self.t >= 0 else 200 if self.strategy == "linear" else 0  # D10

    @property
    def hidden(self) -> int:
        """Width h of the head."""
        return self.num_channels * (2 if self.variant == "M" else 1)

    @property
    def attends(self) -> tuple[int, ...]:
        return (16,) if self.arch == "ddpm" else self.attention_resolutions

    def __post_init__(self) -> None:
        """Ranges and the rules between flags; InputError names the flag."""
        for name in (
            "num_channels",
            "num_res_blocks",
            "num_head_channels",
            "batch",
            "accumulate",
            "steps",
            "members",
        ):
            runtime.check_range(self, name, 1)
        for name in ("eval_every", "save_every", "num_samples", "epochs"):
            runtime.check_range(self, name, 1)
        for name in ("minutes", "workers", "limit", "seed", "draw", "lr_steps"):
            runtime.check_range(self, name, 0)
        for name, high in (("ema", 0.999999), ("eta", 1), ("sampling_steps", T), ("t_list", T - 1)):
            runtime.check_range(self, name, 0, high)
        runtime.check_range(self, "lr", 0, 1, open_low=True)
        runtime.check_range(self, "t", -1, T)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(
                f"--device is {self.device}, expected auto, cpu, cuda or cuda:N; correct the flag"
            )
        if not re.fullmatch(r"all|[1-9]\d*|\d*\.?\d+%", self.labels):
            raise InputError(
                f"--labels is {self.labels}, expected a number, `all` or a share such as 1%; correct it"
            )
        if self.input == "noised" and self.t == T:
            raise InputError(f"--input noised has no level t = {T}, the last is {T - 1}; lower --t")
        if not re.fullmatch(r"rand|(encoder|inception):.+", self.features):
            raise InputError(
                f"--features is {self.features}, expected rand, encoder:FILE or inception:FILE"
            )
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                f"--channel-mult is {self.channel_mult}, expected whole numbers of 1 or more"
            )
        if self.num_channels % GROUPS:
            raise InputError(f"--num-channels is {self.num_channels}, expected a multiple of {GROUPS}, the groups of "
                             f"its norms; use {-(-self.num_channels // GROUPS) * GROUPS}")  # fmt: skip
        step = 2 ** (len(self.channel_mult) - 1)
        if self.size < 2 * step or self.size % step:
            raise InputError(f"--size {self.size} is not a multiple of {step} and at least {2 * step}, which "
                             f"{len(self.channel_mult)} levels ask for; change --size or --channel-mult")  # fmt: skip
        for i, m in enumerate(self.channel_mult):
            attends = self.arch == "adm" and (
                self.size >> i in self.attends or i == len(self.channel_mult) - 1
            )
            if attends and self.num_channels * m % self.num_head_channels:
                raise InputError(f"--num-head-channels {self.num_head_channels} does not divide the "
                                 f"{self.num_channels * m} channels of an attention; choose a divisor")  # fmt: skip


SMALL: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_head_channels": 32,
    "attention_resolutions": (8,),
}
SMALL |= {
    "ema": 0.999,
    "workers": 0,
    "batch": 16,
    "dice": "per-class",
    "sampler": "ddim",
    "sampling_steps": 50,
}  # D12
LAPTOP: dict[str, Any] = {
    "size": 64,
    "channel_mult": (1, 1, 2, 4),
    "steps": 20_000,
    "eval_every": 1000,
}
LAPTOP |= {"save_every": 100, "blocks": (1, 3, 5)}
TINY: dict[str, Any] = {
    "size": 32,
    "channel_mult": (1, 2, 2),
    "steps": 600,
    "eval_every": 200,
    "save_every": 200,
}
TINY |= {"lr": 1e-3, "flip": "off"}  # two of the phantoms' organs differ by their side alone
TINY |= {"blocks": (1, 3), "num_samples": 16, "members": 3, "epochs": 4, "sampling_steps": 25}
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "laptop": SMALL | LAPTOP, "tiny": SMALL | TINY}
# What fine-tuning has instead, where the flag is not given; steps: see fine_steps.
FINE: dict[str, Any] = {"batch": 4, "lr": 1e-4, "lr_steps": 0, "accumulate": 1, "ema": 0.0}  # D5
FINETUNE: dict[str, dict[str, Any]] = {
    "paper": FINE | {"eval_every": 500},
    "laptop": FINE | {"lr": 3e-4, "eval_every": 200},
    "tiny": FINE | {"lr": 1e-3, "eval_every": 100},
}


def fine_steps(preset: str, labels: int, total: int) -> int:
    """Steps of fine-tuning with `labels` of `total` slices: the paper's, fewer in the small presets."""  # D5
    few, more, every = {
        "paper": (1000, 10_000, 30_000),
        "laptop": (600, 2000, 3000),
        "tiny": (200, 400, 600),
    }[preset]
    return few if labels <= 4 else every if labels == total else more


# =====================================================================================================================
# Model
# =====================================================================================================================


class UNet(nn.Module):
    """guided-diffusion's U-Net: residual blocks, attention at coarse maps, concatenated skips.

    Called as model(x, t): x [B, C_in, H, W], t [B] in 0..T-1; returns [B, C_out, H, W]. timed=False leaves out all that
    belongs to t (`scratch`); t is then ignored. Parameter names are the public code's.
    """

    def __init__(self, config: Config, in_channels: int, out_channels: int, timed: bool = True):
        super().__init__()
        c, adm = config.num_channels, config.arch == "adm"  # D2
        self.width, self.recompute, self.timed = c, config.recompute, timed
        if timed:
            self.time_embed = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))

        def block(a: int, b: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
            return ResBlock(
                2, a, b, 4 * c if timed else None, GROUPS, scale_shift=adm, resample=resample
            )

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, config.num_head_channels if adm else width, GROUPS)

        def down(width: int) -> nn.Module:
            return block(width, width, "down") if adm else Downsample(2, width)

        def up(width: int) -> nn.Module:
            return block(width, width, "up") if adm else Upsample(2, width)

        # Encoder. Every block's output is a skip; each level but the last ends with a block that halves the map.
        self.input_blocks = nn.ModuleList([EmbedSequential(conv(2, in_channels, c))])
        skips, width = [c], c  # widths
        for level, m in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [block(width, c * m)]
                if config.size >> level in config.attends:
                    layers.append(attention(c * m))
                self.input_blocks.append(EmbedSequential(*layers))
                width = c * m
                skips.append(width)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(EmbedSequential(down(width)))
                skips.append(width)
        self.middle_block = EmbedSequential(
            block(width, width), attention(width), block(width, width)
        )

        # Decoder: block k = output_blocks[k]; the last of a level doubles the map.
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [block(width + skips.pop(), c * m)]
                width = c * m
                if config.size >> level in config.attends:
                    layers.append(attention(width))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(up(width))
                self.output_blocks.append(EmbedSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm(GROUPS, width), nn.SiLU(), zero_module(conv(2, width, out_channels))
        )

    def run(self, block: nn.Module, x: Tensor, emb: Tensor | None) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(
                block, x, emb, use_reentrant=False, preserve_rng_state=False
            )  # no dropout here
        return block(x, emb)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The middle block's output, the skips from fine to coarse, and the embedded time."""
        emb = self.time_embed(timestep_embedding(t, self.width)) if self.timed else None  # [B, 4c]
        skips = []
        for block in self.input_blocks:
            x = self.run(block, x, emb)  # [B, c m, H / 2^level, W / 2^level]
            skips.append(x)
        return self.run(self.middle_block, x, emb), skips, emb

    def decode(
        self, x: Tensor, skips: list[Tensor], emb: Tensor | None, blocks: Sequence[int] = ()
    ) -> list[Tensor]:
        """Outputs of output_blocks[k] for each k in `blocks`, stopping after the largest; without `blocks`, that of the
        last one alone, [B, c, H, W]. Takes its maps out of `skips`.
        """
        maps = {}
        for k, block in enumerate(self.output_blocks):
            x = self.run(block, torch.cat([x, skips.pop()], dim=1), emb)
            if k in blocks:
                maps[k] = x
                if k == max(blocks):
                    break
        return [maps[k] for k in blocks] if blocks else [x]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.decode(*self.encode(x, t))[0])


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient too is summed, since DDP divides by their number later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def over_processes(x: Tensor) -> Tensor:
    return SumOverProcesses.apply(x) if dist.is_initialized() else x


class SyncedNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, so that four GPUs do what one does; PyTorch's own needs GPUs."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        wide = x.float()
        count = wide.numel() // wide.shape[1] * dist.get_world_size()
        mean = over_processes(wide.sum((0, 2, 3))) / count
        wide = wide - mean[:, None, None]
        var = over_processes(wide.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum or 0.1)
            self.running_var.lerp_(var * count / (count - 1), self.momentum or 0.1)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return wide * scale[:, None, None] + self.bias[:, None, None]


class Segmenter(nn.Module):
    """The U-Net at a fixed time with a new head: model(x) -> logits [B, C, H, W] of x [B, 1, H, W].

    The head replaces all of the network's `out` and reads the last decoder block's raw output. What the strategy does
    not train runs without gradient and stays in eval mode; of what belongs to t, `decoder` trains its blocks' own
    layers and not time_embed. All weights are random until load_start fills `net`.

    t is the same for all slices, so the time is one fixed scale and shift in each block. The slice is clean, which only
    t = 0 (noise of SD 0.01) fits: a larger t announces noise that is not there. --input noised adds it, a control.
    forward's t, where given, replaces the fixed one.
    """

    def __init__(self, config: Config, in_channels: int, classes: int):
        super().__init__()
        c, h = config.num_channels * config.channel_mult[0], config.hidden
        self.strategy, self.t, self.config = config.strategy, config.time, config
        shape, cpu = (in_channels, config.size, config.size), torch.device("cpu")
        self.eps: Tensor
        self.register_buffer(
            "eps", noise(0, "input", ["shared"], shape, cpu), persistent=False
        )  # --input noised
        # The head first, so that it starts alike with every strategy.
        self.head = nn.Sequential(
            nn.Conv2d(c, h, 3, padding=1), SyncedNorm(h), nn.ReLU(),
            nn.Conv2d(h, h, 3, padding=1), SyncedNorm(h), nn.ReLU(),
            nn.Conv2d(h, classes, 1),
        )  # fmt: skip
        self.net = UNet(config, in_channels, in_channels, timed=config.strategy != "scratch")
        self.net.out = nn.Sequential()
        encoder: list[nn.Module] = [self.net.input_blocks, self.net.middle_block]
        encoder += [self.net.time_embed] if self.net.timed else []
        frozen: dict[str, list[nn.Module]] = {
            "linear": [self.net],
            "decoder": encoder,
        }  # full: none, D9
        self.frozen = frozen.get(
            config.strategy, []
        )  # a plain list: these modules are registered above
        for module in self.frozen:
            module.requires_grad_(False)
            if config.init == "none":
                redraw_zeros(module)  # D9

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        learn = torch.is_grad_enabled()
        t = torch.full((len(x),), self.t, device=x.device) if t is None else t
        if self.config.input == "noised":
            x = q_sample(x, self.eps, t, self.config.schedule)
        with torch.set_grad_enabled(learn and self.strategy in ("full", "scratch")):
            h, skips, emb = self.net.encode(x, t)
        with torch.set_grad_enabled(learn and self.strategy != "linear"):
            h = self.net.decode(h, skips, emb)[0]  # [B, c, H, W]
        return self.head(h)


class PixelEnsemble(nn.Module):
    """DDPM-Seg: the frozen U-Net's maps at several times, and classifiers of single pixels that vote.

    Called as model(x): x [B, 1, H, W] in [-1, 1]; returns the share of votes for each class, [B, C, H, W].
    """

    def __init__(self, config: Config, in_channels: int, classes: int):
        super().__init__()
        self.config, self.classes = config, classes
        count = len(config.channel_mult) * (config.num_res_blocks + 1)
        if not config.blocks or not (0 <= min(config.blocks) <= max(config.blocks) < count):
            raise InputError(
                f"--blocks is {config.blocks}, this network has blocks 0 to {count - 1}; correct the flag"
            )
        self.net = UNet(config, in_channels, in_channels).requires_grad_(False)
        if config.init == "none":
            redraw_zeros(self.net)  # D9
        blocks: Any = self.net.output_blocks
        widths = [blocks[k][0].out_layers[-1].out_channels for k in config.blocks]
        self.widths = widths * len(config.t_list)  # channels of each map, times outer
        self.members = nn.ModuleList(
            PixelClassifier(self.widths, classes) for _ in range(config.members)
        )

    def maps(self, x: Tensor) -> list[Tensor]:
        """Native maps [B, c, h, w], times outer and blocks inner; one noise image for all slices and times."""
        eps = noise(0, "ddpmseg", ["shared"], x.shape[1:], torch.device("cpu")).to(x.device)
        found = []
        for t in self.config.t_list:
            tt = torch.full((len(x),), t, device=x.device)
            xt = q_sample(x, eps, tt, self.config.schedule)
            found += [
                m.float() for m in self.net.decode(*self.net.encode(xt, tt), self.config.blocks)
            ]
        return found

    def forward(
        self, x: Tensor, t: Tensor | None = None
    ) -> Tensor:  # t is not used: all networks are called alike
        maps, by, size = (
            self.maps(x),
            torch.ones((), device=x.device),
            x.shape[2:],
        )  # by: the maps are not divided
        votes = torch.zeros(len(x), self.classes, size[0] * size[1], device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # in fp32, as the members learnt
            for i in range(len(x)):  # slice by slice: all of its pixels at once are enough
                for member in self.members:
                    chosen = member([m[i : i + 1] for m in maps], by, size).argmax(
                        1
                    )  # [H W]  # D11
                    votes[i].scatter_add_(0, chosen[None], torch.ones_like(votes[i, :1]))
        return votes.unflatten(2, tuple(size)) / len(self.members)


def build_model(config: Config, in_channels: int, out_channels: int) -> Any:
    """The noise predictor: out_channels is in_channels, 1 for CT."""
    return UNet(config, in_channels, out_channels)


STAGES: dict[str, Any] = {"pretrain": build_model, "finetune": Segmenter, "ddpmseg": PixelEnsemble}


def network_for(stage: str, config: Config, record: Mapping[str, Any]) -> Any:
    """The network of a stage with the random weights of --seed.

    record: what a checkpoint keeps of its data (loaders.data_record): channels, classes, normalisation, slices, ...
    """
    torch.manual_seed(seed_of(config.seed, "weights", stage) % 2**32)
    n = len(record["channels"])
    return STAGES[stage](config, n, n if stage == "pretrain" else len(record["classes"]) + 1)


# =====================================================================================================================
# Diffusion: schedules, q, losses
# =====================================================================================================================


@cache
def betas(schedule: str, steps: int = T) -> np.ndarray:
    """beta [steps] float64 of --schedule; eq. (1). cosine: Nichol & Dhariwal; cosine-anneal: half a cosine."""  # D1
    i, first, last = np.arange(steps), 1e-4, 0.02
    if schedule == "linear":
        return np.linspace(first, last, steps) * (1000 / steps)  # eq. (1)
    if schedule == "cosine-anneal":
        return last + 0.5 * (first - last) * (1 + np.cos(np.pi * i / (steps - 1)))
    curve = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - curve[1:] / curve[:-1], 0.999)


@cache
def abar_table(schedule: str, device: torch.device) -> Tensor:
    """abar[t] for t = 0..T-1 in float64."""
    return torch.from_numpy(np.cumprod(1 - betas(schedule))).to(device)


def q_sample(x0: Tensor, eps: Tensor, t: Tensor, schedule: str) -> Tensor:
    """x_t from x_0 in one step; t: [B]."""
    abar = abar_table(schedule, t.device)[t].reshape(-1, 1, 1, 1)
    return abar.sqrt().float() * x0 + (1 - abar).sqrt().float() * eps  # eq. (2)


def noise_loss(net: Any, x0: Tensor, eps: Tensor, t: Tensor, schedule: str) -> Tensor:
    """The squared error of the noise, mean over pixels, of each sample: [B]."""
    eps_theta = net(q_sample(x0, eps, t, schedule), t).float()
    return (eps - eps_theta).square().flatten(1).mean(1)  # eq. (5)


def dice_loss(prob: Tensor, onehot: Tensor, kind: str, e: float = 1e-5) -> Tensor:
    """1 - Dice of softmax and truth, both [B, C, H, W], over all pixels of the batch on all processes; a scalar."""
    sums = torch.stack([(prob * onehot).sum((0, 2, 3)), onehot.sum((0, 2, 3)), prob.sum((0, 2, 3))])
    both, truth, found = over_processes(sums)  # each [C]
    if (
        kind == "joint"
    ):  # both sums are the number of pixels: 1 - the mean probability of the true class, D4
        return 1 - (2 * both.sum() + e) / (truth.sum() + found.sum() + e)  # eq. (8)
    both, truth, found = both[1:], truth[1:], found[1:]
    if kind == "joint-fg":
        return 1 - (2 * both.sum() + e) / (truth.sum() + found.sum() + e)  # D4
    present = (
        truth > 0
    ).float()  # an organ that the batch does not show has nothing to overlap with
    return ((1 - (2 * both + e) / (truth + found + e)) * present).sum() / present.sum().clamp(
        min=1
    )  # D4


def segmentation_loss(logits: Tensor, label: Tensor, kind: str, w: float = 0.5) -> Tensor:
    """logits [B, C, H, W], label [B, H, W] -> scalar, in fp32."""
    logits = logits.float()
    ce = F.cross_entropy(logits, label)  # eq. (7)
    onehot = F.one_hot(label, logits.shape[1]).movedim(3, 1).float()
    return w * ce + (1 - w) * dice_loss(logits.softmax(1), onehot, kind)  # eq. (6)


# =====================================================================================================================
# Data: slices, and which of them have labels
# =====================================================================================================================

# `data` below is what open_slices returns: splits of cases, data.depth(case) slices of each, data.slice(case, k) [H, W]
# float32 in [-1, 1], front on top and the patient's right on the left, data.slice_label(case, k) [H, W] uint8, and
# data.classes {name: value}, from 1. Preparation has padded to square and resized linearly, CT is kept as int16 HU.

Slice = tuple[str, int]  # case, index along z


def open_slices(config: Config) -> Any:
    """--data: CT phantoms or prepared slices. InputError where their side is not --size."""
    data = loaders.open_slices(config.data, side=config.size)
    if data.side != config.size:
        raise InputError(f"{config.data} holds slices of side {data.side}, --size is {config.size}; prepare it with "
                         f"--side {config.size}, or use --size {data.side}")  # fmt: skip
    return data


def slices_of(data: Any, cases: Sequence[str]) -> list[Slice]:
    return [(case, k) for case in cases for k in range(data.depth(case))]


def stack(data: Any, slices: Sequence[Slice]) -> np.ndarray:
    """[N, H, W] float32 in [-1, 1]."""
    return np.stack([data.slice(*at) for at in slices])


def labelled_training(data: Any) -> list[Slice]:
    return slices_of(data, [case for case in data.cases("train") if data.has_label(case)])


def pretraining_slices(data: Any) -> list[Slice]:
    """All slices of the split `pretrain` (FLARE22: cases 1-1000; data_prep.msd: scans without labels and training
    scans, whose labels are not looked at), else of `unlabelled`, else of `train`. Raises: InputError."""
    splits = data.meta["splits"]
    found = slices_of(data, splits.get("pretrain") or splits.get("unlabelled") or splits["train"])
    if not found:
        raise InputError(
            f"{data.name} has no scan to pre-train on; prepare one with --unlabelled, or training cases"
        )
    return found


def held_out(data: Any) -> list[str]:
    """Scans in which the error of the noise is watched: validation cases, else unlabelled ones not pre-trained on."""
    splits, seen = data.meta["splits"], {case for case, _ in pretraining_slices(data)}
    return list(splits.get("val", [])) or [
        case for case in splits.get("unlabelled", []) if case not in seen
    ]


def label_count(text: str, total: int) -> int:
    """--labels as a number of slices: N, all, or x% = floor(x total / 100 + 0.5), at least 1. Raises: InputError."""
    if text == "all":
        return total
    n = (
        max(1, math.floor(float(text[:-1]) * total / 100 + 0.5))
        if text.endswith("%")
        else int(text)
    )
    if n > total:
        raise InputError(
            f"--labels {text}: there are {total} labelled training slices; lower it, or use `all`"
        )
    return n


def cover(counts: np.ndarray, size: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Draw `size` slices that together show every class; counts: pixels [slices, classes].

    Random sets are tried until each class has 20 pixels in some slice of the set; where none is found, 1 pixel; then
    greedily. Returns the slices, first those that show most classes, and the classes that none of them shows. A class
    that no slice has is not asked for.
    """
    wanted = np.nonzero(counts.any(0))[0]
    size = min(size, len(counts))
    for least, tries in ((20, 100_000), (1, 100_000)):
        good = counts[:, wanted] >= least
        if not good.any(0).all():
            continue
        for _ in range(tries):
            found = rng.choice(len(counts), size, replace=False)
            if good[found].any(0).all():
                return most_first(found.tolist(), good), []
    missing, chosen = set(wanted.tolist()), []  # type: set[int], list[int]
    while len(chosen) < size:
        gain = (counts[:, sorted(missing)] > 0).sum(1) if missing else np.zeros(len(counts))
        gain[chosen] = -1
        chosen.append(int(rng.choice(np.nonzero(gain == gain.max())[0])))
        missing -= set(np.nonzero(counts[chosen[-1]])[0].tolist())
    return chosen, sorted(missing)


def most_first(chosen: list[int], good: np.ndarray) -> list[int]:
    """In the order in which they show new classes, so that the first few of them show as many as they can."""
    order, seen = [], np.zeros(good.shape[1], bool)
    while left := [i for i in chosen if i not in order]:
        order.append(max(left, key=lambda i: int((good[i] & ~seen).sum())))
        seen = seen | good[order[-1]]
    return order


def labelled_slices(data: Any, config: Config) -> tuple[list[Slice], int, list[str]]:
    """The --labels slices of --draw, how many there are in all, and what is to be warned of.

    One order per draw, the covering four and then a permutation of the rest: subsets are nested, and the same for all
    strategies. Raises: InputError where there are too few, or four cannot show all organs.
    """
    every, names, warnings = labelled_training(data), list(data.classes), []
    n = label_count(config.labels, len(every)) if every else 0
    if not n:
        raise InputError(f"{data.name} has no labelled training slice; prepare it with labels")
    counts = np.stack(
        [
            np.bincount(data.slice_label(*at).ravel(), minlength=len(names) + 1)[1 : len(names) + 1]
            for at in every
        ]
    )  # [slices, organs]
    if absent := [name for name, n_slices in zip(names, (counts > 0).sum(0)) if not n_slices]:
        warnings.append(f"no training slice holds {', '.join(absent)}; it will not be learnt")
    rng = np.random.default_rng(config.draw)
    first, missing = cover(counts, 4, rng)  # D6
    if missing and n >= 4:
        lost = ", ".join(names[c] for c in missing)
        raise InputError(f"no 4 slices of {data.name} were found that show all organs, {lost} would be left out; merge "
                         "or drop organs, or use more than one scan")  # fmt: skip
    rest = rng.permutation([i for i in range(len(every)) if i not in set(first)])
    chosen = [*first, *rest.tolist()][:n]
    if unseen := [
        name
        for name, there in zip(names, (counts[chosen] > 0).sum(0))
        if not there and name not in absent
    ]:
        warnings.append(f"{n} slices do not show {', '.join(unseen)}")
    return [every[i] for i in chosen], len(every), warnings


def write_labels(out: Path, slices: Sequence[Slice], total: int) -> None:
    share = {"n": len(slices), "of": total, "percent": 100 * len(slices) / total}
    runtime.write_json(out / "labels.json", share | {"slices": [list(at) for at in slices]})


class Samples(Dataset):
    """Sample n = 0, 1, 2, ... of the training: which slice, its flip and t are a function of (seed, n).

    n counts over the global batches, so the number of processes, workers and restarts changes nothing; it runs through
    one permutation of the slices after the other.
    """

    def __init__(self, data: Any, config: Config, slices: Sequence[Slice], labelled: bool):
        self.data, self.config, self.slices, self.labelled = data, config, list(slices), labelled
        self.epoch, self.order = -1, np.zeros(0, int)

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray | int, int, int]:
        """Slice [1, H, W] fp32, its label [H, W] int64 (else 0), t, n. A labelled slice is not flipped, its t is 0."""
        config = self.config
        epoch, place = divmod(n, len(self.slices))
        if epoch != self.epoch:
            rng = np.random.default_rng(seed_of(config.seed, "order", epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self.slices))
        at = self.slices[self.order[place]]
        x0 = self.data.slice(*at)[None]
        if self.labelled:
            return x0, self.data.slice_label(*at).astype(np.int64), 0, n
        rng = np.random.default_rng(seed_of(config.seed, "sample", n))
        t, mirror = int(rng.integers(0, T)), bool(rng.random() < 0.5)
        if mirror and config.flip == "on":
            x0 = np.ascontiguousarray(x0[..., ::-1])
        return x0, 0, t, n


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
    """From --lr linearly to a tenth of it over --lr-steps (0: --steps), where it stays; step: updates done."""
    if config.lr_schedule == "const":
        return config.lr
    return config.lr * (1 - 0.9 * min(step / (config.lr_steps or config.steps), 1.0))


def make_optimizer(stage: str, config: Config, model: Any) -> torch.optim.Optimizer:
    """Adam. Fine-tuning: the head learns ten times as fast; weight decay (L2, as Adam has it) is 1e-3 for the head,
    1e-4 for the rest that is trained. `scale` is what the learning rate of a group is multiplied by."""
    if stage == "pretrain":
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0, "scale": 1.0}]
    else:
        rest = [p for p in model.net.parameters() if p.requires_grad]
        groups = [
            {"params": list(model.head.parameters()), "weight_decay": 1e-3, "scale": 10.0}
        ]  # D5
        groups += [{"params": rest, "weight_decay": 1e-4, "scale": 1.0}] if rest else []
    return torch.optim.Adam(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + n) / (10 + n)) with n updates before: forgets its start."""
    d = min(decay, (1 + updates) / (10 + updates))  # D3
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


class Training:
    """What training changes, which is what a checkpoint holds: saved, restored, and nothing else.

    For use elsewhere: torch.load(FILE, weights_only=True)["ema"] of a pre-training is a UNet's state dict; ["model"] of
    a fine-tuning is a Segmenter's, net.* and head.*.
    """

    def __init__(
        self,
        stage: str,
        config: Config,
        record: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,
    ):
        self.stage, self.config, self.record, self.device, self.dtype = (
            stage,
            config,
            record,
            device,
            dtype,
        )
        self.out = config.run_folder if stage == "pretrain" else config.finetune_folder
        self.model = fast_layout(network_for(stage, config, record).to(device), config.compile)
        self.ema = (
            copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema else self.model
        )
        self.optimizer = make_optimizer(stage, config, self.model)
        # The scaler also finds gradients that are not finite, and a fused optimiser then leaves the weights alone
        # without the host having to ask; so it stays on, with scale 1, where the numbers need no scaling.
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**16 if dtype == torch.float16 else 1.0
        )
        self.step, self.seconds = 0, 0.0
        self.skipped = torch.zeros(
            3, device=device
        )  # steps without a finite gradient: all, in a row, most in a row
        self.best = {"dice": -1.0, "step": 0, "seen": 0}  # seen: the newest step that was looked at
        self.start: list[
            float
        ] = []  # step and seconds of the pre-training it began from, where that is ours

    def save(self, name: str = "last.pt") -> None:
        contents = {
            "format": runtime.FORMAT,
            "script": SCRIPT,
            "stage": self.stage,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.config.ema else {},
            "optimizer": self.optimizer.state_dict() if name == "last.pt" else {},
            "scaler": self.scaler.state_dict() if self.dtype == torch.float16 else {},
            "step": self.step,
            "seconds": self.seconds,  # of training, over all restarts
            "skipped": self.skipped.tolist(),
            "best": self.best,
            "start": self.start,
            "data": self.record,
        }
        runtime.save_checkpoint(
            self.out / name, contents, self.out / "last.prev.pt" if name == "last.pt" else None
        )

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.config.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.dtype == torch.float16 and state["scaler"]:  # not where --amp changed meanwhile
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.skipped.copy_(torch.tensor(state["skipped"]))
        self.skipped[2] = self.skipped[1]  # the row that ended a run may be over now


def train_step(
    run: Training, net: Any, batches: Iterator[Any], ranks: Ranks, losses_by_t: runtime.LossByTime
) -> Tensor:
    """One optimisation step of the global batch; returns the gradient norm.

    net: run.model, wrapped for DDP and torch.compile. A step without a finite gradient changes no weight.
    """
    config, device, dtype = run.config, run.device, run.dtype
    for group in run.optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(config, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    for part in range(config.accumulate):
        *tensors, n = next(batches)
        x0, label, t = (
            v.to(device, non_blocking=True) for v in tensors
        )  # [B, 1, H, W], [B, H, W] or 0, [B]
        alone = (
            ranks.world == 1 or part == config.accumulate - 1
        )  # gradients travel with the last part only
        with nullcontext() if alone else net.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                if run.stage == "pretrain":
                    eps = noise(config.seed, "noise", n.tolist(), x0.shape[1:], device)
                    losses = noise_loss(net, x0, eps, t, config.schedule)  # [B]
                else:
                    losses = segmentation_loss(net(x0), label, config.dice).expand(
                        len(x0)
                    )  # [B], all the same
            run.scaler.scale(losses.mean() / config.accumulate).backward()
        losses_by_t.add(t + 1, losses.detach())  # which counts from 1
    run.scaler.unscale_(run.optimizer)
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(
        gradients
    )  # for the log: the paper does not clip (nn.utils.clip_grad_norm_)
    run.scaler.step(
        run.optimizer
    )  # does nothing where the norm is not finite, on all processes alike
    run.scaler.update(None if dtype == torch.float16 else 1.0)
    bad, (total, row, most) = (~torch.isfinite(norm)).float(), run.skipped.unbind()
    row = (row + 1) * bad
    run.skipped = torch.stack([total + bad, row, torch.maximum(most, row)])  # stays on the device
    run.step += 1
    if config.ema:
        update_ema(run.ema, run.model, config.ema, run.step - 1)
    return norm


SHARED = [
    "lr",
    "grad_norm",
    "samples_per_s",
    "memory_gb",
    "left_s",
    "skipped",
]  # columns of log.csv
COLUMNS = ["step", "seconds", "loss", *(f"loss_q{i}" for i in range(1, 5)), *SHARED]
COLUMNS += ["val_loss", *(f"val_loss_t{t}" for t in PROBES)]
FINE_COLUMNS = ["step", "seconds", "loss", *SHARED, "val_dice"]


def train(stage: str, config: Config, data: Any, ranks: Ranks, stop: runtime.StopFlag) -> int:
    """Pre-training or fine-tuning. Returns 0, or 130 / 143 after a signal, with everything saved."""
    device, record = ranks.device, loaders.data_record(data)
    dtype, reason = runtime.number_format(config.amp, device)

    # 1. what is needed, and the checkpoint to continue from; nothing is written or thrown away before all is there
    fine = stage == "finetune"
    slices, total, warnings = (
        labelled_slices(data, config) if fine else (pretraining_slices(data), 0, [])
    )
    out = config.finetune_folder if fine else config.run_folder
    state = (
        None
        if config.overwrite
        else runtime.find_run(out, SCRIPT, asdict(config), MAY_DIFFER, record, ranks)
    )
    start = start_of(config, state, out) if fine and config.strategy != "scratch" else []
    if state is None or state["step"] < config.steps:
        check_memory(stage, config, record, ranks)
    run = Training(stage, config, record, device, dtype)
    run.start = start
    if state is not None:
        run.restore(state)
    elif config.init not in ("", "none") and config.strategy != "scratch":
        load_start(config, run.model.net if fine else run.model, record if fine else None)
        if config.ema:
            run.ema.load_state_dict(run.model.state_dict())
    runtime.make_run(out, asdict(config), config.overwrite, ranks)
    runtime.check_same_weights(run.model, ranks, "at the start")
    if fine and ranks.first:
        write_labels(out, slices, total)
    print_header(run, data, len(slices), ranks, reason, warnings)

    # 2. all processes work on parts of one global batch; DDP averages their gradients
    net: Any = torch.compile(run.model) if config.compile else run.model
    net = DistributedDataParallel(net) if ranks.world > 1 else net
    net.train()
    loader = DataLoader(
        Samples(data, config, slices, fine),
        batch_sampler=Sharded(config, ranks, run.step),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=runtime.ignore_signals,
    )
    columns, held = FINE_COLUMNS if fine else COLUMNS, [] if fine else held_out(data)
    log = runtime.Log(out / "log.csv", columns, run.step, ranks.first)
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
        # 3. look at held-out slices when it is due; a run stopped before it did so does it first when continued
        finished = run.step >= config.steps or time_up or run.seconds >= limit
        due = (run.step % config.eval_every == 0 or finished) and run.step > run.best["seen"]
        if due and (config.select == "val" if fine else held):
            look_at_held(run, data, ranks, log)
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
            row |= {"grad_norm": float(norm), "skipped": int(run.skipped[0])}
            row |= {"memory_gb": runtime.peak_memory_gb(device)}
            row |= {
                "samples_per_s": rate * config.batch,
                "left_s": (config.steps - run.step) / rate,
            }
            log.row(row | losses_by_t.row(ranks), silent=config.quiet)
            clock = (run.step, run.seconds)
        if ranks.first and (
            run.step % config.save_every == 0 or signal or time_up or run.step == config.steps
        ):
            run.save()
    bar.close()
    runtime.check_same_weights(run.model, ranks, "at the end")
    if signal:
        again = "the same command" + " without --overwrite" * config.overwrite
        say(
            f"stopped by signal {signal}; step {run.step} is saved in {out}, {again} continues",
            ranks,
        )
        return 128 + signal
    if ranks.first and run.step:
        figures.loss_curve(
            out / "log.csv", out / "loss.png", title=f"{stage}, {Path(config.data).name}"
        )
    return 0


def look_at_held(run: Training, data: Any, ranks: Ranks, log: runtime.Log) -> None:
    """Pre-training: error of the noise in 16 held-out slices, the same noise each time; when it rises while the loss
    falls, scans are being memorised. Fine-tuning with --select val: Dice of the validation cases, the best kept."""
    config = run.config
    if ranks.first and not (run.out / "last.pt").exists():
        run.save()  # before best.pt, which cannot be continued from
    run.best["seen"] = run.step
    row: dict[str, float] = {"step": run.step, "seconds": run.seconds}
    better = False
    if run.stage == "pretrain":
        row |= held_losses(run, data)
    else:
        rows = score_cases(
            Network(config, run.model.eval(), run.device, run.dtype), data, data.cases("val"), ranks
        )[0]
        dice = metrics.over_classes(rows)["dice"]
        better = dice >= run.best["dice"]
        run.best |= {"dice": dice, "step": run.step} if better else {}
        row["val_dice"] = dice
        run.model.train()
    if ranks.first:
        log.row(row)
        for name in ["best.pt"] * better + ["last.pt"]:
            run.save(name)


@torch.no_grad()
def held_losses(run: Training, data: Any) -> dict[str, float]:
    """val_loss and val_loss_t50 ..: eq. (5) of the averaged weights on held-out slices, at the levels PROBES."""
    every = slices_of(data, held_out(data))
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, 16).round().astype(int)]
    x0 = torch.from_numpy(stack(data, chosen))[:, None].to(run.device)
    eps = noise(0, "held", range(len(x0)), x0.shape[1:], torch.device("cpu")).to(run.device)
    losses = {}
    for t in PROBES:
        tt = torch.full((len(x0),), t, device=run.device)
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            losses[f"val_loss_t{t}"] = float(
                noise_loss(run.ema.eval(), x0, eps, tt, run.config.schedule).mean()
            )
    run.model.train()
    return losses | {"val_loss": float(np.mean(list(losses.values())))}


def yardstick(data: Any, schedule: str) -> str:
    """Error of the best linear guess from each pixel alone at PROBES: above it nothing is learnt yet."""
    slices = slices_of(data, held_out(data))
    v = float(np.var(stack(data, slices[:: max(1, len(slices) // 64)])))
    abar = np.cumprod(1 - betas(schedule))[list(PROBES)]
    best = abar * v / (abar * v + 1 - abar)  # of linear predictors, for pixels of variance v
    return ", ".join(f"{e:.4f} at t {t}" for t, e in zip(PROBES, best))


def check_memory(stage: str, config: Config, record: Mapping[str, Any], ranks: Ranks) -> None:
    """InputError where a step needs more memory than is free: counted on tensors without storage.

    Activations, and 4 bytes a weight for it, its average, its gradient and each of the optimiser's two moments.
    """
    if config.recompute:  # only inputs of blocks are kept then: not estimated
        return
    dtype = runtime.number_format(config.amp, ranks.device)[0] or torch.float32
    batch = config.batch // (ranks.world * config.accumulate)
    with torch.device("meta"):
        model = (
            network_for(stage, replace(config, input="clean"), record).to(dtype).eval()
        )  # noise is not kept
        x = torch.empty(batch, len(record["channels"]), config.size, config.size, dtype=dtype)
        maps = runtime.kept_for_backward_gb(lambda: model(x, torch.zeros(batch)))
    weights = sum(p.numel() for p in model.parameters())
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = maps + 4e-9 * (weights * (1 + bool(config.ema)) + 3 * learn)
    free = runtime.free_memory_gb(ranks.device)
    if needed > free:
        more = min(batch, 2 * math.ceil(maps / free)) * config.accumulate
        parts = f"--accumulate {more}, " if stage == "pretrain" else ""
        raise InputError(f"{batch} slices of {config.size} x {config.size} need about {needed:.1f} GB to train on, "
                         f"{ranks.device} has {free:.1f} GB free; try {parts}--recompute, a lower --batch")  # fmt: skip


def print_header(
    run: Training, data: Any, count: int, ranks: Ranks, reason: str, warnings: Sequence[str]
) -> None:
    """What this run is, before it starts."""
    config, fine = run.config, run.stage == "finetune"
    share = f"{ranks.world} processes x {config.accumulate} parts x {config.batch // (ranks.world * config.accumulate)}"
    plain = fine and config.strategy == "scratch"  # without noise and t
    notes = (
        ["D2"]
        + ["D1"] * (config.schedule == "linear" and not plain)
        + ["D12"] * (config.preset != "paper")
    )
    notes += ["D3"] * bool(config.ema) + ["D8"] * (not fine)
    if fine:
        notes += ["D5", "D6", "D7"] + ["D10"] * (not plain) + ["D4"] * (config.dice != "joint")
        notes += ["D9"] * (
            config.strategy == "full" or (config.init == "none" and config.strategy != "scratch")
        )
    learn = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = [f"DDPM pre-training, few labels (Huang et al. 2025), {run.stage} -> {run.out}"]
    if fine:
        total = len(labelled_training(data))
        what = (
            f"{count} of {total} labelled slices ({100 * count / total:.3g} %), draw {config.draw}"
        )
        how = f"{config.strategy}, t = {config.time}, Dice {config.dice}, start {config.init or 'random'}"
        if config.strategy == "scratch":
            how = f"scratch (plain network, random weights), Dice {config.dice}"
        lines += [f"  method    {how}"]
    else:
        what = f"{count} slices of {len({c for c, _ in pretraining_slices(data)})} scans, labels not used"
    lines += [f"  data      {config.data}: {what}; side {config.size}; {', '.join(data.channels)}"]
    lines += [f"  warning   {text}" for text in warnings]
    lines += [
        f"  network   {sum(p.numel() for p in run.model.parameters()):,} parameters, {learn:,} of them trained"
    ]
    lines += [
        f"  training  step {run.step} to {config.steps}, batch {config.batch} = {share}, rate {config.lr:g}"
    ]
    if not fine and held_out(data):
        lines += [
            f"  yardstick error of the noise from single pixels alone: {yardstick(data, config.schedule)}"
        ]
    if fine and config.select == "val":
        lines += ["  note      the weights that are scored are chosen by the validation cases"]
    if config.time == T and fine and not plain:
        lines += ["  note      t = 1000 is one beyond the last trained level, 999"]
    lines += [
        f"  device    {ranks.device}, {'fp32' if run.dtype is None else str(run.dtype)[6:]} ({reason})"
    ]
    lines += [
        f"  differs   {' '.join(sorted(notes, key=lambda d: int(d[1:])))} (see the top of {SCRIPT}.py)"
    ]
    say("\n".join(lines), ranks)


def load_start(config: Config, net: UNet, record: Mapping[str, Any] | None) -> None:
    """--init: weights of a pre-trained noise predictor, ours or public, each of which must fit.

    record: fine-tuning's, of the labelled data, which must be scaled as those of the pre-training; the weights of `out`
    are left out then. None: pre-training's. Raises: InputError.
    """
    path = Path(config.init)
    state = runtime.load_tensors(path)
    if isinstance(state, dict) and "format" in state:
        state = runtime.load_checkpoint(path, SCRIPT)
        check_stage(state, path, "pretrain", "--init needs a pre-trained network")
        for key in ("normalisation", "slices", "channels"):
            if record is not None and state["data"][key] != record[key]:
                raise InputError(f"{path} was pre-trained on data with {key} {state['data'][key]}, {config.data} has "
                                 f"{record[key]}; prepare both together (--unlabelled)")  # fmt: skip
        state = state["ema"] if state["ema"] and config.init_weights == "ema" else state["model"]
    if not isinstance(state, dict):
        raise InputError(
            f"{path} holds a {type(state).__name__}, expected a state dict; use another file"
        )
    state = {k.removeprefix("module."): v for k, v in state.items()}
    ends = {"input_blocks.0.0.weight": 1, "out.2.weight": 0}  # name: the axis of its image channels
    found = {k: tuple(state[k].shape) for k in ends if k in state}
    if any(shape[ends[k]] != 1 for k, shape in found.items()):
        raise InputError(f"--init {path} is not a network of one channel in and out: {found}; RGB weights do not fit, "
                         "pre-train on slices instead")  # fmt: skip
    if record is not None:  # `out` gives way to the head
        state = {k: v for k, v in state.items() if not k.startswith("out.")}
    try:
        load_public(net, state)
    except (ValueError, AttributeError) as error:
        raise InputError(f"--init {path} does not fit: {error}") from error


def start_of(config: Config, state: Mapping[str, Any] | None, out: Path) -> list[float]:
    """Step and seconds of the pre-training at --init; InputError where the run to be continued began from another."""
    if config.init in ("", "none"):
        return []
    start = runtime.load_tensors(Path(config.init))
    found = (
        [start["step"], start["seconds"]] if isinstance(start, dict) and "format" in start else []
    )
    if state is not None and found != state.get(
        "start", found
    ):  # one of ddpmseg did not hold it before
        raise InputError(f"{out} began from {config.init} at step {state['start'][:1]}, which is at {found[:1]} now; "
                         "use --overwrite, or another --out")  # fmt: skip
    return found


def check_stage(state: Mapping[str, Any], path: Path, wanted: str, need: str) -> None:
    """Raises InputError where a checkpoint is of another stage than `wanted` (words, separated by |)."""
    if state.get("stage") not in wanted.split("|"):
        raise InputError(
            f"{path} is a checkpoint of `{state.get('stage')}`, {need}; choose another file"
        )


# --- DDPM-Seg: frozen features, classifiers of single pixels ---


def fit_member(config: Config, store: FeatureStore, classes: int, member: int) -> PixelClassifier:
    """One classifier on random pixels of all labelled slices, as the public code of DDPM-Seg does it.

    64 pixels per step; from the fifth epoch on it is done when more than 50 steps in a row did not beat the best.
    """
    torch.manual_seed(seed_of(config.seed, "member", member) % 2**32)
    classifier = PixelClassifier([s[0] for s in store.shapes], classes).train()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    best, missed, at_once = math.inf, 0, 64
    bar = tqdm(desc=f"member {member}", unit="step", leave=False, disable=config.quiet or None)
    for epoch in range(config.epochs):
        order = np.random.default_rng(seed_of(config.seed, "pixels", member, epoch)).permutation(
            store.pixels
        )
        for i in range(len(order) // at_once):
            pixels = order[i * at_once : (i + 1) * at_once]
            vectors = torch.from_numpy(store.gather(pixels))  # [64, D]
            label = torch.from_numpy(store.label[pixels].astype(np.int64))
            loss = F.cross_entropy(classifier.rest(classifier.first(vectors)), label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update()
            if epoch > 3:
                value = float(loss.detach())
                best, missed = (value, 0) if value < best else (best, missed + 1)
                if missed > 50:
                    break
        if missed > 50:
            break
    bar.close()
    return classifier.eval()


def ddpmseg(config: Config, data: Any, ranks: Ranks) -> int:
    """The baseline of Baranchuk et al.: features of the frozen network, an ensemble of pixel classifiers, scores.

    The features lie in a file, so memory does not grow with the number of slices (D11). Members that
    were trained before an interruption are kept.
    """
    out, record = config.ddpmseg_folder, loaders.data_record(data)
    cases_of(config, data)  # before the work: is there something to score
    slices, total, warnings = labelled_slices(data, config)
    same = asdict(replace(config, steps=config.members))  # a step of this checkpoint is a member
    state = (
        None if config.overwrite else runtime.find_run(out, SCRIPT, same, MAY_DIFFER, record, ranks)
    )
    start = start_of(config, state, out)
    model: PixelEnsemble = network_for("ddpmseg", config, record)
    done = 0
    if state is not None:
        model.load_state_dict(state["model"])
        done = state["step"]
    elif config.init not in ("", "none"):
        unused, model.net.out = (
            model.net.out,
            nn.Sequential(),
        )  # load_start leaves the file's `out` away
        load_start(config, model.net, record)
        model.net.out = unused  # keeps the parts of a checkpoint alike
    runtime.make_run(out, asdict(config), config.overwrite, ranks)
    dims = sum(model.widths)
    say(f"DDPM-Seg (Baranchuk et al.) on {len(slices)} of {total} labelled slices, draw {config.draw} -> {out}\n"
        f"  {dims} features: blocks {config.blocks}, t {config.t_list}; {config.members} members\n"
        f"  differs   D2 D6 D7 D11 (see the top of {SCRIPT}.py)", ranks)  # fmt: skip
    for text in warnings:
        say(f"  warning   {text}", ranks)
    model.to(ranks.device).eval()
    dtype = runtime.number_format(config.amp, ranks.device)[0]
    if ranks.first:
        write_labels(out, slices, total)
    file = out / f"features-{ranks.rank}.npy"
    try:
        store = FeatureStore(file, len(slices), (config.size, config.size))
        for at in tqdm(
            slices if done < config.members else [],
            desc="features",
            leave=False,
            disable=config.quiet or None,
        ):
            x = torch.from_numpy(data.slice(*at))[None, None].to(ranks.device)
            with (
                torch.no_grad(),
                torch.autocast(ranks.device.type, dtype, enabled=dtype is not None),
            ):
                store.add(model.maps(x), 1.0, data.slice_label(*at))
        for first in range(done, config.members, ranks.world):  # one member a process at a time
            i = first + ranks.rank
            mine = (
                fit_member(config, store, len(data.classes) + 1, i).state_dict()
                if i < config.members
                else None
            )
            for j, weights in enumerate(runtime.gather(mine, ranks)):
                if weights is not None:
                    model.members[first + j].load_state_dict(weights)
            if ranks.first:
                save_ensemble(
                    model, config, record, out, min(first + ranks.world, config.members), start
                )
    finally:
        file.unlink(missing_ok=True)
    runtime.gather(None, ranks)  # all processes wait here
    return score_run(config, out, out / "last.pt", data, ranks)


def save_ensemble(
    model: PixelEnsemble,
    config: Config,
    record: dict[str, Any],
    out: Path,
    done: int,
    start: list[float],
) -> None:
    state = {
        "format": runtime.FORMAT,
        "script": SCRIPT,
        "stage": "ddpmseg",
        "config": asdict(config),
        "step": done,
    }
    state |= {
        "model": model.state_dict(),
        "ema": {},
        "optimizer": {},
        "scaler": {},
        "best": {},
        "data": record,
    }
    state["start"] = start
    runtime.save_checkpoint(out / "last.pt", state)


# =====================================================================================================================
# Sample: new slices, and how far they are from real ones
# =====================================================================================================================


@dataclass(frozen=True)
class Levels:
    """The S of the T noise levels that a sampler visits, from fine to noisy; arrays [S], counted by i = 0..S-1 below.

    t: what the network is given; abar; abar_prev: that of the level before, 1 at the first; beta: the variances of the
    shortened chain, 1 - abar / abar_prev.
    """

    t: np.ndarray
    beta: np.ndarray
    abar: np.ndarray
    abar_prev: np.ndarray


def respaced(schedule: str, count: int) -> Levels:
    """`count` of the T levels, from 0 to T - 1 (one: T - 1), evenly; halves are rounded to even. 0: all."""
    abar = np.cumprod(1 - betas(schedule))
    count = count or T
    t = (
        np.rint(np.arange(count) * (T - 1) / (count - 1)).astype(int)
        if count > 1
        else np.array([T - 1])
    )
    abar = abar[t]
    abar_prev = np.append(1.0, abar[:-1])
    return Levels(t, 1 - abar / abar_prev, abar, abar_prev)


def predicted(s: Levels, i: int, xt: Tensor, eps_theta: Tensor) -> Tensor:
    """Eq. (2) solved for x_0 with the network's noise, clipped to the range of the data."""
    return (xt / math.sqrt(s.abar[i]) - math.sqrt(1 / s.abar[i] - 1) * eps_theta).clamp(-1, 1)


def ddpm_step(s: Levels, i: int, xt: Tensor, eps_theta: Tensor, variance: str, z: Tensor) -> Tensor:
    """From level i to i - 1; sigma_t^2 is the posterior's variance (small) or beta (large); z: standard normal."""
    beta, abar, abar_prev = s.beta[i], s.abar[i], s.abar_prev[i]
    # q(x_{t-1} | x_t, x_0) has the mean c1 x_0 + c2 x_t; with the x_0 of `predicted`, unclipped, that is eq. (4).
    c1 = beta * math.sqrt(abar_prev) / (1 - abar)
    c2 = (1 - abar_prev) * math.sqrt(1 - beta) / (1 - abar)
    mean = c1 * predicted(s, i, xt, eps_theta) + c2 * xt  # eq. (4)
    if i == 0:
        return mean
    return (
        mean + math.sqrt(beta if variance == "large" else beta * (1 - abar_prev) / (1 - abar)) * z
    )  # eq. (3)


def ddim_step(s: Levels, i: int, xt: Tensor, eps_theta: Tensor, eta: float, z: Tensor) -> Tensor:
    """From level i to i - 1 along the noise that the clipped slice implies (Song et al. 2021); eta 0 adds none."""
    abar, abar_prev = s.abar[i], s.abar_prev[i]
    x0 = predicted(s, i, xt, eps_theta)
    eps = (xt - math.sqrt(abar) * x0) / math.sqrt(
        1 - abar
    )  # eq. (2) again, now with the clipped x_0
    sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
    along = math.sqrt(max(1 - abar_prev - sigma**2, 0.0)) * eps
    return math.sqrt(abar_prev) * x0 + along + (sigma * z if i else 0.0)


@dataclass(frozen=True)
class Network:
    """A network in use. dtype: of autocast."""

    config: Config
    model: Any
    device: torch.device
    dtype: torch.dtype | None

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model(x, t).float()

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Slices [Z, H, W] -> what the classes' argmax is taken of, [Z, C, H, W] fp32."""
        parts = [
            self(
                torch.from_numpy(np.ascontiguousarray(x[i : i + AT_ONCE]))[:, None].to(self.device)
            )
            .cpu()
            .numpy()
            for i in range(0, len(x), AT_ONCE)
        ]
        return np.concatenate(parts)


@torch.no_grad()
def generate(
    net: Network, numbers: Sequence[int], quiet: bool = True
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, slice [H, W] in [-1, 1]); the noise of each is a function of (seed, its number), whatever the batch."""
    config, device = net.config, net.device
    s = respaced(config.schedule, config.sampling_steps)
    bar = tqdm(
        total=-(-len(numbers) // AT_ONCE) * len(s.t),
        desc="sample",
        leave=False,
        disable=quiet or None,
    )
    for first in range(0, len(numbers), AT_ONCE):
        ns = list(numbers[first : first + AT_ONCE])
        shape = (1, config.size, config.size)
        x = noise(config.seed, "sample", ns, shape, device)
        for i in reversed(range(len(s.t))):
            eps_theta = net(x, torch.full((len(ns),), int(s.t[i]), device=device))
            draws = i > 0 and (config.sampler == "ddpm" or config.eta > 0)
            z = (
                noise(config.seed, f"sample {i}", ns, shape, device)
                if draws
                else torch.zeros_like(x)
            )
            if config.sampler == "ddpm":
                x = ddpm_step(s, i, x, eps_theta, config.variance, z)
            else:
                x = ddim_step(s, i, x, eps_theta, config.eta, z)
            bar.update()
        yield from zip(ns, x[:, 0].cpu().numpy())
    bar.close()


def hounsfield(x: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """x in [-1, 1] -> HU for CT, else x itself."""
    rule = record["normalisation"]
    return rule["low"] + (x + 1) / 2 * (rule["high"] - rule["low"]) if rule["kind"] == "hu" else x


def display(x: np.ndarray, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Window's name -> uint8 of the same shape: CT in a lung and an abdominal window, MR in its own range."""
    if record["normalisation"]["kind"] != "hu":
        return {"mr": np.floor(255 * np.clip((x + 1) / 2, 0, 1) + 0.5).astype(np.uint8)}
    hu = hounsfield(np.asarray(x, np.float64), record)
    shown = {
        k: np.clip((hu - (level - width / 2)) / width, 0, 1)
        for k, (level, width) in WINDOWS.items()
    }
    return {k: np.floor(255 * u + 0.5).astype(np.uint8) for k, u in shown.items()}


def parts_folder(net: Network, config: Config, ranks: Ranks) -> Path:
    """The folder samples.part, empty unless it holds slices of the same weights and settings."""
    folder = config.run_folder / "samples.part"
    names = (
        "size",
        "seed",
        "schedule",
        "sampler",
        "sampling_steps",
        "eta",
        "variance",
        "init_weights",
    )
    key = repr([getattr(net.config, k) for k in names]) + str(
        checkpoint_path(config).stat().st_mtime_ns
    )
    if ranks.first and (not (folder / "key").exists() or (folder / "key").read_text() != key):
        shutil.rmtree(folder, ignore_errors=True)
        loaders.atomic_write(folder / "key", key.encode())
    runtime.gather(None, ranks)  # all processes wait here
    return folder


def write_array(file: Path, array: np.ndarray) -> None:
    buffer = BytesIO()
    np.save(buffer, array)
    loaders.atomic_write(file, buffer.getvalue())


def write_png(file: Path, array: np.ndarray) -> None:
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    loaders.atomic_write(file, buffer.getvalue())


def read_part(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TokenError) as error:
        file.unlink()
        raise InputError(
            f"{file} was damaged and is removed ({error}); the same command draws it again"
        ) from error


def sample(config: Config, ranks: Ranks) -> int:
    """Write samples.npy (HU, or [-1, 1] for MR) and a grid of them as PNG for each window.

    Finished slices wait in samples.part: the same command after an interruption makes the others.
    """
    (net, record), out = load_network(config, "pretrain", ranks), config.run_folder
    if config.sampler == "ddpm" and config.variance == "large" and 0 < config.sampling_steps < 250:
        say(
            f"note: --variance large with {config.sampling_steps} steps gives noisy slices; use small, or 250",
            ranks,
        )
    begin = time.perf_counter()
    folder = parts_folder(net, config, ranks)
    files = [folder / f"{n}.npy" for n in range(config.num_samples)]
    todo = [n for n in range(ranks.rank, config.num_samples, ranks.world) if not files[n].exists()]
    for n, made in generate(net, todo, config.quiet or not ranks.first):
        write_array(files[n], made)
    runtime.gather(None, ranks)  # all are there
    if not ranks.first:
        return 0
    x = np.stack([read_part(file) for file in files])
    write_array(out / "samples.npy", hounsfield(x, record).astype(np.float32))
    shutil.rmtree(folder)
    columns = max(1, math.isqrt(min(len(x), 64)))
    for name, shown in display(x[: columns * columns], record).items():
        rows = [
            np.concatenate(list(shown[i : i + columns]), axis=1)
            for i in range(0, len(shown), columns)
        ]
        write_png(out / f"figures/samples_{name}.png", np.concatenate(rows))
    steps = config.sampling_steps or T
    seconds = time.perf_counter() - begin
    say(
        f"{len(x)} slices by {config.sampler}, {steps} steps, {seconds:.0f} s: {out}/samples.npy, {out}/figures"
    )
    return 0


class RandomFeatures(nn.Module):
    """A fixed random network: 4 convolutions of stride 2; features are means and SDs of its last two maps.

    x [N, 1, H, W] in [-1, 1] -> features [N, 768], spatial features [N, <= 2048]. Always the same weights.
    """

    def __init__(self) -> None:
        super().__init__()
        generator, widths = torch.Generator().manual_seed(0), (1, 32, 64, 128, 256)
        self.weights = [
            torch.randn(b, a, 3, 3, generator=generator) * math.sqrt(2 / (9 * a))
            for a, b in pairwise(widths)
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps, x = [], x.cpu()  # GPUs round the inputs of convolutions
        for weight in self.weights:
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
            maps.append(x)
        stats = [
            f(m.flatten(2))
            for m in maps[-2:]
            for f in (lambda v: v.mean(2), lambda v: v.std(2, correction=0))
        ]
        spatial = maps[-1][:, : max(1, 2048 // maps[-1][0, 0].numel())].flatten(1)
        return torch.cat(stats, dim=1), spatial


def feature_network(
    config: Config, ranks: Ranks
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor | None]], str, str]:
    """--features as (x [N, 1, H, W] -> features and spatial ones or None, suffix of the columns' names, what it is)."""
    kind, _, name = config.features.partition(":")
    if kind == "rand":
        return RandomFeatures(), "rand", "rand"  # D8
    path = Path(name)
    if not path.is_file():
        raise InputError(f"--features {config.features}: {path} is not there; check the path")
    digest = sha256(path.read_bytes()).hexdigest()
    what = f"{path.name} SHA-256 {digest}"
    if kind == "encoder":
        net, _ = load_network(replace(config, checkpoint=name), "pretrain", ranks)
        scored = checkpoint_path(config)
        if scored.exists() and path.samefile(scored):
            say(
                "note: these features are of the very network that is scored; use one file for all rows",
                ranks,
            )
        model = net.model

        def middle(x: Tensor) -> tuple[Tensor, None]:
            return model.encode(x, torch.zeros(len(x), device=x.device))[0].float().mean(
                (2, 3)
            ), None

        return middle, f"enc-{digest[:8]}", what
    try:
        script = torch.jit.load(path, map_location=ranks.device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--features {path} is no TorchScript (a state dict, such as pytorch-fid's .pth, is not one); "
                         "save it by torch.jit.script, or use NVIDIA's inception-2015-12-05.pt") from error  # fmt: skip
    say(f"features of {path}, SHA-256 {digest}", ranks)

    asked = (
        {"return_features": True} if "return_features" in str(script.forward.schema) else {}
    )  # as NVIDIA's knows it

    def inception(x: Tensor) -> tuple[Tensor, Tensor | None]:
        found = script(((x + 1) * 127.5).expand(-1, 3, -1, -1), **asked)
        if not isinstance(found, tuple | list):
            return found, None
        return found[0], found[1][:, : 2048 // found[1][0, 0].numel()].flatten(
            1
        )  # of 768 x 17 x 17: 7 channels

    return inception, "", what


def score(config: Config, data: Any, ranks: Ranks) -> int:
    """Distance of samples.npy from real slices, beside that of other real slices of other scans (the floor).

    Columns: fd, sfd (Fréchet distance of features, of spatial features), precision, recall, f1, each with the name of
    the features behind it (fd_rand; fid and sfid are Inception's). Slices are rounded to 8 bit first; only rows of the
    same n compare. memorised: distance to the nearest pre-training slice over that of held-out slices (towards 0:
    copies). Raises: InputError.
    """
    if not ranks.first:
        return 0
    path = Path(config.output) if config.output else config.run_folder / "samples.npy"
    made, every = read_samples(path, config, loaders.data_record(data)), pretraining_slices(data)
    rng, trained = np.random.default_rng(config.seed), {case for case, _ in every}
    splits = data.meta["splits"]
    scans = [
        c for c in dict.fromkeys(c for cases in splits.values() for c in cases) if c not in trained
    ]
    if len(scans) < 2:
        say(
            f"note: {data.name} has no two scans held out; real slices are those of the pre-training",
            ranks,
        )
        scans = sorted(trained)
    if len(scans) < 2:
        raise InputError(f"{data.name} has {len(scans)} scan in all; real slices are compared with those of another "
                         "scan: prepare two or more")  # fmt: skip
    scans = [scans[i] for i in rng.permutation(len(scans))]
    halves = [
        slices_of(data, part) for part in (scans[: len(scans) // 2], scans[len(scans) // 2 :])
    ]
    n = min(len(made), *map(len, halves))
    if n < len(made):
        say(
            f"note: the {len(scans)} scans give two sets of {n} real slices: the first {n} samples are scored",
            ranks,
        )
    real, other = ([half[i] for i in rng.permutation(len(half))[:n]] for half in halves)
    near = [every[i] for i in rng.permutation(len(every))[:NEAREST_AMONG]]
    call, suffix, features = feature_network(config, ranks)
    sets = {"samples": made[:n], "real slices (floor)": other, "real": real}
    found = {name: features_of(call, data, x, ranks) for name, x in sets.items()}
    b, b_spatial = found.pop("real")
    names = [*(("fd", "sfd") if suffix else ("fid", "sfid")), "precision", "recall", "f1"]
    rows = []
    for what, (a, a_spatial) in found.items():
        pr = metrics.precision_recall(b, a)
        spatial = math.nan if a_spatial is None else metrics.frechet_distance(b_spatial, a_spatial)
        values = [metrics.frechet_distance(b, a), spatial, pr["precision"], pr["recall"], pr["f1"]]
        row: dict[str, Any] = {
            "what": what,
            "n": n,
            "side": config.size,
            "features": features,
            "memorised": "",
        }
        rows.append(
            row | {f"{k}_{suffix}" if suffix else k: f"{v:.6g}" for k, v in zip(names, values)}
        )
        if pr["zero_radii"]:
            say(
                f"warning: {what} and real slices: {pr['zero_radii']} have three exact copies in their own set",
                ranks,
            )
    if scans[0] not in trained:
        train = features_of(call, data, near, ranks)[0]
        held = np.concatenate([b, found["real slices (floor)"][0]])
        rows[0]["memorised"] = (
            f"{metrics.memorisation(found['samples'][0], train, held)['ratio']:.4g}"
        )
    runtime.write_csv(path.parent / f"score_{suffix or 'inception'}.csv", rows)
    say(f"{path}:", ranks)
    for row in rows:
        say("  ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    return 0


def read_samples(path: Path, config: Config, record: Mapping[str, Any]) -> np.ndarray:
    """What `sample` wrote, as slices [N, H, W] in [-1, 1]. Raises: InputError."""
    try:
        hu = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: no samples ({error}); write them with the verb `sample`"
        ) from error
    if not np.isfinite(hu).all():
        raise InputError(
            f"{path} holds NaN or infinity; the network has not learnt, train it anew and sample again"
        )
    if hu.ndim != 3 or hu.shape[1:] != (config.size, config.size) or len(hu) < 4:
        raise InputError(
            f"{path} holds {hu.shape}, expected at least 4 slices of side {config.size}; sample again"
        )
    rule = record["normalisation"]
    return 2 * (hu - rule["low"]) / (rule["high"] - rule["low"]) - 1 if rule["kind"] == "hu" else hu


@torch.no_grad()
def features_of(call: Any, data: Any, what: Any, ranks: Ranks) -> tuple[Any, Any]:
    """Features [N, D] and spatial features [N, D'] or None, float64, of slices [N, H, W] or of a list of (case, k).

    The slices are rounded to 8 bit first, as images are.
    """
    parts = []
    for i in range(0, len(what), AT_ONCE):
        part = what[i : i + AT_ONCE]
        x = part if isinstance(part, np.ndarray) else stack(data, part)
        x = (np.rint((np.clip(x, -1, 1) + 1) * 127.5) / 127.5 - 1).astype(np.float32)
        found = call(torch.from_numpy(x)[:, None].to(ranks.device))
        parts.append([None if v is None else v.double().cpu().numpy() for v in found])
    both = [None if column[0] is None else np.concatenate(column) for column in zip(*parts)]
    return both[0], both[1]


# =====================================================================================================================
# Evaluate
# =====================================================================================================================


def load_network(config: Config, stage: str, ranks: Ranks) -> tuple[Network, dict[str, Any]]:
    """The network of --checkpoint, averaged weights where there are some, and the record of its data."""
    path = checkpoint_path(config)
    state = runtime.load_checkpoint(path, SCRIPT)
    needs = {"pretrain": "sampling and features need a pre-trained one"}
    check_stage(
        state, path, stage, needs.get(stage, "masks need a fine-tuned one (finetune or ddpmseg)")
    )
    known = {field.name for field in fields(Config)}
    shape = {k: v for k, v in state["config"].items() if k in known & NETWORK}
    mine = replace(config, **shape)
    model = network_for(state["stage"], mine, state["data"])
    raw = stage == "pretrain" and config.init_weights == "raw"
    model.load_state_dict(state["model"] if raw or not state["ema"] else state["ema"])
    model = fast_layout(model.to(ranks.device)).eval().requires_grad_(False)
    dtype = runtime.number_format(config.amp, ranks.device)[0]
    return Network(mine, model, ranks.device, dtype), state["data"]


def cases_of(config: Config, data: Any) -> list[str]:
    """The labelled cases of --split, at most --limit."""
    cases = [case for case in data.cases(config.split) if data.has_label(case)]
    if not cases:
        raise InputError(f"{config.data} has no labelled case in its split {config.split}; has "
                         f"{', '.join(k for k, v in data.meta['splits'].items() if v)}; choose by --split")  # fmt: skip
    return cases[: config.limit or None]


def segment_case(net: Network, data: Any, case: str) -> np.ndarray:
    """[X, Y, Z] uint8 of a prepared case, slice by slice."""
    x = stack(data, slices_of(data, [case]))  # [Z, H, W]
    mask = net.logits(x).argmax(1).astype(np.uint8)
    return np.stack([loaders.from_display(m) for m in mask], axis=2)


Row = dict[str, Any]


def score_cases(
    net: Network,
    data: Any,
    cases: Sequence[str],
    ranks: Ranks,
    out: Path | None = None,
    quiet: bool = True,
) -> tuple[list[Row], list[Row]]:
    """Rows a case and organ in 3D, and rows a slice in which the organ is in truth or prediction; on all processes.

    out: where masks are written as NIfTI, and pictures of the first cases.
    """
    volumes, flat = [], []
    todo = range(ranks.rank, len(cases), ranks.world)
    for i in tqdm(todo, desc="cases", leave=False, disable=quiet or not ranks.first or None):
        case, truth = cases[i], np.asarray(data.label(cases[i]))
        mask = segment_case(net, data, case)
        volumes += metrics.evaluate_case(case, mask, truth, data.spacing(case), data.scored)
        flat += slice_rows(case, mask, truth, data.scored)
        if out is None:
            continue
        values = {int(k): v for k, v in data.meta["label_values"].items()}
        table = np.array([values.get(v, v) for v in range(max(values) + 1)])
        table = table.astype(
            np.min_scalar_type(table.max())
        )  # published values, uint8 where they fit
        loaders.write_on_grid(out / f"predictions/{case}.nii.gz", table[mask], data.affine(case))
        if i < 3:
            picture = np.asarray(data.image(case)[0], np.float32)
            file, shown = out / f"figures/{case}.png", {"truth": truth, "prediction": mask}
            figures.mask_slices(picture, shown, file, data.spacing(case), data.classes, f"{case}")
    gathered = runtime.gather((volumes, flat), ranks)
    order = {case: i for i, case in enumerate(cases)}
    return tuple(
        sorted((r for part in gathered for r in part[k]), key=lambda r: order[r["case"]])
        for k in (0, 1)
    )  # type: ignore[return-value]


def slice_rows(
    case: str, mask: np.ndarray, truth: np.ndarray, classes: Mapping[str, Any]
) -> list[Row]:
    """Dice and IoU of each slice and organ that truth or prediction shows there."""
    rows = []
    for name, value in classes.items():
        p, g = np.isin(mask, value), np.isin(truth, value)
        for k in np.nonzero((p | g).any((0, 1)))[0]:
            row = {
                "dice": metrics.dice(p[:, :, k], g[:, :, k]),
                "iou": metrics.iou(p[:, :, k], g[:, :, k]),
            }
            rows.append({"case": case, "slice": int(k), "class": name} | row)
    return rows


def evaluate(config: Config, data: Any, ranks: Ranks, out: Path | None = None) -> int:
    """Score a fine-tuned network on --split: metrics.csv in 3D, metrics_slices.csv, summary.json, masks, pictures.

    Raises: InputError where the data are not prepared as those it was trained on.
    """
    begin = time.perf_counter()
    net, record = load_network(config, "finetune|ddpmseg", ranks)
    where = checkpoint_path(config)
    for key in ("channels", "classes", "normalisation", "slices"):
        if record[key] != loaders.data_record(data)[key]:
            raise InputError(f"{config.data} has {key} {loaders.data_record(data)[key]}, the network was trained with "
                             f"{record[key]}; prepare alike")  # fmt: skip
    if out is None:
        out = runtime.scores_folder(config, where, SCRIPT)
    else:
        out = metrics.scores_folder(out, config.split, config.limit)
    cases = cases_of(config, data)
    volumes, flat = score_cases(net, data, cases, ranks, out, config.quiet)
    if not ranks.first:
        return 0
    summary = metrics.summarise(volumes)  # D7
    metrics.write_metrics_csv(out / "metrics.csv", volumes)
    runtime.write_csv(
        out / "metrics_slices.csv",
        flat or [{"case": "", "slice": "", "class": "", "dice": "", "iou": ""}],
    )
    metrics.write_summary(out / "summary.json", summary)  # last: a run that has it is done
    seconds = time.perf_counter() - begin
    say(
        f"\n{config.split} split of {config.data}, {len(cases)} cases, {seconds:.0f} s; {net.config.strategy}, {where}"
    )
    say(metrics.format_summary(summary))
    over = metrics.over_classes(volumes)
    lost = (
        f"; without {', '.join(over['lost'])}, lost: Dice {over['found_dice']:.3f}"
        if over["lost"]
        else ""
    )
    say(f"mean over cases, then over organs: Dice {over['dice']:.3f}, IoU {over['iou']:.3f}{lost}")
    names = [c for c in summary["classes"] if any(r["class"] == c for r in flat)]
    per = {
        k: [np.mean([r[k] for r in flat if r["class"] == c]) for c in names]
        for k in ("dice", "iou")
    }
    say(f"over slices with the organ in truth or prediction: Dice {np.mean(per['dice'] or [math.nan]):.3f}, "
        f"IoU {np.mean(per['iou'] or [math.nan]):.3f}")  # fmt: skip
    say(f"masks, pictures and tables are in {out}")
    return 0


def score_run(config: Config, out: Path, weights: Path, data: Any, ranks: Ranks) -> int:
    """`evaluate` at the end of finetune and ddpmseg, into their folder `out`; not again where it was done already."""
    scores = metrics.scores_folder(out, config.split, config.limit) / "summary.json"
    newer = scores.exists() and scores.stat().st_mtime >= weights.stat().st_mtime
    if newer and metrics.read_summary(scores)["images"] == len(cases_of(config, data)):
        say(f"{out}: trained and scored already", ranks)
        return 0
    return evaluate(replace(config, checkpoint=str(weights)), data, ranks, out)


# =====================================================================================================================
# Predict
# =====================================================================================================================


def predict(config: Config, ranks: Ranks) -> int:
    """A CT or MR volume in, a label volume on its grid with the published values out. Raises: InputError."""
    if not config.image or not config.output:
        raise InputError(
            "predict needs --image FILE... and --output FILE.nii.gz (or a folder for several)"
        )
    net, record = load_network(config, "finetune|ddpmseg", ranks)
    inputs = loaders.find_inputs([Path(p) for p in config.image], 1)
    output, to_file = Path(config.output), config.output.endswith((".nii", ".nii.gz"))
    if to_file and len(inputs) > 1:
        raise InputError(
            f"--output {output} is one file, --image names {len(inputs)} volumes; give a folder"
        )
    for case, (image,) in inputs[ranks.rank :: ranks.world]:
        target = output if to_file else output / f"{case}.nii.gz"
        loaders.check_output(target, [image])
        x, restore = loaders.load_slices_for_prediction(image, record)
        mask = restore.mask(net.logits(x))
        loaders.write_nifti(target, mask, restore.like, mask.dtype)
        values = {int(k): int(v) for k, v in record["label_values"].items()}
        ml = float(np.prod(restore.like.spacing[:3])) / 1000
        found = {name: (mask == values[v]).sum() * ml for name, v in record["classes"].items()}
        say(f"{target}: " + ", ".join(f"{name} {volume:.1f} ml" for name, volume in found.items()))
    return 0


# =====================================================================================================================
# Command line
# =====================================================================================================================

VERBS = ("pretrain", "sample", "score", "finetune", "ddpmseg", "evaluate", "predict")
# Flag -> the verbs that look at it, "" being the bare run; given to others it is refused.
ONLY: dict[str, tuple[str, ...]] = {"image": ("predict",), "output": ("predict", "score")}
ONLY |= {"checkpoint": ("sample", "score", "evaluate", "predict"), "features": ("", "score")}
ONLY |= {k: ("", "finetune", "ddpmseg", "evaluate") for k in ("split", "limit")}
ONLY |= {k: ("", "sample") for k in ("num_samples", "sampler", "sampling_steps", "eta", "variance")}
TRAINED = ("evaluate", "predict")  # they compare these with the training's
ONLY |= {k: ("", "finetune", "ddpmseg", *TRAINED) for k in ("labels", "draw")}
ONLY |= {k: ("", "finetune", *TRAINED) for k in ("dice", "select")}
ONLY |= {k: ("finetune", *TRAINED) for k in ("strategy", "t", "input")}
ONLY |= {k: ("ddpmseg", *TRAINED) for k in ("blocks", "t_list", "members", "epochs")}
ONLY |= {
    k: ("", *(v for v in VERBS if v != "ddpmseg"))
    for k in ("steps", "batch", "lr", "lr_steps", "lr_schedule")
}
# ONCE: how something is used this time, neither kept from a training nor compared on continuing it.
ONCE = {
    "checkpoint",
    "split",
    "limit",
    "image",
    "output",
    "overwrite",
    "quiet",
    "device",
    "amp",
    "workers",
}
ONCE |= {"num_samples", "features", "sampler", "sampling_steps", "eta", "variance"}
# MAY_DIFFER: on continuing a training, since they change where, how fast and how long, not what (but --steps also says
# how slowly the rate falls, where --lr-steps does not).
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
# FREE: for the verbs that use a trained network; other flags are refused where they differ from its training.
FREE = ONCE | {"data", "preset", "out", "recompute", "compile"}
# PRETRAINED: what a pre-trained network is, which finetune takes over; NETWORK: also what fine-tuning made of it.
PRETRAINED = {
    "arch",
    "size",
    "num_channels",
    "channel_mult",
    "num_res_blocks",
    "num_head_channels",
    "schedule",
}
PRETRAINED |= {"attention_resolutions"}
NETWORK = PRETRAINED | {"strategy", "t", "input", "variant", "dice", "blocks", "t_list", "members"}
# STORY: flags of the bare run that also concern its fine-tuning.
STORY = {"labels", "dice", "variant", "select"}


def checkpoint_path(config: Config) -> Path:
    return runtime.checkpoint_file(config.checkpoint, config.run_folder)


def resolve(verb: str, config: Config, given: dict[str, Any]) -> Config:
    """The settings of a verb: those of what it builds on, where there is something, changed by the given flags."""
    if verb in ("", "pretrain"):
        return widened(config, given)
    if verb == "finetune" and config.strategy == "ddpmseg":
        raise InputError(
            "--strategy ddpmseg is not a fine-tuning but a verb of its own; use ddpmseg"
        )
    if verb in ("finetune", "ddpmseg"):
        return as_finetuning(
            config if verb == "finetune" else replace(config, strategy="ddpmseg"), given
        )
    if verb in ("sample", "score"):
        path = checkpoint_path(config)
        if verb == "score" and not path.exists():
            return config
        check_stage(
            runtime.load_checkpoint(path, SCRIPT),
            path,
            "pretrain",
            f"{verb} needs a pre-trained one",
        )
        found = runtime.trained_config(
            config, given, path, SCRIPT, FREE | {"init_weights", "seed"}, ONCE
        )
        how = {
            k: v for k, v in PRESETS[found.preset].items() if k in ONCE - {"workers"} - set(given)
        }
        return replace(found, **how)
    path = checkpoint_path(config)
    if not config.checkpoint:
        raise InputError(
            f"{verb} needs --checkpoint, the folder that finetune or ddpmseg wrote, or a file in it"
        )
    check_stage(
        runtime.load_checkpoint(path, SCRIPT),
        path,
        "finetune|ddpmseg",
        f"{verb} needs a fine-tuned one",
    )
    return runtime.trained_config(config, given, path, SCRIPT, FREE, ONCE)


def widened(config: Config, given: Mapping[str, Any]) -> Config:
    """The paper's network L has c = 256."""
    wide = config.variant == "L" and config.preset == "paper" and "num_channels" not in given
    return replace(config, num_channels=256) if wide else config


def as_finetuning(config: Config, given: dict[str, Any]) -> Config:
    """Settings of fine-tuning: the network from the pre-trained checkpoint, the rest from FINETUNE, then given flags.

    Fills `init` (a file, `none`, or empty for scratch) and `t`. scratch needs no checkpoint but takes its shape from
    one that is there, so that all strategies have one network.
    """
    if given.get("ema") or given.get("accumulate", 1) > 1:
        raise InputError("--ema and --accumulate are for pretrain: no weights are averaged here, Dice and batch norm "
                         "need the whole batch; leave them out")  # fmt: skip
    path = (
        Path(config.init) if config.init not in ("", "none") else config.run_folder / "last.pt"
    )  # the last step, D10
    if path.exists() or (config.init != "none" and config.strategy != "scratch"):
        state = runtime.load_tensors(path)
        if (
            isinstance(state, dict) and "format" in state
        ):  # public weights say nothing: the flags must fit them
            check_stage(state, path, "pretrain", "fine-tuning starts from a pre-trained one")
            saved = runtime.load_checkpoint(path, SCRIPT)["config"]
            if "preset" not in given and saved["preset"] != config.preset:
                flags = {
                    **PRESETS[saved["preset"]],
                    **given,
                    "preset": saved["preset"],
                    "strategy": config.strategy,
                }
                config = Config(**flags)
            other = [
                f"--{k.replace('_', '-')} {saved[k]}"
                for k in PRETRAINED & set(given)
                if saved[k] != given[k]
            ]
            if other:
                raise InputError(
                    f"{path} was pre-trained with {', '.join(other)}; leave these flags out"
                )
            config = replace(config, **{k: saved[k] for k in PRETRAINED})
        start = (
            "" if config.strategy == "scratch" else "none" if config.init == "none" else str(path)
        )
        config = replace(config, init=start)
    else:
        config = widened(config, given)
    wanted = (
        {"S": 128, "M": 128, "L": 256}[config.variant]
        if config.preset == "paper"
        else config.num_channels
    )
    if config.num_channels != wanted or (config.variant == "L" and config.preset != "paper"):
        raise InputError(f"--variant {config.variant} is not a network of width {config.num_channels}: S and M have "
                         "128, L has 256, small presets know S and M; choose another --variant or --init")  # fmt: skip
    fine = {k: v for k, v in FINETUNE[config.preset].items() if k not in given}
    config = replace(config, **fine)
    return replace(config, t=config.time)  # D10


def with_labels(config: Config, data: Any, given: Mapping[str, Any]) -> Config:
    """Steps and batch of fine-tuning, which depend on the number of labelled slices."""
    total = len(labelled_training(data))
    n = label_count(config.labels, total) if total else 1
    steps: dict[str, Any] = (
        {} if "steps" in given else {"steps": fine_steps(config.preset, n, total)}
    )
    return replace(config, batch=min(config.batch, n), **steps)


def finetune(config: Config, data: Any, ranks: Ranks, stop: runtime.StopFlag) -> int:
    """Train on the labelled slices, then score on --split."""
    cases_of(config, data)  # before the work: is there something to score
    if config.select == "val" and not data.cases("val"):
        raise InputError(
            f"--select val: {config.data} has no validation case; prepare some with --split-sizes"
        )
    code = train("finetune", config, data, ranks, stop)
    if code:
        return code
    stop.restore()  # scoring has nothing to save
    out = config.finetune_folder
    chosen = out / (
        "best.pt" if config.select == "val" and (out / "best.pt").exists() else "last.pt"
    )
    return score_run(config, out, chosen, data, ranks)


def story(
    config: Config, data: Any, ranks: Ranks, stop: runtime.StopFlag, given: dict[str, Any]
) -> int:
    """The bare run: pre-train, look at samples, fine-tune with and without what was learnt on the same draws.

    The control is the same network with the same part frozen, from random weights.
    """
    code = train("pretrain", config, data, ranks, stop)
    if code:
        return code
    stop.restore()  # what follows is short, or saves by itself
    sample(replace(config, checkpoint=""), ranks)
    runtime.gather(None, ranks)  # until the file is there
    score(config, data, ranks)
    rows: list[dict[str, Any]] = [
        {"strategy": "scratch", "init": ""},
        {"strategy": "decoder", "init": ""},
    ]
    rows += [{"strategy": "decoder", "init": "none"}]  # the control
    folders = []
    for draw in range(config.draw, config.draw + 3):
        for row in rows:
            mine = replace(config, draw=draw, **row)
            mine = with_labels(
                as_finetuning(mine, {k: v for k, v in given.items() if k in STORY}), data, {}
            )
            code = finetune(
                runtime.shared_batch(mine, {}, ranks, mine.finetune_folder),
                data,
                ranks,
                runtime.StopFlag(),
            )
            if code:
                return code
            folders.append(str(mine.finetune_folder))
    if ranks.first:
        say("\nthe same slices, with and without pre-training:")
        return metrics.main(["draws", *folders])
    return 0


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").split("\n\n")[0]
    verb, config, given = runtime.parse_flags(Config, argv, VERBS, PRESETS, about, ONLY)
    config = resolve(verb, config, given)
    ranks, stop = runtime.start_processes(config.device), runtime.StopFlag()
    try:
        if verb in ("sample", "predict"):  # need no data set
            stop.restore()
            code = {"sample": sample, "predict": predict}[verb](config, ranks)
        else:
            data = open_slices(config)
            if verb in ("finetune", "ddpmseg"):
                config = with_labels(config, data, given)
            if verb in ("", "pretrain", "finetune"):
                folder = config.finetune_folder if verb == "finetune" else config.run_folder
                config = runtime.shared_batch(config, given, ranks, folder)
            else:
                stop.restore()
            if verb == "":
                code = story(config, data, ranks, stop, given)
            elif verb == "pretrain":
                code = train("pretrain", config, data, ranks, stop)
            elif verb == "finetune":
                code = finetune(config, data, ranks, stop)
            else:
                verbs = {"score": score, "ddpmseg": ddpmseg, "evaluate": evaluate}
                code = verbs[verb](config, data, ranks)
    finally:
        stop.restore()
    runtime.stop_processes()
    return code


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
