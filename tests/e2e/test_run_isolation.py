"""The attempts of a hostile command in `cowfs run`. As root, and as an ordinary user in a user namespace.

docs/security.md says the same in words, and what is not isolated.
"""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sandboxes import Runner, running_with
from support.users import command_as


def test_nothing_of_the_host_is_mounted(runner: Runner) -> None:
    """The root is the snapshot, and no mount leads anywhere else: leaving a chroot is no way out, for there is no outside."""
    lines = runner.inside("cat /proc/self/mountinfo").splitlines()
    mounts = {line.split()[4]: line.split(" - ")[1].split()[0] for line in lines}
    assert mounts["/"] == ("fuse.cowfs" if runner.who == "root" else "overlay")
    assert set(mounts.values()) <= {mounts["/"], "proc", "tmpfs", "devpts", "devtmpfs", "sysfs"}
    roots = {line.split()[3] for line in lines if line.split(" - ")[1].split()[0] == "devtmpfs"}
    assert roots <= {"/null", "/zero", "/full", "/random", "/urandom", "/tty"} or runner.who == "user"
    assert runner.inside("cd /; cd ../../../..; cat etc/inside; ls /proc/1/root; ls /proc/1/cwd/etc").startswith(
        "inside\n"
    )
    assert "root:" not in runner.inside("cat /proc/1/root/etc/passwd /etc/passwd ../../../etc/passwd")


@pytest.mark.parametrize("number", range(3, 24))
def test_a_working_directory_that_is_a_descriptor(runner: Runner, number: int) -> None:
    """An image may say where its command starts; no descriptor of ours is open then (as in CVE-2024-21626)."""
    done = runner.cowfs(
        "run", "box", "--rm", "--workdir", f"/proc/self/fd/{number}", "--", "/bin/sh", "-c", "ls ../../../.."
    )
    assert done.returncode in (126, 127), done.stdout
    assert done.stdout == ""


def test_descriptors_of_the_caller_stay_outside(runner: Runner) -> None:
    """A shell may have a directory of the host open; the command gets the standard streams and nothing else."""
    held = os.open("/", os.O_RDONLY)
    done = runner.cowfs("run", "box", "--rm", "--", "/bin/ls", "/proc/self/fd", pass_fds=(held,))
    os.close(held)
    assert sorted(map(int, done.stdout.split())) == [0, 1, 2, 3]  # 3 is the listing's own


@pytest.mark.parametrize(
    "attempt",
    [
        "mknod /tmp/n c 1 3 && head -c1 /tmp/n",
        "mknod /dev/n b 8 0 && head -c1 /dev/n",
        "mknod /dev/pts/n b 8 0",
        "mount -t tmpfs x /tmp",
        "mount -o remount,rw /proc/sys",
        "umount /proc/sys",
        "umount /proc",
        "echo '|/tmp/x' > /proc/sys/kernel/core_pattern",
        "echo /tmp/x > /proc/sys/kernel/modprobe",
        "echo h > /proc/sysrq-trigger",
        "echo 1 > /proc/irq/default_smp_affinity",
        "cat /proc/1/exe",
        "cat /proc/1/environ",
        "readlink /proc/1/fd/0",
        "hostname other",
        "echo 0 > /proc/1/oom_score_adj && echo -1000 > /proc/self/oom_score_adj",
        "dd if=/proc/kcore count=1 bs=1 | wc -c | grep 1",
    ],
)
def test_attempts_that_fail(runner: Runner, attempt: str) -> None:
    assert runner.inside(f"({attempt}) > /dev/null 2>&1 && echo it went through") == ""


def test_only_its_own_processes_are_there(runner: Runner) -> None:
    """Nor can it signal others: neither by number nor by the process group that it would share with who started it."""
    assert len(runner.inside("ls -d /proc/[0-9]*").split()) <= 3
    script = f"sleep 600 & echo $! ; {' '.join(runner.command('run', 'box', '--rm', '--', '/bin/kill', '-9', '0'))}; echo came back; kill $!"
    for kill in ("0", "-1"):
        done = subprocess.run(
            ["sh", "-c", script.replace(" -9 0", f" -9 {kill}")],
            env=runner.environment, cwd="/", capture_output=True, text=True, timeout=60, start_new_session=True, check=False,
        )  # fmt: skip
        assert done.stdout.endswith("came back\n"), (done, kill)


def test_nothing_stays(runner: Runner) -> None:
    """Processes that it left in the background and mounts that it made end with it."""
    before = Path("/proc/self/mountinfo").read_text()
    for options in ((), ("--privileged",)):
        runner.inside("mount -t tmpfs x /tmp; sleep 61234 & (sleep 61234 &) ; mkdir /dev/shm/x; true", *options)
    assert Path("/proc/self/mountinfo").read_text() == before
    assert b"\0".join([b"sleep", b"61234"]) not in b"".join(_command_lines())
    assert json.loads(runner.cowfs("ls", "--json").stdout)


def _command_lines() -> Iterator[bytes]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue


def test_the_network_can_be_left_out(runner: Runner) -> None:
    counted = "cat /proc/net/dev | grep -c :"
    assert runner.inside(counted) == "1\n"
    here = os.readlink("/proc/self/ns/net")
    assert runner.inside("readlink /proc/self/ns/net", "--network", "host") == f"{here}\n"
    assert runner.inside("readlink /proc/self/ns/net", "--network", "none") != f"{here}\n"
    for space in ("ipc", "uts", "pid", "mnt", "net", "cgroup"):
        assert runner.inside(f"readlink /proc/self/ns/{space}") != f"{os.readlink(f'/proc/self/ns/{space}')}\n"


def test_privileged_keeps_privilege(runner: Runner) -> None:
    assert runner.inside("mount -t tmpfs x /tmp && echo mounted", "--privileged") == "mounted\n"


def at_a_terminal(runner: Runner, *arguments: object, keys: list[tuple[str, bytes]]) -> tuple[int, str]:
    """Run at a pseudo-terminal; each of ``keys`` is typed once its text was shown. (exit status, all that was shown)"""
    command = runner.command("run", "box", "--rm", *arguments)
    pid, master = pty.fork()
    if not pid:
        os.chdir("/")
        os.execvpe(command[0], command, runner.environment)
    shown, waiting, until = b"", list(keys), time.monotonic() + 60
    while time.monotonic() < until:
        if not select.select([master], [], [], 1)[0]:
            continue
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
        while waiting and waiting[0][0].encode() in shown:
            os.write(master, waiting.pop(0)[1])
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(master)
    return os.waitstatus_to_exitcode(status), shown.decode()


def test_the_terminal_is_one_of_its_own(runner: Runner) -> None:
    """Not the user's, into which it could type; keys, signals and the size get there all the same."""
    status, shown = at_a_terminal(
        runner, "--", "/bin/sh", "-c", "stat -L -c device=%t,%T, /proc/self/fd/0; stty size; read x; echo got $x; exit 7",
        keys=[("device=", b"word\n")],
    )  # fmt: skip
    assert "got word" in shown
    assert status == 7
    status, shown = at_a_terminal(
        runner, "--", "/bin/sh", "-c", "trap 'echo stopped; exit 9' INT; echo ready; while :; do sleep 0.1; done",
        keys=[("ready", b"\x03")],
    )  # fmt: skip
    assert "stopped" in shown
    assert status == 9


def test_a_tree_without_proc_and_dev(runner: Runner) -> None:
    """Neither is needed for the command to be confined."""
    assert runner.cowfs("run", "box", "--commit", "bare", "--", "/bin/busybox", "rmdir", "/proc", "/dev").returncode
    made = runner.cowfs("prepare", "bare-key", "box")
    assert made.returncode == 0, made.stderr
    script = "from cowfs.store import Store; import sys\nwith Store.open(sys.argv[1]) as s, s.paths('bare-key') as p: p.rmdir('/proc'); p.rmdir('/dev')"
    words = [runner.python, "-c", script, str(runner.store)]
    subprocess.run(words if runner.who == "root" else command_as(words), env=runner.environment, cwd="/", check=True)
    assert runner.cowfs("commit", "bare-key", "bare").returncode == 0
    done = runner.cowfs("run", "bare", "--rm", "--", "/bin/sh", "-c", "mount -t tmpfs x /tmp || echo refused; ls /")
    assert done.stdout.split() == ["refused", "bin", "etc", "tmp"]


def test_the_command_may_stand_without_dashes(runner: Runner) -> None:
    for words in (
        ["--rm", "box", "/bin/echo", "-n", "--rm", "x"],
        ["--rm", "--env", "A=1", "box", "/bin/echo", "-n", "--rm", "x"],
        ["box", "--rm", "--", "/bin/echo", "-n", "--rm", "x"],
    ):
        done = runner.cowfs("run", *words)
        assert (done.returncode, done.stdout) == (0, "--rm x"), done.stderr
    assert runner.cowfs("run", "--rm", "box", "/bin/sh", "-c", "exit 7").returncode == 7
    wrong = runner.cowfs("run", "--rn", "box", "/bin/true")
    assert wrong.returncode == 2
    assert "--rn" in wrong.stderr


@pytest.fixture
def own(runner: Runner) -> Iterator[str]:
    """A committed snapshot whose files belong to the runner's user: busybox alone."""
    assert runner.cowfs("prepare", "own-key").returncode == 0
    done = runner.cowfs("cp", shutil.which("busybox"), "own-key:/busybox")
    assert done.returncode == 0, done.stderr
    assert runner.cowfs("commit", "own-key", "own").returncode == 0
    yield "own"
    assert runner.cowfs("rm", "own").returncode == 0


def test_a_shell_in_a_snapshot_that_is_there(runner: Runner, own: str) -> None:
    assert runner.cowfs("prepare", "kept", own).returncode == 0
    try:
        done = runner.cowfs("sh", "kept", "/busybox", "sh", "-c", "echo one > /one")
        assert done.returncode == 0, done.stderr
        assert runner.cowfs("sh", "kept", "--", "/busybox", "cat", "/one").stdout == "one\n"
        assert runner.cowfs("cat", "kept:/one").stdout == "one\n"
        done = runner.cowfs("sh", own)
        assert done.returncode == 5
        assert "cowfs run own --rm" in done.stderr
        assert runner.cowfs("sh", "nothing").returncode == 3
    finally:
        assert runner.cowfs("rm", "kept").returncode == 0


def test_a_shell_beside_a_command_that_runs(runner: Runner, own: str) -> None:
    wait = "echo up; while ! /busybox cat /go; do /busybox sleep 0.1; done"
    with subprocess.Popen(
        runner.command("run", "--key", "busy", own, "/busybox", "sh", "-c", wait),
        env=runner.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/",
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        try:
            done = runner.cowfs(
                "sh", "busy", "/busybox", "sh", "-c", "echo gone > /new; /busybox mv /new /go; echo done"
            )
            assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
            assert running.stdout.readline() == "gone\n"
            assert running.wait(30) == 0
        finally:
            running.kill()
    assert runner.cowfs("rm", "busy").returncode == 0


def test_a_timeout_ends_all_that_was_started(runner: Runner) -> None:
    mark = f"31{os.getpid()}"
    begun = time.monotonic()
    done = runner.cowfs(
        "run", "--rm", "--timeout", "1", "box", "/bin/sh", "-c", f"trap '' TERM; sleep {mark} & sleep {mark}"
    )
    assert done.returncode == 124
    assert time.monotonic() - begun < 50
    assert not running_with(mark)
    assert runner.cowfs("run", "--timeout", "0", "box", "/bin/true").returncode == 2


def test_a_killed_run_takes_its_command_along(runner: Runner) -> None:
    mark = f"32{os.getpid()}"
    with subprocess.Popen(
        runner.command("run", "--key", "killed", "box", "/bin/sh", "-c", f"echo up; sleep {mark}; true"),
        env=runner.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/",
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        ours = next(pid for pid in running_with("killed") if pid == running.pid or runner.who != "root")
        os.kill(ours, signal.SIGKILL)
    end = time.monotonic() + 60
    while running_with(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running_with(mark)
    while runner.cowfs("rm", "killed").returncode and time.monotonic() < end:
        time.sleep(0.1)
    assert runner.cowfs("stat", "killed").returncode == 3


@pytest.mark.parametrize("form", ["--json", "--jsonl"])
def test_run_tells_its_result_to_programs(runner: Runner, form: str) -> None:
    """Standard output is the result's alone, in the one shape of all verbs; the command's own output is on standard error, its status is passed on."""
    script = "echo spoken; echo 12345 >/made; rm /etc/inside; exit 7"
    done = runner.cowfs("run", form, "--rm", "-q", "box", "/bin/sh", "-c", script)
    assert done.returncode == 7
    assert "spoken" in done.stderr
    told = json.loads(done.stdout)
    if form == "--json":
        (told,) = told
    assert (told["returncode"], told["timed_out"], told["committed"]) == (7, False, None)
    assert [(one["path"], one["kind"]) for one in told["changes"] if one["path"] in ("/made", "/etc/inside")] == [
        ("/etc/inside", "deleted"),
        ("/made", "added"),
    ]
    assert told["usage"]["inodes"] > 0
    assert told["usage"]["bytes"] >= 4096
    assert json.loads(runner.cowfs("ls", "--json", f"name=={told['key']}").stdout) == []  # --rm


def test_a_commit_and_sh_tell_their_results_to_programs(runner: Runner) -> None:
    done = runner.cowfs("run", "--json", "--commit", "v2", "box", "--", "/bin/sh", "-c", "echo x >/made")
    assert json.loads(done.stdout)[0]["committed"] == "v2"
    assert [one["path"] for one in json.loads(done.stdout)[0]["changes"]].count("/made") == 1
    runner.cowfs("prepare", "told", "box")
    done = runner.cowfs("sh", "--json", "told", "--", "/bin/sh", "-c", "echo spoken; exit 3")
    assert done.returncode == 3
    assert "spoken" in done.stderr
    (told,) = json.loads(done.stdout)
    assert (told["key"], told["returncode"]) == ("told", 3)
    assert runner.cowfs("run", "--format", "{returncode}", "--rm", "box", "/bin/sh", "-c", "exit 4").stdout == "4\n"
