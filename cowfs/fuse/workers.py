"""Worker threads for slow work, and the gates that keep each node's requests in order.

Strategy: the loop thread owns the view and answers nearly everything itself. Three things may take long: copying a
file up, fsync, and a large read that is not in the page cache. They run on a worker, and only requests for the same node wait:

* An **exclusive** job (copy-up) stands for a change of the node's data. Until it is done, every later request that
  needs the node's data waits in a queue, in order.
* A **shared** job (cold read) only reads. Other reads go on beside it; the first request that would change the data
  waits for it, and later requests wait behind that one.
* fsync covers the writes before it, so it waits behind a queue but holds nothing back.

All other requests, and all other nodes, never wait.

Ownership: :class:`Gates` belongs to the loop thread alone. :class:`Workers` may be fed from the loop thread only; a
job runs in one worker, and reports to the loop through ``Session.post``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from cowfs.fuse import abi
from cowfs.sys.threads import Thread

#: Opcodes that need a node's data or change how it is stored, and so may have to wait.
SHARED_OPCODES = frozenset((abi.READ, abi.LSEEK, abi.FSYNC))
HELD_OPCODES = SHARED_OPCODES | {
    abi.WRITE,
    abi.SETATTR,
    abi.FALLOCATE,
    abi.COPY_FILE_RANGE,
    abi.COPY_FILE_RANGE_64,
    abi.OPEN,
    abi.SETXATTR,
    abi.REMOVEXATTR,
}


class Workers:
    """A few threads that run jobs; started when first needed, ended by :meth:`close`.

    Args:
        limit: the most threads.
        most: the most waiting jobs, each with descriptors of its own; the caller runs any further one.
    """

    def __init__(self, limit: int, on_error: Callable[[], object], most: int = 256) -> None:
        self._limit = max(1, limit)
        self._most = most
        self._on_error = on_error
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._waiting = 0  # threads that found no job; a hint, read without a lock

    def submit(self, job: Callable[[], None]) -> None:
        waiting = self._jobs.qsize()
        if waiting >= self._most:
            self._do(job)
            return
        if self._waiting <= waiting and len(self._threads) < self._limit:
            thread = Thread(self._run, f"cowfs-worker-{len(self._threads)}")
            if thread.start():
                self._threads.append(thread)
            elif not self._threads:  # no room for a thread: go on without it
                self._do(job)
                return
        self._jobs.put(job)

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:  # noqa: BLE001 - logged by on_error; the thread goes on
            self._on_error()

    def _run(self) -> None:
        while True:
            self._waiting += 1
            job = self._jobs.get()
            self._waiting -= 1
            if job is None:
                return
            self._do(job)
            del job  # with the buffers that it holds

    def close(self) -> None:
        """Finish what was submitted, then end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


class Gate:
    """The running and waiting requests of one node."""

    __slots__ = ("exclusive", "queue", "shared")

    def __init__(self) -> None:
        self.shared = 0
        self.exclusive = False
        self.queue: deque[bytes] = deque()


class Gates:
    """The gates of all nodes that have one: ``nodes`` is empty whenever nothing is under way."""

    __slots__ = ("nodes",)

    def __init__(self) -> None:
        self.nodes: dict[int, Gate] = {}

    def hold(self, opcode: int, nodeid: int, request: memoryview) -> bool:
        """Whether the request must wait; if so a copy of it is queued."""
        gate = self.nodes.get(nodeid)
        if gate is None and opcode in (abi.COPY_FILE_RANGE, abi.COPY_FILE_RANGE_64):
            gate = self.nodes.get(abi.COPY_FILE_RANGE_IN.unpack_from(request, abi.IN_HEADER.size)[2])
        if gate is None:
            return False
        if not gate.exclusive and not gate.queue and opcode in SHARED_OPCODES:
            return False
        gate.queue.append(bytes(request))
        return True

    def enter(self, nodeid: int, *, exclusive: bool) -> Gate:
        gate = self.nodes.get(nodeid)
        if gate is None:
            gate = self.nodes[nodeid] = Gate()
        if exclusive:
            gate.exclusive = True
        else:
            gate.shared += 1
        return gate

    def leave(self, nodeid: int, *, exclusive: bool, first: bytes | None = None) -> None:
        """Record the end of a job. ``first`` is a request to serve before all waiting ones."""
        gate = self.nodes[nodeid]
        if exclusive:
            gate.exclusive = False
        else:
            gate.shared -= 1
        if first is not None:
            gate.queue.appendleft(first)

    def next(self, nodeid: int) -> bytes | None:
        """The next waiting request of the node that may go on now; None if none may (an idle gate is removed)."""
        gate = self.nodes.get(nodeid)
        if gate is None or gate.exclusive:
            return None
        if not gate.queue:
            if not gate.shared:
                del self.nodes[nodeid]
            return None
        if gate.shared and abi.HEAD.unpack_from(gate.queue[0])[1] not in SHARED_OPCODES:
            return None
        return gate.queue.popleft()

    def withdraw(self, unique: int) -> bytes | None:
        """Take the waiting request ``unique`` out of its queue (it was interrupted); None if it does not wait."""
        for gate in self.nodes.values():
            for request in gate.queue:
                if abi.HEAD.unpack_from(request)[2] == unique:
                    gate.queue.remove(request)
                    return request
        return None
