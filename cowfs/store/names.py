"""Which keys, names, tags and labels are allowed, here and only here.

Rule 1. A name is 1 to 255 characters of what prints, without space at either end and without
control characters, so that it fits on one line of any listing and in any log. A tag has no space at all.
Rule 2. It never becomes part of a path: layers are named by ids that the store makes itself. So
slashes and dots are fine (containerd's keys are ``namespace/1/name``).
Rule 3. What begins with ``/``, ``./``, ``../`` or ``-`` would be taken for a path or an option on
the command line, and is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cowfs.errors import InvalidArgument

__all__ = ["check_labels", "check_name", "new_id"]

MAX_NAME = 255
MAX_LABEL = 4096  # bytes of key and value together, as containerd has it
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def check_name(name: str, what: str = "name") -> str:
    """A key, name or tag that may be used.

    Raises:
        InvalidArgument: it may not; the message says why.
    """
    if not isinstance(name, str):
        raise InvalidArgument(f"a {what} is a string, not {type(name).__name__}")
    why = _why_not(name) or ("it has a blank in it" if what == "tag" and any(map(str.isspace, name)) else "")
    if why:
        shown = name if len(name) <= 40 else name[:37] + "..."
        raise InvalidArgument(f"{shown!r} cannot be a {what}: {why}")
    return name


def _why_not(name: str) -> str:
    if not name:
        return "it is empty"
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters, {MAX_NAME} are allowed"
    if not name.isprintable():
        return "it has characters that do not print"
    if name != name.strip():
        return "it begins or ends with a space"
    if name.startswith(("/", "./", "../", "-")):
        return "it would be taken for a path or an option"
    return ""


def check_labels(labels: Mapping[str, str | None]) -> None:
    """Labels that may be kept.

    Raises:
        InvalidArgument: an empty or overlong one, or no strings.
    """
    for key, value in labels.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, str)):
            raise InvalidArgument("labels are strings")
        if not key or not key.isprintable() or "=" in key:
            raise InvalidArgument(f"{key!r} cannot be the key of a label", remedy="printable, and without '='")
        try:
            length = len(key.encode()) + len((value or "").encode())
        except UnicodeEncodeError:
            raise InvalidArgument(f"the label {key!r} is not text") from None
        if length > MAX_LABEL:
            raise InvalidArgument(f"the label {key!r} has {length} bytes, {MAX_LABEL} are allowed")


def new_id() -> str:
    """A fresh id for a layer: 50 random bits, short because mount options have little room."""
    number = int.from_bytes(os.urandom(7), "little")  # the lower 50 bits of 56
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(0, 50, 5))
