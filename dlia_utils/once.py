"""The final test of a model is opened once: its predictions are kept, and read back from then on.

A test split that is looked at again after something was changed turns into a second validation split, and its number
into the best of several tries (Dwork et al. 2015, Science 349:636).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from . import files, metrics, train
from .device import fingerprint
from .study import Study, load_models
from .study import test_opened as log_opening  # pytest would take the name for a test

AGAIN = " (AGAIN, forced)"


class AlreadyOpened(RuntimeError):
    """The test split was opened for this purpose before."""


def open_test(study: Study, purpose: str, *, force: bool = False) -> pd.DataFrame:
    """Log in test_log.csv that the test split is opened for `purpose`; a second time is refused unless forced.

    A forced opening is logged as such, so that a reader of the log sees every one. Returns the log. The rule holds
    for a run folder: a new run is another experiment. Raises: ValueError for an empty purpose, `AlreadyOpened`.

    >>> import tempfile, types
    >>> from pathlib import Path
    >>> folder = types.SimpleNamespace(run_dir=Path(tempfile.mkdtemp()), key="k")
    >>> study = types.SimpleNamespace(run=folder, key={"split": "s"})
    >>> len(open_test(study, "final test"))
    1
    >>> open_test(study, "final test", force=True)["purpose"].tolist()
    ['final test', 'final test (AGAIN, forced)']
    """
    if not purpose.strip():
        raise ValueError("purpose is empty: say in a few words what the test split is opened for")
    log = study.run.run_dir / "test_log.csv"
    earlier = pd.read_csv(log) if log.exists() else pd.DataFrame({"purpose": [], "time": []})
    before = earlier.loc[earlier["purpose"].eq(purpose), "time"]
    if len(before) and not force:
        raise AlreadyOpened(
            f"the test split was opened for {purpose!r} at {before.iloc[0]} ({log.name} of this run). What was changed "
            "since then was changed by somebody who may know the result. Start a new run (RUN_NAME), or say that you "
            "open it again: force=True, which is logged"
        )
    return log_opening(study, purpose + AGAIN if len(before) else purpose)


def scores(told: pd.DataFrame) -> np.ndarray:
    """What `metrics.classification` takes of `predictions`: [N] of two classes, [N,K] of more.

    >>> scores(pd.DataFrame({"label": [0, 2], "p0": [0.6, 0.1], "p1": [0.3, 0.2], "p2": [0.1, 0.7]})).shape
    (2, 3)
    """
    found = told["probability"] if "probability" in told else told.filter(regex=r"^p\d+$")
    return found.to_numpy()


def most_probable(score: np.ndarray) -> np.ndarray:
    """The class [N] that each row of scores [N,K] is highest for.

    >>> most_probable(np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])).tolist()
    [0, 2]
    """
    return score.argmax(axis=1)


def predictions(study: Study, name: str, *, force: bool = False) -> pd.DataFrame:
    """What the trained model `name` says about the test films: opened once, stored, and read back afterwards.

    Columns image (row of the manifest), path, label, probability (of class 1; of more than two classes p0, p1, ...)
    and weights (the model's fingerprint).
    They lie in tables/test_NAME.csv. Reading them back is no opening. A model that is trained further after its test
    loses them, and a test of other weights is another opening, which is refused unless forced (see `open_test`).
    Raises: FileNotFoundError for a model that was not trained, `AlreadyOpened`.
    """
    path = study.run.run_dir / "tables" / f"test_{name}.csv"
    model = load_models(study, [name])[name]
    weights = fingerprint(model)
    if path.exists() and not force:
        kept = pd.read_csv(path, dtype={"weights": str})
        if kept["weights"].eq(weights).all():
            return kept
    open_test(study, f"final test of {name}", force=force)
    probability, labels, rows = train.predict(model, study.torch_set("test"))
    told = study.dataset.manifest.loc[rows, ["path"]].assign(image=rows, label=labels)
    names = (
        ["probability"]
        if probability.shape[1] == 2
        else [f"p{k}" for k in range(probability.shape[1])]
    )
    told[names] = probability[:, -len(names) :]
    files.write_csv(told[["image", "path", "label", *names]].assign(weights=weights), path)
    return pd.read_csv(path, dtype={"weights": str})


def evaluation(study: Study, name: str, *, force: bool = False) -> pd.DataFrame:
    """Metrics of the trained model `name` on the test split with intervals by patient, from `predictions`.

    Columns metric, value, ci_low, ci_high, n (see `metrics.classification`). Raises: as `predictions`.
    """
    told = predictions(study, name, force=force)
    patients = study.patients(told["image"].to_numpy())
    return metrics.classification(
        told["label"], scores(told), patients, draws=study.run.bootstrap_draws
    )
