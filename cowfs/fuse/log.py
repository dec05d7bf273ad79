"""The logger of this package, ``cowfs.fuse``. It is imported with the first message: most servers have none, and a
mount should answer within a fifth of a second, Python's start included."""

from __future__ import annotations

from cowfs._typed import Any


def warning(message: str, *arguments: object) -> None:
    """Log a harmless oddity."""
    _logger().warning(message, *arguments)


def error(message: str, *arguments: object) -> None:
    """Log an error without a traceback."""
    _logger().error(message, *arguments)


def exception(message: str, *arguments: object) -> None:
    """Log a bug with its traceback; call inside ``except``."""
    _logger().exception(message, *arguments)


def no_memory(message: str, *arguments: object) -> None:
    """Log a lack of memory; never raises, and logs nothing if memory is short even for that."""
    try:
        _logger().error(message + ": out of memory", *arguments)
    except MemoryError:
        pass


def _logger() -> Any:
    import logging

    return logging.getLogger("cowfs.fuse")
