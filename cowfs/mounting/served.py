"""The interface of a served mount for the verbs of the control socket and the count of the mount."""

from __future__ import annotations

from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cowfs.fuse.loop import Session
    from cowfs.fuse.portable import PortableSession
    from cowfs.model import Usage
    from cowfs.mounting.request import MountSpec
    from cowfs.mounting.resources import Stack
    from cowfs.union import View

__all__ = ["Count", "ServedMount"]


class Count(Protocol):
    """The count of a mount's upper layer."""

    def usage(self, patience: float | None = None) -> Usage | None:
        """Used bytes and inodes; waits at most ``patience`` seconds for a walk, where one is needed."""


class ServedMount(Protocol):
    """One mount in its server.

    Threads: any may read the attributes and use :meth:`call`; the view belongs to the session's loop.
    """

    log: str  # the file for diagnostics
    stack: Stack
    view: View
    session: Session | PortableSession

    @property
    def spec(self) -> MountSpec:
        """The spec that the mount was made from, with the changes that verbs have made since."""

    @property
    def counter(self) -> Count:
        """The count of the upper layer."""

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread that owns the view, and return what it returns."""

    def pause(self, seconds: float) -> bool:
        """Wait, at most until the mount ends. Returns whether it does."""

    def facts(self) -> dict[str, Any]:
        """Facts about the mount beside its spec."""

    def now(self, **changes: Any) -> None:
        """Record changes of the mount: fields of the spec and their new values."""
