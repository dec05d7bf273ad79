"""Claim: a verb that only looks answers within 2.5 times of Python's own start.

This is the price of each call in a shell prompt, a completion or a script. Every command is a process of its own, its output
thrown away; Python's bare start (``python -c pass``) is measured between them. tests/cli/test_cli_modules.py tests the
cause, the modules that each verb imports, without a clock.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, timed
from ..lab.peers import cowfs_env
from ..lab.stores import COW, opened

PYTHON = "python -c pass"
LOOKING = ("cowfs --version", "cowfs --help", "cowfs ls", "cowfs stat base", "cowfs diff base", "cowfs df")
PEERS = ("podman --version", "buildah --version", "git --version")


def _fill(top: Path) -> None:
    (top / "file").write_text("x")


def measure(lab: Lab) -> None:
    with opened(lab, COW, 1 << 30) as opened_:
        opened_.base("base", _fill)
        env = {**cowfs_env(), "COWFS_ROOT": str(opened_.root)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # as in an installed cowfs
        for _, name in lab.rounds(lab.wanted((PYTHON, *LOOKING, *PEERS)), 8 * lab.profile.rounds):
            with lab.trying(name):
                program, *words = name.split()
                if name in PEERS and not shutil.which(program):
                    raise SkipSubject(f"{program} is not installed")
                argv = {
                    "python": [sys.executable, "-c", "pass"],
                    "cowfs": [sys.executable, "-c", "import sys; from cowfs.cli import main; sys.exit(main())", *words],
                }.get(program, [program, *words])

                def answer(argv: list[str] = argv) -> None:
                    subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)

                lab.record("time", name, timed(answer))


CLAIM = Claim(
    name="answers",
    title="from the command to its answer",
    why="Completion, prompts and scripts call a looking verb for each thing they ask.",
    metrics=(Metric(name="time", title="one command"),),
    subjects=(PYTHON, *LOOKING, *PEERS),
    measure=measure,
    bars=tuple(
        Bar(metric="time", subject=name, against=PYTHON, at_most=2.5, says=f"{name}, of Python's bare start")
        for name in LOOKING
    ),
    topic="store",
)


def test_answers(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
