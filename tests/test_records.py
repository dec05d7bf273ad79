"""Records made without the module dataclasses are what it would have made."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cowfs import _record, model
from cowfs.format import redirect
from cowfs.fuse import codec, handshake, loop
from cowfs.index import records
from cowfs.mounting import request
from cowfs.mounting.verbs import basic
from cowfs.sys import mounts
from cowfs.union import live, options

RECORDS = [
    value
    for module in (model, records, basic, codec, handshake, live, loop, mounts, options, redirect, request)
    for value in vars(module).values()
    if isinstance(value, type) and value.__module__ == module.__name__ and "__dataclass_fields__" in vars(value)
]


def real(cls: type) -> type:
    """The dataclass of the same fields."""
    made = [
        (each.name, each.type, dataclasses.field(default=each.default, default_factory=each.default_factory))
        for each in dataclasses.fields(cls)
    ]
    keywords = not cls.__match_args__  # type: ignore[attr-defined]
    return dataclasses.make_dataclass(cls.__name__, made, frozen=True, slots=True, kw_only=keywords)


@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
def test_a_record_is_the_dataclass_of_its_fields(cls: type) -> None:
    twin = real(cls)
    given_ = {
        each.name: each.name
        for each in dataclasses.fields(cls)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    mine, its = cls(**given_), twin(**given_)
    assert repr(mine) == repr(its)
    assert dataclasses.asdict(mine) == dataclasses.asdict(its)
    assert list(inspect.signature(cls).parameters) == list(inspect.signature(twin).parameters)
    assert cls.__match_args__ == twin.__match_args__  # type: ignore[attr-defined]
    bad: list[dict[str, object]] = [{**given_, "nothing": 1}, *([{}] if given_ else [])]
    for wrong in bad:
        with pytest.raises(TypeError):
            cls(**wrong)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(mine, cls.__slots__[0], 1)  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(mine, cls.__slots__[0])  # type: ignore[attr-defined]
    assert not hasattr(mine, "__dict__")
    for other in (copy.copy(mine), copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), dataclasses.replace(mine)):
        assert other == mine
        assert other is not mine
    assert mine != its
    first = cls.__slots__[0]  # type: ignore[attr-defined]
    changed = dataclasses.replace(mine, **{first: "else"})
    assert (getattr(changed, first), changed == mine) == ("else", False)


@_record.record(frozen=True, slots=True)
class Sample:
    """Positional, with both kinds of defaults."""

    a: int
    b: str = "b"
    c: Mapping[str, int] = _record.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Real:
    a: int
    b: str = "b"
    c: Mapping[str, int] = dataclasses.field(default_factory=dict)


@given(st.integers(), st.text(), st.integers(), st.text())
def test_they_compare_and_hash_as_dataclasses_do(a: int, b: str, c: int, d: str) -> None:
    assert (Sample(a, b) == Sample(c, d)) == (Real(a, b) == Real(c, d))
    hashable = model.Usage(bytes=a, inodes=c)
    assert hash(hashable) == hash((a, c))
    assert Sample(a).c is not Sample(a).c
    match Sample(a, b):
        case Sample(x, y):
            assert (x, y) == (a, b)
    with pytest.raises(TypeError):
        hash(Sample(a))  # a dict in it


def test_the_model_imports_neither_dataclasses_nor_typing() -> None:
    program = "import sys, cowfs.model, cowfs.index.records; print({'dataclasses', 'typing', 'inspect', 're'} & set(sys.modules))"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path[1:]!r}; {program}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout in ("set()\n", "{'re'}\n")


def test_what_a_store_tells_of_a_snapshot_is_plain_data(tmp_path: Path) -> None:
    """One record, whichever verb gives it, with id, limit, use and digest; as JSON and back."""
    import json

    from cowfs import Store

    with Store.open(tmp_path / "store", driver="vfs", fsync=False) as store:
        store.prepare("k", size="1M", labels={"a": "b"})
        store.commit("k", "v1")
        store.prepare("work", "v1", inodes="1k")
        infos = list(store.walk())
        assert infos == [store.stat(info.name) for info in infos]
        first, work = (json.loads(json.dumps(info.as_dict())) for info in infos)
        assert (first["kind"], first["limit"]["bytes"], first["labels"]) == ("committed", 1 << 20, {"a": "b"})
        assert first["usage"] == {"bytes": store.usage("v1").bytes, "inodes": store.usage("v1").inodes}
        assert (work["usage"], work["limit"]["inodes"], work["parent"]) == (None, 1000, "v1")
        assert Path(store.root, "layers", work["id"]).is_dir()
        assert json.loads(json.dumps(dataclasses.asdict(infos[1]))) == work


def test_two_threads_may_make_the_first_of_a_record() -> None:
    """``__init__`` is compiled on first use: the thread that comes second has the same one."""
    code = (
        "from cowfs.model import Usage\n"
        "first = vars(Usage)['__init__']\n"
        "one, two = Usage(bytes=1), Usage(bytes=2)\n"
        "first.__get__(two, Usage)(bytes=3, inodes=4)\n"
        "print(one.bytes, two.bytes, two.inodes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1 3 4\n", done.stderr
