"""PatchDDM's equations, network, patches and sampler, against closed forms and the spec's values."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import patchddm as P
from common import InputError, loaders, runtime, unet
from common.runtime import Ranks

SHARED = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / "shared"))
FIXTURES = SHARED / "data" / "fixtures"
CPU = torch.device("cpu")
SMALL = {"num_channels": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4}
SMALL |= {"patch": (8,)}


def times(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def x64(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1, 1), value, dtype=torch.float64)


# --- network --------------------------------------------------------------------------------------


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no public weights beside this checkout")
def test_network_agrees_with_the_public_one():
    z = np.load(FIXTURES / "patchddm_tiny.npz")
    state = torch.load(FIXTURES / "patchddm_tiny_checkpoint.pt", weights_only=True)
    sizes = unet.sizes_of(state)
    names = ("num_channels", "channel_mult", "num_res_blocks", "skips")
    config = P.Config(**{name: sizes[name] for name in names}, num_groups=5)
    model = P.build_model(config, 8, 1)
    unet.load_public(model, state)
    x, t = torch.from_numpy(z["x"]), torch.from_numpy(z["t"])
    expected = torch.from_numpy(z["out"])
    torch.testing.assert_close(model(x, t), expected, atol=1e-5, rtol=0)
    with torch.no_grad():  # the lean form
        torch.testing.assert_close(model(x, t), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "c, mult, groups, blocks, skips, c_in, c_out, count",
    [
        (29, (1, 3, 4, 4, 4, 4, 4), 29, 2, "average", 8, 1, 24_260_299),
        (29, (1, 3, 4, 4, 4, 4, 4), 29, 2, "average", 11, 4, 24_265_000),
        (18, (1, 3, 4, 4, 4, 4, 4), 18, 2, "concat", 8, 1, 12_465_685),
        (29, (1, 3, 4, 4, 4, 4, 4), 29, 2, "concat", 8, 1, 32_331_927),
        (16, (1, 3, 4), 16, 2, "average", 7, 3, 1_993_763),
        (8, (1, 2, 4), 8, 1, "average", 5, 1, 244_521),
    ],
)
def test_network_has_the_published_number_of_parameters(
    c, mult, groups, blocks, skips, c_in, c_out, count
):
    with torch.device("meta"):
        model = P.UNet(c_in, c_out, c, mult, blocks, groups, skips == "average")
    assert sum(p.numel() for p in model.parameters()) == count
    assert unet.sizes_of(model.state_dict()) == {
        "in_channels": c_in,
        "out_channels": c_out,
        "num_channels": c,
        "channel_mult": mult,
        "num_res_blocks": blocks,
        "skips": skips,
    }


def test_paper_network_has_412_tensors_of_which_76_start_at_zero():
    state = P.build_model(P.Config(), 8, 1).state_dict()
    assert len(state) == 412
    zeros = [k for k in state if ".out_layers.3." in k or k.startswith("out.2.")]
    assert len(zeros) == 76 and not any(state[k].any() for k in zeros)


def random_network(**flags) -> P.UNet:
    torch.manual_seed(0)
    model = P.build_model(P.Config(**SMALL, **flags), 5, 1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("skips", ["average", "concat"])
def test_lean_sampling_equals_the_plain_forward_and_spares_its_input(skips):
    model = random_network(skips=skips)
    x = torch.randn(1, 5, 16, 12, 8)
    kept = x.clone()
    plain = model(x, times(7)).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x, times(7)), plain, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model(x, times(7)), plain, atol=1e-6, rtol=1e-6)
    assert torch.equal(x, kept)


def test_network_sees_the_time():
    model = random_network()
    x = torch.randn(1, 5, 8, 8, 8)
    assert (model(x, times(0)) - model(x, times(999))).abs().max() > 1e-4


def test_recompute_gives_the_same_gradients_and_keeps_less():
    grads, kept = [], []
    for recompute in (False, True):
        model = random_network(recompute=recompute).train()
        sizes = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        x = torch.randn(1, 5, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = model(x, times(5))
        out.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        kept.append(sum(sizes))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.5 * kept[0]


# --- schedule, q, loss ----------------------------------------------------------------------------


def test_schedule_equals_spec_values():
    expected = {1: 0.9999, 2: 0.9997800920720721, 100: 0.89701814567496, 250: 0.5240853738253606}
    expected |= {500: 0.07858724288177824, 750: 0.0033505504389367744, 1000: 4.035829765375676e-05}
    assert P.ABAR.dtype == np.float64 and len(P.ABAR) == 1001 and P.ABAR[0] == 1
    for t, value in expected.items():
        assert P.ABAR[t] == pytest.approx(value, rel=1e-12)


def test_q_sample_equals_spec_values_and_equation_1_iterated():
    for t, value in ((1, 0.9949499987499378), (500, -0.19961707346850033)):
        assert P.q_sample(x64(1.0), x64(-0.5), times(t)).item() == pytest.approx(value, abs=1e-12)
    mean, variance = 1.0, 0.0
    for t in range(1, 1001):
        beta = 1 - P.ABAR[t] / P.ABAR[t - 1]
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
    one, zero = x64(1.0), x64(0.0)
    assert P.q_sample(one, zero, times(1000)).item() == pytest.approx(mean, rel=1e-10)
    assert P.q_sample(zero, one, times(1000)).item() ** 2 == pytest.approx(variance, rel=1e-10)


def test_q_sample_takes_a_time_for_each_sample():
    xt = P.q_sample(torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2), times(1, 1000))
    assert xt.dtype == torch.float32
    assert xt[0].mean() == pytest.approx(0.99995, abs=1e-6)
    assert xt[1].mean() == pytest.approx(0.0063528, abs=1e-6)


def test_losses_of_the_targets_are_related_by_the_signal_to_noise_ratio():
    torch.manual_seed(0)
    x0 = torch.rand(1, 1, 6, 6, 6, dtype=torch.float64)
    eps = torch.randn_like(x0)
    xt = P.q_sample(x0, eps, times(500))
    wrong = x0 + 0.1 * torch.randn_like(x0)
    a, b = P.ABAR[500] ** 0.5, (1 - P.ABAR[500]) ** 0.5
    outputs = {"x0": wrong, "eps": (xt - a * wrong) / b}
    loss = {}
    for target, output in outputs.items():
        model = lambda x, i, o=output: o  # noqa: E731
        loss[target] = P.diffusion_loss(model, target, xt[:, :0], x0, times(500), eps).item()
    assert loss["eps"] / loss["x0"] == pytest.approx(P.ABAR[500] / (1 - P.ABAR[500]), rel=1e-5)


def test_loss_feeds_condition_then_mask_and_the_index():
    seen = {}

    def model(x, index):
        seen["x"], seen["index"] = x, index
        return torch.zeros(2, 1, 4, 4, 4)

    cond, x0 = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 1, 4, 4, 4)
    eps = torch.randn(2, 1, 4, 4, 4)
    loss = P.diffusion_loss(model, "eps", cond, x0, times(1, 1000), eps)
    assert torch.equal(seen["index"], times(0, 999))
    assert torch.equal(seen["x"][:, :3], cond)
    torch.testing.assert_close(seen["x"][:, 3:], P.q_sample(x0, eps, times(1, 1000)))
    torch.testing.assert_close(loss, eps.square().mean(dim=(1, 2, 3, 4)))


# --- sampler --------------------------------------------------------------------------------------


def run_sampler(f, grid, x, **options):
    """The result, and the times at which the network was evaluated."""
    calls = []

    def counted(xt, t):
        calls.append(t)
        return f(xt, t)

    return P.sample(counted, x, grid, **options), calls


def test_timesteps_are_the_trailing_grid():
    assert P.timesteps(5) == [1000, 800, 600, 400, 200, 0]
    assert P.timesteps(3) == [1000, 667, 333, 0]
    assert P.timesteps(7) == [1000, 857, 714, 571, 429, 286, 143, 0]
    assert P.timesteps(64)[:5] == [1000, 984, 969, 953, 938]
    assert P.timesteps(1) == [1000, 0]
    assert P.timesteps(1000) == list(range(1000, -1, -1))


def step(e: float, xt: float, t: int, s: int, **options) -> float:
    """x_s from x_t and a network that says e, found by watching the sampler go on from s."""
    states = {}

    def watch(time, x, x0):
        states[time] = x.item()

    P.sample(lambda x, time: torch.full_like(x, e), x64(xt), [t, s, 0], watch=watch, **options)
    return states[s]


@pytest.mark.parametrize(
    "t, s, cx, ce, sigma",
    [
        (1000, 950, 1.6366016158515262, -0.636622640892282, 0.7915866093839226),
        (500, 450, 1.271184226071337, -0.2858627652255261, 0.6009418261743303),
        (100, 50, 1.0404291630037665, -0.16363420245893354, 0.14645240291701128),
    ],
)
def test_step_has_the_coefficients_of_equation_5(t, s, cx, ce, sigma):
    a, b = P.ABAR[t] ** 0.5, (1 - P.ABAR[t]) ** 0.5
    for x0, e in ((0.5, -0.7), (-0.3, 1.2)):
        xt = a * x0 + b * e  # so x0 is not clipped
        assert step(e, xt, t, s) == pytest.approx(cx * xt + ce * e, abs=1e-11)
        drawn = torch.randn((), generator=torch.Generator().manual_seed(3)).item()
        noisy = step(e, xt, t, s, eta=1.0, generator=torch.Generator().manual_seed(3))
        direction = ((1 - P.ABAR[s]) - sigma**2) ** 0.5
        expected = P.ABAR[s] ** 0.5 * x0 + direction * e + sigma * drawn
        assert noisy == pytest.approx(expected, abs=1e-6)


def test_step_computes_eps_again_from_the_clipped_x0():
    assert step(-0.4, 0.8, 500, 450) == pytest.approx(0.8621888325531233, abs=1e-11)
    assert step(0.7, 0.8, 500, 450) == pytest.approx(0.8168434451992014, abs=1e-12)


def oracle_of(x0):
    return lambda x, t: (x - P.ABAR[t] ** 0.5 * x0) / (1 - P.ABAR[t]) ** 0.5


@pytest.mark.parametrize("steps", [1, 5, 20, 1000])
@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"heun": True}])
def test_sampler_returns_the_truth_of_an_oracle(steps, options):
    torch.manual_seed(0)
    x0 = (torch.rand(1, 1, 3, 3, 3, dtype=torch.float64) > 0.5).double()
    out, calls = run_sampler(oracle_of(x0), P.timesteps(steps), torch.randn_like(x0), **options)
    assert len(calls) == (2 * steps - 1 if "heun" in options else steps) and calls[0] == 1000
    torch.testing.assert_close(out, x0, atol=1e-11, rtol=0)
    x0 = x0.float()
    out, _ = run_sampler(oracle_of(x0), P.timesteps(steps), torch.randn_like(x0), **options)
    torch.testing.assert_close(out, x0, atol=5e-5 if steps == 1 else 2e-6, rtol=0)


def exact(x, t):
    """eps of data N(0.3, 0.5^2)."""
    abar = P.ABAR[t]
    return (1 - abar) ** 0.5 * (x - 0.3 * abar**0.5) / (0.25 * abar + 1 - abar)


@pytest.mark.parametrize(
    "steps, heun, value",
    [
        (5, False, 0.562042376977696),
        (20, False, 0.7305454063828937),
        (1000, False, 0.7975452280409517),
        (5, True, 0.6192829231814944),
        (20, True, 0.7793409506264307),
        (50, True, 0.7947601163104451),
    ],
)
def test_sampler_converges_to_the_closed_form(steps, heun, value):
    """From x_T = 1 the exact x_0 is 0.7990546302172612."""
    out, _ = run_sampler(exact, P.timesteps(steps), x64(1.0), heun=heun)
    assert out.item() == pytest.approx(value, abs=1e-9)


def test_heun_step_equals_spec_value():
    states = []
    f = lambda x, t: 0.9 * x + 0.1  # noqa: E731
    watch = lambda t, x, x0: states.append(x.item())  # noqa: E731
    P.sample(f, x64(0.8), [500, 450, 0], heun=True, watch=watch)
    assert states[1] == pytest.approx(0.7847859482621712, abs=1e-11)


def test_ddpm_samples_have_the_data_distribution():
    """Without the noise of eta 1 the spread would collapse. Data N(0, 0.2^2): no clipping."""

    def f(x, t):
        abar = P.ABAR[t]
        return (1 - abar) ** 0.5 * x / (0.04 * abar + 1 - abar)

    torch.manual_seed(0)
    x = torch.randn(1, 1, 40, 40, 10, dtype=torch.float64)
    out = P.sample(f, x, P.timesteps(200), eta=1.0, generator=torch.Generator().manual_seed(0))
    assert out.mean().item() == pytest.approx(0.0, abs=0.01)
    assert out.std().item() == pytest.approx(0.2, abs=0.02)


# --- patches and coordinates ----------------------------------------------------------------------


def test_patch_starts_follow_the_trapezoid_of_figure_6():
    rng = np.random.default_rng(0)
    starts = [P.draw_start(rng, 32, 16) for _ in range(60_000)]
    share = np.bincount(starts, minlength=17) / 60_000
    half = [0.002197, 0.017578, 0.035156, 0.052734, 0.070312, 0.087646, 0.09375, 0.09375, 0.09375]
    assert np.abs(share - np.array(half + half[-2::-1])).max() < 5 * np.sqrt(0.094 / 60_000)
    starts = np.array([P.draw_start(rng, 256, 128) for _ in range(60_000)])
    assert starts.var() == pytest.approx(758.6017, rel=0.02)
    assert {P.draw_start(rng, 16, 16) for _ in range(50)} == {0}


def test_coordinates_end_at_plus_minus_one_and_are_cut_with_the_patch():
    whole = P.coordinates((4, 6, 1), (0, 0, 0), (4, 6, 1))
    assert whole.shape == (3, 4, 6, 1) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[0, :, 2, 0], [-1, -1 / 3, 1 / 3, 1], atol=1e-7)
    np.testing.assert_allclose(whole[1, 3, :, 0], np.linspace(-1, 1, 6), atol=1e-7)
    assert not whole[2].any()
    cut = P.coordinates((4, 6, 1), (1, 2, 0), (2, 3, 1))
    np.testing.assert_array_equal(cut, whole[:, 1:3, 2:5])


def test_condition_of_a_patch_is_the_cut_of_the_whole_volumes():
    image = np.random.default_rng(0).random((2, 9, 10, 7)).astype(np.float16)
    full = P.padded_shape((9, 10, 7), 2, (8, 8, 8))
    assert full == (10, 10, 8)
    whole = P.condition(image, full, (0, 0, 0), full, True)
    assert whole.shape == (5, 10, 10, 8) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[:2, 0:9, :, 0:7], 2 * image.astype(np.float32) - 1)
    assert (whole[:2, 9] == -1).all() and (whole[:2, :, :, 7] == -1).all()  # background
    cut = P.condition(image, full, (2, 1, 0), (8, 8, 8), True)
    np.testing.assert_array_equal(cut, whole[:, 2:10, 1:9])
    assert P.condition(image, full, (2, 1, 0), (8, 8, 8), False).shape == (2, 8, 8, 8)


def test_padded_shape_holds_the_case_and_the_least_grid():
    assert P.padded_shape((3, 8, 9), 2, (8, 8, 8)) == (8, 8, 10)
    assert P.padded_shape((3, 8, 9), 4, (16, 16, 16)) == (16, 16, 16)


class Data:
    """Three random cases with the interface of a prepared data set."""

    name, channels, classes = "random", ["a"], {"one": 1, "two": 2}

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = {f"c{i}": rng.random((1, 16, 16, 12)).astype(np.float32) for i in range(3)}
        self.labels = {c: (3 * v[0]).astype(np.uint8) for c, v in self.images.items()}
        self.asked = []

    def image(self, case):
        self.asked.append(case)
        return self.images[case]

    def label(self, case):
        return self.labels[case]


RECORD = {"channels": ["a"], "classes": {"one": 1, "two": 2}, "least": [8, 8, 8]}


def patches_of(data, patch=(8, 8, 8), **options):
    return P.Patches(data, list(data.images), patch, (8, 8, 8), 2, **options)


def test_patches_are_a_function_of_seed_and_number():
    a, b = patches_of(Data(), seed=3), patches_of(Data(), seed=3)
    for n in (7, 0, 5):
        first, second = a[n], b[n]
        assert first[2:] == second[2:] and 1 <= first[2] <= 1000 and first[3] == n
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
        assert first[0].shape == (4, 8, 8, 8) and first[1].shape == (8, 8, 8)
    assert not np.array_equal(a[0][0], patches_of(Data(), seed=4)[0][0])


def test_patch_image_and_label_are_cut_at_the_same_place():
    patches = patches_of(Data())
    for n in range(6):
        cond, label, _, _ = patches[n]
        np.testing.assert_array_equal((3 * (cond[0] + 1) / 2).astype(np.uint8), label)


def test_an_epoch_visits_each_case_once():
    data = Data()
    patches = patches_of(data)
    for n in range(6):
        patches[n]
    assert sorted(data.asked[:3]) == sorted(data.asked[3:]) == list(data.images)


@pytest.mark.parametrize("half, size", [(False, (16, 16, 12)), (True, (8, 8, 6))])
def test_whole_volumes_and_halves_are_samples_too(half, size):
    cond, label, _, _ = patches_of(Data(), patch=None, coords=False, half=half)[0]
    assert cond.shape == (1, *size) and label.shape == size


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_doubling_equals_spec_values_on_each_axis(axis):
    shape, repeat = [1, 1, 1, 1], [1, 2, 2, 2]
    shape[axis], repeat[axis] = 6, 1
    out = P.double(torch.tensor([0.0, 1, 4, 9, 16, 25]).reshape(shape).repeat(repeat))
    expected = [0, 0.5, 1, 2.5, 4, 6.5, 9, 12.5, 16, 20.5, 25, 25]
    torch.testing.assert_close(out.movedim(axis, -1)[0, 1, 2], torch.tensor(expected))


# --- masks, ensembles -----------------------------------------------------------------------------


def test_masks_become_channels_and_come_back():
    label = torch.randint(0, 4, (2, 3, 4, 5))
    x0 = P.mask_to_x0(label, 4)
    assert x0.shape == (2, 4, 3, 4, 5) and torch.equal(x0.sum(dim=1), torch.ones(2, 3, 4, 5))
    assert torch.equal(P.x0_to_mask(x0[0]), label[0].to(torch.uint8))
    assert torch.equal(P.mask_to_x0(label > 1, 1)[:, 0], (label > 1).float())
    limit = torch.tensor([0.5, 0.5001])[None]
    assert P.x0_to_mask(limit).tolist() == [0, 1]
    assert P.x0_to_mask(torch.tensor([0.2, 0.4, 0.4])[:, None]).item() == 1  # the lower of equals


def network(model, classes=2, **flags) -> P.Network:
    config = P.Config(**{**SMALL, "quiet": True, **flags})
    record = {**RECORD, "classes": {f"c{i}": i for i in range(1, classes + 1)}}
    return P.Network(config, model, record, CPU, None, 0)


@pytest.mark.parametrize(
    "values, mean, variance",
    [
        ([[0.9], [0.2], [0.6]], [0.566667], 0.0822222),
        (
            [[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.5, 0.4]],
            [0.3, 0.366667, 0.333333],
            0.0422222,
        ),
        ([[-1.0], [1.5]], [0.5], 0.25),  # clipped to the range of a mask
    ],
)
def test_ensemble_mean_and_variance_equal_spec_values(monkeypatch, values, mean, variance):
    outputs = iter(torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in values)
    monkeypatch.setattr(P, "sample", lambda *a, **k: next(outputs))
    net = network(nn.Identity(), max(1, len(values[0]) - 1), ensemble=len(values))
    results = list(net.sample_ensemble(torch.zeros(3, 1, 1, 1), "case"))
    assert len(results) == len(values)
    torch.testing.assert_close(results[-1][0].flatten(), torch.tensor(mean), atol=1e-6, rtol=0)
    assert results[-1][1].item() == pytest.approx(variance, abs=1e-6)


def test_members_depend_on_seed_case_and_number_only():
    model = random_network()
    cond = torch.randn(4, 8, 8, 8)

    def members(case, n, **flags):
        net = network(model, 1, ensemble=n, sampling_steps=2, target="x0", **flags)
        return [member for _, _, member in net.sample_ensemble(cond, case)]

    three = members("a", 3)
    assert torch.equal(members("a", 1)[0], three[0]) and not torch.equal(three[0], three[1])
    assert not torch.equal(members("b", 1)[0], three[0])
    assert not torch.equal(members("a", 1, seed=1)[0], three[0])


def test_half_samples_at_half_and_returns_the_whole_grid():
    config = P.Config(**SMALL, method="half", sampling_steps=2, quiet=True)
    record = {**RECORD, "least": [16, 16, 12]}
    net = P.Network(config, P.network_for(config, record), record, CPU, None, 0)
    cond, inside = net.whole_volume(np.zeros((1, 14, 16, 11), np.float32))
    assert cond.shape == (1, 8, 8, 6)
    for mean, variance, _ in net.sample_ensemble(cond, "case"):
        assert mean[inside].shape == (3, 14, 16, 11)
        assert variance.shape == (16, 16, 12)


# --- training pieces ------------------------------------------------------------------------------


def test_learning_rate_is_constant_or_a_warmed_up_cosine():
    assert {P.learning_rate(s, 4_450_000, 1e-5, "constant") for s in (0, 10, 4_000_000)} == {1e-5}
    rate = [P.learning_rate(s, 1000, 1.0, "cosine") for s in (0, 9, 19, 510, 1000)]
    assert rate == pytest.approx([0.05, 0.5, 1.0, 0.5, 0.0])


def test_ema_forgets_its_start():
    ema, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    ema.requires_grad_(False).weight.fill_(0.0)
    nn.init.constant_(model.weight, 1.0)
    P.update_ema(ema, model, 0.999, 0)
    assert ema.weight.item() == pytest.approx(1 - 1 / 10)  # d = min(0.999, 1 / 10)
    ema.weight.fill_(0.0)
    P.update_ema(ema, model, 0.9, 10_000)
    assert ema.weight.item() == pytest.approx(0.1)
    P.update_ema(ema, model, 0.0, 5)
    assert ema.weight.item() == 1.0  # off


@pytest.mark.parametrize("target", ["x0", "eps"])
def test_one_batch_is_overfitted(target):
    torch.manual_seed(0)
    patches = patches_of(Data())
    items = [patches[n] for n in range(4)]
    cond = torch.stack([torch.from_numpy(item[0]) for item in items])
    x0 = P.mask_to_x0(torch.stack([torch.from_numpy(item[1]) for item in items]), 3)
    t = times(100, 300, 500, 700)
    eps = runtime.noise(0, "noise", range(4), x0.shape[1:], CPU)
    model = P.network_for(P.Config(**{**SMALL, "num_channels": 8}, target=target), RECORD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = P.diffusion_loss(model, target, cond, x0, t, eps).mean().item()
    for _ in range(60):
        loss = P.diffusion_loss(model, target, cond, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * first


def test_least_grid_is_the_datas_own_or_what_the_method_needs():
    shapes = [(3, 8, 9), (5, 7, 9)]
    config = P.Config(**SMALL)
    assert P.least_grid(config, {"grid": [16, 16, 16]}, shapes) == [16, 16, 16]
    assert P.least_grid(config, {}, shapes) == [8, 8, 8]
    assert P.least_grid(replace(config, method="full"), {}, shapes) == [5, 8, 9]


def test_shards_divide_the_global_batch():
    whole = [n for part in runtime.Shards(8, 1, Ranks(0, 1, CPU), 1, 3) for n in part]
    assert whole == list(range(8, 24))
    shards = [list(runtime.Shards(8, 2, Ranks(r, 2, CPU), 1, 3)) for r in (0, 1)]
    assert [len(part) for part in shards[0]] == [2, 2, 2, 2]
    assert sorted(n for shard in shards for part in shard for n in part) == whole


@pytest.mark.parametrize(
    "given, words",
    [
        ({"patch": (100,)}, "cannot be halved 6 times"),
        ({"patch": (64, 64)}, "expected N or N,N,N"),
        ({"num_groups": 7}, "does not divide --num-channels 29"),
        ({"heun": True, "eta": 0.5}, "use --eta 0"),
        ({"skips": "concat", "channel_mult": (2, 4), "patch": (8,)}, "begin with 1"),
        ({"batch": 0}, "--batch is 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"sampling_steps": 1001}, "from 1 to 1000"),
    ],
)
def test_config_refuses_by_name(given, words):
    with pytest.raises(InputError, match=words):
        P.Config(**given)


def test_predict_array_gives_publishers_values_on_the_arrays_grid():
    record = {**RECORD, "spacing": None, "orientation": "RAS", "statistics": {}, "name": "d"}
    record |= {"label_values": {"0": 0, "1": 7, "2": 9}, "normalisation": {"kind": "none"}}
    model = random_network()
    config = P.Config(**SMALL, coords="off", sampling_steps=1, target="x0", quiet=True)
    model = P.network_for(config, record)
    nn.init.constant_(model.out[2].bias, 0.0)
    model.out[2].bias.data[2] = 1.0  # class two everywhere
    mask = P.Network(config, model, record, CPU, None, 0).predict_array(
        np.zeros((9, 10, 7), np.float32), (1, 1, 2)
    )
    assert mask.shape == (9, 10, 7) and set(np.unique(mask)) == {9}
    assert loaders.scan_of_array(np.zeros((9, 10, 7)), (1, 1, 2), record).image.shape[0] == 1
