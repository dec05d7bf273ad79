"""`cowfs serve` of an ordinary user: containers in a user namespace, by the real docker command."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import namespace
from support.command import environment, user_python
from support.daemon import Daemon, clean_up, wait_for
from support.users import GID, UID, command_as

FIRST = 300_000
Make = Callable[..., "Rootless"]


class Rootless(Daemon):
    """One `cowfs serve` of the ordinary user, with nothing but defaults.

    Attributes:
        before: words before its command line.
    """

    def __init__(self, base: Path, python: str, *arguments: str, before: tuple[str, ...] = ()) -> None:
        super().__init__(base, *arguments)
        import h11

        self.python, self.before = python, before
        self.run_dir = base / "run/cowfs"
        self.root = base / "home/.local/share/cowfs"
        self.socket = self.run_dir / "docker.sock"
        for name in ("home", "run"):
            (base / name).mkdir(mode=0o700)
            os.chown(base / name, UID, GID)
        paths = (environment()["PYTHONPATH"], os.path.dirname(os.path.dirname(h11.__file__)))
        self.environment = {
            "HOME": str(base / "home"), "XDG_RUNTIME_DIR": str(base / "run"), "PYTHONPATH": os.pathsep.join(paths),
        }  # fmt: skip

    def command(self) -> list[str]:
        return [*self.before, *command_as([self.python, "-m", "cowfs", "serve"])]

    def user(self, *words: str, status: int = 0) -> str:
        """The output of a cowfs verb of the same user."""
        done = subprocess.run(
            command_as([self.python, "-m", "cowfs", *words]),
            env={**os.environ, **self.environment}, cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def make(
    public_directory: Path, ordinary_user: object, busybox: bytes, docker_command: str
) -> Iterator[Callable[..., Rootless]]:
    """A function that makes a daemon with the image ``bb``; ``ids`` tells whether its user has a range of ids."""
    python = user_python()
    if python is None:
        pytest.skip("no Python that an ordinary user can start with cowfs in it")
    for program in ("runc", "newuidmap", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here (CI has it)")
    ranges = public_directory / "rootless-ranges"
    ranges.write_text("")
    bound = [path for path in ("/etc/subuid", "/etc/subgid") if os.path.exists(path)]
    for path in bound:
        namespace.bind(str(ranges), path)
    made: list[Rootless] = []

    def make(*arguments: str, ids: bool = True, before: tuple[str, ...] = ()) -> Rootless:
        base = public_directory / f"rl{len(made)}"
        base.mkdir()
        ranges.write_text(f"{UID}:{FIRST}:65536\n" if ids else "")
        daemon = Rootless(base, python, "-D", *arguments, before=before)
        made.append(daemon)
        daemon.start()
        daemon.docker("import", "-c", 'CMD ["sh"]', "-c", "ENV FROM=image", "-", "bb", input=busybox)
        return daemon

    yield make
    for each in made:
        clean_up(each)
    for path in bound:
        namespace.umount(path)
    for each in made:
        subprocess.run(["rm", "-rf", "--one-file-system", each.base], check=False)
        assert "Traceback" not in each.log, each.log


@pytest.fixture(scope="module")
def rootless(make: Make) -> Rootless:
    return make()


def test_info_and_the_users_of_a_container(rootless: Rootless) -> None:
    info = rootless.json("info", "--format", "{{json .}}")
    assert "name=rootless" in info["SecurityOptions"]
    assert info["DockerRootDir"] == str(rootless.root)
    assert rootless.out("run", "--rm", "bb", "id", "-u") == "0"
    assert rootless.out("run", "--rm", "-u", "app", "bb", "id").startswith("uid=1000(app) gid=1000(app) groups=1000")
    rows = rootless.out("run", "--rm", "bb", "cat", "/proc/self/uid_map").splitlines()
    assert [row.split() for row in rows] == [["0", str(UID), "1"], ["1", str(FIRST), "65536"]]


def test_files_belong_to_the_users_ids(rootless: Rootless) -> None:
    """Root of a container is the user, app is one of the range; a bind is written as the user."""
    shared = rootless.base / "home/shared"
    shared.mkdir()
    os.chown(shared, UID, GID)
    script = "echo x > /mnt/own; echo y > /mnt/app; chown 1000:1000 /mnt/app"
    # the applet chown is not among the image's links
    script = script.replace("chown", "busybox chown")
    rootless.docker("run", "--rm", "-v", f"{shared}:/mnt", "bb", "sh", "-c", script)
    assert (shared / "own").stat().st_uid == UID
    assert ((shared / "app").stat().st_uid, (shared / "app").stat().st_gid) == (FIRST + 999, FIRST + 999)
    assert rootless.docker("run", "--rm", "-v", "/etc/shadow:/s", "bb", "cat", "/s", check=False).returncode != 0
    assert rootless.docker("run", "--rm", "-u", "70000", "bb", "true", check=False).stderr.count("usermod") == 1


def test_the_verbs_of_a_container(rootless: Rootless) -> None:
    out = rootless.out
    rootless.docker(
        "run", "-d", "--name", "v1", "-e", "A=b", "bb", "sh", "-c", "echo $A; echo x > /data/new; exec sleep 999"
    )
    wait_for(lambda: out("logs", "v1") == "b", "its output")
    assert out("exec", "v1", "cat", "/data/new") == "x"
    assert out("exec", "-u", "app", "v1", "id", "-u") == "1000"
    assert set(out("diff", "v1").splitlines()) == {"C /data", "A /data/new"}
    archive = rootless.docker("cp", "v1:/data/file", "-").stdout
    assert "of the image" in archive
    (rootless.base / "sent").write_text("sent\n")
    rootless.docker("cp", str(rootless.base / "sent"), "v1:/data/sent")
    assert out("exec", "v1", "cat", "/data/sent") == "sent"
    assert "sleep 999" in out("top", "v1")
    figures = rootless.json("stats", "--no-stream", "--format", "{{json .}}", "v1")
    assert figures["PIDs"] == "1"
    assert not figures["MemUsage"].startswith("0B")
    rootless.docker("commit", "v1", "committed")
    assert out("run", "--rm", "committed", "cat", "/data/new") == "x"
    assert out("run", "--rm", "-t", "bb", "tty") == "/dev/pts/0"
    assert "lo" in out("run", "--rm", "bb", "cat", "/proc/net/dev")
    host = os.readlink("/proc/self/ns/net")
    assert out("run", "--rm", "--network", "host", "bb", "readlink", "/proc/self/ns/net") == host
    rootless.docker("rm", "-f", "v1")


def test_limits_of_the_tree_hold(rootless: Rootless) -> None:
    rootless.docker("run", "-d", "--name", "l1", "--storage-opt", "size=4m,inodes=50", "bb", "sleep", "999")
    done = rootless.docker("exec", "l1", "dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=8", check=False)
    assert "No space left" in done.stderr
    # from outside the mount is in the daemon's namespace: cowfs unshare leads there
    rootless.user("unshare", rootless.python, "-m", "cowfs", "limit", "l1", "20m")
    rootless.docker("exec", "l1", "dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=8")
    script = "i=0; while touch /data/f$i; do i=$((i+1)); [ $i -lt 200 ] || exit 9; done"
    done = rootless.docker("exec", "l1", "sh", "-c", script, check=False)
    assert "No space left" in done.stderr
    assert done.returncode != 9
    rootless.docker("rm", "-f", "l1")


def test_limits_without_a_control_group_are_told(rootless: Rootless) -> None:
    """As dockerd does: a warning, and the limit is discarded; nothing that cannot be done seems done."""
    if rootless.json("info", "--format", "{{json .CgroupDriver}}") != "none":
        pytest.skip("a control group is delegated here")
    done = rootless.docker("run", "-d", "--name", "m1", "--memory", "64m", "--pids-limit", "9", "bb", "sleep", "999")
    assert done.stderr.count("Limitation discarded") == 2
    info = rootless.json("info", "--format", "{{json .}}")
    assert not any(info[name] for name in ("MemoryLimit", "PidsLimit", "CPUShares", "CPUSet"))
    assert "WARNING: No memory limit support" in info["Warnings"]
    assert "no control group" in rootless.docker("pause", "m1", check=False).stderr
    status, answer = rootless.request("POST", "/containers/m1/update", {"Memory": 64 << 20, "MemorySwap": 64 << 20})
    assert (status, len(answer["Warnings"])) == (200, 1)
    rootless.docker("rm", "-f", "m1")


def test_a_new_daemon_joins_the_namespace_of_its_containers(make: Make) -> None:
    """kill -9 disturbs no container: the next daemon sees its mount; after the last one nothing is left."""
    daemon = make()
    script = "trap 'exit 3' TERM; echo up > /data/up; while :; do sleep 0.1; done"
    daemon.docker("run", "-d", "--name", "k1", "bb", "sh", "-c", script)
    wait_for(lambda: daemon.docker("exec", "k1", "cat", "/data/up", check=False).stdout == "up\n", "its file")
    space = os.readlink(f"/proc/{daemon.pid}/ns/mnt")
    daemon.stop(signal.SIGKILL)
    daemon.start()
    assert os.readlink(f"/proc/{daemon.pid}/ns/mnt") == space
    assert daemon.out("exec", "k1", "cat", "/data/up") == "up"
    assert "goes on" in daemon.log
    daemon.docker("stop", "k1")
    assert daemon.json("inspect", "k1", "--format", "{{json .State.ExitCode}}") == 3
    assert "C /data\nA /data/up" in daemon.out("diff", "k1")
    daemon.docker("rm", "k1")
    assert daemon.stop() == 0
    wait_for(lambda: not _in_namespace(space), "the end of all processes")
    daemon.start()  # the record leads nowhere: a fresh namespace
    assert daemon.out("run", "--rm", "bb", "echo", "fresh") == "fresh"


def _in_namespace(space: str) -> list[str]:
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{name}/ns/mnt") == space:
                found.append(name)
        except OSError:
            continue
    return found


def _image_with_owners(busybox: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(busybox)) as source, tarfile.open(fileobj=out, mode="w") as tar:
        for member in source:
            tar.addfile(member, source.extractfile(member) if member.isreg() else None)
        for name, uid, kind in (("data/theirs", 1000, tarfile.REGTYPE), ("data/null", 0, tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.uid = info.gid = uid
            info.type, info.mode = kind, 0o4755
            info.devmajor, info.devminor = 1, 3
            tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize("before", [(), ("setpriv", "--no-new-privs")], ids=["no-range", "no-new-privs"])
def test_one_id(make: Make, busybox: bytes, before: tuple[str, ...]) -> None:
    """Without a range of ids, or without a newuidmap that may write it, a container has root alone, and so has an image."""
    daemon = make(ids=bool(before), before=before)
    assert "one user and group" in daemon.log
    assert any("one user id" in line for line in daemon.json("info", "--format", "{{json .Warnings}}"))
    assert daemon.out("run", "--rm", "bb", "cat", "/proc/self/uid_map").split() == ["0", str(UID), "1"]
    assert daemon.out("run", "--rm", "-t", "bb", "tty") == "/dev/pts/0"
    done = daemon.docker("run", "--rm", "-u", "app", "bb", "true", check=False)
    assert "user 1000 has no number" in done.stderr
    daemon.docker("import", "-", "owners", input=_image_with_owners(busybox))
    told = daemon.out("run", "--rm", "owners", "stat", "-c", "%u %a", "/data/theirs")
    assert told == "0 755"  # never set-id without its owner


def test_a_delegated_group_of_version_2(make: Make) -> None:
    """In a group that is the user's: pause, statistics by the kernel, and limits by the controllers that it has."""
    if not any(" cgroup2 " in line for line in Path("/proc/self/mountinfo").read_text().splitlines()):
        pytest.skip("no control groups of version 2 here")
    name = f"cowfs-test-{os.getpid()}"
    script = (
        f"mount -t cgroup2 none /sys/fs/cgroup && cd /sys/fs/cgroup && mkdir {name} && "
        f"chown {UID}:{GID} {name} {name}/cgroup.procs {name}/cgroup.subtree_control && echo $$ > {name}/cgroup.procs && "
        'cd / && exec "$@"'
    )
    words = ("unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh")
    daemon = make(before=words)
    try:
        info = daemon.json("info", "--format", "{{json .}}")
        assert (info["CgroupDriver"], info["CgroupVersion"]) == ("cgroupfs", "2")
        daemon.docker("run", "-d", "--name", "g1", "bb", "sleep", "999")
        pid = daemon.json("inspect", "--format", "{{json .State.Pid}}", "g1")
        assert f"/{name}/cowfs/" in Path(f"/proc/{pid}/cgroup").read_text()
        daemon.docker("pause", "g1")
        assert daemon.out("ps", "--format", "{{.Status}}").endswith("(Paused)")
        daemon.docker("unpause", "g1")
        assert "sleep 999" in daemon.out("top", "g1")
        done = daemon.docker("run", "--rm", "--memory", "64m", "bb", "true")
        assert bool(done.stderr) == (not info["MemoryLimit"])
        daemon.docker("rm", "-f", "g1")
    finally:
        clean_up(daemon)
        tidy = f'mount -t cgroup2 none /sys/fs/cgroup; find /sys/fs/cgroup/{name} -depth -type d -exec rmdir "{{}}" +'
        subprocess.run(["unshare", "-m", "sh", "-c", tidy], check=False)
