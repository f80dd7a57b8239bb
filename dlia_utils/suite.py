"""The suite of attacks on the trained models of a run; what notebooks 01, 02 and 03 share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch

from .attacks import checklist, evaluate
from .run import Run
from .study import Study, load_models, stored, weights_key, work_folder

USES = "attacks eps_grid pgd_steps pgd_restarts budgets expensive attack_batch seed".split()


def options(run: Run) -> dict:
    """The options of `attacks.evaluate.robust` in the settings: every image, every attack."""
    chosen = {"budgets": run.budgets, "at": run.expensive}
    for option, by_attack in chosen.items():
        chosen[option] = {name: by_attack[name] for name in by_attack if name in run.attacks}
    settings = dict(attacks=run.attacks, steps=run.pgd_steps, restarts=run.pgd_restarts)
    return settings | chosen | dict(batch_size=run.attack_batch, seed=run.seed)


def attack(study: Study, name: str) -> evaluate.Evaluation:
    """The whole suite on the test images for the trained model `name`; what is done is read back.

    Its rows are kept as table robust_NAME, its check list as checks_NAME.
    """
    run, rows = study.run, study.rows("test")
    model, data = load_models(study, [name])[name], (study.images(rows), study.labels(rows))
    key = {**study.key, "weights": weights_key(run, name), "seed": run.seed}
    folder = work_folder(run, f"suite/{name}", key | {"batch": run.attack_batch})
    where = dict(ids=rows, groups=study.patients(rows), folder=folder, resume=bool(run.resume))
    found = evaluate.robust(model, data, run.eps_grid, **options(run), **where)
    stored(study, f"robust_{name}", lambda: found.rows, model=name, uses=USES)
    listed = partial(checklist.report, found, subset=run.check_images)
    stored(study, f"checks_{name}", listed, model=name, uses=(*USES, "check_images"))
    return found


def zero_gradients(study: Study, name: str) -> float:
    """Share of test images where the input gradient of the trained model `name` is exactly 0."""

    def measured() -> pd.DataFrame:
        rows, model = study.rows("test"), load_models(study, [name])[name]
        data = study.images(rows), study.labels(rows)
        share = evaluate.zero_gradient_share(model, *data, batch_size=study.run.attack_batch)
        return pd.DataFrame({"share": [share]})

    table = stored(study, f"zero_gradients_{name}", measured, model=name, uses=["attack_batch"])
    return table["share"].item()


def held_out(study: Study, *, most: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """About `most` validation images with their labels, the same for every model."""
    rows = study.rows("val")[:: max(1, len(study.rows("val")) // most)]
    return study.images(rows), study.labels(rows)


def choose_under_attack(study: Study, *, steps: int = 10) -> dict[str, str | Callable]:
    """Options of `train.fit` that choose an adversarial training's epoch by "val_robust".

    That is balanced accuracy, half of it clean and half under PGD on the logit margin at the
    setting `at_eps`. By the attacked half alone a constant answer, which no attack moves, would
    beat a network that has only begun to learn.
    """
    images, eps = held_out(study), [study.run.at_eps]
    how = dict(attacks=["pgd_margin"], steps=steps, batch_size=study.run.attack_batch)

    def balanced(model: torch.nn.Module) -> dict[str, float]:
        rows = evaluate.robust(model, images, eps, **how, progress=False).rows
        rows = rows[rows["attack"].isin(["clean", "worst"])]
        fooled = rows.groupby(["attack", "label"])["fooled"].mean()
        return {"val_robust": 1 - float(np.mean(fooled))}

    return {"val_metric": balanced, "monitor": "val_robust"}
