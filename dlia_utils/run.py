"""A run: one notebook with its data, profile, device, settings and folder, decided by `start` and then fixed.

The settings stand in the notebook: FULL is the whole study, CPU and SMOKE what is smaller, CHANGES what the
reader wants otherwise. `start` checks them, finds the data, opens the run folder and writes config.json.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from . import files, threads
from .data import datasets, sources
from .data.tables import BadData, DataNotFound
from .device import hardware, pick_device
from .units import pixel_text

log = logging.getLogger("dlia_utils")

PROFILES = ("smoke", "cpu", "full")
KAGGLE_REMEDY = (
    "for the full study choose Accelerator: 'GPU T4 x2' in the session options, then Run All again"
)
FIXED = (
    "settings are fixed once a run has started: write CHANGES = {{{!r}: ...}} and run from the top"
)
WIDTH = 96  # of the banner


class Run:
    """Everything a notebook run is decided by; settings read as attributes, e.g. `run.size`.

    What is read is a copy: nothing can be changed behind config.json's back. `own` holds models of the
    reader's own by name: a module that is trained already, or a function that builds one to be trained here.
    """

    own: dict[str, nn.Module | Callable[[], nn.Module]]

    def __init__(
        self,
        *,
        notebook: str,
        profile: str,
        location: sources.Location,
        run_dir: Path,
        settings: Mapping[str, Any],
        device: str = "cpu",
        device_note: str = "",
        reason: str = "asked for",
        resume: bool | str = True,
        usual: Mapping[str, Any] | None = None,
        fresh: bool = False,
        trains: str = "Training",
    ) -> None:
        given = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "settings", "usual")
        }
        vars(self).update(given, own={}, _settings=dict(settings), _usual=dict(usual or {}))

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is no attribute; while unpickling there are no attributes yet, hence __dict__.
        settings = self.__dict__.get("_settings", {})
        if name not in settings:
            raise AttributeError(f"no setting {name!r}{nearest(name, settings)}")
        return copy.deepcopy(settings[name])

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(FIXED.format(name))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._settings]

    def __str__(self) -> str:
        return f"{self.banner()}\n{self.settings_text()}"

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of all settings."""
        return copy.deepcopy(self._settings)

    @property
    def changed(self) -> list[str]:
        """Names of the settings that CHANGES has given another value."""
        return list(self._usual)

    @property
    def synthetic(self) -> bool:
        return self.location.synthetic

    @property
    def data_name(self) -> str:
        """The word every result row carries, so synthetic numbers cannot pass for real ones."""
        return f"{self.location.dataset} (SYNTHETIC)" if self.synthetic else self.location.dataset

    @property
    def caption(self) -> str:
        """What a figure says of where its numbers come from: data, profile and image size."""
        return f"{self.data_name}, {self.profile} profile, {self.size} px"

    @property
    def key(self) -> str:
        """Hash of notebook, profile, settings and data: two runs of the same key may share a folder."""
        return digest([self.notebook, self.profile, self.data_name, self._settings])

    def pick(self, *names: str) -> dict[str, Any]:
        """Some settings by name: what a training or a table depends on."""
        return {name: getattr(self, name) for name in names}

    def variant(self, **settings: Any) -> Run:
        """The same run under other settings, e.g. for a second image size; the run's own are as they were."""
        for name in settings:
            if name not in self._settings:
                raise ValueError(f"no setting {name!r}{nearest(name, self._settings)}")
        other = copy.copy(self)
        vars(other).update(_settings=self._settings | settings)
        return other

    def banner(self) -> str:
        """The lines printed at the top of a notebook: device, profile, data and why."""
        data = f"real images of {self.location.dataset!r}"
        if self.synthetic:
            data = "SYNTHETIC phantom images: the numbers below mean nothing medically"
        # A GPU that is missing or cannot be used is what a reader must learn first.
        device = [f"device   {self.device}  ({self.device_note})"]
        if self.device == "cpu":
            device = [f"device   CPU ONLY: {self.device_note}"]
            device += [f"         {KAGGLE_REMEDY}"] if sources.on_kaggle() else []
        place = f"{self.run_dir.parent.name}/{self.run_dir.name}"
        lines = [
            *device,
            f"profile  {self.profile.upper()}  ({self.reason})",
            f"data     {data}  [found by: {self.location.origin}]",
            f"run      {place}  (resume: {self.resume}, key {self.key})",
            *(f"changed  * {self._changed(name)}" for name in self._usual),
        ]
        width = max(map(len, lines))
        return "\n".join(["=" * width, *lines, "=" * width])

    def _changed(self, name: str) -> str:
        was, now = (
            setting_text(name, value) for value in (self._usual[name], self._settings[name])
        )
        return f"{name} = {now}  (in this profile: {was})"

    def settings_text(self) -> str:
        """All settings in a few lines, eps as k/255; the changed ones carry a star."""
        words = [
            f"{'*' if name in self._usual else ''}{name}={setting_text(name, value)}".replace(
                " ", "\0"
            )
            for name, value in self._settings.items()
        ]
        # A value is not broken over two lines, unless it is longer than one.
        folded = textwrap.fill(
            "  ".join(words), WIDTH, break_long_words=False, break_on_hyphens=False
        )
        return "settings (change them with CHANGES above)\n" + folded.replace("\0", " ")


# ------------------------------------------------------------------------------------------- start


def start(
    notebook: str,
    full: Mapping[str, Any],
    *,
    cpu: Mapping[str, Any] | None = None,
    smoke: Mapping[str, Any] | None = None,
    by_data: Mapping[str, Mapping[str, Any]] | None = None,
    changes: Mapping[str, Any] | None = None,
    allowed: Mapping[str, Sequence] | None = None,
    profile: str = "auto",
    data_dir: str | Path = "",
    run_name: str = "",
    resume: bool | str = True,
    own_classes: int | str | None = None,
    own_boxes: bool = False,
    trains: str = "Training",
) -> Run:
    """Check a notebook's settings, find its data, open its run folder; returns the fixed `Run`.

    full: every setting of the study; by_data: what differs with the data set found ("*": every one that is not
    named); cpu, smoke: what is smaller in these profiles, whatever the data; changes: what the reader wants
    otherwise, whatever the profile. A change must name a setting and be of its kind; `allowed` holds the words that a setting may
    be made of, and None where that means "without". `profile` "smoke", "cpu", "full" or "auto" (the environment's DLIA_PROFILE replaces "auto").
    `data_dir` "" means find the data; own_classes 2 or "any": it may be a folder of class folders with that
    many classes; own_boxes: it may hold images and a file of boxes. trains: the section that trains the models. `run_name` "" means profile, kind of data,
    and a hash of what was changed. `resume` True goes on with a run of the same settings, False puts an older
    one aside and takes nothing from other runs, "force" goes on in a folder of other settings: what does not
    fit these is made anew.
    Errors: ValueError for unknown settings, values, profiles and for a run folder of other settings;
    `DataNotFound` and `BadData` for the data. All before any long work.
    """
    asked = os.environ.get("DLIA_PROFILE", "auto") if profile == "auto" else profile
    if asked not in (*PROFILES, "auto"):
        raise ValueError(f"PROFILE={asked!r} is not one of {', '.join(PROFILES)}, auto")
    if resume not in (True, False, "force"):
        raise ValueError(f"RESUME={resume!r} must be True, False or 'force'")
    layers = {"full": {}, "cpu": dict(cpu or {}), "smoke": dict(smoke or {})}
    by_data, changes = dict(by_data or {}), _tuples(dict(changes or {}))
    known = [dict(full), *layers.values(), *by_data.values()]
    for part in known[1:]:
        _need_known(part, full, "the profiles and by_data")
    _check_changes(changes, full, known, allowed or {}, own=own_classes is not None)
    location = _find_data(
        changes.get("dataset", full["dataset"]),
        data_dir,
        dict(full) | changes,
        own_classes,
        own_boxes,
    )
    device, device_note = pick_device()
    chosen, reason = _pick_profile(profile, asked, location, device)
    usual = dict(full) | by_data.get(location.dataset, by_data.get("*", {})) | layers[chosen]
    usual = _tuples(usual | {"dataset": location.dataset})
    changes.pop("dataset", None)
    settings = usual | changes
    kind = "synthetic" if location.synthetic else "real"
    if location.dataset != full["dataset"]:  # runs on several data sets lie side by side
        kind = f"{location.dataset}-{kind}"
    if device == "cpu":
        _, note = threads.choose()
        known = "no GPU" if device_note.startswith("no GPU") else device_note
        device_note = f"{known}, {note}" if note else known
    run = Run(
        notebook=notebook,
        profile=chosen,
        reason=reason,
        location=location,
        device=device,
        device_note=device_note,
        resume=resume,
        settings=settings,
        fresh=resume is False,
        trains=trains,
        usual={name: usual[name] for name in changes if usual[name] != changes[name]},
        run_dir=runs_root() / notebook / (run_name or f"{chosen}-{kind}"),
    )
    if not run_name:
        run = _own_folder(run)
    return _open_folder(run)


# What `for_dataset` starts from: a MobileNetV2 on 128 px, for an afternoon on a laptop.
BASIC = {
    "seed": 0,
    "size": 128,
    "fit": "squash",
    "per_class": None,
    "val_share": 0.15,
    "test_share": 0.15,
}
BASIC |= {
    "unusable_share": 0.01,
    "width": 1.0,
    "stages": 7,
    "pretrained": True,
    "epochs": 10,
    "batch_size": 32,
}
BASIC |= {
    "lr": 1e-3,
    "schedule": "onecycle",
    "patience": None,
    "max_minutes": None,
    "num_workers": 0,
}
BASIC |= {"bootstrap_draws": 2000}


def for_dataset(
    dataset: datasets.Dataset, *, folder: str | Path | None = None, **changes: Any
) -> Run:
    """A run on a data set outside any notebook: `BASIC` with `changes`, in `folder` or below runs/own/.

    Errors: ValueError for a change that names no setting of `BASIC` or is of another kind.
    """
    _check_changes(changes, BASIC, [BASIC], {}, own=True)
    location = sources.Location(dataset.name, dataset.root, dataset.origin, dataset.synthetic)
    device, note = pick_device()
    run = Run(
        notebook="own",
        profile="own",
        location=location,
        settings=BASIC | _tuples(changes),
        device=device,
        device_note=note,
        run_dir=Path(folder) if folder else runs_root() / "own" / dataset.name,
    )
    return _open_folder(run if folder else _own_folder(run))


def reopen(folder: str | Path) -> Run:
    """The run that `start` once opened in `folder`, as its config.json tells it: for work outside a notebook.

    Errors: ValueError for a folder without config.json; `DataNotFound` where its data has gone.
    """
    folder = Path(folder)
    if not (kept := _recorded(folder)):
        raise ValueError(
            f"{folder} is no run folder: it holds no config.json. Start the notebook once first"
        )
    place = _tuples(kept["location"]) | {"root": Path(kept["location"]["root"])}
    location = sources.Location(**place)
    if not location.root.is_dir():
        raise DataNotFound(f"the data of {folder} lay in {location.root}, which is not there")
    device, note = pick_device()
    return Run(
        notebook=kept["notebook"],
        profile=kept["profile"],
        location=location,
        run_dir=folder,
        fresh=kept["fresh"],
        settings=_tuples(kept["settings"]),
        device=device,
        device_note=note,
        reason=kept["reason"],
    )


def _need_known(given: Mapping[str, Any], full: Mapping[str, Any], where: str) -> None:
    for name in given:
        if name not in full:
            raise ValueError(f"{where}: no such setting {name!r}{nearest(name, full)}")


def _check_changes(
    changes: Mapping[str, Any],
    full: Mapping[str, Any],
    known: Sequence[Mapping[str, Any]],
    allowed: Mapping[str, Sequence],
    *,
    own: bool,
) -> None:
    """Refuse a change of an unknown name, of another kind than the setting, or of an unknown word."""
    _need_known(changes, full, "CHANGES")
    for name, value in changes.items():
        kinds = {_kind(part[name]) for part in known if name in part}
        if kinds == {"None"}:  # what else it may be stands nowhere: a limit, or a list of names
            kinds |= {"number", "list"}
        kinds |= {"whole number"} if "number" in kinds else set()
        if value is None and None in allowed.get(name, ()):
            continue
        if _kind(value) not in kinds:
            raise ValueError(
                f"CHANGES: {name} = {value!r} is a {_kind(value)}; it must be a {' or '.join(sorted(kinds))}, "
                f"such as {full[name]!r}"
            )
        leaves = {_kind(leaf) for part in known for leaf in _leaves(part.get(name, ()))}
        leaves |= {"whole number"} if "number" in leaves else set()
        if _kind(value) in ("list", "dictionary") and leaves - {"None"}:
            if odd := [leaf for leaf in _leaves(value) if _kind(leaf) not in leaves]:
                raise ValueError(
                    f"CHANGES: {name} holds {odd[0]!r}; it is made as {full[name]!r} is"
                )
        if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value)):
            raise ValueError(f"CHANGES: {name} = {value!r} is not a finite number")
        if any(_kind(leaf) in ("number", "whole number") and leaf < 0 for leaf in _leaves(value)):
            raise ValueError(f"CHANGES: {name} = {value!r} is negative")
        for word in value if isinstance(value, tuple) and name in allowed else ():
            if word not in allowed[name]:
                raise ValueError(f"CHANGES: {name} names {word!r}{nearest(word, allowed[name])}")
    wanted, usual = changes.get("dataset"), full.get("dataset")
    if (
        wanted
        and not own
        and wanted != usual
        and wanted not in (usual if isinstance(usual, tuple) else ())
    ):
        names = usual if isinstance(usual, str) else " or ".join(usual)
        raise ValueError(
            f"CHANGES: dataset = {wanted!r}, but this notebook has a data set of its own: {names}"
        )


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, bool):
        return "truth value (True or False)"
    for kind, types in (
        ("whole number", int),
        ("number", float),
        ("text", str),
        ("list", (tuple, list)),
    ):
        if isinstance(value, types):
            return kind
    return "dictionary" if isinstance(value, Mapping) else type(value).__name__


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        [leaf for part in value for leaf in _leaves(part)]
        if isinstance(value, (tuple, list))
        else [value]
    )


def _tuples(value: Any) -> Any:
    """Lists as tuples, to any depth: a parameter that came through JSON is the same setting."""
    if isinstance(value, Mapping):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """What to say after an unknown name: the known one that it is most like, or all of them.

    >>> nearest("epoch", ["epochs", "lr"]), nearest("x", ["epochs", "lr"])
    ('; did you mean epochs?', '; there are: epochs, lr')
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"


def parse_change(text: str) -> tuple[str, Any]:
    """A setting as the command line writes it, name=value; the value is a literal, a quotient, or a bare word.

    Errors: ValueError without a name, "=" or value.

    >>> parse_change("lr=3e-4"), parse_change("backbone=resnet18"), parse_change("trials=2")
    (('lr', 0.0003), ('backbone', 'resnet18'), ('trials', 2))
    >>> parse_change("eps_grid=(1/255, 4/255)")[1][1] == 4 / 255
    True
    """
    name, sign, value = (part.strip() for part in text.partition("="))
    if not (name.isidentifier() and sign and value):
        raise ValueError(f"--set {text!r}: write name=value, such as --set epochs=5")
    try:
        return name, _literal(ast.parse(value, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(
            f"--set {text!r}: {value!r} is no Python value; text needs quotes"
        ) from error


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(map(_literal, node.elts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _literal(node.left) / _literal(node.right)
    try:
        return ast.literal_eval(node)
    except ValueError:  # neither a literal nor a quotient, such as a name with hyphens
        raise SyntaxError(ast.unparse(node)) from None


def setting_text(name: str, value: Any) -> str:
    """A setting as people write it: eps and its steps as k/255, lists in brackets.

    >>> setting_text("eps_grid", (1 / 255, 4 / 255)), setting_text("search_batch", ((4,), (8, 16)))
    ('(1/255, 4/255)', '((4), (8, 16))')
    """
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{key}: {setting_text(name, part)}" for key, part in value.items())
            + "}"
        )
    if isinstance(value, (tuple, list)):
        return f"({', '.join(setting_text(name, part) for part in value)})"
    pixels = (
        "eps" in name or "step_size" in name or name == "expensive"
    ) and "published" not in name
    if value == "":
        return repr(value)
    return pixel_text(value) if pixels and isinstance(value, float) else str(value)


def digest(content: Any) -> str:
    """A short hash of anything JSON can hold.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[
        :12
    ]


# ------------------------------------------------------------------------------------------- data and profile


def _find_data(
    names: str | Sequence[str],
    data_dir: str | Path,
    settings: Mapping[str, Any],
    own_classes: int | str | None,
    own_boxes: bool,
) -> sources.Location:
    """The notebook's data set, the first of several that is there and whole, or the reader's own folder."""
    told = data_dir or os.environ.get("DLIA_DATA", "")
    try:
        return sources.find(names, data_dir or None)
    except DataNotFound as missing:
        if not told or not (own_classes or own_boxes):
            raise
        folder, kind = Path(told).expanduser(), "boxes" if own_boxes else "folder"
        options = {
            name: settings[name] for name in ("classes", "patient_pattern") if settings.get(name)
        }
        found = sources.find_own(folder, kind=kind, options=options)
        if found is None:
            others = sources.published_in(folder) if own_classes and folder.is_dir() else []
            if others:
                raise DataNotFound(
                    f"{told} does not hold {names}, but it holds {', '.join(others)}: CHANGES = {{'dataset': "
                    f"{others[0]!r}}} in the notebook, or --set dataset={others[0]}, takes that"
                ) from missing
            raise
    own = datasets.load(found)  # only the names of the files: what is wrong with them is said here
    if isinstance(own_classes, int) and len(own.classes) != own_classes:
        raise BadData(
            f"{told} has {len(own.classes)} classes ({', '.join(own.classes)}); this notebook compares "
            f"{own_classes}. Fix: a folder with {own_classes} class folders, or notebook 04 or 06"
        )
    return found


def _pick_profile(
    given: str, asked: str, location: sources.Location, device: str
) -> tuple[str, str]:
    if given in PROFILES:
        return given, "asked for"
    if asked in PROFILES:
        return asked, f"auto, and the environment says DLIA_PROFILE={asked}"
    if device == "cuda" and not location.synthetic:
        return "full", "auto: a GPU and real data are there"
    there = (("GPU", device == "cuda"), ("real data", not location.synthetic))
    missing = " and no ".join(what for what, found in there if not found)
    return "smoke", f"auto: no {missing}; PROFILE = 'cpu' runs the study at laptop size"


# ------------------------------------------------------------------------------------------- the run folder


def runs_root() -> Path:
    """Where runs are written: DLIA_RUNS, else the working folder on Kaggle, else `runs/` of the repository."""
    if os.environ.get("DLIA_RUNS"):
        return Path(os.environ["DLIA_RUNS"])
    if sources.on_kaggle():
        return sources.kaggle_root() / "working" / "runs"
    repository = Path(__file__).resolve().parents[1]
    return (repository if (repository / "notebooks").is_dir() else Path.cwd()) / "runs"


def submissions_root() -> Path:
    """Where submissions go: `submissions/` beside the runs, or the working folder on Kaggle, which offers them."""
    return runs_root().parent if sources.on_kaggle() else runs_root().parent / "submissions"


def _own_folder(run: Run) -> Run:
    """A folder of its own for a run whose usual one is not its own: settings were changed, here or in the cell."""
    name = f"{run.run_dir.name}-{run.key[:6]}"
    taken = _recorded(run.run_dir).get("key", run.key) != run.key and run.resume is True
    if not run.changed and not taken:
        return run
    if taken and not run.changed:
        log.warning("%s holds a run of other settings; this one goes to %s", run.run_dir.name, name)
    vars(run).update(run_dir=run.run_dir.with_name(name))
    return run


def _recorded(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / "config.json") or {}


def _open_folder(run: Run) -> Run:
    """Create the run folder, or take up an earlier session's; refuse to mix two configurations in one."""
    if run.resume and not _recorded(run.run_dir):
        _import_run(run)
    before = _recorded(run.run_dir)
    if before and run.resume is False:
        old = f"{run.run_dir.name}.{time.strftime('%Y%m%d-%H%M%S')}.old"
        run.run_dir.rename(run.run_dir.with_name(old))
    elif before and run.resume is True and before["key"] != run.key:
        changes = _differences(before.get("settings", {}), run.settings)
        raise ValueError(
            f"run folder {run.run_dir} holds a run with other settings{changes}: choose another RUN_NAME, "
            "RESUME = False to put the old run aside, or RESUME = 'force' to go on in it"
        )
    # A run that was begun afresh takes nothing from other runs when it is gone on with, either.
    vars(run).update(fresh=run.resume is False or bool(before.get("fresh")))
    keep = {
        "notebook": run.notebook,
        "profile": run.profile,
        "reason": run.reason,
        "key": run.key,
        "data": run.data_name,
        "location": dataclasses.asdict(run.location),
        "device": run.device,
        "fresh": run.fresh,
        "changed": run.changed,
        "settings": run.settings,
    }
    files.write_json(keep, run.run_dir / "config.json")
    files.write_json(environment(), run.run_dir / "env.json")
    return run


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    now = json.loads(json.dumps(now, default=str))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)][:5]
    return (
        f" ({', '.join(f'{n}: {before.get(n)!r} -> {now.get(n)!r}' for n in names)})"
        if names
        else ""
    )


def _import_run(run: Run) -> None:
    """Copy the run of an earlier Kaggle session, attached as an input, if it has this run's settings.

    Attach the earlier version's output (*Add Input*, *Your Work*) and press Run All: what was finished is read
    back, and a training that was cut off goes on after its last whole epoch. Of several the one with the newest
    checkpoint.
    """
    place = Path(run.notebook) / run.run_dir.name
    found = []
    for mount in sources.mounts():
        for folder in (mount / "runs" / place, mount / place):
            if not (record := _recorded(folder)):
                continue
            if record.get("key") == run.key:
                found.append(folder)
            else:
                log.warning(
                    "the run in input %s has other settings: it is not continued", mount.name
                )
    if not found:
        return

    def newest(folder: Path) -> float:
        return max((path.stat().st_mtime for path in folder.rglob("last.pt")), default=0.0)

    chosen = max(found, key=newest)
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.run_dir.parent, prefix=".import-") as scratch:
        os.replace(files.copy_tree(chosen, Path(scratch) / "run"), run.run_dir)
    source = chosen.relative_to(sources.kaggle_root())
    log.warning("continues the run of an earlier session, found in input %s", source)


def environment() -> dict[str, Any]:
    """Versions of what the numbers depend on, for `env.json`."""
    names = (
        "torch",
        "torchvision",
        "albumentations",
        "accelerate",
        "numpy",
        "pandas",
        "scikit-learn",
    )
    versions = {name: metadata.version(name) for name in names}
    kaggle = map(Path, ("/etc/git_commit", "/etc/build_date"))
    image = {file.name: file.read_text().strip() for file in kaggle if file.exists()}
    return {
        "python": sys.version.split()[0],
        "hardware": hardware(),
        "kaggle_image": image,
        **versions,
    }
