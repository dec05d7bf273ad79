"""The maker of redirect files: the caller that assembles a view hands the implementation in; union has none."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

import cowfs
from cowfs.union import Options, view as union


def layers(space: Path) -> tuple[list[Path], Path, Path]:
    for name in ("low", "up", "work"):
        (space / name).mkdir()
    (space / "low" / "big").write_bytes(b"x" * 100_000)
    return [space / "low"], space / "up", space / "work"


def redirected(space: Path) -> list[Path]:
    """A stack whose upper holds a redirect file, topmost first."""
    lowers, upper, work = layers(space)
    view = cowfs.View(lowers, upper, work, options=Options(row=4096))
    cowfs.Paths(view).write_at("big", 5000, b"new")
    view.close()
    return [upper, *lowers]


def test_a_stack_that_holds_redirect_files_is_read_whole(tmp_path: Path) -> None:
    view = cowfs.View(redirected(tmp_path))
    assert cowfs.Paths(view).read_bytes("big", 4999, 5) == b"xnewx"
    view.close()


def test_a_view_without_the_implementation_refuses_such_a_stack(tmp_path: Path) -> None:
    """The blocks of a redirect file alone would be taken for the whole file."""
    with pytest.raises(OSError) as caught:
        union.View(redirected(tmp_path))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_view_without_the_implementation_refuses_the_option(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        union.View(*layers(tmp_path), options=Options(row=4096))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_union_never_imports_row(tmp_path: Path) -> None:
    """Neither does a view of plain layers: its start pays for what it uses."""
    layers(tmp_path)
    code = (
        "import sys, cowfs\n"
        f"cowfs.View([{str(tmp_path / 'low')!r}]).close()\n"
        "print(sorted(name for name in sys.modules if name.startswith('cowfs.row.')))\n"
        "import cowfs.union.view\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['cowfs.row.view']\n"
