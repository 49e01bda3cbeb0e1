"""GlaS, MoNuSeg, FFHQ-34 and CelebA-19 from the publishers' files to prepared folders: values, splits, each fault."""

import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.loaders import open_data, read_image, read_mask
from data_prep import _prepare, ffhq34, glas, monuseg

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def fakes(tmp_path_factory) -> Path:
    """Folders as publishers give them; not to be changed."""
    root = tmp_path_factory.mktemp("fakes")
    assert glas.main(["--make-fake", str(root / "glas"), "--layout", "few"]) == 0
    assert monuseg.main(["--make-fake", str(root / "monuseg")]) == 0
    assert monuseg.main(["--make-fake", str(root / "archives"), "--layout", "zip"]) == 0
    assert ffhq34.main(["--make-fake", str(root / "faces")]) == 0
    return root


@pytest.fixture
def glands(fakes, tmp_path) -> Path:
    """A copy of the folder with the GlaS files that a test may damage."""
    return shutil.copytree(fakes / "glas" / glas.FOLDER, tmp_path / "src")


@pytest.fixture
def nuclei(fakes, tmp_path) -> Path:
    """A copy of MoNuSeg's test folder that a test may damage."""
    return shutil.copytree(fakes / "monuseg" / monuseg.TEST, tmp_path / "src" / monuseg.TEST)


def run(tool, *flags: object, capsys=None) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr."""
    if capsys:
        capsys.readouterr()
    code = tool.main([*map(str, flags), "--quiet"])
    out, err = capsys.readouterr() if capsys else ("", "")
    return code, out, err.splitlines()


def faults_of(tool, src: Path, capsys, *flags: object) -> list[str]:
    """What a preparation that is refused says, a line each; it leaves with 2 and writes nothing."""
    dst = src.parent / "prepared"
    code, out, lines = run(tool, "--src", src, "--dst", dst, *flags, capsys=capsys)
    assert (code, out, dst.exists()) == (2, "", False)
    return [line.split(": ", 1)[1] for line in lines]


def notes_of(tool, src: Path, capsys, *flags: object) -> list[str]:
    code, _, lines = run(tool, "--src", src, "--check", *flags, capsys=capsys)
    assert code == 0, lines
    return lines


# --- GlaS ------------------------------------------------------------------------------------------------------------


def prepared_glas(src: Path, dst: Path):
    assert run(glas, "--src", src, "--dst", dst, "--subset")[0] == 0
    return open_data(dst, "images")


def test_glas_stores_what_was_published(glands, tmp_path):
    data = prepared_glas(glands, tmp_path / "p")
    np.testing.assert_array_equal(data.image("train_2"), read_image(glands / "train_2.bmp"))
    np.testing.assert_array_equal(data.instances("train_2"), read_mask(glands / "train_2_anno.bmp"))


def test_glas_label_is_every_object(glands, tmp_path):
    data = prepared_glas(glands, tmp_path / "p")
    np.testing.assert_array_equal(data.label("train_2"), read_mask(glands / "train_2_anno.bmp") > 0)
    assert set(np.unique(data.instances("train_2"))) == {0, 1, 2, 5}  # numbers with a gap, kept


def test_glas_splits_are_the_publishers_in_the_order_of_text(glands, tmp_path):
    data = prepared_glas(glands, tmp_path / "p")
    assert data.cases("train")[:3] == ["train_1", "train_10", "train_2"]
    assert (
        data.cases("test") == data.cases("testA") + data.cases("testB")
        and len(data.cases("test")) == 6
    )
    assert sorted(data.cases("pretrain")) == sorted(data.meta["cases"]) and data.cases("val") == []


def test_glas_numbers_the_pieces_where_the_publisher_gave_one_number(glands, tmp_path, capsys):
    data = prepared_glas(glands, tmp_path / "p")
    assert set(np.unique(read_mask(glands / "testB_3_anno.bmp"))) == {0, 1}
    assert set(np.unique(data.instances("testB_3"))) == {0, 1, 2, 3}
    notes = notes_of(glas, glands, capsys, "--subset")
    assert [n for n in notes if "one number for 3 separate pieces, which are numbered here" in n]


def test_glas_leaves_a_binary_copy_as_it_is_and_says_so(glands, tmp_path, capsys):
    binary = (read_mask(glands / "train_1_anno.bmp") > 0).astype(np.uint8) * 255
    Image.fromarray(binary).save(glands / "train_1_anno.bmp")
    notes = notes_of(glas, glands, capsys, "--subset")
    assert [
        n
        for n in notes
        if "train_1_anno.bmp: one number for 3 separate pieces, taken as one object" in n
    ]
    assert prepared_glas(glands, tmp_path / "p").label("train_1").max() == 1


def test_glas_reads_jpg_images_and_png_annotations(glands, tmp_path):
    for file in glands.glob("t*.bmp"):
        Image.open(file).save(
            file.with_suffix(".png" if "anno" in file.name else ".jpg"), quality=95
        )
    published = read_mask(glands / "testA_2_anno.bmp")
    for file in glands.glob("t*.bmp"):
        file.unlink()
    data = prepared_glas(glands, tmp_path / "p")
    np.testing.assert_array_equal(data.instances("testA_2"), published)
    assert data.image("testA_2").shape[0] == 3 and len(data.meta["cases"]) == 16


def test_glas_reads_an_archive_and_a_folder_above_alike(fakes, glands, tmp_path):
    shutil.make_archive(str(tmp_path / "glas"), "zip", fakes / "glas")
    one, two = (
        prepared_glas(tmp_path / "glas.zip", tmp_path / "a"),
        prepared_glas(fakes / "glas", tmp_path / "b"),
    )
    assert one.meta["splits"] == two.meta["splits"]
    np.testing.assert_array_equal(one.image("testB_1"), two.image("testB_1"))


def test_glas_reduced_holds_means_of_colours_and_middle_numbers(glands, tmp_path):
    whole = prepared_glas(glands, tmp_path / "p")
    assert run(glas, "--src", glands, "--dst", tmp_path / "q", "--subset", "--reduce", 3)[0] == 0
    data = open_data(tmp_path / "q", "images")
    image, objects = np.asarray(whole.image("train_2")), np.asarray(whole.instances("train_2"))
    assert data.image("train_2").shape == (3, image.shape[1] // 3, image.shape[2] // 3)
    assert abs(int(data.image("train_2")[1, 2, 4]) - image[1, 6:9, 12:15].mean()) <= 0.5
    assert np.array_equal(
        data.instances("train_2"), objects[1::3, 1::3][: image.shape[1] // 3, : image.shape[2] // 3]
    )
    assert np.array_equal(data.label("train_2"), data.instances("train_2") > 0)
    assert data.meta["settings"] == {"reduce": 3} and "settings" not in whole.meta


def test_glas_refuses_to_mix_sizes_and_a_reduction_that_is_none(glands, tmp_path, capsys):
    prepared_glas(glands, tmp_path / "p")
    code, _, lines = run(
        glas, "--src", glands, "--dst", tmp_path / "p", "--subset", "--reduce", 2, capsys=capsys
    )
    assert (
        code == 2
        and len(lines) == 1
        and open_data(tmp_path / "p", "images").image("train_2").shape[2] == 48
    )
    code, _, lines = run(
        glas, "--src", glands, "--dst", tmp_path / "q", "--reduce", "0.5", capsys=capsys
    )
    assert code == 2 and "'0.5' is not a whole number from 1 to 16" in lines[0]


def test_glas_keeps_patients_and_grades(glands, tmp_path):
    facts = prepared_glas(glands, tmp_path / "p").meta["cases"]["testA_3"]
    assert facts["grade"] == "benign" and facts["patient"] == "7"


def test_glas_prepares_all_165_without_a_flag(tmp_path, capsys):
    assert glas.main(["--make-fake", str(tmp_path / "src")]) == 0
    code, out, _ = run(glas, "--src", tmp_path / "src", "--dst", tmp_path / "p", capsys=capsys)
    assert (
        code == 0
        and "(85 train, 60 testA, 20 testB, 80 test, 165 pretrain, 0 val, 0 unlabelled)" in out
    )
    data = open_data(tmp_path / "p", "images")
    assert data.cases("train", 8) == [f"train_{n}" for n in (1, 10, 11, 12, 13, 14, 15, 16)]


def test_glas_refuses_a_part_in_pieces_and_takes_one_that_is_absent(glands, capsys):
    faults = faults_of(glas, glands, capsys)
    assert [f for f in faults if "10 images of train, expected 85; get all, or pass --subset" in f]
    for file in glands.glob("testB*"):
        file.unlink()
    assert not [f for f in faults_of(glas, glands, capsys) if "testB" in f]


def test_glas_collects_all_faulty_cases_a_line_each(glands, capsys):
    (glands / "train_1.bmp").write_bytes((glands / "train_1.bmp").read_bytes()[:400])  # half a file
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(glands / "train_2_anno.bmp")  # another size
    (glands / "train_3_anno.bmp").unlink()
    (glands / "train_4.bmp").unlink()
    (glands / "train_5.bmp").write_bytes(b"<html>")
    mask = Image.open(glands / "train_6_anno.bmp").convert("P")
    mask.putpalette([9, 9, 9, 255, 0, 0])
    mask.save(glands / "train_6_anno.bmp")
    Image.open(glands / "train_7.bmp").save(glands / "train_7.png")
    Image.open(glands / "train_8.bmp").convert("L").save(glands / "train_8.bmp")
    Image.fromarray(np.zeros((36, 48), np.uint16)).save(glands / "train_9.bmp", format="TIFF")
    Image.open(glands / "testA_1_anno.bmp").save(glands / "testA_1_anno.jpg")
    (glands / "testA_1_anno.bmp").unlink()
    shutil.copy(glands / "testA_2.bmp", glands / "testA_61.bmp")
    shutil.copy(glands / "testA_2_anno.bmp", glands / "testA_61_anno.bmp")
    faults = faults_of(glas, glands, capsys, "--subset")
    for start, words in [
        ("train_1.bmp", "damaged or cut off"),
        ("train_2_anno.bmp", "7 x 5 pixels, the image has 48 x 40, expected the same"),
        ("train_3.bmp", "has no annotation, expected train_3_anno.bmp"),
        ("train_4_anno.bmp", "an annotation without image, expected train_4.bmp"),
        ("train_5.bmp", "holds an HTML or XML page"),
        ("train_6_anno.bmp", "a palette whose index 0 is not black"),
        ("train_7.bmp", f"{glands / 'train_7.png'} is of the same name, expected one image"),
        ("train_8.bmp", "a grey image, expected colours"),
        ("train_9.bmp", "more than 8 bits a channel"),
        ("testA_1_anno.jpg", "a mask in JPEG"),
    ]:
        assert [f for f in faults if f.startswith(f"{glands / start}: {words}")], (start, faults)
    assert [f for f in faults if f.startswith(f"{glands}: testA_61, expected testA_1 to testA_60")]
    assert (
        faults[-1] == "11 faults, in 7 cases and the list; correct them; nothing was written"
        and len(faults) == 12
    )


def test_glas_names_a_folder_without_glas(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    (line,) = faults_of(glas, tmp_path / "src", capsys)
    assert line.startswith(f"{tmp_path / 'src'}: no train_1.bmp, testA_1.bmp or the like below it")


def test_glas_leaves_what_a_mac_leaves_unread(glands, capsys):
    (glands / "__MACOSX").mkdir()
    (glands / "__MACOSX" / "train_1.bmp").write_bytes(b"no image")
    (glands / ".DS_Store").write_bytes(b"no image")
    assert not [
        note for note in notes_of(glas, glands, capsys, "--subset") if "other names" in note
    ]


def test_glas_does_the_same_with_two_workers(glands, tmp_path):
    prepared_glas(glands, tmp_path / "one")
    assert (
        run(glas, "--src", glands, "--dst", tmp_path / "two", "--subset", "--workers", "2")[0] == 0
    )
    one, two = (
        {f.relative_to(root): f.read_bytes() for f in (root / "cases").rglob("*.*")}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two


def test_glas_continues_and_prepares_only_what_changed(glands, tmp_path, capsys):
    prepared_glas(glands, tmp_path / "p")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "p" / "cases").rglob("image.npy")}
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(glands / "train_2.bmp")
    code, _, lines = run(glas, "--src", glands, "--dst", tmp_path / "p", "--subset", capsys=capsys)
    assert code == 0 and "glas: 15 cases are there from an earlier run, 1 to do" in lines
    changed = {f.parent.name for f, t in times.items() if f.stat().st_mtime_ns != t}
    assert (
        changed == {"train_2"} and open_data(tmp_path / "p", "images").image("train_2").max() == 0
    )


def test_glas_notices_grades_that_came_later(glands, tmp_path):
    (glands / "Grade.csv").rename(tmp_path / "Grade.csv")
    assert "grade" not in prepared_glas(glands, tmp_path / "p").meta["cases"]["testA_3"]
    (tmp_path / "Grade.csv").rename(glands / "Grade.csv")
    assert prepared_glas(glands, tmp_path / "p").meta["cases"]["testA_3"]["grade"] == "benign"


def test_glas_stopped_midway_leaves_nothing_half_and_continues(
    glands, tmp_path, monkeypatch, capsys
):
    real, seen = _prepare.flat_case, []

    def third_fails(*args):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(_prepare, "flat_case", third_fails)
    assert run(glas, "--src", glands, "--dst", tmp_path / "p", "--subset")[0] == 130
    assert (
        len(list((tmp_path / "p" / "cases").iterdir())) == 2
        and not (tmp_path / "p" / "dataset.json").exists()
    )
    monkeypatch.setattr(_prepare, "flat_case", real)
    assert run(glas, "--src", glands, "--dst", tmp_path / "p", "--subset", capsys=capsys)[0] == 0
    assert len(open_data(tmp_path / "p", "images").meta["cases"]) == 16


def test_glas_has_no_flags_of_volumes(capsys):
    code, _, lines = run(glas, "--src", "x", "--dst", "y", "--spacing", "1", capsys=capsys)
    assert code == 2 and "unrecognized arguments: --spacing 1" in lines[0]


# --- MoNuSeg: polygons -----------------------------------------------------------------------------------------------


def square(x, y, width, height) -> np.ndarray:
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def filled(points, offset=0.5, shape=(20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    rows, columns, inside = monuseg.inside_polygon(np.asarray(points, float), shape, offset)
    mask[rows, columns] = inside
    return mask


def brute(points, offset, shape) -> np.ndarray:
    """Even-odd rule, a pixel and an edge at a time."""
    mask = np.zeros(shape, bool)
    for i, j in np.ndindex(shape):
        x, y = j + offset, i + offset
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0)):
            if (y1 <= y) != (y2 <= y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
                mask[i, j] ^= True
    return mask


@pytest.mark.parametrize(
    ("offset", "rows", "columns"), [(0.5, (3, 7), (2, 5)), (1, (2, 6), (1, 4))]
)
def test_polygon_of_the_specified_square_has_its_20_pixels(offset, rows, columns):
    y, x = np.nonzero(filled(square(2, 3, 4, 5), offset))
    assert len(y) == 20 and (y.min(), y.max()) == rows and (x.min(), x.max()) == columns


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("offset", [0, 0.5, 1])
def test_polygon_equals_the_even_odd_rule(seed, offset):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-6, 26, (rng.integers(3, 9), 2))  # crosses itself and the border
    if seed % 2:
        points = np.round(points)  # vertices and edges on the tested points
    np.testing.assert_array_equal(filled(points, offset), brute(points, offset, (20, 20)))


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_none():
    corners = np.array([(3, 2), (14, 4), (12, 15), (4, 13)], float)
    centre = np.array([8.5, 8.5])
    total = sum(filled([corners[i], corners[(i + 1) % 4], centre]).astype(int) for i in range(4))
    np.testing.assert_array_equal(total, filled(corners))


def test_polygon_far_outside_has_no_pixel():
    assert not filled(square(-1e9, -1e9, 5, 5)).any() and not filled(square(30, 5, 9, 9)).any()


def test_instances_give_contested_pixels_to_the_earlier_region():
    instances, counts = monuseg.draw_instances(
        [square(0, 0, 4, 4), square(2, 2, 4, 4)], (10, 10), 0.5
    )
    assert (
        np.bincount(instances.ravel()).tolist() == [72, 16, 12] and counts["contested_pixels"] == 4
    )


def test_instances_count_and_leave_out_regions_without_area_or_pixel():
    regions = [
        square(1, 1, 2, 2)[:2],
        square(50, 50, 2, 2),
        square(5, 5, 2, 2),
        square(-2, -2, 4, 4),
    ]
    instances, counts = monuseg.draw_instances(regions, (10, 10), 0.5)
    assert set(np.unique(instances)) == {0, 3, 4}
    assert (counts["few_vertices"], counts["no_pixel"], counts["clipped"]) == (1, 1, 1)


# --- MoNuSeg: files --------------------------------------------------------------------------------------------------


def prepared_monuseg(src: Path, dst: Path, *flags: object):
    assert run(monuseg, "--src", src, "--dst", dst, *flags)[0] == 0
    return open_data(dst, "images")


def test_monuseg_splits_are_the_papers(fakes, tmp_path):
    data = prepared_monuseg(fakes / "monuseg", tmp_path / "p")
    numbers = {name: len(ids) for name, ids in data.meta["splits"].items()}
    assert numbers == {
        "train": 29,
        "test": 14,
        "extra": 7,
        "pretrain": 44,
        "val": 0,
        "unlabelled": 1,
    }
    assert {case[5:12] for case in data.cases("extra")} == set(monuseg.EXTRA)
    assert not set(data.cases("pretrain")) & set(data.cases("extra"))
    assert all(
        data.cases(split) == sorted(data.cases(split)) for split in ("train", "test", "pretrain")
    )


def test_monuseg_keeps_images_without_xml_for_pretraining_and_says_so(fakes, tmp_path, capsys):
    data = prepared_monuseg(fakes / "monuseg", tmp_path / "p")
    (case,) = data.cases("unlabelled")
    assert (
        case in data.cases("pretrain") and not data.has_label(case) and data.instances(case) is None
    )
    notes = notes_of(monuseg, fakes / "monuseg", capsys)
    assert [n for n in notes if f"images without XML, for pre-training only: 1 ({case})" in n]


def test_monuseg_reads_archives_and_folders_alike(fakes, tmp_path):
    one = prepared_monuseg(fakes / "monuseg", tmp_path / "a")
    two = prepared_monuseg(fakes / "archives", tmp_path / "b")
    assert one.meta["splits"] == two.meta["splits"]
    for case in one.cases("test") + one.cases("train", 3):
        np.testing.assert_array_equal(one.image(case), two.image(case))
        np.testing.assert_array_equal(one.instances(case), two.instances(case))


def test_monuseg_continues_from_an_archive(fakes, tmp_path, capsys):
    prepared_monuseg(fakes / "archives", tmp_path / "p")
    (tmp_path / "p" / "dataset.json").unlink()
    code, _, lines = run(
        monuseg, "--src", fakes / "archives", "--dst", tmp_path / "p", capsys=capsys
    )
    assert code == 0 and "monuseg: 51 cases are there from an earlier run, 0 to do" in lines


def test_monuseg_numbers_regions_by_their_place_not_by_their_id(fakes, tmp_path):
    data = prepared_monuseg(fakes / "monuseg", tmp_path / "p")
    case = data.cases("test")[0]
    assert 'Id="15"' in (fakes / "monuseg" / monuseg.TEST / f"{case}.xml").read_text()
    assert set(np.unique(data.instances(case))) == {0, 1, 2, 3, 4, 5}
    np.testing.assert_array_equal(data.label(case), np.array(data.instances(case)) > 0)


def test_monuseg_offset_moves_the_outlines(nuclei, tmp_path):
    half = prepared_monuseg(nuclei.parent, tmp_path / "a", "--subset")
    one = prepared_monuseg(nuclei.parent, tmp_path / "b", "--subset", "--offset", "1")
    case = half.cases("test")[0]
    assert (
        half.meta["settings"] == {"offset": 0.5}
        and (np.array(half.label(case)) != one.label(case)).any()
    )


def test_monuseg_reduced_holds_means_of_colours_and_middle_numbers(fakes, tmp_path):
    whole, half = (tmp_path / name for name in "pq")
    assert run(monuseg, "--src", fakes / "monuseg", "--dst", whole)[0] == 0
    assert run(monuseg, "--src", fakes / "monuseg", "--dst", half, "--reduce", 2)[0] == 0
    whole, half = open_data(whole, "images"), open_data(half, "images")
    assert half.meta["settings"] == {"offset": 0.5, "reduce": 2} and whole.meta["settings"] == {
        "offset": 0.5
    }
    for case in whole.cases("pretrain"):
        blocks = np.asarray(whole.image(case))
        rows, columns = (n // 2 for n in blocks.shape[1:])
        means = blocks[:, : 2 * rows, : 2 * columns].reshape(3, rows, 2, columns, 2).mean((2, 4))
        assert np.abs(half.image(case) - means).max() <= 0.5
        if whole.has_label(case):
            np.testing.assert_array_equal(
                half.instances(case), np.asarray(whole.instances(case))[1::2, 1::2][:rows, :columns]
            )


def test_monuseg_refuses_a_folder_of_another_offset(nuclei, tmp_path, capsys):
    prepared_monuseg(nuclei.parent, tmp_path / "p", "--subset")
    flags = ("--src", nuclei.parent, "--dst", tmp_path / "p", "--subset", "--offset", "1")
    code, _, (line,) = run(monuseg, *flags, capsys=capsys)
    assert code == 2 and "was prepared with settings {'offset': 0.5}, now {'offset': 1.0}" in line


def test_monuseg_says_how_many_regions_it_left_out(fakes, capsys):
    notes = notes_of(monuseg, fakes / "monuseg", capsys)
    assert [
        n
        for n in notes
        if "of 6 regions left out: 1 of fewer than 3 vertices, 0 without a pixel" in n
    ]


def test_monuseg_refuses_fewer_images_than_published(nuclei, capsys):
    (nuclei / next(f.name for f in nuclei.glob("*.tif"))).with_suffix(".xml").unlink()
    next(nuclei.glob("*.tif")).unlink()
    faults = faults_of(monuseg, nuclei.parent, capsys)
    assert [
        f
        for f in faults
        if "13 images of test, expected 14; get both archives, or pass --subset" in f
    ]


def test_monuseg_collects_all_faulty_cases_a_line_each(nuclei, capsys):
    stems = sorted(f.stem for f in nuclei.glob("*.tif"))
    tif, xml = ([nuclei / f"{stem}.{end}" for stem in stems] for end in ("tif", "xml"))
    tif[0].write_bytes(tif[0].read_bytes()[:900])
    xml[1].write_text(xml[1].read_text()[:300])
    xml[2].write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + xml[2].read_text())
    xml[3].write_text(xml[3].read_text().replace('X="', 'X="a', 1))
    xml[4].write_text("<Annotations><Annotation/></Annotations>")
    xml[5].write_text(xml[5].read_text().replace('X="', 'X="9'))
    tif[6].unlink()
    shutil.copy(tif[7], nuclei.parent / tif[7].name)
    xml[8].write_text(xml[8].read_text().replace('X="', 'X="nan" W="', 1))
    faults = faults_of(monuseg, nuclei.parent, capsys, "--subset")
    for file, words in [
        (tif[0], "damaged or cut off"),
        (xml[1], "not XML, or cut off"),
        (xml[2], "XML with a document type of its own"),
        (xml[3], "region 1 has a vertex without number"),
        (xml[4], "holds no Region, expected one for each nucleus"),
        (
            xml[5],
            "5 of 5 regions have no pixel in the image of 40 x 40; is it the XML of another image?",
        ),
        (xml[6], f"outlines without image, expected {stems[6]}.tif"),
        (nuclei.parent / tif[7].name, ""),
        (xml[8], "region 1 has a vertex at NaN or Inf"),
    ]:
        assert [f for f in faults if str(file) in f and words in f], (file, faults)
    assert len(faults) == 10


def test_monuseg_names_a_download_that_failed(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "MoNuSegTestData.zip"
    file.write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    (line,) = faults_of(monuseg, tmp_path / "src", capsys)
    assert (
        line
        == f"{file}: an HTML page, left by a download that failed, expected a zip archive; get it again"
    )


def test_monuseg_names_half_an_archive(fakes, tmp_path, capsys):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "MoNuSegTestData.zip"
    file.write_bytes((fakes / "archives" / file.name).read_bytes()[:9000])
    (line,) = faults_of(monuseg, tmp_path / "src", capsys)
    assert line.startswith(f"{file}: damaged or cut off (File is not a zip file)")


def test_archive_cannot_name_a_file_outside_of_it(fakes, tmp_path, capsys):
    (tmp_path / "src").mkdir()
    with zipfile.ZipFile(tmp_path / "src" / "x.zip", "w") as packed:
        packed.write(next((fakes / "monuseg" / monuseg.TEST).glob("*.tif")), "TCGA-AA-0001-01A.tif")
        packed.writestr(zipfile.ZipInfo(str(tmp_path / "TCGA-AA-0002-01A.tif")), b"")
    assert run(monuseg, "--src", tmp_path / "src", "--dst", tmp_path / "p", "--subset")[0] == 0
    assert open_data(tmp_path / "p", "images").cases("pretrain") == ["TCGA-AA-0001-01A"]


def test_monuseg_names_a_damaged_file_inside_an_archive(fakes, tmp_path, capsys):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "MoNuSegTestData.zip"
    blob = bytearray((fakes / "archives" / file.name).read_bytes())
    with zipfile.ZipFile(fakes / "archives" / file.name) as packed:
        info = packed.infolist()[0]
    at = info.header_offset + 30 + len(info.filename) + 500
    blob[at : at + 8] = bytes(8)
    file.write_bytes(blob)
    faults = faults_of(monuseg, tmp_path / "src", capsys, "--subset")
    assert len(faults) == 1 and f"{file}: damaged or cut off (Bad CRC-32" in faults[0]


# --- FFHQ-34 and CelebA-19 -------------------------------------------------------------------------------------------


@pytest.fixture
def faces(fakes, tmp_path) -> Path:
    """A copy of ffhq_34 that a test may damage."""
    return shutil.copytree(fakes / "faces" / "ffhq_34", tmp_path / "src" / "ffhq_34")


def test_ffhq34_pairs_by_stem_and_keeps_the_folders_as_splits(faces, tmp_path):
    assert run(ffhq34, "--src", faces, "--dst", tmp_path / "p", "--size", "32")[0] == 0
    data = open_data(tmp_path / "p", "images")
    assert data.cases("train") == [f"train_{i:05d}" for i in range(20)] == data.cases("pretrain")
    assert len(data.cases("test")) == 20 and data.name == "ffhq34" and data.ignore == 255
    assert list(data.classes.values()) == list(range(1, 34))
    np.testing.assert_array_equal(
        data.label("train_00002"), np.load(faces / "real" / "train" / "00002.npy")
    )


def test_ffhq34_resizes_labels_to_values_that_are_there(faces, tmp_path):
    assert run(ffhq34, "--src", faces, "--dst", tmp_path / "p", "--size", "50")[0] == 0
    data, published = (
        open_data(tmp_path / "p", "images"),
        np.load(faces / "real" / "train" / "00001.npy"),
    )
    assert data.shape("train_00001") == (50, 50) and set(
        np.unique(data.label("train_00001"))
    ) <= set(published.flat)
    assert (np.array(data.label("train_00001"))[0] == 255).all()


def test_ffhq34_does_not_count_ignored_pixels(faces, tmp_path):
    assert run(ffhq34, "--src", faces, "--dst", tmp_path / "p", "--size", "36")[0] == 0
    data = open_data(tmp_path / "p", "images")
    counts = data.meta["cases"]["train_00001"]["label_voxels"]
    assert len(counts) == 34 and sum(counts) == 31 * 36


def test_ffhq34_reads_celeba19_too(tmp_path, capsys):
    assert ffhq34.main(["--make-fake", str(tmp_path / "src"), "--layout", "celeba_19"]) == 0
    _, out, _ = run(ffhq34, "--src", tmp_path / "src", "--check", capsys=capsys)
    assert "published    train 20 of 20, test 500 of 500" in out
    for file in (tmp_path / "src").glob("*/real/test/00[1-4]*"):
        file.unlink()
    assert (
        run(ffhq34, "--src", tmp_path / "src", "--dst", tmp_path / "p", "--size", "8", "--subset")[
            0
        ]
        == 0
    )
    data = open_data(tmp_path / "p", "images")
    assert (data.name, len(data.classes), len(data.cases("test"))) == ("celeba19", 18, 100)


def test_ffhq34_takes_photographs_for_pretraining(faces, tmp_path):
    (tmp_path / "photos" / "0").mkdir(parents=True)
    Image.new("RGB", (40, 40), (9, 8, 7)).save(tmp_path / "photos" / "0" / "a.png")
    flags = (
        "--src",
        faces,
        "--dst",
        tmp_path / "p",
        "--size",
        "16",
        "--photographs",
        tmp_path / "photos",
    )
    assert run(ffhq34, *flags)[0] == 0
    data = open_data(tmp_path / "p", "images")
    assert data.cases("unlabelled") == ["photo_a"] == data.cases("pretrain")[-1:]
    assert data.image("photo_a")[:, 3, 3].tolist() == [9, 8, 7]


def test_ffhq34_collects_all_faulty_cases_a_line_each(faces, capsys):
    train = faces / "real" / "train"
    np.save(train / "00000.npy", np.full((32, 32), 34))
    np.save(train / "00001.npy", np.zeros((30, 32), int))
    np.save(train / "00002.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (train / "00003.npy").write_bytes((train / "00003.npy").read_bytes()[:200])
    (train / "00004.npy").unlink()
    (train / "00005.jpg").unlink()
    Image.new("RGB", (32, 30)).save(train / "00006.png")
    (train / "00007.jpg").write_bytes((train / "00007.jpg").read_bytes()[:300])
    Image.new("RGB", (32, 32)).save(train / "00008.jpg")
    faults = faults_of(ffhq34, faces, capsys, "--subset")
    for name, words in [
        ("00000.npy", "unknown label value 34 in 1,024 voxels"),
        ("00001.npy", "32 x 30 pixels, expected a square"),
        ("00002.npy", "not a readable array of numbers"),
        ("00003.npy", "not a readable array of numbers"),
        ("00004.png", "has no class map, expected 00004.npy beside it"),
        ("00005.npy", "a class map without image"),
        ("00006.png", "32 x 30 pixels, expected a square"),
        ("00007.jpg", "damaged or cut off"),
        ("00008.png", "00008.jpg has the same stem"),
    ]:
        assert [f for f in faults if f.startswith(f"{train / name}: {words}")], (name, faults)
    assert len(faults) == 10


def test_ffhq34_refuses_other_numbers_than_published(faces, capsys):
    for file in (faces / "real" / "test").glob("00000.*"):
        file.unlink()
    (line,) = faults_of(ffhq34, faces, capsys)
    assert line.startswith(
        f"{faces / 'real' / 'test'}: 19 pairs, expected 20; get all, or pass --subset"
    )


def test_ffhq34_names_a_folder_with_both_sets(faces, capsys):
    shutil.copytree(faces, faces.parent / "celeba_19")
    (line,) = faults_of(ffhq34, faces.parent, capsys)
    assert "holds both ffhq_34 and celeba_19; give one of them as --src" in line


# --- the command line ------------------------------------------------------------------------------------------------


def test_preparation_killed_by_a_signal_leaves_143_and_no_half_case(tmp_path):
    assert glas.main(["--make-fake", str(tmp_path / "src")]) == 0
    command = [
        sys.executable,
        "-m",
        "data_prep.glas",
        "--src",
        tmp_path / "src",
        "--dst",
        tmp_path / "p",
        "--quiet",
    ]
    child = subprocess.Popen([*map(str, command)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list((tmp_path / "p" / "cases").glob("t*")):
        time.sleep(0.002)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) in (143, 0)
    names = [f.name for f in (tmp_path / "p" / "cases").iterdir()]
    assert names and not [n for n in names if n.startswith(".")]
    assert run(glas, "--src", tmp_path / "src", "--dst", tmp_path / "p")[0] == 0
    assert len(json.loads((tmp_path / "p" / "dataset.json").read_text())["cases"]) == 165
