"""Packages whose names are imported when they are first used (PEP 562): most verbs of the command need few of them.

A package lists its public names once, by the module that defines them, and takes its ``__getattr__`` from here::

    _EXPORTS = {"open_image": "cowfs.images.reading"}
    __getattr__ = exports(__name__, _EXPORTS)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["exports"]


def exports(package: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of a package, for a table from public name to ``module`` or ``module:name there``."""

    def find(name: str) -> object:
        place = names.get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, there = place.partition(":")
        import sys
        from importlib import import_module

        found: object = getattr(import_module(module), there or name)
        setattr(sys.modules[package], name, found)
        return found

    return find
