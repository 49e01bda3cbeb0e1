"""masked_diffusion.py: masks, losses, network, features, classifier, windows and scores."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import masked_diffusion as M
from common import InputError, loaders, metrics, runtime, synthetic, unet

CPU = torch.device("cpu")
RANKS = runtime.Ranks(0, 1, CPU)
FIXTURES = (
    Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / "shared")) / "data/fixtures"
)
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="public weights and outputs are not beside this checkout"
)
TINY = M.Config(**M.PRESETS["tiny"])
PAPER = M.Config()
BLOCKS = (0, 1, 2)  # of the network below


def tissue():
    return loaders.Prepared(*synthetic.images())


def awake(seed=0, out=3):
    """Return a small network whose zero-initialised layers are random, so that all have an effect."""
    torch.manual_seed(seed)
    model = unet.UNet(3, out, 32, (1, 2), 1, [1])
    for p in model.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def features(**changes):
    return M.Features(awake(), **{"blocks": BLOCKS, "tile": 4, **changes})


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


# --- masks ----------------------------------------------------------------------------------------

TIMES = (0, 1, 50, 150, 250, 500, 650, 750, 900, 999)
COUNTS = {
    4096: (0, 5, 205, 615, 1024, 2048, 2663, 3072, 3687, 4092),
    1024: (0, 2, 52, 154, 256, 512, 666, 768, 922, 1023),
    256: (0, 1, 13, 39, 64, 128, 167, 192, 231, 256),
    64: (0, 1, 4, 10, 16, 32, 42, 48, 58, 64),
    16: (0, 1, 1, 3, 4, 8, 11, 12, 15, 16),
}


@pytest.mark.parametrize("tiles", COUNTS)
def test_masked_counts_equal_the_table(tiles):
    assert tuple(tiles - M.kept(t, tiles) for t in TIMES) == COUNTS[tiles]


def test_kept_equals_the_float_expression_for_powers_of_two_and_is_exact_elsewhere():
    for tiles in (16, 64, 256, 1024, 4096):
        assert all(M.kept(t, tiles) == int(tiles * (1 - t / M.T)) for t in range(M.T))
    wrong = [t for t in range(M.T) if M.kept(t, 100) != int(100 * (1 - t / M.T))]
    assert len(wrong) == 14 and wrong[:3] == [340, 550, 560]
    assert [t for t in range(M.T) if M.kept(t, 256) == 0] == [997, 998, 999]


def test_hidden_tiles_are_grey_in_all_channels_and_the_others_untouched():
    x = torch.rand(2, 3, 8, 12) + 0.5
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 0] = True
    expected = x.clone()
    expected[0, :, 4:8, 8:12] = 0
    expected[1, :, 0:4, 0:4] = 0
    assert torch.equal(M.hide(x, mask), expected)


def test_mask_is_a_uniform_choice_of_tiles():
    rng = np.random.default_rng(0)
    total = sum(M.draw_mask(rng, 3, (2, 4)).astype(int) for _ in range(4000))
    assert M.draw_mask(rng, 3, (2, 4)).sum() == 5 and np.abs(total / 4000 - 5 / 8).max() < 0.03


# --- crops ----------------------------------------------------------------------------------------


def crops(data=None, cases=("tissue_000",), side=64, tile=4, **changes):
    return M.Crops(data or tissue(), list(cases), side, tile, **changes)


def test_each_sample_has_its_own_mask_time_and_crop():
    samples = crops()
    a, b, again = samples[0], samples[1], samples[0]
    assert all(np.array_equal(u, v) for u, v in zip(a, again))
    assert a[2] != b[2] and not np.array_equal(a[3], b[3]) and not np.array_equal(a[0], b[0])
    for x0, _, t, mask, _ in (samples[n] for n in range(20)):
        assert x0.shape == (3, 64, 64) and mask.sum() == 256 - M.kept(t, 256)
    fixed = crops(fixed_t=50)
    drawn = [fixed[n] for n in range(8)]
    assert {s[2] for s in drawn} == {50} and {int(s[3].sum()) for s in drawn} == {13}
    assert len({s[3].tobytes() for s in drawn}) == 8  # the same number, other tiles


def test_times_are_uniform_over_all_levels():
    samples = crops(side=32, tile=32)
    t = np.array([samples[n][2] for n in range(1500)])
    assert t.min() < 10 and t.max() >= 990
    assert np.abs(np.histogram(t, 4, (0, 1000))[0] / 1500 - 0.25).max() < 0.04


def test_images_pass_as_a_stream_of_permutations():
    data = SimpleNamespace(image=lambda case: np.full((3, 64, 64), int(case), np.uint8))
    samples = crops(data, "01234")
    order = [round((float(samples[n][0][0, 0, 0]) + 1) * 127.5) for n in range(20)]
    epochs = [order[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_half_of_the_crops_are_flipped_left_to_right_and_none_upside_down():
    line = np.arange(64, dtype=np.uint8)
    ramp = np.broadcast_to(line + 2 * line[:, None], (3, 64, 64))
    samples = crops(SimpleNamespace(image=lambda case: ramp))
    drawn = [samples[n][0][0] for n in range(200)]
    assert all(d[-1, 0] > d[0, 0] for d in drawn)
    assert 0.4 < np.mean([d[0, -1] < d[0, 0] for d in drawn]) < 0.6


@pytest.mark.parametrize("augmented", [False, True])
def test_labels_move_with_their_image(augmented):
    label = np.kron(np.arange(16).reshape(4, 4) % 5, np.ones((24, 24))).astype(np.uint8)
    data = SimpleNamespace(image=lambda c: np.stack([label * 50] * 3), label=lambda c: label)
    samples = crops(data, labelled=True, augmented=augmented)
    for n in range(6):
        x0, y, *_ = samples[n]
        if not augmented:
            np.testing.assert_allclose((x0[0] + 1) * 127.5, y * 50, atol=1e-4)
        else:  # colours change, but equal labels still look alike
            inside = [x0[0][y == v].std() for v in np.unique(y)]
            assert np.max(inside) < 0.25 * x0[0].std()


def test_augmentation_moves_and_recolours_and_is_a_function_of_n():
    plain, augmented = crops(), crops(augmented=True)
    assert np.abs(plain[3][0] - augmented[3][0]).mean() > 0.02
    assert np.array_equal(augmented[3][0], augmented[3][0])
    assert np.array_equal(plain[3][3], augmented[3][3]) and np.abs(augmented[3][0]).max() <= 1


def test_smaller_images_are_reflected():
    a = np.arange(12).reshape(1, 3, 4)
    assert np.array_equal(M.cut(a, (0, 0), 5)[0, :, 0], [0, 4, 8, 4, 0])
    assert np.array_equal(M.cut(a, (0, 0), 5)[0, 0], [0, 1, 2, 3, 2])
    assert np.array_equal(M.cut(a, (1, 2), 2), a[:, 1:3, 2:4])
    assert M.as_input(np.array([0, 255], np.uint8)).tolist() == [-1, 1]


# --- which images ---------------------------------------------------------------------------------


def test_held_out_images_are_in_no_test_set_and_not_trained_on():
    data = tissue()
    images = M.pretraining_cases(data, "all")
    cases, held = loaders.hold_out(data, images, 0.1, 0)
    assert images == data.cases("pretrain")
    assert len(held) == 4 and not set(held) & set(data.cases("test")) and not set(held) & set(cases)
    assert len(cases) + len(held) == 42 and set(data.cases("test")) <= set(cases)
    assert held != loaders.hold_out(data, images, 0.1, 1)[1]
    assert loaders.hold_out(data, images, 0, 0) == (images, [])
    assert M.pretraining_cases(data, "train") == data.cases("train")
    data.meta["splits"]["val"] = ["tissue_003"]
    assert loaders.hold_out(data, images, 0.1, 0)[1] == ["tissue_003"]


def labelled_set():
    names = [f"train_{i}" for i in range(1, 21)]
    masks = {n: np.full((4, 4), n not in ("train_10", "train_3"), np.uint8) for n in names}
    return SimpleNamespace(
        cases=lambda split: names, has_label=lambda case: case != "train_3", label=masks.get,
        classes={"gland": 1}, place="glas",
    )  # fmt: skip


def test_labelled_images_are_the_first_by_name_on_which_something_is_drawn(tmp_path):
    cases, undrawn = M.labelled_cases(labelled_set(), 8)
    assert cases == ["train_1", *(f"train_{i}" for i in range(11, 18))] and undrawn == 1
    assert len(M.labelled_cases(labelled_set(), 0)[0]) == 18
    with pytest.raises(InputError, match=r"19 labelled images are asked for.* 18 of 19"):
        M.labelled_cases(labelled_set(), 19)
    (tmp_path / "mine.json").write_text('["train_9", "train_2"]')
    assert M.labelled_cases(labelled_set(), 8, str(tmp_path / "mine.json"))[0] == [
        "train_9",
        "train_2",
    ]
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(InputError, match=r"bad\.json"):
        M.labelled_cases(labelled_set(), 8, str(tmp_path / "bad.json"))


# --- SSIM -----------------------------------------------------------------------------------------


def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    r = np.random.RandomState(0)  # the specification's draws
    a, b = (torch.from_numpy(r.uniform(-1, 1, (1, 3, 16, 16))) for _ in range(2))
    i = torch.arange(16, dtype=torch.float64).reshape(16, 1)
    j = torch.arange(16, dtype=torch.float64).reshape(1, 16)
    c = torch.arange(3, dtype=torch.float64).reshape(3, 1, 1)
    s = torch.sin(0.7 * i + 0.3 * j + c)[None]
    t = 0.8 * s + 0.2 * torch.cos(0.5 * i - 0.9 * j + c)[None]
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    values = {"A": a, "-A": -a, "B": b, "S": s, "-S": -s, "T": t, "A/2": a / 2}
    values |= {"0": zero, "1": one, "-1": -one}
    left, right = name.split()
    return values[left], values[right]


@pytest.mark.parametrize(
    "name, public, same, wide",
    [
        ("A A", 0, 0, 0),
        ("0 0", 0, 0, 0),
        ("A -A", 0.0464657241, 0.1105797808, 0.2593190164),
        ("A 0", 0.4998737100, 0.9997474201, 0.9976323446),
        ("A B", 0.4705007567, 0.9926127871, 0.9934337102),
        ("S T", 0.0817966661, 0.1811244717, 0.1583929321),
        ("S -S", 0.0088428747, 0.0190363387, 0.0691515461),
        ("A A/2", 0.1743034743, 0.3486069485, 0.3332141365),
        ("1 0", 0.4999716466, 0.9999432933, 0.9998820605),
        ("1 -1", 0.2825845853, 1.1276129234, 0.4828732190),
    ],
)
def test_ssim_equals_the_table(name, public, same, wide):
    x, y = pair(name)
    assert float(M.ssim_loss(x, y)) == pytest.approx(public, abs=1e-10)
    assert float(1 - M.ssim_map(x, y).mean()) == pytest.approx(same, abs=1e-10)
    assert float(1 - M.ssim_map(x, y, 11, 2.0).mean()) == pytest.approx(wide, abs=1e-10)


def test_gaussian_window_has_the_public_weights():
    g = M.gaussian_window(5).sum(0)
    expected = [0.12007838, 0.23388076, 0.29208172]
    assert [round(float(v), 8) for v in g[:3]] == expected and float(g.sum()) == pytest.approx(1)


def test_signed_ssim_does_not_see_the_sign_and_unit_does():
    s, minus = pair("S -S")
    assert float(M.ssim_loss(s, minus)) < 0.01 and float(M.ssim_loss(s, minus, "unit")) > 0.5
    expected = (1 - M.ssim_map((s + 1) / 2, (minus + 1) / 2)).mean() / 2
    assert float(M.ssim_loss(s, minus, "unit")) == pytest.approx(float(expected))


def test_signed_ssim_below_zero_has_no_gradient():
    y = torch.full((1, 1, 16, 16), -1.0, requires_grad=True)
    M.ssim_loss(torch.ones(1, 1, 16, 16), y).sum().backward()
    assert not y.grad[:, :, 5:11, 5:11].any() and y.grad.any()


# --- losses ---------------------------------------------------------------------------------------


def test_mdm_is_shown_the_masked_image_and_its_time_and_restores_all_of_it():
    x0, y = image(2, 3, 16, 16), image(2, 3, 16, 16, seed=1)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    t = torch.tensor([3, 900])
    shown = []

    def net(*arguments):
        shown.append(arguments)
        return y

    loss = M.masking_loss(net, x0, t, mask, "ssim", "unit")
    assert torch.equal(shown[0][0], M.hide(x0, mask)) and shown[0][1] is t
    torch.testing.assert_close(loss, M.ssim_loss(x0, y, "unit"))  # visible pixels count, too
    alone = [M.ssim_loss(x0[i : i + 1], y[i : i + 1], "unit") for i in range(2)]
    torch.testing.assert_close(loss, torch.cat(alone))
    expected = (x0 - y).square().mean((1, 2, 3))
    torch.testing.assert_close(M.masking_loss(net, x0, t, mask, "mse"), expected)


def test_abar_equals_the_specifications_values():
    t = [50, 150, 250, 650]
    cosine, linear = (
        M.abar_table(name)[t].numpy().round(6).tolist() for name in ("cosine", "linear")
    )
    assert cosine == [0.991725, 0.940000, 0.845888, 0.267786]
    assert linear == [0.969951, 0.785887, 0.521423, 0.013590]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_q_sample_mixes_image_and_noise(schedule):
    x, eps, t = image(2, 3, 4, 4), image(2, 3, 4, 4, seed=1), torch.tensor([0, 650])
    xt = M.q_sample(x, eps, t, schedule)
    for i in range(2):
        a = M.abar_table(schedule)[int(t[i])]
        torch.testing.assert_close(xt[i], math.sqrt(a) * x[i] + math.sqrt(1 - a) * eps[i])


def test_ddpm_predicts_its_noise_or_the_image():
    x0, eps, t = image(3, 3, 16, 16), image(3, 3, 16, 16, seed=1), torch.tensor([0, 300, 999])
    shown = []

    def net(xt, time):
        shown.append(xt)
        return eps + 0.5

    torch.testing.assert_close(M.noise_loss(net, x0, t, eps), torch.full((3,), 0.25))
    torch.testing.assert_close(shown[0], M.q_sample(x0, eps, t, "cosine"))
    loss = M.noise_loss(lambda xt, t: x0 - 2, x0, t, eps, "x0")
    torch.testing.assert_close(loss, torch.full((3,), 4.0))
    assert M.noise_loss(lambda xt, t: x0, x0, t, eps, "x0", kind="ssim").max() < 1e-6


def test_supervised_loss_is_cross_entropy_without_ignored_pixels():
    logits = image(3, 2, 16, 16)
    label = (image(3, 16, 16, seed=2) > 0).long()
    label[:, :8] = 255
    rest = F.cross_entropy(logits[:, :, 8:], label[:, 8:], reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(M.class_loss(lambda x, t: logits, logits, label), rest)


def test_one_batch_is_overfitted():
    model = awake().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    samples = [crops(side=16)[n] for n in range(4)]
    x0, _, t, mask, _ = torch.utils.data.default_collate(samples)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = M.masking_loss(model, x0, t, mask).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.4 and losses[-1] < 0.2, losses[-1]


def test_average_warms_up():
    for steps, share in ((1000, 0.904833), (10_000, 0.367861)):
        assert 0.9999**steps == pytest.approx(share, abs=1e-6)  # what would be left of the start
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    a.weight.data[:], b.weight.data[:] = 0.0, 1.0
    kept = 1.0
    for n in range(3):
        M.update_ema(a, b, 0.9999, n)
        kept *= (1 + n) / (10 + n)
    assert float(1 - a.weight.detach()) == pytest.approx(kept, rel=1e-3) and kept < 0.005


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, out, parameters",
    [
        (192, 3, 311_017_539),
        (192, 6, 311_022_726),
        (256, 6, 552_814_086),
        (64, 3, 34_613_955),
        (32, 3, 8_674_659),
    ],
)
def test_network_has_the_public_number_of_parameters(width, out, parameters):
    with torch.device("meta"):
        model = M.build_model(replace(PAPER, num_channels=width), 3, out)
    assert count(model) == parameters and len(model.state_dict()) == 566


@needs_fixtures
def test_public_network_agrees_at_every_decoder_block():
    z = np.load(FIXTURES / "guided_diffusion_2d_tiny.npz")
    info = json.loads((FIXTURES / "guided_diffusion_2d_tiny.json").read_text())
    model = unet.UNet(3, 6, 32, (1, 2), 2, [1], head_channels=16).eval()
    names = [k for k in z.files if "." in k and not k.startswith("act/")]
    unet.load_public(model, {k: torch.from_numpy(z[k]) for k in names})
    assert count(model) == info["parameters"]
    x, t = torch.from_numpy(z["x"]), torch.from_numpy(z["t"])
    with torch.no_grad():
        maps = model.decode(*model.encode(x, t), range(6))
        out = model(x, t)
    for k in range(6):
        expected = torch.from_numpy(z[f"act/output_blocks.{k}"])
        torch.testing.assert_close(maps[k], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(out, torch.from_numpy(z["out"]), atol=1e-5, rtol=0)
    assert float(out.std()) == pytest.approx(0.5539033, abs=1e-5)


def test_decoder_blocks_have_the_tables_channels_and_sides():
    maps = M.Features(M.build_model(TINY, 3, 3).eval(), range(18), norm="none")(
        torch.zeros(1, 3, 64, 64), [("x",)]
    )
    mult = [4] * 6 + [2] * 6 + [1] * 6
    sides = [2, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64]
    assert [tuple(m.shape[1:]) for m in maps] == [(32 * m, s, s) for m, s in zip(mult, sides)]


@pytest.mark.parametrize(
    "width, blocks, dimension",
    [(192, range(8, 13), 1728), (32, range(8, 13), 288), (192, range(5, 13), 3264)],
)
def test_feature_dimension_equals_the_table(width, blocks, dimension):
    with torch.device("meta"):
        model = M.build_model(replace(PAPER, num_channels=width), 3, 3)
        maps = model.decode(*model.encode(torch.empty(1, 3, 32, 32), torch.zeros(1)), blocks)
    assert sum(m.shape[1] for m in maps) == dimension


def test_times_of_features_are_the_papers():
    assert PAPER.times == (50,) and PAPER.blocks == (8, 9, 10, 11, 12)
    assert replace(PAPER, method="ddpm").times == (250,)
    assert replace(PAPER, fixed_t=250, method="ddpm").times == (250,)
    assert replace(PAPER, fixed_t=50, feature_t=(0, 650)).times == (0, 650)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_head_of_six_channels_gives_its_mean(capsys, prefix):
    public, model = awake(1, out=6), awake(2)
    state = {prefix + k: v.half() for k, v in public.state_dict().items()}
    runtime.load_start_weights(model, {"ema": state}, RANKS)
    assert "its first half, the mean, is taken" in capsys.readouterr().out
    torch.testing.assert_close(model.out[2].weight, public.out[2].weight[:3].half().float())
    before = awake(3, out=2)
    kept = before.out[2].weight.clone()
    runtime.load_start_weights(before, {"ema": {}, "model": awake(1).state_dict()}, RANKS)
    assert "a new one is trained" in capsys.readouterr().out
    assert torch.equal(before.out[2].weight, kept)


def test_weights_are_loaded_strictly():
    state = awake(1).state_dict()
    state.pop("middle_block.1.qkv.weight")
    model = awake(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"middle_block\.1\.qkv\.weight is"):
        runtime.load_start_weights(model, {"ema": state}, RANKS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_random_features_are_no_linear_map_and_see_the_time():
    """As a new network starts they would be: all branches end in a layer of zeros."""
    x, y = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = unet.UNet(3, 3, 32, (1, 2), 1, [1]).eval()

    def maps(x, t):
        with torch.no_grad():
            outputs = model.decode(*model.encode(x, torch.tensor([t])), (0, 1))
        return torch.cat([m.flatten() for m in outputs])

    for linear in (True, False):
        gap = maps(x, 0) + maps(y, 0) - maps(x + y, 0) - maps(0 * x, 0)
        assert (gap.abs().max() < 1e-4) == linear
        assert ((maps(x, 50) - maps(x, 900)).abs().max() < 1e-6) == linear
        unet.redraw_zeros(model)


# --- features -------------------------------------------------------------------------------------


def test_enlarging_a_ramp_gives_the_specifications_values():
    ramp = torch.arange(4.0).reshape(1, 1, 1, 4)
    expected = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert M.enlarge(ramp, (1, 8)).flatten().tolist() == expected
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert float(M.enlarge(x, (8, 8)).square().sum()) == pytest.approx(4807)


def test_times_are_outer_and_blocks_inner_and_no_block_after_the_last_runs():
    extract = features(blocks=(2, 0), times=(0, 250), norm="none")
    calls = []
    for k, block in enumerate(extract.model.output_blocks):
        block.register_forward_hook(lambda *_, k=k: calls.append(k))
    x, key = image(1, 3, 16, 16), ("k",)
    maps = extract(x, [key])
    assert calls == [0, 1, 2, 0, 1, 2] and len(maps) == 4
    late = features(blocks=(0,), times=(250,), norm="none")(x, [key])
    torch.testing.assert_close(maps[3], late[0])
    assert extract.widths(16) == [m.shape[1] for m in maps]


def test_l2_features_of_a_window_have_the_norm_1():
    x = image(2, 3, 16, 16)
    keys = [("a",), ("b",)]
    vectors = M.pixel_vectors(features()(x, keys), (16, 16))  # [2, 16, 16, D]
    torch.testing.assert_close(vectors.square().sum((1, 2, 3)), torch.ones(2))
    plain = M.pixel_vectors(features(norm="none")(x, keys), (16, 16))
    torch.testing.assert_close(vectors, plain / plain.flatten(1).norm(dim=1)[:, None, None, None])


def test_feature_mask_is_a_function_of_its_key_and_hides_what_t_says():
    extract, x = features(), torch.ones(3, 3, 32, 32)
    keys = [(0, "a", 3), (0, "b", 3), (1, "a", 3)]
    together = extract.shown(x, 500, keys)
    assert (together[:, 0, ::4, ::4] == 0).sum((1, 2)).tolist() == [32] * 3  # of 64 tiles
    for window, key, one in zip(x, keys, together):
        assert torch.equal(extract.shown(window[None], 500, [key])[0], one)
    assert len({one.numpy().tobytes() for one in together}) == 3
    assert torch.equal(features(masked=False).shown(x, 500, keys), x)


def test_ddpm_features_share_one_noise_image():
    extract, x, eps = features(method="ddpm"), torch.zeros(1, 3, 16, 16), {}
    for t in (50, 250):
        scale = math.sqrt(1 - M.abar_table("cosine")[t])
        eps[t] = extract.shown(x, t, [(0, "a")]) / scale
        torch.testing.assert_close(eps[t], extract.shown(x, t, [(7, "b")]) / scale)
    torch.testing.assert_close(eps[50], eps[250])


@pytest.mark.parametrize("together", [1, 2])
def test_one_crop_is_one_step_with_the_maps_of_its_own_label(together):
    rng = np.random.default_rng(0)
    labels = {c: rng.integers(0, 2, (20, 30)).astype(np.uint8) for c in "abcde"}
    data = SimpleNamespace(label=labels.get, image=lambda case: np.stack([255 * labels[case]] * 3))
    epochs = []
    steps = M.crop_steps(lambda x0, keys: [x0[:, :1]], data, "abcde", 16, together)
    for epoch, last, maps, label in steps:
        assert torch.equal((maps[0] > 0).long()[:, 0], label) and label.shape[1:] == (16, 16)
        epochs.append((epoch, last, len(label)))
        if epoch == 1 and last:
            break
    sizes = [1] * 5 if together == 1 else [2, 2, 1]
    assert epochs == [(e, i == len(sizes) - 1, n) for e in (0, 1) for i, n in enumerate(sizes)]


# --- classifier -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dimension, classes, parameters",
    [(1728, 2, 225_826), (288, 2, 41_506), (3264, 34, 873_890), (8448, 34, 2_200_994)],
)
def test_classifier_has_the_public_number_of_parameters(dimension, classes, parameters):
    assert count(M.PixelClassifier([dimension], classes)) == parameters


def test_classifier_has_batch_norm_after_relu_and_small_normal_weights():
    torch.manual_seed(0)
    c = M.PixelClassifier([1000], 2)
    names = ["ReLU", "BatchNorm1d", "Linear", "ReLU", "BatchNorm1d", "Linear"]
    assert [type(m).__name__ for m in c.rest] == names and not c.first.bias.any()
    assert float(c.first.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    he = M.PixelClassifier([1000], 2, batch_norm=False)
    assert float(he.first.weight.detach().std()) == pytest.approx(math.sqrt(2 / 1000), rel=0.02)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_classifier_on_maps_equals_that_on_enlarged_vectors(batch_norm):
    torch.manual_seed(0)
    maps = [image(2, 3, 4, 4), image(2, 5, 8, 8, seed=1), image(2, 2, 8, 8, seed=2)]
    classifier = M.PixelClassifier([3, 5, 2], 2, batch_norm)
    for v in (classifier.first.bias, classifier.mean):
        torch.nn.init.normal_(v)
    classifier.sd += torch.rand(10)
    vectors = M.pixel_vectors(maps, (16, 16))  # [2, 16, 16, 10]
    expected = classifier(vectors.flatten(0, 2)).unflatten(0, (2, 16, 16)).movedim(-1, 1)
    torch.testing.assert_close(classifier.on_maps(maps, (16, 16)), expected, atol=1e-4, rtol=1e-4)


def test_standardised_features_have_mean_0_and_sd_1_in_each_channel():
    extract = features(norm="none", masked=False)
    windows = [(image(3, 16, 16, seed=n).numpy(), (n,)) for n in range(5)]
    classifier = M.PixelClassifier(extract.widths(16), 2)
    classifier.standardise(extract, windows)
    x = torch.from_numpy(np.stack([window for window, _ in windows]))
    maps = extract(x, [key for _, key in windows])
    means = classifier.mean.split(classifier.widths)
    for m, mean, sd in zip(maps, means, classifier.sd.split(classifier.widths)):
        scaled = (m - mean[:, None, None]) / sd[:, None, None]
        assert float(scaled.mean((0, 2, 3)).abs().max()) < 1e-3
        assert float((scaled.std((0, 2, 3), correction=0) - 1).abs().max()) < 1e-3


def end_of(losses, stop_epoch=40) -> int:
    """Return the index of the epoch in which the rule ends."""
    return next(e for e in range(10**4) if M.is_done([losses(i) for i in range(e + 1)], stop_epoch))


def test_rule_ends_after_twenty_one_epochs_without_a_lower_loss():
    assert end_of(lambda epoch: 1.0) == 62  # epoch 41 is the first that counts
    assert end_of(lambda epoch: 1.0, 30) == 52
    assert end_of(lambda epoch: 0.5 if epoch == 62 else 1.0) == 62 + 21  # the 21st begins anew
    assert end_of(lambda epoch: 0.5 if epoch == 10 else 1.0) == 62  # too early to count


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, r, expected",
    [
        (522, 256, [0, 204, 266]),
        (775, 256, [0, 204, 408, 519]),
        (1000, 256, [0, 204, 408, 612, 744]),
        (257, 256, [0, 1]),
        (256, 256, [0]),
        (200, 256, [0]),
        (387, 128, [0, 102, 204, 259]),
        (115, 64, [0, 51]),
    ],
)
def test_window_starts_equal_the_specifications(n, r, expected):
    assert M.window_starts(n, r) == expected


def test_window_weights_equal_the_specifications():
    w = M.window_weights(256)
    assert w[127, 127] == w[128, 128] == pytest.approx(0.99975589, abs=1e-8)
    assert w[64, 64] == pytest.approx(0.01949214, abs=1e-8) and w[0, 128] == w[0, 0] == 0.001
    assert (w == 1e-3).sum() == 21_072 and w.sum() == pytest.approx(6448.6394, abs=1e-4)


class Windows(M.Network):
    """A network that gives each window's own first channel, or its number."""

    def logits(self, x0, keys):
        if self.step:
            return torch.arange(len(keys)).float().reshape(-1, 1, 1, 1).expand(-1, 2, 16, 16) * (
                torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
            )
        return torch.stack([x0[:, 0], -x0[:, 0]], dim=1)


def windows(step=0):
    config = replace(TINY, crop=16, channel_mult=(1, 2), blocks=BLOCKS)
    return Windows(config, None, None, {"classes": {"gland": 1}}, CPU, step)


@pytest.mark.parametrize("shape", [(16, 16), (40, 21), (9, 30), (5, 5)])
def test_logits_of_windows_are_averaged_and_cut_to_the_image(shape):
    values = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    prob = windows().segment_image(values, "case")
    x = M.as_input(values)[0]
    np.testing.assert_allclose(prob[0], 1 / (1 + np.exp(-2 * x)), atol=1e-5)


def test_windows_are_weighted_by_their_gaussian():
    prob = windows(step=1).segment_image(np.zeros((3, 16, 24), np.uint8), "c")
    w = M.window_weights(16)
    expected = w[:, 4] / (w[:, 12] + w[:, 4])  # window 0 begins at 0, window 1 at 8: column 12
    np.testing.assert_allclose(np.log(prob[0] / prob[1])[:, 12], expected, rtol=1e-4)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_of_an_image_are_those_of_its_pieces(tmp_path, monkeypatch):
    objects = np.zeros((6, 9), np.int32)
    objects[1:3, 1:3], objects[1:3, 4:6] = 1, 2
    merged = np.zeros((6, 9), np.float32)
    merged[1:3, 1:6] = 1
    meta, _ = synthetic.images()
    meta |= {"cases": {"c": {"shape": [6, 9], "labelled": True, "objects": 2}}}
    arrays = {"image": np.zeros((3, 6, 9), np.uint8), "instances": objects}
    arrays["label"] = (objects > 0).astype(np.uint8)
    data = loaders.Prepared(meta, lambda case, name: arrays[name])
    network = windows()
    prob = np.stack([1 - merged, merged])
    monkeypatch.setattr(Windows, "segment_image", lambda self, image, case: prob)
    rows, counts, others = M.score_cases(network, data, ["c"], RANKS, tmp_path, None)["c"]
    assert others["AJI"] == pytest.approx(0.4) and others["AJI binary"] == pytest.approx(0.8)
    assert others["object Dice"] == pytest.approx(0.571429, abs=1e-6)
    assert rows[0]["iou"] == pytest.approx(0.8) and others["AJI of perfect masks"] == 1
    assert others["Dice of all foreground"] == pytest.approx(2 * 8 / (8 + 54))
    assert metrics.miou(counts) == pytest.approx((0.8 + 44 / 46) / 2)
    mask = loaders.read_image(tmp_path / "predictions/c.png")
    assert np.array_equal(mask[0], 255 * merged)  # every viewer shows it


def test_colour_rule_finds_what_colour_tells_and_guesses_elsewhere():
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (3, 60, 60)).astype(np.uint8) for _ in range(2)]
    labels = [rng.integers(0, 2, (60, 60)).astype(np.uint8) for _ in range(2)]
    rule = metrics.colour_rule([(images[0], labels[0])], 2)
    assert abs((rule(images[1]) == labels[1]).mean() - 0.5) < 0.04
    told = np.stack([120 + 60 * labels[0], 255 - 100 * labels[0], images[0][0]]).astype(np.uint8)
    assert np.array_equal(metrics.colour_rule([(told, labels[0])], 2)(told), labels[0])


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop": 100}, "--crop 100 is no multiple of 8"),
        ({"crop": 240}, "--crop 240 is no multiple of 32"),
        ({"num_channels": 48}, "no multiple of 32 groups"),
        ({"method": "ddpm", "loss": "ssim"}, "--target eps needs"),
        ({"fixed_t": 1000}, "--fixed-t is 1000"),
        ({"finetune": True, "method": "none"}, "--finetune starts from"),
    ],
)
def test_flags_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        replace(PAPER, **changes)
