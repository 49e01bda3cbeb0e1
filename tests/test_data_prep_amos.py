"""The CT of AMOS22 to a prepared folder: lists, modality, split, Hounsfield units, window, each fault by its text."""

import argparse
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import patchddm
from common.loaders import VolumeScan, data_record, normalise, open_data, read_nifti
from data_prep import _prepare, amos

NAMES = ["spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta", "postcava",
         "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"]  # fmt: skip
WIDE, LAS, FLOAT, AIR = (
    "amos_0001",
    "amos_0002",
    "amos_0003",
    "amos_0004",
)  # what is odd about cases of the fake
NATIVE = ("--spacing", "1.5,1.5,2.5")  # of the fake, so that nothing is resampled


@pytest.fixture(scope="session")
def fakes(tmp_path_factory) -> Path:
    """Both layouts; not to be changed."""
    root = tmp_path_factory.mktemp("amos")
    for layout in amos.LAYOUTS:
        assert amos.main(["--make-fake", str(root / layout), "--layout", layout]) == 0
    return root


@pytest.fixture
def src(fakes, tmp_path) -> Path:
    """The small fake, 6 + 20 CT, which a test may damage."""
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
        assert amos.main(flags) == 0
    return root


def run(*flags: object, capsys=None) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr that are not about MR left out."""
    if capsys:
        capsys.readouterr()
    code = amos.main([*map(str, flags), "--quiet"])
    out, err = capsys.readouterr() if capsys else ("", "")
    return code, out, [line for line in err.splitlines() if "MR of" not in line]


def listed(src: Path, *, subset: bool = True, spacing: tuple = amos.SPACING) -> amos.Source:
    return amos.read_source(src, argparse.Namespace(subset=subset, spacing=spacing, crop="label"))


def refused(src: Path, dst: Path, capsys, *flags: object) -> str:
    """The one line on stderr of a preparation of a subset that leaves with 2 and writes nothing."""
    code, out, lines = run("--src", src, "--dst", dst, "--subset", *flags, capsys=capsys)
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert not dst.exists() and lines[0].startswith("amos: ")
    return lines[0].removeprefix("amos: ")


def edit(src: Path, **entries) -> dict:
    """Replace entries of dataset.json; a function gets the old value, None takes one out."""
    meta = json.loads((src / "dataset.json").read_text())
    new = {key: value(meta[key]) if callable(value) else value for key, value in entries.items()}
    (src / "dataset.json").write_text(
        json.dumps({k: v for k, v in (meta | new).items() if v is not None})
    )
    return meta


def pair(name: str, folder: str = "Tr") -> dict[str, str]:
    return {"image": f"./images{folder}/{name}.nii.gz", "label": f"./labels{folder}/{name}.nii.gz"}


def change(file: Path, function) -> Path:
    """Rewrite a NIfTI file with function(array)."""
    image = nib.load(file)
    nib.save(nib.Nifti1Image(function(np.asarray(image.dataobj).copy()), image.affine), file)
    return file


def voxels(src: Path, folder: str, case: str) -> np.ndarray:
    return np.asarray(nib.load(src / folder / f"{case}.nii.gz").dataobj)


# --- lists and split -------------------------------------------------------------------------------------------------


def test_amos_with_the_published_counts_passes_and_prints_them(fakes, capsys):
    code, out, lines = run("--src", fakes / "full", "--check", capsys=capsys)
    assert (code, lines) == (0, []) and "300 cases checked" in out
    assert "  published    train 200 of 200, val 10 of 10, test 90 of 90" in out


def test_amos_split_is_the_papers_in_the_order_of_dataset_json(fakes, src):
    source = listed(fakes / "full", subset=False)
    meta = json.loads((fakes / "full" / "dataset.json").read_text())
    names = {
        part: [Path(e["image"]).name[:9] for e in meta[part]] for part in ("training", "validation")
    }
    ct = {part: [name for name in ids if name <= "amos_0500"] for part, ids in names.items()}
    assert len(names["training"]) == 240 and len(names["validation"]) == 120
    assert source.splits == {
        "train": ct["training"],
        "val": ct["validation"][:10],
        "test": ct["validation"][10:],
    }
    assert listed(src).splits["val"] == ["amos_0007", "amos_0008"]
    edit(src, validation=lambda entries: entries[::-1])
    after = listed(src).splits
    assert after["val"] == ["amos_0026", "amos_0025"] and after["test"][0] == "amos_0024"
    assert sorted(after["train"]) == [f"amos_{n:04d}" for n in range(1, 7)]


@pytest.mark.parametrize(("n", "val"), [(9, 0), (10, 1), (19, 1), (100, 10)])
def test_amos_takes_a_tenth_of_validation_for_val(n, val):
    entries = [amos.Entry(str(i), Path("a"), Path("b")) for i in range(n)]
    splits = amos.split_lists({"training": [], "validation": entries})
    assert splits["val"] == entries[:val] and splits["test"] == entries[val:]


def test_amos_tells_ct_from_mr_by_the_number_alone(src, tmp_path, capsys):
    for kind in ("images", "labels"):
        for number in (500, 501):
            shutil.copy(
                src / f"{kind}Tr" / "amos_0005.nii.gz",
                src / f"{kind}Tr" / f"amos_{number:04d}.nii.gz",
            )
    edit(src, training=[pair("amos_0501"), pair("amos_0500"), pair("amos_0600")])
    source = listed(src)
    assert source.splits["train"] == ["amos_0500"]
    assert source.notes[0] == f"{src / 'dataset.json'}: MR of training, left out: 2"
    assert source.notes[1] == f"{src / 'dataset.json'}: MR of validation, left out: 2"


def test_amos_never_reads_mr_test_images_and_files_of_a_mac(fakes, src):
    for file in [
        *src.glob("images*/amos_05*"),
        *src.glob("labels*/amos_05*"),
        src / "imagesTs" / "amos_0499.nii.gz",
    ]:
        file.write_bytes(b"")
    assert (src / "imagesTr" / "._amos_0001.nii.gz").exists()
    assert run("--src", src, "--check", "--subset")[0] == 0
    assert all(case.label for case in listed(src).cases) and len(listed(src).cases) == 26


@pytest.mark.parametrize(("part", "expected"), [("training", 200), ("validation", 100)])
def test_amos_refuses_another_number_of_cases(fakes, tmp_path, capsys, part, expected):
    src = tmp_path / "src"
    src.mkdir()
    for folder in (fakes / "full").glob("*s[TV]?"):
        (src / folder.name).symlink_to(folder)
    shutil.copy(fakes / "full" / "dataset.json", src)
    edit(src, **{part: lambda entries: entries[:-1]})
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    what = f"lists {expected - 1} CT of {part}, expected {expected}"
    remedy = "get amos22.zip again, or pass --subset to prepare what is there"
    assert code == 2 and lines == [
        f"amos: {src / 'dataset.json'}: {what}; {remedy}; nothing was written"
    ]
    assert not (tmp_path / "p").exists()
    assert run("--src", src, "--check", "--subset")[0] == 0


def test_amos_manifest_stands_beside_the_published_counts(done):
    data = open_data(done / "label")
    assert "  published    train 6 of 200, val 2 of 10, test 18 of 90" in data.meta["manifest"]
    assert [len(data.cases(part)) for part in ("train", "val", "test", "unlabelled")] == [
        6,
        2,
        18,
        0,
    ]


def test_amos_subset_leaves_all_others_where_the_whole_list_puts_them(src, tmp_path, capsys):
    whole = listed(src).splits
    gone = ("amos_0002", "amos_0007", "amos_0020")
    for case in gone:
        for file in src.glob(f"*/{case}.nii.gz"):
            file.unlink()
    source = listed(src)
    assert source.splits == {part: [c for c in ids if c not in gone] for part, ids in whole.items()}
    assert (
        source.notes[-1]
        == f"{src / 'dataset.json'}: listed cases without files, left out: 3 ({', '.join(gone)})"
    )
    code, out, _ = run("--src", src, "--dst", tmp_path / "p", "--subset", capsys=capsys)
    assert code == 0 and "train 5 of 200, val 1 of 10, test 17 of 90" in out


# --- values and window -----------------------------------------------------------------------------------------------


def test_amos_names_its_classes_as_published(done):
    data = open_data(done / "label")
    assert data.channels == ["CT"] and data.name == "amos"
    assert list(data.classes.items()) == [(name, value) for value, name in enumerate(NAMES, 1)]
    assert data.meta["label_values"] == {str(v): v for v in range(16)}
    assert all(n > 0 for n in data.meta["statistics"]["label_voxels"].values())


def test_amos_maps_hounsfield_units_the_same_for_every_case(fakes, tmp_path):
    assert run("--src", fakes / "few", "--dst", tmp_path / "p", "--subset", *NATIVE)[0] == 0
    data = open_data(tmp_path / "p")
    for case in ("amos_0003", AIR, "amos_0005"):
        hu = voxels(fakes / "few", "imagesTr", case).astype(float)
        assert hu.min() < -991 and hu.max() > 362
        np.testing.assert_allclose(
            data.image(case)[0], (np.clip(hu, -991, 362) + 991) / 1353, atol=5e-4
        )
    assert (voxels(fakes / "few", "imagesTr", AIR) == -3024).any()


def test_amos_stores_zero_for_the_padding_value(done):
    rule = open_data(done / "label").meta["normalisation"]
    hu = np.array([-3024, -992, -991, 0, 362, 363, 3000], float).reshape(1, 7, 1, 1)
    np.testing.assert_allclose(
        normalise(hu, rule).ravel(), [0, 0, 0, 991 / 1353, 1, 1, 1], atol=1e-7
    )


def test_amos_resamples_to_the_papers_spacing(done):
    data = open_data(done / "label")
    assert data.meta["spacing"] == [1.5, 1.5, 5] and data.spacing(FLOAT) == (1.5, 1.5, 5)
    assert data.shape(FLOAT) == (24, 20, 8)


def test_amos_turns_voxels_to_ras_and_reads_float_labels(fakes, tmp_path):
    src = fakes / "few"
    assert run("--src", src, "--dst", tmp_path / "p", "--subset", *NATIVE)[0] == 0
    data = open_data(tmp_path / "p")
    np.testing.assert_array_equal(data.label(LAS), voxels(src, "labelsTr", LAS)[::-1])
    assert voxels(src, "labelsTr", FLOAT).dtype == np.float32
    np.testing.assert_array_equal(data.label(FLOAT), voxels(src, "labelsTr", FLOAT))


@pytest.mark.parametrize("crop", ["label", "centre"])
def test_amos_cuts_only_the_longer_axis(done, crop):
    full, data = open_data(done / "none"), open_data(done / crop)
    before, after = np.array(full.label(WIDE)), np.array(data.label(WIDE))
    assert before.shape == (240, 20, 8) and after.shape == (192, 20, 8)
    where = np.nonzero(before)[0]
    start = (
        min(max((int(where.min()) + int(where.max()) - 192 + 1) // 2, 0), 48)
        if crop == "label"
        else 24
    )
    np.testing.assert_array_equal(after, before[start : start + 192])
    np.testing.assert_array_equal(data.image(WIDE)[0], full.image(WIDE)[0, start : start + 192])
    np.testing.assert_allclose(
        data.affine(WIDE) @ [0, 0, 0, 1], full.affine(WIDE) @ [start, 0, 0, 1], atol=1e-9
    )
    lost = int((before > 0).sum() - (after > 0).sum())
    facts = {"shape": [240, 20, 8], "start": [start, 0, 0], "label_voxels_outside": lost}
    assert data.meta["cases"][WIDE]["crop"] == facts
    line = f"192 x 128 x 128: 1 cases were larger, {lost:,} labelled voxels of 1 cases lie outside"
    assert f"  crop         {crop}, {line}" in data.meta["manifest"]
    assert data.meta["grid"] == [192, 128, 128] and "grid" not in full.meta


def test_amos_prediction_is_never_cut(fakes, done):
    file = read_nifti(fakes / "few" / "imagesTr" / f"{WIDE}.nii.gz")
    scan = VolumeScan(WIDE, [file], data_record(open_data(done / "label")))
    np.testing.assert_array_equal(
        scan.image, np.array(open_data(done / "none").image(WIDE), np.float32)
    )


@pytest.mark.parametrize(
    ("spacing", "size"), [("1.5,1.5,5", [192, 128, 128]), ("4.5,4.5,5", [64, 48, 128])]
)
def test_amos_window_keeps_its_millimetres(src, spacing, size):
    assert listed(src, spacing=_prepare.parse_spacing(spacing)).crop == {
        "kind": "label",
        "size": size,
    }


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr", "imagesVa", "labelsVa"])
def test_amos_names_a_missing_file(src, tmp_path, capsys, folder):
    case, part = ("amos_0005", "training") if folder.endswith("Tr") else ("amos_0009", "validation")
    file = src / folder / f"{case}.nii.gz"
    file.unlink()
    line = refused(src, tmp_path / "p", capsys)
    assert line == f"{file}: missing, {case} of {part} needs it; copy it; nothing was written"


def test_amos_names_both_files_of_an_absent_case_without_subset(src):
    for file in src.glob("*/amos_0005.nii.gz"):
        file.unlink()
    what = "missing, amos_0005 of training needs it; copy it, or pass --subset"
    wanted = [f"{src / folder / 'amos_0005.nii.gz'}: {what}" for folder in ("imagesTr", "labelsTr")]
    assert list(listed(src, subset=False).faults)[:2] == wanted


def test_amos_says_once_that_a_release_has_no_labels_of_validation(src, tmp_path, capsys):
    shutil.rmtree(src / "labelsVa")
    edit(src, validation=lambda entries: [entry["image"] for entry in entries])
    line = refused(src, tmp_path / "p", capsys)
    what = "holds none of the labels of 20 CT of validation, and an early release has none"
    remedy = "get amos22.zip of Zenodo 7262581, which has labelsVa"
    assert line == f"{src / 'labelsVa'}: {what}; {remedy}; nothing was written"


def test_amos_finds_labels_that_the_list_does_not_name(src):
    edit(src, validation=lambda entries: [entry["image"] for entry in entries])
    source = listed(src)
    assert source.faults == () and source.cases[-1].label == src / "labelsVa" / "amos_0026.nii.gz"


def test_amos_reads_unpacked_files_and_the_folder_above(src):
    for file in list(src.glob("*/amos*.nii.gz")):
        nib.save(nib.load(file), file.with_name(file.name[:-3]))
        file.unlink()
    (src.parent / "above").mkdir()
    src.rename(src.parent / "above" / "amos22")
    source = listed(src.parent / "above")
    assert source.faults == () and len(source.cases) == 26
    assert source.cases[0].images[0].name == "amos_0001.nii"


@pytest.mark.parametrize(("entries", "text"), [
    ({"training": None}, "has no list training, expected both; get it again"),
    ({"training": None, "validation": {}}, "has no list training and no list validation, expected both"),
    ({"training": [pair("amos_0001"), pair("amos_0001")]},
     "amos_0001 is there twice, in training, expected once; remove one"),
    ({"validation": [pair("amos_0002")]},
     "amos_0002 is there twice, in training and validation, expected once; remove one"),
    ({"training": [{"image": "./imagesTr/amos_0001.nii.gz", "label": "./labelsTr/amos_0002.nii.gz"}]},
     "training pairs ./imagesTr/amos_0001.nii.gz with ./labelsTr/amos_0002.nii.gz, expected the same name; correct it"),
    ({"training": [pair("FLARE22_Tr_0001")]},
     "training has ./imagesTr/FLARE22_Tr_0001.nii.gz, expected a name such as amos_0001, whose number tells"),
    ({"training": [{"label": "x"}]}, "training has {'label': 'x'}, expected image and label; correct it"),
    ({"training": [7]}, "training has 7, expected image and label; correct it"),
    ({"labels": ["spleen"]}, "labels is ['spleen'], expected numbers and names; get it again"),
    ({"labels": lambda labels: labels | {"6": "pancreas"}}, "label 6 is 'pancreas', expected liver"),
    ({"labels": lambda labels: {k: v for k, v in labels.items() if k != "15"}},
     "label 15 is None, expected prostate/uterus"),
])  # fmt: skip
def test_amos_names_what_is_wrong_in_dataset_json(src, tmp_path, capsys, entries, text):
    edit(src, **entries)
    assert refused(src, tmp_path / "p", capsys).startswith(f"{src / 'dataset.json'}: {text}")


@pytest.mark.parametrize(
    "labels", [None, lambda labels: {k: v.upper() for k, v in labels.items()} | {"8": "aorta"}]
)
def test_amos_accepts_dataset_json_without_labels_or_with_other_capitals(src, labels):
    edit(src, labels=labels)
    assert listed(src).faults == ()


def test_amos_names_a_label_value_that_it_does_not_know(src, tmp_path, capsys):
    file = change(
        src / "labelsVa" / "amos_0009.nii.gz", lambda a: np.where(a == 15, 16, a).astype(np.uint8)
    )
    count = int((voxels(src, "labelsVa", "amos_0009") == 16).sum())
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(
        f"{file}: unknown label value 16 in {count:,} voxels, expected 0, 1, 2, "
    )


def test_amos_names_a_folder_that_holds_none(tmp_path, capsys):
    src, p = tmp_path / "none", tmp_path / "p"
    assert (
        refused(src, p, capsys)
        == f"{src}: no such folder, expected amos22 as published; check --src"
    )
    src.mkdir()
    assert (
        refused(src, p, capsys)
        == f"{src}: holds no dataset.json, expected amos22 as published; check --src"
    )
    (src / "amos22.zip").write_bytes(b"")
    assert refused(src, p, capsys).endswith("; unpack amos22.zip first")
    (src / "AMOS22").mkdir()
    (src / "AMOS22" / "task1_dataset.json").write_text("{}")
    line = refused(src, p, capsys)
    assert (
        "no labels of validation cases (task1_dataset.json), expected dataset.json; get amos22.zip"
        in line
    )
    for name in ("a", "b"):
        (src / name).mkdir()
        (src / name / "dataset.json").write_text("{")
    assert (
        refused(src, p, capsys)
        == f"{src}: holds 2 folders with a dataset.json, expected one; check --src"
    )
    assert refused(src / "a", p, capsys).startswith(f"{src / 'a' / 'dataset.json'}: not JSON (")


def test_amos_names_a_list_without_any_file_that_is_here(src, tmp_path, capsys):
    for file in src.glob("*/amos_*"):
        file.unlink()
    assert ": lists no CT that is here, expected files such as" in refused(
        src, tmp_path / "p", capsys
    )


def test_amos_lists_all_faults_in_one_check(src, capsys):
    edit(src, labels=lambda labels: labels | {"1": "liver"})
    (src / "labelsTr" / "amos_0002.nii.gz").unlink()
    change(src / "imagesTr" / "amos_0003.nii.gz", lambda a: a[1:])
    change(
        src / "labelsVa" / "amos_0009.nii.gz", lambda a: np.where(a == 1, 77, a).astype(np.uint8)
    )
    file = src / "imagesVa" / "amos_0010.nii.gz"
    file.write_bytes(file.read_bytes()[:-30])
    code, out, lines = run("--src", src, "--check", capsys=capsys)
    wanted = [
        (src / "dataset.json", "label 1 is 'liver', expected spleen"),
        (src / "labelsTr" / "amos_0002.nii.gz", "missing, amos_0002 of training needs it"),
        (
            src / "dataset.json",
            "lists 6 CT of training, expected 200 and 20 CT of validation, expected 100",
        ),
        (
            src / "labelsTr" / "amos_0003.nii.gz",
            "shape 24 x 20 x 16, while amos_0003.nii.gz has 23 x 20 x 16",
        ),
        (src / "labelsVa" / "amos_0009.nii.gz", "unknown label value 77"),
        (file, "damaged or cut off"),
    ]
    assert (code, out, len(lines)) == (2, "", 7) and lines[-1].startswith("amos: 6 faults")
    for line, (where, text) in zip(lines, wanted):
        assert line.startswith(f"amos: {where}: {text}")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_amos_continues_and_refuses_another_window_in_the_same_folder(src, tmp_path, capsys):
    assert run("--src", src, "--dst", tmp_path / "p", "--subset")[0] == 0
    before = {f: f.read_bytes() for f in (tmp_path / "p").rglob("*") if f.is_file()}
    shutil.rmtree(tmp_path / "p" / "cases" / WIDE)
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", "--subset", capsys=capsys)
    assert code == 0 and lines == ["amos: 25 cases are there from an earlier run, 1 to do"]
    assert {f: f.read_bytes() for f in (tmp_path / "p").rglob("*") if f.is_file()} == before
    code, _, lines = run(
        "--src", src, "--dst", tmp_path / "p", "--subset", "--crop", "none", capsys=capsys
    )
    assert (
        code == 2
        and "was prepared with crop {'kind': 'label', 'size': [192, 128, 128]}, now" in lines[0]
    )


def test_amos_makes_a_fake_of_the_published_counts_by_default(tmp_path, capsys):
    assert run("--make-fake", tmp_path / "fake")[0] == 0
    assert [len(list((tmp_path / "fake" / f"labels{p}").iterdir())) for p in ("Tr", "Va")] == [
        240,
        120,
    ]
    code, out, _ = run("--src", tmp_path / "fake", "--check", capsys=capsys)
    assert code == 0 and "300 cases checked" in out


def test_amos_trains_and_predicts_with_the_published_label_values(fakes, tmp_path):
    assert (
        run("--src", fakes / "few", "--dst", tmp_path / "p", "--subset", "--spacing", "12,12,40")[0]
        == 0
    )
    data, weights = open_data(tmp_path / "p"), tmp_path / "run" / "last.pt"
    assert data.meta["grid"] == [32, 16, 16]
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
    file, output = fakes / "few" / "imagesTr" / f"{WIDE}.nii.gz", tmp_path / "mask.nii.gz"
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
    assert mask.shape == (24, 20, 16) and set(np.unique(mask.dataobj)) <= set(range(16))
    np.testing.assert_array_equal(mask.affine, nib.load(file).affine)
