"""The contract of every attack: true results, counted passes, an untouched model, errors."""

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from dlia_utils import attacks
from dlia_utils.attacks import base

EPS = 8 / 255


@pytest.fixture(scope="module", params=[2, 10])
def trained(request):
    """A small CNN of 2 or 10 classes and 40 images of 8 x 8 that it was trained on."""
    classes = request.param
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(6 * 16, classes))
    y = torch.arange(40) % classes
    patterns = 0.5 + 0.15 * torch.randn(classes, 1, 8, 8)
    x = (patterns[y] + 0.05 * torch.randn(40, 1, 8, 8)).clamp(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


IN_BALL = {  # attacks inside a given ball: (attack, its options)
    "fgsm": (attacks.fgsm, {}),
    "noise": (attacks.noise, {}),
    "noise_l2": (attacks.noise, {"norm": "l2"}),
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
DIRECT = {attack.__name__: attack for attack, _ in ALL.values()}


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
    for share in (1.0, 0.0):
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


class Breaks(nn.Module):
    """Fails on the second pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x):
        self.passes += 1
        if self.passes == 2:
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
BAD = {
    "uint8": ({"x": (GOOD_X * 255).to(torch.uint8)}, TypeError, "255"),
    "half precision": ({"x": GOOD_X.half()}, TypeError, "x.float()"),
    "no batch": ({"x": GOOD_X[0]}, ValueError, r"\[B,C,H,W\]"),
    "empty": ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, ValueError, "non-empty"),
    "NaN": ({"x": GOOD_X * torch.nan}, ValueError, "spans .nan"),
    "normalised": ({"x": GOOD_X * 4 - 2.1}, ValueError, "before normalisation"),
    "float label": ({"y": GOOD_Y.float()}, TypeError, "int64"),
    "label 12": ({"y": GOOD_Y + 12}, ValueError, "the model has classes"),
    "label -1": ({"y": GOOD_Y - 1}, ValueError, "negative"),
    "three labels": ({"y": torch.zeros(3, dtype=torch.int64)}, ValueError, "one label per image"),
    "no module": ({"model": lambda x: x}, TypeError, "Module"),
    "training mode": ({"model": nn.Dropout()}, ValueError, r"\(Dropout\).*model\.eval\(\)"),
    "one logit": (
        {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), "y": 0 * GOOD_Y},
        ValueError,
        "K >= 2",
    ),
}


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(name, case, trained):
    arguments, error, words = BAD[case]
    given = {"model": trained[0], "x": GOOD_X, "y": GOOD_Y} | arguments
    given |= {} if name in ("fmn", "deepfool", "carlini_wagner") else {"eps": EPS}
    with pytest.raises(error, match=words):
        DIRECT[name](**given)


@pytest.mark.parametrize(
    ("attack", "options", "words"),
    [
        ("fgsm", {"eps": 8}, "8/255"),
        ("fgsm", {"eps": -0.1}, ">= 0"),
        ("fgsm", {"eps": attacks.normalised_eps(0.1, [0.2] * 3)}, "expand"),
        ("pgd", {"eps": EPS, "loss": "dlr"}, "loss"),
        ("pgd", {"eps": EPS, "norm": "l1"}, "norm"),
        ("pgd", {"eps": torch.full((1, 1, 1), 0.1), "norm": "l2"}, "a number"),
        ("apgd", {"eps": EPS, "steps": 0}, "steps"),
        ("noise", {"eps": EPS, "seed": [(0, 1)]}, "2 pairs"),
        ("deepfool", {"overshoot": -1}, "overshoot"),
    ],
)
def test_other_errors_name_the_argument(attack, options, words, trained):
    with pytest.raises(ValueError, match=words):
        DIRECT[attack](trained[0], GOOD_X, GOOD_Y, **options)


@pytest.mark.parametrize(
    "layer", [nn.RReLU(), nn.FeatureAlphaDropout(), nn.BatchNorm1d(64), StochasticDepth(0.5, "row")]
)
def test_any_layer_that_changes_in_training_mode_is_refused(layer):
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"1 \(\w+\) is in training mode"):
        attacks.fgsm(model, GOOD_X, GOOD_Y, eps=EPS)
    layer.eval()  # the rest does the same in both modes
    assert len(attacks.fgsm(model, GOOD_X, GOOD_Y, eps=EPS).success) == 2


def test_rounding_just_outside_the_range_is_tolerated(trained):
    x = GOOD_X.clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -3e-8, 1 + 1e-7
    assert attacks.fgsm(trained[0], x, GOOD_Y, eps=EPS).x_adv.min() >= 0


def test_an_l2_change_stays_in_the_ball_and_in_the_range():
    x = torch.full((1, 1, 2, 2), 0.9)
    inside = base.project(x + 10, x, 0.5, "l2")
    assert float(inside.max()) == 1 and float(base.size(inside - x, "l2")[0]) <= 0.5 + 1e-6
