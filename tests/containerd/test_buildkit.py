"""BuildKit's own daemon with its containerd worker on the snapshotter: RUN steps, a cache mount, a second build from the cache.

BuildKit is in no package of Debian; where ``COWFS_CONTAINERD_BIN`` (test_real.py) has buildkitd and buildctl, it is tested. ``.ci/engines`` builds them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import registry
from support.containerd import (
    BIN,
    Containerd,
    Snapshotter,
    check,
    environment,
    image_of_busybox,
    needs_containerd,
)
from support.daemon import wait_for

pytestmark = [
    pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"),
    pytest.mark.skipif(
        not BIN or not os.path.exists(f"{BIN}/buildkitd"),
        reason="COWFS_CONTAINERD_BIN has no buildkitd (see this module)",
    ),
]

CONFIG = """\
root = "{base}/root"
[grpc]
  address = ["unix://{base}/sock"]
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = "{containerd}/c.sock"
  snapshotter = "cowfs"
  namespace = "buildkit"
  networkMode = "host"
[registry."{registry}"]
  http = true
"""

DOCKERFILE = """\
FROM {registry}/bb:1
COPY hello /data/hello
RUN cat /data/hello > /data/again && rm /data/file
RUN --mount=type=cache,target=/cache echo x >> /cache/n && wc -l < /cache/n > /count
RUN mkdir /made && chmod 1777 /made && mv /data/again /made/moved && rm -r /data && mkdir /data && echo new > /data/new
"""


class BuildKit:
    """One buildkitd, with an image in a registry to begin with."""

    def __init__(self, base: Path, engine: Containerd) -> None:
        base.mkdir()
        self.base, self.engine = base, engine
        self.registry, self.address = registry.start(base, "registry")
        (base / "image.tar").write_bytes(image_of_busybox())
        name = f"{self.address}/bb:1"
        engine.ctr("image", "import", "--snapshotter", "cowfs", base / "image.tar")
        engine.ctr("images", "tag", "docker.io/library/bb:1", name)
        engine.ctr("images", "push", "--plain-http", name)
        engine.ctr("images", "rm", "--sync", name, "docker.io/library/bb:1")
        config = base / "config.toml"
        config.write_text(CONFIG.format(base=base, containerd=engine.base, registry=self.address))
        with open(base / "log", "wb") as log:
            command = [f"{BIN}/buildkitd", "--config", str(config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        wait_for(lambda: self.control("debug", "workers", check=False).returncode == 0, "buildkitd")

    def control(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [f"{BIN}/buildctl", "--addr", f"unix://{self.base}/sock", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert not check or done.returncode == 0, done.stdout + done.stderr + (self.base / "log").read_text()[-3000:]
        return done

    def build(self, context: Path, name: str) -> str:
        """Build an image and import it for ctr; the words of the build."""
        archive = self.base / "built.tar"
        where = ["--local", f"context={context}", "--local", f"dockerfile={context}"]
        output = ["--output", f"type=docker,name={name},dest={archive}", "--progress", "plain"]
        told = self.control("build", "--frontend", "dockerfile.v0", *where, *output)
        self.engine.ctr("image", "import", "--snapshotter", "cowfs", archive)
        return told.stdout + told.stderr

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.registry.terminate()
        self.registry.wait(60)


@pytest.fixture(params=[(), ("--storage-opt", "size=64M")], ids=["free", "limited"])
def buildkit(
    make_snapshotter: Callable[..., Snapshotter], scratch: Path, request: pytest.FixtureRequest
) -> Iterator[BuildKit]:
    needs_containerd()
    number = len(request.param)
    engine = Containerd(scratch / f"bkc{number}", make_snapshotter("-s", "overlay", *request.param).start()).start()
    made = BuildKit(scratch / f"bk{number}", engine)
    yield made
    made.stop()
    engine.clean_up()


def test_a_build_with_a_cache_mount_and_one_from_the_cache(buildkit: BuildKit, tmp_path: Path) -> None:
    engine, snapshotter = buildkit.engine, buildkit.engine.snapshotter
    (tmp_path / "hello").write_text("hello\n")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.format(registry=buildkit.address))
    for text, count in (("hello\n", "1"), ("again\n", "2")):
        (tmp_path / "hello").write_text(text)
        buildkit.build(tmp_path, "docker.io/library/built:1")
        words = ["run", "--rm", "--snapshotter", "cowfs", "docker.io/library/built:1", f"c{count}", "sh", "-c"]
        out = engine.ctr(*words, "ls /data; cat /made/moved /count /data/new; stat -c %a /made").stdout
        assert out == f"new\n{text}{count}\nnew\n1777\n", "the cache mount lasts from one build to the next"
    assert "CACHED" in buildkit.build(tmp_path, "docker.io/library/built:1")
    buildkit.control("prune", "--all")
    engine.ctr("images", "rm", "--sync", "docker.io/library/built:1")
    for name in engine.ctr("leases", "ls", "-q", namespace="buildkit").stdout.split():
        engine.ctr("leases", "rm", "--sync", name, namespace="buildkit")
    buildkit.process.terminate()
    buildkit.process.wait(60)
    with open("/proc/self/mounts", encoding="utf-8") as file:
        assert not [line for line in file if str(snapshotter.root) in line]
    engine.stop()
    assert snapshotter.stop() == 0
    assert check(snapshotter.root) == []
