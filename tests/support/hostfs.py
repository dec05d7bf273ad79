"""Filesystems of the host to put layers on.

One small image a filesystem and pytest session, sparse, attached by ``mount -o loop`` (the
kernel detaches the loop device with the last unmount). Every test gets a fresh directory in
it, removed after the test. A missing file system is a skip that names it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cowfs.sys import btrfs

from . import namespace

#: name -> (program that makes it, its arguments, image bytes)
IMAGES = {
    "ext4": ("mkfs.ext4", ["-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal"], 256 << 20),
    "xfs": ("mkfs.xfs", ["-q", "-f"], 320 << 20),
    "btrfs": ("mkfs.btrfs", ["-q", "-f", "-M"], 256 << 20),
}
NAMES = ("tmpfs", *IMAGES)


@dataclass(slots=True)
class HostFs:
    """A mounted filesystem; ``fresh()`` gives an empty directory in it."""

    name: str
    root: Path
    _count: int = field(default=0)
    _given: list[Path] = field(default_factory=list)

    def fresh(self, label: str = "t") -> Path:
        """A new empty directory, readable by everybody."""
        self._count += 1
        path = self.root / f"{label}-{self._count}"
        path.mkdir()
        path.chmod(0o755)
        self._given.append(path)
        return path

    def clear(self) -> None:
        """Remove the directories that were given: the image is small, and the session's tests are many."""
        for path in self._given:
            if self.name == "btrfs":
                delete_subvolumes(path)
            subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False, capture_output=True)
        self._given.clear()


def delete_subvolumes(path: Path) -> None:
    """Delete the subvolumes below a directory of btrfs, which ``rm --one-file-system`` leaves."""
    for at, names, _ in os.walk(path):
        for name in list(names):
            below = os.path.join(at, name)
            if os.lstat(below).st_ino != btrfs.FIRST_INO or os.path.ismount(below):
                continue
            fd = os.open(at, os.O_RDONLY | os.O_DIRECTORY)
            try:
                btrfs.destroy(fd, os.fsencode(name))
                names.remove(name)
            except OSError:
                pass
            finally:
                os.close(fd)


def known_to_kernel(name: str) -> bool:
    """Whether the kernel has (or can load) the filesystem."""
    with open("/proc/filesystems", encoding="ascii") as listing:
        if any(line.split()[-1] == name for line in listing):
            return True
    return subprocess.run(["modprobe", "-q", name], check=False).returncode == 0 if shutil.which("modprobe") else False


def make_image(name: str, base: Path, size: int | None = None, extra: str = "") -> Path:
    """Create, format and loop-mount ``base/name.img`` at ``base/name``; skip where it cannot be.

    ``size`` is in bytes (None: the default of the table); ``extra`` are more mount options.
    """
    program, arguments, default = IMAGES[name]
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed")
    if not known_to_kernel(name):
        pytest.skip(f"the kernel has no {name}")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no loop devices on this host")
    image = base / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(size or default)
    subprocess.run([path, *arguments, str(image)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target = base / name
    target.mkdir()
    options = "loop" + ("," + extra if extra else "")
    done = subprocess.run(
        ["mount", "-t", name, "-o", options, str(image), str(target)], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"cannot loop-mount {name}: {done.stderr.strip()}")
    return target


def make_tmpfs(base: Path, size: str = "2g", name: str = "tmpfs", inodes: str = "0") -> Path:
    """Mount a tmpfs of ``size`` at ``base/name``."""
    target = base / name
    target.mkdir()
    namespace.mount("tmpfs", str(target), "tmpfs", 0, f"size={size},nr_inodes={inodes},mode=755")
    return target


def open_fs(name: str, base: Path) -> HostFs:
    """The filesystem ``name``, mounted below ``base``."""
    if namespace.why_not:
        pytest.skip(namespace.why_not)
    return HostFs(name, make_tmpfs(base) if name == "tmpfs" else make_image(name, base))


def unmount_below(path: Path) -> None:
    """Take off whatever a test left mounted below a directory, at once."""
    with open("/proc/self/mounts", encoding="utf-8") as file:
        found = [line.split()[1] for line in file if line.split()[1].startswith(f"{path}/")]
    for target in sorted(found, reverse=True):
        subprocess.run(["umount", "-l", target], check=False)
