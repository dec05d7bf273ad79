"""The FUSE codec: one request parsed, one reply made."""

from __future__ import annotations

from typing import Any

from cowfs.fuse import abi, codec

_REQUEST = abi.IN_HEADER.pack(abi.IN_HEADER.size + 12, abi.LOOKUP, 7, 9, 0, 0, 1, 0, 0) + b"libpython3\0\0"[:12]


def test_parse_lookup(benchmark: Any) -> None:
    request = memoryview(_REQUEST[: abi.IN_HEADER.size] + b"libpython3.\0")
    assert benchmark(codec.parse, request).names == (b"libpython3.",)


def test_entry_reply(benchmark: Any) -> None:
    attr = bytes(abi.ATTR.size)
    assert len(benchmark(codec.entry, 7, 9, 0, attr)) > abi.ATTR.size


def test_error_reply(benchmark: Any) -> None:
    assert len(benchmark(codec.error, 7, 2)) == 16
