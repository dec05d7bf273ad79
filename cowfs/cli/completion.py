"""`cowfs completion SHELL`: completion scripts, written from the parsers themselves.

Strategy: one description of every verb (its options with their values, whether its arguments are mount points) is taken
from the parsers, and three small writers turn it into a script. Nothing is listed twice, so nothing can be forgotten.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from cowfs._typed import NamedTuple
from cowfs.cli.common import Command, Commands
from cowfs.cli.parsers import actions_of


class Option(NamedTuple):
    """One option: its spellings, its help, and its value: None, words, or "any"."""

    names: tuple[str, ...]
    help: str
    value: tuple[str, ...] | str | None


class Shape(NamedTuple):
    """A verb as a shell needs it. ``arguments``: "mounts", "files", or words."""

    name: str
    summary: str
    options: tuple[Option, ...]
    arguments: str | tuple[str, ...]


def shapes(summaries: Mapping[str, str], parser_of: Callable[[str], argparse.ArgumentParser]) -> list[Shape]:
    """Every verb, of a table of what they do."""
    found = []
    for name, summary in summaries.items():
        options = []
        arguments: str | tuple[str, ...] = "files"
        for action in actions_of(parser_of(name)):
            choices = tuple(str(choice) for choice in action.choices) if action.choices else ()
            if action.option_strings:
                value = None if action.nargs == 0 else choices or "any"
                text = "show this help" if action.dest == "help" else action.help or ""
                options.append(Option(tuple(action.option_strings), text.split(" (default")[0], value))
            elif choices:
                arguments = choices
            elif name != "mount" and "MNT" in str(action.metavar):
                arguments = "mounts"
        found.append(Shape(name, summary, tuple(options), arguments))
    return found


def bash(shapes: Sequence[Shape]) -> str:
    """A script for bash-completion or for ``eval``."""
    cases = []
    for shape in shapes:
        words = " ".join(name for option in shape.options for name in option.names)
        valued = [
            f"      {'|'.join(option.names)}) "
            + (f'COMPREPLY=($(compgen -W "{" ".join(option.value)}" -- "$cur"));' if isinstance(option.value, tuple)
               else 'compopt -o default; COMPREPLY=();')
            + " return ;;"
            for option in shape.options
            if option.value is not None
        ]  # fmt: skip
        if shape.arguments == "mounts":
            arguments = (
                'COMPREPLY=($(compgen -W "$(cowfs mounts --quiet 2>/dev/null)" -- "$cur") $(compgen -d -- "$cur"))'
            )
        elif shape.arguments == "files":
            arguments = "compopt -o default; COMPREPLY=()"
        else:
            arguments = f'COMPREPLY=($(compgen -W "{" ".join(shape.arguments)}" -- "$cur"))'
        cases.append(
            f"    {shape.name})\n"
            + (f'      case "$prev" in\n{chr(10).join(valued)}\n      esac\n' if valued else "")
            + f'      if [[ "$cur" == -* ]]; then COMPREPLY=($(compgen -W "{words}" -- "$cur")); else {arguments}; fi ;;\n'
        )
    return f"""# bash completion for cowfs; load with: source <(cowfs completion bash)
_cowfs() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}}
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{" ".join(shape.name for shape in shapes)} --help --version" -- "$cur"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{"".join(cases)}  esac
}}
complete -F _cowfs cowfs
"""


def _zsh_quote(text: str) -> str:
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:").replace("'", "'\\''")


def zsh(shapes: Sequence[Shape]) -> str:
    """A script for ``$fpath`` or for ``eval``."""
    verbs = "\n".join(f"    '{shape.name}:{_zsh_quote(shape.summary)}'" for shape in shapes)
    cases = []
    for shape in shapes:
        specs = []
        for option in shape.options:
            value = ""
            if isinstance(option.value, tuple):
                value = f":value:({' '.join(option.value)})"
            elif option.value:
                value = ":value:_files"
            for name in option.names:
                specs.append(f"'*{name}[{_zsh_quote(option.help)}]{value}'")
        if shape.arguments == "mounts":
            specs.append("'*:mount point:_cowfs_mounts'")
        elif shape.arguments == "files":
            specs.append("'*:directory:_files -/'")
        else:
            specs.append(f"'*:value:({' '.join(shape.arguments)})'")
        cases.append(f"    {shape.name}) _arguments {' '.join(specs)} ;;")
    return f"""#compdef cowfs
# zsh completion for cowfs; load with: source <(cowfs completion zsh)
_cowfs_mounts() {{
  local -a found=("${{(@f)$(cowfs mounts --quiet 2>/dev/null)}}")
  compadd -a found
  _files -/
}}
_cowfs() {{
  local -a verbs=(
{verbs}
  )
  if (( CURRENT == 2 )); then _describe verb verbs; return; fi
  local verb=$words[2]
  shift words
  (( CURRENT-- ))
  case "$verb" in
{chr(10).join(cases)}
  esac
}}
if [[ "$funcstack[1]" == _cowfs ]]; then _cowfs "$@"; else compdef _cowfs cowfs; fi
"""


def fish(shapes: Sequence[Shape]) -> str:
    """A script for ``~/.config/fish/completions`` or for ``source``."""
    lines = ["# fish completion for cowfs; load with: cowfs completion fish | source", "complete -c cowfs -f"]
    for shape in shapes:
        lines.append(f"complete -c cowfs -n __fish_use_subcommand -a {shape.name} -d {shlex.quote(shape.summary)}")
        seen = f"-n '__fish_seen_subcommand_from {shape.name}'"
        for option in shape.options:
            line = f"complete -c cowfs {seen}"
            for name in option.names:
                line += f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
            if isinstance(option.value, tuple):
                line += f" -x -a {shlex.quote(' '.join(option.value))}"
            elif option.value:
                line += " -r -F"
            lines.append(f"{line} -d {shlex.quote(option.help)}")
        if shape.arguments == "mounts":
            lines.append(
                f"complete -c cowfs {seen} -a '(cowfs mounts --quiet 2>/dev/null; __fish_complete_directories)'"
            )
        elif shape.arguments == "files":
            lines.append(f"complete -c cowfs {seen} -a '(__fish_complete_directories)'")
        else:
            lines.append(f"complete -c cowfs {seen} -a {shlex.quote(' '.join(shape.arguments))}")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Sequence[Shape]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=sorted(SHELLS), help="the shell")


def commands(summaries: Mapping[str, str], parser_of: Callable[[str], argparse.ArgumentParser]) -> Commands:
    """The verb, for a command with these verbs and parsers."""

    def run(args: argparse.Namespace) -> int:
        sys.stdout.write(SHELLS[args.shell](shapes(summaries, parser_of)))
        return 0

    return {
        "completion": Command(
            _configure,
            run,
            "Print a completion script for a shell.",
            (
                "source <(cowfs completion bash)",
                "cowfs completion zsh > ~/.zfunc/_cowfs",
                "cowfs completion fish > ~/.config/fish/completions/cowfs.fish",
            ),
        ),
    }
