"""One container: its record, and the words for its state.

Two files in its folder, each with one writer: ``container.json`` by the daemon, ``run.json`` by the supervisor. Both are replaced
as a whole, so a reader sees one state or the next.
"""

from __future__ import annotations

import errno
import json
import os
import socket as sockets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cowfs.errors import FailedPrecondition
from cowfs.service.containers import bundle
from cowfs.service.containers.cgroups import PREFIX, place
from cowfs.service.containers.records import HostConfig
from cowfs.service.containers.supervisor import RUN_FILE
from cowfs.service.logs import log
from cowfs.service.records import decode
from cowfs.sys.atomic import write_file
from cowfs.sys.process import start_time

if TYPE_CHECKING:
    from cowfs.service.containers.healthcheck import Health

__all__ = ["RECORD_FILE", "Container", "Exec"]

OWNER = "cowfs.service.container"
"""Label of a volume without a name: the container that it was made for."""

RECORD_FILE = "container.json"
_HEALTH = {"starting": "health: starting", "healthy": "healthy", "unhealthy": "unhealthy"}
SETTLE_SECONDS = 60.0


@dataclass(slots=True)
class Exec:
    """One further process of a container, requested or running."""

    id: str
    container: str
    config: Any
    pid: int | None = None
    code: int | None = None
    running: bool = False


@dataclass(slots=True, kw_only=True)
class Container:
    """A container.

    Attributes:
        id: 64 hexadecimal digits. folder: its files. bundle: of the runtime, gone after a restart of the host.
        name: without a slash. created: nanoseconds since 1970.
        image, image_name: the image's id, and its name in the request. snapshot: the image's top snapshot.
        config, host: as the API shows them, merged of request and image.
        volumes: those that it mounts: ``name``, ``target``, ``readonly``, ``copy``, and ``own``: whether it was made for this container alone.
        stopped: whether a verb ended its last run. restarts: number by its policy, since a verb started it. restarting,
            delay: whether and how long it waits for one; guarded by changed. wait_number: of the last such wait. found: by a new daemon, which has not
                applied its policy yet.
        health: of this run, if it has a check.
        run: the supervisor's record; {} before the first start. paused, error: see the API.
        lock: held while a verb changes the state. changed: notified at each end of its process, and at its removal.
        ends: the number of ends of its process seen by this daemon. settled: whether the clean-up of the last end is done.
        watcher: the thread that watches its supervisor, while there is one.
    """

    id: str
    folder: str
    bundle: str
    name: str
    created: int
    image: str
    image_name: str
    snapshot: str
    config: dict[str, Any]
    host: dict[str, Any]
    durable: bool = True
    paused: bool = False
    error: str = ""
    volumes: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    restarts: int = 0
    restarting: bool = False
    delay: float = 0.0
    wait_number: int = 0
    found: bool = False
    health: Health | None = None
    removing: bool = False
    removed: bool = False
    run: dict[str, Any] = field(default_factory=dict)
    ends: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    changed: threading.Condition = field(default_factory=threading.Condition)
    settled: threading.Event = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.settled.set()

    # -- files ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the record."""
        names = (
            "id",
            "name",
            "created",
            "image",
            "image_name",
            "snapshot",
            "config",
            "host",
            "paused",
            "error",
            "volumes",
            "stopped",
            "restarts",
        )
        data = json.dumps({each: getattr(self, each) for each in names}).encode()
        write_file(os.path.join(self.folder, RECORD_FILE), data, durable=self.durable)

    def save_if_room(self) -> None:
        """Write the record of a change that has happened; on a full disk it is written with the next one."""
        try:
            self.save()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("the record of container %s is not up to date: %s", self.name, error.strerror)

    @classmethod
    def load(cls, folder: str, bundle: str, *, durable: bool) -> Container:
        """Read the record.

        Raises:
            OSError, ValueError: the record is unreadable.
        """
        with open(os.path.join(folder, RECORD_FILE), "rb") as file:
            made = cls(folder=folder, bundle=bundle, durable=durable, **json.load(file))
        made.read_run()
        return made

    def read_run(self) -> None:
        """Read the supervisor's latest record."""
        try:
            with open(os.path.join(self.folder, RUN_FILE), "rb") as file:
                self.run = json.load(file)
        except (FileNotFoundError, ValueError):
            self.run = {}

    # -- names ------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """The key of its snapshot in the store."""
        return f"container/{self.id}"

    @property
    def socket(self) -> str:
        """The socket of its supervisor."""
        return os.path.join(os.path.dirname(self.bundle), f"{self.id[:12]}.sock")

    @property
    def rootfs(self) -> str:
        """The mount point of its snapshot while it runs."""
        return os.path.join(self.bundle, "rootfs")

    @property
    def cgroup(self) -> str:
        """Its control group, of its present or last run or of the next one; "" where it has none."""
        if "cgroup" in self.run:
            return str(self.run["cgroup"])
        if self.running:  # started by a cowfs that did not record it
            return f"{PREFIX}/{self.id}"
        return self.next_cgroup

    @property
    def next_cgroup(self) -> str:
        """The control group of a run that begins now; "" where this daemon may make none."""
        parent = place().parent
        return f"{parent}/{self.id}" if parent else ""

    @property
    def host_config(self) -> HostConfig:
        return decode(HostConfig, self.host)

    @property
    def labels(self) -> dict[str, str]:
        return self.config.get("Labels") or {}

    @property
    def hostname(self) -> str:
        if self.host.get("NetworkMode") == "host" and not self.config.get("Hostname"):
            return sockets.gethostname()
        return self.config.get("Hostname") or self.id[:12]

    @property
    def arguments(self) -> list[str]:
        return bundle.arguments_of(self.config)

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes of its events."""
        return {**{key: str(value) for key, value in self.labels.items()}, "image": self.image_name, "name": self.name}

    # -- state ------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return bool(self.run) and "finished" not in self.run

    @property
    def pid(self) -> int:
        return int(self.run["pid"]) if self.running else 0

    def process_lives(self) -> bool:
        """Whether the process that was started is still the one with its number."""
        pid = self.run.get("pid")
        return pid is not None and start_time(pid) == self.run.get("ticks")

    @property
    def status(self) -> str:
        if self.removing:
            return "removing"
        if self.running:
            return "paused" if self.paused else "running"
        if self.restarting:
            return "restarting"
        return "exited" if self.run or self.error else "created"

    @property
    def code(self) -> int:
        """The exit status; 127, as in Docker, if it could not be started."""
        if "finished" in self.run:
            return int(self.run["code"])
        return 127 if self.error and not self.running else 0

    def describe(self) -> str:
        """The status in ``docker ps``."""
        now = time.time_ns()
        if self.running:
            more = f" ({_HEALTH[self.health.status]})" if self.health is not None else ""
            return f"Up {ago(now - self.run['started'])}" + (" (Paused)" if self.paused else more)
        if self.restarting:
            return f"Restarting ({self.code}) {ago(now - self.run['finished'])} ago"
        if "finished" in self.run:
            return f"Exited ({self.code}) {ago(now - self.run['finished'])} ago"
        return "Exited (127)" if self.error else "Created"

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds, or the time is over. Returns whether it holds."""
        with self.changed:
            return self.changed.wait_for(done, seconds)

    def must_run(self) -> None:
        """Raises FailedPrecondition: the container does not run, or is paused."""
        if not self.running:
            raise FailedPrecondition(f"container {self.id} is not running")
        if self.paused:
            raise FailedPrecondition(f"container {self.id} is paused, unpause the container before exec")

    def wait_settled(self) -> None:
        """Wait for the clean-up of the last run. Raises FailedPrecondition after a minute."""
        if not self.settled.wait(SETTLE_SECONDS):
            raise FailedPrecondition(f"container {self.id[:12]} has not let go of its last run yet")

    def tell(self) -> None:
        """Wake the waiting threads."""
        with self.changed:
            self.changed.notify_all()


def ago(nanoseconds: int) -> str:
    """A time span for people, as Docker words it.

    >>> ago(5 * 10**9), ago(90 * 10**9), ago(5 * 3600 * 10**9)
    ('5 seconds', 'About a minute', '5 hours')
    """
    seconds = nanoseconds // 10**9
    for bound, text in (
        (1, "Less than a second"), (2, "1 second"), (60, f"{seconds} seconds"), (120, "About a minute"),
        (3600, f"{seconds // 60} minutes"), (7200, "About an hour"), (48 * 3600, f"{seconds // 3600} hours"),
        (14 * 86400, f"{seconds // 86400} days"), (60 * 86400, f"{seconds // (7 * 86400)} weeks"),
        (730 * 86400, f"{seconds // (30 * 86400)} months"),
    ):  # fmt: skip
        if seconds < bound:
            return text
    return f"{seconds // (365 * 86400)} years"
