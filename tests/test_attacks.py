"""FGSM, PGD and noise against known truth: linear models, feasibility, an untouched model, clear errors."""

import pytest
import torch
from torch import nn

from dlia_utils import attacks
from dlia_utils.attacks import _contract

EPS = 8 / 255


def linear_model(channels: int, classes: int, size: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes)).double().eval()


def batch(
    channels: int, model: nn.Module, n: int = 9, size: int = 4, low: float = 0.0, high: float = 1.0
):
    x = low + (high - low) * torch.rand(n, channels, size, size, dtype=torch.float64)
    return x, model(x).argmax(1)


def small_cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(6 * 16, 2))


@pytest.fixture(scope="module")
def trained():
    """A small CNN that knows a bright centre from a dark one, and 64 images it was trained on."""
    model = small_cnn()
    y = torch.arange(64) % 2
    x = 0.5 + 0.1 * torch.randn(64, 1, 8, 8)
    x[:, :, 2:6, 2:6] += 0.25 * (y.float()[:, None, None, None] - 0.5)
    x = x.clamp(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def best_for_linear(model: nn.Module, x, y, eps):
    """The point of the ball that raises the two-class margin most: each pixel at the bound that helps."""
    weight = model[1].weight
    direction = (weight[1 - y] - weight[y]).view_as(x).sign()
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    return torch.where(direction > 0, upper, torch.where(direction < 0, lower, x))


# ------------------------------------------------------------------------------------------- known truth


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_linear_optimum_of_two_classes(channels, loss):
    model = linear_model(channels, 2)
    x, y = batch(channels, model)
    best = best_for_linear(model, x, y, EPS)
    torch.testing.assert_close(attacks.fgsm(model, x, y, eps=EPS, loss=loss).x_adv, best)
    result = attacks.pgd(model, x, y, eps=EPS, loss=loss, steps=5, stop_when_fooled=False)
    torch.testing.assert_close(result.x_adv, best)
    assert torch.equal(result.success, model(best).argmax(1) != y)


@pytest.mark.parametrize("channels", [1, 3])
def test_linear_optimum_of_four_classes(channels):
    """An image can be fooled exactly when for some other class the best point of the ball wins."""
    model = linear_model(channels, 4)
    x, y = batch(channels, model, n=20)
    weight, bias = model[1].weight, model[1].bias
    lower, upper = _contract.ball(x, EPS)
    possible = torch.zeros(len(x), dtype=torch.bool)
    for other in range(4):
        difference = (weight[other] - weight[y]).view_as(x)
        gain = torch.where(difference > 0, upper * difference, lower * difference).flatten(1).sum(1)
        possible |= (gain + bias[other] - bias[y] > 0) & (y != other)
    result = attacks.pgd(model, x, y, eps=EPS, loss="margin", steps=40, restarts=3)
    assert 0 < int(possible.sum()) < len(x)
    assert torch.equal(result.success, possible)


def test_grey_shares_one_perturbation():
    model = linear_model(3, 2)
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64).expand(-1, 3, -1, -1)
    y = model(x).argmax(1)
    weight = (model[1].weight[1 - y] - model[1].weight[y]).view_as(x).sum(1, keepdim=True)
    best = torch.clamp(x + EPS * weight.sign(), 0, 1)
    torch.testing.assert_close(attacks.fgsm(model, x, y, eps=EPS, grey=True).x_adv, best)
    for attack in (attacks.pgd, attacks.noise):
        change = attack(model, x, y, eps=EPS, grey=True).x_adv - x
        assert torch.equal(change[:, :1].expand_as(change), change)


def test_normalised_eps_is_a_step_in_normalised_space():
    model = linear_model(3, 2)
    x, y = batch(3, model, low=0.3, high=0.7)
    std = torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    change = attacks.fgsm(model, x, y, eps=attacks.normalised_eps(0.1, std)).x_adv - x
    torch.testing.assert_close((change / std).abs(), torch.full_like(x, 0.1), atol=1e-7, rtol=1e-6)


def test_margin_fools_a_saturated_model_where_cross_entropy_has_no_gradient(trained):
    model, x, y = trained
    right = model(x).argmax(1) == y
    x, y, saturated = x[right], y[right], nn.Sequential(model, Scale(1e4)).eval()
    assert not attacks.pgd(saturated, x, y, eps=0.2, loss="ce", random_start=False).success.any()
    assert (
        attacks.pgd(saturated, x, y, eps=0.2, loss="margin", random_start=False)
        .success.float()
        .mean()
        > 0.9
    )


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return logits * self.factor


# ------------------------------------------------------------------------------------------- every result


RUNS = {
    "fgsm": lambda m, x, y, **kw: attacks.fgsm(m, x, y, **kw),
    "pgd_ce": lambda m, x, y, **kw: attacks.pgd(m, x, y, restarts=2, **kw),
    "pgd_margin": lambda m, x, y, **kw: attacks.pgd(m, x, y, loss="margin", **kw),
    "pgd_full": lambda m, x, y, **kw: attacks.pgd(m, x, y, stop_when_fooled=False, **kw),
    "noise": lambda m, x, y, **kw: attacks.noise(m, x, y, **kw),
    "one_pixel": lambda m, x, y, **kw: attacks.one_pixel(m, x, y, population=6, iterations=3, **kw),
}


@pytest.mark.parametrize("name", RUNS)
def test_result_is_feasible_and_true(name, trained):
    model, x, y = trained
    x = x[:12].clone()
    x[:, :, 0], x[:, :, 1], y = 0.0, 1.0, y[:12].clone()  # pixels at both ends of the range
    y[0] = 1 - y[0]  # one clean error
    before, labels = x.clone(), y.clone()
    result = RUNS[name](model, x, y, eps=0.1)
    assert torch.equal(x, before) and torch.equal(y, labels)
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    change = result.x_adv - x
    assert change.abs().max() <= 0.1 + 1e-6
    torch.testing.assert_close(result.linf, change.abs().flatten(1).amax(1))
    torch.testing.assert_close(result.l2, change.flatten(1).norm(dim=1))
    torch.testing.assert_close(result.l0, (change != 0).flatten(1).sum(1).float())
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
    assert torch.equal(result.first_success_step == 0, model(x).argmax(1) != y)
    assert (result.first_success_step[result.success] >= 0).all()
    assert result.forwards == int(result.queries.sum())
    assert not result.x_adv.requires_grad and not result.x_adv.is_inference()


@pytest.mark.parametrize("name", RUNS)
def test_passes_are_counted_as_the_model_sees_them(name, trained):
    model, x, y = trained
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    result = RUNS[name](model, x[:12], y[:12], eps=0.05)
    handle.remove()
    assert sum(seen) == result.forwards


@pytest.mark.parametrize("name", RUNS)
def test_eps_zero_changes_nothing(name, trained):
    model, x, y = trained
    result = RUNS[name](model, x[:6], y[:6], eps=0.0)
    assert torch.equal(result.x_adv, x[:6])
    assert torch.equal(result.success, model(x[:6]).argmax(1) != y[:6])


@pytest.mark.parametrize("name", ["fgsm", "pgd_ce", "noise"])
def test_works_inside_no_grad_and_per_image(name, trained):
    """Results do not depend on the batch an image is attacked in."""
    model, x, y = trained
    options = {} if name == "fgsm" else {"seed": 3}
    with torch.no_grad():
        together = RUNS[name](model, x[:10], y[:10], eps=0.05, **options)
    for part in (torch.arange(3), torch.tensor([7]), torch.tensor([9, 2])):
        extra = {} if name == "fgsm" else {"ids": part}
        alone = RUNS[name](model, x[part], y[part], eps=0.05, **options, **extra)
        torch.testing.assert_close(alone.x_adv, together.x_adv[part], atol=1e-5, rtol=0)
        assert torch.equal(alone.success, together.success[part])


# ------------------------------------------------------------------------------------------- PGD


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
def test_pgd_fools_at_least_what_fgsm_fools(eps, trained):
    model, x, y = trained
    fgsm = int(attacks.fgsm(model, x, y, eps=eps).success.sum())
    assert int(attacks.pgd(model, x, y, eps=eps, steps=20).success.sum()) >= fgsm


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("random_start", [True, False])
def test_stopping_early_fools_the_same_images(eps, random_start, trained):
    model, x, y = trained
    options = {"eps": eps, "random_start": random_start, "seed": 5}
    early = attacks.pgd(model, x, y, **options)
    full = attacks.pgd(model, x, y, stop_when_fooled=False, **options)
    assert torch.equal(early.success, full.success)
    assert torch.equal(early.first_success_step, full.first_success_step)
    assert early.forwards < full.forwards


def test_full_run_returns_the_point_of_highest_loss(trained):
    model, x, y = trained
    one = attacks.pgd(
        model, x, y, eps=0.1, steps=1, step_size=0.1, random_start=False, stop_when_fooled=False
    )
    assert one.forwards == 2 * len(x) and one.backwards == len(x)
    reached = _contract.cross_entropy(model(one.x_adv), y)
    assert (reached >= _contract.cross_entropy(model(x), y)).all()
    assert one.linf.max() > 0.09  # the last update is evaluated and returned


def test_more_restarts_never_fool_fewer(trained):
    model, x, y = trained
    once, thrice = (attacks.pgd(model, x, y, eps=0.04, steps=3, restarts=k).success for k in (1, 3))
    assert (thrice | ~once).all()


# ------------------------------------------------------------------------------------------- the model


def state(model: nn.Module) -> list:
    tensors = [t.clone() for t in model.state_dict().values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [
        tensors,
        grads,
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
    ]


def assert_same_state(one: list, two: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True)
    )
    assert one[2:] == two[2:]


class Breaks(nn.Module):
    """Fails on the second pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x):
        self.passes += 1
        if self.passes == 2:
            raise RuntimeError("out of memory")
        return self.model(x)


@pytest.mark.parametrize("name", RUNS)
def test_model_is_left_bit_equal(name, trained):
    model, x, y = trained
    model[0].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before = state(model)
    try:
        RUNS[name](model, x[:4], y[:4], eps=0.05)
        assert_same_state(before, state(model))
        with pytest.raises(RuntimeError, match="out of memory"):
            RUNS[name](Breaks(model).eval(), x[:4], y[:4], eps=0.05)
        assert_same_state(before, state(model))
    finally:
        model[0].bias.requires_grad_(True)
        model[1].weight.grad = None


# ------------------------------------------------------------------------------------------- errors


GOOD_X, GOOD_Y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
BAD = {
    "uint8": ({"x": (GOOD_X * 255).to(torch.uint8)}, TypeError, "255"),
    "no batch": ({"x": GOOD_X[0]}, ValueError, r"\[B,C,H,W\]"),
    "empty": ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, ValueError, "non-empty"),
    "NaN": ({"x": GOOD_X * torch.nan}, ValueError, "NaN"),
    "normalised": ({"x": GOOD_X * 4 - 2.1}, ValueError, "before normalisation"),
    "float label": ({"y": GOOD_Y.float()}, TypeError, "int64"),
    "int32 label": ({"y": GOOD_Y.int()}, TypeError, "int64"),
    "label 2": ({"y": GOOD_Y + 1}, ValueError, "classes 0..1"),
    "label -1": ({"y": GOOD_Y - 1}, ValueError, "negative"),
    "three labels": ({"y": torch.zeros(3, dtype=torch.int64)}, ValueError, "one label per image"),
    "eps 8": ({"eps": 8}, ValueError, "8/255"),
    "eps -0.1": ({"eps": -0.1}, ValueError, ">= 0"),
}


@pytest.mark.parametrize("attack", ["fgsm", "pgd_ce", "noise", "one_pixel"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(attack, case):
    arguments, error, words = BAD[case]
    given = {"x": GOOD_X, "y": GOOD_Y, "eps": EPS} | arguments
    with pytest.raises(error, match=words):
        RUNS[attack](small_cnn().eval(), given["x"], given["y"], eps=given["eps"])


@pytest.mark.parametrize("attack", ["fgsm", "pgd_ce", "noise", "one_pixel"])
def test_model_in_training_mode_is_refused(attack):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        RUNS[attack](small_cnn().train(), GOOD_X, GOOD_Y, eps=EPS)
    half = small_cnn().eval()
    half[5].train()  # dropout alone left on
    with pytest.raises(ValueError, match=r"5 \(Dropout\).*model\.eval\(\)"):
        RUNS[attack](half, GOOD_X, GOOD_Y, eps=EPS)


def test_rounding_just_outside_the_range_is_tolerated():
    x = GOOD_X.clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -3e-8, 1 + 1e-7
    assert attacks.fgsm(small_cnn().eval(), x, GOOD_Y, eps=EPS).x_adv.min() >= 0


def test_other_errors_name_the_argument():
    model = small_cnn().eval()
    with pytest.raises(ValueError, match="loss"):
        attacks.pgd(model, GOOD_X, GOOD_Y, eps=EPS, loss="dlr")
    with pytest.raises(ValueError, match="steps"):
        attacks.pgd(model, GOOD_X, GOOD_Y, eps=EPS, steps=0)
    with pytest.raises(ValueError, match="random_start"):
        attacks.pgd(model, GOOD_X, GOOD_Y, eps=EPS, restarts=2, random_start=False)
    with pytest.raises(ValueError, match="ids"):
        attacks.noise(model, GOOD_X, GOOD_Y, eps=EPS, ids=[0])
    with pytest.raises(ValueError, match="expand"):
        attacks.fgsm(model, GOOD_X, GOOD_Y, eps=attacks.normalised_eps(0.1, [0.2, 0.2, 0.2]))
    with pytest.raises(ValueError, match="grey"):
        attacks.fgsm(
            linear_model(3, 2), torch.rand(2, 3, 4, 4).double(), GOOD_Y, eps=EPS, grey=True
        )
    with pytest.raises(ValueError, match="logits"):
        attacks.fgsm(nn.Flatten(0), GOOD_X, GOOD_Y, eps=EPS)
    with pytest.raises(TypeError, match="Module"):
        attacks.fgsm(lambda x: x, GOOD_X, GOOD_Y, eps=EPS)
