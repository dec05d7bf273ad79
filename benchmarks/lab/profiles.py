"""The sizes of a run, in one table. No other module holds a size of its own.

``full`` is the profile of the claims in README.md; ``quick`` ends within three minutes and shows the same shapes
on smaller inputs; ``tiny`` only proves that each benchmark runs.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Sizes of one run. Byte sizes are multiples of 4 KiB."""

    name: str
    rounds: int  # samples a subject and metric
    claim_seconds: float  # after this, a claim begins no further round
    total_seconds: float  # after this, the run begins no further claim
    walk_files: int  # files of the tree that is walked and read
    unpack_files: int  # files that are untarred, copied and removed
    chown_files: int
    memory_files: int  # files walked while the server's memory is watched
    lookups: int  # missing names asked for, one after another
    big: int  # bytes of the "big file"
    first_write: tuple[int, ...]  # bytes of the files that get their first 4 KiB write
    fio_size: int
    fio_seconds: int
    layers: int  # of the deep stack that is compared with two layers
    depths: tuple[int, ...]  # chain lengths
    snapshots: tuple[int, ...]  # the number of snapshots that exist when one more is made
    sandboxes: int
    sandbox_big: int  # bytes of the file of which each sandbox changes 1 %
    transactions: int  # sqlite
    pg_seconds: int
    store_snapshots: int  # the big store; the small one has a hundred
    store_tree: int  # files of the tree whose snapshots are compared
    apply_files: int  # entries of the layer that is applied and exported
    forks: int


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            name="tiny",
            rounds=1,
            claim_seconds=5,
            total_seconds=120,
            walk_files=300,
            unpack_files=100,
            chown_files=50,
            memory_files=500,
            lookups=200,
            big=4 * MIB,
            first_write=(64 * KIB, 1 * MIB),
            fio_size=4 * MIB,
            fio_seconds=1,
            layers=16,
            depths=(1, 4),
            snapshots=(1, 4),
            sandboxes=3,
            sandbox_big=4 * MIB,
            transactions=20,
            pg_seconds=1,
            store_snapshots=200,
            store_tree=500,
            apply_files=200,
            forks=5,
        ),
        Profile(
            name="quick",
            rounds=3,
            claim_seconds=2,
            total_seconds=150,
            walk_files=2_000,
            unpack_files=200,
            chown_files=200,
            memory_files=5_000,
            lookups=2_000,
            big=128 * MIB,
            first_write=(1 * MIB, 64 * MIB),
            fio_size=32 * MIB,
            fio_seconds=1,
            layers=128,
            depths=(1, 16),
            snapshots=(1, 32),
            sandboxes=10,
            sandbox_big=64 * MIB,
            transactions=200,
            pg_seconds=2,
            store_snapshots=2_000,
            store_tree=5_000,
            apply_files=2_000,
            forks=50,
        ),
        Profile(
            name="full",
            rounds=5,
            claim_seconds=150,
            total_seconds=3_600,
            walk_files=46_700,
            unpack_files=5_000,
            chown_files=5_000,
            memory_files=200_000,
            lookups=20_000,
            big=1 * GIB,
            first_write=(1 * MIB, 16 * MIB, 256 * MIB, 1 * GIB, 4 * GIB),
            fio_size=256 * MIB,
            fio_seconds=3,
            layers=128,
            depths=(1, 2, 8, 32, 128),
            snapshots=(1, 10, 100, 1_000),
            sandboxes=100,
            sandbox_big=1 * GIB,
            transactions=2_000,
            pg_seconds=6,
            store_snapshots=100_000,
            store_tree=100_000,
            apply_files=30_000,
            forks=1_000,
        ),
    )
}
