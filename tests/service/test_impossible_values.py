"""Values that no container can have are refused when they come, with a sentence: never at the start, nor halfway through a change."""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import Any

import pytest
from support.daemon import Daemon

CPUS = os.cpu_count() or 1


def refusal(shared: Daemon, path: str, body: Any) -> str:
    """The sentence of a refusal."""
    status, told = shared.request("POST", path, body)
    assert status == 400, told
    assert "\n" not in told["message"]
    return str(told["message"])


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ({"CpusetCpus": "none"}, "Invalid value none for cpuset cpus"),
        ({"CpusetCpus": "3-1"}, "Invalid value 3-1 for cpuset cpus"),
        ({"CpusetCpus": "0,"}, "Invalid value 0, for cpuset cpus"),
        ({"CpusetCpus": "0-9999"}, "Requested CPUs are not available - requested 0-9999"),
        ({"CpusetMems": "x"}, "Invalid value x for cpuset mems"),
        ({"CpusetMems": "999"}, "Requested memory nodes are not available - requested 999"),
        ({"CpuPeriod": 999}, "CPU cfs period can not be less than 1ms"),
        ({"CpuPeriod": 1_000_001}, "CPU cfs period can not be less than 1ms"),
        ({"CpuQuota": 999}, "CPU cfs quota can not be less than 1ms"),
        ({"CpuQuota": (1 << 63) - 1}, "CPU cfs quota is too large"),
        ({"CpuShares": 1}, "invalid CPU shares (1)"),
        ({"CpuShares": -5}, "invalid CPU shares (-5)"),
        ({"CpuShares": 1 << 40}, "invalid CPU shares"),
        ({"NanoCpus": (CPUS + 1) * 10**9}, f"Range of CPUs is from 0.01 to {CPUS}.00"),
        ({"NanoCpus": 10**9, "CpuQuota": 5000}, "Nano CPUs and CPU Quota cannot both be set"),
        ({"Memory": 1 << 20}, "Minimum memory limit allowed is 6MB"),
        ({"Memory": 8 << 20, "MemorySwap": 7 << 20}, "Minimum memoryswap limit should be larger than memory limit"),
        ({"MemoryReservation": 1}, "Minimum memory reservation allowed is 6MB"),
        ({"Memory": 8 << 20, "MemoryReservation": 9 << 20}, "can not be less than memory reservation limit"),
    ],
)
def test_a_limit_that_cannot_be(shared: Daemon, host: dict[str, Any], sentence: str) -> None:
    """As dockerd says it, at the creation and at a change; the running container keeps what it has."""
    assert sentence in refusal(shared, "/containers/create", {"Image": "bb", "HostConfig": host})
    if shared.request("GET", "/containers/runs/json")[0] != 200:
        shared.docker("run", "-d", "--name", "runs", "bb", "sleep", "100000")
    before = shared.request("GET", "/containers/runs/json")[1]["HostConfig"]
    assert sentence in refusal(shared, "/containers/runs/update", host)
    assert shared.request("GET", "/containers/runs/json")[1]["HostConfig"] == before


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"WorkingDir": "work"}, "the working directory 'work' is invalid, it needs to be an absolute path"),
        ({"Hostname": "h" * 65}, "invalid hostname"),
        ({"Hostname": "h\n127.0.0.1 other"}, "invalid hostname"),
        ({"Env": ["A=\0"]}, "Env[0] has a NUL character"),
        ({"Labels": {"a\0": "b"}}, "Labels has a NUL character"),
        ({"Cmd": ["\ud800"]}, "Cmd[0] has half of a surrogate pair"),
        ({"StopTimeout": 1 << 63}, "StopTimeout is no whole number of 64 bits"),
        ({"HostConfig": {"MemorySwap": 1 << 30}}, "You should always set the Memory limit"),
        ({"HostConfig": {"ShmSize": -1}}, "SHM size can not be less than 0"),
        ({"HostConfig": {"OomScoreAdj": 1001}}, "range for oom score adj is [-1000, 1000]"),
        ({"HostConfig": {"Ulimits": [{"Name": "nofile", "Soft": 5, "Hard": 4}]}}, "less than or equal to hard limit"),
        ({"HostConfig": {"Mounts": [{"Type": "bind", "BindOptions": []}]}}, "HostConfig.Mounts[0].BindOptions is no object"),
        ({"HostConfig": {"Mounts": [{"Type": "volume", "Target": "/x", "VolumeOptions": {"DriverConfig": "x"}}]}}, "DriverConfig is no object"),
        ({"HostConfig": {"Mounts": [{"Type": "volume", "Target": "/x", "VolumeOptions": {"Labels": {"a": 1}}}]}}, "Labels.a is no string"),
        ({"HostConfig": {"Mounts": [{"Type": "volume", "Target": "/x", "VolumeOptions": {"Labels": [1]}}]}}, "Labels is no object"),
        ({"HostConfig": {"Mounts": [{"Type": "tmpfs", "Target": "/x", "TmpfsOptions": {"Mode": "7"}}]}}, "Mode is no whole number"),
        ({"HostConfig": {"Mounts": [{"Type": "tmpfs", "Target": "/x", "TmpfsOptions": {"Mode": -1}}]}}, "invalid size or mode of the tmpfs"),
    ],
)  # fmt: skip
def test_a_container_that_cannot_be(shared: Daemon, body: dict[str, Any], sentence: str) -> None:
    count = len(shared.request("GET", "/containers/json?all=1")[1])
    assert sentence in refusal(shared, "/containers/create", {"Image": "bb", **body})
    assert len(shared.request("GET", "/containers/json?all=1")[1]) == count


def test_an_exec_in_a_relative_directory(shared: Daemon) -> None:
    shared.docker("run", "-d", "--name", "host", "bb", "sleep", "100000")
    body = {"Cmd": ["true"], "WorkingDir": "work"}
    assert "needs to be an absolute path" in refusal(shared, "/containers/host/exec", body)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"Env": "A=b"}, "the image's configuration.Env is no list"),
        ({"Cmd": 5}, "the image's configuration.Cmd is no list"),
        ({"Cmd": ["sh"], "Labels": {"a": 1}}, "the image's configuration.Labels.a is no string"),
        ({"Cmd": ["sh"], "Volumes": ["/x"]}, "the image's configuration.Volumes is no object"),
        ({"Cmd": ["sh"], "User": 5}, "the image's configuration.User is no string"),
        ({"Cmd": ["sh"], "Healthcheck": "x"}, "the image's configuration.Healthcheck is no object"),
    ],
)
def test_an_image_whose_configuration_has_a_wrong_type(shared: Daemon, config: dict[str, Any], sentence: str) -> None:
    """It can be listed and removed; a container of it is refused."""
    shared.docker("load", input=_image(config))
    assert shared.request("GET", "/images/json")[0] == 200
    assert shared.request("GET", "/images/json?filters=" + '{"label":["a"]}')[0] == 200
    assert sentence in refusal(shared, "/containers/create", {"Image": "hostile:1"})
    shared.docker("rmi", "hostile:1")


def _image(config: dict[str, Any]) -> bytes:
    """An archive as of docker save, of an image with one empty layer."""
    import hashlib

    layer = bytes(10240)
    document = json.dumps({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
    }).encode()  # fmt: skip
    manifest = json.dumps([{"Config": "c.json", "RepoTags": ["hostile:1"], "Layers": ["l.tar"]}]).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("c.json", document), ("l.tar", layer), ("manifest.json", manifest)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
