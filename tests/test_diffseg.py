"""diffseg3d_recycle.py: equations, network, recycling, loss, augmentation and sampler against the specification."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffseg3d_recycle as D
from common import InputError
from common.old import loaders
from common.old.runtime import Ranks
from common.old.unet import timestep_embedding

CPU = torch.device("cpu")
SMALL = {"num_channels": 4, "channel_mult": (1, 2), "size": (8, 8, 8)}
S5 = D.schedule(5, "paper", CPU)
X3 = (0.951140455699, -0.470983361189, -0.182889104482)
X0HAT = (0.687589468963, -0.771609601231, -0.915979867732)


def vec(*values: float) -> torch.Tensor:
    """One voxel with so many channels: [1, C, 1, 1, 1] float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1, 1)


def ks(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def close(tensor: torch.Tensor, *values: float, atol: float = 1e-11) -> None:
    torch.testing.assert_close(
        tensor.flatten(), torch.tensor(values, dtype=tensor.dtype), atol=atol, rtol=0
    )


# --- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, values",
    [
        ("abar", [0.9999, 0.521423030619, 0.077796658365, 0.00335055043894, 4.03582976538e-05]),
        ("beta", [1e-4, 0.478524821864, 0.850799343725, 0.956931949143, 0.98795472613]),
        ("btilde", [0, 9.99891036299e-05, 0.441521899877, 0.885452594797, 0.984684274169]),
        ("c0", [1, 0.999841040497, 0.666186088563, 0.267805255113, 0.0571890195357]),
        ("cx", [0, 1.50891586703e-04, 0.200452035338, 0.192026810696, 0.109387651521]),
    ],
)
def test_schedule_of_five_steps_equals_spec_values(name, values):
    table = getattr(S5, name)
    assert table.dtype == torch.float64 and len(table) == 6
    close(table[1:], *values)
    assert S5.abar[0] == 1


def test_times_are_an_even_grid_from_1_to_1000_rounded_half_up():
    assert S5.t.tolist() == [0, 1, 251, 501, 750, 1000]
    assert D.schedule(2, "paper", CPU).t.tolist() == [0, 1, 1000]
    assert D.schedule(3, "paper", CPU).t.tolist() == [0, 1, 501, 1000]  # 500.5
    full = D.schedule(1000, "paper", CPU)
    assert full.t.tolist() == list(range(1001))
    close(full.beta[[1, 2, 1000]], 1e-4, 1e-4 + 0.0199 / 999, 0.02)
    for steps in range(2, 60):
        t = D.schedule(steps, "paper", CPU).t[1:]
        exact = 1 + np.arange(steps) * 999 / (steps - 1)
        assert t[0] == 1 and t[-1] == 1000 and np.abs(t.numpy() - exact).max() <= 0.5


def test_schedule_of_the_public_code_has_four_levels_and_repeats_the_last():
    s = D.schedule(5, "code-v1", CPU)
    levels = [0.2961078033, 0.03926840253, 0.002324734489, 6.123814792e-05]
    close(s.abar, 1, *levels, levels[-1], atol=1e-10)
    assert s.beta[5] == 0 and s.btilde[5] == 0 and s.c0[1] == 1
    assert all(torch.isfinite(v).all() for v in (s.beta, s.btilde, s.c0, s.cx))


def test_one_voxel_of_x_k_tells_the_truth_as_often_as_the_spec_says():
    """Why recycling: at k = 1, 2 the mask shines through the noise."""
    signal = (S5.abar / (1 - S5.abar)).sqrt()[1:]
    close(torch.special.ndtr(signal), 1.0, 0.852, 0.614, 0.523, 0.503, atol=6e-4)
    close(torch.special.ndtr(math.sqrt(27) * signal), 1.0, 1.0, 0.934, 0.618, 0.513, atol=6e-4)


# --- q and posterior -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, value", [(1, 0.99494999875), (2, 0.376199986749), (5, -0.493637092236)]
)
def test_q_sample_equals_spec_values(k, value):
    close(D.q_sample(S5, vec(1), vec(-0.5), ks(k)), value)


def test_q_sample_takes_a_step_for_each_sample_and_keeps_fp32():
    xk = D.q_sample(S5, torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2), ks(1, 5))
    assert xk.dtype == torch.float32
    assert xk[0].mean() == pytest.approx(0.99995) and xk[1].mean() == pytest.approx(
        0.00635281808757
    )


@pytest.mark.parametrize(
    "k, mean, variance, eps",
    [
        (2, 0.999886307973, 9.99891036e-05, -0.610148604219),
        (3, 0.726321699164, 0.441521899877, 0.0219506041425),
        (4, 0.325413298322, 0.885452594797, 0.242522693769),
        (5, 0.0900053149921, 0.984684274169, 0.293653107642),
    ],
)
def test_posterior_is_bayes_rule_and_both_forms_of_the_mean_agree(k, mean, variance, eps):
    """Prior N(sqrt(abar_{k-1}) x0, 1 - abar_{k-1}), likelihood N(sqrt(alpha_k) x, beta_k), x0 = 1, x_k = 0.3."""
    a, beta, before = S5.abar[k], S5.beta[k], S5.abar[k - 1]
    precision = 1 / (1 - before) + (1 - beta) / beta
    bayes = (before.sqrt() / (1 - before) + (1 - beta).sqrt() * 0.3 / beta) / precision
    assert bayes.item() == pytest.approx(mean, abs=1e-10) and 1 / precision.item() == pytest.approx(
        variance, rel=1e-8
    )
    close(D.posterior_mean(S5, vec(1), vec(0.3), ks(k)), mean)
    assert S5.btilde[k].item() == pytest.approx(variance, rel=1e-8)
    second = (0.3 - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()  # eq. (2)
    assert second.item() == pytest.approx(mean, abs=1e-9)
    x0 = D.x0_of(S5, "eps", vec(eps), vec(0.3), ks(k))
    close(x0, 1, atol=1e-8)
    close(D.posterior_mean(S5, x0, vec(0.3), ks(k)), second.item(), atol=1e-9)


def test_recycling_a_mask_equals_spec_values():
    x3 = D.q_sample(S5, vec(1, -1, -1), vec(0.7, -0.2, 0.1), ks(3))
    close(x3, *X3)
    x0hat = D.x0_of(S5, "x0", vec(2, 0, -1), x3, ks(3))
    close((x0hat + 1) / 2, 0.843794734481, 0.114195199385, 0.042010066134)
    close(x0hat, *X0HAT)
    close(
        D.q_sample(S5, x0hat, vec(-0.4, 0.3, 0.9), ks(2)),
        0.219788763647,
        -0.349638645882,
        -0.03881233146,
    )


def test_recycling_noise_equals_spec_values():
    output, eps = vec(0.6, 0, 0), vec(-0.4, 0.3, 0.9)
    for clip, x0hat, x2 in (
        ("on", (1, -1, -0.655703288747), (0.445379244434, -0.514558502119, 0.14913241674)),
        (
            "off",
            (1.344296711253, -1.688593422505, -0.655703288747),
            (0.693994617184, -1.011789247618, 0.14913241674),
        ),
    ):
        got = D.x0hat_of(D.Config(target="eps", clip_x0=clip), S5, output, vec(*X3), ks(3))
        close(got, *x0hat)
        close(D.q_sample(S5, got, eps, ks(2)), *x2)


# --- sampling steps --------------------------------------------------------------------------------------------------


def test_ddpm_step_equals_spec_values():
    x3, x0hat, zero, one = vec(*X3), vec(*X0HAT), vec(0, 0, 0), vec(1, 1, 1)
    mean = D.ddpm_step(S5, x0hat, x3, ks(3), "small", zero)
    close(mean, 0.648720579102, -0.608445155502, -0.646873538521)
    for variance, sd in (("small", 0.664471142998), ("large", 0.922387848860)):
        close(D.ddpm_step(S5, x0hat, x3, ks(3), variance, one) - mean, sd, sd, sd)


def test_ddim_step_equals_spec_values_and_with_eta_1_is_ddpm():
    x3, x0hat, zero = vec(*X3), vec(*X0HAT), vec(0, 0, 0)
    x2 = (1.043532991652, -0.741425231055, -0.609128489661)
    close(D.ddim_step(S5, x0hat, x3, ks(3), 0.0, zero), *x2)
    e = (0.790738749697, -0.26633534138, 0.075596591683)
    close(D.q_sample(S5, x0hat, vec(*e), ks(2)), *x2)
    z = vec(0.3, -1, 2)
    torch.testing.assert_close(
        D.ddim_step(S5, x0hat, x3, ks(3), 1.0, z),
        D.ddpm_step(S5, x0hat, x3, ks(3), "small", z),
        atol=1e-12,
        rtol=0,
    )


# --- loss ------------------------------------------------------------------------------------------------------------

P4 = torch.tensor(
    [(0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.25, 0.5, 0.25), (0.6, 0.2, 0.2)], dtype=torch.float64
)


def logits_of(*samples: torch.Tensor) -> torch.Tensor:
    return torch.stack([p.log().T for p in samples]).reshape(len(samples), 3, 4, 1, 1) + 3.7


def labels(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), -1, 1, 1)


def test_loss_leaves_absent_classes_out_and_is_a_mean_over_samples():
    losses = D.segmentation_loss(logits_of(P4, P4), labels((0, 1, 1, 0), (0, 1, 2, 2)), True)
    second = 0.893887692202 + (0.407407407407 + 0.660377358491) / 2
    close(losses, 0.743245122192, second)
    assert losses.mean().item() == pytest.approx(1.085512598671, abs=1e-11)
    close(
        D.segmentation_loss(logits_of(P4, P4), labels((0, 1, 1, 0), (0, 1, 2, 2)), False),
        0.445947824895,
        second - 0.533892382949,
    )


def test_loss_of_a_volume_without_foreground_is_finite_and_counts():
    logits = logits_of(P4).requires_grad_()
    loss = D.segmentation_loss(logits, labels((0, 0, 0, 0)), True)
    close(loss.detach(), float(-P4[:, 0].log().mean()))
    loss.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


def test_loss_of_a_certain_network_has_finite_gradients():
    logits = (
        200 * D.mask_to_x0(labels((0, 1, 1, 0)), 3)
    ).requires_grad_()  # class 2 has no probability at all
    D.segmentation_loss(logits, labels((0, 1, 1, 0)), True).sum().backward()
    assert logits.grad.isfinite().all()


def test_loss_of_predicted_noise_equals_spec_values():
    config = D.Config(target="eps", dice="off")
    x3, label = vec(*X3), labels((0,))
    p = ((D.x0_of(S5, "eps", vec(0.6, 0, 0), x3, ks(3)) + 1) / 2).clamp(1e-5, 1)
    close(p / p.sum(), 0.853127050, 8.5312705e-06, 0.146864419, atol=1e-9)
    same = vec(0.6, 0, 0)
    close(D.diffusion_loss(config, S5, same, label, x3, same, ks(3)), 0.158846798, atol=1e-9)
    wrong = D.diffusion_loss(config, S5, same, label, x3, same + vec(0.1, 0, -0.1), ks(3))
    close(wrong, 0.158846798 + 0.1 * 0.02 / 3, atol=1e-9)
    eps_hat, eps = vec(-0.3, 0.3, 0.8), vec(-0.4, 0.3, 0.9)
    both = [D.diffusion_loss(config, S5, eps_hat, label, x3, e, ks(3)) for e in (eps, eps_hat)]
    close(both[0] - both[1], 0.1 * 0.0066666667, atol=1e-10)


# --- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [{"dims": 2, "method": "unet"}, {"dims": 2}, {"method": "unet"}, {}], ids=str
)
@pytest.mark.parametrize(
    "classes, counts",
    [
        (9, (2_347_849, 2_449_513, 6_681_993, 6_788_841, 2_452_105, 6_796_617)),
        (16, (2_348_080, 2_451_760, 6_682_224, 6_795_120, 2_456_368, 6_808_944)),
        (3, (2_347_651, 2_447_587, 6_681_795, 6_783_459, 2_448_451, 6_786_051)),
    ],
)
def test_network_has_the_number_of_parameters_of_the_spec(flags, classes, counts):
    record = {"channels": ["MR"], "classes": {str(i): i for i in range(1, classes)}}
    with torch.device("meta"):
        model = D.network_for(D.Config(**flags), record)
        conditioned = D.network_for(D.Config(**flags, recycle="self-condition"), record)
    three, diffusion = flags.get("dims", 3) == 3, "method" not in flags
    assert sum(p.numel() for p in model.parameters()) == counts[2 * three + diffusion]
    if diffusion:
        assert sum(p.numel() for p in conditioned.parameters()) == counts[4 + three]
        assert sum(p.numel() for k, p in model.named_parameters() if ".time." in k) == 99_072


@pytest.mark.parametrize(
    "c, mult, unet, diffusion",
    [(12, (1, 2, 4, 8), 940_875, 955_959), (24, (1, 2, 4), 974_643, 1_004_523)],
)
def test_small_networks_have_the_number_of_parameters_of_the_spec(c, mult, unet, diffusion):
    for method, count in (("unet", unet), ("diffusion", diffusion)):
        config = D.Config(num_channels=c, channel_mult=mult, method=method)
        model = D.network_for(config, {"channels": ["MR"], "classes": {"a": 1, "b": 2}})
        assert sum(p.numel() for p in model.parameters()) == count


def small_model(c_in=4, c_out=3, **flags):
    torch.manual_seed(0)
    return D.build_model(D.Config(**SMALL | flags), c_in, c_out)


@pytest.mark.parametrize("dims", [2, 3])
def test_residual_block_is_post_activated_with_the_time_after_the_norm(dims):
    torch.manual_seed(0)
    block = D.ResBlock(D.Config(**SMALL, dims=dims), 4).double()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, emb = (
        torch.randn(2, 4, *(5, 6, 7)[:dims], dtype=torch.float64),
        torch.randn(2, 16, dtype=torch.float64),
    )
    conv = {2: F.conv2d, 3: F.conv3d}[dims]

    def gelu(v):
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    h = gelu(
        F.instance_norm(
            conv(x, block.conv1.weight, padding=1), None, None, block.norm1.weight, block.norm1.bias
        )
    )
    h = F.instance_norm(
        conv(h, block.conv2.weight, padding=1), None, None, block.norm2.weight, block.norm2.bias
    )
    b = gelu(emb) @ block.time.weight.T + block.time.bias
    torch.testing.assert_close(block(x, emb), gelu(h + b.reshape(2, 4, *(1,) * dims) + x))
    torch.testing.assert_close(block(x, None), gelu(h + x))


def test_network_adds_the_skip_of_each_level():
    model, t = small_model().double(), ks(251)
    x = torch.randn(1, 4, 8, 8, 8, dtype=torch.float64)
    emb = timestep_embedding(t, 16).double()
    a = model.first(model.stem(x), emb)
    b = model.down_blocks[0](model.downs[0](a), emb)
    c = model.down_blocks[1](model.downs[1](b), emb)
    d = model.up_blocks[0](model.ups[0](c) + b, emb)
    torch.testing.assert_close(
        model(x, t), model.head(model.up_blocks[1](model.ups[1](d) + a, emb))
    )
    assert [v.shape[1:3] for v in (a, b, c)] == [(4, 8), (4, 4), (8, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_moves_the_output_and_before_the_norm_provably_does_not(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 16, 16, 16, dtype=dtype)
    moved, learnt = {}, {}
    for where in ("post-norm", "pre-norm"):
        model = small_model(
            num_channels=8, channel_mult=(1, 2, 4), time_inject=where, size=(16,) * 3
        ).to(dtype)
        outputs = [model(x, ks(t)) for t in (1, 1000)]
        moved[where] = (outputs[0] - outputs[1]).abs().max().item()
        outputs[0].square().mean().backward()
        learnt[where] = max(
            p.grad.abs().max().item() for k, p in model.named_parameters() if ".time." in k
        )
    assert moved["post-norm"] > 1e-2 and moved["pre-norm"] < (
        1e-5 if dtype == torch.float32 else 1e-12
    )
    assert learnt["post-norm"] > 1e-4 and learnt["pre-norm"] < (
        1e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize(
    "t, values",
    [
        (1, (0.540302305868, 0.647905872267, 0.841470984808, 1.154781982e-04)),
        (251, (0.94687770542, -0.832521786844, -0.321593860293, 0.028980969445)),
    ],
)
def test_time_embedding_has_the_cosines_first(t, values, monkeypatch):
    e = timestep_embedding(ks(t), 128)[0]
    close(e[[0, 1, 64, 127]], *values, atol=1e-4 if t > 1 else 1e-6)
    asked = []
    monkeypatch.setattr(
        D, "timestep_embedding", lambda t, d: (asked.append((t, d)), timestep_embedding(t, d))[1]
    )
    with torch.no_grad():
        small_model(num_channels=8)(torch.randn(1, 4, 8, 8, 8), ks(t))
    assert [(v.tolist(), d) for v, d in asked] == [([t], 32)]


def test_image_is_spread_over_its_range_and_nothing_else_is():
    model = D.build_model(D.Config(**SMALL), 3, 2)
    image, xk, t = torch.rand(2, 1, 8, 8, 8), torch.randn(2, 2, 8, 8, 8), torch.tensor([1, 1000])
    plain, spread = D.caller(model, None), D.caller(model, None, (-2.5, 2.5))
    assert torch.equal(plain(image, xk, t), model(torch.cat([image, xk], 1), t))
    assert torch.equal(spread(image, xk, t), model(torch.cat([5 * image - 2.5, xk], 1), t))


def test_slices_go_through_the_2d_network_one_by_one():
    model = small_model(dims=2).double()
    x, t = torch.randn(2, 4, 8, 12, 3, dtype=torch.float64), ks(1, 750)
    out = model(x, t)
    assert out.shape == (2, 3, 8, 12, 3)
    for b in range(2):
        for z in range(3):
            torch.testing.assert_close(out[b, ..., z], model(x[b : b + 1, ..., z], t[b : b + 1])[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_odd_sizes_are_padded_at_the_end_and_come_back(dims):
    model, seen = small_model(dims=dims), []
    model.downs[0].register_forward_hook(lambda m, args, out: seen.append((args[0], out.shape)))
    size = (9, 8, 11)[:dims]
    x = torch.randn(1, 4, *size)
    assert model(x, ks(5)).shape == (1, 3, *size)
    padded, down = seen[0]
    assert padded.shape[2:] == (10, 8, 12)[:dims] and down[2:] == (5, 4, 6)[:dims]
    assert (
        not padded[:, :, -1].any() and padded[:, :, 0].any() and not padded[..., -1].any()
    ) or dims == 2


def test_network_starts_as_haiku_starts():
    model = D.build_model(D.Config(), 4, 3)
    for name, fan_in in (
        ("stem.0", 4 * 27),
        ("ups.0", 256 * 8),
        ("down_blocks.3.conv2", 256 * 27),
        ("first.time", 128),
    ):
        module = model.get_submodule(name)
        sd = fan_in**-0.5
        assert module.weight.abs().max() <= 2 * sd * 1.0001
        assert module.weight.std().item() == pytest.approx(
            0.8796 * sd, rel=0.06
        )  # of a normal cut at 2 sigma
        assert module.bias is None or not module.bias.any()
    assert all(p.any() for k, p in model.named_parameters() if k.endswith("weight"))


def test_recompute_gives_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = small_model(recompute=recompute).train()
        model(torch.ones(2, 4, 8, 8, 8).cumsum(2), ks(1, 750)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


# --- recycling -------------------------------------------------------------------------------------------------------


def batch_of(k: tuple[int, ...], coin: tuple[bool, ...] = (), size: int = 8) -> D.Batch:
    torch.manual_seed(1)
    n = len(k)
    label = torch.zeros(n, size, size, size, dtype=torch.uint8)
    label[:, 2:5, 2:6, 2:6], label[:, 5:7, 3:5, 2:6] = 1, 2
    image = torch.rand(n, 1, size, size, size) * 0.2 + label[:, None] / 3
    eye = torch.eye(3, 4).expand(n, 3, 4)
    return D.Batch(image, label, eye, ks(*k), torch.tensor(coin or (False,) * n), torch.arange(n))


def draw_for(batch: D.Batch):
    return lambda name: D.noise(0, name, batch.n.tolist(), (3, *batch.label.shape[1:]), CPU)


class Spy:
    """A network call that keeps its arguments and answers with `answer(image, xk, t, prev)`."""

    def __init__(self, answer):
        self.calls, self.answer = [], answer

    def __call__(self, image, xk, t, prev=None):
        self.calls.append((xk, t, prev, torch.is_grad_enabled()))
        return self.answer(image, xk, t, prev)


def ignorant(image, xk, t, prev):
    return torch.zeros_like(xk, requires_grad=True)


def oracle_of(batch: D.Batch, target: str, s: D.Schedule = S5):
    """Logits of +-20, or the noise that leads from the truth to x_k."""
    x0 = D.mask_to_x0(batch.label, 3)

    def answer(image, xk, t, prev):
        if target == "x0":
            return 20 * x0
        k = torch.stack([(s.t == v).nonzero()[0, 0] for v in t])
        return (xk - D.at(s.abar.sqrt(), k, xk) * x0) / D.at((1 - s.abar).sqrt(), k, xk)

    return answer


@pytest.mark.parametrize("recycle, first", [("prev", (2, 3, 5, 5)), ("max", (5, 5, 5, 5))])
def test_first_pass_sees_the_truth_at_its_own_level_and_the_second_its_prediction(recycle, first):
    batch, draw = batch_of((1, 2, 4, 5)), None
    draw, x0 = draw_for(batch), D.mask_to_x0(batch.label, 3)
    look, f = Spy(lambda image, xk, t, prev: 2 * xk + 1), Spy(ignorant)
    ((loss, t),) = D.training_losses(f, look, D.Config(recycle=recycle), batch, draw)
    xj, tj, prev, with_gradient = look.calls[0]
    assert len(look.calls) == len(f.calls) == 1 and not with_gradient and prev is None
    assert tj.tolist() == S5.t[list(first)].tolist() and t.tolist() == [1, 251, 750, 1000]
    torch.testing.assert_close(xj, D.q_sample(S5, x0, draw("eps of the first pass"), ks(*first)))
    x0hat = 2 * (2 * xj + 1).softmax(dim=1) - 1
    torch.testing.assert_close(f.calls[0][0], D.q_sample(S5, x0hat, draw("eps"), batch.k))
    assert f.calls[0][1].tolist() == t.tolist() and f.calls[0][3]
    assert not torch.equal(draw("eps"), draw("eps of the first pass")) and loss.shape == (4,)


def test_without_recycling_x_k_is_made_of_the_truth():
    batch = batch_of((1, 5))
    look, f = Spy(ignorant), Spy(ignorant)
    list(D.training_losses(f, look, D.Config(recycle="none"), batch, draw_for(batch)))
    x0 = D.mask_to_x0(batch.label, 3)
    assert not look.calls
    torch.testing.assert_close(f.calls[0][0], D.q_sample(S5, x0, draw_for(batch)("eps"), batch.k))


def test_recycling_from_1000_levels_steps_by_one():
    batch = batch_of((1, 999, 1000))
    look = Spy(ignorant)
    list(D.training_losses(Spy(ignorant), look, D.Config(train_K=1000), batch, draw_for(batch)))
    assert look.calls[0][1].tolist() == [2, 1000, 1000]


@pytest.mark.parametrize("target", ["x0", "eps"])
def test_with_an_oracle_recycling_changes_nothing(target):
    batch = batch_of((1, 2, 3, 4, 5))
    config, seen = D.Config(target=target), {}
    for recycle in ("prev", "max", "none"):
        f = Spy(oracle_of(batch, target))
        ((loss, _),) = D.training_losses(
            f,
            Spy(oracle_of(batch, target)),
            replace(config, recycle=recycle),
            batch,
            draw_for(batch),
        )
        seen[recycle] = f.calls[0][0]
        # fp32, and at k = 5 rounding of the noise is multiplied by 157; D4 takes the rest
        torch.testing.assert_close(seen[recycle], seen.get("none", seen["prev"]), atol=1e-4, rtol=0)
        assert loss.max() < (1e-4 if target == "x0" else 2e-2)
    torch.testing.assert_close(seen["prev"], seen["none"], atol=1e-4, rtol=0)


def test_noise_loss_wants_the_noise_of_the_second_pass():
    batch = batch_of((2, 3))
    eps, other = draw_for(batch)("eps"), draw_for(batch)("eps of the first pass")
    f = Spy(lambda image, xk, t, prev: eps)
    ((loss, _),) = D.training_losses(
        f, Spy(ignorant), D.Config(target="eps"), batch, draw_for(batch)
    )
    xk = f.calls[0][0]
    p = ((D.x0_of(S5, "eps", eps, xk, batch.k) + 1) / 2).clamp(1e-5, 1)
    seg = D.segmentation_loss(
        p.log(), batch.label, True
    )  # against the truth, though eps leads to the recycled mask
    torch.testing.assert_close(loss, seg)
    assert ((eps - other) ** 2).mean() > 1


def two_modules(**flags):
    config = D.Config(**SMALL | flags)
    record = {"channels": ["a"], "classes": {"b": 1, "c": 2}}
    torch.manual_seed(0)
    return config, D.network_for(config, record), D.network_for(config, record)


@pytest.mark.parametrize("target", ["x0", "eps"])
@pytest.mark.parametrize("recycle", ["prev", "max", "none", "self-condition", "recursive"])
def test_no_gradient_reaches_the_first_pass_and_every_weight_has_one_from_the_second(
    recycle, target
):
    config, model, first = two_modules(recycle=recycle, target=target)
    batch = batch_of((2, 5), coin=(True, False))
    for loss, _ in D.training_losses(
        D.caller(model, None), D.caller(first, None), config, batch, draw_for(batch)
    ):
        assert loss.shape == (2,)
        loss.mean().backward()
    assert all(p.grad is None for p in first.parameters())
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_both_passes_under_autocast_leave_every_weight_its_gradient():
    config, model, _ = two_modules()
    batch, f = batch_of((2, 5)), D.caller(model, torch.bfloat16)
    ((loss, _),) = D.training_losses(f, f, config, batch, draw_for(batch))
    loss.mean().backward()
    assert loss.dtype == torch.float32 and all(p.grad.any() for p in model.parameters())


def test_gradient_is_that_of_the_loss_with_x_k_held_fixed():
    config, model, _ = two_modules()
    batch, f = batch_of((1, 3)), D.caller(model, None)
    ((loss, _),) = D.training_losses(f, f, config, batch, draw_for(batch))
    loss.mean().backward()
    got = [p.grad.clone() for p in model.parameters()]
    spy = Spy(f)
    next(D.training_losses(spy, f, config, batch, draw_for(batch)))
    model.zero_grad()
    D.segmentation_loss(
        f(batch.image, spy.calls[0][0].detach(), S5.t[batch.k]), batch.label, True
    ).mean().backward()
    for a, p in zip(got, model.parameters()):
        torch.testing.assert_close(a, p.grad)


def test_self_condition_shows_half_of_the_samples_their_first_prediction():
    batch = batch_of((2, 3, 5), coin=(True, False, True))
    look, f = Spy(lambda image, xk, t, prev: 3 * xk), Spy(ignorant)
    config = D.Config(recycle="self-condition")
    list(D.training_losses(f, look, config, batch, draw_for(batch)))
    (xj, tj, zeros, _), (xk, t, prev, _) = look.calls[0], f.calls[0]
    assert tj.tolist() == [251, 1000] and t.tolist() == [251, 501, 1000] and not zeros.any()
    torch.testing.assert_close(xj, xk[[0, 2]])
    torch.testing.assert_close(
        xk, D.q_sample(S5, D.mask_to_x0(batch.label, 3), draw_for(batch)("eps"), batch.k)
    )
    torch.testing.assert_close(prev[[0, 2]], 2 * (3 * xj).softmax(dim=1) - 1)
    assert not prev[1].any()
    look = Spy(ignorant)
    list(
        D.training_losses(
            Spy(ignorant),
            look,
            config,
            batch._replace(coin=torch.zeros(3, dtype=torch.bool)),
            draw_for(batch),
        )
    )
    assert not look.calls


def test_recursive_walks_the_chain_and_the_truth_enters_the_loss_only():
    batch = batch_of((2, 3))
    f = Spy(lambda image, xk, t, prev: (2 * xk).requires_grad_())
    out = list(
        D.training_losses(f, Spy(ignorant), D.Config(recycle="recursive"), batch, draw_for(batch))
    )
    assert [t.tolist() for _, t in out] == [[v, v] for v in (1000, 750, 501, 251, 1)]
    draw, xk = draw_for(batch), draw_for(batch)("eps")
    for j, (seen, *_) in zip((5, 4, 3, 2, 1), f.calls):
        torch.testing.assert_close(seen, xk)
        assert not seen.requires_grad or seen.is_leaf
        xk = (
            D.q_sample(S5, 2 * (2 * xk).softmax(dim=1) - 1, draw(f"eps {j - 1}"), ks(j - 1, j - 1))
            if j > 1
            else xk
        )
    other = batch._replace(label=torch.zeros_like(batch.label))
    g = Spy(lambda image, xk, t, prev: (2 * xk).requires_grad_())
    list(D.training_losses(g, Spy(ignorant), D.Config(recycle="recursive"), other, draw_for(batch)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(f.calls, g.calls))
    assert D.Config(recycle="recursive").passes == 5 and D.Config().passes == 1


def test_unet_sees_the_image_only():
    batch, f = batch_of((2, 3)), Spy(lambda image, xk, t, prev: torch.zeros(2, 3, 8, 8, 8))
    ((loss, _),) = D.training_losses(
        f, Spy(ignorant), D.Config(method="unet"), batch, draw_for(batch)
    )
    assert f.calls[0][0] is None and loss.shape == (2,)
    torch.testing.assert_close(
        loss, D.segmentation_loss(torch.zeros(2, 3, 8, 8, 8), batch.label, True)
    )


@pytest.mark.parametrize("flags", [{}, {"method": "unet"}, {"dims": 2}], ids=str)
def test_one_batch_is_overfitted(flags):
    torch.manual_seed(0)
    config, model, _ = two_modules(num_channels=8, **flags)
    batch, f = batch_of((1, 2, 3, 4, 5)), D.caller(model, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        ((loss, _),) = D.training_losses(f, f, config, batch, draw_for(batch))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    net = network(config, model)
    mask = next(iter(D.sample_ensemble(net, batch.image[0], "case"))).mask
    dice = [D.metrics.dice((mask == v).numpy(), (batch.label[0] == v).numpy()) for v in (1, 2)]
    assert min(dice) > 0.95


def test_one_batch_is_overfitted_with_predicted_noise():
    config, model, _ = two_modules(num_channels=8, target="eps")
    batch, f = batch_of((1, 2)), D.caller(model, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = last = math.inf
    for i in range(60):
        ((loss, _),) = D.training_losses(f, f, config, batch, draw_for(batch))
        first, last = (loss.mean().item() if i == 0 else first), loss.mean().item()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert last < 0.4 * first


# --- sampler ---------------------------------------------------------------------------------------------------------


def run_sampler(f, config, shape=(1, 3, 4, 4, 4), dtype=torch.float64):
    draws = []

    def noise_of(k):
        draws.append(k)
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(k))

    shown = []
    out = list(
        D.sample(
            f,
            torch.zeros(1, 1, *shape[2:], dtype=dtype),
            noise_of,
            config,
            lambda t, *x: shown.append(t),
        )
    )
    return out, draws, shown


@pytest.mark.parametrize("target", ["x0", "eps"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}, {"variance": "large"}],
    ids=str,
)
@pytest.mark.parametrize("steps", [5, 50])
def test_sampler_returns_the_truth_of_an_oracle(target, flags, steps):
    label = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    batch = batch_of((1,))._replace(label=label)
    answer = oracle_of(batch, target, D.schedule(steps, "paper", CPU))
    f = Spy(lambda *args: answer(*args).double())
    config = D.Config(target=target, sampling_steps=steps, train_K=1000, **flags)
    out, draws, shown = run_sampler(f, config)
    assert [k for k, _ in out] == list(range(steps, 0, -1)) and len(f.calls) == steps
    assert shown[0] == 1000 and shown[-1] == 1 and [c[1].item() for c in f.calls] == shown
    assert draws == (
        list(range(steps, 0, -1)) if flags.get("sampler") != "ddim" or "eta" in flags else [steps]
    )
    for _, x0 in out:
        torch.testing.assert_close(x0, D.mask_to_x0(label, 3).double(), atol=1e-6, rtol=0)
    assert torch.equal(D.mask_of(D.probability(config, out[-1][1])[0]), label[0].to(torch.uint8))


def test_sampler_starts_from_its_noise_and_follows_the_posterior():
    f = Spy(lambda image, xk, t, prev: 2 * xk)
    out, _, _ = run_sampler(f, D.Config())
    z = [
        None,
        *(
            torch.randn(
                1, 3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k)
            )
            for k in range(1, 6)
        ),
    ]
    torch.testing.assert_close(f.calls[0][0], z[5])
    for i, k in enumerate((5, 4, 3, 2)):
        mean = S5.c0[k] * out[i][1] + S5.cx[k] * f.calls[i][0]
        torch.testing.assert_close(f.calls[i + 1][0], mean + S5.btilde[k].sqrt() * z[k - 1])


def test_samples_keep_the_distribution_of_the_data():
    """With the exact posterior mean of data N(0, 1) x_k stays N(0, 1); with the variance forgotten it shrinks."""
    s = D.schedule(200, "paper", CPU)

    def exact(image, xk, t, prev):
        k = (s.t == t).nonzero()[0]
        return D.at((1 - s.abar).sqrt(), k, xk) * xk  # eps = E[eps | x_k]

    config = D.Config(target="eps", clip_x0="off", train_K=1000, sampling_steps=200)
    f = Spy(exact)
    run_sampler(f, config, (1, 1, 16, 16, 16))
    assert f.calls[-1][0].std().item() == pytest.approx(1, abs=0.03)


def test_self_condition_hands_each_step_the_last_prediction():
    f = Spy(lambda image, xk, t, prev: 2 * xk)
    out, _, _ = run_sampler(f, D.Config(recycle="self-condition"))
    assert not f.calls[0][2].any()
    for (_, x0), call in zip(out, f.calls[1:]):
        torch.testing.assert_close(call[2], x0)


def test_noise_at_the_last_level_is_multiplied_by_157_unless_clipped():
    output, xk = vec(1.01, -0.99), vec(1, -1)
    assert (1 - S5.abar[5]).sqrt() / S5.abar[5].sqrt() == pytest.approx(157.4, abs=0.05)
    free, clipped = (
        D.x0hat_of(D.Config(target="eps", clip_x0=c), S5, output, xk, ks(5)) for c in ("off", "on")
    )
    assert free.abs().max() > 1.5 and clipped.abs().max() == 1


def test_probabilities_of_predicted_noise_are_clipped_and_sum_to_1():
    p = D.probability(D.Config(target="eps"), vec(1.5, 0.0, -3.0))
    close(p, 1 / 1.5, 0.5 / 1.5, 0, atol=1e-7)
    close(
        D.probability(D.Config(target="eps"), vec(-1.5, -1, -3)), 1 / 3, 1 / 3, 1 / 3
    )  # no channel says yes
    close(D.probability(D.Config(), vec(0.5, 0.0, -0.5)), 0.75, 0.5, 0.25)


@pytest.mark.parametrize(
    "values, largest", [((1.2, 1.5, -1.0), 1), ((-1.2, -1.1, -1.5), 1), ((0.2, -3.0, 0.1), 0)]
)
def test_largest_channel_stays_the_largest_where_nothing_is_clipped(values, largest):
    p = D.probability(D.Config(target="eps", clip_x0="off"), vec(*values))
    assert int(p.argmax(1)) == largest and float(p.sum()) == pytest.approx(1) and float(p.min()) > 0


# --- windows, ensembles ----------------------------------------------------------------------------------------------


def network(config, model):
    return D.Network(config, model, {"channels": ["a"], "classes": {"b": 1, "c": 2}}, CPU, None, 0)


def test_windows_cover_the_grid_and_end_with_it():
    assert [w[0].start for w in D.windows((20, 8, 8), (8, 8, 8))] == [0, 4, 8, 12]
    assert [w[0].start for w in D.windows((19, 8, 8), (8, 8, 8))] == [0, 4, 8, 11]
    assert len(D.windows((8, 8, 8), (8, 8, 8))) == 1 and len(D.windows((9, 9, 9), (8, 8, 8))) == 8


def test_gaussian_weights_equal_their_formula():
    w = D.gaussian((8, 16, 4))
    assert w.shape == (8, 16, 4) and w.min() == pytest.approx(1e-3 * w.max().item(), rel=1e-5)
    assert w[4, 8, 2] == w[3, 7, 1] == w.max()
    ratio = math.exp(-0.5 * (1.5**2 - 0.5**2) / 1.0**2)  # sigma of an axis of 8 is 1
    assert (w[5, 8, 2] / w[4, 8, 2]).item() == pytest.approx(ratio, rel=1e-5)


def test_volume_of_the_training_size_is_one_pass_and_a_smaller_one_is_padded():
    config, model, _ = two_modules()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(args[1][0].shape))
    net, image = network(config, model), torch.rand(1, 8, 8, 8)
    probs = D.sample_member(net, image, "a", 0)
    assert len(calls) == 5 and sorted(probs) == [1, 2, 3, 4, 5]
    steps = dict(
        D.sample(
            D.caller(model, None),
            image[None],
            lambda k: torch.randn(
                3,
                8,
                8,
                8,
                generator=torch.Generator().manual_seed(D.seed_of(0, "sample", "a", 0, k)),
            )[None],
            config,
        )
    )
    for k, x0 in steps.items():
        torch.testing.assert_close(
            probs[k], D.probability(config, x0.detach())[0], atol=1e-7, rtol=0
        )
    calls.clear()
    small = D.sample_member(net, torch.rand(1, 5, 8, 7), "a", 0)
    assert len(calls) == 5 and set(calls) == {(1, 4, 8, 8, 8)} and small[1].shape == (3, 5, 8, 7)


def test_image_in_0_1_is_lost_beside_the_noise_before_the_first_norm_and_a_spread_one_is_not():
    data = loaders.Phantoms(0, (2, 1, 1), shape=(32, 32, 32))
    model = D.network_for(D.Config(**D.PRESETS["tiny"]), loaders.data_record(data))
    image = torch.from_numpy(np.asarray(data.image(data.cases("train")[0]), np.float32))[None]
    xk = torch.randn(1, 3, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like

    def share(low, high):  # of the variance after the first convolution that comes from the image
        spread = low + (high - low) * image
        both = [torch.cat(v, 1) for v in ((spread, nothing(xk)), (nothing(image), xk))]
        of_image, of_noise = (model.stem[0](v).detach().var(dim=(0, 2, 3, 4)) for v in both)
        return float((of_image / (of_image + of_noise)).mean())

    assert share(0, 1) < 0.03 and share(-2.5, 2.5) > 0.1


def test_sampling_spreads_the_image_as_training_did():
    config, model, _ = two_modules()
    seen, image = [], torch.rand(1, 8, 8, 8)
    model.register_forward_hook(lambda *args: seen.append(args[1][0][:, :1]))
    D.sample_member(network(replace(config, image_range=(-2.5, 2.5)), model), image, "a", 0)
    assert len(seen) == 5 and all(torch.equal(v, 5 * image[None] - 2.5) for v in seen)


def test_windows_of_a_constant_are_that_constant():
    class Constant(nn.Module):
        def forward(self, x, t):
            return (
                torch.tensor([0.5, 2.0, -1.0])
                .reshape(1, 3, 1, 1, 1)
                .expand(len(x), 3, *x.shape[2:])
            )

    probs = D.sample_member(
        network(D.Config(**SMALL), Constant()), torch.rand(1, 13, 8, 20), "a", 0
    )
    expected = torch.tensor([0.5, 2.0, -1.0]).softmax(0)
    torch.testing.assert_close(
        probs[1], expected.reshape(3, 1, 1, 1).expand(3, 13, 8, 20), atol=1e-6, rtol=0
    )


def test_windows_that_overlap_see_the_same_noise_and_image():
    seen = []

    class Copy(nn.Module):
        def forward(self, x, t):
            seen.append((int(t), x[0]))
            return x[:, 1:]

    image = torch.rand(1, 12, 8, 8)
    D.sample_member(network(D.Config(**SMALL), Copy()), image, "a", 0)
    first, second = (x for t, x in seen if t == 1000)
    assert (
        len(seen) == 10
        and torch.equal(first[:, 4:], second[:, :4])
        and torch.equal(first[:1], image[:, :8])
    )
    last = [x for t, x in seen if t == 1]
    assert torch.equal(last[0][:, 4:], last[1][:, :4])  # a network that looks at single voxels only


def test_a_large_volume_is_weighted_by_the_gaussian():
    class Position(nn.Module):  # says class 1 in the first window, class 2 in the second
        calls = 0

        def forward(self, x, t):
            Position.calls += 1
            logits = torch.full((1, 3, *x.shape[2:]), -50.0)
            logits[:, 1 if Position.calls == 1 else 2] = 50.0
            return logits

    config = D.Config(**SMALL, method="unet")
    probs = D.sample_member(network(config, Position()), torch.rand(1, 12, 8, 8), "a", 0)[1]
    w = D.gaussian((8, 8, 8))
    torch.testing.assert_close(probs[1, 4:8], w[4:] / (w[4:] + w[:4]), atol=1e-6, rtol=0)
    assert (probs[1, :4] == 1).all() and (probs[2, 8:] == 1).all()


def test_slices_are_windowed_in_the_plane_only():
    config = D.Config(**SMALL, dims=2)
    full, window, inside = D.padded((6, 20, 30), config)
    assert (
        (full, window) == ([8, 20, 30], [8, 8, 30])
        and inside[0] == slice(1, 7)
        and inside[2] == slice(0, 30)
    )


def members(config, model, case="a"):
    return list(
        D.sample_ensemble(
            network(config, model),
            torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)),
            case,
        )
    )


def test_members_depend_on_seed_case_and_number_only():
    config, model, _ = two_modules(ensemble=3)
    three = [r.member for r in members(config, model)]
    one = members(replace(config, ensemble=1), model)[0]
    assert torch.equal(one.member, three[0]) and torch.equal(one.mask, one.member)
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(members(replace(config, ensemble=1), model, "b")[0].prob, one.prob)
    assert not torch.equal(members(replace(config, ensemble=1, seed=1), model)[0].prob, one.prob)


@pytest.mark.parametrize("combine, expected", [("mean", 0), ("vote", 1)])
def test_ensemble_is_the_mean_probability_or_a_vote(monkeypatch, combine, expected):
    values = iter([(0.9, 0.1, 0.0), (0.4, 0.6, 0.0), (0.45, 0.55, 0.0)])
    monkeypatch.setattr(
        D, "sample_member", lambda *a: {1: torch.tensor(next(values)).reshape(3, 1, 1, 1)}
    )
    *_, last = D.sample_ensemble(
        network(D.Config(ensemble=3, combine=combine), None), torch.zeros(1, 1, 1, 1), "a"
    )
    assert last.size == 3 and last.mask.item() == expected
    close(last.prob.flatten(), 1.75 / 3, 1.25 / 3, 0.0, atol=1e-6)


def test_votes_that_are_equal_go_to_the_lower_class(monkeypatch):
    values = iter([(0.0, 0.1, 0.9), (0.1, 0.9, 0.0)])
    monkeypatch.setattr(
        D, "sample_member", lambda *a: {1: torch.tensor(next(values)).reshape(3, 1, 1, 1)}
    )
    *_, last = D.sample_ensemble(
        network(D.Config(ensemble=2, combine="vote"), None), torch.zeros(1, 1, 1, 1), "a"
    )
    assert last.mask.item() == 1


def test_entropy_equals_spec_value_and_is_between_0_and_1():
    close(D.entropy(torch.tensor([0.5, 0.25, 0.25]).reshape(3, 1, 1, 1)), 0.946394630, atol=1e-6)
    assert D.entropy(torch.tensor([1.0, 0, 0]).reshape(3, 1, 1, 1)).item() == 0
    assert D.entropy(torch.full((4, 1, 1, 1), 0.25)).item() == pytest.approx(1)


# --- augmentation ----------------------------------------------------------------------------------------------------


def place_of(q, angles, scales, shift, shape=(33, 33, 17), spacing=(1, 1, 2)):
    """Where a voxel of the input comes to lie: the inverse of the pull."""
    m = D.pull(D.affine_of(angles, scales, spacing), np.array(shift, float), shape)
    return np.linalg.solve(m[:, :3], np.array(q) - m[:, 3])


def test_affine_moves_a_voxel_to_its_computed_place():
    got = place_of((20, 10, 9), (0.05, -0.03, 0.088), (1.1, 0.9, 1), (3, -2, 1))
    np.testing.assert_allclose(got, (22.0950076822, 7.1436029918, 10.1267577882), atol=1e-9)
    quarter = math.pi / 2
    np.testing.assert_allclose(
        place_of((24, 16, 8), (0, 0, quarter), (1, 1, 1), (0, 0, 0)), (16, 8, 8), atol=1e-9
    )
    np.testing.assert_allclose(
        place_of((16, 24, 8), (quarter, 0, 0), (1, 1, 1), (0, 0, 0)), (16, 16, 4), atol=1e-9
    )


@pytest.mark.parametrize(
    "q, angles, shift, where",
    [
        ((24, 16, 8), (0, 0, math.pi / 2), (0, 0, 0), (16, 8, 8)),
        ((16, 24, 8), (math.pi / 2, 0, 0), (0, 0, 0), (16, 16, 4)),
        ((5, 6, 7), (0, 0, 0), (3, -2, 1), (8, 4, 8)),
    ],
)
def test_augmentation_puts_a_marked_voxel_there_in_image_and_label(q, angles, shift, where):
    m = D.pull(D.affine_of(angles, (1, 1, 1), (1, 1, 2)), np.array(shift, float), (33, 33, 17))
    label = torch.zeros(1, 33, 33, 17, dtype=torch.uint8)
    label[(0, *q)] = 2
    batch = D.Batch(label[:, None].float(), label, torch.from_numpy(m)[None], *[torch.zeros(1)] * 3)
    out = D.augment(batch, CPU)
    assert out.label[(0, *where)] == 2 and out.label.dtype == torch.uint8
    assert out.image[(0, 0, *where)].item() == pytest.approx(2, abs=1e-3)


def test_augmentation_reads_the_image_linearly_and_zero_outside():
    ramp = torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(1, 1, 9, 5, 5)
    m = D.pull(np.eye(3), np.array((0.5, 0, 0)), (9, 5, 5))
    out = D.augment(
        D.Batch(
            ramp, (ramp[:, 0] > 3).to(torch.uint8), torch.from_numpy(m)[None], *[torch.zeros(1)] * 3
        ),
        CPU,
    )
    close(out.image[0, 0, 1:, 2, 2], *(i + 0.5 for i in range(8)), atol=1e-4)
    third = D.pull(np.eye(3), np.array((0.3, 0, 0)), (9, 5, 5))
    label = 2 * (ramp[:, 0] > 3).to(torch.uint8)
    out = D.augment(D.Batch(ramp, label, torch.from_numpy(third)[None], *[torch.zeros(1)] * 3), CPU)
    assert torch.equal(out.label, label)  # the nearest voxel; between two values there is none
    m = D.pull(np.eye(3), np.array((4.0, 0, 0)), (9, 5, 5))
    out = D.augment(
        D.Batch(
            1 + ramp,
            torch.ones(1, 9, 5, 5, dtype=torch.uint8),
            torch.from_numpy(m)[None],
            *[torch.zeros(1)] * 3,
        ),
        CPU,
    )
    assert (
        not out.image[0, 0, :4].any()
        and not out.label[0, :4].any()
        and (out.label[0, 4:] == 1).all()
    )


def test_image_noise_has_an_sd_of_its_own_for_each_sample_up_to_the_given():
    n = torch.arange(200)
    still = D.Batch(torch.zeros(200, 1, 8, 8, 8), *[torch.zeros(200)] * 4, n)  # type: ignore[arg-type]
    config = D.Config(image_noise=0.3)
    sd = D.with_image_noise(still, config).image.flatten(1).std(dim=1)
    assert 0.28 < sd.max() < 0.32 and sd.min() < 0.01
    assert (
        abs(sd.mean() - 0.15) < 0.02
    )  # uniform from 0; a mean of 0.3 / sqrt(3) would be another law
    few = D.Batch(*(v[7:9] for v in still))
    torch.testing.assert_close(D.with_image_noise(few, config).image.flatten(1).std(dim=1), sd[7:9])
    other = replace(config, seed=1)
    assert not torch.equal(
        D.with_image_noise(few, other).image, D.with_image_noise(few, config).image
    )


def test_augmentation_without_strength_is_the_identity_bit_for_bit():
    volumes = D.Volumes(
        tiny_data(),
        D.Config(**SMALL | {"size": (16, 16, 16)}, rotate=0, scale=0, translate=(0, 0, 0)),
    )
    batch = torch.utils.data.default_collate([volumes[0], volumes[1]])
    assert torch.equal(batch.affine.float(), torch.eye(3, 4).expand(2, 3, 4))
    out = D.augment(batch, CPU)
    assert torch.equal(out.image, batch.image) and torch.equal(out.label, batch.label)


def test_drawn_affines_keep_the_foreground_inside_and_use_the_whole_range():
    rng = np.random.default_rng(0)
    label = np.zeros((32, 24, 16), np.uint8)
    label[10:21, 9:14, 3:9] = 1
    config = D.Config(translate=(12, 10, 6))
    shifts = []
    for _ in range(300):
        m = D.draw_affine(rng, label, (1, 1, 2.5), config)
        box = np.array(np.meshgrid([10, 20], [9, 13], [3, 8])).reshape(3, -1)
        there = np.linalg.solve(m[:, :3], box - m[:, 3:])
        assert (there > -1e-9).all() and (
            there.max(axis=1) < np.array(label.shape) - 1 + 1e-9
        ).all()
        shifts.append(there.mean(axis=1) - (15, 11, 5.5))
    assert (np.ptp(shifts, axis=0) > (12, 10, 6)).all()


def test_a_foreground_too_large_to_stay_inside_is_centred():
    label = np.ones((9, 9, 9), np.uint8)
    config = D.Config(rotate=0.0, scale=0.0, translate=(3, 3, 3))
    m = D.draw_affine(np.random.default_rng(0), label, (1, 1, 1), config)
    np.testing.assert_allclose(m, np.eye(3, 4), atol=1e-12)


def test_default_shift_is_that_of_the_prostate_data_and_empty_labels_are_not_limited():
    rng = np.random.default_rng(0)
    config = D.Config(rotate=0.0, scale=0.0)
    shifts = [
        D.draw_affine(rng, np.zeros((256, 256, 48), np.uint8), (1, 1, 1), config)[:, 3]
        for _ in range(400)
    ]
    most = np.abs(shifts).max(axis=0)
    assert (most <= (20, 20, 4)).all() and (most > (19, 19, 3.8)).all()


# --- data ------------------------------------------------------------------------------------------------------------


def tiny_data(shape=(16, 16, 12)):
    return loaders.Phantoms(0, (3, 1, 2), shape=shape)


def test_volumes_are_a_function_of_seed_and_number():
    config = D.Config(**SMALL | {"size": (16, 16, 12)}, seed=3)
    a, b = D.Volumes(tiny_data(), config), D.Volumes(tiny_data(), config)
    for n in (7, 0, 5):
        for first, second in zip(a[n], b[n]):
            np.testing.assert_array_equal(first, second)
        assert a[n].image.shape == (1, 16, 16, 12) and a[n].n == n and 1 <= a[n].k <= 5
    assert not np.array_equal(
        a[0].affine, D.Volumes(tiny_data(), replace(config, seed=4))[0].affine
    )
    drawn = [a[n] for n in range(60)]
    assert {v.k for v in drawn} == {1, 2, 3, 4, 5} and 15 < sum(v.coin for v in drawn) < 45


def test_volumes_are_padded_in_the_middle_or_cut_at_random():
    data = tiny_data()
    padded = D.Volumes(data, D.Config(**SMALL | {"size": (20, 16, 16)}))[0]
    assert (
        not padded.image[:, :2].any()
        and not padded.image[:, 18:].any()
        and not padded.image[..., 14:].any()
    )
    assert any(
        np.array_equal(padded.image[0, 2:18, :, 2:14], data.image(c)[0])
        for c in data.cases("train")
    )
    cut = D.Volumes(data, D.Config(**SMALL))
    places = set()
    for n in range(12):
        v = cut[n]
        for case in data.cases("train"):
            for start in np.ndindex(9, 9, 5):
                window = tuple(slice(s, s + 8) for s in start)
                if np.array_equal(data.image(case)[0][window], v.image[0]):
                    assert np.array_equal(data.label(case)[window], v.label)
                    places.add(start)
    assert len(places) > 8


def test_training_size_holds_each_case_in_multiples_of_the_stride():
    assert D.training_size(D.Config(**SMALL | {"size": ()}), tiny_data((9, 16, 13))) == (12, 16, 16)
    assert D.training_size(D.Config(**SMALL), tiny_data()) == (8, 8, 8)


def test_masks_become_channels_in_minus_1_and_1():
    label = torch.randint(0, 3, (2, 3, 4, 5), dtype=torch.uint8)
    x0 = D.mask_to_x0(label, 3)
    assert x0.shape == (2, 3, 3, 4, 5) and x0.dtype == torch.float32
    assert torch.equal(x0.argmax(dim=1), label.long()) and set(x0.unique().tolist()) == {-1.0, 1.0}
    assert D.mask_of(torch.tensor([0.2, 0.4, 0.4]).reshape(3, 1, 1, 1)).item() == 1


def test_labels_are_checked_all_at_once_and_absent_classes_are_named(fake, tmp_path):
    shutil.copytree(fake / "prepared", tmp_path / "data")
    data = loaders.open_prepared(tmp_path / "data")
    first, second, third = data.cases("train")[:3]
    for case, value in ((first, 7), (second, 1), (third, 9)):
        label = np.ones_like(data.label(case))
        label[:2, 0, 0] = value
        np.save(tmp_path / "data/cases" / case / "label.npy", label)
    data = loaders.open_prepared(tmp_path / "data")
    with pytest.raises(
        InputError, match=f"{first}/.*value 7 in 2 voxels.*{third}/.*value 9 in 2 voxels"
    ) as error:
        D.absent_classes(data, data.cases("train"))
    assert "knows [0, 1, 2]" in str(error.value) and f"{second}/" not in str(error.value)
    assert D.absent_classes(data, [second]) == [
        name for name, value in data.classes.items() if value == 2
    ]


def test_shards_divide_the_global_batch():
    config = D.Config(**SMALL, batch=8, accumulate=2, steps=3)
    whole = [
        n for part in D.Sharded(replace(config, accumulate=1), Ranks(0, 1, 0, CPU), 1) for n in part
    ]
    assert whole == list(range(8, 24))
    shards = [list(D.Sharded(config, Ranks(r, 2, r, CPU), 1)) for r in (0, 1)]
    assert [len(part) for part in shards[0]] == [2, 2, 2, 2]
    assert sorted(n for shard in shards for part in shard for n in part) == whole


def test_noise_depends_on_name_and_number_only():
    both = D.noise(0, "eps", [4, 9], (2, 3, 3, 3), CPU)
    assert torch.equal(D.noise(0, "eps", [9], (2, 3, 3, 3), CPU)[0], both[1])
    assert not torch.equal(both[0], both[1]) and not torch.equal(
        D.noise(0, "other", [4], (2, 3, 3, 3), CPU)[0], both[0]
    )


# --- training pieces, flags ------------------------------------------------------------------------------------------


def test_learning_rate_equals_spec_values():
    expected = {
        0: 1e-5,
        50: 5.5e-5,
        100: 1e-4,
        2575: 8.55017857e-5,
        5050: 5.05e-5,
        10000: 1e-6,
        12499: 1e-6,
    }
    for step, value in expected.items():
        assert D.learning_rate(D.Config(), step) == pytest.approx(value, rel=1e-8)
    small = D.Config(lr=1e-3, lr_steps=0, steps=2000)
    assert D.learning_rate(small, 100) == 1e-3 and D.learning_rate(small, 2000) == pytest.approx(
        1e-5
    )


@pytest.mark.parametrize(
    "recycle, accumulate", [("prev", 1), ("prev", 2), ("recursive", 1), ("recursive", 2)]
)
def test_training_step_averages_over_samples_parts_and_passes(recycle, accumulate):
    config = D.Config(**SMALL, recycle=recycle, accumulate=accumulate, batch=2, workers=0, steps=2)
    data, ranks = tiny_data(), Ranks(0, 1, 0, CPU)
    run = D.Training(config, loaders.data_record(data), CPU, None)
    volumes, f = D.Volumes(data, config), D.caller(run.model, None)
    batch = D.augment(torch.utils.data.default_collate([volumes[0], volumes[1]]), CPU)
    losses = [loss for loss, _ in D.training_losses(f, f, config, batch, draw_for(batch))]
    torch.stack(losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm()
    loader = torch.utils.data.DataLoader(volumes, batch_sampler=D.Sharded(config, ranks, 0))
    by_t = D.runtime.LossByTime(D.T, CPU)
    norm = D.train_step(run, run.model, run.model, iter(loader), ranks, by_t)
    torch.testing.assert_close(norm, expected, atol=1e-6, rtol=1e-4)
    assert (
        by_t.row(ranks)["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        and run.step == 1
    )


def test_ema_forgets_its_start():
    ema, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    ema.requires_grad_(False).weight.fill_(0.0)
    nn.init.constant_(model.weight, 1.0)
    D.update_ema(ema, model, 0.999, 1)
    assert ema.weight.item() == pytest.approx(1 - 2 / 11)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"size": (8, 64, 64)}, "axis of 8 voxels, shorter than the network's stride of 16"),
        ({"size": (16, 16, 16)}, "one voxel at the lowest level"),
        ({"size": (64, 64)}, "expected X,Y,Z"),
        ({"translate": (1,)}, "expected X,Y,Z"),
        ({"channel_mult": ()}, "--channel-mult is"),
        ({"dims": 4}, "--dims is 4"),
        ({"image_range": (1.0, 0.0)}, "--image-range is"),
        ({"image_range": (5.0,)}, "expected LEAST,GREATEST"),
        ({"train_K": 1}, "--train-K is 1"),
        ({"sampling_steps": 1001}, "up to 1000"),
        ({"method": "unet", "target": "eps"}, "no noise to predict"),
        ({"eta": 0.5}, "belongs to --sampler ddim"),
        ({"device": "foo"}, "--device is foo"),
        ({"batch": 0}, "--batch is 0"),
        ({"lr": 0.0}, "above 0"),
        ({"ema": 1.0}, "--ema is 1.0"),
    ],
)
def test_config_refuses_by_name(flags, words):
    with pytest.raises(InputError, match=words):
        D.Config(**flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"sampling_steps": 4}, "--train-K 5 knows its own 5 noise levels only"),
        ({"train_K": 10}, "use --sampling-steps 10, or train with --train-K 1000"),
        ({"schedule": "code-v1", "train_K": 7, "sampling_steps": 7}, "divide 1000"),
    ],
)
def test_sampling_steps_that_were_not_trained_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        D.check_levels(D.Config(**flags))
    D.check_levels(D.Config(train_K=1000, sampling_steps=7))


def test_2d_networks_do_not_need_a_long_third_axis():
    assert D.Config(dims=2, size=(32, 32, 3)).size == (32, 32, 3)
