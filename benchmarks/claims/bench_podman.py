"""Claim: podman over cowfs-overlayfs is as fast as over fuse-overlayfs, once the mount service runs.

`podman run --rm` of a trivial command, `podman diff` and `podman commit` of one container, over an image of 1,000 small files, with a storage of each subject's own on
one file system. cowfs thrice: with the mount service and the program that `cowfs podman install` compiles, with the service and that program in Python, and alone.
"""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, rss, timed
from ..lab.peers import cowfs_env

SERVED, IN_PYTHON, ALONE, PEER = "cowfs, service", "cowfs, service, Python", "cowfs alone", "fuse-overlayfs"
SUBJECTS = (SERVED, IN_PYTHON, ALONE, PEER)
FILES = 1000
CHANGE = "echo x >/x; rm /usr/d0/f0; mkdir /made; for i in 1 2 3 4 5 6 7 8 9; do echo $i >/made/$i; done"
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
netns = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""


def _image() -> bytes:
    """A root of a static busybox, and small files."""
    program = shutil.which("busybox")
    if program is None:
        raise SkipSubject("busybox is not installed (Debian: busybox-static)")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        files = {"bin/busybox": Path(program).read_bytes()}
        files |= {f"usr/d{number // 25}/f{number}": b"x" * 500 for number in range(FILES)}
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
        for name in ("true", "sh", "rm", "mkdir"):
            info = tarfile.TarInfo(f"bin/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(info)
    return out.getvalue()


def _program(short: Path, subject: str, env: dict[str, str]) -> str:
    if subject == PEER:
        found = shutil.which("fuse-overlayfs")
        if found is None:
            raise SkipSubject("fuse-overlayfs is not installed")
        return found
    if subject == SERVED and shutil.which("cc") is None:
        raise SkipSubject("no C compiler (cc)")
    kind = "c" if subject == SERVED else "python"
    path = short / f"program-{SUBJECTS.index(subject)}"
    words = ["podman", "install", "--only", "program", "--kind", kind, "--program", str(path)]
    subprocess.run([sys.executable, "-m", "cowfs", *words], env=env, check=True, stdout=subprocess.DEVNULL)
    return str(path)


class _Podman:
    """podman with a storage of its own; ``run`` in the environment that decides whether a service is found."""

    def __init__(self, root: Path, running: Path, program: str, env: dict[str, str]) -> None:
        self.env = env
        self.words = ["podman", "--root", str(root), "--runroot", str(running), "--storage-driver", "overlay"]
        self.words += ["--storage-opt", f"overlay.mount_program={program}"]

    def __call__(self, *more: str, input: bytes | None = None) -> None:
        done = subprocess.run([*self.words, *more], env=self.env, input=input, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(more[:3])}: {done.stderr.decode(errors='replace').strip()[-300:]}")


def measure(lab: Lab) -> None:
    for needed in ("podman", "runc"):
        if shutil.which(needed) is None:
            for subject in SUBJECTS:
                lab.skip(subject, f"{needed} is not installed")
            return
    with tempfile.TemporaryDirectory(prefix="cb", dir="/run", ignore_cleanup_errors=True) as short, ExitStack() as held:
        place = Path(short)
        (place / "containers.conf").write_text(CONFIGURATION)
        runtime = place / "user"
        runtime.mkdir(mode=0o700)
        env = {**cowfs_env(), "CONTAINERS_CONF": f"{short}/containers.conf"}
        service = _serve(f"{runtime}/cowfs/mounts.socket", env)
        held.callback(service.wait)
        held.callback(service.send_signal, signal.SIGTERM)
        disk = held.enter_context(lab.fresh("ext4", 4 << 30))
        engines: dict[str, _Podman] = {}
        for subject in lab.wanted(SUBJECTS):
            with lab.trying(subject):
                number = SUBJECTS.index(subject)
                with_service = {"XDG_RUNTIME_DIR": str(runtime)} if subject in (SERVED, IN_PYTHON) else {}
                engine = _Podman(
                    disk / str(number), place / str(number), _program(place, subject, env), {**env, **with_service}
                )
                engine("import", "-q", "-", "image", input=_image())
                engine("run", "--name", "c", "--network", "none", "image", "sh", "-c", CHANGE)
                engine("diff", "c")  # fills caches
                engines[subject] = engine
        lab.record("memory", SERVED, sum(map(rss, _family(service.pid))))
        verbs: dict[str, tuple[str, ...]] = {
            "run": ("run", "--rm", "--network", "none", "image", "true"),
            "diff": ("diff", "c"),
            "commit": ("commit", "-q", "c", "made"),
        }
        for _, subject in lab.rounds(list(engines), 4 * lab.profile.rounds):
            for metric, words in verbs.items():
                with lab.trying(subject):
                    took = timed(lambda engine=engines[subject], words=words: engine(*words))  # type: ignore[misc]
                    lab.record(metric, subject, took)
        for engine in engines.values():
            engine("rm", "--all", "--force")


def _serve(path: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    service = subprocess.Popen([sys.executable, "-m", "cowfs", "serve", "--mounts", path], env=env)
    end = time.monotonic() + 60
    while len(_family(service.pid)) < 5:  # itself, and those that wait for a connection
        if service.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the mount service does not start")
        time.sleep(0.05)
    return service


def _family(pid: int) -> list[int]:
    try:
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return [pid]


_SAYS = "against fuse-overlayfs, image of 1,000 files"

CLAIM = Claim(
    name="podman",
    title="podman with the mount service",
    why="podman mounts two to four times for one command; what starting the mount program costs is paid each time.",
    metrics=(
        Metric(name="run", title="podman run --rm of a trivial command"),
        Metric(name="diff", title="podman diff of a container"),
        Metric(name="commit", title="podman commit of a container"),
        Metric(name="memory", unit="B", title="resident memory of the service and its waiting processes, shared pages counted in each"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="run", subject=SERVED, against=PEER, at_most=1.1, goal=1.0, says=f"podman run --rm {_SAYS}"),
        Bar(metric="diff", subject=SERVED, against=PEER, at_most=1.7, goal=1.0, says=f"podman diff {_SAYS}"),
        Bar(metric="commit", subject=SERVED, against=PEER, at_most=1.0, says=f"podman commit {_SAYS}"),
        Bar(metric="run", subject=SERVED, against=ALONE, at_most=0.8, says="podman run --rm with the service against without"),
    ),
)  # fmt: skip


def test_podman(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
