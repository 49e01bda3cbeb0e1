"""ddpm_pretrain_finetune: the equations, the network, label subsets and windows, against the specification's values."""

import copy
import math
import os
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpm_pretrain_finetune as P
from common import InputError
from common.old import loaders, runtime
from common.old.runtime import Ranks

TINY = P.Config(**P.PRESETS["tiny"], amp="off")
FAST = replace(TINY, size=16, channel_mult=(1, 2), attention_resolutions=(8,), blocks=(1, 3))
RANKS = Ranks(0, 1, 0, torch.device("cpu"))
RECORD = {
    "channels": ["CT"],
    "classes": {"a": 1, "b": 2},
    "normalisation": {"kind": "hu", "low": -1024, "high": 400},
}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def randomised(model, seed: int = 0):
    """All weights random: zero-initialised layers hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1
        p.data = (p.ndim == 1) * 0.5 + scale * torch.randn(p.shape, generator=generator)
    return model


# --- schedules -------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "linear": {0: (1e-4, 0.9999), 1: (1.1991991992e-4, 0.99978009207), 100: (2.0919919920e-3, 0.89514159090),
               300: (6.0759759760e-3, 0.39401112252), 500: (1.0059959960e-2, 0.077796658365),
               999: (0.02, 4.0358297654e-5)},
    "cosine": {0: (4.1284224822e-5, 0.99995871578), 1: (4.6141752737e-5, 0.99991257593),
               100: (5.3189915570e-4, 0.97157568181), 300: (1.6241978737e-3, 0.78563241277),
               500: (3.1556914416e-3, 0.49228517245), 999: (0.999, 2.4287669070e-9)},
    "cosine-anneal": {0: (1e-4, 0.9999), 1: (1.0004919959e-4, 0.99979996081), 100: (5.8795504917e-4, 0.97368408632),
                      300: (4.2091336170e-3, 0.63366244458), 500: (1.0065645062e-2, 0.15382455374),
                      999: (0.02, 4.0020284995e-5)},
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_has_the_values_of_the_table(schedule):
    beta = P.betas(schedule)
    abar = P.abar_table(schedule, torch.device("cpu"))
    assert beta.dtype == np.float64 and len(beta) == 1000 and abar.dtype == torch.float64
    for t, (b, a) in SCHEDULES[schedule].items():
        assert beta[t] == pytest.approx(b, rel=1e-9) and float(abar[t]) == pytest.approx(
            a, rel=1e-9
        ), t


def test_linear_schedule_of_fewer_levels_reaches_the_same_noise():
    assert P.betas("linear", 500)[[0, -1]] == pytest.approx([2e-4, 0.04])


def test_noisy_slice_follows_equation_2():
    x0, eps, t = (
        torch.full((2, 1, 1, 1), 0.3),
        torch.full((2, 1, 1, 1), -1.2),
        torch.tensor([300, 500]),
    )
    expected = [
        math.sqrt(a) * 0.3 + math.sqrt(1 - a) * -1.2 for a in (0.39401112252, 0.077796658365)
    ]
    assert P.q_sample(x0, eps, t, "linear").flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_equation_2_is_equation_1_again_and_again():
    beta, mean, variance = P.betas("cosine-anneal"), 1.0, 0.0
    for b in beta[:301]:
        mean, variance = math.sqrt(1 - b) * mean, (1 - b) * variance + b
    t = torch.tensor([300])
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert float(P.q_sample(one, zero, t, "cosine-anneal")) == pytest.approx(mean, rel=1e-6)
    assert float(P.q_sample(zero, one, t, "cosine-anneal")) == pytest.approx(
        math.sqrt(variance), rel=1e-6
    )


def test_noise_loss_is_the_mean_square_of_each_sample():
    x0, eps, t = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0, 9])

    def net(xt, tt):
        assert torch.equal(tt, t)
        return torch.tensor([3.0, 1.5]).reshape(2, 1, 1, 1).expand_as(xt)

    assert P.noise_loss(net, x0, eps, t, "linear").tolist() == pytest.approx([4.0, 0.25])


def test_noise_loss_shows_the_network_the_noisy_slice():
    x0, eps, t = torch.rand(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([100, 900])

    def oracle(xt, tt):
        abar = P.abar_table("linear", xt.device)[tt].float().reshape(-1, 1, 1, 1)
        return (xt - abar.sqrt() * x0) / (1 - abar).sqrt()

    assert float(P.noise_loss(oracle, x0, eps, t, "linear").max()) < 1e-9


# --- sampling --------------------------------------------------------------------------------------------------------


def test_respaced_levels_and_betas_have_the_values_of_the_table():
    s = P.respaced("linear", 5)
    assert s.t.tolist() == [0, 250, 500, 749, 999]
    assert s.beta == pytest.approx(
        [1e-4, 0.4785248219, 0.8507993437, 0.9569319491, 0.9879547261], rel=1e-9
    )


def test_one_level_is_the_last_and_none_means_all():
    assert P.respaced("linear", 1).t.tolist() == [999]
    assert P.respaced("linear", 0).t.tolist() == list(range(1000))
    assert P.respaced("linear", 0).beta == pytest.approx(P.betas("linear"), rel=1e-9)


@pytest.mark.parametrize("t, variance, c1, c2", [(1, 5.4531876613e-5, 0.54529149951, 0.45470849899),
                                                 (500, 1.0051335779e-2, 3.0580570756e-3, 0.99410435076)])  # fmt: skip
def test_ddpm_step_has_the_posterior_of_the_table(t, variance, c1, c2):
    s = P.respaced("linear", 0)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    eps_of_0 = 1 / math.sqrt(1 - s.abar[t])  # x_t = 1 with this noise means x_0 = 0
    eps_of_1 = -math.sqrt(s.abar[t]) / math.sqrt(
        1 - s.abar[t]
    )  # x_t = 0 with this noise means x_0 = 1
    assert float(P.ddpm_step(s, t, one, eps_of_0 * one, "small", zero)) == pytest.approx(
        c2, rel=1e-9
    )
    assert float(P.ddpm_step(s, t, zero, eps_of_1 * one, "small", zero)) == pytest.approx(
        c1, rel=1e-9
    )
    noisy = P.ddpm_step(s, t, zero, zero, "small", one) - P.ddpm_step(
        s, t, zero, zero, "small", zero
    )
    assert float(noisy) ** 2 == pytest.approx(variance, rel=1e-9)
    large = P.ddpm_step(s, t, zero, zero, "large", one) - P.ddpm_step(
        s, t, zero, zero, "large", zero
    )
    assert float(large) ** 2 == pytest.approx(s.beta[t], rel=1e-9)


def test_mean_by_way_of_x0_is_equation_4():
    s, t = P.respaced("linear", 0), 700
    eps = torch.tensor([0.4], dtype=torch.float64)
    xt = (
        math.sqrt(s.abar[t]) * 0.2 + math.sqrt(1 - s.abar[t]) * eps
    )  # of a slice within the range: no clipping
    expected = (float(xt) - s.beta[t] / math.sqrt(1 - s.abar[t]) * 0.4) / math.sqrt(1 - s.beta[t])
    assert float(P.ddpm_step(s, t, xt, eps, "small", torch.zeros_like(xt))) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("step", [P.ddpm_step, P.ddim_step])
def test_last_step_adds_no_noise(step):
    s, x = P.respaced("linear", 5), torch.tensor([0.2])
    how = "large" if step is P.ddpm_step else 1.0
    assert torch.equal(step(s, 0, x, x, how, torch.ones(1)), step(s, 0, x, x, how, torch.zeros(1)))


def test_ddim_with_an_oracle_passes_the_points_of_the_table():
    s = P.respaced("linear", 5)
    x = math.sqrt(s.abar[4]) * torch.tensor([0.3], dtype=torch.float64) - 1.2 * math.sqrt(
        1 - s.abar[4]
    )
    path = [float(x)]
    for i in range(4, 0, -1):
        x = P.ddim_step(s, i, x, torch.full_like(x, -1.2), 0.0, torch.zeros_like(x))
        path.append(float(x))
    assert path[::-1] == pytest.approx(
        [0.2879849996, -0.6135222097, -1.0687008698, -1.1806228012, -1.1980699394]
    )
    assert float(
        P.ddim_step(s, 0, x, torch.full_like(x, -1.2), 0.0, torch.zeros_like(x))
    ) == pytest.approx(0.3)


def test_ddim_with_eta_1_is_ddpm():
    s = P.respaced("linear", 20)
    x, eps, z = (torch.tensor([v], dtype=torch.float64) for v in (0.1, 0.3, -0.7))
    for i in (1, 7, 19):
        found = P.ddim_step(s, i, x, eps, 1.0, z)
        assert float(found) == pytest.approx(
            float(P.ddpm_step(s, i, x, eps, "small", z)), rel=1e-9
        ), i


def test_clean_slice_is_clipped():
    s = P.respaced("linear", 5)
    assert P.predicted(s, 3, torch.tensor([9.0, -9.0]), torch.zeros(2)).tolist() == [1, -1]


def samples_of(numbers, at_once=None, **flags):
    config = replace(FAST, sampling_steps=3, **flags)
    seen = []

    def net(x, t):
        seen.append(int(t[0]))
        return 0.1 * x

    use = SimpleNamespace(config=config, device=torch.device("cpu"))
    call = type("Net", (), {"__call__": staticmethod(net), **vars(use)})()
    return np.stack([x for _, x in P.generate(call, numbers)]), seen


@pytest.mark.parametrize(
    "flags", [{"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}]
)
def test_generated_slice_depends_on_its_number_alone(flags, monkeypatch):
    together, seen = samples_of(range(5), **flags)
    assert seen == [999, 500, 0]  # the network is told the levels it was trained with
    monkeypatch.setattr(P, "AT_ONCE", 2)
    apart, _ = samples_of([3, 4], **flags)
    assert np.array_equal(together[3:], apart)
    assert not np.array_equal(together[0], together[1])


# --- losses ----------------------------------------------------------------------------------------------------------

PROBS = [(.9, .05, .05), (.8, .1, .1), (.95, .03, .02), (.7, .2, .1), (.85, .1, .05), (.4, .5, .1), (.6, .3, .1),
         (.8, .15, .05)]  # fmt: skip
TRUTH = [0, 0, 0, 0, 0, 1, 1, 2]


def example(dtype=torch.float64):
    """logits [1, 3, 1, 8] whose softmax is PROBS, and the labels."""
    logits = torch.tensor(PROBS, dtype=dtype).log().T[None, :, None].clone().requires_grad_()
    return logits, torch.tensor(TRUTH)[None, None]


def parts(kind):
    logits, label = example()
    onehot = torch.nn.functional.one_hot(label, 3).movedim(3, 1).double()
    return float(P.dice_loss(logits.softmax(1).detach(), onehot, kind))


def test_joint_dice_is_the_mean_error_of_the_true_class():
    assert parts("joint") == pytest.approx(0.3687497695, abs=1e-9)
    mean = np.mean([p[c] for p, c in zip(PROBS, TRUTH)])
    assert parts("joint") == pytest.approx(1 - mean, abs=1e-6)  # the collapse of eq. (8)


def test_joint_dice_collapses_for_any_softmax():
    prob = torch.rand(
        3, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).softmax(1)
    label = torch.randint(0, 5, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    onehot = torch.nn.functional.one_hot(label, 5).movedim(3, 1).double()
    true = prob.gather(1, label[:, None]).mean()
    assert float(P.dice_loss(prob, onehot, "joint")) == pytest.approx(float(1 - true), abs=1e-6)
    assert abs(float(P.dice_loss(prob, onehot, "joint-fg")) - float(1 - true)) > 1e-3


@pytest.mark.parametrize("kind, value", [("joint-fg", 0.6599986800), ("per-class", 0.7349129551)])
def test_other_dice_terms_have_the_values_of_the_table(kind, value):
    assert parts(kind) == pytest.approx(value, abs=1e-9)


def test_absent_organ_is_not_in_the_per_class_mean():
    prob = torch.full((1, 3, 1, 2), 1 / 3)
    onehot = torch.tensor([[1.0, 0], [0, 1.0], [0, 0]])[None, :, None]  # class 2 is not there
    assert float(P.dice_loss(prob, onehot, "per-class")) == pytest.approx(
        1 - (2 / 3 + 1e-5) / (1 + 2 / 3 + 1e-5)
    )


def test_per_class_dice_of_background_alone_is_0():
    onehot = torch.tensor([[1.0, 1], [0, 0]])[None, :, None]
    assert float(P.dice_loss(torch.full((1, 2, 1, 2), 0.5), onehot, "per-class")) == 0


@pytest.mark.parametrize(
    "kind, total",
    [("joint", 0.5463651031), ("joint-fg", 0.6919895583), ("per-class", 0.7294466959)],
)
def test_loss_is_half_cross_entropy_half_dice(kind, total):
    logits, label = example(torch.float32)
    assert float(P.segmentation_loss(logits.detach(), label, kind)) == pytest.approx(
        total, abs=1e-6
    )
    assert float(P.segmentation_loss(logits.detach(), label, kind, w=1.0)) == pytest.approx(
        0.7239804367, abs=1e-6
    )


@pytest.mark.parametrize("kind, w, slope", [("joint", 1, -0.11875), ("joint", 0, -0.0059), ("joint-fg", 0, -0.0163),
                                            ("per-class", 0, -0.0298)])  # fmt: skip
def test_gradient_of_a_confident_mistake(kind, w, slope):
    logits, label = example(torch.float32)
    P.segmentation_loss(logits, label, kind, w=w).backward()
    assert float(logits.grad[0, 2, 0, 7]) == pytest.approx(slope, abs=5e-5)


def test_losses_are_computed_in_fp32():
    logits, label = example(torch.float32)
    assert P.segmentation_loss(logits.bfloat16(), label, "joint").dtype == torch.float32


# --- learning rate, average, steps -----------------------------------------------------------------------------------


def test_learning_rate_of_pretraining_falls_linearly_to_a_tenth():
    config = P.Config()
    found = [P.learning_rate(config, s) for s in (0, 1, 75_000, 150_000, 300_000)]
    assert found == pytest.approx([2e-4, 1.999994e-4, 1.55e-4, 1.1e-4, 2e-5], rel=1e-12)
    assert P.learning_rate(config, 400_000) == pytest.approx(2e-5)
    assert P.learning_rate(replace(config, lr_schedule="const"), 150_000) == 2e-4
    assert P.learning_rate(replace(config, lr_steps=150_000), 75_000) == pytest.approx(1.1e-4)


def weight_left(updates: int, decay: float = 0.9999) -> float:
    ema, model = (
        torch.nn.Linear(1, 1, bias=False).double(),
        torch.nn.Linear(1, 1, bias=False).double(),
    )
    ema.weight.data.fill_(1.0)
    model.weight.data.fill_(0.0)
    for n in range(updates):
        P.update_ema(ema, model, decay, n)
    return float(ema.weight)


def test_average_forgets_its_start():
    assert [weight_left(n) for n in (1, 2, 10)] == pytest.approx(
        [0.1, 0.01818182, 1.082509e-5], rel=1e-6
    )


def test_average_ends_at_its_decay():
    ema, model = (
        torch.nn.Linear(1, 1, bias=False).double(),
        torch.nn.Linear(1, 1, bias=False).double(),
    )
    for n, d in ((8990, 0.999), (10_000, 0.9991009), (89_990, 0.9999), (10**6, 0.9999)):
        ema.weight.data.fill_(1.0)
        model.weight.data.fill_(0.0)
        P.update_ema(ema, model, 0.9999, n)
        assert float(ema.weight) == pytest.approx(d, abs=1e-7), n


@pytest.mark.parametrize("labels, steps", [(4, 1000), (39, 10_000), (388, 10_000), (3879, 30_000)])
def test_steps_of_finetuning_are_the_papers(labels, steps):
    assert P.fine_steps("paper", labels, 3879) == steps


# --- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c, channels, parameters", [(128, (1, 1), 138_281_857), (256, (1, 1), 552_797_953),
                                                     (256, (3, 6), 552_814_086)])  # fmt: skip
def test_network_has_the_parameters_of_the_table(c, channels, parameters):
    with torch.device("meta"):
        assert count(P.build_model(P.Config(num_channels=c), *channels)) == parameters


@pytest.mark.parametrize("c, counts", [
    (128, [328_704, 40_884_480, 11_545_600, 85_521_664, 1_409]),
    (256, [1_312_768, 163_426_816, 46_159_872, 341_895_680, 2_817]),
])  # fmt: skip
def test_parts_of_the_network_have_the_parameters_of_the_table(c, counts):
    with torch.device("meta"):
        model = P.UNet(P.Config(num_channels=c), 1, 1)
    parts = (
        model.time_embed,
        model.input_blocks,
        model.middle_block,
        model.output_blocks,
        model.out,
    )
    assert [count(part) for part in parts] == counts
    emb = sum(p.numel() for k, p in model.named_parameters() if "emb_layers" in k)
    assert emb == {128: 13_264_128, 256: 53_004_800}[c]


@pytest.mark.parametrize("c, parameters", [(128, 124_689_025), (256, 498_480_385)])
def test_plain_network_has_nothing_of_time(c, parameters):
    with torch.device("meta"):
        model = P.UNet(P.Config(num_channels=c), 1, 1, timed=False)
    assert count(model) == parameters
    assert not [k for k in model.state_dict() if "time" in k or "emb" in k]


def test_network_of_ho_et_al_has_the_parameters_of_the_table():
    with torch.device("meta"):
        model = P.UNet(P.Config(arch="ddpm"), 1, 1)
    assert count(model) == 113_668_609
    sides = []
    for m in model.modules():
        if isinstance(m, P.AttentionBlock):
            assert m.heads == 1
            m.register_forward_hook(lambda _, x, y: sides.append(y.shape[-1]))
    with torch.device("meta"):
        model(torch.empty(1, 1, 256, 256), torch.zeros(1))
    assert sides == [
        16,
        16,
        8,
        16,
        16,
        16,
    ]  # two blocks of the encoder, the middle, three of the decoder


def test_decoder_blocks_have_the_sizes_of_the_table():
    with torch.device("meta"):
        model = P.UNet(P.Config(num_channels=32), 1, 1)
        maps = model.decode(
            *model.encode(torch.empty(1, 1, 256, 256), torch.zeros(1)), tuple(range(18))
        )
    found = [(m.shape[1] // 32, m.shape[2]) for m in maps]
    assert (
        found
        == [(4, 8)] * 2
        + [(4, 16)] * 3
        + [(4, 32)]
        + [(2, 32)] * 2
        + [(2, 64)] * 3
        + [(2, 128)]
        + [(1, 128)] * 2
        + [(1, 256)] * 4
    )


def test_attention_is_where_the_sides_say():
    with torch.device("meta"):
        model = P.UNet(P.Config(), 1, 1)
    at = [
        k
        for k, block in enumerate(model.input_blocks)
        if any(isinstance(b, P.AttentionBlock) for b in block)
    ]
    assert at == [10, 11, 13, 14, 16, 17]
    at = [
        k
        for k, block in enumerate(model.output_blocks)
        if any(isinstance(b, P.AttentionBlock) for b in block)
    ]
    assert at == list(range(9))


def test_laptop_network_has_the_parameters_of_the_plan():
    with torch.device("meta"):
        assert count(P.UNet(P.Config(**P.PRESETS["laptop"]), 1, 1)) == 3_317_921


def test_a_fresh_network_predicts_nothing():
    model = P.build_model(FAST, 1, 1)
    assert float(model(torch.randn(2, 1, 16, 16), torch.tensor([3, 900])).detach().abs().max()) == 0


def test_time_reaches_the_output_and_not_that_of_the_plain_network():
    x = torch.randn(1, 1, 16, 16)
    model, plain = randomised(P.UNet(FAST, 1, 1)), randomised(P.UNet(FAST, 1, 1, timed=False))
    assert (
        float((model(x, torch.tensor([0])) - model(x, torch.tensor([500]))).detach().abs().max())
        > 1e-3
    )
    assert torch.equal(plain(x, torch.tensor([0])), plain(x, torch.tensor([500])))


@pytest.mark.parametrize("arch", ["adm", "ddpm"])
def test_recompute_gives_the_same_gradients(arch):
    x, t, found = torch.randn(1, 1, 16, 16), torch.tensor([7]), []
    for recompute in (False, True):
        model = randomised(P.UNet(replace(FAST, arch=arch, recompute=recompute), 1, 1)).train()
        model(x, t).square().sum().backward()
        found.append(model.input_blocks[0][0].weight.grad)
    torch.testing.assert_close(*found)


# --- fine-tuning: what is trained -------------------------------------------------------------------------------------

HEAD = {"linear": 297_486, "decoder": 85_819_150, "full": 138_577_934, "scratch": 124_985_102}
WIDER = {("decoder", "M"): 86_411_534, ("decoder", "L"): 343_080_462, ("full", "M"): 139_170_318}
WIDER |= {("full", "L"): 553_979_918, ("scratch", "M"): 125_577_486, ("scratch", "L"): 499_662_350}
WIDER |= {("linear", "M"): 889_870, ("linear", "L"): 1_184_782}


@pytest.mark.parametrize("strategy, variant, trained", [*((s, "S", n) for s, n in HEAD.items()),
                                                       *((*k, n) for k, n in WIDER.items())])  # fmt: skip
def test_trained_parameters_are_those_of_the_table(strategy, variant, trained):
    config = P.Config(
        strategy=strategy, variant=variant, num_channels=256 if variant == "L" else 128
    )
    with torch.device("meta"):
        assert count(P.Segmenter(config, 1, 14)) == trained


def segmenter(strategy, **flags):
    return randomised(P.Segmenter(replace(FAST, strategy=strategy, **flags), 1, 3))


def test_the_head_fits_a_first_level_wider_than_c():
    assert segmenter("decoder", channel_mult=(2, 2))(torch.randn(1, 1, 16, 16)).shape == (
        1,
        3,
        16,
        16,
    )


def test_trained_sets_by_name():
    def names(strategy):
        found = {
            k.split(".")[0] + "." + k.split(".")[1]
            for k, p in segmenter(strategy).named_parameters()
            if p.requires_grad
        }
        return {k if k.startswith("net") else "head" for k in found}

    assert names("linear") == {"head"}
    assert names("decoder") == {"head", "net.output_blocks"}
    assert names("full") == {
        "head",
        "net.output_blocks",
        "net.input_blocks",
        "net.middle_block",
        "net.time_embed",
    }
    assert names("scratch") == {"head", "net.output_blocks", "net.input_blocks", "net.middle_block"}


@pytest.mark.parametrize("strategy", ["linear", "decoder", "full", "scratch"])
def test_a_step_changes_what_is_trained_and_not_a_bit_of_the_rest(strategy):
    model = segmenter(strategy).train()
    optimizer = P.make_optimizer("finetune", replace(FAST, lr=1e-2), model)
    before = copy.deepcopy(model.state_dict())
    loss = P.segmentation_loss(
        model(torch.randn(2, 1, 16, 16)), torch.randint(0, 3, (2, 16, 16)), "joint"
    )
    loss.backward()
    optimizer.step()
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    for k, v in model.state_dict().items():
        if "running" in k or "num_batches" in k:
            continue
        assert torch.equal(v, before[k]) == (k not in trained), k


def test_head_starts_alike_with_every_strategy():
    record = RECORD | {"label_values": {}}
    heads = [
        P.network_for("finetune", replace(FAST, strategy=s), record).head
        for s in ("scratch", "decoder", "linear")
    ]
    for other in heads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), other.parameters()))


def test_frozen_parts_stay_in_eval_mode():
    model = segmenter("decoder").train()
    assert (
        not model.net.input_blocks.training
        and not model.net.middle_block.training
        and not model.net.time_embed.training
    )
    assert model.net.output_blocks.training and model.head.training
    assert not segmenter("linear").train().net.output_blocks.training


@pytest.mark.parametrize(
    "strategy, encoder, decoder", [("linear", 0, 0), ("decoder", 0, 1), ("full", 1, 1)]
)
def test_frozen_parts_run_without_gradient(strategy, encoder, decoder):
    model, seen = segmenter(strategy).train(), {}
    model.net.middle_block.register_forward_hook(
        lambda m, i, o: seen.update(encoder=int(o.requires_grad))
    )
    model.net.output_blocks[-1].register_forward_hook(
        lambda m, i, o: seen.update(decoder=int(o.requires_grad))
    )
    model(torch.randn(1, 1, 16, 16))
    assert seen == {"encoder": encoder, "decoder": decoder}


def test_optimiser_has_the_papers_rates_and_decays():
    model = segmenter("decoder")
    optimizer = P.make_optimizer("finetune", FAST, model)
    head, rest = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam  # L2, not AdamW's decay
    assert (head["scale"], head["weight_decay"], rest["scale"], rest["weight_decay"]) == (
        10,
        1e-3,
        1,
        1e-4,
    )
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.net.output_blocks.parameters()}
    assert len(P.make_optimizer("finetune", FAST, segmenter("linear")).param_groups) == 1


def test_time_of_the_frozen_network_is_what_the_flag_says():
    assert [replace(FAST, strategy=s).time for s in ("decoder", "full", "linear")] == [0, 0, 200]
    x = torch.randn(1, 1, 16, 16)
    a, b, c = (segmenter("decoder", t=t).eval()(x) for t in (0, 500, 1000))
    assert not torch.allclose(a, b) and torch.isfinite(c).all()


def test_head_reads_the_last_decoder_block_itself():
    model = segmenter("full").eval()
    x, t = torch.randn(1, 1, 16, 16), torch.zeros(1)
    raw = model.net.decode(*model.net.encode(x, t))[0]
    torch.testing.assert_close(model(x), model.head(raw))


def test_synced_norm_is_batch_norm_on_one_process():
    norm, plain = P.SyncedNorm(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(norm.train()(x), plain.train()(x)) and torch.equal(
        norm.running_var, plain.running_var
    )


def test_four_slices_are_overfitted():
    torch.manual_seed(0)
    data = loaders.CtPhantoms(0, side=32)
    config = replace(TINY, strategy="scratch", lr=3e-3, dice="per-class", steps=80)
    slices = P.labelled_slices(data, config)[0]
    x = torch.from_numpy(P.stack(data, slices))[:, None, 8:24, 8:24]
    label = torch.from_numpy(
        np.stack([data.slice_label(*at) for at in slices])[:, 8:24, 8:24].astype(np.int64)
    )
    model = P.network_for("finetune", config, loaders.data_record(data)).train()
    optimizer = P.make_optimizer("finetune", config, model)
    for step in range(80):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * P.learning_rate(config, step)
        optimizer.zero_grad()
        loss = P.segmentation_loss(model(x), label, config.dice)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.15  # 1.3 at the start


# --- label subsets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, total, n", [("4", 3879, 4), ("39", 3879, 39), ("all", 3879, 3879), ("0.1%", 3879, 4),
                                            ("1%", 3879, 39), ("10%", 3879, 388), ("0.01%", 3879, 1)])  # fmt: skip
def test_label_count_of_a_flag(text, total, n):
    assert P.label_count(text, total) == n


def test_more_labels_than_there_are_is_one_line():
    with pytest.raises(InputError, match="--labels 40: there are 39 labelled"):
        P.label_count("40", 39)


def test_subsets_are_nested_covering_and_a_function_of_the_draw():
    data = loaders.CtPhantoms(0, side=32)
    sets = {n: P.labelled_slices(data, replace(TINY, labels=n))[0] for n in ("4", "39", "all")}
    assert [len(s) for s in sets.values()] == [4, 39, 144]
    assert (
        sets["all"][:39] == sets["39"]
        and sets["39"][:4] == sets["4"]
        and len(set(sets["all"])) == 144
    )
    counts = np.stack(
        [np.bincount(data.slice_label(*at).ravel(), minlength=5)[1:] for at in sets["4"]]
    )
    assert (counts >= 1).any(0).all()
    assert P.labelled_slices(data, replace(TINY, labels="4"))[0] == sets["4"]
    assert P.labelled_slices(data, replace(TINY, labels="4", draw=1))[0] != sets["4"]
    assert {case for case, _ in sets["all"]} <= set(data.cases("train"))


def test_four_slices_show_twenty_pixels_of_each_organ_where_there_are_such():
    data = loaders.CtPhantoms(0, side=64)
    slices, _, warnings = P.labelled_slices(data, replace(TINY, size=64))
    counts = np.stack(
        [np.bincount(data.slice_label(*at).ravel(), minlength=5)[1:] for at in slices]
    )
    assert (counts >= 20).any(0).all() and not warnings


def test_cover_wants_twenty_pixels_before_one():
    counts = np.zeros((30, 2), int)
    counts[:20, 0] = 500
    counts[20:29, 1] = 3  # seen, but hardly
    counts[29, 1] = 25
    for seed in range(5):
        chosen, missing = P.cover(counts, 4, np.random.default_rng(seed))
        assert 29 in chosen and not missing


def test_cover_takes_one_pixel_where_there_are_no_twenty():
    counts = np.zeros((10, 2), int)
    counts[:5, 0], counts[7, 1] = 500, 3
    chosen, missing = P.cover(counts, 4, np.random.default_rng(0))
    assert 7 in chosen and not missing and len(set(chosen)) == 4


def test_cover_names_what_four_slices_cannot_show():
    counts = np.eye(6, dtype=int) * 50
    chosen, missing = P.cover(counts, 4, np.random.default_rng(0))
    assert len(set(chosen)) == 4 and len(missing) == 2 and not set(missing) & set(chosen)


def toy(labels, classes=("a", "b")):
    """Labelled slices [H, W] each as a case of one slice."""
    names = [f"c{i}" for i in range(len(labels))]
    return SimpleNamespace(
        name="toy", classes={c: i + 1 for i, c in enumerate(classes)}, cases=lambda split: names, depth=lambda case: 1,
        has_label=lambda case: True, slice_label=lambda case, k: labels[names.index(case)],
    )  # fmt: skip


def test_organs_that_do_not_fit_into_four_slices_are_refused_by_name():
    labels = [np.full((8, 8), i + 1, np.uint8) for i in range(6)]
    with pytest.raises(
        InputError, match=r"no 4 slices of toy were found that show all organs, \w, \w would"
    ):
        P.labelled_slices(toy(labels, "abcdef"), TINY)


def test_organ_of_no_training_slice_is_named():
    labels = [np.full((8, 8), 1, np.uint8)] * 5
    assert P.labelled_slices(toy(labels), TINY)[2] == [
        "no training slice holds b; it will not be learnt"
    ]


def test_fewer_than_four_labels_show_what_they_can_and_say_the_rest():
    labels = [np.full((8, 8), i % 2 + 1, np.uint8) for i in range(6)]
    slices, total, warnings = P.labelled_slices(toy(labels), replace(TINY, labels="1"))
    assert (
        len(slices) == 1
        and total == 6
        and len(warnings) == 1
        and warnings[0].startswith("1 slices do not show")
    )


# --- training samples ------------------------------------------------------------------------------------------------


def dataset(**flags):
    data = loaders.CtPhantoms(0, side=32)
    return P.Samples(data, replace(TINY, **flags), P.pretraining_slices(data)[:10], False), data


def test_an_epoch_shows_each_slice_once():
    slices, data = dataset(flip="off")
    seen = np.stack([slices[n][0] for n in range(10)])
    every = np.stack([data.slice(*at)[None] for at in slices.slices])
    order = [int(np.abs(every - x).sum((1, 2, 3)).argmin()) for x in seen]
    assert sorted(order) == list(range(10)) and all(
        np.array_equal(every[i], x) for i, x in zip(order, seen)
    )


def test_sample_is_a_function_of_its_number():
    a, b = dataset()[0], dataset()[0]
    b[25]  # another order of questions
    for n in (3, 17):
        assert all(np.array_equal(x, y) for x, y in zip(a[n], b[n]))


def test_half_of_the_slices_are_mirrored_left_and_right():
    slices, _ = dataset(flip="on")
    plain, _ = dataset(flip="off")
    mirrored = [not np.array_equal(slices[n][0], plain[n][0]) for n in range(80)]
    assert 25 < sum(mirrored) < 55
    n = mirrored.index(True)
    assert np.array_equal(slices[n][0], plain[n][0][..., ::-1])


def test_levels_are_uniform():
    t = np.array([dataset()[0][n][2] for n in range(300)])
    assert t.min() < 30 and t.max() > 970 and abs(t.mean() - 499.5) < 60


def test_labelled_slices_are_not_mirrored():
    data = loaders.CtPhantoms(0, side=32)
    at = (
        ("phantom_0048", 5)
        if "phantom_0048" in data.cases("train")
        else (data.cases("train")[0], 5)
    )
    slices = P.Samples(data, TINY, [at], True)
    for n in range(6):
        x0, label, t, _ = slices[n]
        assert (
            np.array_equal(x0[0], data.slice(*at))
            and np.array_equal(label, data.slice_label(*at))
            and t == 0
        )


# --- windows and features --------------------------------------------------------------------------------------------


def test_hounsfield_units_have_the_values_of_the_table():
    assert P.hounsfield(np.array([-1, -0.5, 0, 0.25, 1]), RECORD).tolist() == [
        -1024,
        -668,
        -312,
        -134,
        400,
    ]


def test_windows_have_the_values_of_the_table():
    x = np.array([-1.0, -0.2640449438, 0.4943820225, 0.7191011236])  # -1024, -500, 40, 200 HU
    shown = P.display(x, RECORD)
    assert shown["lung"].tolist() == [32, 128, 226, 255] and shown["abdomen"].tolist() == [
        0,
        0,
        128,
        244,
    ]


def test_mr_has_one_window():
    shown = P.display(np.array([-1.0, 0, 1]), {"normalisation": {"kind": "percentile-slices"}})
    assert {k: v.tolist() for k, v in shown.items()} == {"mr": [0, 128, 255]}


def test_random_features_are_fixed_and_of_the_stated_size():
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features, spatial = P.RandomFeatures()(x)
    assert features.shape == (2, 768) and spatial.shape == (2, 128 * 16)
    again, _ = P.RandomFeatures()(x)
    assert torch.equal(features, again)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(32, 1, 3, 3, generator=generator) * math.sqrt(2 / 9)
    second = torch.randn(64, 32, 3, 3, generator=generator) * math.sqrt(2 / (9 * 32))
    assert torch.equal(P.RandomFeatures().weights[0], first) and torch.equal(
        P.RandomFeatures().weights[1], second
    )
    assert P.RandomFeatures()(torch.zeros(1, 1, 256, 256))[1].shape == (1, 8 * 256)


def test_random_features_are_means_and_deviations_of_the_last_two_maps():
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    network, maps = P.RandomFeatures(), []
    h = x
    for weight in network.weights:
        h = torch.nn.functional.leaky_relu(
            torch.nn.functional.conv2d(h, weight, stride=2, padding=1), 0.2
        )
        maps.append(h[0].flatten(1))
    expected = torch.cat(
        [
            maps[2].mean(1),
            maps[2].std(1, correction=0),
            maps[3].mean(1),
            maps[3].std(1, correction=0),
        ]
    )
    torch.testing.assert_close(network(x)[0][0], expected)


def test_yardstick_is_the_error_of_the_best_guess_from_a_pixel():
    data = SimpleNamespace(meta={"splits": {"val": ["a"], "train": ["a"]}}, depth=lambda case: 1,
                           slice=lambda case, k: np.array([[0.5, -0.5]], np.float32))  # fmt: skip
    assert (
        P.yardstick(data, "linear")
        == "0.8897 at t 50, 0.6809 at t 100, 0.1398 at t 300, 0.0207 at t 500"
    )


# --- DDPM-Seg --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c, parameters", [(256, 1_086_382), (128, 545_710)])
def test_pixel_classifier_has_the_parameters_of_the_table(c, parameters):
    with torch.device("meta"):
        model = P.PixelEnsemble(P.Config(num_channels=c, members=1), 1, 14)
    assert count(model.members[0]) == parameters and sum(model.widths) == {256: 8448, 128: 4224}[c]


def ensemble(**flags):
    return randomised(
        P.PixelEnsemble(replace(FAST, t_list=(50, 250), members=3, **flags), 1, 3)
    ).eval()


def test_features_are_of_one_noise_image_at_all_times():
    model, x = ensemble(), torch.randn(2, 1, 16, 16)
    maps = model.maps(x)
    assert [m.shape[1] for m in maps] == model.widths
    eps = P.noise(0, "ddpmseg", ["shared"], (1, 16, 16), torch.device("cpu"))
    t = torch.full((2,), 250)
    again = model.net.decode(*model.net.encode(P.q_sample(x, eps, t, "linear"), t), (1, 3))
    torch.testing.assert_close(maps[2:], again)


def test_votes_are_those_of_the_members():
    model, x = ensemble(), torch.randn(2, 1, 16, 16)
    maps, votes = model.maps(x), model(x)
    large = torch.cat(
        [torch.nn.functional.interpolate(m, (16, 16), mode="bilinear") for m in maps], 1
    )
    vectors = large[1].flatten(1).T  # of the second slice
    chosen = torch.stack(
        [m.rest(m.first(vectors)).argmax(1) for m in model.members]
    )  # [members, H W]
    expected = torch.stack([(chosen == c).float().mean(0) for c in range(3)])
    torch.testing.assert_close(votes[1].flatten(1), expected)
    assert float((votes.sum(1) - 1).abs().max()) < 1e-6


def store_of(pixels: int, tmp_path):
    store = P.FeatureStore(tmp_path / "f.npy", 1, (1, pixels))
    store.add([torch.randn(1, 3, 1, pixels, generator=torch.Generator().manual_seed(0))], 1.0,
              np.arange(pixels)[None] % 2)  # fmt: skip
    return store


def test_features_of_all_slices_lie_in_a_file_and_no_memory_grows_with_them(tmp_path):
    peaks = []
    for count in (2, 20):
        store = P.FeatureStore(tmp_path / f"{count}.npy", count, (32, 32))
        tracemalloc.start()
        for _ in range(count):
            store.add(
                [torch.zeros(1, 500, 16, 16), torch.zeros(1, 500, 8, 8)],
                1.0,
                np.arange(1024).reshape(32, 32) % 2,
            )
        found = store.gather(np.arange(count * 1024)[:: count * 16])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (
            found.shape == (64, 1000)
            and (tmp_path / f"{count}.npy").stat().st_size > count * 2 * 500 * 320
        )
    assert peaks[1] < peaks[0] + 16 * 20 * 1024, (
        peaks
    )  # numbers and classes of the pixels, not their 6 MB of features


def test_features_that_do_not_fit_the_disk_are_refused_before_they_are_written(
    tmp_path, monkeypatch
):
    def full(handle, offset, size):
        assert size > 3 * 8 * 16 * 16 * 2
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    store = P.FeatureStore(tmp_path / "f.npy", 3, (16, 16))
    with pytest.raises(OSError, match=r"f\.npy"):
        store.add([torch.zeros(1, 8, 16, 16)], 1.0, np.zeros((16, 16)))


@pytest.mark.parametrize(
    "losses, steps",
    [([1.0], 8 + 1 + 51), ([1.0] * 58 + [0.5], 8 + 51 + 51), ([0.1] * 8 + [1.0], 60)],
)
def test_classifier_stops_after_fifty_steps_that_were_not_better(
    losses, steps, tmp_path, monkeypatch
):
    """Two steps an epoch; the first eight, of four epochs, do not count."""
    seen = []

    def scripted(logits, label):
        seen.append(len(label))
        return logits.sum() * 0 + losses[min(len(seen) - 1, len(losses) - 1)]

    monkeypatch.setattr(P.F, "cross_entropy", scripted)
    P.fit_member(replace(FAST, epochs=100, quiet=True), store_of(150, tmp_path), 2, 0)
    assert len(seen) == steps and set(seen) == {64}


def test_classifier_ends_with_its_epochs(tmp_path, monkeypatch):
    calls, plain = [], P.F.cross_entropy
    monkeypatch.setattr(P.F, "cross_entropy", lambda *a: (calls.append(1), plain(*a))[1])
    P.fit_member(replace(FAST, epochs=3, quiet=True), store_of(150, tmp_path), 2, 0)
    assert len(calls) == 6


# --- what a mistake would leave unseen elsewhere ----------------------------------------------------------------------


def test_respaced_levels_round_halves_to_even():
    assert P.respaced("linear", 7).t.tolist() == [0, 166, 333, 500, 666, 832, 999]


def test_each_sampling_step_draws_its_own_noise_from_the_seed(monkeypatch):
    plain, seen = P.noise, []
    monkeypatch.setattr(
        P, "noise", lambda seed, name, *a: seen.append((seed, name)) or plain(seed, name, *a)
    )
    samples_of([0, 1], sampler="ddpm", seed=5)
    assert seen == [(5, "sample"), (5, "sample 2"), (5, "sample 1")]


@pytest.mark.parametrize("kind", ["joint", "joint-fg", "per-class"])
def test_dice_sums_go_over_the_whole_batch(kind):
    g = torch.Generator().manual_seed(0)
    prob = torch.rand(3, 4, 5, 5, generator=g).mul(3).softmax(1)
    label = torch.randint(0, 4, (3, 5, 5), generator=g)
    label[0] = label[0].clamp(max=1)  # organs unevenly spread over the batch
    onehot = torch.nn.functional.one_hot(label, 4).movedim(3, 1).float()
    one = [
        v.movedim(1, 0).flatten(1)[None, :, None] for v in (prob, onehot)
    ]  # one slice [1, C, 1, B H W]
    assert float(P.dice_loss(prob, onehot, kind)) == pytest.approx(
        float(P.dice_loss(*one, kind)), abs=1e-6
    )


def test_cover_counts_twenty_pixels_as_enough_and_nineteen_not():
    counts = np.zeros((30, 2), int)
    counts[:20, 0], counts[20:29, 1], counts[29, 1] = 500, 19, 20
    assert all(29 in P.cover(counts, 4, np.random.default_rng(seed))[0] for seed in range(5))


def test_whole_order_is_a_function_of_the_draw():
    data = loaders.CtPhantoms(0, side=32)
    every = {at: i for i, at in enumerate(P.slices_of(data, data.cases("train")))}
    a, b = (
        np.array(
            [every[at] for at in P.labelled_slices(data, replace(TINY, labels="39", draw=d))[0][4:]]
        )
        for d in (0, 1)
    )
    assert np.abs(a - b).max() > 20


def test_epochs_and_seeds_have_their_own_order():
    def order(seed, epoch):
        slices, _ = dataset(flip="off", seed=seed)
        return [slices[n][0].tobytes() for n in range(10 * epoch, 10 * epoch + 10)]

    assert (
        order(0, 0) != order(0, 1)
        and order(0, 0) != order(1, 0)
        and sorted(order(0, 0)) == sorted(order(0, 1))
    )


def test_both_ends_of_the_levels_are_drawn():
    slices, _ = dataset()
    slices.data = SimpleNamespace(slice=lambda *at: np.zeros((1, 1), np.float32))
    t = [slices[n][2] for n in range(8000)]
    assert min(t) == 0 and max(t) == 999


def test_spatial_features_are_the_first_channels_of_the_last_map():
    x, network = (
        torch.randn(2, 1, 128, 128, generator=torch.Generator().manual_seed(1)),
        P.RandomFeatures(),
    )
    h = x
    for weight in network.weights:
        h = torch.nn.functional.leaky_relu(
            torch.nn.functional.conv2d(h, weight, stride=2, padding=1), 0.2
        )
    torch.testing.assert_close(network(x)[1], h[:, :32].flatten(1))


def one_case(split):
    return {"val": ["a"]}[split]


def test_held_out_slices_are_of_validation_cases():
    splits, asked = (
        {"val": ["v"], "train": ["a"], "unlabelled": ["a", "u"], "pretrain": ["a"]},
        set(),
    )
    data = SimpleNamespace(meta={"splits": splits}, depth=lambda case: 3,
                           slice=lambda case, k: asked.add(case) or np.full((16, 16), k / 4, np.float32))  # fmt: skip
    net = randomised(P.UNet(FAST, 1, 1))
    run = SimpleNamespace(device=torch.device("cpu"), dtype=None, ema=net, model=net, config=FAST)
    assert len(P.held_losses(run, data)) == 5
    assert P.yardstick(data, "linear") and asked == {"v"}
    splits["val"] = []  # as FLARE22 is prepared: an unlabelled scan that is not pre-trained on
    assert P.held_out(data) == ["u"] and len(P.held_losses(run, data)) == 5 and asked == {"v", "u"}


def test_select_val_looks_at_val_and_scores_best(monkeypatch, tmp_path):
    data, cases, used = loaders.CtPhantoms(0, side=16), [], []

    def fake(net, data, todo, ranks, *a):
        cases.append(todo)
        dice = 0.9 if len(cases) == 1 else 0.1  # the first look is the best
        return [{"case": c, "class": "liver", "dice": dice} for c in todo], []

    monkeypatch.setattr(P, "score_cases", fake)
    monkeypatch.setattr(P.metrics, "over_classes", lambda rows: {"dice": rows[0]["dice"]})
    monkeypatch.setattr(P, "evaluate", lambda config, *a: used.append(config.checkpoint) or 0)
    config = replace(
        FAST,
        strategy="scratch",
        select="val",
        steps=4,
        eval_every=2,
        out=str(tmp_path),
        quiet=True,
        lr=1e-3,
    )
    stop = SimpleNamespace(agreed=lambda ranks, up: (0, up), restore=lambda: None)
    assert P.finetune(P.with_labels(config, data, {"steps": 4}), data, RANKS, stop) == 0
    assert cases == [data.cases("val")] * 2 and used[0].endswith("best.pt")
    assert runtime.load_checkpoint(config.finetune_folder / "best.pt", P.SCRIPT)["step"] == 2


def test_skips_follow_the_map_in_the_concatenation():
    model, seen = randomised(P.UNet(FAST, 1, 1)), {}
    model.middle_block.register_forward_hook(lambda m, i, o: seen.update(middle=o))
    model.output_blocks[0].register_forward_pre_hook(lambda m, i: seen.update(first=i[0]))
    model(torch.randn(1, 1, 16, 16), torch.tensor([3]))
    width = seen["middle"].shape[1]
    assert torch.equal(seen["first"][:, :width], seen["middle"])


def two_halves(tmp_path):
    store = P.FeatureStore(tmp_path / "f.npy", 2, (16, 16))
    label = np.zeros((16, 16), np.uint8)
    label[:, 8:] = 1
    for _ in range(2):
        sign = torch.from_numpy(np.where(label, 1.0, -1.0)).float()[None, None]
        store.add([sign.expand(1, 3, 16, 16) + 0.3 * torch.randn(1, 3, 16, 16)], 1.0, label)
    return store


def test_member_learns_the_labels_of_its_pixels_and_differs_from_the_next(tmp_path):
    torch.manual_seed(0)
    store, config = two_halves(tmp_path), replace(FAST, quiet=True, epochs=12)
    members = [P.fit_member(config, store, 2, i) for i in (0, 1)]
    vectors = torch.from_numpy(store.gather(np.arange(512)))
    with torch.no_grad():
        found = [m.rest(m.first(vectors)) for m in members]
    assert float((found[0].argmax(1).numpy() == store.label).mean()) > 0.97
    assert not torch.allclose(*found)


def test_member_stops_51_steps_after_its_best_of_the_fifth_epoch_on(tmp_path, monkeypatch):
    store, steps, rates = two_halves(tmp_path), [], set()
    monkeypatch.setattr(P.F, "cross_entropy", lambda x, y: 0 * x.sum() + 1.0)
    counted = lambda self: (steps.append(1), rates.add(self.param_groups[0]["lr"]))  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    P.fit_member(replace(FAST, quiet=True, epochs=100), store, 2, 0)
    assert len(steps) == 4 * (512 // 64) + 1 + 51 and rates == {1e-3}


def test_slice_rows_hold_what_is_in_truth_or_prediction():
    mask, truth = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    mask[0, 0, 0], truth[1, 1, 1] = 1, 1
    assert [(r["slice"], r["dice"]) for r in P.slice_rows("c", mask, truth, {"a": 1})] == [
        (0, 0.0),
        (1, 0.0),
    ]


def test_mask_lies_on_the_prepared_grid():
    data = loaders.CtPhantoms(0, side=16)
    case = data.cases("test")[0]
    net = P.Network(FAST, lambda x, t: torch.cat([-x, x], 1), torch.device("cpu"), None)
    low, high = (data.meta["normalisation"][k] for k in ("low", "high"))
    assert np.array_equal(P.segment_case(net, data, case), data.image(case)[0] > (low + high) / 2)


def test_samples_come_from_the_averaged_weights_or_the_last(tmp_path):
    data = loaders.CtPhantoms(0, side=16)
    config = replace(FAST, out=str(tmp_path))
    run = P.Training("pretrain", config, loaders.data_record(data), torch.device("cpu"), None)
    randomised(run.model, 1), randomised(run.ema, 2)
    tmp_path.mkdir(exist_ok=True)
    run.save()
    for which, weights in (("ema", run.ema), ("raw", run.model)):
        net, _ = P.load_network(replace(config, init_weights=which), "pretrain", RANKS)
        assert all(
            torch.equal(a, b) for a, b in zip(net.model.parameters(), weights.parameters())
        ), which


def step_of(stage, monkeypatch, **flags):
    data = loaders.CtPhantoms(0, side=16)
    config = replace(FAST, batch=2, steps=100, **flags)
    run = P.Training(stage, config, loaders.data_record(data), torch.device("cpu"), None)
    slices = P.Samples(
        data,
        config,
        P.pretraining_slices(data)[:4]
        if stage == "pretrain"
        else P.labelled_slices(data, config)[0],
        stage != "pretrain",
    )
    batches = iter(torch.utils.data.DataLoader(slices, batch_sampler=P.Sharded(config, RANKS, 0)))
    for _ in range(2):
        P.train_step(run, run.model, batches, RANKS, runtime.LossByTime(P.T, run.device))
    return run


def test_a_step_uses_rates_noise_and_average_of_its_number(monkeypatch):
    numbers, updates, plain, average = [], [], P.noise, P.update_ema
    monkeypatch.setattr(
        P, "noise", lambda seed, name, ns, *a: numbers.append(ns) or plain(seed, name, ns, *a)
    )
    monkeypatch.setattr(P, "update_ema", lambda *a: updates.append(a[-1]) or average(*a))
    run = step_of("pretrain", monkeypatch, lr=1e-3)
    assert numbers == [[0, 1], [2, 3]] and updates == [0, 1]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - 0.9 / 100))
    head, rest = step_of(
        "finetune", monkeypatch, lr=1e-3, ema=0.0, strategy="decoder", dice="joint"
    ).optimizer.param_groups
    assert head["lr"] == pytest.approx(1e-2 * (1 - 0.9 / 100)) and rest["lr"] == pytest.approx(
        1e-3 * (1 - 0.9 / 100)
    )


def test_noise_of_a_level_that_is_not_trained_is_refused():
    assert replace(FAST, t=1000).time == 1000  # the last column of the paper's table 2
    with pytest.raises(InputError, match="--input noised has no level t = 1000, the last is 999"):
        replace(FAST, t=1000, input="noised")


def test_noised_input_is_that_of_the_level_and_always_the_same():
    torch.manual_seed(0)
    model = segmenter("decoder", t=500, input="noised").eval()
    clean = segmenter("decoder", t=500).eval()
    clean.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 16, 16)
    eps = P.noise(0, "input", ["shared"], (1, 16, 16), torch.device("cpu"))
    xt = math.sqrt(0.077796658365) * x + math.sqrt(1 - 0.077796658365) * eps
    torch.testing.assert_close(model(x), clean(xt), rtol=1e-4, atol=1e-4)


def test_memory_of_noised_input_is_that_of_clean_input(monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 1e-6)
    for flags in ({}, {"input": "noised", "t": 500}):
        with pytest.raises(InputError) as error:
            P.check_memory(
                "finetune", replace(FAST, strategy="decoder", batch=4, **flags), RECORD, RANKS
            )
        asked.append(str(error.value))
    assert asked[0] == asked[1] and "need about" in asked[0]


def test_memory_holds_weights_average_gradients_and_moments(monkeypatch):
    monkeypatch.setattr(runtime, "free_memory_gb", lambda device: 1e-6)
    config = P.Config(size=64, batch=1)
    with torch.device("meta"):
        weights = count(P.UNet(config, 1, 1))
    with pytest.raises(InputError) as error:
        P.check_memory("pretrain", config, RECORD, RANKS)
    found = float(str(error.value).split("about ")[1].split()[0])
    assert 20e-9 * weights < found < 20e-9 * weights + 0.4, (weights, found)


def middle(model, x, t) -> torch.Tensor:
    """What comes out of the network's lowest level."""
    found = []
    handle = model.net.middle_block.register_forward_hook(
        lambda module, args, out: found.append(out)
    )
    with torch.no_grad():
        model.net(x, torch.full((len(x),), t))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("init, linear", [("", True), ("none", False)])
def test_control_of_random_weights_is_no_linear_map_and_sees_the_time(init, linear):
    """A network that is to be loaded may begin with branches of zero; one that stays as it is must not."""
    torch.manual_seed(0)
    model = P.Segmenter(replace(FAST, strategy="decoder", init=init), 1, 3).eval()
    x, y = torch.randn(2, 1, 1, 16, 16)
    gap = (
        middle(model, x, 0)
        + middle(model, y, 0)
        - middle(model, x + y, 0)
        - middle(model, 0 * x, 0)
    )
    assert (gap.abs().max() < 1e-4) == linear
    assert ((middle(model, x, 0) - middle(model, x, 900)).abs().max() < 1e-6) == linear


def test_member_learns_the_label_of_the_very_pixel(tmp_path):
    torch.manual_seed(0)
    store, rng = P.FeatureStore(tmp_path / "f.npy", 1, (32, 32)), np.random.default_rng(0)
    label = rng.integers(0, 2, (32, 32)).astype(np.uint8)
    store.add(
        [torch.from_numpy(2.0 * label - 1).float()[None, None].expand(1, 3, 32, 32)], 1.0, label
    )
    member = P.fit_member(replace(FAST, quiet=True, epochs=12), store, 2, 0)
    found = member.rest(member.first(torch.from_numpy(store.gather(np.arange(1024))))).argmax(1)
    assert float((found.numpy() == store.label).mean()) > 0.97


def test_batch_and_steps_follow_the_number_of_labels():
    data = loaders.CtPhantoms(0, side=32)
    config = P.with_labels(replace(TINY, preset="tiny", labels="2", batch=4), data, {})
    assert (config.batch, config.steps) == (2, 200)
    assert P.with_labels(replace(TINY, preset="tiny", labels="39"), data, {}).steps == 400
    assert P.with_labels(replace(TINY, preset="tiny", labels="all"), data, {}).steps == 600
    assert (
        P.with_labels(replace(TINY, labels="39", batch=4, steps=7), data, {"steps": 7}).steps == 7
    )


def test_features_see_images_of_eight_bits():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 4, 4)).astype(np.float32)
    levels = (P.features_of(lambda v: (v.flatten(1), None), None, x, RANKS)[0] + 1) * 127.5
    assert (
        np.abs(levels - levels.round()).max() < 1e-4 and levels.min() == 0 and levels.max() == 255
    )


def test_samples_of_two_processes_are_those_of_one(tmp_path, monkeypatch):
    rows = np.arange(5, dtype=np.float32)[:, None, None] / 10 + np.zeros((5, 16, 16), np.float32)
    record, asked, waits = {"normalisation": {"kind": "percentile-slices"}}, [], []
    config, first, second = (
        replace(FAST, num_samples=5, out=str(tmp_path)),
        *(Ranks(r, 2, r, torch.device("cpu")) for r in range(2)),
    )
    (tmp_path / "last.pt").write_bytes(b"")

    def generate(net, numbers, quiet):
        asked.append(list(numbers))
        return ((n, rows[n]) for n in numbers)

    def gather(
        mine, ranks
    ):  # where the first process waits for the slices of the second, the second works
        waits.append(ranks.rank)
        if waits == [0, 0]:
            P.sample(config, second)

    monkeypatch.setattr(P, "load_network", lambda *a: (SimpleNamespace(config=FAST), record))
    monkeypatch.setattr(P, "generate", generate)
    monkeypatch.setattr(P.runtime, "gather", gather)
    P.sample(config, first)
    assert asked == [[0, 2, 4], [1, 3]] and not (tmp_path / "samples.part").exists()
    assert np.array_equal(np.load(tmp_path / "samples.npy"), rows)


def test_a_damaged_part_of_the_samples_is_drawn_again(tmp_path):
    file = tmp_path / "3.npy"
    P.write_array(file, np.zeros((4, 4)))
    file.write_bytes(file.read_bytes()[:140])
    with pytest.raises(InputError, match=r"3\.npy was damaged and is removed .* draws it again"):
        P.read_part(file)
    assert not file.exists()


def test_evaluate_scores_the_split_that_is_named():
    data = loaders.CtPhantoms(0, side=16)
    assert P.cases_of(replace(FAST, split="val"), data) == data.cases("val")
    assert P.cases_of(replace(FAST, limit=3), data) == data.cases("test")[:3]


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    ({"num_channels": 48}, "expected a multiple of 32, the groups"),
    ({"size": 100}, "not a multiple of 32"),
    ({"labels": "0"}, "--labels is 0"),
    ({"labels": "x"}, "--labels is x"),
    ({"t": 1001}, "--t"),
    ({"features": "fid"}, "--features is fid"),
    ({"num_head_channels": 48}, "does not divide the 256 channels"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        P.Config(**flags)


def test_blocks_that_the_network_lacks_are_one_line():
    with pytest.raises(InputError, match="this network has blocks 0 to 3"):
        P.PixelEnsemble(replace(FAST, blocks=(99,)), 1, 3)


FITS = [
    ("paper", 128, "S", True),
    ("paper", 128, "L", False),
    ("paper", 256, "M", False),
    ("paper", 256, "L", True),
]
FITS += [("laptop", 32, "M", True), ("laptop", 32, "L", False)]


@pytest.mark.parametrize("preset, c, variant, fits", FITS)
def test_variant_and_width_must_agree(preset, c, variant, fits, tmp_path):
    flags = {
        "preset": preset,
        "num_channels": c,
        "variant": variant,
        "init": "none",
        "out": str(tmp_path),
    }
    config = P.Config(**{**P.PRESETS[preset], **flags})
    if fits:
        assert P.as_finetuning(config, flags).num_channels == c
    else:
        with pytest.raises(InputError, match=f"--variant {variant} is not a network of width {c}"):
            P.as_finetuning(config, flags)


def test_synced_norm_of_two_processes_is_batch_norm_of_both_batches(monkeypatch):
    """Each process holds one half; what the other one adds is given by hand."""
    x = 50 + 0.01 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    whole, norm, sums = torch.nn.BatchNorm2d(3).train(), P.SyncedNorm(3).train(), []
    expected = whole(x)
    mean = x.mean((0, 2, 3))
    others = iter([x[2:].sum((0, 2, 3)), (x[2:] - mean[:, None, None]).square().sum((0, 2, 3))])
    monkeypatch.setattr(P.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(P.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(P, "over_processes", lambda v: sums.append(v) or v + next(others))
    torch.testing.assert_close(norm(x[:2]), expected[:2], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(norm.running_var, whole.running_var, atol=1e-6, rtol=1e-4)


def test_first_of_the_covering_slices_shows_the_most():
    good = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)
    assert P.most_first([0, 1, 2, 3], good) == [1, 0, 3, 2]
