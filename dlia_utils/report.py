"""Tidy result rows and figures: a table is a DataFrame, a figure is a function that returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import comparison, files, metrics
from .device import hardware
from .run import Run, nearest
from .study import Study, weights_label
from .units import eps_text

RESULT_COLUMNS = (
    "notebook",
    "model",
    "attack",
    "eps",
    "eps_unit",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "seed",
    "size",
    "epochs",
    "weights",
    "profile",
    "data",
    "hardware",
)

# What tells one result from another; the rest is what was found, and how.
IDENTITY = (
    "notebook",
    "model",
    "attack",
    "eps",
    "eps_unit",
    "metric",
    "seed",
    "size",
    "profile",
    "data",
)


def result_rows(table: pd.DataFrame, config: Run, **labels) -> pd.DataFrame:
    """Metric rows (metric, value, ci_low, ci_high, n) completed to the suite's tidy `RESULT_COLUMNS`.

    `labels` fills model, attack, eps and eps_unit; what a clean row does not have stays "clean", 0 and "pixel".
    epochs are those that the model was really trained for, where the run folder says so, else the setting.
    Errors: ValueError for a column or label that is none of `RESULT_COLUMNS`.
    """
    for name in (*labels, *table.columns):
        if name not in RESULT_COLUMNS:
            raise ValueError(f"result rows have no column {name!r}{nearest(name, RESULT_COLUMNS)}")
    known = {
        "attack": "clean",
        "eps": 0.0,
        "eps_unit": "pixel",
        "ci_low": np.nan,
        "ci_high": np.nan,
    } | labels
    context = {
        "notebook": config.notebook,
        "seed": config.seed,
        "size": config.size,
        "profile": config.profile,
        "data": config.data_name,
        "hardware": hardware(),
    }
    filled = table.assign(**{k: v for k, v in (known | context).items() if k not in table.columns})
    if "epochs" not in filled:
        filled["epochs"] = [_epochs(config, model) for model in filled["model"]]
    if "weights" not in filled:
        filled["weights"] = [weights_label(config, model) for model in filled["model"]]
    return filled.reindex(columns=list(RESULT_COLUMNS))


def _epochs(config: Run, model: str) -> int:
    """Lines of the log that `train.fit` kept of this model (or of its head alone); the setting where there is none."""
    logs = [config.run_dir / name / "metrics.csv" for name in (model, f"{model}_head")]
    return next((len(pd.read_csv(log)) for log in logs if log.exists()), config.epochs)


def update_results(rows: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Merge `rows` into the results file: a row that says the same of itself (`IDENTITY`) is replaced."""
    missing = set(RESULT_COLUMNS) - set(rows.columns)
    if missing:
        raise ValueError(
            f"result rows lack the columns {sorted(missing)}; build them with result_rows()"
        )
    path = Path(path)
    merged = pd.concat([pd.read_csv(path), rows], ignore_index=True) if path.exists() else rows
    # pandas before 3 reads back another last digit than it wrote: the same eps would count as two.
    merged = merged.assign(eps=merged["eps"].round(12))
    merged = merged.drop_duplicates(list(IDENTITY), keep="last")
    files.write_csv(merged, path)
    return merged.reset_index(drop=True)


def interval_table(table: pd.DataFrame) -> pd.DataFrame:
    """Metric rows (metric, value, ci_low, ci_high, n) for reading: metric, "value [low, high]", n."""
    cells = [with_interval(row) for _, row in table.iterrows()]
    return pd.DataFrame(
        {"metric": table["metric"].to_numpy(), "value [95 % interval]": cells, "images": table["n"]}
    )


def accuracy_rows(
    per_image: pd.DataFrame, study: Study, *, model: str, eps_unit: str = "pixel"
) -> pd.DataFrame:
    """Accuracy under attack with patient intervals, one result row per attack and eps.

    `per_image` has columns attack, eps, image (row number in the manifest) and fooled.
    """
    rows = []
    for (attack, eps), part in per_image.groupby(["attack", "eps"], sort=False):
        right = ~part["fooled"].to_numpy(bool)
        patients = study.patients(part["image"].to_numpy())
        row = metrics.share(right, patients, draws=study.run.bootstrap_draws)
        rows.append(row | {"metric": "accuracy", "attack": attack, "eps": eps})
    return result_rows(pd.DataFrame(rows), study.run, model=model, eps_unit=eps_unit)


def direction_rows(
    per_image: pd.DataFrame, study: Study, *, model: str, eps: float
) -> pd.DataFrame:
    """What the worst case at `eps` costs in each direction: sensitivity (missed disease) and specificity (false alarm).

    `per_image` as for `accuracy_rows`, with the column label. Intervals resample the patients of each class.
    """
    part = per_image[per_image["attack"].eq("worst") & np.isclose(per_image["eps"], eps)]
    rows = []
    for metric, label in (("sensitivity", 1), ("specificity", 0)):
        own = part[part["label"].eq(label)]
        right, patients = ~own["fooled"].to_numpy(bool), study.patients(own["image"].to_numpy())
        row = metrics.share(right, patients, draws=study.run.bootstrap_draws)
        rows.append(row | {"metric": metric, "attack": "worst", "eps": eps})
    return result_rows(pd.DataFrame(rows), study.run, model=model)


def attacked_predictions(per_image: pd.DataFrame, *, attack: str, eps: float) -> pd.DataFrame:
    """Label and prediction of every image under `attack` at `eps`, for two classes: a fooled model names the other.

    `per_image` as the rows of `attacks.evaluate.robust`. Columns image, label, predicted.
    """
    part = per_image[
        per_image["attack"].eq(attack) & np.isclose(per_image["eps"], eps)
    ].sort_values("image")
    predicted = part["label"].to_numpy() ^ part["fooled"].to_numpy(bool)
    return part[["image", "label"]].assign(predicted=predicted).reset_index(drop=True)


def one_pixel_rows(
    table: pd.DataFrame, study: Study, *, model: str, setting: Sequence
) -> pd.DataFrame:
    """Result rows of one One-Pixel setting, with the clean accuracy of the same sample beside them.

    `table` has columns image, label, clean_probability and probability (of class 1, before and after) and queries.
    """
    pixels, population, iterations, f, cr = setting
    name = f"one_pixel k={pixels} pop={population} it={iterations} F={f:g} CR={cr:g}"
    patients = study.patients(table["image"].to_numpy())
    outcome = metrics.classification(
        table["label"], table["probability"], patients, draws=study.run.bootstrap_draws
    )
    right = (table["clean_probability"] > 0.5).eq(table["label"] == 1)
    beside = pd.DataFrame(
        {
            "metric": ["clean_accuracy", "queries_mean"],
            "value": [right.mean(), table["queries"].mean()],
            "n": len(table),
        }
    )
    rows = pd.concat([outcome, beside], ignore_index=True)
    return result_rows(
        rows, study.run, model=model, attack=name, eps=1.0, eps_unit="pixels changed fully"
    )


def one_pixel_table(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, macro precision, recall and F1 under each One-Pixel setting, as the original study prints them."""
    shown = ["clean_accuracy", "accuracy", "precision", "recall", "f1", "queries_mean"]
    chosen = results[results.attack.str.startswith("one_pixel") & results.metric.isin(shown)].copy()
    chosen["cell"] = [with_interval(row) for _, row in chosen.iterrows()]
    chosen.loc[chosen.metric.isin(shown[2:5]), "cell"] = chosen["value"].map("{:.3f}".format)
    table = chosen.pivot(index=["attack", "model", "n"], columns="metric", values="cell")[shown]
    return table.reindex(
        pd.MultiIndex.from_frame(chosen[["attack", "model", "n"]].drop_duplicates())
    ).reset_index()


def zero_gradient_rows(shares: Mapping[str, float], study: Study) -> pd.DataFrame:
    """Result rows of the share of images with an exactly zero input gradient, by model."""
    table = pd.DataFrame(
        {
            "model": shares.keys(),
            "metric": "zero_gradient_share",
            "value": shares.values(),
            "n": len(study.rows("test")),
        }
    )
    return result_rows(table, study.run, attack="cross-entropy gradient")


def masking_table(results: pd.DataFrame, *, eps: float) -> pd.DataFrame:
    """Per model: accuracy under PGD with both losses at `eps`, their gap, and the share of zero gradients."""
    near = results[
        np.isclose(results.eps, eps) & results.eps_unit.eq("pixel") & results.metric.eq("accuracy")
    ]
    table = near.pivot_table(index="model", columns="attack", values="value", sort=False)[
        ["pgd_ce", "pgd_margin"]
    ]
    zeros = results[results.metric.eq("zero_gradient_share")].set_index("model")["value"]
    return table.assign(gap=table.pgd_ce - table.pgd_margin, zero_gradients=zeros)


def paired_tests(
    per_image: Mapping[str, pd.DataFrame], study: Study, *, eps: float, reference: str
) -> pd.DataFrame:
    """Every model against `reference` on the same images, clean and in the worst case at `eps`, one row each.

    `per_image` holds tables as `attacks.evaluate.robust` gives their rows, by model. The difference of the accuracies
    has an interval and an exact p by patient (`comparison.paired_difference`); p_holm is p adjusted for the number of
    models in this condition.
    """

    def outcome(name: str, attack: str, at: float) -> tuple[np.ndarray, np.ndarray]:
        table = per_image[name]
        part = table[table.attack.eq(attack) & np.isclose(table.eps, at)].sort_values("image")
        return ~part["fooled"].to_numpy(bool), part["image"].to_numpy()

    tables = []
    for condition, attack, at in (
        ("clean", "clean", 0.0),
        (f"worst case {eps_text(eps)}", "worst", eps),
    ):
        base, images = outcome(reference, attack, at)
        rows = []
        for name in per_image:
            if name != reference:
                own = outcome(name, attack, at)[0]
                found = comparison.paired_difference(
                    own, base, study.patients(images), draws=study.run.bootstrap_draws
                )
                rows.append(
                    {
                        "condition": condition,
                        "model": name,
                        "accuracy": own.mean(),
                        "reference": base.mean(),
                        "difference": found["value"],
                        "ci_low": found["ci_low"],
                        "ci_high": found["ci_high"],
                        "only_model_right": found["only_a"],
                        "only_reference_right": found["only_b"],
                        "p": found["p"],
                    }
                )
        tables.append(pd.DataFrame(rows).assign(p_holm=comparison.holm([row["p"] for row in rows])))
    return pd.concat(tables, ignore_index=True)


def attack_table(results: pd.DataFrame, *, eps: float) -> pd.DataFrame:
    """The table of the FracAtlas study, completed: clean and PGD accuracy in per cent, worst case, its two directions.

    Models down; `results` are tidy result rows, `eps` is in pixel units.
    """
    near = np.isclose(results.eps, eps) & results.eps_unit.eq("pixel")
    columns = {
        "clean accuracy (%)": results.attack.eq("clean") & results.metric.eq("accuracy"),
        "PGD accuracy (%)": near & results.attack.eq("pgd_ce") & results.metric.eq("accuracy"),
        "worst case (%)": near & results.attack.eq("worst") & results.metric.eq("accuracy"),
        "sensitivity, worst case (%)": near
        & results.attack.eq("worst")
        & results.metric.eq("sensitivity"),
        "specificity, worst case (%)": near
        & results.attack.eq("worst")
        & results.metric.eq("specificity"),
    }
    table = pd.DataFrame(index=pd.Index(dict.fromkeys(results.model), name="model"))
    for name, rows in columns.items():
        own = results[rows].set_index("model")
        table[name] = pd.Series(
            {model: with_interval(row, scale=100, digits=1) for model, row in own.iterrows()}
        )
    return table.dropna(how="all")


def map_rows(summary: pd.DataFrame, study: Study, *, model: str) -> pd.DataFrame:
    """Result rows of a `localisation.localise` summary; the map goes under `attack`, its score and region under `metric`.

    `summary` has a column region ("box" or "outline") as well.
    """
    named = summary.assign(
        attack="map " + summary["map"], metric=summary["score"] + " " + summary["region"]
    )
    columns = ["attack", "metric", "value", "ci_low", "ci_high", "n"]
    return result_rows(named[columns], study.run, model=model)


def map_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Localisation scores with intervals: models and maps down, scores across."""
    cells = summary.assign(cell=[with_interval(row) for _, row in summary.iterrows()])
    order = cells[["model", "map"]].drop_duplicates()
    table = cells.pivot(index=["model", "map"], columns="score", values="cell")
    return table.loc[
        list(order.itertuples(index=False, name=None)), list(dict.fromkeys(summary["score"]))
    ]


def map_verdict(differences: pd.DataFrame, *, score: str = "coverage_gain") -> str:
    """Plain sentences (markdown) on which maps find the marked region, from paired differences alone.

    `differences` is `localisation.against_references`'s table with a column model.
    """
    own = differences[differences["score"].eq(score)]
    found = [
        key for key, part in own.groupby(["model", "map"], sort=False) if (part["ci_low"] > 0).all()
    ]
    lost = [
        key
        for key, part in own.groupby(["model", "map"], sort=False)
        if (part["ci_high"] < 0).any()
    ]
    total = own.groupby(["model", "map"]).ngroups
    lines = [
        f"By *{score.replace('_', ' ')}*, {len(found)} of {total} maps beat all of "
        f"{', '.join(dict.fromkeys(own['reference']))}, film by film (95 % interval of the difference above 0)."
    ]
    for key in found:
        part = own[own["model"].eq(key[0]) & own["map"].eq(key[1])]
        hardest = part.loc[part["value"].idxmin()]
        lines.append(
            f"- **{key[0]}, {key[1]}**: {with_interval(hardest, signed=True)} against the hardest of them, "
            f"{hardest['reference']}."
        )
    if lost:
        names = "; ".join(f"{model}, {one}" for model, one in lost)
        lines.append(f"- Significantly *worse* than at least one map that knows nothing: {names}.")
    return "\n".join(lines)


def verdict(
    results: pd.DataFrame,
    masking: pd.DataFrame,
    paired: pd.DataFrame,
    config: Run,
    *,
    reference: str = "baseline",
) -> str:
    """Plain sentences (markdown) on which defence holds in the worst case, written from the numbers alone."""
    headline = results.attack.eq("worst") & np.isclose(results.eps, config.headline_eps)
    worst = results[headline & results.metric.eq("accuracy")].set_index("model")
    tests = paired[paired.condition.str.startswith("worst")].set_index("model")
    eps = eps_text(config.headline_eps)
    clean = results[results.attack.eq("clean") & results.metric.eq("balanced_accuracy")].set_index(
        "model"
    )["value"]
    base = worst.loc[reference]
    lines = [
        f"In the worst case at {eps} the **{reference}** model is right on {with_interval(base)} of {base['n']:.0f} images."
    ]
    for name, test in tests.iterrows():
        gain, mask = worst.loc[name, "value"] - base["value"], masking.loc[name]
        remark = _judge(worst.loc[name, "value"], gain, test["p_holm"], mask, balanced=clean[name])
        lines.append(
            f"- **{name}**: {with_interval(worst.loc[name])}, {gain:+.3f} against {reference} "
            f"({p_text(test['p_holm'])}). {remark}"
        )
    if config.synthetic:
        lines.append(
            "\n*Synthetic images and a tiny model: these sentences show the machinery, not a finding.*"
        )
    elif config.profile == "smoke":
        lines.append(
            "\n*A smoke run, a tiny model on few images: these sentences show the machinery, not a finding. "
            "PROFILE = 'cpu' (a laptop) or 'full' (a GPU) runs the study.*"
        )
    return "\n".join(lines)


def _judge(worst: float, gain: float, p: float, mask: pd.Series, *, balanced: float) -> str:
    """The remark after the numbers; a model that cannot read clean films, or hides its gradient, has no gain."""
    if balanced < 0.6:
        return (
            f"No defence: its clean balanced accuracy is {balanced:.3f}, and what gives nearly every film the "
            "same answer cannot be attacked."
        )
    if mask["gap"] > 0.05 or mask["zero_gradients"] > 0.05:
        return (
            f"Masked gradients: {mask['zero_gradients']:.0%} of its input gradients are exactly zero, and PGD with "
            f"cross-entropy leaves {mask['pgd_ce']:.3f} where the margin loss leaves {mask['pgd_margin']:.3f}."
        )
    if gain >= 0.1 and p < 0.01:
        return "A real gain under every attack of the list" + (
            "." if worst >= 0.5 else ", though most images still fall."
        )
    if gain > 0 and p < 0.05:
        return "A small real gain."
    return "No gain that this test split can show."


def p_text(p: float) -> str:
    """A p-value as people write it.

    >>> p_text(0.0421), p_text(3e-9)
    ('p = 0.042', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def with_interval(
    row: Mapping, *, scale: float = 1.0, digits: int = 3, signed: bool = False
) -> str:
    """One number the way the tables print it; signed: a difference, with + or -.

    >>> with_interval({"value": 0.9123, "ci_low": 0.88, "ci_high": 0.94})
    '0.912 [0.880, 0.940]'
    """
    value, low, high = (
        f"{scale * row[name]:{'+' if signed else ''}.{digits}f}"
        for name in ("value", "ci_low", "ci_high")
    )
    return f"{value} [{low}, {high}]" if np.isfinite(row["ci_low"]) else value


def results_table(
    results: pd.DataFrame, *, metric: str = "accuracy", unit: str = "pixel"
) -> pd.DataFrame:
    """Models down, attack and eps across, 'value [interval]' in the cells."""
    chosen = results[(results.metric == metric) & (results.eps_unit == unit)].copy()
    chosen["cell"] = [with_interval(row) for _, row in chosen.iterrows()]
    order = list(dict.fromkeys(chosen.model))
    table = chosen.pivot_table(
        index="model", columns=["attack", "eps"], values="cell", aggfunc="first", sort=False
    )
    table.columns = [
        attack if not eps else f"{attack} {eps_text(eps, unit)}" for attack, eps in table.columns
    ]
    return table.reindex(order)


def save_figure(figure: Figure, config: Run, name: str) -> Path:
    """Write `figure` to the run's `figures/` as PNG, in one step; returns the path."""
    path = config.run_dir / "figures" / f"{name}.png"
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    return path
