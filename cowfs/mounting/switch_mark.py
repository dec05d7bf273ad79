"""The name on which a mount's server and a store agree for a switch of layers that has begun."""

from __future__ import annotations

import json
from typing import Any

from cowfs.sys import atomic

MARK = "cowfs-begun"
"""File in a layer's directory: from now on a new layer may be written to, or a mount no longer reads this old one."""


def leave_mark(path: str, facts: dict[str, Any]) -> None:
    """Make a mark that says something, whole or not at all.

    Raises:
        FileExistsError: there is one.
    """
    atomic.create_file(path, json.dumps(facts).encode())
