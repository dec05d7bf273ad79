"""Every encoding of "deleted" and "opaque", and the overlay's own xattr names; nothing else.

Source: the kernel's Documentation/filesystems/overlayfs.rst (sections "Whiteouts and opaque
directories", "Nesting overlayfs mounts", "User xattr") and OCI image-spec layer.md for ``.wh.``.

===================  ==============================================================
deleted              character device 0/0
deleted (nested)     empty regular file with ``overlay.whiteout``, in a directory
                     whose ``overlay.opaque`` is ``x``
opaque               directory with ``overlay.opaque`` = ``y``
in archives          ``.wh.NAME`` and ``.wh..wh..opq``
===================  ==============================================================
"""

from __future__ import annotations

import errno
import os
import stat

from cowfs._typed import Final
from cowfs.sys import host, xattr

WH_PREFIX = b".wh."
WH_OPAQUE = b".wh..wh..opq"
WH_META_PREFIX = b".wh..wh."
WHITEOUT_MODE = stat.S_IFCHR
WHITEOUT_RDEV = 0


class Form:
    """One of the kernel's two xattr prefixes and what the kernel supports under it.

    Attributes:
        redirects: whether redirect and metacopy are honoured.
        dotwh: whether names ``.wh.NAME`` are whiteouts, too, and nobody may make one.
        constant: the marks whose value is always the same.
    """

    __slots__ = (
        "constant",
        "dotwh",
        "exempt",
        "impure",
        "metacopy",
        "name",
        "opaque",
        "origin",
        "prealloc",
        "prefix",
        "redirect",
        "redirects",
        "row",
        "whiteout",
    )

    def __init__(self, name: str, prefix: bytes, redirects: bool, *, dotwh: bool = False) -> None:
        self.name: Final = name
        self.prefix: Final = prefix
        self.redirects: Final = redirects
        self.dotwh: Final = dotwh
        self.opaque: Final = prefix + b"opaque"
        self.redirect: Final = prefix + b"redirect"
        self.metacopy: Final = prefix + b"metacopy"
        self.origin: Final = prefix + b"origin"
        self.impure: Final = prefix + b"impure"
        self.whiteout: Final = prefix + b"whiteout"
        # cowfs's own; the kernel hides and ignores them, as it does every name under its prefix
        self.exempt: Final = prefix + b"cowfs.exempt"  # a directory copied up only to hold whiteouts: not counted
        self.prealloc: Final = (
            prefix + b"cowfs.prealloc"
        )  # blocks past the end were reserved on request, not by speculation
        self.row: Final = prefix + b"cowfs.row"  # a redirect file: blocks and map
        self.constant: Final = frozenset(
            (self.opaque, self.metacopy, self.impure, self.whiteout, self.exempt, self.prealloc)
        )

    def __repr__(self) -> str:
        return f"Form({self.name!r})"

    def is_own(self, attribute: bytes) -> bool:
        """Whether the merged tree hides this stored name."""
        return attribute.startswith(self.prefix)

    def store_name(self, attribute: bytes) -> bytes:
        """The name under which a user's ``attribute`` is stored: own names are escaped."""
        if attribute.startswith(self.prefix):
            return self.prefix + b"overlay." + attribute[len(self.prefix) :]
        return attribute

    def show_name(self, stored: bytes) -> bytes | None:
        """The name a user sees for a stored one; ``None`` when it is the overlay's own."""
        if not stored.startswith(self.prefix):
            return stored
        rest = stored[len(self.prefix) :]
        return self.prefix + rest[8:] if rest.startswith(b"overlay.") else None


TRUSTED = Form("trusted", b"trusted.overlay.", True)
USER = Form("user", b"user.overlay.", False)
AUFS = Form("aufs", b"user.overlay.", False, dotwh=True)
"""Frozen layers say by names what is deleted (:mod:`cowfs.format.aufs`); a layer that is written has the marks of the form for users, too."""
FORMS = {form.name: form for form in (TRUSTED, USER, AUFS)}


def choose_form(name: str = "auto", *, dotwh: bool = False) -> Form:
    """``auto``: the privileged form where this process may use it, else ``userxattr``.

    Args:
        dotwh: with whiteouts as archives have them, too (what containers/storage unpacks for a mount program).
    """
    if name == "auto":
        name = "trusted" if host.can_trusted_xattr() else "user"
    form = FORMS[name]
    return Form(form.name, form.prefix, form.redirects, dotwh=True) if dotwh else form


def is_whiteout(st: os.stat_result) -> bool:
    """Whether a stat result is a character device 0/0."""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def has_whiteout_xattr(dirfd: int, name: bytes, form: Form) -> bool:
    """Whether an empty regular file stands for a deletion (only below ``opaque=x``)."""
    return xattr.try_get(dirfd, name, form.whiteout) is not None


def opaque_value(fd: int, form: Form) -> bytes:
    """``b"y"`` opaque, ``b"x"`` may hold xattr whiteouts, ``b""`` neither."""
    value = xattr.try_get(fd, b"", form.opaque) or b""
    return b"y" if form.dotwh and value != b"y" and exists(fd, WH_OPAQUE) else value


def exists(dirfd: int, name: bytes) -> bool:
    """Whether a directory has a name; False for names that are too long for the host."""
    try:
        os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise
        return False
    return True


def hidden_by_dotwh(dirfd: int, name: bytes, form: Form) -> bool:
    """Whether ``.wh.NAME`` beside it deletes a name of the layers beneath."""
    return form.dotwh and exists(dirfd, WH_PREFIX + name)


def make(dirfd: int, name: bytes) -> None:
    """Create a whiteout; allowed without privilege since Linux 5.8."""
    os.mknod(name, stat.S_IFCHR, 0, dir_fd=dirfd)


def make_nested(dirfd: int, name: bytes, form: Form) -> None:
    """Create a whiteout on a host that allows no device 0/0, because it is an overlay itself."""
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd))
    xattr.setx(dirfd, name, form.whiteout, b"y")


def allow_nested(fd: int, form: Form) -> None:
    """Mark a directory: it may hold whiteouts of :func:`make_nested`. An opaque directory needs no mark."""
    if not xattr.try_get(fd, b"", form.opaque):
        xattr.setx(fd, b"", form.opaque, b"x")


def wh_target(name: bytes) -> bytes | None:
    """The name that an archive's ``.wh.`` entry deletes; ``None`` for any other name."""
    if name.startswith(WH_PREFIX) and not name.startswith(WH_META_PREFIX):
        return name[len(WH_PREFIX) :]
    return None
