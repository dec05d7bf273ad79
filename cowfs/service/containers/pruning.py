"""Removing what nobody runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cowfs.errors import FailedPrecondition, NotFound
from cowfs.service.containers.container import Container

if TYPE_CHECKING:
    from cowfs.service.containers.manager import Containers

__all__ = ["prune"]


def prune(containers: Containers, fits: Callable[[Container], bool]) -> tuple[list[str], int]:
    """Remove those that do not run; their ids, and the bytes that they held."""
    done, freed = [], 0
    for each in containers.all():
        if each.running or each.removing or not fits(each):
            continue
        size = containers.size(each)
        try:
            containers.remove(each)
        except (FailedPrecondition, NotFound):
            continue
        done.append(each.id)
        freed += size
    return done, freed
