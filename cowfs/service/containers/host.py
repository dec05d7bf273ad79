"""The daemon as its containers see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cowfs.service.images import Images
    from cowfs.service.volumes import Volumes
    from cowfs.store import Store

__all__ = ["Host"]


class Host(Protocol):
    """The daemon, as far as :class:`~cowfs.service.containers.manager.Containers` asks it; see :class:`cowfs.service.shared.Service`.

    Attributes:
        store: open.
        folder: where records are kept. run_dir: where sockets and bundles are.
        default_limit: ``size`` and ``inodes`` of a container that asks for none, as text.
    """

    store: Store
    folder: str
    run_dir: str
    default_limit: dict[str, str]
    images: Images
    volumes: Volumes

    def runtime_program(self) -> str: ...
