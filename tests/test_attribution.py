"""Attributions on models whose truth is known; captum's silent errors repaired, or refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from captum.attr import DeepLift
from captum.attr._core import deep_lift
from torch import nn

from dlia_utils.explain.attribution import METHODS, _max_pool, explain
from dlia_utils.models import mobilenet_v2, spectral_normalize

OPTIONS = {
    "gradcam": {"layer": "0"},
    "gradcam++": {"layer": "0"},
    "occlusion": {"window": 4, "stride": 2},
}
NO_LIMIT = float("inf")
CAPTUM_TALKS = pytest.mark.filterwarnings(
    "ignore:Setting forward", "ignore:Input Tensor 0 did not already"
)


def images(n=2, channels=1, side=12):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(3))


def small(seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 6, 3),
        activation(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 2)).eval()


class Reused(nn.Module):
    """One ReLU twice, one activation as a function, a residual sum: all as in torchvision's models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.pool, self.head = (
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.Linear(6, 2),
        )

    def forward(self, x):
        x = self.pool(self.relu(self.first(x)))
        x = self.relu(x - 0.3 + self.second(x))
        return self.head(F.relu(self.pool(x) - 0.2, inplace=True).mean((2, 3)))


class Untraceable(Reused):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class ReadsAfterwards(nn.Module):
    """The shortcut reads what the activation has overwritten."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.head = nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.head((self.relu(x) + 9 * x).mean((2, 3)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate, self.head = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.head((3 * self.conv(x) * torch.sigmoid(9 * self.gate(x))).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_one_contract_for_every_method(method):
    net, x = small(), images(3)
    before, pixels = copy.deepcopy(net.state_dict()), x.clone()
    table = dict(deep_lift.SUPPORTED_NON_LINEAR)
    found = explain(method, net, x, **OPTIONS.get(method, {}))
    assert (
        found.method == method
        and found.maps.shape == (3, 12, 12)
        and found.maps.dtype == torch.float32
    )
    assert torch.equal(found.target, net(x).argmax(1)) and not found.maps.requires_grad
    torch.testing.assert_close(found.score, net(x).amax(1).detach())
    heat = found.heat()
    assert heat.amin() >= 0 and torch.equal(
        heat.amax((1, 2)), (~(found.maps <= 0).all(1).all(1)).float()
    )
    assert torch.equal(x, pixels) and deep_lift.SUPPORTED_NON_LINEAR == table
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(part.requires_grad and part.grad is None for part in net.parameters())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules()
    )


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_batch_and_frozen_models_work(method):
    net, x = small().requires_grad_(False), images(3)
    options = OPTIONS.get(method, {})
    together = explain(method, net, x, 1, **options).maps
    with torch.no_grad():
        alone = torch.cat([explain(method, net, one, 1, **options).maps for one in x.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    if "cam" not in method:
        torch.testing.assert_close(
            explain(method, net, x, 1, batch_size=2, **options).maps, together
        )


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients", "deeplift", "occlusion"])
def test_a_linear_model_gives_its_weights_on_three_channels_and_one_logit(method):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 1)).eval(), images(2, 3, 6)
    weight = net[1].weight.detach().view(1, 3, 6, 6)
    options = {"window": 1, "stride": 1} if method == "occlusion" else {}
    for target, sign in ((1, 1), (0, -1)):
        found = explain(method, net, x, target, **options)
        expected = (
            weight.abs().amax(1).expand(2, -1, -1)
            if method == "saliency"
            else sign * (weight * x).sum(1)
        )
        torch.testing.assert_close(found.maps, expected, atol=1e-5, rtol=1e-4)
    if found.error is not None:
        assert (found.error < 1e-3).all()


def test_occlusion_equals_a_loop_over_windows():
    net, x = small(), images(2)
    found = explain(
        "occlusion", net, x, 1, window=(5, 4), stride=(3, 2), baseline="mean", batch_size=7
    )
    total, times = torch.zeros(2, 12, 12), torch.zeros(12, 12)
    clean = net(x)[:, 1].detach()
    for top in range(0, 12 - 5 + 3, 3):
        for left in range(0, 12 - 4 + 2, 2):
            covered = x.clone()
            covered[:, :, top : top + 5, left : left + 4] = x.mean((1, 2, 3), keepdim=True)
            total[:, top : top + 5, left : left + 4] += (clean - net(covered)[:, 1].detach())[
                :, None, None
            ]
            times[top : top + 5, left : left + 4] += 1
    torch.testing.assert_close(found.maps, total / times, atol=1e-5, rtol=1e-4)
    assert found.baseline == "each image's mean grey" and found.error is None


@pytest.mark.parametrize("baseline", [0.0, 0.5, "mean", torch.full((1, 1, 12, 12), 0.25)])
def test_integrated_gradients_are_complete_and_more_steps_make_them_more_so(baseline, caplog):
    net, x = small(), images()
    coarse, fine = (
        explain("integrated_gradients", net, x, 1, steps=steps, baseline=baseline)
        for steps in (2, 200)
    )
    assert fine.error.max() < 0.01 and fine.error.sum() < coarse.error.sum()
    assert ("raise steps=2" in caplog.text) == bool((coarse.error > 0.05).any())


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU,
        nn.ReLU6,
        nn.SiLU,
        nn.GELU,
        nn.Hardswish,
        nn.LeakyReLU,
        lambda: nn.ReLU6(inplace=True),
    ],
)
def test_deeplift_is_complete_with_activations_that_captum_leaves_out(activation):
    found = explain("deeplift", small(activation=activation), images(), 1, baseline=0.5)
    assert found.error.max() < 1e-3 and not found.zero.any()


@CAPTUM_TALKS
def test_deeplift_on_mobilenet_where_captum_alone_is_wrong():
    net, x = mobilenet_v2(width=0.25, stages=4).eval(), images(2, 3, 32)
    with torch.no_grad():
        for module in net.modules():  # activations near 6, where the gradient of ReLU6 tells least
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(3)
                module.bias.fill_(2)
        net.train()(x)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        net(images(4, 3, 32))
        net.eval()
        nn.init.normal_(
            net.backbone.classifier[1].weight, generator=torch.Generator().manual_seed(0)
        )
        black = net(x)[:, 1] - net(0 * x)[:, 1]
    theirs = DeepLift(copy.deepcopy(net)).attribute(x, target=1).sum((1, 2, 3)).detach()
    found = explain("deeplift", net, x, 1)
    assert ((theirs - black).abs() > 0.5 * black.abs()).any()
    assert found.error.max() < 1e-2


@CAPTUM_TALKS
def test_reused_functional_and_in_place_modules_and_pools_after_activations_are_taken_apart():
    net = Reused().eval()
    with pytest.raises(RuntimeError, match="used more than once"):
        DeepLift(copy.deepcopy(net)).attribute(images(), target=1)
    for baseline in (0.0, images(1).flip(2)):  # a film as baseline: its maxima lie elsewhere
        assert explain("deeplift", net, images(), 1, baseline=baseline).error.max() < 1e-3
    net = spectral_normalize(Reused()).eval()
    assert explain("deeplift", net, images(), 1, baseline=0.5).error.max() < 1e-3
    net.relu = nn.ReLU6(inplace=True)
    assert explain("deeplift", net, images(), 1, baseline=0.5).error.max() < 1e-3


def test_the_rule_of_max_pooling_hands_out_the_whole_difference_with_overlapping_windows():
    pool, x = nn.MaxPool2d(3, 2, 1), torch.randn(4, 2, 9, 9, dtype=torch.float64)
    y = pool(x)
    grad = torch.randn(2, *y.shape[1:], dtype=torch.float64).repeat(2, 1, 1, 1)
    multiplier = _max_pool(pool, x, y, x, grad)[:2]
    torch.testing.assert_close(
        (multiplier * (x[:2] - x[2:])).sum((1, 2, 3)), (grad[:2] * (y[:2] - y[2:])).sum((1, 2, 3))
    )


def test_deeplift_refuses_what_it_cannot_repair_by_name():
    x = images()
    with pytest.raises(ValueError, match="relu.* more than once.*integrated_gradients"):
        explain("deeplift", Untraceable().eval(), x, 1)
    with pytest.raises(ValueError, match=r"completeness error .* mul_\d \(a product"):
        explain("deeplift", Gated().eval(), x, 1)
    assert explain("deeplift", Gated().eval(), x, 1, tolerance=NO_LIMIT).error.max() > 0.05
    with pytest.raises(ValueError, match="in place"):
        explain("deeplift", ReadsAfterwards().eval(), x, 1)
    normed = small()
    normed[1] = nn.GroupNorm(2, 6)
    with pytest.raises(ValueError, match=r"1 \(GroupNorm\)"):
        explain("deeplift", normed, x, 1)


def test_a_first_layer_that_works_in_place_does_not_write_into_the_images():
    net = nn.Sequential(
        nn.Threshold(0.5, 0.0, inplace=True), nn.Flatten(), nn.Linear(144, 2)
    ).eval()
    x = images()
    before = x.clone()
    for method in ("saliency", "integrated_gradients", "occlusion"):
        explain(method, net, x, 1, **OPTIONS.get(method, {}))
    assert torch.equal(x, before)


def test_bad_input_is_refused_before_any_work():
    net, x = small(), images()
    for method, options, message in [
        ("lime", {}, "method must be one of saliency, integrated_gradients"),
        ("occlusion", {"window": 4, "stride": 5}, "leaves pixels between"),
        ("occlusion", {"window": 13}, "larger than the images"),
        ("occlusion", {"window": 0}, "whole pixels"),
        ("occlusion", {"window": 4, "baseline": "blur"}, "baseline must be a grey level"),
        ("deeplift", {"baseline": 2.0}, r"baseline must lie in \[0,1\]"),
        ("deeplift", {"baseline": torch.zeros(1, 1, 3, 3)}, "must have the shape of x"),
        ("integrated_gradients", {"steps": 0}, "steps must be"),
        ("saliency", {"batch_size": 0}, "batch_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain(method, net, x, **options)
    with pytest.raises(TypeError, match="window"):
        explain("saliency", net, x, window=3)
    with pytest.raises(TypeError, match="floating-point"):
        explain("saliency", net, (255 * x).byte())
