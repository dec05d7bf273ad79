"""The daemon's log: one record a line, as text or JSON, with the id of the exchange in each line that belongs to one.

Strategy: the standard library's logging with one handler; the exchange's id is a context variable, so that no function
has to pass it on. Rule: a line never holds a header, a body or an environment variable, since these may hold secrets.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import TextIO

__all__ = ["exchange_id", "log", "set_up"]

log = logging.getLogger("cowfs.service")

exchange_id: contextvars.ContextVar[str] = contextvars.ContextVar("cowfs_exchange", default="")

LEVELS = ("debug", "info", "warning", "error")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        told = exchange_id.get()
        line = f"{stamp} {record.levelname.lower():<7} {f'[{told}] ' if told else ''}{record.getMessage()}"
        line = line.replace("\n", "\\n").replace("\r", "\\r")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if exchange_id.get():
            told["exchange"] = exchange_id.get()
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def set_up(*, level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Set up or change the log.

    Args:
        level: one of :data:`LEVELS`.
        format: ``text`` or ``json``.
        stream: default: standard error.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper())
