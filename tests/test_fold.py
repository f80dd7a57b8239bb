"""The folded copy: the same logits and gradients, no batch norm left, the caller's model untouched."""

import copy
import logging

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from dlia_utils.models.pixel import PixelModel, fast_copy


def mobilenet(*, spectral: bool = False) -> PixelModel:
    torch.manual_seed(0)
    backbone = torchvision.models.mobilenet_v2(num_classes=2, width_mult=0.25)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, not the neutral start values
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    if spectral:
        for module in [m for m in backbone.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            spectral_norm(module)
    return PixelModel(backbone, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()


@pytest.mark.parametrize("spectral", [False, True])
def test_same_logits_and_gradients_and_an_untouched_original(spectral):
    model, x = mobilenet(spectral=spectral), torch.rand(3, 1, 32, 32, requires_grad=True)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    state = copy.deepcopy(model.state_dict())

    folded = fast_copy(model)
    torch.testing.assert_close(folded(x), expected, atol=1e-4, rtol=1e-4)
    (found,) = torch.autograd.grad(folded(x).square().sum(), x)
    torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())

    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), expected)


def test_training_mode_of_the_original_is_kept():
    model = mobilenet().train()
    assert not fast_copy(model).training
    assert all(m.training for m in model.modules())


def test_untraceable_model_is_copied_with_a_log_line(caplog):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.norm(self.conv(x)).mean((2, 3))
            return x if x.sum() > 0 else -x  # depends on the data: torch.fx cannot trace it

    model, x = Branches().eval(), torch.rand(2, 1, 5, 5)
    with caplog.at_level(logging.INFO, logger="dlia_utils"):
        folded = fast_copy(model)
    assert "not folded" in caplog.text
    torch.testing.assert_close(folded(x), model(x))
