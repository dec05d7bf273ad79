"""Parts of every verb and program of the command: a parser, the options -q, -v, -D and --progress, and an edge.

Strategy: a verb's parser gets those options that it lacks. A verb whose arguments already use one of the letters
keeps its meaning. At the edge (:func:`guarded`) errors become one line on standard error and the exit status of their class.
"""

from __future__ import annotations

import errno
import io
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import BinaryIO, TextIO

__all__ = [
    "COMMON",
    "FLAGS",
    "HOW",
    "Command",
    "Commands",
    "add",
    "begin",
    "complain",
    "describe",
    "fill_streams",
    "guarded",
    "is_path",
    "parse_quickly",
    "parser",
    "say",
]

HOW = ("auto", "bar", "plain", "json", "none")
"""The ways of --progress; :mod:`cowfs.cli.progress` says what they are."""

FLAGS = ("-q", "--quiet", "-v", "--verbose", "-D", "--debug")
"""Those without a value."""

COMMON = (
    (("-q", "--quiet"), "no progress and no notes; of a list the names alone"),
    (("-v", "--verbose"), "tell on standard error what is done, step by step"),
    (("-D", "--debug"), "tell also how; an error comes with its traceback"),
    (("--progress",), "how far it is, on standard error (default: a bar at a terminal, else lines, from the first second on)"),
)  # fmt: skip
"""Spellings and help, in the order of the documents."""


class Command:
    """A verb: how its arguments look, what it does (returns the exit status), and examples for its --help."""

    __slots__ = ("configure", "description", "examples", "run")

    def __init__(
        self,
        configure: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], int],
        description: str,
        examples: tuple[str, ...],
    ) -> None:
        self.configure = configure
        self.run = run
        self.description = description
        self.examples = examples


Commands = dict[str, Command]


def is_path(argument: str) -> bool:
    """Whether an argument is a path; others name snapshots in the store."""
    return argument.startswith(("/", "./", "../")) or argument in (".", "..")


def parser(name: str, command: Command) -> argparse.ArgumentParser:
    """A verb's parser: one line for a bad argument, examples below its help."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            self.exit(2, f"{self.prog}: {message} (see: {self.prog} --help)\n")

    def formatter(prog: str) -> argparse.HelpFormatter:
        """Measure the terminal (an import of 2 ms) only when help is printed."""
        width = None if {"-h", "--help", "help"} & set(sys.argv) else 80
        return argparse.RawDescriptionHelpFormatter(prog, width=width)

    examples = "".join(f"  {line}\n" for line in command.examples)
    made = Parser(
        prog=f"cowfs {name}",
        description=command.description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=formatter,
    )
    describe(made, command, argparse.ArgumentError)
    return made


def parse_quickly(command: Command, arguments: Sequence[str]) -> argparse.Namespace | None:
    """The values of an ordinary argument list, without argparse; None: argparse has to judge."""
    from cowfs.cli.quick import Odd, Quick, Taken

    made = Quick()
    try:
        describe(made, command, Taken)  # type: ignore[arg-type]  # it takes the same calls
        values, _ = made.parse_known_args(arguments)
    except Odd:
        return None
    return values  # type: ignore[return-value]  # an object with the same attributes


def describe(made: argparse.ArgumentParser, command: Command, taken: type[Exception]) -> None:
    """Tell a parser of a verb's arguments, the common options included.

    Args:
        taken: raised by this parser where an option is there already.
    """
    command.configure(made)
    add(made, taken)
    made.set_defaults(run=command.run)


def add(parser: argparse.ArgumentParser, taken: type[Exception]) -> None:
    """Give a verb's parser those common options that it lacks."""
    own = []
    for names, text in COMMON:
        for spellings in (names, names[-1:]):  # a verb with a meaning of its own for the letter has the word
            try:
                if names == ("--progress",):
                    parser.add_argument(*spellings, choices=HOW, default="auto", help=text)
                else:
                    parser.add_argument(*spellings, action="store_true", help=text)
                own.append(names[-1].lstrip("-"))
                break
            except taken:
                continue
    parser.set_defaults(common=own)


def begin(args: argparse.Namespace) -> None:
    """Let what is logged be seen, where that was asked for."""
    debug, verbose = ("debug" in args.common and args.debug), ("verbose" in args.common and args.verbose)
    if debug or verbose:
        import logging

        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        top = logging.getLogger("cowfs")
        top.addHandler(handler)
        top.setLevel(logging.DEBUG if debug else logging.INFO)
        top.propagate = False


# -- the edge ----------------------------------------------------------------------------------------------------------


def say(text: str, code: int = 0) -> int:
    """Print, and return the exit status."""
    sys.stdout.write(text)
    return code


class _Closed(io.TextIOWrapper):
    """A standard output that the caller closed, which matters only to a verb that prints."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "standard output is closed")

    @property
    def buffer(self) -> BinaryIO:
        raise OSError(errno.EBADF, "standard output is closed")


def fill_streams() -> None:
    """Occupy the numbers of closed standard streams, so that no file opened later gets one, and printed text with it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    streams: dict[str, TextIO | None] = vars(sys)
    if streams["stdin"] is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  until the end
    if streams["stdout"] is None:
        sys.stdout = _Closed()
    if streams["stderr"] is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the end


def guarded(run: Callable[[], int], program: str = "cowfs") -> int:
    """Run a verb, and turn every foreseen error into one line and an exit status."""
    from cowfs.errors import CowfsError

    try:
        try:
            code = run()
        finally:
            _flush()
    except CowfsError as error:
        _trace()
        return complain(program, str(error), error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Keep the flush at exit from failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return complain(program, "interrupted", 130)
    except OSError as error:
        _trace()
        where = os.fsdecode(error.filename) + ": " if isinstance(error.filename, str | bytes) else ""
        return complain(program, f"{where or _full_output(error)}{error.strerror or error}", 1)
    return code


def _trace() -> None:
    """For -D: the origin of an error. Call inside ``except``."""
    if "logging" in sys.modules:
        from cowfs._log import Part

        Part("cowfs.cli").trace("the error came from here")


def _flush() -> None:
    """Drop the text that standard output did not take, so that it is not written again at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise OSError(error.errno, error.strerror, "standard output") from None


def _full_output(error: OSError) -> str:
    """The file behind standard output, if an error for want of room names no other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.strerror != os.strerror(error.errno):
        return ""
    try:
        target = os.readlink("/proc/self/fd/1")
    except OSError:
        return ""
    return f"{target}: " if target.startswith("/") and os.path.isfile(target) else ""


def complain(program: str, message: str, code: int) -> int:
    """One line on standard error."""
    from cowfs.cli.output import shown

    line = shown(" ".join(message.split("\n")))
    sys.stderr.write(f"{program}: {line}\n")
    sys.stderr.flush()
    return code
