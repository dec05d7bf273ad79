"""How the command prints, and its completion scripts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from support.command import ROOT, Run, environment, run_module

from cowfs.cli import VERBS, completion, main, parser_of, reference
from cowfs.cli.output import Tree, shown
from cowfs.model import Change
from cowfs.mounting.request import find_layers

SHAPES = completion.shapes({name: verb.summary for name, verb in VERBS.items()}, parser_of)


@given(st.binary())
def test_names_cannot_harm_a_terminal(name: bytes) -> None:
    """Any bytes are shown as printable text."""
    assert shown(name).isprintable()


def test_tree_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    tree = Tree()
    for path, kind, size in ((b"a/b/c", "added", 2048), (b"a/b/d", "deleted", 99), (b"e", "changed", 7)):
        tree.add(Change(path=path, kind=kind, type="file", size=size, what=frozenset({"mode"})))
    assert list(tree.lines(2)) == [
        "/  +1 ~1 -1  2 KiB",
        "  a/b  +1 -1  2 KiB",
        "    c  +1  2 KiB",
        "    d  -1",
        "  e  ~1",
    ]


def test_layers_sort_by_number(tmp_path: Path) -> None:
    for name in ("10-b", "2-a", "1", "x10", "x9", ".hidden", "01-z"):
        (tmp_path / name).mkdir()
    (tmp_path / "README").write_text("not a layer")
    names = [Path(layer).name for layer in find_layers(str(tmp_path))]
    assert names == ["01-z", "1", "2-a", "10-b", "x9", "x10"] or names == ["1", "01-z", "2-a", "10-b", "x9", "x10"]


def test_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in VERBS:
        assert f"\n  {name} " in text
    assert main([]) == 2


def test_help_of_a_verb_by_the_word_help() -> None:
    assert run_module("cowfs", "help", "mount").stdout.startswith("usage: cowfs mount")


def test_every_option_is_completed() -> None:
    """Each script names each verb and each of its options."""
    scripts = {shell: make(SHAPES) for shell, make in completion.SHELLS.items()}
    for name in VERBS:
        for action in parser_of(name)._actions:
            for option in action.option_strings:
                assert option in scripts["bash"]
                assert f"'*{option}[" in scripts["zsh"]
                fish = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                assert fish in scripts["fish"]
        assert f"-a {name} " in scripts["fish"]


@pytest.mark.parametrize("shell", sorted(completion.SHELLS))
def test_script_is_valid(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(completion.SHELLS[shell](SHAPES))
    subprocess.run([program, "-n" if shell != "fish" else "--no-execute", script], check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cowfs", "um"], {"umount"}),
        (["cowfs", "mount", "--eph"], {"--ephemeral"}),
        (["cowfs", "mount", "--io", ""], {"cached", "passthrough"}),
        (["cowfs", "completion", ""], {"bash", "fish", "zsh"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    line = " ".join(f"'{word}'" for word in words)
    script = f"""
compopt() {{ :; }}
{completion.bash(SHAPES)}
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
_cowfs; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert set(done.stdout.split()) == expected


def test_bash_completes_mount_points(cowfs: Run, stack: Path, mnt: Path, tmp_path: Path) -> None:
    """umount is offered what is mounted."""
    import sys

    (tmp_path / "cowfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m cowfs "$@"\n')
    (tmp_path / "cowfs").chmod(0o755)
    cowfs("mount", stack, mnt, "--read-only")
    script = f'{completion.bash(SHAPES)}\nCOMP_WORDS=(cowfs umount ""); COMP_CWORD=2\n_cowfs; printf "%s\\n" "${{COMPREPLY[@]}}"'
    environ = environment()
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environ, cwd=tmp_path)
    assert str(mnt) in done.stdout.split()


def test_reader_that_stops_early_is_no_error(cowfs: Run, stack: Path, mnt: Path) -> None:
    """`cowfs diff | head -1` ends quietly."""
    import sys

    cowfs("mount", stack, mnt)
    for number in range(3000):
        (mnt / f"file-with-a-long-name-{number:05}").touch()
    command = f"{sys.executable} -m cowfs diff {mnt} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_reference_is_what_the_parsers_say() -> None:
    """docs/cli.md is written anew with: python -m cowfs.cli.reference > docs/cli.md"""
    assert (ROOT / "docs/cli.md").read_text() == reference.reference()


def test_reference_lists_every_exit_status() -> None:
    from cowfs import errors

    codes = {getattr(errors, name).exit_code: name for name in errors.__all__ if name != "CowfsError"}
    listed = dict(reference.STATUSES)
    for code, name in codes.items():
        assert listed[code].startswith(name)
