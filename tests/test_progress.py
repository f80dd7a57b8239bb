"""Bars in a log file, a terminal and a notebook, and what is told while a notebook runs."""

import io
import os
import re

import nbformat
import pytest

from dlia_utils import execute, progress
from dlia_utils.progress import Bar
from tools import notebooks


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(capsys):
    """What was written, without the times."""
    return [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()]


def test_a_log_file_gets_one_finished_line_and_one_for_each_mark(capsys):
    with Bar(total=300, desc="drift", unit="image") as bar:
        for _ in range(300):
            bar.update()
            bar.set_postfix(standing=3)
    with Bar(total=20, desc="train cnn", unit="batch") as bar:
        for epoch in (1, 2):
            bar.update(10)
            bar.mark(f"epoch {epoch} of 2, loss 0.{epoch}")
    for number in Bar(range(1000), desc="search"):
        if number == 5:
            break
    marks = [f"train cnn: epoch {n} of 2, loss 0.{n}" for n in (1, 2)]
    told = ["drift: standing=3, 300 images", *marks, "search: 5 of 1,000"]
    assert lines(capsys) == told


@pytest.mark.parametrize("options", [{"disable": True}, {"leave": False}, {"delay": 60}])
def test_these_leave_nothing(capsys, options):
    with Bar(range(5), **options) as bar:
        for _ in bar:
            bar.set_postfix_str("a")
    assert lines(capsys) == []


def test_a_terminal_gets_the_bar_of_tqdm(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Bar(total=4, desc="drift") as bar:
        bar.update(4)
    assert "drift: 100%|" in terminal.getvalue() and "\r" in terminal.getvalue()


def test_the_status_file_names_the_outer_bar_first(monkeypatch, tmp_path):
    path = tmp_path / "status"
    monkeypatch.setenv("DLIA_STATUS", str(path))
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with Bar(total=4, desc="train cnn", unit="batch") as outer:
        outer.mark("epoch 1 of 2")
        with Bar(total=3, desc="attacks") as inner, Bar(total=9, delay=60) as soon:
            inner.update()
            inner.refresh()
            soon.refresh()
            assert re.search(r"of 4 batches \[\d\d:\d\d\] > .*, \d\d:\d\d left\]", path.read_text())
            both = re.sub(r" \[.*?\]", "", path.read_text())
        one = re.sub(r" \[.*?\]", "", path.read_text())
    assert both == "train cnn: epoch 1 of 2, 0 of 4 batches > attacks: 1 of 3\n"
    assert one == "train cnn: epoch 1 of 2, 0 of 4 batches\n"
    assert path.read_text() == "\n"
    monkeypatch.setenv("DLIA_STATUS", str(tmp_path / "gone" / "status"))
    with Bar(total=4) as bar:  # a status that cannot be written ends nothing
        bar.update(4)


BARS = """
import time
from dlia_utils.progress import Bar
print("before")
for name in "abc":
    with Bar(total=200, desc=f"train {name}", unit="batch") as bar:
        for epoch in range(4):
            for _ in range(50):
                time.sleep(0.01 if name == "a" else 0.002)
                bar.update()
            bar.mark(f"epoch {epoch + 1} of 4, loss 0.123")
    print("after", name)
for _ in Bar(range(9), desc="a moment", delay=60):
    pass
with Bar(total=4, desc="gone", leave=False) as bar:
    bar.update(4)
"""
FAILS = 'for _ in Bar(range(9), desc="broken"):\n    raise ValueError("on purpose")'


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A failing notebook with bars: as executed, what standard error was told, and the error."""
    folder, terminal, v4 = tmp_path_factory.mktemp("bars"), Terminal(), nbformat.v4
    cells = [v4.new_markdown_cell("# Title"), v4.new_markdown_cell("## 2 Training\nwith text")]
    cells += [v4.new_code_cell(BARS), v4.new_markdown_cell("## 3 Failing"), v4.new_code_cell(FAILS)]
    notebooks.write(v4.new_notebook(cells=cells), folder / "in.ipynb")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception) as caught:
        patch.setattr("sys.stderr", terminal)
        execute.execute(folder / "in.ipynb", folder / "out.ipynb", cwd=notebooks.REPOSITORY)
    return notebooks.read(folder / "out.ipynb"), terminal.getvalue(), caught.value


def test_an_executed_notebook_holds_one_line_a_bar_and_a_cleaned_one_none(executed):
    (cell,) = [cell for cell in executed[0].cells if "abc" in cell.source]
    bars = [one.data["text/plain"] for one in cell.outputs if one.output_type == "display_data"]
    ended = [f"train {name}: epoch 4 of 4, loss 0.123" for name in "abc"]
    assert [text.split(" [")[0] for text in bars] == [*ended, ""]  # the last: leave=False
    assert not [output for output in cell.outputs if output.get("name") == "stderr"]
    cleaned = notebooks.clean(nbformat.from_dict(executed[0]))
    kept = [output for cell in cleaned.cells for output in cell.get("outputs", [])]
    assert kept[0].text == "before\nafter a\nafter b\nafter c\n"
    assert not [output for output in kept if "dlia" in output.get("metadata", {})]


def test_the_terminal_is_told_section_and_epoch_and_the_error_surfaces(executed):
    _, told, error = executed
    assert error.evalue == "on purpose"
    assert re.search(r"\r\[3/5\] 2 Training \| train a: epoch \d of 4, loss 0.123, ", told)
    last = told.rstrip().rsplit("\r", 1)[-1]
    assert told.endswith("\n") and last.startswith("[5/5] 3 Failing | 00:")
    assert "DLIA_STATUS" not in os.environ
