"""The command line: what it prints, what it leaves, and its exit status."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from dlia_utils import __main__ as cli
from dlia_utils.data import datasets, sources
from dlia_utils.data.readers import DataNotFound
from tools import notebooks

SOURCE = """\
# %% [markdown]
# # 08 A notebook for the command line

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"
DATA_DIR = ""
RUN_NAME = ""
RESUME = True
CHANGES = {}

# %% tags=["settings"]
FULL = {"dataset": "pneumonia", "epochs": 3}

# %% tags=["start"]
from dlia_utils.run import start

run = start("08_cli", FULL, profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES)
print(run)
print(PROFILE, RUN_NAME)

# %% tags=["imports"]
import os
from pathlib import Path

# %%
run_dir = Path(os.environ["DLIA_RUNS"]) / "08_cli" / RUN_NAME
row = "{model},{attack},{eps},pixel,accuracy,{value},0.8,0.9,10,smoke,pneumonia (SYNTHETIC),48\\n"
header = "model,attack,eps,eps_unit,metric,value,ci_low,ci_high,n,profile,data,size\\n"
rows = row.format(model="baseline", attack="clean", eps=0.0, value=0.875)
rows += row.format(model="baseline", attack="worst", eps=4 / 255, value=0.125)
_ = (run_dir / "results.csv").write_text(header + rows)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of one quick notebook in place of the real one; runs go to a folder of their own."""
    source = tmp_path / "notebooks" / "src" / "08_cli.py"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(notebooks.REPOSITORY))
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    monkeypatch.delenv("DLIA_PROFILE", raising=False)
    find, pick = notebooks.find, notebooks.pick
    monkeypatch.setattr(notebooks, "find", lambda folder=source.parent.parent: find(folder))
    monkeypatch.setattr(notebooks, "pick", lambda names: pick(names, source.parent.parent))
    return source


def test_run_executes_prints_the_table_and_says_where_to_look(suite, tmp_path, capsys):
    assert cli.main(["notebooks", "build"]) == 0
    assert cli.main(["run", "--nb", "8", "--run-name", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "0.875 [0.800, 0.900]" in printed and "worst 4/255" in printed
    assert "data: pneumonia (SYNTHETIC) | profile: smoke" in printed
    assert "executed.ipynb" in printed and "results.csv" in printed
    executed = notebooks.read(tmp_path / "runs" / "08_cli" / "mine" / "executed.ipynb")
    assert any("smoke mine" in str(cell.get("outputs")) for cell in executed.cells)


def test_run_fails_with_the_failing_cell(suite, capsys):
    suite.write_text(SOURCE + "raise RuntimeError('planted')\n")
    cli.main(["notebooks", "build"])
    assert cli.main(["run"]) == 1
    captured = capsys.readouterr()
    assert "RuntimeError: planted" in captured.err and "FAILED: 08_cli" in captured.err
    assert "executed.ipynb" in captured.out


def test_wrong_arguments_stop_before_any_kernel_starts(suite, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "execute", lambda *a, **k: pytest.fail("a kernel was started"))
    assert cli.main(["run", "--nb", "31"]) == 2
    assert "no notebook 31; there are: 08_cli" in capsys.readouterr().err
    assert cli.main(["run", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_fresh_puts_an_older_run_aside(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "execute", lambda *a, **k: None)
    cli.main(["run", "--run-name", "mine"])
    (tmp_path / "runs" / "08_cli" / "mine" / "keep.txt").touch()
    cli.main(["run", "--run-name", "mine", "--fresh"])
    assert [path.name for path in (tmp_path / "runs" / "08_cli").glob("mine.*.old/keep.txt")] == [
        "keep.txt"
    ]


def test_settings_are_changed_by_name_and_said(suite, tmp_path, capsys):
    assert cli.main(["notebooks", "build"]) == 0
    assert cli.main(["run", "--nb", "08", "--set", "epochs=7"]) == 0
    assert "changed  * epochs = 7  (in this profile: 3)" in capsys.readouterr().out
    (record,) = (tmp_path / "runs" / "08_cli").glob("smoke-synthetic-*/config.json")
    assert json.loads(record.read_text())["settings"]["epochs"] == 7
    executed = notebooks.read(record.with_name("executed.ipynb"))
    assert any("* epochs = 7" in str(cell.get("outputs")) for cell in executed.cells), (
        "the banner of the notebook"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["epochs"], "--set 'epochs': write name=value"),
        (["epoch=5"], "no such setting 'epoch'; did you mean epochs?"),
        (["epochs=often"], "epochs = 'often' is a text; it must be a whole number"),
        (["epochs=2.5"], "epochs = 2.5 is a number; it must be a whole number"),
        (["epochs="], "write name=value"),
        (["epochs=-1"], "epochs = -1 is negative"),
        (["epochs=(1"], "is no Python value"),
    ],
)
def test_a_wrong_setting_stops_before_any_data_is_looked_for(
    suite, capsys, monkeypatch, given, message
):
    monkeypatch.setattr(sources, "find", lambda *_, **__: pytest.fail("data was looked for"))
    assert cli.main(["run", "--nb", "08", "--set", *given]) == 2
    assert message in capsys.readouterr().err


def test_results_without_accuracies_are_shown_as_rows(tmp_path):
    table = pd.DataFrame(
        {"model": ["a"], "attack": ["clean"], "metric": ["map"], "value": [0.5], "n": [3]}
    )
    table.assign(data="x", profile="smoke", size=48).to_csv(tmp_path / "results.csv", index=False)
    assert "map" in cli.results_text(tmp_path / "results.csv")


def test_list_names_notebooks_and_data_sets(suite, capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "A notebook for the command line" in printed and "pneumonia" in printed


def test_notebooks_check_names_faults_and_fails(suite, capsys):
    assert cli.main(["notebooks", "check"]) == 1
    assert "08_cli: 08_cli.ipynb is missing" in capsys.readouterr().out


def test_data_check_shows_counts_junk_and_audit(suite, capsys):
    status = cli.main(["data", "check", "pneumonia"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert (
        "SYNTHETIC" in printed
        and "NORMAL" in printed
        and "not read:" in printed
        and "verdict" in printed
    )


def test_data_check_lists_bad_files_and_fails(suite, tmp_path, capsys):
    spoilt = shutil.copytree(sources.find("pneumonia").root, tmp_path / "chest_xray")
    victim = next((spoilt / "train" / "NORMAL").glob("*.jpeg"))
    victim.write_bytes(b"")
    assert cli.main(["data", "check", "pneumonia", "--data", str(tmp_path)]) == 1
    assert victim.name in capsys.readouterr().out


def test_data_check_of_an_unknown_data_set(capsys):
    assert cli.main(["data", "check", "moon"]) == 2
    assert "unknown data set 'moon'" in capsys.readouterr().err


@pytest.fixture
def sent(tmp_path):
    """A good submission of two rows, its mapping, and the folder of its images."""
    (tmp_path / "map.csv").write_text("ID,image_id\n0,a.png\n1,b.png\n")
    header = "ID,image_id,x_min,y_min,x_max,y_max,confidence,label\n"
    rows = "0,a.png,1,1,9,9,0.5,Mass\n1,b.png,2,1,30,9,0.25,Nodule\n"
    (tmp_path / "mine.csv").write_text(header + rows)
    for name in ("a.png", "b.png"):
        Image.new("L", (20, 20)).save(tmp_path / name)
    return tmp_path


def test_submission_check_sums_up_a_good_file(sent, capsys):
    assert (
        cli.main(
            ["submission", "check", str(sent / "mine.csv"), "--mapping", str(sent / "map.csv")]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "mine.csv is valid" in printed
        and "rows        2, ids 0 to 1" in printed
        and "images      2" in printed
    )
    assert "Mass 1, Nodule 1" in printed and "0.25 to 0.5" in printed and "not checked" in printed


def test_submission_check_prints_problems_and_fails(sent, capsys):
    command = ["submission", "check", str(sent / "mine.csv"), "--mapping", str(sent / "map.csv")]
    assert cli.main([*command, "--images", str(sent)]) == 1
    assert "x_max: beyond the image's width in 1 row: line 3 ('30')" in capsys.readouterr().out
    assert cli.main([*command, "--classes", "Mass", "Effusion"]) == 1
    assert "label: unknown in 1 row: line 3 ('Nodule')" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["mine.csv", "map.csv", "images"])
def test_submission_check_without_its_files(sent, missing, capsys):
    paths = {name: str(sent / name) for name in ("mine.csv", "map.csv")} | {"images": str(sent)}
    paths[missing] = str(sent / "nowhere")
    command = [
        "submission",
        "check",
        paths["mine.csv"],
        "--mapping",
        paths["map.csv"],
        "--images",
        paths["images"],
    ]
    assert cli.main(command) == 2
    assert "nowhere" in capsys.readouterr().err


def test_module_has_help():
    command = [sys.executable, "-m", "dlia_utils", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=notebooks.REPOSITORY
    )
    assert "run" in done.stdout and "notebooks" in done.stdout


def test_of_all_notebooks_those_without_data_in_the_folder_are_left_out_by_name(
    suite, tmp_path, capsys, monkeypatch
):
    (source,), execute = notebooks.pick([]), notebooks.run
    lacking = source.with_name("09_lacking.py")

    def run(asked, **options):
        if asked == lacking:
            raise (
                datasets.BadData("spoilt")
                if options["run_name"] == "spoilt"
                else DataNotFound("it does not hold them")
            )
        return execute(asked, **options)

    monkeypatch.setattr(notebooks, "run", run)
    monkeypatch.setattr(notebooks, "execute", lambda *a, **k: None)
    monkeypatch.setattr(notebooks, "pick", lambda names: [lacking, source])
    assert cli.main(["run", "--run-name", "all"]) == 0
    assert "09_lacking is left out: it does not hold them" in capsys.readouterr().err
    assert cli.main(["run", "--nb", "09", "08"]) == 2, "asked for by name it is an error"
    assert cli.main(["run", "--run-name", "spoilt"]) == 2, "bad data is an error"
    monkeypatch.setattr(notebooks, "pick", lambda names: [lacking])
    assert cli.main(["run", "--run-name", "none"]) == 2, "with nothing left it is an error"
