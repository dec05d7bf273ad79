"""Bad input: one clear line on standard error, an exit status that is not zero, and nothing changed."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import mounts, namespace, users
from support.command import ROOT, Run, environment, one_line, status_of, user_python

from cowfs.cli import VERBS, command_of, parser_of


class Bench:
    """A stack, a mount point and a place for the rest."""

    def __init__(self, space: Path, stack: Path, mnt: Path) -> None:
        self.space, self.stack, self.mnt = space, stack, mnt

    def file(self) -> Path:
        path = self.space / "file"
        path.write_text("")
        return path

    def directory(self, name: str) -> Path:
        path = self.space / name
        path.mkdir(parents=True)
        return path


def _twice(b: Bench) -> list[object]:
    (b.space / "again").symlink_to(b.stack / "1-base")
    return ["--layer", b.stack / "1-base", "--layer", b.space / "again", b.mnt, "--upper", b.space / "up"]


def _root_like(b: Bench) -> list[object]:
    for name in ("etc", "usr"):
        b.directory(f"root/{name}")
    return [b.space / "root", b.mnt]


def _other_filesystem(b: Bench) -> list[object]:
    where = b.directory("elsewhere")
    namespace.mount("tmpfs", str(where), "tmpfs")
    return [b.stack, b.mnt, "--upper", b.space / "up", "--work", where / "work"]


# The fault -> (arguments, words that the line must contain, exit status).
CASES: dict[str, tuple[Callable[[Bench], list[object]], tuple[str, ...], int]] = {
    "no arguments": (lambda b: [], ("cowfs mount LAYERS MNT",), 2),
    "no mount point": (lambda b: [b.stack], ("mount point",), 2),
    "unknown option": (lambda b: [b.stack, b.mnt, "--sise", "1G"], ("--sise", "--help"), 2),
    "unknown mount option": (lambda b: [b.stack, b.mnt, "-o", "frobnicate"], ("frobnicate",), 2),
    "stack missing": (lambda b: [b.space / "nowhere", b.mnt], ("does not exist", "nowhere"), 3),
    "stack is a file": (lambda b: [b.file(), b.mnt], ("not a directory", "file"), 2),
    "stack empty": (lambda b: [b.directory("empty"), b.mnt], ("no layers", "empty"), 3),
    "stack looks like a root": (_root_like, ("looks like a root file system", "--layer"), 2),
    "layer missing": (lambda b: ["--layer", b.space / "nowhere", b.mnt], ("does not exist", "nowhere"), 3),
    "layer is a file": (lambda b: ["--layer", b.file(), b.mnt], ("not a directory", "file"), 2),
    "layer listed twice": (_twice, ("twice", "1-base"), 2),
    "upper is a layer": (lambda b: [b.stack, b.mnt, "--upper", b.stack / "1-base"], ("is also a layer",), 2),
    "upper inside a lower": (lambda b: [b.stack, b.mnt, "--upper", b.stack / "1-base/up"], ("inside the layer",), 2),
    "layer inside the upper": (lambda b: [b.stack, b.mnt, "--upper", b.stack], ("inside the upper",), 2),
    "upper is a file": (lambda b: [b.stack, b.mnt, "--upper", b.file()], ("not a directory", "file"), 2),
    "upper's parent missing": (lambda b: [b.stack, b.mnt, "--upper", "/proc/1/nowhere/up"], ("/proc",), 2),
    "work on another file system": (_other_filesystem, ("different file systems", "--work"), 2),
    "work without upper": (lambda b: [b.stack, b.mnt, "--work", b.space / "w"], ("--upper",), 2),
    "ephemeral with upper": (lambda b: [b.stack, b.mnt, "--ephemeral", "--upper", b.space / "u"], ("ephemeral",), 2),
    "layers without a common parent": (
        lambda b: ["--layer", b.stack / "1-base", "--layer", b.directory("far/away"), b.mnt], ("--upper",), 2),
    "mount point missing": (lambda b: [b.stack, b.space / "nowhere"], ("does not exist", "mkdir"), 3),
    "mount point is a file": (lambda b: [b.stack, b.file()], ("not a directory",), 2),
    "mount point inside a layer": (lambda b: [b.stack, b.stack / "1-base/etc"], ("inside",), 2),
    "mount point hides the layers": (lambda b: [b.stack, b.space], ("would hide",), 2),
    "size is no size": (lambda b: [b.stack, b.mnt, "--size", "many"], ("'many'", "2G"), 2),
    "size is zero": (lambda b: [b.stack, b.mnt, "--size", "0"], ("'0'",), 2),
    "inodes is no count": (lambda b: [b.stack, b.mnt, "--inodes", "-3"], ("'-3'",), 2),
    "limit of a read-only mount": (lambda b: [b.stack, b.mnt, "--read-only", "--size", "1G"], ("limit",), 2),
    "limit with passthrough": (lambda b: [b.stack, b.mnt, "--io", "passthrough", "--size", "1G"], ("passthrough",), 2),
    "range of ids": (lambda b: [b.stack, b.mnt, "--uid-map", "0:1"], ("'0:1'", "IN:OUT:COUNT"), 2),
    "range of ids too long": (lambda b: [b.stack, b.mnt, "--gid-map", "0:4294967295:2"], ("4294967295",), 2),
}  # fmt: skip


def _picture(root: Path) -> list[tuple[str, int, int]]:
    """Names, modes and sizes of a tree."""
    found = []
    for directory, _, names in os.walk(root):
        for name in (".", *names):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            found.append(
                (os.path.relpath(path, root), status.st_mode, 0 if stat.S_ISDIR(status.st_mode) else status.st_size)
            )
    return sorted(found)


@pytest.mark.parametrize("case", CASES)
def test_mount_refuses(cowfs: Run, space: Path, stack: Path, mnt: Path, case: str) -> None:
    make, words, code = CASES[case]
    arguments = make(Bench(space, stack, mnt))
    before = _picture(space)
    mounted = namespace.mount_points()
    line = one_line(cowfs("mount", *arguments, code=code))
    for word in words:
        assert word in line, line
    assert namespace.mount_points() == mounted
    assert _picture(space) == before


def test_upper_in_use_names_the_holder(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    """A second mount of an upper is refused, with the process that holds it, however the upper is spelled."""
    other = space / "mnt2"
    other.mkdir()
    cowfs("mount", stack, mnt)
    pid = status_of(cowfs, mnt)["pid"]
    for arguments in ([stack, other], [stack, other, "--upper", stack / ".cowfs/upper", "--work", stack / ".cowfs/w2"]):
        line = one_line(cowfs("mount", *arguments, code=5))
        assert f"process {pid}" in line
    assert not os.path.ismount(other)
    assert (mnt / "app/main").read_text() == "main\n"


def test_layer_that_is_being_written_is_refused(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    """The upper of a live mount is no layer, and a layer of a live mount is no upper; the other is named."""
    (space / "mnt2").mkdir()
    cowfs("mount", stack, mnt)
    pid = status_of(cowfs, mnt)["pid"]
    upper = stack / ".cowfs/upper"
    line = one_line(
        cowfs("mount", "--layer", stack / "1-base", "--layer", upper, space / "mnt2", "--read-only", code=5)
    )
    assert f"process {pid}" in line
    cowfs("umount", mnt)
    cowfs("mount", "--layer", stack / "1-base", "--layer", upper, mnt, "--read-only")
    other = ("--layer", stack / "2-python", space / "mnt2", "--upper", upper, "--work", space / "w")
    assert "in use" in one_line(cowfs("mount", *other, code=5))
    cowfs("mount", "--layer", stack / "1-base", "--layer", upper, space / "mnt2", "--read-only")
    cowfs("umount", "--all")


def test_upper_of_a_kernel_mount_is_refused(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    """The kernel takes no lock on an upper: its mounts are found in mountinfo and named."""
    kernel, upper, work = space / "kernel", space / "up", space / "work"
    for path in (kernel, upper, work):
        path.mkdir()
    with mounts.overlay([stack / "1-base"], kernel, upper, work):
        line = one_line(cowfs("mount", "--layer", stack / "1-base", mnt, "--upper", upper, code=5))
        assert f"overlay mount at {kernel}" in line
    assert not os.path.ismount(mnt)


def test_busy_mount_point_is_refused(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt, "--read-only")
    line = one_line(cowfs("mount", stack, mnt, "--read-only", code=5))
    assert f"cowfs umount {mnt}" in line
    assert namespace.mount_points().count(str(mnt)) == 1


def test_other_layers_under_a_kept_upper_are_refused(cowfs: Run, stack: Path, mnt: Path) -> None:
    """The record beside the upper is compared; the line names what was there and how to go on."""
    cowfs("mount", stack, mnt)
    cowfs("umount", mnt)
    (stack / "11-more").mkdir()
    line = one_line(cowfs("mount", stack, mnt, code=5))
    assert "other layers" in line
    assert "--ephemeral" in line
    (stack / "11-more").rmdir()
    cowfs("mount", stack, mnt)


def test_damaged_record_is_named(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    cowfs("umount", mnt)
    for text in ("{", "[]", '{"layers": 3, "upper": "upper"}'):
        (stack / ".cowfs/state.json").write_text(text)
        assert "state.json" in one_line(cowfs("mount", stack, mnt, code=7))


def test_umount_says_who_is_inside(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    with subprocess.Popen(["sleep", "60"], cwd=mnt) as inside:
        try:
            line = one_line(cowfs("umount", mnt, code=5))
        finally:
            inside.kill()
    assert f"{inside.pid} (sleep)" in line
    assert os.path.ismount(mnt)


@pytest.mark.parametrize("verb", ["umount", "usage", "limit"])
def test_not_mounted(cowfs: Run, mnt: Path, verb: str) -> None:
    assert str(mnt) in one_line(cowfs(verb, mnt, code=3))


def test_somebody_elses_mount_is_left_alone(cowfs: Run, mnt: Path) -> None:
    namespace.mount("tmpfs", str(mnt), "tmpfs")
    assert "tmpfs" in one_line(cowfs("umount", mnt, code=3))
    assert os.path.ismount(mnt)
    namespace.umount(str(mnt))


def test_limit_of_a_read_only_mount(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt, "--read-only")
    assert "read-only" in one_line(cowfs("limit", mnt, "--size", "1G", code=5))


def test_diff_needs_to_know_the_layers(cowfs: Run, space: Path) -> None:
    (space / "upper").mkdir()
    assert "--layer" in one_line(cowfs("diff", space / "upper", code=3))
    assert "nowhere" in one_line(cowfs("diff", space / "nowhere", code=3))


def test_unknown_verb_is_guessed(cowfs: Run) -> None:
    assert "umount" in one_line(cowfs("unmount", code=2))


def _as_user(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as an ordinary user, with this host's own /dev/fuse."""
    command = users.command_as([str(part) for part in (user_python(), "-m", "cowfs", *arguments)])
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**environment(), "TMPDIR": "/tmp"})


@pytest.fixture
def readable(can_mount: None) -> None:
    """Skip where an ordinary user cannot even read the interpreter or the tree under test."""
    if user_python() is None:
        pytest.skip(f"an ordinary user cannot run {sys.executable} with {ROOT}")


def test_unreadable_layer(run_directory: Path, readable: None, stack: Path, mnt: Path) -> None:
    """The layer is named before anything is tried."""
    os.chmod(stack / "2-python", 0o700)
    done = _as_user("mount", stack, mnt, "--read-only")
    assert done.returncode == 2
    assert "not readable" in one_line(done)
    assert "2-python" in done.stderr


def test_unwritable_place_for_the_upper(run_directory: Path, readable: None, stack: Path, mnt: Path) -> None:
    done = _as_user("mount", stack, mnt)
    assert done.returncode == 2
    assert "--upper" in one_line(done)


def test_no_permission_for_the_device(
    run_directory: Path, readable: None, stack: Path, mnt: Path, tmp_path: Path
) -> None:
    """A /dev/fuse that is root's alone: said so, with the remedy."""
    node = tmp_path / "fuse"
    os.mknod(node, stat.S_IFCHR | 0o600, os.stat("/dev/fuse").st_rdev)
    namespace.bind(str(node), "/dev/fuse")
    os.chown(mnt, users.UID, users.GID)
    try:
        done = _as_user("mount", stack, mnt, "--read-only")
    finally:
        namespace.umount("/dev/fuse")
    assert done.returncode == 8
    assert "/dev/fuse" in one_line(done)


def test_no_device(cowfs: Run, stack: Path, mnt: Path, tmp_path: Path) -> None:
    """A device that is not FUSE's at all."""
    node = tmp_path / "fuse"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 254))
    namespace.bind(str(node), "/dev/fuse")
    try:
        line = one_line(cowfs("mount", stack, mnt, code=8))
    finally:
        namespace.umount("/dev/fuse")
    assert "/dev/fuse" in line
    assert "modprobe fuse" in line
    assert not os.path.ismount(mnt)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(cowfs: Run, verb: str) -> None:
    """Every verb's --help has examples of it, and each is a command line that the verb accepts."""
    assert "examples:" in cowfs(verb, "--help").stdout
    shown = []
    for example in command_of(verb).examples:
        lexer = shlex.shlex(example, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>()"):
                if words[:1] == ["cowfs"]:
                    shown.append(words[1])
                    parser_of(words[1]).parse_args(words[2:])
                words = []
            else:
                words.append(word)
    assert verb in shown


OLD_KERNEL = """
from cowfs.fuse import handshake, abi
from cowfs.cli import main
import sys
negotiate = handshake.negotiate
def older(body, **more):
    {change}
    return negotiate(memoryview(body), **more)
handshake.negotiate = older
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ("body = abi.INIT_COMPAT_IN.pack(7, 8, 0, 0)", (), ("7.8", "Linux 5.4", "--frontend fusepy")),
        ("body = bytearray(body); body[16:20] = bytes(4)", ("--io", "passthrough"), ("passthrough", "Linux 6.9")),
    ],
)
def test_kernel_too_old(
    run_directory: Path, stack: Path, mnt: Path, change: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """A kernel that offers less in INIT (here: the same one, cut short): the feature is named, nothing stays mounted."""
    others = set(run_directory.iterdir())  # what servers of other tests wrote stays
    script = OLD_KERNEL.format(change=change)
    command = [sys.executable, "-c", script, "mount", str(stack), str(mnt), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 8, done.stderr
    for word in words:
        assert word in one_line(done)
    assert not os.path.ismount(mnt)
    assert set(run_directory.iterdir()) <= others


def test_passthrough_is_roots(run_directory: Path, ordinary_user: int, readable: None, stack: Path, mnt: Path) -> None:
    for path in (stack.parent, stack, mnt):
        os.chown(path, users.UID, users.GID)
    done = _as_user("mount", stack, mnt, "--io", "passthrough")
    assert done.returncode == 8
    assert "CAP_SYS_ADMIN" in one_line(done)
