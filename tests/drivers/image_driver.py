"""A driver whose layers are no directories: each is an ext4 image that is mounted when its tree is wanted.

It stands on :mod:`cowfs.driver` alone, as one from elsewhere would; ``test_image.py`` installs it by an entry point.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cowfs.driver import Driver, MountPlan
from cowfs.model import Limit, Usage

SIZE = 24 << 20  # bytes


class ImageDriver(Driver):
    name = "image"
    whole = True

    def __init__(self, root: str, **options: Any) -> None:
        super().__init__(root, **options)
        self.unmounted = 0  # how often a tree was let go of

    def tree(self, id: str) -> str:
        return f"{self.directory(id)}/mnt/fs"

    def work(self, id: str) -> str:
        return f"{self.directory(id)}/mnt/work"

    def _attach(self, id: str) -> bool:
        """Have the image mounted; whether it was not."""
        directory = self.directory(id)
        if os.path.ismount(f"{directory}/mnt"):
            return False
        if not os.path.exists(f"{directory}/image"):
            raise FileNotFoundError(2, os.strerror(2), f"{directory}/image")
        _run("mount", "-o", "loop", f"{directory}/image", f"{directory}/mnt")
        return True

    def _detach(self, id: str) -> None:
        """Unmount it; descriptors of what is in it stay good."""
        place = f"{self.directory(id)}/mnt"
        while os.path.ismount(place):
            _run("umount", "-l", place)
            self.unmounted += 1

    @contextmanager
    def open_tree(self, id: str) -> Iterator[int]:
        mine = self._attach(id)
        try:
            with super().open_tree(id) as fd:
                yield fd
        finally:
            if mine:
                self._detach(id)

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        directory = self.directory(id)
        os.mkdir(f"{directory}/mnt", 0o700)
        if parents:
            with self.open_tree(parents[0]):
                _run("sync", "-f", self.tree(parents[0]))  # what the parent's file system holds is in its image
                _run("cp", "--sparse=always", f"{self.directory(parents[0])}/image", f"{directory}/image")
            return self.usage(id)
        with open(f"{directory}/image", "wb") as file:
            file.truncate(SIZE)
        _run("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal", f"{directory}/image")
        self._attach(id)
        try:
            os.mkdir(self.tree(id), 0o755)
            os.chmod(self.tree(id), 0o755)
            os.mkdir(self.work(id), 0o700)
        finally:
            self._detach(id)
        return Usage()

    def plan(self, id: str, parents: Sequence[str], *, readonly: bool = False, limit: Limit = Limit()) -> MountPlan:  # noqa: B008
        for one in (id, *parents[:1]) if readonly else (id,):
            if os.path.isdir(self.directory(one)):  # "cowfs info" asks for a sample
                self._attach(one)
        return super().plan(id, parents, readonly=readonly, limit=limit)

    def remove(self, id: str) -> None:
        if os.path.isdir(self.directory(id)):
            self._detach(id)
        super().remove(id)

    def check(self, id: str) -> list[str]:
        image = f"{self.directory(id)}/image"
        return [] if os.path.isfile(image) else [f"layer {id} has no image: {image}"]


def _run(*command: str) -> None:
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or command[0]
    done = subprocess.run([program, *command[1:]], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(5, f"{' '.join(command)}: {done.stderr.strip()}")
