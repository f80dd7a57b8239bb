"""Transfer learning: the body kept bit by bit, frozen for good, the gradient through it."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from test_cnn import equal, kept
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import models, objectives, train
from dlia_utils.models import robust

SPARSE = "meansparse_wrn_94_16"
WIDE = ("standard_wrn_28_10", "huang2021_wrn_34_r", "hat_wrn_34_10", SPARSE)
FAMILIES = {
    "mobilenet_v2": lambda: models.mobilenet_v2(width=0.25, stages=4),
    "cnn": lambda: models.cnn(channels=(8, 8, 16), hidden=24),
    "resnet50_v2": lambda: models.resnet50_v2(width=1 / 16, depths=(1, 2, 1, 2)),
    "resnet18_cifar": lambda: models.resnet18_cifar(width=1 / 8),
    **{name: functools.partial(robust.create, name, width=1 / 16) for name in WIDE},
}
# name: number of blocks, layers after them that train with the last, layer of the last map
EXPECTED = {
    "mobilenet_v2": (11, [], "features.11"),
    "cnn": (3, ["hidden"], "blocks.2"),
    "resnet50_v2": (6, ["norm"], "relu"),
    "resnet18_cifar": (8, [], "layer4.1"),
    "standard_wrn_28_10": (12, ["bn1"], "relu"),
    "huang2021_wrn_34_r": (15, ["bn1"], "relu"),
    "hat_wrn_34_10": (15, ["batchnorm"], "relu"),
    SPARSE: (45, ["batchnorm"], "relu"),
}
every_family = pytest.mark.parametrize("name", sorted(FAMILIES))
# Its 45 blocks take time and are those of another family.
most_families = pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {SPARSE}))
X = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 1, 0])


@functools.cache
def made(name: str) -> models.PixelModel:
    """A model as after training: the batch norms know their maps, so that a signal gets through."""
    model = FAMILIES[name]()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(8, 1, 64, 64, generator=torch.Generator().manual_seed(1)))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    return robust.set_alpha(model, 0.1) if name == SPARSE else model


def base(name: str) -> models.PixelModel:
    return copy.deepcopy(made(name))


def step(model: nn.Module) -> None:
    """One step of training."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model.train()(X), Y).backward()
    optimizer.step()
    model.eval()


@every_family
def test_the_body_is_the_models_own_and_its_layers_are_known(name):
    model, (count, _, last) = base(name).eval(), EXPECTED[name]
    before, seen, ran = kept(model), [], []
    transferred = models.with_head(model, num_classes=3, seed=4).eval()
    assert torch.equal(transferred.normalize(X), model.normalize(X))
    assert models.last_map_layer(model) == f"backbone.{last}"
    assert models.last_map_layer(transferred) == f"backbone.body.{last}"
    model.get_submodule(f"backbone.{last}").register_forward_hook(lambda *c: seen.append(c[2]))
    names = models.blocks(model)
    for block in names:
        layer = model.get_submodule(block)
        layer.register_forward_hook(lambda _, __, y, block=block: ran.append((block, y.ndim)))
    model(X)
    assert ran == [(block, 4) for block in names] and len(names) == count
    assert [block.replace("body.", "") for block in models.blocks(transferred)] == names
    features = F.adaptive_avg_pool2d(seen[0], 4 if name == "cnn" else 1).flatten(1)
    features = F.relu(model.backbone.hidden(features)) if name == "cnn" else features
    torch.testing.assert_close(transferred.features(X), features)
    assert torch.equal(transferred(X), transferred.head(transferred.features(X)))
    nn.init.ones_(next(transferred.backbone.body.parameters()))
    assert equal(kept(model), before) and all(p.requires_grad for p in model.parameters())


@most_families
def test_a_training_step_moves_the_head_and_the_last_blocks_that_were_unfrozen(name):
    count, tail, _ = EXPECTED[name]
    model = models.with_head(base(name), dropout=0.3)
    body = model.backbone.body
    before, head = kept(body), kept(model.head)
    step(model)
    assert equal(kept(body), before) and not equal(kept(model.head), head)
    assert not any(module.training for module in model.train().backbone.body.modules())

    for number in (count, 2, 1):
        assert models.unfreeze(model, number) is model
        last = [block.removeprefix("backbone.body.") for block in models.blocks(model)[-number:]]
        live = tuple(f"{layer}." for layer in (*last, *tail))
        learning = {key for key, p in body.named_parameters() if p.requires_grad}
        assert learning == {key for key, _ in body.named_parameters() if key.startswith(live)}
    step(model)
    moved = {key for key, value in kept(body).items() if not torch.equal(value, before[key])}
    assert all(key.startswith(live) for key in moved) and learning <= moved
    assert any("running_mean" in key for key in moved)
    head = kept(model.head)
    models.unfreeze(model, "all")
    assert all(p.requires_grad for p in model.parameters()) and equal(kept(model.head), head)
    # What would have happened: the statistics drift in one pass, without any trained weight.
    before = kept(body)
    nn.Module.train(body.requires_grad_(False))
    model(X)
    assert not equal(kept(body), before)


@pytest.mark.parametrize("name", ["cnn", "mobilenet_v2", "standard_wrn_28_10", "resnet50_v2"])
def test_a_saved_model_comes_back_with_its_frozen_parts(name, tmp_path):
    options = dict(head="mlp", hidden=8, num_classes=3, dropout=0.2, unfrozen=1)
    model = models.with_head(base(name), **options).eval()
    again = models.load(models.save(model, tmp_path / "model.pt", meta={}))
    assert equal(kept(again), kept(model)) and again.recipe == model.recipe
    assert torch.equal(again(X), model(X))
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key, p in again.named_parameters() if p.requires_grad} == trains
    assert again.train().backbone.live == model.backbone.live != ()


def test_the_head_comes_from_the_seed_and_replaces_an_old_one():
    torch.manual_seed(5)
    model, state = base("hat_wrn_34_10"), torch.get_rng_state()
    a, b, c = (kept(models.with_head(model, seed=seed).head) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and equal(a, b) and not equal(a, c)
    first = models.with_head(model, head="mlp", hidden=8, dropout=0.4, unfrozen=2).eval()
    kinds = [nn.Dropout, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in first.head] == kinds and first.head[4].p == 0.4
    second = models.with_head(first, num_classes=5).eval()
    assert [type(layer) for layer in second.head] == [nn.Dropout, nn.Linear]
    assert second(X).shape == (4, 5) and torch.equal(second.features(X), first.features(X))
    assert not any(p.requires_grad for p in second.backbone.body.parameters())
    assert second.recipe["body"]["name"] == "hat_wrn_34_10" and first.recipe["unfrozen"] == 2
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):  # as the robust model itself
        second(2 * X)
    with pytest.raises(ValueError, match=r"\[0,15\], not 16; or 'all'"):
        models.unfreeze(second, 16)


@pytest.mark.parametrize("name", ["mobilenet_v2", "cnn", SPARSE])
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
    with pytest.raises(ValueError, match=r"unfreeze\(model, 0\)"):
        models.cached_features(models.unfreeze(model, 1), TensorDataset(X, Y))


def test_a_head_trained_on_cached_features_is_the_models_head(tmp_path):
    dark = 0.3 * torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    x, y = torch.cat([dark, 1 - dark]), torch.arange(48) // 24
    model = models.with_head(base("cnn"))
    body = kept(model.backbone.body)
    features = models.cached_features(model, TensorDataset(x, y), progress=False)
    options = dict(epochs=6, batch_size=8, lr=0.05, monitor="val_accuracy", progress=False)
    loss = objectives.cross_entropy()
    train.fit(model.head, loss, features, features, run_dir=tmp_path, **options)
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.95
    assert equal(kept(model.backbone.body), body)


@pytest.mark.parametrize("name", ["standard_wrn_28_10", SPARSE])
def test_an_epoch_on_attacked_images_leaves_the_frozen_body_bit_equal(name, tmp_path):
    model, data = models.with_head(base(name)), TensorDataset(X, Y)
    before, objective = (kept(model.backbone.body), kept(model.head)), objectives.cross_entropy()
    if name != SPARSE:
        objective = objectives.pgd_adversarial(eps=4 / 255)
    train.fit(model, objective, data, data, run_dir=tmp_path, epochs=1, batch_size=2, lr=0.1)
    assert equal(kept(model.backbone.body), before[0]) and not equal(kept(model.head), before[1])
    assert equal(kept(models.load(tmp_path / "best.pt")), kept(model))
