"""PatchDDM on BraTS: each year's layout is prepared, trained on, scored, and predicted from as it was published."""

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import patchddm
from common import loaders, runtime, tables
from data_prep import brats

NET = [
    "--preset",
    "tiny",
    "--num-channels",
    "8",
    "--channel-mult",
    "1,2",
    "--patch",
    "16",
    "--batch",
    "2",
]
RUN = ["--quiet", "--amp", "off", "--device", "cpu"]
FAST = ["--sampling-steps", "1", *RUN]
CLASSES = {"2018": "all", "2020": "regions", "2021": "all", "2023": "regions"}
LABELS = ["necrotic core", "oedema", "enhancing tumour"]
REGIONS = ["whole tumour", "tumour core", "enhancing tumour"]
CHANNELS = {False: ("t1", "t1ce", "t2", "flair"), True: ("t1n", "t1c", "t2w", "t2f")}  # by hyphens


@dataclass(frozen=True)
class Year:
    """A publisher's folder (not to be changed), the prepared one, and a run trained on it."""

    layout: str
    src: Path
    data: Path
    run: Path

    @property
    def enhancing(self) -> int:
        return 3 if self.layout == "2023" else 4

    @property
    def mark(self) -> str:
        return "-" if self.layout == "2023" else "_"

    def files(self, case: str) -> list[Path]:
        """The four files of a case in channel order; an unpacker's folder is passed by."""
        stems = [f"{case}{self.mark}{name}" for name in CHANNELS[self.layout == "2023"]]
        return [next(f for f in self.src.rglob(f"{stem}.nii*") if f.is_file()) for stem in stems]

    def predict(self, output: Path, *images: Path, flags: tuple[str, ...] = ()) -> Path:
        argv = [
            "predict",
            "--checkpoint",
            str(self.run / "best.pt"),
            "--output",
            str(output),
            *FAST,
            *flags,
        ]
        assert patchddm.main([*argv, "--image", *map(str, images)]) == 0
        return output


def give_each_label(file: Path) -> None:
    """A random last layer, centred so that no channel wins everywhere: three steps teach too little to see a label."""
    state = torch.load(file, weights_only=True)
    for part in ("model", "ema"):
        weight = torch.randn(
            state[part]["out.2.weight"].shape, generator=torch.Generator().manual_seed(0)
        )
        state[part]["out.2.weight"] = 0.02 * (weight - weight.mean(dim=(1, 2, 3, 4), keepdim=True))
        state[part]["out.2.bias"].fill_(0.5)
    torch.save(state, file)


def made(folder: Path, layout: str, classes: str) -> Year:
    year = Year(layout, folder / "src", folder / "data", folder / "run")
    assert brats.main(["--make-fake", str(year.src), "--layout", layout]) == 0
    assert (
        brats.main(
            ["--src", str(year.src), "--dst", str(year.data), "--classes", classes, "--quiet"]
        )
        == 0
    )
    argv = ["train", "--data", str(year.data), "--out", str(year.run), "--steps", "3", *NET, *RUN]
    assert patchddm.main(argv) == 0
    give_each_label(year.run / "best.pt")
    return year


@pytest.fixture(scope="session")
def years(tmp_path_factory) -> dict[str, Year]:
    return {
        layout: made(tmp_path_factory.mktemp(layout), layout, CLASSES[layout])
        for layout in brats.LAYOUTS
    }


@pytest.fixture(params=brats.LAYOUTS)
def year(request, years) -> Year:
    return years[request.param]


def voxels(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj)


def scores(file: Path) -> dict[str, list[float]]:
    """Class -> its Dice values in a metrics.csv."""
    found: dict[str, list[float]] = {}
    for row in tables.read_metrics_csv(file):
        found.setdefault(row["class"], []).append(row["dice"])
    return found


# --- train and evaluate ----------------------------------------------------------------------------------------------


def test_training_logs_what_is_scored(year):
    with open(year.run / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    names = REGIONS if CLASSES[year.layout] == "regions" else LABELS
    columns = [name for name in rows[0] if name.startswith("val_dice_")]
    assert columns == [f"val_dice_{name}" for name in names]
    assert all(0 <= float(rows[-1][name]) <= 1 for name in columns)
    record = runtime.load_checkpoint(year.run / "best.pt", "patchddm")["data"]
    assert list(record.get("regions", {})) == (REGIONS if names == REGIONS else [])


def test_evaluate_scores_regions_as_unions_or_else_labels(year, tmp_path):
    argv = [
        "evaluate",
        "--checkpoint",
        str(year.run / "best.pt"),
        "--data",
        str(year.data),
        "--out",
        str(tmp_path),
    ]
    assert patchddm.main([*argv, *FAST]) == 0
    data = loaders.open_data(str(year.data))
    (case,) = data.cases("test")
    pred, true = voxels(tmp_path / f"predictions/{case}.nii.gz"), np.asarray(data.label(case))
    pred = np.where(pred == year.enhancing, 3, pred)
    unions = {name: [value] for name, value in data.classes.items()}
    if CLASSES[year.layout] == "regions":
        unions = {"whole tumour": [1, 2, 3], "tumour core": [1, 3], "enhancing tumour": [3]}
    found = scores(tmp_path / "metrics.csv")
    assert list(found) == list(unions)
    for name, values in unions.items():
        p, t = np.isin(pred, values), np.isin(true, values)
        assert found[name] == [pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()), abs=1e-12)]
    assert len({values[0] for values in found.values()}) == 3 and min(found.values())[0] > 0


def test_network_trained_on_labels_is_scored_on_regions_of_the_same_data(years, tmp_path):
    year = years["2021"]
    argv = [
        "--src",
        str(year.src),
        "--dst",
        str(tmp_path / "data"),
        "--classes",
        "regions",
        "--quiet",
    ]
    assert brats.main(argv) == 0
    argv = ["evaluate", "--checkpoint", str(year.run / "best.pt"), "--data", str(tmp_path / "data")]
    assert patchddm.main([*argv, "--out", str(tmp_path / "e"), *FAST]) == 0
    assert list(scores(tmp_path / "e/metrics.csv")) == REGIONS


@pytest.mark.parametrize("layout", ["2020", "2023"])
def test_score_of_predicted_masks_against_published_labels_equals_evaluate(years, tmp_path, layout):
    year = years[layout]
    argv = ["evaluate", "--checkpoint", str(year.run / "best.pt"), "--data", str(year.data)]
    assert patchddm.main([*argv, "--out", str(tmp_path / "e"), *FAST]) == 0
    (case,) = loaders.open_data(str(year.data)).cases("test")
    year.predict(tmp_path / "masks", *year.files(case))
    (tmp_path / "true").mkdir()
    (label,) = year.src.rglob(f"{case}{year.mark}seg.nii*")
    shutil.copy(label, tmp_path / "true" / label.name.replace(f"{year.mark}seg", ""))
    v = year.enhancing
    classes = [f"whole tumour=1+2+{v}", f"tumour core=1+{v}", f"enhancing tumour={v}"]
    argv = [
        "--pred",
        str(tmp_path / "masks"),
        "--true",
        str(tmp_path / "true"),
        "--out",
        str(tmp_path / "s"),
    ]
    assert tables.main(["score", *argv, "--classes", *classes]) == 0
    scored, evaluated = (scores(tmp_path / name / "metrics.csv") for name in "se")
    assert list(scored) == REGIONS
    assert {k: pytest.approx(v, abs=1e-12) for k, v in scored.items()} == evaluated


# --- predict ---------------------------------------------------------------------------------------------------------


def test_published_folder_is_predicted_in_its_geometry_and_values(year, tmp_path, capsys):
    year.predict(tmp_path / "out", year.src)
    assert capsys.readouterr().out.count("not used: ") == 1
    data = loaders.open_data(str(year.data))
    cases = [case for split in data.meta["splits"].values() for case in split]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f"{case}.nii.gz" for case in cases
    )
    for case in cases:
        image, mask = nib.load(year.files(case)[0]), nib.load(tmp_path / f"out/{case}.nii.gz")
        assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert [int(mask.header[k]) for k in ("qform_code", "sform_code")] == [
            2,
            2,
        ]  # the images'; the label has 1
        assert set(np.unique(mask.dataobj)) == {0, 1, 2, year.enhancing}


def test_four_files_in_any_order_and_their_folder_give_one_mask(year, tmp_path, capsys):
    case = loaders.open_data(str(year.data)).cases("test")[0]
    t1, t1ce, t2, flair = year.files(case)
    year.predict(tmp_path / "a.nii.gz", flair, t1ce, t1, t2, flags=("--save", "maps"))
    year.predict(tmp_path / "b", t2, t1, flair, t1ce, flags=("--save", "maps"))
    whole = t1.parent
    assert whole.name == case
    year.predict(tmp_path / "c", whole, flags=("--save", "maps"))
    assert "not used: 1 files" in capsys.readouterr().out
    for pair in (("a.nii.gz", f"b/{case}.nii.gz"), (f"b/{case}.nii.gz", f"c/{case}.nii.gz")):
        np.testing.assert_array_equal(*(voxels(tmp_path / name) for name in pair))
    maps = [
        f"maps/a_mean_{LABELS[1]}",
        f"b/maps/{case}_mean_{LABELS[1]}",
        f"c/maps/{case}_mean_{LABELS[1]}",
    ]
    first, *others = (voxels(tmp_path / f"{name}.nii.gz") for name in maps)
    for other in others:  # a wrong order would show here, even where it changed no label
        np.testing.assert_array_equal(first, other)


def test_predict_of_files_in_any_order_agrees_with_evaluate(year, tmp_path):
    argv = [
        "evaluate",
        "--checkpoint",
        str(year.run / "best.pt"),
        "--data",
        str(year.data),
        "--out",
        str(tmp_path),
    ]
    assert patchddm.main([*argv, *FAST]) == 0
    (case,) = loaders.open_data(str(year.data)).cases("test")
    year.predict(tmp_path / "p.nii.gz", *reversed(year.files(case)))
    published = voxels(tmp_path / f"predictions/{case}.nii.gz")
    np.testing.assert_array_equal(
        voxels(tmp_path / "p.nii.gz")[::-1, ::-1], published
    )  # LPS -> RAS


def test_network_of_one_year_predicts_files_named_as_in_another(years, tmp_path):
    old, new = years["2021"], years["2023"]
    folder = new.files("BraTS-GLI-00003-000")[0].parent
    old.predict(tmp_path / "out", folder)
    mask = voxels(tmp_path / "out/BraTS-GLI-00003-000.nii.gz")
    assert set(np.unique(mask)) == {0, 1, 2, 4}  # the values of the year that it was trained on


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(year: Year, output: Path, capsys, *images: Path) -> str:
    """The one line of a predict that leaves with 2 and writes nothing."""
    capsys.readouterr()
    argv = ["predict", "--checkpoint", str(year.run / "best.pt"), "--output", str(output), *FAST]
    code = runtime.run_main("patchddm", patchddm.main, [*argv, "--image", *map(str, images)])
    line = capsys.readouterr().err
    assert (
        code == 2
        and line.startswith("patchddm: ")
        and line.count("\n") == 1
        and not output.exists()
    )
    return line


@pytest.fixture
def case(years, tmp_path) -> Path:
    """A copy of one case's folder of 2021, which a test may damage."""
    return Path(
        shutil.copytree(
            years["2021"].files("BraTS2021_00003")[0].parent, tmp_path / "BraTS2021_00003"
        )
    )


def test_predict_names_the_missing_modality_and_its_case(years, case, tmp_path, capsys):
    (case / "BraTS2021_00003_t1ce.nii.gz").unlink()
    wanted = "BraTS2021_00003_t1ce.nii.gz"
    expected = f"BraTS2021_00003 has no t1ce, expected {wanted}; add, rename"
    assert expected in refused(years["2021"], tmp_path / "out", capsys, case)
    assert expected in refused(years["2021"], tmp_path / "out", capsys, *case.glob("*[!g].nii.gz"))


def test_predict_names_both_files_of_one_modality(years, case, tmp_path, capsys):
    first, second = case / "BraTS2021_00003_t1.nii.gz", case / "BraTS2021_00003-t1n.nii.gz"
    shutil.copy(first, second)
    line = refused(years["2021"], tmp_path / "out", capsys, case)
    assert f"BraTS2021_00003 has 2 files for t1: {second} and {first}; add, rename" in line


def test_predict_names_a_folder_whose_files_tell_nothing(years, case, tmp_path, capsys):
    for file in case.iterdir():
        file.rename(
            file.with_name(file.name.replace("BraTS2021_00003_", "scan").replace("flair", "f"))
        )
    line = refused(years["2021"], tmp_path / "out", capsys, tmp_path)
    assert f"{tmp_path}: no NIfTI file" in line
