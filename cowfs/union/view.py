"""The merged view: one tree made of read-only layers and, on top, a writable one.

Strategy. A view answers the questions of a file system (look up, list, stat, read) and makes its
changes (create, write, rename) in terms of *nodes*. It knows no FUSE word and asks nobody's
permission: a front end does both. What it learned it keeps, so a second question costs no system
call: a directory's names from one scan of each of its layers, a file's attributes from one lstat.

===================  =====================================================================
:mod:`source`        layers and their directories; descriptors
:mod:`lower`         how layers merge: whiteouts, opaque, redirect, metacopy (only reads)
:mod:`copyup`        the first change: directories, files, data
:mod:`create`        mknod, mkdir, symlink, link, tmpfile, unlink, rmdir
:mod:`rename`        rename with its flags
:mod:`content`       read, write, truncate, holes
:mod:`metadata`      setattr, xattrs
:mod:`links`         which names a lower inode has
:mod:`space`         the limit
===================  =====================================================================

Threading: one thread owns a view and makes every call, except :meth:`Stage.run
<cowfs.union.copyup.Stage.run>`. Errors are OSError with the errno that the system call of that
name documents.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cowfs.model import Limit, Usage
from cowfs.sys import files, xattr
from cowfs.union import content, copyup, create, links, lower, metadata, rename, space
from cowfs.union.attr import ATTR, mode_of, pack, with_nlink, with_size
from cowfs.union.inodes import SYNTHETIC, Inodes
from cowfs.union.node import DT_DIR, DT_REG, Dir, Node, type_of
from cowfs.union.options import Options
from cowfs.union.owners import Owners, make_owners
from cowfs.union.source import Descriptors, Layer, Source
from cowfs.whiteout import choose_form

ROOT_ID = 1
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FIRST_COOKIE = 3  # 1 and 2 are "." and ".."
_COOKIES = (1 << 63) - 1 - _FIRST_COOKIE


def cookie_of(name: bytes) -> int:
    """A name's place in listings: a hash, so that creates and removes move no other name."""
    return hash(name) % _COOKIES + _FIRST_COOKIE


class View:
    """One merged tree.

    Args:
        lowers: layer directories, topmost first (may be empty when there is an upper).
        upper: the writable layer's directory; ``None`` makes the view read-only.
        work: an empty directory on the same file system as ``upper``.
        options: see :class:`~cowfs.union.options.Options`.

    Raises:
        OSError: a directory is missing or unreadable; ENOTDIR; EXDEV when ``work`` is on another
            file system than ``upper``.

    >>> import tempfile, os
    >>> base = tempfile.mkdtemp()
    >>> _ = open(base + "/hello", "w").write("world")
    >>> view = View([base])
    >>> view.size(view.lookup(view.root, b"hello"))
    5
    >>> view.close()
    """

    NOW = metadata.NOW

    def __init__(
        self,
        lowers: Sequence[str | bytes],
        upper: str | bytes | None = None,
        work: str | bytes | None = None,
        *,
        options: Options | None = None,
    ) -> None:
        self.options = options = options or Options()
        self.form = choose_form(options.form)
        self.descriptors = Descriptors(options.max_fds)
        self.layers: list[Layer] = []
        self.upper: Layer | None = None
        self.workdir: copyup.WorkDir | None = None
        self.nodes: dict[int, Node] = {}
        self.changed: Callable[[str, Node, bytes], None] | None = None
        self.space: space.Space | None = None
        self.index = options.index
        self._sources: dict[tuple[int, bytes], Source] = {}
        self._parents: dict[int, int] = {}  # forgotten id -> its parent's id
        self._dead: dict[int, int] = {}  # id -> generation that its next bearer gets
        self._synthetic = SYNTHETIC
        self.open_files: deque[Node] = deque()
        self.max_files = self.descriptors.budget
        #: further names of nodes with more than one, the first being (node.parent, node.name)
        self.names: dict[Node, list[tuple[Dir, bytes]]] = {}
        self.groups: dict[Layer, links.Groups] = {}
        #: directories that a rename took away from their lower path
        self.moved: list[Dir] = []
        self._uuids: dict[int, bytes] = {}
        self._noatime = True
        self.readonly = options.readonly or upper is None
        try:
            for number, path in enumerate(reversed(lowers)):
                self.layers.append(Layer(os.fsencode(path), number, self.descriptors))
            if upper is not None:
                self.upper = Layer(os.fsencode(upper), len(self.layers), self.descriptors)
                self.layers.append(self.upper)
                if not self.readonly:
                    if work is None:
                        raise OSError(errno.EINVAL, "an upper directory needs a work directory")
                    self.workdir = copyup.WorkDir(os.fsencode(work), self.upper)
            if not self.layers:
                raise OSError(errno.EINVAL, "no layers")
            self.owners: Owners | None = make_owners(options)
            self.inodes = Inodes(self.layers)
            #: the roots of all layers, topmost first: where absolute redirects start
            self.roots = [layer.root for layer in reversed(self.layers)]
            self.root = self._make_root()
            if options.limit and not self.readonly:
                self.set_limit(options.limit)
        except BaseException:
            self.close()
            raise

    def _make_root(self) -> Dir:
        sources = list(self.roots)
        record = None
        if self.index is not None:
            record = self.index.root()
            sources = [self.upper.root] if self.upper is not None else [self.layers[-1].root]
        for number, source in enumerate(sources):
            if xattr.try_get(source.fd, b"", self.form.opaque) == b"y":
                del sources[number + 1 :]
                break
        root = Dir(ROOT_ID, b"", sources)
        root.parent = root
        root.record = record
        root.nlookup = 1
        bottom = self.layers[0].root.fd
        st = os.fstat(bottom)
        self.root_ino = self.inodes.shown(st.st_dev, st.st_ino)
        self.nodes[ROOT_ID] = root
        return root

    def close(self) -> None:
        """Give back every descriptor. The view must not be used afterwards."""
        for node in list(self.nodes.values()):
            if node.fd >= 0:
                os.close(node.fd)
                node.fd = -1
        self.nodes.clear()
        self.descriptors.budget = 0
        self.descriptors.trim()
        for source in self._sources.values():
            source.close()
        for layer in self.layers:
            layer.close()
        if self.workdir is not None:
            self.workdir.close()
            self.workdir = None

    # -- finding ------------------------------------------------------------------------------

    def node(self, id: int) -> Node:
        """The live node of an id. Raises ESTALE."""
        try:
            return self.nodes[id]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def directory(self, id: int) -> Dir:
        """The live directory of an id. Raises ESTALE, ENOTDIR."""
        node = self.node(id)
        if not isinstance(node, Dir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), node.name)
        return node

    def lookup(self, parent: Dir, name: bytes) -> Node:
        """The node of a name. Raises ENOENT, ENOTDIR, ENAMETOOLONG."""
        node = self.child(parent, name)
        if node is None:
            if len(name) > 255:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return node

    def child(self, parent: Dir, name: bytes) -> Node | None:
        """The node of a name, or ``None``."""
        children = parent.children
        if children is None:
            children = self.load(parent)
        item = children.get(name)
        if item.__class__ is int:
            if len(self.descriptors.opened) > self.descriptors.budget:
                self.descriptors.trim()
            return self._make(parent, name, item)  # type: ignore[arg-type]
        return item  # type: ignore[return-value]

    def parent(self, node: Dir) -> Dir:
        """A directory's parent; the root's is the root."""
        return node.parent or self.root

    def load(self, directory: Dir) -> dict[bytes, Node | int]:
        """Read a directory's names from its layers, once."""
        if directory.__class__ is not Dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory.name)
        sources = directory.sources
        upper = self.upper_of(directory)
        below = sources[1:] if upper is not None else sources
        merged: dict[bytes, Any]
        if directory.record is not None:
            assert self.index is not None
            merged = dict.fromkeys(self.index.entries(directory.record), -1)
        else:
            merged = lower.merge(below, self.form, dotwh=self.options.dotwh) if below else {}
        if upper is not None:
            names, deleted, _ = lower.scan(upper, self.form)
            upper.whiteouts = deleted
            upper.impure = bool(merged) or bool(
                xattr.try_get(upper.open(), b"", self.form.impure)
            )
            upper.shadow = set()
            if merged:
                upper.shadow = merged.keys() & names.keys()
                for name in deleted:
                    merged.pop(name, None)
            base = (len(sources) - 1) << 4
            for name, kind in names.items():
                merged[name] = base | kind
        directory.children = merged
        return merged

    def _make(self, parent: Dir, name: bytes, code: int) -> Node | None:
        """Turn a code into a node."""
        if code < 0:
            return self._make_indexed(parent, name)
        sources = parent.sources
        position = len(sources) - 1 - (code >> 4)
        source = sources[position]
        fd = source.fd if source.fd >= 0 else source.open()
        try:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:  # a layer was changed behind our back
            parent.children.pop(name, None)  # type: ignore[union-attr]
            return None
        mode = st.st_mode
        if mode & 0o170000 == 0o040000:
            return self._make_dir(parent, name, position)
        is_upper = source.layer is self.upper
        ino = self.inodes.shown(st.st_dev, st.st_ino)
        data = None
        if mode & 0o170000 == 0o100000:
            if source.layer.index and st.st_size:
                data = lower.metacopy_data(
                    sources[position + 1 :], source, name, self._low_child(parent, name),
                    self.form, self.roots,
                )  # fmt: skip
            if data is None and self.options.row and source.layer.index:
                data = content.open_row(self, source, name, parent, position)
        if is_upper and source.impure:
            origin = xattr.try_get(fd, name, self.form.origin)
            if origin:
                ino = self.inodes.from_origin(origin) or ino
        node = self._bind_inode(parent, name, source, st, ino)
        if node.attr is None:
            node.data = data
            self.pack_into(node, st, source, name)
        return node

    def pack_into(self, node: Node, st: os.stat_result, source: Source, name: bytes) -> None:
        """Set a node's attributes from a fresh stat result."""
        if self.owners is None:
            attr = pack(st, node.id, st.st_mode, st.st_uid, st.st_gid)
        else:
            attr = pack(st, node.id, *self.owners.show(st, source.open(), name))
        if node.data is not None:
            attr = with_size(attr, *data_size(node.data, st))
        node.attr = attr

    def generation(self, ino: int) -> int:
        """The generation of an inode number's present bearer."""
        return self._dead.get(ino, 0) if self._dead else 0

    def _bind_inode(
        self, parent: Dir, name: bytes, source: Source, st: os.stat_result, ino: int
    ) -> Node:
        """The node of inode number ``ino``, new or, for one more hard link, the one there is."""
        existing = self.nodes.get(ino)
        if existing is not None or ino <= ROOT_ID:
            if existing is not None and st.st_nlink > 1 and self._same(existing, source, st):
                if existing.where is None:  # its other names were not known until now
                    existing.where, existing.name = source, name
                self.bind(parent, name, existing)
                return existing
            ino = self.fresh_id()
        node = Node(ino, type_of(st.st_mode), name, source)
        node.generation = self._dead.get(ino, 0) if self._dead else 0
        self.nodes[ino] = node
        self.bind(parent, name, node)
        return node

    @staticmethod
    def _same(node: Node, source: Source, st: os.stat_result) -> bool:
        """Whether a node is the inode that ``st`` describes."""
        if node.__class__ is not Node:
            return False
        if node.where is not None:
            return node.where.layer is source.layer
        there = os.fstat(node.fd)
        return (there.st_dev, there.st_ino) == (st.st_dev, st.st_ino)

    def _make_dir(self, parent: Dir, name: bytes, position: int) -> Dir:
        found = lower.merged_dirs(parent.sources[position:], name, self.form, self.roots)
        record = None
        top = found[0]
        is_upper = top.layer is self.upper
        if parent.record is not None or self.index is not None:
            record = self._record_under(parent, name, top)
            found = found[:1]
        anchor = found[1] if is_upper and len(found) > 1 else top
        st = os.fstat(anchor.open())
        ino = self.inodes.shown(st.st_dev, st.st_ino)
        if record is not None:
            ino = self.indexed_ino(record[1])
        elif is_upper and len(found) == 1 and parent.sources[position].impure:
            origin = xattr.try_get(top.open(), b"", self.form.origin)
            if origin:
                ino = self.inodes.from_origin(origin) or ino
        node = self.new_dir(parent, name, found, ino)
        if record is not None:
            node.record = record[0]
        if is_upper and self.form.redirects and (len(found) > 1 or record is not None):
            redirect = xattr.try_get(top.open(), b"", self.form.redirect)
            if redirect:
                node.lowpath = (
                    redirect[1:] if redirect.startswith(b"/") else self._low_child(parent, redirect)
                )
                self.moved.append(node)
        return node

    def new_dir(self, parent: Dir, name: bytes, sources: list[Source], ino: int) -> Dir:
        """A bound directory node."""
        if ino in self.nodes or ino <= ROOT_ID:
            ino = self.fresh_id()
        node = Dir(ino, name, sources)
        node.generation = self._dead.get(ino, 0) if self._dead else 0
        self.nodes[ino] = node
        self.bind(parent, name, node)
        return node

    # -- a lower tree that an index knows -------------------------------------------------------

    def _record_under(self, parent: Dir, name: bytes, top: Source) -> tuple[Any, Any] | None:
        """The (record, entry) that an upper directory merges with, in a tree index."""
        assert self.index is not None
        if top.layer is self.upper:
            fd = top.open()
            if xattr.try_get(fd, b"", self.form.opaque) == b"y":
                return None
            redirect = lower._redirect_of(fd, b"", self.form)
            if redirect is not None and redirect.startswith(b"/"):
                found = self.find_entry(redirect[1:])
                return (found.record, found) if found is not None else None
            name = redirect or name
        if parent.record is None:
            return None
        entry = self.index.entries(parent.record).get(name)
        return (entry.record, entry) if entry is not None and entry.type == DT_DIR else None

    def find_entry(self, path: bytes) -> Any:
        """The index entry of a path in the lower tree, or ``None``."""
        assert self.index is not None
        record, entry = self.index.root(), None
        for part in path.split(b"/"):
            if record is None:
                return None
            entry = self.index.entries(record).get(part)
            if entry is None:
                return None
            record = entry.record
        return entry

    def indexed_ino(self, entry: Any) -> int:
        """The inode number shown for an index entry."""
        return self.inodes.shown(self.layers[entry.layer].dev, entry.ino)

    def source_at(self, layer: Layer, path: bytes) -> Source:
        """The Source of a directory path in a layer, made without opening anything."""
        if not path:
            return layer.root
        key = (layer.index, path)
        found = self._sources.get(key)
        if found is None:
            head, _, name = path.rpartition(b"/")
            found = self._sources[key] = self.source_at(layer, head).child(name)
        return found

    def _make_indexed(self, parent: Dir, name: bytes) -> Node | None:
        assert self.index is not None
        entry = self.index.entries(parent.record).get(name)
        if entry is None:
            return None
        layer = self.layers[entry.layer]
        path = entry.path if entry.path is not None else self._low_child(parent, name)
        ino = self.indexed_ino(entry)
        node: Node
        if entry.type == DT_DIR:
            node = self.new_dir(parent, name, [self.source_at(layer, path)], ino)
            node.record = entry.record  # type: ignore[attr-defined]
        else:
            head, _, real = path.rpartition(b"/")
            where = self.source_at(layer, head)
            existing = self.nodes.get(ino)
            if existing is not None and entry.nlink > 1 and existing.where is not None and (
                existing.where.layer is layer
            ):
                self.bind(parent, name, existing)
                return existing
            if existing is not None or ino <= ROOT_ID:
                ino = self.fresh_id()
            node = Node(ino, entry.type, name, where)
            self.nodes[ino] = node
            if entry.type == DT_REG and (real != name or b"" in entry.xattrs):
                node.data = None
            if real != name:
                node.name = real
            self.bind(parent, name, node)
        node.attr = self._indexed_attr(node, entry)
        return node

    def _indexed_attr(self, node: Node, entry: Any) -> bytes:
        mode, uid, gid = entry.mode, entry.uid, entry.gid
        if self.owners is not None:
            mode, uid, gid = self.owners.show_ids(mode, uid, gid)
        seconds, rest = divmod(entry.mtime_ns, 1_000_000_000)
        from cowfs.union.attr import encode_dev

        rdev = encode_dev(entry.rdev) if entry.rdev else 0
        nlink = 1 if entry.type == DT_DIR else entry.nlink
        return ATTR.pack(
            node.id if node is not self.__dict__.get("root") else self.root_ino,
            entry.size, entry.blocks, seconds, seconds, seconds, rest, rest, rest,
            mode, nlink, uid, gid, rdev, 4096, 0,
        )  # fmt: skip

    # -- binding ------------------------------------------------------------------------------

    def bind(self, parent: Dir, name: bytes, node: Node) -> None:
        """Make ``name`` name ``node``: its first name, or one more."""
        children = parent.children
        if children is None:
            children = self.load(parent)
        children[name] = node
        parent.live += 1
        if node.parent is None:
            node.parent = parent
        else:
            self.names.setdefault(node, []).append((parent, name))

    def unbind(self, parent: Dir, name: bytes, node: Node) -> bool:
        """Take a name away from a node. Returns whether it has another that is known."""
        if parent.children is not None:
            parent.children.pop(name, None)
        parent.live -= 1
        others = self.names.get(node)
        if others is None:
            if node.parent is parent:
                node.parent = None
            return False
        if node.parent is parent and node.name == name:
            node.parent, node.name = others.pop(0)
            if node.where is not None and node.where.layer is self.upper:
                node.where = self.upper_of(node.parent)
        else:
            others.remove((parent, name))
        if not others:
            del self.names[node]
        return True

    def names_of(self, node: Node) -> list[tuple[Dir, bytes]]:
        """Every name of a node that is known, the first one first."""
        first = [(node.parent, node.name)] if node.parent is not None else []
        return first + self.names.get(node, [])

    def fresh_id(self) -> int:
        """An id that no inode number can be."""
        self._synthetic += 1
        return self._synthetic

    def upper_of(self, directory: Dir) -> Source | None:
        """The directory's part in the upper layer, or ``None``."""
        sources = directory.sources
        return sources[0] if sources and sources[0].layer is self.upper else None

    def in_upper(self, node: Node) -> bool:
        """Whether a node's inode is in the upper layer (or was, for an orphan)."""
        return node.where is None or node.where.layer is self.upper

    def path(self, node: Node) -> bytes:
        """One merged path, without a leading slash."""
        parts = []
        here: Node | None = node
        while here is not None and here is not self.root:
            parts.append(here.name)
            here = here.parent
        return b"/".join(reversed(parts))

    def low_path(self, directory: Dir) -> bytes:
        """A directory's path in the merged lower tree (kernel: what ``redirect`` is made of)."""
        parts = []
        here = directory
        while here is not self.root:
            if here.lowpath is not None:
                parts.append(here.lowpath)
                break
            parts.append(here.name)
            here = here.parent or self.root
        return b"/".join(reversed(parts))

    def _low_child(self, parent: Dir, name: bytes) -> bytes:
        head = self.low_path(parent)
        return head + b"/" + name if head else name

    # -- attributes ---------------------------------------------------------------------------

    def attr(self, node: Node) -> bytes:
        """The packed attributes (:data:`~cowfs.union.attr.ATTR`), read again when stale."""
        return node.attr or self._refresh(node)

    def size(self, node: Node) -> int:
        """st_size."""
        return int.from_bytes(self.attr(node)[8:16], "little")

    def mode(self, node: Node) -> int:
        """st_mode."""
        return mode_of(self.attr(node))

    def _refresh(self, node: Node) -> bytes:
        if node.__class__ is Dir:
            return self._refresh_dir(node)  # type: ignore[arg-type]
        where = node.where
        if where is None:
            fd, name = node.fd, b""
            st = os.fstat(fd)
        else:
            fd, name = where.fd if where.fd >= 0 else where.open(), node.name
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if self.owners is None:
            attr = pack(st, node.id, st.st_mode, st.st_uid, st.st_gid)
        else:
            attr = pack(st, node.id, *self.owners.show(st, fd, name))
        if node.data is not None:
            attr = with_size(attr, *data_size(node.data, st))
        if node.parent is None and where is not None:
            attr = with_nlink(attr, 0)
        node.attr = attr
        return attr

    def _refresh_dir(self, node: Dir) -> bytes:
        if node.record is not None and self.upper_of(node) is None:
            entry = self.find_entry(self.low_path(node)) if node is not self.root else None
            if entry is not None:
                node.attr = self._indexed_attr(node, entry)
                return node.attr
        fd = node.sources[0].open()
        st = os.fstat(fd)
        ino = self.root_ino if node is self.root else node.id
        if self.owners is None:
            attr = pack(st, ino, st.st_mode, st.st_uid, st.st_gid)
        else:
            attr = pack(st, ino, *self.owners.show(st, fd, b""))
        if len(node.sources) > 1 or node.record is not None:
            attr = with_nlink(attr, 1)
        if node.parent is None:
            attr = with_nlink(attr, 0)
        node.attr = attr
        return attr

    # -- listing ------------------------------------------------------------------------------

    def listing(self, directory: Dir, cookie: int = 0) -> Iterator[tuple[bytes, int]]:
        """(name, cookie) of the entries after ``cookie``; 0 starts, with ``.`` and ``..`` first.

        A listing that goes on after creates and removes neither skips nor repeats what stayed:
        the cookie is a hash of the name, and names come in its order.
        """
        if cookie < 1:
            yield b".", 1
        if cookie < 2:
            yield b"..", 2
        children = directory.children
        if children is None:
            children = self.load(directory)
        order = directory.order
        if order is None:
            order = directory.order = sorted(children, key=cookie_of)
        start = 0 if cookie < _FIRST_COOKIE else bisect_right(order, cookie, key=cookie_of)
        for position in range(start, len(order)):
            name = order[position]
            if name in children:
                yield name, cookie_of(name)
        directory.order = None

    def entry(self, directory: Dir, name: bytes) -> tuple[int, int]:
        """(inode number, DT_*) of a listed name, without making a node."""
        if name in (b".", b".."):
            node: Any = directory if name == b"." else self.parent(directory)
            return (self.root_ino if node is self.root else node.id), DT_DIR
        item = directory.children.get(name) if directory.children is not None else None
        if item is None:
            return 0, 0
        if item.__class__ is not int:
            return item.id, item.type  # type: ignore[union-attr]
        if item < 0:  # type: ignore[operator]
            entry = self.index.entries(directory.record)[name]  # type: ignore[union-attr]
            return self.indexed_ino(entry), entry.type
        if item & 15 == DT_DIR:  # type: ignore[operator]
            made = self.child(directory, name)
            return (made.id, DT_DIR) if made is not None else (0, 0)
        source = directory.sources[-1 - (item >> 4)]  # type: ignore[operator]
        st = lower.lstat(source, name)
        if st is None:
            return 0, 0
        ino = self.inodes.shown(st.st_dev, st.st_ino)
        if source.layer is self.upper and source.impure:
            ino = self.inodes.from_origin(xattr.try_get(source.open(), name, self.form.origin) or b"") or ino
        return ino, item & 15  # type: ignore[operator]

    # -- forgetting ---------------------------------------------------------------------------

    def forget(self, id: int, count: int) -> None:
        """Count look-ups down; at zero the node goes, and its name becomes a code again."""
        node = self.nodes.get(id)
        if node is None:
            return
        node.nlookup -= count
        if node.nlookup <= 0:
            self.drop(node)

    def drop(self, node: Node) -> None:
        """Let go of a node that nobody holds, and of parents that were kept for it."""
        while node is not self.root and node.nlookup <= 0:
            if node.__class__ is Dir and node.live > 0:  # type: ignore[attr-defined]
                return
            if self.nodes.pop(node.id, None) is None:
                return
            if node.fd >= 0:
                os.close(node.fd)
                node.fd = -1
            if node.data is not None and hasattr(node.data, "close"):
                node.data.close()
            parent = node.parent
            if parent is None:
                self._bury(node)
                return
            if node.id < SYNTHETIC:
                self._parents[node.id] = parent.id
            for directory, name in self.names.pop(node, ()):
                self._fold(directory, name, node)
                if directory is not parent and directory.nlookup <= 0:
                    self.drop(directory)
            self._fold(parent, node.name, node)
            if node.__class__ is Dir:
                for source in node.sources:  # type: ignore[attr-defined]
                    source.close()
                node.children = None  # type: ignore[attr-defined]
            node = parent

    def _fold(self, parent: Dir, name: bytes, node: Node) -> None:
        parent.live -= 1
        children = parent.children
        if children is None or children.get(name) is not node:
            return
        layer = node.where.layer if node.where is not None else None
        if node.__class__ is Dir:
            layer = node.sources[0].layer  # type: ignore[attr-defined]
        sources = parent.sources
        for position, source in enumerate(sources):
            if source.layer is layer and (layer is self.upper or parent.record is None):
                children[name] = (len(sources) - 1 - position) << 4 | node.type
                return
        if parent.record is not None:
            children[name] = -1
        else:  # its layer is not one of the parent's any more: read the directory again
            parent.children = None

    def _bury(self, node: Node) -> None:
        """The last trace of an unlinked node is gone: give back its space, spend its number."""
        if self.space is not None and self.in_upper(node):
            self.space.release(node)
        if node.id < SYNTHETIC:
            self._dead[node.id] = node.generation + 1

    def revive(self, id: int) -> Node:
        """The node of a file handle, forgotten or not. Raises ESTALE."""
        node = self.nodes.get(id)
        if node is not None:
            return node
        parent_id = self._parents.get(id)
        if parent_id is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        parent = self.revive(parent_id)
        assert isinstance(parent, Dir)
        children = parent.children
        if children is None:
            children = self.load(parent)
        for name in list(children):
            if self.entry(parent, name)[0] == id:
                found = self.child(parent, name)
                if found is not None and found.id == id:
                    return found
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    # -- the whole ----------------------------------------------------------------------------

    def statfs(self) -> os.statvfs_result:
        """statvfs(3) of the upper layer's host, bounded by the limit."""
        layer = self.upper or self.layers[-1]
        host = os.fstatvfs(layer.root.fd)
        return self.space.statfs(host) if self.space is not None else host

    def set_limit(self, limit: Limit | None) -> None:
        """Bound what the upper layer holds from now on. Counts it first if nobody has."""
        if self.upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if self.space is None:
            if not limit:
                return
            self.space = space.Space(self)
        self.space.limit = limit or Limit()

    @property
    def limit(self) -> Limit | None:
        """The bound in force."""
        return self.space.limit if self.space is not None else None

    def usage(self) -> Usage:
        """What the upper layer holds: kept when there is a limit, else counted now."""
        if self.space is not None:
            return self.space.usage()
        return space.measure(self.upper, self.form) if self.upper is not None else Usage()

    def indexed_entry(self, node: Node) -> Any:
        """The index entry of something that only a lower layer has, or ``None``."""
        if self.index is None or node.parent is None or self.in_upper(node):
            return None
        if node is self.root:
            return None
        parent = node.parent
        if parent.record is None:
            return None
        return self.index.entries(parent.record).get(node.name)

    def uuid_at(self, fd: int) -> bytes:
        """The uuid of the file system that an open object is on."""
        dev = os.fstat(fd).st_dev
        found = self._uuids.get(dev)
        if found is None:
            found = self._uuids[dev] = self.inodes.uuid_of(dev)
        return found

    @property
    def must_sync(self) -> bool:
        """Whether copies are synced before they are named: not on volatile mounts."""
        return not self.options.volatile

    def open_data(self, node: Node) -> int:
        """A new descriptor for reading a regular file's data, wherever it is."""
        flags = os.O_RDONLY | _FILE
        data = node.data
        where, name = (node.where, node.name) if data is None else (data.where, data.name)
        if where is None:
            return os.open(b"/proc/self/fd/%d" % node.fd, os.O_RDONLY | os.O_CLOEXEC)
        fd = where.fd if where.fd >= 0 else where.open()
        if self._noatime:
            try:
                return os.open(name, flags | os.O_NOATIME, dir_fd=fd)
            except PermissionError:
                self._noatime = False
        return os.open(name, flags, dir_fd=fd)

    def open_own(self, node: Node) -> int:
        """A new descriptor for writing the file that the upper layer has.

        An owner may write a file that its mode forbids to write (it was opened before); a server
        without privilege lifts the mode for the moment of opening.
        """
        flags = os.O_RDWR | _FILE
        where = node.where
        if where is None:
            path = b"/proc/self/fd/%d" % node.fd
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except PermissionError:
                mode = os.fstat(node.fd).st_mode & 0o7777
                os.chmod(path, mode | 0o600)
                try:
                    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
                finally:
                    os.chmod(path, mode)
        fd = where.fd if where.fd >= 0 else where.open()
        try:
            return os.open(node.name, flags, dir_fd=fd)
        except PermissionError:
            mode = os.stat(node.name, dir_fd=fd, follow_symlinks=False).st_mode & 0o7777
            os.chmod(node.name, mode | 0o600, dir_fd=fd)
            try:
                return os.open(node.name, flags, dir_fd=fd)
            finally:
                os.chmod(node.name, mode, dir_fd=fd)

    def need_upper(self) -> Layer:
        """The upper layer, or EROFS."""
        if self.readonly or self.upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self.upper

    def trim_files(self) -> None:
        """Close the data descriptors opened longest ago. Only while none is in use."""
        opened = self.open_files
        while len(opened) > self.max_files:
            node = opened.popleft()
            if node.fd >= 0 and node.where is not None:
                with contextlib.suppress(OSError):
                    os.close(node.fd)
                node.fd = -1

    # -- the rest, one concept a module ---------------------------------------------------------

    mknod = create.mknod
    mkdir = create.mkdir
    symlink = create.symlink
    link = create.link
    tmpfile = create.tmpfile
    unlink = create.unlink
    rmdir = create.rmdir
    rename = rename.rename
    readlink = content.readlink
    pread = content.pread
    write = content.write
    fallocate = content.fallocate
    lseek = content.lseek
    copy_range = content.copy_range
    fsync_fd = content.fsync_fd
    data_fd = content.data_fd
    writable = copyup.writable
    publish = copyup.publish
    setattr = metadata.setattr
    getxattr = metadata.getxattr
    listxattr = metadata.listxattr
    setxattr = metadata.setxattr
    removexattr = metadata.removexattr


def data_size(data: Any, st: os.stat_result) -> tuple[int, int]:
    """(size, blocks) of a file whose data is elsewhere."""
    if hasattr(data, "stat_size"):
        size, blocks = data.stat_size()
        return int(size), int(blocks)
    return st.st_size, int(data.blocks)


__all__ = ["DT_REG", "ROOT_ID", "View", "cookie_of", "files", "stat"]
