"""EigenCAM against numpy's SVD, the hook that leaves no trace, the share of a map in boxes."""

from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dlia_utils.explain import activations, eigencam, energy_inside


def noise(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def stretch(m):
    return (m - m.min()) / (m.max() - m.min())


def oracle(image):
    """The paper's projection with numpy's full SVD; the sign by the same rule."""
    a = image.astype(float).reshape(len(image), -1).T
    u, s, _ = np.linalg.svd(a, full_matrices=False)
    projected = u[:, 0] * s[0]
    projected *= np.sign(projected @ np.linalg.norm(a, axis=1)) or 1
    return stretch(projected).reshape(image.shape[1:])


@pytest.mark.parametrize("shape", [(40, 3, 5), (3, 9, 8), (6, 2, 3), (1, 4, 4)])
def test_equals_numpys_svd_for_wide_and_tall_matrices(shape):
    x = np.random.default_rng(1).normal(0.3, 1, (2, *shape)).astype(np.float32)
    maps = eigencam(torch.from_numpy(x))
    assert maps.shape == (2, *shape[1:]) and maps.dtype == torch.float32
    for ours, image in zip(maps.numpy(), x, strict=True):
        np.testing.assert_allclose(ours, oracle(image), atol=2e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rank_one_activations_give_their_spatial_factor_whatever_the_sign(sign):
    place = noise(1, 7, 5)
    channels = torch.tensor([0.5, -2.0, 1.0]).view(3, 1, 1)  # a signed layer, such as an FPN output
    maps = eigencam((sign * channels * place)[None])
    torch.testing.assert_close(maps, stretch(place), atol=1e-6, rtol=0)


def test_maps_are_resized_before_they_are_stretched_to_the_full_range():
    x = noise(3, 4, 5, 6)
    for size, shape in ((16, (16, 16)), ((10, 12), (10, 12)), (2, (2, 2))):
        maps = eigencam(x, size=size)
        assert maps.shape == (3, *shape)
        assert maps.amin((1, 2)).tolist() == [0, 0, 0] and maps.amax((1, 2)).tolist() == [1, 1, 1]


def test_images_of_a_batch_do_not_influence_each_other():
    x = noise(4, 6, 5, 5)
    assert torch.equal(eigencam(x, size=20)[2], eigencam(x[2:3] * 1.0, size=20)[0])
    mixed = x.clone()
    mixed[0] *= 1e6
    assert torch.equal(eigencam(mixed)[1:], eigencam(x)[1:])


def test_constant_maps_are_zeros_not_noise_and_half_precision_is_taken():
    flat = torch.tensor([0.1, 0.7, -0.3]).view(1, 3, 1, 1).expand(1, 3, 9, 9)
    assert not eigencam(flat).any() and not eigencam(flat, size=32).any()
    x = noise(1, 4, 6, 6)
    maps = eigencam(x.bfloat16().requires_grad_())
    assert not maps.requires_grad and (maps - eigencam(x)).abs().max() < 0.05


# the hook


class Pyramid(nn.Module):
    """A backbone that returns maps by name, as torchvision's FPN does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        fine = self.body(x)
        return OrderedDict({"0": fine, "pool": nn.functional.max_pool2d(fine, 2)})


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.norm, self.relu = Pyramid(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        features = self.relu(self.norm(self.backbone(x)["0"]))
        return self.relu(features.mean((2, 3)))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_layer_is_found_by_module_or_name_and_the_model_is_left_bit_equal():
    model, x = Detector().eval(), torch.rand(2, 1, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    by_name = activations(model, x, "norm")
    assert by_name.shape == (2, 4, 8, 8) and not by_name.requires_grad
    assert torch.equal(by_name, activations(model, x, model.norm))
    assert (by_name < 0).any(), "the in-place ReLU behind the layer wrote into what was seen"
    assert activations(model, x, "backbone", level="0").shape == (2, 4, 8, 8)
    assert activations(model, x, "backbone", level="pool").shape == (2, 4, 4, 4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not hooks(model) and not model.training


@pytest.mark.parametrize(
    "layer, level, words",
    [
        ("backbone.boby", None, "backbone.body"),
        ("backbone", None, r"\['0', 'pool'\]"),
        ("unused", None, "ran 0 times"),
        ("relu", None, "not feature maps"),
    ],
)
def test_a_wrong_layer_is_explained(layer, level, words):
    model = Detector().eval()
    with pytest.raises(ValueError, match=words):
        activations(model, torch.rand(1, 1, 8, 8), layer, level=level)
    assert not hooks(model)


# energy


def table(*boxes):
    return pd.DataFrame(boxes, columns=["x1", "y1", "x2", "y2"], dtype=float)


def test_energy_counts_a_pixel_once_by_its_centre_and_stands_beside_the_area():
    heat = np.ones((5, 4, 8))
    heat[0, 0, 0], heat[4] = 9, 0  # the first sums to 40
    boxes = [table((0, 0, 2, 2), (1, 1, 3, 3)), table(), table((-5, -5, 99, 99))]
    boxes += [table((0.6, 0, 2.5, 1)), table((0, 0, 1, 1))]
    found = energy_inside(torch.from_numpy(heat), boxes)
    np.testing.assert_allclose(found[0], [(7 + 8) / 40, 7 / 32])
    assert np.isnan(found[1]).all() and found[2].tolist() == [1, 1]
    assert found[3, 1] == 1 / 32  # of the centres 0.5, 1.5 and 2.5 only 1.5
    assert np.isnan(found[4, 0])
