"""Dataclasses whose import costs nothing: :mod:`dataclasses` (with ``inspect``, ``ast``, ``dis``) takes as long to import as Python to start.

Strategy: to type checkers and documentation :func:`record` is :func:`dataclasses.dataclass`. At run time it makes the same class by itself, for the
one form that the records of :mod:`cowfs.model` and of the index have: frozen, with slots, without inheritance. ``__dataclass_fields__`` is made
by :mod:`dataclasses` when somebody asks for it, so ``asdict``, ``replace``, ``fields`` and ``is_dataclass`` work as ever.
"""

from __future__ import annotations

__all__ = ["field", "record", "replace"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass as record, field, replace
    from typing import Any
else:

    class field:
        """A default that is made anew for each record."""

        def __init__(self, *, default_factory):
            self.default_factory = default_factory

    class _Missing:
        def __repr__(self):
            return "<no default>"

    _MISSING = _Missing()

    class _Fields:
        """``__dataclass_fields__``, made on first use."""

        def __init__(self, annotations, defaults):
            self._annotations, self._defaults = annotations, defaults

        def __get__(self, instance, owner):
            import dataclasses

            described = []
            for name, kind in self._annotations.items():
                default = self._defaults.get(name, _MISSING)
                if isinstance(default, field):
                    described.append((name, kind, dataclasses.field(default_factory=default.default_factory)))
                else:
                    described.append(
                        (name, kind, *(() if default is _MISSING else (dataclasses.field(default=default),)))
                    )
            twin = dataclasses.make_dataclass(owner.__name__, described, frozen=True, kw_only=True)
            owner.__dataclass_fields__ = twin.__dataclass_fields__
            return owner.__dataclass_fields__

    def replace(of, /, **changes):
        """As :func:`dataclasses.replace`, of a record."""
        return of.__replace__(**changes)

    def record(*, frozen, slots, kw_only=False):
        """As :func:`dataclasses.dataclass` with these arguments, of which the first two must be true."""
        assert frozen
        assert slots
        return lambda cls: _make(cls, kw_only)

    def _make(cls, kw_only):
        annotations = dict(cls.__annotations__)
        names = tuple(annotations)
        defaults = {name: cls.__dict__[name] for name in names if name in cls.__dict__}
        namespace = {
            name: value
            for name, value in cls.__dict__.items()
            if name not in defaults and name not in ("__dict__", "__weakref__")
        }
        namespace |= {
            "__slots__": names,
            "__qualname__": cls.__qualname__,
            "__match_args__": () if kw_only else names,
            "__dataclass_fields__": _Fields(annotations, defaults),
            "__setattr__": _frozen_set,
            "__delattr__": _frozen_delete,
            "__eq__": _equal,
            "__hash__": _hash,
            "__repr__": _shown,
            "__getstate__": _values,
            "__setstate__": _restore,
            "__replace__": _replaced,
        }
        made = type(cls)(cls.__name__, cls.__bases__, namespace)
        made.__init__ = _Init(annotations, defaults, kw_only)
        return made

    class _Init:
        """``__init__``, compiled on first use: most verbs of the command make few of the records that they import."""

        def __init__(self, *how):
            self._how = how
            self._function = None

        def __get__(self, instance, owner):
            made = next((cls for cls in owner.__mro__ if cls.__dict__.get("__init__") is self), None)
            if made is not None:  # else another thread was the first
                self._function = _initializer(made, *self._how)
                made.__init__ = self._function
            return self._function.__get__(instance, owner)

    def _initializer(made, annotations, defaults, kw_only):
        """Written as source, as dataclasses do: a record of the index is made for each row."""
        scope = {"_missing": _MISSING}
        arguments, lines = [], []
        for name in made.__slots__:
            scope[f"_set_{name}"] = made.__dict__[name].__set__  # of the slot: this class's own __setattr__ refuses
            default = defaults.get(name, _MISSING)
            value = name
            if isinstance(default, field):
                scope[f"_make_{name}"] = default.default_factory
                arguments.append(f"{name}=_missing")
                value = f"_make_{name}() if {name} is _missing else {name}"
            elif default is _MISSING:
                arguments.append(name)
            else:
                scope[f"_default_{name}"] = default
                arguments.append(f"{name}=_default_{name}")
            lines.append(f"    _set_{name}(self, {value})")
        star = "*, " if kw_only and arguments else ""
        exec(f"def __init__(self, {star}{', '.join(arguments)}):\n" + "\n".join(lines or ["    pass"]), scope)
        init = scope["__init__"]
        init.__qualname__ = f"{made.__qualname__}.__init__"
        init.__annotations__ = {**annotations, "return": "None"}
        init.__module__ = made.__module__
        return init

    def _frozen_set(self, name, value):
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def _frozen_delete(self, name):
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def _values(self) -> list[Any]:
        return [getattr(self, name) for name in type(self).__slots__]

    def _restore(self, values):
        for name, value in zip(type(self).__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def _equal(self, other):
        if self is other:
            return True
        return _values(self) == _values(other) if other.__class__ is self.__class__ else NotImplemented

    def _hash(self):
        return hash(tuple(_values(self)))

    def _shown(self):
        told = ", ".join(f"{name}={getattr(self, name)!r}" for name in type(self).__slots__)
        return f"{type(self).__qualname__}({told})"

    def _replaced(self, /, **changes):
        return type(self)(**{**dict(zip(type(self).__slots__, _values(self), strict=True)), **changes})
