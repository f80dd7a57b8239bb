"""Attacks in a ball and of smallest changes (APGD to Carlini-Wagner): known truth and the common contract."""

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from dlia_utils import attacks
from dlia_utils.attacks import _ball, _contract
from dlia_utils.models.pixel import fast_copy

EPS = 8 / 255


def linear_model(channels: int = 1, classes: int = 2, size: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes)).double().eval()


def near_boundary(model: nn.Module, channels: int = 1, n: int = 12, size: int = 4):
    """Images well inside [0,1], so that the nearest boundary of a linear model is reached inside it too."""
    x = 0.4 + 0.2 * torch.rand(n, channels, size, size, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        model[1].bias -= logits.mean(0)  # all classes about equally likely
        return x, model(x).argmax(1)


def boundary_distances(model: nn.Module, x, y, norm: str, *, grey: bool = False, mask=None):
    """Closed form: over the other classes, the least |logit gap| / dual norm of the weight difference."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    distances = []
    for other in range(logits.shape[1]):
        difference = (weight[other] - weight[y]).view_as(x)
        if grey:
            difference = difference.sum(1, keepdim=True) / (
                x.shape[1] ** 0.5 if norm == "l2" else 1
            )
        if mask is not None:
            difference = difference * mask
        flat = difference.flatten(1)
        rise = flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)
        gap = logits.gather(1, y[:, None])[:, 0] - logits[:, other]
        distances.append(torch.where(y == other, torch.inf, gap / rise))
    return torch.stack(distances).min(0).values


@pytest.fixture(scope="module", params=[2, 10])
def trained(request):
    """A small CNN of 2 or 10 classes and 40 images of 8 x 8 that it was trained on."""
    classes = request.param
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(6 * 16, classes))
    y = torch.arange(40) % classes
    patterns = 0.5 + 0.15 * torch.randn(classes, 1, 8, 8)
    x = (patterns[y] + 0.05 * torch.randn(40, 1, 8, 8)).clamp(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


BUDGET = {  # attacks inside a given ball: (call, norm)
    "apgd_ce": (lambda m, x, y, **kw: attacks.apgd(m, x, y, steps=6, restarts=2, **kw), "linf"),
    "apgd_margin": (
        lambda m, x, y, **kw: attacks.apgd(m, x, y, steps=10, loss="margin", **kw),
        "linf",
    ),
    "apgd_l2": (lambda m, x, y, **kw: attacks.apgd(m, x, y, steps=6, norm="l2", **kw), "l2"),
    "apgd_full": (
        lambda m, x, y, **kw: attacks.apgd(m, x, y, steps=6, stop_when_fooled=False, **kw),
        "linf",
    ),
    "fgsm": (lambda m, x, y, **kw: attacks.fgsm(m, x, y, **kw), "linf"),
    "noise": (lambda m, x, y, **kw: attacks.noise(m, x, y, **kw), "linf"),
    "pgd": (lambda m, x, y, **kw: attacks.pgd(m, x, y, steps=6, **kw), "linf"),
    "pgd_l2": (lambda m, x, y, **kw: attacks.pgd(m, x, y, norm="l2", steps=6, **kw), "l2"),
    "mi_fgsm": (lambda m, x, y, **kw: attacks.mi_fgsm(m, x, y, steps=6, **kw), "linf"),
    "square": (lambda m, x, y, **kw: attacks.square(m, x, y, steps=8, restarts=2, **kw), "linf"),
    "square_l2": (lambda m, x, y, **kw: attacks.square(m, x, y, norm="l2", steps=10, **kw), "l2"),
    "noise_l2": (lambda m, x, y, **kw: attacks.noise(m, x, y, norm="l2", **kw), "l2"),
    "one_pixel": (
        lambda m, x, y, **kw: attacks.one_pixel(m, x, y, population=6, iterations=3, **kw),
        "linf",
    ),
}
SMALLEST = {  # attacks that look for the smallest change
    "fmn_linf": (lambda m, x, y, **kw: attacks.fmn(m, x, y, steps=20, **kw), "linf"),
    "fmn_l2": (lambda m, x, y, **kw: attacks.fmn(m, x, y, steps=20, norm="l2", **kw), "l2"),
    "deepfool_l2": (lambda m, x, y, **kw: attacks.deepfool(m, x, y, **kw), "l2"),
    "deepfool_linf": (lambda m, x, y, **kw: attacks.deepfool(m, x, y, norm="linf", **kw), "linf"),
    "carlini_wagner": (
        lambda m, x, y, **k: attacks.carlini_wagner(m, x, y, steps=9, searches=3, **k),
        "l2",
    ),
}
ALL = BUDGET | SMALLEST
SEEDED = (
    *("noise", "noise_l2", "apgd_ce", "apgd_margin", "apgd_l2", "apgd_full", "pgd", "pgd_l2"),
    *("square", "square_l2", "one_pixel"),
)


def budget(norm: str) -> float:
    return 0.1 if norm == "linf" else 0.5


# ------------------------------------------------------------------------------------------- known truth


def corner(model, x, y, eps):
    """The point of the L-infinity ball with the highest two-class margin."""
    return (
        (x + eps * (model[1].weight[1 - y] - model[1].weight[y]).view_as(x).sign())
        .clamp(0, 1)
        .detach()
    )


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_apgd_reaches_the_linear_optimum(loss):
    model = linear_model(3)
    x = torch.rand(9, 3, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    result = attacks.apgd(model, x, y, eps=EPS, loss=loss, steps=30, stop_when_fooled=False)
    torch.testing.assert_close(result.x_adv, corner(model, x, y, EPS))


@pytest.mark.parametrize("attack", [attacks.apgd, attacks.pgd])
def test_l2_attacks_reach_the_linear_optimum(attack):
    model = linear_model(2)
    x, y = near_boundary(model, 2)
    direction = (model[1].weight[1 - y] - model[1].weight[y]).view_as(x)
    best = 0.2 * direction.flatten(1).norm(dim=1)
    result = attack(
        model, x, y, eps=0.2, norm="l2", steps=40, loss="margin", stop_when_fooled=False
    )
    gain = _contract.margin(model(result.x_adv), y) - _contract.margin(model(x), y)
    assert (gain >= 0.97 * best).all()
    assert (result.l2 <= 0.2 + 1e-9).all()


def test_mi_fgsm_reaches_the_linear_optimum():
    model = linear_model()
    x = torch.rand(9, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    torch.testing.assert_close(
        attacks.mi_fgsm(model, x, y, eps=EPS).x_adv, corner(model, x, y, EPS)
    )


@pytest.mark.parametrize("classes", [2, 10])
def test_budget_attacks_fool_exactly_what_can_be_fooled(classes):
    """A linear model's image falls exactly when its closed-form distance lies within eps."""
    model = linear_model(classes=classes)
    x, y = near_boundary(model, n=20)
    for norm, attack in [
        ("linf", lambda **kw: attacks.apgd(model, x, y, loss="margin", restarts=2, steps=40, **kw)),
        ("l2", lambda **kw: attacks.apgd(model, x, y, loss="margin", norm="l2", steps=50, **kw)),
        ("linf", lambda **kw: attacks.square(model, x, y, steps=400, **kw)),
    ]:
        distance = boundary_distances(model, x, y, norm)
        eps = float(
            distance.sort().values[9:11].mean()
        )  # between two images: half of them can be fooled
        assert torch.equal(attack(eps=eps).success, distance < eps)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_smallest_change_of_a_linear_model(norm, classes):
    model = linear_model(classes=classes)
    x, y = near_boundary(model)
    best = boundary_distances(model, x, y, norm)
    found = {
        "deepfool": (attacks.deepfool(model, x, y, norm=norm), 1.02),
        "fmn": (attacks.fmn(model, x, y, norm=norm), 1.02),
    }
    if norm == "l2":
        nearest = attacks.carlini_wagner(model, x, y, steps=40, searches=4)
        found["carlini_wagner"] = nearest, 1.05
    if classes > 2:  # these follow the class that is likeliest at each step, not the nearest
        found |= {name: (found[name][0], 2.0) for name in found if name != "deepfool"}
    for name, (result, allowed) in found.items():
        size = getattr(result, norm)
        assert result.success.all(), name
        assert (size >= best * (1 - 1e-6)).all(), name
        assert (size <= best * allowed + 2e-4).all(), (name, (size / best).max())


def test_deepfool_is_one_step_of_a_linear_model():
    model = linear_model(2)
    x, y = near_boundary(model, 2)
    result = attacks.deepfool(model, x, y)
    assert result.first_success_step.eq(1).all() and result.forwards == 2 * len(x)
    torch.testing.assert_close(result.l2, 1.02 * (boundary_distances(model, x, y, "l2") + 1e-4))


def test_black_borders_do_not_stop_the_smallest_changes():
    """Pixels at 0 that should go lower cannot move: the others have to make up for them."""
    model = linear_model()
    x, y = near_boundary(model)
    x, y = x[:1], y[:1]
    direction = (model[1].weight[1 - y] - model[1].weight[y]).view_as(x).detach()
    x = torch.where(direction < -0.2, 0.0, x)
    with torch.no_grad():
        model[1].bias[y] += _contract.margin(model(x), y) + 0.05
    for attack in (attacks.deepfool, attacks.fmn, attacks.carlini_wagner):
        assert attack(model, x, y, steps=60).success.all()


def test_eps_per_channel():
    model = linear_model(3)
    x, y = near_boundary(model, 3)
    eps = attacks.normalised_eps(0.03, [0.2, 0.3, 0.4])
    best = corner(model, x, y, eps)
    options = {"eps": eps, "loss": "margin"}
    for result in (
        attacks.apgd(model, x, y, steps=30, stop_when_fooled=False, **options),
        attacks.mi_fgsm(model, x, y, **options),
    ):
        torch.testing.assert_close(result.x_adv, best, atol=1e-6, rtol=0)
    change = (attacks.square(model, x, y, eps=eps, steps=20).x_adv - x).abs()
    assert (change <= eps + 1e-6).all()


# ------------------------------------------------------------------------------------------- grey and mask


@pytest.mark.parametrize("name", ALL)
def test_grey_and_mask_are_respected(name):
    model = linear_model(3)
    x, y = near_boundary(model, 3)
    x = x[:, :1].expand(-1, 3, -1, -1).contiguous()
    y = model(x).argmax(1)
    mask = torch.zeros(len(x), 1, 4, 4, dtype=torch.bool)
    mask[:, :, :, 1:3] = True
    mask[0, :, 0] = True  # another mask for one image
    run, norm = ALL[name]
    result = run(model, x, y, eps=budget(norm), grey=True, mask=mask)
    change = result.x_adv - x
    assert torch.equal(result.x_adv[:, :1].expand_as(x), result.x_adv)
    assert torch.equal(result.x_adv[~mask.expand_as(x)], x[~mask.expand_as(x)])
    assert change.any()
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)


@pytest.mark.parametrize("name", ALL)
def test_one_mask_for_all_images(name, trained):
    model, x, y = trained
    run, norm = ALL[name]
    mask = attacks.border(x, 2)
    one = run(model, x[:6], y[:6], eps=budget(norm), mask=mask)
    each = run(model, x[:6], y[:6], eps=budget(norm), mask=mask.expand(6, -1, -1, -1))
    assert torch.equal(one.x_adv, each.x_adv)
    assert torch.equal(one.x_adv[:, :, 2:-2, 2:-2], x[:6, :, 2:-2, 2:-2])
    assert (one.x_adv != x[:6]).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("grey", [False, True])
def test_smallest_change_within_grey_and_mask(norm, grey):
    model = linear_model(3)
    x, y = near_boundary(model, 3)
    if grey:
        x = x[:, :1].expand(-1, 3, -1, -1).contiguous()
        with torch.no_grad():
            model[1].bias -= model(x).mean(0)
        y = model(x).argmax(1)
    mask = torch.rand(len(x), 1, 4, 4) < 0.7
    options = {"norm": norm, "grey": grey, "mask": mask}
    best = boundary_distances(model, x, y, norm, grey=grey, mask=mask)
    reachable = best < 0.1  # further away [0,1] comes into play
    assert reachable.sum() >= 5
    for result in (attacks.deepfool(model, x, y, **options), attacks.fmn(model, x, y, **options)):
        size = getattr(result, norm)[reachable]
        assert (size >= best[reachable] * (1 - 1e-6)).all()
        assert (size <= best[reachable] * 1.03 + 2e-4).all()


@pytest.mark.parametrize("name", ALL)
def test_nothing_free_changes_nothing(name, trained):
    model, x, y = trained
    run, norm = ALL[name]
    x, y = x[:6], y[:6]
    closed = torch.zeros(6, 1, 8, 8, dtype=torch.bool)
    result = run(model, x, y, eps=budget(norm), mask=closed)
    assert torch.equal(result.x_adv, x)
    assert torch.equal(result.success, model(x).argmax(1) != y)


# ------------------------------------------------------------------------------------------- every result


@pytest.mark.parametrize("name", ALL)
def test_result_is_feasible_and_true(name, trained):
    model, x, y = trained
    x, y = x[:12].clone(), y[:12].clone()
    x[:, :, 0], x[:, :, 1] = 0.0, 1.0  # pixels at both ends of the range
    y[0] = (model(x[:1]).argmax() + 1) % 2  # one clean error
    before, labels = x.clone(), y.clone()
    run, norm = ALL[name]
    for eps in (budget(norm), 0.0) if name in BUDGET else (budget(norm), 0.0, None):
        result = run(model, x, y, eps=eps)
        assert torch.equal(x, before) and torch.equal(y, labels)
        assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
        change = result.x_adv - x
        if eps is not None:
            assert (_ball.size(change, norm) <= eps + 1e-6).all()
        assert result.eps == (None if eps is None else pytest.approx(eps))
        torch.testing.assert_close(result.linf, change.abs().flatten(1).amax(1))
        torch.testing.assert_close(result.l2, change.flatten(1).norm(dim=1))
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
        assert torch.equal(result.first_success_step == 0, model(x).argmax(1) != y)
        assert torch.equal(result.first_success_step >= 0, result.success)
        assert result.forwards == int(result.queries.sum())
        assert not result.x_adv.requires_grad


@pytest.mark.parametrize("eot", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_passes_are_counted_as_the_model_sees_them(name, eot, trained):
    model, x, y = trained
    seen, asked = [], []
    forward = model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    backward = model[0].register_full_backward_hook(lambda module, gi, go: asked.append(len(go[0])))
    run, norm = ALL[name]
    result = run(model, x[:12], y[:12], eps=budget(norm) / 2, eot=eot)
    forward.remove(), backward.remove()
    assert sum(seen) == result.forwards
    assert sum(asked) == result.backwards


@pytest.mark.parametrize("name", ALL)
def test_works_inside_no_grad_and_per_image(name, trained):
    """Results do not depend on the batch an image is attacked in, and come back from the same seed."""
    model, x, y = trained
    run, norm = ALL[name]
    seeded = name in SEEDED
    options = {"eps": budget(norm) / 2} | ({"seed": 3} if seeded else {})
    with torch.no_grad():
        together = run(model, x[:10], y[:10], **options)
    assert together.seed == (3 if seeded else None)
    for part in (torch.arange(3), torch.tensor([7]), torch.tensor([9, 2])):
        alone = run(model, x[part], y[part], **options, **({"ids": part} if seeded else {}))
        torch.testing.assert_close(alone.x_adv, together.x_adv[part], atol=1e-4, rtol=0)
        assert torch.equal(alone.success, together.success[part])


@pytest.mark.parametrize("name", SEEDED)
def test_another_seed_gives_other_draws(name, trained):
    model, x, y = trained
    run, norm = ALL[name]
    one, two = (run(model, x[:6], y[:6], eps=0.02, seed=seed).x_adv for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", ALL)
def test_model_is_left_bit_equal(name, trained):
    model, x, y = trained
    model[0].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    run, norm = ALL[name]

    def state() -> list:
        tensors = [t.clone() for t in model.state_dict().values()]
        return tensors, [
            (p.requires_grad, p.grad is None, m.training) for m in model for p in m.parameters()
        ]

    try:
        tensors, flags = state()
        run(model, x[:4], y[:4], eps=budget(norm))
        assert all(torch.equal(a, b) for a, b in zip(tensors, state()[0], strict=True))
        assert state()[1] == flags
        assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    finally:
        model[0].bias.requires_grad_(True)
        model[1].weight.grad = None


# ------------------------------------------------------------------------------------------- strength


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_change_that_is_a_little_too_long_is_cut_and_judged_again(norm):
    """DeepFool goes 10 % too far here; an eps 1 % above the distance is enough all the same."""
    model = linear_model()
    x, y = near_boundary(model)
    for image, label, distance in zip(x, y, boundary_distances(model, x, y, norm), strict=True):
        for share, falls in ((1.01, True), (0.99, False)):
            eps = share * float(distance)
            result = attacks.deepfool(
                model, image[None], label[None], norm=norm, overshoot=0.1, eps=eps
            )
            assert bool(result.success) == falls
            assert torch.equal(result.first_success_step, torch.tensor([1 if falls else -1]))


@pytest.mark.parametrize("eps", [0.05, 0.1])
def test_apgd_keeps_up_with_pgd_and_beats_square(eps, trained):
    model, x, y = trained
    fooled = {
        "pgd": attacks.pgd(model, x, y, eps=eps, steps=30, loss="margin").success,
        "apgd": attacks.apgd(model, x, y, eps=eps, steps=30, loss="margin").success,
        "square": attacks.square(model, x, y, eps=eps, steps=60).success,
    }
    assert fooled["apgd"].sum() >= fooled["pgd"].sum()
    assert (fooled["apgd"] | ~fooled["square"]).all()


def test_one_run_of_fmn_answers_for_every_eps(trained):
    """The share of images within eps is not below what PGD fools there; with eps only the close ones stay."""
    model, x, y = trained
    x, y = x[:20], y[:20]
    free = attacks.fmn(model, x, y, steps=40)
    assert free.success.all()
    for eps in (0.02, 0.05, 0.1):
        pgd = attacks.pgd(model, x, y, eps=eps, steps=20, loss="margin").success
        assert (free.linf <= eps).sum() >= pgd.sum() - 1
        kept = attacks.fmn(model, x, y, eps=eps, steps=40)
        near = free.linf <= eps
        assert torch.equal(kept.x_adv[near], free.x_adv[near])
        assert (
            kept.success | ~near
        ).all()  # a little further away, an image may still fall when cut to eps
        cut = kept.linf[kept.success & ~near]
        torch.testing.assert_close(cut, torch.full_like(cut, eps))
        assert torch.equal(kept.x_adv[~kept.success], x[~kept.success])


def test_smallest_changes_are_ordered(trained):
    """FMN and Carlini-Wagner find smaller L2 changes than DeepFool, which stops at its first success."""
    model, x, y = trained
    x, y = x[:20], y[:20]
    deepfool = attacks.deepfool(model, x, y).l2.median()
    assert attacks.fmn(model, x, y, norm="l2", steps=40).l2.median() <= deepfool
    assert attacks.carlini_wagner(model, x, y, steps=30, searches=4).l2.median() <= deepfool


def test_carlini_wagner_walks_far_enough_within_a_small_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 2)).eval()
    x, mask = torch.full((6, 1, 64, 64), 0.5), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 30:34, 30:34] = True
    weight = (model[1].weight[1] - model[1].weight[0]).detach().view(64, 64)
    model[1].bias.data[1] += (
        -(model(x)[0, 1] - model(x)[0, 0]) + 0.2 * weight[mask[0, 0]].norm()
    )  # 0.2 from the boundary
    found = attacks.carlini_wagner(model, x, model(x).argmax(1), mask=mask, steps=60, searches=3)
    assert found.success.all() and (found.l2 < 0.2 * 1.05).all()


def test_carlini_wagner_judges_its_last_step(trained):
    model, x, y = trained
    right = model(x).argmax(1) == y
    found = attacks.carlini_wagner(
        model, x[right], y[right], steps=1, searches=1, step_size=1.0, constant=1e6
    )
    assert found.success.any(), "the only step was never looked at"


def test_carlini_wagner_finds_the_scale_of_the_model():
    """Images 1000 times as near to the boundary fall to changes 1000 times as small, in as many steps."""
    model = linear_model(size=8)
    x, y = near_boundary(model, size=8)
    gaps, direction = -_contract.margin(model(x), y), model[1].weight[0] - model[1].weight[1]
    toward = (
        torch.where(y == 0, -1, 1) * gaps / direction.square().sum()
    )  # along it, to the boundary itself
    for left in (1.0, 1e-3):
        near = (x + (1 - left) * (toward[:, None] * direction).view_as(x)).detach()
        best = boundary_distances(model, near, y, "l2")
        found = attacks.carlini_wagner(model, near, y, steps=30, searches=3)
        assert found.success.all() and (found.l2 <= 1.05 * best).all()


def test_stopping_early_fools_the_same_images(trained):
    model, x, y = trained
    options = {"eps": 0.12, "steps": 20, "restarts": 2, "seed": 5}
    early = attacks.apgd(model, x, y, **options)
    full = attacks.apgd(model, x, y, stop_when_fooled=False, **options)
    assert torch.equal(early.success, full.success)
    assert torch.equal(early.first_success_step, full.first_success_step)
    assert early.forwards < full.forwards


def test_margin_fools_a_saturated_model_where_cross_entropy_has_no_gradient(trained):
    model, x, y = trained

    class Saturated(nn.Module):
        def forward(self, images):
            return 1e4 * model(images)

    saturated = Saturated().eval()
    for attack in (attacks.apgd, attacks.mi_fgsm):
        blind = attack(saturated, x, y, eps=0.2, loss="ce", steps=10).success.float().mean()
        assert (
            attack(saturated, x, y, eps=0.2, loss="margin", steps=10).success.float().mean()
            > 0.9
            > blind
        )


def test_apgd_halves_the_step_where_the_loss_swings():
    """A valley that a step of 2 eps jumps across at once: fixed steps swing, APGD settles at the top."""

    class Ridge(nn.Module):
        def forward(self, x):
            height = -((x.flatten(1) - 0.513) ** 2).sum(1)
            return torch.stack([1 - height, height], 1)

    x, y = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    result = attacks.apgd(Ridge().eval(), x, y, eps=0.1, loss="margin", steps=100)
    torch.testing.assert_close(result.x_adv, torch.full_like(x, 0.513), atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------- transfer


def test_mi_fgsm_crafts_on_the_surrogate_and_asks_the_target_twice(trained):
    target, x, y = trained
    torch.manual_seed(1)
    surrogate = nn.Sequential(nn.Flatten(), nn.Linear(64, int(y.max()) + 1)).eval()
    with torch.no_grad():
        for k in range(int(y.max()) + 1):  # the mean image of each class as its template
            surrogate[1].weight[k] = x[y == k].mean(0).flatten() - 0.5
            weight = surrogate[1].weight[k]
            surrogate[1].bias[k] = -0.5 * (weight**2).sum() - 0.5 * weight.sum()
    seen = []
    handle = target.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    result = attacks.mi_fgsm(target, x, y, eps=0.2, surrogate=surrogate)
    handle.remove()
    assert seen == [len(x), len(x)]
    assert result.forwards == 2 * len(x) and result.backwards == 10 * len(x)
    assert torch.equal(result.success, target(result.x_adv).argmax(1) != y)
    noise = attacks.noise(target, x, y, eps=0.2, draws=2).success
    assert noise.sum() < result.success.sum()


def test_mi_fgsm_refuses_a_surrogate_in_training_mode(trained):
    model, x, y = trained
    surrogate = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        attacks.mi_fgsm(model, x, y, eps=EPS, surrogate=surrogate)


# ------------------------------------------------------------------------------------------- random models


class Random(nn.Module):
    """A margin that falls on average along the mean pixel, with noise drawn at every pass.

    `spread`: of the margin; `tilt`: of a random direction added to the gradient, which hides the true one.
    """

    def __init__(
        self, *, level: float = 0.0, slope: float = 0.0, spread: float = 0.0, tilt: float = 0.0
    ):
        super().__init__()
        self.level, self.slope, self.spread, self.tilt = level, slope, spread, tilt

    def forward(self, x):
        centred = x.flatten(1) - 0.5
        wrong = self.level + self.slope * centred.mean(1) + self.spread * torch.randn(len(x))
        wrong = wrong + self.tilt * (torch.randn_like(centred) * centred).mean(1)
        return torch.stack([torch.zeros_like(wrong), wrong], 1)


FLAT_X, FLAT_Y = torch.full((40, 1, 4, 4), 0.5), torch.zeros(40, dtype=torch.int64)


@pytest.mark.parametrize("name", ["noise", "square", "apgd_margin", "pgd"])
def test_luck_of_one_pass_is_no_success(name):
    """The model errs in 3 passes of 10, whatever the image: one of many looks is wrong, most are not."""
    model = Random(level=-0.524, spread=1.0).eval()
    torch.manual_seed(0)
    run, _ = ALL[name]
    assert run(model, FLAT_X, FLAT_Y, eps=0.1).success.float().mean() > 0.8
    honest = run(model, FLAT_X, FLAT_Y, eps=0.1, eot=15)
    assert honest.success.float().mean() < 0.2
    assert torch.equal(honest.first_success_step >= 0, honest.success)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd_ce", "mi_fgsm", "fmn_linf", "deepfool_linf"])
def test_what_is_wrong_on_average_counts_as_fooled(name):
    """The ball's best point has an expected margin of +8 standard deviations, the clean image of -4."""
    model = Random(level=-1.0, slope=20.0, spread=0.25).eval()
    torch.manual_seed(0)
    run, _ = ALL[name]
    result = run(model, FLAT_X, FLAT_Y, eps=0.15, eot=8)
    assert result.success.float().mean() > 0.9
    assert result.queries.min() >= 16 and (result.linf <= 0.15 + 1e-6).all()


def test_averaged_gradients_find_the_direction_that_one_pass_hides():
    model = Random(level=-1.0, slope=4.0, tilt=20.0).eval()
    rise = {}
    for eot in (1, 60):
        torch.manual_seed(0)
        rise[eot] = float(
            (attacks.fgsm(model, FLAT_X, FLAT_Y, eps=0.1, eot=eot).x_adv - 0.5).mean()
        )
    assert rise[1] < 0.04 and rise[60] > 0.08  # 0.1: every pixel goes the right way


@pytest.mark.parametrize("name", ALL)
def test_passes_of_a_fixed_model_change_nothing(name, trained):
    model, x, y = trained
    run, norm = ALL[name]
    one, three = (run(model, x[:6], y[:6], eps=budget(norm) / 2, eot=eot) for eot in (1, 3))
    torch.testing.assert_close(one.x_adv, three.x_adv, atol=1e-4, rtol=0)
    assert torch.equal(one.success, three.success)
    assert torch.equal(one.first_success_step, three.first_success_step)


# ------------------------------------------------------------------------------------------- BPDA


class Squeeze(nn.Module):
    """Few grey levels, by way of NumPy: no gradient at all."""

    def forward(self, x):
        return torch.from_numpy((x.numpy() * 15).round() / 15)


GRADIENT = ("fgsm", "pgd", "pgd_l2", "apgd_margin", "apgd_l2", "mi_fgsm", *SMALLEST)


@pytest.mark.parametrize("name", GRADIENT)
def test_every_gradient_attack_goes_past_a_module_without_gradient(name):
    plain = linear_model(size=8)
    x, _ = near_boundary(plain, size=8)
    model = nn.Sequential(Squeeze(), plain).eval()
    y = model(x).argmax(1)
    run, norm = ALL[name]
    with pytest.raises(RuntimeError):  # PyTorch refuses NumPy on the way of a gradient
        run(model, x, y, eps=budget(norm))
    with attacks.bpda(model, {"0": None}):
        past = run(model, x, y, eps=2 * budget(norm))
    assert past.success.float().mean() >= (0.7 if name == "carlini_wagner" else 0.9)
    assert torch.equal(past.success, model(past.x_adv).argmax(1) != y)


def test_bpda_answers_exactly_and_takes_the_gradient_of_the_surrogate():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]], requires_grad=True)
    exact = model(x.detach().clone())
    for key in ("0", model[0]):
        with attacks.bpda(model, {key: lambda z: 5 * z}):
            torch.testing.assert_close(model(x), exact)
            gradient = torch.autograd.grad(model(x)[0, 1], x)[0]
            assert torch.equal(model(x.detach().clone()), exact)
        torch.testing.assert_close(gradient.flatten(), 5 * model[2].weight[1])
    with attacks.bpda(model, {"": lambda z: z.flatten(1)[:, :2]}):  # the model as a whole
        assert torch.autograd.grad(model(x)[0, 1], x)[0].flatten().tolist() == [0, 1, 0, 0]
    assert "forward" not in model[0].__dict__ and "forward" not in model.__dict__


@pytest.mark.parametrize("squeeze", [Squeeze(), nn.Hardtanh(0.4, 0.5)])
def test_a_fast_copy_made_inside_the_context_goes_past_the_module_too(squeeze):
    torch.manual_seed(0)
    model = nn.Sequential(
        squeeze, nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)
    ).eval()
    x = 0.6 + 0.3 * torch.rand(4, 1, 8, 8)  # above Hardtanh's range: its own gradient is zero
    with attacks.bpda(model, {"0": None}):
        copied = fast_copy(model)
        expected = attacks.fgsm(model, x, model(x).argmax(1), eps=0.05)
    torch.testing.assert_close(copied(x), model(x), atol=1e-5, rtol=0)
    found = attacks.fgsm(copied, x, model(x).argmax(1), eps=0.05)
    torch.testing.assert_close(found.x_adv, expected.x_adv)
    assert (found.x_adv != x).all()


def test_bpda_is_undone_after_an_error_and_when_nested():
    model = nn.Sequential(Squeeze(), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.rand(1, 1, 2, 2, requires_grad=True)
    with attacks.bpda(model, {"0": None}):
        with pytest.raises(ZeroDivisionError), attacks.bpda(model, {"0": lambda z: 3 * z}):
            raise ZeroDivisionError
        torch.testing.assert_close(
            torch.autograd.grad(model(x)[0, 0], x)[0].flatten(), model[2].weight[0]
        )
    with pytest.raises(RuntimeError):
        model(x)
    with (
        pytest.raises(KeyError, match="no module 'squeeze'"),
        attacks.bpda(model, {"squeeze": None}),
    ):
        pass
    with pytest.raises(KeyError, match="no module"), attacks.bpda(model, {nn.Flatten(): None}):
        pass
    with pytest.raises(TypeError, match="function or None"), attacks.bpda(model, {"0": 3}):
        pass
    with (
        attacks.bpda(model, {"0": lambda z: z[..., :1]}),
        pytest.raises(ValueError, match="surrogate of '0'"),
    ):
        model(x)
    assert "forward" not in model[0].__dict__


# ------------------------------------------------------------------------------------------- errors


GOOD_X, GOOD_Y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
BAD = {
    "uint8": ({"x": (GOOD_X * 255).to(torch.uint8)}, TypeError, "255"),
    "normalised": ({"x": GOOD_X * 4 - 2.1}, ValueError, "before normalisation"),
    "label 12": ({"y": GOOD_Y + 12}, ValueError, "the model has classes"),
    "half precision": ({"x": GOOD_X.half()}, TypeError, "x.float()"),
    "float label": ({"y": GOOD_Y.float()}, TypeError, "int64"),
    "eps -0.1": ({"eps": -0.1}, ValueError, ">= 0"),
    "no bool mask": ({"mask": torch.ones(2, 1, 8, 8)}, TypeError, "mask > 0"),
    "three masks": (
        {"mask": torch.ones(3, 1, 8, 8, dtype=torch.bool)},
        ValueError,
        "one plane per image",
    ),
    "small mask": ({"mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}, ValueError, "resize"),
    "no passes": ({"eot": 0}, ValueError, "eot"),
    "no steps": ({"steps": 0}, ValueError, "steps"),
}
DIRECT = {
    "apgd": attacks.apgd,
    "mi_fgsm": attacks.mi_fgsm,
    "square": attacks.square,
    "fmn": attacks.fmn,
    "deepfool": attacks.deepfool,
    "carlini_wagner": attacks.carlini_wagner,
}


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(name, case, trained):
    arguments, error, words = BAD[case]
    given = {"x": GOOD_X, "y": GOOD_Y, "eps": EPS} | arguments
    with pytest.raises(error, match=words):
        DIRECT[name](trained[0], given.pop("x"), given.pop("y"), **given)


@pytest.mark.parametrize("name", DIRECT)
def test_model_in_training_mode_is_refused(name, trained):
    model = trained[0]
    model[5].train()  # dropout alone left on
    try:
        with pytest.raises(ValueError, match=r"5 \(Dropout\).*model\.eval\(\)"):
            DIRECT[name](model, GOOD_X, GOOD_Y, eps=EPS)
    finally:
        model[5].eval()


@pytest.mark.parametrize(
    "layer", [nn.RReLU(), nn.FeatureAlphaDropout(), StochasticDepth(0.5, "row")]
)
def test_any_layer_that_is_random_in_training_is_refused(layer):
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"1 \(\w+\) is in training mode"):
        attacks.fgsm(model, GOOD_X, GOOD_Y, eps=EPS)
    assert len(attacks.fgsm(model.eval(), GOOD_X, GOOD_Y, eps=EPS).success) == 2


class Log(nn.Module):
    """Defined where pixels are above 0.02, NaN below."""

    def forward(self, x):
        rise = torch.log(x.flatten(1) - 0.02).sum(1)
        return torch.stack([torch.zeros_like(rise), rise + 8], 1)


@pytest.mark.parametrize(
    "name", [name for name in ALL if "l2" not in name and name not in ("carlini_wagner", "pgd")]
)
def test_an_answer_that_is_no_number_is_no_success(name):
    model, x = Log().eval(), torch.full((4, 1, 2, 2), 0.06)
    y = model(x).argmax(1)
    found = ALL[name][0](model, x, y, eps=0.05)
    answers = model(found.x_adv)
    assert answers.isfinite().all()


def test_pgd_that_starts_where_there_is_no_number_says_so():
    model, x = Log().eval(), torch.full((4, 1, 2, 2), 0.06)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        attacks.pgd(model, x, model(x).argmax(1), eps=0.05)


def test_logits_in_a_dict_are_refused():
    class InDict(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x.flatten(1))}

    with pytest.raises(TypeError, match="tensor of logits.*not dict"):
        attacks.fgsm(InDict(64, 2).eval(), GOOD_X, GOOD_Y, eps=EPS)


def test_other_errors_name_the_argument(trained):
    model = trained[0]
    with pytest.raises(ValueError, match="norm must be one of"):
        attacks.apgd(model, GOOD_X, GOOD_Y, eps=EPS, norm="l1")
    with pytest.raises(ValueError, match="one finite number"):
        attacks.pgd(model, GOOD_X, GOOD_Y, eps=torch.full((1, 1, 1), 0.1), norm="l2")
    with pytest.raises(ValueError, match="8/255"):
        attacks.square(model, GOOD_X, GOOD_Y, eps=8)
    with pytest.raises(ValueError, match="area"):
        attacks.square(model, GOOD_X, GOOD_Y, eps=EPS, area=0)
    with pytest.raises(ValueError, match="overshoot"):
        attacks.deepfool(model, GOOD_X, GOOD_Y, overshoot=-1)
    with pytest.raises(ValueError, match="gamma"):
        attacks.fmn(model, GOOD_X, GOOD_Y, gamma=1)
    with pytest.raises(ValueError, match="constant"):
        attacks.carlini_wagner(model, GOOD_X, GOOD_Y, constant=0)
    with pytest.raises(ValueError, match="decay"):
        attacks.mi_fgsm(model, GOOD_X, GOOD_Y, eps=EPS, decay=-1)
    assert attacks.apgd(model, GOOD_X, GOOD_Y, eps=3.0, norm="l2", steps=1).eps == 3.0
    with pytest.raises(ValueError, match="width must be from 1 to 4"):
        attacks.border(GOOD_X, 5)
    one_logit = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()
    for name in DIRECT:
        with pytest.raises(ValueError, match="K >= 2"):
            DIRECT[name](one_logit, GOOD_X, torch.zeros(2, dtype=torch.int64), eps=EPS)


def test_attacks_of_a_ball_share_one_contract():
    assert _contract.NORMS == ("linf", "l2")
    x = torch.full((1, 1, 2, 2), 0.9)
    ball = _ball.Ball(x, 0.5, norm="l2")
    inside = ball.project(x + 10)
    assert float(inside.max()) == 1 and float(_ball.size(inside - x, "l2")[0]) <= 0.5 + 1e-6
