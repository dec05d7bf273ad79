"""The squash: a snapshot is merged into its only child. :mod:`cowfs.store.restacking` has the order of its steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.errors import CowfsError, FailedPrecondition, Unsupported
from cowfs.index.database import Row
from cowfs.model import Info, Kind, Limit, Usage
from cowfs.mounting.switch_mark import MARK
from cowfs.store import layers
from cowfs.store.key_lock import turn
from cowfs.store.lookup import must_be_sound
from cowfs.store.names import new_id
from cowfs.store.reserve import names_full
from cowfs.store.restacking import marked, write_note
from cowfs.store.staging import discard, staged, unlink
from cowfs.sys import trees
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.index import scan
    from cowfs.index.directory import Pair, Pending
    from cowfs.store.context import Context
    from cowfs.store.reading import Reading
    from cowfs.store.recovery import Recovery
    from cowfs.store.restacking import Restacking
    from cowfs.store.scanning import Scanning

__all__ = ["Squashing"]

_LONG = 86400.0  # seconds that a server may take to take over a layer
_TRIES = 5


class Squashing:
    """Merging snapshots into their only children."""

    def __init__(
        self, context: Context, reading: Reading, scanning: Scanning, restacking: Restacking, recovery: Recovery
    ) -> None:
        self.context = context
        self._reading = reading
        self._scanning = scanning
        self._restacking = restacking
        self._recovery = recovery

    @names_full
    def squash(self, name: str, *, dry_run: bool = False) -> Info:
        """As :meth:`cowfs.Store.squash`."""
        if self.context.driver.capabilities.whole:
            raise Unsupported(
                f"the driver {self.context.driver.name} keeps whole trees: nothing to squash", remedy="cowfs rm"
            )
        if dry_run:
            row, child = self._pair(name)
            above = [child, *self._restacking.above(child)]
            with self._holding(
                [one for one in above if one.kind is not Kind.COMMITTED], self._restacking.served(above)
            ):
                return child.info()
        for _ in range(_TRIES):
            row, child = self._pair(name)
            above = self._restacking.above(child)
            with turn(self.context.root, *(one.name for one in (row, child, *above))):
                self._recovery.recover()
                if self._pair(name) != (row, child) or self._restacking.above(child) != above:
                    continue
                if child.kind is Kind.ACTIVE:
                    self._take_over(row, child)
                else:
                    self._merge(row, child, above)
                return self.context.index.get(child.name).info()
        raise FailedPrecondition(f"what is above {name!r} keeps changing", remedy="try again")

    def _pair(self, name: str) -> tuple[Row, Row]:
        """A snapshot that can be squashed, and its child."""
        row = self._reading.resolve(name)
        if row.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"{name!r} is not committed", remedy="commit it first")
        children = self.context.index.children(row.num)
        if len(children) != 1:
            what = f"has {len(children)} children" if children else "has no child"
            raise FailedPrecondition(
                f"{name!r} {what}: squash takes one with exactly one", remedy="cowfs tree shows them"
            )
        tags = self.context.index.tags_of(row.num)
        if tags:
            raise FailedPrecondition(
                f"{name!r} is tagged {', '.join(tag.name for tag in tags)}",
                remedy=f"cowfs rm {tags[0].name} drops the tag",
            )
        must_be_sound(row)
        child = self.context.index.get(children[0])
        if child.kind is Kind.VIEW:
            raise FailedPrecondition(
                f"the child of {name!r} is a view, {child.name!r}", remedy=f"cowfs rm {child.name}"
            )
        return row, child

    @contextlib.contextmanager
    def _holding(self, rows: Iterable[Row], served: dict[int, dict[str, Any]]) -> Iterator[None]:
        """Keep all users but cowfs's servers from these layers."""
        with contextlib.ExitStack() as held:
            for row in rows:
                server = served.get(row.num)
                if server is None:
                    held.enter_context(layers.hold(self.context.driver, self.context.index, row, "squash"))
                elif server.get("io") == "passthrough" or server.get("frontend") != "kernel":
                    how = (
                        "--io passthrough" if server.get("io") == "passthrough" else f"--frontend {server['frontend']}"
                    )
                    raise FailedPrecondition(
                        f"{row.name!r} is mounted with {how}, which cannot switch layers", remedy="unmount it first"
                    )
            yield

    def _merge(self, row: Row, child: Row, above: list[Row]) -> None:
        served = self._restacking.served(above)
        with contextlib.ExitStack() as held:
            held.enter_context(self._holding((row, child, *above), served))
            new = self._build(row, child, above, held)
            self._restacking.switch_mounts(served, {one.num: one for one in above})
            point("squash.switched")
            for id in (row.id, child.id):
                discard(self.context.driver, id)
            unlink(self._restacking.note(new))

    def _build(self, row: Row, child: Row, above: list[Row], held: contextlib.ExitStack) -> str:
        """Make the merged layer, and record it. Returns its id."""
        from cowfs.index import compare
        from cowfs.index.directory import Pending
        from cowfs.store.layer_merge import write_changes
        from cowfs.store.owners import carry

        parent = self.context.index.by_num(row.parent) if row.parent is not None else None
        base = [id for _, id in self.context.index.chain(row.parent)]
        with staged(self.context.driver, self.context.index, new_id()) as layer:
            self.context.driver.create(layer.staged, base, Limit())
            carry(self.context.driver, [child.id, row.id], layer.staged)
            pending = Pending(self.context.index)
            after = self._scanning.tree(child, pending)
            same = layers.SameData(self.context.driver, self.context.index)
            changes = compare.changes_with_links(pending, parent.root if parent else None, after, same)
            made = write_changes(self.context.driver, changes, base, [child.id, row.id, *base], layer.staged)
            self.context.driver.settle(layer.staged)
            point("squash.built")
            if self.context.driver.fsync:
                trees.sync_tree(self.context.driver.tree(layer.staged))
            pending = Pending(self.context.index)
            roots: dict[int, Pair] = {}
            usage: dict[int, Usage] = {}
            if parent is not None and parent.root is not None:
                roots[parent.num] = parent.root
            for one in (child, *above):
                if one.kind is not Kind.COMMITTED:
                    continue
                under = row.parent if one is child else one.parent
                root = roots.get(under) if under is not None else None
                names = made.names if one is child else {}
                scanned = self._scan_over(layer.staged if one is child else one.id, one, root, pending, names)
                pending.new.update(scanned.pending.new)
                roots[one.num], usage[one.num] = scanned.root, scanned.usage
            note = {"old": [row.id, child.id], "child": child.num}
            held.callback(os.close, write_note(self._restacking.note(layer.id), note))
            try:
                with self.context.index.write() as change:
                    self._look_again(row, child)
                    change.add_records(pending.new)
                    for one in (child, *above):
                        change.lower(one.num, roots[one.num] if one.kind is Kind.COMMITTED else None)
                    change.replace_layer(
                        child.num,
                        id=layer.id,
                        parent=row.parent,
                        usage=usage[child.num],
                        shares_limit=row.shares_limit and child.shares_limit,
                    )
                    bases = _bases(row, child, above, usage[child.num])
                    for num, kept in bases.items():
                        change.set_base(num, kept)
                    change.remove(row.num)
                    point("squash.recorded")
                    layer.publish()
                    point("squash.renamed")
            except BaseException:
                unlink(self._restacking.note(layer.id))
                raise
        point("squash.committed")
        return layer.id

    def _look_again(self, row: Row, child: Row) -> None:
        """Check, in the transaction, that nothing has changed since the begin."""
        now = self.context.index.by_num(row.num)
        if (
            self.context.index.children(row.num) != [child.name]
            or self.context.index.by_num(child.num).id != child.id
            or now.id != row.id
        ):
            raise FailedPrecondition(f"{row.name!r} got another child meanwhile", remedy="cowfs tree shows them")
        if self.context.index.tags_of(now.num):
            raise FailedPrecondition(f"{row.name!r} was tagged meanwhile", remedy="cowfs images shows the tags")

    def _scan_over(self, id: str, row: Row, base: Pair | None, records: Pending, names: dict[int, int]) -> scan.Scanned:
        from cowfs.index import scan

        known = layers.KeptDigests.load(self.context.driver, row.id)
        fd = os.open(self.context.driver.tree(id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return scan.scan_delta(
                fd, num=row.num, form=self.context.driver.form, base=base, records=records, known=known, names=names
            )
        finally:
            os.close(fd)

    def _take_over(self, row: Row, child: Row) -> None:
        server = self._restacking.served([child]).get(child.num)
        with self._holding((row, child), {} if server is None else {child.num: server}):
            note = self._restacking.note(row.id)
            lock = write_note(note, {"old": [row.id], "child": child.num, "row": row.num})
            mark = os.path.join(self.context.driver.directory(row.id), MARK)
            unlink(mark)  # of a squash that was undone
            try:
                moved = self._absorb(row, child, server, mark)
                point("squash.absorbed")
                self._restacking.finish_take_over(row, child, moved)
            except BaseException:
                if not os.path.exists(mark):
                    unlink(note)
                raise
            finally:
                os.close(lock)
            if self.context.index.find_id(row.id) is None:  # else it got a child or a tag meanwhile, and stays
                discard(self.context.driver, row.id)
            unlink(note)

    def _absorb(self, row: Row, child: Row, server: dict[str, Any] | None, mark: str) -> Usage:
        lowers = [self.context.driver.tree(id) for _, id in self.context.index.chain(row.num)]
        if server is None:
            return self._absorb_here(child, lowers)
        from cowfs.mounting import protocol

        held = None
        if child.shares_limit:
            usage = row.usage or Usage()
            held = {"bytes": usage.bytes, "inodes": usage.inodes}
        more = {
            "lowers": lowers,
            "num": row.parent,
            "index": self.context.index.path,
            "upper": self.context.driver.tree(child.id),
        }
        try:
            protocol.ask(
                server["socket"],
                "absorb",
                timeout=_LONG,
                mark=mark,
                held=held,
                empty=f"{self.context.root}/empty",
                **more,
            )
        except CowfsError:
            if not os.path.exists(mark):
                raise  # the server ended before it switched
        return marked(mark)

    def _absorb_here(self, child: Row, lowers: list[str]) -> Usage:
        from cowfs.row.view import View
        from cowfs.union import Options
        from cowfs.union.absorb import absorb

        driver = self.context.driver
        options = Options(form=driver.form.name, volatile=not driver.fsync, row=driver.capabilities.row or None)
        view = View(lowers, driver.tree(child.id), driver.work(child.id), options=options)
        try:
            moved = absorb(view)
        except OSError as error:
            raise CowfsError(f"{child.name!r} cannot take over what is beneath it: {error.strerror}") from None
        finally:
            view.close()
        if driver.fsync:
            trees.sync_tree(driver.tree(child.id))
        return moved


def _bases(row: Row, child: Row, above: list[Row], merged: Usage) -> dict[int, Usage]:
    """The bases of the merged child and all above it, by number, so that each counts its own use."""
    held, own = row.usage or Usage(), child.usage or Usage()
    if not child.shares_limit:  # the child's count stays the same
        return {
            child.num: Usage(
                bytes=child.base.bytes + merged.bytes - own.bytes, inodes=child.base.inodes + merged.inodes - own.inodes
            )
        }
    bases = {child.num: row.base}
    freed = Usage(bytes=held.bytes + own.bytes - merged.bytes, inodes=held.inodes + own.inodes - merged.inodes)
    before = {child.num: child}
    for one in above:  # parents before children
        under = before.get(one.parent) if one.parent is not None else None
        if under is not None and one.shares_limit:
            before[one.num] = one
            bases[one.num] = Usage(bytes=one.base.bytes + freed.bytes, inodes=one.base.inodes + freed.inodes)
    return bases
