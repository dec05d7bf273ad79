"""How a store is built: services over one context, put together in one table, behind a facade that decides nothing."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cowfs import Store
from cowfs.store.services import Services

STORE = Path(__file__).resolve().parents[2] / "cowfs" / "store"
VERBS = sorted(path.stem for path in (STORE / "verbs").glob("*.py") if path.stem != "__init__")


@cache
def _tree(path: str) -> ast.Module:
    return ast.parse((STORE / path).read_text())


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _methods(of: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    return (node for node in of.body if isinstance(node, ast.FunctionDef))


def _modules_of_services() -> dict[str, str]:
    """Class of each service -> its module."""
    found = {
        alias.name: node.module.rpartition(".")[2]
        for node in ast.walk(_tree("services.py"))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cowfs.store.")
        for alias in node.names
    }
    return {name: module for name, module in found.items() if name not in ("Context", "Recoverer")}


SERVICES = _modules_of_services()


def test_there_are_services() -> None:
    """Those below are all that there are."""
    assert len(SERVICES) > 25


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_inherits_nothing(name: str) -> None:
    """It is a class of its own, over what its constructor is given: the context (or the index) first."""
    of = _classes(_tree(f"{SERVICES[name]}.py"))[name]
    assert of.bases == []
    (made,) = (method for method in _methods(of) if method.name == "__init__")
    assert made.args.args[1].arg in ("context", "index")
    assert all(arg.annotation is not None for arg in made.args.args[1:])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_keeps_no_state(name: str) -> None:
    """All attributes are set at its making, so two of one kind are the same, in threads and after a fork."""
    of = _classes(_tree(f"{SERVICES[name]}.py"))[name]
    changed = [
        f"{method.name}: {ast.unparse(node)}"
        for method in _methods(of)
        if method.name != "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and not isinstance(node.ctx, ast.Load)
        and ast.unparse(node).startswith("self.")
    ]
    assert changed == []


@pytest.mark.parametrize("module", sorted(set(SERVICES.values())))
def test_a_service_knows_no_facade(module: str) -> None:
    """Neither the store, nor its verbs, nor the table of services; imports for types and within functions counted."""
    above = ("cowfs.store.store.", "cowfs.store.verbs.", "cowfs.store.services.", "cowfs.store.look.")
    found = [
        node.module
        for node in ast.walk(_tree(f"{module}.py"))
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(above)
    ]
    assert found == []
    assert not any(
        isinstance(node, ast.ImportFrom) and node.module == "cowfs.store" and "Store" in [x.name for x in node.names]
        for node in ast.walk(_tree(f"{module}.py"))
    )


def test_a_service_names_only_those_above_it() -> None:
    """The table is the order of the services: none needs one that comes later, so there is no circle."""
    made: set[str] = {"context"}
    for method in _methods(_classes(_tree("services.py"))["Services"]):
        names = [
            node.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
        ]
        if method.name == "__init__":
            made |= set(names)
        elif method.decorator_list and ast.unparse(method.decorator_list[0]) == "_made":
            assert set(names) <= made, method.name
            made.add(method.name)
    assert len(made) > 25


def test_recovery_is_given_makers_of_later_services() -> None:
    """The only ones that are named before they are made (the test above), and they are asked for when a note is found."""
    calls = [node for node in ast.walk(_tree("services.py")) if isinstance(node, ast.Call)]
    given = [each for call in calls if ast.unparse(call.func) == "Recoverer" for each in call.args]
    makers = [node for node in given if isinstance(node, ast.Lambda)]
    assert [ast.unparse(node.body) for node in makers] == ["self.switching", "self.restacking"]


def _delegations() -> Iterator[tuple[str, ast.FunctionDef]]:
    for module in VERBS:
        (of,) = _classes(_tree(f"verbs/{module}.py")).values()
        assert of.bases == []
        for method in _methods(of):
            yield f"{module}.{method.name}", method


@pytest.mark.parametrize(("name", "method"), list(_delegations()), ids=[name for name, _ in _delegations()])
def test_a_verb_is_one_call_of_a_service(name: str, method: ast.FunctionDef) -> None:
    """Its documentation, and a call that hands on every argument under its own name."""
    text, done = method.body
    assert isinstance(text, ast.Expr)
    assert isinstance(done, ast.Return | ast.Expr)
    called = done.value
    if isinstance(called, ast.Call):
        arguments = method.args
        handed = [ast.unparse(argument) for argument in called.args]
        expected = [one.arg for one in arguments.args[1:]]
        assert handed == expected + ([f"*{arguments.vararg.arg}"] if arguments.vararg else [])
        assert [(one.arg, ast.unparse(one.value)) for one in called.keywords] == [
            (one.arg, one.arg) for one in arguments.kwonlyargs
        ]
        called = called.func
    assert isinstance(called, ast.Attribute)
    assert ast.unparse(called).startswith("self.services.")
    assert ast.unparse(called).count(".") == 3


def test_a_verb_has_the_defaults_of_its_service(tmp_path: Path) -> None:
    """Names, kinds and defaults of the arguments are the same on both sides."""
    with Store.open(tmp_path / "store", driver="vfs") as store:
        for name, method in _delegations():
            called = method.body[1].value  # type: ignore[attr-defined]  # the test above holds what it is
            if not isinstance(called, ast.Call):
                continue
            assert isinstance(called.func, ast.Attribute)
            assert isinstance(called.func.value, ast.Attribute)
            service = getattr(store.services, called.func.value.attr)
            here = inspect.signature(getattr(Store, method.name)).parameters
            there = inspect.signature(getattr(type(service), called.func.attr)).parameters
            assert [(each.name, each.kind, each.default) for each in here.values()] == [
                (each.name, each.kind, each.default) for each in there.values()
            ], name


def test_a_service_is_made_once_for_each_store(tmp_path: Path) -> None:
    """Asked for again it is the one that is there; another store has its own."""
    with Store.open(tmp_path / "a", driver="vfs") as a, Store.open(tmp_path / "b", driver="vfs") as b:
        assert a.services.snapshots is a.services.snapshots
        assert a.services.snapshots is not b.services.snapshots
        assert a.services.snapshots.context is a.services.context


PROGRAM = """
import sys
from cowfs import Store
with Store.open(sys.argv[1], driver="overlay") as store:
    store.prepare("work", size="1G")
    store.commit("work", "base")
    store.usage("base")
    list(store.diff("base"))
    store.remove("base")
print(*sorted(name for name in sys.modules if name.startswith("cowfs")))
"""


def test_a_program_imports_what_its_verbs_need(tmp_path: Path) -> None:
    """One that prepares, commits, looks and removes: no archives, images, views, mounts' clients, or others' services."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store")], capture_output=True, text=True, check=True
    )
    found = run.stdout.split()
    others = ("cowfs.archive.", "cowfs.images.", "cowfs.fuse", "cowfs.row", "cowfs.erofs", "cowfs.mounting.client",
              "cowfs.union.view", "cowfs.cli", "cowfs.service", "cowfs.diff")  # fmt: skip
    assert [name for name in found if name.startswith(others)] == []
    services = {"applying", "exporting", "importing", "copying", "blocks", "checking", "describing", "running", "files", "live",
                "switching", "restacking", "squash", "house", "mounts", "kernel_mounts"}  # fmt: skip
    assert {name.removeprefix("cowfs.store.") for name in found} & services == set()
    assert Services.__module__ in found
