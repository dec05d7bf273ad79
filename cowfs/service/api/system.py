"""Routes about the daemon and the host: ping, version, info, events."""

from __future__ import annotations

import os
import platform
import socket
import time
from typing import TYPE_CHECKING

from cowfs import __version__
from cowfs.images.digests import platform_here
from cowfs.service import events
from cowfs.service.api.routing import MAX_VERSION, MIN_VERSION, Route, filters_of
from cowfs.service.containers.bundle import init_program
from cowfs.service.containers.cgroups import is_unified, place
from cowfs.service.http import Exchange, Reply, json_reply, lines
from cowfs.sys.files import fs_name

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES"]

_PING = {
    "api-version": MAX_VERSION,
    "docker-experimental": "false",
    "ostype": "linux",
    "builder-version": "",
    "swarm": "inactive",
    "cache-control": "no-cache, no-store, must-revalidate",
    "pragma": "no-cache",
}


def _ping(service: Service, exchange: Exchange) -> Reply:
    return Reply(headers=_PING, type="text/plain; charset=utf-8", body=b"OK")


def _version(service: Service, exchange: Exchange) -> Reply:
    kernel, arch = os.uname().release, platform_here()
    runtime = service.runtime_version()
    components = [
        {
            "Name": "Engine",
            "Version": __version__,
            "Details": {
                "ApiVersion": MAX_VERSION,
                "MinAPIVersion": MIN_VERSION,
                "Arch": arch,
                "Os": "linux",
                "KernelVersion": kernel,
                "Experimental": "false",
                "Python": platform.python_version(),
                "GoVersion": "none (Python)",
                "GitCommit": "",
                "BuildTime": "",
            },
        }
    ]
    if runtime:
        components.append({"Name": runtime[0], "Version": runtime[1], "Details": {"GitCommit": ""}})
    return json_reply(
        {
            "Platform": {"Name": "cowfs"},
            "Components": components,
            "Version": __version__,
            "ApiVersion": MAX_VERSION,
            "MinAPIVersion": MIN_VERSION,
            "GitCommit": "",
            "GoVersion": "none (Python)",
            "Os": "linux",
            "Arch": arch,
            "KernelVersion": kernel,
            "BuildTime": "",
        }
    )


def _backing(root: str) -> str:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return fs_name(fd)
    finally:
        os.close(fd)


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _info(service: Service, exchange: Exchange) -> Reply:
    store, options = service.store, service.options
    totals = store.totals()
    default = service.default_limit
    status = [
        ["Backing Filesystem", _backing(store.root)],
        ["Mount Engine", "cowfs FUSE server"],
        ["Limit Engine", "in the mount (bytes and inodes, changeable while mounted)"],
        ["Default Size", default.get("size", "unlimited")],
        ["Default Inodes", default.get("inodes", "unlimited")],
        ["Snapshots", str(sum(totals.count.values()))],
        ["Bytes in Committed Layers", str(totals.committed.bytes)],
        ["Host Free", str(totals.host_free)],
    ]
    if store.driver.capabilities.row:
        status.append(["Redirect Block", str(store.driver.capabilities.row)])
    states = service.containers.states()
    runtime = service.runtime_version()
    name = runtime[0] if runtime else "runc"
    limits = place().controllers
    return json_reply(
        {
            "ID": store.index.meta("uuid") or "",
            "Containers": sum(states.values()),
            "ContainersRunning": states.get("running", 0),
            "ContainersPaused": states.get("paused", 0),
            "ContainersStopped": sum(states.values()) - states.get("running", 0) - states.get("paused", 0),
            "Images": len(service.images.ids()),
            "Driver": store.driver.name,
            "DriverStatus": status,
            "Plugins": {"Volume": ["local"], "Network": ["host", "null"], "Authorization": None, "Log": ["json-file"]},
            "MemoryLimit": "memory" in limits,
            "SwapLimit": False,
            "CpuCfsPeriod": "cpu" in limits,
            "CpuCfsQuota": "cpu" in limits,
            "CPUShares": "cpu" in limits,
            "CPUSet": "cpuset" in limits,
            "PidsLimit": "pids" in limits,
            "IPv4Forwarding": True,
            "Debug": service.debug,
            "NFd": len(os.listdir("/proc/self/fd")),
            "OomKillDisable": False,
            "NGoroutines": service.thread_count(),
            "SystemTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "LoggingDriver": "json-file",
            "CgroupDriver": "cgroupfs" if place().parent else "none",
            "CgroupVersion": "2" if is_unified() else "1",
            "NEventsListener": events.listeners(),
            "KernelVersion": os.uname().release,
            "OperatingSystem": _operating_system(),
            "OSVersion": "",
            "OSType": "linux",
            "Architecture": os.uname().machine,
            "IndexServerAddress": "https://index.docker.io/v1/",
            "RegistryConfig": {
                "InsecureRegistryCIDRs": ["127.0.0.0/8", "::1/128"],
                "IndexConfigs": {
                    "docker.io": {
                        "Name": "docker.io", "Mirrors": list(options.registry_mirror), "Secure": True, "Official": True,
                    },
                    **{
                        host: {"Name": host, "Mirrors": [], "Secure": False, "Official": False}
                        for host in options.insecure_registry
                    },
                },
                "Mirrors": list(options.registry_mirror),
            },
            "NCPU": os.cpu_count() or 1,
            "MemTotal": _memory(),
            "GenericResources": None,
            "DockerRootDir": store.root,
            "HttpProxy": "",
            "HttpsProxy": "",
            "NoProxy": "",
            "Name": socket.gethostname(),
            "Labels": list(options.label),
            "ExperimentalBuild": False,
            "ServerVersion": __version__,
            "Runtimes": {name: {"path": runtime[2] if runtime else ""}},
            "DefaultRuntime": name,
            "Swarm": {
                "NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": False, "Error": "",
                "RemoteManagers": None,
            },
            "LiveRestoreEnabled": True,
            "Isolation": "",
            "InitBinary": os.path.basename(init_program()),
            "ContainerdCommit": {"ID": ""},
            "RuncCommit": {"ID": runtime[1] if runtime else ""},
            "InitCommit": {"ID": ""},
            "SecurityOptions": service.security_options(),
            "CDISpecDirs": [],
            "Warnings": service.warnings(),
        }
    )  # fmt: skip


def _events(service: Service, exchange: Exchange) -> Reply:
    wanted = events.Wanted(filters_of(exchange, events.FILTERS))
    since = events.when(exchange.query.get("since", ""), "since")
    until = events.when(exchange.query.get("until", ""), "until")
    return Reply(body=(b"".join(lines(some)) for some in events.follow(service.store, since, until, wanted)))


ROUTES = (
    Route("GET HEAD", "/_ping", _ping),
    Route("GET", "/version", _version),
    Route("GET", "/info", _info),
    Route("GET", "/events", _events),
)
