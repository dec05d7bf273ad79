"""Build the view and the FUSE session for a mount request, and explain why that failed."""

from __future__ import annotations

import errno
import os
import sys

from cowfs._typed import TYPE_CHECKING
from cowfs.errors import CowfsError, InvalidArgument, NotFound, Unsupported
from cowfs.mounting.request import INDEXED, MountSpec
from cowfs.mounting.resources import Stack

if TYPE_CHECKING:
    from cowfs.fuse.loop import Session
    from cowfs.fuse.portable import PortableSession
    from cowfs.union import View

__all__ = ["explain", "make_session", "make_view", "name_process", "raise_file_limit", "refused"]


def make_view(stack: Stack) -> View:
    """Build the view of a mount request.

    Raises:
        OSError: an error of the layers' file systems.
    """
    from cowfs.row.view import View
    from cowfs.union import Options

    spec = stack.spec
    options = Options(
        readonly=spec.readonly,
        volatile=spec.volatile or not spec.fsync,
        limit=stack.limit,
        uid_map=spec.uid_map,
        gid_map=spec.gid_map,
        squash_uid=spec.squash_uid,
        squash_gid=spec.squash_gid,
        override_xattr=spec.override_xattr.encode() or None,
        noxattrs=spec.noxattrs,
        dotwh=spec.dotwh,
        form=spec.form,
        row=spec.row or None,
        drop_synced=spec.drop_synced,
    )
    if spec.factory:
        if spec.factory != INDEXED:
            raise InvalidArgument(f"nothing makes a view by the name {spec.factory!r}")
        from cowfs.mounting import index_view

        return index_view.view(stack, options)
    return View(stack.lowers, stack.upper, stack.work, options=options)


def can_pass_through() -> bool:
    """Whether the kernel accepts backing files from this process: only with the right to mount anything (fs/fuse/backing.c)."""
    from cowfs.sys import host

    return host.init_userns() and host.has_cap(host.CAP_SYS_ADMIN)


def make_session(spec: MountSpec, view: View, target: str) -> Session | PortableSession:
    """Mount, and make the session that serves the mount with the front end of the request."""
    from cowfs.fuse import mount_fuse
    from cowfs.fuse.loop import Session, SessionOptions

    words = [*spec.options]
    if (spec.readonly or (spec.upper is None and spec.scratch is None)) and "ro" not in words:
        words.append("ro")
    if spec.io == "passthrough" and not (spec.frontend == "kernel" and can_pass_through()):
        raise Unsupported(
            "io=passthrough needs CAP_SYS_ADMIN on the host and the kernel front end",
            remedy="mount without --io passthrough",
        )
    allow_other = os.geteuid() == 0 if spec.allow_other is None else spec.allow_other
    if spec.frontend == "fusepy":
        from cowfs.fuse.portable import PortableSession

        trace = sys.stderr if spec.trace else None
        return PortableSession(target, view, words, allow_other, spec.source, spec.subtype, trace=trace)
    fd = mount_fuse(target, words, allow_other, spec.source, spec.subtype)
    return Session(
        fd,
        view,
        options=SessionOptions(
            io=spec.io,
            trace=sys.stderr if spec.trace else None,
            max_nodes=spec.max_nodes,
            most_jobs=view.share.jobs,
            patience=spec.patience,
        ),
    )


def refused(session: Session | PortableSession, spec: MountSpec) -> CowfsError | None:
    """The error for a requested feature that the kernel refused, or None. Valid only once the session is ready."""
    agreement = session.agreement
    if agreement is not None and spec.io == "passthrough" and agreement.mode != spec.io:
        return Unsupported(
            "this kernel's FUSE has no passthrough (Linux 6.9 with CONFIG_FUSE_PASSTHROUGH)",
            remedy="mount without --io passthrough",
        )
    return None


def raise_file_limit() -> None:
    """Raise the limit on descriptors to the hard one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def name_process() -> None:
    """Set the name that ps and top show (comm, 15 bytes)."""
    try:
        with open("/proc/self/comm", "w", encoding="utf-8") as file:
            file.write("cowfs")
    except OSError:
        pass


def explain(error: BaseException, spec: MountSpec) -> CowfsError | None:
    """The failure of a start as one line, or None for a fault of cowfs."""
    if isinstance(error, CowfsError):
        return error
    from cowfs.fuse.codec import ProtocolError

    if isinstance(error, ProtocolError):
        return Unsupported(f"no FUSE session with this kernel: {error}", remedy="try --frontend fusepy")
    if not isinstance(error, OSError):
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    text = error.strerror or str(error)
    if where == "/dev/fuse" or "/dev/fuse" in text:
        remedy = {
            errno.ENOENT: "modprobe fuse; in a container give it the device: --device /dev/fuse",
            errno.ENODEV: "modprobe fuse",
            errno.ENXIO: "modprobe fuse",
            errno.EACCES: "make /dev/fuse accessible (mode 0666 is usual), or run as root",
            errno.EPERM: "the container must be allowed to use the device: --device /dev/fuse",
        }.get(error.errno or 0, "")
        return Unsupported(f"cannot open /dev/fuse: {os.strerror(error.errno or 0)}", remedy=remedy)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = where or spec.upper or spec.scratch or spec.mountpoint
        return CowfsError(
            f"cannot mount {spec.mountpoint}: {text}: {full}",
            remedy="remove something from the file system that holds it",
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return Unsupported(
            f"not permitted to mount {spec.mountpoint}: {text}{f' ({where})' if where else ''}",
            remedy="run as root, or install fuse3 for its fusermount3",
        )
    if error.errno == errno.ENOENT and where:
        return NotFound(f"{where}: {text}")
    return CowfsError(f"cannot mount {spec.mountpoint}: {where + ': ' if where else ''}{text}")
