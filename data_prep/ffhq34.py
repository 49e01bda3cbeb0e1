"""Prepare FFHQ-34 or CelebA-19 as distributed with ddpm-segmentation: parts of faces in photographs.

  python -m data_prep.ffhq34 --src datasets/ffhq_34 --dst data/ffhq34
  python -m data_prep.ffhq34 --src datasets/celeba_19 --dst data/celeba19
  python -m data_prep.ffhq34 --src datasets/ffhq_34 --check                list all faults, write nothing
  python -m data_prep.ffhq34 --src datasets/ffhq_34 --dst data/ffhq34 --photographs FFHQ   with images for pre-training
  python -m data_prep.ffhq34 --make-fake /tmp/fake --layout ffhq_34        a tiny copy of the layout

Names     datasets.tar.gz unpacked: SET/real/train and SET/real/test, SET ffhq_34 or celeba_19. In both folders a square
          image and a file .npy of the same stem, its integer class map. SET/ddpm, which holds samples, is not read.
Labels    FFHQ-34: 0 background and classes 1 to 33, CelebA-19: 1 to 18, by number; 255 belongs to no class.
Splits    train and test, folder by folder (cases train_STEM and test_STEM); pretrain: train and --photographs, a folder
          of square images without labels (cases photo_STEM). There is no val.
Counts    20 and 20; 20 and 500. Others are refused without --subset.
Stored    uint8 [3, 256, 256] (--size): the image resized bilinearly, the class map by nearest neighbour. That small
          classes of a training image count as 255 is up to the training.
Unseen    The download was not at hand: folders, stems and values are as public code reads them, and were only tried
          with files made like it. The names of the classes were not at hand either.
"""

import argparse
import functools
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from common import InputError
from common.loaders import IMAGE_ENDINGS, read_image
from data_prep import _prepare
from data_prep._prepare import Case, Flat, Report, Source, some

LAYOUTS = ("ffhq_34", "celeba_19")
CLASSES = {"ffhq_34": 34, "celeba_19": 19}  # with background
PUBLISHED = {"ffhq_34": {"train": 20, "test": 20}, "celeba_19": {"train": 20, "test": 500}}
IGNORE = 255


def read_source(src: Path, options: argparse.Namespace) -> Source:
    """List the pairs of both folders; faults of single cases are collected, not raised.

    options: size, photographs, subset. Raises: InputError where no set is there, or both are.
    """
    root = find_set(src)
    classes, published = CLASSES[root.name], PUBLISHED[root.name]
    cases: list[Case] = []
    faults: list[str] = []
    splits: dict[str, list[str]] = {}
    for part, number in published.items():
        found = list_pairs(root / "real" / part, part, faults)
        cases += found
        splits[part] = [case.id for case in found]
        if len(found) != number and not options.subset:
            faults.append(
                f"{root / 'real' / part}: {len(found)} pairs, expected {number}; get all, or pass --subset"
            )
    photographs = list_photographs(options.photographs, faults) if options.photographs else []
    values = {value: value for value in range(classes)}
    return Source(
        name=root.name.replace("_", ""),
        channels=("red", "green", "blue"),
        ct=(False,) * 3,
        classes={f"class {value}": value for value in range(1, classes)},
        label_values=values,
        label_map={**values, IGNORE: IGNORE},
        cases=tuple(cases + photographs),
        faults=tuple(faults),
        rules=({"kind": "none"},) * 3,
        splits={
            **splits,
            "pretrain": splits["train"] + [case.id for case in photographs],
            "val": [],
        },
        counts={part: (len(splits[part]), number) for part, number in published.items()},
        entries={"ignore": IGNORE},
        read=functools.partial(read_case, options.size, classes),
        settings={"size": options.size},
    )


def find_set(src: Path) -> Path:
    """The folder ffhq_34 or celeba_19: src itself, or the only one below it. Raises: InputError."""
    if not src.is_dir():
        packed = "unpack it first" if src.is_file() else "check --src"
        raise InputError(
            f"{src}: no such folder, expected datasets/ffhq_34 or datasets/celeba_19; {packed}"
        )
    src = src.resolve()  # --src . has a name too
    found = [
        f
        for f in (src, *(src / name for name in CLASSES))
        if f.name in CLASSES and (f / "real").is_dir()
    ]
    if len(found) > 1:
        raise InputError(
            f"{src}: holds both {' and '.join(f.name for f in found)}; give one of them as --src"
        )
    if not found:
        raise InputError(
            f"{src}: no ffhq_34/real or celeba_19/real here, expected the unpacked set; check --src"
        )
    return found[0]


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in the order of text, without what a Mac leaves."""
    return sorted(
        f for f in folder.iterdir() if f.suffix.lower() in IMAGE_ENDINGS and f.name[0] not in "._"
    )


def list_pairs(folder: Path, part: str, faults: list[str]) -> list[Case]:
    """Images with a class map of the same stem; a fault for each image or map without its other half."""
    if not folder.is_dir():
        faults.append(
            f"{folder}: no such folder, expected images and .npy files; unpack the set again"
        )
        return []
    cases: dict[str, Case] = {}
    maps = {f.stem: f for f in sorted(folder.glob("*.npy")) if f.name[0] not in "._"}
    for file in images_in(folder):
        case = f"{part}_{file.stem}"
        if case in cases:
            faults.append(
                f"{file}: {cases[case].images[0].name} has the same stem, expected one image; remove one"
            )
        elif file.stem not in maps:
            faults.append(f"{file}: has no class map, expected {file.stem}.npy beside it; copy it")
        elif not _prepare.is_case_name(case):
            faults.append(
                f"{file}: a name with other signs than letters, digits, - and _; rename it and its map"
            )
        else:
            cases[case] = Case(case, (file,), maps[file.stem])
    alone = sorted(set(maps) - {file.stem for file in images_in(folder)})
    faults += [
        f"{maps[stem]}: a class map without image, expected {stem}.png or .jpg; copy it"
        for stem in alone
    ]
    return [*cases.values()]


def list_photographs(folder: Path, faults: list[str]) -> list[Case]:
    """Images without labels, for pre-training, anywhere below a folder."""
    files = [f for f in _prepare.plain_files(folder) if f.suffix.lower() in IMAGE_ENDINGS]
    cases = {f"photo_{file.stem}": Case(f"photo_{file.stem}", (file,)) for file in files}
    wrong = [case for case in cases if not _prepare.is_case_name(case)]
    if len(cases) < len(files) or wrong or not files:
        what = f"{len(files)} images of {len(cases)} names, {len(wrong)} of them with odd signs ({some(wrong)})"
        faults.append(f"{folder}: {what}, expected images of different plain names; rename them")
    return [*cases.values()]


def read_case(size: int, classes: int, case: Case, report: Report) -> Flat | None:
    """Image and class map of one case, resized; faults and notes go into the report."""
    image = _prepare.read_flat(report, read_image, case.images[0])
    labels = _prepare.read_flat(report, read_map, case.label) if case.label else None
    for path, array in ((case.images[0], image), (case.label, labels)):
        if array is not None and array.shape[-1] != array.shape[-2]:
            report.faults.append(
                f"{path}: {_prepare.size(array)} pixels, expected a square; get it again"
            )
    if labels is not None and case.label:
        labels, wrong = _prepare.clean_label(
            labels, {v: v for v in (*range(classes), IGNORE)}, case.label
        )
        report.faults += wrong
    if image is None or (case.label and labels is None) or report.faults:
        return None
    if len(image) == 1:
        report.notes.append(f"{case.images[0]}: a grey photograph, its three colours are the same")
    if labels is not None and labels.shape != image.shape[1:]:
        report.notes.append(
            f"{case.label}: {_prepare.size(labels)} pixels, the image has {_prepare.size(image)}"
        )
    colours = Image.fromarray(
        np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))
    )
    small = np.asarray(colours.resize((size, size), Image.Resampling.BILINEAR)).transpose(
        2, 0, 1
    )  # [3, Y, X]
    if labels is not None:
        labels = np.asarray(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))
    return Flat(small, labels)


def read_map(path: Path, blob: bytes) -> np.ndarray:
    """A class map [Y, X] of an .npy file. Raises: InputError."""
    try:
        labels = np.load(io.BytesIO(blob), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as e:
        text = " ".join(str(e).split())
        raise InputError(f"{path}: not a readable array of numbers ({text}); get it again") from e
    if (
        not isinstance(labels, np.ndarray)
        or labels.ndim != 2
        or labels.dtype.kind not in "uif"
        or not labels.size
    ):
        found = (
            f"{labels.dtype} {labels.shape}"
            if isinstance(labels, np.ndarray)
            else type(labels).__name__
        )
        raise InputError(f"{path}: {found}, expected a class map [Y, X] of integers; get it again")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise InputError(f"{path}: holds NaN or Inf, expected classes; get it again")
    return labels


# --- a tiny copy of the layout ---------------------------------------------------------------------------------------


def make_fake(root: Path, layout: str) -> None:
    """Write pictures of stripes with all classes, half of them as jpg; one map has 255 in it."""
    for part, count in PUBLISHED[layout].items():
        folder = root / layout / "real" / part
        folder.mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([number, part == "test"])
            side = 32 + 4 * (number % 2)
            labels = (np.add.outer(np.arange(side), 2 * np.arange(side)) // 3 + number) % CLASSES[
                layout
            ]
            if number == 1:
                labels[:5] = IGNORE
            image = 7 * labels[..., None] % 256 + rng.integers(0, 9, (side, side, 3))
            end = "jpg" if number % 2 else "png"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
                folder / f"{number:05d}.{end}"
            )
            np.save(folder / f"{number:05d}.npy", labels.astype(np.int64))
    (root / layout / "ddpm").mkdir()


def add_flags(parser: _prepare.Parser) -> None:
    parser.add_argument(
        "--size",
        type=_prepare.positive,
        default=256,
        metavar="N",
        help="pixels a side (default 256)",
    )
    parser.add_argument(
        "--photographs", type=Path, metavar="DIR", help="images without labels, for pre-training"
    )
    parser.add_argument(
        "--subset", action="store_true", help="accept other numbers of pairs than published"
    )


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit code."""
    return _prepare.main(
        argv, "ffhq34", __doc__ or "", read_source, make_fake, LAYOUTS, add_flags, flat=True
    )


if __name__ == "__main__":
    sys.exit(main())
