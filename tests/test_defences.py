"""Each defence against its formula, what it leaves untouched, and that it defends."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from small import linear, small_batch
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import attacks, objectives, train
from dlia_utils.device import fingerprint

EPS = 0.1


@pytest.fixture
def batch():
    return small_batch()


def seen_by(model) -> list:
    """Every batch that goes into the model, in order."""
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def away(model, y):
    """Sign of the step that hurts a two-class linear model most, [B, 1, 3, 3]."""
    return (model[1].weight[1] - model[1].weight[0]).sign().view(1, 1, 3, 3) * (1 - 2 * y).view(
        -1, 1, 1, 1
    )


# ------------------------------------------------------------------ fast and free


def test_fast_training_makes_one_step_of_a_quarter_more_than_the_ball(batch):
    x, y = batch
    model = linear()
    torch.manual_seed(7)
    start = x + torch.empty_like(x).uniform_(-EPS, EPS)
    expected = torch.clamp(start + 1.25 * EPS * away(model, y), x - EPS, x + EPS)
    seen = seen_by(model)
    torch.manual_seed(7)
    loss, logits = objectives.fast_adversarial(eps=EPS, weight=[1.0, 2.0])(model, x, y)
    assert len(seen) == 2 and torch.equal(seen[0], start)
    torch.testing.assert_close(seen[1], expected)
    assert (seen[1] - x).abs().max() <= EPS + 1e-6
    torch.testing.assert_close(loss, F.cross_entropy(logits, y, weight=torch.tensor([1.0, 2.0])))


def test_free_training_uses_each_backward_pass_for_weights_and_perturbation(batch):
    x, y = batch
    model, other = linear(), batch[0].flip(0)
    seen, objective = (
        seen_by(model),
        objectives.free_adversarial(eps=EPS, replays=3, step_size=0.07),
    )
    step = away(model, y)
    for offered in (x, other, other, other[:4]):
        loss, logits = objective(model, offered, y[: len(offered)])
        loss.backward()
        assert logits is None
    assert (
        len(seen) == 4 and model[1].weight.grad is not None
    )  # a pass per call, no pass for the attack
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], x + 0.07 * step)
    torch.testing.assert_close(seen[2], x + EPS * step)  # 2 * 0.07 is cut to the ball
    # The fourth call begins the next minibatch, a smaller one, where the perturbation stopped.
    torch.testing.assert_close(seen[3], other[:4] + EPS * step[:4])


def test_free_training_has_the_loss_of_the_held_labels_and_wants_a_backward_pass(batch):
    x, y = batch
    model, objective = linear(), objectives.free_adversarial(eps=EPS, replays=2)
    objective(model, x, y)[0].backward()
    loss, _ = objective(model, x, 1 - y)
    torch.testing.assert_close(loss, F.cross_entropy(model(x + EPS * away(model, y)), y))
    with pytest.raises(RuntimeError, match="backward"):
        objective(model, x, y)
    # Another model starts afresh, whatever is held.
    second = linear(1)
    seen = seen_by(second)
    objective(second, x, y)
    assert torch.equal(seen[0], x)


def test_free_training_runs_in_fit_with_one_step_a_batch(tmp_path, batch):
    x, y = batch
    model, data = linear(), TensorDataset(*batch)
    seen = seen_by(model)
    done = train.fit(
        model,
        objectives.free_adversarial(eps=EPS, replays=2),
        data,
        data,
        run_dir=tmp_path,
        epochs=4,
        batch_size=4,
        lr=0.01,
        progress=False,
    )
    assert (
        done.status == "done"
        and "train_accuracy" not in done.history
        and done.history.train_loss.notna().all()
    )
    trained = [one for one in seen if not torch.equal(one, x)]  # but not in validation
    assert len(trained) == 8  # two batches an epoch, each one forward pass
    assert (trained[0] - trained[1]).abs().max() <= EPS + 1e-6 and not torch.equal(
        trained[0], trained[1]
    )


def valley():
    """Class 1 except in a narrow valley around grey, over which one large step jumps and into which small ones go."""

    class Valley(nn.Module):
        def forward(self, x):
            z = 40 * ((x.flatten(1)[:, :1] - 0.5).abs() - 0.0249)
            return torch.cat([torch.zeros_like(z), z], 1)

    return nn.Sequential(Valley(), nn.Dropout(0.0))


def test_the_monitor_tells_catastrophic_overfitting_from_robustness(caplog):
    x, y = torch.full((50, 1, 1, 1), 0.5), torch.ones(50, dtype=torch.long)
    model = valley().train()
    model[1].eval()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "dlia_utils"):
        row = objectives.overfitting_monitor(x, y, eps=EPS, batch_size=16)(model)
    assert row["val_single_step_accuracy"] > 0.95 and row["val_pgd_accuracy"] < 0.1
    assert row["val_overfitting_gap"] == row["val_single_step_accuracy"] - row["val_pgd_accuracy"]
    assert "catastrophic overfitting" in caplog.text
    assert torch.equal(torch.get_rng_state(), state) and model.training and not model[1].training
    caplog.clear()
    sure = linear()
    sure[1].bias.data[1] += 100
    row = objectives.overfitting_monitor(
        torch.rand(4, 1, 3, 3), torch.ones(4, dtype=torch.long), eps=EPS
    )(sure)
    assert row == {
        "val_single_step_accuracy": 1.0,
        "val_pgd_accuracy": 1.0,
        "val_overfitting_gap": 0.0,
    }
    assert not caplog.text and sure[1].weight.grad is None
    with pytest.raises(ValueError, match="equally many"):
        objectives.overfitting_monitor(x, y[:3], eps=EPS)


# ------------------------------------------------------------------ MART, HAT, GAIRAT


def test_marts_parts_by_hand():
    generator = torch.Generator().manual_seed(4)
    clean, attacked = torch.randn(2, 5, 3, generator=generator).double()
    y = torch.tensor([0, 1, 2, 1, 0])
    p, q = clean.softmax(1), attacked.softmax(1)
    expected = []
    for i, label in enumerate(y.tolist()):
        wrong = max(q[i, k].item() for k in range(3) if k != label)
        bce = -q[i, label].log() - torch.tensor(1 - wrong).log()
        kl = (p[i] * (p[i] / q[i]).log()).sum()
        expected.append(bce + 2.5 * kl * (1 - p[i, label]))
    torch.testing.assert_close(
        objectives.mart_loss(clean, attacked, y, beta=2.5),
        torch.stack(expected).float(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_marts_loss_of_two_classes_is_twice_cross_entropy_and_never_infinite():
    generator = torch.Generator().manual_seed(5)
    logits, y = torch.randn(6, 2, generator=generator), torch.tensor([0, 1] * 3)
    twice = 2 * F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(objectives.mart_loss(logits, logits, y, beta=7.0), twice)
    huge = torch.tensor([[0.0, 500.0]], requires_grad=True)
    loss = objectives.mart_loss(torch.zeros(1, 2), huge, torch.tensor([0]), beta=0.0)
    assert loss.item() == pytest.approx(1000)
    loss.sum().backward()
    assert huge.grad.tolist() == [[-2.0, 2.0]]


def test_mart_and_its_class_weights(batch):
    x, y = batch
    model = linear()
    seen = seen_by(model)
    loss, logits = objectives.mart(
        eps=EPS, beta=3.0, steps=1, step_size=2 * EPS, weight=[1.0, 4.0]
    )(model, x, y)
    torch.testing.assert_close(
        seen[-1], x + EPS * away(model, y)
    )  # the corner, a linear model's worst image
    losses = objectives.mart_loss(model(x), model(seen[2]), y, beta=3.0)
    torch.testing.assert_close(loss, (losses * (1 + 3 * y)).sum() / (1 + 3 * y).sum())
    assert torch.equal(logits, model(x))


def test_hat_is_trades_plus_the_helpers_cross_entropy(batch):
    x, y = batch
    model, standard = linear(), linear(3).train()
    mark = fingerprint(standard)
    torch.manual_seed(9)
    trades, _ = objectives.trades(eps=EPS, beta=2.0, weight=[1.0, 2.0])(model, x, y)
    torch.manual_seed(9)
    seen = seen_by(model)
    hat = objectives.hat(standard, eps=EPS, beta=2.0, gamma=0.7, weight=[1.0, 2.0])
    loss, logits = hat(model, x, y)
    clean, attacked, further = seen[-3:]
    assert torch.equal(clean, x)
    torch.testing.assert_close(further, (x + 2 * (attacked - x)).clamp(0, 1))
    labels = standard(attacked).argmax(1)
    assert labels.unique().tolist() != [0] and not torch.equal(labels, y)
    torch.testing.assert_close(loss, trades + 0.7 * F.cross_entropy(model(further), labels))
    assert torch.equal(logits, model(x))
    assert fingerprint(standard) == mark == hat.settings["standard"] and standard.training
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in standard.parameters()
    )


def test_gairats_weights_are_the_formula_and_fall_with_the_distance():
    kappa = torch.tensor([0, 2, 5, 10])
    raw = (1 + torch.tanh(torch.tensor([-1 + 5.0, -1 + 3.0, -1.0, -1 - 5.0]))) / 2
    torch.testing.assert_close(objectives.gairat_weights(kappa, steps=10), raw / raw.mean())
    assert torch.equal(objectives.gairat_weights(torch.tensor([3, 3]), steps=4), torch.ones(2))
    with pytest.raises(ValueError, match="0 to steps = 10, got 11"):
        objectives.gairat_weights(torch.tensor([11]), steps=10)


def test_gairat_counts_the_steps_an_image_stays_right():
    # One pixel, class 1 above 0.5: from x the attack walks down in steps of eps / 4 from a start within eps.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data, model[1].bias.data = (
        torch.tensor([[-1.0], [1.0]]),
        torch.tensor([0.5, -0.5]),
    )
    x, y = torch.tensor([0.3, 0.58, 0.52, 0.9]).view(4, 1, 1, 1), torch.ones(4, dtype=torch.long)
    torch.manual_seed(1)
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).flatten()
    kappa = torch.zeros(4, dtype=torch.long)
    for step in range(10):
        kappa += torch.maximum(start - step * EPS / 4, x.flatten() - EPS) > 0.5
    assert kappa[0] == 0 and 0 < kappa[1] < 10 and kappa[3] == 10
    torch.manual_seed(1)
    loss, logits = objectives.gairat(eps=EPS)(model, x, y)
    torch.testing.assert_close(logits, model(x - EPS))
    losses = F.cross_entropy(logits, y, reduction="none")
    weights = objectives.gairat_weights(kappa, steps=10)
    torch.testing.assert_close(loss, (weights * losses).mean())
    assert loss > losses.mean()
    torch.manual_seed(1)  # all images are of class 1, whose factor cancels
    torch.testing.assert_close(objectives.gairat(eps=EPS, weight=[9.0, 2.0])(model, x, y)[0], loss)


# ------------------------------------------------------------------ without attacks


def test_the_margin_penalty_of_a_linear_model_is_the_squared_difference_of_its_rows(batch):
    x, y = batch
    model = linear()
    model[1].weight.data *= 100  # a saturated softmax hides nothing of the margin
    loss, logits = objectives.margin_gradient(penalty=2.0)(model, x, y)
    slope = (model[1].weight[1] - model[1].weight[0]).square().sum()
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) + 2.0 * slope)
    three = linear(classes=3)
    three[1].bias.data = torch.tensor(
        [0.0, 10.0, -10.0]
    )  # class 1 is always the best, class 0 second
    loss, logits = objectives.margin_gradient(penalty=1.0)(three, x, y)
    slope = (three[1].weight[1] - three[1].weight[0]).square().sum()
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) + slope)
    loss.backward()
    assert (
        three[1].weight.grad.isfinite().all()
        and objectives.margin_gradient(penalty=1.0).second_order
    )


def test_training_on_the_margins_gradient_makes_it_smaller():
    torch.manual_seed(0)
    start = nn.Sequential(
        nn.Conv2d(1, 4, 3, groups=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    x, y = torch.rand(12, 1, 5, 5), torch.tensor([0, 1] * 6)
    x[y == 1, :, :2] += 0.5

    def slope_after(penalty):
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            objectives.margin_gradient(penalty=penalty)(model, x, y)[0].backward()
            optimizer.step()
        inputs = x.clone().requires_grad_()
        logits = model(inputs)
        (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), inputs)
        return gradient.square().sum() / len(x)

    assert slope_after(0.1) < 0.5 * slope_after(0.0)


def test_gaussian_noise_has_its_sigma_and_is_not_cut(batch):
    x, y = batch
    model = linear()
    seen = seen_by(model)
    torch.manual_seed(6)
    loss, logits = objectives.gaussian_noise(sigma=0.7)(model, x, y)
    torch.manual_seed(6)
    assert torch.equal(seen[0], x + 0.7 * torch.randn_like(x)) and seen[0].min() < 0
    assert torch.equal(loss, F.cross_entropy(logits, y))


# ------------------------------------------------------------------ what all have in common

MAKERS = {  # objective, forward passes in train mode
    "fast": (lambda: objectives.fast_adversarial(eps=EPS), 1),
    "free": (lambda: objectives.free_adversarial(eps=EPS), 1),
    "mart": (lambda: objectives.mart(eps=EPS), 2),
    "hat": (lambda: objectives.hat(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), eps=EPS), 3),
    "gairat": (lambda: objectives.gairat(eps=EPS, steps=3), 1),
    "margin_gradient": (lambda: objectives.margin_gradient(penalty=0.1), 1),
    "gaussian_noise": (lambda: objectives.gaussian_noise(sigma=0.2), 1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_flags_gradients_and_running_statistics_are_treated_as_said(name, batch):
    x, y = batch
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2)
    ).train()
    body[2].eval()
    make, passes = MAKERS[name]
    before = x.clone()
    objective = make()
    loss, _ = objective(body, x, y)
    assert [module.training for module in body] == [True, True, False, True, True]
    assert body[1].num_batches_tracked == passes
    assert all(parameter.grad is None for parameter in body.parameters()) and torch.equal(x, before)
    assert loss.ndim == 0 and loss.isfinite() and isinstance(objective.settings["name"], str)
    loss.backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


@pytest.mark.parametrize("name", ["fast", "free", "mart", "hat", "gairat"])
def test_the_attacked_images_stay_in_the_ball_and_in_the_image_range(name):
    x = torch.rand(5, 1, 3, 3).mul(2).sub(0.5).clamp(0, 1)
    y, model, objective = torch.tensor([0, 1, 0, 1, 1]), linear(), MAKERS[name][0]()
    seen = seen_by(model)
    for _ in range(3 if name == "free" else 1):
        objective(model, x, y)[0].backward()
    reach = 2 * EPS if name == "hat" else EPS  # the helper image
    moved = max((one - x).abs().max() for one in seen)
    assert 0.5 * EPS < moved <= reach + 1e-6
    assert min(one.min() for one in seen) >= 0 and max(one.max() for one in seen) <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.fast_adversarial(eps=8), "4/255"),
        (lambda: objectives.free_adversarial(eps=8), "4/255"),
        (lambda: objectives.free_adversarial(eps=0.1, replays=0), "replays"),
        (lambda: objectives.mart(eps=0.1, beta=-1), "beta"),
        (lambda: objectives.hat(linear(), eps=0.1, gamma=-1), "gamma"),
        (lambda: objectives.hat(linear(), eps=0.1, helper=0.5), "helper"),
        (lambda: objectives.gairat(eps=0.1, steps=0), "steps"),
        (lambda: objectives.margin_gradient(penalty=-1), "penalty"),
        (lambda: objectives.gaussian_noise(sigma=0), "sigma"),
    ],
)
def test_unusable_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ they defend


@pytest.fixture(scope="module")
def fragile():
    """One strong pixel that is right nine times in ten, 48 weak ones that together are always right.

    The setting of Tsipras et al. 2019 (arXiv 1805.12152): who uses the weak ones falls at eps = 0.1.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    sign = (2.0 * y - 1)[:, None]
    x = 0.5 + 0.06 * sign + 0.03 * torch.randn(200, 49, generator=generator)
    kept = torch.where(torch.rand(200, 1, generator=generator) < 0.9, 1.0, -1.0)
    x[:, :1] = 0.5 + 0.3 * sign * kept
    return x.clamp(0, 1).view(200, 1, 7, 7), y


def trained(objective, x, y, *, steps=100, lr=0.03):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(49, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model, x, y)[0].backward()
        optimizer.step()
    return model.eval()


def pgd_accuracy(model, x, y):
    return (
        1 - attacks.pgd(model, x, y, eps=EPS, steps=10, loss="margin").success.float().mean().item()
    )


@pytest.fixture(scope="module")
def plain(fragile):
    model = trained(objectives.cross_entropy(), *fragile, steps=500, lr=0.1)
    clean = (model(fragile[0]).argmax(1) == fragile[1]).float().mean().item()
    assert clean > 0.97 and pgd_accuracy(model, *fragile) < 0.1
    return model


@pytest.mark.parametrize("name", ["pgd", "fast", "free", "mart", "hat"])
def test_training_with_it_raises_accuracy_under_pgd(name, fragile, plain):
    make = {
        "pgd": lambda: objectives.pgd_adversarial(eps=EPS),
        "fast": lambda: objectives.fast_adversarial(eps=EPS),
        "free": lambda: objectives.free_adversarial(eps=EPS),
        "mart": lambda: objectives.mart(eps=EPS),
        "hat": lambda: objectives.hat(plain, eps=EPS, beta=6.0, gamma=0.25),
    }[name]
    robust = pgd_accuracy(trained(make(), *fragile), *fragile)
    assert robust > 0.8, robust


def test_gairat_weights_are_numbers_for_any_offset():
    weights = objectives.gairat_weights(torch.tensor([10, 10]), steps=10, lam=-5.0)
    assert weights.tolist() == [1.0, 1.0]


def test_the_margin_penalty_takes_string_padding_in_grouped_convolutions():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
    )
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 2))
    loss, _ = objectives.margin_gradient(penalty=0.1)(
        model, torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0])
    )
    loss.backward()
    assert layers[1].weight.grad.abs().sum() > 0
