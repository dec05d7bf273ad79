"""A mount whose server has few descriptors, over deep trees and files full of xattrs, against a plain directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import bounded, deep, hostfs, mounts

from cowfs.sys import trees

pytestmark = pytest.mark.usefixtures("can_mount")

DEPTH, LONG = 1_100, 6_000


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on ext4, where an inode has room for 4 KiB of xattrs."""
    base = tmp_path_factory.mktemp("robust")
    root = hostfs.open_fs("ext4", base).fresh()
    yield root

    trees.remove_tree(str(root))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["overlay", "row"])
def test_a_small_server_and_a_plain_directory_agree(
    place: Path, form: str, seed: int, pytestconfig: pytest.Config
) -> None:
    """Random operations with 256 descriptors for the server and more files held than that."""
    lower, plain = place / "lower", place / "plain"
    for root in (lower, plain):
        root.mkdir()
        deep.build(root, DEPTH, LONG, room=3_900)
    options = ["row=4096"] if form == "row" else []
    generator = deep.Generator(plain, pytestconfig.getoption("seed") + seed, slots=300)
    steps = max(500, pytestconfig.getoption("steps") // 10)
    here = deep.Actor(plain)
    try:
        for _ in range(2):
            with bounded.mounted([lower], place, *options, limits=["--nofile=256:256"]) as mount:
                there = deep.Actor(mount.path)
                try:
                    deep.agree(generator, here, there, steps)
                    assert mount.descriptors() < 256
                    deep.compare(plain, mount.path)
                finally:
                    there.close()
                    for slot in list(here.slots):
                        here.op_let_go(slot)
    finally:
        here.close()
    assert "Traceback" not in (place / "server.log").read_text()
    with bounded.mounted([lower], place, *options) as mount:
        deep.compare(plain, mount.path)
    if form == "overlay":
        kernel = place / "kernel"
        kernel.mkdir()
        with mounts.overlay([lower], kernel, place / "upper", place / "work"):
            deep.compare(plain, kernel)
    shutil.rmtree(place / "kernel", ignore_errors=True)
