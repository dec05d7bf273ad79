"""Snapshots over a pipe to another store (:mod:`cowfs.store.stream` has the format).

Rules.

1. Every layer is known by its chain id, as in an image: a receiver does not take an existing layer again, from any sender.
2. Every layer is checked against its diff id before it is committed, whichever way it travelled. So a sender cannot
place a tree under another one's digest. 3. A layer that is whole is committed at once: a transfer that was cut goes on
with the first that is missing. 4. A layer of a ``row`` store that no archive made travels as the blocks that changed,
all others as archives.
"""

from __future__ import annotations

import os

from cowfs import archive, images
from cowfs._record import record
from cowfs._typed import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast
from cowfs.errors import AlreadyExists, Corrupt, FailedPrecondition, InvalidArgument
from cowfs.model import Kind
from cowfs.store.archived import present
from cowfs.store.names import check_labels, check_name, new_id
from cowfs.store.stream import LayerIn, LayerOut, StreamIn, StreamOut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cowfs.index.database import Row
    from cowfs.store.applying import Applying, Progress
    from cowfs.store.archived import Archived
    from cowfs.store.blocks import Blocks
    from cowfs.store.committing import Committing
    from cowfs.store.context import Context
    from cowfs.store.exporting import Exporting
    from cowfs.store.limits import Limits
    from cowfs.store.naming import Naming
    from cowfs.store.reading import Reading
    from cowfs.store.snapshots import Snapshots

__all__ = ["Receiving", "Sending", "Sent"]

MAX_LAYERS = 10_000


@record(frozen=True, slots=True, kw_only=True)
class Sent:
    """The outcome of :meth:`cowfs.Store.send`.

    Attributes:
        layers: names, here, of the layers that were sent, bottom first.
        copied: names, there, of those that were new to it; None without answers.
    """

    layers: tuple[str, ...]
    copied: tuple[str, ...] | None


class Sending:
    """Snapshots on their way out."""

    def __init__(
        self,
        context: Context,
        reading: Reading,
        archived: Archived,
        naming: Naming,
        exporting: Exporting,
        blocks: Blocks,
    ) -> None:
        self.context = context
        self._reading = reading
        self._archived = archived
        self._naming = naming
        self._exporting = exporting
        self._blocks = blocks

    def send(
        self,
        names: Sequence[str],
        pipe: BinaryIO,
        *,
        since: str | None = None,
        answers: BinaryIO | None = None,
        progress: Progress | None = None,
    ) -> Sent:
        """As :meth:`cowfs.Store.send`."""
        rows = [self._reading.resolve(name) for name in names]
        for name, row in zip(names, rows, strict=True):
            if row.kind is not Kind.COMMITTED:
                raise InvalidArgument(f"{name!r} is not committed", remedy="commit it, or use snapshot")
        left_out = self._below(rows, since)
        out = StreamOut(pipe)
        told: StreamIn | None = None
        sent: list[str] = []
        for name, row in zip(names, rows, strict=True):
            chain = [self.context.index.by_num(num) for num, _ in reversed(self.context.index.chain(row.num))]
            diff_ids = self._exporting.diff_ids(row)
            below = chain_ids(diff_ids)
            out.document(b"N", self._described(name, row, chain, diff_ids))
            first = left_out
            if answers is not None:
                told = told or StreamIn(answers)
                first = _count(told.document(told.next(b"H")[1]), len(chain))
            for at, each in enumerate(chain[first:], first):
                self._layer(out, each, at, below[at], progress)
                sent.append(each.name)
            out.frame(b"C")
        out.end()
        copied: tuple[str, ...] | None = None
        if told is not None:
            listed = told.document(told.next(b"R")[1]).get("copied")
            copied = tuple(map(str, listed)) if isinstance(listed, list) else ()
        return Sent(layers=tuple(sent), copied=copied)

    def _below(self, rows: Sequence[Row], since: str | None) -> int:
        """The number of layers that the other side has, by its answer."""
        if since is None:
            return 0
        base = self._reading.resolve(since)
        for row in rows:
            if base.num not in [num for num, _ in self.context.index.chain(row.num)]:
                raise InvalidArgument(f"{since!r} is no ancestor of {row.name!r}", remedy="'cowfs log' lists them")
        return len(self.context.index.chain(base.num))

    def _described(self, name: str, row: Row, chain: Sequence[Row], diff_ids: Sequence[str]) -> dict[str, Any]:
        layers = [
            {"name": each.name, "diff_id": diff_id, "labels": dict(each.labels)}
            for each, diff_id in zip(chain, diff_ids, strict=True)
        ]
        return {"name": name, "layers": layers, "config": self._naming.config(name) if name != row.name else None}

    def _layer(self, out: StreamOut, row: Row, at: int, chain_id: str, progress: Progress | None) -> None:
        by_blocks = bool(self.context.driver.capabilities.row) and at > 0 and not self._archived.is_archived(row)
        size = row.usage.bytes if row.usage is not None else 0
        told_first = {"at": at, "form": "blocks" if by_blocks else "tar", "size": size}
        if row.parent is None:  # an archive leaves the usual root directory out
            with self.context.driver.open_tree(row.id) as fd:
                told_first["root mtime"] = os.fstat(fd).st_mtime_ns
        out.document(b"L", told_first)
        data = LayerOut(out)
        told = _Told(data, progress, row.name, size)
        if by_blocks:
            self._blocks.export_blocks(row.name, cast("BinaryIO", told), identity=_identity(chain_id))
        else:
            self._exporting.write_layer(row, cast("BinaryIO", told), "none", None)
        data.finish()


class _Told:
    """A file to write into that reports the bytes written."""

    def __init__(self, out: LayerOut, progress: Progress | None, name: str, size: int) -> None:
        self._out, self._progress, self._name, self._size = out, progress, name, size
        self._done = 0

    def write(self, data: bytes) -> int:
        self._out.write(data)
        self._done += len(data)
        if self._progress is not None:
            self._progress(self._name, self._done, max(self._size, self._done) if self._size else 0)
        return len(data)

    def flush(self) -> None:
        """Nothing to flush."""


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain ids beneath each layer, "" for none, and of the whole (OCI image-spec, config.md, "Layer ChainID")."""
    found = [""]
    for diff_id in diff_ids:
        found.append(images.digest_of(f"{found[-1]} {diff_id}".encode()) if found[-1] else diff_id)
    return found


def _identity(chain_id: str) -> bytes:
    """Tell a receiver of blocks the tree that they were made against."""
    return bytes.fromhex(chain_id.removeprefix("sha256:"))


def _count(told: dict[str, Any], most: int) -> int:
    have = told.get("have")
    if not isinstance(have, int) or isinstance(have, bool) or not 0 <= have <= most:
        raise Corrupt(f"the other side says that it has {str(have)[:40]} of {most} layers")
    return have


# -- receiving ---------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """The services that bring in a layer."""

    context: Context
    reading: Reading
    naming: Naming
    snapshots: Snapshots
    committing: Committing
    limits: Limits
    applying: Applying
    exporting: Exporting
    blocks: Blocks


class Receiving:
    """Snapshots on their way in."""

    def __init__(
        self,
        context: Context,
        reading: Reading,
        naming: Naming,
        snapshots: Snapshots,
        committing: Committing,
        limits: Limits,
        applying: Applying,
        exporting: Exporting,
        blocks: Blocks,
    ) -> None:
        self.context = context
        self._parts = _Parts(context, reading, naming, snapshots, committing, limits, applying, exporting, blocks)

    def receive(
        self,
        pipe: BinaryIO,
        *,
        answers: BinaryIO | None = None,
        options: archive.ApplyOptions | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """As :meth:`cowfs.Store.receive`."""
        self.context.index.meta("uuid")  # a closed store refuses before anything is read
        stream = StreamIn(pipe)
        out = StreamOut(answers) if answers is not None else None
        copied: list[str] = []
        while True:
            kind, payload = stream.next(b"NZ")
            if kind == b"Z":
                break
            _Snapshot(self._parts, stream, payload, options or archive.ApplyOptions(), progress).take(out, copied)
        if out is not None:
            out.document(b"R", {"copied": copied})
        return copied


class _Snapshot:
    """One snapshot on its way in.

    Args:
        payload: of the frame ``N``.
    """

    def __init__(
        self,
        parts: _Parts,
        stream: StreamIn,
        payload: bytes,
        options: archive.ApplyOptions,
        progress: Progress | None,
    ) -> None:
        self._parts = parts
        self._stream = stream
        self._options = options
        self._progress = progress
        told = stream.document(payload)
        self._name = check_name(cast("str", told.get("name")))
        self._config = _checked_config(told.get("config"))
        layers = told.get("layers")
        if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
            raise Corrupt("the stream of snapshots holds a snapshot without layers, or with too many")
        self._layers = [_Layer(each) for each in layers]
        ids = chain_ids([layer.diff_id for layer in self._layers])
        for layer, below, chain_id in zip(self._layers, ids, ids[1:], strict=False):
            layer.below, layer.chain_id = below, chain_id

    def take(self, out: StreamOut | None, copied: list[str]) -> None:
        """Read the snapshot to its end."""
        have: list[Row] = []
        for layer in self._layers:
            row = self._present(layer, have[-1] if have else None)
            if row is None:
                break
            have.append(row)
        if out is not None:
            out.document(b"H", {"have": len(have)})
        at: int | None = None
        while True:
            kind, payload = self._stream.next(b"LC")
            if kind == b"C":
                break
            told = self._stream.document(payload)
            at = self._place(told, at)
            if at < len(have):
                LayerIn(self._stream).finish()  # it exists here already
                continue
            if at > len(have):
                raise FailedPrecondition(
                    f"{self._name!r} stands on {self._layers[at - 1].chain_id}, which this store lacks",
                    remedy="send it without --since",
                )
            have.append(self._layer(told, self._layers[at], have[-1] if have else None, copied))
        if len(have) != len(self._layers):
            raise FailedPrecondition(
                f"{self._name!r} stands on {self._layers[len(have)].chain_id}, which this store lacks",
                remedy="send it without --since",
            )
        self._call_it(have[-1])

    def _present(self, layer: _Layer, parent: Row | None) -> Row | None:
        return present(self._parts.context, parent, layer.chain_id, layer.diff_id, self._options.owners)

    def _place(self, told: dict[str, Any], before: int | None) -> int:
        at = told.get("at")
        if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(self._layers):
            raise Corrupt("the stream of snapshots holds a layer that it does not list")
        if before is not None and at != before + 1:
            raise Corrupt("the stream of snapshots holds layers out of their order")
        return at

    def _layer(self, told: dict[str, Any], layer: _Layer, parent: Row | None, copied: list[str]) -> Row:
        parts, name = self._parts, self._free_name(layer)
        form, size = told.get("form"), told.get("size")
        if form not in ("tar", "blocks") or (form == "blocks" and parent is None):
            raise Corrupt(f"the stream of snapshots holds a layer of the form {str(form)[:40]!r}")
        key = f"receive-{new_id()}"
        most = (self._options.max_bytes, self._options.max_entries) if form == "blocks" else (None, None)
        parts.snapshots.prepare(key, parent.name if parent is not None else None, size=most[0], inodes=most[1])
        try:
            data = LayerIn(self._stream)
            counted = _Counted(data, self._progress, layer.name, size if isinstance(size, int) and size > 0 else 0)
            if form == "tar":
                parts.applying.apply_with_time(
                    key,
                    cast("BinaryIO", counted),
                    _time(told.get("root mtime")) if parent is None else None,
                    options=self._options,
                    diff_id=layer.diff_id,
                )
            else:
                parts.blocks.apply_blocks(key, cast("BinaryIO", counted), identity=_identity(layer.below))
            data.finish()
            if form == "blocks":
                with open(os.devnull, "wb") as nowhere:
                    if parts.exporting.export(key, nowhere, format="layer") != layer.diff_id:
                        raise Corrupt(f"the layer {name!r} is not {layer.diff_id}, which the stream says it is")
                parts.limits.limit(key, size=None, inodes=None)  # of the options; an archive is held to them itself
            parts.committing.commit(key, name, labels=layer.labels)
        except BaseException as error:
            if parts.reading.exists(key):
                parts.snapshots.remove(key)
            row = self._present(layer, parent) if isinstance(error, AlreadyExists) else None
            if row is None:
                raise
            return row  # another process brought it meanwhile
        row = parts.context.index.get(name)
        if form == "blocks" and (parent is None or parent.chain_id is not None):
            with parts.context.index.write() as change:
                change.set_archive(row.num, layer.diff_id, layer.chain_id, form=archive.FORM)
        copied.append(name)
        return parts.context.index.get(name)

    def _free_name(self, layer: _Layer) -> str:
        """The sender's name for it, if that is free here and no digest; else its chain id."""
        index = self._parts.context.index
        if (
            not layer.name
            or layer.name.startswith("sha256:")
            or index.find(layer.name) is not None
            or index.tag(layer.name) is not None
        ):
            return layer.chain_id
        return layer.name

    def _call_it(self, top: Row) -> None:
        found = self._parts.context.index.find(self._name)
        if found is not None and found.num != top.num:
            raise InvalidArgument(
                f"{self._name!r} is another snapshot in {self._parts.context.root}",
                remedy=f"its tree is {top.name!r} here",
            )
        if found is None and not self._name.startswith("sha256:"):
            self._parts.naming.tag(self._name, top.name, config=self._config)


class _Layer:
    """One layer of a stream, checked."""

    def __init__(self, told: object) -> None:
        if not isinstance(told, dict):
            raise Corrupt("the stream of snapshots holds a damaged record")
        name = told.get("name")
        self.name = name if isinstance(name, str) and _can_be_made(name) else ""
        self.diff_id = images.check_digest(told.get("diff_id"), "diff id")
        self.below = self.chain_id = ""
        labels = told.get("labels")
        if not isinstance(labels, dict):
            raise Corrupt("the stream of snapshots holds a damaged record")
        check_labels(labels)
        if not all(isinstance(value, str) for value in labels.values()):
            raise Corrupt("the stream of snapshots holds a damaged record")
        self.labels: dict[str, str] = labels


def _time(told: object) -> int | None:
    """A time that a sender told, in nanoseconds; older ones tell none."""
    return told if isinstance(told, int) and not isinstance(told, bool) and 0 <= told < 1 << 63 else None


def _can_be_made(name: str) -> bool:
    """Whether a snapshot may have this name; engines give keys of any form."""
    try:
        check_name(name)
    except InvalidArgument:
        return False
    return True


def _checked_config(config: object) -> str | None:
    """An image's configuration: None, "" for a plain tree, or a JSON object."""
    if config is None:
        return None
    if isinstance(config, str):
        if not config:
            return config
        import json

        try:
            if isinstance(json.loads(config), dict):
                return config
        except (ValueError, RecursionError):
            pass
    raise Corrupt("the stream of snapshots holds a configuration that is no JSON object")


class _Counted:
    """A file to read from that reports the bytes read."""

    def __init__(self, data: LayerIn, progress: Progress | None, name: str, size: int) -> None:
        import io

        self._data, self._progress, self._name, self._size = io.BufferedReader(data, 1 << 20), progress, name, size
        self._done = 0

    def read(self, count: int = -1) -> bytes:
        data = self._data.read(count)
        self._done += len(data)
        if self._progress is not None:
            self._progress(self._name, self._done, max(self._size, self._done) if self._size else 0)
        return data
