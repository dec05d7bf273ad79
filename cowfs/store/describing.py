"""The store itself: its driver and host, its totals, and its quarantine."""

from __future__ import annotations

import os

from cowfs._typed import TYPE_CHECKING
from cowfs.driver import registry
from cowfs.driver.interface import Driver
from cowfs.errors import Unsupported
from cowfs.store import kernel_image, limit_loop
from cowfs.store.limit_image import KINDS
from cowfs.store.totals import Totals, sum_up
from cowfs.sys import host

if TYPE_CHECKING:
    from cowfs.store.context import Context

__all__ = ["Describing"]


class Describing:
    """Descriptions of the store, which change nothing."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def totals(self) -> Totals:
        """As :meth:`cowfs.Store.totals`."""
        return sum_up(self.context.root, self.context.index)

    def quarantined(self) -> list[tuple[str, str]]:
        """As :meth:`cowfs.Store.quarantined`."""
        return [(row.name, row.damage or "") for row in self.context.index.damaged()]

    def describe(self) -> dict[str, str]:
        """As :meth:`cowfs.Store.describe`."""
        from cowfs.model import Limit
        from cowfs.sys import files, project_quota

        fd = os.open(self.context.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            host = files.fs_name(fd)
            why_no_projects = project_quota.why_not(fd)
        finally:
            os.close(fd)
        told = {
            "root": self.context.root,
            "driver": self.context.driver.name,
            "why": self._why_this_driver(),
            "form": self.context.driver.form.name,
            "host": host,
            "uuid": self.context.index.meta("uuid") or "",
            "mounts": "fuse.cowfs (cowfs's own server)",
        }
        can = self.context.driver.capabilities
        if can.whole:
            told["copies"] = "share extents with the parent" if can.reflink else "take the room of their data"
        below = ["below"] if not can.whole else []
        sample = self.context.driver.mounts("sample", below, limit=Limit())[0]
        told["records"] = sample.type
        plan = self.context.driver.plan("sample", below)
        told["engines"] = kernel_image.how_for_engines(self.context.driver, plan.why_not_kernel)
        told["kernel mounts"] = kernel_image.how(self.context.driver)
        told["limits"] = _limits(self.context.driver)
        told["project quotas"] = f"no ({why_no_projects})" if why_no_projects else "yes (no engine of limits uses them)"
        told["runs"] = self._runs()
        told |= self.context.driver.explain()
        return told

    def _why_this_driver(self) -> str:
        try:
            return "; ".join(self.context.driver.probe(self.context.root).reasons)
        except OSError as error:
            return f"cannot be tried now: {error.strerror}"

    def alternatives(self, *, possible: bool = True) -> dict[str, str]:
        """As :meth:`cowfs.Store.alternatives`."""
        return self.other_drivers()[not possible]

    def other_drivers(self) -> tuple[dict[str, str], dict[str, str]]:
        """As :meth:`cowfs.Store.other_drivers`."""
        found: tuple[dict[str, str], dict[str, str]] = ({}, {})
        try:
            probes = registry.choose(self.context.root)[1]
        except (OSError, Unsupported):
            return found
        for name, probe in sorted(probes.items()):
            if name != self.context.driver.name:
                found[not probe.usable][name] = "; ".join(probe.reasons)
        return found

    def _runs(self) -> str:
        """Which mounts ``cowfs run`` has here as this user, for people."""
        if host.has_cap(host.CAP_SYS_ADMIN):
            return "cowfs's own server; with --mount-type kernel the kernel's overlayfs"
        from cowfs.store.doctor import why_no_overlay

        why = why_no_overlay(self.context.root)
        if why:
            return f"cowfs's own server ({why})"
        return "the kernel's overlayfs in a user namespace; with a limit cowfs's own server"


def _limits(driver: Driver) -> str:
    """The engines for limits on this host, for people."""
    if driver.capabilities.own_limit:
        return "the driver's own, whoever mounts"
    whys = {kind: limit_loop.why_not(driver, kind) for kind in KINDS.values()}
    if all(whys.values()):
        return f"cowfs's own server; kernel mounts: none, {next(iter(whys.values()))}"
    told = [f"{kind.name} ({why or kind.engine})" for kind, why in whys.items()]
    return f"cowfs's own server; kernel mounts: an image of the limit's size, {', '.join(told)}"
