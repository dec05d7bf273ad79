"""Project quotas of real file systems: the answer, and that `cowfs info` and `doctor` tell it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import hostfs

import cowfs
from cowfs.store.doctor import examine
from cowfs.sys import project_quota

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop mounts: needs root")


def why_not(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return project_quota.why_not(fd)
    finally:
        os.close(fd)


def told(path: Path) -> tuple[str, str]:
    """The answers of `cowfs info` and `cowfs doctor`."""
    with cowfs.Store.open(path / "store", driver="overlay") as store:
        info = store.describe()["project quotas"]
    return info, next(one.what for one in examine(str(path / "store")) if one.about == "project quotas")


@pytest.mark.parametrize("name", ["ext4", "xfs"])
def test_a_file_system_that_is_mounted_without_them(tmp_path: Path, can_mount: None, name: str) -> None:
    where = hostfs.make_image(name, tmp_path)
    why = why_not(where)
    assert why in (f"the kernel has none for {name}",) or why.startswith(f"{name} is mounted without prjquota")
    info, doctor = told(where)
    assert info == f"no ({why})"
    assert doctor == f"no ({why}); limits do without"
    assert why_not(where) == why, "asking changes nothing"


FORMATS: dict[str, list[str]] = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-O", "quota,project", "-E", "quotatype=prjquota"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_answer_is_yes_exactly_where_the_kernel_mounts_with_prjquota(
    tmp_path: Path, can_mount: None, name: str
) -> None:
    """A kernel without them refuses the option. The same image then has them not, without the option, where it mounts at all."""
    image, where = tmp_path / "img", tmp_path / "at"
    where.mkdir()
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    if subprocess.run([*FORMATS[name], image], check=False, capture_output=True).returncode:
        pytest.skip(f"no {FORMATS[name][0]}")
    with_them = mounted(image, where, "loop,prjquota")
    if with_them:
        assert why_not(where) == ""
        assert told(where) == ("yes (no engine of limits uses them)", "yes; limits do without")
        subprocess.run(["umount", where], check=True)
    if mounted(image, where, "loop"):
        assert why_not(where) != ""
        assert with_them or "prjquota" in why_not(where) or "none for" in why_not(where)


def mounted(image: Path, where: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", options, image, where], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "make", [hostfs.make_tmpfs, lambda base: hostfs.make_image("btrfs", base)], ids=["tmpfs", "btrfs"]
)
def test_a_file_system_that_never_has_them(tmp_path: Path, can_mount: None, make: Callable[[Path], Path]) -> None:
    assert " none " in why_not(make(tmp_path))


def test_the_command_tells_it(tmp_path: Path, can_mount: None, capsys: pytest.CaptureFixture[str]) -> None:
    from cowfs.cli import main

    where = hostfs.make_image("ext4", tmp_path)
    assert main(["init", "--root", str(where / "store"), "--driver", "overlay"]) == 0
    assert main(["info", "--root", str(where / "store")]) == 0
    assert f"project quotas: no ({why_not(where)})" in capsys.readouterr().out
    main(["doctor", "--root", str(where / "store")])
    assert f"no ({why_not(where)}); limits do without" in capsys.readouterr().out
