"""An import needs less than 200 MB of memory, whatever it is given, and puts no more on the disk than it may.

Each runs as a process of its own, whose largest resident set the kernel tells; an address space of 4 GiB stops what would
otherwise stop the machine.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.archives import END, directory, member, tar
from support.command import environment
from support.images import Layout, config, digest, docker

pytestmark = pytest.mark.root
MIB = 1 << 20
_MEASURE = """
import json, resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, done.stderr, used]))
"""


def run_import(space: Path, source: str, *options: str, stdin: Any = subprocess.DEVNULL) -> tuple[int, str]:
    """(status, standard error) of an import; fails where it took too much memory."""
    command = [sys.executable, "-m", "cowfs", "import", source, *options, "--root", str(space / "store")]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command],
        stdin=stdin,
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    status, said, used = json.loads(done.stdout)
    assert used < 200 << 10, f"{used} KiB"
    assert "Traceback" not in said, said
    return status, said


def used(space: Path) -> int:
    """Bytes that the store takes on the disk."""
    found = 0
    for where, _, names in os.walk(space / "store"):
        found += sum(os.lstat(os.path.join(where, name)).st_blocks * 512 for name in names)
    return found


def big_layer(path: Path, size: int) -> None:
    with tarfile.open(path, "w") as made:
        info = tarfile.TarInfo("big")
        info.size = size
        made.addfile(info, io.BytesIO(os.urandom(MIB) * (size // MIB)))


def big_docker(space: Path, size: int = 300 * MIB) -> Path:
    """As skopeo and podman write it: a big layer first."""
    layer = space / "layer.tar"
    big_layer(layer, size)
    hexes = subprocess.run(["sha256sum", layer], capture_output=True, text=True, check=True).stdout.split()[0]
    document = json.loads(config([]))
    document["rootfs"]["diff_ids"] = ["sha256:" + hexes]
    data = json.dumps(document).encode()
    entry = [{"Config": digest(data)[7:] + ".json", "RepoTags": ["app:1"], "Layers": [hexes + ".tar"]}]
    with open(space / "image.tar", "wb") as out:
        head = member(hexes + ".tar", size=layer.stat().st_size)
        out.write(head)
        with open(layer, "rb") as file:
            while piece := file.read(MIB):
                out.write(piece)
        out.write(bytes(-layer.stat().st_size % 512))
        out.write(tar(member(entry[0]["Config"], data), member("manifest.json", json.dumps(entry).encode())))  # type: ignore[arg-type]
    layer.unlink()
    return space / "image.tar"


def test_a_docker_archive_whose_layer_comes_first(space: Path) -> None:
    path = big_docker(space)
    assert run_import(space, str(path)) == (0, "")
    with open(path, "rb") as file:
        pipe = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        assert run_import(space, "-", "other", stdin=pipe.stdout) == (0, "")
        assert pipe.stdout is not None
        pipe.stdout.close()
        assert pipe.wait() == 0


def test_what_a_pipe_may_put_aside_is_bounded(space: Path) -> None:
    path = big_docker(space, 64 * MIB)
    with open(path, "rb") as file:
        pipe = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        status, said = run_import(space, "-", "--max-size", "8M", stdin=pipe.stdout)
        assert pipe.stdout is not None
        pipe.stdout.close()
        pipe.wait()
    assert status != 0
    assert "--max-size" in said
    assert used(space) < 4 * MIB


@pytest.mark.parametrize("source", ["/dev/zero", "/dev/urandom", "/dev/null"])
def test_devices(space: Path, source: str) -> None:
    status, said = run_import(space, source, "x", "--max-size", "64M")
    assert status != 0
    assert len(said.splitlines()) == 1
    assert used(space) < 4 * MIB


def test_zeros_through_a_pipe(space: Path) -> None:
    with open("/dev/zero", "rb") as zeros:
        status, said = run_import(space, "-", "x", "--max-size", "64M", stdin=zeros)
    assert status != 0
    assert len(said.splitlines()) == 1


def bomb(level: int = 9, *, first: bytes = b"", count: int = 400 * MIB) -> bytes:
    """Zeros behind something, compressed."""
    engine = zlib.compressobj(level, zlib.DEFLATED, 31)
    return engine.compress(first) + b"".join(engine.compress(bytes(MIB)) for _ in range(count // MIB)) + engine.flush()


def json_of(kind: str) -> bytes:
    """Just under what a document may have, of what takes most as objects."""
    size = 4 * MIB - 64
    return {
        "lists": b"[" + b"[]," * (size // 3) + b"0]",
        "objects": b"[" + b"{}," * (size // 3) + b"0]",
        "fields": b"[" + b'{"a":0},' * (size // 8) + b"0]",
        "nested": b"[" * 900 + b"]" * 900,
        "numbers": b"[" + b"999," * (size // 4) + b"0]",
    }[kind]


def layout_with(document: bytes, where: str) -> bytes:
    layout = Layout()
    one = tar(directory("./"))
    body = config([one], extra=json.loads(document) if len(document) < 10_000 else None)
    if len(document) >= 10_000:
        body = body[:-1] + b',"extra2":' + document[: 4 * MIB - len(body) - 20].rsplit(b",", 1)[0] + b"]}"
    if where == "config":
        return layout.add([one], "x", body).tar()
    layout.add([one], "x")
    files = layout.files()
    files["index.json"] = files["index.json"][:-1] + b',"extra":' + document + b"}"
    if len(files["index.json"]) > 4 * MIB:
        files["index.json"] = (
            layout.files()["index.json"][:-1] + b',"extra":' + document[: 4 * MIB - 5000].rsplit(b",", 1)[0] + b"]}"
        )
    return tar(*(member(name, data) for name, data in files.items()))


def pax_names(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield member(f"blobs/sha256/{number:064x}/" + "n" * 200 + "/" + "m" * 200)


def _layout(kind: str, where: str) -> bytes:
    return layout_with(json_of(kind), where)


SOURCES: dict[str, Callable[[], bytes]] = {
    "zeros, compressed": lambda: bomb(),
    "a file of zeros, compressed": lambda: bomb(first=member("f", size=399 * MIB)),
    "an image's first layer of zeros, compressed": lambda: bomb(first=member("0" * 64 + ".tar", size=399 * MIB)),
    "a layer of an image, bomb": lambda: docker(([bomb(first=member("f", size=399 * MIB))], ["x:1"], None)),
    "an unknown name first": lambda: bomb(first=member("config", size=399 * MIB)),
    "a long header": lambda: member("x", size=900 * MIB, type=b"x") + bytes(1024),
    "a long name": lambda: member("x", size=900 * MIB, type=b"L") + bytes(1024),
    "a sparse map": lambda: member("x", b"1000000\n" + b"0\n0\n" * 500_000, pax={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x", "GNU.sparse.realsize": "1"}),
    "names of an image": lambda: b"".join(pax_names(60_000)) + END,
    **{f"{kind} in {where}": partial(_layout, kind, where)
       for kind in ("lists", "objects", "fields", "nested", "numbers") for where in ("config", "index")},
    "a manifest.json of lists": lambda: tar(member("manifest.json", json_of("lists"))),
    "a manifest.json of objects": lambda: tar(member("manifest.json", json_of("fields"))),
}  # fmt: skip


@pytest.mark.parametrize("what", SOURCES)
def test_sources_that_would_be_large(space: Path, what: str) -> None:
    data = SOURCES[what]()
    for name, content in (("plain", data), ("packed", gzip.compress(data, 1) if data[:2] != b"\x1f\x8b" else data)):
        path = space / name
        path.write_bytes(content)
        status, said = run_import(space, str(path), "--max-size", "64M")
        # A loaded machine needs more than five seconds for a source, and then the import reports its progress.
        lines = [line for line in said.splitlines() if not re.fullmatch(r".*: (\d+%, )?[^,]+, \d+ s", line)]
        assert len(lines) <= 1 or "note:" in said
        with open(path, "rb") as file:
            piped = run_import(space, "-", "--max-size", "64M", stdin=file)
        assert bool(piped[0]) == bool(status) or "max-size" in piped[1] + said, (said, piped)
        assert used(space) < 70 * MIB
