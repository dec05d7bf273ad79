"""Two names are one file where the host says so, and nowhere else: over file systems whose inode numbers and uuids do not tell.

A model in memory says which names are one file, and what is in each; the mount is changed by names, remounted, its stack copied.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cowfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop mounts: needs root")

HOSTS = ("squashfs", "erofs", "ext4", "xfs", "btrfs", "tmpfs", "plain")


def run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def need(*programs: str) -> None:
    for name in programs:
        if shutil.which(name, path=os.environ["PATH"] + ":/sbin:/usr/sbin") is None:
            pytest.skip(f"{name} is not installed")


def fill(place: Path, tag: str) -> None:
    """Eight files, every second one with two names, in one directory of a layer."""
    (place / tag).mkdir(parents=True)
    for number in range(8):
        (place / tag / f"f{number}").write_text(f"{tag}{number} as it was")
        if number % 2:
            os.link(place / tag / f"f{number}", place / tag / f"g{number}")


class Layers:
    """Two layers with the same inode numbers, on file systems with one uuid, or none."""

    def __init__(self, base: Path, host: str) -> None:
        self.mounts: list[Path] = []
        self.paths = [base / "A", base / "B"]
        for path in self.paths:
            path.mkdir()
        getattr(self, f"_{host}")(base)

    def _image(self, base: Path, make: Any) -> None:
        for path in self.paths:
            source, image = base / f"source-{path.name}", base / f"{path.name}.img"
            fill(source, path.name)
            make(source, image)
            self._mount("-o", "loop,ro", image, path)

    def _mount(self, *arguments: object) -> None:
        run("mount", *arguments)
        self.mounts.append(Path(str(arguments[-1])))

    def _squashfs(self, base: Path) -> None:
        need("mksquashfs")
        self._image(base, lambda source, image: run("mksquashfs", source, image, "-quiet", "-no-progress"))

    def _erofs(self, base: Path) -> None:
        need("mkfs.erofs")
        self._image(
            base, lambda source, image: run("mkfs.erofs", "-U", "0" * 8 + "-0000-0000-0000-" + "0" * 12, image, source)
        )

    def _clones(self, base: Path, fs: str, size: str, options: str) -> None:
        need(f"mkfs.{fs}")
        run("truncate", "-s", size, base / "A.img")
        run(f"mkfs.{fs}", "-q", base / "A.img")
        shutil.copy(base / "A.img", base / "B.img")
        for path in self.paths:
            self._mount("-o", options, base / f"{path.name}.img", path)
            fill(path, path.name)

    def _ext4(self, base: Path) -> None:
        self._clones(base, "ext4", "64M", "loop")

    def _xfs(self, base: Path) -> None:
        self._clones(base, "xfs", "320M", "loop,nouuid")

    def _btrfs(self, base: Path) -> None:
        need("mkfs.btrfs", "btrfs")
        (base / "pool").mkdir()
        run("truncate", "-s", "128M", base / "btrfs.img")
        run("mkfs.btrfs", "-q", base / "btrfs.img")
        self._mount("-o", "loop", base / "btrfs.img", base / "pool")
        for path in self.paths:
            path.rmdir()
            run("btrfs", "subvolume", "create", base / "pool" / path.name)
            path.symlink_to(base / "pool" / path.name)
            fill(path, path.name)
        self.paths = [base / "pool" / path.name for path in self.paths]

    def _tmpfs(self, base: Path) -> None:
        for path in self.paths:
            self._mount("-t", "tmpfs", "tmpfs", path)
            fill(path, path.name)

    def _plain(self, base: Path) -> None:
        for path in self.paths:
            fill(path, path.name)

    def close(self) -> None:
        for path in reversed(self.mounts):
            subprocess.run(["umount", "-l", path], check=False)


@pytest.fixture(params=HOSTS)
def layers(request: pytest.FixtureRequest, space: Path, can_mount: None) -> Iterator[Layers]:
    made = Layers(space, request.param)
    try:
        yield made
    finally:
        made.close()


class Model:
    """Which names there are, which of them are one file, and what is in it."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}  # name -> [content]: one list a file
        for tag in "AB":
            for number in range(8):
                held = [f"{tag}{number} as it was"]
                self.files[f"{tag}/f{number}"] = held
                if number % 2:
                    self.files[f"{tag}/g{number}"] = held

    def step(self, rng: random.Random, mnt: Path) -> None:
        """One random change, of the mount and of the model."""
        name = rng.choice(sorted(self.files))
        other = f"{rng.choice('AB')}/n{rng.randrange(30)}"
        what = rng.choice(("append", "append", "rewrite", "link", "unlink", "rename", "new", "chmod"))
        if what == "append":
            with open(mnt / name, "a") as file:
                file.write(f" {other}")
            self.files[name][0] += f" {other}"
        elif what == "rewrite":
            (mnt / name).write_text(other)
            self.files[name][0] = other
        elif what == "link" and other not in self.files:
            os.link(mnt / name, mnt / other)
            self.files[other] = self.files[name]
        elif what == "unlink" and len(self.files) > 4:
            (mnt / name).unlink()
            del self.files[name]
        elif what == "rename" and self.files.get(other) is not self.files[name]:
            os.rename(mnt / name, mnt / other)
            self.files[other] = self.files.pop(name)
        elif what == "new":
            (mnt / other).unlink(missing_ok=True)
            (mnt / other).write_text("new")
            self.files[other] = ["new"]
        elif what == "chmod":
            os.chmod(mnt / name, rng.choice((0o600, 0o644)))

    def check(self, mnt: Path) -> None:
        there = {f"{tag}/{entry.name}" for tag in "AB" for entry in os.scandir(mnt / tag)}
        assert there == self.files.keys()
        numbers: dict[int, str] = {}
        for name, held in sorted(self.files.items()):
            assert (mnt / name).read_text() == held[0], name
            status = os.stat(mnt / name)
            same = sorted(other for other, its in self.files.items() if its is held)
            assert status.st_nlink == len(same), (name, same)
            first = numbers.setdefault(status.st_ino, name)
            assert self.files[first] is held, f"{first} and {name} show one number, and are two files"
            assert os.stat(mnt / same[0]).st_ino == status.st_ino, (
                f"{same[0]} and {name} are one file, and show two numbers"
            )


@pytest.mark.parametrize("row", [None, 4096])
def test_a_file_is_itself(layers: Layers, space: Path, row: int | None, request: pytest.FixtureRequest) -> None:
    """Random changes through hard links, with remounts, dropped caches, and the upper copied (cp -a) to stand over the same layers."""
    rng = random.Random(request.config.getoption("--seed"))
    model = Model()
    mnt, upper = space / "mnt", space / "upper"
    mnt.mkdir()
    for round in range(6):
        with cowfs.mount(layers.paths, mnt, upper=upper, row=row):
            model.check(mnt)
            for step in range(25):
                model.step(rng, mnt)
                if step % 10 == 9:
                    Path("/proc/sys/vm/drop_caches").write_text("2")
            model.check(mnt)
        if round % 2 and row is None:
            copy = space / f"upper-{round}"
            run("cp", "-a", upper, copy)
            record = space / f".{upper.name}.cowfs"
            shutil.copytree(record, space / f".{copy.name}.cowfs", symlinks=True)
            text = (space / f".{copy.name}.cowfs" / "state.json").read_text()
            (space / f".{copy.name}.cowfs" / "state.json").write_text(
                text.replace(f'"../{upper.name}"', f'"../{copy.name}"')
            )
            upper = copy


def test_a_number_that_was_given_again_is_not_the_old_file(space: Path, can_mount: None) -> None:
    """The file that an origin names is gone, a new one has its number: writing the one never changes the other."""
    need("mkfs.ext4")
    run("truncate", "-s", "64M", space / "img")
    run("mkfs.ext4", "-q", "-N", "2000", space / "img")
    (space / "fs").mkdir()
    run("mount", "-o", "loop", space / "img", space / "fs")
    try:
        lower, upper, mnt = space / "fs" / "lower", space / "fs" / "upper", space / "mnt"
        lower.mkdir()
        mnt.mkdir()
        for number in range(20):
            (lower / f"f{number}").write_text(f"f{number}")
            os.link(lower / f"f{number}", lower / f"g{number}")
        with cowfs.mount([lower], mnt, upper=upper):
            for number in range(20):
                (mnt / f"f{number}").write_text(f"changed {number}")
        old = {os.stat(lower / f"f{number}").st_ino for number in range(20)}
        for entry in os.scandir(lower):
            os.unlink(entry)
        with cowfs.mount([lower], mnt, upper=upper):
            for number in range(300):
                (mnt / f"n{number}").write_text(f"new {number}")
                os.link(mnt / f"n{number}", mnt / f"o{number}")
            again = {os.stat(upper / f"n{number}").st_ino for number in range(300)} & old
            assert again, "the host gave no number a second time: the test shows nothing"
            for number in range(20):
                assert (mnt / f"f{number}").read_text() == f"changed {number}"
                assert os.path.samefile(mnt / f"f{number}", mnt / f"g{number}")
            for number in range(300):
                assert (mnt / f"o{number}").read_text() == f"new {number}"
            shown = [
                os.stat(mnt / f"{letter}{number}").st_ino
                for letter, count in (("f", 20), ("n", 300))
                for number in range(count)
            ]
            assert len(set(shown)) == len(shown)
    finally:
        subprocess.run(["umount", "-l", space / "fs"], check=False)
