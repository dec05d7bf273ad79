"""Single calls for programs that need no open store."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs._typed import Any
from cowfs.store.running import RunResult
from cowfs.store.store import Store

__all__ = ["run"]


def run(
    parent: str, argv: Sequence[str] = (), *, root: str | os.PathLike[str] | None = None, **options: Any
) -> RunResult:
    """Run a command in a fresh snapshot of a store: :meth:`cowfs.Store.run`, with its options and errors.

    Args:
        parent: a committed snapshot, or a tag.
        argv: the command and its arguments.
        root: the store's directory; default: that of the command, except ``COWFS_ROOT``.
    """
    with Store.open(root, create=False) as store:
        return store.run(parent, argv, **options)
