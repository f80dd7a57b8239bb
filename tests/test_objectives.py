"""Losses against closed forms, what they must leave untouched, and that the defences defend."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from small import linear, small_batch
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import attacks, models, objectives, train
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
    step = (model[1].weight[1] - model[1].weight[0]).sign().view(1, 1, 3, 3)
    return step * (1 - 2 * y).view(-1, 1, 1, 1)


def row_difference(model):
    return (model[1].weight[1] - model[1].weight[0]).square().sum()


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
    objective = objectives.distillation(teacher, temperature=5.0, alpha=0.9, hard_temperature=2.0)
    p, q = (model(x).div(5.0).softmax(1) for model in (teacher, student))
    kl = (p * (p / q).log()).sum(1).mean()
    expected = 0.9 * 25 * kl + 0.1 * F.cross_entropy(student(x) / 2, y)
    torch.testing.assert_close(objective(student, x, y)[0], expected)


def test_the_teacher_is_used_in_eval_mode_and_left_bit_equal(batch):
    teacher = models.mobilenet_v2(width=0.25).train()
    student, mark = models.mobilenet_v2(width=0.25, seed=1).eval(), fingerprint(teacher)
    objective = objectives.distillation(teacher, temperature=5.0)
    images = F.interpolate(batch[0], size=32)
    first, second = (objective(student, images, batch[1])[0] for _ in range(2))
    assert first == second  # no dropout in the teacher
    first.backward()
    assert fingerprint(teacher) == mark == objective.settings["teacher"] and teacher.training
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_the_lipschitz_penalty_of_a_linear_model_has_a_closed_form(batch):
    x, y = batch
    model, objective = linear(), objectives.lipschitz(penalty=2.0)
    seen = seen_by(model)
    loss, logits = objective(model, x, y)
    p = logits.softmax(1).amax(1)
    # d max p / dx = +-p (1 - p) (w1 - w0) for two classes
    slope = ((p * (1 - p)).square() * row_difference(model)).mean()
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) + 2.0 * slope)
    loss.backward()
    assert model[1].weight.grad.abs().sum() > 0 and len(seen) == 1 and objective.second_order


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


def test_the_margin_penalty_of_a_linear_model_is_the_squared_difference_of_its_rows(batch):
    x, y = batch
    model = linear()
    model[1].weight.data *= 100  # a saturated softmax hides nothing of the margin
    loss, logits = objectives.margin_gradient(penalty=2.0)(model, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) + 2.0 * row_difference(model))
    three = linear(classes=3)
    three[1].bias.data = torch.tensor([0.0, 10.0, -10.0])  # class 1 always the best, 0 the second
    loss, logits = objectives.margin_gradient(penalty=1.0)(three, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) + row_difference(three))
    loss.backward()
    assert three[1].weight.grad.isfinite().all()


def test_gaussian_noise_has_its_sigma_and_is_not_cut(batch):
    x, y = batch
    model = linear()
    seen = seen_by(model)
    torch.manual_seed(6)
    loss, logits = objectives.gaussian_noise(sigma=0.7)(model, x, y)
    torch.manual_seed(6)
    assert torch.equal(seen[0], x + 0.7 * torch.randn_like(x)) and seen[0].min() < 0
    assert torch.equal(loss, F.cross_entropy(logits, y))


def test_adversarial_training_meets_the_linear_optimum(batch):
    x, y = batch
    model, eps = linear(), 8 / 255
    # One step of 2 eps crosses the ball from any random start: the optimum is a corner.
    _, logits = objectives.pgd_adversarial(eps=eps, steps=1, step_size=2 * eps)(model, x, y)
    torch.testing.assert_close(logits, model(x + eps * away(model, y)))


def convolutions():
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(*parts).train()


@pytest.mark.parametrize("name", ["pgd_adversarial", "trades", "mart", "pgd_awp"])
def test_in_half_precision_the_attack_works_under_autocast_and_the_loss_in_float32(
    name, tmp_path, monkeypatch
):
    """Accelerate's own autocast, which `fit` chooses on a GPU, on this CPU in bfloat16."""
    monkeypatch.setattr(
        train, "_accelerator", lambda *_: Accelerator(cpu=True, mixed_precision="bf16")
    )
    model, (x, y), kinds, losses = linear(), small_batch(), [], []
    model[1].register_forward_hook(lambda *passed: kinds.append(passed[-1].dtype))
    loss = getattr(objectives, name)(eps=EPS, steps=2)

    def watched(model, x, y):
        told, logits = loss(model, x, y)
        losses.append((told.dtype, logits.dtype))
        return told, logits

    train.fit(
        model,
        watched,
        TensorDataset(x, y),
        None,
        run_dir=tmp_path,
        epochs=1,
        monitor="epoch",
        progress=False,
    )
    assert len(kinds) >= 3 and set(kinds) == {torch.bfloat16}
    assert set(losses) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("name", ["pgd_adversarial", "trades"])
def test_in_float16_a_confident_model_is_attacked_all_the_same(name, batch):
    """Its gradient of 1e-9 would be 0, and the attacked images those of the random start."""
    x, y = batch
    model = linear()
    with torch.no_grad():
        model[1].weight *= 1e-3  # the answers hardly differ within the ball, and are sure
        model[1].bias.copy_(torch.tensor([20.0, 0.0]))

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.float16):
                return self.model(x).float()

    half = Half().eval()
    seen = seen_by(model)
    getattr(objectives, name)(eps=EPS, steps=4, step_size=EPS)(half, x, torch.zeros_like(y))
    start, end = (seen[k] for k in (1, 4))
    assert (end - start).abs().flatten(1).amax(1).min() > 0.1 * EPS


def test_weights_are_perturbed_as_published(batch):
    """AT-AWP by its code: a proxy's ascent, its direction at the layer's norm, put on."""
    (x, y), gamma, ours, theirs = batch, 0.2, convolutions(), convolutions()
    seen = seen_by(ours)
    weight = dict(weight=[1.0, 2.0])
    objective = objectives.pgd_awp(eps=EPS, gamma=gamma, **weight)
    before = fingerprint(nn.ParameterList(ours.parameters()))
    loss, logits = objective(ours, x, y)
    loss.backward()
    assert fingerprint(nn.ParameterList(ours.parameters())) == before
    assert torch.equal(seen[-1], seen[-2])  # the same attacked images for weights and loss
    proxy, ce = convolutions(), torch.tensor([1.0, 2.0])
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-F.cross_entropy(proxy(seen[-1]), y, weight=ce)).backward()
    optimizer.step()
    change = {
        name: new - old
        for (name, old), new in zip(theirs.named_parameters(), proxy.parameters(), strict=True)
        if old.dim() > 1
    }
    assert list(change) == ["0.weight", "3.weight"]
    with torch.no_grad():
        for name, diff in change.items():
            own = theirs.get_parameter(name)
            change[name] = gamma * own.norm() / (diff.norm() + 1e-20) * diff
            assert change[name].norm() / own.norm() == pytest.approx(gamma, rel=1e-3)
            own += change[name]
    expected = F.cross_entropy(theirs(seen[-1]), y, weight=ce)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)  # of the moved pass alone
    assert loss > objectives.pgd_awp(eps=EPS, gamma=0.0, **weight)(convolutions(), x, y)[0]


def test_training_with_perturbed_weights_goes_on_bit_equal(tmp_path, batch):
    options = dict(epochs=3, batch_size=4, progress=False, monitor="epoch", ema=0.9)
    make, data = partial(objectives.pgd_awp, eps=EPS), TensorDataset(*batch)

    def cut(row):
        raise KeyboardInterrupt

    straight, resumed = convolutions(), convolutions()
    train.fit(straight, make(), data, None, run_dir=tmp_path / "straight", **options)
    with pytest.raises(KeyboardInterrupt):
        train.fit(resumed, make(), data, None, run_dir=tmp_path / "cut", on_epoch=cut, **options)
    resumed = convolutions()
    train.fit(resumed, make(), data, None, run_dir=tmp_path / "cut", **options)
    assert fingerprint(resumed) == fingerprint(straight) != fingerprint(convolutions())


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
    torch.testing.assert_close(loss, F.cross_entropy(logits, y, weight=torch.tensor([1.0, 2.0])))


def test_free_training_uses_each_backward_pass_for_weights_and_perturbation(batch):
    x, y = batch
    model, second = linear(), linear(1)
    seen, other = seen_by(model), seen_by(second)
    objective = objectives.free_adversarial(eps=EPS, replays=3, step_size=0.07)
    step, rest = away(model, y), x.flip(0)[:4]
    for images, labels in ((x, y), (x, y), (x, y), (rest, y[:4])):
        loss, logits = objective(model, images, labels)
        loss.backward()
        assert torch.equal(loss, F.cross_entropy(logits, labels))
    assert len(seen) == 4 and model[1].weight.grad is not None  # no pass for the attack alone
    torch.testing.assert_close(seen[1], x + 0.07 * step)
    torch.testing.assert_close(seen[2], x + EPS * step)  # 2 * 0.07 is cut to the ball
    torch.testing.assert_close(seen[3], rest + EPS * step[:4])  # it lives on
    objective(second, x, y)
    assert torch.equal(other[0], x)  # another model starts afresh


def test_free_training_replays_each_batch_of_an_epoch_in_fit(tmp_path, batch):
    model, data = linear(), TensorDataset(*batch)
    seen, objective = [], objectives.free_adversarial(eps=EPS, replays=2)

    def watched(model, x, y):
        seen.append(x)
        return objective(model, x, y)

    watched.replays = 2
    options = dict(run_dir=tmp_path, epochs=3, batch_size=4, progress=False, schedule="onecycle")
    done = train.fit(model, watched, data, None, monitor="epoch", **options)
    assert len(seen) == 3 * 2 * 2 and done.history["train_accuracy"].between(0, 1).all()
    assert all(torch.equal(*seen[at : at + 2]) for at in range(0, 12, 2))
    for epoch in (seen[0:4:2], seen[4:8:2]):  # each image comes in every epoch
        assert sorted(torch.cat(epoch).flatten(1).sum(1)) == sorted(batch[0].flatten(1).sum(1))
    assert torch.load(tmp_path / "last.pt")["scheduler"]["last_epoch"] == 12


def test_trades_is_clean_cross_entropy_plus_beta_times_the_divergence_of_its_attack():
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.tensor([0, 1] * 3)
    x = torch.rand(6, 1, 4, 4)
    clean, logits = objectives.cross_entropy(weight=(1.0, 2.0))(model, x, y)
    seen = seen_by(model)
    options = dict(eps=0.1, steps=5, step_size=0.04, weight=(1.0, 2.0))
    loss, answered = objectives.trades(beta=3.0, **options)(model, x, y)
    p, q = logits.softmax(1), model(seen[-1]).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1)
    divergence = (divergence * (1 + y)).sum() / (1 + y).sum()  # class weights on this term, too
    assert divergence > 1e-4 and torch.equal(answered, logits)
    assert loss.item() == pytest.approx((clean + 3.0 * divergence).item(), rel=1e-5)
    # A linear model's worst image is a corner of the ball, wherever no pixel is clipped.
    free = ((x > 0.1) & (x < 0.9)).flatten(1)
    assert (seen[-2] - x).flatten(1)[free].abs().min() > 0.1 - 1e-5


def test_hat_is_trades_plus_the_helpers_cross_entropy(batch):
    x, y = batch
    model, standard = linear(), linear(3).train()
    mark, options = fingerprint(standard), dict(eps=EPS, beta=2.0, weight=[1.0, 2.0])
    torch.manual_seed(9)
    trades, _ = objectives.trades(**options)(model, x, y)
    torch.manual_seed(9)
    seen = seen_by(model)
    hat = objectives.hat(standard, gamma=0.7, **options)
    loss, logits = hat(model, x, y)
    clean, attacked, further = seen[-3:]
    assert torch.equal(clean, x) and torch.equal(logits, model(x))
    torch.testing.assert_close(further, (x + 2 * (attacked - x)).clamp(0, 1))
    help_losses = F.cross_entropy(model(further), standard(attacked).argmax(1), reduction="none")
    help_loss = (help_losses * (1 + y)).sum() / (1 + y).sum()
    torch.testing.assert_close(loss, trades + 0.7 * help_loss)
    assert fingerprint(standard) == mark == hat.settings["standard"] and standard.training


def test_marts_parts_by_hand_and_at_the_ends():
    generator = torch.Generator().manual_seed(4)
    clean, attacked = torch.randn(2, 5, 3, generator=generator).double()
    y, expected = torch.tensor([0, 1, 2, 1, 0]), []
    p, q = clean.softmax(1), attacked.softmax(1)
    for i, label in enumerate(y.tolist()):
        wrong = max(q[i, k].item() for k in range(3) if k != label)
        bce = -q[i, label].log() - torch.tensor(1 - wrong).log()
        kl = (p[i] * (p[i] / q[i]).log()).sum()
        expected.append(bce + 2.5 * kl * (1 - p[i, label]))
    loss = objectives.mart_loss(clean, attacked, y, beta=2.5)
    torch.testing.assert_close(loss, torch.stack(expected).float(), rtol=1e-5, atol=1e-5)
    huge = torch.tensor([[0.0, 500.0]], requires_grad=True)  # two classes: twice cross-entropy
    loss = objectives.mart_loss(torch.zeros(1, 2), huge, torch.tensor([0]), beta=0.0)
    assert loss.item() == pytest.approx(1000)
    loss.sum().backward()
    assert huge.grad.tolist() == [[-2.0, 2.0]]


def test_mart_and_its_class_weights(batch):
    x, y = batch
    model = linear()
    seen, options = seen_by(model), dict(steps=1, step_size=2 * EPS, weight=[1.0, 4.0])
    loss, logits = objectives.mart(eps=EPS, beta=3.0, **options)(model, x, y)
    torch.testing.assert_close(seen[-1], x + EPS * away(model, y))  # the corner, the worst image
    losses = objectives.mart_loss(model(x), model(seen[2]), y, beta=3.0)
    torch.testing.assert_close(loss, (losses * (1 + 3 * y)).sum() / (1 + 3 * y).sum())
    assert torch.equal(logits, model(x))


def test_gairats_weights_are_the_formula():
    raw = (1 + torch.tanh(torch.tensor([4.0, 2.0, -1.0, -6.0]))) / 2
    found = objectives.gairat_weights(torch.tensor([0, 2, 5, 10]), steps=10)
    torch.testing.assert_close(found, raw / raw.mean())


def test_gairat_counts_the_steps_an_image_stays_right():
    # One pixel, class 1 above 0.5: the attack walks down in steps of eps / 4 from a start in eps.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data = torch.tensor([[-1.0], [1.0]])
    model[1].bias.data = torch.tensor([0.5, -0.5])
    x, y = torch.tensor([0.3, 0.58, 0.52, 0.9]).view(4, 1, 1, 1), torch.ones(4, dtype=torch.long)
    torch.manual_seed(1)
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).flatten()
    steps = [torch.maximum(start - step * EPS / 4, x.flatten() - EPS) for step in range(10)]
    kappa = sum((at > 0.5).long() for at in steps)
    assert kappa[0] == 0 and 0 < kappa[1] < 10 and kappa[3] == 10
    torch.manual_seed(1)
    loss, logits = objectives.gairat(eps=EPS)(model, x, y)
    torch.testing.assert_close(logits, model(x - EPS))
    losses = F.cross_entropy(logits, y, reduction="none")
    weights = objectives.gairat_weights(kappa, steps=10)
    torch.testing.assert_close(loss, (weights * losses).mean())


MAKERS = {  # objective, forward passes in train mode
    "fast": (lambda: objectives.fast_adversarial(eps=EPS), 1),
    "free": (lambda: objectives.free_adversarial(eps=EPS), 1),
    "pgd": (lambda: objectives.pgd_adversarial(eps=EPS), 1),
    "awp": (lambda: objectives.pgd_awp(eps=EPS), 1),
    "trades": (lambda: objectives.trades(eps=EPS), 2),
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
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2)
    body = nn.Sequential(*layers).train()
    body[2].eval()
    make, passes = MAKERS[name]
    before = x.clone()
    loss, _ = make()(body, x, y)
    assert [module.training for module in body] == [True, True, False, True, True]
    assert body[1].num_batches_tracked == passes  # attacks leave running statistics alone
    assert all(parameter.grad is None for parameter in body.parameters()) and torch.equal(x, before)
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in body.parameters())


@pytest.mark.parametrize("name", "fast free pgd awp trades mart hat gairat".split())
def test_the_attacked_images_stay_in_the_ball_and_in_the_image_range(name):
    x = torch.rand(5, 1, 3, 3).mul(2).sub(0.5).clamp(0, 1)
    y, model, objective = torch.tensor([0, 1, 0, 1, 1]), linear(), MAKERS[name][0]()
    seen = seen_by(model)
    for _ in range(3 if name == "free" else 1):
        objective(model, x, y)[0].backward()
    reach = 2 * EPS if name == "hat" else EPS  # the helper image
    assert 0.5 * EPS < max((one - x).abs().max() for one in seen) <= reach + 1e-6
    assert min(one.min() for one in seen) >= 0 and max(one.max() for one in seen) <= 1


@pytest.mark.parametrize("name", [*MAKERS, "cross_entropy", "lipschitz", "distillation"])
@pytest.mark.parametrize("gap", [20.0, 110.0, 300.0])
def test_gradients_are_finite_at_any_gap_of_the_logits(name, gap, batch):
    more = {"cross_entropy": objectives.cross_entropy, "lipschitz": objectives.lipschitz}
    more["distillation"] = lambda: objectives.distillation(linear(1), temperature=1.0)
    model = linear()
    with torch.no_grad():  # right about some images and wrong about others, by this gap
        model[1].weight[1] = -model[1].weight[0]
        model[1].bias.zero_()
        found = model(batch[0])
        model[1].weight *= gap / (found[:, 1] - found[:, 0]).abs().median()
    objective = more[name]() if name in more else MAKERS[name][0]()
    loss, _ = objective(model, *batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["trades", "mart", "hat"])
def test_a_class_that_weighs_nothing_is_in_no_term_of_the_loss(name, batch):
    order = batch[1].argsort(descending=True)
    (x, y), model = (part[order] for part in batch), linear()
    nets = [linear(3)] if name == "hat" else []
    objective = getattr(objectives, name)(*nets, eps=EPS, weight=[0.0, 1.0])
    losses = []
    for count in (6, 3):  # with and without class 0; the first images start alike
        torch.manual_seed(0)
        losses.append(objective(model, x[:count], y[:count])[0])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.distillation(linear(), temperature=1, alpha=1.5), "alpha"),
        (lambda: objectives.pgd_adversarial(eps=8), "4/255"),
        (lambda: objectives.gaussian_noise(sigma=0), "sigma"),
    ],
)
def test_unusable_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def fragile():
    """One strong pixel that is right nine times in ten, 48 weak ones that together always are.

    The setting of Tsipras et al. (arXiv 1805.12152): who uses the weak ones falls at eps = 0.1.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    sign = (2.0 * y - 1)[:, None]
    x = 0.5 + 0.06 * sign + 0.03 * torch.randn(200, 49, generator=generator)
    kept = torch.where(torch.rand(200, 1, generator=generator) < 0.9, 1.0, -1.0)
    x[:, :1] = 0.5 + 0.3 * sign * kept
    return x.clamp(0, 1).view(200, 1, 7, 7), y


def trained(objective, x, y, steps=100, lr=0.03):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(49, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model, x, y)[0].backward()
        optimizer.step()
    return model.eval()


def pgd_accuracy(model, x, y):
    found = attacks.pgd(model, x, y, eps=EPS, steps=10, loss="margin")
    return 1 - found.success.float().mean().item()


@pytest.mark.parametrize("name", ["pgd", "awp", "fast", "free", "mart", "hat"])
def test_training_with_it_raises_accuracy_under_pgd(name, fragile):
    plain = trained(objectives.cross_entropy(), *fragile, steps=500, lr=0.1)
    assert (plain(fragile[0]).argmax(1) == fragile[1]).float().mean() > 0.96
    assert pgd_accuracy(plain, *fragile) < 0.1
    hat = objectives.hat(plain, eps=EPS, beta=6.0, gamma=0.25)
    robust = trained(hat if name == "hat" else MAKERS[name][0](), *fragile)
    assert pgd_accuracy(robust, *fragile) > 0.8
