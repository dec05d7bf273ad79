"""Man pages are written from the parsers when a wheel is built, and installed to share/man/man1; all else is in pyproject.toml."""

from __future__ import annotations

import glob
import os
import subprocess
import sys

from setuptools import Distribution, setup
from setuptools.command.build import build

PAGES = "build/man1"


class Build(build):
    """The build, with the pages before all else."""

    def run(self) -> None:
        here = os.path.dirname(os.path.abspath(__file__))
        subprocess.run([sys.executable, "-B", "-m", "cowfs.cli.manual", PAGES], cwd=here, check=True)
        distribution: Distribution = self.distribution
        distribution.data_files = [("share/man/man1", sorted(glob.glob(f"{PAGES}/*.1")))]
        super().run()


setup(cmdclass={"build": Build}, data_files=[("share/man/man1", [])])
