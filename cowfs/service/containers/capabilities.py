"""The capabilities of root in a container: Docker's list, as ``--cap-add``, ``--cap-drop`` and ``--privileged`` change it (capabilities(7))."""

from __future__ import annotations

import functools

from cowfs.service.containers.records import HostConfig
from cowfs.service.errors import ApiError

__all__ = ["ALL", "DEFAULT", "granted", "possible"]

ALL = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
"""By number (include/uapi/linux/capability.h)."""

DEFAULT = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
)  # fmt: skip
"""The capabilities of root in a container without options."""


@functools.cache
def possible() -> tuple[str, ...]:
    """The capabilities that this process can give: those in its bounding set. A daemon in a container has not all of them."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        bounding = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return tuple(name for number, name in enumerate(ALL) if bounding >> number & 1)


def granted(host: HostConfig) -> list[str]:
    """The capabilities of a container. ``ALL`` means what can be given; one that is named is asked of the runtime in any case.

    Raises:
        ApiError: 400: there is no such capability.
    """
    if host.Privileged:
        return list(possible())
    added, dropped = _names("CapAdd", host.CapAdd), _names("CapDrop", host.CapDrop)
    left = () if "ALL" in map(str.upper, host.CapDrop or ()) else DEFAULT
    return sorted((set(left) - set(dropped)) | set(added))


def _names(option: str, values: list[str] | None) -> list[str]:
    found: list[str] = []
    for value in values or ():
        name = value.upper()
        if name == "ALL":
            found += possible()
            continue
        name = name if name.startswith("CAP_") else f"CAP_{name}"
        if name not in ALL:
            raise ApiError(400, f'invalid {option}: unknown capability: "{name}"')
        found.append(name)
    return found
