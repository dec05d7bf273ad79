"""A real Debian root in three layers: packages come and go, programs are built and run in it.

Afterwards the same layers and upper are read by the kernel's overlayfs, which must see the very
same tree, and again the other way round: the kernel goes on writing, cowfs reads.

The root is a tar made by mmdebstrap (``--debian-root``, else ``$COWFS_DEBIAN_ROOT``, else built once
and kept in ``$XDG_CACHE_HOME/cowfs-tests``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import hostfs, layers, mounts, namespace, trees

pytestmark = pytest.mark.slow

INSTALLED = "gcc libc6-dev git python3 python3-pip sqlite3 libcap2-bin iputils-ping mtr-tiny"

SQLITE = """
import random, sqlite3, threading
path = "/srv/load.db"
db = sqlite3.connect(path)
db.execute("pragma journal_mode=wal")
db.execute("create table t(k integer primary key, v blob)")
db.commit()
def work(seed):
    rng = random.Random(seed)
    mine = sqlite3.connect(path, timeout=60)
    for i in range(150):
        with mine:
            mine.execute("insert or replace into t values(?, ?)", (rng.randrange(2000), rng.randbytes(rng.randrange(3000))))
            if i % 10 == 0:
                mine.execute("delete from t where k < ?", (rng.randrange(100),))
    mine.close()
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
db.execute("vacuum")
assert db.execute("pragma integrity_check").fetchone() == ("ok",)
print("rows", db.execute("select count(*) from t").fetchone()[0])
"""

C_PROGRAM = '#include <stdio.h>\nint main(void){printf("compiled\\n");return 0;}\n'


@pytest.fixture(scope="module")
def stack(root_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Path]]]:
    """The root, a layer that takes things away (whiteouts, an opaque directory), one that adds."""
    base = hostfs.make_tmpfs(tmp_path_factory.mktemp("debian"), "5g")
    bottom = base / "00-base"
    bottom.mkdir()
    subprocess.run(["tar", "-C", str(bottom), "--xattrs", "--xattrs-include=*", "-xf", str(root_tar)], check=True)
    middle = layers.Layer(base / "10-trim")
    for name in ("usr/share/doc", "usr/share/man", "usr/share/info", "etc/motd"):
        if (bottom / name).exists():
            for parent in Path(name).parents:
                if str(parent) != ".":
                    middle.dir(str(parent))
            middle.whiteout(name)
    middle.dir("var").dir("var/cache", opaque=True).dir("var/cache/apt/archives/partial", mode=0o700).dir(
        "var/cache/debconf"
    )
    top = layers.Layer(base / "20-site")
    top.file("etc/hostname", b"cowfs\n").dir("srv").file("usr/local/bin/hello", b"#!/bin/sh\necho hello\n", mode=0o755)
    top.file("srv/linked", b"one file\n").link("srv/linked", "srv/other-name")
    resolver = Path("/etc/resolv.conf")
    top.file("etc/resolv.conf", resolver.read_bytes() if resolver.exists() else b"")
    for layer in (middle, top):
        for path in ("etc", "usr", "usr/share", "usr/local", "usr/local/bin", "var", "srv"):
            if (layer.path / path).is_dir() and (bottom / path).is_dir():
                shutil.copystat(bottom / path, layer.path / path)
    yield base, [bottom, middle.path, top.path]
    mounts.umount_busy(str(base))


@contextmanager
def inhabited(root: Path) -> Iterator[None]:
    """With /proc mounted; the root's own /dev has what programs need."""
    namespace.mount("proc", str(root / "proc"), "proc")
    try:
        yield
    finally:
        mounts.umount_busy(str(root / "proc"))


def run(root: Path, script: str, *, network: bool = False) -> str:
    """Run a shell script inside; its output. Where only the network is missing, skip."""
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C.UTF-8",
        "HOME": "/root",
    }
    done = subprocess.run(
        ["chroot", str(root), "/bin/bash", "-euc", script], env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    if (
        network
        and done.returncode
        and any(word in output for word in ("Temporary failure", "Could not resolve", "Could not connect"))
    ):
        pytest.skip(f"no package mirror: {output.strip().splitlines()[-1]}")
    assert done.returncode == 0, f"{script}\n{output[-3000:]}"
    return output


APT = "apt-get -qq -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 -y"


def test_a_debian_root_lives_on_cowfs(stack: tuple[Path, list[Path]]) -> None:
    base, lowers = stack
    with mounts.mounted("kernel", lowers, base, size="3G") as m:
        root = m.path
        if not (root / "dev" / "null").exists():
            os.mknod(root / "dev" / "null", 0o20666, os.makedev(1, 3))
            os.mknod(root / "dev" / "urandom", 0o20666, os.makedev(1, 9))
        with inhabited(root):
            assert run(root, "hello; cat /etc/hostname; ls /usr/share/doc 2>&1 || true").startswith("hello\ncowfs\n")
            run(root, f"{APT} update", network=True)
            run(root, f"{APT} --no-install-recommends install {INSTALLED}", network=True)
            run(root, f"{APT} upgrade", network=True)
            assert "cap_net_raw" in run(root, "getcap /usr/bin/mtr-packet /bin/ping 2>/dev/null || true")
            run(root, f"cat >/tmp/x.c <<'E'\n{C_PROGRAM}E\ngcc -O2 -o /usr/local/bin/x /tmp/x.c")
            assert run(root, "x") == "compiled\n"
            run(root, "cd /srv && git init -q origin && cd origin && git config user.email a@b && git config user.name n"
                      " && for i in $(seq 50); do echo $i >f$i; done && git add . && git commit -qm one"
                      " && cd .. && git clone -q --no-local origin copy && cd copy && git fsck --strict && git gc -q && git status --porcelain")  # fmt: skip
            run(
                root,
                "python3 -m pip --version && python3 -m pip install -q --break-system-packages --no-index --help >/dev/null",
            )
            run(root, "mkdir -p /tmp/p/six2 && cd /tmp/p && printf 'from setuptools import setup\\nsetup(name=\"six2\", version=\"1\", packages=[\"six2\"])\\n' >setup.py"
                      " && echo 'value = 42' >six2/__init__.py && python3 -m pip install -q --break-system-packages --no-build-isolation --no-index . 2>/dev/null"
                      " && cd / && python3 -c 'import six2; assert six2.value == 42'")  # fmt: skip
            assert "rows" in run(root, f"python3 - <<'E'\n{SQLITE}E")
            run(
                root,
                f"{APT} remove mtr-tiny && {APT} purge iputils-ping && {APT} autoremove && {APT} clean && dpkg --audit",
            )
            run(
                root,
                "chown -R 5:5 /usr/share/perl5 2>/dev/null || chown -R 5:5 /usr/share; mv /usr/share/zoneinfo /usr/share/zones 2>/dev/null || true",
            )
            run(root, "echo changed >>/srv/linked; cmp /srv/linked /srv/other-name")
            run(root, f"{APT} --reinstall install libcap2-bin", network=True)
        ours = trees.snapshot(root)
        used = m.handle.usage()
        changes = sum(1 for _ in m.handle.diff())
        assert changes > 1000
        assert used.bytes > 50 << 20
    with mounts.overlay(lowers, base / "mnt", base / "upper", base / "work"):
        trees.assert_same(ours, trees.snapshot(base / "mnt"), names=("cowfs", "kernel"))
        with inhabited(base / "mnt"):
            run(base / "mnt", f"{APT} remove git && rm -rf /srv/copy /usr/share/zones && mv /srv/origin /srv/moved"
                              " && chmod -R g-w /usr/lib/python3 && mkdir -p /usr/share/doc && echo back >/usr/share/doc/x"
                              " && python3 -c \"import sqlite3; c = sqlite3.connect('/srv/load.db'); c.execute('delete from t where k % 2'); c.commit()\"")  # fmt: skip
        theirs = trees.snapshot(base / "mnt")
    with mounts.mounted("kernel", lowers, base, size="3G") as m:
        trees.assert_same(theirs, trees.snapshot(m.path), names=("kernel", "cowfs"))
        with inhabited(m.path):
            assert run(m.path, "sqlite3 /srv/load.db 'pragma integrity_check'") == "ok\n"
            run(m.path, "dpkg --audit && cd /srv/moved && true")
