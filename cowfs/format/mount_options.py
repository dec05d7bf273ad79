"""The text of mount options that name paths: ``lowerdir=``, ``upperdir=``, ``workdir=``.

Rule, as the kernel reads them (fs/overlayfs/params.c): a backslash stands before each backslash, colon and comma of a path; a colon
separates layers, topmost first; a comma ends an option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["escape", "join_layers", "split_layers", "split_options", "unescape"]

_QUOTED = re.compile(r'\b((?:root|fs|def)?context)="[^"]*"')


def escape(path: str) -> str:
    r"""A path as one item of an option.

    >>> escape("a:b,c")
    'a\\:b\\,c'
    """
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def unescape(text: str) -> str:
    r"""A path without its backslashes.

    >>> unescape(r"a\:b\\c")
    'a:b\\c'
    """
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def join_layers(paths: Iterable[str]) -> str:
    r"""Paths as the value of ``lowerdir=``.

    >>> join_layers(["/a:b", "/c"])
    '/a\\:b:/c'
    """
    return ":".join(map(escape, paths))


def split_layers(text: str) -> list[str]:
    r"""Paths at colons that no backslash precedes; empty ones go.

    >>> split_layers(r"/a\:b:/c::d")
    ['/a:b', '/c', 'd']
    """
    return [unescape(part) for part in re.findall(r"(?:\\.|[^:\\]|\\$)*", text, re.DOTALL) if part]


def split_options(text: str) -> list[str]:
    """Options at commas that no backslash precedes; escapes stay, empty ones go, quoted contexts too.

    >>> split_options(r"lowerdir=a\\,b,,ro,")
    ['lowerdir=a\\\\,b', 'ro']
    """
    text = _QUOTED.sub(lambda match: match[1], text)
    return [part for part in re.findall(r"(?:\\.|[^,\\]|\\$)*", text, re.DOTALL) if part]
