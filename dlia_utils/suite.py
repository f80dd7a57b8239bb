"""What notebooks 01, 02 and 03 share: the suite of attacks, robust models of the literature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pandas as pd
import torch

from . import files, models, objectives, plan
from .attacks import checklist, evaluate
from .attacks.alpha import select_alpha
from .models import robust
from .run import Run
from .study import Study, load_models, stored, time_left, train_head, weights_key, work_folder

USES = "attacks eps_grid pgd_steps pgd_restarts budgets expensive attack_batch seed".split()
ZOO_USES = "zoo_weights zoo_width zoo_epochs zoo_lr zoo_alphas head headline_eps pgd_steps".split()
ZOO_USES += "seed batch_size schedule patience balance attack_batch".split()


def options(run: Run) -> dict:
    """The options of `attacks.evaluate.robust` in the settings."""
    chosen = {"budgets": run.budgets, "at": run.expensive, "most": run.most}
    for option, by_attack in chosen.items():
        chosen[option] = {name: by_attack[name] for name in by_attack if name in run.attacks}
    settings = dict(attacks=run.attacks, steps=run.pgd_steps, restarts=run.pgd_restarts)
    settings |= chosen | dict(full_at=run.full_at, in_full=None)
    return settings | dict(batch_size=run.attack_batch, seed=run.seed)


def attack(study: Study, name: str) -> evaluate.Evaluation:
    """The whole suite on the test images for the trained model `name`; what is done is read back.

    Its rows are kept as table robust_NAME, its check list as checks_NAME.
    """
    run, rows = study.run, study.rows("test")
    model, data = load_models(study, [name])[name], (study.images(rows), study.labels(rows))
    key = {**study.key, "weights": weights_key(run, name), "seed": run.seed}
    folder = work_folder(run, f"suite/{name}", key | {"batch": run.attack_batch})
    where = dict(ids=rows, groups=study.patients(rows), folder=folder, resume=bool(run.resume))
    done = (run.run_dir / "tables" / f"robust_{name}.csv").exists()  # and read back
    time_left(run, "" if done else f"the attacks on {name} were not begun")
    found = evaluate.robust(model, data, run.eps_grid, **options(run), **where)
    uses = [*USES, *(option for option in ("full_at", "most") if option in run.values)]
    stored(study, f"robust_{name}", lambda: found.rows, model=name, uses=uses)
    listed = partial(checklist.report, found, subset=run.check_images)
    stored(study, f"checks_{name}", listed, model=name, uses=[*uses, "check_images"])
    return found


def phases(run: Run, names: Iterable[str], images: int, network: str = "") -> list[plan.Phase]:
    """For a plan: `attack` and `zero_gradients` on so many images; network "": as the model."""
    found, about = [], dict(settings="attacks eps_grid budgets most full_at", exact=False)
    for name in names:
        how = options(run) | {"through": "meansparse" in name}
        once = evaluate.most_passes(images, run.eps_grid, **how) + images
        once += checklist.most_passes(images, subset=run.check_images, **how)
        given = network or name, images, *once.tolist()
        found.append(plan.Phase("suite of attacks", *given, job=name, **about))
    return found


def judging(images: int, *, steps: int = 10) -> tuple[int, int]:
    """For a plan: the most passes of `choose_under_attack` in an epoch, of so many to validate."""
    count = len(range(images)[:: _stride(images)])
    return tuple(evaluate.most_passes(count, [1.0], attacks=["pgd_margin"], steps=steps).tolist())


def zoo_plan(study: Study) -> tuple[dict[str, plan.Network], list[plan.Phase], dict[str, int]]:
    """For a plan: MobileNetV2 and the networks of `train_robust_model`; what that asks of these.

    And how many images each split has.
    """
    run, found = study.run, []
    sizes = {part: len(study.rows(part)) for part in ("train", "val", "test")}
    make = partial(models.mobilenet_v2, width=run.width, stages=run.stages)
    networks = {"MobileNetV2": plan.Network(make, run.size, run.batch_size)}
    how = dict(attacks=["pgd_margin"], steps=run.pgd_steps, through=True)
    tried = evaluate.most_passes(sizes["val"], [run.headline_eps], **how)
    for name in run.zoo:
        make, sparse = partial(robust.create, name, width=run.zoo_width), "meansparse" in name
        networks[name] = plan.Network(make, run.zoo_size, run.batch_size, kind="wide")
        alphas, train = sparse * len({0.0, *run.zoo_alphas}), sizes["train"]
        once = alphas * tried + [train + sizes["val"] + 2 * sparse * train, 0]
        about = dict(settings="zoo zoo_size zoo_alphas", exact=not sparse, job=name)
        found.append(plan.Phase("new heads", name, train, *once.tolist(), **about))
    return networks, found, sizes


def zero_gradients(study: Study, name: str) -> float:
    """Share of test images where the input gradient of the trained model `name` is exactly 0."""

    def measured() -> pd.DataFrame:
        rows, model = study.rows("test"), load_models(study, [name])[name]
        data = study.images(rows), study.labels(rows)
        share = evaluate.zero_gradient_share(model, *data, batch_size=study.run.attack_batch)
        return pd.DataFrame({"share": [share]})

    table = stored(study, f"zero_gradients_{name}", measured, model=name, uses=["attack_batch"])
    return table["share"].item()


def _stride(images: int) -> int:
    return max(1, images // 200)


def held_out(study: Study) -> tuple[torch.Tensor, torch.Tensor]:
    """About 200 validation images with their labels, the same for every model."""
    rows = study.rows("val")
    rows = rows[:: _stride(len(rows))]
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


def zoo_study(study: Study) -> Study:
    """The same images at the size, and with the training, of the literature's robust models."""
    return study.variant(**zoo_settings(study.run))


def zoo_settings(run: Run) -> dict:
    """What is otherwise for the literature's models: size, training, and a smaller suite."""
    return dict(size=run.zoo_size, epochs=run.zoo_epochs, lr=run.zoo_lr) | run.zoo_suite


def train_robust_model(study: Study, name: str) -> str:
    """Train a new head on the frozen body `name` of `models.robust`; what loading it said.

    study: `zoo_study`'s. A linear head is a convex problem with one optimum, so the last epoch is
    kept. A MeanSparse model (2406.05927) first gets the means of the training images, and then the
    width of its dead zone (alpha) from validation images, under attack; kept as alpha.csv.
    """
    run, rows = study.run, study.rows("train")
    size = run.attack_batch or run.batch_size
    folder = work_folder(run, name, study.key | run.pick(*ZOO_USES))
    told = folder / "checkpoint.txt"
    if told.exists() and run.resume:
        return told.read_text(encoding="utf-8")
    try:
        body = robust.create(name, width=run.zoo_width, pretrained=run.zoo_weights, seed=run.seed)
    except RuntimeError as error:
        return f"left out: {error}"
    model = models.with_head(body.to(run.device), head=run.head, seed=run.seed)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    sparse = "meansparse" in name
    if sparse:  # the head must learn from features of these images, not of CIFAR-10's statistics
        robust.recompute_statistics(model, map(study.images, batches))
    loss = objectives.cross_entropy(weight=study.class_weights())
    train_head(study, name, model, loss, monitor="epoch")
    if sparse:
        val = study.rows("val")
        data = map(study.images, batches), study.images(val), study.labels(val)
        how = dict(grid=run.zoo_alphas, eps=run.headline_eps, steps=run.pgd_steps, seed=run.seed)
        table = select_alpha(model.eval(), *data, **how)
        files.write_csv(table, folder / "alpha.csv")
        alpha = float(table.loc[table["chosen"], "alpha"].item())
        models.save(model, folder / "best.pt", meta={"alpha": alpha})
    files.write_text(run.zoo_weights or "random", folder / "weights.txt")  # for the result rows
    files.write_text(str(body.load_report or "random weights"), told)
    return told.read_text(encoding="utf-8")
