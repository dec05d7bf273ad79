"""A mount of an ordinary user: marks behind modes that forbid to read, names of one lower file, directories moved while others work.

The ``userxattr`` form has neither redirects nor metacopies, and whoever serves it is bound by the modes of his own files.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import users

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become an ordinary user")


@pytest.fixture
def place(space: Path, ordinary_user: int) -> Path:
    os.chown(space, users.UID, users.GID)
    return space


def run(script: str, place: Path, row: bool) -> None:
    done = users.run_python(script, BASE=str(place), ROW="4096" if row else "", XDG_RUNTIME_DIR=str(place))
    assert done.returncode == 0, done.stdout + done.stderr


START = """
import os, random, subprocess, threading
import cowfs
row = int(os.environ["ROW"] or 0) or None
os.chdir(os.environ["BASE"])
os.makedirs("lower/d/sub"), os.makedirs("lower/e"), os.mkdir("mnt")
"""

MARKS = """
for name in ("f", "g"):
    open(f"lower/{name}", "wb").write(name.encode() * 20000)
for name in ("d/old", "e/old"):
    open(f"lower/{name}", "w").write("old")
with cowfs.mount(["lower"], "mnt", upper="upper", row=row):
    with open("mnt/f", "r+b") as file:
        file.seek(8192)
        file.write(b"new")
    subprocess.run(["rm", "-r", "mnt/d"], check=True)
    os.mkdir("mnt/d")
    os.rename("mnt/e", "mnt/moved")
    for name in ("f", "g", "d", "moved"):
        os.chmod(f"mnt/{name}", MODE)
with cowfs.mount(["lower"], "mnt", upper="upper", row=row):
    for name in ("f", "g", "d", "moved"):
        assert os.stat(f"mnt/{name}").st_mode & 0o7777 == MODE
        os.chmod(f"mnt/{name}", 0o700)
    assert open("mnt/f", "rb").read() == b"f" * 8192 + b"new" + b"f" * (20000 - 8195)
    assert open("mnt/g", "rb").read() == b"g" * 20000
    assert os.listdir("mnt/d") == [] and os.listdir("mnt/moved") == ["old"] and not os.path.exists("mnt/e")
"""


@pytest.mark.parametrize("mode", [0o000, 0o200, 0o111, 0o300])
@pytest.mark.parametrize("row", [False, True])
def test_a_mark_behind_a_mode_that_forbids_to_read_still_holds(place: Path, row: bool, mode: int) -> None:
    """Files do not turn to zeros, and what an opaque directory hides does not come back, at the next mount."""
    run(START + f"MODE = {mode}" + MARKS, place, row)


LINKS = """
for size in (100, 3 << 20):
    for how in ("unlinked", "unlinked but for one", "replaced", "opened before", "without a name"):
        top = f"{size} {how}"
        os.makedirs(f"{top}/lower/d"), os.mkdir(f"{top}/mnt")
        body = os.urandom(size)
        open(f"{top}/lower/a", "wb").write(body), open(f"{top}/lower/z", "w").write("z")
        for name in ("b", "d/c"):
            os.link(f"{top}/lower/a", f"{top}/lower/{name}")
        mnt, left, changed = f"{top}/mnt", ["b", "d/c"], body[:5] + b"NEW" + body[8:]
        with cowfs.mount([f"{top}/lower"], mnt, upper=f"{top}/upper", row=row):
            reader = os.open(f"{mnt}/a", os.O_RDONLY)
            writer = os.open(f"{mnt}/a", os.O_RDWR)
            if how == "replaced":
                os.rename(f"{mnt}/z", f"{mnt}/a")
            else:
                os.unlink(f"{mnt}/a")
            if how == "unlinked but for one":
                os.unlink(f"{mnt}/{left.pop(0)}")
            if how == "without a name":
                while left:
                    os.unlink(f"{mnt}/{left.pop()}")
            if how == "opened before":
                os.close(writer)
                writer = os.open(f"{mnt}/b", os.O_RDWR)
            assert os.pwrite(writer, b"NEW", 5) == 3
            for fd in (reader, writer):
                assert os.pread(fd, size, 0) == changed, top
                assert os.fstat(fd).st_nlink == len(left), top
                os.close(fd)
            check = [(open(f"{mnt}/{name}", "rb").read() == changed, os.stat(f"{mnt}/{name}").st_nlink) for name in left]
            assert check == [(True, len(left))] * len(left), (top, check)
        with cowfs.mount([f"{top}/lower"], mnt, upper=f"{top}/upper", row=row):
            assert all(open(f"{mnt}/{name}", "rb").read() == changed for name in left), top
            assert len({os.stat(f"{mnt}/{name}").st_ino for name in left}) <= 1, top
"""


@pytest.mark.parametrize("row", [False, True])
def test_a_write_through_a_descriptor_whose_name_went_reaches_the_other_names(place: Path, row: bool) -> None:
    """The file was a lower one with three names: it stays one file for those that are left."""
    run(START + LINKS, place, row)


MOVES = """
rng = random.Random(5)
for d in range(4):
    os.makedirs(f"lower/d{d}/s/t")
    for n in range(20):
        open(f"lower/d{d}/s/f{n}", "w").write(f"{d}.{n}"), open(f"lower/d{d}/s/t/f{n}", "w").write(f"{d}.{n}")
    os.link(f"lower/d{d}/s/f0", f"lower/d{d}/link")
names, log, errors, done = {d: f"d{d}" for d in range(4)}, {}, [], threading.Event()
begin = threading.Barrier(5)


def work(me):
    fds = [os.open(f"mnt/d{d}/s", os.O_RDONLY | os.O_DIRECTORY) for d in range(4)]
    mine, number = random.Random(me), 0
    begin.wait()
    try:
        while not done.is_set() or number < 20:
            d = mine.randrange(4)
            fd = os.open(f"f{me}", os.O_WRONLY | os.O_APPEND, dir_fd=fds[d])
            os.write(fd, f"+{number}".encode()), os.close(fd)
            log.setdefault((d, me), []).append(f"+{number}")
            number += 1
            os.close(os.open(f"new{me}", os.O_CREAT | os.O_WRONLY, dir_fd=fds[d]))
            os.rename(f"new{me}", f"newer{me}", src_dir_fd=fds[d], dst_dir_fd=fds[d])
            assert len(os.listdir(fds[d])) >= 20
    except BaseException as error:
        errors.append(repr(error))
    for fd in fds:
        os.close(fd)


def check(tag):
    for (d, me), parts in log.items():
        assert open(f"mnt/{names[d]}/s/f{me}").read() == f"{d}.{me}" + "".join(parts), (tag, d, me)
    for d in range(4):
        link, first = f"mnt/{names[d]}/link", f"mnt/{names[d]}/s/f0"
        assert os.path.samefile(link, first) and os.stat(link).st_nlink == 2, (tag, d)
        open(link, "a").write(tag)
        assert open(first).read().endswith(tag)
        for n in range(20):
            assert open(f"mnt/{names[d]}/s/t/f{n}").read() == f"{d}.{n}"


with cowfs.mount(["lower"], "mnt", upper="upper", row=row):
    threads = [threading.Thread(target=work, args=(me,)) for me in range(1, 5)]
    for thread in threads:
        thread.start()
    begin.wait()
    for number in range(60):
        d = rng.randrange(4)
        other = rng.choice([x for x in range(4) if x != d])
        if rng.random() < 0.4 and (names[other] + "/").startswith(names[d] + "/"):
            continue
        old, new = names[d], f"x{number}" if rng.random() < 0.6 else f"{names[other]}/in{number}"
        if new.startswith(old + "/"):
            continue
        os.rename(f"mnt/{old}", f"mnt/{new}")
        names = {x: new + name[len(old):] if (name + "/").startswith(old + "/") else name for x, name in names.items()}
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    check("one")
with cowfs.mount(["lower"], "mnt", upper="upper", row=row):
    check("two")
"""


@pytest.mark.parametrize("row", [False, True])
def test_lower_directories_move_while_others_work_in_them(place: Path, row: bool) -> None:
    """Each rename copies a whole subtree: appends, creates and renames by descriptors of its directories go on, and none is lost."""
    run(START + MOVES, place, row)
