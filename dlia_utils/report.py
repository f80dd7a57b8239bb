"""Tidy result rows, the results file, and the tables and sentences that several notebooks show."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import files, metrics
from .device import hardware
from .metrics import with_interval
from .run import Run, nearest
from .study import Study, weights_label
from .train import FitResult
from .units import eps_text

# What tells one result from another, then what was found, and how.
IDENTITY = "notebook model attack eps eps_unit metric seed size profile data".split()
RESULT_COLUMNS = [*IDENTITY[:6], *"value ci_low ci_high n seed size epochs weights".split()]
RESULT_COLUMNS += "profile data hardware".split()
NAMES = dict.fromkeys("notebook model attack eps_unit metric profile data".split(), str)

# What a table calls a column; any other has blanks for its underscores.
WORDS = {"auc": "AUC", "auprc": "AUPRC", "f1": "F1", "p_holm": "p (Holm)", "n": "images"}
WORDS |= {"ece": "calibration error (ECE)", "ci_low": "from", "ci_high": "to"}
WORDS |= {"val_auc": "validation AUC", "val_accuracy": "validation accuracy", "lr": "learning rate"}
WORDS |= {"val_loss": "validation loss", "train_loss": "training loss"}
WORDS |= {name: name for name in ("pgd_ce", "pgd_margin", "apgd_ce", "apgd_margin")}
WORDS |= {"only_model_right": "only this one right", "only_reference_right": "only reference right"}
MARK = "\N{DAGGER}"  # beside the interval of none or all


def result_rows(table: pd.DataFrame, run: Run, **labels) -> pd.DataFrame:
    """Metric rows (metric, value, ci_low, ci_high, n) completed to the tidy `RESULT_COLUMNS`.

    `labels` fills model, attack, eps and eps_unit, which are else "clean", 0 and "pixel". epochs:
    trained ones by the run folder's log, else the setting. ValueError: not in `RESULT_COLUMNS`.
    """
    for name in (*labels, *table.columns):
        if name not in RESULT_COLUMNS:
            raise ValueError(f"result rows have no column {name!r}{nearest(name, RESULT_COLUMNS)}")
    given = {"attack": "clean", "eps": 0.0, "eps_unit": "pixel"} | labels | origin(run)
    filled = table.assign(**{k: v for k, v in given.items() if k not in table.columns})
    for column, of in (("epochs", _epochs), ("weights", weights_label)):
        if column not in filled:
            filled[column] = [of(run, model) for model in filled["model"]]
    return filled.reindex(columns=RESULT_COLUMNS)


def origin(run: Run) -> dict[str, object]:
    """Where rows come from: notebook, seed, size, profile, data and hardware, as columns."""
    told = {name: getattr(run, name) for name in ("notebook", "seed", "size", "profile")}
    return told | {"data": run.data_name, "hardware": hardware()}


def _epochs(run: Run, model: str) -> int:
    """Lines of the log that `train.fit` kept of this model (or of its head), else the setting."""
    logs = [run.run_dir / name / "metrics.csv" for name in (model, f"{model}_head")]
    return next((len(files.read_csv(log)) for log in logs if log.exists()), run.epochs)


def update_results(rows: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Merge `rows` into the results file: a row of the same `IDENTITY` is replaced."""
    if missing := set(RESULT_COLUMNS) - set(rows.columns):
        raise ValueError(f"rows lack the columns {sorted(missing)}: build them with result_rows()")
    path = Path(path)
    with files.locked(path):  # two runs may write the same file
        kept = [files.read_csv(path, dtype=NAMES)] if path.exists() else []
        merged = pd.concat([*kept, rows], ignore_index=True) if kept else rows
        # pandas before 3 reads back another last digit than it wrote: an eps would count as two.
        merged = merged.assign(eps=merged["eps"].round(12)).drop_duplicates(IDENTITY, keep="last")
        files.write_csv(merged, path)
    return merged.reset_index(drop=True)


@dataclass(frozen=True)
class Shown:
    """A table as a notebook or a terminal prints it."""

    table: pd.DataFrame
    notes: str

    def __repr__(self) -> str:
        return f"{self.table.to_string(index=False)}\n{self.notes}".strip()

    def _repr_html_(self) -> str:
        number = re.compile(r"[<+-]? ?[\d.,]+(e-?\d+)?( ?%)?( \[.*)?$")
        right = {c: all(not t or number.match(t) for t in self.table[c]) for c in self.table}

        def cell(text: str, column: str, kind: str) -> str:
            style = f"text-align:{'right' if right[column] else 'left'};max-width:36em"
            bad, good = text.startswith("WARN"), text.startswith("PASS")
            style += ";color:#B04A00;font-weight:bold" if bad else ";color:#006B4E" if good else ""
            return f'<{kind} style="{style}">{html.escape(text)}</{kind}>'

        columns = list(self.table)
        lines = [zip(row, columns, strict=True) for row in self.table.to_numpy()]
        head = "".join(cell(name, name, "th") for name in columns)
        rows = ["".join(cell(text, name, "td") for text, name in line) for line in lines]
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        notes = f"<p><small>{html.escape(self.notes)}</small></p>" if self.notes else ""
        return f"<table>\n<tr>{head}</tr>\n{body}\n</table>{notes}"


def show(table: pd.DataFrame | pd.Series, *, digits: int = 2, notes: str = "") -> Shown:
    """A table for reading: words for column names, `digits` decimals, no counting index.

    A named index becomes columns, NaN an empty cell. Where a share is 0 or 1 its interval has a
    mark, and a line below says whose it is.

    >>> show(pd.DataFrame({"fp_per_image": [0.1234], "n": [24.0]}))
    fp per image images
            0.12     24
    """
    frame = table.to_frame() if isinstance(table, pd.Series) else table
    named = [name for name in frame.index.names if name]
    frame = frame.reset_index() if named else frame
    cells = {}
    for name, column in frame.rename_axis(columns=None).items():
        title = " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
        title = _word(title.strip())
        p_values = title == "p" or title.startswith("p (")
        cells[title] = _cells(column, 3 if p_values else digits, p_values=p_values)
    shown = pd.DataFrame(cells, dtype=object)
    if shown.map(lambda text: text.endswith(MARK)).to_numpy().any():
        notes += f"\n{MARK} None or all: no resampling varies there, so the interval is the exact "
        notes += "one, patients as trials (Clopper & Pearson 1934)."
    return Shown(shown, notes.strip())


def _word(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _cells(column: pd.Series, digits: int, *, p_values: bool = False) -> list[str]:
    """A column as text: whole numbers without decimals, True as yes, tiny p-values as < 0.001."""
    if pd.api.types.is_bool_dtype(column):
        return column.map({True: "yes", False: "no"}).to_list()
    if not pd.api.types.is_numeric_dtype(column):
        return ["" if value is None or value is np.nan else str(value) for value in column]
    whole = (column.dropna() % 1 == 0).all() and (column.abs().max() > 1 or not column.any())
    whole |= pd.api.types.is_integer_dtype(column)
    least = 10.0**-digits
    told = []
    for value in column:
        tiny = 0 < abs(value) < (least if p_values else least / 2)
        small = f"< {least}" if p_values else f"{value:.1e}"
        text = f"{value:,.0f}" if whole else small if tiny else f"{value:.{digits}f}"
        told.append("" if pd.isna(value) else text)
    return told


def wide(
    rows: pd.DataFrame,
    across: str = "metric",
    *,
    down: str | Sequence[str] = "model",
    only: Sequence = (),
    intervals: Sequence | None = None,
    signed: bool = False,
) -> pd.DataFrame:
    """Long rows (value, ci_low, ci_high, n) as a table of texts: `down` down, `across` across.

    only: what stands across, in this order (default: all); intervals: which of them show theirs
    (None: all).
    """
    chosen = rows[rows[across].isin(only)] if len(only) else rows
    told = []
    for _, row in chosen.iterrows():
        bare = intervals is not None and row[across] not in intervals
        row = dict(row) | ({"ci_low": np.nan} if bare else {})
        told.append(with_interval(row, signed=True) if signed else _marked(row))
    order = list(dict.fromkeys(only if len(only) else chosen[across]))
    at = {"index": down, "columns": across, "values": "cell", "sort": False, "aggfunc": "first"}
    table = chosen.assign(cell=told).pivot_table(**at)
    return table[[name for name in order if name in table]].rename_axis(columns=None)


def _marked(row: Mapping) -> str:
    """The number with its interval, and a mark where that is the exact one of none or all."""
    exact = row["value"] in (0, 1) and row["ci_low"] < row["ci_high"]
    return f"{with_interval(row)} {MARK}" if exact else with_interval(row)


def interval_table(table: pd.DataFrame) -> pd.DataFrame:
    """Metric rows (metric, value, ci_low, ci_high, n) for reading: "value [low, high]"."""
    shown = pd.DataFrame({"metric": [_word(name) for name in table["metric"]]})
    cells = [_marked(row) for _, row in table.iterrows()]
    return shown.assign(**{"value [95 % interval]": cells, "images": table["n"].to_numpy()})


def accuracy_rows(
    per_image: pd.DataFrame, study: Study, *, model: str, eps_unit: str = "pixel"
) -> pd.DataFrame:
    """Accuracy under attack with patient intervals, one result row per attack and eps.

    `per_image` has columns attack, eps, image (row number in the manifest) and fooled.
    """
    parts = per_image.groupby(["attack", "eps"], sort=False)
    accuracy = dict(metric="accuracy")
    rows = [_right(own, study) | accuracy | dict(attack=a, eps=eps) for (a, eps), own in parts]
    return result_rows(pd.DataFrame(rows), study.run, model=model, eps_unit=eps_unit)


def direction_rows(
    per_image: pd.DataFrame, study: Study, *, model: str, eps: float
) -> pd.DataFrame:
    """The worst case at `eps`: sensitivity (missed disease), specificity, their mean."""
    part = per_image[per_image["attack"].eq("worst") & np.isclose(per_image["eps"], eps)]
    y, patients = part["label"].to_numpy(), study.patients(part["image"].to_numpy())
    answers = np.where(part["fooled"], 1 - y, y)
    found = metrics.classification(y, answers, patients, draws=study.run.bootstrap_draws)
    counts = {"sensitivity": sum(y), "specificity": sum(1 - y), "balanced_accuracy": len(y)}
    rows = found.set_index("metric").loc[[*counts]].assign(n=[*counts.values()]).reset_index()
    return result_rows(rows, study.run, model=model, attack="worst", eps=eps)


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

    `per_image`: rows of `attacks.evaluate.robust` by model, those of several seeds below each other
    in the same order. See `metrics.paired_difference`: a patient with all seeds trades places as
    one. p_holm is adjusted for the number of models.
    """
    shown = "condition model accuracy reference difference ci_low ci_high".split()
    shown += "only_model_right only_reference_right p p_holm".split()
    tables, draws = [], study.run.bootstrap_draws
    cases = ("clean", "clean", 0.0), (f"worst case {eps_text(eps)}", "worst", eps)
    for condition, attack, at in cases:
        right, rows = {}, []
        for name, table in per_image.items():
            part = table[table.attack.eq(attack) & np.isclose(table.eps, at)]
            part = part.sort_values("image", kind="stable")
            right[name] = ~part["fooled"].to_numpy(bool)
        patients, base = study.patients(part["image"].to_numpy()), right.pop(reference)
        for name, own in right.items():
            row = metrics.paired_difference(own, base, patients, draws=draws)
            rows.append(row | {"model": name, "accuracy": own.mean(), "reference": base.mean()})
        adjusted = metrics.holm([row["p"] for row in rows])
        tables.append(pd.DataFrame(rows).assign(condition=condition, p_holm=adjusted))
    new = {"value": "difference", "only_a": "only_model_right", "only_b": "only_reference_right"}
    found = pd.concat(tables, ignore_index=True).rename(columns=new)[shown]
    return found.assign(n=part["image"].nunique(), **origin(study.run))


def attack_table(results: pd.DataFrame, *, eps: float) -> pd.DataFrame:
    """The FracAtlas study's table, completed: clean, PGD and worst case in per cent, by model."""
    cases = {"clean": "clean accuracy (%)", "pgd_ce": "PGD accuracy (%)", "worst": "worst case (%)"}
    names = {(attack, "accuracy"): name for attack, name in cases.items()}
    names |= {("worst", m): f"{m}, worst case (%)" for m in ("sensitivity", "specificity")}
    chosen = results[_at(results, eps) | results.attack.eq("clean")]
    table = pd.DataFrame(index=pd.Index(dict.fromkeys(results.model), name="model"))
    for (attack, metric), name in names.items():
        own = chosen[chosen.attack.eq(attack) & chosen.metric.eq(metric)].set_index("model")
        cells = {model: with_interval(row, scale=100) for model, row in own.iterrows()}
        table[name] = pd.Series(cells)
    return table.dropna(how="all")


def _at(results: pd.DataFrame, eps: float) -> pd.Series:
    return np.isclose(results.eps, eps) & results.eps_unit.eq("pixel")


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy with its interval: models down, attack and eps (pixel units) across."""
    chosen = results[results.metric.eq("accuracy") & results.eps_unit.eq("pixel")]
    at = zip(chosen.attack, chosen.eps, strict=True)
    at = [attack if not eps else f"{attack} {eps_text(eps)}" for attack, eps in at]
    return wide(chosen.assign(at=at), "at")


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
    near = own[own.attack.eq("worst") & np.isclose(own.eps, eps)]
    worst = near[near.metric.eq("accuracy")]
    clean = own[own.attack.eq("clean") & own.metric.eq("balanced_accuracy")]["value"]
    classes = near[near.metric.isin(["sensitivity", "specificity"])].loc[[reference], "n"]
    same = classes.max() / classes.sum()  # right when everybody is given the larger class
    base = worst.loc[reference]
    said = f"In the worst case at {eps_text(eps)} the **{reference}** model is right on "
    lines = [f"{said}{with_interval(base)} of {base['n']:.0f} images."]
    tests = paired[paired.condition.str.startswith("worst")].set_index("model")["p_holm"]
    for name, p in tests.items():
        row = worst.loc[name]
        gain, said = row["value"] - base["value"], "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
        remark = _judge(row, gain, p, masking.loc[name], balanced=clean[name], same=same)
        text = f"{with_interval(row)}, {gain:+.3f} against {reference} ({said}). {remark}"
        lines.append(f"- **{name}**: {text}")
    return finding(run, lines)


def finding(run: Run, lines: str | Sequence[str]) -> str:
    """`lines` (markdown) as the finding of this run; a smoke run on real images has none.

    Where the images are synthetic a last line says so.
    """
    if run.profile == "smoke" and not run.synthetic:
        small = "a network of this size on so few images concludes nothing"
        how = 'PROFILE = "cpu" (a laptop) or "full" (a GPU), at the top, runs the study.'
        return f"*No finding: this is a smoke run, and {small}. {how}*"
    told = lines if isinstance(lines, str) else "\n".join(lines)
    if run.synthetic:
        told += (
            "\n\n*Synthetic images and a tiny network: this shows the machinery, not a finding.*"
        )
    return told


def _judge(
    row: pd.Series, gain: float, p: float, mask: pd.Series, *, balanced: float, same: float
) -> str:
    """The remark after the numbers: a model that guesses, or hides its gradient, has no gain."""
    if balanced < 0.6:
        guess = "what gives nearly every image the same answer cannot be attacked."
        return f"No defence: its clean balanced accuracy is {balanced:.2f}, and {guess}"
    if mask["gap"] > 0.05 or mask["zero_gradients"] > 0.05:
        ce, margin = f"{mask['pgd_ce']:.3f}", f"{mask['pgd_margin']:.3f}"
        losses = f"PGD with cross-entropy leaves {ce} where the margin loss leaves {margin}."
        zeros = f"{mask['zero_gradients']:.0%} of its input gradients are exactly zero"
        return f"Masked gradients: {zeros}, and {losses}"
    if gain >= 0.1 and p < 0.01:
        than = "less" if row["ci_high"] < same else "not clearly more"
        less = f", yet {than} than the same answer for everybody ({same:.2f})"
        return f"A real gain under every attack of the list{less if row['ci_low'] <= same else ''}."
    small = gain > 0 and p < 0.05
    return "A small real gain." if small else "No gain that this test split can show."


def save_figure(figure: Figure, run: Run, name: str) -> Path:
    """Write `figure` to the run's `figures/` as PNG, in one step; returns the path."""
    path = run.run_dir / "figures" / f"{name}.png"
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
    figure.png = path.read_bytes()  # shown as it is: to draw it takes half a second
    return path


def trainings(fitted: Mapping[str, FitResult]) -> pd.DataFrame:
    """A line a training: epochs made, the one that was kept, its score, minutes."""
    names = ["epochs", "best epoch", "best score", "minutes"]
    rows = [(len(x.history), x.best_epoch, x.best_score, x.seconds / 60) for x in fitted.values()]
    return pd.DataFrame(rows, index=pd.Index([*fitted], name="model"), columns=names)


def written(run: Run) -> Shown:
    """The files that this run wrote, for the end of a notebook; tables and blocks are counted."""
    found = sorted(path.relative_to(run.run_dir) for path in run.run_dir.rglob("*"))
    found = [path for path in found if path.suffix and not path.name.startswith(".")]
    names = pd.Series([path.as_posix() for path in found])
    parts = {}
    tops = names.where(names.str.contains("/"), "").str.split("/").str[0]
    for folder, own in names.groupby(tops):
        most = 3 if len(own) > 20 else 8
        shown = own.str.removeprefix(f"{folder}/").head(most)
        more = f" and {len(own) - most} more" if len(own) > most else ""
        parts[folder or "(top)"] = ", ".join(shown) + more
    parts = pd.Series(parts, name="files").rename_axis("folder")
    return show(parts, notes=f"All below {run.run_dir.parent.name}/{run.run_dir.name}.")
