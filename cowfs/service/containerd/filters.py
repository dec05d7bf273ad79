r"""containerd's filter language, to the letter (containerd, pkg/filters: the grammar in parser.go, the tokens in scanner.go).

    selectors := selector ("," selector)*
    selector  := fieldpath [operator value]
    fieldpath := field ("." field)*
    field     := quoted | [_A-Za-z0-9]+
    operator  := "==" | "!=" | "~="
    value     := quoted | any character, then a run of graphic characters without comma
    quoted    := a string in double quotes with Go's escapes; the value of "~=" also in slashes or bars

White space (unicode.IsSpace of Go) before a token is skipped, behind a value it is an error, as is U+FFFD anywhere. All selectors of a filter must match, of several filters
one. A field alone tests its presence; ``name`` and ``parent`` are always present. A missing field is the empty string
for ``!=`` and ``~=``, and equals nothing. A pattern that cannot be compiled matches nothing. Patterns are Python's:
those that RE2 refuses (escapes, references and groups that look around) match nothing; ``\pL`` and ``\z`` of RE2 are not known.

The store's own filters (:mod:`cowfs.store.filters`) are stricter, for people.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from cowfs.errors import InvalidArgument
from cowfs.model import Info

__all__ = ["Filter", "parse_all"]

Filter = Callable[[Info], bool]

_FIELD = re.compile(r"[_A-Za-z0-9]+")
_OPERATOR = re.compile(r"[=!~]+")
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACE = re.compile(f"[{_SPACES}]*")
_NOT_RE2 = re.compile(r"(?<!\\)(?:\\\\)*(?:\\(?:[uUNZ]|[1-9](?![0-7]))|\((?:\?(?:[=!#>(]|<[=!]|P=)))")
_ESCAPE = re.compile(
    r"\\(?:(?P<simple>[abfnrtv\\])|(?P<octal>[0-7]{3})|x(?P<byte>[0-9a-fA-F]{2})"
    r"|u(?P<short>[0-9a-fA-F]{4})|U(?P<long>[0-9a-fA-F]{8})|(?P<quote>[\"/|]))"
)
_SIMPLE = {"a": b"\a", "b": b"\b", "f": b"\f", "n": b"\n", "r": b"\r", "t": b"\t", "v": b"\v", "\\": b"\\"}


class _Token(NamedTuple):
    kind: str  # quoted, separator, operator, value, field, end
    text: str
    at: int


class _Scanner:
    """The tokens of one filter. After an operator, text that is no token of another kind is a value."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self._value = False

    def peek(self) -> str:
        """The next character, a space included; "" at the end."""
        return self.text[self.at : self.at + 1]

    def fail(self, why: str, at: int | None = None) -> InvalidArgument:
        where = self.at if at is None else at
        return InvalidArgument(f"cannot read the filter {self.text!r} at {self.text[where:]!r}: {why}")

    def scan(self) -> _Token:
        """The next token.

        Raises:
            InvalidArgument: no token begins so.
        """
        found = _SPACE.match(self.text, self.at)
        at = self.at = found.end() if found else self.at
        first = self.peek()
        if not first:
            return _Token("end", "", at)
        if first in '/|"':
            return self._quoted(first)
        if first in ",.":
            self.at += 1
            self._value = False
            return _Token("separator", first, at)
        match = _OPERATOR.match(self.text, at)
        if match:
            self.at, self._value = match.end(), True
            return _Token("operator", match[0], at)
        if self._value:
            if first == "\0":
                raise self.fail("unexpected character")
            self.at += 1
            while self.peek() and _is_value(self.peek()):
                self.at += 1
            self._value = False
            return _Token("value", self.text[at : self.at], at)
        match = _FIELD.match(self.text, at)
        if not match:
            raise self.fail("unexpected character")
        self.at = match.end()
        return _Token("field", match[0], at)

    def _quoted(self, quote: str) -> _Token:
        begin = self.at
        at = begin + 1
        while self.text[at : at + 1] != quote:
            char = self.text[at : at + 1]
            if not char or char in "\n\0":
                raise self.fail("quoted text has no end", begin)
            at += 2 if char == "\\" else 1
        self.at = at + 1
        return _Token("quoted", self.text[begin : self.at], begin)


def _is_value(char: str) -> bool:
    return char != "," and char not in _SPACES and char.isprintable()


def _unquote(scanner: _Scanner, token: _Token, *, any_quote: bool = False) -> str:
    quote, inner = token.text[0], token.text[1:-1]
    if quote != '"' and not any_quote:
        raise scanner.fail("only a pattern may be quoted so", token.at)
    made, at = bytearray(), 0
    while at < len(inner):
        if inner[at] != "\\":
            made += inner[at].encode()
            at += 1
            continue
        match = _ESCAPE.match(inner, at)
        value = None if match is None else _escaped(match, quote)
        if match is None or value is None:
            raise scanner.fail("no such escape", token.at)
        made += value
        at = match.end()
    return made.decode("utf-8", "replace")


def _escaped(match: re.Match[str], quote: str) -> bytes | None:
    if match["simple"]:
        return _SIMPLE[match["simple"]]
    if match["quote"]:
        return quote.encode() if match["quote"] == quote else None
    if match["octal"] or match["byte"]:
        number = int(match["octal"], 8) if match["octal"] else int(match["byte"], 16)
        return bytes([number]) if number < 256 else None
    number = int(match["short"] or match["long"], 16)
    return chr(number).encode("utf-8", "replace") if number <= 0x10FFFF else None


def _field_of(info: Info, path: tuple[str, ...]) -> str | None:
    """A field of a snapshot; None if it is missing."""
    head, rest = path[0], ".".join(path[1:])
    values: Mapping[str, str] = {"name": info.name, "parent": info.parent or "", "kind": info.kind.value}
    return info.labels.get(rest) if head == "labels" else values.get(head)


def _selector(scanner: _Scanner) -> Filter:
    path = (_field(scanner), *_more_fields(scanner))
    if scanner.peek() in ("", ","):
        return lambda info: _field_of(info, path) is not None
    token = scanner.scan()
    if token.kind != "operator" or token.text not in ("==", "!=", "~="):
        raise scanner.fail("expected ==, != or ~=", token.at)
    operator = token.text
    token = scanner.scan()
    if token.kind == "quoted":
        value = _unquote(scanner, token, any_quote=operator == "~=")
    elif token.kind in ("value", "field"):
        value = token.text
    else:
        raise scanner.fail("expected a value", token.at)
    if operator == "==":
        return lambda info: _field_of(info, path) == value
    if operator == "!=":
        return lambda info: (_field_of(info, path) or "") != value
    try:
        pattern = re.compile(value)
    except re.error:
        return lambda info: False
    if _NOT_RE2.search(value):
        return lambda info: False
    return lambda info: pattern.search(_field_of(info, path) or "") is not None


def _field(scanner: _Scanner) -> str:
    token = scanner.scan()
    if token.kind == "field":
        return token.text
    if token.kind == "quoted":
        return _unquote(scanner, token)
    raise scanner.fail("expected a field", token.at)


def _more_fields(scanner: _Scanner) -> Iterable[str]:
    while scanner.peek() == ".":
        scanner.scan()
        yield _field(scanner)


def _parse(text: str) -> Filter:
    if not text:
        return lambda info: True
    scanner = _Scanner(text)
    if "\ufffd" in text:
        raise scanner.fail("not UTF-8", text.index("\ufffd"))
    selectors = [_selector(scanner)]
    while scanner.peek() == ",":
        scanner.scan()
        selectors.append(_selector(scanner))
    if scanner.peek():
        raise scanner.fail("unexpected input")
    return lambda info: all(selector(info) for selector in selectors)


def parse_all(filters: Iterable[str]) -> Filter:
    """One test for several filters, of which one must match; none match everything.

    Raises:
        InvalidArgument: one is malformed.
    """
    made = [_parse(text) for text in filters]
    return lambda info: not made or any(one(info) for one in made)
