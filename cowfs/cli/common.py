"""The options that every verb has: -q, -v, -D, --progress; and their effect before the verb runs.

Strategy: a verb's parser gets those options that it lacks. A verb whose arguments already use one of the letters
keeps its meaning.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

__all__ = ["COMMON", "FLAGS", "HOW", "add", "begin"]

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


def add(parser: argparse.ArgumentParser) -> None:
    """Give a verb's parser those common options that it lacks."""
    from argparse import ArgumentError

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
            except ArgumentError:
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
