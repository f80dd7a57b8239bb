"""The CNN, the two ResNets, the table of layers: what they compute, keys, seeds, folded copies."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlia_utils import models
from dlia_utils.models.pixel import fast_copy
from dlia_utils.models.resnet import CifarResNet, PreActBottleneck, PreActResNet


def tiny_resnet(**options) -> models.PixelModel:
    return models.resnet50_v2(width=1 / 16, depths=(1, 2, 1, 1), **options)


def kept(model: nn.Module) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def shapes(model: nn.Module) -> str:
    """A digest of the names and shapes of all entries."""
    entries = sorted(f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items())
    return hashlib.sha1("\n".join(entries).encode()).hexdigest()[:12]


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms as after training, so that they do something."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return model.eval()


def test_the_cnn_computes_its_layers_one_after_the_other():
    options = dict(channels=(4, 6), hidden=5, kernel=5, mean=0.4, std=0.2, num_classes=3)
    model = randomised(models.cnn(**options, dropout=0.3))
    x = torch.rand(2, 1, 21, 32)
    h = ((x - 0.4) / 0.2).expand(-1, 3, -1, -1)
    for block in model.backbone.blocks:
        h = F.max_pool2d(F.relu(block.norm(F.conv2d(h, block.conv.weight, padding=2))), 2)
    h = F.relu(model.backbone.hidden(F.adaptive_avg_pool2d(h, 4).flatten(1)))
    torch.testing.assert_close(model(x), model.backbone.fc(h))
    assert model.backbone.dropout.p == 0.3 and model.backbone.hidden.in_features == 6 * 16


@pytest.mark.parametrize(
    "create, size",
    [
        (lambda **o: models.cnn(channels=(4, 8), hidden=8, mean=0.3, batch_norm=False, **o), 16),
        (tiny_resnet, 64),
        (lambda **o: models.mobilenet_v2(width=0.25, stages=2, **o), 32),
        (lambda **o: models.spectral_normalize(models.mobilenet_v2(width=0.25, **o)), 32),
        (lambda **o: models.resnet18_cifar(width=1 / 8, std=0.3, **o), 28),
    ],
)
def test_seed_file_and_folded_copy(create, size, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (create(seed=seed, num_classes=3).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(a, b) and not equal(a, c)
    model, x = randomised(create(num_classes=3)), torch.rand(2, 1, size, size, requires_grad=True)
    again = models.load(models.save(model, tmp_path / "model.pt", meta={}))
    assert again.recipe == model.recipe and torch.equal(again(x), model(x))
    assert models.summary(again, size).layer[:-1].is_unique  # every module runs once, for hooks

    before, expected = kept(model), model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    folded = fast_copy(model.train())
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(folded(x).square().sum(), x)
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4)
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert equal(kept(model), before) and all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_torch_fx_cannot_trace_is_copied_with_a_warning_that_names_it():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.norm(self.conv(x)).mean((2, 3))
            return x if x.sum() > 0 else -x  # depends on the data: torch.fx cannot trace it

    model, x = Branches().eval(), torch.rand(2, 1, 5, 5)
    with pytest.warns(RuntimeWarning, match="Branches could not be folded: attacks take several"):
        folded = fast_copy(model)
    torch.testing.assert_close(folded(x), model(x))


def test_the_summary_has_a_row_per_layer_and_the_whole_number_of_parameters():
    model = models.with_head(models.cnn(channels=(4, 8), hidden=8), num_classes=3).train()
    table = models.summary(model, 16)
    block, end = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"], ["Linear", "ReLU", "Dropout"]
    assert table.kind.tolist() == [*block * 2, *end, "Identity", "Dropout", "Linear", "total"]
    first, total = table.iloc[0], table.iloc[-1]
    assert first.layer == "backbone.body.blocks.0.conv" and first.output == "[1, 4, 16, 16]"
    assert first.parameters == 4 * 3 * 9 and first.trainable == 0
    assert total.parameters == table.parameters[:-1].sum()
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total.trainable == 8 * 3 + 3 == table.trainable[:-1].sum()
    assert model.training and not model.backbone.body.training
    assert not any(module._forward_hooks for module in model.modules())
    layer = nn.Linear(16, 16)  # runs twice: shown twice and counted once
    table = models.summary(nn.Sequential(nn.Flatten(), layer, layer), 4)
    assert table.parameters.tolist() == [0, 272, 0, 272]


def test_the_keys_shapes_and_parameters_are_timms_and_those_of_every_cifar_table():
    with torch.device("meta"):
        network, small = PreActResNet(1000, 1.0, (3, 4, 6, 3)), CifarResNet(10, 1.0)
        maps = network.stages(network.stem(torch.empty(1, 3, 224, 224)))
        ends = small.layer4(small.layer3(small.layer2(torch.empty(1, 64, 32, 32))))
    assert shapes(network) == "ad4935471c75"  # of timm's but for the last layer, a convolution
    assert sum(p.numel() for p in network.parameters()) == 25_549_352
    assert sum(p.numel() for p in small.parameters()) == 11_173_962
    assert maps.shape == (1, 2048, 7, 7) and ends.shape == (1, 512, 4, 4)


def test_the_blocks_compute_what_their_papers_draw():
    block = randomised(PreActBottleneck(8, 16, 2, first=True))
    x = torch.rand(2, 8, 9, 9) - 0.5
    a = F.relu(block.norm1(x))
    h = F.relu(block.norm2(F.conv2d(a, block.conv1.weight)))
    h = F.conv2d(h, block.conv2.weight, stride=2, padding=1)  # as in timm
    h = F.conv2d(F.relu(block.norm3(h)), block.conv3.weight)
    torch.testing.assert_close(block(x), F.conv2d(a, block.downsample.conv.weight, stride=2) + h)
    block = randomised(models.resnet18_cifar(width=1 / 8)).backbone.layer2[0]
    h = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(block.downsample(x) + h))
