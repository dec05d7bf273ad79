"""The logger of this package, ``cowfs.fuse``. It is imported when something must be said for the first time: most
servers never do, and a mount is to answer within a fifth of a second, Python's start included."""

from __future__ import annotations

from typing import Any


def warning(message: str, *arguments: object) -> None:
    """Something odd that harms nobody."""
    _logger().warning(message, *arguments)


def error(message: str, *arguments: object) -> None:
    """Something that went wrong, without a traceback."""
    _logger().error(message, *arguments)


def exception(message: str, *arguments: object) -> None:
    """A bug; call inside ``except``: the traceback is logged."""
    _logger().exception(message, *arguments)


def no_memory(message: str, *arguments: object) -> None:
    """Memory ran out; nothing is raised, and nothing said where there is none even for that."""
    try:
        _logger().error(message + ": out of memory", *arguments)
    except MemoryError:
        pass


def _logger() -> Any:
    import logging

    return logging.getLogger("cowfs.fuse")
