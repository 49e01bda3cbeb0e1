"""Toy data drawn on the fly: volumes, CT slices, stained tissue. Nothing is downloaded or written.

Each kind has a drawing function, a function of (seed, index) alone, and a function that gives
(meta, read): the content of a dataset.json, and read(case, name) for name in image, label,
instances. A case is drawn when it is first asked for and then kept. loaders.Prepared takes both.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.special import ndtri

# Directions of the stripes of class 1, 2, ...: the 13 lines through a voxel and its neighbours, at
# least 35 degrees apart. The first four lie in the plane and serve 2D images. Mirroring an axis
# keeps classes 1, 2 and 5 but turns diagonal classes into each other, as it does left and right.
NORMALS = np.array(
    [
        *[(1, 0, 0), (0, 1, 0), (1, 1, 0), (1, -1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)],
        *[(1, 0, -1), (0, 1, -1), (1, 1, 1), (1, 1, -1), (1, -1, 1), (-1, 1, 1)],
    ],
    dtype=float,
)
PERIOD = 4.5  # of the stripes, in voxels of the coarsest axis that they cross
TEXTURE_SD = 0.14  # of stripes and of tissue alike; the image lies in [0, 1]
CONTRAST = (0.03, 0.12)  # |mean of a blob - mean of the tissue|; the sign is drawn too


class Drawn:
    """read(case, name) over a function index -> {name: array}; a class, so that workers get it."""

    def __init__(self, draw: Callable[[int], dict[str, np.ndarray]]):
        self.draw = draw
        self.kept: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, case: str, name: str) -> np.ndarray:
        if case not in self.kept:
            self.kept[case] = self.draw(int(case.rsplit("_", 1)[1]))
        return self.kept[case][name]


Read = Callable[[str, str], np.ndarray]


def _smooth_field(rng, shape, modes):
    """Return a random sum of modes[a] cosines along each axis a: float32, mean 0, SD 1."""
    field = rng.standard_normal(modes)
    for n, m in zip(shape, modes):
        wave = np.cos(np.pi * np.outer(np.arange(m), (np.arange(n) + 0.5) / n))  # [m, n]
        field = np.tensordot(field, wave, axes=(0, 0))  # the axis just done moves to the end
    field -= field.mean()
    return (field / (field.std() + 1e-8)).astype(np.float32)


# --- volumes -----------------------------------------------------------------------------------


def _place_blobs(rng, extent, spacing, classes):
    """Return centres and half axes in mm, [N, ndim]: organs, then as many distractors, then one."""
    ndim = len(extent)
    count = 2 * classes + 1
    sphere = np.pi if ndim == 2 else 4 * np.pi / 3
    radius = (0.3 * np.prod(extent) / count / sphere) ** (1 / ndim)  # blobs fill 30 %
    radius = min(radius, 0.25 * extent.min())
    stretch = rng.uniform(-0.2, 0.2, (count, ndim))
    size = rng.uniform(0.88, 1.12, (count, 1))
    half = radius * size * np.exp(stretch - stretch.mean(1, keepdims=True))
    half[classes : 2 * classes] = half[:classes]  # each organ has a distractor of its size
    # Class k's usual place, in fractions of the box; irrational steps spread any number of them.
    k = np.arange(classes)
    along = [(k + 0.5) / classes, (0.3 + 0.4142 * k) % 1, (0.3 + 0.6180 * k) % 1]
    home = np.stack(along[:ndim], axis=1)
    centres = np.zeros((0, ndim))
    for i in range(count):
        margin = np.maximum(0.15 * extent, 0.75 * half[i])  # keeps most of the blob in the body
        if i < classes:
            tries = (0.5 + 0.6 * (home[i] - 0.5) + 0.08 * rng.standard_normal((60, ndim))) * extent
        else:
            tries = rng.random((60, ndim)) * extent
        # On a voxel's centre, where the blob's level is 0, so that even a tiny blob has one voxel.
        tries = (np.floor(np.clip(tries, margin, extent - margin) / spacing) + 0.5) * spacing
        distance = np.linalg.norm(tries[:, None] - centres[None], axis=2)  # [60, i]
        gap = distance - 1.1 * (half[i].mean() + half[:i].mean(1))
        gap = gap.min(1, initial=0)  # 0: touches no other blob
        centres = np.vstack([centres, tries[gap.argmax()]])  # free, or the least crowded
    return centres, half


def phantom(
    seed: int, index: int, shape=(48, 48, 32), spacing=(1.0, 1.0, 1.5), channels=1, classes=2
) -> tuple[np.ndarray, np.ndarray]:
    """Draw toy scan `index` -> image float32 [C, *shape] in [0, 1], label uint8 [*shape].

    Blobs of random contrast lie in noisy tissue. An organ differs from a distractor of the same
    size and contrast, and from other organs, by its stripes alone: their direction is the class.
    Stripes and tissue have the same Gaussian distribution of values, so no threshold finds them;
    each class also has a usual place. shape: 2 or 3 axes. spacing: mm; the same box at another
    spacing holds the same organs. classes: 1 to 13. Depends on the arguments only.
    """
    shape = tuple(shape)
    spacing = np.asarray(spacing, float)[: len(shape)]
    if len(shape) not in (2, 3) or len(spacing) != len(shape) or not 1 <= classes <= len(NORMALS):
        raise ValueError(
            f"phantom: shape {shape}, spacing {spacing}, {classes} classes; expected 2 or 3 axes, "
            f"a spacing for each and 1 to {len(NORMALS)} classes; change these arguments"
        )
    rng = np.random.default_rng((seed, index))
    ndim = len(shape)
    extent = np.array(shape) * spacing  # mm

    # 1. Anatomy, before any draw whose size depends on the voxels.
    centres, half = _place_blobs(rng, extent, spacing, classes)
    modes = 2 + np.ceil(extent / (1.5 * half.mean())).astype(int)
    bumps = np.clip(_smooth_field(rng, shape, modes), -2, 2)
    axes = [((np.arange(n) + 0.5) * s).astype(np.float32) for n, s in zip(shape, spacing)]  # mm
    level = np.full(shape, np.inf, np.float32)  # of the nearest blob: 0 at its centre, 1 outside
    owner = np.full(shape, -1, np.int8)  # which blob that is
    for i, (centre, h) in enumerate(zip(centres, half)):
        first = np.maximum(np.floor((centre - 2 * h) / spacing), 0).astype(int)
        last = np.ceil((centre + 2 * h) / spacing).astype(int)
        box = tuple(slice(a, b) for a, b in zip(first, last))
        offsets = np.ix_(*[(x[b] - c) / r for x, b, c, r in zip(axes, box, centre, h)])
        mine = np.sqrt(sum(o**2 for o in offsets)) * (1 + 0.15 * bumps[box])
        nearer = mine < level[box]  # blobs that meet share the border where their levels are equal
        level[box][nearer] = mine[nearer]
        owner[box][nearer] = i
    # A rounded box, cut off by the first and last slice in 3D, as a scan of a trunk is.
    across = np.ix_(*[2 * x / e - 1 for x, e in zip(axes[:2], extent)])
    body = sum(np.abs(u) ** 4 for u in across) < 0.85
    body = body.reshape(body.shape + (1,) * (ndim - 2))  # [X, Y] or [X, Y, 1]
    owner[(level > 1) | ~body] = -1
    label = np.where(owner < classes, owner + 1, 0).astype(np.uint8)
    sign = rng.choice((-1, 1), (channels, len(half)))
    contrast = sign * rng.uniform(*CONTRAST, (channels, len(half)))
    contrast[:, classes : 2 * classes] = contrast[:, :classes]  # distractors match their organ
    tissue_mean = rng.uniform(0.42, 0.52, channels)
    bias = 1 + 0.08 * np.clip(_smooth_field(rng, shape, (3,) * ndim), -2, 2)

    # 2. Texture: correlated noise, and in organ k stripes across its normal, tilted and bent.
    blur = np.minimum(0.18 * PERIOD * spacing.max() / spacing, 2.0)
    texture = rng.standard_normal(shape, dtype=np.float32)
    texture = ndimage.gaussian_filter(texture, blur, mode="wrap")
    texture /= texture.std()
    for k in range(classes):
        normal = NORMALS[k % 13, :ndim]
        widen = 1.0
        if ndim == 2:  # four directions only, then the same ones with a wider period
            normal = NORMALS[k % 4, :ndim]
            widen = 1.5 ** (k // 4)
        period = PERIOD * spacing[normal != 0].max() * widen  # mm
        normal = normal / np.linalg.norm(normal) + 0.08 * rng.standard_normal(ndim)
        inside = np.nonzero(label == k + 1)
        along = sum(n * x[at] for n, x, at in zip(normal, axes, inside)) / period
        turns = along + 0.12 * bumps[inside] + rng.random()
        # A triangle wave is uniform on [0, 1]; the normal quantile makes it Gaussian as tissue is.
        texture[inside] = ndtri(0.01 + 0.98 * np.abs(2 * (turns % 1) - 1))

    # 3. Image: the body in dark air, a thin dark capsule round each blob, bias field, noise.
    capsule = np.exp(-(((level - 1) * half.mean() / spacing.min()) ** 2))
    image = np.empty((channels, *shape), np.float32)
    for c in range(channels):
        step = np.append(contrast[c], 0.0).astype(np.float32)[owner]  # owner -1 reads the last 0
        inside = tissue_mean[c] + step + TEXTURE_SD * texture - 0.08 * capsule
        image[c] = np.where(body, inside, 0.06) * bias
        image[c] += rng.uniform(0.015, 0.03) * rng.standard_normal(shape, dtype=np.float32)
    return np.clip(image, 0, 1), label


def _volume(seed: int, index: int) -> dict[str, np.ndarray]:
    image, label = phantom(seed, index)
    return {"image": image, "label": label}


def volumes(seed: int = 0) -> tuple[dict[str, Any], Read]:
    """Return (meta, read) of 64, 4 and 10 phantoms of 48 x 48 x 32 voxels."""
    names = [f"phantom_{i:04d}" for i in range(78)]
    spacing = [1.0, 1.0, 1.5]  # mm
    facts = {"shape": [48, 48, 32], "spacing_mm": spacing, "labelled": True}
    facts["affine"] = np.diag([*spacing, 1.0]).tolist()
    meta = {
        "format": 1,
        "name": "synthetic",
        "source": f"phantoms of seed {seed}",
        "channels": ["intensity"],
        "classes": {"striped across x": 1, "striped across y": 2},
        "label_values": {"0": 0, "1": 1, "2": 2},
        "normalisation": {"kind": "none"},
        "statistics": {"shape_median": [48, 48, 32], "spacing_median_mm": spacing},
        "orientation": "RAS",
        "spacing": spacing,
        "splits": {"train": names[:64], "val": names[64:68], "test": names[68:]},
        "cases": {name: facts for name in names},
    }
    return meta, Drawn(functools.partial(_volume, seed))


# --- slices of CT ------------------------------------------------------------------------------

CT_ORGANS = ("liver", "spleen", "left kidney", "right kidney")
CT_FIELD = 320.0  # mm across a slice
CT_DEPTH = 12  # slices, 8 mm apart
# Places of the organs in units of the body's half widths (x to the patient's right, y to the
# front) and of half the scanned height (z to the head), and half axes in the same units.
CT_PLACES = ((0.42, 0.12, 0.35), (-0.58, -0.38, 0.30), (-0.36, -0.42, -0.45), (0.36, -0.42, -0.55))
CT_HALVES = ((0.40, 0.52, 0.75), (0.17, 0.26, 0.50), (0.16, 0.20, 0.50), (0.16, 0.20, 0.50))
CT_AIR = -1024  # HU


def ct_phantom(seed: int, index: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Draw toy CT `index` -> HU int16 [side, side, 12], label uint8, values of CT_ORGANS from 1.

    RAS, 320 / side mm in the plane, 8 mm slices; the same anatomy at every side. Skin, fat, muscle
    wall, spine, ribs, lungs above, and in the fat of the belly four organs among bowel loops,
    vessels and a stomach of nearly the same HU, under noise of SD 12: an organ is told by its
    place and shape.
    """
    rng = np.random.default_rng((seed, index, 4))
    # 1. Anatomy, before any draw whose size depends on the pixels. Half axes in mm.
    width = np.array([rng.uniform(125, 150), rng.uniform(90, 112), 8.0 * CT_DEPTH / 2])
    centre = rng.normal(0, (4, 4, 0)) - (0, 0, rng.uniform(-6, 6))  # mm from the scan's middle
    spots = np.array(CT_PLACES) + rng.normal(0, (0.04, 0.04, 0.12), (4, 3))
    halves = np.array(CT_HALVES) * rng.uniform(0.82, 1.18, (4, 3))
    # Stomach and bowel: anywhere in front of the spine; the organs are drawn over them.
    loops = rng.integers(9, 14)
    loop_spots = rng.uniform((-0.65, -0.35, -1.1), (0.65, 0.62, 0.9), (loops, 3))
    loop_halves = rng.uniform(0.10, 0.24, (loops, 3)) * (1, 1.2, 2.0)
    organ_hu = (58, 50, 44) + rng.normal(0, (7, 7, 5))  # liver, spleen, both kidneys
    loop_hu = rng.uniform(25, 75, loops)
    muscle = rng.uniform(48, 62)
    fat = rng.uniform(-112, -92)
    bumps = 1 + 0.10 * np.clip(_smooth_field(rng, (side, side, CT_DEPTH), (9, 9, 4)), -2, 2)
    ribs = rng.integers(7, 10)
    turn = rng.uniform(0, 2 * np.pi)

    # 2. Drawn from the back to the front; u: place in units of the body.
    extent = np.array([CT_FIELD, CT_FIELD, 8.0 * CT_DEPTH])  # mm
    at = [((np.arange(n) + 0.5) / n - 0.5) * e for n, e in zip((side, side, CT_DEPTH), extent)]
    u = np.ix_(*(((a - c) / w).astype(np.float32) for a, c, w in zip(at, centre, width)))

    def level(spot, half):
        """Return [X, Y, Z]: 0 in the middle of a bent ellipsoid, below 1 inside."""
        return np.sqrt(sum(np.square((x - s) / h) for x, s, h in zip(u, spot, half))) * bumps

    radius = np.hypot(u[0], u[1])  # [X, Y, 1]
    image = np.full((side, side, CT_DEPTH), -1000, np.float32)
    label = np.zeros(image.shape, np.uint8)
    for edge, value in ((1.0, fat), (0.88, muscle), (0.78, fat)):
        image[np.broadcast_to(radius < edge, image.shape)] = value
    between = np.cos(ribs * np.arctan2(u[1], u[0]) + turn + 2 * u[2])
    image[(np.abs(radius - 0.83) < 0.05) & (between > 0.75)] = 380
    for spot, half, value in zip(loop_spots, loop_halves, loop_hu):
        image[(level(spot, half) < 1) & (radius < 0.78)] = value
    for organ, (spot, half) in enumerate(zip(spots, halves), 1):
        inside = (level(spot, half) < 1) & (radius < 0.80)
        image[inside] = organ_hu[min(organ - 1, 2)]
        label[inside] = organ
    for way in (-1, 1):  # lungs: their bases reach into the upper slices, over liver and spleen
        lung = (level((0.42 * way, 0.0, 1.45), (0.36, 0.62, 0.85)) < 1) & (radius < 0.80)
        image[lung] = -850
        label[lung] = 0
    spine = ((0, -0.62), 0.17, 420)
    aorta = ((-0.04, -0.33), 0.08, organ_hu[0] + 8)
    for spot, half, value in (spine, aorta):
        tube = np.broadcast_to(np.hypot(u[0] - spot[0], u[1] - spot[1]) < half, image.shape)
        image[tube] = value
        label[tube] = 0

    # 3. The scanner: a slight blur in the plane, noise.
    image = ndimage.gaussian_filter(image, (0.5, 0.5, 0)) + 12 * rng.standard_normal(image.shape)
    return np.rint(np.clip(image, CT_AIR, 3071)).astype(np.int16), label


def _ct(seed: int, side: int, index: int) -> dict[str, np.ndarray]:
    image, label = ct_phantom(seed, index, side)
    # Fortran order: a slice [..., k] lies in one piece, as in a prepared folder.
    return {"image": np.asfortranarray(image[None]), "label": np.asfortranarray(label)}


def slices(seed: int = 0, side: int = 32) -> tuple[dict[str, Any], Read]:
    """Return (meta, read) of 48 unlabelled CT for pre-training, and 12, 2 and 24 labelled ones."""
    names = [f"ct_{i:03d}" for i in range(86)]
    splits = {"train": names[:12], "val": names[12:14], "test": names[14:38]}
    splits["unlabelled"] = names[38:]
    splits["pretrain"] = splits["unlabelled"] + splits["train"]
    spacing = [CT_FIELD / side, CT_FIELD / side, 8.0]  # mm
    facts = {"shape": [side, side, CT_DEPTH], "spacing_mm": spacing}
    facts["affine"] = np.diag([*spacing, 1.0]).tolist()
    window = {"low": -1000.0, "high": 400.0, "percentiles": [0.5, 99.5], "fov_pad": "raise"}
    meta = {
        "format": 1,
        "name": "synthetic",
        "source": f"phantoms of seed {seed}",
        "channels": ["CT"],
        "classes": {name: value for value, name in enumerate(CT_ORGANS, 1)},
        "label_values": {str(value): value for value in range(len(CT_ORGANS) + 1)},
        "slices": {"side": side},
        "spacing": spacing,
        "orientation": "RAS",
        "normalisation": {"kind": "hu", **window},
        "statistics": {"slices": {part: CT_DEPTH * len(ids) for part, ids in splits.items()}},
        "splits": splits,
        "cases": {name: {**facts, "labelled": name not in names[38:]} for name in names},
    }
    return meta, Drawn(functools.partial(_ct, seed, side))


# --- stained tissue ----------------------------------------------------------------------------


def tissue(
    seed: int, index: int, shape: tuple[int, int] = (112, 144)
) -> tuple[np.ndarray, np.ndarray]:
    """Draw toy section `index` -> RGB uint8 [3, Y, X], gland numbers int32 [Y, X], 0 outside.

    3 to 8 glands (bent ellipses: pale lumen, wall of the ground's own pink, a rim of dark nuclei)
    in fibrous ground with loose nuclei and pale gaps, so that no colour belongs to glands alone.
    The stain differs from image to image.
    """
    rng = np.random.default_rng((seed, index, 2))
    y, x = np.indices(shape).astype(np.float32)
    number = np.zeros(shape, np.int32)
    level = np.full(shape, np.inf, np.float32)
    bumps = np.clip(_smooth_field(rng, shape, (7, 9)), -2, 2)
    placed: list[tuple[float, float, float]] = []
    wanted = int(rng.integers(3, 9))
    for _ in range(200):
        half = rng.uniform(14, 24)
        cy = rng.uniform(0, shape[0])
        cx = rng.uniform(0, shape[1])
        crowded = any(np.hypot(cy - a, cx - b) < 1.05 * (half + r) for a, b, r in placed)
        if crowded or len(placed) == wanted:
            continue
        turn = rng.uniform(0, np.pi)
        stretch = rng.uniform(1, 1.4)
        u = (np.cos(turn) * (y - cy) + np.sin(turn) * (x - cx)) / half * stretch
        v = (np.cos(turn) * (x - cx) - np.sin(turn) * (y - cy)) / half
        mine = np.hypot(u, v) * (1 + 0.1 * bumps)
        placed.append((cy, cx, half))
        number[(mine < 1) & (mine < level)] = len(placed)
        level = np.minimum(level, mine)
    fibres = ndimage.gaussian_filter(rng.standard_normal(shape), (1, 5)) * 9 * np.sqrt(5)
    gaps = _smooth_field(rng, shape, (10, 14)) > 1.3  # pale, as lumina are
    pale = np.where(level < 1, level < 0.45, gaps & (level > 1.25))
    # Nuclei: dark discs of radius 1.8, crowded along the walls' outer half, loose outside.
    loose = np.where((level > 1.15) & ~gaps, 0.016, 0.0)
    crowd = np.where((level > 0.68) & (level < 0.98), 0.09, loose)
    nuclei = ndimage.distance_transform_edt(rng.random(shape) >= crowd) < 1.8
    ground = np.array([0.86, 0.60, 0.74])[:, None, None] + 0.02 * fibres  # [3, Y, X]
    ground = np.where(pale, np.array([0.93, 0.88, 0.92])[:, None, None], ground)
    image = np.where(nuclei & ~pale, np.array([0.42, 0.28, 0.58])[:, None, None], ground)
    stain = rng.uniform(0.75, 1.35, (3, 1, 1))
    image = ndimage.gaussian_filter(image, (0, 0.6, 0.6)) ** stain
    image = image + 0.02 * rng.standard_normal(image.shape)
    return np.clip(255 * image, 0, 255).astype(np.uint8), number


def _section(seed: int, index: int) -> dict[str, np.ndarray]:
    image, number = tissue(seed, index)
    return {"image": image, "instances": number, "label": (number > 0).astype(np.uint8)}


def images(seed: int = 0) -> tuple[dict[str, Any], Read]:
    """Return (meta, read) of 32 sections to train and 10 to test; all are there to pre-train on."""
    names = [f"tissue_{i:03d}" for i in range(42)]
    facts = {"shape": [112, 144], "labelled": True, "objects": True}
    meta = {
        "format": 1,
        "name": "synthetic",
        "source": f"tissue of seed {seed}",
        "channels": ["red", "green", "blue"],
        "classes": {"gland": 1},
        "label_values": {"0": 0, "1": 1},
        "normalisation": {"kind": "none"},
        "statistics": {},
        "orientation": "YX",
        "spacing": None,
        "splits": {"train": names[:32], "val": [], "test": names[32:], "pretrain": names},
        "cases": {name: facts for name in names},
    }
    return meta, Drawn(functools.partial(_section, seed))
