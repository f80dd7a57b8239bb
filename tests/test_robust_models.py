"""The robust models: architectures against the published sizes and keys, strict loading, MeanSparse, downloads."""

import copy
import functools
import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlia_utils import attacks, models
from dlia_utils.attacks.alpha import select_alpha
from dlia_utils.models import robust
from dlia_utils.models.mobilenet import IMAGENET_MEAN, IMAGENET_STD
from dlia_utils.models.pixel import fast_copy

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
NAMES = sorted(robust.SOURCES)
RAW = ("chen2024_wrn_34_20", "gairat_wrn_28_10", "huang2021_wrn_34_r", "standard_wrn_28_10")
SPARSE = ("meansparse_wrn_94_16", "meansparse_ra_wrn_70_16")


def tiny(name: str, **options) -> robust.RobustModel:
    return robust.create(name, width=1 / 16, **options).eval()


# ------------------------------------------------------------------ architectures at full size, without memory


def norm(key: str, channels: int) -> dict:
    per_channel = {
        f"{key}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")
    }
    return per_channel | {f"{key}.num_batches_tracked": ()}


def operator(key: str, channels: int) -> dict:
    scalars = {f"{key}.{part}": () for part in ("threshold", "flag_update_statistics", "batch_num")}
    return scalars | {f"{key}.running_mean": (channels,), f"{key}.running_var": (channels,)}


def excitation(key: str, channels: int, squeezed: int) -> dict:
    return {
        f"{key}.fc1.weight": (squeezed, channels, 1, 1),
        f"{key}.fc1.bias": (squeezed,),
        f"{key}.fc2.weight": (channels, squeezed, 1, 1),
        f"{key}.fc2.bias": (channels,),
    }


def trades_group(key: str, inputs: int, outputs: int, depth: int) -> dict:
    keys = {f"{key}.layer.0.convShortcut.weight": (outputs, inputs, 1, 1)}
    for i in range(depth):
        block, first = f"{key}.layer.{i}", inputs if i == 0 else outputs
        keys |= norm(f"{block}.bn1", first) | norm(f"{block}.bn2", outputs)
        keys |= {f"{block}.conv1.weight": (outputs, first, 3, 3)}
        keys |= {f"{block}.conv2.weight": (outputs, outputs, 3, 3)}
    return keys


def trades_keys(depth: int, factor: int) -> dict:
    keys, inputs = {"conv1.weight": (16, 3, 3, 3)}, 16
    for g, outputs in enumerate((16 * factor, 32 * factor, 64 * factor), start=1):
        keys |= trades_group(f"block{g}", inputs, outputs, depth)
        inputs = outputs
    return keys | norm("bn1", inputs) | {"fc.weight": (10, inputs), "fc.bias": (10,)}


def huang_keys() -> dict:
    keys, inputs = {"stem_conv.weight": (16, 3, 3, 3)}, 16
    for g, outputs in enumerate((320, 640, 512)):
        keys |= trades_group(f"blocks.{g}", inputs, outputs, 5)
        inputs = outputs
    return keys | norm("bn1", 512) | {"fc.weight": (10, 512), "fc.bias": (10,)}


def deepmind_keys(stem: int, widths, depths, *, sparse: bool = False, squeezed=()) -> dict:
    keys, inputs = {"init_conv.weight": (stem, 3, 3, 3)}, stem
    for g, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
        keys |= {f"layer.{g}.block.0.shortcut.weight": (outputs, inputs, 1, 1)}
        for i in range(depth):
            block = f"layer.{g}.block.{i}"
            keys |= norm(f"{block}.batchnorm_0", inputs) | norm(f"{block}.batchnorm_1", outputs)
            keys |= {f"{block}.conv_0.weight": (outputs, inputs, 3, 3)}
            keys |= {f"{block}.conv_1.weight": (outputs, outputs, 3, 3)}
            if squeezed:
                keys |= excitation(f"{block}.se", outputs, squeezed[g])
            if sparse:
                for place, channels in enumerate((inputs, outputs, outputs)):
                    keys |= operator(f"{block}.meansparse_{place}", channels)
            inputs = outputs
    if sparse:
        keys |= operator("meansparse_end", inputs)
    return keys | norm("batchnorm", inputs) | {"logits.weight": (10, inputs), "logits.bias": (10,)}


def ra_resnet_keys() -> dict:
    keys, inputs = {"stem.stem.stem.0.weight": (96, 3, 7, 7)} | norm("stem.stem.stem.1", 96), 96
    stages = zip((288, 576, 1120, 2160), (5, 8, 13, 1), (36, 72, 140, 270), strict=True)
    for k, (outputs, depth, group_width) in enumerate(stages, start=1):
        inner = outputs // 4
        for i in range(depth):
            block = f"stages.stage{k}.stage{k}-block{i}"
            keys |= {f"{block}.F.a.0.weight": (inner, inputs, 1, 1)}
            keys |= {f"{block}.F.b.0.weight": (inner, group_width, 3, 3)} | norm(
                f"{block}.F.b.1", inner
            )
            keys |= excitation(f"{block}.F.se", inner, round(inputs / 4))
            keys |= {f"{block}.F.c.0.weight": (outputs, inner, 1, 1)} | norm(
                f"{block}.F.c.1", outputs
            )
            if i == 0:
                keys |= {f"{block}.proj.0.weight": (outputs, inputs, 1, 1)} | norm(
                    f"{block}.proj.1", outputs
                )
            inputs = outputs
    return keys | {"fc.weight": (1000, 2160), "fc.bias": (1000,)}


def even(factor: int) -> tuple:
    return 16 * factor, 32 * factor, 64 * factor


RA = dict(stem=96, widths=(216, 432, 864), depths=(30, 31, 10), squeezed=(54, 108, 216))
# name: parameters, entries, keys, multiply-adds (1e9) of one image at a size; all as published
PUBLISHED = {
    "chen2024_wrn_34_20": (184_531_674, 191, trades_keys(5, 20), 26.6, 32),
    "gairat_wrn_28_10": (36_479_194, 155, trades_keys(4, 10), 5.2, 32),
    "huang2021_wrn_34_r": (68_116_698, 191, huang_keys(), 19.1, 32),
    "hat_wrn_34_10": (46_160_474, 191, deepmind_keys(16, even(10), (5,) * 3), 6.7, 32),
    "rebuffi2021_wrn_70_16": (266_796_506, 407, deepmind_keys(16, even(16), (11,) * 3), 38.8, 32),
    "standard_wrn_28_10": (36_479_194, 155, trades_keys(4, 10), 256.9, 224),
    "meansparse_wrn_94_16": (
        365_915_610,
        1231,
        deepmind_keys(16, even(16), (15,) * 3, sparse=True),
        None,
        0,
    ),
    "ra_wrn_70_16": (267_240_802, 1147, deepmind_keys(**RA), 241.9, 64),
    "ra_resnet_50": (26_143_228, 491, ra_resnet_keys(), 6.17, 224),
    "bartoldson2024_wrn_94_16": (
        365_915_610,
        551,
        deepmind_keys(16, even(16), (15,) * 3),
        213.0,
        64,
    ),
    "meansparse_ra_wrn_70_16": (267_240_802, 2217, deepmind_keys(**RA, sparse=True), None, 0),
}


@functools.cache
def full_size(name: str) -> nn.Module:
    source = robust.SOURCES[name]
    with torch.device("meta"):
        return source.build(source.classes, 1.0).eval()


def test_every_model_is_compared_with_what_was_published():
    assert sorted(PUBLISHED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parameters_entries_keys_and_shapes_are_the_published_ones(name):
    parameters, entries, keys, *_ = PUBLISHED[name]
    model = full_size(name)
    state = model.state_dict()
    assert (
        sum(p.numel() for p in model.parameters()) == parameters == robust.SOURCES[name].parameters
    )
    assert {key: tuple(value.shape) for key, value in state.items()} == keys
    assert len(state) == entries


@pytest.mark.parametrize(
    "name", sorted(set(NAMES) - set(SPARSE))
)  # these have their bases' convolutions
def test_multiply_adds_and_so_strides_and_groups_are_the_published_ones(name):
    *_, expected, size = PUBLISHED[name]
    model, total = full_size(name), []

    def count(layer, _, output):
        total.append(output.numel() * layer.weight[0].numel())

    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in convolutions]
    model(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    assert sum(total) / 1e9 == pytest.approx(expected, abs=0.06)


def test_gairats_file_carries_its_first_block_twice():
    active, twin = full_size("gairat_wrn_28_10"), full_size("gairat_wrn_28_10").block1
    both = (active, twin)
    assert sum(p.numel() for module in both for p in module.parameters()) == 38_119_866
    assert sum(len(module.state_dict()) for module in both) == 204
    assert robust.SOURCES["gairat_wrn_28_10"].unused == ("sub_block1.", "block1.")


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ra_resnet_50", "bartoldson2024_wrn_94_16"}))
def test_the_published_file_size_is_that_of_the_weights_or_of_weights_and_optimiser(name):
    size = (
        sum(value.numel() * value.element_size() for value in full_size(name).state_dict().values())
        / 1e6
    )
    nested = {
        "standard_wrn_28_10": 146,
        "gairat_wrn_28_10": 159,
    }  # the optimiser repeats every parameter
    assert robust.SOURCES[name].megabytes == pytest.approx(size + nested.get(name, 0), abs=1)


def test_the_counts_of_operators_and_the_activations():
    for name, count in zip(SPARSE, (136, 214), strict=True):
        assert sum(isinstance(m, robust.MeanSparse) for m in full_size(name).modules()) == count
    for name in NAMES:
        model = full_size(name)
        assert not any(getattr(module, "inplace", False) for module in model.modules())
        assert type(last_activation(model)) is (nn.ReLU if name in RAW else nn.SiLU)
        momentum = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        assert momentum == ({0.01} if "ra_wrn" in name else {0.1})


def last_activation(backbone: nn.Module) -> nn.Module:
    return backbone.stages[-1][-1].act if hasattr(backbone, "stages") else backbone.relu


# ------------------------------------------------------------------ what the networks compute


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """Batch norms as after training, so that no test passes because they do nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | robust.MeanSparse):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
        if isinstance(module, robust.MeanSparse):
            module.threshold.fill_(0.2)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_any_size_gives_one_row_per_image_and_the_pooled_mean(name):
    model, maps = randomised(tiny(name, num_classes=3)), []
    last_activation(model.backbone).register_forward_hook(lambda *call: maps.append(call[2]))
    x = torch.rand(2, 1, 64, 47)
    logits, features = model(x), model.features(x)
    assert maps[0].shape[2:] == ((2, 2) if name == "ra_resnet_50" else (16, 12))
    assert logits.shape == (2, 3)
    torch.testing.assert_close(features, maps[0].flatten(2).mean(2))
    torch.testing.assert_close(logits, model.head(maps[0].flatten(2).mean(2)))


def test_stride_two_pads_right_and_below_and_the_odd_size_on_all_sides():
    block = robust.nets.DeepMindBlock(1, 1, 2, first=True, sparse=False, squeeze=False).eval()
    block.batchnorm_0, block.relu_0, block.batchnorm_1, block.relu_1 = (
        nn.Identity() for _ in range(4)
    )
    kernel = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    block.conv_0.weight.data.copy_(kernel)
    nn.init.zeros_(block.shortcut.weight)
    block.conv_1.weight.data.copy_(F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1)))  # the identity
    corner = torch.zeros(1, 1, 4, 4)
    corner[0, 0, 0, 0] = 1.0
    assert (
        block(corner)[0, 0, 0, 0] == kernel[0, 0, 0, 0]
    )  # symmetric padding would show the centre, 5
    assert F.conv2d(corner, kernel, stride=2, padding=1)[0, 0, 0, 0] == 5
    far = torch.zeros(1, 1, 4, 4)
    far[0, 0, 3, 3] = 1.0
    assert block(far)[0, 0, 1, 1] == kernel[0, 0, 1, 1]
    odd = torch.rand(1, 1, 5, 5)
    torch.testing.assert_close(block(odd), F.conv2d(odd, kernel, stride=2, padding=1))


def test_the_blocks_shortcuts_take_the_activated_input_or_the_raw_one():
    block = randomised(robust.nets.TradesBlock(4, 8, 2, first=True)).eval()
    x = torch.rand(1, 4, 6, 6) - 0.5
    a = F.relu(block.bn1(x))
    branch = block.conv2(F.relu(block.bn2(block.conv1(a))))
    torch.testing.assert_close(block(x), block.convShortcut(a) + branch)
    block = randomised(robust.nets.TradesBlock(4, 4, 1, first=False)).eval()
    branch = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x))))))
    torch.testing.assert_close(block(x), x + branch)


def test_squeeze_excitation_scales_the_branch_alone():
    options = dict(first=False, sparse=False)
    block = randomised(robust.nets.DeepMindBlock(8, 8, 1, squeeze=True, **options)).eval()
    plain = robust.nets.DeepMindBlock(8, 8, 1, squeeze=False, **options).eval()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("se.")})
    nn.init.zeros_(block.se.fc2.weight)
    nn.init.zeros_(block.se.fc2.bias)
    x = torch.rand(2, 8, 5, 5)
    torch.testing.assert_close(block(x) - x, 0.5 * (plain(x) - x))


def test_meansparse_stands_before_the_activations_and_after_the_sum():
    block = robust.nets.DeepMindBlock(4, 4, 1, first=False, sparse=True, squeeze=False)
    randomised(block).eval()
    x = torch.rand(2, 4, 6, 6)
    a = F.silu(block.meansparse_0(block.batchnorm_0(x)))
    h = block.conv_1(F.silu(block.meansparse_1(block.batchnorm_1(block.conv_0(a)))))
    torch.testing.assert_close(block(x), block.meansparse_2(x + h))


# ------------------------------------------------------------------ the door


@pytest.mark.parametrize("name", NAMES)
def test_pixels_go_in_and_the_model_normalises_as_its_authors_did(name):
    model = randomised(tiny(name))
    x = torch.rand(2, 1, 16, 16)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if name == "ra_resnet_50":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif name not in RAW:
        mean, std = CIFAR_MEAN, CIFAR_STD
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    torch.testing.assert_close(model(x), model.backbone((x.expand(-1, 3, -1, -1) - mean) / std))


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_values_outside_the_door_are_refused(value):
    x = torch.rand(1, 3, 16, 16)
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"\[0, 1\].*owns its mean"):
        tiny("hat_wrn_34_10")(x)
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        tiny("hat_wrn_34_10")(torch.rand(1, 2, 16, 16))


# ------------------------------------------------------------------ create, list, save


def test_the_seed_decides_and_the_callers_random_stream_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (tiny("standard_wrn_28_10", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "wrn"}, "unknown robust model 'wrn'; known: chen2024"),
        ({"width": 0}, "width must be positive"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"pretrained": "public", "width": 0.5}, "width 1, not 0.5"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        robust.create(**{"name": "hat_wrn_34_10", **options})


def test_the_list_tells_papers_ids_licences_and_addresses():
    table = robust.list()
    assert sorted(table.index) == NAMES
    assert len(table.index) == 11
    assert (table[["paper", "licence", "urls", "dataset"]] != "").all(axis=None)
    assert table.loc["rebuffi2021_wrn_70_16", "licence"] == "Apache-2.0"
    assert "1-IbKAGtp79tAEm59N0i8QMvMZ3nxSD2-" in table.loc["chen2024_wrn_34_20", "urls"]
    assert table.loc["ra_wrn_70_16", "urls"].startswith(
        "https://huggingface.co/poloclub/robust-principles/"
    )
    bases = {
        "meansparse_wrn_94_16": "bartoldson2024_wrn_94_16",
        "meansparse_ra_wrn_70_16": "ra_wrn_70_16",
    }
    for sparse, base in bases.items():  # what the adaptive attack showed
        assert table.loc[sparse, "adaptive"] < table.loc[base, "robust"] < 100
    assert (
        not table.loc["chen2024_wrn_34_20", "normalises"]
        and table.loc["hat_wrn_34_10", "normalises"]
    )


@pytest.mark.parametrize("name", ["ra_resnet_50", *SPARSE[:1]])
def test_a_saved_model_comes_back_with_alpha_and_a_folded_copy_agrees(name, tmp_path):
    model = randomised(tiny(name, num_classes=3))
    again = models.load(models.save(model, tmp_path / "model.pt", meta={}))
    x = torch.rand(2, 3, 16, 16)
    assert isinstance(again, robust.RobustModel) and torch.equal(again(x), model(x))
    torch.testing.assert_close(fast_copy(model)(x), model(x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ strict loading


def published(name: str, classes: int | None = None) -> dict:
    """A synthetic public state dict, narrow as the tests' models."""
    source = robust.SOURCES[name]
    state = randomised(
        tiny(name, num_classes=classes or source.classes, seed=7)
    ).backbone.state_dict()
    if name == "gairat_wrn_28_10":
        state |= {
            f"sub_{key}": value + 1 for key, value in state.items() if key.startswith("block1.")
        }
    if name == "ra_resnet_50":
        state |= {
            "normalization.mean": torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1),
            "normalization.std": torch.tensor(IMAGENET_STD).view(1, 3, 1, 1),
        }
    return state


def load(name: str, content, tmp_path, **options) -> robust.RobustModel:
    torch.save(content, tmp_path / "public.pt")
    return tiny(name, pretrained=tmp_path / "public.pt", **options)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_but_the_head_is_loaded(name, tmp_path, caplog):
    state = published(name)
    with caplog.at_level("INFO", "dlia_utils"):
        model = load(name, state, tmp_path)
    own, report = model.backbone.state_dict(), model.load_report
    head = [key for key in own if key.startswith(("fc.", "logits."))]
    assert len(head) == 2 and all(
        torch.equal(own[key], state[key]) for key in own if key not in head
    )
    assert own[head[0]].shape[0] == 2 and not any(
        value.is_meta for value in model.state_dict().values()
    )
    assert all(p.requires_grad for p in model.parameters())
    assert report.matched == report.entries == len(own) - 2
    assert report.head == "drawn anew" and report.container == "bare" and report.prefix == ""
    assert report.unused == (49 if "gairat" in name else 0)
    assert report.normalisation == (2 if name == "ra_resnet_50" else 0)
    assert report.bytes == (tmp_path / "public.pt").stat().st_size
    assert report.sha256 == hashlib.sha256((tmp_path / "public.pt").read_bytes()).hexdigest()
    assert (
        f"{report.matched} of {report.entries}" in caplog.text and str(tmp_path) not in caplog.text
    )
    if name == "ra_resnet_50":
        assert len(state) == 493  # as published


def parallel(state: dict, prefix: str = "module.") -> dict:
    return {prefix + key: value for key, value in state.items()}


CONTAINERS = {
    "state_dict": lambda s: {"state_dict": s},
    "model_state": lambda s: {"model_state": s},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "last": lambda s: {"last": s},
    "module.": parallel,
    "model.": lambda s: parallel(s, "model."),
    "module.model.": lambda s: parallel(s, "module.model."),
    "optimiser": lambda s: {
        "epoch": 90,
        "best_prec1": np.float64(0.93),
        "state_dict": parallel(s),
        "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).state_dict(),
    },
}


@pytest.mark.parametrize(
    "name, style",
    [*(("gairat_wrn_28_10", style) for style in CONTAINERS), ("ra_resnet_50", "optimiser")],
)
def test_containers_prefixes_and_payloads_are_unwrapped(name, style, tmp_path):
    state = published(name)
    model = load(name, CONTAINERS[style](state), tmp_path)
    own = model.backbone.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in own if not key.startswith("fc."))
    report = model.load_report
    assert report.container == {"optimiser": "state_dict"}.get(
        style, style if "." not in style else "bare"
    )
    assert report.prefix == {"optimiser": "module."}.get(style, style if "." in style else "")
    assert report.payload == (("epoch", "best_prec1", "optimizer") if style == "optimiser" else ())


@pytest.mark.parametrize("classes, head", [(10, "file"), (3, "drawn anew"), (None, "drawn anew")])
def test_the_head_is_the_files_if_it_fits_else_drawn_from_the_seed(classes, head, tmp_path):
    state = published("hat_wrn_34_10", classes)
    if classes is None:  # a file without a head
        state = {key: value for key, value in state.items() if not key.startswith("logits.")}
    model = load("hat_wrn_34_10", state, tmp_path, num_classes=10, seed=3)
    assert model.load_report.head == head
    if head == "file":
        assert torch.equal(model.head.weight, state["logits.weight"])
    again = load("hat_wrn_34_10", state, tmp_path, num_classes=10, seed=3)
    assert torch.equal(model.head.weight, again.head.weight)
    other = load("hat_wrn_34_10", state, tmp_path, num_classes=10, seed=4)
    assert torch.equal(model.head.weight, other.head.weight) == (head == "file")


def test_batch_counters_may_be_missing(tmp_path):
    state = published("standard_wrn_28_10")
    less = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    model = load("standard_wrn_28_10", less, tmp_path)
    assert model.load_report.counters == 25 == len(state) - len(less)
    assert model.load_report.matched == 155 - 2 - 25 and "25 batch counters missing" in str(
        model.load_report
    )
    assert torch.equal(model.backbone.bn1.num_batches_tracked, torch.tensor(0))


def test_the_block_that_gairat_never_runs_changes_nothing(tmp_path):
    state, x = published("gairat_wrn_28_10"), torch.rand(2, 3, 32, 32)
    before = load("gairat_wrn_28_10", state, tmp_path)(x)
    state |= {
        k: torch.rand(v.shape) for k, v in state.items() if "sub" in k and v.is_floating_point()
    }
    assert torch.equal(load("gairat_wrn_28_10", state, tmp_path)(x), before)


def changed(state: dict, **entries) -> dict:
    """`state` with entries replaced, or left out where the value is None."""
    state = {**state, **entries}
    return {key: value for key, value in state.items() if value is not None}


def test_what_does_not_fit_is_refused_with_the_keys(tmp_path):
    name, first = "standard_wrn_28_10", "block1.layer.0.conv1.weight"
    state = published(name)
    broken = state["bn1.weight"].clone()
    broken[0] = float("nan")
    ones = {
        key: torch.ones_like(value) for key, value in state.items() if key.endswith("running_var")
    }
    half = {f"module.{k}" if i % 2 else k: v for i, (k, v) in enumerate(state.items())}
    for content, message in [
        (changed(state, **{first: None}), f"152 of 153 entries matched.: missing {first}"),
        (changed(state, extra=torch.zeros(1)), "unknown extra"),
        (changed(state, **{first: torch.zeros(1, 2)}), rf"{first}: \(1, 2\) in the file"),
        (parallel(state, "net."), "0 of 128 entries matched.*; and .* more"),
        (half, "does not fit standard_wrn_28_10"),
        (published("gairat_wrn_28_10"), "unknown sub_block1"),
        (published("hat_wrn_34_10"), "does not fit standard_wrn_28_10"),
        (changed(state, mean=torch.tensor(CIFAR_MEAN)), "mean is .* another model's file"),
        (changed(state, **{"bn1.weight": broken}), "NaN or infinite values, first in bn1.weight"),
        (changed(state, **ones), "never trained"),
        ({"state_dict": state, "last": state}, "several sets of weights"),
        ({"weights": list(state.values())}, "holds no state dict"),
        (list(state.values()), "holds no state dict"),
        (
            {"state_dict": state, "model": SimpleNamespace()},
            "weights_only=True .it holds a types.Simple",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            load(name, content, tmp_path)
    with pytest.raises(ValueError, match="sub_block1.*0 of 49 entries found"):
        load("gairat_wrn_28_10", state, tmp_path)
    with pytest.raises(ValueError, match="unknown .*meansparse"):
        load("bartoldson2024_wrn_94_16", published("meansparse_wrn_94_16"), tmp_path)
    wrong = changed(published("ra_resnet_50"), **{"normalization.mean": torch.zeros(1, 3, 1, 1)})
    with pytest.raises(ValueError, match="normalization.mean is"):
        load("ra_resnet_50", wrong, tmp_path)
    with pytest.raises(FileNotFoundError, match="correct `pretrained=`"):
        tiny(name, pretrained=tmp_path / "nowhere.pt")


def test_truncated_and_foreign_files_are_told_apart_from_checkpoints(tmp_path):
    path, name = tmp_path / "public.pt", "standard_wrn_28_10"
    torch.save(published(name), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="MB, but the weights .* take .* truncated download"):
        tiny(name, pretrained=path)
    path.write_bytes(whole[:-2000])  # long enough for the weights, but its directory is gone
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        tiny(name, pretrained=path)
    path.write_bytes(b"<html>quota exceeded</html>" * 60_000)
    with pytest.raises(ValueError, match="no checkpoint"):
        tiny(name, pretrained=path)


# ------------------------------------------------------------------ downloads, with clients of our own


@pytest.fixture
def offered(tmp_path):
    torch.save(published("standard_wrn_28_10"), tmp_path / "offered.pt")
    return tmp_path / "offered.pt"


@pytest.fixture
def gdown(monkeypatch, offered):
    """A gdown that gives `offered`; returns the addresses it was asked for."""
    asked = []

    def give(*, url, output, quiet):
        asked.append(url)
        with open(output, "wb") as file:
            file.write(offered.read_bytes())
        return output

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=give))
    return asked


def narrow(monkeypatch, name: str, **changes) -> None:
    """Let the full-size name build the tests' narrow model, so that a public file can be small."""
    source = robust.SOURCES[name]
    fields = {**vars(source), "build": lambda k, _: source.build(k, 1 / 16), **changes}
    monkeypatch.setitem(robust.SOURCES, name, robust.Source(**fields))


@pytest.mark.parametrize(
    "given", ["public", "https://drive.google.com/file/d/1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC/view"]
)
def test_a_file_on_google_drive_is_fetched_once_by_its_id(given, gdown, monkeypatch, tmp_path):
    narrow(monkeypatch, "standard_wrn_28_10", megabytes=0.5)
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        model = robust.create("standard_wrn_28_10", pretrained=given)
    assert gdown == ["https://drive.google.com/uc?id=1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC"]
    assert model.load_report.entries == 153
    (file,) = (tmp_path / "cache" / "checkpoints").iterdir()
    assert (
        file.name
        == "standard_wrn_28_10-1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC.pt"
        == model.load_report.file
    )


def test_a_short_file_is_not_kept(gdown, tmp_path):
    with pytest.raises(RuntimeError, match="of 292 MB: a truncated download.*pretrained="):
        robust.download("standard_wrn_28_10", folder=tmp_path / "files")
    assert not list((tmp_path / "files").iterdir())


def test_hugging_face_comes_first_and_the_next_place_is_tried(
    monkeypatch, offered, gdown, tmp_path
):
    asked = []

    def hub(*, repo_id, filename, revision):
        asked.append((repo_id, filename, revision))
        if repo_id == "poloclub/robust-principles":
            raise OSError("404\nand a long story")
        return str(offered)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hub))
    narrow(monkeypatch, "ra_wrn_70_16", megabytes=None)
    assert robust.download("ra_wrn_70_16", folder=tmp_path) == offered and not gdown
    file = "ra_wrn70_16_cifar10.pt"
    assert asked == [
        (f"poloclub/{repo}", file, "main") for repo in ("robust-principles", "Ra-Principles")
    ]
    url = "https://huggingface.co/someone/else/blob/v1/cifar10/a.pt"
    assert robust.download("ra_wrn_70_16", url=url) == offered
    assert asked[-1] == ("someone/else", "cifar10/a.pt", "v1")


def test_without_clients_or_network_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gdown", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError) as caught:
        robust.create("ra_wrn_70_16", pretrained="public")
    for part in (
        "needs gdown: python -m pip install gdown",
        "needs huggingface_hub",
        "pretrained=",
    ):
        assert part in str(caught.value)

    def offline(**_):
        raise ConnectionError("no route to host")

    for give, reason in [
        (offline, "ConnectionError: no route"),
        (lambda **_: None, "Google Drive gave no"),
    ]:
        monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=give))
        with pytest.raises(RuntimeError, match=f"{reason}.*internet"):
            robust.download("chen2024_wrn_34_20", folder=tmp_path)
    with pytest.raises(ValueError, match="unknown address"):
        robust.create("chen2024_wrn_34_20", pretrained="https://example.org/a.pt")


# ------------------------------------------------------------------ MeanSparse


def sparse(alpha: float, mean=(0.0, 1.0), variance=(1.0, 4.0)) -> robust.MeanSparse:
    module = robust.MeanSparse(2)
    module.running_mean.copy_(torch.tensor(mean))
    module.running_var.copy_(torch.tensor(variance))
    return robust.set_alpha(module, alpha)


def test_values_near_the_mean_become_it_strictly_and_alpha_zero_is_the_identity():
    x = torch.tensor([[-0.5, -0.4, 0.0, 0.5, 0.6], [0.0, 0.1, 1.5, 2.0, -3.0]]).view(1, 2, 1, 5)
    expected = torch.tensor([[-0.5, 0.0, 0.0, 0.5, 0.6], [0.0, 1.0, 1.0, 2.0, -3.0]]).view(
        1, 2, 1, 5
    )
    assert torch.equal(sparse(0.5)(x), expected)
    assert torch.equal(sparse(0.0)(x), x)
    assert sparse(0.5)(x.half()).dtype == torch.half


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


def test_an_attack_through_the_operator_sees_more_than_one_with_exact_gradients():
    model = robust.set_alpha(
        randomised(tiny("meansparse_wrn_94_16")), 100.0
    )  # everything becomes the mean
    x, y = torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    x_in = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(model(x_in)[:, 0].sum(), x_in)
    before = copy.deepcopy(model.state_dict())
    with robust.straight_through(model):
        (through,) = torch.autograd.grad(model(x_in)[:, 0].sum(), x_in)
        result = attacks.pgd(model, x, y, eps=4 / 255, steps=1, stop_when_fooled=False)
    assert not exact.any() and bool((through != 0).any())
    assert result.linf.max() <= 4 / 255 + 1e-6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Two(nn.Module):
    """Two operators in a row, of which the second sees what the first lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = sparse(3.0), sparse(3.0)

    def forward(self, x):
        return self.b(2 * self.a(x))


@pytest.mark.parametrize("pooled", [True, False])
def test_statistics_are_those_of_the_images_before_any_operator(pooled):
    torch.manual_seed(0)
    batches = [torch.randn(4, 2, 5, 5) + 2, 3 * torch.randn(4, 2, 5, 5), torch.randn(1, 2, 5, 5)]
    model = Two().train()
    model.a.eval()
    assert robust.recompute_statistics(model, iter(batches), pooled=pooled) is model
    values = torch.cat([b.transpose(0, 1).flatten(1) for b in batches], dim=1)
    mean, variance = values.mean(1), values.var(1)
    if not pooled:
        mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
        variance = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(model.a.running_mean, mean)
    torch.testing.assert_close(model.a.running_var, variance)
    torch.testing.assert_close(model.b.running_mean, 2 * mean)
    torch.testing.assert_close(model.b.running_var, 4 * variance)
    assert model.a.threshold == model.b.threshold == 3 and model.a.batch_num == 3
    assert model.b.training and not model.a.training
    assert not model.a._forward_pre_hooks


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    for batches, message in [
        ([], "holds no images"),
        ([torch.full((1, 2, 2, 2), float("nan"))], "not finite"),
    ]:
        model = Two()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            robust.recompute_statistics(model, batches)
        state = model.state_dict()
        assert all(torch.equal(state[key], before[key]) for key in before)
        assert model.training and not model.a._forward_pre_hooks


def test_statistics_of_a_whole_model_and_what_has_no_operator():
    model = randomised(tiny("meansparse_wrn_94_16"))
    norms = model.backbone.batchnorm.running_mean.clone()
    robust.recompute_statistics(model, [torch.rand(2, 1, 16, 16)] * 2)
    assert model.backbone.meansparse_end.threshold == pytest.approx(0.2)
    assert model.backbone.meansparse_end.batch_num == 2
    assert torch.equal(model.backbone.batchnorm.running_mean, norms)
    plain = tiny("hat_wrn_34_10")
    for call in (
        lambda: robust.set_alpha(plain, 0.1),
        lambda: robust.recompute_statistics(plain, []),
        lambda: robust.straight_through(plain).__enter__(),
    ):
        with pytest.raises(ValueError, match="no MeanSparse operator"):
            call()
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number >= 0"):
            robust.set_alpha(model, alpha)


# ------------------------------------------------------------------ alpha on validation images


def separable(n: int = 24) -> tuple:
    """Images whose class is their brightness, a net that sees it, and an operator on the feature between."""
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
        model[-1].bias.copy_(
            torch.tensor([2.0, -2.0])
        )  # zero at grey 0.5, midway between the classes
    return model, x, y


def test_alpha_is_chosen_by_the_worse_gradient_among_those_that_keep_the_clean_accuracy():
    model, x, y = separable()
    train_images = x + 0.01
    options = dict(eps=8 / 255, steps=5, progress=False)
    table = select_alpha(model, [train_images], x, y, grid=(0.3, 1.0, 8.0), **options)
    mean, variance = train_images.mean(), train_images.var()
    torch.testing.assert_close(model[1].running_mean[0], mean)  # of the training images, not of x
    torch.testing.assert_close(model[1].running_var[0], variance)
    assert table.alpha.tolist() == [0.0, 0.3, 1.0, 8.0]
    assert (table.robust <= table[["exact", "straight_through"]].min(axis=1) + 1e-9).all()
    assert table.exact[0] == table.straight_through[0] == table.robust[0]
    assert table.clean[3] == 0.5  # everything became the mean, which says one class
    allowed = table[table.clean >= table.clean[0] - 0.01]
    assert not allowed.index.isin([3]).any()
    (chosen,) = table.index[table.chosen]
    assert chosen in allowed.index and table.robust[chosen] == allowed.robust.max()
    assert chosen == allowed.index[allowed.robust == allowed.robust.max()][0]
    assert (
        model[1].threshold == pytest.approx(table.alpha[chosen]) and not model[1].straight_through
    )
    # Each number again, by the attack itself.
    for row in table.itertuples():
        robust.set_alpha(model, row.alpha)
        attack = functools.partial(attacks.pgd, model, x, y, eps=8 / 255, steps=5, loss="margin")
        exact = attack().success
        with robust.straight_through(model):
            through = attack().success
        assert row.clean == pytest.approx((model(x).argmax(1) == y).float().mean().item())
        assert row.exact == pytest.approx(1 - exact.float().mean().item())
        assert row.straight_through == pytest.approx(1 - through.float().mean().item())
        assert row.robust == pytest.approx(1 - (exact | through).float().mean().item())


def test_a_wide_limit_lets_a_blind_model_win_so_the_limit_matters():
    model, x, y = separable()
    options = dict(eps=40 / 255, steps=5, grid=(8.0,), progress=False)
    table = select_alpha(model, [x], x, y, max_clean_drop=1.0, **options)
    assert (
        table.chosen.tolist() == [False, True] and model[1].threshold == 8
    )  # robust, because constant
    table = select_alpha(model, [x], x, y, max_clean_drop=0.01, **options)
    assert table.chosen.tolist() == [True, False] and model[1].threshold == 0


def test_alpha_is_not_chosen_without_operators_images_or_a_grid(monkeypatch):
    model, x, y = separable()
    robust.set_alpha(model, 0.2)
    options = dict(eps=4 / 255, progress=False)
    for other, message in [
        (dict(model=tiny("hat_wrn_34_10")), "no MeanSparse"),
        (dict(train_batches=[]), "holds no images"),
        (dict(grid=(-0.1, 0.1)), "grid must hold"),
        (dict(grid=()), "grid must hold"),
        (dict(max_clean_drop=2), "max_clean_drop"),
        (dict(eps=8), "eps"),
    ]:
        call = dict(model=model, train_batches=[x], x_val=x, y_val=y, **options) | other
        with pytest.raises(ValueError, match=message):
            select_alpha(**call)
        assert model[1].threshold == pytest.approx(0.2)

    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dlia_utils.attacks.evaluate.robust", broken)
    with pytest.raises(KeyboardInterrupt):
        select_alpha(model, [x], x, y, **options)
    assert model[1].threshold == pytest.approx(0.2)
