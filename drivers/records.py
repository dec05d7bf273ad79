"""Mount records that more than one backend gives: data in mount(8)'s words, nothing is mounted here."""

from __future__ import annotations

from collections.abc import Sequence

from cowfs.format.mount_options import escape, join_layers
from cowfs.model import Limit, Mount

__all__ = ["MAX_OPTIONS", "fuse", "joined", "kernel"]

MAX_OPTIONS = 4095
"""Bytes of options that mount(2) takes: one page with its closing NUL."""


def fuse(lowers: Sequence[str], upper: str | None, work: str | None, *, readonly: bool = False, limit: Limit) -> Mount:
    """A mount by ``mount -t fuse.cowfs-overlayfs``; ``lowers`` topmost first."""
    if readonly and upper is not None:
        lowers, upper = [upper, *lowers], None
    options = ["ro"] if upper is None else []
    options.append("dotwh=0")  # in a store's layers such names are ordinary
    options.append("lowerdir=" + join_layers(lowers))
    if upper is not None and work is not None:
        options += (f"upperdir={escape(upper)}", f"workdir={escape(work)}")
        if limit.bytes is not None:
            options.append(f"size={limit.bytes}")
        if limit.inodes is not None:
            options.append(f"inodes={limit.inodes}")
    return Mount(type="fuse.cowfs-overlayfs", source="cowfs", options=tuple(options))


def kernel(lowers: Sequence[str], upper: str | None, work: str | None, *, trusted: bool) -> Mount:
    """A mount of the kernel's overlayfs; ``lowers`` topmost first, at least two without an upper."""
    options = ["index=off"]
    options += ("redirect_dir=on", "metacopy=on") if trusted else ("userxattr",)
    if upper is None:
        options.append("ro")
    options.append("lowerdir=" + join_layers(lowers))
    if upper is not None and work is not None:
        options += (f"upperdir={escape(upper)}", f"workdir={escape(work)}")
    return Mount(type="overlay", source="overlay", options=tuple(options))


def joined(mount: Mount) -> str:
    """The option string that mount(2) would get."""
    return ",".join(mount.options)
