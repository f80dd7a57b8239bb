"""Every public number of attacks, objectives, training and models: what is none is refused."""

import inspect
import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from small import linear
from torch import nn

from dlia_utils import attacks, models, objectives, smoothing, train
from dlia_utils.attacks import alpha, checklist, evaluate
from dlia_utils.explain import attribution
from dlia_utils.models import detector, robust

X, Y = torch.rand(2, 1, 3, 3), torch.tensor([0, 1])
DATA = dict(model=linear().eval(), x=X, y=Y)
SPARSE = nn.Sequential(robust.MeanSparse(1), nn.Flatten(), nn.Linear(9, 2)).eval()
LOGITS = torch.zeros(2, 2)
NETS = dict(teacher=linear(), standard=linear())
PLAIN = [
    name for name, one in vars(attacks).items() if "model" in getattr(one, "__annotations__", ())
]
PLAIN.remove("frozen")
MAKERS = [name for name, one in vars(objectives).items() if hasattr(one, "__signature__")]
MAKERS.remove("detection")  # takes no number
NUMBERS = {*objectives.INTERVALS, *objectives.WHOLE} - {"weight", "input_std"}  # unannotated

DOORS = {  # name: the door, what else it takes
    **{name: (getattr(attacks, name), DATA | {"eps": 0.1}) for name in PLAIN},
    **{name: (getattr(objectives, name), NETS | {"eps": 0.1}) for name in MAKERS},
    "normalised_eps": (attacks.normalised_eps, {"std": 0.2}),
    "zero_gradient_share": (evaluate.zero_gradient_share, dict(images=X, labels=Y) | DATA),
    "robust": (evaluate.robust, dict(model=linear().eval(), data=(X, Y), eps_grid=[0.1])),
    "report": (checklist.report, dict(found=None)),
    "select_alpha": (alpha.select_alpha, dict(model=SPARSE, train_batches=[X], x_val=X, y_val=Y)),
    "mart_loss": (objectives.mart_loss, dict(clean=LOGITS, attacked=LOGITS, y=Y)),
    "gairat_weights": (objectives.gairat_weights, dict(kappa=Y, steps=3)),
    "certify": (smoothing.certify, DATA | {"sigma": 0.1}),
    "integrated_gradients": (attribution.integrated_gradients, DATA),
    "occlusion": (attribution.occlusion, DATA),
    **{name: (models.REGISTRY[name], {}) for name in "mobilenet_v2 cnn resnet50_v2".split()},
    "resnet18_cifar": (models.resnet18_cifar, {}),
    "robust.create": (robust.create, {"name": "hat_wrn_34_10"}),
    "set_alpha": (robust.set_alpha, {"model": SPARSE}),
    "backbone": (models.backbone, {"name": "resnet18"}),
    "with_head": (models.with_head, dict(model=models.mobilenet_v2(width=0.1, stages=1))),
    "faster_rcnn": (detector.faster_rcnn, dict(num_classes=1, size=64)),
}
ZERO = (
    "seed iterations cr weight_decay lr_min ema warmup_epochs dropout label_smoothing penalty lam"
)
ZERO = {
    *f"{ZERO} in_full beta gamma mean num_workers trainable_layers unfrozen".split()
}  # may be 0
ZERO |= {("pgd", "restarts"), ("distillation", "alpha"), ("set_alpha", "alpha")}


def is_number(name, parameter):
    said = str(parameter.annotation)
    if name == "target" or re.search("Sequence|Mapping|Iterable|Callable|tuple", said):
        return False
    return name in NUMBERS or bool(re.search(r"\b(int|float)\b|Seed", said))


CASES = []  # (door, argument, whether whole)
for door, (function, _) in DOORS.items():
    for name, parameter in inspect.signature(function).parameters.items():
        if is_number(name, parameter):
            whole = name in objectives.WHOLE or bool(
                re.match("int|base.Seed", str(parameter.annotation))
            )
            CASES.append((door, name, whole))
RECIPE = {one.name: one.type for one in fields(train.Recipe)} | dict(num_workers="int")
RECIPE |= {"max_minutes": "float"}
CASES += [("fit", name, said.startswith("int")) for name, said in RECIPE.items() if "str" != said]


def call(door, **changed):
    if door == "fit":
        sets, how = (linear(), objectives.cross_entropy(), [0], None), {"monitor": "epoch"}
        return train.fit(*sets, run_dir="/no/such/folder", **how | {"epochs": 1} | changed)
    function, given = DOORS[door]
    known = inspect.signature(function).parameters
    needed = {"temperature": 2.0, "sigma": 0.1, "penalty": 0.1, "beta": 1.0, "eps": 0.1} | given
    needed = {name: value for name, value in needed.items() if name in known}
    return function(**needed | changed)


@pytest.mark.parametrize(("door", "name", "whole"), CASES, ids=lambda case: str(case))
def test_what_is_no_number_of_its_kind_is_refused_by_its_name(door, name, whole):
    bad = [math.nan, math.inf, -math.inf, "3", True] + [1.5] * whole + [[1]] * (name != "seed")
    bad += [-1] * (name != "lam") + [0] * (not {name, (door, name)} & ZERO)
    for value in bad:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            call(door, **{name: value})


LISTS = [("robust", "eps_grid", 0.1), ("select_alpha", "grid", 0.1), ("cnn", "channels", 4)]
LISTS += [("resnet50_v2", "depths", 1), ("lipschitz", "input_std", 0.1), ("hat", "weight", 0.1)]


@pytest.mark.parametrize(("door", "name", "good"), LISTS)
def test_every_number_of_a_list_is_looked_at(door, name, good):
    for value in (math.nan, math.inf, -1, "3"):
        with pytest.raises(ValueError, match=r"\beps\b" if name == "eps_grid" else name):
            call(door, **{name: [good, value]} | ({"eps": 0.1} if door == "select_alpha" else {}))


def test_good_numbers_pass_also_those_of_numpy():
    assert models.mobilenet_v2(width=np.float32(0.1), num_classes=np.int64(3), stages=1)
    assert objectives.hat(linear(), eps=np.float64(0.1), steps=np.int64(2), weight=(0, 1.5))
    found = attacks.pgd(**DATA, eps=np.float32(0.1), steps=np.int64(2), seed=np.int64(3))
    assert found.linf.max() <= 0.1 + 1e-6
