"""Recycling's equations, network, loss, augmentation and sampler: closed forms, the spec's values."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffseg3d_recycle as D
from common import InputError, loaders, metrics, synthetic, unet

CPU = torch.device("cpu")
SMALL = {"num_channels": 4, "channel_mult": (1, 2), "size": (8, 8, 8)}
RECORD = {"channels": ["a"], "classes": {"b": 1, "c": 2}, "size": [8, 8, 8]}
S5 = D.schedule(5, CPU)
X3 = (0.951140455699, -0.470983361189, -0.182889104482)
X0HAT = (0.687589468963, -0.771609601231, -0.915979867732)
C0 = [1, 0.999841040497, 0.666186088563, 0.267805255113, 0.0571890195357]
CX = [0, 1.50891586703e-04, 0.200452035338, 0.192026810696, 0.109387651521]


def vec(*values: float) -> torch.Tensor:
    """One voxel with so many channels: [1, C, 1, 1, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1, 1)


def ks(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def close(tensor: torch.Tensor, *values: float, atol: float = 1e-11) -> None:
    expected = torch.tensor(values, dtype=tensor.dtype)
    torch.testing.assert_close(tensor.flatten(), expected, atol=atol, rtol=0)


# --- schedule, q, posterior -----------------------------------------------------------------------


def test_schedule_of_five_steps_equals_spec_values():
    close(S5.abar, 1, 0.9999, 0.521423030619, 0.077796658365, 0.00335055043894, 4.03582976538e-05)
    close(S5.btilde[1:], 0, 9.99891036299e-05, 0.441521899877, 0.885452594797, 0.984684274169)
    assert S5.abar.dtype == S5.btilde.dtype == torch.float64


def test_times_are_an_even_grid_from_1_to_1000_rounded_half_up():
    assert S5.t.tolist() == [0, 1, 251, 501, 750, 1000]
    assert D.schedule(3, CPU).t.tolist() == [0, 1, 501, 1000]  # of 500.5
    assert D.schedule(1000, CPU).t.tolist() == list(range(1001))
    for K in range(2, 60):
        exact = [1 + (2 * k * 999 + K - 1) // (2 * (K - 1)) for k in range(K)]
        assert D.schedule(K, CPU).t[1:].tolist() == exact


@pytest.mark.parametrize("K", [2, 5, 50, 1000])
def test_step_of_eta_1_is_the_posterior_of_equation_1(K):
    x0, xk, z = (torch.randn(1, 3, 4, 4, 4, dtype=torch.float64) for _ in range(3))
    s = D.schedule(K, CPU)
    for k in (2, K):
        abar, before = s.abar[[k, k - 1]].tolist()
        beta = 1 - abar / before
        c0 = math.sqrt(before) * beta / (1 - abar)
        cx = math.sqrt(1 - beta) * (1 - before) / (1 - abar)
        variance = beta * (1 - before) / (1 - abar)
        if K == 5:
            assert (c0, cx) == pytest.approx((C0[k - 1], CX[k - 1]), abs=1e-11)
        got = D.ddim_step(s, x0, xk, ks(k), 1.0, z)
        expected = c0 * x0 + cx * xk + math.sqrt(variance) * z
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "k, mean, eps",
    [(2, 0.999886307973, -0.610148604219), (3, 0.726321699164, 0.0219506041425)]
    + [(4, 0.325413298322, 0.242522693769), (5, 0.0900053149921, 0.293653107642)],
)
def test_posterior_is_bayes_rule_and_equation_2_says_the_same(k, mean, eps):
    """Prior N(sqrt(abar_{k-1}) x0, 1 - abar_{k-1}), likelihood N(sqrt(alpha_k) x, beta_k)."""
    a, before = S5.abar[k], S5.abar[k - 1]
    alpha = a / before
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    bayes = (before.sqrt() / (1 - before) + alpha.sqrt() * 0.3 / (1 - alpha)) / precision
    second = (0.3 - (1 - alpha) / (1 - a).sqrt() * eps) / alpha.sqrt()  # eq. (2)
    step = D.ddim_step(S5, vec(1), vec(0.3), ks(k), 1.0, vec(0))
    close(torch.stack([bayes, second, step.flatten()[0]]), mean, mean, mean, atol=1e-8)
    assert 1 / precision.item() == pytest.approx(S5.btilde[k].item(), rel=1e-8)
    close(D.x0_of(S5, "eps", vec(eps), vec(0.3), ks(k)), 1, atol=1e-8)  # eq. (10)


def test_sampling_steps_equal_spec_values():
    x3, x0hat = vec(*X3), vec(*X0HAT)
    ddim = D.ddim_step(S5, x0hat, x3, ks(3), 0.0, vec(1, 1, 1))
    close(ddim, 1.043532991652, -0.741425231055, -0.609128489661)
    ddpm = D.ddim_step(S5, x0hat, x3, ks(3), 1.0, vec(1, 1, 1)) - 0.664471142998
    close(ddpm, 0.648720579102, -0.608445155502, -0.646873538521)


# --- loss -----------------------------------------------------------------------------------------

P4 = torch.tensor(
    [(0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.25, 0.5, 0.25), (0.6, 0.2, 0.2)], dtype=torch.float64
)


def logits_of(*samples: torch.Tensor) -> torch.Tensor:
    return torch.stack([p.log().T for p in samples]).reshape(len(samples), 3, 4, 1, 1) + 3.7


def labels(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), -1, 1, 1)


def test_loss_leaves_absent_classes_out_and_is_a_mean_over_samples():
    logits, label = logits_of(P4, P4), labels((0, 1, 1, 0), (0, 1, 2, 2))
    losses = D.segmentation_loss(logits, label)
    second = 0.893887692202 + (0.407407407407 + 0.660377358491) / 2
    close(losses, 0.743245122192, second)
    assert losses.mean().item() == pytest.approx(1.085512598671, abs=1e-11)
    close(D.segmentation_loss(logits, label, False), 0.445947824895, 0.893887692202)


def test_loss_has_finite_gradients_without_foreground_and_with_certainty():
    empty, sure = labels((0, 0, 0, 0)), labels((0, 1, 1, 0))
    close(D.segmentation_loss(logits_of(P4), empty), float(-P4[:, 0].log().mean()))
    for logits, label in ((logits_of(P4), empty), (200 * D.mask_to_x0(sure, 3), sure)):
        D.segmentation_loss(logits.requires_grad_(), label).sum().backward()
        assert logits.grad.isfinite().all()


def test_loss_of_predicted_noise_equals_spec_values():
    x3, label, output = vec(*X3), labels((0,)), vec(0.6, 0, 0)
    p = ((D.x0_of(S5, "eps", output, x3, ks(3)) + 1) / 2).clamp(1e-5, 1)
    close(p / p.sum(), 0.853127050, 8.5312705e-06, 0.146864419, atol=1e-9)
    same = D.diffusion_loss(S5, "eps", output, label, x3, output, ks(3), False)
    close(same, 0.158846798, atol=1e-9)
    eps_hat, eps = vec(-0.3, 0.3, 0.8), vec(-0.4, 0.3, 0.9)
    both = [D.diffusion_loss(S5, "eps", eps_hat, label, x3, e, ks(3)) for e in (eps, eps_hat)]
    close(both[0] - both[1], 0.1 * 0.0066666667, atol=1e-10)


# --- network --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "classes, width, mult, baseline, diffusion",
    [(9, 32, (1, 2, 4, 8), 6_681_993, 6_788_841), (16, 32, (1, 2, 4, 8), 6_682_224, 6_795_120)]
    + [(3, 12, (1, 2, 4, 8), 940_875, 955_959), (3, 24, (1, 2, 4), 974_643, 1_004_523)],
)
def test_network_has_the_spec_number_of_parameters(classes, width, mult, baseline, diffusion):
    record = {"channels": ["MR"], "classes": {str(i): i for i in range(1, classes)}}
    for method, count in (("unet", baseline), ("diffusion", diffusion)):
        config = D.Config(method=method, num_channels=width, channel_mult=mult)
        assert sum(p.numel() for p in D.network_for(config, record).parameters()) == count


def small_network(c_in=4, c_out=3, width=4, mult=(1, 2), **options) -> D.UNet:
    torch.manual_seed(0)
    return D.UNet(c_in, c_out, width, mult, **options)


def test_residual_block_is_post_activated_with_the_time_after_the_norm():
    torch.manual_seed(0)
    block = D.ResBlock(4, 16).double()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, emb = torch.randn(2, 4, 5, 6, 7).double(), torch.randn(2, 16).double()

    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def norm(v, n):
        return F.instance_norm(v, None, None, n.weight, n.bias)

    h = gelu(norm(F.conv3d(x, block.conv1.weight, padding=1), block.norm1))
    h = norm(F.conv3d(h, block.conv2.weight, padding=1), block.norm2)
    time = emb @ block.time.weight.T + block.time.bias
    torch.testing.assert_close(block(x, emb), gelu(h + time.reshape(2, 4, 1, 1, 1) + x))
    torch.testing.assert_close(block(x, None), gelu(h + x))


def test_network_adds_the_skip_of_each_level_and_halves_each_axis():
    model, t = small_network().double(), ks(251)
    x = torch.randn(1, 4, 8, 8, 8).double()
    emb = F.gelu(unet.timestep_embedding(t, 16).double(), approximate="tanh")
    a = model.first(F.gelu(model.stem(x), approximate="tanh"), emb)
    b = model.down_blocks[0](model.downs[0](a), emb)
    c = model.down_blocks[1](model.downs[1](b), emb)
    d = model.up_blocks[0](model.ups[0](c) + b, emb)
    e = model.up_blocks[1](model.ups[1](d) + a, emb)
    torch.testing.assert_close(model(x, t), model.head(e))
    assert [v.shape[1:3] for v in (a, b, c)] == [(4, 8), (4, 4), (8, 2)]


def test_baseline_looks_at_neither_x_k_nor_time():
    config = D.Config(**SMALL, method="unet")
    model = D.network_for(config, RECORD)
    x = torch.randn(2, 4, 8, 8, 8)
    other = torch.cat([x[:, :1], torch.randn(2, 3, 8, 8, 8)], dim=1)
    assert torch.equal(model(x, ks(1, 1)), model(other, ks(1000, 5)))
    assert not hasattr(model.first, "time") and config.K == 1


def test_odd_sizes_are_padded_at_the_end_and_come_back():
    model, seen = small_network(), []
    model.downs[0].register_forward_hook(lambda m, args, out: seen.append((args[0], out.shape)))
    assert model(torch.randn(1, 4, 9, 8, 11), ks(5)).shape == (1, 3, 9, 8, 11)
    padded, down = seen[0]
    assert padded.shape[2:] == (10, 8, 12) and down[2:] == (5, 4, 6)
    assert not padded[:, :, -1].any() and not padded[..., -1].any() and padded[:, :, 0].any()


def test_network_starts_as_haiku_starts():
    model = D.build_model(D.Config(), 4, 3)
    inputs = {"stem.0": 4 * 27, "ups.0": 256 * 8, "down_blocks.3.conv2": 256 * 27}
    for name, fan_in in {**inputs, "first.time": 128}.items():
        module, sd = model.get_submodule(name), fan_in**-0.5
        assert module.weight.abs().max() <= 2 * sd * 1.0001
        assert module.weight.std().item() == pytest.approx(0.8796 * sd, rel=0.06)  # cut at 2 sigma
        assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("timed", [True, False])
def test_lean_sampling_equals_the_plain_forward_and_spares_its_input(timed):
    model = small_network(timed=timed)
    x, t = torch.randn(2, 4, 9, 8, 12), ks(1, 750)
    kept, plain = x.clone(), model(x, t).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), plain, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model(x, t), plain, atol=1e-6, rtol=1e-6)
    assert torch.equal(x, kept)


# --- recycling ------------------------------------------------------------------------------------


def batch_of(*k: int) -> tuple[torch.Tensor, ...]:
    """Image, label, k and the noise of both passes, for volumes of 8^3 and three classes."""
    torch.manual_seed(1)
    label = torch.zeros(len(k), 8, 8, 8, dtype=torch.uint8)
    label[:, 2:5, 2:6, 2:6] = 1
    label[:, 5:7, 3:5, 2:6] = 2
    image = torch.rand(len(k), 1, 8, 8, 8) * 0.2 + label[:, None] / 3
    return image, label, ks(*k), *torch.randn(2, len(k), 3, 8, 8, 8).unbind(0)


class Spy:
    """A network that keeps what it was fed and answers with answer(x_k, t)."""

    def __init__(self, answer):
        self.calls, self.answer = [], answer

    def __call__(self, x, t):
        self.calls.append((x, t.tolist(), torch.is_grad_enabled()))
        return self.answer(x[:, 1:], t)


@pytest.mark.parametrize(
    "target, output, x2",
    [("x0", (2, 0, -1), (0.219788763647, -0.349638645882, -0.03881233146))]
    + [("eps", (0.6, 0, 0), (0.445379244434, -0.514558502119, 0.14913241674))],  # clipped
)
def test_second_pass_is_fed_the_recycled_mask_of_the_spec(target, output, x2):
    spy = Spy(lambda xk, t: vec(*output))
    noises = vec(-0.4, 0.3, 0.9), vec(0.7, -0.2, 0.1)
    D.recycling_loss(spy, vec(0.5), labels((0,)), ks(2), *noises, target=target)
    close(spy.calls[0][0], 0.5, *X3, atol=1e-7)  # the truth is fp32
    close(spy.calls[1][0], 0.5, *x2, atol=1e-7)
    assert [call[1:] for call in spy.calls] == [([501], False), ([251], True)]


@pytest.mark.parametrize(
    "recycle, K, k, first, second",
    [
        ("prev", 5, (1, 2, 4, 5), [251, 501, 1000, 1000], [1, 251, 750, 1000]),
        ("max", 5, (1, 2, 4, 5), [1000] * 4, [1, 251, 750, 1000]),
        ("prev", 1000, (1, 999, 1000), [2, 1000, 1000], [1, 999, 1000]),
    ],
)
def test_first_pass_sees_the_truth_the_second_its_prediction(recycle, K, k, first, second):
    image, label, k, eps, other = batch_of(*k)
    spy, s = Spy(lambda xk, t: 2 * xk + 1), D.schedule(K, CPU)
    loss = D.recycling_loss(spy, image, label, k, eps, other, K, recycle)
    (x, t, grad), (y, u, with_grad) = spy.calls
    assert (t, grad) == (first, False) and (u, with_grad) == (second, True)
    j = torch.tensor([s.t.tolist().index(v) for v in first])
    xj = D.q_sample(s, D.mask_to_x0(label, 3), other, j)
    torch.testing.assert_close(x, torch.cat([image, xj], dim=1))
    mask = 2 * (2 * xj + 1).softmax(dim=1) - 1
    torch.testing.assert_close(y, torch.cat([image, D.q_sample(s, mask, eps, k)], dim=1))
    torch.testing.assert_close(loss, D.segmentation_loss(2 * y[:, 1:] + 1, label))


def test_without_recycling_x_k_is_made_of_the_truth_in_one_pass():
    image, label, k, eps, other = batch_of(1, 5)
    spy = Spy(lambda xk, t: xk)
    D.recycling_loss(spy, image, label, k, eps, other, recycle="none")
    ((x, _, _),) = spy.calls
    torch.testing.assert_close(x[:, 1:], D.q_sample(S5, D.mask_to_x0(label, 3), eps, k))


@pytest.mark.parametrize("target", ["x0", "eps"])
def test_gradient_is_that_of_the_second_pass_with_x_k_held_fixed(target):
    model, batch = small_network(), batch_of(1, 3)
    D.recycling_loss(model, *batch, target=target).mean().backward()
    got = [p.grad.clone() for p in model.parameters()]
    assert all(grad.any() for grad in got)
    spy = Spy(lambda xk, t: model(torch.cat([batch[0], xk], dim=1), t))
    with torch.no_grad():
        D.recycling_loss(spy, *batch, target=target)
    x, k = spy.calls[-1][0], batch[2]
    model.zero_grad()
    loss = D.diffusion_loss(S5, target, model(x, S5.t[k]), batch[1], x[:, 1:], batch[3], k)
    loss.mean().backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("recycle", ["prev", "none"])
def test_one_batch_is_overfitted(recycle):
    model, batch = small_network(width=8), batch_of(1, 2, 3, 4, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        D.recycling_loss(model, *batch, recycle=recycle).mean().backward()
        optimizer.step()
    ((mean, _, _),) = network(model).sample_ensemble(batch[0][0], "case")
    mask = D.mask_of(mean).numpy()
    assert min(metrics.dice(mask == v, batch[1][0].numpy() == v) for v in (1, 2)) > 0.95


# --- sampler --------------------------------------------------------------------------------------


def noise_of(shape, dtype=torch.float64):
    """Return noise_of(k) for D.sample, and the list of the k that were asked for."""
    asked: list[int] = []

    def draw(k):
        asked.append(k)
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(k))

    return draw, asked


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampler_returns_the_truth_of_an_oracle_whatever_the_noise(eta):
    label = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    x0, shown = D.mask_to_x0(label, 3).double(), []
    draw, asked = noise_of((1, 3, 4, 4, 4))
    out = D.sample(lambda xk, t: 20 * x0, draw, 50, "x0", eta, lambda t, *_: shown.append(t))
    for j, (k, x) in zip(range(50, 0, -1), out, strict=True):
        assert j == k
        torch.testing.assert_close(x, x0, atol=1e-6, rtol=0)
    assert asked == (list(range(50, 0, -1)) if eta else [50])
    assert len(shown) == 50 and (shown[0], shown[-1]) == (1000, 1)


def test_sampler_starts_from_its_noise_and_follows_the_posterior():
    fed = []
    draw, _ = noise_of((1, 3, 4, 4, 4))
    out = list(D.sample(lambda xk, t: (fed.append(xk), 2 * xk)[1], draw))
    torch.testing.assert_close(fed[0], draw(5))
    for i, k in enumerate((5, 4, 3, 2)):
        mean = C0[k - 1] * out[i][1] + CX[k - 1] * fed[i]
        expected = mean + S5.btilde[k].sqrt() * draw(k - 1)
        torch.testing.assert_close(fed[i + 1], expected, atol=1e-8, rtol=0)


def test_predicted_noise_is_clipped_where_its_errors_count_157_times():
    assert ((1 - S5.abar[5]) / S5.abar[5]).sqrt() == pytest.approx(157.4, abs=0.05)
    assert D.x0_of(S5, "eps", vec(1.01, -0.99), vec(1, -1), ks(5)).abs().max() > 1.5
    out = D.sample(lambda xk, t: 1.01 * xk, noise_of((1, 2, 4, 4, 4))[0], target="eps")
    assert all(x0.abs().max() <= 1 for _, x0 in out)


# --- windows, members, ensembles ------------------------------------------------------------------


def network(model, config=None, **flags) -> D.Network:
    config = config or D.Config(**SMALL, quiet=True, **flags)
    record = {**RECORD, "size": list(config.size)}
    return D.Network(config, model, record, CPU, None, 0)


def test_windows_cover_the_grid_and_end_with_it():
    for n, starts in {20: [0, 4, 8, 12], 19: [0, 4, 8, 11], 8: [0]}.items():
        assert [w[0].start for w in D.windows((n, 8, 8), (8, 8, 8))] == starts
    assert len(D.windows((9, 9, 9), (8, 8, 8))) == 8


def test_weights_are_gaussian_where_an_axis_has_several_windows_and_only_there():
    w = D.gaussian((9, 17, 4), (8, 16, 4))
    assert w.shape == (8, 16, 4) and w.min() == pytest.approx(1e-3 * w.max().item(), rel=1e-5)
    assert w[4, 8, 2] == w[3, 7, 1] == w.max() and (w == w[..., :1]).all()
    ratio = math.exp(-0.5 * (1.5**2 - 0.5**2) / 1.0**2)  # sigma of an axis of 8 is 1
    assert (w[5, 8, 2] / w[4, 8, 2]).item() == pytest.approx(ratio, rel=1e-5)
    assert (D.gaussian((8, 8, 8), (8, 8, 8)) == 1).all()


@pytest.mark.parametrize("target", ["x0", "eps"])
def test_windows_give_the_weighted_mean_of_probabilities_or_noise(target):
    outputs, fed = list(torch.randn(2, 1, 3, 8, 8, 8)), []
    image, xk = torch.rand(1, 1, 12, 8, 8), torch.randn(1, 3, 12, 8, 8)

    def model(x, t):
        fed.append(x)
        return outputs[len(fed) - 1]

    got = D.in_windows(model, image, xk, ks(5), (8, 8, 8), target)
    both = torch.cat([image, xk], dim=1)
    assert torch.equal(fed[0], both[:, :, :8]) and torch.equal(fed[1], both[:, :, 4:])
    if target == "x0":
        outputs, got = [v.softmax(dim=1) for v in outputs], got.exp()
    w = D.gaussian((12, 8, 8), (8, 8, 8))
    a, b = outputs
    shared = (w[4:] * a[:, :, 4:] + w[:4] * b[:, :, :4]) / (w[4:] + w[:4])
    expected = torch.cat([a[:, :, :4], shared, b[:, :, 4:]], dim=2)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_smaller_volumes_are_padded_with_air_in_the_middle_and_cut_out_again():
    net = network(small_network(), image_range=(-2.0, 3.0))
    image = np.random.default_rng(0).random((1, 5, 8, 7)).astype(np.float16)
    padded, inside = net.whole_volume(image)
    assert padded.shape == (1, 8, 8, 8) and (padded[:, 0] == -2).all()
    spread = 5 * torch.from_numpy(image.astype(np.float32)) - 2
    torch.testing.assert_close(padded[inside], spread)


def members(net: D.Network, case: str = "a") -> list:
    image = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    return list(net.sample_ensemble(image, case))


def test_members_depend_on_seed_case_and_number_only():
    model = small_network()
    three = members(network(model, ensemble=3))
    one = members(network(model))[0]
    assert torch.equal(one[1], three[0][1]) and torch.equal(one[0], one[1])
    torch.testing.assert_close(three[2][0], sum(m[1] for m in three) / 3)  # D10
    assert not torch.equal(three[0][1], three[1][1])
    assert not torch.equal(members(network(model), "b")[0][0], one[0])
    assert not torch.equal(members(network(model, seed=1))[0][0], one[0])


def test_sample_is_the_last_step_as_probabilities_and_the_masks_of_all(monkeypatch):
    labels = torch.randint(0, 3, (5, 8, 8, 8))
    steps = [(k, D.mask_to_x0(labels[k - 1 : k], 3)) for k in (5, 4, 3, 2, 1)]
    monkeypatch.setattr(D, "sample", lambda *_: iter(steps))
    ((mean, _, masks),) = members(network(small_network()))
    torch.testing.assert_close(mean, (steps[-1][1][0] + 1) / 2, atol=1e-6, rtol=0)
    assert list(masks) == [5, 4, 3, 2, 1]
    assert all(torch.equal(masks[k].long(), labels[k - 1]) for k in masks)


def test_entropy_equals_spec_value_and_lies_between_0_and_1():
    prob = torch.tensor([[0.5, 0.25, 0.25], [1, 0, 0], [1 / 3] * 3]).T.reshape(3, 3, 1, 1)
    maps = D.maps_of(prob, RECORD)
    assert list(maps) == ["mean_background", "mean_b", "mean_c", "entropy"]
    assert maps["entropy"].ravel() == pytest.approx([0.946394630, 0, 1], abs=1e-6)


# --- augmentation ---------------------------------------------------------------------------------


def theta_of(angles, scales, shift, shape=(33, 33, 17), spacing=(1, 1, 2)) -> np.ndarray:
    """Return the theta of these numbers, which are given for the draws of each axis."""
    draws = np.array([angles, np.array(scales) - 1, np.array(shift) / np.array(shape)])
    rng = SimpleNamespace(uniform=lambda low, high, size: draws)
    return D.draw_affine(rng, np.zeros(shape), spacing, 1.0, 1.0, 1.0)


def place_of(q, theta, shape=(33, 33, 17)) -> np.ndarray:
    """Return where a voxel of the input comes to lie: theta reads the output from -1 to 1."""
    c = (np.array(shape) - 1) / 2
    source = ((np.array(q) - c) / c)[::-1]
    return np.linalg.solve(theta[:, :3], source - theta[:, 3])[::-1] * c + c


@pytest.mark.parametrize(
    "q, angles, shift, where",
    [
        ((24, 16, 8), (0, 0, math.pi / 2), (0, 0, 0), (16, 8, 8)),
        ((16, 24, 8), (math.pi / 2, 0, 0), (0, 0, 0), (16, 16, 4)),
        ((5, 6, 7), (0, 0, 0), (3, -2, 1), (8, 4, 8)),
    ],
)
def test_augmentation_moves_a_voxel_to_its_place_in_image_and_label(q, angles, shift, where):
    theta = theta_of(angles, (1, 1, 1), shift)
    np.testing.assert_allclose(place_of(q, theta), where, atol=1e-9)
    label = torch.zeros(1, 33, 33, 17, dtype=torch.uint8)
    label[(0, *q)] = 2
    image, moved = D.augment(label[:, None].float(), label, torch.from_numpy(theta)[None])
    assert moved[(0, *where)] == 2 and moved.dtype == torch.uint8
    assert image[(0, 0, *where)].item() == pytest.approx(2, abs=1e-3)


def test_turn_scaling_and_shift_together_equal_the_spec():
    theta = theta_of((0.05, -0.03, 0.088), (1.1, 0.9, 1), (3, -2, 1))
    where = (22.0950076822, 7.1436029918, 10.1267577882)
    np.testing.assert_allclose(place_of((20, 10, 9), theta), where, atol=1e-9)


def test_augmentation_reads_the_image_linearly_the_label_nearest_and_zero_outside():
    ramp = torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(1, 1, 9, 5, 5)
    label = 2 * (ramp[:, 0] > 3).to(torch.uint8)

    def moved(shift):
        theta = theta_of((0, 0, 0), (1, 1, 1), (shift, 0, 0), (9, 5, 5), (1, 1, 1))
        return D.augment(1 + ramp, label, torch.from_numpy(theta)[None])

    image, _ = moved(0.5)
    close(image[0, 0, 1:, 2, 2], *(i + 1.5 for i in range(8)), atol=1e-4)
    assert torch.equal(moved(0.3)[1], label)  # between two values there is none
    image, far = moved(4)
    assert not image[0, 0, :4].any() and not far[0, :4].any() and (far[0, 8:] == 2).all()


def test_drawn_affines_keep_the_foreground_inside_and_use_the_whole_range():
    rng, shape = np.random.default_rng(0), (32, 24, 16)
    label = np.zeros(shape, np.uint8)
    label[10:21, 9:14, 3:9] = 1
    corners = np.array(np.meshgrid([10, 20], [9, 13], [3, 8])).reshape(3, -1).T
    shifts = []
    for _ in range(300):
        theta = D.draw_affine(rng, label, (1, 1, 2.5), shift=0.4)
        there = np.array([place_of(q, theta, shape) for q in corners])
        assert (there > -1e-9).all() and (there < np.array(shape) - 1 + 1e-9).all()
        shifts.append(there.mean(axis=0) - (15, 11, 5.5))
    assert (np.ptp(shifts, axis=0) > (12, 10, 6)).all()
    still = [D.draw_affine(rng, 0 * label, (1, 1, 1), 0, 0)[::-1, 3] for _ in range(200)]
    most = np.abs(still).max(axis=0) * (np.array(shape) - 1) / 2  # voxels; 8 % of each axis
    assert (most <= (3, 2, 1)).all() and (most > (2.8, 1.8, 0.9)).all()


def test_a_foreground_too_large_to_stay_inside_is_centred():
    theta = D.draw_affine(np.random.default_rng(0), np.ones((9, 9, 9)), (1, 1, 1), 0.0, 0.0, 0.3)
    np.testing.assert_allclose(theta, np.eye(3, 4), atol=1e-12)


# --- data, learning rate, flags -------------------------------------------------------------------


def volumes(size=(16, 16, 12), shape=(16, 16, 12), **options) -> D.Volumes:
    meta, _ = synthetic.volumes()
    drawn = {case: synthetic.phantom(0, n, shape) for n, case in enumerate(("a", "b", "c"))}
    facts = {**meta["cases"]["phantom_0000"], "shape": list(shape)}
    meta = {**meta, "cases": dict.fromkeys(drawn, facts)}
    data = loaders.Prepared(meta, lambda case, name: drawn[case][name == "label"])
    return D.Volumes(data, list(drawn), size, **options)


def test_volumes_are_a_function_of_seed_and_number_and_visit_each_case_once():
    a, b = volumes(seed=3), volumes(seed=3)
    for n in (7, 0, 5):
        for first, second in zip(a[n], b[n]):
            np.testing.assert_array_equal(first, second)
    assert not np.array_equal(a[0][2], volumes(seed=4)[0][2])
    assert {a[n][3] for n in range(60)} == {1, 2, 3, 4, 5}
    assert len({a[n][0].tobytes() for n in (3, 4, 5)}) == 3
    assert np.array_equal(volumes(augmented=False)[0][2], np.eye(3, 4))


def test_volumes_are_padded_in_the_middle_or_cut_at_random_with_their_label():
    image, label, *_ = volumes((20, 16, 16))[0]
    whole = {n: volumes(augmented=False)[n] for n in range(3)}
    assert not image[:, :2].any() and not image[:, 18:].any() and not image[..., 14:].any()
    assert any(np.array_equal(image[:, 2:18, :, 2:14], w[0]) for w in whole.values())
    places = set()
    for image, label, *_ in (volumes((8, 16, 12))[n] for n in range(12)):
        for n, start in np.ndindex(3, 9):
            if np.array_equal(whole[n][0][:, start : start + 8], image):
                assert np.array_equal(whole[n][1][start : start + 8], label)
                places.add(start)
    assert len(places) > 4


def test_training_size_is_given_or_the_datas_own_or_holds_each_case():
    config = D.Config(**{**SMALL, "size": ()})
    shapes = [(9, 16, 13), (7, 3, 15)]
    assert D.training_size(config, {}, shapes) == [12, 16, 16]
    assert D.training_size(config, {"grid": [20, 20, 20]}, shapes) == [20, 20, 20]
    assert D.training_size(D.Config(**SMALL), {"grid": [20] * 3}, shapes) == [8, 8, 8]
    with pytest.raises(InputError, match="leave one at the lowest level"):
        D.training_size(replace(config, size=(4, 4, 4)), {}, shapes)


def test_learning_rate_equals_spec_values():
    expected = {0: 1e-5, 50: 5.5e-5, 100: 1e-4, 2575: 8.55017857e-5, 5050: 5.05e-5, 12499: 1e-6}
    for step, value in expected.items():
        assert D.learning_rate(step, 12_500, 1e-4, 10_000) == pytest.approx(value, rel=1e-8)
    assert D.learning_rate(2000, 2000, 1e-3, 0) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"size": (64, 64)}, "--size is X,Y,Z"),
        ({"train_K": 1}, "--train-K is 1"),
        ({"method": "unet", "target": "eps"}, "no noise to predict"),
        ({"sampling_steps": 4}, "levels of the training are 5"),
        ({"sampling_steps": 1, "train_K": 1000}, "--sampling-steps is 1"),
    ],
)
def test_config_refuses_by_name(flags, words):
    with pytest.raises(InputError, match=words):
        D.Config(**flags)
    assert [D.Config(train_K=K).K for K in (5, 9, 1000)] == [5, 9, 5]
