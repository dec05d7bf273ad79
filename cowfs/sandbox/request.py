"""The request for a sandbox: the command, its user, and the part of the host that it sees. Checked here, before anything is made."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cowfs._typed import Any, Literal, NamedTuple, TypeAlias, cast
from cowfs.errors import InvalidArgument, NotFound
from cowfs.model import format_size, parse_count, parse_size
from cowfs.sys.cgroups import Limits

__all__ = [
    "PATH",
    "Bind",
    "BindLike",
    "Network",
    "Request",
    "binds_of",
    "check_network",
    "check_timeout",
    "limits_of",
    "pairs_of",
]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORKS = ("none", "host")
_TAKEN = ("proc", "sys")
"""Directories of the sandbox that are the kernel's: nothing is bound there."""
_SHORTEST, _LONGEST = 0.001, 1e8
_LEAST_MEMORY = 6 << 20
_LEAST_CPUS = 0.01

Network: TypeAlias = Literal["none", "host"]
BindLike: TypeAlias = "str | tuple[str | os.PathLike[str], str] | tuple[str | os.PathLike[str], str, str]"


class Bind(NamedTuple):
    """A file or directory of the host that the sandbox sees: ``source`` is absolute, ``target`` is a path in the sandbox."""

    source: str
    target: str
    readonly: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One command, and the sandbox around it.

    Attributes:
        command: the program and its arguments.
        environment: its variables; HOME is the user's unless it is given.
        workdir: where it starts.
        network: ``none``: a network of its own in which only the loopback interface is up; ``host``: the host's.
        privileged: all privilege and devices are kept, and no filter is in force.
        timeout: seconds; None: it takes as long as it takes.
        binds: what of the host it sees beside its root.
        user: ``USER[:GROUP]``, names of the sandbox or numbers; "" is root.
        terminal: whether it gets one of its own: None: if the caller has one.
        limits: the most that it and all that it starts may take of memory, processors and process numbers.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    network: str = "none"
    privileged: bool = False
    timeout: float | None = None
    binds: Sequence[Bind] = ()
    user: str = ""
    terminal: bool | None = None
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """Inverse of :meth:`to_json`."""
        return cls(**{**data, "binds": tuple(Bind(*each) for each in data["binds"]), "limits": Limits(*data["limits"])})


def check_network(network: str) -> Network:
    """The network that is meant.

    Raises:
        InvalidArgument: there is no such one.
    """
    if network not in NETWORKS:
        raise InvalidArgument(f"no network {network!r}", remedy="none or host")
    return cast("Network", network)


def check_timeout(timeout: float | None) -> float | None:
    """A number of seconds that a timer takes.

    Raises:
        InvalidArgument: it is none.
    """
    if timeout is not None and not (math.isfinite(timeout) and _SHORTEST <= timeout <= _LONGEST):
        raise InvalidArgument(
            f"a timeout of {timeout} seconds", remedy=f"more than zero: {_SHORTEST} to {_LONGEST:.0f} seconds"
        )
    return timeout


def limits_of(memory: str | int | None, cpus: str | float | None, pids_limit: str | int | None) -> Limits:
    """Limits as they are asked for.

    Args:
        memory: bytes, or ``512M``. cpus: processors: 1.5. pids_limit: processes and threads, or ``1k``.

    Raises:
        InvalidArgument: what can be none; the message says which.
    """
    size = None if memory is None else parse_size(memory)
    if size is not None and size < _LEAST_MEMORY:
        raise InvalidArgument(
            f"a memory limit of {memory!r}", remedy=f"{format_size(_LEAST_MEMORY)} or more: 6M, 512M, 2G"
        )
    share = None if cpus is None else _cpus(cpus)
    return Limits(size, share, None if pids_limit is None else parse_count(pids_limit))


def _cpus(given: str | float) -> float:
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    most = os.cpu_count() or 1
    if not _LEAST_CPUS <= share <= most:
        raise InvalidArgument(
            f"not a number of processors: {given!r}", remedy=f"from {_LEAST_CPUS} to {most} here, as in 0.5"
        )
    return share


def pairs_of(pairs: Iterable[str]) -> dict[str, str]:
    """Variables from ``NAME=VALUE``, or ``NAME`` for the one of this process.

    Raises:
        InvalidArgument: no variable; the message says which.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or "\0" in pair:
            raise InvalidArgument(
                f"not a variable: {pair!r}", remedy="write NAME=VALUE, or NAME for the one that is set here"
            )
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def binds_of(given: Iterable[BindLike]) -> tuple[Bind, ...]:
    """Binds from ``SOURCE:TARGET[:ro]``, or the same in a tuple, where a path may have a colon. Those further up come first.

    Raises:
        InvalidArgument: what cannot be one.
        NotFound: there is no such source.
    """
    found: list[Bind] = []
    for each in given:
        made = _bind(each)
        if any(made.target == other.target for other in found):
            raise InvalidArgument(f"two binds upon {made.target!r}", remedy="leave out one of the two")
        found.append(made)
    return tuple(sorted(found, key=lambda bind: bind.target.count("/")))


def _bind(given: BindLike) -> Bind:
    parts = given.split(":") if isinstance(given, str) else [os.fspath(part) for part in given]
    text = given if isinstance(given, str) else ":".join(parts)
    how = "write SOURCE:TARGET or SOURCE:TARGET:ro; in a program a tuple, where a path has a colon"
    if not 2 <= len(parts) <= 3 or not parts[0] or "\0" in text:
        raise InvalidArgument(f"not a bind: {text!r}", remedy=how)
    if parts[2:] not in ([], ["ro"], ["rw"]):
        raise InvalidArgument(f"bind {text!r}: no mode {parts[2]!r}", remedy="ro or rw")
    source, target = os.path.abspath(parts[0]), os.path.normpath(parts[1])
    if not target.startswith("/"):
        raise InvalidArgument(f"bind {text!r}: the target is no absolute path", remedy=how)
    target = "/" + target.lstrip("/")
    top = target.split("/")[1]
    if not top or top in _TAKEN:
        raise InvalidArgument(
            f"bind {text!r}: nothing can be bound upon {target}", remedy="a target beside /, /proc and /sys"
        )
    try:
        os.stat(source)
    except FileNotFoundError:
        raise NotFound(f"bind {text!r}: there is no {source}", remedy="make it first") from None
    except OSError as error:
        raise InvalidArgument(f"bind {text!r}: {source}: {error.strerror}") from None
    return Bind(source, target, parts[2:] == ["ro"])
