"""The exit status of ``docker exec`` is the process's, however late the daemon hears of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.daemon import Daemon, wait_for

SLOW = """
import sys, time
from cowfs.service.containers.manager import Containers
heard = Containers._heard
def late(self, container, message):
    time.sleep(0.5)
    heard(self, container, message)
Containers._heard = late
from cowfs.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_status_is_there_when_the_stream_ends(engine: Daemon, space: Path) -> None:
    """A client asks for it as soon as its stream has ended; the thread that watches the supervisor may be slower."""
    engine.docker("run", "-d", "--name", "on", "bb", "sleep", "1000")
    engine.stop()
    script = space / "slow.py"
    script.write_text(SLOW)
    command = [
        sys.executable,
        str(script),
        "serve",
        "--root",
        str(engine.root),
        "--run-dir",
        str(engine.run_dir),
        "-H",
        f"unix://{engine.socket}",
    ]
    with open(engine.log_file, "ab") as log:
        already = len(engine.log)
        engine.process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for(lambda: "listening on" in engine.log[already:], "the daemon")
    for code in (5, 0, 7):
        assert engine.docker("exec", "on", "sh", "-c", f"exit {code}", check=False).returncode == code
    assert json.loads(engine.out("inspect", "on"))[0]["State"]["Running"]
