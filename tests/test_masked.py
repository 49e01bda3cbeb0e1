"""masked_diffusion.py: masks, losses, networks, features, classifier, windows and scores against the specification."""

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import masked_diffusion as M
from common import InputError
from common.old import loaders, metrics, unet
from common.old.runtime import Ranks

CPU = torch.device("cpu")
FIXTURES = (
    Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / "shared")) / "data" / "fixtures"
)
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(),
    reason="public networks' weights and outputs are not beside this checkout (SHARED_DIR)",
)
TINY = M.Config(**M.PRESETS["tiny"])
TWO = replace(
    TINY,
    channel_mult=(1, 2),
    num_res_blocks=1,
    crop=16,
    attention_resolutions=(2,),
    blocks=(0, 1, 2),
)
TWO = replace(
    TWO, ssim_range="signed", feature_norm="l2", classifier_norm="batch"
)  # the public forms
LAPTOP = M.Config(**M.PRESETS["laptop"])
PAPER = M.Config(data="glas")
RECORD = {"channels": ["r", "g", "b"], "classes": {"gland": 1}}


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def awake(config=TWO, seed=0, out=3):
    """A network whose zero-initialised layers are random too, so that every layer has an effect."""
    torch.manual_seed(seed)
    model = M.build_model(config, 3, out)
    for p in model.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def backbone(config=TWO, seed=0):
    return M.Backbone(config, awake(config, seed), CPU, None)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


# --- masks -----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    "tiles, first", [(4096, None), (1024, None), (256, 997), (64, 985), (16, 938)]
)
def test_all_tiles_are_hidden_from_the_time_of_the_table_on(tiles, first):
    hidden = [t for t in range(M.T) if M.kept(t, tiles) == 0]
    assert hidden == (list(range(first, M.T)) if first else [])


def test_kept_equals_the_float_expression_for_powers_of_two_and_is_exact_elsewhere():
    for tiles in (16, 64, 256, 1024, 4096):
        assert all(M.kept(t, tiles) == int(tiles * (1 - t / M.T)) for t in range(M.T))
    wrong = [t for t in range(M.T) if M.kept(t, 100) != int(100 * (1 - t / M.T))]
    assert len(wrong) == 14 and wrong[:3] == [340, 550, 560]
    assert all(100 - M.kept(t, 100) == math.ceil(t / 10) for t in range(0, M.T, 10))


def test_hidden_tiles_are_grey_in_all_channels_and_the_others_untouched():
    x = torch.rand(2, 3, 8, 12) + 0.5
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 0] = True
    y = M.hide(x, mask)
    expected = x.clone()
    expected[0, :, 4:8, 8:12] = 0
    expected[1, :, 0:4, 0:4] = 0
    assert torch.equal(y, expected)


def test_mask_is_a_uniform_choice_of_tiles():
    rng = np.random.default_rng(0)
    total = sum(M.draw_mask(rng, 3, (2, 4)).astype(int) for _ in range(4000))
    assert (M.draw_mask(rng, 3, (2, 4)).sum() == 5) and np.abs(total / 4000 - 5 / 8).max() < 0.03


def test_each_sample_of_a_batch_has_its_own_mask_time_and_crop():
    crops = M.Crops(loaders.Tissue(), TINY, ["tissue_000"])
    a, b, again = crops[0], crops[1], crops[0]
    assert all(np.array_equal(u, v) for u, v in zip(a, again))
    assert a[2] != b[2] and not np.array_equal(a[3], b[3]) and not np.array_equal(a[0], b[0])
    for x0, _, t, mask, _ in (crops[n] for n in range(20)):
        assert (
            x0.shape == (3, 64, 64)
            and mask.shape == (16, 16)
            and mask.sum() == 256 - M.kept(t, 256)
        )
    fixed = M.Crops(loaders.Tissue(), replace(TINY, fixed_t=50, seed=0), ["tissue_000"])
    drawn = [fixed[n] for n in range(8)]
    assert {s[2] for s in drawn} == {50} and {int(s[3].sum()) for s in drawn} == {13}
    assert len({s[3].tobytes() for s in drawn}) == 8  # the same number, other tiles


def test_times_are_uniform_over_all_levels():
    crops = M.Crops(loaders.Tissue(), replace(TINY, crop=32, tile=32), ["tissue_000"])
    t = np.array([crops[n][2] for n in range(1500)])
    assert (
        t.min() < 10
        and t.max() >= 990
        and np.abs(np.histogram(t, 4, (0, 1000))[0] / 1500 - 0.25).max() < 0.04
    )


def test_images_pass_as_a_stream_of_permutations_for_any_batch():
    data = SimpleNamespace(image=lambda case: np.full((3, 64, 64), int(case), np.uint8))
    crops = M.Crops(data, TINY, [str(i) for i in range(5)])
    seen = [round((float(crops[n][0][0, 0, 0]) + 1) * 127.5) for n in range(20)]
    epochs = [seen[i : i + 5] for i in range(0, 20, 5)]
    assert (
        all(sorted(epoch) == list(range(5)) for epoch in epochs)
        and len({tuple(e) for e in epochs}) > 1
    )


def test_half_of_the_crops_are_flipped_left_to_right_and_none_upside_down():
    ramp = np.broadcast_to(
        np.arange(64, dtype=np.uint8) + 2 * np.arange(64, dtype=np.uint8)[:, None], (3, 64, 64)
    )
    crops = M.Crops(SimpleNamespace(image=lambda case: ramp), TINY, ["x"])
    drawn = [crops[n][0][0] for n in range(200)]
    assert all(d[-1, 0] > d[0, 0] for d in drawn)
    assert 0.4 < np.mean([d[0, -1] < d[0, 0] for d in drawn]) < 0.6


def test_smaller_images_are_reflected():
    a = np.arange(12).reshape(1, 3, 4)
    assert np.array_equal(M.cut(a, (0, 0), 5)[0, :, 0], [0, 4, 8, 4, 0])
    assert np.array_equal(M.cut(a, (0, 0), 5)[0, 0], [0, 1, 2, 3, 2])
    assert np.array_equal(M.cut(a, (1, 2), 2), a[:, 1:3, 2:4])
    data = SimpleNamespace(image=lambda case: np.zeros((3, 20, 90), np.uint8))
    assert M.Crops(data, TINY, ["x"])[0][0].shape == (3, 64, 64)


def test_image_values_span_minus_one_to_one():
    assert M.as_input(np.array([0, 255], np.uint8)).tolist() == [-1, 1]


# --- SSIM ------------------------------------------------------------------------------------------------------------


def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    r = np.random.RandomState(0)  # the specification's draws
    a, b = (torch.from_numpy(r.uniform(-1, 1, (1, 3, 16, 16))) for _ in range(2))
    i, j, c = (torch.arange(n, dtype=torch.float64).reshape(s) for n, s in
               ((16, (16, 1)), (16, (1, 16)), (3, (3, 1, 1))))  # fmt: skip
    s = torch.sin(0.7 * i + 0.3 * j + c)[None]
    t = 0.8 * s + 0.2 * torch.cos(0.5 * i - 0.9 * j + c)[None]
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    both = {
        "A A": (a, a),
        "0 0": (zero, zero),
        "A -A": (a, -a),
        "A 0": (a, zero),
        "A B": (a, b),
        "S T": (s, t),
    }
    both |= {"S -S": (s, -s), "A A/2": (a, a / 2), "1 0": (one, zero), "1 -1": (one, -one)}
    return both[name]


SSIM = [
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
]


@pytest.mark.parametrize("name, public, same, wide", SSIM)
def test_ssim_equals_the_table(name, public, same, wide):
    x, y = pair(name)
    assert float(M.ssim_loss(x, y, PAPER)) == pytest.approx(public, abs=1e-10)
    assert float(1 - M.ssim_map(x, y).mean()) == pytest.approx(same, abs=1e-10)
    assert float(1 - M.ssim_map(x, y, 11, 2.0).mean()) == pytest.approx(wide, abs=1e-10)


def test_the_draws_are_the_specifications():
    a, b = pair("A B")
    assert [round(float(v), 8) for v in (*a[0, 0, 0, :2], *b[0, 0, 0, :2])] == [
        0.09762701, 0.43037873, 0.93229489, 0.58375914]  # fmt: skip


def test_gaussian_window_has_the_public_weights():
    g = M.gaussian_window(5, CPU).sum(0)
    assert [round(float(v), 8) for v in g[:3]] == [0.12007838, 0.23388076, 0.29208172] and float(
        g.sum()
    ) == 1


def test_signed_ssim_does_not_see_the_sign_and_unit_does():
    s, minus = pair("S -S")
    unit = replace(PAPER, ssim_range="unit")
    assert float(M.ssim_loss(s, minus, PAPER)) < 0.01 and float(M.ssim_loss(s, minus, unit)) > 0.5
    assert float(M.ssim_loss(s, s, unit)) == pytest.approx(0, abs=1e-12)
    expected = (1 - M.ssim_map((s + 1) / 2, (minus + 1) / 2)).mean() / 2
    assert float(M.ssim_loss(s, minus, unit)) == pytest.approx(float(expected))


def test_ssim_flags_reach_the_loss():
    x, y = pair("S T")
    wide = replace(PAPER, ssim_window=11, ssim_L=2.0)
    expected = (1 - M.ssim_map(x, y, 11, 2.0)).clamp(0, 1).mean() / 2
    assert (
        float(M.ssim_loss(x, y, wide))
        == pytest.approx(float(expected))
        != float(M.ssim_loss(x, y, PAPER))
    )


def test_ssim_below_zero_has_no_gradient():
    x = torch.ones(1, 1, 16, 16)
    y = torch.full((1, 1, 16, 16), -1.0, requires_grad=True)
    M.ssim_loss(x, y, PAPER).sum().backward()
    assert not y.grad[:, :, 5:11, 5:11].any() and y.grad.any()


def test_ssim_loss_is_of_each_image_and_over_visible_pixels_too():
    x, y = image(2, 3, 16, 16), image(2, 3, 16, 16, seed=1)
    both = M.ssim_loss(x, y, PAPER)
    torch.testing.assert_close(
        both, torch.cat([M.ssim_loss(x[i : i + 1], y[i : i + 1], PAPER) for i in range(2)])
    )
    batch = M.Batch(
        x,
        torch.zeros(2, 16, 16),
        torch.tensor([0, 0]),
        torch.zeros(2, 4, 4, dtype=torch.bool),
        torch.arange(2),
    )
    loss = M.training_loss(
        lambda xt, t: y, TWO, batch
    )  # nothing is hidden, and still there is a loss
    torch.testing.assert_close(loss, both)


def test_flipped_share_counts_anti_correlated_blocks():
    x = image(1, 3, 16, 32)
    y = x.clone()
    y[:, :, 8:, 8:16] *= -0.5
    y[:, :, :8, :8] += 0.7  # another mean is no other sign
    assert M.flipped_share(x, 0 * x + 0.3) == 0  # a flat block has no sign
    assert (
        M.flipped_share(x, y) == 1 / 8
        and M.flipped_share(x, x) == 0
        and M.flipped_share(x, -x) == 1
    )


# --- noise and other losses ------------------------------------------------------------------------------------------


def test_abar_equals_the_specifications_values():
    t = [50, 150, 250, 650]
    assert M.abar_table("cosine", CPU)[t].numpy().round(6).tolist() == [
        0.991725,
        0.940000,
        0.845888,
        0.267786,
    ]
    assert M.abar_table("linear", CPU)[t].numpy().round(6).tolist() == [
        0.969951,
        0.785887,
        0.521423,
        0.013590,
    ]
    assert len(M.abar_table("cosine", CPU)) == 1000


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_q_sample_mixes_image_and_noise(schedule):
    x, eps, t = image(2, 3, 4, 4), image(2, 3, 4, 4, seed=1), torch.tensor([0, 650])
    xt = M.q_sample(x, eps, t, schedule)
    for i in range(2):
        a = M.abar_table(schedule, CPU)[int(t[i])]
        torch.testing.assert_close(xt[i], math.sqrt(a) * x[i] + math.sqrt(1 - a) * eps[i])
    config = replace(TINY, method="ddpm", schedule=schedule)
    torch.testing.assert_close(M.restored(config, eps, xt, t), x, atol=1e-4, rtol=1e-4)


def batch_of(config, n: int = 3):
    crops = M.Crops(loaders.Tissue(), config, ["tissue_000", "tissue_001"])
    return M.Batch(*(torch.as_tensor(np.stack(v)) for v in zip(*(crops[i] for i in range(n)))))


def test_ddpm_predicts_its_own_noise():
    config = replace(TWO, method="ddpm")
    batch = batch_of(config)
    eps = M.noise(config.seed, "noise", [0, 1, 2], (3, 16, 16), CPU)
    seen = {}

    def net(xt, t):
        seen["xt"] = xt
        return eps + 0.5

    torch.testing.assert_close(M.training_loss(net, config, batch), torch.full((3,), 0.25))
    torch.testing.assert_close(seen["xt"], M.q_sample(batch.x0, eps, batch.t, "cosine"))
    torch.testing.assert_close(
        M.training_loss(net, replace(config, loss="l1"), batch), torch.full((3,), 0.5)
    )
    x0 = replace(config, target="x0")
    torch.testing.assert_close(
        M.training_loss(lambda xt, t: batch.x0 - 2, x0, batch), torch.full((3,), 4.0)
    )
    ssim = replace(x0, loss="ssim")
    assert M.training_loss(lambda xt, t: batch.x0, ssim, batch).max() < 1e-6


def test_mdm_is_shown_the_masked_image_and_its_time():
    batch, seen = batch_of(TWO), {}

    def net(xt, t):
        seen.update(xt=xt, t=t)
        return batch.x0

    assert M.training_loss(net, TWO, batch).max() < 1e-6
    assert torch.equal(seen["xt"], M.hide(batch.x0, batch.mask)) and torch.equal(seen["t"], batch.t)


def test_supervised_loss_is_cross_entropy_without_ignored_pixels():
    config = replace(TWO, method="unet")
    batch = batch_of(config)
    logits = image(3, 2, 16, 16)
    expected = F.cross_entropy(logits, batch.label, reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(M.training_loss(lambda x, t: logits, config, batch), expected)
    assert batch.label.max() == 1 and not batch.t.any()
    holed = replace(batch, label=batch.label.clone())
    holed.label[:, :8] = 255
    kept = (
        F.cross_entropy(logits[:, :, 8:], batch.label[:, 8:], reduction="none").flatten(1).mean(1)
    )
    torch.testing.assert_close(M.training_loss(lambda x, t: logits, config, holed), kept)


def test_supervised_labels_turn_with_their_image():
    label = (np.arange(64 * 64).reshape(64, 64) % 7).astype(np.uint8)
    data = SimpleNamespace(image=lambda c: np.stack([label * 20] * 3), label=lambda c: label)
    crops = M.Crops(data, replace(TWO, method="unet"), ["x"])
    for n in range(6):
        x0, y, *_ = crops[n]
        np.testing.assert_allclose((x0[0] + 1) * 127.5, y * 20, atol=1e-4)


# --- networks --------------------------------------------------------------------------------------------------------


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


def test_cifar_network_has_the_public_number_of_parameters():
    with torch.device("meta"):
        model = M.build_model(
            M.Config(
                num_channels=128, channel_mult=(1, 2, 2, 2), attention_resolutions=(2,), crop=32
            ),
            3,
            3,
        )
    assert 35e6 < count(model) < 45e6


@needs_fixtures
def test_public_network_agrees_at_every_decoder_block():
    z = np.load(FIXTURES / "guided_diffusion_2d_tiny.npz")
    info = json.loads((FIXTURES / "guided_diffusion_2d_tiny.json").read_text())
    config = replace(
        TINY, channel_mult=(1, 2), num_head_channels=16, attention_resolutions=(2,), crop=32
    )
    model = M.build_model(config, 3, 6).eval()
    M.load_public(
        model, {k: torch.from_numpy(z[k]) for k in z.files if "." in k and not k.startswith("act/")}
    )
    assert count(model) == info["parameters"]
    x, t = torch.from_numpy(z["x"]), torch.from_numpy(z["t"])
    with torch.no_grad():
        maps, out = model.features(x, t, range(6)), model(x, t)
        out_b = model(x, torch.from_numpy(z["t_b"]))
    for k in range(6):
        torch.testing.assert_close(
            maps[k], torch.from_numpy(z[f"act/output_blocks.{k}"]), atol=1e-5, rtol=0
        )
    torch.testing.assert_close(out, torch.from_numpy(z["out"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out_b, torch.from_numpy(z["out_b"]), atol=1e-5, rtol=0)
    assert float(out.std()) == pytest.approx(0.5539033, abs=1e-5) and float(
        out.abs().max()
    ) == pytest.approx(2.164387)


BLOCKS = [4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]
SIDES = [2, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64]


def test_decoder_blocks_have_the_tables_channels_and_sides():
    model = M.build_model(TINY, 3, 3).eval()
    with torch.no_grad():
        maps = model.features(torch.zeros(1, 3, 64, 64), torch.tensor([50]), range(18))
    assert [tuple(m.shape[1:]) for m in maps] == [(32 * m, s, s) for m, s in zip(BLOCKS, SIDES)]
    attends = [
        any(isinstance(layer, M.AttentionBlock) for layer in block) for block in model.output_blocks
    ]
    assert attends == [True] * 9 + [False] * 9


@pytest.mark.parametrize(
    "flags, dimension",
    [
        ({"num_channels": 192}, 1728),
        ({"num_channels": 64}, 576),
        ({"num_channels": 32}, 288),
        ({"num_channels": 192, "data": "ffhq34"}, 3264),
        ({"num_channels": 32, "data": "ffhq34"}, 544),
        ({"num_channels": 256, "data": "ffhq34", "method": "ddpm"}, 8448),
        (
            {
                "num_channels": 256,
                "data": "ffhq34",
                "method": "ddpm",
                "blocks": tuple(range(5, 13)),
            },
            13056,
        ),
    ],
)
def test_feature_dimension_equals_the_table(flags, dimension):
    config = replace(PAPER, **flags)
    with torch.device("meta"):
        model = M.build_model(config, 3, 3)
        maps = [
            m
            for _ in config.times
            for m in model.features(torch.empty(1, 3, 32, 32), torch.zeros(1), config.taps)
        ]
    assert sum(m.shape[1] for m in maps) == dimension


def test_widths_are_derived_from_a_forward_pass():
    net = M.Backbone(TINY, M.build_model(TINY, 3, 3).eval(), CPU, None)
    assert net.widths() == [64, 64, 64, 64, 32]
    maps, _ = net.window_features(torch.zeros(1, 3, 64, 64), ("x",))
    assert [m.shape[2] for m in maps] == [16, 16, 16, 32, 32]
    several = replace(net, config=replace(TINY, feature_t=(0, 250), blocks=(5, 12)))
    assert several.widths() == [128, 32, 128, 32]  # times outer, blocks inner


def test_stopping_after_a_block_gives_the_same_activations():
    model, x, t, calls = awake(), image(1, 3, 16, 16), torch.tensor([50]), []
    for k, block in enumerate(model.output_blocks):
        block.register_forward_hook(lambda *_, k=k: calls.append(k))
    with torch.no_grad():
        whole = model.trunk(x, t, range(4))[1]
        calls.clear()
        some = model.features(x, t, (2, 1))
    assert calls == [0, 1, 2]  # the last block is not run
    assert torch.equal(some[0], whole[2]) and torch.equal(some[1], whole[1])


def test_recompute_gives_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = awake(replace(TWO, recompute=recompute)).train()
        model(image(1, 3, 16, 16), torch.tensor([3])).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("form", ["plain", "module."])
def test_init_takes_the_mean_of_a_six_channel_head_and_says_so(tmp_path, capsys, form):
    public, model = awake(TWO, 1, out=6), awake(TWO, 2)
    torch.save({("module." if form == "module." else "") + k: v.half() for k, v in public.state_dict().items()},
               tmp_path / "public.pt")  # fmt: skip
    M.load_start(str(tmp_path / "public.pt"), model, Ranks(0, 1, 0, CPU))
    assert (
        "out.2.weight has 6 channels, 3 here: its first half, the mean, is taken"
        in capsys.readouterr().out
    )
    torch.testing.assert_close(model.out[2].weight, public.out[2].weight[:3].half().float())
    assert torch.equal(
        model.middle_block[0].out_layers[3].weight,
        public.middle_block[0].out_layers[3].weight.half().float(),
    )


def test_init_keeps_a_fresh_head_where_none_fits_and_says_so(tmp_path, capsys):
    public, model = awake(TWO, 1, out=3), awake(TWO, 2, out=6)
    before = model.out[2].weight.clone()
    torch.save(public.state_dict(), tmp_path / "public.pt")
    M.load_start(str(tmp_path / "public.pt"), model, Ranks(0, 1, 0, CPU))
    assert "the fresh head is kept" in capsys.readouterr().out and torch.equal(
        model.out[2].weight, before
    )


def test_init_is_strict(tmp_path):
    state = awake(TWO, 1).state_dict()
    state.pop("middle_block.1.qkv.weight")
    torch.save(state, tmp_path / "part.pt")
    model = awake(TWO, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"middle_block\.1\.qkv\.weight is absent"):
        M.load_start(str(tmp_path / "part.pt"), model, Ranks(0, 1, 0, CPU))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- MAE -------------------------------------------------------------------------------------------------------------

MAE = replace(TINY, method="mae", crop=16, tile=4)


def test_large_mae_is_the_published_one():
    with torch.device("meta"):
        model = M.build_model(replace(PAPER, method="mae"), 3, 3)
    encoder = (
        count(model.blocks) + count(model.norm) + count(model.patch_embed) + model.cls_token.numel()
    )
    assert encoder == 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 + (8 * 8 * 3 + 1) * 1024 + 1024
    assert len(model.decoder_blocks) == 8 and model.decoder_pred.out_features == 192
    assert (
        len(replace(PAPER, method="mae").taps) == 12 and replace(PAPER, method="mae").taps[0] == 12
    )
    assert replace(TINY, method="mae").taps == (4, 5, 6, 7)


def test_patchify_orders_rows_pixels_channels():
    x = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tiles = M.patchify(x, 2)
    assert tiles.shape == (1, 6, 8)
    assert tiles[0, 4].tolist() == [
        x[0, c, 2 + i, 2 + j].item() for i in range(2) for j in range(2) for c in range(2)
    ]
    assert torch.equal(M.unpatchify(tiles, 2, (2, 3)), x)


def test_mae_does_not_see_hidden_tiles():
    model, x = awake(MAE), image(2, 3, 16, 16)
    mask = torch.from_numpy(
        np.stack([M.draw_mask(np.random.default_rng(i), 4, (4, 4)) for i in range(2)])
    )
    other = torch.where(
        mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None],
        image(2, 3, 16, 16, seed=5),
        x,
    )
    with torch.no_grad():
        a, b, c = model(x, mask, 4), model(other, mask, 4), model(other * 0.9, mask, 4)
    assert a.shape == (2, 16, 48) and torch.equal(a, b) and not torch.allclose(a, c)


def test_mae_tokens_go_back_to_their_place():
    """Without positions and with a decoder that passes through, a visible tile's output depends on that tile alone."""
    model = awake(MAE)
    model.blocks = model.decoder_blocks = torch.nn.ModuleList()
    x = image(1, 3, 16, 16)
    mask = torch.from_numpy(M.draw_mask(np.random.default_rng(1), 4, (4, 4)))[None]
    shown = mask.flatten().logical_not().nonzero().flatten().tolist()
    with torch.no_grad():
        a = model(x, mask, 4)
        y = x.clone()
        row, column = divmod(shown[2], 4)
        y[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.3
        changed = (model(y, mask, 4) - a).abs().amax(2)[0].nonzero().flatten().tolist()
    assert changed == [shown[2]]


def test_mae_positions_are_fixed_sines():
    p = M.positions(2, 3, 8, CPU)[0]
    freq = [1.0, 0.01]
    for k, (y, x) in enumerate((y, x) for y in range(2) for x in range(3)):
        expected = [f(v * w) for v in (x, y) for f in (math.sin, math.cos) for w in freq]
        torch.testing.assert_close(p[k], torch.tensor(expected))


def test_mae_loss_is_of_hidden_tiles_normalised_one_by_one():
    x, output = image(2, 3, 8, 8), image(2, 4, 48, seed=1)
    mask = torch.tensor([[[True, False], [True, False]], [[True, True], [False, False]]])
    total = []
    for b in range(2):
        errors = []
        for k in range(4):
            if mask[b].flatten()[k]:
                v = M.patchify(M.imagenet(x), 4)[b, k].double().numpy()
                v = (v - v.mean()) / math.sqrt(v.var(ddof=1) + 1e-6)
                errors.append(np.mean((v - output[b, k].numpy()) ** 2))
        total.append(np.mean(errors))
    torch.testing.assert_close(
        M.mae_loss(MAE, output, x, mask),
        torch.tensor(total),
        atol=1e-5,
        rtol=1e-5,
        check_dtype=False,
    )


def test_mae_with_ssim_restores_plain_pixels():
    x = image(2, 3, 8, 8)
    mask = torch.ones(2, 2, 2, dtype=torch.bool)
    assert M.mae_loss(replace(MAE, loss="ssim"), M.patchify(x, 4), x, mask).max() < 1e-6


def test_mae_keeps_a_quarter_and_its_features_see_all():
    crops = M.Crops(loaders.Tissue(), MAE, ["tissue_000"])
    assert int((~crops[0][3]).sum()) == 4
    assert (
        int((~M.Crops(loaders.Tissue(), replace(MAE, ratio=(0.5,)), ["tissue_000"])[0][3]).sum())
        == 8
    )
    net = M.Backbone(MAE, awake(MAE), CPU, None)
    x = image(1, 3, 16, 16)
    maps, _ = net.window_features(x, ("a",))
    assert net.widths() == [192] * 4 and [tuple(m.shape) for m in maps] == [(1, 192, 4, 4)] * 4
    y = x.clone()
    y[:, :, 12:, :4] += 1  # the tile in row 3, column 0
    moved = (
        (net.model.features(y, None, (0,))[0] - net.model.features(x, None, (0,))[0])
        .abs()
        .sum(1)[0]
    )
    assert tuple(np.unravel_index(int(moved.argmax()), (4, 4))) == (3, 0)


def test_mae_learning_rate_warms_up_and_ends_at_zero():
    config = replace(PAPER, method="mae", steps=1000)
    assert M.learning_rate(config, 19) == pytest.approx(1.5e-4 * 128 / 256)
    assert (
        M.learning_rate(config, 0) == pytest.approx(7.5e-5 / 20)
        and M.learning_rate(config, 999) < 1e-9
    )
    assert M.learning_rate(PAPER, 0) == M.learning_rate(PAPER, 9999) == 1e-4
    groups = M.make_optimizer(config, awake(MAE)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.05, 0] and groups[0]["betas"] == (0.9, 0.95)
    assert min(p.ndim for p in groups[0]["params"]) == 2 and all(
        p.ndim == 1 or len(p) == 1 for p in groups[1]["params"]
    )
    plain = M.make_optimizer(PAPER, awake()).param_groups
    assert [g["weight_decay"] for g in plain] == [0, 0] and plain[0]["betas"] == (0.9, 0.999)


# --- features --------------------------------------------------------------------------------------------------------


def test_enlarging_a_ramp_gives_the_specifications_values():
    ramp = torch.arange(4.0).reshape(1, 1, 1, 4)
    assert unet.up(ramp, (1, 8)).flatten().tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_square_sum_is_exact_without_enlarging():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert float(M.square_sum(x, (8, 8))) == pytest.approx(4807)
    x = image(1, 5, 3, 7)
    assert float(M.square_sum(x, (12, 14))) == pytest.approx(
        float(unet.up(x, (12, 14)).square().sum()), rel=1e-6
    )


def test_features_are_divided_by_the_frobenius_norm_of_the_whole_window():
    net = backbone()
    x = image(1, 3, 16, 16)
    maps, norm = net.window_features(x, ("k",))
    large = torch.cat([unet.up(m, (16, 16)) for m in maps], dim=1)
    assert float(norm) == pytest.approx(float(large.norm()), rel=1e-5)
    rms = replace(net, config=replace(TWO, feature_norm="rms")).window_features(x, ("k",))[1]
    assert float((large / rms).square().mean()) == pytest.approx(1, rel=1e-4)
    assert (
        float(replace(net, config=replace(TWO, feature_norm="none")).window_features(x, ("k",))[1])
        == 1
    )
    assert replace(PAPER).norm == "l2" and replace(PAPER, data="ffhq34").norm == "none"


def test_standard_features_have_mean_0_and_sd_1_in_each_channel_over_the_labelled_windows():
    config = replace(TWO, feature_norm="standard", feature_mask="off")
    data, plain = (
        SimpleNamespace(image=lambda case: 255 * (image(3, 20, 24, seed=case).numpy() > 0)),
        backbone(config),
    )
    net = M.standardised(plain, data, (1, 2, 3), 0)
    x = torch.from_numpy(
        np.stack(
            [M.as_input(data.image(c))[:, y : y + 16, :16] for c in (1, 2, 3) for y in range(5)]
        )
    )
    for raw, m in zip(plain.window_features(x, ("k",))[0], net.window_features(x, ("k",))[0]):
        assert (
            float(raw.mean((0, 2, 3)).abs().max()) > 0.1
            or float((raw.std((0, 2, 3)) - 1).abs().max()) > 0.1
        )
        assert (
            float(m.mean((0, 2, 3)).abs().max()) < 0.1
            and float((m.std((0, 2, 3)) - 1).abs().max()) < 0.1
        )
    assert net.window_features(x, ("k",))[1].tolist() == [1] * 15


@pytest.mark.parametrize("method", ["mdm", "ddpm", "unet"])
def test_windows_at_once_have_the_logits_of_one_at_a_time(method):
    config = replace(TWO, method=method)
    net = backbone(config)
    torch.manual_seed(1)
    heads = (
        [M.PixelClassifier(net.widths(), 2).eval() for _ in range(2)] if method != "unet" else []
    )
    x, keys = image(3, 3, 16, 16), [("a", i) for i in range(3)]
    run, each = M.Run(0, net, heads), range(3)
    together = M.window_logits(run, x, keys)
    assert together.shape[:2] == (3, max(1, len(heads)))
    alone = torch.cat([M.window_logits(run, x[i : i + 1], keys[i : i + 1]) for i in each])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (7, 9)])
def test_pixels_by_grid_sample_equal_enlarge_then_index(size):
    x = image(1, 5, 4, 6)
    where = torch.tensor([(i, j) for i in range(size[0]) for j in range(size[1])])
    expected = unet.up(x, size)[0].flatten(1).T
    torch.testing.assert_close(unet.pixels_of(x, where, size), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(
        F.grid_sample(x, torch.tensor([[[[-0.99, -0.99]]]]), align_corners=False)[0, :, 0].T,
        expected[:1],
    )


@pytest.mark.parametrize("some", [False, True])
def test_first_layer_before_enlarging_equals_after(some):
    torch.manual_seed(0)
    maps, norm, size = [image(1, 3, 4, 4), image(1, 5, 8, 8, seed=1)], torch.tensor(2.5), (16, 16)
    maps += [image(1, 2, 8, 8, seed=2)]
    classifier = M.PixelClassifier([3, 5, 2], 2).eval()
    torch.nn.init.normal_(classifier.first.bias)
    where = torch.tensor([[0, 0], [15, 15], [3, 9], [8, 0]]) if some else None
    features = torch.cat([unet.up(m, size) for m in maps], dim=1) / norm  # [1, 10, 16, 16]
    flat = features[0].flatten(1).T
    flat = flat[where[:, 0] * 16 + where[:, 1]] if where is not None else flat
    torch.testing.assert_close(
        classifier.enlarge(maps, norm, size, where), classifier.first(flat), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        classifier(maps, norm, size, where), classifier.rest(classifier.first(flat))
    )


def test_feature_mask_is_a_function_of_its_key_and_hides_what_t_says():
    net, x = backbone(), torch.ones(1, 3, 16, 16)
    first = net.shown(x, 250, (0, "case", 3, 4, 0))
    assert torch.equal(first, net.shown(x, 250, (0, "case", 3, 4, 0)))
    assert int((first[0, 0, ::4, ::4] == 0).sum()) == 4  # 16 tiles
    for other in (
        (1, "case", 3, 4, 0),
        (0, "esac", 3, 4, 0),
        (0, "case", 3, 5, 0),
        (0, "case", 3, 4, 1),
    ):
        assert (
            not torch.equal(first, net.shown(x, 250, other)) or other[-1] == 0
        )  # sixteen tiles may fall alike
    assert len({net.shown(x, 250, (0, "c", 0, 0, e)).numpy().tobytes() for e in range(8)}) > 4
    off = replace(net, config=replace(TWO, feature_mask="off"))
    assert torch.equal(off.shown(x, 250, (0,)), x)
    assert torch.equal(replace(net, config=replace(TWO, method="unet")).shown(x, 0, (0,)), x)


def test_ddpm_features_share_one_noise_image_unless_told_otherwise():
    config = replace(TWO, method="ddpm")
    net, x, eps = backbone(config), torch.zeros(1, 3, 16, 16), {}
    for t in (50, 250):
        scale = math.sqrt(1 - M.abar_table("cosine", CPU)[t])
        eps[t] = net.shown(x, t, (0, "a")) / scale
        torch.testing.assert_close(eps[t], net.shown(x, t, (7, "b")) / scale)  # any run, any window
    torch.testing.assert_close(eps[50], eps[250])
    fresh = replace(net, config=replace(config, share_noise="off"))
    assert not torch.equal(fresh.shown(x, 50, (0, "a")), fresh.shown(x, 50, (0, "b")))
    assert torch.equal(fresh.shown(x, 50, (0, "a")), fresh.shown(x, 50, (0, "a")))


def test_defaults_of_times_and_blocks_are_the_papers():
    assert PAPER.times == (50,) and PAPER.taps == (8, 9, 10, 11, 12)
    assert replace(PAPER, method="ddpm").times == (250,)
    natural = replace(PAPER, data="celeba19")
    assert natural.times == (50,) and natural.taps == tuple(range(5, 13))
    assert replace(natural, method="ddpm").times == (50, 150, 250)
    assert replace(natural, method="ddpm").taps == (5, 6, 7, 8, 12)  # D12
    assert replace(PAPER, fixed_t=250, method="ddpm").times == (250,)
    assert replace(PAPER, fixed_t=50, feature_t=(0, 650)).times == (0, 650)


# --- classifier ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dimension, classes, parameters",
    [(1728, 2, 225_826), (288, 2, 41_506), (3264, 34, 873_890), (8448, 34, 2_200_994)],
)
def test_classifier_has_the_public_number_of_parameters(dimension, classes, parameters):
    assert count(M.PixelClassifier([dimension], classes)) == parameters
    hidden = 256 + 128 if classes >= 30 else 128 + 32
    assert (
        count(M.PixelClassifier([dimension], classes, batch_norm=False)) == parameters - 2 * hidden
    )


def test_classifier_has_batch_norm_after_relu_and_small_normal_weights():
    torch.manual_seed(0)
    c = M.PixelClassifier([1000], 2)
    assert [type(m).__name__ for m in c.rest] == [
        "ReLU",
        "BatchNorm1d",
        "Linear",
        "ReLU",
        "BatchNorm1d",
        "Linear",
    ]
    assert (
        float(c.first.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
        and not c.first.bias.any()
    )
    assert c.rest[1].weight.eq(1).all()


def steps_until_done(config, losses, per_epoch: int) -> tuple[int, int]:
    """(steps, index of the last epoch) on scripted losses."""
    stopping = M.Stopping(config)
    for step in range(10**6):
        epoch, place = divmod(step, per_epoch)
        if stopping(epoch, torch.tensor(losses(step)), place == per_epoch - 1):
            return step + 1, epoch
    raise AssertionError


@pytest.mark.parametrize(
    "first, images, expected", [(40, 8, (504, 62)), (40, 85, (5355, 62)), (30, 8, (424, 52))]
)
def test_medical_rule_on_a_constant_loss(first, images, expected):
    assert steps_until_done(replace(PAPER, stop_epoch=first), lambda step: 1.0, images) == expected


@pytest.mark.parametrize("per_epoch", [52, 100, 400])
def test_natural_rule_on_a_constant_loss(per_epoch):
    assert (
        steps_until_done(replace(PAPER, stop="natural"), lambda step: 1.0, per_epoch)[0]
        == 4 * per_epoch + 52
    )


def test_an_improvement_at_the_last_moment_begins_the_count_anew():
    # constant: epoch 41 is the first and best, 62 would be its 21st miss
    assert steps_until_done(PAPER, lambda step: 0.5 if step == 62 * 8 + 7 else 1.0, 8)[1] == 62 + 21
    assert (
        steps_until_done(PAPER, lambda step: 0.5 if step == 62 * 8 + 6 else 1.0, 8)[1] == 62
    )  # not the last batch
    natural = replace(PAPER, stop="natural")
    assert (
        steps_until_done(natural, lambda step: 0.5 if step == 400 + 51 else 1.0, 100)[0]
        == 400 + 52 + 51
    )


def test_nan_counts_as_a_miss():
    assert steps_until_done(PAPER, lambda step: math.nan if step >= 42 * 8 else 1.0, 8)[1] == 62
    assert steps_until_done(PAPER, lambda step: math.nan, 8)[1] == 61


def test_stop_on_the_mean_of_an_epoch_and_after_fixed_steps():
    # the last batch never improves after the first counted epoch, the mean does for ten epochs more
    def losses(step: int) -> float:
        epoch, place = divmod(step, 4)
        return 1.0 if place == 3 else 100.0 - min(epoch, 51)

    assert steps_until_done(PAPER, losses, 4)[1] == 62
    assert steps_until_done(replace(PAPER, stop_loss="epoch"), losses, 4)[1] == 51 + 21
    assert steps_until_done(replace(PAPER, stop="steps", classifier_steps=17), losses, 4)[0] == 17


@pytest.mark.parametrize(
    "votes, expected", [([2, 1, 1, 2], 1), ([3, 3, 0, 0], 0), ([5, 4, 3, 2], 2), ([1, 2, 2], 2)]
)
def test_vote_takes_the_mode_and_the_smallest_of_equals(votes, expected):
    mask = M.vote(torch.tensor(votes).reshape(-1, 1, 1))
    assert mask.dtype == torch.uint8 and mask.item() == expected


def test_disagreement_is_the_entropy_of_the_mean_less_the_mean_entropy():
    sure = torch.zeros(2, 2, 4, 5)
    sure[:, 0] = 1
    assert M.disagreement(sure) == pytest.approx(0)
    split = sure.clone()
    split[1, :, 0, :2] = torch.tensor([0.0, 1.0])[
        :, None
    ]  # two of twenty pixels: all of the top tenth
    assert M.disagreement(split) == pytest.approx(math.log(2))
    split[1, :, 0, 1] = torch.tensor([1.0, 0.0])
    assert M.disagreement(split) == pytest.approx(math.log(2) / 2)


def test_random_features_are_no_linear_map_and_see_the_time():
    """As the network starts they would be: all branches end in a layer of zeros."""
    config = replace(TWO, method="ddpm", feature_norm="none", blocks=(0, 1))
    record = loaders.data_record(loaders.Tissue(0, (1, 1), (8, 8)))
    x, y = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for make, linear in ((M.fresh, True), (M.untrained, False)):
        model = make(config, record).eval()

        def maps(x, t, model=model):
            with torch.no_grad():
                return torch.cat(
                    [m.flatten() for m in model.features(x, torch.tensor([t]), (0, 1))]
                )

        gap = maps(x, 0) + maps(y, 0) - maps(x + y, 0) - maps(0 * x, 0)
        assert (gap.abs().max() < 1e-4) == linear
        assert ((maps(x, 50) - maps(x, 900)).abs().max() < 1e-6) == linear
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), M.untrained(config, record).parameters())
    )


def test_each_window_of_a_batch_has_the_mask_of_its_own_key():
    net = M.Backbone(replace(TWO, method="mdm", feature_mask="on"), None, torch.device("cpu"), None)
    x0, keys = torch.ones(3, 3, 32, 32), [(0, "a"), (0, "b"), (1, "a")]
    together = net.shown(x0, 500, keys)
    for x, key, one in zip(x0, keys, together):
        assert torch.equal(net.shown(x[None], 500, key)[0], one)
    assert len({tuple(one.flatten().tolist()) for one in together}) == 3


def test_advice_for_memory_divides_the_batch_and_fits(monkeypatch):
    config, record = M.Config(amp="bf16"), loaders.data_record(loaders.Tissue(0, (1, 1), (8, 8)))
    monkeypatch.setattr(M.runtime, "free_memory_gb", lambda device: 78.0)
    ranks = M.Ranks(0, 1, 0, torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"needs about 29\d.\d GB.* try --accumulate 8, --recompute"
    ):
        M.check_memory(config, record, ranks)
    M.check_memory(replace(config, accumulate=8), record, ranks)
    monkeypatch.setattr(M.runtime, "free_memory_gb", lambda device: 5.0)  # not even the weights
    with pytest.raises(InputError, match="free; try --recompute"):
        M.check_memory(replace(config, accumulate=8), record, ranks)


def test_first_labels_are_those_of_the_names_sorted_as_text():
    names = [f"train_{i}" for i in range(1, 21)]
    data = SimpleNamespace(
        cases=lambda split: list(names), has_label=lambda case: case != "train_3"
    )
    config = replace(PAPER, labels=8)
    assert M.labelled_cases(data, config) == ["train_1", *(f"train_{i}" for i in range(10, 17))]
    drawn = M.labelled_cases(data, replace(config, draw="3"))
    order = sorted(set(names) - {"train_3"})
    random.Random(3).shuffle(order)
    assert (
        len(set(drawn)) == 8 and "train_3" not in drawn and drawn != M.labelled_cases(data, config)
    )
    assert drawn == order[:8]
    assert (
        drawn == M.labelled_cases(data, replace(config, draw="3", labels=4)) + drawn[4:]
    )  # nested
    assert len(M.labelled_cases(data, replace(config, labels=0))) == 19
    with pytest.raises(InputError, match="--labels 20: glas has 19 labelled training images"):
        M.labelled_cases(data, replace(config, labels=20))


def natural_store(tmp_path, norm="none", classes=3):
    config = replace(
        TWO, protocol="natural", feature_norm=norm, stop="steps", classifier_steps=30, pixels=8
    )
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 255, (3, 16, 16)).astype(np.uint8) for c in "abc"}
    labels = {c: rng.integers(0, classes, (16, 16)).astype(np.uint8) for c in "abc"}
    labels["b"][:] = 1
    labels["b"][0], labels["b"][1, :10], labels["b"][2, :4] = (
        2,
        255,
        2,
    )  # 20 pixels of class 2: kept
    labels["c"][labels["c"] == 0] = 1
    labels["c"][0, :3] = 0  # a class of 3 pixels
    data = SimpleNamespace(image=images.get, label=labels.get, classes={"x": 1, "y": 2}, name="n")
    net = M.Backbone(config, awake(config), CPU, None)
    return (
        config,
        net,
        data,
        M.store_features(config, net, data, "abc", 0, tmp_path / "features.npy"),
    )


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_stored_features_of_single_pixels_equal_the_enlarged_ones(tmp_path, norm):
    _, net, data, store = natural_store(tmp_path, norm)
    for i, case in enumerate("abc"):
        maps, size = net.window_features(
            torch.from_numpy(M.as_input(data.image(case)))[None], (0, case, 0, 0, 0)
        )
        large = (
            torch.cat([unet.up(m, (16, 16)) for m in maps], dim=1)[0].flatten(1).T / size
        )  # [256, D]
        pixels = np.array([0, 15, 240, 255, 17, 100])
        found = store.gather(i * 256 + pixels)
        np.testing.assert_allclose(
            found, large[pixels].numpy(), atol=2e-3 * float(large.abs().max())
        )


def test_classes_of_fewer_than_twenty_pixels_and_ignored_pixels_are_not_learned(tmp_path):
    _, _, data, store = natural_store(tmp_path)
    assert set(store.pixels) == set(np.nonzero(store.label != 255)[0])
    assert (store.label[512:] == 255).sum() == 3 and (store.label[256:512] == 255).sum() == 10
    assert (store.label[256:512] == 2).sum() == (data.label("b") == 2).sum() == 20


def test_natural_members_learn_from_single_pixels(tmp_path):
    config, net, _, store = natural_store(tmp_path)
    member = M.fit_natural(config, net, store, 3, 0, "member")
    assert count(member) == count(M.PixelClassifier(net.widths(), 3)) and not member.training
    other = M.fit_natural(config, net, store, 3, 1, "member")
    assert not torch.equal(member.first.weight, other.first.weight)


def test_medical_classifier_is_the_same_for_the_same_seed_and_keeps_no_images():
    config = replace(
        TWO, stop="steps", classifier_steps=4, crops=2, pixels=100, feature_norm="rms", quiet=True
    )
    data, net = loaders.Tissue(), M.Backbone(config, awake(config), CPU, None)
    fits = [
        M.fit_medical(config, net, data, data.cases("train")[:3], seed, "run") for seed in (0, 0, 1)
    ]
    assert torch.equal(fits[0].first.weight, fits[1].first.weight)
    assert not torch.equal(fits[0].first.weight, fits[2].first.weight)
    epochs = []
    for step in M.classifier_steps(config, net, data, data.cases("train")[:3], 0):
        epochs.append((step.epoch, step.ends, len(step.windows), len(step.labels)))
        if len(epochs) == 4:
            break
    assert epochs == [(0, False, 2, 200), (0, True, 1, 100), (1, False, 2, 200), (1, True, 1, 100)]


@pytest.mark.parametrize("crops, pixels", [(1, 0), (2, 0), (2, 50)])
def test_each_step_has_the_maps_of_its_own_labels(crops, pixels):
    labels = {
        c: np.random.default_rng(i).integers(0, 2, (20, 30)).astype(np.uint8)
        for i, c in enumerate("abcde")
    }
    data = SimpleNamespace(label=labels.get, image=lambda case: np.stack([255 * labels[case]] * 3))
    net = SimpleNamespace(
        device=CPU, window_features=lambda x0, keys: ([x0[:, :1]], torch.arange(len(keys)) + 1.0)
    )
    config, steps = replace(TWO, crops=crops, pixels=pixels), 0
    for step in M.classifier_steps(config, net, data, "abcde", 0):
        seen = [
            (maps[0] > 0).long()[0, 0] for maps, _, _ in step.windows
        ]  # the label itself, from the image
        seen = [
            v[where[:, 0], where[:, 1]] if where is not None else v
            for v, (_, _, where) in zip(seen, step.windows)
        ]
        assert torch.equal(torch.cat([v.flatten() for v in seen]), step.labels)
        steps += 1
        if step.epoch == 1 and step.ends:
            break
    assert steps == 2 * math.ceil(5 / crops)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, r, expected",
    [
        (522, 256, [0, 204, 266]),
        (775, 256, [0, 204, 408, 519]),
        (1000, 256, [0, 204, 408, 612, 744]),
        (589, 256, [0, 204, 333]),
        (257, 256, [0, 1]),
        (256, 256, [0]),
        (200, 256, [0]),
        (387, 128, [0, 102, 204, 259]),
        (261, 128, [0, 102, 133]),
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
    assert M.window_weights(128).sum() == pytest.approx(1612.1595, abs=1e-4)


class Fake:
    """window_logits that gives each window's own first channel, twice, and counts the windows."""

    def __init__(self):
        self.keys = []

    def __call__(self, run, x0, keys):
        self.keys += keys
        assert x0.shape == (len(keys), 3, 16, 16)
        return torch.stack([torch.stack([x0[:, 0], -x0[:, 0]], dim=1)] * 2, dim=1)


@pytest.mark.parametrize("shape", [(16, 16), (40, 21), (9, 30), (5, 5)])
def test_logits_of_windows_are_averaged_and_cut_to_the_image(monkeypatch, shape):
    fake = Fake()
    monkeypatch.setattr(M, "window_logits", fake)
    values = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    run = M.Run(3, M.Backbone(TWO, None, CPU, None), [])
    result = M.segment_image(run, values, "case")
    x = M.as_input(values)[0]
    np.testing.assert_allclose(result.prob[0], 1 / (1 + np.exp(-2 * x)), atol=1e-5)
    assert np.array_equal(
        result.mask, (x < 0).astype(np.uint8)
    ) and result.uncertainty == pytest.approx(0, abs=1e-6)
    windows = [len(M.window_starts(max(n, 16), 16)) for n in shape]
    assert len(fake.keys) == len(set(fake.keys)) == windows[0] * windows[1]


def test_windows_are_weighted_by_their_gaussian(monkeypatch):
    def numbered(run, x0, keys):
        return torch.arange(len(keys)).float().reshape(-1, 1, 1, 1, 1).expand(-1, 1, 2, 16, 16)

    monkeypatch.setattr(M, "window_logits", numbered)
    seen = {}
    monkeypatch.setattr(M, "vote", lambda masks: masks[0])
    plain = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor,
        "softmax",
        lambda self, dim: seen.setdefault("x", self.clone()) * 0 + plain(self, dim),
    )
    M.segment_image(
        M.Run(0, M.Backbone(TWO, None, CPU, None), []), np.zeros((3, 16, 24), np.uint8), "c"
    )
    w = M.window_weights(16)
    expected = w[:, 4] / (w[:, 12] + w[:, 4])  # window 0 begins at 0, window 1 at 8: column 12
    np.testing.assert_allclose(seen["x"][0, 0, :, 12], expected, rtol=1e-5)


# --- scores ----------------------------------------------------------------------------------------------------------


def scored(mask, truth, objects, case="c"):
    data = SimpleNamespace(label=lambda c: truth, instances=lambda c: objects, classes={"gland": 1}, ignore=None,
                           spacing=lambda c: (1.0, 1.0))  # fmt: skip
    return M.score_mask(data, case, mask)


def test_scores_of_one_mask_are_those_of_its_pieces():
    objects = np.zeros((6, 9), np.int32)
    objects[1:3, 1:3], objects[1:3, 4:6] = 1, 2
    merged = np.zeros((6, 9), np.uint8)
    merged[1:3, 1:6] = 1
    found = scored(merged, (objects > 0).astype(np.uint8), objects)
    entry = found["objects"][0]
    assert entry["aji"] == pytest.approx(0.4) and entry["object_dice"] == pytest.approx(
        0.571429, abs=1e-6
    )
    assert entry["aji_binary"] == pytest.approx(0.8) and found["rows"][0]["iou"] == pytest.approx(
        0.8
    )
    empty = scored(np.zeros_like(merged), (objects > 0).astype(np.uint8), objects)["objects"][0]
    assert (
        empty["aji"] == 0 and empty["object_dice"] == 0
    )  # the public code gives an empty prediction 1


def test_mean_scores_average_images_and_convert_the_mean_dice():
    objects = np.zeros((4, 8), np.int32)
    objects[:, :4] = 1
    truth = (objects > 0).astype(np.uint8)
    parts = [scored(truth, truth, objects), scored(np.ones_like(truth), truth, objects, "d")]
    scores = M.mean_scores(parts)
    assert scores["dice"] == pytest.approx((1 + 2 / 3) / 2) and scores["iou"] == pytest.approx(0.75)
    assert (
        scores["iou_from_dice"]
        == pytest.approx(scores["dice"] / (2 - scores["dice"]))
        != scores["iou"]
    )
    assert scores["miou"] == pytest.approx(np.mean([32 / 48, 16 / 32]))
    assert metrics.iou_from_dice(0.9195) == pytest.approx(0.850995, abs=1e-6)


def test_colour_rule_finds_what_colour_tells():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (20, 20)).astype(np.uint8)
    told = np.stack(
        [120 + 60 * label, 255 - 100 * label, rng.integers(0, 255, label.shape)]
    ).astype(np.uint8)
    data = SimpleNamespace(image=lambda c: told, label=lambda c: label, classes={"gland": 1})
    assert np.array_equal(M.colour_rule(data, ["a"])(told), label)


def test_colour_rule_guesses_where_colour_tells_nothing():
    rng = np.random.default_rng(1)
    images = {c: rng.integers(0, 255, (3, 60, 60)).astype(np.uint8) for c in "ab"}
    labels = {c: rng.integers(0, 2, (60, 60)).astype(np.uint8) for c in "ab"}
    data = SimpleNamespace(image=images.get, label=labels.get, classes={"gland": 1})
    right = (M.colour_rule(data, ["a"])(images["b"]) == labels["b"]).mean()
    assert abs(right - 0.5) < 0.04  # five standard deviations of a coin thrown 3600 times


# --- fake tissue -----------------------------------------------------------------------------------------------------


def test_tissue_is_a_function_of_its_seed_and_number():
    a, b = loaders.tissue(0, 3), loaders.tissue(0, 3)
    assert all(np.array_equal(u, v) for u, v in zip(a, b)) and not np.array_equal(
        a[0], loaders.tissue(0, 4)[0]
    )
    assert a[0].dtype == np.uint8 and a[0].shape == (3, 112, 144) and a[1].shape == (112, 144)


def test_tissue_has_glands_in_every_image_that_cover_a_quarter():
    data = loaders.Tissue()
    counts = [len(np.unique(data.instances(c))) - 1 for c in data.cases("pretrain")]
    share = [data.label(c).mean() for c in data.cases("pretrain")]
    assert (
        min(counts) >= 2 and max(counts) <= 8 and 0.2 < np.mean(share) < 0.4 and min(share) > 0.05
    )


def test_colour_alone_does_not_find_the_glands():
    data = loaders.Tissue()
    rule = M.colour_rule(data, data.cases("train")[:8])
    dice = [metrics.dice(rule(data.image(c)) > 0, data.label(c) > 0) for c in data.cases("test")]
    floor = [metrics.dice(np.ones((112, 144), bool), data.label(c) > 0) for c in data.cases("test")]
    assert np.mean(dice) < 0.45 and np.mean(floor) < 0.5


# --- averaged weights ------------------------------------------------------------------------------------------------


def test_average_without_warm_up_would_keep_the_start():
    for steps, share in ((1000, 0.904833), (10_000, 0.367861)):
        assert 0.9999**steps == pytest.approx(share, abs=1e-6)
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    a.weight.data[:], b.weight.data[:] = 0.0, 1.0
    kept = 1.0
    for n in range(1, 4):
        M.update_ema(a, b, 0.9999, n)
        kept *= min(0.9999, (1 + n) / (10 + n))
    assert float(1 - a.weight.detach()) == pytest.approx(kept, rel=1e-3) and kept < 0.015


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"crop": 100, "tile": 8}, "--crop 100 is not a multiple of 8, which --tile"),
        (
            {"crop": 240, "tile": 8},
            "--crop 240 is not a multiple of 32, which the network of 6 levels",
        ),
        ({"num_channels": 48}, "--num-groups 32 does not divide the width 48"),
        ({"num_head_channels": 100}, "--num-head-channels 100 does not divide"),
        (
            {"method": "ddpm", "loss": "ssim"},
            "--target eps belongs to --method ddpm with --loss mse or l1",
        ),
        ({"target": "eps"}, "--target eps belongs to --method ddpm"),
        ({"blocks": (8, 18)}, r"--blocks is \(8, 18\), this network has blocks 0 to 17"),
        ({"method": "mae", "blocks": (24,)}, "blocks 0 to 23"),
        ({"draw": "last"}, "--draw is last"),
        ({"ssim_window": 4}, "--ssim-window is 4"),
        ({"fixed_t": 1000}, "--fixed-t is 1000"),
        ({"feature_t": (50, 1000)}, "--feature-t is"),
        ({"ratio": (1.5,)}, "--ratio is"),
        ({"device": "tpu"}, "--device is tpu"),
        ({"runs": 0}, "--runs is 0"),
    ],
)
def test_flags_that_cannot_be_are_refused_by_name(flags, message):
    with pytest.raises(InputError, match=message):
        replace(PAPER, **flags)


def test_one_batch_is_overfitted():
    config = replace(TWO, steps=60, lr=3e-3, grad_clip=1.0, batch=4)
    model = M.build_model(config, 3, 3)
    optimizer, batch, losses = M.make_optimizer(config, model), batch_of(config, 4), []
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    for _ in range(40):
        optimizer.zero_grad()
        loss = M.training_loss(model, config, batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.4 and losses[-1] < 0.2, losses[-1]
