"""The README's section on the service is run as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemon import Daemon, docker_environment

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_section(engine: Daemon, space: Path) -> None:
    """From a store that is not there yet to a container at its limit, with the lines of the README and nothing else."""
    if os.path.exists("/run/cowfs/docker.sock"):
        pytest.skip("somebody's daemon runs here")
    (block,) = [text for text in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "cowfs serve" in text]
    engine.docker("tag", "bb", "app:1")
    engine.docker("save", "-o", str(space / "image.tar"), "app:1")
    (space / "cowfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m cowfs "$@"\n')
    (space / "cowfs").chmod(0o755)
    environment = docker_environment("", engine.base) | {
        "PATH": f"{space}:{os.environ['PATH']}",
        "COWFS_ROOT": str(space / "store"),
    }
    done = subprocess.run(
        ["bash", "-ec", "set -m\n" + block + "wait\n"],
        cwd=space,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shutil.rmtree(space / "store", ignore_errors=True)
    assert "Storage Driver: " in done.stdout, done.stderr
    assert "Loaded image: app:1" in done.stdout
    assert re.search(r"image load sha256:\w+ \(.*name=app:1", done.stdout)
    assert re.search(r"cowfs\s+16\.0M", done.stdout)
    assert "RECLAIMABLE" in done.stdout
    assert "Traceback" not in done.stderr
