"""Segmentation metrics, their tables and their command line; metrics of generated images. For all four scripts; needs
no torch.

Masks are boolean arrays [X, Y, Z] or [Y, X]; spacing is the voxel size in mm, one number per axis, in axis order.
P is the prediction, G the reference. What empty masks give:

    status                      Dice, IoU, NSD   distances   counted as
    both non-empty              value            value       (valid)
    missed: P empty             0                NaN         n_missed
    spurious: G empty           0                NaN         n_spurious
    both empty                  NaN              NaN         n_excluded        (AJI and object Dice: as Dice)

NaN is left out of every mean. A mean distance thus improves when a hard structure is missed altogether, which is why
no table here prints a distance without the missed and spurious counts beside it.

    python -m common.metrics table runs/a runs/b               one row a run, with time and memory from its log.csv
    python -m common.metrics table --seeds --plot classes.png runs/a-0 runs/a-1 runs/b-0 runs/b-1
    python -m common.metrics compare runs/a runs/b             paired tests
    python -m common.metrics compare 'runs/a-?' 'runs/b-?'     ... of the means over seeds
    python -m common.metrics calibration runs/a 'runs/b-?'     do they know where they are wrong
    python -m common.metrics draws 'runs/ft-*' --plot d.png    what few labels suffice for, over draws of the labels
    python -m common.metrics score --pred DIR --true DIR       any two folders of NIfTI or PNG masks
    python -m common.metrics score ... --classes whole=1+2+4 core=1+4      unions of label values
    python -m common.metrics score ... --instances             values are object ids: AJI and object Dice too
"""

import argparse
import csv
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from PIL import Image
from scipy import ndimage
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from common import InputError

DISTANCES = ("hd95_mm", "hd95_pooled_mm", "assd_mm", "centroid_mm")
COLUMNS = (
    "case",
    "class",
    "dice",
    "iou",
    "hd95_mm",
    "hd95_pooled_mm",
    "nsd",
    "assd_mm",
    "centroid_mm",
    "volume_true_ml",
    "volume_pred_ml",
)
# nsd_valid: NSD over the valid pairs alone, as the public code of the recycling paper averages it; not a CSV column.
SCORES = ("dice", "iou", "hd95_mm", "hd95_pooled_mm", "nsd", "nsd_valid", "assd_mm", "centroid_mm")
TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95",
    "hd95_pooled_mm": "HD95 pooled",
    "nsd": "NSD",
    "nsd_valid": "NSD valid",
    "assd_mm": "ASSD",
    "centroid_mm": "centroid",
}
NAN = float("nan")

# --------------------------------------------------------------------------------------------------------------------
# Metrics of one pair of masks
# --------------------------------------------------------------------------------------------------------------------

# Microseconds on one core, from both algorithms' times on 25 pairs of masks (balls, shells, slabs, noise; 2D and 3D;
# 7e3 to 3e6 voxels): building a tree, per target voxel; a query whose answer is near; what distance adds to a query,
# per (voxels away)^(dimensions - 1), since the ball around a query inside a shell touches about that many voxels of it
# (the worst case: slabs cost far less); the most it can add, per target voxel; a distance transform, per voxel of the
# box. Only the choice of the algorithm depends on these numbers, never a value.
COST_BUILD, COST_NEAR, COST_FAR, COST_ALL, COST_TRANSFORM = 0.2, 0.6, 0.06, 0.04, 0.07
# A distance that equals the tolerance counts as inside. Without this slack rounding would decide: a header holds its
# spacing in float32, where 10 * 0.1 is above 1, and 11 * 0.7 - 10 * 0.7 is above 0.7 in any format.
ROUNDING_MM = 1e-6


def _as_mask(mask: np.ndarray, name: str) -> np.ndarray:
    """The mask as a boolean array; 0/1 numbers are taken, other values raise ValueError."""
    mask = np.asarray(mask)
    if mask.dtype == bool:
        return mask
    if mask.dtype.kind not in "uif" or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{name} ({mask.dtype}) has values other than 0 and 1; expected a boolean mask; "
            f"compare the labels with one class value first, as in label == 1"
        )
    return mask.astype(bool)


def _pair(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks as booleans of one shape; ValueError otherwise."""
    pred, true = _as_mask(pred, "pred"), _as_mask(true, "true")
    if pred.shape != true.shape:
        raise ValueError(
            f"pred has shape {pred.shape}, true has {true.shape}; expected the same grid; "
            f"check that both belong to one case, and resample one to the other"
        )
    return pred, true


def _spacing(spacing: Sequence[float], ndim: int) -> np.ndarray:
    """Spacing in mm as float64 [ndim]; ValueError unless it holds one positive number per axis."""
    mm = np.asarray(spacing, dtype=np.float64)
    if mm.shape != (ndim,) or not (np.isfinite(mm) & (mm > 0)).all():
        raise ValueError(
            f"spacing is {spacing}; expected {ndim} positive numbers in mm, one per axis of the mask; "
            f"take them from the image header, in the order of the axes"
        )
    return mm


def dice(pred: np.ndarray, true: np.ndarray) -> float:
    """Dice = 2 |P and G| / (|P| + |G|), in [0, 1]; one mask empty: 0; both: NaN. ValueError for unequal shapes."""
    pred, true = _pair(pred, true)
    size = np.count_nonzero(pred) + np.count_nonzero(true)
    return 2 * np.count_nonzero(pred & true) / size if size else NAN


def iou(pred: np.ndarray, true: np.ndarray) -> float:
    """IoU = |P and G| / |P or G|, in [0, 1]; one mask empty: 0; both: NaN. ValueError for unequal shapes."""
    pred, true = _pair(pred, true)
    union = np.count_nonzero(pred | true)
    return np.count_nonzero(pred & true) / union if union else NAN


def volume_ml(mask: np.ndarray, spacing: Sequence[float]) -> float:
    """Volume in ml (a 2D mask counts as 1 mm thick); empty: 0. ValueError for a wrong spacing."""
    mask = _as_mask(mask, "mask")
    return float(np.count_nonzero(mask) * _spacing(spacing, mask.ndim).prod() / 1000)


def _box(*masks: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds all True voxels of the masks (equal shapes); slices of length 0 where there are none."""
    # Reducing axis 0 first is one pass over memory, with vector instructions; all later steps see small arrays.
    plane = np.logical_or.reduce([mask.any(axis=0) for mask in masks])
    box = []
    for axis in range(plane.ndim):
        hit = np.flatnonzero(plane.any(axis=tuple(a for a in range(plane.ndim) if a != axis)))
        box.append(slice(hit[0], hit[-1] + 1) if len(hit) else slice(0, 0))
    rows = [
        mask[(slice(None),) + tuple(box)].any(axis=tuple(range(1, mask.ndim))) for mask in masks
    ]
    hit = np.flatnonzero(np.logical_or.reduce(rows))
    return (slice(hit[0], hit[-1] + 1) if len(hit) else slice(0, 0), *box)


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a neighbour (6 in 3D, 4 in 2D) outside of it; outside of the array is background."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        m, i = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        i[1:] &= m[:-1]
        i[:-1] &= m[1:]
        i[0] = i[-1] = False
    return mask & ~inside


def _distances(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each True voxel of source to the nearest True voxel of target, in no fixed order.

    A search tree over the target's voxels where its expected cost is below that of a distance transform of the box,
    else the transform: small or near surfaces take the tree, dense ones and concentric shells the transform.
    """
    query, points = np.argwhere(source & ~target), np.argwhere(target)
    shared = np.zeros(
        np.count_nonzero(source) - len(query)
    )  # voxels of both surfaces: 0 mm, nothing to search
    if not len(query):
        return shared
    transform = COST_TRANSFORM * source.size
    tree_cost = COST_BUILD * len(points) + COST_NEAR * len(query)
    if tree_cost < transform:
        tree = cKDTree(points * spacing)
        # How far apart the surfaces are decides the rest of the cost: ask about 32 of the voxels first.
        probe = tree.query(query[:: len(query) // 32 + 1] * spacing)[0]
        away = np.mean((probe / spacing.prod() ** (1 / len(spacing))) ** (len(spacing) - 1))
        tree_cost += len(query) * min(COST_FAR * away, COST_ALL * len(points))
    if tree_cost < transform:
        return np.concatenate((shared, tree.query(query * spacing)[0]))
    return distance_transform_edt(~target, sampling=spacing)[source]


def _centroid(mask: np.ndarray) -> np.ndarray:
    """Mean index of the True voxels, float64 [ndim]."""
    others = [tuple(b for b in range(mask.ndim) if b != a) for a in range(mask.ndim)]
    counts = [np.count_nonzero(mask, axis=o) for o in others]
    return np.array([np.dot(c, np.arange(len(c))) / c.sum() for c in counts])


def _prepare(
    pred: np.ndarray, true: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both masks cropped to their joint box, and the spacing; all with the axes in the order of memory.

    Outside of the crop lies background or the end of the image, and both end a surface in the same way.
    """
    pred, true = _pair(pred, true)
    mm = _spacing(spacing, pred.ndim)
    order = np.argsort(
        [-abs(s) for s in pred.strides], kind="stable"
    )  # NIfTI arrays are in Fortran order
    pred, true = pred.transpose(order), true.transpose(order)
    box = _box(pred, true)
    return pred[box], true[box], mm[order]


def surface_scores(
    pred: np.ndarray, true: np.ndarray, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> dict:
    """All surface metrics from one pair of directed distances.

    Surface voxels are the mask minus its erosion by the 6-neighbour cross (4 in 2D); a mask voxel at the border of the
    image is one. d_PG holds the Euclidean distance in mm from each surface voxel of P to the nearest one of G.

    Args: pred, true: boolean, one shape; spacing: mm per axis; tolerance_mm: of NSD, inclusive.
    Returns: hd95_mm, the larger of both directed 95th percentiles; hd95_pooled_mm, the percentile of both together;
        nsd in [0, 1], the share of surface voxels within the tolerance (voxels have equal weight, whatever their
        area); assd_mm, the mean over both sets; centroid_mm. One mask empty: nsd 0, distances NaN; both: all NaN.
    Raises: ValueError for unequal shapes, values other than 0 and 1, a wrong spacing, a negative tolerance.
    Source: HD95 as MONAI (max) and medpy (pooled), NSD as MONAI's compute_surface_dice without sub-voxels.
    """
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm is {tolerance_mm}; expected 0 or more; give it in mm")
    pred, true, mm = _prepare(pred, true, spacing)
    if not (pred.any() and true.any()):
        return {
            **dict.fromkeys(DISTANCES, NAN),
            "nsd": 0.0 if pred.size else NAN,
        }  # the joint box is empty with both
    surface_p, surface_g = _surface(pred), _surface(true)
    d_pg, d_gp = _distances(surface_p, surface_g, mm), _distances(surface_g, surface_p, mm)
    both = np.concatenate((d_pg, d_gp))
    return {
        "hd95_mm": float(max(np.percentile(d_pg, 95), np.percentile(d_gp, 95))),
        "hd95_pooled_mm": float(np.percentile(both, 95)),
        "nsd": float(np.mean(both <= tolerance_mm + ROUNDING_MM)),
        "assd_mm": float(both.mean()),
        "centroid_mm": float(np.linalg.norm((_centroid(pred) - _centroid(true)) * mm)),
    }


def hd95(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float], kind: str = "max") -> float:
    """95th percentile of the Hausdorff distance in mm; any mask empty: NaN. Errors as surface_scores.

    kind "max": the larger of the two directed percentiles; "pooled": the percentile of both sets together (medpy).
    """
    if kind not in ("max", "pooled"):
        raise ValueError(f"kind is {kind!r}; expected 'max' or 'pooled'; choose one of them")
    return surface_scores(pred, true, spacing)["hd95_mm" if kind == "max" else "hd95_pooled_mm"]


def assd(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> float:
    """Average symmetric surface distance in mm, over both sets; any mask empty: NaN. Errors as surface_scores."""
    return surface_scores(pred, true, spacing)["assd_mm"]


def nsd(
    pred: np.ndarray, true: np.ndarray, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> float:
    """Share of surface voxels within the tolerance, in [0, 1]; one mask empty: 0; both: NaN. Errors: surface_scores."""
    return surface_scores(pred, true, spacing, tolerance_mm)["nsd"]


def centroid_distance(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> float:
    """Distance between the centres of mass in mm; any mask empty: NaN. Errors as surface_scores."""
    pred, true, mm = _prepare(pred, true, spacing)
    return (
        float(np.linalg.norm((_centroid(pred) - _centroid(true)) * mm))
        if pred.any() and true.any()
        else NAN
    )


def best_interval_dice(
    images: list[np.ndarray], labels: list[np.ndarray], value: int, bins: int = 64
) -> dict:
    """The best mean Dice that one rule on the intensity alone, the same for all cases, could reach for a class.

    Every rule of the form is tried against the truth, so that the result favours the rule: what a network adds has to
    lie above it. An interval or its complement is the form of every quadratic rule on one intensity.

    Args: images: [X, Y, Z] or [Y, X] in [0, 1]; labels: the same shapes, integers; bins: cut points lie at k / bins.
    Returns: threshold, over thresholds in both directions; interval, over intervals and their complements. Both in
        [0, 1]; NaN where no case holds the class. Raises: ValueError for unequal shapes or intensities outside [0, 1].
    """
    total = np.zeros(
        (2, bins + 1, bins + 1)
    )  # [inside/outside, first bin, end bin]: sum of Dice over cases
    count = np.zeros_like(total)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        image, label = np.asarray(image), np.asarray(label)
        if image.shape != label.shape or not (image.size and image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"case {i}: image of shape {image.shape}, label of {label.shape}; expected equal shapes "
                f"and intensities in [0, 1]; normalise the image first and pass one channel"
            )
        index = np.minimum((image * bins).astype(np.int64), bins - 1)
        voxels, hits = (
            np.concatenate(([0], np.cumsum(np.bincount(part.ravel(), minlength=bins))))
            for part in (index, index[label == value])
        )  # [bins + 1] each: cumulative histograms
        size, hit = voxels[None] - voxels[:, None], hits[None] - hits[:, None]  # [first, end]
        size, hit = np.stack((size, voxels[-1] - size)), np.stack((hit, hits[-1] - hit))
        both = np.where(
            np.triu(np.ones_like(size[0]), 0) > 0, size + hits[-1], 0
        )  # an end before its start: no rule
        total += np.divide(2 * hit, both, out=np.zeros_like(total), where=both > 0)
        count += both > 0
    mean = np.divide(total, count, out=np.full_like(total, NAN), where=count > 0)
    if not any((np.asarray(label) == value).any() for label in labels):
        return {"threshold": NAN, "interval": NAN}
    # An interval from bin 0 is "below a threshold", its complement "above" it.
    return {"threshold": float(np.nanmax(mean[:, 0])), "interval": float(np.nanmax(mean))}


# --------------------------------------------------------------------------------------------------------------------
# Metrics of one pair of instance maps, and of classes over many images
# --------------------------------------------------------------------------------------------------------------------


def iou_from_dice(value: float) -> float:
    """d / (2 - d): the IoU of one pair of masks from its Dice, in [0, 1]; NaN: NaN.

    Of a mean Dice it is not the mean IoU but less, since the curve is convex; it only serves to compare with papers
    that give this number.
    """
    return value / (2 - value)


def components(mask: np.ndarray, min_pixels: int = 1) -> np.ndarray:
    """Connected components of a boolean mask (4 neighbours in 2D, 6 in 3D) -> int32, 1, 2, … in the order of memory.

    min_pixels: smaller components become background; the others keep their numbers.
    """
    numbers, n = ndimage.label(_as_mask(mask, "mask"))
    keep = np.bincount(numbers.ravel(), minlength=n + 1) >= min_pixels
    keep[0] = False
    return np.where(keep[numbers], numbers, 0).astype(np.int32)


def _overlaps(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, ...]:
    """The co-occurrence table of two instance maps, only its entries above 0, and the objects' sizes.

    Returns: size_p [P], size_g [G], pixels of each object, by rising id; p, g, n [pairs]: predicted object p (an index
    into size_p) and true object g share n pixels. Raises: ValueError.
    """
    pred, true = np.asarray(pred), np.asarray(true)
    for name, array in (("pred", pred), ("true", true)):
        if array.dtype.kind not in "uib" or (
            array.size and not 0 <= array.min() <= array.max() < 2**31
        ):
            raise ValueError(
                f"{name} is {array.dtype}, with values outside of 0 to 2^31 - 1 or not integer; expected a map of "
                f"object ids, 0 for background; number the objects first, as components(mask) does"
            )
    if pred.shape != true.shape:
        raise ValueError(
            f"pred has shape {pred.shape}, true has {true.shape}; expected the same grid; check that both belong to "
            f"one image"
        )
    inside = (pred != 0) | (true != 0)
    key = true[inside].astype(np.int64) << 31 | pred[inside].astype(np.int64)
    key, n = np.unique(key, return_counts=True)  # one sort of the foreground, whatever the ids are
    ids_g, g = np.unique(key >> 31, return_inverse=True)
    ids_p, p = np.unique(key & (2**31 - 1), return_inverse=True)
    size_g, size_p = np.bincount(g, n, len(ids_g)), np.bincount(p, n, len(ids_p))
    # Background is not an object; where it is there, its id 0 comes first.
    no_g, no_p = int(len(ids_g) > 0 and ids_g[0] == 0), int(len(ids_p) > 0 and ids_p[0] == 0)
    both = (g >= no_g) & (p >= no_p)
    return size_p[no_p:], size_g[no_g:], p[both] - no_p, g[both] - no_g, n[both]


def _best(of: np.ndarray, other: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Indices of the pairs with the largest value for each object in `of`; of equal ones the smallest `other`."""
    order = np.lexsort((other, -value, of))
    first = np.ones(len(order), bool)
    first[1:] = of[order][1:] != of[order][:-1]
    return order[first]


def aji(pred: np.ndarray, true: np.ndarray) -> float:
    """Aggregated Jaccard index of two instance maps, in [0, 1]; one map empty: 0; both: NaN.

    Each true object takes the predicted object of the largest IoU with it (ties: the smallest id), which may serve
    several; all intersections over all unions, to which true objects without a partner and predicted ones that nobody
    took add their sizes. Ids are integers >= 0 in any order, with gaps; 0 is background.
    Raises: ValueError for unequal shapes, negative or fractional ids. Source: Kumar 2017 and its public code, which
        fails on empty maps and on ids with gaps.
    """
    size_p, size_g, p, g, n = _overlaps(pred, true)
    if not len(size_p) and not len(size_g):
        return NAN
    union = size_p[p] + size_g[g] - n
    best = _best(g, p, n / union)
    alone_g, alone_p = np.delete(size_g, g[best]), np.delete(size_p, p[best])
    return float(n[best].sum() / (union[best].sum() + alone_g.sum() + alone_p.sum()))


def aji_binary(pred: np.ndarray, true: np.ndarray) -> float:
    """What aji gives where each map is one object: the IoU of the foregrounds; one map empty: 0; both: NaN.

    Papers print it as AJI; it does not see whether objects are told apart. Raises: ValueError for unequal shapes.
    """
    return iou(np.asarray(pred) != 0, np.asarray(true) != 0)


def object_dice(pred: np.ndarray, true: np.ndarray) -> float:
    """Object-level Dice of two instance maps, in [0, 1]; one map empty: 0; both: NaN.

    Each object's Dice with its partner in the other map, weighted by its share of the pixels of its own map; the mean
    of both directions. The partner shares the most pixels (ties: the smallest id); without one an object scores 0.
    Raises: ValueError as aji. Source: Sirinukunwattana 2017 (GlaS); a public version gives an empty prediction 1.
    """
    size_p, size_g, p, g, n = _overlaps(pred, true)
    if not len(size_p) and not len(size_g):
        return NAN
    score = 2 * n / (size_p[p] + size_g[g])
    total = 0.0
    for own, other, size in ((p, g, size_p), (g, p, size_g)):
        best = _best(own, other, n)
        total += float((size[own[best]] * score[best]).sum() / size.sum()) / 2 if len(best) else 0.0
    return total


def class_counts(
    pred: np.ndarray, true: np.ndarray, classes: int, ignore: int | None = 255, drop: bool = True
) -> np.ndarray:
    """Intersection and union of each class in one image -> int64 [2, classes]; sum them over images, then miou.

    classes: their number with background. ignore: a value in `true` that belongs to no class. drop: such pixels are
    left out; otherwise what is predicted there counts as false, as public code does. An empty class adds 0.
    Raises: ValueError for unequal shapes, or values that are no class.
    """
    pred, true = np.asarray(pred), np.asarray(true)
    if pred.shape != true.shape:
        raise ValueError(
            f"pred has shape {pred.shape}, true has {true.shape}; expected the same grid; check that both belong to "
            f"one image"
        )
    nothing = true == ignore if ignore is not None else np.zeros(true.shape, bool)
    for name, values in (("pred", pred[~nothing] if drop else pred), ("true", true[~nothing])):
        if values.dtype.kind not in "uib" or (
            values.size and not 0 <= values.min() <= values.max() < classes
        ):
            raise ValueError(
                f"{name} ({values.dtype}) has values that are no class; expected integers of 0 to {classes - 1}; check "
                f"the number of classes and the ignored value"
            )
    hit = np.bincount(true[(pred == true) & ~nothing], minlength=classes)
    found = np.bincount(pred[~nothing] if drop else pred.ravel(), minlength=classes)
    wanted = np.bincount(true[~nothing], minlength=classes)
    return np.stack([hit, found + wanted - hit])


def miou(counts: np.ndarray, absent: float = NAN) -> float:
    """Mean IoU over classes, background among them, in [0, 1], from the sum of class_counts over all images.

    absent: the IoU of a class with union 0. NaN leaves it out of the mean, 0 is what public code does. NaN where no
    class is left. Source: the sums over images are those of ddpm-segmentation.
    """
    hit, union = np.asarray(counts, np.float64)
    values = np.divide(hit, union, out=np.full_like(hit, absent), where=union > 0)
    return float(np.nanmean(values)) if not np.isnan(values).all() else NAN


def object_scores(pred: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """All scores of two instance maps: dice and iou of the foregrounds, aji, object_dice. Empty maps: as each says."""
    p, g = np.asarray(pred) != 0, np.asarray(true) != 0
    return {
        "dice": dice(p, g),
        "iou": iou(p, g),
        "aji": aji(pred, true),
        "object_dice": object_dice(pred, true),
    }


# --------------------------------------------------------------------------------------------------------------------
# Metrics of generated images: features [N, D], one row an image; only sets of one N and one kind of features compare
# --------------------------------------------------------------------------------------------------------------------


def _features(least: int, **sets: np.ndarray) -> list[np.ndarray]:
    """The sets as float64 [N, D]. InputError unless all are finite, of one D >= 1 and of at least `least` images."""
    arrays = [np.asarray(values, dtype=np.float64) for values in sets.values()]
    for name, array in zip(sets, arrays):
        if (
            array.ndim != 2
            or len(array) < least
            or array.shape[1:] != arrays[0].shape[1:]
            or not array.size
        ):
            raise InputError(
                f"{name} has shape {array.shape}, {next(iter(sets))} has {arrays[0].shape}; expected [N, D] with N of "
                f"at least {least} and one D for all sets; make more images, or compute all features in the same way"
            )
        if bad := np.count_nonzero(~np.isfinite(array).all(axis=1)):
            raise InputError(
                f"{bad} of {len(array)} rows of {name} are not finite; expected numbers; look at the images behind them"
            )
    return arrays


def _frechet(mean_a: np.ndarray, a: np.ndarray, mean_b: np.ndarray, b: np.ndarray) -> float:
    """The distance of means [D] and factors [n, D] with cov_a = a' a, cov_b = b' b."""
    # tr (cov_a cov_b)^1/2 is the sum of the singular values of a b'. Nothing is squared on the way, so that this holds
    # to rounding where a covariance is singular, as with fewer images than features; a root of eigenvalues would not.
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    value = ((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
    return max(0.0, float(value))  # equal sets give 0 up to rounding, of either sign


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2) of features [N1, D] and [N2, D]; 0 or more.

    Covariances over N - 1; in the squared unit of the features; called FID only of Inception's. It falls with N (two
    sets from N(0, I): about D^2 / 2N), so that its floor is the distance of two sets of N real images.
    Raises: InputError below 2 images, for features that are not finite or of different widths. Source: Heusel 2017.
    """
    a, b = _features(2, a=a, b=b)
    factors = [(x - x.mean(axis=0)) / math.sqrt(len(x) - 1) for x in (a, b)]  # [N, D]
    # R of QR has the same R' R in D rows, where there are more images than features.
    factors = [np.linalg.qr(x, "r") if len(x) > x.shape[1] else x for x in factors]
    return _frechet(a.mean(axis=0), factors[0], b.mean(axis=0), factors[1])


def frechet_from_moments(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """frechet_distance from stored moments: means [D], covariances [D, D]. InputError for other shapes or NaN."""
    mean_a, cov_a, mean_b, cov_b = _features(
        1, mean_a=mean_a[None], cov_a=cov_a, mean_b=mean_b[None], cov_b=cov_b
    )
    if not len(cov_a) == len(cov_b) == cov_a.shape[1]:
        raise InputError(
            f"covariances have shapes {cov_a.shape} and {cov_b.shape}; expected [D, D]; store them with np.cov(x.T)"
        )
    factors = []
    for values, vectors in (np.linalg.eigh(cov) for cov in (cov_a, cov_b)):
        factors.append(
            np.sqrt(values.clip(0))[:, None] * vectors.T
        )  # [D, D]; rounding gives eigenvalues below 0
    return _frechet(mean_a[0], factors[0], mean_b[0], factors[1])


def _distance_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, Euclidean distances [rows, N2]) for 256 rows of a at a time, so that memory does not grow with N^2."""
    for start in range(0, len(a), 256):
        rows = slice(start, start + 256)
        yield (
            rows,
            cdist(a[rows], b),
        )  # not by |a|^2 + |b|^2 - 2ab, which makes copies differ by rounding


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> dict[str, Any]:
    """Precision and recall of generated features [N2, D] against real ones [N1, D] by balls around each point.

    A ball reaches to its centre's k-th neighbour in its own set, itself left out. One outlier among the generated has a
    ball that can hold all real images: recall 1 means little by itself.

    Returns: precision: share of generated points inside any real ball; recall: share of real points inside any
        generated ball; f1, 0 where both are 0; zero_radii: points of both sets with k copies, of which to warn.
    Raises: InputError for k below 1, k images or fewer, what is not finite, other widths. Source: Kynkäänniemi 2019.
    """
    if k < 1:
        raise InputError(f"k is {k}; expected 1 or more; 3 is usual")
    real, fake = _features(k + 1, real=real, fake=fake)
    radius_real, radius_fake = (  # the point itself is one of the k + 1 smallest distances, 0
        np.concatenate([np.partition(d, k, axis=1)[:, k] for _, d in _distance_blocks(x, x)])
        for x in (real, fake)
    )
    inside, covered = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    for rows, distance in _distance_blocks(fake, real):
        inside[rows] = (distance <= radius_real).any(axis=1)
        covered |= (distance <= radius_fake[rows, None]).any(axis=0)
    p, r = float(inside.mean()), float(covered.mean())
    zero = int((radius_real == 0).sum() + (radius_fake == 0).sum())
    return {
        "precision": p,
        "recall": r,
        "f1": 2 * p * r / (p + r) if p + r else 0.0,
        "zero_radii": zero,
    }


def memorisation(generated: np.ndarray, train: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Are generated images nearer to the training images than images of new patients are?

    Args: features or flattened pixels [N, D] of generated, training and held-out real images (of other patients).
    Returns: generated, held: median over the set of the distance to the nearest training image; ratio: the first over
        the second. Near 1: as far from the training set as new patients; towards 0: copies. Blurred images are
        nearer to all others in pixels, which lowers it too.
    Raises: InputError for empty sets, what is not finite, different widths, or held-out images that are in train.
    """
    generated, train, held = _features(1, generated=generated, train=train, held=held)
    new, real = (
        float(np.median(np.concatenate([d.min(axis=1) for _, d in _distance_blocks(x, train)])))
        for x in (generated, held)
    )
    if real == 0:
        raise InputError(
            "half of the held-out images are copies of training images; expected images of other patients; "
            "check the split"
        )
    return {"ratio": new / real, "generated": new, "held": real}


# --------------------------------------------------------------------------------------------------------------------
# Rows, files and aggregation
# --------------------------------------------------------------------------------------------------------------------


def evaluate_case(
    case: str,
    pred: np.ndarray,
    true: np.ndarray,
    spacing: Sequence[float],
    classes: Mapping[str, int | Sequence[int]],
    tolerance_mm: float = 1.0,
) -> list[dict[str, Any]]:
    """One row of metrics.csv (keys COLUMNS, in that order) per foreground class, and `share`, |G| / voxels of the grid.

    Args: case: its id; pred, true: integer labels, one shape; spacing: mm per axis; classes: name -> label value, or
        values whose union is scored; unions may overlap.
    Raises: ValueError for unequal shapes, labels that are not integers, a wrong spacing, a union of nothing.
    """
    pred, true = np.asarray(pred), np.asarray(true)
    if pred.shape != true.shape or pred.dtype.kind not in "uib" or true.dtype.kind not in "uib":
        raise ValueError(
            f"case {case}: pred is {pred.dtype} {pred.shape}, true is {true.dtype} {true.shape}; expected "
            f"integer labels on the same grid; take the argmax, or check the pairing of the files"
        )
    box = _box(pred != 0, true != 0)  # cropping once for all classes changes no metric
    rows = []
    for name, value in classes.items():
        union = np.atleast_1d(value).tolist()
        if not union:
            raise ValueError(
                f"case {case}: class {name} has no label value; expected one or more; leave it out"
            )
        inside = () if 0 in union else box  # background also lies outside the box
        # a comparison a value: np.isin takes twenty times as long
        p, t = (
            np.logical_or.reduce([labels[inside] == v for v in union]) for labels in (pred, true)
        )
        row = {
            "case": case,
            "class": name,
            "dice": dice(p, t),
            "iou": iou(p, t),
            **surface_scores(p, t, spacing, tolerance_mm),
            "volume_true_ml": volume_ml(t, spacing),
            "volume_pred_ml": volume_ml(p, spacing),
        }
        rows.append(
            {column: row[column] for column in COLUMNS} | {"share": float(t.sum() / true.size)}
        )
    return rows


def diagonal_mm(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Diagonal of a grid in mm: what `empty_distance` gives to a missed or spurious pair."""
    return float(np.linalg.norm(np.asarray(shape) * _spacing(spacing, len(shape))))


def _write_text(path: Path | str, text: str) -> None:
    """Write by a temporary file and a rename, so that a reader meets the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_metrics_csv(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of evaluate_case; floats with all digits, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(["" if row[column] != row[column] else row[column] for column in COLUMNS])
    _write_text(path, text.getvalue())


def read_metrics_csv(path: Path | str) -> list[dict[str, Any]]:
    """Rows as evaluate_case gives them, empty cells as NaN. InputError for another header or a bad number."""
    rows: list[dict[str, Any]] = []
    again = "write the file again with evaluate"
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise InputError(
                f"{path} lacks columns of a metrics.csv ({', '.join(COLUMNS)}); write it with evaluate"
            )
        for cells in reader:
            if None in cells.values():  # the end of a file that was cut off
                raise InputError(
                    f"{path} line {reader.line_num} has too few cells, expected {len(COLUMNS)}; {again}"
                )
            try:
                rows.append(
                    {c: cells[c] if c in COLUMNS[:2] else float(cells[c] or NAN) for c in COLUMNS}
                )
            except ValueError as error:
                where = f"{path} line {reader.line_num}"
                raise InputError(
                    f"{where}: {error}; expected numbers or empty cells; {again}"
                ) from error
    if not rows:
        raise InputError(f"{path} has no rows; expected one per case and class; run evaluate again")
    return rows


def _array(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Cases, classes, values [case, class, SCORES] and status [case, class]: 0 valid, 1 missed, 2 spurious, 3 excluded.

    Raises: InputError unless each case has exactly one row per class.
    """
    cases, names = (
        list(dict.fromkeys(r["case"] for r in rows)),
        list(dict.fromkeys(r["class"] for r in rows)),
    )
    by_key = {(r["case"], r["class"]): r for r in rows}
    if not rows or len(by_key) != len(rows) or len(rows) != len(cases) * len(names):
        raise InputError(
            f"{len(rows)} rows for {len(cases)} cases and {len(names)} classes, {len(by_key)} of them "
            f"different; expected one per case and class; join no files of different class lists"
        )
    values = np.full((len(cases), len(names), len(SCORES)), NAN)
    status = np.zeros((len(cases), len(names)), dtype=int)
    for i, case in enumerate(cases):
        for j, name in enumerate(names):
            row = by_key[case, name]
            status[i, j] = (row["volume_pred_ml"] == 0) + 2 * (row["volume_true_ml"] == 0)
            values[i, j] = [
                row["nsd"] if s == "nsd_valid" and status[i, j] == 0 else row.get(s, NAN)
                for s in SCORES
            ]
    return cases, names, values, status


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is left (numpy's own warns there)."""
    valid = ~np.isnan(values)
    n = valid.sum(axis=axis)
    return np.divide(
        np.where(valid, values, 0).sum(axis=axis), n, out=np.full(n.shape, NAN), where=n > 0
    )


def _bootstrap(values: np.ndarray, samples: int = 2000) -> list[float]:
    """95 % percentile interval of the mean over cases; the same for the same values (seed 0); NaN below 2 values."""
    if len(values) < 2:
        return [NAN, NAN]
    draws = np.random.default_rng(0).integers(0, len(values), (samples, len(values)))
    return [float(x) for x in np.percentile(values[draws].mean(axis=1), (2.5, 97.5))]


def _statistics(values: np.ndarray, status: np.ndarray) -> dict[str, Any]:
    """mean, sd (ddof 1), median, ci95 and n of the values that are not NaN; pairs by status."""
    x = values[~np.isnan(values)]
    return {
        "mean": float(x.mean()) if len(x) else NAN,
        "sd": float(x.std(ddof=1)) if len(x) > 1 else NAN,
        "median": float(np.median(x)) if len(x) else NAN,
        "ci95": _bootstrap(x),
        "n": len(x),
        **{
            f"n_{word}": int((status == k + 1).sum())
            for k, word in enumerate(("missed", "spurious", "excluded"))
        },
    }


def summarise(
    rows: Sequence[Mapping[str, Any]], empty_distance: Mapping[str, float] | float | None = None
) -> dict:
    """The content of summary.json.

    A class: statistics over images. "mean": per image the mean over its classes that are not NaN, then statistics over
    images; its n counts images, its n_missed, n_spurious, n_excluded count image-class pairs. ci95 is a bootstrap
    percentile interval over images with a fixed seed. Images whose classes are all empty on both sides are dropped.

    Args: rows: of evaluate_case or read_metrics_csv; empty_distance: mm that a missed or spurious pair gets for every
        distance, one for all or by case (see diagonal_mm); None leaves such pairs out.
    Returns: {"classes": {name: {metric: statistics}}, "mean": {metric: statistics}, "images", "images_dropped",
        "n_valid", "share": {name: mean over images of |G| / voxels}, "empty_distance": "diagonal" where one is given},
        where images x classes = n_valid + n_missed + n_spurious + n_excluded. Rows that were read from a metrics.csv
        know no share: it is NaN.
    Raises: InputError unless there is one row per case and class.
    """
    cases, names, values, status = _array(rows)
    if empty_distance is not None:
        mm = [
            empty_distance[c] if isinstance(empty_distance, Mapping) else empty_distance
            for c in cases
        ]
        one_sided = (status == 1) | (status == 2)
        for k in (SCORES.index(d) for d in DISTANCES):
            values[:, :, k] = np.where(one_sided, np.array(mm)[:, None], values[:, :, k])
    per_image = _nanmean(values, axis=1)  # [case, SCORES]
    shares = {
        name: np.array([row.get("share", NAN) for row in rows if row["class"] == name])
        for name in names
    }
    how = {} if empty_distance is None else {"empty_distance": "diagonal"}
    return how | {
        "classes": {
            name: {s: _statistics(values[:, j, k], status[:, j]) for k, s in enumerate(SCORES)}
            for j, name in enumerate(names)
        },
        "mean": {s: _statistics(per_image[:, k], status) for k, s in enumerate(SCORES)},
        "images": len(cases),
        "images_dropped": int((status == 3).all(axis=1).sum()),
        "n_valid": int((status == 0).sum()),
        "share": {name: float(values.mean()) for name, values in shares.items()},
    }


def _swap(tree: Any, old: Any, new: Any) -> Any:
    """The nested dicts and lists with each old leaf (None, or NaN where old is NaN) replaced by new."""
    if isinstance(tree, dict):
        return {key: _swap(value, old, new) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_swap(value, old, new) for value in tree]
    return new if tree is old or (tree != tree and old != old) else tree


def write_summary(path: Path | str, summary: dict) -> None:
    """Write summary.json; NaN becomes null, since JSON has no NaN."""
    _write_text(path, json.dumps(_swap(summary, NAN, None), indent=1, allow_nan=False) + "\n")


def read_summary(path: Path | str) -> dict:
    """What write_summary wrote, null as NaN. InputError where it is no summary."""
    try:
        summary = _swap(json.loads(Path(path).read_text(encoding="utf-8")), None, NAN)
        for entry in (summary["mean"], *summary["classes"].values()):
            _ = [
                entry[metric][key]
                for metric in SCORES
                for key in ("mean", "sd", "n", "n_missed", "n_spurious")
            ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no summary.json; expected classes and mean, each with {', '.join(SCORES)}; run evaluate again"
        ) from error
    return summary


def scores_folder(out: Path, split: str, limit: int = 0) -> Path:
    """Where a run in `out` writes its scores, all or `limit` cases of them.

    Scores of another split than test, or of fewer cases than are scored there, stand in a folder of their own.
    """
    there = out / ("" if split == "test" else split)
    more = (there / "summary.json").exists() and read_summary(there / "summary.json")[
        "images"
    ] > limit
    return out / f"{split}-{limit}" if limit and more else there


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def _layout(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of cells, header first, as aligned text or as Markdown; the first column is left-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * max(w, 3) if i == 0 else "-" * max(w - 1, 2) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _number(value: float, metric: str) -> str:
    """Three digits after the point for shares, two for mm; - for NaN."""
    return "-" if math.isnan(value) else f"{value:.{2 if metric in DISTANCES else 3}f}"


def _mean_sd(s: Mapping[str, Any], metric: str) -> str:
    """mean±SD of one entry of a summary; the mean alone for one value, - for none."""
    return _number(s["mean"], metric) + (
        "" if math.isnan(s["sd"]) else f"±{_number(s['sd'], metric)}"
    )


def format_summary(summary: dict) -> str:
    """The table that evaluate prints: a row per class and the mean; mean±SD over images; distances in mm."""
    metrics = [m for m in SCORES if m != "nsd_valid"]
    table = [["class", *(TITLES[m] for m in metrics), "n", "missed", "spurious", "excluded"]]
    for name, entry in [*summary["classes"].items(), ("mean", summary["mean"])]:
        counts = [str(entry["dice"][key]) for key in ("n", "n_missed", "n_spurious", "n_excluded")]
        table.append([name, *(_mean_sd(entry[m], m) for m in metrics), *counts])
    how = "Distances leave missed and spurious pairs out, Dice, IoU and NSD count them as 0."
    if "empty_distance" in summary:
        how = "Missed and spurious pairs have the diagonal of their grid as distance, and 0 in Dice, IoU and NSD."
    return f"{_layout(table)}\nmean±SD over images. {how} Last row: n images, counts of pairs."


def _source(path: str, prefer: str) -> Path:
    """The file behind a path: itself, or the folder's `prefer`, or the folder's other result file."""
    found = Path(path)
    if found.is_dir():
        options = [
            found / name
            for name in dict.fromkeys((prefer, "metrics.csv"))
            if (found / name).is_file()
        ]
        if not options:
            names = " or ".join(dict.fromkeys((prefer, "metrics.csv")))
            raise InputError(
                f"{path} holds no {names}; expected a run folder; run evaluate first, or its command again"
            )
        return options[0]
    if not found.is_file():
        raise InputError(
            f"{path} does not exist; expected a run folder or its result file; check the path"
        )
    return found


def _training(path: Path) -> list[str]:
    """Cells of a run's log.csv: steps trained, training seconds a step, peak memory in GB; empty without a log.

    Seconds are those of all steps (validation not counted) over their number, not a median: steps x seconds a step is
    then the time that was spent, slow beginnings and a shared machine included, as a comparison at equal time needs.
    Raises: InputError for a cell that is no number.
    """
    if not path.is_file():
        return [""] * 3
    log: dict[str, list[float]] = {"step": [], "seconds": [], "memory_gb": []}
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        for cells in reader:
            try:
                for name, values in log.items():
                    values += [float(cells[name])] if cells.get(name) else []
            except ValueError as error:
                raise InputError(
                    f"{path} line {reader.line_num}: {error}; expected numbers or empty cells; mend or remove the file"
                ) from error
    steps, seconds, memory = (
        max(values, default=NAN) for values in log.values()
    )  # the first two only grow
    return [
        "" if math.isnan(steps) else f"{steps:.0f}",
        f"{seconds / steps:.3g}" if steps > 0 and seconds > 0 else "",
        "" if math.isnan(memory) else f"{memory:.3g}",
    ]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Spearman's rho of two lists [n] (average ranks), with its two-sided p.

    Returns: rho, p, n, exact. For n <= 9 p is the share of all n! pairings whose |rho| is as large (exact); above, the
    t approximation of scipy, which is too small for few values (n = 8, rho = 0.83: 0.0102, exact 0.0154). NaN below
    three values or where a list has one rank only.
    """
    from scipy.stats import rankdata, spearmanr

    n = len(x)
    a, b = (rankdata(v) - (n + 1) / 2 for v in (x, y))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    if n < 3 or norm == 0:
        return {"rho": NAN, "p": NAN, "n": n, "exact": True}
    rho = float(a @ b) / norm
    if n > 9:
        return {"rho": rho, "p": float(spearmanr(x, y).pvalue), "n": n, "exact": False}
    every = np.array(list(permutations(b))) @ a / norm  # [n!]
    return {
        "rho": rho,
        "p": float((np.abs(every) >= abs(rho) - 1e-9).mean()),
        "n": n,
        "exact": True,
    }


def _by_share(summary: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of `names` that have a share and a Dice, the smallest class first."""
    share = summary.get("share", {})
    known = [n for n in names if share.get(n, NAN) == share.get(n, NAN)]
    return sorted(
        (n for n in known if not math.isnan(summary["classes"][n]["dice"]["mean"])),
        key=share.__getitem__,
    )


def _print_shares(runs: Mapping[str, dict], plot: str) -> None:
    """Whether larger classes are the easier ones, for each run of three classes or more; with `plot` as a picture."""
    lines, orders = {}, {}
    for run, summary in runs.items():
        order = _by_share(summary, list(summary["classes"]))
        dice = [summary["classes"][name]["dice"]["mean"] for name in order]
        r = rank_correlation([summary["share"][name] for name in order], dice)
        if not math.isnan(r["rho"]):
            how = f"{r['n']} classes, {'exact' if r['exact'] else 't approximation'}"
            print(
                f"{run}: Spearman of class share against Dice {r['rho']:.2f}, p = {r['p']:.3g} ({how})"
            )
        if order:
            lines[run], orders[tuple(order)] = (list(range(1, len(order) + 1)), dice), run
    if plot:
        from common.old import figures

        if len(orders) != 1:
            raise InputError(
                f"--plot met {len(orders)} orders of the classes by share; expected summary.json files of one set of "
                "classes (a metrics.csv knows no shares); plot each set by itself, or run evaluate again"
            )
        names = ", ".join(f"{i} {name}" for i, name in enumerate(next(iter(orders)), 1))
        print(
            figures.curves(
                lines, plot, "", f"class, smallest share first: {names}", "mean Dice", dots=True
            )
        )


def _over_seeds(
    runs: Mapping[str, dict], metrics: Sequence[str], names: Sequence[str]
) -> list[list[str]]:
    """A row for each set of runs whose names differ in their last number only: mean±SD over the runs' means."""
    groups: dict[str, list[dict]] = {}
    for run, summary in runs.items():
        groups.setdefault(re.sub(r"\d+(?=\D*$)", "*", run), []).append(summary)
    rows = [
        [
            "runs",
            "runs in all",
            *(f"{TITLES[m]} {n or 'mean'}" for m in metrics for n in [*names, None]),
        ]
    ]
    for group, found in groups.items():
        cells = []
        for metric, name in product(metrics, [*names, None]):
            entries = [
                (s["mean"] if name is None else s["classes"].get(name, {})).get(metric)
                for s in found
            ]
            means = np.array([e["mean"] for e in entries if e and not math.isnan(e["mean"])])
            sd = means.std(ddof=1) if len(means) > 1 else NAN
            lost = [sum(e[k] for e in entries if e) for k in ("n_missed", "n_spurious")]
            counts = f" ({lost[0]}/{lost[1]})" if metric in DISTANCES else ""
            cells.append(
                _mean_sd({"mean": means.mean() if len(means) else NAN, "sd": sd}, metric) + counts
            )
        rows.append([group, str(len(found)), *cells])
    return rows


def _table(args: argparse.Namespace) -> None:
    """One row a run: mean±SD per class and of the mean; and what the training took, where a run has its log."""
    runs, logs = {}, {}
    for path in args.files:
        file = _source(path, "summary.json")
        summary = (
            read_summary(file) if file.suffix == ".json" else summarise(read_metrics_csv(file))
        )
        run = str(file.parent if file.name in ("summary.json", "metrics.csv") else file)
        runs[run], logs[run] = summary, _training(file.with_name("log.csv"))
    trained = any("".join(cells) for cells in logs.values())
    names = list(dict.fromkeys(name for summary in runs.values() for name in summary["classes"]))
    columns = [
        (metric, name) for metric in args.metric for name in [*names, None]
    ]  # None: the mean over classes
    table = [
        ["run", "n", *(f"{TITLES[m]} {'mean' if name is None else name}" for m, name in columns)]
    ]
    table[0] += ["steps", "s/step", "memory GB"] * trained
    for run, summary in runs.items():
        cells = []
        for metric, name in columns:
            s = (summary["mean"] if name is None else summary["classes"].get(name, {})).get(metric)
            counts = f" ({s['n_missed']}/{s['n_spurious']})" if s and metric in DISTANCES else ""
            cells.append(_mean_sd(s, metric) + counts if s else "-")
        table.append([run, str(summary["mean"]["dice"]["n"]), *cells, *(logs[run] * trained)])
    print(_layout(table, args.markdown))
    diagonal = [run for run, summary in runs.items() if "empty_distance" in summary]
    left = (
        f"which have the diagonal in {', '.join(diagonal)}" if diagonal else "which they leave out"
    )
    note = (
        f"; distances in mm (missed/spurious pairs, {left})"
        if {*args.metric} & {*DISTANCES}
        else ""
    )
    note += "; s/step: training seconds over steps, without validation; memory: peak" * trained
    print(("\n" if args.markdown else "") + "mean±SD over n images" + note)
    if args.seeds:
        print("\n" + _layout(_over_seeds(runs, args.metric, names), args.markdown))
        print(
            ("\n" if args.markdown else "")
            + "mean±SD over the means of runs that differ in their last number only"
        )
    _print_shares(runs, args.plot)


def paired_tests(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Paired comparison of two score lists [n], NaN where either has no value (such pairs are left out).

    Returns: n, mean_a, mean_b, difference (b - a), ci95 (bootstrap over pairs, fixed seed), p_t (two-sided paired
        t-test), p_wilcoxon (signed rank, zeros dropped), note: a sentence where no test can be made, p then NaN.
    """
    from scipy.stats import (
        ttest_rel,
        wilcoxon,
    )  # here: importing it takes longer than all the rest of this module

    valid = ~(np.isnan(a) | np.isnan(b))
    a, b = a[valid], b[valid]
    d = b - a
    mean_a, mean_b, difference = (float(v.mean()) if len(v) else NAN for v in (a, b, d))
    result: dict[str, Any] = {
        "n": len(d),
        "mean_a": mean_a,
        "mean_b": mean_b,
        "difference": difference,
        "ci95": _bootstrap(d),
        "p_t": NAN,
        "p_wilcoxon": NAN,
        "note": "",
    }
    if len(d) < 2:
        result["note"] = "fewer than 2 pairs: no test"
    elif not d.any():
        result["note"] = "identical: no test"
    else:
        result["p_wilcoxon"] = float(wilcoxon(b, a).pvalue)
        if np.ptp(d) <= 1e-9 * np.abs(d).max():  # rounding only; the t statistic would divide by it
            result["note"] = "every difference is the same: no t-test"
        else:
            result["p_t"] = float(ttest_rel(b, a).pvalue)
    return result


def _matches(pattern: str) -> list[str]:
    """The paths that a pattern names, or the path itself."""
    paths = sorted(glob(pattern)) if any(c in pattern for c in "*?[") else [pattern]
    if not paths:
        raise InputError(
            f"{pattern} matches nothing; expected run folders or metrics.csv files; check the pattern"
        )
    return paths


def _mean_of_runs(pattern: str) -> tuple[list[str], list[str], np.ndarray, np.ndarray, int]:
    """Cases, classes, values [case, class, SCORES] and status [run, case, class] of a run, or the mean of several."""
    paths = _matches(pattern)
    parts = [_array(read_metrics_csv(_source(path, "metrics.csv"))) for path in paths]
    cases, names = parts[0][:2]
    for path, (other, classes, *_) in zip(paths, parts, strict=True):
        if other != cases or classes != names:
            raise InputError(
                f"{path} and {paths[0]} hold different cases or classes; evaluate all on one split"
            )
    values = _nanmean(np.stack([v for _, _, v, _ in parts]), axis=0)
    return cases, names, values, np.stack([state for *_, state in parts]), len(paths)


def _compare(args: argparse.Namespace) -> None:
    """Paired tests per class and of the mean over the cases; of several runs (seeds) each case's mean is taken."""
    (
        (cases_a, names_a, values_a, status_a, runs_a),
        (cases_b, names_b, values_b, status_b, runs_b),
    ) = (_mean_of_runs(path) for path in (args.a, args.b))
    shared, names = [c for c in cases_a if c in set(cases_b)], [n for n in names_a if n in names_b]
    if not shared or not names:
        raise InputError(
            f"{args.a} and {args.b} share {len(shared)} cases and {len(names)} classes; expected the same "
            f"ones; evaluate both runs on one split"
        )
    alone = sorted({*cases_a} ^ {*cases_b})
    if alone and not args.shared:
        raise InputError(
            f"{args.a} and {args.b} hold different cases: {', '.join(alone[:5])}{', ...' * (len(alone) > 5)} "
            f"({len(alone)}) in one only; evaluate both on one split, or compare what they share with --shared"
        )
    pick_a, pick_b = (
        np.ix_([c.index(x) for x in shared], [n.index(x) for x in names])
        for c, n in ((cases_a, names_a), (cases_b, names_b))
    )
    a, b = values_a[pick_a], values_b[pick_b]  # [case, class, SCORES]
    state = [
        np.stack([s[pick] for s in many]) for many, pick in ((status_a, pick_a), (status_b, pick_b))
    ]
    print(
        f"A = {args.a}\nB = {args.b}\n{len(shared)} cases paired; unpaired: {len(cases_a) - len(shared)} only in A, "
        f"{len(cases_b) - len(shared)} only in B; classes in one only: {sorted({*names_a} ^ {*names_b}) or 'none'}"
    )
    if runs_a + runs_b > 2:
        print(
            f"A is the mean of {runs_a} runs, B of {runs_b}, case by case; missed and spurious are those of all runs"
        )
    for metric in args.metric:
        x, y = a[:, :, SCORES.index(metric)], b[:, :, SCORES.index(metric)]  # [case, class]
        if metric in (
            *DISTANCES,
            "nsd_valid",
        ):  # else a structure that A misses would change the mean of A alone
            x, y = np.where(np.isnan(y), NAN, x), np.where(np.isnan(x), NAN, y)
        table = [
            [
                "class",
                "n",
                "A",
                "B",
                "B-A",
                "95% interval",
                "p (t)",
                "p (Wilcoxon)",
                "missed/spurious A",
                "B",
                "",
            ]
        ]
        for j, name in enumerate([*names, "mean"]):
            column = slice(None) if j == len(names) else slice(j, j + 1)
            r = paired_tests(_nanmean(x[:, column], axis=1), _nanmean(y[:, column], axis=1))
            counts = [
                f"{(s[:, :, column] == 1).sum()}/{(s[:, :, column] == 2).sum()}" for s in state
            ]
            p = ["-" if math.isnan(r[key]) else f"{r[key]:.3g}" for key in ("p_t", "p_wilcoxon")]
            interval = (
                "-"
                if math.isnan(r["ci95"][0])
                else "{} to {}".format(*(_number(v, metric) for v in r["ci95"]))
            )
            table.append(
                [
                    name,
                    str(r["n"]),
                    *(_number(r[key], metric) for key in ("mean_a", "mean_b", "difference")),
                    interval,
                    *p,
                    *counts,
                    r["note"],
                ]
            )
        print(f"\n{TITLES[metric]}{' (mm)' if metric in DISTANCES else ''}\n{_layout(table)}")


# --------------------------------------------------------------------------------------------------------------------
# Calibration: does a run know where it is wrong?
# --------------------------------------------------------------------------------------------------------------------


def calibration(
    cases: Iterable[tuple[np.ndarray, np.ndarray, Sequence[float]]], margin_mm: float = 3.0
) -> dict:
    """How well probabilities tell errors, over the voxels within margin_mm of the truth's or the result's foreground.

    Far background is left out: it is right, sure, and nearly all of a volume, so that it would hide everything else.

    Args: cases: (prob [C, X, Y, Z] that sums to 1, background first; truth [X, Y, Z] integers; spacing in mm).
    Returns: ece: expected calibration error, sum over ten bins of the confidence (largest probability) of share of
        voxels x |accuracy - mean confidence| (Guo et al. 2017); auroc: probability that a wrong voxel has more entropy
        than a right one (ties half), NaN without either; bins: (mean entropy, share of wrong voxels, share of
        voxels) for tenths of the entropy, which is divided by log C; rho, p: Spearman over the cases between mean
        entropy and mean foreground Dice (classes in both absent left out); error: share of wrong voxels; n cases.
    """
    from scipy.special import entr
    from scipy.stats import rankdata, spearmanr

    entropy, sure, wrong, case_entropy, case_dice = [], [], [], [], []
    for prob, truth, spacing in cases:
        result = prob.argmax(axis=0)
        near = (
            distance_transform_edt((truth == 0) & (result == 0), _spacing(spacing, truth.ndim))
            <= margin_mm
        )
        if not near.any() or not (truth.any() or result.any()):
            continue
        entropy.append(entr(prob[:, near]).sum(axis=0) / math.log(len(prob)))
        sure.append(prob[:, near].max(axis=0))
        wrong.append((result != truth)[near])
        case_entropy.append(entropy[-1].mean())
        case_dice.append(
            float(
                _nanmean(
                    np.array([dice(result == c, truth == c) for c in range(1, len(prob))]), axis=0
                )
            )
        )
    if not entropy:
        raise InputError(
            "no case has foreground, neither true nor found; expected at least one; check the run"
        )
    e, s, w = (np.concatenate(v) for v in (entropy, sure, wrong))
    rows = [np.clip((v * 10).astype(int), 0, 9) for v in (s, e)]
    ece = sum(
        abs((~w[rows[0] == b]).mean() - s[rows[0] == b].mean()) * (rows[0] == b).mean()
        for b in set(rows[0])
    )
    bins = [
        (float(e[m].mean()), float(w[m].mean()), float(m.mean()))
        for m in (rows[1] == b for b in range(10))
        if m.any()
    ]
    n_wrong, n_right = int(w.sum()), int((~w).sum())
    above = rankdata(e)[w].sum() - n_wrong * (n_wrong + 1) / 2  # Mann-Whitney's U
    rho, p = spearmanr(case_entropy, case_dice) if len(case_dice) > 2 else (NAN, NAN)
    return {
        "ece": float(ece),
        "auroc": float(above / (n_wrong * n_right)) if n_wrong and n_right else NAN,
        "bins": bins,
        "rho": float(rho),
        "p": float(p),
        "error": float(w.mean()),
        "n": len(case_dice),
    }


def _probabilities(
    paths: Sequence[str], data: str
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    """(mean probability over the runs, truth, spacing) of each case of run folders with maps of one data set.

    data: `--data` of the truth; empty: as in the first folder's config.json.
    """
    from common.old import loaders

    try:
        config = Path(paths[0]) / "config.json"
        truth = loaders.open_data(data or json.loads(config.read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{config} cannot be read; expected a run folder; name the data with --data"
        ) from error
    names = ["background", *(re.sub(r"\W+", "-", name) for name in truth.classes)]
    ends = f"_mean_{names[0]}.nii.gz"
    found = [
        sorted(f.name[: -len(ends)] for f in (Path(p) / "predictions/maps").glob(f"*{ends}"))
        for p in paths
    ]
    for path, cases in zip(paths, found, strict=True):
        if not cases or cases != found[0]:
            raise InputError(
                f"{path}/predictions/maps holds the probabilities of {len(cases)} cases, expected those of "
                f"{len(found[0]) or 'some'} cases, the same in all runs; run evaluate with --save-maps"
            )
    for case in found[0]:
        label = np.asarray(truth.label(case))
        maps = []
        for path in paths:
            files = [Path(path) / f"predictions/maps/{case}_mean_{name}.nii.gz" for name in names]
            maps.append([loaders.read_nifti(file).data for file in files])
            for file, prob in zip(files, maps[-1], strict=True):
                if prob.shape != label.shape:
                    raise InputError(
                        f"{file}: a grid of {prob.shape}, the truth has {label.shape}; expected the same; evaluate "
                        "scored other data or another spacing: name those with --data"
                    )
        yield np.asarray(maps, np.float64).mean(axis=0), label, truth.spacing(case)


def _calibration(args: argparse.Namespace) -> None:
    """One row a run, or a set of runs whose probabilities are averaged; and error against entropy as a picture."""
    table = [["run", "runs", "n", "ECE", "wrong", "AUROC of entropy", "rho entropy, Dice", "p"]]
    lines = {}
    if args.margin < 0:
        raise InputError(f"--margin is {args.margin:g}, expected mm of 0 or more; correct the flag")
    for pattern in args.runs:
        paths = _matches(pattern)
        r = calibration(_probabilities(paths, args.data), args.margin)
        numbers = [
            *(f"{r[k]:.3f}" for k in ("ece", "error", "auroc")),
            f"{r['rho']:.2f}",
            f"{r['p']:.2g}",
        ]
        numbers = ["-" if number == "nan" else number for number in numbers]
        table.append([pattern, str(len(paths)), str(r["n"]), *numbers])
        shown = [
            (100 * entropy, error) for entropy, error, share in r["bins"] if share >= 0.001
        ]  # not of few voxels
        lines[pattern] = ([x for x, _ in shown], [y for _, y in shown])
    print(_layout(table, args.markdown))
    print(
        f"voxels within {args.margin:g} mm of true or found foreground; p: t approximation over cases"
    )
    if args.plot:
        from common.old import figures

        x_name = "entropy of the probabilities, % of the largest possible"
        if len(short := {Path(name).name: line for name, line in lines.items()}) == len(lines):
            lines = short
        print(figures.curves(lines, args.plot, "", x_name, "share of wrong voxels", dots=True))


# --------------------------------------------------------------------------------------------------------------------
# Draws: what few labels suffice for, and how much of that hangs on which slices were drawn
# --------------------------------------------------------------------------------------------------------------------

# Ways to run one strategy: what of these differs between its runs of one setting becomes part of the method's name.
VARIED = ("init", "t", "input", "lr", "steps")
LOST = 0.01  # a class with a mean Dice below this is lost, the dash in tables: never found, or a few stray voxels of it


def t_interval(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, sd (ddof 1), low and high of the mean's 95 % t-interval, positive: how many are above 0.

    sd, low and high are NaN below 2 values. The interval takes the values for independent and near normal.
    """
    from scipy.stats import t  # here: importing it takes longer than all the rest of this module

    x = np.asarray(values, np.float64)
    n, mean, sd = (
        len(x),
        float(x.mean()) if len(x) else NAN,
        float(x.std(ddof=1)) if len(x) > 1 else NAN,
    )
    half = float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else NAN
    return {
        "n": n,
        "mean": mean,
        "sd": sd,
        "low": mean - half,
        "high": mean + half,
        "positive": int((x > 0).sum()),
    }


def over_classes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Dice and IoU of a run: mean over cases, then over classes, so that a class weighs 1 however many cases hold it.

    (`summarise` has the other order: each case weighs 1.) A class that is empty on both sides in all cases is left out.
    A lost class (mean Dice below LOST) stays in with its 0; found_dice is the mean without lost classes.

    Args: rows: of evaluate_case or read_metrics_csv. Returns: dice, iou, found_dice, NaN where no class is left; lost:
        names. Raises: InputError unless there is one row per case and class.
    """
    _, names, values, _ = _array(rows)
    d, i = (
        _nanmean(values[:, :, SCORES.index(score)], axis=0) for score in ("dice", "iou")
    )  # [class]
    lost = d < LOST  # of NaN: no
    means = {
        key: float(_nanmean(v, axis=0))
        for key, v in (("dice", d), ("iou", i), ("found_dice", d[~lost]))
    }
    return means | {"lost": [name for name, gone in zip(names, lost) if gone]}


def _read_draw(path: str) -> dict[str, Any]:
    """A fine-tuned run: n, percent and slices of its labels, setting, config, cases and classes, scores."""
    files = [Path(path) / name for name in ("labels.json", "config.json")]
    try:
        labels, config = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        if config["strategy"] == "scratch":  # its network knows no t and starts from nothing
            config |= {"t": None, "init": None}
        _ = [config[key] for key in ("strategy", "init", "t", "lr")]
        run = {
            "path": path,
            "percent": float(labels["percent"]),
            "slices": sorted((str(case), int(k)) for case, k in labels["slices"]),
            "setting": (int(labels["n"]), str(config["dice"]), str(config["variant"])),
            "draw": int(config["draw"]),
            "config": config,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: labels.json and config.json cannot be used ({type(error).__name__}: {error}); "
            f"expected what finetune writes; name its run folders only"
        ) from error
    rows = read_metrics_csv(_source(path, "metrics.csv"))
    return run | {
        "held": sorted({(r["case"], r["class"]) for r in rows}),
        "scores": over_classes(rows),
    }


def _name_methods(runs: Sequence[dict[str, Any]]) -> None:
    """Gives each run its method: the strategy, its random start with init none, and what of VARIED tells runs apart."""
    for run in runs:
        strategy = run["config"]["strategy"]
        random = ", random start" if strategy == "full" else ", random encoder"
        run["method"] = strategy + random * (run["config"]["init"] == "none")
    for strategy in {run["method"] for run in runs}:
        alike = [run for run in runs if run["method"] == strategy]
        settings = {run["setting"] for run in alike}
        for key in VARIED:
            if len({(run["setting"], str(run["config"].get(key))) for run in alike}) > len(
                settings
            ):
                for run in alike:
                    run["method"] += f", {key}={run['config'].get(key)}"


def _check_draws(runs: Sequence[dict[str, Any]]) -> None:
    """InputError unless all runs were tested on the same cases, are told apart, and share the slices of their draw."""
    drawn: dict[tuple, dict] = {}
    for run in runs:
        first = runs[0]
        if run["held"] != first["held"]:
            alone = sorted({*run["held"]} ^ {*first["held"]})
            raise InputError(
                f"{run['path']} and {first['path']} were tested on different cases or classes, such as "
                f"{' '.join(alone[0])} in one only; expected one test set; evaluate all on one split"
            )
        n, draw, method = run["setting"][0], run["draw"], run["method"]
        same = drawn.setdefault((run["setting"], method, draw), run)
        if same is not run:
            raise InputError(
                f"{same['path']} and {run['path']} are both draw {draw} of {method} with {n} labels; "
                f"expected one run a draw; leave one out"
            )
        same = drawn.setdefault((n, draw), run)
        if same["slices"] != run["slices"]:
            raise InputError(
                f"{same['path']} and {run['path']} are both draw {draw} of {n} labels but hold different slices; "
                f"expected the same for a paired difference; train both again on one version of the data"
            )


def draws(runs: Sequence[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """A row a setting (labels, Dice loss, variant) and method, and its paired differences from `against`.

    Args: runs: of _read_draw, named and checked; against: a method.
    Returns: rows; dice, iou and found_dice are means over draws with their _sd, lost the mean number of lost classes;
        diff_...: t_interval of the Dice minus that of `against` in the same setting, over the draws that both have.
    """
    groups: dict[tuple, dict[int, dict]] = {}
    for run in runs:
        groups.setdefault((*run["setting"], run["method"]), {})[run["draw"]] = run["scores"] | {
            "run": run
        }
    rows = []
    for (n, loss, variant, method), found in sorted(groups.items()):
        percent = next(iter(found.values()))["run"]["percent"]
        row = {
            "method": method,
            "labels": n,
            "percent": percent,
            "dice_loss": loss,
            "variant": variant,
        }
        row["draws"] = len(found)
        for key in ("dice", "iou", "found_dice"):
            stats = t_interval(
                [scores[key] for scores in found.values() if not math.isnan(scores[key])]
            )
            row |= {key: stats["mean"], f"{key}_sd": stats["sd"]}
        row["lost"] = sum(len(scores["lost"]) for scores in found.values()) / len(found)
        base = groups.get((n, loss, variant, against), {}) if method != against else {}
        differences = [found[draw]["dice"] - base[draw]["dice"] for draw in found if draw in base]
        rows.append(row | {f"diff_{key}": value for key, value in t_interval(differences).items()})
    return rows


def _plot_draws(runs: Sequence[dict[str, Any]], path: str) -> None:
    """Dice against the number of labels: a dot a run, a line through the means of a method."""
    from common.old import figures

    several = [len({run["setting"][k] for run in runs}) > 1 for k in (1, 2)]
    points: dict[str, tuple[list[float], list[float]]] = {}
    for run in sorted(runs, key=lambda r: (r["method"], r["setting"])):
        name = ", ".join([run["method"], *(run["setting"][k] for k in (1, 2) if several[k - 1])])
        x, y = points.setdefault(name, ([], []))
        x.append(run["setting"][0])
        y.append(run["scores"]["dice"])
    print(
        figures.scatter(
            points, path, "", "labelled slices (logarithmic)", "Dice, mean over cases, then classes"
        )
    )


def _draws(args: argparse.Namespace) -> None:
    """Means over draws of each method, and paired differences from --against; both also as CSV and as a picture."""
    runs = [_read_draw(path) for pattern in args.runs for path in _matches(pattern)]
    _name_methods(runs)
    _check_draws(runs)
    methods = sorted({run["method"] for run in runs})
    if args.against not in methods:
        raise InputError(
            f"--against {args.against} is no method here; expected one of: {' | '.join(methods)}; name one"
        )
    rows = draws(runs, args.against)
    table = [
        [
            "method",
            "labels",
            "%",
            "Dice loss",
            "variant",
            "draws",
            "Dice",
            "IoU",
            "Dice without lost",
            "lost",
        ]
    ]
    pairs = [
        [
            f"minus {args.against}",
            "labels",
            "Dice loss",
            "variant",
            "draws",
            "Dice",
            "SD",
            "95 % interval",
            "above 0",
        ]
    ]
    for r in rows:
        setting = [
            r["method"],
            str(r["labels"]),
            f"{r['percent']:.3g}",
            r["dice_loss"],
            r["variant"],
        ]
        means = [
            _mean_sd({"mean": r[k], "sd": r[f"{k}_sd"]}, "dice")
            for k in ("dice", "iou", "found_dice")
        ]
        table.append([*setting, str(r["draws"]), *means, f"{r['lost']:.3g}"])
        n = r["diff_n"]
        interval = f"{r['diff_low']:+.3f} to {r['diff_high']:+.3f}" if n > 1 else "no interval"
        if r["method"] != args.against:
            numbers = [
                f"{r['diff_mean']:+.3f}" if n else "-",
                _number(r["diff_sd"], "dice"),
                interval,
            ]
            pairs.append(
                [*setting[:2], *setting[3:], str(n), *numbers, f"{r['diff_positive']}/{n}"]
            )
    gap = "\n" * args.markdown
    print(_layout(table, args.markdown))
    cases, names = (len({held[k] for held in runs[0]["held"]}) for k in (0, 1))
    print(
        f"{gap}mean±SD over draws of a run's mean over {cases} cases, then over {names} classes; lost: classes a draw "
        f"with a Dice below {LOST}, which the first two means count"
    )
    if len(pairs) > 1:
        print(f"\n{_layout(pairs, args.markdown)}")
        print(
            f"{gap}paired over the draws that both have; 95 % t-interval over draws, not over cases"
        )
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)
        _write_text(args.csv, text.getvalue())
    if args.plot:
        _plot_draws(runs, args.plot)


# --------------------------------------------------------------------------------------------------------------------
# Scoring of two folders of masks
# --------------------------------------------------------------------------------------------------------------------


def _read_mask(path: Path) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    """Integer labels, spacing (mm; 1 pixel for PNG) and affine of a mask file. InputError says what is wrong."""
    spacing: tuple[float, ...] = (1.0, 1.0)
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                labels = np.asarray(image)  # [Y, X]; a palette image gives its indices
            affine = np.eye(4)
        else:
            raw = path.read_bytes()
            if (
                path.suffix == ".gz"
            ):  # here, because nibabel stops at the last voxel and then misses a wrong checksum
                raw = gzip.decompress(raw)
            sizes = (
                (540).to_bytes(4, "little"),
                (540).to_bytes(4, "big"),
            )  # the first number of a NIfTI-2 header
            file = (nib.Nifti2Image if raw[:4] in sizes else nib.Nifti1Image).from_bytes(raw)
            labels = np.asanyarray(file.dataobj)  # [X, Y, Z]
            spacing, affine = tuple(float(s) for s in file.header.get_zooms()[:3]), file.affine
    except (
        OSError,
        EOFError,
        ValueError,
        SyntaxError,
        zlib.error,
        ImageFileError,
        HeaderDataError,
        WrapStructError,
    ) as error:
        raise InputError(f"cannot be read ({' '.join(str(error).split())})") from error
    while labels.ndim > 3 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.ndim != (2 if path.suffix == ".png" else len(spacing)) or not labels.size:
        raise InputError(f"has shape {labels.shape}, expected one channel")
    if labels.dtype.kind not in "uib" and not (
        np.isfinite(labels).all() and (labels == np.rint(labels)).all()
    ):
        raise InputError("has label values that are not integers")
    return labels if labels.dtype.kind in "ui" else labels.astype(np.int32), spacing, affine


def _read_pair(
    pred_file: Path, true_file: Path
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Labels of both and their spacing. InputError unless both are readable and lie on the same grid."""
    masks = []
    for side, file in (("prediction", pred_file), ("truth", true_file)):
        try:
            masks.append(_read_mask(file))
        except InputError as error:
            raise InputError(f"{side} {file.name} {error}") from error
    (pred, _, affine_p), (true, spacing, affine_t) = masks
    if pred.shape != true.shape:
        raise InputError(f"prediction has shape {pred.shape}, truth has {true.shape}")
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in (*true.shape, 1)[:3]), [1]), -1).reshape(
        -1, 4
    )
    shift = np.abs(corners @ (affine_p - affine_t).T).max()
    if not shift <= 1e-3:
        raise InputError(
            f"affines differ by {shift:.3g} mm at a corner of the grid, expected at most 0.001"
        )
    return pred, true, spacing


def _mask_files(folder: str) -> dict[str, Path]:
    """Case id -> mask file; the id is the name without extension and without a trailing _0000."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder} is no folder; expected one with .nii, .nii.gz or .png masks; check the path"
        )
    files: dict[str, Path] = {}
    for file in sorted(Path(folder).iterdir()):
        for end in (".nii.gz", ".nii", ".png"):
            if file.name.endswith(end) and not file.name.startswith("."):
                case = file.name.removesuffix(end).removesuffix("_0000")
                if case in files:
                    raise InputError(
                        f"{files[case]} and {file.name} are both case {case}; expected one mask a case; remove one"
                    )
                files[case] = file
                break
    if not files:
        raise InputError(
            f"{folder} has no .nii, .nii.gz or .png files; expected one mask a case; check the path"
        )
    return files


def _parse_classes(words: list[str]) -> dict[str, list[int]]:
    """NAME=VALUE or NAME=VALUE+VALUE words -> name -> label values, whose union is the class."""
    try:
        pairs = [w.split("=") for word in words for w in word.split(",") if w]
        if twice := {name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1}:
            raise InputError(
                f"--classes names {', '.join(sorted(twice))} twice; give one name to each class"
            )
        return {name: [int(value) for value in values.split("+")] for name, values in pairs}
    except ValueError as error:
        raise InputError(
            f"--classes {' '.join(words)} is not understood; expected NAME=VALUE ..., or NAME=VALUE+VALUE for a union; "
            f"write for example --classes liver=1+2 tumour=2"
        ) from error


def _pairs(
    preds: Mapping[str, Path], trues: Mapping[str, Path]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, tuple[float, ...]]]:
    """(case, labels of both, spacing) of each sound pair; at the end one InputError that names all faulty cases."""
    faults = []
    folders = {
        side: next(iter(files.values())).parent
        for side, files in (("pred", preds), ("true", trues))
    }
    for case in sorted({*preds, *trues}):
        if case not in preds or case not in trues:
            faults.append(f"{case}: no file in {folders['true' if case in preds else 'pred']}")
            continue
        try:
            pred, true, spacing = _read_pair(preds[case], trues[case])
        except InputError as error:
            faults.append(f"{case}: {error}")
            continue
        yield case, pred, true, spacing
    if faults:
        raise InputError(
            f"{len(faults)} faulty cases: {' | '.join(faults)}; correct or remove these files"
        )


def _score_instances(preds: Mapping[str, Path], trues: Mapping[str, Path]) -> None:
    """A row of object scores for each image, and their means; - where both maps are empty."""
    scores, table = [], []
    for case, pred, true, _ in _pairs(preds, trues):
        try:
            scores.append([*object_scores(pred, true).values()])
        except ValueError as error:
            raise InputError(f"{case}: {error}") from error
        objects = [str(np.count_nonzero(np.unique(labels))) for labels in (true, pred)]
        table.append([case, *objects, *("-" if math.isnan(v) else f"{v:.4f}" for v in scores[-1])])
    values = np.array(scores)  # [image, score]
    n = np.count_nonzero(~np.isnan(values[:, 0]))
    spread = np.nanstd(values, axis=0, ddof=1) if n > 1 else np.full(values.shape[1], NAN)
    means = [
        f"{m:.4f}" + f"±{sd:.4f}" * int(n > 1) for m, sd in zip(_nanmean(values, axis=0), spread)
    ]
    table = [["image", "true objects", "found", "Dice", "IoU", "AJI", "object Dice"], *table]
    print(_layout([*table, [f"mean±SD, n = {n}", "", "", *means]]))


def _score(args: argparse.Namespace) -> None:
    """Score each pair of masks; all faulty cases are named in one error, before anything is written."""
    if args.tolerance < 0:
        raise InputError(
            f"--tolerance is {args.tolerance:g}, expected mm of 0 or more; correct the flag"
        )
    if args.instances and (
        args.out or args.classes or args.tolerance != 1 or args.empty_distance != "none"
    ):
        raise InputError(
            "--instances prints object scores alone; leave --out, --classes, --tolerance and --empty-distance out"
        )
    classes = _parse_classes(args.classes or [])
    out = Path(args.out) if args.out else None
    for name in ("metrics.csv", "summary.json"):
        if out and (out / name).exists() and not args.overwrite:
            raise InputError(
                f"{out / name} exists; expected an empty folder; choose another --out or add --overwrite"
            )
    preds, trues = _mask_files(args.pred), _mask_files(args.true)
    png = {file.suffix == ".png" for file in [*preds.values(), *trues.values()]}
    if len(png) > 1:
        raise InputError(
            "the folders hold both PNG and NIfTI masks; expected one kind; score them one at a time"
        )
    if args.instances:
        return _score_instances(preds, trues)
    results, grids = {}, {}
    for case, pred, true, spacing in _pairs(preds, trues):
        found = classes or {
            str(v): [int(v)] for v in np.union1d(np.unique(pred), np.unique(true)) if v
        }
        results[case] = {
            row["class"]: row
            for row in evaluate_case(case, pred, true, spacing, found, args.tolerance)
        }
        grids[case] = diagonal_mm(true.shape, spacing), spacing
    classes = classes or {
        name: [int(name)]
        for name in sorted({n for rows in results.values() for n in rows}, key=int)
    }
    if not classes:
        raise InputError(
            "all masks are empty; expected label values above 0; check the folders, or give --classes"
        )
    rows = []
    for case, by_class in results.items():
        spacing = grids[case][1]
        blank = np.zeros(
            (1,) * len(spacing), dtype=np.uint8
        )  # a class that this case has on neither side
        rows += [
            by_class.get(name) or evaluate_case(case, blank, blank, spacing, {name: values})[0]
            for name, values in classes.items()
        ]
    summary = summarise(
        rows, {c: g[0] for c, g in grids.items()} if args.empty_distance == "diagonal" else None
    )
    print(format_summary(summary))
    print(
        "Units: pixels (PNG has no spacing; the mm and ml columns count 1 pixel as 1 mm)."
        if True in png
        else "Units: mm, spacing from the NIfTI headers; metrics on the grid of the files."
    )
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_metrics_csv(out / "metrics.csv", rows)
        write_summary(out / "summary.json", summary)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as InputError: one line, as for any other bad input."""

    def error(self, message: str):
        raise InputError(f"{message}; see python -m common.metrics --help")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="python -m common.metrics",
        description="Tables, tests and scores of segmentation results.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    table = verbs.add_parser("table", help="one row a run: mean±SD per class")
    table.add_argument(
        "files", nargs="+", metavar="FILE", help="summary.json, metrics.csv or a run folder"
    )
    table.add_argument("--markdown", action="store_true", help="write the table as Markdown")
    table.add_argument(
        "--seeds",
        action="store_true",
        help="also mean±SD over runs that differ in their last number",
    )
    table.add_argument(
        "--plot", default="", metavar="FILE", help="draw the Dice of the classes by size, as PNG"
    )
    compare = verbs.add_parser(
        "compare", help="paired t-test, Wilcoxon test and bootstrap interval of B - A"
    )
    compare.add_argument(
        "a",
        metavar="A",
        help="metrics.csv or run folder; 'runs/x-?' in quotes: the mean of several",
    )
    compare.add_argument("b", metavar="B", help="likewise")
    compare.add_argument(
        "--shared", action="store_true", help="pair the cases that both hold, leave the others out"
    )
    sure = verbs.add_parser(
        "calibration", help="error against entropy, of runs evaluated with --save-maps"
    )
    sure.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder; 'runs/x-?' in quotes: their mean probability",
    )
    sure.add_argument(
        "--data",
        default="",
        metavar="NAME",
        help="prepared data of the truth; default: the run's own",
    )
    sure.add_argument(
        "--margin",
        type=float,
        default=3.0,
        metavar="MM",
        help="round the foreground, in mm (default 3)",
    )
    sure.add_argument(
        "--plot", default="", metavar="FILE", help="draw the share of errors by entropy, as PNG"
    )
    sure.add_argument("--markdown", action="store_true", help="write the table as Markdown")
    few = verbs.add_parser(
        "draws", help="Dice by number of labels, mean±SD and paired differences over draws"
    )
    few.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder of finetune, or 'runs/x-?' in quotes"
    )
    few.add_argument(
        "--against",
        default="scratch",
        metavar="METHOD",
        help="of the differences (default scratch)",
    )
    few.add_argument(
        "--plot",
        default="",
        metavar="FILE",
        help="draw Dice against labels with all points, as PNG",
    )
    few.add_argument(
        "--csv", default="", metavar="FILE", help="write the rows of both tables with all digits"
    )
    few.add_argument("--markdown", action="store_true", help="write the tables as Markdown")
    for verb in (table, compare):
        verb.add_argument(
            "--metric", nargs="+", choices=SCORES, default=["dice", "hd95_mm"], help="default: both"
        )
    score = verbs.add_parser(
        "score", help="score two folders of NIfTI or PNG masks, paired by file name"
    )
    score.add_argument("--pred", required=True, metavar="DIR", help="predicted masks")
    score.add_argument("--true", required=True, metavar="DIR", help="reference masks")
    score.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME=VALUE",
        help="NAME=VALUE, or NAME=VALUE+VALUE for a union; default: every value but 0 in the files",
    )
    score.add_argument(
        "--instances",
        action="store_true",
        help="values are object ids: print Dice, IoU, AJI and object Dice a file",
    )
    score.add_argument(
        "--tolerance", type=float, default=1.0, metavar="MM", help="of NSD, in mm (default 1)"
    )
    score.add_argument(
        "--empty-distance",
        choices=("none", "diagonal"),
        default="none",
        help="distance of missed and spurious pairs: left out, or the diagonal of the grid",
    )
    score.add_argument("--out", metavar="DIR", help="write metrics.csv and summary.json there")
    score.add_argument("--overwrite", action="store_true", help="replace these files in --out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 done, 2 bad input (one line on stderr), 130 after Ctrl-C."""
    try:
        args = make_parser().parse_args(argv)
        verbs = {
            "table": _table,
            "compare": _compare,
            "score": _score,
            "calibration": _calibration,
            "draws": _draws,
        }
        verbs[args.verb](args)
    except (InputError, OSError) as error:
        print(f"metrics: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
