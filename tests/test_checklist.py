"""The check list: a sound evaluation passes, and every check fails where it is made to fail."""

import copy
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dlia_utils.attacks import checklist, evaluate
from dlia_utils.models import robust
from dlia_utils.units import pixel_eps, pixel_text

GRID = pixel_eps(2, 8, 16)
STEPS = {"apgd_ce": 15, "apgd_margin": 15, "fmn": 20, "square": 40}
SHORT = {name: {"steps": steps} for name, steps in STEPS.items()}
RANGE = "the model wants pixels in [0,1], and the images fill them"


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
    model, *data = sound
    return evaluate.robust(model, data, GRID, budgets=SHORT, progress=False)


def evaluated(model, x, y, **options):
    """The check list of an evaluation of this model, by check."""
    names = ("noise", "fgsm", "pgd_ce", "pgd_margin", "square")
    options = {"attacks": names, "budgets": {"square": {"steps": 25}}} | options
    found = evaluate.robust(model.eval(), (x, y), GRID, progress=False, **options)
    return checklist.report(found, subset=20).set_index("check")


def test_a_sound_evaluation_passes_every_check(sound, evaluation):
    before = copy.deepcopy(sound[0].state_dict())
    table = checklist.report(evaluation)
    assert table.columns.tolist() == "check verdict value why".split() and len(table) == 14
    assert table.verdict.eq("PASS").all(), table.to_string()
    page = " ".join(checklist.page(evaluation, table).split())
    assert "Check list: 14 PASS, 0 WARN" in page and "by image (no patients given)" in page
    assert "16/255" in page and "pgd_margin (steps 10, restarts 1)" in page
    assert "Check list" not in checklist.page(evaluation)
    model = sound[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_attacks_run_at_some_eps_only(sound):
    model, *data = sound
    at = {"pgd_ce": [GRID[0]], "pgd_margin": GRID[1:], "fgsm": [GRID[1]]}
    options = dict(attacks=["noise", *at], at=at, progress=False)
    found = evaluate.robust(model, data, GRID, **options)
    table = checklist.report(found).set_index("check")
    assert not table.index.str.contains("margin loss").any(), "they meet at no eps"
    assert "8/255" in table.value["PGD fools at least what FGSM fools"]
    assert f"only at {pixel_text(GRID[0])}" in " ".join(checklist.page(found).split())
    at = {"pgd_ce": GRID[1:]}
    found = evaluate.robust(model, data, GRID, **options | {"attacks": ["pgd_ce"], "at": at})
    doubled = checklist.report(found).set_index("check").value["twice the steps add nothing"]
    assert any(pixel_text(eps) in doubled for eps in GRID[1:]), "not where pgd_ce was not run"


# ---------------------------------------- models made to fail


class Maps(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_saturated_logits(sound):
    model, x, y = sound
    table = evaluated(nn.Sequential(model, Maps(lambda z: 1e6 * z)), x, y)
    zero = table.loc["no input gradient is exactly zero"]
    assert zero.verdict == "WARN" and "margin 0.0%" in zero.value
    assert table.verdict["cross-entropy finds what the margin loss finds (no masking)"] == "WARN"
    assert table.verdict["white box beats black box"] == "PASS"  # the margin loss saw it all


def test_stairs_without_gradients(sound):
    inner, x, _ = sound
    model = nn.Sequential(Maps(lambda x: (x * 16).round() / 16), inner)
    table = evaluated(model, x, model(x).argmax(1))
    black = table.loc["white box beats black box"]
    assert black.verdict == "WARN" and "by square at" in black.value
    assert table.verdict["no input gradient is exactly zero"] == "WARN"


def test_an_operator_that_hides_its_gradient(sound):
    inner, x, _ = sound
    operator = robust.MeanSparse(1)
    operator.running_mean.fill_(0.5), operator.threshold.fill_(0.1)
    model = nn.Sequential(operator, inner).eval()
    options = dict(attacks=["pgd_margin"], progress=False)
    found = evaluate.robust(model, (x, model(x).argmax(1)), GRID, **options)
    check = "exact gradients find what pgd_margin_bpda finds (no masking)"
    exact, through = (found.rows.attack.eq(name) for name in ("pgd_margin", "pgd_margin_bpda"))
    for fooled, verdict in ((found.rows[through].fooled.to_numpy(), "PASS"), (False, "WARN")):
        found.rows.loc[exact, "fooled"] = fooled
        assert checklist.report(found, subset=9).set_index("check").verdict[check] == verdict


def test_a_random_model(sound):
    model, x, y = sound
    check = "the model answers alike each time, alone and in company"

    def noisy(size):
        return nn.Sequential(model, Maps(lambda z: z + size * torch.randn_like(z)))

    assert evaluated(noisy(2e-4), x, y, fast=False).verdict[check] == "WARN"
    with pytest.raises(ValueError, match="differently each time"):
        evaluated(noisy(0.05), x, y)


def test_a_constant_model(sound):
    x, y = sound[1], torch.arange(40) % 3 % 2
    constant = Maps(lambda x: torch.stack([0 * x.flatten(1).sum(1) + k for k in (0.0, 1.0)], 1))
    table = evaluated(constant, x, y)
    assert table.verdict["a large eps fools every image"] == "WARN"
    assert table.verdict["clean accuracy above always answering the largest class"] == "WARN"
    assert table.verdict["a larger eps fools more"] == "WARN"


def test_without_a_black_box_masking_cannot_be_seen(sound):
    table = evaluated(*sound, attacks=("pgd_margin",), budgets={})
    assert "no black-box" in table.value["white box beats black box"]
    assert table.verdict["white box beats black box"] == "WARN"


def test_another_range_of_pixels(sound):
    inner, x, y = sound
    wanting = evaluated(nn.Sequential(Maps(lambda x: x / 255), inner), x, y).loc[RANGE]
    assert wanting.verdict == "WARN" and "[0,255]" in wanting.value
    dark = nn.Sequential(Maps(lambda x: 255 * x), inner)
    assert evaluated(dark, x / 255, y).verdict[RANGE] == "WARN"


def strict(evaluation, error):
    """The check list of a model that fails on pixels above 1."""

    def answer(x):
        if x.max() > 1:
            raise error
        return evaluation.model(x)

    found = replace(evaluation, model=Maps(answer).eval())
    return checklist.report(found, subset=20).set_index("check")


@pytest.mark.parametrize("error", [ValueError("in [0, 1]!"), RuntimeError("bad range")])
def test_a_model_that_refuses_another_range_passes(evaluation, error):
    assert strict(evaluation, error).verdict[RANGE] == "PASS"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), KeyError("a bug")])
def test_a_machine_that_fails_is_no_answer(evaluation, error):
    with pytest.raises(type(error)):
        strict(evaluation, error)


# ---------------------------------------- rows made to fail


def test_rows_that_cannot_be_right(evaluation):
    def verdicts(rows):
        found = replace(evaluation, rows=rows)
        return checklist.report(found, subset=10).set_index("check").verdict

    def changed(rows, where, fooled):
        return rows.assign(fooled=rows.fooled.where(~where, fooled))

    rows = evaluation.rows
    blind = ~rows.attack.isin(["clean", "worst", "noise", "fgsm", "square"]) & (rows.image >= 3)
    weak = changed(rows, blind & (rows.eps > GRID[0]), False)
    more_noise = changed(weak, weak.attack.eq("noise") & (weak.image > 30), True)
    verdict = verdicts(more_noise)
    checks = ["PGD fools at least what FGSM fools", "random noise is weaker than PGD"]
    checks += ["a larger eps never fools fewer", "white box beats black box"]
    assert verdict[checks].eq("WARN").all()
    flat = rows.copy()
    worst = [rows.attack.eq("worst") & rows.eps.eq(eps) for eps in GRID]
    flat.loc[worst[2], "fooled"] = rows[worst[1]].fooled.to_numpy()
    verdict = verdicts(flat)
    assert verdict["a larger eps fools more"] == "WARN"
    assert verdict["the worst case is taken per image"] == "WARN"
    early = changed(changed(rows, worst[2], True), (worst[0] | worst[1]) & (rows.image >= 3), False)
    assert verdicts(early)["twice the steps add nothing"] == "WARN"


@pytest.mark.parametrize(
    ("attacked", "fell", "verdict"), [(100, 0, "PASS"), (24, 0, "WARN"), (100, 3, "WARN")]
)
def test_twice_the_steps_are_judged_by_what_they_may_miss(attacked, fell, verdict, monkeypatch):
    """300 of 500 images stand; the nearest are attacked anew, and the interval's end is judged."""
    nearest = np.r_[np.zeros(200), np.linspace(1, 0.5, 300)]
    seen = []

    class Stub:
        settings = dict(attacks={"pgd_margin": {"steps": 10}}, at={}, eps_grid=[0.1])
        labels = torch.zeros(500, dtype=torch.int64)

        def __init__(self, count=0):
            self.nearest, self.count = nearest, count

        def fooled(self, attack, eps):
            return np.arange(self.count) < fell if self.count else nearest == 0

    def again(found, some, grid, budgets):
        seen.append((some, budgets))
        return Stub(len(some))

    monkeypatch.setattr(checklist, "_again", again)
    monkeypatch.setattr(checklist, "LEAST", attacked)
    key, passed, value = checklist._converged(Stub(), pd.Series([0.4], [0.1]), 4)
    (some, budgets) = seen[0]
    assert some.tolist() == list(range(500 - attacked, 500)), "the nearest"
    assert budgets == {"pgd_margin": {"steps": 20}} and checklist.CHECKS[key]
    assert passed == (verdict == "PASS") and f"{fell} of the nearest {attacked} of 300" in value


def test_all_that_stand_are_attacked_where_they_are_few(evaluation):
    doubled = (
        checklist.report(evaluation, subset=1)
        .set_index("check")
        .value["twice the steps add nothing"]
    )
    assert int(re.search(r"of all (\d+) images", doubled)[1]) > 5


def test_a_model_that_is_always_wrong_gets_its_page(sound):
    model, x, _ = sound
    found = evaluate.robust(model, (x, 1 - model(x).argmax(1)), GRID[:1], progress=False)
    table = checklist.report(found)
    assert len(table) == 3 and table.verdict[1] == "WARN"
    assert "Check list" in checklist.page(found, table)
