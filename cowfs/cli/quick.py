"""A parser of ordinary argument lists: argparse with ``re`` and ``gettext`` takes longer to import than most looking verbs run.

Strategy. A verb describes its arguments once, by the calls that :mod:`argparse` knows; a :class:`Quick` takes the same calls and keeps what it was told as
a table. It parses what users write nearly always: options spelled out, ``--option value`` and ``--option=value``, arguments anywhere between them. For all
else it raises :class:`Odd` (abbreviations, short options run together, ``--``, values that begin with a dash, ``--help``, everything wrong), and the real
parser, which is made by the same calls, judges. So there is one description, one text for each error, and no second opinion:
tests/cli/test_cli_quick.py compares both over random lists.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

__all__ = ["Odd", "Quick", "Taken"]

Values = type(sys.implementation)
"""An object of any attributes (types.SimpleNamespace, without the import): what argparse calls a namespace."""

_CONSTANTS: dict[str, tuple[object, object]] = {"store_true": (True, False), "store_const": (None, None)}
"""Action without a value -> what it stores, and its default, where nothing else is said."""

_FEWEST = {None: 1, "?": 0, "*": 0, "+": 1}
"""How many words an argument takes -> the fewest."""


class Odd(Exception):
    """An argument list, or a description, for argparse."""


class Taken(Exception):
    """An option of this name is there already."""


class _Argument:
    """A line of the table: an option or an argument. Texts for help are left out."""

    __slots__ = ("action", "choices", "const", "default", "dest", "group", "nargs", "required", "type")

    def __init__(
        self,
        group: object,
        *,
        action: str = "store",
        nargs: str | None = None,
        const: object = None,
        default: object = None,
        type: Callable[[str], object] | None = None,
        choices: Container[object] | None = None,
        required: bool = False,
        dest: str = "",
    ) -> None:
        self.group = group
        self.action = action
        self.nargs = nargs
        self.const = const
        self.default = default
        self.type = type
        self.choices = choices
        self.required = required
        self.dest = dest

    def value(self, text: str) -> object:
        """The value of a word.

        Raises:
            Odd: it has another type, or is none of the choices.
        """
        found: object = text
        if self.type is not None:
            try:
                found = self.type(text)
            except ValueError:
                raise Odd from None
        if self.choices is not None and found not in self.choices:
            raise Odd
        return found


class _Group:
    """Options of which only one may be given."""

    def __init__(self, parser: Quick) -> None:
        self._parser = parser

    def add_argument(self, *names: str, **how: object) -> None:
        """As of a parser."""
        self._parser.take(names, self, how)


class Quick:
    """A verb's description, and the parser by it. Attributes for help alone may be set, and do nothing."""

    def __init__(self) -> None:
        self._options: dict[str, _Argument] = {}  # by each of its names
        self._arguments: list[_Argument] = []
        self._every: list[_Argument] = []
        self._defaults: dict[str, object] = {}
        self.usage = ""

    # -- the description, by the calls of argparse ---------------------------------------------------------------------

    def add_argument(self, *names: str, **how: object) -> None:
        """An option or an argument.

        Raises:
            Taken: one of its names is another option's.
        """
        self.take(names, None, how)

    def take(self, names: tuple[str, ...], group: object, how: dict[str, object]) -> None:
        """Put an option or argument into the table."""
        taken = {"-h", "--help", *self._options}
        if not taken.isdisjoint(names):
            raise Taken
        action = how.get("action", "store")
        known = {key: value for key, value in how.items() if key not in ("help", "metavar")}
        if action in _CONSTANTS:
            const, default = _CONSTANTS[str(action)]
            known = {"const": const, "default": default, **known}
        elif action not in ("store", "append"):
            raise Odd
        if names[0].startswith("-"):
            long = next((name for name in names if name.startswith("--")), names[0])
            known.setdefault("dest", long.lstrip("-").replace("-", "_"))
        else:
            known["dest"] = names[0]
        made = _Argument(group, **known)  # type: ignore[arg-type]  # the values are those of argparse's call
        self._every.append(made)
        if not names[0].startswith("-"):
            self._arguments.append(made)
        for name in names if names[0].startswith("-") else ():
            self._options[name] = made

    def add_mutually_exclusive_group(self) -> _Group:
        """Options of which only one may be given."""
        return _Group(self)

    def set_defaults(self, **values: object) -> None:
        """Values that no option has."""
        self._defaults |= values
        for argument in self._every:
            argument.default = values.get(argument.dest, argument.default)

    # -- parsing -------------------------------------------------------------------------------------------------------

    def parse_known_args(self, arguments: Sequence[str]) -> tuple[object, list[str]]:
        """The values, and no words that are left.

        Raises:
            Odd: argparse has to judge.
        """
        found: dict[str, object] = {}
        for argument in self._every:
            found.setdefault(argument.dest, argument.default)
        found = {**self._defaults, **found}
        words, given = [], []
        rest = iter(arguments)
        for word in rest:
            if word[:1] != "-" or word == "-":
                words.append(word)
            else:
                given.append(self._option(word, rest, found))
        self._check(given)
        self._place(words, found)
        return Values(**found), []

    def _option(self, word: str, rest: Iterator[str], found: dict[str, object]) -> _Argument:
        """Store what an option says."""
        name, equals, text = word.partition("=") if word not in self._options else (word, "", "")
        option = self._options.get(name)
        if option is None or option.nargs is not None:
            raise Odd
        if option.action in _CONSTANTS:
            if equals:
                raise Odd
            found[option.dest] = option.const
            return option
        if not equals:
            text = next(rest, "--")
        if text == "--" or (not equals and text[:1] == "-" != text):  # of --size=-- argparse has no one opinion
            raise Odd
        value = option.value(text)
        if option.action == "append":
            before = found[option.dest]
            value = [*before, value] if isinstance(before, list) else [value]
        found[option.dest] = value
        return option

    def _check(self, given: list[_Argument]) -> None:
        """Hold what is said of options together."""
        for option in given:
            if option.group is not None and any(other.group is option.group and other is not option for other in given):
                raise Odd
        if any(option.required and option not in given for option in self._options.values()):
            raise Odd

    def _place(self, words: list[str], found: dict[str, object]) -> None:
        """Give the words to the arguments: each as many as leave enough for those behind it."""
        spare = len(words)
        for argument in self._arguments:
            if argument.nargs not in _FEWEST:
                raise Odd
            spare -= _FEWEST[argument.nargs]
        if spare < 0:
            raise Odd
        at = 0
        for argument in self._arguments:
            fewest = _FEWEST[argument.nargs]
            more = 0 if argument.nargs is None else min(spare, 1) if argument.nargs == "?" else spare
            values = [argument.value(word) for word in words[at : at + fewest + more]]
            at += fewest + more
            spare -= more
            if argument.nargs in ("*", "+"):
                found[argument.dest] = values or (argument.default if argument.default is not None else [])
            elif values:
                found[argument.dest] = values[0]
        if spare:
            raise Odd
