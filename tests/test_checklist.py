"""The check list: a sound evaluation passes, and every check fails on a model or rows made to fail it."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from dlia_utils.attacks import checklist as lists
from dlia_utils.attacks import evaluate
from dlia_utils.attacks.checklist import checklist
from dlia_utils.units import pixel_eps, pixel_text

GRID = pixel_eps(2, 8, 16)
STEPS = {"apgd_ce": 15, "apgd_margin": 15, "fmn": 20, "square": 40}
SHORT = {name: {"steps": steps} for name, steps in STEPS.items()}
SMALL = {"square": {"steps": 25}}


@pytest.fixture(scope="module")
def sound():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 2)]
    model = nn.Sequential(*layers).eval()
    x = torch.rand(40, 1, 8, 8)
    model[-1].bias.data -= model(x).mean(0).detach()  # both classes, near the boundary
    y = model(x).argmax(1)
    y[:3] = 1 - y[:3]  # clean errors
    return model, x, y


@pytest.fixture(scope="module")
def evaluation(sound):
    model, x, y = sound
    return evaluate.robust(model, (x, y), GRID, budgets=SHORT, early_drop=False, progress=False)


def evaluated(model, x, y, **options):
    """The check list of an evaluation of this model, by check."""
    options = {
        "attacks": ("noise", "fgsm", "pgd_ce", "pgd_margin", "square"),
        "budgets": SMALL,
        **options,
    }
    found = evaluate.robust(model, (x, y), GRID, progress=False, **options)
    return checklist(model, x, y, found, subset=20).set_index("check")


def test_a_sound_evaluation_passes_every_check(sound, evaluation):
    table = evaluation.report()
    assert table.columns.tolist() == lists.COLUMNS and len(table) == 14
    assert table.verdict.eq("PASS").all(), table.to_string()
    assert "Check list: 14 PASS, 0 WARN" in evaluation.text()


def test_a_dropped_evaluation_is_checked_on_a_sample_in_full(sound):
    table = evaluated(*sound)
    assert table.verdict.eq("PASS").all(), table.to_string()
    assert "in full on 20 images" in table.value["PGD fools at least what FGSM fools"]


def test_the_model_is_left_as_it_was(sound, evaluation):
    model, x, y = sound
    before = copy.deepcopy(model.state_dict())
    checklist(model, x, y, evaluation)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ models made to fail


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_saturated_logits(sound):
    model, x, y = sound
    table = evaluated(nn.Sequential(model, Scale(1e6)).eval(), x, y)
    zero = table.loc["no input gradient is exactly zero"]
    assert zero.verdict == "WARN" and "margin 0.0%" in zero.value and "saturated" in zero.why
    assert table.verdict["cross-entropy finds what the margin loss finds (no masking)"] == "WARN"
    assert table.verdict["white box beats black box"] == "PASS"  # the margin loss saw it all


class Stairs(nn.Module):
    """Answers in steps: the gradient is zero everywhere."""

    def forward(self, x):
        return (x * 16).round() / 16


@pytest.mark.parametrize("early_drop", [True, False])
def test_stairs_without_gradients(sound, early_drop):
    inner, x, _ = sound
    model = nn.Sequential(Stairs(), inner).eval()
    table = evaluated(model, x, model(x).argmax(1), early_drop=early_drop)
    black = table.loc["white box beats black box"]
    assert black.verdict == "WARN" and "by square at" in black.value and "masked" in black.why
    assert "Not even the margin" in table.why["no input gradient is exactly zero"]


class Noisy(nn.Module):
    def forward(self, logits):
        return logits + 0.05 * torch.randn_like(logits)


def test_a_random_model(sound):
    model, x, y = sound
    table = evaluated(nn.Sequential(model, Noisy()).eval(), x, y, fast=False)
    random = table.loc["the model answers alike each time"]
    assert random.verdict == "WARN" and "eot" in random.why
    averaged = evaluate.robust(
        nn.Sequential(model, Noisy()).eval(),
        (x[:9], y[:9]),
        GRID[:1],
        attacks=("fgsm",),
        eot=10,
        progress=False,
    )
    assert lists._random(averaged.model, averaged.images, averaged.call)[1] == "PASS"


class Constant(nn.Module):
    def forward(self, x):
        return torch.stack([x.flatten(1).sum(1) * 0 + value for value in (0.0, 1.0)], 1)


def test_a_constant_model(sound):
    _, x, _ = sound
    y = torch.arange(40) % 3 % 2
    table = evaluated(Constant().eval(), x, y)
    assert table.verdict["a large eps fools every image"] == "WARN"
    assert table.verdict["clean accuracy above always answering the largest class"] == "WARN"
    assert table.verdict["a larger eps fools more"] == "WARN"


def test_attacks_that_stop_too_early(sound):
    model, x, y = sound
    weak = {"pgd_margin": {"steps": 4, "step_size": 1 / 255, "random_start": False}}
    table = evaluated(model, x, y, attacks=("pgd_margin",), budgets=weak)
    assert table.verdict["twice the steps add nothing"] == "WARN"
    assert "no black-box" in table.value["white box beats black box"]
    assert table.verdict["white box beats black box"] == "WARN"


def test_another_range_of_pixels(sound):
    inner, x, y = sound
    check = "the model wants pixels in [0,1], and the images fill them"
    bytes_model = nn.Sequential(Scale(1 / 255), inner).eval()
    wanting = evaluated(bytes_model, x, y).loc[check]
    assert wanting.verdict == "WARN" and "[0,255]" in wanting.value
    dark = nn.Sequential(Scale(255.0), inner).eval()
    assert evaluated(dark, x / 255, y).verdict[check] == "WARN"


class Strict(nn.Module):
    """Refuses what is not in [0,1], as the robust models of the suite do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if x.min() < 0 or x.max() > 1:
            raise ValueError("images must lie in [0, 1]")
        return self.model(x)


def test_a_model_that_refuses_another_range_passes(sound):
    model, x, y = sound
    table = evaluated(Strict(model).eval(), x, y)
    line = table.loc["the model wants pixels in [0,1], and the images fill them"]
    assert line.verdict == "PASS" and "0.0% in" in line.value


# ------------------------------------------------------------------ rows made to fail


def changed(rows, where, fooled):
    return rows.assign(fooled=rows.fooled.where(~where, fooled))


def test_rows_that_cannot_be_right(sound, evaluation):
    model, x, y = sound
    rows = evaluation.rows
    options = dict(budgets=SHORT, subset=10)
    fine = checklist(model, x, y, rows, **options).set_index("check").verdict
    assert (
        fine["threat model stated"] == "WARN" and fine.drop("threat model stated").eq("PASS").all()
    )

    blind = ~rows.attack.isin(["clean", "worst", "noise", "fgsm", "square"]) & (rows.image >= 3)
    weak = changed(rows, blind & (rows.eps > GRID[0]), False)
    more_noise = changed(weak, weak.attack.eq("noise") & (weak.image > 30), True)
    verdict = checklist(model, x, y, more_noise, **options).set_index("check").verdict
    for check in (
        "PGD fools at least what FGSM fools",
        "random noise is weaker than PGD",
        "a larger eps never fools fewer",
        "white box beats black box",
    ):
        assert verdict[check] == "WARN", check

    middle = rows[rows.attack.eq("worst") & rows.eps.eq(GRID[1])].fooled.to_numpy()
    flat = rows.copy()
    flat.loc[rows.attack.eq("worst") & rows.eps.eq(GRID[2]), "fooled"] = middle
    verdict = checklist(model, x, y, flat, **options).set_index("check").verdict
    assert verdict["a larger eps fools more"] == "WARN"
    assert verdict["the worst case is taken per image"] == "WARN"


def test_rows_with_gaps_or_of_other_images_are_refused(sound, evaluation):
    model, x, y = sound
    dropped = evaluate.robust(model, (x, y), GRID, attacks=("fgsm", "pgd_ce"), progress=False).rows
    for call in (evaluate.row_checks, lambda rows: checklist(model, x, y, rows)):
        with pytest.raises(ValueError, match="early_drop=False"):
            call(dropped)
    with pytest.raises(ValueError, match="same ids"):
        checklist(model, x[:9], y[:9], evaluation.rows)
    with pytest.raises(TypeError, match="give them to robust"):
        checklist(model, x, y, evaluation, steps=3)


def test_a_model_that_is_always_wrong_gets_its_page(sound):
    model, x, y = sound
    found = evaluate.robust(model, (x, 1 - model(x).argmax(1)), GRID[:1], progress=False)
    lines = found.report().set_index("check").verdict
    assert (
        len(lines) == 3
        and lines["clean accuracy above always answering the largest class"] == "WARN"
    )
    assert "Check list" in found.text()


def test_a_black_box_that_found_nothing_standing_was_run(sound):
    model, x, y = sound
    found = evaluate.robust(model, (x, y), [1.0], progress=False)
    assert not found.rows.attack.eq("square").any()
    assert found.report().set_index("check").verdict["white box beats black box"] == "PASS"


def test_a_mask_leaves_out_the_ball_that_fools_all(sound):
    model, x, y = sound
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    assert "a large eps fools every image" not in evaluated(model, x, y, mask=mask).index


def test_the_worst_case_of_the_best_attack_is_not_the_worst_case():
    outcomes = {"pgd_ce": [1, 0, 0], "square": [0, 1, 0], "worst": [1, 0, 0]}
    rows = pd.DataFrame(
        [
            {"attack": name, "eps": 0.1, "image": image, "fooled": bool(value)}
            for name, values in outcomes.items()
            for image, value in enumerate(values)
        ]
    )
    line = lists._per_image(rows, pixel_text)
    assert line[1] == "WARN" and line[3].startswith("1 outcomes")
    union = changed(rows, rows.attack.eq("worst") & rows.image.eq(1), True)
    assert lists._per_image(union, pixel_text)[1] == "PASS"
