"""The mount of a layer over its parents: one record, :class:`MountPlan`, and its renderings.

Strategy: a driver states once the directories of a mount (:meth:`cowfs.driver.Driver.plan`). The words for each engine
follow from that alone: a record in mount(8)'s words for cowfs's own server, for the kernel's overlayfs, or for a bind.
Nothing is mounted here.

A record whose options do not fit into mount(2)'s page becomes the FUSE one, which reads any number of layers, unless
the kernel's was asked for by name (fsconfig(2) takes it). Source of the options: the kernel's
Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os

from cowfs._record import record
from cowfs.errors import InvalidArgument, Unsupported
from cowfs.format.mount_options import escape, join_layers
from cowfs.model import Limit, Mount

__all__ = ["MAX_OPTIONS", "MountPlan"]

MAX_OPTIONS = 4095
"""Bytes of options that mount(2) takes: one page with its closing NUL."""


@record(frozen=True, slots=True, kw_only=True)
class MountPlan:
    """One mount of a layer, for any engine. All paths are absolute.

    Attributes:
        lowers: the trees beneath, topmost first; none where the layer's own is all there is.
        upper: the layer's own tree, by which a server knows whose mount it is. A view's is empty and not shown, unless
            nothing is beneath it.
        work: the work directory beside the upper.
        empty: an empty directory, the lower one of an engine that must have one.
        readonly: whether the mount is read-only.
        limit: what the upper may hold.
        trusted: the layers have ``trusted.overlay.*`` attributes, otherwise ``user.overlay.*``.
        row: bytes a block of redirect files that a writing mount makes; 0: it makes none.
        form: of the layers, where it is not what the user of the mount has; "" where it is.
        why_not_kernel: the reason why the kernel cannot mount these directories; "" if it can.
        why_not_image: the reason why it cannot mount the upper over an image of the lower layers either; "" if it can.
    """

    lowers: tuple[str, ...]
    upper: str
    work: str
    empty: str
    readonly: bool = False
    limit: Limit = Limit()
    trusted: bool = True
    row: int = 0
    form: str = ""
    why_not_kernel: str = ""
    why_not_image: str = ""

    @property
    def read(self) -> tuple[str, ...]:
        """The directories that a mount shows and only reads, topmost first."""
        return self.lowers or ((self.upper,) if self.readonly else ())

    def record(self, mount_type: str | None = None, *, plain: bool = False) -> Mount:
        """The mount in mount(8)'s words.

        Args:
            mount_type: ``kernel`` or ``fuse``; None: the kernel's where it can.
            plain: of the kernel's overlayfs without metacopies, which no layer may hold then.

        Raises:
            InvalidArgument: another type.
            Unsupported: the kernel's was asked for, and cannot mount this.
        """
        if mount_type not in (None, "kernel", "fuse"):
            raise InvalidArgument(f"no mount type {mount_type!r}", remedy="kernel or fuse")
        if mount_type == "fuse":
            return self.fuse()
        if self.why_not_kernel:
            if mount_type is None:
                return self.fuse()
            raise Unsupported(f"a kernel mount is not possible: {self.why_not_kernel}", remedy="leave out --mount-type")
        made = self.kernel(plain=plain)
        if mount_type is None and len(os.fsencode(",".join(made.options))) > MAX_OPTIONS:
            return self.fuse()
        return made

    def fuse(self) -> Mount:
        """A mount by ``mount -t fuse.cowfs-overlayfs``."""
        options = ["ro"] if self.readonly else []
        # In a store's layers names that begin with .wh. are ordinary, unless the form says otherwise.
        options.append(f"form={self.form}" if self.form else "dotwh=0")
        options.append("lowerdir=" + join_layers(self.read or (self.empty,)))
        if not self.readonly:
            options += (f"upperdir={escape(self.upper)}", f"workdir={escape(self.work)}")
            if self.limit.bytes is not None:
                options.append(f"size={self.limit.bytes}")
            if self.limit.inodes is not None:
                options.append(f"inodes={self.limit.inodes}")
            if self.row:
                options.append(f"row={self.row}")
        return Mount(type="fuse.cowfs-overlayfs", source="cowfs", options=tuple(options))

    def kernel(self, *, plain: bool = False) -> Mount:
        """A mount of the kernel: a bind of the only directory, or its overlayfs over several.

        Args:
            plain: an overlayfs without metacopies, which no layer may hold then.
        """
        directories = self.read if self.readonly else (self.upper, *self.lowers)
        if len(directories) == 1:
            return Mount(type="bind", source=directories[0], options=("ro" if self.readonly else "rw", "rbind"))
        options = ["index=off"]
        if not self.trusted:
            options.append("userxattr")
        else:
            options += ("redirect_dir=on",) if plain else ("redirect_dir=on", "metacopy=on")
        if self.readonly:
            options.append("ro")
        options.append("lowerdir=" + join_layers(self.read))
        if not self.readonly:
            options += (f"upperdir={escape(self.upper)}", f"workdir={escape(self.work)}")
        return Mount(type="overlay", source="overlay", options=tuple(options))
