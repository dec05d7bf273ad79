"""SIGINT in the middle of each long verb: 130, one line, and the store is as before or has the verb's whole effect.

The signal comes at a state, never at a time: the process sends it to itself at a fault point of the verb, at the first progress that is told, or at a file.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.command import environment

from cowfs.store import Store

PROGRAM = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
where = sys.argv.pop(1)
answer = int(sys.argv.pop(1))
sent = []
def here(name):
    if name == where and not sent:
        sent.append(name)
        os.write(answer, b"sent")
        os.kill(os.getpid(), signal.SIGINT)
from cowfs.sys import faults
faults.hook = here
from cowfs.cli.progress import Bars
tell = Bars.__call__
def telling(self, *counts):
    tell(self, *counts)
    here("progress")
Bars.__call__ = telling
from cowfs.store import Store
walk = Store.walk_files
def walking(self, *args, **named):
    for number, found in enumerate(walk(self, *args, **named)):
        if number == 2:
            here("walk")
        yield found
Store.walk_files = walking
from cowfs.cli import command
sys.exit(command())
"""

CASES = {
    "import": (("import", "tree", "new"), ("create.filled", "create.recorded", "create.committed", "progress")),
    "squash": (("squash", "base"), ("squash.built", "squash.recorded", "squash.committed")),
    "commit": (("commit", "work", "new"), ("commit.frozen", "commit.scanned", "commit.recorded", "commit.committed")),
    "apply": (("apply", "fresh", "layer.tar"), ("apply.unpacked", "apply.synced")),
    "check": (("check", "--content"), ("progress",)),
    "gc": (("gc",), ("gc.swept", "gc.committed")),
    "send": (("send", "top"), ("progress",)),
    "receive": (("receive",), ("create.recorded", "apply.unpacked", "commit.recorded")),
    "copy": (("copy", "top", "--to", "other"), ("create.recorded", "commit.recorded")),
    "migrate": (("migrate", "--to", "vfs"), ("migrate.snapshot", "migrate.copied", "migrate.exchanged")),
    "du": (("du", "top"), ("walk",)),
}


def make(place: Path) -> None:
    """A store of two layers, one active snapshot with changes, one without; a tree and a layer to take in; an empty store to copy to."""
    place.mkdir()
    with Store.open(place / "store", driver="overlay", fsync=False) as store:
        store.prepare("a")
        with store.paths("a") as paths:
            paths.makedirs(b"etc")
            for number in range(20):
                paths.write_bytes(b"etc/%d" % number, b"base %d" % number * 100)
        store.commit("a", "base")
        store.prepare("b", "base")
        with store.paths("b") as paths:
            paths.write_bytes(b"etc/3", b"top")
        store.commit("b", "top")
        store.prepare("work", "top")
        with store.paths("work") as paths:
            paths.write_bytes(b"more", b"work")
        store.prepare("fresh", "top")
        with open(place / "stream", "wb") as stream:
            store.send(["base"], stream)
    Store.open(place / "other", driver="overlay", fsync=False).close()
    (place / "tree").mkdir()
    (place / "tree/file").write_text("new")
    with tarfile.open(place / "layer.tar", "w") as tar:
        for name in ("one", "two"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(name.encode()[:3]))


def state(root: Path) -> dict[str, Any]:
    """Each snapshot by its name: kind, parent, files with their content."""
    told: dict[str, Any] = {}
    with Store.open(root, fsync=False) as store:
        assert store.check(content=True).damage == []
        for info in store.walk():
            files = []
            for found in list(store.walk_files(info.name)):  # it holds an active one meanwhile
                data = b""
                if found.type == "file":
                    with store.open_file(info.name, found.path) as file:
                        data = file.read()
                files.append((found.path, found.type, data))
            told[info.name] = (info.kind, info.parent, files)
        told["tags"] = [(tag.name, tag.target) for tag in store.tags()]
    return told


def run(place: Path, arguments: tuple[str, ...], where: str) -> tuple[int, bytes, bytes, bool]:
    """Exit status, output, errors, and whether the signal was sent."""
    reading, writing = os.pipe()
    root = "other" if arguments[0] == "receive" else "store"
    with open(place / "stream", "rb") as stream:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, where, str(writing), *arguments],
            env={**environment(), "COWFS_ROOT": str(place / root), "COWFS_FSYNC": "0", "COWFS_PROGRESS": "plain"},
            cwd=place,
            stdin=stream,
            capture_output=True,
            pass_fds=(writing,),
            check=False,
        )
    os.close(writing)
    sent = os.read(reading, 10) == b"sent"
    os.close(reading)
    return done.returncode, done.stdout, done.stderr, sent


@pytest.mark.parametrize("verb", CASES)
def test_an_interrupted_verb_loses_nothing(verb: str, space: Path) -> None:
    arguments, points = CASES[verb]
    whole = space / "whole"
    make(whole)
    before = {name: state(whole / name) for name in ("store", "other")}
    status, _, errors, _ = run(whole, arguments, "never")
    assert status == 0, errors
    after = {name: state(whole / name) for name in ("store", "other")}
    for where in points:
        place = space / where
        make(place)
        status, _, errors, sent = run(place, arguments, where)
        assert sent, f"{verb} did not pass {where}"
        told = [line for line in errors.splitlines() if line.startswith(b"cowfs")]
        assert (status, told) == (130, [b"cowfs: interrupted"]), (where, status, errors)
        assert b"Traceback" not in errors
        for name in ("store", "other"):
            now = state(place / name)
            if verb == "import" and where == "create.committed":  # the layer stays, for the next try
                assert len(now) == len(after[name])
                now = {key: now[key] for key in before[name]}
            assert now in (before[name], after[name]), (where, name)
