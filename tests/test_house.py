"""The budgets of the house: lines, imports, names, and the map that is drawn from them."""

import ast
import graphlib
import io
import re
import subprocess
import sys
import token
import tokenize

import pytest

from tools import house
from tools.notebooks import REPOSITORY

# Lines of code: without docstrings, comments and blank lines, which nobody should save on.
BUDGET = {"dlia_utils": 11_500, "tools": 1_200}
IN_ALL = {"dlia_utils": 17_000, "tools": 1_600}  # what stands today is the most there may be
NO_CODE = {token.COMMENT, token.NL, token.NEWLINE, token.INDENT, token.DEDENT, token.ENDMARKER}
LONGEST = 60
RUN_KNOWN_BY = {
    "study",
    "suite",
    "report",
    "execute",
    "__main__",
    "detect.job",
}  # what knows a profile
MANY_PARAMETERS = {("train", "fit"), ("attacks.evaluate", "robust")}


def lines(folder):
    return sum(len(path.read_text().splitlines()) for path in (REPOSITORY / folder).rglob("*.py"))


def functions():
    """(module, function) of the package, methods and nested ones too."""
    for module, path in house.modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def code_lines(path):
    """How many lines of a file hold code, strings within code among them."""
    text = path.read_text()
    with_code = set()
    for one in tokenize.generate_tokens(io.StringIO(text).readline):
        if one.type not in NO_CODE:
            with_code |= set(range(one.start[0], one.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and docstring(node):
            with_code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(with_code)


@pytest.mark.parametrize("folder", BUDGET)
def test_lines(folder):
    assert sum(map(code_lines, (REPOSITORY / folder).rglob("*.py"))) <= BUDGET[folder]
    assert lines(folder) <= IN_ALL[folder]


def test_lines_of_code_are_counted(tmp_path):
    text = (
        '"One."\n\n# two\ndef f():\n    """Three.\n\n    Four."""\n    return [\n        1\n    ]\n'
    )
    (tmp_path / "a.py").write_text(text)
    assert code_lines(tmp_path / "a.py") == 4


def test_tests_have_no_more_lines_than_the_package():
    assert lines("tests") <= lines("dlia_utils")


@pytest.mark.parametrize("group", [lambda module: module, house.room], ids=["files", "rooms"])
def test_no_circle(group):
    graphlib.TopologicalSorter(house.arrows(group)).prepare()  # raises CycleError that names it


def test_no_private_name_is_imported():
    imports = list(house.imports())
    assert not [one for one in imports if re.match("_(?!_)", one[2])]
    # Nor reached through a module: from . import x; x._name
    for module, path in house.modules().items():
        tree = ast.parse(path.read_text())
        taken = {other.split(".")[-1] for owner, other, _ in imports if owner == module}
        reached = [
            f"{module}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr)
            if isinstance(node.value, ast.Name) and node.value.id in taken
        ]
        assert not reached


def test_only_study_and_report_know_the_run():
    assert {module for module, other, _ in house.imports() if other == "run"} <= RUN_KNOWN_BY


def test_functions_are_short():
    long = [(m, f.name, f.end_lineno - f.lineno + 1 - docstring(f)) for m, f in functions()]
    assert not [one for one in long if one[2] > LONGEST]


def docstring(function):
    """How many lines the docstring of a function, class or module takes."""
    if not function.body:
        return 0
    first = function.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    is_text = is_text and isinstance(first.value.value, str)
    return first.end_lineno - first.lineno + 1 if is_text else 0


def test_functions_have_few_parameters():
    many = [(m, f.name) for m, f in functions() if sum(map(len, parameters(f))) > 10]
    assert set(many) <= MANY_PARAMETERS


def parameters(function):
    own = function.args
    return own.posonlyargs, own.args, own.kwonlyargs


def test_nothing_escapes_the_formatter():
    for folder in ("dlia_utils", "tools", "tests", "benchmarks", "notebooks/src"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert (
                not re.search(r"# *fmt: *(off|skip)", path.read_text())
                or path.name == "test_house.py"
            )
    check = [sys.executable, "-m", "ruff", "format", "--check", "--quiet", "."]
    assert subprocess.run(check, cwd=REPOSITORY, check=False).returncode == 0


def test_the_map_is_drawn_from_the_imports():
    text = house.PAGE.read_text(encoding="utf-8")
    assert house.fill(text, {"map": house.drawing()}) == text, "run: python -m tools tables"
