"""The same steps with ``cowfs serve`` and with Debian's dockerd in one run: the same answers, but for the differences that are listed with their reasons."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.containerd import unmount_below
from support.daemon import Daemon, clean_up, docker_environment
from support.dockerd import PlainDockerd, needs_dockerd
from support.dockersteps import AT_NEWEST, DIFFERENCES, STEPS

SECONDS = 150
"""The time of a step before it counts as hanging."""

_WAIT = 'W() { until sh -c "$1" >/dev/null 2>&1; do sleep 0.05; done; }\n'

_OF_THE_MOMENT = (
    (r"\b[0-9a-f]{64}\b", "ID"), (r"\b[0-9a-f]{12}\b", "ID"), (r"\d{4}-\d\d-\d\dT[\d:.]+Z?", "TIME"),
    (r"(About an? \w+|Less than a second|\d+ (second|minute)s?)( ago)?", "AGO"), (r"\b[\d.]+ ?[kMGT]?i?B\b", "SIZE"), (r"\(\d+%\)", "(SHARE)"),
    (r"[ \t]+", " "), (r"(?m) +$", ""), (r"\n\nRun 'docker.*", ""), (r"(?m)^See 'docker.*\n?", ""),
)  # fmt: skip


def said(line: str, host: str, place: Path, **environment: str) -> str:
    """The output and status of a line of shell, without what is of one moment or one machine: ids, times, sizes, places."""
    place.mkdir(exist_ok=True)
    with subprocess.Popen(
        ["sh", "-c", _WAIT + line], cwd=place, env=docker_environment(host, place, **environment), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text = "".join(process.communicate(timeout=SECONDS))  # the order of the two is that of the moment
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return f"hangs: {process.communicate()[0]}"
    text = text.replace(str(place), "PLACE")
    for pattern, stands_for in _OF_THE_MOMENT:
        text = re.sub(pattern, stands_for, text)
    return f"{text.strip()}\n= {process.returncode}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The oldest version of the API that is spoken, for both; with ``--thorough`` also dockerd 20.10's, and each one's newest."""
    if "told" in metafunc.fixturenames:
        versions = ["1.40", "1.41", ""] if metafunc.config.getoption("--thorough") else ["1.40"]
        metafunc.parametrize("told", versions, indirect=True, scope="module", ids=lambda version: version or "newest")


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory, busybox: bytes, request: pytest.FixtureRequest
) -> Iterator[dict[str, tuple[str, str]]]:
    """The answers of both to each step; they work side by side."""
    needs_dockerd()
    space = tmp_path_factory.mktemp("b")
    (space / "bb.tar").write_bytes(busybox)
    ours, theirs = Daemon(space / "o"), PlainDockerd(space / "t")
    try:
        ours.start()
        theirs.start()

        more = {"DOCKER_API_VERSION": request.param} if request.param else {}

        def work(host: str, place: Path) -> list[str]:
            return [said(line, host, place, **more) for line in STEPS.values()]

        with ThreadPoolExecutor(2) as threads:
            ran = (
                threads.submit(work, f"unix://{ours.socket}", space / "ours"),
                threads.submit(work, theirs.host, space / "theirs"),
            )
            answers = [each.result() for each in ran]
        yield dict(zip(STEPS, zip(*answers, strict=True), strict=True))
        assert "Traceback" not in ours.log
    finally:
        clean_up(ours)
        theirs.clean_up()
        unmount_below(space)


@pytest.mark.parametrize("step", STEPS)
def test_a_step(told: dict[str, tuple[str, str]], step: str, request: pytest.FixtureRequest) -> None:
    """As dockerd says it; a difference that is listed is still one."""
    newest = "newest" in request.node.name
    listed = {**DIFFERENCES, **(AT_NEWEST if newest else {})}
    ours, theirs = told[step]
    assert not ours.startswith("hangs"), ours
    assert not theirs.startswith("hangs"), theirs
    if step in listed:
        assert ours != theirs, f"no difference any more: {listed[step]}"
    else:
        assert ours == theirs
