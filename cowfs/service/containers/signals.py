"""Signals to a container's first process."""

from __future__ import annotations

import os
import signal

from cowfs.service.containers.container import Container

__all__ = ["send_signal"]


def send_signal(container: Container, number: int) -> bool:
    """Send a signal to a container's first process; False when it is gone."""
    try:
        handle = os.pidfd_open(container.run["pid"])
    except (OSError, KeyError):
        return False
    try:
        if not container.process_lives():
            return False
        signal.pidfd_send_signal(handle, signal.Signals(number) if number < 32 else number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True
