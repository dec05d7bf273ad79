"""Debian's docker-registry, without TLS, at a port of this host."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from .daemon import wait_for


def start(space: Path, name: str, more: str = "") -> tuple[subprocess.Popen[bytes], str]:
    """Start one; (its process, ADDR:PORT).

    Args:
        space: where its data is. name: of the files there. more: lines of its configuration.
    """
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no registry here (Debian: docker-registry; CI has it)")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    config = space / f"{name}.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {space}/{name}\nhttp:\n  addr: {address}\n{more}"
    )
    with open(space / "registry.log", "ab") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    wait_for(lambda: listens(address), "the registry")
    return process, address


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return False
    return True
