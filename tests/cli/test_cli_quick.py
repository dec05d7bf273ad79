"""The quick parser and argparse, told the same, give the same: whatever the quick one takes upon itself."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from random import Random

import pytest

from cowfs.cli import VERBS, command_of, common, parsed, parser_of
from cowfs.cli.quick import Odd, Quick, Taken

VALUES = [
    "base",
    "work",
    "",
    "-",
    "--",
    "-5",
    "-1.5",
    "5",
    "1G",
    "a b",
    "-a b",
    "=",
    "name=x",
    "none",
    "fuse",
    "kernel",
    "fsync",
    "9",
    "é",
    "\udcff",
]

LISTS = 150
OTHERS = ("serve", "unshare")
"""``serve`` describes a daemon with all that argparse has; ``unshare`` takes the words of another command as they come."""


def values(found: object) -> dict[str, object]:
    """All but the function, which ``completion`` makes anew each time."""
    return {name: value for name, value in vars(found).items() if name != "run"}


def by_argparse(verb: str, words: list[str]) -> dict[str, object] | None:
    """The values; None where it refuses."""
    try:
        return values(parsed(verb, words))
    except SystemExit:
        return None


def lists_of(verb: str, random: Random) -> Iterator[list[str]]:
    """Lists of words for a verb: its options in each spelling that argparse takes, whole and shortened, and arguments."""
    parser = parser_of(verb)
    names = sorted(parser._option_string_actions)
    short = [name for name in names if len(name) == 2]
    texts = [*VALUES, *sorted({str(choice) for action in parser._actions for choice in action.choices or ()})]
    kinds: list[Callable[[], str]] = [
        lambda: random.choice(texts),
        lambda: random.choice(names),
        lambda: f"{random.choice(names)}={random.choice(texts)}",
        lambda: random.choice(names)[: random.randint(2, 8)],
        lambda: random.choice(short) + random.choice(texts),
        lambda: random.choice(short) + random.choice(short)[1:],
    ]
    for _ in range(LISTS):
        yield [random.choices(kinds, (6, 6, 2, 1, 1, 1))[0]() for _ in range(random.randint(0, 6))]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_parsed_quickly_is_parsed_as_argparse_does(verb: str) -> None:
    command = command_of(verb)
    for words in lists_of(verb, Random(verb)):
        quickly = common.parse_quickly(command, words)
        if quickly is not None:
            assert values(quickly) == by_argparse(verb, words), words


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_examples_need_no_argparse(verb: str) -> None:
    """Else the quick parser would be of no use."""
    command = command_of(verb)
    for line in command.examples:
        words = shlex.split(line.split("|")[0].split("&&")[0])
        if verb in OTHERS or words[:2] != ["cowfs", verb] or {">", "<", "$"} & set("".join(words)):
            continue
        quickly = common.parse_quickly(command, words[2:])
        if quickly is None:
            assert any(len(word) > 2 and word[0] == "-" != word[1] for word in words) or "--" in words, line
        else:
            assert values(quickly) == by_argparse(verb, words[2:]), line


def told(names: tuple[str, ...], **how: object) -> tuple[Quick, argparse.ArgumentParser]:
    quick, real = Quick(), argparse.ArgumentParser()
    for parser in (quick, real):
        parser.add_argument(*names, **how)  # type: ignore[arg-type]
    return quick, real


def test_arguments_are_given_as_many_words_as_leave_enough_for_the_next() -> None:
    for first, second in (("?", None), ("*", None), ("+", "?"), (None, "*"), ("?", "?"), ("*", "+")):
        for count in range(4):
            quick, real = Quick(), argparse.ArgumentParser(exit_on_error=False)
            for parser in (quick, real):
                parser.add_argument("one", nargs=first)
                parser.add_argument("two", nargs=second)
            words = ["a", "b", "c", "d"][:count]
            try:
                found = vars(quick.parse_known_args(words)[0])
            except Odd:
                with pytest.raises((SystemExit, argparse.ArgumentError)):
                    real.parse_args(words)
            else:
                assert found == vars(real.parse_args(words))


def test_a_name_is_given_once() -> None:
    quick, real = told(("-s", "--size"), help="of it")
    for name in ("-s", "--size", "-h", "--help"):
        with pytest.raises(Taken):
            quick.add_argument("-x", name)
        with pytest.raises(argparse.ArgumentError):
            real.add_argument("-x", name)


def test_what_it_does_not_know_is_left_to_argparse() -> None:
    quick = Quick()
    with pytest.raises(Odd):
        quick.add_argument("-v", action="count")
    quick.add_argument("words", nargs="...")
    with pytest.raises(Odd):
        quick.parse_known_args(["a"])
