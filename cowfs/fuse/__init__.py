"""The FUSE front end: a merged view, served to the kernel.

Reading order: :mod:`abi` (the wire's constants), :mod:`codec` (bytes in, bytes out), :mod:`handshake` (INIT),
:mod:`handlers` (an operation each), :mod:`loop`, :mod:`deferred`, :mod:`workers` and :mod:`notify` (its threads),
:mod:`device` (mounting). :mod:`handlers.passthrough` and :mod:`portable` are two other ways to serve the same view.

Words: a **node id** names a node towards the kernel until it is forgotten; the **look-up count** is the number of times
that the kernel was handed the id, **forget** lowers it; a **negative entry** is a name known not to be there;
**unique** is the number of a request, which its reply repeats.
"""

from cowfs.fuse.device import mount_fuse
from cowfs.fuse.loop import Session, SessionOptions

__all__ = ["Session", "SessionOptions", "mount_fuse"]
