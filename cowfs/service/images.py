"""Images for Docker's clients, over the tags and snapshots of the store.

Strategy. An image is a configuration and the snapshot that it belongs to; its id is the configuration's digest. The store keeps
both with each tag, so the list of images is the list of tags, grouped by id. An image without a name has a tag that is its own
id (``sha256:...``): the store keeps tagged snapshots, so a name that moves on leaves a dangling image behind, as
clients expect. A registry's name by digest is a tag too (``name@sha256:...``).

Threads: any. Results from the index are kept until the next write to it.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from cowfs import images as formats
from cowfs.errors import CowfsError, FailedPrecondition, NotFound
from cowfs.images.digests import digest_of, parse_json
from cowfs.index.watching import Watcher
from cowfs.service import references
from cowfs.service.errors import ApiError
from cowfs.service.rootless import apply_options

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["Image", "Images", "nanoseconds", "rfc3339"]

_ID = re.compile(r"sha256:[0-9a-f]{64}")
_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{1,64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image.

    Attributes:
        id: ``sha256:...`` of the configuration. document: the configuration, byte for byte.
        snapshot: its top snapshot. tags: familiar names. digests: names by digest. anchored: whether it
            has a tag that is its id.
        tagged: when it was tagged last, nanoseconds since 1970.
    """

    id: str
    document: str = field(repr=False)
    snapshot: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    stored: tuple[str, ...]
    tagged: int

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration (OCI image-spec, config.md)."""
        return _parsed(self.document)

    @property
    def run_config(self) -> Mapping[str, Any]:
        """Its member ``config``: the process of its containers."""
        found = self.config.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def labels(self) -> Mapping[str, str]:
        found = self.run_config.get("Labels")
        return found if isinstance(found, dict) else {}

    @property
    def created(self) -> int:
        """The creation time, nanoseconds since 1970; 0 if the configuration has none."""
        return nanoseconds(str(self.config.get("created") or ""))

    @property
    def diff_ids(self) -> list[str]:
        rootfs = self.config.get("rootfs")
        found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        return [str(each) for each in found] if isinstance(found, list) else []

    @property
    def name(self) -> str:
        """The name for people: its first name, else its id."""
        return self.tags[0] if self.tags else self.id


@functools.lru_cache(maxsize=1024)
def _parsed(document: str) -> Mapping[str, Any]:
    try:
        return parse_json(document.encode(), "image configuration")
    except CowfsError:
        return {}


@functools.lru_cache(maxsize=4096)
def _id_of(document: str) -> str:
    return digest_of(document.encode())


def nanoseconds(text: str) -> int:
    """Nanoseconds since 1970 of a time in RFC 3339's form; 0 for "" and for malformed ones.

    >>> nanoseconds("1970-01-01T00:00:01.5Z")
    1500000000
    """
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|z|[+-]\d\d:\d\d)", text)
    if match is None:
        return 0
    try:
        whole = datetime.datetime.fromisoformat(match[1] + ("+00:00" if match[3] in "Zz" else match[3]))
    except ValueError:
        return 0
    return int(whole.timestamp()) * 10**9 + int((match[2] or "0").ljust(9, "0"))


def rfc3339(when: int) -> str:
    """RFC 3339's form, in UTC with nanoseconds, of nanoseconds since 1970.

    >>> rfc3339(1500000000)
    '1970-01-01T00:00:01.500000000Z'
    """
    whole = datetime.datetime.fromtimestamp(when // 10**9, datetime.UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{when % 10**9:09d}Z"


@dataclass(slots=True)
class _Known:
    """The images of the index at one moment."""

    version: tuple[int, int]
    images: list[Image]
    sizes: tuple[dict[str, int], dict[str, int], int] | None = None


class Images:
    """The images of a store.

    Args:
        store: open.
        users: gives the containers that use images: (image id, container id, whether it runs).
    """

    def __init__(self, store: Store, users: Callable[[], Iterable[tuple[str, str, bool]]] = lambda: ()) -> None:
        self._store = store
        self._users = users
        self._watcher = Watcher(store.index.path)
        self._known: _Known | None = None
        self._documents: dict[tuple[str, tuple[int, ...]], str] = {}

    def close(self) -> None:
        """Close the connection to the index."""
        self._watcher.close()

    # -- reading ----------------------------------------------------------------------------------

    def all(self) -> list[Image]:
        """All images, the newest first."""
        return self._look().images

    def _look(self) -> _Known:
        """The present images: read anew only after a write to the index."""
        version = self._watcher.version()  # before anything is read: later changes are seen the next time
        known = self._known
        if known is None or known.version != version:
            known = self._known = _Known(version, self._read())
        return known

    def _read(self) -> list[Image]:
        groups: dict[str, list[Any]] = {}
        for tag in self._store.tags():
            document = tag.config or self._document_of(tag.name)
            groups.setdefault(_id_of(document), []).append((tag, document))
        found = []
        for id, tags in groups.items():
            names = [references.familiar(tag.name) for tag, _ in tags if not _ID.fullmatch(tag.name)]
            found.append(
                Image(
                    id=id,
                    document=tags[0][1],
                    snapshot=tags[0][0].target,
                    tags=tuple(name for name in names if "@" not in name),
                    digests=tuple(name for name in names if "@" in name),
                    stored=tuple(tag.name for tag, _ in tags),
                    tagged=max(tag.created for tag, _ in tags),
                )
            )
        return sorted(found, key=lambda image: (image.created, image.tagged, image.id), reverse=True)

    def ids(self) -> list[str]:
        """The ids of all images."""
        return [image.id for image in self.all()]

    def name_of(self, id: str, name: str) -> str:
        """The name of a container's image: the requested one, if it still means that image, else its id."""
        try:
            return name if self.get(name).id == id else id
        except (NotFound, ApiError):
            return id

    def _document_of(self, name: str) -> str:
        """The configuration of a tree that came without one: made once for each chain of layers."""
        row = self._store.resolve(name)
        key = row.id, tuple(num for num, _ in self._store.index.chain(row.num))
        if key not in self._documents:
            self._documents[key] = self._store.image(name).config.decode()
        return self._documents[key]

    def get(self, reference: str) -> Image:
        """The image of a name, an id, or the beginning of an id.

        Raises:
            NotFound: there is none; ApiError: 400: a malformed name.
        """
        every = self.all()
        short = _PREFIX.fullmatch(reference)
        if short:
            fitting = [image for image in every if image.id[7:].startswith(short[1])]
            if len(fitting) == 1:
                return fitting[0]
            if len(fitting) > 1 and reference.startswith("sha256:"):
                raise ApiError(400, f"{reference} is the beginning of {len(fitting)} ids")
        if not reference.startswith("sha256:"):
            wanted = references.parse(reference)
            reference = wanted.familiar
            for image in every:
                if wanted.familiar in image.tags or (
                    wanted.digest and f"{wanted.name}@{wanted.digest}" in image.digests
                ):
                    return image
        raise NotFound(f"No such image: {reference}")

    def sizes(self) -> tuple[dict[str, int], dict[str, int], int]:
        """By image id: the bytes of all its layers, and of those shared with another image; and the bytes of all
        layers, each once."""
        known = self._look()
        if known.sizes is None:
            known.sizes = self._add_up(known.images)
        return known.sizes

    def _add_up(self, images: list[Image]) -> tuple[dict[str, int], dict[str, int], int]:
        """One pass down the tree of snapshots and one up: the cost of a deep chain does not depend on the number of
        images on it."""
        rows, number = self._store.index.held()
        size, above = {num: held for num, _, held in rows}, {num: parent for num, parent, _ in rows}
        order = [num for num, _, _ in rows]
        if any(parent is not None and parent > num for num, parent, _ in rows):
            order = _parents_first(above)
        uses = dict.fromkeys(order, 0)
        for image in images:
            if number.get(image.snapshot) in uses:
                uses[number[image.snapshot]] += 1
        for num in reversed(order):
            parent = above[num]
            if parent is not None:
                uses[parent] += uses[num]
        whole: dict[int | None, int] = {None: 0}
        shared: dict[int | None, int] = {None: 0}
        for num in order:
            parent, used = above[num], uses[num]
            if used:  # of some image
                whole[num] = whole[parent] + size[num]
                shared[num] = shared[parent] + (size[num] if used > 1 else 0)
        tops = {image.id: number.get(image.snapshot) for image in images}
        return (
            {id: whole.get(num, 0) for id, num in tops.items()},
            {id: shared.get(num, 0) for id, num in tops.items()},
            sum(size[num] for num in order if uses[num]),
        )

    def history(self, image: Image) -> list[dict[str, Any]]:
        """The steps that made an image, the newest first."""
        sizes = [self._store.usage(info.name).bytes for info in reversed(self._store.chain(image.snapshot))]
        steps = image.config.get("history")
        listed = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
        if sum(not step.get("empty_layer") for step in listed) != len(sizes):
            listed = [{"created": image.config.get("created"), "created_by": ""} for _ in sizes]
        told = []
        for step in listed:
            size = 0 if step.get("empty_layer") else sizes.pop(0)
            told.append(
                {
                    "Id": "<missing>",
                    "Created": nanoseconds(str(step.get("created") or "")) // 10**9,
                    "CreatedBy": step.get("created_by") or "",
                    "Tags": None,
                    "Size": size,
                    "Comment": step.get("comment") or "",
                }
            )
        told.reverse()
        if told:
            told[0] |= {"Id": image.id, "Tags": list(image.tags) or None}
        return told

    # -- making -----------------------------------------------------------------------------------

    def keep(self, top: str, document: str, names: Iterable[str], action: str) -> str:
        """Name an image, or anchor it if it gets no name, and return its id. An image that loses its last name to it is anchored.

        Args:
            top: its snapshot. document: its configuration. names: familiar. action: the event's: load, import, pull...
        """
        id = digest_of(document.encode())
        names = list(names)
        for name in names:
            self._leave_behind(name, id)
            self._store.tag(name, top, config=document)
        if not names and not any(image.id == id for image in self.all()):
            self._store.tag(id, top, config=document)
        self._told(action, id, names[0] if names else id)
        return id

    def _told(self, action: str, id: str, name: str) -> None:
        self._store.record_event("image", action, id, {"name": name, "image": id})

    def _leave_behind(self, name: str, new_id: str) -> None:
        """Anchor the present image of a name, if it would be left without one."""
        for image in self.all():
            mine = [stored for stored in image.stored if references.familiar(stored) == name]
            if mine and image.id != new_id:
                if len(image.stored) == len(mine):
                    self._store.tag(image.id, image.snapshot, config=image.document)
                for stored in mine:
                    self._store.untag(stored)

    def load(self, stream: BinaryIO) -> Iterator[str]:
        """Bring in all images of an archive; yields a line for each.

        Raises:
            InvalidArgument, Corrupt: the archive is not one, or damaged.
        """
        with formats.open_image(stream, form="image", spool_dir=self._store.root) as opened:
            for image in opened.images:
                top, document = self._store.import_opened(image, options=apply_options())
                names = [references.familiar(name) for name in image.tags if _may_be_tag(name)]
                id = self.keep(top, document, names, "load")
                for name in names:
                    yield f"Loaded image: {name}\n"
                if not names:
                    yield f"Loaded image ID: {id}\n"

    def import_tree(self, stream: BinaryIO, name: str, changes: Iterable[str], message: str) -> str:
        """Make an image of one layer of a root file system's tar, and return its id."""
        with formats.open_image(stream, form="rootfs", spool_dir=self._store.root) as opened:
            (image,) = opened.images
            top, _ = self._store.import_opened(image, options=apply_options())
        base = self._store.image(top).config
        now = rfc3339(time.time_ns())
        config = parse_json(base, "configuration") | {"created": now}
        config["config"] = changed({}, changes)
        config["history"] = [{"created": now, "comment": message or "Imported from -"}]
        return self.keep(top, _compact(config), [name] if name else [], "import")

    def save(self, wanted: Iterable[str], out: BinaryIO) -> None:
        """Write images to one archive (as ``docker save``)."""
        outs = []
        for reference in wanted:
            image = self.get(reference)
            names = image.tags if _PREFIX.fullmatch(reference) else (references.parse(reference).familiar,)
            outs.append(self.as_output(image, names))
            self._told("save", image.id, names[0] if names else image.id)
        formats.write_docker(out, _together(outs), spool_dir=self._store.root)

    def as_output(self, image: Image, names: Iterable[str] = ()) -> formats.OutImage:
        """An image in the form for archives and registries."""
        made = self._store.image(image.stored[0])
        if image.diff_ids == [layer.diff_id for layer in made.layers]:
            return formats.OutImage(config=image.document.encode(), layers=made.layers, tags=list(names))
        return made

    def tag(self, reference: str, name: str) -> None:
        """Give an image one more name."""
        image = self.get(reference)
        wanted = references.parse(name)
        if wanted.digest:
            raise ApiError(400, "refusing to create a tag with a digest reference")
        self._leave_behind(wanted.familiar, image.id)
        self._store.tag(wanted.familiar, image.snapshot, config=image.document)

    # -- removal ----------------------------------------------------------------------------------

    def remove(self, reference: str, *, force: bool = False, prune: bool = True) -> list[dict[str, str]]:
        """Remove a name, and with the last one the image.

        Returns:
            The untagged names and deleted images, in Docker's form.

        Raises:
            NotFound: no such image. FailedPrecondition: a container uses it, or several names and no ``force``.
        """
        image = self.get(reference)
        users = [(id, running) for used, id, running in self._users() if used == image.id]
        by_id = _PREFIX.fullmatch(reference) is not None and not any(
            references.familiar(reference) == name for name in image.tags
        )
        if by_id:
            self._refuse_by_id(image, users, force)
            return self._delete(image, image.stored, users)
        name = references.parse(reference).familiar
        mine = [stored for stored in image.stored if references.familiar(stored) == name]
        if len(image.tags) > 1:
            for stored in mine:
                self._store.untag(stored)
            return [{"Untagged": name}]
        if users and not force:
            raise FailedPrecondition(
                f'conflict: unable to remove repository reference "{reference}" (must force)'
                f" - container {users[0][0][:12]} is using its referenced image {image.id[7:19]}"
            )
        return self._delete(image, image.stored, users)

    @staticmethod
    def _refuse_by_id(image: Image, users: list[tuple[str, bool]], force: bool) -> None:
        if any(running for _, running in users):
            user = next(id for id, running in users if running)
            raise FailedPrecondition(
                f"conflict: unable to delete {image.id[7:19]} (cannot be forced)"
                f" - image is being used by running container {user[:12]}"
            )
        if force:
            return
        if len(image.tags) > 1:
            raise FailedPrecondition(
                f"conflict: unable to delete {image.id[7:19]} (must be forced) - image is referenced in multiple repositories"
            )
        if users:
            raise FailedPrecondition(
                f"conflict: unable to delete {image.id[7:19]} (must be forced)"
                f" - image is being used by stopped container {users[0][0][:12]}"
            )

    def _delete(self, image: Image, stored: Iterable[str], users: list[tuple[str, bool]]) -> list[dict[str, str]]:
        told = [{"Untagged": references.familiar(name)} for name in stored if not _ID.fullmatch(name)]
        if users:  # its containers go on; it is dangling now
            self._store.tag(image.id, image.snapshot, config=image.document)
            for name in stored:
                if name != image.id:
                    self._store.untag(name)
            return told
        for name in stored:
            self._store.untag(name)
        self._told("delete", image.id, image.name)
        told.append({"Deleted": image.id})
        self.drop_init(image.snapshot)
        try:
            told += [{"Deleted": name} for name in self._store.remove(image.snapshot, chain=True)]
        except FailedPrecondition:
            pass  # another image or a snapshot of the command's stands on it
        return told

    def drop_init(self, snapshot: str) -> None:
        """Remove the snapshot between an image and its containers, if no container is left."""
        name = init_name(snapshot)
        if self._store.exists(name):
            try:
                self._store.remove(name)
            except FailedPrecondition:
                pass

    def prune(
        self, *, dangling: bool = True, until: int | None = None, labels: Iterable[str] = ()
    ) -> tuple[list[dict[str, str]], int]:
        """Remove images that no container uses: those without a name, or all.

        Returns:
            The untagged names and deleted images, and the bytes freed.
        """
        used = {id for id, _, _ in self._users()}
        before = self._store.totals().committed.bytes
        told: list[dict[str, str]] = []
        for image in self.all():
            if image.id in used or (dangling and image.tags) or (until is not None and image.created > until):
                continue
            if all(has_label(image.labels, each) for each in labels):
                told += self._delete(image, image.stored, [])
        return told, before - self._store.totals().committed.bytes


def _parents_first(above: Mapping[int, int | None]) -> list[int]:
    """The nodes of trees, each behind its parent."""
    below: dict[int | None, list[int]] = {}
    for num, parent in above.items():
        below.setdefault(parent, []).append(num)
    order = list(below.get(None, ()))
    for num in order:
        order += below.get(num, ())
    return order


def init_name(snapshot: str) -> str:
    """The snapshot between an image's top and its containers: the files that every container needs."""
    return f"init/{snapshot}"


def has_label(labels: Mapping[str, str], wanted: str) -> bool:
    """Whether labels have a key, or a key with a value (``key=value``)."""
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)


def _may_be_tag(name: str) -> bool:
    try:
        references.parse(name)
    except ApiError:
        return False
    return True


def _together(outs: list[formats.OutImage]) -> list[formats.OutImage]:
    """One entry for each configuration, with all its names."""
    found: dict[bytes, formats.OutImage] = {}
    for out in outs:
        had = found.get(out.config)
        tags = list(dict.fromkeys([*(had.tags if had else ()), *out.tags]))
        found[out.config] = formats.OutImage(config=out.config, layers=out.layers, tags=tags)
    return list(found.values())


def _compact(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), sort_keys=True)


def changed(config: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """A container's configuration with instructions of a Dockerfile applied (``--change`` of commit and import).

    Raises:
        ApiError: 400: an unsupported instruction.
    """
    made = dict(config)
    for line in changes:
        word, _, rest = line.strip().partition(" ")
        apply = _INSTRUCTIONS.get(word.upper())
        if apply is None:
            raise ApiError(400, f"{word.lower()} is not a valid change command")
        apply(made, rest.strip())
    return made


def _command(key: str) -> Callable[[dict[str, Any], str], None]:
    def apply(config: dict[str, Any], text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            value = ["/bin/sh", "-c", text]
        config[key] = value

    return apply


def _env(config: dict[str, Any], text: str) -> None:
    pairs = dict(str(pair).partition("=")[::2] for pair in config.get("Env") or ())
    pairs |= _assignments(text)
    config["Env"] = [f"{key}={value}" for key, value in pairs.items()]


def _label(config: dict[str, Any], text: str) -> None:
    config["Labels"] = {**(config.get("Labels") or {}), **_assignments(text)}


def _assignments(text: str) -> dict[str, str]:
    import shlex

    if "=" not in text.partition(" ")[0]:
        key, _, value = text.partition(" ")
        return {key: value.strip()}
    try:
        return dict(word.partition("=")[::2] for word in shlex.split(text))
    except ValueError as error:
        raise ApiError(400, f"{text!r}: {error}") from None


def _set(key: str) -> Callable[[dict[str, Any], str], None]:
    return lambda config, text: config.update({key: text})


def _add_keys(key: str) -> Callable[[dict[str, Any], str], None]:
    return lambda config, text: config.update({key: {**(config.get(key) or {}), **{word: {} for word in text.split()}}})


_INSTRUCTIONS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "CMD": _command("Cmd"),
    "ENTRYPOINT": _command("Entrypoint"),
    "ENV": _env,
    "LABEL": _label,
    "USER": _set("User"),
    "WORKDIR": _set("WorkingDir"),
    "STOPSIGNAL": _set("StopSignal"),
    "EXPOSE": _add_keys("ExposedPorts"),
    "VOLUME": _add_keys("Volumes"),
}
