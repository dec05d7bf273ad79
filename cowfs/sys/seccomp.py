"""The system calls that a confined command may make: a filter of the kernel's (seccomp(2)), made by libseccomp.

Decision: libseccomp (Debian's libseccomp2, on every host that has apt, systemd or a container engine) is called by ctypes, and no filter is
compiled here. It knows the numbers of every architecture and those of 32-bit programs, and the order in which they are compared;
a table of our own would be wrong on the first host that nobody tried. Where it is missing nothing is started: the caller says so.

Rule 1. A list of calls that are allowed, the same as container engines have by default where root has the capabilities of
:data:`cowfs.sys.capabilities.CONTAINER`: everything that is neither mounting, namespaces, modules, clocks, keys, tracing the kernel nor io_uring.
Rule 2. A call that concerns the host is refused with EPERM. Anything else is ENOSYS, as on an older kernel, so a C library takes the older way:
clone3(2) is one, since a filter cannot look at its flags.
Rule 3. A kernel that has no filters is an error, too.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

__all__ = ["Filter", "why_not"]

_ALLOWED = """
_llseek _newselect accept accept4 access adjtimex alarm arch_prctl bind breakpoint brk cacheflush cachestat capget capset chdir chmod
chown chown32 chroot clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait
epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate
fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr file_setattr
flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex
futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64
getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid
getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday
getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents
io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc kcmp kill landlock_add_rule
landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listxattr listxattrat llistxattr llseek
lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules lstat lstat64 madvise map_shadow_stack membarrier memfd_create
memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 modify_ldt mprotect mq_getsetattr mq_notify mq_open
mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock
munlockall munmap nanosleep newfstatat nice oldfstat oldlstat oldolduname oldstat olduname open openat openat2 pause pidfd_open
pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64
process_mrelease process_vm_readv process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readdir
readlink readlinkat readv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
restart_syscall riscv_flush_icache riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity
sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 sendfile sendfile64
sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address set_tls setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32
setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32
setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat sgetmask shmat shmctl shmdt shmget shutdown sigaction sigaltstack signal
signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend socketcall socketpair splice ssetmask stat stat64 statfs statfs64 statx
symlink symlinkat sync sync_file_range sync_file_range2 syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat utime utimensat utimensat_time64 utimes vfork
vmsplice wait4 waitid waitpid write writev
"""
_REFUSED = """
_sysctl acct add_key bpf clock_settime clock_settime64 create_module delete_module fanotify_init finit_module fsconfig fsmount fsopen
fspick get_kernel_syms get_mempolicy init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kexec_file_load kexec_load
keyctl listmount lookup_dcookie mbind migrate_pages mount mount_setattr move_mount move_pages name_to_handle_at nfsservctl
open_by_handle_at open_tree open_tree_attr perf_event_open pidfd_getfd pivot_root process_madvise query_module quotactl quotactl_fd
reboot request_key set_mempolicy set_mempolicy_home_node setdomainname sethostname setns settimeofday statmount stime swapoff swapon
sysfs syslog umount umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old
"""

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NE, _EQ, _MASKED_EQ = 1, 4, 7
_BAD_ARCHITECTURE, _OPTIMIZE, _BY_TREE = 2, 8, 2
_32_BIT = {"x86_64": 0x40000003, "aarch64": 0x40000028}
"""libseccomp's tokens of the architectures whose programs these hosts start as well: AUDIT_ARCH_I386, AUDIT_ARCH_ARM."""
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET (linux/sched.h)."""
_FLAGS_OF_CLONE = 1 if os.uname().machine == "s390x" else 0  # clone(2), "C library/kernel differences"
_AF_VSOCK = 40
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Linux, a 32-bit address space, the release as 2.6, both; and the question (personality(2))."""


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def _library() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    found.seccomp_init.restype = ctypes.c_void_p
    return found


def why_not() -> str:
    """Why no filter can be made here; "" where one can."""
    return "" if _library() is not None else "libseccomp.so.2 is not installed"


class Filter:
    """The filter, made but not yet in force; some 10 ms. Make it before privilege is dropped and files are out of sight.

    Raises:
        OSError: ENOENT, there is no libseccomp; ENOMEM.
    """

    def __init__(self) -> None:
        library = _library()
        if library is None:
            raise FileNotFoundError(errno.ENOENT, "libseccomp is not installed", "libseccomp.so.2")
        self._library = library
        context = library.seccomp_init(_ERRNO | errno.ENOSYS)
        if not context:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self._context = ctypes.c_void_p(context)
        self._set(_BAD_ARCHITECTURE, _ERRNO | errno.ENOSYS)
        other = _32_BIT.get(os.uname().machine)
        if other is not None:
            library.seccomp_arch_add(self._context, ctypes.c_uint32(other))
        for name in _ALLOWED.split():
            self._rule(_ALLOW, name)
        for name in _REFUSED.split():
            self._rule(_ERRNO | errno.EPERM, name)
        self._rule(_ALLOW, "clone", [(_FLAGS_OF_CLONE, _MASKED_EQ, _NEW_NAMESPACES, 0)])
        self._rule(_ALLOW, "socket", [(0, _NE, _AF_VSOCK, 0)])
        for number in _PERSONALITIES:
            self._rule(_ALLOW, "personality", [(0, _EQ, number, 0)])
        self._set(_OPTIMIZE, _BY_TREE)  # not known to libseccomp before 2.5: slower, and the same

    def _set(self, attribute: int, value: int) -> None:
        self._library.seccomp_attr_set(self._context, attribute, ctypes.c_uint32(value))

    def _rule(self, action: int, name: str, comparisons: Sequence[tuple[int, int, int, int]] = ()) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # newer than this libseccomp: ENOSYS
            return
        given = (_Comparison * max(1, len(comparisons)))(*(_Comparison(*each) for each in comparisons))
        done: int = self._library.seccomp_rule_add_array(
            self._context, ctypes.c_uint32(action), number, len(comparisons), given
        )
        if done not in (0, -errno.EDOM):  # EDOM: no architecture here has it
            raise OSError(-done, f"libseccomp takes no rule for {name}: {os.strerror(-done)}")

    def load(self) -> None:
        """Put it in force for this thread and all that it starts, for good. No privilege is needed, but that it was given up for good.

        Raises:
            OSError: EINVAL, the kernel has no filters.
        """
        done: int = self._library.seccomp_load(self._context)
        if done:
            raise OSError(-done, f"no filter of system calls: {os.strerror(-done)}")
