"""Set-id bits and file capabilities when data changes, as programs see them that are then started.

A stat would have the kernel ask for the mode anew, and so hide a bit that only its cache still has. So each case runs the
program it changed and reads what it became: effective ids and capabilities. The right answer is that of ext4.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import hostfs, mounts
from support.users import OTHER_GID, OTHER_UID
from support.writers import WAYS, Who, change, in_child, output_of

import cowfs

OWNER = Who("the owner", OTHER_UID, OTHER_GID)
STRANGER = Who("somebody", 4323, 4323)
MEMBER = Who("a member of the group", 4323, 4323, groups=(OTHER_GID,))
WRITERS = (
    OWNER,
    STRANGER,
    MEMBER,
    Who("root", 0, 0),
    Who("root without CAP_FSETID", 0, 0, fsetid=False),
    Who("somebody with CAP_FSETID", 4323, 4323, fsetid=True),
)
RUNNER = Who("a runner", 4330, 4330)

#: mode and file capabilities, owned by root or by an ordinary user
KINDS = {
    "setuid": (0o4777, "", 0, 0),
    "setgid": (0o2777, "", 0, 0),
    "both": (0o6777, "", OTHER_UID, OTHER_GID),
    "setgid without execute": (0o2767, "", OTHER_UID, OTHER_GID),
    "capability": (0o777, "cap_net_raw+ep", 0, 0),
    "setuid and capability": (0o4777, "cap_net_raw+ep", OTHER_UID, OTHER_GID),
}
OPENED = ("then", "before the bits were set", "by root, handed on")
FRONTS = ("cached", "limited", "row", "passthrough", "fusepy")


class Case(NamedTuple):
    """One file: how it is changed, its attributes, who changes it and how they came by the descriptor."""

    way: str
    kind: str
    who: Who
    opened: str
    place: str = "lower"

    @property
    def name(self) -> str:
        return f"{self.way}, {self.kind}, {self.who.name}, opened {self.opened}, {self.place}".replace(" ", "_")


def cases(places: tuple[str, ...]) -> list[Case]:
    """All of one way of opening, and of the others what an ordinary user does."""
    out = [Case(w, k, who, OPENED[0], p) for w, k, who, p in itertools.product(WAYS, KINDS, WRITERS, places)]
    out += [
        Case(w, k, who, o, p)
        for w, k, who, o, p in itertools.product(
            ("write", "direct", "punch", "copy_file_range", "cut"),
            ("setuid", "both"),
            (OWNER, STRANGER),
            OPENED[1:],
            places,
        )
    ]
    return out


def sample(all_cases: list[Case], offset: int) -> list[Case]:
    """A third of the cases for each front end, another third for the next one: all of them within three."""
    return [case for number, case in enumerate(all_cases) if number % 3 == offset % 3]


def program() -> tuple[str, int]:
    """A program that prints what it may do, and its size: what follows it in the file means nothing to it."""
    found = shutil.which("grep")
    if found is None or shutil.which("setcap") is None:
        pytest.skip("grep or setcap (libcap2-bin) is not installed")
    return os.path.realpath(found), os.stat(found).st_size


def build(case: Case, path: Path, source: str) -> None:
    shutil.copyfile(source, path)
    with path.open("ab") as file:
        file.write(b"\0" * 65536)
    dress(case, path)


def dress(case: Case, path: Path) -> None:
    """Give the file its owner, bits and capabilities."""
    mode, capabilities, uid, gid = KINDS[case.kind]
    os.chown(path, uid, gid)
    os.chmod(path, mode)
    if capabilities:
        subprocess.run(["setcap", capabilities, path], check=True)


def outcome(case: Case, path: Path, head: int) -> str:
    """The writer's result, and the rights of the program when another user runs it afterwards."""
    os.stat(path)  # the kernel knows the bits
    fd = -1
    if case.opened == OPENED[1]:
        os.chmod(path, 0o777)
        ours, theirs = socket.socketpair()

        def wait_and_change() -> None:
            own = os.open(path, os.O_RDWR)
            theirs.send(b"opened")
            theirs.recv(1)
            change(case.way, path, head, own)

        def dress_once_opened() -> None:
            if ours.recv(10):
                dress(case, path)
                os.stat(path)
                ours.send(b"x")

        helper = threading.Thread(target=dress_once_opened)
        helper.start()
        status = in_child(case.who, wait_and_change)
        theirs.close()
        helper.join()
        ours.close()
    else:
        if case.opened == OPENED[2]:
            fd = os.open(path, os.O_RDWR)
        status = in_child(case.who, lambda: change(case.way, path, head, fd))
        if fd >= 0:
            os.close(fd)
    became = output_of(RUNNER, str(path), "-E", "^(Uid|Gid|CapEff)", "/proc/self/status")
    return f"{status}, {' '.join(became.split())}, {os.stat(path).st_mode & 0o7777:o}"


@contextmanager
def mounted(front: str, lower: Path, base: Path) -> Iterator[Path]:
    fronts: dict[str, dict[str, Any]] = {
        "limited": {"size": "1G"}, "row": {"row": 4096}, "passthrough": {"io": "passthrough"},
        "fusepy": {"frontend": "fusepy"},
    }  # fmt: skip
    options = fronts.get(front, {})
    with ExitStack() as stack:
        where = base / "mnt"
        where.mkdir()
        try:
            stack.enter_context(cowfs.mount([lower], where, upper=base / "upper", work=base / "work", **options))
        except cowfs.Unsupported as error:
            pytest.skip(str(error))
        yield where


@pytest.fixture(scope="module")
def ext4(public_directory: Path) -> Iterator[Path]:
    base = public_directory / "set-id"
    base.mkdir()
    base.chmod(0o755)
    where = hostfs.make_image("ext4", base, 2 << 30)
    where.chmod(0o755)
    yield where
    mounts.umount_busy(str(where))


@pytest.fixture(scope="module")
def right(ext4: Path) -> Callable[[Case], str]:
    """ext4's answer to a case, asked for once."""
    source, head = program()
    told: dict[str, str] = {}

    def answer(case: Case) -> str:
        case = case._replace(place="lower")
        if case.name not in told:
            path = ext4 / "plain"
            build(case, path, source)
            told[case.name] = outcome(case, path, head)
            path.unlink()
        return told[case.name]

    return answer


@pytest.mark.parametrize("front", FRONTS)
def test_a_changed_program_runs_with_the_privilege_it_would_have_on_ext4(
    front: str, ext4: Path, right: Callable[[Case], str], request: pytest.FixtureRequest
) -> None:
    source, head = program()
    base = ext4 / front
    lower = base / "lower"
    for made in (base, lower):
        made.mkdir()
        made.chmod(0o755)
    wanted = cases(("lower", "upper") if front == "cached" else ("upper",) if front == "passthrough" else ("lower",))
    if front == "fusepy":  # that bit makes no program of anything, and libfuse does not tell who writes
        wanted = [case for case in wanted if case.kind != "setgid without execute"]
    if not request.config.getoption("--thorough"):
        wanted = sample(wanted, FRONTS.index(front))
    for case in wanted:
        if case.place == "lower":
            build(case, lower / case.name, source)
    wrong = []
    with mounted(front, lower, base) as where:
        for case in wanted:
            path = where / case.name
            if case.place == "upper":
                build(case, path, source)
            told = outcome(case, path, head)
            if told != (wished := right(case)):
                wrong.append(f"{case.name}: {told} instead of {wished}")
            path.unlink()
    shutil.rmtree(base)
    assert not wrong, "\n".join(wrong)
