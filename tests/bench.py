"""Times and memory of the parts that matter, run by hand: python tests/bench.py [--repeats 5]

One table. Variants of a row are run in turn, A B A B ..., and the median of the repeats is printed,
so that a machine whose speed drifts changes all alike. Memory is what comes on top of the weights.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import patchddm
from common import loaders, metrics, runtime, unet
from results.patchddm_profile import measure


def interleaved(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each variant after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(repeats + 1):
        for name, call in variants.items():
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Two masks of a tumour's size in 240 x 240 x 155, a little apart, with ragged edges."""
    rng = np.random.default_rng(0)
    axes = np.ix_(*(np.arange(n, dtype=np.float32) for n in (240, 240, 155)))

    def ellipsoid(centre, radii):
        return sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii)) < 1

    true, pred = ellipsoid((120, 110, 80), (28, 24, 18)), ellipsoid((122, 112, 79), (27, 25, 18))
    edge = ellipsoid((120, 110, 80), (30, 26, 20)) & (rng.random((240, 240, 155)) < 0.02)
    return pred ^ edge, true


def tiny(device: torch.device, recompute: bool = False) -> torch.nn.Module:
    config = patchddm.Config(**patchddm.PRESETS["tiny"], recompute=recompute)
    return unet.fast_layout(patchddm.build_model(config, 7, 3).to(device))


def training_step(
    model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None
) -> Callable[[], None]:
    """One step of the tiny preset, without its data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    cond, x0, eps = (torch.randn(4, k, 32, 32, 32, device=device) for k in (4, 3, 3))
    t = torch.tensor([3, 300, 600, 900])

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = patchddm.diffusion_loss(model, "x0", cond, x0, t, eps).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def whole_volume(
    device: torch.device, dtype: torch.dtype | None, side: int
) -> dict[str, Callable[[], object]]:
    """One evaluation of a cube, plain and lean."""
    model = tiny(device).requires_grad_(False)
    x, index = torch.randn(1, 7, side, side, side, device=device), torch.tensor([500])

    def call(lean: bool) -> object:
        # With gradients on no block writes into its input; no weight wants one, so none is kept.
        grad = torch.set_grad_enabled(not lean)
        with grad, torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(x, index.to(device))

    return {"plain": lambda: call(False), "lean": lambda: call(True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", type=int, default=160)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    def show(title: str, variants: dict[str, Callable[[], object]], repeats: int) -> None:
        memory = {name: measure(call, device)[1] for name, call in variants.items()}
        seconds = interleaved(variants, repeats)
        for name in variants:
            print(f"{title:<36}{name:<14}{1000 * seconds[name]:>10.2f} ms{memory[name]:>8.2f} GB")

    for amp in ("off", "bf16"):
        dtype, _ = runtime.autocast_dtype(amp, device)
        steps = {
            "kept": training_step(tiny(device), device, dtype),
            "--recompute": training_step(tiny(device, True), device, dtype),
        }
        show(f"step of tiny, --amp {amp}", steps, args.repeats)
        volume = whole_volume(device, dtype, args.side)
        show(f"one evaluation at {args.side}^3, --amp {amp}", volume, min(args.repeats, 3))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.npy")
        np.save(path, np.zeros((4, 256, 256, 256), np.float16))
        image = np.load(path, mmap_mode="r")
        corner, size = (100, 70, 90), (32, 32, 32)
        read = {"memory map": lambda: loaders.read_window(image, corner, size)}
        show("a patch of 32^3 of four 256^3", read, 20 * args.repeats)
    pred, true = blobs()
    surfaces = {"search trees": lambda: metrics.surface_scores(pred, true, (1.0, 1.0, 1.0))}
    show("surfaces, 240 x 240 x 155", surfaces, args.repeats)


if __name__ == "__main__":
    main()
