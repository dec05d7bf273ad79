"""The progress of a verb, on standard error: ``--progress auto|bar|plain|json|none``.

Rules.

1. Nothing is printed before a verb has taken a second; without a terminal then a line every five seconds. 2. A verb that cannot count shows its time so far. 3. ``bar`` is drawn by rich if that is installed (the extra
``progress``), else as one plain line. 4. ``json``: an object a line, from the beginning, for each change and each second: ``{"what", "done", "total",
"seconds"}``; ``total`` is null if unknown. The last
   one has ``"end": true``, also when the verb failed.
5. ``$COWFS_PROGRESS`` (none, plain or json) stands for ``auto``.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from cowfs._typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

__all__ = ["Bars"]

_FIRST = {"bar": 1.0, "plain": 0.0, "json": 0.0, "auto": 1.0}
_EVERY = {"bar": 0.1, "plain": 1.0, "json": 0.2, "auto": 5.0}


class Bars:
    """Prints the progress of one verb; a context manager, and a function ``(what, done, total)``.

    Args:
        args: the verb's arguments: ``progress``, ``quiet``.
        label: the text while nothing is counted; "" if the verb counts from its beginning.
        begun: the beginning, by ``time.monotonic()``; default: now.

    Threads: may be called from several; a thread of its own, which ends with the block, prints.
    """

    def __init__(self, args: argparse.Namespace, label: str = "", begun: float | None = None) -> None:
        how = args.progress
        if how == "auto":
            how = {"none": "none", "plain": "plain", "json": "json"}.get(os.environ.get("COWFS_PROGRESS", ""), how)
        if how == "auto":
            how = "none" if args.quiet else "bar" if sys.stderr.isatty() else "auto"
        self.on = how != "none"
        self._how = how
        self._label = label
        self._lock = threading.Lock()
        self._parts: dict[str, tuple[int, int]] = {}  # guarded by _lock
        self._begun = time.monotonic() if begun is None else begun
        self._last: object = None
        self._shown = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._rich: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """``total`` is 0 if unknown; both are bytes, or counts."""
        if self.on:
            with self._lock:
                self._parts[what] = (done, total)

    def __enter__(self) -> Bars:
        if self.on:
            self._thread = threading.Thread(target=self._tell, name="cowfs-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        if self._rich is not None:
            self._rich.stop()
        elif self._how == "bar" and self._shown:
            self._write("\r\x1b[K")
        elif self._how == "json":
            self._line(end=True)

    # -- the printing thread

    def _tell(self) -> None:
        wait = max(0.0, _FIRST[self._how] - self._seconds())
        while not self._stop.wait(wait):
            wait = _EVERY[self._how]
            if self._how == "bar":
                self._draw()
            else:
                self._line()

    def _sums(self) -> tuple[str, int, int]:
        """(the part at work, done, total) of all parts together."""
        with self._lock:
            parts = dict(self._parts)
        if not parts:
            return self._label, 0, 0
        label = next(reversed(parts)) if len(parts) == 1 else f"{len(parts)} layers"
        known = [part for part in parts.values() if part[1]]
        if known:
            return label, sum(part[0] for part in known), sum(part[1] for part in known)
        return label, sum(part[0] for part in parts.values()), 0

    def _line(self, *, end: bool = False) -> None:
        what, done, total = self._sums()
        if self._how == "json":
            import json

            if not end and (not what or (what, done, total, int(self._seconds())) == self._last):
                return
            self._last = (what, done, total, int(self._seconds()))
            told = {"what": what, "done": done, "total": total or None, "seconds": round(self._seconds(), 3)}
            self._write(json.dumps({**told, "end": True} if end else told) + "\n")
        elif what:
            self._write(f"{_plain(what)}: {self._text(done, total)}\n")

    def _text(self, done: int, total: int) -> str:
        from cowfs.model import format_size

        seconds = f"{self._seconds():.0f} s"
        if total:
            amount = format_size(done) if total > 4096 else f"{done} of {total}"
            return f"{min(1.0, done / total):.0%}, {amount}, {seconds}"
        return f"{format_size(done)}, {seconds}" if done else seconds

    def _seconds(self) -> float:
        return time.monotonic() - self._begun

    def _draw(self) -> None:
        what, done, total = self._sums()
        if not what:
            return
        if self._rich is None and not self._shown:
            self._rich = _rich()
        self._shown = True
        if self._rich is not None:
            self._rich.show(_plain(what), done, total)
            return
        import shutil

        bar = f"[{'#' * round(min(1.0, done / total) * 30):<30}] " if total else ""
        text = f"{_plain(what):.30} {bar}{self._text(done, total)}"
        self._write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str) -> None:
        try:
            os.write(2, text.encode("utf-8", "backslashreplace"))
        except OSError:
            pass  # a closed standard error does not stop the verb


class _Rich:
    """A bar by rich."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        progress.start()

    def show(self, what: str, done: int, total: int) -> None:
        from rich.markup import escape

        self._progress.update(self._task, description=escape(what[:40]), completed=done, total=total or None)

    def stop(self) -> None:
        self._progress.stop()


def _rich() -> _Rich | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    return _Rich(Progress(*columns, console=Console(stderr=True), transient=True))


def _plain(what: str) -> str:
    from cowfs.cli.output import shown

    return shown(what)
