"""What goes to Kaggle: the folders, the wheel, and what Kaggle's own client sends of them."""

import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nbformat
import pytest
import requests
import tiny
from kaggle_tree import write_wheel

from dlia_utils import __version__, execute
from dlia_utils.data import sources
from tools import __main__ as cli
from tools import kaggle, notebooks

SEVERAL = tiny.TINY.replace('"pneumonia"', '("dlia", "nih", "fracatlas")')


def write_captum(folder, version="0.9.0", license_name="licenses/LICENSE"):
    """A file that passes for captum's wheel."""
    path = write_wheel(Path(folder), "captum", version, "LOCAL = True")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"captum-{version}.dist-info/{license_name}", "captum's licence")
    return path


@pytest.fixture
def captum(tmp_path):
    return write_captum(tmp_path)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of two tiny notebooks, the second of which can use several data sets."""
    # A copy, as the real wheel has the same bytes each time: a zip written again has a new date.
    ours = write_ours(tmp_path / "ours")
    monkeypatch.setattr(kaggle, "write_wheel", lambda folder: copied(ours, folder))
    for _ in range(2):  # the first one links to the second
        tiny.write(tmp_path / "notebooks", "01_first")
        tiny.write(tmp_path / "notebooks", "02_second_one", SEVERAL)
    return tmp_path / "notebooks"


def write_ours(folder):
    path = write_wheel(Path(folder), "dlia_utils", __version__, f"__version__ = '{__version__}'")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"dlia_utils-{__version__}.dist-info/licenses/LICENSE", "MIT")
    return path


def copied(path, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(path, folder))


@pytest.fixture
def built(suite, captum, tmp_path):
    return kaggle.build("some-user", out=tmp_path / "out", folder=suite, captum=captum)


def content(folder):
    """Every file below `folder`, hidden ones too, with its bytes."""
    found = [one for one in folder.rglob("*") if one.is_file()]
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in found}


# ------------------------------------------------------------------------------------- the folders


def test_build_writes_a_folder_for_each_notebook_and_one_data_set(built, tmp_path):
    licences = ["dataset/LICENSE-captum.txt", "dataset/LICENSE-dlia_utils.txt"]
    wheels = ["captum-0.9.0", f"dlia_utils-{__version__}"]
    wheels = [f"dataset/{name}-py3-none-any.whl" for name in wheels]
    kernels = [f"kernels/{slug}/kernel-metadata.json" for slug in built.kernels]
    kernels += [f"kernels/{built.kernels[0]}/01_first.ipynb"]
    kernels += [f"kernels/{built.kernels[1]}/02_second_one.ipynb"]
    told = ["dataset/dataset-metadata.json", f"dataset/{kaggle.LIST}"]
    expected = [*licences, *wheels, *kernels, *told]
    assert sorted(content(built.folder)) == sorted(expected)
    assert built.kernels == ("dlia-01-first", "dlia-02-second-one")
    assert not list(tmp_path.glob(".out-*")), "the scratch folder stays behind"


@pytest.mark.parametrize("internet", [True, False])
def test_kernel_says_machine_internet_and_sources_and_has_no_outputs(
    suite, captum, tmp_path, internet
):
    joined = [] if internet else ["a-competition"]
    options = {"internet": internet, "competitions": joined}
    built = kaggle.build("me", out=tmp_path / "out", folder=suite, captum=captum, **options)
    hint = "02_second_one can use a competition's images too: name it with --competition SLUG"
    assert [note.startswith(hint) for note in built.notes] == [True] * internet
    expected = [["paultimothymooney/chest-xray-pneumonia"]]
    expected += [["nih-chest-xrays/data", "vuppalaadithyasriharsha/fracatlas"]]
    for slug, handles in zip(built.kernels, expected, strict=True):
        place = built.folder / "kernels" / slug
        said = json.loads((place / "kernel-metadata.json").read_text())
        assert (said["id"], said["is_private"], said["enable_gpu"]) == (f"me/{slug}", True, True)
        assert (said["machine_shape"], said["enable_tpu"]) == ("NvidiaTeslaT4", False)
        assert said["enable_internet"] is internet
        assert said["dataset_sources"] == [*handles, "me/dlia-utils"]
        assert said["competition_sources"] == (joined if "second" in slug else [])
        notebook = notebooks.read(place / said["code_file"])
        nbformat.validate(notebook)
        assert notebook.metadata["kaggle"]["isInternetEnabled"] is internet
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)
        committed = notebooks.read(suite / said["code_file"])
        pushed, kept = ([cell.source for cell in one.cells] for one in (notebook, committed))
        assert pushed[2:] == kept[2:] and ".ipynb" in kept[0] and ".ipynb" not in pushed[0]
        list_of_wheels = (built.folder / "dataset" / kaggle.LIST).read_bytes()
        known = hashlib.sha256(list_of_wheels).hexdigest()
        assert pushed[1] == kept[1].replace('KNOWN = ""', f'KNOWN = "{known}"') != kept[1]
        other = next(one for one in built.kernels if one != slug)
        assert f"(https://www.kaggle.com/code/me/{other})" in pushed[0]


def test_the_list_of_the_data_set_holds_the_hash_of_every_wheel(built):
    files = content(built.folder / "dataset")
    said = dict(line.split()[::-1] for line in files[kaggle.LIST].decode().splitlines())
    wheels = {name: data for name, data in files.items() if name.endswith(".whl")}
    assert said == {name: hashlib.sha256(data).hexdigest() for name, data in wheels.items()}
    assert len(said) == 2


def test_links_lead_on_kaggle_where_they_can():
    text = "[a](02_b_c.ipynb#x) [r](../README.md) ![p](attachment:a.png) [w](https://a.b) [h](#1)"
    told = kaggle.for_kaggle(text, "me")
    where = "https://www.kaggle.com/code/me/dlia-02-b-c"
    assert told == f"[a]({where}) r ![p](attachment:a.png) [w](https://a.b) [h](#1)"


def test_builds_are_byte_identical_and_replace_the_old_one_whole(built, suite, captum, tmp_path):
    options = {"folder": suite, "captum": captum}
    other = kaggle.build("some-user", out=tmp_path / "elsewhere" / "deep", **options)
    assert content(other.folder) == content(built.folder)
    for path in suite.rglob("01_first.*"):
        path.unlink()
    tiny.write(suite, "02_second_one", SEVERAL)
    again = kaggle.build("other", out=built.folder, **options)
    assert again.kernels == ("dlia-02-second-one",)
    files = content(built.folder)
    assert not any("dlia-01" in name or b"some-user" in data for name, data in files.items())


@pytest.mark.parametrize("where", ["write_wheel", "_write_dataset", "files.write_json"])
def test_a_build_that_fails_leaves_the_old_one_and_nothing_else(
    built, suite, captum, tmp_path, monkeypatch, where
):
    def fail(*arguments, **options):
        raise OSError("disk full")

    before = content(tmp_path)
    monkeypatch.setattr(f"tools.kaggle.{where}", fail)
    with pytest.raises(OSError, match="disk full"):
        kaggle.build("some-user", out=built.folder, folder=suite, captum=captum)
    assert content(tmp_path) == before


def refused(match, tmp_path, **options):
    """The build is refused with these words and writes nothing."""
    before = content(tmp_path)
    with pytest.raises(ValueError, match=match):
        kaggle.build(**{"user": "me", "out": tmp_path / "fresh" / "out"} | options)
    assert content(tmp_path) == before and not (tmp_path / "fresh").exists()


def test_what_kaggle_would_refuse_is_refused(suite, captum, tmp_path):
    options = {"folder": suite, "captum": captum}
    for user in ("", "a", "Some-User", "two words", "me/dlia", "-me", "me-"):
        refused(
            f"--user, --competition '{user}': give the last part", tmp_path, user=user, **options
        )
    refused("'competitions/x': give", tmp_path, competitions=["competitions/x"], **options)
    for stem in ("03_Capitals", "03_" + "very_" * 9 + "long"):
        source = tiny.write(suite, stem)
        tiny.write(suite, "02_second_one", SEVERAL)  # which links to it
        refused("gives no Kaggle title: rename it", tmp_path, **options)
        source.unlink()
    for path in suite.rglob("02_second_one.*"):
        path.unlink()
    tiny.write(suite, "01_first")
    refused("no notebook uses one", tmp_path, competitions=["real-slug"], **options)


def test_notebooks_with_faults_and_foreign_folders_are_refused(suite, captum, tmp_path):
    options = {"folder": suite, "captum": captum}
    source = suite / "src" / "01_first.py"
    source.write_text(source.read_text().replace("import sys", "import json"))
    refused(r"01_first: differs from src/01_first\.py", tmp_path, **options)
    refused("no notebook source", tmp_path, folder=tmp_path / "nowhere", captum=captum)
    (tmp_path / "mine" / "kernels").mkdir(parents=True)
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for out in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        refused("holds other things", tmp_path, out=out, **options)


def test_files_that_are_not_captums_wheel_are_refused(suite, tmp_path):
    for name in ("captum-0.9.0-py3-none-any.whl", "captum-0.9.0.tar.gz", "no/such.file"):
        if "/" not in name:
            (tmp_path / name).write_text("no archive")
        refused("is not captum's wheel", tmp_path, folder=suite, captum=tmp_path / name)
    alone = write_captum(tmp_path, "1.0", license_name="notes.txt")
    refused("holds no licence text", tmp_path, folder=suite, captum=alone)


# ------------------------------------------------------------------------- captum, the command line


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
    whole = notebooks.sources
    monkeypatch.setattr(notebooks, "sources", lambda names=(), folder=suite: whole(names, suite))
    monkeypatch.chdir(tmp_path)


def test_pip_fetches_captum_if_it_is_the_published_file(suite, index, tmp_path, monkeypatch):
    wheel = write_captum(index)
    options = {"out": tmp_path / "out", "folder": suite, "strict": True}
    with pytest.raises(ValueError, match="has the SHA-256 .*, not cda38e1d.*: do not use it"):
        kaggle.build("me", **options)
    monkeypatch.setattr(kaggle, "CAPTUM_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    built = kaggle.build("me", **options)
    assert (built.folder / "dataset" / wheel.name).read_bytes() == wheel.read_bytes()
    assert (built.folder / "dataset" / "LICENSE-captum.txt").read_text() == "captum's licence"


def test_without_network_the_build_says_what_is_missing(in_suite, index, tmp_path, capsys):
    assert cli.main(["kaggle", "--user", "me"]) == 0
    printed = capsys.readouterr().out
    assert f"note: the data set is without captum (pip could not get {kaggle.CAPTUM}" in printed
    assert not list((tmp_path / "build" / "kaggle" / "dataset").glob("*captum*"))
    before = content(tmp_path)
    assert cli.main(["kaggle", "--user", "you", "--strict"]) == 2
    assert "error: the data set is without captum" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_the_command_line_prints_the_commands_in_order(in_suite, captum, capsys):
    given = ["--competition", "one-slug", "--out", "two words/out", "--captum", str(captum)]
    assert cli.main(["kaggle", "--user", "me", "--offline", *given]) == 0
    output = capsys.readouterr().out
    commands = [shlex.split(line) for line in output.splitlines() if line.startswith("  kaggle ")]
    verbs = ["create", "version", "status", "push", "push"]
    assert [words[2] for words in commands] == verbs and "note:" not in output
    assert commands[-1][-1] == str(Path("two words", "out", "kernels", "dlia-02-second-one"))


# --------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return kaggle.write_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_alone_and_the_same_bytes_each_time(wheel, tmp_path):
    package = notebooks.REPOSITORY / "dlia_utils"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    modules = {f"dlia_utils/{name}": data for name, data in content(package).items()}
    modules = {
        name: data for name, data in modules.items() if name.endswith((".py", ".safetensors"))
    }
    assert {k: v for k, v in inside.items() if ".dist-info/" not in k} == modules
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert kaggle.write_wheel(tmp_path).read_bytes() == wheel.read_bytes()


# Everything that needs no torch, which takes seconds to import.
IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib.metadata as metadata
from dlia_utils import __main__, execute, submission
from dlia_utils.data import sources
import dlia_utils
assert dlia_utils.__file__.startswith(sys.argv[1]), dlia_utils.__file__
found = metadata.distribution("dlia_utils")
needs = [need for need in found.requires if need.startswith("torch")]
metadata = [found.metadata[name] for name in ("License-Expression", "Requires-Python")]
print(found.version, *metadata, *needs)
"""


def test_wheel_installs_with_pip_and_imports_from_there_and_as_it_lies(wheel, tmp_path):
    target, python = tmp_path / "target", [sys.executable, "-I"]
    options = "--no-deps --no-index --no-compile --disable-pip-version-check --quiet --target"
    pip = [*python, "-m", "pip", "install", *options.split(), str(target), str(wheel)]
    subprocess.run(pip, check=True)
    for place in (target, wheel):
        run = [*python, "-c", IMPORTS, str(place)]
        said = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"{__version__} MIT >=3.11 torch>=2.10 torchvision>=0.25"), said


# ------------------------------------------------------- Kaggle's own client, without a network


class Transport:
    """In place of the network below Kaggle's client: keeps the requests, answers as Kaggle does."""

    def __init__(self):
        self.calls, self.blobs, self.exists = [], {}, False

    def send(self, session, request, **settings):
        known = ("https://api.kaggle.com/v1/", "https://upload.invalid/")
        assert request.url.startswith(known), request.url
        name, body, status = request.url.rsplit("/", 1)[-1], {}, 200
        if request.method == "PUT":
            self.blobs[name] = request.body.read()
        else:
            asked = json.loads(request.body)
            self.calls.append((name, asked))
            body, status = self.reply(name, asked)
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url, request
        response.headers["Content-Type"] = "application/json"
        response.raw = io.BytesIO(json.dumps(body).encode())
        return response

    def reply(self, name, asked):
        if name == "GetDatasetStatus" and not self.exists:
            return {"code": 404, "message": "no such data set"}, 404
        self.exists |= name == "CreateDataset"
        file, url = asked.get("name", ""), "https://kaggle.invalid/"
        bodies = {"GetDatasetStatus": {"status": "ready"}}
        upload = f"https://upload.invalid/{file}"
        bodies["StartBlobUpload"] = {"token": f"token-{file}", "createUrl": upload}
        bodies["CreateDataset"] = {"status": "ok", "url": url, "ref": asked.get("slug")}
        bodies["CreateDatasetVersion"] = {"status": "ok", "url": url}
        bodies["SaveKernel"] = {"versionNumber": 1, "url": url, "ref": asked.get("slug")}
        return bodies[name], 200

    def sent(self, name):
        return [asked for called, asked in self.calls if called == name]


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Runs a command line in Kaggle's client; `client.transport` has what it would have sent."""
    home = str(tmp_path / "home")
    names = {"HOME": home, "KAGGLE_CONFIG_DIR": home, "KAGGLE_USERNAME": "some-user"}
    for name, value in (names | {"KAGGLE_KEY": "not-a-key"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    # The client notes there how far an upload is.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    transport = Transport()
    monkeypatch.setattr(requests.Session, "send", lambda *a, **k: transport.send(*a, **k))
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


def test_the_client_creates_then_updates_the_data_set(client, built, capsys):
    commands = [shlex.split(command) for command, _ in kaggle.push_commands(built)]
    client(commands[0])
    assert "Your private Dataset is being created" in capsys.readouterr().out
    [asked] = client.transport.sent("CreateDataset")
    files = content(built.folder / "dataset")
    assert (asked["ownerSlug"], asked["slug"]) == ("some-user", "dlia-utils")
    assert asked["licenseName"] == "other" and asked["isPrivate"] is True
    assert f"dlia_utils-{__version__}-py3-none-any.whl (MIT)" in asked["description"]
    del files["dataset-metadata.json"]
    assert client.transport.blobs == files
    client(commands[2])
    assert "ready" in capsys.readouterr().out
    client(commands[1])
    [asked] = client.transport.sent("CreateDatasetVersion")
    assert asked["body"]["versionNotes"] == f"dlia_utils {__version__}"
    assert client.transport.blobs == files and len(asked["body"]["files"]) == len(files)


def test_the_client_pushes_every_notebook_of_the_suite(client, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "check", lambda source: [])  # is asked in test_notebooks.py
    real = kaggle.build("some-user", out=tmp_path / "out", captum=write_captum(tmp_path))
    assert len(set(real.kernels)) == len(real.kernels) == len(notebooks.sources())
    known = hashlib.sha256((real.folder / "dataset" / kaggle.LIST).read_bytes()).hexdigest()
    for source, slug in zip(notebooks.sources(), real.kernels, strict=True):
        client(["kaggle", "kernels", "push", "-p", str(real.folder / "kernels" / slug)])
        output = capsys.readouterr().out
        assert "Kernel version 1 successfully pushed" in output
        assert "surprising behavior" not in output
        asked = client.transport.sent("SaveKernel")[-1]
        assert asked["slug"] == f"some-user/{slug}" and 5 <= len(asked["newTitle"]) <= 50
        assert (asked["machineShape"], asked["enableGpu"]) == ("NvidiaTeslaT4", True)
        names = execute.opening(notebooks.product(source), ("parameters", "settings"))
        names = names["FULL"]["dataset"]
        names = [names] if isinstance(names, str) else names
        handles = [sources.SOURCES[name].handle for name in names]
        assert asked["datasetDataSources"] == [*filter(None, handles), "some-user/dlia-utils"]
        sent = nbformat.reads(asked["text"], as_version=4)
        nbformat.validate(sent)
        committed = notebooks.read(notebooks.product(source)).cells
        for cell, ours in zip(sent.cells, committed, strict=True):
            text = ours.cell_type == "markdown"
            expected = kaggle.for_kaggle(ours.source, "some-user") if text else ours.source
            expected = expected.replace('KNOWN = ""', f'KNOWN = "{known}"')
            assert cell.source == expected
        assert len(asked["text"]) < 1_000_000 and not re.search(r'"outputs": \[[^]]', asked["text"])
