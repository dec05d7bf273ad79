"""Finding drivers: by entry point, group ``cowfs.drivers``, and by nothing else.

A package adds a driver with two lines of its pyproject.toml::

    [project.entry-points."cowfs.drivers"]
    mine = "my_package.module:MyDriver"
"""

from __future__ import annotations

from importlib import import_module

from cowfs._typed import TYPE_CHECKING
from cowfs.driver.interface import Driver, Probe
from cowfs.errors import NotFound, Unsupported

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "choose", "load", "names", "where"]

GROUP = "cowfs.drivers"
DISTRIBUTION = "cowfs-storage"
"""cowfs's own, as pyproject.toml names it."""

OWN = "cowfs_drivers."
"""The package that cowfs's own drivers are in; nothing else is imported because a store names it."""


def _points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP)}


def _point(name: str) -> EntryPoint | None:
    """The entry point of a name. cowfs's own distribution comes first, since a search through all distributions takes 40 ms."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        for point in distribution(DISTRIBUTION).entry_points:
            if point.group == GROUP and point.name == name:
                return point
    except PackageNotFoundError:
        pass
    return _points().get(name)


def names() -> list[str]:
    """The drivers that are installed."""
    return sorted(_points())


def where(found: type[Driver]) -> str:
    """The value of an entry point for a class; a store keeps it beside the driver's name."""
    return f"{found.__module__}:{found.__qualname__}"


def load(name: str, known: str | None = None) -> type[Driver]:
    """The class of a driver.

    Args:
        known: an earlier result of :func:`where`: importing cowfs's own drivers by it spares the search through the
            installed distributions, which takes longer than most verbs. If it is no longer true, the entry points
            decide.

    Raises:
        NotFound: no such driver is installed.
        Unsupported: it is, but cannot be imported.
    """
    if known is not None and known.startswith(OWN):
        module, _, qualname = known.partition(":")
        try:
            found = getattr(import_module(module), qualname)
        except (ImportError, AttributeError):
            pass
        else:
            if isinstance(found, type) and issubclass(found, Driver) and found.name == name:
                return found
    point = _point(name)
    if point is None:
        raise NotFound(f"no driver {name!r}", remedy=f"installed are: {', '.join(names()) or 'none'}")
    try:
        found = point.load()
    except Exception as error:
        raise Unsupported(f"the driver {name} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Driver)):
        raise Unsupported(f"the driver {name} ({point.value}) is not a cowfs.driver.interface.Driver")
    return found


def choose(root: str) -> tuple[type[Driver], dict[str, Probe]]:
    """The best driver that can run below ``root``, and the answer of each one.

    Raises:
        Unsupported: none can; the message says why, driver by driver.
    """
    probes: dict[str, Probe] = {}
    classes: dict[str, type[Driver]] = {}
    for name, point in sorted(_points().items()):
        try:
            classes[name] = load(name, point.value)
            probes[name] = classes[name].probe(root)
        except Unsupported as error:
            probes[name] = Probe(usable=False, reasons=(str(error),))
    usable = [name for name, probe in probes.items() if probe.usable]
    if not usable:
        told = "; ".join(f"{name}: {', '.join(probe.reasons)}" for name, probe in probes.items())
        raise Unsupported(f"no driver can run here: {told or 'none is installed'}", remedy="pip install cowfs")
    best = max(usable, key=lambda name: (probes[name].rank, name))
    return classes[best], probes
