"""Runs the claims under pytest-benchmark: ``pytest benchmarks --benchmark-only [--bench-profile quick]``.

Without ``--benchmark-only`` (an ordinary test run over the whole repository) nothing is collected here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .lab.claim import Claim, Key, Result
from .lab.measure import Lab, SkipClaim, enter_private_namespace
from .lab.profiles import PROFILES
from .lab.replay import clock, key_id, keys, player
from .lab.suite import DEFAULT_WORK


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-profile", choices=sorted(PROFILES), default="quick", help="sizes of the benchmarks")
    parser.addoption("--bench-work", type=Path, default=DEFAULT_WORK, help="folder on the disk to measure")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if not parent.config.getoption("--benchmark-only", False):
        return None
    patterns = parent.config.getini("python_files")
    if (
        file_path.name.startswith("bench_")
        and file_path.suffix == ".py"
        and not any(file_path.match(p) for p in patterns)
    ):
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    claim = getattr(metafunc.module, "CLAIM", None)
    if isinstance(claim, Claim) and "key" in metafunc.fixturenames:
        profile = PROFILES[metafunc.config.getoption("--bench-profile")]
        metafunc.parametrize("key", keys(claim, profile), ids=key_id)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and "key" in call.params:
            metric, _, x = call.params["key"]
            claim: Claim = item.module.CLAIM  # type: ignore[attr-defined]
            unit = next(m.unit for m in claim.metrics if m.name == metric)
            group = f"{claim.name}: {metric}{'' if x is None else f' @ {x:g}'} [{unit or 'count'}]"
            item.add_marker(pytest.mark.benchmark(timer=clock, group=group))


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    config = request.config
    try:
        enter_private_namespace()
        with Lab(PROFILES[config.getoption("--bench-profile")], config.getoption("--bench-work").resolve()) as made:
            yield made
    except SkipClaim as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest, lab: Lab) -> Result:
    return lab.measure(request.module.CLAIM)


@pytest.fixture
def replay(result: Result, benchmark: Callable[..., object]) -> Callable[[Key], None]:
    """Plays the samples of one key into pytest-benchmark; skips with the subject's reason where there are none."""

    def play(key: Key) -> None:
        samples = result.samples.get(key)
        if not samples:
            pytest.skip(result.skipped.get(key[1]) or "; ".join(result.notes) or "not measured for this subject")
        steps = player(samples)
        benchmark.extra_info.update(values=samples, notes=result.notes)  # type: ignore[attr-defined]
        benchmark.pedantic(lambda: next(steps), rounds=len(samples), iterations=1)  # type: ignore[attr-defined]

    return play
