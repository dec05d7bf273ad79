"""Arguments of the verbs of the control socket: read from a message into the record that the verb takes, and checked.

Each verb's record stands beside the verb, in its module.

Rule: a message with an argument that its verb does not know, without one that it needs, or with a value of another type is
refused before the verb begins. Types are those of JSON; a field with a default may be left out.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cowfs._record import record
from cowfs.errors import InvalidArgument

__all__ = ["Counts", "Nothing", "read"]

_T = TypeVar("_T")
#: the fields of a message beside the arguments
_ENVELOPE = frozenset({"verb", "version", "stream"})
Counts = dict[str, int]
"""``bytes`` and ``inodes``."""


@record(frozen=True, slots=True, kw_only=True)
class Nothing:
    """No arguments."""


def read(kind: type[_T], message: Mapping[str, Any]) -> _T:
    """The arguments in a message.

    Raises:
        InvalidArgument: one is unknown, missing, or of another type.
    """
    from dataclasses import MISSING, fields

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
