"""The tables and pictures of results/README.md, made from the committed results: `python -m tools.published` rewrites them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dlia_utils import files
from dlia_utils.attacks.evaluate import SUITE
from dlia_utils.data import phantom
from dlia_utils.data.readers import NIH_CLASSES
from dlia_utils.detect import figures
from dlia_utils.explain.base import REFERENCES
from dlia_utils.plots import figure_accuracy_vs_eps
from dlia_utils.report import attack_table, with_interval
from dlia_utils.units import eps_text

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "results" / "README.md"
HEADLINE_EPS = 4 / 255


def markdown(table: pd.DataFrame) -> str:
    """A DataFrame as a markdown table, without its index.

    >>> print(markdown(pd.DataFrame({"model": ["a"], "value": [0.5]})))
    | model | value |
    |---|---|
    | a | 0.5 |
    """
    lines = [
        list(map(str, table.columns)),
        ["---"] * table.shape[1],
        *table.astype(str).to_numpy().tolist(),
    ]
    return "\n".join(
        "|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|"
        for line in lines
    )


def headline(results: pd.DataFrame) -> pd.DataFrame:
    """Per model: clean accuracy and AUC, the worst case at 4/255 in pixel units, and its two directions."""
    rows = []
    for model, own in results.groupby("model", sort=False):
        near = own[
            np.isclose(own.eps, HEADLINE_EPS) & own.eps_unit.eq("pixel") & own.attack.eq("worst")
        ]
        if near.empty:  # such as the smoothed model, which has a certificate instead
            continue
        cells = {"model": model, "clean accuracy": _cell(own, attack="clean", metric="accuracy")}
        cells["AUC"] = _cell(own, attack="clean", metric="auc")
        cells["**worst case**"] = _cell(near, attack="worst", metric="accuracy")
        cells["pneumonias still found"] = _cell(near, attack="worst", metric="sensitivity")
        cells["healthy still called healthy"] = _cell(near, attack="worst", metric="specificity")
        rows.append(cells)
    return pd.DataFrame(rows)


def each_attack(results: pd.DataFrame) -> pd.DataFrame:
    """Per model: accuracy under every single attack at 4/255, the worst case, and the share of zero gradients."""
    near = results[
        np.isclose(results.eps, HEADLINE_EPS)
        & results.eps_unit.eq("pixel")
        & results.metric.eq("accuracy")
    ]
    table = near.pivot_table(index="model", columns="attack", values="value", sort=False)
    table = table[[name for name in (*SUITE, "worst") if name in table]].map(
        lambda value: "" if np.isnan(value) else f"{value:.3f}"
    )
    zero = (
        results[results.metric.eq("zero_gradient_share")]
        .set_index("model")["value"]
        .map("{:.1%}".format)
    )
    return table.assign(**{"zero gradients": zero}).reset_index()


def certificate(results: pd.DataFrame) -> pd.DataFrame:
    """Randomised smoothing: the share of films that are right and certified at each L2 radius."""
    own = results[results.metric.eq("certified_accuracy")].sort_values("eps")
    cells = [with_interval(row) for _, row in own.iterrows()]
    return pd.DataFrame(
        {
            "L2 radius": own["eps"].map("{:.2f}".format),
            "certified accuracy": cells,
            "films": own["n"],
        }
    )


def beside_published(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """FGSM in the normalised units of the original study: its accuracy and ours, model by model."""
    rows = []
    for model in dict.fromkeys(results.model):
        for source, table in (("published", published), ("here", results)):
            own = table[table.model.eq(model) & table.metric.eq("accuracy")]
            if own.empty:  # a model that the original study did not have
                continue
            cells = {
                "model": model,
                "numbers": source,
                "clean": f"{own[own.attack.eq('clean')]['value'].item():.3f}",
            }
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
        rows.append(
            {
                "setting": attack.removeprefix("one_pixel "),
                "model": model,
                "n": int(value["accuracy"].n),
                "clean accuracy": f"{value['clean_accuracy'].value:.3f}",
                "under attack": with_interval(value["accuracy"]),
                "macro F1": f"{value['f1'].value:.3f}",
                "queries per image": f"{value['queries_mean'].value:,.0f}",
                "published": f"{theirs.item():.3f}" if len(theirs) else "",
            }
        )
    return pd.DataFrame(rows)


def detection(results: pd.DataFrame) -> pd.DataFrame:
    """What the plain view of the detector reaches on the scored films, each with its interval."""
    names = {
        "mAP50": "mAP, IoU 0.5",
        "mAP50_95": "mAP, IoU 0.5 to 0.95",
        "froc_mean": "FROC, mean of 1/8 to 8",
        "sensitivity_at_1": "sensitivity at 1 false mark per film",
    }
    own = results[results.model.eq("plain")].set_index("metric")
    return pd.DataFrame(
        [{"metric": text, "value": with_interval(own.loc[name])} for name, text in names.items()]
    )


def views(results: pd.DataFrame) -> pd.DataFrame:
    """mAP of each view and fusion, and its paired difference to the plain view."""
    rows = []
    for model, own in results[results.data.eq("fracatlas")].groupby("model", sort=False):
        own = own.set_index("metric")
        gain = own.loc["mAP50_gain"]
        signed = "" if model == "plain" else with_interval(gain, signed=True)
        rows.append(
            {
                "views": model,
                "mAP, IoU 0.5": with_interval(own.loc["mAP50"]),
                "difference to plain": signed,
            }
        )
    return pd.DataFrame(rows)


def planted(results: pd.DataFrame) -> pd.DataFrame:
    """Average precision of each planted finding, learnt from scratch and scored out of fold."""
    own = results[
        results.model.eq("planted findings, 5 folds")
        & results.metric.str.startswith(("mAP50", "AP50"))
    ]
    names = own.metric.str.removeprefix("AP50 ").replace(
        {"mAP50": "all, mAP, IoU 0.5", "mAP50_95": "all, mAP, IoU 0.5 to 0.95"}
    )
    return pd.DataFrame(
        {"finding": names, "average precision": [with_interval(row) for _, row in own.iterrows()]}
    )


def fractures(results: pd.DataFrame) -> pd.DataFrame:
    """FracAtlas: clean accuracy and AUC, then PGD, the worst case and its two directions at 4/255, in per cent."""
    table = attack_table(results, eps=HEADLINE_EPS)
    auc = {
        model: _cell(own, attack="clean", metric="auc") for model, own in results.groupby("model")
    }
    table.insert(1, "AUC", table.index.map(auc))
    return table.reset_index()


def worst_by_eps(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in the worst case at every eps."""
    rows = []
    for model, own in results.groupby("model", sort=False):
        worst = own[own.attack.eq("worst") & own.metric.eq("accuracy")].sort_values("eps")
        if len(worst):
            rows.append(
                {"model": model}
                | {eps_text(row.eps): with_interval(row) for _, row in worst.iterrows()}
            )
    return pd.DataFrame(rows)


def fracture_maps(results: pd.DataFrame) -> pd.DataFrame:
    """Localisation of the fracture boxes: each map beside the three that know nothing."""
    maps = results[results.attack.str.startswith("map ") & results.metric.str.endswith(" box")]
    rows, known = [], set()
    for (model, attack), own in maps.groupby(["model", "attack"], sort=False):
        name = attack.removeprefix("map ")
        if name in REFERENCES:
            model = "(no model)"  # the same for all
            if name in known:
                continue
            known.add(name)
        scores = {
            row.metric.removesuffix(" box").replace("_", " "): with_interval(row)
            for _, row in own.iterrows()
        }
        rows.append({"model": model, "map": name} | scores)
    return pd.DataFrame(sorted(rows, key=lambda row: row["model"] == "(no model)"))


def map_differences(results: pd.DataFrame) -> pd.DataFrame:
    """What each defence's maps gain over the plain model's on the same films."""
    ending = " box, minus standard"
    maps = results[results.attack.str.startswith("map ") & results.metric.str.endswith(ending)]
    rows = []
    for (model, attack), own in maps.groupby(["model", "attack"], sort=False):
        scores = {
            row.metric.removesuffix(ending).replace("_", " "): with_interval(row, signed=True)
            for _, row in own.iterrows()
        }
        rows.append({"model": model, "map": attack.removeprefix("map ")} | scores)
    return pd.DataFrame(rows)


def covid(results: pd.DataFrame) -> pd.DataFrame:
    """COVID: what each model reaches on the test films, once."""
    rows = []
    clean = results[results.attack.eq("clean")]
    for (notebook, model), own in clean.groupby(["notebook", "model"], sort=False):
        cells = {"model": model, "notebook": notebook[:2], "size": int(own["size"].iloc[0])}
        for metric in ("accuracy", "sensitivity", "specificity", "auc"):
            cells[metric] = _cell(own, attack="clean", metric=metric)
        rows.append(cells)
    return pd.DataFrame(rows)


def shortcut_audit(results: pd.DataFrame) -> pd.DataFrame:
    """COVID: AUC on films of which only a part is left, for the trained model and for one trained on that part."""
    own = results[results.attack.str.startswith("audit, ") & results.metric.eq("auc")]
    parts = own.attack.str.extract(r"audit, (tested|retrained) on (\w+)")
    cells = own.assign(
        how=parts[0],
        region=parts[1].str.replace("_", " "),
        cell=[with_interval(row) for _, row in own.iterrows()],
    )
    table = cells.pivot(index="region", columns="how", values="cell").loc[
        list(dict.fromkeys(cells.region))
    ]
    names = {
        "tested": "AUC of the fine-tuned network",
        "retrained": "AUC of a classifier trained on that part",
    }
    return table[list(names)].rename(columns=names).reset_index(names="what is left of the film")


def corruption_cost(results: pd.DataFrame) -> pd.DataFrame:
    """Notebook 04: AUC on clean films, then the error over all severities of corruptions seen and not seen in training."""
    rows = []
    for model, own in results.groupby("model", sort=False):
        cells = {
            "model": model,
            "size": int(own["size"].iloc[0]),
            "AUC, clean": _cell(own, attack="clean", metric="auc"),
        }
        for kind in ("seen in training", "not seen"):
            cells[f"error, {kind}"] = _cell(own, attack=f"mean of those {kind}", metric="error")
            cells[f"mCE, {kind}"] = _cell(own, attack=f"mean of those {kind}", metric="ce")
        rows.append(cells)
    return pd.DataFrame(rows)


def drift_warning(results: pd.DataFrame, *, outcome: str = "error") -> pd.DataFrame:
    """Notebook 04: AUROC of drift and of its rivals for wrong answers in the three readings, one line a score."""
    own = results[
        results.attack.str.startswith("warning ") & results.metric.str.contains(f" {outcome} ")
    ]
    rows = []
    for (model, attack), part in own.groupby(["model", "attack"], sort=False):
        value = {row.metric: with_interval(row) for _, row in part.iterrows()}
        signed = {row.metric: with_interval(row, signed=True) for _, row in part.iterrows()}
        cells = {"model": model, "score": attack.removeprefix("warning ")}
        cells |= {
            reading: value.get(f"auroc {outcome} {reading}", "")
            for reading in ("mixed", "within", "same answer")
        }
        for rival in ("uncertainty", "p_shift"):
            cells[f"within, minus {rival}"] = signed.get(f"auroc_over_{rival} {outcome} within", "")
        rows.append(cells)
    return pd.DataFrame(rows)


def claimed(published: pd.DataFrame) -> pd.DataFrame:
    """What the FracAtlas study printed, model by model; nothing of it was measured here."""
    table = published.pivot(index="model", columns="metric", values="value")
    table = table.loc[list(dict.fromkeys(published.model)), list(dict.fromkeys(published.metric))]
    return table.astype(object).where(table.notna(), "").reset_index()


def _cell(own: pd.DataFrame, *, attack: str, metric: str) -> str:
    """The number with its interval; empty where it was not measured."""
    rows = own[own.attack.eq(attack) & own.metric.eq(metric)]
    return with_interval(rows.iloc[0]) if len(rows) else ""


def blocks() -> dict[str, str]:
    """Block name -> markdown, for every `<!-- table NAME -->` pair of markers in results/README.md."""
    results = pd.read_csv(REPOSITORY / "results" / "01_pneumonia.csv")
    bones = pd.read_csv(REPOSITORY / "results" / "02_fracatlas.csv")
    boxes = pd.read_csv(REPOSITORY / "results" / "05_detection.csv")
    published = pd.read_csv(REPOSITORY / "results" / "published_medical_image_diagnosis.csv")
    moved = pd.read_csv(REPOSITORY / "results" / "04_perturbation.csv")
    corona = pd.read_csv(REPOSITORY / "results" / "06_covid.csv")
    claims = pd.read_csv(REPOSITORY / "results" / "published_r2i_medical_imaging.csv")
    return {
        "01-headline": markdown(headline(results)),
        "01-attacks": markdown(each_attack(results)),
        "01-eps": markdown(worst_by_eps(results)),
        "01-certificate": markdown(certificate(results)),
        "01-fgsm": markdown(beside_published(results, published)),
        "01-one-pixel": markdown(one_pixel(results, published)),
        "02-attacks": markdown(fractures(bones)),
        "02-each": markdown(each_attack(bones)),
        "02-eps": markdown(worst_by_eps(bones)),
        "02-maps": markdown(fracture_maps(bones)),
        "02-map-differences": markdown(map_differences(bones)),
        "02-claimed": markdown(claimed(claims)),
        "04-corruptions": markdown(corruption_cost(moved)),
        "04-warning": markdown(drift_warning(moved)),
        "06-covid": markdown(covid(corona)),
        "07-audit": markdown(shortcut_audit(corona)),
        "05-detection": markdown(detection(boxes)),
        "05-views": markdown(views(boxes)),
        "05-planted": markdown(planted(boxes)),
    }


def pictures() -> dict[str, Figure]:
    """The figures in docs/ by file name: plots of the committed results, and synthetic films. No radiographs."""
    attacks = pd.read_csv(REPOSITORY / "results" / "01_pneumonia.csv")
    boxes = pd.read_csv(REPOSITORY / "results" / "05_detection.csv")
    bones = pd.read_csv(REPOSITORY / "results" / "02_fracatlas.csv")
    fracatlas = SimpleNamespace(data_name="FracAtlas, 222 test films", profile="cpu", size=160)
    pneumonia = SimpleNamespace(data_name="pneumonia, all 624 test films", profile="cpu", size=112)
    fractures = SimpleNamespace(data_name="FracAtlas, 61 test films", profile="cpu", size=384)
    return {
        "worst_case": figure_accuracy_vs_eps(
            attacks, pneumonia, attack="worst", note="Worst case over the suite"
        ),
        "fractures": figure_accuracy_vs_eps(
            bones, fracatlas, attack="worst", note="Worst case over all attacks"
        ),
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
    return figures.figure_boxes(
        np.stack(films),
        boxes,
        [box.iloc[:0] for box in boxes],
        [""] * len(films),
        NIH_CLASSES,
        config.caption,
    )


def fill(text: str, tables: dict[str, str]) -> str:
    """Put each table between its pair of markers; an unknown or missing marker is an error.

    >>> print(fill("<!-- table a -->old<!-- end a -->", {"a": "new"}))
    <!-- table a -->
    new
    <!-- end a -->
    """
    asked = set(re.findall(r"<!-- table ([\w-]+) -->", text))
    if asked != set(tables):
        raise ValueError(f"markers {sorted(asked)} and tables {sorted(tables)} differ")
    for name, table in tables.items():
        start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        text = re.sub(
            f"{start}.*?{end}",
            lambda _, s=start, t=table, e=end: f"{s}\n{t}\n{e}",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    for name, figure in pictures().items():
        with files.atomic_path(REPOSITORY / "docs" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=80, bbox_inches="tight")
    files.write_text(fill(PAGE.read_text(encoding="utf-8"), blocks()), PAGE)
