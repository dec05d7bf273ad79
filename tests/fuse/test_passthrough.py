"""io="passthrough": data past the server, one mode an inode, and what is not passed through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cowfs.errors import FailedPrecondition
from cowfs.fuse import Session, SessionOptions
from cowfs.model import Limit
from cowfs.union import Options, View


@pytest.fixture
def served(union: Any, layers: Path) -> Any:
    (layers / "lower/low").write_bytes(b"lower data")
    (layers / "lower/big").write_bytes(b"b" * (3 << 20))
    (layers / "upper/up").write_bytes(b"upper data")
    (layers / "upper/up").chmod(0o666)

    def start(readonly: bool = False) -> Any:
        mnt = union(readonly=readonly, io="passthrough")
        if mnt.session.agreement.mode != "passthrough":
            pytest.skip("the kernel has no FUSE_PASSTHROUGH (Linux 6.9)")
        return mnt

    return start


def test_data_of_an_upper_file_does_not_pass_the_server(served: Any, layers: Path) -> None:
    mnt = served()
    mnt.mark()
    with open(mnt / "up", "r+b", buffering=0) as file:
        assert file.read() == b"upper data"
        file.write(b"!")
        os.fsync(file.fileno())
    asked = mnt.asked()
    assert {"READ", "WRITE"}.isdisjoint(asked)
    assert asked["OPEN"] == 1
    assert mnt.eventually(lambda: mnt.session.counters.get("RELEASE", 0) == 1)
    assert (layers / "upper/up").read_bytes() == b"upper data!"


def test_size_and_times_are_right_while_and_after_it_is_open(served: Any) -> None:
    mnt = served()
    os.utime(mnt / "up", (1, 1))
    with open(mnt / "up", "ab", buffering=0) as file:
        for size in range(11, 30):
            file.write(b"x")
            assert os.stat(mnt / "up").st_size == os.fstat(file.fileno()).st_size == size
            assert os.listdir(mnt.path)  # brings attributes along
            assert os.stat(mnt / "up").st_size == size
        os.link(mnt / "up", mnt / "two")
        assert os.stat(mnt / "two").st_size == 29
    assert os.stat(mnt / "up").st_size == 29
    assert os.stat(mnt / "up").st_mtime > 1
    with open(mnt / "two", "rb") as file:
        assert file.read() == b"upper data" + b"x" * 19


def test_a_new_file_is_passed_through(served: Any) -> None:
    mnt = served()
    mnt.mark()
    with open(mnt / "new", "wb") as file:
        file.write(b"n" * (5 << 20))
    assert "WRITE" not in mnt.asked()
    assert os.stat(mnt / "new").st_size == 5 << 20


def test_a_lower_file_of_a_writable_mount_is_read_through_the_page_cache(served: Any) -> None:
    mnt = served()
    mnt.mark()
    with open(mnt / "low", "rb") as file:
        assert file.read() == b"lower data"
    assert mnt.asked()["READ"] >= 1


@pytest.mark.parametrize("name", ["low", "big"])
def test_opening_a_lower_file_for_writing_copies_it_up_and_passes_it_through(
    served: Any, layers: Path, name: str
) -> None:
    mnt = served()
    mnt.mark()
    with open(mnt / name, "r+b", buffering=0) as file:
        file.write(b"NEW")
    assert "WRITE" not in mnt.asked()
    before = (layers / "lower" / name).read_bytes()
    assert (layers / "upper" / name).read_bytes() == b"NEW" + before[3:]


def test_a_file_being_read_when_a_writer_comes_stays_in_the_page_cache_until_its_last_close(
    served: Any, layers: Path
) -> None:
    mnt = served()
    with open(mnt / "low", "rb", buffering=0) as reader:
        assert reader.read(5) == b"lower"
        mnt.mark()
        with open(mnt / "low", "r+b", buffering=0) as writer:
            writer.write(b"LOWER")
        assert mnt.asked()["WRITE"] == 1
        assert os.pread(reader.fileno(), 100, 0) == b"LOWER data"
    mnt.mark()
    with open(mnt / "low", "r+b", buffering=0) as writer:
        writer.write(b"later")
    assert "WRITE" not in mnt.asked()


def test_everything_in_a_read_only_mount_is_passed_through(served: Any) -> None:
    mnt = served(readonly=True)
    mnt.mark()
    with open(mnt / "big", "rb") as file:
        assert len(file.read()) == 3 << 20
    assert "READ" not in mnt.asked()


def test_truncation_at_open_works(served: Any) -> None:
    mnt = served()
    subprocess.run(["sh", "-c", ": > up"], cwd=mnt.path, check=True)
    assert os.stat(mnt / "up").st_size == 0


def test_a_shared_map_of_a_passed_through_file(served: Any, layers: Path) -> None:
    mnt = served()
    mnt.python("import mmap, os\nfd = os.open('up', os.O_RDWR)\nwith mmap.mmap(fd, 10) as m:\n    m[0:5] = b'UPPER'\n")
    assert (layers / "upper/up").read_bytes() == b"UPPER data"


def test_backings_and_descriptors_are_given_back(served: Any) -> None:
    mnt = served()
    before = mnt.session.call(lambda: len(os.listdir("/proc/self/fd")))
    for index in range(200):
        with open(mnt / f"f{index}", "wb") as file:
            file.write(b"x")
        os.unlink(mnt / f"f{index}")
    assert mnt.eventually(lambda: len(mnt.view.nodes) < 10)
    assert mnt.session.call(lambda: len(os.listdir("/proc/self/fd"))) <= before + 5


def test_a_setuid_bit_does_not_survive_a_write_by_another_user(served: Any) -> None:
    mnt = served()
    os.chmod(mnt / "up", 0o4777)
    mnt.python("import os; os.setuid(1); open('up', 'r+b').write(b'y')")
    assert os.stat(mnt / "up").st_mode & 0o7777 == 0o777


def test_passthrough_and_writeback_refuse_a_limit(layers: Path) -> None:
    view = View([], bytes(layers / "upper"), bytes(layers / "work"), options=Options(limit=Limit(bytes=1 << 20)))
    for options in (SessionOptions(io="passthrough"), SessionOptions(writeback=True)):
        with pytest.raises(FailedPrecondition, match="no limit can hold"):
            Session(-1, view, options=options)
    view.close()


def test_passthrough_where_it_is_not_permitted_is_refused_at_once(layers: Path) -> None:
    """A user namespace's root may mount FUSE, but not pass files through."""
    code = (
        "import os, sys, tempfile\n"
        "from cowfs.fuse import Session, SessionOptions, mount_fuse\n"
        "from cowfs.union import View\n"
        f"view = View([{os.fspath(layers / 'lower')!r}])\n"
        "session = Session(mount_fuse(tempfile.mkdtemp()), view, options=SessionOptions(io='passthrough'))\n"
        "try: session.run()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs none /mnt && TMPDIR=/mnt exec "$0" -c "$1"', sys.executable, code],
        capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    if "unshare" in done.stderr or "/dev/fuse" in done.stdout:
        pytest.skip(f"no FUSE in a user namespace here: {done.stderr}{done.stdout}")
    assert done.stdout.startswith(("Unsupported passthrough is not permitted", "Unsupported the kernel has no FUSE")), (
        done.stdout + done.stderr
    )
