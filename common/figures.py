"""Draw what training and evaluation leave behind, with Pillow and numpy alone.

What takes a `path` writes one PNG there and returns the path. Sizes are pixels of a fine screen:
show a figure at half its size. Inside, a picture is uint8 [rows, columns, 3].
"""

import csv
import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

from common import atomic_write, metrics

File = str | Path
Names = Sequence[str]
Colour = tuple[int, ...]
Limits = tuple[float, float] | None  # low and high
Images = Sequence[np.ndarray]
Rows = Mapping[str, Images]
Curves = Mapping[str, Sequence]  # name -> (x, y) or (x, y, low, high)
Row = tuple[str, Images, Names, dict[str, Colour]]  # label, pictures, captions above, legend
# Okabe and Ito, "Color Universal Design" (2008): told apart with each form of colour blindness.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#f0e442")
SHADES = ((0.0, 0), (0.55, 255), (0.55, 0), (0.3, 255), (0.3, 0))  # share of white (255) or black
HEAT = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")  # low to high
GREY = ("#000000", "#ffffff")
WHITE, BLACK, RULE, MISSING = (255, 255, 255), (0, 0, 0), (225, 225, 225), (190, 190, 190)
LINE, GAP, CELL = 34, 12, 400  # height of a line of text, gaps, longest side of a picture
FONT = ImageFont.load_default(26)


def class_colours(count: int) -> list[Colour]:
    """Return the colours of the label values 1 to count; 35 of them differ."""
    base = np.array([ImageColor.getrgb(colour) for colour in PALETTE])
    mixed = [(1 - share) * base + share * shade for share, shade in SHADES]
    colours = np.rint(np.concatenate(mixed)).astype(int).tolist()
    return [tuple(colours[n % len(colours)]) for n in range(count)]


def radiological(axial: np.ndarray) -> np.ndarray:
    """Turn an RAS+ slice [X, Y] to rows and columns: patient's right on the left, front on top."""
    return axial[::-1, ::-1].T


def overlay(image: np.ndarray, mask: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """Return labels over an image, uint8 [H, W, 3]: a fill and a contour.

    image: [H, W] of any range, or uint8 [H, W, 3]; mask: integers [H, W], value v has the colour
    colours[v - 1], 0 stays bare. Raises IndexError for a value without a colour.
    """
    labels = Image.fromarray(mask.astype(np.uint8))
    reach = 3 if max(mask.shape) < 300 else 5  # a contour of one or two pixels
    lowest = labels.filter(ImageFilter.MinFilter(reach))
    highest = labels.filter(ImageFilter.MaxFilter(reach))
    contour = np.asarray(lowest) != np.asarray(highest)
    opacity = (np.where(contour, 1.0, 0.4) * (mask > 0))[..., None]  # [H, W, 1]
    paint = np.array([BLACK, *colours])[mask.astype(int)]  # [H, W, 3]
    return np.rint(_shade(image) * (1 - opacity) + paint * opacity).astype(np.uint8)


def _window(values: np.ndarray, low: float = 0, high: float = 100) -> tuple[float, float]:
    """Return two percentiles of the finite values, or limits around the one value that all have."""
    values = np.asarray(values, float)
    finite = values[np.abs(values) < 1e100]
    for percentiles in ((low, high), (0, 100)):
        bottom, top = np.percentile(finite, percentiles).tolist() if finite.size else (0.0, 1.0)
        if top > bottom:
            return bottom, top
    return bottom - abs(bottom) / 2, top + (abs(top) / 2 or 1.0)


def _shade(values: np.ndarray, limits: Limits = None, ramp: Names = GREY) -> np.ndarray:
    """Paint values [H, W] in a ramp of colours, NaN in grey; a colour picture [H, W, 3] stays."""
    if values.ndim == 3:
        return values
    low, high = limits or _window(values, 0.5, 99.5)
    position = np.clip((values.astype(float) - low) / (high - low), 0, 1) * (len(ramp) - 1)
    colours = np.array([ImageColor.getrgb(colour) for colour in ramp])  # [steps, 3]
    channels = [np.interp(position, range(len(ramp)), channel) for channel in colours.T]
    picture = np.where(np.isfinite(values)[..., None], np.stack(channels, axis=-1), MISSING)
    return np.rint(picture).astype(np.uint8)


def _resize(array: np.ndarray, height: float, width: float) -> np.ndarray:
    """Resize colours [H, W, 3], averaged where they shrink, or labels [H, W], the nearest."""
    method = Image.Resampling.BOX if array.ndim == 3 else Image.Resampling.NEAREST
    size = max(round(width), 1), max(round(height), 1)
    return np.asarray(Image.fromarray(array.astype(np.uint8)).resize(size, method))


def _wrap(text: str, width: float) -> str:
    """Break a text into at most three lines of about `width` pixels, without accents."""
    letters = unicodedata.normalize("NFKD", text.replace("×", "x"))  # Pillow's font knows ASCII
    plain = " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())
    count = int(len(plain) * width / (FONT.getlength(plain) or 1))
    return textwrap.fill(plain, max(count, 8), max_lines=3, placeholder=" …")


def _scale(limits: tuple[float, float], unit: str) -> dict[str, Colour]:
    """Return the colour bar of a heat map: its unit, then nine values with their colours."""
    values = np.linspace(limits[1], limits[0], 9)
    colours = _shade(values[None], limits, HEAT)[0].tolist()
    names = [f"{value:#.3g}" for value in values]
    return {unit: WHITE} | {name: tuple(colour) for name, colour in zip(names, colours)}


def _page(path: File, title: str, rows: Sequence[Row]) -> Path:
    """Write rows of pictures with their texts; the canvas is cut to what is drawn at the end."""
    sizes = [picture.shape for _, pictures, _, _ in rows for picture in pictures]
    height = max(size[0] for size in sizes)
    width = max(size[1] for size in sizes)
    left = 320
    right = left + max(len(pictures) for _, pictures, _, _ in rows) * (width + GAP) + GAP
    room = sum(height + 4 * LINE + 3 * LINE * len(legend) for _, _, _, legend in rows)
    canvas = Image.new("RGB", (right + 600, room + 6 * LINE), WHITE)
    draw = ImageDraw.Draw(canvas)
    heading = _wrap(title, max(right - left, 800) / 1.3)
    draw.multiline_text((left, 0), heading, BLACK, ImageFont.load_default(34))
    y = legend_y = 50 * len(heading.splitlines())
    for name, pictures, captions, legend in rows:
        above = [_wrap(caption, width) for caption in captions]
        y += LINE * max([len(text.splitlines()) for text in above], default=0)
        for n, picture in enumerate(pictures):
            x = left + n * (width + GAP) + width // 2
            corner = x - picture.shape[1] // 2, y + (height - picture.shape[0]) // 2
            canvas.paste(Image.fromarray(picture), corner)
            if n < len(above):
                draw.multiline_text((x, y - 4), above[n], BLACK, FONT, "md", align="center")
        label = _wrap(name, left - 2 * GAP)
        draw.multiline_text((left - GAP, y + height / 2), label, BLACK, FONT, "rm", align="right")
        legend_y = max(legend_y, y)
        for entry, colour in legend.items():
            text = _wrap(entry, 500)
            draw.rectangle((right, legend_y, right + 32, legend_y + LINE - 1), colour)
            draw.multiline_text((right + 44, legend_y), text, BLACK, FONT, spacing=8)
            legend_y += LINE * max(len(text.splitlines()), 1)
        y += height + GAP
    file = BytesIO()
    canvas = canvas.crop(ImageOps.invert(canvas).getbbox())
    ImageOps.expand(canvas, 2 * GAP, WHITE).save(file, "PNG")
    atomic_write(path, file.getvalue())
    return Path(path)


# --------------------------------------------------------------------------------- images and masks
def montage(
    rows: Rows, titles: Names, path: File, title: str = "", heat: str = "", limits: Limits = None
) -> Path:
    """Draw rows (name -> images [H, W] of any range, or uint8 colours [H, W, 3]) under titles.

    titles: one for each image, row by row, or those of the first row alone. Grey images have a
    window each; heat, the name of a quantity (variance), makes heat maps of one scale. limits
    (low, high) holds for all images: (-1, 1) shows how the noise shrinks in a sampler's steps.
    """
    legend = {}
    if heat:
        flat = [image.ravel() for images in rows.values() for image in images if image.ndim == 2]
        limits = limits or _window(np.concatenate([*flat, np.zeros(0)]))
        legend = _scale(limits, heat)
    page: list[Row] = []
    for name, images in rows.items():
        pictures = []
        for image in images:
            scale = min(CELL, 2800 // len(images)) / max(image.shape[:2])
            scale = math.floor(scale) if scale > 2 else scale  # all pixels of one size
            picture = _shade(image, limits, HEAT if heat else GREY)
            pictures.append(_resize(picture, image.shape[0] * scale, image.shape[1] * scale))
        page.append((name, pictures, titles[: len(images)], {} if page else legend))
        titles = titles[len(images) :]
    return _page(path, title, page)


def case(
    path: File,
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    spacing: Sequence[float],
    classes: Mapping[str, int],
    title: str = "",
    slices: int = 6,
) -> Path:
    """Draw slices of an image, and below them each mask over it, in true proportions.

    image: RAS+ [X, Y, Z], shown as axial slices in radiological view; or [H, W] or uint8 [H, W, 3]
    as it is stored. masks: name -> integer labels, or floats (probability, variance), which become
    heat maps. spacing: mm of each axis, three or two. classes: name -> value. The slices are spread
    over those with a label; where there is one, all pictures stand side by side.
    """
    volume = len(spacing) == 3
    size = [voxels * length for voxels, length in zip(image.shape, spacing)][:2]  # mm
    captions = [""]
    if volume:
        size.reverse()
        drawn = np.zeros(image.shape[2], bool)
        for mask in masks.values():
            drawn |= (mask > 0).any(axis=(0, 1)) & (mask.dtype.kind != "f")
        indices = np.flatnonzero(drawn | ~drawn.any())  # all slices where nothing is drawn
        middles = np.linspace(0, len(indices), 2 * slices + 1)[1::2].astype(int)
        chosen = indices[np.unique(middles)]
        captions = [f"slice {z}, {z * spacing[2]:.1f} mm" for z in chosen]
    height, width = (CELL * length / max(size) for length in size)
    colours = class_colours(255)
    rows: list[Row] = []
    grey: list[np.ndarray] = []
    for name, array in [("image", image), *masks.items()]:
        if array.shape[: len(spacing)] != image.shape[: len(spacing)]:
            raise ValueError(f"{name} is {array.shape}, the image {image.shape}")
        cuts = [radiological(array[:, :, z]) for z in chosen] if volume else [array]
        legend = {}
        if not rows:
            legend = {text: colours[value - 1] for text, value in classes.items() if value > 0}
            window = _window(image, 0.5, 99.5)
            grey = [_resize(_shade(cut, window), height, width) for cut in cuts]
            pictures = [_sides(picture) if volume else picture for picture in grey]
        elif array.dtype.kind == "f":
            legend = _scale(_window(array), name)
            pictures = [_resize(_shade(cut, _window(array), HEAT), height, width) for cut in cuts]
        else:
            labels = [_resize(cut, height, width) for cut in cuts]
            pictures = [overlay(below, label, colours) for below, label in zip(grey, labels)]
        rows.append((name, pictures, [] if rows else captions, legend))
    if len(grey) == 1:
        names = [name for name, _, _, _ in rows]
        legend = {text: colour for _, _, _, part in rows for text, colour in part.items()}
        rows = [("", [pictures[0] for _, pictures, _, _ in rows], names, legend)]
    return _page(path, title, rows)


def _sides(picture: np.ndarray) -> np.ndarray:
    """Mark the patient's right and left in the upper corners."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 4), "R", WHITE, FONT, stroke_width=3, stroke_fill=BLACK)
    draw.text((canvas.width - 8, 4), "L", WHITE, FONT, "ra", stroke_width=3, stroke_fill=BLACK)
    return np.asarray(canvas)


def heat_map(
    values: np.ndarray, rows: Names, columns: Names, path: File, title: str = "", unit: str = ""
) -> Path:
    """Draw a table of numbers [rows, columns] as coloured cells, NaN as a grey cell "not run"."""
    texts = [["not run" if np.isnan(v) else f"{v:.3f}" for v in row] for row in values]
    table = [["", *columns]] + [[name, *row] for name, row in zip(rows, texts)]
    colours = np.full((len(table), len(table[0]), 3), 255, np.uint8)
    colours[1:, 1:] = _shade(values, _window(values), HEAT)
    height, width = 100, 220  # of a cell
    canvas = Image.fromarray(_resize(colours, height * len(table), width * len(table[0])))
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(table):
        for c, text in enumerate(row):
            place = (c + 0.5) * width, (r + 0.5) * height
            ink = BLACK if colours[r, c].sum() > 330 else WHITE
            draw.multiline_text(place, _wrap(text, width), ink, FONT, "mm", align="center")
    return _page(path, title, [("", [np.asarray(canvas)], [], _scale(_window(values), unit))])


# ------------------------------------------------------------------------------------------- charts
def _ticks(low: float, high: float, log: bool) -> dict[float, str]:
    """Return round numbers, place on the axis -> text; a log axis has powers of 10 as places."""
    span = high - low
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1, math.ceil(span / 8))
        digits = (1, 2, 5) if span < 3 else (1,)
        numbers = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = {math.log10(number): f"{number:,g}" for number in numbers}
    else:
        exponent = math.floor(math.log10(span / 3))
        step = 10.0**exponent * max(n for n in (1, 2, 5) if n * 10.0**exponent <= span / 3)
        form = f",.{max(-exponent, 0)}f" if -6 < exponent < 5 else "g"
        count = range(math.ceil(low / step), math.floor(high / step) + 1)
        ticks = {n * step: format(n * step, form) for n in count}
    return {place: text for place, text in ticks.items() if low <= place <= high}


def _panel(
    curves: Curves, legend: Mapping[str, Colour], x_name: str, log_x: bool, log_y: bool
) -> np.ndarray:
    """Draw the axes of `lines` with their curves."""
    tables = []
    for curve in curves.values():
        x, y, *interval = np.array(curve, float)
        table = np.array([x, y, *(interval or (y, y))])  # [4, n]: x, y, low, high
        table[np.abs(table) > 1e100] = np.nan  # no room on an axis
        for numbers, log in zip(table, (log_x, log_y, log_y, log_y)):
            if log:
                numbers[:] = np.log10(np.where(numbers > 0, numbers, np.nan))
        table[2:] = np.where(np.isnan(table[2:]), table[1], table[2:])  # a point without interval
        tables.append(table[:, np.isfinite(table).all(axis=0)])
    every = np.concatenate([np.zeros((4, 0)), *tables], axis=1)
    x_limits, y_limits = _window(every[0]), _window(every[1:])
    x_ticks, y_ticks = _ticks(*x_limits, log_x), _ticks(*y_limits, log_y)
    places = np.unique(every[0])
    if len(places) < 9:  # few places: each is a tick
        numbers = 10**places if log_x else places
        x_ticks = {place: f"{number:,.5g}" for place, number in zip(places.tolist(), numbers)}

    # Everything is drawn twice as large and averaged at the end, which makes smooth lines.
    left, top, right, bottom = 230, 40, 2630, 1160
    below = _wrap(x_name, 1200)
    canvas = Image.new("RGB", (right + 40, bottom + 130 + 66 * len(below.splitlines())), WHITE)
    draw = ImageDraw.Draw(canvas, "RGBA")  # colours may have an opacity
    font = ImageFont.load_default(52)
    x_pixels, y_pixels = (left + 70, right - 70), (bottom - 50, top + 50)
    for place, text in y_ticks.items():
        y = np.interp(place, y_limits, y_pixels)
        draw.line((left, y, right, y), RULE, 4)
        draw.text((left - 20, y), text, BLACK, font, "rm")
    end = 0.0
    for place, text in x_ticks.items():
        x = np.interp(place, x_limits, x_pixels)
        half = font.getlength(text) / 2
        if x - half > end:  # else it would touch the number before
            draw.line((x, bottom, x, bottom + 16), BLACK, 4)
            draw.text((x, bottom + 28), text, BLACK, font, "ma")
            end = x + half + 20
    middle = (left + right) / 2
    draw.multiline_text((middle, bottom + 110), below, BLACK, font, "ma", align="center")
    for table, colour in reversed(list(zip(tables, legend.values()))):  # the first one on top
        pixels = np.interp(table, y_limits, y_pixels)
        pixels[0] = np.interp(table[0], x_limits, x_pixels)
        groups = np.unique(pixels[0], return_inverse=True)[1]
        means = np.array([np.bincount(groups, row) / np.bincount(groups) for row in pixels])
        if means.shape[1] > 1:
            line, low, high = (list(zip(means[0], row)) for row in means[1:])
            draw.polygon(low + high[::-1], (*colour, 50))
            draw.line(line, colour, 8, "curve")
        if pixels.shape[1] <= 30:
            for x, y, low, high in pixels.T.tolist():
                draw.line((x, low, x, high), colour, 4)
                draw.ellipse((x - 16, y - 16, x + 16, y + 16), colour)
    if not every.size:
        draw.text((middle, bottom / 2), "no finite values yet", BLACK, font, "mm")
    draw.rectangle((left, top, right, bottom), outline=BLACK, width=4)
    return np.asarray(canvas.reduce(2))


def lines(
    path: File, panels: Mapping[str, Curves], title: str = "", x_name: str = "", log: Names = ()
) -> Path:
    """Draw panels (name of the y axis -> curves) below each other; log names logarithmic axes.

    A curve is name -> (x, y), or (x, y, low, high) with an interval. It runs through the mean y of
    each x, so that repeats (seeds) are dots around it. Up to 30 values of a curve are dots. What is
    not finite, or has no logarithm, is left out.
    """
    colours = [BLACK, *[colour for colour in class_colours(35) if sum(colour) < 520]]  # on white
    page: list[Row] = []
    for y_name, curves in panels.items():
        legend = {name: colours[n % len(colours)] for n, name in enumerate(curves)}
        panel = _panel(curves, legend, x_name, x_name in log, y_name in log)
        page.append((y_name, [panel], [], legend))
    return _page(path, title, page)


def loss_curve(log_csv: File, path: File, title: str = "") -> Path:
    """Draw a run's log.csv: loss, loss by quartile of t, and below them each kind of val_ column.

    More than 60 rows become 60 means; the band of the loss holds 80 % of the rows.
    """
    with open(log_csv, newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    panels: dict[str, dict[str, list[np.ndarray]]] = {"loss": {}}
    for column in log[0] if log else ():
        kind, _, name = column.removeprefix("val_").partition("_")
        if column.startswith("val_"):
            kind = f"validation {kind}".replace("dice", "Dice")
        elif column.startswith("loss_q"):
            name = f"t in quartile {name[1:]}"
        elif column != "loss":
            continue
        rows = np.array([[float(row["step"] or "nan"), float(row[column] or "nan")] for row in log])
        rows = rows[np.isfinite(rows).all(axis=1)]  # [n, 2]
        if len(rows):
            parts = np.array_split(rows, min(len(rows), 60))
            low, high = np.transpose([np.percentile(part[:, 1], (10, 90)) for part in parts])
            x, y = np.transpose([part.mean(axis=0) for part in parts])
            panels.setdefault(kind, {})[name or "mean"] = [x, y] if name else [x, y, low, high]
    wide = []  # panels over more than a factor of ten
    for kind, curves in panels.items():
        means = np.array([y for curve in curves.values() for y in curve[1]])
        if means.size and 0 < 10 * means.min() < means.max():
            wide.append(kind)
    return lines(path, panels, title, "optimisation step", wide)


# ------------------------------------------------------------------------------------- one case
class Trace:
    """Watches a sampler: keeps one axial slice of x_t and of x_0 at each step.

    It is the slice where the last class of the truth [X, Y, Z] is largest. inside: where the
    volume lies in the padded one.
    """

    def __init__(self, truth: np.ndarray, inside: Sequence[slice]):
        self.z = int((truth == truth.max()).sum(axis=(0, 1)).argmax())
        self.cut = (0, -1, inside[0], inside[1], inside[2].start + self.z)
        self.frames: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __call__(self, t: int, xt: Any, x0: Any) -> None:
        """xt, x0: tensors [1, K, *S]; of half-size volumes there is nothing to show."""
        if all(part.stop <= n for part, n in zip(self.cut[2:4], xt.shape[2:4])):
            pair = [radiological(v[self.cut].float().cpu().numpy()) for v in (xt, x0)]
            self.frames.append((t, pair[0], pair[1]))


def case_sheet(
    folder: Path,
    data: Any,
    name: str,
    mask: np.ndarray,
    members: Sequence[np.ndarray],
    maps: Mapping[str, np.ndarray],
    frames: Sequence[tuple[int, np.ndarray, np.ndarray]],
) -> None:
    """Draw three pictures of a case: its mask, the way from noise to mask, and the ensemble.

    data: prepared; members: masks [X, Y, Z]; maps: name -> [X, Y, Z]; frames: of a Trace.
    """
    image = np.asarray(data.image(name))[0].astype(np.float32)
    truth = np.asarray(data.label(name))
    spacing = data.spacing(name)
    scores = [metrics.dice(mask == v, truth == v) for v in data.classes.values()]
    title = f"{name}, Dice {np.mean([s for s in scores if s == s] or [np.nan]):.3f}"
    masks = {"truth": truth, "prediction": mask}
    case(folder / f"{name}.png", image, masks, spacing, data.classes, title)
    if frames:
        chosen = [frames[i] for i in sorted({round(i) for i in np.linspace(0, len(frames) - 1, 6)})]
        rows = {"x_t": [f[1] for f in chosen], "predicted x_0": [f[2] for f in chosen]}
        titles = [f"t = {f[0]}" for f in chosen]
        montage(rows, titles, folder / f"{name}_steps.png", name, limits=(-1, 1))
    if len(members) > 1:
        z = int((truth == truth.max()).sum(axis=(0, 1)).argmax())
        cut = np.s_[:, :, z : z + 1]
        panels = {"truth": truth[cut]}
        panels |= {f"member {n + 1}": member[cut] for n, member in enumerate(members[:3])}
        panels["mask of the mean"] = mask[cut]
        for key in list(maps)[-2:]:  # the mean of the last class, and the variance
            panels[key.replace("_", " ")] = maps[key][cut]
        path = folder / f"{name}_ensemble.png"
        case(path, image[cut], panels, spacing, data.classes, name, slices=1)
