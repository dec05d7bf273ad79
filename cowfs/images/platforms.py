"""Platforms: their notation, and the choice among those of an index.

Rules, those of containerd's ``platforms`` package: names are brought to one form (``x86_64`` is ``amd64``, ``arm`` alone
is ``arm/v7``, ``arm64/v8`` is ``arm64``). The wanted platform is followed by compatible ones: older variants, best
first; and, if no platform was given, the 32-bit architecture of this machine's processor.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cowfs._typed import Any
from cowfs.errors import InvalidArgument
from cowfs.images.digests import platform_here

__all__ = ["Platform", "here", "parse_platform", "ranking"]

_PART = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)
_SPELLINGS = {
    "i386": ("386", ""), "x86_64": ("amd64", ""), "x86-64": ("amd64", ""), "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"), "armel": ("arm", "v6"),
}  # fmt: skip
_PLAIN = {("arm", ""): "v7", ("arm64", "v8"): "", ("amd64", "v1"): ""}


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform in its one form; ``variant`` is "" for the plain one."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def of(cls, document: Any) -> Platform | None:
        """Of an image configuration, or the ``platform`` of a descriptor; None if it has none."""
        if not isinstance(document, dict):
            return None
        system, architecture, variant = (document.get(key) for key in ("os", "architecture", "variant"))
        if not (isinstance(system, str) and system and isinstance(architecture, str) and architecture):
            return None
        return cls.named(system, architecture, variant if isinstance(variant, str) else "")

    @classmethod
    def named(cls, system: str, architecture: str, variant: str = "") -> Platform:
        """A platform from any spelling of its parts."""
        architecture, usual = _SPELLINGS.get(architecture.lower(), (architecture.lower(), ""))
        variant = variant.lower() or usual
        if architecture.startswith("arm") and variant.isdecimal():
            variant = "v" + variant
        return cls(system.lower(), architecture, _PLAIN.get((architecture, variant), variant))

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def here() -> Platform:
    """This machine's platform."""
    variant = {"armv6l": "v6", "armv7l": "v7"}.get(os.uname().machine, "")
    return Platform.named("linux", platform_here(), variant)


def parse_platform(text: str) -> Platform:
    """``os/architecture`` or ``os/architecture/variant``.

    >>> str(parse_platform("linux/arm"))
    'linux/arm/v7'

    Raises:
        InvalidArgument: another form.
    """
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidArgument(
            f"{text!r} is not a platform", remedy="write OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, as in linux/arm/v7"
        )
    return Platform.named(*parts)


def ranking(wanted: Platform, *, asked: bool) -> list[Platform]:
    """Platforms whose programs run on ``wanted``, best first; ``asked``: only those of its own architecture.

    >>> [str(each) for each in ranking(parse_platform("linux/arm/v7"), asked=True)]
    ['linux/arm/v7', 'linux/arm/v6', 'linux/arm/v5']
    """
    system, architecture = wanted.os, wanted.architecture
    found = [wanted]
    number = re.fullmatch(r"v([0-9]{1,3})", wanted.variant)
    level = int(number[1]) if number else 0
    if architecture == "amd64":
        found += [Platform.named(system, "amd64", f"v{below}") for below in range(min(level, 16) - 1, 0, -1)]
        if not asked:
            found.append(Platform(system, "386"))
    elif architecture == "arm":
        found += [Platform(system, "arm", f"v{below}") for below in range(min(level, 16) - 1, 4, -1)]
    elif architecture == "arm64":
        if level > 8:
            found.append(Platform(system, "arm64"))
        if not asked:
            found += [Platform(system, "arm", f"v{below}") for below in range(8, 4, -1)]
    return found
