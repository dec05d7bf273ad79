"""Images from and to a registry: the distribution API, spoken with the standard library alone.

Strategy. A pull resolves a name to a manifest and describes the image with layers that are downloaded when they are
opened: so layers that the store has are never fetched, and the store unpacks several at once while others are still
downloaded. A download goes to a file without a name, goes on where it was cut (``Range``), and is not used before its
digest was verified. A push sends only missing parts.

Rules:

1. Every document and layer is named by a digest and verified against it; the headers of a registry are not trusted.
2. Credentials go to the registry and to the token service that it names over the same protection, never to where it redirects.
3. Plain HTTP, or TLS that is not verified, is spoken only to this machine and to registries that the user names as insecure.

Sources: OCI distribution-spec 1.1; the distribution project's token specification.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode, urljoin, urlsplit

from cowfs._log import Part
from cowfs._typed import Any, BinaryIO
from cowfs.errors import Corrupt, CowfsError, FailedPrecondition, InvalidArgument, NotFound
from cowfs.images.description import Image, Layer
from cowfs.images.digests import check_digest, diff_ids_of, digest_of, parse_json, platform_here
from cowfs.images.writing import OutImage

__all__ = ["Credentials", "Pulled", "Registry", "credentials_for", "is_here"]

_log = Part("cowfs.images")

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)  # fmt: skip
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
)  # fmt: skip
MAX_DOCUMENT = 4 << 20
CHUNK = 256 << 10
TRIES = 5
"""How often a download that is cut goes on before it is given up."""

TIMEOUT = 60.0  # seconds without a byte

Progress = Callable[[str, str, int, int], object]
"""Called with a digest, what is being done to it, bytes done and bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A user of a registry; ``token``: an identity token in place of the password."""

    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """The result of resolving a name: the image (its layers are downloaded when they are opened), and the digest of its
    manifest or index."""

    image: Image
    digest: str


def is_here(host: str) -> bool:
    """Whether a registry is on this machine."""
    name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
    name = name.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def credentials_for(host: str, config: str | None = None) -> Credentials | None:
    """The credentials for a registry in ``~/.docker/config.json`` (or ``$DOCKER_CONFIG``), by credential helpers, too.

    Args:
        config: the file; default: the user's.

    Raises:
        InvalidArgument: the file cannot be read.
    """
    path = config or os.path.join(
        os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker"), "config.json"
    )
    try:
        with open(path, "rb") as file:
            known = parse_json(file.read(MAX_DOCUMENT), path)
    except FileNotFoundError:
        return None
    names = [host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
    names += ["https://index.docker.io/v1/"] if host == "docker.io" else []
    helpers = known.get("credHelpers")
    helper = next((helpers[name] for name in names if name in helpers), None) if isinstance(helpers, dict) else None
    helper = helper or known.get("credsStore")
    if isinstance(helper, str) and helper:
        found = _ask_helper(helper, names[-1] if host == "docker.io" else host)
        if found is not None:
            return found
    auths = known.get("auths")
    entry = next((auths[name] for name in names if name in auths), None) if isinstance(auths, dict) else None
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("identitytoken"), str) and entry["identitytoken"]:
        return Credentials(token=entry["identitytoken"])
    try:
        user, colon, password = base64.b64decode(entry.get("auth", ""), validate=True).decode().partition(":")
    except (ValueError, TypeError):
        raise InvalidArgument(f"{path}: the entry for {host} cannot be read") from None
    return Credentials(user=user, password=password) if colon else None


def _ask_helper(helper: str, host: str) -> Credentials | None:
    import subprocess

    if not re.fullmatch(r"[A-Za-z0-9._-]+", helper):
        raise InvalidArgument(f"no name of a credential helper: {helper!r}")
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"], input=host, capture_output=True, text=True, timeout=60, check=False
        )
        told = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if not isinstance(told, dict) or not told.get("Secret"):
        return None
    if told.get("Username") == "<token>":
        return Credentials(token=str(told["Secret"]))
    return Credentials(user=str(told.get("Username", "")), password=str(told["Secret"]))


@dataclass(slots=True)
class _Answer:
    """An answer whose body is still to be read; closes its connection."""

    status: int
    headers: Mapping[str, str]
    response: http.client.HTTPResponse
    connection: http.client.HTTPConnection
    url: str

    def read(self, limit: int = MAX_DOCUMENT) -> bytes:
        data = self.response.read(limit + 1)
        if len(data) > limit:
            raise InvalidArgument(f"{self.url}: the answer has more than {limit >> 20} MiB")
        return data

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


class Registry:
    """One registry.

    Args:
        host: name and port. insecure: see the third rule. credentials: of the user.
        spool: directory for downloads; they are files without a name there.
        progress: called with the progress of each layer.

    Threads: any.
    """

    def __init__(
        self,
        host: str,
        *,
        insecure: bool = False,
        credentials: Credentials | None = None,
        spool: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.host = host
        self._address = "registry-1.docker.io" if host == "docker.io" else host
        self._insecure = insecure or is_here(host)
        self._credentials = credentials
        self._spool = spool
        self._progress = progress or (lambda *_: None)
        self._tokens: dict[str, str] = {}  # scope -> header
        self._scheme = "https"
        self._settled = False  # whether the scheme is known to be right
        self._lock = threading.Lock()

    # -- pull -------------------------------------------------------------------------------------

    def pull(self, repository: str, reference: str, *, platform: str | None = None) -> Pulled:
        """Resolve a tag or a digest.

        Args:
            platform: ``os/architecture``; default: this machine's.

        Raises:
            NotFound: no such repository, tag or platform. FailedPrecondition: not allowed, or the registry does not answer.
            Corrupt: a document is not what its digest says.
        """
        data, kind = self._manifest(repository, reference)
        digest = digest_of(data)
        if reference.startswith("sha256:") and digest != reference:
            raise Corrupt(f"{self.host}/{repository}@{reference}: what came has the digest {digest}")
        document = parse_json(data, "manifest")
        kind = str(document.get("mediaType") or kind)
        if kind in INDEX_TYPES or "manifests" in document:
            inner = _choose(document, platform or f"linux/{platform_here()}", f"{self.host}/{repository}:{reference}")
            data, kind = self._manifest(repository, inner)
            if digest_of(data) != inner:
                raise Corrupt(f"{self.host}/{repository}@{inner}: what came has another digest")
            document = parse_json(data, "manifest")
        return Pulled(image=self._image(repository, document), digest=digest)

    def _image(self, repository: str, manifest: Mapping[str, Any]) -> Image:
        described = manifest.get("config")
        config_digest = check_digest(
            described.get("digest") if isinstance(described, dict) else None, "digest of the configuration"
        )
        with self._blob(repository, config_digest, 0) as answer:
            config = answer.read()
        if digest_of(config) != config_digest:
            raise Corrupt(f"the configuration {config_digest} has another digest")
        listed = manifest.get("layers")
        diff_ids = diff_ids_of(config)
        if not isinstance(listed, list) or len(listed) != len(diff_ids):
            raise InvalidArgument("manifest and configuration do not have the same number of layers")
        layers = []
        for each, diff_id in zip(listed, diff_ids, strict=True):
            digest = check_digest(each.get("digest") if isinstance(each, dict) else None, "digest of a layer")
            size = each.get("size")
            layers.append(
                Layer(
                    diff_id=diff_id,
                    digest=digest,
                    size=size if isinstance(size, int) else None,
                    media_type=str(each.get("mediaType", "")),
                    opener=lambda digest=digest, size=size: self.download(repository, digest, size),  # type: ignore[misc]
                )
            )
        about = parse_json(config, "configuration")
        platform = f"{about.get('os') or 'linux'}/{about.get('architecture') or platform_here()}"
        return Image(config=config, config_digest=config_digest, layers=tuple(layers), tags=(), platform=platform)

    def _manifest(self, repository: str, reference: str) -> tuple[bytes, str]:
        accept = ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))
        with self._ask(
            "GET", f"/v2/{repository}/manifests/{reference}", repository, headers={"Accept": accept}
        ) as answer:
            if answer.status == 404:
                raise NotFound(f"manifest for {self.host}/{repository}:{reference} not found")
            self._check(answer, 200)
            return answer.read(), answer.headers.get("content-type", "")

    def _blob(self, repository: str, digest: str, start: int) -> _Answer:
        headers = {"Range": f"bytes={start}-"} if start else {}
        answer = self._ask("GET", f"/v2/{repository}/blobs/{digest}", repository, headers=headers, redirects=5)
        if answer.status == 404:
            answer.connection.close()
            raise NotFound(f"{self.host}/{repository} has no blob {digest}")
        self._check(answer, 200, 206)
        return answer

    def download(self, repository: str, digest: str, size: int | None = None) -> BinaryIO:
        """A blob as an open file, whose digest is verified; the caller closes it.

        Raises:
            Corrupt: it has another digest, or another size. FailedPrecondition: the download was cut too often.
        """
        spool = tempfile.TemporaryFile(dir=self._spool, prefix="cowfs-blob-")  # noqa: SIM115  the caller closes it
        try:
            seen, done = hashlib.sha256(), 0
            for attempt in range(TRIES):
                try:
                    with self._blob(repository, digest, done) as answer:
                        if answer.status == 200 and done:
                            seen, done = hashlib.sha256(), 0  # the registry cannot go on where it was cut
                            spool.seek(0)
                            spool.truncate()
                        while data := answer.response.read(CHUNK):
                            spool.write(data)
                            seen.update(data)
                            done += len(data)
                            if size is not None and done > size:
                                raise Corrupt(f"the blob {digest} has more than the {size} bytes that were promised")
                            self._progress(digest, "Downloading", done, size or 0)
                        if answer.response.length:
                            raise http.client.IncompleteRead(b"")
                    if size is None or done == size:
                        break
                    raise http.client.IncompleteRead(b"")
                except (OSError, http.client.HTTPException, FailedPrecondition) as error:
                    if attempt == TRIES - 1:
                        raise FailedPrecondition(
                            f"{self.host}: the download of {digest} was cut {TRIES} times: {error}"
                        ) from None
            if "sha256:" + seen.hexdigest() != digest:
                raise Corrupt(f"what {self.host} gave as {digest} has another digest")
            self._progress(digest, "Download complete", done, size or done)
            spool.seek(0)
        except BaseException:
            spool.close()
            raise
        return spool

    # -- push -------------------------------------------------------------------------------------

    def push(self, repository: str, tag: str, image: OutImage, *, near: Sequence[str] = ()) -> str:
        """Send an image, and return the digest of its manifest.

        Args:
            near: repositories of this registry that probably have the layers: they are mounted from there where that is allowed.

        Raises:
            FailedPrecondition: not allowed, or the registry does not answer.
        """
        layers = []
        for layer in image.layers:
            with tempfile.TemporaryFile(dir=self._spool, prefix="cowfs-push-") as spool:
                layer.write(spool, "gzip")
                size = spool.tell()
                spool.seek(0)
                digest = "sha256:" + hashlib.file_digest(spool, "sha256").hexdigest()
                spool.seek(0)
                self._send_blob(repository, digest, spool, size, near, self._progress)
            layers.append(
                {"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "digest": digest, "size": size}
            )
        config_digest = digest_of(image.config)
        with tempfile.TemporaryFile(dir=self._spool) as spool:
            spool.write(image.config)
            spool.seek(0)
            self._send_blob(repository, config_digest, spool, len(image.config), near, lambda *_: None)
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPES[1],
                "config": {
                    "mediaType": "application/vnd.docker.container.image.v1+json",
                    "size": len(image.config),
                    "digest": config_digest,
                },
                "layers": layers,
            },
            indent=3,
        ).encode()
        headers = {"Content-Type": MANIFEST_TYPES[1]}
        path = f"/v2/{repository}/manifests/{tag}"
        with self._ask("PUT", path, repository, headers=headers, body=manifest, push=True) as answer:
            self._check(answer, 201, 200)
        return digest_of(manifest)

    def _send_blob(
        self, repository: str, digest: str, source: BinaryIO, size: int, near: Sequence[str], progress: Progress
    ) -> None:
        with self._ask("HEAD", f"/v2/{repository}/blobs/{digest}", repository, push=True, redirects=5) as answer:
            if answer.status == 200:
                progress(digest, "Layer already exists", size, size)
                return
        place = ""
        for other in near:
            place, is_mounted = self._mount_blob(repository, digest, other)
            if is_mounted:
                progress(digest, f"Mounted from {other}", size, size)
                return
            if place:
                break
        if not place:
            with self._ask("POST", f"/v2/{repository}/blobs/uploads/", repository, push=True, body=b"") as answer:
                self._check(answer, 202)
                place = urljoin(answer.url, answer.headers.get("location", ""))
        place += ("&" if urlsplit(place).query else "?") + urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        body = _Counted(source, lambda done: progress(digest, "Pushing", done, size))
        with self._ask("PUT", place, repository, headers=headers, body=body, push=True) as answer:
            self._check(answer, 201, 204)
        progress(digest, "Pushed", size, size)

    def _mount_blob(self, repository: str, digest: str, other: str) -> tuple[str, bool]:
        """Ask for a blob of another repository of this registry: where it is to be sent ("": ask anew), and whether it is there."""
        query = urlencode({"mount": digest, "from": other})
        scope = f"repository:{repository}:pull,push repository:{other}:pull"
        try:
            with self._ask(
                "POST", f"/v2/{repository}/blobs/uploads/?{query}", repository, push=True, body=b"", scope=scope
            ) as answer:
                place = urljoin(answer.url, answer.headers.get("location", ""))
                return (place if answer.status == 202 else ""), answer.status == 201
        except FailedPrecondition:
            return "", False  # no token for both

    def check_login(self) -> None:
        """Whether the registry takes the credentials.

        Raises:
            FailedPrecondition: it refuses them.
        """
        with self._ask("GET", "/v2/", "") as answer:
            self._check(answer, 200)

    # -- HTTP -------------------------------------------------------------------------------------

    def _check(self, answer: _Answer, *good: int) -> None:
        if answer.status in good:
            return
        with answer:
            said = ""
            with contextlib.suppress(CowfsError, OSError, http.client.HTTPException, KeyError, IndexError, TypeError):
                first = parse_json(answer.read(), "error")["errors"][0]
                said = f": {first.get('message') or first.get('code')}"
        if answer.status in (401, 403):
            raise FailedPrecondition(f"{self.host} denies access{said}", remedy="docker login, or another name")
        if answer.status == 404:
            raise NotFound(f"{self.host}{urlsplit(answer.url).path} is not there{said}")
        raise FailedPrecondition(f"{self.host} answers with status {answer.status}{said}")

    def _ask(
        self,
        method: str,
        path: str,
        repository: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | _Counted | None = None,
        push: bool = False,
        redirects: int = 0,
        scope: str = "",
    ) -> _Answer:
        """One request, with the authorization that the registry wants; redirects are followed without it."""
        if repository and not scope:
            scope = f"repository:{repository}:{'pull,push' if push else 'pull'}"
        if not self._settled:
            self._settle()
        for again in (False, True):
            sent = {**(headers or {}), **({"Authorization": self._tokens[scope]} if scope in self._tokens else {})}
            answer = self._send(method, urljoin(f"{self._scheme}://{self._address}", path), sent, body)
            if answer.status != 401 or again:
                break
            challenge = answer.headers.get("www-authenticate", "")
            answer.connection.close()
            self._tokens[scope] = self._authorize(challenge, scope)
            if isinstance(body, _Counted):
                body.rewind()
        while answer.status in (301, 302, 303, 307, 308) and redirects:
            redirects -= 1
            target = urljoin(answer.url, answer.headers.get("location", ""))
            answer.connection.close()
            if urlsplit(target).scheme not in ("https", self._scheme):
                raise FailedPrecondition(f"{self.host} redirects to a place without TLS")
            same = urlsplit(target).netloc == urlsplit(answer.url).netloc
            answer = self._send(method, target, sent if same else dict(headers or {}), body)
        return answer

    def _settle(self) -> None:
        """Find out whether an insecure registry speaks TLS."""
        with self._lock:
            if self._settled:
                return
            if self._insecure:
                try:
                    self._send("GET", f"https://{self._address}/v2/", {}, None).connection.close()
                except FailedPrecondition:
                    self._scheme = "http"
            self._settled = True

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | _Counted | None) -> _Answer:
        parts = urlsplit(url)
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            if self._insecure and parts.netloc == self._address:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            connection = http.client.HTTPSConnection(parts.netloc, timeout=TIMEOUT, context=context)
        else:
            connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request(method, target, body=body, headers={"User-Agent": "cowfs", **headers})
            response = connection.getresponse()
            _log.debug("%s %s%s: %d", method, parts.hostname, parts.path, response.status)  # a query may be a ticket
        except (OSError, http.client.HTTPException, socket.gaierror) as error:
            connection.close()
            said = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
            raise FailedPrecondition(f"the registry {parts.netloc} does not answer: {said}") from None
        found = {name.lower(): value for name, value in response.getheaders()}
        return _Answer(response.status, found, response, connection, url)

    def _authorize(self, challenge: str, scope: str) -> str:
        """The Authorization header that answers a challenge.

        Raises:
            FailedPrecondition: there are no credentials, or they are not taken.
        """
        scheme, _, rest = challenge.partition(" ")
        known = self._credentials
        basic = ""
        if known is not None and known.user:
            basic = "Basic " + base64.b64encode(f"{known.user}:{known.password}".encode()).decode()
        if scheme.lower() == "basic":
            if not basic:
                raise FailedPrecondition(f"{self.host} wants a user and a password", remedy=f"docker login {self.host}")
            return basic
        values = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = values.get("realm", "")
        if scheme.lower() != "bearer" or urlsplit(realm).scheme not in ("https", self._scheme):
            raise FailedPrecondition(f"{self.host} wants an authorization that cowfs does not know: {scheme[:40]}")
        return "Bearer " + self._token(realm, values, values.get("scope") or scope, basic)

    def _token(self, realm: str, values: Mapping[str, str], scope: str, basic: str) -> str:
        known = self._credentials
        query = [("service", values.get("service", "")), *(("scope", each) for each in scope.split())]
        if known is not None and known.token:
            form = urlencode(
                [
                    query[0],
                    ("scope", scope),
                    ("grant_type", "refresh_token"),
                    ("refresh_token", known.token),
                    ("client_id", "cowfs"),
                ]
            ).encode()
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = self._send("POST", realm, headers, form)
        else:
            address = realm + ("&" if urlsplit(realm).query else "?") + urlencode(query, quote_via=quote)
            answer = self._send("GET", address, {"Authorization": basic} if basic else {}, None)
        with answer:
            self._check(answer, 200)
            told = parse_json(answer.read(), "token")
        token = told.get("token") or told.get("access_token")
        if not isinstance(token, str):
            raise FailedPrecondition(f"{urlsplit(realm).netloc} gave no token")
        return token


class _Counted:
    """A file to send, which reports its progress."""

    def __init__(self, source: BinaryIO, told: Callable[[int], object]) -> None:
        self._source, self._told, self._done = source, told, 0

    def read(self, count: int = -1) -> bytes:
        data = self._source.read(CHUNK if count < 0 else max(count, CHUNK))
        self._done += len(data)
        if data:
            self._told(self._done)
        return data

    def rewind(self) -> None:
        self._source.seek(0)
        self._done = 0

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read():
            yield data


def _choose(index: Mapping[str, Any], platform: str, name: str) -> str:
    """The digest of the manifest for a platform."""
    listed = [each for each in index.get("manifests") or () if isinstance(each, dict)]
    wanted: Sequence[str] = platform.split("/")
    there = []
    for each in listed:
        about = each.get("platform") or {}
        mine = [str(about.get("os", "linux")), str(about.get("architecture", ""))]
        there.append("/".join(mine))
        if mine == list(wanted[:2]) and (len(wanted) < 3 or about.get("variant") == wanted[2]):
            return check_digest(each.get("digest"), "digest of a manifest")
    raise NotFound(f"{name} has no image for {platform}", remedy=f"it has {', '.join(sorted(set(there))) or 'none'}")
