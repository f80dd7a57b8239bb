"""The suite and its rows: known truth, the same answer whatever is dropped or resumed, checks that fail."""

import copy
import logging
from contextlib import contextmanager
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from dlia_utils.attacks import bpda, evaluate, fgsm, pgd
from dlia_utils.models import robust
from dlia_utils.units import pixel_eps, pixel_text

GRID = pixel_eps(2, 8, 16)
FEW = ("noise", "fgsm", "pgd_ce", "pgd_margin")


def full_rows(model, x, y, grid=GRID, attacks=FEW, **options):
    """Every attack on every image."""
    return evaluate.robust(
        model, (x, y), grid, attacks=attacks, early_drop=False, progress=False, **options
    ).rows


def passed(rows):
    return {check: good for check, good, _ in evaluate.row_checks(rows).values()}


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 2),
    ).eval()
    x = torch.rand(40, 1, 8, 8)
    model[-1].bias.data -= model(x).mean(0).detach()  # both classes, near the boundary
    y = model(x).argmax(1)
    y[:3] = 1 - y[:3]  # clean errors
    return model, x, y


@pytest.fixture(scope="module")
def rows(study):
    return full_rows(*study, batch_size=16)


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
    plain = full_rows(model, x, y, batch_size=7, fast=False)
    keys = ["attack", "eps", "image"]
    merged = rows.merge(plain, on=keys)
    assert len(merged) == len(rows) and (merged.fooled_x == merged.fooled_y).mean() > 0.99
    some = torch.arange(5, 12)
    part = full_rows(model, x[some], y[some], ids=some, fast=False)
    merged = plain.merge(part, on=keys)
    assert len(merged) == len(part) and (merged.fooled_x == merged.fooled_y).all()


def test_images_that_fool_only_the_copy_are_attacked_again(study, monkeypatch, caplog):
    model, x, y = study
    flipped = FlipsOthers(
        model, x
    ).eval()  # a copy that is wrong about every image that is not one of these
    monkeypatch.setattr(evaluate, "fast_copy", lambda model: flipped)
    with caplog.at_level(logging.INFO, logger="dlia_utils"):
        found = full_rows(model, x, y, GRID[-1:], ("pgd_margin",))
    direct = pgd(model, x, y, eps=GRID[-1], loss="margin")
    assert found[found.attack == "pgd_margin"].fooled.tolist() == direct.success.tolist()
    assert "37 times" in caplog.text


class FlipsOthers(nn.Module):
    def __init__(self, model, known):
        super().__init__()
        self.model, self.known = model, known.flatten(1)

    def forward(self, x):
        logits = self.model(x)
        near = torch.cdist(x.flatten(1), self.known, compute_mode="donot_use_mm_for_euclid_dist")
        far = near.amin(1, keepdim=True) > 1e-3
        return torch.where(far, logits.flip(1), logits)


class Whimsical(nn.Module):
    """Takes one of two ways by a draw: a traced copy always takes the one of the tracing."""

    def __init__(self, model):
        super().__init__()
        self.first, self.second = copy.deepcopy(model), copy.deepcopy(model)
        self.second[-1].bias.data += 0.3

    def forward(self, x):
        return self.first(x) if torch.rand(()) < 0.5 else self.second(x)


def test_a_copy_that_is_another_function_is_not_attacked(study, caplog):
    model, x, y = study
    hooked = copy.deepcopy(model)
    hooked.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * 0.5,)
    )  # a copy by tracing loses it
    fast, plain = (
        full_rows(hooked, x, y, GRID[:1], ("pgd_margin",), fast=fast) for fast in (True, False)
    )
    pd.testing.assert_frame_equal(fast, plain)
    assert "answers otherwise" in caplog.text
    torch.manual_seed(0)
    assert evaluate._faithful_copy(whim := Whimsical(model).eval(), x[:4]) is whim
    assert evaluate._faithful_copy(model, x[:4]) is not model


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


def test_the_checks_pass_on_a_sound_model(rows):
    checks = passed(rows)
    assert len(checks) == 4 and all(checks.values()), checks


def test_masked_gradients_are_found(study):
    model, x, y = study
    rows = full_rows(nn.Sequential(model, Scale()).eval(), x, y)
    assert not passed(rows)["cross-entropy finds what the margin loss finds (no masking)"]


def test_weak_attacks_are_found():
    outcomes = {"noise": [3, 2], "fgsm": [2, 1], "pgd_ce": [1, 1]}
    rows = [
        {"attack": name, "eps": eps, "image": i, "fooled": i < count}
        for name, counts in outcomes.items()
        for eps, count in zip((0.1, 0.2), counts, strict=True)
        for i in range(4)
    ]
    checks = passed(pd.DataFrame(rows))
    assert len(checks) == 3 and not any(checks.values())


# ------------------------------------------------------------------ through operators that hide gradients


@pytest.fixture(scope="module")
def sparse():
    """A net with dead zones so wide that the two gradients lead to different images."""
    torch.manual_seed(0)
    operator = robust.MeanSparse(4)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), operator, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    ).eval()
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
    rows = full_rows(model, x, y, batch_size=5, fast=fast)
    names = ["clean", *FEW, "pgd_ce_bpda", "pgd_margin_bpda", "worst"]
    assert rows.attack.unique().tolist() == names and len(rows) == 12 * (1 + 7 * len(GRID))
    assert not model[1].straight_through
    outcomes = rows[rows.eps == GRID[1]].groupby("attack").fooled.agg(tuple)
    assert outcomes["pgd_margin"] != outcomes["pgd_margin_bpda"]
    # Every number is that of the attack itself, exact or through the operator, judged on the real model.
    for loss in ("ce", "margin"):
        for suffix in ("", evaluate.BPDA):
            found = rows[
                (rows.attack == f"pgd_{loss}{suffix}") & (rows.eps == GRID[1])
            ].fooled.tolist()
            if suffix:
                with robust.straight_through(model):
                    direct = pgd(model, x, y, eps=GRID[1], loss=loss)
            else:
                direct = pgd(model, x, y, eps=GRID[1], loss=loss)
            assert (model(direct.x_adv).argmax(1) != y).tolist() == found
    single = rows[~rows.attack.isin(["clean", "worst"])]
    for (eps, image), fooled in (
        rows[rows.attack == "worst"].set_index(["eps", "image"]).fooled.items()
    ):
        assert fooled == single[(single.eps <= eps) & (single.image == image)].fooled.any()


def test_without_dead_zones_the_operator_changes_nothing(sparse):
    model, x, y = sparse
    plain = nn.Sequential(*(m for m in model if not isinstance(m, robust.MeanSparse))).eval()
    robust.set_alpha(model, 0.0)
    try:
        rows = [
            full_rows(net, x, plain(x).argmax(1), GRID[:1], fast=False) for net in (model, plain)
        ]
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
    rows = full_rows(model, x, y, bpda=through_rounding, fast=fast)
    fooled = rows.groupby(["attack", "eps"]).fooled.mean()
    assert fooled["pgd_margin_bpda", GRID[-1]] > fooled["pgd_margin", GRID[-1]] + 0.2
    assert (fooled["worst"] >= fooled["pgd_margin_bpda"]).all()
    assert evaluate.zero_gradient_share(model, x, y) > 0
    checks = passed(rows)
    assert not checks["exact gradients find what pgd_margin_bpda finds (no masking)"]
    assert checks["PGD fools at least what FGSM fools"]
    without = full_rows(model, x, y, fast=fast)
    assert not without.attack.str.endswith(evaluate.BPDA).any()
    assert model[0].through is False
    shared = rows[rows.attack.isin(["clean", *FEW])].reset_index(drop=True)
    pd.testing.assert_frame_equal(shared, without[without.attack != "worst"])


@pytest.mark.parametrize("fast", [True, False])
def test_the_hook_of_the_suite_goes_through_an_operator_without_gradient(study, fast):
    inner, x, _ = study
    model = nn.Sequential(Rounded(), inner).eval()
    y = model(x).argmax(1)
    rows = full_rows(
        model, x, y, attacks=["pgd_margin"], bpda=partial(bpda, surrogates={"0": None}), fast=fast
    )
    fooled = rows.groupby(["attack", "eps"]).fooled.mean()
    assert fooled["pgd_margin_bpda", GRID[-1]] > fooled["pgd_margin", GRID[-1]] + 0.2
    assert "bpda(surrogates={'0': None})" in evaluate._name(partial(bpda, surrogates={"0": None}))


def test_an_operator_that_hides_nothing_passes_the_check(study):
    inner, x, y = study
    model = nn.Sequential(nn.Identity(), inner).eval()

    @contextmanager
    def nothing(_model):
        yield

    checks = passed(full_rows(model, x, y, bpda=nothing))
    assert len(checks) == 6 and all(checks.values()), checks


def test_bad_arguments_are_refused(study):
    model, x, y = study
    for bad in ({"eps_grid": []}, {"eps_grid": [0.1], "attacks": ("apgd",)}, {"eps_grid": [8]}):
        with pytest.raises(ValueError, match="eps"):
            evaluate.robust(model, (x, y), progress=False, **bad)


def test_what_cannot_be_run_is_refused_before_the_model_is_asked(study):
    model, x, y = study
    asked = []
    model = nn.Sequential(Rounded(), model).eval()
    model.register_forward_hook(lambda *_: asked.append(1))
    random = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), shuffle=True)
    dicts = [{"x": x, "y": y}]
    for word, bad in {
        "batch_size must be >= 1": {"batch_size": -1},
        "seed >= 0": {"seed": -1},
        "eps must be >= 0": {"eps_grid": [-0.1, 0.1]},
        "must be a sequence": {"eps_grid": 0.1},
        "area": {"budgets": {"square": {"area": 2.0}}},
        "steps": {"budgets": {"square": {"steps": 0}}},
        "loss must be one of": {"budgets": {"apgd_ce": {"loss": "dlr"}}},
        "training mode": {
            "surrogate": nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
        },
        "single logit": {"surrogate": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))},
        "shuffle=False": {"data": random, "groups": range(40)},
        "yields dicts": {"data": dicts},
    }.items():
        with pytest.raises(ValueError, match=word):
            evaluate.robust(model, progress=False, **{"data": (x, y), "eps_grid": GRID[:1]} | bad)
    assert not asked


def test_fgsm_rows_agree_with_fgsm_itself(study, rows):
    model, x, y = study
    found = rows[(rows.attack == "fgsm") & (rows.eps == GRID[1])].set_index("image").fooled.loc[3:]
    assert found.tolist() == fgsm(model, x[3:], y[3:], eps=GRID[1]).success.tolist()


# ------------------------------------------------------------------ the suite: known truth

STEPS = {"apgd_ce": 8, "apgd_margin": 12, "fmn": 20, "square": 25}
SHORT = {name: {"steps": steps} for name, steps in STEPS.items()}


def linear(channels=1, n=14):
    """A linear model of two classes, images well inside [0,1], and the weights' difference seen by each."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 2)).double().eval()
    x = (
        (0.4 + 0.2 * torch.rand(n, 1, 4, 4, dtype=torch.float64))
        .expand(n, channels, 4, 4)
        .contiguous()
    )
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        logits = model(x)
    y = logits.argmax(1)
    towards = (model[1].weight[1 - y] - model[1].weight[y]).detach().view_as(x)
    return model, x, y, towards, (logits.amax(1) - logits.amin(1)).detach()


def between(distance, *places):
    """eps half way between two neighbours of the sorted distances, which lie some per cent apart."""
    ordered = distance.sort().values
    chosen = [k for k in range(1, len(ordered)) if ordered[k] > 1.05 * ordered[k - 1]]
    return [float(ordered[chosen[p] - 1 : chosen[p] + 1].mean()) for p in places]


@pytest.mark.parametrize("early_drop", [True, False])
@pytest.mark.parametrize("case", ["linf", "l2", "grey", "mask"])
def test_the_worst_case_of_a_linear_model_is_its_closed_form(case, early_drop):
    model, x, y, towards, gap = linear(channels=3 if case == "grey" else 1)
    options = {"norm": "l2"} if case == "l2" else {}
    if case == "grey":  # all channels move alike
        towards, options = towards.sum(1, keepdim=True), {"grey": True}
    if case == "mask":
        mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        mask[..., :2] = True
        towards, options = towards * mask, {"mask": mask}
    flat = towards.flatten(1)
    distance = gap / (flat.norm(dim=1) if case == "l2" else flat.abs().sum(1))
    grid = between(distance, 1, 4, -2)
    found = evaluate.robust(
        model,
        (x, y),
        grid,
        early_drop=early_drop,
        budgets=SHORT,
        steps=20,
        progress=False,
        **options,
    )
    for eps in grid:
        worst = found.rows[(found.rows.attack == "worst") & (found.rows.eps == eps)]
        assert worst.fooled.tolist() == (distance <= eps).tolist()
    searched = found.distances[found.distances.attack == "fmn"].set_index("image").distance
    assert len(searched) and (searched >= distance[searched.index].numpy() - 1e-12).all()
    assert (searched <= 1.03 * distance[searched.index].numpy()).all()


@pytest.fixture(scope="module")
def both(study):
    model, *data = study
    options = dict(budgets=SHORT, batch_size=16, progress=False)
    return {
        drop: evaluate.robust(model, data, GRID, early_drop=drop, **options)
        for drop in (True, False)
    }


def fooled_sets(found):
    worst = found.rows[(found.rows.attack == "worst") & found.rows.fooled]
    return {eps: set(part.image) for eps, part in worst.groupby("eps")}


def test_dropping_changes_the_cost_and_not_the_answer(both):
    assert fooled_sets(both[True]) == fooled_sets(both[False])
    passes = {drop: found.cost.groupby("eps").forwards.sum() for drop, found in both.items()}
    assert passes[True].sum() < 0.75 * passes[False].sum()
    assert passes[True].iloc[-1] < 0.45 * passes[False].iloc[-1]  # most images have fallen by then
    shares = both[True].table().set_index("eps").worst
    assert shares.is_monotonic_decreasing and shares.iloc[0] < 37 / 40 and shares.iloc[-1] < 0.5


def test_dropped_rows_are_only_of_images_that_still_stood(both, study):
    rows, gone = both[True].rows, set(range(3))  # the clean errors
    cost = both[True].cost.iloc[1:]
    for line in cost.itertuples():
        own = rows[(rows.attack == line.attack) & (rows.eps == line.eps)]
        assert not gone & set(own.image) and len(own) == line.attacked == 40 - len(gone)
        gone |= set(own.image[own.fooled])
        assert own.fooled.sum() == line.fooled
    assert (rows[rows.attack == "worst"].groupby("eps").size() == 40).all()
    counts = both[True].first_fooled()
    assert (counts.sum(axis=1) == 40).all() and (counts["clean"] == 3).all()
    assert counts["none"].tolist() == [40 - len(part) for part in fooled_sets(both[True]).values()]


def test_more_attacks_change_nothing_in_the_rows_of_the_others(both, rows):
    mine = both[False].rows
    mine = mine[mine.attack.isin(["clean", *FEW])].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, rows[rows.attack != "worst"].reset_index(drop=True))


def test_smallest_changes_are_searched_once_and_count_at_every_eps(both):
    cost = both[False].cost.set_index(["attack", "eps"])
    for name in ("deepfool", "fmn"):
        assert cost.forwards[name].iloc[0] > 0 and (cost.forwards[name].iloc[1:] == 0).all()
        found = both[False].distances
        distance = found[found.attack == name].set_index("image").distance
        for eps in GRID:
            rows = both[False].rows
            own = rows[(rows.attack == name) & (rows.eps == eps) & (rows.image >= 3)]
            own = own.set_index("image").fooled
            assert own.tolist() == (distance[own.index] <= eps).tolist()


def test_a_dear_attack_at_some_eps_only(both, study):
    model, *data = study
    at = {"square": [GRID[-1]], "pgd_ce": GRID[1:]}
    options = dict(budgets=SHORT, batch_size=16, progress=False)
    for early_drop in (True, False):
        found = evaluate.robust(model, data, GRID, at=at, early_drop=early_drop, **options)
        ran = {name: set(part.eps) for name, part in found.cost.groupby("attack")}
        assert (
            ran["square"] == {GRID[-1]}
            and ran["pgd_ce"] == set(GRID[1:])
            and ran["pgd_margin"] == set(GRID)
        )
        assert found.table().square.isna().iloc[:-1].all()
        assert set(found.cost.attack) == set(both[early_drop].cost.attack)
        assert (
            f"only at {found.balls('square')}" in found.threat()
            and found.balls("fgsm") == found.balls()
        )
    # In full the attacks know nothing of each other: those that ran did what they always do.
    whole, columns = both[False].rows, ["attack", "eps", "image"]
    same = found.rows[found.rows.attack != "worst"].merge(
        whole, on=columns, suffixes=("", "_whole")
    )
    assert len(same) == (found.rows.attack != "worst").sum() and same.fooled.equals(
        same.fooled_whole
    )
    assert found.report().check.is_unique and all(passed(found.rows).values())
    doubled = found.report().set_index("check").value["twice the steps add nothing"]
    assert any(pixel_text(eps) in doubled for eps in GRID[1:]), "not where pgd_ce was not run"


def test_attacks_that_meet_at_no_eps_are_not_compared(study):
    model, *data = study
    at = {"pgd_ce": [GRID[0]], "pgd_margin": [GRID[-1]], "fgsm": [GRID[1]]}
    attacks = ["noise", *at]
    found = evaluate.robust(
        model, data, GRID, attacks=attacks, at=at, early_drop=False, progress=False
    )
    checks = found.report().check.tolist()
    assert not [check for check in checks if "margin loss" in check or "FGSM" in check]
    assert "random noise is weaker than PGD" in checks


@pytest.mark.parametrize("early_drop", [True, False])
def test_the_passes_counted_are_those_made(study, early_drop):
    model, x, y = study
    seen = {"forwards": 0, "backwards": 0}

    def forwards(_module, inputs, _output):
        seen["forwards"] += len(inputs[0])

    def backwards(_module, _inputs, outputs):
        seen["backwards"] += len(outputs[0])

    hooks = [model.register_forward_hook(forwards), model.register_full_backward_hook(backwards)]
    names = [*evaluate.SUITE, "one_pixel"]
    budgets = SHORT | {"one_pixel": {"population": 5, "iterations": 2}}
    options = dict(
        attacks=names, budgets=budgets, fast=False, progress=False, early_drop=early_drop
    )
    try:
        found = evaluate.robust(model, (x[:12], y[:12]), GRID[:2], **options)
    finally:
        for hook in hooks:
            hook.remove()
    assert found.cost[["forwards", "backwards"]].sum().to_dict() == seen


# ------------------------------------------------------------------ the suite: going on, its inputs, its page


def test_a_cut_off_run_goes_on_without_repeated_work(study, tmp_path):
    model, x, y = study[0], study[1][:16], study[2][:16]
    passes = []

    def count(_module, inputs, _output):
        passes.append(len(inputs[0]))
        if sum(passes) > limit:
            raise KeyboardInterrupt

    options = dict(budgets=SHORT, fast=False, progress=False, batch_size=10)
    limit = 10**9
    hook = model.register_forward_hook(count)
    try:
        whole = evaluate.robust(model, (x, y), GRID[:2], **options)
        total, limit = sum(passes), sum(passes) // 2
        passes.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate.robust(model, (x, y), GRID[:2], folder=tmp_path / "kept", **options)
        kept = len(list((tmp_path / "kept").glob("block_*.npz")))
        done = whole.cost.forwards.iloc[:kept].sum()
        limit = 10**9
        passes.clear()
        again = evaluate.robust(model, (x, y), GRID[:2], folder=tmp_path / "kept", **options)
        assert 3 <= kept < len(whole.cost) and sum(passes) == total - done < total
        passes.clear()
        third = evaluate.robust(model, (x, y), GRID[:2], folder=tmp_path / "kept", **options)
        assert not passes
    finally:
        hook.remove()
    for found in (again, third):
        pd.testing.assert_frame_equal(found.rows, whole.rows)
        pd.testing.assert_frame_equal(
            found.cost.drop(columns="seconds"), whole.cost.drop(columns="seconds")
        )
        pd.testing.assert_frame_equal(found.distances, whole.distances)


def test_a_folder_of_something_else_is_refused(study, tmp_path):
    model, x, y = study
    options = dict(attacks=("noise", "pgd_margin"), folder=tmp_path, progress=False)
    evaluate.robust(model, (x, y), GRID[:1], **options)
    other = copy.deepcopy(model)
    other[-1].bias.data += 0.01
    cases = {
        "model": (other, (x, y), GRID[:1], options),
        "eps_grid": (model, (x, y), GRID[:2], options),
        "images": (model, (x.flip(0), y), GRID[:1], options),
        "attacks": (model, (x, y), GRID[:1], options | {"budgets": {"noise": {"draws": 3}}}),
    }
    scaled = nn.Sequential(model, Times(1.0)).eval()
    with_it = options | {"folder": tmp_path / "scaled"}
    evaluate.robust(scaled, (x, y), GRID[:1], bpda=partial(unchanged, by=model), **with_it)
    for name, net, by in (
        ("model", nn.Sequential(model, Times(2.0)).eval(), model),
        ("bpda", scaled, other),
    ):
        with pytest.raises(ValueError, match=rf"something else .*{name}: .*resume=False"):
            evaluate.robust(net, (x, y), GRID[:1], bpda=partial(unchanged, by=by), **with_it)
    for name, (net, data, grid, asked) in cases.items():
        with pytest.raises(ValueError, match=rf"something else \({name}: .*resume=False"):
            evaluate.robust(net, data, grid, **asked)
    anew = evaluate.robust(other, (x, y), GRID[:1], resume=False, **options)
    assert anew.rows.equals(evaluate.robust(other, (x, y), GRID[:1], **options).rows)


class Times(nn.Module):
    """A number that stands in no weight."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, logits):
        return logits * self.by


@contextmanager
def unchanged(_model, by):
    yield


def test_a_dear_attack_is_run_at_more_eps_without_repeated_work(study, tmp_path):
    model, *data = study
    options = dict(attacks=("noise", "pgd_margin"), folder=tmp_path, progress=False)
    few, all_of_it = {"pgd_margin": GRID[1:2]}, {"pgd_margin": GRID[:2]}
    evaluate.robust(model, data, GRID[:2], at=few, early_drop=False, **options)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("block_*.npz")}
    more = evaluate.robust(model, data, GRID[:2], at=all_of_it, early_drop=False, **options)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("block_*.npz")}
    assert before.items() < after.items() and len(after) == len(before) + 1
    anew = evaluate.robust(model, data, GRID[:2], early_drop=False, **options | {"folder": None})
    pd.testing.assert_frame_equal(more.rows, anew.rows)
    # Where fooled images are dropped, what an attack saw depends on those before it.
    options["folder"] = tmp_path / "dropped"
    evaluate.robust(model, data, GRID[:2], at=few, **options)
    with pytest.raises(ValueError, match="something else .at: "):
        evaluate.robust(model, data, GRID[:2], at=all_of_it, **options)


def test_in_full_a_changed_list_of_attacks_runs_only_what_is_new(study, tmp_path):
    model, *data = study
    options = dict(folder=tmp_path, progress=False, early_drop=False)

    def times():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("block_*.npz")}

    evaluate.robust(
        model,
        data,
        GRID[:1],
        attacks=("noise", "pgd_margin", "fmn"),
        budgets={"fmn": {"steps": 5}},
        **options,
    )
    before = times()
    longer = dict(
        attacks=("noise", "pgd_margin", "fmn", "fgsm"),
        budgets={"fmn": {"steps": 5}, "noise": {"draws": 3}},
    )
    found = evaluate.robust(model, data, GRID[:2], **longer, **options)
    after = times()
    kept = {name for name in before if after.get(name) == before[name]}
    assert {name.split("_", 2)[-1] for name in set(before) - kept} == {"noise.npz"}, (
        "its options were changed"
    )
    assert {"block_clean.npz", "block_fmn.npz"} <= kept and len(after) == len(before) + 2 + 1 + 1
    whole = evaluate.robust(model, data, GRID[:2], **longer, **options | {"folder": None})
    pd.testing.assert_frame_equal(found.rows, whole.rows)
    shorter = evaluate.robust(model, data, GRID[:1], attacks=("fgsm",), **options)
    assert times() == after and set(shorter.rows.attack) == {"clean", "fgsm", "worst"}


def test_batches_of_a_loader_give_the_same_rows(study):
    model, x, y = study
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y, torch.arange(40)), batch_size=7
    )
    options = dict(
        attacks=("pgd_margin", "square"), budgets={"square": {"steps": 9}}, progress=False
    )
    tensors, batches = (
        evaluate.robust(model, data, GRID[:2], **options).rows for data in ((x, y), loader)
    )
    pd.testing.assert_frame_equal(tensors, batches)


def test_a_surrogate_and_an_operator_add_their_attacks(study):
    inner, x, _ = study
    model = nn.Sequential(Rounded(), inner).eval()
    y = model(x).argmax(1)
    found = evaluate.robust(
        model,
        (x, y),
        GRID[1:],
        bpda=through_rounding,
        surrogate=inner,
        budgets=SHORT,
        progress=False,
    )
    names = [name for name in found.table() if name in evaluate.ORDER]
    assert {
        "transfer",
        "pgd_ce_bpda",
        "pgd_margin_bpda",
        "apgd_ce_bpda",
        "apgd_margin_bpda",
    } <= set(names)
    counts = found.first_fooled().iloc[-1]
    assert counts.filter(like="bpda").sum() > 5  # exact gradients of the rounding are zero
    assert "straight through" in found.threat() and "through_rounding" in found.threat()


def test_intervals_page_and_figure(both, study):
    groups = [f"patient {k // 2}" for k in range(40)]
    options = dict(attacks=("pgd_margin",), groups=groups, progress=False)
    found = evaluate.robust(study[0], study[1:], GRID, **options)
    table = found.table(draws=200)
    assert ((table.worst_low <= table.worst) & (table.worst <= table.worst_high)).all()
    assert (table.clean == 37 / 40).all() and table.attack_success.is_monotonic_increasing
    share = study[2].double().mean().item()  # of class 1
    assert (share * table.sensitivity + (1 - share) * table.specificity).tolist() == pytest.approx(
        table.worst.tolist()
    )
    assert table.sensitivity.between(0, 1).all() and not table.sensitivity.equals(table.specificity)
    assert table.attack_success.iloc[-1] == pytest.approx(1 - table.worst.iloc[-1] / (37 / 40))
    for one in (found, *both.values()):
        page = one.text(checks=False)
        assert ("by patient" if one is found else "by image (no patients given)") in page
        assert "16/255" in page and "pgd_margin (steps 10, restarts 1)" in page
        assert ("Fooled images were dropped" in page) == one.settings["early_drop"]
        figure = one.figure()
        line = [part for part in figure.axes[0].lines if part.get_label() == "worst case"][0]
        assert line.get_ydata().tolist() == [37 / 40, *one.table().worst]


def test_bad_arguments_of_the_suite_are_refused(study):
    model, x, y = study
    for word, bad in {
        "eps > 0": {"eps_grid": [0]},
        "budgets.*stepz": {"budgets": {"square": {"stepz": 3}}},
        "budgets speaks of": {"budgets": {"one_pixel": {"population": 9}}},
        "at speaks of": {"at": {"one_pixel": [GRID[0]]}},
        r"at\['square'\] must be eps of the grid": {"at": {"square": [0.9]}},
        "once and counts at every eps": {"at": {"fmn": [GRID[0]]}},
        "does not know norm": {"attacks": ["fgsm"], "norm": "l2"},
        "needs surrogate": {"attacks": ["transfer"]},
        "groups holds": {"groups": [1, 2]},
        "an image twice": {"ids": [0] * 40},
        "yield batches": {"data": []},
    }.items():
        arguments = {"data": (x, y), "eps_grid": GRID} | bad
        with pytest.raises(ValueError, match=word):
            evaluate.robust(model, **arguments, progress=False)
