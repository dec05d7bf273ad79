"""Contracts of the API: typed records for requests and answers.

Strategy. A record is a frozen dataclass whose fields have the names of Docker's API (moby's ``api/swagger.yaml``), so
that a document and its record can be compared by eye. One decoder turns a JSON object into a record and checks every type by
the annotations; unknown fields are ignored, as Docker does, and null is a field's default. Numbers are of 64 bits, strings are
text without NUL: nothing behind the API could hold others. One encoder does the reverse.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from cowfs.service.errors import ApiError

__all__ = ["decode", "encode"]

T = TypeVar("T")


@functools.cache
def _kinds(record: Any) -> dict[str, Any]:
    hints: dict[str, Any] = typing.get_type_hints(record)
    return hints


def decode(record: type[T], document: Any, where: str = "") -> T:
    """A record from a JSON object.

    Raises:
        ApiError: 400: a value has the wrong type; the message names the field.
    """
    if not isinstance(document, dict):
        raise ApiError(400, f"{where or 'the body'} is no object")
    kinds = _kinds(cast("Hashable", record))
    found = {}
    for each in fields(record):  # type: ignore[arg-type]
        value = document.get(each.name)
        if value is not None:
            found[each.name] = _value(kinds[each.name], value, f"{where}.{each.name}" if where else each.name)
    return record(**found)


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, where)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return decode(typing.cast("type[Any]", kind), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ApiError(400, f"{where} is no list")
        return [_value(args[0], item, f"{where}[{at}]") for at, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ApiError(400, f"{where} is no object")
        return {_text(key, where): _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ApiError(400, f"{where} is no {_NAMES.get(kind, kind)}")
    if kind is str:
        return _text(value, where)
    if kind is int and not -(1 << 63) <= value < 1 << 63:
        raise ApiError(400, f"{where} is no whole number of 64 bits")
    return value


def _text(value: str, where: str) -> str:
    """A string that system calls and files can hold."""
    if "\0" in value:
        raise ApiError(400, f"{where} has a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{where} has half of a surrogate pair") from None
    return value


def _union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    """``X | None``, or a string beside a list of strings (Cmd, Entrypoint)."""
    if value is None:
        return None
    wanted = [kind for kind in args if kind is not type(None)]
    for kind in wanted:
        if type(value) is (typing.get_origin(kind) or kind):
            return _value(kind, value, where)
    return _value(wanted[-1], value, where)


_NAMES: dict[Any, str] = {str: "string", int: "whole number", float: "number", bool: "boolean"}


def encode(record: Any) -> Any:
    """JSON's form of a record; fields that are None stay, as null."""
    if is_dataclass(record) and not isinstance(record, type):
        return {each.name: encode(getattr(record, each.name)) for each in fields(record)}
    if isinstance(record, dict):
        return {key: encode(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [encode(value) for value in record]
    return record
