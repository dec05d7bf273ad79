"""Which system calls a container may make: a profile in Docker's format becomes the runtime's filter.

Strategy. Docker's format (``--security-opt seccomp=FILE``) has rules with conditions on architecture, capabilities and kernel;
the runtime's (OCI runtime-spec, config-linux.md "seccomp") has none. :func:`resolve` keeps the rules whose conditions hold. The profile of
a container that asks for none is a value in the same format, made from a table by topic: what Docker's clients are used to. A
call that is not named fails with EPERM; clone3, whose flags no filter can read, with ENOSYS, so that programs fall back to clone.

Names that the host's libseccomp does not know are left out by the runtime.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cowfs.service.errors import ApiError

__all__ = ["default_profile", "filter_of", "is_possible", "resolve"]

ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
EPERM, ENOSYS = 1, 38

_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""

AF_ALG, AF_VSOCK = 38, 40

_PLAIN = {
    "files": """
        access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fadvise64_64
        fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync flock fstat fstat64 fstatat64 fstatfs
        fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64 ioctl lchown lchown32 link linkat listmount _llseek lseek
        lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat openat2 pipe pipe2 pread64 preadv preadv2
        pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename renameat renameat2 rmdir sendfile sendfile64 splice stat
        stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat
        utime utimensat utimensat_time64 utimes vmsplice write writev cachestat
    """,
    "extended attributes": """
        fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr lremovexattr lsetxattr
        removexattr removexattrat setxattr setxattrat
    """,
    "waiting for events": """
        epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 fanotify_mark
        inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64
        io_setup io_submit _newselect poll ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4 timerfd_create
        timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64
    """,
    "memory": """
        brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect mremap mseal msync
        munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages
    """,
    "processes and threads": """
        execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake get_robust_list
        get_thread_area getcpu getpgid getpgrp getpid getppid getpriority getrlimit getrusage getsid gettid ioprio_get ioprio_set pidfd_open
        pidfd_send_signal prctl prlimit64 rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
        sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
        sched_setparam sched_setscheduler sched_yield set_robust_list set_thread_area set_tid_address setpgid setpriority setrlimit setsid
        times ugetrlimit uretprobe vfork wait4 waitid waitpid process_vm_readv process_vm_writev ptrace
    """,
    "users and rights": """
        capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid getresgid32 getresuid getresuid32
        getuid getuid32 landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp setfsgid setfsgid32 setfsuid setfsuid32
        setgid setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setuid
        setuid32
    """,
    "signals": """
        kill pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
        rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn tgkill tkill
    """,
    "time": """
        adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
        clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete timer_getoverrun timer_gettime
        timer_gettime64 timer_settime timer_settime64
    """,
    "sockets": """
        accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64 recvmsg send sendmmsg
        sendmsg sendto setsockopt shutdown socketcall socketpair
    """,
    "System V and POSIX IPC": """
        ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget
        msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget
    """,
    "the system": "getrandom sysinfo uname riscv_hwprobe",
}  # fmt: skip
"""Calls of every container, with any arguments."""

_BY_ARCHITECTURE = {
    "amd64 x32": "arch_prctl", "amd64 x32 x86": "modify_ldt", "ppc64le": "sync_file_range2 swapcontext",
    "arm arm64": "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
    "s390 s390x": "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr", "riscv64": "riscv_flush_icache",
}  # fmt: skip

_BY_CAPABILITY = {
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount
        mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare
    """,
    "CAP_SYS_BOOT": "reboot", "CAP_SYS_CHROOT": "chroot", "CAP_SYS_MODULE": "delete_module init_module finit_module", "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise", "CAP_SYS_RAWIO": "iopl ioperm",
    "CAP_SYS_TIME": "settimeofday stime clock_settime clock_settime64", "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node", "CAP_SYSLOG": "syslog", "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}  # fmt: skip
"""Calls that are as mighty as a capability need it."""


def _rule(names: str, arg: tuple[int, int, str] | None = None, **conditions: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"names": names.split(), "action": ALLOW, **conditions}
    if arg is not None:
        made["args"] = [{"index": arg[0], "value": arg[1], "op": f"SCMP_CMP_{arg[2]}"}]
    return made


_ARCHITECTURES = {
    "x86_64": ("amd64", "X86_64", ("X86", "X32")), "aarch64": ("arm64", "AARCH64", ("ARM",)),
    "s390x": ("s390x", "S390X", ("S390",)), "ppc64le": ("ppc64le", "PPC64LE", ()), "riscv64": ("riscv64", "RISCV64", ()),
    "loongarch64": ("loong64", "LOONGARCH64", ()),
}  # fmt: skip
"""uname's machine -> its name in conditions, its name in filters, and those that the kernel runs, too."""


@functools.cache
def default_profile() -> Mapping[str, Any]:
    """The profile of containers that ask for none, in Docker's format."""
    rules = [_rule(" ".join(_PLAIN.values()))]
    # Sockets of all families but two: the kernel's crypto, and the way to a hypervisor's host.
    rules += [
        _rule("socket", (0, AF_ALG, "LT")),
        _rule("socket", (0, AF_ALG + 1, "EQ")),
        _rule("socket", (0, AF_VSOCK, "GT")),
    ]
    # Of personality(2): Linux and PER_LINUX32, each with UNAME26 or without, and the question.
    rules += [_rule("personality", (0, value, "EQ")) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)]
    rules += [_rule(names, includes={"arches": arches.split()}) for arches, names in _BY_ARCHITECTURE.items()]
    rules += [_rule(names, includes={"caps": [capability]}) for capability, names in _BY_CAPABILITY.items()]
    admin, flipped = ["CAP_SYS_ADMIN"], ["s390", "s390x"]  # there clone's arguments are the other way round
    rules += [
        _rule("clone", (0, _NEW_NAMESPACES, "MASKED_EQ"), excludes={"caps": admin, "arches": flipped}),
        _rule("clone", (1, _NEW_NAMESPACES, "MASKED_EQ"), excludes={"caps": admin}, includes={"arches": flipped}),
        {"names": ["clone3"], "action": ERRNO, "errnoRet": ENOSYS, "excludes": {"caps": admin}},
    ]
    machines = [
        {"architecture": f"SCMP_ARCH_{name}", "subArchitectures": [f"SCMP_ARCH_{each}" for each in more]}
        for _, name, more in _ARCHITECTURES.values()
    ]
    return {"defaultAction": ERRNO, "defaultErrnoRet": EPERM, "archMap": machines, "syscalls": rules}


def filter_of(
    options: Iterable[str], capabilities: Collection[str], *, privileged: bool = False
) -> dict[str, Any] | None:
    """The runtime's filter for a container; None for none.

    Args:
        options: of ``--security-opt``; ``seccomp=`` with a profile, ``builtin`` or ``unconfined`` is looked for.
        capabilities: that the container has.

    Raises:
        ApiError: 400: the profile cannot be read.
    """
    wanted = [option[8:] for option in options if option.startswith(("seccomp=", "seccomp:"))]
    text = wanted[-1] if wanted else "unconfined" if privileged else "builtin"
    if text == "unconfined" or (text == "builtin" and not is_possible()):
        return None
    if text in ("builtin", "default"):
        return resolve(default_profile(), capabilities)
    try:
        profile = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"invalid seccomp profile: {error}") from None
    return resolve(profile, capabilities)


@functools.cache
def is_possible() -> bool:
    """Whether the kernel has filters of system calls (seccomp(2))."""
    return os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


def resolve(profile: Any, capabilities: Collection[str], machine: str = "", kernel: str = "") -> dict[str, Any]:
    """The runtime's filter of a profile in Docker's format: the rules whose conditions hold, without these.

    Args:
        capabilities: that the container has. machine, kernel: of uname(2); default: this host's.

    Raises:
        ApiError: 400: it is no profile.
    """
    if not isinstance(profile, dict) or not isinstance(profile.get("defaultAction"), str):
        raise ApiError(400, "invalid seccomp profile: no object with a defaultAction")
    machine, kernel = machine or platform.machine(), kernel or platform.release()
    mine, name, _ = _ARCHITECTURES.get(machine, (machine, machine.upper(), ()))
    made: dict[str, Any] = {"defaultAction": profile["defaultAction"], "syscalls": []}
    for key in ("defaultErrnoRet", "flags", "listenerPath", "listenerMetadata"):
        if profile.get(key) is not None:
            made[key] = profile[key]
    if profile.get("architectures") and profile.get("archMap"):
        raise ApiError(400, "invalid seccomp profile: either architectures or archMap, not both")
    if profile.get("architectures"):
        made["architectures"] = profile["architectures"]
    for each in _objects(profile, "archMap"):
        if each.get("architecture") == f"SCMP_ARCH_{name}":
            made["architectures"] = [each["architecture"], *(each.get("subArchitectures") or ())]
    for rule in _objects(profile, "syscalls"):
        if _holds(rule, capabilities, mine, kernel):
            made["syscalls"].append(_plain(rule))
    return made


def _objects(profile: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = profile.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ApiError(400, f"invalid seccomp profile: {key} is no list of objects")
    return found


def _holds(rule: Mapping[str, Any], capabilities: Collection[str], machine: str, kernel: str) -> bool:
    wanted, unwanted = rule.get("includes") or {}, rule.get("excludes") or {}
    if not isinstance(wanted, dict) or not isinstance(unwanted, dict):
        raise ApiError(400, "invalid seccomp profile: includes and excludes are objects")
    if wanted.get("arches") and machine not in wanted["arches"]:
        return False
    if machine in (unwanted.get("arches") or ()):
        return False
    if not all(each in capabilities for each in wanted.get("caps") or ()):
        return False
    if any(each in capabilities for each in unwanted.get("caps") or ()):
        return False
    if wanted.get("minKernel") and _release(kernel) < _release(wanted["minKernel"]):
        return False
    return not (unwanted.get("minKernel") and _release(kernel) >= _release(unwanted["minKernel"]))


def _release(text: Any) -> tuple[int, int]:
    major, _, rest = str(text).partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    if not (major.isdecimal() and minor.isdecimal()):
        raise ApiError(400, f"invalid seccomp profile: no version of a kernel: {text}")
    return int(major), int(minor)


def _plain(rule: Mapping[str, Any]) -> dict[str, Any]:
    names = rule.get("names") or ([rule["name"]] if rule.get("name") else [])
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        raise ApiError(400, "invalid seccomp profile: a rule without names")
    if not isinstance(rule.get("action"), str):
        raise ApiError(400, f"invalid seccomp profile: the rule of {names[0]} has no action")
    made: dict[str, Any] = {"names": names, "action": rule["action"]}
    for key in ("errnoRet", "args"):
        if rule.get(key) is not None:
            made[key] = rule[key]
    return made
