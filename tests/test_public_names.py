"""Every public name has a docstring that names each of its arguments and fields, and says which errors it raises."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

PACKAGES = ("cowfs", "cowfs.driver", "cowfs.erofs", "cowfs.fuse", "cowfs.images", "cowfs.testing")
#: The word for a layer in every method of a driver, defined by the essay of cowfs.driver.interface.
DEFINED = {"cowfs.driver.interface": {"id"}}
#: tests/store/test_verbs.py holds the verbs of Store; a claim of the suite is its own name; a view's operations take nodes and
#: are described by cowfs.union.view.
ELSEWHERE = {"Store", "DriverSuite", "View"}


def public() -> Iterator[tuple[str, Any]]:
    """(name, object) of each public class and function."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found) or inspect.isfunction(found):
                yield f"{package}.{name}", found


def described(found: Any) -> Iterator[tuple[str, Any, set[str]]]:
    """(name, object, the arguments or fields that its docstring has to name) of an object and its public methods."""
    if inspect.isfunction(found):
        yield "", found, set(inspect.signature(found).parameters)
        return
    fields = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
    yield "", found, fields
    for name, member in vars(found).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield name, member, set()
        elif inspect.isfunction(inspect.unwrap(getattr(member, "__func__", member))):
            function = getattr(member, "__func__", member)
            yield name, function, set(inspect.signature(function).parameters) - {"self", "cls"}


@pytest.mark.parametrize(("name", "found"), [pytest.param(*each, id=each[0]) for each in public()])
def test_a_public_name_is_described_whole(name: str, found: Any) -> None:
    lacking = []
    for member, one, words in described(found):
        if member and found.__name__ in ELSEWHERE:
            continue
        text = inspect.getdoc(one) or ""
        words = words - DEFINED.get(found.__module__, set()) - {"args", "kwargs", "options"}
        missing = sorted(word for word in words if not re.search(rf"\b{re.escape(word)}\b", text))
        if not text or missing:
            lacking.append(f"{name}.{member}: {missing or 'no docstring'}".replace(".:", ":"))
    assert lacking == []
