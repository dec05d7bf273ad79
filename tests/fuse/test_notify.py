"""Telling the kernel to forget: from a thread of its own, and what each notification does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cowfs.fuse import abi, codec
from cowfs.fuse.notify import Notifier


def need(mnt: Any, minor: int, what: str) -> None:
    if mnt.session.agreement.minor < minor:
        pytest.skip(f"the kernel speaks FUSE 7.{mnt.session.agreement.minor}; {what} came with 7.{minor}")


def test_data_changed_behind_the_kernel_s_back_is_seen_after_inval_inode(mnt: Any) -> None:
    with open(mnt / "f", "wb") as out:
        out.write(b"before")
    node = mnt.node("f")
    with open(mnt / "f", "rb") as file:
        file.read()

    def change() -> None:
        os.pwrite(node.fd, b"after!", 0)
        node.attr = None

    mnt.session.call(change)
    with open(mnt / "f", "rb") as file:
        assert file.read() == b"before"  # from the page cache
    mnt.session.notifier.inval_inode(node.id)
    assert mnt.session.notifier.flush(10)
    with open(mnt / "f", "rb") as file:
        assert file.read() == b"after!"


def test_attributes_alone_can_be_dropped(mnt: Any) -> None:
    os.mkdir(mnt / "d")
    os.stat(mnt / "d")
    mnt.mark()
    mnt.session.notifier.inval_inode(mnt.node("d").id, -1)
    assert mnt.session.notifier.flush(10)
    os.stat(mnt / "d")
    assert mnt.asked() == {"GETATTR": 1}


def test_a_negative_name_is_asked_for_again_after_inval_entry(mnt: Any) -> None:
    assert not os.path.exists(mnt / "late")
    mnt.session.call(lambda: mnt.view.mkdir(mnt.view.root, b"late", 0o755, 0, 0, 0))
    assert not os.path.exists(mnt / "late")
    mnt.session.notifier.inval_entry(abi.ROOT_ID, b"late")
    assert mnt.session.notifier.flush(10)
    assert os.path.isdir(mnt / "late")


def test_a_name_deleted_behind_the_kernel_s_back_is_gone_after_delete(mnt: Any) -> None:
    os.mkdir(mnt / "d")
    node = mnt.node("d")
    mnt.session.call(lambda: mnt.view.rmdir(mnt.view.root, b"d"))
    assert os.path.isdir(mnt / "d")
    mnt.session.notifier.delete(abi.ROOT_ID, node.id, b"d")
    assert mnt.session.notifier.flush(10)
    assert not os.path.exists(mnt / "d")


def test_every_name_is_asked_for_again_after_inc_epoch(mnt: Any) -> None:
    need(mnt, 44, "INC_EPOCH")
    os.mkdir(mnt / "d")
    assert not os.path.exists(mnt / "missing")
    mnt.mark()
    mnt.session.notifier.inc_epoch()
    assert mnt.session.notifier.flush(10)
    os.stat(mnt / "d")
    assert not os.path.exists(mnt / "missing")
    assert mnt.asked()["LOOKUP"] == 2
    assert mnt.session.notifier.unsupported == set()


def test_unused_nodes_are_forgotten_after_prune_and_used_ones_stay(mnt: Any) -> None:
    for name in ("idle", "open"):
        with open(mnt / name, "wb") as file:
            file.write(b"x")
    ids = {name: mnt.node(name).id for name in ("idle", "open")}
    with open(mnt / "open", "rb") as held:
        mnt.session.notifier.prune(list(ids.values()))
        assert mnt.session.notifier.flush(10)
        if abi.NOTIFY_PRUNE in mnt.session.notifier.unsupported:
            pytest.skip("the kernel has no FUSE_NOTIFY_PRUNE (Linux 6.18)")
        assert mnt.eventually(lambda: ids["idle"] not in mnt.view.nodes)
        assert mnt.session.call(lambda: ids["open"] in mnt.view.nodes)
        assert held.read() == b"x"


def test_max_nodes_bounds_what_the_kernel_keeps(serve: Any) -> None:
    mnt = serve(max_nodes=200)
    names = [f"f{index}" for index in range(3000)]

    def fill() -> None:
        for name in names:
            mnt.view.mkdir(mnt.view.root, name.encode(), 0o755, 0, 0, 0)
        mnt.view.forgotten.update({id: node for id, node in mnt.view.nodes.items() if id != 1})
        mnt.view.nodes = {1: mnt.view.root}
        mnt.session._handlers[abi.LOOKUP].__self__.nodes = mnt.view.nodes

    mnt.session.call(fill)
    most = 0
    for name in names:
        os.stat(mnt / name)
        most = max(most, len(mnt.view.nodes))
    assert mnt.session.notifier.flush(10)
    if abi.NOTIFY_PRUNE in mnt.session.notifier.unsupported:
        pytest.skip("the kernel has no FUSE_NOTIFY_PRUNE (Linux 6.18)")
    mnt.session.call(lambda: None)
    assert mnt.eventually(lambda: len(mnt.view.nodes) <= 300)
    assert most < 2500
    assert mnt.session.notifier.sent[abi.NOTIFY_PRUNE] > 1


def test_invalidating_a_dirty_map_does_not_hang(mnt: Any) -> None:
    """INVAL_INODE waits for the write-back of a dirty mapped page, which only the loop can answer."""
    with open(mnt / "f", "wb") as file:
        file.write(bytes(8192))
    node = mnt.node("f")
    code = (
        "import mmap, os, sys\n"
        "os.chdir(sys.argv[1])\n"  # not cwd=: a vforked child holds our interpreter, which must answer the chdir
        "fd = os.open('f', os.O_RDWR)\n"
        "with mmap.mmap(fd, 8192) as m:\n"
        "    m[0:5] = b'dirty'\n"
        "    print('dirty', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print(m[0:5])\n"
    )
    import subprocess
    import sys

    with subprocess.Popen(
        [sys.executable, "-c", code, str(mnt.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "dirty\n"
        mnt.session.notifier.inval_inode(node.id)
        assert mnt.session.notifier.flush(30)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "b'dirty'\n"
    assert os.pread(node.fd, 5, 0) == b"dirty"


def test_what_the_kernel_refuses_is_remembered_and_harms_nothing(mnt: Any) -> None:
    mnt.session.notifier.send(codec._notification(77, b""))
    mnt.session.notifier.inval_entry(abi.ROOT_ID, b"never heard of")
    assert mnt.session.notifier.flush(10)
    assert mnt.session.notifier.unsupported == {77}
    assert mnt.session.notifier.sent == {abi.NOTIFY_INVAL_ENTRY: 1}
    os.mkdir(mnt / "d")


def test_a_notifier_that_was_never_used_has_no_thread(tmp_path: Path) -> None:
    notifier = Notifier(-1)
    assert notifier.flush(0)
    notifier.close()
