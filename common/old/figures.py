"""Pictures that training and evaluation leave behind: loss curve, slices with masks, heat map, denoising strip.

Drawn with Pillow and numpy alone, so that a run on a bare machine needs no plotting library. What takes a `path` writes
one PNG there (through a temporary file and a rename: a reader never sees half a picture) and returns the path.

Axes. `mask_slices` takes RAS+ arrays [X, Y, Z] (index rises towards the patient's right, front and head) and turns them
with `radiological`. All others show a 2D array as it is stored, [rows, columns] with row 0 on top.
"""

from __future__ import annotations

import csv
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
# Okabe and Ito, "Color Universal Design" (2008): told apart with each common form of colour blindness. Their black is
# left out (invisible on a scan), and the pairs that are nearest to each other stand far apart in the list.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (213, 94, 0),
    (0, 114, 178),
    (204, 121, 167),
    (240, 228, 66),
)
HEAT = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
)  # dark = low, light = high
WHITE, BLACK, RULE, MISSING = (255, 255, 255), (0, 0, 0), (222, 222, 222), (190, 190, 190)
TEXT, TITLE, LINE, GAP, MARGIN = (
    14,
    18,
    18,
    8,
    16,
)  # pixels: letters, title letters, line of text, gaps, white border


# ---------------------------------------------------------------------------------------------------- colours, slices
def class_colours(count: int) -> list[Colour]:
    """Colours of the label values 1..count; after the seven of PALETTE light and dark variants, 35 different in all."""
    colours = []
    for i in range(count):
        share, towards = ((0.0, 0), (0.55, 255), (0.55, 0), (0.3, 255), (0.3, 0))[
            i // len(PALETTE) % 5
        ]
        r, g, b = (round((1 - share) * c + share * towards) for c in PALETTE[i % len(PALETTE)])
        colours.append((r, g, b))
    return colours


def radiological(axial: np.ndarray) -> np.ndarray:
    """RAS+ slice [X, Y] to picture [rows, columns]: patient's right on the left side, front of the body on top."""
    return axial[::-1, ::-1].T


def overlay(
    image2d: np.ndarray, mask2d: np.ndarray, colours: Sequence[Colour], alpha: float = 0.45
) -> np.ndarray:
    """Labels over an image: fill of opacity `alpha`, and the outermost pixels of each region in the full colour.

    image2d uint8 [H, W] or [H, W, 3]; mask2d integer [H, W], value v has colours[v - 1], values below 1 stay bare.
    Returns uint8 [H, W, 3]. ValueError for other shapes, and for a value without a colour.
    """
    if image2d.dtype != np.uint8 or image2d.shape[:2] != mask2d.shape:
        raise ValueError(
            f"overlay: image {image2d.dtype} {image2d.shape} with mask {mask2d.shape}; expected uint8 and"
            " a mask of the same height and width"
        )
    if mask2d.size and int(mask2d.max()) > len(colours):
        raise ValueError(
            f"overlay: label {mask2d.max()}, but {len(colours)} colours; give one for each value from 1"
        )
    picture = (image2d if image2d.ndim == 3 else np.repeat(image2d[..., None], 3, axis=2)).astype(
        np.float64
    )
    around = np.pad(
        mask2d, 1, mode="edge"
    )  # the picture's border cuts a region, but is not its contour
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    contour = np.any([n != mask2d for n in neighbours], axis=0)  # [H, W]
    painted = np.clip(mask2d.astype(np.int64), 0, None)  # [H, W]
    opacity = np.where(painted > 0, np.where(contour, 1.0, alpha), 0.0)[..., None]  # [H, W, 1]
    table = np.array([BLACK, *colours], dtype=np.float64)
    return np.rint((1 - opacity) * picture + opacity * table[painted]).astype(np.uint8)


def _limits(
    values: np.ndarray, percentiles: tuple[float, float] = (0.0, 100.0)
) -> tuple[float, float]:
    """Low and high percentile of the finite values, or the least and greatest where these are equal.

    Values that are all equal have half of them on either side, zeros and no finite value at all (0, 1): black.
    """
    finite = values[np.isfinite(values)]
    for pair in (percentiles, (0.0, 100.0)):
        low, high = (float(v) for v in np.percentile(finite, pair)) if finite.size else (0.0, 1.0)
        if high > low:
            return low, high
    return low - abs(low) / 2, high + (abs(high) / 2 or 1.0)


def _grey(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Values [...] to uint8 [..., 3]: limits[0] and below is black, limits[1] and above white; NaN is black."""
    position = np.clip(
        (np.nan_to_num(values, nan=limits[0]) - limits[0]) / (limits[1] - limits[0]), 0, 1
    )
    return np.repeat(np.rint(255 * position).astype(np.uint8)[..., None], 3, axis=-1)


def _heat(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Values [...] to uint8 [..., 3] of the map HEAT between the limits; what is not finite is grey."""
    filled = np.where(np.isfinite(values), values, limits[0])
    position = np.clip((filled - limits[0]) / (limits[1] - limits[0]), 0, 1)
    colour = np.stack(
        [np.interp(position, np.linspace(0, 1, len(HEAT)), HEAT[:, k]) for k in range(3)], axis=-1
    )
    return np.where(np.isfinite(values)[..., None], np.rint(colour), MISSING).astype(np.uint8)


def _resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] or [H, W, 3] to the new size; pixels stay visible, labels keep their values."""
    if array.ndim == 3:
        # BOX repeats pixels where it enlarges and averages where it shrinks; a bicubic edge would look like anatomy.
        return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BOX))
    rows, columns = (
        (np.arange(n) * 2 + 1) * old // (2 * n) for n, old in zip((height, width), array.shape)
    )
    return array[rows[:, None], columns]


def _size(shape: Sequence[int], longest: int) -> tuple[int, int]:
    """Height and width in pixels, the longer one near `longest`; small arrays are enlarged by a whole number."""
    height, width = shape[:2]
    scale = longest / max(height, width)
    scale = math.floor(scale) if scale >= 2 else scale
    return max(1, round(height * scale)), max(1, round(width * scale))


# --------------------------------------------------------------------------------------------------- text and layout
@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int = TEXT) -> int:
    return math.ceil(_font(size).getlength(text))


def _wrap(text: str, size: int, width: int, most: int = 2) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces; what does not fit into `most` lines ends in an ellipsis."""
    # Pillow's own font lacks accents, Greek and most signs: accents are dropped, others get their nearest plain form.
    text = unicodedata.normalize(
        "NFD", text.translate({0x2212: "-", 0x2013: "-", 0xD7: "x", 0x2192: "->"})
    )
    text = "".join(
        c if c.isascii() or c in "±·…" else "?" for c in text if not unicodedata.combining(c)
    )
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and _width(f"{line} {word}", size) > width and len(lines) < most - 1:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        lines += [line] if line else []
    for i, line in enumerate(lines):
        while len(line) > 1 and _width(line, size) > width:
            line = line.removesuffix("…")[:-1] + "…"
        lines[i] = line
    return lines[:most]


def _write(
    canvas: Image.Image,
    xy: tuple[float, float],
    lines: list[str],
    size: int = TEXT,
    anchor: str = "ma",
    fill: Colour = BLACK,
) -> None:
    """Draws lines of text below each other; the anchor (Pillow's two letters) holds for the first."""
    for i, line in enumerate(lines):
        ImageDraw.Draw(canvas).text(
            (xy[0], xy[1] + i * (size + 4)), line, fill, _font(size), anchor
        )


def _legend(entries: Sequence[tuple[str, Colour]], room: int = 240) -> Image.Image:
    """A white strip with a patch of colour and a name a line."""
    names = [(_wrap(name, TEXT, room, 1) or [""])[0] for name, _ in entries]
    strip = Image.new(
        "RGB", (24 + max(map(_width, names), default=0), (LINE + 4) * max(len(names), 1)), WHITE
    )
    for i, (name, (_, colour)) in enumerate(zip(names, entries)):
        y = i * (LINE + 4)
        ImageDraw.Draw(strip).rectangle(
            (0, y + 3, 14, y + 15), colour, BLACK if min(colour) > 150 else None
        )
        _write(strip, (22, y + 9), [name], anchor="lm")
    return strip


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high, about `count` of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count * 1.4 >= high - low)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def _colour_bar(limits: tuple[float, float], height: int, unit: str) -> Image.Image:
    """The map HEAT with its numbers, low at the bottom; the unit above."""
    height, names = max(height, 100), _wrap(unit, TEXT, 110)
    top = len(names) * LINE + GAP
    ticks = [(t, _number(t)) for t in _ticks(*limits)]
    widest = max([28 + _width(n) for _, n in ticks] + [_width(n) for n in names])
    strip = Image.new("RGB", (widest, top + height), WHITE)
    _write(strip, (0, 0), names, anchor="la")
    ramp = _heat(np.linspace(limits[1], limits[0], height - GAP)[:, None], limits)  # [height, 1, 3]
    strip.paste(Image.fromarray(np.repeat(ramp, 18, axis=1)), (0, top))
    for value, name in ticks:
        y = top + round((limits[1] - value) / (limits[1] - limits[0]) * (height - GAP - 1))
        ImageDraw.Draw(strip).line((18, y, 22, y), BLACK)
        _write(strip, (26, y), [name], anchor="lm")
    return strip


def _grid(
    cells: Sequence[Sequence[np.ndarray]],
    captions: Sequence[Sequence[str]],
    row_titles: Sequence[str],
    title: str,
    side: Image.Image | None = None,
    note: str = "",
    gap: int = GAP,
) -> Image.Image:
    """Pictures uint8 [h, w, 3] in rows, `gap` pixels apart, row titles on the left, a legend or colour bar right.

    captions[r] stand above the pictures of row r (may be empty); the note stands in small letters below the title.
    """
    height, width = (max(cell.shape[k] for row in cells for cell in row) for k in (0, 1))
    width = max(width, 72)  # a narrow picture still needs a readable caption
    beside = [_wrap(t, TEXT, 160, 3) for t in row_titles]
    above = [[_wrap(c, TEXT, width, 3) for c in row] for row in captions]
    left = MARGIN + max((_width(line) + GAP for lines in beside for line in lines), default=0)
    right = left + max(map(len, cells)) * (width + gap) - gap
    total = max(right + (side.width + 2 * GAP if side else 0) + MARGIN, 320)
    heading, small = _wrap(title, TITLE, total - 2 * MARGIN), _wrap(note, TEXT, total - 2 * MARGIN)
    y = MARGIN + len(heading) * (TITLE + 4)
    note_top, y = y, y + len(small) * LINE + (GAP if heading or small else 0)
    tops = []
    for lines in above:
        tops.append(y + LINE * max(map(len, lines), default=0))
        y = tops[-1] + height + gap
    canvas = Image.new(
        "RGB", (total, max(y - gap, tops[0] + (side.height if side else 0)) + MARGIN), WHITE
    )
    _write(canvas, (MARGIN, MARGIN), heading, TITLE, "la")
    _write(canvas, (MARGIN, note_top), small, anchor="la")
    for row, lines, names, top in zip(cells, above, beside, tops):
        _write(canvas, (left - GAP, top + (height - LINE * len(names)) / 2 + 2), names, anchor="ra")
        for c, cell in enumerate(row):
            x, (h, w) = left + c * (width + gap), cell.shape[:2]
            canvas.paste(Image.fromarray(cell), (x + (width - w) // 2, top + (height - h) // 2))
            if lines:
                _write(canvas, (x + width / 2, top - LINE * len(lines[c])), lines[c])
    if side:
        canvas.paste(side, (right + 2 * GAP, tops[0]))
    return canvas


def _save(canvas: Image.Image, path: str | Path) -> Path:
    """Writes the PNG beside its place and renames it; after a failure the old file is still whole. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            canvas.save(file, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return path


# --------------------------------------------------------------------------------------------------------- loss curve
@dataclass(frozen=True)
class _Curve:
    """One line of a panel: x, y float [n] of any order, NaN where there is no value; width in pixels, 0: dots only."""

    name: str
    colour: Colour
    x: np.ndarray
    y: np.ndarray
    width: int = 2
    dots: bool = False


def _read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of log.csv as float64 [rows], NaN for an empty cell. ValueError names the file, line and column."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows or "step" not in rows[0]:
        raise ValueError(
            f"{path}: no column 'step' in the first line; expected the log.csv of a run"
        )
    header, rows = rows[0], rows[1:]
    if rows and len(rows[-1]) < len(header):
        rows.pop()  # the line that a running training is writing just now
    table = np.full((len(rows), len(header)), np.nan)
    for r, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {r + 2}: {len(row)} cells, expected {len(header)} as in the first line"
            )
        for c, cell in enumerate(row):
            try:
                table[r, c] = float(cell) if cell.strip() else np.nan
            except ValueError:
                raise ValueError(
                    f"{path}, line {r + 2}, column '{header[c]}': '{cell}' is not a number"
                ) from None
    return {name: table[:, c] for c, name in enumerate(header)}


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean of the finite values over a fiftieth of them, sorted by x; (x, y) [m], m the finite values."""
    use = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[use], kind="stable")
    x, y = x[use][order], y[use][order]
    if len(x) < 100:
        return x, y
    window = np.ones(len(x) // 50)
    return x, np.convolve(y, window, "same") / np.convolve(
        np.ones(len(y)), window, "same"
    )  # fewer values at the ends


def _panel(
    canvas: Image.Image,
    box: tuple[int, int, int, int],
    curves: list[_Curve],
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
    log: bool,
    x_names: Mapping[float, str] | None = None,
) -> None:
    """Axes with ticks and curves inside the box (left, top, right, bottom); what leaves the limits is cut off.

    log: y is logarithmic; x_names: place on the x axis -> text of its tick, instead of whole numbers.
    """
    left, top, right, bottom = box
    width, height, fine = (
        right - left,
        bottom - top,
        3,
    )  # drawn three times as large, then averaged: smooth lines
    scale = np.log10 if log else np.asarray
    low, high = (float(scale(v)) for v in y_limits)

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data to pixels from the box's corner."""
        return (x - x_limits[0]) / (x_limits[1] - x_limits[0]) * width, (high - scale(y)) / (
            high - low
        ) * height

    decades = [10.0**k for k in range(math.floor(low), math.ceil(high) + 1)] if log else []
    y_ticks = [m * d for d in decades for m in ((1,) if high - low > 3 else (1, 2, 5))] or _ticks(
        *y_limits
    )
    y_ticks = [t for t in y_ticks if y_limits[0] * (1 - 1e-9) <= t <= y_limits[1] * (1 + 1e-9)]
    whole = {
        t: _number(t) for t in _ticks(*x_limits, 4) if abs(t - round(t)) < 1e-6
    }  # there is no half step
    layer = Image.new("RGB", (width * fine, height * fine), WHITE)
    draw = ImageDraw.Draw(layer)
    for tick in y_ticks:
        y = float(place(np.zeros(1), np.array([tick]))[1][0])
        draw.line((0, y * fine, width * fine, y * fine), RULE, fine)
        _write(canvas, (left - 8, top + y), [_number(tick)], anchor="rm")
    for tick, name in (x_names or whole).items():
        x = float(place(np.array([tick]), np.ones(1))[0][0])
        ImageDraw.Draw(canvas).line((left + x, bottom, left + x, bottom + 5), BLACK)
        _write(canvas, (left + x, bottom + 8), [name])
    for curve in curves:
        use = np.isfinite(curve.x) & np.isfinite(curve.y) & ((curve.y > 0) | (not log))
        points = np.stack(place(curve.x[use], curve.y[use]), axis=1) * fine  # [m, 2]
        if len(points) and curve.width:
            draw.line(
                [(float(x), float(y)) for x, y in points], curve.colour, curve.width * fine, "curve"
            )
        for x, y in points if curve.dots or len(points) == 1 else ():
            draw.ellipse((x - 4 * fine, y - 4 * fine, x + 4 * fine, y + 4 * fine), curve.colour)
    canvas.paste(layer.resize((width, height), Image.Resampling.BOX), (left, top))
    ImageDraw.Draw(canvas).rectangle((left, top, right, bottom), outline=BLACK)


def loss_curve(log_csv: str | Path, path: str | Path, title: str = "") -> Path:
    """Draws a run's log: losses (smoothed, and by quartile of t) against the step, and below them the validation Dice.

    log_csv: the run's log.csv; only the column `step` must be there, cells may be empty. `loss`, `loss_q1` to `loss_q4`
    and `val_loss...` go to the upper panel (logarithmic where it spans more than a decade), `val_dice...` to the lower.
    Values that are not finite are left out. Returns the path. Raises ValueError that names a malformed file and line.
    """
    log = _read_log(Path(log_csv))
    step = log["step"]
    raw = log.get("loss", np.full(len(step), np.nan))
    losses = [_Curve("loss", BLACK, *_smooth(step, raw), width=3)]
    for q, colour in zip("1234", (PALETTE[1], PALETTE[2], PALETTE[0], PALETTE[3])):
        if f"loss_q{q}" in log:  # quartiles of t: q1 holds the least noise
            losses.append(_Curve(f"t in quartile {q}", colour, *_smooth(step, log[f"loss_q{q}"])))
    losses += [
        _Curve(n.replace("_", " "), PALETTE[5], *_smooth(step, log[n]), dots=True)
        for n in log
        if n.startswith("val_loss")
    ]
    names = [n for n in log if n.startswith("val_dice")]
    dice = [
        _Curve(n.replace("val_", "", 1).replace("_", " "), c, *_smooth(step, log[n]), dots=True)
        for n, c in zip(names, class_colours(len(names)))
    ]
    losses, dice = ([c for c in group if np.isfinite(c.y).any()] for group in (losses, dice))

    # The smoothed lines set the range; of the raw values the wildest two percent may leave the panel.
    spread = np.array(_limits(raw, (1, 99))) if np.isfinite(raw).any() else np.empty(0)
    y_limits = _limits(np.concatenate([spread, *(c.y for c in losses)]))
    logarithmic = 0 < y_limits[0] * 10 < y_limits[1]
    pad = (y_limits[1] / y_limits[0]) ** 0.04 if logarithmic else (y_limits[1] - y_limits[0]) * 0.04
    y_limits = (
        (y_limits[0] / pad, y_limits[1] * pad)
        if logarithmic
        else (y_limits[0] - pad, y_limits[1] + pad)
    )
    scatter = _Curve("loss, each row", MISSING, step, raw, width=1)
    panels = [
        ([scatter, *reversed(losses)] if losses else [], losses, y_limits, logarithmic, "loss")
    ]
    if dice:
        low, high = _limits(np.concatenate([c.y for c in dice]))
        panels.append(
            (
                dice,
                dice,
                (math.floor(low * 10 - 0.2) / 10, math.ceil(high * 10 + 0.2) / 10),
                False,
                "validation Dice (0 to 1)",
            )
        )

    keys = [_legend([(c.name, c.colour) for c in shown]) for _, shown, *_ in panels]
    left, width = MARGIN + 70, 620
    heights = [max(260, key.height) for key in keys]
    total = left + width + 2 * GAP + max(max(key.width for key in keys), 60) + MARGIN
    heading = _wrap(title, TITLE, total - 2 * MARGIN)
    y = MARGIN + len(heading) * (TITLE + 4) + (GAP if heading else 0)
    first, last = _limits(step)
    x_limits = (
        first - 0.02 * (last - first),
        last + 0.02 * (last - first),
    )  # room for the outermost points
    canvas = Image.new(
        "RGB", (total, y + sum(heights) + len(panels) * (4 * LINE + GAP) + MARGIN - GAP), WHITE
    )
    _write(canvas, (MARGIN, MARGIN), heading, TITLE, "la")
    for (curves, _, limits, is_log, name), key, height in zip(panels, keys, heights):
        box = (left, y + LINE + GAP, left + width, y + LINE + GAP + height)
        _write(canvas, (left, y), [name + (" (logarithmic)" if is_log else "")], anchor="la")
        _panel(canvas, box, curves, x_limits, limits, is_log)
        if not curves:
            _write(
                canvas,
                (left + width / 2, box[1] + height / 2),
                ["no finite values yet"],
                anchor="mm",
            )
        _write(canvas, (left + width / 2, box[3] + LINE + 10), ["optimisation step"])
        canvas.paste(key, (box[2] + 2 * GAP, box[1]))
        y = box[3] + 3 * LINE
    return _save(canvas, path)


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    title: str = "",
    x_name: str = "",
    y_name: str = "",
    dots: bool = False,
) -> Path:
    """Lines name -> (x, y) in one panel with linear axes from the least to the greatest value; returns the path.

    x has ticks at whole numbers only; values that are not finite are left out. Raises ValueError where no line has a
    finite point.
    """
    colours = class_colours(len(lines))
    drawn = [
        _Curve(n, c, np.asarray(x, float), np.asarray(y, float), dots=dots)
        for (n, (x, y)), c in zip(lines.items(), colours)
    ]
    if not any((np.isfinite(c.x) & np.isfinite(c.y)).any() for c in drawn):
        raise ValueError(
            f"curves: {len(lines)} lines without a finite point; expected at least one point"
        )
    return _chart(drawn, path, title, x_name, y_name)


def scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    title: str = "",
    x_name: str = "",
    y_name: str = "",
) -> Path:
    """Dots name -> (x, y), x above 0, and a line through the mean y of each x; x is logarithmic, with ticks at these x.

    Values that are not finite are left out. Returns the path. Raises ValueError where no point is left or x is not
    above 0.
    """
    arrays = {name: np.array([x, y], float) for name, (x, y) in points.items()}  # [2, n]
    arrays = {name: a[:, np.isfinite(a).all(axis=0)] for name, a in arrays.items()}
    x_all = np.concatenate([np.empty(0), *(x for x, _ in arrays.values())])
    if not (len(x_all) and x_all.min() > 0):
        raise ValueError(
            f"scatter: {len(x_all)} finite points; expected one or more, each with x above 0"
        )
    lines, dots = [], []
    for (name, (x, y)), colour in zip(arrays.items(), class_colours(len(arrays))):
        places = np.unique(x)
        if len(places) > 1:  # the mean of one place would look like one more point
            lines.append(
                _Curve(
                    name,
                    colour,
                    np.log10(places),
                    np.array([y[x == place].mean() for place in places]),
                )
            )
        dots.append(_Curve(name, colour, np.log10(x), y, width=0, dots=True))
    ticks = {math.log10(place): _number(place) for place in np.unique(x_all)}
    return _chart([*lines, *dots], path, title, x_name, y_name, ticks)


def _chart(
    drawn: list[_Curve],
    path: str | Path,
    title: str,
    x_name: str,
    y_name: str,
    x_names: Mapping[float, str] | None = None,
) -> Path:
    """One panel with a legend, a line of it for each name, from the least to the greatest value of all curves."""
    limits = [_limits(np.concatenate([getattr(c, axis) for c in drawn])) for axis in ("x", "y")]
    x_limits, y_limits = (
        (low - 0.04 * (high - low), high + 0.04 * (high - low)) for low, high in limits
    )
    key, heading = _legend([*{c.name: c.colour for c in drawn}.items()]), [title] * bool(title)
    left, top, width, height = (
        MARGIN + 70,
        MARGIN + (TITLE + 4 + GAP) * bool(title) + LINE + GAP,
        620,
        300,
    )
    height, below = max(height, key.height), _wrap(x_name, TEXT, width, most=4)
    size = (
        left + width + 2 * GAP + key.width + MARGIN,
        top + height + (1 + len(below)) * LINE + 10 + MARGIN,
    )
    canvas = Image.new("RGB", size, WHITE)
    _write(canvas, (MARGIN, MARGIN), heading, TITLE, "la")
    _write(canvas, (left, top - LINE - GAP // 2), [y_name], anchor="la")
    _panel(
        canvas, (left, top, left + width, top + height), drawn, x_limits, y_limits, False, x_names
    )
    _write(canvas, (left + width / 2, top + height + LINE + 10), below)
    canvas.paste(key, (left + width + 2 * GAP, top))
    return _save(canvas, path)


# ----------------------------------------------------------------------------------------------------- masks, pictures
def _choose_slices(foreground: np.ndarray, count: int) -> list[int]:
    """At most `count` indices, evenly spread over the slices with foreground (bool [Z]), or over all."""
    candidates = np.flatnonzero(foreground) if foreground.any() else np.arange(len(foreground))
    count = min(count, len(candidates))
    return [int(candidates[int((i + 0.5) * len(candidates) / count)]) for i in range(count)]


def _check_masks(
    image: np.ndarray, masks: Mapping[str, np.ndarray], spacing: Sequence[float]
) -> None:
    """Raises ValueError that lists everything that does not fit together."""
    faults = [
        f"mask '{name}' is {m.dtype} {m.shape}, expected integers or booleans {image.shape}"
        for name, m in masks.items()
        if m.shape != image.shape or m.dtype.kind not in "iub"
    ]
    if image.ndim not in (2, 3) or image.size == 0:
        faults.append(f"image is {image.shape}, expected [X, Y, Z] or [X, Y]")
    if len(spacing) != image.ndim or not all(s > 0 for s in spacing):
        faults.append(f"spacing is {tuple(spacing)}, expected {image.ndim} lengths above 0 in mm")
    if faults:
        raise ValueError("mask_slices: " + "; ".join(faults))


def mask_slices(
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    path: str | Path,
    spacing: Sequence[float],
    class_names: Sequence[str] | Mapping[str, int],
    title: str = "",
    n_slices: int = 6,
) -> Path:
    """Axial slices: the image, and below it the image under each mask, in true proportions and radiological view.

    image [X, Y, Z] or [X, Y], RAS+, any range (shown from percentile 0.5 to 99.5 of the volume); masks: row title ->
    integer labels of the same shape; spacing in mm, one for each axis; class_names: names of the values 1, 2, ..., or
    name -> value. Slices are taken where any mask has foreground, from the feet upwards; their index counts from 0 and
    their height in mm from slice 0. Returns the path. Raises ValueError where shapes, types or spacing do not fit.
    """
    _check_masks(image, masks, spacing)
    flat = image.ndim == 2
    image = np.asarray(image, dtype=np.float32)
    labels = {name: m.astype(np.int64) for name, m in masks.items()}
    values = (
        dict(class_names)
        if isinstance(class_names, Mapping)
        else {n: i + 1 for i, n in enumerate(class_names)}
    )
    found = {int(v) for m in labels.values() for v in np.unique(m)}
    values |= {
        f"label {v}": v for v in sorted(found - set(values.values()))
    }  # shown all the same: an error to be seen
    colours = class_colours(max([0, *values.values()]))
    entries = [
        (name, colours[v - 1])
        for name, v in sorted(values.items(), key=lambda item: item[1])
        if v > 0
    ]

    if flat:
        image, labels = image[..., None], {name: m[..., None] for name, m in labels.items()}
    limits = _limits(image, (0.5, 99.5))
    foreground = (
        np.any([(m > 0).any(axis=(0, 1)) for m in labels.values()], axis=0)
        if labels
        else np.zeros(1, bool)
    )
    chosen = _choose_slices(foreground if labels else np.zeros(image.shape[2], bool), n_slices)
    longest = 360 if flat else 200
    per_mm = longest / max(image.shape[0] * spacing[0], image.shape[1] * spacing[1])
    width, height = (max(1, round(n * s * per_mm)) for n, s in zip(image.shape[:2], spacing))

    rows: list[list[np.ndarray]] = [[] for _ in range(1 + len(labels))]
    for z in chosen:
        grey = _resize(
            _grey(radiological(image[:, :, z]), limits), height, width
        )  # [height, width, 3]
        for row, mask in zip(rows[1:], labels.values()):
            row.append(overlay(grey, _resize(radiological(mask[:, :, z]), height, width), colours))
        marked = Image.fromarray(grey)
        for letter, x, anchor in (("R", 4, "la"), ("L", width - 4, "ra")):
            ImageDraw.Draw(marked).text(
                (x, 3), letter, WHITE, _font(TEXT), anchor, stroke_width=2, stroke_fill=BLACK
            )
        rows[0].append(np.asarray(marked))
    names = ["image", *labels]
    side = _legend(entries) if entries else None
    if flat:  # one slice: side by side, not a tower
        return _save(_grid([[row[0] for row in rows]], [names], [""], title, side), path)
    above = [[f"slice {z}\n{z * spacing[2]:.1f} mm" for z in chosen]] + [[] for _ in labels]
    return _save(_grid(rows, above, names, title, side), path)


def montage(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    path: str | Path,
    columns: int = 4,
    title: str = "",
    cmap: str = "grey",
    limits: tuple[float, float] | None = None,
    unit: str = "",
) -> Path:
    """2D arrays [H, W] of any range (or uint8 colour pictures [H, W, 3]) in rows of `columns`, each under its title.

    cmap "grey": each image has its own window, percentile 0.5 to 99.5; "heat" (uncertainty, error maps): one scale for
    all, from the least to the greatest value, with a colour bar in `unit`. `limits` (low, high) replaces either.
    Returns the path. Raises ValueError for no image, another number of titles, another shape or colour map.
    """
    if not images or len(images) != len(titles) or cmap not in ("grey", "heat") or columns < 1:
        raise ValueError(
            f"montage: {len(images)} images, {len(titles)} titles, columns {columns}, cmap '{cmap}';"
            " expected one title for each image, at least one of both, and cmap grey or heat"
        )
    if bad := [
        f"{a.dtype} {a.shape}"
        for a in images
        if a.ndim != 2 and (a.ndim != 3 or a.dtype != np.uint8)
    ]:
        raise ValueError(f"montage: {', '.join(bad)}; expected [H, W], or uint8 [H, W, 3]")
    maps = [np.asarray(a, dtype=np.float64) for a in images if a.ndim == 2]
    shared = limits or _limits(np.concatenate([m.ravel() for m in maps]) if maps else np.zeros(0))
    cells = []
    for array in images:
        if array.ndim == 2:
            value = np.asarray(array, dtype=np.float64)
            own = limits or _limits(value, (0.5, 99.5))
            array = _heat(value, shared) if cmap == "heat" else _grey(value, own)
        cells.append(_resize(array, *_size(array.shape, 200)))
    starts = range(0, len(cells), columns)
    rows, above = (
        [cells[i : i + columns] for i in starts],
        [list(titles[i : i + columns]) for i in starts],
    )
    side = _colour_bar(shared, max(c.shape[0] for c in cells), unit) if cmap == "heat" else None
    return _save(_grid(rows, above, [""] * len(rows), title, side), path)


def denoising_strip(
    rows: Mapping[str, Sequence[np.ndarray]],
    column_titles: Sequence[str],
    path: str | Path,
    title: str = "",
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Path:
    """The reverse process as a strip: a row for each name (for example x_t and the predicted x0), a column for each t.

    rows: name -> 2D arrays [H, W], one for each column; floats are grey from limits[0] (black) to limits[1] (white),
    the same in all panels, so that noise is seen to shrink; integers and booleans are labels in the classes' colours.
    Returns the path. Raises ValueError for no rows, another number of arrays in a row, or arrays that are not 2D.
    """
    cells = []
    for name, arrays in rows.items():
        if len(arrays) != len(column_titles) or any(a.ndim != 2 for a in arrays):
            raise ValueError(
                f"denoising_strip: row '{name}' has shapes {[a.shape for a in arrays]}, expected"
                f" {len(column_titles)} arrays [H, W], one for each column title"
            )
        painted = [
            _grey(a, limits)
            if a.dtype.kind == "f"
            else overlay(
                np.zeros(a.shape, np.uint8),
                a.astype(np.int64),
                class_colours(int(a.max())),
                alpha=1.0,
            )
            for a in arrays
        ]
        cells.append([_resize(p, *_size(p.shape, 144)) for p in painted])
    if not cells or not column_titles:
        raise ValueError(
            "denoising_strip: nothing to draw; expected at least one row with one array"
        )
    above = [list(column_titles)] + [[] for _ in cells[1:]]
    return _save(_grid(cells, above, list(rows), title), path)


# ------------------------------------------------------------------------------------------------------------ heat map
def heat_map(
    values: np.ndarray,
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    path: str | Path,
    title: str = "",
    row_name: str = "",
    col_name: str = "",
    unit: str = "",
    fmt: str = "{:.3f}",
    below: Sequence[Sequence[str]] | None = None,
) -> Path:
    """A table of numbers as coloured cells with a colour bar, for example a metric over two settings.

    values [rows, columns] in `unit`; NaN is a hatched grey cell "not run", an infinite value a plain grey one.
    row_name and col_name say what the labels count; below: a second line of text for each cell. Returns the path.
    Raises ValueError where labels and values differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(row_labels), len(col_labels)) or values.size == 0:
        raise ValueError(
            f"heat_map: values {values.shape}, {len(row_labels)} row and {len(col_labels)} column labels;"
            " expected one label for each row and column, and at least one cell"
        )
    texts = [["not run" if np.isnan(v) else fmt.format(v) for v in row] for row in values]
    words = [word for label in col_labels for word in label.split()]
    width = max(
        72,
        *(_width(t) + 16 for row in texts for t in row),
        *(min(_width(w) + 6, 140) for w in words),
    )
    limits = _limits(values)
    cells: list[list[np.ndarray]] = []
    second = below or [[""] * values.shape[1] for _ in texts]
    width = max(width, *(_width(t) + 12 for row in second for t in row))
    for row, notes, fills in zip(texts, second, _heat(values, limits)):  # fills [columns, 3]
        cells.append([])
        for text, under, fill in zip(row, notes, fills.tolist()):
            cell = Image.new("RGB", (width, 44), tuple(fill))
            for x in (
                range(-44, width, 12) if text == "not run" else ()
            ):  # lines: also seen in a grey print
                ImageDraw.Draw(cell).line((x, 44, x + 44, 0), WHITE)
            dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 100
            lines = [text, under] if under else [text]
            _write(
                cell,
                (width / 2, 14 if under else 22),
                lines,
                anchor="mm",
                fill=WHITE if dark else BLACK,
            )
            cells[-1].append(np.asarray(cell))
    note = ", ".join(
        f"{way}: {name}" for way, name in (("rows", row_name), ("columns", col_name)) if name
    )
    above = [list(col_labels)] + [[] for _ in cells[1:]]
    bar = _colour_bar(limits, 46 * len(cells), unit)
    return _save(_grid(cells, above, row_labels, title, bar, note, gap=2), path)


# ---------------------------------------------------------------------------------------------------------- one case
class Diary:
    """Watches a sampler and keeps one axial slice of x_t and of the predicted x_0 of each step.

    truth: [X, Y, Z] integer labels; the slice is the one where the last class, of value `last`, is largest, or
    without it the middle one. inside: the slices that cut the volume out of the padded grid.
    """

    def __init__(self, truth: np.ndarray, inside: Sequence[slice], last: int):
        size = (truth == last).sum(axis=(0, 1))  # [Z]
        self.truth, self.z = truth, int(size.argmax()) if size.any() else len(size) // 2
        self.cut = (0, -1, inside[0], inside[1], inside[2].start + self.z)
        self.frames: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.members: list[
            np.ndarray
        ] = []  # masks [X, Y, Z] of the first members, if the caller adds them

    def __call__(self, t: int, xt: Any, x0: Any) -> None:
        """xt, x0: tensors [1, K, X, Y, Z] on any device."""
        a, b = (radiological(v[self.cut].float().cpu().numpy()) for v in (xt, x0))
        self.frames.append((t, a, b))


def case_sheet(
    folder: Path,
    case: str,
    image: np.ndarray,
    mask: np.ndarray,
    spacing: Sequence[float],
    class_names: Mapping[str, int],
    diary: Diary,
    variance: np.ndarray,
) -> None:
    """Three pictures of a case: masks over slices, the way from noise to mask, members beside their mean and variance.

    image, variance: [X, Y, Z]; mask: [X, Y, Z] integers. The third is left out where the variance is 0 (one member); in
    it the variance is divided by its maximum.
    """
    image, z = image.astype(np.float32), diary.z
    masks = {"truth": diary.truth, "prediction": mask}
    mask_slices(image, masks, folder / f"{case}.png", spacing, class_names, title=case)
    some = [
        diary.frames[i]
        for i in sorted({round(i) for i in np.linspace(0, len(diary.frames) - 1, 6)})
    ]
    rows = {"x_t": [f[1] for f in some], "predicted x_0": [f[2] for f in some]}
    title = f"{case}, {list(class_names)[-1]}, slice {z}"
    denoising_strip(rows, [f"t = {f[0]}" for f in some], folder / f"{case}_steps.png", title=title)
    if variance.max() > 0:
        grey = _grey(radiological(image[:, :, z]), _limits(image, (0.5, 99.5)))
        colours = class_colours(max(class_names.values()))
        shown = (
            {"truth": diary.truth}
            | {f"member {n + 1}": m for n, m in enumerate(diary.members)}
            | {"mean": mask}
        )
        pictures = [
            grey,
            *(overlay(grey, radiological(m[:, :, z]), colours) for m in shown.values()),
        ]
        pictures.append(radiological(variance[:, :, z] / variance.max()))
        names = ["image", *shown, "variance"]
        montage(
            pictures,
            names,
            folder / f"{case}_ensemble.png",
            title=f"{case}, slice {z}",
            columns=len(names),
        )
