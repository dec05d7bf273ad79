"""The rules for keys, names, tags and labels, here and only here.

Rule 1. A key, or the name of a committed snapshot, is any text without NUL, up to 4,096 bytes: engines choose it
(containerd's are ``namespace/1/name``, and its clients may use paths and other text).
Rule 2. It never becomes part of a path: layers are named by ids that the store makes itself.
Rule 3. A tag, and a key that the command line makes, is 1 to 255 printable characters, without space at either
end and without control characters, so that it fits on one line of any listing and in any log; and it does not begin
with ``/``, ``./``, ``../`` or ``-``, since it would be taken for a path or an option there. A tag has no space at all.
Rule 4. The key of a label is any text without NUL, as engines choose it; one that the command line sets is printable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cowfs.errors import InvalidArgument

__all__ = ["RUN_KEY", "check_key", "check_labels", "check_name", "new_id"]

RUN_KEY = "run-"
"""How the keys begin that ``cowfs run`` and :meth:`cowfs.Store.run` make up."""

MAX_NAME = 255
MAX_KEY = 4096  # bytes
MAX_LABEL = 4096  # bytes of key and value together, as containerd has it
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def check_key(key: str, what: str = "name") -> str:
    """A key or name that a store may keep.

    Raises:
        InvalidArgument: it may not; the message has the reason.
    """
    if not isinstance(key, str):
        raise InvalidArgument(f"a {what} is a string, not {type(key).__name__}")
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        length, why = 0, "it is not text"
    else:
        why = "it is empty" if not key else "it has a NUL in it" if "\0" in key else ""
    if length > MAX_KEY:
        why = f"it has {length} bytes, {MAX_KEY} are allowed"
    if why:
        raise InvalidArgument(f"{_short(key)} cannot be a {what}: {why}")
    return key


def check_name(name: str, what: str = "name") -> str:
    """A tag, or a key or name that the command line makes.

    Raises:
        InvalidArgument: it may not; the message has the reason.
    """
    if not isinstance(name, str):
        raise InvalidArgument(f"a {what} is a string, not {type(name).__name__}")
    why = _why_not(name) or ("it has a blank in it" if what == "tag" and any(map(str.isspace, name)) else "")
    if why:
        raise InvalidArgument(f"{_short(name)} cannot be a {what}: {why}")
    return name


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:37] + "...")


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
    """Check labels.

    Raises:
        InvalidArgument: an empty or overlong one, or no strings.
    """
    for key, value in labels.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, str)):
            raise InvalidArgument("labels are strings")
        if not key or "\0" in key:
            raise InvalidArgument(f"{key!r} cannot be the key of a label", remedy="any text without NUL")
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
