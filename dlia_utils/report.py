"""Tidy result rows, the results file, and the tables and sentences that several notebooks show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import files, metrics
from .device import hardware
from .metrics import with_interval
from .run import Run, nearest
from .study import Study, weights_label
from .units import eps_text

# What tells one result from another, then what was found, and how.
IDENTITY = "notebook model attack eps eps_unit metric seed size profile data".split()
RESULT_COLUMNS = [*IDENTITY[:6], *"value ci_low ci_high n seed size epochs weights".split()]
RESULT_COLUMNS += "profile data hardware".split()


def result_rows(table: pd.DataFrame, run: Run, **labels) -> pd.DataFrame:
    """Metric rows (metric, value, ci_low, ci_high, n) completed to the tidy `RESULT_COLUMNS`.

    `labels` fills model, attack, eps and eps_unit, which are else "clean", 0 and "pixel". epochs:
    those that the model was really trained for, where the run folder says so, else the setting.
    ValueError for a column or label that is none of `RESULT_COLUMNS`.
    """
    for name in (*labels, *table.columns):
        if name not in RESULT_COLUMNS:
            raise ValueError(f"result rows have no column {name!r}{nearest(name, RESULT_COLUMNS)}")
    given = {"attack": "clean", "eps": 0.0, "eps_unit": "pixel"} | labels
    given |= {name: getattr(run, name) for name in ("notebook", "seed", "size", "profile")}
    given |= {"data": run.data_name, "hardware": hardware()}
    filled = table.assign(**{k: v for k, v in given.items() if k not in table.columns})
    for column, of in (("epochs", _epochs), ("weights", weights_label)):
        if column not in filled:
            filled[column] = [of(run, model) for model in filled["model"]]
    return filled.reindex(columns=RESULT_COLUMNS)


def _epochs(run: Run, model: str) -> int:
    """Lines of the log that `train.fit` kept of this model (or of its head), else the setting."""
    logs = [run.run_dir / name / "metrics.csv" for name in (model, f"{model}_head")]
    return next((len(pd.read_csv(log)) for log in logs if log.exists()), run.epochs)


def update_results(rows: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Merge `rows` into the results file: a row of the same `IDENTITY` is replaced."""
    if missing := set(RESULT_COLUMNS) - set(rows.columns):
        raise ValueError(f"rows lack the columns {sorted(missing)}: build them with result_rows()")
    path = Path(path)
    merged = pd.concat([pd.read_csv(path), rows], ignore_index=True) if path.exists() else rows
    # pandas before 3 reads back another last digit than it wrote: the same eps would count as two.
    merged = merged.assign(eps=merged["eps"].round(12)).drop_duplicates(IDENTITY, keep="last")
    files.write_csv(merged, path)
    return merged.reset_index(drop=True)


def interval_table(table: pd.DataFrame) -> pd.DataFrame:
    """Metric rows (metric, value, ci_low, ci_high, n) for reading: "value [low, high]"."""
    shown = pd.DataFrame({"metric": table["metric"].to_numpy()})
    cells = [with_interval(row) for _, row in table.iterrows()]
    return shown.assign(**{"value [95 % interval]": cells, "images": table["n"].to_numpy()})


def accuracy_rows(
    per_image: pd.DataFrame, study: Study, *, model: str, eps_unit: str = "pixel"
) -> pd.DataFrame:
    """Accuracy under attack with patient intervals, one result row per attack and eps.

    `per_image` has columns attack, eps, image (row number in the manifest) and fooled.
    """
    parts = per_image.groupby(["attack", "eps"], sort=False)
    rows = [
        _right(part, study) | {"metric": "accuracy", "attack": attack, "eps": eps}
        for (attack, eps), part in parts
    ]
    return result_rows(pd.DataFrame(rows), study.run, model=model, eps_unit=eps_unit)


def direction_rows(
    per_image: pd.DataFrame, study: Study, *, model: str, eps: float
) -> pd.DataFrame:
    """What the worst case at `eps` costs: sensitivity (missed disease) and specificity."""
    part = per_image[per_image["attack"].eq("worst") & np.isclose(per_image["eps"], eps)]
    both = {"sensitivity": part[part["label"].eq(1)], "specificity": part[part["label"].eq(0)]}
    rows = [_right(own, study) | {"metric": metric} for metric, own in both.items()]
    return result_rows(pd.DataFrame(rows), study.run, model=model, attack="worst", eps=eps)


def _right(part: pd.DataFrame, study: Study) -> dict[str, float]:
    patients, draws = study.patients(part["image"].to_numpy()), study.run.bootstrap_draws
    return metrics.share(~part["fooled"].to_numpy(bool), patients, draws=draws)


def zero_gradient_rows(shares: Mapping[str, float], study: Study) -> pd.DataFrame:
    """Result rows of the share of images with an exactly zero input gradient, by model."""
    table = pd.DataFrame({"model": shares.keys(), "value": shares.values()})
    table = table.assign(metric="zero_gradient_share", n=len(study.rows("test")))
    return result_rows(table, study.run, attack="cross-entropy gradient")


def masking_table(results: pd.DataFrame, *, eps: float) -> pd.DataFrame:
    """Per model: accuracy under PGD with both losses, their gap, the share of zero gradients."""
    near = results[_at(results, eps) & results.metric.eq("accuracy")]
    table = near.pivot_table(index="model", columns="attack", values="value", sort=False)
    zeros = results[results.metric.eq("zero_gradient_share")].set_index("model")["value"]
    table = table[["pgd_ce", "pgd_margin"]]
    return table.assign(gap=table.pgd_ce - table.pgd_margin, zero_gradients=zeros)


def paired_tests(
    per_image: Mapping[str, pd.DataFrame], study: Study, *, eps: float, reference: str
) -> pd.DataFrame:
    """Every model against `reference` on the same images, clean and in the worst case at `eps`.

    `per_image`: rows of `attacks.evaluate.robust` by model. See `metrics.paired_difference`; p_holm
    is adjusted for the number of models.
    """
    shown = "condition model accuracy reference difference ci_low ci_high".split()
    shown += "only_model_right only_reference_right p p_holm".split()
    tables, draws = [], study.run.bootstrap_draws
    cases = ("clean", "clean", 0.0), (f"worst case {eps_text(eps)}", "worst", eps)
    for condition, attack, at in cases:
        right, rows = {}, []
        for name, table in per_image.items():
            part = table[table.attack.eq(attack) & np.isclose(table.eps, at)].sort_values("image")
            right[name] = ~part["fooled"].to_numpy(bool)
        patients, base = study.patients(part["image"].to_numpy()), right.pop(reference)
        for name, own in right.items():
            row = metrics.paired_difference(own, base, patients, draws=draws)
            rows.append(row | {"model": name, "accuracy": own.mean(), "reference": base.mean()})
        table = pd.DataFrame(rows).assign(condition=condition)
        tables.append(table.assign(p_holm=metrics.holm(table["p"])))
    new = {"value": "difference", "only_a": "only_model_right", "only_b": "only_reference_right"}
    return pd.concat(tables, ignore_index=True).rename(columns=new)[shown]


def attack_table(results: pd.DataFrame, *, eps: float) -> pd.DataFrame:
    """The FracAtlas study's table, completed: clean, PGD and worst case in per cent, by model."""
    cases = {"clean": "clean accuracy (%)", "pgd_ce": "PGD accuracy (%)", "worst": "worst case (%)"}
    names = {(attack, "accuracy"): name for attack, name in cases.items()}
    names |= {("worst", m): f"{m}, worst case (%)" for m in ("sensitivity", "specificity")}
    chosen = results[_at(results, eps) | results.attack.eq("clean")]
    table = pd.DataFrame(index=pd.Index(dict.fromkeys(results.model), name="model"))
    for (attack, metric), name in names.items():
        own = chosen[chosen.attack.eq(attack) & chosen.metric.eq(metric)].set_index("model")
        cells = {model: with_interval(row, scale=100, digits=1) for model, row in own.iterrows()}
        table[name] = pd.Series(cells)
    return table.dropna(how="all")


def _at(results: pd.DataFrame, eps: float) -> pd.Series:
    return np.isclose(results.eps, eps) & results.eps_unit.eq("pixel")


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy with its interval: models down, attack and eps (pixel units) across."""
    chosen = results[results.metric.eq("accuracy") & results.eps_unit.eq("pixel")]
    chosen = chosen.assign(cell=[with_interval(row) for _, row in chosen.iterrows()])
    at = {"index": "model", "columns": ["attack", "eps"], "values": "cell", "sort": False}
    table = chosen.pivot_table(**at, aggfunc="first")
    names = [attack if not eps else f"{attack} {eps_text(eps)}" for attack, eps in table]
    return table.set_axis(names, axis=1).reindex(list(dict.fromkeys(chosen.model)))


def verdict(
    results: pd.DataFrame,
    masking: pd.DataFrame,
    paired: pd.DataFrame,
    run: Run,
    *,
    reference: str = "baseline",
) -> str:
    """Sentences (markdown) on which defence holds in the worst case, from the numbers alone."""
    eps, own = run.headline_eps, results.set_index("model")
    worst = own[own.attack.eq("worst") & np.isclose(own.eps, eps) & own.metric.eq("accuracy")]
    clean = own[own.attack.eq("clean") & own.metric.eq("balanced_accuracy")]["value"]
    base = worst.loc[reference]
    said = f"In the worst case at {eps_text(eps)} the **{reference}** model is right on "
    lines = [f"{said}{with_interval(base)} of {base['n']:.0f} images."]
    tests = paired[paired.condition.str.startswith("worst")].set_index("model")["p_holm"]
    for name, p in tests.items():
        row = worst.loc[name]
        gain, said = row["value"] - base["value"], "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
        remark = _judge(row["value"], gain, p, masking.loc[name], balanced=clean[name])
        text = f"{with_interval(row)}, {gain:+.3f} against {reference} ({said}). {remark}"
        lines.append(f"- **{name}**: {text}")
    shown = "these sentences show the machinery, not a finding."
    if run.synthetic:
        lines.append(f"\n*Synthetic images and a tiny model: {shown}*")
    elif run.profile == "smoke":
        more = "PROFILE = 'cpu' (a laptop) or 'full' (a GPU) runs the study."
        lines.append(f"\n*A smoke run, a tiny model on few images: {shown} {more}*")
    return "\n".join(lines)


def _judge(worst: float, gain: float, p: float, mask: pd.Series, *, balanced: float) -> str:
    """The remark after the numbers: a model that guesses, or hides its gradient, has no gain."""
    if balanced < 0.6:
        guess = "what gives nearly every image the same answer cannot be attacked."
        return f"No defence: its clean balanced accuracy is {balanced:.3f}, and {guess}"
    if mask["gap"] > 0.05 or mask["zero_gradients"] > 0.05:
        ce, margin = f"{mask['pgd_ce']:.3f}", f"{mask['pgd_margin']:.3f}"
        losses = f"PGD with cross-entropy leaves {ce} where the margin loss leaves {margin}."
        zeros = f"{mask['zero_gradients']:.0%} of its input gradients are exactly zero"
        return f"Masked gradients: {zeros}, and {losses}"
    if gain >= 0.1 and p < 0.01:
        end = "." if worst >= 0.5 else ", though most images still fall."
        return f"A real gain under every attack of the list{end}"
    small = gain > 0 and p < 0.05
    return "A small real gain." if small else "No gain that this test split can show."


def save_figure(figure: Figure, run: Run, name: str) -> Path:
    """Write `figure` to the run's `figures/` as PNG, in one step; returns the path."""
    path = run.run_dir / "figures" / f"{name}.png"
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    return path
