"""Grad-CAM against captum and the papers' closed forms; the model untouched; zero maps stated."""

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from dlia_utils.explain import gradcam
from dlia_utils.explain.gradcam import grid, one_pass
from dlia_utils.models import resnet18_cifar


def network(outputs, seed=0, *, squeeze=False):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    layers += [nn.Linear(32, outputs), *([nn.Flatten(0)] if squeeze else [])]
    return nn.Sequential(*layers).eval()


def images(n=3, side=20):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layer", ["0", "4", "5"])
@pytest.mark.parametrize("target", [0, 1])
def test_equals_captum_for_two_logits(layer, target):
    net, x = network(2), images()
    method = LayerGradCam(net, net.get_submodule(layer))
    theirs = method.attribute(x, target=target, relu_attributions=True).detach()
    ours = gradcam(net, x, layer, target=target)
    torch.testing.assert_close(ours.grid, theirs[:, 0], atol=1e-5, rtol=0)
    resized = LayerGradCam.interpolate(theirs, (20, 20), interpolate_mode="bilinear")[:, 0]
    top = resized.amax((1, 2), keepdim=True)
    torch.testing.assert_close(ours.maps, resized / top.clamp(min=1e-12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("squeeze", [False, True])
def test_equals_captum_for_a_scalar_logit_of_either_sign(squeeze):
    net, x = network(1, squeeze=squeeze), images()
    for target, sign in ((1, 1.0), (0, -1.0)):
        method = LayerGradCam(lambda t, sign=sign: sign * net(t).reshape(-1), net[4])
        theirs = method.attribute(x, relu_attributions=True)[:, 0].detach()
        ours = gradcam(net, x, net[4], target=target).grid
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert gradcam(net, x, "4").target.tolist() == (net(x).reshape(-1) > 0).long().tolist()


def test_plus_equals_its_closed_form_behind_a_linear_head():
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)]
    net, x = nn.Sequential(*layers).eval(), images(2, 8)
    kept = net[:2](x).detach()
    weight = net[4].weight[1].detach() / 36  # the gradient is the same at every place
    alpha = 1 / (2 + weight * kept.sum((2, 3)))
    expected = (36 * alpha * weight.clamp(min=0))[:, :, None, None] * kept
    found = gradcam(net, x, "1", target=1, plus=True)
    torch.testing.assert_close(found.grid, expected.sum(1).clamp(min=0))


def test_a_map_without_evidence_is_zero_and_said_to_be():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    for plus in (False, True):
        for_class, against = (gradcam(net, images(2), "1", target=k, plus=plus) for k in (1, 0))
        assert not for_class.zero.any() and against.zero.all()
        assert torch.equal(against.maps, torch.zeros(2, 20, 20))


def test_hooks_and_flags_are_put_back_after_an_error():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(1, 1)).eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradcam(net, images(), "0")
    assert not net[0]._forward_hooks and net[0].weight.requires_grad


def test_an_in_place_activation_after_the_layer_changes_nothing():
    plain, in_place = network(2), network(2)
    plain[5], in_place[5] = (nn.ReLU(inplace=k).eval() for k in (False, True))
    first, other = (gradcam(net, images(), "4").grid for net in (plain, in_place))
    torch.testing.assert_close(first, other)


def test_bad_input_is_refused_with_the_reason():
    net, x, shared = network(2), images(), nn.Conv2d(1, 1, 3, padding=1)
    twice = nn.Sequential(shared, nn.Sequential(shared), nn.Flatten(), nn.Linear(400, 2)).eval()
    for model, layer, said in (
        (net, "conv1", "no layer 'conv1'"),
        (net, "8", r"8 returns \[3, 2\], not feature maps"),
        (twice, "0", "ran 2 times"),
    ):
        with pytest.raises(ValueError, match=said):
            gradcam(model, x, layer)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_in_one_pass_equal_one_at_a_time(frozen):
    """In no order, in parallel branches, one inside another, and before an in-place activation."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True))
            self.right = nn.Conv2d(1, 3, 3)
            pool = nn.AdaptiveAvgPool2d(2)
            self.head = nn.Sequential(nn.ReLU(inplace=True), pool, nn.Flatten(), nn.Linear(24, 2))

        def forward(self, x):
            return self.head(torch.cat([self.left(x), self.right(x)], 1))

    torch.manual_seed(4)
    cases = {Branches(): ["right", "left", "left.0", "head.0", "left.1"]}
    cases[resnet18_cifar(width=1 / 8)] = [f"backbone.layer{k}.1.conv2" for k in (3, 1, 4, 2)]
    for net, names in cases.items():
        net.eval().requires_grad_(not frozen)
        x, runs = images(2, 16), []
        counter = net.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        once = one_pass(net, x, names, 1)
        counter.remove()
        assert len(runs) == 1 + 3 and not any(module._forward_hooks for module in net.modules())
        for name, kept, gradient in zip(names, once.kept, once.gradients, strict=True):
            for plus in (False, True):
                alone = gradcam(net, x, name, target=1, plus=plus)
                found = grid(kept, gradient, plus=plus)
                assert (found - alone.grid).abs().max() <= 1e-6 * alone.grid.amax()
