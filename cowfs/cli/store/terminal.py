"""A terminal of its own for the command of `cowfs run`, and the transfer of keys and text between it and the user's.

Strategy: the user's terminal stays as it is until the command has started, so that Ctrl-C until then ends cowfs; from
then on it is raw, and every key goes to the pseudo-terminal, whose line discipline turns it into signals for the
command's own process groups. Changes of size are passed on. At the end the user's terminal is restored.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import termios
import tty
from contextlib import suppress
from typing import Any

__all__ = ["Terminal"]

_PIECE = 1 << 16


class Terminal:
    """A pseudo-terminal; ``slave`` is for the command, the rest for cowfs.

    Raises:
        OSError: the host has no pseudo-terminal to give.
    """

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self._before: list[Any] | None = None
        self._keys = True  # whether the user's side can still be read
        termios.tcsetattr(self.slave, termios.TCSANOW, termios.tcgetattr(0))
        self._resize()

    @classmethod
    def wanted(cls) -> Terminal | None:
        """A pseudo-terminal if a standard stream is a terminal, else None."""
        return cls() if _at_terminal() else None

    def _resize(self, *_: object) -> None:
        with suppress(OSError, termios.error):
            termios.tcsetwinsize(self.master, termios.tcgetwinsize(0))

    def close_slave(self) -> None:
        """Close this process's copy of the command's side."""
        os.close(self.slave)

    def started(self) -> None:
        """Make the user's terminal raw: from now on the command gets every key."""
        with suppress(termios.error):  # the terminal may have hung up
            self._before = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSADRAIN)
        self._resize()
        signal.signal(signal.SIGWINCH, self._resize)

    def carry(self, told: int, begun: int) -> bytes:
        """Carry text both ways until ``told`` ends, and return the data from there.

        Args:
            told: descriptor for an error message; its end means the end of the command.
            begun: descriptor whose end means that the command has started.
        """
        problem, watched = b"", {told, begun, self.master}
        while told in watched:
            ready, _, _ = select.select([*watched, *([0] if self._before and self._keys else [])], [], [])
            if begun in ready:
                watched.discard(begun)
                self.started()
            if 0 in ready:
                self._take_keys()
            if self.master in ready and not self._show():
                watched.discard(self.master)
            if told in ready:
                part = os.read(told, _PIECE)
                problem += part
                if not part:
                    watched.discard(told)
        while self.master in watched and select.select([self.master], [], [], 0)[0] and self._show():
            pass
        return problem

    def _take_keys(self) -> None:
        try:
            keys = os.read(0, _PIECE)
        except OSError:
            keys = b""
        self._keys = bool(keys)
        while keys:
            keys = keys[os.write(self.master, keys) :]

    def _show(self) -> bool:
        """Text to the user; False when the other side is closed for good."""
        try:
            text = os.read(self.master, _PIECE)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        with suppress(OSError):
            while text:
                text = text[os.write(1 if os.isatty(1) else 0, text) :]
        return True

    def close(self) -> None:
        """Restore the user's terminal."""
        if self._before is not None:
            signal.signal(signal.SIGWINCH, signal.SIG_DFL)
            with suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, self._before)
        os.close(self.master)


def _at_terminal() -> bool:
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
