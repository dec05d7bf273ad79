"""Limits of a container's control groups: Docker's words become the runtime's (OCI runtime-spec, config-linux.md)."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

from cowfs.service.errors import ApiError

__all__ = ["check_limits", "is_unified", "resources"]

_RATES = (
    ("throttleReadBpsDevice", "BlkioDeviceReadBps"), ("throttleWriteBpsDevice", "BlkioDeviceWriteBps"),
    ("throttleReadIOPSDevice", "BlkioDeviceReadIOps"), ("throttleWriteIOPSDevice", "BlkioDeviceWriteIOps"),
)  # fmt: skip
_MEMORY = (("limit", "Memory"), ("swap", "MemorySwap"), ("reservation", "MemoryReservation"))
_CPU = (
    ("shares", "CpuShares"), ("period", "CpuPeriod"), ("quota", "CpuQuota"), ("cpus", "CpusetCpus"), ("mems", "CpusetMems"),
)  # fmt: skip


def is_unified() -> bool:
    """Whether the host has control groups of version 2 alone (cgroups(7))."""
    return os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def check_limits(host: Mapping[str, Any]) -> None:
    """Refuse what cannot be a limit.

    Raises:
        ApiError: 400.
    """
    if host.get("Memory") and host["Memory"] < 6 << 20:
        raise ApiError(400, "Minimum memory limit allowed is 6MB")
    if host.get("BlkioWeight") and not 10 <= host["BlkioWeight"] <= 1000:
        raise ApiError(400, "Range of blkio weight is from 10 to 1000")
    swappiness = host.get("MemorySwappiness")
    if swappiness is not None and not -1 <= swappiness <= 100:
        raise ApiError(400, f"Invalid value: {swappiness}, valid memory swappiness range is 0-100")
    resources(host)


def resources(host: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime's form of limits, of a container's host configuration or of an update.

    Raises:
        ApiError: 400: a block device is none.
    """
    made: dict[str, Any] = {}
    memory = {key: host[name] for key, name in _MEMORY if host.get(name)}
    if host.get("MemorySwappiness") not in (None, -1):
        memory["swappiness"] = host["MemorySwappiness"]
    if host.get("OomKillDisable"):
        memory["disableOOMKiller"] = True
    if memory:
        made["memory"] = memory
    cpu: dict[str, Any] = {}
    if host.get("NanoCpus"):
        cpu |= {"period": 100_000, "quota": host["NanoCpus"] // 10_000}
    cpu |= {key: host[name] for key, name in _CPU if host.get(name)}
    if cpu:
        made["cpu"] = cpu
    if host.get("PidsLimit"):
        made["pids"] = {"limit": host["PidsLimit"]}
    block = _block(host)
    if block:
        made["blockIO"] = block
    return made


def _block(host: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"weight": host["BlkioWeight"]} if host.get("BlkioWeight") else {}
    if host.get("BlkioWeightDevice"):
        made["weightDevice"] = [
            {**_numbers(each["Path"]), "weight": each["Weight"]} for each in host["BlkioWeightDevice"]
        ]
    for key, name in _RATES:
        if host.get(name):
            made[key] = [{**_numbers(each["Path"]), "rate": each["Rate"]} for each in host[name]]
    return made


def _numbers(path: str) -> dict[str, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise ApiError(400, f"invalid block device {path!r}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISBLK(found.st_mode):
        raise ApiError(400, f"invalid block device {path!r}: it is none")
    return {"major": os.major(found.st_rdev), "minor": os.minor(found.st_rdev)}
