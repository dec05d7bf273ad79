"""Printing: tables for people, JSON for programs, and file names that cannot harm a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cowfs.errors import InvalidArgument
from cowfs.model import Change, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

TEMPLATE = "template:"
"""How a way to print begins that is a template, not ``array`` or ``lines``."""


def note(args: argparse.Namespace, text: str) -> None:
    """Print a note on standard error; -q leaves it out."""
    if not args.quiet:
        print(text, file=sys.stderr)


def print_json(value: Any, how: str = "array") -> None:
    """One JSON document, an array of objects also where there is one; with ``how`` of ``lines`` one object a line.

    Names that are not UTF-8 keep their bytes as surrogates (\\udcXX), and are there exactly as ``KEY_b64``, too.
    """
    items = value if isinstance(value, list) else [value]
    if how.startswith(TEMPLATE):
        for item in items:
            print(rendered(how[len(TEMPLATE) :], item))
        return
    if how == "lines":
        for item in items:
            print(dumped(item))
    else:
        print(dumped(items, indent=2 if sys.stdout.isatty() else None))


def dumped(value: Any, indent: int | None = None) -> str:
    r"""A JSON document; a string that is no UTF-8 also exactly, its bytes as ``KEY_b64``.

    >>> dumped({"upper": "/\udcff", "layers": ["a"]})
    '{"upper": "/\\udcff", "upper_b64": "L/8=", "layers": ["a"]}'
    """
    import json

    text = json.dumps(value, indent=indent)
    return json.dumps(_exact(value), indent=indent) if "\\udc" in text else text


def _exact(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    made: dict[str, Any] = {}
    for key, item in value.items():
        made[key] = _exact(item)
        texts = item if isinstance(item, list | tuple) else [item]
        if any(isinstance(text, str) and _is_bytes(text) for text in texts) and f"{key}_b64" not in value:
            coded = [_b64(text) if isinstance(text, str) else text for text in texts]
            made[f"{key}_b64"] = coded if isinstance(item, list | tuple) else coded[0]
    return made


def _is_bytes(text: str) -> bool:
    return any("\udc80" <= char <= "\udcff" for char in text)


def _b64(text: str) -> str:
    from base64 import b64encode

    return b64encode(text.encode("utf-8", "surrogateescape")).decode()


def print_items(items: Iterable[Mapping[str, Any]], how: str, *, flush: bool = False) -> None:
    """Print objects as they arrive: with ``lines`` one a line, else one JSON array; ``flush``: each at once."""
    if how.startswith(TEMPLATE):
        for item in items:
            print(rendered(how[len(TEMPLATE) :], item), flush=flush)
        return
    if how == "lines":
        for item in items:
            print(dumped(item), flush=flush)
        return
    before = "["
    for item in items:
        print(before, dumped(item), sep="\n", end="")
        before = ","
    print("[]" if before == "[" else "\n]")


def path_fields(key: str, path: bytes) -> dict[str, str]:
    r"""A path as programs read it; one that is not UTF-8 also exactly, as ``KEY_b64``.

    >>> path_fields("path", b"a"), path_fields("path", b"\xff")["path_b64"]
    ({'path': 'a'}, '/w==')
    """
    text = path.decode("utf-8", "surrogateescape")
    return {key: text, f"{key}_b64": _b64(text)} if not text.isprintable() and _is_bytes(text) else {key: text}


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    for line in table_lines(head, rows):
        print(line)


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, with columns as wide as their widest cell."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


_AGES = (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1))


def age_of(nanoseconds: int) -> str:
    """The age of a time for people, in its largest unit."""
    import time

    seconds = max(0, time.time_ns() - nanoseconds) // 1_000_000_000
    for unit, length in _AGES:
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return "0s"


def rendered(template: str, item: Mapping[str, Any]) -> str:
    """An object by a template: ``{name}``, ``{usage.bytes:size}``, ``{created:age}``, ``{created:time}``, and Python's own format specs.

    ``\\t``, ``\\n`` and ``\\0`` are as in printf(1). A missing or null value is a dash; a list has commas.

    Raises:
        InvalidArgument: an unknown field, or a format that does not fit.
    """
    from string import Formatter

    parts = []
    try:
        for text, field, spec, _ in Formatter().parse(template):
            for escape, char in (("\\t", "\t"), ("\\n", "\n"), ("\\0", "\0")):
                text = text.replace(escape, char)
            parts.append(text)
            if field is not None:
                parts.append(_field(field, spec or "", item))
    except ValueError as error:
        raise InvalidArgument(f"not a template: {template!r}: {error}", remedy="as in '{name} {created:age}'") from None
    return "".join(parts)


def _field(field: str, spec: str, item: Mapping[str, Any]) -> str:
    value: Any = item
    for name in field.split("."):
        if value is None:
            break
        if not isinstance(value, Mapping) or name not in value:
            raise InvalidArgument(f"there is no field {field!r}", remedy=f"of {', '.join(item)}")
        value = value[name]
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if spec in ("size", "age", "time"):
        if not isinstance(value, int):
            raise InvalidArgument(f"{field!r} is no number, which :{spec} needs")
        return format_size(value) if spec == "size" else age_of(value) if spec == "age" else time_of(value)
    return format(shown(value) if isinstance(value, str) else value, spec)


def time_of(nanoseconds: int) -> str:
    """A time for people, local."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))


def shown(path: bytes | str) -> str:
    """A file name for a terminal: control characters and broken UTF-8 escaped, the rest as it is.

    >>> shown(b"a b"), shown(b"two\\nlines"), shown(b"\\xff")
    ('a b', 'two\\\\nlines', '\\\\xff')
    """
    text = path.decode("utf-8", "backslashreplace") if isinstance(path, bytes) else path
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size_or(value: int | None, none: str = "none") -> str:
    """A size for people."""
    return none if value is None else format_size(value)


def count_or(value: int | None, none: str = "none") -> str:
    """A count for people."""
    return none if value is None else f"{value:,}"


def change_as_json(change: Change) -> Mapping[str, Any]:
    """A change as programs read it."""
    return {
        **path_fields("path", b"/" + change.path),
        "kind": change.kind,
        "type": change.type,
        "size": change.size,
        **({"what": sorted(change.what)} if change.kind == "changed" else {}),
    }


_SIGNS = {"added": "A", "changed": "C", "deleted": "D"}


def change_line(change: Change) -> str:
    """A change as people read it: sign, path with a slash behind directories, and what changed.

    >>> change_line(Change(path=b"etc/passwd", kind="changed", type="file", size=900, what=frozenset({"mode"})))
    'C /etc/passwd (mode)'
    """
    slash = "/" if change.type == "dir" and change.path else ""
    what = f" ({', '.join(sorted(change.what))})" if change.what else ""
    return f"{_SIGNS[change.kind]} /{shown(change.path)}{slash}{what}"


class Tree:
    """Changes summed up by directory, for ``--stat``: counts of each kind and the bytes of present files."""

    def __init__(self) -> None:
        self.counts = {"added": 0, "changed": 0, "deleted": 0}
        self.bytes = 0
        self.children: dict[bytes, Tree] = {}

    def add(self, change: Change) -> None:
        """Count a change in every directory above it."""
        node = self
        node.count(change)
        for part in change.path.split(b"/") if change.path else ():
            node = node.children.setdefault(part, Tree())
            node.count(change)

    def count(self, change: Change) -> None:
        """Count a change at this place or below it."""
        self.counts[change.kind] += 1
        if change.kind != "deleted" and ("content" in change.what or change.kind == "added"):
            self.bytes += change.size

    def sums(self) -> str:
        """How much was added, changed and deleted, for people."""
        parts = [f"{sign}{self.counts[kind]:,}" for kind, sign in (("added", "+"), ("changed", "~"), ("deleted", "-"))
                 if self.counts[kind]]  # fmt: skip
        return " ".join(parts) + (f"  {format_size(self.bytes)}" if self.bytes else "")

    def lines(self, depth: int, name: str = "/", indent: str = "") -> Iterable[str]:
        """The tree down to ``depth`` levels. A chain of only children is one line."""
        node = self
        while len(node.children) == 1 and sum(node.counts.values()) == sum(
            next(iter(node.children.values())).counts.values()
        ):
            part, node = next(iter(node.children.items()))
            name = f"{name.rstrip('/')}/{shown(part)}"
        yield f"{indent}{name}  {node.sums()}"
        if depth > 0:
            for part, child in sorted(node.children.items()):
                yield from child.lines(depth - 1, shown(part), indent + "  ")
