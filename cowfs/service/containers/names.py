"""Generated names of containers."""

from __future__ import annotations

import random
from collections.abc import Container

__all__ = ["made_up"]

_FIRST = ("amber", "brisk", "calm", "deft", "early", "fair", "glad", "hazel", "idle", "jolly", "keen", "lunar", "mild", "neat",
          "olive", "plain", "quick", "ripe", "still", "tidy", "urban", "vivid", "warm", "young", "zesty")  # fmt: skip
_SECOND = ("alder", "birch", "cedar", "dune", "ember", "fjord", "grove", "heron", "islet", "juniper", "kestrel", "larch", "maple",
           "nettle", "otter", "pine", "quartz", "reed", "spruce", "thistle", "umbra", "vale", "willow", "yarrow", "zephyr")  # fmt: skip


def made_up(taken: Container[str]) -> str:
    """A free name of two words; with a number when many are taken."""
    chance = random.SystemRandom()
    for attempt in range(10_000):
        name = f"{chance.choice(_FIRST)}_{chance.choice(_SECOND)}" + (
            str(chance.randrange(attempt)) if attempt > 4 else ""
        )
        if name not in taken:
            return name
    raise AssertionError("ten thousand names are taken")
