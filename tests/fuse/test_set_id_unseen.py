"""Set-id bits where the server cannot see who writes: in another pid namespace, or without /proc.

Programs are run, not looked at: a stat would have the kernel ask for the mode anew. tests/e2e/test_set_id.py has the
rest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cowfs.fuse import caller

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
WAYS = {
    "write": "dd of=f conv=notrunc oflag=seek_bytes seek={head} count=1 bs=512 if=/dev/zero status=none",
    "direct": "dd of=f conv=notrunc oflag=direct seek=200 count=1 bs=4096 if=/dev/zero status=none",
    "punch": "fallocate --punch-hole --offset {head} --length 4096 f",
    "allocate": "fallocate --offset {head} --length 65536 f",
    "copy": "python3 -c 'import os; fd = os.open(\"f\", os.O_RDWR); os.copy_file_range(fd, fd, 100, 0, {head})'",
    "cut": "truncate --size=$(({head} + 100)) f",
    "chown": "python3 -c 'import os; os.chown(\"f\", -1, -1)'",
}


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "in_chown", lambda pid: None)
    monkeypatch.setattr(caller, "_status", lambda pid: {})


@pytest.fixture
def tool(layers: Path, union: Any, unseen: None) -> Any:
    """A mount with the program ``f`` of root in it, which everybody may write; and its size."""
    found = shutil.which("grep")
    if found is None or shutil.which("setpriv") is None:
        pytest.skip("grep or setpriv is not installed")
    lower = layers / "lower"
    for path in (layers, lower, *layers.parents):
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(path.stat().st_mode | 0o055)
    shutil.copyfile(found, lower / "f")
    with (lower / "f").open("ab") as file:
        file.write(b"\0" * (1 << 20))
    (lower / "f").chmod(0o4777)
    return union(), os.stat(found).st_size


def shell(mnt: Any, command: str, *before: str) -> str:
    done = subprocess.run(
        [*before, "sh", "-c", command], cwd=mnt.path, capture_output=True, text=True, check=False, timeout=20
    )
    return done.stdout + done.stderr


def effective(mnt: Any) -> str:
    return shell(mnt, "./f ^Uid /proc/self/status", *NOBODY).split()[2]


@pytest.mark.parametrize("way", WAYS)
def test_a_stranger_who_writes_gets_no_program_of_root(tool: Any, way: str) -> None:
    mnt, head = tool
    assert effective(mnt) == "0"
    assert shell(mnt, WAYS[way].format(head=head), *NOBODY) == ""
    assert effective(mnt) == ("0" if way == "chown" else "65534")


@pytest.mark.parametrize("way", [way for way in WAYS if way != "chown"])
def test_root_who_writes_leaves_the_bits(tool: Any, way: str) -> None:
    mnt, head = tool
    assert shell(mnt, WAYS[way].format(head=head)) == ""
    assert effective(mnt) == "0"


def test_writes_that_clear_bits_go_on_beside_a_map_that_is_written(tool: Any) -> None:
    """The notification of the new mode never waits for pages that the kernel wants written first."""
    mnt, head = tool
    dirty = subprocess.Popen(
        ["python3", "-c", f"import mmap, os\nm = mmap.mmap(os.open('f', os.O_RDWR), 0)\nprint('x', flush=True)\n"
                          f"while True: m[{head} + 5000] = (m[{head} + 5000] + 1) % 256"],
        cwd=mnt.path, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert dirty.stdout is not None and dirty.stdout.read(2) == b"x\n"
        write = f"dd of=f conv=notrunc oflag=seek_bytes seek={head + 9000} count=1 bs=512 if=/dev/zero status=none"
        for _ in range(20):
            assert shell(mnt, f"chmod 4777 f && {' '.join(NOBODY)} {write} && sync f") == ""
    finally:
        dirty.terminate()
        dirty.wait(10)
        assert dirty.stdout is not None
        dirty.stdout.close()
    assert effective(mnt) == "65534"
