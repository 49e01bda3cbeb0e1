"""Pictures are checked by their pixels: where a colour stands, and how far colours stand apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.old import figures

ORANGE, BLUE, GREEN = figures.PALETTE[:3]
BLACK = (0, 0, 0)


def pixels(path: Path) -> np.ndarray:
    """The picture as uint8 [rows, columns, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def where(picture: np.ndarray, colour: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels that have exactly this colour."""
    return np.nonzero((picture == colour).all(axis=-1))


def write_log(path: Path, columns: dict[str, list]) -> Path:
    """A log.csv with these columns; None is an empty cell."""
    lines = [",".join(columns)]
    lines += [",".join("" if v is None else str(v) for v in row) for row in zip(*columns.values())]
    path.write_text("\n".join(lines) + "\n")
    return path


def curve(picture: np.ndarray, colour: tuple) -> np.ndarray:
    """Mean row of a colour in each column of the upper panel's inside; NaN where the colour is not."""
    inside = (picture[:, 100:690] == colour).all(axis=-1)[
        45:300
    ]  # below the panel's name and top edge
    return np.array(
        [np.flatnonzero(column).mean() if column.any() else np.nan for column in inside.T]
    )


# ---------------------------------------------------------------------------------------------------------- loss curve
def test_loss_curve_falls_and_rises_where_the_data_do(tmp_path):
    step = np.arange(1, 201)
    v_shape = np.abs(step - 100) / 100 + 1.0  # falls until step 100, then rises
    log = write_log(tmp_path / "log.csv", {"step": step.tolist(), "loss": v_shape.tolist()})
    rows = curve(pixels(figures.loss_curve(log, tmp_path / "loss.png")), BLACK)
    left, middle, right = rows[20], rows[len(rows) // 2], rows[-20]
    assert middle > left + 100 and middle > right + 100  # rows count downwards
    assert abs(left - right) < 15


def test_loss_curve_is_logarithmic_only_above_a_decade(tmp_path):
    step = list(range(1, 91))
    for span, straight in (
        (3.0, False),
        (1000.0, True),
    ):  # the same exponential decay over less and more than a decade
        loss = [span ** (-s / 90) for s in step]
        log = write_log(tmp_path / "log.csv", {"step": step, "loss": loss})
        rows = curve(pixels(figures.loss_curve(log, tmp_path / "loss.png")), BLACK)
        bend = abs(rows[300] - (rows[100] + rows[500]) / 2)
        assert (bend < 2) == straight, (
            f"span {span}: the middle is {bend:.1f} pixels off the straight line"
        )


def test_loss_curve_smoothing_follows_the_mean_not_the_noise(tmp_path):
    noise = np.random.default_rng(0).normal(size=10_000)
    log = write_log(
        tmp_path / "log.csv", {"step": list(range(10_000)), "loss": (5 + noise).tolist()}
    )
    picture = pixels(figures.loss_curve(log, tmp_path / "loss.png"))
    rows = curve(picture, BLACK)
    assert np.nanmax(rows) - np.nanmin(rows) < 40  # of 260; the raw line fills most of the height
    raw = where(picture[45:300, 100:690], figures.MISSING)[0]
    assert raw.max() - raw.min() > 150


def test_loss_curve_begins_where_the_finite_values_begin(tmp_path):
    columns = {"step": list(range(50)), "loss": [float("nan")] * 25 + [2.0] * 25}
    rows = curve(
        pixels(figures.loss_curve(write_log(tmp_path / "log.csv", columns), tmp_path / "loss.png")),
        BLACK,
    )
    assert np.isfinite(rows[320:560]).all() and np.isnan(rows[:250]).all()


def test_loss_curve_second_panel_stands_only_where_dice_was_measured(tmp_path):
    columns = {"step": [1, 2, 3], "loss": [3, 2, 1], "val_dice_mean": [None, None, None]}
    without = pixels(figures.loss_curve(write_log(tmp_path / "a.csv", columns), tmp_path / "a.png"))
    columns["val_dice_mean"] = [0.2, None, 0.8]
    with_dice = pixels(
        figures.loss_curve(write_log(tmp_path / "b.csv", columns), tmp_path / "b.png")
    )
    assert with_dice.shape[0] > without.shape[0] + 200
    rows, cols = where(with_dice[:, :700], ORANGE)
    assert rows[cols < 110].mean() > rows[cols > 680].mean() + 100  # 0.2 stands below 0.8
    assert len(where(without, ORANGE)[0]) == 0


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_loss_curve_draws_the_first_rows_of_a_run(tmp_path, rows):
    log = write_log(
        tmp_path / "log.csv",
        {"step": [10, 20][:rows], "loss": [0.5, 0.4][:rows], "lr": [1, 1][:rows]},
    )
    picture = pixels(figures.loss_curve(log, tmp_path / "loss.png"))
    drawn = np.isfinite(curve(picture, BLACK)).sum()
    assert (
        (drawn > 400) if rows == 2 else (drawn > 4)
    )  # two points: a line; one: a dot; none: a sentence


def test_loss_curve_ignores_the_line_that_is_just_being_written(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("step,loss,lr\n1,0.5,1\n2,0.")
    assert figures._read_log(log)["step"].tolist() == [1.0]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "step"),
        ("epoch,loss\n1,2\n", "step"),
        ("step,loss\n1,abc\n", "line 2, column 'loss': 'abc'"),
        ("step,loss\n1\n2,3\n", "line 2: 1 cells"),
        ("step,loss\n1,2,3\n", "line 2: 3 cells"),
    ],
)
def test_loss_curve_malformed_file_is_named(tmp_path, text, said):
    log = tmp_path / "broken_log.csv"
    log.write_text(text)
    with pytest.raises(ValueError, match="broken_log") as error:
        figures.loss_curve(log, tmp_path / "loss.png")
    assert said in str(error.value)
    assert not (tmp_path / "loss.png").exists()


def test_ticks_are_round_and_within_the_range():
    assert figures._ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((3, 47), (0.0123, 0.0131), (-2.5, 1e6)):
        ticks = figures._ticks(low, high)
        assert 3 <= len(ticks) <= 8 and low <= ticks[0] and ticks[-1] <= high


# --------------------------------------------------------------------------------------------------------------- masks
def test_overlay_fill_is_blended_and_contour_is_pure():
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[2:7, 2:7] = 2
    result = figures.overlay(np.full((9, 9), 100, np.uint8), mask, [ORANGE, BLUE], alpha=0.25)
    assert result[4, 4].tolist() == [round(0.75 * 100 + 0.25 * c) for c in BLUE]
    assert result[2, 4].tolist() == list(BLUE)
    assert result[0, 0].tolist() == [100, 100, 100]


def test_overlay_value_without_colour_is_an_error():
    with pytest.raises(ValueError, match="label 3, but 2 colours"):
        figures.overlay(np.zeros((4, 4), np.uint8), np.full((4, 4), 3), [ORANGE, BLUE])


def test_class_colours_of_twenty_classes_differ():
    assert len(set(figures.class_colours(20))) == 20


def test_mask_slices_patients_right_is_left_and_front_is_up(tmp_path):
    mask = np.zeros((40, 40, 3), dtype=np.uint8)
    mask[30:36, 15:25, 1] = 1  # RAS+: a high x is the patient's right
    mask[15:25, 30:36, 1] = 2  # a high y is the front
    path = figures.mask_slices(
        np.zeros(mask.shape), {"m": mask}, tmp_path / "a.png", (1, 1, 1), ["right", "front"]
    )
    picture = pixels(path)[:, :270]  # without the legend
    (right_rows, right_cols), (front_rows, front_cols) = (
        where(picture, ORANGE),
        where(picture, BLUE),
    )
    assert right_cols.max() < front_cols.min()
    assert front_rows.max() < right_rows.min()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 7.7), (1.0, 2.0, 1.0), (3.0, 1.25, 5.0)])
def test_mask_slices_proportions_follow_the_spacing(tmp_path, spacing):
    mask = np.zeros((60, 40, 3), dtype=np.uint8)
    mask[10:50, 10:30, 1] = 1  # 40 by 20 voxels
    path = figures.mask_slices(mask, {"m": mask}, tmp_path / "a.png", spacing, {"organ": 1})
    rows, cols = where(
        pixels(path), tuple(round(0.55 * 255 + 0.45 * c) for c in ORANGE)
    )  # the fill, over white
    height, width = np.ptp(rows) + 3, np.ptp(cols) + 3  # with one pixel of contour on each side
    assert width / height == pytest.approx(40 * spacing[0] / (20 * spacing[1]), rel=0.05)


def test_mask_slices_letters_stand_on_their_side(tmp_path):
    volume = np.ones((30, 30, 1))  # a flat image is mid-grey
    picture = pixels(figures.mask_slices(volume, {}, tmp_path / "a.png", (1, 1, 1), []))
    grey = (picture == 128).all(
        axis=-1
    )  # single pixels of a letter's edge may have the cell's grey, no whole row has
    cell = picture[grey.sum(axis=1) > 100][:, grey.sum(axis=0) > 100]
    for corner, letter in ((cell[:24, :24], "R"), (cell[:24, -24:], "L")):
        rows, cols = np.nonzero(corner[..., 0] > 200)
        upper = np.ptp(cols[rows < (rows.min() + rows.max()) / 2 - 1]) / np.ptp(cols)
        assert (upper > 0.5) == (
            letter == "R"
        )  # the bow of an R is as wide as its legs, the stem of an L is thin


def test_window_of_an_empty_and_of_a_sparse_image_shows_the_background_black():
    sparse = np.zeros((40, 40))
    sparse[3, 5] = 7  # less than half a per cent of the pixels
    for image, bright in ((np.zeros((40, 40)), []), (sparse, [(3, 5)])):
        shown = figures._grey(image, figures._limits(image, (0.5, 99.5)))[..., 0]
        assert [tuple(at) for at in np.argwhere(shown > 0)] == bright and set(np.unique(shown)) <= {
            0,
            255,
        }


def test_classes_of_the_largest_data_set_have_different_colours():
    assert len(set(figures.class_colours(34))) == 34  # FFHQ-34


def test_mask_slices_legend_has_every_class(tmp_path):
    mask = np.zeros((30, 30, 2), dtype=np.uint8)
    names = [f"organ {i}" for i in range(13)]
    picture = pixels(figures.mask_slices(mask, {"m": mask}, tmp_path / "a.png", (1, 1, 1), names))
    heights = [where(picture, colour)[0].mean() for colour in figures.class_colours(13)]
    assert heights == sorted(heights) and np.allclose(np.diff(heights), np.diff(heights)[0], atol=1)


def test_choose_slices_are_spread_over_the_foreground_only():
    foreground = np.zeros(50, dtype=bool)
    foreground[20:40] = True
    chosen = figures._choose_slices(foreground, 4)
    assert chosen == sorted(set(chosen)) and len(chosen) == 4 and all(foreground[chosen])
    assert chosen[0] < 25 and chosen[-1] > 34
    assert figures._choose_slices(np.zeros(3, bool), 6) == [0, 1, 2]


def test_mask_slices_lists_everything_that_does_not_fit(tmp_path):
    masks = {"truth": np.zeros((4, 4, 3), int), "soft": np.zeros((4, 4, 4))}
    with pytest.raises(ValueError) as error:
        figures.mask_slices(np.zeros((4, 4, 4)), masks, tmp_path / "a.png", (1, 1), ["organ"])
    assert all(
        word in str(error.value)
        for word in ("'truth'", "(4, 4, 3)", "'soft'", "float64", "spacing")
    )


# --------------------------------------------------------------------------------------------- montage, strip, heat map
def test_heat_map_ends_of_the_scale_have_the_end_colours(tmp_path):
    values = np.array([[0.2, 0.9], [0.5, 0.4]])
    picture = pixels(figures.heat_map(values, ["a", "b"], ["c", "d"], tmp_path / "h.png"))[
        :, :175
    ]  # no colour bar
    low, high = where(picture, tuple(figures.HEAT[0])), where(picture, tuple(figures.HEAT[-1]))
    assert len(low[0]) > 1500 and len(high[0]) > 1500
    assert low[1].max() < high[1].min() and abs(low[0].mean() - high[0].mean()) < 5


def test_heat_map_missing_value_is_grey_and_hatched(tmp_path):
    full = pixels(figures.heat_map(np.array([[0.2, 0.9]]), ["a"], ["c", "d"], tmp_path / "a.png"))
    missing = pixels(
        figures.heat_map(np.array([[0.2, np.nan]]), ["a"], ["c", "d"], tmp_path / "b.png")
    )
    infinite = pixels(
        figures.heat_map(np.array([[0.2, np.inf]]), ["a"], ["c", "d"], tmp_path / "c.png")
    )
    assert len(where(full, figures.MISSING)[0]) == 0
    rows, cols = where(missing, figures.MISSING)
    hatched, plain = (
        p[rows.min() : rows.max(), cols.min() : cols.max()] for p in (missing, infinite)
    )
    assert len(where(hatched, (255, 255, 255))[0]) > 100
    assert (
        len(where(plain, (255, 255, 255))[0]) == 0 and len(where(plain, figures.MISSING)[0]) > 1500
    )


def test_montage_heat_has_one_scale_for_all_images(tmp_path):
    images = [np.full((20, 20), 1.0), np.full((20, 20), 3.0)]
    picture = pixels(figures.montage(images, ["low", "high"], tmp_path / "m.png", cmap="heat"))
    assert picture[100, 100].tolist() == figures.HEAT[0].tolist()
    assert picture[100, 300].tolist() == figures.HEAT[-1].tolist()


def test_montage_starts_a_new_row_after_its_columns(tmp_path):
    images = [np.eye(16)] * 5
    wide = pixels(figures.montage(images, list("abcde"), tmp_path / "w.png", columns=5))
    tall = pixels(figures.montage(images, list("abcde"), tmp_path / "t.png", columns=2))
    assert wide.shape[1] > 2 * tall.shape[1] and tall.shape[0] > 2 * wide.shape[0]


def test_denoising_strip_has_one_window_for_all_panels(tmp_path):
    panels = [np.full((16, 16), v) for v in (-1.0, 0.0, 5.0)]
    picture = pixels(
        figures.denoising_strip({"x": panels}, ["t = 2", "t = 1", "t = 0"], tmp_path / "s.png")
    )
    row = picture[100, :, 0]
    left = figures.MARGIN + figures._width("x") + figures.GAP
    assert [int(row[left + 72 + k * 152]) for k in range(3)] == [0, 128, 255]


def test_denoising_strip_paints_integers_as_labels(tmp_path):
    label = np.zeros((16, 16), dtype=np.uint8)
    label[4:8, 4:8] = 3
    picture = pixels(figures.denoising_strip({"x0": [label]}, ["t = 0"], tmp_path / "s.png"))
    assert len(where(picture, GREEN)[0]) == 4 * 4 * 9 * 9  # enlarged nine times, edges sharp


def test_wrong_numbers_of_titles_are_errors(tmp_path):
    one = np.zeros((4, 4))
    for call in (
        lambda p: figures.montage([one], ["a", "b"], p),
        lambda p: figures.montage([], [], p),
        lambda p: figures.denoising_strip({"x": [one, one]}, ["t"], p),
        lambda p: figures.heat_map(one, ["a"], ["b"], p),
    ):
        with pytest.raises(ValueError, match="expected"):
            call(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- all of them
def draw_all(folder: Path, name: str) -> list[Path]:
    """One picture of each kind, with this text wherever a text can be given."""
    log = write_log(
        folder / "log.csv", {"step": [1, 10**7], "loss": [1e-5, 1e5], f"val_dice_{name}": [0, 1]}
    )
    volume, mask = (
        np.arange(4096.0).reshape(16, 16, 16),
        np.eye(16, dtype=int)[..., None].repeat(16, 2),
    )
    flat = volume[..., 0]
    return [
        figures.loss_curve(log, folder / "loss.png", name),
        figures.mask_slices(
            volume, {name: mask}, folder / "slices.png", (1, 5, 1), [name] * 1, name, 2
        ),
        figures.mask_slices(flat, {name: mask[..., 0]}, folder / "flat.png", (9, 1), [name], name),
        figures.montage([flat] * 3, [name] * 3, folder / "montage.png", 2, name, "heat", unit=name),
        figures.denoising_strip({name: [flat]}, [name], folder / "strip.png", name),
        figures.heat_map(
            flat[:2, :2], [name] * 2, [name] * 2, folder / "heat.png", name, name, name, name
        ),
    ]


@pytest.mark.parametrize(
    "name", ["", "é σ × 𝕏", "long name " * 25, "W" * 150], ids=["none", "signs", "words", "word"]
)
def test_no_text_touches_the_border(tmp_path, name):
    for path in draw_all(tmp_path, name):
        picture = pixels(path)
        border = np.concatenate(
            [
                picture[:6].ravel(),
                picture[-6:].ravel(),
                picture[:, :6].ravel(),
                picture[:, -6:].ravel(),
            ]
        )
        assert (border == 255).all(), f"{path.name} is cut off at its border"


def test_nothing_but_the_pictures_is_written(tmp_path):
    written = draw_all(tmp_path, "name")
    assert {p.name for p in tmp_path.iterdir()} == {"log.csv"} | {p.name for p in written}


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = figures.montage([np.eye(8)], ["old"], tmp_path / "sub" / "m.png")
    old = path.read_bytes()

    def full_disk(self, file, **options):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        figures.montage([np.ones((8, 8))], ["new"], path)
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["m.png"]


def test_curves_draws_each_line_in_its_colour_and_refuses_nothing(tmp_path):
    x = np.arange(20)
    path = figures.curves(
        {"up": (x, x / 20), "down": (x, 1 - x / 20), "gone": (x, x * np.nan)},
        tmp_path / "c.png",
        "both",
    )
    pixels = np.asarray(Image.open(path).convert("RGB"))
    counts = [int((pixels[:, :700] == colour).all(-1).sum()) for colour in figures.class_colours(3)]
    assert counts[0] > 300 and counts[1] > 300 and counts[2] < 50
    with pytest.raises(ValueError, match="without a finite point"):
        figures.curves({"gone": (x, x * np.nan)}, tmp_path / "d.png")


def test_curves_breaks_an_axis_name_that_is_wider_than_the_panel(tmp_path):
    names = [", ".join(f"{k} vena cava" for k in range(count)) for count in (2, 12)]
    sizes = [
        Image.open(figures.curves({"a": ([0, 1], [0, 1])}, tmp_path / f"{n}.png", "", n)).size
        for n in names
    ]
    assert (
        sizes[0][0] == sizes[1][0] and sizes[1][1] == sizes[0][1] + figures.LINE
    )  # a second line, nothing cut


def test_case_sheet_shows_members_only_of_an_ensemble(tmp_path):
    label = np.zeros((8, 8, 4), np.uint8)
    label[2:5, 2:5, 1:3] = 1
    image, none = np.random.default_rng(0).random((8, 8, 4)), np.zeros((8, 8, 4))
    diary = figures.Diary(label, [slice(0, 8), slice(0, 8), slice(0, 4)], int(label.max()))
    diary(1000, torch.randn(1, 1, 8, 8, 4), torch.zeros(1, 1, 8, 8, 4))
    figures.case_sheet(tmp_path / "one", "a", image, label, (1, 1, 1), {"x": 1}, diary, none)
    assert not (tmp_path / "one/a_ensemble.png").exists()
    widths = []
    for members in (0, 3):
        diary.members = [label] * members
        figures.case_sheet(
            tmp_path / str(members), "a", image, label, (1, 1, 1), {"x": 1}, diary, none + 0.1
        )
        widths.append(Image.open(tmp_path / str(members) / "a_ensemble.png").width)
    assert widths[1] > widths[0] + 500  # three pictures more
