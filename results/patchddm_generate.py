"""PatchDDM's outlook: images out of nothing, with the coordinates as the only condition.

    python -m results.patchddm_generate --data hippocampus --ensemble 4       train, then sample
    python -m results.patchddm_generate sample --data hippocampus --ensemble 8

As in patchddm.py, training sees random patches and sampling makes the whole volume at once. But x_0
is the image in [-1, 1] instead of the mask, so cases without a label count, too. Writes one NIfTI
file a channel, with values in [0, 1], the median shape and the median voxel size of the data.
"""

import copy
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import patchddm
from common import figures, flags, loaders, runtime, unet
from common.flags import flag
from common.runtime import Ranks, noise, say, seed_of

NAME = "patchddm_generate"
VERBS = {
    "": ("run", "model", "start", "train", "speed", "use"),
    "train": ("run", "model", "start", "train", "speed"),
    "sample": ("run", "use"),
}


@dataclass(frozen=True)
class Config(patchddm.Config):
    """The flags of patchddm.py. Those of the part "unread" have no meaning here."""

    ensemble: int = flag(1, "volumes", "use", 1)
    eval_every: int = flag(50_000, "", "unread")
    save: Literal["masks", "maps", "all"] = flag("masks", "", "unread")

    script = NAME


class Images:
    """The images of a data set, each with an empty label, as patchddm.Patches wants one."""

    def __init__(self, data: loaders.Prepared):
        self.image = data.image
        self.shape = data.shape

    def label(self, case: str) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), self.shape(case))  # takes no memory


def network_for(config: Config, record: dict[str, Any]) -> patchddm.UNet:
    """Return the network. Its input: the coordinates, if it gets any, then the noisy image."""
    channels = len(record["channels"])
    return patchddm.build_model(config, 3 * config.with_coords + channels, channels)


def train(config: Config, data: loaders.Prepared, ranks: Ranks) -> int:
    """Train the network. Returns 0, or 130 or 143 after a signal, with everything saved."""
    device = ranks.device
    dtype, reason = runtime.autocast_dtype(config.amp, device)
    record = loaders.data_record(data)
    cases = data.cases("train")
    shapes = [data.shape(case) for case in cases]
    record["least"] = patchddm.least_grid(config, record, shapes)
    patches = patchddm.Patches(
        Images(data), cases, config.patch_size if config.method == "patch" else None,
        tuple(record["least"]), config.multiple, config.with_coords, config.half, config.seed,
    )  # fmt: skip
    channels = len(data.channels)

    torch.manual_seed(seed_of(config.seed, "weights") % 2**32)
    model = network_for(config, record).to(device)
    if config.init:
        runtime.load_start(config.init, NAME, model)
    share = config.batch // (ranks.world * config.accumulate)
    size = (share, model.in_channels, *patches[0][1].shape)
    remedy = "try --accumulate, --recompute, or a smaller --patch or --num-channels"
    runtime.check_memory(model, size, dtype, device, True, remedy)
    model = unet.fast_layout(model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    run = runtime.Run(config, NAME, record, ranks)
    run.keep(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    step = run.resume()
    differs = flags.departures(config, Config())
    run.print_header("Images by PatchDDM", data, model, step, reason, differs)
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
    run.stopped()  # sets run.time_up, where a run of --minutes is complete

    while step < config.steps and not run.time_up and not run.signal:
        begin = time.perf_counter()
        lr = patchddm.learning_rate(step, config.steps, config.lr, config.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(config.accumulate):
            # Patches come with their image as a condition. Here it is what is learned: x_0.
            cond, _, t, n = next(batches)  # [B, C (+ 3), *P], label, [B], [B]
            cond = cond.to(device, non_blocking=True)
            x0 = cond[:, :channels]  # [B, C, *P]
            coords = cond[:, channels:]  # [B, 3 or 0, *P]
            eps = noise(config.seed, "noise", n.tolist(), x0.shape[1:], device)
            shared = ranks.world == 1 or part == config.accumulate - 1
            with nullcontext() if shared else net.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = patchddm.diffusion_loss(net, config.target, coords, x0, t, eps)  # [B]
                scaler.scale(loss.mean() / config.accumulate).backward()
            run.collect(loss, (t / patchddm.T).to(device))

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        finite = bool(norm.isfinite())
        if finite:
            scaler.step(optimizer)
            patchddm.update_ema(ema, model, config.ema, step)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        run.seconds += time.perf_counter() - begin

        run.count_skip(step, finite)
        stopped = run.stopped()
        run.log(step, lr=lr, grad_norm=norm)
        if stopped or run.time_up or step == config.steps or step % config.save_every == 0:
            run.save(step)
    runtime.same_weights(model, ranks, "at the end")
    if ranks.first:
        figures.loss_curve(run.out / "log.csv", run.out / "loss.png", f"images of {data.name}")
    return run.finish(step)


@torch.no_grad()
def sample(given: dict[str, Any], ranks: Ranks) -> int:
    """Sample --ensemble volumes of a trained network and write them below its run folder."""
    config, state = runtime.load_trained(Config, patchddm.PRESETS, given, NAME)
    record, device = state["data"], ranks.device
    model = network_for(config, record)
    model.load_state_dict(state["ema"])
    model = unet.fast_layout(model.to(device)).eval().requires_grad_(False)
    dtype, _ = runtime.autocast_dtype(config.amp, device)

    shape = [round(n) for n in record["statistics"]["shape_median"]]
    full = patchddm.padded_shape(shape, config.multiple, record["least"])
    front = loaders.symmetric_pad(shape, full)
    inside = (slice(None), *(slice(f, f + n) for f, n in zip(front, shape)))
    # The condition of an empty volume. Without its image, the coordinates are left, if there are.
    empty = np.zeros((0, *full), np.float32)
    cond = patchddm.condition(empty, full, (0, 0, 0), full, config.with_coords)
    stride = 2 if config.half else 1
    coords = torch.from_numpy(cond[None, :, ::stride, ::stride, ::stride].copy()).to(device)
    size = coords.shape[2:]
    remedy = "try --amp bf16"
    runtime.check_memory(model, (1, model.in_channels, *size), dtype, device, False, remedy)
    affine = np.diag([*record["statistics"]["spacing_median_mm"], 1.0])  # RAS, mm

    def f(x: torch.Tensor, t: int) -> torch.Tensor:
        index = torch.tensor([t - 1], device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(torch.cat([coords, x], dim=1), index).float()

    out = config.run_folder / "samples"
    slices = {}
    for number in map(int, ranks.share([str(n) for n in range(config.ensemble)], config.quiet)):
        seed = seed_of(config.seed, "sample", "generate", number)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn((1, len(record["channels"]), *size), generator=generator).to(device)
        times = patchddm.timesteps(config.sampling_steps)
        x0 = patchddm.sample(f, start, times, config.target, config.eta, config.heun, generator)
        image = patchddm.double(x0[0]) if config.half else x0[0]  # [C, *full] in [-1, 1]
        volume = ((image[inside] + 1) / 2).cpu().numpy()  # [C, *shape] in [0, 1]
        for channel, values in enumerate(volume):
            loaders.write_on_grid(out / f"sample_{number}_{channel:04d}.nii.gz", values, affine)
        slices[number] = figures.radiological(volume[0, :, :, shape[2] // 2])
    slices = ranks.merge(slices)
    if ranks.first:
        title = f"{record['name']}, middle slices, step {state['step']}"
        pictures = [slices[n] for n in range(config.ensemble)]
        names = [f"sample {n}" for n in range(config.ensemble)]
        figures.montage({"": pictures}, names, out / "samples.png", title)
        say(f"{config.ensemble} volumes of {' x '.join(map(str, shape))} voxels are in {out}")
    return 0


def main(argv: Sequence[str]) -> int:
    about = (__doc__ or "").partition("\n\n")[0]
    verb, given = flags.parse(Config, argv, VERBS, patchddm.PRESETS, about)
    ranks = runtime.start(given.get("device", "auto"))
    if verb == "sample":
        return sample(given, ranks)
    config = flags.configure(Config, patchddm.PRESETS, given)
    config = runtime.share_batch(config, given, ranks)
    code = train(config, loaders.open_data(config.data), ranks)
    if verb or code:
        return code
    return sample({**given, "checkpoint": str(config.run_folder)}, ranks)


if __name__ == "__main__":
    sys.exit(runtime.run_main(NAME, main, sys.argv[1:]))
