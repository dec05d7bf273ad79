"""`cowfs mount`, `umount`, `limit`, `usage`, `mounts`: claims about one mount's life."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import namespace
from support.command import Run, environment, status_of
from support.layers import Layer


def _gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds; a zombie that nobody reaps yet has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[0] == b"Z":
                    return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_layers_stack_by_number(cowfs: Run, stack: Path, mnt: Path) -> None:
    """10-app lies over 2-python lies over 1-base, and the mount answers when the command returns."""
    cowfs("mount", stack, mnt)
    assert (mnt / "etc/motd").read_text() == "python\n"
    assert not (mnt / "etc/passwd").exists()
    assert (mnt / "app/main").read_text() == "main\n"
    assert [os.path.basename(layer) for layer in status_of(cowfs, mnt)["layers"]] == ["1-base", "2-python", "10-app"]  # type: ignore[attr-defined]


def test_row_stores_the_blocks_that_are_written(cowfs: Run, mnt: Path, tmp_path: Path) -> None:
    """Also after a remount without the option; any other size than a power of two from 4K to 1M is an error."""
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/big").write_bytes(b"old." * (1 << 18))
    where = ("mount", "--layer", tmp_path / "layer", "--upper", tmp_path / "upper", mnt)
    assert "power of two" in cowfs(*where, "--row", "5000", code=2).stderr
    for more in (("--row", "4K"), ()):
        cowfs(*where, *more)
        with (mnt / "big").open("r+b") as file:
            file.seek(len(more) << 16)
            file.write(b"new!")
        assert (mnt / "big").read_bytes().count(b"old.") == (1 << 18) - (1 if more else 2)
        cowfs("umount", mnt)
    assert os.stat(tmp_path / "upper/big").st_blocks * 512 <= 16384


def test_one_server_process_is_left_and_ends(cowfs: Run, stack: Path, mnt: Path, run_directory: Path) -> None:
    """A mount is one process; after umount it, its socket and its log are gone."""
    others = set(run_directory.iterdir())  # what servers of other tests wrote stays
    pid = json.loads(cowfs("mount", stack, mnt, "--json").stdout)[0]["pid"]
    assert status_of(cowfs, mnt)["pid"] == pid
    assert Path(f"/proc/{pid}/comm").read_text() == "cowfs\n"
    cowfs("umount", mnt)
    assert _gone(pid)
    assert not os.path.ismount(mnt)
    assert set(run_directory.iterdir()) <= others


def test_standard_streams_are_let_go(cowfs: Run, stack: Path, mnt: Path) -> None:
    """Nobody who waits for the command's pipes waits for the server (capture_output would hang)."""
    pid = json.loads(cowfs("mount", stack, mnt, "--json").stdout)[0]["pid"]
    assert os.readlink(f"/proc/{pid}/fd/0") == os.readlink(f"/proc/{pid}/fd/1") == "/dev/null"
    assert not os.readlink(f"/proc/{pid}/fd/2").startswith("pipe:")
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_scratch_upper_is_kept_and_used_again(cowfs: Run, stack: Path, mnt: Path) -> None:
    """Without --upper, changes are kept in LAYERS/.cowfs and the next mount shows them."""
    cowfs("mount", stack, mnt)
    (mnt / "new").write_text("kept")
    cowfs("umount", mnt)
    assert (stack / ".cowfs/upper/new").read_text() == "kept"
    cowfs("mount", stack, mnt)
    assert (mnt / "new").read_text() == "kept"


def test_ephemeral_leaves_no_trace_and_no_kept_upper_is_touched(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    (mnt / "kept").write_text("kept")
    cowfs("umount", mnt)
    before = sorted(os.listdir(stack / ".cowfs"))
    cowfs("mount", stack, mnt, "--ephemeral")
    assert not (mnt / "kept").exists()
    (mnt / "new").write_text("dropped")
    cowfs("umount", mnt)
    assert sorted(os.listdir(stack / ".cowfs")) == before
    assert (stack / ".cowfs/upper/kept").read_text() == "kept"


def test_ephemeral_upper_of_a_killed_server_is_swept(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt, "--ephemeral")
    os.kill(int(str(status_of(cowfs, mnt)["pid"])), signal.SIGKILL)
    cowfs("umount", mnt)
    assert [name for name in os.listdir(stack / ".cowfs") if name.startswith("ephemeral")] != []
    cowfs("mount", stack, mnt, "--ephemeral")
    cowfs("umount", mnt)
    assert [name for name in os.listdir(stack / ".cowfs") if name.startswith("ephemeral")] == []


def test_new_upper_looks_like_the_topmost_layer(cowfs: Run, stack: Path, mnt: Path) -> None:
    """The root of the mount keeps the mode and owner it had in the layers; .cowfs itself is private."""
    os.chmod(stack / "10-app", 0o751)
    os.chown(stack / "10-app", 12, 34)
    cowfs("mount", stack, mnt)
    found = os.stat(mnt)
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o751, 12, 34)
    assert os.stat(stack / ".cowfs").st_mode & 0o7777 == 0o700


def test_read_only(cowfs: Run, stack: Path, mnt: Path) -> None:
    """Nothing can be written, nothing is made beside the layers; a given upper is the topmost layer."""
    cowfs("mount", stack, mnt, "--read-only")
    with pytest.raises(OSError) as caught:
        (mnt / "x").write_text("")
    assert caught.value.errno == errno.EROFS
    assert not (stack / ".cowfs").exists()
    cowfs("umount", mnt)
    upper = stack.parent / "changes"
    Layer(upper).file("only/here", b"1")
    cowfs("mount", stack, mnt, "-o", "ro", "--upper", upper)
    assert (mnt / "only/here").read_bytes() == b"1"
    with pytest.raises(OSError) as caught:
        (mnt / "x").write_text("")
    assert caught.value.errno == errno.EROFS
    assert sorted(os.listdir(stack.parent)) == ["changes", "layers", "mnt"]


def test_upper_of_ones_own(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    """--upper is made when missing; its work directory and record lie hidden beside it."""
    cowfs("mount", "--layer", stack / "1-base", "--layer", stack / "2-python", mnt, "--upper", space / "up")
    (mnt / "new").write_text("1")
    cowfs("umount", mnt)
    assert (space / "up/new").read_text() == "1"
    assert sorted(os.listdir(space / ".up.cowfs")) == ["state.json", "work"]


def test_layers_given_one_by_one_are_bottom_first(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack / "2-python", stack / "1-base", mnt, "--ephemeral")
    assert (mnt / "etc/motd").read_text() == "hello\n"


def test_stack_can_be_moved(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    """The record names layers relative to itself."""
    cowfs("mount", stack, mnt)
    (mnt / "new").write_text("1")
    cowfs("umount", mnt)
    stack.rename(space / "elsewhere")
    cowfs("mount", space / "elsewhere", mnt)
    assert (mnt / "new").read_text() == "1"


def test_limit_holds_is_shown_changed_and_remembered(cowfs: Run, stack: Path, mnt: Path) -> None:
    """--size and --inodes bound what can be written; df shows them; `cowfs limit` changes them at once and for good."""
    cowfs("mount", stack, mnt, "--size", "1M", "--inodes", "10")
    fs = os.statvfs(mnt)
    assert fs.f_blocks * fs.f_frsize == 1 << 20
    assert fs.f_files == 10
    with pytest.raises(OSError) as caught, open(mnt / "big", "wb", buffering=0) as file:
        for _ in range(300):
            file.write(b"x" * 4096)
    assert caught.value.errno == errno.ENOSPC
    answer = json.loads(cowfs("limit", mnt, "--size", "2M", "--inodes", "none", "--json").stdout)[0]
    assert answer["limit"] == {"bytes": 2 << 20, "inodes": None}
    with open(mnt / "big", "ab", buffering=0) as file:
        assert file.write(b"x" * 4096) == 4096
    cowfs("umount", mnt)
    cowfs("mount", stack, mnt)
    assert json.loads(cowfs("usage", mnt, "--json").stdout)[0]["limit"] == {"bytes": 2 << 20, "inodes": None}


def test_usage_counts_what_the_upper_holds(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    before = json.loads(cowfs("usage", mnt, "--json").stdout)[0]["usage"]
    (mnt / "four").write_bytes(b"x" * 16384)
    after = json.loads(cowfs("usage", mnt, "--json").stdout)[0]["usage"]
    assert (after["bytes"] - before["bytes"], after["inodes"] - before["inodes"]) == (16384, 1)
    text = cowfs("usage", mnt).stdout
    assert "bytes" in text
    assert "none" in text


def test_killed_server_is_cleared_by_umount(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    os.kill(int(str(status_of(cowfs, mnt)["pid"])), signal.SIGKILL)
    with pytest.raises(OSError) as caught:
        os.statvfs(mnt)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert status_of(cowfs, mnt)["alive"] is False
    assert "gone" in cowfs("mounts").stdout
    cowfs("umount", mnt)
    assert os.listdir(mnt) == []


def test_killed_server_is_cleared_by_the_next_mount(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    (mnt / "new").write_text("1")
    os.kill(int(str(status_of(cowfs, mnt)["pid"])), signal.SIGKILL)
    cowfs("mount", stack, mnt)
    assert (mnt / "new").read_text() == "1"
    assert sum(entry == str(mnt) for entry in namespace.mount_points()) == 1


def test_stopped_server_is_unmounted_by_force(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    pid = int(str(status_of(cowfs, mnt)["pid"]))
    os.kill(pid, signal.SIGSTOP)
    try:
        cowfs("umount", "--force", mnt)
        assert os.listdir(mnt) == []
    finally:
        os.kill(pid, signal.SIGCONT)
    assert _gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_unmounts_cleanly(
    cowfs: Run, stack: Path, mnt: Path, run_directory: Path, number: signal.Signals
) -> None:
    """SIGTERM ends a server that is idle; nothing stays behind."""
    others = set(run_directory.iterdir())  # what servers of other tests wrote stays
    cowfs("mount", stack, mnt)
    pid = int(str(status_of(cowfs, mnt)["pid"]))
    os.kill(pid, number)
    assert _gone(pid)
    assert not os.path.ismount(mnt)
    assert set(run_directory.iterdir()) <= others


def test_sigterm_ends_a_busy_mount_too(cowfs: Run, stack: Path, mnt: Path) -> None:
    """Somebody inside does not keep the server from ending; data that was written is in the upper."""
    cowfs("mount", stack, mnt)
    pid = int(str(status_of(cowfs, mnt)["pid"]))
    fd = os.open(mnt / "open", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"written")
    os.kill(pid, signal.SIGTERM)
    assert _gone(pid)
    with pytest.raises(OSError) as caught:
        os.close(fd)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert not os.path.ismount(mnt)
    assert (stack / ".cowfs/upper/open").read_text() == "written"


def test_foreground_serves_until_a_signal(cowfs: Run, stack: Path, mnt: Path) -> None:
    """-f stays, traces on standard error when asked, and ends with status 0 on SIGTERM."""
    command = [sys.executable, "-m", "cowfs", "mount", str(stack), str(mnt), "-f", "--trace"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as server:
        end = time.monotonic() + 20
        while not os.path.ismount(mnt):
            assert server.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        assert (mnt / "app/main").read_text() == "main\n"
        server.send_signal(signal.SIGTERM)
        _, trace = server.communicate(timeout=20)
        assert server.returncode == 0
    assert "LOOKUP" in trace
    assert not os.path.ismount(mnt)


def test_lazy_umount_takes_a_busy_mount_off(cowfs: Run, stack: Path, mnt: Path) -> None:
    """Off the tree at once; who is inside goes on, and the server ends after the last."""
    cowfs("mount", stack, mnt)
    pid = int(str(status_of(cowfs, mnt)["pid"]))
    with open(mnt / "inside", "w") as file:
        cowfs("umount", "--lazy", mnt)
        assert not os.path.ismount(mnt)
        file.write("still works")
        file.flush()
    assert _gone(pid)
    assert (stack / ".cowfs/upper/inside").read_text() == "still works"


def test_mount_options_reach_the_kernel(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt, "-o", "nodev,nosuid", "-o", "noexec,,noatime,")
    with open("/proc/self/mountinfo", encoding="utf-8") as info:
        line = next(line for line in info if f" {mnt} " in line)
    assert {"nodev", "nosuid", "noexec", "noatime"} <= set(line.split(" ")[5].split(","))
    assert " - fuse.cowfs cowfs " in line
    with pytest.raises(PermissionError):
        subprocess.run([mnt / "bin/sh"], check=True)


def test_ids_are_shown_through_ranges(cowfs: Run, stack: Path, mnt: Path) -> None:
    """--uid-map 0:1000:10: root's files in the layers show as 1000's, and are stored as root's again."""
    cowfs("mount", stack, mnt, "--uid-map", "0:1000:10", "--gid-map", "0:2000:5,5:7000:1")
    found = os.stat(mnt / "app/main")
    assert (found.st_uid, found.st_gid) == (1000, 2000)
    os.chown(mnt / "app/main", 1003, 7000)
    cowfs("umount", mnt)
    stored = os.stat(stack / ".cowfs/upper/app/main")
    assert (stored.st_uid, stored.st_gid) == (3, 5)


def test_volatile_marker_is_the_kernels(cowfs: Run, stack: Path, mnt: Path) -> None:
    """A volatile mount marks its work directory; on the same boot cowfs goes on, and a durable mount clears the mark."""
    marker = stack / ".cowfs/work/work/incompat/volatile"
    cowfs("mount", stack, mnt, "--volatile")
    (mnt / "new").write_text("1")
    cowfs("umount", mnt)
    assert marker.is_dir()
    cowfs("mount", stack, mnt, "-o", "volatile")
    assert (mnt / "new").read_text() == "1"
    cowfs("umount", mnt)
    cowfs("mount", stack, mnt)
    cowfs("umount", mnt)
    assert not marker.exists()


def test_volatile_mount_of_another_boot_or_of_the_kernel_is_refused(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt, "--volatile")
    cowfs("umount", mnt)
    dirty = stack / ".cowfs/work/work/incompat/volatile/dirty"
    for content in ("", "00000000-0000-0000-0000-000000000000\n"):
        dirty.write_text(content)
        message = cowfs("mount", stack, mnt, code=5).stderr
        assert "volatile" in message
        assert f"rm -r {dirty.parent}" in message
    assert dirty.read_text().startswith("0000")


def test_umount_all(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    other = space / "mnt2"
    other.mkdir()
    cowfs("mount", stack, mnt, "--read-only")
    cowfs("mount", stack, other, "--read-only")
    assert cowfs("mounts", "--quiet").stdout.split() == [str(mnt), str(other)]
    cowfs("umount", "--all")
    assert cowfs("mounts").stdout == ""


def test_mount_point_may_be_a_symbolic_link_and_relative(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    (space / "link").symlink_to("mnt")
    cowfs("mount", "layers", "link", cwd=space)
    assert os.path.ismount(mnt)
    cowfs("umount", "link", cwd=space)
    assert not os.path.ismount(mnt)


def test_verbs_act_on_this_mount_namespace_only(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    """A mount of another namespace at the same path is neither listed, nor asked, nor unmounted, except on request."""
    script = f"{sys.executable} -m cowfs mount {stack} {mnt} && echo mounted && exec sleep 60"
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", script],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as elsewhere:
        try:
            assert elsewhere.stdout is not None
            assert elsewhere.stdout.readline() == "mounted\n"
            assert not os.path.ismount(mnt)
            assert json.loads(cowfs("mounts", "--json").stdout) == []
            for arguments in (
                ("usage", mnt),
                ("limit", mnt, "--size", "1G"),
                ("umount", mnt),
                ("umount", "--force", mnt),
            ):
                assert "--everywhere" in cowfs(*arguments, code=3).stderr
            cowfs("umount", "--all")
            found = json.loads(cowfs("mounts", "--everywhere", "--json").stdout)
            (status,) = [told for told in found if told["mountpoint"] == str(mnt)]  # others may run tests here
            assert (status["mountpoint"], status["here"]) == (str(mnt), False)
            assert status["limit"] == {"bytes": None, "inodes": None}
            assert "another namespace" in cowfs("mounts", "--everywhere").stdout
            listed = ["nsenter", "-t", str(elsewhere.pid), "-m", "-r", sys.executable, "-m", "cowfs"]
            done = subprocess.run(
                [*listed, "mounts", "-q"], env=environment(), capture_output=True, text=True, check=True
            )
            assert done.stdout == f"{mnt}\n"
            subprocess.run([*listed, "umount", mnt], env=environment(), check=True)
            assert _gone(status["pid"])
        finally:
            elsewhere.kill()


def test_a_server_in_another_pid_namespace_has_its_number_here(cowfs: Run, stack: Path, mnt: Path) -> None:
    """The process that a list names is one that can be looked up where the list was asked for."""
    script = f"{sys.executable} -m cowfs mount {stack} {mnt} && echo mounted && exec sleep 60"
    with subprocess.Popen(
        ["unshare", "-p", "-f", "--kill-child", "sh", "-c", script],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as elsewhere:
        try:
            assert elsewhere.stdout is not None
            assert elsewhere.stdout.readline() == "mounted\n"
            pid = int(str(status_of(cowfs, mnt)["pid"]))
            assert b"cowfs" in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert pid > 10
            cowfs("umount", mnt)
        finally:
            elsewhere.kill()


def test_interrupted_start_leaves_no_mount(cowfs: Run, stack: Path, mnt: Path) -> None:
    """SIGINT to the waiting command ends what it started, at whichever moment it comes."""
    for delay in (0.0, 0.05, 0.1, 0.15, 0.2):
        command = [sys.executable, "-m", "cowfs", "mount", str(stack), str(mnt), "--read-only"]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True) as start:
            time.sleep(delay)
            os.kill(start.pid, signal.SIGINT)
            code = start.wait(20)
        if code == 0:
            cowfs("umount", mnt)
            continue
        end = time.monotonic() + 20
        while os.path.ismount(mnt):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert cowfs("mounts", "--quiet").stdout == ""


def test_fusepy_front_end_has_the_same_life(cowfs: Run, stack: Path, mnt: Path, run_directory: Path) -> None:
    """Mounted, listed, limited, compared, unmounted and killed, through libfuse 2."""
    others = set(run_directory.iterdir())  # what servers of other tests wrote stays
    try:
        import fuse  # noqa: F401 - it loads libfuse
    except (ImportError, OSError) as error:
        pytest.skip(f"no fusepy or no libfuse 2: {error}")
    pid = json.loads(cowfs("mount", stack, mnt, "--frontend", "fusepy", "--size", "1M", "--json").stdout)[0]["pid"]
    assert status_of(cowfs, mnt)["pid"] == pid
    (mnt / "new").write_text("1")
    assert "A /new" in cowfs("diff", mnt).stdout
    cowfs("limit", mnt, "--size", "2M")
    assert os.statvfs(mnt).f_blocks * os.statvfs(mnt).f_frsize == 2 << 20
    cowfs("umount", mnt)
    assert _gone(pid, 2.0)
    assert set(run_directory.iterdir()) <= others
    cowfs("mount", stack, mnt, "--frontend", "fusepy")
    os.kill(int(str(status_of(cowfs, mnt)["pid"])), signal.SIGTERM)
    end = time.monotonic() + 20
    while os.path.ismount(mnt):
        assert time.monotonic() < end
        time.sleep(0.02)
    cowfs("mount", stack, mnt, "--frontend", "fusepy")
    os.kill(int(str(status_of(cowfs, mnt)["pid"])), signal.SIGKILL)
    cowfs("umount", mnt)
    assert os.listdir(mnt) == []
