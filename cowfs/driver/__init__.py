"""Backends: :mod:`interface` has the interface of a driver with an essay, :mod:`registry` finds the installed drivers."""

from cowfs._lazy import exports
from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.driver.interface import (
        Capabilities as Capabilities,
        Changes as Changes,
        Driver as Driver,
        Probe as Probe,
        copy_tree as copy_tree,
    )
    from cowfs.driver.plan import MountPlan as MountPlan

_EXPORTS = {
    "Capabilities": "cowfs.driver.interface",
    "Changes": "cowfs.driver.interface",
    "Driver": "cowfs.driver.interface",
    "MountPlan": "cowfs.driver.plan",
    "Probe": "cowfs.driver.interface",
    "copy_tree": "cowfs.driver.interface",
}

__all__ = sorted(_EXPORTS)

__getattr__ = exports(__name__, _EXPORTS)
