"""Rules of the house that no linter knows, held over the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("cowfs", "drivers", "benchmarks")


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """(path below the repository, syntax tree) of each module."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_no_sql_outside_the_index() -> None:
    """Only cowfs/index runs statements; everybody else calls a named verb of it."""
    found = [
        f"{path}:{node.lineno}"
        for path, tree in modules("cowfs", "drivers")
        if not path.startswith("cowfs/index/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("execute", "executemany", "executescript")
    ]
    assert found == []


def test_no_module_is_longer_than_600_lines() -> None:
    """A longer one hides a second concept."""
    found = [
        f"{path}: {lines} lines"
        for folder in SOURCES
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := path.read_text().count("\n")) > 600
    ]
    assert found == []


def test_nobody_asks_what_a_thing_is_by_its_attributes() -> None:
    """No ``hasattr``; ``getattr`` by a fixed name only of modules, and of errors and objects that others made."""
    others = {"os", "error", "result", "metafunc.module", "item", "store.store"}
    found = []
    for path, tree in modules(*SOURCES):
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                fixed = isinstance(node.args[1], ast.Constant)
                if node.func.id == "hasattr" or (fixed and ast.unparse(node.args[0]) not in others):
                    found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
