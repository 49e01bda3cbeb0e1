"""Times, memory and values beside public packages, on the same inputs in one run; by hand, in its own environment:

python3 -m venv .peers && .peers/bin/pip install -r requirements.txt pytest monai medpy surface-distance-based-measures
.peers/bin/python tests/bench_peers.py [--repeats 3] [--threads 1]

All surface metrics of two masks beside MONAI, MedPy and DeepMind's surface-distance; the Fréchet distance beside the
formula with a matrix square root. Variants are run in turn, A B A B ...; the median is printed, with the memory that
the process took on top of what it had, and with the values.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import surface_distance
import torch
from medpy.metric import binary
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import blobs, interleaved

from common import metrics
from results.ddpm_score import frechet_distance
from results.patchddm_profile import measure

CPU = torch.device("cpu")


def liver() -> tuple[np.ndarray, np.ndarray]:
    """Two masks of a liver's size on the grid of an abdominal CT at half its width, 256 x 256 x 100."""
    axes = np.ix_(*(np.arange(n, dtype=np.float32) for n in (256, 256, 100)))

    def ellipsoid(centre, radii):
        return sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii)) < 1

    return ellipsoid((100, 125, 52), (59, 42, 28)), ellipsoid((102, 123, 50), (60, 42, 29))


def surface_variants(
    pred: np.ndarray, true: np.ndarray, spacing: tuple[float, ...]
) -> dict[str, Callable[[], dict[str, float]]]:
    """Package -> a call that gives those of HD95 (mm), NSD at 1 mm and average distance (mm) that the package has."""
    p, g = (torch.from_numpy(mask)[None, None].float() for mask in (pred, true))  # [1, 1, X, Y, Z]

    def ours() -> dict[str, float]:
        found = metrics.surface_scores(pred, true, spacing)
        return {k: found[k] for k in ("hd95_mm", "hd95_pooled_mm", "nsd", "assd_mm")}

    def monai() -> dict[str, float]:
        shared = {"include_background": True, "spacing": spacing}
        hd95 = compute_hausdorff_distance(p, g, percentile=95, **shared)
        nsd = compute_surface_dice(p, g, class_thresholds=[1.0], **shared)
        mean = compute_average_surface_distance(p, g, symmetric=True, **shared)
        return {"hd95_mm": hd95.item(), "nsd": nsd.item(), "assd_mm": mean.item()}

    def medpy() -> dict[str, float]:
        hd95, mean = (f(pred, true, voxelspacing=spacing) for f in (binary.hd95, binary.assd))
        return {"hd95_pooled_mm": float(hd95), "assd_mm": float(mean)}

    def deepmind() -> dict[
        str, float
    ]:  # surface elements weighted by their area: other values are expected
        d = surface_distance.compute_surface_distances(true, pred, spacing)
        a, b = surface_distance.compute_average_surface_distance(d)
        hd95, nsd = (f(d, v) for f, v in ((surface_distance.compute_robust_hausdorff, 95),
                                          (surface_distance.compute_surface_dice_at_tolerance, 1.0)))  # fmt: skip
        return {
            "hd95 by area": float(hd95),
            "nsd by area": float(nsd),
            "assd by area": float((a + b) / 2),
        }

    return {"here": ours, "MONAI": monai, "MedPy": medpy, "DeepMind": deepmind}


def frechet_variants(n: int = 2000, width: int = 768) -> dict[str, Callable[[], dict[str, float]]]:
    a, b = np.random.default_rng(0).standard_normal((2, n, width))

    def with_root() -> dict[
        str, float
    ]:  # the usual way: a square root of the product of both covariances
        ca, cb = np.cov(a.T), np.cov(b.T)
        root = scipy.linalg.sqrtm(ca @ cb).real
        return {
            "distance": float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root))
        }

    return {
        "here": lambda: {"distance": float(frechet_distance(a, b))},
        "scipy.linalg.sqrtm": with_root,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = {
        "surfaces, 240x240x155, 1 mm": surface_variants(*blobs(), (1.0, 1.0, 1.0)),
        "surfaces, 256x256x100, 1.6x1.6x2.5 mm": surface_variants(*liver(), (1.6, 1.6, 2.5)),
        "Fréchet distance, 2000 x 768": frechet_variants(),
    }
    for title, calls in parts.items():
        seconds = interleaved(calls, args.repeats)
        for name, call in calls.items():
            found: dict[str, float] = {}
            memory = measure(lambda call=call, found=found: found.update(call()), CPU)[1]
            values = "  ".join(f"{k} {v:.6g}" for k, v in found.items())
            print(
                f"{title:<40}{name:<22}{1000 * seconds[name]:>9.1f} ms{1000 * memory:>8.0f} MB  {values}"
            )


if __name__ == "__main__":
    main()
