"""The mark of a switch of layers that has begun, by which a store learns of it from a mount's server."""

from __future__ import annotations

import json

from cowfs._typed import Any
from cowfs.sys import atomic

MARK = "cowfs-begun"
"""File in a layer's directory: from now on a new layer may be written to, or a mount no longer reads this old one."""


def leave_mark(path: str, facts: dict[str, Any]) -> None:
    """Make a mark with some content, whole or not at all.

    Raises:
        FileExistsError: a mark exists.
    """
    atomic.create_file(path, json.dumps(facts).encode())
