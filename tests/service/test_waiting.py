"""The file in which events wait for room: each is recorded once, in its order, whatever a kill or a failure of power left there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.service.telling import Teller
from cowfs.service.waiting import SIZE, Waiting
from cowfs.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", driver="vfs", fsync=False) as opened:
        (tmp_path / "store" / "service").mkdir(exist_ok=True)
        yield opened


@pytest.fixture
def waiting(store: Store) -> Waiting:
    made = Waiting(store.root, durable=False)
    made.reserve()
    return made


def kept(store: Store) -> list[tuple[str, str]]:
    return [(event.action, event.attributes["n"]) for event in store.events() if event.type == "test"]


def wait(waiting: Waiting, *numbers: int) -> None:
    for number in numbers:
        assert waiting.append(("test", "a", "actor", {"n": str(number)}, 1000 + number))


def file(store: Store) -> Path:
    return Path(store.root) / "service" / "events.waiting"


def test_events_move_once_and_in_order(store: Store, waiting: Waiting) -> None:
    wait(waiting, 1, 2, 3)
    waiting.drain(store)
    waiting.drain(store)
    wait(waiting, 4)
    waiting.drain(store)
    assert kept(store) == [("a", "1"), ("a", "2"), ("a", "3"), ("a", "4")]
    assert file(store).stat().st_blocks * 512 >= SIZE  # a record needs no block


def test_a_kill_between_the_two_writes_repeats_none(store: Store, waiting: Waiting) -> None:
    wait(waiting, 1, 2)
    before = file(store).read_bytes()
    waiting.drain(store)
    file(store).write_bytes(before)
    wait(waiting, 3)
    waiting.drain(store)
    assert kept(store) == [("a", "1"), ("a", "2"), ("a", "3")]


def test_a_full_file_says_so_and_loses_nothing(store: Store, waiting: Waiting) -> None:
    count = 0
    while waiting.append(("test", "a", "actor", {"n": str(count), "long": "x" * 5000}, count)):
        count += 1
    assert count > 90
    waiting.drain(store)
    assert [int(number) for _, number in kept(store)] == list(range(count))


@pytest.mark.parametrize(
    "torn",
    [
        b"\xff" * 64,
        b"\x08\0\0\0" + bytes(60),
        b"\x02\0\0\0[]\0\0\0\0",
        b"\x02\0\0\0{}",
        b"\x05\0\0\0[1,2]",
        os.urandom(4096),
    ],
)
def test_torn_records_cost_themselves_alone(store: Store, waiting: Waiting, torn: bytes) -> None:
    with open(file(store), "r+b") as out:
        out.write(torn)
    Teller(store).tell("test", "a", "actor", {"n": "1"})
    assert kept(store) == [("a", "1")]


@pytest.mark.parametrize("what", ["nothing", "link", "fifo", "folder", "empty"])
def test_a_place_that_is_none_costs_no_event(store: Store, what: str) -> None:
    path = file(store)
    {
        "nothing": lambda: None,
        "link": lambda: path.symlink_to("/etc/passwd"),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "empty": path.touch,
    }[what]()
    teller = Teller(store)
    teller.begin()
    teller.tell("test", "a", "actor", {"n": "1"})
    assert kept(store) == [("a", "1")]
    assert Path("/etc/passwd").stat().st_size < SIZE
