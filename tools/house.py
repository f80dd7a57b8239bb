"""The package's imports as a graph: for the test of its budgets, and the map in CONTRIBUTING.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from dlia_utils import files

from .notebooks import REPOSITORY
from .published import fill

PACKAGE = REPOSITORY / "dlia_utils"
PAGE = REPOSITORY / "CONTRIBUTING.md"
# Modules that stand together on the map, beside the rooms (folders), which are one box each.
FLOOR = {
    "base": "units device files progress",
    "metrics": "metrics calibration",
    "corruptions": "corrupt corruption_error smoothing shortcuts",
    "training": "train objectives launch search plan",
    "study": "run study report execute",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module, without the package's own name ("" for its __init__)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> Iterator[tuple[str, str, str]]:
    """(module, module that it imports, name that it takes), late imports as well."""
    known = modules()
    for module, path in known.items():
        home = path.parent.relative_to(REPOSITORY).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = home[: len(home) + 1 - node.level] if node.level else ()
            top, *parts = [*base, *(node.module.split(".") if node.module else ())]
            for alias in node.names if top == PACKAGE.name else ():
                whole = ".".join([*parts, alias.name])
                yield module, whole if whole in known else ".".join(parts), alias.name


def arrows(group=lambda module: module) -> dict[str, set[str]]:
    """Node -> nodes that it imports; `group` names a module's node (None leaves it out)."""
    found: dict[str, set[str]] = {}
    for module, other, _ in imports():
        start, end = group(module), group(other)
        if start and end:
            found.setdefault(start, set())
            found.setdefault(end, set())
            found[start] |= {end} - {start}
    return found


def room(module: str) -> str | None:
    """The box of a module on the map: its folder, its group on the floor, or itself."""
    if module in ("", "__main__"):
        return None
    top = module.split(".")[0]
    return next((name for name, members in FLOOR.items() if top in members.split()), top)


def drawing() -> str:
    """The map as a Mermaid diagram: an arrow from each room to those that use it."""
    graph = arrows(room)
    lines = ["```mermaid", "flowchart LR"]
    for name in sorted(graph):
        members = FLOOR.get(name, "").replace(" ", ", ")
        lines.append(f'    {name}["{name}: {members}"]' if members else f"    {name}")
    for name, to in sorted(graph.items()):
        # An arrow that follows from two others would only hide them.
        direct = {one for one in to if not any(one in graph[other] for other in to - {one})}
        lines += [f"    {one} --> {name}" for one in sorted(direct)]
    return "\n".join([*lines, "```"])


def draw() -> Path:
    """Write the map into CONTRIBUTING.md; returns the page."""
    return files.write_text(fill(PAGE.read_text(encoding="utf-8"), {"map": drawing()}), PAGE)
