"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"cowfs": ROOT / "cowfs", "cowfs_drivers": ROOT / "drivers"}


def modules() -> list[str]:
    """Every module with an example."""
    found = []
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = [package, *path.relative_to(folder).with_suffix("").parts]
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(found)


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0
