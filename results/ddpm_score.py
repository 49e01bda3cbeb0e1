"""Table 1 of the label-efficiency paper: how far generated slices are from real ones.

    python -m results.ddpm_score --data flare22                         after `sample`
    python -m results.ddpm_score --data flare22 --features inception:inception-2015-12-05.pt

The columns are the Frechet distance of features (fd) and of spatial features (sfd), precision,
recall and F1, with the name of the features behind them: fd_rand is of a fixed random network. Only
Inception's are called fid and sfid. The second row, the floor, is the distance between real slices
and other real slices of other scans. Only rows of one n, one side and one kind of features compare:
the distance falls with n. memorised: how near the samples are to training slices, over how near
real slices of unseen scans are; towards 0 the samples are copies.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import Tensor, nn

import ddpm_pretrain_finetune as ddpm
from common import InputError, figures, flags, loaders, runtime, tables
from common.flags import flag
from common.runtime import Ranks, say

NEAREST_AMONG = 20_000  # training slices among which the nearest to a sample is looked for
WINDOWS = {"lung": (-500, 1400), "abdomen": (40, 350)}  # level and width in HU

# --------------------------------------------------------------------------------------------------
# Distances between two sets of features, [N, D] each, one row an image
# --------------------------------------------------------------------------------------------------


def check_features(least: int, **sets: np.ndarray) -> list[np.ndarray]:
    """Return the sets as float64 [N, D]. Raise InputError unless all are finite, of one D."""
    arrays = [np.asarray(values, dtype=np.float64) for values in sets.values()]
    first = next(iter(sets))
    for name, array in zip(sets, arrays):
        if array.ndim != 2 or len(array) < least or array.shape[1:] != arrays[0].shape[1:]:
            raise InputError(
                f"{name} has shape {array.shape}, {first} has {arrays[0].shape}; expected [N, D] "
                f"with N of at least {least} and one D; make more images, or all in the same way"
            )
        bad = np.count_nonzero(~np.isfinite(array).all(axis=1))
        if bad or not array.size:
            raise InputError(
                f"{bad} of {len(array)} rows of {name} are not finite; look at the images"
            )
    return arrays


def frechet_of_factors(
    mean_a: np.ndarray, a: np.ndarray, mean_b: np.ndarray, b: np.ndarray
) -> float:
    """Return the distance of means [D] and factors [n, D], with cov_a = a' a and cov_b = b' b."""
    # tr (cov_a cov_b)^1/2 is the sum of the singular values of a b'. Nothing is squared on the way,
    # so that it holds where a covariance is singular, as with fewer images than features.
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    value = ((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
    return max(0.0, float(value))  # equal sets give 0 up to rounding, of either sign


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2), 0 or more.

    a [N1, D], b [N2, D]; covariances over N - 1. Called FID only of Inception's features. Raises
    InputError below 2 images, and as check_features. Source: Heusel 2017.
    """
    a, b = check_features(2, a=a, b=b)
    factors = []
    for x in (a, b):
        factor = (x - x.mean(axis=0)) / math.sqrt(len(x) - 1)  # [N, D]
        if len(x) > x.shape[1]:
            factor = np.asarray(np.linalg.qr(factor, "r"))  # [D, D] with the same R' R
        factors.append(factor)
    return frechet_of_factors(a.mean(axis=0), factors[0], b.mean(axis=0), factors[1])


def frechet_from_moments(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Return the Frechet distance of stored means [D] and covariances [D, D]."""
    moments = {"mean_a": mean_a[None], "cov_a": cov_a, "mean_b": mean_b[None], "cov_b": cov_b}
    (mean_a,), cov_a, (mean_b,), cov_b = check_features(1, **moments)
    if not len(cov_a) == len(cov_b) == cov_a.shape[1]:
        raise InputError(
            f"covariances have shapes {cov_a.shape} and {cov_b.shape}; expected [D, D]; "
            "store them with np.cov(x.T)"
        )
    factors = []
    for cov in (cov_a, cov_b):
        values, vectors = np.linalg.eigh(cov)
        factors.append(np.sqrt(values.clip(0))[:, None] * vectors.T)  # rounding may go below 0
    return frechet_of_factors(mean_a, factors[0], mean_b, factors[1])


def distance_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, Euclidean distances [rows, N2]) of 256 rows of a, to bound the memory."""
    for start in range(0, len(a), 256):
        rows = slice(start, start + 256)
        yield rows, cdist(a[rows], b)  # |a|^2 + |b|^2 - 2ab would part copies by rounding


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> dict[str, float]:
    """Return precision, recall and f1 of generated features [N2, D] against real ones [N1, D].

    Around each point lies a ball that reaches to its k-th neighbour in its own set. Precision: the
    share of generated points in any ball of a real one; recall: the converse; f1: 0 where both
    are 0. One outlier among the generated has a ball that can hold all real images: recall 1 means
    little by itself. zero_radii: points of both sets with k copies, of which to warn. Raises
    InputError for k below 1, for k images or fewer, and as check_features. Source: Kynkäänniemi
    2019.
    """
    if k < 1:
        raise InputError(f"k is {k}; expected 1 or more; 3 is usual")
    real, fake = check_features(k + 1, real=real, fake=fake)
    radii = []
    for x in (real, fake):  # the point itself is one of the k + 1 nearest, at distance 0
        blocks = [np.partition(d, k, axis=1)[:, k] for _, d in distance_blocks(x, x)]
        radii.append(np.concatenate(blocks))
    radius_real, radius_fake = radii
    precise = np.zeros(len(fake), bool)
    recalled = np.zeros(len(real), bool)
    for rows, distance in distance_blocks(fake, real):
        precise[rows] = (distance <= radius_real).any(axis=1)
        recalled |= (distance <= radius_fake[rows, None]).any(axis=0)
    p = float(precise.mean())
    r = float(recalled.mean())
    f1 = 2 * p * r / (p + r) if p + r else 0.0
    zero_radii = int((radius_real == 0).sum() + (radius_fake == 0).sum())
    return {"precision": p, "recall": r, "f1": f1, "zero_radii": zero_radii}


def memorisation(generated: np.ndarray, train: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Return whether generated images are nearer to the training images than new patients' are.

    Arguments: features or flattened pixels [N, D] of generated, training and held-out real images,
    the last of other patients. Returns generated and held: the median over the set of the distance
    to the nearest training image; ratio: the first over the second. Near 1: as far from the
    training set as new patients; towards 0: copies. Blurred images are nearer to all others in
    pixels, which lowers it, too. Raises InputError as check_features, and for held-out images that
    are in the training set.
    """
    generated, train, held = check_features(1, generated=generated, train=train, held=held)
    medians = []
    for x in (generated, held):
        nearest = [distance.min(axis=1) for _, distance in distance_blocks(x, train)]
        medians.append(float(np.median(np.concatenate(nearest))))
    if medians[1] == 0:
        raise InputError(
            "half of the held-out images are copies of training images; expected images of other "
            "patients; check the split"
        )
    return {"ratio": medians[0] / medians[1], "generated": medians[0], "held": medians[1]}


# --------------------------------------------------------------------------------------------------
# Features of slices
# --------------------------------------------------------------------------------------------------

Features = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # of [N, 1, Y, X], and spatial ones


class RandomFeatures(nn.Module):
    """A fixed random network: 4 convolutions of stride 2, always with the same weights.

    x [N, 1, Y, X] in [-1, 1] -> means and SDs of the last two maps [N, 768], and the first channels
    of the last map [N, at most 2048].
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = []
        for a, b in pairwise((1, 32, 64, 128, 256)):
            weight = torch.randn(b, a, 3, 3, generator=generator)
            self.weights.append(weight * math.sqrt(2 / (9 * a)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.cpu()  # GPUs round the inputs of convolutions
        maps = []
        for weight in self.weights:
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
            maps.append(x)
        parts = []
        for m in maps[-2:]:
            parts += [m.mean((2, 3)), m.flatten(2).std(2, correction=0)]
        channels = max(1, 2048 // maps[-1][0, 0].numel())
        return torch.cat(parts, dim=1), maps[-1][:, :channels].flatten(1)


def feature_network(features: str, ranks: Ranks) -> tuple[Features, str, str]:
    """Return the network of --features, the suffix of its columns, and what it is in words."""
    kind, _, name = features.partition(":")
    if features == "rand":
        return RandomFeatures(), "_rand", "rand"
    if kind not in ("encoder", "inception"):
        raise InputError(f"--features is {features}; expected rand, encoder:FILE or inception:FILE")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"--features {features}: {path} is not there; check the path")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    words = f"{path.name} SHA-256 {digest}"
    if kind == "encoder":
        network = ddpm.load_network({"checkpoint": name, "device": ranks.device.type}, ranks, False)

        def middle(x: Tensor) -> tuple[Tensor, None]:
            t = torch.zeros(len(x), device=x.device)
            return network.model.encode(x, t)[0].float().mean((2, 3)), None

        return middle, f"_enc-{digest[:8]}", words
    try:
        script = torch.jit.load(path, map_location=ranks.device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--features {path} is no TorchScript (a state dict, such as pytorch-fid's .pth, is "
            "none); save it by torch.jit.script, or use NVIDIA's inception-2015-12-05.pt"
        ) from error
    options = {}
    if "return_features" in str(script.forward.schema):  # NVIDIA's knows the word
        options["return_features"] = True

    def inception(x: Tensor) -> tuple[Tensor, Tensor | None]:
        output = script(((x + 1) * 127.5).expand(-1, 3, -1, -1), **options)
        if not isinstance(output, tuple | list):
            return output, None
        pooled, spatial = output
        return pooled, spatial[:, : 2048 // spatial[0, 0].numel()].flatten(1)  # 7 of 17 x 17

    return inception, "", words


@torch.no_grad()
def features_of(network: Features, slices: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """Return features [N, D] and, where there are some, spatial ones [N, D'] of [N, Y, X].

    The slices are rounded to 8 bits first, as images are.
    """
    parts = []
    for i in range(0, len(slices), 16):
        x = np.rint((slices[i : i + 16].clip(-1, 1) + 1) * 127.5) / 127.5 - 1
        outputs = network(torch.from_numpy(x.astype(np.float32))[:, None].to(device))
        parts.append([y.double().cpu().numpy() for y in outputs if y is not None])
    return [np.concatenate(part) for part in zip(*parts)]


# --------------------------------------------------------------------------------------------------
# Samples against real slices
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(flags.RunFlags):
    """The flags: --out is the run folder of the pre-training, --data its data."""

    samples: str = flag("", "what `sample` wrote; default OUT/samples.npy", "score")
    features: str = flag("rand", "rand, encoder:CHECKPOINT or inception:TORCHSCRIPT", "score")
    seed: int = flag(0, "of the choice of real slices", "score", 0)


def read_samples(path: Path, side: int, rule: Mapping[str, Any]) -> np.ndarray:
    """Return samples in [-1, 1], [N, Y, X]; rule: the normalisation. Raises InputError."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: no samples ({error}); write them with `sample`") from error
    if values.shape[1:] != (side, side) or len(values) < 4 or not np.isfinite(values).all():
        raise InputError(
            f"{path} holds {values.shape}, expected at least 4 slices of side {side} without NaN; "
            "sample again"
        )
    if rule["kind"] != "hu":
        return values
    return 2 * (values - rule["low"]) / (rule["high"] - rule["low"]) - 1


def trained_cases(config: Config, data: Any) -> tuple[list[str], str]:
    """Return the scans that made the samples' network, and a note where nobody says it."""
    path = runtime.checkpoint_file("", Path(config.out))
    if not path.exists():
        note = f"{path} is not there: the network is taken to have seen all scans to pre-train on"
        return ddpm.pretraining_cases(data), note
    record = runtime.load_checkpoint(path, ddpm.SCRIPT)["data"]
    return record["cases"]["train"], ""


def real_slices(
    data: Any, trained: Sequence[str], seed: int, count: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return two sets of at most `count` real slices of different scans, both of one size.

    They are of scans that the network has not seen where there are two: the third value. Raises
    InputError for one scan in all.
    """
    scans = [case for case in data.cases("all") if case not in trained]
    unseen = len(scans) >= 2
    if not unseen:
        say(f"note: {data.name} has no two scans held out; real slices are of the trained ones")
        scans = sorted(trained)
    if len(scans) < 2:
        raise InputError(f"{data.name} has {len(scans)} scan; real slices need two; prepare more")
    rng = np.random.default_rng(seed)
    scans = [scans[i] for i in rng.permutation(len(scans))]
    half = len(scans) // 2
    parts = [ddpm.slices_of(data, part) for part in (scans[:half], scans[half:])]
    n = min(count, *map(len, parts))
    if n < count:
        say(f"note: {len(scans)} scans give two sets of {n} slices: {n} samples are scored")
    chosen = [[part[i] for i in rng.permutation(len(part))[:n]] for part in parts]
    return ddpm.stack(data, chosen[0]), ddpm.stack(data, chosen[1]), unseen


def windowed(x: np.ndarray, rule: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return window -> uint8 of slices in [-1, 1]: of CT lung and abdomen, of MR its own range."""
    shares = {"mr": (x + 1) / 2}
    if rule["kind"] == "hu":
        hu = rule["low"] + (x.astype(np.float64) + 1) / 2 * (rule["high"] - rule["low"])
        shares = {name: (hu - level) / width + 0.5 for name, (level, width) in WINDOWS.items()}
    return {name: np.floor(255 * u.clip(0, 1) + 0.5).astype(np.uint8) for name, u in shares.items()}


def score(config: Config, data: Any, ranks: Ranks) -> None:
    """Print the scores of the samples and, below, the floor; write score_FEATURES.csv."""
    path = Path(config.samples or f"{config.out}/samples.npy")
    rule = data.meta["normalisation"]
    made = read_samples(path, data.side, rule)
    for name, shown in windowed(made[:64], rule).items():
        grid = {str(i): list(shown[i : i + 8]) for i in range(0, len(shown), 8)}
        figures.montage(grid, [], path.parent / f"figures/samples_{name}.png", limits=(0, 255))
    trained, note = trained_cases(config, data)
    if note:
        say(f"note: {note}")
    real, other, unseen = real_slices(data, trained, config.seed, len(made))
    n = len(real)
    network, suffix, words = feature_network(config.features, ranks)
    if suffix.startswith("_enc") and Path(config.features.partition(":")[2]).samefile(
        runtime.checkpoint_file("", Path(config.out))
    ):
        say("note: these features are of the network that is scored; use one file for all rows")
    sets = {"samples": made[:n], "real slices (floor)": other}
    outputs = {name: features_of(network, x, ranks.device) for name, x in sets.items()}
    true = features_of(network, real, ranks.device)

    rows: list[dict[str, Any]] = []
    names = ["fd", "sfd"] if suffix else ["fid", "sfid"]
    for name, output in outputs.items():
        ratios = precision_recall(true[0], output[0])
        copies = ratios.pop("zero_radii")
        if copies:
            say(f"warning: {copies} of {name} and real slices have three copies in their own set")
        values = {k: frechet_distance(a, b) for k, a, b in zip(names, true, output)}
        row = {"set": name, "n": n, "side": data.side, "features": words, "memorised": ""}
        rows.append(row | {f"{k}{suffix}": f"{v:.6g}" for k, v in (values | ratios).items()})
    if unseen:
        slices = ddpm.slices_of(data, trained)
        order = np.random.default_rng(config.seed).permutation(len(slices))[:NEAREST_AMONG]
        near = features_of(network, ddpm.stack(data, [slices[i] for i in order]), ranks.device)[0]
        held = np.concatenate([true[0], outputs["real slices (floor)"][0]])
        ratio = memorisation(outputs["samples"][0], near, held)["ratio"]
        rows[0]["memorised"] = f"{ratio:.4g}"
    file = path.parent / f"score{suffix or '_inception'}.csv"
    tables.write_metrics_csv(file, rows, list(rows[0]))
    for row in rows:
        say("  ".join(f"{key} {value}" for key, value in row.items() if value != ""))
    say(f"scores and pictures of {path} are in {path.parent}")


def main(argv: Sequence[str]) -> int:
    """Score the samples of a run. Returns the exit code."""
    presets: dict[str, dict[str, Any]] = {name: {} for name in ddpm.PRESETS}
    verbs = {"": ("run", "score")}
    _, given = flags.parse(Config, argv, verbs, presets, (__doc__ or "").partition("\n\n")[0])
    config = flags.configure(Config, presets, given)
    folder = ddpm.Config(data=config.data, preset=config.preset, out=config.out).run_folder
    ranks = runtime.start(config.device)
    if ranks.first:
        score(replace(config, out=str(folder)), loaders.open_data(config.data, "slices"), ranks)
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run_main("ddpm_score", main, sys.argv[1:]))
