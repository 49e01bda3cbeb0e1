"""MDM: pre-train a U-Net by filling in masked tiles, then label pixels from its features with a few examples.

Paper
    Z. Pan, J. Chen, Y. Shi: Masked Diffusion as Self-supervised Representation Learner. arXiv 2308.05695v4.

Idea
    A diffusion model's decoder holds features that tell tissue apart, and they can be learned without labels. MDM drops
    the diffusion and keeps its network: a random share t / T of the image's tiles is hidden, the network is told t and
    restores the whole image, and the loss is structural similarity instead of squared error. Then the network is
    frozen. The maps of some middle decoder blocks, enlarged to the image's size, give each pixel a vector, and a small
    network of three layers learns the classes from the pixels of a few labelled images. Noise instead of masks
    (--method ddpm) and a masked autoencoder (mae) are the paper's rivals; a supervised U-Net (unet) is the baseline.

Symbols
    x_0        x0    [B, 3, H, W]      image, uint8 / 127.5 - 1, in [-1, 1]
    t          t     [B]               0..T-1, uniform; ratio t / T of the tiles is hidden
    p, L       tile, tiles             side of a tile in pixels; H W / p^2 tiles, of which L (T - t) // T stay
    x_t        xt    [B, 3, H, W]      image with hidden tiles at 0 (mid grey), or with noise
    eps        eps   [B, 3, H, W]      standard normal noise (ddpm)
    abar_t     abar[t]                 product of 1 - beta_s for s = 0..t
    f_theta    model(x_t, t)           the network: restored image (mdm), noise (ddpm)
    f_k        maps                    output of decoder block k, [B, C m_k, h_k, w_k]
    D          sum of channels         of all maps and times: the length of a pixel's vector

Equations
    (1) q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)
    (3) L = || eps - eps_theta(x_t, t) ||^2
    (4) L = (1 - SSIM(x_0, f_theta(x_t, t))) / 2,
        SSIM(x, y) = (2 mu_x mu_y + c1) (2 sigma_xy + c2) / ((mu_x^2 + mu_y^2 + c1) (sigma_x^2 + sigma_y^2 + c2))
    (5) L = cross-entropy of the pixel classifier
    Equation 2 is the posterior of a reverse process, which nothing here needs.

Differs
    D1  SSIM is the public code's: 5 x 5 Gaussian window, zero padding, c1 and c2 for a range of 1 although the image
        spans 2, and no gradient where SSIM < 0. On signed data it cannot tell an image from its negative: `reconstruct`
        prints the share of sign-flipped blocks, and on GlaS the features came out worse than random ones (README).
        --ssim-range unit is the correct form, which the small presets use.
    D2  tiles are hidden when features are taken, too, as in the public code (the text suggests the intact image); the
        mask is a function of (run, image, window, epoch), the public one is not seeded. --feature-mask off is the text.
    D3  ddpm: no learned variance; one noise image for all windows in training and test (public: fresh in the test).
    D4  the average of the weights warms up, d = min(ema, (1 + n) / (10 + n)); without it the paper's 10,000 steps leave
        37 % of the initial weights in it.
    D5  --method unet is this very network with random weights and classes as outputs, trained on whole crops; for equal
        time give it the --steps or --minutes of the pre-training.
    D6  --method mae has our crops and flips; --vit small fits the small presets. ssim: un-patchified, not normalised.
    D7  a classifier's first layer works on the native maps and its result is enlarged: W up(f) + b = up(W f) + b. The
        same numbers without the enlarged features, of which 20 images of FFHQ take 17 to 89 GB.
    D8  scores are means over images of Dice and IoU; the paper's IoU on GlaS is d / (2 - d) of the mean Dice d
        (iou_from_dice) and its AJI on MoNuSeg is the foreground's IoU (aji_binary). Real AJI stands beside it.
    D9  run r seeds crops, masks and classifier; the labelled images are the same in all runs (--draw). SD with ddof 1.
    D10 small images are reflected to the size of a crop; any batch size works (public: endless loop below 128 images).
    D11 the small presets: narrow network, larger learning rate, small crops (tiny: few classifier steps); D1, D14, D15.
        A crop of 64 pixels has a 16th of the pixels that a step of the classifier has in the paper; where its last
        weights depend on the last crop (MoNuSeg), --crops 16 evens that out.
    D12 FFHQ with ddpm: blocks 5, 6, 7, 8, 12, as in the public settings; the paper says 5 to 12.
    D13 --checkpoint none draws the layers too that a new network starts at zero: else all features were linear in the
        image and blind to t, no test of what pre-training adds.
    D14 --feature-norm standard (small presets) takes out each channel's mean and SD on the labelled images. The mean of
        a trained feature is several times its SD: a step of Adam then shifts the first layer's output by more than it
        varies, and batch norm's running averages, which prediction uses, lag behind.
    D15 --classifier-norm none (small presets) leaves batch norm out: in training it normalises each crop by its own
        pixels, in prediction all by running averages over the last crops. Weights are then drawn by He et al. instead
        of with SD 0.02, which needs the norm.

Usage
    python masked_diffusion.py                                    all of it on fake tissue: pre-train, segment, score
    python -m data_prep.glas --src GlaS --dst data/glas-small --reduce 4      a quarter of the width, for laptops
    python masked_diffusion.py pretrain --data glas-small --preset laptop
    python masked_diffusion.py segment --data glas-small --preset laptop --labels 8 --split testA
    python masked_diffusion.py segment --data glas-small --preset laptop --labels 8 --split testA --checkpoint none
    python masked_diffusion.py segment --data glas-small --preset laptop --labels 8 --split testA --method unet
    python masked_diffusion.py evaluate --data glas-small --preset laptop --labels 8 --split testA
    python masked_diffusion.py predict --data glas-small --preset laptop --labels 8 --image slide.png --output mask.png
    python masked_diffusion.py reconstruct --data glas-small --preset laptop --ratio 0.25,0.5,0.75
    python masked_diffusion.py cluster --data glas-small --preset laptop --blocks 5,8,12
    python masked_diffusion.py probe --data cifar-10-batches-py --out RUN   RUN: see results/mdm_table8_cifar.sh
    torchrun --nproc_per_node=4 masked_diffusion.py --data glas --accumulate 4   the paper's setting, 25 GB a GPU

Expect
    The bare run takes four minutes on two cores of a server CPU, most of it pre-training, and prints the scores of ten
    unseen sections, with 8 labels: mean Dice 0.66, SD over three classifiers 0.06, beside 0.61 (0.08) of the same
    network with random weights, 0.43 of calling all foreground and 0.42 of colour alone. After 150 steps the first was
    0.58: pre-training needs its time, on real images thousands of steps (results/mdm_glas.md).
"""

import copy
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.cluster.vq import kmeans2
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
    EmbedSequential,
    FeatureStore,
    GroupNorm,
    PixelClassifier,
    ResBlock,
    conv,
    fast_layout,
    load_public,
    redraw_zeros,
    timestep_embedding,
    zero_module,
)

SCRIPT = "masked_diffusion"
T = 1000  # levels of masking or noise; t = 0..T-1 throughout this file
LOG_EVERY = 50  # steps
WINDOWS = 256 * 256  # pixels of the windows that pass a frozen network together: one of the paper's
PATIENCE = {
    "medical": 20,
    "natural": 50,
}  # a classifier is done at miss 21 (epochs) or 51 (steps) in a row
NATURAL = ("ffhq34", "celeba19")  # data sets that get the natural-image settings

# =====================================================================================================================
# Config
# =====================================================================================================================


@dataclass(frozen=True)
class Config:
    """All flags. The defaults are the paper's on GlaS and MoNuSeg (`--preset paper`)."""

    # fmt: off
    data: str = flag("synthetic", "`synthetic`, a name below data/, a prepared folder, or CIFAR-10's folder")
    preset: Literal["tiny", "laptop", "paper"] = flag("paper", "defaults of all other flags; tiny for synthetic data")
    out: str = flag("", "run folder; empty: runs/masked_diffusion-DATA-PRESET")
    init: str = flag("", "pretrain: start from these weights: one of our checkpoints or a public state dict")
    overwrite: bool = flag(False, "throw the run folder's old contents away")
    quiet: bool = flag(False, "no progress bars; one line at each evaluation")
    seed: int = flag(0, "of weights, crops, masks, noise; of the first run in segment")
    device: str = flag("auto", "auto | cpu | cuda | cuda:N")
    amp: Literal["auto", "bf16", "fp16", "off"] = flag("auto", "number format of convolutions (public code: fp16)")
    compile: bool = flag(False, "torch.compile the training network")
    recompute: bool = flag(False, "keep block inputs only for backward: less memory, x 4/3 time")
    workers: int = flag(4, "processes that load crops, per rank; 0: in the training process")
    # network (guided-diffusion's)
    num_channels: int = flag(192, "width C of the first level (public FFHQ network: 256)")
    channel_mult: tuple[int, ...] = flag((1, 1, 2, 2, 4, 4), "width of each level in units of C")
    num_res_blocks: int = flag(2, "residual blocks a level")
    num_groups: int = flag(32, "groups of each group norm")
    num_head_channels: int = flag(64, "channels of an attention head")
    attention_resolutions: tuple[int, ...] = flag((8, 16, 32), "downsampling factors of maps with attention")
    vit: Literal["large", "small"] = flag("large", "mae: ViT-L (paper), or width 192, 8 blocks")
    # pre-training (section 4.1)
    method: Literal["mdm", "ddpm", "mae", "unet"] = flag("mdm", "pre-training; segment: unet is the supervised row")
    target: Literal["auto", "eps", "x0"] = flag("auto", "ddpm: what is predicted; auto: eps (mdm, mae: the image)")
    loss: Literal["auto", "ssim", "mse", "l1"] = flag("auto", "auto: ssim for mdm, mse for ddpm and mae")
    ssim_window: int = flag(5, "side of the Gaussian window (public code: 5; Wang et al.: 11)")
    ssim_L: float = flag(1.0, "range of the pixel values in c1 and c2 (public code: 1, data in [-1, 1]: 2)")
    ssim_range: Literal["signed", "unit"] = flag("signed", "unit: of (x + 1) / 2, without the cut at SSIM 0 (D1)")
    schedule: Literal["cosine", "linear"] = flag("cosine", "ddpm: betas (paper: cosine; FFHQ: linear)")
    tile: int = flag(8, "side of a tile in pixels (paper: 8; 4 and 16 in table 7)")
    ratio: tuple[float, ...] = flag((), "masked shares; empty: mae 0.75, reconstruct 0.25,0.5,0.75")
    fixed_t: int = flag(-1, "always this t, and in features too (table 3: ddpm 250, mdm 50); -1: random")
    crop: int = flag(256, "side of crops and windows in pixels (paper: 256)")
    pretrain_on: Literal["all", "train"] = flag("all", "images of pre-training; the paper's include the test images")
    steps: int = flag(10_000, "optimisation steps (paper: 10,000; FFHQ 100,000); also of --method unet")
    minutes: float = flag(0.0, "stop after so many minutes of training; 0: no limit")
    batch: int = flag(128, "crops a step, over all processes and accumulation (paper: 128)")
    accumulate: int = flag(1, "split the batch into so many parts, one after the other")
    lr: float = flag(0.0, "learning rate; 0: 1e-4, or mae 1.5e-4 batch / 256 with warm-up and cosine (paper)")
    grad_clip: float = flag(0.0, "largest gradient norm; 0: off (paper: none)")
    ema: float = flag(0.9999, "decay of the averaged weights; 0: off (paper: 0.9999)")
    eval_every: int = flag(1000, "steps between reconstructions of the same crops")
    save_every: int = flag(500, "steps between saves")
    # features (section 4.2)
    checkpoint: str = flag("", "segment: pre-trained weights, ours, public or `none`; evaluate, predict: a run")
    init_weights: Literal["ema", "raw"] = flag("ema", "segment: averaged or last pre-trained weights")
    protocol: Literal["auto", "medical", "natural"] = flag("auto", "natural: settings of FFHQ-34 and CelebA-19")
    blocks: tuple[int, ...] = flag((), "decoder blocks of features; empty: 8-12 medical, 5-12 natural; mae: last half")
    feature_t: tuple[int, ...] = flag((), "times of features; empty: mdm 50, ddpm 250, natural ddpm 50,150,250")
    feature_mask: Literal["on", "off"] = flag("on", "mdm: features of the masked image, or of the intact one (D2)")
    feature_norm: Literal["auto", "l2", "rms", "none", "standard"] = flag(
        "auto", "what divides a window's features; standard: mean and SD of each channel (D14); auto: medical l2"
    )
    share_noise: Literal["on", "off"] = flag("on", "ddpm: one noise image for all features (D3)")
    # classifier
    labels: int = flag(8, "labelled training images (GlaS: 8 and 85; FFHQ-34 and CelebA-19: 20); 0: all")
    draw: str = flag("first", "which ones: `first` by name (paper), or a number K that seeds a draw")
    runs: int = flag(10, "classifiers of different seeds, mean and SD over them (paper: 10)")
    ensemble: int = flag(0, "members of a run that vote; 0: medical 1, natural 10 (paper)")
    pixels: int = flag(0, "pixels a step; 0: medical all of a crop (paper: 65,536), natural 64")
    crops: int = flag(1, "crops a step (paper: 1; public settings of MoNuSeg: 16)")
    stop: Literal["auto", "medical", "natural", "steps"] = flag("auto", "when a classifier is done; auto: --protocol's")
    stop_epoch: int = flag(40, "stop medical: epochs 0 to this one do not count (GlaS: 40, MoNuSeg: 30)")
    stop_loss: Literal["last", "epoch"] = flag("last", "stop medical: of the last batch (public code), or the mean")
    classifier_steps: int = flag(200, "stop steps: so many steps")
    classifier_lr: float = flag(1e-3, "learning rate of Adam (paper: 1e-3)")
    classifier_norm: Literal["batch", "none"] = flag("batch", "batch norm after its two hidden layers (D15)")
    # evaluation and use
    split: str = flag("test", "which cases: a split's name")
    limit: int = flag(0, "at most so many cases; 0: all")
    save_members: bool = flag(False, "segment, evaluate: write each run's masks, not the first run's alone")
    save_maps: bool = flag(True, "predict: write probabilities and an overlay beside each mask")
    image: tuple[str, ...] = flag((), "predict: PNG, JPG, BMP or TIF files, or one folder")
    output: str = flag("", "predict: file (for one image) or folder")
    k: int = flag(5, "cluster: number of clusters")
    # fmt: on

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{SCRIPT}-{Path(self.data).name}-{self.preset}")

    @property
    def segment_folder(self) -> Path:
        kind = "-unet" if self.method == "unet" else "-random" if self.checkpoint == "none" else ""
        drawn = "" if self.draw == "first" else f"-draw{self.draw}"
        return self.run_folder / f"segment-{self.labels or 'all'}{kind}{drawn}"

    @property
    def natural(self) -> bool:
        return self.protocol == "natural" or (
            self.protocol == "auto" and Path(self.data).name in NATURAL
        )

    @property
    def predicts(self) -> str:
        """What the network's output is: the image (x0) or the noise (eps)."""
        return self.target if self.target != "auto" else "eps" if self.method == "ddpm" else "x0"

    @property
    def loss_kind(self) -> str:
        return self.loss if self.loss != "auto" else "ssim" if self.method == "mdm" else "mse"

    @property
    def times(self) -> tuple[int, ...]:
        """t of the features, one forward pass each; a ViT and a supervised network have one pass without t."""
        if self.method in ("mae", "unet"):
            return (0,)
        default = (50,) if self.method == "mdm" else (50, 150, 250) if self.natural else (250,)
        return self.feature_t or ((self.fixed_t,) if self.fixed_t >= 0 else default)

    @property
    def taps(self) -> tuple[int, ...]:
        """Decoder blocks whose outputs are features, counted from the lowest; of a ViT its encoder blocks."""
        if self.method == "mae":
            depth = VIT[self.vit]["depth"]
            return self.blocks or tuple(range(depth // 2, depth))
        if self.natural:
            return self.blocks or (
                (5, 6, 7, 8, 12) if self.method == "ddpm" else tuple(range(5, 13))
            )  # D12
        return self.blocks or (8, 9, 10, 11, 12)

    @property
    def norm(self) -> str:
        return (
            self.feature_norm if self.feature_norm != "auto" else "none" if self.natural else "l2"
        )

    @property
    def members(self) -> int:
        return self.ensemble or (10 if self.natural else 1)

    @property
    def stops(self) -> str:
        return self.stop if self.stop != "auto" else "natural" if self.natural else "medical"

    def __post_init__(self) -> None:
        """Ranges and the rules between flags; InputError names the flag."""
        for name in (
            "num_channels",
            "num_res_blocks",
            "num_groups",
            "num_head_channels",
            "tile",
            "crop",
            "batch",
        ):
            runtime.check_range(self, name, 1)
        for name in (
            "accumulate",
            "steps",
            "eval_every",
            "save_every",
            "runs",
            "crops",
            "classifier_steps",
            "k",
        ):
            runtime.check_range(self, name, 1)
        for name in (
            "minutes",
            "grad_clip",
            "workers",
            "limit",
            "seed",
            "labels",
            "ensemble",
            "pixels",
        ):
            runtime.check_range(self, name, 0)
        for name, high in (
            ("lr", 1),
            ("ema", 0.999999),
            ("feature_t", T - 1),
            ("stop_epoch", 5000),
        ):
            runtime.check_range(self, name, 0, high)
        for name in ("classifier_lr", "ssim_L"):
            runtime.check_range(self, name, 0, 10, open_low=True)
        runtime.check_range(self, "ratio", 0, 0.999, open_low=True)
        runtime.check_range(self, "fixed_t", -1, T - 1)
        runtime.check_range(self, "ssim_window", 3)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(
                f"--device is {self.device}, expected auto, cpu, cuda or cuda:N; correct the flag"
            )
        if not re.fullmatch(r"first|\d+", self.draw):
            raise InputError(
                f"--draw is {self.draw}, expected `first` or a number; correct the flag"
            )
        if self.ssim_window % 2 == 0:
            raise InputError(
                f"--ssim-window is {self.ssim_window}, expected an odd number; use {self.ssim_window + 1}"
            )
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise InputError(
                f"--channel-mult is {self.channel_mult}, expected whole numbers of 1 or more"
            )
        levels = len(self.channel_mult)
        step = 2 ** (levels - 1) if self.method != "mae" else 1
        for word, n in (
            ("--tile", self.tile),
            (f"the network of {levels} levels (--channel-mult)", step),
        ):
            if self.crop % n:
                raise InputError(
                    f"--crop {self.crop} is not a multiple of {n}, which {word} asks for; change either"
                )
        for i, m in enumerate(self.channel_mult):
            width = self.num_channels * m
            if width % self.num_groups:
                raise InputError(
                    f"--num-groups {self.num_groups} does not divide the width {width}; choose a divisor"
                )
            attends = 2**i in self.attention_resolutions or i == levels - 1
            if attends and width % self.num_head_channels and self.method != "mae":
                raise InputError(f"--num-head-channels {self.num_head_channels} does not divide the {width} channels "
                                 "of an attention; choose a divisor")  # fmt: skip
        if self.predicts == "eps" and (self.method != "ddpm" or self.loss_kind == "ssim"):
            raise InputError(
                "--target eps belongs to --method ddpm with --loss mse or l1: noise has no structure"
            )
        if self.blocks:
            check_blocks(self)


SMALL: dict[str, Any] = {
    "num_channels": 32,
    "vit": "small",
    "tile": 4,
    "lr": 3e-4,
    "ema": 0.999,
    "workers": 0,
}  # D11
SMALL |= {
    "ssim_range": "unit",
    "feature_norm": "standard",
    "classifier_norm": "none",
}  # D1, D14, D15
LAPTOP: dict[str, Any] = {
    "crop": 64,
    "batch": 16,
    "steps": 3000,
    "eval_every": 500,
    "save_every": 100,
    "runs": 3,
}
TINY: dict[str, Any] = {
    "crop": 64,
    "batch": 8,
    "steps": 400,
    "lr": 1e-3,
    "ema": 0.99,
    "eval_every": 100,
    "save_every": 100,
    "runs": 3,
}
TINY |= {"stop": "steps", "grad_clip": 1.0}
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "laptop": SMALL | LAPTOP, "tiny": SMALL | TINY}

# =====================================================================================================================
# Model
# =====================================================================================================================


class UNet(nn.Module):
    """guided-diffusion's U-Net: residual blocks that also resample, attention at coarse maps, concatenated skips.

    Called as model(x, t): x [B, C_in, H, W] with sides that are multiples of 2^(levels - 1), t [B] in 0..T-1; returns
    [B, C_out, H, W]. Parameter names are the public code's.
    """

    def __init__(self, config: Config, in_channels: int, out_channels: int):
        super().__init__()
        c, groups = config.num_channels, config.num_groups
        self.width, self.recompute = c, config.recompute
        self.time_embed = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))

        def block(a: int, b: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
            return ResBlock(2, a, b, 4 * c, groups, scale_shift=True, resample=resample)

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, config.num_head_channels, groups)

        # Encoder. Every block's output is a skip; each level but the last ends with a block that halves the map.
        self.input_blocks = nn.ModuleList([EmbedSequential(conv(2, in_channels, c))])
        skips, width = [c], c  # widths
        for level, m in enumerate(config.channel_mult):
            attends = 2**level in config.attention_resolutions
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [block(width, c * m)]
                if attends:
                    layers.append(attention(c * m))
                self.input_blocks.append(EmbedSequential(*layers))
                width = c * m
                skips.append(width)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(EmbedSequential(block(width, width, "down")))
                skips.append(width)
        self.middle_block = EmbedSequential(
            block(width, width), attention(width), block(width, width)
        )

        # Decoder: block k = output_blocks[k], the numbers of the paper; the last of a level doubles the map.
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [block(width + skips.pop(), c * m)]
                width = c * m
                if 2**level in config.attention_resolutions:
                    layers.append(attention(width))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(block(width, width, "up"))
                self.output_blocks.append(EmbedSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm(groups, width), nn.SiLU(), zero_module(conv(2, width, out_channels))
        )

    def run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(
                block, x, emb, use_reentrant=False, preserve_rng_state=False
            )  # no dropout here
        return block(x, emb)

    def trunk(
        self, x: Tensor, t: Tensor, blocks: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The last decoder block's output and the outputs of `blocks`; with blocks it stops after the last of them."""
        emb = self.time_embed(timestep_embedding(t, self.width))  # [B, 4C]
        skips, maps = [], {}
        for block in self.input_blocks:
            x = self.run(block, x, emb)  # [B, C m, H / 2^level, W / 2^level]
            skips.append(x)
        x = self.run(self.middle_block, x, emb)
        for k, block in enumerate(self.output_blocks):
            x = self.run(block, torch.cat([x, skips.pop()], dim=1), emb)
            if k in blocks:
                maps[k] = x
                if k == max(blocks):
                    break
        return x, [maps[k] for k in blocks]

    def features(self, x: Tensor, t: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        return self.trunk(x, t, blocks)[1]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.trunk(x, t)[0])  # [B, C_out, H, W]


VIT: dict[str, dict[str, int]] = {
    "large": {
        "width": 1024,
        "depth": 24,
        "heads": 16,
        "decoder_width": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
    },
    "small": {
        "width": 192,
        "depth": 8,
        "heads": 6,
        "decoder_width": 128,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
}
IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and SD of the pixel values in [0, 1]


class VitBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, N, width] -> the same
        b, n, c = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(b, n, 3, self.heads, c // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, c / heads]
        x = x + self.proj(h.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


@cache
def positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Fixed sine-cosine positions of a grid, row-major: [1, rows columns, width]; columns and sines come first."""
    freq = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(
        torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij"
    )
    parts = [
        f(axis.reshape(-1, 1) * freq) for axis in (x, y) for f in (torch.sin, torch.cos)
    ]  # each [L, width / 4]
    return torch.cat(parts, dim=1).float()[None].to(device)


class Mae(nn.Module):
    """Masked autoencoder of He et al. 2022: a ViT encodes the visible tiles, a small one restores all of them.

    Called as model(x, mask, keep): x [B, 3, H, W] in [-1, 1], mask [B, h, w] bool, True = hidden; keep: how many tiles
    of each image are not.
    Returns [B, L, p p 3]: the pixels of each tile, row-major, colours last. cls: a token without place, as published.
    """

    def __init__(self, config: Config, channels: int):
        super().__init__()
        v, p = VIT[config.vit], config.tile
        width, dec = v["width"], v["decoder_width"]
        self.tile, self.recompute = p, config.recompute
        self.patch_embed = nn.Conv2d(channels, width, p, stride=p)
        self.cls_token, self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, 1, dec)),
        )
        self.blocks = nn.ModuleList(VitBlock(width, v["heads"]) for _ in range(v["depth"]))
        self.norm, self.decoder_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(dec, eps=1e-6)
        self.decoder_embed = nn.Linear(width, dec)
        self.decoder_blocks = nn.ModuleList(
            VitBlock(dec, v["decoder_heads"]) for _ in range(v["decoder_depth"])
        )
        self.decoder_pred = nn.Linear(dec, p * p * channels)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.data.view(width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, L, width] with positions, and the grid (rows, columns) of tiles."""
        x = self.patch_embed(imagenet(x))  # [B, width, h, w]
        grid = x.shape[2], x.shape[3]
        return x.flatten(2).transpose(1, 2) + positions(*grid, x.shape[1], x.device), grid

    def features(self, x: Tensor, t: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Outputs of encoder blocks as maps [B, width, h, w]: all tiles visible, no final norm, without cls."""
        x, grid = self.tokens(x)
        x, maps = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1), {}
        for k, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = block(x)
            maps[k] = x[:, 1:].transpose(1, 2).unflatten(2, grid)
        return [maps[k] for k in blocks]

    def forward(self, x: Tensor, mask: Tensor, keep: int) -> Tensor:
        x, grid = self.tokens(x)
        order = (
            mask.flatten(1).long().argsort(dim=1, stable=True)
        )  # visible tiles first, in their own order
        seen = order[:, :keep]  # [B, keep]
        x = x.gather(1, seen[..., None].expand(-1, -1, x.shape[2]))  # [B, keep, width]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = self.run(block, x)
        x = self.decoder_embed(self.norm(x))  # [B, 1 + keep, dec]
        full = self.mask_token.to(x.dtype).repeat(len(x), order.shape[1], 1)  # [B, L, dec]
        full = full.scatter(1, seen[..., None].expand(-1, -1, x.shape[2]), x[:, 1:])
        x = torch.cat([x[:, :1], full + positions(*grid, x.shape[2], x.device)], dim=1)
        for block in self.decoder_blocks:
            x = self.run(block, x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # [B, L, p p 3]


@cache
def imagenet_values(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and SD of ImageNet's pixels, each [1, 3, 1, 1]."""
    mean, sd = (torch.tensor(v, device=device).reshape(1, -1, 1, 1) for v in IMAGENET)
    return mean, sd


def imagenet(x: Tensor) -> Tensor:
    """[-1, 1] -> zero mean and unit SD of ImageNet's pixels, what published autoencoders are fed."""
    mean, sd = imagenet_values(x.device)
    return ((x + 1) / 2 - mean) / sd


def patchify(x: Tensor, p: int) -> Tensor:
    """[B, C, H, W] -> [B, L, p p C]: row-major tiles, row-major pixels, channels last."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


def unpatchify(x: Tensor, p: int, grid: Sequence[int]) -> Tensor:
    """The inverse of `patchify` for a grid of (rows, columns) tiles."""
    return (
        x.reshape(len(x), *grid, p, p, -1)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(len(x), -1, grid[0] * p, grid[1] * p)
    )


def build_model(config: Config, in_channels: int, out_channels: int) -> Any:
    """The network of --method: a U-Net, or for mae a ViT (which restores its input: out_channels is in_channels)."""
    return (
        Mae(config, in_channels)
        if config.method == "mae"
        else UNet(config, in_channels, out_channels)
    )


def network_for(config: Config, record: Mapping[str, Any]) -> Any:
    """The network for data that `record` describes: 3 -> 3 channels, or 3 -> classes for the supervised row."""
    n = len(record["channels"])
    return build_model(
        config, n, len(record["classes"]) + 1 if config.method == "unet" else n
    )  # D5


def check_memory(config: Config, record: Mapping[str, Any], ranks: Ranks) -> None:
    """InputError where a step of the U-Net needs more memory than is free: counted on tensors without storage."""
    device, share = ranks.device, config.batch // ranks.world
    dtype, batch = (
        runtime.number_format(config.amp, device)[0] or torch.float32,
        share // config.accumulate,
    )
    if config.method == "mae" or config.recompute:
        return
    with torch.device("meta"):
        model = network_for(config, record).to(dtype).train()
        x = torch.empty(batch, len(record["channels"]), config.crop, config.crop, dtype=dtype)
        maps = runtime.kept_for_backward_gb(lambda: model(x, torch.zeros(batch)))
    # Weights, their gradient, average and two moments, 4 bytes each, do not shrink with the batch.
    fixed, free = 20e-9 * sum(p.numel() for p in model.parameters()), runtime.free_memory_gb(device)
    if fixed + maps > free:
        parts = [k for k in range(config.accumulate + 1, share + 1) if share % k == 0]
        enough = [k for k in parts if fixed + maps * config.accumulate / k < 0.8 * free]
        split = f"--accumulate {enough[0]}, " if enough else ""
        raise InputError(
            f"training on {batch} crops of {config.crop} x {config.crop} needs about {fixed + maps:.1f} GB, {device} "
            f"has {free:.1f} GB free; try {split}--recompute or a smaller --num-channels"
        )


# =====================================================================================================================
# Diffusion: masks, noise, losses
# =====================================================================================================================


def kept(t: int, tiles: int) -> int:
    """Visible tiles: floor(L (1 - t / T)), in whole numbers, since the float expression errs for some t."""
    return tiles * (T - t) // T


def mae_kept(config: Config) -> int:
    """Visible tiles of a crop with --method mae."""
    return int((config.crop // config.tile) ** 2 * (1 - (config.ratio or (0.75,))[0]))


def draw_mask(rng: np.random.Generator, keep: int, grid: tuple[int, int]) -> np.ndarray:
    """[h, w] bool, True = hidden: all but the first `keep` tiles of a random permutation."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[rng.permutation(mask.size)[keep:]] = True
    return mask.reshape(grid)


def hide(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, C, H, W] with the tiles of mask [B, h, w] at 0, mid grey."""
    p = x.shape[2] // mask.shape[1]
    return x.masked_fill(mask.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None], 0.0)


@cache
def abar_table(schedule: str, device: torch.device) -> Tensor:
    """abar[t] for t = 0..T-1 in float64."""
    if schedule == "linear":
        beta = np.linspace(1e-4, 0.02, T)
    else:  # Nichol & Dhariwal: abar follows a cosine, no beta is above 0.999
        curve = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    return torch.from_numpy(np.cumprod(1 - beta)).to(device)


def roots(schedule: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) for t [B], each [B, 1, 1, 1] in fp32."""
    abar = abar_table(schedule, t.device)[t].reshape(-1, 1, 1, 1)
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def q_sample(x0: Tensor, eps: Tensor, t: Tensor, schedule: str) -> Tensor:
    """x_t from x_0 in one step."""
    a, b = roots(schedule, t)
    return a * x0 + b * eps  # eq. (1)


def corrupt(config: Config, x0: Tensor, t: Tensor, mask: Tensor, eps: Tensor | None) -> Tensor:
    """What the network is shown: the image with hidden tiles (mdm), or with noise (ddpm)."""
    if config.method == "ddpm":
        assert eps is not None
        return q_sample(x0, eps, t, config.schedule)
    return hide(x0, mask)


def restored(config: Config, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The image that a network output stands for."""
    if config.predicts == "x0":
        return output
    a, b = roots(config.schedule, t)
    return (xt - b * output) / a


@cache
def gaussian_window(side: int, device: torch.device, sigma: float = 1.5) -> Tensor:
    """[side, side] float64, of sum 1."""
    g = torch.exp(-((torch.arange(side, dtype=torch.float64) - side // 2) ** 2) / (2 * sigma**2))
    g = g / g.sum()
    return (g[:, None] * g[None, :]).to(device)


def ssim_map(x: Tensor, y: Tensor, side: int = 5, span: float = 1.0) -> Tensor:
    """SSIM of each pixel and channel, [B, C, H, W]. side: of the Gaussian window; span: range of the values.

    Zeros lie outside the image, as in the public code: near the border means and variances are too small.
    """
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    window = gaussian_window(side, x.device).to(x.dtype).expand(x.shape[1], 1, side, side)

    def local(v: Tensor) -> Tensor:
        return F.conv2d(v, window, padding=side // 2, groups=x.shape[1])

    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    return (
        (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    )  # eq. (4)


def ssim_loss(x: Tensor, y: Tensor, config: Config) -> Tensor:
    """(1 - SSIM) / 2 of images in [-1, 1], over all pixels, the visible ones too: [B] in 0..1."""
    if config.ssim_range == "unit":  # the correct form: structure cannot change its sign unseen
        return (
            ((1 - ssim_map((x + 1) / 2, (y + 1) / 2, config.ssim_window, config.ssim_L)) / 2)
            .flatten(1)
            .mean(1)
        )
    ssim = ssim_map(x, y, config.ssim_window, config.ssim_L)
    return ((1 - ssim).clamp(0, 1) / 2).flatten(1).mean(1)  # D1


def pixel_loss(kind: str, target: Tensor, output: Tensor) -> Tensor:
    """Mean over all values of the squared or absolute error: [B]."""
    error = target - output
    return (error.square() if kind == "mse" else error.abs()).flatten(1).mean(1)


def mae_loss(config: Config, output: Tensor, x0: Tensor, mask: Tensor) -> Tensor:
    """Squared error on hidden tiles, each normalised by its own mean and SD: [B]. output: [B, L, p p 3]."""
    if config.loss_kind == "ssim":
        return ssim_loss(x0, unpatchify(output, config.tile, mask.shape[1:]), config)  # D6
    target = patchify(imagenet(x0), config.tile)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = target - output
    error = (error.square() if config.loss_kind == "mse" else error.abs()).mean(2)  # [B, L]
    hidden = mask.flatten(1).float()
    return (error * hidden).sum(1) / hidden.sum(1)


@dataclass(frozen=True)
class Batch:
    """x0 [B, 3, H, W]; label [B, H, W] (unet only, else 0); t [B]; mask [B, h, w]; n [B], the samples' numbers.

    n stays on the host, which asks for its values; the others are on the network's device.
    """

    x0: Tensor
    label: Tensor
    t: Tensor
    mask: Tensor
    n: Tensor


def training_loss(net: Any, config: Config, batch: Batch) -> Tensor:
    """The loss of each sample, [B] in fp32; the network computes in the number format around it, the loss in fp32."""
    x0, t = batch.x0, batch.t
    if config.method == "mae":
        output = net(x0, batch.mask, mae_kept(config)).float()
        with torch.autocast(x0.device.type, enabled=False):
            return mae_loss(config, output, x0, batch.mask)
    if config.method == "unet":
        logits = net(x0, t).float()  # [B, classes, H, W]
        wrong = F.cross_entropy(logits, batch.label, ignore_index=255, reduction="none").flatten(
            1
        )  # eq. (5)
        return wrong.sum(1) / (batch.label != 255).flatten(1).sum(1).clamp(min=1)
    eps = (
        noise(config.seed, "noise", batch.n.tolist(), x0.shape[1:], x0.device)
        if config.method == "ddpm"
        else None
    )
    xt = corrupt(config, x0, t, batch.mask, eps)
    output = net(xt, t).float()
    target = eps if config.predicts == "eps" else x0
    assert target is not None
    with torch.autocast(
        x0.device.type, enabled=False
    ):  # variances as E[x^2] - mu^2 need all digits
        if config.loss_kind == "ssim":
            return ssim_loss(target, output, config)
        return pixel_loss(
            config.loss_kind, target, output
        )  # eq. (3), without its variance term: D3


# =====================================================================================================================
# Data: images, crops, masks
# =====================================================================================================================


def open_images(config: Config) -> Any:
    """--data: fake tissue, CIFAR-10's folder, or prepared images."""
    if config.data == "synthetic":
        return loaders.Tissue()
    for folder in (Path(config.data), Path("data") / config.data):
        if (folder / "batches.meta").exists():
            return loaders.Cifar(folder)
    return loaders.open_data(config.data, axes=2)


def pretraining_cases(data: Any, config: Config) -> list[str]:
    """All images, the test images too, since no label is used (as in the paper); --pretrain-on train leaves them."""
    splits = data.meta["splits"]
    if config.pretrain_on == "train":
        return [*splits.get("train", []), *splits.get("unlabelled", [])]
    return list(
        splits.get("pretrain") or dict.fromkeys(case for cases in splits.values() for case in cases)
    )


def labelled_cases(data: Any, config: Config) -> list[str]:
    """The --labels images that a classifier learns from: the first by name, or drawn by --draw (the same in all runs).

    Names are sorted as text, so of GlaS train_1, train_10, ..., train_16 come first, which are the public code's.
    """
    cases = sorted(case for case in data.cases("train") if data.has_label(case))
    n = config.labels or len(cases)
    if not cases:
        raise InputError(
            f"{config.data} has no labelled image in its split train; prepare data that has some"
        )
    if n > len(cases):
        raise InputError(
            f"--labels {n}: {config.data} has {len(cases)} labelled training images; lower --labels"
        )
    if config.draw != "first":
        random.Random(int(config.draw)).shuffle(cases)
    return cases[:n]


def as_input(image: np.ndarray) -> np.ndarray:
    """uint8 [C, ...] -> fp32 in [-1, 1]."""
    return np.asarray(image, np.float32) / 127.5 - 1


def cut(array: np.ndarray, start: Sequence[int], side: int) -> np.ndarray:
    """[..., side, side] from [..., Y, X], which may be a memory map; a smaller image is reflected at its ends."""
    window = np.asarray(array[..., start[0] : start[0] + side, start[1] : start[1] + side])
    short = [(0, side - n) for n in window.shape[-2:]]
    return (
        np.pad(window, [(0, 0)] * (array.ndim - 2) + short, mode="reflect")
        if any(b for _, b in short)
        else window
    )  # D10


def random_corner(rng: np.random.Generator, image: np.ndarray, side: int) -> list[int]:
    """First row and column of a window somewhere in an image [3, Y, X]; 0 along an axis shorter than the window."""
    return [int(rng.integers(0, max(n - side, 0) + 1)) for n in image.shape[1:]]


class Crops(Dataset):
    """Sample n = 0, 1, 2, ... of the training: crop, flip, t and mask are a function of (seed, n).

    n counts over the global batches, so the number of processes, workers and restarts changes nothing, and it runs
    through one permutation of the images after the other, so any batch size works.
    """

    def __init__(self, data: Any, config: Config, cases: Sequence[str], stream: str = "crop"):
        self.data, self.config, self.cases, self.stream = data, config, list(cases), stream
        if not self.cases:
            raise InputError(f"{config.data} has no image to train on; prepare data with images")

    def __getitem__(self, n: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, int]:
        """Image [3, H, W] fp32, label [H, W] int64, t, mask [h, w] bool, n."""
        config, side = self.config, self.config.crop
        epoch, place = divmod(n, len(self.cases))
        order = np.random.default_rng(seed_of(config.seed, "order", epoch)).permutation(
            len(self.cases)
        )
        case = self.cases[order[place]]
        rng = np.random.default_rng(seed_of(config.seed, self.stream, n))
        image = self.data.image(case)
        start = random_corner(rng, image, side)
        turn = slice(
            None, None, -1 if rng.random() < 0.5 else 1
        )  # left and right; a slide has neither
        x0 = as_input(cut(image, start, side))[..., turn]
        label = np.zeros((side, side), np.int64)
        if config.method == "unet":
            label = cut(self.data.label(case), start, side)[..., turn].astype(np.int64)
        t = int(rng.integers(0, T)) if config.fixed_t < 0 else config.fixed_t
        t = t if config.method in ("mdm", "ddpm") else 0
        grid = side // config.tile, side // config.tile
        keep = mae_kept(config) if config.method == "mae" else kept(t, grid[0] * grid[1])
        return (
            np.ascontiguousarray(x0),
            np.ascontiguousarray(label),
            t,
            draw_mask(rng, keep, grid),
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
    """Constant (paper); mae: a linear warm-up over 2 % of the steps (40 of 2000 epochs) and a half cosine to zero."""
    if config.method != "mae":
        return config.lr or 1e-4
    warm = max(1, config.steps // 50)
    done = max(0.0, (step - warm) / max(1, config.steps - warm))
    return (config.lr or 1.5e-4 * config.batch / 256) * min(
        (step + 1) / warm, 0.5 * (1 + math.cos(math.pi * done))
    )


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without decay; mae: betas 0.9, 0.95 and a decay of 0.05 on matrices, not on biases, norms and tokens."""
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] > 1]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    mae = config.method == "mae"
    groups = [
        {"params": matrices, "weight_decay": 0.05 * mae},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95 if mae else 0.999), fused=True)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + n) / (10 + n)): young averages forget their start."""
    d = min(decay, (1 + updates) / (10 + updates))  # D4
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def fresh(config: Config, record: Mapping[str, Any]) -> Any:
    """A network with the random weights of --seed, the same on all processes and devices."""
    torch.manual_seed(seed_of(config.seed, "weights") % 2**32)
    return network_for(config, record)


def untrained(config: Config, record: Mapping[str, Any]) -> Any:
    """The network of --checkpoint none: random in all of its layers."""
    model = fresh(config, record)
    redraw_zeros(model)  # D13
    return model


class Training:
    """What training changes, which is what a checkpoint holds: saved, restored, and nothing else."""

    def __init__(
        self,
        config: Config,
        record: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,
    ):
        self.config, self.record, self.device, self.dtype = config, record, device, dtype
        self.model = fast_layout(fresh(config, record).to(device), config.compile)
        self.ema = (
            copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema else self.model
        )
        self.optimizer = make_optimizer(config, self.model)
        # The scaler also finds gradients that are not finite, and a fused optimiser then leaves the weights alone
        # without the host having to ask; so it stays on, with scale 1, where the numbers need no scaling.
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**16 if dtype == torch.float16 else 1.0
        )
        self.step, self.seconds = 0, 0.0
        self.skipped = torch.zeros(
            3, device=device
        )  # steps without a finite gradient: all, in a row, most in a row
        self.seen = 0  # the newest step whose reconstructions were looked at

    def save(self) -> None:
        contents = {
            "format": runtime.FORMAT,
            "script": SCRIPT,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.config.ema else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.dtype == torch.float16 else {},
            "step": self.step,
            "seconds": self.seconds,  # of training, over all restarts
            "skipped": self.skipped.tolist(),
            "best": {"seen": self.seen},  # the paper takes the last weights; nothing is chosen
            "data": self.record,
        }
        out = self.config.run_folder
        runtime.save_checkpoint(out / "last.pt", contents, out / "last.prev.pt")

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.config.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.dtype == torch.float16 and state["scaler"]:  # not where --amp changed meanwhile
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.seen = state["step"], state["seconds"], state["best"]["seen"]
        self.skipped.copy_(torch.tensor(state["skipped"]))
        self.skipped[2] = self.skipped[1]  # the row that ended a run may be over now


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
        *tensors, n = next(batches)
        x0, label, t, mask = (v.to(device, non_blocking=True) for v in tensors)
        batch = Batch(x0, label, t, mask, n)
        alone = (
            ranks.world == 1 or part == config.accumulate - 1
        )  # gradients travel with the last part only
        with nullcontext() if alone else net.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                losses = training_loss(net, config, batch)  # [B]
            run.scaler.scale(losses.mean() / config.accumulate).backward()
        losses_by_t.add(batch.t + 1, losses.detach())
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
    """Pre-training, and the training of the supervised row. Returns 0, or 130 / 143 after a signal, all saved."""
    device, out, record = ranks.device, config.run_folder, loaders.data_record(data)
    dtype, reason = runtime.number_format(config.amp, device)

    # 1. what is needed, and the checkpoint to continue from; nothing is written or thrown away before all is there
    supervised = config.method == "unet"
    cases = labelled_cases(data, config) if supervised else pretraining_cases(data, config)
    crops = Crops(data, config, cases)
    may_differ = MAY_DIFFER | (LATER - {"labels", "draw"} if supervised else LATER)
    may_differ -= (
        {"steps"} if config.method == "mae" else set()
    )  # its learning rate falls to 0 at the last of them
    state = (
        None
        if config.overwrite
        else runtime.find_run(out, SCRIPT, asdict(config), may_differ, record, ranks)
    )
    if state is None or state["step"] < config.steps:
        check_memory(config, record, ranks)
    run = Training(config, record, device, dtype)
    if state is not None:
        run.restore(state)
    elif config.init:
        load_start(config.init, run.model, ranks)
        run.ema.load_state_dict(run.model.state_dict())
    runtime.make_run(out, asdict(config), config.overwrite, ranks)
    runtime.check_same_weights(run.model, ranks, "at the start")
    print_header(config, data, cases, ranks, run, reason)

    # 2. all processes work on parts of one global batch; DDP averages their gradients
    net: Any = DistributedDataParallel(run.model) if ranks.world > 1 else run.model
    net = torch.compile(net) if config.compile else net
    net.train()
    loader = DataLoader(
        crops,
        batch_sampler=Sharded(config, ranks, run.step),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=runtime.ignore_signals,
    )
    log = runtime.Log(out / "log.csv", COLUMNS, run.step, ranks.first)
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
        # 3. reconstruct the same crops when it is due; a run stopped before it did so does it first when continued
        finished = run.step >= config.steps or time_up or run.seconds >= limit
        if (
            (run.step % config.eval_every == 0 or finished)
            and run.step > run.seen
            and not supervised
        ):
            run.seen = run.step
            if ranks.first:
                log.row(
                    {"step": run.step, "seconds": run.seconds, "val_loss": held_loss(run, data)}
                )
                run.save()
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
            out / "log.csv", out / "loss.png", title=f"{config.method}, {Path(config.data).name}"
        )
        if config.method in ("mdm", "ddpm"):
            net = Backbone(config, run.ema.eval(), device, dtype)
            draw_reconstructions(net, data, crops.cases[:3], out / "figures/reconstructions.png")
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
COLUMNS += ["memory_gb", "left_s", "skipped", "val_loss"]


@torch.no_grad()
def held_loss(run: Training, data: Any) -> float:
    """Loss of the averaged weights on the same 16 crops, times and masks at each call: falls without their noise.

    The images are those of the pre-training, which holds none back.
    """
    crops = Crops(data, run.config, pretraining_cases(data, run.config), "held")
    losses = []
    for n in range(16):
        *values, number = (torch.as_tensor(v)[None] for v in crops[n])
        x0, label, t, mask = (v.to(run.device) for v in values)
        batch = Batch(x0, label, t, mask, number)
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            losses.append(float(training_loss(run.ema.eval(), run.config, batch)))
    run.model.train()
    return float(np.mean(losses))


def print_header(
    config: Config, data: Any, cases: Sequence[str], ranks: Ranks, run: Training, reason: str
) -> None:
    """What this run is, before it starts."""
    share = f"{ranks.world} processes x {config.accumulate} parts x {config.batch // (ranks.world * config.accumulate)}"
    splits = data.meta["splits"]
    test = {case for name, ids in splits.items() if name.startswith("test") for case in ids}
    seen = sum(case in test for case in cases)
    notes = {"mdm": [], "ddpm": ["D3"], "mae": ["D6"], "unet": ["D5"]}[config.method]
    notes += ["D10"] + ["D4"] * (config.ema > 0)
    notes += ["D1"] * (
        config.loss_kind == "ssim" and config.ssim_range == "signed" and config.method != "unet"
    )
    notes += ["D11"] * (config.preset != "paper")
    what = (
        f"labels of {len(cases)} images"
        if config.method == "unet"
        else f"{len(cases)} images without labels"
    )
    lines = [f"MDM (Pan et al. 2023), {config.method} -> {config.run_folder}"]
    lines += [
        f"  data      {config.data}: {what}, {seen} of them test images; crops of {config.crop} pixels"
    ]
    lines += [f"  network   {sum(p.numel() for p in run.model.parameters()):,} parameters"]
    loss = (
        "cross-entropy" if config.method == "unet" else f"{config.loss_kind} of {config.predicts}"
    )
    tiles = f", {(config.crop // config.tile) ** 2} tiles" * (config.method in ("mdm", "mae"))
    lines += [
        f"  training  step {run.step} to {config.steps}, batch {config.batch} = {share}; {loss}{tiles}"
    ]
    lines += [
        f"  device    {ranks.device}, {'fp32' if run.dtype is None else str(run.dtype)[6:]} ({reason})"
    ]
    lines += [
        f"  differs   {' '.join(sorted(notes, key=lambda d: int(d[1:])))} (see the top of {SCRIPT}.py)"
    ]
    say("\n".join(lines), ranks)


def load_start(path: str, model: Any, ranks: Ranks, raw: bool = False) -> None:
    """Weights of one of our checkpoints or of a public state dict, strictly; only the head may differ in channels.

    raw: the last weights instead of the averaged ones. A head of 6 channels (mean and variance) gives its first 3 to a
    head of 3; another head is left as it is here. Either is said.
    """
    state = runtime.load_tensors(Path(path))
    if isinstance(state, dict) and "format" in state:
        state = runtime.load_checkpoint(Path(path), SCRIPT)
        state = state["model"] if raw or not state["ema"] else state["ema"]
    try:
        state = {k.removeprefix("module."): v for k, v in state.items()}
        head = {k: v for k, v in model.state_dict().items() if k in ("out.2.weight", "out.2.bias")}
        for name, own in head.items():
            if (
                name in state
                and state[name].shape[1:] == own.shape[1:]
                and len(state[name]) != len(own)
            ):
                taken = len(state[name]) == 2 * len(own)
                how = "its first half, the mean, is taken" if taken else "the fresh head is kept"
                say(
                    f"note: {path}: {name} has {len(state[name])} channels, {len(own)} here: {how}",
                    ranks,
                )
                state[name] = state[name][: len(own)] if taken else own
        load_public(model, state)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} does not fit: {error}") from error


# --- the pixel classifier ---


class Stopping:
    """Called after each step: True when a classifier is done, by the rule of --stop.

    medical: the loss at the end of an epoch counts, epochs 0 to --stop-epoch left out; natural: the loss of each step,
    epochs 0 to 3 left out. Done after more than PATIENCE counted losses in a row that were not the best; NaN is
    never better. steps: after --classifier-steps.
    """

    def __init__(self, config: Config):
        self.config, self.best, self.missed, self.steps = config, math.inf, 0, 0
        self.losses: list[Tensor] = []  # of this epoch

    def __call__(self, epoch: int, loss: Tensor, ends: bool) -> bool:
        config, rule = self.config, self.config.stops
        self.steps += 1
        if rule == "steps":
            return self.steps >= config.classifier_steps
        if rule == "medical":
            self.losses.append(loss)
            if not ends:
                return False
            loss = torch.stack(self.losses).double().mean() if config.stop_loss == "epoch" else loss
            self.losses = []
        if epoch < (config.stop_epoch + 1 if rule == "medical" else 4):
            return False
        value = float(loss)  # only here the device is waited for
        self.best, self.missed = (value, 0) if value < self.best else (self.best, self.missed + 1)
        return self.missed > PATIENCE[rule]


def new_classifier(config: Config, widths: Sequence[int], classes: int) -> PixelClassifier:
    return PixelClassifier(widths, classes, batch_norm=config.classifier_norm == "batch")  # D15


@dataclass(frozen=True)
class Step:
    """What a classifier learns from in one step: --crops windows, and the class of each of their pixels.

    windows: (maps, what divides them, pixels [P, 2] or None for all) of each; labels: [pixels of all windows].
    """

    epoch: int
    ends: bool  # the epoch is over after this step
    windows: list[tuple[list[Tensor], Tensor, Tensor | None]]
    labels: Tensor


def classifier_steps(
    config: Config, net: "Backbone", data: Any, cases: Sequence[str], seed: int
) -> Iterator[Step]:
    """Medical: new crops of the labelled images at each step; an epoch has each image once.

    The frozen network sees the windows of a few steps at once, the classifier those of one. Nothing else is kept, so
    memory does not depend on the number of labelled images.
    """
    side, device = config.crop, net.device
    ahead = max(
        1, WINDOWS // (side * side * config.crops)
    )  # steps whose windows pass the network together
    for epoch in range(5000):
        rng = np.random.default_rng(seed_of(seed, "classifier", epoch))
        order = [cases[i] for i in rng.permutation(len(cases))]
        groups = [order[i : i + config.crops] for i in range(0, len(order), config.crops)]
        for i in range(0, len(groups), ahead):
            windows, keys, pixels, labels = [], [], [], []
            for case in (case for group in groups[i : i + ahead] for case in group):
                image = data.image(case)
                start = random_corner(rng, image, side)
                windows.append(as_input(cut(image, start, side)))
                keys.append((seed, case, *start, epoch))
                label, where = (
                    torch.from_numpy(cut(data.label(case), start, side).astype(np.int64)),
                    None,
                )
                if 0 < config.pixels < side * side:
                    flat = torch.from_numpy(rng.permutation(side * side)[: config.pixels])
                    where = torch.stack([flat // side, flat % side], dim=1).to(device)  # [P, 2]
                    label = label.flatten()[flat]
                pixels.append(where)
                labels.append(label.flatten().to(device))
            maps, divisors = net.window_features(
                torch.from_numpy(np.stack(windows)).to(device), keys
            )
            found = [
                ([m[k : k + 1] for m in maps], divisor, pixels[k])
                for k, divisor in enumerate(divisors)
            ]
            for k, group in enumerate(groups[i : i + ahead]):
                step = slice(k * config.crops, (k + 1) * config.crops)
                yield Step(epoch, group is groups[-1], found[step], torch.cat(labels[step]))


def fit_medical(
    config: Config, net: "Backbone", data: Any, cases: Sequence[str], seed: int, name: str
) -> PixelClassifier:
    """One classifier on random crops: the paper's on GlaS and MoNuSeg. The last weights are kept, as in its code."""
    size = (config.crop, config.crop)
    torch.manual_seed(seed_of(seed, "classifier") % 2**32)
    classifier = new_classifier(config, net.widths(), len(data.classes) + 1).to(net.device).train()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=config.classifier_lr, fused=True)
    stopping = Stopping(config)
    bar = tqdm(desc=name, unit="step", leave=False, disable=config.quiet or None)
    for step in classifier_steps(config, net, data, cases, seed):
        outputs = [
            classifier.enlarge(maps, by, size, where) for maps, by, where in step.windows
        ]  # [P, a] each  # D7
        loss = F.cross_entropy(
            classifier.rest(torch.cat(outputs)), step.labels, ignore_index=255
        )  # eq. (5)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.update()
        if stopping(step.epoch, loss.detach(), step.ends):
            break
    bar.close()
    say(
        f"{name}: {stopping.steps} steps, {step.epoch + 1} epochs, last loss {float(loss.detach()):.4f}"
    )
    return classifier.eval()


def store_features(
    config: Config, net: "Backbone", data: Any, cases: Sequence[str], seed: int, file: Path
) -> FeatureStore:
    """Natural: the native maps of all labelled images in a file, read by pixel."""
    store, size = (
        FeatureStore(file, len(cases), (config.crop, config.crop)),
        (config.crop, config.crop),
    )
    for case in cases:
        image = np.asarray(data.image(case))
        if image.shape[1:] != size:
            raise InputError(f"{config.data}: {case} has {image.shape[1:]} pixels, expected {size[0]} x {size[1]} for "
                             "--protocol natural; use --crop or --protocol medical")  # fmt: skip
        x0 = torch.from_numpy(as_input(image))[None].to(net.device)
        maps, divisor = net.window_features(x0, (seed, case, 0, 0, 0))
        store.add(maps, float(divisor), data.label(case))
    return store


def fit_natural(
    config: Config, net: "Backbone", store: FeatureStore, classes: int, seed: int, name: str
) -> PixelClassifier:
    """One member on single random pixels of all images: the paper's on FFHQ-34 and CelebA-19."""
    torch.manual_seed(seed_of(seed, "classifier") % 2**32)
    classifier = new_classifier(config, net.widths(), classes).to(net.device).train()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=config.classifier_lr, fused=True)
    stopping, size, done = Stopping(config), config.pixels or 64, False
    if size > len(store.pixels):
        raise InputError(
            f"--pixels {size}: the labelled images have {len(store.pixels)} pixels to learn from; lower it"
        )
    bar = tqdm(desc=name, unit="step", leave=False, disable=config.quiet or None)
    for epoch in range(100):
        order = np.random.default_rng(seed_of(seed, "pixels", epoch)).permutation(store.pixels)
        count = len(order) // size  # what is left over waits for the next epoch
        for i in range(count):
            pixels = order[i * size : (i + 1) * size]
            vectors = torch.from_numpy(store.gather(pixels)).to(net.device)  # [P, D]
            label = torch.from_numpy(store.label[pixels].astype(np.int64)).to(net.device)
            loss = F.cross_entropy(classifier.rest(classifier.first(vectors)), label)  # eq. (5)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update()
            done = stopping(epoch, loss.detach(), i == count - 1)
            if done:
                break
        if done:
            break
    bar.close()
    say(f"{name}: {stopping.steps} steps, {epoch + 1} epochs, last loss {float(loss.detach()):.4f}")
    return classifier.eval()


@dataclass(frozen=True)
class Run:
    """A trained run: seed, network (frozen, or the supervised one), and its classifiers (none for the latter)."""

    seed: int
    net: "Backbone"
    classifiers: list[PixelClassifier]
    random: bool = False  # the network is untrained


def standardised(net: "Backbone", data: Any, cases: Sequence[str], seed: int) -> "Backbone":
    """The network whose features have mean 0 and SD 1 in each channel over random windows of `cases`, 64 or more."""
    side, rng = net.config.crop, np.random.default_rng(seed_of(seed, "scale"))
    sums: list[Any] = [[0.0, 0.0] for _ in net.widths()]  # of values and of squares, [c] each
    count = -(-64 // len(cases))
    for case, k in ((case, k) for case in cases for k in range(count)):
        image = data.image(case)
        start = random_corner(rng, image, side)
        x0 = torch.from_numpy(as_input(cut(image, start, side)))[None].to(net.device)
        for total, m in zip(sums, net.window_features(x0, (seed, case, "scale", k))[0]):
            total[0] += m.double().mean((0, 2, 3)) / (count * len(cases))
            total[1] += m.double().square().mean((0, 2, 3)) / (count * len(cases))
    means, sds = (
        [a.float() for a, _ in sums],
        [(b - a * a).clamp(min=1e-12).sqrt().float() for a, b in sums],
    )
    return replace(net, scale=(means, sds))


def fit(config: Config, net: "Backbone", data: Any, seed: int, out: Path) -> list[PixelClassifier]:
    """The classifiers of one run."""
    cases, name = labelled_cases(data, config), f"run of seed {seed}"
    if not config.natural:
        return [
            fit_medical(
                config,
                net,
                data,
                cases,
                seed_of(seed, m) if m else seed,
                f"{name}, member {m}" if m else name,
            )
            for m in range(config.members)
        ]
    file = out / f"features-{seed}.npy"
    try:
        store = store_features(config, net, data, cases, seed, file)
        classes = len(data.classes) + 1
        members = range(config.members)
        return [
            fit_natural(config, net, store, classes, seed_of(seed, m), f"{name}, member {m}")
            for m in members
        ]
    finally:
        file.unlink(missing_ok=True)


# =====================================================================================================================
# Sample: features of the frozen network, restored images, clusters
# =====================================================================================================================


@cache
def gram(small: int, large: int, device: torch.device) -> Tensor:
    """U^T U of the matrix U [large, small] that enlarges one axis: [small, small] fp32."""
    eye = torch.eye(small, dtype=torch.float64)[None]
    matrix = F.interpolate(eye, size=large, mode="linear", align_corners=False)[
        0
    ].T  # [large, small]
    return (matrix.T @ matrix).float().to(device)


def square_sum(x: Tensor, size: Sequence[int]) -> Tensor:
    """The sum of squares of up(x, size), without enlarging: sum over c of <X_c, G_h X_c G_w>. [B, C, h, w] -> [B]."""
    gh, gw = gram(x.shape[2], size[0], x.device), gram(x.shape[3], size[1], x.device)
    return (x * (gh @ x @ gw)).sum((1, 2, 3))


Key = tuple[int | str, ...]  # seeds the mask (or noise) of one window: run, image, corner, epoch


@dataclass(frozen=True)
class Backbone:
    """A network in use: frozen for features, or the supervised one. dtype: of autocast.

    scale: --feature-norm standard: mean and SD of the features on labelled images, a vector for each map.
    """

    config: Config
    model: Any
    device: torch.device
    dtype: torch.dtype | None
    scale: tuple[list[Tensor], list[Tensor]] | None = None

    def shown(self, x0: Tensor, t: int, key: Key | list[Key]) -> Tensor:
        """What the network sees of a window [1, 3, H, W] at t; its mask (or noise) is a function of `key`.

        Of several windows [B, 3, H, W] `key` is a list, one each.
        """
        config, tile, keys = self.config, self.config.tile, key if isinstance(key, list) else [key]
        if config.method == "ddpm":
            names = ["features"] if config.share_noise == "on" else [repr((*k, t)) for k in keys]
            eps = noise(
                0, "noise", names, x0.shape[1:], torch.device("cpu")
            )  # D3, the same on every device
            eps = eps.to(x0.device)
            return q_sample(x0, eps, torch.tensor([t], device=x0.device), config.schedule)
        if config.method != "mdm" or config.feature_mask == "off":
            return x0
        grid = x0.shape[2] // tile, x0.shape[3] // tile
        keep = kept(t, grid[0] * grid[1])
        masks = [
            draw_mask(np.random.default_rng(seed_of("feature mask", *k, t)), keep, grid)
            for k in keys
        ]
        return hide(x0, torch.from_numpy(np.stack(masks)).to(x0.device))  # D2

    @torch.no_grad()
    def window_features(self, x0: Tensor, key: Key | list[Key]) -> tuple[list[Tensor], Tensor]:
        """Native maps [B, c, h, w] fp32 of windows, times outer and blocks inner, and what divides them [B].

        l2: the Frobenius norm of a window's maps enlarged to it, as if they had been, so it grows with its area.
        """
        config, maps = self.config, []
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            for t in config.times:
                xt, tt = self.shown(x0, t, key), torch.tensor([t], device=x0.device)
                maps += [m.float().contiguous() for m in self.model.features(xt, tt, config.taps)]
        if self.scale:
            maps = [
                (m - a[:, None, None]) / b[:, None, None] for m, a, b in zip(maps, *self.scale)
            ]  # D14
        if config.norm in ("none", "standard"):
            return maps, torch.ones(len(x0), device=self.device)
        size = x0.shape[2:]
        total = torch.stack([square_sum(m, size) for m in maps]).sum(0).sqrt()
        values = sum(m.shape[1] for m in maps) * size[0] * size[1] if config.norm == "rms" else 1
        return maps, (total / math.sqrt(values)).clamp(min=1e-12)

    def widths(self) -> list[int]:
        """Channels of each feature map; their sum is D. From one forward pass of an empty window."""
        x0 = torch.zeros(1, 3, self.config.crop, self.config.crop, device=self.device)
        return [m.shape[1] for m in self.window_features(x0, ("widths",))[0]]


@torch.no_grad()
def reconstruct_window(net: Backbone, x0: Tensor, t: int, key: Key) -> tuple[Tensor, Tensor]:
    """(what is shown, the image restored from it) of x0 [1, 3, H, W]: one forward pass, no iteration."""
    config, device = net.config, net.device
    tt = torch.tensor([t], device=device)
    with torch.autocast(device.type, net.dtype, enabled=net.dtype is not None):
        if config.method == "mae":
            grid = x0.shape[2] // config.tile, x0.shape[3] // config.tile
            keep = kept(t, grid[0] * grid[1])
            mask = draw_mask(np.random.default_rng(seed_of(*key)), keep, grid)
            hidden = torch.from_numpy(mask)[None].to(device)
            output = net.model(x0, hidden, keep).float()
            if (
                config.loss_kind != "ssim"
            ):  # mean and SD of each tile are not restored: those of the truth, as usual
                tiles = patchify(imagenet(x0), config.tile)
                output = output * (tiles.var(2, keepdim=True) + 1e-6).sqrt() + tiles.mean(
                    2, keepdim=True
                )
                mean, sd = (v.flatten() for v in imagenet_values(device))
                output = ((output.unflatten(2, (-1, 3)) * sd + mean) * 2 - 1).flatten(2)
            return hide(x0, hidden), unpatchify(output, config.tile, grid)
        xt = replace(net, config=replace(config, feature_mask="on")).shown(x0, t, key)
        return xt, restored(config, net.model(xt, tt).float(), xt, tt)


def flipped_share(x: Tensor, y: Tensor, side: int = 8) -> float:
    """Share of the side x side blocks of two images [1, C, H, W] that are anti-correlated: what signed SSIM allows.

    The correlation of a block is over its pixels and channels, each channel about its own mean.
    """
    h, w = (n // side * side for n in x.shape[2:])
    x, y = (
        patchify(v[:, :, :h, :w], side).unflatten(2, (-1, x.shape[1])) for v in (x, y)
    )  # [1, blocks, pixels, C]
    x, y = (v - v.mean(2, keepdim=True) for v in (x, y))
    return float(((x * y).sum((2, 3)) < 0).float().mean())


def centre(image: np.ndarray, side: int) -> np.ndarray:
    """The middle window of an image, [C, side, side] fp32 in [-1, 1]."""
    return as_input(cut(image, [max(n - side, 0) // 2 for n in image.shape[1:]], side))


def picture(x: Any) -> np.ndarray:
    """[1, 3, H, W] in [-1, 1] -> uint8 [H, W, 3]."""
    return np.rint((x[0].clamp(-1, 1).cpu().numpy().transpose(1, 2, 0) + 1) * 127.5).astype(
        np.uint8
    )


def name_of(ratio: float, config: Config) -> str:
    """How a ratio t / T is called: a share of hidden tiles, or a level of noise."""
    return f"noise, t {round(ratio * T)}" if config.method == "ddpm" else f"{ratio:.0%} hidden"


def draw_reconstructions(
    net: Backbone, data: Any, cases: Sequence[str], file: Path
) -> list[dict[str, Any]]:
    """Each image, what is shown and what is restored at each ratio, as a picture; and scores, a row a case and ratio.

    psnr and ssim are of pixel values in [0, 1] over the whole window (11 x 11, L = 1); flipped: see flipped_share.
    """
    ratios = net.config.ratio or (0.25, 0.5, 0.75)
    images, titles, rows = [], [], []
    for case in cases:
        x0 = torch.from_numpy(centre(data.image(case), net.config.crop))[None].to(net.device)
        images.append(picture(x0))
        titles.append(case)
        for ratio in ratios:
            xt, y = reconstruct_window(net, x0, round(ratio * T), ("reconstruct", case))
            a, b = (x0 + 1) / 2, (y.clamp(-1, 1) + 1) / 2
            row = {
                "case": case,
                "ratio": ratio,
                "psnr": -10 * math.log10(float((a - b).square().mean()) + 1e-10),
            }
            row |= {"ssim": float(ssim_map(a, b, 11).mean()), "flipped": flipped_share(x0, y)}
            rows.append(row)
            images += [picture(xt), picture(y)]
            titles += [name_of(ratio, net.config), f"flipped {row['flipped']:.1%}"]
    figures.montage(
        images, titles, file, columns=1 + 2 * len(ratios), title="image, and what is restored of it"
    )
    return rows


def reconstruct(config: Config, data: Any, ranks: Ranks) -> int:
    """Images restored from 25, 50 and 75 % hidden tiles (figure 9), with the share of sign-flipped blocks."""
    net, out = load_backbone(config, data, ranks), config.run_folder
    cases = cases_of(config, data, labelled=False)[: config.limit or 4]
    if not ranks.first:  # a few images: one process is enough
        return 0
    rows = draw_reconstructions(net, data, cases, out / "figures/reconstructions.png")
    runtime.write_csv(out / "reconstructions.csv", rows)
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        same = [row for row in rows if row["ratio"] == ratio]
        text = ", ".join(
            f"{k} {np.mean([row[k] for row in same]):.3f}" for k in ("psnr", "ssim", "flipped")
        )
        say(f"{name_of(ratio, config)}, {len(same)} images: {text}", ranks)
    say(f"{out / 'figures/reconstructions.png'}", ranks)
    return 0


def cluster(config: Config, data: Any, ranks: Ranks) -> int:
    """k-means of each block's map, image by image (figure 6): what the features see without any label."""
    net, out = load_backbone(config, data, ranks), config.run_folder
    images, titles, colours = [], [], figures.class_colours(config.k)
    for case in cases_of(config, data, labelled=False)[: config.limit or 4]:
        x0 = torch.from_numpy(centre(data.image(case), config.crop))[None].to(net.device)
        images.append(picture(x0))
        titles.append(case)
        for n, f in enumerate(net.window_features(x0, (config.seed, case, "cluster"))[0]):
            points = f[0].flatten(1).T.double().cpu().numpy()  # [h w, c]
            rng = np.random.default_rng(seed_of(config.seed, "cluster", case, n))
            labels = kmeans2(points, config.k, iter=50, minit="++", seed=rng)[1]
            small = torch.from_numpy(labels).reshape(1, 1, *f.shape[2:]).float()
            large = (
                F.interpolate(small, size=x0.shape[2:], mode="nearest")[0, 0].numpy().astype(int)
            )
            images.append(np.array(colours, np.uint8)[large])
            titles.append(
                f"block {config.taps[n % len(config.taps)]}, t {config.times[n // len(config.taps)]}"
            )
    file = out / "figures/clusters.png"
    columns = 1 + len(config.times) * len(config.taps)
    if ranks.first:
        figures.montage(
            images,
            titles,
            file,
            columns=columns,
            title=f"{config.k} clusters of each block's features",
        )
    say(f"{file}", ranks)
    return 0


# =====================================================================================================================
# Evaluate
# =====================================================================================================================


def window_starts(n: int, r: int) -> list[int]:
    """First pixels of windows of length r over an axis of length n: they overlap by a fifth, the last ends at n."""
    return (
        [min(k * int(0.8 * r), n - r) for k in range(-(-(n - r) // int(0.8 * r)) + 1)]
        if n > r
        else [0]
    )


@cache
def window_weights(r: int) -> np.ndarray:
    """[r, r] float64: a Gaussian of SD r / 8 about the window's middle, nowhere below 1e-3."""
    g = np.exp(-((np.arange(r) - (r - 1) / 2) ** 2) / (2 * (r / 8) ** 2))
    return np.maximum(np.outer(g, g), 1e-3)


@torch.no_grad()
def window_logits(run: Run, x0: Tensor, keys: list[Key]) -> Tensor:
    """Logits of each member for windows [N, 3, r, r], of which each has a key: [N, M, classes, r, r] fp32."""
    net, size = run.net, x0.shape[2:]
    if net.config.method == "unet":
        with torch.autocast(net.device.type, net.dtype, enabled=net.dtype is not None):
            return net.model(x0, torch.zeros(len(x0), device=net.device)).float()[:, None]
    maps, divisors = net.window_features(x0, keys)
    logits = [
        torch.stack(
            [
                c([m[i : i + 1] for m in maps], by, size).T.unflatten(1, tuple(size))
                for c in run.classifiers
            ]
        )
        for i, by in enumerate(divisors)
    ]
    return torch.stack(logits)


@dataclass(frozen=True)
class Segmentation:
    """mask [Y, X] uint8; prob [classes, Y, X] fp32, mean over members; uncertainty: their disagreement in nats."""

    mask: np.ndarray
    prob: np.ndarray
    uncertainty: float


def segment_image(run: Run, image: np.ndarray, case: str) -> Segmentation:
    """A whole image [3, Y, X] uint8 of any size, window by window; the logits are averaged, then members vote.

    The sums of this one image are all that is kept. Images smaller than a window get mid grey around them.
    """
    config = run.net.config
    r, shape = config.crop, image.shape[1:]
    full = [max(n, r) for n in shape]
    front = loaders.symmetric_pad(shape, full)
    x0 = loaders.read_window(as_input(image), [-f for f in front], full)  # [3, *full]
    weight = torch.from_numpy(window_weights(r)).float().to(run.net.device)  # [r, r]
    total: Any = None
    sums = torch.zeros(*full, device=run.net.device)
    corners = [(y, x) for y in window_starts(full[0], r) for x in window_starts(full[1], r)]
    count = max(1, WINDOWS // (r * r))
    for some in (corners[i : i + count] for i in range(0, len(corners), count)):
        windows = torch.from_numpy(np.stack([x0[:, y : y + r, x : x + r] for y, x in some])).to(
            run.net.device
        )
        found = window_logits(run, windows, [(run.seed, case, y, x, "test") for y, x in some])
        if total is None:
            total = torch.zeros(*found.shape[1:3], *full, device=run.net.device)
        for (y, x), logits in zip(some, found):  # [M, classes, r, r]
            total[:, :, y : y + r, x : x + r] += weight * logits
            sums[y : y + r, x : x + r] += weight
    inside = tuple(slice(f, f + n) for f, n in zip(front, shape))
    logits = (total / sums)[:, :, inside[0], inside[1]]  # [M, classes, Y, X]
    prob = logits.softmax(1)
    return Segmentation(
        vote(logits.argmax(1)).cpu().numpy(), prob.mean(0).cpu().numpy(), disagreement(prob)
    )


def vote(masks: Tensor) -> Tensor:
    """The class that most members chose, of equal ones the smallest: [M, Y, X] -> [Y, X] uint8."""
    return torch.mode(masks.cpu(), dim=0).values.to(torch.uint8)


def disagreement(prob: Tensor) -> float:
    """H(mean p) - mean H(p) of members [M, classes, Y, X], averaged over the tenth of the pixels with the largest."""

    def entropy(p: Tensor, axis: int) -> Tensor:
        return -(p * p.clamp(min=1e-12).log()).sum(axis)

    gap = (entropy(prob.mean(0), 0) - entropy(prob, 1).mean(0)).flatten()
    return float(gap.topk(max(1, len(gap) // 10)).values.mean())


def colour_rule(data: Any, cases: Sequence[str]) -> Any:
    """What colour alone can do: least squares from the ten products of red, green, blue to the classes.

    Fitted on the pixels of the labelled images; the result maps an image [3, Y, X] to a mask.
    """

    def products(image: np.ndarray) -> np.ndarray:  # [N, 10]
        r, g, b = as_input(image).reshape(3, -1)
        return np.stack(
            [np.ones_like(r), r, g, b, r * r, g * g, b * b, r * g, r * b, g * b], axis=1
        )

    k, gram_matrix, answer = (
        len(data.classes) + 1,
        np.zeros((10, 10)),
        np.zeros((10, len(data.classes) + 1)),
    )
    for case in cases:
        x, label = products(np.asarray(data.image(case))), np.asarray(data.label(case)).ravel()
        x, label = x[label < k].astype(np.float64), label[label < k]
        gram_matrix += x.T @ x
        answer += x.T @ np.eye(k)[label]
    rule = np.linalg.lstsq(gram_matrix, answer, rcond=None)[0]
    return lambda image: (
        (products(image) @ rule).argmax(1).reshape(image.shape[1:]).astype(np.uint8)
    )


OBJECTS = ("object_dice", "aji", "aji_binary")
Scores = dict[str, Any]  # rows: of metrics.csv; objects: a dict a case; counts: for mIoU


def score_mask(data: Any, case: str, mask: np.ndarray) -> Scores:
    """All scores of one predicted mask; objects are its 4-connected pieces."""
    truth = np.array(data.label(case))
    counts = metrics.class_counts(mask, truth, len(data.classes) + 1, data.ignore)
    if data.ignore is not None:
        mask, truth = (np.where(truth == data.ignore, 0, v) for v in (mask, truth))
    rows = metrics.evaluate_case(case, mask, truth, data.spacing(case), data.classes)
    found: dict[str, Any] = {"case": case}
    objects = data.instances(case) if len(data.classes) == 1 else None
    if objects is not None:
        pieces, objects = metrics.components(mask > 0), np.asarray(objects)
        found |= {
            "object_dice": metrics.object_dice(pieces, objects),
            "aji": metrics.aji(pieces, objects),
        }
        found["aji_binary"] = metrics.aji_binary(pieces, objects)
    return {"rows": rows, "objects": [found], "counts": counts}


def mean_scores(parts: Sequence[Scores]) -> dict[str, float]:
    """Means over images of the scores of one run; mIoU from sums over all images."""
    rows = [row for part in parts for row in part["rows"]]
    mean = metrics.summarise(rows)["mean"]
    scores = {"dice": mean["dice"]["mean"], "iou": mean["iou"]["mean"]}
    scores["iou_from_dice"] = metrics.iou_from_dice(scores["dice"])  # D8
    for name in OBJECTS:
        values = np.array(
            [found.get(name, math.nan) for part in parts for found in part["objects"]]
        )
        scores[name] = (
            float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else math.nan
        )
    scores["miou"] = metrics.miou(sum(part["counts"] for part in parts))
    return scores


def cases_of(config: Config, data: Any, labelled: bool = True) -> list[str]:
    """The cases of --split, at most --limit."""
    cases = [case for case in data.cases(config.split) if not labelled or data.has_label(case)]
    if not cases:
        raise InputError(f"{config.data} has no {'labelled ' * labelled}image in its split {config.split}; has "
                         f"{', '.join(k for k, v in data.meta['splits'].items() if v)}; choose by --split")  # fmt: skip
    return cases[: config.limit or None]


def score(config: Config, data: Any, runs: Sequence[Run], ranks: Ranks, out: Path) -> int:
    """Score all runs on --split: table.csv with floors, metrics.csv, summary.json, masks, pictures."""
    cases, begin, one = cases_of(config, data), time.perf_counter(), len(data.classes) == 1
    known = sum(
        data.has_label(case) for case in data.meta["splits"].get("train", [])
    )  # none in a set of tests alone
    rule = (
        colour_rule(data, labelled_cases(data, replace(config, labels=min(config.labels, known))))
        if known
        else None
    )
    values = {int(k): v for k, v in data.meta["label_values"].items()}
    results: dict[str, dict[str, Scores]] = {}  # name of a run or floor -> case -> scores
    shown = []
    for i in tqdm(
        range(ranks.rank, len(cases), ranks.world),
        desc="images",
        leave=False,
        disable=config.quiet or None,
    ):
        case, image = cases[i], np.asarray(data.image(cases[i]))
        truth = np.asarray(data.label(case))
        masks = {"colour alone": rule(image)} if rule else {}
        if one:
            masks |= {
                "all foreground": np.ones(truth.shape, np.uint8),
                "the truth itself": (truth == 1).astype(np.uint8),
            }
        unsure = {}
        for run in runs:
            result = segment_image(run, image, case)
            masks[f"run{run.seed}"] = result.mask
            if len(run.classifiers) > 1:
                unsure[f"run{run.seed}"] = {"uncertainty": result.uncertainty}
            if run is runs[0] or config.save_members:
                folder = out / "predictions" / (f"run{run.seed}" if config.save_members else "")
                write_mask(folder / f"{case}.png", result.mask, values)
        for name, mask in masks.items():
            results.setdefault(name, {})[case] = score_mask(data, case, mask)
            results[name][case]["objects"][0] |= unsure.get(name, {})
        if i < 4:
            shown.append((i, case, image.transpose(1, 2, 0), truth, masks[f"run{runs[0].seed}"]))
    gathered: dict[str, dict[str, Scores]] = {}
    for part in runtime.gather(results, ranks):
        for name, by_case in part.items():
            gathered.setdefault(name, {}).update(by_case)
    shown = sorted(
        (entry for part in runtime.gather(shown, ranks) for entry in part),
        key=lambda entry: entry[0],
    )
    if not ranks.first:
        return 0
    write_scores(config, gathered, cases, out, runs[0].random)
    draw_segmentations(shown, data, out / "figures/segmentations.png")
    seconds = time.perf_counter() - begin
    say(
        f"\n{config.split} split of {config.data}, {len(cases)} images, {seconds:.0f} s; mean±SD over {len(runs)} runs"
    )
    print_table([out])
    for text in caveats(config, data, cases, runs):
        say(f"note: {text}")
    say(f"masks, pictures and tables are in {out}")
    return 0


def caveats(config: Config, data: Any, cases: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know."""
    notes, facts = [], data.meta.get("cases", {})
    saw = set(pretraining_cases(data, config)) & set(cases)
    if saw and config.method != "unet" and not runs[0].random:
        notes += [
            f"{len(saw)} of these {len(cases)} images may have been seen in pre-training, without labels"
        ]
    who: list[set[str]] = [
        {str(facts[c].get("patient", "")) for c in ids if c in facts} - {""}
        for ids in (cases, data.meta["splits"].get("train", []))
    ]
    if shared := who[0] & who[1]:
        notes += [f"{len(shared)} of {len(who[0])} patients here are in the training split too"]
    if len(runs) > 1:
        own = config.method == "unet" or runs[0].random
        notes += ["SD: over networks" if own else "SD: over classifiers on one pre-trained network"]
        notes[-1] += ", with the same labelled images"
    usual = {
        "t": not config.feature_t and config.fixed_t < 0,
        "blocks": not config.blocks,
        "tile": config.tile == 8,
    }
    usual["loss"] = config.loss == "auto" and (
        config.method != "mdm" or config.ssim_range == "signed"
    )
    if config.method in ("mdm", "ddpm") and (names := [k for k, same in usual.items() if same]):
        notes += [f"{', '.join(names)}: as in the paper, which chose on its test images"]
    return notes


def write_scores(
    config: Config,
    results: dict[str, dict[str, Scores]],
    cases: Sequence[str],
    out: Path,
    untrained: bool,
) -> None:
    """table.csv (a row a run and floor), and metrics.csv, objects.csv and summary.json of the means over runs.

    A row of metrics.csv is the mean of the runs' rows of that image, so that two methods can be compared in pairs.
    """
    table, what = (
        [],
        {"mdm": "MDM", "ddpm": "DDPM", "mae": "MAE", "unet": "U-Net, supervised"}[config.method],
    )
    what = "random features" if untrained else what
    labels = f"{config.labels or 'all'} labels"
    for name, by_case in results.items():
        parts = [by_case[case] for case in cases]
        is_run = name.startswith("run")
        first = {"name": f"{what}, {labels}" if is_run else name, "run": name[3:] if is_run else ""}
        table.append(
            first
            | {"split": config.split, "images": len(cases)}
            | {k: f"{v:.6g}" for k, v in mean_scores(parts).items()}
        )
        if is_run:
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            rows = [row for part in parts for row in part["rows"]]
            metrics.write_metrics_csv(folder / "metrics.csv", rows)
            metrics.write_summary(folder / "summary.json", metrics.summarise(rows))
    runtime.write_csv(out / "table.csv", table)
    runs = [by_case for name, by_case in results.items() if name.startswith("run")]
    rows, objects = [], []
    for case in cases:
        for same in zip(*(run[case]["rows"] for run in runs)):
            numbers = {
                k: mean_of(row[k] for row in same) for k in same[0] if k not in ("case", "class")
            }
            rows.append(same[0] | numbers)
        found = [run[case]["objects"][0] for run in runs]
        objects.append({k: case if k == "case" else mean_of(f[k] for f in found) for k in found[0]})
    metrics.write_metrics_csv(out / "metrics.csv", rows)
    metrics.write_summary(out / "summary.json", metrics.summarise(rows))
    runtime.write_csv(out / "objects.csv", objects)


def mean_of(values: Any) -> float:
    """Mean of what is not NaN, NaN where nothing is left."""
    kept_values = [v for v in values if not math.isnan(v)]
    return float(np.mean(kept_values)) if kept_values else math.nan


TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "iou_from_dice": "d/(2-d)",
    "object_dice": "object Dice",
    "aji": "AJI",
}
TITLES |= {"aji_binary": "AJI binary", "miou": "mIoU"}


def print_table(folders: Sequence[Path]) -> None:
    """The rows of table.csv of some folders side by side, runs of a name as mean±SD (ddof 1, D9)."""  # D9
    rows: dict[str, list[dict[str, str]]] = {}
    for folder in folders:
        for row in runtime.read_csv(folder / "table.csv"):
            same = rows.setdefault(row["name"], [])
            if row["run"] or not same:  # a floor is the same for all
                same.append(row)
    order = sorted(rows, key=lambda name: not rows[name][0]["run"])  # runs first
    columns = [k for k in TITLES if any(row[k] != "nan" for same in rows.values() for row in same)]
    width = max(28, *(len(name) + 1 for name in order))
    lines = [
        " " * width + "".join(f"{TITLES[k]:>16}" for k in columns) + f"{'runs':>6}{'images':>8}"
    ]
    for name in order:
        cells = []
        for k in columns:
            values = np.array([float(row[k]) for row in rows[name]])
            spread = f"±{values.std(ddof=1):.3f}" if len(values) > 1 else ""
            cells.append("-" if np.isnan(values).all() else f"{values.mean():.3f}{spread}")
        runs = len(rows[name]) if rows[name][0]["run"] else ""
        lines.append(
            f"{name:<{width}}"
            + "".join(f"{c:>16}" for c in cells)
            + f"{runs:>6}{rows[name][0]['images']:>8}"
        )
    say("\n".join(lines))


def write_mask(file: Path, mask: np.ndarray, values: Mapping[int, int]) -> None:
    """An 8-bit grey PNG with the publisher's label values."""
    table = np.array([values.get(v, v) for v in range(max(values) + 1)], np.uint8)
    write_png(file, table[mask])


def write_png(file: Path, array: np.ndarray) -> None:
    buffer, note = BytesIO(), PngInfo()
    note.add_text("Software", loaders.OURS.decode())  # what check_output looks for
    Image.fromarray(array).save(buffer, "PNG", pnginfo=note)
    loaders.atomic_write(file, buffer.getvalue())


def draw_segmentations(shown: Sequence[Any], data: Any, file: Path) -> None:
    """Image, truth and the first run's prediction of some cases."""
    colours, images, titles = figures.class_colours(len(data.classes)), [], []
    for _, case, image, truth, mask in shown:
        truth = np.where(truth > len(data.classes), 0, truth)
        images += [
            np.ascontiguousarray(image),
            figures.overlay(image, truth, colours),
            figures.overlay(image, mask, colours),
        ]
        titles += [case, "truth", "prediction"]
    figures.montage(images, titles, file, columns=6 if len(shown) > 1 else 3)


def load_backbone(config: Config, data: Any, ranks: Ranks) -> Backbone:
    """The pre-trained network of --checkpoint: ours (averaged weights, or --init-weights raw) or a public one."""
    if config.checkpoint == "none":
        return frozen(config, untrained(config, loaders.data_record(data)), ranks)
    model = fresh(config, loaders.data_record(data))
    load_start(str(pretrained_path(config)), model, ranks, raw=config.init_weights == "raw")
    return frozen(config, model, ranks)


def check_blocks(config: Config) -> None:
    """InputError where the network has no such decoder (of a ViT: encoder) blocks as the features are to come from."""
    count = (
        VIT[config.vit]["depth"]
        if config.method == "mae"
        else len(config.channel_mult) * (config.num_res_blocks + 1)
    )
    if not 0 <= min(config.taps) <= max(config.taps) < count:
        raise InputError(
            f"--blocks is {config.taps}, this network has blocks 0 to {count - 1}; choose by the flag"
        )


def frozen(config: Config, model: Any, ranks: Ranks) -> Backbone:
    model = fast_layout(model.to(ranks.device)).eval().requires_grad_(False)
    return Backbone(config, model, ranks.device, runtime.number_format(config.amp, ranks.device)[0])


def load_runs(
    config: Config, files: Sequence[Path], ranks: Ranks
) -> tuple[list[Run], dict[str, Any]]:
    """Runs that `segment` wrote into one folder, and the record of the data they learned from."""
    runs, record, shared = [], {}, None
    for file in files:
        state = runtime.load_checkpoint(file, SCRIPT)
        seed, record = state["config"]["seed"], state["data"]
        mine = replace(config, seed=seed)
        if mine.method != "unet" and "backbone" not in state:
            raise InputError(
                f"{file} is a pre-trained network, not a classifier; run `segment`, or name its folder"
            )
        if mine.method == "unet":
            model = network_for(mine, record)
            model.load_state_dict(state["ema"] or state["model"])
            if state["step"] < state["config"]["steps"]:
                say(f"note: {file} is at step {state['step']} of {state['config']['steps']}", ranks)
            runs.append(Run(seed, frozen(mine, model, ranks), []))
            continue
        if state["backbone"] == "random":
            net = frozen(mine, untrained(mine, record), ranks)
        elif shared is None:
            model = network_for(mine, record)
            model.load_state_dict(
                runtime.load_checkpoint(file.parent.parent / "backbone.pt", SCRIPT)["model"]
            )
            net = shared = frozen(mine, model, ranks)
        else:
            net = shared
        scale = [[v.to(ranks.device) for v in vectors] for vectors in state.get("scale", ())]
        members = []
        for weights in state["model"].values():
            classifier = new_classifier(mine, state["widths"], len(record["classes"]) + 1)
            classifier.load_state_dict(weights)
            members.append(classifier.to(ranks.device).eval())
        mine_net = replace(net, scale=(scale[0], scale[1]) if scale else None)
        runs.append(Run(seed, mine_net, members, state["backbone"] == "random"))
    return runs, record


def run_files(path: Path, needed: bool = True) -> list[Path]:
    """A run's file itself, or run0/last.pt, run1/last.pt, ... of a folder. Raises: InputError where one is needed."""
    found = [f for f in path.glob("run*/last.pt") if re.fullmatch(r"run\d+", f.parent.name)]
    files = [path] if path.is_file() else sorted(found, key=lambda f: int(f.parent.name[3:]))
    if needed and not files:
        raise InputError(
            f"{path} holds no classifier (run0/last.pt); run `segment` with the same flags first"
        )
    return files


def evaluate(config: Config, data: Any, ranks: Ranks) -> int:
    """Score the classifiers of `segment` again: on another split, or on other data of the same classes."""
    runs, record = load_runs(config, run_files(classifier_path(config)), ranks)
    for key in ("channels", "classes"):
        if record[key] != loaders.data_record(data)[key]:
            raise InputError(
                f"{config.data} has {key} {data.meta[key]}, the classifier {record[key]}; prepare alike"
            )
    if (here := loaders.data_record(data).get("reduce", 1)) != (there := record.get("reduce", 1)):
        raise InputError(
            f"{config.data} was made with --reduce {here}, the classifier's with {there}; prepare alike"
        )
    path, out = classifier_path(config), config.run_folder
    if out.resolve() == (path if path.is_dir() else path.parent).resolve():
        old = runtime.load_checkpoint(run_files(path)[0], SCRIPT)["config"]
        out = scores_folder(config, data, out, old)[0]
    return score(config, data, runs, ranks, out)


def scores_folder(
    config: Config, data: Any, folder: Path, first: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Where scores go: into the folder of the classifiers those of what was scored there first, others below it.

    first: settings with which that was, where the folder does not say it (scored.json). Also returns what that says.
    """
    here = {
        "data": Path(config.data).name,
        "split": config.split,
        "images": len(cases_of(config, data)),
    }
    try:
        was = json.loads((folder / "scored.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        same = config.limit in (0, first["limit"])
        was = {
            "data": Path(first["data"]).name,
            "split": first["split"],
            "images": here["images"] if same else 0,
        }
    if was == here:
        return folder, here
    other = f"{here['data']}-" * (here["data"] != was.get("data"))
    return folder / (other + config.split + f"-{config.limit}" * (config.limit > 0)), here


def segment(config: Config, data: Any, ranks: Ranks, stop: runtime.StopFlag) -> int:
    """Train --runs classifiers on --labels images (or supervised U-Nets), then score them. Finished runs stay."""
    # said in words, since `evaluate` may be given data of another name
    config = replace(config, protocol="natural" if config.natural else "medical")
    folder, record = config.segment_folder, loaders.data_record(data)
    cases_of(
        config, data
    )  # before hours of work: is there something to score, and something to learn from
    cases = labelled_cases(data, config)
    seeds = range(config.seed, config.seed + config.runs)
    empty: dict[str, Any] = {"format": runtime.FORMAT, "script": SCRIPT, "step": 0, "data": record}
    empty |= {
        "ema": {},
        "optimizer": {},
        "scaler": {},
        "best": {},
    }  # keys that every checkpoint has
    if config.method == "unet":
        for seed in seeds:
            code = train(
                replace(config, seed=seed, out=str(folder / f"run{seed}")), data, ranks, stop
            )
            if code:
                return code
        stop.restore()  # from here on there is nothing to save
    else:
        net, backbone = load_backbone(config, data, ranks), folder / "backbone.pt"
        random_start = config.checkpoint == "none"
        if not config.overwrite:
            check_started(config, net, folder)
        runtime.make_run(folder, asdict(config), config.overwrite, ranks)
        if ranks.first and not random_start and not backbone.exists():
            runtime.save_checkpoint(
                backbone, empty | {"config": asdict(config), "model": net.model.state_dict()}
            )
        runtime.gather(None, ranks)  # all wait until it is there
        t, blocks = config.times, config.taps
        what = f"t {t}, blocks {blocks}, {sum(net.widths())} features, norm {config.norm}, stop {config.stops}"
        notes = ["D2"] * (config.method == "mdm" and config.feature_mask == "on") + ["D3"] * (
            config.method == "ddpm"
        )
        notes += ["D7", "D8", "D9"] + ["D12"] * (
            config.natural and config.method == "ddpm" and not config.blocks
        )
        notes += ["D13"] * random_start + ["D14"] * (config.norm == "standard")
        notes += ["D15"] * (config.classifier_norm == "none")
        say(f"classifiers on {len(cases)} labelled images -> {folder}\n  {', '.join(cases[:8])}; {what}\n"
            f"  differs   {' '.join(notes)} (see the top of {SCRIPT}.py)", ranks)  # fmt: skip
        for seed in seeds[ranks.rank :: ranks.world]:
            mine, file = replace(config, seed=seed), folder / f"run{seed}/last.pt"
            if file.exists():
                continue
            if random_start:
                net = frozen(mine, untrained(mine, record), ranks)
            if config.norm == "standard":
                net = standardised(replace(net, scale=None), data, cases, seed)
            classifiers = fit(mine, net, data, seed, folder)
            state = empty | {"config": asdict(mine), "widths": net.widths()}
            state |= {"model": {str(i): c.state_dict() for i, c in enumerate(classifiers)}}
            state |= {
                "backbone": "random" if random_start else "backbone.pt",
                "scale": net.scale or (),
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            runtime.save_checkpoint(file, state)
    runtime.gather(None, ranks)
    runs, _ = load_runs(config, [folder / f"run{seed}/last.pt" for seed in seeds], ranks)
    out, scored = scores_folder(config, data, folder, asdict(config))
    runtime.gather(None, ranks)  # all have looked
    if ranks.first and out == folder:
        runtime.write_json(folder / "scored.json", scored)
    return score(config, data, runs, ranks, out)


def check_started(config: Config, net: Backbone, folder: Path) -> None:
    """Refuse to continue what `segment` began in `folder` with other settings or another frozen network."""
    for file in run_files(
        folder, needed=False
    ):  # of other seeds too: `evaluate` takes all of them together
        old = runtime.load_checkpoint(file, SCRIPT)["config"]
        if old["protocol"] == "auto":  # as an earlier version saved it
            old["protocol"] = "natural" if Path(old["data"]).name in NATURAL else "medical"
        runtime.check_same_config(
            old, asdict(replace(config, seed=old["seed"])), MAY_DIFFER | {"runs"}, folder
        )
    file = folder / "backbone.pt"
    if config.checkpoint != "none" and file.exists():
        old, weights = runtime.load_checkpoint(file, SCRIPT)["model"], net.model.state_dict()
        if old.keys() != weights.keys() or any(
            not torch.equal(old[k], weights[k].cpu()) for k in old
        ):
            raise InputError(f"{file} holds other weights than --checkpoint: its classifiers belong to an earlier "
                             "state; use `segment --overwrite`, or another --out")  # fmt: skip


def probe(config: Config, data: Any, ranks: Ranks) -> int:
    """Table 8: one linear layer on the averaged maps of frozen blocks tells CIFAR-10's classes.

    A layer for each block and t of --feature-t learns on nine tenths of the training images (flip and crop, Adam 1e-3,
    cosine over 15 epochs, batch 128); the one that is best on the last tenth is tested, as it is.
    """
    if not isinstance(data, loaders.Cifar):
        raise InputError(
            f"probe needs CIFAR-10, --data {config.data} is none; name the folder cifar-10-batches-py"
        )
    config = replace(config, feature_t=config.feature_t or (0, 50))
    net, content, epochs, size = load_backbone(config, data, ranks), data.content, 15, 128
    images, labels = (content[f"train_{k}"][: config.limit or None] for k in ("images", "labels"))
    order = np.random.default_rng(seed_of(config.seed, "probe")).permutation(len(images))
    held, learn = order[: len(order) // 10], order[len(order) // 10 :]
    names = [(t, k) for t in config.times for k in config.taps]
    torch.manual_seed(config.seed)
    layers = nn.ModuleList(nn.Linear(w, 10) for w in net.widths()).to(net.device)
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * max(1, -(-len(learn) // size))
    )

    def answers(batch: np.ndarray, epoch: int | str, numbers: Iterable[int]) -> list[Tensor]:
        x0 = torch.from_numpy(as_input(batch)).to(net.device)
        keys: list[Key] = [
            (config.seed, "probe", epoch, int(n)) for n in numbers
        ]  # each image its own mask
        maps, _ = net.window_features(x0, keys)
        return [layer(m.mean((2, 3))) for layer, m in zip(layers, maps)]  # each [B, 10]

    def accuracy(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        right = np.zeros(len(names))
        with torch.no_grad():
            for i in range(0, len(images), size):
                truth = torch.from_numpy(labels[i : i + size]).to(net.device)
                found = answers(images[i : i + size], "test", range(i, i + len(truth)))
                right += [float((a.argmax(1) == truth).sum()) for a in found]
        return right / len(images)

    for epoch in tqdm(range(epochs), desc="probe", unit="epoch", disable=config.quiet or None):
        rng = np.random.default_rng(seed_of(config.seed, "probe", epoch))
        shuffled = rng.permutation(learn)
        for i in range(0, len(shuffled), size):
            batch = augment(images[shuffled[i : i + size]], rng)
            truth = torch.from_numpy(labels[shuffled[i : i + size]]).to(net.device)
            found = answers(batch, epoch, shuffled[i : i + size])
            loss = torch.stack(
                [F.cross_entropy(a, truth) for a in found]
            ).sum()  # of independent layers
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    chosen = accuracy(images[held], labels[held])
    test = accuracy(content["test_images"], content["test_labels"])
    best = int(chosen.argmax())
    rows = [
        {"t": t, "block": k, "held": f"{a:.4f}", "test": f"{b:.4f}"}
        for (t, k), a, b in zip(names, chosen, test)
    ]
    if ranks.first:
        runtime.write_csv(config.run_folder / "probe.csv", rows)
    for row in rows:
        say("  ".join(f"{k} {v}" for k, v in row.items()), ranks)
    t, k = names[best]
    say(f"linear probe: {100 * test[best]:.2f} % of {len(content['test_images'])} test images at t {t}, block {k}, "
        f"chosen on {len(held)} training images", ranks)  # fmt: skip
    return 0


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip with p 0.5, and shift by at most 4 pixels with mid grey from outside: uint8 [B, 3, 32, 32] -> the same."""
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)), constant_values=128)
    out, side = np.empty_like(images), images.shape[2]
    for i, (y, x, flip) in enumerate(
        zip(*rng.integers(0, 9, (2, len(images))), rng.random(len(images)) < 0.5)
    ):
        window = padded[i, :, y : y + side, x : x + side]
        out[i] = window[:, :, ::-1] if flip else window
    return out


# =====================================================================================================================
# Predict
# =====================================================================================================================


def predict(config: Config, ranks: Ranks) -> int:
    """Masks for image files or a folder of them, of any size, as PNG with the published label values.

    Where the training images were reduced (data_prep's --reduce), these are too, and their masks enlarged again.
    """
    if not config.image or not config.output:
        raise InputError(
            "predict needs --image FILE... (or one folder) and --output FILE.png (or folder)"
        )
    runs, record = load_runs(config, run_files(classifier_path(config)), ranks)
    files = find_images([Path(p) for p in config.image])
    output, run = Path(config.output), runs[0]
    to_file = output.suffix.lower() == ".png"
    if not to_file and output.suffix.lower() in loaders.IMAGE_ENDINGS:
        raise InputError(f"--output {output}: masks are PNG; end it with .png, or give a folder")
    if to_file and len(files) > 1:
        raise InputError(
            f"--output {output} is one file, --image names {len(files)} images; give a folder"
        )
    values, faults = {int(k): v for k, v in record["label_values"].items()}, []
    reduce = record.get("reduce", 1)
    smaller = (
        f"; images are made {reduce} times smaller, as those it learned from" if reduce > 1 else ""
    )
    say(f"{classifier_path(config)}: {record['name']}, run of seed {run.seed}{smaller}", ranks)
    for file in files[ranks.rank :: ranks.world]:
        target = output if to_file else output / f"{file.stem}.png"
        loaders.check_output(target, [file])
        try:
            image = loaders.read_image(file)
            if len(image) != len(record["channels"]):
                raise InputError(
                    f"{file}: {len(image)} channel, expected {len(record['channels'])} (RGB); convert it"
                )
            if min(image.shape[1:]) < reduce:
                raise InputError(
                    f"{file}: {image.shape[2]} x {image.shape[1]} pixels, too few for --reduce {reduce}"
                )
        except InputError as error:
            faults.append(str(error))
            continue
        result = segment_image(run, loaders.shrink(image, reduce), file.stem)
        if reduce > 1:
            result = enlarged(result, image.shape[1:], reduce)
        write_mask(target, result.mask, values)
        if config.save_maps:
            maps, colours = target.parent / "maps", figures.class_colours(len(record["classes"]))
            for name, p in zip(record["classes"], result.prob[1:]):
                write_png(
                    maps / f"{target.stem}_{re.sub(r'[^A-Za-z0-9]+', '-', name)}.png",
                    np.rint(255 * p).astype(np.uint8),
                )
            write_png(
                maps / f"{target.stem}_overlay.png",
                figures.overlay(image.transpose(1, 2, 0), result.mask, colours),
            )
        shares = ", ".join(
            f"{name} {(result.mask == v).mean():.1%}" for name, v in record["classes"].items()
        )
        say(f"{target}: {image.shape[2]} x {image.shape[1]} pixels; {shares}")
    faults = [
        fault for part in runtime.gather(faults, ranks) for fault in part
    ]  # all processes finish first
    if faults:
        raise InputError(
            f"{len(faults)} of {len(files)} images were left out: {' | '.join(faults)}"
        )
    return 0


def enlarged(found: Segmentation, shape: Sequence[int], k: int) -> Segmentation:
    """Each pixel k times as wide and high; at the right and lower end the last one is repeated to `shape`."""
    rows, columns = (
        np.minimum(np.arange(n) // k, size - 1) for n, size in zip(shape, found.mask.shape)
    )
    return Segmentation(
        found.mask[rows][:, columns], found.prob[:, rows][:, :, columns], found.uncertainty
    )


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, or the images of one folder, in order of name. Raises: InputError."""
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in loaders.IMAGE_ENDINGS)
        if not paths:
            raise InputError(
                f"{folder}: no {', '.join(loaders.IMAGE_ENDINGS)} in the folder; check --image"
            )
    if missing := [str(p) for p in paths if not p.is_file()]:
        raise InputError(
            f"--image {', '.join(missing)}: not there, expected image files or one folder; check the path"
        )
    names: dict[str, Path] = {}
    for p in paths:
        if p.stem in names:
            raise InputError(
                f"{p} and {names[p.stem]} would both become {p.stem}.png; predict them apart"
            )
        names[p.stem] = p
    return list(paths)


# =====================================================================================================================
# Command line
# =====================================================================================================================

VERBS = ("pretrain", "segment", "evaluate", "predict", "reconstruct", "cluster", "probe")
# Flag -> the verbs that look at it, "" being the bare run; given to others it is refused.
ONLY: dict[str, tuple[str, ...]] = {
    "checkpoint": VERBS[1:],
    "image": ("predict",),
    "output": ("predict",),
}
ONLY |= {"save_maps": ("predict",), "save_members": ("", "segment", "evaluate"), "k": ("cluster",)}
ONLY |= {
    "split": ("", "segment", "evaluate", "reconstruct", "cluster"),
    "init": ("", "pretrain", "segment"),
}
ONLY |= {"limit": (*ONLY["split"], "probe")}
# What becomes of the flags when a later command continues or uses what an earlier one made:
#              taken from the checkpoint   may differ                        another value is refused
#   pretrain   -                           MAY_DIFFER, LATER                 all others
#   segment    NETWORK, of our files       all others                        NETWORK
#   evaluate,
#   predict    all but ONCE                USE                               all others
# ONCE: how something is used this time.
ONCE = {
    "checkpoint",
    "split",
    "limit",
    "save_members",
    "save_maps",
    "image",
    "output",
    "overwrite",
    "quiet",
}
ONCE |= {"device", "amp", "workers", "k"}
# On continuing a run these may differ: they change where, how fast and how long, not what.
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
# What pre-training does not look at.
LATER = {
    "init_weights",
    "protocol",
    "blocks",
    "feature_t",
    "feature_mask",
    "feature_norm",
    "share_noise",
    "labels",
}
LATER |= {
    "draw",
    "runs",
    "ensemble",
    "pixels",
    "crops",
    "stop",
    "stop_epoch",
    "stop_loss",
    "classifier_steps",
}
LATER |= {"classifier_lr", "classifier_norm"}
# What a pre-trained network is; a public file does not hold it.
NETWORK = {
    "num_channels",
    "channel_mult",
    "num_res_blocks",
    "num_groups",
    "num_head_channels",
    "vit",
    "tile",
}
NETWORK |= {"attention_resolutions", "method", "target", "schedule", "fixed_t"}
# For evaluate and predict these may differ from those of segment.
USE = ONCE | {"data", "preset", "out", "labels", "draw", "recompute", "compile"}


def pretrained_path(config: Config) -> Path:
    return runtime.checkpoint_file(config.checkpoint, config.run_folder, ("last.pt",))


def classifier_path(config: Config) -> Path:
    """A folder with runs, or one run's file."""
    return (
        Path(config.checkpoint) if config.checkpoint not in ("", "none") else config.segment_folder
    )


def with_pretrained(config: Config, given: dict[str, Any]) -> Config:
    """The settings of the pre-training that --checkpoint names, changed by the given flags; a public file has none."""
    path = pretrained_path(config)
    state = runtime.load_tensors(path)
    if isinstance(state, dict) and "format" in state:
        every = {field.name for field in fields(Config)}
        found = runtime.trained_config(config, given, path, SCRIPT, every - NETWORK, ONCE)
        if found.method == "unet" or "backbone" in state:
            what = "a supervised network" if found.method == "unet" else "a classifier"
            raise InputError(
                f"{path} is {what}, expected a pre-trained network; choose another --checkpoint"
            )
        return found
    width = network_flags_of(state, path, given)
    if (
        config.method == "mdm"
        and len(state.get("module.out.2.bias", state.get("out.2.bias", ()))) == 6
    ):
        raise InputError(f"{path} has 6 output channels, mean and variance of noise: a DDPM, not MDM; add "
                         "--method ddpm (and --schedule linear for FFHQ)")  # fmt: skip
    return replace(config, **width)


def network_flags_of(state: Any, path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The network's flags that were not given, as one of our checkpoints says; of a state dict only num_channels.

    Depth and multipliers cannot be told from its shapes.
    """
    if isinstance(state, dict) and "format" in state:
        saved = runtime.load_checkpoint(path, SCRIPT)["config"]
        return {
            k: saved[k]
            for k in NETWORK - {"fixed_t", "tile", "target", "schedule", "method"}
            if k not in given
        }
    try:
        state = {k.removeprefix("module."): v for k, v in state.items()}
        return (
            {}
            if "num_channels" in given
            else {"num_channels": len(state["input_blocks.0.0.weight"])}
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} has no {error}, so it is no U-Net of this kind; use another file"
        ) from error


def resolve(verb: str, config: Config, given: dict[str, Any]) -> Config:
    """The settings of a verb: those of what it continues from, where there is something, changed by the given flags."""
    if verb in ("", "pretrain"):
        if config.method == "unet":
            raise InputError(
                "--method unet learns from labels, there is nothing to pre-train; use the verb segment"
            )
        if not config.init:
            return config
        return replace(
            config,
            **network_flags_of(runtime.load_tensors(Path(config.init)), Path(config.init), given),
        )
    if verb in ("evaluate", "predict"):
        path = classifier_path(config)
        found = runtime.trained_config(config, given, run_files(path)[0], SCRIPT, USE, ONCE)
        saved = runtime.load_checkpoint(run_files(path)[0], SCRIPT)["config"]
        found = replace(
            found, labels=saved["labels"], draw=saved["draw"]
        )  # the flags only said where to look
        beside = str(
            path if path.is_dir() else path.parent
        )  # without --checkpoint, --out only says where to look
        out = given.get("out", beside) if given.get("checkpoint", "none") != "none" else beside
        return replace(found, checkpoint=str(path), out=out)
    if verb == "segment" and config.method != "unet" and config.init:
        raise InputError(
            "--init is for pretrain and for --method unet; name a pre-trained network by --checkpoint"
        )
    if config.method == "unet":
        if "checkpoint" in given:
            raise InputError(
                "--method unet has no pre-trained network; leave --checkpoint out, or start from --init"
            )
        if verb != "segment":
            raise InputError(
                f"{verb} needs a pre-trained network, --method unet has none; choose another --method"
            )
        return config
    if config.checkpoint == "none":
        return config
    return with_pretrained(config, given)


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").split("\n\n")[0]
    verb, config, given = runtime.parse_flags(Config, argv, VERBS, PRESETS, about, ONLY)
    config = resolve(verb, config, given)
    if verb in ("", "segment", "cluster", "probe") and config.method != "unet":
        check_blocks(config)
    ranks, stop = runtime.start_processes(config.device), runtime.StopFlag()
    try:
        if verb == "predict":
            stop.restore()
            code = predict(config, ranks)
        elif verb in ("", "pretrain", "segment"):
            data = open_images(config)
            if verb != "segment" or config.method == "unet":
                folder = (
                    config.segment_folder / f"run{config.seed}"
                    if verb == "segment"
                    else config.run_folder
                )
                config = runtime.shared_batch(config, given, ranks, folder)
            if not verb:  # before the training: is there something to learn from afterwards, and something to score
                cases_of(config, data), labelled_cases(data, config)
                check_unused(config)
            code = train(config, data, ranks, stop) if verb != "segment" else 0
            if verb != "pretrain" and code == 0:
                supervised = verb == "segment" and config.method == "unet"
                if not supervised:
                    stop.restore()  # what takes long from here on is saved run by run
                rows = (
                    [config]
                    if verb == "segment"
                    else [replace(config, checkpoint=c) for c in story(config)]
                )
                for row in rows:
                    code = code or segment(row, data, ranks, stop)
                if len(rows) > 1 and code == 0 and ranks.first:
                    say(
                        "\nside by side: the pre-trained network, the same one untrained, and what needs no network"
                    )
                    print_table(
                        [
                            scores_folder(row, data, row.segment_folder, asdict(row))[0]
                            for row in rows
                        ]
                    )
        else:
            stop.restore()
            verbs = {
                "evaluate": evaluate,
                "reconstruct": reconstruct,
                "cluster": cluster,
                "probe": probe,
            }
            code = verbs[verb](config, open_images(config), ranks)
    finally:
        stop.restore()
    runtime.stop_processes()
    return code


def check_unused(config: Config) -> None:
    """InputError where the bare run would train on, and classifiers of the state before would then be in its way."""
    last, folder = config.run_folder / "last.pt", config.segment_folder
    if config.overwrite or not (last.exists() and (folder / "backbone.pt").exists()):
        return
    state = runtime.load_checkpoint(last, SCRIPT)
    ended = 0 < 60 * config.minutes <= state["seconds"]
    if (step := state["step"]) < config.steps and not ended:
        raise InputError(f"{folder} holds classifiers of step {step}, --steps {config.steps} would train on; use "
                         "`pretrain` and then `segment --overwrite`, or another --out")  # fmt: skip


def story(config: Config) -> list[str]:
    """--checkpoint of each row of the bare run: the network just trained; on fake tissue also one that saw nothing."""
    last = str(config.run_folder / "last.pt")
    return [last, "none"] if config.data == "synthetic" else [last]


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
