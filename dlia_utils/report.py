"""Tidy result rows and figures: a table is a DataFrame, a figure is a function that returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

from . import comparison, files, metrics
from .device import hardware
from .run import Run, nearest
from .study import Study, weights_label
from .units import eps_text

RESULT_COLUMNS = (
    "notebook", "model", "attack", "eps", "eps_unit", "metric", "value", "ci_low", "ci_high", "n",
    "seed", "size", "epochs", "weights", "profile", "data", "hardware",
)  # fmt: skip

# What tells one result from another; the rest is what was found, and how.
IDENTITY = ("notebook", "model", "attack", "eps", "eps_unit", "metric", "seed", "size", "profile", "data")

COLORS = ("#1b4965", "#d1495b", "#edae49", "#e07b39", "#8d6a9f", "#2a9d5c", "#8a8a8a")


def result_rows(table: pd.DataFrame, config: Run, **labels) -> pd.DataFrame:
    """Metric rows (metric, value, ci_low, ci_high, n) completed to the suite's tidy `RESULT_COLUMNS`.

    `labels` fills model, attack, eps and eps_unit; what a clean row does not have stays "clean", 0 and "pixel".
    epochs are those that the model was really trained for, where the run folder says so, else the setting.
    Errors: ValueError for a column or label that is none of `RESULT_COLUMNS`.
    """
    for name in (*labels, *table.columns):
        if name not in RESULT_COLUMNS:
            raise ValueError(f"result rows have no column {name!r}{nearest(name, RESULT_COLUMNS)}")
    known = {"attack": "clean", "eps": 0.0, "eps_unit": "pixel", "ci_low": np.nan, "ci_high": np.nan} | labels
    context = {
        "notebook": config.notebook, "seed": config.seed, "size": config.size, "profile": config.profile,
        "data": config.data_name, "hardware": hardware(),
    }  # fmt: skip
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
        raise ValueError(f"result rows lack the columns {sorted(missing)}; build them with result_rows()")
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
    return pd.DataFrame({"metric": table["metric"].to_numpy(), "value [95 % interval]": cells, "images": table["n"]})


def accuracy_rows(per_image: pd.DataFrame, study: Study, *, model: str, eps_unit: str = "pixel") -> pd.DataFrame:
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


def direction_rows(per_image: pd.DataFrame, study: Study, *, model: str, eps: float) -> pd.DataFrame:
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
    part = per_image[per_image["attack"].eq(attack) & np.isclose(per_image["eps"], eps)].sort_values("image")
    predicted = part["label"].to_numpy() ^ part["fooled"].to_numpy(bool)
    return part[["image", "label"]].assign(predicted=predicted).reset_index(drop=True)


def one_pixel_rows(table: pd.DataFrame, study: Study, *, model: str, setting: Sequence) -> pd.DataFrame:
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
    beside = pd.DataFrame({"metric": ["clean_accuracy", "queries_mean"],
                           "value": [right.mean(), table["queries"].mean()], "n": len(table)})  # fmt: skip
    rows = pd.concat([outcome, beside], ignore_index=True)
    return result_rows(rows, study.run, model=model, attack=name, eps=1.0, eps_unit="pixels changed fully")


def one_pixel_table(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, macro precision, recall and F1 under each One-Pixel setting, as the original study prints them."""
    shown = ["clean_accuracy", "accuracy", "precision", "recall", "f1", "queries_mean"]
    chosen = results[results.attack.str.startswith("one_pixel") & results.metric.isin(shown)].copy()
    chosen["cell"] = [with_interval(row) for _, row in chosen.iterrows()]
    chosen.loc[chosen.metric.isin(shown[2:5]), "cell"] = chosen["value"].map("{:.3f}".format)
    table = chosen.pivot(index=["attack", "model", "n"], columns="metric", values="cell")[shown]
    return table.reindex(pd.MultiIndex.from_frame(chosen[["attack", "model", "n"]].drop_duplicates())).reset_index()


def zero_gradient_rows(shares: Mapping[str, float], study: Study) -> pd.DataFrame:
    """Result rows of the share of images with an exactly zero input gradient, by model."""
    table = pd.DataFrame({"model": shares.keys(), "metric": "zero_gradient_share", "value": shares.values(),
                          "n": len(study.rows("test"))})  # fmt: skip
    return result_rows(table, study.run, attack="cross-entropy gradient")


def masking_table(results: pd.DataFrame, *, eps: float) -> pd.DataFrame:
    """Per model: accuracy under PGD with both losses at `eps`, their gap, and the share of zero gradients."""
    near = results[np.isclose(results.eps, eps) & results.eps_unit.eq("pixel") & results.metric.eq("accuracy")]
    table = near.pivot_table(index="model", columns="attack", values="value", sort=False)[["pgd_ce", "pgd_margin"]]
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
    for condition, attack, at in (("clean", "clean", 0.0), (f"worst case {eps_text(eps)}", "worst", eps)):
        base, images = outcome(reference, attack, at)
        rows = []
        for name in per_image:
            if name != reference:
                own = outcome(name, attack, at)[0]
                found = comparison.paired_difference(
                    own, base, study.patients(images), draws=study.run.bootstrap_draws
                )
                rows.append({"condition": condition, "model": name, "accuracy": own.mean(), "reference": base.mean(),
                             "difference": found["value"], "ci_low": found["ci_low"], "ci_high": found["ci_high"],
                             "only_model_right": found["only_a"], "only_reference_right": found["only_b"],
                             "p": found["p"]})  # fmt: skip
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
        "sensitivity, worst case (%)": near & results.attack.eq("worst") & results.metric.eq("sensitivity"),
        "specificity, worst case (%)": near & results.attack.eq("worst") & results.metric.eq("specificity"),
    }
    table = pd.DataFrame(index=pd.Index(dict.fromkeys(results.model), name="model"))
    for name, rows in columns.items():
        own = results[rows].set_index("model")
        table[name] = pd.Series({model: with_interval(row, scale=100, digits=1) for model, row in own.iterrows()})
    return table.dropna(how="all")


def map_rows(summary: pd.DataFrame, study: Study, *, model: str) -> pd.DataFrame:
    """Result rows of a `localisation.localise` summary; the map goes under `attack`, its score and region under `metric`.

    `summary` has a column region ("box" or "outline") as well.
    """
    named = summary.assign(attack="map " + summary["map"], metric=summary["score"] + " " + summary["region"])
    columns = ["attack", "metric", "value", "ci_low", "ci_high", "n"]
    return result_rows(named[columns], study.run, model=model)


def map_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Localisation scores with intervals: models and maps down, scores across."""
    cells = summary.assign(cell=[with_interval(row) for _, row in summary.iterrows()])
    order = cells[["model", "map"]].drop_duplicates()
    table = cells.pivot(index=["model", "map"], columns="score", values="cell")
    return table.loc[list(order.itertuples(index=False, name=None)), list(dict.fromkeys(summary["score"]))]


def map_verdict(differences: pd.DataFrame, *, score: str = "coverage_gain") -> str:
    """Plain sentences (markdown) on which maps find the marked region, from paired differences alone.

    `differences` is `localisation.against_references`'s table with a column model.
    """
    own = differences[differences["score"].eq(score)]
    found = [key for key, part in own.groupby(["model", "map"], sort=False) if (part["ci_low"] > 0).all()]
    lost = [key for key, part in own.groupby(["model", "map"], sort=False) if (part["ci_high"] < 0).any()]
    total = own.groupby(["model", "map"]).ngroups
    lines = [f"By *{score.replace('_', ' ')}*, {len(found)} of {total} maps beat all of "
             f"{', '.join(dict.fromkeys(own['reference']))}, film by film (95 % interval of the difference above 0)."]  # fmt: skip
    for key in found:
        part = own[own["model"].eq(key[0]) & own["map"].eq(key[1])]
        hardest = part.loc[part["value"].idxmin()]
        lines.append(f"- **{key[0]}, {key[1]}**: {with_interval(hardest, signed=True)} against the hardest of them, "
                     f"{hardest['reference']}.")  # fmt: skip
    if lost:
        names = "; ".join(f"{model}, {one}" for model, one in lost)
        lines.append(f"- Significantly *worse* than at least one map that knows nothing: {names}.")
    return "\n".join(lines)


def verdict(
    results: pd.DataFrame, masking: pd.DataFrame, paired: pd.DataFrame, config: Run, *, reference: str = "baseline"
) -> str:
    """Plain sentences (markdown) on which defence holds in the worst case, written from the numbers alone."""
    headline = results.attack.eq("worst") & np.isclose(results.eps, config.headline_eps)
    worst = results[headline & results.metric.eq("accuracy")].set_index("model")
    tests = paired[paired.condition.str.startswith("worst")].set_index("model")
    eps = eps_text(config.headline_eps)
    clean = results[results.attack.eq("clean") & results.metric.eq("balanced_accuracy")].set_index("model")["value"]
    base = worst.loc[reference]
    lines = [f"In the worst case at {eps} the **{reference}** model is right on {with_interval(base)} of {base['n']:.0f} images."]
    for name, test in tests.iterrows():
        gain, mask = worst.loc[name, "value"] - base["value"], masking.loc[name]
        remark = _judge(worst.loc[name, "value"], gain, test["p_holm"], mask, balanced=clean[name])
        lines.append(f"- **{name}**: {with_interval(worst.loc[name])}, {gain:+.3f} against {reference} "
                     f"({p_text(test['p_holm'])}). {remark}")  # fmt: skip
    if config.synthetic:
        lines.append("\n*Synthetic images and a tiny model: these sentences show the machinery, not a finding.*")
    elif config.profile == "smoke":
        lines.append("\n*A smoke run, a tiny model on few images: these sentences show the machinery, not a finding. "
                     "PROFILE = 'cpu' (a laptop) or 'full' (a GPU) runs the study.*")  # fmt: skip
    return "\n".join(lines)


def _judge(worst: float, gain: float, p: float, mask: pd.Series, *, balanced: float) -> str:
    """The remark after the numbers; a model that cannot read clean films, or hides its gradient, has no gain."""
    if balanced < 0.6:
        return (f"No defence: its clean balanced accuracy is {balanced:.3f}, and what gives nearly every film the "
                "same answer cannot be attacked.")  # fmt: skip
    if mask["gap"] > 0.05 or mask["zero_gradients"] > 0.05:
        return (f"Masked gradients: {mask['zero_gradients']:.0%} of its input gradients are exactly zero, and PGD with "
                f"cross-entropy leaves {mask['pgd_ce']:.3f} where the margin loss leaves {mask['pgd_margin']:.3f}.")  # fmt: skip
    if gain >= 0.1 and p < 0.01:
        return "A real gain under every attack of the list" + ("." if worst >= 0.5 else ", though most images still fall.")
    if gain > 0 and p < 0.05:
        return "A small real gain."
    return "No gain that this test split can show."


def p_text(p: float) -> str:
    """A p-value as people write it.

    >>> p_text(0.0421), p_text(3e-9)
    ('p = 0.042', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def with_interval(row: Mapping, *, scale: float = 1.0, digits: int = 3, signed: bool = False) -> str:
    """One number the way the tables print it; signed: a difference, with + or -.

    >>> with_interval({"value": 0.9123, "ci_low": 0.88, "ci_high": 0.94})
    '0.912 [0.880, 0.940]'
    """
    value, low, high = (f"{scale * row[name]:{'+' if signed else ''}.{digits}f}" for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]" if np.isfinite(row["ci_low"]) else value


def results_table(results: pd.DataFrame, *, metric: str = "accuracy", unit: str = "pixel") -> pd.DataFrame:
    """Models down, attack and eps across, 'value [interval]' in the cells."""
    chosen = results[(results.metric == metric) & (results.eps_unit == unit)].copy()
    chosen["cell"] = [with_interval(row) for _, row in chosen.iterrows()]
    order = list(dict.fromkeys(chosen.model))
    table = chosen.pivot_table(index="model", columns=["attack", "eps"], values="cell", aggfunc="first", sort=False)
    table.columns = [attack if not eps else f"{attack} {eps_text(eps, unit)}" for attack, eps in table.columns]
    return table.reindex(order)


def save_figure(figure: Figure, config: Run, name: str) -> Path:
    """Write `figure` to the run's `figures/` as PNG, in one step; returns the path."""
    path = config.run_dir / "figures" / f"{name}.png"
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    return path


def _axes(columns: int, *, rows: int = 1, width: float = 3.0, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, dpi=72)
    plt.close(figure)  # the notebook shows the returned figure once; pyplot must not show it again
    return figure, axes


def _style(number: int) -> dict:
    """Colour, line style and marker of the n-th curve: different without colours as well."""
    line, marker = ("-", "--", "-.", ":")[number % 4], "osD^vPX*hd"[number % 10]
    return {"color": COLORS[number % len(COLORS)], "ls": line, "marker": marker}


def _note(config: Run) -> str:
    return f"{config.data_name}, {config.profile} profile, {config.size} px"


def figure_samples(images: np.ndarray, titles: Sequence[str], config: Run, *, columns: int = 6) -> Figure:
    """Grey images [N,1,H,W] or [N,H,W] in [0,1] with their titles."""
    images = np.asarray(images).reshape(len(images), *np.asarray(images).shape[-2:])
    rows = -(-len(images) // columns)
    figure, axes = _axes(columns, rows=rows, width=1.7, height=2.2)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
    figure.suptitle(_note(config), fontsize=9, y=1.0)
    figure.tight_layout()
    return figure


def figure_history(histories: Mapping[str, pd.DataFrame], config: Run) -> Figure:
    """Training loss and validation AUC per epoch, one line a model."""
    figure, axes = _axes(2, width=4.6, height=3.2)
    for number, (name, history) in enumerate(histories.items()):
        axes[0, 0].plot(history.epoch, history.train_loss, ms=3, label=name, **_style(number))
        axes[0, 1].plot(history.epoch, history.val_auc, ms=3, label=name, **_style(number))
    axes[0, 0].set(xlabel="epoch", ylabel="training loss (each model's own)", yscale="log")
    axes[0, 1].set(xlabel="epoch", ylabel="validation AUC")
    axes[0, 1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(_note(config), fontsize=9)
    figure.tight_layout()
    return figure


def figure_roc(labels: np.ndarray, probabilities: Mapping[str, np.ndarray], config: Run) -> Figure:
    """ROC curves on the test split, one a model; of scores [N,K] one a class, against the rest."""
    figure, axes = _axes(1, width=4.6, height=4.2)
    curves = {}
    for name, score in probabilities.items():
        if np.ndim(score) == 1:
            curves[name] = labels, score
        else:
            curves |= {f"{name}, class {k}": (labels == k, column) for k, column in enumerate(np.transpose(score))}
    for number, (name, (truth, score)) in enumerate(curves.items()):
        false_alarm, hit, _ = roc_curve(truth, score)
        axes[0, 0].plot(false_alarm, hit, label=name, lw=1.6, **_style(number) | {"marker": ""})
    axes[0, 0].plot([0, 1], [0, 1], ":", color="0.6")
    axes[0, 0].set(xlabel="1 - specificity", ylabel="sensitivity", title=f"Test ROC\n{_note(config)}")
    axes[0, 0].title.set_fontsize(9)
    axes[0, 0].legend(fontsize=7 if len(curves) < 12 else 6, frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def figure_confusion(
    labels: np.ndarray, predictions: Mapping[str, np.ndarray], classes: Sequence[str], config: Run
) -> Figure:
    """Confusion matrices (rows truth, columns prediction), one a model."""
    columns = min(4, len(predictions))
    figure, axes = _axes(columns, rows=-(-len(predictions) // columns), width=2.3, height=2.4)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, predicted) in zip(axes.flat, predictions.items(), strict=False):
        matrix = confusion_matrix(labels, predicted, labels=range(len(classes)))
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.axis("on")
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), number in np.ndenumerate(matrix):
            axis.text(j, i, f"{number}\n{share[i, j]:.0%}", ha="center", va="center", fontsize=8,
                      color="white" if share[i, j] > 0.6 else "black")  # fmt: skip
        short = [c if len(c) <= 12 else f"{c[:11]}." for c in classes]
        axis.set_xticks(range(len(classes)), short, fontsize=7, rotation=0 if len(classes) == 2 else 30)
        axis.set_yticks(range(len(classes)), short, fontsize=7, rotation=90 if len(classes) == 2 else 0, va="center")
        axis.set_title(name, fontsize=8)
    figure.suptitle(f"rows: truth, columns: prediction; {_note(config)}", fontsize=8)
    figure.tight_layout()
    return figure


def figure_accuracy_vs_eps(
    results: pd.DataFrame, config: Run, *, attack: str, unit: str = "pixel", note: str = ""
) -> Figure:
    """Accuracy against eps for all models in one figure, with the interval as a band (of at most seven models)."""
    figure, axes = _axes(1, width=6.4, height=3.9)
    chosen = results[(results.metric == "accuracy") & (results.eps_unit.eq(unit) | results.attack.eq("clean"))]
    scale = 255 if unit == "pixel" else 1
    names = list(dict.fromkeys(chosen[chosen.attack.eq(attack)].model))
    for number, name in enumerate(names):
        style = _style(number)
        line = chosen[(chosen.model == name) & chosen.attack.isin(["clean", attack])].sort_values("eps")
        axes[0, 0].plot(line.eps * scale, line.value, ms=4, label=name, **style)
        if len(names) <= 7:  # more bands would hide each other; the tables have every interval
            axes[0, 0].fill_between(line.eps * scale, line.ci_low, line.ci_high, color=style["color"], alpha=0.12, lw=0)
    xlabel = "eps (k/255, pixel units)" if unit == "pixel" else "eps (normalised units of the original study)"
    axes[0, 0].set(xlabel=xlabel, ylabel="accuracy", ylim=(-0.02, 1.02), title=f"{note or attack}\n{_note(config)}")
    axes[0, 0].title.set_fontsize(9)
    axes[0, 0].grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def figure_masking(table: pd.DataFrame, config: Run) -> Figure:
    """Per model: accuracy under PGD with cross-entropy and with the margin loss, and the zero-gradient share.

    `table` is indexed by model with columns `pgd_ce`, `pgd_margin`, `zero_gradients`. A gap between the first
    two bars is the signature of masked gradients (Carlini & Wagner, arXiv 1607.04311).
    """
    figure, axes = _axes(1, width=max(7.0, 0.55 * len(table)), height=3.4)
    names = {"pgd_ce": "accuracy, PGD cross-entropy", "pgd_margin": "accuracy, PGD logit margin",
             "zero_gradients": "share of exactly zero gradients"}  # fmt: skip
    place = np.arange(len(table))
    for offset, (column, label), color in zip((-0.27, 0.0, 0.27), names.items(), COLORS, strict=False):
        axes[0, 0].bar(place + offset, table[column], 0.25, label=label, color=color)
    axes[0, 0].set_xticks(place, table.index, fontsize=8, rotation=25, ha="right", rotation_mode="anchor")
    axes[0, 0].set(ylim=(0, 1.02), title=f"eps {eps_text(config.headline_eps)}; {_note(config)}")
    axes[0, 0].title.set_fontsize(9)
    axes[0, 0].legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncol=3)
    figure.tight_layout()
    return figure


def figure_adversarial(
    clean: np.ndarray, attacked: Mapping[str, np.ndarray], captions: Sequence[Mapping[str, str]], config: Run
) -> Figure:
    """Clean image, attacked images and the amplified difference; `captions[row]` maps column name to its line.

    `clean` [N,1,H,W], each entry of `attacked` the same shape. One row an image.
    """
    columns = ["clean"] + [part for name in attacked for part in (name, f"{name} - clean")]
    figure, axes = _axes(len(columns), rows=len(clean), width=1.7, height=2.2)
    for row in range(len(clean)):
        for axis, column in zip(axes[row], columns, strict=True):
            source = attacked.get(column.removesuffix(" - clean"), clean)
            if column.endswith(" - clean"):
                difference = (source[row] - clean[row]).mean(0)
                reach = max(float(np.abs(difference).max()), 1e-6)
                axis.imshow(difference, cmap="RdBu", vmin=-reach, vmax=reach)
            else:
                axis.imshow(source[row].mean(0), cmap="gray", vmin=0, vmax=1)
            axis.set_title(captions[row].get(column, column), fontsize=7)
            axis.axis("off")
    figure.suptitle(_note(config), fontsize=9, y=1.0)
    figure.tight_layout()
    return figure
