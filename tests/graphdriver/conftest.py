"""A plugin for each test that asks for one, and real dockerd upon it."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.containerd import image_of_busybox, unmount_below
from support.dockerd import PLUGINS, Dockerd, PluginService, needs_dockerd, private_plugins

_numbers = itertools.count()


@pytest.fixture
def make_plugin(scratch: Path, can_mount: None) -> Iterator[Callable[..., PluginService]]:
    """A function that makes a plugin's service; it is ended after the test, and a traceback in its log fails the test."""
    pytest.importorskip("h11", reason="the extra cowfs-storage[daemon] is not installed")
    private_plugins()
    made: list[PluginService] = []

    def make(*arguments: str) -> PluginService:
        made.append(PluginService(scratch / f"g{next(_numbers)}", *arguments))
        return made[-1]

    yield make
    for each in made:
        each.stop(signal.SIGKILL)
        unmount_below(each.base)
        assert "Traceback" not in each.log, each.log
        shutil.rmtree(each.base, ignore_errors=True)
    subprocess.run(["umount", "-l", PLUGINS], check=True)


@pytest.fixture
def make_dockerd(make_plugin: Callable[..., PluginService], scratch: Path) -> Iterator[Callable[..., Dockerd]]:
    """A function that makes a dockerd on a running plugin; both are not yet, and are ended after the test."""
    needs_dockerd()
    made: list[Dockerd] = []

    def make(*arguments: str, plugin: PluginService | None = None) -> Dockerd:
        service = plugin or make_plugin("-s", "overlay").start()
        made.append(Dockerd(scratch / f"e{next(_numbers)}", service, *arguments))
        return made[-1]

    yield make
    for each in made:
        if each.plugin.process is None:
            each.plugin.start()
        each.clean_up()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """docker save's archive of bb:1: busybox in one layer, another that hides a file of it."""
    from support.archives import directory, member, tar

    more = tar(directory("data"), member("data/.wh.file"), member("data/second", b"of the second layer\n"))
    path = tmp_path / "image.tar"
    path.write_bytes(image_of_busybox(more))
    return path


@pytest.fixture
def engine(make_dockerd: Callable[..., Dockerd], image: Path) -> Dockerd:
    """dockerd with the image bb:1."""
    made = make_dockerd().start()
    made.docker("load", "-i", image)
    return made
