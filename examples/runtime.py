"""A container runtime in 60 lines: an image in a store, a snapshot with a limit, an OCI bundle, runc.

    python examples/runtime.py STORE IMAGE SIZE COMMAND...

The exit status is the command's; the snapshot goes afterwards. As root; needs runc (or COWFS_RUNTIME).
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cowfs

NAMESPACES = ("pid", "ipc", "uts", "mount", "network")
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"]


def specification(image: dict[str, Any], rootfs: Path, command: list[str]) -> dict[str, Any]:
    """config.md of the OCI runtime-spec, as small as runc takes it."""
    own: dict[str, Any] = image.get("config") or {}
    held = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(rootfs)},
        "process": {
            "args": command or [*(own.get("Entrypoint") or []), *(own.get("Cmd") or ["/bin/sh"])],
            "env": own.get("Env") or ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": own.get("WorkingDir") or "/",
            "user": {"uid": 0, "gid": 0},
            "capabilities": held,
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in NAMESPACES], "maskedPaths": ["/proc/kcore", "/proc/keys"]},
    }


def run(store: cowfs.Store, image: str, size: str, command: list[str]) -> int:
    """Run a command in a fresh container of an image; its exit status."""
    key = f"runtime-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="runtime-") as directory:
        bundle = Path(directory)
        (bundle / "rootfs").mkdir()
        store.prepare(key, image, size=size)
        try:
            document = json.loads(store.config(image) or "{}")
            (bundle / "config.json").write_text(json.dumps(specification(document, bundle / "rootfs", command)))
            with store.mount(key, bundle / "rootfs"):
                runtime = os.environ.get("COWFS_RUNTIME", "runc")
                return subprocess.run([runtime, "run", "--bundle", str(bundle), key], check=False).returncode
        finally:
            store.remove(key)


if __name__ == "__main__":
    with cowfs.Store.open(sys.argv[1], create=False) as opened:
        sys.exit(run(opened, sys.argv[2], sys.argv[3], sys.argv[4:]))
