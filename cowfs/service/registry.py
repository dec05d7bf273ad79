"""Pull and push for the daemon and the command: names and events of :mod:`.images`, transport of :mod:`cowfs.images.registry`."""

from __future__ import annotations

import base64
import binascii
import contextvars
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.images.registry import Credentials, Pulled, Registry
from cowfs.service.errors import ApiError
from cowfs.service.logs import exchange_id, log
from cowfs.service.references import Reference, parse
from cowfs.service.rootless import apply_options

if TYPE_CHECKING:
    from cowfs.service.images import Images
    from cowfs.store import Store

__all__ = ["Transfers", "credentials_of"]

Line = dict[str, Any]
Tell = Callable[[Line], object]


def credentials_of(header: str) -> Credentials | None:
    """Credentials from ``X-Registry-Auth``: JSON in base64 (URL-safe), as Docker's clients send it; None for none.

    Raises:
        ApiError: 400: it is malformed (its content is not shown).
    """
    if not header:
        return None
    try:
        document = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (binascii.Error, ValueError):
        raise ApiError(400, "X-Registry-Auth cannot be read") from None
    if not isinstance(document, dict):
        raise ApiError(400, "X-Registry-Auth is no object")
    return credentials_from(document)


def credentials_from(document: dict[str, Any]) -> Credentials | None:
    """Credentials from an object with ``username``, ``password`` and ``identitytoken``."""
    if isinstance(document.get("identitytoken"), str) and document["identitytoken"]:
        return Credentials(token=document["identitytoken"])
    user, password = document.get("username"), document.get("password")
    if isinstance(user, str) and user and isinstance(password, str):
        return Credentials(user=user, password=password)
    return None


class Transfers:
    """Images from and to registries.

    Args:
        mirrors: addresses asked before docker.io. insecure: hosts that need no TLS.

    Threads: any.
    """

    def __init__(
        self, store: Store, images: Images, *, mirrors: Sequence[str] = (), insecure: Sequence[str] = ()
    ) -> None:
        self._store, self._images = store, images
        self._mirrors, self._insecure = mirrors, insecure

    def _registries(self, reference: Reference, credentials: Credentials | None, tell: Tell) -> list[Registry]:
        """The registries to ask, in order; mirrors of docker.io get no credentials of its users."""

        def progress(digest: str, what: str, done: int, total: int) -> None:
            # A line with numbers is a bar, which clients without a terminal leave out; an end has none.
            numbers = {"current": done, "total": total} if what in ("Downloading", "Pushing") else {}
            tell({"status": what, "progressDetail": numbers, "id": digest[7:19]})

        hosts = [reference.registry]
        mirrors = self._mirrors if reference.registry == "docker.io" else ()
        made = [
            Registry(
                mirror.partition("://")[2].rstrip("/") or mirror,
                insecure=mirror.startswith("http://") or mirror in self._insecure,
                spool=self._store.root,
                progress=progress,
            )
            for mirror in mirrors
        ]
        return made + [
            Registry(
                host,
                insecure=host in self._insecure,
                credentials=credentials,
                spool=self._store.root,
                progress=progress,
            )
            for host in hosts
        ]

    # -- pull -------------------------------------------------------------------------------------

    def pull(self, name: str, *, platform: str | None = None, credentials: Credentials | None = None) -> Iterator[Any]:
        """Pull an image; the name is resolved before this returns, the lines report the rest.

        Raises:
            NotFound, FailedPrecondition, ApiError: there is no such image, or the registry cannot be reached.
        """
        reference = parse(name)
        lines = _Lines()
        wanted = reference.digest or reference.tag or "latest"
        pulled = self._resolve(self._registries(reference, credentials, lines.put), reference, wanted, platform)
        return lines.run(lambda: self._bring_in(reference, wanted, pulled, lines.put))

    @staticmethod
    def _resolve(registries: list[Registry], reference: Reference, wanted: str, platform: str | None) -> Pulled:
        for at, registry in enumerate(registries):
            try:
                return registry.pull(reference.repository, wanted, platform=platform)
            except CowfsError:
                if at == len(registries) - 1:
                    raise
        raise AssertionError("there is always the registry itself")

    def _bring_in(self, reference: Reference, wanted: str, pulled: Pulled, tell: Tell) -> None:
        image = pulled.image
        tell({"status": f"Pulling from {reference.repository}", "id": wanted})
        for layer in image.layers:
            tell({"status": "Pulling fs layer", "progressDetail": {}, "id": (layer.digest or "")[7:19]})
        had = image.config_digest in self._images.ids()
        top, document = self._store.import_opened(image, options=apply_options())
        for layer in image.layers:
            tell({"status": "Pull complete", "progressDetail": {}, "id": (layer.digest or "")[7:19]})
        names = [] if reference.digest and not reference.tag else [reference.familiar]
        by_digest = f"{reference.name}@{pulled.digest}"
        self._images.keep(top, document, [*names, by_digest], "pull")
        tell({"status": f"Digest: {pulled.digest}"})
        what = "Image is up to date for" if had else "Downloaded newer image for"
        tell({"status": f"Status: {what} {names[0] if names else by_digest}"})

    # -- push -------------------------------------------------------------------------------------

    def push(self, name: str, *, credentials: Credentials | None = None) -> Iterator[Any]:
        """Push an image by one of its names.

        Raises:
            NotFound: no such image. ApiError: a name by digest.
        """
        reference = parse(name)
        if reference.digest:
            raise ApiError(400, "cannot push a digest reference")
        image = self._images.get(reference.familiar)
        lines = _Lines()

        def work() -> None:
            tell = lines.put
            tell({"status": f"The push refers to repository [{reference.registry}/{reference.repository}]"})
            registry = self._registries(reference, credentials, tell)[-1]
            made = self._images.as_output(image)
            others = (parse(each) for each in image.digests)
            near = {each.repository: None for each in others if each.registry == reference.registry}
            near.pop(reference.repository, None)
            digest = registry.push(reference.repository, reference.tag or "latest", made, near=list(near)[:3])
            self._store.tag(f"{reference.name}@{digest}", image.snapshot, config=image.document)
            self._store.record_event("image", "push", image.id, {"name": reference.familiar, "image": image.id})
            size = len(image.document)
            tag = reference.tag or "latest"
            tell({"status": f"{tag}: digest: {digest} size: {size}"})
            tell({"progressDetail": {}, "aux": {"Tag": tag, "Digest": digest, "Size": size}})

        return lines.run(work)

    def login(self, host: str, credentials: Credentials) -> None:
        """Whether a registry takes credentials.

        Raises:
            ApiError: 401: it refuses them; FailedPrecondition: it does not answer.
        """
        try:
            Registry(host, insecure=host in self._insecure, credentials=credentials).check_login()
        except FailedPrecondition as error:
            if "denies" in str(error):
                raise ApiError(401, f"Get https://{host}/v2/: unauthorized: {error}") from None
            raise


class _Lines:
    """The lines of a worker, as an iterator; None is a sign of life, an error becomes the last line."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(1000)
        self._left = threading.Event()

    def put(self, line: Line) -> None:
        if not self._left.is_set():
            try:
                self._queue.put(line, timeout=60)
            except queue.Full:
                self._left.set()  # without a reader the work goes on unreported

    def run(self, work: Callable[[], object]) -> Iterator[Any]:
        def worker() -> None:
            try:
                work()
            except (CowfsError, OSError) as error:
                self.put({"errorDetail": {"message": str(error)}, "error": str(error)})
            except Exception:  # noqa: BLE001  a fault of ours is no success: the client is told, and the log has its traceback
                log.exception("a transfer failed")
                said = f"an internal error; the log tells more about exchange {exchange_id.get()}"
                self.put({"errorDetail": {"message": said}, "error": said})
            finally:
                self._queue.put(None)

        context = contextvars.copy_context()  # the worker's lines of the log carry the exchange's id
        threading.Thread(target=context.run, args=(worker,), name="cowfs-transfer", daemon=True).start()
        return self._told()

    def _told(self) -> Iterator[Any]:
        try:
            while True:
                try:
                    line = self._queue.get(timeout=0.4)
                except queue.Empty:
                    yield None
                    continue
                if line is None:
                    return
                yield line
        finally:
            self._left.set()
            while True:  # let a worker that waits for room go on
                try:
                    self._queue.get_nowait()
                except queue.Empty:
                    break
