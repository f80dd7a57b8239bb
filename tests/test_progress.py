"""Bars in a log file, a terminal and a notebook, and what is told while a notebook runs."""

import io
import os
import re
import threading

import nbformat
import pytest

from dlia_utils import progress
from dlia_utils.progress import Bar
from tools import notebooks


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(capsys):
    """What was written, without the times."""
    return [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()]


def tellers():
    return [thread for thread in threading.enumerate() if "_narrate" in thread.name]


# ---------------------------------------------------------------------------------- log files


def test_a_log_file_gets_one_finished_line(capsys):
    with Bar(total=300, desc="drift", unit="image") as bar:
        for _ in range(300):
            bar.update()
            bar.set_postfix(standing=3)
    assert lines(capsys) == ["drift: standing=3, 300 images"]


def test_a_log_file_gets_a_line_for_each_mark(capsys):
    with Bar(total=20, desc="train cnn", unit="batch") as bar:
        for epoch in (1, 2):
            for _ in range(10):
                bar.update()
            bar.mark(f"epoch {epoch} of 2, loss 0.{epoch}")
    assert lines(capsys) == [
        "train cnn: epoch 1 of 2, loss 0.1",
        "train cnn: epoch 2 of 2, loss 0.2",
    ]


@pytest.mark.parametrize("options", [{"disable": True}, {"leave": False}, {"delay": 60}])
def test_these_leave_nothing(capsys, options):
    with Bar(range(5), **options) as bar:
        for _ in bar:
            bar.set_postfix_str("a")
        bar.mark("b") if "disable" in options else None
    assert lines(capsys) == []


def test_a_loop_left_early_says_how_far_it_came(capsys):
    for number in Bar(range(1000), desc="search"):
        if number == 5:
            break
    assert lines(capsys) == ["search: 5 of 1,000"]


def test_a_terminal_gets_the_bar_of_tqdm(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Bar(total=4, desc="drift") as bar:
        bar.update(4)
    assert "drift: 100%|" in terminal.getvalue() and "\r" in terminal.getvalue()


# -------------------------------------------------------------------------------- status file


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
            both = re.sub(r" \[.*?\]", "", path.read_text())
        one = re.sub(r" \[.*?\]", "", path.read_text())
    assert both == "train cnn: epoch 1 of 2, 0 of 4 batches > attacks: 1 of 3\n"
    assert one == "train cnn: epoch 1 of 2, 0 of 4 batches\n"
    assert path.read_text() == "\n"


def test_a_status_that_cannot_be_written_ends_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("DLIA_STATUS", str(tmp_path / "gone" / "status"))
    with Bar(total=4) as bar:
        bar.update(4)


# ---------------------------------------------------------------------------------- notebooks

THREE_BARS = """
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
with Bar(total=4, desc="off", disable=True) as bar:
    bar.update(4)
with Bar(total=4, desc="gone", leave=False) as bar:
    bar.update(4)
"""
FAILS = 'for _ in Bar(range(9), desc="broken"):\n    raise ValueError("on purpose")'


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A failing notebook with bars: as executed, what standard error was told, and the error."""
    folder, terminal = tmp_path_factory.mktemp("bars"), Terminal()
    v4 = nbformat.v4
    cells = [
        v4.new_markdown_cell("# Title"),
        v4.new_markdown_cell("## 2 Training\nwith text"),
        v4.new_code_cell(THREE_BARS),
        v4.new_markdown_cell("## 3 Failing"),
        v4.new_code_cell(FAILS),
        v4.new_code_cell("1"),
    ]
    notebooks.write(v4.new_notebook(cells=cells), folder / "in.ipynb")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception) as caught:
        patch.setattr("sys.stderr", terminal)
        notebooks.execute(folder / "in.ipynb", folder / "out.ipynb", cwd=notebooks.REPOSITORY)
    return notebooks.read(folder / "out.ipynb"), terminal.getvalue(), caught.value


def test_an_executed_notebook_holds_one_line_a_bar(executed):
    outputs = next(cell.outputs for cell in executed[0].cells if "abc" in cell.source)
    bars = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert [text.split(" [")[0] for text in bars] == [
        *(f"train {name}: epoch 4 of 4, loss 0.123" for name in "abc"),
        "",  # leave=False
    ]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_cleaning_drops_bars_and_joins_the_text_around_them(executed):
    notebook = notebooks.clean(nbformat.from_dict(executed[0]))
    outputs = next(cell.outputs for cell in notebook.cells if "abc" in cell.source)
    assert [(output.name, output.text) for output in outputs] == [
        ("stdout", "before\nafter a\nafter b\nafter c\n")
    ]
    kept = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in kept if "dlia" in output.get("metadata", {})]


def test_the_terminal_is_told_section_and_epoch_and_the_error_surfaces(executed):
    from papermill.exceptions import PapermillExecutionError

    _, told, error = executed
    assert isinstance(error, PapermillExecutionError) and error.evalue == "on purpose"
    assert re.search(r"\r\[3/6\] 2 Training \| train a: epoch \d of 4, loss 0.123, ", told)
    last = told.rstrip().rsplit("\r", 1)[-1]
    assert told.endswith("\n") and last.startswith("[5/6] 3 Failing | 00:") and not tellers()
    assert "DLIA_STATUS" not in os.environ


def test_a_log_of_a_run_gets_a_line_for_each_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "SECONDS_BETWEEN_LINES", 0)
    log, status, over = io.StringIO(), tmp_path / "status", threading.Event()
    cells = [nbformat.v4.new_markdown_cell("## 2 Training"), nbformat.v4.new_code_cell("fit()")]
    at = {"cells": cells, "number": 2}
    texts = iter(
        ["", *(f"a: epoch {epoch} of 2 [00:01]" for epoch in "11"), "\n", "a: epoch 2 of 2 [00:03]"]
    )

    def next_status(seconds):
        text = next(texts, None)
        status.write_text(text or "")
        return text is None

    monkeypatch.setattr(over, "wait", next_status)
    notebooks._narrate(log, at, status, over)
    assert [line.rsplit(" | ", 1)[0] for line in log.getvalue().splitlines()] == [
        "[2/2] 2 Training",
        "[2/2] 2 Training | a: epoch 1 of 2 [00:01]",
        "[2/2] 2 Training | a: epoch 2 of 2 [00:03]",
    ]


def test_silence_without_progress():
    with notebooks._narrated(None) as (hooks, status):
        assert hooks == {} and status is None


def test_an_interrupt_ends_the_teller():
    with pytest.raises(KeyboardInterrupt), notebooks._narrated(io.StringIO()) as (hooks, _):
        assert set(hooks) == {"on_notebook_start", "on_cell_start"} and len(tellers()) == 1
        raise KeyboardInterrupt
    assert not tellers()
