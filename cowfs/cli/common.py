"""A verb of the command, its parser, and the options that every verb has: -q, -v, -D, --progress; and their effect before it runs.

Strategy: a verb's parser gets those options that it lacks. A verb whose arguments already use one of the letters
keeps its meaning.
"""

from __future__ import annotations

import sys

from cowfs._record import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = ["COMMON", "FLAGS", "HOW", "Command", "Commands", "add", "begin", "is_path", "parser"]

HOW = ("auto", "bar", "plain", "json", "none")
"""The ways of --progress; :mod:`cowfs.cli.progress` says what they are."""

FLAGS = ("-q", "--quiet", "-v", "--verbose", "-D", "--debug")
"""Those without a value."""

COMMON = (
    (("-q", "--quiet"), "no progress and no notes; of a list the names alone"),
    (("-v", "--verbose"), "tell on standard error what is done, step by step"),
    (("-D", "--debug"), "tell also how; an error comes with its traceback"),
    (("--progress",), "how far it is, on standard error (default: a bar at a terminal, else a line every five seconds)"),
)  # fmt: skip
"""Spellings and help, in the order of the documents."""


@record(frozen=True, slots=True)
class Command:
    """A verb: how its arguments look, what it does (returns the exit status), and examples for its --help."""

    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    description: str
    examples: tuple[str, ...]


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
    command.configure(made)
    add(made)
    made.set_defaults(run=command.run)
    return made


def add(parser: argparse.ArgumentParser) -> None:
    """Give a verb's parser those common options that it lacks."""
    from argparse import ArgumentError

    own = []
    for names, text in COMMON:
        try:
            if names == ("--progress",):
                parser.add_argument(*names, choices=HOW, default="auto", help=text)
            else:
                parser.add_argument(*names, action="store_true", help=text)
            own.append(names[-1].lstrip("-"))
        except ArgumentError:
            pass
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
