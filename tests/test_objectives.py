"""Losses against closed forms, and what they must leave untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import linear, small_batch
from torch import nn

from dlia_utils import models, objectives
from dlia_utils.device import evaluating, fingerprint


@pytest.fixture
def batch():
    return small_batch()


def test_cross_entropy_with_weights_smoothing_and_temperature(batch):
    x, y = batch
    model = linear()
    loss, logits = objectives.cross_entropy(weight=[1.0, 3.0], label_smoothing=0.1)(model, x, y)
    expected = F.cross_entropy(model(x), y, weight=torch.tensor([1.0, 3.0]), label_smoothing=0.1)
    assert torch.equal(loss, expected) and torch.equal(logits, model(x))
    loss, logits = objectives.cross_entropy_at(20.0)(model, x, y)
    assert torch.equal(loss, F.cross_entropy(model(x) / 20, y)) and torch.equal(logits, model(x))


def test_distillation_is_its_formula(batch):
    x, y = batch
    teacher, student = linear(1), linear(2)
    loss, _ = objectives.distillation(teacher, temperature=5.0, alpha=0.9, hard_temperature=2.0)(
        student, x, y
    )
    p, q = (model(x).div(5.0).softmax(1) for model in (teacher, student))
    kl = (p * (p / q).log()).sum(1).mean()
    expected = 0.9 * 25 * kl + 0.1 * F.cross_entropy(student(x) / 2, y)
    torch.testing.assert_close(loss, expected)


def test_the_teacher_is_used_in_eval_mode_and_left_bit_equal(batch):
    x, y = batch
    teacher = models.mobilenet_v2(width=0.25).train()
    student = models.mobilenet_v2(width=0.25, seed=1)
    before, mark = copy.deepcopy(teacher), fingerprint(teacher)
    objective = objectives.distillation(teacher, temperature=5.0)
    images = F.interpolate(x, size=32)
    assert (
        objective(student.eval(), images, y)[0] == objective(student, images, y)[0]
    )  # no dropout in the teacher
    objective(student, images, y)[0].backward()
    assert fingerprint(teacher) == mark and objective.settings["teacher"] == mark
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert before.state_dict().keys() == teacher.state_dict().keys()


def test_the_lipschitz_penalty_of_a_linear_model_has_a_closed_form(batch):
    x, y = batch
    model = linear()
    loss, logits = objectives.lipschitz(penalty=2.0)(model, x, y)
    p = logits.softmax(1).amax(1)
    # d max p / dx = +-p (1 - p) (w1 - w0) for two classes
    slope = (model[1].weight[1] - model[1].weight[0]).square().sum()
    expected = F.cross_entropy(logits, y) + 2.0 * ((p * (1 - p)).square() * slope).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model[1].weight.grad.abs().sum() > 0


def test_in_normalised_units_the_penalty_is_taken_at_the_normalised_input(batch):
    x, y = batch
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    torch.manual_seed(3)
    model = models.PixelModel(nn.Sequential(nn.Flatten(), nn.Linear(27, 2)), mean, std)
    loss, logits = objectives.lipschitz(penalty=2.0, input_std=std)(model, x, y)
    inner = model.normalize(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.backbone(inner).softmax(1).amax(1).sum(), inner)
    expected = F.cross_entropy(logits, y) + 2.0 * gradient.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_the_lipschitz_objective_makes_one_forward_pass_and_asks_for_float32(batch):
    x, y = batch
    model, calls = linear(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    objective = objectives.lipschitz()
    objective(model, x, y)
    assert (
        len(calls) == 1 and objective.second_order and not objectives.cross_entropy().second_order
    )


def test_adversarial_training_meets_the_linear_optimum(batch):
    x, y = batch
    model, eps = linear(), 8 / 255
    # One step of 2 eps crosses the ball from any random start: the optimum is a corner, whatever the start.
    loss, logits = objectives.pgd_adversarial(eps=eps, steps=1, step_size=2 * eps)(model, x, y)
    away = (model[1].weight[1] - model[1].weight[0]).sign().view(1, 1, 3, 3) * (1 - 2 * y).view(
        -1, 1, 1, 1
    )
    torch.testing.assert_close(logits, model(x + eps * away))
    assert loss > F.cross_entropy(model(x), y)


@pytest.mark.parametrize("adversarial", [objectives.pgd_adversarial, objectives.trades])
def test_the_attack_stays_in_the_ball_and_in_the_image_range(adversarial):
    x = torch.rand(4, 1, 32, 32).mul(2).sub(0.5).clamp(0, 1)
    model, seen = models.mobilenet_v2(width=0.25), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    adversarial(eps=0.1, steps=3, step_size=0.07)(model, x, torch.zeros(4, dtype=torch.long))
    moved = [(one - x).abs().max() for one in seen]
    assert max(moved) > 0.05 and max(moved) <= 0.1 + 1e-6
    assert min(one.min() for one in seen) >= 0 and max(one.max() for one in seen) <= 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trades_is_clean_cross_entropy_plus_beta_times_the_divergence_of_its_attack():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
        torch.rand(6, 1, 4, 4),
        torch.tensor([0, 1] * 3),
    )
    clean, logits = objectives.cross_entropy()(model, x, y)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss, answered = objectives.trades(eps=0.1, beta=3.0, steps=5, step_size=0.04)(model, x, y)
    p, q = logits.softmax(1), model(seen[-1]).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    assert divergence > 1e-4 and torch.equal(answered, logits)
    assert loss.item() == pytest.approx((clean + 3.0 * divergence).item(), rel=1e-5)
    # A linear model's worst image of its ball is a corner: the attack must be there wherever no pixel is clipped.
    free = ((x > 0.1) & (x < 0.9)).flatten(1)
    moved = (seen[-2] - x).flatten(1)
    assert moved[free].abs().min() > 0.1 - 1e-5


def test_trades_with_beta_zero_is_plain_training_and_bad_numbers_are_refused():
    model, x, y = (
        nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
        torch.rand(4, 1, 4, 4),
        torch.tensor([0, 1, 0, 1]),
    )
    plain = objectives.cross_entropy(weight=(1.0, 2.0))(model, x, y)[0]
    assert objectives.trades(eps=0.1, beta=0.0, weight=(1.0, 2.0))(model, x, y)[
        0
    ].item() == pytest.approx(plain.item())
    for wrong in ({"eps": 4}, {"eps": 0.1, "steps": 0}, {"eps": 0.1, "beta": -1}):
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            objectives.trades(**wrong)


def test_the_attack_sees_eval_mode_and_the_training_flags_come_back(batch):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2)
    )
    body[2].eval()
    seen = []
    body.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    objectives.pgd_adversarial(eps=4 / 255, steps=2)(body.train(), *batch)
    assert seen == [False, False, True]
    assert body[1].num_batches_tracked == 1  # the attack has left the running statistics alone
    body[2].eval()
    with pytest.raises(RuntimeError), evaluating(body):
        raise RuntimeError
    assert body.training and body[1].training and not body[2].training


def test_the_attack_draws_from_the_global_stream(batch):
    model, objective = linear(), objectives.pgd_adversarial(eps=0.1, steps=1, step_size=0.01)
    torch.manual_seed(4)
    first, second = objective(model, *batch)[0], objective(model, *batch)[0]
    torch.manual_seed(4)
    assert objective(model, *batch)[0] == first != second


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.cross_entropy_at(0), "temperature"),
        (lambda: objectives.distillation(linear(), temperature=-1), "temperature"),
        (lambda: objectives.distillation(linear(), temperature=1, alpha=1.5), "alpha"),
        (lambda: objectives.lipschitz(penalty=-1), "penalty"),
        (lambda: objectives.pgd_adversarial(eps=8), "4/255"),
        (lambda: objectives.pgd_adversarial(eps=0.1, steps=0), "steps"),
    ],
)
def test_unusable_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_fingerprint_does_not_see_the_memory_layout():
    model = models.mobilenet_v2(width=0.25)
    assert fingerprint(model) == fingerprint(
        copy.deepcopy(model).to(memory_format=torch.channels_last)
    )
    assert fingerprint(model) != fingerprint(models.mobilenet_v2(width=0.25, seed=1))
