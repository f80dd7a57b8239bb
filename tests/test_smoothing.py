"""Certificates against a linear model, whose smoothed class and radius are known in closed form."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest, norm
from torch import nn

from dlia_utils.smoothing import ABSTAIN, certify

SIGMA = 0.2


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Dropout())
    with torch.no_grad():
        net[1].bias -= net[1](torch.full((1, 16), 0.5))[0]  # the border goes through grey
    return net.train()


def distance(model, x):
    """Signed L2 distance to the border, > 0 for class 1; its size is the exact smoothed radius."""
    w, b = model[1].weight[1] - model[1].weight[0], model[1].bias[1] - model[1].bias[0]
    return ((x.flatten(1) @ w + b) / w.norm()).detach().numpy()


def images(n, seed=1):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def labels(x):
    return torch.zeros(len(x), dtype=torch.int64)


def test_the_radius_stays_below_the_true_one_as_often_as_promised(model):
    x, alpha = images(200), 0.1
    truth = distance(model, x)
    y = torch.from_numpy(truth > 0).long()
    table = certify(model, x, y, sigma=SIGMA, n0=20, n=100, alpha=alpha)
    answered = table.predicted != ABSTAIN
    # A certificate is wrong when its class is, or when its radius reaches past the border.
    wrong = answered & (~table.correct | (table.radius > np.abs(truth)))
    assert 0 < wrong.mean() <= alpha + 3 * (alpha * (1 - alpha) / 200) ** 0.5
    assert answered.mean() > 0.7 and (table.radius[~answered] == 0).all()


def test_with_many_copies_the_radius_comes_near_the_true_one(model):
    x = images(8)
    truth = np.abs(distance(model, x))
    options = {"n": 20_000, "alpha": 0.001, "batch_size": 20_000}
    table = certify(model, x, labels(x), sigma=SIGMA, **options)
    assert (table.radius <= truth).all()
    near = (truth > 0.05) & (truth < 2 * SIGMA)
    assert near.sum() >= 4 and (table.radius[near] > 0.8 * truth[near]).all()


def test_on_the_border_it_abstains_and_far_from_it_the_radius_is_the_largest_possible(model):
    grey = torch.full((5, 1, 4, 4), 0.5)
    table = certify(model, grey, torch.ones(5, dtype=torch.long), sigma=SIGMA, n=200, ids=range(5))
    assert (table.predicted == ABSTAIN).all() and (table.radius == 0).all()
    assert not table.correct.any()
    model[1].bias.data[1] += 100
    table = certify(model, grey, labels(grey), sigma=SIGMA, n=200, alpha=0.01)
    assert (table.predicted == 1).all() and (table.k == 200).all()
    assert table.radius.tolist() == pytest.approx([SIGMA * norm.ppf(0.01 ** (1 / 200))] * 5)


def test_the_draws_depend_on_seed_and_id_only(model):
    x, options = images(6), {"sigma": SIGMA, "n0": 10, "n": 101, "alpha": 0.05}
    first = certify(model, x, labels(x), **options)
    pd.testing.assert_frame_equal(certify(model, x, labels(x), batch_size=7, **options), first)
    order = [4, 1]
    again = certify(model, x[order], labels(order), ids=order, **options)
    pd.testing.assert_frame_equal(again, first.iloc[order].reset_index(drop=True))
    assert (certify(model, x, labels(x), seed=1, **options).k != first.k).any()
    # Equal images under other ids see other noise, and the copies that chose a class do not count
    # for it: on the border it has the majority of the others in every second image only.
    grey = torch.full((40, 1, 4, 4), 0.5)
    table = certify(model, grey, labels(grey), sigma=SIGMA, n0=101, n=101)
    assert table.k.nunique() > 5 and 0.25 < (table.k > 50).mean() < 0.75


def test_model_and_random_stream_are_left_as_they_were(model):
    model[2].eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    certify(model, images(2), labels(range(2)), sigma=SIGMA, n=20)
    assert torch.equal(torch.get_rng_state(), state) and model.training and not model[2].training
    assert all(part.grad is None and part.requires_grad for part in model.parameters())


def test_the_lower_bound_is_clopper_and_pearsons(model):
    x = images(12)
    table = certify(model, x, labels(x), sigma=SIGMA, n=60, alpha=0.05)
    for k, p in zip(table.k, table.p_lower, strict=True):
        exact = binomtest(k, 60, alternative="greater").proportion_ci(0.95, method="exact").low
        assert p == pytest.approx(exact, abs=1e-9)


def test_unusable_arguments_are_refused(model):
    for message, options in {
        "sigma": {"sigma": 0},
        "normalisation": {"x": 2 * images(2) + 1},
    }.items():
        with pytest.raises(ValueError, match=message):
            certify(model, **{"x": images(2), "y": labels(range(2)), "sigma": SIGMA} | options)
