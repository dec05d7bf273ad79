"""docs/cli.md, written from the parsers: ``python -m cowfs.cli.reference > docs/cli.md``.

Strategy: as the completion scripts, from the one table of verbs; tests/cli compares the file with the output.
"""

from __future__ import annotations

import argparse
import sys

from cowfs.cli import VERBS, command_of, parser_of
from cowfs.cli.common import COMMON, HOW
from cowfs.cli.parsers import actions_of

HEAD = """\
# The command

<!-- Written by `python -m cowfs.cli.reference > docs/cli.md`; change the parsers in cowfs/cli, not this file. -->

Arguments that start with `/`, `./` or `../` are paths; others name snapshots in the store where a verb takes either.
The store is the one that `--root` names, else `$COWFS_ROOT`, else `root` of `~/.config/cowfs.toml` or `/etc/cowfs.toml`, else `/var/lib/cowfs` as
root and the user's data directory otherwise. Those files may also say `fsync = false`, as `COWFS_FSYNC=0` does; `COWFS_CONFIG` names one in place of both.

Every verb has these options, before or behind it:

| option | meaning |
|---|---|
COMMON
`--json` prints what a verb tells as JSON, of every verb an array of objects, also where it tells of one thing (what is followed, `events` and `logs -f`, is an
object a line); `--jsonl` prints an object a line; with any of the three `run` and `sh` put the command's own output on standard error;
`--format` a line for each object by a template of its fields, as `'{name}\\t{created:age}\\t{usage.bytes:size}'` (`:size`, `:age`, `:time`, and
Python's own format specs). A name that is not UTF-8 is there exactly as `KEY_b64`, too. `$COWFS_PROGRESS` (`none`, `plain`, `json`) is what `auto` means. `--progress json` writes an object a line to standard error:
`what`, `done`, `total` (null where it is not known), `seconds`, and `end` in the last one.

Errors are one line on standard error (what, where, how to mend it) and an exit status:

| status | meaning |
|---|---|
"""

STATUSES = (
    (0, "done"),
    (1, "an error of the system; `diff --quiet`: there are changes"),
    (2, "InvalidArgument: a name, size, option or path that can never work"),
    (3, "NotFound"),
    (4, "AlreadyExists"),
    (5, "FailedPrecondition: in use, mounted, has children, read-only"),
    (6, "LimitExceeded"),
    (7, "Corrupt: what is on disk contradicts its own records"),
    (8, "Unsupported: this host or user lacks something; the message says what"),
    (130, "interrupted"),
)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _usage(name: str, actions: list[argparse.Action]) -> str:
    words = [f"cowfs {name}"]
    if any(action.option_strings and action.dest != "help" for action in actions):
        words.append("[OPTIONS]")
    for action in actions:
        if not action.option_strings:
            word = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
            optional = action.nargs in ("?", "*", argparse.REMAINDER)
            words.append(f"[{word}]" if optional else str(word))
    return " ".join(words)


def _verb(name: str) -> str:
    command, actions = command_of(name), actions_of(parser_of(name))
    lines = [f"### {name}", "", "```", _usage(name, actions), "```", "", command.description.replace("\n", " "), ""]
    rows = []
    for action in actions:
        if action.dest == "help" or action.help in (argparse.SUPPRESS, *(text for _, text in COMMON)):
            continue
        value = ""
        if action.option_strings and action.nargs != 0:
            value = "=" + str(action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest))
        head = ", ".join(action.option_strings) if action.option_strings else str(action.metavar or action.dest)
        rows.append(f"| `{_cell(head + value)}` | {_cell((action.help or '').replace('%%', '%'))} |")
    if rows:
        lines += ["| argument | meaning |", "|---|---|", *rows, ""]
    if command.examples:
        lines += ["```sh", *command.examples, "```", ""]
    return "\n".join(lines)


def reference() -> str:
    """The whole page."""
    common = ""
    for names, text in COMMON:
        value = f"={'|'.join(HOW)}" if names == ("--progress",) else ""
        common += f"| `{_cell(', '.join(names) + value)}` | {_cell(text)} |\n"
    parts = [HEAD.replace("COMMON\n", common + "\n") + "".join(f"| {code} | {text} |\n" for code, text in STATUSES)]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        parts.append(f"## {group}\n")
        parts += [_verb(name) for name, verb in VERBS.items() if verb.group == group]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(reference())
