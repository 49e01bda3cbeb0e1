"""Pictures are checked by their pixels, or by the rows that are handed to the page."""

import numpy as np
import pytest
from PIL import Image

from common import figures

ORANGE, BLUE = figures.class_colours(2)


@pytest.fixture
def rows(monkeypatch):
    """Catch (label, pictures, captions, legend) of each row instead of writing a file."""
    caught = []
    monkeypatch.setattr(figures, "_page", lambda path, title, rows: caught.extend(rows))
    return caught


def curve(panel):
    """Return the mean height of the black pixels in each column between the axes."""
    inside = (panel == 0).all(axis=-1)[24:570, 140:1290]
    return np.array([-np.flatnonzero(c).mean() if c.any() else np.nan for c in inside.T])


def test_overlay_fill_is_blended_and_contour_is_pure():
    mask = np.pad(np.full((5, 5), 2), 2)
    picture = figures.overlay(np.full((9, 9, 3), 100, np.uint8), mask, [ORANGE, BLUE])
    assert picture[4, 4].tolist() == [round(0.6 * 100 + 0.4 * channel) for channel in BLUE]
    assert picture[2, 4].tolist() == list(BLUE)
    assert picture[1, 4].tolist() == [100, 100, 100]


def test_class_colours_of_the_largest_data_set_differ():
    assert len(set(figures.class_colours(34))) == 34  # FFHQ-34


def test_case_shows_patients_right_on_the_left_and_front_on_top(rows):
    mask = np.zeros((40, 40, 3), int)
    mask[30:36, 15:25, 1] = 1  # RAS+: a high x is the patient's right
    mask[15:25, 30:36, 1] = 2  # a high y is the front
    figures.case("", mask * 0.0, {"m": mask}, (1, 1, 1), {"right": 1, "front": 2})
    right, front = (np.argwhere((rows[0][1][1] == c).all(axis=-1)) for c in (ORANGE, BLUE))
    assert right[:, 1].max() < front[:, 1].min() and front[:, 0].max() < right[:, 0].min()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 7.7), (1.0, 2.0, 1.0), (3.0, 1.25, 5.0)])
def test_case_proportions_follow_the_spacing(rows, spacing):
    figures.case("", np.zeros((60, 40, 3)), {}, spacing, {})
    height, width, _ = rows[0][1][0].shape
    assert width / height == pytest.approx(1.5 * spacing[0] / spacing[1], rel=0.02)


def test_case_slices_are_spread_over_the_labelled_ones(rows):
    mask = np.broadcast_to(np.isin(np.arange(50), range(20, 40)), (4, 4, 50))
    figures.case("", mask * 1.0, {"m": mask, "p": mask + 1.0}, (1, 1, 2), {}, slices=4)
    assert rows[0][2] == [f"slice {z}, {2 * z}.0 mm" for z in (22, 27, 32, 37)]


def test_case_names_the_mask_of_another_shape():
    with pytest.raises(ValueError, match="truth"):
        figures.case("", np.zeros((4, 5, 3)), {"truth": np.zeros((5, 4, 3), int)}, (1, 1, 1), {})


def test_montage_limits_hold_for_all_and_titles_run_on(rows):
    images = {"x": [np.full((9, 9), -1.0), np.zeros((9, 9))], "y": [np.full((9, 9), 5.0)]}
    figures.montage(images, ["t = 2", "t = 1", "t = 0"], "", limits=(-1, 1))
    assert [picture[0, 0, 0] for row in rows for picture in row[1]] == [0, 128, 255]
    assert [row[2] for row in rows] == [["t = 2", "t = 1"], ["t = 0"]]


def test_montage_heat_maps_share_a_scale_that_the_legend_shows(rows):
    images = [np.full((9, 9), value) for value in (1.0, 3.0, np.nan)]
    figures.montage({"a": images}, [], "", heat="ml")
    colours = [picture[5, 5].tolist() for picture in rows[0][1]]
    assert colours == [[68, 1, 84], [253, 231, 37], [190] * 3]
    assert rows[0][3]["1.00"] == (68, 1, 84) and list(rows[0][3])[:2] == ["ml", "3.00"]


@pytest.mark.parametrize("log", [[], ["y"]], ids=str)
def test_lines_of_a_decay_are_straight_on_a_logarithmic_axis_alone(rows, log):
    figures.lines("", {"y": {"a": (range(101), 10.0 ** -np.linspace(0, 4, 101))}}, log=log)
    height = curve(rows[0][1][0])
    assert height[60] > height[575] + 5 > height[1090]
    assert (abs(height[575] - (height[60] + height[1090]) / 2) < 5) == bool(log)


def test_lines_and_their_band_run_through_the_means_of_repeats(rows):
    figures.lines("", {"y": {"a": ([0, 0, 9], [0, 10, 5], [np.nan, np.nan, 0], [0, 10, 10])}})
    shaded = np.flatnonzero(abs(rows[0][1][0][:, 998, 0] - 180.0) < 30)  # at three quarters of x
    assert np.ptp(shaded) == pytest.approx(0.75 * 510, abs=5)
    assert np.ptp(curve(rows[0][1][0])[100:1050]) < 2


def test_loss_curve_draws_means_with_a_band_and_only_finite_values(monkeypatch, tmp_path):
    lines = ['step,lr,loss,loss_q1,val_dice,"val_dice_liver, left"']
    for n, loss in enumerate(np.random.default_rng(0).normal(5, 1, 3000)):
        lines.append(f"{n},1,{loss},{n if n > 1500 else 'nan'},{'' if n % 1000 else 0.8},1")
    (tmp_path / "log.csv").write_text("\n".join(lines))
    drawn: dict = {}
    monkeypatch.setattr(figures, "lines", lambda path, panels, *rest: drawn.update(panels))
    figures.loss_curve(tmp_path / "log.csv", "")
    assert list(drawn["validation Dice"]) == ["mean", "liver, left"]
    assert drawn["validation Dice"]["mean"][0].tolist() == [0, 1000, 2000]
    assert drawn["loss"]["t in quartile 1"][0].min() > 1500
    _, y, low, high = drawn["loss"]["mean"]
    assert np.ptp(y) < 1 and np.mean(high - low) == pytest.approx(2.56, abs=0.2)  # of a normal one


@pytest.mark.parametrize("text", ["", "step,loss\n", "step,loss\n1,nan\n", "step,loss\n1,2\n3"])
def test_loss_curve_of_a_run_that_has_just_begun_is_drawn(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    assert figures.loss_curve(tmp_path / "log.csv", tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("n", ["", "é σ × 肝\n<%>", "long name " * 25, "W" * 150], ids=len)
@pytest.mark.parametrize("shape", [(9, 7, 3), (1, 900, 1), (900, 1, 2)], ids=str)
def test_any_text_and_shape_is_drawn_within_a_white_border(tmp_path, n, shape):
    path = tmp_path / "a.png"
    volume = np.where(np.indices(shape).sum(axis=0) == 3, np.nan, 0.0)
    flat = volume[..., 0]
    for draw in (
        lambda: figures.case(path, volume, {n: volume > 0, "f" + n: volume}, (1, 1, 9), {n: 1}, n),
        lambda: figures.case(path, flat, {n: flat > 0}, (9, 1), {n: 1}, n),
        lambda: figures.montage({n: [flat, flat]}, [n, n], path, n, n),
        lambda: figures.heat_map(flat[:2, :1], [n, n], [n], path, n, n),
        lambda: figures.lines(path, {n: {n: ([1, 2], [3, np.nan])}}, n, n, [n]),
    ):
        picture = np.asarray(Image.open(draw()))
        assert picture[24].min() < picture[:24].min() == picture[:, -24:].min() == 255
