"""Transfer learning: the body kept bit by bit, frozen for good, the gradient through it, features once."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import attacks, models, objectives, train
from dlia_utils.explain import gradcam
from dlia_utils.models import robust
from dlia_utils.models.pixel import fast_copy

FAMILIES = {
    "mobilenet_v2": lambda: models.mobilenet_v2(width=0.25, stages=4),
    "cnn": lambda: models.cnn(channels=(8, 8, 16), hidden=24),
    "resnet50_v2": lambda: models.resnet50_v2(width=1 / 16, depths=(1, 2, 1, 2)),
    "resnet18_cifar": lambda: models.resnet18_cifar(width=1 / 8),
    **{
        name: functools.partial(robust.create, name, width=1 / 16)
        for name in ("standard_wrn_28_10", "huang2021_wrn_34_r", "hat_wrn_34_10", "ra_resnet_50")
    },
    # All others are these networks with more blocks.
    "meansparse_wrn_94_16": lambda: robust.set_alpha(
        robust.create("meansparse_wrn_94_16", width=1 / 16), 0.1
    ),
}
# name: number of blocks, parameters outside the blocks that train with the last one, layer of the last map
EXPECTED = {
    "mobilenet_v2": (11, [], "features.11"),
    "cnn": (3, ["hidden.weight", "hidden.bias"], "blocks.2"),
    "resnet50_v2": (6, ["norm.weight", "norm.bias"], "relu"),
    "resnet18_cifar": (8, [], "layer4.1"),
    "standard_wrn_28_10": (12, ["bn1.weight", "bn1.bias"], "relu"),
    "huang2021_wrn_34_r": (15, ["bn1.weight", "bn1.bias"], "relu"),
    "hat_wrn_34_10": (15, ["batchnorm.weight", "batchnorm.bias"], "relu"),
    "ra_resnet_50": (27, [], "stages.stage4.stage4-block0"),
    "meansparse_wrn_94_16": (45, ["batchnorm.weight", "batchnorm.bias"], "relu"),
}
every_family = pytest.mark.parametrize("name", sorted(FAMILIES))
# Its 45 blocks take time and are those of another family.
most_families = pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"meansparse_wrn_94_16"}))
X = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 1, 0])


@functools.cache
def _base(name: str) -> models.PixelModel:
    """A model as after training: the batch norms know their maps, so that a signal reaches the head."""
    model = FAMILIES[name]()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(8, 1, 64, 64, generator=torch.Generator().manual_seed(1)))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    return model


def base(name: str) -> models.PixelModel:
    return copy.deepcopy(_base(name))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def kept(model: nn.Module) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def step(model: nn.Module) -> None:
    """One step of training."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    model.eval()


# ------------------------------------------------------------------ the body


@every_family
def test_the_body_is_the_models_own_under_its_own_door(name):
    model = base(name).eval()
    before, seen = kept(model), []
    last = models.last_map_layer(model)
    transferred = models.with_head(model, num_classes=3, seed=4).eval()
    assert torch.equal(transferred.normalize(X), model.normalize(X))
    handle = model.get_submodule(last).register_forward_hook(lambda *call: seen.append(call[2]))
    model(X)
    handle.remove()
    features = transferred.features(X)
    grid = F.adaptive_avg_pool2d(seen[0], 4 if name == "cnn" else 1).flatten(1)
    if name == "cnn":
        grid = F.relu(model.backbone.hidden(grid))
    torch.testing.assert_close(features, grid)
    assert torch.equal(transferred(X), transferred.head(features)) and transferred(X).shape == (
        4,
        3,
    )
    nn.init.ones_(next(transferred.backbone.body.parameters()))
    assert equal(kept(model), before) and all(p.requires_grad for p in model.parameters())


def test_a_robust_models_check_of_the_range_is_kept():
    for name in ("hat_wrn_34_10", "standard_wrn_28_10"):
        model = models.with_head(models.with_head(base(name))).eval()
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            model(2 * X)
    models.with_head(base("cnn")).eval()(2 * X)  # as the cnn itself


@most_families
def test_a_training_step_leaves_the_frozen_body_bit_equal(name):
    model = models.with_head(base(name), dropout=0.3)
    before = kept(model.backbone.body), kept(model.head)
    step(model)
    assert equal(kept(model.backbone.body), before[0])
    assert not equal(kept(model.head), before[1])
    model.train()
    assert model.training and model.head.training
    assert not any(module.training for module in model.backbone.body.modules())
    # What would have happened: the statistics drift in one pass, without any trained weight.
    nn.Module.train(model.backbone.body)
    model(X)
    assert not equal(kept(model.backbone.body), before[0])


@most_families
def test_the_last_blocks_train_and_what_is_before_them_does_not(name):
    blocks, tail, _ = EXPECTED[name]
    model = models.with_head(base(name))
    assert len(models.blocks(model)) == blocks
    for count in (1, 2, blocks):
        assert models.unfreeze(model, count) is model
        body = dict(model.backbone.body.named_parameters())
        chosen = [
            f"{block.removeprefix('backbone.body.')}." for block in models.blocks(model)[-count:]
        ]
        expected = {key for key in body if key.startswith(tuple(chosen))} | set(tail)
        assert {key for key, p in body.items() if p.requires_grad} == expected
    if name != "cnn":  # which has no stem before its first block
        assert not next(iter(body.values())).requires_grad
    models.unfreeze(model, "all")
    assert all(p.requires_grad for p in model.parameters())

    models.unfreeze(model, 1)
    before = kept(model.backbone.body)
    step(model)
    now = kept(model.backbone.body)
    moved = {key for key in now if not torch.equal(now[key], before[key])}
    live = (
        f"{models.blocks(model)[-1].removeprefix('backbone.body.')}.",
        *(key.split(".")[0] for key in tail),
    )
    assert all(key.startswith(live) for key in moved)
    assert any("running_mean" in key for key in moved)
    assert {key for key, p in body.items() if p.requires_grad} <= moved


@every_family
def test_blocks_and_the_last_map_are_layers_with_maps(name):
    blocks, _, last = EXPECTED[name]
    plain, wrapped = base(name).eval(), models.with_head(base(name)).eval()
    assert models.last_map_layer(plain) == f"backbone.{last}"
    assert models.last_map_layer(wrapped) == f"backbone.body.{last}"
    ran, names = [], models.blocks(wrapped)
    for block in names:
        wrapped.get_submodule(block).register_forward_hook(
            lambda _, __, output, block=block: ran.append((block, output.ndim))
        )
    wrapped(X)
    assert ran == [(block, 4) for block in names]
    assert [block.replace("body.", "") for block in names] == models.blocks(plain)


# ------------------------------------------------------------------ with the rest of the suite


@most_families
def test_attacks_maps_and_the_folded_copy_work_on_a_frozen_model(name):
    model = models.with_head(base(name), head="mlp", hidden=8).requires_grad_(False).eval()
    before, y = kept(model), model(X).argmax(1)
    torch.testing.assert_close(fast_copy(model)(X), model(X), rtol=1e-3, atol=1e-4)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    assert gradient.abs().amax((1, 2, 3)).gt(0).all()
    found = attacks.pgd(model, X, y, eps=1 / 255, steps=4, loss="margin", stop_when_fooled=False)
    margin = attacks.margin
    assert margin(model(found.x_adv), y).mean() > margin(model(X), y).mean()
    result = gradcam(model, X, models.last_map_layer(model), target=1)
    assert result.maps.shape == (4, 32, 32)
    assert equal(kept(model), before) and not any(p.requires_grad for p in model.parameters())


def test_a_head_is_trained_on_attacked_images_through_the_frozen_body(tmp_path):
    model = models.with_head(base("cnn"))
    before = kept(model.backbone.body), kept(model.head)
    data = TensorDataset(X, Y)
    objective = objectives.pgd_adversarial(eps=4 / 255)
    train.fit(
        model, objective, data, data, run_dir=tmp_path, epochs=1, batch_size=2, progress=False
    )
    assert equal(kept(model.backbone.body), before[0]) and not equal(kept(model.head), before[1])
    assert equal(kept(models.load(tmp_path / "best.pt")), kept(model))


@pytest.mark.parametrize("name", ["cnn", "mobilenet_v2", "ra_resnet_50", "resnet50_v2"])
def test_a_saved_model_comes_back_with_its_frozen_parts(name, tmp_path):
    model = models.with_head(
        base(name), head="mlp", hidden=8, num_classes=3, dropout=0.2, unfrozen=1
    ).eval()
    path = models.save(model, tmp_path / "model.pt", meta={})
    again = models.load(path)
    assert equal(kept(again), kept(model)) and again.recipe == model.recipe
    assert torch.equal(again(X), model(X))
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key, p in again.named_parameters() if p.requires_grad} == trains
    assert again.train().backbone.live == model.backbone.live != ()
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop(next(iter(model.backbone.body.state_dict(prefix="backbone.body."))))
    torch.save(content, path)
    with pytest.raises(ValueError, match="missing backbone.body"):
        models.load(path)


# ------------------------------------------------------------------ the head


def test_the_heads_layers():
    model = models.with_head(base("cnn"), head="mlp", hidden=7, dropout=0.4, num_classes=3)
    kinds = [nn.Dropout, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in model.head] == kinds
    assert model.head[1].in_features == 24 and model.head[3].num_features == 7
    assert model.head[0].p == model.head[4].p == 0.4 and model.head[5].out_features == 3
    assert [type(layer) for layer in models.with_head(base("cnn")).head] == [nn.Dropout, nn.Linear]


def test_the_seed_decides_the_head_and_the_callers_random_stream_stays():
    torch.manual_seed(5)
    model, state = base("cnn"), torch.get_rng_state()
    a, b, c = (kept(models.with_head(model, seed=seed).head) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(a, b) and not equal(a, c)


def test_a_new_head_on_a_transferred_body_replaces_the_old_one():
    first = models.with_head(base("hat_wrn_34_10"), head="mlp", hidden=8, unfrozen=2)
    second = models.with_head(first, num_classes=5).eval()
    assert second(X).shape == (4, 5) and not any(
        p.requires_grad for p in second.backbone.body.parameters()
    )
    assert torch.equal(second.features(X), first.eval().features(X))
    assert second.recipe["body"]["name"] == "hat_wrn_34_10" and first.recipe["unfrozen"] == 2


def test_unfreezing_keeps_the_trained_head_and_is_in_the_recipe():
    model = models.with_head(base("cnn"))
    head = kept(model.head)
    models.unfreeze(model, "all")
    assert equal(kept(model.head), head) and model.recipe["unfrozen"] == "all"
    assert models.create(**model.recipe).backbone.live == model.backbone.live
    assert model.train().backbone.body.dropout.training


# ------------------------------------------------------------------ cached features


@pytest.mark.parametrize("name", ["mobilenet_v2", "cnn", "meansparse_wrn_94_16"])
def test_cached_features_are_those_of_the_images_in_order(name):
    """Also where rounding decides about a dead zone."""
    model = models.with_head(base(name)).train()
    before, rows = kept(model), torch.tensor([7, 5, 3, 1])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    cached = models.cached_features(model, TensorDataset(X, Y, rows), batch_size=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(cached.tensors[0], model.features(X), rtol=1e-3, atol=1e-4)
    assert torch.equal(cached.tensors[1], Y) and torch.equal(cached.tensors[2], rows)
    assert equal(kept(model), before) and model.training and not cached.tensors[0].requires_grad
    assert isinstance(cached[0][0], torch.Tensor) and len(cached) == 4


def test_a_head_trained_on_cached_features_is_the_models_head(tmp_path):
    """The features tell the classes apart, so the head must learn them, and the whole model with it."""
    dark = 0.3 * torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x, y = torch.cat([dark, 1 - dark]), torch.arange(48) // 24
    model = models.with_head(base("cnn"))
    body = kept(model.backbone.body)
    features = models.cached_features(model, TensorDataset(x, y), progress=False)
    objective = objectives.cross_entropy()
    options = dict(
        run_dir=tmp_path, epochs=6, batch_size=8, lr=0.05, monitor="val_accuracy", progress=False
    )
    train.fit(model.head, objective, features, features, **options)
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    torch.testing.assert_close(model(x), model.head(features.tensors[0]), rtol=1e-3, atol=1e-3)
    assert equal(kept(model.backbone.body), body)


# ------------------------------------------------------------------ refusals


def test_what_makes_no_sense_is_refused():
    model = base("cnn")
    for options, message in [
        ({"head": "tree"}, "head must be one of linear, mlp"),
        ({"num_classes": 0}, "num_classes"),
        ({"dropout": 1.0}, "dropout"),
        ({"unfrozen": 4}, "0 to 3 blocks or 'all'"),
        ({"unfrozen": -1}, "0 to 3 blocks"),
        ({"unfrozen": "some"}, "0 to 3 blocks"),
        ({"unfrozen": True}, "0 to 3 blocks"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.with_head(model, **options)
    flat = models.PixelModel(nn.Flatten(), [0.5] * 3, [0.5] * 3)
    for function, message in (
        (models.with_head, "does not end in an nn.Linear"),
        (models.blocks, "no known blocks"),
        (models.last_map_layer, "no layer of it returns maps"),
    ):
        with pytest.raises(ValueError, match=message):
            function(flat)
        with pytest.raises(ValueError):
            function(nn.Linear(2, 2))
    for function in (
        lambda m: models.unfreeze(m, 1),
        lambda m: models.cached_features(m, TensorDataset(X)),
    ):
        with pytest.raises(ValueError, match="made by with_head"):
            function(model)


def test_features_are_not_cached_while_the_body_trains():
    model = models.with_head(base("cnn"), unfrozen=1)
    with pytest.raises(ValueError, match=r"unfreeze\(model, 0\)"):
        models.cached_features(model, TensorDataset(X, Y), progress=False)
    with pytest.raises(ValueError, match="empty"):
        models.cached_features(
            models.unfreeze(model, 0), TensorDataset(X[:0], Y[:0]), progress=False
        )
