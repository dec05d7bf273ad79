"""The existing containers, by id and by name.

Threads: any; one lock guards both.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

from cowfs.errors import AlreadyExists, NotFound
from cowfs.service.containers.container import Container
from cowfs.service.containers.names import made_up
from cowfs.service.errors import ApiError

__all__ = ["Register"]

_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+")


class Register:
    """The containers of a daemon; a name belongs to one container at a time, from before its making."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: dict[str, Container] = {}  # guarded by _lock
        self._names: dict[str, str] = {}  # guarded by _lock: name -> id, reserved ones too

    def __contains__(self, id: str) -> bool:
        return id in self._all

    def __iter__(self) -> Iterator[Container]:
        with self._lock:
            return iter(list(self._all.values()))

    def add(self, container: Container) -> None:
        """Add a container."""
        with self._lock:
            self._all[container.id] = container
            self._names[container.name] = container.id

    def drop(self, container: Container) -> None:
        """Remove a container, and free its name."""
        with self._lock:
            self._all.pop(container.id, None)
            self._names.pop(container.name, None)

    def release(self, name: str) -> None:
        """Free a name."""
        with self._lock:
            self._names.pop(name, None)

    def get(self, reference: str) -> Container:
        """The container of a name, an id, or the beginning of an id.

        Raises:
            NotFound: there is none; ApiError: 400: several.
        """
        wanted = reference.removeprefix("/")
        with self._lock:
            found = self._all.get(wanted) or self._all.get(self._names.get(wanted, ""))
            if found is not None:
                return found
            fitting = [each for id, each in self._all.items() if wanted and id.startswith(wanted)]
        if len(fitting) > 1:
            raise ApiError(400, f"multiple IDs found with provided prefix: {wanted}")
        if not fitting:
            raise NotFound(f"No such container: {reference}")
        return fitting[0]

    def reserve(self, name: str, id: str) -> str:
        """Take a name, "" for a generated one, for an id. Returns the name.

        Raises:
            AlreadyExists: another container has it. ApiError: 400: not a name.
        """
        name = name.removeprefix("/")
        if name and not _NAME.fullmatch(name):
            raise ApiError(400, f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
        with self._lock:
            if not name:
                name = made_up(self._names)
            if name in self._names:
                raise AlreadyExists(
                    f'Conflict. The container name "/{name}" is already in use by container "{self._names[name]}".'
                    " You have to remove (or rename) that container to be able to reuse that name."
                )
            self._names[name] = id
        return name
