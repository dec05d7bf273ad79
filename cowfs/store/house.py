"""Keeping house: what could go, other names, and snapshots for another store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfs.errors import AlreadyExists, CowfsError, FailedPrecondition, InvalidArgument
from cowfs.index.database import Row
from cowfs.model import Kind
from cowfs.store import filters as filter_language, layers, staging
from cowfs.store.importing import ImageVerbs, present
from cowfs.store.key_lock import turn
from cowfs.store.live import LiveVerbs
from cowfs.store.names import check_key, check_name, new_id
from cowfs.store.reserve import names_full

if TYPE_CHECKING:
    from cowfs.store.applying import Progress

__all__ = ["OWNED", "RUN_KEY", "HouseVerbs", "Pruned"]

RUN_KEY = "run-"
"""How the keys begin that ``cowfs run`` and :meth:`cowfs.Store.run` make up."""

OWNED = ("cowfs.service.", "containerd.io/")
"""Labels that begin so: the snapshot belongs to the service or an engine, which removes it itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What :meth:`HouseVerbs.prune` removed, or would have.

    Attributes:
        names: snapshots, children before parents.
        bytes: of their layers, as far as it is recorded.
        kept: those in use by a mount or another verb that were left, with the reason.
    """

    names: tuple[str, ...]
    bytes: int
    kept: tuple[tuple[str, str], ...] = ()


class HouseVerbs(ImageVerbs, LiveVerbs):
    """prune, rename and copy."""

    def prune(
        self,
        filters: Iterable[str] = (),
        *,
        every: bool = False,
        older: float = 0,
        keep: int = 0,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove snapshots that nothing needs.

        By default: layers of images that have neither tag nor child (their names are digests), and what runs left
        (keys that begin with ``run-``). Never what is mounted or in use, and nothing that the service or a container engine has made.

        Args:
            filters: :mod:`cowfs.store.filters`: only snapshots that one of them matches.
            every: also committed snapshots with names of their own that have neither tag nor child, and all other keys and views.
            older: only what was made and changed at least that long ago, seconds.
            keep: leave the newest so many of what could go.
            dry_run: remove nothing.

        Raises:
            InvalidArgument: a filter cannot be read, or a number is negative.
        """
        if older < 0 or keep < 0:
            raise InvalidArgument("an age or count is not negative")
        wanted = filter_language.parse(filters)
        before = time.time_ns() - int(older * 1e9)
        rows = list(self.index.rows())
        tagged = {tag.target for tag in self.tags()}
        children: dict[int, int] = {}
        for row in rows:
            if row.parent is not None:
                children[row.parent] = children.get(row.parent, 0) + 1
        could = {
            row.num: row
            for row in rows
            if row.name not in tagged
            and (every or _is_left_over(row))
            and not any(label.startswith(OWNED) for label in row.labels)
            and max(row.created, row.updated) <= before
            and (wanted is None or wanted(row.info()))
        }
        tops = sorted(
            (row for row in could.values() if not children.get(row.num)), key=lambda row: (row.created, row.num)
        )
        names: list[str] = []
        kept: list[tuple[str, str]] = []
        size = 0
        for top in tops[: len(tops) - keep] if keep else tops:
            one: Row | None = top
            while one is not None and one.num in could and not children.get(one.num):
                why = self._removed_or_why_not(one, dry_run)
                if why:
                    kept.append((one.name, why))
                    break
                names.append(one.name)
                size += one.usage.bytes if one.usage is not None else 0
                if one.parent is not None:
                    children[one.parent] -= 1
                one = could.get(one.parent) if one.parent is not None else None
        return Pruned(names=tuple(names), bytes=size, kept=tuple(kept))

    def _removed_or_why_not(self, row: Row, dry_run: bool) -> str:
        try:
            if dry_run:
                self._must_be_free(row)
            else:
                self.remove(row.name)
        except CowfsError as error:
            return str(error)
        return ""

    def _must_be_free(self, row: Row) -> None:
        with layers.hold(self.driver, row, "remove", missing_ok=True, at_rest=False):
            pass

    def removable(self, name: str, *, chain: bool = False) -> list[str]:
        """List what :meth:`remove` with these arguments would remove; nothing is changed.

        Args:
            name: a key, a name or a tag.
            chain: also ancestors that nothing else needs.

        Raises:
            NotFound, FailedPrecondition: as :meth:`remove`.
        """
        row = self.index.find(name)
        gone: set[str] = set()
        if row is None:
            target = self.resolve(name)
            gone = {name}
            if not chain or self.index.children(target.num) or self._tags_but(target, gone):
                return []
            row = target
        found = [row.name]
        self._must_be_removable(row, gone)
        while chain and row.parent is not None:
            above = self.index.by_num(row.parent)
            if len(self.index.rows_on(above.num)) > 1 or self._tags_but(above, gone):
                break
            self._must_be_free(above)
            found.append(above.name)
            row = above
        return found

    def _tags_but(self, row: Row, gone: set[str]) -> list[str]:
        return [tag.name for tag in self.index.tags_of(row.num) if tag.name not in gone]

    def _must_be_removable(self, row: Row, gone: set[str]) -> None:
        children, tags = self.index.children(row.num), self._tags_but(row, gone)
        if children:
            raise FailedPrecondition(f"{row.name!r} has children: {', '.join(children)}", remedy="remove those first")
        if tags:
            raise FailedPrecondition(
                f"{row.name!r} is tagged {', '.join(tags)}", remedy=f"cowfs rm {tags[0]} drops the tag"
            )
        self._must_be_free(row)

    def garbage(self) -> tuple[list[str], int]:
        """Find what :meth:`gc` would delete now; nothing is changed.

        Returns:
            Paths relative to the store, and how many directory records.

        Raises:
            OSError: a directory of the store cannot be read.
        """
        from cowfs.store import kernel_image

        left = staging.leftovers(self.driver, self.index)
        orphans = [f"layers/{id}" for id in staging.orphans(self.driver, self.index)]
        images = kernel_image.unused(self.driver, self.index)
        return sorted({*left, *orphans, *images}), self.index.unreached()

    @names_full
    def rename(self, old: str, new: str) -> None:
        """Give a key, a name or a tag another one; what is based on it, and its tags, stay.

        Args:
            old: a key, a name or a tag.
            new: what it is to be called.

        Raises:
            NotFound: no such key, name or tag.
            AlreadyExists: the new one is taken.
            InvalidArgument: it cannot be one.
            FailedPrecondition: a key that is mounted or in use.
        """
        row = self.index.find(old)
        if row is None:
            self._rename_tag(old, new)
            return
        check_key(new)
        self._free(new)
        with turn(self.root, old, new):
            self.recover()
            if row.kind is Kind.COMMITTED:
                self._rename(row, new)
                return
            with layers.hold(self.driver, row, "rename", at_rest=False):
                self._rename(row, new)

    def _rename(self, row: Row, new: str) -> None:
        with self.index.write() as change:
            now = self.index.get(row.name)
            if now.num != row.num:
                raise FailedPrecondition(f"{row.name!r} was replaced meanwhile", remedy="try again")
            self._free(new)
            change.rename(row.num, new)

    def _rename_tag(self, old: str, new: str) -> None:
        check_name(new, "tag")
        self.resolve(old)
        with self.index.write() as change:
            tag = self.index.tag(old)
            if tag is None:
                self.index.get(old)  # there was one a moment ago
                return
            self._free(new, for_tag=True)
            if self.index.tag(new) is not None:
                raise AlreadyExists(f"the tag {new!r} exists", remedy=f"cowfs rm {new} drops it")
            change.set_tag(new, self.index.get(tag.target).num, tag.config)
            change.drop_tag(old)

    def copy_to(self, name: str, other: HouseVerbs, *, progress: Progress | None = None) -> list[str]:
        """Copy a committed snapshot with its ancestors to another store, layer by layer; layers that it has are not copied again.

        Names are kept where they are free there, else a layer is named by its chain id. A tag is a tag there, too, with its configuration.

        Args:
            name: a committed snapshot, or a tag.
            other: the other store; any driver.
            progress: told how far it is.

        Returns:
            Names, in the other store, of the layers that were copied, bottom first.

        Raises:
            NotFound: no such snapshot or tag.
            InvalidArgument: not committed, or a name that is another tree's there.
            CowfsError, OSError: of either store; layers that were copied whole stay.
        """
        row = self.resolve(name)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"{name!r} is not committed", remedy="commit it, or copy its parent")
        if os.path.realpath(self.root) == os.path.realpath(other.root):
            raise InvalidArgument("the other store is this one")
        chain = [self.index.by_num(num) for num, _ in reversed(self.index.chain(row.num))]
        copied: list[str] = []
        parent: Row | None = None
        chain_id: str | None = None
        for each, diff_id in zip(chain, self._diff_ids(row), strict=True):
            chain_id = diff_id if chain_id is None else _chained(chain_id, diff_id)
            there = present(other, parent, chain_id, diff_id, "fail")
            if there is not None:
                parent = there
                continue
            parent = self._copy_layer(each, other, parent, chain_id, diff_id, progress)
            copied.append(parent.name)
        assert parent is not None
        self._copy_name(name, row, other, parent)
        return copied

    def _copy_layer(
        self, row: Row, other: HouseVerbs, parent: Row | None, chain_id: str, diff_id: str, progress: Progress | None
    ) -> Row:
        name = row.name if other.index.find(row.name) is None and other.index.tag(row.name) is None else chain_id
        key = f"copy-{new_id()}"
        other.prepare(key, parent.name if parent is not None else None)
        try:
            self._pipe_layer(row, other, key, diff_id, progress)
            other.commit(key, name, labels=row.labels)
        except BaseException:
            if other.exists(key):
                other.remove(key)
            raise
        return other.index.get(name)

    def _pipe_layer(self, row: Row, other: HouseVerbs, key: str, diff_id: str, progress: Progress | None) -> None:
        """One layer's archive, written in a thread of its own, unpacked here."""
        reading, writing = os.pipe()
        failed: list[BaseException] = []

        def write() -> None:
            try:
                with open(writing, "wb") as out:
                    self._write_layer(row, out, "none", None)
            except BaseException as error:  # noqa: BLE001  told below, in the caller's thread
                failed.append(error)

        thread = threading.Thread(target=write, name="cowfs-copy", daemon=True)
        with open(reading, "rb") as stream:
            thread.start()
            try:
                other.apply(key, stream, diff_id=diff_id, progress=progress)
            except BaseException as error:
                stream.close()
                thread.join()
                if failed and not isinstance(failed[0], BrokenPipeError):
                    raise failed[0] from error
                raise
        thread.join()
        if failed:
            raise failed[0]

    def _copy_name(self, name: str, row: Row, other: HouseVerbs, top: Row) -> None:
        """Make what names the snapshot here name it there."""
        if name == top.name:
            return
        found = other.index.find(name)
        if found is not None:
            if found.num != top.num:
                raise InvalidArgument(
                    f"{name!r} is another snapshot in {other.root}", remedy=f"its tree is {top.name!r} there"
                )
            return
        other.tag(name, top.name, config=self.config(name) if name != row.name else None)


def _is_left_over(row: Row) -> bool:
    if row.kind is Kind.COMMITTED:
        return row.name.startswith("sha256:")
    return row.kind is Kind.ACTIVE and row.name.startswith(RUN_KEY)


def _chained(above: str, diff_id: str) -> str:
    """OCI image-spec, config.md, "Layer ChainID"."""
    from hashlib import sha256

    return f"sha256:{sha256(f'{above} {diff_id}'.encode()).hexdigest()}"
