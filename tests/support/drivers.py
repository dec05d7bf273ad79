"""All drivers that come with cowfs, and hosts on which each can keep a store: what the matrix of tests runs over.

docs/drivers.md has the matrix as a table; ``tests/drivers/test_matrix.py`` compares it with what pytest collects.
"""

from __future__ import annotations

ALL = ("overlay", "vfs", "row", "aufs", "btrfs", "zfs", "block")

HOSTS = {"btrfs": "btrfs", "zfs": "zfs"}
"""Where a store can be, for drivers that cannot keep one on a tmpfs."""
