"""The hook of OCI runtimes that sets a container's limit, and the record that keeps it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.command import Run, one_line, run_module, status_of
from support.layers import Layer

from cowfs.errors import Corrupt
from cowfs.model import Limit
from cowfs.mounting import kept_limit


@pytest.fixture
def mounted(space: Path, mnt: Path, run_directory: Path) -> Path:
    """An engine's mount of one layer, at ``mnt``."""
    Layer(space / "base").file("who", b"base")
    for name in ("up", "work", "bundle"):
        (space / name).mkdir()
    mount(space)
    return space


def mount(space: Path, more: str = "") -> None:
    options = f"lowerdir={space / 'base'},upperdir={space / 'up'},workdir={space / 'work'}{more}"
    done = run_module("cowfs.cli.overlayfs", "-o", options, space / "mnt")
    assert done.returncode == 0, done.stderr


def hook(state: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    text = state if isinstance(state, str) else json.dumps(state)
    done = run_module("cowfs.cli.overlayfs", "--limit-hook", input=text)
    assert done.returncode == code, done.stderr
    return done


def bundle(space: Path, annotations: object, root: object = "mnt") -> dict[str, object]:
    """The state that a runtime tells, of a bundle with some annotations."""
    path = str(space / root) if isinstance(root, str) else root
    configuration = {"ociVersion": "1.0.2", "root": {"path": path}, "annotations": annotations}
    (space / "bundle/config.json").write_text(json.dumps(configuration))
    return {"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 1, "bundle": str(space / "bundle")}


def room(space: Path) -> tuple[int, int]:
    fs = os.statvfs(space / "mnt")
    return fs.f_blocks * fs.f_frsize, fs.f_files


def test_annotations_become_the_limit(mounted: Path) -> None:
    hook(bundle(mounted, {"cowfs.size": "1M", "cowfs.inodes": "50", "other": "x"}))
    assert room(mounted) == (1 << 20, 50)
    hook(bundle(mounted, {"cowfs.size": "2M"}))
    assert room(mounted) == (2 << 20, 50)
    hook(bundle(mounted, {"cowfs.size": "none", "cowfs.inodes": "none"}))
    assert room(mounted)[0] > 1 << 24


def test_without_annotations_nothing_is_done(mounted: Path) -> None:
    before = room(mounted)
    for told in ({}, None, {"a": "b"}):
        hook(bundle(mounted, told))
    assert room(mounted)[1] == before[1]
    assert not (mounted / "work" / kept_limit.NAME).exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"bundle": 7}', '{"bundle": "relative"}', '{"bundle": "/nowhere"}']
)
def test_a_state_that_is_none_is_one_line(run_directory: Path, text: str) -> None:
    done = run_module("cowfs.cli.overlayfs", "--limit-hook", input=text)
    assert done.returncode in (2, 3)
    one_line(done)


@pytest.mark.parametrize("size", ["", "many", "-1", "0", "1", "1e99", "\n", "9" * 5000])
def test_a_size_that_is_none_is_one_line_and_changes_nothing(mounted: Path, size: str) -> None:
    hook(bundle(mounted, {"cowfs.size": "3M"}))
    done = run_module("cowfs.cli.overlayfs", "--limit-hook", input=json.dumps(bundle(mounted, {"cowfs.size": size})))
    assert done.returncode != 0
    assert "cowfs.size=" in one_line(done)
    assert room(mounted)[0] == 3 << 20


@pytest.mark.parametrize(
    "words",
    [
        ("cowfs", "mount", "--layer", "{base}", "{mnt}", "--size", "{many}"),
        ("cowfs", "mount", "--layer", "{base}", "{mnt}", "--inodes", "{many}"),
        ("cowfs", "mount", "--layer", "{base}", "{mnt}", "--uid-map", "0:0:{many}"),
        ("cowfs.cli.overlayfs", "-o", "lowerdir={base},squash_to_uid={many}", "{mnt}"),
        ("cowfs.cli.overlayfs", "-o", "lowerdir={base},uidmapping=0:0:{many}", "{mnt}"),
        ("cowfs.cli.overlayfs", "-o", "lowerdir={base},size={many}.{many}", "{mnt}"),
    ],
)
def test_a_number_of_thousands_of_digits_is_one_line_everywhere(mounted: Path, words: tuple[str, ...]) -> None:
    """int() refuses more than 4,300 of them."""
    filled = [word.format(base=mounted / "base", mnt=mounted / "up", many="9" * 5000) for word in words]
    done = run_module(filled[0], *filled[1:])
    assert done.returncode == 2
    one_line(done)


def test_a_root_that_is_no_mount_is_refused(mounted: Path) -> None:
    state = bundle(mounted, {"cowfs.size": "1M"}, root="up")
    done = run_module("cowfs.cli.overlayfs", "--limit-hook", input=json.dumps(state))
    assert done.returncode != 0
    assert "no mount of cowfs" in one_line(done)


def test_a_limit_set_while_mounted_is_there_at_the_next_mount(mounted: Path, cowfs: Run) -> None:
    cowfs("limit", mounted / "mnt", "--size", "5M", "--inodes", "70")
    subprocess.run(["umount", mounted / "mnt"], check=True)
    mount(mounted)
    assert room(mounted) == (5 << 20, 70)
    assert status_of(cowfs, mounted / "mnt")["upper"] == str(mounted / "up")


def test_options_that_ask_something_else_are_newer(mounted: Path, cowfs: Run) -> None:
    """And a limit that was set to none stays none under the same options."""
    cowfs("limit", mounted / "mnt", "--size", "5M")
    for more, expected in ((",size=7M", 7), ("", 5)):
        subprocess.run(["umount", mounted / "mnt"], check=True)
        mount(mounted, more)
        assert room(mounted)[0] == expected << 20
    subprocess.run(["umount", mounted / "mnt"], check=True)
    mount(mounted, ",size=7M")
    cowfs("limit", mounted / "mnt", "--size", "none")
    subprocess.run(["umount", mounted / "mnt"], check=True)
    mount(mounted, ",size=7M")
    assert room(mounted)[0] > 7 << 20


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"limit": {"size": -1, "inodes": null}, "asked": {"size": null, "inodes": null}}',
             '{"limit": {"size": true, "inodes": null}, "asked": {"size": null, "inodes": null}}', "[" * 100_000]
)  # fmt: skip
def test_a_damaged_record_is_told(mounted: Path, text: str) -> None:
    subprocess.run(["umount", mounted / "mnt"], check=True)
    (mounted / "work" / kept_limit.NAME).write_text(text)
    with pytest.raises(Corrupt, match="no record of a limit"):
        kept_limit.read(str(mounted / "work"), Limit())
    options = f"lowerdir={mounted / 'base'},upperdir={mounted / 'up'},workdir={mounted / 'work'}"
    done = run_module("cowfs.cli.overlayfs", "-o", options, mounted / "mnt")
    assert done.returncode != 0
    assert kept_limit.NAME in one_line(done)


def test_a_record_that_is_no_regular_file_hangs_nobody(mounted: Path) -> None:
    subprocess.run(["umount", mounted / "mnt"], check=True)
    os.mkfifo(mounted / "work" / kept_limit.NAME)
    options = f"lowerdir={mounted / 'base'},upperdir={mounted / 'up'},workdir={mounted / 'work'}"
    done = run_module("cowfs.cli.overlayfs", "-o", options, mounted / "mnt")
    assert done.returncode != 0
    one_line(done)
