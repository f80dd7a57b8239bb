"""The weights that smoke runs start from: made from phantom images alone, as `tools` says."""

import json

import pytest
from safetensors import safe_open

from dlia_utils import models
from dlia_utils.models import robust
from tools import body

TINY = {"chests": 9, "bones": 4, "epochs": 1, "robust_epochs": [1, 1], "batch_size": 8}
TINY |= {"robust": body.ROBUST[:1]}


def recipe_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["recipe"])


def test_the_file_is_small_and_of_the_recipe_and_phantoms_of_today():
    assert body.FILE.stat().st_size <= 2**20
    assert recipe_of(body.FILE) == json.loads(json.dumps(body.RECIPE))


def test_the_same_recipe_gives_the_same_bytes(tmp_path):
    files = [body.make(tmp_path / name, **TINY) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", body.ROBUST)
def test_robust_models_start_from_it(name):
    width = body.RECIPE["robust_width"]
    assert "phantom" in robust.create(name, width=width, pretrained="phantom").load_report
    with pytest.raises(ValueError, match="phantom"):
        robust.create(name, width=1 / 16, pretrained="phantom")


def test_a_network_of_another_size_is_refused():
    with pytest.raises(ValueError, match="phantom images"):
        models.mobilenet_v2(width=1.0, weights="phantom")
