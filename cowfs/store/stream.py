"""Snapshots as a stream, for a pipe between two stores: the format, without any store.

Format. Numbers are little endian. Header ``<8sHH``: magic, version, 0. Then frames ``<cI`` kind, length, payload:

=====  =============================================================================================
``N``  JSON: a snapshot begins: its ``name``, ``layers`` bottom first (``name``, ``diff_id``, ``labels``), ``config``
``L``  JSON: a layer begins: ``at``, its place in that list; ``form``: ``tar`` or ``blocks``; ``size``, bytes, about
``D``  data of the layer, at most 1 MiB
``E``  the layer ends: SHA-256 of its data
``C``  the snapshot is complete
``Z``  the end: SHA-256 of all bytes before this frame
=====  =============================================================================================

The answers of a receiver, in a stream of the other direction with the same header:

=====  =============================================================================================
``H``  JSON: ``have``: how many layers of the snapshot it has, from the bottom
``R``  JSON: ``copied``: names of the layers that were new to it; the last frame
=====  =============================================================================================

A ``tar`` is the layer's archive (OCI image-spec, layer.md), ``blocks`` a block-level difference from the layer beneath
(:mod:`cowfs.diff.blocks`). The diff id verifies a layer of either form.

Hostile input: frames are bounded, their order is checked, and JSON is bounded in size and depth.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping

from cowfs._typed import Any, BinaryIO
from cowfs.errors import Corrupt, InvalidArgument

__all__ = ["CHUNK", "MAGIC", "LayerIn", "LayerOut", "StreamIn", "StreamOut"]

MAGIC = b"COWFSSND"
VERSION = 1
CHUNK = 1 << 20
MAX_DOCUMENT = 16 << 20
"""Bytes of a JSON frame: a chain of 500 layers with labels and an image's configuration."""
_HEADER = struct.Struct("<8sHH")
_FRAME = struct.Struct("<cI")
_MOST = {b"N": MAX_DOCUMENT, b"L": 1 << 16, b"D": CHUNK, b"E": 32, b"C": 0, b"Z": 32, b"H": 1 << 16, b"R": MAX_DOCUMENT}


class StreamOut:
    """Frames into a pipe.

    Args:
        pipe: is flushed whenever the other side waits.
    """

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._digest = hashlib.sha256()
        self._write(_HEADER.pack(MAGIC, VERSION, 0))

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._pipe.write(data)

    def frame(self, kind: bytes, payload: bytes = b"") -> None:
        """Write one frame."""
        self._write(_FRAME.pack(kind, len(payload)))
        self._write(payload)

    def document(self, kind: bytes, told: Mapping[str, Any]) -> None:
        """Write a frame of JSON, and flush it.

        Raises:
            InvalidArgument: it is too large for a receiver.
        """
        payload = json.dumps(told, separators=(",", ":")).encode()
        if len(payload) > _MOST[kind]:
            raise InvalidArgument(
                f"labels and configuration have {len(payload):,} bytes, a stream takes {_MOST[kind]:,}"
            )
        self.frame(kind, payload)
        self._pipe.flush()

    def end(self) -> None:
        """Write the last frame."""
        self.frame(b"Z", self._digest.digest())
        self._pipe.flush()


class LayerOut(io.RawIOBase):
    """The data of one layer, as a file to write into; :meth:`finish` ends it.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: StreamOut) -> None:
        super().__init__()
        self._stream = stream
        self._digest = hashlib.sha256()
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._waiting += data
        while len(self._waiting) >= CHUNK:
            self._send(bytes(self._waiting[:CHUNK]))
            del self._waiting[:CHUNK]
        return len(data)

    def _send(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._stream.frame(b"D", piece)

    def finish(self) -> None:
        """Write the buffered data, and the end of the layer."""
        if self._waiting:
            self._send(bytes(self._waiting))
            self._waiting.clear()
        self._stream.frame(b"E", self._digest.digest())


class StreamIn:
    """Frames out of a pipe.

    Raises:
        InvalidArgument: no such stream, or one of an unknown version.
        Corrupt: it is cut short or damaged.
    """

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._digest = hashlib.sha256()
        magic, version, _ = _HEADER.unpack(self._take(_HEADER.size))
        if magic != MAGIC:
            raise InvalidArgument("this is no stream of snapshots", remedy="'cowfs send' makes one")
        if version != VERSION:
            raise InvalidArgument(
                f"a stream of snapshots of version {version}, this cowfs knows {VERSION}",
                remedy="upgrade the older one",
            )

    def _take(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._pipe.read(count)
            if not part:
                raise Corrupt(
                    "the stream of snapshots is cut short", remedy="send it again: layers that came whole stay"
                )
            parts.append(part)
            count -= len(part)
        data = b"".join(parts)
        self._digest.update(data)
        return data

    def next(self, wanted: bytes) -> tuple[bytes, bytes]:
        """The next frame, whose kind must be one of ``wanted``: (kind, payload). ``Z`` is checked here.

        Raises:
            Corrupt: another kind, an overlong frame, or a wrong digest at the end.
        """
        before = self._digest.digest() if b"Z" in wanted else b""
        kind, length = _FRAME.unpack(self._take(_FRAME.size))
        if kind not in _MOST or kind not in wanted or length > _MOST[kind]:
            raise Corrupt(f"the stream of snapshots holds a frame {kind!r} of {length} bytes where it cannot be")
        payload = self._take(length)
        if kind == b"Z" and payload != before:
            raise Corrupt("the stream of snapshots has another digest than it says")
        return kind, payload

    def document(self, payload: bytes) -> dict[str, Any]:
        """The JSON of a frame.

        Raises:
            Corrupt: it is malformed, or no object.
        """
        try:
            found = json.loads(payload)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Corrupt("the stream of snapshots holds a damaged record")
        return found


class LayerIn(io.RawIOBase):
    """The data of one layer, as a file to read.

    Args:
        stream: stands behind the frame ``L``.
    """

    def __init__(self, stream: StreamIn) -> None:
        super().__init__()
        self._stream = stream
        self._digest = hashlib.sha256()
        self._left = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left and not self._fill():
            return 0
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _fill(self) -> bool:
        if self._ended:
            return False
        kind, payload = self._stream.next(b"DE")
        if kind == b"E":
            if payload != self._digest.digest():
                raise Corrupt("a layer in the stream of snapshots has another digest than it says")
            self._ended = True
            return False
        self._digest.update(payload)
        if not payload:
            raise Corrupt("the stream of snapshots holds an empty piece of data")
        self._left = memoryview(payload)
        return True

    def finish(self) -> None:
        """Read to the end, which compares all of it with its digest."""
        self._left = memoryview(b"")
        while self._fill():
            pass
