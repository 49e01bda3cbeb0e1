"""Rivals of recycling, the 2D networks of version 1, and a U-net that was trained on noisy images.

They are trained, evaluated and used like the networks of diffseg3d_recycle.py, by the same verbs
and flags, and three more:

    python -m results.diffseg_rivals --data prostate --preset paper --dims 2
    python -m results.diffseg_rivals train --data hippocampus --recycle recursive

    --dims 2                  all slices of a volume go through a 2D network as one batch; loss and
                              scores stay those of the volume (version 1, tables 1 to 4)
    --recycle recursive       Kolbeinsson & Mikolajczyk 2022: the whole chain from pure noise, with
                              a loss at each step; the truth enters through the losses only
    --recycle self-condition  Chen, Zhang & Hinton 2022: x_k is made of the truth, but in half of
                              the samples the network also sees what it made of the same x_k; in
                              sampling it sees its prediction at the step before
    --image-noise SD          noise of an SD up to this on the training images, the control of
                              results/diffseg3d_uncertainty.sh

The script's functions look their parts up when they are called; `main` puts the rivals' parts in
the place of the script's own for one command.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import diffseg3d_recycle as D
from common import InputError, runtime
from common.flags import flag

SCRIPT = "diffseg_rivals"
OWN_BUILD, OWN_LOSS, OWN_TRAIN, OWN_AUGMENT = (
    D.build_model,
    D.recycling_loss,
    D.train,
    D.augment,
)


@dataclass(frozen=True)
class Config(D.Config):
    """The flags of the script and of its rivals."""

    recycle: Literal["prev", "max", "none", "recursive", "self-condition"] = flag(  # type: ignore
        "prev", "what x_k is made of", "model"
    )
    dims: int = flag(3, "2: a 2D network for all slices", "model", 2, 3)
    image_noise: float = flag(0.0, "largest SD of noise on an image in [0, 1]", "train", 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_noise and self.augment == "off":
            raise InputError("--image-noise is a part of the augmentation; use --augment on")


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


class Slices(nn.Module):
    """A 2D network for volumes: model(x, t), x [B, C, X, Y, Z]; Z becomes a part of the batch."""

    def __init__(self, network: D.UNet):
        super().__init__()
        self.network = network
        self.in_channels = network.in_channels
        kinds: dict[Any, Any] = {nn.Conv3d: nn.Conv2d, nn.ConvTranspose3d: nn.ConvTranspose2d}
        for name, m in list(network.named_modules()):
            if type(m) in kinds:
                sizes = (m.kernel_size[0], m.stride[0], m.padding[0])
                bias = m.bias is not None
                flat = kinds[type(m)](m.in_channels, m.out_channels, *sizes, bias=bias)
                parent, _, last = name.rpartition(".")
                setattr(network.get_submodule(parent), last, flat)
        network.apply(D.start_as_haiku)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        slices = x.movedim(-1, 1).flatten(0, 1)  # [B Z, C, X, Y]
        out = self.network(slices, t.repeat_interleave(x.shape[-1]))
        return out.unflatten(0, (len(x), -1)).movedim(1, -1)  # [B, C_out, X, Y, Z]


class SelfConditioned(nn.Module):
    """A network that also sees a predicted mask: model(x, t), x [B, M + C + C, *S].

    Without the mask, [B, M + C, *S], as in sampling, it takes what it made of the same window at
    the step before, and zeros at t = T.
    """

    def __init__(self, network: nn.Module, masks: int, target: str):
        super().__init__()
        self.network, self.masks, self.target = network, masks, target
        self.in_channels = network.in_channels
        self.step = 0  # t of the newest call
        self.window = 0  # number of its window
        self.last: list[Tensor] = []  # predicted masks, window by window

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.shape[1] == self.in_channels:
            return self.network(x, t)
        step = int(t[0])
        self.window = self.window + 1 if step == self.step else 0
        self.step = step
        xk = x[:, -self.masks :]
        if step == D.T:
            self.last = [*self.last[: self.window], torch.zeros_like(xk)]
        output = self.network(torch.cat([x, self.last[self.window]], dim=1), t)
        s = D.schedule(D.T, x.device)  # of all steps: k is t
        mask = D.x0_of(s, self.target, output.float(), xk, t).clamp(-1, 1)
        self.last[self.window] = mask
        return output


def build_model(config: Config, in_channels: int, out_channels: int) -> nn.Module:
    """Return the script's network, or a rival's."""
    conditioned = config.recycle == "self-condition" and config.method == "diffusion"
    inputs = in_channels + out_channels * conditioned
    model: Any = OWN_BUILD(config, inputs, out_channels)
    if config.dims == 2:
        model = Slices(model)
    if conditioned:
        model = SelfConditioned(model, out_channels, config.target)
    return model


# --------------------------------------------------------------------------------------------------
# Losses, with the arguments of the script's recycling_loss
# --------------------------------------------------------------------------------------------------


def recycling_loss(
    model, image, label, k, eps, other_eps, K=5, recycle="prev", target="x0", dice=True
) -> Tensor:
    """Return the loss [B] of the script's ways to make x_k, or of a rival's."""
    if recycle == "recursive":
        return recursive_loss(model, image, label, k, eps, K, target, dice)
    if recycle == "self-condition":
        return self_condition_loss(model, image, label, k, eps, other_eps, K, target, dice)
    return OWN_LOSS(model, image, label, k, eps, other_eps, K, recycle, target, dice)


def recursive_loss(model, image, label, k, eps, K=5, target="x0", dice=True) -> Tensor:
    """Return the mean loss [B] of the K steps from pure noise; no gradient from step to step."""
    s = D.schedule(K, image.device)
    xk = first = eps
    losses = []
    for number in range(K, 0, -1):
        k = torch.full_like(k, number)
        output = model(torch.cat([image, xk], dim=1), s.t[k]).float()
        losses.append(D.diffusion_loss(s, target, output, label, xk, eps, k, dice))
        if number > 1:
            mask = D.x0_of(s, target, output.detach(), xk, k).clamp(-1, 1)
            eps = noise_like(first, number)
            xk = D.q_sample(s, mask, eps, k - 1)
    return torch.stack(losses).mean(dim=0)


def self_condition_loss(
    model, image, label, k, eps, other_eps, K=5, target="x0", dice=True
) -> Tensor:
    """Return the loss [B]; half of the samples see what the network makes of the same x_k."""
    s = D.schedule(K, image.device)
    x0 = D.mask_to_x0(label, eps.shape[1])
    xk = D.q_sample(s, x0, eps, k)
    seen = torch.zeros_like(x0)
    half = (other_eps[:, 0, 0, 0, 0] > 0).nonzero()[:, 0]  # a fair coin; its noise has no other use
    if len(half):
        x = torch.cat([image, xk, seen], dim=1)[half]
        with torch.no_grad():
            output = model(x, s.t[k[half]]).float()
            seen[half] = D.x0_of(s, target, output, xk[half], k[half]).clamp(-1, 1)
    output = model(torch.cat([image, xk, seen], dim=1), s.t[k]).float()
    return D.diffusion_loss(s, target, output, label, xk, eps, k, dice)


# --------------------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------------------


def generator_of(sample: Tensor, name: int | str) -> torch.Generator:
    """Return a generator that is a function of a drawn sample, and so of (seed, n), and a name."""
    numbers = str(sample.flatten()[:8].tolist())
    return torch.Generator(sample.device).manual_seed(runtime.seed_of(name, numbers))


def noise_like(eps: Tensor, number: int) -> Tensor:
    """Return more noise [B, C, *S] on the device of eps, for each sample a function of its eps."""
    fields = [torch.randn(e.shape, device=e.device, generator=generator_of(e, number)) for e in eps]
    return torch.stack(fields)


def noisy_augment(
    most: float, image: Tensor, label: Tensor, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """Augment, then add noise to each image; its SD is uniform in 0..most."""
    image, label = OWN_AUGMENT(image, label, theta)
    noises = []
    for sample in theta:
        generator = generator_of(sample, "image noise")
        sd = most * torch.rand(1, generator=generator)
        noises.append(sd * torch.randn(image.shape[1:], generator=generator))
    return image + torch.stack(noises).to(image.device), label


def train(config: Config, data: Any, ranks: runtime.Ranks) -> int:
    """Train as the script does, with noise on the images where --image-noise asks for it."""
    if config.image_noise:
        vars(D)["augment"] = partial(noisy_augment, config.image_noise)
    return OWN_TRAIN(config, data, ranks)


def main(argv: Sequence[str]) -> int:
    parts = {"SCRIPT": SCRIPT, "Config": Config, "build_model": build_model, "train": train}
    parts["recycling_loss"] = recycling_loss
    own = {name: vars(D)[name] for name in [*parts, "augment"]}
    vars(D).update(parts)
    try:
        return D.main(argv)
    finally:
        vars(D).update(own)


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
