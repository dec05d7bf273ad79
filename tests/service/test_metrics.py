"""/metrics, as promtool and Prometheus's own parser read it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest
from support.daemon import Daemon, wait_for

parser = pytest.importorskip("prometheus_client.parser", reason="the extra cowfs[daemon] is not installed")


def families(daemon: Daemon) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> values of its labels -> value."""
    status, text = daemon.request("GET", "/metrics")
    assert status == 200
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in parser.text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_figures_of_a_container_with_a_limit(engine: Daemon) -> None:
    engine.docker(
        "run", "-d", "--name", "one", "--storage-opt", "size=8M", "bb", "sh", "-c", "echo x > /x; exec sleep 1000"
    )
    wait_for(lambda: any(families(engine)["cowfs_container_used_bytes"].values()), "the container's write")
    found = families(engine)
    (used,), (limit,) = found["cowfs_container_used_bytes"].values(), found["cowfs_container_limit_bytes"].values()
    assert 0 < used < limit == 8 << 20
    assert found["cowfs_containers"] == {("running",): 1.0}
    assert found["cowfs_snapshots"][("active",)] == 1.0
    (process,) = found["cowfs_container_processes"].values()
    assert process >= 1
    assert any("LOOKUP" in key for key in found["cowfs_container_fuse_requests_total"])
    before = sum(found["cowfs_api_requests_total"].values())
    assert sum(families(engine)["cowfs_api_requests_total"].values()) > before
    daemon_free_tools(engine)
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here (Debian: prometheus; CI has it)")
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=engine.request("GET", "/metrics")[1],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def daemon_free_tools(engine: Daemon) -> None:
    """The same container as the command sees it, which asks no daemon: statistics, and a limit that changes while it runs."""
    (found,) = json.loads(engine.cowfs("stats", "--no-stream", "--json", "one").stdout)
    assert found["name"] == "one" and found["key"].startswith("container/")
    assert found["memory"] > 0 and found["pids"] >= 1 and found["cpu"] > 0
    assert found["left"]["bytes"] == (8 << 20) - found["usage"]["bytes"]
    line = engine.cowfs("stats", "--no-stream", found["container"][:12]).stdout.splitlines()[1]
    assert line.startswith("one ")
    engine.cowfs("limit", "one", "16M")
    assert "16.0M" in engine.out("exec", "one", "df", "-h", "/")
    assert engine.out("inspect", "-f", "{{.HostConfig.StorageOpt}}", "one") == "map[size:16777216]"
    engine.cowfs("limit", found["container"][:8], "--inodes", "1k")
    assert families(engine)["cowfs_container_limit_inodes"].popitem()[1] == 1000
    engine.cowfs("limit", "one", "--inodes", "none")
    assert engine.cowfs("limit", "one", "1G", "--size", "2G", check=False).returncode == 2
    assert engine.cowfs("limit", "nobody", "1G", check=False).returncode == 3
    events = engine.docker(
        "events", "--since", "1", "--until", f"{time.time():.6f}", "--filter", "type=limit", "--filter", "type=mount"
    ).stdout
    assert [line.split()[1:3] for line in events.splitlines()] == [["mount", "mount"], *[["limit", "changed"]] * 3]


def test_metrics_can_be_off(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--no-metrics").start()
    assert daemon.request("GET", "/metrics")[0] == 404
