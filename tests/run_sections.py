"""Run every section of a notebook behind its opening cells, each in a process of its own; see test_copy.py.

Reads {"opening": [cell, ...], "sections": {title: [cell, ...]}} from the file named first, and writes {title:
{"error": "", "seconds": 1.0, "output": "..."}} to the file named second. Nothing of the repository is imported.
"""

import json
import os
import sys
import tempfile
import time
import traceback

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config


def run(shell, cells):
    for cell in cells:
        shell.run_cell(cell).raise_error()


def run_copy(shell, cells, report):
    """In a forked child: run `cells`, write what went wrong to the open file `report`, and end the process."""
    status = 1
    try:
        run(shell, cells)
        status = 0
    except BaseException:
        report.write(traceback.format_exc())
    finally:
        sys.stdout.flush()
        report.flush()
        os._exit(status)  # no clean-up of the parent's things


def run_section(shell, cells):
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as report:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            run_copy(shell, cells, report)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (output, report):
            file.seek(0)
        error = report.read() or (f"the process ended with status {code}" if code else "")
        return {"error": error, "seconds": time.perf_counter() - start, "output": output.read()}


def main(work, results):
    with open(work) as file:
        plan = json.load(file)
    config = Config()
    config.HistoryManager.enabled = False  # its thread would not live on in a child
    config.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=config)
    run(shell, plan["opening"])
    done = {title: run_section(shell, cells) for title, cells in plan["sections"].items()}
    with open(results, "w") as file:
        json.dump(done, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
