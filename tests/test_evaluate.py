"""Robustness tables: one row per attack, eps and image; the worst case; checks that really fail."""

import logging
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from torch import nn

from dlia_utils.attacks import evaluate, fgsm, pgd
from dlia_utils.models import robust

GRID = evaluate.pixel_eps(2, 8, 16)


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    ).eval()
    x = torch.rand(40, 1, 8, 8)
    model[-1].bias.data -= model(x).mean(0).detach()  # both classes, near the boundary
    y = model(x).argmax(1)
    y[:3] = 1 - y[:3]  # clean errors
    return model, x, y


@pytest.fixture(scope="module")
def rows(study):
    return evaluate.robustness(*study, eps_grid=GRID, batch_size=16, progress=False)


def test_one_row_per_attack_eps_and_image(rows):
    assert list(rows.columns) == evaluate.COLUMNS
    assert len(rows) == 40 * (1 + 5 * len(GRID))
    assert not rows.duplicated(["attack", "eps", "image"]).any()
    assert ((rows.first_success_step >= 0) == rows.fooled).all()


def test_clean_errors_count_as_fooled_everywhere(rows):
    assert rows[rows.image < 3].fooled.all()
    assert rows[rows.attack == "clean"].fooled.sum() == 3


def test_worst_is_the_union_up_to_eps(rows):
    single = rows[~rows.attack.isin(["clean", "worst"])]
    worst = rows[rows.attack == "worst"].set_index(["eps", "image"]).fooled
    for (eps, image), fooled in worst.items():
        assert fooled == single[(single.eps <= eps) & (single.image == image)].fooled.any()
    shares = worst.groupby("eps").mean()
    assert shares.is_monotonic_increasing and 0.1 < shares.iloc[0] < shares.iloc[-1]


def test_batches_ids_and_the_copy_do_not_change_the_answer(study, rows):
    model, x, y = study
    plain = evaluate.robustness(model, x, y, eps_grid=GRID, batch_size=7, progress=False, fast=False)
    keys = ["attack", "eps", "image"]
    merged = rows.merge(plain, on=keys)
    assert len(merged) == len(rows) and (merged.fooled_x == merged.fooled_y).mean() > 0.99
    some = torch.arange(5, 12)
    part = evaluate.robustness(model, x[some], y[some], eps_grid=GRID, ids=some, progress=False, fast=False)
    merged = plain.merge(part, on=keys)
    assert len(merged) == len(part) and (merged.fooled_x == merged.fooled_y).all()


def test_images_that_fool_only_the_copy_are_attacked_again(study, monkeypatch, caplog):
    model, x, y = study
    flipped = nn.Sequential(model, Flip()).eval()  # a copy that is wrong about everything
    monkeypatch.setattr(evaluate, "fast_copy", lambda model: flipped)
    with caplog.at_level(logging.INFO, logger="dlia_utils"):
        found = evaluate.robustness(model, x, y, eps_grid=GRID[-1:], attacks=("pgd_margin",), progress=False)
    direct = pgd(model, x, y, eps=GRID[-1], loss="margin")
    assert found[found.attack == "pgd_margin"].fooled.tolist() == direct.success.tolist()
    assert "37 times" in caplog.text


class Flip(nn.Module):
    def forward(self, logits):
        return logits.flip(1)


def test_accuracy_table(rows):
    table = evaluate.accuracy_table(rows)
    assert table.index.tolist() == ["clean", *evaluate.ATTACKS, "worst"]
    assert table.loc["clean", 0.0] == pytest.approx(37 / 40)
    assert (table.loc["worst"].dropna() <= table.loc["pgd_ce"].dropna()).all()


def test_zero_gradient_share(study):
    model, x, y = study
    x, y = x[3:], y[3:]
    assert evaluate.zero_gradient_share(model, x, y, batch_size=10) == 0
    saturated = nn.Sequential(model, Scale()).eval()
    assert evaluate.zero_gradient_share(saturated, x, y) > 0.9
    assert evaluate.zero_gradient_share(saturated, x, y, loss="margin") == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Scale(nn.Module):
    def forward(self, logits):
        return logits * 1e6


def test_sanity_passes_on_a_sound_model(rows):
    table = evaluate.sanity(rows, 0.0)
    assert len(table) == 5 and table.passed.all(), table.to_string()


def test_sanity_flags_masked_gradients(study):
    model, x, y = study
    saturated = nn.Sequential(model, Scale()).eval()
    rows = evaluate.robustness(saturated, x, y, eps_grid=GRID, progress=False)
    table = evaluate.sanity(rows, evaluate.zero_gradient_share(saturated, x, y)).set_index("check").passed
    assert not table["cross-entropy finds what the margin loss finds (no masking)"]
    assert not table["no input gradient is exactly zero"]


def test_sanity_flags_weak_attacks():
    outcomes = {"noise": [3, 2], "fgsm": [2, 1], "pgd_ce": [1, 1]}
    rows = [
        {"attack": name, "eps": eps, "image": i, "fooled": i < count}
        for name, counts in outcomes.items()
        for eps, count in zip((0.1, 0.2), counts, strict=True)
        for i in range(4)
    ]
    assert not evaluate.sanity(pd.DataFrame(rows)).passed.any()


# ------------------------------------------------------------------ through operators that hide gradients


@pytest.fixture(scope="module")
def sparse():
    """A net with dead zones so wide that the two gradients lead to different images."""
    torch.manual_seed(0)
    operator = robust.MeanSparse(4)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), operator, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    x = torch.rand(12, 1, 8, 8)
    features = model[0](x).detach()
    operator.running_mean.copy_(features.mean((0, 2, 3)))
    operator.running_var.copy_(features.var((0, 2, 3)))
    robust.set_alpha(model, 1.6)
    model[-1].bias.data -= model(x).mean(0).detach()  # both classes, near the boundary
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("fast", [True, False])
def test_a_model_with_the_operator_is_attacked_twice_without_being_asked(sparse, fast):
    model, x, y = sparse
    options = dict(eps_grid=GRID, batch_size=5, progress=False, fast=fast)
    rows = evaluate.robustness(model, x, y, **options)
    names = ["clean", *evaluate.ATTACKS, "pgd_ce_bpda", "pgd_margin_bpda", "worst"]
    assert rows.attack.unique().tolist() == names and len(rows) == 12 * (1 + 7 * len(GRID))
    assert not model[1].straight_through
    outcomes = rows[rows.eps == GRID[1]].groupby("attack").fooled.agg(tuple)
    assert outcomes["pgd_margin"] != outcomes["pgd_margin_bpda"]
    # Every number is that of the attack itself, exact or through the operator, judged on the real model.
    for loss in ("ce", "margin"):
        for suffix in ("", evaluate.BPDA):
            found = rows[(rows.attack == f"pgd_{loss}{suffix}") & (rows.eps == GRID[1])].fooled.tolist()
            if suffix:
                with robust.straight_through(model):
                    direct = pgd(model, x, y, eps=GRID[1], loss=loss)
            else:
                direct = pgd(model, x, y, eps=GRID[1], loss=loss)
            assert (model(direct.x_adv).argmax(1) != y).tolist() == found
    single = rows[~rows.attack.isin(["clean", "worst"])]
    for (eps, image), fooled in rows[rows.attack == "worst"].set_index(["eps", "image"]).fooled.items():
        assert fooled == single[(single.eps <= eps) & (single.image == image)].fooled.any()


def test_without_dead_zones_the_operator_changes_nothing(sparse):
    model, x, y = sparse
    plain = nn.Sequential(*(m for m in model if not isinstance(m, robust.MeanSparse))).eval()
    robust.set_alpha(model, 0.0)
    try:
        options = dict(eps_grid=GRID[:1], progress=False, fast=False)
        rows = [evaluate.robustness(net, x, plain(x).argmax(1), **options) for net in (model, plain)]
    finally:
        robust.set_alpha(model, 1.6)
    pd.testing.assert_frame_equal(*rows)


class Rounded(nn.Module):
    """Rounds to 16 levels, with a gradient that is zero or, while `through` is on, one."""

    through = False

    def forward(self, x):
        y = (x * 16).round() / 16
        return y.detach() + (x - x.detach()) if self.through else y


@contextmanager
def through_rounding(model):
    model[0].through = True
    try:
        yield
    finally:
        model[0].through = False


@pytest.mark.parametrize("fast", [True, False])
def test_a_given_context_finds_what_exact_gradients_cannot(study, fast):
    inner, x, _ = study
    model = nn.Sequential(Rounded(), inner).eval()
    y = model(x).argmax(1)
    options = dict(eps_grid=GRID, progress=False, fast=fast)
    rows = evaluate.robustness(model, x, y, bpda=through_rounding, **options)
    table = evaluate.accuracy_table(rows)
    assert table.loc["pgd_margin_bpda", GRID[-1]] < table.loc["pgd_margin", GRID[-1]] - 0.2
    assert (table.loc["worst"].dropna() <= table.loc["pgd_margin_bpda"].dropna()).all()
    checks = evaluate.sanity(rows, evaluate.zero_gradient_share(model, x, y)).set_index("check").passed
    assert not checks["exact gradients find what pgd_margin_bpda finds (no masking)"]
    assert not checks["no input gradient is exactly zero"]
    assert checks["PGD fools at least what FGSM fools"]
    without = evaluate.robustness(model, x, y, **options)
    assert not without.attack.str.endswith(evaluate.BPDA).any()
    assert model[0].through is False
    shared = rows[rows.attack.isin(["clean", *evaluate.ATTACKS])].reset_index(drop=True)
    pd.testing.assert_frame_equal(shared, without[without.attack != "worst"])


def test_an_operator_that_hides_nothing_passes_the_check(study):
    inner, x, y = study
    model = nn.Sequential(nn.Identity(), inner).eval()

    @contextmanager
    def nothing(_model):
        yield

    rows = evaluate.robustness(model, x, y, eps_grid=GRID, progress=False, bpda=nothing)
    table = evaluate.sanity(rows, 0.0)
    assert len(table) == 7 and table.passed.all(), table.to_string()


def test_bad_arguments_are_refused(study):
    model, x, y = study
    for bad in ({"eps_grid": []}, {"eps_grid": [0.1], "attacks": ("apgd",)}, {"eps_grid": [8]}):
        with pytest.raises(ValueError, match="eps"):
            evaluate.robustness(model, x, y, progress=False, **bad)


def test_fgsm_rows_agree_with_fgsm_itself(study, rows):
    model, x, y = study
    found = rows[(rows.attack == "fgsm") & (rows.eps == GRID[1])].set_index("image").fooled.loc[3:]
    assert found.tolist() == fgsm(model, x[3:], y[3:], eps=GRID[1]).success.tolist()
