"""The user's and the host's configuration file of the command: the defaults behind options and environment.

The first of these with a value counts: an option, the environment (``COWFS_ROOT``, ``COWFS_FSYNC``), the user's file
(``$XDG_CONFIG_HOME/cowfs.toml``, ``~/.config/cowfs.toml``), the host's (``/etc/cowfs.toml``). ``COWFS_CONFIG`` names
one file in place of both. The library reads none of them.
"""

from __future__ import annotations

import os

from cowfs.errors import InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["KEYS", "fsync", "root", "settings"]

HOST = "/etc/cowfs.toml"
KEYS: dict[str, type] = {"root": str, "fsync": bool}
"""The keys of a file: ``root``, the store, an absolute path or one that begins with ``~``; ``fsync``, off for stores
whose loss does not matter."""


def _files() -> list[str]:
    """The configuration files, the less important first."""
    named = os.environ.get("COWFS_CONFIG")
    if named:
        return [named]
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [HOST, os.path.join(home, "cowfs.toml")]


def settings() -> dict[str, Any]:
    """The values of the files, checked.

    Raises:
        InvalidArgument: a file is no TOML, or has an unknown key or value; the message names it.
        NotFound: the file in COWFS_CONFIG is missing.
    """
    found: dict[str, Any] = {}
    for path in _files():
        try:
            file = open(path, "rb")  # noqa: SIM115  closed by the with below
        except (FileNotFoundError, NotADirectoryError):
            if os.environ.get("COWFS_CONFIG"):
                raise NotFound(f"no such file: {path}", remedy="COWFS_CONFIG names it") from None
            continue
        import tomllib

        with file:
            try:
                said = tomllib.load(file)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise InvalidArgument(f"{path}: {error}", remedy="write TOML: key = value") from None
        for key, value in said.items():
            if key not in KEYS:
                raise InvalidArgument(f"{path}: no setting {key!r}", remedy=f"of {', '.join(KEYS)}")
            if type(value) is not KEYS[key]:
                raise InvalidArgument(
                    f"{path}: {key} is {value!r}", remedy="root is a path in quotes, fsync true or false"
                )
        if "root" in said:
            said["root"] = os.path.expanduser(said["root"])
            if not os.path.isabs(said["root"]):
                raise InvalidArgument(
                    f"{path}: root is {said['root']!r}", remedy="an absolute path, or one that begins with ~/"
                )
        found |= said
    return found


def root(option: str | None) -> str | None:
    """The root of the configured store; None: the default one."""
    named = option or os.environ.get("COWFS_ROOT")
    if named:
        return named
    said: str | None = settings().get("root")
    return said


def fsync() -> bool:
    """Whether changes must survive a loss of power."""
    said = os.environ.get("COWFS_FSYNC")
    return said != "0" if said is not None else bool(settings().get("fsync", True))
