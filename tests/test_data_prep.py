"""From a publisher's folder to a prepared one: both layouts, each fault by its text, stops and continuations."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import InputError
from common.loaders import VolumeScan, data_record, open_data, read_nifti
from data_prep import _prepare, msd

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def fakes(tmp_path_factory) -> Path:
    """Two folders as publishers give them, `msd` and `nnunet`; not to be changed."""
    root = tmp_path_factory.mktemp("fakes")
    assert msd.main(["--make-fake", str(root / "msd")]) == 0
    assert msd.main(["--make-fake", str(root / "nnunet"), "--layout", "nnunet"]) == 0
    return root


@pytest.fixture
def src(fakes, tmp_path) -> Path:
    """A copy of the Decathlon fake that a test may damage."""
    return shutil.copytree(fakes / "msd", tmp_path / "src")


def run(*flags: object, capsys=None) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr."""
    if capsys:
        capsys.readouterr()
    code = msd.main([*map(str, flags), "--quiet"])
    out, err = capsys.readouterr() if capsys else ("", "")
    return code, out, err.splitlines()


def refused(src: Path, dst: Path, capsys, *flags: object) -> str:
    """The one line on stderr of a preparation that leaves with 2 and writes nothing."""
    code, out, lines = run("--src", src, "--dst", dst, *flags, capsys=capsys)
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert not dst.exists() and lines[0].startswith("msd: ")
    return lines[0].removeprefix("msd: ")


def change(file: Path, function, affine=None, dtype=None) -> Path:
    """Rewrite a NIfTI file with function(array)."""
    image = nib.load(file)
    array = function(np.asarray(image.dataobj).copy())
    new = nib.Nifti1Image(
        array.astype(dtype or array.dtype), image.affine if affine is None else affine
    )
    del image
    nib.save(new, file)
    return file


def edit(src: Path, **entries) -> None:
    """Replace entries of dataset.json; None takes one out."""
    meta = json.loads((src / "dataset.json").read_text()) | entries
    (src / "dataset.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()
    }


def at(index: int, value: float):
    """A function for `change`: sets five voxels from a flat index on."""

    def set_voxels(array: np.ndarray) -> np.ndarray:
        array = array if np.isfinite(value) else array.astype(np.float32)
        array.flat[index : index + 5] = value
        return array

    return set_voxels


# --- sound folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "channels"), [("msd", ["MRI"]), ("nnunet", ["T2", "ADC"])])
def test_msd_prepares_both_layouts(fakes, tmp_path, capsys, layout, channels):
    code, out, lines = run("--src", fakes / layout, "--dst", tmp_path / "p", capsys=capsys)
    assert (code, lines) == (0, [])
    data = open_data(tmp_path / "p")
    assert data.channels == channels and data.classes == {"core": 1, "shell": 2}
    assert [len(data.cases(s)) for s in ("train", "val", "test", "unlabelled")] == [8, 1, 1, 1]
    assert data.cases("unlabelled") == ["fake_011"] and not data.has_label("fake_011")
    assert data.meta["label_values"] == {"0": 0, "1": 1, "2": 2}
    image, label = np.array(data.image("fake_002")), np.array(data.label("fake_002"))
    assert image.dtype == np.float16 and image.min() >= 0 and image.max() <= 1
    assert image.shape == (len(channels), *label.shape) and set(np.unique(label)) == {0, 1, 2}
    assert (
        "11 cases (8 train, 1 val, 1 test, 1 unlabelled)" in out
        and "orientation  LAS, RAS -> RAS" in out
    )
    assert data.meta["cases"]["fake_002"]["original"]["orientation"] == "LAS"


def test_msd_turns_voxels_to_ras_with_image_and_label_together(fakes, tmp_path):
    run("--src", fakes / "msd", "--dst", tmp_path / "p")
    data = open_data(tmp_path / "p")
    published = np.asarray(nib.load(fakes / "msd" / "labelsTr" / "fake_002.nii.gz").dataobj)
    np.testing.assert_array_equal(data.label("fake_002"), published[::-1])  # LAS
    assert data.spacing("fake_002") == (1, 1, 2) and data.affine("fake_002")[0, 0] > 0
    raw = np.asarray(nib.load(fakes / "msd" / "imagesTr" / "fake_002.nii.gz").dataobj)[::-1]
    order = np.argsort(raw.ravel())
    assert (np.diff(np.array(data.image("fake_002"))[0].ravel()[order].astype(float)) >= 0).all()


def test_msd_manifest_counts_every_voxel(fakes, tmp_path, capsys):
    _, out, _ = run("--src", fakes / "msd", "--dst", tmp_path / "p", capsys=capsys)
    labels = [
        np.asarray(nib.load(f).dataobj)
        for f in (fakes / "msd" / "labelsTr").iterdir()
        if f.name[0] != "."
    ]
    count = sum(int((label == 2).sum()) for label in labels)
    assert f"label 2 (published 2) shell: {count:,} voxels" in out
    meta = json.loads((tmp_path / "p" / "dataset.json").read_text())
    assert meta["statistics"]["label_voxels"]["shell"] == count
    assert meta["manifest"] == out.splitlines()[1:]


def test_msd_resamples_to_the_spacing_asked_for(fakes, tmp_path):
    assert run("--src", fakes / "msd", "--dst", tmp_path / "p", "--spacing", "2,1,1")[0] == 0
    data = open_data(tmp_path / "p")
    assert data.spacing("fake_001") == (2, 1, 1) and data.shape("fake_001") == (12, 28, 32)
    assert data.meta["spacing"] == [2, 1, 1]
    assert set(np.unique(data.label("fake_001"))) <= {0, 1, 2}


def test_msd_gives_prediction_the_very_image_that_it_stored(fakes, tmp_path):
    run("--src", fakes / "msd", "--dst", tmp_path / "p", "--spacing", "1,1,1.5")
    data = open_data(tmp_path / "p")
    file = read_nifti(fakes / "msd" / "imagesTr" / "fake_002.nii.gz")
    image = VolumeScan("x", [file], data_record(data)).image
    np.testing.assert_array_equal(image, np.array(data.image("fake_002"), np.float32))


def test_msd_maps_labels_to_consecutive_values_and_prediction_maps_them_back(src, tmp_path):
    edit(src, labels={"0": "background", "2": "core", "4": "shell"})
    for file in (src / "labelsTr").glob("f*.nii.gz"):
        change(file, lambda a: a * 2)
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    data = open_data(tmp_path / "p")
    assert data.classes == {"core": 1, "shell": 2}
    assert data.meta["label_values"] == {"0": 0, "1": 2, "2": 4}
    file = src / "imagesTr" / "fake_002.nii.gz"
    scan = VolumeScan("x", [read_nifti(file)], data_record(data))
    mask = scan.mask(np.moveaxis(np.eye(3, dtype=np.float32)[data.label("fake_002")], 3, 0))
    np.testing.assert_array_equal(
        mask, np.asarray(nib.load(src / "labelsTr" / "fake_002.nii.gz").dataobj)
    )
    scan.target = tmp_path / "mask.nii.gz"
    scan.save(mask)
    np.testing.assert_array_equal(
        read_nifti(tmp_path / "mask.nii.gz").affine, read_nifti(file).affine
    )


def test_msd_splits_a_4d_image_with_channels_last(fakes, tmp_path):
    src = shutil.copytree(fakes / "nnunet", tmp_path / "src")
    meta = json.loads((src / "dataset.json").read_text())
    stems = sorted({f.name[:8] for f in (src / "imagesTr").glob("f*.nii.gz")})
    for stem in stems:
        parts = [nib.load(src / "imagesTr" / f"{stem}_{i:04d}.nii.gz") for i in range(2)]
        stack = np.stack([np.asarray(p.dataobj) for p in parts], axis=-1)
        nib.save(nib.Nifti1Image(stack, parts[0].affine), src / "imagesTr" / f"{stem}.nii.gz")
    listed = [{"image": f"./imagesTr/{s}.nii.gz", "label": f"./labelsTr/{s}.nii.gz"} for s in stems]
    labels = {str(v): k for k, v in meta["labels"].items()}
    edit(src, channel_names=None, modality={"0": "T2", "1": "ADC"}, training=listed, labels=labels)
    assert run("--src", src, "--dst", tmp_path / "4d")[0] == 0
    assert run("--src", fakes / "nnunet", "--dst", tmp_path / "3d")[0] == 0
    one, two = open_data(tmp_path / "4d"), open_data(tmp_path / "3d")
    np.testing.assert_array_equal(one.image("fake_002"), two.image("fake_002"))


def test_msd_reads_explicit_paths_of_nnunet(fakes, tmp_path):
    src = shutil.copytree(fakes / "nnunet", tmp_path / "src")
    cases = {
        f"one{i}": {
            "images": [f"imagesTr/fake_00{i}_0000.nii.gz", f"imagesTr/fake_00{i}_0001.nii.gz"],
            "label": f"labelsTr/fake_00{i}.nii.gz",
        }
        for i in (1, 2, 3)
    }
    edit(src, dataset=cases)
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    assert sorted(open_data(tmp_path / "p").meta["cases"]) == ["one1", "one2", "one3"]


def test_msd_reads_lists_of_nnunet_version_1(src, tmp_path):
    for file in (src / "imagesTr").glob("f*.nii.gz"):
        file.rename(file.with_name(file.name.replace(".nii", "_0000.nii")))
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    assert len(open_data(tmp_path / "p").meta["cases"]) == 11


def test_msd_takes_one_ct_window_from_the_training_foreground(src, tmp_path):
    edit(src, modality={"0": "CT"})
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    data = open_data(tmp_path / "p")
    rule = data.meta["normalisation"]["channels"][0]
    pooled = []
    for case in data.cases("train"):
        image, label = (
            np.asarray(nib.load(src / d / f"{case}.nii.gz").dataobj)
            for d in ("imagesTr", "labelsTr")
        )
        pooled.append(np.quantile(image[label > 0], np.linspace(0, 1, 1001)))
    low, high = np.percentile(np.concatenate(pooled), [0.5, 99.5])
    assert rule == {"kind": "window", "low": round(low, 3), "high": round(high, 3)}
    raw = np.asarray(nib.load(src / "imagesTr" / "fake_001.nii.gz").dataobj).astype(float)
    np.testing.assert_allclose(
        data.image("fake_001")[0], np.clip((raw - low) / (high - low), 0, 1), atol=1e-3
    )
    before = contents(tmp_path / "p")
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    assert contents(tmp_path / "p") == before


@pytest.mark.parametrize(
    ("name", "kind"),
    [("CT", "window"), ("ct", "window"), ("CTA phase", "percentile"), ("T1ct", "percentile")],
)
def test_msd_tells_ct_by_the_channels_name(src, tmp_path, name, kind):
    edit(src, modality={"0": name})
    run("--src", src, "--dst", tmp_path / "p")
    assert open_data(tmp_path / "p").meta["normalisation"]["channels"][0]["kind"] == kind


@pytest.mark.parametrize("offset", [0.0, 0.0009])
def test_msd_accepts_float_labels_that_are_integers_and_trailing_axes(src, tmp_path, offset):
    published = np.asarray(nib.load(src / "labelsTr" / "fake_004.nii.gz").dataobj)
    change(
        src / "labelsTr" / "fake_004.nii.gz", lambda a: (a - offset)[..., None], dtype=np.float64
    )
    change(src / "imagesTr" / "fake_004.nii.gz", lambda a: a[..., None])
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    np.testing.assert_array_equal(open_data(tmp_path / "p").label("fake_004"), published)


def test_msd_uses_the_images_affine_where_a_mismatch_is_allowed(src, tmp_path, capsys):
    file = change(
        src / "labelsTr" / "fake_002.nii.gz", lambda a: a, affine=np.eye(4)
    )  # the image is LAS
    code, _, lines = run(
        "--src", src, "--dst", tmp_path / "p", "--allow-affine-mismatch", capsys=capsys
    )
    assert code == 0 and len(lines) == 1
    assert lines[0].startswith(f"msd: note: {file}: ") and lines[0].endswith(
        "the image's affine is used for both"
    )
    published = np.asarray(nib.load(file).dataobj)
    np.testing.assert_array_equal(open_data(tmp_path / "p").label("fake_002"), published[::-1])


def test_msd_with_two_workers_writes_the_same_bytes(fakes, tmp_path):
    assert run("--src", fakes / "msd", "--dst", tmp_path / "one")[0] == 0
    assert run("--src", fakes / "msd", "--dst", tmp_path / "two", "--workers", "2")[0] == 0
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two") and len(one) == 2 + 3 * 11 - 1


# --- faults ----------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def flip_checksum(file: Path) -> None:
    blob = bytearray(file.read_bytes())
    blob[-6] ^= 1
    file.write_bytes(blob)


def claim_huge(file: Path) -> None:
    blob = bytearray(gzip.decompress(file.read_bytes()))
    blob[40:48] = np.array([3, 32767, 32767, 32767], "<i2").tobytes()
    file.write_bytes(gzip.compress(blob))


FILE_FAULTS = {
    "truncated": (truncate, "damaged or cut off"),
    "checksum": (flip_checksum, "damaged or cut off (BadGzipFile: CRC check failed"),
    "empty": (
        lambda f: f.write_bytes(b""),
        "the file is empty, expected a NIfTI volume; copy it again",
    ),
    "page": (
        lambda f: f.write_text("<html>404</html>"),
        "holds an HTML or XML page, not a volume",
    ),
    "huge": (claim_huge, "the header promises 32767 x 32767 x 32767 voxels"),
    "missing": (lambda f: f.unlink(), "missing, case fake_005 of dataset.json needs it"),
}


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_msd_names_a_damaged_file(src, tmp_path, capsys, folder, fault):
    file = src / folder / "fake_005.nii.gz"
    damage, text = FILE_FAULTS[fault]
    damage(file)
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(f"{file}: {text}") and line.endswith("; nothing was written")


NOT_FINITE = "5 voxels are NaN or Inf (as float32)"
CONTENT_FAULTS = {  # folder, damage, text
    "nan": ("imagesTr", lambda f: change(f, at(100, np.nan)), NOT_FINITE),
    "inf": ("imagesTr", lambda f: change(f, at(0, np.inf)), NOT_FINITE),
    "nan label": ("labelsTr", lambda f: change(f, at(0, np.nan)), NOT_FINITE),
    "shape": (
        "labelsTr",
        lambda f: change(f, lambda a: a[:, :-1]),
        "shape 25 x 27 x 16, while fake_005.nii.gz has 25 x 28 x 16",
    ),
    "spacing": (
        "labelsTr",
        lambda f: change(f, lambda a: a, affine=np.diag([-1.0, 1, 3, 1])),
        "spacing 1 x 1 x 3 mm, while fake_005.nii.gz has 1 x 1 x 2 mm",
    ),
    "2D image": (
        "imagesTr",
        lambda f: change(f, lambda a: a[:, :, 0]),
        "the volume is 2D, 25 x 28, expected 3D",
    ),
    "2D label": (
        "labelsTr",
        lambda f: change(f, lambda a: a[:, :, 0]),
        "the volume is 2D, 25 x 28, expected 3D",
    ),
    "4D image": (
        "imagesTr",
        lambda f: change(f, lambda a: np.stack([a] * 3, -1)),
        "3 channels, expected 1 (MRI); give exactly these",
    ),
    "4D label": (
        "labelsTr",
        lambda f: change(f, lambda a: np.stack([a] * 3, -1)),
        "the volume is 4D, 25 x 28 x 16 x 3, expected one 3D volume",
    ),
    "unknown": (
        "labelsTr",
        lambda f: change(f, at(0, 7)),
        "unknown label value 7 in 5 voxels, expected 0, 1, 2",
    ),
    "negative": (
        "labelsTr",
        lambda f: change(f, lambda a: at(0, -1)(a.astype(np.int8))),
        "negative label value -1 in 5 voxels, expected 0, 1, 2",
    ),
    "fraction": (
        "labelsTr",
        lambda f: change(f, lambda a: at(0, 0.5)(a.astype(np.float32))),
        "5 label voxels are not integers (0.5), expected whole numbers",
    ),
    "nearly": (
        "labelsTr",
        lambda f: change(f, lambda a: at(0, 1.998)(a.astype(np.float32))),
        "5 label voxels are not integers (1.998), expected whole numbers",
    ),
}


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_msd_names_a_fault_of_the_content(src, tmp_path, capsys, fault):
    folder, damage, text = CONTENT_FAULTS[fault]
    file = src / folder / "fake_005.nii.gz"
    damage(file)
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(f"{file}: {text}"), line


def test_msd_refuses_an_identity_affine_and_prints_both(src, tmp_path, capsys):
    file = change(src / "labelsTr" / "fake_005.nii.gz", lambda a: a, affine=np.diag([1.0, 1, 2, 1]))
    line = refused(src, tmp_path / "p", capsys)
    image = "fake_005.nii.gz has [[-1, 0, 0, -12], [0, 1, 0, -14], [0, 0, 2, -16]]"
    both = f"affine [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]], while {image}"
    assert line.startswith(f"{file}: {both}; if the voxels") and "--allow-affine-mismatch" in line


def test_msd_names_channel_files_on_different_grids(fakes, tmp_path, capsys):
    src = shutil.copytree(fakes / "nnunet", tmp_path / "src")
    file = change(src / "imagesTr" / "fake_003_0001.nii.gz", lambda a: a[1:])
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(
        f"{file}: shape 25 x 28 x 16, while fake_003_0000.nii.gz has 26 x 28 x 16"
    )


@pytest.mark.parametrize(("removed", "text"), [
    ("imagesTr/fake_003_0001.nii.gz", "imagesTr/fake_003: channel files 0000, expected 0000 to 0001; complete it"),
    ("labelsTr/fake_003.nii.gz", "labelsTr/fake_003.nii.gz: missing, case fake_003 of imagesTr needs it"),
])  # fmt: skip
def test_msd_names_what_nnunet_lacks(fakes, tmp_path, capsys, removed, text):
    src = shutil.copytree(fakes / "nnunet", tmp_path / "src")
    (src / removed).unlink()
    assert refused(src, tmp_path / "p", capsys).startswith(f"{src}/{text}")


def test_msd_names_a_label_without_image(fakes, tmp_path, capsys):
    src = shutil.copytree(fakes / "nnunet", tmp_path / "src")
    for file in (src / "imagesTr").glob("fake_003_*"):
        file.unlink()
    assert refused(src, tmp_path / "p", capsys).startswith(
        f"{src}/labelsTr/fake_003.nii.gz: a label without image"
    )


@pytest.mark.parametrize(("entries", "text"), [
    ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "label whole is a region, [1, 2]; expected one number"),
    ({"labels": {"background": 0, "core": 1, "ignore": 2}}, "has an ignore label (2), expected none"),
    ({"labels": {"0": "a", "1": "b", "2": "b"}}, "repeat a name or a value"),
    ({"labels": {"background": 1, "core": 0}}, "give background another value than 0"),
    ({"labels": {"core": "one"}}, "label core has the value 'one', expected an integer"),
    ({"labels": None}, "labels is None, expected names and numbers"),
    ({"modality": None}, "modality or channel_names is None"),
    ({"modality": {"1": "MRI"}}, "modality or channel_names is {'1': 'MRI'}"),
    ({"file_ending": ".mha"}, "file_ending is .mha, expected .nii.gz or .nii"),
    ({"training": [{"image": "./imagesTr/fake_001.nii.gz"}]}, "expected image and label"),
])  # fmt: skip
def test_msd_names_what_is_wrong_in_dataset_json(src, tmp_path, capsys, entries, text):
    edit(src, **entries)
    line = refused(src, tmp_path / "p", capsys)
    assert line.startswith(f"{src / 'dataset.json'}: ") and text in line


def test_msd_names_a_case_listed_twice(src, tmp_path, capsys):
    training = json.loads((src / "dataset.json").read_text())["training"]
    edit(src, training=[*training, training[3]])
    assert refused(src, tmp_path / "p", capsys).startswith(
        f"{src}: case fake_004 is there twice; remove one"
    )


def test_msd_names_a_folder_that_is_none(tmp_path, capsys):
    line = refused(tmp_path / "none", tmp_path / "p", capsys)
    assert (
        line
        == f"{tmp_path / 'none'}: no such folder, expected a Decathlon or nnU-Net raw folder; check --src"
    )
    (tmp_path / "none").mkdir()
    assert refused(tmp_path / "none", tmp_path / "p", capsys).startswith(
        f"{tmp_path / 'none'}: holds no dataset.json"
    )


def test_msd_says_which_files_it_leaves_out(src, tmp_path, capsys):
    edit(src, training=json.loads((src / "dataset.json").read_text())["training"][1:])
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert code == 0 and len(lines) == 2
    names = "imagesTr/fake_001.nii.gz, labelsTr/fake_001.nii.gz"
    assert lines[0].endswith(f"2 files are left out, no case has them: {names}")
    assert lines[1].endswith("numTraining is 10, labelled cases are 9")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("check", [True, False])
def test_msd_lists_all_faults_of_all_files_in_one_run(src, tmp_path, capsys, check, workers):
    truncate(src / "imagesTr" / "fake_001.nii.gz")
    change(src / "labelsTr" / "fake_001.nii.gz", at(0, 9))  # a second fault of the same case
    two = src / "labelsTr" / "fake_002.nii.gz"  # and two in one file
    change(two, lambda a: at(9, 300)(at(0, 9)(a.astype(np.int16))))
    (src / "labelsTr" / "fake_003.nii.gz").unlink()
    change(src / "imagesTr" / "fake_004.nii.gz", at(0, np.nan))
    before = contents(src)
    where = ["--check"] if check else ["--dst", tmp_path / "p"]
    code, out, lines = run("--src", src, *where, "--workers", workers, capsys=capsys)
    assert (code, out) == (2, "") and not (tmp_path / "p").exists() and contents(src) == before
    wanted = [
        (src / "labelsTr" / "fake_003.nii.gz", "missing"),
        (src / "imagesTr" / "fake_001.nii.gz", "damaged or cut off"),
        (src / "labelsTr" / "fake_001.nii.gz", "unknown label value 9 in 5"),
        (src / "labelsTr" / "fake_002.nii.gz", "unknown label value 9 in 5"),
        (src / "labelsTr" / "fake_002.nii.gz", "unknown label value 300 in 5"),
        (src / "imagesTr" / "fake_004.nii.gz", "5 voxels are NaN"),
    ]
    assert len(lines) == 7 and lines[-1].startswith("msd: 6 faults")
    for line, (file, text) in zip(lines, wanted):
        assert line.startswith(f"msd: {file}: {text}")


def test_msd_check_of_a_sound_folder_writes_nothing(src, tmp_path, capsys):
    before = contents(tmp_path)
    code, out, lines = run("--src", src, "--check", "--dst", tmp_path / "p", capsys=capsys)
    assert (
        (code, lines) == (0, [])
        and "11 cases checked, no faults" in out
        and contents(tmp_path) == before
    )


@pytest.mark.parametrize(("flags", "text"), [
    (["--bogus"], "unrecognized arguments: --bogus"),
    (["--workers", "0"], "'0' is not an integer of at least 1"),
    (["--spacing", "1,2"], "'1,2' is not one or three numbers"),
    (["--spacing", "1,nan,1"], "'1,nan,1' is not one or three numbers"),
    (["--spacing", "1,x,1"], "invalid"),
    ([], "--src and --dst are needed"),
    (["--make-fake", "."], "is not empty, expected a new folder"),
])  # fmt: skip
def test_msd_answers_a_wrong_flag_with_one_line(capsys, flags, text):
    code, out, lines = run(*flags, capsys=capsys)
    assert (
        (code, out, len(lines)) == (2, "", 1) and text in lines[0] and lines[0].startswith("msd: ")
    )


# --- the destination, stops and continuations ------------------------------------------------------------------------


def test_msd_refuses_a_destination_with_other_files(fakes, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("mine")
    code, _, lines = run("--src", fakes / "msd", "--dst", tmp_path / "p", capsys=capsys)
    assert code == 2 and lines == [
        f"msd: {tmp_path / 'p'}: holds other files, expected an empty or new folder; choose another --dst"
    ]
    assert contents(tmp_path / "p") == {"thesis.txt": b"mine"}


def test_msd_refuses_another_setup_in_the_same_destination(fakes, tmp_path, capsys):
    run("--src", fakes / "msd", "--dst", tmp_path / "p")
    before = contents(tmp_path / "p")
    code, _, lines = run(
        "--src", fakes / "msd", "--dst", tmp_path / "p", "--spacing", "1", capsys=capsys
    )
    assert code == 2 and "was prepared with spacing None, now [1.0, 1.0, 1.0]" in lines[0]
    code, _, lines = run("--src", fakes / "nnunet", "--dst", tmp_path / "p", capsys=capsys)
    assert code == 2 and "was prepared with source" in lines[0]
    assert contents(tmp_path / "p") == before


def test_msd_refuses_to_make_volumes_where_slices_are(fakes, tmp_path, capsys):
    flags = ("--src", fakes / "msd", "--dst", tmp_path / "p")
    assert run(*flags, "--as-slices", "--side", 32)[0] == 0
    before = contents(tmp_path / "p")
    code, _, lines = run(*flags, capsys=capsys)
    assert (
        code == 2 and "was prepared with slices" in lines[0] and contents(tmp_path / "p") == before
    )


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_msd_makes_a_case_again_whose_arrays_are_not_whole(src, tmp_path, harm):
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    file = tmp_path / "p/cases/fake_002/label.npy"
    whole = file.read_bytes()
    file.unlink() if harm == "missing" else file.write_bytes(whole[:-10])
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0 and file.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_msd_refuses_a_destination_in_which_another_run_is_at_work(fakes, tmp_path, capsys):
    with _prepare.alone_in(tmp_path / "p"):
        code, _, lines = run("--src", fakes / "msd", "--dst", tmp_path / "p", capsys=capsys)
    assert (
        code == 2
        and "another run is preparing it" in lines[0]
        and not list((tmp_path / "p").iterdir())
    )
    assert run("--src", fakes / "msd", "--dst", tmp_path / "p")[0] == 0  # once the other has ended


def test_msd_prepares_only_the_case_that_changed(src, tmp_path):
    run("--src", src, "--dst", tmp_path / "p")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "p" / "cases").rglob("*.npy")}
    change(src / "labelsTr" / "fake_006.nii.gz", lambda a: a * 0)
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
    changed = {f.parent.name for f, t in times.items() if f.stat().st_mtime_ns != t}
    assert changed == {"fake_006"} and not np.any(open_data(tmp_path / "p").label("fake_006"))


def test_msd_takes_a_relative_and_an_absolute_source_for_the_same(fakes, tmp_path, monkeypatch):
    run("--src", fakes / "msd", "--dst", tmp_path / "p")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "p/cases").rglob("*.npy")}
    monkeypatch.chdir(fakes)
    assert run("--src", "msd", "--dst", tmp_path / "p")[0] == 0
    assert {f: f.stat().st_mtime_ns for f in times} == times


SLOW = """
import sys, time
from data_prep import _prepare, msd
save = _prepare._save
def slow(path, array):
    save(path, array)
    time.sleep(0.05)
_prepare._save = slow
sys.exit(msd.main(sys.argv[1:]))
"""


def start_slow(src: Path, dst: Path, code: str = SLOW) -> subprocess.Popen:
    """A preparation that takes 0.1 s a case, once it has finished three."""
    flags = ["--src", str(src), "--dst", str(dst), "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    # a shell that starts the tests in the background makes all processes below it ignore SIGINT
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.time() + 30
    while (
        len(list(dst.glob("cases/fake*"))) < 3 and process.poll() is None and time.time() < deadline
    ):
        time.sleep(0.005)
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_msd_continues_after_a_stop_and_gives_the_same_bytes(fakes, tmp_path, capsys, number, code):
    process = start_slow(fakes / "msd", tmp_path / "p")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert not (tmp_path / "p" / "dataset.json").exists()
    there = sorted(f.name for f in (tmp_path / "p" / "cases").glob("fake*"))
    assert 3 <= len(there) < 11
    if number != signal.SIGKILL:
        assert not list((tmp_path / "p" / "cases").glob(".*"))  # the case in work is cleaned up
    times = {n: (tmp_path / "p" / "cases" / n / "image.npy").stat().st_mtime_ns for n in there}

    result, _, lines = run("--src", fakes / "msd", "--dst", tmp_path / "p", capsys=capsys)
    assert result == 0 and lines == [
        f"msd: {len(there)} cases are there from an earlier run, {11 - len(there)} to do"
    ]
    assert all(
        (tmp_path / "p" / "cases" / n / "image.npy").stat().st_mtime_ns == t
        for n, t in times.items()
    )
    run("--src", fakes / "msd", "--dst", tmp_path / "whole")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def test_msd_leaves_nothing_half_done_on_a_full_disk(fakes, tmp_path, capsys):
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (22600, 22600))\n" + SLOW
    process = start_slow(
        fakes / "msd", tmp_path / "p", limited
    )  # the third case's image has 23.4 kB
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1
    assert re.match(
        rf"msd: {tmp_path}/p/cases/fake_\d+: cannot be written \(File too large\); free space", err
    )
    names = sorted(f.name for f in (tmp_path / "p" / "cases").iterdir())
    assert names == ["fake_001", "fake_002"] and not (tmp_path / "p" / "dataset.json").exists()
    assert run("--src", fakes / "msd", "--dst", tmp_path / "p")[0] == 0
    assert len(open_data(tmp_path / "p").meta["cases"]) == 11


def test_msd_loses_nothing_when_stdout_is_closed(fakes, tmp_path):
    read, write = os.pipe()
    os.close(read)
    flags = ["--src", str(fakes / "msd"), "--dst", str(tmp_path / "p"), "--quiet"]
    command = [sys.executable, "-m", "data_prep.msd", *flags]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(open_data(tmp_path / "p").meta["cases"]) == 11


def test_over_cases_says_that_a_worker_was_killed():
    with pytest.raises(InputError, match="a worker process was killed"):
        list(_prepare.over_cases(os._exit, [(0,)] * 4, 2, "x", True))


def test_over_cases_runs_every_job_once_with_workers():
    done = sorted(_prepare.over_cases(abs, [(-i,) for i in range(23)], 3, "x", True))
    assert done == list(range(23))


def test_make_fake_writes_what_the_check_passes(fakes):
    for layout in ("msd", "nnunet"):
        assert run("--src", fakes / layout, "--check")[0] == 0
        assert any(f.name.startswith("._") for f in (fakes / layout / "imagesTr").iterdir())
    orientations = {
        "".join(nib.aff2axcodes(nib.load(f).affine))
        for f in (fakes / "msd" / "labelsTr").glob("f*")
    }
    types = {nib.load(f).get_data_dtype() for f in (fakes / "msd" / "labelsTr").glob("f*")}
    assert orientations == {"RAS", "LAS"} and types == {np.dtype(np.uint8), np.dtype(np.float32)}


# --- what must not happen unseen -------------------------------------------------------------------------------------


def test_msd_refuses_to_move_cases_to_another_split(src, tmp_path, capsys):
    assert run("--src", src, "--dst", tmp_path / "p", "--split-sizes", "6,2,2")[0] == 0
    before = (tmp_path / "p/dataset.json").read_bytes()
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert code == 2 and "cases would go to another split, such as fake_" in lines[-1]
    assert (tmp_path / "p/dataset.json").read_bytes() == before
    assert run("--src", src, "--dst", tmp_path / "p", "--split-sizes", "6,2,2")[0] == 0


def test_msd_takes_labelled_test_cases_as_the_test_set(src, tmp_path, capsys):
    meta = json.loads((src / "dataset.json").read_text())
    edit(src, training=meta["training"][3:], test=meta["training"][:3], numTraining=None)
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert code == 0 and any(
        "3 labelled cases that dataset.json lists as test are the test set (with" in s
        for s in lines
    )
    splits = open_data(tmp_path / "p").meta["splits"]
    assert splits["test"] == ["fake_001", "fake_002", "fake_003"]
    assert (
        sorted(splits["train"] + splits["val"]) == [f"fake_{i:03d}" for i in range(4, 11)]
        and splits["val"]
    )


@pytest.mark.parametrize(("entries", "text"), [
    ({"training": 20}, "training is 20, expected a list of cases"),
    ({"test": 20}, "test is 20, expected a list of cases"),
    ({"dataset": {"a": {"images": ["x"], "label": 5}}}, "case a is {'images': ['x'], 'label': 5}, expected images"),
    ({"dataset": {"a": {"images": "x"}}}, "case a is {'images': 'x'}, expected images and label"),
    ({"labels": {"0": "background", "70000": "core"}}, "labels go up to 70000, expected at most 65535"),
])  # fmt: skip
def test_msd_names_an_entry_of_another_kind(src, tmp_path, capsys, entries, text):
    edit(src, **entries)
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert code == 2 and any(text in line for line in lines) and not (tmp_path / "p").exists()


def test_msd_refuses_two_files_of_one_name(fakes, tmp_path, capsys):
    src = shutil.copytree(fakes / "nnunet", tmp_path / "src")
    for folder, name in (("imagesTr", "fake_003_0001"), ("labelsTr", "fake_004")):
        nib.save(nib.load(src / folder / f"{name}.nii.gz"), src / folder / f"{name}.nii")
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert code == 2 and sum("as well; remove one" in line for line in lines) == 2


def test_an_image_as_label_is_a_dozen_lines(src, tmp_path, capsys):
    shutil.copy(src / "imagesTr/fake_005.nii.gz", src / "labelsTr/fake_005.nii.gz")
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert (
        code == 2
        and len(lines) <= _prepare.MANY + 2
        and any("more such values; is this an image?" in s for s in lines)
    )


def test_ct_without_negative_values_is_said(src, tmp_path, capsys):
    edit(src, modality={"0": "CT"})
    code, _, lines = run("--src", src, "--dst", tmp_path / "p", capsys=capsys)
    assert code == 0 and sum("are these Hounsfield units?" in line for line in lines) == 11


def test_a_case_that_does_not_fit_the_memory_is_one_line(src, tmp_path, capsys, monkeypatch):
    def full(source, case, *args):
        if case.id == "fake_004":
            raise MemoryError
        return None

    monkeypatch.setattr(_prepare, "load_case", full)
    assert refused(src, tmp_path / "p", capsys).startswith(
        "fake_004: does not fit the memory; use fewer --workers"
    )


def test_what_a_killed_write_left_does_not_stop_the_next_run(src, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/.prepare.json.123.tmp").write_text("{")
    assert run("--src", src, "--dst", tmp_path / "p")[0] == 0
