"""The README's tables and pictures, made from the committed results: `python -m dlia_utils.published` rewrites them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import files, phantom
from .datasets import NIH_CLASSES
from .detect import figures
from .report import eps_text, figure_accuracy_vs_eps, with_interval

REPOSITORY = Path(__file__).resolve().parents[1]
HEADLINE_EPS = 4 / 255


def markdown(table: pd.DataFrame) -> str:
    """A DataFrame as a markdown table, without its index.

    >>> print(markdown(pd.DataFrame({"model": ["a"], "value": [0.5]})))
    | model | value |
    |---|---|
    | a | 0.5 |
    """
    lines = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|" for line in lines)


def headline(results: pd.DataFrame) -> pd.DataFrame:
    """Per model: clean accuracy and AUC, and accuracy under each attack at 4/255 in pixel units."""
    rows = []
    for model in dict.fromkeys(results.model):
        own = results[results.model.eq(model)]
        cells = {"model": model}
        cells["clean accuracy"] = _cell(own, attack="clean", metric="accuracy")
        cells["AUC"] = _cell(own, attack="clean", metric="auc")
        near = own[np.isclose(own.eps, HEADLINE_EPS) & own.eps_unit.eq("pixel")]
        for attack in ("noise", "fgsm", "pgd_ce", "pgd_margin"):
            cells[attack] = f"{near[near.attack.eq(attack)]['value'].item():.3f}"
        cells["**worst case**"] = _cell(near, attack="worst", metric="accuracy")
        zero = own[own.metric.eq("zero_gradient_share")]["value"].item()
        cells["zero gradients"] = f"{zero:.1%}"
        rows.append(cells)
    return pd.DataFrame(rows)


def beside_published(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """FGSM in the normalised units of the original study: its accuracy and ours, model by model."""
    rows = []
    for model in dict.fromkeys(results.model):
        for source, table in (("published", published), ("here", results)):
            own = table[table.model.eq(model) & table.metric.eq("accuracy")]
            if own.empty:  # a model that the original study did not have
                continue
            cells = {"model": model, "numbers": source, "clean": f"{own[own.attack.eq('clean')]['value'].item():.3f}"}
            for _, row in own[own.attack.eq("fgsm_normalised")].sort_values("eps").iterrows():
                cells[eps_text(row.eps, "normalised")] = f"{row['value']:.3f}"
            rows.append(cells)
    return pd.DataFrame(rows)


def one_pixel(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """One-Pixel accuracy per setting: ours on the stated sample, the original study's beside it."""
    own = results[results.attack.str.startswith("one_pixel")]
    rows = []
    for (attack, model), part in own.groupby(["attack", "model"], sort=False):
        theirs = published[published.attack.eq(attack) & published.model.eq(model)]["value"]
        value = {row.metric: row for _, row in part.iterrows()}
        rows.append({
            "setting": attack.removeprefix("one_pixel "), "model": model, "n": int(value["accuracy"].n),
            "clean accuracy": f"{value['clean_accuracy'].value:.3f}", "under attack": with_interval(value["accuracy"]), "macro F1": f"{value['f1'].value:.3f}",
            "queries per image": f"{value['queries_mean'].value:,.0f}",
            "published": f"{theirs.item():.3f}" if len(theirs) else "",
        })  # fmt: skip
    return pd.DataFrame(rows)


def detection(results: pd.DataFrame) -> pd.DataFrame:
    """What the plain view of the detector reaches on the scored films, each with its interval."""
    names = {"mAP50": "mAP, IoU 0.5", "mAP50_95": "mAP, IoU 0.5 to 0.95", "froc_mean": "FROC, mean of 1/8 to 8",
             "sensitivity_at_1": "sensitivity at 1 false mark per film"}  # fmt: skip
    own = results[results.model.eq("plain")].set_index("metric")
    return pd.DataFrame([{"metric": text, "value": with_interval(own.loc[name])} for name, text in names.items()])


def views(results: pd.DataFrame) -> pd.DataFrame:
    """mAP of each view and fusion, and its paired difference to the plain view."""
    rows = []
    for model, own in results[results.data.eq("fracatlas")].groupby("model", sort=False):
        own = own.set_index("metric")
        gain = own.loc["mAP50_gain"]
        signed = "" if model == "plain" else f"{gain.value:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}]"
        rows.append({"views": model, "mAP, IoU 0.5": with_interval(own.loc["mAP50"]), "difference to plain": signed})
    return pd.DataFrame(rows)


def planted(results: pd.DataFrame) -> pd.DataFrame:
    """Average precision of each planted finding, learnt from scratch and scored out of fold."""
    own = results[results.model.eq("planted findings, 5 folds") & results.metric.str.startswith(("mAP50", "AP50"))]
    names = own.metric.str.removeprefix("AP50 ").replace({"mAP50": "all, mAP, IoU 0.5", "mAP50_95": "all, mAP, IoU 0.5 to 0.95"})
    return pd.DataFrame({"finding": names, "average precision": [with_interval(row) for _, row in own.iterrows()]})


def _cell(own: pd.DataFrame, *, attack: str, metric: str) -> str:
    return with_interval(own[own.attack.eq(attack) & own.metric.eq(metric)].iloc[0])


def blocks() -> dict[str, str]:
    """Block name -> markdown, for every `<!-- table NAME -->` pair of markers in the README."""
    results = pd.read_csv(REPOSITORY / "results" / "01_pneumonia.csv")
    boxes = pd.read_csv(REPOSITORY / "results" / "05_detection.csv")
    published = pd.read_csv(REPOSITORY / "results" / "published_medical_image_diagnosis.csv")
    return {
        "01-headline": markdown(headline(results)),
        "01-fgsm": markdown(beside_published(results, published)),
        "01-one-pixel": markdown(one_pixel(results, published)),
        "05-detection": markdown(detection(boxes)),
        "05-views": markdown(views(boxes)),
        "05-planted": markdown(planted(boxes)),
    }


def pictures() -> dict[str, Figure]:
    """The README's figures by file name: plots of the committed results, and synthetic films. No radiographs."""
    attacks = pd.read_csv(REPOSITORY / "results" / "01_pneumonia.csv")
    boxes = pd.read_csv(REPOSITORY / "results" / "05_detection.csv")
    pneumonia = SimpleNamespace(data_name="pneumonia, all 624 test films", profile="cpu", size=112)
    fractures = SimpleNamespace(data_name="FracAtlas, 61 test films", profile="cpu", size=384)
    return {
        "worst_case": figure_accuracy_vs_eps(attacks, pneumonia, attack="worst", note="Worst case over all attacks"),
        "views": figures.figure_tta(_view_table(boxes), fractures),
        "findings": _finding_films(),
    }


def _view_table(results: pd.DataFrame) -> pd.DataFrame:
    real = results[results.data.eq("fracatlas")]
    value = real[real.metric.eq("mAP50")].set_index("model")[["value", "ci_low", "ci_high"]]
    gain = real[real.metric.eq("mAP50_gain")].set_index("model")[["value", "ci_low", "ci_high"]]
    gain.columns = ["difference", "difference_low", "difference_high"]
    return value.join(gain).rename_axis("name").reset_index()


def _finding_films() -> Figure:
    """One synthetic film per planted finding, with its box."""
    films, boxes = [], []
    for label, name in enumerate(NIH_CLASSES, start=1):
        rng = np.random.default_rng([5, label])
        film, found = phantom.chest_with_findings(rng, [name], size=192)
        films.append(film)
        boxes.append(pd.DataFrame([[*found[0], label]], columns=[*figures.CORNERS, "label"]))
    config = SimpleNamespace(data_name="planted findings (SYNTHETIC)", profile="phantom", size=192)
    return figures.figure_boxes(np.stack(films), boxes, [box.iloc[:0] for box in boxes], [""] * len(films),
                                NIH_CLASSES, config)  # fmt: skip


def fill(text: str, tables: dict[str, str]) -> str:
    """Put each table between its pair of markers; an unknown or missing marker is an error.

    >>> print(fill("<!-- table a -->old<!-- end a -->", {"a": "new"}))
    <!-- table a -->
    new
    <!-- end a -->
    """
    asked = set(re.findall(r"<!-- table ([\w-]+) -->", text))
    if asked != set(tables):
        raise ValueError(f"README markers {sorted(asked)} and tables {sorted(tables)} differ")
    for name, table in tables.items():
        start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        text = re.sub(f"{start}.*?{end}", lambda _, s=start, t=table, e=end: f"{s}\n{t}\n{e}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for name, figure in pictures().items():
        with files.atomic_path(REPOSITORY / "docs" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=80, bbox_inches="tight")
    readme = REPOSITORY / "README.md"
    files.write_text(fill(readme.read_text(encoding="utf-8"), blocks()), readme)
