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
from collections.abc import Container
from contextlib import suppress

from cowfs._typed import Any

__all__ = ["Terminal"]

_PIECE = 1 << 12  # a terminal's queue takes no more at once
_SIZE = (24, 80)
"""Rows and columns where the user has no terminal."""
_END_OF_FILE = b"\x04"


class Terminal:
    """A pseudo-terminal; ``slave`` is for the command, the rest for cowfs.

    Raises:
        OSError: the host has no pseudo-terminal to give.
    """

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self._before: list[Any] | None = None
        self._ours = _at_terminal()
        self._keys = False  # whether the user's side can be read
        self._typed = b""  # keys that the command's side has no room for yet
        os.set_blocking(self.master, False)
        if self._ours:
            termios.tcsetattr(self.slave, termios.TCSANOW, termios.tcgetattr(0))
            self._resize()
        else:
            termios.tcsetwinsize(self.master, _SIZE)

    @classmethod
    def wanted(cls, asked: bool | None) -> Terminal | None:
        """One where it was asked for, or where nobody said anything and the user sits at a terminal; else None."""
        return cls() if asked or (asked is None and _at_terminal()) else None

    def _resize(self, *_: object) -> None:
        with suppress(OSError, termios.error):
            termios.tcsetwinsize(self.master, termios.tcgetwinsize(0))

    def close_slave(self) -> None:
        """Close this process's copy of the command's side."""
        os.close(self.slave)

    def started(self) -> None:
        """The command runs: from now on it gets every key."""
        self._keys = True
        if not self._ours:
            return
        with suppress(termios.error):  # a terminal that hung up meanwhile
            self._before = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSADRAIN)
        self._resize()
        signal.signal(signal.SIGWINCH, self._resize)

    def keys(self) -> list[int]:
        """The descriptor on which keys are waited for, while there can be any."""
        return [0] if self._keys and not self._typed else []

    def typed(self) -> list[int]:
        """The descriptor that keys wait to be written to, where some do."""
        return [self.master] if self._typed else []

    def carry(self, ready: Container[int]) -> bool:
        """Carry keys and text that are there; False when the command's side is closed for good.

        Args:
            ready: descriptors that can be read.
        """
        if 0 in ready and self._keys:
            self._take_keys()
        return self.master not in ready or self._show()

    def drain(self) -> None:
        """Show what is left."""
        while select.select([self.master], [], [], 0)[0] and self._show():
            continue

    def _take_keys(self) -> None:
        try:
            keys = os.read(0, _PIECE)
        except OSError:
            keys = b""
        if not keys:  # the end of a file or pipe is told as a terminal does it
            self._keys = False
            keys = b"" if self._ours else _END_OF_FILE
        self._typed = keys
        self.write()

    def write(self) -> None:
        """Hand on as many of the keys as there is room for."""
        with suppress(BlockingIOError):
            while self._typed:
                self._typed = self._typed[os.write(self.master, self._typed) :]

    def _show(self) -> bool:
        """Text to the user; False when the other side is closed for good."""
        try:
            text = os.read(self.master, _PIECE)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        with suppress(OSError):
            while text:
                text = text[os.write(1 if os.isatty(1) or not self._ours else 0, text) :]
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
