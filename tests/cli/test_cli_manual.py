"""The man pages say what the parsers say, in roff that a formatter takes without a warning."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cowfs.cli import VERBS, command_of, parser_of
from cowfs.cli.manual import escaped, pages


def test_every_verb_has_a_page_with_all_its_options_and_examples() -> None:
    found = pages()
    assert set(found) == {"cowfs.1", *(f"cowfs-{name}.1" for name in VERBS)}
    for name in VERBS:
        text = found[f"cowfs-{name}.1"]
        assert f"cowfs\\-{escaped(name)}\\fR(1)" in found["cowfs.1"]
        for action in parser_of(name)._actions:
            for word in action.option_strings:
                assert f"\\fB{escaped(word)}\\fR" in text
        for example in command_of(name).examples:
            assert escaped(example) in text.splitlines()


def test_no_line_of_text_is_taken_for_a_request() -> None:
    known = {".TH", ".SH", ".SS", ".TP", ".PP", ".nf", ".fi"}
    for name, text in pages().items():
        for line in text.splitlines():
            assert not line.startswith("'"), name
            assert not line.startswith(".") or line.split()[0] in known, (name, line)


def test_the_pages_are_written_and_a_formatter_takes_them(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "cowfs.cli.manual", tmp_path / "man1"], check=False)
    assert done.returncode == 0
    assert (tmp_path / "man1/cowfs-mount.1").exists()
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("no groff")
    for path in sorted((tmp_path / "man1").iterdir()):
        shown = subprocess.run([groff, "-man", "-Tutf8", "-ww", path], capture_output=True, text=True, check=True)
        assert shown.stderr == "", path
        assert "User Commands" in shown.stdout
    assert subprocess.run([sys.executable, "-m", "cowfs.cli.manual"], capture_output=True, check=False).returncode == 2
