"""The spec of a mount from a user's arguments: words become numbers and absolute paths, and unfit arguments are refused."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from cowfs._typed import Any
from cowfs.errors import InvalidArgument
from cowfs.model import SMALLEST_LIMIT, parse_count, parse_size
from cowfs.mounting import mountpoint
from cowfs.mounting.request import MountSpec, find_layers, refuse_layer
from cowfs.mounting.upper_state import HIDDEN

__all__ = ["PathLike", "block_size", "make_spec"]

PathLike = str | os.PathLike[str]


def make_spec(
    layers: PathLike | Sequence[PathLike],
    target: PathLike,
    *,
    upper: PathLike | None = None,
    work: PathLike | None = None,
    readonly: bool = False,
    ephemeral: bool = False,
    memory: bool = False,
    size: str | int | None = None,
    inodes: str | int | None = None,
    options: Iterable[str] = (),
    **more: Any,
) -> MountSpec:
    """The spec behind :func:`cowfs.mount`: paths made absolute, options split into words, sizes parsed.

    Raises:
        InvalidArgument, NotFound: as :func:`cowfs.mount`.
    """
    if isinstance(layers, str | os.PathLike):
        directory = os.path.abspath(layers)
        found = find_layers(directory)
        beside: str | None = directory
    else:
        found = tuple(os.path.abspath(layer) for layer in layers)
        parents = {os.path.dirname(layer) for layer in found}
        beside = parents.pop() if len(parents) == 1 else None
    from cowfs.sys.mounts import OPTION_FLAGS

    words = []
    for word in options.split(",") if isinstance(options, str) else options:
        if word == "ro":
            readonly = True
        elif word in ("rw", "defaults", ""):
            pass
        elif word == "volatile":
            more["volatile"] = True
        elif word in OPTION_FLAGS:
            words.append(word)
        else:
            raise InvalidArgument(
                f"no such mount option: {word!r}", remedy=f"known: {', '.join(OPTION_FLAGS)}, volatile"
            )
    scratch = None
    if ephemeral and (upper or work):
        raise InvalidArgument(
            "an ephemeral mount makes its own upper", remedy="leave out --upper and --work, or --ephemeral"
        )
    if work and not upper:
        raise InvalidArgument("a work directory alone is of no use", remedy="name the upper, too: --upper DIR")
    if memory and not ephemeral:
        raise InvalidArgument("an upper in memory is not kept", remedy="say so: --ephemeral --memory")
    if ephemeral and readonly:
        raise InvalidArgument("ephemeral and read-only exclude each other")
    if not upper and not readonly:
        if memory:
            from cowfs.mounting.kernel import folder_in_memory

            scratch = folder_in_memory()
        elif beside is None:
            raise InvalidArgument(
                "the layers have no common parent to keep a scratch upper in",
                remedy="name one: --upper DIR; or mount with --read-only",
            )
        else:
            refuse_layer(beside)
            scratch = _scratch(beside, ephemeral)
    return MountSpec(
        layers=found,
        mountpoint=mountpoint.resolve(os.fspath(target)),
        upper=os.path.abspath(upper) if upper else None,
        work=os.path.abspath(work) if work else None,
        scratch=scratch,
        ephemeral=ephemeral,
        memory=memory,
        readonly=readonly,
        size=None if size is None else parse_size(size, least=SMALLEST_LIMIT),
        inodes=None if inodes is None else parse_count(inodes),
        options=tuple(words),
        **more,
    )


def _scratch(beside: str, ephemeral: bool) -> str:
    """``LAYERS/.cowfs``; for an ephemeral upper the temporary directory if the layers' is not writable."""
    scratch = os.path.join(beside, HIDDEN)
    if ephemeral and not os.access(scratch if os.path.isdir(scratch) else beside, os.W_OK | os.X_OK):
        import tempfile

        return os.path.join(tempfile.gettempdir(), f"cowfs-ephemeral-{os.geteuid()}")
    return scratch


def block_size(text: str | int) -> int:
    """Bytes a block of new redirect files. Raises InvalidArgument unless it is a power of two from 4 KiB to 1 MiB."""
    from cowfs.format.redirect import check_block

    size = parse_size(text)
    try:
        check_block(size)
    except ValueError as error:
        raise InvalidArgument(f"row={text}: {error}") from None
    return size
