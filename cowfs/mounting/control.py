"""The answering side of a mount's control socket; the asking side, and the protocol, are :mod:`cowfs.mounting.protocol`.

Strategy: one thread listens, collects questions, and hands each whole line to a thread of its own. A silent connection
costs a descriptor and no thread. Their number is bounded: past it, the longest silent one is closed some seconds after
its begin, and until then new clients wait in the socket's queue.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial

from cowfs._typed import TYPE_CHECKING, Any, Final
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.mounting import protocol
from cowfs.mounting.verbs import finding
from cowfs.mounting.verbs.arguments import read
from cowfs.sys.threads import Thread

if TYPE_CHECKING:
    from cowfs.mounting.served import ServedMount
    from cowfs.mounting.verbs.table import Stream, Verb

__all__ = ["Control"]

_PATIENCE: Final = 2.0  # seconds for a connection's message, while others wait for its place
_SENDING: Final = 10.0  # seconds for a client to take its answer
_MOST_CONNECTIONS: Final = 32
_MOST_ANSWERS: Final = 16
"""Questions with a thread of their own; more are answered by the thread that listens."""


class _Client:
    """One connection that is not being answered.

    Attributes:
        since: monotonic time since its last message.
        asked: whether it got an answer before; it may wait for the server's end.
    """

    __slots__ = ("asked", "parts", "since", "size", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.since = time.monotonic()
        self.asked = False
        self.parts: list[bytes] = []
        self.size = 0

    def read(self) -> bytes | None:
        """The question, without its newline; None while it is incomplete.

        Raises:
            OSError: the other side stopped, or the message is too long.
        """
        try:
            part = self.sock.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        self.parts.append(part)
        self.size += len(part)
        if not part or self.size > protocol.MAX_LINE:
            raise ConnectionAbortedError
        if not part.endswith(b"\n"):
            return None
        line, self.parts, self.size = b"".join(self.parts), [], 0
        return line[:-1]


class Control:
    """The connections of one server. :meth:`run` is a thread's; the others may be called by any.

    Args:
        terminate: called for SIGTERM and SIGINT.
    """

    def __init__(self, server: ServedMount, terminate: Callable[[], None]) -> None:
        self._server = server
        self._terminate = terminate
        self._ours, self._theirs = socket.socketpair()  # signal numbers, and 0: a connection is back
        for end in (self._ours, self._theirs):
            end.setblocking(False)
        self._clients: dict[int, _Client] = {}  # by descriptor; the control thread's
        self._back: list[_Client] = []  # answered, to be watched again
        self._answers = threading.Condition()
        self._answering = 0  # questions taken whose answer is not sent yet; guarded by _answers
        self._threads = 0  # guarded by _answers

    @property
    def signals(self) -> int:
        """The descriptor for signal.set_wakeup_fd."""
        return self._theirs.fileno()

    def wait(self, timeout: float) -> None:
        """Wait until every accepted question is answered, for some seconds at most."""
        with self._answers:
            self._answers.wait_for(lambda: self._answering == 0, timeout=timeout)

    def run(self, listener: socket.socket, ending: threading.Event) -> None:
        """Handle signals and answer clients until the server ends."""
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        while not ending.is_set():
            try:
                self._turn(poll, listener)
            except Exception as error:  # noqa: BLE001  (a mount without a control thread could only be killed: log the error and go on)
                from cowfs.fuse import log

                log.no_memory("the control thread goes on: %s", type(error).__name__)
                time.sleep(0.05)

    def _turn(self, poll: select.poll, listener: socket.socket) -> None:
        wait = self._make_room(poll)
        if wait is None:
            poll.register(listener, select.POLLIN)
        else:
            self._unregister(poll, listener.fileno())
        for fd, _ in poll.poll(wait):
            if fd == self._ours.fileno():
                if any(self._ours.recv(64)):
                    self._apart(self._terminate, "cowfs-terminate")
                self._listen_again(poll)
            elif fd == listener.fileno():
                self._accept(poll, listener)
            elif fd in self._clients:
                self._hear(poll, self._clients[fd])

    def _make_room(self, poll: select.poll) -> int | None:
        """None when one more client may come in; otherwise milliseconds until one more may."""
        if len(self._clients) < _MOST_CONNECTIONS:
            return None
        oldest = min(self._clients.values(), key=lambda client: (client.asked, client.since))
        left = oldest.since + _PATIENCE - time.monotonic()
        if left > 0:
            return int(left * 1000) + 1
        self._forget(poll, oldest)
        oldest.sock.close()
        return None

    def _accept(self, poll: select.poll, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # the client is gone, or no descriptor is left
            time.sleep(0.05)
            return
        sock.settimeout(_SENDING)
        self._listen_to(poll, _Client(sock))

    def _listen_to(self, poll: select.poll, client: _Client) -> None:
        self._clients[client.sock.fileno()] = client
        poll.register(client.sock, select.POLLIN)

    def _listen_again(self, poll: select.poll) -> None:
        with self._answers:
            back, self._back = self._back, []
        for client in back:
            self._listen_to(poll, client)

    def _forget(self, poll: select.poll, client: _Client) -> None:
        fd = client.sock.fileno()
        del self._clients[fd]
        self._unregister(poll, fd)

    @staticmethod
    def _unregister(poll: select.poll, fd: int) -> None:
        try:
            poll.unregister(fd)
        except KeyError:
            pass  # the loop does not watch it now

    def _hear(self, poll: select.poll, client: _Client) -> None:
        try:
            line = client.read()
        except OSError:
            self._forget(poll, client)
            client.sock.close()
            return
        if line is None:
            return
        self._forget(poll, client)
        with self._answers:
            self._answering += 1
            room = self._threads < _MOST_ANSWERS
            self._threads += room
        if room:
            if Thread(partial(self._answer_apart, client, line), "cowfs-answer").start():
                return
            with self._answers:
                self._threads -= 1
        self._answer(client, line, apart=False)

    @staticmethod
    def _apart(function: Callable[[], None], name: str) -> None:
        """Run a function in a thread of its own, or in this one if no thread can be started."""
        if not Thread(function, name).start():
            function()

    def _answer_apart(self, client: _Client, line: bytes) -> None:
        try:
            self._answer(client, line)
        finally:
            with self._answers:
                self._threads -= 1

    def _answer(self, client: _Client, line: bytes, *, apart: bool = True) -> None:
        """Answer one question, and watch its client again. ``apart``: this is a thread of its own, which may wait."""
        try:
            with closing(self._dispatch(line, apart)) as answers:
                for answer in answers:
                    client.sock.sendall(protocol.encode(answer))
        except OSError:
            client.sock.close()
        else:
            client.since, client.asked = time.monotonic(), True
            with self._answers:
                self._back.append(client)
            try:
                os.write(self._theirs.fileno(), b"\0")
            except BlockingIOError:
                pass  # full: the control thread looks anyway
        finally:
            with self._answers:
                self._answering -= 1
                self._answers.notify_all()

    def _dispatch(self, line: bytes, apart: bool) -> Generator[dict[str, Any], None, None]:
        """The lines of an answer: for a stream, one {"more": ...} for each piece of news; then one "ok" or "error"."""
        try:
            message = protocol.decode(line)
        except (ValueError, RecursionError):
            yield {"error": protocol.error_to(InvalidArgument("not a message of cowfs"))}
            return
        try:
            found = _verb_of(message)
            arguments = read(found.takes, message)
            if not message.get("stream") or found.stream is None:
                yield {"ok": found.run(self._server, arguments)}
                return
            if not apart:
                raise FailedPrecondition("too many ask this mount at once", remedy="try again")
            yield from self._streamed(found.stream(self._server, arguments))
        except CowfsError as error:
            yield {"error": protocol.error_to(error)}
        except OSError as error:
            yield {"error": protocol.error_to(CowfsError(f"{message['verb']}: {error.strerror or error}"))}
        except Exception:  # noqa: BLE001  (a bug in one verb must not end the mount; it is logged and reported)
            import traceback

            traceback.print_exc()
            where = self._server.log
            yield {"error": protocol.error_to(CowfsError(f"unforeseen error in {message['verb']}; see {where}"))}

    def _streamed(self, stream: Stream) -> Generator[dict[str, Any], None, None]:
        """Count an answer as finished; a stream does not delay the end of the server."""
        with self._answers:
            self._answering -= 1
            self._answers.notify_all()
        try:
            while True:
                try:
                    news = next(stream)
                except StopIteration as end:
                    yield {"ok": end.value}
                    return
                yield {"more": news}
        finally:
            stream.close()
            with self._answers:
                self._answering += 1


def _verb_of(message: dict[str, Any]) -> Verb:
    """The verb of a message.

    Raises:
        Unsupported: the message has a later version of the protocol.
        InvalidArgument: there is no such verb.
    """
    version = message.get("version", 0)  # version 0 had no such field
    if not isinstance(version, int) or version > protocol.VERSION:
        raise Unsupported(
            f"this mount's server speaks version {protocol.VERSION} of the protocol, not {version!r}",
            remedy="mount it again with the newer cowfs",
        )
    found = finding.find_verb(str(message.get("verb")))
    if found is None:
        raise InvalidArgument(f"no such verb: {message.get('verb')!r}", remedy=", ".join(finding.names()))
    return found
