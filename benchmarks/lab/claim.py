"""The records of a claim, a metric, a bar and a result, without any measuring.

A claim has *metrics* (the measured quantities with their units), *subjects* (the measured systems) and *bars* (the
demanded results). A sample is one number for (metric, subject, x), where x is the position on the metric's axis (a file
size, a chain depth) or None. A bar compares medians: the subject's against a peer's, or against a fixed bound.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .profiles import Profile

Key = tuple[str, str, float | None]  # metric, subject, x


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One measured quantity: unit is "s", "B", "B/s", "1/s", "x" (a plain ratio) or "" (a count)."""

    name: str
    unit: str = "s"
    title: str = ""
    x_title: str = ""
    x_unit: str = ""  # "B" makes the axis read 1 MiB, 1 GiB
    xs: Callable[[Profile], Sequence[float]] | None = None
    higher_is_better: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One line of the verdict: the subject's median of ``metric`` at ``x`` against a peer's, or alone, within bounds.

    ``against`` names one or several subjects, of which the best is taken, or is None for a bound in the metric's own
    unit. ``against_x`` compares with the same subject at another x (``"first"``/``"last"`` are the ends of the axis).
    """

    metric: str
    subject: str
    against: str | tuple[str, ...] | None = None
    at_most: float | None = None
    at_least: float | None = None
    goal: float | None = None
    x: float | str | None = None
    against_x: float | str | None = None
    against_metric: str | None = None
    says: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One file's claim: ``name`` is the file's, ``why`` one sentence on what a user gains from it."""

    name: str
    title: str
    why: str
    metrics: tuple[Metric, ...]
    subjects: tuple[str, ...]
    measure: Callable[[Any], None]  # gets the Lab (.measure)
    bars: tuple[Bar, ...] = ()
    topic: str = "mount"  # the page of the report: mount, store, row
    picture: bool = True


@dataclass(slots=True)
class Result:
    """The results of one run of a claim. ``skipped`` maps a subject to the reason why it has no samples."""

    claim: str
    samples: dict[Key, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, metric: str, subject: str, value: float, x: float | None = None) -> None:
        self.samples.setdefault((metric, subject, x), []).append(value)

    def median(self, metric: str, subject: str, x: float | None = None) -> float | None:
        got = self.samples.get((metric, subject, x))
        return statistics.median(got) if got else None

    def spread(self, metric: str, subject: str, x: float | None = None) -> tuple[float, float, float] | None:
        """(low, median, high): the quartiles, or the extremes where there are fewer than four samples."""
        got = sorted(self.samples.get((metric, subject, x), []))
        if not got:
            return None
        if len(got) < 4:
            return got[0], statistics.median(got), got[-1]
        low, mid, high = statistics.quantiles(got, n=4, method="inclusive")
        return low, mid, high

    def xs(self, metric: str, subject: str) -> list[float]:
        return sorted(x for (m, s, x) in self.samples if m == metric and s == subject and x is not None)

    def subjects(self, metric: str) -> list[str]:
        return list(dict.fromkeys(s for (m, s, _) in self.samples if m == metric))

    def to_json(self) -> dict[str, Any]:
        return {
            "claim": self.claim,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "notes": self.notes,
            "samples": [{"metric": m, "subject": s, "x": x, "values": v} for (m, s, x), v in self.samples.items()],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        result = cls(data["claim"], {}, dict(data["skipped"]), list(data["notes"]), data["seconds"])
        for row in data["samples"]:
            result.samples[(row["metric"], row["subject"], row["x"])] = list(row["values"])
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judged bar: ``ratio`` is got/base, or None without a peer; ``word`` is met, missed or not measured."""

    bar: Bar
    metric: Metric
    subject: str
    x: float | None
    got: float | None
    base: float | None
    base_name: str
    ratio: float | None
    word: str
    goal_met: bool


def _x_of(result: Result, metric: str, subject: str, x: float | str | None) -> float | None:
    if isinstance(x, str):
        xs = result.xs(metric, subject)
        return (xs[0] if x == "first" else xs[-1]) if xs else None
    if x is None:
        return None
    near = [have for have in result.xs(metric, subject) if have <= x]  # a smaller profile has a shorter axis
    return near[-1] if near else None


def _word(bar: Bar, value: float | None) -> tuple[str, bool]:
    """(met, missed or not measured; whether the goal is met too). A bar with a goal only is judged by it."""
    if value is None:
        return "not measured", False
    goal_met = bar.goal is not None and (value >= bar.goal if bar.at_least is not None else value <= bar.goal)
    if bar.at_most is None and bar.at_least is None:
        return ("goal met" if goal_met else "goal missed"), False
    ok = (bar.at_most is None or value <= bar.at_most) and (bar.at_least is None or value >= bar.at_least)
    return ("met" if ok else "missed"), goal_met


def judge(claim: Claim, result: Result) -> list[Verdict]:
    """Judges each bar of a claim by the medians of one result."""
    metrics = {m.name: m for m in claim.metrics}
    verdicts = []
    for bar in claim.bars:
        metric = metrics[bar.metric]
        x = _x_of(result, bar.metric, bar.subject, bar.x)
        got = result.median(bar.metric, bar.subject, x)
        base, base_name = None, ""
        other_metric = bar.against_metric or bar.metric
        if bar.against is not None or bar.against_x is not None or bar.against_metric is not None:
            names = (
                (bar.subject,)
                if bar.against is None
                else (bar.against,)
                if isinstance(bar.against, str)
                else bar.against
            )
            have = []
            for name in names:
                at = _x_of(result, other_metric, name, bar.against_x if bar.against_x is not None else bar.x)
                value = result.median(other_metric, name, at)
                if value is not None:
                    have.append((value, name))
            if have:
                base, base_name = max(have) if metric.higher_is_better else min(have)
            value_judged = got / base if got is not None and base else None
        else:
            value_judged = got
        word, goal_met = _word(bar, value_judged)
        verdicts.append(
            Verdict(
                bar=bar,
                metric=metric,
                subject=bar.subject,
                x=x,
                got=got,
                base=base,
                base_name=base_name,
                ratio=value_judged if base is not None else None,
                word=word,
                goal_met=goal_met,
            )
        )
    return verdicts


def show(value: float | None, unit: str) -> str:
    """A figure for people: ``1.25 s``, ``19.8 us``, ``64 MiB``, ``1,025 /s``."""
    if value is None:
        return "-"
    if unit == "s":
        size = abs(value)
        for limit, factor, name in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
            if size < limit:
                return f"{value * factor:.3g} {name}"
        return f"{value:.2f} s" if size < 100 else f"{value:.0f} s"
    if unit in ("B", "B/s"):
        size = abs(value)
        for factor, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
            if size >= factor:
                return (
                    f"{value / factor:.3g} {name}{unit[1:]}"
                    if size < 1000 * factor
                    else f"{value / factor:,.0f} {name}{unit[1:]}"
                )
        return f"{value:.0f} {unit}"
    if unit == "1/s":
        return f"{value:,.0f} /s"
    if unit == "x":
        return f"{value:.2f}x"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"
