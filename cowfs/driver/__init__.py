"""Backends: :mod:`interface` says in an essay what a driver is, :mod:`registry` finds those that are installed."""

from typing import TYPE_CHECKING

from cowfs._lazy import exports

if TYPE_CHECKING:
    from cowfs.driver.interface import Driver as Driver, Probe as Probe

_EXPORTS = {"Driver": "cowfs.driver.interface", "Probe": "cowfs.driver.interface"}

__all__ = sorted(_EXPORTS)

__getattr__ = exports(__name__, _EXPORTS)
