"""FLARE22 to slices: published names, labels, splits, the window over unlabelled cases, counts, each fault."""

import argparse
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.loaders import open_data
from data_prep import flare22

LABELLED, PRETRAIN = "FLARE22_LabeledCase50", "FLARE22_UnlabeledCase1-1000"


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """The fake; not to be changed."""
    root = tmp_path_factory.mktemp("flare") / "src"
    assert flare22.main(["--make-fake", str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def done(made, tmp_path_factory) -> Path:
    """The fake prepared; not to be changed."""
    dst = tmp_path_factory.mktemp("flare22") / "flare22"
    assert flare22.main(["--src", str(made), "--dst", str(dst), "--side", "32", "--quiet"]) == 0
    return dst


@pytest.fixture
def src(made, tmp_path) -> Path:
    """A copy of the fake that a test may damage."""
    return shutil.copytree(made, tmp_path / "src")


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def listed(src: Path) -> flare22.Source:
    return flare22.read_source(src, argparse.Namespace(side=None, spacing=None, fov_pad=None))


def published(root: Path) -> Path:
    """All 50 and 2000 names, empty files: 1-1000 in four parts, as they are given too."""
    for i in range(1, 51):
        touch(root / LABELLED / "images", f"FLARE22_Tr_{i:04d}_0000.nii.gz")
        touch(root / LABELLED / "labels", f"FLARE22_Tr_{i:04d}.nii.gz")
    for i in range(1, 2001):
        part = (
            f"UnlabeledCase{250 * ((i - 1) // 250) + 1}"
            if i <= 1000
            else "FLARE22_UnlabeledCase1001-2000"
        )
        touch(root / part, f"Case_{i:05d}_0000.nii.gz")
    return root


def refused(src: Path, capsys, *flags: object) -> str:
    """The one line of a check that leaves with 2."""
    capsys.readouterr()
    assert flare22.main(["--src", str(src), "--check", "--quiet", *map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flare22: ") and error.count("\n") == 1, error
    return error


def test_published_names_are_found_wherever_they_lie(tmp_path):
    source = listed(published(tmp_path))
    assert not source.faults and not source.notes and len(source.cases) == 2050
    assert source.counts == {"labelled cases": (50, 50), "unlabelled cases 1-1000": (1000, 1000)}
    case = next(c for c in source.cases if c.id == "FLARE22_Tr_0007")
    assert case.label and case.label.name == "FLARE22_Tr_0007.nii.gz"


def test_pretraining_is_on_unlabelled_cases_1_to_1000(tmp_path):
    pretrain = listed(published(tmp_path)).pretrain
    assert len(pretrain) == 1000 and pretrain[0] == "Case_00001" and pretrain[-1] == "Case_01000"


@pytest.mark.parametrize(
    "later, words",
    [(True, "use later unlabelled cases, pre-training train too"), (False, "use train")],
)
def test_what_stands_in_for_missing_cases_is_said(later, words, tmp_path):
    for i in range(1, 6):
        touch(tmp_path / LABELLED / "images", f"FLARE22_Tr_{i:04d}_0000.nii.gz")
        touch(tmp_path / LABELLED / "labels", f"FLARE22_Tr_{i:04d}.nii.gz")
    if later:
        touch(tmp_path / "FLARE22_UnlabeledCase1001-2000", "Case_01001_0000.nii.gz")
    assert listed(tmp_path).notes[-1].endswith(f"pre-training and the window will {words}")


def test_split_is_40_0_10_shuffled_by_seed_0(tmp_path):
    splits = listed(published(tmp_path)).splits
    assert {part: len(cases) for part, cases in splits.items()} == {
        "train": 40,
        "val": 0,
        "test": 10,
    }
    order = [f"FLARE22_Tr_{i:04d}" for i in range(1, 51)]
    np.random.RandomState(0).shuffle(order)
    assert splits["train"] + splits["test"] == order


def test_classes_are_in_the_publishers_order():
    names = ["liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
             "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney"]  # fmt: skip
    assert list(flare22.CLASSES) == names


def test_fake_is_prepared_as_slices(done):
    data = open_data(str(done), "slices")
    sizes = {"train": 4, "val": 0, "test": 1, "unlabelled": 7, "pretrain": 6}
    assert {split: len(data.cases(split)) for split in data.meta["splits"]} == sizes
    assert data.side == 32 and data.image("Case_00001").dtype == np.int16
    assert "Case_01001" in data.cases("unlabelled") and "Case_01001" not in data.cases("pretrain")
    assert set(np.unique(data.label("FLARE22_Tr_0003"))) == set(range(14))  # stored as float32
    assert data.depth("Case_00003") == 12  # 24 slices of half the distance


def test_window_is_the_percentiles_of_cases_1_to_1000(made, done):
    files = sorted((made / PRETRAIN).glob("Case*.nii.gz"))
    values = np.concatenate([np.rint(np.asarray(nib.load(f).dataobj)).ravel() for f in files])
    data = open_data(str(done), "slices")
    low, high = np.percentile(np.maximum(values, -1024), [0.5, 99.5])
    rule, s = data.meta["normalisation"], data.meta["statistics"]
    assert (rule["low"], rule["high"]) == pytest.approx((low, high), abs=1e-9)
    assert (s["voxels"], s["raised"], s["window_cases"]) == (values.size, (values < -1024).sum(), 6)
    assert s["raised"] > 1000


def test_organs_lie_where_the_body_has_them(done):
    """On the screen: the liver on the left, the spleen on the right, also of the case that is stored in LAS."""
    data = open_data(str(done), "slices")
    assert data.meta["cases"]["FLARE22_Tr_0002"]["original"]["orientation"] == "LAS"
    for case in data.cases("train") + data.cases("test"):
        labels = np.stack(
            [data.slice_label(case, k) for k in range(data.depth(case))]
        )  # [Z, rows, columns]
        place = {
            name: np.argwhere(labels == data.classes[name])[:, 2].mean()
            for name in ("liver", "spleen")
        }
        assert place["liver"] < 16 < place["spleen"]


def test_counts_are_printed_beside_the_papers(made, tmp_path, capsys):
    assert (
        flare22.main(["--src", str(made), "--dst", str(tmp_path / "p"), "--side", "32", "--quiet"])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "train 48 (paper 3,879)" in out
        and "test 12 (paper 915)" in out
        and "pretrain 72 (paper 207,029)" in out
    )
    assert "labelled cases 5 of 50, unlabelled cases 1-1000 6 of 1000" in out


def test_split_sizes_cut_the_same_order(made, tmp_path):
    flags = [
        "--src",
        str(made),
        "--dst",
        str(tmp_path / "p"),
        "--side",
        "32",
        "--quiet",
        "--split-sizes",
        "3,1,1",
    ]
    assert flare22.main(flags) == 0
    splits = open_data(str(tmp_path / "p"), "slices").meta["splits"]
    usual = flare22.split([f"FLARE22_Tr_{i:04d}" for i in range(1, 6)])
    assert splits["train"] + splits["val"] + splits["test"] == usual["train"] + usual["test"]


def test_without_unlabelled_cases_the_labelled_ones_serve(src, tmp_path, capsys):
    for folder in src.glob("FLARE22_Unlabeled*"):
        shutil.rmtree(folder)
    assert (
        flare22.main(["--src", str(src), "--dst", str(tmp_path / "p"), "--side", "32", "--quiet"])
        == 0
    )
    assert "no unlabelled case 1-1000" in capsys.readouterr().err
    data = open_data(str(tmp_path / "p"), "slices")
    assert (
        data.cases("pretrain") == data.cases("train") and data.meta["normalisation"]["high"] > 100
    )


def test_other_files_are_counted_and_left_out(src, capsys):
    touch(src / "FLARE22_Validation", "FLARETs_0001_0000.nii.gz")
    assert flare22.main(["--src", str(src), "--check", "--quiet"]) == 0
    assert "1 other files, left out: FLARETs_0001_0000.nii.gz" in capsys.readouterr().err


def test_image_without_label_is_a_fault(src, capsys):
    (src / LABELLED / "labels" / "FLARE22_Tr_0002.nii.gz").unlink()
    assert "FLARE22_Tr_0002_0000.nii.gz: has no label, expected FLARE22_Tr_0002.nii.gz" in refused(
        src, capsys
    )


def test_label_without_image_is_a_fault(src, capsys):
    (src / LABELLED / "images" / "FLARE22_Tr_0002_0000.nii.gz").unlink()
    assert "FLARE22_Tr_0002.nii.gz: a label without image" in refused(src, capsys)


def test_a_case_that_is_there_twice_is_a_fault(src, capsys):
    shutil.copytree(src / PRETRAIN, src / "part1")
    capsys.readouterr()
    assert flare22.main(["--src", str(src), "--check", "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("is there twice, also" in line for line in lines) == 6


def test_hounsfield_units_plus_1024_are_refused_by_name(src, capsys):
    file = src / PRETRAIN / "Case_00005_0000.nii.gz"
    image = nib.load(file)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1024, image.affine), file)
    line = refused(src, capsys)
    assert "Case_00005_0000.nii.gz: intensities from 0 to" in line and "HU + 1024?" in line


def test_an_unknown_label_value_is_refused(src, capsys):
    file = src / LABELLED / "labels" / "FLARE22_Tr_0001.nii.gz"
    image = nib.load(file)
    values = np.asarray(image.dataobj).copy()
    values[0, 0, :3] = 14
    nib.save(nib.Nifti1Image(values, image.affine), file)
    assert "unknown label value 14 in 3 voxels" in refused(src, capsys)


@pytest.mark.parametrize(
    ("archive", "remedy"), [(False, "check --src"), (True, "unpack the archives first")]
)
def test_a_folder_without_cases_is_refused(tmp_path, capsys, archive, remedy):
    touch(tmp_path, *["FLARE22_UnlabeledCase1-1000.zip"] * archive)
    line = refused(tmp_path, capsys)
    assert "holds no case of FLARE22" in line and remedy in line


def test_norm_is_no_flag_of_ct(made, capsys):
    assert "--norm" in refused(made, capsys, "--norm", "corpus")
