"""Restart policies: when a container that ended is started again.

Rules (Docker's, moby ``restartmanager``):

1. A verb that stops or kills a container ends its restarts until it is started again.
2. The first restart waits a tenth of a second; each one after a run of less than ten seconds twice as long, up to a minute.
3. A new daemon starts ``always`` in any case, ``unless-stopped`` unless a verb ended it, ``on-failure`` after a
status that is not 0. The same goes for one whose last start failed.

A pending restart is a sleeping thread; only the number of restarts is recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowfs.errors import CowfsError
from cowfs.service.containers.records import HostConfig
from cowfs.service.errors import ApiError, NotModified
from cowfs.service.logs import log

if TYPE_CHECKING:
    from cowfs.service.containers.container import Container

__all__ = ["Restarts", "check_policy"]

SHORT = 10 * 10**9
"""Nanoseconds: a run of less is no success."""

FIRST, LONGEST = 0.1, 60.0


def check_policy(host: HostConfig) -> None:
    """Check a policy. Raises ApiError: 400: an unknown or contradictory one."""
    policy = host.RestartPolicy
    if policy.Name not in ("", "no", "always", "unless-stopped", "on-failure"):
        raise ApiError(400, f"invalid restart policy: unknown policy '{policy.Name}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'")  # fmt: skip
    if policy.MaximumRetryCount < 0 or (policy.MaximumRetryCount and policy.Name != "on-failure"):
        raise ApiError(400, "invalid restart policy: maximum retry count can only be used with 'on-failure'")
    if host.AutoRemove and policy.Name not in ("", "no"):
        raise ApiError(400, "can't create 'AutoRemove' container with restart policy")


class Restarts:
    """Starts containers again.

    Args:
        start: starts a container that still waits for it, as :meth:`Containers.start`.
    """

    def __init__(self, start: Callable[[Container], None]) -> None:
        self._start = start
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop all restarts."""
        self._closed.set()

    def ended(self, container: Container) -> None:
        """Start a container again after its end, if its policy says so; also one that a new daemon found ended."""
        if self._closed.is_set() or not self._wanted(container):
            return
        delay = self._delay(container)
        with container.changed:
            container.restarting = True
            container.wait_number += 1
            wait = container.wait_number
        threading.Thread(
            target=self._later, args=(container, delay, wait), name=f"cowfs-restart-{container.id[:8]}", daemon=True
        ).start()

    @staticmethod
    def _wanted(container: Container) -> bool:
        policy = container.host.get("RestartPolicy") or {}
        name, most = policy.get("Name", ""), policy.get("MaximumRetryCount", 0)
        failed = container.found and container.error  # its last start, under an earlier daemon
        if container.removing or container.removed or not ("finished" in container.run or failed):
            return False
        if container.stopped and not (name == "always" and container.found):
            return False
        if name == "on-failure":
            return container.code != 0 and (not most or container.restarts < most)
        return name in ("always", "unless-stopped")

    @staticmethod
    def _delay(container: Container) -> float:
        lasted = container.run["finished"] - container.run["started"] if container.run else 0
        container.delay = FIRST if lasted >= SHORT or not container.delay else min(2 * container.delay, LONGEST)
        return container.delay

    def _later(self, container: Container, delay: float, wait: int) -> None:
        if container.wait(
            lambda: not container.restarting or container.wait_number != wait or self._closed.is_set(), delay
        ):
            return  # a verb stopped, started or removed it meanwhile
        try:
            self._start(container)
        except NotModified:
            pass  # another thread was faster
        except (CowfsError, OSError) as error:
            log.warning("container %s is not started again: %s", container.name, error)
        finally:
            self.cancel(container, wait)

    @staticmethod
    def ends_by_verb(container: Container) -> None:
        """Suspend the policy of a container that a verb ends."""
        with container.lock:
            container.stopped = True
            container.save_if_room()

    @staticmethod
    def cancel(container: Container, wait: int | None = None) -> bool:
        """Cancel a pending restart, whichever or that of a number (not the one after a run that has ended since). Returns whether there was one."""
        with container.changed:
            if wait is not None and container.wait_number != wait:
                return False
            was, container.restarting = container.restarting, False
            container.changed.notify_all()
        return was
