"""The data directory of a Docker host, as dockerd leaves it with its drivers aufs and overlay2, made from layer tars.

Facts: moby ``layer/filestore.go`` and ``daemon/graphdriver/{aufs,overlay2}``, ``vbatts/tar-split``; and what dockerd 20.10 wrote (test_docker_host.py
has that one beside this).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

from cowfs.archive import apply_layer
from cowfs.images import chain_ids, make_config


def tar(*entries: tuple[str, str, object]) -> bytes:
    """A layer tar of (name, kind, content): kinds ``dir``, ``file``, ``symlink``, ``link``; sub-second times make PAX headers."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as out:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.mtime, info.mode = 1_600_000_000.25, 0o755 if kind == "dir" else 0o640
            data = content if isinstance(content, bytes) else b""
            if kind == "file":
                info.size, info.uid = len(data), 12
            else:
                info.type = {"dir": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE, "link": tarfile.LNKTYPE}[kind]
                info.linkname = str(content or "")
            out.addfile(info, io.BytesIO(data))
    return made.getvalue()


def split(data: bytes) -> bytes:
    """The tar-split of an archive, gzipped: what is between the files' data, and which files there are."""
    lines: list[dict[str, object]] = []
    at = 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            lines.append({"type": 2, "payload": base64.b64encode(data[at : member.offset_data]).decode()})
            lines.append({"type": 1, "name": member.name, "payload": None})
            if member.isreg() and member.size:
                lines[-1] |= {"size": member.size, "payload": base64.b64encode(bytes(8)).decode()}
            at = member.offset_data + (member.size if member.isreg() else 0)
    lines.append({"type": 2, "payload": base64.b64encode(data[at:]).decode()})
    for position, line in enumerate(lines):
        line["position"] = position
    return gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


class OldHost:
    """A data directory; :meth:`image` adds images, whose layers are shared where they are equal."""

    def __init__(self, root: Path, driver: str) -> None:
        self.root, self.driver = root, driver
        self.db = root / "image" / driver
        self.names: dict[str, dict[str, str]] = {}
        for path in (self.db / "imagedb/content/sha256", self.db / "layerdb/sha256", *self._folders()):
            path.mkdir(parents=True)

    def _folders(self) -> list[Path]:
        if self.driver == "aufs":
            return [self.root / "aufs" / name for name in ("diff", "layers", "mnt")]
        return [self.root / "overlay2" / "l"]

    def files(self, cache: str) -> Path:
        """The directory with a layer's files."""
        return self.root / "aufs/diff" / cache if self.driver == "aufs" else self.root / "overlay2" / cache / "diff"

    def image(self, name: str, *tars: bytes) -> tuple[str, list[str]]:
        """Add an image; (its id, the cache ids of its layers)."""
        diff_ids = [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in tars]
        config = make_config(diff_ids)
        id = hashlib.sha256(config).hexdigest()
        (self.db / "imagedb/content/sha256" / id).write_bytes(config)
        self.names.setdefault(name.partition(":")[0], {})[name] = f"sha256:{id}"
        (self.db / "repositories.json").write_text(json.dumps({"Repositories": self.names}))
        caches: list[str] = []
        for number, (chain, diff, data) in enumerate(zip(chain_ids(diff_ids), diff_ids, tars, strict=True)):
            record = self.db / "layerdb/sha256" / chain.partition(":")[2]
            if not record.exists():
                cache = hashlib.sha256(b"cache" + chain.encode()).hexdigest()
                record.mkdir()
                (record / "cache-id").write_text(cache)
                (record / "diff").write_text(diff)
                (record / "size").write_text(str(len(data)))
                if number:
                    (record / "parent").write_text(chain_ids(diff_ids)[number - 1])
                (record / "tar-split.json.gz").write_bytes(split(data))
                self._unpack(cache, caches, data)
            caches.append((record / "cache-id").read_text())
        return id, caches

    def _unpack(self, cache: str, below: list[str], data: bytes) -> None:
        where = self.files(cache)
        where.mkdir(parents=True)
        if self.driver == "aufs":
            subprocess.run(["tar", "-xpf", "-", "-C", str(where)], input=data, check=True, stderr=subprocess.DEVNULL)
            (where / ".wh..wh.plnk").mkdir(0o700)
            (where / ".wh..wh.aufs").touch(0o444)
            (self.root / "aufs/layers" / cache).write_text("".join(f"{name}\n" for name in reversed(below)))
            return
        apply_layer(io.BytesIO(data), str(where))
        short = cache[:26].upper()
        os.symlink(f"../{cache}/diff", self.root / "overlay2/l" / short)
        (self.root / "overlay2" / cache / "link").write_text(short)
        if below:
            names = [f"l/{(self.root / 'overlay2' / each / 'link').read_text()}" for each in reversed(below)]
            (self.root / "overlay2" / cache / "lower").write_text(":".join(names))
