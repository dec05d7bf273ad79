"""Processes that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from cowfs.sys import process


def test_a_process_is_ending_from_its_kill_on() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    assert not process.is_ending(child.pid)
    process.wait(child.pid, 0.01)
    os.kill(child.pid, signal.SIGSTOP)
    assert not process.is_ending(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    assert process.is_ending(child.pid)  # pending, at work, or not waited for yet
    process.wait(child.pid, 60)
    assert process.is_ending(child.pid)
    child.wait()
    child.stdout.close()
    assert process.is_ending(child.pid)
    process.wait(child.pid, 60)
