"""The mount behaves as a plain directory does, whatever is done to it.

A Hypothesis state machine draws random layers and random operations, carries each out in the
mount and in a plain directory with the same start, and demands the same result or errno, the
same tree, and inode numbers that never change while a file lives. At the end of each run the
upper is read by the kernel's overlayfs, which must see the tree that cowfs showed. The reverse
is a test of its own: the kernel writes, cowfs reads.

Shrinking: Hypothesis draws, but a failure is cut down here, by leaving out ever smaller pieces of
the list of concrete operations (delta debugging) on the same layers; replaying paths instead of
draws keeps what is left meaningful, and takes a hundred runs instead of thousands.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from support import mounts, stacks, trees, users
from support.ops import SLOTS, Actor, Op

STEPS_A_RUN = 250
CHECK_EVERY = 40

INDEX = st.integers(0, 400)
MODES = st.sampled_from((0o644, 0o600, 0o666, 0o755, 0o777, 0o4755, 0o2755, 0o1777, 0o000))
OFFSETS = st.sampled_from((0, 1, 100, 4095, 4096, 5000, 9000, 40_000, 131_072))
LENGTHS = st.sampled_from((1, 10, 4096, 5000, 70_000, 0))
IDS = st.sampled_from((0, 4321, 77, -1))
SLOT = st.integers(0, SLOTS - 1)
BYTE = st.integers(0, 250)
ATTRS = st.sampled_from(("user.a", "user.b", "trusted.c", "user.layer"))
TIMES = st.sampled_from((0, 1, 999_999_999, 1_234_567_890_987_654_321))

#: 'E' an existing path, 'P' one that is not the root, 'N' a name in an existing directory; the rest are strategies
TABLE: dict[str, tuple[int, tuple[Any, ...]]] = {
    "mkdir": (6, ("N", MODES)),
    "create": (8, ("N", MODES)),
    "symlink": (2, (st.sampled_from(("a", "../b", "nowhere")), "N")),
    "mknod": (2, ("N", st.sampled_from(("fifo", "socket", "char")))),
    "link": (5, ("P", "N")),
    "unlink": (7, ("P",)),
    "rmdir": (4, ("P",)),
    "rmtree": (1, ("P",)),
    "rename": (12, ("P", "N")),
    "rename2": (6, ("P", "P", st.sampled_from((1, 2, 2, 3)))),
    "stat": (3, ("E",)),
    "follow": (1, ("N",)),
    "list": (4, ("E",)),
    "readlink": (1, ("E",)),
    "read": (5, ("E", OFFSETS, LENGTHS)),
    "write": (9, ("E", st.sampled_from((0, 0, os.O_TRUNC, os.O_APPEND)), OFFSETS, LENGTHS, BYTE)),
    "truncate": (4, ("E", OFFSETS)),
    "chmod": (4, ("E", MODES)),
    "chown": (4, ("E", IDS, IDS)),
    "utime": (3, ("E", TIMES)),
    "access": (2, ("E", st.integers(0, 7))),
    "setxattr": (4, ("E", ATTRS, LENGTHS.filter(lambda n: n <= 5000), BYTE, st.sampled_from((0, 0, 1, 2)))),
    "getxattr": (2, ("E", ATTRS)),
    "listxattr": (2, ("E",)),
    "removexattr": (2, ("E", ATTRS)),
    "copy_range": (3, ("E", "E", OFFSETS, OFFSETS, LENGTHS)),
    "map_store": (3, ("E", OFFSETS, LENGTHS, BYTE)),
    "tmpfile": (1, ("E", "N", LENGTHS)),
    "open": (8, (SLOT, "E", st.sampled_from((os.O_RDWR, os.O_RDONLY, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT)))),
    "close": (2, (SLOT,)),
    "fread": (4, (SLOT, OFFSETS, LENGTHS)),
    "fwrite": (6, (SLOT, OFFSETS, LENGTHS, BYTE)),
    "fstat": (3, (SLOT,)),
    "ftruncate": (2, (SLOT, OFFSETS)),
    "fchmod": (1, (SLOT, MODES)),
    "fchown": (1, (SLOT, IDS, IDS)),
    "fallocate": (3, (SLOT, st.sampled_from((0, 1, 3)), OFFSETS, LENGTHS)),
    "fsetxattr": (1, (SLOT, ATTRS, st.just(5), BYTE)),
    "flist": (1, (SLOT,)),
    "flink": (1, (SLOT, "N")),
    "fsync": (1, (SLOT,)),
}  # fmt: skip


def _strategy_of(name: str) -> st.SearchStrategy[Op]:
    parts = [
        INDEX if part in ("E", "P") else st.tuples(INDEX, st.sampled_from(stacks.NAMES)) if part == "N" else part
        for part in TABLE[name][1]
    ]
    return st.tuples(st.just(name), *parts)


OPS = st.sampled_from([name for name, (weight, _) in TABLE.items() for _ in range(weight)]).flatmap(
    {name: _strategy_of(name) for name in TABLE}.__getitem__
)


def existing(root: str) -> list[str]:
    """Every path of a small tree, '' the root first, in a fixed order."""
    out = [""]
    for at, directories, files in os.walk(root):
        relative = "" if at == root else at[len(root) + 1 :] + "/"
        out.extend(relative + name for name in itertools.chain(directories, files))
    return sorted(out)


def concrete(op: Op, paths: list[str], dirs: list[str]) -> Op:
    """The operation with its indices replaced by paths."""
    out: list[Any] = [op[0]]
    for part, value in zip(TABLE[op[0]][1], op[1:], strict=True):
        if part == "E":
            value = paths[value % len(paths)]
        elif part == "P":
            value = paths[1 + value % (len(paths) - 1)] if len(paths) > 1 else "nothing"
        elif part == "N":
            directory = dirs[value[0] % len(dirs)]
            value = f"{directory}/{value[1]}" if directory else value[1]
        out.append(value)
    return tuple(out)


class Run:
    """One stack, one mount, one plain twin."""

    counts = True  # link counts are compared

    def __init__(self, base: Path, impl: str, seed: int, weight: int, form: str) -> None:
        self.base, self.impl, self.form = base, impl, form
        self.recipe = (impl, seed, weight, form)
        self.started = time.time_ns() - 10**9
        base.mkdir()
        base.chmod(0o755)
        self.lowers = stacks.random_stack(seed, weight, base, form)
        self.stack = ExitStack()
        self.plain = base / "plain"
        self.plain.mkdir()
        view = base / "view"
        view.mkdir()
        with mounts.overlay(self.lowers, view, form=form):
            mounts.copy_tree(view, self.plain)
        # the merged root is the upper's own directory: start it like the twin
        upper = base / "upper"
        upper.mkdir()
        status = os.stat(self.plain)
        os.chown(upper, status.st_uid, status.st_gid)
        os.chmod(upper, 0o777)
        os.chmod(self.plain, 0o777)
        self.mounted = self._mount(upper)
        if impl == "plain":
            self.mounted.path.chmod(0o777)
        self.ours = Actor(str(self.mounted.path), self.started, self.counts)
        self.theirs = Actor(str(self.plain), self.started, self.counts)
        self.log: list[tuple[Op, bool, Any]] = []
        self.numbers: dict[int, int] = {}

    def _mount(self, upper: Path) -> mounts.Mounted:
        return self.stack.enter_context(mounts.mounted(self.impl, self.lowers, self.base, form=self.form, upper=upper))

    def step(self, op: Op, as_user: bool) -> None:
        paths = existing(str(self.plain))
        dirs = [""] + [p for p in paths[1:] if os.path.isdir(self.plain / p) and not os.path.islink(self.plain / p)]
        self.carry_out(concrete(op, paths, [p for p in dirs if p.count("/") < 3]), as_user)

    def carry_out(self, real: Op, as_user: bool) -> None:
        expected = self.theirs.do(real, as_user)
        actual = self.ours.do(real, as_user)
        self.log.append((real, as_user, expected))
        assert actual == expected, (
            f"{real} as {'user' if as_user else 'root'}: plain {expected!r}, mount {actual!r}\n{self.story()}"
        )

    def story(self) -> str:
        lines = [f"{op}{' as user' if user else ''} -> {str(result)[:60]}" for op, user, result in self.log]
        left_out = [f"({len(lines) - 60} before)"] if len(lines) > 60 else []
        return "\n  ".join(["operations:", *left_out, *lines[-60:]])

    def tree(self, root: Path) -> trees.Tree:
        return trees.snapshot(root)

    def check(self) -> None:
        """The trees are one, and every file kept its inode number."""
        plain, ours = self._timeless(self.plain), self._timeless(self.mounted.path)
        ignored = ("ctime",) if self.counts else ("ctime", "nlink")
        found = trees.differences(plain, ours, ignore=ignored, names=("plain", "mount"))
        assert not found, "\n  ".join(found[:20]) + "\n" + self.story()
        for path in plain:
            model = os.lstat(self.plain / path).st_ino
            number = os.lstat(self.mounted.path / path).st_ino
            known = self.numbers.setdefault(model, number)
            assert known == number, f"{path}: inode number was {known}, is {number}\n{self.story()}"
        alive = {os.lstat(self.plain / path).st_ino for path in plain}
        numbers = [self.numbers[model] for model in alive]
        assert len(set(numbers)) == len(numbers), f"two files share an inode number\n{self.story()}"

    def _timeless(self, root: Path) -> trees.Tree:
        tree = trees.snapshot(root)
        return {
            path: replace(entry, mtime=entry.mtime if entry.mtime < self.started else 0) for path, entry in tree.items()
        }

    def finish(self) -> None:
        """Compare, unmount, and compare what the other implementation reads."""
        self.ours.close()
        self.theirs.close()
        last = trees.snapshot(self.mounted.path)
        self.stack.close()
        other = {"overlay": "kernel", "row": "row"}.get(self.impl, "overlay")  # the kernel knows no redirect files
        with self.mounted_by(other) as again:
            seen = trees.snapshot(again)
        for path in last.keys() & seen.keys():
            if (
                seen[path].type == "dir"
            ):  # the kernel touches directories when it mounts and lists them (its xattr "impure")
                seen[path] = replace(seen[path], ctime=last[path].ctime)
        found = trees.differences(last, seen, ignore=(), names=(self.impl, other))
        assert not found, "\n  ".join(found[:20]) + "\n" + self.story()
        assert self.mounted.work is not None
        left = os.listdir(self.mounted.work / "work") if (self.mounted.work / "work").is_dir() else []
        assert [name for name in left if name != "incompat"] == [], f"left in work: {left}"

    @contextmanager
    def mounted_by(self, impl: str) -> Iterator[Path]:
        with mounts.mounted(impl, self.lowers, self.base, form=self.form) as again:
            yield again.path

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        self.stack.close()


class UserRun(Run):
    """The mount is made by an ordinary user through fusermount3: no privilege, the ``userxattr`` form.

    Everything belongs to that user, who also does everything; nobody takes the rights of the owner away,
    since then the server, who is just the owner, could not copy the file. Counts of lower hard links stay when one of
    their names goes (semantics.md: to lower them would copy data).
    """

    counts = False

    def _mount(self, upper: Path) -> mounts.Mounted:
        work, target = self.base / "work", self.base / "mnt"
        for path in (work, target):
            path.mkdir()
        subprocess.run(["chown", "-hR", f"{users.UID}:{users.GID}", str(self.base)], check=True)
        self.mount_as_user(upper, work, target)
        self.stack.callback(self._python, f"cowfs.umount({str(target)!r})")
        return mounts.Mounted(self.impl, target, [layer.path for layer in self.lowers], upper, work)

    def mount_as_user(self, upper: Path, work: Path, target: Path) -> None:
        row = ", row=4096" if self.impl == "row" else ""
        self._python(
            f"cowfs.mount({[str(layer.path) for layer in self.lowers]!r}, {str(target)!r}, upper={str(upper)!r},"
            f" work={str(work)!r}, allow_other=True{row})"
        )

    @contextmanager
    def mounted_by(self, impl: str) -> Iterator[Path]:
        if impl != "row":
            with super().mounted_by(impl) as path:
                yield path
            return
        target = self.base / "mnt"
        self.mount_as_user(self.base / "upper", self.base / "work", target)
        try:
            yield target
        finally:
            self._python(f"cowfs.umount({str(target)!r})")

    def _python(self, call: str) -> None:
        done = users.run_python(f"import cowfs; {call}", HOME=str(self.base), XDG_RUNTIME_DIR=str(self.base))
        assert done.returncode == 0, done.stderr

    def carry_out(self, real: Op, as_user: bool) -> None:
        kept = list(real)
        for position, part in enumerate(TABLE[real[0]][1], 1):
            if part is MODES:
                kept[position] = real[position] | 0o700
        super().carry_out(tuple(kept), True)


Failure = tuple[tuple[str, int, int, str], list[tuple[Op, bool]]]
"""(implementation, seed and weight of the layers, their form), operations."""


def replay(failure: Failure, base: Path, compared: bool = True, kind: type[Run] = Run) -> str:
    """Carry out the operations of a failure again; '' when nothing fails now."""
    (impl, seed, weight, form), operations = failure
    run = kind(base, impl, seed, weight, form)
    try:
        for number, (op, as_user) in enumerate(operations):
            if compared:
                run.carry_out(op, as_user)
                if number % 5 == 0 or len(operations) < 30:
                    run.check()
            else:
                run.log.append((op, as_user, run.ours.do(op, as_user)))
        if compared:
            run.check()
        run.finish()
    except AssertionError as error:
        return str(error) or "assertion"
    finally:
        run.close()
        shutil.rmtree(base, ignore_errors=True)
    return ""


def shrink(failure: Failure, base: Path, again: Callable[[Failure, Path], str], seconds: float = 90.0) -> str:
    """The message of the smallest list of operations found in ``seconds`` that still fails."""
    numbers = itertools.count()
    end = time.monotonic() + seconds

    def attempt(recipe: tuple[str, int, int, str], operations: list[tuple[Op, bool]]) -> str:
        return again((recipe, operations), base / f"shrink{next(numbers)}")

    recipe, operations = failure
    message = next(filter(None, (attempt(recipe, operations) for _ in range(5))), "")
    if not message:
        return f"not reproduced by replaying (it depends on time or memory): layers {recipe}, {operations}"
    piece = max(1, len(operations) // 2)
    while time.monotonic() < end:
        at, shorter = 0, False
        while at < len(operations) and time.monotonic() < end:
            fewer = operations[:at] + operations[at + piece :]
            if found := attempt(recipe, fewer):
                operations, message, shorter = fewer, found, True
            else:
                at += piece
        if piece == 1 and not shorter:
            break
        piece = max(1, piece // 2)
    for weight in (0, 1, 2, 4, 8):
        smaller = (recipe[0], recipe[1], weight, recipe[3])
        if weight < recipe[2] and time.monotonic() < end and (found := attempt(smaller, operations)):
            recipe, message = smaller, found
            break
    return f"layers {recipe[1:]}, {len(operations)} operations: {message}"


class Equality(RuleBasedStateMachine):
    """See the module. Class attributes are set by the test that runs it."""

    base: ClassVar[Path]
    impl: ClassVar[str] = "kernel"
    form: ClassVar[str] = "trusted"
    compared: ClassVar[bool] = True
    kind: ClassVar[type[Run]] = Run
    steps: ClassVar[int] = 0
    failure: ClassVar[Failure | None] = None
    _count: ClassVar[Iterator[int]] = itertools.count()

    @classmethod
    def again(cls, failure: Failure, base: Path) -> str:
        """Replay for the shrinker; the message of what failed, or ''."""
        return replay(failure, base, cls.compared, cls.kind)

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self.failed = False

    @initialize(seed=st.integers(0, 2**20), weight=st.integers(0, 25))
    def start(self, seed: int, weight: int) -> None:
        self.run = self.kind(type(self).base / f"run{next(Equality._count)}", self.impl, seed, weight, self.form)
        self.done = 0

    @rule(op=OPS, as_user=st.sampled_from((False, False, False, True)))
    def step(self, op: Op, as_user: bool) -> None:
        assert self.run is not None
        try:
            self._step(op, as_user)
        except BaseException:
            self.failed = True
            self._blame()
            raise

    def _blame(self) -> None:
        """Remember what failed, for the shrinker."""
        if self.run is not None:
            type(self).failure = (self.run.recipe, [(op, user) for op, user, _ in self.run.log])

    def _step(self, op: Op, as_user: bool) -> None:
        assert self.run is not None
        type(self).steps += 1
        self.done += 1
        if self.compared:
            self.run.step(op, as_user)
            if self.done % CHECK_EVERY == 0:
                self.run.check()
        else:
            paths = existing(str(self.run.mounted.path))
            dirs = [""] + [
                p
                for p in paths[1:]
                if (self.run.mounted.path / p).is_dir() and not (self.run.mounted.path / p).is_symlink()
            ]
            real = concrete(op, paths, [p for p in dirs if p.count("/") < 3])
            self.run.log.append((real, as_user, self.run.ours.do(real, as_user)))

    def teardown(self) -> None:
        if self.run is None:
            return
        try:
            if not self.failed:
                if self.compared:
                    self.run.check()
                self.run.finish()
        except BaseException:
            self._blame()
            raise
        finally:
            self.run.close()
            shutil.rmtree(self.run.base, ignore_errors=True)


def run_machine(machine: type[Equality], steps: int, seed: int, per_run: int = STEPS_A_RUN) -> None:
    """Run ``machine`` until it made ``steps`` steps; each batch has its own seed, derived from ``seed``."""
    machine.steps = 0
    batch = 0
    while machine.steps < steps:
        wanted = max(1, -(-(steps - machine.steps) // per_run))
        hypothesis.seed(seed + batch)(machine)
        machine.failure = None
        chosen = settings(
            max_examples=wanted,
            stateful_step_count=per_run,
            deadline=None,
            database=None,
            print_blob=False,
            report_multiple_bugs=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        try:
            with redirect_stdout(io.StringIO()):
                run_state_machine_as_test(machine, settings=chosen)
        except BaseException as error:
            if machine.failure is None or not isinstance(error, Exception):
                raise
            small = shrink(machine.failure, machine.base, machine.again)
            raise AssertionError(f"{small}\n\nfirst seen as: {str(error)[:2000]}") from None
        batch += 1
    assert machine.steps >= steps
