"""Random calls of a snapshotter against a model of its contract in memory: answers, codes and lists are equal, also after kills.

The contract: the comments of containerd's Snapshotter interface (core/snapshots/snapshotter.go), and what its own metadata store answers where they are
silent. Keys and labels are of several namespaces, and hostile.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.containerd import Snapshotter, check

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

VIEW, ACTIVE, COMMITTED = 1, 2, 3
_LABELS = ("team", "a.b", "containerd.io/gc.root", "odd key", 'quo"te', "é", "k" * 200, "x=y")
_VALUES = ("", "1", "storage", "a,b", 'a"b', "\n", "é" * 50, "v" * 3000, "labels")


@dataclass
class Kept:
    kind: int
    parent: str
    labels: dict[str, str]


def _given(labels: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if value}


@dataclass
class Model:
    """The contract: each verb returns a status code."""

    known: dict[str, Kept] = field(default_factory=dict)

    def make(self, key: str, parent: str, labels: dict[str, str], kind: int) -> set[str]:
        wrong = set()
        if not key:
            wrong.add("INVALID_ARGUMENT")
        if parent and parent not in self.known:
            wrong.add("NOT_FOUND")
        elif parent and self.known[parent].kind != COMMITTED:
            wrong.add("INVALID_ARGUMENT")
        if key in self.known:
            wrong.add("ALREADY_EXISTS")
        if not wrong:
            self.known[key] = Kept(kind, parent, _given(labels))
        return wrong or {"OK"}

    def commit(self, name: str, key: str, labels: dict[str, str]) -> set[str]:
        wrong = set()
        if not name or not key:
            wrong.add("INVALID_ARGUMENT")
        if key not in self.known:
            wrong.add("NOT_FOUND")
        elif self.known[key].kind != ACTIVE:
            wrong.add("FAILED_PRECONDITION")
        if name in self.known:
            wrong.add("ALREADY_EXISTS")
        if not wrong:
            self.known[name] = Kept(COMMITTED, self.known.pop(key).parent, _given(labels))
        return wrong or {"OK"}

    def remove(self, key: str) -> set[str]:
        if key not in self.known:
            return {"NOT_FOUND"}
        if any(each.parent == key for each in self.known.values()):
            return {"FAILED_PRECONDITION"}
        del self.known[key]
        return {"OK"}

    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> set[str]:
        if name not in self.known:
            return {"NOT_FOUND"}
        now = dict(self.known[name].labels)
        for path in paths or ["labels"]:
            if path == "labels":
                now = dict(labels)
            elif path.startswith("labels."):
                now[path.removeprefix("labels.")] = labels.get(path.removeprefix("labels."), "")
            else:
                return {"INVALID_ARGUMENT"}
        self.known[name].labels = _given(now)
        return {"OK"}

    def mounts(self, key: str) -> set[str]:
        if key not in self.known:
            return {"NOT_FOUND"}
        return {"OK"} if self.known[key].kind != COMMITTED else {"FAILED_PRECONDITION"}

    def there(self, key: str) -> set[str]:
        return {"OK"} if key in self.known else {"NOT_FOUND"}


def _shown(infos: Any) -> dict[str, Kept]:
    return {info.name: Kept(info.kind, info.parent, dict(info.labels)) for info in infos}


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


Test = Callable[[str, Kept], bool]


def _selector(rng: random.Random, keys: list[str]) -> tuple[str, Test]:
    key, label, value = rng.choice(keys), rng.choice(_LABELS), rng.choice(_VALUES)
    tests: list[tuple[str, Test]] = [
        (f"name=={_quoted(key)}", lambda name, _: name == key),
        (f"parent=={_quoted(key)}", lambda _, kept: kept.parent == key),
        (f"parent!={_quoted(key)}", lambda _, kept: kept.parent != key),
        ("kind==committed", lambda _, kept: kept.kind == COMMITTED),
        (f"labels.{_quoted(label)}", lambda _, kept: label in kept.labels),
        (f"labels.{_quoted(label)}=={_quoted(value)}", lambda _, kept: kept.labels.get(label) == value),
        (f"labels.{_quoted(label)}!={_quoted(value)}", lambda _, kept: kept.labels.get(label, "") != value),
    ]
    return rng.choice(tests)


def _filters(rng: random.Random, model: Model, keys: list[str]) -> tuple[list[str], set[str]]:
    """Filters, and the names that match them by the model."""
    texts: list[str] = []
    names: set[str] = set()
    for _ in range(rng.randrange(1, 3)):
        selectors = [_selector(rng, keys) for _ in range(rng.randrange(1, 3))]
        texts.append(",".join(text for text, _ in selectors))
        names |= {name for name, kept in model.known.items() if all(test(name, kept) for _, test in selectors)}
    return texts, names


def _step(rng: random.Random, snapshotter: Snapshotter, model: Model, keys: list[str]) -> tuple[str, str, set[str]]:
    """One call of both. Returns it, the code, and the codes that the model allows."""
    key, other = rng.choice(keys), rng.choice(keys)
    labels = {rng.choice(_LABELS): rng.choice(_VALUES) for _ in range(rng.randrange(3))}
    verb = rng.choice(
        [
            "Prepare",
            "Prepare",
            "View",
            "Commit",
            "Commit",
            "Commit",
            "Remove",
            "Update",
            "Mounts",
            "Usage",
            "Stat",
            "Cleanup",
        ]
    )
    committed = [name for name, kept in model.known.items() if kept.kind == COMMITTED]
    parent = rng.choice(committed) if committed and rng.random() < 0.6 else rng.choice(["", other])
    active = [name for name, kept in model.known.items() if kept.kind == ACTIVE]
    fields: dict[str, Any] = {"key": key}
    if verb in ("Prepare", "View"):
        fields |= {"parent": parent, "labels": labels}
        allowed = model.make(key, parent, labels, ACTIVE if verb == "Prepare" else VIEW)
    elif verb == "Commit":
        fields = {"name": other, "key": rng.choice(active) if active and rng.random() < 0.7 else key, "labels": labels}
        allowed = model.commit(other, fields["key"], labels)
    elif verb == "Remove":
        allowed = model.remove(key)
    elif verb == "Update":
        paths = [
            rng.choice(["labels", *(f"labels.{label}" for label in _LABELS), "kind", "parent", ""])
            for _ in range(rng.randrange(3))
        ]
        fields = {"info": {"name": key, "labels": labels, "parent": other}, "update_mask": {"paths": paths}}
        allowed = model.update(key, labels, paths)
    elif verb == "Cleanup":
        fields, allowed = {}, {"OK"}
    else:
        allowed = model.mounts(key) if verb == "Mounts" else model.there(key)
    return f"{verb} {fields}", snapshotter.code(verb, **fields), allowed


def test_random_calls_answer_as_the_model(make_snapshotter: Callable[..., Snapshotter]) -> None:
    snapshotter = make_snapshotter("-s", "overlay").start()
    rng, model = random.Random(int(os.environ.get("COWFS_TEST_SEED", "1"))), Model()
    keys = [
        f"{space}/{number}/{name}"
        for space in ("default", "k8s.io", "a b")
        for number, name in enumerate(("web", "sha256:" + "0" * 64))
    ]
    keys += ["x", "extract-1 sha256:1", "/abs", "../up", "n\nl", "é☃", "-o", "k" * 600, "containerd: x", 'q"x']
    told: list[str] = []
    for number in range(160):
        call, code, allowed = _step(rng, snapshotter, model, keys)
        told.append(f"{call} -> {code}")
        assert code in allowed, (told[-1], allowed, told[-30:])
        if number % 10 == 0:
            assert _shown(snapshotter.call("List")) == model.known, told[-30:]
            texts, names = _filters(rng, model, keys)
            assert set(snapshotter.names(*texts)) == names, (texts, told[-5:])
        if number == 80:
            snapshotter.stop(signal.SIGKILL)
            snapshotter.start()
    assert _shown(snapshotter.call("List")) == model.known
    while model.known:
        for key in list(model.known):
            allowed = model.remove(key)
            assert snapshotter.code("Remove", key=key) in allowed
    assert snapshotter.names() == []
    assert snapshotter.stop() == 0
    assert check(snapshotter.root) == []
