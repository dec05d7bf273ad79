"""`cowfs top`: the present work of mounts and containers, the busiest first, on a screen that is redrawn.

Strategy: a frame is made of two looks of :mod:`cowfs.cli.stats` by a function without a terminal (:func:`frame`); the
rest reads keys. The screen of before comes back at the end (the terminal's alternate screen, ECMA-48 control functions
as xterm has them).
"""

from __future__ import annotations

import os
import select
import sys
import time

from cowfs._typed import TYPE_CHECKING, Any, NamedTuple
from cowfs.cli.common import Command
from cowfs.cli.output import count_or, print_json, shown, size_or, table_lines
from cowfs.cli.store.args import add_json
from cowfs.errors import InvalidArgument, NotFound, Unsupported

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from cowfs.cli.stats import Look

HEAD = (
    "NAME",
    "CPU %",
    "MEMORY",
    "USED",
    "LIMIT",
    "USE%",
    "INODES",
    "REQUESTS/s",
    "TIME EACH",
    "HITS",
    "COPIED UP",
    "OF",
)


class Line(NamedTuple):
    """One mount between two looks; rates a second, None where nothing is known."""

    look: Look
    cpu: float | None
    requests: float | None

    @property
    def used(self) -> int:
        usage = self.look.statistics.usage
        return usage.bytes if usage is not None else 0


ORDERS: dict[str, tuple[str, Callable[[Line], Any]]] = {
    "c": ("cpu", lambda line: -(line.cpu or 0.0)),
    "r": ("requests", lambda line: -(line.requests or 0.0)),
    "m": ("memory", lambda line: -(line.look.memory or 0)),
    "u": ("used", lambda line: -line.used),
    "n": ("name", lambda line: line.look.name),
}
"""Key -> name of an order, and what it sorts by."""


def lines(before: Sequence[Look], now: Sequence[Look], order: str) -> list[Line]:
    """The records, sorted by the key of an order, ties by name."""
    known = {look.mountpoint: look for look in before}
    found = []
    for look in now:
        was = known.get(look.mountpoint, look)
        seconds = look.at - was.at
        cpu = None if look.cpu is None or was.cpu is None or seconds <= 0 else max(0.0, look.cpu - was.cpu) / seconds
        asked = sum(look.statistics.requests.values()) - sum(was.statistics.requests.values())
        found.append(Line(look, cpu, None if seconds <= 0 else max(0, asked) / seconds))
    return sorted(sorted(found, key=lambda line: line.look.name), key=ORDERS[order][1])


def _row(line: Line) -> tuple[str, ...]:
    told = line.look.statistics
    bound = told.limit.bytes
    timed = sum(each.count for each in told.timed.values())
    each = sum(each.seconds for each in told.timed.values()) / timed if timed else None
    asked = told.hits + told.misses
    return (
        shown(line.look.name),
        "-" if line.cpu is None else f"{line.cpu * 100:.1f}%",
        size_or(line.look.memory, "-"),
        size_or(told.usage.bytes) if told.usage is not None else "...",
        size_or(bound, "-"),
        f"{-(-line.used * 100 // bound)}%" if bound else "-",
        count_or(told.usage.inodes) if told.usage is not None else "...",
        "-" if line.requests is None else f"{line.requests:.0f}",
        "-" if each is None else f"{each * 1e6:.0f} us",
        f"{100 * told.hits / asked:.0f}%" if asked else "-",
        f"{told.copied_files} ({size_or(told.copied_bytes)})",
        "container" if line.look.container else "mount",
    )


def frame(found: Sequence[Line], order: str, *, rows: int, columns: int) -> list[str]:
    """The lines of a screen of ``rows`` times ``columns``."""
    load = "  ".join(f"{value:.2f}" for value in os.getloadavg())
    total = sum(line.requests or 0.0 for line in found)
    head = [
        f"{time.strftime('%H:%M:%S')}  {len(found)} mounts  {total:.0f} requests/s  load {load}",
        f"sorted by {ORDERS[order][0]}; keys: "
        + " ".join(f"{key} {name}" for key, (name, _) in ORDERS.items())
        + " q quit",
        "",
    ]
    body = list(table_lines(HEAD, map(_row, found)))
    room = rows - len(head)
    if len(body) > room > 1:
        body = [*body[: room - 1], f"... and {len(body) - room + 1} more"]
    return [line[:columns] for line in [*head, *body]][:rows]


# -- the terminal ------------------------------------------------------------------------------------------------------


class _Screen:
    """The terminal while it is ours: no echo, keys one by one, the alternate screen."""

    def __enter__(self) -> _Screen:
        import termios
        import tty

        self._before = termios.tcgetattr(0)
        tty.setcbreak(0)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_: object) -> None:
        import termios

        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        termios.tcsetattr(0, termios.TCSADRAIN, self._before)

    def draw(self, text: Sequence[str]) -> None:
        sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in text[:-1]) + f"{text[-1]}\x1b[K\x1b[J")
        sys.stdout.flush()

    def key(self, seconds: float) -> str:
        """A key that was pressed within so many seconds, "" for none; a terminal that hung up is ``q``."""
        if not select.select([0], [], [], max(0.0, seconds))[0]:
            return ""
        return os.read(0, 1).decode("ascii", "replace") or "q"


def _configure(parser: argparse.ArgumentParser) -> None:
    from cowfs.cli.stats import add_names

    add = parser.add_argument
    add_names(parser)
    add(
        "-s",
        "--sort",
        choices=[name for name, _ in ORDERS.values()],
        default="cpu",
        help="the first order (default: cpu)",
    )
    add("-d", "--delay", type=float, default=2.0, metavar="S", help="seconds between two looks (default: 2)")
    add("-n", "--count", type=int, metavar="N", help="end after N looks (default: when q is pressed)")
    add("-b", "--batch", action="store_true", help="print one table after the other, for a file or a pipe; no keys")
    add_json(parser)


def _top(args: argparse.Namespace) -> int:
    if not 0.1 <= args.delay <= 3600:
        raise InvalidArgument(f"--delay is from 0.1 to 3600 seconds, not {args.delay:g}")
    if args.count is not None and args.count < 1:
        raise InvalidArgument(f"--count is at least 1, not {args.count}")
    order = next(key for key, (name, _) in ORDERS.items() if name == args.sort)
    if args.batch or args.json:
        return _batch(args, order)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Unsupported("this is no terminal", remedy="cowfs top --batch, or cowfs stats --no-stream")
    with _Screen() as screen:
        return _watch(args, screen, order)


def _watch(args: argparse.Namespace, screen: _Screen, order: str) -> int:
    from cowfs.cli.stats import looks

    before = now = looks(args.names)
    seen, due = 0, time.monotonic() + min(0.5, args.delay)
    while True:
        columns, rows = os.get_terminal_size(1)
        screen.draw(frame(lines(before, now, order), order, rows=rows, columns=columns))
        key = screen.key(due - time.monotonic())
        if key == "q":
            return 0
        if key in ORDERS:
            order = key
        if key:
            continue
        try:
            before, now = now, looks(args.names)
        except NotFound:
            return 0  # what was looked at is gone
        seen += 1
        if seen == args.count:
            return 0
        due = time.monotonic() + args.delay


def _batch(args: argparse.Namespace, order: str) -> int:
    from cowfs.cli.stats import document, looks

    before = looks(args.names)
    seen = 0
    while seen != args.count:
        time.sleep(args.delay)
        now = looks(args.names)
        found = lines(before, now, order)
        if args.json:
            known = {look.mountpoint: look for look in before}
            print_json([document(known.get(line.look.mountpoint, line.look), line.look) for line in found], args.json)
        else:
            print(
                "\n".join(
                    [*frame(found, order, rows=1 << 30, columns=1 << 30)[:1], *table_lines(HEAD, map(_row, found)), ""]
                )
            )
        sys.stdout.flush()
        before = now
        seen += 1
    return 0


COMMANDS = {
    "top": Command(
        _configure,
        _top,
        "Show what mounts and containers do, the busiest first, again every two seconds. Keys: c, r, m, u and n sort by processor, requests, memory,\n"
        "bytes used and name; q ends it. The processor and memory are a container's, or of the server of a mount.",
        ("cowfs top", "cowfs top --sort requests", "cowfs top --batch --count 1 --delay 1"),
    ),
}
