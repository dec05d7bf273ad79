"""Limits of a container's control groups: Docker's words become the runtime's (OCI runtime-spec, config-linux.md)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Any

from cowfs.service.containers.cgroups import is_unified, place
from cowfs.service.errors import ApiError

__all__ = ["check_limits", "discarded", "is_unified", "possible_resources", "resources"]

_RATES = (
    ("throttleReadBpsDevice", "BlkioDeviceReadBps"), ("throttleWriteBpsDevice", "BlkioDeviceWriteBps"),
    ("throttleReadIOPSDevice", "BlkioDeviceReadIOps"), ("throttleWriteIOPSDevice", "BlkioDeviceWriteIOps"),
)  # fmt: skip
_MEMORY = (("limit", "Memory"), ("swap", "MemorySwap"), ("reservation", "MemoryReservation"))
_CPU = (
    ("shares", "CpuShares"), ("period", "CpuPeriod"), ("quota", "CpuQuota"), ("cpus", "CpusetCpus"), ("mems", "CpusetMems"),
)  # fmt: skip


def check_limits(host: Mapping[str, Any], *, changing: bool = False) -> None:
    """Refuse what cannot be a limit: the rules and words of dockerd, so that nothing fails at the start or halfway through a change.

    Args:
        host: of a container's host configuration, or the changed ones alone (``changing``).

    Raises:
        ApiError: 400.
    """
    rules = (*_memory_rules(host, changing=changing), *_cpu_rules(host), *_other_rules(host))
    for is_broken, sentence in rules:
        if is_broken:
            raise ApiError(400, sentence)
    for name, of in (("CpusetCpus", "cpus"), ("CpusetMems", "mems")):
        if host.get(name):
            _check_set(host[name], of)
    resources(host)


Rules = tuple[tuple[bool, str], ...]


def _memory_rules(host: Mapping[str, Any], *, changing: bool) -> Rules:
    memory, swap, reserved = (host.get(name) or 0 for _, name in _MEMORY)
    swappiness = host.get("MemorySwappiness")
    return (
        (memory != 0 and memory < 6 << 20, "Minimum memory limit allowed is 6MB"),
        (0 < swap < memory, "Minimum memoryswap limit should be larger than memory limit, see usage"),
        (
            memory == 0 and swap > 0 and not changing,
            "You should always set the Memory limit when using Memoryswap limit, see usage",
        ),
        (swap < -1, f"Invalid value: {swap}, a memoryswap limit is -1 or more"),
        (reserved != 0 and reserved < 6 << 20, "Minimum memory reservation allowed is 6MB"),
        (
            0 < memory < reserved,
            "Minimum memory limit can not be less than memory reservation limit, see usage",
        ),
        (
            swappiness is not None and not -1 <= swappiness <= 100,
            f"Invalid value: {swappiness}, valid memory swappiness range is 0-100",
        ),
    )


def _cpu_rules(host: Mapping[str, Any]) -> Rules:
    nano, period, quota, shares = (host.get(name) or 0 for name in ("NanoCpus", "CpuPeriod", "CpuQuota", "CpuShares"))
    count = os.cpu_count() or 1
    return (
        (bool(nano and period), "Conflicting options: Nano CPUs and CPU Period cannot both be set."),
        (bool(nano and quota), "Conflicting options: Nano CPUs and CPU Quota cannot both be set."),
        (
            not 0 <= nano <= count * 10**9,
            f"Range of CPUs is from 0.01 to {count}.00, as there are only {count} CPUs available",
        ),
        (
            period != 0 and not 1000 <= period <= 1_000_000,
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)",
        ),
        (0 < quota < 1000, "CPU cfs quota can not be less than 1ms (i.e. 1000)"),
        # the kernel's bounds: tg_set_cfs_bandwidth() and sched_group_set_shares() of kernel/sched
        (quota > 1 << 43, "CPU cfs quota is too large"),
        (shares != 0 and not 2 <= shares <= 1 << 18, f"invalid CPU shares ({shares}): from 2 to 262144 are possible"),
    )


def _other_rules(host: Mapping[str, Any]) -> Rules:
    weight, score = host.get("BlkioWeight") or 0, host.get("OomScoreAdj") or 0
    return (
        (weight != 0 and not 10 <= weight <= 1000, "Range of blkio weight is from 10 to 1000"),
        (not -1000 <= score <= 1000, f"Invalid value {score}, range for oom score adj is [-1000, 1000]"),
        ((host.get("ShmSize") or 0) < 0, "SHM size can not be less than 0"),
    )


_SETS = {
    "cpus": ("CPUs", "/sys/devices/system/cpu/online"), "mems": ("memory nodes", "/sys/devices/system/node/online"),
}  # fmt: skip


def _check_set(text: str, of: str) -> None:
    """Raises ApiError, 400: a set of processors or memory nodes (cpuset(7), "List format") is malformed, or the host has no such."""
    name, path = _SETS[of]
    asked = _numbers_of(text)
    if asked is None:
        raise ApiError(400, f"Invalid value {text[:100]} for cpuset {of}")
    try:
        with open(path, encoding="utf-8") as file:
            available = file.read().strip()
    except FileNotFoundError:  # a kernel without NUMA
        available = "0"
    has = [range(first, last + 1) for first, last in _numbers_of(available) or ()]
    if not all(any(first in some and last in some for some in has) for first, last in asked):
        raise ApiError(400, f"Requested {name} are not available - requested {text[:100]}, available: {available}")


def _numbers_of(text: str) -> list[tuple[int, int]] | None:
    """The ranges of ``0-3,7``, first and last; None where it is malformed."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:-([0-9]{1,6}))?\s*", word)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            return None
        found.append((int(match[1]), int(match[2] or match[1])))
    return found


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
        if any(each["Rate"] < 0 for each in host.get(name) or ()):
            raise ApiError(400, f"{name} has a negative rate")
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


_LIMITED_BY = {"memory": "memory", "cpu": "cpu", "pids": "pids", "blockIO": "io"}
_SENTENCES = {"memory": "memory", "cpu": "processor", "pids": "process", "blockIO": "block I/O"}


def possible_resources(host: Mapping[str, Any]) -> dict[str, Any]:
    """The same without those that no control group of this daemon can hold."""
    return {key: value for key, value in resources(host).items() if _LIMITED_BY[key] in place().controllers}


def discarded(host: Mapping[str, Any]) -> list[str]:
    """A sentence, as dockerd has them, for each kind of limit that no control group of this daemon can hold."""
    lost = resources(host).keys() - possible_resources(host).keys()
    return [
        f"{_SENTENCES[key]} limits are not possible here: no control group with them is delegated to this user. Limitation discarded."
        for key in sorted(lost)
    ]
