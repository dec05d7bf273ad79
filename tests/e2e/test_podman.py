"""Debian's podman and buildah over cowfs-overlayfs with its mount service, step by step as over fuse-overlayfs: as root and as an ordinary user.

Each step is done over both, and what it prints must be the same. The steps build on each other, so they are one test a user.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import hostfs, mounts, podman
from support.podman import Engine, Host

from cowfs.sys.mounts import mountinfo

pytestmark = pytest.mark.slow

Step = Callable[[Engine], object]

MAKE = """
set -e
echo new >/new; mkdir -p /made/in/side; echo x >/made/in/side/file; chmod 750 /made
chown 1000:1000 /new; chmod 4755 /new; ln -s ../new /made/link; ln /new /made/hard
rm -r /srv/deep/er; mkdir /srv/deep/er; echo again >/srv/deep/er/other
mv /home /house; rm /srv/set; echo more >>/etc/group; touch -d '2001-02-03 04:05:06' /made/in
"""
# Not asked: to append to one name of a lower file with two. fuse-overlayfs 1.10 copies it up under the other name, and what was appended is gone
# after the next mount; cowfs keeps it (tests/e2e/test_posix_names.py).
LIST = "find / -path /proc -prune -o -path /sys -prune -o -path /dev -prune -o -path /run -prune -o -path /etc/mtab -prune -o -exec stat -c '%N %F %a %u %g %h %t %T' {} + | grep -v -e \"^'/'\" -e etc/host -e etc/resolv | sort"
CONTAINERFILE = """FROM base
RUN echo one >/one; ln /one /one-more; mkdir /dir; echo inner >/dir/inner
RUN rm -r /dir && mkdir /dir && echo second >/dir/second && chmod 711 /dir
COPY copied /copied
RUN mv /srv /served; chmod u+s /copied
"""


@pytest.fixture(scope="module")
def base(public_directory: Path, ordinary_user: int) -> Iterator[Path]:
    podman.skip_unless_possible()
    base = hostfs.make_tmpfs(public_directory, "4g", "podman")
    base.chmod(0o755)
    (base / "root.tar").write_bytes(podman.root_tar())
    (base / "context").mkdir()
    (base / "context/Containerfile").write_text(CONTAINERFILE)
    (base / "context/copied").write_text("copied\n")
    podman.add_user(base)
    yield base
    mounts.umount_busy("/etc")
    mounts.umount_busy(str(base))


@pytest.fixture(scope="module", params=[0, podman.UID], ids=["root", "user"])
def host(base: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    """Root, or the ordinary user; with a mount service running."""
    host = podman.make_host(base, request.param)
    host.serve()
    yield host
    host.end_services()


def steps(base: Path) -> dict[str, Step]:
    """Each step: its name, and the output that is compared."""
    plain = ("--network", "none")
    policy = lambda e: ("--signature-policy", f"{e.host.environment['HOME']}/policy.json")  # noqa: E731

    def made(engine: Engine) -> object:
        return engine("run", *plain, "--name", "made", "base", "sh", "-c", MAKE)

    def exported(engine: Engine, *what: str) -> object:
        path = engine.host.directory(f"out-{engine.name}-{engine.host.uid}") / "export.tar"
        engine(*what, "-o", str(path), "made")
        done = subprocess.run(["tar", "--numeric-owner", "-tvf", path], check=True, capture_output=True, text=True)
        return sorted(re.sub(r" \d{4}-\d\d-\d\d \d\d:\d\d ", " ", line) for line in done.stdout.splitlines())

    def mounted(engine: Engine, *kind: str) -> object:
        """The tree of a container or image that podman mounts; in podman's own mount namespace for a user."""
        script = f"m=$({podman_words(engine)} {' '.join(kind)}) && cd $m && find . | sort && cat srv/one | md5sum"
        return engine.unshare("sh", "-c", script)

    def saved(engine: Engine) -> object:
        path = engine.host.directory(f"out-{engine.name}-{engine.host.uid}") / "saved.tar"
        path.unlink(missing_ok=True)
        engine("save", "-o", str(path), "built")
        engine("rmi", "--force", "built")
        engine("load", "-i", str(path))
        return engine("run", "--rm", *plain, "built", "sh", "-c", LIST)

    def copied(engine: Engine) -> object:
        out = engine.host.directory(f"out-{engine.name}-{engine.host.uid}")
        (out / "in").write_text("from outside\n")
        engine("cp", f"{out}/in", "made:/made/in/copied")
        shutil.rmtree(out / "back", ignore_errors=True)
        engine("cp", "made:/made", f"{out}/back")
        return sorted(str(path.relative_to(out)) for path in (out / "back").rglob("*")), (
            out / "back/in/copied"
        ).read_text()

    def overlaid(engine: Engine) -> object:
        """``-v DIR:/there:O``: what the container writes there stays out of DIR."""
        under = engine.host.directory(f"under-{engine.name}-{engine.host.uid}")
        (under / "kept").write_text("kept\n")
        seen = engine(
            "run",
            "--rm",
            *plain,
            "-v",
            f"{under}:/there:O",
            "base",
            "sh",
            "-c",
            "echo w >/there/w; ls /there; cat /there/kept",
        )
        return seen, sorted(os.listdir(under))

    def together(engine: Engine) -> object:
        command = [
            *engine.host.prefix,
            "podman",
            *engine.options,
            "run",
            "--rm",
            *plain,
            "base",
            "sh",
            "-c",
            "echo $$ >/f; cat /srv/deep/er/file",
        ]
        running = [
            subprocess.Popen(command, env=engine.host.environment, cwd="/", stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        return [process.communicate(timeout=300)[0] for process in running]

    def bud(engine: Engine) -> object:
        return (
            engine(
                "build",
                *policy(engine),
                "--isolation",
                "chroot",
                "--layers",
                "-q",
                "-t",
                "built",
                str(base / "context"),
                code=0,
            )
            and "built"
        )

    def worked(engine: Engine) -> object:
        """buildah: from, run, copy, config, commit, and a run of the outcome."""
        name = engine.buildah("from", *policy(engine), "--pull-never", "base").strip()
        engine.buildah("run", "--isolation", "chroot", name, "--", "sh", "-c", "echo by buildah >/by; rm -r /srv")
        engine.buildah("copy", name, str(base / "context/copied"), "/etc/copied")
        engine.buildah("config", "--env", "A=b", name)
        engine.buildah("commit", *policy(engine), "-q", "--rm", name, "worked")
        return engine("run", "--rm", *plain, "worked", "sh", "-c", LIST + "; echo $A; cat /by")

    return {
        "import": lambda e: e("import", "-q", str(base / "root.tar"), "base") and e("images", "--format", "{{.Repository}}:{{.Tag}}"),
        "run true": lambda e: e("run", "--rm", *plain, "base", "true"),
        "run false": lambda e: e("run", "--rm", *plain, "base", "false", code=1),
        "no such program": lambda e: e("run", "--rm", *plain, "base", "/nowhere", code=127),
        "the tree as the container sees it": lambda e: e("run", "--rm", *plain, "base", "sh", "-c", LIST),
        "changes": made,
        "diff of a container": lambda e: sorted(e("diff", "made").splitlines()),
        "start it again": lambda e: (e("start", "made"), e("wait", "made"), e("logs", "made")),
        "inspect": lambda e: e("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}} {{.Driver}}", "made"),
        "cp in and out": copied,
        "export": lambda e: exported(e, "export"),
        "mount a container": lambda e: mounted(e, "mount", "made"),
        "umount it": lambda e: e("umount", "made") and "gone",
        "commit": lambda e: e("commit", "-q", "made", "two") and e("run", "--rm", *plain, "two", "sh", "-c", LIST),
        "diff of an image": lambda e: sorted(e("diff", "two").splitlines()),
        "contents by digest": lambda e: e("run", "--rm", *plain, "two", "sh", "-c", "find /made /srv /new /house /etc/group -type f -exec md5sum {} + | sort"),
        "mount an image": lambda e: mounted(e, "image", "mount", "base"),
        "umount the image": lambda e: e("image", "umount", "base") and "gone",
        "read-only": lambda e: e("run", "--rm", "--read-only", *plain, "base", "sh", "-c", "echo x >/x; cat /srv/two | md5sum"),
        "another user": lambda e: e("run", "--rm", "--user", "1000", *plain, "base", "sh", "-c", "id -u; echo x >/srv/one && echo y >/srv/x; cat /etc/passwd", code=0),
        "in the background": lambda e: e("run", "-d", "--name", "back", *plain, "base", "sleep", "1000") and e("ps", "--format", "{{.Names}}"),
        "exec": lambda e: e("exec", "back", "sh", "-c", "echo in >/in; rm /srv/two; ls /srv; cat /in"),
        "diff while it runs": lambda e: sorted(e("diff", "back").splitlines()),
        "commit while it runs": lambda e: e("commit", "-q", "back", "three") and e("run", "--rm", *plain, "three", "ls", "/srv", "/in"),
        "pause and unpause is not asked; kill": lambda e: (e("kill", "back"), e("wait", "back"))[0],
        "its size": lambda e: e("ps", "-a", "--filter", "name=back", "--format", "{{.Status}}").split()[0],
        "-v DIR:/there:O": overlaid,
        "a volume": lambda e: e("run", "--rm", *plain, "-v", "vol:/vol", "base", "sh", "-c", "echo v >/vol/v") + e("run", "--rm", *plain, "-v", "vol:/vol", "base", "cat", "/vol/v"),
        "four at once": together,
        "build": bud,
        "build from the cache": bud,
        "run what was built": lambda e: e("run", "--rm", *plain, "built", "sh", "-c", LIST),
        "history": lambda e: e("history", "--format", "{{.CreatedBy}}", "built"),
        "save, remove, load, run": saved,
        "buildah": worked,
        "other ids": lambda e: e("run", "--rm", *plain, "--uidmap", "0:1000:2000", "--gidmap", "0:1000:2000", "base", "sh", "-c", LIST),
        "remove": lambda e: (e("rm", "--all", "--force", "--time", "0"), e("ps", "-a", "--format", "{{.Names}}"))[1],
        "remove images": lambda e: (e("rmi", "--all", "--force"), e("images", "-q"))[1],
    }  # fmt: skip


def podman_words(engine: Engine) -> str:
    return " ".join(["podman", *engine.options])


def test_every_step_is_as_over_fuse_overlayfs(host: Host, base: Path) -> None:
    """And no mount is left; each mount was made by the service."""
    theirs = Engine(host, "theirs", shutil.which("fuse-overlayfs") or "")
    ours = Engine(host, "ours", host.program())
    different = []
    try:
        for name, step in steps(base).items():
            expected, found = (_outcome(step, engine) for engine in (theirs, ours))
            if expected != found:
                told = difflib.unified_diff(expected.split("\\n"), found.split("\\n"), lineterm="", n=0)
                different.append("\n  ".join([f"{name}:", *told]))
        assert not different, "\n".join(different)
        assert [
            mount for mount in mountinfo() if os.fsencode(ours.store) in mount.target and b"/merged" in mount.target
        ] == []
    finally:
        theirs.close()
        ours.close()


def test_the_server_of_a_container_is_a_child_of_the_service(host: Host, base: Path) -> None:
    """And goes on when the service is killed; what is mounted then is served by the command itself."""
    engine = Engine(host, "child", host.program())
    service = host.services[-1]
    try:
        engine("import", "-q", str(base / "root.tar"), "base")
        engine("run", "-d", "--name", "one", "--network", "none", "base", "sleep", "1000")
        assert len(podman.children(service.pid)) == 1
        service.kill()
        service.wait()
        assert engine("exec", "one", "sh", "-c", "echo alive >/f; cat /f") == "alive\n"
        engine("run", "--rm", "--network", "none", "base", "true")
        host.serve()
        engine("run", "-d", "--name", "two", "--network", "none", "base", "sleep", "1000")
        assert len(podman.children(host.services[-1].pid)) == 1
        assert engine("exec", "one", "cat", "/f") == "alive\n"
    finally:
        engine.close()


def _outcome(step: Step, engine: Engine) -> str:
    """The output of a step, without names of the engine and chance."""
    found = (
        repr(step(engine))
        .replace(f"store-{engine.name}", "store")
        .replace(f"out-{engine.name}-{engine.host.uid}", "out")
    )
    found = found.replace(engine.running, "running")
    found = re.sub(
        r"( directory \d+ \d+ \d+) \d+", r"\1", found
    )  # link counts of directories: fuse-overlayfs counts sub-directories
    return re.sub(r"[0-9a-f]{64}", "ID", found)
