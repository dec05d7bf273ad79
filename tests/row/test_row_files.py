"""Redirect files against a plain bytearray: whatever is done, in whatever order, through whatever chain."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cowfs.format.whiteout import choose_form
from cowfs.model import Limit, Usage
from cowfs.row import layer as row_layer, map as row_map, rewrite, writeback
from cowfs.row.file import RowFile
from cowfs.row.view import View
from cowfs.sys import files
from cowfs.union import Options, live
from cowfs.union.node import PLAIN, Node
from cowfs.union.quota import measure

KIB = 1024
KEEP, PUNCH, ZERO = files.FALLOC_FL_KEEP_SIZE, files.FALLOC_FL_PUNCH_HOLE, files.FALLOC_FL_ZERO_RANGE
MOST = 300 * KIB
_offsets = st.one_of(
    st.integers(0, MOST),
    st.integers(0, MOST // 4096).map(lambda block: block * 4096),
    st.integers(1, MOST // 4096).map(lambda block: block * 4096 - 1),
)
_lengths = st.one_of(st.integers(1, 5000), st.sampled_from([4096, 8192, 65536]), st.integers(1, 70 * KIB))


class Stack:
    """Layers in a directory, as the row driver lays them out, and a view of them."""

    def __init__(self, place: str, block: int, limit: int | None = None) -> None:
        self.place = place
        self.block = block
        self.limit = Limit(bytes=limit) if limit else None
        self.layers: list[str] = []
        self.view: View | None = None
        self.abandoned: list[View] = []
        self.twin: rewrite.Twin | None = None
        self.piece: rewrite.Piece | None = None

    def end_twin(self) -> None:
        if self.twin is not None:
            self.twin.end()
            self.twin = self.piece = None

    def add(self) -> str:
        path = f"{self.place}/{len(self.layers):03}"
        os.makedirs(f"{path}/fs")
        os.mkdir(f"{path}/work")
        self.layers.append(f"{path}/fs")
        return path

    def open(self) -> View:
        assert self.view is None
        lowers = list(reversed(self.layers[:-1]))
        options = Options(row=self.block, limit=self.limit)
        self.view = View(lowers, self.layers[-1], os.path.dirname(self.layers[-1]) + "/work", options=options)
        return self.view

    def close(self) -> None:
        self.end_twin()
        if self.view is not None:
            self.view.close()
            self.view = None

    def kill(self) -> None:
        """As after SIGKILL: nothing is flushed, marked or tidied."""
        assert self.view is not None
        self.abandoned.append(self.view)
        self.view = self.twin = self.piece = None

    def end(self) -> None:
        self.close()
        for view in self.abandoned:
            view.close()
        shutil.rmtree(self.place)


@pytest.fixture(autouse=True)
def _still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The background thread off, and a boot id that a test can change."""
    monkeypatch.setattr(writeback.Syncer, "_run", lambda self: None)
    monkeypatch.setattr(rewrite, "STEP", 32 * KIB)
    monkeypatch.setattr(row_map, "boot_id", lambda: b"boot%012d" % boot[0])


boot = [0]


class RedirectFile(RuleBasedStateMachine):
    """One file; layers come and go; the model is a bytearray."""

    where = "/tmp"

    @initialize(
        size=st.one_of(st.sampled_from([0, 1, 4096, 4097, 65536, 200_000]), st.integers(0, MOST)),
        block=st.sampled_from([4096, 4096, 8192, 65536]),
        holes=st.lists(st.tuples(_offsets, _lengths), max_size=2),
        limited=st.booleans(),
    )
    def start(self, size: int, block: int, holes: list[tuple[int, int]], limited: bool) -> None:
        place = tempfile.mkdtemp(prefix="row-", dir=self.where)
        self.stack = Stack(place, block, 1 << 30 if limited else None)
        base = self.stack.add()
        self.model = bytearray(bytes(range(1, 252)) * (size // 251 + 1))[:size]
        with open(f"{base}/fs/file", "wb") as file:
            file.write(self.model)
            file.flush()
            for offset, length in holes:
                files.fallocate(file.fileno(), PUNCH | KEEP, offset, length)
                end = min(offset + length, size)
                if offset < end:
                    self.model[offset:end] = bytes(end - offset)
        self.names = ["file"]
        self.stack.add()
        self.seed = 0
        self.versions: list[bytes] = []
        self.fresh()

    def fresh(self) -> None:
        """Everything so far is on the disk."""
        self.stack.open()
        self.versions = [bytes(self.model)]

    @property
    def view(self) -> View:
        assert self.stack.view is not None
        return self.stack.view

    @property
    def node(self) -> Node:
        return self.view.lookup(self.view.root, self.names[0].encode())

    def changed(self) -> None:
        self.versions.append(bytes(self.model))

    # -- changes

    @rule(offset=_offsets, length=_lengths)
    def write(self, offset: int, length: int) -> None:
        self._write(offset, length)

    def _write(self, offset: int, length: int) -> None:
        self.seed += 1
        data = (b"%08d" % self.seed) * (length // 8 + 1)
        data = data[:length]
        done = 0
        while done < length:
            done += self.view.write(self.node, offset + done, memoryview(data)[done:])
        if len(self.model) < offset:
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + length] = data
        self.changed()

    @rule(length=_lengths)
    def append(self, length: int) -> None:
        self._write(len(self.model), length)

    @rule(size=st.one_of(_offsets, st.just(0)))
    def truncate(self, size: int) -> None:
        self.view.setattr(self.node, size=size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self.versions += {version[:size] for version in self.versions}  # the size may be on the disk before the data
        self.changed()

    @rule(
        mode=st.sampled_from([0, KEEP, PUNCH | KEEP, PUNCH | KEEP, ZERO, ZERO | KEEP]), offset=_offsets, length=_lengths
    )
    def fallocate(self, mode: int, offset: int, length: int) -> None:
        if self.where == "/dev/shm" and not mode & PUNCH and self.view.space is not None:
            return  # tmpfs does not tell where it has reserved room
        try:
            self.view.fallocate(self.node, mode, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # tmpfs cannot zero a range
                raise
            return
        end = offset + length
        if not mode & KEEP and end > len(self.model):
            self.model.extend(bytes(end - len(self.model)))
        if mode & (PUNCH | ZERO):
            stop = min(end, len(self.model))
            if offset < stop:
                self.model[offset:stop] = bytes(stop - offset)
        self.changed()

    @rule(source=_offsets, to=_offsets, length=_lengths)
    def copy_range(self, source: int, to: int, length: int) -> None:
        target = to
        if source < target + length and target < source + length:
            return
        wanted = bytes(self.model[source : source + length])
        done = 0
        while done < len(wanted):
            count = self.view.copy_range(self.node, source + done, self.node, target + done, len(wanted) - done)
            assert count > 0
            done += count
        if wanted:
            if len(self.model) < target:
                self.model.extend(bytes(target - len(self.model)))
            self.model[target : target + len(wanted)] = wanted
        self.changed()

    @rule()
    def chmod(self) -> None:
        mode = self.view.mode(self.node) & 0o777
        self.view.setattr(self.node, mode=mode ^ 0o100)
        assert self.view.mode(self.node) & 0o777 == mode ^ 0o100

    @rule()
    def rename(self) -> None:
        self.seed += 1
        new = f"name{self.seed}"
        self.view.rename(self.view.root, self.names[0].encode(), self.view.root, new.encode())
        self.names[0] = new

    @precondition(lambda self: len(self.names) < 3)
    @rule()
    def link(self) -> None:
        self.seed += 1
        new = f"link{self.seed}"
        self.view.link(self.node, self.view.root, new.encode())
        self.names.append(new)

    @precondition(lambda self: len(self.names) > 1)
    @rule()
    def unlink(self) -> None:
        self.view.unlink(self.view.root, self.names.pop(0).encode())

    @rule(most=st.integers(1, 100_000))
    def fill(self, most: int) -> None:
        data = self.node.data
        if isinstance(data, RowFile) and data.writable:
            data.fill(most)
            self.changed()

    @precondition(lambda self: self.stack.twin is None)
    @rule()
    def begin_twin(self) -> None:
        data = self.node.data
        if isinstance(data, RowFile) and data.writable:
            self.stack.twin = rewrite.Twin(data)

    @precondition(lambda self: self.stack.twin is not None)
    @rule(steps=st.integers(1, 8))
    def go_on_with_twin(self, steps: int) -> None:
        """A copy may have changed since its place was read."""
        stack, twin = self.stack, self.stack.twin
        assert twin is not None
        for _ in range(steps):
            if stack.piece is not None:
                try:
                    stack.piece.copy()
                except OSError as error:
                    assert error.errno == errno.EIO  # cut off meanwhile
                    stack.end_twin()
                    return
            stack.piece = twin.next()
            if stack.piece is None:
                break

    @precondition(lambda self: self.stack.twin is not None and self.stack.piece is None)
    @rule(late=st.booleans())
    def finish_twin(self, late: bool) -> None:
        stack, twin = self.stack, self.stack.twin
        assert twin is not None
        while (piece := twin.next()) is not None:
            piece.copy()
        twin.sync()
        if late and self.model:
            self._write(len(self.model) // 2, 10)
        if twin.finish():
            assert not late or not self.model
            stack.end_twin()
            assert self.node.data is PLAIN
        elif twin.dead:
            stack.end_twin()

    # -- the mount's life

    @rule()
    def fsync(self) -> None:
        data = self.node.data
        if isinstance(data, RowFile):
            data.sync_job()(True)
            self.versions = [bytes(self.model)]

    @rule()
    def reopen(self) -> None:
        self.stack.close()
        self.fresh()

    def _kill(self, torn: bytes) -> None:
        self.stack.kill()
        map_dir = os.path.dirname(self.stack.layers[-1]) + "/map"
        for name in os.listdir(map_dir) if os.path.isdir(map_dir) else ():
            with open(f"{map_dir}/{name}", "ab") as file:
                file.write(torn)

    @rule(torn=st.binary(max_size=20))
    def killed(self, torn: bytes) -> None:
        """SIGKILL: what was written is there. The end of the map may be torn."""
        self._kill(torn)
        for layer in self.stack.layers[:-1]:  # as a store does with a snapshot that the server did not finish
            row_layer.seal(layer, form=choose_form())
        self.stack.open()

    @rule(torn=st.binary(max_size=20))
    def power_cut(self, torn: bytes) -> None:
        """The host went down: each block is as it was after the last fsync, or newer, whatever the map had reached."""
        self._kill(torn)
        boot[0] += 1
        self.stack.open()
        found = read(self.view, self.node)
        assert len(found) == len(self.model)
        for at in range(0, len(found), 4096):
            block = found[at : at + 4096]
            assert any(
                version[at : at + 4096].ljust(len(block), b"\0")[: len(block)] == block for version in self.versions
            )
        self.model[:] = found
        self.changed()

    @rule()
    def freeze(self) -> None:
        if len(self.stack.layers) < 9:
            self.stack.close()
            self.stack.add()
            self.fresh()

    @rule(sealed=st.booleans())
    def live_freeze(self, sealed: bool) -> None:
        if len(self.stack.layers) < 9:
            path = self.stack.add()
            live.freeze(self.view, f"{path}/fs", f"{path}/work")
            if sealed:
                for layer in self.stack.layers[:-1]:
                    row_layer.seal(layer, form=self.view.form)
                self.versions = [bytes(self.model)]

    @precondition(lambda self: self.stack.twin is None)  # who compacts holds it
    @rule()
    def forget(self) -> None:
        """The kernel lets go of the node."""
        self.view.drop(self.node)

    # -- what must hold

    @invariant()
    def same_bytes(self) -> None:
        if not hasattr(self, "stack"):
            return
        for name in self.names:
            node = self.view.lookup(self.view.root, name.encode())
            assert self.view.size(node) == len(self.model)
            assert read(self.view, node) == bytes(self.model)
            if isinstance(node.data, RowFile):  # what a worker thread reads
                found = memoryview(bytearray(len(self.model)))
                assert node.data.reader(0, len(found))(found) == len(found)
                assert found == self.model

    @invariant()
    def seek_is_honest(self) -> None:
        if not hasattr(self, "stack") or not self.model:
            return
        at, size = 0, len(self.model)
        while at < size:
            try:
                data = self.view.lseek(self.node, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = size
            assert not any(self.model[at:data])
            if data == size:
                break
            at = self.view.lseek(self.node, data, os.SEEK_HOLE)
            assert data < at <= size

    @invariant()
    def count_is_right(self) -> None:
        if hasattr(self, "stack") and self.view.space is not None and not self.view.stack.retired:
            assert self.view.upper is not None
            held = measure(self.view.upper, self.view.form)
            if self.stack.twin is not None:
                held = Usage(bytes=held.bytes + self.stack.twin._blocks.total * 4096, inodes=held.inodes)
            assert self.view.usage() == held

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.end()


def read(view: View, node: Node, step: int = 64 * KIB) -> bytes:
    size = view.size(node)
    out = bytearray(size)
    at = 0
    while at < size:
        got = view.pread(node, at, memoryview(out)[at : at + step])
        assert got == min(step, size - at)
        at += got
    assert view.pread(node, size, memoryview(bytearray(10))) == 0
    return bytes(out)


def _profile(request: pytest.FixtureRequest, share: int) -> settings:
    steps = max(200, request.config.getoption("--steps") // share)
    return settings(
        max_examples=max(5, steps // 40), stateful_step_count=40, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip


@pytest.mark.parametrize("host", ["/tmp", "/dev/shm"])
def test_equals_a_bytearray(host: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through writes, cuts, holes, links, kills, power cuts and new layers, a file reads as the model says."""
    monkeypatch.setattr(RedirectFile, "where", host)
    run_state_machine_as_test(RedirectFile, settings=_profile(request, 4))
