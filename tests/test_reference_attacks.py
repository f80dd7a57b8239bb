"""Every attack against optima in closed form: it fools what can be fooled, and no attack does better than it can.

The models are linear, or a ball round the grey image; the distance to their boundary is known. All images of
a batch are put at the same distance, so that one eps tells: a little above it every image must fall, a
little below it none can. Agreement with other libraries: benchmarks/attacks.py.
"""

import pytest
import torch
from torch import nn

from dlia_utils import attacks
from dlia_utils.attacks import margin

SIZE, IMAGES, GAP = 6, 8, 0.4  # GAP: of the logits of every image


class Linear(nn.Module):
    """Two classes; the logits' difference is weight . x + bias."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(weight),
            nn.Parameter(torch.zeros(1, dtype=weight.dtype)),
        )

    def forward(self, x):
        rise = (x * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([torch.zeros_like(rise), rise], 1)


class Shell(nn.Module):
    """Class 1 outside the L2 ball of the given radius round the grey image."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, x):
        rise = (x - 0.5).flatten(1).square().sum(1) - self.radius**2
        return torch.stack([torch.zeros_like(rise), rise], 1)


def linear_case(norm: str):
    """(model, x, y, distance): all images lie at the same closed-form distance from the boundary."""
    generator = torch.Generator().manual_seed(3)
    x = 0.4 + 0.2 * torch.rand(IMAGES, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    model = Linear(weight).eval()
    with torch.no_grad():
        logit = model(x)[:, 1]
        y = (torch.arange(IMAGES) % 2).long()
        goal = torch.where(y == 1, GAP, -GAP)
        # Along the weights, to the wanted logit.
        x = x + ((goal - logit) / weight.square().sum())[:, None, None, None] * weight
    assert x.min() > 0.2 and x.max() < 0.8
    return model, x, y, float(GAP / (weight.abs().sum() if norm == "linf" else weight.norm()))


# How far above the closed form every image must have fallen.
BALL = {
    "fgsm": ("linf", 1.001, lambda *a, **kw: attacks.fgsm(*a, **kw)),
    "pgd": ("linf", 1.001, lambda *a, **kw: attacks.pgd(*a, loss="margin", **kw)),
    "pgd_l2": ("l2", 1.05, lambda *a, **kw: attacks.pgd(*a, norm="l2", steps=20, **kw)),
    "apgd": ("linf", 1.001, lambda *a, **kw: attacks.apgd(*a, steps=20, **kw)),
    "apgd_l2": (
        "l2",
        1.01,
        lambda *a, **kw: attacks.apgd(*a, norm="l2", steps=30, loss="margin", **kw),
    ),
}
SMALLEST = {
    "deepfool_l2": ("l2", 1.025, lambda *a, **kw: attacks.deepfool(*a, **kw)),
    "deepfool_linf": ("linf", 1.025, lambda *a, **kw: attacks.deepfool(*a, norm="linf", **kw)),
    "fmn_l2": ("l2", 1.025, lambda *a, **kw: attacks.fmn(*a, norm="l2", **kw)),
    "fmn_linf": ("linf", 1.025, lambda *a, **kw: attacks.fmn(*a, **kw)),
    "carlini_wagner": ("l2", 1.08, lambda *a, **kw: attacks.carlini_wagner(*a, steps=80, **kw)),
}


@pytest.mark.parametrize("name", BALL)
def test_a_ball_just_large_enough_fools_every_image(name):
    norm, excess, run = BALL[name]
    model, x, y, distance = linear_case(norm)
    assert run(model, x, y, eps=distance * excess).success.all()
    assert not run(model, x, y, eps=distance * 0.999).success.any()


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_change_is_the_closed_form(name):
    norm, excess, run = SMALLEST[name]
    model, x, y, distance = linear_case(norm)
    result = run(model, x, y)
    found = getattr(result, norm)
    assert result.success.all() and (found >= distance * (1 - 1e-9)).all()
    assert (found <= distance * excess + 2e-4).all(), float((found / distance).max())


def test_square_comes_near_the_optimum_without_gradients():
    """Share of the highest margin in the ball, after 400 squares, of 108 free values."""
    model, x, y, distance = linear_case("linf")
    result = attacks.square(model, x, y, eps=0.9 * distance, steps=400)
    gain = margin(model(result.x_adv), y) - margin(model(x), y)
    assert not result.success.any() and (gain <= 0.9 * GAP * (1 + 1e-9)).all()
    assert (gain >= 0.8 * 0.9 * GAP).all(), gain.min()
    blind = attacks.noise(model, x, y, eps=0.9 * distance, draws=50)
    assert (margin(model(blind.x_adv), y) - margin(model(x), y)).mean() < 0.8 * gain.mean()


@pytest.mark.parametrize(
    ("name", "excess"),
    [
        ("pgd_l2", 1.05),
        ("apgd_l2", 1.01),
        ("fmn_l2", 1.02),
        ("carlini_wagner", 1.03),
        ("deepfool_l2", 1.09),
    ],
)
def test_curved_boundary(name, excess):
    """Inside a ball of radius 1, 0.9 from its centre: 0.1 to go, in a direction that differs by image."""
    generator = torch.Generator().manual_seed(1)
    way = 2 * torch.rand(IMAGES, 1, SIZE, SIZE, dtype=torch.float64, generator=generator) - 1
    x = 0.5 + 0.9 * way / way.flatten(1).norm(dim=1)[:, None, None, None]
    y, model = torch.zeros(IMAGES, dtype=torch.int64), Shell(1.0).eval()
    if name in BALL:
        assert BALL[name][2](model, x, y, eps=0.1 * excess).success.all()
        assert not BALL[name][2](model, x, y, eps=0.0999).success.any()
    else:
        result = SMALLEST[name][2](model, x, y)
        assert (result.l2 >= 0.1 * (1 - 1e-9)).all()
        assert (result.l2 <= 0.1 * excess).all(), float(result.l2.max())


def test_one_pixel_finds_what_trying_every_pixel_finds():
    """A linear model's best pixel goes to black or white, so every image's best change is known."""
    model, x, _, _ = linear_case("linf")
    x, weight = x[:, :1], model.weight.detach().sum(0)
    gain = torch.maximum(-x[:, 0] * weight, (1 - x[:, 0]) * weight)
    model.weight.data = weight[None]
    with torch.no_grad():
        best = model(x)[:, 1] + gain.flatten(1).max(1).values
        middle = best.sort().values[IMAGES // 2 - 1 : IMAGES // 2 + 1].mean()
        model.bias -= middle  # half can be fooled
        y = model(x).argmax(1)
    assert not y.any()
    result = attacks.one_pixel(model, x, y, population=60, iterations=60)
    assert torch.equal(result.success, best > best.median())
