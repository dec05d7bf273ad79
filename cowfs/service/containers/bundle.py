"""The OCI bundle of a container: the runtime's configuration (OCI runtime-spec, config.md), from Docker's.

Impossible requests are refused before (:mod:`.checking`).
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from cowfs.errors import InvalidArgument
from cowfs.sandbox.users import User
from cowfs.service.containers import seccomp
from cowfs.service.containers.capabilities import granted, possible
from cowfs.service.containers.devices import nodes_and_rules
from cowfs.service.containers.limits import is_unified, possible_resources
from cowfs.service.containers.records import ContainerConfig, ExecConfig, HostConfig, TmpfsOptions, VolumeOptions
from cowfs.service.errors import ApiError, not_offered
from cowfs.service.images import Image
from cowfs.service.records import encode
from cowfs.sys.host import has_group

__all__ = [
    "bind_mounts",
    "exec_process",
    "hidden_paths",
    "init_program",
    "merge",
    "signal_number",
    "specification",
    "wanted_volumes",
]

INIT = "/dev/docker-init"
"""Where a container finds its init process: on a file system that is made for it, so that its tree does not change."""

TTY_GROUP = 5
"""The group of terminals in Debian and its like."""

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

MASKED = (
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def signal_number(text: str) -> int:
    """A signal's number from its name, with or without SIG, or its number.

    Raises:
        ApiError: 400: no such signal.
    """
    if text.isdecimal() and len(text) < 3 and 0 < int(text) < 65:
        return int(text)
    found = getattr(signal, "SIG" + text.upper().removeprefix("SIG"), None)
    if not isinstance(found, signal.Signals):
        raise ApiError(400, f"Invalid signal: {text}")
    return int(found)


def bind_mounts(host: HostConfig) -> list[dict[str, Any]]:
    """The runtime's form of ``-v``, ``--mount`` and ``--tmpfs``, and of whether a source is made if missing (``make``); without volumes.

    Raises:
        ApiError: a malformed volume or mount.
    """
    found: list[dict[str, Any]] = []
    for text in host.Binds or ():
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        if not source.startswith("/"):
            continue  # a volume
        found.append(_bind(source, target, [word for word in mode.split(",") if word], make=True))
    for each in host.Mounts or ():
        if each.Type == "bind":
            words = ["ro"] if each.ReadOnly else []
            propagation = each.BindOptions.Propagation if each.BindOptions else ""
            found.append(_bind(each.Source, each.Target, words + ([propagation] if propagation else []), make=False))
        elif each.Type == "tmpfs":
            options = each.TmpfsOptions or TmpfsOptions()
            if options.SizeBytes < 0 or not 0 <= options.Mode <= 0o7777:
                raise ApiError(400, f"invalid size or mode of the tmpfs at {each.Target!r}")
            words = [f"size={options.SizeBytes}"] if options.SizeBytes else []
            words += [f"mode={options.Mode:o}"] if options.Mode else []
            found.append(_tmpfs(each.Target, words + (["ro"] if each.ReadOnly else [])))
        elif each.Type != "volume":
            raise not_offered(f"mounts of type {each.Type}")
    for target, words_text in (host.Tmpfs or {}).items():
        found.append(_tmpfs(target, [word for word in words_text.split(",") if word]))
    return found


def wanted_volumes(host: HostConfig, plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The requested volumes: ``name`` ("" for one without a name), ``target``, ``readonly``, ``copy`` and ``labels``.

    Args:
        plain: targets that get a volume unless something else is mounted there: of ``-v /path``, and of the image's VOLUME.

    Raises:
        ApiError: a malformed volume or mount.
    """
    found: list[dict[str, Any]] = []
    for text in host.Binds or ():
        name, colon, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        if name.startswith("/"):
            continue
        if not colon:
            raise ApiError(400, f"invalid volume specification: '{text}'")
        words = [word for word in mode.split(",") if word]
        for word in words:
            if word not in ("ro", "rw", "z", "Z", "nocopy", *_PROPAGATIONS):
                raise ApiError(400, f"invalid mode: {word}")
        found.append(_volume(name, target, readonly="ro" in words, copy="nocopy" not in words))
    for each in host.Mounts or ():
        if each.Type == "volume":
            options = each.VolumeOptions or VolumeOptions()
            driver = options.DriverConfig
            if driver and (driver.Options or driver.Name not in ("", "local")):
                raise not_offered("volume drivers and their options")
            if options.Subpath:
                raise not_offered("a part of a volume (volume-subpath)")
            copy = not options.NoCopy
            found.append(
                _volume(each.Source, each.Target, readonly=each.ReadOnly, copy=copy, labels=options.Labels or {})
            )
    taken = {os.path.normpath(each["target"]) for each in found}
    taken |= {os.path.normpath(each["destination"]) for each in bind_mounts(host)}
    found += [_volume("", target) for target in sorted(plain) if os.path.normpath(target) not in taken]
    return found


def _volume(
    name: str, target: str, *, readonly: bool = False, copy: bool = True, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    _check_target(target)
    return {"name": name, "target": target, "readonly": readonly, "copy": copy, "labels": dict(labels or {})}


_PROPAGATIONS = ("rprivate", "private", "rshared", "shared", "rslave", "slave")


def _bind(source: str, target: str, words: list[str], *, make: bool) -> dict[str, Any]:
    for word in words:
        if word not in ("ro", "rw", "z", "Z", *_PROPAGATIONS):
            raise ApiError(400, f"invalid mode: {word}")
    _check_target(target)
    if not source.startswith("/"):
        raise ApiError(400, f"invalid mount path: {source!r} mount path must be absolute")
    propagation = next((word for word in words if word in _PROPAGATIONS), "rprivate")
    options = ["rbind", "ro" if "ro" in words else "rw", propagation]
    return {"destination": target, "type": "bind", "source": source, "options": options, "make": make}


def _tmpfs(target: str, words: list[str]) -> dict[str, Any]:
    _check_target(target)
    return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "noexec", *words]}


def _check_target(target: str) -> None:
    if not target.startswith("/") or os.path.normpath(target) == "/":
        raise ApiError(400, f"invalid mount path: {target!r} mount path must be absolute, and not the root")


def arguments_of(config: Mapping[str, Any]) -> list[str]:
    """The words of the command: entry point and arguments."""
    words: list[str] = []
    for key in ("Entrypoint", "Cmd"):
        value = config.get(key) or []
        words += [value] if isinstance(value, str) else value
    return words


def merge(config: ContainerConfig, image: Image) -> dict[str, Any]:
    """A request's configuration, completed by the image's, in the API's form."""
    base = image.run_config
    made: dict[str, Any] = {
        key: value for key, value in encode(config).items() if key not in ("HostConfig", "NetworkingConfig")
    }
    for key in ("Cmd", "Entrypoint"):
        if isinstance(made[key], str):
            made[key] = [made[key]]
    if made["Entrypoint"] is None:
        made["Entrypoint"] = base.get("Entrypoint")
        if not made["Cmd"]:
            made["Cmd"] = base.get("Cmd")
    elif made["Entrypoint"] == [""]:
        made["Entrypoint"] = None
    removed = [pair for pair in config.Env or () if "=" not in pair]
    asked = dict(pair.partition("=")[::2] for pair in config.Env or () if "=" in pair)
    pairs = asked | {
        key: value
        for key, value in (str(pair).partition("=")[::2] for pair in base.get("Env") or ())
        if key not in asked
    }
    made["Env"] = [f"{key}={value}" for key, value in pairs.items() if key not in removed]
    made["Labels"] = {**image.labels, **(config.Labels or {})}
    for key in ("User", "WorkingDir", "StopSignal"):
        made[key] = made[key] or base.get(key) or ""
    made["Healthcheck"] = _health(made["Healthcheck"], base.get("Healthcheck"))
    volumes = {**(base.get("Volumes") or {}), **(made["Volumes"] or {})}
    made["Volumes"] = volumes or None
    made["ExposedPorts"] = made["ExposedPorts"] or base.get("ExposedPorts")
    return made


def _health(asked: Mapping[str, Any] | None, base: Any) -> dict[str, Any] | None:
    """The check of request and image: missing fields of the request are the image's."""
    if not isinstance(base, dict) or (asked and asked.get("Test") == ["NONE"]):
        return dict(asked) if asked else None
    return {**base, **{key: value for key, value in (asked or {}).items() if value}}


def init_program() -> str:
    """A program that collects orphans and passes signals on, and needs no file of a container's tree; "" if there is none."""
    for name in ("docker-init", "tini-static", "tini"):
        found = shutil.which(name)
        if found and _is_static(found):
            return found
    return ""


@functools.cache
def _is_static(path: str) -> bool:
    """Whether an ELF program needs no loader: it has no PT_INTERP header (elf(5))."""
    with open(path, "rb") as file:
        head = file.read(65536)
    if head[:6] != b"\x7fELF\x02\x01":
        return False
    (start,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    return all(struct.unpack_from("<I", head, start + size * at)[0] != 3 for at in range(count))


def environment(config: Mapping[str, Any], hostname: str, home: str) -> list[str]:
    """The variables of a container's process."""
    pairs = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, **({"TERM": "xterm"} if config.get("Tty") else {})}
    for pair in config.get("Env") or ():
        key, equals, value = str(pair).partition("=")
        if equals:
            pairs[key] = value
        else:
            pairs.pop(key, None)
    pairs.setdefault("HOME", home)
    return [f"{key}={value}" for key, value in pairs.items()]


def specification(
    *,
    rootfs: str,
    config: Mapping[str, Any],
    host: HostConfig,
    raw_host: Mapping[str, Any],
    user: User,
    files: Mapping[str, str],
    volumes: Iterable[Mapping[str, Any]],
    hostname: str,
    cgroup: str,
) -> dict[str, Any]:
    """The document that the runtime reads.

    Args:
        rootfs: the mount point of the container's tree.
        config: merged of request and image. raw_host: ``host`` as it was sent.
        files: target in the container -> file of the host, bound over it (hosts, hostname, resolv.conf).
        volumes: further mounts, in the runtime's form.
        cgroup: its control group; "" for none.
    """
    capabilities = granted(host)
    process: dict[str, Any] = {
        "terminal": bool(config.get("Tty")),
        "user": _user(user),
        "args": [*([INIT, "--"] if host.Init else []), *arguments_of(config)],
        "env": environment(config, hostname, user.home),
        "cwd": config.get("WorkingDir") or "/",
        "capabilities": {
            "bounding": capabilities,
            "effective": capabilities if user.uid == 0 else [],
            "permitted": capabilities if user.uid == 0 else [],
        },
        "rlimits": [
            {"type": f"RLIMIT_{each.Name.upper()}", "soft": _unlimited(each.Soft), "hard": _unlimited(each.Hard)}
            for each in host.Ulimits or ()
        ],
        "noNewPrivileges": any(
            each.startswith("no-new-privileges") and not each.endswith("false") for each in host.SecurityOpt or ()
        ),
        "oomScoreAdj": host.OomScoreAdj,
    }
    if config.get("Tty") and host.ConsoleSize and len(host.ConsoleSize) == 2 and all(host.ConsoleSize):
        process["consoleSize"] = {"height": host.ConsoleSize[0], "width": host.ConsoleSize[1]}
    nodes, rules = nodes_and_rules(host)
    masked, readonly = hidden_paths(host)
    spec: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": rootfs, "readonly": host.ReadonlyRootfs},
        "mounts": _mounts(host, files, volumes),
        "linux": {
            "namespaces": _namespaces(host),
            "devices": nodes,
            "resources": {**possible_resources(raw_host), "devices": rules},
            "maskedPaths": masked,
            "readonlyPaths": readonly,
            "sysctl": dict(host.Sysctls or {}),
        },
    }
    if cgroup:
        spec["linux"]["cgroupsPath"] = cgroup
    if host.Annotations:
        spec["annotations"] = dict(host.Annotations)
    filtered = seccomp.filter_of(host.SecurityOpt or (), capabilities, privileged=host.Privileged)
    if filtered is not None:
        spec["linux"]["seccomp"] = filtered
    if host.UTSMode != "host":
        spec["hostname"] = hostname
        if config.get("Domainname"):
            spec["domainname"] = config["Domainname"]
    return spec


def hidden_paths(host: HostConfig) -> tuple[list[str], list[str]]:
    """The places in /proc and /sys that a container does not see, and those that it cannot write."""
    usual = ((), ()) if host.Privileged else (MASKED, READONLY)
    # --security-opt systempaths=unconfined asks for none
    masked = usual[0] if host.MaskedPaths is None else host.MaskedPaths
    return list(masked), list(usual[1] if host.ReadonlyPaths is None else host.ReadonlyPaths)


def _user(user: User) -> dict[str, Any]:
    # Its own group is named among the others, too: else a file that denies this group something would not (CVE-2022-36109).
    groups = list(dict.fromkeys([user.gid, *user.groups]))
    return {"uid": user.uid, "gid": user.gid, "additionalGids": groups}


def _unlimited(value: int) -> int:
    return (1 << 64) - 1 if value < 0 else value


def _namespaces(host: HostConfig) -> list[dict[str, str]]:
    found = ["mount"]
    found += ["pid"] if host.PidMode != "host" else []
    found += ["ipc"] if host.IpcMode != "host" else []
    found += ["uts"] if host.UTSMode != "host" else []
    found += ["network"] if host.NetworkMode != "host" else []
    found += ["cgroup"] if host.CgroupnsMode == "private" or (not host.CgroupnsMode and is_unified()) else []
    return [{"type": each} for each in found]


def _mounts(host: HostConfig, files: Mapping[str, str], volumes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    system_mode = "rw" if host.Privileged else "ro"
    plain: list[tuple[str, str, str, list[str]]] = [
        ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", f"gid={TTY_GROUP}"],
        ),
        ("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
        ("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777", f"size={host.ShmSize or 64 << 20}"]),
        ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", system_mode]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime", system_mode]),
    ]
    if host.NetworkMode == "host":  # sysfs belongs to a network namespace: the host's is bound
        plain = [each for each in plain if each[0] != "/sys"]
        plain.insert(5, ("/sys", "bind", "/sys", ["rbind", "nosuid", "noexec", "nodev", system_mode]))
    if not has_group(TTY_GROUP):  # devpts refuses a number that this user namespace does not have
        plain[2][3].remove(f"gid={TTY_GROUP}")
    made: list[dict[str, Any]] = [
        {"destination": target, "type": kind, "source": source, "options": options}
        for target, kind, source, options in plain
    ]
    mine = [{key: value for key, value in each.items() if key != "make"} for each in bind_mounts(host)]
    mine += map(dict, volumes)
    if host.Init:
        made.append({"destination": INIT, "type": "bind", "source": init_program(), "options": ["bind", "ro"]})
    taken = {each["destination"] for each in mine}
    for target, source in files.items():
        if target not in taken:
            made.append({"destination": target, "type": "bind", "source": source, "options": ["rbind", "rprivate"]})
    return made + sorted(mine, key=lambda each: each["destination"].count("/"))


def exec_process(
    config: ExecConfig, container: Mapping[str, Any], host: HostConfig, user: User, hostname: str
) -> dict[str, Any]:
    """The runtime's form of one more process.

    Raises:
        InvalidArgument: no command.
    """
    if not config.Cmd:
        raise InvalidArgument("No exec command specified")
    capabilities = list(possible()) if config.Privileged else granted(host)
    env = environment({**container, "Tty": config.Tty}, hostname, user.home)
    known = {pair.partition("=")[0]: pair for pair in env}
    known |= {pair.partition("=")[0]: pair for pair in config.Env or () if "=" in pair}
    process: dict[str, Any] = {
        "terminal": config.Tty,
        "user": _user(user),
        "args": config.Cmd,
        "env": list(known.values()),
        "cwd": config.WorkingDir or container.get("WorkingDir") or "/",
        "capabilities": {
            "bounding": capabilities,
            "effective": capabilities if user.uid == 0 else [],
            "permitted": capabilities if user.uid == 0 else [],
        },
    }
    if config.Tty and config.ConsoleSize and len(config.ConsoleSize) == 2 and all(config.ConsoleSize):
        process["consoleSize"] = {"height": config.ConsoleSize[0], "width": config.ConsoleSize[1]}
    return process
