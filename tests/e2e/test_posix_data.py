"""Bytes: reads, writes, holes, truncation, fallocate, maps, copies, locks, files without a name."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

import pytest
from support import posix
from support.posix import error_of, fails, read, tree, write

KIB = 1024
PATTERN = b"".join(i.to_bytes(4, "big") for i in range(4096))  # 16 KiB, every word its own

holes_needed = pytest.mark.only("kernel", "overlay", reason="libfuse2 has no lseek: SEEK_DATA sees one extent")


def opened(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags)


@tree(lambda d: write(d / "f", PATTERN))
@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 4097, 16383, 16384, 20000])
@pytest.mark.parametrize("length", [1, 511, 4096, 5000])
def test_a_write_changes_its_range_only(d: Path, offset: int, length: int) -> None:
    fd = opened(d / "f")
    assert os.pwrite(fd, b"\xff" * length, offset) == length
    expected = bytearray(PATTERN)
    if offset + length > len(expected):
        expected.extend(bytes(offset + length - len(expected)))
    expected[offset : offset + length] = b"\xff" * length
    assert os.pread(fd, 100_000, 0) == bytes(expected)
    os.close(fd)
    assert read(d / "f") == bytes(expected)


@tree(lambda d: write(d / "f", PATTERN))
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5000, 16384, 16385, 100_000])
def test_truncate_cuts_and_fills_with_zeros(d: Path, size: int) -> None:
    os.truncate(d / "f", size)
    assert read(d / "f") == (PATTERN + bytes(100_000))[:size]
    os.truncate(d / "f", 20_000)
    assert read(d / "f") == (PATTERN[: min(size, 16384)] + bytes(20_000))[:20_000]


@tree(lambda d: write(d / "f", PATTERN))
def test_bytes_past_the_end_do_not_come_back(d: Path) -> None:
    """Shorten, then write beyond: the gap reads as zeros, in the cache and on disk."""
    fd = opened(d / "f")
    os.ftruncate(fd, 10)
    os.pwrite(fd, b"end", 9000)
    assert os.pread(fd, 20_000, 0) == PATTERN[:10] + bytes(8990) + b"end"
    os.close(fd)


def test_truncate_errors(d: Path) -> None:
    write(d / "f")
    fails(errno.EINVAL, os.truncate, d / "f", -1)
    fails(errno.ENOENT, os.truncate, d / "g", 0)
    fails(errno.EFBIG, os.truncate, d / "f", 2**63 - 1) if error_of(os.truncate, d / "f", 2**63 - 1) else None
    fd = os.open(d / "f", os.O_RDONLY)
    assert error_of(os.ftruncate, fd, 0) in ("EINVAL", "EBADF")
    os.close(fd)


def test_a_terabyte_of_hole(d: Path) -> None:
    """Large offsets are kept; a hole costs nothing."""
    fd = os.open(d / "f", os.O_CREAT | os.O_RDWR)
    size = 1 << 40
    os.ftruncate(fd, size)
    os.pwrite(fd, b"x", size - 1)
    assert os.fstat(fd).st_size == size
    assert os.fstat(fd).st_blocks <= 64
    assert os.pread(fd, 10, size - 2) == b"\0x"
    os.close(fd)


def test_reading_at_and_past_the_end(d: Path) -> None:
    write(d / "f", b"12345")
    fd = opened(d / "f")
    assert os.pread(fd, 10, 5) == b""
    assert os.pread(fd, 10, 1000) == b""
    assert os.pread(fd, 10, 4) == b"5"
    os.close(fd)


@tree(lambda d: write(d / "f", PATTERN))
def test_an_unlinked_file_stays_usable_while_open(d: Path) -> None:
    fd = opened(d / "f")
    os.unlink(d / "f")
    assert os.fstat(fd).st_nlink == 0
    assert os.pread(fd, 10, 0) == PATTERN[:10]
    os.pwrite(fd, b"written after", 3)
    os.ftruncate(fd, 16)
    os.fchmod(fd, 0o600)
    assert os.pread(fd, 100, 0) == PATTERN[:3] + b"written after"
    assert os.fstat(fd).st_size == 16
    write(d / "f", b"another")
    assert os.pread(fd, 3, 0) == PATTERN[:3]
    os.close(fd)
    assert read(d / "f") == b"another"


@tree(lambda d: write(d / "f", PATTERN))
def test_a_reader_of_an_unlinked_file_sees_its_first_write(d: Path) -> None:
    reader, writer = os.open(d / "f", os.O_RDONLY), opened(d / "f")
    os.unlink(d / "f")
    os.pwrite(writer, b"NEW", 0)
    assert os.pread(reader, 3, 0) == b"NEW"
    os.close(reader)
    os.close(writer)


def test_two_descriptors_append_without_loss(d: Path) -> None:
    one = os.open(d / "f", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    two = os.open(d / "f", os.O_WRONLY | os.O_APPEND)
    for i in range(50):
        os.write(one, b"1" * (i + 1))
        os.write(two, b"2" * (i + 1))
    os.close(one)
    os.close(two)
    assert read(d / "f") == b"".join(b"1" * (i + 1) + b"2" * (i + 1) for i in range(50))


# -- holes ---------------------------------------------------------------------------------


def hole_file(d: Path) -> None:
    with open(d / "f", "wb") as file:
        file.truncate(1 << 20)
        os.pwrite(file.fileno(), b"a" * 4096, 256 * KIB)
        os.pwrite(file.fileno(), b"b" * 4096, 512 * KIB)


@holes_needed
@tree(hole_file)
def test_seek_finds_data_and_holes(d: Path) -> None:
    fd = opened(d / "f")
    assert os.lseek(fd, 0, os.SEEK_DATA) == 256 * KIB
    assert os.lseek(fd, 256 * KIB, os.SEEK_HOLE) == 260 * KIB
    assert os.lseek(fd, 260 * KIB, os.SEEK_DATA) == 512 * KIB
    fails(errno.ENXIO, os.lseek, fd, 600 * KIB, os.SEEK_DATA)
    fails(errno.ENXIO, os.lseek, fd, 1 << 20, os.SEEK_HOLE)
    fails(errno.ENXIO, os.lseek, fd, -1, os.SEEK_DATA)
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    os.close(fd)


@tree(hole_file)
def test_a_sparse_file_stays_sparse_when_copied_up(d: Path) -> None:
    fd = opened(d / "f")
    os.pwrite(fd, b"x", 0)
    status = os.fstat(fd)
    assert status.st_size == 1 << 20
    assert status.st_blocks * 512 <= 64 * KIB
    assert os.pread(fd, 4096, 512 * KIB) == b"b" * 4096
    os.close(fd)


@tree(lambda d: write(d / "f", PATTERN))
def test_fallocate_extends_and_keeps_content(d: Path) -> None:
    fd = opened(d / "f")
    posix.fallocate(fd, 0, 0, 32 * KIB)
    assert os.fstat(fd).st_size == 32 * KIB
    assert os.pread(fd, 64 * KIB, 0) == PATTERN + bytes(16 * KIB)
    posix.fallocate(fd, posix.FALLOC_KEEP_SIZE, 0, 64 * KIB)
    assert os.fstat(fd).st_size == 32 * KIB
    os.close(fd)


@holes_needed
@tree(lambda d: write(d / "f", PATTERN))
def test_punching_a_hole_zeroes_it(d: Path) -> None:
    fd = opened(d / "f")
    posix.fallocate(fd, posix.FALLOC_PUNCH_HOLE | posix.FALLOC_KEEP_SIZE, 100, 8192)
    assert os.pread(fd, 20_000, 0) == PATTERN[:100] + bytes(8192) + PATTERN[8292:]
    assert os.fstat(fd).st_size == len(PATTERN)
    assert os.lseek(fd, 4096, os.SEEK_HOLE) == 4096
    os.close(fd)
    assert read(d / "f") == PATTERN[:100] + bytes(8192) + PATTERN[8292:]


@tree(lambda d: write(d / "f", PATTERN))
@pytest.mark.parametrize("mode", ["ZERO", "COLLAPSE", "INSERT"])
def test_other_modes_of_fallocate_work_or_are_refused_whole(d: Path, mode: str) -> None:
    """A mode that the host lacks is EOPNOTSUPP with nothing changed; the others work."""
    fd = opened(d / "f")
    flag = getattr(posix, f"FALLOC_{mode}")
    result = error_of(posix.fallocate, fd, flag, 4096, 4096)
    expected = {
        "ZERO": PATTERN[:4096] + bytes(4096) + PATTERN[8192:],
        "COLLAPSE": PATTERN[:4096] + PATTERN[8192:],
        "INSERT": PATTERN[:4096] + bytes(4096) + PATTERN[4096:],
    }[mode]
    assert result in ("", "EOPNOTSUPP")
    assert os.pread(fd, 100_000, 0) == (PATTERN if result else expected)
    os.close(fd)


def test_fallocate_errors(d: Path) -> None:
    write(d / "f", PATTERN)
    fd = opened(d / "f")
    fails(errno.EINVAL, posix.fallocate, fd, 0, 0, 0)
    fails(errno.EINVAL, posix.fallocate, fd, 0, -1, 10)
    fails(errno.EOPNOTSUPP, posix.fallocate, fd, posix.FALLOC_PUNCH_HOLE, 0, 10)
    os.close(fd)
    fd = os.open(d / "f", os.O_RDONLY)
    fails(errno.EBADF, posix.fallocate, fd, 0, 0, 10)
    os.close(fd)
    fd = os.open(d, os.O_RDONLY)
    assert error_of(posix.fallocate, fd, 0, 0, 10) in ("EBADF", "EISDIR", "ENODEV")
    os.close(fd)


# -- maps ----------------------------------------------------------------------------------


@tree(lambda d: write(d / "f", PATTERN))
def test_a_shared_map_and_read_show_the_same(d: Path) -> None:
    fd = opened(d / "f")
    with mmap.mmap(fd, len(PATTERN)) as view:
        view[100:105] = b"store"
        assert os.pread(fd, 5, 100) == b"store"
        os.pwrite(fd, b"written", 5000)
        assert view[5000:5007] == b"written"
        view.flush()
    os.close(fd)
    content = read(d / "f")
    assert content[100:105] == b"store"
    assert content[5000:5007] == b"written"


@tree(lambda d: write(d / "f", PATTERN))
def test_a_map_made_before_the_first_write_sees_it(d: Path) -> None:
    fd = os.open(d / "f", os.O_RDONLY)
    with mmap.mmap(fd, len(PATTERN), prot=mmap.PROT_READ) as view:
        assert view[:4] == PATTERN[:4]
        writer = opened(d / "f")
        os.pwrite(writer, b"NEW!", 0)
        os.close(writer)
        assert view[:4] == b"NEW!"
    os.close(fd)


@tree(lambda d: write(d / "f", PATTERN))
def test_a_private_map_never_changes_the_file(d: Path) -> None:
    fd = opened(d / "f")
    with mmap.mmap(fd, len(PATTERN), flags=mmap.MAP_PRIVATE) as view:
        view[0:4] = b"mine"
        assert os.pread(fd, 4, 0) == PATTERN[:4]
    os.close(fd)
    assert read(d / "f") == PATTERN


@tree(lambda d: write(d / "f", PATTERN))
def test_stores_through_a_map_survive_unlink_and_close(d: Path) -> None:
    os.link(d / "f", d / "g")
    fd = opened(d / "f")
    view = mmap.mmap(fd, len(PATTERN))
    os.close(fd)
    os.unlink(d / "f")
    view[0:5] = b"after"
    view.flush()
    view.close()
    assert read(d / "g")[:5] == b"after"


def test_a_mapped_program_runs(d: Path) -> None:
    """Executing from the mount maps it privately."""
    import shutil
    import subprocess

    shutil.copy("/bin/true", d / "true")
    assert subprocess.run([str(d / "true")], check=False).returncode == 0


# -- copies --------------------------------------------------------------------------------


@tree(lambda d: [write(d / "from", PATTERN), write(d / "to", b"0" * 10_000)])
@pytest.mark.parametrize(
    ("source", "target", "length"), [(0, 0, 16384), (1, 7, 5000), (4096, 8192, 4096), (16380, 0, 100)]
)
def test_copy_file_range(d: Path, source: int, target: int, length: int) -> None:
    one, two = opened(d / "from"), opened(d / "to")
    expected = bytearray(b"0" * 10_000)
    piece = PATTERN[source : source + length]
    expected[target : target + len(piece)] = piece
    done = 0
    while done < len(piece):
        count = os.copy_file_range(one, two, len(piece) - done, source + done, target + done)
        assert count > 0
        done += count
    assert os.copy_file_range(one, two, 10, len(PATTERN), 0) == 0
    os.close(one)
    os.close(two)
    assert read(d / "to") == bytes(expected)
    assert read(d / "from") == PATTERN


@tree(lambda d: write(d / "f", PATTERN))
def test_copy_file_range_within_one_file(d: Path) -> None:
    fd = opened(d / "f")
    assert os.copy_file_range(fd, fd, 4096, 0, 8192) == 4096
    assert read(d / "f")[8192:12288] == PATTERN[:4096]
    fails(errno.EINVAL, os.copy_file_range, fd, fd, 4096, 0, 100)
    os.close(fd)


@tree(lambda d: write(d / "f", PATTERN))
def test_sendfile_and_splice_read(d: Path) -> None:
    fd = opened(d / "f")
    reader, writer = os.pipe()
    assert os.sendfile(writer, fd, 0, 10_000) == 10_000
    assert os.read(reader, 20_000) == PATTERN[:10_000]
    os.close(reader)
    os.close(writer)
    os.close(fd)


# -- without a name ------------------------------------------------------------------------


@pytest.mark.only("kernel", "overlay", reason="libfuse2 has no TMPFILE")
def test_o_tmpfile_and_linkat(d: Path) -> None:
    try:
        fd = os.open(d, os.O_TMPFILE | os.O_RDWR, 0o640)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        pytest.skip("the kernel offers no O_TMPFILE here")
    os.write(fd, PATTERN)
    assert os.listdir(d) == []
    assert os.fstat(fd).st_nlink == 0
    posix.link_fd(fd, d / "named")
    assert os.fstat(fd).st_nlink == 1
    os.close(fd)
    assert read(d / "named") == PATTERN
    assert os.stat(d / "named").st_mode & 0o777 == 0o640
    fd = os.open(d, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    fails(errno.ENOENT, posix.link_fd, fd, d / "never")
    os.close(fd)


@tree(lambda d: write(d / "f"))
def test_an_unlinked_file_cannot_be_linked_again(d: Path) -> None:
    fd = opened(d / "f")
    os.unlink(d / "f")
    fails(errno.ENOENT, posix.link_fd, fd, d / "back")
    os.close(fd)


# -- locks ---------------------------------------------------------------------------------


@tree(lambda d: write(d / "f"))
def test_flock_excludes(d: Path) -> None:
    one, two = opened(d / "f"), opened(d / "f")
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fails(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    write(d / "f", b"changed while locked")
    fails(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_UN)
    fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(one)
    os.close(two)


@tree(lambda d: write(d / "f", PATTERN))
def test_record_locks_exclude_by_range(d: Path) -> None:
    fd = opened(d / "f")
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, 0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            other = os.open(d / "f", os.O_RDWR)
            answers = [
                error_of(fcntl.lockf, other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 50),
                error_of(fcntl.lockf, other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100),
            ]
            os.write(writer, repr(answers).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    answer = eval(os.read(reader, 1000))
    assert answer[0] in ("EAGAIN", "EACCES")
    assert answer[1] == ""
    os.close(fd)
    os.close(reader)
    os.close(writer)


@tree(lambda d: write(d / "f"))
def test_leases_do_not_break_writers(d: Path) -> None:
    """F_SETLEASE works or is refused; a write afterwards goes through either way."""
    fd = os.open(d / "f", os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        assert error.errno in (errno.EINVAL, errno.EAGAIN)
    os.close(fd)
    write(d / "f", b"x")


# -- durability ----------------------------------------------------------------------------


@tree(lambda d: write(d / "f", PATTERN))
def test_fsync_of_file_and_directory(d: Path) -> None:
    fd = opened(d / "f")
    os.pwrite(fd, b"x", 0)
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    fd = os.open(d, os.O_RDONLY)
    os.fsync(fd)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syncfs(fd) == 0
    os.close(fd)


def test_o_direct_and_o_sync(d: Path) -> None:
    fd = os.open(d / "s", os.O_CREAT | os.O_RDWR | os.O_SYNC)
    os.write(fd, PATTERN)
    os.close(fd)
    assert read(d / "s") == PATTERN
    try:
        fd = os.open(d / "s", os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        assert error.errno == errno.EINVAL
        return
    buffer = mmap.mmap(-1, 8192)
    buffer[:] = b"D" * 8192
    assert os.pwritev(fd, [buffer], 4096) == 8192
    os.close(fd)
    assert read(d / "s") == PATTERN[:4096] + b"D" * 8192 + PATTERN[12288:]


def test_fiemap_or_enotsup(d: Path) -> None:
    write(d / "f", PATTERN)
    fd = opened(d / "f")
    request = bytearray(struct.pack("<QQIIII", 0, 2**63 - 1, 0, 0, 0, 0))
    assert error_of(fcntl.ioctl, fd, 0xC020660B, request) in ("", "EOPNOTSUPP", "ENOTTY")
    os.close(fd)
