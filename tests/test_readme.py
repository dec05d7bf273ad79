"""Everything that the README shows is run, as it stands there, over a small stack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace
from support.command import environment, run_module
from support.layers import Layer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def place(space: Path, can_mount: None) -> Iterator[Path]:
    """A directory with layers/, the two commands in PATH, and /mnt/rootfs."""
    Layer(space / "layers/00-base").file("etc/motd", b"hello\n")
    Layer(space / "layers/10-python").file("usr/bin/python", b"py", 0o755)
    programs = space / "bin"
    programs.mkdir()
    for name, module in (("cowfs", "cowfs"), ("cowfs-overlayfs", "cowfs.cli.overlayfs")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    namespace.mount("tmpfs", "/mnt", "tmpfs")
    os.mkdir("/mnt/rootfs")
    yield space
    run_module("cowfs", "umount", "--force", "/mnt/rootfs")
    namespace.umount("/mnt", namespace.MNT_DETACH)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str], place: Path) -> str:
    environ = environment()
    environ["PATH"] = f"{place / 'bin'}:{environ['PATH']}"
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_shell_examples(place: Path) -> None:
    outputs = [run(["bash", "-ec", block], place) for block in blocks("sh")]
    assert len(outputs) == 3
    assert "/mnt/rootfs" in outputs[0]
    assert "A /greeting" in outputs[0]
    assert "4 GiB" in outputs[0]
    assert "A /greeting" in outputs[1]
    assert "v2" in outputs[1]
    assert os.listdir("/mnt/rootfs") == []


def test_python_examples(place: Path) -> None:
    outputs = [run([sys.executable, "-c", block], place) for block in blocks("python")]
    assert len(outputs) == 2
    assert "added b'greeting'" in outputs[0]
    assert "b'etc/motd' 0o100644 6" in outputs[1]


def test_verbs_and_links_exist() -> None:
    """Every file that is linked is there; every verb that is shown exists."""
    from cowfs.cli import VERBS

    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for verb in re.findall(r"^cowfs (\w+)", README, re.MULTILINE):
        assert verb in VERBS


def test_the_two_commands_come_first() -> None:
    """Both exist and can be run."""
    first = re.findall(r"^    (\./\w+) ", README, re.MULTILINE)
    assert first[:2] == ["./demo", "./test"]
    for name in first:
        assert os.access(ROOT / name, os.X_OK)
