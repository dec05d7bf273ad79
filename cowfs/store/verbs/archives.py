"""The verbs of images, layers and differences, in and out."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import BinaryIO

    from cowfs import archive, images
    from cowfs.archive import ApplyOptions
    from cowfs.diff import blocks
    from cowfs.store.applying import Progress
    from cowfs.store.copying import Receiver
    from cowfs.store.disks import DiskCounts
    from cowfs.store.sending import Sent
    from cowfs.store.services import Services

__all__ = ["ArchiveVerbs"]


class ArchiveVerbs:
    """The verbs of images, layers and differences, in and out."""

    services: Services

    def apply(
        self,
        key: str,
        stream: BinaryIO,
        *,
        options: archive.ApplyOptions | None = None,
        diff_id: str | None = None,
        progress: Progress | None = None,
    ) -> archive.Applied:
        """Unpack an OCI layer tar into an active snapshot.

        Args:
            key: an unmounted active snapshot.
            stream: the archive, plain or compressed; a pipe will do.
            options: bounds, and what to do without privilege.
            diff_id: its expected digest.
            progress: called with the bytes read.

        Raises:
            NotFound: no such key.
            FailedPrecondition: not active, or mounted.
            InvalidArgument: the archive is damaged or hostile; the message names the entry.
            Corrupt: another digest than asked for.

        After an error the snapshot holds a part of the archive.
        """
        return self.services.applying.apply(key, stream, options=options, diff_id=diff_id, progress=progress)

    def export(
        self,
        name: str,
        target: str | os.PathLike[str] | BinaryIO,
        *,
        format: str = "oci",
        compression: str | None = None,
        directory: bool = False,
        progress: Progress | None = None,
    ) -> str:
        """Write a snapshot out.

        Args:
            name: a snapshot or a tag. Active ones only as ``tar`` and ``layer``.
            target: a path, or a stream.
            format: ``oci`` (a layout in a tar), ``docker`` (a docker-archive), ``tar`` (the whole tree) or
                ``layer`` (its changes against the parent, as an OCI layer tar).
            compression: ``none``, ``gzip`` or ``zstd``; default: gzip for ``oci``, else none.
            directory: of ``oci``: make a layout directory.
            progress: called with the bytes written.

        Returns:
            The digest of the uncompressed tar (``tar``, ``layer``) or the name of the top snapshot.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: no such format, or a tree that it cannot express.
            FailedPrecondition: an active snapshot as an image.
        """
        return self.services.exporting.export(
            name, target, format=format, compression=compression, directory=directory, progress=progress
        )

    def image(self, name: str) -> images.OutImage:
        """A committed snapshot or a tag as an image: its configuration, and layers that can be written.

        Digests of layers that no archive made are found by a dry export once, and kept.

        Args:
            name: a name or a tag.

        Raises:
            NotFound: no such snapshot or tag.
            InvalidArgument: it is not committed.
        """
        return self.services.exporting.image(name)

    def export_diff(
        self, a: str, b: str, target: BinaryIO, *, compression: str = "none", progress: Progress | None = None
    ) -> str:
        """Write the changes from one snapshot to another, related or not, as an OCI layer tar.

        Applied to a snapshot that equals ``a``, it gives one that equals ``b``.

        Args:
            a, b: keys, names or tags.
            target: where the tar goes, a binary stream.
            compression: "none", "gzip" or "zstd".
            progress: called with (bytes, entries) so far.

        Returns:
            Its diff id.

        Raises:
            NotFound: no such snapshot.
            OSError: the target cannot be written.
        """
        return self.services.exporting.export_diff(a, b, target, compression=compression, progress=progress)

    def import_image(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        name: str | None = None,
        *,
        tag: str | None = None,
        platform: str | None = None,
        form: images.Form | None = None,
        options: archive.ApplyOptions | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        told: Callable[[str], object] | None = None,
    ) -> str:
        """Bring in an image or a tree: a chain of snapshots named by chain id, and a tag.

        Args:
            source: an OCI layout (directory or tar), a docker-archive, a root filesystem's tar, or a plain
                directory; a path or a stream.
            name: the tag that it gets here; default: those of the source.
            tag, platform: which image of the source, where it has several (:meth:`cowfs.images.ImageSource.pick`).
            form: ``image``, ``rootfs`` or ``layer``, instead of the kind found by its content.
            options: bounds for its archives.
            labels: for the snapshots that are new.
            progress: called with the progress.
            told: called with a line for each name of the source that was another image's tag here and moved, and for
                each that cannot be a tag. Default: a warning.

        Returns:
            The name of its top snapshot.

        Raises:
            NotFound: no such source, or no such image in it.
            InvalidArgument: it is damaged or hostile, or the tag is no possible one.
            Corrupt: a digest does not match.
            AlreadyExists: a snapshot has that name.
        """
        return self.services.importing.import_image(
            source,
            name,
            tag=tag,
            platform=platform,
            form=form,
            options=options,
            labels=labels,
            progress=progress,
            told=told,
        )

    def import_opened(
        self,
        image: images.Image,
        tags: Sequence[str] = (),
        *,
        options: archive.ApplyOptions | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> tuple[str, str]:
        """Bring in an image of a source that the caller has opened (or described: a registry's).

        Args:
            image: its layers are opened once each.
            tags: its names here; may be none.
            options, labels, progress: as for :meth:`import_image`.

        Returns:
            The name of its top snapshot, and its configuration ("" for a tree that is no archive).

        Raises:
            InvalidArgument, Corrupt, AlreadyExists: as :meth:`import_image`.
        """
        return self.services.importing.import_opened(image, tags, options=options, labels=labels, progress=progress)

    def import_docker_host(
        self,
        root: str | os.PathLike[str],
        driver: str,
        *,
        options: archive.ApplyOptions | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        told: Callable[[str], object] | None = None,
    ) -> tuple[list[str], int]:
        """Bring over the images of an old Docker host, with their names.

        Args:
            root: Docker's data directory (``/var/lib/docker``), without a running writer.
            driver: of its layers: ``aufs`` or ``overlay2``.
            options, labels, progress: as for :meth:`import_image`.
            told: called with a line for each damaged part and its treatment. Default: a warning.

        Returns:
            The names of the images' top snapshots, each once, and the number of lines.

        Raises:
            NotFound: no images of that driver there.
        """
        return self.services.importing.import_docker_host(
            root, driver, options=options, labels=labels, progress=progress, told=told
        )

    def export_blocks(
        self, name: str, target: BinaryIO, *, base: str | None = None, identity: bytes | None = None
    ) -> blocks.Counts:
        """Write the changes of a committed snapshot, block by block.

        Args:
            name: a committed snapshot, or a tag.
            target: a stream; a pipe will do.
            base: the committed snapshot that it is for; default: the parent.
            identity: 32 bytes that tell the tree it is for; default: a digest of names, attributes, sizes and times.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: not committed.
            CowfsError: a file cannot be read.
        """
        return self.services.blocks.export_blocks(name, target, base=base, identity=identity)

    def apply_blocks(self, key: str, stream: BinaryIO, *, identity: bytes | None = None) -> blocks.Counts:
        """Make the changes of a block-level difference in an active snapshot.

        Args:
            key: an unmounted active snapshot, fresh from the tree that the stream was made against.
            stream: a stream of :meth:`export_blocks`; a pipe will do.
            identity: as given there; default: the digest of the parent's tree.

        Raises:
            NotFound: no such key.
            FailedPrecondition: not active, mounted, or with another parent than that of the stream.
            Corrupt, InvalidArgument: the stream is damaged or hostile. Part of it may have been applied.
            LimitExceeded: the snapshot's limit; likewise.
        """
        return self.services.blocks.apply_blocks(key, stream, identity=identity)

    def copy_to(self, name: str, other: Receiver, *, progress: Progress | None = None) -> list[str]:
        """Copy a committed snapshot with its ancestors to another store, layer by layer; existing layers are not copied again.

        Names are kept where they are free there, else a layer is named by its chain id. A tag is a tag there, too, with
        its configuration.

        Args:
            name: a committed snapshot, or a tag.
            other: the other store; any driver.
            progress: called with the progress.

        Returns:
            Names, in the other store, of the layers that were copied, bottom first.

        Raises:
            NotFound: no such snapshot or tag.
            InvalidArgument: not committed, or a name that is another tree's there.
            CowfsError, OSError: of either store; layers that were copied whole stay.
        """
        return self.services.copying.copy_to(name, other, progress=progress)

    def send(
        self,
        names: Sequence[str],
        pipe: BinaryIO,
        *,
        since: str | None = None,
        answers: BinaryIO | None = None,
        progress: Progress | None = None,
    ) -> Sent:
        """Write committed snapshots with their ancestors to a pipe, for :meth:`receive` of another store.

        Of a ``row`` store the layers that no archive made are sent as the blocks that changed. The format is :mod:`cowfs.store.stream`.

        Args:
            names: committed snapshots, or tags.
            pipe: the binary stream to write to.
            since: an ancestor of them all that the other store has: it, and what is beneath it, are left out.
            answers: the receiver's answers (its ``answers``): then only missing layers are sent.
            progress: called with the progress.

        Returns:
            The layers that were sent.

        Raises:
            NotFound: no such snapshot or tag.
            InvalidArgument: not committed, or ``since`` is no ancestor.
            Corrupt: the answers are cut short or damaged.
            OSError: the pipe cannot be written; BrokenPipeError where the receiver ended.
        """
        return self.services.sending.send(names, pipe, since=since, answers=answers, progress=progress)

    def receive(
        self,
        pipe: BinaryIO,
        *,
        answers: BinaryIO | None = None,
        options: ApplyOptions | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Bring in a stream of :meth:`send`. Each layer is checked against its diff id; complete layers stay if the rest fails.

        Names are kept where they are free here, else a layer is named by its chain id. A tag is a tag here, too, with
        its configuration.

        Args:
            pipe: the stream; binary.
            answers: the binary stream for the list of existing layers, for a sender that asks.
            options: bounds for each layer, and what to do without privilege.
            progress: called with the progress.

        Returns:
            Names of the layers that were new, bottom first.

        Raises:
            InvalidArgument: no such stream, a hostile layer, or a name that is another tree's here.
            Corrupt: the stream is cut short or damaged, or a layer does not match its diff id.
            FailedPrecondition: a layer beneath it is missing here.
            OSError: no room, and so on.
        """
        return self.services.receiving.receive(pipe, answers=answers, options=options, progress=progress)

    def export_disk(
        self, name: str, target: BinaryIO, *, format: str = "raw", size: str | int | None = None
    ) -> DiskCounts:
        """Write a committed snapshot as a disk for a virtual machine: one file system, without partitions, that has the tree for its root.

        Only of the driver ``block``; the file system has a UUID of its own each time.

        Args:
            name: a committed snapshot, or a tag.
            target: a stream; a file gets holes, and a pipe will do.
            format: ``raw`` or ``qcow2`` (version 3).
            size: of the disk, bytes or "20G"; default: as large as the store's images are.

        Returns:
            Its size, and the bytes written.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: not committed, no such format, or an impossible size.
            Unsupported: the driver keeps no images.
        """
        return self.services.disks.export_disk(name, target, format=format, size=size)
