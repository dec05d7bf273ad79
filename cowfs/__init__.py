"""Copy-on-write root filesystems: stacks of layers, mounted as one tree with a size limit that holds.

>>> import cowfs
>>> with cowfs.mount(["layers/base", "layers/python"], "/mnt/rootfs", size="2G") as m:  # doctest: +SKIP
...     m.usage(), m.limit(), list(m.diff())

Strategy: importing the package costs nothing. Every public name is imported from its module on first use
(PEP 562), so that the command, which must mount within 200 ms with Python's own start, pays only for what it uses.
"""

from __future__ import annotations

__version__ = "0.1.0"

# Public name -> module that defines it. One table, used by __getattr__, __dir__ and the tests.
_EXPORTS = {
    "AlreadyExists": "cowfs.errors",
    "Corrupt": "cowfs.errors",
    "CowfsError": "cowfs.errors",
    "FailedPrecondition": "cowfs.errors",
    "InvalidArgument": "cowfs.errors",
    "LimitExceeded": "cowfs.errors",
    "NotFound": "cowfs.errors",
    "Unsupported": "cowfs.errors",
    "Change": "cowfs.model",
    "Event": "cowfs.model",
    "FileInfo": "cowfs.model",
    "Info": "cowfs.model",
    "Kind": "cowfs.model",
    "Limit": "cowfs.model",
    "Mount": "cowfs.model",
    "Usage": "cowfs.model",
    "MountHandle": "cowfs.mounting.client",
    "MountStatus": "cowfs.mounting.client",
    "RunResult": "cowfs.store.running",
    "Store": "cowfs.store",
    "run": "cowfs.store.shortcuts",
    "Options": "cowfs.union",
    "View": "cowfs.row.view",
    "Paths": "cowfs.union.paths",
    "attach": "cowfs.mounting.client",
    "mount": "cowfs.mounting.client",
    "mounts": "cowfs.mounting.client",
    "umount": "cowfs.mounting.client",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cowfs.errors import (
        AlreadyExists as AlreadyExists,
        Corrupt as Corrupt,
        CowfsError as CowfsError,
        FailedPrecondition as FailedPrecondition,
        InvalidArgument as InvalidArgument,
        LimitExceeded as LimitExceeded,
        NotFound as NotFound,
        Unsupported as Unsupported,
    )
    from cowfs.model import (
        Change as Change,
        Event as Event,
        FileInfo as FileInfo,
        Info as Info,
        Kind as Kind,
        Limit as Limit,
        Mount as Mount,
        Usage as Usage,
    )
    from cowfs.mounting.client import (
        MountHandle as MountHandle,
        MountStatus as MountStatus,
        attach as attach,
        mount as mount,
        mounts as mounts,
        umount as umount,
    )
    from cowfs.row.view import View as View
    from cowfs.store import Store as Store
    from cowfs.store.running import RunResult as RunResult
    from cowfs.store.shortcuts import run as run
    from cowfs.union import Options as Options
    from cowfs.union.paths import Paths as Paths


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'cowfs' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
