"""Claim: a container by the service starts as soon as by dockerd or podman, in a daemon that stays small.

`docker run --rm` of a trivial command, by the same docker command where possible: the service, Debian's dockerd with
overlay2, and podman; the same image of one layer, on a file system of each one's own, with no network. Further figures:
the daemon's memory at rest and for each running container, the events that arrive while a process changes the store as
fast as possible, and the time of `system df` in a store of many snapshots. Each engine has its default durability.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cowfs import Store

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, rss, timed
from ..lab.peers import cowfs_env

SERVICE = "cowfs serve"
DOCKERD = "dockerd overlay2"
PODMAN = "podman"
SUBJECTS = (SERVICE, DOCKERD, PODMAN)

LIMITS = "nofile=4096:4096"
IMAGE = "trivial"


class Engine:
    """A container engine.

    Attributes:
        words: the command before its verb. pids: of the daemon's processes; none for podman.
    """

    def __init__(self, words: list[str], env: dict[str, str], pids: list[int]) -> None:
        self.words, self.env, self.pids = words, env, pids

    def __call__(self, *more: str, input: bytes | None = None) -> str:
        done = subprocess.run([*self.words, *more], env=self.env, input=input, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(more[:3])}: {done.stderr.decode(errors='replace').strip()[-300:]}")
        return done.stdout.decode()


def _need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            raise SkipSubject(f"{program} is not installed")


def _image() -> bytes:
    """A root file system of a static busybox."""
    program = shutil.which("busybox")
    if program is None:
        raise SkipSubject("busybox is not installed (Debian: busybox-static)")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("bin", "etc", "tmp"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        data = Path(program).read_bytes()
        info = tarfile.TarInfo("bin/busybox")
        info.size, info.mode = len(data), 0o755
        tar.addfile(info, io.BytesIO(data))
        for name in ("true", "sleep"):
            info = tarfile.TarInfo(f"bin/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(info)
    return out.getvalue()


# -- the engines -------------------------------------------------------------------------------------------------------


def _wait_for(socket_path: Path, process: subprocess.Popen[bytes], log: Path, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if _get(socket_path, "/_ping")[0] == 200:
                return
        except OSError:
            time.sleep(0.05)
    told = log.read_text(errors="replace").strip().splitlines()[-2:] if log.exists() else []
    raise SkipSubject(f"it does not start here: {' | '.join(told)[-300:]}")


def _docker(socket_path: Path, home: Path, pids: list[int]) -> Engine:
    env = {**os.environ, "DOCKER_HOST": f"unix://{socket_path}", "HOME": str(home), "DOCKER_CONFIG": str(home)}
    return Engine(["docker"], env, pids)


def _service(lab: Lab, disk: Path, short: Path) -> Engine:
    _need("docker", "runc")
    at, log = short / "s.sock", disk / "log"
    words = [sys.executable, "-m", "cowfs", "serve", "--root", str(disk / "store"), "--run-dir", str(short / "run")]
    process = lab.child([*words, "-H", f"unix://{at}"], env=cowfs_env(), log=log)
    _wait_for(at, process, log)
    return _docker(at, disk, [process.pid])


def _dockerd(lab: Lab, disk: Path, short: Path) -> Engine:
    _need("docker", "dockerd", "containerd", "runc")
    at, log = short / "d.sock", disk / "log"
    words = [
        "dockerd",
        "--data-root",
        str(disk / "data"),
        "--exec-root",
        str(short / "exec"),
        "--pidfile",
        str(short / "pid"),
    ]
    words += ["--host", f"unix://{at}", "--iptables=false", "--bridge=none", "--default-ulimit", LIMITS]
    words += ["--storage-driver", "overlay2"]
    process = lab.child(words, log=log)
    _wait_for(at, process, log)
    containerd = [int(pid) for pid in _children(process.pid)]
    return _docker(at, disk, [process.pid, *containerd])


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _podman(lab: Lab, disk: Path, short: Path) -> Engine:
    _need("podman", "runc")
    words = ["podman", "--root", str(disk / "root"), "--runroot", str(short / "pod"), "--storage-driver", "overlay"]
    words += ["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc"]
    return Engine(words, dict(os.environ), [])


MAKERS = {SERVICE: _service, DOCKERD: _dockerd, PODMAN: _podman}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(lab: Lab) -> None:
    names = lab.wanted(SUBJECTS)
    with tempfile.TemporaryDirectory(prefix="cb", dir="/run", ignore_cleanup_errors=True) as short, ExitStack() as held:
        engines: dict[str, Engine] = {}
        for name in names:
            with lab.trying(name):
                place = Path(short) / str(len(engines))
                place.mkdir()
                disk = held.enter_context(lab.fresh("ext4", 4 << 30))
                engine = MAKERS[name](lab, disk, place)
                engine("import", "-", IMAGE, input=_image())
                _run(engine)
                engines[name] = engine
        for name, engine in engines.items():
            with lab.trying(name):
                _at_rest(lab, name, engine)
        for _, name in lab.rounds([name for name in names if name in engines], 4 * lab.profile.rounds):
            with lab.trying(name):
                lab.record("run", name, timed(lambda engine=engines[name]: _run(engine)))  # type: ignore[misc]
        for _, name in lab.rounds(list(engines), min(3, lab.profile.rounds)):
            with lab.trying(name):
                lab.record("together", name, timed(lambda engine=engines[name]: _together(engine)))  # type: ignore[misc]
        for name, engine in engines.items():
            with lab.trying(name):
                _containers(lab, name, engine)
        if SERVICE in engines:
            with lab.trying(SERVICE):
                _figures(lab, Path(short))
        for engine in engines.values():
            if not engine.pids:
                engine("rm", "--all", "--force")


def _run(engine: Engine) -> None:
    more = ["--ulimit", LIMITS, "--ulimit", "nproc=4096:4096"] if not engine.pids else []
    engine("run", "--rm", "--network", "none", *more, IMAGE, "/bin/true")


def _together(engine: Engine) -> None:
    """A hundred of them, eight at a time."""
    with ThreadPoolExecutor(8) as threads:
        for each in [threads.submit(_run, engine) for _ in range(100)]:
            each.result()


def _at_rest(lab: Lab, name: str, engine: Engine) -> None:
    if engine.pids:
        time.sleep(1.0)
        lab.record("memory at rest", name, sum(map(rss, engine.pids)))


def _containers(lab: Lab, name: str, engine: Engine) -> None:
    """The memory of an idle container: in the daemon, and in all its processes."""
    count = 4 * lab.profile.rounds
    more = ["--ulimit", LIMITS, "--ulimit", "nproc=4096:4096"] if not engine.pids else []
    before, there = sum(map(rss, engine.pids)), _processes()
    ids = [engine("run", "-d", "--network", "none", *more, IMAGE, "/bin/sleep", "1000").strip() for _ in range(count)]
    time.sleep(1.0)
    if engine.pids:
        lab.record("daemon a container", name, max(0, sum(map(rss, engine.pids)) - before) / count)
    lab.record("all a container", name, sum(_proportional(pid) for pid in _processes() - there) / count)
    engine("rm", "-f", *(["-t", "0"] if not engine.pids else []), *ids)


def _processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _proportional(pid: int) -> int:
    """Bytes of a process, with shared ones divided among the sharers (proc(5), smaps_rollup: Pss)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _figures(lab: Lab, short: Path) -> None:
    """Events and `system df`, in a store of many snapshots."""
    disk, at = lab.folder("many"), short / "m.sock"
    count = min(10_000, lab.profile.store_snapshots)
    with Store.open(disk / "store", driver="overlay", fsync=False) as store:
        store.prepare("key")
        store.commit("key", "s0")
        for number in range(1, count):
            store.prepare("key", f"s{number - number % 10 - 10 if number >= 10 else 0}")
            store.commit("key", f"s{number}")
        for number in range(0, count, max(1, count // 100)):
            document = {"architecture": "amd64", "os": "linux", "config": {"Labels": {"number": str(number)}}}
            store.tag(f"image:{number}", f"s{number}", config=json.dumps(document))
        log = disk / "log"
        words = [
            sys.executable,
            "-m",
            "cowfs",
            "serve",
            "--root",
            str(disk / "store"),
            "--run-dir",
            str(short / "many"),
        ]
        process = lab.child([*words, "-H", f"unix://{at}"], env=cowfs_env(), log=log)
        _wait_for(at, process, log)
        lab.note(f"system df: {count} snapshots, 100 images")
        for _ in range(4 * lab.profile.rounds):
            store.record_event("bench", "change", "")  # a write came since, so no kept result may be used
            lab.record("system df", SERVICE, timed(lambda: _get(at, "/system/df")))
        for _ in range(lab.profile.rounds):
            _events(lab, store, at)


def _events(lab: Lab, store: Store, at: Path) -> None:
    """One process changes the store as fast as it can, a client of the daemon reads."""
    count = 20_000 if lab.profile.rounds > 1 else 2_000
    code = f"""
from cowfs import Store
with Store.open({store.root!r}, fsync=False) as store:
    for number in range({count}):
        store.record_event("bench", "change", str(number))
"""
    with _following(at) as lines:
        begin = time.perf_counter()
        writer = lab.child([sys.executable, "-c", code], env=cowfs_env())
        got: list[int] = []
        for line in lines:
            event = json.loads(line)
            if event["Type"] == "bench":
                got.append(int(event["Actor"]["ID"]))
            elif event["Type"] == "log":
                lab.note("events were lost: the reader was told so")
                break
            if len(got) == count:
                break
        took = time.perf_counter() - begin
        writer.wait()
    lab.record("events lost", SERVICE, count - len(got) + sum(now != wanted for wanted, now in enumerate(got)))
    lab.record("events a second", SERVICE, len(got) / took)


@contextmanager
def _following(at: Path) -> Iterator[Iterator[bytes]]:
    connection = _Local(at)
    try:
        connection.request("GET", "/events")
        answer = connection.getresponse()
        yield (line for line in answer if line.strip())
    finally:
        connection.close()


class _Local(http.client.HTTPConnection):
    """A connection to a unix socket."""

    def __init__(self, at: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._at = str(at)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._at)


def _get(at: Path, path: str) -> tuple[int, bytes]:
    connection = _Local(at)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


CLAIM = Claim(
    name="service",
    title="containers by docker's command",
    why="Starting is what a container costs each time; the daemon is what it costs all the time.",
    topic="store",
    metrics=(
        Metric(name="run", title="docker run --rm of a trivial command"),
        Metric(name="together", title="a hundred of them, eight at once"),
        Metric(name="memory at rest", unit="B", title="resident memory of the daemon's processes"),
        Metric(name="daemon a container", unit="B", title="the same for each container that runs"),
        Metric(name="all a container", unit="B", title="all processes that a container brings, what is shared divided"),
        Metric(name="system df", title="/system/df"),
        Metric(name="events a second", unit="1/s", title="events that a client reads", higher_is_better=True),
        Metric(name="events lost", unit="", title="events that a client did not get, or not in order"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="run",
            subject=SERVICE,
            against=DOCKERD,
            at_most=1.2,
            goal=1.0,
            says="docker run --rm against dockerd",
        ),
        Bar(
            metric="run", subject=SERVICE, against=PODMAN, at_most=1.2, goal=1.0, says="docker run --rm against podman"
        ),
        Bar(
            metric="together",
            subject=SERVICE,
            against=DOCKERD,
            at_most=1.2,
            goal=1.0,
            says="100 containers, 8 at once, against dockerd",
        ),
        Bar(metric="memory at rest", subject=SERVICE, at_most=60 << 20, says="memory of the daemon at rest"),
        Bar(
            metric="daemon a container", subject=SERVICE, at_most=1 << 20, says="memory of the daemon, a container more"
        ),
        Bar(metric="system df", subject=SERVICE, at_most=0.05, says="system df of a store of many snapshots"),
        Bar(metric="events lost", subject=SERVICE, at_most=0, says="events that were lost"),
        Bar(metric="events a second", subject=SERVICE, at_least=10_000, says="events a second that a client reads"),
    ),
)


def test_service(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
