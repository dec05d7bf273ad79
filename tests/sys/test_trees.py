"""Copying whole trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cowfs.sys import trees


def test_a_copy_that_fails_leaves_no_descriptor(tmp_path: Path) -> None:
    """A name that is there already, at the top and deeper: the error comes through, everything is closed."""
    for name in ("a/b/c", "t1", "t2/b", "t3"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "t1" / "file").touch()
    before = os.listdir("/proc/self/fd")
    for target in ("t1", "t2", "missing"):
        with pytest.raises(OSError):
            trees.copy_tree(str(tmp_path / "a"), str(tmp_path / target))
    assert os.listdir("/proc/self/fd") == before
