"""The page "when to choose which backend": rules in words, and beside each the figures of this very run.

The rules follow from how the backends store a change; the table shows whether this host bears them out. A figure that
was not measured is left out, never invented.
"""

from __future__ import annotations

from dataclasses import dataclass

from .claim import Result, show

BACKENDS = ("overlay", "row", "vfs")

RULES = """\
- **overlay**: the default. A changed file is copied whole, once; everything else is shared. Choose it for root file
  systems, package installs, builds and CI: many files, most of them small, each written whole. Its layers are the
  kernel overlayfs's own, so that any container tool can mount them.
- **row**: only the changed blocks are stored. Choose it where big files change in part: databases, virtual disks, model
  and index files, many sandboxes over one big data set; and where live snapshots must be cheap. Its price is one
  more look-up a read, and scattered blocks until `cowfs compact`.
- **vfs**: each snapshot is a complete copy (shared by reflink where the host can). Choose it where a snapshot must be
  an ordinary directory that needs no mount at all, or as the reference to check the others against. On a host without
  reflinks a snapshot costs the whole tree in time and space.
- **btrfs**: a layer is a subvolume, so the first write into a big file copies nothing and the kernel serves the tree.
  Choose it as root where the store is on btrfs.
- **zfs**: the same with clones, where the store is on a zfs dataset (with zfs-fuse: no xattrs).
- **aufs**: overlay with layers in the archive form. Choose it to exchange layers with an old Docker host.
- **block**: a layer is a file system of its own on a thin block image, as root. Choose it for programs that need
  all of ext4 or xfs, and for virtual machines; preparing, committing and removing a layer take longer than with overlay."""


@dataclass(frozen=True, slots=True)
class Row:
    """One workload: where its figure is found. ``x`` is "first", "last" or None."""

    workload: str
    claim: str
    metric: str
    unit: str
    x: str | None = None
    more: bool = False


WORKLOADS = (
    Row("first 4 KiB written to a small file", "first_write", "latency", "s", "first"),
    Row("first 4 KiB written to the biggest file", "first_write", "latency", "s", "last"),
    Row("bytes stored for one 4 KiB write to a big file", "amplification", "stored", "B"),
    Row("sequential read after 10 % was overwritten", "overwrite", "sequential read 10 %", "s"),
    Row("random read after 10 % was overwritten", "overwrite", "random read 10 %", "s"),
    Row("a snapshot made", "snapshots", "create", "s", "last"),
    Row("a snapshot removed", "snapshots", "remove", "s", "last"),
    Row("random read through the deepest chain", "depth", "random read", "s", "last"),
    Row("sqlite transactions", "sqlite", "transactions", "1/s", None, True),
    Row("PostgreSQL transactions", "postgres", "transactions", "1/s", None, True),
    Row("space of a sandbox that changes 1 % of a big file", "sandboxes", "space a sandbox", "B"),
)


def lives(result: Result) -> str:
    """Markdown: each subject of the claim ``store_drivers`` with the medians of its verbs; the subjects that could not run, with the reason."""
    verbs = list(dict.fromkeys(metric for metric, _, _ in result.samples))
    lines = ["| a layer's life, measured in this run | " + " | ".join(verbs) + " |", "|---" * (len(verbs) + 1) + "|"]
    for subject in dict.fromkeys(subject for _, subject, _ in result.samples):
        cells = [show(result.median(verb, subject, None), "s") for verb in verbs]
        lines.append(f"| {subject} | " + " | ".join(cells) + " |")
    lines += [f"\n{subject}: not measured: {why}" for subject, why in result.skipped.items()]
    return "\n".join(lines) + "\n\n" + LIVES


LIVES = """\
Compare alike with alike: cowfs's drivers are called as a library, and their mounts are cowfs's own server's (`overlay, kernel`, `block`, `btrfs`,
`zfs`: the kernel's, or zfs-fuse's); containerd's snapshotters are called through their socket, without its content store, their diff by a
start of `ctr` that makes the layer's archive; podman is a command for each verb, as "overlay, commands" is cowfs's, and its commit packs and unpacks the layer.
cowfs syncs what it commits. The first write is 4 KiB into the big file of the base; `vfs` copied that in `prepare`."""


def advice(results: dict[str, Result]) -> str:
    """Markdown: the rules, then one row a workload with each backend's median and the best in bold."""
    lines = []
    for row in WORKLOADS:
        result = results.get(row.claim)
        if result is None:
            continue
        found: dict[str, float] = {}
        for backend in BACKENDS:
            xs = result.xs(row.metric, backend)
            x = None if row.x is None or not xs else xs[0] if row.x == "first" else xs[-1]
            value = result.median(row.metric, backend, x)
            if value is not None:
                found[backend] = value
        if not found:
            continue
        best = (max if row.more else min)(found.values())
        cells = [
            (
                "-"
                if b not in found
                else f"**{show(found[b], row.unit)}**"
                if found[b] == best
                else show(found[b], row.unit)
            )
            for b in BACKENDS
        ]
        lines.append(f"| {row.workload} | " + " | ".join(cells) + " |")
    drivers = results.get("store_drivers")
    rules = RULES + ("\n\n" + lives(drivers) if drivers is not None and drivers.samples else "")
    if not lines:
        return rules + ("" if rules != RULES else "\n\n(No backend was measured in this run.)")
    return (
        rules
        + "\n\n| workload, measured in this run | "
        + " | ".join(BACKENDS)
        + " |\n"
        + "|---|" * 1
        + "---|" * len(BACKENDS)
        + "\n"
        + "\n".join(lines)
    )
