"""Claim: a PostgreSQL cluster of a base image runs under each backend; transactions a second by pgbench.

Debian's PostgreSQL, default settings (fsync on), pgbench's TPC-B-like script, four clients. The cluster is
initialised and filled once and lies in the lower layer; each sample starts the server on a fresh writable snapshot,
runs, and stops it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..lab import databases, trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipClaim
from ..lab.peers import FO1, FO2
from ..lab.stores import COW

SCALE = 10  # pgbench: a million accounts, 150 MB


def _programs() -> Path:
    """The folder with initdb, postgres and pgbench of the newest installed version.

    Raises:
        SkipClaim: PostgreSQL is not installed, or its user is missing.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not found:
        raise SkipClaim("PostgreSQL is not installed (apt-get install postgresql)")
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        raise SkipClaim("there is no user postgres") from None
    return found[-1].parent


def _as_postgres(argv: Sequence[str | os.PathLike[str]], cwd: str = "/") -> str:
    done = subprocess.run(
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(
            f"{Path(argv[0]).name}: {' | '.join((done.stderr or done.stdout).strip().splitlines()[-3:])}"
        )
    return done.stdout


@contextlib.contextmanager
def _server(programs: Path, data: Path, sockets: Path) -> Iterator[list[str]]:
    """A running server over ``data``; yields pgbench's connection options."""
    log = sockets / "log"
    options = f"-c listen_addresses='' -c unix_socket_directories='{sockets}' -c autovacuum=off"
    _as_postgres([programs / "pg_ctl", "-D", data, "-l", log, "-w", "-t", "60", "-o", options, "start"])
    try:
        yield ["-h", str(sockets), "-U", "postgres"]
    finally:
        _as_postgres([programs / "pg_ctl", "-D", data, "-w", "-m", "fast", "stop"])


def _sockets(lab: Lab) -> Path:
    folder = lab.folder("pg")
    shutil.chown(folder, "postgres", "postgres")
    return folder


def measure(lab: Lab) -> None:
    programs = _programs()

    def build(draft: Path) -> None:
        data = draft / "data"
        data.mkdir(mode=0o700)
        shutil.chown(data, "postgres", "postgres")
        _as_postgres([programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"])
        with _server(programs, data, _sockets(lab)) as where:
            _as_postgres([programs / "pgbench", *where, "-i", "-q", "-s", str(SCALE), "postgres"])

    base = trees.built(lab, "postgres", build)
    for _, subject in lab.rounds(lab.wanted(databases.SUBJECTS), min(2, lab.profile.rounds)):
        with lab.trying(subject), databases.over(lab, subject, base, 4 << 30) as at:
            with _server(programs, at / "data", _sockets(lab)) as where:
                limits = ["-c", "4", "-j", "1", "-T", str(lab.profile.pg_seconds), "--random-seed=1"]
                told = _as_postgres([programs / "pgbench", *where, "-n", *limits, "postgres"])
            found = re.search(r"tps = ([\d.]+)", told)
            if not found:
                raise RuntimeError(f"pgbench printed no tps: {told[-200:]}")
            lab.record("transactions", subject, float(found.group(1)))


CLAIM = Claim(
    name="postgres",
    title="PostgreSQL (pgbench)",
    why="The usual database of a development or test container.",
    topic="row",
    metrics=(Metric(name="transactions", unit="1/s", title="transactions a second", higher_is_better=True),),
    subjects=databases.SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="transactions",
            subject=COW,
            against=(FO1, FO2),
            at_least=1.0,
            says="PostgreSQL transactions, overlay against fuse-overlayfs",
        ),
    ),
)


def test_postgres(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
