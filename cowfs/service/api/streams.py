"""Routes whose answer is a stream of a container's: attach, logs, exec, and the sizes of terminals."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.service.api.routing import Route, version_of
from cowfs.service.containers import logs
from cowfs.service.containers.container import Container
from cowfs.service.containers.records import ExecConfig
from cowfs.service.containers.streams import STDERR, STDIN, STDOUT, frame
from cowfs.service.errors import ApiError
from cowfs.service.events import when
from cowfs.service.http import MULTIPLEXED, RAW_STREAM, Exchange, Reply, empty, json_reply
from cowfs.service.images import nanoseconds
from cowfs.service.records import decode

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES"]


def _type(exchange: Exchange, terminal: bool) -> str:
    return MULTIPLEXED if not terminal and version_of(exchange) >= (1, 42) else RAW_STREAM


def _streams(exchange: Exchange) -> list[int]:
    return [
        number for number, name in ((STDIN, "stdin"), (STDOUT, "stdout"), (STDERR, "stderr")) if exchange.flag(name)
    ]


def _keys(exchange: Exchange) -> bytes:
    """The bytes of the detach keys: ``ctrl-p,ctrl-q`` or letters."""
    text = exchange.query.get("detachKeys", "")
    made = b""
    for word in text.split(",") if text else ():
        if len(word) == 1:
            made += word.encode()
        elif word.startswith("ctrl-") and len(word) == 6 and (word[5].isalpha() or word[5] in "@[\\]^_"):
            made += bytes([ord(word[5].upper()) & 0x1F])
        else:
            raise ApiError(400, f"invalid detach keys: {text}")
    return made


def _attach(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    if container.paused:
        raise FailedPrecondition(f"container {container.id} is paused, unpause the container before attach")
    terminal = bool(container.config.get("Tty"))
    streams, keys = _streams(exchange), _keys(exchange)
    stream, history = exchange.flag("stream"), exchange.flag("logs")
    if stream:
        try:
            service.containers.prepare_attach(container)
        except (
            OSError
        ):  # the docker command shows no sentence of a refused upgrade, but that of the start, which fails likewise
            stream = False

    def take(sock: socket.socket, early: bytes) -> None:
        if history:
            sock.sendall(b"".join(_rendered(container, terminal, streams)))
        if not stream:
            sock.close()
            return
        service.containers.attach(container, sock, early, streams, keys)

    return Reply(type=_type(exchange, terminal), take=take)


def _rendered(container: Container, terminal: bool, streams: list[int]) -> Iterator[bytes]:
    for entry in logs.read(os.path.join(container.folder, logs.FILE)):
        if entry is not None and entry.stream in streams:
            yield entry.data if terminal else frame(entry.stream, entry.data)


def _logs(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    terminal = bool(container.config.get("Tty"))
    wanted = _streams(exchange)
    if not wanted:
        raise ApiError(400, "Bad parameters: you must choose at least one stream")
    if container.host_config.LogConfig.Type == "none":
        raise ApiError(501, "configured logging driver does not support reading")
    text = exchange.query.get("tail", "all")
    tail = exchange.number("tail") if text.isdecimal() else None
    since, until = when(exchange.query.get("since", ""), "since"), when(exchange.query.get("until", ""), "until")
    stamps, details = exchange.flag("timestamps"), exchange.flag("details")

    def told() -> Iterator[bytes]:
        path = os.path.join(container.folder, logs.FILE)
        for entry in logs.read(path, tail=tail, follow=exchange.flag("follow"), running=lambda: _has_output(container)):
            if entry is None:
                yield b""
                continue
            at = nanoseconds(entry.time)
            if entry.stream not in wanted or (since is not None and at < since):
                continue
            if until is not None and at > until:
                return
            head = (f"{entry.time} " if stamps else "") + (" " if details else "")
            data = head.encode() + entry.data
            yield data if terminal else frame(entry.stream, data)

    return Reply(type=_type(exchange, terminal), body=told())


def _has_output(container: Container) -> bool:
    """Whether more output may come: the container runs, or its last output is being written."""
    return container.running or container.watcher is not None


def _resize(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    width, height = _size(exchange)
    service.containers.resize(container, width, height)
    return empty(200)


def _size(exchange: Exchange) -> tuple[int, int]:
    if not exchange.query.get("w") or not exchange.query.get("h"):
        raise ApiError(400, "w and h are no numbers")
    width, height = exchange.number("w"), exchange.number("h")
    if not (0 <= width < 65536 and 0 <= height < 65536):
        raise ApiError(400, "w and h are out of range")
    return width, height


def _exec_create(service: Service, exchange: Exchange, name: str) -> Reply:
    made = service.containers.execs.new(service.containers.get(name), decode(ExecConfig, exchange.document()))
    return json_reply({"Id": made.id}, 201)


def _exec_start(service: Service, exchange: Exchange, id: str) -> Reply:
    made = service.containers.execs.get(id)
    document = exchange.document()
    if made.running or made.code is not None:
        raise FailedPrecondition(f"exec {id} has already run" if made.code is not None else f"exec {id} is running")
    size = document.get("ConsoleSize")
    console = size if isinstance(size, list) and len(size) == 2 and all(type(each) is int for each in size) else None
    if document.get("Detach"):
        service.containers.execs.start(made, service.containers.execs.process(made, console))
        return empty(200)

    def take(sock: socket.socket, early: bytes) -> None:
        try:
            process = service.containers.execs.process(made, console)
        except CowfsError as error:  # as Docker does: a client that upgrades gets the error on its stream
            made.code = 126  # before the stream ends: the client asks for it then
            with sock:
                text = f"{error}\r\n".encode()
                sock.sendall(text if made.config.Tty else frame(STDERR, text))
            return
        service.containers.execs.start(made, process, sock=sock, early=early)

    return Reply(type=_type(exchange, made.config.Tty), take=take)


def _exec_resize(service: Service, exchange: Exchange, id: str) -> Reply:
    made = service.containers.execs.get(id)
    width, height = _size(exchange)
    service.containers.resize(service.containers.get(made.container), width, height, id)
    return empty(200)


def _exec_inspect(service: Service, exchange: Exchange, id: str) -> Reply:
    made = service.containers.execs.get(id)
    service.containers.execs.settle(made)
    config = made.config
    words = config.Cmd or [""]
    return json_reply(
        {
            "ID": made.id,
            "Running": made.running,
            "ExitCode": made.code,
            "ProcessConfig": {
                "tty": config.Tty, "entrypoint": words[0], "arguments": words[1:], "privileged": config.Privileged,
                "user": config.User,
            },
            "OpenStdin": config.AttachStdin,
            "OpenStderr": config.AttachStderr,
            "OpenStdout": config.AttachStdout,
            "CanRemove": not made.running,
            "ContainerID": made.container,
            "DetachKeys": "",
            "Pid": made.pid or 0,
        }
    )  # fmt: skip


ROUTES = (
    Route("POST", "/containers/{name}/attach", _attach),
    Route("GET", "/containers/{name}/logs", _logs),
    Route("POST", "/containers/{name}/resize", _resize),
    Route("POST", "/containers/{name}/exec", _exec_create),
    Route("POST", "/exec/{id}/start", _exec_start),
    Route("POST", "/exec/{id}/resize", _exec_resize),
    Route("GET", "/exec/{id}/json", _exec_inspect),
)
