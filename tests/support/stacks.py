"""Random stacks of layers, made from one integer.

``random_stack(seed, weight, ...)`` builds up to three lower layers that use every device of the
format: whiteouts, opaque directories, types replaced by others, redirected directories and
metacopy (``trusted`` form), hard links, xattrs, special files, sparse files. It keeps to what an
overlay can express without a wrong link count: hard links live in the topmost layer.
"""

from __future__ import annotations

import random
from pathlib import Path

from .layers import EPOCH, Layer

NAMES = ("a", "b", "c", "d", "e", "long-name-" + "x" * 30)


class _Merged:
    """The tree of the layers so far: path -> kind."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}

    def dirs(self) -> list[str]:
        return ["", *sorted(path for path, kind in self.kinds.items() if kind == "dir")]

    def of(self, kind: str) -> list[str]:
        return sorted(path for path, have in self.kinds.items() if have == kind)

    def remove(self, path: str) -> None:
        for name in [p for p in self.kinds if p == path or p.startswith(path + "/")]:
            del self.kinds[name]

    def move(self, old: str, new: str) -> None:
        moved = {new + p[len(old) :]: k for p, k in self.kinds.items() if p == old or p.startswith(old + "/")}
        self.remove(old)
        self.kinds.update(moved)


def random_stack(seed: int, weight: int, base: Path, form: str = "trusted") -> list[Layer]:
    """Layers bottom first below ``base``; ``weight`` is the number of changes in each."""
    rng = random.Random(seed)
    merged = _Merged()
    layers = []
    count = rng.randint(1, 3)
    for number in range(count):
        layer = Layer(base / f"layer{number}", form)
        touched: set[str] = set()
        for _ in range(weight):
            _change(rng, layer, merged, touched, topmost=number == count - 1, bottom=number == 0)
        layers.append(layer)
    return layers


def _free(rng: random.Random, merged: _Merged) -> str:
    directory = rng.choice(merged.dirs())
    if directory.count("/") >= 2:
        directory = ""
    name = rng.choice(NAMES)
    return f"{directory}/{name}" if directory else name


def _owned(layer: Layer, path: str) -> bool:
    """Whether the layer itself already holds something at the path or above it that is no directory."""
    at = ""
    for part in path.split("/")[:-1]:
        at = f"{at}/{part}" if at else part
        full = layer.path / at
        if full.is_symlink() or (full.exists() and not full.is_dir()):
            return True
    full = layer.path / path
    return full.is_symlink() or full.exists()


def _copy_parents(layer: Layer, path: str) -> None:
    """Parents that only the layers below have become plain directories of this layer."""
    at = ""
    for part in path.split("/")[:-1]:
        at = f"{at}/{part}" if at else part
        if not (layer.path / at).exists():
            layer.dir(at, mode=0o777, mtime=EPOCH)


def _change(
    rng: random.Random, layer: Layer, merged: _Merged, touched: set[str], *, topmost: bool, bottom: bool
) -> None:
    path = _free(rng, merged)
    if _owned(layer, path):
        return
    there = merged.kinds.get(path)
    choice = rng.random()
    if there is not None and not bottom and choice < 0.25:
        _copy_parents(layer, path)
        layer.whiteout(path)
        merged.remove(path)
    elif there == "dir" and not bottom and choice < 0.40:
        _copy_parents(layer, path)
        layer.dir(path, mode=0o777, mtime=EPOCH, opaque=True)
        merged.remove(path)
        merged.kinds[path] = "dir"
    elif there == "dir" and not bottom and choice < 0.65 and layer.form == "trusted" and not _inside(layer, path):
        _redirect(rng, layer, merged, path)
    elif there == "file" and not bottom and choice < 0.5 and layer.form == "trusted":
        size = _size_below(layer, path)
        if size is not None:
            _copy_parents(layer, path)
            layer.metacopy(path, size, mode=rng.choice((0o600, 0o666)), uid=rng.choice((0, 4321)))
    elif there is None or (there != "dir" and not bottom):
        _add(rng, layer, merged, path, there, topmost=topmost)


def _inside(layer: Layer, path: str) -> bool:
    """Whether this layer already has something at or below the path, or redirects above it."""
    if (layer.path / path).exists():
        return True
    at = layer.path
    for part in path.split("/")[:-1]:
        at = at / part
        if at.exists():
            return True
    return False


def _size_below(layer: Layer, path: str) -> int | None:
    """Size of a plain file at exactly this path in the layer right below (None: not that simple)."""
    number = int(layer.path.name.removeprefix("layer"))
    if any((layer.path / part).exists() for part in path.split("/")[:1]) and "/" in path:
        return None
    for below in range(number - 1, -1, -1):
        full = layer.path.parent / f"layer{below}" / path
        parents = [layer.path.parent / f"layer{n}" / path.split("/")[0] for n in range(number)]
        if "/" in path and sum(parent.exists() for parent in parents) != 1:
            return None
        if full.is_file() and not full.is_symlink():
            import os

            if any("metacopy" in name for name in os.listxattr(full)):
                return None
            return full.stat().st_size
    return None


def _redirect(rng: random.Random, layer: Layer, merged: _Merged, path: str) -> None:
    target = rng.choice(NAMES)
    if target in merged.kinds or target == path or (layer.path / target).exists() or "/" in path:
        return
    layer.redirect(target, "/" + path)
    (layer.path / target).chmod(0o777)
    layer.whiteout(path)
    merged.move(path, target)


def _add(rng: random.Random, layer: Layer, merged: _Merged, path: str, there: str | None, *, topmost: bool) -> None:
    _copy_parents(layer, path)
    uid = rng.choice((0, 0, 4321))
    kind = rng.choices(
        ("file", "dir", "symlink", "fifo", "socket", "char", "sparse", "link"),
        (30, 30, 8, 3, 2, 2, 6, 12 if topmost else 0),
    )[0]
    if kind == "char" and layer.form == "user":  # who has no privilege cannot copy a device up
        kind = "fifo"
    if kind == "file":
        size = rng.choice((0, 1, 100, 4096, 5000, 20_000))
        attributes = {"user.layer": rng.randbytes(5)} if rng.random() < 0.3 else None
        layer.file(
            path,
            rng.randbytes(size),
            mode=rng.choice((0o644, 0o666, 0o600, 0o755)),
            uid=uid,
            gid=uid,
            xattrs=attributes,
        )
    elif kind == "sparse":
        layer.sparse(path, 100_000, {rng.randrange(0, 90_000): rng.randbytes(500)}, mode=0o666)
        kind = "file"
    elif kind == "dir":
        attributes = {"trusted.mark" if layer.form == "trusted" else "user.mark": b"d"} if rng.random() < 0.2 else None
        layer.dir(
            path,
            mode=rng.choice((0o777, 0o755, 0o1777)),
            uid=uid,
            gid=uid,
            mtime=EPOCH,
            xattrs=attributes,
            opaque=False,
        )
    elif kind == "symlink":
        layer.symlink(path, rng.choice(NAMES), uid=uid, gid=uid)
    elif kind == "fifo":
        layer.fifo(path)
    elif kind == "socket":
        layer.socket(path)
    elif kind == "char":
        layer.char(path, 1, 3, mode=0o666)
    else:
        own = [p for p in merged.of("file") if (layer.path / p).is_file() and (layer.path / p).stat().st_size]
        own = [p for p in own if not any("overlay" in x for x in __import__("os").listxattr(layer.path / p))]
        if not own:
            return
        layer.link(rng.choice(own), path)
        kind = "file"
    merged.remove(path)
    merged.kinds[path] = kind
