"""Processes that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from cowfs.sys import process


def test_a_process_that_was_killed_is_ending_until_it_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    assert not process.is_ending(child.pid)
    process.wait(child.pid, 0.01)
    os.kill(child.pid, signal.SIGSTOP)
    assert not process.is_ending(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    process.wait(child.pid, 60)  # the instant between taking the signal and ending cannot be seen
    assert process.is_ending(child.pid)
    child.wait()
    child.stdout.close()
    assert process.is_ending(child.pid)
    process.wait(child.pid, 60)
