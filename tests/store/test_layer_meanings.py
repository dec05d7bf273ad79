"""One layer archive means one tree, whichever driver keeps it: hard links to what lies beneath, and what is deleted after them."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.archives import END, directory, hardlink, member, symlink

from cowfs.errors import CowfsError
from cowfs.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and owners: needs root")

DRIVERS = ("overlay", "row", "vfs")

BASE = b"".join(
    [
        directory("."), member("data", b"d"), symlink("link", "data"), member("fifo", type=tarfile.FIFOTYPE),
        member("device", type=tarfile.CHRTYPE, device=(1, 3)), directory("dir"), member("dir/a", b"a"), member("dir/b", b"b"),
        hardlink("dir/second", "data"), directory("dir/sub"), member("dir/sub/c", b"c"), END,
    ]
)  # fmt: skip

LAYERS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "then its whiteout": (hardlink("copy", "dir/a") + member("dir/.wh.a"), {"copy": "a", "dir/a": None}),
    "then opaque": (hardlink("copy", "dir/a") + member("dir/.wh..wh..opq"), {"copy": "a", "dir/a": None, "dir": "", "dir/b": None}),
    "then its directory deleted": (hardlink("copy", "dir/sub/c") + member(".wh.dir"), {"copy": "c", "dir": None}),
    "then a directory above is opaque": (hardlink("copy", "dir/sub/c") + member("dir/.wh..wh..opq"), {"copy": "c", "dir/sub": None, "dir": ""}),
    "then the archive's own at its place": (
        hardlink("copy", "dir/a") + member("dir/a", b"own") + member("dir/.wh.a"), {"copy": "a", "dir/a": "own"},
    ),
    "all its names": (hardlink("copy", "data"), {"copy": "d", "data": "d", "dir/second": "d"}),
    "all its names, one deleted": (hardlink("copy", "data") + member("dir/.wh.second"), {"copy": "d", "data": "d", "dir/second": None}),
    "opaque root": (member(".wh..wh..opq") + member("only", b"o"), {"only": "o", "data": None, "dir": None}),
    "opaque root after what stays": (
        directory("dir") + member("dir/new", b"n") + member(".wh..wh..opq"), {"dir/new": "n", "dir/a": None, "data": None},
    ),
    "of a symbolic link": (hardlink("link2", "link"), {"link2": "-> data", "link": "-> data"}),
    "of a FIFO": (hardlink("fifo2", "fifo"), {"fifo2": "fifo", "fifo": "fifo"}),
    "of a device": (hardlink("device2", "device"), {"device2": "device", "device": "device"}),
}  # fmt: skip


def tree(store: Store, name: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The object of each path, and the paths of each file, from the tar of the whole tree."""
    out = io.BytesIO()
    store.export(name, out, format="tar")
    out.seek(0)
    found: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    with tarfile.open(fileobj=out) as tar:
        for info in tar:
            path = info.name.removeprefix("./").rstrip("/")
            first = path
            if info.islnk():
                first = info.linkname.removeprefix("./")
                found[path] = found[first]
            elif info.isreg():
                held = tar.extractfile(info)
                assert held is not None
                found[path] = held.read().decode()
            elif info.issym():
                found[path] = f"-> {info.linkname}"
            else:
                found[path] = {tarfile.DIRTYPE: "", tarfile.FIFOTYPE: "fifo", tarfile.CHRTYPE: "device"}[info.type]
            groups.setdefault(first, []).append(path)
    group_of = {path: tuple(sorted(paths)) for paths in groups.values() for path in paths}
    return {path: (what, group_of[path]) for path, what in found.items()}


def applied(root: Path, driver: str, layers: list[bytes]) -> Any:
    """The tree after some layers, or what was said of the one that was refused."""
    with Store.open(root / driver, driver=driver, fsync=False) as store:
        parent = None
        for number, layer in enumerate(layers):
            store.prepare(f"key{number}", parent)
            try:
                store.apply(f"key{number}", io.BytesIO(layer))
            except CowfsError as error:
                return type(error).__name__
            parent = f"layer{number}"
            store.commit(f"key{number}", parent)
        assert parent is not None
        assert store.check(content=True).damage == []
        return tree(store, parent)


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_hard_link_to_what_lies_beneath(space: Path, driver: str, case: str) -> None:
    """The link stays, with all names that the file has; what the layer deletes is gone, in whichever order it says so."""
    layer, expected = LAYERS[case]
    found = applied(space, driver, [BASE, layer + END])
    assert {path: found.get(path, (None,))[0] for path in expected} == expected
    same = [path for path, what in expected.items() if what is not None and path in found and len(found[path][1]) > 1]
    for path in same:
        assert set(found[path][1]) >= {path}
    if case == "all its names":
        assert found["copy"][1] == ("copy", "data", "dir/second")


def test_a_link_to_what_the_layer_deleted_is_refused(space: Path) -> None:
    """A deletion by any means: its own whiteout, one of a directory above, an opaque mark."""
    for number, first in enumerate(
        (member("dir/.wh.a"), member(".wh.dir"), member("dir/.wh..wh..opq"), member(".wh..wh..opq"))
    ):
        for driver in DRIVERS:
            assert (
                applied(space / f"{number}", driver, [BASE, first + hardlink("copy", "dir/a") + END])
                == "InvalidArgument"
            )


def random_layer(rng: random.Random) -> bytes:
    """A layer that links, replaces and deletes a few names, in any order."""
    names = ("data", "link", "fifo", "dir/a", "dir/b", "dir/sub/c", "dir/second", "x", "dir/x", "y/z")
    parts = []
    for _ in range(rng.randrange(1, 7)):
        name, other = rng.choice(names), rng.choice(names)
        folder, _, base = name.rpartition("/")
        parts.append(
            rng.choice(
                (
                    lambda n=name, o=other: hardlink(n, o) if n != o else b"",
                    lambda n=name, o=other: hardlink(n, o) if n != o else b"",
                    lambda n=name: member(n, n.encode() + b" new"),
                    lambda f=folder, b=base: member(f"{f}/.wh.{b}" if f else f".wh.{b}"),
                    lambda f=folder: member(f"{f}/.wh..wh..opq" if f else ".wh..wh..opq"),
                    lambda f=folder: directory(f) if f else b"",
                    lambda: member(".wh.dir"),
                )
            )()
        )
    return b"".join(parts) + END


def test_random_layers_mean_one_tree(space: Path, request: pytest.FixtureRequest) -> None:
    """Every driver shows what a plain directory does (vfs), or refuses alike."""
    rng = random.Random(request.config.getoption("--seed"))
    for number in range(120):
        layers = [BASE, *[random_layer(rng) for _ in range(rng.randrange(1, 3))]]
        results = [applied(space / f"r{number}", driver, layers) for driver in DRIVERS]
        assert results[0] == results[1], (number, layers[1:])
        assert plain(results[0]) == plain(results[2]), (number, layers[1:])


def plain(result: Any) -> Any:
    """A tree without its link groups."""
    return result if isinstance(result, str) else {path: what for path, (what, _) in result.items()}
