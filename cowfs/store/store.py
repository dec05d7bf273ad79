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
    """
