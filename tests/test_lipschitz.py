"""Operator norms against dense matrices, spectral normalisation while training and in files."""

import copy

import pytest
import torch
from torch import nn

from dlia_utils import models, objectives
from dlia_utils.models.lipschitz import (
    QuickInputGradient,
    compare_norms,
    operator_norm,
    spectral_like,
    spectral_normalize,
)


def true_norm(layer, shape) -> float:
    """Of the matrix [outputs, inputs] of a layer, column by column."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.double).view(-1, *shape)
    layer = copy.deepcopy(layer).eval().double()
    with torch.no_grad():
        dense = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T
    return torch.linalg.matrix_norm(dense, ord=2).item()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 2)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2, "out": 8},
    ],
    ids=str,
)
def test_the_operator_norm_is_the_largest_singular_value_of_the_dense_matrix(options):
    torch.manual_seed(0)
    options = dict(options)
    conv = nn.Conv2d(4, options.pop("out", 4), **options)
    assert operator_norm(conv, (4, 6, 7)) == pytest.approx(true_norm(conv, (4, 6, 7)), rel=1e-4)
    layer = nn.Linear(5, 3)
    assert operator_norm(layer, (5,)) == pytest.approx(true_norm(layer, (5,)), rel=1e-6)


def test_the_reshaped_kernel_is_the_wrong_norm_both_ways():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 96, 1),
        nn.Conv2d(96, 96, 3, padding=1, groups=96),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 2),
    )
    table = compare_norms(model.train(), (32, 12, 12))
    assert table.kind.tolist() == ["Conv2d"] * 3 + ["Linear"]
    assert table.layer.tolist() == ["0", "1", "2", "5"]
    # After that division a full kernel still stretches by half, a depthwise one too little.
    assert table.ratio.tolist() == pytest.approx([1.5, 1.0, 0.72, 1.0], abs=0.08)
    assert table.ratio[[1, 3]].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 9, 2),
    )


def test_training_keeps_every_operator_norm_at_the_bound():
    net, shapes = small_net(), {0: (1, 6, 6), 2: (4, 6, 6), 5: (36,)}
    assert spectral_normalize(net, kind="operator", input_shape=(1, 6, 6)) is net
    x, y = torch.rand(16, 1, 6, 6), torch.tensor([0, 1] * 8)
    x[y == 1] *= 0.5
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    # TRADES reads every weight twice in train mode before it differentiates.
    objective = objectives.trades(eps=0.02, steps=1)
    for _ in range(30):
        optimizer.zero_grad()
        objective(net, x, y)[0].backward()
        optimizer.step()
    net.eval()
    norms = [true_norm(net[i], shape) for i, shape in shapes.items()]
    free = [net[i].parametrizations.weight.original.flatten(1) for i in shapes]
    assert 0.95 <= max(norms) <= 1.02
    assert max(torch.linalg.matrix_norm(weight, ord=2) for weight in free) > 1.2


def test_only_what_is_above_the_bound_is_scaled_group_by_group():
    conv = nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False)
    conv.weight.data = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    conv.weight.data[1] *= 0.01
    before = conv.weight.detach().clone()
    net = spectral_normalize(nn.Sequential(conv), kind="operator", input_shape=(2, 5, 5)).train()
    for _ in range(30):
        net(torch.rand(1, 2, 5, 5))
    weight = net.eval()[0].weight
    assert torch.equal(weight[1], before[1])
    torch.testing.assert_close(weight[0] / weight[0].norm(), before[0] / before[0].norm())
    assert true_norm(net[0], (2, 5, 5)) == pytest.approx(1.0, rel=1e-3)
    # Its gradient is at right angles to what is trained: the length of that decides nothing.
    original = net[0].parametrizations.weight.original
    (gradient,) = torch.autograd.grad((weight[0] * torch.randn(1, 3, 3)).sum(), original)
    assert gradient[0].norm() > 1e-3
    assert (gradient[0] * original[0]).sum().abs() < 1e-3 * gradient[0].norm() * original[0].norm()


@pytest.mark.parametrize("options", [{"kind": "operator", "input_shape": (1, 32, 32)}, {}], ids=str)
def test_a_trained_model_of_either_kind_is_baked_and_loads_bit_equal(options, tmp_path):
    model = spectral_normalize(models.mobilenet_v2(width=0.25, stages=3), **options)
    for _ in range(20):  # the power iteration makes one step per forward pass in train mode
        model(torch.rand(2, 1, 32, 32))
    x = torch.rand(2, 1, 32, 32)
    expected = model.eval()(x)
    again = spectral_like(models.mobilenet_v2(width=0.25, stages=3), model.state_dict())
    models.load_strictly(again, model.state_dict(), origin="test")
    assert torch.equal(again.eval()(x), expected)
    loaded = models.load(models.save(model, tmp_path / "model.pt", meta={}))
    plain = models.mobilenet_v2(width=0.25, stages=3).eval()
    models.load_strictly(plain, models.bake(copy.deepcopy(model)).state_dict(), origin="test")
    assert torch.equal(loaded(x), expected) and torch.equal(plain(x), expected)
    assert torch.equal(model(x), expected)  # of which the baked one was a copy
    if not options:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        norms = [torch.linalg.matrix_norm(m.weight.flatten(1), ord=2).item() for m in layers]
        assert norms == pytest.approx([1.0] * len(layers), abs=0.1)
    with pytest.raises(ValueError, match="already"):
        spectral_normalize(model)
    with pytest.raises(ValueError, match='"operator" with input_shape'):
        spectral_normalize(plain, kind="operator")


@pytest.mark.parametrize("stride", [1, 2])
def test_the_quick_second_derivative_is_torchs(stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, stride=stride, padding=1, groups=6, bias=False)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Tanh(), conv, nn.Tanh(), nn.Flatten()).double()
    x = torch.rand(3, 2, 7, 7, dtype=torch.double, requires_grad=True)

    def gradients(out) -> list:
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(out + gradient.square().sum(), [x, *model.parameters()])

    expected = gradients(model(x).square().sum())
    with QuickInputGradient():
        out = model(x).square().sum()
    for ours, torchs in zip(gradients(out), expected, strict=True):
        torch.testing.assert_close(ours, torchs)
