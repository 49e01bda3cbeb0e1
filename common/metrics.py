"""Measures of segmentation masks. Needs numpy and scipy; no torch.

Masks are boolean arrays [X, Y, Z] or [Y, X]. The spacing is the voxel size in mm, one number an
axis, in the order of the axes. P is the prediction, G the reference. What empty masks give:

    status                    Dice, IoU, NSD, AJI   distances   counted as
    both hold something       value                 value       (valid)
    missed: P is empty        0                     NaN         n_missed
    spurious: G is empty      0                     NaN         n_spurious
    both are empty            NaN                   NaN         n_excluded

NaN is left out of every mean. A mean distance thus improves when a hard structure is missed
altogether, which is why no table prints a distance without the missed and spurious counts.

    python -m common.metrics table|compare|score ...        tables of runs: see common/tables.py
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

NAN = float("nan")
DISTANCES = ("hd95_mm", "hd95_pooled_mm", "assd_mm", "centroid_mm")
MEASURES = ("dice", "iou", "hd95_mm", "hd95_pooled_mm", "nsd", "assd_mm", "centroid_mm")
COLUMNS = ("case", "class", *MEASURES, "volume_true_ml", "volume_pred_ml")
# nsd_valid: NSD over the valid pairs alone, as public code averages it; no column of metrics.csv.
SCORES = ("dice", "iou", "hd95_mm", "hd95_pooled_mm", "nsd", "nsd_valid", "assd_mm", "centroid_mm")
# A distance that equals the tolerance counts as inside. Without this slack, rounding would decide:
# headers hold the spacing in float32, and 11 * 0.7 - 10 * 0.7 is above 0.7 in any precision.
ROUNDING_MM = 1e-6

# --------------------------------------------------------------------------------------------------
# Two masks: overlap and volume
# --------------------------------------------------------------------------------------------------


def as_mask(mask: np.ndarray) -> np.ndarray:
    """Return the mask as booleans. Raise ValueError for values other than 0 and 1."""
    mask = np.asarray(mask)
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise ValueError("expected a mask of 0 and 1; compare labels first, as in label == 1")
    return mask.astype(bool, copy=False)


def check_grids(pred: np.ndarray, true: np.ndarray) -> None:
    """Raise ValueError unless both arrays have the same shape."""
    if pred.shape != true.shape:
        raise ValueError(f"pred has shape {pred.shape}, true has {true.shape}")


def as_masks(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both masks as booleans. Raise ValueError unless they have the same shape."""
    pred = as_mask(pred)
    true = as_mask(true)
    check_grids(pred, true)
    return pred, true


def as_spacing(spacing: Sequence[float], axes: int) -> np.ndarray:
    """Return the spacing as float64 [axes]. Raise ValueError unless all are positive."""
    mm = np.asarray(spacing, dtype=np.float64)
    if mm.shape != (axes,) or not np.all(np.isfinite(mm) & (mm > 0)):
        raise ValueError(f"spacing is {spacing}; expected {axes} positive numbers in mm")
    return mm


def dice(pred: np.ndarray, true: np.ndarray) -> float:
    """Return 2 |P and G| / (|P| + |G|), in [0, 1]. One mask empty: 0. Both: NaN."""
    pred, true = as_masks(pred, true)
    size = np.count_nonzero(pred) + np.count_nonzero(true)
    if size == 0:
        return NAN
    return float(2 * np.count_nonzero(pred & true) / size)


def iou(pred: np.ndarray, true: np.ndarray) -> float:
    """Return |P and G| / |P or G|, in [0, 1]. One mask empty: 0. Both: NaN."""
    pred, true = as_masks(pred, true)
    union = np.count_nonzero(pred | true)
    if union == 0:
        return NAN
    return float(np.count_nonzero(pred & true) / union)


def iou_from_dice(value: float) -> float:
    """Return d / (2 - d), the IoU of one pair of masks from its Dice. NaN: NaN.

    Of a mean Dice it is less than the mean IoU, since the curve is convex. Papers print it.
    """
    return value / (2 - value)


def volume_ml(mask: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the volume in ml; a 2D mask counts as 1 mm thick. Empty: 0."""
    mask = as_mask(mask)
    return float(np.count_nonzero(mask) * as_spacing(spacing, mask.ndim).prod() / 1000)


# --------------------------------------------------------------------------------------------------
# Two masks: distances between their surfaces
# --------------------------------------------------------------------------------------------------


def joint_box(pred: np.ndarray, true: np.ndarray) -> tuple[slice, ...]:
    """Return the slices of the smallest box that holds the True voxels of both masks.

    Both empty: slices of length 0.
    """
    either = pred | true
    box = []
    for axis in range(either.ndim):
        rest = tuple(a for a in range(either.ndim) if a != axis)
        hits = np.flatnonzero(either.any(axis=rest))
        if len(hits) == 0:
            return (slice(0, 0),) * either.ndim
        box.append(slice(hits[0], hits[-1] + 1))
    return tuple(box)


def surface_points(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Return the places in mm, [N, axes], of the voxels that an erosion takes away.

    The erosion is by the cross of 6 neighbours (4 in 2D); outside of the array is background.
    """
    return np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing


def nearest(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the distance of each point, [N, axes], to the nearest of the targets, [M, axes]."""
    # Points of a grid have many equal distances, with which SciPy's default tree is slow.
    tree = cKDTree(targets, leafsize=32, compact_nodes=False, balanced_tree=False)
    return tree.query(points)[0]


def surface_scores(
    pred: np.ndarray, true: np.ndarray, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> dict[str, float]:
    """Return all measures of the distance between two surfaces.

    Surface voxels are those that an erosion takes away. The directed distances go from each surface
    voxel of P to the nearest one of G, in mm, and from G to P.

        hd95_mm          the larger of the 95th percentiles of the two directions (as MONAI)
        hd95_pooled_mm   the 95th percentile of both directions together (as medpy)
        nsd              share of surface voxels at most tolerance_mm away, in [0, 1]; each voxel
                         counts the same, whatever its area (as MONAI without subvoxels)
        assd_mm          the mean over both directions together
        centroid_mm      between the centres of mass

    One mask empty: nsd 0, distances NaN. Both: all NaN. Raises ValueError for unequal shapes,
    values other than 0 and 1, a spacing that is not positive.
    """
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm is {tolerance_mm}; expected 0 or more")
    pred, true = as_masks(pred, true)
    mm = as_spacing(spacing, pred.ndim)
    if not pred.any() or not true.any():
        share = NAN if pred.any() == true.any() else 0.0
        return {**dict.fromkeys(DISTANCES, NAN), "nsd": share}

    # A surface ends at the box's border as it does at the background beyond it.
    box = joint_box(pred, true)
    pred = pred[box]
    true = true[box]
    surface_pred = surface_points(pred, mm)  # [N, axes]
    surface_true = surface_points(true, mm)  # [M, axes]
    pred_to_true = nearest(surface_pred, surface_true)  # [N]
    true_to_pred = nearest(surface_true, surface_pred)  # [M]
    both = np.concatenate([pred_to_true, true_to_pred])
    centre_pred = np.argwhere(pred).mean(axis=0) * mm
    centre_true = np.argwhere(true).mean(axis=0) * mm
    return {
        "hd95_mm": float(max(np.percentile(pred_to_true, 95), np.percentile(true_to_pred, 95))),
        "hd95_pooled_mm": float(np.percentile(both, 95)),
        "nsd": float(np.mean(both <= tolerance_mm + ROUNDING_MM)),
        "assd_mm": float(both.mean()),
        "centroid_mm": float(np.linalg.norm(centre_pred - centre_true)),
    }


def hd95(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float], kind: str = "max") -> float:
    """Return the 95th percentile of the Hausdorff distance in mm. Any mask empty: NaN.

    kind: "max", the larger of both directions, or "pooled", both together (see surface_scores).
    """
    names = {"max": "hd95_mm", "pooled": "hd95_pooled_mm"}
    return surface_scores(pred, true, spacing)[names[kind]]


def assd(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the average symmetric surface distance in mm. Any mask empty: NaN."""
    return surface_scores(pred, true, spacing)["assd_mm"]


def nsd(
    pred: np.ndarray, true: np.ndarray, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> float:
    """Return the share of surface voxels within the tolerance. One mask empty: 0. Both: NaN."""
    return surface_scores(pred, true, spacing, tolerance_mm)["nsd"]


def centroid_distance(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the distance between the centres of mass in mm. Any mask empty: NaN."""
    return surface_scores(pred, true, spacing)["centroid_mm"]


# --------------------------------------------------------------------------------------------------
# A case with several classes
# --------------------------------------------------------------------------------------------------


def evaluate_case(
    case: str,
    pred: np.ndarray,
    true: np.ndarray,
    spacing: Sequence[float],
    classes: Mapping[str, int | Sequence[int]],
    tolerance_mm: float = 1.0,
    ignore: int | None = None,
) -> list[dict[str, Any]]:
    """Return a row of metrics.csv (COLUMNS) for each class, and its `share`, |G| / all voxels.

    pred, true: integer labels. classes: name -> label value, or several values whose union is
    scored; classes may overlap. ignore: a value of `true` whose voxels are not scored. Empty masks:
    see the top of this file. Raises ValueError for unequal shapes, labels that are not integers, a
    class without a value.
    """
    pred = np.asarray(pred)
    true = np.asarray(true)
    check_grids(pred, true)
    if pred.dtype.kind not in "uib" or true.dtype.kind not in "uib":
        raise ValueError(f"case {case}: expected integer labels, not {pred.dtype}, {true.dtype}")
    if ignore is not None:
        pred = np.where(true == ignore, 0, pred)
        true = np.where(true == ignore, 0, true)
    box = joint_box(pred != 0, true != 0)  # cut once for all classes; no measure changes
    rows = []
    for name, value in classes.items():
        values = np.atleast_1d(value).tolist()
        if not values:
            raise ValueError(f"case {case}: class {name} has no label value")
        # Background lies outside of the box, too.
        inside = () if 0 in values else box
        # One comparison a value, since np.isin takes twenty times as long.
        p = np.logical_or.reduce([pred[inside] == v for v in values])
        g = np.logical_or.reduce([true[inside] == v for v in values])
        scores = {
            "dice": dice(p, g),
            "iou": iou(p, g),
            **surface_scores(p, g, spacing, tolerance_mm),
        }
        row: dict[str, Any] = {"case": case, "class": name}
        row |= {column: scores[column] for column in MEASURES}
        row |= {"volume_true_ml": volume_ml(g, spacing), "volume_pred_ml": volume_ml(p, spacing)}
        row["share"] = float(np.count_nonzero(g) / true.size)
        rows.append(row)
    return rows


def threshold_note(data: Any, cases: Sequence[str]) -> str:
    """Return the floor of a score as a line: the best Dice of one threshold of the intensity."""
    images = [data.image(case)[0] for case in cases]
    labels = [data.label(case) for case in cases]
    best = {c: best_interval_dice(images, labels, v) for c, v in data.classes.items()}
    text = ", ".join(f"{name} {dice['threshold']:.3f}" for name, dice in best.items())
    return f"best Dice of any threshold of the intensity, chosen with the truth: {text}"


def best_interval_dice(
    images: Sequence[np.ndarray], labels: Sequence[np.ndarray], value: int, bins: int = 64
) -> dict[str, float]:
    """Return the best mean Dice that one rule on the intensity could reach, the same for all cases.

    Every interval of intensities with ends at k / bins, and its complement, is tried against the
    truth, which favours the rule: what a network adds has to lie above it. images: [X, Y, Z] or
    [Y, X] in [0, 1]. labels: integers of these shapes. Returns `threshold`, the best of intervals
    that begin at 0 and their complements, and `interval`, the best of all. No case holds the
    class: NaN. Raises ValueError for unequal shapes and for intensities outside of [0, 1].
    """
    total = np.zeros((2, bins + 1, bins + 1))  # [inside or outside, begin, end]: sum of the Dice
    count = np.zeros((2, bins + 1, bins + 1))
    begins_first = np.triu(np.ones((bins + 1, bins + 1), bool))
    for image, label in zip(images, labels, strict=True):
        image = np.asarray(image)
        check_grids(image, np.asarray(label))
        if image.size == 0 or image.min() < 0 or image.max() > 1:
            raise ValueError("expected intensities in [0, 1]; normalise the image first")
        index = np.minimum((image * bins).astype(int), bins - 1)
        hits = np.bincount(index[label == value], minlength=bins)
        sizes = np.bincount(index.ravel(), minlength=bins)
        hits_below = np.concatenate([[0], np.cumsum(hits)])  # [bins + 1]: below each end
        size_below = np.concatenate([[0], np.cumsum(sizes)])
        hit = hits_below[None, :] - hits_below[:, None]  # [begin, end]: inside the interval
        size = size_below[None, :] - size_below[:, None]
        for side in range(2):
            both = size + hits.sum()  # |P| + |G|
            valid = begins_first & (both > 0)
            total[side][valid] += 2 * hit[valid] / both[valid]
            count[side][valid] += 1
            hit = hits.sum() - hit  # and outside of it
            size = image.size - size
    if not any((np.asarray(label) == value).any() for label in labels):
        return {"threshold": NAN, "interval": NAN}
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return {"threshold": float(mean[:, 0].max()), "interval": float(mean.max())}


# --------------------------------------------------------------------------------------------------
# Two maps of instances
# --------------------------------------------------------------------------------------------------


def components(mask: np.ndarray, min_pixels: int = 1) -> np.ndarray:
    """Return the connected pieces of a mask (4 neighbours in 2D, 6 in 3D): int32, 1, 2, ...

    Pieces of fewer than min_pixels become background; the others keep their numbers.
    """
    numbers, _ = ndimage.label(as_mask(mask))
    keep = np.bincount(numbers.ravel()) >= min_pixels
    keep[0] = False
    return np.where(keep[numbers], numbers, 0).astype(np.int32)


def shared_pixels(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return how two maps of instances overlap: size_p [P], size_g [G], p, g, shared [pairs].

    The sizes are in pixels, by rising id. Objects p[i] of pred and g[i] of true share shared[i]
    pixels. Ids are integers from 0, the background, with gaps. Raises ValueError for other values
    and for unequal shapes.
    """
    pred = np.asarray(pred)
    true = np.asarray(true)
    check_grids(pred, true)
    for ids in (pred, true):
        if ids.dtype.kind not in "uib" or ids.min(initial=0) < 0 or ids.max(initial=0) >= 2**31:
            raise ValueError("expected a map of object ids, integers of 0 to 2^31 - 1")
    foreground = (pred != 0) | (true != 0)
    # One number for both ids of a pixel, so that the pixels are counted once.
    pair = true[foreground].astype(np.int64) << 31 | pred[foreground].astype(np.int64)
    # The appended pixel of background makes 0 the first id of both, whatever the maps hold.
    pair, shared = np.unique(np.append(pair, 0), return_counts=True)
    _, p = np.unique(pair & (2**31 - 1), return_inverse=True)
    _, g = np.unique(pair >> 31, return_inverse=True)
    size_p = np.bincount(p, shared)
    size_g = np.bincount(g, shared)
    objects = (g > 0) & (p > 0)
    return size_p[1:], size_g[1:], p[objects] - 1, g[objects] - 1, shared[objects]


def best_partners(source: np.ndarray, partner: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the index of the pair with the largest value of each source; ties: least partner."""
    order = np.lexsort((partner, -value, source))
    _, first = np.unique(source[order], return_index=True)
    return order[first]


def aji(pred: np.ndarray, true: np.ndarray) -> float:
    """Return the aggregated Jaccard index of two maps of instances. One empty: 0. Both: NaN.

    Each true object takes the predicted one of the largest IoU with it (ties: the smallest id),
    which may serve several. All intersections are divided by all unions, to which true objects
    without a partner and predicted ones that none took add their sizes. Source: Kumar 2017; its
    public code fails on empty maps and on ids with gaps. Raises as shared_pixels.
    """
    size_p, size_g, p, g, shared = shared_pixels(pred, true)
    if len(size_p) == 0 and len(size_g) == 0:
        return NAN
    union = size_p[p] + size_g[g] - shared
    best = best_partners(g, p, shared / union)
    missed = np.delete(size_g, g[best]).sum()
    spurious = np.delete(size_p, p[best]).sum()
    return float(shared[best].sum() / (union[best].sum() + missed + spurious))


def aji_binary(pred: np.ndarray, true: np.ndarray) -> float:
    """Return AJI with each map as one object: the IoU of the foregrounds. One empty: 0. Both: NaN.

    Papers print it as AJI. It does not see whether objects are told from each other.
    """
    return iou(np.asarray(pred) != 0, np.asarray(true) != 0)


def object_dice(pred: np.ndarray, true: np.ndarray) -> float:
    """Return the object-level Dice of two maps of instances. One empty: 0. Both: NaN.

    Each object has as partner the one of the other map that shares most pixels (ties: the smallest
    id), and 0 without one. Its Dice is weighted by its share of the pixels of its map. The result
    is the mean of both directions. Source: Sirinukunwattana 2017 (GlaS). Raises as shared_pixels.
    """
    size_p, size_g, p, g, shared = shared_pixels(pred, true)
    if len(size_p) == 0 and len(size_g) == 0:
        return NAN
    if len(shared) == 0:
        return 0.0
    score = 2 * shared / (size_p[p] + size_g[g])
    best_p = best_partners(p, g, shared)
    best_g = best_partners(g, p, shared)
    from_pred = (size_p[p[best_p]] * score[best_p]).sum() / size_p.sum()
    from_true = (size_g[g[best_g]] * score[best_g]).sum() / size_g.sum()
    return float((from_pred + from_true) / 2)


# --------------------------------------------------------------------------------------------------
# Classes over many images
# --------------------------------------------------------------------------------------------------


def class_counts(
    pred: np.ndarray, true: np.ndarray, classes: int, ignore: int | None = 255, drop: bool = True
) -> np.ndarray:
    """Return the intersection and the union of each class in one image, int64 [2, classes].

    Sum them over all images, then call miou. classes: their number, with background. ignore: a
    value of `true` that is no class. drop: leave such pixels out; else what is predicted there
    counts as false, as in public code. A class in neither adds 0. Raises ValueError for unequal
    shapes and for values that are no class.
    """
    pred = np.asarray(pred)
    true = np.asarray(true)
    check_grids(pred, true)
    scored = np.ones(true.shape, bool) if ignore is None else true != ignore
    counted = pred[scored] if drop else pred
    for values in (counted, true[scored]):
        outside = values.size and not 0 <= values.min() <= values.max() < classes
        if values.dtype.kind not in "uib" or outside:
            raise ValueError(f"expected integers of 0 to {classes - 1}")
    hit = np.bincount(true[(pred == true) & scored], minlength=classes)
    size_pred = np.bincount(counted.ravel(), minlength=classes)
    size_true = np.bincount(true[scored], minlength=classes)
    return np.stack([hit, size_pred + size_true - hit])


def miou(counts: np.ndarray, absent: float = NAN) -> float:
    """Return the mean IoU over classes, background included, from the sum of class_counts.

    absent: the IoU of a class that is in no image; NaN leaves it out, 0 is what public code does.
    No class left: NaN. Source: sums over images before dividing, as ddpm-segmentation.
    """
    hit, union = np.asarray(counts, np.float64)
    values = np.divide(hit, union, out=np.full_like(hit, absent), where=union > 0)
    if np.isnan(values).all():
        return NAN
    return float(np.nanmean(values))


if __name__ == "__main__":
    from common import tables

    sys.exit(tables.main(sys.argv[1:]))
