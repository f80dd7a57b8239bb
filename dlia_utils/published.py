"""The README's tables, made from the committed results files: `python -m dlia_utils.published` rewrites them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from . import files
from .report import eps_text, with_interval

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


def _cell(own: pd.DataFrame, *, attack: str, metric: str) -> str:
    return with_interval(own[own.attack.eq(attack) & own.metric.eq(metric)].iloc[0])


def blocks() -> dict[str, str]:
    """Block name -> markdown, for every `<!-- table NAME -->` pair of markers in the README."""
    results = pd.read_csv(REPOSITORY / "results" / "01_pneumonia.csv")
    published = pd.read_csv(REPOSITORY / "results" / "published_medical_image_diagnosis.csv")
    return {
        "01-headline": markdown(headline(results)),
        "01-fgsm": markdown(beside_published(results, published)),
        "01-one-pixel": markdown(one_pixel(results, published)),
    }


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
    readme = REPOSITORY / "README.md"
    files.write_text(fill(readme.read_text(encoding="utf-8"), blocks()), readme)
