"""The check of a container's health: as a configuration has it, and what is known of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cowfs.service.errors import ApiError

__all__ = ["Check", "Health", "check_of"]

KEPT = 5
"""Results of checks that the API shows."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check from a container's configuration; times in seconds."""

    command: tuple[str, ...]
    interval: float
    timeout: float
    retries: int
    start_period: float
    start_interval: float


@dataclass(slots=True)
class Health:
    """The observed health of one run of a container.

    Attributes:
        status: ``starting``, ``healthy`` or ``unhealthy``. streak: failures in a row. log: the last checks, as the API
            shows them.
    """

    status: str = "starting"
    streak: int = 0
    log: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def passed(self) -> None:
        """Take note of a check that succeeded."""
        self.status, self.streak = "healthy", 0

    def failed(self, most: int) -> None:
        """Take note of a check that failed; ``most`` of them in a row are one too many."""
        self.streak += 1
        if self.streak >= most:
            self.status = "unhealthy"

    def described(self) -> dict[str, Any]:
        """The health in the API's form."""
        return {"Status": self.status, "FailingStreak": self.streak, "Log": list(self.log)}


def check_of(config: Mapping[str, Any]) -> Check | None:
    """The check of a configuration; None where there is none.

    Raises:
        ApiError: 400: it is malformed.
    """
    told = config.get("Healthcheck") or {}
    test = told.get("Test") or []
    if not test or test == ["NONE"]:
        return None
    if not isinstance(test, list) or not all(isinstance(word, str) for word in test):
        raise ApiError(400, "Healthcheck.Test is no list of strings")
    kind, *words = test
    if kind == "CMD-SHELL" and len(words) == 1:
        words = [*(config.get("Shell") or ["/bin/sh", "-c"]), words[0]]
    elif kind != "CMD" or not words:
        raise ApiError(400, f"Unknown healthcheck type in the image or the request: {kind!r}")

    def seconds(name: str, default: float) -> float:
        value = told.get(name) or 0
        if type(value) is not int or value < 0 or 0 < value < 1_000_000:
            raise ApiError(400, f"{name} in Healthcheck cannot be less than 1ms")
        return value / 1e9 or default

    retries = told.get("Retries") or 0
    if type(retries) is not int or retries < 0:
        raise ApiError(400, "Retries in Healthcheck cannot be negative")
    return Check(
        tuple(words), seconds("Interval", 30.0), seconds("Timeout", 30.0), retries or 3, seconds("StartPeriod", 0.0),
        seconds("StartInterval", 5.0),
    )  # fmt: skip
