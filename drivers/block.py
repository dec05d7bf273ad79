"""The block backend: a layer is a thin block image with a file system of its own in it (Devicemapper's place).

Strategy: the image of a layer is one file in a chain of row layers (:mod:`cowfs_drivers.block_pool`): only blocks that were written take room, and a
child is made in constant time. When a layer's tree is wanted, our own mount serves the chain, a loop device reads and
writes the file in it past the page cache, and the kernel mounts that at ``mnt`` in the layer's directory (:mod:`cowfs_drivers.block_device`).
The file system has the tree (``fs``) and the work directory of cowfs's mounts (``work``) in it. All layers stand on the image of one
empty file system, made once.

The file is 8 TiB, the file system in it as large as wanted: it grows without anything beneath being touched. Blocks that it frees are
discarded, so they are holes of the delta.

Order: a layer's directory names its topmost delta (``top``). :meth:`BlockDriver.freeze` leaves a file system that is clean and mounted
read-only, then the mark ``frozen``. A live snapshot: the layer's directory names a new, empty delta; the file system is frozen; the server
goes on in the new delta; the file system is thawed; the snapshot names the delta before. A kill after any step leaves a layer
that shows all that was written: a server that did not switch has written in the delta beneath the empty one.

Device-mapper itself is not used, and not needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

from cowfs._record import replace
from cowfs._typed import Any
from cowfs.driver.interface import Capabilities, Driver, Probe
from cowfs.driver.plan import MountPlan
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument
from cowfs.format.redirect import check_block
from cowfs.model import Limit, Mount, Usage, parse_size
from cowfs.row import layer as row_layer
from cowfs.sys import atomic, files, host, locks, loop, programs, trees
from cowfs.sys.regular import read_small

from . import block_device, block_disk, block_image, deltas
from .block_image import BLOCK, KINDS
from .block_pool import Pool

__all__ = ["BlockDriver"]

_OPTIONS = "block-options"
_DEFAULTS = {"filesystem": "ext4", "size": 64 << 30, "block": BLOCK, "discard": True}
_TURN, _USE, _FROZEN = "block-turn", "block-use", "block-frozen"
_LIMIT, _LEAST, _USED = "block-limit", "block-least", "block-used"


class BlockDriver(Driver):
    """Thin images of ext4 or XFS, served by cowfs and mounted by the kernel.

    Args:
        filesystem: ``ext4`` or ``xfs``: of images without a parent.
        size: bytes of their file systems, or "64g": they are sparse, and grow with the limit of a snapshot.
        block: bytes a block of what is stored, a power of two from 4 KiB to 1 MiB.
        discard: whether blocks that a file system frees are given back at once.

    The store keeps the options last given; images made before keep their file system and size.
    """

    name = "block"
    whole = True

    def __init__(
        self,
        root: str,
        *,
        form: str = "auto",
        fsync: bool = True,
        filesystem: str | None = None,
        size: int | str | None = None,
        block: int | str | None = None,
        discard: bool | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, form=form, fsync=fsync, **options)
        given = {"filesystem": filesystem, "size": size, "block": block, "discard": discard}
        self._options = _options(
            f"{root}/{_OPTIONS}", {key: value for key, value in given.items() if value is not None}
        )
        self._pool = Pool(f"{root}/block", self.form, durable=fsync)
        self._kept = block_device.Kept(f"{root}/block-kept")

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Usable as root of the host, where there are loop devices, FUSE, and a program that makes file systems."""
        why = loop.why_not() or ("" if host.has_cap(host.CAP_SYS_ADMIN) else "only root mounts images")
        if not why and not os.path.exists("/dev/fuse"):
            why = "there is no /dev/fuse"
        if not why and not any(programs.find(kind.mkfs[0]) for kind in KINDS.values()):
            why = "neither mkfs.ext4 nor mkfs.xfs is installed"
        if why:
            return Probe(usable=False, reasons=(why,))
        from cowfs.format.whiteout import choose_form

        name, why = deltas.why_not(root, choose_form())
        if why:
            return Probe(usable=False, reasons=(why,))
        return Probe(usable=True, rank=5, reasons=(f"thin images in files of {name}, by loop devices over FUSE",))

    @cached_property
    def capabilities(self) -> Capabilities:
        """Whole layers that share all blocks with their parents."""
        return Capabilities(
            whole=True,
            live=False,
            own_limit=True,
            reflink=True,
            snapshots=True,
            kernel_mount=host.has_cap(host.CAP_SYS_ADMIN),
            unprivileged=False,
        )

    # -- places

    def _place(self, id: str) -> str:
        """Where the layer's file system is mounted."""
        return f"{self.directory(id)}/mnt"

    def tree(self, id: str) -> str:
        """In the layer's file system, where that is mounted."""
        return f"{self._place(id)}/fs"

    def work(self, id: str) -> str:
        """In the layer's file system, too."""
        return f"{self._place(id)}/work"

    @contextmanager
    def open_tree(self, id: str) -> Iterator[int]:
        """Mounts the layer's file system, if it is not, and unmounts it with its last user unless a mount was planned."""
        with self._used(id), super().open_tree(id) as fd:
            yield fd

    def plan(
        self,
        id: str,
        parents: Sequence[str],
        *,
        readonly: bool = False,
        limit: Limit = Limit(),  # noqa: B008 - frozen
    ) -> MountPlan:
        """Has the file systems mounted for good; that of an active layer can be written, and is large enough for the limit."""
        for one in (id, *parents[:1]) if readonly else (id,):
            if not os.path.isdir(self.directory(one)):
                continue  # "cowfs info" asks about layers that there are not
            if not readonly and limit.bytes is not None:
                block_device.put(f"{self.directory(one)}/{_LEAST}", str(limit.bytes))
            with self._used(one, writing=not readonly):
                self._kept.plan(one)
                if not readonly and limit.bytes is not None:
                    self._hold(one)
        return self._described(id, parents, readonly=readonly, limit=limit)

    def _described(self, id: str, parents: Sequence[str], *, readonly: bool, limit: Limit) -> MountPlan:
        """A mount of file systems that may be mounted or not."""
        plan = super().plan(id, parents, readonly=readonly, limit=limit)
        if limit.bytes is None or not os.path.isdir(self.directory(id)) or self._kind(id).limits:
            return plan
        why = f"images of {self._kind(id).name} hold no limit"
        return replace(plan, why_not_kernel=why, why_not_image=why)

    def mounts(
        self,
        id: str,
        parents: Sequence[str],
        *,
        readonly: bool = False,
        limit: Limit = Limit(),  # noqa: B008 - frozen
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """A record of cowfs's own server, which finds the tree itself when it is mounted; the kernel's only where it is asked for."""
        beneath = () if readonly else parents  # of a view, the id is the one that it shows
        if mount_type == "kernel":
            if not readonly:
                own = None if limit.bytes is None else limit.bytes - self._copied(id).bytes
                self.limit(id, Limit(bytes=own))
            record = self.plan(id, beneath, readonly=readonly, limit=limit).record("kernel")
            self._kept.describe(id)
            return (record,)
        plan = self._described(id, beneath, readonly=readonly, limit=limit)
        return (plan.record("fuse" if mount_type is None else mount_type),)

    def _why_not_kernel(self, limit: Limit) -> str:
        if limit.inodes is not None:
            return "an image holds no limit on inodes"
        return super()._why_not_kernel(limit)

    # -- verbs

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """A new, empty delta over the nearest parent's topmost one, or over an empty file system's."""
        directory = self.directory(id)
        if parents:
            self._rest(parents[0])
            base, used = self._pool.top(self.directory(parents[0])), self._note(parents[0], _USED)
        else:
            base = self._empty()
            used = os.readlink(f"{self._pool.directory(base)}/{_USED}")
        block_device.put(f"{directory}/block-base", used)
        held = self.held(parents[0]) if parents else Usage()
        block_device.put(f"{directory}/block-copied", f"{held.bytes} {held.inodes}")
        with self._pool.turn():
            self._pool.name(self._pool.make(base), directory)  # and what is noted is on the disk with it
        return held

    def _empty(self) -> str:
        """The delta of an empty file system of the kind and size that are wanted."""
        kind, size = KINDS[str(self._options["filesystem"])], int(self._options["size"])

        def fill(place: str) -> None:
            block_image.make(kind, f"{place}/fs/disk", size)
            used = block_device.furnish(kind, f"{place}/fs/disk")
            block_device.put(f"{place}/{_USED}", str(used))
            block_device.put(f"{place}/kind", kind.name)
            if self.fsync:
                trees.sync_tree(place)

        return self._pool.base(f"base-{kind.name}-{size}", fill)

    def _copied(self, id: str) -> Usage:
        """The usage of the tree that the layer was made of."""
        bytes, inodes = self._note(id, "block-copied").split()
        return Usage(bytes=int(bytes), inodes=int(inodes))

    def _note(self, id: str, name: str) -> str:
        return os.readlink(f"{self.directory(id)}/{name}")

    def snapshot(self, id: str, target: str, ask: Callable[..., dict[str, Any]] | None) -> None:
        """The delta written so far, while the file system is frozen; the layer goes on in a new one."""
        directory, made = self.directory(id), self.directory(target)
        if ask is not None:
            ask("sync")
        with self._used(id, writing=True), self._turn(id):
            server = block_device.Served.of(directory)
            if server is None:
                raise FailedPrecondition(f"the image of layer {id} is served by nobody", remedy="try again")
            with self._pool.turn():
                over = self._pool.top(directory)
                written = server.upper()
                if written != self._pool.tree(over):  # a snapshot was killed before its server switched
                    new, over = over, self._pool.chain(over)[1]
                else:
                    new = self._pool.make(over)
                    self._pool.name(new, directory)
                root = os.open(self._place(id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    block_device.check_room(self._place(id))
                    with block_device.frozen(root, self._place(id)):
                        server.switch(self._pool.tree(new), self._pool.work(new))
                        used = block_device.used(root)
                finally:
                    os.close(root)
                self._pool.name(over, made)
        row_layer.seal(self._pool.tree(over), form=self.form, durable=self.fsync)
        for note in ("block-base", "block-copied"):
            block_device.put(f"{made}/{note}", self._note(id, note))
        block_device.put(f"{made}/{_USED}", str(used))
        _touch(f"{made}/{_FROZEN}")

    @contextmanager
    def disk(self, id: str, scratch: str, size: int) -> Iterator[tuple[int, int]]:
        """A child in which the tree is the file system's root directory."""
        self.create(scratch, [id], Limit())
        with block_disk.handed_out(self.directory(scratch), self._request(scratch, frozen=False), size) as disk:
            yield disk

    def freeze(self, id: str) -> None:
        """Empty the work directory, leave a clean file system, and mark the layer."""
        with self._used(id, writing=not os.path.exists(f"{self.directory(id)}/{_FROZEN}")):
            with self._turn(id):
                if not os.path.exists(f"{self.directory(id)}/{_FROZEN}"):
                    if os.listdir(self.work(id)):
                        trees.empty_tree(self.work(id))
                    self._quiet(id)
            self._kept.drop(id)

    def settle(self, id: str) -> None:
        """Have on the disk what was written."""
        with self.open_tree(id) as fd:
            block_device.check_room(self._place(id))
            files.syncfs(fd)

    def _rest(self, id: str) -> None:
        """See to it that nothing writes in a frozen layer's image any more."""
        if not os.path.exists(f"{self.directory(id)}/{_FROZEN}"):
            with self._used(id), self._turn(id):
                self._quiet(id)

    def _quiet(self, id: str) -> None:
        """Make the layer's file system, which is mounted, clean and read-only, and mark the layer."""
        place = self._place(id)
        block_device.check_room(place)
        block_device.remount(place, readonly=True)
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            used = block_device.used(fd)
        finally:
            os.close(fd)
        block_device.put(f"{self.directory(id)}/{_USED}", str(used))
        _touch(f"{self.directory(id)}/{_FROZEN}")

    def remove(self, id: str) -> None:
        """Unmount the file system (what has a file of it open keeps that), and delete the deltas that nobody else has."""
        directory = self.directory(id)
        if not os.path.isdir(directory):
            return
        with self._turn(id):
            block_device.detach(directory, lazily=True)
            with self._pool.turn():
                self._pool.forget(directory)
        super().remove(id)
        self._kept.drop(id)

    def limit(self, id: str, limit: Limit) -> None:
        """Withhold so much of the file system that what is free is what the layer may still take; grown where it is too small."""
        mark = f"{self.directory(id)}/{_LIMIT}"
        if limit.bytes is None and not os.path.lexists(mark):
            return
        with self._turn(id):
            if limit.bytes is None:
                os.unlink(mark)
            else:
                block_device.put(mark, str(limit.bytes))
        if not block_device.is_mounted(self._place(id)):
            return
        with self._turn(id), self._unused(id) as mine:
            if mine and not block_device.is_bound(self.directory(id)) and block_device.detach(self.directory(id)):
                return  # it holds from the next mount on, before which the file system can grow
        with self._used(id, writing=True):
            self._hold(id)

    def _hold(self, id: str) -> None:
        """Have the layer's limit hold in its file system, which is mounted."""
        served = block_device.Served.of(self.directory(id))
        if served is None or loop.is_readonly(served.device):
            return
        told: list[int | None] = []
        for note in (_LIMIT, _LEAST):
            try:
                told.append(-(-int(self._note(id, note)) // BLOCK))
            except FileNotFoundError:
                told.append(None)
        base = int(self._note(id, "block-base"))
        block_device.bound(self._kind(id), served.device, self._place(id), base, told[0], least=told[1] or 0)

    def strays(self) -> list[str]:
        """None: deltas that nobody names are deleted here and now, and what was planned and is not used is unmounted."""
        self._pool.sweep()
        self._kept.release(here=True)
        self._unmount_planned()
        return []

    def explain(self) -> dict[str, str]:
        """The options, and who holds limits."""
        options = self._options
        can = KINDS[str(options["filesystem"])].limits
        limits = "kernel mounts by the file system's size" if can else "kernel mounts hold none"
        return {
            "images": f"{options['filesystem']} of {options['size']} bytes, blocks of {options['block']},"
            f" discard {'on' if options['discard'] else 'off'}",
            "limits": f"{limits}, others by cowfs's server",
            "device-mapper": "not used: images are served by cowfs",
        }

    def check(self, id: str) -> list[str]:
        """The chain is whole, and each delta's map. Nothing is mounted."""
        if not os.path.isdir(self.directory(id)):
            return [f"layer {id} is gone: {self.directory(id)}"]
        try:
            chain = self._pool.chain(self._pool.top(self.directory(id)))
        except FileNotFoundError:
            return [f"layer {id} names no image: {self.directory(id)}/top"]
        except CowfsError as error:
            return [f"layer {id}: {error}"]
        found, _ = row_layer.inspect(self._pool.tree(chain[0]), self.form)
        if not os.path.exists(f"{self._pool.tree(chain[-1])}/disk"):
            found.append(f"the image of an empty file system is gone: {self._pool.tree(chain[-1])}/disk")
        return [f"layer {id}: {line}" for line in found]

    # -- mounting

    def _kind(self, id: str) -> block_image.Kind:
        """The kind of file system in a layer's image, as its base says."""
        base = self._pool.chain(self._pool.top(self.directory(id)))[-1]
        return KINDS[os.readlink(f"{self._pool.directory(base)}/kind")]

    @contextmanager
    def _turn(self, id: str) -> Iterator[None]:
        """Nobody else mounts or unmounts this layer's image, or changes its chain, meanwhile."""
        fd = os.open(f"{self.directory(id)}/{_TURN}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            locks.lock(fd, wait=True)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _used(self, id: str, *, writing: bool = False) -> Iterator[None]:
        """The file system is mounted, and nobody unmounts it meanwhile.

        Args:
            writing: it can be written, also where :meth:`freeze` had come to its mark.

        Raises:
            FileNotFoundError: the layer is gone.
        """
        fd = os.open(f"{self.directory(id)}/{_USE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            locks.lock(fd, shared=True, wait=True)
            with self._turn(id):
                self._attach(id, writing)
            yield
        finally:
            os.close(fd)
            self._unmount_idle(id)

    def _attach(self, id: str, writing: bool) -> None:
        directory = self.directory(id)
        mark = f"{directory}/{_FROZEN}"
        frozen = os.path.exists(mark)
        if frozen and writing:
            os.unlink(mark)
            frozen = False
        if block_device.is_attached(directory):
            served = block_device.Served.of(directory)
            if frozen or served is None or not loop.is_readonly(served.device):
                if writing and os.statvfs(self._place(id)).f_flag & os.ST_RDONLY:
                    block_device.remount(self._place(id), readonly=False)
                return
            block_device.detach(directory)  # a freeze that was taken back
        request = self._request(id, frozen=frozen)
        block_device.attach(directory, request)
        if frozen:
            return
        try:
            self._hold(id)
        except block_device.TooSmall as error:
            if not block_device.detach(directory):
                raise
            block_device.attach(directory, replace(request, blocks=error.blocks))
            self._hold(id)

    def _request(self, id: str, *, frozen: bool) -> block_device.DiskRequest:
        """The layer's image, to be mounted."""
        chain = self._pool.chain(self._pool.top(self.directory(id)))
        discard = bool(self._options["discard"])
        return block_device.DiskRequest(
            kind=self._kind(id),
            lowers=[self._pool.tree(one) for one in (chain if frozen else chain[1:])],
            upper="" if frozen else self._pool.tree(chain[0]),
            work="" if frozen else self._pool.work(chain[0]),
            block=int(self._options["block"]),
            form=self.form.name,
            fsync=self.fsync,
            discard=discard,
        )

    def _unmount_idle(self, id: str) -> None:
        """Unmount a tree that nobody uses and no mount was planned for."""
        directory = self.directory(id)
        with suppress(FileNotFoundError):
            if self._kept.has(id):
                return
            with self._turn(id), self._unused(id) as mine:
                if mine and not self._kept.has(id) and not block_device.detach(directory):
                    self._kept.made(id)  # whoever comes next tries again

    @contextmanager
    def _unused(self, id: str) -> Iterator[bool]:
        """Whether nobody reads the tree, and keep it so."""
        use = locks.open_locked(f"{self.directory(id)}/{_USE}", flags=os.O_RDWR | os.O_CLOEXEC)
        try:
            yield use is not None
        finally:
            if use is not None:
                os.close(use)

    def _unmount_planned(self) -> None:
        """Unmount trees whose planned mounts are gone."""
        for id in self._kept.done():
            try:
                with self._turn(id), self._unused(id) as mine:
                    if (
                        mine
                        and not block_device.is_bound(self.directory(id))
                        and block_device.detach(self.directory(id))
                    ):
                        self._kept.drop(id)
            except FileNotFoundError:
                self._kept.drop(id)

    def close(self) -> None:
        """Unmount trees whose planned mounts are gone; what was planned here is others' to unmount from now on."""
        self._kept.release()
        self._unmount_planned()


def _options(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a store: those given, over those noted, over the usual ones; noted where any is given."""
    try:
        noted = json.loads(read_small(path, limit=1000))
    except FileNotFoundError:
        noted = {}
    except ValueError:
        raise InvalidArgument(f"{path} holds no options", remedy="delete it, and give them anew") from None
    found = {**_DEFAULTS, **{key: value for key, value in noted.items() if key in _DEFAULTS}, **given}
    if found["filesystem"] not in KINDS:
        raise InvalidArgument(f"no images of {found['filesystem']!r}", remedy=f"one of {', '.join(KINDS)}")
    kind = KINDS[found["filesystem"]]
    found["size"] = parse_size(found["size"], least=1)
    if not kind.least <= found["size"] <= block_image.DEVICE:
        raise InvalidArgument(
            f"no {kind.name} of {found['size']} bytes", remedy=f"from {kind.least} to {block_image.DEVICE}"
        )
    found["size"] &= -(1 << 20)
    found["block"] = parse_size(found["block"])
    try:
        check_block(found["block"])
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    words = {"on": True, "off": False, "1": True, "0": False, "true": True, "false": False, True: True, False: False}
    if found["discard"] not in words:
        raise InvalidArgument(f"discard is on or off, not {found['discard']!r}")
    found["discard"] = words[found["discard"]]
    if given:
        atomic.write_file(path, json.dumps(found).encode() + b"\n")
    return found


def _touch(path: str) -> None:
    """Make an empty file, if there is none."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
