"""`cowfs bench`: the benchmark suite, run on the user's own disk.

The suite is a package of its own (`cowfs_benchmarks`; in a source tree the folder `benchmarks` beside `cowfs`), and only
this verb loads it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import cowfs
from cowfs._typed import TYPE_CHECKING, Any
from cowfs.cli.common import Command
from cowfs.errors import Unsupported

if TYPE_CHECKING:
    import argparse


def _suite() -> Any:
    """The module that has the options and runs them.

    Raises:
        Unsupported: the suite is not installed.
    """
    beside = Path(cowfs.__file__).resolve().parents[1] / "benchmarks" / "lab" / "suite.py"
    name = "benchmarks.lab.suite" if beside.exists() else "cowfs_benchmarks.lab.suite"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise Unsupported(
            f"the benchmarks are not installed: {error}", remedy="pip install 'cowfs-storage[bench]'"
        ) from None


def _configure(parser: argparse.ArgumentParser) -> None:
    _suite().configure(parser)


def _run(args: argparse.Namespace) -> int:
    code: int = _suite().run_options(args, "cowfs bench")
    return code


COMMANDS = {
    "bench": Command(
        _configure,
        _run,
        "Measure cowfs against the kernel's overlayfs, fuse-overlayfs and unionfs-fuse, and its backends against each other, "
        "on the disk of --work. Needs root; peers that are not installed are left out.",
        (
            "cowfs bench --list",
            "cowfs bench",
            "cowfs bench warm_read first_write --work /mnt/disk/bench",
            "cowfs bench --profile full --out report/",
        ),
    ),
}
