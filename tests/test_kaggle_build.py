"""What goes to Kaggle: the folders, the wheel, and what Kaggle's own client sends of them (nothing leaves here)."""

import base64
import csv
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nbformat
import pytest
import requests

from dlia_utils import __main__ as cli
from dlia_utils import __version__
from dlia_utils.data import sources
from tools import kaggle, notebooks

SOURCE = """\
# %% [markdown]
# # A tiny notebook

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"
DATA_DIR = ""
RUN_NAME = ""
RESUME = True
CHANGES = {}

# %% tags=["settings"]
FULL = {"dataset": DATA}


# %% tags=["start"]
def start(full):
    return f"profile {PROFILE}"


run = start(FULL)
print(run)

# %% tags=["imports"]
import sys
"""
TITLES = {"01_first": "DLIA 01 first", "02_second_one": "DLIA 02 second one"}


def add_notebook(folder, stem, names="pneumonia"):
    """A notebook as it is committed: built, executed (in appearance) and without fault."""
    source = folder / "src" / f"{stem}.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(SOURCE.replace("DATA}", f"{names!r}}}"))
    notebook = notebooks.build(source)
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        cell.metadata["source_hash"] = notebooks.source_hash(cell.source)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="an old output\n")]
    notebooks.write(notebook, notebooks.product(source))
    return source


@pytest.fixture
def suite(tmp_path):
    """A suite of two tiny notebooks, the second of which can use several data sets."""
    for stem, names in {
        "01_first": "pneumonia",
        "02_second_one": ("dlia", "nih", "fracatlas"),
    }.items():
        add_notebook(tmp_path / "notebooks", stem, names)
    return tmp_path / "notebooks"


def write_captum(folder, version="0.9.0", license_name="licenses/LICENSE"):
    """A file that passes for captum's wheel."""
    path = Path(folder) / f"captum-{version}-py3-none-any.whl"
    info = f"captum-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("captum/__init__.py", "LOCAL = True")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: captum\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(f"{info}/{license_name}", "captum's licence")
    return path


@pytest.fixture
def captum(tmp_path):
    return write_captum(tmp_path)


@pytest.fixture
def built(suite, captum, tmp_path):
    return kaggle.build("some-user", out=tmp_path / "out", folder=suite, captum=captum)


def content(folder):
    """Every file below `folder`, hidden ones too, with its bytes."""
    return {
        one.relative_to(folder).as_posix(): one.read_bytes()
        for one in folder.rglob("*")
        if one.is_file()
    }


# ------------------------------------------------------------------------------------------------ the folders


def test_build_writes_a_folder_for_each_notebook_and_one_data_set(built, tmp_path):
    assert sorted(content(built.folder)) == [
        "dataset/LICENSE-captum.txt",
        "dataset/LICENSE-dlia_utils.txt",
        "dataset/captum-0.9.0-py3-none-any.whl",
        "dataset/dataset-metadata.json",
        f"dataset/dlia_utils-{__version__}-py3-none-any.whl",
        "kernels/dlia-01-first/01_first.ipynb",
        "kernels/dlia-01-first/kernel-metadata.json",
        "kernels/dlia-02-second-one/02_second_one.ipynb",
        "kernels/dlia-02-second-one/kernel-metadata.json",
    ]
    assert built.kernels == ("dlia-01-first", "dlia-02-second-one")
    assert not list(tmp_path.glob(".out-*")), "the scratch folder stays behind"


def test_kernel_metadata_names_machine_internet_and_every_source(built):
    first, second = (
        json.loads((built.folder / "kernels" / slug / "kernel-metadata.json").read_text())
        for slug in built.kernels
    )
    assert first == {
        "id": "some-user/dlia-01-first",
        "title": "DLIA 01 first",
        "code_file": "01_first.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": True,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": ["paultimothymooney/chest-xray-pneumonia", "some-user/dlia-utils"],
        "competition_sources": [],
        "kernel_sources": [],
        "model_sources": [],
    }
    assert second["dataset_sources"] == [
        "nih-chest-xrays/data",
        "vuppalaadithyasriharsha/fracatlas",
        "some-user/dlia-utils",
    ]
    assert built.notes == (
        "02_second_one can use a competition's films too: name it with --competition SLUG if you have joined it",
    )


def test_notebook_to_push_has_no_outputs_and_agrees_with_its_metadata(suite, captum, tmp_path):
    built = kaggle.build(
        "me",
        out=tmp_path / "out",
        folder=suite,
        captum=captum,
        internet=False,
        competitions=["a-competition"],
    )
    for slug, stem, competitions in zip(
        built.kernels, TITLES, ([], ["a-competition"]), strict=True
    ):
        place = built.folder / "kernels" / slug
        metadata = json.loads((place / "kernel-metadata.json").read_text())
        notebook = notebooks.read(place / metadata["code_file"])
        nbformat.validate(notebook)
        assert notebook.metadata == {
            "kaggle": {
                "accelerator": "nvidiaTeslaT4",
                "isGpuEnabled": True,
                "isInternetEnabled": False,
                "language": "python",
                "sourceType": "notebook",
            },
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        assert metadata["enable_internet"] is False
        assert metadata["competition_sources"] == competitions
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)
        committed = notebooks.read(suite / f"{stem}.ipynb")
        assert [(c.id, c.source, c.metadata.get("tags")) for c in notebook.cells] == [
            (c.id, c.source, c.metadata.get("tags")) for c in committed.cells
        ]
        assert "parameters" in code[1].metadata.tags
    assert not built.notes


def test_two_builds_are_byte_identical(built, suite, captum, tmp_path):
    first = content(built.folder)
    other = kaggle.build(
        "some-user", out=tmp_path / "elsewhere" / "deep", folder=suite, captum=captum
    )
    assert content(other.folder) == first
    (suite / "src" / "01_first.py").touch()
    again = kaggle.build("some-user", out=built.folder, folder=suite, captum=captum)
    assert content(again.folder) == first


def test_a_new_build_replaces_the_old_one_whole(built, suite, captum, tmp_path):
    add_notebook(suite, "03_third")
    (suite / "01_first.ipynb").unlink()
    (suite / "src" / "01_first.py").unlink()
    again = kaggle.build("other", out=built.folder, folder=suite, captum=captum)
    assert again.kernels == ("dlia-02-second-one", "dlia-03-third")
    assert {path.split("/")[1] for path in content(built.folder) if "kernels" in path} == set(
        again.kernels
    )
    assert all(
        "some-user" not in one.decode(errors="ignore") for one in content(built.folder).values()
    )


@pytest.mark.parametrize("where", ["write_wheel", "_write_dataset", "files.write_json", "_swap"])
def test_a_build_that_fails_leaves_the_old_one_and_nothing_else(
    built, suite, captum, tmp_path, monkeypatch, where
):
    before = content(tmp_path)

    def fail(*arguments, **options):
        raise OSError("disk full")

    if where == "_swap":  # the second of its two renames
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: fail() if self.name == "new" else rename(self, to)
        )
    else:
        monkeypatch.setattr(f"tools.kaggle.{where}", fail)
    with pytest.raises(OSError, match="disk full"):
        kaggle.build("some-user", out=built.folder, folder=suite, captum=captum)
    assert content(tmp_path) == before


# --------------------------------------------------------------------------------------------------- refusals


def refused(match, tmp_path, error=ValueError, **options):
    """The build is refused with these words and writes nothing."""
    before = content(tmp_path)
    with pytest.raises(error, match=match):
        kaggle.build(**{"user": "me", "out": tmp_path / "fresh" / "out"} | options)
    assert content(tmp_path) == before
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("user", ["", "a", "Some-User", "two words", "me/dlia", "-me", "me-", "mé"])
def test_bad_user_is_refused(suite, captum, tmp_path, user):
    refused(
        rf"--user '{user}': give the last part", tmp_path, user=user, folder=suite, captum=captum
    )


def test_bad_competitions_are_refused(suite, captum, tmp_path):
    options = {"folder": suite, "captum": captum}
    refused(
        "--competition 'competitions/x': give", tmp_path, competitions=["competitions/x"], **options
    )
    (suite / "02_second_one.ipynb").unlink()
    (suite / "src" / "02_second_one.py").unlink()
    refused(
        "no notebook uses a competition, leave it out",
        tmp_path,
        competitions=["real-slug"],
        **options,
    )


def test_missing_outdated_and_unexecuted_notebooks_are_refused(suite, captum, tmp_path):
    options = {"folder": suite, "captum": captum}
    path, source = suite / "01_first.ipynb", suite / "src" / "01_first.py"
    whole = path.read_text()
    path.unlink()
    refused("01_first: 01_first.ipynb is missing", tmp_path, **options)
    path.write_text(whole)
    source.write_text(source.read_text().replace("import sys", "import json"))
    refused(r"01_first: differs from src/01_first\.py", tmp_path, **options)
    notebooks.write(notebooks.build(source), path)
    refused("01_first: code changed since it was executed", tmp_path, **options)
    refused("no notebook source", tmp_path, folder=tmp_path / "nowhere", captum=captum)


@pytest.mark.parametrize(
    ("stem", "match"),
    [
        ("03_Capitals", "gives no Kaggle title: rename it"),
        ("03_a__gap", "gives no Kaggle title: rename it"),
        ("03_" + "very_" * 9 + "long", "57 characters of at most 50: rename it to at most 45"),
    ],
)
def test_names_that_kaggle_or_the_suite_cannot_use_are_refused(
    suite, captum, tmp_path, stem, match
):
    add_notebook(suite, stem)
    refused(match, tmp_path, folder=suite, captum=captum)


def test_other_peoples_folders_are_not_replaced(suite, captum, tmp_path):
    (tmp_path / "mine" / "kernels").mkdir(parents=True)
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for out in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        refused(
            "holds other things, and would be replaced",
            tmp_path,
            out=out,
            folder=suite,
            captum=captum,
        )


def test_files_that_are_not_captums_wheel_are_refused(suite, tmp_path):
    refused(
        "there is no such file",
        tmp_path,
        FileNotFoundError,
        folder=suite,
        captum=tmp_path / "captum.whl",
    )
    for name in (
        "captum-0.9.0-py3-none-any.whl",
        "captum-0.9.0.tar.gz",
        "captum-0.9.0-cp312-cp312-linux.whl",
    ):
        (tmp_path / name).write_text("no archive")
        refused("is not a captum wheel", tmp_path, folder=suite, captum=tmp_path / name)
    alone = write_captum(tmp_path, "1.0", license_name="notes.txt")
    refused("holds no licence text", tmp_path, folder=suite, captum=alone)


# ------------------------------------------------------------------------------------------------ captum, CLI


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none.ini"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def in_suite(suite, tmp_path, monkeypatch):
    """The command line sees the tiny suite, and starts beside it."""
    find = notebooks.find
    monkeypatch.setattr(notebooks, "find", lambda folder=suite: find(suite))
    monkeypatch.chdir(tmp_path)


def test_pip_fetches_captum(suite, index, tmp_path):
    wheel = write_captum(index)
    built = kaggle.build("me", out=tmp_path / "out", folder=suite, strict=True)
    assert (built.folder / "dataset" / wheel.name).read_bytes() == wheel.read_bytes()
    assert (built.folder / "dataset" / "LICENSE-captum.txt").read_text() == "captum's licence"


def test_without_network_the_build_succeeds_and_says_what_is_missing(
    in_suite, index, tmp_path, capsys
):
    assert cli.main(["kaggle", "build", "--user", "me"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"note: the data set is without captum (pip could not get {kaggle.CAPTUM}: No matching distribution"
        in printed
    )
    assert "name a wheel with --captum FILE" in printed
    dataset = tmp_path / "build" / "kaggle" / "dataset"
    assert not list(dataset.glob("*captum*"))
    assert (
        "captum" not in json.loads((dataset / "dataset-metadata.json").read_text())["description"]
    )
    before = content(tmp_path)
    assert cli.main(["kaggle", "build", "--user", "you", "--strict"]) == 2
    assert "error: the data set is without captum" in capsys.readouterr().err
    assert content(tmp_path) == before


def printed_commands(output):
    """The commands among the printed lines, as words."""
    return [shlex.split(line) for line in output.splitlines() if line.startswith("  kaggle ")]


def test_the_command_line_prints_the_commands_in_order(in_suite, captum, capsys):
    arguments = [
        "--offline",
        "--competition",
        "one-slug",
        "--out",
        "two words/out",
        "--captum",
        str(captum),
    ]
    assert cli.main(["kaggle", "build", "--user", "me", *arguments]) == 0
    output = capsys.readouterr().out
    assert [words[1:3] for words in printed_commands(output)] == [
        ["datasets", "create"],
        ["datasets", "version"],
        ["datasets", "status"],
        ["kernels", "push"],
        ["kernels", "push"],
    ]
    assert printed_commands(output)[-1][-1] == str(
        Path("two words", "out", "kernels", "dlia-02-second-one")
    )
    assert "note:" not in output
    assert cli.main(["kaggle", "build", "--user", "Me", "--captum", str(captum)]) == 2
    assert "--user 'Me'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return kaggle.write_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_and_a_true_record(wheel):
    package = Path(kaggle.__file__).parent
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        inside = {name: archive.read(name) for name in archive.namelist()}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    info = f"dlia_utils-{__version__}.dist-info"
    modules = {
        f"dlia_utils/{one.relative_to(package).as_posix()}": one.read_bytes()
        for one in package.rglob("*.py")
    }
    assert modules == {
        name: data for name, data in inside.items() if name.startswith("dlia_utils/")
    }
    assert list(inside)[-1] == f"{info}/RECORD"
    rows = list(csv.reader(io.StringIO(inside.pop(f"{info}/RECORD").decode())))
    assert rows.pop() == [f"{info}/RECORD", "", ""]
    assert {row[0] for row in rows} == set(inside)
    for name, digest, size in rows:
        assert int(size) == len(inside[name])
        expected = (
            base64.urlsafe_b64encode(hashlib.sha256(inside[name]).digest()).decode().rstrip("=")
        )
        assert digest == f"sha256={expected}"


def test_wheel_leaves_out_what_lies_about(tmp_path, monkeypatch):
    package = tmp_path / "dlia_utils"
    for name in (
        "__init__.py",
        "table.csv",
        "part/__init__.py",
        "__pycache__/a.pyc",
        ".ipynb_checkpoints/b.py",
        ".c",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x = 1")
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        (tmp_path / name).write_bytes((notebooks.REPOSITORY / name).read_bytes())
    monkeypatch.setattr(notebooks, "REPOSITORY", tmp_path)
    names = zipfile.ZipFile(kaggle.write_wheel(tmp_path / "out")).namelist()
    assert names[:3] == [
        "dlia_utils/__init__.py",
        "dlia_utils/part/__init__.py",
        "dlia_utils/table.csv",
    ]
    assert all(".dist-info/" in name for name in names[3:])


# Everything that needs no torch, which takes seconds to import; DLIA_CACHE keeps it from the user's folders.
IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib.metadata as metadata
from dlia_utils import __main__, kaggle, locate, notebooks, submission
import dlia_utils
assert dlia_utils.__file__.startswith(sys.argv[1]), dlia_utils.__file__
found = metadata.distribution("dlia_utils")
needs = [need for need in found.requires if need.startswith("torch")]
print(found.version, found.metadata["License-Expression"], found.metadata["Requires-Python"], *needs)
"""


def imported(place, cwd):
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORTS, str(place)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_installs_with_pip_and_imports_from_there_and_as_it_lies(wheel, tmp_path):
    target = tmp_path / "target"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        "--target",
        str(target),
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / f"dlia_utils-{__version__}.dist-info" / "licenses" / "LICENSE").is_file()
    expected = f"{__version__} MIT >=3.11 torch>=2.10 torchvision>=0.25 torchmetrics>=1.4"
    assert imported(target, tmp_path) == expected
    assert imported(wheel, tmp_path) == expected


def test_bootstrap_cell_finds_both_wheels_in_the_data_set(built, tmp_path):
    mount = tmp_path / "kaggle" / "input" / "datasets" / "some-user" / "dlia-utils"
    mount.parent.mkdir(parents=True)
    (built.folder / "dataset").rename(mount)
    cell = notebooks.BOOTSTRAP.replace("/kaggle", str(tmp_path / "kaggle"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{cell}\nimport captum\nprint(captum.LOCAL)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"dlia_utils {__version__}\nTrue\n"


# --------------------------------------------------------------------- Kaggle's own client, without a network


class Transport:
    """Stands in for the network below Kaggle's client: keeps every request, answers as Kaggle does."""

    def __init__(self):
        self.calls, self.blobs, self.exists = [], {}, False

    def send(self, session, request, **settings):
        assert request.url.startswith(("https://api.kaggle.com/v1/", "https://upload.invalid/")), (
            request.url
        )
        name = request.url.rsplit("/", 1)[-1]
        if request.method == "PUT":
            self.blobs[name] = request.body.read()
            return self.answer(request, {})
        asked = json.loads(request.body)
        self.calls.append((name, asked))
        return self.answer(request, *getattr(self, f"on_{name}")(asked))

    def answer(self, request, body, status=200):
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url, request
        response.headers["Content-Type"] = "application/json"
        response.raw = io.BytesIO(json.dumps(body).encode())
        return response

    def on_GetDatasetStatus(self, asked):
        return (
            ({"status": "ready"}, 200)
            if self.exists
            else ({"code": 404, "message": "no such data set"}, 404)
        )

    def on_StartBlobUpload(self, asked):
        return (
            {
                "token": f"token-{asked['name']}",
                "createUrl": f"https://upload.invalid/{asked['name']}",
            },
        )

    def on_CreateDataset(self, asked):
        self.exists = True
        return ({"status": "ok", "url": "https://kaggle.invalid/dataset", "ref": asked["slug"]},)

    def on_CreateDatasetVersion(self, asked):
        return ({"status": "ok", "url": "https://kaggle.invalid/dataset"},)

    def on_SaveKernel(self, asked):
        return (
            {
                "versionNumber": 1,
                "url": f"https://kaggle.invalid/{asked['slug']}",
                "ref": asked["slug"],
            },
        )

    def sent(self, name):
        return [asked for called, asked in self.calls if called == name]


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Runs one command line in Kaggle's real client; `client.transport` has what it would have sent."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_USERNAME", "some-user")
    monkeypatch.setenv("KAGGLE_KEY", "not-a-key")
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    monkeypatch.setattr(
        tempfile, "tempdir", str(tmp_path)
    )  # the client notes there how far an upload is
    transport = Transport()
    monkeypatch.setattr(
        requests.Session, "send", lambda *given, **settings: transport.send(*given, **settings)
    )
    import kaggle.cli  # logs in when imported

    monkeypatch.setattr(kaggle.cli.api, "_authenticated", False)

    def run(words):
        monkeypatch.setattr(sys, "argv", words)
        try:
            kaggle.cli.main()
        except SystemExit as stop:
            assert not stop.code, f"{shlex.join(words)}: exit status {stop.code}"

    run.transport = transport
    return run


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The suite itself, built; whether its notebooks are without fault is asked in test_notebooks.py."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "check", lambda source: [])
        return kaggle.build("some-user", out=folder / "out", captum=write_captum(folder))


def test_the_client_creates_then_updates_the_data_set(client, built, capsys):
    create, version, status = [shlex.split(command) for command, _ in kaggle.push_commands(built)][
        :3
    ]
    client(create)
    assert "Your private Dataset is being created" in capsys.readouterr().out
    [asked] = client.transport.sent("CreateDataset")
    files = content(built.folder / "dataset")
    assert (asked["ownerSlug"], asked["slug"]) == ("some-user", "dlia-utils")
    assert asked["title"] == "DLIA utils" and kaggle.slugify(asked["title"]) == asked["slug"]
    assert asked["licenseName"] == "other" and asked["isPrivate"] is True
    assert f"dlia_utils-{__version__}-py3-none-any.whl (MIT)" in asked["description"]
    del files["dataset-metadata.json"]
    assert client.transport.blobs == files
    assert {one["token"] for one in asked["files"]} == {f"token-{name}" for name in files}
    client(status)
    assert "ready" in capsys.readouterr().out
    client.transport.blobs.clear()
    client(version)
    [asked] = client.transport.sent("CreateDatasetVersion")
    assert (asked["ownerSlug"], asked["datasetSlug"]) == ("some-user", "dlia-utils")
    assert asked["body"]["versionNotes"] == f"dlia_utils {__version__}"
    assert client.transport.blobs == files and len(asked["body"]["files"]) == len(files)


@pytest.mark.parametrize("source", notebooks.find(), ids=lambda source: source.stem)
def test_the_client_pushes_every_notebook_of_the_suite(client, real, source, capsys):
    [slug] = [
        slug
        for slug in real.kernels
        if (real.folder / "kernels" / slug / f"{source.stem}.ipynb").exists()
    ]
    [command] = [shlex.split(one) for one, _ in kaggle.push_commands(real) if one.endswith(slug)]
    client(command)
    output = capsys.readouterr().out
    assert "Kernel version 1 successfully pushed" in output and "surprising behavior" not in output
    [asked] = client.transport.sent("SaveKernel")
    assert asked["slug"] == f"some-user/{slug}" and kaggle.slugify(asked["newTitle"]) == slug
    assert 5 <= len(asked["newTitle"]) <= 50
    assert (asked["language"], asked["kernelType"]) == ("python", "notebook")
    assert asked["machineShape"] == "NvidiaTeslaT4" and asked["enableGpu"] is True
    assert (
        asked["isPrivate"] is True
        and asked["enableInternet"] is True
        and not asked.get("enableTpu")
    )
    names = notebooks.full_settings(source)["dataset"]
    handles = [
        sources.SOURCES[name].handle for name in ([names] if isinstance(names, str) else names)
    ]
    assert asked["datasetDataSources"] == [handle for handle in handles if handle] + [
        "some-user/dlia-utils"
    ]
    sent = nbformat.reads(asked["text"], as_version=4)
    nbformat.validate(sent)
    assert sent.metadata.kaggle.accelerator == "nvidiaTeslaT4"
    assert [cell.source for cell in sent.cells] == [
        cell.source for cell in notebooks.read(notebooks.product(source)).cells
    ]
    assert len(asked["text"]) < 1_000_000 and not re.search(r'"outputs": \[[^]]', asked["text"])


def test_titles_of_the_suite_differ(real):
    assert len(set(real.kernels)) == len(real.kernels) == len(notebooks.find())


def test_slugs_are_what_the_client_makes_of_titles(client):
    from slugify import slugify

    for title in ("DLIA 01 pneumonia robustness", "DLIA utils", "A  b_c 7"):
        assert kaggle.slugify(title) == slugify(title)
