"""Results as rows of texts, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Sequence

from .claim import Claim, Result, Verdict, judge, show

__all__ = ["HEADINGS", "medians_rows", "verdict_rows"]

HEADINGS = ("claim", "bar", "got", "ratio", "verdict")


def verdict_rows(results: Sequence[tuple[Claim, Result]]) -> list[tuple[str, str, str, str, str]]:
    """One row a bar, as texts, under `HEADINGS`."""
    rows = []
    for claim, result in results:
        for verdict in judge(claim, result):
            what = (
                verdict.bar.says or f"{claim.title}: {verdict.metric.title or verdict.metric.name} ({verdict.subject})"
            )
            ratio = "-" if verdict.ratio is None else times(verdict.ratio)
            rows.append((what, bar_text(verdict), got_text(verdict), ratio, word_text(verdict)))
    return rows


def medians_rows(results: Sequence[tuple[Claim, Result]]) -> list[tuple[str, str, str, str, str]]:
    """One row a measured series: claim, metric (and x), subject, median, quartiles."""
    rows = []
    for claim, result in results:
        metrics = {m.name: m for m in claim.metrics}
        for metric, subject, x in result.samples:
            unit, x_unit = metrics[metric].unit, metrics[metric].x_unit
            low, mid, high = result.spread(metric, subject, x) or (0.0, 0.0, 0.0)
            where = metric if x is None else f"{metric} @ {show(x, x_unit)}"
            rows.append((claim.name, where, subject, show(mid, unit), f"{show(low, unit)} .. {show(high, unit)}"))
    return rows


def times(ratio: float) -> str:
    """A ratio for people: ``1.25x``, and ``1/300`` below a twentieth."""
    return f"{ratio:.3g}x" if ratio >= 0.05 else f"1/{round(1 / ratio):,}" if ratio > 0 else "0x"


def bar_text(verdict: Verdict) -> str:
    """The demand of a bar, in words: ``<= 1.25x overlayfs``."""
    bar = verdict.bar
    relative = bar.against is not None or bar.against_x is not None or bar.against_metric is not None
    parts = []
    for sign, bound in (("<=", bar.at_most), (">=", bar.at_least)):
        if bound is not None:
            parts.append(f"{sign} {times(bound)}" if relative else f"{sign} {show(bound, verdict.metric.unit)}")
    if bar.goal is not None:
        parts.append(f"goal {times(bar.goal)}" if relative else f"goal {show(bar.goal, verdict.metric.unit)}")
    if relative:
        names = (bar.against,) if isinstance(bar.against, str) else (bar.against or (bar.subject,))
        other = " or ".join(names) if bar.against is not None else "its own"
        if bar.against_metric:
            other += f" {bar.against_metric}"
        if bar.against_x is not None:
            ends = {"first": "the low end", "last": "the high end"}
            at = ends[bar.against_x] if isinstance(bar.against_x, str) else show(bar.against_x, verdict.metric.x_unit)
            other += f" at {at}"
        return f"{', '.join(parts)} of {other}"
    return ", ".join(parts)


def got_text(verdict: Verdict) -> str:
    text = show(verdict.got, verdict.metric.unit)
    if verdict.x is not None and verdict.got is not None:
        text += f" at {show(verdict.x, verdict.metric.x_unit)}"
    if verdict.base is not None:
        text += f" against {show(verdict.base, verdict.metric.unit)} ({verdict.base_name})"
    return text


def word_text(verdict: Verdict) -> str:
    return verdict.word + (", goal met" if verdict.goal_met else "")
