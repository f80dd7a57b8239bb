"""The command line: `python -m dlia_utils list | run | data | submission | notebooks | kaggle ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 fine, 1 something failed, 2 wrong argument or data."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dlia_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("list", help="notebooks and data sets of the suite")
    one.set_defaults(command=list_all)

    one = commands.add_parser("run", help="execute notebooks and print their results")
    one.add_argument(
        "--nb", nargs="+", default=[], metavar="NN", help="which notebooks, e.g. 01 (default: all)"
    )
    one.add_argument(
        "--data",
        default="",
        metavar="PATH",
        help="folder of the data sets, or of class folders of your own (default: find them)",
    )
    one.add_argument("--dataset", default="", metavar="NAME", help="the same as --set dataset=NAME")
    one.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        dest="changes",
        help="change settings of the notebook, e.g. --set epochs=5 lr=3e-4",
    )
    one.add_argument("--profile", default="smoke", choices=("smoke", "cpu", "full", "auto"))
    one.add_argument(
        "--run-name",
        default="",
        metavar="NAME",
        help="folder name (default: profile and kind of data)",
    )
    one.add_argument(
        "--fresh", action="store_true", help="put an older run of that name aside and start anew"
    )
    one.set_defaults(command=run)

    data = commands.add_parser("data", help="look at a data set").add_subparsers(
        required=True, metavar="ACTION"
    )
    one = data.add_parser("check", help="find, count and audit a data set")
    one.add_argument(
        "dataset",
        metavar="NAME|PATH",
        help="a data set's name, or your folder of class folders or of boxes",
    )
    one.add_argument("--data", default="", metavar="PATH", help="folder to look for NAME in")
    one.add_argument(
        "--patient-pattern",
        default="",
        metavar="REGEX",
        help="reads patients from your files' names",
    )
    one.set_defaults(command=data_check)

    sent = commands.add_parser("submission", help="look at a competition CSV").add_subparsers(
        required=True, metavar="ACTION"
    )
    one = sent.add_parser("check", help="find what the competition would refuse or score wrongly")
    one.add_argument("file", metavar="FILE")
    one.add_argument(
        "--mapping",
        required=True,
        metavar="MAP",
        help="the competition's CSV of ids and image names",
    )
    one.add_argument(
        "--images",
        default="",
        metavar="DIR",
        help="folder of the test images: boxes must lie inside them",
    )
    one.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="labels (default: the NIH's 8)"
    )
    one.set_defaults(command=submission_check)

    made = commands.add_parser("notebooks", help="make the committed notebooks").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, command, what in (
        ("build", build, "turn src/*.py into .ipynb; unchanged cells keep their outputs"),
        ("check", check, "find static faults"),
        ("refresh", refresh, "build, execute in the smoke profile on synthetic data, clean"),
    ):
        one = made.add_parser(name, help=what)
        one.add_argument("nb", nargs="*", metavar="NN", help="which notebooks (default: all)")
        one.set_defaults(command=command)

    one = made.add_parser("back", help="turn an edited NN_name.ipynb into its source again")
    one.add_argument("path", metavar="FILE", help="e.g. the notebook downloaded from Kaggle")
    one.set_defaults(command=back)

    pushed = commands.add_parser("kaggle", help="make what Kaggle takes").add_subparsers(
        required=True, metavar="ACTION"
    )
    one = pushed.add_parser("build", help="write the kernel folders and the offline data set")
    one.add_argument("--user", required=True, metavar="NAME", help="your Kaggle user name")
    one.add_argument(
        "--out", default="build/kaggle", metavar="DIR", help="replaced whole (default: %(default)s)"
    )
    one.add_argument("--captum", metavar="FILE", help="captum's wheel (default: pip fetches it)")
    one.add_argument("--strict", action="store_true", help="fail without captum's wheel")
    one.add_argument(
        "--offline", action="store_true", help="switch the internet off in the notebooks"
    )
    one.add_argument(
        "--competition",
        nargs="+",
        default=[],
        metavar="SLUG",
        help="competitions you have joined, to attach",
    )
    one.set_defaults(command=kaggle_build)
    return parser


def list_all(options: argparse.Namespace) -> int:
    from tools import notebooks

    from .data import sources

    print("Notebooks (python -m dlia_utils run --nb NN)")
    for source in notebooks.find():
        title = source.read_text(encoding="utf-8").split("# # ", 1)[-1].splitlines()[0]
        print(f"  {source.stem:28} {title}")
    print("Data sets (python -m dlia_utils data check NAME)")
    for name in sources.SOURCES:
        print(f"  {name}")
    print(
        "  and every 2-D set of MedMNIST, named as its file: pneumoniamnist_64, ... (see data/README.md)"
    )
    return 0


def run(options: argparse.Namespace) -> int:
    from tools import notebooks

    from .data.tables import DataNotFound
    from .run import parse_change

    changes = dict(map(parse_change, options.changes))
    changes |= {"dataset": options.dataset} if options.dataset else {}
    runs = []
    sources = notebooks.pick(options.nb)
    for number, source in enumerate(sources, 1):
        print(f"[{number}/{len(sources)}] {source.stem}, profile {options.profile}", flush=True)
        try:
            done = notebooks.run(
                source,
                profile=options.profile,
                data=options.data,
                run_name=options.run_name,
                resume=not options.fresh,
                changes=changes,
            )
        except DataNotFound as missing:
            if options.nb or (source == sources[-1] and not runs):
                raise
            # All notebooks were asked for, and few people have all the data sets.
            print(f"{source.stem} is left out: {missing}", file=sys.stderr)
            continue
        runs.append(done)
        _report(done)
    failed = [one.notebook for one in runs if one.error]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _report(one) -> None:
    """What a run left behind: its results table and where to look, or why it failed."""
    print(f"\n{one.notebook}: {'FAILED' if one.error else 'done'} in {one.seconds:.0f} s")
    if one.error:
        print(one.error, file=sys.stderr)
    elif (one.folder / "results.csv").exists():
        print("\n" + results_text(one.folder / "results.csv") + "\n")
    print(f"Look at  {_short(one.executed)}")
    from .run import submissions_root

    kinds = {
        "all results": one.folder.glob("results.csv"),
        "figures": one.folder.glob("figures/*.png"),
        "submissions": submissions_root().glob(f"*_{one.folder.name}.csv"),
    }
    for what, paths in kinds.items():
        if found := sorted(paths):
            where = found[0] if len(found) == 1 else found[0].parent
            print(
                f"         {_short(where)}  ({what if len(found) == 1 else f'{len(found)} {what}'})"
            )
    print(flush=True)


def _short(path: Path) -> str:
    """`path` as seen from here when it is below, else whole."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def results_text(path: Path) -> str:
    """The rows of a results file that a reader wants first: accuracy, clean and in the worst case.

    A file without accuracies is shown as its first 20 rows, the clean ones where there are any.
    """
    import pandas as pd

    from . import report

    results = pd.read_csv(path)
    shown = {
        name: ", ".join(results[name].astype(str).unique()) for name in ("data", "profile", "size")
    }
    context = " | ".join(f"{name}: {values}" for name, values in shown.items())
    headline = results[results.metric.eq("accuracy") & results.attack.isin(["clean", "worst"])]
    if headline.empty:
        clean = results[results.attack.eq("clean")]
        rows = results if clean.empty else clean
        return (
            f"{context}\n{rows[['model', 'metric', 'value', 'n']].head(20).to_string(index=False)}"
        )
    return f"{context}\n{report.results_table(headline).to_string()}"


def data_check(options: argparse.Namespace) -> int:
    from .data import cache, datasets, medmnist, sources, split, tables

    name = options.dataset
    known = name in sources.SOURCES or medmnist.meant(name)
    own = os.sep in name or "/" in name or not known and Path(name).is_dir()
    location = _own_location(name, options) if own else sources.find(name, options.data or None)
    kind = "SYNTHETIC" if location.synthetic else "real images"
    print(f"{location.dataset}: {location.root} ({kind}, found by: {location.origin})\n")
    dataset = datasets.load(location)
    print(datasets.summary(dataset).to_string(), "\n")
    if len(dataset.boxes):
        print(datasets.box_summary(dataset).round(2).to_string(), "\n")
    for reason, count in dataset.ignored["reason"].value_counts().items():
        print(f"not read: {count} files, {reason}")
    problems, truncated = cache.examine(dataset)
    print(
        f"used although they end too early: {len(truncated)} files {', '.join(truncated[: tables.SHOWN])}"
    )
    if len(problems):
        print("\n" + datasets.problem_text(problems))
        return 1
    if not own:
        audit = split.audit(split.grouped(dataset))
        print("\nAudit of the patient-grouped split\n" + audit.to_string(index=False))
        return int(audit["verdict"].eq("leak").any())
    dataset = split.with_looks(dataset, cache.build(dataset, size=64).images)
    alike = dataset.manifest.groupby("look")["path"].agg(list)
    alike = alike[alike.map(len) > 1]
    print(f"near-duplicates: {len(alike)} groups of images that look the same")
    for paths in alike.head(tables.SHOWN):
        print(f"  {' = '.join(paths[: tables.SHOWN])}")
    if set(dataset.manifest["split"]) & {"val", "test"}:
        title, audit = f"the split that is {dataset.split_rule}", split.audit(dataset)
        # A warning is for published splits, which nobody can mend: this one is the reader's own.
        shared = audit["check"].str.startswith("patients in") & audit["verdict"].eq("warning")
        audit.loc[shared, "verdict"] = "leak"
    else:
        title = "a split drawn by patient, near-duplicates kept together"
        audit = split.audit(split.drawn(dataset, val_share=0.15, test_share=0.15))
    print(f"\nAudit of {title}\n" + audit.to_string(index=False))
    return int(audit["verdict"].eq("leak").any())


def _own_location(path: str, asked: argparse.Namespace):
    """The reader's own folder, or an error that says what it holds instead."""
    from .data import sources
    from .data.tables import DataNotFound

    if asked.data:
        raise ValueError(
            f"{path!r} is a folder, and --data {asked.data!r} names one too: leave --data out"
        )
    folder = Path(path).expanduser()
    given = {"patient_pattern": asked.patient_pattern} if asked.patient_pattern else {}
    if found := sources.find_own(folder, kind="boxes", options=given) or sources.find_own(
        folder, options=given
    ):
        return found
    if folder.is_dir() and (names := sources.published_in(folder)):
        raise DataNotFound(
            f"{path!r} holds the published {', '.join(names)}: python -m dlia_utils data check {names[0]} --data {path}"
        )
    # Reading it as class folders says best what is missing there.
    return sources.own(folder)


def submission_check(options: argparse.Namespace) -> int:
    from . import submission
    from .data.readers import NIH_CLASSES

    classes = options.classes or NIH_CLASSES
    try:
        table = submission.check(
            options.file, options.mapping, images=options.images or None, classes=classes
        )
    except submission.SubmissionError as error:
        print(error)
        return 1
    print(f"{options.file} is valid\n{submission.summary(table)}")
    if not options.images:
        print("not checked: whether boxes lie inside their images (give --images DIR)")
    return 0


def build(options: argparse.Namespace) -> int:
    from tools import notebooks

    for source in notebooks.pick(options.nb):
        print(
            f"built {_short(notebooks.write(notebooks.build(source), notebooks.product(source)))}"
        )
    return 0


def check(options: argparse.Namespace) -> int:
    from tools import notebooks

    sources = notebooks.pick(options.nb)
    problems = [
        f"{source.stem}: {problem}" for source in sources for problem in notebooks.check(source)
    ]
    problems += [] if options.nb else [*notebooks.orphans(), *notebooks.page_problems()]
    print("\n".join(problems) or f"{len(sources)} notebook(s) without fault")
    return int(bool(problems))


def refresh(options: argparse.Namespace) -> int:
    from tools import notebooks

    for source in notebooks.pick(options.nb):
        print(f"{source.stem}: executing in the smoke profile on synthetic data", flush=True)
        path = notebooks.refresh(source)
        print(f"wrote {_short(path)} ({path.stat().st_size / 1e3:.0f} kB)")
    return check(options)


def back(options: argparse.Namespace) -> int:
    from tools import notebooks

    source = notebooks.back(options.path)
    print(
        f"wrote {_short(source)}; now rebuild: python -m dlia_utils notebooks refresh {source.stem[:2]}"
    )
    return 0


def kaggle_build(options: argparse.Namespace) -> int:
    from tools import kaggle

    built = kaggle.build(
        options.user,
        out=options.out,
        captum=options.captum,
        strict=options.strict,
        internet=not options.offline,
        competitions=options.competition,
    )
    print(
        f"built {_short(built.folder)}: {len(built.kernels)} kernel(s), data set {', '.join(built.files)}"
    )
    for note in built.notes:
        print(f"note: {note}")
    # The client imports six without asking for it.
    print(
        "\nPush with Kaggle's client (python -m pip install kaggle six; once: kaggle auth login), in this order:"
    )
    for command, what in kaggle.push_commands(built):
        print(f"\n  # {what}\n  {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
