"""One-pixel attack: it finds a planted trigger, keeps its budget, in any company."""

import pytest
import torch
from torch import nn

from dlia_utils.attacks import one_pixel


class Trigger(nn.Module):
    """Class 1 when enough pixels of the middle are bright; they raise the margin."""

    def __init__(self, needed: int = 1) -> None:
        super().__init__()
        self.needed = needed

    def forward(self, x):
        bright = torch.relu(x[:, :, 2:6, 2:6] - 0.9).sum((1, 2, 3)) * 10
        return torch.stack([torch.full_like(bright, self.needed - 0.5), bright], dim=1)


def dark(n: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n, channels, 8, 8), 0.4), torch.zeros(n, dtype=torch.int64)


def random_cnn() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(36, 2),
    ).eval()


@pytest.mark.parametrize(("pixels", "channels"), [(1, 1), (3, 1), (1, 3)])
def test_planted_trigger_is_found_within_the_budget(pixels, channels):
    x, y = dark(6, channels)
    result = one_pixel(Trigger(pixels).eval(), x, y, pixels=pixels, population=60, iterations=80)
    assert result.success.all()
    changed = (result.x_adv != x).any(1).flatten(1).sum(1)
    assert (changed <= pixels).all() and (result.first_success_step >= 1).all()
    assert torch.equal(result.queries, 2 + 60 * result.first_success_step)


def test_wrong_images_are_not_attacked_and_hopeless_ones_use_the_whole_budget():
    x, y = dark(2)
    y[1] = 1  # the model says 0
    result = one_pixel(Trigger(needed=100).eval(), x, y, population=5, iterations=4)
    assert result.success.tolist() == [False, True]
    assert result.first_success_step.tolist() == [-1, 0]
    assert result.queries.tolist() == [2 + 5 * 5, 2]
    assert torch.equal(result.x_adv[1], x[1])


@pytest.mark.parametrize("pixels", [1, 3])
def test_the_company_of_an_image_does_not_matter(pixels):
    model = random_cnn()
    x = torch.rand(40, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    options = {"pixels": pixels, "population": 8, "iterations": 4}
    whole = one_pixel(model, x, y, seed=4, **options)  # in more than one batch
    some = [34, 1]
    alone = one_pixel(model, x[some], y[some], seed=[(4, image) for image in some], **options)
    assert torch.equal(alone.x_adv, whole.x_adv[some])
    assert torch.equal(alone.queries, whole.queries[some])
    assert not torch.equal(one_pixel(model, x, y, seed=5, **options).x_adv, whole.x_adv)


def test_a_small_eps_bounds_the_pixel():
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    model = Trigger(needed=100).eval()
    result = one_pixel(model, x, y, eps=0.1, population=6, iterations=3)
    assert 0 < (result.x_adv - x).abs().max() <= 0.1 + 1e-6


def test_first_population_is_checked():
    x, y = dark(3)
    result = one_pixel(Trigger().eval(), x, y, population=200, iterations=0)
    assert result.success.all() and (result.first_success_step == 1).all()


@pytest.mark.parametrize(
    "bad", [{"population": 3}, {"pixels": 0}, {"f": 0.0}, {"cr": 1.5}, {"iterations": -1}]
)
def test_bad_search_settings_are_refused(bad):
    x, y = dark(1)
    with pytest.raises(ValueError, match=next(iter(bad))):
        one_pixel(Trigger().eval(), x, y, **bad)
