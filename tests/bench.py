"""Times and memory of the parts that matter, run by hand: python tests/bench.py [--repeats 5] [--device cpu]

One table. Variants of one row are run in turn, A B A B ..., and the median of the repeats is printed, so that a machine
whose speed drifts changes both alike. Peak memory is that of tensors saved for backward (training) or of the process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_lean

import ddpm_pretrain_finetune as ddpm
import diffseg3d_recycle as diffseg
import patchddm
from common.old import loaders, metrics, runtime, unet


def interleaved(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(repeats + 1):
        for name, call in variants.items():
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(s) for name, s in seconds.items()}


def training_step(
    config: patchddm.Config,
    shape: tuple[int, ...],
    out: int,
    device: torch.device,
    number: torch.dtype | None,
) -> dict[str, tuple[Callable[[], object], float]]:
    """One step on an input of `shape`: as here, recomputed, and as the public code: its norms keep an fp32 copy.

    Returns variant -> (step, MB kept for backward).
    """
    calls = {}
    public = "fp32 copies, contiguous"  # and an optimiser that is not fused
    for name in (
        "as the scripts do it",
        "--recompute",
        "contiguous layout",
        "norm by fp32 cast",
        public,
    ):
        net = (
            patchddm.build_model(replace(config, recompute=name == "--recompute"), shape[1], out)
            .to(device)
            .train()
        )
        if device.type == "cpu" and name not in ("contiguous layout", public):
            net = net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if name in ("norm by fp32 cast", public):
            for module in net.modules():
                if isinstance(module, unet.GroupNorm):
                    module.forward = fp32_norm.__get__(module)  # type: ignore[method-assign]
        x, t = (
            torch.randn(*shape, device=device),
            torch.randint(0, 1000, (shape[0],), device=device),
        )
        optimizer = torch.optim.AdamW(net.parameters(), fused=name != public)

        def forward(net=net, x=x, t=t) -> torch.Tensor:
            with torch.autocast(device.type, number, enabled=number is not None):
                return net(x, t).float().square().mean()

        def step(forward=forward, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

        calls[name] = (step, 1000 * runtime.kept_for_backward_gb(forward))
    return calls


def fp32_norm(self, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Two masks of tumour size in 240 x 240 x 155, a few per cent of each other apart, with ragged edges."""
    rng = np.random.default_rng(0)
    axes = np.ix_(*(np.arange(n, dtype=np.float32) for n in (240, 240, 155)))

    def ellipsoid(centre, radii):
        return sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii)) < 1

    true, pred = ellipsoid((120, 110, 80), (28, 24, 18)), ellipsoid((122, 112, 79), (27, 25, 18))
    return pred ^ (
        ellipsoid((120, 110, 80), (30, 26, 20)) & (rng.random((240, 240, 155)) < 0.02)
    ), true


def whole_volume(device: torch.device, number: torch.dtype | None, repeats: int) -> None:
    """Print memory of one evaluation: of tensors alive at 256^3, the paper's network, and measured on a smaller one."""
    forms: dict[str, int | None] = {"plain, all skips kept": None, "lean": 0, "lean --slab 16": 16}
    with torch.device("meta"):
        net, x = (
            patchddm.build_model(patchddm.Config(), 8, 1).eval(),
            torch.empty(1, 8, 256, 256, 256),
        )
        plain = test_lean.peak(net, x, None)
        for name, form in forms.items():
            alive = test_lean.peak(net, x, form)
            of_plain = f"{name}, {alive / plain:.2f}"
            print(
                f"{'tensors alive at 256^3, fp32':<34}{of_plain:<28}{'':>12}{alive / 1e6:>11.0f} MB"
            )
    net = patchddm.build_model(patchddm.Config(channel_mult=(1, 3, 4, 4)), 8, 1).to(device).eval()
    net = unet.fast_layout(net)
    x, t = torch.randn(1, 8, 64, 128, 128, device=device), torch.zeros(1, device=device)
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(1 + min(repeats, 3)):
        for dtype in (None, number):
            for name, form in forms.items():
                with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):

                    def call(form=form) -> torch.Tensor:
                        return (
                            test_lean.all_kept(net, x, t)
                            if form is None
                            else unet.lean_forward(net, [x], t, form)
                        )

                    results.setdefault(
                        f"{name}, {'fp32' if dtype is None else str(dtype)[6:]}", []
                    ).append(runtime.measure(call, device))
    title = "one evaluation of 64x128x128, C 29"
    for name, found in results.items():
        s, gb = (
            statistics.median(v for v, _ in found[1:]),
            statistics.median(v for _, v in found[1:]),
        )
        print(f"{title:<34}{name.replace('bfloat16', 'bf16'):<28}{s:>9.2f} s {1000 * gb:>11.0f} MB")


def recycled_steps(
    config: diffseg.Config, classes: int, device: torch.device, number: torch.dtype | None
) -> dict[str, Callable[[], object]]:
    """Whole optimisation steps of diffseg3d_recycle.py, augmentation included: recycled, not, and the U-net."""
    names = [str(c) for c in range(1, classes)]
    record = {"channels": ["image"], "classes": dict(zip(names, range(1, classes)))}
    b, ranks, losses = (
        config.batch,
        runtime.Ranks(0, 1, 0, device),
        runtime.LossByTime(1000, device),
    )
    affine = torch.from_numpy(
        diffseg.pull(diffseg.affine_of((0.05,) * 3, (1.1,) * 3, (1, 1, 1)), np.ones(3), config.size)
    )
    batch = diffseg.Batch(
        torch.rand(b, 1, *config.size),
        torch.randint(0, classes, (b, *config.size), dtype=torch.uint8),
        affine.expand(b, 3, 4),
        torch.randint(1, config.train_K + 1, (b,)),
        torch.zeros(b, dtype=torch.bool),
        torch.arange(b),
    )
    rows = {"recycled": {}, "not recycled": {"recycle": "none"}, "U-net": {"method": "unet"}}
    rows |= {"recycled, --recompute": {"recompute": True}} | (
        {"recycled, --compile": {"compile": True}} if device.type == "cuda" else {}
    )
    calls = {}
    for name, flags in rows.items():
        run = diffseg.Training(replace(config, **flags), record, device, number)
        net = torch.compile(run.model) if run.config.compile else run.model
        calls[name] = partial(
            diffseg.train_step, run, net.train(), net, repeat(batch), ranks, losses
        )
    return calls


class SliceFiles(loaders.CtPhantoms):
    """A prepared CT of 400 slices, memory-mapped, whatever the case is called."""

    def __init__(self, folder: Path, side: int):
        super().__init__(0, side)
        self.file = folder / f"{side}.npy"
        noise = np.random.default_rng(0).integers(-1000, 400, (1, side, side, 400), dtype=np.int16)
        np.save(self.file, np.asfortranarray(noise))
        for facts in self.meta["cases"].values():
            facts["shape"] = [side, side, 400]

    def image(self, case: str) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")


def slices(device: torch.device, number: torch.dtype | None, repeats: int, paper: bool) -> None:
    """ddpm_pretrain_finetune.py, laptop preset: steps, loading, 64 samples, distance of features, DDPM-Seg.

    paper: also steps of its networks, 256 x 256.
    """
    config = ddpm.Config(**ddpm.PRESETS["laptop"])
    data, ranks = loaders.CtPhantoms(0, side=config.size), runtime.Ranks(0, 1, 0, device)
    record, losses = loaders.data_record(data), runtime.LossByTime(1000, device)
    calls: dict[str, Callable[[], object]] = {}
    rows = {
        "pre-training, batch 16": ("pretrain", {}),
        "decoder, batch 4": ("finetune", {"batch": 4, "ema": 0.0}),
    }
    rows["scratch, batch 4"] = ("finetune", {"batch": 4, "ema": 0.0, "strategy": "scratch"})
    for name, (stage, flags) in rows.items():
        run = ddpm.Training(stage, replace(config, **flags), record, device, number)
        b, side = run.config.batch, config.size
        label = torch.randint(0, 5, (b, side, side))
        batch = (torch.rand(b, 1, side, side), label, torch.randint(0, 1000, (b,)), torch.arange(b))
        calls[name] = partial(ddpm.train_step, run, run.model.train(), repeat(batch), ranks, losses)
    for name, s in interleaved(calls, repeats).items():
        print(f"{'slices of 64^2, laptop network':<34}{name:<28}{1000 * s:>9.0f} ms")
    for c in (128, 256) if paper else ():
        b = 8 if device.type == "cuda" else 1
        run = ddpm.Training(
            "pretrain", ddpm.Config(num_channels=c, batch=b), record, device, number
        )
        batch = (
            torch.rand(b, 1, 256, 256),
            torch.zeros(b),
            torch.randint(0, 1000, (b,)),
            torch.arange(b),
        )
        step = partial(ddpm.train_step, run, run.model.train(), repeat(batch), ranks, losses)
        s, memory = (
            interleaved({"": step}, min(repeats, 3))[""],
            1000 * runtime.measure(step, device)[1],
        )
        print(
            f"{f'slices of 256^2, c = {c}':<34}{f'pre-training, batch {b}':<28}{1000 * s:>9.0f} ms{memory:>11.0f} MB"
        )
        del run, step
    with tempfile.TemporaryDirectory() as folder:
        for side, b in ((64, 16), (256, 32)):
            files = SliceFiles(Path(folder), side)
            samples, n = (
                ddpm.Samples(files, config, ddpm.pretraining_slices(files), False),
                iter(range(10**6)),
            )

            def load(samples=samples, n=n, b=b) -> None:
                default_collate([samples[next(n)] for _ in range(b)])

            for name, s in interleaved({f"batch {b}, one process": load}, max(repeats, 20)).items():
                print(f"{f'loading slices of {side}^2':<34}{name:<28}{1000 * s:>9.1f} ms")
    net = ddpm.Network(
        replace(config, sampling_steps=5), ddpm.build_model(config, 1, 1).to(device), device, number
    )
    seconds = runtime.measure(lambda: list(ddpm.generate(net, range(64))), device)[0]
    print(f"{'64 samples':<34}{'5 of 50 steps of DDIM':<28}{seconds:>9.1f} s")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2000, 768))
    for name, s in interleaved(
        {"2000 x 768": lambda: metrics.frechet_distance(a, b)}, repeats
    ).items():
        print(f"{'Fréchet distance':<34}{name:<28}{s:>9.2f} s")
    ensemble = (
        ddpm.PixelEnsemble(replace(config, epochs=1, members=1, quiet=True), 1, 5).to(device).eval()
    )
    x = torch.rand(1, 1, config.size, config.size, device=device)
    for count in (4, 40):

        def fit(count: int = count) -> None:
            with tempfile.TemporaryDirectory() as folder:
                store = ddpm.FeatureStore(
                    Path(folder) / "features.npy", count, (config.size, config.size)
                )
                for _ in range(count):
                    with torch.no_grad():
                        store.add(
                            ensemble.maps(x),
                            1.0,
                            np.random.default_rng(0).integers(0, 5, x.shape[2:]),
                        )
                store.pixels = store.pixels[::8]
                ddpm.fit_member(ensemble.config, store, 5, 0)

        memory = 1000 * runtime.measure(fit, device)[1]
        print(
            f"{'DDPM-Seg, one member':<34}{f'{count} slices, pages of file':<28}{memory:>23.0f} MB"
        )


class BratsSize(loaders.Phantoms):
    """One prepared case as large as BraTS: four channels and a label, memory-mapped, padded to 256^3 when read."""

    def __init__(self, folder: Path):
        super().__init__(0, (1, 0, 0), shape=(240, 240, 155))
        self.meta |= {"grid": [256] * 3, "channels": ["t1", "t1ce", "t2", "flair"]}
        self.folder, rng = folder, np.random.default_rng(0)
        np.save(folder / "image.npy", rng.random((4, *self.grid), np.float32).astype(np.float16))
        np.save(folder / "label.npy", (rng.random(self.grid) < 0.01).astype(np.uint8))

    def image(self, case: str) -> np.ndarray:
        return np.load(self.folder / "image.npy", mmap_mode="r")

    def label(self, case: str) -> np.ndarray:
        return np.load(self.folder / "label.npy", mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--paper",
        type=int,
        default=0,
        metavar="N",
        help="also a step of the paper's network, patch N^3",
    )
    args = parser.parse_args()
    device = runtime.start_processes(args.device).device
    number, reason = runtime.number_format("auto", device)
    print(
        f"{device}, {torch.get_num_threads()} threads, {number} ({reason}), torch {torch.__version__}\n"
    )
    print(f"{'part':<34}{'variant':<28}{'median':>12}{'memory':>14}")

    laptop = patchddm.Config(**patchddm.PRESETS["laptop"])
    steps = [("training step, 4 x 32^3, C 16", laptop, (4, 7, 32, 32, 32), 3)]
    if args.paper:
        steps += [
            (
                f"training step, paper, {args.paper}^3",
                patchddm.Config(),
                (1, 8, *(args.paper,) * 3),
                1,
            )
        ]
    for title, config, shape, out in steps:
        calls = training_step(config, shape, out, device, number)
        for name, s in interleaved({n: c for n, (c, _) in calls.items()}, args.repeats).items():
            print(f"{title:<34}{name:<28}{1000 * s:>9.0f} ms{calls[name][1]:>11.0f} MB")
        del calls

    net = patchddm.build_model(laptop, 7, 3).to(device).eval()
    net = net.to(memory_format=torch.channels_last_3d) if device.type == "cpu" else net  # type: ignore[call-overload]
    x, t = torch.randn(1, 7, 48, 64, 48, device=device), torch.zeros(1, device=device)

    def whole(dtype: torch.dtype | None) -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            net(x, t)

    for name, s in interleaved(
        {str(number): lambda: whole(number), "fp32": lambda: whole(None)}, args.repeats
    ).items():
        print(f"{'one evaluation of 48x64x48, C 16':<34}{name:<28}{1000 * s:>9.0f} ms")

    recycled = diffseg.Config(**diffseg.PRESETS["laptop"], size=(48, 64, 48))
    shapes = [("recycling paper, laptop, 2x48x64x48", recycled, 3)]
    if args.paper:
        shapes += [("recycling paper, 8x256x256x48", diffseg.Config(size=(256, 256, 48)), 9)]
        shapes += [("recycling paper, 8x192x128x128", diffseg.Config(size=(192, 128, 128)), 16)]
    for title, setting, classes in shapes:
        calls_of = recycled_steps(setting, classes, device, number)
        times = interleaved(calls_of, args.repeats)
        for name, call in calls_of.items():
            memory = 1000 * runtime.measure(call, device)[1]
            print(f"{title:<34}{name:<28}{1000 * times[name]:>9.0f} ms{memory:>11.0f} MB")
        del calls_of

    slices(device, number, args.repeats, bool(args.paper))
    whole_volume(device, number, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.npy"
        np.save(
            path, np.random.default_rng(0).random((1, 256, 256, 256), np.float32).astype(np.float16)
        )

        def window(size: int) -> None:
            start = np.random.default_rng().integers(0, 256 - size, 3)
            loaders.read_window(np.load(path, mmap_mode="r"), start, (size,) * 3)

        variants = {f"{n}^3": lambda n=n: window(n) for n in (64, 128)}
        for name, s in interleaved(variants, 20).items():
            print(f"{'patch of a prepared 256^3 case':<34}{name:<28}{1000 * s:>9.2f} ms")

        patches = patchddm.Patches(BratsSize(Path(folder)), patchddm.Config())
        numbers = iter(range(1000))
        variants = {"4 channels, coordinates, label": lambda: patches[next(numbers)]}
        for name, s in interleaved(variants, args.repeats).items():
            print(f"{'training sample 128^3 of BraTS':<34}{name:<28}{1000 * s:>9.1f} ms")

    pred, true = blobs()
    for name, s in interleaved(
        {"1 mm": lambda: metrics.surface_scores(pred, true, (1, 1, 1))}, args.repeats
    ).items():
        print(f"{'surface_scores, 240x240x155':<34}{name:<28}{1000 * s:>9.1f} ms")
    print(f"\npeak memory of the process {runtime.peak_memory_gb(device):.2f} GB")


if __name__ == "__main__":
    main()
