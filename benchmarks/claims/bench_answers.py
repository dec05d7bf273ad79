"""Claim: a verb that only looks answers within 2.5 times of Python's own start, and `cowfs-overlayfs` within 100 ms.

This is the price of each call in a shell prompt, a completion or a script. Every command is a process of its own, its output
thrown away; Python's bare start (``python -c pass``) is measured between them. tests/cli/test_cli_modules.py tests the
cause, the modules that each verb imports, without a clock. `cowfs-overlayfs` is timed from its command to the first listing of
its mount. With the claim ``store_start`` (prepare, mount and ls, beside podman) these are the times of the command:
``python -m benchmarks answers store_start``, in an environment into which cowfs was installed from a wheel (in an editable one Python's own
start is longer, and the ratios look better than they are).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, is_mounted, timed, unmount
from ..lab.peers import cowfs_env
from ..lab.stores import COW, opened

PYTHON = "python -c pass"
LOOKING = (
    "cowfs --version", "cowfs --help", "cowfs ls", "cowfs stat base", "cowfs diff base", "cowfs df", "cowfs usage base",
    "cowfs cat base:/file", "cowfs ls base:/", "cowfs find base", "cowfs du base",
)  # fmt: skip
"""The last four open the store with its driver."""
TRYING = ("cowfs info", "cowfs doctor")
"""They try each driver and the host, and have no bar."""
OVERLAYFS = "cowfs-overlayfs"
PEERS = ("podman --version", "buildah --version", "git --version")
SUBJECTS = (PYTHON, *LOOKING, *TRYING, OVERLAYFS, *PEERS)


def _fill(top: Path) -> None:
    (top / "file").write_text("x")


def measure(lab: Lab) -> None:
    with opened(lab, COW, 1 << 30) as opened_:
        opened_.base("base", _fill)
        env = {**cowfs_env(), "COWFS_ROOT": str(opened_.root)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # as in an installed cowfs
        for _, name in lab.rounds(lab.wanted(SUBJECTS), 8 * lab.profile.rounds):
            with lab.trying(name):
                if name == OVERLAYFS:
                    _overlayfs(lab, env)
                    continue
                program, *words = name.split()
                if name in PEERS and not shutil.which(program):
                    raise SkipSubject(f"{program} is not installed")
                argv = {
                    "python": [sys.executable, "-c", "pass"],
                    "cowfs": [
                        sys.executable,
                        "-c",
                        "import sys; from cowfs.cli import command; sys.exit(command())",
                        *words,
                    ],
                }.get(program, [program, *words])

                def answer(argv: list[str] = argv) -> None:
                    done = subprocess.run(
                        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
                    )
                    assert done.returncode in (0, 8)  # 8: doctor found something missing

                lab.record("time", name, timed(answer))


def _overlayfs(lab: Lab, env: dict[str, str]) -> None:
    at, place = lab.folder("mnt"), lab.folder("overlayfs")
    for name in ("lower", "upper", "work"):
        (place / name).mkdir()
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    program = "import sys; from cowfs.cli.handover import main; sys.exit(main())"

    def answer() -> None:
        argv = [sys.executable, "-c", program, "-o", options, str(at)]
        subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        os.listdir(at)

    try:
        lab.record("time", OVERLAYFS, timed(answer))
    finally:
        if is_mounted(at):
            unmount(at)


CLAIM = Claim(
    name="answers",
    title="from the command to its answer",
    why="Completion, prompts and scripts call a looking verb for each thing they ask.",
    metrics=(Metric(name="time", title="one command"),),
    subjects=SUBJECTS,
    measure=measure,
    bars=tuple(
        Bar(metric="time", subject=name, against=PYTHON, at_most=2.5, says=f"{name}, of Python's bare start")
        for name in LOOKING
    )
    + (Bar(metric="time", subject=OVERLAYFS, at_most=0.1, says="cowfs-overlayfs until its mount lists"),),
    topic="store",
)


def test_answers(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
