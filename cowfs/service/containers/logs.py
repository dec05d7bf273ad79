"""A container's log: Docker's json-file form, written by its supervisor and read by the daemon.

Each line is ``{"log": text, "stream": "stdout" or "stderr", "time": RFC 3339}``; a text without a newline at its end goes on in
the next line of the same stream. Source: Docker's documentation of the json-file logging driver.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cowfs import model
from cowfs.service.containers.streams import STDERR, STDOUT

__all__ = ["FILE", "Entry", "Writer", "parse_size", "read"]

FILE = "json.log"
MAX_LINE = 16 << 10
"""Bytes of a line that are kept in one entry; the rest of it goes to the next ones."""

_NAMES = {STDOUT: "stdout", STDERR: "stderr"}
_NUMBERS = {name: number for number, name in _NAMES.items()}
PAUSE = 0.05  # seconds between two reads of a follower


class Writer:
    """Writes the log.

    Args:
        path: the file.
        max_size: bytes before a new file begins; 0: no bound.
        max_file: how many files are kept.
    """

    def __init__(self, path: str, max_size: int = 0, max_file: int = 1) -> None:
        self._path, self._max_size, self._max_file = path, max_size, max_file
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._fd).st_size
        self._partial: dict[int, bytes] = {}

    def write(self, stream: int, data: bytes) -> None:
        """Write output; a last line without its end waits for it."""
        data = self._partial.pop(stream, b"") + data
        lines = []
        start = 0
        while start < len(data):
            end = data.find(b"\n", start, start + MAX_LINE)
            stop = end + 1 if end >= 0 else start + MAX_LINE
            if end < 0 and len(data) - start < MAX_LINE:
                self._partial[stream] = data[start:]
                break
            lines.append(data[start:stop])
            start = stop
        self._keep(stream, lines)

    def close(self) -> None:
        """Write the unfinished line, and close."""
        for stream, data in self._partial.items():
            self._keep(stream, [data])
        os.close(self._fd)

    def _keep(self, stream: int, lines: list[bytes]) -> None:
        if not lines:
            return
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9:09d}Z"
        entry = {"stream": _NAMES[stream], "time": stamp}
        text = "".join(
            json.dumps({"log": line.decode("utf-8", "replace"), **entry}, ensure_ascii=False) + "\n" for line in lines
        ).encode("utf-8", "replace")
        try:
            written = os.write(self._fd, text)
            if written < len(
                text
            ):  # the disk is full: whole lines are kept, else the next one would follow half of one
                written = text.rfind(b"\n", 0, written) + 1
                os.ftruncate(self._fd, self._size + written)
            self._size += written
        except OSError:
            return  # a full disk costs the log, not the container
        if self._max_size and self._size >= self._max_size:
            self._rotate()

    def _rotate(self) -> None:
        os.close(self._fd)
        for number in range(self._max_file - 1, 0, -1):
            older = f"{self._path}.{number}"
            newer = f"{self._path}.{number - 1}" if number > 1 else self._path
            if os.path.exists(newer):
                os.replace(newer, older)
        if self._max_file <= 1:
            os.truncate(self._path, 0)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._fd).st_size


def parse_size(text: str) -> int:
    """Bytes of the option ``max-size`` (``10m``); 0 for "" and -1: no bound.

    Raises:
        InvalidArgument: it is no size.
    """
    return 0 if text in ("", "-1") else model.parse_size(text)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: the number of its stream, its bytes, and when it was written (RFC 3339)."""

    stream: int
    data: bytes
    time: str


def read(
    path: str, *, tail: int | None = None, follow: bool = False, running: Callable[[], bool] = lambda: False
) -> Iterator[Entry | None]:
    """Entries of a log, oldest first; None as a sign of life while following.

    Args:
        path: the file; older ones (``.1`` and so on) come first.
        tail: the number of lines at the end to give, instead of all.
        follow: go on until ``running`` gives False.
    """
    files = [each for each in (f"{path}.{number}" for number in range(99, 0, -1)) if os.path.exists(each)]
    try:
        current = open(path, "rb")  # noqa: SIM115  closed below, whatever happens
    except FileNotFoundError:
        return
    try:
        old = []
        for each in files:
            with open(each, "rb") as file:
                old += file.readlines()
        lines = [*old, *current.readlines()]
        partial = b""
        if lines and not lines[-1].endswith(b"\n"):
            partial = lines.pop()
        if tail is not None:
            lines = _last(lines, tail)
        for line in lines:
            entry = _entry(line)
            if entry is not None:
                yield entry
        while follow:
            alive = running()
            data = current.readline()
            while data:
                partial += data
                if partial.endswith(b"\n"):
                    entry = _entry(partial)
                    partial = b""
                    if entry is not None:
                        yield entry
                data = current.readline()
            if not alive:
                return
            if _is_replaced(current.fileno(), path):
                current.close()
                current = open(path, "rb")  # noqa: SIM115
                continue
            yield None
            time.sleep(PAUSE)
    finally:
        current.close()


def _is_replaced(fd: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    if there.st_ino == mine.st_ino and there.st_size < os.lseek(fd, 0, os.SEEK_CUR):
        os.lseek(fd, 0, os.SEEK_SET)  # it was cut to nothing
        return False
    return there.st_ino != mine.st_ino


def _last(lines: list[bytes], count: int) -> list[bytes]:
    """The entries of the last lines of output."""
    if count <= 0:
        return []
    left = count
    for at in range(len(lines) - 1, -1, -1):
        entry = _entry(lines[at])
        if entry is not None and entry.data.endswith(b"\n"):
            left -= 1
            if left < 0:
                return lines[at + 1 :]
    return lines


def _entry(line: bytes) -> Entry | None:
    try:
        found = json.loads(line)
        return Entry(_NUMBERS[found["stream"]], str(found["log"]).encode("utf-8", "replace"), str(found["time"]))
    except (ValueError, KeyError, TypeError):
        return None  # a line that a kill cut short
