"""PatchDDM's equations, network, patches and sampler against closed forms and the specification's values."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import patchddm as P
from common import InputError
from common.old import loaders
from common.old.runtime import Ranks
from common.old.unet import load_public, public_flags

FIXTURES = (
    Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / "shared")) / "data" / "fixtures"
)
SMALL = {
    "num_channels": 4,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 4,
    "patch": (8,),
}


def times(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def x64(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1, 1), value, dtype=torch.float64)


# --- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not FIXTURES.is_dir(),
    reason="the public network's weights are not beside this checkout (SHARED_DIR)",
)
def test_network_agrees_with_the_public_one():
    z = np.load(FIXTURES / "patchddm_tiny.npz")
    state = torch.load(FIXTURES / "patchddm_tiny_checkpoint.pt", weights_only=True)
    flags = public_flags(state)
    assert flags == {
        "num_channels": 5,
        "channel_mult": (1, 3, 4),
        "num_res_blocks": 2,
        "num_groups": 5,
        "skips": "average",
    }
    model = P.build_model(P.Config(**flags), 8, 1)
    load_public(model, state)
    with torch.no_grad():
        out = model(torch.from_numpy(z["x"]), torch.from_numpy(z["t"]))
    torch.testing.assert_close(out, torch.from_numpy(z["out"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "c, mult, groups, blocks, skips, c_in, c_out, count",
    [
        (29, (1, 3, 4, 4, 4, 4, 4), 29, 2, "average", 8, 1, 24_260_299),
        (29, (1, 3, 4, 4, 4, 4, 4), 29, 2, "average", 5, 1, 24_257_950),
        (29, (1, 3, 4, 4, 4, 4, 4), 29, 2, "average", 11, 4, 24_265_000),
        (18, (1, 3, 4, 4, 4, 4, 4), 18, 2, "concat", 8, 1, 12_465_685),
        (29, (1, 3, 4, 4, 4, 4, 4), 29, 2, "concat", 8, 1, 32_331_927),
        (32, (1, 3, 4, 4, 4, 4, 4), 32, 2, "average", 8, 1, 29_535_457),
        (16, (1, 3, 4), 16, 2, "average", 7, 3, 1_993_763),
        (16, (1, 2, 4, 4), 8, 2, "average", 7, 3, 2_920_691),
        (8, (1, 2, 4), 8, 1, "average", 5, 1, 244_521),
    ],
)
def test_network_has_the_published_number_of_parameters(
    c, mult, groups, blocks, skips, c_in, c_out, count
):
    config = P.Config(
        num_channels=c, channel_mult=mult, num_groups=groups, num_res_blocks=blocks, skips=skips
    )
    with torch.device("meta"):
        model = P.build_model(config, c_in, c_out)
    assert sum(p.numel() for p in model.parameters()) == count
    state = model.state_dict()
    found = public_flags(state)
    assert found == {
        "num_channels": c,
        "channel_mult": mult,
        "num_res_blocks": blocks,
        "num_groups": c,
        "skips": skips,
    }


def test_paper_network_has_412_tensors_of_which_76_start_at_zero():
    model = P.build_model(P.Config(), 8, 1)
    state = model.state_dict()
    assert len(state) == 412
    convs = [k for k, v in state.items() if ".out_layers.3." in k or k.startswith("out.2.")]
    assert len(convs) == 76 and not any(state[k].any() for k in convs)


def test_network_starts_at_zero_and_takes_any_size_of_the_right_multiple():
    model = P.build_model(P.Config(**SMALL), 5, 1)
    for size in ((8, 8, 8), (16, 10, 12)):
        assert torch.equal(model(torch.randn(2, 5, *size), times(0, 999)), torch.zeros(2, 1, *size))


def test_recompute_gives_the_same_gradients_and_keeps_less():
    grads, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = P.build_model(P.Config(**SMALL, recompute=recompute), 5, 1).train()
        nn.init.normal_(model.out[2].weight)
        size = 0

        def count(t):
            nonlocal size
            size += t.numel()
            return t

        x = torch.randn(1, 5, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            out = model(x, times(5))
        out.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        kept.append(size)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.5 * kept[0]


# --- schedule, q, targets --------------------------------------------------------------------------------------------


def test_schedule_equals_spec_values():
    expected = {
        1: 0.9999,
        2: 0.9997800920720721,
        10: 0.9981052047858344,
        50: 0.9710157229394402,
        100: 0.89701814567496,
        250: 0.5240853738253606,
        500: 0.07858724288177824,
        750: 0.0033505504389367744,
        900: 2.7520591190339843e-4,
        950: 1.0809828163138253e-4,
        1000: 4.035829765375676e-05,
    }
    assert P.ABAR.dtype == np.float64 and len(P.ABAR) == 1001 and P.ABAR[0] == 1
    for t, value in expected.items():
        assert P.ABAR[t] == pytest.approx(value, rel=1e-12)
    assert 1 - P.ABAR[100] / P.ABAR[99] == pytest.approx(0.0020720720720720717, rel=1e-10)


def test_q_sample_equals_spec_values_and_iterated_equation_1():
    for t, value in ((1, 0.9949499987499378), (500, -0.19961707346850033)):
        assert P.q_sample(x64(1.0), x64(-0.5), times(t)).item() == pytest.approx(value, abs=1e-12)
    mean, variance = 1.0, 0.0  # equation 1, applied T times
    for t in range(1, 1001):
        beta = 1 - P.ABAR[t] / P.ABAR[t - 1]
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
    assert mean == pytest.approx(0.0063528, abs=1e-7) and variance == pytest.approx(
        0.9999596417, abs=1e-10
    )
    one, zero = x64(1.0), x64(0.0)
    assert P.q_sample(one, zero, times(1000)).item() == pytest.approx(mean, rel=1e-10)
    assert P.q_sample(zero, one, times(1000)).item() ** 2 == pytest.approx(variance, rel=1e-10)


def test_q_sample_takes_a_time_for_each_sample():
    x0, eps = torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    xt = P.q_sample(x0, eps, times(1, 1000))
    assert xt[0].mean() == pytest.approx(0.99995, abs=1e-6) and xt[1].mean() == pytest.approx(
        0.0063528, abs=1e-6
    )
    assert xt.dtype == torch.float32


def test_v_target_equals_spec_value():
    xt = P.q_sample(x64(0.7), x64(-1.2), times(400))
    assert xt.item() == pytest.approx(-0.767335889654636, abs=1e-12)
    assert P.target_of("v", x64(0.7), x64(-1.2), times(400)).item() == pytest.approx(
        -1.1581000096917053, abs=1e-12
    )


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_targets_lead_back_to_x0(kind):
    torch.manual_seed(0)
    x0, eps, t = (
        torch.rand(3, 2, 4, 4, 4, dtype=torch.float64),
        torch.randn(3, 2, 4, 4, 4, dtype=torch.float64),
        times(1, 400, 1000),
    )
    back = P.x0_of(kind, P.target_of(kind, x0, eps, t), P.q_sample(x0, eps, t), t)
    torch.testing.assert_close(back, x0, atol=1e-11, rtol=0)


def test_losses_of_the_targets_are_related_by_the_signal_to_noise_ratio():
    """An error of the mask weighs snr times as much in the eps loss and 1 + snr in the v loss."""
    torch.manual_seed(0)
    x0, eps, t = (
        torch.rand(1, 1, 6, 6, 6, dtype=torch.float64),
        torch.randn(1, 1, 6, 6, 6, dtype=torch.float64),
        times(500),
    )
    xt = P.q_sample(x0, eps, t)
    wrong = x0 + 0.1 * torch.randn_like(x0)
    a, b = P.ABAR[500] ** 0.5, (1 - P.ABAR[500]) ** 0.5
    outputs = {"x0": wrong, "eps": (xt - a * wrong) / b, "v": (a * xt - wrong) / b}
    loss = {}
    for kind, output in outputs.items():
        loss[kind] = P.diffusion_loss(lambda x, i, o=output: o, kind, xt[:, :0], x0, t, eps).item()
    snr = P.ABAR[500] / (1 - P.ABAR[500])
    assert loss["eps"] / loss["x0"] == pytest.approx(snr, rel=1e-5)
    assert loss["v"] / loss["x0"] == pytest.approx(1 + snr, rel=1e-5)


def test_loss_feeds_condition_then_mask_and_the_index():
    seen = {}

    def model(x, index):
        seen["x"], seen["index"] = x, index
        return torch.zeros(2, 1, 4, 4, 4)

    cond, x0, eps = (
        torch.randn(2, 3, 4, 4, 4),
        torch.rand(2, 1, 4, 4, 4),
        torch.randn(2, 1, 4, 4, 4),
    )
    loss = P.diffusion_loss(model, "eps", cond, x0, times(1, 1000), eps)
    assert torch.equal(seen["index"], times(0, 999))
    assert torch.equal(seen["x"][:, :3], cond)
    torch.testing.assert_close(seen["x"][:, 3:], P.q_sample(x0, eps, times(1, 1000)))
    torch.testing.assert_close(loss, eps.square().mean(dim=(1, 2, 3, 4)))


# --- sampler ---------------------------------------------------------------------------------------------------------


def test_timesteps_are_the_trailing_grid():
    assert P.timesteps(5) == [1000, 800, 600, 400, 200, 0]
    assert P.timesteps(3) == [1000, 667, 333, 0]
    assert P.timesteps(7) == [1000, 857, 714, 571, 429, 286, 143, 0]
    assert P.timesteps(64)[:5] == [1000, 984, 969, 953, 938]
    assert P.timesteps(20)[:2] == [1000, 950] and P.timesteps(20)[-2:] == [50, 0]
    assert P.timesteps(1) == [1000, 0]
    assert P.timesteps(1000) == list(range(1000, -1, -1))


def test_timesteps_of_the_public_code_end_without_a_step():
    assert [t - 1 for t in P.timesteps(5, "code")] == [999, 749, 500, 250, 0, 0]
    assert [t - 1 for t in P.timesteps(10, "code")][:3] == [999, 888, 777]
    assert [t - 1 for t in P.timesteps(20, "code")][-4:] == [105, 53, 0, 0]


def test_public_grid_leaves_a_hundredth_of_noise():
    """abar is held at 0.9999: with an oracle the result keeps 0.01 eps, and the last evaluation changes nothing."""
    torch.manual_seed(0)
    x0 = (torch.rand(1, 1, 8, 8, 8, dtype=torch.float64) > 0.5).double()

    def oracle(x, index):
        a, b = P.signal_and_noise(index + 1, x)
        return (x - a * x0) / b

    out, calls = run_sampler(oracle, 20, torch.randn_like(x0), timesteps="code")
    assert len(calls) == 20
    assert (out - x0).square().mean().sqrt().item() == pytest.approx(0.0093, abs=0.001)


@pytest.mark.parametrize(
    "t, s, cx, ce, sigma",
    [
        (1000, 950, 1.6366016158515262, -0.636622640892282, 0.7915866093839226),
        (500, 450, 1.271184226071337, -0.2858627652255261, 0.6009418261743303),
        (100, 50, 1.0404291630037665, -0.16363420245893354, 0.14645240291701128),
        (50, 0, 1.0148149789712335, -0.1727699092561702, 0.0),
    ],
)
def test_ddim_step_has_the_coefficients_of_equation_5(t, s, cx, ce, sigma):
    for xt, e in ((1.0, 0.0), (0.0, 1.0), (0.3, -0.7)):
        x0 = P.x0_of("eps", x64(e), x64(xt), times(t))
        assert P.ddim_step(x0, x64(xt), t, s, 0.0, None).item() == pytest.approx(
            cx * xt + ce * e, abs=1e-11
        )
    x0 = x64(0.5)
    noise_part = P.ddim_step(x0, x64(0.2), t, s, 1.0, x64(1.0)) - P.ddim_step(
        x0, x64(0.2), t, s, 1.0, x64(0.0)
    )
    assert noise_part.item() == pytest.approx(sigma, abs=1e-12)


def test_ddim_step_computes_eps_again_from_the_clipped_x0():
    xt = x64(0.8)
    x0 = P.x0_of("eps", x64(-0.4), xt, times(500))
    assert x0.item() == pytest.approx(4.2233917439462445, abs=1e-11)
    assert P.ddim_step(x0, xt, 500, 450, 0.0, None).item() == pytest.approx(
        1.1312924869472802, abs=1e-11
    )
    clipped = x0.clamp(-1, 1)
    assert P.ddim_step(clipped, xt, 500, 450, 0.0, None).item() == pytest.approx(
        0.8621888325531233, abs=1e-11
    )
    assert P.ddim_step(clipped, xt, 500, 450, 0.5, x64(0.3)).item() == pytest.approx(
        0.9254610277894553, abs=1e-11
    )
    inside = P.x0_of("eps", x64(0.7), xt, times(500))
    assert inside.item() == pytest.approx(0.4568414629977992, abs=1e-12)
    assert P.ddim_step(inside, xt, 500, 450, 0.0, None).item() == pytest.approx(
        0.8168434451992014, abs=1e-12
    )


def run_sampler(predict, steps, xt, **flags):
    config = P.Config(**SMALL, sampling_steps=steps, target=flags.pop("target", "eps"), **flags)
    calls = []

    def counted(x, index):
        calls.append(int(index))
        return predict(x, index)

    return P.sample(counted, xt, config, lambda: torch.randn_like(xt)), calls


@pytest.mark.parametrize("steps", [1, 5, 20, 1000])
def test_sampler_returns_the_truth_of_an_oracle(steps):
    torch.manual_seed(0)
    x0 = (torch.rand(1, 1, 3, 3, 3, dtype=torch.float64) > 0.5).double()

    def oracle(x, index):
        a, b = P.signal_and_noise(index + 1, x)
        return (x - a * x0) / b

    out, calls = run_sampler(oracle, steps, torch.randn_like(x0))
    assert len(calls) == steps and calls[0] == 999
    torch.testing.assert_close(out, x0, atol=1e-11, rtol=0)
    out, _ = run_sampler(oracle, steps, torch.randn_like(x0), sampler="ddpm")
    torch.testing.assert_close(out, x0, atol=1e-11, rtol=0)
    x0 = x0.float()
    out, _ = run_sampler(oracle, steps, torch.randn_like(x0))
    torch.testing.assert_close(out, x0, atol=5e-5 if steps == 1 else 2e-6, rtol=0)


@pytest.mark.parametrize(
    "steps, value",
    [
        (5, 0.562042376977696),
        (20, 0.7305454063828937),
        (50, 0.7705042527077284),
        (1000, 0.7975452280409517),
    ],
)
def test_ddim_converges_to_the_closed_form(steps, value):
    """Data N(0.3, 0.5^2) have an exact eps; from x_T = 1 the exact x_0 is 0.7990546302172612."""

    def exact(x, index):
        abar = P.ABAR[int(index) + 1]
        return (1 - abar) ** 0.5 * (x - 0.3 * abar**0.5) / (0.25 * abar + 1 - abar)

    out, _ = run_sampler(exact, steps, x64(1.0), clip="off")
    assert out.item() == pytest.approx(value, abs=1e-9)


def test_heun_step_equals_spec_value():
    calls = []

    def look(x, t):
        calls.append((x.item(), t))
        return P.x0_of("eps", 0.9 * x + 0.1, x, times(t))

    out = P.heun_step(look(x64(0.8), 500), x64(0.8), 500, 450, look)
    assert calls[1] == (pytest.approx(0.7825399133721382, abs=1e-12), 450)
    assert out.item() == pytest.approx(0.7847859482621712, abs=1e-11)


@pytest.mark.parametrize(
    "steps, value",
    [
        (5, 0.6192829231814944),
        (10, 0.734433466688525),
        (20, 0.7793409506264307),
        (50, 0.7947601163104451),
    ],
)
def test_heun_converges_to_the_closed_form_with_two_evaluations_a_step(steps, value):
    def exact(x, index):
        abar = P.ABAR[int(index) + 1]
        return (1 - abar) ** 0.5 * (x - 0.3 * abar**0.5) / (0.25 * abar + 1 - abar)

    out, calls = run_sampler(exact, steps, x64(1.0), clip="off", sampler="heun")
    assert out.item() == pytest.approx(value, abs=1e-9)
    assert len(calls) == 2 * steps - 1


@pytest.mark.parametrize("steps, evaluations", [(1, 1), (5, 9), (20, 39), (1000, 1999)])
def test_heun_returns_the_truth_of_an_oracle(steps, evaluations):
    torch.manual_seed(0)
    x0 = (torch.rand(1, 1, 3, 3, 3, dtype=torch.float64) > 0.5).double()

    def oracle(x, index):
        a, b = P.signal_and_noise(index + 1, x)
        return (x - a * x0) / b

    out, calls = run_sampler(oracle, steps, torch.randn_like(x0), sampler="heun")
    assert len(calls) == evaluations
    torch.testing.assert_close(out, x0, atol=1e-11, rtol=0)


def test_ddpm_samples_have_the_data_distribution():
    """eta 1 with the exact eps of N(0.3, 0.5^2) keeps mean and spread; without its noise the spread collapses."""

    def exact(x, index):
        abar = P.ABAR[int(index) + 1]
        return (1 - abar) ** 0.5 * (x - 0.3 * abar**0.5) / (0.25 * abar + 1 - abar)

    torch.manual_seed(0)
    out, _ = run_sampler(
        exact, 200, torch.randn(1, 1, 40, 40, 10, dtype=torch.float64), clip="off", sampler="ddpm"
    )
    assert out.mean().item() == pytest.approx(0.3, abs=0.02) and out.std().item() == pytest.approx(
        0.5, abs=0.03
    )


def test_clip_bounds_the_predicted_mask():
    out, _ = run_sampler(lambda x, i: torch.full_like(x, 5.0), 4, x64(0.3), target="x0")
    assert out.item() == 1.0
    for clip, low in (("unit", -1.0), ("mask", 0.0), ("off", -5.0)):
        out, _ = run_sampler(
            lambda x, i: torch.full_like(x, -5.0), 4, x64(0.3), target="x0", clip=clip
        )
        assert out.item() == low


# --- patches and coordinates -----------------------------------------------------------------------------------------


def histogram_of_starts(size, patch, kind, n=60_000):
    rng = np.random.default_rng(0)
    return (
        np.bincount(
            [P.draw_start(rng, size, patch, kind) for _ in range(n)], minlength=size - patch + 1
        )
        / n
    )


def test_patch_starts_follow_the_trapezoid_of_figure_6():
    p = histogram_of_starts(32, 16, "paper")
    half = [0.002197, 0.017578, 0.035156, 0.052734, 0.070312, 0.087646, 0.09375, 0.09375, 0.09375]
    expected = np.array(half + half[-2::-1])
    assert len(p) == 17
    assert np.abs(p - expected).max() < 5 * np.sqrt(0.094 / 60_000)


@pytest.mark.parametrize(
    "kind, variance", [("paper", 758.6017), ("code", 874.6667), ("uniform", (129**2 - 1) / 12)]
)
def test_patch_starts_have_the_variance_of_their_distribution(kind, variance):
    p = histogram_of_starts(256, 128, kind)
    s = np.arange(129)
    assert (p * s).sum() == pytest.approx(64, abs=0.6)
    assert (p * (s - 64) ** 2).sum() == pytest.approx(variance, rel=0.02)
    covered = {"paper": (0.0374, 0.5059), "code": (0.0478, 0.5052), "uniform": (0.1318, 0.5039)}[
        kind
    ]
    for voxel, probability in zip((16, 64), covered):
        assert p[: voxel + 1].sum() == pytest.approx(probability, abs=0.012)


def test_patch_of_the_whole_volume_starts_at_zero():
    rng = np.random.default_rng(0)
    assert {
        P.draw_start(rng, 16, 16, kind) for kind in ("paper", "code", "uniform") for _ in range(50)
    } == {0}


def test_coordinates_end_at_plus_minus_one_and_are_cut_with_the_patch():
    whole = P.coordinates((4, 6, 1), (0, 0, 0), (4, 6, 1))
    assert whole.shape == (3, 4, 6, 1) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[0, :, 2, 0], [-1, -1 / 3, 1 / 3, 1], atol=1e-7)
    np.testing.assert_allclose(whole[1, 3, :, 0], np.linspace(-1, 1, 6), atol=1e-7)
    assert not whole[2].any()
    np.testing.assert_array_equal(
        P.coordinates((4, 6, 1), (1, 2, 0), (2, 3, 1)), whole[:, 1:3, 2:5]
    )


def test_condition_of_a_patch_is_the_cut_of_the_whole_volumes_condition():
    image = np.random.default_rng(0).random((2, 9, 10, 7)).astype(np.float16)
    full = P.padded_shape((9, 10, 7), P.Config(**SMALL))
    assert full == (10, 10, 8)
    whole = P.condition(image, full, (0, 0, 0), full, True)
    assert whole.shape == (5, 10, 10, 8) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[:2, 0:9, :, 0:7], 2 * image.astype(np.float32) - 1)
    assert (whole[:2, 9] == -1).all() and (
        whole[:2, :, :, 7] == -1
    ).all()  # padding is background, -1 once scaled
    np.testing.assert_array_equal(
        P.condition(image, full, (2, 1, 0), (8, 8, 8), True), whole[:, 2:10, 1:9]
    )
    assert P.condition(image, full, (2, 1, 0), (8, 8, 8), False).shape == (2, 8, 8, 8)


def test_padded_shape_holds_patch_case_and_named_grid():
    config = P.Config(**SMALL)
    assert P.padded_shape((3, 8, 9), config) == (8, 8, 10)
    assert P.padded_shape((3, 8, 9), config, (16, 16, 16)) == (16, 16, 16)


def tiny_data():
    return loaders.Phantoms(0, (3, 1, 2), shape=(16, 16, 12))


def test_patches_are_a_function_of_seed_and_number():
    config = P.Config(**SMALL, seed=3)
    a, b = P.Patches(tiny_data(), config), P.Patches(tiny_data(), config)
    for n in (7, 0, 5):
        first, second = a[n], b[n]
        assert first[2] == second[2] and 1 <= first[2] <= 1000 and first[3] == n
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
        assert first[0].shape == (4, 8, 8, 8) and first[1].shape == (8, 8, 8)
    assert not np.array_equal(a[0][0], P.Patches(tiny_data(), replace(config, seed=4))[0][0])


def test_patch_image_and_label_are_cut_at_the_same_place():
    data, config = tiny_data(), P.Config(**SMALL)
    patches = P.Patches(data, config)
    for n in range(6):
        cond, cut_label, _, _ = patches[n]
        found = []
        for case in data.cases("train"):
            label, image = data.label(case), 2 * data.image(case)[0] - 1
            for start in np.ndindex(9, 9, 5):
                cut = tuple(slice(s, s + 8) for s in start)
                if np.array_equal(image[cut], cond[0]):
                    found.append(np.array_equal(label[cut], cut_label))
        assert found == [True]


# --- baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pool, expected",
    [
        ("stride", [0, 0.5, 1, 2.5, 4, 6.5, 9, 12.5, 16, 20.5, 25, 25]),
        ("mean", [0, 0.25, 0.75, 1.75, 3.25, 5.25, 7.75, 10.75, 14.25, 18.25, 22.75, 25]),
    ],
)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_doubling_equals_spec_values_on_each_axis(pool, expected, axis):
    line = torch.tensor([0.0, 1, 4, 9, 16, 25])
    shape = [1, 1, 1, 1]
    shape[axis] = 6
    repeat = [1, 2, 2, 2]
    repeat[axis] = 1
    out = P.double(line.reshape(shape).repeat(repeat), pool)
    assert out.shape == tuple(12 if i == axis else 4 if i else 1 for i in range(4))
    torch.testing.assert_close(out.movedim(axis, -1)[0, 1, 2], torch.tensor(expected))


@pytest.mark.parametrize("pool, value", [("stride", [0, 2]), ("mean", [0.5, 2.5])])
def test_halving_takes_every_second_voxel_or_the_mean(pool, value):
    image = np.broadcast_to(np.arange(4.0)[:, None, None], (1, 4, 4, 4))
    half = P.halve(image, pool)
    assert half.shape == (1, 2, 2, 2) and half[0, :, 1, 1].tolist() == value
    label = np.zeros((4, 4, 4), np.uint8)
    label[1:] = 2
    assert P.halve_label(label, pool)[:, 0, 0].tolist() == [
        0,
        2,
    ]  # of 0, 0, 0, 0, 2, 2, 2, 2 the lower value


@pytest.mark.parametrize("method, inputs, size", [("patch", 4, 8), ("full", 1, 16), ("half", 1, 8)])
def test_method_decides_inputs_and_size_of_a_sample(method, inputs, size):
    config = P.Config(**SMALL, method=method)
    cond, label, _, _ = P.Patches(tiny_data(), config)[0]
    assert cond.shape[:2] == (inputs, size) and label.shape == cond.shape[1:]
    if method == "full":
        data = tiny_data()
        order = [c for c in data.cases("train") if np.array_equal(data.label(c), label[..., :12])]
        assert len(order) == 1 and np.array_equal(
            cond[0][..., :12], 2 * data.image(order[0])[0] - 1
        )
    net = P.network_for(config, loaders.data_record(tiny_data()), torch.device("cpu"))
    assert net.input_blocks[0][0].weight.shape[1] == inputs + 3


def test_half_samples_at_half_and_returns_the_whole_grid(monkeypatch):
    config = P.Config(**SMALL, method="half", sampling_steps=2)
    data = tiny_data()
    case = data.cases("test")[0]
    net = P.Network(
        config,
        P.network_for(config, loaders.data_record(data), torch.device("cpu")),
        loaders.data_record(data),
        torch.device("cpu"),
        None,
        0,
    )
    cond, inside = P.whole_volume(data.image(case), net, None)
    assert cond.shape == (1, 8, 8, 6)
    (result,) = P.sample_ensemble(net, cond, case)
    assert result.mean.shape == (3, 16, 16, 12) and result.mean[0][inside].shape == data.shape(case)


def test_an_epoch_visits_each_case_once():
    asked = []

    class Named(loaders.Phantoms):
        def image(self, case):
            asked.append(case)
            return super().image(case)

    data = Named(0, (5, 1, 1), shape=(16, 16, 12))
    patches = P.Patches(data, P.Config(**SMALL))
    for n in range(10):
        patches[n]
    assert sorted(asked[:5]) == sorted(asked[5:]) == data.cases("train") and asked[:5] != asked[5:]


def test_shards_divide_the_global_batch():
    config = P.Config(**SMALL, batch=8, accumulate=2, steps=3)
    whole = [
        n
        for part in P.Sharded(replace(config, accumulate=1), Ranks(0, 1, 0, torch.device("cpu")), 1)
        for n in part
    ]
    assert whole == list(range(8, 24))
    shards = [list(P.Sharded(config, Ranks(r, 2, r, torch.device("cpu")), 1)) for r in (0, 1)]
    assert [len(part) for part in shards[0]] == [2, 2, 2, 2]
    assert sorted(n for shard in shards for part in shard for n in part) == whole


def test_noise_depends_on_the_samples_number_only():
    cpu = torch.device("cpu")
    both = P.noise(0, "noise", [4, 9], (2, 3, 3, 3), cpu)
    assert torch.equal(P.noise(0, "noise", [9], (2, 3, 3, 3), cpu)[0], both[1])
    assert not torch.equal(both[0], both[1]) and not torch.equal(
        P.noise(1, "noise", [4], (2, 3, 3, 3), cpu)[0], both[0]
    )


# --- masks, ensembles ------------------------------------------------------------------------------------------------


def test_masks_become_channels_and_come_back():
    label = torch.randint(0, 4, (2, 3, 4, 5))
    x0 = P.mask_to_x0(label, 4)
    assert x0.shape == (2, 4, 3, 4, 5) and torch.equal(x0.sum(dim=1), torch.ones(2, 3, 4, 5))
    assert torch.equal(P.x0_to_mask(x0[0]), label[0].to(torch.uint8))
    binary = P.mask_to_x0((label > 1), 1)
    assert torch.equal(binary[:, 0], (label > 1).float())
    assert torch.equal(
        P.x0_to_mask(torch.tensor([0.5, 0.5001])[None]), torch.tensor([0, 1], dtype=torch.uint8)
    )
    assert (
        P.x0_to_mask(torch.tensor([0.2, 0.4, 0.4])[:, None]).item() == 1
    )  # a tie goes to the lower channel


def network(config, model, classes=1):
    record = {"channels": ["a"], "classes": {f"c{i}": i for i in range(1, classes + 1)}}
    return P.Network(config, model, record, torch.device("cpu"), None, 0)


def members_of(values: list[list[float]], monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = iter(torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in values)
    monkeypatch.setattr(P, "sample", lambda *a, **k: next(outputs))
    net = network(
        P.Config(**SMALL, ensemble=len(values)), nn.Identity(), max(1, len(values[0]) - 1)
    )
    results = list(P.sample_ensemble(net, torch.zeros(3, 1, 1, 1), "case"))
    assert [r.size for r in results] == list(range(1, len(values) + 1))
    return results[-1].mean.flatten(), results[-1].variance.flatten()


def test_ensemble_mean_and_variance_equal_spec_values(monkeypatch):
    mean, variance = members_of([[0.9], [0.2], [0.6]], monkeypatch)
    assert mean.item() == pytest.approx(0.566667, abs=1e-6) and variance.item() == pytest.approx(
        0.0822222, abs=1e-6
    )
    mean, variance = members_of([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.5, 0.4]], monkeypatch)
    torch.testing.assert_close(mean, torch.tensor([0.3, 0.366667, 0.333333]), atol=1e-6, rtol=0)
    assert mean.argmax() == 1 and variance.item() == pytest.approx(0.0422222, abs=1e-6)


def test_ensemble_clips_members_to_the_range_of_a_mask(monkeypatch):
    mean, _ = members_of([[-1.0], [1.5]], monkeypatch)
    assert mean.item() == 0.5


def test_mask_range_changes_the_numbers_and_not_the_masks(monkeypatch):
    label = torch.tensor([[[[0, 1, 2]]]])
    assert torch.equal(P.mask_to_x0(label, 3, "pm1"), 2 * P.mask_to_x0(label, 3) - 1)
    monkeypatch.setattr(P, "sample", lambda *a, **k: P.mask_to_x0(label, 3, "pm1"))
    net = network(P.Config(**SMALL, mask_range="pm1"), nn.Identity(), 2)
    (result,) = P.sample_ensemble(net, torch.zeros(3, 1, 1, 3), "case")
    assert torch.equal(result.mean, P.mask_to_x0(label, 3)[0])


def test_members_depend_on_seed_case_and_number_only():
    torch.manual_seed(0)
    model = P.build_model(P.Config(**SMALL), 5, 1).eval()
    nn.init.normal_(model.out[2].weight)
    cond = torch.randn(4, 8, 8, 8)

    def members(case, n, **flags):
        config = P.Config(**SMALL, ensemble=n, sampling_steps=2, target="x0", **flags)
        return [result.member for result in P.sample_ensemble(network(config, model), cond, case)]

    three = members("a", 3)
    assert torch.equal(members("a", 1)[0], three[0]) and not torch.equal(three[0], three[1])
    assert not torch.equal(members("b", 1)[0], three[0])
    assert not torch.equal(members("a", 1, seed=1)[0], three[0])


# --- training pieces -------------------------------------------------------------------------------------------------


def test_learning_rate_is_constant_or_a_warmed_up_cosine():
    assert {P.learning_rate(P.Config(), s) for s in (0, 10, 4_000_000)} == {1e-5}
    config = P.Config(lr=1.0, lr_schedule="cosine", steps=1000)
    assert [P.learning_rate(config, s) for s in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    assert P.learning_rate(config, 510) == pytest.approx(0.5)
    assert P.learning_rate(config, 1000) == pytest.approx(0.0, abs=1e-12)


def test_ema_forgets_its_start():
    ema, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    ema.requires_grad_(False).weight.fill_(0.0)
    nn.init.constant_(model.weight, 1.0)
    P.update_ema(ema, model, 0.999, 1)
    assert ema.weight.item() == pytest.approx(1 - 2 / 11)  # d = min(0.999, 2 / 11)
    ema.weight.fill_(0.0)
    P.update_ema(ema, model, 0.9, 10_000)
    assert ema.weight.item() == pytest.approx(0.1)


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_one_batch_is_overfitted(target):
    torch.manual_seed(0)
    config = P.Config(
        num_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_groups=4,
        patch=(8,),
        target=target,
    )
    data = tiny_data()
    patches = P.Patches(data, config)
    items = [patches[n] for n in range(4)]
    cond = torch.stack([torch.from_numpy(i[0]) for i in items])
    x0 = P.mask_to_x0(torch.stack([torch.from_numpy(i[1]) for i in items]), 3)
    t = times(100, 300, 500, 700)
    eps = P.noise(0, "noise", range(4), x0.shape[1:], torch.device("cpu"))
    model = P.network_for(config, loaders.data_record(data), torch.device("cpu")).to(
        memory_format=torch.channels_last_3d
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = P.diffusion_loss(model, target, cond, x0, t, eps).mean().item()
    for _ in range(60):
        loss = P.diffusion_loss(model, target, cond, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"patch": (100,)}, "cannot be halved 6 times"),
        ({"patch": (64, 64)}, "expected N or N,N,N"),
        ({"num_groups": 7}, "does not divide the width 29"),
        (
            {"patch": (64,), "num_groups": 1, "num_channels": 1, "channel_mult": (1,) * 7},
            "one value a group",
        ),
        (
            {"num_channels": 8, "num_groups": 8, "channel_mult": (1, 1, 2), "patch": (4,)},
            "one value a group",
        ),
        ({"device": "foo"}, "--device is foo"),
        ({"timesteps": "code", "sampling_steps": 1}, "not defined for --sampling-steps 1"),
        ({"mask_range": "pm1", "clip": "mask"}, "cuts off the -1"),
        ({"sampler": "heun", "eta": 0.5}, "use --eta 0"),
        ({"skips": "concat", "channel_mult": (2, 4), "patch": (8,)}, "begin with 1"),
        ({"batch": 0}, "--batch is 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"lr": 0.0}, "above 0"),
        ({"sampling_steps": 1001}, "up to 1000"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"eta": -0.1}, "--eta is -0.1"),
    ],
)
def test_config_refuses_by_name(flags, words):
    with pytest.raises(InputError, match=words):
        P.Config(**flags)
