"""Trees, binds and images that try to get at the host through `cowfs run`, and what a caller gives it by mistake. As root and as an ordinary user.

Canaries lie outside of every sandbox: they keep bytes, mode and neighbours.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.sandboxes import Runner, running_with, tree
from support.users import UID

NAMES = ("proc", "dev", "sys", "etc", "tmp", "mnt", "a", "a/b", "root")
POINTS = (
    "/",
    "..",
    "../../..",
    "/proc",
    "/proc/self/root",
    "/proc/1/root",
    "/proc/self/fd/3",
    "/proc/self/cwd",
    "/etc",
    "/nowhere",
    "proc",
    "a",
    ".",
)


@pytest.fixture
def outside(runner: Runner) -> Iterator[Path]:
    """A directory of the host with a canary, and what must not change in it."""
    made = runner.store.parent / "outside"
    made.mkdir()
    (made / "canary").write_text("canary\n")
    (made / "inner").mkdir()
    if runner.who == "user":
        for path in (made, made / "canary", made / "inner"):
            os.chown(path, UID, UID)
    yield made
    shutil.rmtree(made)


def build(runner: Runner, key: str, place: Path) -> None:
    """A committed snapshot of a tree, whose objects all belong to the runner's user."""
    if runner.who == "user":
        for where, dirs, files in os.walk(place):
            for name in (".", *dirs, *files):
                os.chown(os.path.join(where, name), UID, UID, follow_symlinks=False)
    owners = () if runner.who == "root" else ("--owners", "xattr")
    done = runner.cowfs("import", place, key, "--as", "rootfs", *owners)
    assert done.returncode == 0, done.stderr


def snapshot(place: Path) -> list[tuple[str, int, bytes]]:
    """Everything below a directory."""
    found = []
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_mode, path.read_bytes() if path.is_file() else b""))
    return found


def test_hostile_trees_reach_nothing_outside(runner: Runner, outside: Path) -> None:
    """Random trees with links in place of /proc, /dev, /sys and of the way to a bind's target; each run ends with a status or one line."""
    rng = random.Random(20261128)
    etc = set(os.listdir("/etc")), set(os.listdir("/")), set(os.listdir("/dev"))
    before = snapshot(outside)
    for number in range(12):
        place = runner.store.parent / "hostile"
        tree(place)
        for name in rng.sample(NAMES, 5):
            path = place / name
            if not path.parent.is_dir() or path.parent.is_symlink():
                continue
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
            if rng.random() < 0.85:
                path.symlink_to(rng.choice([*POINTS, str(outside)]))
            elif rng.random() < 0.5:
                path.write_text("file")
        key = f"hostile{number}"
        build(runner, key, place)
        shutil.rmtree(place)
        targets = rng.sample(["/mnt/x", "/a/b/c", "/etc/f", "/tmp/y/z", "/dev/z", "/root/r"], 2)
        options = [f"-v={outside}/inner:{target}:ro" for target in targets]
        for given in ([], options):
            done = runner.cowfs(
                "run", "--rm", *given, key, "/bin/sh", "-c", f"ls {outside} /mnt/canary && echo escaped; echo ran"
            )
            assert "escaped" not in done.stdout, (number, done)
            assert "Traceback" not in done.stderr, (number, done)
            assert done.returncode == 0 or (given and len(done.stderr.splitlines()) == 1), (number, done)
    assert (set(os.listdir("/etc")), set(os.listdir("/")), set(os.listdir("/dev"))) == etc
    assert snapshot(outside) == before


def test_binds(runner: Runner, outside: Path) -> None:
    """A directory to write in, a file to read only; what is missing of the way is made in the snapshot, and devices stay closed."""
    done = runner.cowfs(
        "run", "--key", "bound", "-v", f"{outside}:/deep/er", "-v", f"{outside}/canary:/etc/canary:ro", "box",
        "/bin/sh", "-c", "cat /etc/canary; echo new > /deep/er/inner/file; echo x > /etc/canary",
    )  # fmt: skip
    assert done.stdout == "canary\n", done
    assert "Read-only" in done.stderr
    assert (outside / "inner/file").read_text() == "new\n"
    changes = runner.cowfs("diff", "bound").stdout.split()
    assert "/deep/er/" in changes
    assert "/etc/canary" in changes
    assert "/deep/er/inner/file" not in changes
    assert runner.cowfs("rm", "bound").returncode == 0


def test_a_read_only_bind_is_so_below_its_mounts(runner: Runner, outside: Path) -> None:
    """A mount within a bind that is read-only can be no more written in than the rest."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "x", outside / "inner"], check=True)
    try:
        done = runner.cowfs("run", "--rm", "-v", f"{outside}:/o:ro", "box", "/bin/sh", "-c", "echo x > /o/inner/f")
        assert "Read-only" in done.stderr
    finally:
        subprocess.run(["umount", outside / "inner"], check=True)


@pytest.mark.parametrize(
    ("options", "says", "status"),
    [
        (["-v", "/nowhere/at/all:/x"], "/nowhere/at/all", 3),
        (["-v", "/etc"], "SOURCE:TARGET", 2),
        (["-v", "/etc:x"], "absolute", 2),
        (["-v", "/etc:/x:rx"], "ro or rw", 2),
        (["-v", "/etc:/"], "nothing can be bound", 2),
        (["-v", "/etc:/x/.."], "nothing can be bound", 2),
        (["-v", "/etc:/proc/1"], "nothing can be bound", 2),
        (["-v", "/etc:/sys"], "nothing can be bound", 2),
        (["-v", "/etc:/x", "-v", "/usr:/x/"], "two binds", 2),
        (["-v", "/etc:/etc/inside"], "directory", 2),
        (["-v", "/etc/passwd:/etc"], "directory", 2),
        (["-v", "/etc:/etc/inside/x"], "Not a directory", 2),
        (["-u", "nobody-here"], "nobody-here", 2),
        (["-u", "0:nobody-here"], "nobody-here", 2),
        (["-e", "=x"], "NAME=VALUE", 2),
        (["-w", "relative"], "absolute", 2),
        (["--network", "bridge"], "network", 2),
        (["--timeout", "nan"], "more than zero", 2),
        (["--timeout", "-1"], "more than zero", 2),
        (["--keep", "--rm"], "--rm", 2),
        (["--mount-type", "kernel", "--size", "1M", "--limit"], "--limit", 2),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(runner: Runner, options: list[str], says: str, status: int) -> None:
    before = runner.cowfs("ls", "-q").stdout
    done = runner.cowfs("run", *options, "box", "/bin/true")
    assert (done.returncode, done.stdout) == (status, ""), done
    assert len(done.stderr.splitlines()) == 1, done
    assert says in done.stderr
    assert runner.cowfs("ls", "-q").stdout == before


def test_programs_that_cannot_be_started(runner: Runner) -> None:
    for program, status in (
        ("/bin/nothing", 127),
        ("nothing", 127),
        ("/etc/inside", 126),
        ("/etc", 126),
        ("/etc/inside/x", 126),
    ):
        done = runner.cowfs("run", "--rm", "box", program)
        assert done.returncode == status, done
        assert len(done.stderr.splitlines()) == 1, done
    assert runner.cowfs("run", "--rm", "-w", "/not/there", "box", "/bin/true").returncode == 127


def test_users(runner: Runner) -> None:
    """By number and by the snapshot's own names; a single id of an ordinary user is whoever was asked for. Nothing brings privilege back."""
    place = runner.store.parent / "users"
    tree(place)
    (place / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nbob:x:1000:100::/home/bob:/bin/sh\n")
    (place / "etc/group").write_text("users:x:100:\nwheel:x:10:bob\n")
    (place / "bin/busybox").chmod(0o4755)
    (place / "tmp").chmod(0o1777)
    build(runner, "users", place)
    shutil.rmtree(place)
    script = (
        "id -u; id -g; echo $HOME; grep -E 'CapEff|NoNewPrivs' /proc/self/status; touch /tmp/mine; stat -c %u /tmp/mine"
    )
    for given, uid, gid, home in (
        ("bob", 1000, 100, "/home/bob"),
        ("bob:wheel", 1000, 10, "/home/bob"),
        ("1234:5", 1234, 5, "/"),
    ):
        done = runner.cowfs("run", "--rm", "-u", given, "users", "/bin/sh", "-c", script)
        assert done.stdout.split() == [
            str(uid), str(gid), home, "NoNewPrivs:", "1", "CapEff:", "0" * 16, str(uid)
        ] or done.stdout.split() == [str(uid), str(gid), home, "CapEff:", "0" * 16, "NoNewPrivs:", "1", str(uid)], done  # fmt: skip
    assert runner.cowfs("run", "--rm", "users", "/bin/id", "-u").stdout == "0\n"


ATTEMPTS = (
    "unshare -U true", "unshare -m true", "unshare -n true", "mount -t tmpfs x /tmp", "chroot / mount -t proc x /proc",
    "mknod /tmp/b b 8 0 && cat /tmp/b", "echo 1 > /sys/kernel/uevent_helper", "echo x > /proc/self/attr/current", "date -s 2000-01-01; date | grep ' 2000'",
    "swapoff -a", "insmod /bin/sh", "dmesg", "nsenter -t 1 -m true", "/proc/self/exe --help | grep -i python",
)  # fmt: skip


def test_the_kernel_is_left_alone(runner: Runner) -> None:
    """None of the attempts succeeds."""
    links = "for a in unshare date swapoff insmod dmesg nsenter; do ln -s busybox /bin/$a; done"
    tries = "; ".join(f"({attempt}) > /dev/null 2>&1 && echo '{number}'" for number, attempt in enumerate(ATTEMPTS))
    done = runner.cowfs("run", "--rm", "box", "/bin/busybox", "sh", "-c", f"{links}; {tries}; echo end")
    assert [ATTEMPTS[int(word)] for word in done.stdout.split()[:-1]] == []
    assert done.stdout.endswith("end\n")


def test_the_interpreter_of_the_host_cannot_be_started(runner: Runner) -> None:
    """An image whose program is /proc/self/exe means itself, not the host's program that is about to become it (as in CVE-2019-5736)."""
    done = runner.cowfs("run", "--rm", "box", "/proc/self/exe", "-c", "print('host')")
    assert done.returncode == 126, done
    assert "host" not in done.stdout


def test_closed_streams(runner: Runner) -> None:
    """No file of ours becomes one of the command's standard streams."""
    command = runner.command(
        "run",
        "--rm",
        "box",
        "/bin/sh",
        "-c",
        "readlink /proc/self/fd/0 > /tmp/x; cat /tmp/x >&2",
    )
    quoted = " ".join(f"'{word}'" for word in command)
    done = subprocess.run(
        ["sh", "-c", f"exec {quoted} <&- >&-"],
        env=runner.environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert done.stderr.splitlines()[0].endswith("/dev/null")


def test_much_output_arrives_whole(runner: Runner) -> None:
    """Through a pipe, and through a terminal."""
    done = runner.cowfs("run", "--rm", "box", "/bin/dd", "if=/dev/zero", "bs=1M", "count=10", text=False)
    count = len(done.stdout)
    assert count == 10 << 20
    script = "dd if=/dev/zero bs=1M count=3 2>/dev/null; echo end"
    done = runner.cowfs("run", "--rm", "-t", "box", "/bin/sh", "-c", script, text=False)
    count = len(done.stdout)
    assert count == (3 << 20) + len(b"end\r\n")


def test_a_terminal_on_request(runner: Runner) -> None:
    done = runner.cowfs(
        "run",
        "--rm",
        "-it",
        "box",
        "/bin/sh",
        "-c",
        "read x; echo got $x; stty size; cat; echo over",
        stdin=None,
        input="word\n",
    )
    assert "got word\n" in done.stdout.replace("\r", ""), done
    assert "24 80" in done.stdout
    assert done.stdout.replace("\r", "").endswith("over\n")


def test_a_command_comes_into_a_sandbox_that_runs(runner: Runner, outside: Path) -> None:
    """`cowfs sh` sees the processes, the binds, the network and /dev/shm of the command that is there; it is confined as that is."""
    script = "echo up; echo there > /dev/shm/x; while ! cat /tmp/go 2>/dev/null; do sleep 0.1; done"
    with subprocess.Popen(
        runner.command("run", "--rm", "--key", "inside", "-v", f"{outside}:/o", "box", "/bin/sh", "-c", script),
        env=runner.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        try:
            inside = "cat /dev/shm/x /o/canary; ls -d /proc/[0-9]* | wc -l; readlink /proc/1/exe; mount -t tmpfs x /tmp; grep -c Seccomp: /proc/self/status"
            done = runner.cowfs("sh", "inside", "/bin/sh", "-c", inside)
            lines = done.stdout.split()
            assert lines[:2] == ["there", "canary"], done
            assert int(lines[2]) >= 4
            assert lines[3:] == ["1"]
            for space in ("net", "pid", "mnt", "ipc", "uts"):
                one = runner.cowfs("sh", "inside", "/bin/readlink", f"/proc/self/ns/{space}").stdout
                assert one, space
                assert one != f"{os.readlink(f'/proc/self/ns/{space}')}\n", space
            assert runner.cowfs("sh", "inside", "/bin/sh", "-c", "exit 9").returncode == 9
            assert runner.cowfs("sh", "-v", "/etc:/x", "inside", "/bin/true").returncode == 5
            assert runner.cowfs("sh", "inside", "/bin/sh", "-c", "echo go > /tmp/go").returncode == 0
            assert running.wait(30) == 0
        finally:
            running.kill()
    assert runner.cowfs("stat", "inside").returncode == 3


@pytest.mark.parametrize("victim", ["keeper", "first", "all"])
def test_a_kill_at_any_place_leaves_nothing(runner: Runner, victim: str) -> None:
    """kill -9 of the process in between, of process 1, of all at once: processes and mounts go, the key can be removed."""
    mark = f"33{os.getpid()}{len(victim)}"
    before = Path("/proc/self/mountinfo").read_text()
    with subprocess.Popen(
        runner.command("run", "--key", "slain", "box", "/bin/sh", "-c", f"echo up; sleep {mark}; true"),
        env=runner.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/",
    ) as running:  # fmt: skip
        assert running.stdout is not None
        try:
            assert running.stdout.readline() == "up\n"
            while not running_with(mark):  # the shell is about to start it
                time.sleep(0.01)
            chain = ancestors(running_with(mark)[0], running.pid)
            servers = others_with(chain[-2])
            victims = {"keeper": chain[-2:-1], "first": chain[-3:-2], "all": chain}[victim]
            assert victims
            for pid in victims:
                with suppress(ProcessLookupError):  # process 1 takes its whole namespace with it
                    os.kill(pid, signal.SIGKILL)
            assert running.wait(60) != 0
        finally:
            running.kill()
    end = time.monotonic() + 60
    while (running_with(mark) or any(map(lives, servers))) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running_with(mark)
    assert not any(map(lives, servers))
    while (
        runner.cowfs("stat", "slain").returncode == 0
        and runner.cowfs("rm", "slain").returncode
        and time.monotonic() < end
    ):
        time.sleep(0.1)
    assert runner.cowfs("stat", "slain").returncode == 3
    assert Path("/proc/self/mountinfo").read_text() == before


def ancestors(pid: int, top: int) -> list[int]:
    """A process and those above it, up to ``top``."""
    found = [pid]
    while found[-1] not in (top, 1):
        found.append(int(Path(f"/proc/{found[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
    return found


def others_with(keeper: int) -> list[int]:
    """The mount's server and what else is in the mount namespace of a keeper."""
    wanted, found = os.readlink(f"/proc/{keeper}/ns/mnt"), []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != keeper:
            with suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/mnt") == wanted:
                    found.append(int(name))
    return found


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("options", [["--mount-type", "fuse"], ["--size", "8M"], ["--mount-type", "kernel"]])
def test_files_of_the_parent_are_the_users_own(runner: Runner, options: list[str]) -> None:
    """With each type of mount they are root's inside, and can be changed, also where that is another number outside."""
    script = "stat -c %u:%g / /tmp /etc/inside; echo x > /tmp/x && echo y >> /etc/inside && busybox rm /bin/true && cat /etc/inside"
    done = runner.cowfs("run", "--rm", *options, "box", "/bin/busybox", "sh", "-c", f"PATH=/bin; {script}")
    assert done.stdout.split() == ["0:0", "0:0", "0:0", "inside", "y"], done
