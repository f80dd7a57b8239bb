"""The command line: `python -m dlia_utils list | run | plan | data check | submission check`."""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

MOST = 20  # lines of warnings that are shown
FITS = 9  # hours: what a session of Kaggle's 12 is planned for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit status 0 fine, 1 something failed, 2 wrong argument or data."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError) as error:
        from . import files

        print(f"error: {files.error_text(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dlia_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, name: str, text: str, under=commands):
        one = under.add_parser(name, help=text)
        one.set_defaults(command=function)
        return one.add_argument

    def check(function, group: str, text: str):
        one = commands.add_parser(group, help=text)
        groups = one.add_subparsers(required=True, metavar="ACTION")
        return command(function, "check", text, groups)

    command(list_all, "list", "notebooks and data sets of the suite")
    add = command(run, "run", "execute notebooks and print their results")
    _asked(add, profile="smoke")
    name = "folder name (default: profile and kind of data)"
    add("--run-name", default="", metavar="NAME", help=name)
    add("--fresh", action="store_true", help="put an older run of that name aside and start anew")

    add = command(plan, "plan", "tell what notebooks will cost, without running them")
    _asked(add, profile="full")
    device = "here: measured on this machine; t4: published speed of Kaggle's two Tesla T4"
    add("--device", default="here", choices=("here", "t4"), help=device)

    add = check(data_check, "data", "find, count and audit a data set")
    name = "a data set's name, or your folder of class folders or of boxes"
    add("dataset", metavar="NAME|PATH", help=name)
    add("--data", default="", metavar="PATH", help="folder to look for NAME in")
    pattern = "reads patients from your files' names"
    add("--patient-pattern", default="", metavar="REGEX", help=pattern)

    text = "find what the competition would refuse or score wrongly in a CSV"
    add = check(submission_check, "submission", text)
    add("file", metavar="FILE")
    mapping = "the competition's CSV of ids and image names"
    add("--mapping", required=True, metavar="MAP", help=mapping)
    images = "folder of the test images: boxes must lie inside them"
    add("--images", default="", metavar="DIR", help=images)
    add("--classes", nargs="+", default=[], metavar="NAME", help="labels (default: the NIH's 8)")
    return parser


def _asked(add, profile: str) -> None:
    """The options that say which notebooks, on what data, under which settings."""
    add("--nb", nargs="+", default=[], metavar="NN", help="which notebooks, e.g. 01 (default: all)")
    where = "folder of the data sets, or of class folders of your own (default: find them)"
    add("--data", default="", metavar="PATH", help=where)
    add("--dataset", default="", metavar="NAME", help="the same as --set dataset=NAME")
    change = "change settings of the notebook, e.g. --set epochs=5 lr=3e-4"
    many = {"nargs": "+", "action": "extend", "default": [], "dest": "changes"}
    add("--set", **many, metavar="NAME=VALUE", help=change)
    add("--profile", default=profile, choices=("smoke", "cpu", "full", "auto"))


def list_all(options: argparse.Namespace) -> int:
    from . import execute
    from .data import sources

    print("Notebooks (python -m dlia_utils run --nb NN)")
    for path in execute.pick():
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        print(f"  {path.stem:28} {''.join(first).splitlines()[0].removeprefix('# ')}")
    print("Data sets (python -m dlia_utils data check NAME)")
    print("\n".join(f"  {name}" for name in sources.SOURCES))
    print("  and every 2-D set of MedMNIST, named as its file: pneumoniamnist_64, ...")
    return 0


def _changes(options: argparse.Namespace) -> dict:
    from .run import parse_change

    named = {"dataset": options.dataset} if options.dataset else {}
    return dict(map(parse_change, options.changes)) | named


def plan(options: argparse.Namespace) -> int:
    """Tables of what the notebooks will cost, and their sums."""
    import torch

    from . import execute, study
    from . import plan as plans
    from . import run as runs
    from .data.tables import DataNotFound
    from .detect import folds

    t4 = options.device == "t4"
    told = "on two Tesla T4, by published speeds" if t4 else "on this machine"
    gpus, lines = 2 if t4 else torch.cuda.device_count() or 1, [f"Hours {told}, at most:"]
    for path in execute.pick(options.nb):
        given = dict(PROFILE=options.profile, DATA_DIR=options.data, CHANGES=_changes(options))
        with (  # nothing is written, printed or decoded
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(runs, "open_folder", lambda run: run),
            mock.patch.object(study, "open_study", study.expected),
            mock.patch.object(folds, "open_detection", study.expected),
        ):
            try:
                names = execute.opening(path, (*execute.HEAD, "plan"), **given)
            except DataNotFound as missing:
                if options.nb:
                    raise
                lines.append(f"{path.stem:28}left out: {missing}")
                continue
        run, networks, phases, loader = (names[one] for one in "run networks phases loader".split())
        prices = plans.published(networks) if t4 else plans.measured(networks, run.device, loader)
        table = plans.table(networks, phases, prices, gpus=gpus)
        stands_in = run.synthetic and run.profile != "smoke"
        images = f"{run.location.dataset} as published" if stands_in else run.data_name
        if options.nb:
            print(f"{path.stem}, {told}\n{table.to_string()}")
            print(plans.advice(table, run.hours or FITS), end="\n\n")
        hours = table["hours"].iloc[-1]
        fits = f"{'fits' if hours <= FITS else 'does NOT fit'} {FITS} hours"
        lines.append(f"{path.stem:28}{run.profile:8}{images:28}{hours:6.1f}  {fits}")
    print("\n".join(lines))
    return 0


def run(options: argparse.Namespace) -> int:
    from . import execute
    from .data.tables import DataNotFound

    how = dict(profile=options.profile, data=options.data, run_name=options.run_name)
    how |= dict(resume=not options.fresh, changes=_changes(options))
    runs, paths = [], execute.pick(options.nb)
    for number, path in enumerate(paths, 1):
        print(f"[{number}/{len(paths)}] {path.stem}, profile {options.profile}", flush=True)
        try:
            runs.append(execute.run(path, **how))
        except DataNotFound as missing:
            if options.nb or (path == paths[-1] and not runs):
                raise
            # All notebooks were asked for, and few people have all the data sets.
            print(f"{path.stem} is left out: {missing}", file=sys.stderr)
        else:
            _report(runs[-1])
    if failed := [one.name for one in runs if one.error]:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _report(one) -> None:
    """What a run left behind: its results table and where to look, or why it failed."""
    from . import execute
    from .run import submissions_root

    print(f"\n{one.name}: {'FAILED' if one.error else 'done'} in {one.seconds:.0f} s")
    results = one.folder / "results.csv"
    if one.error:
        print(one.error, file=sys.stderr)
    elif results.exists():
        print(f"\n{results_text(results)}\n")
    if said := execute.warned(one.notebook):
        more = f"\n  and {len(said) - MOST} lines more" * (len(said) > MOST)
        print("\n  ".join(["It warned of:", *said[:MOST]]) + more, file=sys.stderr)
    print(f"Look at  {execute.short(one.notebook)}")
    kinds = {"all results": one.folder.glob(results.name)}
    kinds["figures"] = one.folder.glob("figures/*.png")
    kinds["submissions"] = submissions_root().glob(f"*_{glob.escape(one.folder.name)}.csv")
    for what, paths in kinds.items():
        if found := sorted(paths):
            where = found[0] if len(found) == 1 else found[0].parent
            count = "" if len(found) == 1 else f"{len(found)} "
            print(f"         {execute.short(where)}  ({count}{what})")
    print(flush=True)


def results_text(path: Path) -> str:
    """The rows of a results file that a reader wants first: accuracy, clean and in the worst case.

    A file without accuracies is shown as its first 20 rows, the clean ones where there are any.
    """
    from . import files, report

    results = files.read_csv(path)
    shown = {name: results[name].astype(str).unique() for name in ("data", "profile", "size")}
    context = " | ".join(f"{name}: {', '.join(values)}" for name, values in shown.items())
    headline = results[results.metric.eq("accuracy") & results.attack.isin(["clean", "worst"])]
    if len(headline):
        return f"{context}\n{report.results_table(headline).to_string()}"
    clean = results[results.attack.eq("clean")]
    rows = clean if len(clean) else results
    return f"{context}\n{rows[['model', 'metric', 'value', 'n']].head(20).to_string(index=False)}"


def data_check(options: argparse.Namespace) -> int:
    from .data import datasets, medmnist, sources, split, tables

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
    images, problems = _decoded(dataset)
    if images is None:
        print("\n" + datasets.problem_text(problems, shown=len(problems)))
        return 1
    used = {"end too early": images.truncated, "show one grey value only": images.flat}
    for text, paths in used.items():
        print(f"used although they {text}: {len(paths)} files {', '.join(paths[: tables.SHOWN])}")
    if own:
        title, audit = _own_audit(split.with_looks(dataset, images.images))
    else:
        title, audit = "the patient-grouped split", split.audit(split.grouped(dataset))
    print(f"\nAudit of {title}\n" + audit.to_string(index=False))
    return int(audit["verdict"].eq("leak").any())


def _decoded(dataset):
    """The images, decoded, or None and every file that cannot be used."""
    import tempfile

    import pandas as pd

    from .data import cache, datasets, tables

    try:
        return cache.build(dataset, size=64), None
    except tables.BadData as error:
        if (bad := error.problems).empty:
            raise
    good = (~dataset.manifest["path"].isin(bad["path"])).to_numpy().nonzero()[0]
    try:  # It stopped at the headers: the others may be damaged further down.
        with tempfile.TemporaryDirectory() as scratch:
            if len(good):
                cache.build(datasets.take(dataset, good), size=64, root=scratch)
    except tables.BadData as error:
        bad = pd.concat([bad, error.problems])
    return None, bad


def _own_audit(dataset):
    """Near-duplicates of a reader's own folder, printed; title and audit of its split or of one
    drawn by patient."""
    from .data import split, tables

    alike = dataset.manifest.groupby("look")["path"].agg(list)
    alike = alike[alike.map(len) > 1]
    print(f"near-duplicates: {len(alike)} groups of images that look the same")
    for paths in alike.head(tables.SHOWN):
        print(f"  {' = '.join(paths[: tables.SHOWN])}")
    if not set(dataset.manifest["split"]) & {"val", "test"}:
        drawn = split.drawn(dataset, val_share=0.15, test_share=0.15)
        return "a split drawn by patient, near-duplicates kept together", split.audit(drawn)
    audit = split.audit(dataset)
    # A warning is for published splits, which nobody can mend: this one is the reader's own.
    shared = audit["check"].str.startswith("patients in") & audit["verdict"].eq("warning")
    audit.loc[shared, "verdict"] = "leak"
    return f"the split that is {dataset.split_rule}", audit


def _own_location(path: str, asked: argparse.Namespace):
    """The reader's own folder, or an error that says what it holds instead."""
    from .data import sources
    from .data.tables import DataNotFound

    if asked.data:
        text = f"{path!r} is a folder, and --data {asked.data!r} names one too"
        raise ValueError(f"{text}: leave --data out")
    folder = Path(path).expanduser()
    given = {"patient_pattern": asked.patient_pattern} if asked.patient_pattern else {}
    for kind in ("boxes", "folder"):
        if found := sources.find_own(folder, kind=kind, options=given):
            return found
    if folder.is_dir() and (names := sources.published_in(folder)):
        fix = f"python -m dlia_utils data check {names[0]} --data {path}"
        raise DataNotFound(f"{path!r} holds the published {', '.join(names)}: {fix}")
    # Reading it as class folders says best what is missing there.
    return sources.own(folder)


def submission_check(options: argparse.Namespace) -> int:
    from . import submission
    from .data import readers

    how = dict(images=options.images or None, classes=options.classes or readers.NIH_CLASSES)
    try:
        table = submission.check(options.file, options.mapping, **how)
    except submission.SubmissionError as error:
        print(error)
        return 1
    print(f"{options.file} is valid\n{submission.summary(table)}")
    if not options.images:
        said = "not checked: whether boxes lie inside their images"
        if submission.edition_sizes(options.mapping):
            said = "every image was taken for 1024 x 1024, as the NIH's are"
        print(f"{said} (give --images DIR)")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"] and "GLIBC_TUNABLES" not in os.environ:  # as kernels are started
        from .execute import KERNEL_ENVIRONMENT

        os.execve(sys.executable, sys.orig_argv, KERNEL_ENVIRONMENT | os.environ)
    sys.exit(main())
