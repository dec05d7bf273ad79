"""Finds the claims, runs the chosen ones in one session, keeps the results as JSON, prints the table of verdicts.

A claim's module is named ``bench_<claim>.py`` and has a ``CLAIM`` and the test that pytest-benchmark shows. A module
that cannot be imported is an error, not a missing claim.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import host
from .claim import Claim, Result
from .measure import Lab, SkipClaim, enter_private_namespace
from .profiles import PROFILES, Profile
from .rows import HEADINGS, medians_rows, verdict_rows

CLAIMS = Path(__file__).resolve().parents[1] / "claims"
DEFAULT_WORK = Path(os.environ.get("COWFS_BENCH_WORK", "/var/tmp/cowfs-bench"))


def claims() -> dict[str, Claim]:
    """All claims by name, in the order of the report: topic, then name."""
    found: list[Claim] = []
    for info in pkgutil.iter_modules([str(CLAIMS)]):
        if info.name.startswith("bench_"):
            claim: Claim = importlib.import_module(f"..claims.{info.name}", __package__).CLAIM
            if info.name != f"bench_{claim.name}":
                raise ValueError(f"{info.name}.py: its claim is named {claim.name!r} (name the claim after its file)")
            found.append(claim)
    order = {"mount": 0, "store": 1, "row": 2}
    found.sort(key=lambda claim: (order[claim.topic], claim.name))
    return {claim.name: claim for claim in found}


def run_all(
    chosen: Sequence[Claim],
    lab: Lab,
    say: Callable[[str], None],
    done: Callable[[Claim, Result], None] = lambda c, r: None,
) -> list[tuple[Claim, Result]]:
    """Measures the claims one after another; those begun after the profile's total time are reported as not run."""
    begin = time.monotonic()
    results = []
    for claim in chosen:
        if time.monotonic() - begin > lab.profile.total_seconds:
            result = Result(claim.name)
            result.skipped = dict.fromkeys(claim.subjects, "not run: the profile's total time was over")
        else:
            say(f"{claim.name}: {claim.title}")
            result = lab.measure(claim)
            say(f"  {result.seconds:.1f} s")
        results.append((claim, result))
        done(claim, result)
    return results


def save(path: Path, described: dict[str, Any], profile: Profile, results: Sequence[tuple[Claim, Result]]) -> None:
    """Writes one run as JSON: host, profile, all samples (not only medians)."""
    data = {
        "format": 1,
        "host": described,
        "profile": profile.name,
        "results": [result.to_json() for _, result in results],
    }
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(data, indent=1) + "\n")
    draft.rename(path)


def load(path: Path) -> tuple[dict[str, Any], str, list[tuple[Claim, Result]]]:
    """(host, profile name, results) of a saved run; claims that no longer exist are left out."""
    data = json.loads(path.read_text())
    known = claims()
    results = [Result.from_json(row) for row in data["results"]]
    return data["host"], data["profile"], [(known[r.claim], r) for r in results if r.claim in known]


def table(rows: Sequence[Sequence[str]], headings: Sequence[str] = HEADINGS) -> str:
    """Rows as aligned plain text."""
    widths = [max(len(row[n]) for row in [headings, *rows]) for n in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headings, *rows]
    )


EXAMPLES = (
    "{prog} --list",
    "{prog} --profile quick",
    "{prog} warm_read first_write --work /mnt/disk/bench",
    "{prog} --only cowfs --only overlayfs unpack",
)
DESCRIPTION = "Measure cowfs against its peers on this host; needs root."


def configure(made: argparse.ArgumentParser) -> None:
    """Gives a parser the options that `python -m benchmarks` and `cowfs bench` share."""
    made.add_argument("claims", nargs="*", metavar="CLAIM", help="which claims to measure (default: all; see --list)")
    made.add_argument(
        "--profile",
        choices=sorted(PROFILES),
        default="quick",
        help="how much to measure (default: quick, under 3 minutes)",
    )
    made.add_argument(
        "--work",
        type=Path,
        default=DEFAULT_WORK,
        metavar="DIR",
        help=f"folder on the disk to measure (default: {DEFAULT_WORK})",
    )
    made.add_argument(
        "--only", action="append", metavar="SUBJECT", help="measure these file systems or drivers only; may be repeated"
    )
    made.add_argument("--list", action="store_true", help="print the claims and end")
    made.add_argument("--json", action="store_true", help="print the results as JSON")
    made.add_argument("--medians", action="store_true", help="print every median, not only the verdicts")
    made.add_argument("--verbose", "-v", action="store_true", help="print each sample as it is taken")
    made.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="write the report (pictures, page, results.json) here"
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SIZE=N",
        help="change a size of the profile, as rounds=3 or depths=1/8/64; may be repeated (the results say so)",
    )
    made.add_argument(
        "--results-only", action="store_true", help="with --out: write results.json, no page, no pictures"
    )
    made.add_argument(
        "--render", action="store_true", help="measure nothing: write the report of --out anew from its results.json"
    )
    made.add_argument("--merge", action="store_true", help="keep the results of other claims that --out already has")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m benchmarks") -> int:
    """Runs the command line; returns its exit status (0 measured, 1 nothing could be, 2 wrong use)."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog="examples:\n" + "\n".join("  " + example.format(prog=prog) for example in EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configure(made)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed cowfs is compiled; compiling it costs a start 100 ms
    return run_options(made.parse_args(argv), prog)


def changed(profile: Profile, words: Sequence[str]) -> Profile:
    """The profile with sizes changed by words such as ``rounds=3``; its name tells them.

    Raises:
        ValueError: no such size, or not a number.
    """
    for word in words:
        name, _, text = word.partition("=")
        old = getattr(profile, name, None)
        if not isinstance(old, int | float | tuple):
            raise ValueError(f"{name!r} is no size of a profile")
        value = tuple(map(int, text.split("/"))) if isinstance(old, tuple) else type(old)(float(text))
        sizes: dict[str, Any] = {name: value, "name": f"{profile.name}, {word}"}
        profile = replace(profile, **sizes)
    return profile


def _ended(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _render(folder: Path) -> int:
    from . import report

    described, name, results = load(folder / "results.json")
    report.write(folder, described, name, results)
    return 0


def run_options(options: argparse.Namespace, prog: str) -> int:
    """Carries out parsed options; returns the exit status."""
    known = claims()
    if options.list:
        for claim in known.values():
            print(f"{claim.name:18} {claim.title}")
        return 0
    unknown = [name for name in options.claims if name not in known]
    if unknown:
        print(f"{prog}: no claim is named {unknown[0]!r} (see {prog} --list)", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.claims] if options.claims else list(known.values())
    if options.render:
        return _render(options.out or CLAIMS.parent / "report")
    try:
        profile = changed(PROFILES[options.profile], options.set)
    except ValueError as why:
        print(f"{prog}: --set: {why}", file=sys.stderr)
        return 2

    def say(text: str) -> None:
        if options.verbose or not text.startswith("    "):
            print(text, file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, _ended)  # everything that was mounted or started is given back
    try:
        enter_private_namespace()
        with Lab(profile, options.work.resolve(), say) as lab:
            lab.restrict(options.only)
            described = host.describe(options.work)
            kept: list[tuple[Claim, Result]] = []
            target = options.out / "results.json" if options.out else None
            if target:
                options.out.mkdir(parents=True, exist_ok=True)
                if options.merge and target.exists():
                    names = {claim.name for claim in chosen}
                    kept = [pair for pair in load(target)[2] if pair[0].name not in names]
            results: list[tuple[Claim, Result]] = list(kept)

            def done(claim: Claim, result: Result) -> None:
                results.append((claim, result))
                if target:
                    order = list(known)
                    results.sort(key=lambda pair: order.index(pair[0].name))
                    save(target, described, profile, results)

            fresh = run_all(chosen, lab, say, done)
    except SkipClaim as why:
        print(f"{prog}: {why}", file=sys.stderr)
        return 1
    if options.out and not options.results_only:
        from . import report  # matplotlib is loaded only where pictures are drawn

        report.write(options.out, described, profile.name, results)
        say(f"report: {options.out}/index.md")
    if options.json:
        print(
            json.dumps(
                {"host": described, "profile": profile.name, "results": [r.to_json() for _, r in fresh]}, indent=1
            )
        )
    else:
        if options.medians or not any(claim.bars for claim, _ in fresh):
            print(table(medians_rows(fresh), ("claim", "metric", "subject", "median", "spread")))
        print(table(verdict_rows(fresh)))
        for claim, result in fresh:
            for subject, reason in result.skipped.items():
                print(f"skipped: {claim.name}: {subject}: {reason}")
            for note in result.notes:
                print(f"note: {claim.name}: {note}")
    return 0 if any(result.samples for _, result in fresh) else 1
