"""Loggers, one a part: ``cowfs.store``, ``cowfs.mounting``, ``cowfs.images``, ``cowfs.cli`` (``cowfs.fuse`` and ``cowfs.service`` have modules of their own).

Strategy: the standard library's :mod:`logging` takes longer to import than most verbs run. An application that wants to see what is logged
has imported it itself, so as long as nobody has, nothing is logged.
"""

from __future__ import annotations

import sys

__all__ = ["Part"]


class Part:
    """The logger of a part, as far as :mod:`logging` is imported.

    Args:
        name: of the logger.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def info(self, message: str, *arguments: object) -> None:
        """Something was done."""
        if "logging" in sys.modules:
            import logging  # another thread may be in the middle of its import: this waits for it

            logging.getLogger(self.name).info(message, *arguments)

    def trace(self, message: str) -> None:
        """Call inside ``except``: where it came from."""
        if "logging" in sys.modules:
            import logging

            logging.getLogger(self.name).debug(message, exc_info=True)

    def debug(self, message: str, *arguments: object) -> None:
        """How it was done."""
        if "logging" in sys.modules:
            import logging

            logging.getLogger(self.name).debug(message, *arguments)
