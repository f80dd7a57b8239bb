"""How strong the attacks are: models whose optimum is known, and each against the others."""

import pytest
import torch
from torch import nn

from dlia_utils import attacks

EPS = 8 / 255


def linear_model(channels: int = 1, classes: int = 2, size: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes)).double().eval()


def near_boundary(model: nn.Module, channels: int = 1, n: int = 12, size: int = 4):
    """Images well inside [0,1], so that the nearest boundary of a linear model lies inside, too."""
    x = 0.4 + 0.2 * torch.rand(n, channels, size, size, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)  # all classes about equally likely
        return x, model(x).argmax(1)


def boundary_distances(model: nn.Module, x, y, norm: str):
    """Closed form: over the classes, the least |logit gap| / dual norm of the weight difference."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    distances = []
    for other in range(logits.shape[1]):
        flat = weight[other] - weight[y]
        rise = flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)
        gap = logits.gather(1, y[:, None])[:, 0] - logits[:, other]
        distances.append(torch.where(y == other, torch.inf, gap / rise))
    return torch.stack(distances).min(0).values


@pytest.fixture(scope="module")
def trained():
    """A small CNN that knows ten patterns, and 40 noisy images of them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 10))
    y = torch.arange(40) % 10
    patterns = 0.5 + 0.15 * torch.randn(10, 1, 8, 8)
    x = (patterns[y] + 0.05 * torch.randn(40, 1, 8, 8)).clamp(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


# ---------------------------------------- known truth


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_linear_optimum_of_two_classes(channels, loss):
    """Each pixel goes to the bound of the ball that raises the margin."""
    model = linear_model(channels)
    x = torch.rand(9, channels, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    direction = (model[1].weight[1 - y] - model[1].weight[y]).view_as(x).sign()
    best = (x + EPS * direction).clamp(0, 1)
    torch.testing.assert_close(attacks.fgsm(model, x, y, eps=EPS, loss=loss).x_adv, best)
    for attack, steps in ((attacks.pgd, 5), (attacks.apgd, 30)):
        options = {"eps": EPS, "loss": loss, "steps": steps, "stop_when_fooled": False}
        result = attack(model, x, y, **options)
        torch.testing.assert_close(result.x_adv, best)
        assert torch.equal(result.success, model(best).argmax(1) != y)


@pytest.mark.parametrize("attack", [attacks.apgd, attacks.pgd])
def test_l2_attacks_reach_the_linear_optimum(attack):
    model = linear_model(2)
    x, y = near_boundary(model, 2)
    best = 0.2 * (model[1].weight[1 - y] - model[1].weight[y]).norm(dim=1)
    options = {"norm": "l2", "steps": 40, "loss": "margin", "stop_when_fooled": False}
    result = attack(model, x, y, eps=0.2, **options)
    gain = attacks.margin(model(result.x_adv), y) - attacks.margin(model(x), y)
    assert (gain >= 0.97 * best).all() and (result.l2 <= 0.2 + 1e-9).all()


@pytest.mark.parametrize("classes", [2, 10])
def test_attacks_in_a_ball_fool_exactly_what_can_be_fooled(classes):
    """A linear model's image falls exactly when its closed-form distance lies within eps."""
    model = linear_model(classes=classes)
    x, y = near_boundary(model, n=20)
    for norm, attack, options in [
        ("linf", attacks.pgd, {"loss": "margin", "restarts": 3, "steps": 40}),
        ("linf", attacks.apgd, {"loss": "margin", "restarts": 2, "steps": 40}),
        ("l2", attacks.apgd, {"loss": "margin", "norm": "l2", "steps": 50}),
        ("linf", attacks.square, {"steps": 400}),
    ]:
        distance = boundary_distances(model, x, y, norm)
        eps = float(distance.sort().values[9:11].mean())  # half of them can be fooled
        assert torch.equal(attack(model, x, y, eps=eps, **options).success, distance < eps)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_smallest_change_of_a_linear_model(norm, classes):
    model = linear_model(classes=classes)
    x, y = near_boundary(model)
    best = boundary_distances(model, x, y, norm)
    found = [(attacks.deepfool(model, x, y, norm=norm), 1.02)]
    # The others follow the class that is likeliest at each step, not the nearest.
    found += [(attacks.fmn(model, x, y, norm=norm), 1.02 if classes == 2 else 2.0)]
    if norm == "l2":
        nearest = attacks.carlini_wagner(model, x, y, steps=40, searches=4)
        found += [(nearest, 1.05 if classes == 2 else 2.0)]
    for result, allowed in found:
        size = getattr(result, norm)
        assert result.success.all() and (size >= best * (1 - 1e-6)).all()
        assert (size <= best * allowed + 2e-4).all(), (size / best).max()


def test_deepfool_is_one_step_of_a_linear_model():
    model = linear_model(2)
    x, y = near_boundary(model, 2)
    result = attacks.deepfool(model, x, y)
    assert result.first_success_step.eq(1).all() and result.forwards == 2 * len(x)
    torch.testing.assert_close(result.l2, 1.02 * (boundary_distances(model, x, y, "l2") + 1e-4))


def test_black_borders_do_not_stop_the_smallest_changes():
    """Pixels at 0 that should go lower cannot move: the others have to make up for them."""
    model = linear_model()
    x, y = near_boundary(model, n=1)
    direction = (model[1].weight[1 - y] - model[1].weight[y]).view_as(x).detach()
    x = torch.where(direction < -0.2, 0.0, x)
    with torch.no_grad():
        model[1].bias[y] += attacks.margin(model(x), y) + 0.05
    for attack in (attacks.deepfool, attacks.fmn, attacks.carlini_wagner):
        assert attack(model, x, y, steps=60).success.all()


def test_normalised_eps_is_a_step_in_normalised_space():
    model = linear_model(3)
    x, y = near_boundary(model, 3)
    std = torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    change = attacks.fgsm(model, x, y, eps=attacks.normalised_eps(0.1, std)).x_adv - x
    torch.testing.assert_close((change / std).abs(), torch.full_like(x, 0.1), atol=1e-7, rtol=1e-6)


def test_carlini_wagner_finds_the_scale_of_the_model():
    """Images 1000 times as near to the boundary fall to changes 1000 times as small."""
    model = linear_model(size=8)
    x, y = near_boundary(model, size=8)
    gaps, direction = -attacks.margin(model(x), y), model[1].weight[0] - model[1].weight[1]
    toward = torch.where(y == 0, -1, 1) * gaps / direction.square().sum()  # to the boundary itself
    for left in (1.0, 1e-3):
        near = (x + (1 - left) * (toward[:, None] * direction).view_as(x)).detach()
        best = boundary_distances(model, near, y, "l2")
        found = attacks.carlini_wagner(model, near, y, steps=30, searches=3)
        assert found.success.all() and (found.l2 <= 1.05 * best).all()


def test_apgd_halves_the_step_where_the_loss_swings():
    """A valley that a step of 2 eps jumps across: fixed steps swing, APGD settles at the top."""

    class Ridge(nn.Module):
        def forward(self, x):
            height = -((x.flatten(1) - 0.513) ** 2).sum(1)
            return torch.stack([1 - height, height], 1)

    x, y = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    result = attacks.apgd(Ridge().eval(), x, y, eps=0.1, loss="margin", steps=100)
    torch.testing.assert_close(result.x_adv, torch.full_like(x, 0.513), atol=1e-3, rtol=0)


class Shell(nn.Module):
    """Class 1 outside the L2 ball of radius 1 round the grey image."""

    def forward(self, x):
        rise = (x - 0.5).flatten(1).square().sum(1) - 1
        return torch.stack([torch.zeros_like(rise), rise], 1)


@pytest.mark.parametrize(
    ("attack", "options", "excess"),
    [
        (attacks.pgd, {"norm": "l2", "steps": 20, "loss": "margin"}, 1.05),
        (attacks.apgd, {"norm": "l2", "steps": 30, "loss": "margin"}, 1.01),
        (attacks.fmn, {"norm": "l2"}, 1.02),
        (attacks.carlini_wagner, {"steps": 80}, 1.03),
        (attacks.deepfool, {}, 1.09),
    ],
)
def test_curved_boundary(attack, options, excess):
    """0.9 from the centre of a ball: 0.1 to go, in a direction that differs by image."""
    generator = torch.Generator().manual_seed(1)
    way = 2 * torch.rand(8, 1, 6, 6, dtype=torch.float64, generator=generator) - 1
    x = 0.5 + 0.9 * way / way.flatten(1).norm(dim=1)[:, None, None, None]
    y, model = torch.zeros(8, dtype=torch.int64), Shell().eval()
    if attack in (attacks.pgd, attacks.apgd):
        assert attack(model, x, y, eps=0.1 * excess, **options).success.all()
        assert not attack(model, x, y, eps=0.0999, **options).success.any()
    else:
        size = attack(model, x, y, **options).l2
        assert (size >= 0.1 * (1 - 1e-9)).all() and (size <= 0.1 * excess).all(), size.max()


def test_square_comes_near_the_optimum_without_gradients():
    """Share of the highest margin in the ball, after 400 squares, of 108 free values."""
    model = linear_model(3, size=6)
    x, y = near_boundary(model, 3, size=6)
    eps = float(boundary_distances(model, x, y, "linf").min()) * 0.9
    best = eps * (model[1].weight[1 - y] - model[1].weight[y]).abs().sum(1)
    gains = [
        attacks.margin(model(result.x_adv), y) - attacks.margin(model(x), y)
        for result in (
            attacks.square(model, x, y, eps=eps, steps=400),
            attacks.noise(model, x, y, eps=eps, draws=50),
        )
    ]
    assert (gains[0] <= best * (1 + 1e-9)).all() and (gains[0] >= 0.8 * best).all()
    assert gains[1].mean() < 0.8 * gains[0].mean()


def test_one_pixel_finds_what_trying_every_pixel_finds():
    """A linear model's best pixel goes to black or white, so every image's best change is known."""
    model = linear_model(size=6)
    x, _ = near_boundary(model, n=8, size=6)
    weight = (model[1].weight[1] - model[1].weight[0]).detach().view(6, 6)
    gain = torch.maximum(-x[:, 0] * weight, (1 - x[:, 0]) * weight).flatten(1).max(1).values
    with torch.no_grad():
        best = attacks.margin(model(x), torch.zeros(8, dtype=torch.int64)) + gain
        model[1].bias[1] -= best.sort().values[3:5].mean()  # half can be fooled
        y = model(x).argmax(1)
    assert not y.any()
    result = attacks.one_pixel(model, x, y, population=60, iterations=60)
    assert torch.equal(result.success, best > best.sort().values[3:5].mean())


# ---------------------------------------- against each other


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
def test_more_work_fools_more(eps, trained):
    model, x, y = trained
    fgsm = attacks.fgsm(model, x, y, eps=eps).success
    once, thrice = (attacks.pgd(model, x, y, eps=eps, steps=8, restarts=k).success for k in (1, 3))
    many = attacks.pgd(model, x, y, eps=eps, steps=30, loss="margin").success
    apgd = attacks.apgd(model, x, y, eps=eps, steps=30, loss="margin").success
    square = attacks.square(model, x, y, eps=eps, steps=60).success
    noise = attacks.noise(model, x, y, eps=eps, draws=20).success
    assert (thrice | ~once).all() and (apgd | ~square).all()
    assert apgd.sum() >= many.sum() >= fgsm.sum() and square.sum() >= noise.sum()
    distance = attacks.fmn(model, x, y, steps=40).linf  # one run answers for every eps
    assert (distance <= eps).sum() >= many.sum() - 1


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
@pytest.mark.parametrize("restarts", [0, 1, 2])
def test_stopping_early_fools_the_same_images(attack, restarts, trained):
    model, x, y = trained
    options = {
        "eps": 0.06,
        "steps": 12,
        "restarts": max(restarts, attack is attacks.apgd),
        "seed": 5,
    }
    early, full = (attack(model, x, y, stop_when_fooled=stop, **options) for stop in (True, False))
    assert torch.equal(early.success, full.success) and early.forwards < full.forwards
    assert torch.equal(early.first_success_step, full.first_success_step)


def test_a_full_run_returns_the_point_of_highest_loss(trained):
    model, x, y = trained
    one = attacks.pgd(model, x, y, eps=0.1, steps=1, restarts=0, stop_when_fooled=False)
    assert one.forwards == 2 * len(x) and one.backwards == len(x)
    losses = [nn.functional.cross_entropy(model(p), y, reduction="none") for p in (one.x_adv, x)]
    assert (losses[0] >= losses[1]).all()
    assert one.linf.max() > 0.09  # the last update is evaluated and returned


def test_smallest_changes_are_ordered(trained):
    """FMN and Carlini-Wagner find smaller L2 changes than DeepFool, which stops at once."""
    model, x, y = (trained[0], trained[1][:20], trained[2][:20])
    deepfool = attacks.deepfool(model, x, y).l2.median()
    assert attacks.fmn(model, x, y, norm="l2", steps=40).l2.median() <= deepfool
    assert attacks.carlini_wagner(model, x, y, steps=30, searches=4).l2.median() <= deepfool


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_margin_fools_a_saturated_model_where_cross_entropy_has_no_gradient(attack, trained):
    model, x, y = trained

    class Saturated(nn.Module):
        def forward(self, images):
            return 1e4 * model(images)

    right = model(x).argmax(1) == y
    blind, seeing = (
        attack(Saturated().eval(), x[right], y[right], eps=0.2, loss=loss, steps=10).success
        for loss in ("ce", "margin")
    )
    assert seeing.float().mean() > 0.9 > blind.float().mean()
