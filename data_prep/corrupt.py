"""Corrupt the test images of a prepared 2D set: 15 corruptions at 5 severities, to see how robust a network is.

  python -m data_prep.corrupt --src data/glas --dst data/glas-corrupt
  python -m data_prep.corrupt --src data/glas --dst data/glas-noisy --corruptions gaussian_noise jpeg --severities 1 3
  python -m data_prep.corrupt --src data/glas --check           list what would be made, write nothing
  python -m data_prep.corrupt --make-fake /tmp/fake             a small prepared set to try it on

Which     The 19 corruptions of Hendrycks & Dietterich (ICLR 2019) without motion blur, zoom blur, snow and fog, as in
          the masked-diffusion paper; not the 15 that ImageNet-C is usually said to have.
Names     Case CASE-NAME-SEVERITY, split NAME-SEVERITY, severity 1 to 5. An image of 1000 x 1000 takes 0.6 GB in all.
Random    A generator of its own for each (seed, case, corruption, severity): a copy depends on nothing else.
Labels    elastic moves the anatomy, so label and objects move with it, by the same field to the nearest pixel;
          --warp-label off keeps them where they were, as the public evaluation did. All others leave labels alone.
Differs   Written for this project from the published parameters. Sizes follow the image where public code says 224.
          frost is procedural, a stand-in for six photographs. In spatter the edges are the border of the liquid, not
          Canny's. glass_blur draws all its moves before the first copy.
"""

import argparse
import functools
import io
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from common import InputError
from common.old.loaders import Prepared, data_record, open_prepared
from data_prep import _prepare, glas
from data_prep._prepare import Case, Flat, Report, Source

# Every corruption takes x [Y, X, 3] float64 in [0, 1], its generator and the parameters of its severity, and returns
# the same, which corrupt() clips and cuts (not rounds) to uint8.


def blur(x: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4) -> np.ndarray:
    """Gaussian over the two image axes, never over colours."""
    axes = (sigma, sigma, 0)[: x.ndim]
    return ndimage.gaussian_filter(x, axes, mode=mode, truncate=truncate)


def to_bytes(x: np.ndarray) -> np.ndarray:
    return (255 * np.clip(x, 0, 1)).astype(np.uint8)


def stored(x: np.ndarray) -> Image.Image:
    """The published 8-bit image again: x is k / 255, and 255 x may lie just below k."""
    return Image.fromarray(np.rint(255 * x).astype(np.uint8))


# --- noise and blur --------------------------------------------------------------------------------------------------


def gaussian_noise(x: np.ndarray, rng: np.random.Generator, c: float) -> np.ndarray:
    return x + rng.normal(0, c, x.shape)


def shot_noise(x: np.ndarray, rng: np.random.Generator, c: float) -> np.ndarray:
    """Photons: at c of them for white."""
    return rng.poisson(x * c) / c


def impulse_noise(x: np.ndarray, rng: np.random.Generator, c: float) -> np.ndarray:
    """Salt and pepper, each colour by itself."""
    hit, white = rng.random(x.shape) < c, rng.random(x.shape) < 0.5
    return np.where(hit, white.astype(np.float64), x)


def speckle_noise(x: np.ndarray, rng: np.random.Generator, c: float) -> np.ndarray:
    return x + x * rng.normal(0, c, x.shape)


def gaussian_blur(x: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    return blur(x, sigma)


def disk(radius: float, sigma: float) -> np.ndarray:
    """An aperture with a softened rim; of radius 10 it sums to 1.0108, the blur mirrors at the kernel's border."""
    reach, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (x**2 + y**2 <= radius**2).astype(np.float64)
    weights = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, weights / weights.sum(), axis, mode="mirror")
    return kernel / np.count_nonzero(x**2 + y**2 <= radius**2)


def defocus_blur(
    x: np.ndarray, rng: np.random.Generator, radius: float, sigma: float
) -> np.ndarray:
    return ndimage.correlate(x, disk(radius, sigma)[..., None], mode="mirror")


def glass_blur(
    x: np.ndarray, rng: np.random.Generator, sigma: float, reach: int, rounds: int
) -> np.ndarray:
    """Pixels copied from a random neighbour, from the last row and column to the first, so that copies are copied."""
    height, width = x.shape[:2]
    pixels = to_bytes(blur(x, sigma)).reshape(-1, 3)
    inner = max(height - 2 * reach, 0), max(width - 2 * reach, 0)
    moves = rng.integers(-reach, reach, (rounds, *inner, 2))  # dx, dy
    steps = (moves[..., 1] * width + moves[..., 0])[
        :, ::-1, ::-1
    ]  # [rounds, rows, columns], in the order of work
    source = list(
        range(height * width)
    )  # plain numbers: what is copied depends on what was copied before
    at = np.arange(height * width).reshape(height, width)[
        reach : height - reach, reach : width - reach
    ][::-1, ::-1]
    places = at.ravel().tolist()
    for step in steps.reshape(rounds, -1).tolist():
        for place, move in zip(places, step):
            source[place] = source[place + move]
    return blur(pixels[source].reshape(x.shape) / 255, sigma)


# --- colour ----------------------------------------------------------------------------------------------------------


def to_hsv(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue (grey: 0, red), saturation and value, [Y, X] each, in [0, 1]."""
    red, green, blue = np.moveaxis(x, 2, 0)
    value, span = x.max(axis=2), np.ptp(x, axis=2)
    unit = np.where(span > 0, span, 1)
    hue = np.where(value == green, (blue - red) / unit + 2, (red - green) / unit + 4)
    hue = np.where(value == red, (green - blue) / unit % 6, hue) / 6
    return hue, span / np.where(value > 0, value, 1), value


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[Y, X, 3]. The order of the sums is that of the specification's values: cutting to bytes shows the last bit."""
    sector = np.floor(hue * 6)
    rest = hue * 6 - sector
    low = value * (1 - saturation)
    down, up = value * (1 - rest * saturation), value * (1 - (1 - rest) * saturation)
    order = [
        (value, up, low),
        (down, value, low),
        (low, value, up),
        (low, down, value),
        (up, low, value),
    ]
    return np.choose(
        sector.astype(int)[..., None] % 6,
        [np.stack(c, axis=2) for c in [*order, (value, low, down)]],
    )


def contrast(x: np.ndarray, rng: np.random.Generator, c: float) -> np.ndarray:
    mean = x.mean(axis=(0, 1))
    return (x - mean) * c + mean


def brightness(x: np.ndarray, rng: np.random.Generator, c: float) -> np.ndarray:
    hue, saturation, value = to_hsv(x)
    return to_rgb(hue, saturation, np.clip(value + c, 0, 1))


def saturate(x: np.ndarray, rng: np.random.Generator, factor: float, shift: float) -> np.ndarray:
    hue, saturation, value = to_hsv(x)
    return to_rgb(hue, np.clip(saturation * factor + shift, 0, 1), value)


def jpeg(x: np.ndarray, rng: np.random.Generator, quality: int) -> np.ndarray:
    memory = io.BytesIO()
    stored(x).save(memory, "JPEG", quality=quality)
    return np.asarray(Image.open(memory)) / 255 + 1e-9  # so that cutting gives the same bytes again


def pixelate(x: np.ndarray, rng: np.random.Generator, c: float) -> np.ndarray:
    height, width = x.shape[:2]
    small = stored(x).resize(
        (max(int(c * width), 1), max(int(c * height), 1)), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255 + 1e-9


# --- elastic ---------------------------------------------------------------------------------------------------------


def elastic_field(
    shape: tuple[int, int], rng: np.random.Generator, strength: float, sigma: float, jitter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two fields [2, Y, X] of (row, column), to be read one after the other: an affine map's, and displacements'."""
    half, side = np.array(shape) // 2, min(shape) // 3
    points = half + side * np.array([(1, 1), (1, -1), (-1, -1)])
    moved = points + rng.uniform(-jitter, jitter, (3, 2))
    ones = np.ones((3, 1))
    back = np.linalg.lstsq(np.hstack([moved, ones]), points.astype(np.float64), rcond=None)[
        0
    ]  # [3, 2]: output -> input
    grid = np.indices(shape).astype(np.float64)  # [2, Y, X]
    affine = np.einsum("ayx,ab->byx", grid, back[:2]) + back[2][:, None, None]
    push = [
        strength * blur(rng.uniform(-1, 1, shape), sigma, "reflect", 3) for _ in range(2)
    ]  # columns first
    return affine, grid + np.stack(push[::-1])


def elastic(
    x: np.ndarray, rng: np.random.Generator, strength: float, sigma: float, jitter: float
) -> np.ndarray:
    affine, displaced = elastic_field(x.shape[:2], rng, strength, sigma, jitter)
    parts = [
        ndimage.map_coordinates(part, affine, order=1, mode="mirror")
        for part in np.moveaxis(x, 2, 0)
    ]
    return np.stack(
        [ndimage.map_coordinates(part, displaced, order=1, mode="reflect") for part in parts],
        axis=2,
    )


def elastic_label(
    label: np.ndarray, rng: np.random.Generator, strength: float, sigma: float, jitter: float
) -> np.ndarray:
    """A label [Y, X] by the field of the image, from a generator in the same state; the nearest pixel, chosen once."""
    affine, displaced = elastic_field(label.shape, rng, strength, sigma, jitter)
    # The affine field is linear, so that reading it between pixels is exact.
    total = [ndimage.map_coordinates(part, displaced, order=1, mode="reflect") for part in affine]
    return ndimage.map_coordinates(label, total, order=0, mode="mirror")


# --- frost and spatter -----------------------------------------------------------------------------------------------

FROST_COLOUR, FROST_SD = np.array([138, 153, 165]) / 255, 28 / 255
WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255


def frost_texture(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Ice for an image [Y, X] -> [Y, X, 3] in [0, 1]: four octaves of cloud, and bright needles in three directions."""
    cloud = np.zeros(shape)
    for sigma in (2, 4, 8, 16):
        octave = blur(rng.normal(size=shape), sigma)
        cloud += octave / (octave.std() + 1e-12) * (sigma / 16) ** 0.5
    needles = np.zeros(shape)
    for angle in rng.uniform(0, np.pi, 3):
        rows, columns = np.indices(shape)
        across = columns * np.sin(angle) - rows * np.cos(angle)
        along = columns * np.cos(angle) + rows * np.sin(angle)
        # Noise on a turned grid, long cells one way and narrow ones the other, read linearly.
        grid = rng.normal(size=(sum(shape) // 24 + 4, sum(shape) // 3 + 4))
        at = [(along - along.min()) / 24, (across - across.min()) / 3]
        needles = np.maximum(needles, ndimage.map_coordinates(grid, at, order=1, mode="wrap") - 1)
    ice = cloud / (cloud.std() + 1e-12) + 1.5 * needles
    ice = (ice - ice.mean()) / (ice.std() + 1e-12)
    return np.clip(FROST_COLOUR + FROST_SD * ice[..., None], 0, 1)


def frost(x: np.ndarray, rng: np.random.Generator, share: float, ice: float) -> np.ndarray:
    return share * x + ice * frost_texture(x.shape[:2], rng)


def equalise(values: np.ndarray) -> np.ndarray:
    """Histogram equalisation of bytes 0..255: the darkest becomes 0, the brightest 255."""
    counts = np.bincount(values.ravel(), minlength=256).cumsum()
    first = counts[values.min()]
    if first == values.size:
        return values
    return (
        np.rint((counts - first) * (255 / (values.size - first)))
        .clip(0, 255)
        .astype(np.uint8)[values]
    )


def spatter(
    x: np.ndarray,
    rng: np.random.Generator,
    mean: float,
    sd: float,
    sigma: float,
    level: float,
    water: float,
) -> np.ndarray:
    """Drops of water with a shaded rim (water > 0: how bright), or mud."""
    liquid = blur(rng.normal(mean, sd, x.shape[:2]), sigma)
    liquid = np.where(liquid < level, 0, liquid)
    if not water:
        mask = blur((liquid > level).astype(np.float64), 1.5)
        mask = np.where(mask < 0.8, 0, mask)[..., None]
        return x * (1 - mask) + mask * MUD
    drops = to_bytes(liquid)
    edges = (drops > 0) & ~ndimage.binary_erosion(drops > 0, border_value=1)
    distance = (
        np.minimum(ndimage.distance_transform_edt(~edges), 20)
        if edges.any()
        else np.full(drops.shape, 20.0)
    )
    shade = equalise(ndimage.uniform_filter(distance, 3, mode="mirror").astype(np.uint8)).astype(
        np.float64
    )
    shade = ndimage.correlate(
        shade, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror"
    ).clip(0, 255)
    mask = drops * np.rint(ndimage.uniform_filter(shade, 3, mode="mirror"))
    mask = water * mask / max(mask.max(), 1)
    return x + mask[..., None] * WATER


# --- all of them -----------------------------------------------------------------------------------------------------

CORRUPTIONS: dict[
    str, tuple[Callable[..., np.ndarray], list[tuple]]
] = {  # name -> function, parameters by severity
    "gaussian_noise": (gaussian_noise, [(0.08,), (0.12,), (0.18,), (0.26,), (0.38,)]),
    "shot_noise": (shot_noise, [(60,), (25,), (12,), (5,), (3,)]),
    "impulse_noise": (impulse_noise, [(0.03,), (0.06,), (0.09,), (0.17,), (0.27,)]),
    "speckle_noise": (speckle_noise, [(0.15,), (0.2,), (0.35,), (0.45,), (0.6,)]),
    "gaussian_blur": (gaussian_blur, [(1,), (2,), (3,), (4,), (6,)]),
    "defocus_blur": (defocus_blur, [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)]),
    "glass_blur": (glass_blur, [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)]),
    "contrast": (contrast, [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)]),
    "brightness": (brightness, [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)]),
    "saturate": (saturate, [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)]),
    "jpeg": (jpeg, [(25,), (18,), (15,), (10,), (7,)]),
    "pixelate": (pixelate, [(0.6,), (0.5,), (0.4,), (0.3,), (0.25,)]),
    "elastic": (
        elastic,
        [
            (488, 170.8, 24.4),
            (488, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ],
    ),
    "frost": (frost, [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)]),
    "spatter": (
        spatter,
        [
            (0.65, 0.3, 4, 0.69, 0.6),
            (0.65, 0.3, 3, 0.68, 0.6),
            (0.65, 0.3, 2, 0.68, 0.5),
            (0.65, 0.3, 1, 0.65, 0),
            (0.67, 0.4, 1, 0.65, 0),
        ],
    ),
}


def generator(seed: int, case: str, name: str, severity: int) -> np.random.Generator:
    """The generator of one copy, the same whatever else is made."""
    return np.random.default_rng(
        [seed, zlib.crc32(case.encode()), [*CORRUPTIONS].index(name), severity]
    )


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [3, Y, X] -> uint8 [3, Y, X]. severity: 1 to 5."""
    function, parameters = CORRUPTIONS[name]
    x = image.transpose(1, 2, 0) / 255.0  # [Y, X, 3]
    return np.ascontiguousarray(
        to_bytes(function(x, rng, *parameters[severity - 1])).transpose(2, 0, 1)
    )


# --- the prepared folder ---------------------------------------------------------------------------------------------


def seed(text: str) -> int:
    """A whole number of 0 or more, for --seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is {text}, expected a whole number of 0 or more")
    return int(text)


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List the copies of a split's images. Raises: InputError where src is not a prepared set of RGB images."""
    data = open_prepared(src)
    if data.axes != 2 or len(data.channels) != 3:
        what = f"{len(data.channels)} channels and {data.axes} axes"
        raise InputError(f"{src}: holds cases of {what}, expected RGB images; choose another --src")
    clean = data.cases(options.split, options.limit)
    labelled = [case for case in clean if data.has_label(case)]
    if not labelled:
        raise InputError(
            f"{src}: split {options.split} has no labelled image, expected some; choose another --split"
        )
    splits = {
        f"{name}-{severity}": [f"{case}-{name}-{severity}" for case in labelled]
        for name in options.corruptions
        for severity in options.severities
    }
    where = {f"{case}-{split}": case for split in splits for case in labelled}
    left, reduce = len(clean) - len(labelled), data_record(data).get("reduce", 1)
    return Source(
        name=f"{data.name}-corrupted",
        channels=tuple(data.channels),
        ct=(False,) * 3,
        classes=data.classes,
        label_values={int(k): int(v) for k, v in data.meta["label_values"].items()},
        label_map={int(v): int(k) for k, v in data.meta["label_values"].items()},
        cases=tuple(case_of(data, copy, case) for copy, case in where.items()),
        notes=(f"{src}: {left} images of {options.split} without label, left out",) if left else (),
        rules=tuple(data.meta["normalisation"]["channels"]),
        splits=splits,
        entries={"ignore": data.ignore} if data.ignore is not None else {},
        read=functools.partial(read_case, options.seed, options.warp_label == "on"),
        check=check_case,
        settings={"seed": options.seed, "warp_label": options.warp_label}
        | ({"reduce": reduce} if reduce > 1 else {}),
    )


def case_of(data: Prepared, copy: str, clean: str) -> Case:
    """The arrays that a copy is made of: the image, the objects where there are some, the label."""
    folder = data.root / "cases" / clean
    objects = (folder / "instances.npy",) if data.instances(clean) is not None else ()
    return Case(copy, (folder / "image.npy", *objects), folder / "label.npy")


def check_case(case: Case, report: Report) -> None:
    """What can be wrong is seen without making the copy."""
    load(case)


def load(case: Case) -> list[np.ndarray]:
    """Image, label, and objects where there are some. Raises: InputError."""
    try:
        files = [case.images[0], case.label, *case.images[1:]]
        return [np.load(file, allow_pickle=False) for file in files if file]
    except (OSError, ValueError, EOFError) as e:
        raise InputError(
            f"{case.images[0].parent}: not readable arrays ({e}); prepare this set again"
        ) from e


def read_case(seed: int, warp: bool, case: Case, report: Report) -> Flat:
    """One corrupted copy; its name tells which."""
    image, label, *objects = load(case)
    clean, name, severity = case.id.rsplit("-", 2)
    number = int(severity)
    if name == "elastic" and warp:
        parameters = CORRUPTIONS[name][1][number - 1]
        moved = [
            elastic_label(a, generator(seed, clean, name, number), *parameters)
            for a in (label, *objects)
        ]
        label, objects = moved[0], moved[1:]
    facts = {"clean": clean, "corruption": name, "severity": number}
    made = corrupt(image, name, number, generator(seed, clean, name, number))
    return Flat(made, label, objects[0] if objects else None, facts)


def make_fake(root: Path, layout: str) -> None:
    """A prepared set of 16 small images with discs for glands."""
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "glas"
        glas.make_fake(src, "few")
        if glas.main(["--src", str(src), "--dst", str(root), "--subset", "--quiet"]):
            raise InputError(f"{root}: the small set could not be prepared")


def add_flags(parser: _prepare.Parser) -> None:
    parser.add_argument(
        "--split", default="test", metavar="NAME", help="whose images (default test)"
    )
    parser.add_argument(
        "--limit", type=_prepare.positive, metavar="N", help="at most N images (default: all)"
    )
    parser.add_argument(
        "--corruptions",
        nargs="+",
        choices=[*CORRUPTIONS],
        default=[*CORRUPTIONS],
        metavar="NAME",
        help="default: all",
    )
    parser.add_argument(
        "--severities",
        nargs="+",
        type=int,
        choices=range(1, 6),
        default=[1, 2, 3, 4, 5],
        metavar="1..5",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of all that is random (default 0)")
    parser.add_argument(
        "--warp-label",
        choices=("on", "off"),
        default="on",
        help="whether elastic moves the labels too",
    )


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(
        argv, "corrupt", __doc__ or "", read_source, make_fake, (), add_flags, flat=True
    )


if __name__ == "__main__":
    sys.exit(main())
