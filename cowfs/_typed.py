"""The names of :mod:`typing`, for annotations: its import takes longer than opening an index, and no annotation is looked at while cowfs runs.

To type checkers and documentation they are those of :mod:`typing`. At run time a :class:`NamedTuple` is a :func:`collections.namedtuple`,
a :class:`Protocol` an ordinary class, a :class:`TypedDict` a dictionary, :func:`cast` gives back its argument, and the other names stand for nothing. A module whose annotations are read
while it runs (:func:`typing.get_type_hints`) imports :mod:`typing` itself.
"""

from __future__ import annotations

__all__ = [
    "IO",
    "TYPE_CHECKING",
    "Any",
    "BinaryIO",
    "ClassVar",
    "Concatenate",
    "Final",
    "Generic",
    "Literal",
    "NamedTuple",
    "NoReturn",
    "ParamSpec",
    "Protocol",
    "Self",
    "TextIO",
    "TypeAlias",
    "TypeGuard",
    "TypeVar",
    "TypedDict",
    "cast",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import (
        IO,
        Any,
        BinaryIO,
        ClassVar,
        Concatenate,
        Final,
        Generic,
        Literal,
        NamedTuple,
        NoReturn,
        ParamSpec,
        Protocol,
        Self,
        TextIO,
        TypeAlias,
        TypedDict,
        TypeGuard,
        TypeVar,
        cast,
    )
else:
    from collections import namedtuple

    class _Tuples(type):
        """Makes a named tuple of a class: its annotations are the fields, its values their defaults, all else stays."""

        def __new__(mcls, name, bases, namespace):
            fields = namespace.get("__annotations__", {})
            defaults = [namespace[field] for field in fields if field in namespace]
            made = namedtuple(name, fields, defaults=defaults, module=namespace["__module__"])
            made.__annotations__ = fields
            for key, value in namespace.items():
                if key not in fields and key not in ("__annotations__", "__module__"):
                    setattr(made, key, value)
            return made

    NamedTuple = type.__new__(_Tuples, "NamedTuple", (), {})

    class Generic:
        """A class with parameters."""

        def __class_getitem__(cls, _):
            return cls

    class Protocol(Generic):
        """A class that only type checkers know."""

    class TypedDict(dict):
        """A dictionary."""

    class _Form:
        """Stands for a name that only annotations use; parameters, alternatives and calls give it again."""

        def __getitem__(self, _):
            return self

        __or__ = __ror__ = __call__ = lambda self, *_, **__: self

    def cast(_, value):
        """The value."""
        return value

    IO = Any = BinaryIO = ClassVar = Concatenate = Final = Literal = NoReturn = ParamSpec = Self = TextIO = (
        TypeAlias
    ) = TypeGuard = TypeVar = _Form()
