"""The handlers of requests for names and attributes, one method an opcode.

Strategy: a handler takes ``(buf, n, unique, nodeid)``: a view of the request, its length (checked against the
opcode's shape by the session), and two header fields. It returns a whole reply, or None for a request without reply, or
with a later one. Failures are raised as OSError; the session turns them into an error reply. Every handler runs in the
loop thread, which owns the view, and does not use ``buf`` after it returns, since the buffer is used again.

The handlers that a busy mount calls thousands of times a second (look-up, attributes, create, remove, listing) are
written flat: no helper where three lines do.

Look-up counts: each reply that carries an entry raises ``node.nlookup`` here, and only here; ``view.forget`` lowers
it. When the kernel did not take such a reply, the session takes the count back (``codec.looked_up``).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.fuse import abi, caller, codec
from cowfs.union.attr import decode_dev

if TYPE_CHECKING:
    from cowfs.fuse.handshake import Agreement
    from cowfs.fuse.tree import Tree

Handler = Callable[[memoryview, int, int, int], "codec.Reply | None"]

_FOREVER = codec.FOREVER
_ENTRY = codec.ENTRY_HEAD.pack
_ATTR = codec.ATTR_HEAD.pack
_OK = abi.OUT_HEADER.pack
_CALLER = struct.Struct("<III").unpack_from  # uid, gid and pid in the request's header
_U32 = struct.Struct("<I").pack
_MODE_AT = 60  # where the mode is in packed attributes (abi.ATTR)
_DIRENT_SIZE = abi.DIRENT.size
_DIRENTPLUS_SIZE = abi.DIRENTPLUS.size
_MODE, _UID, _GID, _SIZE = abi.FATTR_MODE, abi.FATTR_UID, abi.FATTR_GID, abi.FATTR_SIZE
_ATIME, _MTIME = abi.FATTR_ATIME, abi.FATTR_MTIME
_TIMES = _ATIME | _MTIME
_SET_ID = stat.S_ISUID | stat.S_ISGID
_NS = 1_000_000_000
_OWNER = _UID | _GID | abi.FATTR_KILL_SUIDGID
_KILL = abi.FATTR_KILL_SUIDGID | _UID | _GID
_CAPABILITY = b"security.capability\0"
_CAPABILITY_END = 48 + len(_CAPABILITY)
_PADDING = [bytes(-length % 8) for length in range(8)]


def _signed(seconds: int) -> int:
    """Signed seconds from the kernel's unsigned field, which has them in two's complement."""
    return seconds - (1 << 64) if seconds >> 63 else seconds


class Adapter:
    """The handlers of one session that need no more than the view."""

    __slots__ = ("nodes", "setxattr_ext", "uncapped", "view")

    def __init__(self, view: Tree) -> None:
        self.view = view
        self.nodes: dict[int, Any] = view.nodes
        self.setxattr_ext = True
        self.uncapped = (0, 0)  # (node id, process) whose file capabilities the kernel removed just now

    def agree(self, agreement: Agreement) -> None:
        """Store the agreement with the kernel."""
        self.setxattr_ext = agreement.has("SETXATTR_EXT")

    def table(self) -> dict[int, Handler]:
        """Opcode -> handler."""
        return {
            abi.LOOKUP: self.lookup,
            abi.FORGET: self.forget,
            abi.BATCH_FORGET: self.batch_forget,
            abi.GETATTR: self.getattr,
            abi.READLINK: self.readlink,
            abi.SYMLINK: self.symlink,
            abi.MKNOD: self.mknod,
            abi.MKDIR: self.mkdir,
            abi.UNLINK: self.unlink,
            abi.RMDIR: self.rmdir,
            abi.RENAME: self.rename,
            abi.RENAME2: self.rename2,
            abi.LINK: self.link,
            abi.STATFS: self.statfs,
            **self._xattr_table(),
            abi.READDIR: self.readdir,
            abi.READDIRPLUS: self.readdirplus,
            abi.TMPFILE: self.tmpfile,
            abi.IOCTL: self.ioctl,
            abi.DESTROY: self.destroy,
        }

    def _xattr_table(self) -> dict[int, Handler]:
        if self.view.options.noxattrs:
            return {}  # ENOSYS: the kernel then asks no more
        return {
            abi.SETXATTR: self.setxattr,
            abi.GETXATTR: self.getxattr,
            abi.LISTXATTR: self.listxattr,
            abi.REMOVEXATTR: self.removexattr,
        }

    # -- names --------------------------------------------------------------------------------

    def lookup(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        name = bytes(buf[40 : n - 1])
        if buf[n - 1] or not name or 0 in name or 47 in name:
            raise codec.invalid("name")
        node: Any
        parent = self.nodes.get(nodeid)
        if name == b"." or name == b"..":
            node = parent if parent is not None else self.view.revive(nodeid)
            if name == b"..":
                node = self.view.parent(node)
        else:
            if parent is None:
                parent = self.view.directory(nodeid)
            node = self.view.child(parent, name)
            if node is None:
                if len(name) > codec.NAME_MAX:
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
                return _ENTRY(144, 0, unique, 0, 0, _FOREVER, _FOREVER, 0, 0) + codec.NO_ATTR
        node.nlookup += 1
        return _ENTRY(144, 0, unique, node.id, node.generation, _FOREVER, _FOREVER, 0, 0) + (
            node.attr or self.view.attr(node)
        )

    def forget(self, buf: memoryview, n: int, unique: int, nodeid: int) -> None:
        self.view.forget(nodeid, abi.FORGET_IN.unpack_from(buf, 40)[0])

    def batch_forget(self, buf: memoryview, n: int, unique: int, nodeid: int) -> None:
        count = abi.BATCH_FORGET_IN.unpack_from(buf, 40)[0]
        if 48 + 16 * count != n:
            raise codec.invalid("batch")
        forget = self.view.forget
        for one, times in abi.FORGET_ONE.iter_unpack(buf[48:n]):
            forget(one, times)

    def _entry(self, unique: int, node: Any) -> bytes:
        node.nlookup += 1
        return _ENTRY(144, 0, unique, node.id, node.generation, _FOREVER, _FOREVER, 0, 0) + (
            node.attr or self.view.attr(node)
        )

    def mknod(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        uid, gid, _pid, extensions = abi.CALLER.unpack_from(buf, 24)
        mode, rdev, umask, _ = abi.MKNOD_IN.unpack_from(buf, 40)
        if extensions:
            raise codec.invalid("extensions were not negotiated")
        parent = self.nodes.get(nodeid) or self.view.directory(nodeid)
        device = decode_dev(rdev) if rdev else 0
        node = self.view.mknod(parent, codec.name(buf, 56, n), mode, device, uid, gid, umask)
        node.nlookup += 1
        return _ENTRY(144, 0, unique, node.id, node.generation, _FOREVER, _FOREVER, 0, 0) + (
            node.attr or self.view.attr(node)
        )

    def mkdir(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        uid, gid, _pid, extensions = abi.CALLER.unpack_from(buf, 24)
        mode, umask = abi.MKDIR_IN.unpack_from(buf, 40)
        if extensions:
            raise codec.invalid("extensions were not negotiated")
        return self._entry(
            unique, self.view.mkdir(self.view.directory(nodeid), codec.name(buf, 48, n), mode, uid, gid, umask)
        )

    def symlink(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        uid, gid, _pid, extensions = abi.CALLER.unpack_from(buf, 24)
        name, target = codec.name_and_text(buf, 40, n, codec.PATH_MAX - 1)
        if extensions:
            raise codec.invalid("extensions were not negotiated")
        return self._entry(unique, self.view.symlink(self.view.directory(nodeid), name, target, uid, gid))

    def link(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        old = self.view.node(abi.LINK_IN.unpack_from(buf, 40)[0])
        return self._entry(unique, self.view.link(old, self.view.directory(nodeid), codec.name(buf, 48, n)))

    def tmpfile(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        uid, gid, _pid, extensions = abi.CALLER.unpack_from(buf, 24)
        _flags, mode, umask, _ = abi.CREATE_IN.unpack_from(buf, 40)
        if extensions:
            raise codec.invalid("extensions were not negotiated")
        node = self.view.tmpfile(self.view.directory(nodeid), mode, uid, gid, umask)
        entry = self._entry(unique, node)
        whole = entry[16:] + abi.OPEN_OUT.pack(0, abi.FOPEN_KEEP_CACHE, 0)
        return codec.payload(unique, whole)

    def unlink(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        self.view.unlink(self.nodes.get(nodeid) or self.view.directory(nodeid), codec.name(buf, 40, n))
        return _OK(16, 0, unique)

    def rmdir(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        self.view.rmdir(self.view.directory(nodeid), codec.name(buf, 40, n))
        return _OK(16, 0, unique)

    def rename(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        (target,) = abi.RENAME_IN.unpack_from(buf, 40)
        old, new = codec.two_names(buf, 48, n)
        return self._rename(unique, nodeid, old, target, new, 0)

    def rename2(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        target, flags, _ = abi.RENAME2_IN.unpack_from(buf, 40)
        old, new = codec.two_names(buf, 56, n)
        return self._rename(unique, nodeid, old, target, new, flags)

    def _rename(self, unique: int, nodeid: int, old: bytes, target: int, new: bytes, flags: int) -> codec.Reply:
        for changed in self.view.rename(self.view.directory(nodeid), old, self.view.directory(target), new, flags):
            self.outdated(changed)
        return _OK(16, 0, unique)

    def outdated(self, nodeid: int) -> None:
        """The kernel may have other attributes of a node than it has now, before the request at hand is answered."""

    # -- listings -----------------------------------------------------------------------------

    def readdir(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        _fh, cookie, room, *_ = abi.READ_IN.unpack_from(buf, 40)
        pack = abi.DIRENT.pack
        parts = [b""]
        used = 0
        parent = self.view.directory(nodeid)
        entry = self.view.entry
        for name, following in self.view.listing(parent, cookie):
            length = len(name)
            size = _DIRENT_SIZE + (length + 7 & ~7)
            if used + size > room:
                break
            ino, kind = entry(parent, name)
            if not ino:
                continue  # gone from its layer since
            used += size
            parts.append(pack(ino, following, length, kind))
            parts.append(name + _PADDING[length & 7])
        parts[0] = _OK(16 + used, 0, unique)
        return b"".join(parts)

    def readdirplus(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        _fh, cookie, room, *_ = abi.READ_IN.unpack_from(buf, 40)
        view = self.view
        parent = view.directory(nodeid)
        pack = abi.DIRENTPLUS.pack
        child, entry = view.child, view.entry
        parts = [b""]
        used = 0
        for name, following in view.listing(parent, cookie):
            length = len(name)
            size = _DIRENTPLUS_SIZE + (length + 7 & ~7)
            if used + size > room:
                break
            if name == b"." or name == b"..":  # not looked up
                ino, kind = entry(parent, name)
                parts.append(pack(0, 0, 0, 0, 0, 0, codec.NO_ATTR, ino, following, length, kind))
            else:
                node = child(parent, name)
                if node is None:
                    continue  # gone from its layer since
                id = node.id
                attr = node.attr or view.attr(node)
                node.nlookup += 1
                parts.append(
                    pack(id, node.generation, _FOREVER, _FOREVER, 0, 0, attr, id, following, length, node.type)
                )
            used += size
            parts.append(name + _PADDING[length & 7])
        parts[0] = _OK(16 + used, 0, unique)
        return b"".join(parts)

    # -- attributes ---------------------------------------------------------------------------

    def getattr(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        node = self.nodes.get(nodeid) or self.view.node(nodeid)
        return _ATTR(120, 0, unique, _FOREVER, 0, 0) + (node.attr or self.view.attr(node))

    def apply(self, node: Any, buf: memoryview, fields: tuple[int, ...]) -> None:
        """Carry out the SETATTR in ``buf``, whose struct is ``fields``."""
        (valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = fields
        view = self.view
        if not valid & ~_OWNER:
            view.setattr(node, uid=uid if valid & _UID else None, gid=gid if valid & _GID else None, kill=True)
            return
        if valid == _MODE:
            view.setattr(node, mode=mode & 0o7777)
            return
        if valid == _TIMES:
            view.setattr(node, atime=_signed(atime) * _NS + atime_ns, mtime=_signed(mtime) * _NS + mtime_ns)
            return
        accessed: Any = None
        modified: Any = None
        if valid & _ATIME:
            accessed = view.NOW if valid & abi.FATTR_ATIME_NOW else _signed(atime) * _NS + atime_ns
        if valid & _MTIME:
            modified = view.NOW if valid & abi.FATTR_MTIME_NOW else _signed(mtime) * _NS + mtime_ns
        view.setattr(
            node,
            mode=mode & 0o7777 if valid & _MODE else None,
            uid=uid if valid & _UID else None,
            gid=gid if valid & _GID else None,
            size=size if valid & _SIZE else None,
            atime=accessed,
            mtime=modified,
            kill=valid & _KILL != 0,
        )
        if valid & abi.FATTR_KILL_SUIDGID and valid & _SIZE:
            self.strip(node, buf)

    def without_fields(self, node: Any, buf: memoryview, unique: int) -> codec.Reply:
        """A SETATTR without any field means one of two things, which look alike.

        *chown(-1, -1)* moves ctime and clears set-id bits; only the owner and root may make it clear any (chown(2)).

        *Data is about to change*, and the kernel has set-id bits in its cache for this writer to lose, or has just removed
        a file capability. The kernel caches the reply, which is the one way to change a mode in its cache before the
        data changes (after a notification it only asks later, and a program that is being started asks no more). So the
        bits go here, unless the writer keeps them: then its WRITE has the flag once more.
        """
        view = self.view
        uid, _, pid = _CALLER(buf, 24)
        fields = abi.ATTR.unpack(view.attr(node))
        owner = not uid or uid == fields[11]
        chown = caller.in_chown(pid)
        uncapped, self.uncapped = self.uncapped, (0, 0)
        if chown is None and not uid and uncapped == (node.id, pid):
            chown = False  # more likely
        if chown is None and not owner and not self.written_past_us(node):
            # Shown without the bits, once: should this be a write, it clears them, and should it be a chown, they stay.
            attr = view.attr(node)
            return _ATTR(120, 0, unique, 0, 0, 0) + attr[:_MODE_AT] + _U32(fields[9] & ~_SET_ID) + attr[_MODE_AT + 4 :]
        if chown is False:
            if not caller.keeps_set_id(uid, pid):
                view.kill_privileges(node)
                self.strip(node, buf)
        else:
            if not owner and self._would_lose(fields[9], fields[12], buf):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            view.setattr(node, uid=-1)
            self.strip(node, buf)
        return _ATTR(120, 0, unique, _FOREVER, 0, 0) + view.attr(node)

    @staticmethod
    def _would_lose(mode: int, group: int, buf: memoryview) -> bool:
        """Whether chown(-1, -1) by this caller would take set-id bits away."""
        if stat.S_ISDIR(mode) or not mode & _SET_ID:
            return False
        uid, gid, pid = _CALLER(buf, 24)
        if mode & (stat.S_ISUID | stat.S_IXGRP):
            return True
        return not (gid == group or group in caller.groups(pid) or caller.keeps_set_id(uid, pid))

    def written_past_us(self, node: Any) -> bool:
        """Whether writes may bypass the server, so that this request is the only sign of them."""
        return False

    def strip(self, node: Any, buf: memoryview) -> bool:
        """Clear a setgid bit that means no program, too, when the caller is outside the file's group (Linux 6.2).

        Returns whether it was cleared.
        """
        fields = abi.ATTR.unpack(self.view.attr(node))
        mode = fields[9]
        if mode & (stat.S_ISGID | stat.S_IXGRP) != stat.S_ISGID or not stat.S_ISREG(mode):
            return False
        uid, gid, pid = _CALLER(buf, 24)
        if gid == fields[12] or caller.keeps_set_id(uid, pid) or fields[12] in caller.groups(pid):
            return False
        self.view.setattr(node, mode=mode & 0o7777 & ~stat.S_ISGID)
        return True

    def keeps(self, node: Any, buf: memoryview) -> bool:
        """Whether a change of data by this caller leaves the node's mode alone. Some requests have no flag for it."""
        if not abi.ATTR.unpack(node.attr or self.view.attr(node))[9] & _SET_ID:
            return True
        uid, _, pid = _CALLER(buf, 24)
        return caller.keeps_set_id(uid, pid)

    @staticmethod
    def ordinary(buf: memoryview) -> bool:
        """Whether the caller is not root."""
        return bool(_CALLER(buf, 24)[0])

    def readlink(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        return codec.payload(unique, self.view.readlink(self.view.node(nodeid)))

    def statfs(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        st = self.view.statfs()
        body = abi.STATFS_OUT.pack(
            st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize, codec.NAME_MAX, st.f_frsize, 0
        )
        return codec.payload(unique, body)

    # -- extended attributes ------------------------------------------------------------------

    def setxattr(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        if self.setxattr_ext:
            size, flags, extra, _ = abi.SETXATTR_IN.unpack_from(buf, 40)
            start = 56
        else:
            (size, flags), extra, start = abi.SETXATTR_COMPAT_IN.unpack_from(buf, 40), 0, 48
        name, value = codec.name_and_data(buf, start, n, size)
        node = self.view.node(nodeid)
        self.view.setxattr(node, name, bytes(value), flags)
        if extra & abi.SETXATTR_ACL_KILL_SGID:
            mode = abi.ATTR.unpack(self.view.attr(node))[9]
            if mode & stat.S_ISGID:
                self.view.setattr(node, mode=mode & 0o7777 & ~stat.S_ISGID)
        return _OK(16, 0, unique)

    def getxattr(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        if n == _CAPABILITY_END and bytes(buf[48:n]) == _CAPABILITY:  # before each first write, chown and truncate
            node = self.nodes.get(nodeid)
            if node is not None and node.bare:
                return _OK(16, -errno.ENODATA, unique)
        room, _ = abi.GETXATTR_IN.unpack_from(buf, 40)
        name = codec.text(buf, 48, n, codec.XATTR_NAME_MAX)
        return self._sized(unique, room, self.view.getxattr(self.view.node(nodeid), name))

    def listxattr(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        room, _ = abi.GETXATTR_IN.unpack_from(buf, 40)
        names = self.view.listxattr(self.view.node(nodeid))
        if self.ordinary(buf):  # the kernel checks reading trusted.*, but leaves listing it to the file system
            names = [name for name in names if not name.startswith(b"trusted.")]
        return self._sized(unique, room, b"".join([name + b"\0" for name in names]))

    @staticmethod
    def _sized(unique: int, room: int, value: bytes) -> bytes:
        if not room:
            return codec.payload(unique, abi.GETXATTR_OUT.pack(len(value), 0))
        if len(value) > room:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        return codec.payload(unique, value)

    def removexattr(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        name, node = codec.text(buf, 40, n, codec.XATTR_NAME_MAX), self.view.node(nodeid)
        if name == _CAPABILITY[:-1]:
            self._check_chown(node, buf)
        self.view.removexattr(node, name)
        if name == _CAPABILITY[:-1]:
            self.uncapped = nodeid, _CALLER(buf, 24)[2]
        return _OK(16, 0, unique)

    def _check_chown(self, node: Any, buf: memoryview) -> None:
        """Remove a file capability, which comes before its chown(-1, -1); before a chown that will be refused it stays."""
        uid, _, pid = _CALLER(buf, 24)
        fields = abi.ATTR.unpack(self.view.attr(node))
        if uid and uid != fields[11] and self._would_lose(fields[9], fields[12], buf) and caller.in_chown(pid):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def ioctl(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        """Answer an ioctl; none is known here. They are common all the same (isatty at each open of an interpreter), and the
        kernel asks every time, so the answer must be cheap."""
        return _OK(16, -errno.ENOTTY, unique)

    def destroy(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        return _OK(16, 0, unique)
