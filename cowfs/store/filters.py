"""The filter language of ``walk``, which is containerd's.

A filter is a list of conditions separated by commas, all of which must hold; of several filters
one must. A condition is a field, or a field, an operator and a value::

    name==base,kind==committed     parent~=^sha256     labels."team"==storage     labels.keep

Fields: ``name``, ``parent``, ``kind``, ``labels.KEY`` (a KEY with dots or slashes in quotes).
Operators: ``==``, ``!=``, ``~=`` (a regular expression found anywhere). A field alone asks whether it is
there and not empty. Source: containerd, filters/filter.go, its package comment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from cowfs.errors import InvalidArgument
from cowfs.model import Info

__all__ = ["Filter", "parse"]

Filter = Callable[[Info], bool]

_CONDITION = re.compile(
    r"""(?P<field>[A-Za-z0-9_]+(?:\.(?:"(?:[^"\\]|\\.)*"|[A-Za-z0-9_./-]+))?)
        (?:(?P<operator>==|!=|~=)(?P<value>"(?:[^"\\]|\\.)*"|[^",]*))?(?:,|$)""",
    re.VERBOSE,
)


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


def _field(info: Info, name: str) -> str | None:
    head, _, rest = name.partition(".")
    if head == "labels" and rest:
        return info.labels.get(_unquote(rest))
    return {"name": info.name, "parent": info.parent or "", "kind": info.kind.value}[head]


def _condition(text: str, match: re.Match[str]) -> Filter:
    name, operator, value = match["field"], match["operator"], _unquote(match["value"] or "")
    head, _, rest = name.partition(".")
    if not (head == "labels" and rest) and name not in ("name", "parent", "kind"):
        raise InvalidArgument(f"no field {name!r} in filter {text!r}", remedy="name, parent, kind, labels.KEY")
    if operator == "~=":
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise InvalidArgument(f"bad pattern in filter {text!r}: {error}") from None
        return lambda info: pattern.search(_field(info, name) or "") is not None
    if operator == "!=":
        return lambda info: _field(info, name) != value
    if operator == "==":
        return lambda info: _field(info, name) == value
    return lambda info: bool(_field(info, name))


def parse(filters: Iterable[str]) -> Filter | None:
    """One test for all filters; None without filters.

    Raises:
        InvalidArgument: a malformed filter.
    """
    if isinstance(filters, str):
        filters = [filters]
    alternatives: list[list[Filter]] = []
    for text in filters:
        conditions, at = [], 0
        while at < len(text):
            match = _CONDITION.match(text, at)
            if match is None:
                raise InvalidArgument(
                    f"cannot read the filter {text!r} at {text[at:]!r}",
                    remedy="as in: kind==active  name~=^web  labels.team==storage",
                )
            conditions.append(_condition(text, match))
            at = match.end()
        alternatives.append(conditions)
    if not alternatives:
        return None
    return lambda info: any(all(test(info) for test in conditions) for conditions in alternatives)
