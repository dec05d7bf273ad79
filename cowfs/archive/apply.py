"""Apply: one stream in, one layer directory (or a changed tree) out."""

from __future__ import annotations

import os
from collections.abc import Callable

from cowfs._typed import BinaryIO
from cowfs.archive.compress import Unpacker
from cowfs.archive.extract import Extractor
from cowfs.archive.headerlog import LogWriter
from cowfs.archive.options import Applied, ApplyOptions, Budget, Tree
from cowfs.archive.reader import Reader, blame
from cowfs.errors import Corrupt, CowfsError, InvalidArgument
from cowfs.format.whiteout import FORMS

__all__ = ["apply_layer"]

_PROGRESS_STEP = 1 << 20


def apply_layer(
    stream: BinaryIO,
    target: str | bytes | int,
    *,
    form: str = "trusted",
    lower: Tree | None = None,
    options: ApplyOptions | None = None,
    log: BinaryIO | None = None,
    on_file: Callable[[bytes, str], object] | None = None,
    on_inode: Callable[[int, str], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
    tee: BinaryIO | None = None,
    diff_id: str | None = None,
    blob_digest: str | None = None,
    budget: Budget | None = None,
) -> Applied:
    """Unpack an OCI layer tar (plain, gzip, zstd, bzip2 or xz, told apart by its first bytes).

    Args:
        stream: read from front to end, never sought: a pipe will do.
        target: the directory, a path or an open descriptor. For the overlay forms it is usually
            empty; its content counts as older than the archive.
        form: ``trusted`` or ``user``: an overlay layer with whiteouts in that form; ``plain``: a full
            tree, on which whiteouts delete.
        lower: the tree below the layer. Gives parents missing in the archive their attributes,
            and the data of hard links to lower files.
        log: gets the header log, with which :func:`cowfs.archive.rebuild` reproduces the archive.
        on_file: called with (path, sha256 in hex) for regular files as they are written; a path may come
            twice, the last one counts. Without it no file is hashed. Sparse files that are mostly holes are left out.
        on_inode: called with (inode number, sha256 in hex) for regular files, "" for those that are not hashed; the
            last call for an inode counts, whatever its names.
        progress: called with (bytes read of ``stream``, members done) about once a MiB and at the end.
        tee: gets the stream's bytes as they were read, to keep the blob.
        diff_id, blob_digest: the expected digests (``sha256:...``).
        budget: bytes that several archives may make together, beside ``options.max_bytes`` for this one.

    Raises:
        InvalidArgument: not a tar archive, a damaged, truncated or hostile one. The message names the entry.
        LimitExceeded: past one of the bounds of ``options``.
        Unsupported: needs privilege, or a package, that is not there.
        Corrupt: a digest is not the one asked for.
        OSError: reading ``stream`` or writing ``target`` failed.

    After an error the target holds a part of the layer; the caller made it and removes it.
    """
    options = options or ApplyOptions()
    budget = budget or Budget(options.max_bytes)
    if form != "plain" and form not in FORMS:
        raise InvalidArgument(f"unknown layer form {form!r}", remedy="use trusted, user or plain")
    root = target if isinstance(target, int) else os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        writer = LogWriter(log) if log is not None else None
        source = Unpacker(stream, max_bytes=options.max_bytes, tee=tee, budget=budget)
        try:
            reader = Reader(
                source,
                raw=writer.raw if writer else None,
                max_header=options.max_header,
                max_entries=options.max_entries,
            )
            done = _extract_all(
                Extractor(root, FORMS.get(form), reader, options, lower=lower, log=writer, on_file=on_file,
                    on_inode=on_inode, budget=budget),
                reader, source, progress,
            )  # fmt: skip
            source.finish()
            for what, asked, got in (("diff id", diff_id, source.diff_id), ("digest", blob_digest, source.blob_digest)):
                if asked is not None and asked != got:
                    raise Corrupt(f"archive has the {what} {got} instead of {asked}")
            log_size = writer.close(diff_id=source.diff_id, size=source.size, entries=reader.entries) if writer else 0
        except BaseException:
            source.stop()
            if writer is not None:
                writer.abandon()
            raise
    finally:
        if not isinstance(target, int):
            os.close(root)
    if progress is not None:
        progress(source.blob_size, reader.entries)
    return Applied(
        diff_id=source.diff_id,
        size=source.size,
        blob_digest=source.blob_digest,
        blob_size=source.blob_size,
        compression=source.compression,
        entries=reader.entries,
        whiteouts=done.whiteouts,
        dropped=dict(done.dropped),
        skipped=done.skipped,
        log_size=log_size,
        reserved=done.reserved,
        root=done.rooted,
    )


def _extract_all(
    extractor: Extractor, reader: Reader, source: Unpacker, progress: Callable[[int, int], object] | None
) -> Extractor:
    extract = extractor.extract
    shown = 0
    try:
        for member in reader:
            try:
                extract(member)
            except CowfsError as error:
                raise blame(error, member.ordinal, member.name) from error
            if progress is not None and source.read_bytes - shown >= _PROGRESS_STEP:
                shown = source.read_bytes
                progress(shown, member.ordinal)
        extractor.finish()
    except BaseException:
        extractor.abandon()
        raise
    return extractor
