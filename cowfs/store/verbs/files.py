"""The verbs of files in snapshots, by path and without any mount."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import IO, Any, BinaryIO

    from cowfs.model import FileInfo
    from cowfs.store.files import Progress
    from cowfs.store.services import Services
    from cowfs.union.transfer import Copied, Target
    from cowfs.union.tree import Tree

__all__ = ["FileVerbs"]


class FileVerbs:
    """The verbs of files in snapshots, by path and without any mount."""

    services: Services

    def tree(self, name: str) -> AbstractContextManager[Tree]:
        """The tree of any snapshot to read by canonical path (:class:`cowfs.union.tree.Tree`); see the table above.

        Raises:
            NotFound: no such key, name or tag.
            Corrupt: it is in quarantine, or records are missing.
        """
        return self.services.files.tree(name)

    def open_file(
        self,
        name: str,
        path: str | bytes,
        mode: str = "rb",
        *,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """A file object over a file of a snapshot; close it, or use it as a context manager.

        Links are followed inside the snapshot. An active snapshot that is not mounted is in use until the file is closed.

        Args:
            name: a key, name or tag; for the modes that write, the key of an active snapshot.
            path: from the root, with or without a leading slash.
            mode, buffering, encoding, errors, newline: as for the built-in ``open``, but that the default is ``rb``, and UTF-8 in text.

        Raises:
            NotFound: no such snapshot.
            FileNotFoundError, IsADirectoryError, FileExistsError, OSError: as ``open``.
            FailedPrecondition: writing to a snapshot that is not active, or is in use.
            ValueError: not a mode.
        """
        return self.services.files.open_file(
            name, path, mode, buffering=buffering, encoding=encoding, errors=errors, newline=newline
        )

    def walk_files(self, name: str, path: str | bytes = b"", *, depth: int | None = None) -> Iterator[FileInfo]:
        """List a snapshot's tree: the object at ``path`` and all below it, parents first, in sorted order.

        Of a committed snapshot only the index is read. Links at the end of ``path`` and below it are not followed.

        Args:
            name, path: the snapshot, and the path in it.
            depth: levels below ``path`` at most.

        Raises:
            NotFound: no such snapshot.
            FileNotFoundError: nothing at ``path``.
        """
        return self.services.files.walk_files(name, path, depth=depth)

    def stat_file(self, name: str, path: str | bytes, *, follow: bool = True) -> FileInfo:
        """One object of a snapshot's tree.

        Args:
            name, path: the snapshot, and the path in it.
            follow: links at the end of ``path``, inside the snapshot.

        Raises:
            NotFound: no such snapshot.
            FileNotFoundError: nothing at ``path``.
        """
        return self.services.files.stat_file(name, path, follow=follow)

    def copy_out(
        self,
        name: str,
        path: str | bytes,
        target: str | os.PathLike[str],
        *,
        owners: bool = False,
        progress: Progress | None = None,
    ) -> Copied:
        """Copy a file, or a directory with all below it, out of a snapshot to ``target`` on the host, in pieces.

        A file at ``target`` is replaced, directories are merged (one at ``target`` keeps its own attributes); its
        parent directory must exist.

        Args:
            name, path: the snapshot, and the path in it.
            owners: keep owners, set-id bits and all extended attributes (needs root); else new objects are the
                caller's, with ``user.*`` only.
            progress: called with (bytes, objects) so far.

        Raises:
            NotFound: no such snapshot.
            OSError: :func:`cowfs.union.transfer.copy`.
        """
        return self.services.files.copy_out(name, path, target, owners=owners, progress=progress)

    def copy_in(
        self,
        name: str,
        source: str | os.PathLike[str],
        path: str | bytes,
        *,
        owners: bool = False,
        progress: Progress | None = None,
    ) -> Copied:
        """Copy a file, or a directory with all below it, from the host to ``path`` in an active snapshot; as :meth:`copy_out`.

        Args:
            name: the key of an active snapshot.
            source: on the host.
            path: in the snapshot.
            owners: keep owners, set-id bits and all extended attributes.
            progress: called with (bytes, objects) so far.

        Raises:
            NotFound: no such key.
            FailedPrecondition: it is not active, or another verb uses it.
            OSError: :func:`cowfs.union.transfer.copy`.
        """
        return self.services.files.copy_in(name, source, path, owners=owners, progress=progress)

    def copy_between(
        self,
        name: str,
        path: str | bytes,
        key: str,
        target: str | bytes,
        *,
        owners: bool = True,
        progress: Progress | None = None,
    ) -> Copied:
        """Copy a file, or a directory with all below it, from one snapshot of this store to another, which is active; as :meth:`copy_out`.

        Args:
            name, path: the source snapshot, and the path in it.
            key, target: an active snapshot, and the path in it.
            owners: keep owners, set-id bits and all extended attributes.
            progress: called with (bytes, objects) so far.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: into itself.
            OSError: :func:`cowfs.union.transfer.copy`.
        """
        return self.services.files.copy_between(name, path, key, target, owners=owners, progress=progress)

    def copy_out_tar(self, name: str, path: str | bytes, out: BinaryIO, *, progress: Progress | None = None) -> None:
        """Write the object at ``path`` in a snapshot, with all below it, as a tar whose names begin with the last one
        of ``path``.

        Of the root, or of a path that ends in ``/.``, the names begin in that directory.

        Args:
            name, path: the snapshot, and the path in it.
            out: the binary stream for the tar.
            progress: called with (bytes, objects) so far.

        Raises:
            NotFound: no such snapshot.
            FileNotFoundError: nothing at ``path``.
        """
        self.services.files.copy_out_tar(name, path, out, progress=progress)

    def copy_in_tar(
        self,
        key: str,
        stream: BinaryIO,
        path: str | bytes,
        *,
        owners: bool = True,
        progress: Progress | None = None,
    ) -> Copied:
        """Unpack a tar, plain or compressed, into a directory of an active snapshot; no member of it deletes (unlike
        with :meth:`apply`).

        Args:
            key: an active snapshot.
            stream: the tar, a binary stream.
            path: a directory in the snapshot.
            owners: keep owners, set-id bits and all extended attributes.
            progress: called with (bytes, objects) so far.

        Raises:
            NotFound: no such key.
            NotADirectoryError, FileNotFoundError: no directory at ``path``.
            InvalidArgument, LimitExceeded, OSError: :func:`cowfs.archive.files.unpack_files`.
        """
        return self.services.files.copy_in_tar(key, stream, path, owners=owners, progress=progress)

    def writable_tree(self, key: str) -> AbstractContextManager[Target]:
        """The tree of an active snapshot to read and write by canonical path (:class:`cowfs.union.transfer.Target`).

        Raises:
            NotFound: no such key.
            FailedPrecondition: it is not active, or another verb uses it.
        """
        return self.services.files.writable_tree(key)
