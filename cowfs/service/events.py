"""Events for clients of the API: the store's log (:meth:`cowfs.Store.events`) in Docker's words, filtered and followed."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cowfs.model import Event
from cowfs.service.errors import ApiError

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["FILTERS", "Wanted", "follow", "listeners", "moment", "when"]

FILTERS = ("type", "event", "image", "container", "label", "scope", "daemon", "network", "volume", "plugin", "node",
           "service", "secret", "config", "snapshot", "mount")  # fmt: skip

PAUSE, SIGN_OF_LIFE = 0.02, 0.4  # seconds

TOGETHER = 256
"""Events that are sent as one part of the answer."""

_followers: list[object] = []


def listeners() -> int:
    """The number of clients that follow the events."""
    return len(_followers)


def when(text: str, name: str) -> int | None:
    """Nanoseconds since 1970 of a client's time: seconds, with or without a fraction; None for "" and 0.

    Raises:
        ApiError: 400: no number.

    >>> when("1.5", "since"), when("", "until")
    (1500000000, None)
    """
    if text in ("", "0"):
        return None
    seconds, _, fraction = text.partition(".")
    if not (seconds.removeprefix("-").isdecimal() and (fraction.isdecimal() or not fraction)):
        raise ApiError(400, f"{name} is no time in seconds: {text[:40]!r}")
    if len(seconds) > 11:  # beyond any time that an event has
        raise ApiError(400, f"{name} is no time: {text[:40]!r}")
    return int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, "0") or 0)


_UNITS = {"ns": 1, "us": 1000, "µs": 1000, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", re.ASCII)


def moment(text: str, name: str) -> int:
    """Nanoseconds since 1970 of the time in a filter of a prune or list, which clients pass as it was typed: seconds, a time
    span of Go's until now (``1h30m``), or a date of RFC 3339, of which the end may be missing and whose zone is this host's by default.

    Raises:
        ApiError: 400: none of them.

    >>> moment("1.5", "until"), moment("1970-01-02T00:00:00Z", "until")
    (1500000000, 86400000000000)
    """
    if _SPAN.fullmatch(text) and len(text) <= 64:
        return time.time_ns() - sum(int(float(count) * _UNITS[unit]) for count, unit in _PART.findall(text))
    try:
        made = datetime.datetime.fromisoformat(text) if re.match(r"\d{4}-", text, re.ASCII) else None
    except ValueError:
        made = None
    if made is None:
        return when(text, name) or 0
    try:
        return int(made.astimezone(datetime.UTC).timestamp() * 10**6) * 1000
    except (ValueError, OverflowError, OSError):
        raise ApiError(400, f"{name} is no time: {text[:40]!r}") from None


class Wanted:
    """The filters of a client for events: one of the values of each filter must match (Docker's rule)."""

    def __init__(self, filters: Mapping[str, list[str]]) -> None:
        self._filters = filters

    def __call__(self, event: Event) -> bool:
        return all(any(_fits(name, value, event) for value in values) for name, values in self._filters.items())


def _fits(name: str, value: str, event: Event) -> bool:
    if name == "type":
        return event.type == value
    if name == "event":
        return event.action == value or event.action.startswith(value + ":")
    if name == "label":
        key, equals, wanted = value.partition("=")
        return key in event.attributes and (not equals or event.attributes[key] == wanted)
    if name == "scope":
        return value == "local"
    if name == "image":
        names = (event.attributes.get("image", ""), event.attributes.get("name", ""), event.actor)
        return event.type in ("image", "container") and any(_same_image(value, each) for each in names)
    if name in ("container", "snapshot", "mount", "volume"):
        named = event.attributes.get("name") == value or event.actor.startswith(value)
        return event.type == name and named
    return False  # of a kind that never occurs here


def _same_image(asked: str, there: str) -> bool:
    return bool(there) and (
        there == asked or there.partition(":")[0] == asked or there.removeprefix("sha256:").startswith(asked)
    )


def document(event: Event) -> dict[str, Any]:
    """Docker's form of an event."""
    actor = event.attributes.get("image", event.actor) if event.type == "image" else event.actor
    told: dict[str, Any] = {
        "Type": event.type,
        "Action": event.action,
        "Actor": {"ID": actor, "Attributes": dict(event.attributes)},
        "scope": "local",
        "time": event.time // 1_000_000_000,
        "timeNano": event.time,
    }
    if event.type in ("image", "container"):
        told |= {"status": event.action, "id": actor}
    if event.type == "container":
        told["from"] = event.attributes.get("image", "")
    return told


def follow(store: Store, since: int | None, until: int | None, wanted: Wanted) -> Iterator[list[dict[str, Any]]]:
    """Events as documents, in batches, with an empty batch as a sign of life, until a time or the client ends it.

    The position in the log is fixed before this returns, so no later event is missed.
    """
    first, last = store.index.event_range()
    at = max(store.index.event_at(since), first - 1) if since is not None else last
    return _follow(store, at, until, wanted)


def _follow(store: Store, at: int, until: int | None, wanted: Wanted) -> Iterator[list[dict[str, Any]]]:
    me = object()
    _followers.append(me)
    try:
        told = 0.0
        seen = None
        while True:
            over = until is not None and time.time_ns() >= until
            now = store.index.changes()
            if now != seen:
                seen = now
                some: list[dict[str, Any]] = []
                for event in store.events(after=at):
                    at = event.seq or at
                    if (until is None or event.time <= until) and (event.type == "log" or wanted(event)):
                        some.append(document(event))
                    if len(some) >= TOGETHER:
                        yield some
                        some = []
                if some:
                    yield some
            if over:
                return
            if time.monotonic() - told > SIGN_OF_LIFE:
                told = time.monotonic()
                yield []
            time.sleep(PAUSE)
    finally:
        _followers.remove(me)
