"""BraTS of five years to a prepared folder: names, labels, the authors' split, geometry, each fault by its text."""

import argparse
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import patchddm
from common.loaders import VolumeScan, data_record, open_data, read_nifti
from data_prep import brats
from data_prep._prepare import make_splits

# PatchDDM's published lists, of the official numbers
VAL = """29 32 33 39 43 54 58 83 85 92 106 120 122 128 129 152 164 184 186 203 204 245 258 263 268 274 289 291 292 316
    318 326 333 337 342 365 368"""
TEST = """10 26 40 48 71 73 88 89 100 116 118 148 166 173 175 178 193 194 196 198 212 243 244 252 266 278 286 293 315
    324 334 336 338 340 354 356 360"""
OLD, NEW = ("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f")


@pytest.fixture(scope="session")
def fakes(tmp_path_factory) -> Path:
    """A folder for each layout, as publishers give them; not to be changed."""
    root = tmp_path_factory.mktemp("brats")
    for layout in brats.LAYOUTS:
        assert brats.main(["--make-fake", str(root / layout), "--layout", layout]) == 0
    return root


@pytest.fixture
def src(fakes, tmp_path) -> Path:
    """Four labelled cases of 2021 in one folder each, which a test may damage."""
    return some_cases(fakes, tmp_path / "src", 4)


def some_cases(fakes: Path, target: Path, count: int, layout: str = "2021") -> Path:
    """A copy of the first `count` training cases of a fake."""
    folders = sorted(
        {f.parent for f in (fakes / layout).rglob("*[_-]t1*") if "alidation" not in str(f)}
    )
    for folder in folders[:count]:
        shutil.copytree(folder, target / folder.name, ignore=shutil.ignore_patterns("._*"))
    return target


def run(*flags: object, capsys=None) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr."""
    if capsys:
        capsys.readouterr()
    code = brats.main([*map(str, flags), "--quiet"])
    out, err = capsys.readouterr() if capsys else ("", "")
    return code, out, err.splitlines()


def listed(src: Path, classes: str = "all") -> brats.Source:
    return brats.read_source(src, argparse.Namespace(classes=classes, workers=1, quiet=True))


def refused(src: Path, dst: Path, capsys, *flags: object) -> str:
    """The one line on stderr of a preparation that leaves with 2 and writes nothing."""
    code, out, lines = run("--src", src, "--dst", dst, *flags, capsys=capsys)
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert not dst.exists() and lines[0].startswith("brats: ")
    return lines[0].removeprefix("brats: ")


def change(file: Path, function, affine=None) -> Path:
    """Rewrite a NIfTI file with function(array), codes and affine kept unless one is given."""
    image = nib.load(file)
    array = function(np.asarray(image.dataobj).copy())
    new = nib.Nifti1Image(
        array,
        image.affine if affine is None else affine,
        None if affine is not None else image.header,
    )
    new.set_data_dtype(array.dtype)
    nib.save(new, file)
    return file


def find(src: Path, name: str) -> Path:
    """The file of this name, or of the name with .gz."""
    return next(
        f for f in sorted(src.rglob("*.nii*")) if f.is_file() and f.name in (name, f"{name}.gz")
    )


def voxels(src: Path, name: str) -> np.ndarray:
    """Voxels turned from LPS to RAS."""
    return np.asarray(nib.load(find(src, f"{name}.nii")).dataobj)[::-1, ::-1]


def replace_values(src: Path, old: int, new: int) -> None:
    for file in src.rglob("*seg.nii*"):
        change(file, lambda a: np.where(a == old, new, a).astype(a.dtype))


# --- names -----------------------------------------------------------------------------------------------------------

FIRST = {"2018": "Brats18_2013_2_1", "2020": "BraTS20_Training_003", "2021": "BraTS2021_00002",
         "2023": "BraTS-GLI-00002-001"}  # fmt: skip


@pytest.mark.parametrize("layout", brats.LAYOUTS)
def test_brats_prepares_each_years_layout(fakes, tmp_path, capsys, layout):
    code, out, lines = run(
        "--src", fakes / layout, "--dst", tmp_path / "p", "--classes", "all", capsys=capsys
    )
    assert (
        code == 0
        and "11 cases (8 train, 1 val, 1 test, 1 unlabelled)" in out
        and "LPS -> RAS" in out
    )
    data = open_data(tmp_path / "p")
    assert data.channels == ["t1", "t1ce", "t2", "flair"]
    case, hyphens = FIRST[layout], layout == "2023"
    image, label = np.array(data.image(case)), np.array(data.label(case))
    assert image.dtype == np.float16 and label.dtype == np.uint8 and (image[:, label > 0] > 0).any()
    for channel, name in enumerate(
        NEW if hyphens else OLD
    ):  # each channel's order of brightness is its own file's
        raw = voxels(fakes / layout, f"{case}{'-' if hyphens else '_'}{name}")
        assert (
            np.diff(image[channel].ravel()[np.argsort(raw.ravel(), kind="stable")].astype(float))
            >= 0
        ).all()
    told = (
        "-t1n = t1, -t1c = t1ce, -t2w = t2, -t2f = flair" if hyphens else "_t1, _t1ce, _t2, _flair"
    )
    assert lines.count(f"brats: note: channels from files named {told}") == 1
    assert sum("cases without label, prepared as unlabelled: 1 (" in line for line in lines) == 1
    assert data.has_label(case) and not data.has_label(data.cases("unlabelled")[0])


def test_brats_reads_grades_and_flat_folders_alike(fakes):
    ids = [case.id for case in listed(fakes / "2018").cases]
    assert len(ids) == 11 and {
        "Brats18_2013_10_1",
        "Brats18_TCIA10_103_1",
        "Brats18_UAB_3448_1",
    } <= set(ids)
    assert ids.index("Brats18_2013_2_1") < ids.index("Brats18_2013_10_1")


def test_brats_reads_many_cases_in_one_folder(fakes, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in some_cases(fakes, tmp_path / "src", 3).rglob("*.nii.gz"):
        file.rename(flat / file.name)
    (flat / "BraTS2021_00002_seg.nii.gz").unlink()
    shutil.copy(
        flat / "BraTS2021_00000_seg.nii.gz", flat / "odd.nii.gz"
    )  # whose it is, nobody can tell
    source = listed(flat)
    assert [case.label and case.label.name[:15] for case in source.cases] == [
        "BraTS2021_00000",
        None,
        "BraTS2021_00003",
    ]
    assert f"{flat}: other NIfTI files, left out: 1 (odd.nii.gz)" in source.notes


def test_brats_reads_a_folder_that_stands_for_its_file(fakes, tmp_path, capsys):
    file = find(fakes / "2020", "BraTS20_Training_003_t2.nii")
    assert file.parent.name == file.name  # the fake has one
    assert (
        file
        in next(case for case in listed(fakes / "2020").cases if case.id.endswith("_003")).images
    )
    src = some_cases(fakes, tmp_path / "src", 3, "2020")
    shutil.copy(next(src.rglob("*_t1.nii")), src / "BraTS20_Training_003" / file.name / "other.nii")
    text = "a folder with 2 NIfTI files, expected a file, or one in it; unpack it again"
    assert f"{src / 'BraTS20_Training_003' / file.name}: {text}" in listed(src).faults


def test_brats_follows_linked_folders_once(src, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "all").symlink_to(src)
    (src / "loop").symlink_to(tmp_path / "links")
    source = listed(tmp_path / "links")
    assert len(source.cases) == 4 and source.faults == ()


def test_brats_never_reads_files_of_a_mac(fakes):
    hidden = [f for layout in brats.LAYOUTS for f in (fakes / layout).rglob("._*")]
    assert len(hidden) == 4
    for layout in brats.LAYOUTS:
        source = listed(fakes / layout)
        files = [f for case in source.cases for f in case.files]
        assert len(files) == 54 and not any(f.name[0] in "._" for f in files)
        assert source.faults == () and not any("left out" in note for note in source.notes)


def test_brats_accepts_the_lone_odd_label_of_case_355_aloud(fakes, tmp_path, capsys):
    code, _, lines = run(
        "--src", fakes / "2020", "--dst", tmp_path / "p", "--classes", "all", capsys=capsys
    )
    odd = find(fakes / "2020", "W39_1998.09.19_Segm.nii")
    told = (
        "taken as the label of case BraTS20_Training_355, which has no seg and no other file left"
    )
    assert code == 0 and lines.count(f"brats: note: {odd}: {told}") == 1
    published = voxels(fakes / "2020", "W39_1998.09.19_Segm")
    stored = open_data(tmp_path / "p").label("BraTS20_Training_355")
    np.testing.assert_array_equal(stored, np.where(published == 4, 3, published))


def test_brats_refuses_to_choose_between_two_odd_files(fakes, tmp_path, capsys):
    src = some_cases(fakes, tmp_path / "src", 10, "2020")
    folder = src / "BraTS20_Training_355"
    shutil.copy(folder / "W39_1998.09.19_Segm.nii", folder / "mask.nii")
    text = "has no seg, and 2 other NIfTI files (W39_1998.09.19_Segm.nii, mask.nii), expected 1"
    remedy = "name the label BraTS20_Training_355_seg.nii.gz"
    line = refused(src, tmp_path / "p", capsys)
    assert line == f"{folder}: case BraTS20_Training_355 {text}; {remedy}; nothing was written"


def test_brats_takes_no_prediction_beside_a_validation_case_for_a_label(fakes, tmp_path):
    src = shutil.copytree(fakes / "2020", tmp_path / "src")
    folder = next(f for f in src.rglob("BraTS20_Validation_001") if f.is_dir())
    shutil.copy(find(src, "BraTS20_Training_001_seg.nii"), folder / "mine.nii")
    source = listed(src)
    assert [case.id for case in source.cases if not case.label] == ["BraTS20_Validation_001"]
    assert f"{src}: other NIfTI files, left out: 1 (mine.nii)" in source.notes


def test_brats_takes_no_prediction_in_a_validation_folder_for_a_label(fakes, tmp_path):
    """Cases of 2018, 2021 and later do not say in their names that they are validation cases; their folders do."""
    for part in ("Training", "Validation"):
        folder = tmp_path / f"src/MICCAI_BraTS_2018_Data_{part}/Brats18_{part[:3]}_1_1"
        folder.mkdir(parents=True)
        for name in (*brats.CHANNELS, "mine"):
            shutil.copy(
                find(fakes / "2020", "BraTS20_Training_001_seg.nii"),
                folder / f"Brats18_{part[:3]}_1_1_{name}.nii",
            )
    source = listed(tmp_path / "src")
    assert {case.id: bool(case.label) for case in source.cases} == {
        "Brats18_Tra_1_1": True,
        "Brats18_Val_1_1": False,
    }


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "value"), [("2018", 4), ("2020", 4), ("2021", 4), ("2023", 3)])
def test_brats_says_the_enhancing_value_and_prediction_writes_it_back(
    fakes, tmp_path, capsys, layout, value
):
    src = some_cases(fakes, tmp_path / "src", 3, layout)
    _, out, lines = run("--src", src, "--dst", tmp_path / "p", "--classes", "all", capsys=capsys)
    said = f"labels are 0, 1, 2, {value}: {value} is the enhancing tumour, in 3 of 3 cases"
    assert (
        lines.count(f"brats: note: {said}") == 1
        and f"label 3 (published {value}) enhancing tumour" in out
    )
    data = open_data(tmp_path / "p")
    assert data.classes == {"necrotic core": 1, "oedema": 2, "enhancing tumour": 3}
    assert (
        data.meta["label_values"] == {"0": 0, "1": 1, "2": 2, "3": value}
        and "regions" not in data.meta
    )
    case, mark = data.cases("train")[0], "-" if value == 3 else "_"
    files = [find(src, f"{case}{mark}{name}.nii") for name in (NEW if value == 3 else OLD)]
    scan = VolumeScan(case, [read_nifti(file) for file in files], data_record(data))
    np.testing.assert_array_equal(scan.image, np.array(data.image(case), np.float32))
    scan.target = tmp_path / "mask.nii.gz"
    scan.save(scan.mask(np.moveaxis(np.eye(4, dtype=np.float32)[data.label(case)], 3, 0)))
    mask, seg = nib.load(tmp_path / "mask.nii.gz"), nib.load(find(src, f"{case}{mark}seg.nii"))
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(seg.dataobj))
    np.testing.assert_array_equal(mask.affine, seg.affine)
    assert (
        set(np.unique(mask.dataobj)) == {0, 1, 2, value} and mask.header["qform_code"] == 2
    )  # the images' code


def test_brats_merges_all_tumour_into_one_class_by_default(src, tmp_path):
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    data = open_data(tmp_path / "p")
    assert data.classes == {"whole tumour": 1} and data.meta["label_values"] == {"0": 0, "1": 1}
    for case in data.cases("train"):
        np.testing.assert_array_equal(data.label(case), voxels(src, f"{case}_seg") > 0)


def test_brats_regions_keep_three_labels_and_name_their_unions(src, tmp_path):
    assert run("--src", src, "--dst", tmp_path / "p", "--classes", "regions")[0] == 0
    data = open_data(tmp_path / "p")
    assert data.classes == {"necrotic core": 1, "oedema": 2, "enhancing tumour": 3}
    unions = {"whole tumour": (1, 2, 4), "tumour core": (1, 4), "enhancing tumour": (4,)}
    assert list(data.meta["regions"]) == list(unions)
    for case in data.cases("train"):
        for name, published in unions.items():
            ours = np.isin(data.label(case), data.meta["regions"][name])
            np.testing.assert_array_equal(ours, np.isin(voxels(src, f"{case}_seg"), published))


@pytest.mark.parametrize("classes", ["whole", "all", "regions"])
def test_brats_tells_by_which_words_any_year_names_its_channels(src, tmp_path, classes):
    assert run("--src", src, "--dst", tmp_path / "p", "--classes", classes)[0] == 0
    words = open_data(tmp_path / "p").meta["channel_suffixes"]
    assert list(words.items()) == [(old, [old, *{new} - {old}]) for old, new in zip(OLD, NEW)]


def test_brats_decides_the_enhancing_value_once_for_the_set(src, tmp_path, capsys):
    change(
        src / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz",
        lambda a: np.where(a == 4, 0, a).astype(np.float32),
    )
    change(
        src / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz",
        lambda a: a.astype(np.float32) - np.float32(5e-4),
    )
    source = listed(src)
    assert source.label_map == {0: 0, 1: 1, 2: 2, 4: 3}
    assert source.notes[-1] == "labels are 0, 1, 2, 4: 4 is the enhancing tumour, in 3 of 4 cases"


@pytest.mark.parametrize(("layout", "value"), [("2021", 4), ("2023", 3)])
def test_brats_without_enhancing_tumour_goes_by_the_names(fakes, tmp_path, layout, value):
    src = some_cases(fakes, tmp_path / "src", 2, layout)
    replace_values(src, value, 0)
    source = listed(src)
    assert source.label_values[3] == value and source.faults == ()
    assert source.notes[-1].endswith(f"by the files' names the enhancing tumour would be {value}")


def test_brats_takes_3_for_the_enhancing_tumour_in_a_renumbered_old_year(src):
    replace_values(src, 4, 3)
    assert listed(src).label_values == {0: 0, 1: 1, 2: 2, 3: 3} and listed(src).faults == ()


def test_brats_refuses_3_and_4_in_one_set(src, tmp_path, capsys):
    change(
        src / "BraTS2021_00003" / "BraTS2021_00003_seg.nii.gz",
        lambda a: np.where(a == 4, 3, a).astype(np.uint8),
    )
    line = refused(src, tmp_path / "p", capsys, "--classes", "all")
    first = "label value 3 in 1 cases (first BraTS2021_00003) and 4 in 3 (first BraTS2021_00000), expected only one"
    assert line.startswith(first) and "the cavity left by surgery in 2024" in line
    assert line.endswith("prepare one year by itself; nothing was written")


def test_brats_refuses_4_in_files_named_as_from_2023_on(fakes, tmp_path, capsys):
    src = some_cases(fakes, tmp_path / "src", 2, "2023")
    replace_values(src, 3, 4)
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(
        "label value 4 in 2 cases (first BraTS-GLI-00000-000) whose files are named as from 2023 on"
    )


def test_brats_names_a_label_value_of_another_set(src, tmp_path, capsys):
    file = change(src / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz", lambda a: at_first(a, 7))
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(
        f"{file}: unknown label value 7 in 1 voxels, expected 0, 1, 2, 4; correct the label"
    )


def test_brats_sees_a_single_voxel_of_3_among_4(src, tmp_path, capsys):
    change(src / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz", lambda a: at_first(a, 3))
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith("label value 3 in 1 cases (first BraTS2021_00002) and 4 in 4")


def at_first(array: np.ndarray, value: int) -> np.ndarray:
    array.flat[0] = value
    return array


# --- split -----------------------------------------------------------------------------------------------------------


def test_brats_gives_the_authors_split_for_all_369_cases_of_2020(fakes, tmp_path):
    files = {
        name: find(fakes / "2020", f"BraTS20_Training_001_{name}.nii") for name in (*OLD, "seg")
    }
    for number in range(1, 370):
        folder = tmp_path / f"BraTS20_Training_{number:03d}"
        folder.mkdir()
        for name, file in files.items():
            os.link(file, folder / f"{folder.name}_{name}.nii")
    for name in OLD:  # a validation case changes nothing
        os.link(files[name], tmp_path / f"BraTS20_Validation_001_{name}.nii")
    source = listed(tmp_path)
    numbers = {part: [int(case[-3:]) for case in ids] for part, ids in source.splits.items()}
    assert sorted(numbers["val"]) == [int(n) for n in VAL.split()]
    assert sorted(numbers["test"]) == [int(n) for n in TEST.split()]
    assert len(numbers["train"]) == 295 and sum(numbers["train"]) == 53603
    assert sorted(numbers["train"])[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert (
        "all 369 cases of 2020 are here: split as by PatchDDM's authors, 295/37/37" in source.notes
    )
    shutil.rmtree(tmp_path / "BraTS20_Training_200")
    fewer = listed(tmp_path)
    assert [len(ids) for ids in fewer.splits.values()] == [294, 37, 37]
    assert not any("295/37/37" in note for note in fewer.notes)


def test_brats_splits_sorted_ids_as_make_splits_does(fakes):
    source = listed(fakes / "2018")
    ids = [case.id for case in source.cases if case.label]
    assert source.splits == make_splits(ids) and [len(v) for v in source.splits.values()] == [
        8,
        1,
        1,
    ]


def test_brats_keeps_the_dates_of_a_patient_together():
    ids = [
        f"BraTS-GLI-{patient:05d}-{date:03d}"
        for patient in range(60)
        for date in range(1 + patient % 3)
    ]
    splits = brats.split_patients(reversed(ids))
    assert sorted(case for part in splits.values() for case in part) == ids
    where = {part: {case[:15] for case in cases} for part, cases in splits.items()}
    assert [len(patients) for patients in where.values()] == [48, 6, 6]
    assert not where["train"] & where["val"] and not (where["train"] | where["val"]) & where["test"]
    assert brats.patient_of("Brats18_CBICA_ABE_1") == brats.patient_of("Brats18_CBICA_ABE_2")
    assert brats.patient_of("BraTS20_Training_001") != brats.patient_of("BraTS20_Training_002")
    assert brats.patient_of("BraTS2021_00001") == "BraTS2021_00001"


def test_brats_stores_the_split_by_patients(fakes, tmp_path):
    assert run("--src", fakes / "2023", "--dst", tmp_path / "p")[0] == 0
    splits, source = open_data(tmp_path / "p").meta["splits"], listed(fakes / "2023")
    assert splits == source.splits | {"unlabelled": ["BraTS-GLI-00001-000"]}
    assert splits["train"] != make_splits(case.id for case in source.cases if case.label)["train"]


def test_brats_refuses_two_years_in_one_folder(fakes, tmp_path, capsys):
    some_cases(fakes, tmp_path / "src", 2, "2018")
    line = refused(some_cases(fakes, tmp_path / "src", 3, "2021"), tmp_path / "p", capsys)
    both = "cases of several years or tasks (3 of BraTS2021, 2 of Brats18), expected one"
    assert line.startswith(f"{tmp_path / 'src'}: {both}: they share patients")


# --- values and grids ------------------------------------------------------------------------------------------------


def test_brats_scales_each_channel_by_percentiles_of_the_brain(src, tmp_path):
    run("--src", src, "--dst", tmp_path / "p")
    image = open_data(tmp_path / "p").image("BraTS2021_00002")
    for channel, name in enumerate(OLD):
        raw = voxels(src, f"BraTS2021_00002_{name}").astype(float)
        low, high = np.percentile(raw[raw != 0], [1, 99])
        wanted = np.where(raw == 0, 0, np.clip((raw - low) / (high - low), 0, 1))
        np.testing.assert_allclose(image[channel], wanted, atol=5e-4)
        assert (raw == 0).mean() > 0.1 and high - low > 1


def write_volume(file: Path, shape: tuple[int, int, int]) -> None:
    """A block of ramps in a volume of zeros, LPS as published."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(shape, np.int16 if "seg" not in file.name else np.uint8)
    values[100:120, 90:100, 60:70] = (
        np.arange(1, 21)[:, None, None] if "seg" not in file.name else 4
    )
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = shape[1] - 1
    nib.save(nib.Nifti1Image(values, affine), file)


@pytest.mark.parametrize(("shape", "grid"), [
    ((240, 240, 155), [256, 256, 256]),
    ((120, 120, 77), None),
])  # fmt: skip
def test_brats_names_the_virtual_grid_where_all_cases_have_the_published_size(
    tmp_path, shape, grid
):
    for name in (*OLD, "seg"):
        write_volume(tmp_path / "src" / f"BraTS2021_00000_{name}.nii", shape)
    assert run("--src", tmp_path / "src", "--dst", tmp_path / "p")[0] == 0
    data = open_data(tmp_path / "p")
    assert data.meta.get("grid") == grid and data_record(data).get("grid") == grid
    assert data.image("BraTS2021_00000").shape == (4, *shape)  # stored on the native grid


def test_brats_names_no_grid_where_sizes_differ(src, tmp_path, monkeypatch):
    monkeypatch.setattr(brats, "GRIDS", {(24, 28, 16): (32, 32, 32)})
    assert run("--src", src, "--dst", tmp_path / "same")[0] == 0
    assert open_data(tmp_path / "same").meta["grid"] == [32, 32, 32]
    for file in (src / "BraTS2021_00002").iterdir():
        change(file, lambda a: np.concatenate([a, a[-1:]]))
    assert run("--src", src, "--dst", tmp_path / "other")[0] == 0
    assert "grid" not in open_data(tmp_path / "other").meta


def test_brats_accepts_other_codes_of_the_same_matrix(fakes, tmp_path, capsys):
    src = some_cases(fakes, tmp_path / "src", 3, "2018")
    codes = {int(nib.load(f).header["qform_code"]) for f in src.rglob("*.nii.gz")}
    types = {nib.load(f).get_data_dtype().name for f in src.rglob("*seg.nii.gz")}
    assert codes == {1, 2} and types == {"int16", "uint8"}
    code, _, lines = run("--src", src, "--check", capsys=capsys)
    assert code == 0 and not any("affine" in line for line in lines)


def test_brats_refuses_an_identity_affine_and_accepts_it_where_allowed(src, tmp_path, capsys):
    file = src / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz"
    published = voxels(src, "BraTS2021_00002_seg")
    change(file, lambda a: a, affine=np.eye(4))
    line = refused(src, tmp_path / "p", capsys)
    both = "[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], while BraTS2021_00002_t1.nii.gz has [[-1, 0, 0, 0], [0, -1, 0, 27]"
    assert (
        line.startswith(f"{file}: affine {both}")
        and "identity-like" in line
        and "--allow-affine-mismatch" in line
    )
    code, _, lines = run(
        "--src", src, "--dst", tmp_path / "p", "--allow-affine-mismatch", capsys=capsys
    )
    assert code == 0 and sum("the image's affine is used for both" in line for line in lines) == 1
    np.testing.assert_array_equal(open_data(tmp_path / "p").label("BraTS2021_00002"), published > 0)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "name", "channel"), [
    ("2021", "BraTS2021_00002_t2.nii.gz", "t2"),
    ("2023", "BraTS-GLI-00002-000-t1c.nii.gz", "t1ce"),
])  # fmt: skip
def test_brats_names_case_and_modality_that_is_missing(
    fakes, tmp_path, capsys, layout, name, channel
):
    src = some_cases(fakes, tmp_path / "src", 3, layout)
    file = find(src, name)
    file.unlink()
    what = f"case {file.parent.name} has no {channel}, expected {name} or .nii; copy it"
    assert refused(src, tmp_path / "p", capsys) == f"{file.parent}: {what}; nothing was written"


def test_brats_names_two_files_for_one_modality(src, tmp_path, capsys):
    folder = src / "BraTS2021_00002"
    again = src / "copy" / "BraTS2021_00002_t2.nii"
    again.parent.mkdir()
    nib.save(nib.load(folder / "BraTS2021_00002_t2.nii.gz"), again)
    both = f"{folder / 'BraTS2021_00002_t2.nii.gz'}, {again}"
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(
        f"{folder}: case BraTS2021_00002 has 2 files for t2, expected 1: {both}; remove one"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_brats_lists_all_faults_in_one_check(src, tmp_path, capsys, workers):
    one, two, three, four = (
        src / f"BraTS2021_{n:05d}" / f"BraTS2021_{n:05d}" for n in (0, 2, 3, 5)
    )
    Path(f"{one}_flair.nii.gz").unlink()
    for file in (Path(f"{two}_t1.nii.gz"), Path(f"{two}_seg.nii.gz")):
        file.write_bytes(file.read_bytes()[:-30])
    change(Path(f"{three}_t1ce.nii.gz"), lambda a: a[1:])
    change(Path(f"{four}_seg.nii.gz"), lambda a: at_first(a, 9))
    code, out, lines = run("--src", src, "--check", "--workers", workers, capsys=capsys)
    wanted = [
        (one.parent, "case BraTS2021_00000 has no flair"),
        (f"{two}_t1.nii.gz", "damaged or cut off"),
        (f"{two}_seg.nii.gz", "damaged or cut off"),
        (
            f"{three}_t1ce.nii.gz",
            "shape 23 x 28 x 16, while BraTS2021_00003_t1.nii.gz has 24 x 28 x 16",
        ),
        (f"{four}_seg.nii.gz", "unknown label value 9 in 1 voxels"),
    ]
    assert (code, out) == (2, "") and len(lines) == 6 and lines[-1].startswith("brats: 5 faults")
    for line, (file, text) in zip(lines, wanted):
        assert line.startswith(f"brats: {file}: {text}")


def test_brats_names_a_folder_that_holds_none(tmp_path, capsys):
    line = refused(tmp_path / "none", tmp_path / "p", capsys)
    assert line == f"{tmp_path / 'none'}: no such folder, expected BraTS as published; check --src"
    (tmp_path / "none").mkdir()
    text = "no BraTS case found, expected files such as CASE_flair.nii.gz"
    assert (
        refused(tmp_path / "none", tmp_path / "p", capsys)
        == f"{tmp_path / 'none'}: {text}; check --src"
    )
    (tmp_path / "none" / "BraTS2021_Training_Data.tar").write_bytes(b"")
    assert refused(tmp_path / "none", tmp_path / "p", capsys).endswith(
        "; unpack BraTS2021_Training_Data.tar first"
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def test_brats_continues_and_refuses_other_classes_in_the_same_folder(src, tmp_path, capsys):
    assert run("--src", src, "--dst", tmp_path / "p", "--classes", "all")[0] == 0
    shutil.rmtree(tmp_path / "p" / "cases" / "BraTS2021_00002")
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", "--classes", "all", capsys=capsys)
    assert code == 0 and lines[-1] == "brats: 3 cases are there from an earlier run, 1 to do"
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert code == 2 and "was prepared with label_map {'0': 0, '1': 1, '2': 2, '4': 3}" in lines[0]


def test_brats_manifest_counts_every_voxel(src, tmp_path, capsys):
    _, out, _ = run("--src", src, "--dst", tmp_path / "p", "--classes", "all", capsys=capsys)
    labels = [np.asarray(nib.load(f).dataobj) for f in src.rglob("*seg.nii.gz")]
    for prepared, published in ((1, 1), (2, 2), (3, 4)):
        count = sum(int((label == published).sum()) for label in labels)
        name = list(brats.CLASSES)[prepared - 1]
        assert f"label {prepared} (published {published}) {name}: {count:,} voxels" in out
    assert (
        json.loads((tmp_path / "p" / "dataset.json").read_text())["manifest"]
        == out.splitlines()[1:]
    )


def test_brats_prepares_a_set_without_any_label(fakes, tmp_path, capsys):
    src = next(f for f in (fakes / "2023").iterdir() if "Validation" in f.name)
    code, out, _ = run("--src", src, "--dst", tmp_path / "p", "--classes", "all", capsys=capsys)
    assert code == 0 and "1 cases (0 train, 0 val, 0 test, 1 unlabelled)" in out
    assert open_data(tmp_path / "p").meta["label_values"]["3"] == 3


def test_brats_refuses_classes_that_it_does_not_know(src, tmp_path, capsys):
    assert "argument --classes: invalid choice: 'core'" in refused(
        src, tmp_path / "p", capsys, "--classes", "core"
    )


@pytest.mark.parametrize("layout", brats.LAYOUTS)
def test_brats_of_each_year_trains_and_predicts(fakes, tmp_path, layout):
    src, weights = some_cases(fakes, tmp_path / "src", 3, layout), tmp_path / "run" / "last.pt"
    assert run("--src", src, "--dst", tmp_path / "p", "--classes", "all")[0] == 0
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
    case, hyphens = open_data(tmp_path / "p").cases("train")[0], layout == "2023"
    files = [
        find(src, f"{case}{'-' if hyphens else '_'}{name}.nii")
        for name in (NEW if hyphens else OLD)
    ]
    argv = ["predict", "--checkpoint", str(weights), "--sampling-steps", "1", *common]
    output = tmp_path / "mask.nii.gz"
    assert patchddm.main([*argv, "--image", *map(str, files), "--output", str(output)]) == 0
    mask, image = nib.load(output), nib.load(files[0])
    assert mask.shape == image.shape and mask.header["qform_code"] == image.header["qform_code"]
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2, 3 if hyphens else 4}


def test_brats_split_sizes_cut_the_same_order_and_never_a_patient(fakes, tmp_path, capsys):
    src = str(fakes / "2023")
    assert brats.main(["--src", src, "--dst", str(tmp_path / "a"), "--quiet"]) == 0
    usual = open_data(tmp_path / "a").meta["splits"]
    order = usual["train"] + usual["val"] + usual["test"]
    results = {}
    for n in range(1, 11):
        sizes = f"{n},0,{10 - n}"
        code = brats.main(
            ["--src", src, "--dst", str(tmp_path / f"b{n}"), "--quiet", "--split-sizes", sizes]
        )
        if code:
            assert "the same patient" in capsys.readouterr().err
            assert brats.patient_of(order[n - 1]) == brats.patient_of(order[n])
            continue
        splits = open_data(tmp_path / f"b{n}").meta["splits"]
        results[n] = (splits["train"], splits["val"], splits["test"]) == (order[:n], [], order[n:])
    assert all(results.values()) and 0 < len(results) < 10
    capsys.readouterr()
    assert (
        brats.main(
            ["--src", src, "--dst", str(tmp_path / "c"), "--quiet", "--split-sizes", "9,0,4"]
        )
        == 2
    )
    assert "13 cases, 10 have a label" in capsys.readouterr().err
