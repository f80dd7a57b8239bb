"""The robust models: published sizes and keys, strict loading, downloads, MeanSparse."""

import copy
import functools
import hashlib
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harm import flipped
from test_cnn import equal, randomised, shapes
from torch import nn

from dlia_utils import attacks, models
from dlia_utils.attacks.alpha import select_alpha
from dlia_utils.models import PixelModel, robust
from dlia_utils.models.pixel import fast_copy
from dlia_utils.models.robust import nets, zoo

TABLE = robust.names()
NAMES = sorted(TABLE.index)
SPARSE, STANDARD, GAIRAT = "meansparse_wrn_94_16", "standard_wrn_28_10", "gairat_wrn_28_10"
every_model = pytest.mark.parametrize("name", NAMES)


def tiny(name: str, **options) -> PixelModel:
    return robust.create(name, width=1 / 16, **options).eval()


# ------------------------------------------------------------------ architectures, without memory

# name: entries, digest of their names and shapes, multiply-adds (1e9) of one image of a size; all
# as published
PUBLISHED = {
    "chen2024_wrn_34_20": (191, "b6267f14bec3", 26.6, 32),
    GAIRAT: (155, "a986efc73423", 5.2, 32),
    "huang2021_wrn_34_r": (191, "f8f498a5ff3a", 19.1, 32),
    "hat_wrn_34_10": (191, "8e4dfb9492e6", 6.7, 32),
    "rebuffi2021_wrn_70_16": (407, "f54e47a9ce72", 38.8, 32),
    STANDARD: (155, "a986efc73423", 256.9, 224),
    SPARSE: (1231, "a4fec17c8d46", 213.0, 64),
    "ra_wrn_70_16": (1147, "e399dc0031db", 241.9, 64),
}


@every_model
def test_parameters_keys_strides_and_file_sizes_are_the_published_ones(name):
    entries, keys, operations, size = PUBLISHED[name]
    with torch.device("meta"):
        model = zoo.NETWORKS[name][0](10, 1.0).eval()
    state, total = model.state_dict(), []
    assert sum(p.numel() for p in model.parameters()) == TABLE.parameters[name]
    assert len(state) == entries and shapes(model) == keys
    megabytes = sum(value.numel() * value.element_size() for value in state.values()) / 1e6
    optimiser = {STANDARD: 146, GAIRAT: 159}.get(name, 0)  # it repeats every parameter
    assert TABLE.megabytes[name] == pytest.approx(megabytes + optimiser, abs=1)

    for layer in [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]:
        layer.register_forward_hook(
            lambda m, _, output: total.append(output.numel() * m.weight[0].numel())
        )
    model(torch.empty(1, 3, size, size, device="meta"))
    assert sum(total) / 1e9 == pytest.approx(operations, abs=0.06)
    momentum = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momentum == ({0.01} if "ra_wrn" in name else {0.1})


@every_model
def test_any_size_gives_the_pooled_mean_of_pixels_normalised_as_the_authors_did(name):
    model, maps = randomised(tiny(name, num_classes=3)), []
    model.backbone.relu.register_forward_hook(lambda *call: maps.append(call[2]))
    x = torch.rand(2, 1, 64, 47)
    torch.testing.assert_close(model.features(x), maps[0].flatten(2).mean(2))
    torch.testing.assert_close(model(x), model.head(model.features(x)))
    assert maps[0].shape[2:] == (16, 12) and model(x).shape == (2, 3)
    raw = name in ("chen2024_wrn_34_20", GAIRAT, "huang2021_wrn_34_r", STANDARD)
    assert TABLE.normalises[name] == (not raw)
    mean = torch.tensor((0.0,) * 3 if raw else (0.4914, 0.4822, 0.4465)).view(1, 3, 1, 1)
    std = torch.tensor((1.0,) * 3 if raw else (0.2471, 0.2435, 0.2616)).view(1, 3, 1, 1)
    torch.testing.assert_close(model(x), model.backbone((x.expand(-1, 3, -1, -1) - mean) / std))


def test_stride_two_pads_right_and_below_and_the_odd_size_on_all_sides():
    block = nets.DeepMindBlock(1, 1, 2, first=True).eval()
    for name in ("batchnorm_0", "relu_0", "batchnorm_1", "relu_1"):
        setattr(block, name, nn.Identity())
    kernel = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    block.conv_0.weight.data.copy_(kernel)
    nn.init.zeros_(block.shortcut.weight)
    block.conv_1.weight.data.copy_(F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1)))  # the identity
    corner, far = torch.zeros(2, 1, 1, 4, 4)
    corner[0, 0, 0, 0] = far[0, 0, 3, 3] = 1.0
    assert block(corner)[0, 0, 0, 0] == kernel[0, 0, 0, 0]  # symmetric padding: the centre, 5
    assert block(far)[0, 0, 1, 1] == kernel[0, 0, 1, 1]
    odd = torch.rand(1, 1, 5, 5)
    torch.testing.assert_close(block(odd), F.conv2d(odd, kernel, stride=2, padding=1))


def test_the_blocks_compute_what_their_papers_draw():
    x = torch.rand(2, 4, 6, 6) - 0.5
    for outputs, stride, first in ((8, 2, True), (4, 1, False)):
        block = randomised(nets.TradesBlock(4, outputs, stride, first=first))
        a = F.relu(block.bn1(x))
        branch = block.conv2(F.relu(block.bn2(block.conv1(a))))
        torch.testing.assert_close(block(x), (block.convShortcut(a) if first else x) + branch)
    block = robust.set_alpha(nets.DeepMindBlock(4, 4, 1, first=False, sparse=True), 0.2)
    block = randomised(block)
    a = F.silu(block.meansparse_0(block.batchnorm_0(x)))
    h = block.conv_1(F.silu(block.meansparse_1(block.batchnorm_1(block.conv_0(a)))))
    torch.testing.assert_close(block(x), block.meansparse_2(x + h))
    block = randomised(nets.DeepMindBlock(4, 4, 1, first=False, squeeze=True))
    h = block.conv_1(F.silu(block.batchnorm_1(block.conv_0(F.silu(block.batchnorm_0(x))))))
    nn.init.zeros_(block.se.fc2.weight)
    nn.init.zeros_(block.se.fc2.bias)
    torch.testing.assert_close(block(x), x + 0.5 * h)  # it scales the branch alone


# ------------------------------------------------------------------ create and load


def test_the_door_the_seed_and_the_names():
    for value in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\].*owns its mean"):
            tiny("hat_wrn_34_10")(torch.full((1, 3, 16, 16), value))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (tiny(STANDARD, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(a, b) and not equal(a, c)
    with pytest.raises(ValueError, match="unknown robust model 'wrn'; known: chen2024"):
        robust.create("wrn")
    assert TABLE.adaptive[SPARSE] < TABLE.robust[SPARSE]


@pytest.mark.parametrize("name", ["ra_wrn_70_16", SPARSE])
def test_a_saved_model_comes_back_with_alpha_and_a_folded_copy_agrees(name, tmp_path):
    model = randomised(tiny(name, num_classes=3))
    if name == SPARSE:
        robust.set_alpha(model, 0.2)
    again = models.load(models.save(model, tmp_path / "model.pt", meta={}))
    x = torch.rand(2, 3, 16, 16)
    assert again.checked and torch.equal(again(x), model(x))
    torch.testing.assert_close(fast_copy(model)(x), model(x), rtol=1e-4, atol=1e-4)


def published(name: str, classes: int = 10) -> dict:
    """A synthetic public state dict, narrow as the tests' models."""
    state = randomised(tiny(name, num_classes=classes, seed=7)).backbone.state_dict()
    if name == GAIRAT:
        state |= {f"sub_{k}": value + 1 for k, value in state.items() if k.startswith("block1.")}
    return state


def load(name: str, content, tmp_path, **options) -> PixelModel:
    torch.save(content, tmp_path / "public.pt")
    return tiny(name, pretrained=tmp_path / "public.pt", **options)


def parallel(state: dict, prefix: str = "module.") -> dict:
    return {prefix + key: value for key, value in state.items()}


PACKED = {
    "bare": lambda s: s,
    "last": lambda s: {"last": s},
    "module.model.": lambda s: parallel(s, "module.model."),
    "optimiser": lambda s: {
        "best_prec1": np.float64(0.93),
        "state_dict": parallel(s),
        "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).state_dict(),
    },
    "mean": lambda s: {**s, "mean": torch.zeros(3), "std": torch.ones(3)},
    "counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize(
    "name, packed", [*((n, "bare") for n in NAMES), *((GAIRAT, style) for style in PACKED)]
)
def test_every_entry_but_the_head_is_loaded_however_the_file_is_packed(name, packed, tmp_path):
    state = published(name)
    model = load(name, PACKED[packed](state), tmp_path)
    own = model.backbone.state_dict()
    head = [key for key in own if key.startswith(("fc.", "logits."))]
    for key in own.keys() - set(head):
        assert torch.equal(own[key], state[key]) or "num_batches" in key
    assert own[head[0]].shape[0] == 2
    assert f"{len(own) - 2} of {len(own) - 2} entries; head drawn anew" in model.load_report
    assert str(tmp_path) not in model.load_report


def test_the_head_is_the_files_if_it_fits_else_drawn_from_the_seed(tmp_path):
    state = published("hat_wrn_34_10")
    model = load("hat_wrn_34_10", state, tmp_path, num_classes=10, seed=3)
    assert torch.equal(model.head.weight, state["logits.weight"])
    model = load("hat_wrn_34_10", state, tmp_path, num_classes=3, seed=3)
    drawn = tiny("hat_wrn_34_10", num_classes=3, seed=3)
    assert torch.equal(model.head.weight, drawn.head.weight)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    first = "block1.layer.0.conv1.weight"
    state = published(STANDARD)
    for content, message in [
        ({k: v for k, v in state.items() if k != first}, f"matched.: missing {first}"),
        (parallel(state, "net."), "0 of 155 entries matched.*; and .* more"),
        ({**state, "mean": torch.tensor([0.49, 0.48, 0.45])}, "normalises by mean"),
        ({**state, "bn1.weight": torch.full((40,), torch.nan)}, "NaN or infinite"),
        ({"state_dict": state, "model": functools.partial(int)}, "weights_only=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(STANDARD, content, tmp_path)
    path = tmp_path / "public.pt"
    torch.save(state, path)
    whole = path.read_bytes()
    for data in (whole[:-2000], flipped(whole), b"<html>quota exceeded</html>" * 60_000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="public.pt is damaged.*fetch it again"):
            tiny(STANDARD, pretrained=path)
    with pytest.raises(FileNotFoundError, match="correct `pretrained=`"):
        tiny(STANDARD, pretrained=tmp_path / "nowhere.pt")


def test_a_file_is_fetched_once_from_the_first_place_that_gives_it_whole(monkeypatch, tmp_path):
    asked = []

    def give(url, target, known, progress):
        asked.append((url, known))
        if "huggingface" in url:
            raise RuntimeError("invalid hash value")
        with open(target, "wb") as file:
            file.truncate(int(1e9 if len(asked) < 3 else 1.07e9))

    monkeypatch.setenv("DLIA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", give)
    monkeypatch.setattr(zoo.files, "sha256", lambda path: "0" * 64)  # a GB takes seconds
    told = iter([SimpleNamespace(etag="ab" * 32), SimpleNamespace(etag="cd" * 32)])
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: next(told))
    with pytest.raises(RuntimeError, match="internet.*pretrained=.*invalid hash.*of 1069.4 MB: tr"):
        robust.create("ra_wrn_70_16", pretrained="public")
    assert not list((tmp_path / "checkpoints").iterdir())
    paths = {robust.download("ra_wrn_70_16") for _ in range(2)}
    hub = "https://huggingface.co/poloclub/robust-principles/resolve/main/ra_wrn70_16_cifar10.pt"
    assert [asked[0], asked[2]] == [(hub, "ab" * 32), (hub, "cd" * 32)] and len(asked) == 4
    assert asked[1] == asked[3] and asked[1][0].endswith("id=1-6M8KHZdPmgqYkBSkdZQ2fLwp86ZQ9VU")
    assert asked[1][1] is None and paths == {tmp_path / "checkpoints/ra_wrn_70_16.pt"}


def test_a_file_that_is_no_longer_the_one_first_seen_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path))
    path = tmp_path / "checkpoints" / f"{STANDARD}.pt"
    path.parent.mkdir()
    path.write_bytes(b"first seen")
    first, record = hashlib.sha256(b"first seen").hexdigest(), path.with_name(f"{path.name}.sha256")
    assert robust.download(STANDARD) == robust.download(STANDARD) == path
    assert record.read_text() == f"{first}  {path.name}\n"
    path.write_bytes(b"First seen")
    now = hashlib.sha256(b"First seen").hexdigest()
    with pytest.raises(
        ValueError, match=f"{path} has the SHA-256 {now}, {record} says {first}: rem"
    ):
        robust.create(STANDARD, pretrained="public")
    record.write_text("")
    with pytest.raises(ValueError, match="says nothing: remove both"):
        robust.download(STANDARD)
    record.unlink()
    assert robust.download(STANDARD) == path and now in record.read_text()


# ------------------------------------------------------------------ MeanSparse


def sparse(alpha: float, mean=(0.0, 1.0), variance=(1.0, 4.0)) -> robust.MeanSparse:
    module = robust.MeanSparse(2)
    module.running_mean.copy_(torch.tensor(mean))
    module.running_var.copy_(torch.tensor(variance))
    return robust.set_alpha(module, alpha)


def test_values_near_the_mean_become_it_strictly_and_alpha_zero_is_the_identity():
    x = torch.tensor([[-0.5, -0.4, 0.0, 0.5, 0.6], [0.0, 0.1, 1.5, 2.0, -3.0]]).view(1, 2, 1, 5)
    near = torch.tensor([[-0.5, 0.0, 0.0, 0.5, 0.6], [0.0, 1.0, 1.0, 2.0, -3.0]]).view(1, 2, 1, 5)
    assert torch.equal(sparse(0.5)(x), near) and torch.equal(sparse(0.0)(x), x)
    assert sparse(0.5)(x.half()).dtype == torch.half
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        sparse(-0.1)
    with pytest.raises(ValueError, match="no MeanSparse operator"):
        robust.set_alpha(tiny("hat_wrn_34_10"), 0.1)


def test_the_exact_gradient_is_zero_inside_and_straight_through_it_is_one():
    module = sparse(0.5)
    x = torch.tensor([[-0.5, 0.1], [0.1, 9.0]]).view(1, 2, 1, 2).requires_grad_()
    (exact,) = torch.autograd.grad(module(x).sum(), x)
    assert exact.flatten().tolist() == [1, 0, 0, 1]
    plain = module(x)
    with robust.straight_through(module):
        through = module(x)
        (gradient,) = torch.autograd.grad(through.sum(), x)
    assert torch.equal(plain, through) and gradient.flatten().tolist() == [1, 1, 1, 1]
    with pytest.raises(KeyError), robust.straight_through(module):
        raise KeyError
    assert not module.straight_through


class Two(nn.Module):
    """Two operators in a row, of which the second sees what the first lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = sparse(3.0), sparse(3.0)

    def forward(self, x):
        return self.b(2 * self.a(x))


def test_statistics_are_those_of_the_images_before_any_operator():
    torch.manual_seed(0)
    batches = [torch.randn(4, 2, 5, 5) + 2, 3 * torch.randn(4, 2, 5, 5), torch.randn(1, 2, 5, 5)]
    model = Two().train()
    model.a.eval()
    assert robust.recompute_statistics(model, iter(batches)) is model
    values = torch.cat([b.transpose(0, 1).flatten(1) for b in batches], dim=1)
    mean, variance = values.mean(1), values.var(1)
    torch.testing.assert_close(model.a.running_mean, mean)
    torch.testing.assert_close(model.a.running_var, variance)
    torch.testing.assert_close(model.b.running_mean, 2 * mean)
    torch.testing.assert_close(model.b.running_var, 4 * variance)
    assert model.a.threshold == model.b.threshold == 3 and model.a.batch_num == 3
    assert model.b.training and not model.a.training and not model.a._forward_pre_hooks
    nan = torch.full((1, 2, 2, 2), float("nan"))
    for bad, message in (([], "holds no images"), ([nan], "not finite")):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            robust.recompute_statistics(model, bad)
        assert equal(model.state_dict(), before)


# ------------------------------------------------------------------ alpha on validation images


def separable(n: int = 24) -> tuple:
    """Images whose class is their brightness, a net that sees it, and an operator between."""
    torch.manual_seed(0)
    x = torch.rand(n, 1, 2, 2) * 0.2 + 0.3
    y = torch.arange(n) % 2
    x[y == 1] += 0.2
    convolution = nn.Conv2d(1, 1, 1)
    model = nn.Sequential(convolution, robust.MeanSparse(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        convolution.bias.zero_()
        model[-1].weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        model[-1].bias.copy_(torch.tensor([2.0, -2.0]))  # zero at grey 0.5, between the classes
    return model, x, y


def test_alpha_is_chosen_by_the_worse_gradient_among_those_that_keep_the_clean_accuracy():
    model, x, y = separable()
    train_images = x + 0.01
    options = dict(eps=8 / 255, steps=5, progress=False)
    table = select_alpha(model, [train_images], x, y, grid=(0.3, 1.0, 8.0), **options)
    torch.testing.assert_close(model[1].running_mean[0], train_images.mean())  # not of x
    torch.testing.assert_close(model[1].running_var[0], train_images.var())
    assert table.alpha.tolist() == [0.0, 0.3, 1.0, 8.0]
    assert table.clean[3] == 0.5  # everything became the mean, which says one class
    allowed = table[table.clean >= table.clean[0] - 0.01]
    (chosen,) = table.index[table.chosen]
    assert (
        chosen == allowed.index[allowed.robust == allowed.robust.max()][0]
        and 3 not in allowed.index
    )
    assert model[1].threshold == pytest.approx(table.alpha[chosen])
    for row in table.itertuples():  # each number again, by the attack itself
        robust.set_alpha(model, row.alpha)
        attack = functools.partial(attacks.pgd, model, x, y, eps=8 / 255, steps=5, loss="margin")
        exact = attack().success
        with robust.straight_through(model):
            through = attack().success
        assert row.clean == pytest.approx((model(x).argmax(1) == y).float().mean().item())
        assert row.exact == pytest.approx(1 - exact.float().mean().item())
        assert row.straight_through == pytest.approx(1 - through.float().mean().item())
        assert row.robust == pytest.approx(1 - (exact | through).float().mean().item())
