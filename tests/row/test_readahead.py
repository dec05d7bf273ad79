"""Reading ahead in a redirect file: what is asked for, and in which pieces it is read. (That it helps is a benchmark.)"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cowfs.row import chain, readahead
from cowfs.row.chain import Chain
from cowfs.row.extents import Extents
from cowfs.row.readahead import Hints, plan
from cowfs.row.redirects import Rows
from cowfs.row.view import View
from cowfs.union import Options
from cowfs.union.node import Node

STEP = 128 << 10
SIZE = 16 << 20
CHANGED = (1 << 20, 3 << 20, 12 << 20)


class Recorder:
    """In place of the thread: says what was asked for."""

    busy = False

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, int]]] = []

    def give(self, hints: Hints) -> None:
        for fd, _ in hints:
            os.close(fd)
        self.asked.append(sorted(piece for _, ranges in hints for piece in ranges))

    def close(self) -> None:
        pass


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Node, Recorder]]:
    """A redirect file of which nothing is in memory: each read that must not wait would have to."""
    for name in ("low", "upper", "work"):
        (tmp_path / name).mkdir()
    with (tmp_path / "low/big").open("wb") as file:
        file.truncate(SIZE)
    view = View([str(tmp_path / "low")], str(tmp_path / "upper"), str(tmp_path / "work"), options=Options(row=4096))
    node = view.lookup(view.root, b"big")
    for offset in CHANGED:
        view.write(node, offset, b"new")

    def read_run(self: Chain, owner: int, offset: int, buffer: memoryview, flags: int = 0) -> int:
        raise BlockingIOError

    monkeypatch.setattr(Chain, "_read_run", read_run)
    assert isinstance(view.rows, Rows)
    recorder = Recorder()
    view.rows.pilot.close()
    monkeypatch.setattr(view.rows, "pilot", recorder)
    yield node, recorder
    view.close()


def _try(node: Node, offset: int) -> None:
    with pytest.raises(BlockingIOError):
        node.data.pread(offset, memoryview(bytearray(STEP)), os.RWF_NOWAIT)


def test_a_wait_at_the_start_asks_for_the_file_beneath_as_a_whole_and_for_each_block_over_it(
    cold: tuple[Node, Recorder],
) -> None:
    node, recorder = cold
    for offset in range(0, SIZE, STEP):
        _try(node, offset)
    asked = sorted(piece for pieces in recorder.asked for piece in pieces)
    blocks = [(offset, offset + 4096) for offset in CHANGED]
    spans = [piece for piece in asked if piece not in blocks]
    assert [piece for piece in asked if piece in blocks] == blocks
    assert spans[0][0] == 0
    assert spans[-1][1] == SIZE
    assert all(end == start for (_, end), (start, _) in pairwise(spans))


def test_no_more_is_asked_for_than_the_most(cold: tuple[Node, Recorder]) -> None:
    node, recorder = cold
    for offset in range(0, SIZE, STEP):
        _try(node, offset)
        assert recorder.asked[-1][-1][1] <= offset + STEP + readahead.MOST


def test_reads_here_and_there_ask_for_nothing(cold: tuple[Node, Recorder]) -> None:
    node, recorder = cold
    for offset in (5 << 20, 1 << 20, 9 << 20, 2 << 20):
        _try(node, offset)
    assert recorder.asked == []


def test_who_jumps_is_followed_again_from_the_second_read_in_sequence(cold: tuple[Node, Recorder]) -> None:
    node, recorder = cold
    _try(node, 0)
    del recorder.asked[:]
    _try(node, 8 << 20)
    assert recorder.asked == []
    _try(node, (8 << 20) + STEP)
    assert recorder.asked[0][0][0] == (8 << 20) + STEP


@pytest.mark.parametrize("waits", [False, True])
def test_a_stream_read_in_other_threads_asks_ahead_once_one_of_them_waited(
    cold: tuple[Node, Recorder], monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    node, recorder = cold
    monkeypatch.setattr(chain, "_at_once", lambda fd, part, offset: 0 if waits else os.preadv(fd, [part], offset))
    buffer = memoryview(bytearray(STEP))
    for offset in (0, STEP):
        read = node.data.stream(offset, STEP)
        assert read is not None
        assert read(buffer) == STEP
    assert [pieces[0][0] for pieces in recorder.asked] == ([STEP] if waits else [])


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(-1, 3)), max_size=20),
    st.integers(0, 50), st.integers(1, 30),
)  # fmt: skip
def test_the_pieces_laid_over_each_other_are_the_segments(
    puts: list[tuple[int, int, int]], start: int, length: int
) -> None:
    extents = Extents()
    for first, count, owner in puts:
        extents.put(first, first + count, owner)
    runs = list(extents.runs(start, start + length))
    laid: dict[int, int] = {}
    for first, stop, owner in plan(runs):
        laid.update(dict.fromkeys(range(first, stop), owner))
    assert laid == {at: owner for first, stop, owner in runs for at in range(first, stop)}
