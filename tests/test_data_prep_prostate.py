"""The male pelvic structures to a prepared folder: split, window, values, institutions, each fault by its text."""

import argparse
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import patchddm
from common.loaders import (
    VolumeScan,
    data_record,
    open_data,
    read_nifti,
    read_window,
    symmetric_pad,
)
from data_prep import _prepare, prostate

NAMES = ["BladderMask", "BoneMask", "ObdInternMask", "TZ", "CG", "RectumMask", "SV", "NVB"]
WIDE, HIGH, LPS, FLOAT = "0003", "0004", "0005", "0006"  # what is odd about cases of the fake
NATIVE = ("--spacing", "1,1,3")  # of the fake, so that nothing is resampled


@pytest.fixture(scope="session")
def fakes(tmp_path_factory) -> Path:
    """Both layouts; not to be changed."""
    root = tmp_path_factory.mktemp("prostate")
    for layout in prostate.LAYOUTS:
        assert prostate.main(["--make-fake", str(root / layout), "--layout", layout]) == 0
    return root


@pytest.fixture
def src(fakes, tmp_path) -> Path:
    """The 16 cases of the small fake, which a test may damage."""
    return shutil.copytree(fakes / "few", tmp_path / "src")


@pytest.fixture(scope="session")
def done(fakes, tmp_path_factory) -> Path:
    """The small fake prepared with each --crop; not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    for crop in ("label", "centre", "none"):
        flags = [
            "--src",
            str(fakes / "few"),
            "--dst",
            str(root / crop),
            "--crop",
            crop,
            "--subset",
            "--quiet",
        ]
        assert prostate.main(flags) == 0
    return root


def run(*flags: object, capsys=None) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr."""
    if capsys:
        capsys.readouterr()
    code = prostate.main([*map(str, flags), "--quiet"])
    out, err = capsys.readouterr() if capsys else ("", "")
    return code, out, err.splitlines()


def listed(
    src: Path, *, subset: bool = True, spacing: tuple = prostate.SPACING, crop: str = "label"
):
    return prostate.read_source(src, argparse.Namespace(subset=subset, spacing=spacing, crop=crop))


def refused(src: Path, dst: Path, capsys, *flags: object) -> str:
    """The one line on stderr of a preparation of a subset that leaves with 2 and writes nothing."""
    code, out, lines = run("--src", src, "--dst", dst, "--subset", *flags, capsys=capsys)
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert not dst.exists() and lines[0].startswith("prostate: ")
    return lines[0].removeprefix("prostate: ")


def change(file: Path, function) -> Path:
    """Rewrite a NIfTI file with function(array)."""
    image = nib.load(file)
    array = function(np.asarray(image.dataobj).copy())
    affine = image.affine
    del image
    nib.save(nib.Nifti1Image(array, affine), file)
    return file


def at_first(value: float):
    """A function for `change`: sets the first voxel."""

    def set_voxel(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return set_voxel


def voxels(src: Path, name: str) -> np.ndarray:
    return np.asarray(nib.load(src / "data" / f"{name}.nii").dataobj)


# --- split and counts ------------------------------------------------------------------------------------------------


def test_prostate_split_is_the_papers_for_an_institution():
    splits = prostate.split_institutions(
        {f"c{i:02d}": "UCL" for i in range(12)}
    )  # floor(0.75 * 12) - 2 = 7
    assert splits["val"] == ["c00", "c01"]
    assert splits["train"] == ["c02", "c03", "c04", "c05", "c06"]
    assert splits["test"] == ["c07", "c08", "c09", "c10", "c11"]


@pytest.mark.parametrize(
    ("n", "sizes"), [(13, (5, 2, 6)), (14, (6, 2, 6)), (15, (7, 2, 6)), (7, (1, 2, 4))]
)
def test_prostate_split_rounds_three_quarters_down(n, sizes):
    splits = prostate.split_institutions({str(i): "UCL" for i in range(n)})
    assert tuple(map(len, splits.values())) == sizes


@pytest.mark.parametrize("n", range(1, 8))
def test_prostate_split_of_a_small_institution_puts_no_case_into_two_parts(n):
    splits = prostate.split_institutions({str(i): "UCL" for i in range(n)})
    assert sorted(case for ids in splits.values() for case in ids) == [
        str(i) for i in range(n)
    ] and len(splits["val"]) == min(n, 2)


def test_prostate_split_goes_by_institution_in_the_order_of_the_file(src):
    before = listed(src).splits
    assert before["val"] == [
        "0001",
        "0003",
        "0002",
        "0004",
    ]  # UCL has the odd lines, Prostate3T the even ones
    table = src / "institution.txt"
    table.write_text("\n".join(reversed(table.read_text().splitlines())))
    after = listed(src).splits
    assert after["val"] == ["0016", "0014", "0015", "0013"]
    assert after["train"] == ["0012", "0010", "0011", "0009"]


def test_prostate_with_the_published_counts_passes_and_prints_them(fakes, tmp_path, capsys):
    counts = (
        "cases 589 of 589, institutions 7 of 7, train 411 of 411, val 14 of 14, test 164 of 164"
    )
    code, out, lines = run("--src", fakes / "full", "--check", capsys=capsys)
    assert (code, lines) == (0, []) and "589 cases checked" in out and counts in out
    parts = listed(fakes / "full", subset=False).splits
    assert len({case for ids in parts.values() for case in ids}) == 589


def test_prostate_manifest_stands_beside_the_published_counts(done):
    meta = open_data(done / "label").meta
    line = "cases 16 of 589, institutions 2 of 7, train 4 of 411, val 4 of 14, test 8 of 164"
    assert f"  published    {line}" in meta["manifest"]
    assert meta["counts"]["test"] == {"found": 8, "published": 164}
    assert [len(meta["splits"][part]) for part in ("train", "val", "test", "unlabelled")] == [
        4,
        4,
        8,
        0,
    ]


def test_prostate_refuses_another_number_of_cases(fakes, src, tmp_path, capsys):
    table = src / "institution.txt"
    wrong = "cases 16, expected 589; institutions 2, expected 7; train 4, expected 411; "
    wrong += "val 4, expected 14; test 8, expected 164"
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    remedy = "as published; get it again, or pass --subset to prepare what is there"
    assert code == 2 and lines == [f"prostate: {table}: {wrong}, {remedy}; nothing was written"]
    assert not (tmp_path / "p").exists()
    one = tmp_path / "one"
    one.mkdir()
    (one / "data").symlink_to(fakes / "full" / "data")
    lines_of = (fakes / "full" / "institution.txt").read_text().splitlines()
    moved = [line.replace("UCL", "ProstateDx") if line == "0001 UCL" else line for line in lines_of]
    (one / "institution.txt").write_text("\n".join(moved))  # 589 cases, one in another institution
    assert any(
        "train 412, expected 411; test 163, expected 164" in fault
        for fault in listed(one, subset=False).faults
    )


def test_prostate_subset_leaves_all_others_where_the_whole_list_puts_them(src, tmp_path, capsys):
    whole = listed(src).splits
    for case in ("0001", "0007", "0016"):
        for file in (src / "data").glob(f"{case}_*"):
            file.unlink()
    source = listed(src)
    assert source.splits == {
        part: [c for c in ids if c not in ("0001", "0007", "0016")] for part, ids in whole.items()
    }
    table = src / "institution.txt"
    assert f"{table}: listed cases without files, left out: 3 (0001, 0007, 0016)" in source.notes
    code, out, _ = run("--src", src, "--dst", tmp_path / "p", "--subset", capsys=capsys)
    assert code == 0 and "cases 13 of 589" in out


def test_prostate_stores_each_cases_institution(done):
    where = open_data(done / "label").meta["institutions"]
    assert len(where) == 16 and where["0001"] == "UCL" and where["0002"] == "Prostate3T"


# --- window ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size", "box", "start"), [
    (300, 256, (100, 180), 12),
    (300, 256, (0, 50), 0),
    (300, 256, (250, 299), 44),
    (300, 256, (100, 181), 13),  # 140.5 - 128, rounded up
    (300, 256, (100, 179), 12),  # 139.5 - 128, rounded up
    (300, 255, (100, 180), 13),  # 140 - 127.5, rounded up
    (300, 256, (20, 299), 32),  # wider than the window
    (300, 256, None, 22),
    (301, 256, None, 22),  # the odd voxel is cut behind, as symmetric_pad pads
    (256, 256, (0, 9), 0),
    (40, 256, (30, 39), 0),
])  # fmt: skip
def test_crop_start_is_that_of_the_spec(n, size, box, start):
    label = None
    if box:
        label = np.zeros((4, n, 5), np.uint8)
        label[2, box[0], 3] = label[1, box[1], 2] = 3
    assert _prepare.crop_start((4, n, 5), (8, size, 8), label) == [0, start, 0]
    empty = _prepare.crop_start((4, n, 5), (8, size, 8), np.zeros((4, n, 5), np.uint8))
    assert empty == [0, max(symmetric_pad([size], [n])[0], 0), 0]


def box_start(label: np.ndarray, axis: int, size: int) -> int:
    """The rule in exact halves, by its words."""
    where = np.nonzero(label)[axis]
    twice = int(where.min()) + int(where.max()) - size
    return min(max((twice + 1) // 2, 0), label.shape[axis] - size)


@pytest.mark.parametrize(("case", "axis", "size"), [(WIDE, 0, 256), (HIGH, 2, 48)])
@pytest.mark.parametrize("crop", ["label", "centre"])
def test_prostate_cuts_only_the_longer_axis(done, case, axis, size, crop):
    full, data = open_data(done / "none"), open_data(done / crop)
    before, after = np.array(full.label(case)), np.array(data.label(case))
    n = before.shape[axis]
    assert n == (288 if axis == 0 else 58) and after.shape[axis] == size
    start = [0, 0, 0]
    start[axis] = box_start(before, axis, size) if crop == "label" else (n - size) // 2
    window = tuple(slice(s, s + m) for s, m in zip(start, after.shape))
    np.testing.assert_array_equal(after, before[window])
    np.testing.assert_array_equal(data.image(case)[0], full.image(case)[0][window])
    assert (
        before.shape[:axis] + before.shape[axis + 1 :]
        == after.shape[:axis] + after.shape[axis + 1 :]
    )
    np.testing.assert_allclose(
        data.affine(case) @ [0, 0, 0, 1], full.affine(case) @ [*start, 1], atol=1e-9
    )
    facts = data.meta["cases"][case]["crop"]
    lost = int((before > 0).sum() - (after > 0).sum())
    assert facts == {"shape": list(before.shape), "start": start, "label_voxels_outside": lost}


def test_prostate_crops_by_the_label_and_by_the_volume_differ_in_the_fake(done):
    starts = {c: open_data(done / c).meta["cases"] for c in ("label", "centre")}
    assert all(
        starts["label"][c]["crop"]["start"] != starts["centre"][c]["crop"]["start"]
        for c in (WIDE, HIGH)
    )


def test_prostate_manifest_counts_what_the_window_lost(done):
    facts = [c["crop"] for c in open_data(done / "centre").meta["cases"].values()]
    lost = [f["label_voxels_outside"] for f in facts if f["label_voxels_outside"]]
    line = f"2 cases were larger, {sum(lost):,} labelled voxels of {len(lost)} cases lie outside"
    assert sum(lost) > 0
    assert (
        f"  crop         centre, 256 x 256 x 48: {line}"
        in open_data(done / "centre").meta["manifest"]
    )
    line = "  crop         none; 256 x 256 x 48 would be the published window"
    assert line in open_data(done / "none").meta["manifest"]


def test_prostate_names_the_grid_to_pad_to_unless_nothing_is_cut(done):
    for crop in ("label", "centre", "none"):
        data = open_data(done / crop)
        assert data.meta["crop"] == {"kind": crop, "size": [256, 256, 48]}
        assert (
            data.meta.get("grid")
            == data_record(data).get("grid")
            == (None if crop == "none" else [256, 256, 48])
        )
    data = open_data(done / "label")
    front = symmetric_pad(data.shape(LPS), data.meta["grid"])
    assert front == (112, 114, 17)  # floor
    padded = read_window(data.label(LPS), [-f for f in front], data.meta["grid"])
    assert padded.shape == (256, 256, 48) and padded.sum() == data.label(LPS).sum()


def test_prostate_prediction_is_never_cut(fakes, done):
    for case in (WIDE, HIGH):
        file = read_nifti(fakes / "few" / "data" / f"{case}_img.nii")
        scan = VolumeScan(case, [file], data_record(open_data(done / "label")))
        np.testing.assert_array_equal(
            scan.image, np.array(open_data(done / "none").image(case), np.float32)
        )
        assert scan.mask(np.zeros((1, *scan.image.shape[1:]))).shape == (24, 20, 12)


@pytest.mark.parametrize(("spacing", "size"), [
    ("0.75,0.75,2.5", [256, 256, 48]),
    ("2.4,2.4,2.5", [80, 80, 48]),
    ("1.5,1,5", [128, 192, 32]),  # 24 slices: the nearest 16 is a tie that goes to the even one
    ("90", [16, 16, 16]),
])  # fmt: skip
def test_prostate_window_keeps_its_millimetres(src, spacing, size):
    assert listed(src, spacing=_prepare.parse_spacing(spacing)).crop == {
        "kind": "label",
        "size": size,
    }


# --- values ----------------------------------------------------------------------------------------------------------


def test_prostate_names_its_classes_as_published(done):
    data = open_data(done / "label")
    assert data.channels == ["T2"] and data.name == "prostate"
    assert list(data.classes.items()) == [(name, value) for value, name in enumerate(NAMES, 1)]
    assert data.meta["label_values"] == {str(v): v for v in range(9)}


def test_prostate_resamples_to_the_papers_spacing(done):
    data = open_data(done / "label")
    assert data.meta["spacing"] == [0.75, 0.75, 2.5] and data.spacing("0001") == (0.75, 0.75, 2.5)
    assert data.shape("0001") == (32, 27, 14)  # 24 * 1 / 0.75, 20 * 1 / 0.75, 12 * 3 / 2.5
    assert set(np.unique(data.label("0001"))) <= set(range(9))


def test_prostate_scales_by_minimum_and_maximum_of_the_whole_volume(src, tmp_path):
    change(src / "data" / "0001_img.nii", at_first(9000))  # one bright voxel decides
    assert run("--src", src, "--dst", tmp_path / "p", "--subset", *NATIVE)[0] == 0
    data = open_data(tmp_path / "p")
    for case in ("0001", "0002"):
        raw = voxels(src, f"{case}_img").astype(float)
        assert raw.min() > 0 and (case == "0002" or raw.max() == 9000)
        wanted = (raw - raw.min()) / (raw.max() - raw.min())
        np.testing.assert_allclose(data.image(case)[0], wanted, atol=5e-4)
        assert data.image(case).min() == 0 and data.image(case).max() == 1


def test_prostate_zeros_are_values_like_others(src, tmp_path):
    change(
        src / "data" / "0001_img.nii",
        lambda a: np.where(np.arange(20)[:, None] < 5, 0, a).astype(np.int16) - 50,
    )
    change(
        src / "data" / "0001_img.nii", lambda a: np.where(a == -50, 0, a).astype(np.int16)
    )  # a quarter is 0
    raw = voxels(src, "0001_img").astype(float)
    assert (raw == 0).mean() >= 0.25 and raw.min() < 0
    assert run("--src", src, "--dst", tmp_path / "p", "--subset", *NATIVE)[0] == 0
    wanted = (raw - raw.min()) / (raw.max() - raw.min())
    np.testing.assert_allclose(open_data(tmp_path / "p").image("0001")[0], wanted, atol=5e-4)


def test_prostate_turns_voxels_to_ras_and_reads_float_masks(fakes, tmp_path):
    src = fakes / "few"
    assert run("--src", src, "--dst", tmp_path / "p", "--subset", *NATIVE)[0] == 0
    data = open_data(tmp_path / "p")
    np.testing.assert_array_equal(data.label(LPS), voxels(src, f"{LPS}_mask")[::-1, ::-1])
    assert voxels(src, f"{FLOAT}_mask").dtype == np.float32
    np.testing.assert_array_equal(data.label(FLOAT), voxels(src, f"{FLOAT}_mask"))


# --- names -----------------------------------------------------------------------------------------------------------


def pack(folder: Path) -> None:
    for file in list(folder.glob("0*.nii")):
        nib.save(nib.load(file), file.with_name(f"{file.name}.gz"))
        file.unlink()


def into_a_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "zip" / "data")
    shutil.rmtree(folder)


@pytest.mark.parametrize("layout", [pack, into_a_folder])
def test_prostate_reads_packed_and_nested_files(src, layout):
    layout(src / "data")
    source = listed(src)
    assert len(source.cases) == 16 and source.faults == () and source.notes == ()


def test_prostate_finds_institution_txt_beside_and_below_the_folder(src):
    assert len(listed(src / "data").cases) == 16
    (src / "institution.txt").rename(src / "data" / "institution.txt")
    assert len(listed(src).cases) == 16


def test_prostate_reads_a_table_with_blank_lines_tabs_and_a_mark_in_front(src):
    table = src / "institution.txt"
    table.write_bytes(
        b"\xef\xbb\xbf" + table.read_text().replace(" ", "\t").replace("\n", "\r\n\r\n").encode()
    )
    assert len(listed(src).cases) == 16 and listed(src).faults == ()


def test_prostate_takes_ids_as_text_and_forgives_zeros_in_front(src):
    table = src / "institution.txt"
    table.write_text("\n".join(line.lstrip("0") for line in table.read_text().splitlines()))
    source = listed(src)
    assert source.faults == () and [case.id for case in source.cases] == [
        f"{n:04d}" for n in range(1, 17)
    ]
    told = "ids that agree only without the zeros in front: 16 (1 = 0001, 2 = 0002, 3 = 0003, 4 = 0004, 5 = 0005, …)"
    assert source.notes == (told,) and source.splits["val"][0] == "0001"


def test_prostate_keeps_ids_apart_that_differ_in_zeros_only(src):
    for kind in ("img", "mask"):
        shutil.copy(src / "data" / f"0002_{kind}.nii", src / "data" / f"02_{kind}.nii")
    with open(src / "institution.txt", "a") as table:
        table.write("02 Rutgers\n")
    source = listed(src)
    assert (
        source.faults == ()
        and source.notes == ()
        and {"02", "0002"} <= {case.id for case in source.cases}
    )
    assert source.entries["institutions"]["02"] == "Rutgers" and len(source.cases) == 17


def test_prostate_says_which_files_it_leaves_out_and_never_reads_a_macs(src):
    assert (src / "data" / "._0001_img.nii").exists()
    shutil.copy(src / "data" / "0001_img.nii", src / "data" / "prediction.nii")
    source = listed(src)
    assert (
        source.notes == (f"{src}: other NIfTI files, left out: 1 (prediction.nii)",)
        and len(source.cases) == 16
    )


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "word"), [("img", "image"), ("mask", "label")])
def test_prostate_names_the_file_that_a_case_lacks(src, tmp_path, capsys, kind, word):
    (src / "data" / f"0005_{kind}.nii").unlink()
    line = refused(src, tmp_path / "p", capsys)
    what = f"case 0005 has no {word}, expected 0005_{kind}.nii or .nii.gz; copy it"
    assert line == f"{src / 'data'}: {what}; nothing was written"


def test_prostate_names_a_listed_case_without_files(fakes, tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    shutil.copy(fakes / "full" / "institution.txt", src)
    (src / "data").mkdir()
    for file in (fakes / "full" / "data").iterdir():
        if not file.name.startswith("0100_"):
            (src / "data" / file.name).symlink_to(file)
    what = "case 0100 has no files, expected 0100_img.nii and 0100_mask.nii"
    remedy = "copy both files, take the line out of institution.txt, or pass --subset"
    assert listed(src, subset=False).faults == (f"{src / 'institution.txt'}: {what}; {remedy}",)


def test_prostate_names_a_case_without_institution(src, tmp_path, capsys):
    table = src / "institution.txt"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    line = refused(src, tmp_path / "p", capsys)
    what = f"case 0016 is not in {table}, expected a line with its institution; complete it"
    assert line == f"{src / 'data' / '0016_img.nii'}: {what}; nothing was written"


def test_prostate_names_two_files_for_one(src, tmp_path, capsys):
    (src / "copy").mkdir()
    shutil.copy(src / "data" / "0005_img.nii", src / "copy")
    line = refused(src, tmp_path / "p", capsys)
    assert (
        "case 0005 has 2 files for img, expected 1: " in line
        and str(src / "copy" / "0005_img.nii") in line
    )


@pytest.mark.parametrize(("old", "new", "text"), [
    ("0003 UCL", "0003", "line 3 is '0003', expected an id and an institution; correct it"),
    ("0003 UCL", "0003 UCL 7", "line 3 is '0003 UCL 7', expected an id and an institution; correct it"),
    ("0003 UCL", "0003 Oslo", f"line 3: institution 'Oslo', expected {', '.join(prostate.INSTITUTIONS)}; correct it"),
    ("0003 UCL", "0003 UCL\n0003 UCL",
     "line 4 gives 0003 to UCL, line 3 to UCL, expected one line for each id; remove one"),
    ("0003 UCL", "0003 UCL\n0003 bergen",
     "line 4 gives 0003 to bergen, line 3 to UCL, expected one line for each id; keep the right one"),
])  # fmt: skip
def test_prostate_names_a_wrong_line_of_institution_txt(src, old, new, text):
    table = src / "institution.txt"
    table.write_text(table.read_text().replace(old, new))
    assert f"{table}: {text}" in listed(src, subset=False).faults


def test_prostate_subset_accepts_an_institution_of_another_name(src):
    table = src / "institution.txt"
    table.write_text(table.read_text().replace("UCL", "Oslo"))
    assert listed(src).faults == () and [len(ids) for ids in listed(src).splits.values()] == [
        4,
        4,
        8,
    ]


@pytest.mark.parametrize(("value", "text"), [
    (9, "unknown label value 9 in 1 voxels, expected 0, 1, 2, 3, 4, 5, 6, 7, 8; correct the label"),
    (200, "unknown label value 200 in 1 voxels, expected 0, 1, 2, 3, 4, 5, 6, 7, 8; correct the label"),
])  # fmt: skip
def test_prostate_names_a_label_value_that_it_does_not_know(src, tmp_path, capsys, value, text):
    file = change(src / "data" / "0005_mask.nii", at_first(value))
    assert refused(src, tmp_path / "p", capsys) == f"{file}: {text}; nothing was written"


@pytest.mark.parametrize(("content", "text"), [
    ("", "is empty, expected lines of an id and an institution such as 001 UCL; get it again"),
    ("id,institution\n1,UCL\n", "begins with 'id,institution', expected lines of an id and an institution"),
])  # fmt: skip
def test_prostate_names_a_table_without_any_case(src, tmp_path, capsys, content, text):
    (src / "institution.txt").write_text(content)
    assert refused(src, tmp_path / "p", capsys).startswith(f"{src / 'institution.txt'}: {text}")


def test_prostate_names_a_folder_that_holds_none(tmp_path, capsys):
    src, p = tmp_path / "a" / "none", tmp_path / "p"
    assert (
        refused(src, p, capsys)
        == f"{src}: no such folder, expected data/ and institution.txt; check --src"
    )
    src.mkdir(parents=True)
    assert (
        refused(src, p, capsys)
        == f"{src}: no case found, expected files such as data/ID_img.nii; check --src"
    )
    (src / "data.zip").write_bytes(b"")
    assert refused(src, p, capsys).endswith("; unpack data.zip first")


def test_prostate_names_the_lack_of_institution_txt(src, tmp_path, capsys):
    (src / "institution.txt").unlink()
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(
        f"{src}: holds no institution.txt, expected the list of cases and institutions"
    )


def test_prostate_lists_all_faults_in_one_check(src, capsys):
    table, data = src / "institution.txt", src / "data"
    table.write_text(table.read_text().replace("0002 Prostate3T", "0002 Oslo"))
    (data / "0003_mask.nii").unlink()
    shutil.copy(data / "0004_img.nii", data / "x_img.nii")
    change(data / "0006_img.nii", lambda a: a[1:])
    change(data / "0007_mask.nii", at_first(99))
    (data / "0008_img.nii").write_bytes((data / "0008_img.nii").read_bytes()[:-9])
    code, out, lines = run("--src", src, "--check", capsys=capsys)
    assert (code, out) == (2, "") and lines[-1].startswith("prostate: 7 faults")
    wanted = [
        (f"{table}: line 2", ": institution 'Oslo'"),
        (data, "case 0003 has no label"),
        (data / "x_img.nii", "case x is not in"),
        (table, "cases 16, expected 589"),
        (data / "0006_mask.nii", "shape 24 x 20 x 12, while 0006_img.nii has 23 x 20 x 12"),
        (data / "0007_mask.nii", "unknown label value 99 in 1 voxels"),
        (data / "0008_img.nii", "the header promises 24 x 20 x 12 voxels"),
    ]
    assert len(lines) == 8
    for line, (where, text) in zip(lines, wanted):
        assert line.startswith(f"prostate: {where}") and text in line


# --- runs ------------------------------------------------------------------------------------------------------------


def test_prostate_continues_and_refuses_another_window_in_the_same_folder(src, tmp_path, capsys):
    assert run("--src", src, "--dst", tmp_path / "p", "--subset")[0] == 0
    before = {f: f.read_bytes() for f in (tmp_path / "p").rglob("*") if f.is_file()}
    shutil.rmtree(tmp_path / "p" / "cases" / WIDE)
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", "--subset", capsys=capsys)
    assert code == 0 and lines[-1] == "prostate: 15 cases are there from an earlier run, 1 to do"
    assert {f: f.read_bytes() for f in (tmp_path / "p").rglob("*") if f.is_file()} == before
    code, _, lines = run(
        "--src", src, "--dst", tmp_path / "p", "--subset", "--crop", "centre", capsys=capsys
    )
    assert (
        code == 2
        and "was prepared with crop {'kind': 'label', 'size': [256, 256, 48]}, now" in lines[0]
    )


def test_prostate_with_two_workers_writes_the_same_bytes(fakes, done, tmp_path):
    assert (
        run("--src", fakes / "few", "--dst", tmp_path / "p", "--subset", "--workers", "2")[0] == 0
    )
    for file in (done / "label").rglob("*"):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "p" / file.relative_to(done / "label")).read_bytes()
            )


def test_prostate_makes_a_fake_of_the_published_counts_by_default(tmp_path, capsys):
    assert run("--make-fake", tmp_path / "fake")[0] == 0
    assert len(list((tmp_path / "fake" / "data").glob("0*_mask.nii"))) == 589
    assert run("--src", tmp_path / "fake", "--check", capsys=capsys)[0] == 0


def test_prostate_folder_that_is_not_prepared_names_this_tool(tmp_path):
    with pytest.raises(_prepare.InputError, match=r"python -m data_prep\.prostate --src DIR --dst"):
        open_data(tmp_path / "prostate")


def test_prostate_trains_and_predicts_with_the_published_label_values(fakes, tmp_path):
    assert (
        run("--src", fakes / "few", "--dst", tmp_path / "p", "--subset", "--spacing", "6,6,7.5")[0]
        == 0
    )
    data, weights = open_data(tmp_path / "p"), tmp_path / "run" / "last.pt"
    assert data.meta["grid"] == [32, 32, 16]
    common = ["--device", "cpu", "--amp", "off", "--quiet"]
    network = ["--num-channels", "4", "--channel-mult", "1,2", "--num-groups", "2", "--patch", "16"]
    argv = [
        "train",
        "--data",
        str(tmp_path / "p"),
        "--out",
        str(weights.parent),
        "--preset",
        "tiny",
        "--steps",
        "1",
    ]
    assert patchddm.main([*argv, "--batch", "2", *network, *common]) == 0
    file, output = fakes / "few" / "data" / f"{WIDE}_img.nii", tmp_path / "mask.nii.gz"
    argv = [
        "predict",
        "--checkpoint",
        str(weights),
        "--image",
        str(file),
        "--output",
        str(output),
        "--sampling-steps",
        "1",
        *common,
    ]
    assert patchddm.main(argv) == 0
    mask = nib.load(output)
    assert mask.shape == (24, 20, 12) and set(np.unique(mask.dataobj)) <= set(range(9))
    np.testing.assert_array_equal(mask.affine, nib.load(file).affine)
