"""The example in the essay of cowfs.driver.interface, as it stands there, is a driver."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostfs import HostFs

from cowfs.driver import interface, registry
from cowfs.testing import DriverSuite


def example() -> str:
    """The program after the essay's sentence about it."""
    essay = inspect.getdoc(interface) or ""
    _, _, rest = essay.partition("is no more than this::\n")
    lines = rest.splitlines()
    program = []
    for line in lines:
        if line and not line.startswith("    "):
            break
        program.append(line)
    return textwrap.dedent("\n".join(program))


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution with the example as its only module, and the entry point that the registry finds."""
    place = tmp_path / "site"
    record = place / "essay_driver-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: essay-driver\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(f"[{registry.GROUP}]\ncopy = essay_driver:CopyDriver\n")
    (place / "essay_driver.py").write_text(example())
    monkeypatch.syspath_prepend(str(place))
    with monkeypatch.context() as context:
        context.delitem(sys.modules, "essay_driver", raising=False)
        yield


class TestEssay(DriverSuite):
    driver = "copy"
    chain_length = 16

    @pytest.fixture
    def place(self, fs: HostFs) -> Path:
        if fs.name not in ("tmpfs", "btrfs"):
            pytest.skip("its kin, the vfs driver, is tried on all host file systems")
        return fs.fresh("store")


def test_the_example_is_short() -> None:
    assert "class CopyDriver(Driver):" in example()
    assert len(example().splitlines()) < 25
