"""One-pixel attack: it finds a planted trigger, keeps its budget, in any company."""

import pytest
import torch
from torch import nn

from dlia_utils.attacks import margin, one_pixel


class Trigger(nn.Module):
    """Class 1 when enough pixels of the middle are bright; they raise the margin."""

    def __init__(self, needed: int = 1) -> None:
        super().__init__()
        self.needed = needed

    def forward(self, x):
        bright = torch.relu(x[:, :, 2:6, 2:6] - 0.9).sum((1, 2, 3)) * 10
        return torch.stack([torch.full_like(bright, self.needed - 0.5), bright], dim=1)


def dark(n, channels=1):
    return torch.full((n, channels, 8, 8), 0.4), torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize(
    ("pixels", "channels", "population", "iterations"),
    [(1, 1, 60, 80), (3, 1, 60, 80), (1, 3, 60, 80), (1, 1, 200, 0)],
)
def test_planted_trigger_is_found_within_the_budget(pixels, channels, population, iterations):
    x, y = dark(6, channels)
    options = {"pixels": pixels, "population": population, "iterations": iterations}
    result = one_pixel(Trigger(pixels).eval(), x, y, **options)
    changed = (result.x_adv != x).any(1).flatten(1).sum(1)
    assert result.success.all() and (changed <= pixels).all()
    assert (result.first_success_step >= 1).all()
    assert torch.equal(result.queries, 2 + population * result.first_success_step)


def test_wrong_images_are_not_attacked_and_hopeless_ones_use_the_whole_budget():
    x, y = dark(2)
    y[1] = 1  # the model says 0
    result = one_pixel(Trigger(needed=100).eval(), x, y, population=5, iterations=4)
    assert result.success.tolist() == [False, True]
    assert result.first_success_step.tolist() == [-1, 0]
    assert result.queries.tolist() == [2 + 5 * 5, 2]
    assert torch.equal(result.x_adv[1], x[1])


def test_the_company_of_an_image_does_not_matter():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)).eval()
    x = torch.rand(40, 1, 10, 10)
    y = model(x).argmax(1)
    options = {"pixels": 3, "population": 8, "iterations": 4}
    whole = one_pixel(model, x, y, seed=4, **options)  # in more than one batch
    some = [34, 1]
    alone = one_pixel(model, x[some], y[some], seed=[(4, image) for image in some], **options)
    assert torch.equal(alone.x_adv, whole.x_adv[some])
    assert torch.equal(alone.queries, whole.queries[some])


def test_it_finds_what_trying_every_pixel_finds():
    """A linear model's best pixel goes to black or white, so every image's best change is known."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double().eval()
    x = 0.4 + 0.2 * torch.rand(8, 1, 6, 6, dtype=torch.float64)
    weight = (model[1].weight[1] - model[1].weight[0]).detach().view(6, 6)
    gain = torch.maximum(-x[:, 0] * weight, (1 - x[:, 0]) * weight).flatten(1).max(1).values
    with torch.no_grad():
        best = margin(model(x), torch.zeros(8, dtype=torch.int64)) + gain
        model[1].bias[1] -= best.sort().values[3:5].mean()  # half can be fooled
        y = model(x).argmax(1)
    assert not y.any()
    result = one_pixel(model, x, y, population=60, iterations=60)
    assert torch.equal(result.success, best > best.sort().values[3:5].mean())
