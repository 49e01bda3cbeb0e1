"""Prepare MoNuSeg 2018: nuclei in H&E sections of several organs, outlined by polygons.

  python -m data_prep.monuseg --src DIR --dst data/monuseg         DIR holds both archives, or what was in them
  python -m data_prep.monuseg --src DIR --check                    list all faults, compare counts, write nothing
  python -m data_prep.monuseg --src DIR --dst data/monuseg --subset   fewer images than published
  python -m data_prep.monuseg --make-fake /tmp/fake --layout zip   a tiny copy of both archives; folder: unpacked

Names     "MoNuSeg 2018 Training Data.zip" and "MoNuSegTestData.zip", or unpacked: NAME.tif, and NAME.xml beside it or
          anywhere else. What lies in a folder or archive with "test" in its name is of the test set.
Labels    Every <Region> of the XML is a nucleus, its number in instances.npy its place in the file, from 1. Pixel (row
          i, column j) belongs to a polygon where the point (j + o, i + o) lies inside by the even-odd rule; an earlier
          region keeps the pixels that two claim; what lies beyond the image is cut off. Regions of fewer than three
          vertices, or without a pixel, are left out and counted. Label 1 is every nucleus.
--offset  o. 0.5 (default) is the pixel's centre, where the step in grey across the outline is largest on 7 images; the
          organisers' converter amounts to 1.
--reduce  K: pixels K times as wide and high, for small machines: means of K x K pixels, numbers of the middle one
          (K even: of that right and below it); what is left over at the right and lower end is cut off.
Splits    train: the 30 images of the challenge; test; extra: seven that today's archive has besides. Names in the order
          of text. Images without XML are in `unlabelled`; pretrain is train and test with those. There is no val.
Counts    30 and 14. Fewer are refused without --subset.
Stored    uint8 as published, [3, Y, X].
"""

import argparse
import functools
import io
import re
import sys
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from common import InputError
from common.loaders import read_image
from data_prep import _prepare
from data_prep._prepare import Case, Flat, Report, Source, some

LAYOUTS = ("folder", "zip")
PUBLISHED = {"train": 30, "test": 14}
EXTRA = ("BC-A217", "F9-A8NY", "FG-A87N", "MH-A561", "UZ-A9PJ", "UZ-A9PN", "XS-A8TJ")
NAME = re.compile(r"(TCGA-\w\w-\w{4}-[\w-]+)\.(tif|tiff|png|bmp|xml)", re.IGNORECASE)
TRAINING, TEST = "MoNuSeg 2018 Training Data", "MoNuSegTestData"


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List the images and their XML; faults of single cases are collected, not raised.

    options: offset, reduce, subset. Raises: InputError where nothing of MoNuSeg is there.
    """
    files: dict[str, dict[str, list[Path]]] = {}
    parts: dict[str, list[str]] = {"train": [], "test": [], "extra": []}
    other = 0
    for file in _prepare.plain_files(src):
        if match := NAME.fullmatch(file.name):
            kind = "outlines" if match[2].lower() == "xml" else "image"
            files.setdefault(match[1], {}).setdefault(kind, []).append(file)
            if kind == "image" and len(files[match[1]]["image"]) == 1:
                parts[part_of(file, src, match[1])].append(match[1])
        else:
            other += 1
    if not files:
        raise InputError(
            f"{src}: no TCGA-….tif below it or in an archive, expected {TRAINING}.zip; check --src"
        )
    cases, faults = pair_files(files)
    labelled = {case.id for case in cases if case.label}
    for part, published in PUBLISHED.items():
        if len(parts[part]) != published and not options.subset:
            faults.append(f"{src}: {len(parts[part])} images of {part}, expected {published}; "
                          "get both archives, or pass --subset")  # fmt: skip
    notes = [f"{src}: {other} files of other names, left out"] if other else []
    if not labelled & set(parts["train"]):
        notes += [
            f"{src}: no training image has an XML beside it: nothing to learn from, nothing to choose by"
        ]
    bare = sorted({case.id for case in cases} - labelled)
    notes += (
        [f"{src}: images without XML, for pre-training only: {len(bare)} ({some(bare)})"]
        if bare
        else []
    )
    return Source(
        name="monuseg",
        channels=("red", "green", "blue"),
        ct=(False,) * 3,
        classes={"nucleus": 1},
        label_values={0: 0, 1: 1},
        label_map={0: 0, 1: 1},
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        faults=tuple(faults),
        notes=tuple(notes),
        rules=({"kind": "none"},) * 3,
        splits={
            **{part: sorted(labelled & set(names)) for part, names in parts.items()},
            "pretrain": sorted({case.id for case in cases} - set(parts["extra"])),
            "val": [],
        },
        counts={part: (len(parts[part]), published) for part, published in PUBLISHED.items()},
        read=functools.partial(read_case, options.offset, options.reduce),
        settings={"offset": options.offset}
        | ({"reduce": options.reduce} if options.reduce > 1 else {}),
    )


def part_of(file: Path, src: Path, case: str) -> str:
    """train, test or extra."""
    if case.upper().removeprefix("TCGA-")[:7] in EXTRA:
        return "extra"
    above = [*file.relative_to(src).parts[:-1], src.name if src.name.startswith(TEST) else ""]
    return "test" if any("test" in name.lower() for name in above) else "train"


def pair_files(files: dict[str, dict[str, list[Path]]]) -> tuple[list[Case], list[str]]:
    """Cases with one image and at most one XML; and a fault for each file that is there twice or without image."""
    cases, faults = [], []
    for case, found in sorted(files.items()):
        double = {kind: paths for kind, paths in found.items() if len(paths) > 1}
        faults += [
            f"{p[0]}: {p[1]} is of the same name, expected one {kind}; remove one"
            for kind, p in double.items()
        ]
        if "image" not in found:
            faults.append(
                f"{found['outlines'][0]}: outlines without image, expected {case}.tif; copy it"
            )
        elif not double:
            cases.append(Case(case, (found["image"][0],), found.get("outlines", [None])[0]))
    return cases, faults


# --- outlines --------------------------------------------------------------------------------------------------------


def read_outlines(path: Path, blob: bytes) -> tuple[list[np.ndarray], float | None]:
    """Vertices (x, y) float64 [V, 2] of each region in file order, and micrometres a pixel. Raises: InputError."""
    if b"<!DOCTYPE" in blob or b"<!ENTITY" in blob:  # of no use here, and made to blow up in memory
        raise InputError(
            f"{path}: XML with a document type of its own, expected ImageScope's plain one; get it again"
        )
    try:
        root = ET.fromstring(blob)
    except (ET.ParseError, ValueError) as e:  # ValueError: an encoding that Python does not know
        raise InputError(f"{path}: not XML, or cut off ({e}); get it again") from e
    regions = []
    for number, region in enumerate(root.iter("Region"), 1):
        try:
            points = [(float(v.attrib["X"]), float(v.attrib["Y"])) for v in region.iter("Vertex")]
        except (KeyError, ValueError) as e:
            raise InputError(
                f"{path}: region {number} has a vertex without number ({e}), expected X and Y"
            ) from e
        regions.append(np.array(points, np.float64).reshape(-1, 2))
        if not np.isfinite(regions[-1]).all():
            raise InputError(
                f"{path}: region {number} has a vertex at NaN or Inf, expected pixels; correct it"
            )
    if not regions:
        raise InputError(
            f"{path}: holds no Region, expected one for each nucleus; is it another XML?"
        )
    try:
        micrometres = float(root.attrib["MicronsPerPixel"])
    except (KeyError, ValueError):  # one published file has none
        micrometres = None
    return regions, micrometres


def inside_polygon(
    points: np.ndarray, shape: tuple[int, int], offset: float
) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and the mask [rows, columns] of a polygon's pixels in an image of `shape` (Y, X).

    points: vertices (x, y) [V, 2]; the last is joined to the first. Pixel (i, j) is inside where a ray from the point
    (j + offset, i + offset) to the right crosses an odd number of edges, each without its upper end.
    """
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    rows = slice(
        *np.clip([np.ceil(top - offset), np.ceil(bottom - offset)], 0, shape[0])
        .astype(int)
        .tolist()
    )
    columns = slice(
        *np.clip([np.ceil(left - offset), np.ceil(right - offset)], 0, shape[1])
        .astype(int)
        .tolist()
    )
    height, width = rows.stop - rows.start, columns.stop - columns.start
    y = np.arange(rows.start, rows.stop)[:, None] + offset  # [rows, 1]
    (x1, y1), (x2, y2) = points.T, np.roll(points, -1, axis=0).T  # [V] each
    row, edge = np.nonzero((np.minimum(y1, y2) <= y) & (y < np.maximum(y1, y2)))
    cross = x1[edge] + (y[row, 0] - y1[edge]) / (y2 - y1)[edge] * (x2 - x1)[edge]
    # A crossing at x counts for every pixel to its left: those before column ceil(x - offset).
    before = np.clip(np.ceil(cross - offset) - columns.start, 0, width).astype(int)
    counts = np.bincount(row * (width + 1) + before, minlength=height * (width + 1)).reshape(
        height, width + 1
    )
    behind = counts[:, ::-1].cumsum(axis=1)[
        :, ::-1
    ]  # [rows, columns + 1]: crossings at this column or farther right
    return rows, columns, behind[:, 1:] % 2 == 1


def draw_instances(
    regions: list[np.ndarray], shape: tuple[int, int], offset: float
) -> tuple[np.ndarray, dict[str, int]]:
    """Numbers int32 [Y, X] of the regions, from 1 in their order; and how many regions and pixels are special."""
    instances = np.zeros(shape, np.int32)
    counts = {
        "regions": len(regions),
        "few_vertices": 0,
        "no_pixel": 0,
        "clipped": 0,
        "contested_pixels": 0,
    }
    for number, points in enumerate(regions, 1):
        if len(points) < 3:
            counts["few_vertices"] += 1
            continue
        rows, columns, mask = inside_polygon(points, shape, offset)
        own = instances[rows, columns]
        counts["no_pixel"] += not mask.any()
        counts["clipped"] += bool(
            mask.any() and ((points < 0) | (points > (shape[1], shape[0]))).any()
        )
        counts["contested_pixels"] += int(np.count_nonzero(mask & (own > 0)))
        own[mask & (own == 0)] = number
    return instances, counts


def read_case(offset: float, reduce: int, case: Case, report: Report) -> Flat | None:
    """Image, nucleus or not, and nuclei of one case, `reduce` times smaller; faults and notes go into the report."""
    image = _prepare.read_flat(report, read_image, case.images[0])
    read = _prepare.read_flat(report, read_outlines, case.label) if case.label else None
    if image is None or (case.label and read is None):
        return None
    if len(image) != 3:
        report.faults.append(f"{case.images[0]}: a grey image, expected colours; is it a mask?")
    if read is None:
        return Flat(_prepare.reduced(image, np.empty(image.shape[1:]), reduce)[0])
    instances, counts = draw_instances(read[0], image.shape[1:], offset)
    outside, few = counts["no_pixel"], counts["few_vertices"]
    if 2 * outside > counts["regions"]:
        report.faults.append(f"{case.label}: {outside} of {counts['regions']} regions have no pixel in the image of "
                             f"{_prepare.size(image)}; is it the XML of another image?")  # fmt: skip
    elif outside or few:
        what = f"{few} of fewer than 3 vertices, {outside} without a pixel in the image"
        report.notes.append(f"{case.label}: of {counts['regions']} regions left out: {what}")
    facts = {"outlines": counts, "micrometres_per_pixel": read[1] and read[1] * reduce}
    image, instances = _prepare.reduced(image, instances, reduce)
    return Flat(image, (instances > 0).astype(np.uint8), instances, facts)


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def make_fake(root: Path, layout: str) -> None:
    """Write small images in the published layout: 30 + 7 training images, 14 test images, all but one with XML.

    Polygons have fractions, gaps in their Id, overlaps and points outside; one region has two vertices.
    """
    names = [f"TCGA-F{i % 6}-{5000 + i}-01Z-00-DX1" for i in range(30)] + [
        f"TCGA-{x}-01Z-00-DX1" for x in EXTRA
    ]
    files: dict[str, bytes] = {}
    for i, name in enumerate(names + [f"TCGA-T{i % 7}-A{100 + i}-01A-01-TS1" for i in range(14)]):
        image, outlines = draw_nuclei(np.random.default_rng(i), two_vertices=i == 1)
        memory = io.BytesIO()
        Image.fromarray(image).save(
            memory, "TIFF", compression="tiff_lzw" if i < 37 else "packbits"
        )
        folders = (
            (f"{TRAINING}/Tissue Images", f"{TRAINING}/Annotations") if i < 37 else (TEST, TEST)
        )
        files[f"{folders[0]}/{name}.tif"] = memory.getvalue()
        if i != 3:
            files[f"{folders[1]}/{name}.xml"] = outlines.encode()
    for name, blob in files.items():
        if layout == "zip":
            root.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(root / f"{name.split('/')[0]}.zip", "a") as packed:
                packed.writestr(name, blob)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(blob)


def draw_nuclei(
    rng: np.random.Generator, two_vertices: bool, side: int = 40
) -> tuple[np.ndarray, str]:
    """(image uint8 [Y, X, 3], XML) of five dark octagons, the first two overlapping, the last beyond the edge."""
    angles = np.arange(8) * np.pi / 4
    centres = np.array([(10, 10), (14, 12), (28, 9), (12, 30), (side - 1, 28)]) + rng.uniform(
        -1, 1, (5, 2)
    )
    regions = [c + 4.4 * np.stack([np.cos(angles), np.sin(angles)], axis=1) for c in centres]
    dark = draw_instances(regions, (side, side), 0.5)[0][..., None] > 0  # [Y, X, 1]
    image = np.where(dark, (90, 50, 130), (230, 190, 215)) + rng.normal(0, 12, (side, side, 3))
    if two_vertices:
        regions.insert(1, regions[0][:2])
    text = ['<Annotations MicronsPerPixel="0.252"><Annotation Id="1"><Attributes/><Regions>']
    for number, points in enumerate(regions):
        vertices = "".join(f'<Vertex X="{x:.6f}" Y="{y:.6f}" Z="0"/>' for x, y in points)
        text.append(f'<Region Id="{15 + 3 * number}"><Vertices>{vertices}</Vertices></Region>')
    text.append("</Regions><Plots/></Annotation></Annotations>")
    return np.clip(image, 0, 255).astype(np.uint8), "\n".join(text)


def parse_offset(text: str) -> float:
    """A number of 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 to 1")
    return value


def add_flags(parser: _prepare.Parser) -> None:
    parser.add_argument(
        "--offset",
        type=parse_offset,
        default=0.5,
        metavar="O",
        help="where a pixel is tested, see above",
    )
    _prepare.add_reduce(parser)
    parser.add_argument("--subset", action="store_true", help="accept fewer images than published")


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(
        argv, "monuseg", __doc__ or "", read_source, make_fake, LAYOUTS, add_flags, flat=True
    )


if __name__ == "__main__":
    sys.exit(main())
