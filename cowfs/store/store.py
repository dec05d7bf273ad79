"""The class that users import, put together from its groups of verbs."""

from __future__ import annotations

from cowfs.store.blocks import BlockVerbs
from cowfs.store.events import EventVerbs
from cowfs.store.files import FileVerbs
from cowfs.store.house import HouseVerbs
from cowfs.store.squash import SquashVerbs

__all__ = ["Store"]


class Store(BlockVerbs, SquashVerbs, HouseVerbs, FileVerbs, EventVerbs):
    """A store of snapshots in one directory. Make it with :meth:`open`.

    >>> with Store.open("store") as store:
    ...     records = store.prepare("work", size="1G")
    ...     info = store.commit("work", "base")
    ...     [(each.name, each.kind.value) for each in store.walk()]
    [('base', 'committed')]

    Threads: any may call any verb, each has its own connection to the index; two verbs on one key exclude each other, the
    second raises FailedPrecondition. Processes: any number may have the store open; the same holds.

    Fork: a child may go on with the store it inherited; it gets a connection of its own at its first verb. What a verb was doing
    in another thread at the fork is the parent's alone.

    A kill at any moment leaves a verb done or not begun, or finished by the next :meth:`open` (docs/internals/crash-safety.md).
    A closed store refuses every verb with FailedPrecondition.
    """
