"""The conformance suite as an ordinary user: own store, layers in the user form, mounts by fusermount3."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from support import users
from support.hostfs import HostFs

SUITE = """
import site

site.addsitedir("{site}")

import pytest
from pathlib import Path
from cowfs.testing import DriverSuite


class TestUnprivileged(DriverSuite):
    driver = "{driver}"
    chain_length = 12

    @pytest.fixture
    def place(self, request: pytest.FixtureRequest) -> Path:
        path = Path("{place}") / "".join(c if c.isalnum() else "-" for c in request.node.name)
        path.mkdir()
        return path
"""


@pytest.mark.parametrize("driver", ["overlay", "vfs", "row"])
def test_the_suite_passes_for_an_ordinary_user(driver: str, fs: HostFs, ordinary_user: int) -> None:
    if fs.name != "tmpfs" and (fs.name, driver) != ("ext4", "overlay"):
        pytest.skip("as a user on tmpfs, overlay on ext4, too; as root on all host file systems")
    place = fs.fresh(f"user-{driver}")
    for above in place.parents:
        if "pytest-" in str(above) and not os.stat(above).st_mode & 0o001:
            above.chmod(0o755)
    os.chown(place, ordinary_user, ordinary_user)
    suite = place / "test_suite.py"
    packages = os.path.dirname(os.path.dirname(pytest.__file__))
    suite.write_text(SUITE.format(driver=driver, place=place, site=packages))
    python, environment = users.interpreter()
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(place), str(suite)]
    environment["PYTHONPATH"] += os.pathsep + packages
    environment |= {
        "HOME": str(place),
        "XDG_RUNTIME_DIR": str(place),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(place),
    }
    done = subprocess.run(
        users.command_as(command), cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=550
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-6000:]
    passed = re.search(r"(\d+) passed", told)
    assert passed is not None
    assert int(passed[1]) > 35
