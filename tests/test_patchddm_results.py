"""results/patchddm_*.py: figure 5's grid, table 1's profile, and images out of nothing."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

import patchddm
from common import InputError, loaders, runtime, synthetic, tables, unet
from results import patchddm_generate, patchddm_grid, patchddm_profile

CPU = torch.device("cpu")
QUIET = "--quiet --amp off --device cpu"
NET = f"--num-channels 4 --channel-mult 1,2 --num-groups 2 --patch 16 --batch 2 {QUIET}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patchddm, "score_cases", lambda *a, **k: None)  # no validation
        assert patchddm.main(f"train {NET} --steps 3 --out {out}".split()) == 0
    return out


def run_grid(trained, out, flags):
    words = f"--checkpoint {trained} --out {out} --limit 1 {QUIET} --sampling-steps {flags}"
    assert patchddm_grid.main(words.split()) == 0
    return patchddm_grid.read_rows(out / "grid.csv")


def test_grid_cells_are_the_scores_of_evaluate(trained, tmp_path):
    rows = run_grid(trained, tmp_path, "3,1 --ensemble 3")
    cells = [(row["sampling_steps"], row["ensemble"], row["evaluations"]) for row in rows]
    assert cells == [("1", "1", "1"), ("1", "3", "3"), ("3", "1", "3"), ("3", "3", "9")]
    use = f"--out {tmp_path} --limit 1 --ensemble 3 --sampling-steps 3"
    assert patchddm.main(f"evaluate --checkpoint {trained} {QUIET} {use}".split()) == 0
    for row, name in zip(rows[2:], ("summary_ensemble1.json", "summary.json")):
        mean = tables.read_summary(tmp_path / "test-1" / name)["mean"]
        for score in ("dice", "hd95_mm"):
            expected = pytest.approx(mean[score]["mean"], rel=1e-5, nan_ok=True)
            assert float(row[f"{score}_mean"]) == expected
    assert len(list((tmp_path / "figures").glob("grid_ddim_*.png"))) == 2


def test_grid_nested_ensembles_equal_separately_sampled_ones(trained, tmp_path):
    nested = run_grid(trained, tmp_path / "nested", "2 --ensemble 4")
    assert len({row["dice_mean"] for row in nested}) == 3
    for row in nested:
        size = row["ensemble"]
        *_, alone = run_grid(trained, tmp_path / size, f"2 --ensemble {size}")
        assert {**alone, "seconds": ""} == {**row, "seconds": ""}


def test_grid_interrupted_continues_and_samples_nothing_twice(trained, tmp_path, monkeypatch):
    sampled = []
    sample_member = patchddm.Network.sample_member

    def counted(network, cond, case, number, watch=None):
        sampled.append((network.config.sampling_steps, number))
        if interrupt and network.config.sampling_steps == 2:
            raise KeyboardInterrupt
        return sample_member(network, cond, case, number, watch)

    monkeypatch.setattr(patchddm.Network, "sample_member", counted)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_grid(trained, tmp_path, "1,2 --ensemble 3")
    interrupt = False
    sampled.clear()
    assert len(run_grid(trained, tmp_path, "1,2 --ensemble 3")) == 4
    assert sampled == [(2, 0), (2, 1), (2, 2)]  # the row of one step was kept
    run_grid(trained, tmp_path, "1,2 --ensemble 3")
    assert len(sampled) == 3


@pytest.fixture
def parts():
    data = loaders.Prepared(*synthetic.volumes())
    record = {**loaders.data_record(data), "least": [48, 48, 32]}
    config = patchddm.Config(num_channels=4, channel_mult=(1, 2), num_groups=2, patch=(16,))
    network = patchddm.network_for(config, record)
    return patchddm.Network(config, network, record, CPU, None, 7), data, data.cases("test", 2)


def with_config(network, **changes):
    return replace(network, config=replace(network.config, **changes))


def with_flipped(data, name):

    def changed(case, kind):
        return data.read(case, kind)[..., :: -1 if kind == name else 1]

    return loaders.Prepared(data.meta, changed)


CHANGES = {
    "padding": lambda n, d, c: (replace(n, record={**n.record, "least": [64, 48, 32]}), d, c),
    "target": lambda n, d, c: (with_config(n, target="x0"), d, c),
    "dtype": lambda n, d, c: (replace(n, dtype=torch.bfloat16), d, c),
    "eta": lambda n, d, c: (with_config(n, eta=0.5), d, c),
    "heun": lambda n, d, c: (with_config(n, heun=True), d, c),
    "seed": lambda n, d, c: (with_config(n, seed=1), d, c),
    "name": lambda n, d, c: (n, loaders.Prepared({**d.meta, "name": "other"}, d.read), c),
    "cases": lambda n, d, c: (n, d, [c[0], "phantom_0002"]),
    "image": lambda n, d, c: (n, with_flipped(d, "image"), c),
    "label": lambda n, d, c: (n, with_flipped(d, "label"), c),
}


def test_grid_key_changes_with_what_a_score_depends_on_and_nothing_else(parts):
    network, data, cases = parts
    before = patchddm_grid.key_of(*parts)
    changed = [name for name, f in CHANGES.items() if patchddm_grid.key_of(*f(*parts)) != before]
    assert changed == [*CHANGES]
    other = with_config(network, device="cuda", ensemble=9, quiet=True, out="other", workers=0)
    other = replace(other, model=unet.fast_layout(other.model))
    assert patchddm_grid.key_of(other, data, cases) == before
    unet.redraw_zeros(network.model)  # and so with the weights
    assert patchddm_grid.key_of(*parts) != before


def test_grid_leaves_out_what_costs_too_much_and_compares_equal_costs(trained, tmp_path, capsys):
    rows = run_grid(trained, tmp_path, "2,3 --ensemble 3 --max-evaluations 6")
    cells = [(row["sampling_steps"], row["ensemble"]) for row in rows]
    assert cells == [("2", "1"), ("2", "3"), ("3", "1")]
    assert len(run_grid(trained, tmp_path, "2 --heun --ensemble 3 --max-evaluations 6")) == 4
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("3 ") and line.endswith(" -") for line in said) == 2
    equal = [line for line in said if line.startswith("Dice at 3 evaluations")][-1]
    assert "ddim 3 x 1" in equal and "heun 2 x 1" in equal


def test_profile_has_a_row_for_each_form_and_names_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 0.004)
    assert patchddm_profile.main(f"{NET} --preset laptop --out {tmp_path}".split()) == 0
    rows = [*csv.DictReader((tmp_path / "profile.csv").read_text().splitlines())]
    forms = ["training plain", "training --recompute", "sampling plain", "sampling lean"]
    expected = [(method, form) for method in ("patch", "full", "half") for form in forms]
    assert [(r["method"], f"{r['phase']} {r['form']}") for r in rows] == expected
    assert [row["input"] for row in rows[1:4]] == ["2x16x16x16", *2 * ["1x32x32x32"]]
    assert float(rows[-1]["seconds"]) > 0 and not rows[-1]["note"]  # half the size, lean
    assert "GB free" in rows[4]["note"] and not rows[4]["seconds"]  # whole volumes in training


def test_measure_sees_the_memory_of_a_tensor():
    _, gb = patchddm_profile.measure(lambda: torch.ones(50_000_000).add_(1), CPU)
    assert np.isnan(gb) or 0.19 < gb < 0.3  # 0.2 GB; NaN where the system does not tell


def test_generate_learns_the_image_from_coordinates_alone(monkeypatch, tmp_path):
    seen = []

    def loss(model, target, cond, x0, t, eps, loss=patchddm.diffusion_loss):
        seen.append(np.concatenate([x0, cond], axis=1))
        assert x0.shape[1] == 1 and cond.shape[1] == 3
        return loss(model, target, cond, x0, t, eps)

    monkeypatch.setattr(patchddm, "diffusion_loss", loss)
    assert patchddm_generate.main(f"train {NET} --steps 1 --out {tmp_path}".split()) == 0
    data = loaders.open_data("synthetic")
    patches = patchddm.Patches(data, data.cases("train"), (16, 16, 16), (16, 16, 16), 2)
    assert np.array_equal(seen[0], [patches[0][0], patches[1][0]])  # image, then coordinates


def test_generate_trains_and_samples_volumes_of_the_datas_size(tmp_path):
    use = f"--ensemble 2 --sampling-steps 2 --out {tmp_path}"
    assert patchddm_generate.main(f"{NET} {use} --steps 3".split()) == 0
    files = [tmp_path / f"samples/sample_{n}_0000.nii.gz" for n in range(2)]
    first, second = (loaders.read_nifti(file) for file in files)
    assert first.data.shape == (48, 48, 32) and first.spacing == (1, 1, 1.5)
    assert 0 <= first.data.min() < first.data.max() <= 1
    assert not np.array_equal(first.data, second.data)
    assert patchddm_generate.main(f"sample {use} {QUIET}".split()) == 0
    again = loaders.read_nifti(files[1]).data
    assert np.array_equal(again, second.data)  # a function of seed and number
    with pytest.raises(InputError, match=r"belongs to patchddm_generate\.py"):
        patchddm.main(f"evaluate --checkpoint {tmp_path} --device cpu".split())
