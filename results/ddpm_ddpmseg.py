"""DDPM-Seg, the rival in tables 4 and 5 of the label-efficiency paper (Baranchuk et al. 2022).

    python -m results.ddpm_ddpmseg --init RUN --labels 4 --draw 0           train and score
    python -m results.ddpm_ddpmseg predict --checkpoint RUN/ddpmseg-4-draw0 --image a.nii.gz \
        --output mask.nii.gz

The pre-trained network stays as it is. Its decoder's maps at three times are the features of each
pixel, 8,448 at c = 256. Ten small classifiers learn single pixels of the labelled slices, and vote.
It is trained on the slices that fine-tuning of the same draw learns from.

The maps are kept at their own size, as fp16 in files that are mapped to memory: 22 times fewer
numbers than enlarged ones, and no memory grows with the number of slices. A pixel is read between
its four neighbours. For whole slices the first layer works before maps are enlarged: W up(f) =
up(W f). The numbers are those of the public code but for rounding.
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ddpm_pretrain_finetune as ddpm
from common import InputError, atomic_write, flags, loaders, runtime, unet
from common.flags import flag
from common.runtime import Ranks, noise, say, seed_of

SCRIPT = "ddpm_ddpmseg"
AT_ONCE = 64  # pixels of a step
FEWEST = 20  # pixels; a class with fewer in a slice is not learned from there


@dataclass(frozen=True)
class Config(flags.RunFlags):
    """The flags; the pre-trained network is that of --init, `none` for random weights."""

    seed: int = flag(0, "of the classifiers", "train", 0)
    blocks: tuple[int, ...] = flag((5, 6, 7, 8, 12), "decoder blocks of the features", "train", 0)
    t_list: tuple[int, ...] = flag((50, 150, 250), "times of the features", "train", 0, ddpm.T - 1)
    members: int = flag(10, "classifiers that vote", "train", 1)
    epochs: int = flag(100, "of a classifier, at most", "train", 1)
    labels: str = flag("4", "labelled slices: N, all, or a share such as 1%", "train")
    labels_file: str = flag("", "your own list of them instead, see labels.json", "train")
    draw: int = flag(0, "subset seed: which slices these are", "train", 0)
    save: Literal["masks", "maps"] = flag("masks", "maps: shares of votes, too", "save")
    # What results.draws asks of a run, and runtime.Run.
    strategy: str = flag("ddpmseg", "", "")
    t: int = flag(0, "", "")
    lr: float = flag(1e-3, "", "")
    dice: str = flag("joint", "", "")
    variant: str = flag("S", "", "")
    steps: int = flag(10, "", "")
    batch: int = flag(AT_ONCE, "", "")

    @property
    def run_folder(self) -> Path:
        return Path(self.out)

    def __post_init__(self) -> None:
        flags.check_ranges(self)
        ddpm.label_count(self.labels, 1)


SMALL = {"blocks": (1, 3), "members": 3, "epochs": 4, "dice": "per-class"}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": SMALL,
    "laptop": {"blocks": (1, 3, 5), "dice": "per-class"},
    "gpu": {"dice": "per-class"},
    "paper": {},
}

# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class PixelClassifier(nn.Module):
    """Three layers on the feature vector of a pixel; ReLU, then batch norm, as the public code."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        a, b = (128, 32) if classes < 30 else (256, 128)
        self.first = nn.Linear(features, a)
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm1d(a),
            nn.Linear(a, b),
            nn.ReLU(),
            nn.BatchNorm1d(b),
            nn.Linear(b, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:  # [P, D] -> [P, classes]
        return self.rest(self.first(x))

    def of_maps(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return the logits of all pixels [Y X, classes] of one slice; maps: [1, c, h, w] each."""
        widths = [m.shape[1] for m in maps]
        x = self.first.bias[:, None, None]
        for m, weight in zip(maps, self.first.weight.split(widths, dim=1)):
            small = F.conv2d(m, weight[..., None, None])  # [1, a, h, w]
            x = x + F.interpolate(small, tuple(size), mode="bilinear", align_corners=False)[0]
        return self.rest(x.flatten(1).T)  # [Y X, classes]


class PixelEnsemble(nn.Module):
    """The frozen U-Net and classifiers of single pixels that vote: model(x) -> logs of the shares.

    x: [B, 1, Y, X] in [-1, 1]; returns [B, C, Y, X], whose softmax is the share of votes. Raises
    InputError for blocks that the network lacks.
    """

    def __init__(
        self,
        net: unet.UNet,
        schedule: str,
        classes: int,
        blocks: Sequence[int],
        t_list: Sequence[int],
        members: int,
    ):
        super().__init__()
        count = len(net.output_blocks)
        if not blocks or max(blocks) >= count:
            raise InputError(f"--blocks {blocks}: this network has blocks 0 to {count - 1}")
        self.net = net.requires_grad_(False)
        self.schedule, self.classes = schedule, classes
        self.blocks, self.t_list = list(blocks), list(t_list)
        layers: Any = net.output_blocks
        widths = [layers[k][0].out_layers[-1].out_channels for k in blocks]
        self.features = sum(widths) * len(t_list)
        self.members = nn.ModuleList(
            PixelClassifier(self.features, classes) for _ in range(members)
        )

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return maps [B, c, h, w], times outer and blocks inner; all have one noise image."""
        eps = noise(0, "ddpmseg", [0], x.shape[1:], torch.device("cpu")).to(x.device)
        maps = []
        for level in self.t_list:
            t = torch.full((len(x),), level, device=x.device)
            xt = ddpm.q_sample(x, eps, t, self.schedule)
            maps += [m.float() for m in self.net.decode(*self.net.encode(xt, t), self.blocks)]
        return maps

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """t is not used: all networks are called alike."""
        maps, size = self.maps(x), x.shape[2:]
        votes = torch.zeros(len(x), self.classes, math.prod(size), device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # in fp32, as the members learned
            for i in range(len(x)):
                for member in self.members:
                    assert isinstance(member, PixelClassifier)
                    chosen = member.of_maps([m[i : i + 1] for m in maps], size).argmax(1)  # [Y X]
                    votes[i].scatter_add_(0, chosen[None], torch.ones_like(votes[i, :1]))
        return (votes.unflatten(2, tuple(size)) / len(self.members)).log()


# --------------------------------------------------------------------------------------------------
# Features of the labelled slices, and one classifier
# --------------------------------------------------------------------------------------------------


class Features:
    """Maps of all labelled slices at their own size, fp16 in files of a folder, and the labels."""

    def __init__(self, folder: Path, count: int, side: int):
        self.folder, self.count, self.side = folder, count, side
        self.files: list[np.ndarray] = []  # of each map [count, h, w, c]
        self.label = np.zeros((count, side, side), np.uint8)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, i: int, maps: Sequence[Tensor], label: np.ndarray) -> None:
        """Store slice i: maps [1, c, h, w] and label [Y, X]. Small classes become 255."""
        for k, m in enumerate(maps):
            if k == len(self.files):
                shape = (self.count, *m.shape[2:], m.shape[1])
                file = self.folder / f"{k}.npy"
                self.files.append(np.lib.format.open_memmap(file, "w+", np.float16, shape))
            self.files[k][i] = m[0].permute(1, 2, 0).clamp(-65504, 65504).half().cpu().numpy()
        counts = np.bincount(label.ravel(), minlength=256)
        few = (counts > 0) & (counts < FEWEST)
        self.label[i] = np.where(few[label], 255, label)

    @property
    def pixels(self) -> np.ndarray:
        """Return the numbers of the pixels to learn from, over all slices."""
        return np.flatnonzero(self.label != 255)

    def gather(self, pixels: np.ndarray) -> np.ndarray:
        """Return the vectors of pixels, fp32 [P, D], between the four neighbours of each map."""
        i, row, column = np.unravel_index(pixels, self.label.shape)
        parts = []
        for file in self.files:
            ratio = np.array(file.shape[1:3]) / self.side
            y = ((row + 0.5) * ratio[0] - 0.5).clip(0, file.shape[1] - 1)
            x = ((column + 0.5) * ratio[1] - 0.5).clip(0, file.shape[2] - 1)
            y0, x0 = y.astype(int), x.astype(int)
            y1 = np.minimum(y0 + 1, file.shape[1] - 1)
            x1 = np.minimum(x0 + 1, file.shape[2] - 1)
            fy = (y - y0).astype(np.float32)[:, None]
            fx = (x - x0).astype(np.float32)[:, None]
            top = (1 - fx) * file[i, y0, x0] + fx * file[i, y0, x1]
            bottom = (1 - fx) * file[i, y1, x0] + fx * file[i, y1, x1]
            parts.append((1 - fy) * top + fy * bottom)
        return np.concatenate(parts, axis=1)


def fit_member(
    features: Features,
    classes: int,
    seed: int,
    member: int,
    epochs: int,
    device: torch.device,
    quiet: bool = True,
) -> PixelClassifier:
    """Return one classifier, trained on random pixels of all labelled slices as the public code.

    64 pixels a step. From the fifth epoch on it ends when more than 50 steps in a row did not
    beat the lowest loss. Raises InputError where the loss is not finite.
    """
    torch.manual_seed(seed_of(seed, "member", member) % 2**32)
    pixels, label = features.pixels, features.label.ravel()
    width = sum(file.shape[3] for file in features.files)
    classifier = PixelClassifier(width, classes).to(device).train()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    lowest = math.inf
    stale = 0
    bar = tqdm(desc=f"member {member}", unit="step", leave=False, disable=quiet or None)
    for epoch in range(epochs):
        rng = np.random.default_rng(seed_of(seed, "pixels", member, epoch))
        order = rng.permutation(pixels)
        for i in range(0, len(order) - AT_ONCE + 1, AT_ONCE):
            chosen = order[i : i + AT_ONCE]
            x = torch.from_numpy(features.gather(chosen)).to(device)  # [64, D]
            truth = torch.from_numpy(label[chosen].astype(np.int64)).to(device)
            loss = F.cross_entropy(classifier(x), truth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update()
            if epoch > 3:
                value = float(loss.detach())
                stale += 1
                if value < lowest:
                    lowest, stale = value, 0
                if not math.isfinite(value):
                    raise InputError(f"the loss of member {member} is {value}; use --amp off")
                if stale > 50:
                    return classifier.eval()
    return classifier.eval()


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


class Done:
    """How many members are trained, as a part of a checkpoint."""

    members = 0

    def state_dict(self) -> dict[str, int]:
        return {"members": self.members}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.members = state["members"]


def ensemble_for(config: Config, record: Mapping[str, Any]) -> PixelEnsemble:
    """Return the ensemble; record: of the data, with the flags of the pre-trained network."""
    pretrained = ddpm.Config(**record["network"])
    n = len(record["channels"])
    torch.manual_seed(seed_of(config.seed, "weights", "ddpmseg") % 2**32)
    net = ddpm.build_model(pretrained, n, n, record["slices"]["side"])
    classes = len(record["classes"]) + 1
    return PixelEnsemble(
        net, pretrained.schedule, classes, config.blocks, config.t_list, config.members
    )


def train(config: Config, data: Any, ranks: Ranks, start: Any) -> int:
    """Train the members, each process its share. Returns the exit code."""
    slices, drawn = ddpm.labelled_slices(data, config.labels, config.draw, config.labels_file)
    record = loaders.data_record(data)
    names = flags.names(ddpm.Config, "model")
    record["network"] = {name: start["config"][name] for name in names}
    record["start"] = {"step": start["step"], "date": start["made_by"]["date"]}
    record["cases"] = {"train": sorted({case for case, _ in slices})}
    record["cases"]["pretrain"] = start["data"]["cases"]["train"]
    model = ensemble_for(config, record)
    if config.init == "none":
        unet.redraw_zeros(model.net)
    else:
        model.net.load_state_dict(start["ema"])
    done = Done()
    run = runtime.Run(config, SCRIPT, record, ranks)
    run.keep(model=model, ema=model, optimizer=done)
    run.resume()
    say(
        f"DDPM-Seg (Baranchuk et al. 2022) -> {config.out}\n"
        f"  {len(slices)} of {len(drawn)} slices on which something is drawn, draw {config.draw}\n"
        f"  {model.features} features of blocks {config.blocks} at t = {config.t_list}; "
        f"{done.members} of {config.members} members are trained",
        ranks,
    )
    share = {"n": len(slices), "of": len(drawn), "percent": 100 * len(slices) / len(drawn)}
    if ranks.first:
        text = json.dumps({**share, "slices": slices}, indent=1)
        atomic_write(config.run_folder / "labels.json", text.encode())
    dtype, _ = runtime.autocast_dtype(config.amp, ranks.device)
    model.to(ranks.device).eval()
    folder = config.run_folder / f"features-{ranks.rank}"
    try:
        features = Features(folder, len(slices), data.side)
        for i, (case, k) in enumerate(slices if done.members < config.members else []):
            x = torch.from_numpy(data.slice(case, k))[None, None].to(ranks.device)
            with torch.no_grad(), torch.autocast(ranks.device.type, dtype, enabled=bool(dtype)):
                features.add(i, model.maps(x), data.slice_label(case, k))
        while done.members < config.members and not run.stopped():
            number = done.members + ranks.rank
            weights = None
            if number < config.members:
                member = fit_member(
                    features, model.classes, config.seed, number, config.epochs, ranks.device,
                    config.quiet or not ranks.first,
                )  # fmt: skip
                weights = {name: value.cpu() for name, value in member.state_dict().items()}
            for state in ranks.gather(weights):
                if state is not None:
                    model.members[done.members].load_state_dict(state)
                    done.members += 1
            run.save(done.members)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return run.finish(done.members)


def load_network(path: Path, given: Mapping[str, Any], ranks: Ranks) -> ddpm.Network:
    """Return the trained ensemble for ddpm.evaluate and ddpm.predict."""
    state = runtime.load_checkpoint(path, SCRIPT)
    config = flags.as_trained(Config, PRESETS, {"out": str(path.parent), **given}, state["config"])
    model: Any = ensemble_for(config, state["data"])
    model.load_state_dict(state["ema"])
    model = unet.fast_layout(model.to(ranks.device)).eval()
    dtype, _ = runtime.autocast_dtype(config.amp, ranks.device)
    return ddpm.Network(config, model, state["data"], ranks.device, dtype, state["step"])


def main(argv: Sequence[str]) -> int:
    """Train and score the ensemble, or predict with it. Returns the exit code."""
    verbs = {
        "": ("run", "train", "evaluate", "save"),
        "predict": ("run", "use", "predict", "save"),
    }
    about = (__doc__ or "").partition("\n\n")[0]
    verb, given = flags.parse(Config, argv, verbs, PRESETS, about)
    ranks = runtime.start(given.get("device", "auto"))
    config = flags.configure(Config, PRESETS, given)
    if verb:
        path = runtime.checkpoint_file(config.checkpoint, config.run_folder)
        return ddpm.predict(load_network(path, given, ranks), ranks)

    home = ddpm.Config(data=config.data, preset=config.preset).run_folder
    path = runtime.checkpoint_file("" if config.init == "none" else config.init, home)
    start = runtime.load_checkpoint(path, ddpm.SCRIPT)
    saved = start["config"]
    kept = {"preset": saved["preset"], "data": saved["data"], **given}
    config = flags.configure(Config, PRESETS, kept)
    kind = "-random" if config.init == "none" else ""
    name = f"ddpmseg-{config.labels.replace('%', 'pc')}{kind}-draw{config.draw}"
    config = replace(
        config,
        out=config.out or str(path.parent / name),
        variant="L" if saved["num_channels"] >= 256 else "S",
        steps=config.members,
    )
    data = loaders.open_data(config.data, "slices")
    loaders.cases_to_score(data, config.split, config.limit)  # are there any, before training
    code = train(config, data, ranks, start)
    if code or runtime.is_scored(config, given, ranks):
        return code
    use = {name: getattr(config, name) for name in asdict(config) if name in given}
    network = load_network(runtime.checkpoint_file("", config.run_folder), use, ranks)
    return ddpm.evaluate(network, data, ranks, runtime.scores_folder(config))


if __name__ == "__main__":
    sys.exit(runtime.run_main(SCRIPT, main, sys.argv[1:]))
