"""Hostile archives: each is refused with its entry named, or contained; nothing outside changes.

The classes are those of the project's threat list: traversal in every spelling, links out and
files through them, reserved and whiteout names, smuggled overlay attributes, devices that are
whiteouts, bombs, races.
"""

from __future__ import annotations

import io
import os
import resource
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from support import trees
from support.archives import apply, canaries, directory, hardlink, member, symlink, tar
from support.hostile import CONTAINED, OUT, REFUSED, SMUGGLED

from cowfs.archive import ApplyOptions, apply_layer
from cowfs.errors import CowfsError


@pytest.mark.parametrize("form", ["trusted", "user", "plain"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_nothing_outside_changes(space: Path, case: str, form: str) -> None:
    build, message = REFUSED[case]
    with canaries(space), pytest.raises(CowfsError, match=message) as caught:
        apply(build(str(space / "outside")), space / "layer", form=form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_a_tree_that_has_links_out_already(space: Path, case: str) -> None:
    """A lower layer may have planted links; they are replaced, never followed."""
    layer = space / "layer"
    layer.mkdir()
    for name in ("a", "b", "d", "l", "h", "x", "outside"):
        os.symlink(OUT, layer / name)
    build, _ = REFUSED[case]
    with canaries(space):
        try:
            apply(build(str(space / "outside")), layer, form="plain")
        except (CowfsError, OSError):
            pass


def test_links_planted_by_a_lower_layer_are_replaced_not_followed(space: Path) -> None:
    layer = space / "layer"
    layer.mkdir()
    for name in ("dir", "file", "gone", "opq", "implied", "hard"):
        os.symlink(OUT if name != "file" else OUT + "/file", layer / name)
    with canaries(space):
        apply(
            tar(
                directory("dir", mode=0o777, uid=5), member("dir/file", b"evil"), member("file", b"evil"),
                member(".wh.gone"), member("opq/.wh..wh..opq"), member("implied/file", b"evil"),
                member("hard", b"x"), hardlink("hard2", "hard"),
            ),
            layer, form="plain",
        )  # fmt: skip
    assert sorted(trees.snapshot(layer)) == [
        "", "dir", "dir/file", "file", "hard", "hard2", "implied", "implied/file", "opq",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["trusted", "plain"])
@pytest.mark.parametrize("case", CONTAINED)
def test_contained(space: Path, case: str, form: str) -> None:
    with canaries(space):
        apply(CONTAINED[case], space / "layer", form=form)


@pytest.mark.parametrize("form", ["trusted", "user", "plain"])
def test_no_overlay_attribute_survives(space: Path, form: str) -> None:
    pax = {f"SCHILY.xattr.{name}": "y" for name in SMUGGLED} | {"SCHILY.xattr.user.fine": "kept"}
    done = apply(
        tar(directory("./", pax=pax), directory("d", pax=pax), member("f", b"x", pax=pax), symlink("l", "x", pax={
            k: v for k, v in pax.items() if "user" not in k})),
        space / "layer", form=form,
    )  # fmt: skip
    for path, entry in trees.snapshot(space / "layer").items():
        assert dict(entry.xattrs) == ({} if path == "l" else {"user.fine": b"kept"})
    assert set(done.dropped) == set(SMUGGLED)


def test_replaced_files_do_not_change_what_shares_their_inode(space: Path) -> None:
    """A layer hard-linked to other storage (as stores that share files do) must not be written through."""
    store = space / "shared-store"
    store.write_bytes(b"committed")
    layer = space / "layer"
    layer.mkdir()
    os.link(store, layer / "f")
    apply(tar(member("f", b"new", mode=0o777, uid=5)), layer, form="plain")
    assert store.read_bytes() == b"committed"
    assert os.stat(store).st_uid == 0


BOMB = r"""
import io, os, sys, tarfile
sys.path[:0] = {path!r}
from cowfs.archive import apply_layer, ApplyOptions
from cowfs.errors import CowfsError
{setup}
def chunks():
{body}
class Stream(io.RawIOBase):
    def __init__(self): self.it = chunks(); self.rest = b""
    def read(self, n=-1):
        while len(self.rest) < n:
            piece = next(self.it, b"")
            if not piece: break
            self.rest = self.rest + piece if self.rest else piece
        data, self.rest = self.rest[:n], self.rest[n:]
        return data
try:
    apply_layer(Stream(), sys.argv[1], form=sys.argv[2], log=open(os.devnull, "wb"), on_file=lambda *a: None, options=ApplyOptions({options}))
    print("applied")
except CowfsError as error:
    print(type(error).__name__, error)
for line in open("/proc/self/status"):  # ru_maxrss would be that of the process that started this one, if larger
    if line.startswith("VmHWM:"):
        print(line.split()[1])
"""

SETUP = """
def head(name, size=0, type=b"0", link="", pax=None):
    info = tarfile.TarInfo(name); info.size, info.type, info.linkname = size, type, link
    info.pax_headers = pax or {}
    return info.tobuf(tarfile.PAX_FORMAT)
"""

BOMBS = {
    "a million empty files in one directory": (
        "    for n in range(10_000_000): yield head(f'{n:x}')", "max_entries=100_000", "more than 100000 entries"),
    "directories without end": (
        "    for n in range(10_000_000): yield head(f'{n:x}/', type=b'5')", "max_entries=30_000", "more than 30000"),
    "directories that come back": (
        "    for n in range(10_000_000): yield head(f'd{n % 3000}/f{n:x}')", "max_entries=30_000", "more than 30000"),
    "one endless file": (
        "    yield head('f', 1 << 39)\n    while True: yield bytes(1 << 20)", "max_bytes=200 << 20", "longer than"),
    "a header of a gigabyte": (
        "    info = tarfile.TarInfo('x'); info.type = b'x'; info.size = 1 << 30; yield info.tobuf(tarfile.USTAR_FORMAT)\n"
        "    while True: yield b'9' * (1 << 20)", "", "extension header"),
    "extension headers without end": (
        "    import itertools\n    pax = head('x', pax={'comment': 'y' * 900_000})\n"
        "    for n in range(300): yield pax[:-512] + head(f'f{n}')", "", "applied"),
    "thirty thousand attributes": (
        "    yield head('x', pax={f'SCHILY.xattr.user.{n}': '' for n in range(30_000)})", "", "more than can be listed"),
    "a sparse map of a million segments": (
        "    count = 1 << 20\n    listed = (f'{count}\\n' + ''.join(f'{n * 2}\\n1\\n' for n in range(count))).encode()\n"
        "    listed += bytes(-len(listed) % 512)\n"
        "    yield head('x', len(listed) + count, pax={'GNU.sparse.major': '1', 'GNU.sparse.minor': '0',"
        " 'GNU.sparse.realsize': str(2 * count)})\n"
        "    yield listed; yield b'x' * count", "", "applied"),
    "one file twenty thousand times": (
        "    for n in range(20_000): yield head('f', 5) + b'hello' + bytes(507)", "", "applied"),
    "rubbish behind the end": (
        "    noise = os.urandom(1 << 20); yield head('f') + bytes(1024)\n    while True: yield noise", "max_bytes=60 << 20", "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["trusted", "plain"])
@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_bounded_in_memory(space: Path, case: str, form: str) -> None:
    """The whole process stays under 200 MB: at the limits' defaults, whatever the archive is."""
    body, options, message = BOMBS[case]
    layer = space / "layer"
    layer.mkdir()
    if form == "plain":
        (layer / "old").touch()  # not fresh: what the archive wrote is kept track of
    script = BOMB.format(path=sys.path, setup=SETUP, body=body, options=options)
    done = subprocess.run(
        [sys.executable, "-c", script, str(layer), form], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.strip().rsplit("\n", 1) if "\n" in done.stdout.strip() else ("", done.stdout)
    assert message in said
    assert int(peak) < 200 << 10, f"{int(peak) >> 10} MB"


def test_a_mostly_empty_file_is_not_copied_to_the_log_when_it_is_replaced(space: Path) -> None:
    big = 1 << 36
    pax = {"GNU.sparse.size": str(big), "GNU.sparse.map": f"{big},0"}
    log = io.BytesIO()
    apply(tar(member("x", pax=pax), member("x", b"now small")), space / "layer", log=log)
    assert len(log.getvalue()) < 10_000


# Races -------------------------------------------------------------------------------------------


def _swapper(path: Path, target: Path, stop: threading.Event, swaps: list[int]) -> None:
    """Swap the directory ``path`` for a link to ``target`` and back, as fast as it goes."""
    aside = path.with_name(path.name + "-aside")
    while not stop.is_set():
        try:
            os.rename(path, aside)
            os.symlink(target, path)
            os.unlink(path)
            os.rename(aside, path)
            swaps[0] += 1
        except OSError:
            for step in (lambda: os.unlink(path), lambda: os.rename(aside, path)):
                try:
                    step()
                except OSError:
                    pass


def test_swapping_a_directory_for_a_link_during_apply_reaches_nothing_outside(space: Path) -> None:
    layer = space / "layer"
    (layer / "d").mkdir(parents=True)
    # entries of two directories in turn, with more directories than stay open between: each step opens anew
    entries = [
        directory(f"x{n % 300}/y") if n % 2 else member(f"d/file{n % 7}", b"evil", mode=0o777) for n in range(900)
    ]
    stop, swaps = threading.Event(), [0]
    with canaries(space):
        thread = threading.Thread(target=_swapper, args=(layer / "d", space / "outside", stop, swaps))
        thread.start()
        try:
            rounds = 0
            while swaps[0] < 1000 and rounds < 400:
                rounds += 1
                try:
                    apply(tar(*entries, member("d/.wh.dir"), member("d/.wh.link")), layer, form="plain")
                except (CowfsError, OSError):
                    pass
        finally:
            stop.set()
            thread.join()
    assert swaps[0] >= 1000


def test_swapping_a_directory_for_a_link_during_export_reads_nothing_outside(space: Path) -> None:
    from cowfs.archive import export_layer

    layer = space / "layer"
    for n in range(30):
        (layer / "d" / f"s{n}").mkdir(parents=True)
        (layer / "d" / f"s{n}" / "f").write_bytes(b"inside")
    stop, swaps = threading.Event(), [0]
    with canaries(space):
        thread = threading.Thread(target=_swapper, args=(layer / "d", space / "outside", stop, swaps))
        thread.start()
        try:
            rounds = 0
            while swaps[0] < 1000 and rounds < 2000:
                rounds += 1
                out = io.BytesIO()
                try:
                    export_layer(str(layer), out, form="plain")
                except (CowfsError, OSError):
                    pass
                assert b"canary" not in out.getvalue()
        finally:
            stop.set()
            thread.join()
    assert swaps[0] >= 1000


def test_a_fifo_in_place_of_a_file_does_not_hang_an_export(space: Path) -> None:
    from cowfs.archive import export_layer

    layer = space / "layer"
    layer.mkdir()
    os.mkfifo(layer / "passwd")
    out = io.BytesIO()
    export_layer(str(layer), out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert [(info.name, info.type) for info in archive] == [(".", tarfile.DIRTYPE), ("passwd", tarfile.FIFOTYPE)]


def test_nothing_of_the_archive_is_run_or_mounted(space: Path) -> None:
    """Decompression is in this process: a PATH without any program changes nothing."""
    import gzip

    old = os.environ.get("PATH", "")
    os.environ["PATH"] = str(space)
    try:
        done = apply(gzip.compress(tar(member("f", b"x"))), space / "layer")
    finally:
        os.environ["PATH"] = old
    assert done.compression == "gzip"


def test_a_full_disk_is_that_errno_with_the_entry(space: Path) -> None:
    from support import namespace

    small = space / "small"
    small.mkdir()
    namespace.mount("tmpfs", str(small), "tmpfs", 0, "size=1m")
    try:
        with pytest.raises(OSError, match=r"entry 2 'big'") as caught:
            apply(tar(member("ok", b"x"), member("big", bytes(4 << 20))), small / "layer")
        assert caught.value.errno == 28
    finally:
        namespace.umount(str(small))


@pytest.mark.parametrize("form", ["trusted", "plain"])
def test_more_directories_than_stay_open_are_used_in_one_step(space: Path, form: str) -> None:
    """A descriptor that left the cache is never used again, whatever number it has by then."""
    full = space / "layer"
    full.mkdir()
    count = 400
    for n in range(count):
        (full / "top" / f"s{n}").mkdir(parents=True)
        (full / "top" / f"s{n}" / "old").touch()
    names = [f"src{n}" for n in range(count)]
    apply(
        tar(
            *(member(f"{name}/f", name.encode()) for name in names),
            *(hardlink(f"links/{name}", f"{name}/f") for name in names),
            *(member(f"top/s{n}/new", b"n") for n in range(count)),
            member("top/.wh..wh..opq"),
            member("links/last", b"z"),
        ),
        full, form=form,
    )  # fmt: skip
    for name in names:
        assert (full / "links" / name).read_bytes() == name.encode()
    for n in range(count):
        assert os.listdir(full / "top" / f"s{n}") == ["new"]
    assert (full / "links" / "last").read_bytes() == b"z"


def test_descriptors_are_given_back_after_an_error(space: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        with pytest.raises(CowfsError):
            apply(tar(*(directory(f"d{n}") for n in range(30)), member("../x")), space / f"layer{n}")
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_descriptors_are_given_back_when_not_even_the_root_can_be_set(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("cowfs.archive.attributes.Attributes.set", refuse)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(10):
        with pytest.raises(OSError, match="Input/output"):
            apply(tar(member("f")), space / f"layer{n}")
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_target_may_be_a_descriptor_and_stays_the_callers(space: Path) -> None:
    fd = os.open(space, os.O_RDONLY | os.O_DIRECTORY)
    try:
        apply_layer(io.BytesIO(tar(member("f", b"x"))), fd, options=ApplyOptions())
        assert stat.S_ISREG(os.stat("f", dir_fd=fd).st_mode)
    finally:
        os.close(fd)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
