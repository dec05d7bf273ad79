"""Each public verb of a store can be read in help(): a real method, every argument named, typed and explained, errors told."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from cowfs import Store
from cowfs.errors import FailedPrecondition

VERBS = {
    name: member
    for name, member in inspect.getmembers(Store)
    if not name.startswith("_") and callable(member) and name != "same_data"
}

#: Arguments that get past the checks made before the store is looked at.
GIVEN: dict[str, Any] = {"labels": {}, "engine": "auto", "mount_type": None, "keys": "x"}
#: Verbs that look at what they were given before they look at the store.
FIRST = {"import_docker_host", "import_image", "import_opened"}


@pytest.mark.parametrize("name", VERBS)
def test_the_signature_is_explicit(name: str) -> None:
    """No ``*args``, no options of any kind but what a driver may have of its own; every argument typed."""
    signature = inspect.signature(VERBS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for each in signature.parameters.values():
        if each.name in ("self", "cls"):
            continue
        assert each.annotation not in (inspect.Parameter.empty, "Any"), each
        assert each.kind is not inspect.Parameter.VAR_KEYWORD or name == "open", each
        assert each.kind is not inspect.Parameter.VAR_POSITIONAL or (name, each.name) == ("fork", "keys"), each


@pytest.mark.parametrize("name", VERBS)
def test_the_docstring_is_whole(name: str) -> None:
    """Its own, not by reference to another: each argument by name, and the errors."""
    text = VERBS[name].__doc__ or ""
    assert "Raises:" in text
    assert not text.startswith("As :meth:")
    for each in inspect.signature(VERBS[name]).parameters:
        assert each in ("self", "cls") or each in text, each


def test_help_finds_the_verb_that_is_called() -> None:
    """One definition of each verb: no base class's is hidden behind an override that says less."""
    for name in ("mount", "open", "handle"):
        assert (
            sum(name in vars(cls) for cls in Store.__mro__ if cls.__module__ not in ("builtins", "cowfs.store.look"))
            == 1
        )


@pytest.mark.parametrize(
    "name", [name for name, verb in VERBS.items() if not inspect.ismethod(verb) and name not in {"close", *FIRST}]
)
def test_a_closed_store_refuses(name: str, tmp_path: Path) -> None:
    """Each verb, in one line that says what to do."""
    with Store.open(tmp_path / "store", driver="vfs") as store:
        pass
    given, named = [], {}
    for each in list(inspect.signature(VERBS[name]).parameters.values())[1:]:
        if each.default is not inspect.Parameter.empty:
            continue
        value = GIVEN.get(each.name, "x")
        if (name, each.name) == ("at", "path"):
            value = tmp_path / "store" / "layers" / "x"
        if each.kind is inspect.Parameter.KEYWORD_ONLY:
            named[each.name] = value
        else:
            given.append(value)

    def call() -> None:
        found = getattr(store, name)(*given, **named)
        if hasattr(found, "__enter__"):
            found.__enter__()
        elif hasattr(found, "__next__"):
            next(found)

    with pytest.raises(FailedPrecondition, match="is closed"):
        call()


def test_closing_twice_is_nothing(tmp_path: Path) -> None:
    """Idempotent."""
    store = Store.open(tmp_path / "store", driver="vfs")
    store.close()
    store.close()
