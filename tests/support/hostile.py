"""Hostile layer archives, as a table: what each must be refused with, and those that are contained instead.

The classes are those of the project's threat list: traversal in every spelling, links out and files through them,
reserved and whiteout names, devices that are whiteouts, sizes and numbers that no file has.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable

from .archives import directory, hardlink, member, patched, symlink, tar

OUT = "../outside"

# archive, what the message must name. {out} is the absolute path of the canaries.
REFUSED: dict[str, tuple[Callable[[str], bytes], str]] = {
    "dotdot": (lambda out: tar(member("../outside/file", b"evil")), r"entry 1 '\.\./outside/file'"),
    "dotdot inside": (lambda out: tar(member("a/../../outside/file", b"evil")), r"entry 1 .*\.\."),
    "dotdot at the end": (lambda out: tar(directory("a/..")), r"entry 1 'a/\.\./'"),
    "dotdot that would stay inside": (lambda out: tar(member("a/../b", b"x")), r"entry 1 'a/\.\./b'"),
    "dotdot in a pax path": (lambda out: tar(member("x", b"evil", pax={"path": "../outside/file"})), r"outside"),
    "dotdot in a long gnu name": (
        lambda out: tar(member("d/" * 60 + "../" * 62 + "outside/file", b"evil", format=tarfile.GNU_FORMAT)), r"entry 1"
    ),
    "dotdot in the prefix": (
        lambda out: patched(member("file", b"evil", format=tarfile.USTAR_FORMAT), (345, b"../outside")) + bytes(1024),
        r"outside/file",
    ),
    "dotdot in a sparse name": (
        lambda out: tar(member("x", b"", pax={"GNU.sparse.size": "0", "GNU.sparse.map": "", "GNU.sparse.name": OUT + "/file"})),
        r"outside/file",
    ),
    "dotdot whiteout": (lambda out: tar(member("../outside/.wh.file")), r"\.wh\.file"),
    "dotdot opaque": (lambda out: tar(member("../outside/.wh..wh..opq")), r"opq"),
    "file through a relative link": (
        lambda out: tar(symlink("l", OUT), member("l/file", b"evil")), r"entry 2 'l/file'.*'l' is a symbolic link"
    ),
    "file through an absolute link": (
        lambda out: tar(symlink("l", out), member("l/file", b"evil")), r"entry 2 'l/file'.*symbolic link"
    ),
    "directory through a link": (
        lambda out: tar(symlink("l", OUT), directory("l/dir", mode=0o777)), r"entry 2 'l/dir/'"
    ),
    "link through a link": (lambda out: tar(symlink("l", OUT), symlink("l/new", "x")), r"entry 2"),
    "whiteout through a link": (lambda out: tar(symlink("l", OUT), member("l/.wh.file")), r"entry 2"),
    "opaque through a link": (lambda out: tar(symlink("l", OUT), member("l/.wh..wh..opq")), r"entry 2"),
    "file through a chain of links": (
        lambda out: tar(symlink("a", "."), symlink("b", "a/.."), member("b/outside/file", b"evil")), r"entry 3"
    ),
    "file through a file": (lambda out: tar(member("f"), member("f/x")), r"entry 2 'f/x'.*'f' is a file"),
    "hard link out": (lambda out: tar(hardlink("h", "../outside/file"), member("h", b"evil")), r"entry 1 'h'"),
    "hard link to an absolute path out": (lambda out: tar(hardlink("h", out + "/file")), r"entry 1 'h'"),
    "hard link through a link": (
        lambda out: tar(symlink("l", out), hardlink("h", "l/file"), member("h", b"evil")), r"entry 2 'h'.*'l/file'"
    ),
    "hard link to a directory": (lambda out: tar(directory("d"), hardlink("h", "d")), r"entry 2 'h'"),
    "hard link to the root": (lambda out: tar(hardlink("h", "./")), r"entry 1 'h'"),
    "hard link to nothing": (lambda out: tar(hardlink("h", "")), r"entry 1 'h'"),
    "hard link to itself": (lambda out: tar(hardlink("h", "h")), r"entry 1 'h'"),
    "hard link to a whiteout": (lambda out: tar(member(".wh.x"), hardlink("h", "x")), r"entry 2 'h'"),
    "hard link to a whiteout's name": (lambda out: tar(member(".wh.x"), hardlink("h", ".wh.x")), r"entry 2 'h'"),
    "hard link that eats its own directory": (
        lambda out: tar(member("a/b", b"x"), hardlink("a", "a/b")), r"entry 2 'a'"
    ),
    "empty name": (lambda out: tar(patched(member("x"), (0, b"\0"))), r"entry 1 ''"),
    "root that is a link": (lambda out: tar(symlink("./", OUT)), r"entry 1 '\.'|entry 1 '\./'"),
    "root that is a file": (lambda out: tar(member("/", b"")), r"entry 1"),
    "NUL in a pax path": (lambda out: tar(member("x", pax={"path": "a\0b"})), r"NUL"),
    "NUL in a link": (lambda out: tar(symlink("l", "x", pax={"linkpath": "a\0b"})), r"entry 1 'l'"),
    "empty link": (lambda out: tar(symlink("l", "")), r"entry 1 'l'"),
    "link target too long": (lambda out: tar(symlink("l", "t" * 5000)), r"entry 1 'l'"),
    "component too long": (lambda out: tar(member("n" * 256)), r"entry 1 'nnn"),
    "name of a megabyte": (
        lambda out: tar(member("n/" * 500_000, pax={})), r"archive entry 1"
    ),
    "5,000 directories deep": (lambda out: tar(member("d/" * 5000 + "f")), r"entry 1 'd/d/"),
    "bare whiteout prefix": (lambda out: tar(member(".wh.")), r"entry 1 '\.wh\.'"),
    "whiteout of dot": (lambda out: tar(member("d/.wh..")), r"entry 1 'd/\.wh\.\.'"),
    "whiteout of dotdot": (lambda out: tar(member("d/.wh...")), r"entry 1 'd/\.wh\.\.\.'"),
    "whiteout of a whiteout": (lambda out: tar(member(".wh..wh.x")), r"entry 1"),
    "directory with a reserved name": (lambda out: tar(member(".wh.d/file")), r"entry 1 '\.wh\.d/file'"),
    "whiteout that is a link": (lambda out: tar(symlink(".wh.x", OUT)), r"entry 1"),
    "whiteout that is a directory": (lambda out: tar(directory(".wh.x")), r"entry 1"),
    "whiteout device": (lambda out: tar(member("x", type=tarfile.CHRTYPE, device=(0, 0))), r"entry 1 'x'.*whiteout"),
    "owner that means leave it": (
        lambda out: tar(member("x", uid=0xFFFFFFFF, format=tarfile.GNU_FORMAT)), r"entry 1 'x'.*owner"
    ),
    "negative owner": (lambda out: tar(member("x", uid=-1, format=tarfile.GNU_FORMAT)), r"owner"),
    "negative size": (lambda out: tar(member("x", size=-1, format=tarfile.GNU_FORMAT)), r"size"),
    "size past any file": (lambda out: tar(member("x", size=1 << 63, format=tarfile.GNU_FORMAT)), r"size"),
    "device number too big": (
        lambda out: tar(member("x", type=tarfile.BLKTYPE, device=(1 << 40, 0), format=tarfile.GNU_FORMAT)), r"entry 1"
    ),
    "device major that no kernel has": (
        lambda out: tar(member("x", type=tarfile.CHRTYPE, device=(0x1000, 0))), r"entry 1 'x'.*device number"
    ),
    "device minor that no kernel has": (
        lambda out: tar(member("x", type=tarfile.BLKTYPE, device=(1, 0x10_0000))), r"entry 1 'x'.*device number"
    ),
    "device major as a negative base-256": (
        lambda out: tar(member("x", type=tarfile.CHRTYPE, device=(0xF000_0000, 0), format=tarfile.GNU_FORMAT)),
        r"entry 1 'x'.*device number",
    ),
    "unknown type": (lambda out: tar(member("x", type=b"Z")), r"entry 1 'x'.*type"),
    "xattr without a name": (lambda out: tar(member("x", pax={"SCHILY.xattr.": "v"})), r"entry 1 'x'"),
    "more attributes than can be listed": (
        lambda out: tar(member("x", pax={f"SCHILY.xattr.user.{n:0200}": "" for n in range(400)})), r"entry 1 'x'.*400"
    ),
    "an attribute too long": (lambda out: tar(member("x", pax={"SCHILY.xattr.user.a": "v" * 70_000})), r"entry 1 'x'.*user\.a"),
    "two pax headers": (
        lambda out: member("x", pax={"a": "1"})[:1024] + member("x", pax={"a": "2"}) + bytes(1024), r"entry 1 has two"
    ),
    "sparse map on a directory": (
        lambda out: tar(directory("d", pax={"GNU.sparse.size": "1", "GNU.sparse.map": "0,1"})), r"entry 1 'd/'"
    ),
    "a billion sparse segments": (
        lambda out: tar(member("x", b"1000000000\n".ljust(512, b"\0"),
                               pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"})),
        r"entry 1 'x'.*sparse",
    ),
    "sparse map without an end": (
        lambda out: tar(member("x", b"9" * 2048,
                               pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"})),
        r"entry 1 'x'.*sparse",
    ),
    "an exabyte of holes": (
        lambda out: tar(member("x", b"", pax={"GNU.sparse.size": str(1 << 60), "GNU.sparse.map": f"{1 << 60},0"})),
        r"entry 1 'x'.*bytes",
    ),
}  # fmt: skip

CONTAINED = {
    "absolute names": tar(member("/etc/passwd", b"mine"), directory("//abs")),
    "a link out is only a link": tar(symlink("l", "/etc/passwd"), symlink("m", "../../../..")),
    "a link is replaced, not written through": tar(symlink("f", "../outside/file"), member("f", b"evil")),
    "a link is replaced by a directory": tar(symlink("d", "../outside"), directory("d"), member("d/file", b"evil")),
    "a directory's attributes do not reach through a link": tar(symlink("d", "../outside"), directory("d", mode=0o777, uid=9)),
    "names with control characters": tar(member("a\nb\x1b[2J", b"x"), directory("\x7f")),
    "a hard link to a link is the link": tar(symlink("l", "../outside/file"), hardlink("h", "l")),
    "aufs book-keeping": tar(directory(".wh..wh.plnk"), member(".wh..wh.plnk/1.2", b"x"), member(".wh..wh.aufs", b"y")),
    "size on a link": patched(hardlink("h", "f"), (124, b"00000000777\0")),
    "set-id program": tar(member("su", b"x", mode=0o6755)),
}  # fmt: skip
CONTAINED["size on a link"] = member("f", b"x") + CONTAINED["size on a link"] + bytes(1024)

SMUGGLED = [
    "trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.metacopy", "trusted.overlay.whiteout",
    "trusted.overlay.overlay.opaque", "user.overlay.opaque", "user.overlay.redirect", "user.containers.override_stat",
    "user.fuseoverlayfs.override_stat", "security.fuseoverlayfs.override_stat",
]  # fmt: skip
