"""MDM: learn features by filling in hidden tiles, then segment from a few labelled images.

Paper
    Z. Pan, J. Chen, Y. Shi: Masked Diffusion as Self-supervised Representation Learner. 2023,
    arXiv 2308.05695v4.

Idea
    The decoder of a diffusion model holds features that tell tissue apart, learnt without labels.
    MDM keeps the network and drops the diffusion: a random share t / T of the image's tiles is
    hidden, the network is told t and restores the whole image; the loss is structural similarity.
    Then it is frozen. The maps of some middle decoder blocks, enlarged to the image, give each
    pixel a vector, and a small classifier learns the classes from a few labelled images.

Symbols
    x_0        x0    [B, 3, H, W]   image, uint8 / 127.5 - 1, in [-1, 1]
    t          t     [B]            0..T-1, uniform; a share t / T of the tiles is hidden
    p, L       tile, tiles          side of a tile in pixels; H W / p^2, of which L (T - t) // T stay
    x_t        xt    [B, 3, H, W]   image with hidden tiles at 0 (mid grey), or (ddpm) with noise
    eps        eps   [B, 3, H, W]   standard normal noise
    abar_t     abar[t]              product of 1 - beta_s for s = 0..t
    f_theta    model(xt, t)         the network: the restored image, for ddpm the noise
    f_k        maps                 output of decoder block k, [B, c, h, w]
    D          sum of c             over all maps: the length of a pixel's vector

Equations
    (1) q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    (3) L = || eps - eps_theta(x_t, t) ||^2
    (4) L = (1 - SSIM(x_0, f_theta(x_t, t))) / 2, SSIM(x, y) = (2 mu_x mu_y + c1)
        (2 sigma_xy + c2) / ((mu_x^2 + mu_y^2 + c1) (sigma_x^2 + sigma_y^2 + c2))
    (5) L = cross-entropy of the pixel classifier
    Equation 2 is the posterior of the reverse process, which nothing here needs.

Differs
    D1  SSIM is the public code's: c1 and c2 for a range of 1 though the image spans 2, no gradient
        where SSIM < 0. On signed values it cannot tell an image from its negative. --ssim-range
        unit is the correct form.
    D2  Tiles are hidden for features, too, as in the public code: a function of (seed, image,
        window, epoch). --feature-mask off shows the intact image, as the text has it.
    D3  ddpm: no learnt variance, and one noise image for all features.
    D4  The average of the weights warms up. Else the paper's 10,000 steps leave 37 % of the start.
    D5  unet is this very network with classes as output, random at first, trained on labelled crops
        with flips and averaged weights. --finetune, not in the paper, starts pre-trained instead.
    D6  The small presets hold out a tenth of the images that are in no test set; their loss chooses
        best.pt. The paper trains on all, test images included.
    D7  The classifier's first layer works on small maps and its result is enlarged, which is the
        same: W up(f) + b = up(W f) + b.
    D8  Scores are means over images. The paper's IoU on GlaS is d / (2 - d) of the mean Dice d, and
        its AJI on MoNuSeg the IoU of the foreground (aji binary). Both stand beside the real ones.
    D9  A run has one classifier, of one --seed. Labelled images with nothing drawn do not count.
    D10 Images smaller than a crop are reflected; any batch works. The public loader drops them.
    D11 The small presets: a narrow network, a larger rate, smaller crops; D1, D6, D13, D14.
    D12 none draws the layers that start at zero, too; else its features would be linear.
    D13 --feature-norm standard: mean 0 and SD 1 in each channel over the labelled images. The
        public code divides the features of a window by their Frobenius norm (l2).
    D14 --classifier-norm none: no batch norm, which in training knows one crop, in use averages.
    D15 --augment on: turn, scale, shift, change colours. The paper flips only.

Usage
    python masked_diffusion.py                             pre-train, segment and score fake tissue
    python -m data_prep.glas --src GlaS --dst data/glas-small --reduce 4
    python masked_diffusion.py pretrain --data glas-small
    python masked_diffusion.py segment --data glas-small --labels 8
    python masked_diffusion.py evaluate --data glas-small --split testA
    python masked_diffusion.py predict --data glas-small --image slide.png --output mask.png
    python masked_diffusion.py segment --data glas-small --labels 8 --finetune
    torchrun --nproc_per_node=4 masked_diffusion.py --data glas --preset paper --accumulate 4
    results/mdm_*.sh: the paper's tables and figures.

Expect
    The default run takes about five minutes on one core of a server CPU, most of it pre-training.
    It prints a mean Dice of 0.64 on ten unseen sections with 8 labels (0.74 and 0.72 with two other
    seeds of the classifier), beside 0.53 (0.61, 0.68) for the same network with random weights,
    0.42 for colour alone and 0.43 for calling all foreground.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate

from common import InputError, figures, flags, loaders, metrics, runtime, tables, unet
from common.flags import flag
from common.runtime import Ranks, noise, say, seed_of

SCRIPT = "masked_diffusion"
T = 1000  # levels of masking or noise; t = 0..T-1 throughout this file
WINDOW_PIXELS = 256 * 256  # that pass a frozen network together: one window of the paper

# ==================================================================================================
# Config
# ==================================================================================================


@dataclass(frozen=True)
class Config(flags.RunFlags):
    """The flags of the method, with the paper's defaults on GlaS and MoNuSeg (--preset paper)."""

    # the network, and what it is shown
    method: Literal["mdm", "ddpm", "unet", "none"] = flag(
        "mdm", "unet: supervised, none: random features", "model"
    )
    num_channels: int = flag(192, "width of the first level", "model", 1)
    channel_mult: tuple[int, ...] = flag((1, 1, 2, 2, 4, 4), "widths of the levels", "model", 1)
    num_res_blocks: int = flag(2, "residual blocks of a level", "model", 1)
    num_groups: int = flag(32, "groups of a norm", "model", 1)
    num_head_channels: int = flag(64, "channels of an attention head", "model", 1)
    attention_resolutions: tuple[int, ...] = flag(
        (8, 16, 32), "downsampling of levels that attend", "model", 1
    )
    tile: int = flag(8, "side of a tile in pixels, table 7", "model", 1)
    crop: int = flag(256, "side of crops and windows in pixels", "model", 1)
    target: Literal["auto", "eps", "x0"] = flag("auto", "of ddpm, table 4; auto: eps", "model")
    schedule: Literal["cosine", "linear"] = flag("cosine", "of ddpm; FFHQ: linear", "model")
    fixed_t: int = flag(-1, "always this t, table 3; -1: random", "model", -1, T - 1)
    # pre-training, section 4.1
    loss: Literal["auto", "ssim", "mse"] = flag("auto", "mdm ssim, ddpm mse", "train")
    ssim_range: Literal["signed", "unit"] = flag("signed", "unit: of values in [0, 1]", "train")
    pretrain_on: Literal["all", "train"] = flag("all", "all: the test images, too", "train")
    held_out: float = flag(0.0, "share of images for validation (D6)", "train", 0, 0.5)
    augment: Literal["on", "off"] = flag("off", "more than flips (D15)", "train")
    seed: int = flag(0, "of weights, crops, masks, noise", "train", 0)
    batch: int = flag(128, "crops of a step, over all processes", "train", 1)
    lr: float = flag(1e-4, "learning rate", "train", 1e-12, 1)
    ema: float = flag(0.9999, "decay of the averaged weights; 0: off", "train", 0, 0.999999)
    grad_clip: float = flag(0.0, "largest gradient norm; 0: off", "train", 0)
    steps: int = flag(10_000, "optimisation steps (FFHQ: 100,000)", "speed", 1)
    eval_every: int = flag(1000, "steps between validations", "speed", 1)
    save_every: int = flag(500, "steps between saves", "speed", 1)
    patience: int = flag(0, "validations without improvement; 0: never stop", "speed", 0)
    # features and classifier, section 4.2
    labels: int = flag(8, "labelled images, the first by name; 0: all", "segment", 0)
    labels_file: str = flag("", "JSON list of labelled images to take instead", "segment")
    finetune: bool = flag(False, "train the whole network end to end (D5)", "segment")
    finetune_steps: int = flag(
        0, "steps of segment; 0: the rule, without a classifier --steps", "segment", 0
    )
    blocks: tuple[int, ...] = flag((8, 9, 10, 11, 12), "decoder blocks of features", "segment", 0)
    feature_t: tuple[int, ...] = flag((), "times of features; mdm 50, ddpm 250", "segment", 0, 999)
    feature_mask: Literal["on", "off"] = flag("on", "off: the intact image (D2)", "segment")
    feature_norm: Literal["l2", "standard", "none"] = flag("l2", "of features (D13)", "segment")
    classifier_norm: Literal["batch", "none"] = flag("batch", "batch norm or none (D14)", "segment")
    crops: int = flag(1, "crops of a classifier's step", "segment", 1)
    stop_epoch: int = flag(40, "the rule begins after this epoch (MoNuSeg: 30)", "segment", 0, 4000)
    split: str = flag("test", "which images: a split's name", "evaluate")  # type: ignore
    save: Literal["masks", "maps"] = flag("masks", "maps: probabilities, too", "predict")

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{SCRIPT}-{Path(self.data).name}-{self.preset}")

    @property
    def segment_folder(self) -> Path:
        labels = Path(self.labels_file).stem or str(self.labels or "all")
        kind = "finetune" if self.finetune else self.method
        name = f"segment-{labels}" if kind in ("mdm", "ddpm") else f"segment-{labels}-{kind}"
        return self.run_folder / f"{name}-{self.seed}"

    @property
    def supervised(self) -> bool:
        """Whether segment trains the whole network, which then gives classes itself."""
        return self.method == "unet" or self.finetune

    @property
    def predicts(self) -> str:
        """What the pre-trained network's output is: the image, x0, or the noise, eps."""
        if self.target != "auto":
            return self.target
        return "eps" if self.method == "ddpm" else "x0"

    @property
    def loss_kind(self) -> str:
        return {"auto": "mse" if self.method == "ddpm" else "ssim"}.get(self.loss, self.loss)

    @property
    def times(self) -> tuple[int, ...]:
        """Times t of the features, one pass of the network each."""
        if self.feature_t or self.fixed_t >= 0:
            return self.feature_t or (self.fixed_t,)
        return (250,) if self.method == "ddpm" else (50,)

    def __post_init__(self) -> None:
        """Check the ranges, then the rules between flags. Raises InputError that names the flag."""
        flags.check_ranges(self)
        levels = len(self.channel_mult)
        for name, step in (("--tile", self.tile), ("--channel-mult", 2 ** (levels - 1))):
            if self.crop % step:
                raise InputError(
                    f"--crop {self.crop} is no multiple of {step} ({name}); change one"
                )
        for level, m in enumerate(self.channel_mult):
            attends = 2**level in self.attention_resolutions or level == levels - 1
            units = (self.num_groups, self.num_head_channels if attends else 1)
            if any(self.num_channels * m % unit for unit in units):
                text = (
                    f"a width of {self.num_channels * m} channels (--num-channels) is no multiple"
                )
                raise InputError(f"{text} of {units[0]} groups or of heads of {units[1]} channels")
        if self.predicts == "eps" and (self.method != "ddpm" or self.loss_kind == "ssim"):
            raise InputError("--target eps needs --method ddpm and --loss mse")
        if self.finetune and self.method in ("unet", "none"):
            raise InputError("--finetune starts from pre-trained weights; use --method mdm or ddpm")


SMALL: dict[str, Any] = {
    "ssim_range": "unit", "feature_norm": "standard", "classifier_norm": "none",  # D1, D13, D14
    "held_out": 0.1, "ema": 0.999,  # D6
}  # fmt: skip
LAPTOP = SMALL | {"num_channels": 32, "crop": 64, "lr": 3e-4, "workers": 0}  # D11
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": LAPTOP
    | {"tile": 4, "batch": 8, "steps": 400, "lr": 1e-3, "ema": 0.99, "eval_every": 100}
    | {"save_every": 100, "grad_clip": 1.0, "finetune_steps": 200},
    # For images a quarter as wide: tiles and crops then cover the tissue that the paper's do.
    "laptop": LAPTOP
    | {"tile": 2, "batch": 16, "steps": 3000, "eval_every": 250, "save_every": 100}
    | {"augment": "on"},  # D15
    # Half a day on a GPU of 24 GB, by arithmetic: nobody has run it yet.
    "gpu": SMALL
    | {"num_channels": 128, "batch": 32, "accumulate": 4, "steps": 20_000, "augment": "on"},
    "paper": {},
}

# ==================================================================================================
# Model
# ==================================================================================================


def build_model(config: Config, in_channels: int, out_channels: int) -> unet.UNet:
    """Return guided-diffusion's U-Net, whose 18 decoder blocks have the paper's numbers.

    A block is a ResBlock, in which the embedded t scales and shifts the second norm, and at the
    coarse levels an attention; the last block of a level also doubles the map.
    """
    levels = range(len(config.channel_mult))
    attention = [level for level in levels if 2**level in config.attention_resolutions]
    return unet.UNet(
        in_channels, out_channels, config.num_channels, config.channel_mult, config.num_res_blocks,
        attention, config.num_head_channels, config.num_groups, recompute=config.recompute,
    )  # fmt: skip


def network_for(config: Config, record: dict[str, Any], supervised: bool = False) -> unet.UNet:
    """Return a network for the data of this record: 3 to 3 channels, or 3 to classes (D5)."""
    torch.manual_seed(seed_of(config.seed, "weights") % 2**32)
    channels = len(record["channels"])
    return build_model(config, channels, len(record["classes"]) + 1 if supervised else channels)


# ==================================================================================================
# Masks: schedule, corruption, SSIM, loss
# ==================================================================================================


def kept(t: int, tiles: int) -> int:
    """Return floor(tiles (1 - t / T)), the visible tiles, in integers: floats err for some t."""
    return tiles * (T - t) // T


def draw_mask(rng: np.random.Generator, keep: int, grid: Sequence[int]) -> np.ndarray:
    """Return [h, w] bool, True is hidden: all but `keep` tiles, independently for each image."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[rng.permutation(mask.size)[keep:]] = True
    return mask.reshape(grid)


def hide(x0: Tensor, mask: Tensor) -> Tensor:
    """Return x_t: x0 [B, C, H, W] with the tiles of mask [B, h, w] at 0, mid grey."""
    p = x0.shape[2] // mask.shape[1]
    pixels = mask.repeat_interleave(p, 1).repeat_interleave(p, 2)  # [B, H, W]
    return x0.masked_fill(pixels[:, None], 0.0)


@cache
def abar_table(schedule: str) -> Tensor:
    """Return abar[t], t = 0..T-1, in float64. cosine: Nichol & Dhariwal 2021, beta at most 0.999."""
    beta = np.linspace(1e-4, 0.02, T)
    if schedule == "cosine":
        curve = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    return torch.from_numpy(np.cumprod(1 - beta))


def roots(schedule: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t) for t [B], each fp32 [B, 1, 1, 1]."""
    abar = abar_table(schedule).to(t.device)[t].reshape(-1, 1, 1, 1)
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def q_sample(x0: Tensor, eps: Tensor, t: Tensor, schedule: str = "cosine") -> Tensor:
    """Return x_t of --method ddpm: x0 with noise eps of the level t [B]."""
    a, b = roots(schedule, t)
    return a * x0 + b * eps  # eq. (1)


@cache
def gaussian_window(side: int, sigma: float = 1.5) -> Tensor:
    """Return [side, side] float64, of sum 1."""
    line = torch.exp(-((torch.arange(side, dtype=torch.float64) - side // 2) ** 2) / (2 * sigma**2))
    line = line / line.sum()
    return line[:, None] * line[None, :]


def ssim_map(x: Tensor, y: Tensor, side: int = 5, span: float = 1.0) -> Tensor:
    """Return SSIM at each pixel and channel, [B, C, H, W].

    side: of the Gaussian window; span: range of the values. Zeros lie outside the image, as in the
    public code, so that means and variances near the border are too small.
    """
    c1 = (0.01 * span) ** 2
    c2 = (0.03 * span) ** 2
    window = gaussian_window(side).to(x).expand(x.shape[1], 1, side, side)

    def local(v: Tensor) -> Tensor:  # weighted mean around each pixel
        return F.conv2d(v, window, padding=side // 2, groups=x.shape[1])

    mx = local(x)
    my = local(y)
    vx = local(x * x) - mx * mx
    vy = local(y * y) - my * my
    cov = local(x * y) - mx * my
    similar = (2 * mx * my + c1) * (2 * cov + c2)
    return similar / ((mx * mx + my * my + c1) * (vx + vy + c2))  # eq. (4)


def ssim_loss(x: Tensor, y: Tensor, ssim_range: str = "signed") -> Tensor:
    """Return (1 - SSIM) / 2 of images in [-1, 1], the mean over all pixels, visible or not: [B]."""
    if ssim_range == "unit":
        loss = (1 - ssim_map((x + 1) / 2, (y + 1) / 2)) / 2
    else:
        loss = (1 - ssim_map(x, y)).clamp(0, 1) / 2  # D1
    return loss.flatten(1).mean(1)


def image_loss(kind: str, target: Tensor, output: Tensor, ssim_range: str = "signed") -> Tensor:
    """Return ssim or mse of each image, [B], in fp32: E[x^2] - mu^2 needs all digits."""
    with torch.autocast(target.device.type, enabled=False):
        if kind == "ssim":
            return ssim_loss(target, output, ssim_range)
        return (target - output).square().flatten(1).mean(1)


def masking_loss(
    model: nn.Module, x0: Tensor, t: Tensor, mask: Tensor, kind="ssim", ssim_range="signed"
) -> Tensor:
    """Return the loss of MDM, [B]: the network sees x_t and t, and restores the whole image."""
    output = model(hide(x0, mask), t).float()  # [B, 3, H, W]
    return image_loss(kind, x0, output, ssim_range)


def noise_loss(
    model, x0, t, eps, target="eps", schedule="cosine", kind="mse", ssim_range="signed"
) -> Tensor:
    """Return the loss of --method ddpm, [B]: of the noise, or (target x0) of the image."""
    output = model(q_sample(x0, eps, t, schedule), t).float()  # [B, 3, H, W]
    truth = eps if target == "eps" else x0
    return image_loss(kind, truth, output, ssim_range)  # eq. (3), without the variance's term: D3


def class_loss(model: nn.Module, x0: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy of a network that gives classes, [B], without pixels of 255."""
    logits = model(x0, torch.zeros(len(x0), device=x0.device)).float()  # [B, K, H, W]
    loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none").flatten(1)
    return loss.sum(1) / (label != 255).flatten(1).sum(1).clamp(min=1)


# ==================================================================================================
# Data: crops, labelled images
# ==================================================================================================


def as_input(image: np.ndarray) -> np.ndarray:
    """Turn uint8 [3, ...] into fp32 in [-1, 1]."""
    return np.asarray(image, np.float32) / 127.5 - 1


def cut(array: np.ndarray, corner: Sequence[int], side: int) -> np.ndarray:
    """Return [..., side, side] of [..., Y, X]; a smaller image is reflected at its ends."""
    y, x = corner
    window = np.asarray(array[..., y : y + side, x : x + side])
    missing = [(0, side - n) for n in window.shape[-2:]]
    if missing == [(0, 0), (0, 0)]:
        return window
    return np.pad(window, [(0, 0)] * (array.ndim - 2) + missing, mode="reflect")  # D10


def random_corner(rng: np.random.Generator, image: np.ndarray, side: int) -> list[int]:
    """Return the first row and column of a window in an image [3, Y, X]."""
    return [int(rng.integers(0, max(n - side, 0) + 1)) for n in image.shape[1:]]


@dataclass
class Crops(Dataset):
    """Training samples n = 0, 1, 2, ...: each is a function of (seed, n), and n never ends."""

    data: Any  # gives image(case) uint8 [3, Y, X] and label(case) [Y, X]
    cases: list[str]
    side: int
    tile: int
    seed: int = 0
    fixed_t: int = -1
    labelled: bool = False  # else the label is 0
    augmented: bool = False
    stream: str = "crop"

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, int]:
        """Return x0 [3, H, W], label int64 [H, W], t, mask [h, w] (True is hidden), and n."""
        epoch, place = divmod(n, len(self.cases))
        order = np.random.default_rng(seed_of(self.seed, "order", epoch))
        case = self.cases[order.permutation(len(self.cases))[place]]
        rng = np.random.default_rng(seed_of(self.seed, self.stream, n))

        image = self.data.image(case)
        corner = random_corner(rng, image, self.side)
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)  # left and right
        x0 = as_input(cut(image, corner, self.side))[..., flip]
        label = np.zeros((self.side, self.side), np.int64)
        if self.labelled:
            label = cut(self.data.label(case), corner, self.side)[..., flip].astype(np.int64)
        t = int(rng.integers(0, T)) if self.fixed_t < 0 else self.fixed_t
        grid = (self.side // self.tile, self.side // self.tile)
        mask = draw_mask(rng, kept(t, grid[0] * grid[1]), grid)
        if self.augmented:
            rng = np.random.default_rng(seed_of(self.seed, "augment", n))
            x0, label = loaders.augment_image(rng, x0, label)  # D15
        return np.ascontiguousarray(x0), np.ascontiguousarray(label), t, mask, n


def pretraining_cases(data: Any, use: str) -> list[str]:
    """Return the images without labels: all, with the test images (the paper), or those to train."""
    splits = data.meta["splits"]
    if use == "train":
        cases = splits.get("train", []) + splits.get("unlabelled", [])
    else:
        cases = splits.get("pretrain") or data.cases("all")
    if not cases:
        raise InputError(f"{data.place}: no image to train on; prepare data with images")
    return cases


def labelled_cases(data: Any, labels: int, labels_file: str = "") -> tuple[list[str], int]:
    """Return the images that segment learns from, and how many labelled ones hold nothing drawn.

    The first `labels` (0: all) of the split train, sorted by name as text as in the public code,
    or those of a JSON list.
    """
    cases = sorted(case for case in data.cases("train") if data.has_label(case))
    if labels_file:
        labels = 0
        with loaders.reading(labels_file):
            cases = list(json.loads(Path(labels_file).read_text(encoding="utf-8")))
    values = list(data.classes.values())
    drawn = [case for case in cases if np.isin(data.label(case), values).any()]  # D9
    if len(drawn) < max(labels, 1):
        raise InputError(
            f"{data.place}: {max(labels, 1)} labelled images are asked for, something is drawn on "
            f"{len(drawn)} of {len(cases)}; lower --labels, or label more"
        )
    return drawn[: labels or None], len(cases) - len(drawn)


# ==================================================================================================
# Pre-train
# ==================================================================================================


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + n) / (10 + n)) after n updates.

    A young average forgets its random start sooner.
    """
    d = min(decay, (1 + updates) / (10 + updates))  # D4
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def train(
    config: Config, data: Any, ranks: Ranks, labelled: Sequence[str] = (), start: Any = None
) -> int:
    """Pre-train the network or, with labelled images, train it end to end (unet, --finetune).

    start: checkpoint to begin with. Returns 0, or 130 or 143 after a signal, everything saved.
    """
    device = ranks.device
    dtype, reason = runtime.autocast_dtype(config.amp, device)
    record = loaders.data_record(data)
    if labelled:
        cases, held = list(labelled), [case for case in data.cases("val") if data.has_label(case)]
    else:  # the held-out images are in no test set
        cases = pretraining_cases(data, config.pretrain_on)
        cases, held = loaders.hold_out(data, cases, config.held_out, config.seed)  # D6
    record["cases"] = {"train": cases, "val": held}
    record["pretrained_on"] = start and start["data"]
    plan = (config.crop, config.tile, config.seed, config.fixed_t, bool(labelled))
    crops = Crops(data, cases, *plan, config.augment == "on")
    # Without held-out images the loss of training crops is followed, and nothing is chosen by it.
    column = "val_loss" if held else "training_crop_loss"
    followed = Crops(data, held or cases, *plan, stream="held")

    # The network, its average for features, and the optimiser.
    model = network_for(config, record, bool(labelled)).to(device)
    if start:
        runtime.load_start_weights(model, start, ranks)
    share = config.batch // (ranks.world * config.accumulate)
    size = (share, len(record["channels"]), config.crop, config.crop)
    remedy = "try --accumulate, --recompute, or a smaller --num-channels"
    runtime.check_memory(model, size, dtype, device, True, remedy)
    model = unet.fast_layout(model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # The run folder. A checkpoint holds what is named here; the same command continues from it.
    run = runtime.Run(config, SCRIPT, record, ranks, [column])
    run.keep(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    step = run.resume()  # 0 for a new run
    differs = flags.departures(config, Config())
    run.print_header("MDM (Pan et al. 2023)", data, model, step, reason, differs)
    reduce = record.get("reduce", 1)
    seen = len(loaders.test_cases(data) & {*cases})
    held_text = f"{len(held)} held out, whose loss chooses best.pt" if held else "none held out"
    say(
        f"  images    {len(cases)} to train on, {seen} of them test images; {held_text}\n"
        f"  tiles     {config.tile} pixels, crops {config.crop}; before --reduce {reduce}: "
        f"{config.tile * reduce} and {config.crop * reduce} (paper: 8 and 256)",
        ranks,
    )

    def loss_of(net: Any, batch: Sequence[Tensor]) -> Tensor:
        """Return the loss of each sample of a batch of Crops, [B]."""
        x0, label, t, mask = (v.to(device, non_blocking=True) for v in batch[:4])
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if labelled:
                return class_loss(net, x0, label)  # D5
            if config.method == "mdm":
                return masking_loss(net, x0, t, mask, config.loss_kind, config.ssim_range)
            eps = noise(config.seed, "noise", batch[4].tolist(), x0.shape[1:], device)
            kind = (config.loss_kind, config.ssim_range)
            return noise_loss(net, x0, t, eps, config.predicts, config.schedule, *kind)

    # All processes work on parts of one global batch, and DDP averages their gradients.
    runtime.same_weights(model, ranks, "at the start")
    net: Any = DistributedDataParallel(model) if ranks.world > 1 else model
    net = torch.compile(net) if config.compile else net
    net.train()
    loader = DataLoader(
        crops,
        batch_sampler=runtime.Shards(config.batch, config.accumulate, ranks, step, config.steps),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=runtime.ignore_signals,
    )
    batches = iter(loader)
    run.stopped()  # sets run.time_up, where a run of --minutes is complete
    last = step == config.steps or run.time_up or 0 < config.patience <= run.stale

    while True:
        # Validate when it is due: the average, on the same 16 crops, times and masks each time.
        if (step % config.eval_every == 0 or last) and step > run.validated:
            with torch.no_grad():
                singles = [default_collate([followed[n]]) for n in range(16)]
                values = [loss_of(ema, batch).item() for batch in singles]
            (value,) = ranks.max(float(np.mean(values)))
            run.write_row(step, **{column: value})
            say(f"step {step}: {column.replace('_', ' ')} {value:.4f}", ranks)
            run.validated = step
            if held:
                run.save_best(step, -value)
                last = last or 0 < config.patience <= run.stale
        if last or run.signal:
            break

        begin = time.perf_counter()

        # One global batch: the share of this process, in config.accumulate parts.
        for part in range(config.accumulate):
            batch = next(batches)  # [B, 3, H, W], [B, H, W], [B], [B, h, w], [B]
            # Gradients are shared between the processes with the last part only.
            shared = ranks.world == 1 or part == config.accumulate - 1
            with nullcontext() if shared else net.no_sync():
                loss = loss_of(net, batch)  # [B]
                scaler.scale(loss.mean() / config.accumulate).backward()
            run.collect(loss, (batch[2] + 1) / T)

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

        run.count_skip(step, finite)
        stopped = run.stopped()  # Ctrl-C or SIGTERM on any process; also sets run.time_up
        last = step == config.steps or run.time_up
        run.log(step, lr=config.lr, grad_norm=norm)
        if stopped or last or step % config.save_every == 0:
            run.save(step)

    runtime.same_weights(model, ranks, "at the end")
    if ranks.first:
        run.save(step)
        title = f"{config.method}, {data.name}"
        figures.loss_curve(run.out / "log.csv", run.out / "loss.png", title)
    return run.finish(step)


# ==================================================================================================
# Features
# ==================================================================================================


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return [B, c, H, W], bilinear between the pixel centres of [B, c, h, w]."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_vectors(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Return the vector of each pixel, [B, H, W, D]: all maps, enlarged, one behind the other.

    This is what the classifier learns from. PixelClassifier.on_maps does without the tensor.
    """
    return torch.cat([enlarge(m, size) for m in maps], dim=1).movedim(1, -1)


Key = tuple[int | str, ...]  # draws the mask of a window: (seed, case, corner, epoch)


@dataclass(frozen=True)
class Features:
    """The maps of a frozen network: called as features(x0, keys), with a key for each window."""

    model: Any  # unet.UNet
    blocks: Sequence[int] = (8, 9, 10, 11, 12)
    times: Sequence[int] = (50,)
    method: str = "mdm"
    tile: int = 8
    masked: bool = True
    schedule: str = "cosine"
    norm: str = "l2"
    dtype: torch.dtype | None = None  # of autocast

    def shown(self, x0: Tensor, t: int, keys: Sequence[Key]) -> Tensor:
        """Return what the network sees of windows [B, 3, H, W] at t."""
        if self.method == "ddpm":
            eps = noise(0, "noise", ["features"], x0.shape[1:], torch.device("cpu"))  # type: ignore
            return q_sample(
                x0, eps.to(x0), torch.tensor([t], device=x0.device), self.schedule
            )  # D3
        if not self.masked:
            return x0
        grid = (x0.shape[2] // self.tile, x0.shape[3] // self.tile)
        rngs = [np.random.default_rng(seed_of("feature mask", *key, t)) for key in keys]
        masks = np.stack([draw_mask(rng, kept(t, grid[0] * grid[1]), grid) for rng in rngs])
        return hide(x0, torch.from_numpy(masks).to(x0.device))  # D2

    @torch.no_grad()
    def __call__(self, x0: Tensor, keys: Sequence[Key]) -> list[Tensor]:
        """Return maps [B, c, h, w] fp32, times outer, blocks inner.

        norm l2: the sum of squares over all pixels and channels of an enlarged window is 1.
        """
        x0 = x0.to(next(self.model.parameters()).device)
        maps: list[Tensor] = []
        for t in self.times:
            xt = self.shown(x0, t, keys)
            with torch.autocast(x0.device.type, self.dtype, enabled=self.dtype is not None):
                coarse = self.model.encode(xt, torch.tensor([t], device=x0.device))
                outputs = self.model.decode(*coarse, self.blocks)  # no block after the last of them
            maps += [m.float().contiguous() for m in outputs]
        if self.norm != "l2":
            return maps
        squares = [enlarge(m, x0.shape[2:]).square().sum((1, 2, 3)) for m in maps]
        length = torch.stack(squares).sum(0).sqrt().clamp(min=1e-12)  # [B]
        return [m / length[:, None, None, None] for m in maps]

    def widths(self, side: int) -> list[int]:
        """Return the channels of each map; their sum is D."""
        return [m.shape[1] for m in self(torch.zeros(1, 3, side, side), [("widths",)])]


def features_of(config: Config, model: unet.UNet, ranks: Ranks) -> Features:
    """Return the features of a network, which is frozen from here on."""
    dtype, _ = runtime.autocast_dtype(config.amp, ranks.device)
    model = unet.fast_layout(model.to(ranks.device)).eval().requires_grad_(False)
    masked = config.feature_mask == "on"
    shown = (config.method, config.tile, masked, config.schedule)
    return Features(model, config.blocks, config.times, *shown, config.feature_norm, dtype)


def crop_steps(
    features: Features, data: Any, cases: Sequence[str], side: int, crops: int = 1, seed: int = 0
) -> Iterator[tuple[int, bool, list[Tensor], Tensor]]:
    """Yield steps without end: epoch, whether it is its last step, maps, and label.

    One crop is one step, with all of its pixels (or `crops` crops are); an epoch has one crop of
    each image. maps: [crops, c, h, w] each; label: [crops, side, side]. The crops of a few steps
    pass the frozen network together, which is faster. Nothing is stored.
    """
    ahead = max(1, WINDOW_PIXELS // (side * side * crops)) * crops
    for epoch in count():
        rng = np.random.default_rng(seed_of(seed, "classifier", epoch))
        order = [cases[i] for i in rng.permutation(len(cases))]
        for first in range(0, len(order), ahead):
            windows, labels, keys = [], [], []
            for case in order[first : first + ahead]:
                image = data.image(case)
                corner = random_corner(rng, image, side)
                windows.append(as_input(cut(image, corner, side)))
                labels.append(cut(data.label(case), corner, side).astype(np.int64))
                keys.append((seed, case, *corner, epoch))
            maps = features(torch.from_numpy(np.stack(windows)), keys)
            label = torch.from_numpy(np.stack(labels)).to(maps[0].device)
            for k in range(0, len(windows), crops):
                last = first + k + crops >= len(order)
                yield epoch, last, [m[k : k + crops] for m in maps], label[k : k + crops]


# ==================================================================================================
# Classifier
# ==================================================================================================


class PixelClassifier(nn.Module):
    """Three layers on the vector of a pixel, D -> 128 -> 32 -> classes: ReLU, then batch norm.

    widths: channels of each map, whose sum is D. classes: with the background. mean, sd: of each
    channel, taken out first. Source: Baranchuk et al. 2022.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, widths: Sequence[int], classes: int, batch_norm: bool = True):
        super().__init__()
        a, b = (128, 32) if classes < 30 else (256, 128)
        norm = nn.BatchNorm1d if batch_norm else nn.Identity  # D14
        self.widths = list(widths)
        self.first = nn.Linear(sum(widths), a)
        self.rest = nn.Sequential(
            nn.ReLU(), norm(a), nn.Linear(a, b), nn.ReLU(), norm(b), nn.Linear(b, classes)
        )
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("sd", torch.ones(sum(widths)))
        for m in self.modules():
            if isinstance(m, nn.Linear):  # without the norm by He et al.
                nn.init.normal_(m.weight, std=0.02 if batch_norm else math.sqrt(2 / m.in_features))
                nn.init.zeros_(m.bias)

    def forward(self, vectors: Tensor) -> Tensor:  # [N, D] -> [N, classes]
        return self.rest(self.first((vectors - self.mean) / self.sd))

    def on_maps(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return the logits of all pixels of windows, [B, classes, H, W], from maps [B, c, h, w].

        The same as forward(pixel_vectors(maps, size)); the first layer works on the small maps.
        """
        small: dict[tuple[int, ...], Tensor] = {}  # maps of one size are enlarged as their sum
        parts = [v.split(self.widths, dim=-1) for v in (self.first.weight, self.mean, self.sd)]
        for f, weight, mean, sd in zip(maps, *parts):
            f = (f - mean[:, None, None]) / sd[:, None, None]
            f = f.contiguous(memory_format=torch.channels_last)  # then no copy is needed below
            h = F.conv2d(f, weight[..., None, None])  # [B, 128, h, w]
            small[h.shape[2:]] = small[h.shape[2:]] + h if h.shape[2:] in small else h
        total: Any = sum(enlarge(h, size) for h in small.values())  # D7
        h = total.movedim(1, -1) + self.first.bias  # [B, H, W, 128]
        return self.rest(h.flatten(0, 2)).unflatten(0, h.shape[:3]).movedim(-1, 1)

    def standardise(self, features: Features, windows: Sequence[tuple[np.ndarray, Key]]) -> None:
        """Set mean and SD of each channel to those over all windows [3, H, W]."""
        moments = torch.zeros(2, len(self.mean), dtype=torch.float64)
        for window, key in windows:
            maps = [m.double().cpu() for m in features(torch.from_numpy(window)[None], [key])]
            for i, power in enumerate((1, 2)):
                moments[i] += torch.cat([(m**power).mean((0, 2, 3)) for m in maps]) / len(windows)
        self.mean.copy_(moments[0])
        self.sd.copy_((moments[1] - moments[0] ** 2).clamp(min=1e-12).sqrt())  # D13


def is_done(losses: Sequence[float], stop_epoch: int, patience: int = 20) -> bool:
    """Return whether the public code's rule ends a classifier; losses: of each epoch's last step.

    Epochs 0 to stop_epoch do not count. It ends after more than 20 without a new lowest loss.
    """
    counted = losses[stop_epoch + 1 :]
    return bool(counted) and len(counted) - 1 - int(np.argmin(counted)) > patience


def segment(config: Config, data: Any, ranks: Ranks, start: Any = None) -> int:
    """Learn classes from a few labelled images: a classifier on frozen features, or end to end.

    start: checkpoint of the pre-training; None for unet and none. Returns 0, or 130 or 143 after a
    signal; a classifier that was stopped begins anew.
    """
    cases, undrawn = labelled_cases(data, config.labels, config.labels_file)
    names = ", ".join(cases[:8]) + (", ..." if len(cases) > 8 else "")
    say(f"{len(cases)} labelled images ({undrawn} more hold nothing drawn): {names}", ranks)
    limit = config.finetune_steps or config.steps
    config = replace(config, out=str(config.segment_folder), steps=limit)
    if config.supervised:
        return train(replace(config, eval_every=min(500, limit)), data, ranks, cases, start)

    # The frozen network.
    record = {**loaders.data_record(data), "cases": {"train": cases, "val": []}}
    record |= {name: flags.text(getattr(config, name)) for name in flags.names(Config, "segment")}
    model = network_for(config, record)
    if start:
        runtime.load_start_weights(model, start, ranks)
    else:
        unet.redraw_zeros(model)  # D12
    record |= {"pretrained_on": start and start["data"], "weights": runtime.digest(model)}
    features = features_of(config, model, ranks)

    # The classifier, and the run folder.
    torch.manual_seed(seed_of(config.seed, "classifier") % 2**32)
    norm = config.classifier_norm == "batch"
    widths = features.widths(config.crop)
    classifier = PixelClassifier(widths, len(data.classes) + 1, norm).to(ranks.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    limit = config.finetune_steps or 5000 * len(cases)
    run = runtime.Run(replace(config, steps=limit), SCRIPT, record, ranks)
    run.keep(model=model, ema=nn.Module(), optimizer=optimizer, classifier=classifier)
    step = run.resume()
    if step:  # only finished classifiers are saved
        return run.finish(step)
    say(
        f"classifier of seed {config.seed} -> {run.out}\n"
        f"  features  {config.method}, t {flags.text(config.times)}, blocks "
        f"{flags.text(config.blocks)}: {sum(widths)} channels, norm {config.feature_norm}\n"
        f"  training  steps of {config.crops * config.crop**2:,} pixels, "
        f"{config.finetune_steps or f'ended by the rule after {config.stop_epoch} epochs'}",
        ranks,
    )
    if ranks.first:  # it is small; the other processes wait
        if config.feature_norm == "standard":
            rng = np.random.default_rng(seed_of(config.seed, "scale"))
            windows: list[tuple[np.ndarray, Key]] = []
            for k in range(max(64, len(cases))):
                image = data.image(cases[k % len(cases)])
                window = cut(image, random_corner(rng, image, config.crop), config.crop)
                windows.append((as_input(window), (config.seed, "scale", k)))
            classifier.standardise(features, windows)
        classifier.train()
        losses = []  # of the last step of each epoch
        steps = crop_steps(features, data, cases, config.crop, config.crops, config.seed)
        for epoch, ends, maps, label in steps:
            logits = classifier.on_maps(maps, label.shape[1:])  # [crops, classes, H, W]
            loss = F.cross_entropy(logits, label, ignore_index=255)  # eq. (5)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            run.bar.update()
            if ends:
                losses.append(loss.item())
                run.write_row(step, loss=losses[-1])
                if not math.isfinite(losses[-1]):
                    raise InputError(f"the classifier's loss is {losses[-1]}; use --amp off")
            ruled = not config.finetune_steps and ends and is_done(losses, config.stop_epoch)
            if step == limit or ruled or run.signal:
                break
        say(f"{step} steps, {epoch + 1} epochs, last loss {loss.item():.4f}")
        if not run.signal:
            run.save(step)
    ranks.barrier()
    run.stopped()
    return run.finish(step)


# ==================================================================================================
# Evaluate
# ==================================================================================================


def window_starts(n: int, r: int) -> list[int]:
    """Return the first pixels of windows of length r that overlap by a fifth; the last ends at n."""
    step = int(0.8 * r)
    windows = math.ceil(max(n - r, 0) / step) + 1
    return [min(k * step, max(n - r, 0)) for k in range(windows)]


@cache
def window_weights(r: int) -> np.ndarray:
    """Return [r, r]: a Gaussian of SD r / 8 about the middle, nowhere below 1e-3."""
    line = np.exp(-((np.arange(r) - (r - 1) / 2) ** 2) / (2 * (r / 8) ** 2))
    return np.maximum(np.outer(line, line), 1e-3)


@dataclass(frozen=True)
class Network:
    """A trained segmentation with what its use needs. record: of the data that it learnt from."""

    config: Config
    features: Features
    classifier: PixelClassifier | None  # None: the network gives classes itself
    record: dict[str, Any]
    device: torch.device
    step: int

    @torch.no_grad()
    def logits(self, x0: Tensor, keys: Sequence[Key]) -> Tensor:
        """Return logits fp32 [N, classes, r, r] of windows [N, 3, r, r], each with a key."""
        if self.classifier is not None:
            return self.classifier.on_maps(self.features(x0, keys), x0.shape[2:])
        dtype = self.features.dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            t = torch.zeros(len(x0), device=self.device)
            return self.features.model(x0.to(self.device), t).float()

    def segment_image(self, image: np.ndarray, case: str) -> np.ndarray:
        """Return probabilities [classes, Y, X] of a whole image uint8 [3, Y, X] of any size.

        The logits of windows are averaged. An image smaller than one gets mid grey around it.
        """
        r, shape = self.config.crop, image.shape[1:]
        full = [max(n, r) for n in shape]
        front = loaders.symmetric_pad(shape, full)
        x0 = loaders.read_window(as_input(image), [-f for f in front], full)  # [3, *full]
        weight = torch.from_numpy(window_weights(r)).float().to(self.device)  # [r, r]
        total = torch.zeros(1 + len(self.record["classes"]), *full, device=self.device)
        sums = torch.zeros(*full, device=self.device)
        corners = [(y, x) for y in window_starts(full[0], r) for x in window_starts(full[1], r)]
        together = max(1, WINDOW_PIXELS // (r * r))
        for first in range(0, len(corners), together):
            places = corners[first : first + together]
            windows = np.stack([x0[:, y : y + r, x : x + r] for y, x in places])
            keys = [(self.config.seed, case, *place, "test") for place in places]
            for (y, x), logits in zip(places, self.logits(torch.from_numpy(windows), keys)):
                total[:, y : y + r, x : x + r] += weight * logits
                sums[y : y + r, x : x + r] += weight
        inside = (slice(None), *(slice(f, f + n) for f, n in zip(front, shape)))
        return (total / sums)[inside].softmax(0).cpu().numpy()

    def predict_array(self, image: np.ndarray, spacing: Sequence[float] = ()) -> np.ndarray:
        """Return the mask of one image, integers [Y, X], with the publisher's label values.

        image: uint8 [3, Y, X]. spacing: not used, images have none.
        """
        scan = loaders.scan_of_array(image, spacing, self.record)
        return scan.mask(self.segment_image(scan.image, scan.name))


def score_cases(
    network: Network, data: Any, cases: Sequence[str], ranks: Ranks, out: Path, rule: Any
) -> dict[str, tuple]:
    """Segment and score images, shared over the processes.

    rule: gives a mask by colour alone, or None. Returns case -> rows of metrics.csv, counts for
    mIoU, and other scores by name: of objects, and of floors that need no network.
    """
    values = loaders.published_values(data.meta["label_values"])
    scores = {}
    for case in ranks.share(cases, network.config.quiet):
        image = np.asarray(data.image(case))
        truth = np.asarray(data.label(case))
        mask = network.segment_image(image, case).argmax(0).astype(np.uint8)
        masks = {"": mask}
        if rule is not None:
            masks["Dice of colour alone"] = rule(image)
        if len(data.classes) == 1:
            masks["Dice of all foreground"] = np.ones_like(truth)
        rows = {}
        for name, guess in masks.items():
            pair = (guess, truth, data.spacing(case), data.scored)
            rows[name] = metrics.evaluate_case(case, *pair, ignore=data.ignore)
        others = {n: tables.nan_mean(np.array([r["dice"] for r in rows[n]])) for n in masks if n}
        objects = data.instances(case) if len(data.classes) == 1 else None
        if objects is not None:  # predicted objects are the 4-connected pieces of the mask
            others |= metrics.object_scores(mask > 0, objects)  # D8
            others["AJI of perfect masks"] = metrics.object_scores(truth == 1, objects)["AJI"]
        counts = metrics.class_counts(mask, truth, len(data.classes) + 1, data.ignore)
        scores[case] = (rows[""], counts, others)
        file = out / "predictions" / f"{case}.png"
        loaders.write_png_mask(file, values[mask], values.tolist())
        if case in cases[:4]:
            shown = {"truth": np.where(truth == data.ignore, 0, truth), "prediction": mask}
            picture = image.transpose(1, 2, 0)
            figures.case(out / "figures" / file.name, picture, shown, (1, 1), data.classes, case)
    return ranks.merge(scores)


def evaluate(network: Network, data: Any, ranks: Ranks, out: Path) -> int:
    """Score a split: print the table and what stands beside it, write metrics, masks, pictures."""
    config, record = network.config, network.record
    cases = loaders.cases_to_score(data, config.split, config.limit)
    loaders.check_alike(record, data)
    seen = loaders.check_unseen(record, data, cases, config.split)
    begin = time.perf_counter()
    rule = None
    learnt = record["cases"]["train"]
    if record["name"] == data.name:  # the floor by colour learns from the same labelled images
        pairs = [(data.image(case), data.label(case)) for case in learnt]
        rule = metrics.colour_rule(pairs, len(data.classes) + 1)
    scores = score_cases(network, data, cases, ranks, out, rule)
    if not ranks.first:
        return 0
    rows = [row for case in cases for row in scores[case][0]]
    part = "whole network" if config.supervised else "classifier"
    say(
        f"\n{config.split} split of {data.name}{seen}, {len(cases)} images, "
        f"{time.perf_counter() - begin:.0f} s\n{config.method}, {part} of seed {config.seed} after "
        f"{network.step} steps on {len(learnt)} labelled images\n\n{tables.report(out, rows)}\n"
    )
    dice = tables.summarise(rows)["mean"]["dice"]["mean"]
    lines = {"d / (2 - d) of the mean Dice": metrics.iou_from_dice(dice)}
    lines["mIoU with background"] = metrics.miou(sum(scores[case][1] for case in cases))
    others = [{"case": case, **scores[case][2]} for case in cases]
    for name in list(others[0])[1:]:
        lines[name] = tables.nan_mean(np.array([row[name] for row in others]))
    say("\n".join(f"{name:<30} {value:.3f}" for name, value in lines.items()))
    tables.write_metrics_csv(out / "others.csv", others, list(others[0]))
    if record["pretrained_on"]:
        saw = loaders.seen_cases(record["pretrained_on"], data, cases)
        say(f"note: pre-training saw {len(saw)} of these images, without labels")
    shared = loaders.shared_patients(data, cases, learnt)
    if shared:
        say(f"note: {shared} patients are among the labelled images, too")
    say(f"\nmasks, pictures and tables are in {out}")
    return 0


# ==================================================================================================
# Predict
# ==================================================================================================


def predict(network: Network, ranks: Ranks) -> int:
    """Write masks for images of any size, as PNG: 0 and 255, or a palette of several classes."""
    config = network.config
    if not config.image or not config.output:
        raise InputError("predict needs --image FILE... (or a folder) and --output FILE or FOLDER")
    scans = loaders.Scans(config.image, config.output, network.record, config.overwrite)
    for note in scans.notes:
        say(note, ranks)
    for scan in scans.share(ranks.rank, ranks.world):
        if scan.note:
            say(scan.note)
        prob = network.segment_image(scan.image, scan.name)
        # Where the training images were made smaller, the probabilities are enlarged again. There
        # the largest becomes the mask, with the label values of the data's publisher.
        mask = scan.mask(prob)
        maps = {}
        if config.save == "maps":
            maps = {name: scan.map(prob[value]) for name, value in scan.classes.items()}
        line = scan.save(mask, maps)
        say(line + (f"; probabilities in {scan.target.parent / 'maps'}" if maps else ""))
    scans.finish([fault for part in ranks.gather(scans.faults) for fault in part])
    return 0


# ==================================================================================================
# Command line
# ==================================================================================================

VERBS = {
    "": ("run", "model", "train", "speed", "segment", "evaluate"),
    "pretrain": ("run", "model", "train", "speed"),
    "segment": ("run", "model", "train", "speed", "segment", "use"),
    "evaluate": ("run", "use", "evaluate"),
    "predict": ("run", "use", "predict"),
}


def pretrained(config: Config, given: dict[str, Any], ranks: Ranks) -> tuple[Config, Any]:
    """Return the config with the network of --init or, without it, of the run, and its checkpoint.

    It is read once, by rank 0, and sent without the optimiser. A public file tells its width alone.
    """
    if config.init:
        start: Any = runtime.read_start(config.init, SCRIPT, ranks)
    else:
        path = runtime.checkpoint_file(config.checkpoint, config.run_folder)
        start = runtime.read_once(path, SCRIPT, ranks)
        if start["config"]["method"] == "unet" or "blocks" in start["data"]:
            raise InputError(f"{path} is no pre-trained network; name one by --checkpoint")
    names = flags.names(Config, "model")
    saved = {name: start["config"][name] for name in names if name in start["config"]}
    for name, value in saved.items():
        if given.get(name, value) != value:
            raise InputError(
                f"{flags.word(name)} is {flags.text(given[name])}, the pre-trained network has "
                f"{flags.text(value)}; leave it out, or name another --checkpoint"
            )
    return replace(config, **saved), start


def segmented(config: Config) -> str:
    """Return --checkpoint, or the only trained segmentation of the run, controls left aside."""
    folders = sorted(file.parent for file in config.run_folder.glob("segment-*/last.pt"))
    chosen = [folder for folder in folders if "-none-" not in folder.name] or folders
    if config.checkpoint or len(chosen) == 1:
        return config.checkpoint or str(chosen[0])
    names = ", ".join(folder.name for folder in chosen) or "none"
    raise InputError(
        f"{config.run_folder} holds {len(chosen)} trained segmentations ({names}); run segment, or "
        "name one by --checkpoint"
    )


def load_network(given: dict[str, Any], ranks: Ranks) -> Network:
    """Return the segmentation that the flags name."""
    path = segmented(flags.configure(Config, PRESETS, given))
    if "checkpoint" not in given:  # then --out says where the segmentation is
        given = {**given, "checkpoint": path, "out": path}
    config, state = runtime.load_trained(Config, PRESETS, given, SCRIPT, ranks)
    config = replace(config, **{n: state["config"][n] for n in flags.names(Config, "segment")})
    record = state["data"]
    if not config.supervised and "classifier" not in state:
        raise InputError(f"{path} is a pre-trained network; run segment first")
    model = network_for(config, record, config.supervised)
    model.load_state_dict(state["ema"] or state["model"])
    features = features_of(config, model, ranks)
    classifier = None
    if not config.supervised:
        widths = features.widths(config.crop)
        norm = config.classifier_norm == "batch"
        classifier = PixelClassifier(widths, len(record["classes"]) + 1, norm)
        classifier.load_state_dict(state["classifier"])
        classifier.to(ranks.device).eval()
    return Network(config, features, classifier, record, ranks.device, state["step"])


def load(path: str, device: str = "auto") -> Network:
    """Return the segmentation of a checkpoint, for its predict_array."""
    return load_network({"checkpoint": str(path), "quiet": True}, runtime.start(device))


def story(config: Config, given: dict[str, Any], data: Any, ranks: Ranks, start: Any) -> int:
    """Pre-train, segment and evaluate; on fake tissue also the same network with random weights."""
    images = loaders.cases_to_score(data, config.split, config.limit)  # are there any?
    cases, _ = labelled_cases(data, config.labels, config.labels_file)
    learns = config.method in ("mdm", "ddpm")
    rows = [config]
    if config.data == "synthetic" and learns and not config.finetune:
        rows.append(replace(config, method="none", target="auto", loss="auto"))
    total = len(rows) + learns
    share = config.batch // (ranks.world * config.accumulate)
    size = (share, len(data.channels), config.crop, config.crop)
    dtype, _ = runtime.autocast_dtype(config.amp, ranks.device)
    model = network_for(config, loaders.data_record(data))
    crop = runtime.pass_seconds(model, size, dtype, ranks.device) / share
    steps = config.finetune_steps or (config.stop_epoch + 22) * len(cases)
    crops = 3 * config.steps * config.batch / ranks.world + len(rows) * (steps + 10 * len(images))
    say(f"{total} trainings and their scores, about {runtime.duration(crop * crops)} in all", ranks)

    if learns:
        say(f"\n1 of {total}: pre-training, {config.steps} steps", ranks)
        code = train(config, data, ranks, start=start)
        if code:
            return code
        rows[0], start = pretrained(replace(config, init=""), {}, ranks)
    for number, row in enumerate(rows, 1 + learns):
        say(f"\n{number} of {total}: segment, method {row.method}", ranks)
        code = segment(row, data, ranks, None if row.method == "none" else start)
        if code:
            return code
        scored = replace(row, out=str(row.segment_folder))
        if not runtime.is_scored(scored, given, ranks):
            trained = load_network({**given, "checkpoint": scored.out}, ranks)
            evaluate(trained, data, ranks, runtime.scores_folder(scored))
    return 0


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n\n")[0]
    verb, given = flags.parse(Config, argv, VERBS, PRESETS, about)
    ranks = runtime.start(given.get("device", "auto"))
    if verb == "predict":
        return predict(load_network(given, ranks), ranks)
    if verb == "evaluate":
        network = load_network(given, ranks)
        data = loaders.open_data(network.config.data, "images")
        other = data.name if data.name != network.record["name"] else ""
        return evaluate(network, data, ranks, runtime.scores_folder(network.config, other))

    config = flags.configure(Config, PRESETS, given)
    config = runtime.share_batch(config, given, ranks)
    data = loaders.open_data(config.data, "images")
    learns = config.method in ("mdm", "ddpm")
    if verb == "pretrain" and not learns:
        raise InputError(f"--method {config.method} has no pre-training; use the verb segment")
    start: Any = None
    if config.init or (verb == "segment" and learns):
        config, start = pretrained(config, given, ranks)
    if verb == "pretrain":
        return train(config, data, ranks, start=start)
    last = len(config.channel_mult) * (config.num_res_blocks + 1) - 1
    if max(config.blocks, default=last + 1) > last and not config.supervised:
        raise InputError(f"--blocks is {flags.text(config.blocks)}; this network has 0 to {last}")
    if verb == "segment":
        return segment(config, data, ranks, start)
    return story(config, given, data, ranks, start)


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
