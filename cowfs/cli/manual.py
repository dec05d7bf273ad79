"""Man pages, written from the parsers: ``python -m cowfs.cli.manual /usr/local/share/man/man1``.

One page for the command and one for each verb, ``cowfs-VERB(1)``. Format: man(7), in its portable macros only.
"""

from __future__ import annotations

import argparse
import os
import sys

from cowfs.cli import VERBS, command_of, parser_of
from cowfs.cli.parsers import actions_of
from cowfs.cli.reference import STATUSES

__all__ = ["main", "page", "pages"]


def escaped(text: str) -> str:
    """Text that roff shows as it is: backslashes, hyphens, and dots or quotes that would begin a request.

    >>> escaped("a-b"), escaped(".x")
    ('a\\\\-b', '\\\\&.x')
    """
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _head(name: str) -> str:
    return f'.TH {escaped(name.upper())} 1 "" "cowfs" "User Commands"'


def _option(action: argparse.Action) -> list[str]:
    value = ""
    if action.nargs != 0:
        value = str(action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper()))
    if action.option_strings:
        words = ", ".join(f"\\fB{escaped(word)}\\fR" for word in action.option_strings)
        tag = f"{words} \\fI{escaped(value)}\\fR" if value else words
    else:
        tag = f"\\fI{escaped(value)}\\fR"
    return [".TP", tag, escaped((action.help or "").replace("%%", "%"))]


def page(name: str) -> str:
    """The page of a verb."""
    command = command_of(name)
    actions = [action for action in actions_of(parser_of(name)) if action.help != argparse.SUPPRESS]
    given = [str(action.metavar or action.dest.upper()) for action in actions if not action.option_strings]
    lines = [
        _head(f"cowfs-{name}"),
        ".SH NAME",
        f"cowfs\\-{escaped(name)} \\- {escaped(VERBS[name].summary)}",
        ".SH SYNOPSIS",
        "\\fBcowfs "
        + escaped(name)
        + "\\fR [\\fIOPTIONS\\fR]"
        + "".join(f" \\fI{escaped(word)}\\fR" for word in given),
        ".SH DESCRIPTION",
        escaped(command.description.replace("\n", " ")),
        ".SH OPTIONS",
    ]
    for action in actions:
        lines += _option(action)
    lines.append(".SH EXAMPLES")
    for example in command.examples:
        lines += [".PP", ".nf", escaped(example), ".fi"]
    lines += [".SH SEE ALSO", "\\fBcowfs\\fR(1)", ""]
    return "\n".join(lines)


def overview() -> str:
    """The page of the command itself."""
    lines = [
        _head("cowfs"), ".SH NAME", "cowfs \\- copy\\-on\\-write root file systems",
        ".SH SYNOPSIS", "\\fBcowfs\\fR \\fIVERB\\fR [\\fIARGUMENTS\\fR]",
        ".SH DESCRIPTION",
        "Stacks of layers, mounted with a size limit that holds; snapshots of them in constant time, kept in a store. Each verb has a page of its own.",
    ]  # fmt: skip
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines.append(f".SS {escaped(group)}")
        for name, verb in VERBS.items():
            if verb.group == group:
                lines += [".TP", f"\\fBcowfs\\-{escaped(name)}\\fR(1)", escaped(verb.summary)]
    lines.append(".SH EXIT STATUS")
    for code, text in STATUSES:
        lines += [".TP", f"\\fB{code}\\fR", escaped(text)]
    lines += [
        ".SH ENVIRONMENT", ".TP", "\\fBCOWFS_ROOT\\fR", escaped("the store, where --root does not name one"),
        ".TP", "\\fBCOWFS_FSYNC\\fR", escaped("0: sync nothing; a loss of power may undo the latest verbs"),
        ".TP", "\\fBPAGER\\fR", escaped("shows long lists at a terminal; cat for none"), "",
    ]  # fmt: skip
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """File name -> page, of all."""
    return {"cowfs.1": overview(), **{f"cowfs-{name}.1": page(name) for name in VERBS}}


def main(arguments: list[str]) -> int:
    """Write all pages into the named directory, which is made if missing, and return the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m cowfs.cli.manual DIRECTORY\n")
        return 2
    os.makedirs(arguments[0], exist_ok=True)
    for name, text in pages().items():
        with open(os.path.join(arguments[0], name), "w", encoding="utf-8") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
