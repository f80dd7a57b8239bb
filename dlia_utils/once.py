"""The final test of a model is opened once: its predictions are kept, and read back from then on.

A test split that is looked at again after something was changed turns into a second validation split, and its number
into the best of several tries (Dwork et al. 2015, Science 349:636).
"""

from __future__ import annotations

import pandas as pd

from . import files, train
from .objectives import fingerprint
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
    >>> folder = types.SimpleNamespace(run_dir=Path(tempfile.mkdtemp()))
    >>> study = types.SimpleNamespace(config=folder, key={"config": "c", "split": "s"})
    >>> len(open_test(study, "final test"))
    1
    >>> open_test(study, "final test", force=True)["purpose"].tolist()
    ['final test', 'final test (AGAIN, forced)']
    """
    if not purpose.strip():
        raise ValueError("purpose is empty: say in a few words what the test split is opened for")
    log = study.config.run_dir / "test_log.csv"
    earlier = pd.read_csv(log) if log.exists() else pd.DataFrame({"purpose": [], "time": []})
    before = earlier.loc[earlier["purpose"].eq(purpose), "time"]
    if len(before) and not force:
        raise AlreadyOpened(
            f"the test split was opened for {purpose!r} at {before.iloc[0]} ({log.name} of this run). What was changed "
            "since then was changed by somebody who may know the result. Start a new run (RUN_NAME), or say that you "
            "open it again: force=True, which is logged"
        )
    return log_opening(study, purpose + AGAIN if len(before) else purpose)


def predictions(study: Study, name: str, *, force: bool = False) -> pd.DataFrame:
    """What the trained model `name` says about the test films: opened once, stored, and read back afterwards.

    Columns image (row of the manifest), path, label, probability (of class 1) and weights (the model's fingerprint).
    They lie in tables/test_NAME.csv. Reading them back is no opening. A model that is trained further after its test
    loses them, and a test of other weights is another opening, which is refused unless forced (see `open_test`).
    Raises: FileNotFoundError for a model that was not trained, `AlreadyOpened`.
    """
    path = study.config.run_dir / "tables" / f"test_{name}.csv"
    model = load_models(study, [name])[name]
    weights = fingerprint(model)
    if path.exists() and not force:
        kept = pd.read_csv(path, dtype={"weights": str})
        if kept["weights"].eq(weights).all():
            return kept
    open_test(study, f"final test of {name}", force=force)
    probability, labels, rows = train.predict(model, study.torch_set("test"))
    told = study.dataset.manifest.loc[rows, ["path"]].assign(image=rows, label=labels, probability=probability[:, 1])
    files.write_csv(told[["image", "path", "label", "probability"]].assign(weights=weights), path)
    return pd.read_csv(path, dtype={"weights": str})
