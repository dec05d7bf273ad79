"""The arguments of each verb of the control socket: one record a verb, read from a message and checked.

Rule: a message with an argument that its verb does not know, without one that it needs, or with a value of another type is
refused before the verb begins. Types are those of JSON; a field with a default may be left out.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import EllipsisType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cowfs.errors import InvalidArgument

__all__ = [
    "Absorb", "Compact", "Freeze", "Limits", "Nothing", "Restack", "Rollback", "Statistics", "Subvolume", "Switch", "Umount",
    "read",
]  # fmt: skip

_T = TypeVar("_T")
#: what a message says beside the arguments
_ENVELOPE = frozenset({"verb", "version", "stream"})
Counts = dict[str, int]
"""``bytes`` and ``inodes``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """No arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``limit``: bytes and a count, None for none; what is left out stays."""

    bytes: int | EllipsisType | None = ...
    inodes: int | EllipsisType | None = ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Umount:
    """``umount``: at once, whoever is inside."""

    lazy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """``statistics``: whether requests are timed from now on; streamed: seconds from one answer to the next."""

    timed: bool = True
    interval: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """``compact``: files of which at least this share is their own, from 0 to 1."""

    share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The arguments that ``freeze`` and ``rollback`` share: the new upper layer, and what its directories will be called.

    Attributes:
        mark: a file that is made at the instant of the switch.
    """

    upper: str
    work: str
    final_upper: str
    final_work: str
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze(Switch):
    """``freeze``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback(Switch):
    """``rollback``: to the layer whose tree is ``layer``.

    Attributes:
        base: what counts for the limit although the new layer does not hold it, negative.
        lowers, num, index: how the view comes to scan what is to be dropped, if it reads it from the index (which it has
            open: the path is for servers that have not).
    """

    layer: str
    base: Counts
    lowers: list[str] = field(default_factory=list)
    num: int | None = None
    index: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subvolume:
    """``subvolume``: a snapshot of ``source`` called ``name`` in ``directory``."""

    source: str
    directory: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restack:
    """``restack``: other layers beneath.

    Attributes:
        lowers: the layers, topmost first.
        num: the snapshot in ``index`` whose tree they are; None: they are scanned.
        upper: the upper layer that the asker knows of.
        freed: what counts for the limit no more.
    """

    lowers: list[str]
    num: int | None
    index: str
    upper: str
    freed: Counts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorb:
    """``absorb``: take over what the topmost of ``lowers`` holds; fields as of :class:`Restack`.

    Attributes:
        empty: the layer to stand on when none is left.
        held: what the layer counted for the limit, when it counted.
        mark: a file that is made, with what was taken over as JSON, at the instant of the switch.
    """

    lowers: list[str]
    num: int | None
    index: str
    upper: str
    empty: str
    mark: str
    held: Counts | None = None


def read(kind: type[_T], message: Mapping[str, Any]) -> _T:
    """The arguments in a message.

    Raises:
        InvalidArgument: one is not known, not there, or of another type.
    """
    verb, hints = message.get("verb"), get_type_hints(kind)
    given = {name: value for name, value in message.items() if name not in _ENVELOPE}
    for name, value in given.items():
        if name not in hints:
            known = ", ".join(hints) or "it takes none"
            raise InvalidArgument(f"{verb} has no argument {name!r}", remedy=known)
        if not _fits(value, hints[name]):
            raise InvalidArgument(f"{verb}: {name} cannot be {value!r}", remedy=_said(hints[name]))
    for each in fields(kind):  # type: ignore[arg-type]  # only records come here
        if each.name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise InvalidArgument(f"{verb} needs the argument {each.name!r}", remedy=_said(hints[each.name]))
    return kind(**given)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value that came as JSON is of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _said(hint: Any) -> str:
    names = {"EllipsisType": "", "NoneType": "null", "ellipsis": ""}
    parts = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    words = [str(part) if get_args(part) else names.get(part.__name__, part.__name__) for part in parts]
    return " or ".join(word for word in words if word)
