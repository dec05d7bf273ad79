"""Requests about containers, as typed records (names: Docker's API)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ContainerConfig",
    "ExecConfig",
    "HostConfig",
    "ImageConfig",
    "Mount",
    "TmpfsOptions",
    "Update",
    "VolumeOptions",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BindOptions:
    """Options of a mount of a directory of the host."""

    Propagation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverConfig:
    """The driver of a new volume."""

    Name: str = ""
    Options: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeOptions:
    """Options of a mount of a volume."""

    NoCopy: bool = False
    Labels: dict[str, str] | None = None
    DriverConfig: DriverConfig | None = None
    Subpath: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TmpfsOptions:
    """Options of a file system in memory: bytes, and permission bits."""

    SizeBytes: int = 0
    Mode: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mount of ``--mount``."""

    Type: str = ""
    Source: str = ""
    Target: str = ""
    ReadOnly: bool = False
    BindOptions: BindOptions | None = None
    VolumeOptions: VolumeOptions | None = None
    TmpfsOptions: TmpfsOptions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ulimit:
    """A resource limit."""

    Name: str = ""
    Soft: int = -1
    Hard: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """The restart policy of a container."""

    Name: str = ""
    MaximumRetryCount: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of the host."""

    PathOnHost: str = ""
    PathInContainer: str = ""
    CgroupPermissions: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeight:
    """A share of a block device's time."""

    Path: str = ""
    Weight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRate:
    """Bytes or operations a second of a block device."""

    Path: str = ""
    Rate: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """The log driver and its options."""

    Type: str = ""
    Config: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """The host's part of a container's configuration."""

    AutoRemove: bool = False
    Binds: list[str] | None = None
    Mounts: list[Mount] | None = None
    Tmpfs: dict[str, str] | None = None
    StorageOpt: dict[str, str] | None = None
    NetworkMode: str = ""
    ReadonlyRootfs: bool = False
    Privileged: bool = False
    Memory: int = 0
    MemorySwap: int = 0
    MemoryReservation: int = 0
    NanoCpus: int = 0
    CpuShares: int = 0
    CpuPeriod: int = 0
    CpuQuota: int = 0
    CpusetCpus: str = ""
    CpusetMems: str = ""
    PidsLimit: int | None = None
    MemorySwappiness: int | None = None
    OomKillDisable: bool | None = None
    BlkioWeight: int = 0
    BlkioWeightDevice: list[BlockWeight] | None = None
    BlkioDeviceReadBps: list[BlockRate] | None = None
    BlkioDeviceWriteBps: list[BlockRate] | None = None
    BlkioDeviceReadIOps: list[BlockRate] | None = None
    BlkioDeviceWriteIOps: list[BlockRate] | None = None
    MaskedPaths: list[str] | None = None
    ReadonlyPaths: list[str] | None = None
    Annotations: dict[str, str] | None = None
    Isolation: str = ""
    CapAdd: list[str] | None = None
    CapDrop: list[str] | None = None
    SecurityOpt: list[str] | None = None
    PidMode: str = ""
    IpcMode: str = ""
    UTSMode: str = ""
    UsernsMode: str = ""
    CgroupnsMode: str = ""
    Init: bool | None = None
    Runtime: str = ""
    ShmSize: int = 0
    Sysctls: dict[str, str] | None = None
    Ulimits: list[Ulimit] | None = None
    Dns: list[str] | None = None
    DnsSearch: list[str] | None = None
    DnsOptions: list[str] | None = None
    ExtraHosts: list[str] | None = None
    GroupAdd: list[str] | None = None
    OomScoreAdj: int = 0
    ConsoleSize: list[int] | None = None
    LogConfig: LogConfig = field(default_factory=LogConfig)
    RestartPolicy: Restart = field(default_factory=Restart)
    PortBindings: dict[str, Any] | None = None
    PublishAllPorts: bool = False
    Links: list[str] | None = None
    VolumesFrom: list[str] | None = None
    VolumeDriver: str = ""
    Devices: list[Device] | None = None
    DeviceCgroupRules: list[str] | None = None
    DeviceRequests: list[Any] | None = None
    CgroupParent: str = ""
    ContainerIDFile: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerConfig:
    """The body of a create request: the container's process, with the host's part."""

    Hostname: str = ""
    Domainname: str = ""
    User: str = ""
    AttachStdin: bool = False
    AttachStdout: bool = False
    AttachStderr: bool = False
    Tty: bool = False
    OpenStdin: bool = False
    StdinOnce: bool = False
    Env: list[str] | None = None
    Cmd: str | list[str] | None = None
    Entrypoint: str | list[str] | None = None
    Image: str = ""
    Volumes: dict[str, Any] | None = None
    WorkingDir: str = ""
    Labels: dict[str, str] | None = None
    StopSignal: str = ""
    StopTimeout: int | None = None
    Healthcheck: dict[str, Any] | None = None
    ExposedPorts: dict[str, Any] | None = None
    ArgsEscaped: bool = False
    NetworkDisabled: bool = False
    MacAddress: str = ""
    OnBuild: list[str] | None = None
    Shell: list[str] | None = None
    HostConfig: HostConfig = field(default_factory=HostConfig)
    NetworkingConfig: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """The part of an image's configuration that its containers take over (OCI image-spec, config.md)."""

    User: str = ""
    Env: list[str] | None = None
    Cmd: list[str] | None = None
    Entrypoint: list[str] | None = None
    Volumes: dict[str, Any] | None = None
    WorkingDir: str = ""
    Labels: dict[str, str] | None = None
    StopSignal: str = ""
    Healthcheck: dict[str, Any] | None = None
    ExposedPorts: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecConfig:
    """One more process in a container."""

    AttachStdin: bool = False
    AttachStdout: bool = False
    AttachStderr: bool = False
    DetachKeys: str = ""
    Tty: bool = False
    Env: list[str] | None = None
    Cmd: list[str] | None = None
    Privileged: bool = False
    User: str = ""
    WorkingDir: str = ""
    ConsoleSize: list[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The mutable settings of an existing container."""

    Memory: int = 0
    MemorySwap: int = 0
    MemoryReservation: int = 0
    NanoCpus: int = 0
    CpuShares: int = 0
    CpuPeriod: int = 0
    CpuQuota: int = 0
    CpusetCpus: str = ""
    CpusetMems: str = ""
    PidsLimit: int | None = None
    RestartPolicy: Restart | None = None
