"""The folded copy: the same logits and gradients, the caller's model untouched."""

import copy

import pytest
import torch
from torch import nn

from dlia_utils.models import mobilenet_v2, spectral_normalize
from dlia_utils.models.pixel import fast_copy


@pytest.mark.parametrize("spectral", [False, True])
def test_same_logits_and_gradients_and_an_untouched_original(spectral):
    model = mobilenet_v2(width=0.25)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, not the neutral start values
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    model = (spectral_normalize(model) if spectral else model).eval()
    x = torch.rand(3, 1, 32, 32, requires_grad=True)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    state = copy.deepcopy(model.state_dict())

    folded = fast_copy(model.train())
    assert all(m.training for m in model.modules()) and not folded.training
    torch.testing.assert_close(folded(x), expected, atol=1e-4, rtol=1e-4)
    (found,) = torch.autograd.grad(folded(x).square().sum(), x)
    torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.eval()(x), expected)


def test_a_model_that_torch_fx_cannot_trace_is_copied_with_a_warning_that_names_it():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.norm(self.conv(x)).mean((2, 3))
            return x if x.sum() > 0 else -x  # depends on the data: torch.fx cannot trace it

    class Broken(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    model, x = Branches().eval(), torch.rand(2, 1, 5, 5)
    with pytest.warns(RuntimeWarning, match="Branches could not be folded: attacks take several"):
        folded = fast_copy(model)
    torch.testing.assert_close(folded(x), model(x))
    with pytest.raises(ZeroDivisionError):  # a fault of the model is not hidden
        fast_copy(Broken())
