"""A tiny notebook in a suite of its own, to be built, checked, executed and pushed."""

import nbformat

from tools import notebooks

TINY = """\
# %% [markdown]
# # A tiny notebook
#
# **What you will learn** Nothing. **Before you start** Nothing. **Time** None.
#
# <!-- contents -->

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

given = dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES)
run = start("07_tiny", {"full": FULL}, given)
print(run)

# %% tags=["imports"]
import sys

# %% [markdown]
# ## 1 A section

# %%
value = 6 * 7
print("a bar: 50%|#####     | 1/2\\rdone", file=sys.stderr)
value

# %% [markdown]
# **What we learnt.** The answer.

# %% [markdown]
# ## Takeaways

# %% [markdown]
# ## Exercises
"""
SOLVED = """#
# <details><summary>Solution</summary>
#
# ```python
# print(6 * 7)
# ```
#
# </details>
"""
TINY += 3 * SOLVED


def write(folder, stem="07_tiny", text=TINY):
    """The source of a notebook in the suite `folder`; its notebook passes for executed."""
    source = folder / "src" / f"{stem}.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text)
    notebook = notebooks.build(source)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        cell.metadata["source_hash"] = notebooks.source_hash(cell.source)
        text = f"output {number}\n"
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    notebooks.write(notebook, notebooks.product(source))
    return source
