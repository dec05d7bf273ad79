"""The matrix of docs/drivers.md is what pytest collects: each driver passes each kind of test, or the table says why not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.drivers import ALL

TOP = Path(__file__).parents[2]

#: row of the table -> (module, the tests of a driver in what is collected)
ROWS = {
    "conformance suite": ("tests/drivers/test_{}.py", r"::Test\w+::test_a_child_shows_its_parent"),
    "model check": ("tests/store/test_machine.py", r"::test_a_store_agrees_with_plain_copies\[{}\]"),
    "random histories": ("tests/store/test_history.py", r"::test_a_store_stays_what_a_plain_directory_is\[{}-root\]"),
    "hostile layers": (
        "tests/store/test_hostile_layers.py",
        r"::test_each_is_refused_in_one_line_and_nothing_outside_changes\[{}\]",
    ),
    "kills": ("tests/store/test_faults.py", r"::test_a_kill_between_two_steps_leaves_a_whole_state\[{}-commit\]"),
    "full disk": ("tests/store/test_full.py", r"::test_a_full_disk_loses_nothing\[{}-65536-commit\]"),
    "no inodes": ("tests/store/test_full.py", r"::test_a_host_without_inodes_loses_nothing\[0-commit-{}\]"),
}


def test_the_table_is_what_runs() -> None:
    modules = sorted({module.format(driver) for module, _ in ROWS.values() for driver in ALL})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", *modules],
        cwd=TOP, capture_output=True, text=True, check=True,
    )  # fmt: skip
    page = (TOP / "docs/drivers.md").read_text()
    head = re.search(r"^\| tests \|(.*)\|$", page, re.MULTILINE)
    assert head is not None and tuple(name.strip(" `") for name in head[1].split("|")) == ALL
    for name, (module, pattern) in ROWS.items():
        told = re.search(rf"^\| {name}[^|]*\|(.*)\|$", page, re.MULTILINE)
        assert told is not None, name
        for driver, cell in zip(ALL, told[1].split("|"), strict=True):
            found = re.search(re.escape(module.format(driver)) + pattern.format(driver), done.stdout) is not None
            assert found or cell.strip().startswith(("none", "own")), f"{name} of {driver}: {cell}"
