"""The rights of root in a container: the filter of system calls, capabilities, devices; and nothing that was asked for is left out in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon

from cowfs.service.containers.capabilities import DEFAULT, possible
from cowfs.service.containers.seccomp import default_profile, filter_of, resolve
from cowfs.service.errors import ApiError

CALL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for number, *args in {calls}:
    child = os.fork()
    if not child:
        ctypes.set_errno(0)
        libc.syscall(*[ctypes.c_long(each) for each in (number, *args)])
        os._exit(ctypes.get_errno())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
CALLS = {
    "unshare(CLONE_NEWUSER)": (272, 0x10000000),
    "keyctl": (250, 0, -1),
    "bpf": (321, 99, 0, 0),
    "mount": (165, 0, 0, 0, 0, 0),
    "socket(AF_VSOCK)": (41, 40, 1, 0),
    "socket(AF_ALG)": (41, 38, 5, 0),
    "personality(ADDR_NO_RANDOMIZE)": (135, 0x0040000),
    "io_uring_setup": (425, 0, 0),
    "clone3": (435, 0, 0),
    "getpid": (39,),
    "socket(AF_UNIX)": (41, 1, 1, 0),
    "personality(ask)": (135, 0xFFFFFFFF),
}
"""An attempt of a program -> the number of the call and its arguments (x86-64)."""


def answers(daemon: Daemon, *options: str) -> dict[str, int]:
    """The errno of each call, made by a program in a container that sees the host's Python."""
    binds = [
        word for path in ("/usr", "/lib", "/lib64") if os.path.exists(path) for word in ("-v", f"{path}:{path}:ro")
    ]
    program = textwrap.dedent(CALL).format(calls=list(CALLS.values()))
    told = daemon.out("run", "--rm", *binds, *options, "bb", "/usr/bin/python3", "-c", program)
    return dict(zip(CALLS, map(int, told.split()), strict=True))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of calls are x86-64's")
def test_calls_that_lead_out_are_refused(shared: Daemon) -> None:
    """EPERM, as in Docker's containers; clone3 is not there, so that programs fall back; the rest works."""
    told = answers(shared)
    assert {name: code for name, code in told.items() if code not in (0, 1)} == {"clone3": 38}
    assert [name for name, code in told.items() if code == 0] == ["getpid", "socket(AF_UNIX)", "personality(ask)"]
    open_ = answers(shared, "--security-opt", "seccomp=unconfined")
    assert open_["io_uring_setup"] != 1  # EFAULT or ENOSYS of the kernel's own
    assert open_["clone3"] != 38
    assert open_["personality(ADDR_NO_RANDOMIZE)"] == 0
    mighty = answers(shared, "--cap-add", "SYS_ADMIN")
    assert mighty["bpf"] != 1  # the capability lets it through: EINVAL of the kernel's own
    assert mighty["clone3"] != 38


def test_the_filter_is_there_and_told(shared: Daemon) -> None:
    def mode(*options: str) -> str:
        return shared.out("run", "--rm", *options, "bb", "grep", "^Seccomp:", "/proc/self/status").split()[-1]

    assert mode() == "2"
    assert mode("--user", "1000") == "2"
    assert mode("--security-opt", "no-new-privileges") == "2"
    assert mode("--security-opt", "seccomp=unconfined") == "0"
    assert mode("--privileged") == "0"
    assert "name=seccomp,profile=builtin" in shared.json("info", "-f", "{{json .SecurityOptions}}")
    shared.docker("run", "-d", "--name", "filtered", "bb", "sleep", "1000")
    assert shared.out("exec", "filtered", "grep", "^Seccomp:", "/proc/self/status").split()[-1] == "2"
    shared.docker("rm", "-f", "filtered")


def test_a_profile_of_the_users(shared: Daemon, space: Path) -> None:
    """In Docker's format, with conditions; one that cannot be read is refused when the container is created."""
    profile = space / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
    without = {**rule, "includes": {"caps": ["CAP_SYS_TIME"]}}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    done = shared.docker("run", "--rm", "--security-opt", f"seccomp={profile}", "bb", "mkdir", "/x", check=False)
    assert "No space left" in done.stderr
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [without]}))
    shared.docker("run", "--rm", "--security-opt", f"seccomp={profile}", "bb", "mkdir", "/x")
    for text in ("{}", "[]", '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW"}]}'):
        profile.write_text(text)
        bad = shared.docker("create", "--security-opt", f"seccomp={profile}", "bb", "true", check=False)
        assert bad.returncode == 1
        assert "seccomp profile" in bad.stderr


def names_of(profile: dict[str, Any]) -> set[str]:
    return {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}


def test_conditions_of_profiles() -> None:
    def kept(rule: dict[str, Any], *caps: str, machine: str = "x86_64", kernel: str = "6.1.0-9") -> bool:
        rule = {"names": ["a"], "action": "SCMP_ACT_ALLOW", **rule}
        return bool(resolve({"defaultAction": "X", "syscalls": [rule]}, caps, machine, kernel)["syscalls"])

    assert kept({})
    assert kept({"includes": {"arches": ["amd64"]}})
    assert not kept({"includes": {"arches": ["amd64"]}}, machine="aarch64")
    assert not kept({"excludes": {"arches": ["arm64"]}}, machine="aarch64")
    assert not kept({"includes": {"caps": ["A", "B"]}}, "A")
    assert kept({"includes": {"caps": ["A", "B"]}}, "B", "A")
    assert not kept({"excludes": {"caps": ["A", "B"]}}, "B")
    assert kept({"includes": {"minKernel": "6.1"}})
    assert not kept({"includes": {"minKernel": "6.2"}})
    assert kept({"includes": {"minKernel": "4.8"}})
    assert kept({"excludes": {"minKernel": "6.2"}})
    assert not kept({"excludes": {"minKernel": "6.1"}})
    arm = resolve(default_profile(), (), "aarch64", "6.1")
    assert arm["architectures"] == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    assert "arch_prctl" not in names_of(arm)
    assert "arch_prctl" in names_of(resolve(default_profile(), (), "x86_64", "6.1"))
    s390 = resolve(default_profile(), (), "s390x", "6.1")
    assert [rule["args"][0]["index"] for rule in s390["syscalls"] if rule["names"] == ["clone"]] == [1]
    for bad in (7, {}, {"defaultAction": "X", "syscalls": 3}, {"defaultAction": "X", "syscalls": [3]}):
        with pytest.raises(ApiError):
            resolve(bad, ())


def test_the_default_names_each_call_once_and_none_that_is_dangerous() -> None:
    plain = default_profile()["syscalls"][0]["names"]
    assert len(plain) == len(set(plain))
    dangerous = {
        "mount", "umount2", "pivot_root", "bpf", "perf_event_open", "keyctl", "add_key", "request_key", "kexec_load", "init_module",
        "unshare", "setns", "open_by_handle_at", "userfaultfd", "io_uring_setup", "swapon", "reboot", "iopl", "ioperm", "quotactl",
        "nfsservctl", "uselib", "ustat", "sysfs", "_sysctl", "vm86", "move_pages", "migrate_pages", "acct", "settimeofday", "clock_settime",
    }  # fmt: skip
    made = filter_of((), DEFAULT)
    if made is None:
        pytest.skip("this kernel has no filters of system calls")
    assert not dangerous & names_of(made)
    assert filter_of((), DEFAULT, privileged=True) is None


def test_capabilities(shared: Daemon) -> None:
    def bounding(*options: str) -> int:
        return int(shared.out("run", "--rm", *options, "bb", "grep", "^CapBnd:", "/proc/self/status").split()[-1], 16)

    assert bounding() == 0x00000000A80425FB  # Docker's
    assert bounding("--cap-drop", "ALL") == 0
    assert bounding("--cap-drop", "ALL", "--cap-add", "chown") == 1
    assert bounding("--cap-add", "CAP_NET_ADMIN") == 0xA80425FB | 1 << 12
    everything = bounding("--privileged")
    assert everything.bit_count() == len(possible())
    assert bounding("--cap-add", "ALL") == everything
    assert "unknown capability" in shared.docker("create", "--cap-add", "FLY", "bb", "true", check=False).stderr


def test_devices(shared: Daemon) -> None:
    assert "fuse" not in shared.out("run", "--rm", "bb", "ls", "/dev")
    told = shared.out(
        "run", "--rm", "--device", "/dev/null:/dev/hole:rw", "bb", "sh", "-c", "echo x > /dev/hole; ls -l /dev/hole"
    )
    assert told.startswith("crw") and "1,   3" in told
    assert "zero" in shared.out("run", "--rm", "--privileged", "bb", "ls", "/dev")
    if os.path.exists("/dev/fuse"):
        assert "fuse" in shared.out("run", "--rm", "--privileged", "bb", "ls", "/dev")
    for words, told in (
        (["--device", "/dev/missing"], "/dev/missing"), (["--device", "/etc/passwd"], "not a device node"),
    ):  # fmt: skip
        bad = shared.docker("run", "--rm", *words, "bb", "true", check=False)
        assert bad.returncode != 0
        assert told in bad.stderr
    status, answer = shared.request(
        "POST",
        "/containers/create",
        {"Image": "bb", "Cmd": ["true"], "HostConfig": {"DeviceCgroupRules": ["d 1:1 rwm"]}},
    )
    assert (status, "device cgroup rule" in answer["message"]) == (400, True)
    shared.docker("run", "--rm", "--device-cgroup-rule", "c 1:* rwm", "bb", "true")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--runtime", "other"], "unknown or invalid runtime name"),
        (["--gpus", "all"], "--gpus"),
        (["--mac-address", "92:d0:c6:0a:29:33"], "does not offer"),
        (["--isolation", "hyperv"], "isolation"),
        (["--device-read-bps", "/dev/null:1mb"], "invalid block device"),
        (["--storage-opt", "colour=red"], "invalid storage option: colour"),
        (["--platform", "linux/s390x"], "does not match the specified platform"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_nothing_is_left_out_in_silence(shared: Daemon, words: list[str], told: str) -> None:
    bad = shared.docker("create", "--pull", "never", *words, "bb", "true", check=False)
    assert bad.returncode != 0, bad.stdout
    assert told in bad.stderr
    assert shared.out("ps", "-aq") == ""


def test_an_address_in_a_network_is_refused(shared: Daemon) -> None:
    """docker sends this for ``--ip``; the command of version 20.10 leaves it out for the default network."""
    status, answer = shared.request(
        "POST",
        "/containers/create",
        {
            "Image": "bb",
            "Cmd": ["true"],
            "NetworkingConfig": {"EndpointsConfig": {"default": {"IPAMConfig": {"IPv4Address": "1.2.3.4"}}}},
        },
    )
    assert (status, "does not offer" in answer["message"]) == (501, True)
    assert shared.out("ps", "-aq") == ""


def test_a_member_that_nobody_knows_is_refused(shared: Daemon) -> None:
    """Of an API newer than ours, for example; what asks for nothing does no harm."""
    status, answer = shared.request(
        "POST", "/containers/create", {"Image": "bb", "Cmd": ["true"], "HostConfig": {"Fly": 1}}
    )
    assert (status, "Fly" in answer["message"]) == (501, True)
    status, answer = shared.request(
        "POST",
        "/containers/create",
        {"Image": "bb", "Cmd": ["true"], "Later": "", "HostConfig": {"Fly": None, "Away": 0}},
    )
    assert status == 201
    shared.docker("rm", answer["Id"])


def test_limits_of_the_seed_in_one_option(shared: Daemon) -> None:
    told = shared.out("run", "--rm", "--storage-opt", "size=16M,inodes=100", "bb", "df", "-i", "/")
    assert told.splitlines()[-1].split()[1] == "100"
    assert "16.0M" in shared.out("run", "--rm", "--storage-opt", "size=16M,inodes=100", "bb", "df", "-h", "/")


@pytest.mark.parametrize(
    "words", [["--mount", "type=bind,src=/no/such,dst=/x"], ["--user", "nobody-knows"], ["-w", "/etc/passwd/x"]]
)
def test_a_start_that_fails_is_told_and_leaves_nothing_of_rm(shared: Daemon, words: list[str]) -> None:
    """The docker command waits for the removal of a container of --rm: it hung."""
    done = subprocess.run(
        ["timeout", "-s", "KILL", "100", "docker", "-H", f"unix://{shared.socket}", "run", "--rm", *words, "bb", "true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (125, 126, 127), done.stderr
    assert shared.out("ps", "-aq") == ""
    assert str(shared.run_dir / "containers") not in Path("/proc/self/mountinfo").read_text()


def test_a_container_without_a_log(shared: Daemon) -> None:
    assert shared.out("run", "--log-driver", "none", "--name", "mute", "bb", "echo", "hi") == "hi"
    told = shared.docker("logs", "mute", check=False)
    assert (told.returncode, "does not support reading" in told.stderr) == (1, True)
    assert shared.out("inspect", "-f", "{{.HostConfig.LogConfig.Type}}", "mute") == "none"
    shared.docker("rm", "mute")


def test_networks_and_plugins_can_be_looked_at(shared: Daemon) -> None:
    assert shared.out("network", "ls", "--format", "{{.Name}} {{.Driver}}").splitlines() == ["host host", "none null"]
    assert shared.out("network", "ls", "-q", "--filter", "driver=null") != ""
    shared.docker("run", "-d", "--name", "netted", "--network", "host", "bb", "sleep", "1000")
    (found,) = shared.json("network", "inspect", "host")
    assert [each["Name"] for each in found["Containers"].values()] == ["netted"]
    assert list(shared.json("inspect", "-f", "{{json .NetworkSettings.Networks}}", "netted")) == ["host"]
    shared.docker("rm", "-f", "netted")
    status, answer = shared.request("GET", "/networks/bridge")
    assert (status, "network bridge not found" in answer["message"]) == (404, True)
    assert shared.docker("network", "inspect", "bridge", check=False).returncode == 1
    assert "pre-defined" in shared.docker("network", "rm", "host", check=False).stderr
    missing = shared.docker("inspect", "no-such-thing", check=False)
    assert "No such object: no-such-thing" in missing.stderr
    assert shared.docker("plugin", "ls").returncode == 0


@pytest.mark.skipif(shutil.which("crun") is None, reason="no crun here (CI has it)")
def test_the_filter_is_one_that_crun_takes(space: Path) -> None:
    """crun knows other names than runc does; it must not refuse the profile (its own cgroups are another matter)."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox here")
    bundle = space / "b"
    (bundle / "rootfs").mkdir(parents=True)
    shutil.copy(busybox, bundle / "rootfs" / "busybox")
    subprocess.run(["crun", "spec"], cwd=bundle, check=True, capture_output=True)
    spec = json.loads((bundle / "config.json").read_text())
    spec["linux"]["seccomp"] = filter_of((), DEFAULT)
    spec["process"] |= {"args": ["/busybox", "grep", "^Seccomp:", "/proc/self/status"], "terminal": False}
    (bundle / "config.json").write_text(json.dumps(spec))
    # crun refuses control groups of both versions side by side; in a mount namespace of its own it sees the second alone.
    script = f"mount -t cgroup2 none /sys/fs/cgroup; exec crun --cgroup-manager=disabled run seccomp-{os.getpid()}"
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script], cwd=bundle, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["Seccomp:", "2"], done.stderr
