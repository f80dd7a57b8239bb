"""The suite and its rows: known truth, the same answer whatever is dropped, kept or folded."""

import copy
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from harm import HARM, full_disk
from torch import nn

from dlia_utils import plots
from dlia_utils.attacks import base, checklist, evaluate, pgd
from dlia_utils.models import robust
from dlia_utils.units import pixel_eps, pixel_text

GRID = pixel_eps(2, 8, 16)
FEW = ("noise", "fgsm", "pgd_ce", "pgd_margin")
STEPS = {"apgd_ce": 8, "apgd_margin": 12, "fmn": 20, "square": 25}
SHORT = {name: {"steps": steps} for name, steps in STEPS.items()}


def full_rows(model, x, y, grid=GRID, attacks=FEW, **options):
    """Every attack on every image."""
    return evaluate.robust(model, (x, y), grid, attacks=attacks, progress=False, **options).rows


def starts(name, count=40):
    """The seeds that the suite gives to this attack's images."""
    return evaluate.KINDS[name].seeds(0, range(count))


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(36, 2)).eval()
    x = torch.rand(40, 1, 8, 8)
    model[-1].bias.data -= model(x).mean(0).detach()  # both classes, near the boundary
    y = model(x).argmax(1)
    y[:3] = 1 - y[:3]  # clean errors
    return model, x, y


@pytest.fixture(scope="module")
def rows(study):
    return full_rows(*study, batch_size=16)


@pytest.fixture(scope="module")
def whole(study):
    """The whole suite."""
    model, *data = study
    return evaluate.robust(model, data, GRID, budgets=SHORT, batch_size=16, progress=False)


def test_dropping_fooled_images_gives_the_same_worst_case_for_fewer_passes(study, whole):
    model, *data = study
    found = evaluate.robust(
        model, data, GRID, budgets=SHORT, batch_size=16, in_full=0, progress=False
    )
    assert set(found.rows.attack) == {"clean", "worst"}
    worst, asked = (one.rows[one.rows.attack == "worst"] for one in (whole, found))
    assert worst.fooled.tolist() == asked.fooled.tolist()
    assert found.cost.forwards.sum() < 0.8 * whole.cost.forwards.sum()
    with pytest.raises(ValueError, match="in_full of 1 or more"):
        checklist.report(found)


def test_columns_by_attack_come_from_a_stated_subset(study, whole):
    model, *data = study
    options = dict(budgets=SHORT, batch_size=16, progress=False, most={"square": 3})
    found = evaluate.robust(model, data, GRID, in_full=10, **options)
    single = found.rows[~found.rows.attack.isin(["clean", "worst"])]
    spread = np.linspace(0, 39, 10).astype(int).tolist()
    same = single.merge(whole.rows, on=["attack", "eps", "image"], suffixes=("", "_whole"))
    assert len(same) == 10 * 8 * 3 and same.fooled.equals(same.fooled_whole)
    assert sorted(set(same.image)) == spread
    assert found.cost.forwards.sum() < 0.9 * whole.cost.forwards.sum()
    table = checklist.report(found)
    assert table.set_index("check").verdict["the worst case is taken per image"] == "PASS"
    assert "on 10 images evenly spread; columns are over these" in checklist.page(found, table)
    right = plots.figure_worst_case(found, "a caption").axes[1]
    heights = sum(np.array([part.get_height() for part in bar]) for bar in right.containers)
    assert heights == pytest.approx(1)


@pytest.mark.parametrize("fast", [True, False])
def test_a_search_in_half_precision_judged_in_float32_fools_the_same_images(fast):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(72, 2)).eval(), torch.rand(600, 1, 8, 8)
    model[-1].bias.data -= model(x).mean(0).detach()
    data, kinds = (x, model(x).argmax(1)), []
    model[0].register_forward_hook(lambda *passed: kinds.append(passed[-1].dtype))
    options = dict(attacks=("fgsm", "pgd_margin", "apgd_ce", "fmn"), progress=False, fast=fast)
    options |= dict(budgets={"fmn": {"steps": 10}, "apgd_ce": {"steps": 8}}, in_full=0)
    worst = []
    for dtype in (None, torch.bfloat16):
        found = evaluate.robust(model, data, GRID[:2], search_dtype=dtype, **options)
        worst.append(np.array([found.fooled("worst", eps) for eps in GRID[:2]]))
        assert (torch.bfloat16 in kinds) == bool(dtype)
    assert 0.1 < worst[0].mean() < 0.9 and (worst[0] != worst[1]).mean() <= 0.005


@pytest.mark.parametrize("full_at", GRID)
def test_one_eps_in_full_and_elsewhere_what_it_leaves_open(study, whole, full_at):
    model, *data = study
    options = dict(budgets=SHORT, batch_size=16, progress=False, full_at=full_at + 1e-12)
    found = evaluate.robust(model, data, GRID, most={"square": 4}, **options)
    names = set(found.rows.attack) - {"clean", "worst"}
    assert {name.removesuffix(evaluate.STANDING) for name in names} == set(evaluate.SUITE)
    single = found.rows[found.rows.attack.isin(names)]
    assert single.eps.eq(full_at).all()
    # The same attacks on the same images: no outcome differs, and few of the worst case.
    same = single.merge(whole.rows, on=["attack", "eps", "image"], suffixes=("", "_whole"))
    assert len(same) == 40 * 8 and same.fooled.equals(same.fooled_whole)
    for eps in GRID:
        ours, theirs = (one.fooled("worst", eps) for one in (found, whole))
        assert (ours <= theirs).all() and (theirs & ~ours).sum() <= 1
    worst = [found.fooled("worst", eps) for eps in GRID]
    assert (worst[0] <= worst[1]).all() and (worst[1] <= worst[2]).all()
    assert found.cost.forwards.sum() < 0.6 * whole.cost.forwards.sum()
    met = single[single.attack.str.startswith("square")]
    assert 0 < len(met) <= 4 and not set(met.image) & set(np.flatnonzero(found.nearest == 0))
    table = checklist.report(found).set_index("check")
    assert len(table) == 13 and "a larger eps never fools fewer" not in table.index
    assert table.verdict["the worst case is taken per image"] == "PASS"
    page = " ".join(checklist.page(found, table.reset_index()).split())
    assert "the nearest 4 of those standing" in page and f"At {pixel_text(full_at)} every" in page
    plots.figure_worst_case(found, "a caption")


def test_few_images_are_the_nearest_of_those_that_stand(study):
    model, *data = study
    names = ("fmn", "square")
    options = dict(attacks=names, budgets={k: SHORT[k] for k in names}, progress=False)
    alone = options | {"attacks": ["fmn"], "budgets": {"fmn": SHORT["fmn"]}}
    before = evaluate.robust(model, data, GRID[:1], **alone)
    found = evaluate.robust(model, data, GRID[:1], most={"square": 6}, **options)
    stands = np.flatnonzero(before.nearest > GRID[0])
    nearest = stands[np.argsort(before.nearest[stands])][:6]
    met = found.rows[found.rows.attack == "square, of those standing"]
    assert set(met.image) == set(nearest) and found.table()[met.attack.iloc[0]].notna().all()


def is_union(rows):
    """Whether "worst" is the union of all attacks per image, at each eps and below."""
    single = rows[~rows.attack.isin(["clean", "worst"])]
    first = single[single.fooled].groupby("image").eps.min()
    worst = rows[rows.attack == "worst"]
    return (worst.fooled == (worst.eps >= worst.image.map(first).fillna(9))).all()


def test_one_row_per_attack_eps_and_image(rows):
    assert list(rows.columns) == evaluate.COLUMNS
    assert len(rows) == 40 * (1 + 5 * len(GRID))
    assert not rows.duplicated(["attack", "eps", "image"]).any()
    assert ((rows.first_success_step >= 0) == rows.fooled).all()
    assert rows[rows.image < 3].fooled.all()  # clean errors count as fooled everywhere
    assert rows[rows.attack == "clean"].fooled.sum() == 3
    shares = rows[rows.attack == "worst"].groupby("eps").fooled.mean()
    assert is_union(rows) and 0.1 < shares.iloc[0] < shares.iloc[-1]


def test_batches_ids_and_the_copy_do_not_change_the_answer(study, rows):
    model, x, y = study
    plain, keys = full_rows(model, x, y, batch_size=7, fast=False), ["attack", "eps", "image"]
    merged = rows.merge(plain, on=keys)
    assert len(merged) == len(rows) and (merged.fooled_x == merged.fooled_y).mean() > 0.99
    some = torch.arange(5, 12)
    part = full_rows(model, x[some], y[some], ids=some, fast=False)
    merged = plain.merge(part, on=keys)
    assert len(merged) == len(part) and (merged.fooled_x == merged.fooled_y).all()


class FlipsOthers(nn.Module):
    """A copy that is wrong about every image that is not one of these."""

    def __init__(self, model, known):
        super().__init__()
        self.model, self.known = model, known.flatten(1)

    def forward(self, x):
        logits = self.model(x)
        near = torch.cdist(x.flatten(1), self.known, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.where(near.amin(1, keepdim=True) > 1e-3, logits.flip(1), logits)


def test_images_that_fool_only_the_copy_are_attacked_again(study, monkeypatch):
    model, x, y = study
    flipped = FlipsOthers(model, x).eval()
    monkeypatch.setattr(evaluate, "fast_copy", lambda model: flipped)
    found = full_rows(model, x, y, GRID[-1:], ("pgd_margin",))
    direct = pgd(model, x, y, eps=GRID[-1], loss="margin", seed=starts("pgd_margin"))
    assert found[found.attack == "pgd_margin"].fooled.tolist() == direct.success.tolist()


def test_a_copy_that_is_another_function_is_not_attacked(study, caplog):
    model, x, y = study
    hooked = copy.deepcopy(model)  # a copy by tracing loses the hook
    hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    options = {"grid": GRID[:1], "attacks": ("pgd_margin",)}
    caplog.set_level("INFO", logger="dlia_utils")
    fast, plain = (full_rows(hooked, x, y, fast=fast, **options) for fast in (True, False))
    pd.testing.assert_frame_equal(fast, plain)
    assert "answers otherwise" in caplog.text


class Scale(nn.Module):
    def forward(self, logits):
        return logits * 1e6


def test_zero_gradient_share(study):
    model, x, y = study
    x, y = x[3:], y[3:]
    assert evaluate.zero_gradient_share(model, x, y, batch_size=10) == 0
    saturated = nn.Sequential(model, Scale()).eval()
    assert evaluate.zero_gradient_share(saturated, x, y) > 0.9
    assert evaluate.zero_gradient_share(saturated, x, y, loss="margin") == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ---------------------------------------- through operators that hide gradients


@pytest.fixture(scope="module")
def sparse():
    """A net with dead zones so wide that the two gradients lead to different images."""
    torch.manual_seed(0)
    operator = robust.MeanSparse(4)
    layers = [nn.Conv2d(1, 4, 3), operator, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)]
    model, x = nn.Sequential(*layers).eval(), torch.rand(12, 1, 8, 8)
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
    outcomes = rows[rows.eps == GRID[1]].groupby("attack").fooled.agg(list)
    assert outcomes["pgd_margin"] != outcomes["pgd_margin_bpda"]
    # Every number is that of the attack itself, exact or through the operator.
    for loss in ("ce", "margin"):
        options = dict(eps=GRID[1], loss=loss, seed=starts(f"pgd_{loss}", 12))
        exact = pgd(model, x, y, **options)
        with robust.straight_through(model):
            through = pgd(model, x, y, **options)
        for name, direct in ((f"pgd_{loss}", exact), (f"pgd_{loss}_bpda", through)):
            assert outcomes[name] == (model(direct.x_adv).argmax(1) != y).tolist()
    assert is_union(rows) and not model[1].straight_through


# ---------------------------------------- the suite: known truth


def test_two_losses_and_two_methods_are_attacks_with_starts_of_their_own(study):
    model, x, y = study
    base.check_steady(model, x)

    def first_point(name):
        """Where the attack starts: what the model sees after the clean images."""
        batches = []
        hook = model.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].detach()))
        options = {"steps": 1, "loss": "ce", "stop_when_fooled": False}
        own = evaluate.KINDS[name]
        own.run(model, x, y, options, eps=GRID[0], seed=own.seeds(0, range(40)))
        hook.remove()
        return batches[1]

    names = ["pgd_ce", "pgd_margin", "apgd_ce", "apgd_margin"]
    seen = {name: first_point(name) for name in names}
    gaps = [(seen[a] - seen[b]).abs().flatten(1).amax(1).min() for a, b in combinations(names, 2)]
    assert min(gaps) > 0.1 * GRID[0]
    first = pgd(model, x, y, eps=GRID[0], steps=1, seed=0)  # that of the seed itself stays
    again = pgd(model, x, y, eps=GRID[0], steps=1, seed=starts("pgd_ce"))
    assert torch.equal(first.x_adv, again.x_adv)


def test_the_smallest_change_known_of_each_image(whole):
    known = whole.rows[whole.rows.fooled & ~whole.rows.attack.isin(["clean", "worst"])]
    fell = known.groupby("image").eps.min().reindex(range(40)).to_numpy()
    assert (whole.nearest[:3] == 0).all() and (whole.nearest > 0).sum() == 37
    beyond = np.isnan(fell)  # which only the searches for the smallest change may know
    assert (whole.nearest[~beyond] <= fell[~beyond]).all() and (
        whole.nearest[beyond] > GRID[-1]
    ).all()
    finer = ~np.isin(whole.nearest, [0, *GRID, np.inf])
    assert finer.mean() > 0.5


def test_the_worst_case_of_a_linear_model_is_its_closed_form():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double().eval()
    x = 0.4 + 0.2 * torch.rand(14, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        logits, difference = model(x), model[1].weight[1] - model[1].weight[0]
    distance = ((logits.amax(1) - logits.amin(1)) / difference.abs().sum()).detach()
    ordered = distance.sort().values  # eps half way between neighbours some per cent apart
    apart = [k for k in range(1, 14) if ordered[k] > 1.05 * ordered[k - 1]]
    grid = [float(ordered[apart[p] - 1 : apart[p] + 1].mean()) for p in (1, 4, -2)]
    options = dict(budgets=SHORT, steps=20, progress=False)
    found = evaluate.robust(model, (x, logits.argmax(1)), grid, **options)
    for eps in grid:
        worst = found.rows[(found.rows.attack == "worst") & (found.rows.eps == eps)]
        assert worst.fooled.tolist() == (distance <= eps).tolist()


def test_smallest_changes_are_searched_once_and_count_at_every_eps(whole):
    cost = whole.cost.set_index(["attack", "eps"])
    for name in ("deepfool", "fmn"):
        assert cost.forwards[name].iloc[0] > 0 and (cost.forwards[name].iloc[1:] == 0).all()
        assert cost.fooled[name].is_monotonic_increasing


def test_an_expensive_attack_at_some_eps_only(whole, study):
    model, *data = study
    at = {"square": [GRID[-1]], "pgd_ce": GRID[1:]}
    options = dict(budgets=SHORT, batch_size=16, progress=False)
    found = evaluate.robust(model, data, GRID, at=at, **options)
    ran = {name: set(part.eps) for name, part in found.cost.groupby("attack")}
    assert ran["square"] == {GRID[-1]} and ran["pgd_ce"] == set(GRID[1:])
    assert ran["pgd_margin"] == set(GRID) and found.table().square.isna().iloc[:-1].all()
    # The attacks know nothing of each other: those that ran did what they always do.
    mine = found.rows[found.rows.attack != "worst"]
    same = mine.merge(whole.rows, on=["attack", "eps", "image"], suffixes=("", "_whole"))
    assert len(same) == len(mine) and same.fooled.equals(same.fooled_whole)


def test_the_passes_counted_are_those_made(study):
    model, x, y = study
    seen = {"forwards": 0, "backwards": 0}

    def forwards(_module, inputs, _output):
        seen["forwards"] += len(inputs[0])

    def backwards(_module, _inputs, outputs):
        seen["backwards"] += len(outputs[0])

    model = copy.deepcopy(model)
    base.check_steady(model, x)
    model.register_forward_hook(forwards), model.register_full_backward_hook(backwards)
    budgets = SHORT | {"one_pixel": {"population": 5, "iterations": 2}}
    options = dict(budgets=budgets, fast=False, progress=False, attacks=evaluate.LINF)
    found = evaluate.robust(model, (x[:12], y[:12]), GRID[:2], **options)
    assert found.cost[["forwards", "backwards"]].sum().to_dict() == seen


# ---------------------------------------- going on, tables, refusals


def test_a_cut_off_run_goes_on_without_repeated_work(study, tmp_path):
    model, data = study[0], (study[1][:16], study[2][:16])
    passes, limit = [], 10**9

    def count(_module, inputs, _output):
        passes.append(len(inputs[0]))
        if sum(passes) > limit:
            raise KeyboardInterrupt

    def run(**more):
        passes.clear()
        return evaluate.robust(model, data, GRID[:2], budgets=SHORT, fast=False, **more)

    base.check_steady(model, data[0])
    hook = model.register_forward_hook(count)
    try:
        whole = run(progress=False, batch_size=10)
        total = sum(passes)
        limit = total // 2
        kept = dict(progress=False, batch_size=10, folder=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run(**kept)
        count_kept, limit = len(list(tmp_path.glob("block_*.npz"))), 10**9
        again = run(**kept)
        done = whole.cost.forwards.iloc[:count_kept].sum()
        assert 3 <= count_kept < len(whole.cost) and sum(passes) == total - done < total
        third = run(**kept)
        assert sum(passes) == 0
        run(resume=False, **kept)
        assert sum(passes) == total
    finally:
        hook.remove()
    for found in (again, third):
        pd.testing.assert_frame_equal(found.rows, whole.rows)
        costs = [one.cost.drop(columns="seconds") for one in (found, whole)]
        pd.testing.assert_frame_equal(*costs)


def test_a_folder_is_read_back_only_where_nothing_changed(study, tmp_path):
    model, x, y = study
    options = dict(attacks=("noise", "pgd_margin", "fmn"), folder=tmp_path, progress=False)
    options |= {"budgets": {"fmn": {"steps": 5}}}

    def new(model=model, data=(x, y), grid=GRID[:1], **changes):
        """How many blocks are made anew; the rows are those of a run without a folder."""
        before = len(list(tmp_path.glob("block_*.npz")))
        found = evaluate.robust(model, data, grid, **options | changes)
        fresh = evaluate.robust(model, data, grid, **options | changes | {"folder": None})
        pd.testing.assert_frame_equal(found.rows, fresh.rows)
        return len(list(tmp_path.glob("block_*.npz"))) - before

    assert new() == 4 and new() == 0
    assert new(grid=GRID[:2]) == 2  # FMN is run once, whatever the grid
    assert new(budgets={"fmn": {"steps": 5}, "noise": {"draws": 3}}) == 1
    other = copy.deepcopy(model)
    other[-1].bias.data += 0.01
    assert new(other) == 4 and new(data=(x.flip(0), y)) == 4 and new(seed=1) == 4


BLOCKS = {
    "a part is missing": lambda kept: kept.pop("step"),
    "an unknown part": lambda kept: kept.update(other=np.ones(2)),
    "other images": lambda kept: kept.update(places=kept["places"] + 1),
    "too few": lambda kept: kept.update(queries=kept["queries"][1:]),
    "objects": lambda kept: kept.update(step=np.array([None] * 40)),
}


@pytest.mark.parametrize("harm", [*HARM, *BLOCKS])
def test_a_kept_block_that_is_damaged_or_foreign_is_named_with_the_fix(study, tmp_path, harm):
    model, x, y = study
    options = dict(attacks=("noise",), folder=tmp_path, progress=False)
    before = evaluate.robust(model, (x, y), GRID[:1], **options)
    path = next(tmp_path.glob("block_0_clean_*.npz"))
    if harm in HARM:
        path.write_bytes(HARM[harm](path.read_bytes()))
    else:
        with np.load(path) as file:
            kept = dict(file)
        BLOCKS[harm](kept)
        np.savez(path, **kept)
    with pytest.raises(ValueError, match=r"block_.*npz is damaged.*delete it to run this attack"):
        evaluate.robust(model, (x, y), GRID[:1], **options)
    path.unlink()  # which the message names
    after = evaluate.robust(model, (x, y), GRID[:1], **options)
    pd.testing.assert_frame_equal(after.rows, before.rows)


def test_blocks_on_a_full_disk_are_said_and_those_that_are_kept_stay(study, tmp_path):
    model, x, y = study
    options = dict(attacks=("noise",), folder=tmp_path / "suite", progress=False)
    with full_disk(500), pytest.raises(OSError, match="no space left in .*suite"):
        evaluate.robust(model, (x, y), GRID[:1], **options)
    evaluate.robust(model, (x, y), GRID[:1], **options)


def test_table_and_figure(whole, study):
    groups = [f"patient {k // 2}" for k in range(40)]
    options = dict(attacks=("pgd_margin",), groups=groups, progress=False)
    found = evaluate.robust(study[0], study[1:], GRID, **options)
    table = found.table(draws=200)
    assert ((table.worst_low <= table.worst) & (table.worst <= table.worst_high)).all()
    assert (table.clean == 37 / 40).all() and table.attack_success.is_monotonic_increasing
    share = study[2].double().mean().item()  # of class 1
    both_sides = share * table.sensitivity + (1 - share) * table.specificity
    assert both_sides.tolist() == pytest.approx(table.worst.tolist())
    assert table.attack_success.iloc[-1] == pytest.approx(1 - table.worst.iloc[-1] / (37 / 40))
    for one in (found, whole):
        left, right = plots.figure_worst_case(one, "a caption").axes[:2]
        line = [part for part in left.lines if part.get_label() == "worst case"][0]
        worst = one.table().worst
        assert line.get_ydata().tolist() == [37 / 40, *worst]
        bars = {bar.get_label(): [part.get_height() for part in bar] for bar in right.containers}
        assert bars["wrong from the start"] == pytest.approx([3 / 40] * 3)
        assert bars["robust"] == pytest.approx(worst.tolist())


def test_bad_arguments_are_refused_before_the_model_is_asked(study):
    model, x, y = copy.deepcopy(study)
    model.register_forward_hook(lambda *_: pytest.fail("the model was asked"))
    for word, bad in {
        "eps > 0": {"eps_grid": [0]},
        "pixel units": {"eps_grid": [8]},
        "must name some of": {"attacks": ("apgd",)},
        "budgets.*stepz": {"budgets": {"square": {"stepz": 3}}},
        "steps": {"budgets": {"square": {"steps": 0}}},
        r"at\['square'\] must be of eps_grid": {"at": {"square": [0.9]}},
        "runs once": {"at": {"fmn": [GRID[0]]}},
        "full_at": {"full_at": 0.5},
        "most must name": {"most": {"one_pixel": 5}},
        r"most\['square'\]": {"most": {"square": 0}},
        "ids and groups": {"groups": [1, 2]},
        "all different": {"ids": [0] * 40},
        "seed": {"seed": -1},
        "batch_size": {"batch_size": -1},
        "in_full": {"in_full": -1},
    }.items():
        with pytest.raises(ValueError, match=word):
            evaluate.robust(model, (x, y), **{"eps_grid": GRID} | bad, progress=False)
