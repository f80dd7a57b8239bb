"""A run: a notebook with its data, profile, device, settings and folder, fixed by `start`."""

from __future__ import annotations

import ast
import copy
import difflib
import hashlib
import json
import logging
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from . import files
from .data import datasets, sources
from .data.tables import BadData, DataNotFound
from .device import choose_threads, hardware, pick_device
from .units import eps_text

log = logging.getLogger("dlia_utils")

FORMAT = 2  # of what a run folder holds; a folder of another format is refused, not misread
PROFILES = ("smoke", "cpu", "full")
# What the library reads where a notebook does not have the setting; the studies say otherwise.
OPTIONAL = dict(fit="squash", balance="weights", schedule="constant", per_class=None)
OPTIONAL |= dict(test_share=None, unusable_share=0.0, classes=None, patient_pattern="")
OPTIONAL |= dict(full_at=None, most={}, hours=None)  # of the suite of attacks; of a session
# What `for_dataset` starts from: a MobileNetV2 on 128 px, for an afternoon on a laptop.
BASIC = dict(seed=0, size=128, fit="squash", per_class=None, val_share=0.15, test_share=0.15)
BASIC |= dict(unusable_share=0.01, balance="weights", width=1.0, stages=7, pretrained=True)
BASIC |= dict(epochs=10, batch_size=32, lr=1e-3, schedule="onecycle", patience=None)
BASIC |= dict(max_minutes=None, num_workers=0, bootstrap_draws=2000, hours=None)

ANEW = "choose another RUN_NAME, or RESUME = False (--fresh) to put the folder aside"
REMEDY = "for the full study choose Accelerator: 'GPU T4 x2' in the session options, then Run All"
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
KINDS |= {tuple: "a list", dict: "a dictionary", type(None): "None"}


@dataclass(eq=False, repr=False)
class Run:
    """Everything a notebook run is decided by; settings read as attributes, e.g. `run.size`.

    What is read is a copy, and nothing can be set: config.json stays true. `own` holds models of
    the reader's own by name: a trained module, or a function that builds one to be trained here.
    """

    notebook: str
    profile: str
    location: sources.Location
    run_dir: Path
    values: dict[str, Any]  # the settings
    changed: dict[str, Any] = field(default_factory=dict)  # by CHANGES: what the values were
    device: str = "cpu"
    device_note: str = ""
    reason: str = "asked for"  # of the profile
    resume: bool | str = True
    trains: str = "Training"  # the section that trains the models
    fresh: bool = False  # takes nothing from other runs
    own: dict[str, nn.Module | Callable[[], nn.Module]] = field(default_factory=dict)
    begun: float = field(default_factory=psutil.Process().create_time)  # the session
    opened: dict[str, Any] = field(default_factory=dict)  # by key: see `study.open_study`

    def __getattr__(self, name: str) -> Any:
        # Reached for what is no attribute; while unpickling there are none yet, hence __dict__.
        settings = OPTIONAL | self.__dict__.get("values", {})
        if name not in settings:
            raise AttributeError(f"no setting {name!r}{nearest(name, settings)}")
        return copy.deepcopy(settings[name])

    def __setattr__(self, name: str, value: Any) -> None:
        if "opened" in vars(self):  # the last field of all
            how = f"write CHANGES = {{{name!r}: ...}} and run from the top"
            raise AttributeError(f"settings are fixed once a run has started: {how}")
        vars(self)[name] = value

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"opened": {}}  # another process opens the data itself

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.values]

    def __str__(self) -> str:
        data = f"real images of {self.location.dataset!r}"
        if self.synthetic:
            data = "SYNTHETIC phantom images: the numbers below mean nothing medically"
        # A GPU that is missing or cannot be used is what a reader must learn first.
        lines = [f"device   {self.device}  ({self.device_note})"]
        if self.device == "cpu":
            lines = [f"device   CPU ONLY: {self.device_note}"]
            lines += [f"         {REMEDY}"] if sources.on_kaggle() else []
        place = f"{self.run_dir.parent.name}/{self.run_dir.name}"
        lines += [f"profile  {self.profile.upper()}  ({self.reason})"]
        lines += [f"data     {data}  [found by: {self.location.origin}]"]
        lines += [f"run      {place}  (resume: {self.resume}, key {self.key})"]
        texts = {name: setting_text(name, value) for name, value in self.values.items()}
        for name, value in self.changed.items():
            usual = setting_text(name, value)
            lines += [f"changed  * {name} = {texts[name]}  (in this profile: {usual})"]
        rule = "=" * max(map(len, lines))
        words = (f"{'*' * (name in self.changed)}{name}={text}" for name, text in texts.items())
        # With \0 for its spaces a value is not broken over two lines.
        unbroken = "  ".join(word.replace(" ", "\0") for word in words)
        folded = textwrap.fill(unbroken, 96, break_long_words=False, break_on_hyphens=False)
        told = ["settings (change them with CHANGES above)", folded.replace("\0", " ")]
        return "\n".join([rule, *lines, rule, *told])

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of all settings."""
        return copy.deepcopy(self.values)

    @property
    def synthetic(self) -> bool:
        return self.location.synthetic

    @property
    def data_name(self) -> str:
        """The word every result row carries, so synthetic numbers cannot pass for real ones."""
        return self.location.dataset + " (SYNTHETIC)" * self.synthetic

    @property
    def caption(self) -> str:
        """What a figure says of where its numbers come from: data, profile and image size."""
        return f"{self.data_name}, {self.profile} profile, {self.size} px"

    @property
    def key(self) -> str:
        """Hash of notebook, profile, settings and data: runs of one key may share a folder."""
        values = {name: value for name, value in self.values.items() if name != "hours"}
        return digest([self.notebook, self.profile, self.data_name, values])

    @property
    def budget(self) -> float | None:
        """Hours of a session, from its kernel's start: as set, else 11 on Kaggle, else no limit."""
        return self.hours or (11.0 if sources.on_kaggle() else None)

    def pick(self, *names: str) -> dict[str, Any]:
        """Some settings by name: what a training or a table depends on."""
        return {name: getattr(self, name) for name in names}

    def variant(self, **settings: Any) -> Run:
        """The same run under other settings, e.g. for a second image size."""
        _need_known(settings, self.values, "variant")
        return replace(self, values=self.values | settings)


def start(
    notebook: str,
    settings: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any] | None = None,
    *,
    by_data: Mapping[str, Mapping[str, Any]] | None = None,
    allowed: Mapping[str, Sequence] | None = None,
    own_data: int | str = "",
    trains: str = "Training",
) -> Run:
    """Check a notebook's settings, find its data, open its run folder; returns the fixed `Run`.

    settings: "full" is the whole study, "cpu" and "smoke" what is smaller there; by_data: what
    differs with the data set found ("*": any other). allowed: the words that a setting may be made
    of, and None where that means "without". own_data: which data of the reader's own will do, 2
    or "any" class folders, or "boxes". trains: the section that trains the models.
    parameters, the reader's: profile ("auto": DLIA_PROFILE, else by GPU and data), data_dir,
    run_name, resume (False: put an older run aside, take nothing from others; "force": go on under
    other settings), changes. Errors: ValueError, `DataNotFound`, `BadData`.
    """
    given, full, by_data = _parameters(parameters or {}), dict(settings["full"]), by_data or {}
    names = [full["dataset"]] if isinstance(full["dataset"], str) else full["dataset"]
    allowed = {"dataset": names if own_data in ("", "boxes") else ()} | dict(allowed or {})
    changes = _checked(given["changes"], [full, *settings.values(), *by_data.values()], allowed)
    location = _find_data(full | changes, given["data_dir"], own_data)
    changes.pop("dataset", None)
    device, note = pick_device()
    if device == "cpu":
        note = ", ".join(filter(None, (note, choose_threads()[1])))
    profile, reason = _pick_profile(given["profile"], location, device)
    usual = full | by_data.get(location.dataset, by_data.get("*", {}))
    usual |= {} if profile == "full" else settings.get(profile, {})
    usual = _tuples(usual) | {"dataset": location.dataset}
    kind = "synthetic" if location.synthetic else "real"
    if location.dataset != full["dataset"]:  # runs on several data sets lie side by side
        kind = f"{location.dataset}-{kind}"
    folder = runs_root() / notebook / (given["run_name"] or f"{profile}-{kind}")
    replaced = {name: usual[name] for name in changes if usual[name] != changes[name]}
    told = dict(device=device, device_note=note, reason=reason, trains=trains)
    run = Run(notebook, profile, location, folder, usual | changes, replaced, **told)
    run = _placed(replace(run, resume=given["resume"]), named=bool(given["run_name"]))
    return open_folder(run)


def for_dataset(
    dataset: datasets.Dataset, *, folder: str | Path | None = None, **changes: Any
) -> Run:
    """A run on a data set outside any notebook: `BASIC` with `changes`."""
    settings = BASIC | _checked(changes, [BASIC], {})
    location = sources.Location(dataset.name, dataset.root, dataset.origin, dataset.synthetic)
    place = Path(folder) if folder else runs_root() / "own" / dataset.name
    run = Run("own", "own", location, place, settings, {}, *pick_device())
    return open_folder(_placed(run, named=bool(folder)))


def reopen(folder: str | Path) -> Run:
    """The run that `start` opened in `folder`, from its config.json: for work outside a notebook.

    Errors: ValueError for a folder without one; `DataNotFound` where its data has gone.
    """
    kept = _recorded(Path(folder))
    if not kept:
        raise ValueError(f"{folder} is no run folder: it holds no config.json (start the notebook)")
    with files.reading(Path(folder) / "config.json", ANEW):
        location = sources.Location(**_tuples(kept["location"]))
        location = replace(location, root=Path(location.root))
        told = {name: kept[name] for name in "notebook profile reason fresh trains".split()}
        told["values"] = _tuples(kept["settings"])
    if not location.root.is_dir():
        raise DataNotFound(f"the data of {folder} lay in {location.root}, which is not there")
    told |= dict(zip(("device", "device_note"), pick_device(), strict=True))
    return Run(location=location, run_dir=Path(folder), **told)


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What the reader chose, checked."""
    given = dict(profile="auto", data_dir="", run_name="", resume=True, changes={})
    _need_known(parameters, given, "parameters")
    given |= parameters
    if given["run_name"]:
        files.one_part(given["run_name"], "RUN_NAME")
    for word in (given["profile"], os.environ.get("DLIA_PROFILE", "auto")):
        if word not in (*PROFILES, "auto"):
            raise ValueError(f"PROFILE={word!r} is not one of {', '.join(PROFILES)}, auto")
    if given["resume"] not in (True, False, "force"):
        raise ValueError(f"RESUME={given['resume']!r} must be True, False or 'force'")
    return given


def _pick_profile(asked: str, location: sources.Location, device: str) -> tuple[str, str]:
    """The profile and the reason for it."""
    if asked != "auto":
        return asked, "asked for"
    if (told := os.environ.get("DLIA_PROFILE", "auto")) != "auto":
        return told, f"auto, and the environment says DLIA_PROFILE={told}"
    there = {"GPU": device == "cuda", "real data": not location.synthetic}
    if all(there.values()):
        return "full", "auto: a GPU and real data are there"
    missing = " and no ".join(what for what, found in there.items() if not found)
    return "smoke", f"auto: no {missing}; PROFILE = 'cpu' runs the study at laptop size"


def _need_known(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: no such setting {name!r}{nearest(name, known)}")


def _checked(
    changes: Mapping[str, Any], layers: Sequence[Mapping], allowed: Mapping[str, Sequence]
) -> dict[str, Any]:
    """The changes, each made of what its setting is made of in `layers`, the study's first."""
    for layer in layers:
        _need_known(layer, layers[0], "the profiles and by_data")
    _need_known(changes, layers[0], "CHANGES")
    changes = _tuples(changes)
    for name, value in changes.items():
        words = allowed.get(name, ())
        usual = [_tuples(layer[name]) for layer in layers if name in layer]
        if fault := _fault(value, [*usual, None] if None in words else usual):
            raise ValueError(f"CHANGES: {name} = {value!r} {fault}, such as {layers[0][name]!r}")
        for word in value if isinstance(value, tuple) else (value,):
            if isinstance(word, str) and words and word not in words:
                raise ValueError(f"CHANGES: {name} names {word!r}{nearest(word, words)}")
    return changes


def _fault(value: Any, usual: Sequence[Any]) -> str:
    """What is wrong with a value that should be of the kind of those in `usual`, or ""."""
    kinds, inside = set(map(type, usual)), set()
    for one in usual:
        inside |= set(map(type, one)) if isinstance(one, tuple) else set()
    kinds |= {int, float, tuple} if kinds == {type(None)} else {int} if float in kinds else set()
    inside |= {int} if float in inside else set()
    parts = set(map(type, value)) if isinstance(value, tuple) else set()
    if type(value) not in kinds:
        found = f"is {KINDS.get(type(value), 'strange')}"
    elif isinstance(value, (int, float)) and not 0 <= value < math.inf:
        found = "is negative" if value < 0 else "is not a finite number"
    elif inside and parts - inside:
        found = f"holds {KINDS.get((parts - inside).pop(), 'something strange')}"
    else:
        return ""
    return f"{found}; it must be {' or '.join(sorted(KINDS[kind] for kind in kinds))}"


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
    names = [str(one) for one in known]
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"


def parse_change(text: str) -> tuple[str, Any]:
    """A setting as the command line writes it, name=value: a literal, a quotient, or a bare word.

    >>> parse_change("lr=3e-4"), parse_change("backbone=resnet18")
    (('lr', 0.0003), ('backbone', 'resnet18'))
    >>> parse_change("eps_grid=(1/255, 4/255)")[1][1] == 4 / 255
    True
    """
    name, sign, value = (part.strip() for part in text.partition("="))
    if not (name.isidentifier() and sign and value):
        raise ValueError(f"--set {text!r}: write name=value, such as --set epochs=5")
    try:
        return name, _literal(ast.parse(value, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        how = "is no Python value; text needs quotes"
        raise ValueError(f"--set {text!r}: {value!r} {how}") from error


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(map(_literal, node.elts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _literal(node.left) / _literal(node.right)
    return ast.literal_eval(node)


def setting_text(name: str, value: Any) -> str:
    """A setting as people write it: eps and its steps as k/255, lists in brackets.

    >>> setting_text("eps_grid", (1 / 255, 4 / 255)), setting_text("search_batch", ((4,), (8, 16)))
    ('(1/255, 4/255)', '((4), (8, 16))')
    """
    if isinstance(value, Mapping):
        parts = (f"{key}: {setting_text(name, part)}" for key, part in value.items())
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(setting_text(name, part) for part in value)})"
    pixels = "eps" in name or "step_size" in name or name in ("expensive", "full_at")
    if isinstance(value, float) and pixels and "published" not in name:
        return eps_text(value)
    return str(value) or "''"


def digest(content: Any) -> str:
    """A short hash of anything JSON can hold."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(kept: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """Which entries of two nested dictionaries differ, the first five by their dotted names."""
    found = []
    for name in {**kept, **wanted}:
        old, new = kept.get(name), wanted.get(name)
        if old != new and isinstance(old, Mapping) and isinstance(new, Mapping):
            found.append(differences(old, new, f"{prefix}{name}."))
        elif old != new:
            found.append(f"{prefix}{name}: {str(old)[:40]} -> {str(new)[:40]}")
    return "; ".join(found[:5])


def _find_data(
    settings: Mapping[str, Any], data_dir: str | Path, own_data: int | str
) -> sources.Location:
    """The notebook's data set, the first of several that is there, or the reader's own folder."""
    names, told = settings["dataset"], data_dir or os.environ.get("DLIA_DATA", "")
    try:
        return sources.find(names, data_dir or None)
    except DataNotFound as missing:
        if not (told and own_data):
            raise
        folder, kind = Path(told).expanduser(), "boxes" if own_data == "boxes" else "folder"
        options = {name: settings.get(name) for name in ("classes", "patient_pattern")}
        options = {name: value for name, value in options.items() if value}
        found = sources.find_own(folder, kind=kind, options=options)
        others = sources.published_in(folder) if kind == "folder" and folder.is_dir() else ()
        if found is None and others:
            how = f"CHANGES = {{'dataset': {others[0]!r}}} or --set dataset={others[0]} takes that"
            text = f"{told} does not hold {names}, but it holds {', '.join(others)}"
            raise DataNotFound(f"{text}: {how}") from missing
        if found is None:
            raise
    classes = datasets.load(found).classes  # only names are read: their faults are said here
    if isinstance(own_data, int) and len(classes) != own_data:
        raise BadData(
            f"{told} has {len(classes)} classes ({', '.join(classes)}); this notebook compares "
            f"{own_data}. Fix: a folder with {own_data} class folders, or notebook 04 or 06"
        )
    return found


def runs_root() -> Path:
    """Where runs go: DLIA_RUNS, else Kaggle's working folder, else `runs/` of the repository."""
    if os.environ.get("DLIA_RUNS"):
        return Path(os.environ["DLIA_RUNS"])
    if sources.on_kaggle():
        return sources.KAGGLE / "working" / "runs"
    repository = Path(__file__).resolve().parents[1]
    return (repository if (repository / "notebooks").is_dir() else Path.cwd()) / "runs"


def submissions_root() -> Path:
    """`submissions/` beside the runs, or Kaggle's working folder, whose files it offers."""
    return runs_root().parent / ("" if sources.on_kaggle() else "submissions")


def _recorded(folder: Path, *, any_format: bool = False) -> dict[str, Any]:
    kept = files.read_json(folder / "config.json", ANEW) or {}
    if kept and (found := kept.get("format")) != FORMAT and not any_format:
        raise ValueError(
            f"run folder {folder} was written by another version of dlia_utils (format {found}, "
            f"not {FORMAT}): {ANEW}"
        )
    if kept and not (any_format or isinstance(kept.get("settings"), dict)):
        raise files.Damaged(f"{folder / 'config.json'} is damaged (no settings): {ANEW}")
    return kept


def _placed(run: Run, *, named: bool) -> Run:
    """The run with its folder, of the same settings or new; where the reader gave no name, changed
    settings get a folder of their own."""
    changed = set(run.changed) - {"hours"}  # which changes no result
    taken = not (named or changed) and run.resume is True
    taken = taken and _recorded(run.run_dir).get("key", run.key) != run.key
    if taken or (changed and not named):
        folder = run.run_dir.with_name(f"{run.run_dir.name}-{run.key[:6]}")
        if not changed:
            log.warning("%s holds a run of other settings; this is %s", run.run_dir, folder.name)
        run = replace(run, run_dir=folder)
    if run.resume is False:
        return run  # whatever lies there is put aside
    before = _recorded(run.run_dir)
    if before and run.resume is True and before.get("key") != run.key:
        now = json.loads(json.dumps(run.settings, default=str))
        raise ValueError(
            f"run folder {run.run_dir} holds a run with other settings "
            f"({differences(before['settings'], now)}): {ANEW}, "
            "or RESUME = 'force' to go on in it"
        )
    return run


def open_folder(run: Run) -> Run:
    """Create the run's folder, or go on in it; it may be an earlier session's."""
    begun = (run.run_dir / "config.json").exists()
    if run.resume and not begun:
        _import_run(run)
    if begun and run.resume is False:
        files.put_aside(run.run_dir)
    before = _recorded(run.run_dir)
    # A run that was begun afresh takes nothing from other runs when it is gone on with, either.
    run = replace(run, fresh=run.resume is False or bool(before.get("fresh")))
    names = "notebook profile reason key device fresh trains settings".split()
    keep = {name: getattr(run, name) for name in names} | {"format": FORMAT, "data": run.data_name}
    keep |= {"changed": list(run.changed), "location": asdict(run.location)}
    files.write_json(keep, run.run_dir / "config.json")
    files.write_json(environment(), run.run_dir / "env.json")
    return run


def _import_run(run: Run) -> None:
    """Copy the run of these settings from an earlier Kaggle session that is attached as an input.

    A training that was cut off then goes on; of several the one with the newest checkpoint counts.
    """
    found, place = {}, Path(run.notebook) / run.run_dir.name
    for mount in sources.mounts():
        for folder in (mount / "runs" / place, mount / place):
            try:
                kept = _recorded(folder, any_format=True)
            except (ValueError, OSError) as error:
                log.warning("input %s is passed over: %s", mount.name, files.error_text(error))
                continue
            if (kept.get("key"), kept.get("format")) == (run.key, FORMAT):
                times = (path.stat().st_mtime for path in folder.rglob("last.pt"))
                found[folder] = max(times, default=0.0)
            elif kept:
                text = "the run in input %s has other settings: it is not continued"
                log.warning(text, mount.name)
    if found:
        chosen = max(found, key=found.get)
        if run.run_dir.is_dir() and any(run.run_dir.iterdir()):
            files.put_aside(run.run_dir)  # a start that was killed before its config.json
        files.copy_tree(chosen, run.run_dir)
        source = chosen.relative_to(sources.KAGGLE)
        log.warning("continues the run of an earlier session, found in input %s", source)


def environment() -> dict[str, Any]:
    """Versions of what the numbers depend on, for `env.json`."""
    names = "torch torchvision albumentations accelerate numpy pandas scikit-learn".split()
    told = {"python": sys.version.split()[0], "hardware": hardware()}
    kaggle = map(Path, ("/etc/git_commit", "/etc/build_date"))
    told["kaggle_image"] = {path.name: path.read_text().strip() for path in kaggle if path.exists()}
    return told | {name: metadata.version(name) for name in names}
