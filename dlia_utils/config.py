"""Profiles: the same notebook as a two-minute smoke run, a laptop-CPU study or the full study.

A profile changes sizes only, never the code path. `resolve` finds the data, picks profile and device, says
why, and gives every setting back as one frozen object.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import files, locate
from .attacks.evaluate import pixel_eps, pixel_text

log = logging.getLogger("dlia_utils")

PROFILES = ("smoke", "cpu", "full")
KAGGLE_REMEDY = "for the full study choose Accelerator: 'GPU T4 x2' in the session options, then Run All again"

# One-Pixel settings of the study that notebook 01 redoes: (pixels, population, iterations, F, CR).
PUBLISHED_ONE_PIXEL = ((1, 60, 120, 0.5, 0.9), (1, 200, 120, 0.7, 1.0), (3, 60, 120, 0.5, 1.0))

# The suite of attacks: what differs from the budgets in `attacks.evaluate.KINDS`; the eps of the grid at which a dear
# attack is run, if not at all of them; and films that the check list attacks again.
_SUITE: dict[str, Any] = {"budgets": {"square": {"steps": 2000}}, "dear": {"square": pixel_eps(4)}, "check_films": 50}
_DEAR = dict.fromkeys(("apgd_ce", "apgd_margin", "square"), pixel_eps(4))
_SUITE_CPU: dict[str, Any] = {
    "budgets": {
        "apgd_ce": {"steps": 30}, "apgd_margin": {"steps": 30}, "fmn": {"steps": 30}, "square": {"steps": 200},
    },
    "dear": _DEAR,
    "check_films": 24,
}  # fmt: skip
_SUITE_SMOKE: dict[str, Any] = {
    "budgets": {"apgd_ce": {"steps": 4}, "apgd_margin": {"steps": 4}, "fmn": {"steps": 5}, "square": {"steps": 10}},
    "dear": _DEAR,
    "check_films": 4,
}

_PNEUMONIA: dict[str, Any] = {
    "dataset": "pneumonia",
    "seed": 0,
    "size": 224,
    "per_class": None,  # None = every image; a number = a stratified sample per split and class
    "width": 1.0,  # MobileNetV2 width multiplier
    "stages": 7,  # of MobileNetV2's seven stages
    "pretrained": True,
    "epochs": 25,
    "batch_size": 32,
    "lr": 1e-3,
    "schedule": "onecycle",
    "patience": None,
    "max_minutes": 90.0,  # for one model
    "num_workers": 2,
    "val_share": 0.15,
    "lipschitz_penalty": 0.05,
    "temperatures": (35.0, 50.0),
    "alpha": 0.9,
    "at_eps": 4 / 255,
    "at_steps": 7,
    "at_step_size": 1.5 / 255,
    "adversarial": ("pgd_at", "fast_at", "free_at", "trades", "mart", "hat", "gairat"),  # those that are trained
    "free_replays": 4,
    "free_epochs": 60,  # each a pass over the data, of which `free_replays` make one look at every film
    "gairat_epochs": 10,  # after pgd_at's
    "gairat_steps": 10,
    "gradient_penalty": 3e-3,
    "sigma": 0.12,
    "certified_per_class": 100,
    "certificate_draws": 1000,
    "eps_grid": pixel_eps(0.25, 0.5, 1, 2, 4, 8),
    "headline_eps": 4 / 255,
    "published_eps_grid": (0.005, 0.01, 0.03, 0.05, 0.08, 0.1),
    "pgd_steps": 20,
    "pgd_restarts": 2,
    "attack_batch": 128,
    **_SUITE,
    "one_pixel": PUBLISHED_ONE_PIXEL,
    "one_pixel_per_class": 100,
    "bootstrap_draws": 2000,
}  # fmt: skip

# The recipe of the study that notebook 05 redoes; its own light and laptop sizes are below.
_DETECTION: dict[str, Any] = {
    "dataset": ("dlia", "nih", "fracatlas"),  # the first that is there, whole
    "seed": 0,
    "size": 1024,
    "images": None,  # None = every image; a number = at most so many to train on, to select by, to score
    "arch": "fasterrcnn_resnet50_fpn_v2",
    "weights": "coco",
    "trainable_layers": 5,
    "freeze_bn": True,
    "nms": 0.3,
    "rpn_pre_nms": 1000,
    "rpn_post_nms": 1000,
    "roi_batch": 512,
    "anchor_sizes": None,
    "channels": 256,
    "width": 1.0,
    "folds": 5,
    "run_folds": 5,
    "flip": 0.5,
    "epochs": 60,
    "batch_size": 4,
    "accumulate": 4,
    "lr": 5e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 5,
    "lr_min": 1e-6,
    "clip_norm": 1.0,
    "ema": 0.998,
    "patience": 15,
    "max_minutes": 240.0,  # for one fold
    "num_workers": 2,
    "one_per_class": True,  # NIH: no image has two boxes of one label
    "wbf_iou": 0.5,
    "bootstrap_draws": 2000,
}
# Fractures are many in an image, and small.
_FRACATLAS = {"one_per_class": False}

# Notebooks 02 and 03: MobileNetV2 with three trainings, and the robust models of the literature behind a new head.
ZOO = (
    "chen2024_wrn_34_20", "gairat_wrn_28_10", "huang2021_wrn_34_r", "hat_wrn_34_10", "rebuffi2021_wrn_70_16",
    "standard_wrn_28_10", "meansparse_wrn_94_16", "ra_wrn_70_16",
)  # fmt: skip
_TRANSFER: dict[str, Any] = {
    "dataset": "fracatlas",
    "seed": 0,
    "size": 224,
    "fit": "pad",  # a long bone squashed to a square would be another bone
    "per_class": None,
    "unusable_share": 0.01,  # FracAtlas holds a few films of which a third and more is missing
    "val_share": 0.1,
    "test_share": 0.1,
    "width": 1.0,
    "stages": 7,
    "pretrained": True,
    "epochs": 30,
    "batch_size": 32,
    "lr": 1e-3,
    "schedule": "onecycle",
    "patience": None,
    "max_minutes": 90.0,
    "num_workers": 2,
    "balance": "weights",  # of the classes in the loss; or "sampling", as the original study did
    "at_eps": 4 / 255,
    "at_steps": 7,
    "at_step_size": 1 / 255,
    "trades_beta": 6.0,
    "head": "linear",  # or "mlp", the original study's
    "zoo": (*ZOO, "ra_resnet_50"),
    "zoo_weights": "public",  # downloaded; None = random weights
    "zoo_width": 1.0,
    "zoo_size": 64,  # trained on 32 px, where a fracture cannot be seen
    "zoo_epochs": 30,
    "zoo_alphas": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    "zoo_maps": None,  # maps of so many of them, the first ones; None = all
    "eps_grid": pixel_eps(0.5, 1, 2, 4, 8),
    "headline_eps": 4 / 255,
    "pgd_steps": 10,
    "pgd_restarts": 1,
    "attack_batch": 64,
    "maps": 72,  # so many fractured test films are explained
    "occlusion_window": 28,
    "integrated_steps": 32,
    "bootstrap_draws": 2000,
    **_SUITE,
}
_TRANSFER_CPU: dict[str, Any] = {
    "size": 160,
    "epochs": 10,
    "num_workers": 0,
    "at_eps": 2 / 255,
    "at_steps": 2,
    "at_step_size": 1.4 / 255,
    "zoo": (),  # 5 to 60 billion multiplications an image are no work for a laptop
    "occlusion_window": 20,
    "integrated_steps": 16,
    **_SUITE_CPU,
}
_TRANSFER_SMOKE: dict[str, Any] = {
    "size": 48,
    "per_class": 80,
    "val_share": 0.15,
    "test_share": 0.2,
    "width": 0.5,
    "stages": 3,
    "pretrained": False,
    "epochs": 6,
    "batch_size": 16,
    "lr": 3e-3,
    "num_workers": 0,
    "max_minutes": 5.0,
    "at_eps": 0.5 / 255,
    "at_steps": 2,
    "at_step_size": 0.35 / 255,
    "zoo": ("hat_wrn_34_10", "gairat_wrn_28_10", "huang2021_wrn_34_r", "meansparse_wrn_94_16"),  # one of each family
    "zoo_maps": 1,
    "zoo_weights": None,
    "zoo_width": 1 / 16,
    "zoo_size": 32,
    "zoo_epochs": 3,
    "zoo_alphas": (0.0, 0.2),
    "eps_grid": pixel_eps(1, 4),
    "pgd_steps": 3,
    "maps": 6,
    "occlusion_window": 8,
    "integrated_steps": 8,
    "bootstrap_draws": 200,
    **_SUITE_SMOKE,
}

# Notebook 07: a pretrained network under a new head, then fine-tuned; the map layer and the audit need no settings.
_COVID_TRANSFER: dict[str, Any] = {
    "dataset": "covid",
    "seed": 0,
    "size": 224,
    "fit": "squash",
    "per_class": None,
    "unusable_share": 0.01,
    "val_share": 0.15,
    "test_share": 0.15,
    "backbone": "resnet50_v2",  # MobileNetV2 takes its place, and the notebook says so, when its weights cannot be had
    "width": 1.0,  # of MobileNetV2
    "stages": 7,
    "pretrained": True,
    "heads": ("linear", "mlp"),
    "hidden": 128,  # units of the mlp head
    "dropout": 0.3,  # before any search
    "epochs": 30,
    "batch_size": 32,
    "lr": 1e-3,
    "patience": 6,
    "max_minutes": 90.0,
    "num_workers": 2,
    "trials": 24,
    "extend": 3,
    "unfrozen": "all",  # blocks that are fine-tuned, counted from the end
    "tuning_lrs": (1e-3, 2e-4, 4e-5, 8e-6),
    "tuning_epochs": 15,
    "baseline_channels": (32, 64, 128),
    "baseline_epochs": 30,
    "audit_films": 2000,  # at most so many training films for the pipeline that the audit trains anew
    "bootstrap_draws": 2000,
}

# Notebook 06: a small CNN from scratch, searched. Of each part of the search: (values beyond, values, values beyond).
_COVID: dict[str, Any] = {
    "dataset": "covid",
    "seed": 0,
    "size": 128,
    "fit": "squash",
    "per_class": None,
    "unusable_share": 0.01,
    "val_share": 0.15,
    "test_share": 0.15,
    "weights_text": "random",
    "blocks": 4,
    "width": 16,  # channels of the first block; every further block has twice as many
    "hidden": 128,
    "dropout": 0.3,
    "epochs": 30,
    "batch_size": 32,
    "lr": 1e-3,
    "patience": 8,
    "max_minutes": 120.0,  # for one training
    "num_workers": 2,
    "quick_films": 2000,  # at most so many train the quick comparisons of sizes and normalisations
    "quick_epochs": 5,
    "trials": 30,
    "extend": 3,
    "search_epochs": 15,
    "search_patience": 5,
    "search_lr": (3e-4, 1e-2),
    "search_dropout": (0.1, 0.6),
    "search_batch": ((8,), (16, 32, 64), (128,)),
    "search_width": ((4,), (8, 16, 32), (64,)),
    "bootstrap_draws": 2000,
}

# Notebook 04: two networks, each trained with and without corrupted films, and the drift of their maps.
_THESIS = ("gaussian_noise", "speckle_noise", "motion_blur", "contrast", "brightness")
_DRIFT: dict[str, Any] = {
    "dataset": "pneumonia",
    "seed": 0,
    "size": 128,  # of the CIFAR-style ResNet-18, whose maps end at an eighth of it
    "fit": "squash",
    "per_class": None,
    "val_share": 0.15,
    "width": 1.0,  # of the ResNet
    "mobilenet_size": 224,
    "mobilenet_width": 1.0,
    "stages": 7,
    "pretrained": True,  # MobileNetV2; the ResNet starts from scratch, as in the thesis
    "epochs": 30,
    "mobilenet_epochs": 15,
    "batch_size": 64,
    "lr": 1e-3,
    "schedule": "onecycle",
    "patience": None,
    "max_minutes": 120.0,
    "num_workers": 2,
    "scale": "imagenet-c",
    "trained_on": _THESIS,  # what the augmented trainings see
    "corruptions": (
        *_THESIS, "shot_noise", "poisson_dose", "scatter_veil", "collimation", "marker", "grid_lines", "resampling",
        "bit_depth", "jpeg",
    ),
    "mapped": (*_THESIS, "poisson_dose", "scatter_veil", "collimation"),  # of these the maps are compared, too
    "severities": (1, 2, 3, 4, 5),
    "choose_films": 200,  # so many validation films choose the predictor
    "map_films": None,  # test films whose maps are compared; None = all
    "map_batch": 32,
    "bootstrap_draws": 2000,
    # Any other data set of the suite: where it has no official test split, one is drawn.
    "per_dataset": {"pneumonia": {}, "*": {"test_share": 0.15, "unusable_share": 0.01}},
}  # fmt: skip

# What differs from the full study, per notebook and profile. "per_dataset" holds what differs with the data found.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "01_pneumonia_robustness": {
        "full": _PNEUMONIA,
        "cpu": _PNEUMONIA
        | {
            "size": 112,
            "epochs": 5,
            "num_workers": 0,
            "at_steps": 2,
            "at_step_size": 2.8 / 255,
            "free_epochs": 12,
            "gairat_epochs": 2,
            "gairat_steps": 5,
            "certified_per_class": 40,
            "eps_grid": pixel_eps(0.5, 1, 2, 4, 8),
            "pgd_steps": 10,
            "pgd_restarts": 1,
            **_SUITE_CPU,
            "one_pixel_per_class": 8,
        },
        "smoke": _PNEUMONIA
        | {
            "size": 48,
            "per_class": 96,
            "width": 0.5,
            "stages": 3,
            "pretrained": False,
            "epochs": 12,
            "batch_size": 16,
            "lr": 3e-3,
            "num_workers": 0,
            "max_minutes": 5.0,
            "at_eps": 0.5 / 255,
            "at_steps": 2,
            "at_step_size": 0.35 / 255,
            "adversarial": ("pgd_at", "trades"),
            "temperatures": (50.0,),
            "gradient_penalty": 1e-3,
            "sigma": 0.05,
            "eps_grid": pixel_eps(1, 4),
            "published_eps_grid": (0.01, 0.1),
            "pgd_steps": 3,
            "pgd_restarts": 1,
            **_SUITE_SMOKE,
            "certified_per_class": 4,
            "certificate_draws": 200,
            "one_pixel": ((1, 10, 3, 0.5, 0.9), (1, 20, 3, 0.7, 1.0), (3, 10, 3, 0.5, 1.0)),
            "one_pixel_per_class": 4,
            "bootstrap_draws": 200,
        },
    },
    "02_fracatlas_robust_models": {
        "full": _TRANSFER,
        "cpu": _TRANSFER | _TRANSFER_CPU,
        "smoke": _TRANSFER | _TRANSFER_SMOKE,
    },
    "03_tuberculosis_robustness": {
        "full": _TRANSFER | {"dataset": "tuberculosis", "sensitivity": 0.95},
        "cpu": _TRANSFER | _TRANSFER_CPU | {"dataset": "tuberculosis", "sensitivity": 0.95},
        "smoke": _TRANSFER
        | _TRANSFER_SMOKE
        | {
            "dataset": "tuberculosis",
            "sensitivity": 0.95,
            "per_class": (160, 40),
            "epochs": 15,
            "zoo": ("gairat_wrn_28_10", "meansparse_wrn_94_16"),
            "integrated_steps": 32,
        },
    },
    "04_perturbation_saliency": {
        "full": _DRIFT,
        "cpu": _DRIFT
        | {
            "size": 64,
            "width": 0.5,
            "mobilenet_size": 112,
            "epochs": 8,
            "mobilenet_epochs": 5,
            "batch_size": 32,
            "num_workers": 0,
            "mapped": (*_THESIS, "poisson_dose"),
            "choose_films": 150,
        },
        "smoke": _DRIFT
        | {
            "size": 48,
            "per_class": 96,
            "width": 0.1875,  # not 1/8: with 8 channels, channels-last, torch 2.14 crashes in the backward pass on some CPUs
            "mobilenet_size": 48,
            "mobilenet_width": 0.5,
            "stages": 3,
            "pretrained": False,
            "epochs": 12,
            "mobilenet_epochs": 12,
            "batch_size": 16,
            "lr": 3e-3,
            "num_workers": 0,
            "max_minutes": 5.0,
            "corruptions": (*_THESIS, "poisson_dose", "collimation"),
            "mapped": _THESIS,
            "severities": (1, 3, 5),
            "choose_films": 16,
            "map_films": 24,
            "bootstrap_draws": 200,
        },
    },
    "05_nih_detection": {
        "full": _DETECTION | {"per_dataset": {"fracatlas": _FRACATLAS | {"size": 800}}},
        "cpu": _DETECTION
        | {
            "size": 384,
            "arch": "fasterrcnn_mobilenet_v2_fpn",
            "weights": "imagenet",
            "channels": 128,
            "rpn_pre_nms": 500,
            "rpn_post_nms": 200,
            "roi_batch": 64,
            "run_folds": 1,
            "epochs": 14,
            "batch_size": 8,
            "accumulate": 1,
            "lr": 0.02,
            "warmup_epochs": 1,
            "clip_norm": 5.0,
            "ema": 0.995,
            "patience": None,
            "num_workers": 0,
            "per_dataset": {"fracatlas": _FRACATLAS},
        },
        "smoke": _DETECTION
        | {
            "size": 128,
            "images": 96,
            "arch": "fasterrcnn_mobilenet_v2_fpn",
            "weights": None,
            "freeze_bn": False,
            "width": 0.5,
            "channels": 64,
            "rpn_pre_nms": 200,
            "rpn_post_nms": 64,
            "roi_batch": 32,
            "folds": 3,
            "run_folds": 1,
            "epochs": 11,
            "batch_size": 4,
            "accumulate": 1,
            "lr": 0.02,
            "warmup_epochs": 1,
            "clip_norm": 5.0,
            "ema": 0.95,
            "patience": None,
            "max_minutes": 5.0,
            "num_workers": 0,
            "bootstrap_draws": 200,
            "per_dataset": {"fracatlas": _FRACATLAS},
        },
    },
    "07_covid_transfer_gradcam": {
        "full": _COVID_TRANSFER,
        "cpu": _COVID_TRANSFER
        | {
            "size": 128,
            "backbone": "mobilenet_v2",
            "num_workers": 0,
            "trials": 12,
            "tuning_epochs": 10,
            "baseline_channels": (16, 32, 64),
            "baseline_epochs": 8,
            "audit_films": 1000,
        },
        "smoke": _COVID_TRANSFER
        | {
            "size": 48,
            "per_class": 90,  # as in notebook 06: the same films, the same split
            "backbone": "mobilenet_v2",
            "width": 0.5,
            "stages": 3,
            "pretrained": False,
            "hidden": 32,
            "epochs": 20,
            "batch_size": 16,
            "lr": 3e-3,
            "patience": 6,
            "max_minutes": 5.0,
            "num_workers": 0,
            "trials": 4,
            "extend": 1,
            "tuning_lrs": (3e-3, 1e-3),
            "tuning_epochs": 24,
            "baseline_channels": (8, 16),
            "baseline_epochs": 10,
            "audit_films": 120,
            "bootstrap_draws": 200,
        },
    },
    "06_covid_baseline": {
        "full": _COVID,
        "cpu": _COVID
        | {
            "size": 96,
            "epochs": 15,
            "patience": 4,
            "num_workers": 0,
            "quick_epochs": 3,
            "trials": 10,
            "extend": 2,
            "search_epochs": 6,
            "search_patience": 3,
            "search_width": ((4,), (8, 16), (32,)),
        },
        "smoke": _COVID
        | {
            "size": 48,
            "per_class": 90,
            "blocks": 3,
            "width": 8,
            "hidden": 32,
            "epochs": 10,
            "batch_size": 16,
            "lr": 2e-3,
            "patience": 4,
            "max_minutes": 5.0,
            "num_workers": 0,
            "quick_epochs": 3,
            "trials": 4,
            "extend": 1,
            "search_epochs": 4,
            "search_patience": 4,
            "search_lr": (5e-4, 4e-3),
            "search_batch": ((4,), (8, 16), (32,)),
            "search_width": ((4,), (8, 16), (32,)),
            "bootstrap_draws": 200,
        },
    },
}


@dataclass(frozen=True)
class Config:
    """Everything a notebook run is decided by; settings read as attributes, e.g. `config.size`."""

    notebook: str
    profile: str
    reason: str
    location: locate.Location
    device: str
    device_note: str
    run_dir: Path
    resume: bool | str
    settings: dict[str, Any] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are not fields; while unpickling there are no fields yet, hence __dict__.
        settings = self.__dict__.get("settings", {})
        if name not in settings:
            raise AttributeError(f"no setting {name!r}; there are: {', '.join(settings)}")
        return settings[name]

    @property
    def synthetic(self) -> bool:
        return self.location.synthetic

    @property
    def data_name(self) -> str:
        """The word every result row carries, so synthetic numbers cannot pass for real ones."""
        return f"{self.location.dataset} (SYNTHETIC)" if self.synthetic else self.location.dataset

    @property
    def key(self) -> str:
        """Hash of notebook, profile, settings and data name: two runs with the same key may share files."""
        parts = [self.notebook, self.profile, self.data_name, self.settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def banner(self) -> str:
        """The lines printed at the top of a notebook: device, profile, data and why."""
        data = "SYNTHETIC phantom images: the numbers below mean nothing medically" if self.synthetic else (
            f"real images of {self.location.dataset!r}"
        )
        # A GPU that is missing or cannot be used is what a reader must learn first.
        device = [f"device   {self.device}  ({self.device_note})"]
        if self.device == "cpu":
            device = [f"device   CPU ONLY: {self.device_note}"]
            device += [f"         {KAGGLE_REMEDY}"] if locate.on_kaggle() else []
        lines = [
            *device,
            f"profile  {self.profile.upper()}  ({self.reason})",
            f"data     {data}  [found by: {self.location.origin}]",
            f"run      {self.run_dir.parent.name}/{self.run_dir.name}  (resume: {self.resume}, key {self.key})",
        ]
        width = max(map(len, lines))
        return "\n".join(["=" * width, *lines, "=" * width])


def settings_text(config: Config) -> str:
    """Every resolved setting, one a line."""
    return "\n".join(f"{name:20} {_text(value, name)}" for name, value in config.settings.items())


def _text(value: Any, name: str) -> str:
    """A setting as people write it: eps and its steps as k/255."""
    if isinstance(value, tuple):
        return ", ".join(_text(part, name) for part in value)
    in_pixels = isinstance(value, float) and name in ("at_eps", "at_step_size", "eps_grid", "headline_eps")
    return pixel_text(value) if in_pixels else str(value)


def pick_device() -> tuple[str, str]:
    """The device that really works, with a remark; a GPU too old for this torch falls back to the CPU.

    >>> device, note = pick_device()
    >>> device in ("cpu", "cuda")
    True
    """
    if not torch.cuda.is_available():
        return "cpu", f"no GPU, {torch.get_num_threads()} CPU threads"
    name = torch.cuda.get_device_name(0)
    try:
        # is_available() says True on a P100, whose first real operation then dies.
        (torch.ones(2, device="cuda") * 2).sum().item()
    except RuntimeError as error:
        return "cpu", f"{name} is there, but this torch cannot use it ({str(error).splitlines()[0]})"
    return "cuda", f"{torch.cuda.device_count()} x {name}"


def runs_root() -> Path:
    """Where runs are written: DLIA_RUNS, else the working folder on Kaggle, else `runs/` of the repository."""
    if os.environ.get("DLIA_RUNS"):
        return Path(os.environ["DLIA_RUNS"])
    if locate.on_kaggle():
        return locate.kaggle_root() / "working" / "runs"
    repository = Path(__file__).resolve().parents[1]
    return (repository if (repository / "notebooks").is_dir() else Path.cwd()) / "runs"


def submissions_root() -> Path:
    """Where submissions go: `submissions/` beside the runs, or the working folder on Kaggle, which offers them."""
    return runs_root().parent if locate.on_kaggle() else runs_root().parent / "submissions"


def _pick_profile(asked: str, location: locate.Location, device: str) -> tuple[str, str]:
    if asked in PROFILES:
        return asked, "asked for"
    if device == "cuda" and not location.synthetic:
        return "full", "auto: a GPU and real data are there"
    missing = [what for what, there in (("GPU", device == "cuda"), ("real data", not location.synthetic)) if not there]
    return "smoke", f"auto: no {' and no '.join(missing)}; PROFILE = 'cpu' runs the study at laptop size"


def resolve(
    notebook: str,
    profile: str = "auto",
    data_dir: str = "",
    run_name: str = "",
    resume: bool | str = True,
    dataset: str = "",
) -> Config:
    """Turn a notebook's parameters into one frozen `Config`, and open its run folder.

    `profile` "smoke", "cpu", "full" or "auto" (the environment's DLIA_PROFILE replaces "auto"); `data_dir` ""
    means find it; `run_name` "" means profile and kind of data; `resume` True continues a run with the same
    settings, False puts an older run of that name aside, "force" continues whatever is there. `dataset` takes the
    place of the notebook's own data set ("" means that one).
    Errors: an unknown notebook or profile, data that is not found, a run folder of other settings.
    """
    if notebook not in SETTINGS:
        raise ValueError(f"notebook={notebook!r} has no settings; known: {', '.join(SETTINGS)}")
    asked = os.environ.get("DLIA_PROFILE", "auto") if profile == "auto" else profile
    if asked not in (*PROFILES, "auto"):
        raise ValueError(f"PROFILE={asked!r} is not one of {', '.join(PROFILES)}, auto")
    if resume not in (True, False, "force"):
        raise ValueError(f"RESUME={resume!r} must be True, False or 'force'")
    usual = next(iter(SETTINGS[notebook].values()))["dataset"]
    location = _find_data(dataset or usual, data_dir)
    device, device_note = pick_device()
    chosen, reason = _pick_profile(asked, location, device)
    settings = dict(SETTINGS[notebook][chosen])
    kind = "synthetic" if location.synthetic else "real"
    if location.dataset != settings["dataset"]:  # runs on several data sets lie side by side
        kind = f"{location.dataset}-{kind}"
    by_dataset = settings.pop("per_dataset", {})  # "*" stands for all that are not named
    settings |= by_dataset.get(location.dataset, by_dataset.get("*", {})) | {"dataset": location.dataset}
    config = Config(
        notebook=notebook, profile=chosen, reason=reason, location=location, device=device,
        device_note=device_note, run_dir=runs_root() / notebook / (run_name or f"{chosen}-{kind}"), resume=resume,
        settings=settings,
    )  # fmt: skip
    _open_run(config)
    return config


def _find_data(names: str | Sequence[str], data_dir: str) -> locate.Location:
    """The notebook's data set, or the first of several that is there and whole."""
    if isinstance(names, str):
        return locate.find(names, data_dir or None)
    return locate.find_first(names, data_dir or None)


def _open_run(config: Config) -> None:
    """Create the run folder, or take up an earlier session's; refuse to mix two configurations in one."""
    record = config.run_dir / "config.json"
    if config.resume and not record.exists():
        _import_run(config)
    if record.exists() and config.resume is False:
        config.run_dir.rename(config.run_dir.with_name(f"{config.run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}.old"))
    elif record.exists() and config.resume is True and json.loads(record.read_text())["key"] != config.key:
        raise ValueError(
            f"run folder {config.run_dir} holds a run with other settings: choose another RUN_NAME, "
            "or RESUME = False to put the old run aside"
        )
    keep = {"notebook": config.notebook, "profile": config.profile, "reason": config.reason, "key": config.key,
            "data": config.data_name, "device": config.device, "settings": config.settings}  # fmt: skip
    files.write_json(keep, record)
    files.write_json(environment(), config.run_dir / "env.json")


def _import_run(config: Config) -> None:
    """Copy the run of an earlier Kaggle session, attached as an input, if it has this run's settings.

    Attach the earlier version's output (*Add Input*, *Your Work*) and press Run All: what was finished is read back,
    and a training that was cut off goes on after its last whole epoch. Of several the one with the newest checkpoint.
    """
    place = Path(config.notebook) / config.run_dir.name
    found = []
    for mount in locate.mounts():
        for run in (mount / "runs" / place, mount / place):
            record = run / "config.json"
            if not record.is_file():
                continue
            if json.loads(record.read_text(encoding="utf-8")).get("key") == config.key:
                found.append(run)
            else:
                log.warning("the run in input %s has other settings: it is not continued", mount.name)
    if not found:
        return

    def newest(run: Path) -> float:
        return max((path.stat().st_mtime for path in run.glob("*/last.pt")), default=0.0)

    chosen = max(found, key=newest)
    config.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.run_dir.parent, prefix=".import-") as scratch:
        # An input is read-only, and its modes would come along with copy2.
        copied = shutil.copytree(chosen, Path(scratch) / "run", copy_function=shutil.copyfile)
        copied.chmod(0o755)
        for folder in filter(Path.is_dir, copied.rglob("*")):
            folder.chmod(0o755)
        os.replace(copied, config.run_dir)
    log.warning("continues the run of an earlier session, found in input %s", chosen.relative_to(locate.kaggle_root()))


def hardware() -> str:
    """Short name of the machine for result rows, e.g. '2-core CPU x86_64' or '2 x Tesla T4'."""
    device, note = pick_device()
    return note if device == "cuda" else f"{torch.get_num_threads()}-core CPU {platform.machine()}"


def environment() -> dict[str, Any]:
    """Versions of what the numbers depend on, for `env.json`."""
    names = ("torch", "torchvision", "albumentations", "accelerate", "numpy", "pandas", "scikit-learn")
    versions = {name: metadata.version(name) for name in names}
    image = {f.name: f.read_text().strip() for f in map(Path, ("/etc/git_commit", "/etc/build_date")) if f.exists()}
    return {"python": sys.version.split()[0], "hardware": hardware(), "kaggle_image": image, **versions}
