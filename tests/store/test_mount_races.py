"""Mounts begin while squashes take layers away, and files stay what they are under both."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from cowfs.errors import CowfsError, FailedPrecondition, NotFound
from cowfs.mounting import client, mountpoint, server
from cowfs.mounting.request import MountSpec
from cowfs.store import Store
from cowfs.store.handle import LiveHandle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts: needs root")

FILES = 12


def make(root: Path, driver: str) -> Store:
    store = Store.open(root, driver=driver, fsync=False)
    store.prepare("first")
    tree = root / "layers" / store.index.get("first").id / "fs"
    for number in range(FILES):
        (tree / f"f{number}").write_text(f"f{number} as it was")
    store.commit("first", "base")
    return store


@pytest.mark.parametrize("last", ["latest", "f1"])
@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_a_renamed_file_is_itself_after_a_squash_beneath_it(
    space: Path, can_mount: None, driver: str, last: str
) -> None:
    """Its data has another name in the layer that has it, and there another file may have its name."""
    (space / "mnt").mkdir()
    mnt = space / "mnt"
    with make(space / "store", driver) as store:
        store.prepare("key", "base")
        with store.mount("key", mnt) as handle:
            assert isinstance(handle, LiveHandle)
            with open(mnt / "f2", "a") as file:
                file.write("+")
            os.rename(mnt / "f2", mnt / "new")
            handle.snapshot("one")
            handle.snapshot("two")
            os.chmod(mnt / "new", 0o600)
            os.rename(mnt / "new", mnt / last)
            handle.snapshot("three")
            store.squash("one")
            for name in ("four", "five"):
                handle.snapshot(name)
            there = sorted(os.listdir(mnt))
            assert there == sorted({last, *(f"f{n}" for n in range(FILES))} - {"f2"})
            assert (mnt / last).read_text() == "f2 as it was+"
            status = os.stat(mnt / last)
            assert (status.st_mode & 0o777, status.st_size) == (0o600, 13)
            os.rename(mnt / last, mnt / "again")
            assert (mnt / "again").read_text() == "f2 as it was+"
        assert not store.check(content=True).damage


def test_no_layer_goes_while_a_mount_begins(space: Path, can_mount: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A squash that comes between the list of layers and their opening waits, and then tells the new mount."""
    (space / "mnt").mkdir()
    mnt = space / "mnt"
    with make(space / "store", "overlay") as store:
        parent = "base"
        for name in ("one", "two"):
            store.prepare("k", parent)
            (space / "store" / "layers" / store.index.get("k").id / "fs" / name).write_text(name)
            store.commit("k", name)
            parent = name
        store.prepare("key", "two")
        real, squashed, outcome = client.spawn, threading.Event(), []

        def squash() -> None:
            with Store.open(space / "store", fsync=False) as other:
                outcome.append(other.squash("one").name)
            squashed.set()

        def spawn(spec: object) -> object:
            thread.start()
            squashed.wait(0.5)  # it has all the time that it wants, and does not get its turn
            assert all(os.path.isdir(layer) for layer in spec.layers)  # type: ignore[attr-defined]
            return real(spec)  # type: ignore[arg-type]

        thread = threading.Thread(target=squash)
        monkeypatch.setattr(client, "spawn", spawn)
        with store.mount("key", mnt):
            thread.join()
            assert outcome == ["two"]
            assert sorted(os.listdir(mnt)) == sorted(["one", "two", *(f"f{n}" for n in range(FILES))])
            assert (mnt / "one").read_text() == "one"


@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_mounts_snapshots_and_squashes_at_once(
    space: Path, can_mount: None, driver: str, request: pytest.FixtureRequest
) -> None:
    """One mounts, changes, takes snapshots and unmounts; another squashes whatever there is: no mount fails, no file is another."""
    rng = random.Random(request.config.getoption("--seed"))
    mnt = space / "mnt"
    mnt.mkdir()
    done, squashes, failures = threading.Event(), [0], []

    def squash() -> None:
        mine = random.Random(7)
        try:
            with Store.open(space / "store", fsync=False) as other:
                while not done.is_set():
                    names = [info.name for info in other.walk() if info.name.startswith("s")]
                    try:
                        other.squash(mine.choice(names or ["none"]))
                        squashes[0] += 1
                    except (FailedPrecondition, NotFound):
                        continue
                    except CowfsError as error:  # a mount that ended meanwhile
                        if "is gone" not in error.message and "merged, but" not in error.message:
                            raise
        except BaseException as error:  # noqa: BLE001  (told below)
            failures.append(error)

    with make(space / "store", driver) as store:
        model = {f"f{number}": f"f{number} as it was" for number in range(FILES)}
        store.prepare("key", "base")
        thread = threading.Thread(target=squash)
        thread.start()
        try:
            for round in range(200):
                if round >= 25 and squashes[0] >= 3:
                    break
                with store.mount("key", mnt) as handle:
                    assert isinstance(handle, LiveHandle)
                    assert {entry.name: Path(entry.path).read_text() for entry in os.scandir(mnt)} == model
                    for step in range(rng.randrange(1, 6)):
                        name, other = f"f{rng.randrange(FILES)}", f"f{rng.randrange(20)}"
                        if name not in model:
                            (mnt / name).write_text(f"{round}.{step}")
                            model[name] = f"{round}.{step}"
                        elif rng.random() < 0.4:
                            with open(mnt / name, "a") as file:
                                file.write("+")
                            model[name] += "+"
                        elif name != other:
                            os.rename(mnt / name, mnt / other)
                            model[other] = model.pop(name)
                        if rng.random() < 0.5:
                            try:
                                handle.snapshot(f"s{round}-{step}")
                            except FailedPrecondition:
                                pass
                    assert {entry.name: Path(entry.path).read_text() for entry in os.scandir(mnt)} == model
        finally:
            done.set()
            thread.join()
        assert failures == []

        assert not store.check(content=True).damage


def test_a_mount_that_is_unmounted_before_it_answered_says_so(
    space: Path, can_mount: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an unmount of another process; the server has no error then."""
    for name in ("layer", "mnt"):
        (space / name).mkdir()

    def unmounted(self: server.Server) -> None:  # in its process, in place of the answer
        self.session.ready.wait()
        mountpoint.detach(self.spec.mountpoint, force=True)

    monkeypatch.setattr(server.Server, "_ready", unmounted)
    spec = MountSpec(layers=(str(space / "layer"),), mountpoint=str(space / "mnt"), readonly=True)
    pid = os.fork()  # a maker that ignores SIGINT from then on
    if pid == 0:
        code = 1
        try:
            server.start(spec)
        except FailedPrecondition as error:
            code = 0 if "was unmounted before its mount answered" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not os.path.ismount(space / "mnt")
