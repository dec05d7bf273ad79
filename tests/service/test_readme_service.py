"""The README's section on the service is run as it stands there, and each of its lines does what it says."""

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
(BLOCK,) = [text for text in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "cowfs serve" in text]
LINES = BLOCK.strip().splitlines()

EXPECTED = {
    "cowfs tls init certs": r"--tlscacert=\S+/ca\.pem",
    "cowfs serve -D": r"listening on unix:///run/cowfs/docker\.sock\n(.*\n)*.*listening on tcp://127\.0\.0\.1:2376 \(TLS\)\n(.*\n)*.*debug .*GET /v1\.\d+/info -> 200",
    "export DOCKER_HOST": r"",
    "docker -H tcp://127.0.0.1:2376 --tlsverify": r"Storage Driver: (overlay|row|vfs)",
    "docker events": r"image load sha256:\w+ \(.*name=app:1",
    "docker load": r"Loaded image: app:1",
    "docker run": r"cowfs\s+16\.0M",
    "docker stats": r"CPU %\s+MEM USAGE / LIMIT\s+MEM %\s+NET I/O\s+BLOCK I/O\s+PIDS",
    "docker system df": r"TYPE\s+TOTAL\s+ACTIVE\s+SIZE\s+RECLAIMABLE\nImages\s+1\s",
    "kill": r"",
}
"""Beginning of a line -> what it, or what it left in the background, prints."""


@pytest.fixture(scope="module")
def printed(shared: Daemon, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The section's output, from a store that is not there yet, with its lines and nothing else; a line that fails ends it."""
    if os.path.exists("/run/cowfs/docker.sock"):
        pytest.skip("somebody's daemon runs here")
    space = tmp_path_factory.mktemp("readme")
    shared.docker("tag", "bb", "app:1")
    shared.docker("save", "-o", str(space / "image.tar"), "app:1")
    (space / "cowfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m cowfs "$@"\n')
    (space / "cowfs").chmod(0o755)
    environment = docker_environment("", shared.base) | {
        "PATH": f"{space}:{os.environ['PATH']}",
        "COWFS_ROOT": str(space / "store"),
    }
    done = subprocess.run(
        ["bash", "-ec", "set -m\n" + BLOCK + "wait\n"],
        cwd=space, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    shutil.rmtree(space / "store", ignore_errors=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("line", LINES, ids=[line[:30].strip() for line in LINES])
def test_each_line(printed: str, line: str) -> None:
    (expected,) = [pattern for beginning, pattern in EXPECTED.items() if line.startswith(beginning)]
    assert re.search(expected, printed), printed


def test_the_section_has_ten_lines_and_nothing_goes_wrong(printed: str) -> None:
    assert len(LINES) == 10
    assert "Traceback" not in printed
    assert not os.path.exists("/run/cowfs/docker.sock")
