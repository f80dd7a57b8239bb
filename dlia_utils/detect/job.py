"""Train one fold outside a notebook, as a rule under torchrun on several GPUs at once.

    torchrun --nproc-per-node=2 -m dlia_utils.detect.job runs/05_nih_detection/full-dlia-real fold0

The run folder is one that the notebook has opened: its config.json says what is trained, and the
notebook reads the checkpoints back.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ..run import reopen
from ..train import OutOfTime
from . import folds


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the named fold; exit status 2: wrong argument or data, 3: out of time."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("run_folder", metavar="RUN_FOLDER")
    parser.add_argument("fold", metavar="FOLD")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        run = reopen(options.run_folder)
        study = folds.open_detection(run)
        by_name = {fold.name: fold for fold in folds.folds(study)}
        if options.fold not in by_name:
            raise ValueError(f"FOLD {options.fold} is not one of {', '.join(by_name)}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = dict(detector=run.pick(*folds.DETECTOR), recipe=run.pick(*folds.RECIPE))
    try:
        folds.train_fold(study, by_name[options.fold], flip=run.flip, **settings)
    except OutOfTime as stop:
        print(stop, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
