"""Kubernetes' side: pods by crictl through containerd's CRI plugin, with limits by annotation.

crictl and the kubelet are in no package of Debian; where ``COWFS_CONTAINERD_BIN`` (test_real.py) or the PATH has them, they are used. ``.ci/engines``
builds them.

Pods here have the host's network: no CNI plugin is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import images
from support.containerd import Containerd, Snapshotter, check, environment, image_of_busybox, needs_containerd
from support.daemon import busybox_tar, wait_for

pytestmark = [
    pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"),
    pytest.mark.skipif(
        shutil.which("crictl", path=environment()["PATH"]) is None, reason="no crictl here (see this module)"
    ),
]

PAUSE = "docker.io/library/pause:1"

CRI_2 = """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "cowfs"
    disable_snapshot_annotations = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = ["cowfs.io/*"]
      container_annotations = ["cowfs.io/*"]
"""

CRI_3 = """
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "cowfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    pod_annotations = ["cowfs.io/*"]
    container_annotations = ["cowfs.io/*"]
"""


class Cri(Containerd):
    """containerd with its CRI plugin."""

    def config(self) -> str:
        text = super().config()
        lines = [line for line in text.splitlines() if not line.startswith("disabled_plugins")]
        more = CRI_2 if lines[0] == "version = 2" else CRI_3
        return "\n".join(lines) + more.format(pause=PAUSE)

    def crictl(self, *words: object, check: bool = True) -> str:
        address = f"unix://{self.base}/c.sock"
        command = ["crictl", "-r", address, "-i", address, "-t", "60s", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment())
        log = self.log_file.read_text()[-4000:]
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{log}"
        return (done.stdout if check else done.stdout + done.stderr).strip()

    def document(self, name: str, value: Any) -> Path:
        path = self.base / f"{name}.json"
        path.write_text(json.dumps(value))
        return path


@pytest.fixture
def cri(make_snapshotter: Callable[..., Snapshotter], scratch: Path) -> Iterator[Cri]:
    needs_containerd()
    base = scratch / "cri"
    snapshotter = make_snapshotter("-s", "overlay", f"--containerd-address=unix://{base}/c.sock").start()
    made = Cri(base, snapshotter)
    made.start()
    layers = [busybox_tar()]
    config = images.config(layers, config={"Entrypoint": ["/bin/sleep", "100000"]})
    (base / "pause.tar").write_bytes(images.docker((layers, [PAUSE], config)))
    (base / "bb.tar").write_bytes(image_of_busybox())
    for name in ("pause.tar", "bb.tar"):
        made.ctr("image", "import", "--snapshotter", "cowfs", base / name, namespace="k8s.io")
    yield made
    if made.process is not None:  # the test failed
        for each in made.crictl("pods", "-q").split():
            made.crictl("rmp", "-f", each)
    made.clean_up()


def pod(cri: Cri, name: str, annotations: dict[str, str]) -> tuple[str, Path]:
    """A pod in the host's network; (its id, its configuration)."""
    config = cri.document(
        f"pod-{name}",
        {
            "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 1},
            "annotations": annotations,
            "log_directory": str(cri.base / "logs"),
            "linux": {"security_context": {"namespace_options": {"network": 2}}},
        },
    )
    return cri.crictl("runp", config), config


def container(cri: Cri, where: tuple[str, Path], name: str, annotations: dict[str, str]) -> str:
    config = cri.document(
        f"container-{name}",
        {
            "metadata": {"name": name},
            "image": {"image": "docker.io/library/bb:1"},
            "command": ["sleep", "1000"],
            "annotations": annotations,
            "log_path": f"{name}.log",
            "linux": {},
        },
    )
    made = cri.crictl("create", where[0], config, where[1])
    cri.crictl("start", made)
    return made


def test_pods_with_limits_by_annotation(cri: Cri) -> None:
    """Of a pod, and of one container of it; exec, statistics of the file system, stop and remove."""
    limited = pod(cri, "limited", {"cowfs.io/max-size": "2M"})
    free = pod(cri, "free", {})
    one = container(cri, limited, "one", {})
    two = container(cri, free, "two", {"cowfs.io/max-size": "4M"})
    three = container(cri, free, "three", {})

    def shown(id: str) -> list[str]:
        return cri.crictl("exec", id, "sh", "-c", "df -k / | tail -1; grep ' / ' /proc/mounts | tail -1").split()

    assert (shown(one)[1], shown(two)[1]) == ("2048", "4096")
    assert "overlay" in shown(three)
    told = cri.crictl("exec", one, "sh", "-c", "dd if=/dev/zero of=/f bs=64k; rm /f; echo room", check=False)
    assert "No space left on device" in told
    assert "room" in told
    cri.crictl("exec", three, "sh", "-c", "dd if=/dev/zero of=/f bs=64k count=32")
    used = json.loads(cri.crictl("stats", "-o", "json", "--id", three))["stats"]
    assert used is not None
    for each in (limited, free):
        cri.crictl("rmp", "-f", each[0])
    assert cri.crictl("ps", "-aq") == ""
    for image in cri.crictl("images", "-q").split():
        cri.crictl("rmi", image, check=False)
    for name in cri.ctr("images", "ls", "-q", namespace="k8s.io").stdout.split():
        cri.ctr("images", "rm", "--sync", name, namespace="k8s.io", check=False)
    snapshotter = cri.snapshotter
    wait_for(lambda: snapshotter.names() == [], f"the snapshots to go: {snapshotter.names()}")
    wait_for(lambda: os.listdir(snapshotter.root / "layers") == [], "their files to go")
    wait_for(lambda: os.listdir(snapshotter.run_dir / "held") == [], "held mounts to go")
    cri.stop()
    assert snapshotter.stop() == 0
    assert check(snapshotter.root) == []


KUBELET = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: {base}/pods
podLogsDir: {base}/pod-logs
containerRuntimeEndpoint: unix://{base}/c.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
readOnlyPort: 0
healthzPort: 0
enableServer: false
makeIPTablesUtilChains: false
localStorageCapacityIsolation: false
volumePluginDir: {base}/plugins
authentication:
  webhook:
    enabled: false
authorization:
  mode: AlwaysAllow
"""


@pytest.fixture
def kubelets_places() -> Iterator[None]:
    """Directories that no option of the kubelet moves, empty and in this mount namespace only."""
    places = [Path("/var/lib/kubelet"), Path("/var/log/containers")]
    made = [place for place in places if not place.exists()]
    for place in places:
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    yield
    for place in places:
        subprocess.run(["umount", "-l", place], check=True)
    for place in made:
        place.rmdir()


@pytest.mark.skipif(
    shutil.which("kubelet", path=environment()["PATH"]) is None, reason="no kubelet here (see this module)"
)
def test_a_kubelet_runs_a_static_pod_with_a_limit(cri: Cri, kubelets_places: None) -> None:
    """The kubelet alone, without an API server: the pod's annotation reaches its container, whose write past the limit gets ENOSPC."""
    for name in ("pods", "pod-logs"):
        (cri.base / name).mkdir()
    (cri.base / "kubelet.yaml").write_text(KUBELET.format(base=cri.base))
    container = {
        "name": "web", "image": "docker.io/library/bb:1", "imagePullPolicy": "Never",
        "command": ["/bin/sh", "-c", "dd if=/dev/zero of=/big bs=64k count=256; df -k /; sleep 1000"],
    }  # fmt: skip
    metadata = {"name": "web", "namespace": "default", "annotations": {"cowfs.io/max-size": "4M"}}
    spec = {"hostNetwork": True, "containers": [container]}
    static = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    cri.document("pods/web", static)
    places = ("--config", cri.base / "kubelet.yaml", "--root-dir", cri.base / "kubelet", "--cert-dir", cri.base / "pki")
    with open(cri.base / "kubelet.log", "wb") as log:
        kubelet = subprocess.Popen(["kubelet", *places], stdout=log, stderr=log, env=environment())
    try:

        def told() -> str:
            found = list((cri.base / "pod-logs").glob("*/web/0.log"))
            return found[0].read_text() if found else ""

        wait_for(lambda: "100% /" in told(), "the container to fill its root")
        assert "No space left on device" in told()
        assert kubelet.poll() is None
    finally:
        kubelet.terminate()
        kubelet.wait(60)
        for each in cri.crictl("pods", "-q").split():
            cri.crictl("rmp", "-f", each)
    wait_for(
        lambda: not [name for name in cri.snapshotter.names("kind==active") if "sha256" not in name],
        "the snapshots to go",
    )
