"""The table of verbs: each module of this package registers its own.

Rules: a verb is called in its connection's thread, gets the served mount and its arguments
(a record beside it, read by :mod:`cowfs.mounting.verbs.arguments`), and returns the value of the answer's "ok", or raises a
:class:`~cowfs.errors.CowfsError`. Every access to the view goes through
:meth:`ServedMount.call <cowfs.mounting.served.ServedMount.call>`.

A verb may also *stream*: a generator that yields news, and returns the answer. It runs as long as its client listens,
waits only by :meth:`ServedMount.pause <cowfs.mounting.served.ServedMount.pause>`, and ends with the mount.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from cowfs.mounting.served import ServedMount

__all__ = ["VERBS", "Answer", "Stream", "Verb", "streamed", "verb"]

Answer = dict[str, Any]
Stream = Generator[Answer, None, Answer]
_A = TypeVar("_A")


class Verb(NamedTuple):
    """One verb.

    Attributes:
        takes: the record of its arguments.
        run: answers.
        stream: the streaming form; None for a verb without news.
    """

    takes: type[Any]
    run: Callable[[ServedMount, Any], Answer]
    stream: Callable[[ServedMount, Any], Stream] | None = None


VERBS: dict[str, Verb] = {}


def verb(
    name: str, takes: type[_A]
) -> Callable[[Callable[[ServedMount, _A], Answer]], Callable[[ServedMount, _A], Answer]]:
    """Register a verb of the control socket."""

    def register(function: Callable[[ServedMount, _A], Answer]) -> Callable[[ServedMount, _A], Answer]:
        VERBS[name] = Verb(takes, function)
        return function

    return register


def streamed(
    name: str, takes: type[_A]
) -> Callable[[Callable[[ServedMount, _A], Stream]], Callable[[ServedMount, _A], Stream]]:
    """Register the streaming form of a verb that is registered already, with the same arguments."""

    def register(function: Callable[[ServedMount, _A], Stream]) -> Callable[[ServedMount, _A], Stream]:
        assert VERBS[name].takes is takes
        VERBS[name] = Verb(takes, VERBS[name].run, function)
        return function

    return register
