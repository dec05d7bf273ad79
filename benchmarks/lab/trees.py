"""The inputs: trees of small files in layers, big files, tar archives. Seeded, built once, kept in the work folder.

Small files have log-normal sizes (the shape of /usr), their bytes come from one seeded block, so building is cheap
and nothing compresses away to holes. Layers share directories: a fifth of the directories exists in two layers, so
merging is measured too. No whiteouts: unionfs-fuse knows another form, and the trees of all peers must be equal.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .measure import SEED, Lab

BLOCK = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A stack of layer directories, bottom first, and the merged paths of its regular files (relative, as bytes)."""

    layers: tuple[Path, ...]
    names: tuple[bytes, ...]
    list0: Path  # the names, NUL-terminated, for xargs -0
    bytes: int


def built(lab: Lab, name: str, build: Callable[[Path], None]) -> Path:
    """The input called ``name``; built in a folder beside it and renamed, so a killed build is built again."""
    final = lab.inputs / name
    if not final.exists():
        lab.say(f"  building input {name}")
        draft = lab.inputs / f"new-{name}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        build(draft)
        os.sync()
        draft.rename(final)
    return final


def _block(seed: str) -> memoryview:
    return memoryview(random.Random(f"{SEED}/{seed}").randbytes(BLOCK))


def small_files(lab: Lab, files: int, *, layers: int = 3, median: int = 3072, salt: str = "walk") -> Tree:
    """A tree of ``files`` small files, about 12 a directory, over ``layers`` layers.

    Args:
        median: the median size in bytes; the mean is 3.6 times that (sigma 1.6), the largest 1 MiB.
    """

    def build(draft: Path) -> None:
        rng = random.Random(f"{SEED}/{salt}/{files}/{layers}/{median}")
        block = _block(salt)
        names: list[bytes] = []
        total = 0
        roots = [draft / f"{n:02}" for n in range(layers)]
        for root in roots:
            root.mkdir()
        number = 0
        directory = 0
        while number < files:
            here = f"d{directory // 400:02}/s{directory // 20 % 20:02}/e{directory % 20:02}"
            homes = [roots[directory % layers]]
            if directory % 5 == 0:
                homes.append(roots[(directory + 1) % layers])
            for home in homes:
                (home / here).mkdir(parents=True, exist_ok=True)
            for _ in range(min(rng.randint(1, 23), files - number)):
                size = min(int(rng.lognormvariate(0, 1.6) * median), 1 << 20)
                at = rng.randrange(0, BLOCK - size)
                path = f"{here}/file-{number:06}.dat"
                with open(rng.choice(homes) / path, "wb") as file:
                    file.write(block[at : at + size])
                names.append(path.encode())
                total += size
                number += 1
            directory += 1
        names.sort()
        (draft / "names0").write_bytes(b"".join(name + b"\0" for name in names))
        (draft / "bytes").write_text(str(total))

    root = built(lab, f"{salt}-{files}-{layers}-{median}", build)
    names = tuple((root / "names0").read_bytes().split(b"\0")[:-1])
    return Tree(
        layers=tuple(root / f"{n:02}" for n in range(layers)),
        names=names,
        list0=root / "names0",
        bytes=int((root / "bytes").read_text()),
    )


def empty_files(lab: Lab, files: int) -> Tree:
    """A tree of ``files`` empty files, 200 a directory, in one layer: for counting what a cached node costs."""

    def build(draft: Path) -> None:
        names = []
        for first in range(0, files, 200):
            here = f"a{first // 20_000:02}/b{first // 200 % 100:02}"
            folder = draft / "00" / here
            folder.mkdir(parents=True)
            for number in range(first, min(first + 200, files)):
                name = f"file-{number:06}.dat"
                os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o644))
                names.append(f"{here}/{name}".encode())
        (draft / "names0").write_bytes(b"".join(name + b"\0" for name in names))

    root = built(lab, f"empty-{files}", build)
    names = tuple((root / "names0").read_bytes().split(b"\0")[:-1])
    return Tree(layers=(root / "00",), names=names, list0=root / "names0", bytes=0)


def write_big(path: Path, size: int, salt: str = "big") -> None:
    """Writes ``size`` bytes without holes and without two equal 4 KiB blocks in a row."""
    rng = random.Random(f"{SEED}/{salt}")
    chunk = bytearray(rng.randbytes(min(size, BLOCK)))
    with open(path, "wb", buffering=0) as file:
        left = size
        while left:
            part = memoryview(chunk)[: min(left, len(chunk))]
            chunk[:8] = left.to_bytes(8, "little")
            file.write(part)
            left -= len(part)


def big_file(lab: Lab, size: int) -> Path:
    """A layer directory with one file ``big`` of ``size`` bytes."""

    def build(draft: Path) -> None:
        write_big(draft / "big", size)
        (draft / "note").write_bytes(b"beside the big file\n")

    return built(lab, f"big-{size}", build)


def deep_stack(lab: Lab, layers: int, *, entries: int = 200) -> tuple[Path, ...]:
    """``layers`` layer directories, bottom first, that all have ``common/``; ``entries`` files are spread over them."""

    def build(draft: Path) -> None:
        for number in range(layers):
            (draft / f"{number:03}" / "common").mkdir(parents=True)
            (draft / f"{number:03}" / f"own-{number:03}").write_bytes(b"x\n")
        for number in range(entries):
            (draft / f"{number * layers // entries:03}" / "common" / f"entry-{number:04}").write_bytes(b"y\n")

    root = built(lab, f"deep-{layers}-{entries}", build)
    return tuple(root / f"{number:03}" for number in range(layers))


def archive(lab: Lab, tree: Tree, salt: str) -> Path:
    """The tree's merged files as one uncompressed tar, directories first, as GNU tar writes a package."""

    def build(draft: Path) -> None:
        merged = draft / "merged"
        merged.mkdir()
        for layer in tree.layers:
            subprocess.run(["cp", "-a", "--", f"{layer}/.", merged], check=True)
        subprocess.run(["tar", "-C", merged, "--sort=name", "-cf", draft / "tree.tar", "."], check=True)
        shutil.rmtree(merged)

    return built(lab, f"tar-{salt}-{len(tree.names)}", build) / "tree.tar"


def members(tar: Path) -> int:
    """How many entries an archive has."""
    with tarfile.open(tar) as opened:
        return sum(1 for _ in opened)
