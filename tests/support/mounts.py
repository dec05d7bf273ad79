"""The implementations under test behind one call.

``plain``    no union at all: the merged tree copied to a directory. The behaviour of POSIX on this host; a test of
semantics that fails here is a wrong test. ``overlay``  the kernel's overlayfs: the peer, and the judge of the on-disk
format. ``kernel``   cowfs, its own FUSE front end. ``fusepy``   cowfs, the front end over libfuse2.

All take layers **bottom first**, as ``cowfs.mount`` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from . import namespace

OVERLAY_OPTIONS = "redirect_dir=on,metacopy=on,index=off"
"""How the kernel is mounted to read what cowfs writes (semantics.md, Layers)."""


@dataclass(slots=True)
class Mounted:
    """A tree to test: ``path`` is where; ``upper`` what is written; ``handle`` cowfs's own, if any."""

    impl: str
    path: Path
    lowers: list[Path]
    upper: Path | None
    work: Path | None
    handle: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> Path:
        """The upper layer of a writable mount."""
        assert self.upper is not None
        return self.upper


def overlay_mount(
    lowers: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    upper: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    *,
    form: str = "trusted",
    options: str | None = None,
) -> None:
    """Mount the kernel's overlayfs; layers bottom first. Raises OSError."""
    bind = [os.fspath(lower) for lower in reversed(lowers)]
    if upper is None and len(bind) == 1:
        empty = Path(bind[0]).parent / ".empty-lower"
        empty.mkdir(exist_ok=True)
        bind.append(str(empty))
    parts = [
        "lowerdir=" + ":".join(path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for path in bind)
    ]
    if upper is not None:
        parts += [f"upperdir={os.fspath(upper)}", f"workdir={os.fspath(work or '')}"]
    if form == "user":
        parts.append("userxattr")
    else:
        parts.append(options if options is not None else OVERLAY_OPTIONS)
    namespace.mount("overlay", os.fspath(target), "overlay", 0, ",".join(parts))


@contextmanager
def overlay(
    lowers: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    upper: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    *,
    form: str = "trusted",
    options: str | None = None,
) -> Iterator[Path]:
    """The kernel's overlayfs for the length of a block."""
    overlay_mount(lowers, target, upper, work, form=form, options=options)
    try:
        yield Path(target)
    finally:
        umount_busy(os.fspath(target))


def umount_busy(target: str, seconds: float = 10.0) -> None:
    """Unmount, waiting for a file that is being closed elsewhere; detach in the end."""
    end = time.monotonic() + seconds
    while True:
        try:
            return namespace.umount(target)
        except OSError:
            if time.monotonic() > end:
                return namespace.umount(target, namespace.MNT_DETACH)
            time.sleep(0.02)


def copy_tree(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a tree with everything that ``trees`` compares (hard links, xattrs, ACLs, times, holes)."""
    subprocess.run(
        ["cp", "-a", "--sparse=auto", "--preserve=all", f"{os.fspath(source)}/.", os.fspath(target)], check=True
    )


def _cowfs() -> Any:
    return pytest.importorskip("cowfs", reason="cowfs.mount does not exist yet")


@contextmanager
def mounted(
    impl: str,
    lowers: Sequence[str | os.PathLike[str]],
    base: Path,
    *,
    upper: Path | None = None,
    work: Path | None = None,
    readonly: bool = False,
    form: str = "trusted",
    **options: Any,
) -> Iterator[Mounted]:
    """Mount ``lowers`` with ``impl`` at ``base/mnt``, upper and work in ``base`` unless given.

    ``options`` go to ``cowfs.mount`` (size, inodes, ...); other implementations ignore them.
    """
    target = base / "mnt"
    target.mkdir(exist_ok=True)
    if not readonly:
        upper = upper or base / "upper"
        work = work or base / "work"
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
    paths = [Path(lower) for lower in lowers]
    result = Mounted(impl, target, paths, upper, work)
    with ExitStack() as stack:
        if impl == "plain":
            target.mkdir(exist_ok=True)
            view = base / ".view"
            view.mkdir()
            with overlay(paths, view, form=form):
                copy_tree(view, target)
            stack.callback(shutil.rmtree, target, True)
        elif impl == "overlay":
            stack.enter_context(overlay(paths, target, upper, work, form=form))
        else:
            options.setdefault("upper", upper)
            if work is not None:
                options.setdefault("work", work)
            if readonly:
                options.update(upper=None, readonly=True)
                options.pop("work", None)
            if impl == "row":
                options.setdefault("row", 4096)
            frontend = "kernel" if impl == "row" else impl
            result.handle = stack.enter_context(
                _cowfs().mount([str(p) for p in paths], str(target), frontend=frontend, **options)
            )
        yield result


def processes_of(target: str | os.PathLike[str]) -> list[int]:
    """Ids of processes whose command line names ``target``."""
    wanted = os.fsencode(os.fspath(target))
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if wanted in file.read():
                    found.append(int(name))
        except OSError:
            continue
    return found


def drop_caches(what: int = 2) -> None:
    """Make the kernel forget (1 pages, 2 entries and inodes, 3 both); skips where not allowed."""
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write(str(what))
    except OSError as error:
        pytest.skip(f"cannot drop kernel caches: {error}")
