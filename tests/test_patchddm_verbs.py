"""patchddm.py: the verbs grid, profile and sample, devices, memory; the paper's outlook and its figure 5."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import patchddm as P
from common import InputError
from common.old import loaders, metrics, runtime

NET = [
    "--num-channels",
    "4",
    "--channel-mult",
    "1,2",
    "--num-groups",
    "2",
    "--patch",
    "16",
    "--batch",
    "2",
]
FAST = [*NET, "--sampling-steps", "2", "--limit", "2", "--quiet", "--amp", "off", "--device", "cpu"]
SMALL = {
    "num_channels": 4,
    "channel_mult": (1, 2),
    "num_groups": 2,
    "patch": (8,),
    "batch": 2,
    "device": "cpu",
}
CPU = torch.device("cpu")


def tiny_data():
    return loaders.Phantoms(0, (3, 1, 2), shape=(16, 16, 12))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert P.main(["train", *FAST, "--out", str(out), "--steps", "4"]) == 0
    return out


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("generator") / "run"
    assert (
        P.main(
            [
                "train",
                *FAST,
                "--out",
                str(out),
                "--steps",
                "3",
                "--task",
                "generate",
                "--channel-mult",
                "1,2",
            ]
        )
        == 0
    )
    return out


def use(run: Path, *argv: str) -> list[str]:
    few = ["--limit", "2"] if argv[0] in ("evaluate", "grid") else []
    return [argv[0], "--checkpoint", str(run / "last.pt"), *few, "--quiet", *argv[1:]]


# --- grid ------------------------------------------------------------------------------------------------------------


def test_grid_scores_what_evaluate_scores(trained, tmp_path):
    argv = ["--sampling-steps", "3,1", "--ensemble", "2,1"]
    assert P.main(use(trained, "grid", "--out", str(tmp_path / "grid"), *argv)) == 0
    cells = runtime.read_csv(tmp_path / "grid/grid.csv")
    assert {(c["sampling_steps"], c["ensemble"], c["evaluations"]) for c in cells} == {
        ("1", "1", "1"),
        ("1", "2", "2"),
        ("3", "1", "3"),
        ("3", "2", "6"),
    }
    for steps in ("1", "3"):
        out = tmp_path / f"evaluate{steps}"
        assert (
            P.main(
                use(
                    trained,
                    "evaluate",
                    "--out",
                    str(out),
                    "--sampling-steps",
                    steps,
                    "--ensemble",
                    "2",
                )
            )
            == 0
        )
        for size, name in (("1", "summary_ensemble1.json"), ("2", "summary.json")):
            mean = metrics.read_summary(out / name)["mean"]
            cell = next(c for c in cells if (c["sampling_steps"], c["ensemble"]) == (steps, size))
            for metric in ("dice", "hd95_mm"):
                assert float(cell[f"{metric}_mean"]) == pytest.approx(
                    mean[metric]["mean"], rel=1e-5, nan_ok=True
                )
    assert len(list((tmp_path / "grid/figures").glob("grid_ddim_*.png"))) == 2


def test_grid_samples_each_member_once_and_no_finished_row_again(trained, tmp_path, monkeypatch):
    calls = []
    whole = P.sample_member
    monkeypatch.setattr(P, "sample_member", lambda *a, **k: calls.append(a[2:4]) or whole(*a, **k))
    argv = use(
        trained, "grid", "--out", str(tmp_path), "--sampling-steps", "1,2", "--ensemble", "1,2,3"
    )
    assert P.main(argv) == 0
    assert len(calls) == 2 * 2 * 3  # steps x cases x members
    calls.clear()
    assert P.main(argv) == 0 and calls == []
    assert (
        P.main(
            use(
                trained,
                "grid",
                "--out",
                str(tmp_path),
                "--sampling-steps",
                "1,2,4",
                "--ensemble",
                "1,2,3",
            )
        )
        == 0
    )
    assert len(calls) == 2 * 3
    calls.clear()
    assert P.main([*argv, "--seed", "1"]) == 0 and len(calls) == 12  # another seed is another table


def test_grid_leaves_out_what_costs_too_much(trained, tmp_path, capsys):
    argv = ["--sampling-steps", "2,4", "--ensemble", "1,3", "--max-evaluations", "6"]
    assert P.main(use(trained, "grid", "--out", str(tmp_path), *argv)) == 0
    cells = runtime.read_csv(tmp_path / "grid.csv")
    assert [(c["sampling_steps"], c["ensemble"]) for c in cells] == [
        ("2", "1"),
        ("2", "3"),
        ("4", "1"),
    ]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("4 ")]
    assert all(row[-1] == "-" for row in rows) and rows


def test_grid_compares_samplers_at_equal_evaluations(trained, tmp_path, capsys):
    assert (
        P.main(
            use(trained, "grid", "--out", str(tmp_path), "--sampling-steps", "3", "--ensemble", "1")
        )
        == 0
    )
    assert "evaluations (steps x ensemble)" not in capsys.readouterr().out
    heun = ["--sampler", "heun", "--sampling-steps", "2", "--ensemble", "1"]
    assert P.main(use(trained, "grid", "--out", str(tmp_path), *heun)) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "evaluations (steps x ensemble)" in line)
    assert (
        line.startswith("Dice at 3 evaluations") and "heun 2 x 1" in line and "ddim 3 x 1" in line
    )


def test_grid_keeps_the_cells_of_other_settings(trained, tmp_path, capsys):
    argv = use(trained, "grid", "--out", str(tmp_path), "--sampling-steps", "1")
    assert P.main([*argv, "--ensemble", "1,2"]) == 0 and P.main([*argv, "--ensemble", "1,3"]) == 0
    assert P.main([*argv, "--ensemble", "1", "--split", "val"]) == 0
    assert P.main([*argv, "--ensemble", "1", "--timesteps", "code", "--sampling-steps", "3"]) == 0
    assert P.main([*argv, "--ensemble", "1", "--eta", "0.5", "--sampling-steps", "3"]) == 0
    cells = runtime.read_csv(tmp_path / "grid.csv")
    found = [(c["split"], c["timesteps"], c["sampling_steps"], c["ensemble"]) for c in cells]
    ones = [("test", "trailing", "1", n) for n in "213"]
    assert found == [
        *ones,
        ("val", "trailing", "1", "1"),
        ("test", "code", "3", "1"),
        ("test", "trailing", "3", "1"),
    ]
    line = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("Dice at 3 evaluations")
    ][-1]
    assert all(name in line for name in ("ddim 1 x 3", "ddim code 3 x 1", "ddim eta 0.5 3 x 1"))


def test_grid_tells_weights_of_the_same_step_apart(trained, tmp_path):
    state = torch.load(trained / "last.pt", weights_only=True)
    state["model"] = {k: v + 0.1 for k, v in state["model"].items()}
    state["ema"] = {k: v + 0.1 for k, v in state["ema"].items()}
    (tmp_path / "other").mkdir()
    torch.save(state, tmp_path / "other/last.pt")
    for run in (trained, tmp_path / "other"):
        assert (
            P.main(
                use(
                    run,
                    "grid",
                    "--out",
                    str(tmp_path / "g"),
                    "--sampling-steps",
                    "1",
                    "--ensemble",
                    "1",
                )
            )
            == 0
        )
    assert len({c["weights"] for c in runtime.read_csv(tmp_path / "g/grid.csv")}) == 2


@pytest.mark.parametrize("sampler, steps, kind", [
    ("ddim", 5, "trailing"), ("heun", 5, "trailing"), ("heun", 1, "trailing"), ("ddpm", 3, "trailing"),
    ("heun", 5, "code"), ("ddim", 5, "code")])  # fmt: skip
def test_evaluations_are_those_that_the_sampler_makes(sampler, steps, kind):
    count = []

    def f(xt, index):
        count.append(int(index))
        return torch.zeros_like(xt)

    config = P.Config(**SMALL, sampler=sampler, sampling_steps=steps, timesteps=kind)
    P.sample(f, torch.randn(1, 1, 2, 2, 2), config, lambda: torch.zeros(1, 1, 2, 2, 2))
    assert len(count) == P.evaluations(sampler, steps, kind)


def test_several_numbers_are_for_grid_only(trained):
    for flag in ("--sampling-steps", "--ensemble"):
        with pytest.raises(InputError, match=f"{flag} takes one number here"):
            P.main(use(trained, "evaluate", flag, "1,2"))
    with pytest.raises(InputError, match="--sampling-steps"):
        P.main(use(trained, "grid", "--sampling-steps", "5,1001"))


# --- sample ----------------------------------------------------------------------------------------------------------


def test_generation_moves_the_image_and_is_given_coordinates_only():
    config = P.Config(**SMALL, task="generate")
    data = tiny_data()
    cond, image, t, n = P.Patches(data, config)[5]
    as_segmentation = P.Patches(data, replace(config, task="segment"))[5]
    assert (
        cond.shape == (3, 8, 8, 8) and image.shape == (1, 8, 8, 8) and (t, n) == as_segmentation[2:]
    )
    np.testing.assert_array_equal(np.concatenate([image, cond]), as_segmentation[0])
    assert image.min() >= -1 and image.max() <= 1 and image.std() > 0.01
    net = P.network_for(config, loaders.data_record(data), CPU)
    assert net.in_channels == 4 and net.out[2].weight.shape[0] == 1
    bare = P.Patches(data, replace(config, method="full"))[5]
    assert bare[0].shape == (0, 16, 16, 12) and bare[1].shape == (1, 16, 16, 12)


def test_sample_writes_volumes_of_the_datas_size_and_spacing(generator, tmp_path):
    argv = ["sample", "--checkpoint", str(generator / "last.pt"), "--ensemble", "2", "--quiet"]
    for name in ("a", "b"):
        assert P.main([*argv, "--output", str(tmp_path / name)]) == 0
    volumes = [nib.load(tmp_path / f"a/sample_{n}_0000.nii.gz") for n in range(2)]
    for volume in volumes:
        assert volume.shape == (48, 48, 32) and np.allclose(volume.header.get_zooms(), (1, 1, 1.5))
        values = volume.get_fdata()
        assert (
            values.dtype.kind == "f"
            and values.min() >= 0
            and values.max() <= 1
            and values.std() > 0
        )
    assert not np.array_equal(volumes[0].get_fdata(), volumes[1].get_fdata())
    again = nib.load(tmp_path / "b/sample_1_0000.nii.gz").get_fdata()
    np.testing.assert_array_equal(volumes[1].get_fdata(), again)  # a function of seed and number
    assert (tmp_path / "a/samples.png").stat().st_size > 1000


def test_sample_and_evaluate_refuse_each_others_networks(trained, generator):
    with pytest.raises(InputError, match="sample cannot use a network trained with --task segment"):
        P.main(use(trained, "sample"))
    for verb in ("evaluate", "grid", "predict"):
        with pytest.raises(
            InputError, match=f"{verb} cannot use a network trained with --task generate"
        ):
            P.main(use(generator, verb))


def test_a_generator_that_knows_the_data_samples_them(monkeypatch):
    """With an oracle in the place of the network the sampler returns the volume itself, in [0, 1]."""
    config, data = P.Config(**SMALL, task="generate", target="x0", sampling_steps=3), tiny_data()
    volume = torch.from_numpy(2 * data.image("phantom_0000") - 1)
    monkeypatch.setattr(P, "lean_forward", lambda model, x, t, slab: volume[None])
    net = P.Network(config, torch.nn.Identity(), loaders.data_record(data), CPU, None, 0)
    cond = torch.zeros(3, *data.shape("phantom_0000"))
    assert torch.allclose(P.sample_member(net, cond, "generate", 0), (volume + 1) / 2, atol=1e-6)


# --- profile, memory, devices ----------------------------------------------------------------------------------------


def test_profile_has_a_row_for_each_form(tmp_path, capsys):
    argv = [
        *NET,
        "--preset",
        "laptop",
        "--amp",
        "off",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--slab",
        "5",
    ]
    assert P.main(["profile", *argv]) == 0
    rows = runtime.read_csv(tmp_path / "profile.csv")
    forms = ["plain", "plain --recompute", "plain", "lean", "lean --slab 5"]
    assert [(r["method"], r["form"]) for r in rows] == [
        (m, f) for m in ("patch", "full", "half") for f in forms
    ]
    assert [r["voxels"] for r in rows[:3]] == ["2x16x16x16", "2x16x16x16", "1x32x32x32"]
    assert [r["voxels"] for r in rows[-2:]] == ["1x16x16x16"] * 2
    assert all(float(r["seconds"]) > 0 for r in rows) and "lean --slab 5" in capsys.readouterr().out
    assert P.main(["profile", *argv, "--method", "half"]) == 0
    assert {r["method"] for r in runtime.read_csv(tmp_path / "profile.csv")} == {"half"}


def test_profile_says_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 0.004)
    argv = [*NET, "--preset", "laptop", "--amp", "off", "--device", "cpu", "--out", str(tmp_path)]
    assert P.main(["profile", *argv]) == 0
    rows = {
        (r["method"], r["form"], r["phase"]): r for r in runtime.read_csv(tmp_path / "profile.csv")
    }
    assert (
        rows["half", "lean", "sampling"]["seconds"]
        and not rows["full", "plain", "training"]["seconds"]
    )
    assert "GB free" in rows["full", "plain", "training"]["note"]


def test_kept_for_backward_is_counted_without_storage():
    """A convolution keeps its input, a SiLU its input: known sizes, the same on `meta` as on the CPU."""
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 1), torch.nn.SiLU(), torch.nn.SiLU())
            x = torch.zeros(1, 2, 4, 5, 6)
            kept = runtime.kept_for_backward_gb(lambda net=net, x=x: net(x).sum())
        assert kept == pytest.approx((2 + 3 + 3) * 120 * 4 / 1e9)


def test_the_papers_network_keeps_what_the_published_numbers_let_expect():
    """11.2 GB at 128^3 in fp32; a volume of 256^3 keeps eight times as much."""
    record = {"channels": ["t1", "t1ce", "t2", "flair"], "classes": {"tumour": 1}}
    with (
        pytest.MonkeyPatch.context() as m,
        pytest.raises(InputError, match=r"needs about 11\.[1-4] GB, cpu has 1\.0 GB"),
    ):
        m.setattr(runtime, "free_memory_gb", lambda device: 1.0)
        P.check_memory(P.Config(amp="off"), record, (128,) * 3, 1, True, CPU)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runtime, "free_memory_gb", lambda device: 3.0)
        P.check_memory(P.Config(amp="off", recompute=True), record, (128,) * 3, 1, True, CPU)
        with pytest.raises(InputError, match=r"try --slab 16"):
            P.check_memory(P.Config(amp="off"), record, (256,) * 3, 1, False, CPU)


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_too_large_for_the_device_is_one_line(trained, tmp_path, monkeypatch, verb):
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 1e-4)
    argv = (
        ["train", *FAST, "--out", str(tmp_path / "new")]
        if verb == "train"
        else use(trained, "evaluate")
    )
    with pytest.raises(InputError, match=r"needs about .* GB, cpu has 0\.0 GB free; try --"):
        P.main(argv)
    assert not (tmp_path / "new").exists()


def test_free_memory_is_within_the_container():
    assert 0.1 < runtime.free_memory_gb(CPU) < 1e5


def test_one_voxel_at_the_lowest_level_is_refused_for_whole_volumes():
    config = P.Config(
        **SMALL | {"channel_mult": (1, 1, 1), "num_groups": 4, "patch": (8,)}, method="full"
    )
    with pytest.raises(InputError, match="a volume of 3x4x2 leaves one voxel at the lowest level"):
        P.padded_shape((3, 4, 2), config)
    assert P.padded_shape((3, 4, 5), config) == (4, 4, 8)


def test_split_devices_put_the_fine_decoder_on_the_second():
    """Blocks 15 to 20 of the paper's 21, which are levels 1 and 0, as in the public code; the head stays."""
    config = P.Config(split_devices="cpu,cuda:0")
    record = {"channels": ["t1", "t1ce", "t2", "flair"], "classes": {"tumour": 1}}
    moved = []
    to = torch.nn.ModuleList.to
    with pytest.MonkeyPatch.context() as m, torch.device("meta"):
        m.setattr(
            torch.nn.ModuleList,
            "to",
            lambda self, d: moved.append((list(self), d)) or to(self, "meta"),
        )
        net = P.network_for(config, record, torch.device("meta"))
    ((blocks, device),) = moved
    assert (
        device == torch.device("cuda:0")
        and blocks == list(net.output_blocks)[15:21]
        and len(net.output_blocks) == 21
    )


def test_split_over_two_devices_trains_the_same_network(tmp_path):
    for name, split in (("one", []), ("two", ["--split-devices", "cpu,cpu"])):
        assert P.main(["train", *FAST, "--out", str(tmp_path / name), "--steps", "3", *split]) == 0
    one, two = (
        runtime.load_checkpoint(tmp_path / n / "last.pt", "patchddm")["model"]
        for n in ("one", "two")
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(InputError, match="--split-devices is cpu, expected A,B"):
        P.Config(split_devices="cpu")


def test_tables_are_written_whole(tmp_path):
    rows = [{"a": "1", "b": "x,y"}, {"a": "2", "b": ""}]
    runtime.write_csv(tmp_path / "deep/table.csv", rows)
    assert (
        runtime.read_csv(tmp_path / "deep/table.csv") == rows
        and runtime.read_csv(tmp_path / "none.csv") == []
    )
    with open(tmp_path / "deep/table.csv", newline="") as f:
        assert next(csv.reader(f)) == ["a", "b"]
    assert json.dumps(asdict(P.Config(**SMALL)))  # what config.json holds


@pytest.mark.parametrize("argv, message", [
    (["--split-devices", "cpu,cuda:7"], "--split-devices names cuda:7, but "),
    (["--split-devices", "cpu,cpu", "--device", "cuda"], "--split-devices begins with cpu, --device is cuda"),
])  # fmt: skip
def test_devices_that_are_not_there_are_refused(tmp_path, argv, message):
    flags = argv if "--device" in argv else [*argv, "--device", "cpu"]
    with pytest.raises(InputError, match=message):
        P.main(["train", *FAST[: FAST.index("--device")], *flags, "--out", str(tmp_path / "run")])


def test_memory_of_two_devices_counts_together(monkeypatch):
    asked, record = (
        ((32, 32, 32), 64, True, torch.device("cpu")),
        {"channels": ["a"], "classes": {"x": 1}},
    )
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 0.0)
    with pytest.raises(InputError) as error:
        P.check_memory(P.Config(**SMALL), record, *asked)
    needed = float(str(error.value).split("about ")[1].split()[0])
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 0.7 * needed)
    P.check_memory(P.Config(**SMALL, split_devices="cpu,cuda:0"), record, *asked)
    for split in ("", "cpu,cpu"):  # one memory
        with pytest.raises(InputError, match="GB free"):
            P.check_memory(P.Config(**SMALL, split_devices=split), record, *asked)


def test_profile_goes_on_after_a_row_without_memory(tmp_path, monkeypatch):
    def measure(call, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime, "measure", measure)
    assert (
        P.main(
            [
                "profile",
                *NET,
                "--device",
                "cpu",
                "--amp",
                "off",
                "--method",
                "patch",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    rows = list(csv.DictReader((tmp_path / "run/profile.csv").open()))
    assert len(rows) > 2 and {row["note"] for row in rows} == {"out of memory"}
