"""The verbs of containers.

Rules:

1. The state is in files: a record by the daemon, a run by the supervisor (:mod:`.container`), the tree in the store.
Memory only mirrors them. So a new daemon finds everything (:meth:`Containers.take_over`), and half-done work of a
killed one is garbage with a known label. 2. A container's lock is held by a verb that changes its state, never while
waiting for its process to end. 3. The tree of a running container is mounted at ``rootfs`` in its bundle, by a server
of its own; it is unmounted after the supervisor's end.

Threads: any; one for each container whose supervisor lives (it watches for the end).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, NotFound
from cowfs.service.containers import bundle
from cowfs.service.containers.checking import check, check_image, check_platform
from cowfs.service.containers.container import SETTLE_SECONDS, Container
from cowfs.service.containers.creating import LABEL, Maker
from cowfs.service.containers.execs import Execs
from cowfs.service.containers.furnishing import write_bundle
from cowfs.service.containers.health import Monitors
from cowfs.service.containers.records import ContainerConfig
from cowfs.service.containers.register import Register
from cowfs.service.containers.restarting import Restarts
from cowfs.service.containers.signals import send_signal
from cowfs.service.containers.spawner import Spawner
from cowfs.service.containers.supervision import Runtime, ask, asked, dismiss, hand_over, settings
from cowfs.service.containers.supervisor import RUN_FILE
from cowfs.service.containers.trees import Trees
from cowfs.service.errors import ApiError, NotModified
from cowfs.service.logs import log
from cowfs.service.telling import Teller
from cowfs.sys.atomic import write_file

if TYPE_CHECKING:
    from cowfs.service.containers.host import Host
    from cowfs.store import Store

__all__ = ["Containers"]

MAX_RUN_DIR = 80
"""Bytes: beside them an address of 107 bytes (unix(7)) has room for the names of sockets."""

STOP_SECONDS = 10


class Containers:
    """The containers of a daemon.

    Args:
        service: the owner of images, options and runtime.
    """

    def __init__(self, service: Host) -> None:
        self._service = service
        self._register = Register()
        self.spawner = Spawner()
        self.execs = Execs(self)
        self.restarts = Restarts(lambda container: self.start(container, again=True))
        self.monitors = Monitors(self)
        self._teller = Teller(service.store)
        self.trees = Trees(service.store)
        self.folder = os.path.join(service.folder, "containers")
        self.run_dir = os.path.join(service.run_dir, "containers")
        self.runtime = Runtime(service.runtime_program, os.path.join(service.run_dir, "runtime"))
        if len(os.fsencode(self.run_dir)) > MAX_RUN_DIR:
            raise InvalidArgument(
                f"{service.run_dir} is too long for the addresses of sockets below it",
                remedy="--run-dir DIR with a shorter one",
            )
        for each in (self.folder, self.run_dir, self.runtime.root):
            os.makedirs(each, mode=0o700, exist_ok=True)
        self._maker = Maker(service, self.folder, self.run_dir)

    @property
    def _store(self) -> Store:
        return self._service.store

    # -- a new daemon -----------------------------------------------------------------------------

    def take_over(self) -> None:
        """Find the existing containers, watch the running ones, and clean up after a killed daemon."""
        self._teller.begin()
        for id in sorted(os.listdir(self.folder)):
            folder = os.path.join(self.folder, id)
            try:
                found = Container.load(folder, os.path.join(self.run_dir, id), durable=self._store.driver.fsync)
                self._store.index.get(found.key)
            except (OSError, ValueError, TypeError, NotFound):
                shutil.rmtree(folder, ignore_errors=True)  # a create or a removal that was cut short
                continue
            self._register.add(found)
        for info in list(self._store.walk()):
            id = info.labels.get(LABEL, "")
            if id and info.name == f"container/{id}" and id not in self._register:
                self._drop_snapshot(info.name)
        self.runtime.sweep(self.run_dir, {each.id[:12] for each in self._register})
        for each in self._register:
            if self._watch(each):
                if each.running:
                    each.settled.clear()
                    self.monitors.begin(each)
                    log.info("container %s goes on (process %d)", each.name, each.pid)
                else:
                    dismiss(each)  # its client, who attached first, lost the daemon before the start
            else:
                each.found = True
                self._settle(each)

    def close(self) -> None:
        """Close; the containers go on."""
        self.restarts.close()
        self.monitors.close()
        self.spawner.close()

    def _drop_snapshot(self, key: str) -> None:
        try:
            where = self._store.mounted_at(key)
            if where is not None:
                self._store.unmount(key, lazy=True)
            self._store.remove(key)
        except CowfsError as error:
            log.warning("%s stays: %s", key, error)

    # -- reading ----------------------------------------------------------------------------------

    def all(self) -> list[Container]:
        """All containers, the newest first."""
        return sorted(self._register, key=lambda each: each.created, reverse=True)

    def get(self, reference: str) -> Container:
        """The container of a name, an id, or the beginning of an id.

        Raises:
            NotFound: there is none; ApiError: 400: several.
        """
        return self._register.get(reference)

    def states(self) -> dict[str, int]:
        """The number of containers, by state."""
        found: dict[str, int] = {}
        for each in self.all():
            found[each.status] = found.get(each.status, 0) + 1
        return found

    def users(self) -> list[tuple[str, str, bool]]:
        """The containers that use images: (image id, container id, whether it runs)."""
        return [(each.image, each.id, each.running) for each in self.all()]

    def size(self, container: Container) -> int:
        """The bytes of a container's own layer."""
        try:
            return self._store.usage(container.key).bytes
        except (CowfsError, OSError):
            return 0  # it goes at this moment

    # -- create -----------------------------------------------------------------------------------

    def create(self, config: ContainerConfig, raw: Mapping[str, Any], name: str, platform: str = "") -> Container:
        """Make a container: a writable snapshot over its image, and a record.

        Args:
            config: the request. raw: the same as received. name: "" for a generated one. platform: the image must be of it; "" is any.

        Raises:
            NotFound: no such image. AlreadyExists: the name is taken. ApiError: a setting that is not supported.
        """
        check(config, raw, os.path.basename(self._service.runtime_program()))
        if not config.Image:
            raise ApiError(400, "no image is named")
        image = self._service.images.get(config.Image)
        check_platform(config.Image, image, platform)
        check_image(image)
        merged = bundle.merge(config, image)
        if not bundle.arguments_of(merged):
            raise ApiError(400, "no command specified")
        id = secrets.token_hex(32)
        name = self._register.reserve(name, id)
        with self._service.volumes.lock:  # keep its volumes from removal until their use is recorded
            try:
                made = self._maker.make(id, name, image, config, merged, raw)
            except BaseException:
                self._register.release(name)
                self._service.volumes.drop_of(id)
                raise
            self._register.add(made)
        self.tell(made, "create")
        return made

    # -- start ------------------------------------------------------------------------------------

    def start(self, container: Container, *, again: bool = False) -> None:
        """Start a container's process; returns when it runs.

        Args:
            again: by its restart policy, which goes on counting.

        Raises:
            NotModified: it runs already. ApiError: the runtime failed, with its message.
        """
        if not again:
            self.restarts.cancel(container)
        with ExitStack() as begun:  # its end is recorded after its start
            with container.lock:
                if not container.running:  # the clean-up of a run begins with its end
                    container.wait_settled()
                if container.running or (again and not container.restarting):
                    raise NotModified
                if container.removing:
                    raise FailedPrecondition(f"container {container.id[:12]} is being removed")
                mounted = False
                # Noted before it runs: the thread that hears of its end goes by these, and may be faster than this one.
                wait, before = container.wait_number, (container.stopped, container.restarts, container.delay)
                container.stopped = False
                container.restarts, container.delay = (container.restarts + 1, container.delay) if again else (0, 0.0)
                try:
                    self.trees.mount(container)
                    mounted = True
                    write_bundle(container, self._service.volumes.mounts_of(container))
                    self._supervise(container)
                    container.settled.clear()
                    answer = begun.enter_context(asked(container, {"verb": "start"}))
                except BaseException as error:
                    container.stopped, container.restarts, container.delay = before
                    container.settled.set()
                    if container.watcher is not None:  # of an attached client, which waits for output
                        dismiss(container)
                    self._not_started(container, str(error), mounted=mounted)
                    raise
                if "ok" not in answer:
                    container.stopped, container.restarts, container.delay = before
                    self._refused(container, answer["error"])
                with container.changed:
                    # Its supervisor may have been killed already, and the watching thread knows more than this answer.
                    if container.run.get("started") != answer["ok"]["started"]:
                        container.run = answer["ok"]
                container.paused, container.error = False, ""
                container.save_if_room()
                self.restarts.cancel(container, wait)
            self.tell(container, "start")
        self.monitors.begin(container)

    def volume_users(self) -> list[tuple[str, str]]:
        """Each use of a volume: (its name, the container's id)."""
        return [(volume["name"], each.id) for each in self._register for volume in each.volumes]

    def _refused(self, container: Container, error: str) -> None:
        """Raises ApiError: the runtime could not start it, and says why."""
        self._not_started(container, error)
        client_fault = any(
            word in error for word in ("not found", "no such file", "permission denied", "not a directory")
        )
        raise ApiError(400 if client_fault else 500, f"failed to create task for container: {error}")

    def _not_started(self, container: Container, error: str, *, mounted: bool = True) -> None:
        """Clean up after a start that failed, and tell those who wait for an end or a removal."""
        self._wait_gone(container)
        if mounted:
            self.trees.unmount(container)
        container.error = error
        container.run = {}
        try:
            os.unlink(os.path.join(container.folder, RUN_FILE))
        except FileNotFoundError:
            pass
        container.save_if_room()
        with container.changed:
            container.ends += 1
            container.changed.notify_all()
        self.tell(container, "die", exitCode=str(container.code))
        if container.host.get("AutoRemove"):
            self.remove(container)

    # -- the supervisor ---------------------------------------------------------------------------

    def _supervise(self, container: Container) -> None:
        """Start a supervisor, if there is none, and a thread that watches it."""
        if container.watcher is not None:
            return
        runtime = self._service.runtime_program()
        if not runtime:
            raise ApiError(501, "there is no OCI runtime on this host: install runc or crun")
        os.makedirs(container.bundle, mode=0o700, exist_ok=True)
        self.spawner.spawn(settings(container, runtime, self.runtime.root, self._store.root))
        if not self._watch(container):
            raise CowfsError(f"the supervisor of container {container.id[:12]} ended at once")

    def _watch(self, container: Container) -> bool:
        """Watch the supervisor, if there is one; its first report is taken over before this returns."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(container.socket)
            sock.sendall(b'{"verb": "watch"}\n')
            lines = sock.makefile("rb")
            first = json.loads(lines.readline() or b"null")
        except (OSError, ValueError):
            first = None
        if first is None:
            sock.close()
            return False
        if first["run"]:
            container.run = first["run"]
        for id, known in first["execs"].items():
            self.execs.found(id, container, known["pid"], known["code"])

        def watch() -> None:
            with sock, lines:
                try:
                    for line in lines:
                        self._heard(container, json.loads(line))
                except (OSError, ValueError):
                    pass
            container.watcher = None
            self._settle(container)

        container.watcher = threading.Thread(target=watch, name=f"cowfs-watch-{container.id[:8]}", daemon=True)
        container.watcher.start()
        return True

    def _heard(self, container: Container, message: dict[str, Any]) -> None:
        if "exec" in message:
            self.execs.ended(message["exec"], message["code"])
            return
        with container.changed:
            container.run = message["exit"]
            container.ends += 1
            container.changed.notify_all()

    def _settle(self, container: Container) -> None:
        """Clean up after the end of a supervisor: an ordinary one, or a killed one."""
        try:
            if container.running:
                self._lost(container)
            mounted = self.trees.is_mounted(container)
            if container.run or mounted:
                self.trees.unmount(container)
            for each in container.volumes if mounted else ():
                self._service.volumes.tell(each["name"], "unmount", container=container.id, driver="local")
            container.paused = False
            self._teller.catch_up()
        except (CowfsError, OSError) as error:
            log.warning("container %s: %s", container.name, error)
        finally:
            container.settled.set()
            container.tell()
        if "finished" in container.run and container.host.get("AutoRemove") and not container.removing:
            try:
                self.remove(container)
            except CowfsError as error:
                log.warning("container %s is not removed: %s", container.name, error)
            return
        self.restarts.ended(container)
        container.found = False

    def _lost(self, container: Container) -> None:
        """End a container whose supervisor is gone: its streams and its status are lost."""
        if container.process_lives():
            log.warning("container %s has lost its supervisor and is ended", container.name)
            send_signal(container, signal.SIGKILL)
        self.runtime("delete", "--force", container.id, check=False)
        container.run |= {"finished": time.time_ns(), "code": 255, "oom": False}
        write_file(
            os.path.join(container.folder, RUN_FILE), json.dumps(container.run).encode(), durable=container.durable
        )
        self.tell(container, "die", exitCode="255")
        with container.changed:
            container.ends += 1
            container.changed.notify_all()

    def _wait_gone(self, container: Container) -> None:
        watcher = container.watcher
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(SETTLE_SECONDS)

    # -- attach, exec -----------------------------------------------------------------------------

    def prepare_attach(self, container: Container) -> None:
        """Start a supervisor to attach to, if there is none."""
        with container.lock:
            if not container.running:
                container.wait_settled()  # else it would be the one of the last run, which is ending
            self._supervise(container)

    def attach(
        self, container: Container, sock: socket.socket, early: bytes, streams: list[int], keys: bytes = b""
    ) -> None:
        """Hand a client's socket to the supervisor. The socket is closed here in any case."""
        hand_over(container, sock, early, streams, keys)
        self.tell(container, "attach")

    def resize(self, container: Container, width: int, height: int, exec: str = "") -> None:
        """Set the size of a terminal."""
        ask(container, {"verb": "resize", "width": width, "height": height, "exec": exec})

    # -- signals ----------------------------------------------------------------------------------

    def kill(self, container: Container, text: str = "") -> None:
        """Send a signal.

        Raises:
            FailedPrecondition: it does not run.
        """
        number = bundle.signal_number(text or "KILL")
        if not container.running:
            raise FailedPrecondition(f"container {container.id} is not running")
        self.restarts.ends_by_verb(container)
        send_signal(container, number)
        if number == signal.SIGKILL:
            self._thaw(container)
            container.wait(lambda: not container.running, SETTLE_SECONDS)
        self.tell(container, "kill", signal=str(number))

    def stop(self, container: Container, seconds: int | None = None, text: str = "") -> None:
        """Ask a container's process to end, and kill it when it has not after a while.

        Args:
            seconds: the time for it; below zero: unbounded; default: its own, or ten.

        Raises:
            NotModified: it does not run.
        """
        if not container.running and self._ends_waiting(container):
            return
        self.restarts.ends_by_verb(container)
        number = bundle.signal_number(text or container.config.get("StopSignal") or "TERM")
        if seconds is None:
            own = container.config.get("StopTimeout")
            seconds = STOP_SECONDS if own is None else own
        self._thaw(container)
        send_signal(container, number)
        self.tell(container, "kill", signal=str(number))
        if not container.wait(lambda: not container.running, 1e9 if seconds < 0 else min(seconds, 1e9)):
            send_signal(container, signal.SIGKILL)
            self.tell(container, "kill", signal=str(int(signal.SIGKILL)))
            container.wait(lambda: not container.running, SETTLE_SECONDS)
        container.settled.wait(SETTLE_SECONDS)
        self.tell(container, "stop")

    def _ends_waiting(self, container: Container) -> bool:
        """Cancel the pending restart of a stopped container. Returns False if it runs by now.

        Raises:
            NotModified: it neither runs nor waits.
        """
        with container.lock:  # not while it is being started
            waited = self.restarts.cancel(container)
            if container.running:
                return False
            if not waited:
                raise NotModified
            self.restarts.ends_by_verb(container)
        self.tell(container, "stop")
        return True

    def restart(self, container: Container, seconds: int | None = None, text: str = "") -> None:
        """Stop, if it runs, and start."""
        try:
            self.stop(container, seconds, text)
        except NotModified:
            pass
        self.start(container)
        self.tell(container, "restart")

    def _thaw(self, container: Container) -> None:
        if container.paused:
            self.unpause(container)

    def pause(self, container: Container) -> None:
        """Freeze the container's processes.

        Raises:
            FailedPrecondition: it does not run, or is paused.
        """
        with container.lock:
            if not container.running:
                raise FailedPrecondition(f"container {container.id} is not running")
            if container.paused:
                raise FailedPrecondition(f"container {container.id} is already paused")
            if not container.cgroup:
                raise ApiError(501, "cannot pause: no control group is delegated to this daemon's user")
            self.runtime("pause", container.id)
            container.paused = True
            container.save_if_room()
        self.tell(container, "pause")

    def unpause(self, container: Container) -> None:
        """Thaw the container's processes.

        Raises:
            FailedPrecondition: it is not paused.
        """
        with container.lock:
            if not container.paused:
                raise FailedPrecondition(f"container {container.id} is not paused")
            self.runtime("resume", container.id)
            container.paused = False
            container.save_if_room()
        self.tell(container, "unpause")

    # -- change, remove ---------------------------------------------------------------------------

    def rename(self, container: Container, name: str) -> None:
        """Rename the container.

        Raises:
            AlreadyExists: the name is taken.
        """
        if not name.removeprefix("/"):
            raise ApiError(400, "Neither old nor new names may be empty")
        if name.removeprefix("/") == container.name:
            raise ApiError(400, "Renaming a container with the same name as its current name")
        with container.lock:
            old, new = container.name, self._register.reserve(name, container.id)
            container.name = new
            try:
                container.save()
            except BaseException:
                container.name = old
                self._register.release(new)
                raise
            self._register.release(old)
        self.tell(container, "rename", oldName=f"/{old}")

    def remove(self, container: Container, *, force: bool = False, volumes: bool = False) -> None:
        """Remove the container, with its tree.

        Args:
            volumes: also remove its volumes without a name; a container of ``--rm`` always removes them.

        Raises:
            FailedPrecondition: it runs, and ``force`` is off.
        """
        if (container.running or container.restarting) and not force:
            raise FailedPrecondition(
                f'cannot remove container "/{container.name}": container is {container.status}:'
                " stop the container before removing or force remove"
            )
        with container.lock:
            if container.removed:
                raise NotFound(f"No such container: {container.id}")
            if container.removing:
                raise FailedPrecondition(f"removal of container {container.id} is already in progress")
            container.removing = True
            self.restarts.cancel(container)
        try:
            if container.running:
                self.kill(container)
            container.wait_settled()
            if not container.running and container.watcher is not None:
                dismiss(container)
            self._wait_gone(container)
            self.trees.unmount(container)
            self._store.remove(container.key)
        except BaseException:
            container.removing = False
            raise
        shutil.rmtree(container.folder, ignore_errors=True)
        shutil.rmtree(container.bundle, ignore_errors=True)
        self._register.drop(container)
        self.execs.forget(container)
        if volumes or container.host.get("AutoRemove"):
            self._service.volumes.drop(each["name"] for each in container.volumes if each["own"])
        container.removed = True
        try:
            self.tell(container, "destroy")  # before anybody learns of it: what is acknowledged is recorded
        finally:
            container.tell()

    def tell(self, container: Container, action: str, **more: str) -> None:
        """Record an event; on a full disk with the next one."""
        self._teller.tell("container", action, container.id, {**container.attributes, **more})

    # -- the tree ---------------------------------------------------------------------------------
