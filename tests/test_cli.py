"""The command line and what executes notebooks: what they print and leave, the exit status."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import tiny
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from dlia_utils import __main__ as cli
from dlia_utils import execute
from dlia_utils.data import sources
from dlia_utils.data.readers import DataNotFound
from tools import __main__ as tools
from tools import notebooks

RESULTS = """
# %%
row = "{},{},{},pixel,accuracy,{},0.8,0.9,10,smoke,pneumonia (SYNTHETIC),48\\n"
rows = "model,attack,eps,eps_unit,metric,value,ci_low,ci_high,n,profile,data,size\\n"
rows += row.format("baseline", "clean", 0.0, 0.875)
rows += row.format("baseline", "worst", 4 / 255, 0.125)
_ = (run.run_dir / "results.csv").write_text(rows)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of one quick notebook in place of the real one; runs go to a folder of their own."""
    source = tiny.write(tmp_path / "notebooks", text=tiny.TINY + RESULTS)
    monkeypatch.setenv("PYTHONPATH", str(notebooks.REPOSITORY))
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    monkeypatch.delenv("DLIA_PROFILE", raising=False)
    monkeypatch.chdir(tmp_path)
    return notebooks.product(source)


def rewrite(notebook, before, after):
    notebook.write_text(notebook.read_text().replace(before, after))


def test_run_executes_prints_the_table_and_says_where_to_look(suite, tmp_path, capsys):
    name = "mein {Lauf} 100 % #2? [\xe4] 'q'"
    assert cli.main(["run", "--nb", "7", "--run-name", name, "--set", "epochs=7"]) == 0
    printed, said = capsys.readouterr()
    assert "changed  * epochs = 7  (in this profile: 3)" in printed
    assert "0.88 [0.80, 0.90]" in printed and "worst 4/255" in printed
    assert "data: pneumonia (SYNTHETIC) | profile: smoke" in printed
    assert "executed.ipynb" in printed and "results.csv" in printed
    assert "It warned of:\n  " in said and "done" in said, "what the kernel said is not lost"
    folder = tmp_path / "runs" / "07_tiny" / name
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert json.loads((folder / "config.json").read_text())["settings"]["epochs"] == 7
    executed = (folder / "executed.ipynb").read_text()
    assert "* epochs = 7" in executed, "the banner of the notebook"


def test_run_fails_with_the_failing_cell(suite, capsys):
    rewrite(suite, "6 * 7", "6 / 0")
    assert cli.main(["run"]) == 1
    captured = capsys.readouterr()
    assert "ZeroDivisionError" in captured.err and "FAILED: 07_tiny" in captured.err
    assert "executed.ipynb" in captured.out


def test_execute_passes_parameters_and_tells_the_failing_cell(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_DATA", "relative")
    shown = 'import os; print(PROFILE, os.environ[\\"DLIA_DATA\\"], CHANGES); 6 / 0'
    rewrite(suite, "from dlia_utils.run import start", shown)
    parameters = {"PROFILE": "cpu", "CHANGES": {"lr": 3e-4, "grid": (1, 2)}}
    with pytest.raises(PapermillExecutionError) as failure:
        execute.execute(suite, "out/x.ipynb", parameters=parameters, progress=False)
    text = execute.failure_text(failure.value)
    assert "ZeroDivisionError" in text and "\x1b" not in text
    said = f"cpu {tmp_path / 'relative'} {{'lr': 0.0003, 'grid': [1, 2]}}"
    assert said in (tmp_path / "out" / "x.ipynb").read_text()


def test_a_kernel_that_dies_before_it_answers_is_started_again(suite, monkeypatch, capsys):
    tries = []

    def unlucky(*args, **options):
        tries.append(args[0])
        if len(tries) < many:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", unlucky)
    monkeypatch.setattr(execute.time, "sleep", lambda seconds: None)
    many = 3
    assert execute.execute(suite, "out.ipynb", progress=False).name == "out.ipynb"
    assert tries == [str(suite)] * 3
    assert capsys.readouterr().err.count("its port): it is started again") == 2
    many = 99
    with pytest.raises(RuntimeError, match="before replying"):
        execute.execute(suite, "out.ipynb", progress=False)
    assert len(tries) == 3 + execute.KERNEL_STARTS


def test_an_error_of_the_system_is_one_line(suite, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    folder = ["submission", "check", str(tmp_path), "--mapping", str(tmp_path)]
    for command, message in ((["run"], "runs"), (folder, str(tmp_path))):
        assert cli.main(command) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and message in said and "\n" not in said
    monkeypatch.setattr(tools.notebooks, "sources", lambda names: (_ for _ in ()).throw(full))
    assert tools.main(["build"]) == 2
    assert capsys.readouterr().err == "error: a.ipynb: No space left on device\n"


full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.ipynb")


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(execute, "execute", lambda *a, **k: pytest.fail("a kernel was started"))


WRONG = [
    ("--nb 31", "no notebook 31; there are: 07_tiny"),
    ("--data nowhere", "nowhere"),
    ("--set epochs", "--set 'epochs': write name=value"),
    ("--set epoch=5", "no such setting 'epoch'; did you mean epochs?"),
    ("--set epochs=often", "epochs = 'often' is a text; it must be a whole number"),
    ("--set epochs=(1", "is no Python value"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_argument_stops_before_any_kernel_starts(
    suite, no_kernel, capsys, options, message
):
    assert cli.main(["run", *options.split()]) == 2
    assert message in capsys.readouterr().err and not Path("runs").exists(), "nothing was written"


def test_the_notebook_alone_opens_its_folder_and_fresh_puts_an_older_run_aside(suite, tmp_path):
    runs = tmp_path / "runs" / "07_tiny"
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "config.json").write_text('{"key": "other"}')
    assert cli.main("run --run-name mine --fresh".split()) == 0
    (older,) = runs.glob("mine.*.old")
    assert [path.name for path in older.iterdir()] == ["config.json"]
    assert {path.name for path in runs.iterdir()} == {"mine", older.name}, "nothing is left beside"
    assert (runs / "mine" / "executed.ipynb").exists()


def test_notebooks_without_data_are_left_out_by_name(suite, capsys, monkeypatch):
    lacking = suite.with_name("09_lacking.ipynb")
    shutil.copy(suite, lacking)

    def run(path, **options):
        if path.name == lacking.name:
            raise DataNotFound("it does not hold them")
        return execute.Executed("07_tiny", suite.parent, 1.0)

    monkeypatch.setattr(execute, "run", run)
    assert cli.main(["run"]) == 0
    assert "09_lacking is left out: it does not hold them" in capsys.readouterr().err
    assert cli.main("run --nb 09 07".split()) == 2, "asked for by name it is an error"
    suite.unlink()
    assert cli.main(["run"]) == 2, "with nothing left it is an error"


def test_another_data_set_is_taken_only_by_a_notebook_that_can(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    own, asks = execute.pick(["03", "04"])
    with pytest.raises(ValueError, match="dataset names 'covid'; there are: tuberculosis"):
        execute.run(own, changes={"dataset": "covid"}, progress=False)
    seen = {}
    monkeypatch.setattr(execute, "execute", lambda path, out, **options: seen.update(options))
    done = execute.run(asks, changes={"dataset": "breastmnist"}, progress=False)
    assert seen["parameters"]["CHANGES"] == {"dataset": "breastmnist"}
    assert done.folder.name == "smoke-breastmnist-synthetic"


def test_list_names_notebooks_and_data_sets(suite):
    command = [sys.executable, "-m", "dlia_utils", "list"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "07_tiny" in printed and "A tiny notebook" in printed and "pneumonia" in printed


def test_data_check_shows_counts_junk_files_and_the_audit(suite, tmp_path, capsys):
    status = cli.main(["data", "check", "pneumonia"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    for word in ("SYNTHETIC", "NORMAL", "not read:", "verdict"):
        assert word in printed
    damaged = shutil.copytree(sources.find("pneumonia").root, tmp_path / "chest_xray")
    victim = next((damaged / "train" / "NORMAL").glob("*.jpeg"))
    victim.write_bytes(b"")
    assert cli.main(["data", "check", "pneumonia", "--data", str(tmp_path)]) == 1
    assert victim.name in capsys.readouterr().out
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


def test_submission_check_sums_up_or_prints_problems(sent, capsys):
    check = ["submission", "check", str(sent / "mine.csv"), "--mapping", str(sent / "map.csv")]
    assert cli.main(check) == 0
    printed = capsys.readouterr().out
    assert "mine.csv is valid" in printed and "not checked" in printed
    for name in ("map.csv", "mine.csv"):
        text = (sent / name).read_text().replace("a.png", "00000001_000.png")
        (sent / f"nih_{name}").write_text(text.replace("b.png", "00000002_000.png"))
    mapping = str(sent / "nih_map.csv")
    assert cli.main([*check[:2], str(sent / "nih_mine.csv"), "--mapping", mapping]) == 0
    assert "1024 x 1024" in capsys.readouterr().out
    assert cli.main([*check, "--images", str(sent)]) == 1
    assert "30" in capsys.readouterr().out
    assert cli.main([*check, "--classes", "Mass", "Effusion"]) == 1
    assert "Nodule" in capsys.readouterr().out
    assert cli.main([*check[:-1], str(sent / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
