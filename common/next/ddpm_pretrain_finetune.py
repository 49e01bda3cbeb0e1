"""DDPM pre-training on unlabelled CT slices, then segmentation of organs from a few labelled ones.

Paper
    Y. Huang et al.: Label-efficient multi-organ segmentation with a diffusion model. 2025,
    arXiv 2402.15216v2. No code of the authors is known.

Idea
    A network that takes noise out of CT slices has to know anatomy, and it learns that without
    labels. Its U-Net then becomes a segmentation network: the time t is fixed, a small head takes
    the place of the last layer, and a part is trained on a few labelled slices: the head alone
    (linear), the decoder and the head (decoder, the paper's choice), or all of it (full). scratch
    is the same network from random weights, without all that belongs to t. Whether pre-training
    pays is the difference decoder - scratch on the same slices, over several draws of them.

Symbols
    x_0       x0      [B, 1, Y, X]  slice in [-1, 1]: HU between the 0.5th and 99.5th percentile
    t         t       [B]           0..T-1; x_t of t = 0 has one step of noise (the paper: 1..T)
    beta_t    beta    [T]           variance added at t; abar_t is the product of 1 - beta_s, s <= t
    eps       eps     [B, 1, Y, X]  standard normal noise; eps_theta = model(xt, t)
    g, y      onehot, prob          truth and softmax [B, C, Y, X]; C = organs + 1, background first
    c, h      num_channels, hidden  width of the network's first level, and of the head

Equations
    (1) q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    (2) q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    (3) p(x_{t-1} | x_t) = N(mu, sigma_t^2 I)
    (4) mu = (x_t - beta_t / sqrt(1 - abar_t) eps_theta) / sqrt(1 - beta_t)
    (5) L_noise = mean of (eps - eps_theta)^2 over batch and pixels
    (6) L = L_CE / 2 + L_Dice / 2
    (7) L_CE = - mean over pixels of log y of the true class
    (8) L_Dice = 1 - (2 sum g y + e) / (sum g + sum y + e), over classes and pixels, e = 1e-5

Differs
    D1  beta rises linearly from 1e-4 to 0.02. The paper gives these ends and a "cosine annealing
        scheduler", which --schedule cosine and cosine-anneal read in two ways.
    D2  The network is guided-diffusion's for 256 x 256. The paper says a U-Net with scale and shift
        by t, and its 8,448 features of DDPM-Seg fit. --arch ddpm: Ho et al.'s. The variance is not
        learnt. Kernels of the head: 3, 3, 1 (paper: in a figure).
    D3  The average of the weights warms up; else a short run keeps its random start.
    D4  Eq. (8) over a softmax is 1 - the mean probability of the true class: it sees no imbalance
        (joint, the paper preset). The others have per-class: the mean over organs in the batch.
        joint-fg is eq. (8) without background.
    D5  Fine-tuning: the rate falls to a tenth, 1e-4 at first (paper: unknown) and ten times that in
        the head; 1,000 steps on 4 slices for every strategy (the paper says it of decoder).
    D6  Labelled slices are those on which something is drawn. The first four show every organ
        (paper: chosen by hand), and larger subsets contain them (paper: random).
    D7  Scores are per case and organ in 3D; an organ never found, or found where none is, counts 0.
        The paper does not say. results/ddpm_slices.py: per slice.
    D8  Transfer starts from the weights with the least loss on held-out scans, else from the last
        (paper: 250,000 steps).
    D9  full, and --init none (the same network from random weights), are not in the paper. Layers
        that start at zero are then drawn too, or a frozen part would be a linear map.
    D10 t = 0 (linear: 200), the paper's best, found on its test set. t = 1000 was never trained.
    D11 Slices are made smaller by area means. The paper takes one pixel in several, linearly.
    D12 A row is the last step of fine-tuning, without averaged weights. scratch has group norm in
        the network and batch norm in the head as the others. No flips: organs have sides.
    D13 The small presets: fewer channels and steps, a larger rate, few steps without noise (eta 0).
    D14 --augment on (laptop, gpu): turn, scale, shift, change contrast. The paper flips only.

Usage
    python ddpm_pretrain_finetune.py                      pre-train, fine-tune and score on phantoms
    python -m data_prep.flare22 --src FLARE22 --dst data/flare22
    torchrun --nproc_per_node=4 ddpm_pretrain_finetune.py pretrain --data flare22 --preset paper
    python ddpm_pretrain_finetune.py sample --data flare22 --preset paper --num-samples 64
    python ddpm_pretrain_finetune.py finetune --data flare22 --preset paper --strategy decoder
    python ddpm_pretrain_finetune.py finetune --data flare22 --preset paper --strategy scratch
    python ddpm_pretrain_finetune.py evaluate --checkpoint RUN/finetune-4-decoder-draw0
    python ddpm_pretrain_finetune.py predict --checkpoint RUN/finetune-4-decoder-draw0 \
        --image ct.nii.gz --output mask.nii.gz
    python -m results.draws 'RUN/finetune-*'               differences over draws of slices
    python -m results.ddpm_score --data flare22            table 1: how good are the samples
    python -m results.ddpm_ddpmseg --init RUN --labels 4   the rival DDPM-Seg

Expect
    The default run takes about EXPECT
"""

import copy
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import InputError, atomic_write, figures, flags, loaders, metrics, runtime, tables, unet
from common.flags import flag
from common.runtime import Ranks, noise, say, seed_of

SCRIPT = "ddpm_pretrain_finetune"
T = 1000  # noise levels; t = 0..T-1 throughout this file
AT_ONCE = 16  # slices in one pass without gradient
PROBES = (50, 100, 300, 500)  # levels at which held-out slices are denoised

# ==================================================================================================
# Config
# ==================================================================================================


@dataclass(frozen=True)
class Config(flags.RunFlags):
    """The flags of the method, with the paper's defaults of pre-training; see FINETUNE, too."""

    # the network, and its noise
    arch: Literal["adm", "ddpm"] = flag("adm", "guided-diffusion's or Ho et al.'s (D2)", "model")
    num_channels: int = flag(128, "width c of the first level (paper: or 256)", "model", 32)
    channel_mult: tuple[int, ...] = flag((1, 1, 2, 2, 4, 4), "widths of the levels", "model", 1)
    num_res_blocks: int = flag(2, "residual blocks of a level", "model", 1)
    num_head_channels: int = flag(64, "channels of an attention head", "model", 1)
    attention_resolutions: tuple[int, ...] = flag(
        (32, 16, 8), "sides of maps with attention, in pixels", "model", 1
    )
    schedule: Literal["linear", "cosine", "cosine-anneal"] = flag("linear", "of beta (D1)", "model")
    # both trainings
    seed: int = flag(0, "of weights, order and noise", "train", 0)
    batch: int = flag(32, "slices of a step, over all processes", "train", 1)
    lr: float = flag(2e-4, "learning rate, which falls to a tenth", "train", 1e-12, 1)
    grad_clip: float = flag(0.0, "largest gradient norm; 0: off", "train", 0)
    augment: Literal["on", "off"] = flag("off", "turn, scale, shift, contrast (D14)", "train")
    steps: int = flag(300_000, "optimisation steps", "speed", 1)
    eval_every: int = flag(5000, "steps between validations", "speed", 1)
    save_every: int = flag(1000, "steps between saves", "speed", 1)
    patience: int = flag(0, "validations without improvement; 0: never stop", "speed", 0)
    # pre-training
    flip: Literal["on", "off"] = flag("on", "mirror left and right, p = 0.5", "pretrain")
    ema: float = flag(0.9999, "decay of the averaged weights; 0: off", "pretrain", 0, 0.999999)
    lr_steps: int = flag(0, "step where the rate is down to a tenth; 0: the last", "pretrain", 0)
    # fine-tuning
    strategy: Literal["decoder", "linear", "full", "scratch"] = flag(
        "decoder", "what is trained", "finetune"
    )
    labels: str = flag("4", "labelled slices: N, all, or a share such as 1%", "finetune")
    labels_file: str = flag("", "your own list of them instead, see labels.json", "finetune")
    draw: int = flag(0, "subset seed: which slices these are", "finetune", 0)
    t: int = flag(-1, "time given to the network; -1: see D10", "finetune", -1, T)
    input: Literal["clean", "noised"] = flag("clean", "noised: with noise of t", "finetune")
    variant: Literal["S", "M", "L"] = flag("S", "M: h = 2 c; L: c = 256", "finetune")
    dice: Literal["joint", "joint-fg", "per-class"] = flag("joint", "Dice term (D4)", "finetune")
    select: Literal["last", "val"] = flag("last", "val: the best on validation cases", "finetune")
    finetune_steps: int = flag(0, "steps of fine-tuning; 0: by the number of labels", "story", 0)
    # sampling
    num_samples: int = flag(64, "slices to generate (table 1: 2000)", "sample", 1)
    sampling_steps: int = flag(T, "steps of a sample", "sample", 1, T)
    eta: float = flag(1.0, "noise of a step: 0 DDIM, 1 DDPM (paper)", "sample", 0, 1)
    save: Literal["masks", "maps"] = flag("masks", "maps: probabilities, too", "predict")

    script = SCRIPT

    @property
    def time(self) -> int:
        """The t that the fine-tuned network is given."""
        usual = 200 if self.strategy == "linear" else 0  # D10
        return self.t if self.t >= 0 else usual

    @property
    def finetune_folder(self) -> Path:
        """Below the pre-training's folder; its name tells what differs from the preset."""
        usual = Config(**FINETUNE[self.preset])
        words = {
            "random": self.init == "none" and self.strategy != "scratch",
            self.dice: self.dice != usual.dice,
            f"t{self.time}": self.time != replace(self, t=-1).time,
            self.variant: self.variant != "S",
            self.input: self.input != "clean",
            f"lr{self.lr:g}": self.lr != usual.lr,
            f"seed{self.seed}": self.seed != 0,
        }
        labels = Path(self.labels_file).stem or self.labels.replace("%", "pc")
        name = ["finetune", labels, self.strategy, *(word for word in words if words[word])]
        return self.run_folder / "-".join([*name, f"draw{self.draw}"])

    def __post_init__(self) -> None:
        """Check the ranges, then the rules between flags. Raises InputError that names the flag."""
        flags.check_ranges(self)
        label_count(self.labels, T)
        if self.num_channels % 32:
            raise InputError(
                f"--num-channels is {self.num_channels}; the 32 groups of a norm need a multiple"
            )
        if self.input == "noised" and self.t == T:
            raise InputError(f"--input noised has no level t = {T}, the last is {T - 1}")


SMALL: dict[str, Any] = {
    "num_channels": 32, "num_res_blocks": 1, "num_head_channels": 32,
    "attention_resolutions": (8,), "batch": 16, "ema": 0.999, "workers": 0,
    "dice": "per-class", "eta": 0.0, "sampling_steps": 50,
}  # fmt: skip  # D13
PRESETS: dict[str, dict[str, Any]] = {
    # Not mirrored: two of the phantoms' organs differ by their side alone.
    "tiny": SMALL
    | {"channel_mult": (1, 2, 2), "lr": 1e-3, "flip": "off", "steps": 600, "eval_every": 200}
    | {"save_every": 200, "num_samples": 16, "sampling_steps": 25},
    # For slices of 64 x 64.
    "laptop": SMALL
    | {"channel_mult": (1, 1, 2, 4), "steps": 20_000, "eval_every": 1000, "save_every": 100}
    | {"augment": "on"},  # D14
    # One night on a GPU of 24 GB, by arithmetic: nobody has run it yet.
    "gpu": {"num_channels": 64, "batch": 16, "ema": 0.999, "steps": 100_000, "augment": "on"}
    | {"dice": "per-class", "eta": 0.0, "sampling_steps": 50},
    "paper": {},
}
# What fine-tuning has instead of the values of pre-training.
FINE = {"batch": 4, "lr": 1e-4, "eval_every": 500}  # D5
FINETUNE: dict[str, dict[str, Any]] = {
    "tiny": PRESETS["tiny"] | FINE | {"lr": 1e-3, "eval_every": 100, "preset": "tiny"},
    "laptop": PRESETS["laptop"] | FINE | {"lr": 3e-4, "eval_every": 200, "preset": "laptop"},
    "gpu": PRESETS["gpu"] | FINE | {"preset": "gpu"},
    "paper": FINE | {"preset": "paper"},
}
FINETUNE_STEPS = {
    "tiny": (200, 400, 600),  # 4 slices or fewer, more, all
    "laptop": (600, 2000, 3000),
    "gpu": (1000, 10_000, 30_000),
    "paper": (1000, 10_000, 30_000),
}

# ==================================================================================================
# Model
# ==================================================================================================


def build_model(
    config: Config, in_channels: int, out_channels: int, side: int = 256, timed: bool = True
) -> unet.UNet:
    """Return guided-diffusion's U-Net for slices of this side (D2); timed: False for scratch.

    In a ResBlock the embedded t scales and shifts the second norm; coarse maps have attention.
    """
    mult, adm = config.channel_mult, config.arch == "adm"
    step = 2 ** (len(mult) - 1)
    if side % step or side < 2 * step:
        text = f"slices of side {side} cannot be halved {len(mult) - 1} times"
        raise InputError(f"{text}; prepare others, or use fewer levels in --channel-mult")
    sides = config.attention_resolutions if adm else (16,)
    attention = [level for level in range(len(mult)) if side >> level in sides]
    for level in {*attention, len(mult) - 1}:
        if adm and config.num_channels * mult[level] % config.num_head_channels:
            width = config.num_channels * mult[level]
            text = f"--num-head-channels {config.num_head_channels} does not divide {width}"
            raise InputError(f"{text}, the width of an attention; choose a divisor")
    return unet.UNet(
        in_channels, out_channels, config.num_channels, mult, config.num_res_blocks, attention,
        config.num_head_channels, adm=adm, timed=timed, recompute=config.recompute,
    )  # fmt: skip


def over_processes(x: Tensor) -> Tensor:
    """Return the sum of x over all processes; gradients are summed, too, since DDP divides them."""
    return all_reduce(x) if dist.is_initialized() else x


class SyncedNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes. PyTorch's own needs GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()) or x.is_meta:
            return super().forward(x)
        wide = x.float()
        count = wide.numel() // wide.shape[1] * dist.get_world_size()
        mean = over_processes(wide.sum((0, 2, 3))) / count  # [C]
        wide = wide - mean[:, None, None]
        var = over_processes(wide.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)  # type: ignore[union-attr, operator]
            self.running_var.lerp_(var * count / (count - 1), 0.1)  # type: ignore[union-attr, operator]
            self.num_batches_tracked += 1  # type: ignore[operator, assignment]
        scale = self.weight * (var + self.eps).rsqrt()
        return wide * scale[:, None, None] + self.bias[:, None, None]


def make_head(channels: int, hidden: int, classes: int) -> nn.Sequential:
    """Return what replaces the U-Net's last layer: [B, c, Y, X] -> logits [B, C, Y, X]."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1), SyncedNorm(hidden), nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1), SyncedNorm(hidden), nn.ReLU(),
        nn.Conv2d(hidden, classes, 1),
    )  # fmt: skip


class Segmenter(nn.Module):
    """The U-Net at a fixed time with a new head: model(x) -> logits [B, C, Y, X], x [B, 1, Y, X].

    The head reads the raw output of the last decoder block. What the strategy does not train runs
    without gradient and stays in eval mode. Of what belongs to t, `decoder` trains the layers in
    its blocks, but not time_embed.

    t is the same for all slices, so time is a fixed scale and shift in each block. The slice is
    clean, which only t = 0 fits: a larger t announces noise that is not there. noised: the schedule
    of the noise that is added then, a control; empty: none.
    """

    def __init__(
        self, net: unet.UNet, head: nn.Module, strategy: str, t: int = 0, noised: str = ""
    ):
        super().__init__()
        self.head, self.net = head, net
        self.strategy, self.t, self.noised = strategy, t, noised
        self.net.out = nn.Sequential()
        frozen: list[nn.Module] = []  # full, scratch  # D9
        if strategy == "linear":
            frozen = [net]
        if strategy == "decoder":
            frozen = [net.time_embed, net.input_blocks, net.middle_block]
        self.frozen = frozen  # a plain list: these modules are registered above
        for module in frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """t: instead of the fixed one."""
        learn = torch.is_grad_enabled()
        if t is None:
            t = torch.full((len(x),), self.t, device=x.device)
        if self.noised:
            eps = noise(0, "input", [0], x.shape[1:], torch.device("cpu")).to(x)
            x = q_sample(x, eps, t, self.noised)
        with torch.set_grad_enabled(learn and self.strategy in ("full", "scratch")):
            h, skips, emb = self.net.encode(x, t)
        with torch.set_grad_enabled(learn and self.strategy != "linear"):
            (h,) = self.net.decode(h, skips, emb)  # [B, c, Y, X]
        return self.head(h)


def network_for(config: Config, record: dict[str, Any], segments: bool) -> Any:
    """Return a noise predictor, or a Segmenter, for the data of this record: random weights."""
    torch.manual_seed(
        seed_of(config.seed, "weights", "finetune" if segments else "pretrain") % 2**32
    )
    n, side = len(record["channels"]), record["slices"]["side"]
    if not segments:
        return build_model(config, n, n, side)
    c = config.num_channels * config.channel_mult[0]
    hidden = config.num_channels * (2 if config.variant == "M" else 1)
    head = make_head(c, hidden, len(record["classes"]) + 1)  # first: alike with every strategy
    net = build_model(config, n, n, side, timed=config.strategy != "scratch")
    noised = config.schedule if config.input == "noised" else ""
    model = Segmenter(net, head, config.strategy, config.time, noised)
    if config.init == "none":
        for module in model.frozen:
            unet.redraw_zeros(module)  # D9
    return model


# ==================================================================================================
# Diffusion: schedule, q, losses
# ==================================================================================================


@cache
def betas(schedule: str, steps: int = T) -> np.ndarray:
    """Return beta [steps] in float64, the variance that eq. (1) adds at each level."""  # D1
    i = np.arange(steps)
    first, last = 1e-4, 0.02
    if schedule == "linear":
        return np.linspace(first, last, steps) * (1000 / steps)
    if schedule == "cosine-anneal":
        return last + 0.5 * (first - last) * (1 + np.cos(np.pi * i / (steps - 1)))
    curve = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - curve[1:] / curve[:-1], 0.999)  # Nichol & Dhariwal 2021


@cache
def abar_table(schedule: str) -> Tensor:
    """Return abar [T] in float64: abar[t] is left of the slice's variance at level t."""
    return torch.from_numpy(np.cumprod(1 - betas(schedule)))


def q_sample(x0: Tensor, eps: Tensor, t: Tensor, schedule: str = "linear") -> Tensor:
    """Return x_t: the slices x0 [B, 1, Y, X] with noise eps of the levels t [B]."""
    abar = abar_table(schedule)[t.cpu()].reshape(-1, 1, 1, 1)  # [B, 1, 1, 1]
    return abar.sqrt().to(x0) * x0 + (1 - abar).sqrt().to(x0) * eps  # eq. (2): (1) t + 1 times


def noise_loss(model: Any, x0: Tensor, eps: Tensor, t: Tensor, schedule: str) -> Tensor:
    """Return the mean over pixels of the squared error of the noise, fp32 [B]."""
    xt = q_sample(x0, eps, t, schedule)
    eps_theta = model(xt, t.to(x0.device, non_blocking=True)).float()
    return (eps - eps_theta).square().flatten(1).mean(dim=1)  # eq. (5)


def dice_loss(prob: Tensor, onehot: Tensor, kind: str, e: float = 1e-5) -> Tensor:
    """Return 1 - Dice of softmax and truth, both [B, C, Y, X], over the batch of all processes."""
    sums = [(prob * onehot).sum((0, 2, 3)), onehot.sum((0, 2, 3)), prob.sum((0, 2, 3))]
    both, true, pred = over_processes(torch.stack(sums))  # each [C]
    if kind != "joint":  # without background  # D4
        both, true, pred = both[1:], true[1:], pred[1:]
    if kind != "per-class":
        return 1 - (2 * both.sum() + e) / (true.sum() + pred.sum() + e)  # eq. (8)
    present = (true > 0).float()  # nothing overlaps with an organ that the batch does not show
    losses = 1 - (2 * both + e) / (true + pred + e)
    return (losses * present).sum() / present.sum().clamp(min=1)


def segmentation_loss(logits: Tensor, label: Tensor, kind: str, w: float = 0.5) -> Tensor:
    """Return the loss of logits [B, C, Y, X] and labels [B, Y, X], a scalar in fp32."""
    logits = logits.float()
    ce = F.cross_entropy(logits, label)  # eq. (7)
    onehot = F.one_hot(label, logits.shape[1]).movedim(3, 1).float()
    return w * ce + (1 - w) * dice_loss(logits.softmax(dim=1), onehot, kind)  # eq. (6)


# ==================================================================================================
# Data: slices, and which of them have labels
# ==================================================================================================

# `data` has cases of slices: data.depth(case), data.slice(case, k) [Y, X] fp32 in [-1, 1] as
# a screen shows it (front on top, the patient's right on the left), data.slice_label(case, k), and
# data.classes {name: value}. Preparation has padded scans to squares and made them smaller (D11).

Slice = tuple[str, int]  # case, index from the feet


def slices_of(data: Any, cases: Sequence[str]) -> list[Slice]:
    return [(case, k) for case in cases for k in range(data.depth(case))]


def stack(data: Any, slices: Sequence[Slice]) -> np.ndarray:
    """Return slices as [N, Y, X] fp32 in [-1, 1]."""
    return np.stack([data.slice(case, k) for case, k in slices])


def pretraining_cases(data: Any) -> list[str]:
    """Return the scans to pre-train on: the split pretrain, else unlabelled, else train."""
    splits = data.meta["splits"]
    cases = splits.get("pretrain") or splits.get("unlabelled") or splits["train"]
    if not cases:
        raise InputError(f"{data.name} has no scan to pre-train on; prepare some (--unlabelled)")
    return list(cases)


def watched_cases(data: Any) -> list[str]:
    """Return scans whose loss is watched: of validation, else unlabelled ones, none trained on."""
    splits, trained = data.meta["splits"], set(pretraining_cases(data))
    cases = splits.get("val") or splits.get("unlabelled", [])
    return [case for case in cases if case not in trained]


def label_count(text: str, total: int) -> int:
    """Return --labels as a number of slices: N, all, or x% of the total, rounded, at least 1."""
    if not re.fullmatch(r"all|[1-9]\d*|\d*\.?\d+%", text):
        raise InputError(f"--labels is {text}; expected a number, all, or a share such as 1%")
    if text.endswith("%"):
        return max(1, math.floor(float(text[:-1]) * total / 100 + 0.5))
    return total if text == "all" else int(text)


def pixel_counts(data: Any, slices: Sequence[Slice]) -> np.ndarray:
    """Return how many pixels each class has in each slice, [slices, classes]."""
    n = len(data.classes) + 1
    counts = [np.bincount(data.slice_label(*at).ravel(), minlength=n)[1:n] for at in slices]
    return np.array(counts).reshape(-1, n - 1)


def most_first(candidates: Sequence[int], shows: np.ndarray, size: int) -> list[int]:
    """Return `size` slices, each the one that shows most classes that those before do not."""
    order: list[int] = []
    seen = np.zeros(shows.shape[1], bool)
    while len(order) < size:
        left = [i for i in candidates if i not in order]
        order.append(max(left, key=lambda i: int((shows[i] & ~seen).sum())))
        seen = seen | shows[order[-1]]
    return order


def cover(counts: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Draw 4 slices that together show every class that any shows; counts: [slices, classes].

    Sets are tried until each class has 20 pixels in a slice of the set or, where none is found, 1
    pixel; else the slices are taken that show most.
    """
    wanted = counts.any(axis=0)
    size = min(4, len(counts))
    for least in (20, 1):
        shows = (counts >= least) & wanted  # [slices, classes]
        if (shows.any(axis=0) < wanted).any():
            continue
        for _ in range(100_000):
            chosen = rng.choice(len(counts), size, replace=False)
            if (shows[chosen].any(axis=0) == wanted).all():
                return most_first(chosen.tolist(), shows, size)
    return most_first(range(len(counts)), shows, size)


def labelled_slices(
    data: Any, labels: str, draw: int = 0, file: str = ""
) -> tuple[list[Slice], list[Slice]]:
    """Return the labelled slices to learn from, and all training slices with something drawn (D6).

    draw: the subset seed. Its order has first 4 that show every class, then a permutation of the
    rest: subsets are nested, and the same for all strategies. file: a list of them instead. Raises
    InputError for more labels than slices, and where no 4 slices show all classes.
    """
    cases = [case for case in data.cases("train") if data.has_label(case)]
    every = slices_of(data, cases)
    counts = pixel_counts(data, every)  # [slices, classes]
    drawn = [at for at, count in zip(every, counts) if count.any()]
    counts = counts[counts.any(axis=1)]
    if not drawn:
        raise InputError(f"{data.name}: nothing is drawn in its training cases; prepare labels")
    if file:
        with loaders.reading(file):
            listed = json.loads(Path(file).read_text(encoding="utf-8"))
            listed = listed["slices"] if isinstance(listed, dict) else listed
            slices = [(str(case), int(k)) for case, k in listed]
            foreign = [at for at in slices if at not in drawn]
            if foreign or not slices:
                text = f"{len(foreign)} of {len(slices)} slices, such as {foreign[:1]}, are none"
                raise InputError(f"{text} of a training case with something drawn; correct it")
        return slices, drawn
    n = label_count(labels, len(drawn))
    if n > len(drawn):
        raise InputError(f"--labels {labels}: {len(drawn)} training slices have something drawn")
    rng = np.random.default_rng(draw)
    first = cover(counts, rng)
    lacks = np.logical_and(counts.any(axis=0), ~counts[first].any(axis=0))
    if lacks.any() and n >= 4:
        names = ", ".join(name for i, name in enumerate(data.classes) if lacks[i])
        raise InputError(
            f"no 4 slices of {data.name} were found that show all organs, {names} would be left "
            "out; merge or drop organs, use more scans, or give your own --labels-file"
        )
    rest = rng.permutation([i for i in range(len(drawn)) if i not in set(first)])
    return [drawn[int(i)] for i in [*first, *rest][:n]], drawn


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, "order", epoch)).permutation(count)


@dataclass
class Slices(Dataset):
    """Training samples n = 0, 1, 2, ...: each is a function of (seed, n), and n never ends."""

    data: Any
    slices: list[Slice]
    labelled: bool = False
    flip: bool = False
    augmented: bool = False
    seed: int = 0

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Return the slice [1, Y, X], its label [Y, X] (0 without), t in 0..T-1, and n."""
        epoch, place = divmod(n, len(self.slices))
        at = self.slices[order_of(self.seed, epoch, len(self.slices))[place]]
        rng = np.random.default_rng(seed_of(self.seed, "sample", n))
        x0 = self.data.slice(*at)[None]
        label = np.zeros(x0.shape[1:], np.uint8)
        if self.labelled:
            label = self.data.slice_label(*at)
        t = int(rng.integers(0, T))  # uniform on 0..T-1
        if rng.random() < 0.5 and self.flip:
            x0 = np.ascontiguousarray(x0[..., ::-1])
        if self.augmented:
            x0, label = loaders.augment_image(rng, x0, label, colour=False)  # D14
        return x0, label, t, n


# ==================================================================================================
# Pre-train
# ==================================================================================================


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Return the rate of a step: it falls linearly to a tenth of lr, where it stays."""
    return lr * (1 - 0.9 * min(step / steps, 1.0))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + n) / (10 + n)) after n updates.

    A young average forgets its random start sooner.
    """
    d = min(decay, (1 + updates) / (10 + updates))  # D3
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def pretrain(config: Config, data: Any, ranks: Ranks) -> int:
    """Train the noise predictor. Returns 0, or 130 or 143 after a signal, with everything saved."""
    device = ranks.device
    dtype, reason = runtime.autocast_dtype(config.amp, device)
    cases, watched = pretraining_cases(data), watched_cases(data)
    record = loaders.data_record(data) | {"cases": {"train": cases, "val": watched}}
    slices = Slices(
        data,
        slices_of(data, cases),
        False,
        config.flip == "on",
        config.augment == "on",
        config.seed,
    )
    held = probe_slices(data, watched).to(device)

    # The network, its running average (what sampling and fine-tuning use), the optimiser.
    model = network_for(config, record, False).to(device)
    if config.init:
        load_weights(model, runtime.read_start(config.init, SCRIPT, ranks), config.init)
    share = config.batch // (ranks.world * config.accumulate)
    size = (share, len(data.channels), data.side, data.side)
    remedy = "try --accumulate, --recompute, or a smaller --num-channels"
    runtime.check_memory(model, size, dtype, device, True, remedy)
    model = unet.fast_layout(model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # The run folder. A checkpoint holds what is named here; the same command continues from it.
    columns = ["val_loss", *(f"val_loss_t{t}" for t in PROBES)]
    parts = ("model", "train", "pretrain")
    run = runtime.Run(config, SCRIPT, record, ranks, columns, parts)
    run.keep(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    step = run.resume()  # 0 for a new run
    differs = flags.departures(config, Config(), parts)
    run.print_header("DDPM pre-training (Huang et al. 2025)", data, model, step, reason, differs)
    say(f"  slices    {len(slices.slices)} of {len(cases)} scans; labels are not used", ranks)
    if len(held):
        say(
            f"  held out  {len(watched)} scans, whose loss chooses best.pt; the best guess from "
            f"single pixels has {yardstick(float(held.var()), config.schedule)}",
            ranks,
        )

    # All processes work on parts of one global batch, and DDP averages their gradients.
    runtime.same_weights(model, ranks, "at the start")
    net: Any = DistributedDataParallel(model) if ranks.world > 1 else model
    net = torch.compile(net) if config.compile else net
    net.train()
    loader = DataLoader(
        slices,
        batch_sampler=runtime.Shards(config.batch, config.accumulate, ranks, step, config.steps),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=runtime.ignore_signals,
    )
    batches = iter(loader)
    run.stopped()  # a resumed run may have used up its --minutes: sets run.time_up
    last = step == config.steps or run.time_up or 0 < config.patience <= run.stale

    while True:
        # Validate when it is due: the average, on the same held-out slices and noise each time.
        if (step % config.eval_every == 0 or last) and step > run.validated and len(held):
            run.save(step)  # best.pt alone could not be continued
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses = held_losses(ema, held, config.schedule)
            (value,) = ranks.max(float(np.mean(losses)))
            run.write_row(step, **dict(zip(columns, [value, *losses])))
            run.save_best(step, -value)  # D8
            say(f"step {step}: loss of held-out slices {value:.4f}", ranks)
            last = last or 0 < config.patience <= run.stale
        if last or run.signal:
            break

        begin = time.perf_counter()
        lr = learning_rate(step, config.lr_steps or config.steps, config.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # One global batch: the share of this process, in config.accumulate parts.
        for part in range(config.accumulate):
            x0, _, t, n = next(batches)  # [B, 1, Y, X], no labels, [B], [B]
            x0 = x0.to(device, non_blocking=True)
            eps = noise(config.seed, "noise", n.tolist(), x0.shape[1:], device)
            # Gradients are shared between the processes with the last part only.
            shared = ranks.world == 1 or part == config.accumulate - 1
            with nullcontext() if shared else net.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = noise_loss(net, x0, eps, t, config.schedule)  # [B]
                scaler.scale(loss.mean() / config.accumulate).backward()
            run.collect(loss, (t + 1) / T)  # for the log, by noise level

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
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
        figures.loss_curve(run.out / "log.csv", run.out / "loss.png", f"pre-training, {data.name}")
    return run.finish(step)  # the exit code


def probe_slices(data: Any, cases: Sequence[str]) -> Tensor:
    """Return 16 slices that are spread over these scans, [16, 1, Y, X]; [0] without scans."""
    every = slices_of(data, cases)
    if not every:
        return torch.zeros(0)
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, 16).round().astype(int)]
    return torch.from_numpy(stack(data, chosen))[:, None]


@torch.no_grad()
def held_losses(model: nn.Module, x0: Tensor, schedule: str) -> list[float]:
    """Return eq. (5) of slices at each of PROBES. When it rises, scans are being memorised."""
    eps = noise(0, "held", range(len(x0)), x0.shape[1:], torch.device("cpu")).to(x0)
    levels = [torch.full((len(x0),), t) for t in PROBES]
    return [float(noise_loss(model, x0, eps, t, schedule).mean()) for t in levels]


def yardstick(variance: float, schedule: str) -> str:
    """Return the loss of the best linear guess from each pixel alone, at PROBES.

    Above it nothing is learnt yet. variance: of the pixels.
    """
    abar = abar_table(schedule)[list(PROBES)]
    best = abar * variance / (abar * variance + 1 - abar)
    return ", ".join(f"{e:.3f} at t {t}" for e, t in zip(best.tolist(), PROBES))


def load_weights(net: unet.UNet, start: dict[str, Any], path: object) -> None:
    """Load a pre-trained network, the average where there is one; `out` only where net has one."""
    weights = start["ema"] or start["model"]
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if not len(net.out):
        weights = {name: v for name, v in weights.items() if not name.startswith("out.")}
    runtime.load_weights(net, weights, path)


# ==================================================================================================
# Sample
# ==================================================================================================


def timesteps(steps: int) -> list[int]:
    """Return S levels from T - 1 down to 0, evenly spaced, halves rounded to even; S = 1: T - 1."""
    return np.rint(np.linspace(T - 1, 0, steps)).astype(int).tolist()


@torch.no_grad()
def sample(f, x, times, noise_of, schedule="linear", eta=1.0) -> Tensor:
    """Return x_0 from x = x_{T-1} ~ N(0, I), [B, 1, Y, X], by steps along `times`, T - 1, ..., 0.

    f(x, t) is the network, t an int. noise_of(t): standard normal noise like x. eta 1 is DDPM with
    the variance of the posterior (the paper), 0 is DDIM.
    """
    abar = abar_table(schedule).tolist()
    for t, s in pairwise([*times, -1]):
        a = abar[t]
        before = abar[s] if s >= 0 else 1.0
        x0 = ((x - math.sqrt(1 - a) * f(x, t)) / math.sqrt(a)).clamp(-1, 1)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)  # again, from the clipped x0
        sigma = eta * math.sqrt((1 - before) / (1 - a) * (1 - a / before))  # eq. (3)
        # Without clipping, with eta 1 and from t to t - 1, this is eq. (4).
        x = math.sqrt(before) * x0 + math.sqrt(max(0.0, 1 - before - sigma**2)) * eps
        if sigma > 0:
            x = x + sigma * noise_of(t)
    return x


@dataclass(frozen=True)
class Network:
    """A trained network with what its use needs. record: of the data that it was trained on."""

    config: Config
    model: Any
    record: dict[str, Any]
    device: torch.device
    dtype: torch.dtype | None
    step: int

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model(x, t).float()

    def generate(self, numbers: Sequence[int]) -> np.ndarray:
        """Return new slices in [-1, 1], [N, Y, X]; each is a function of (seed, its number)."""
        config, side = self.config, self.record["slices"]["side"]

        def noise_of(t: int) -> Tensor:
            return noise(config.seed, f"sample {t}", numbers, (1, side, side), self.device)

        def f(x: Tensor, t: int) -> Tensor:
            return self(x, torch.full((len(x),), t, device=self.device))

        times = timesteps(config.sampling_steps)
        return (
            sample(f, noise_of(T), times, noise_of, config.schedule, config.eta)[:, 0].cpu().numpy()
        )

    def probabilities(self, slices: np.ndarray) -> np.ndarray:
        """Return the classes' probabilities [Z, C, Y, X] of slices [Z, Y, X] in [-1, 1]."""
        parts = []
        for i in range(0, len(slices), AT_ONCE):
            x = torch.from_numpy(np.ascontiguousarray(slices[i : i + AT_ONCE]))[:, None]
            parts.append(self(x.to(self.device)).softmax(dim=1).cpu().numpy())
        return np.concatenate(parts)

    def predict_array(self, image: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """Return the mask of one volume as integers [X, Y, Z], with the publisher's label values.

        image: [X, Y, Z] with the scanner's values, in RAS order; spacing: in mm.
        """
        scan = loaders.scan_of_array(image, spacing, self.record)
        return scan.mask(self.probabilities(scan.image))


def write_samples(network: Network, ranks: Ranks) -> int:
    """Write samples.npy, [N, Y, X] in HU (of MR in [-1, 1]), and a picture of them.

    Slices wait in a folder until all are there: after an interruption the same command makes the
    others. Its name stands for the weights and what else decides a sample.
    """
    config, out = network.config, network.config.run_folder
    weights = runtime.digest(network.model)
    key = seed_of(weights, config.seed, config.sampling_steps, str(config.eta))
    folder = out / f"samples-{key:x}"
    files = [folder / f"{n}.npy" for n in range(config.num_samples)]
    numbers = [n for n in range(config.num_samples) if not files[n].exists()]
    mine = numbers[ranks.rank :: ranks.world]
    begin = time.perf_counter()
    for i in tqdm(
        range(0, len(mine), AT_ONCE), "samples", leave=False, disable=config.quiet or None
    ):
        part = mine[i : i + AT_ONCE]
        for n, x in zip(part, network.generate(part)):
            atomic_write(files[n], partial(np.save, arr=x))
    ranks.barrier()
    if ranks.first:
        with loaders.reading(folder):
            x = np.stack([np.load(file, allow_pickle=False) for file in files])
        grid = {str(i): list(x[i : i + 8]) for i in range(0, min(len(x), 64), 8)}
        figures.montage(grid, [], out / "figures/samples.png", limits=(-1, 1))
        rule = network.record["normalisation"]
        if rule["kind"] == "hu":
            x = rule["low"] + (x + 1) / 2 * (rule["high"] - rule["low"])
        atomic_write(out / "samples.npy", partial(np.save, arr=x.astype(np.float32)))
        shutil.rmtree(folder)
        say(
            f"{len(x)} slices, {config.sampling_steps} steps, eta {config.eta:g}, weights of step "
            f"{network.step}, {time.perf_counter() - begin:.0f} s: {out}/samples.npy"
        )
    return 0


# ==================================================================================================
# Fine-tune
# ==================================================================================================


def finetune(config: Config, data: Any, ranks: Ranks, start: Any, steps: int = 0) -> int:
    """Train on a few labelled slices. Returns 0, or 130 or 143 after a signal, everything saved.

    start: the checkpoint of pre-training, of which only the config counts for random weights.
    """
    device = ranks.device
    dtype, reason = runtime.autocast_dtype(config.amp, device)
    slices, drawn = labelled_slices(data, config.labels, config.draw, config.labels_file)
    val_cases = [case for case in data.cases("val") if data.has_label(case)]
    if config.select == "val" and not val_cases:
        raise InputError(f"--select val: {data.name} has no labelled validation case")
    if config.accumulate > 1:
        raise InputError("--accumulate: Dice and batch norm need the whole batch; use --recompute")
    amount = 0 if len(slices) <= 4 else 1
    steps = steps or FINETUNE_STEPS[config.preset][2 if len(slices) == len(drawn) else amount]
    batch = min(config.batch, len(slices))
    config = runtime.share_batch(replace(config, steps=steps, batch=batch), {}, ranks)
    config = replace(config, out=str(config.finetune_folder), t=config.time)
    start = start if config.init not in ("", "none") else None
    record = loaders.data_record(data)
    record["cases"] = {"train": sorted({case for case, _ in slices}), "val": val_cases}
    record["start"] = start and {"step": start["step"], "made": start.get("made_by", {})}
    record["pretrained_on"] = start and start["data"]
    check_scale(record, data.place)

    # The network and the optimiser; what is frozen is not in it, else its decay would move it.
    model = network_for(config, record, True).to(device)
    if start:
        load_weights(model.net, start, config.init)
    size = (config.batch // ranks.world, len(data.channels), data.side, data.side)
    runtime.check_memory(model, size, dtype, device, True, "try --recompute or a smaller --batch")
    model = unet.fast_layout(model)
    rest = [p for p in model.net.parameters() if p.requires_grad]
    groups = [{"params": list(model.head.parameters()), "weight_decay": 1e-3, "times": 10}]  # D5
    groups += [{"params": rest, "weight_decay": 1e-4, "times": 1}] if rest else []
    optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # The run folder. A checkpoint holds what is named here; the same command continues from it.
    parts = ("model", "train", "finetune")
    run = runtime.Run(config, SCRIPT, record, ranks, ["val_dice"], parts)
    run.keep(model=model, ema=nn.Module(), optimizer=optimizer, scaler=scaler)  # D12: no average
    step = run.resume()  # 0 for a new run
    differs = flags.departures(config, Config(**FINETUNE["paper"]), parts)
    run.print_header("Fine-tuning (Huang et al. 2025)", data, model, step, reason, differs)
    shown = pixel_counts(data, slices).sum(axis=0)
    missed = [name for i, name in enumerate(data.classes) if not shown[i]]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(data.depth(case) for case in data.cases("train") if data.has_label(case))
    lines = [f"  method    {config.strategy}, {trained:,} parameters trained, Dice {config.dice}"]
    if config.strategy == "scratch":
        lines[0] += ", random weights; group norm, no averaged weights, no flips (D12)"
    else:
        lines[0] += f", t = {config.time}, start {config.init}"
    lines.append(
        f"  slices    {len(slices)} of {len(drawn)} on which something is drawn "
        f"({100 * len(slices) / len(drawn):.3g} %), of {every} labelled ones; draw {config.draw}"
    )
    if missed:
        lines.append(f"  warning   no such slice shows {', '.join(missed)}; it will not be learnt")
    if config.time == T and config.strategy != "scratch":
        lines.append(f"  note      t = {T} is one beyond the last trained level")
    say("\n".join(lines), ranks)
    if ranks.first:
        share = {"n": len(slices), "of": len(drawn), "percent": 100 * len(slices) / len(drawn)}
        text = json.dumps({**share, "slices": slices}, indent=1)
        atomic_write(run.out / "labels.json", text.encode())

    # All processes work on parts of one global batch, and DDP averages their gradients. Dice and
    # batch norm sum over the processes themselves.
    runtime.same_weights(model, ranks, "at the start")
    net: Any = DistributedDataParallel(model) if ranks.world > 1 else model
    net = torch.compile(net) if config.compile else net
    net.train()
    loader = DataLoader(
        Slices(data, slices, True, augmented=config.augment == "on", seed=config.seed),
        batch_sampler=runtime.Shards(config.batch, 1, ranks, step, config.steps),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=runtime.ignore_signals,
    )
    batches = iter(loader)
    run.stopped()  # a resumed run may have used up its --minutes: sets run.time_up
    last = step == config.steps or run.time_up or 0 < config.patience <= run.stale

    while True:
        # Validate when it is due and asked for: Dice of the validation cases.
        due = (step % config.eval_every == 0 or last) and step > run.validated
        if due and config.select == "val":
            run.save(step)  # best.pt alone could not be continued
            network = Network(config, model.eval(), record, device, dtype, step)
            rows = score_cases(network, data, val_cases, ranks, stopped=run.stopped)
            net.train()
            if rows is not None:
                dice = tables.summarise(rows)["mean"]["dice"]["mean"]
                run.write_row(step, val_dice=dice)
                run.save_best(step, dice)
                say(f"step {step}: validation Dice {dice:.3f}", ranks)
                last = last or 0 < config.patience <= run.stale
        if last or run.signal:
            break

        begin = time.perf_counter()
        lr = learning_rate(step, config.steps, config.lr)
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * lr  # the head learns ten times as fast

        x0, label, _, _ = next(batches)  # [B, 1, Y, X], [B, Y, X]
        x0 = x0.to(device, non_blocking=True)
        label = label.to(device, non_blocking=True).long()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = segmentation_loss(net(x0), label, config.dice)
        scaler.scale(loss).backward()
        run.collect(loss.expand(len(x0)))  # for the log

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        finite = bool(norm.isfinite())  # the same on all processes
        if finite:  # else the step changes nothing, and the scaler lowers its scale
            scaler.step(optimizer)
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
        figures.loss_curve(run.out / "log.csv", run.out / "loss.png", f"fine-tuning, {data.name}")
    return run.finish(step)  # the exit code


def check_scale(record: dict[str, Any], place: str) -> None:
    """Raise InputError where the labelled slices are not prepared as those of pre-training."""
    before = record["pretrained_on"] or record  # nobody knows the data of public weights
    for key in ("channels", "normalisation", "slices"):
        if before[key] != record[key]:
            text = f"{place}: {key} is {record[key]}, the network was pre-trained with"
            raise InputError(f"{text} {before[key]}; prepare both together (--unlabelled)")


# ==================================================================================================
# Evaluate
# ==================================================================================================


def score_cases(network, data, cases, ranks, out=None, stopped=None) -> list[dict] | None:
    """Segment and score cases, shared over the processes; None after a signal.

    Returns rows of metrics.csv. out: folder for masks and pictures, or None.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in ranks.share(cases, network.config.quiet, stopped):
        truth = np.asarray(data.label(case))
        prob = network.probabilities(stack(data, slices_of(data, [case])))  # [Z, C, Y, X]
        shown = prob.argmax(axis=1).astype(np.uint8).transpose(1, 2, 0)  # [Y, X, Z]
        mask = np.ascontiguousarray(loaders.from_display(shown))  # [X, Y, Z]
        rows[case] = metrics.evaluate_case(case, mask, truth, data.spacing(case), data.scored)
        if out is not None:
            loaders.save_case(out / "predictions", data, case, mask, {}, [], "masks")
        if out is not None and case in cases[:3]:
            image, masks = np.asarray(data.image(case)[0]), {"truth": truth, "prediction": mask}
            file = out / f"figures/{case}.png"
            figures.case(file, image, masks, data.spacing(case), data.classes, case)
    if stopped is not None and stopped():
        return None
    rows = ranks.merge(rows)
    return [row for case in cases for row in rows[case]]


def evaluate(network: Network, data: Any, ranks: Ranks, out: Path) -> int:
    """Score a split on the prepared grid: print the table, write metrics, masks and pictures."""
    config, record = network.config, network.record
    cases, seen = loaders.held_out(record, data, config.split, config.limit)
    begin = time.perf_counter()
    rows = score_cases(network, data, cases, ranks, out)
    if not ranks.first or rows is None:
        return 0
    say(
        f"\n{config.split} split of {data.name}{seen}, {len(cases)} cases, "
        f"{time.perf_counter() - begin:.0f} s\n{config.strategy}, {config.labels} labels, draw "
        f"{config.draw}, weights of step {network.step}\n\n{tables.report(out, rows)}"  # D7
    )
    if record["pretrained_on"]:
        saw = loaders.seen_cases(record["pretrained_on"], data, cases)
        say(f"note: pre-training saw {len(saw)} of these cases, without labels")
    say(f"\nmasks, pictures and tables are in {out}")
    return 0


# ==================================================================================================
# Predict
# ==================================================================================================


def predict(network: Network, ranks: Ranks) -> int:
    """Write masks for CT or MR volumes, on their own grid and with the publisher's label values."""
    for scan in runtime.scans(network.config, network.record, ranks):
        prob = network.probabilities(scan.image)  # [Z, C, Y, X]
        # Probabilities go back to the scan's own grid, linearly, and to its directions. There the
        # largest becomes the mask, with the label values of the data's publisher.
        mask = scan.mask(prob)
        maps = {}
        if network.config.save == "maps":
            maps = {name: scan.map(prob[:, value]) for name, value in scan.classes.items()}
        line = scan.save(mask, maps)
        say(line + (f"; probabilities in {scan.target.parent / 'maps'}" if maps else ""))
    return 0


# ==================================================================================================
# Command line
# ==================================================================================================

VERBS = {
    "": ("run", "model", "train", "pretrain", "speed", "finetune", "story", "evaluate"),
    "pretrain": ("run", "model", "train", "pretrain", "speed"),
    "sample": ("run", "use", "sample"),
    "finetune": ("run", "model", "train", "speed", "finetune", "evaluate"),
    "evaluate": ("run", "use", "evaluate"),
    "predict": ("run", "use", "predict"),
}


def start_of(config: Config, ranks: Ranks) -> tuple[Path, Any]:
    """Return the file of the pre-trained network, and what it holds; None where none is needed.

    scratch and --init none take the shape of their network from it, where it is there.
    """
    init = "" if config.init == "none" else config.init
    path = runtime.checkpoint_file(init, config.run_folder)
    if not path.exists() and (config.init == "none" or config.strategy == "scratch"):
        return path, None
    start = runtime.read_start(path, SCRIPT, ranks)
    if "start" in (start["data"] or {}):
        raise InputError(f"{path} is a fine-tuned network; name a pre-trained one by --init")
    return path, start


def for_finetuning(given: dict[str, Any], path: Path, start: Any) -> Config:
    """Return the config of fine-tuning: the network of pre-training, the preset's rates, flags."""
    saved = start["config"] if start else {}
    same = {name: saved[name] for name in ("preset", "data") if name in saved}
    config = flags.configure(Config, FINETUNE, {**same, **given})
    for name in (name for name in flags.names(Config, "model") if name in saved):
        if given.get(name, saved[name]) != saved[name]:
            text = f"{flags.word(name)} is {flags.text(given[name])}, {path} was pre-trained with"
            raise InputError(f"{text} {flags.text(saved[name])}; leave the flag out")
        config = replace(config, **{name: saved[name]})
    if not start and config.variant == "L" and "num_channels" not in given:
        config = replace(config, num_channels=256)
    if (config.variant == "L") != (config.num_channels >= 256):
        text = f"--variant {config.variant} is no network with {config.num_channels} channels"
        raise InputError(f"{text}; L has 256 or more, S and M have fewer")
    init = str(path) if start else ""
    init = {"scratch": ""}.get(config.strategy, "none" if config.init == "none" else init)
    return replace(config, init=init, out=config.out or str(path.parent))


def tune_and_score(
    config: Config, given: dict[str, Any], data: Any, ranks: Ranks, start: Any, steps: int
) -> int:
    """Fine-tune, then score, unless that is done already."""
    loaders.cases_to_score(data, config.split, config.limit)  # fail now, not after the training
    code = finetune(config, data, ranks, start, steps)
    folder = str(config.finetune_folder)
    scored = replace(config, out=folder)
    if code or runtime.is_scored(scored, {}, ranks):
        return code
    names = flags.names(Config, "run", "evaluate")
    use = {name: given[name] for name in names if name in given}
    network = load_network({**use, "checkpoint": folder, "out": folder}, ranks)
    return evaluate(network, data, ranks, runtime.scores_folder(scored))


def finetuned(config: Config) -> str:
    """Return --checkpoint, or the only fine-tuned network of the run."""
    folders = sorted(file.parent for file in config.run_folder.glob("finetune-*/last.pt"))
    if config.checkpoint or len(folders) == 1:
        return config.checkpoint or str(folders[0])
    names = ", ".join(folder.name for folder in folders) or "none"
    text = f"{config.run_folder} holds {len(folders)} fine-tuned networks ({names})"
    raise InputError(f"{text}; run finetune, or name one by --checkpoint")


def load_network(given: dict[str, Any], ranks: Ranks, segments: bool = True) -> Network:
    """Return the network that the flags name: a fine-tuned one, or a noise predictor."""
    if segments and "checkpoint" not in given:  # then --out says where it is
        path = finetuned(flags.configure(Config, PRESETS, given))
        given = {**given, "checkpoint": path, "out": path}
    config, state = runtime.load_trained(Config, PRESETS, given, SCRIPT, ranks)
    if segments != ("start" in state["data"]):
        kind = (
            "pre-trained; run finetune first" if segments else "fine-tuned; name a pre-trained one"
        )
        raise InputError(f"{config.checkpoint or config.run_folder} is {kind}")
    if segments:
        saved = state["config"]
        tuned = {name: saved[name] for name in flags.names(Config, "finetune")}
        config = replace(config, init=saved["init"], **tuned)
    model = network_for(config, state["data"], segments)
    model.load_state_dict(state["ema"] or state["model"])
    model = unet.fast_layout(model.to(ranks.device)).eval().requires_grad_(False)
    dtype, _ = runtime.autocast_dtype(config.amp, ranks.device)
    return Network(config, model, state["data"], ranks.device, dtype, state["step"])


def load(path: str, device: str = "auto") -> Network:
    """Return the fine-tuned network of a checkpoint, for its predict_array."""
    return load_network({"checkpoint": str(path), "quiet": True}, runtime.start(device))


def story(config: Config, given: dict[str, Any], data: Any, ranks: Ranks) -> int:
    """Pre-train, then fine-tune with and without what was learnt, on the same slices."""
    cases = loaders.cases_to_score(data, config.split, config.limit)
    slices, _ = labelled_slices(data, config.labels, config.draw, config.labels_file)
    rows: list[dict[str, Any]] = [{"strategy": "scratch"}, {}, {"init": "none"}]
    total = 1 + len(rows)
    names = [*flags.names(Config, "run", "finetune", "evaluate"), "seed", "augment"]
    kept = {name: given[name] for name in names if name in given and name != "init"}

    size = (AT_ONCE, len(data.channels), data.side, data.side)
    model = network_for(config, loaders.data_record(data), False)
    seconds = runtime.pass_seconds(model, size, ranks.device) / AT_ONCE  # of one slice
    steps = config.finetune_steps or FINETUNE_STEPS[config.preset][len(slices) > 4]
    passes = 3 * config.steps * config.batch / ranks.world
    passes += len(rows) * (3 * steps * 4 + sum(data.depth(case) for case in cases))
    say(f"{total} trainings and scores, about {runtime.duration(seconds * passes)} in all", ranks)

    say(f"\n1 of {total}: pre-training, {config.steps} steps", ranks)
    code = pretrain(config, data, ranks)
    if code:
        return code
    path = runtime.checkpoint_file("", config.run_folder)
    start = runtime.read_start(path, SCRIPT, ranks)
    dices = []
    for number, row in enumerate(rows, 2):
        tuned = for_finetuning({**kept, **row}, path, start)
        name = tuned.strategy + (", random start" if tuned.init == "none" else "")
        say(f"\n{number} of {total}: fine-tuning, {name}", ranks)
        code = tune_and_score(tuned, kept, data, ranks, start, config.finetune_steps)
        if code:
            return code
        scores = runtime.scores_folder(replace(tuned, out=str(tuned.finetune_folder)))
        dice = tables.read_summary(scores / "summary.json")["mean"]["dice"]["mean"]
        dices.append(f"{name} {dice:.3f}")
    say(f"\nmean Dice after the same {len(slices)} slices: {', '.join(dices)}", ranks)
    return 0


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n\n")[0]
    presets = FINETUNE if list(argv[:1]) == ["finetune"] else PRESETS
    verb, given = flags.parse(Config, argv, VERBS, presets, about)
    ranks = runtime.start(given.get("device", "auto"))
    if verb == "predict":
        return predict(load_network(given, ranks), ranks)
    if verb == "sample":
        return write_samples(load_network(given, ranks, segments=False), ranks)
    if verb == "evaluate":
        network = load_network(given, ranks)
        data = loaders.open_data(network.config.data, "slices")
        other = data.name if data.name != network.record["name"] else ""
        return evaluate(network, data, ranks, runtime.scores_folder(network.config, other))

    config = flags.configure(Config, presets, given)
    if verb == "finetune":
        path, start = start_of(config, ranks)
        config = for_finetuning(given, path, start)
        data = loaders.open_data(config.data, "slices")
        return tune_and_score(config, given, data, ranks, start, given.get("steps", 0))
    config = runtime.share_batch(config, given, ranks)
    data = loaders.open_data(config.data, "slices")
    if verb == "pretrain":
        return pretrain(config, data, ranks)
    return story(config, given, data, ranks)


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
