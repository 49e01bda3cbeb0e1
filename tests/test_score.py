"""score: two folders of masks, whatever lies in them."""

import gzip
import json
import math
import struct

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from common import tables


def cube(*start):
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[tuple(slice(s, s + 4) for s in start)] = 1
    return mask


def save(path, labels, spacing=(1.0, 1.0, 1.0), shift=0.0, dtype=np.uint8):
    """A mask as NIfTI or, where the name says so, as an image."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if ".nii" not in path.name.lower():
        Image.fromarray(labels.astype(dtype)).save(path)
        return
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = shift
    image = nib.Nifti1Image(labels.astype(dtype), affine)
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


@pytest.fixture
def score(tmp_path, capsys):
    """Scores tmp_path/pred against tmp_path/true; the exit code, what was printed, the rows."""

    def run(*flags):
        words = ["score", "--pred", tmp_path / "pred", "--true", tmp_path / "true", *flags]
        code = tables.main([str(word) for word in words])
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (code != 0)
        return code, printed.out, printed.err

    return run


def rows_of(folder):
    return {(r["case"], r["class"]): r for r in tables.read_metrics_csv(folder / "metrics.csv")}


def test_score_takes_the_spacing_of_the_headers_and_writes_both_files(tmp_path, score):
    true = cube(3, 3, 3) + 2 * cube(8, 8, 8)
    for case, pred in (("one", np.roll(true, 1, axis=2)), ("two", true)):
        save(tmp_path / f"pred/{case}.nii.gz", pred, (0.75, 0.75, 2.5))
        save(tmp_path / f"true/{case}_0000.NII", true, (0.75, 0.75, 2.5), dtype=np.float32)
    flags = ("--classes", "organ=1", "lesion=2,absent=9", "--out", tmp_path / "out")
    code, out, _ = score(*flags)
    assert code == 0 and "organ" in out and "Units: mm" in out
    rows = rows_of(tmp_path / "out")
    assert [*rows] == [(c, n) for c in ("one", "two") for n in ("organ", "lesion", "absent")]
    first = rows["one", "organ"]
    assert first["hd95_mm"] == 2.5 and first["nsd"] == pytest.approx(0.714285714)
    assert first["volume_true_ml"] == pytest.approx(64 * 0.75 * 0.75 * 2.5 / 1000)
    summary = tables.read_summary(tmp_path / "out/summary.json")
    assert summary["classes"]["organ"]["dice"]["mean"] == pytest.approx((0.75 + 1) / 2)
    assert summary["classes"]["absent"]["dice"]["n_excluded"] == 2
    assert "--overwrite" in score(*flags)[2] and score(*flags, "--overwrite")[0] == 0


def test_score_tells_the_prediction_from_the_truth(tmp_path, score):
    save(tmp_path / "pred/a.nii", cube(3, 3, 3) | cube(4, 3, 3))
    save(tmp_path / "true/a.nii", cube(3, 3, 3))
    score("--out", tmp_path / "out")
    row = rows_of(tmp_path / "out")["a", "1"]
    assert [row["volume_pred_ml"], row["volume_true_ml"]] == pytest.approx([0.08, 0.064])


def test_score_takes_unions_of_label_values_and_names_the_others(tmp_path, score):
    true = cube(3, 3, 3) + 4 * cube(8, 8, 8)
    save(tmp_path / "pred/a.nii", np.where(true == 1, 2, true))
    save(tmp_path / "true/a.nii", true)
    classes = ("--classes", "whole tumour=1+2+4", "core=1+4,enhancing=4")
    assert score(*classes, "--out", tmp_path / "out")[0] == 0
    dices = [row["dice"] for row in rows_of(tmp_path / "out").values()]
    assert dices == pytest.approx([1, 2 / 3, 1])
    assert "Values of no class: 1, 2" in score("--classes", "enhancing=4")[1]


def test_score_without_classes_takes_every_value_of_any_file(tmp_path, score):
    for case, pred, true in (("a", 2, 2), ("b", 10, 0)):
        save(tmp_path / f"pred/{case}.nii", cube(3, 3, 3) * pred)
        save(tmp_path / f"true/{case}.nii", cube(3, 3, 3) * true)
    assert score("--out", tmp_path / "out")[0] == 0
    assert [*rows_of(tmp_path / "out")] == [(c, n) for c in "ab" for n in ("2", "10")]
    entry = tables.read_summary(tmp_path / "out/summary.json")["classes"]["10"]["dice"]
    assert [entry["n_spurious"], entry["n_excluded"]] == [1, 1]


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 1, "both": [1, 2], "ignore": 7},
        {"0": "background", "1": "liver", "2": "spleen"},
    ],
)
def test_score_takes_classes_from_a_dataset_json_beside_the_truth(tmp_path, score, labels):
    true = cube(3, 3, 3) + 2 * cube(8, 8, 8)
    true[cube(0, 0, 8) > 0] = labels.get("ignore", 0)
    save(tmp_path / "pred/a.nii", cube(3, 3, 3) | cube(0, 0, 8))
    save(tmp_path / "true/a.nii", true)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    _, out, _ = score()
    first, second = (line.split() for line in out.splitlines()[2:4])
    assert [first[0], second[0]] == ["liver", "both" if "ignore" in labels else "spleen"]
    assert first[1] == ("1.000" if "ignore" in labels else "0.667")


def test_score_of_images_is_in_pixels(tmp_path, score):
    for side, column in (("pred", 4), ("true", 2)):
        mask = np.zeros((20, 10), np.uint8)
        mask[5:15, column] = 255
        save(tmp_path / side / "slide.png", mask)
    code, out, _ = score("--classes", "gland=255")
    assert code == 0 and "Units: pixels" in out
    assert out.splitlines()[1].split()[:4] == ["gland", "0.000", "0.000", "2.00"]


@pytest.mark.parametrize(
    "pred, true",
    [
        ("img0006.nii.gz", "label0006.nii.gz"),
        ("testA_1.png", "testA_1_anno.bmp"),
        ("case1.nii", "HGG/case1/case1_seg.nii.gz"),
        ("a.PNG", "a.tif"),
    ],
)
def test_score_pairs_names_as_publishers_give_them(tmp_path, score, pred, true):
    mask = cube(3, 3, 3)
    save(tmp_path / "pred" / pred, mask if ".nii" in pred else mask[5])
    save(tmp_path / "true" / true, mask if ".nii" in true else mask[5])
    image = true.replace("_seg", "_flair").replace("_anno", "").replace("label", "x")
    if image != true and "x0006" not in image:
        save(tmp_path / "true" / image, mask if ".nii" in true else mask[5])  # beside the mask
    code, out, _ = score()
    assert code == 0 and "1.000" in out.splitlines()[-4]


def rgb(path):
    colours = np.zeros((12, 12, 12), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), path)


def huge(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<4h", content, 40, 3, 32767, 32767, 32767)
    path.write_bytes(gzip.compress(bytes(content)))


def palette(path):
    image = Image.fromarray(np.zeros((12, 12), np.uint8)).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(path)


ODD = {
    "rgb.nii.gz": (rgb, "RGB"),
    "huge.nii.gz": (huge, "32767"),
    "cut.nii.gz": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "cut off"),
    "fraction.nii.gz": (lambda p: save(p, cube(3, 3, 3) * 0.5, dtype=np.float32), "not integers"),
    "shape.nii.gz": (lambda p: save(p, cube(3, 3, 3)[1:]), "(11, 12, 12)"),
    "affine.nii.gz": (lambda p: save(p, cube(3, 3, 3), shift=0.002), "differ by 0.002 mm"),
    "alone.nii.gz": (lambda p: p.unlink(), "no mask in"),
    "twice.nii.gz": (lambda p: save(p.with_name("twice_0000.nii"), cube(3, 3, 3)), "two masks"),
    "whole_slide.png": (lambda p: Image.new("1", (20000, 20000)).save(p), "pixels"),
    "jpeg.png": (lambda p: Image.new("L", (12, 12)).save(p, "JPEG"), "JPEG"),
    "palette.png": (palette, "palette"),
    "page.png": (lambda p: p.write_text("<html>"), "page.png"),
}


def test_score_names_every_odd_file_and_scores_the_others(tmp_path, score):
    for name in ("good.nii.gz", *ODD):
        for side in ("pred", "true"):
            mask = cube(3, 3, 3)
            save(tmp_path / side / name, mask[5] if name.endswith("png") else mask)
        if name in ODD:
            ODD[name][0](tmp_path / "pred" / name)
    code, out, err = score("--out", tmp_path / "out")
    assert code == 2 and [*rows_of(tmp_path / "out")] == [("good", "1")] and "1.000" in out
    faults = dict(part.split(": ", 1) for part in err.split("cases: ")[1].split(" | "))
    assert [*faults] == sorted(name.split(".")[0] for name in ODD)
    assert [name for name, (_, word) in ODD.items() if word not in faults[name.split(".")[0]]] == []


def test_score_takes_what_preparation_takes(tmp_path, score):
    """A .nii.gz that is not packed, labels off by rounding, labels stored with a slope."""
    for case in ("plain", "rounded", "slope"):
        for side in ("pred", "true"):
            save(tmp_path / side / f"{case}.nii.gz", cube(3, 3, 3))
    plain = tmp_path / "pred/plain.nii.gz"
    content = gzip.decompress(plain.read_bytes())
    plain.write_bytes(content)
    save(tmp_path / "pred/rounded.nii.gz", cube(3, 3, 3) * 1.0000002, dtype=np.float32)
    scaled = bytearray(content)
    struct.pack_into("<2f", scaled, 112, 0.01, 0)
    scaled[352:] = (cube(3, 3, 3) * 100).tobytes(order="F")
    (tmp_path / "pred/slope.nii.gz").write_bytes(gzip.compress(bytes(scaled)))
    code, out, _ = score()
    assert code == 0 and "1.000±0.000" in out


def test_score_prints_object_scores_of_instance_maps(tmp_path, score):
    true = np.zeros((12, 12), np.uint16)
    true[:4, :4], true[6:, 6:] = 300, 700  # ids above 255
    save(tmp_path / "true/a.png", true, dtype=np.uint16)
    save(tmp_path / "pred/a.png", (true > 0) * 255)
    _, out, _ = score("--instances")
    assert "pred: one value a mask" in out and "true:" not in out
    assert ["a", "2", "2", "1.0000", "1.0000", "1.0000", "1.0000"] in [
        s.split() for s in out.splitlines()
    ]


def test_score_refuses_flags_and_folders_that_cannot_be_used(tmp_path, score):
    save(tmp_path / "pred/a.nii", cube(3, 3, 3))
    assert f"{tmp_path}/true is no folder" in score()[2]
    (tmp_path / "true").mkdir()
    assert "has no .nii" in score()[2]
    save(tmp_path / "true/a.nii", cube(3, 3, 3))
    for flags, message in (
        (("--classes", "organ"), "NAME=VALUE"),
        (("--classes", "a=1", "a=2"), "names a twice"),
        (("--tolerance", "-1"), "--tolerance is -1"),
        (("--instances", "--out", "x"), "leave the other flags out"),
    ):
        assert message in score(*flags)[2]
    assert math.isclose(0, score()[0])
