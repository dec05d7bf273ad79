"""The options that every verb has, what they show, and how far a verb is."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import environment, run_module

from cowfs.cli import VERBS, common, parser_of
from cowfs.cli.late import Late
from cowfs.cli.progress import _FIRST, Bars
from cowfs.store import Store

Cowfs = Callable[..., "subprocess.CompletedProcess[str]"]
NO_OBJECTS = {"podman", "send", "cat", "serve", "completion", "bench", "unshare"}
"""Verbs whose output is somebody else's: a command's, a file's, a script, a log."""


@pytest.fixture
def cowfs(space: Path) -> Cowfs:
    (space / "tree").mkdir()
    (space / "tree" / "file").write_text("text")
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.import_image(space / "tree", "base")
        store.prepare("work", "base")

    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        env = {**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
        done = run_module("cowfs", *arguments, env=env, cwd=space)
        assert done.returncode == status, done.stderr
        return done

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_common_options(verb: str) -> None:
    known = parser_of(verb)._option_string_actions
    for names, _ in common.COMMON:
        assert set(names) <= set(known)
    if verb not in NO_OBJECTS:
        assert {"--json", "--jsonl", "--format"} <= set(known)


OBJECTS: dict[str, tuple[tuple[object, ...], set[str]]] = {
    "prepare": (("prepare", "new", "base"), {"type", "source", "options"}),
    "view": (("view", "new", "base"), {"type", "source", "options"}),
    "commit": (("commit", "work", "v2"), {"name", "kind", "usage"}),
    "fork": (("fork", "base", "a", "b"), {"key", "mounts"}),
    "label": (("label", "work", "k=v"), {"name", "labels"}),
    "tag": (("tag", "more", "base"), {"name", "target"}),
    "tag -d": (("tag", "-d", "base"), {"name", "target"}),
    "rename": (("rename", "work", "other"), {"old", "name"}),
    "rm": (("rm", "work"), {"name"}),
    "import": (("import", "tree", "again"), {"name", "tags"}),
    "copy": (("copy", "base", "--to", "./other"), {"name"}),
    "cp": (("cp", "base:/file", "./out"), {"source", "target", "bytes", "objects"}),
    "export": (("export", "base", "./x.tar"), {"exported", "file", "format"}),
    "snapshot": (("snapshot", "work", "s"), {"name", "kind"}),
    "gc": (("gc",), {"directories", "records"}),
    "prune": (("prune",), {"removed", "bytes"}),
    "check": (("check",), {"problems", "snapshots"}),
    "df": (("df",), {"committed", "host"}),
    "info": (("info",), {"driver", "snapshots"}),
    "doctor": (("doctor",), {"state", "about", "what", "remedy"}),
    "ls": (("ls",), {"name", "tags"}),
    "find": (("find", "base"), {"path", "type"}),
    "du": (("du", "base"), {"path", "bytes"}),
    "diff": (("diff", "base", "work"), set()),
    "stat": (("stat", "base"), {"name", "id"}),
    "tree": (("tree",), {"name", "children"}),
    "log": (("log", "work"), {"name", "kind"}),
    "images": (("images",), {"tag", "layers"}),
    "events": (("events", "--since", "0"), {"seq", "type", "action"}),
    "tls": (("tls", "init", "./certs"), {"directory", "ca"}),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_json_is_an_array_of_objects_of_every_verb(cowfs: Cowfs, case: str) -> None:
    """Also of those that tell of one thing: a program that reads one verb reads all."""
    arguments, keys = OBJECTS[case]
    if case == "tls":
        pytest.importorskip("cryptography")
    told = json.loads(cowfs(*arguments, "--json", status=8 if case == "doctor" and os.geteuid() else 0).stdout)
    assert isinstance(told, list)
    assert told or case == "diff"
    for one in told:
        assert keys <= set(one)


@pytest.mark.parametrize("case", OBJECTS)
def test_jsonl_is_an_object_a_line_of_every_verb(cowfs: Cowfs, case: str) -> None:
    arguments, keys = OBJECTS[case]
    if case == "tls":
        pytest.importorskip("cryptography")
    lines = cowfs(*arguments, "--jsonl", status=8 if case == "doctor" and os.geteuid() else 0).stdout.splitlines()
    assert lines or case == "diff"
    for line in lines:
        told = json.loads(line)
        assert isinstance(told, dict)
        assert keys <= set(told)


def test_umount_and_mount_tell_what_they_did(run_directory: Path, can_mount: None, cowfs: Cowfs, space: Path) -> None:
    (space / "mnt").mkdir()
    mounted = json.loads(cowfs("mount", "--key", "work", space / "mnt", "--jsonl").stdout)
    assert mounted["mountpoint"] == str(space / "mnt")
    lines = cowfs("logs", "work", "--json").stdout
    assert json.loads(lines) == [] or "line" in json.loads(lines)[0]
    told = json.loads(cowfs("umount", space / "mnt", "--json").stdout)
    assert told == [{"mountpoint": str(space / "mnt"), "unmounted": True, "error": None}]
    (space / "mnt2").mkdir()
    cowfs("mount", "--key", "work", space / "mnt")
    done = cowfs("umount", space / "mnt2", space / "mnt", "--jsonl", status=3)
    wrong, right = map(json.loads, done.stdout.splitlines())
    assert (wrong["unmounted"], right["unmounted"]) == (False, True)
    assert "nothing is mounted" in wrong["error"]


def test_a_name_that_is_no_utf8_is_there_exactly(run_directory: Path, cowfs: Cowfs, space: Path) -> None:
    mnt = os.fsencode(space) + b"/m\xff"
    os.mkdir(mnt)
    command: list[str | bytes] = [sys.executable, "-m", "cowfs", "mount", "--key", "work", mnt, "--json"]
    env = {**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
    (told,) = json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    from base64 import b64decode

    assert b64decode(told["mountpoint_b64"]) == mnt
    found = [one for one in json.loads(cowfs("mounts", "--json").stdout) if "mountpoint_b64" in one]
    assert [b64decode(one["mountpoint_b64"]) for one in found] == [mnt]
    subprocess.run([sys.executable, "-m", "cowfs", "umount", mnt], env=env, check=True)


def test_verbose_and_debug_show_what_is_logged(cowfs: Cowfs) -> None:
    assert cowfs("prepare", "a", "base", "--progress", "none").stderr == ""
    assert "cowfs.store: snapshot prepare b" in cowfs("-v", "prepare", "b", "base").stderr
    wrong = cowfs("rm", "nope", "-D", status=3).stderr
    assert "Traceback" in wrong
    assert wrong.splitlines()[-1].startswith("cowfs: no snapshot or tag 'nope'")


def test_quiet_leaves_out_notes(cowfs: Cowfs) -> None:
    assert "removed 0 snapshots" in cowfs("prune").stderr
    assert cowfs("prune", "-q").stderr == ""
    assert cowfs("log", "work", "-q").stdout.splitlines()[0] == "work"


def test_progress_for_programs_is_objects(cowfs: Cowfs, space: Path) -> None:
    lines = cowfs("import", "tree", "again", "--progress", "json").stderr.splitlines()
    told = [json.loads(line) for line in lines]
    assert told[-1]["end"] is True
    assert all({"what", "done", "total", "seconds"} <= set(one) for one in told)
    assert cowfs("import", "tree", "quick", "--progress", "none").stderr == ""
    (last,) = [json.loads(line) for line in cowfs("du", "base", "--progress", "json").stderr.splitlines()][-1:]
    assert (last["end"], last["what"]) == (True, "du base")
    failed = cowfs("import", "nowhere", "--progress", "json", status=3).stderr.splitlines()
    assert json.loads(failed[0])["end"] is True
    assert failed[1].startswith("cowfs: ")


def arguments(**more: object) -> argparse.Namespace:
    return argparse.Namespace(**{"progress": "auto", "quiet": False, **more})


def wait_for(text: str, read: Callable[[], str]) -> str:
    end = time.monotonic() + 60
    while text not in (found := read()):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_a_verb_that_cannot_count_tells_how_long_it_is_at_work(capfd: pytest.CaptureFixture[str]) -> None:
    read = Told(capfd)
    with Bars(arguments(progress="plain"), "commit work"):
        wait_for("commit work: 1 s\n", read)
    with Bars(arguments(progress="plain")) as bars:
        bars("layer\x1b[2J", 5 << 20, 10 << 20)
        assert "layer\\x1b[2J: 50%, 5 MiB, " in wait_for("50%", read)  # no control character reaches a terminal


def test_a_bar_is_drawn_at_a_terminal_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COWFS_PROGRESS", raising=False)
    master, slave = pty.openpty()
    before, kept = os.dup(2), sys.stderr
    try:
        os.dup2(slave, 2)
        monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(slave), "w"))
        monkeypatch.setitem(sys.modules, "rich.console", None)
        seen: list[bytes] = []
        reader = threading.Thread(target=lambda: _drain(master, seen), daemon=True)
        reader.start()
        with Bars(arguments()) as bars:
            bars("layer", 3 << 20, 4 << 20)
            wait_for("layer [", lambda: b"".join(seen).decode())
        wait_for("\r\x1b[K", lambda: b"".join(seen).decode()[-4:])
        assert "75%, 3 MiB" in b"".join(seen).decode()
    finally:
        sys.stderr.close()
        monkeypatch.setattr(sys, "stderr", kept)
        os.dup2(before, 2)
        os.close(before)
        os.close(slave)
        reader.join(10)


def _drain(master: int, seen: list[bytes]) -> None:
    try:
        while part := os.read(master, 4096):
            seen.append(part)
    except OSError:
        os.close(master)


def test_rich_draws_where_it_is_installed() -> None:
    pytest.importorskip("rich")
    program = (
        "import argparse, sys, time\n"
        "from cowfs.cli.progress import Bars\n"
        "with Bars(argparse.Namespace(progress='bar', quiet=False)) as bars:\n"
        "    bars('layer [bold]', 1 << 20, 2 << 20); time.sleep(2)\n"
        "assert 'rich.progress' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_quiet_and_none_start_no_thread() -> None:
    before = threading.active_count()
    for how in (arguments(quiet=True), arguments(progress="none")):
        with Bars(how, "x") as bars:
            bars("what", 1, 2)
            assert not bars.on
            assert threading.active_count() == before


class Told:
    """All that was told on the standard error output since the last :meth:`forget`."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self._text = ""

    def __call__(self) -> str:
        self._text += self._capfd.readouterr().err
        return self._text

    def forget(self) -> None:
        self._text = ""


def test_progress_without_a_terminal_begins_after_a_second(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line is there long before the fifth second, where it began before; --progress json goes on while nothing is counted."""
    read = Told(capfd)
    monkeypatch.setenv("COWFS_PROGRESS", "none")
    assert not Bars(arguments(), "squash work").on
    monkeypatch.delenv("COWFS_PROGRESS")
    with Bars(arguments(), "squash work"):
        assert re.match(r"squash work: [1-9]\d* s\n", wait_for("\n", read))
    assert _FIRST["auto"] == 1.0
    read.forget()
    with Bars(arguments(progress="json"), "squash work"):
        wait_for('"seconds": 1.', read)


def test_a_looking_verb_tells_from_the_first_second_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line says the seconds since it began; a way that begins at once does so; with -q or none there is no thread."""
    read = Told(capfd)
    monkeypatch.delenv("COWFS_PROGRESS")
    with Late(arguments(), "diff base") as late:
        assert "find base" not in wait_for("diff base: ", read)
        assert re.match(r"diff base: [1-9]\d* s\n", wait_for("\n", read))
    assert list(late.until_shown(iter("ab"))) == ["a", "b"]
    read.forget()
    with Late(arguments(progress="json"), "find base"):
        told = wait_for("\n", read)
    assert json.loads(told.splitlines()[0])["what"] == "find base"
    wait_for('"end": true', read)
    monkeypatch.setenv("COWFS_PROGRESS", "none")
    for how in (arguments(), arguments(progress="none"), arguments(progress="auto", quiet=True)):
        with Late(how, "usage work") as late:
            assert late._thread is None


def test_each_walking_verb_tells_that_it_is_at_work(cowfs: Cowfs, space: Path) -> None:
    cowfs("prepare", "counted", "base")
    for line in (
        ("diff", "base"),
        ("diff", "base", "--stat"),
        ("find", "base"),
        ("find", "base", "-0"),
        ("usage", "counted"),
    ):
        told = [json.loads(each) for each in cowfs(*line, "--progress", "json").stderr.splitlines()]
        assert told[-1]["end"], line
        assert cowfs(*line).stdout == cowfs(*line, "--progress", "json").stdout
        assert cowfs(*line).stderr == ""


def test_at_a_terminal_lines_of_the_verb_end_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise both would be written into each other."""
    monkeypatch.delenv("COWFS_PROGRESS")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Late(arguments(), "find base") as late:
        found = late.until_shown(iter("ab"))
        assert late._thread is not None
        assert next(found) == "a"
        assert late._thread is None
        assert list(found) == ["b"]


def test_a_looking_verb_ends_at_once_and_loses_nothing(tmp_path: Path) -> None:
    """Callbacks for the exit are called, the text is written, the status is kept; with another thread alive the end is Python's own."""
    program = (
        "import atexit, sys\nfrom cowfs.cli import command\n"
        "atexit.register(lambda: print('the end'))\n"
        "sys.argv[1:] = ['mounts', '--json', *sys.argv[1:]]\n"
        "code = command()\nprint('back')\nsys.exit(code)"
    )

    def run(before: str = "", *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", before + program, *more], env=environment(), capture_output=True, text=True, check=False
        )  # fmt: skip

    done = run()
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "the end")
    assert "back" not in done.stdout
    assert run("", "--nonsense").returncode == 2
    beside = run("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n")
    assert beside.stdout.splitlines()[-2:] == ["back", "the end"]
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom cowfs.cli import command\nsys.argv[1:] = ['label', 'ls', 'a=b']\ncommand()\nprint('back')"],
        env={**environment(), "COWFS_ROOT": str(tmp_path / "none")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "back\n"  # a verb that changes something is left to Python, whatever its arguments are called
