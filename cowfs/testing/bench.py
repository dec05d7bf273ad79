"""The common part of both halves of the conformance suite: a store, its mounts, and a small tree with one object of each type."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cowfs.errors import Unsupported
from cowfs.store import Store
from cowfs.sys import host

__all__ = ["MIB", "Bench"]

MIB = 1 << 20


class Bench:
    """A store of one driver in a fresh place.

    Attributes:
        driver: its name.
        options: given to ``Store.open``.
        writes_by: ``records``: by the kernel where no limit is asked for; ``fuse``: always by cowfs's own server.
            As an ordinary user it is always ``fuse``.
    """

    driver: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    writes_by: ClassVar[str] = "records"
    chain_length: ClassVar[int] = 128

    # -- fixtures and helpers

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path | Iterator[Path]:
        """The directory of stores and mount points."""
        return tmp_path

    @pytest.fixture
    def store(self, place: Path) -> Iterator[Store]:
        with Store.open(place / "store", driver=self.driver, fsync=False, **self.options) as store:
            yield store

    @contextmanager
    def at(self, store: Store, key: str, *, by: str | None = None) -> Iterator[Path]:
        """Mount an active snapshot or a view for the block.

        Args:
            store, key: the snapshot.
            by: ``records`` or ``fuse``, as :attr:`writes_by`, which is the default.

        Yields:
            The mount point.
        """
        target = Path(store.root).parent / "mnt"
        target.mkdir(exist_ok=True)
        how = by or (self.writes_by if host.has_cap(host.CAP_SYS_ADMIN) else "fuse")
        kernel = how == "records" and not store.limit(key)
        if kernel:
            try:
                store.mounts(key, mount_type="kernel")
            except Unsupported as error:
                pytest.skip(str(error))
        with store.mount(key, target, mount_type="kernel" if kernel else None):
            yield target

    def layer(self, store: Store, name: str, parent: str | None, change: Callable[[Path], object], **more: Any) -> str:
        """Commit a snapshot that differs from its parent by the effect of ``change`` on the mounted tree.

        Args:
            store, name, parent: as for :meth:`cowfs.Store.prepare` and :meth:`cowfs.Store.commit`.
            change: called with the mount point.
            more: for :meth:`at`.

        Returns:
            ``name``.
        """
        store.prepare(f"make-{name}", parent)
        with self.at(store, f"make-{name}", **more) as tree:
            change(tree)
        store.commit(f"make-{name}", name)
        return name

    @contextmanager
    def seen(self, store: Store, name: str, *, by: str | None = None) -> Iterator[Path]:
        """Mount a view of the committed snapshot ``name`` of ``store`` for the block, as :meth:`at`; yields the mount point."""
        key = f"look-{time.monotonic_ns():x}"
        store.view(key, name)
        try:
            with self.at(store, key, by=by) as tree:
                yield tree
        finally:
            store.remove(key)

    def base(self, store: Store) -> str:
        """Commit a small tree with one object of each type to ``store``; returns its name."""

        def fill(tree: Path) -> None:
            (tree / "dir" / "sub").mkdir(parents=True)
            (tree / "dir" / "file").write_text("one\n")
            (tree / "dir" / "sub" / "deep").write_text("deep\n")
            (tree / "file").write_text("content\n")
            os.chmod(tree / "file", 0o640)
            os.symlink("file", tree / "link")
            os.link(tree / "dir" / "file", tree / "hard")
            os.mkfifo(tree / "fifo")
            if store.driver.capabilities.xattrs:
                os.setxattr(tree / "file", "user.note", b"kept")

        return self.layer(store, "base", None, fill)
