"""Names of images: ``[registry/]repository[:tag][@digest]``, and the short form for people.

Rule: the store keeps the familiar form (``debian:12`` for ``docker.io/library/debian:12``), so that one image has one name
whether the command or a client of the API gave it. Source of the grammar: the distribution project's reference format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cowfs.service.errors import ApiError

__all__ = ["Reference", "familiar", "parse"]

DEFAULT_REGISTRY = "docker.io"

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_REFERENCE = re.compile(
    rf"(?:(?P<registry>{_HOST})/)?(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A name taken apart.

    Attributes:
        registry: host and port. repository: the path there. tag, digest: "" where not given.
    """

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """The familiar name, without tag and digest."""
        if self.registry != DEFAULT_REGISTRY:
            return f"{self.registry}/{self.repository}"
        return self.repository.removeprefix("library/") if self.repository.count("/") == 1 else self.repository

    @property
    def familiar(self) -> str:
        """The familiar form, with ``:latest`` where neither tag nor digest is given."""
        if self.digest and not self.tag:
            return f"{self.name}@{self.digest}"
        return f"{self.name}:{self.tag or 'latest'}"


def parse(text: str) -> Reference:
    """Take a name apart.

    Raises:
        ApiError: 400: it is malformed.

    >>> parse("debian").familiar, parse("docker.io/library/debian:12").familiar, parse("localhost:5000/a/b").familiar
    ('debian:latest', 'debian:12', 'localhost:5000/a/b:latest')
    """
    match = _REFERENCE.fullmatch(text)
    if match is None or len(text) > 255:
        if _REFERENCE.fullmatch(text.lower()):
            raise ApiError(400, f"invalid reference format: repository name ({text}) must be lowercase")
        raise ApiError(400, f"invalid reference format: {text[:80]!r}")
    registry, repository = match["registry"] or "", match["repository"]
    if registry and not (registry == "localhost" or "." in registry or ":" in registry or registry != registry.lower()):
        registry, repository = "", f"{registry}/{repository}"  # the first part of a path, not a host
    if registry in ("", "index.docker.io", "registry-1.docker.io"):
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(registry=registry, repository=repository, tag=match["tag"] or "", digest=match["digest"] or "")


def familiar(text: str) -> str:
    """The familiar form of a name; a name that is no reference stays as it is."""
    try:
        return parse(text).familiar
    except ApiError:
        return text
