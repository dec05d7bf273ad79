"""The view that reads every layer: the merged view of :mod:`cowfs.union`, with redirect files.

This is ``cowfs.View``; mounts, verbs of the store and comparisons all use it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs._typed import TYPE_CHECKING
from cowfs.union import view as union

if TYPE_CHECKING:
    from cowfs.row.redirects import Rows
    from cowfs.union.core import Core
    from cowfs.union.options import Options

__all__ = ["View"]


def _redirects(view: Core) -> Rows:
    """The redirect files of a view that may hold some; most views hold none and never import this."""
    from cowfs.row.redirects import Rows

    return Rows(view)


class View(union.View):
    """One merged tree; its layers may be of any driver.

    Args:
        lowers: layer directories, topmost first (may be empty when there is an upper).
        upper: the writable layer's directory; ``None`` makes the view read-only.
        work: an empty directory on the same file system as ``upper``.
        options: see :class:`~cowfs.union.options.Options`; ``row`` makes changes of lower files redirect files.

    Raises:
        InvalidArgument: ``lowers`` is one path, not a sequence.
        OSError: a directory is missing or unreadable; ENOTDIR; EXDEV when ``work`` is on another
            file system than ``upper``.

    >>> import pathlib, tempfile
    >>> base = tempfile.mkdtemp()
    >>> pathlib.Path(base, "hello").write_bytes(b"world")
    5
    >>> view = View([base])
    >>> view.size(view.lookup(view.root, b"hello"))
    5
    >>> view.close()
    """

    def __init__(
        self,
        lowers: Sequence[str | bytes | os.PathLike[str]],
        upper: str | bytes | os.PathLike[str] | None = None,
        work: str | bytes | os.PathLike[str] | None = None,
        *,
        options: Options | None = None,
    ) -> None:
        super().__init__(lowers, upper, work, options=options, redirects=_redirects)
