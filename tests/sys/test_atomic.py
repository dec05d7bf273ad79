"""Files appear whole or not at all, on the disk before they have their name; locks answer, and end with their descriptor."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cowfs.mounting.switch_mark import leave_mark
from cowfs.store import Store
from cowfs.sys import atomic, locks, process


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that make a file durable, in the order of their making."""
    calls: list[str] = []

    def noted(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **more: object) -> object:
            kind = ""
            if name == "fsync":
                kind = " directory" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else " file"  # type: ignore[arg-type]
            calls.append(name + kind)
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "link"):
        noted(name)
    return calls


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, order: list[str]) -> None:
    atomic.write_file(str(tmp_path / "f"), b"data", mode=0o640)
    assert order == ["fsync file", "replace", "fsync directory"]
    assert (tmp_path / "f").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["f"]


def test_the_block_size_of_row_and_the_mark_of_a_switch_are_durable(tmp_path: Path, order: list[str]) -> None:
    """Both were written without fsync once: after a power loss an empty file could have the name."""
    Store.open(tmp_path / "store", driver="row", block=8192, fsync=True).close()
    at = order.index("replace")
    assert order[at - 1 : at + 2] == ["fsync file", "replace", "fsync directory"]
    order.clear()
    leave_mark(str(tmp_path / "mark"), {"a": 1})
    assert order.index("fsync file") < order.index("link") < len(order) - 1
    assert order[-1] == "fsync directory"
    with pytest.raises(FileExistsError):
        leave_mark(str(tmp_path / "mark"), {"a": 2})
    assert sorted(os.listdir(tmp_path)) == ["mark", "store"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(ValueError, match="stop"), atomic.replacing(str(tmp_path / "f")) as file:
        file.write(b"half")
        raise ValueError("stop")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_lock_is_an_answer_and_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from cowfs.sys import locks; fd = locks.open_locked(sys.argv[1]); print(fd, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert locks.open_locked(str(tmp_path)) is None
        fd = os.open(tmp_path, os.O_RDONLY)
        assert locks.holder(fd) == other.pid
        assert not locks.lock(fd, shared=True)
        other.kill()
        other.wait()
        assert locks.lock(fd, wait=True)
        os.close(fd)


def test_a_byte_is_locked_for_one_descriptor(tmp_path: Path) -> None:
    a, b = (os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert locks.lock_byte(a, 7)
    assert not locks.lock_byte(b, 7)
    assert locks.lock_byte(b, 8)
    os.close(a)
    assert locks.lock_byte(b, 7)
    os.close(b)


def test_a_process_is_known_by_its_start() -> None:
    assert process.start_time(os.getpid()) == process.start_time(os.getpid())
    assert process.start_time(2**22 + 1) is None
    assert len(process.boot_id()) == 36
