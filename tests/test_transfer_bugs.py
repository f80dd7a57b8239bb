"""Two bugs of the original TB study, held out: scrambled features and a frozen body that drifts."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dlia_utils import models, objectives, train
from dlia_utils.explain import activations
from dlia_utils.models import robust

NAMES = sorted(robust.SOURCES)
WIDTH = 1 / 32
SIZE = 72  # as the sizes 64 to 95, it leaves the published window 2 x 2 places
every_model = pytest.mark.parametrize("name", NAMES)


def films(size: int, count: int = 3) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(size))


@functools.cache
def model_of(name: str) -> models.TransferModel:
    """A head on the frozen body, in eval mode, with batch norms that do something."""
    body = robust.create(name, width=WIDTH)
    generator = torch.Generator().manual_seed(1)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return models.with_head(body).eval()


def published_logits(model: models.TransferModel, maps: Tensor) -> Tensor:
    """What the original study computed: a fixed window, then rows of C numbers in the order of the memory."""
    channels = maps.shape[1]
    return model.head(F.avg_pool2d(maps, 8).view(-1, channels))


@every_model
def test_one_row_a_film_from_pooled_features_where_the_published_code_gives_more(name):
    model, x = model_of(name), films(SIZE)
    maps = activations(model, x, models.last_map_layer(model))
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (len(x), 2)
        torch.testing.assert_close(logits, model.head(maps.mean((2, 3))))
        if name == "ra_resnet_50":  # its map is smaller than the window
            with pytest.raises(RuntimeError, match="too small"):
                published_logits(model, maps)
            return
        assert maps.shape[2:] == (SIZE // 4, SIZE // 4)
        wrong = published_logits(model, maps)
        assert len(wrong) == 4 * len(x)
        with pytest.raises(ValueError, match="batch_size"):
            F.cross_entropy(wrong, torch.zeros(len(x), dtype=torch.long))
        averaged = wrong.view(len(x), 4, 2).mean(1)
        assert (averaged - logits).abs().max() > 0.02 * logits.std()


def test_at_the_published_training_size_the_two_agree():
    model, x = model_of("standard_wrn_28_10"), films(32)
    maps = activations(model, x, models.last_map_layer(model))
    with torch.no_grad():
        torch.testing.assert_close(published_logits(model, maps), model(x))


def test_a_scrambled_row_holds_the_places_of_a_few_channels():
    """Channel c is c everywhere: pooled, feature c is c; scrambled, a row shows a quarter of the channels."""
    maps = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 16, 16).contiguous()
    rows = F.avg_pool2d(maps, 8).view(-1, 8)
    assert rows[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert rows.mean(0).tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
    assert maps.mean((2, 3))[0].tolist() == list(range(8))


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def drifted(before: dict[str, Tensor], module: nn.Module) -> list[str]:
    return [name for name, value in module.named_buffers() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("name", ["standard_wrn_28_10", "meansparse_wrn_94_16"])
def test_an_epoch_leaves_the_frozen_bodys_statistics_bit_equal(name, tmp_path):
    model = copy.deepcopy(model_of(name))
    body, head = model.backbone.body, model.head
    statistics, weights = buffers_of(body), [p.clone() for p in head.parameters()]
    data = TensorDataset(films(32, 8), torch.arange(8) % 2)
    train.fit(
        model,
        objectives.cross_entropy(),
        data,
        data,
        run_dir=tmp_path,
        epochs=1,
        batch_size=4,
        lr=0.1,
    )
    assert any("running_mean" in key for key in statistics)
    assert drifted(statistics, body) == []
    assert all(
        not torch.equal(old, new) for old, new in zip(weights, head.parameters(), strict=True)
    )


def test_a_body_that_is_only_told_not_to_learn_does_drift():
    """The original: no gradients, but train mode; this is what the test above would see."""
    body = copy.deepcopy(model_of("standard_wrn_28_10").backbone.body).requires_grad_(False).train()
    statistics = buffers_of(body)
    body(films(32, 4).expand(-1, 3, -1, -1))
    assert all("running" in name or "num_batches" in name for name in drifted(statistics, body))
    assert len(drifted(statistics, body)) == len(statistics)
