"""The tables and pictures of results/README.md, made from the committed results: `python -m tools
published`."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dlia_utils import files
from dlia_utils.attacks.evaluate import STANDING, SUITE
from dlia_utils.data import phantom
from dlia_utils.data.readers import NIH_CLASSES
from dlia_utils.detect import figures
from dlia_utils.explain.base import REFERENCES
from dlia_utils.explain.figures import figure_forest
from dlia_utils.metrics import digits_of
from dlia_utils.plots import figure_accuracy_vs_eps
from dlia_utils.report import attack_table, with_interval
from dlia_utils.units import eps_text

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "results" / "README.md"
HEADLINE_EPS = 4 / 255
ALTERED = "plain, |most |fold 0, "  # models of notebook 05 that are no view
NO_SCORE = ("zero gradients", "square" + STANDING, "seeds", "numbers")  # what a constant lacks


def markdown(table: pd.DataFrame) -> str:
    """A DataFrame as a markdown table, without its index.

    >>> print(markdown(pd.DataFrame({"model": ["a"], "value": [0.5]})))
    | model | value |
    |---|---|
    | a | 0.5 |
    """
    head, *rows = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _cell(own: pd.DataFrame, attack: str, metric: str, **options: bool) -> str:
    """The number with its interval; empty where it was not measured."""
    rows = own[own.attack.eq(attack) & own.metric.eq(metric)]
    return _of_seeds(rows, **options) if len(rows) else ""


def _of_seeds(rows: pd.DataFrame, *, signed: bool = False) -> str:
    """A number of one seed with its interval, of several seeds their mean and SD."""
    if len(rows) == rows["seed"].nunique() > 1:
        digits, sign = digits_of(rows["n"].min()), "+" * signed
        return f"{rows['value'].mean():{sign}.{digits}f} ± {rows['value'].std():.{digits}f}"
    return with_interval(rows.iloc[0], signed=signed)


def _cells(own: pd.DataFrame, **options: bool) -> list[str]:
    return [with_interval(row, **options) for _, row in own.iterrows()]


def _by_model(results: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """A line a model (of a notebook, at a size); `columns`: title -> attack and metric."""
    rows = []
    for (notebook, model), own in results.groupby(["notebook", "model"], sort=False):
        row = {"model": model, "notebook": notebook[:2], "size": int(own["size"].iloc[0])}
        rows.append(row | {title: _cell(own, *which) for title, which in columns.items()})
    return pd.DataFrame(rows)


def _constant(results: pd.DataFrame) -> dict[str, float]:
    """By metric what always answering the more frequent class scores, attacked or not."""
    worst = results[results.attack.eq("worst")].drop_duplicates("metric").set_index("metric")["n"]
    sick, healthy = worst["sensitivity"], worst["specificity"]
    sides = {"sensitivity": float(sick > healthy), "specificity": float(sick <= healthy)}
    share = max(sick, healthy) / (sick + healthy)
    return sides | {"accuracy": share, "auc": 0.5, "balanced_accuracy": 0.5}


def _beside_constant(table: pd.DataFrame, results: pd.DataFrame, **metrics: str) -> pd.DataFrame:
    """The table with a last row of the constant answer; `metrics` by title, the others accuracy."""
    found, digits = _constant(results), digits_of(results["n"].max())
    row = {name: f"{found[metrics.get(name, 'accuracy')]:.{digits}f}" for name in table}
    row |= {"model": "always the same answer"} | {name: "" for name in NO_SCORE if name in table}
    return pd.concat([table, pd.DataFrame([row])], ignore_index=True)


def _at_headline(results: pd.DataFrame) -> pd.DataFrame:
    return results[np.isclose(results.eps, HEADLINE_EPS) & results.eps_unit.eq("pixel")]


def _clean_and_headline(results: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([results[results.eps.eq(0)], _at_headline(results)])


def study_table(
    results: pd.DataFrame, columns: dict[str, tuple[str, str]], *, intervals: tuple[str, ...] = ()
) -> pd.DataFrame:
    """`columns` of `_by_model`, clean and at the headline's eps; an interval in `intervals` or all.

    Of several seeds each number is their mean with its SD.
    """
    table = _by_model(_clean_and_headline(results), columns).drop(columns=["notebook", "size"])
    bare = [title for title in columns if intervals and title not in intervals]
    table[bare] = table[bare].map(lambda text: text.split(" [")[0])
    seeds = results.groupby("model")["seed"].nunique().astype(str)
    table.insert(1, "seeds", table["model"].map(seeds))
    # The smoothed model has a certificate instead of a worst case.
    table = table[table["worst case at 4/255"].ne("")]
    metrics = {title: metric for title, (_, metric) in columns.items()}
    return _beside_constant(table, results, **metrics)


ATTACKED = {"clean accuracy": ("clean", "accuracy"), "AUC": ("clean", "auc")}
ATTACKED |= {"worst case at 4/255": ("worst", "accuracy")}
ATTACKED |= {"balanced worst case": ("worst", "balanced_accuracy")}
ATTACKED |= {"sick still found": ("worst", "sensitivity")}
ATTACKED |= {"healthy still called healthy": ("worst", "specificity")}


def each_attack(results: pd.DataFrame) -> pd.DataFrame:
    """Per model: accuracy under every attack at 4/255, worst case, share of zero gradients."""
    near = _at_headline(results).query("metric == 'accuracy'")
    table = near.pivot_table(index="model", columns="attack", values="value", sort=False)
    table = table[[name for name in (*SUITE, "square" + STANDING, "worst") if name in table]]
    table = table.map(lambda value: "" if np.isnan(value) else f"{value:.3f}")
    met = near[near.attack.str.endswith(STANDING)].set_index("model")["n"]
    for model, n in met.items():
        table.loc[model, "square" + STANDING] += f" of {n:.0f}"
    zero = results[results.metric.eq("zero_gradient_share")].set_index("model")["value"]
    table = table.assign(**{"zero gradients": zero.map("{:.1%}".format)}).reset_index()
    return _beside_constant(table, results)


def certificate(results: pd.DataFrame) -> pd.DataFrame:
    """Randomised smoothing: the share of images that are right and certified at each L2 radius."""
    own = results[results.metric.eq("certified_accuracy")].sort_values("eps")
    table = pd.DataFrame({"L2 radius": own["eps"].map("{:.2f}".format)})
    return table.assign(**{"certified accuracy": _cells(own), "images": own["n"]})


def beside_published(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """FGSM in the normalised units of the original study: its accuracy and ours, model by model."""
    rows = []
    for model in dict.fromkeys(results.model):
        for source, table in (("published", published), ("here", results)):
            own = table[table.model.eq(model) & table.metric.eq("accuracy")]
            if own.empty:  # a model that the original study did not have
                continue
            clean = own[own.attack.eq("clean")]["value"].item()
            fooled = own[own.attack.eq("fgsm_normalised")].sort_values("eps")
            row = {"model": model, "numbers": source, "clean": f"{clean:.3f}"}
            for eps, value in zip(fooled["eps"], fooled["value"], strict=True):
                row[eps_text(eps, "normalised")] = f"{value:.3f}"
            rows.append(row)
    return _beside_constant(pd.DataFrame(rows), results)


def one_pixel(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """One-Pixel accuracy per setting: ours on the stated sample, the original study's beside it."""
    own = results[results.attack.str.startswith("one_pixel")]
    rows = []
    for (attack, model), part in own.groupby(["attack", "model"], sort=False):
        theirs = published[published.attack.eq(attack) & published.model.eq(model)]["value"]
        found = part.set_index("metric")
        row = {"setting": attack.removeprefix("one_pixel "), "model": model}
        row["n"] = int(found.n["accuracy"])
        row["clean accuracy"] = f"{found.value['clean_accuracy']:.3f}"
        row["under attack"] = with_interval(found.loc["accuracy"])
        row["macro F1"] = f"{found.value['f1']:.3f}"
        row["queries per image"] = f"{found.value['queries_mean']:,.0f}"
        row["published"] = f"{theirs.item():.3f}" if len(theirs) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def detection(results: pd.DataFrame) -> pd.DataFrame:
    """The detector's plain view and the boxes of who never looks, on the scored images."""
    names = {"mAP50": "mAP, IoU 0.5", "mAP50_95": "mAP, IoU 0.5 to 0.95"}
    names |= {"froc_mean": "FROC, mean of 1/8 to 8"}
    names |= {"sensitivity_at_1": "sensitivity at 1 false mark per image"}
    classes = [name for name in results.metric if name.startswith("AP50 ")]
    names |= {name: f"AP of {name[5:]}" for name in classes[len(classes) == 1 :]}
    own = results[results.metric.isin(names)]
    own = own.assign(cell=_cells(own)).pivot(index="metric", columns="model", values="cell")
    table = own.loc[list(names), [who for who in ("plain", "median boxes") if who in own]]
    return table.rename(index=names, columns={"plain": "value"}).fillna("").reset_index()


def _of_views(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """By view or fusion: mAP, and its paired difference to the plain view."""
    own = results[~results.model.str.match(ALTERED)].set_index("model")
    value, gain = (own[own.metric.eq(name)] for name in ("mAP50", "mAP50_gain"))
    return value.loc[gain.index], gain


def views(results: pd.DataFrame) -> pd.DataFrame:
    """mAP of each view and fusion, and its paired difference to the plain view."""
    value, gain = _of_views(results)
    table = pd.DataFrame({"views": value.index, "mAP, IoU 0.5": _cells(value)})
    difference = pd.Series(_cells(gain, signed=True)).where(table["views"].ne("plain"), "")
    return table.assign(**{"difference to plain": difference})


def altered(results: pd.DataFrame) -> pd.DataFrame:
    """mAP with other boxes, images or trainings, and what each gains over its counterpart."""
    own = results[results.model.str.match(ALTERED) & results.metric.str.startswith("mAP50")]
    gain = own.metric.eq("mAP50_gain") | own.model.str.contains(", less ")
    cells = [with_interval(row, signed=gain[at]) for at, row in own.iterrows()]
    own = own.assign(cell=cells, of=gain.map({False: "mAP, IoU 0.5", True: "difference"}))
    how = {"columns": "of", "values": "cell", "aggfunc": "first", "sort": False}
    table = own.rename(columns={"n": "images"}).pivot_table(index=["model", "images"], **how)
    return table[["mAP, IoU 0.5", "difference"]].fillna("").reset_index()


def planted(results: pd.DataFrame) -> pd.DataFrame:
    """Average precision of each planted finding, learnt from scratch and scored out of fold."""
    own = results[results.model.eq("planted findings, 5 folds")]
    own = own[own.metric.str.startswith(("mAP50", "AP50"))]
    means = {"mAP50": "all, mAP, IoU 0.5", "mAP50_95": "all, mAP, IoU 0.5 to 0.95"}
    names = own.metric.str.removeprefix("AP50 ").replace(means)
    return pd.DataFrame({"finding": names, "average precision": _cells(own)})


def fractures(results: pd.DataFrame) -> pd.DataFrame:
    """FracAtlas: clean accuracy and AUC, then PGD, worst case and its two directions at 4/255."""
    table = attack_table(results, eps=HEADLINE_EPS)
    auc = {model: _cell(own, "clean", "auc") for model, own in results.groupby("model")}
    table.insert(1, "AUC", table.index.map(auc))
    return table.reset_index()


def _well_attacked(results: pd.DataFrame) -> pd.DataFrame:
    """Seed 0, without larger eps than the strongest attacks ran at."""
    largest = results["eps"][results["attack"].eq("apgd_ce")].max() + 1e-9
    return results[(results.eps_unit.ne("pixel") | results.eps.le(largest)) & results.seed.eq(0)]


def worst_by_eps(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in the worst case at every eps that the strongest attacks ran at."""
    worst = _well_attacked(results).query("attack == 'worst' and metric == 'accuracy'")
    worst = worst.assign(cell=_cells(worst), eps=worst.eps.round(9))
    table = worst.pivot(index="model", columns="eps", values="cell")
    table = table.reindex(list(dict.fromkeys(worst.model)))
    table = table.rename(columns=eps_text).rename_axis(columns=None).reset_index()
    return _beside_constant(table, results)


def _maps(results: pd.DataFrame, ending: str, **options: bool) -> pd.DataFrame:
    """Models and maps down, localisation scores whose metric has this `ending` across."""
    own = results[results.attack.str.startswith("map ") & results.metric.str.endswith(ending)]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for (model, attack, metric), part in own.groupby(["model", "attack", "metric"], sort=False):
        key = model, attack.removeprefix("map ")
        score = metric.removesuffix(ending).replace("_", " ")
        rows.setdefault(key, {})[score] = _of_seeds(part, **options)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["model", "map"])
    return table.reset_index()


def fracture_maps(results: pd.DataFrame) -> pd.DataFrame:
    """Localisation of the fracture boxes: each map beside the three that know nothing."""
    table, one = _maps(results, " box"), _maps(results[results.seed.eq(0)], " box")
    known = one[one["map"].isin(REFERENCES)].drop_duplicates("map")  # the same for all
    return pd.concat([table[~table["map"].isin(REFERENCES)], known.assign(model="(no model)")])


def map_differences(results: pd.DataFrame) -> pd.DataFrame:
    """What each defence's maps gain over the plain model's on the same images."""
    return _maps(results, " box, minus standard", signed=True)


def covid(results: pd.DataFrame) -> pd.DataFrame:
    """COVID: what each model reaches on the test images, once."""
    metrics = "accuracy sensitivity specificity auc".split()
    clean = results[results.attack.eq("clean")]
    return _by_model(clean, {metric: ("clean", metric) for metric in metrics})


AUDITED = {"tested": "AUC of the fine-tuned network"}
AUDITED |= {"retrained": "AUC of a classifier trained on that part"}
EDGES = {"learnt here, tested here": "learnt and tested on the collection"}
EDGES |= {"learnt here, tested there": "learnt on the collection, tested in Shenzhen"}
EDGES |= {"learnt there, tested there": "learnt and tested in Shenzhen"}


def shortcut_audit(results: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """AUC where only a part of the image is left; `names`: who was asked -> title."""
    own = results[results.attack.str.startswith("audit, ") & results.metric.eq("auc")]
    parts = own.attack.str.extract(r"audit, (?P<how>.+) on (?P<region>\w+)")
    parts = parts.assign(region=parts.region.str.replace("_", " "), cell=_cells(own))
    table = parts.pivot(index="region", columns="how", values="cell")
    table = table.loc[list(dict.fromkeys(parts.region)), list(names)].rename(columns=names)
    return table.reset_index(names="what is left of the image")


AT_THRESHOLD = "clean, chosen threshold"
TWICE = {"AUC": (AT_THRESHOLD, "auc"), "calibration error (ECE)": (AT_THRESHOLD, "ece")}
TWICE |= {"sensitivity, chosen threshold": (AT_THRESHOLD, "sensitivity")}
TWICE |= {"specificity, chosen threshold": (AT_THRESHOLD, "specificity")}
TWICE |= {"balanced worst case at 4/255": ("worst", "balanced_accuracy")}


def hospitals(results: pd.DataFrame) -> pd.DataFrame:
    """Tuberculosis: each model on the collection's test images, in Shenzhen, and the difference."""
    near, rows = _clean_and_headline(results), []
    for model in dict.fromkeys(results[results.attack.eq(f"external, {AT_THRESHOLD}")].model):
        own = near[near.model.eq(model)]
        for title, (attack, metric) in TWICE.items():
            away = f"external, {attack}"
            row = {"model": model, "measure": title, "collection": _cell(own, attack, metric)}
            row["Shenzhen"] = _cell(own, away, metric)
            row["difference"] = _cell(own, away, f"{metric}_change", signed=True)
            rows.append(row)
    return pd.DataFrame(rows)


def corruption_cost(results: pd.DataFrame) -> pd.DataFrame:
    """Notebook 04: clean AUC, then the error over corruptions seen and not seen in training."""
    columns = {"accuracy, clean": ("clean", "accuracy"), "AUC, clean": ("clean", "auc")}
    for kind in ("seen in training", "not seen"):
        columns |= {f"error, {kind}": (f"mean of those {kind}", "error")}
        columns |= {f"mCE, {kind}": (f"mean of those {kind}", "ce")}
    table = _by_model(results, columns).drop(columns="notebook")
    return table.loc[:, table.ne("").any()]  # one study did not count the accuracy


def each_run(results: pd.DataFrame, make) -> pd.DataFrame:
    """The table that `make` makes, of each data set and seed in `results`."""
    parts = {key: make(own) for key, own in results.groupby(["data", "seed"], sort=False)}
    return pd.concat(parts, names=["data set", "seed"]).fillna("").reset_index([0, 1])


def drift_warning(results: pd.DataFrame) -> pd.DataFrame:
    """Notebook 04: AUROC of drift and its rivals for wrong answers in three readings."""
    own = results[results.attack.str.startswith("warning ")]
    rows = []
    for (model, attack), part in own.groupby(["model", "attack"], sort=False):
        row = {"model": model, "score": attack.removeprefix("warning ")}
        for reading in ("mixed", "within", "same answer"):
            row[reading] = _cell(part, attack, f"auroc error {reading}")
        for rival in ("uncertainty", "p_shift"):
            gain = _cell(part, attack, f"auroc_over_{rival} error within", signed=True)
            row[f"within, minus {rival}"] = gain
        rows.append(row)
    return pd.DataFrame(rows)


def claimed(published: pd.DataFrame) -> pd.DataFrame:
    """What the FracAtlas study printed, model by model; nothing of it was measured here."""
    table = published.pivot(index="model", columns="metric", values="value")
    table = table.loc[list(dict.fromkeys(published.model)), list(dict.fromkeys(published.metric))]
    return table.astype(object).where(table.notna(), "").reset_index()


def _results(name: str) -> pd.DataFrame:
    return pd.read_csv(REPOSITORY / "results" / f"{name}.csv")


@functools.cache
def blocks() -> dict[str, str]:
    """Name -> markdown of each `<!-- table NAME -->` in results/README.md or a notebook."""
    pneumonia, survey, bones = map(_results, ("01_pneumonia", "01_survey", "02_fracatlas"))
    moved, corona, boxes = map(_results, ("04_perturbation", "06_covid", "05_detection"))
    small, tb = map(_results, ("04_perturbation_medmnist", "03_tuberculosis"))
    published = _results("published_medical_image_diagnosis")
    first, bone = (table[table.seed.eq(0)] for table in (pneumonia, bones))
    hands, chests = (boxes[boxes.data.eq(name)] for name in ("fracatlas", "dlia"))
    attacked = {"columns": ATTACKED, "intervals": ("clean accuracy", "worst case at 4/255")}
    tables = {
        "study-01": study_table(pneumonia, **attacked),
        "study-02": study_table(bones, **attacked),
        "01-headline": study_table(pneumonia, ATTACKED),
        "01-attacks": each_attack(first),
        "01-eps": worst_by_eps(first),
        "01-survey": study_table(survey, ATTACKED),
        "01-survey-attacks": each_attack(survey),
        "01-survey-eps": worst_by_eps(survey),
        "01-certificate": certificate(first),
        "01-fgsm": beside_published(survey, published),
        "01-one-pixel": one_pixel(survey, published),
        "02-attacks": fractures(bone),
        "02-each": each_attack(bone),
        "02-eps": worst_by_eps(bone),
        "02-maps": fracture_maps(bones),
        "02-map-differences": map_differences(bones),
        "02-claimed": claimed(_results("published_r2i_medical_imaging")),
        "03-edges": shortcut_audit(tb, EDGES),
        "03-headline": study_table(tb, **attacked),
        "03-hospitals": hospitals(tb),
        "04-corruptions": corruption_cost(moved),
        "04-warning": drift_warning(moved),
        "04-medmnist-corruptions": each_run(small, corruption_cost),
        "04-medmnist-warning": each_run(small, drift_warning),
        "06-covid": covid(corona),
        "07-audit": shortcut_audit(corona, AUDITED),
        "05-nih": detection(chests),
        "05-nih-views": views(chests),
        "05-nih-altered": altered(chests),
        "05-detection": detection(hands),
        "05-views": views(hands),
        "05-planted": planted(boxes),
    }
    return {name: markdown(table) for name, table in tables.items()}


def pictures() -> dict[str, Figure]:
    """The figures in docs/ by file name: plots of results, synthetic images. No radiographs."""
    options = {"attack": "worst", "note": "Worst case: only training on attacks keeps anything"}
    lungs, bone_rows = map(_well_attacked, map(_results, ("01_pneumonia", "02_fracatlas")))
    pneumonia = "pneumonia, all 624 test images, cpu profile, 112 px"
    bones = "FracAtlas, 222 test images, cpu profile, 160 px"
    nih = _results("05_detection").query("data == 'dlia'")
    boxes = "NIH, edition A: 735 training images, five folds, cpu profile, 512 px"
    return {
        "worst_case": figure_accuracy_vs_eps(lungs, pneumonia, constant=390 / 624, **options),
        "fractures": figure_accuracy_vs_eps(bone_rows, bones, constant=150 / 222, **options),
        "hospitals": _two_hospitals(_results("03_tuberculosis")),
        "views": figures.figure_tta(_view_table(nih), boxes),
        "findings": _findings(),
    }


def _two_hospitals(results: pd.DataFrame) -> Figure:
    """Each tuberculosis network on the collection's test images and in Shenzhen."""
    near, parts = _clean_and_headline(results), []
    for title, (attack, metric) in TWICE.items():
        for place, name in (("the collection", attack), ("Shenzhen", f"external, {attack}")):
            own = near[near.attack.eq(name) & near.metric.eq(metric)]
            parts.append(own.assign(measure=title.replace(", ", ",\n"), place=place))
    table = pd.concat(parts).query("metric != 'ece'")
    caption = "tuberculosis, 334 and 662 test images (worst case there: 200), cpu profile, 160 px"
    return figure_forest(table, caption, panel="measure", row="model", series="place", chance=0.5)


def _view_table(results: pd.DataFrame) -> pd.DataFrame:
    value, gain = (part[["value", "ci_low", "ci_high"]] for part in _of_views(results))
    gain.columns = ["difference", "difference_low", "difference_high"]
    return value.join(gain).rename_axis("name").reset_index()


def _findings() -> Figure:
    """One synthetic radiograph per planted finding, with its box."""
    images, boxes = [], []
    for label, name in enumerate(NIH_CLASSES, start=1):
        rng = np.random.default_rng([5, label])
        image, found = phantom.chest_with_findings(rng, [name], size=192)
        images.append((255 * image).astype(np.uint8))
        boxes.append(pd.DataFrame([[*found[0], label]], columns=[*figures.CORNERS, "label"]))
    empty, titles = [box.iloc[:0] for box in boxes], [""] * len(images)
    caption = "planted findings (SYNTHETIC), phantom profile, 192 px"
    return figures.figure_boxes(np.stack(images), boxes, empty, titles, NIH_CLASSES, caption)


def fill(text: str, tables: dict[str, str]) -> str:
    """Put each table between its pair of markers; an unknown or missing marker is an error."""
    asked = set(re.findall(r"<!-- table ([\w-]+) -->", text))
    tables = {name: table for name, table in tables.items() if not name.startswith("study-")}
    if asked != set(tables):
        raise ValueError(f"markers {sorted(asked)} and tables {sorted(tables)} differ")
    for name, table in tables.items():
        start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def write() -> None:
    """Write docs/*.png and results/README.md anew."""
    for name, figure in pictures().items():
        with files.atomic_path(REPOSITORY / "docs" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight")
    files.write_text(fill(PAGE.read_text(encoding="utf-8"), blocks()), PAGE)
