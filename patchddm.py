"""PatchDDM: train a 3D diffusion model on patches, sample the whole volume at once.

Paper
    F. Bieder, J. Wolleb, A. Durrer, R. Sandkühler, P. C. Cattin: Memory-Efficient 3D Denoising
    Diffusion Models for Medical Image Processing. MIDL 2023.

Idea
    A diffusion model makes a segmentation mask out of noise; it sees the image as extra input
    channels. A 3D U-Net with attention and concatenated skips does not fit a GPU at full
    resolution. So (1) the attention goes, (2) skips are averaged instead of concatenated, (3) the
    training sees random patches, an eighth of the volume, with three channels that say where in
    the volume each voxel lies, and (4) sampling runs on the whole volume at once: no tiles, no
    seams. Different noise gives different masks. Their mean is the result, and their variance says
    where the model is unsure.

Symbols
    x_0        x0    [B, K', *P]     mask in {0, 1}: K' = 1 channel, or one per class and background
    x_t        xt    [B, K', *P]     mask with noise, t = 1..T; t = 0 is the mask itself
    eps        eps   [B, K', *P]     standard normal noise
    b          cond  [B, C + 3, *P]  image in [-1, 1], then the coordinates x, y, z in [-1, 1]
    abar_t     ABAR[t]               product of 1 - beta_s for s = 1..t; ABAR[0] = 1
    eps_theta  model([cond, xt], t - 1)   the network; it is fed 0..T-1, as in the public code
    P is the patch (X, Y, Z) in training and the whole padded volume in sampling.

Equations
    (1) q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    (2) q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    (3) p(x_{t-1} | x_t) = N(mu_theta, Sigma_theta)
    (4) L = || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2
    (5) x_{t-1} = sqrt(abar_{t-1}) (x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t)
                  + sqrt(1 - abar_{t-1}) eps_theta

Differs
    D1  beta rises from 1e-4 (t = 1) to 0.02 (t = T). The paper prints the two ends exchanged.
    D2  S steps visit t = T, T - T/S, ..., T/S and end at 0. The public code ends at t = 1, which
        leaves noise of SD 0.01 in the result.
    D3  The noise of a step is computed again from the clipped x0, as in the public code.
    D4  With several classes the mask has a channel for each and one for the background, and the
        largest wins. The paper has one class.
    D5  The noise of a sample is a function of (seed, case, member). The public code starts every
        case from the same noise.
    D6  All presets but paper predict x_0. In eq. (4) an error of the mask weighs abar / (1 - abar):
        0.66 at t = 300, but 0.0003 at t = 900. Sampling decides the mask at large t, so a network
        that predicts eps learns last what matters most.
    D7  The other presets have a larger learning rate that warms up and falls, averaged weights and
        gradient clipping. The paper has a constant 1e-5 for 4.45 million steps.
    D8  Probabilities, not masks, go back to the scan's own grid, and become a mask there. The
        public code writes the padded grid without its geometry.
    D9  The network sees images in [-1, 1], as in the public code; the paper says [0, 1].
    D10 --method half: the result is enlarged and scored at full size, in the public code at half.
    D11 tiny and laptop have fewer levels and channels.

Usage
    python patchddm.py                                     train, sample and score on phantoms
    python -m data_prep.msd --src Task04_Hippocampus --dst data/hippocampus
    python patchddm.py train --data hippocampus
    python patchddm.py evaluate --data hippocampus --ensemble 5
    python patchddm.py predict --data hippocampus --image scan.nii.gz --output mask.nii.gz
    torchrun --nproc_per_node=4 patchddm.py --data brats --preset paper    the paper's setting
    python -m results.patchddm_grid --data hippocampus     figure 5
    python -m results.patchddm_profile                     table 1
    python -m results.patchddm_generate                    the outlook: images out of nothing

Expect
    The default run takes about four minutes on two cores of a server CPU. It prints Dice and HD95
    of ten unseen phantoms: mean Dice 0.87 to 0.90, where the best threshold of the intensity
    reaches 0.16.
"""

import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import InputError, figures, flags, loaders, metrics, runtime, tables, unet
from common.flags import flag
from common.runtime import Ranks, noise, say, seed_of

SCRIPT = "patchddm"
T = 1000  # diffusion steps; t = 1..T in this file, but the network is fed the index t - 1
ENSEMBLES = (1, 3, 5, 7, 15)  # sizes that are scored on the way to --ensemble (table 3)

# ==================================================================================================
# Config
# ==================================================================================================


@dataclass(frozen=True)
class Config(flags.RunFlags):
    """The flags of the method; flags.RunFlags has those of every script, such as --data.

    flag(default, help, part, smallest, largest). The defaults are the paper's (--preset paper);
    sections and tables are the paper's, too.
    """

    script = SCRIPT
    # section 2.2
    num_channels: int = flag(29, "width of the first level", "model", 1)
    channel_mult: tuple[int, ...] = flag((1, 3, 4, 4, 4, 4, 4), "widths of the levels", "model", 1)
    num_res_blocks: int = flag(2, "residual blocks of a level", "model", 1)
    num_groups: int = flag(29, "groups of a norm", "start", 1)
    skips: Literal["average", "concat"] = flag("average", "how a skip meets the decoder", "model")
    # section 2.3, and the baselines of section 3
    method: Literal["patch", "full", "half"] = flag("patch", "full, half: whole volumes", "model")
    patch: tuple[int, ...] = flag((128,), "voxels of a patch, N or N,N,N", "model", 1)
    coords: Literal["auto", "on", "off"] = flag("auto", "coordinates; auto: of patches", "model")
    # section 2.1
    target: Literal["eps", "x0"] = flag("eps", "what the network predicts", "model")
    # section 3
    seed: int = flag(0, "of weights, order, patches and noise", "train", 0)
    batch: int = flag(1, "samples of a step, over all processes", "train", 1)
    lr: float = flag(1e-5, "learning rate", "train", 1e-12, 1)
    lr_schedule: Literal["constant", "cosine"] = flag("constant", "cosine has a warm-up", "train")
    ema: float = flag(0.0, "decay of the averaged weights; 0: off", "train", 0, 0.999999)
    grad_clip: float = flag(0.0, "largest gradient norm; 0: off", "train", 0)
    steps: int = flag(4_450_000, "optimisation steps", "speed", 1)
    eval_every: int = flag(50_000, "steps between validations", "speed", 1)
    save_every: int = flag(1000, "steps between saves", "speed", 1)
    # sections 2.4 and 4.3
    sampling_steps: int = flag(20, "steps S of a sample (table 2: 1000)", "use", 1, T)
    eta: float = flag(0.0, "noise of a step: 0 DDIM (paper), 1 DDPM", "use", 0, 1)
    heun: bool = flag(False, "second-order steps, 2 S - 1 evaluations", "use")
    ensemble: int = flag(1, "members: samples from different noise", "use", 1)
    save: Literal["masks", "maps", "all"] = flag("masks", "maps: means too; all: members", "use")

    @property
    def patch_size(self) -> tuple[int, ...]:
        return self.patch * 3 if len(self.patch) == 1 else self.patch

    @property
    def with_coords(self) -> bool:
        return self.coords == "on" or (self.coords == "auto" and self.method == "patch")

    @property
    def half(self) -> bool:
        return self.method == "half"

    @property
    def multiple(self) -> int:
        """The sides of a volume are multiples of this: each level halves it, --method half, too."""
        return 2 ** (len(self.channel_mult) - 1 + self.half)

    def __post_init__(self) -> None:
        """Check the ranges, then the rules between flags. Raises InputError that names the flag."""
        flags.check_ranges(self)
        if len(self.patch) not in (1, 3):
            raise InputError(f"--patch is {self.patch}; expected N or N,N,N")
        step = 2 ** (len(self.channel_mult) - 1)
        if self.method == "patch" and any(n % step for n in self.patch):
            raise InputError(
                f"--patch {self.patch_size} cannot be halved {len(self.channel_mult) - 1} times; "
                f"use multiples of {step}, or fewer levels in --channel-mult"
            )
        if self.num_channels % self.num_groups:  # the other widths are multiples
            text = f"--num-groups {self.num_groups} does not divide --num-channels"
            raise InputError(f"{text} {self.num_channels}; choose a divisor")
        if self.heun and self.eta:
            raise InputError("--heun follows the equation without noise; use --eta 0")
        if self.skips == "concat" and self.channel_mult[0] != 1:
            raise InputError("--skips concat needs --channel-mult to begin with 1")


# fmt: off
SMALL: dict[str, Any] = {
    "target": "x0", "lr_schedule": "cosine", "grad_clip": 1.0,  # D6, D7
    "num_channels": 16, "channel_mult": (1, 2, 4), "num_res_blocks": 1, "num_groups": 8,  # D11
    "patch": (32,), "batch": 4, "workers": 0, "sampling_steps": 10,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": SMALL | {"lr": 2e-3, "ema": 0.99, "steps": 900, "eval_every": 300, "save_every": 100},
    "laptop": SMALL | {"lr": 1e-3, "ema": 0.999, "steps": 9000, "eval_every": 1500,
                       "save_every": 300},
    # The paper's network in one night on a GPU of 24 GB, by arithmetic: nobody has run it yet.
    "gpu": {"target": "x0", "lr_schedule": "cosine", "grad_clip": 1.0, "lr": 2e-4, "ema": 0.999,
            "batch": 2, "steps": 60_000, "eval_every": 10_000, "save_every": 500},
    "paper": {},
}
# fmt: on

# ==================================================================================================
# Model
# ==================================================================================================


class UNet(nn.Module):
    """The 3D U-Net of section 2.2: residual blocks, no attention, averaged skips.

    Called as model(x, index): x [B, C_in, X, Y, Z] with sides that are multiples of
    2^(levels - 1); index [B] is t - 1. Returns [B, C_out, X, Y, Z]. Parameter names are the public
    code's. In a ResBlock a linear layer of the embedded time is added between its two convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 29,
        mult: Sequence[int] = (1, 3, 4, 4, 4, 4, 4),
        num_res_blocks: int = 2,
        groups: int = 29,
        average: bool = True,
        recompute: bool = False,
    ):
        super().__init__()
        self.in_channels, self.width = in_channels, width
        self.average, self.recompute = average, recompute
        emb = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        # Encoder. The output of each block is a skip, also of the first convolution and the Downs.
        self.input_blocks = nn.ModuleList([unet.EmbedSequential(unet.conv(3, in_channels, width))])
        skips, c = [width], width  # channels
        for level, m in enumerate(mult):
            for _ in range(num_res_blocks):
                self.input_blocks.append(
                    unet.EmbedSequential(unet.ResBlock(3, c, width * m, emb, groups))
                )
                c = width * m
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(unet.EmbedSequential(unet.Downsample(3, c)))
                skips.append(c)
        self.middle_block = unet.EmbedSequential(
            unet.ResBlock(3, c, c, emb, groups), unet.ResBlock(3, c, c, emb, groups)
        )

        # Decoder. What is averaged must be as wide as the skip that it meets, so a block comes out
        # as wide as the next skip. A block that concatenates has its own level's width.
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(num_res_blocks + 1):
                skip = skips.pop()
                c_in, c_out = c + skip, width * m
                if average:
                    c_in, c_out = c, skips[-1] if skips else width
                layers: list[nn.Module] = [unet.ResBlock(3, c_in, c_out, emb, groups)]
                if level > 0 and i == num_res_blocks:
                    layers.append(unet.Upsample(3, c_out))
                self.output_blocks.append(unet.EmbedSequential(*layers))
                c = c_out
        head = unet.zero_module(unet.conv(3, width, out_channels))
        self.out = nn.Sequential(unet.GroupNorm(groups, width), nn.SiLU(), head)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        lean = not torch.is_grad_enabled()
        emb = self.time_embed(unet.timestep_embedding(index, self.width))  # [B, 4 width]
        image = x
        skips: list[Tensor | None] = []
        for block in self.input_blocks:
            x = unet.run(block, x, emb, self.recompute)  # [B, c, X / 2^level, ...]
            skips.append(x)
        if lean:
            skips[0] = None  # the widest, and the cheapest to compute again
        x = unet.run(self.middle_block, x, emb, self.recompute)
        for block in self.output_blocks:
            skip = skips.pop()
            if skip is None:
                skip = self.input_blocks[0](image)
            if self.average:
                x = unet.plus(x, skip)
                x = x.mul_(0.5) if lean else x / 2
            else:
                x = torch.cat([x, skip], dim=1)
            del skip  # or it lives until the block has ended
            x = unet.run(block, x, emb, self.recompute)
        norm, _, head = self.out
        return head(F.silu(norm(x), inplace=lean))  # [B, C_out, X, Y, Z]


def build_model(config: Config, in_channels: int, out_channels: int) -> UNet:
    """Return the network; in_channels: of image, coordinates and mask, in this order."""
    return UNet(
        in_channels, out_channels, config.num_channels, config.channel_mult,
        config.num_res_blocks, config.num_groups, config.skips == "average", config.recompute,
    )  # fmt: skip


# ==================================================================================================
# Diffusion: schedule, q, loss
# ==================================================================================================

BETA = np.linspace(1e-4, 0.02, T)  # beta_t for t = 1..T  # D1
ABAR = np.concatenate([[1.0], np.cumprod(1 - BETA)])  # float64 [T + 1], t = 0..T


def q_sample(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t: the mask x0 [B, K', *P] with noise eps of the level t [B] in 1..T."""
    abar = torch.from_numpy(ABAR)[t.cpu()].reshape(-1, *(1,) * (x0.ndim - 1))  # [B, 1, ...]
    a = abar.sqrt().to(x0)
    b = (1 - abar).sqrt().to(x0)
    return a * x0 + b * eps  # eq. (2), which is eq. (1) applied t times


def diffusion_loss(model, target, cond, x0, t, eps) -> Tensor:
    """Return the mean over voxels and channels of (target - output)^2, fp32 [B].

    model(x, t - 1) predicts the target, "eps" or "x0". cond [B, C + 3, *P], x0 and eps [B, K', *P],
    t [B] in 1..T.
    """
    xt = q_sample(x0, eps, t)
    index = (t - 1).to(x0.device, non_blocking=True)
    output = model(torch.cat([cond, xt], dim=1), index).float()  # [B, K', *P]
    truth = {"eps": eps, "x0": x0}[target]  # D6
    return (truth - output).square().flatten(1).mean(dim=1)  # eq. (4)


def mask_to_x0(label: Tensor, channels: int) -> Tensor:
    """Turn labels [B, X, Y, Z] into x0 [B, K', X, Y, Z] in {0, 1}, fp32."""
    if channels == 1:
        return (label > 0).float()[:, None]
    return F.one_hot(label.long(), channels).movedim(-1, 1).float()  # D4


def x0_to_mask(x0: Tensor) -> Tensor:
    """Turn x0 [K', X, Y, Z] into labels uint8: above 0.5, or the largest channel."""
    if len(x0) == 1:
        return (x0[0] > 0.5).to(torch.uint8)
    return x0.argmax(dim=0).to(torch.uint8)  # of equals the lower one  # D4


# ==================================================================================================
# Data: patches and their coordinates
# ==================================================================================================


def padded_shape(shape: Sequence[int], multiple: int, least: Sequence[int]) -> tuple[int, ...]:
    """Return the grid for a volume: at least `least`, each side a multiple of `multiple`."""
    return tuple(math.ceil(max(n, m) / multiple) * multiple for n, m in zip(shape, least))


def draw_start(rng: np.random.Generator, size: int, patch: int) -> int:
    """Draw the first voxel of a patch on one axis, 0..size - patch; the centre is favoured.

    The sum of two uniform numbers has the trapezoid of appendix A and figure 6 as its density.
    """
    z = rng.uniform(-1 / 3, 1 / 3) + rng.uniform(-2 / 3, 2 / 3)  # in [-1, 1]
    return math.floor((z + 1) / 2 * (size - patch) + 0.5)


def coordinates(full: Sequence[int], start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Return [3, *size] fp32: where each voxel lies in the padded volume, from -1 to 1.

    They are made for the whole volume and cut with the patch, so a patch knows its place.
    """
    out = np.empty((3, *size), np.float32)
    for axis in range(3):
        line = np.zeros(1)
        if full[axis] > 1:
            line = np.linspace(-1, 1, full[axis])[start[axis] : start[axis] + size[axis]]
        shape = [1, 1, 1]
        shape[axis] = size[axis]
        out[axis] = line.reshape(shape)  # [n, 1, 1], [1, n, 1] or [1, 1, n]
    return out


def condition(image, full, start, size, coords=True) -> np.ndarray:
    """Return the condition b of one patch, [C (+ 3), *size] fp32.

    image: [C, X, Y, Z] in [0, 1], padded with background on both sides to `full`. It may lie on the
    disk; only the patch is read. The whole volume is the patch with start 0 and size `full`.
    """
    front = loaders.symmetric_pad(image.shape[1:], full)
    corner = [s - f for s, f in zip(start, front)]
    window = loaders.read_window(image, corner, size).astype(np.float32)  # [C, *size]
    window *= 2
    window -= 1  # D9
    if not coords:
        return window
    return np.concatenate([window, coordinates(full, start, size)])


@dataclass
class Patches(Dataset):
    """Training samples n = 0, 1, 2, ...: each is a function of (seed, n), and n never ends."""

    data: Any  # gives image(case) [C, X, Y, Z] in [0, 1] and label(case) [X, Y, Z]
    cases: list[str]
    patch: tuple[int, ...] | None  # None: whole volumes
    least: tuple[int, ...]  # size of the padded volume, at least
    multiple: int = 1  # of which its sides are multiples
    coords: bool = True
    half: bool = False  # every second voxel
    seed: int = 0

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Return the condition [C (+ 3), *P], the label [*P], t in 1..T, and n."""
        epoch, place = divmod(n, len(self.cases))
        order = np.random.default_rng(seed_of(self.seed, "order", epoch))
        case = self.cases[order.permutation(len(self.cases))[place]]
        rng = np.random.default_rng(seed_of(self.seed, "patch", n))

        image, label = self.data.image(case), self.data.label(case)
        full = padded_shape(label.shape, self.multiple, self.least)
        size = self.patch or full
        start = [draw_start(rng, d, p) for d, p in zip(full, size)]
        cond = condition(image, full, start, size, self.coords)
        front = loaders.symmetric_pad(label.shape, full)
        label = loaders.read_window(label, [s - f for s, f in zip(start, front)], size)
        if self.half:
            cond = np.ascontiguousarray(cond[:, ::2, ::2, ::2])
            label = np.ascontiguousarray(label[::2, ::2, ::2])
        t = int(rng.integers(1, T + 1))  # uniform on 1..T
        return cond, label, t, n


# ==================================================================================================
# Train
# ==================================================================================================


def learning_rate(step: int, steps: int, lr: float, schedule: str) -> float:
    """Return a constant (paper), or a warm-up over 2 % of the steps and a half cosine to zero."""
    if schedule == "constant":
        return lr
    warm = max(1, steps // 50)
    done = max(0.0, (step - warm) / max(1, steps - warm))
    return lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * done)))  # D7


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + n) / (10 + n)) after n updates.

    A young average forgets its random start sooner.
    """
    d = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def train(config: Config, data: Any, ranks: Ranks) -> int:
    """Train the network. Returns 0, or 130 or 143 after a signal, with everything saved."""
    device = ranks.device
    dtype, reason = runtime.autocast_dtype(config.amp, device)
    record = loaders.data_record(data)
    cases = loaders.cases_to_score(data, "train")
    record["least"] = least_grid(config, record, [data.shape(case) for case in cases])
    patches = Patches(
        data, cases, config.patch_size if config.method == "patch" else None,
        tuple(record["least"]), config.multiple, config.with_coords, config.half, config.seed,
    )  # fmt: skip
    val_cases = [case for case in data.cases("val") if data.has_label(case)]

    # The network, its running average (what validation, evaluate and predict use), the optimiser.
    torch.manual_seed(seed_of(config.seed, "weights") % 2**32)
    model = network_for(config, record).to(device)
    if config.init:
        runtime.load_start(config.init, SCRIPT, model)
    share = config.batch // (ranks.world * config.accumulate)
    size = (share, model.in_channels, *patches[0][1].shape)
    remedy = "try --accumulate, --recompute, or a smaller --patch or --num-channels"
    runtime.check_memory(model, size, dtype, device, True, remedy)
    model = unet.fast_layout(model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # The run folder. A checkpoint holds what is named here; the same command continues from it.
    columns = ["val_dice", *(f"val_dice_{name}" for name in data.scored)]
    run = runtime.Run(config, SCRIPT, record, ranks, columns)
    run.keep(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    step = run.resume()  # 0 for a new run
    differs = flags.departures(config, Config())
    run.print_header("PatchDDM (Bieder et al. 2023)", data, model, step, reason, differs)

    # All processes work on parts of one global batch, and DDP averages their gradients.
    runtime.same_weights(model, ranks, "at the start")
    net: Any = DistributedDataParallel(model) if ranks.world > 1 else model
    net = torch.compile(net) if config.compile else net
    net.train()
    loader = DataLoader(
        patches,
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
                run.save_best(step, dice[0])
                say(f"step {step}: validation Dice {dice[0]:.3f}", ranks)
        if last or run.signal:
            break

        begin = time.perf_counter()
        lr = learning_rate(step, config.steps, config.lr, config.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # One global batch: the share of this process, in config.accumulate parts.
        for part in range(config.accumulate):
            cond, label, t, n = next(batches)  # [B, C + 3, *P], [B, *P], [B], [B]
            cond = cond.to(device, non_blocking=True)
            x0 = mask_to_x0(label.to(device, non_blocking=True), mask_channels(record))
            eps = noise(config.seed, "noise", n.tolist(), x0.shape[1:], device)
            # Gradients are shared between the processes with the last part only.
            shared = ranks.world == 1 or part == config.accumulate - 1
            with nullcontext() if shared else net.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = diffusion_loss(net, config.target, cond, x0, t, eps)  # [B]
                scaler.scale(loss.mean() / config.accumulate).backward()
            run.collect(loss, t / T)  # for the log, by noise level

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
        figures.loss_curve(run.out / "log.csv", run.out / "loss.png", f"PatchDDM, {data.name}")
    return run.finish(step)  # the exit code


def mask_channels(record: dict[str, Any]) -> int:
    """Return K': 1 for one class, else one a class and one for the background, which is first."""
    classes = len(record["classes"])
    return 1 if classes == 1 else classes + 1  # D4


def network_for(config: Config, record: dict[str, Any]) -> UNet:
    """Return the network for the data that a checkpoint's record describes."""
    k = mask_channels(record)
    return build_model(config, len(record["channels"]) + 3 * config.with_coords + k, k)


def least_grid(config: Config, record: dict[str, Any], shapes: Sequence) -> list[int]:
    """Return the least size of a padded volume: the data's own grid, else what the method needs."""
    if record.get("grid"):
        return list(record["grid"])
    if config.method == "patch":
        return list(config.patch_size)
    return [max(sides) for sides in zip(*shapes)]  # whole volumes share a batch


# ==================================================================================================
# Sample
# ==================================================================================================


def double(x: Tensor) -> Tensor:
    """Enlarge [K', X, Y, Z] twice, linearly; coarse voxel k is fine voxel 2 k."""  # D10
    for axis in (1, 2, 3):
        last = x.shape[axis] - 1
        following = torch.cat([x.narrow(axis, 1, last), x.narrow(axis, last, 1)], dim=axis)
        x = torch.stack([x, (x + following) / 2], dim=axis + 1).flatten(axis, axis + 1)
    return x


def timesteps(steps: int) -> list[int]:
    """Return S + 1 times from T down to 0, evenly spaced and rounded half up."""
    return [(T * i + steps // 2) // steps for i in range(steps, -1, -1)]  # D2


@torch.no_grad()
def sample(f, x, times, target="eps", eta=0.0, heun=False, generator=None, watch=None) -> Tensor:
    """Return x_0 from x = x_T ~ N(0, I) of any shape, by steps along `times`, T, ..., 0.

    f(x, t) is the network with its condition; t is an int in 1..T. eta 0 is DDIM (the paper), 1 is
    DDPM. heun: the mean of the slopes at both ends of a step (the paper's outlook; Karras et al.
    2022). generator: of the noise of a step, on the CPU. watch: is shown t, x_t and x_0.
    """
    a = np.sqrt(ABAR).tolist()  # signal, [T + 1]
    b = np.sqrt(1 - ABAR).tolist()  # noise

    def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return the clipped x_0, and the noise that leads from it to x."""
        y = f(x, t)
        x0 = y if target == "x0" else (x - b[t] * y) / a[t]
        x0 = x0.clamp(-1, 1)
        return x0, (x - a[t] * x0) / b[t]  # D3

    for t, s in pairwise(times):
        x0, eps = predict(x, t)
        if watch is not None:
            watch(t, x, x0)
        if s == 0:
            break
        sigma = eta * b[s] / b[t] * math.sqrt(1 - ABAR[t] / ABAR[s])  # eq. (3): Sigma = sigma^2 I
        euler = a[s] * x0 + math.sqrt(b[s] ** 2 - sigma**2) * eps  # eq. (5)
        if heun:
            # DDIM is Euler's method for y = x / a as a function of g = b / a: dy / dg = eps.
            slope = (eps + predict(euler, s)[1]) / 2
            x = a[s] * (x / a[t] + (b[s] / a[s] - b[t] / a[t]) * slope)
        elif sigma > 0:
            x = euler + sigma * torch.randn(x.shape, generator=generator).to(x)
        else:
            x = euler
    return x0


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
        """Return the condition of the padded volume, [C (+ 3), *S], and the slices that cut it.

        image: [C, X, Y, Z] in [0, 1] on the network's grid.
        """
        shape = image.shape[1:]
        full = padded_shape(shape, self.config.multiple, self.record["least"])
        cond = condition(image, full, (0, 0, 0), full, self.config.with_coords)
        if self.config.half:
            cond = np.ascontiguousarray(cond[:, ::2, ::2, ::2])
        size = (1, len(cond) + mask_channels(self.record), *cond.shape[1:])
        remedy = "try --amp bf16, or train with --method half"
        runtime.check_memory(self.model, size, self.dtype, self.device, False, remedy)
        front = loaders.symmetric_pad(shape, full)
        inside = [slice(f, f + n) for f, n in zip(front, shape)]
        return torch.from_numpy(cond).to(self.device), (slice(None), *inside)

    @torch.no_grad()
    def sample_member(self, cond: Tensor, case: str, number: int, watch: Any = None) -> Tensor:
        """Return one sample of the whole volume at once, [K', *S] fp32 in [0, 1].

        Its noise is drawn on the CPU from (seed, case, number): the same on every device.
        """
        config, c = self.config, len(cond)
        k = mask_channels(self.record)
        generator = torch.Generator().manual_seed(
            seed_of(config.seed, "sample", case, number)
        )  # D5
        start = torch.randn((1, k, *cond.shape[1:]), generator=generator).to(self.device)
        bar = tqdm(desc=f"{case}, evaluations", leave=False, delay=5, disable=config.quiet or None)
        # The network's input is put together once; a step changes only its last channels, x_t.
        fed = torch.cat([cond[None], start], dim=1)  # [1, C (+ 3) + K', *S]

        def f(x: Tensor, t: int) -> Tensor:
            fed[:, c:] = x
            bar.update()
            index = torch.tensor([t - 1], device=self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                return self.model(fed, index).float()

        with bar:
            x0 = sample(
                f, start, timesteps(config.sampling_steps), config.target, config.eta, config.heun,
                generator, watch,
            )[0]  # fmt: skip
        return (double(x0) if config.half else x0).clamp(0, 1)

    def sample_ensemble(self, cond, case, watch=None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Sample --ensemble members, and yield the result so far after each (section 2.4).

        Yields the mean of the members [K', *S], their variance [*S] with ddof 0, and the newest
        one. The variance of several channels is half of their sum, which for two channels that
        exclude each other is the variance of one.
        """
        mean = square = torch.zeros((), device=self.device)
        for n in range(1, self.config.ensemble + 1):
            member = self.sample_member(cond, case, n - 1, watch if n == 1 else None)
            before = member - mean
            mean = mean + before / n
            square = square + before * (member - mean)  # sum of squared distances from the mean
            variance = square.sum(dim=0) / n
            yield mean, variance if len(member) == 1 else variance / 2, member

    def maps(self, mean: Tensor, variance: Tensor) -> dict[str, np.ndarray]:
        """Return name -> [X, Y, Z]: the mean of each channel [K', X, Y, Z], and the variance."""
        names = ["background", *self.record["classes"]][-len(mean) :]
        maps = {f"mean_{name}": values.cpu().numpy() for name, values in zip(names, mean)}
        return {**maps, "variance": variance.cpu().numpy()}

    def predict_array(self, image: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """Return the mask of one volume as integers [X, Y, Z], with the publisher's label values.

        image: [X, Y, Z] or [C, X, Y, Z] with the scanner's values, in RAS order; spacing: in mm.
        """
        scan = loaders.scan_of_array(image, spacing, self.record)
        cond, inside = self.whole_volume(scan.image)
        *_, (mean, _, _) = self.sample_ensemble(cond, scan.name)
        return scan.mask(mean[inside].cpu().numpy())


# ==================================================================================================
# Evaluate
# ==================================================================================================


def score_cases(network, data, cases, ranks, out=None, stopped=None) -> dict[int, list] | None:
    """Sample and score cases, shared over the processes.

    Returns rows of metrics.csv for some sizes of the ensemble; small ensembles are the first
    members of the large one. None after a signal. out: folder for masks and pictures, or None.
    """
    config = network.config
    sizes = sorted({n for n in ENSEMBLES if n < config.ensemble} | {config.ensemble})
    rows: dict[Any, list[dict[str, Any]]] = {}
    for case in ranks.share(cases, config.quiet, stopped):
        truth = np.asarray(data.label(case))
        cond, inside = network.whole_volume(data.image(case))
        trace = None
        if out is not None and case == cases[0]:
            trace = figures.Trace(truth, inside[1:])
        members = []
        for mean, variance, member in network.sample_ensemble(cond, case, trace):
            members.append(x0_to_mask(member[inside]).cpu().numpy())
            mask = x0_to_mask(mean[inside]).cpu().numpy()
            if len(members) in sizes:
                spacing = data.spacing(case)
                scores = metrics.evaluate_case(case, mask, truth, spacing, data.scored)
                rows[len(members), case] = scores
        if out is not None:
            maps = network.maps(mean[inside], variance[inside[1:]])
            loaders.save_case(out / "predictions", data, case, mask, maps, members, config.save)
        if out is not None and trace is not None:
            figures.case_sheet(out / "figures", data, case, mask, members, maps, trace.frames)
    if stopped is not None and stopped():
        return None
    rows = ranks.merge(rows)
    return {size: [row for case in cases for row in rows[size, case]] for size in sizes}


def evaluate(network: Network, data: Any, ranks: Ranks, out: Path) -> int:
    """Score a split on the prepared grid: print the table, write metrics, masks and pictures."""
    config = network.config
    cases, seen = loaders.held_out(network.record, data, config.split, config.limit)
    begin = time.perf_counter()
    by_size = score_cases(network, data, cases, ranks, out)
    if not ranks.first or by_size is None:
        return 0
    seconds = time.perf_counter() - begin
    say(
        f"\n{config.split} split of {data.name}{seen}, {len(cases)} cases, {seconds:.0f} s\n"
        f"{config.sampling_steps} steps, eta {config.eta:g}, weights of step {network.step}"
    )
    for size, rows in by_size.items():
        suffix = "" if size == config.ensemble else f"_ensemble{size}"
        say(f"\nensemble of {size}\n{tables.report(out, rows, suffix)}")
    if config.data == "synthetic":
        say(f"\n{metrics.threshold_note(data, cases)}")
    say(f"\nmasks, pictures and tables are in {out}")
    return 0


# ==================================================================================================
# Predict
# ==================================================================================================


def predict(network: Network, ranks: Ranks) -> int:
    """Write masks for NIfTI files, on their own grid and with the publisher's label values."""
    config = network.config
    for scan in runtime.scans(config, network.record, ranks):
        cond, inside = network.whole_volume(scan.image)
        members: dict[object, np.ndarray] = {}
        for mean, variance, member in network.sample_ensemble(cond, scan.name):
            if config.save == "all":
                members[len(members)] = scan.mask(member[inside].cpu().numpy())
        # Probabilities go back to the scan's own grid, linearly, and to its directions. There the
        # largest becomes the mask, with the label values of the data's publisher.
        mask = scan.mask(mean[inside].cpu().numpy())  # D8
        maps = {}
        if config.save != "masks":
            maps = network.maps(mean[inside], variance[inside[1:]])
            maps = {name: scan.map(values) for name, values in maps.items()}
        say(scan.save(mask, maps, members))
    return 0


# ==================================================================================================
# Command line
# ==================================================================================================

VERBS = {
    "": ("run", "model", "start", "train", "speed", "use", "evaluate"),
    "train": ("run", "model", "start", "train", "speed"),
    "evaluate": ("run", "start", "use", "evaluate"),
    "predict": ("run", "start", "use", "predict"),
}


def load_network(given: dict[str, Any], ranks: Ranks) -> Network:
    """Return the network that the flags name: of --checkpoint, of the run, or of --init."""
    config, state = runtime.load_trained(Config, PRESETS, given, SCRIPT)
    record = state["data"]
    record.setdefault("least", least_grid(config, record, [(1, 1, 1)]))  # of public weights
    model = network_for(config, record)
    runtime.load_weights(model, state["ema"], config.init or config.checkpoint)
    model = unet.fast_layout(model.to(ranks.device)).eval().requires_grad_(False)
    dtype, _ = runtime.autocast_dtype(config.amp, ranks.device)
    return Network(config, model, record, ranks.device, dtype, state["step"])


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
