"""Attributions on models whose truth is known; DeepLIFT where captum's is silently wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from captum.attr import DeepLift
from torch import nn

from dlia_utils.explain.attribution import METHODS, explain
from dlia_utils.models import mobilenet_v2, spectral_normalize

OPTIONS = {"occlusion": {"window": 4}} | dict.fromkeys(("gradcam", "gradcam++"), {"layer": "0"})
OURS = ["saliency", "integrated_gradients", "deeplift", "occlusion"]


def images(n=2, channels=1, side=12):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(3))


def small(activation=nn.ReLU):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), activation()]
    layers += [nn.Conv2d(6, 6, 3), activation(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 2)).eval()


class Net(nn.Module):
    """Two convolutions, and a forward pass of the test's own."""

    def __init__(self, forward, relu=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.pool = relu or nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.head, self.body = nn.Linear(6, 2), forward

    def forward(self, x):
        return self.head(self.body(self, x).mean((2, 3)))


def reused(net, x):
    """One ReLU twice, an activation as a function, a residual sum, overlapping pools."""
    x = net.pool(net.relu(net.first(x)))
    x = net.relu(x - 0.3 + net.second(x))
    return F.relu(net.pool(x) - 0.2, inplace=True)


def untraceable(net, x):
    return reused(net, x if x.sum() > 0 else -x)


def reads_afterwards(net, x):
    x = net.first(x)
    return net.relu(x) + 9 * x


def gated(net, x):
    return 3 * net.first(x) * torch.sigmoid(99 * net.second(x.expand(-1, 6, -1, -1)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", [False, True])
def test_one_contract_for_every_method(method, frozen):
    net, x, options = small().requires_grad_(not frozen), images(3), OPTIONS.get(method, {})
    before, pixels = copy.deepcopy(net.state_dict()), x.clone()
    found = explain(method, net, x, **options)
    assert found.maps.dtype == torch.float32
    assert found.maps.shape == (3, 12, 12) and not found.maps.requires_grad
    assert torch.equal(found.target, net(x).argmax(1))
    heat = found.heat()
    assert heat.amin() >= 0 and torch.equal(heat.amax((1, 2)) == 1, (found.maps > 0).any(1).any(1))
    with torch.no_grad():
        pairs = zip(x.split(1), found.target, strict=True)
        parts = [explain(method, net, one, target, **options).maps for one, target in pairs]
    torch.testing.assert_close(found.maps, torch.cat(parts), atol=1e-6, rtol=1e-4)
    assert torch.equal(x, pixels)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad is not frozen and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


@pytest.mark.parametrize("method", OURS)
def test_a_linear_model_gives_its_weights_on_three_channels_and_one_logit(method):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 1)).eval(), images(2, 3, 6)
    weight = net[1].weight.detach().view(1, 3, 6, 6)
    options = {"window": 1} if method == "occlusion" else {}
    for target, sign in ((1, 1), (0, -1)):
        found = explain(method, net, x, target, **options)
        expected = sign * (weight * x).sum(1)
        if method == "saliency":
            expected = weight.abs().amax(1).expand(2, -1, -1)
        torch.testing.assert_close(found.maps, expected, atol=1e-5, rtol=1e-4)
        assert found.error is None or (found.error < 1e-3).all()


def test_occlusion_equals_a_loop_over_windows():
    net, x = small(), images(2)
    found = explain("occlusion", net, x, 1, window=6)
    total, times = torch.zeros(2, 12, 12), torch.zeros(12, 12)
    clean = net(x)[:, 1].detach()
    for top in range(0, 12 - 6 + 3, 3):
        for left in range(0, 12 - 6 + 3, 3):
            place = (slice(None), slice(top, top + 6), slice(left, left + 6))
            covered = x.clone()
            covered[:, 0][place] = 0
            total[place] += (clean - net(covered)[:, 1].detach())[:, None, None]
            times[place[1:]] += 1
    torch.testing.assert_close(found.maps, total / times, atol=1e-5, rtol=1e-4)


def test_integrated_gradients_are_complete_and_more_steps_make_them_more_so():
    coarse, fine = (
        explain("integrated_gradients", small(), images(), 1, steps=steps) for steps in (2, 200)
    )
    assert fine.error.max() < 0.01 and fine.error.sum() < coarse.error.sum()


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU]
ACTIVATIONS += [nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.PReLU, nn.LogSigmoid, nn.Tanh]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, lambda: nn.ReLU6(inplace=True)])
def test_deeplift_is_complete_with_every_activation(activation):
    found = explain("deeplift", small(activation), images(), 1)
    assert found.error.max() < 1e-3 and not found.zero.any()


@pytest.mark.filterwarnings("ignore:Setting forward", "ignore:Input Tensor 0 did not already")
def test_deeplift_equals_captum_s_where_that_is_right_and_is_complete_where_it_is_wrong():
    x, bounded = images(), small(nn.ReLU6)
    bounded[0].weight.data *= 30  # most activations are at 6, where the gradient tells nothing
    for net, right in ((small(), True), (bounded, False)):
        theirs = DeepLift(copy.deepcopy(net)).attribute(x, target=1).sum(1).detach()
        ours = explain("deeplift", net, x, 1)
        assert ours.error.max() < 1e-3
        assert torch.allclose(ours.maps, theirs, atol=1e-6, rtol=1e-4) == right
        black = (net(x) - net(0 * x))[:, 1].detach()
        assert ((theirs.sum((1, 2)) - black).abs() < 1e-3).all() == right
    mobile = explain("deeplift", mobilenet_v2(width=0.25, stages=4).eval(), images(2, 3, 32), 1)
    assert mobile.error.max() < 1e-2


@pytest.mark.parametrize("forward", [reused, untraceable])
@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), nn.ReLU6(inplace=True)])
def test_deeplift_is_complete_where_activations_are_reused_functional_or_in_place(forward, relu):
    net = Net(forward, relu).eval()
    assert explain("deeplift", net, images(), 1).error.max() < 1e-3
    assert explain("deeplift", spectral_normalize(net).eval(), images(), 1).error.max() < 1e-3


def test_deeplift_refuses_what_has_no_rule():
    normed = small()
    normed[1] = nn.GroupNorm(2, 6)
    for net in (Net(gated), Net(reads_afterwards), normed):
        with pytest.raises(ValueError, match="completeness error .* Use integrated_gradients"):
            explain("deeplift", net.eval(), images(), 1)


def test_a_first_layer_that_works_in_place_does_not_write_into_the_images():
    first, x = nn.Threshold(0.5, 0.0, inplace=True), images()
    net, before = nn.Sequential(first, nn.Flatten(), nn.Linear(144, 2)).eval(), x.clone()
    for method in OURS:
        explain(method, net, x, 1, **OPTIONS.get(method, {}))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lime", {}, "method must be one of saliency, integrated_gradients"),
        ("occlusion", {"window": 13}, "window must be a whole number in .1,12."),
        ("saliency", {"target": 2}, r"target must be None, a class 0\.\.1"),
        ("saliency", {"target": torch.tensor([0.0, 1.0])}, "target must be"),
        ("saliency", {"x": 3 * images()}, r"spans \[.*models.wrap"),
        ("saliency", {"model": small().train()}, r"call model.eval\(\)"),
    ],
)
def test_bad_input_is_refused(method, options, said):
    with pytest.raises(ValueError, match=said):
        explain(method, **{"model": small(), "x": images()} | options)
