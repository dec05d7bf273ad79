"""Both implementations behind cowfs.sys.xattr do the same: Python's own calls, and the package that stands in for them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cowfs.sys import _xattr_package


@pytest.fixture
def file(space: Path) -> Path:
    path = space / "file"
    path.write_bytes(b"")
    os.symlink("file", space / "link")
    return path


def test_what_one_writes_the_other_reads(file: Path) -> None:
    for index, value in enumerate((b"", b"x", os.urandom(4000))):
        _xattr_package.setxattr(str(file), f"user.{index}", value)
        assert os.getxattr(file, f"user.{index}") == value
        os.setxattr(file, f"user.o{index}", value)
        assert _xattr_package.getxattr(os.fsencode(file), f"user.o{index}".encode()) == value
    assert sorted(_xattr_package.listxattr(str(file))) == sorted(os.listxattr(file))
    fd = os.open(file, os.O_RDONLY)
    assert _xattr_package.getxattr(fd, b"user.1") == b"x"
    os.close(fd)
    _xattr_package.removexattr(str(file), "user.1")
    assert "user.1" not in os.listxattr(file)


def test_errors_have_the_same_numbers(file: Path) -> None:
    link = str(file.parent / "link")
    for call, code in (
        (lambda m: m.getxattr(str(file), "user.none"), errno.ENODATA),
        (lambda m: m.removexattr(str(file), "user.none"), errno.ENODATA),
        (lambda m: m.setxattr(str(file), "user.none", b"", os.XATTR_REPLACE if m is os else m.REPLACE), errno.ENODATA),
        (lambda m: m.getxattr(str(file) + "-not", "user.none"), errno.ENOENT),
        (lambda m: m.setxattr(link, "user.x", b"", follow_symlinks=False), errno.EPERM),
    ):
        for module in (os, _xattr_package):
            with pytest.raises(OSError) as caught:
                call(module)
            assert caught.value.errno == code, module


def test_the_package_stands_in_where_python_has_no_calls(file: Path) -> None:
    """A Python without os.getxattr: the module imports, and works through the package."""
    code = """
import os, sys
for name in ("XATTR_CREATE", "XATTR_REPLACE", "getxattr", "listxattr", "removexattr", "setxattr"):
    delattr(os, name)
from cowfs.sys import xattr
fd = os.open(sys.argv[1], os.O_RDONLY)
xattr.setx(fd, b"file", b"user.a", b"1", xattr.CREATE)
print(xattr.get(fd, b"file", b"user.a"), xattr.listx(fd, b"file"), xattr.try_get(fd, b"file", b"user.b"))
xattr.remove(fd, b"file", b"user.a")
print(xattr.read_all(fd, b"file"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(file.parent)], capture_output=True, text=True, check=True)
    assert done.stdout == "b'1' [b'user.a'] None\n{}\n"
