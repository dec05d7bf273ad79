"""The daemon: it turns options into a store, doors and a table of routes, and handles signals.

Strategy. :class:`~cowfs.service.shared.Service` is the shared state of the handlers and has no thread; :class:`Front` answers. :func:`run` is the life of the process: one
instance for a store (a lock on a file in it), doors before the first line of the log says that they are open, the loop of
the doors in a thread, signals in the main thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from cowfs import __version__
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.mounting import prefork
from cowfs.mounting.protocol import is_private, run_directory
from cowfs.service import browsers, logs, rootless, systemd
from cowfs.service.api import (
    absent,
    containers as containers_api,
    df,
    images as images_api,
    monitoring,
    page,
    registry,
    streams,
    system,
    trees,
    volumes,
)
from cowfs.service.api.routing import Route, Table
from cowfs.service.doors import Door, Loop, open_door, open_doors
from cowfs.service.errors import status_of
from cowfs.service.http import Exchange, Reply, json_reply
from cowfs.service.logs import exchange_id, log
from cowfs.service.options import Options
from cowfs.service.shared import FOLDER, Service, pairs
from cowfs.store import Store
from cowfs.store.opening import default_root
from cowfs.store.reserve import NoRoomError, no_room

__all__ = ["Front", "run"]


def tables() -> Table:
    """The routes of all parts of the API."""
    routes: list[Route] = [
        *system.ROUTES,
        *absent.ROUTES,
        *registry.ROUTES,
        *monitoring.ROUTES,
        *page.ROUTES,
        *images_api.ROUTES,
        *df.ROUTES,
        *containers_api.ROUTES,
        *streams.ROUTES,
        *trees.ROUTES,
        *volumes.ROUTES,
    ]
    return Table(routes)


class Front:
    """The answers to all exchanges, by the routes of all parts of the API."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._table = tables()

    def _sentence(self, error: OSError) -> str:
        """An error of the system in words; a full disk with the place of it."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, NoRoomError):
            for place in (self._service.store.root, self._service.run_dir):
                left = os.statvfs(place)
                # below one MiB nothing is said against a failed write of more
                if left.f_bavail * left.f_frsize < 1 << 20 or (left.f_files and left.f_favail < 16):
                    full = OSError(error.errno, error.strerror)
                    if place == self._service.store.root:
                        return str(no_room(full, place).strerror)
                    return f"no space left on the file system of {place}"
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{where}{error.strerror or error}"

    def handle(self, exchange: Exchange) -> Reply:
        """Answer a request, with every error as an answer."""
        token = exchange_id.set(exchange.id)
        began = time.monotonic()
        try:
            try:
                browsers.check(self._service, exchange)
                reply = self._table.dispatch(self._service, exchange)
            except CowfsError as error:
                status = status_of(error)
                reply = Reply(status=304, type="") if status == 304 else json_reply({"message": str(error)}, status)
            except ConnectionError:
                raise
            except OSError as error:
                sentence = self._sentence(error)
                log.warning("%s %s: %s", exchange.method, exchange.path, sentence)
                reply = json_reply({"message": sentence}, 500)
            except Exception:  # noqa: BLE001  a fault of cowfs costs this exchange, and its traceback goes to the log alone
                log.exception("%s %s failed", exchange.method, exchange.path)
                reply = json_reply(
                    {"message": f"an internal error; the log tells more about exchange {exchange.id}"}, 500
                )
            taken = time.monotonic() - began
            self._service.count(exchange.method, reply.status, taken)
            log.debug(
                "%s %s -> %d in %.1f ms (%s)", exchange.method, exchange.path, reply.status, taken * 1e3, exchange.peer
            )
            return reply
        finally:
            exchange_id.reset(token)


# ---------------------------------------------------------------------------------------------------------------
# The process


def open_store(options: Options) -> Store:
    """The store of the options, with the options of ``--storage-opt`` that are the driver's."""
    from cowfs.model import parse_count, parse_size

    more: dict[str, Any] = {}
    for key, value in pairs(options.storage_opt):
        if key == "size":
            parse_size(value)
        elif key == "inodes":
            parse_count(value)
        else:
            more[key.rpartition(".")[2]] = value
    root = options.root or os.environ.get("COWFS_ROOT") or None
    fsync = os.environ.get("COWFS_FSYNC", "1") != "0"
    return Store.open(root, driver=options.storage_driver, fsync=fsync, **more)


@contextmanager
def only_instance(store: Store) -> Iterator[None]:
    """Be the only daemon of a store.

    Raises:
        FailedPrecondition: another one is; the message names its process.
    """
    folder = os.path.join(store.root, FOLDER)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    fd = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(100):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(fd, 100, 0).decode("ascii", "replace").strip()
                if holder and not os.path.exists(f"/proc/{holder}"):
                    time.sleep(0.05)  # it is dying
                    continue
                raise FailedPrecondition(
                    f"the store {store.root} has a daemon already, process {holder or '?'}",
                    remedy="one daemon serves a store; give it more doors with -H",
                ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def run(options: Options, reread: Callable[[], Options]) -> int:
    """Serve until a signal ends it, and return the exit status.

    Args:
        reread: gives the options anew, for SIGHUP.

    Raises:
        CowfsError: the daemon cannot start.
    """
    logs.set_up(level="debug" if options.debug else options.log_level, format=options.log_format)
    run_dir = os.path.realpath(options.run_dir) if options.run_dir else run_directory()
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    if not is_private(run_dir):  # its sockets and bundles are obeyed
        raise InvalidArgument(
            f"--run-dir {run_dir} is not this user's own, or others may write in it", remedy="one of mode 0700"
        )
    if os.geteuid() != 0 and (options.host or not _of_engines(options)):
        _become_root_of_users(options, run_dir)
    with open_store(options) as store, only_instance(store):
        service = Service(options, store, run_dir)
        prefork.stay(365 * 86400.0)
        with ExitStack() as held:
            if options.containerd:
                held.enter_context(_containerd(service))
            if options.docker_plugin:
                held.enter_context(_docker_plugin(service))
            doors: list[Door] = []
            if options.host or not _of_engines(options):
                service.containers.take_over()
                service.containers.spawner.warm_up()
                doors = open_doors(options, os.path.join(run_dir, "docker.sock"))
            held.callback(service.images.close)
            held.callback(service.containers.close)
            for door in doors:
                held.callback(door.close)
            return _serve(service, doors, reread)


def _become_root_of_users(options: Options, run_dir: str) -> None:
    """Let an ordinary user's daemon be root of a user namespace, for containers; where there can be none, it serves without them."""
    if not (options.root or os.environ.get("COWFS_ROOT")):
        os.environ["COWFS_ROOT"] = os.path.abspath(default_root())  # in there, another one would be the default
    try:
        problem = rootless.enter(run_dir)
    except Unsupported as error:
        log.warning("containers cannot be started by this user: %s", error)
        return
    if problem:
        log.warning("containers have one user and group, root: %s", problem)


def _of_engines(options: Options) -> list[str]:
    """The doors for engines."""
    return [door for door in (options.containerd, options.docker_plugin) if door]


@contextmanager
def _docker_plugin(service: Service) -> Iterator[None]:
    """Be a graph driver plugin of dockerd meanwhile.

    Raises:
        CowfsError: it cannot listen.
    """
    from cowfs.service.graphdriver.layers import Layers
    from cowfs.service.graphdriver.plugin import Plugin

    state = os.path.join(service.folder, "docker-plugin.json")
    layers = Layers(service.store, state, service.default_limit)
    try:
        door = open_door(service.options.docker_plugin, "--docker-plugin")
        loop = Loop([door], Plugin(layers).handle, _new_id, service.options.max_connections)
        thread = threading.Thread(target=loop.run, name="cowfs-docker-plugin", daemon=True)
        thread.start()
        log.info("listening on %s (docker plugin)", door.name)
        try:
            yield
        finally:
            loop.stop()
    finally:
        layers.close()


@contextmanager
def _containerd(service: Service) -> Iterator[None]:
    """Serve as a snapshotter of containerd for the block.

    Raises:
        Unsupported: grpcio or protobuf is missing.
        CowfsError: it cannot listen.
    """
    try:
        from cowfs.service.containerd.annotations import Annotations
        from cowfs.service.containerd.server import SnapshotsServer
        from cowfs.service.containerd.snapshots import Snapshots
    except ImportError as error:
        raise Unsupported(
            f"--containerd needs the packages grpcio and protobuf: {error}",
            remedy="pip install 'cowfs-storage[containerd]'",
        ) from None
    address = service.options.containerd_address
    annotations = Annotations(address) if address else None
    snapshots = Snapshots(service.store, os.path.join(service.run_dir, "held"), service.default_limit, annotations)
    try:
        server = SnapshotsServer(snapshots, service.options.containerd)
        server.start()
        log.info("listening on %s (containerd)", server.address)
        try:
            yield
        finally:
            server.stop()
    finally:
        snapshots.close()


def _serve(service: Service, doors: list[Door], reread: Callable[[], Options]) -> int:
    options = service.options
    signals = _catch_signals()
    loop = Loop(doors, Front(service).handle, _new_id, options.max_connections)
    service.open_to(loop)
    if options.pidfile:
        with open(options.pidfile, "w", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    waiting = threading.Thread(target=loop.run, name="cowfs-doors", daemon=True)
    waiting.start()
    log.info("cowfs %s, store %s, driver %s", __version__, service.store.root, service.store.driver.name)
    for name, probe in service.store.why.items():
        log.info(
            "driver %s: %s; %s", name, "can run here" if probe.usable else "cannot run here", ", ".join(probe.reasons)
        )
    for door in doors:
        log.info("listening on %s%s", door.name, " (TLS)" if door.context else "")
    names = [door.name for door in doors] + _of_engines(options)
    systemd.notify("READY=1\nSTATUS=" + ", ".join(names))
    try:
        while all(_signal(service, number, reread) for number in signals.recv(64)):
            pass
    finally:
        systemd.notify("STOPPING=1")
        log.info("stopping")
        loop.stop()
        if options.pidfile:
            try:
                os.unlink(options.pidfile)
            except FileNotFoundError:
                pass
    return 0


def _catch_signals() -> socket.socket:
    """A socket that gets a byte with the number of each signal: waiting for it misses no signal, unlike waiting for a queue."""
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda _got, _frame: None)
    signal.set_wakeup_fd(sending.detach(), warn_on_full_buffer=False)
    return receiving


def _signal(service: Service, number: int, reread: Callable[[], Options]) -> bool:
    """Handle a signal. Returns False for one that ends the daemon."""
    if number == signal.SIGHUP:
        _reload(service, reread)
    elif number == signal.SIGUSR1:
        log.warning("SIGUSR1:\n%s", service.dump())
    elif number == signal.SIGUSR2:
        service.set_debug(on=not service.debug)
        _set_up_log(service)
        log.warning("debug mode %s", "on" if service.debug else "off")
    else:
        return False
    return True


def _set_up_log(service: Service) -> None:
    options = service.options
    logs.set_up(level="debug" if service.debug else options.log_level, format=options.log_format)


def _reload(service: Service, reread: Callable[[], Options]) -> None:
    systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        options, fixed = service.options.changed_live(reread())
    except CowfsError as error:
        log.error("not reloaded: %s", error)
    else:
        service.reconfigure(options)
        _set_up_log(service)
        log.info("reloaded")
        for name in fixed:
            log.warning("%s takes effect at the next start", name)
    systemd.notify("READY=1")


def _new_id() -> str:
    return secrets.token_hex(4)


def main_service(arguments: Any) -> int:
    """``cowfs serve``."""
    from cowfs.service import options as options_module

    def reread() -> Options:
        return options_module.read(arguments, os.environ)

    options = reread()
    if arguments.print_config:
        sys.stdout.write(options_module.as_toml(options))
        return 0
    if arguments.install:
        user = bool(arguments.user) or os.geteuid() != 0
        for path in systemd.install(systemd.directory_of_units(user=user), user=user, force=arguments.force):
            sys.stdout.write(f"{path}\n")
        manager = "systemctl --user" if user else "systemctl"
        sys.stdout.write(f"{manager} daemon-reload && {manager} enable --now cowfs.socket\n")
        return 0
    if options.tlsverify and not (options.tlscert and options.tlskey):
        raise InvalidArgument(
            "--tlsverify needs --tlscacert, --tlscert and --tlskey", remedy="cowfs tls init DIR makes all of them"
        )
    return run(options, reread)
