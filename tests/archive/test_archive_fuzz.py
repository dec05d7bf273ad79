"""A fuzzer over archives: whatever the bytes, a clear answer and nothing outside touched.

Two generators: valid archives with bytes flipped, cut, spliced and repeated; and members built
from hostile parts (names, links, numbers, PAX records) that mean to get somewhere. More examples
with ``COWFS_FUZZ=100000``. ``fuzz_one`` is also the entry point for a coverage-guided fuzzer
(atheris: ``python tests/archive/test_archive_fuzz.py``, where it is installed).
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))

from support.archives import canaries, directory, hardlink, member, patched, symlink, tar

from cowfs.archive import ApplyOptions, apply_layer, export_layer, rebuild
from cowfs.errors import Corrupt, CowfsError

EXAMPLES = int(os.environ.get("COWFS_FUZZ", "300"))
SMALL = ApplyOptions(max_bytes=1 << 22, max_entries=200, max_file=1 << 24, max_header=1 << 16)
LENIENT = settings(
    max_examples=EXAMPLES, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

VALID = [
    tar(directory("d"), member("d/f", b"hello" * 300), symlink("l", "d/f"), hardlink("h", "d/f"), member(".wh.x")),
    tar(member("n" * 150, b"x", format=tarfile.GNU_FORMAT), member("p" * 300, b"y", pax={"mtime": "1.5"})),
    tar(
        member("GNUSparseFile.0/s", b"2\n0\n3\n8192\n5\n".ljust(512, b"\0") + b"abcdefgh",
               pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s",
                    "GNU.sparse.realsize": "9000"})
    ),
    tar(member("dev", type=tarfile.FIFOTYPE), directory("o", uid=5), member("o/.wh..wh..opq"),
        member("o/x", b"1", pax={"SCHILY.xattr.user.a": "b"})),
]  # fmt: skip

COMPONENT = st.sampled_from(
    ["a", "b", "..", ".", "", "/", ".wh.a", ".wh..wh..opq", ".wh.", ".wh...", "outside", "file", "l", "x" * 255, "x" * 256,
     "\u00e9", "\udcff", "\n", "d" * 100, ".wh..wh.plnk"]
)  # fmt: skip
NAME = st.lists(COMPONENT, min_size=1, max_size=5).map("/".join)
NUMBER = st.sampled_from(["0", "1", "-1", "5", "99999999999999999999", "1e9", "", "0x10", "4096", "1.5", "-7.25"])
PAX = st.dictionaries(
    st.one_of(
        st.sampled_from(["path", "linkpath", "size", "uid", "gid", "mtime", "atime", "GNU.sparse.size", "GNU.sparse.map",
                         "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.name",
                         "SCHILY.xattr.user.x", "SCHILY.xattr.trusted.overlay.opaque", "SCHILY.xattr.security.x"]),
    ),
    st.one_of(NAME, NUMBER, st.sampled_from(["0,1", "0,1,1", "8192,512,0,1"])),
    max_size=3,
)  # fmt: skip
PATCH = st.lists(st.tuples(st.integers(0, 511), st.binary(min_size=1, max_size=12)), max_size=2)


@st.composite
def hostile_members(draw: st.DrawFn) -> bytes:
    """One member whose every part may be a trap."""
    kind = draw(
        st.sampled_from(
            [b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"x", b"g", b"L", b"K", b"V", b"Z"]
        )
    )
    data = draw(st.sampled_from([b"", b"evil", b"x" * 600, b"../outside/file\0", b"11 path=..\n", b"2\n0\n1\n"]))
    if kind in b"123456":
        data = b""
    try:
        built = member(
            draw(NAME), data, type=kind, link=draw(NAME), mode=draw(st.sampled_from([0o644, 0o4755, 0o777, 0])),
            uid=draw(st.sampled_from([0, 1000, 0xFFFFFFFE])), pax=draw(PAX),
            device=draw(st.sampled_from([(0, 0), (1, 3), (300, 70000)])),
            format=draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])),
        )  # fmt: skip
    except ValueError:  # tarfile cannot write it
        return b""
    patches = draw(PATCH)
    if patches and len(built) >= 512:
        built = patched(built[:512], *patches)[:512] + built[512:]
    return built


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid archive with a few things wrong."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 6))):
        what = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "field", "splice"]))
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        if not data:
            break
        if what == "flip":
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 1024))]
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=600))
        elif what == "repeat":
            block = at // 512 * 512
            data[block:block] = data[block : block + 512]
        elif what == "splice":
            other = draw(st.sampled_from(VALID))
            data[at // 512 * 512 :] = other[draw(st.integers(0, len(other) // 512)) * 512 :]
        else:  # a field changed with the checksum made right: the parser proper is reached
            block = at // 512 * 512
            if len(data) >= block + 512:
                offset = draw(
                    st.sampled_from([0, 100, 108, 116, 124, 136, 156, 157, 257, 329, 337, 345, 386, 482, 483])
                )
                value = draw(
                    st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"../", b"/", b"S", b"x", b"L"]))
                )
                data[block : block + 512] = patched(bytes(data[block : block + 512]), (offset, value))[:512]
    return bytes(data)


def fuzz_one(space: Path, data: bytes, form: str) -> None:
    """Apply; on success rebuild and export too. Raises on anything but a clean answer."""
    layer = space / "layer"
    shutil.rmtree(layer, ignore_errors=True)
    layer.mkdir()
    log = io.BytesIO()
    try:
        done = apply_layer(io.BytesIO(data), str(layer), form=form, options=SMALL, log=log)
    except CowfsError as error:
        assert "\n" not in str(error)
        assert str(error)
        return
    except OSError as error:
        assert "entry" in str(error)  # the target could not: it says for which entry
        return
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        out = io.BytesIO()
        try:
            rebuild(log, fd, out)
        except Corrupt as error:
            assert "incomplete" in str(error)
        else:
            assert out.getvalue() == data
        first, second = io.BytesIO(), io.BytesIO()
        exported = export_layer(fd, first, form=form)
        (space / "layer" / "..").resolve()
    finally:
        os.close(fd)
    again = space / "again"
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir()
    apply_layer(io.BytesIO(first.getvalue()), str(again), form=form, diff_id=exported.diff_id)
    export_layer(str(again), second, form=form)
    assert second.getvalue() == first.getvalue()
    assert done.size == len(data)


def _run(space: Path, data: bytes, form: str) -> None:
    for name in ("outside", "layer", "again"):
        shutil.rmtree(space / name, ignore_errors=True)
    before = set(os.listdir("/proc/self/fd"))
    with canaries(space):
        fuzz_one(space, data, form)
        shutil.rmtree(space / "again", ignore_errors=True)
    assert (
        not set(os.listdir("/proc/self/fd")) - before
    )  # fewer there may be: some of earlier tests are collected meanwhile


@LENIENT
@given(data=mutated(), form=st.sampled_from(["trusted", "plain", "user"]))
def test_damaged_archives(space: Path, data: bytes, form: str) -> None:
    _run(space, data, form)


@LENIENT
@given(data=st.lists(hostile_members(), min_size=1, max_size=6).map(lambda parts: tar(*parts)),
       form=st.sampled_from(["trusted", "plain", "user"]))  # fmt: skip
def test_hostile_archives(space: Path, data: bytes, form: str) -> None:
    _run(space, data, form)


@LENIENT
@given(
    data=st.binary(max_size=4096),
    magic=st.sampled_from([b"", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0"]),
)
def test_rubbish(space: Path, data: bytes, magic: bytes) -> None:
    _run(space, magic + data, "trusted")


if __name__ == "__main__":  # pragma: no cover
    import atheris

    base = Path(tempfile.mkdtemp())
    atheris.instrument_all()
    atheris.Setup(sys.argv, lambda data: _run(base, data, "trusted"))
    atheris.Fuzz()
