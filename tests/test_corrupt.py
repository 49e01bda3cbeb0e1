"""Corruptions: the specification's values, the definitions by loops, what is random, labels, the prepared folder."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from common.old.loaders import data_record, open_prepared
from data_prep import corrupt
from data_prep.corrupt import CORRUPTIONS

NAMES = [*CORRUPTIONS]
RANDOM = [
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "glass_blur",
    "elastic",
    "frost",
    "spatter",
]


def waves() -> np.ndarray:
    """The specification's test picture, uint8 [3, 48, 64]."""
    i, j, c = np.indices((48, 64, 3))
    u = (127.5 + 100 * np.sin(0.21 * i + 0.13 * j + 0.9 * c) * np.cos(0.05 * j)).astype(np.uint8)
    return u.transpose(2, 0, 1)


def made(name: str, severity: int, image: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    return corrupt.corrupt(
        waves() if image is None else image, name, severity, np.random.default_rng(seed)
    )


def grey(value: int, shape=(64, 64)) -> np.ndarray:
    return np.full((3, *shape), value, np.uint8)


def test_picture_is_that_of_the_specification():
    assert waves().mean() == pytest.approx(125.13835, abs=1e-5) and waves()[:, 10, 20].tolist() == [
        73,
        93,
        139,
    ]


@pytest.mark.parametrize(
    ("name", "severity", "mean", "pixel"),
    [
        ("gaussian_blur", 3, 124.838, [86, 98, 132]),
        ("defocus_blur", 3, 124.486, [87, 98, 131]),
        ("contrast", 3, 124.694, [114, 118, 129]),
        ("brightness", 3, 177.088, [113, 144, 215]),
        ("saturate", 3, 101.566, [7, 47, 139]),
        ("saturate", 1, 148.598, [119, 125, 139]),
    ],
)
def test_corruption_has_the_specified_values(name, severity, mean, pixel):
    result = made(name, severity)
    assert result.mean() == pytest.approx(mean, abs=6e-4) and result[:, 10, 20].tolist() == pixel


def test_pixelate_has_the_specified_mean():
    assert made("pixelate", 3).mean() == pytest.approx(125.317, abs=6e-4)


def test_there_are_15_of_5_severities_and_none_of_the_four_that_the_paper_leaves_out():
    assert len(NAMES) == 15 and all(len(parameters) == 5 for _, parameters in CORRUPTIONS.values())
    assert not {"motion_blur", "zoom_blur", "snow", "fog"} & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("severity", [1, 5])
def test_corruption_keeps_shape_and_type_and_changes_something(name, severity):
    image = np.random.default_rng(1).integers(40, 200, (3, 37, 52), dtype=np.uint8)  # odd sides
    result = made(name, severity, image)
    assert result.shape == image.shape and result.dtype == np.uint8 and (result != image).any()


@pytest.mark.parametrize("name", NAMES)
def test_corruption_is_random_only_where_it_should_be(name):
    assert (made(name, 5) == made(name, 5)).all()
    assert (made(name, 5) == made(name, 5, seed=1)).all() == (name not in RANDOM)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "speckle_noise"])
@pytest.mark.parametrize("severity", [1, 2, 3])
def test_noise_has_its_standard_deviation(name, severity):
    c = {
        "gaussian_noise": (0.08, 0.12, 0.18),
        "shot_noise": (60, 25, 12),
        "speckle_noise": (0.15, 0.2, 0.35),
    }[name]
    x = 100 / 255  # far from both ends
    expected = {"gaussian_noise": c[severity - 1], "speckle_noise": x * c[severity - 1]}
    sd = expected.get(name, (x / c[severity - 1]) ** 0.5)
    assert made(name, severity, grey(100, (200, 200))).std() / 255 == pytest.approx(sd, rel=0.03)


def test_impulse_noise_hits_single_values_with_black_and_white_evenly():
    result = made("impulse_noise", 5, grey(100, (200, 200)))
    assert set(np.unique(result)) == {0, 100, 255}
    assert (
        (result == 0).mean()
        == pytest.approx(0.135, abs=0.005)
        == pytest.approx((result == 255).mean(), abs=0.01)
    )
    assert ((result != 100).all(0)).mean() < 0.05  # not whole pixels


def test_bytes_are_cut_not_rounded():
    assert corrupt.to_bytes(np.array([0.999, 0.5, -1, 2])).tolist() == [254, 127, 0, 255]


def test_disk_of_radius_10_sums_to_more_than_one_and_is_kept():
    assert corrupt.disk(10, 0.5).sum() == pytest.approx(1.0108, abs=5e-5)
    assert corrupt.disk(10, 0.5).shape == (21, 21) and corrupt.disk(3, 0.1).shape == (17, 17)


def test_glass_blur_equals_the_definition_by_loops():
    sigma, reach, rounds = CORRUPTIONS["glass_blur"][1][2]
    x = waves()[:, :20, :24].transpose(1, 2, 0) / 255
    moves = np.random.default_rng(0).integers(
        -reach, reach, (rounds, 20 - 2 * reach, 24 - 2 * reach, 2)
    )
    z = (255 * ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")).astype(np.uint8)
    for n in range(rounds):
        for i in range(20 - reach - 1, reach - 1, -1):
            for j in range(24 - reach - 1, reach - 1, -1):
                dx, dy = moves[n, i - reach, j - reach]
                z[i, j] = z[i + dy, j + dx]
    expected = ndimage.gaussian_filter(z / 255, (sigma, sigma, 0), mode="nearest")
    result = corrupt.glass_blur(x, np.random.default_rng(0), sigma, reach, rounds)
    np.testing.assert_allclose(result, expected, atol=1e-12)


def test_contrast_keeps_the_mean_of_each_colour():
    result = made("contrast", 5)
    np.testing.assert_allclose(result.mean((1, 2)), waves().mean((1, 2)), atol=1)
    assert result.std() < 0.06 * waves().std() + 2


def test_brightness_of_grey_adds_to_it():
    assert np.unique(made("brightness", 2, grey(100))).tolist() == [int(255 * (100 / 255 + 0.2))]


def test_saturate_leaves_the_value_and_moves_grey_to_red_only_with_a_shift():
    assert (made("saturate", 2).max(0) == waves().max(0)).mean() > 0.9
    assert set(np.unique(made("saturate", 3, grey(100)))) <= {99, 100}
    assert made("saturate", 5, grey(100))[:, 0, 0].tolist() == [100, 80, 80]


def test_hsv_and_back_is_the_identity():
    x = np.random.default_rng(0).random((30, 30, 3))
    x[0], x[1, :, 0], x[2] = 0, 1, 0.25
    np.testing.assert_allclose(corrupt.to_rgb(*corrupt.to_hsv(x)), x, atol=1e-12)


def test_jpeg_gives_the_bytes_that_pillow_decodes():
    memory = io.BytesIO()
    Image.fromarray(waves().transpose(1, 2, 0)).save(memory, "JPEG", quality=15)
    np.testing.assert_array_equal(
        made("jpeg", 3).transpose(1, 2, 0), np.asarray(Image.open(memory))
    )


def test_frost_texture_has_the_mean_and_the_spread_of_a_photograph():
    ice = 255 * corrupt.frost_texture((256, 256), np.random.default_rng(0))
    np.testing.assert_allclose(ice.mean((0, 1)), [138, 153, 165], atol=1.5)
    assert ice[..., 0].std() == pytest.approx(28, abs=1.5)


def test_spatter_is_water_that_brightens_up_to_severity_3_and_mud_from_4_on():
    image = grey(100, (96, 96))
    assert all(
        made("spatter", s, image).min() >= 99 and made("spatter", s, image).max() > 120
        for s in (1, 2, 3)
    )
    for severity in (4, 5):
        result = made("spatter", severity, image)
        assert (
            result.max() <= 100
            and (abs(result.astype(int) - [[[63]], [[42]], [[20]]]).max(0) < 12).mean() > 0.02
        )


def test_equalise_spreads_bytes_evenly_and_leaves_one_value_alone():
    values = np.array([3, 3, 7, 9], np.uint8)
    assert corrupt.equalise(values).tolist() == [0, 0, 128, 255]
    assert corrupt.equalise(np.full(4, 20, np.uint8)).tolist() == [20] * 4


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", [1, 2, 3, 5])
def test_elastic_moves_the_label_with_the_image(severity):
    y, x = np.indices((96, 120))
    label = ((y - 50) ** 2 + (x - 60) ** 2 < 30**2).astype(np.uint8)
    image = np.repeat((200 * label)[None], 3, axis=0)
    moved = corrupt.elastic_label(
        label, np.random.default_rng(4), *CORRUPTIONS["elastic"][1][severity - 1]
    )
    result = made("elastic", severity, image, seed=4)[0] >= 100
    assert (moved != result).mean() < 0.004 and (moved != label).mean() > 0.01


def test_elastic_label_invents_no_number():
    ids = np.random.default_rng(0).choice([0, 3, 700], (40, 60)).astype(np.int32)
    moved = corrupt.elastic_label(ids, np.random.default_rng(0), *CORRUPTIONS["elastic"][1][4])
    assert set(np.unique(moved)) == {0, 3, 700} and moved.dtype == np.int32


def test_elastic_sends_the_three_points_where_they_were_drawn():
    jitter = 4.88
    affine, displaced = corrupt.elastic_field((60, 80), np.random.default_rng(2), 0, 2.44, jitter)
    points = np.array([30, 40]) + 20 * np.array([(1, 1), (1, -1), (-1, -1)])
    moved = points + np.random.default_rng(2).uniform(-jitter, jitter, (3, 2))
    back = [
        [ndimage.map_coordinates(part, point[:, None], order=1)[0] for part in affine]
        for point in moved
    ]
    np.testing.assert_allclose(back, points, atol=1e-9)
    np.testing.assert_array_equal(displaced, np.indices((60, 80)))  # strength 0


# --- the prepared folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("corrupt") / "glas"
    assert corrupt.main(["--make-fake", str(root), "--quiet"]) == 0
    return root


def run(clean, dst, *flags: object) -> int:
    return corrupt.main(["--src", str(clean), "--dst", str(dst), "--quiet", *map(str, flags)])


def test_corrupt_makes_75_splits_of_the_test_images(clean, tmp_path, capsys):
    assert run(clean, tmp_path / "p", "--limit", 1) == 0
    data, test = open_prepared(tmp_path / "p"), open_prepared(clean).cases("test", 1)
    names = [f"{name}-{severity}" for name in NAMES for severity in range(1, 6)]
    assert [s for s in data.meta["splits"] if s != "unlabelled"] == names
    assert (
        data.cases("jpeg-2") == [f"{test[0]}-jpeg-2"]
        and "75 cases (75 splits)" in capsys.readouterr().out
    )
    facts = data.meta["cases"][f"{test[0]}-jpeg-2"]
    assert (facts["clean"], facts["corruption"], facts["severity"]) == (test[0], "jpeg", 2)


def test_corrupt_leaves_labels_and_objects_alone_but_for_elastic(clean, tmp_path):
    assert (
        run(
            clean,
            tmp_path / "p",
            "--corruptions",
            "jpeg",
            "elastic",
            "--severities",
            5,
            "--limit",
            1,
        )
        == 0
    )
    data, before = open_prepared(tmp_path / "p"), open_prepared(clean)
    (case,) = before.cases("test", 1)
    for read, old in ((data.label, before.label(case)), (data.instances, before.instances(case))):
        np.testing.assert_array_equal(read(f"{case}-jpeg-5"), old)
        assert (np.array(read(f"{case}-elastic-5")) != old).any()


def test_corrupt_keeps_elastic_labels_where_they_were_if_asked(clean, tmp_path):
    flags = ("--corruptions", "elastic", "--severities", 5, "--limit", 1, "--warp-label", "off")
    assert run(clean, tmp_path / "p", *flags) == 0
    data, before = open_prepared(tmp_path / "p"), open_prepared(clean)
    (case,) = before.cases("test", 1)
    np.testing.assert_array_equal(data.label(f"{case}-elastic-5"), before.label(case))


def test_copy_depends_on_seed_case_corruption_and_severity_alone(clean, tmp_path):
    assert run(clean, tmp_path / "a", "--corruptions", "gaussian_noise", "--severities", 2) == 0
    assert run(clean, tmp_path / "b", "--corruptions", "frost", "gaussian_noise", "--limit", 2) == 0
    assert (
        run(
            clean, tmp_path / "c", "--corruptions", "gaussian_noise", "--severities", 2, "--seed", 1
        )
        == 0
    )
    a, b, c = (open_prepared(tmp_path / name) for name in "abc")
    copy = b.cases("gaussian_noise-2")[1]
    np.testing.assert_array_equal(a.image(copy), b.image(copy))
    assert (np.array(a.image(copy)) != c.image(copy)).any()


def test_copies_of_reduced_images_say_so(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "half")
    file = tmp_path / "half" / "dataset.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"settings": meta.get("settings", {}) | {"reduce": 2}}))
    flags = ("--corruptions", "jpeg", "--severities", 1, "--limit", 1)
    assert (
        run(tmp_path / "half", tmp_path / "p", *flags) == 0
        and run(clean, tmp_path / "q", *flags) == 0
    )
    assert data_record(open_prepared(tmp_path / "p"))["reduce"] == 2
    assert "reduce" not in open_prepared(tmp_path / "q").meta["settings"]


def test_corrupt_continues(clean, tmp_path, capsys):
    assert run(clean, tmp_path / "p", "--corruptions", "contrast", "--severities", 1) == 0
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "p" / "cases").rglob("image.npy")}
    assert run(clean, tmp_path / "p", "--corruptions", "contrast", "--severities", 1, 2) == 0
    assert "6 cases are there from an earlier run, 6 to do" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in times} == times


def test_corrupt_check_writes_nothing(clean, tmp_path, capsys):
    assert corrupt.main(["--src", str(clean), "--check", "--quiet", "--limit", "1"]) == 0
    assert "75 cases checked, no faults" in capsys.readouterr().out


def test_corrupt_refuses_a_folder_that_is_not_prepared_and_an_unknown_split(
    clean, tmp_path, capsys
):
    assert (
        run(tmp_path / "none", tmp_path / "p") == 2
        and run(clean, tmp_path / "p", "--split", "dev") == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no split 'dev', expected one of train, testA" in lines[1]
    assert (
        run(clean, tmp_path / "p", "--seed", -1) == 2
        and "expected a whole number of 0 or more" in capsys.readouterr().err
    )


def test_generator_differs_by_each_of_its_four_arguments():
    keys = [
        (0, "a", "frost", 1),
        (1, "a", "frost", 1),
        (0, "b", "frost", 1),
        (0, "a", "jpeg", 1),
        (0, "a", "frost", 2),
    ]
    assert len({corrupt.generator(*key).random() for key in keys}) == 5
