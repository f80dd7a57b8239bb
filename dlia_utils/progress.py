"""Progress bars for a terminal, a notebook (one line, updated in place) or a log file.

`Bar` is tqdm, and takes what tqdm takes, by name. If DLIA_STATUS names a file, it holds the line of
the moment, for the process that shows a terminal.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import uuid
import warnings
from pathlib import Path
from weakref import WeakValueDictionary

from tqdm.std import tqdm

with warnings.catch_warnings():
    # Others (accelerate) import it, and the first import complains of widgets that nobody needs.
    warnings.simplefilter("ignore")
    importlib.import_module("tqdm.auto")

INTERVAL = 0.5  # seconds between two lines, at least
MARK = {"dlia": "progress"}  # metadata of a bar's output in a notebook
STATUS = "DLIA_STATUS"


class Bar(tqdm):
    """tqdm, but one output in a notebook's cell, and in a log file one line when it is finished.

    >>> with Bar(total=3, desc="drift", disable=True) as bar:
    ...     bar.update(2)
    """

    monitor_interval = 0  # tqdm's thread would draw into another cell; miniters=1 needs none
    open: WeakValueDictionary[int, Bar] = WeakValueDictionary()  # the outermost first
    told = 0.0

    def __init__(self, iterable=None, **options) -> None:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
        self.place = "terminal" if terminal else "log"
        self.place = "notebook" if getattr(shell, "kernel", None) is not None else self.place
        self.shown, self.marked, self.output = 0.0, None, ""
        # With gui=True tqdm itself draws nothing.
        super().__init__(iterable, **{"miniters": 1, "gui": self.place != "terminal"} | options)
        if not self.disable:
            Bar.open[id(self)] = self
            if self.place != "terminal":  # there tqdm itself has shown it
                self.display()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the bar as it is now; tqdm calls this."""
        drawn = super().display(msg, pos) if self.place == "terminal" else True
        if self.place == "notebook" and self.due and time.time() >= self.shown + INTERVAL:
            self._publish(self.line())
        self._tell()
        return drawn

    def mark(self, text: str) -> None:
        """Say what is reached, such as an epoch and its loss; in a log file this is a line."""
        if not self.disable:
            self.set_postfix_str(text)
            self.marked = self.n, self.postfix
            if self.place == "log":
                self.fp.write(f"{self.line(finished=True)}\n")

    def close(self) -> None:
        """End the bar and leave one line, or nothing with leave=False."""
        if getattr(self, "disable", True):
            return
        if self.place == "terminal":
            super().close()
        else:
            self.disable = True
            self._decr_instances(self)
            line = self.line(finished=True)
            if self.output:  # else it was over before its delay
                self._publish(line if self.leave else "")
            told = self.marked == (self.n, self.postfix)
            if self.place == "log" and self.leave and self.due and not told:
                self.fp.write(f"{line}\n")
        Bar.open.pop(id(self), None)
        self._tell(at_once=True)

    @property
    def due(self) -> bool:
        """Whether the bar's `delay` is over."""
        return time.time() >= self.start_t + self.delay

    def line(self, *, finished: bool = False) -> str:
        """The bar in words, as 'drift: 20 of 80 images [00:05, 00:15 left]'; a mark ends it."""
        state, n, total, done = self.format_dict, self.n, self.total, self.n - self.initial
        unit = {"it": "", "batch": " batches"}.get(self.unit, f" {self.unit}s")
        count = f"{n:,}{unit}" if total in (None, n) else f"{n:,} of {total:,}{unit}"
        clock = tqdm.format_interval(state["elapsed"])
        if not finished and total and done > 0:
            speed = state["rate"] or done / max(state["elapsed"], 1e-9)
            clock += f", {tqdm.format_interval(max(total - n, 0) / speed)} left"
        told = [self.postfix, None if self.marked and finished else count]
        return f"{self.desc.rstrip(': ') or 'progress'}: {', '.join(filter(None, told))} [{clock}]"

    def _publish(self, text: str) -> None:
        from IPython.display import display

        old, self.output = self.output, self.output or uuid.uuid4().hex
        how = {"raw": True, "metadata": MARK, "display_id": self.output, "update": bool(old)}
        display({"text/plain": text}, **how)
        self.shown = time.time()

    def _tell(self, *, at_once: bool = False) -> None:
        """Write the lines of the open bars to the file that DLIA_STATUS names."""
        if os.environ.get(STATUS) and (at_once or time.time() >= Bar.told + INTERVAL):
            text = " > ".join(bar.line() for bar in Bar.open.values() if bar.due)
            with contextlib.suppress(OSError):  # a status that cannot be told must not end the work
                Path(os.environ[STATUS]).write_text(f"{text}\n", encoding="utf-8")
            Bar.told = time.time()
