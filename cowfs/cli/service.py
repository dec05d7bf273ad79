"""The entry point of ``cowfsd``."""

from __future__ import annotations

import sys

from cowfs.cli import main

__all__ = ["daemon_main"]


def daemon_main() -> int:
    """Entry point of ``cowfsd``: ``cowfs serve`` by another name."""
    return main(["serve", *sys.argv[1:]])
