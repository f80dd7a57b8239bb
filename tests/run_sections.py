"""Run every section of a notebook behind its opening cells, each in a fork; see test_copy.py.

Reads {"opening": [cell, ...], "sections": {title: [cell, ...]}, "untrained": bool} from the file
named first, and writes {title: {"error": "", "output": "..."}} to the second, without the
repository. Untrained: a section ends, without an error, where it would begin to train.
"""

import json
import os
import sys
import tempfile
import traceback

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config


def run(shell, cells):
    for cell in cells:
        shell.run_cell(cell).raise_error()


class Begun(BaseException):
    """The section got as far as its first training."""


def begin(*_, **__):
    raise Begun


def run_section(shell, cells, untrained):
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as report:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            if untrained:
                sys.modules["dlia_utils.train"].fit = begin
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                run(shell, cells)
            except Begun:
                pass
            except BaseException:
                report.write(traceback.format_exc())
            sys.stdout.flush()
            report.flush()
            os._exit(0)  # no clean-up of the parent's things
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (output, report):
            file.seek(0)
        error = report.read() or (f"the process ended with status {code}" if code else "")
        return {"error": error, "output": output.read()}


def main(work, results):
    with open(work) as file:
        plan = json.load(file)
    config = Config()
    config.HistoryManager.enabled = False  # its thread would not live on in a child
    config.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=config)
    run(shell, plan["opening"])
    how = plan["untrained"]
    done = {title: run_section(shell, part, how) for title, part in plan["sections"].items()}
    with open(results, "w") as file:
        json.dump(done, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
