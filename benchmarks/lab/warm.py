"""Warm work, measured over mounts that all stand at once: every mount does the work once unmeasured, then A B C, A B
C.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from .measure import Lab, cache_drops
from .peers import UNIONFS, Stack, available, mounted
from .trees import Tree

TRIES = 6


def measure_warm(lab: Lab, tree: Tree, subjects: Sequence[str], work: Callable[[Path], float]) -> None:
    """Records ``work(mount point)`` in seconds for metric "read-only" and then "writable" (upper on a tmpfs)."""
    available(lab, subjects)
    for metric in ("read-only", "writable"):
        names = [name for name in lab.wanted(subjects) if name not in lab.result.skipped]
        if metric == "writable":
            names = [name for name in names if name != UNIONFS]  # the slowest by far, measured read-only
        with contextlib.ExitStack() as stack:
            at: dict[str, Path] = {}
            warmed: dict[str, int] = {}
            for name in names:
                with lab.trying(name):
                    upper = None
                    if metric == "writable":
                        upper = stack.enter_context(lab.fresh("tmpfs", 1 << 30))
                    layers = Stack(lowers=tree.layers, upper=upper and upper / "upper", work=upper and upper / "work")
                    at[name] = stack.enter_context(mounted(lab, name, layers)).path
                    warmed[name] = _warm(work, at[name])
            for _, name in lab.rounds([name for name in names if name in at]):
                with lab.trying(name):
                    for _ in range(TRIES):
                        if cache_drops() != warmed[name]:
                            warmed[name] = _warm(work, at[name])
                        took = work(at[name])
                        if cache_drops() == warmed[name]:
                            break
                    else:
                        lab.note(f"{name}, {metric}: somebody drops the kernel's caches all the time")
                    lab.record(metric, name, took)


def _warm(work: Callable[[Path], float], at: Path) -> int:
    """Does the work twice (the second pass fills what only a second opening fills); returns `cache_drops` before it."""
    drops = cache_drops()
    work(at)
    work(at)
    return drops
