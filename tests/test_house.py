"""Rules of the house that no linter knows, held over the source itself."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

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
        for folder in (*SOURCES, "tests")
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


def _imports(name: str, path: Path, tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of ours that a module imports anywhere in it, type-checking imports counted."""
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return (found & known) - {name}


@functools.cache
def _graph() -> dict[str, set[str]]:
    packages = {"cowfs": "cowfs", "drivers": "cowfs_drivers", "benchmarks": "benchmarks"}
    paths: dict[str, Path] = {}
    for folder, package in packages.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            paths[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    known = set(paths)
    return {name: _imports(name, path, ast.parse(path.read_text()), known) for name, path in paths.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one module: each reaches each."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            for following in graph[pending.pop()] - seen:
                seen.add(following)
                pending.append(following)
        return seen

    reach = {name: reached(name) for name in graph}
    parts = {tuple(sorted({other for other in reach[name] if name in reach[other]})) for name in graph}
    return sorted(list(part) for part in parts if len(part) > 1)


def test_a_circle_is_found() -> None:
    """The search itself, on a small graph."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_circle_of_imports() -> None:
    """In cowfs, the drivers and the benchmarks, type-checking and late imports counted."""
    assert circles(_graph()) == []


#: Modules whose purpose is to import by name: lazy packages, installed drivers, the benchmarks that are there.
BY_STRING = {
    "cowfs/__init__.py",
    "cowfs/_lazy.py",
    "cowfs/cli/bench.py",
    "cowfs/cli/standby.py",
    "cowfs/driver/registry.py",
    "benchmarks/lab/suite.py",
}


def test_nothing_is_imported_by_string() -> None:
    """Readers and tools see who imports whom, but for what is found out only at run time."""
    found = {
        path
        for path, tree in modules(*SOURCES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute | ast.alias)
        and "import_module" in (getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", ""))
    }
    assert found <= BY_STRING


#: Records: their fields are the state that the operations around them change. Nodes and layer directories (union), members of an
#: archive and its directories, containers and their processes (under the container's lock), frames of a scan, results.
RECORDS = {
    "Node", "Dir", "Source", "Layer", "Blocks", "Member", "Container", "Exec", "Frame", "Full", "LayerWalk", "Result",
}  # fmt: skip
#: Names of variables for objects that argparse and the like made.
NOT_OURS = {"args", "parser", "failed", "sys"}


def _declared() -> dict[str, set[tuple[str, str]]]:
    """Attribute -> (path, class) of each class of ours that has it."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path, tree in modules(*SOURCES):
        for one in ast.walk(tree):
            if not isinstance(one, ast.ClassDef):
                continue
            for node in ast.walk(one):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and ast.unparse(node.value) == "self"
                ):
                    found.setdefault(node.attr, set()).add((path, one.name))
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.setdefault(node.target.id, set()).add((path, one.name))
    return found


def test_no_attribute_of_a_part_is_assigned_from_another_module() -> None:
    """A part that keeps an invariant changes itself; only records are changed from outside."""
    declared = _declared()
    found = []
    for path, tree in modules(*SOURCES):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
                continue
            base, owners = ast.unparse(node.value), declared.get(node.attr, set())
            if base in ("self", "cls", *NOT_OURS) or not owners or any(path == own for own, _ in owners):
                continue
            if not any(name in RECORDS for _, name in owners) or base.endswith(
                ("view", "tree", "server", "session", "store")
            ):
                found.append(f"{path}:{node.lineno}: {base}.{node.attr}")
    assert found == []


def test_fuse_serves_a_tree_and_knows_no_view() -> None:
    """Of union only: the packed attributes, the wait for forgets, what is read ahead."""
    allowed = {"cowfs.union.attr", "cowfs.union.bound", "cowfs.union.prefetch"}
    graph = _graph()
    fuse = {name for name in graph if name.startswith("cowfs.fuse")}
    assert {other for name in fuse for other in graph[name] if other.startswith("cowfs.union")} <= allowed


def test_test_modules_have_names_of_their_own() -> None:
    """Outside of packages pytest imports test modules by their name alone; a second one of a name ends a run of all."""
    seen: dict[str, Path] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if not (path.parent / "__init__.py").exists():
            assert path.name not in seen, f"{path} and {seen[path.name]}"
            seen[path.name] = path


def prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring and each comment of a module; the lines of a comment of several are one text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    begun = last = (0, 0)
    lines: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start != (last[0] + 1, last[1]):
            yield begun[0], "\n".join(lines)
            begun, lines = token.start, []
        last = token.start
        lines.append(token.string.lstrip("#: "))
    yield begun[0], "\n".join(lines)


#: A sentence begins at the start of a text, a paragraph or an item of a list, and after a full stop, a colon and the like.
RELATIVE = re.compile(r"(?:\A\s*|\n\s*\n\s*|\n\s*(?:[-*]|\d+\.)\s+|[.!?:;]\s+)(What|Who|Whoever|Whom|Whatever|Whose)\b")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""What it is."""', 1),
        ('"""A name: whatever it is. What it was."""', 1),
        ('"""A list:\n\n1. Who asks.\n- Whom it names.\n"""', 2),
        ("# Whoever comes\n# Whoever comes: one sentence\nx = 1  # Whose\n", 2),
        ('"""Somebody who\nWhat was begun goes on in this line."""', 0),
        ("What = 'What'  # the name What\n", 0),
    ],
)
def test_sentences_are_told_apart(source: str, found: int) -> None:
    """The check itself."""
    assert sum(len(RELATIVE.findall(text)) for _, text in prose(source)) == found


def test_no_sentence_begins_with_what_or_who() -> None:
    """The subject of a sentence is a noun: no relative clause stands for one, in docstrings and comments."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {' '.join(text[match.start() :].split())[:80]}"
        for folder in (*SOURCES, "tests", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in prose(path.read_text())
        for match in RELATIVE.finditer(text)
    ]
    assert found == []


PAGES = (
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
)


def test_no_sentence_of_the_documents_begins_with_what_or_who() -> None:
    """The same holds for pages: their headings, cells of tables and sentences, without the code that they show."""
    found = []
    for path in PAGES:
        text = re.sub(r"^```.*?^```|^<!--.*?-->", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"^#+ |^> ?|\*\*", "\n\n", text, flags=re.MULTILINE).replace("| ", "\n\n")
        found += [
            f"{path.relative_to(ROOT)}: {' '.join(text[match.start() :].split())[:80]}"
            for match in RELATIVE.finditer(text)
        ]
    assert found == []
