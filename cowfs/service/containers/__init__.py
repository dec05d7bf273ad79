"""Containers."""

from __future__ import annotations

from typing import Any


class Containers:
    """The containers of a store."""

    def states(self) -> dict[str, int]:
        """How many containers there are, by state."""
        return {}

    def users(self) -> list[tuple[str, str, bool]]:
        """The containers that use images: (image id, container id, whether it runs)."""
        return []

    def summaries(self, *, every: bool = True, sizes: bool = False) -> list[dict[str, Any]]:
        """Containers as the list shows them."""
        return []
