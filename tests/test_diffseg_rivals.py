"""results.diffseg_rivals: 2D networks, recursive and self-conditioned training, noisy images."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, CommandLine

import diffseg3d_recycle as D
import results.diffseg_rivals as R
from common import InputError

CPU = torch.device("cpu")
S5 = D.schedule(5, CPU)
SMALL = {"num_channels": 4, "channel_mult": (1, 2), "size": (8, 8, 8)}


def batch_of(*k: int) -> tuple[torch.Tensor, ...]:
    """Image, label, k and two fields of noise, for volumes of 8^3 and three classes."""
    torch.manual_seed(1)
    label = torch.randint(0, 3, (len(k), 8, 8, 8), dtype=torch.uint8)
    image = torch.rand(len(k), 1, 8, 8, 8)
    return image, label, torch.tensor(k), *torch.randn(2, len(k), 3, 8, 8, 8).unbind(0)


class Spy:
    """A network that keeps what it was fed and answers with 2 x_k + 1, with a gradient."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t):
        self.calls.append((x, t.tolist(), torch.is_grad_enabled()))
        return (2 * x[:, 1:4] + 1).requires_grad_()


@pytest.mark.parametrize(
    "classes, baseline, diffusion, conditioned",
    [(9, 2_347_849, 2_449_513, 2_452_105), (16, 2_348_080, 2_451_760, 2_456_368)],
)
def test_2d_networks_have_the_spec_number_of_parameters(classes, baseline, diffusion, conditioned):
    flags = {"method": "unet"}, {}, {"recycle": "self-condition"}
    for options, count in zip(flags, (baseline, diffusion, conditioned)):
        inputs = 1 if "method" in options else 1 + classes
        model = R.build_model(R.Config(dims=2, **options), inputs, classes)
        assert sum(p.numel() for p in model.parameters()) == count
    model = R.build_model(R.Config(recycle="self-condition"), 1 + classes, classes)
    assert sum(p.numel() for p in model.parameters()) == {9: 6_796_617, 16: 6_808_944}[classes]


def test_slices_go_through_the_2d_network_one_by_one():
    torch.manual_seed(0)
    model = R.build_model(R.Config(**SMALL, dims=2), 4, 3).double()
    x, t = torch.randn(2, 4, 9, 12, 3, dtype=torch.float64), torch.tensor([1, 750])
    out = model(x, t)
    for b in range(2):
        for z in range(3):
            one = model.network(x[b : b + 1, ..., z], t[b : b + 1])[0]
            torch.testing.assert_close(out[b, ..., z], one, atol=1e-6, rtol=1e-5)


def test_recursive_walks_the_chain_from_noise_and_the_truth_enters_the_loss_only():
    image, label, k, eps, other = batch_of(2, 3)
    spy, blind = Spy(), Spy()
    loss = R.recycling_loss(spy, image, label, k, eps, other, recycle="recursive")
    R.recycling_loss(blind, image, 0 * label, k, eps, other, recycle="recursive")
    assert [t for _, t, _ in spy.calls] == [[v, v] for v in (1000, 750, 501, 251, 1)]
    xk, losses = eps, []
    for number, (x, _, with_grad) in zip((5, 4, 3, 2, 1), spy.calls):
        torch.testing.assert_close(x, torch.cat([image, xk], dim=1))
        assert with_grad and not x.requires_grad
        losses.append(D.segmentation_loss(2 * xk + 1, label))
        if number > 1:
            mask = 2 * (2 * xk + 1).softmax(dim=1) - 1
            fresh = R.noise_like(eps, number)
            xk = D.q_sample(S5, mask, fresh, torch.full((2,), number - 1))
    torch.testing.assert_close(loss, torch.stack(losses).mean(dim=0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(spy.calls, blind.calls))


def test_further_noise_is_normal_new_and_a_function_of_the_first():
    eps = torch.randn(2, 3, 16, 16, 16)
    one, other = R.noise_like(eps, 5), R.noise_like(eps, 4)
    assert torch.equal(one[1:], R.noise_like(eps[1:], 5))
    assert abs(one.std() - 1) < 0.02 and abs((one * other).mean()) < 0.02
    assert abs((one * eps).mean()) < 0.02 and abs((one[0] * one[1]).mean()) < 0.03


def test_self_condition_shows_half_of_the_samples_what_it_made_of_the_same_x_k():
    image, label, k, eps, other = batch_of(2, 3, 5)
    other[:, 0, 0, 0, 0] = torch.tensor([1.0, -1.0, 1.0])
    spy = Spy()
    R.recycling_loss(spy, image, label, k, eps, other, recycle="self-condition")
    (x, t, grad), (y, u, with_grad) = spy.calls
    xk = D.q_sample(S5, D.mask_to_x0(label, 3), eps, k)
    torch.testing.assert_close(x[:, :4], torch.cat([image, xk], dim=1)[[0, 2]])
    assert not x[:, 4:].any() and t == [251, 1000] and not grad and with_grad
    torch.testing.assert_close(y[:, :4], torch.cat([image, xk], dim=1))
    made = 2 * (2 * xk + 1).softmax(dim=1) - 1
    torch.testing.assert_close(y[[0, 2], 4:], made[[0, 2]])
    assert not y[1, 4:].any() and u == [251, 501, 1000]


def test_self_conditioned_sampling_sees_the_step_before_in_each_window():
    torch.manual_seed(0)
    model = R.build_model(R.Config(**SMALL, recycle="self-condition"), 4, 3).eval()
    windows = torch.randn(2, 1, 4, 8, 8, 8)
    with torch.no_grad():
        for _ in range(2):  # the second volume begins with zeros again
            last = [torch.zeros(1, 3, 8, 8, 8)] * 2
            for t in (torch.tensor([1000]), torch.tensor([501]), torch.tensor([1])):
                for n, x in enumerate(windows):
                    expected = model.network(torch.cat([x, last[n]], dim=1), t)
                    torch.testing.assert_close(model(x, t), expected)
                    last[n] = 2 * expected.softmax(dim=1) - 1


def test_image_noise_has_an_sd_of_its_own_for_each_image_up_to_the_given():
    theta = torch.eye(3, 4, dtype=torch.float64).repeat(200, 1, 1)
    theta[:, 0, 3] = torch.arange(200) * 1e-9
    image, label = torch.zeros(200, 1, 8, 8, 8), torch.zeros(200, 8, 8, 8, dtype=torch.uint8)
    sd = R.noisy_augment(0.3, image, label, theta)[0].flatten(1).std(dim=1)
    assert 0.28 < sd.max() < 0.32 and sd.min() < 0.01 and abs(sd.mean() - 0.15) < 0.02
    few = R.noisy_augment(0.3, image[:2], label[:2], theta[7:9])[0]
    torch.testing.assert_close(few.flatten(1).std(dim=1), sd[7:9])
    with pytest.raises(InputError, match="use --augment on"):
        R.Config(image_noise=0.1, augment="off")


@pytest.mark.parametrize(
    "flags",
    ["--recycle recursive", "--dims 2 --recycle self-condition --target eps"]
    + ["--method unet --image-noise 0.2", "--dims 2 --recycle max"],
)
def test_rivals_train_and_score_and_are_no_networks_of_the_script(tmp_path, fake, flags, capsys):
    argv = ["--data", str(fake / "prepared"), "--preset", "tiny", "--out", str(tmp_path / "r")]
    argv += [
        "--num-channels",
        "4",
        "--channel-mult",
        "1,2",
        "--size",
        "24,24,16",
        "--batch",
        "2",
        "--steps",
        "1",
    ]
    own = D.build_model
    assert R.main([*argv, *flags.split(), "--quiet", "--amp", "off"]) == 0
    assert "mean" in capsys.readouterr().out and D.build_model is own
    script = CommandLine("diffseg3d_recycle", D.main)
    words = ["evaluate", "--checkpoint", str(tmp_path / "r")]
    assert "belongs to diffseg_rivals" in script.refused(capsys, *words)


def test_command_has_the_flags_of_the_script_and_its_own():
    words = [sys.executable, "-m", "results.diffseg_rivals", "train", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert all(flag in done.stdout for flag in ("--dims", "--image-noise", "--train-K"))
