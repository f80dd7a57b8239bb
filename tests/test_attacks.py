"""Every attack: true results, counted passes, an untouched model, refusals, and its strength."""

import math
from functools import partial

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from dlia_utils import attacks, smoothing
from dlia_utils.attacks import base, evaluate
from dlia_utils.device import fingerprint
from dlia_utils.explain import activations, attribution, drift, gradcam

EPS, ASKED = 8 / 255, 7  # images that the door asks a model about


def taught(classes, *more):
    """A small CNN of so many classes and 40 images of 8 x 8 that it was trained on."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), *more, nn.Linear(6 * 16, classes))
    y = torch.arange(40) % classes
    patterns = 0.5 + 0.15 * torch.randn(classes, 1, 8, 8)
    x = (patterns[y] + 0.05 * torch.randn(40, 1, 8, 8)).clamp(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


@pytest.fixture(scope="module", params=[2, 10])
def trained(request):
    return taught(request.param, nn.Dropout(0.1))


@pytest.fixture(scope="module")
def ten():
    return taught(10)


IN_BALL = {  # attacks inside a given ball: (attack, its options)
    "fgsm": (attacks.fgsm, {}),
    "noise": (attacks.noise, {}),
    "pgd": (attacks.pgd, {"steps": 6, "restarts": 2}),
    "pgd_still": (attacks.pgd, {"steps": 6, "restarts": 0, "loss": "margin"}),
    "pgd_full": (attacks.pgd, {"steps": 6, "stop_when_fooled": False}),
    "pgd_l2": (attacks.pgd, {"steps": 6, "norm": "l2"}),
    "apgd": (attacks.apgd, {"steps": 6, "restarts": 2}),
    "apgd_full": (attacks.apgd, {"steps": 6, "loss": "margin", "stop_when_fooled": False}),
    "apgd_l2": (attacks.apgd, {"steps": 6, "norm": "l2"}),
    "square": (attacks.square, {"steps": 8, "restarts": 2}),
    "one_pixel": (attacks.one_pixel, {"population": 6, "iterations": 3}),
}
SMALLEST = {  # attacks that look for the smallest change
    "fmn": (attacks.fmn, {"steps": 20}),
    "fmn_l2": (attacks.fmn, {"steps": 20, "norm": "l2"}),
    "deepfool": (attacks.deepfool, {"norm": "linf"}),
    "deepfool_l2": (attacks.deepfool, {}),
    "carlini_wagner": (attacks.carlini_wagner, {"steps": 9, "searches": 3}),
}
ALL = IN_BALL | SMALLEST
FREE = ("fgsm", "pgd_still", *SMALLEST)  # nothing is drawn


def run(name, model, x, y, *, share=1.0, **options):
    """One attack, in a ball of `share` times the usual size."""
    attack, own = ALL[name]
    eps = {"eps": share * (0.5 if own.get("norm") == "l2" else 0.1)} if name in IN_BALL else {}
    return attack(model, x, y, **eps, **own, **options)


@pytest.mark.parametrize("name", ALL)
def test_result_is_feasible_and_true(name, trained):
    model, x, y = trained
    x, y = x[:12].clone(), y[:12].clone()
    x[:, :, 0], x[:, :, 1] = 0.0, 1.0  # pixels at both ends of the range
    y[0] = (model(x[:1]).argmax() + 1) % 2  # one clean error
    before, labels = x.clone(), y.clone()
    for share in (1.0, 1e-6):
        result = run(name, model, x, y, share=share)
        assert torch.equal(x, before) and torch.equal(y, labels)
        assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
        change = result.x_adv - x
        if name in IN_BALL:
            l2 = ALL[name][1].get("norm") == "l2"
            size, eps = (result.l2, 0.5) if l2 else (result.linf, 0.1)
            assert (size <= share * eps + 1e-6).all()
        torch.testing.assert_close(result.linf, change.abs().flatten(1).amax(1))
        torch.testing.assert_close(result.l2, change.flatten(1).norm(dim=1))
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
        assert torch.equal(result.first_success_step == 0, model(x).argmax(1) != y)
        assert torch.equal(result.first_success_step >= 0, result.success)
        assert result.forwards == int(result.queries.sum())
        assert not result.x_adv.requires_grad and not result.x_adv.is_inference()


@pytest.mark.parametrize("name", ALL)
def test_passes_are_counted_as_the_model_sees_them(name, trained):
    model, x, y = trained
    seen, asked = [], []
    base.check_steady(model, x)
    forward = model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    backward = model[0].register_full_backward_hook(lambda module, gi, go: asked.append(len(go[0])))
    result = run(name, model, x[:12], y[:12], share=0.5)
    forward.remove(), backward.remove()
    assert sum(seen) == result.forwards and sum(asked) == result.backwards


@pytest.mark.parametrize("name", ALL)
def test_an_image_is_attacked_alike_in_any_batch_and_under_no_grad(name, trained):
    model, x, y = trained
    seeds = [(3, image) for image in range(10)]
    with torch.no_grad():
        options = {} if name in FREE else {"seed": seeds}
        together = run(name, model, x[:10], y[:10], share=0.5, **options)
    for part in ([0, 1, 2], [7], [9, 2]):
        options = {} if name in FREE else {"seed": [seeds[image] for image in part]}
        alone = run(name, model, x[part], y[part], share=0.5, **options)
        torch.testing.assert_close(alone.x_adv, together.x_adv[part], atol=1e-4, rtol=0)
        assert torch.equal(alone.success, together.success[part])
    if name not in FREE:
        one, two = (run(name, model, x[:6], y[:6], share=0.2, seed=seed).x_adv for seed in (0, 1))
        assert not torch.equal(one, two)


@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=30)
@hypothesis.given(
    name=st.sampled_from(list(ALL)),
    shape=st.tuples(*map(st.integers, (2, 1, 1), (6, 3, 4)), st.integers(1, 5)),
    classes=st.integers(2, 4),
    share=st.floats(0.01, 2),
    seed=st.integers(0, 2**40),
    edges=st.booleans(),
    data=st.data(),
)
def test_any_attack_on_any_images_is_feasible_true_and_blind_to_its_batch(
    name, shape, classes, share, seed, edges, data
):
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(math.prod(shape[1:]), 6), nn.Tanh(), nn.Linear(6, classes)
    model, x = nn.Sequential(*layers).double().eval(), torch.rand(shape, dtype=torch.float64)
    x = (2 * x - 0.5).clamp(0, 1) if edges else x  # half of the pixels black or white
    y, before = torch.randint(classes, shape[:1]), fingerprint(model)
    order = data.draw(st.permutations(range(shape[0])), label="order")
    cut = data.draw(st.integers(1, shape[0] - 1), label="images in the first batch")
    keys = [(seed, image) for image in range(shape[0])]

    def attack(rows):
        options = {} if name in FREE else {"seed": [keys[row] for row in rows]}
        return run(name, model, x[rows], y[rows], share=share, **options)

    whole = attack(list(range(shape[0])))
    assert whole.x_adv.min() >= 0 and whole.x_adv.max() <= 1
    if name in IN_BALL:
        l2 = ALL[name][1].get("norm") == "l2"
        limit = share * (0.5 if l2 else 0.1)
        assert ((whole.l2 if l2 else whole.linf) <= limit + 1e-9).all()
    assert torch.equal(whole.success, model(whole.x_adv).argmax(1) != y)
    assert fingerprint(model) == before and all(p.requires_grad for p in model.parameters())
    for rows in (order[:cut], order[cut:]):
        part = attack(rows)
        assert torch.equal(part.success, whole.success[rows])
        torch.testing.assert_close(part.x_adv, whole.x_adv[rows], atol=1e-6, rtol=0)


class Breaks(nn.Module):
    """Fails on the second pass after those of the door."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x):
        self.passes += 1
        if self.passes == 5:
            raise RuntimeError("out of memory")
        return self.model(x)


@pytest.mark.parametrize("name", ALL)
def test_model_is_left_bit_equal_also_after_an_error(name, trained):
    model, x, y = trained
    model[0].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)

    def state():
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return [t.clone() for t in model.state_dict().values()], flags, [m.training for m in model]

    try:
        before = state()
        run(name, model, x[:4], y[:4])
        with pytest.raises(RuntimeError, match="out of memory"):
            run(name, Breaks(model).eval(), x[:4], y[:4])
        assert all(torch.equal(a, b) for a, b in zip(before[0], state()[0], strict=True))
        assert state()[1:] == before[1:]
        assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    finally:
        model[0].bias.requires_grad_(True)
        model[1].weight.grad = None


class Log(nn.Module):
    """Defined where pixels are above 0.02, NaN below."""

    def forward(self, x):
        rise = torch.log(x.flatten(1) - 0.02).sum(1)
        return torch.stack([torch.zeros_like(rise), rise + 8], 1)


@pytest.mark.parametrize("name", ALL)
def test_an_answer_that_is_no_number_is_no_success(name):
    model, x = Log().eval(), torch.full((4, 1, 2, 2), 0.06)
    y = model(x).argmax(1)
    found = run(name, model, x, y, share=0.5)
    assert not (found.success & ~model(found.x_adv).isfinite().all(1)).any()


# ---------------------------------------- errors


GOOD_X, GOOD_Y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
PER_CHANNEL = attacks.normalised_eps(0.1, [0.2] * 3)
TRAINING = r"1 \(Dropout\) is in training mode.*model\.eval\(\)"
BAD = {  # what is passed, and words of the answer
    "bytes": ({"x": (GOOD_X * 255).to(torch.uint8)}, "255"),
    "no batch": ({"x": GOOD_X[0]}, r"\[B,C,H,W\]"),
    "empty": ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, "non-empty"),
    "NaN": ({"x": GOOD_X * torch.nan}, "spans .nan"),
    "normalised": ({"x": GOOD_X * 4 - 2.1}, "before normalisation"),
    "float label": ({"y": GOOD_Y.float()}, "int64"),
    "label 12": ({"y": GOOD_Y + 12}, "the model has classes"),
    "label -1": ({"y": GOOD_Y - 1}, "negative"),
    "three labels": ({"y": torch.zeros(3, dtype=torch.int64)}, "one label per image"),
    "training mode": ({"model": nn.Sequential(nn.Dropout()).eval().append(nn.Dropout())}, TRAINING),
    "one logit": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()}, "K >= 2"),
    "eps 8": ({"eps": 8}, "8/255"),
    "eps per channel": ({"eps": PER_CHANNEL}, "expand"),
    "loss": ({"loss": "dlr"}, "loss"),
    "norm": ({"norm": "l1"}, "norm"),
    "seed": ({"seed": [(0, 1)]}, "2 pairs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, trained):
    given, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        attacks.pgd(**{"model": trained[0], "x": GOOD_X, "y": GOOD_Y, "eps": EPS} | given)


@pytest.mark.parametrize("name", ALL)
def test_another_range_is_refused_by_every_attack(name, trained):
    with pytest.raises(ValueError, match="before normalisation"):
        run(name, trained[0], GOOD_X * 4 - 2.1, GOOD_Y)


@pytest.mark.parametrize("name", ALL)
def test_no_gradients_and_torchscript_are_refused_in_words(name, trained):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad may stay"):
        run(name, trained[0], GOOD_X, GOOD_Y)
    traced = torch.jit.trace(trained[0], GOOD_X)
    for script in (traced, torch.jit.freeze(traced)):
        with pytest.raises(TypeError, match="give the torch.nn.Module that it was made from"):
            run(name, script, GOOD_X, GOOD_Y)


class Functional(nn.Module):
    """A dropout that is no module: it listens to the training flag, or to nothing."""

    def __init__(self, always):
        super().__init__()
        self.out, self.always = nn.Linear(64, 2), always

    def forward(self, x):
        return self.out(F.dropout(x.flatten(1), 0.5, training=self.always or self.training))


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)).squeeze()


def normed():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def partly():
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(64, 2)).eval()
    model[1].train()
    return model


UNSTEADY = {  # the model, and words of the answer
    "eval forgotten": (Functional(False), r"the model \(Functional\) is in training mode"),
    "a part in training": (partly(), r"1 \(Flatten\) is in training mode.*model\.eval"),
    "chance": (Functional(True).eval(), "the same images differently each time"),
    "company": (normed().eval(), r"alone otherwise than in a batch.*statistics\? 1\)"),
    "shape": (Squeezed(64, 2).eval(), "alone otherwise than in a batch"),
}


@pytest.mark.parametrize("case", UNSTEADY)
def test_a_model_that_answers_by_company_or_chance_is_refused_by_asking(case):
    model, words = UNSTEADY[case]
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0])
    doors = [partial(run, name, model, x, y) for name in ALL]
    maps = "saliency integrated_gradients occlusion deeplift".split()
    doors += [partial(attribution.explain, name, model, x, 1) for name in maps]
    doors += [partial(evaluate.robust, model, (x, y), [EPS], progress=False)]
    doors += [partial(evaluate.zero_gradient_share, model, x, y)]
    doors += [partial(drift.measure, model, x, y, [0, 1, 2], names=[], methods=["saliency"])]
    layer = [name for name, _ in model.named_modules()][-1]
    doors += [partial(door, model, x, layer) for door in (activations, gradcam)]
    if "training" not in words:  # which smoothing puts in eval mode itself
        doors += [partial(smoothing.certify, model, x, y, sigma=0.1, n0=5, n=5)]
    for door in doors:
        with pytest.raises(ValueError, match=words):
            door()


def test_a_steady_model_is_asked_once_and_again_when_something_in_it_changes():
    model, seen = nn.Sequential(normed(), nn.Identity()).eval(), []
    model[0][1] = nn.BatchNorm2d(4).eval()
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    x, y = torch.rand(9, 1, 8, 8), torch.tensor([0, 1, 0] * 3)
    for asked in (ASKED, 0):
        seen.clear()
        evaluate.zero_gradient_share(model, x, y, batch_size=2)
        assert sum(seen) == 9 + asked
    model[0][1].running_mean = None  # it then uses the batch's
    model[0][1].running_var = None
    with pytest.raises(ValueError, match="statistics"):
        attacks.fgsm(model, x, y, eps=EPS)


def test_rounding_just_outside_the_range_is_tolerated(trained):
    x = GOOD_X.clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -3e-8, 1 + 1e-7
    assert attacks.fgsm(trained[0], x, GOOD_Y, eps=EPS).x_adv.min() >= 0


def test_an_l2_change_stays_in_the_ball_and_in_the_range():
    x = torch.full((1, 1, 2, 2), 0.9)
    inside = base.project(x + 10, x, 0.5, "l2")
    assert float(inside.max()) == 1 and float(base.size(inside - x, "l2")[0]) <= 0.5 + 1e-6


# ---------------------------------------- strength: known truth


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


# ---------------------------------------- against each other


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
def test_more_work_fools_more(eps, ten):
    model, x, y = ten
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
def test_stopping_early_fools_the_same_images(attack, restarts, ten):
    model, x, y = ten
    restarts = max(restarts, int(attack is attacks.apgd))
    options = {"eps": 0.06, "steps": 12, "restarts": restarts, "seed": 5}
    early, full = (attack(model, x, y, stop_when_fooled=stop, **options) for stop in (True, False))
    assert torch.equal(early.success, full.success) and early.forwards < full.forwards
    assert torch.equal(early.first_success_step, full.first_success_step)


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_margin_fools_a_saturated_model_where_cross_entropy_has_no_gradient(attack, ten):
    model, x, y = ten

    class Saturated(nn.Module):
        def forward(self, images):
            return 1e4 * model(images)

    right = model(x).argmax(1) == y
    blind, seeing = (
        attack(Saturated().eval(), x[right], y[right], eps=0.2, loss=loss, steps=10).success
        for loss in ("ce", "margin")
    )
    assert seeing.float().mean() > 0.9 > blind.float().mean()
