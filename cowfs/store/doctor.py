"""The abilities of this host and user for cowfs, with remedies for missing ones (``cowfs doctor``).

Rule: every finding comes from trying on the host itself, in ways that leave nothing behind. Each fault has its remedy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

from cowfs._typed import Literal, NamedTuple
from cowfs.driver import registry
from cowfs.errors import CowfsError
from cowfs.sys import cgroups, files, host, landlock, loop, mounts, namespaces, project_quota, seccomp

__all__ = ["Finding", "State", "examine", "why_no_overlay"]

State = Literal["ok", "note", "missing"]
"""``missing``: something that cowfs is for cannot be done; ``note``: something goes slower, or not at all, that not everybody needs."""


class Finding(NamedTuple):
    """One finding."""

    about: str
    state: State
    what: str
    remedy: str = ""


def examine(root: str) -> Iterator[Finding]:
    """Examine everything; ``root`` is the store's directory, existing or not."""
    yield _kernel()
    yield from _mounting()
    yield from _namespaces()
    yield from _confinement()
    yield _control_groups()
    yield _overlay(root)
    yield from _place(root)
    yield from _drivers(root)
    yield _descriptors()
    yield from _programs()


def _kernel() -> Finding:
    release = os.uname().release
    numbers = [int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal()]
    if numbers < [5, 4]:
        return Finding("kernel", "missing", f"Linux {release} is older than 5.4", "upgrade the kernel")
    return Finding("kernel", "ok", f"Linux {release}, Python {sys.version.split()[0]}")


def _mounting() -> Iterator[Finding]:
    """The rights to open /dev/fuse and to mount."""
    helper = shutil.which("fusermount3")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        yield Finding("/dev/fuse", "ok", "can be opened")
    except FileNotFoundError:
        yield Finding("/dev/fuse", "missing", "is not there", "modprobe fuse; in a container: --device /dev/fuse")
    except PermissionError:
        state: State = "ok" if helper else "missing"
        yield Finding(
            "/dev/fuse",
            state,
            "may not be opened by this user",
            "" if helper else "chmod 0666 /dev/fuse, or apt-get install fuse3",
        )
    except OSError as error:
        yield Finding("/dev/fuse", "missing", f"cannot be opened: {error.strerror}", "modprobe fuse")
    if host.has_cap(host.CAP_SYS_ADMIN):
        yield Finding("mounting", "ok", "this user may mount (CAP_SYS_ADMIN)")
    elif helper:
        setuid = os.stat(helper).st_mode & 0o4000
        yield Finding("mounting", "ok" if setuid else "missing", f"by {helper}" + ("" if setuid else ", which is not set-uid root"),
                      "" if setuid else f"chmod u+s {helper}")  # fmt: skip
        yield _allow_other()
    else:
        yield Finding(
            "mounting",
            "missing",
            "this user may not mount, and there is no fusermount3",
            "apt-get install fuse3, or run as root",
        )


def _allow_other() -> Finding:
    try:
        with open("/etc/fuse.conf", encoding="utf-8", errors="replace") as file:
            allowed = any(line.split("#")[0].strip() == "user_allow_other" for line in file)
    except OSError:
        allowed = False
    if allowed:
        return Finding("--allow-other", "ok", "is allowed to this user")
    return Finding(
        "--allow-other",
        "note",
        "other users cannot be let into this user's mounts",
        "add the line user_allow_other to /etc/fuse.conf",
    )


def _namespaces() -> Iterator[Finding]:
    """The needs of ``cowfs run``."""
    if host.has_cap(host.CAP_SYS_ADMIN):
        yield Finding("namespaces", "ok", "this user may make them")
        return
    if _number("/proc/sys/user/max_user_namespaces") == 0:
        yield Finding("namespaces", "missing", "user namespaces are off", "sysctl user.max_user_namespaces=15000")
    elif _number("/proc/sys/kernel/unprivileged_userns_clone") == 0:
        yield Finding(
            "namespaces", "missing", "user namespaces are for root only", "sysctl kernel.unprivileged_userns_clone=1"
        )
    elif _number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1:
        yield Finding("namespaces", "note", "AppArmor takes all rights in a user namespace away",
                      "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a profile for cowfs")  # fmt: skip
    else:
        yield Finding("namespaces", "ok", "user namespaces can be made")
    name = _user_name()
    for path in ("/etc/subuid", "/etc/subgid"):
        if _has_range(path, name):
            yield Finding(path, "ok", f"has a range for {name}")
        else:
            yield Finding(path, "note", f"has no range for {name}: files of other owners cannot be made",
                          f"usermod --add-{path[5:]}s 100000-165535 {name}, or import with --owners xattr")  # fmt: skip


def _confinement() -> Iterator[Finding]:
    """The walls around the commands of ``cowfs run``."""
    why = seccomp.why_not()
    yield Finding("seccomp", "missing" if why else "ok", why or "system calls that concern the host are refused in cowfs run",
                  "apt-get install libseccomp2" if why else "")  # fmt: skip
    version = landlock.version()
    if version:
        yield Finding("landlock", "ok", f"version {version}")
    else:
        yield Finding("landlock", "note", "is off: cowfs run does without this second wall",
                      "Linux 5.19 or later, with landlock among the names in lsm=")  # fmt: skip


def _control_groups() -> Finding:
    why = cgroups.why_not()
    if not why:
        return Finding("control groups", "ok", "cowfs run can limit memory, processors and processes")
    return Finding("control groups", "note", f"cowfs run cannot limit memory, processors and processes: {why}",
                   "run as root, or in a group of your own: systemd-run --user --scope -p Delegate=yes cowfs run ...")  # fmt: skip


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _has_range(path: str, name: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return any(line.split(":")[0] in (name, str(os.getuid())) for line in file)
    except OSError:
        return False


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _overlay(root: str) -> Finding:
    """The kernel's overlayfs, for kernel mounts."""
    try:
        with open("/proc/filesystems", encoding="utf-8", errors="replace") as file:
            known = {line.split()[-1] for line in file if line.strip()}
    except OSError:
        known = set()
    if "overlay" not in known:
        return Finding("overlayfs", "note", "the kernel has none loaded: no mounts of type kernel", "modprobe overlay")
    if not host.has_cap(host.CAP_SYS_ADMIN):
        why = why_no_overlay(_existing(root))
        if why:
            return Finding(
                "overlayfs", "note", f"cowfs run has no kernel mounts for this user: {why}",
                "Linux 5.11, user namespaces, and a store on ext4, xfs or btrfs",
            )  # fmt: skip
        return Finding(
            "overlayfs", "ok", "cowfs run without a limit has kernel mounts in a user namespace; others are for root"
        )
    return Finding("overlayfs", "ok", "mounts of type kernel can be made")


def why_no_overlay(place: str) -> str:
    """Why an ordinary user has no kernel mount in a user namespace, of layers in a directory that is there; "" where he has: it is tried."""
    try:
        made = tempfile.mkdtemp(prefix="cowfs-doctor-", dir=place)
    except OSError as error:
        return f"nothing can be made in {place}: {error.strerror}"
    try:
        words = [sys.executable, "-P", "-c", _TRY_OVERLAY, made]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        return done.stdout.strip() or (
            "" if done.returncode == 0 else f"the attempt ended with status {done.returncode}"
        )
    finally:
        shutil.rmtree(made, ignore_errors=True)


_TRY_OVERLAY = "import sys; from cowfs.store.doctor import try_overlay; print(try_overlay(sys.argv[1]))"


def try_overlay(place: str) -> str:
    """Mount an overlay in a user namespace: why not, or "". For a process that ends then."""
    try:
        namespaces.become_root()
        mounts.make_private()
    except OSError as error:
        return f"no user namespace can be made: {error.strerror}"
    try:
        for name in ("lower", "upper", "work", "at"):
            os.mkdir(f"{place}/{name}")
        mounts.overlay_mount(f"{place}/at", [f"{place}/lower"], f"{place}/upper", f"{place}/work", ("userxattr",))
        os.mkdir(f"{place}/at/made")
        mounts.umount(f"{place}/at", mounts.MNT_DETACH)
        os.chmod(f"{place}/work/work", 0o700)
    except OSError as error:
        return f"the kernel's overlayfs: {error.strerror}"
    return ""


def _existing(path: str) -> str:
    """The nearest existing directory above a place."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def _place(root: str) -> Iterator[Finding]:
    """The file system of the store."""
    place = _existing(root)
    if not os.access(place, os.W_OK):
        yield Finding(
            "store",
            "missing",
            f"this user may not write in {place}",
            "choose a place with --root DIR, or set COWFS_ROOT",
        )
        return
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name, room = files.fs_name(fd), os.fstatvfs(fd)
        why_no_projects = project_quota.why_not(fd)
    finally:
        os.close(fd)
    where = root if place == root else f"{root} (not made yet)"
    yield Finding("store", "ok", f"{where} on {name}")
    free = room.f_bavail * room.f_frsize
    if free < 1 << 30 or free * 20 < room.f_blocks * room.f_frsize:
        yield Finding(
            "free room",
            "note",
            f"{free >> 20} MiB are free",
            "cowfs prune --dry-run shows what could go; cowfs gc deletes garbage",
        )
    else:
        yield Finding("free room", "ok", f"{free >> 30} GiB")
    if room.f_files and room.f_favail * 20 < room.f_files:
        yield Finding("free inodes", "note", f"{room.f_favail:,} are free", "cowfs prune --dry-run shows what could go")
    yield Finding(
        "project quotas",
        "ok",
        f"no ({why_no_projects}); limits do without" if why_no_projects else "yes; limits do without",
    )
    if host.has_cap(host.CAP_SYS_ADMIN):
        why = loop.why_no_images(place)
        yield Finding("images", "note" if why else "ok", why or "long chains are mounted by the kernel as one layer",
                      "load the module erofs; Linux 6.12 mounts files of it" if why else "")  # fmt: skip


def _drivers(root: str) -> Iterator[Finding]:
    place = _existing(root)
    usable = 0
    for name in registry.names():
        try:
            probe = registry.load(name).probe(place)
        except (CowfsError, OSError) as error:
            yield Finding(f"driver {name}", "note", str(error), "another driver, or another file system for --root")
            continue
        usable += probe.usable
        told = "; ".join(probe.reasons)
        yield Finding(f"driver {name}", "ok" if probe.usable else "note", told,
                      "" if probe.usable else "another driver, or another file system for --root")  # fmt: skip
    if not usable:
        yield Finding("drivers", "missing", f"none can run in {place}", "choose another file system with --root DIR")


def _descriptors() -> Finding:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < 4096:
        return Finding(
            "open files",
            "note",
            f"at most {hard} for a process: many layers or busy mounts are slower",
            "ulimit -Hn 65536",
        )
    return Finding("open files", "ok", f"{'no bound' if hard < 0 else f'{hard:,} for a process'}")


def _programs() -> Iterator[Finding]:
    """The further needs of the service."""
    runtime = shutil.which("crun") or shutil.which("runc")
    yield Finding("containers", "ok" if runtime else "note", runtime or "cowfs serve has no runtime to start containers with",
                  "" if runtime else "apt-get install crun")  # fmt: skip
    if find_spec("h11") is None:
        yield Finding("service", "note", "cowfs serve is not installed", "pip install 'cowfs-storage[daemon]'")
    else:
        yield Finding("service", "ok", "cowfs serve can be started")
