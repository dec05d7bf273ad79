"""The meaning of a member's name: a place in the layer, a whiteout, an opaque mark, or an error.

Rule 1: a name becomes a path without ``.``, ``//`` and leading ``/`` (absolute names are taken
as relative, as every tar does), and a ``..`` anywhere is refused, not resolved.
Rule 2: ``.wh.`` is reserved (OCI image-spec ``layer.md``, "Whiteouts"): a last component with
that prefix is a whiteout or the opaque mark, any other use of it is refused. The three
book-keeping names that aufs left in old layers are passed over.
"""

from __future__ import annotations

from enum import Enum

from cowfs.errors import InvalidArgument, LimitExceeded

__all__ = ["OPAQUE_NAME", "WHITEOUT_PREFIX", "Meaning", "canonical", "meaning", "show"]

WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = b".wh..wh..opq"
_AUFS = frozenset({b".wh..wh.plnk", b".wh..wh.aufs", b".wh..wh.orph"})
NAME_MAX = 255


class Meaning(Enum):
    ENTRY = "entry"  #: an ordinary member
    WHITEOUT = "whiteout"  #: hides the lower entry of that name
    OPAQUE = "opaque"  #: hides everything lower in its directory
    SKIP = "skip"  #: aufs book-keeping


def show(name: bytes) -> str:
    """A name for an error message: readable, one line, at most 200 characters."""
    text = name[:200].decode("utf-8", "backslashreplace")
    return repr(text if len(name) <= 200 else text + "...")


def canonical(name: bytes, *, max_path: int, max_depth: int, whiteouts: bool = False) -> bytes:
    """The path of a member below the layer's root, ``b""`` for the root itself.

    Args:
        whiteouts: the last component may be a whiteout, whose prefix does not count: it hides a name of up to 255 bytes.

    Raises:
        InvalidArgument: a ``..``, a NUL, an empty name, a component longer than 255 bytes.
        LimitExceeded: longer than ``max_path`` bytes or deeper than ``max_depth`` components.
    """
    if b"\0" in name:
        raise InvalidArgument("the name has a NUL in it")
    if not name:
        raise InvalidArgument("the name is empty")
    path = name[:-1] if name.endswith(b"/") else name
    if path.startswith(b"./"):
        path = path[2:]
    if path[:1] in (b"/", b".", b"") or b"/." in path or b"//" in path:
        parts = [part for part in path.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise InvalidArgument("the name leads out of the layer ('..')")
        path = b"/".join(parts)
    if len(path) > NAME_MAX:
        if len(path) > max_path:
            raise LimitExceeded(f"the name is {len(path)} bytes long, at most {max_path} are allowed")
        *parts, last = path.split(b"/")
        if whiteouts:
            last = last.removeprefix(WHITEOUT_PREFIX)
        if any(len(part) > NAME_MAX for part in (*parts, last)):
            raise InvalidArgument(f"a component of the name is longer than {NAME_MAX} bytes")
    if path.count(b"/") >= max_depth:
        raise LimitExceeded(f"the name is {path.count(b'/') + 1} directories deep, at most {max_depth} are allowed")
    return path


def meaning(path: bytes) -> tuple[Meaning, bytes]:
    """The kind of entry that a canonical path stands for, and the path that it concerns.

    Returns:
        (ENTRY, path); (WHITEOUT, the path it hides); (OPAQUE, the directory); (SKIP, path).

    Raises:
        InvalidArgument: a reserved name that is none of these.
    """
    if WHITEOUT_PREFIX not in path:
        return Meaning.ENTRY, path
    parent, _, base = path.rpartition(b"/")
    if WHITEOUT_PREFIX in parent:
        for part in parent.split(b"/"):
            if part in _AUFS:
                return Meaning.SKIP, path
            if part.startswith(WHITEOUT_PREFIX):
                raise InvalidArgument(f"the directory name {show(part)} is reserved for whiteouts")
    if not base.startswith(WHITEOUT_PREFIX):
        return Meaning.ENTRY, path
    if base == OPAQUE_NAME:
        return Meaning.OPAQUE, parent
    if base in _AUFS:
        return Meaning.SKIP, path
    hidden = base[len(WHITEOUT_PREFIX) :]
    if hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT_PREFIX):
        raise InvalidArgument("not a valid whiteout name")
    return Meaning.WHITEOUT, parent + b"/" + hidden if parent else hidden
