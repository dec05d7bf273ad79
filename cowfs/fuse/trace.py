"""One line a request, for --trace: its number, the request, the answer, and its time in microseconds."""

from __future__ import annotations

import errno
import time

from cowfs._typed import TYPE_CHECKING, TextIO
from cowfs.fuse import abi, codec

if TYPE_CHECKING:
    from cowfs.fuse.handlers.names import Handler

__all__ = ["traced"]


def traced(handler: Handler, trace: TextIO, *, setxattr_ext: bool) -> Handler:
    """Wrap a handler so that it writes a line for each request.

    Args:
        setxattr_ext: SETXATTR has the longer form (FUSE_SETXATTR_EXT was agreed on).
    """

    def write_line(buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        what = codec.describe(buf[:n], setxattr_ext=setxattr_ext)
        start = time.perf_counter_ns()
        result = "later"
        try:
            reply = handler(buf, n, unique, nodeid)
            if reply is not None:
                size = len(reply) if isinstance(reply, bytes) else sum(map(len, reply))
                code = -abi.OUT_HEADER.unpack_from(reply if isinstance(reply, bytes) else reply[0])[1]
                result = errno.errorcode.get(code, str(code)) if code else f"ok {size - 16}"
            elif abi.HEAD.unpack_from(buf)[1] in abi.NO_REPLY:
                result = "-"
            return reply
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise
        except Exception as error:
            result = f"{type(error).__name__} -> EIO"
            raise
        finally:
            spent = (time.perf_counter_ns() - start) // 1000
            trace.write(f"{unique} {what} = {result} {spent}us\n")

    return write_line
