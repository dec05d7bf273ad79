"""How one test of semantics runs against every implementation, on upper and on lower files.

A test takes ``d``, a directory of its own inside a mount. Marked ``@tree(build)``, it runs twice:
with ``build(d)`` done in a lower layer before anything was mounted (``lower``: the first change
is a copy-up), and done through the mount (``upper``). One mount serves a module; a server
that dies fails what comes after it, as it should.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import mounts
from support.sandboxes import runner

__all__ = ["runner"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "d" in metafunc.fixturenames:
        impls = metafunc.config.getoption("--impl").split(",")
        metafunc.parametrize("impl", impls, scope="module")
        has_tree = metafunc.definition.get_closest_marker("tree") is not None
        metafunc.parametrize("place", ["lower", "upper"] if has_tree else ["upper"])


def _slot(item: pytest.Item) -> str:
    return hashlib.blake2b(item.nodeid.encode(), digest_size=8).hexdigest()


@pytest.fixture(scope="module")
def semantics_mount(request: pytest.FixtureRequest, impl: str, scratch: Path) -> Iterator[mounts.Mounted]:
    """One mount for this module and implementation, its lower layer filled for every test of it."""
    base = scratch / f"{Path(str(request.path)).stem}-{impl}-{os.urandom(3).hex()}"
    base.mkdir()
    base.chmod(0o755)
    lower, below = base / "lower", base / "below"
    lower.mkdir()
    below.mkdir()
    for item in request.session.items:
        spec = getattr(item, "callspec", None)
        marker = item.get_closest_marker("tree")
        if spec is None or marker is None or item.path != request.path:
            continue
        if spec.params.get("impl") == impl and spec.params.get("place") == "lower":
            where = lower / _slot(item)
            where.mkdir()
            where.chmod(0o777)
            marker.args[0](where)
    with mounts.mounted(impl, [below, lower], base) as result:
        yield result


@pytest.fixture
def d(request: pytest.FixtureRequest, semantics_mount: mounts.Mounted, impl: str, place: str) -> Path:
    """This test's own directory in the mount."""
    only = request.node.get_closest_marker("only")
    if only is not None and impl not in (*only.args, "plain"):
        pytest.skip(only.kwargs["reason"])
    where = semantics_mount.path / _slot(request.node)
    marker = request.node.get_closest_marker("tree")
    if place == "upper":
        where.mkdir()
        where.chmod(0o777)
        if marker is not None:
            marker.args[0](where)
    return where


@pytest.fixture(scope="session")
def root_tar(request: pytest.FixtureRequest, can_mount: None) -> Path:
    """The tar of a minimal Debian root."""
    given = request.config.getoption("--debian-root")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cowfs-tests"
    made = cache / "bookworm.tar"
    if not made.exists():
        if shutil.which("mmdebstrap") is None:
            pytest.skip("mmdebstrap is not installed")
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}.tar")  # other workers may be at it, too
        done = subprocess.run(
            ["mmdebstrap", "--variant=apt", "--quiet", "bookworm", str(unfinished)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"mmdebstrap cannot build a root here: {done.stderr.strip().splitlines()[-1:]}")
        unfinished.rename(made)
    return made
