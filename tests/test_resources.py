"""Time and memory of a block against what it is known to use."""

import logging
import mmap
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from dlia_utils import resources


def burn(seconds):
    """Use the CPU for so long."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_memory_that_comes_and_goes_inside_a_block_shows_in_its_peak():
    with resources.track("allocation") as row:
        memory = mmap.mmap(
            -1, 200 * resources.MIB
        )  # given back for certain when closed, unlike an array
        pages = np.frombuffer(memory, np.uint8)
        pages[::4096] = 1
        latest = time.monotonic() + 30  # a busy machine may keep the watcher waiting
        while row["rss_peak_mib"] < row["rss_start_mib"] + 190 and time.monotonic() < latest:
            time.sleep(resources.INTERVAL / 4)
        del pages
        memory.close()
    assert 190 <= row["rss_peak_mib"] - row["rss_start_mib"] <= 260
    with resources.track("nothing") as row:
        pass
    assert row["rss_peak_mib"] - row["rss_start_mib"] < 50


def test_a_busy_block_uses_cpu_and_a_sleeping_one_does_not():
    with resources.track("busy") as row:
        burn(0.3)
    assert 0.25 <= row["cpu_s"] <= 0.6 and row["wall_s"] >= 0.29
    with resources.track("asleep") as row:
        time.sleep(0.4)
    assert row["cpu_s"] <= 0.15 and row["wall_s"] >= 0.4


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="child times are counted on Linux only"
)
def test_child_processes_count():
    code = "import time\nwhile time.process_time() < 0.3: pass"
    with resources.track("child") as row:
        subprocess.run([sys.executable, "-S", "-c", code], check=True)
    assert row["cpu_s"] >= 0.28


def test_the_log_has_one_line_and_the_file_one_row_that_reads_back(tmp_path, caplog):
    with (
        caplog.at_level(logging.INFO, logger="dlia_utils"),
        resources.track("drift, plain", folder=tmp_path / "run") as row,
    ):
        pass
    (record,) = caplog.records
    said = r"drift, plain: \d+\.\d s, CPU \d+\.\d s, memory \d+ MiB at first and \d+ MiB at most"
    assert record.levelname == "INFO" and re.fullmatch(said, record.getMessage())
    table = resources.table(tmp_path / "run")
    assert list(table.columns) == list(resources.COLUMNS) == list(table.loc[0].index)
    assert (
        table.loc[0, "label"] == "drift, plain"
        and table.loc[0, "failed"] == ""
        and table["gpu_peak_mib"].isna().all()
    )
    for column in ("wall_s", "cpu_s", "rss_start_mib", "rss_peak_mib"):
        assert table.loc[0, column] == pytest.approx(row[column], abs=6e-4)


def test_a_resumed_run_appends_and_leaves_what_was_there(tmp_path):
    with resources.track("NA", folder=tmp_path):
        pass
    before = (tmp_path / resources.FILE).read_text()
    with resources.track("second", folder=tmp_path):
        pass
    after = (tmp_path / resources.FILE).read_text()
    assert after.startswith(before) and after.count("\n") == 3
    assert resources.table(tmp_path)["label"].tolist() == ["NA", "second"]
    assert [path.name for path in tmp_path.iterdir()] == [resources.FILE]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_its_row_and_the_error_goes_on(tmp_path, caplog, error):
    with caplog.at_level(logging.INFO, logger="dlia_utils"), pytest.raises(error):
        with resources.track("broken", folder=tmp_path):
            burn(0.05)
            raise error("gone")
    row = resources.table(tmp_path).loc[0]
    assert row["failed"] == error.__name__ and row["cpu_s"] > 0
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith(
        f"ended by {error.__name__}"
    )


def test_no_watcher_is_left_behind():
    before = threading.active_count()
    with resources.track("outer"), resources.track("inner"):
        assert threading.active_count() == before + 2
    assert threading.active_count() == before and not resources._OPEN


def test_blocks_inside_one_another_have_gpu_peaks_of_their_own(monkeypatch, caplog):
    used = {"now": 0, "peak": 0}

    def use(mib):
        used["now"] = mib * resources.MIB
        used["peak"] = max(used["peak"], used["now"])

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device: used["peak"] if device == 1 else 0
    )
    monkeypatch.setattr(
        torch.cuda,
        "reset_peak_memory_stats",
        lambda device: used.update(peak=used["now"]) if device == 1 else None,
    )
    use(900)
    use(0)  # before the blocks, so in none of them
    with caplog.at_level(logging.INFO, logger="dlia_utils"), resources.track("outer") as outer:
        use(500)
        use(10)
        with resources.track("small") as small:
            use(20)
        with resources.track("large") as large:
            use(700)
        use(5)
    peaks = [row["gpu_peak_mib"] for row in (small, large, outer)]
    assert peaks == [20, 700, 700]
    assert [
        record.getMessage().endswith(f"GPU at most {peak} MiB")
        for record, peak in zip(caplog.records, (20, 700, 700), strict=True)
    ] == [True] * 3


def test_what_cannot_be_told_or_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label is empty"), resources.track(" "):
        pass
    with pytest.raises(FileNotFoundError, match="run a step under track"):
        resources.table(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError), resources.track("x", folder=file):
        pytest.fail("the block must not begin when its row has no place")
