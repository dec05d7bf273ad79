"""The mount behaves as a plain directory does, whatever is done to it: the machine of :mod:`support.equality`, run over each form."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import mounts
from support.equality import Equality, UserRun, run_machine

pytestmark = pytest.mark.slow


@contextmanager
def forgetting(pause: float = 0.01) -> Iterator[None]:
    """A process makes the kernel drop its caches in a loop, so that nodes are forgotten all the time."""
    mounts.drop_caches(2)
    loop = f"while sleep {pause}; do echo 2 >/proc/sys/vm/drop_caches; done"
    process = subprocess.Popen(["sh", "-c", loop])
    try:
        yield
        assert process.poll() is None, "the loop ended early"
    finally:
        process.kill()
        process.wait()


def _machine(space: Path, **attributes: Any) -> type[Equality]:
    os.umask(0o022)
    return type("Machine", (Equality,), {"base": space, **attributes})


def test_the_mount_equals_a_plain_directory(space: Path, request: pytest.FixtureRequest) -> None:
    """Random layers and operations: results, errnos, trees and inode numbers are those of a plain directory."""
    run_machine(_machine(space), request.config.getoption("--steps"), request.config.getoption("--seed"))


def test_the_same_with_redirect_on_write(space: Path, request: pytest.FixtureRequest) -> None:
    """The same for a mount that redirects writes; afterwards it is mounted again and compared."""
    machine = _machine(space, impl="row")
    run_machine(machine, request.config.getoption("--steps") // 8, request.config.getoption("--seed") + 7)


def test_the_same_while_the_kernel_forgets(space: Path, request: pytest.FixtureRequest) -> None:
    """The same with the kernel's caches dropped in a loop."""
    with forgetting():
        run_machine(_machine(space), request.config.getoption("--steps") // 4, request.config.getoption("--seed") + 1)


def test_cowfs_reads_what_the_kernel_wrote(space: Path, request: pytest.FixtureRequest) -> None:
    """Random operations by the kernel's overlayfs; cowfs then shows the very same tree."""
    machine = _machine(space, impl="overlay", compared=False)
    run_machine(machine, request.config.getoption("--steps") // 4, request.config.getoption("--seed") + 2)


def test_the_same_for_an_ordinary_user(space: Path, ordinary_user: int, request: pytest.FixtureRequest) -> None:
    """A mount without any privilege: layers of the ``userxattr`` form, where the kernel has no redirects."""
    machine = _machine(space, kind=UserRun, form="user")
    run_machine(machine, request.config.getoption("--steps") // 10, request.config.getoption("--seed") + 3)


def test_what_is_copied_with_a_directory_shows_its_new_ctime_at_once(space: Path, ordinary_user: int) -> None:
    """Without redirects a rename copies what is in a directory of the lower layers; the kernel had its attributes already."""
    os.umask(0o022)
    run = UserRun(space / "run", "kernel", 88760, 20, "user")
    try:
        run.check()
        moved = "b/long-name-" + "x" * 30
        assert len(os.listdir(run.plain / moved)) == 2
        run.carry_out(("rename", moved, "b/b/e/a"), True)
        run.check()
        run.finish()
    finally:
        run.close()


def test_the_same_with_redirect_on_write_for_an_ordinary_user(
    space: Path, ordinary_user: int, request: pytest.FixtureRequest
) -> None:
    machine = _machine(space, kind=UserRun, form="user", impl="row")
    run_machine(machine, request.config.getoption("--steps") // 40, request.config.getoption("--seed") + 5)


def test_the_harness_agrees_with_itself(space: Path, request: pytest.FixtureRequest) -> None:
    """A plain copy against a plain copy: the comparison itself finds nothing where nothing is."""

    class Plain(Equality):
        base, impl = space, "plain"

        def teardown(self) -> None:
            if self.run is not None and not self.failed:
                self.run.check()
                self.run.close()

    run_machine(Plain, 500, request.config.getoption("--seed"))
