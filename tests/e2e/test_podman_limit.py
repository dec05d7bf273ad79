"""The limit of one container under Debian's podman, by annotation: as root and as an ordinary user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hostfs, mounts, podman
from support.podman import Engine

pytestmark = pytest.mark.slow

PLAIN = ("--network", "none")
FILL = "dd if=/dev/zero of=/fill bs=4096 count=2000 2>&1 | grep -o 'No space left.*'; stat -c %s /fill"
"""8 MB into whatever room there is; how much went in."""


@pytest.fixture(scope="module")
def base(public_directory: Path, ordinary_user: int) -> Iterator[Path]:
    podman.skip_unless_possible()
    base = hostfs.make_tmpfs(public_directory, "2g", "podlim")
    base.chmod(0o755)
    (base / "root.tar").write_bytes(podman.root_tar())
    podman.add_user(base)
    yield base
    mounts.umount_busy("/etc")
    mounts.umount_busy(str(base))


@pytest.fixture(
    scope="module",
    params=[(0, True), (0, False), (podman.UID, True), (podman.UID, False)],
    ids=["root", "root-alone", "user", "user-alone"],
)
def engine(base: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """podman of root and of a user, with a mount service and without; an image, and the hook."""
    uid, with_service = request.param
    host = podman.make_host(base, uid)
    if with_service:
        host.serve()
    host.hook()
    engine = Engine(host, f"lim{with_service:d}", host.program())
    engine("import", "-q", str(base / "root.tar"), "base")
    yield engine
    engine.close()
    host.end_services()


def written(told: str) -> int:
    """Bytes that went in, after the complaint that no more did."""
    complaint, size = told.strip().splitlines()
    assert complaint == "No space left on device"
    return int(size)


def test_a_container_has_the_limit_of_its_annotation_and_others_have_none(engine: Engine) -> None:
    size = written(engine("run", "--rm", *PLAIN, "--annotation", "cowfs.size=1M", "base", "sh", "-c", FILL))
    assert 900_000 < size <= 1 << 20
    assert engine("run", "--rm", *PLAIN, "base", "sh", "-c", FILL) == "8192000\n"


def test_df_inside_shows_it(engine: Engine) -> None:
    told = engine("run", "--rm", *PLAIN, "--annotation", "cowfs.size=3M", "base", "df", "-k", "/").splitlines()[-1]
    assert told.split()[1] == "3072"


def test_inodes(engine: Engine) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do echo >/srv/f$i || break; done 2>&1 | grep -o 'No space.*'"
    assert (
        engine("run", "--rm", *PLAIN, "--annotation", "cowfs.inodes=15", "base", "sh", "-c", script)
        == "No space left on device\n"
    )


def test_it_holds_after_stop_and_start_and_for_cp_to_a_container_that_is_stopped(engine: Engine, base: Path) -> None:
    engine("run", "--name", "kept", *PLAIN, "--annotation", "cowfs.size=1M", "base", "sh", "-c", FILL)
    engine("start", "kept")
    engine("wait", "kept")
    assert written(engine("logs", "kept").split("\n", 2)[2]) <= 1 << 20
    out = engine.host.directory(f"cp-{engine.name}-{engine.host.uid}")
    (out / "big").write_bytes(bytes(2 << 20))
    told = engine.host.run("podman", *engine.options, "cp", f"{out}/big", "kept:/big", code=None)
    assert told.returncode != 0
    assert "no space left" in told.stderr
    engine("rm", "kept")


def test_a_limit_changed_while_it_runs_is_kept_too(engine: Engine) -> None:
    """`cowfs limit` on the mount point that podman tells."""
    engine("run", "-d", "--name", "live", *PLAIN, "--annotation", "cowfs.size=1M", "base", "sleep", "1000")
    merged = engine("inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", "live").strip()
    python = engine.host.python()[0]
    engine.unshare(python, "-m", "cowfs", "limit", merged, "--size", "2M")
    assert 1 << 20 < written(engine("exec", "live", "sh", "-c", FILL)) <= 2 << 20
    engine("kill", "live")
    engine("wait", "live")
    engine("rm", "live")


def test_a_limit_that_cannot_be_understood_keeps_the_container_from_starting(engine: Engine) -> None:
    words = ["podman", *engine.options, "run", "--rm", *PLAIN, "--annotation", "cowfs.size=many", "base", "true"]
    done = engine.host.run(*words, code=None)
    assert done.returncode not in (0, 127)
    assert "cowfs.size=many" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_annotation_beats_the_default_of_the_store(engine: Engine) -> None:
    more = ["--storage-opt", "overlay.mountopt=size=4M"]
    words = ["podman", *engine.options, *more, "run", "--rm", *PLAIN]
    assert 3 << 20 < written(engine.host.run(*words, "base", "sh", "-c", FILL).stdout) <= 4 << 20
    assert written(engine.host.run(*words, "--annotation", "cowfs.size=1M", "base", "sh", "-c", FILL).stdout) <= 1 << 20


def test_commit_of_a_limited_container_has_all_that_it_wrote(engine: Engine) -> None:
    engine("run", "--name", "full", *PLAIN, "--annotation", "cowfs.size=1M", "base", "sh", "-c", "echo mine >/mine")
    engine("commit", "-q", "full", "kept-image")
    assert engine("run", "--rm", *PLAIN, "kept-image", "cat", "/mine") == "mine\n"
    assert engine("run", "--rm", *PLAIN, "kept-image", "sh", "-c", FILL) == "8192000\n", (
        "the limit is the container's, not the image's"
    )
    engine("rm", "full")


def test_a_container_that_is_over_a_store_without_cowfs_is_not_started_without_its_limit(base: Path) -> None:
    host = podman.make_host(base, 0)
    host.hook()
    engine = Engine(host, "none", "/usr/bin/fuse-overlayfs")
    try:
        engine("import", "-q", str(base / "root.tar"), "base")
        words = ["podman", *engine.options, "run", "--rm", *PLAIN, "--annotation", "cowfs.size=1M", "base", "true"]
        done = engine.host.run(*words, code=None)
        assert done.returncode != 0
        assert "no mount of cowfs" in done.stderr
    finally:
        engine.close()
