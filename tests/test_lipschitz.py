"""Operator norms against dense matrices, bounds of networks against closed forms and random pairs of images."""

import copy

import pytest
import torch
from torch import nn

from dlia_utils import models, objectives
from dlia_utils.device import fingerprint
from dlia_utils.models.lipschitz import (
    compare_norms,
    lipschitz_bound,
    operator_norm,
    spectral_like,
    spectral_normalize,
)


def dense(layer, shape) -> torch.Tensor:
    """The matrix [outputs, inputs] of a layer, column by column."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.double).view(-1, *shape)
    layer = copy.deepcopy(layer).eval().double()
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T


def true_norm(layer, shape) -> float:
    return torch.linalg.matrix_norm(dense(layer, shape), ord=2).item()


# ------------------------------------------------------------------ one layer


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2, "out": 8},
    ],
    ids=str,
)
def test_the_operator_norm_is_the_largest_singular_value_of_the_dense_matrix(options):
    torch.manual_seed(0)
    options = dict(options)
    conv = nn.Conv2d(4, options.pop("out", 4), **options)
    shape = (4, 6, 7)
    assert operator_norm(conv, shape) == pytest.approx(true_norm(conv, shape), rel=1e-4)
    gain = torch.linspace(-2, 3, conv.out_channels)
    scaled = copy.deepcopy(conv)
    scaled.weight.data *= gain.view(-1, 1, 1, 1)
    assert operator_norm(conv, shape, gain=gain) == pytest.approx(
        true_norm(scaled, shape), rel=1e-4
    )


def test_a_linear_layer_is_exact_and_other_layers_are_refused():
    layer = nn.Linear(5, 3)
    assert operator_norm(layer, (5,)) == pytest.approx(
        torch.linalg.matrix_norm(layer.weight, ord=2).item(), rel=1e-6
    )
    with pytest.raises(TypeError, match="BatchNorm2d"):
        operator_norm(nn.BatchNorm2d(3), (3, 4, 4))
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        operator_norm(nn.Conv2d(3, 4, 3), (4, 8, 8))
    with pytest.raises(ValueError, match="zero padding"):
        operator_norm(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 8, 8))


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
    assert table.kind.tolist() == [
        "3x3",
        "1x1",
        "depthwise 3x3",
        "linear",
    ] and table.layer.tolist() == ["0", "1", "2", "5"]
    # After the usual spectral normalisation a full kernel still stretches by half, a depthwise one is cut too far.
    assert table.ratio.tolist() == pytest.approx([1.5, 1.0, 0.72, 1.0], abs=0.08)
    assert table.ratio[1] == pytest.approx(1, abs=1e-5) and table.ratio[3] == pytest.approx(
        1, abs=1e-5
    )
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------ enforced in training


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
    assert spectral_normalize(net, kind="operator", input_shape=(1, 6, 6), bound=0.8) is net
    start = net[0].parametrizations.weight.original.detach().clone()
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
    assert not torch.equal(net[0].parametrizations.weight.original, start)
    norms = {i: true_norm(net[i], shape) for i, shape in shapes.items()}
    unbound = [
        torch.linalg.matrix_norm(net[i].parametrizations.weight.original.flatten(1), ord=2)
        for i in shapes
    ]
    assert max(norms.values()) <= 0.8 * 1.02 and max(norms.values()) >= 0.75, norms
    assert max(unbound) > 1  # what the optimiser moves is far outside


def test_only_what_is_above_the_bound_is_scaled_group_by_group():
    conv = nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False)
    conv.weight.data = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    conv.weight.data[1] *= 0.01
    before = conv.weight.detach().clone()
    net = spectral_normalize(
        nn.Sequential(conv), kind="operator", input_shape=(2, 5, 5), bound=1.0
    ).train()
    for _ in range(30):
        net(torch.rand(1, 2, 5, 5))
    net.eval()
    weight = net[0].weight
    assert torch.equal(weight[1], before[1])
    torch.testing.assert_close(weight[0] / weight[0].norm(), before[0] / before[0].norm())
    assert true_norm(net[0], (2, 5, 5)) == pytest.approx(1.0, rel=1e-3)
    # A scaled weight does not depend on the length of what is trained: its gradient is at right angles to it.
    original = net[0].parametrizations.weight.original
    (gradient,) = torch.autograd.grad((weight[0] * torch.randn(1, 3, 3)).sum(), original)
    assert gradient[0].norm() > 1e-3
    assert (gradient[0] * original[0]).sum().abs() < 1e-3 * gradient[0].norm() * original[0].norm()


@pytest.mark.parametrize("kind", ["kernel", "operator"])
def test_a_state_dict_tells_how_the_model_was_parametrised(kind):
    shape = {"input_shape": (1, 6, 6), "bound": 0.5} if kind == "operator" else {}
    trained = spectral_normalize(small_net(), kind=kind, **shape)
    for _ in range(3):
        trained(torch.rand(2, 1, 6, 6))
    x = torch.rand(3, 1, 6, 6)
    expected = trained.eval()(x)
    again = spectral_like(small_net(), trained.state_dict())
    models.load_strictly(again, trained.state_dict(), origin="test")
    assert torch.equal(again.eval()(x), expected)
    plain = small_net()
    models.load_strictly(plain, models.bake(again).state_dict(), origin="test")
    assert torch.equal(plain(x), expected)
    assert not nn.utils.parametrize.is_parametrized(
        spectral_like(small_net(), plain.state_dict())[0]
    )


def test_a_weight_of_zeros_and_channels_last_do_no_harm():
    net = small_net()
    net[0].weight.data.zero_()
    spectral_normalize(net, kind="operator", input_shape=(1, 6, 6)).to(
        memory_format=torch.channels_last
    )
    net.train()(torch.rand(2, 1, 6, 6)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert (net[0].parametrizations.weight[0].v.norm() - 1).abs() < 1e-5


def test_unusable_arguments_are_refused():
    for options, message in [
        ({"kind": "matrix"}, "kernel, operator"),
        ({"kind": "operator"}, "input_shape"),
        ({"bound": 0.5}, 'kind="operator"'),
        ({"kind": "operator", "input_shape": (1, 6, 6), "bound": 0}, "positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            spectral_normalize(small_net(), **options)
    net = spectral_normalize(small_net(), kind="operator", input_shape=(1, 6, 6))
    with pytest.raises(ValueError, match="already"):
        spectral_normalize(net)


# ------------------------------------------------------------------ a network


class Residual(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def scaled_identity(channels, factor):
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    conv.weight.data = factor * torch.eye(channels)[:, :, None, None]
    return conv


def test_the_bound_of_a_residual_sum_is_one_plus_its_branch_and_is_reached():
    net = nn.Sequential(
        Residual(scaled_identity(2, 0.5)),
        Residual(scaled_identity(2, 2.0)),
        nn.ReLU6(),
        nn.Flatten(),
    )
    assert lipschitz_bound(net, (2, 3, 3)) == pytest.approx(1.5 * 3.0)
    x, y = torch.full((1, 2, 3, 3), 0.2), torch.full((1, 2, 3, 3), 0.3)
    assert ((net(x) - net(y)).norm() / (x - y).norm()).item() == pytest.approx(4.5, rel=1e-4)


def test_batch_norm_is_folded_into_the_operator_and_not_multiplied_on():
    conv, norm = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, eps=1e-12)
    conv.weight.data = torch.diag(torch.tensor([3.0, 0.5]))[:, :, None, None]
    norm.running_var.data, norm.weight.data = torch.tensor([4.0, 1.0]), torch.tensor([1.0, -5.0])
    net = nn.Sequential(conv, norm, nn.Flatten()).eval()
    assert lipschitz_bound(net, (2, 2, 2)) == pytest.approx(2.5)  # max(3 / 2, 0.5 * 5), not 3 * 5
    assert lipschitz_bound(nn.Sequential(norm, conv), (2, 2, 2)) == pytest.approx(15.0)


def test_the_door_counts_from_pixels_and_pools_have_their_norms():
    std = [0.5, 0.25, 0.2]
    body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model = models.PixelModel(body, [0.5] * 3, std)
    head = torch.linalg.matrix_norm(body[2].weight, ord=2).item()
    assert lipschitz_bound(model, (3, 4, 4)) == pytest.approx(5 / 4 * head)
    assert lipschitz_bound(model, (1, 4, 4)) == pytest.approx((4 + 16 + 25) ** 0.5 / 4 * head)
    assert lipschitz_bound(nn.MaxPool2d(2), (1, 4, 4)) == 1
    assert lipschitz_bound(nn.Sequential(nn.MaxPool2d(3, 2, padding=1)), (1, 5, 5)) == 2
    pool, spike = nn.MaxPool2d(3, stride=2, dilation=2), torch.zeros(1, 1, 13, 13)
    spike[0, 0, 6, 6] = 1.0  # the largest of 3 x 3 windows
    assert pool(spike).norm() == 3 and lipschitz_bound(nn.Sequential(pool), (1, 13, 13)) == 3
    assert lipschitz_bound(nn.Sequential(nn.AvgPool2d(2)), (1, 4, 4)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.mobilenet_v2(width=0.25, stages=4),
        lambda: models.cnn(channels=(4, 8), hidden=8),
        lambda: models.resnet18_cifar(width=1 / 8),
        lambda: models.resnet50_v2(width=1 / 16, depths=(1, 1)),
        lambda: models.spectral_normalize(models.cnn(channels=(4, 8), hidden=8)),
    ],
    ids=["mobilenet", "cnn", "resnet", "preactivation", "normalised"],
)
def test_no_pair_of_images_is_stretched_more_than_the_bound(make):
    model, generator = make(), torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.data = 0.05 + torch.rand(
                module.running_var.shape, generator=generator
            )
            module.weight.data = torch.randn(module.weight.shape, generator=generator)
    mark = fingerprint(model)
    bound = lipschitz_bound(model.train(), (1, 16, 16), iterations=20)
    assert model.training and fingerprint(model) == mark
    model.eval()
    x = torch.rand(32, 1, 16, 16, generator=generator)
    x[16:] = (x[:16] + 0.01 * torch.randn(16, 1, 16, 16, generator=generator)).clamp(0, 1)
    x.requires_grad_()
    logits = model(x)
    stretch = (logits[:16] - logits[16:]).norm(dim=1) / (x[:16] - x[16:]).flatten(1).norm(dim=1)
    (slope,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), x)
    steepest = slope.flatten(1).norm(dim=1).max() / 2**0.5
    assert 0 < max(stretch.max(), steepest) <= bound


def test_on_a_linear_network_the_bound_is_the_norm_itself():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout()).eval()
    net[1].running_var.data, net[1].weight.data = (
        torch.tensor([0.1, 2.0, 1.0]),
        torch.tensor([1.0, -2.0, 0.5]),
    )
    assert lipschitz_bound(net, (1, 6, 6)) == pytest.approx(true_norm(net, (1, 6, 6)), rel=1e-4)


def test_what_has_no_known_bound_is_named():
    class Gated(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    with pytest.raises(ValueError, match="sigmoid"):
        lipschitz_bound(nn.Sequential(Gated()), (1, 4, 4))
    with pytest.raises(ValueError, match="CELU"):
        lipschitz_bound(nn.Sequential(nn.CELU(0.1)), (1, 4, 4))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot trace Branching"):
        lipschitz_bound(Branching(), (1, 4, 4))


@pytest.mark.parametrize(
    "options",
    [{"kind": "operator", "input_shape": (1, 32, 32), "bound": 0.7}, {}],
    ids=["operator", "kernel"],
)
def test_a_saved_model_of_either_kind_loads_bit_equal(options, tmp_path):
    model = models.spectral_normalize(models.mobilenet_v2(width=0.25, stages=3), **options)
    for _ in range(2):
        model(torch.rand(2, 1, 32, 32))
    x = torch.rand(2, 1, 32, 32)
    loaded = models.load(models.save(model.eval(), tmp_path / "model.pt", meta={}))
    assert torch.equal(loaded(x), model(x))
