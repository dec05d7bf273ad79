"""Limits of a container by every driver that this host has, under the daemon: ENOSPC inside, what it shows, live changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import hostfs
from support.daemon import Daemon, clean_up

PLACES = {"btrfs": "btrfs", "block": "ext4"}
"""The host's file system for a driver, where it is not the session's tmpfs."""
FILL = ("dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=24")


@pytest.fixture(params=["overlay", "vfs", "row", "aufs", "btrfs", "block", "zfs"])
def daemon(
    request: pytest.FixtureRequest,
    scratch: Path,
    host: Callable[[str], hostfs.HostFs],
    busybox: bytes,
    docker_command: str,
) -> Iterator[Daemon]:
    """A daemon with a store of each driver, and the image ``bb``."""
    name = request.param
    with contextlib.ExitStack() as held:
        made = Daemon(scratch / f"sd-{name}", "-D", "--storage-driver", name, "--storage-opt", "size=48M")
        if name == "zfs":
            made.root = request.getfixturevalue("pool") / "store"
        elif name in PLACES:
            made.root = host(PLACES[name]).fresh("sd") / "store"
        made.root.parent.mkdir(exist_ok=True)
        made.start()
        held.callback(clean_up, made)
        made.docker("import", "-c", 'CMD ["sh"]', "-", "bb", input=busybox)
        yield made
    assert "Traceback" not in made.log, made.log


def test_the_limit_holds_is_shown_and_changes_live(daemon: Daemon) -> None:
    out = daemon.out
    assert "Default Size: 48M" in out("info")
    daemon.docker("run", "-d", "--name", "one", "--storage-opt", "size=16M", "bb", "sleep", "1000")
    full = daemon.docker("exec", "one", *FILL, check=False)
    assert "No space left on device" in full.stderr
    blocks, used = map(int, out("exec", "one", "df", "-k", "/").splitlines()[-1].split()[1:3])
    assert blocks <= 16 << 10
    assert used > 8 << 10
    (size,) = [each for each in daemon.request("GET", "/containers/json?size=1")[1] if each["Names"] == ["/one"]]
    assert 8 << 20 < size["SizeRw"] <= 17 << 20
    stats = daemon.request("GET", "/containers/one/stats?stream=0&one-shot=1")[1]["cowfs"]
    assert stats["limit_bytes"] == 16 << 20
    daemon.cowfs("limit", "one", "40M")
    daemon.docker("exec", "one", *FILL)
    assert out("exec", "one", "stat", "-c", "%s", "/data/big") == str(24 << 20)
    assert "A /data/big" in out("diff", "one").splitlines()
    daemon.docker("exec", "one", "rm", "/data/big")
    daemon.docker("exec", "one", "sh", "-c", "echo kept > /data/kept")
    daemon.docker("commit", "one", "two")
    assert out("run", "--rm", "two", "cat", "/data/kept") == "kept"
    daemon.docker("rm", "-f", "one")
    daemon.docker("rmi", "two")
