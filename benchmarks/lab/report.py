"""The report: one picture a claim (PNG and SVG), one page with verdicts, pictures, all medians, and advice.

Pictures follow three rules: a subject has one colour everywhere, cowfs's own are saturated and peers' are grey or
muted; bars start at zero and carry their figure; error bars are quartiles (extremes below four samples). Axes with
sizes or spans of more than two powers of ten are logarithmic and say so by their ticks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .choose import advice
from .claim import Claim, Metric, Result, show
from .rows import HEADINGS, medians_rows, verdict_rows

COLOURS = {
    "cowfs": "#0b6e99",
    "cowfs passthrough": "#3fa7d6",
    "cowfs fusepy": "#9bd0ea",
    "row": "#c8553d",
    "row compacted": "#e39a8a",
    "overlay": "#0b6e99",
    "overlay xfs": "#59a5c4",
    "overlay btrfs": "#8cc4da",
    "vfs": "#6a994e",
    "overlayfs": "#4a4a4a",
    "overlayfs metacopy": "#7d7d7d",
    "fuse-overlayfs 1": "#b08900",
    "fuse-overlayfs 2": "#dcb64a",
    "unionfs-fuse": "#a78bba",
    "btrfs snapshot": "#8a6d5a",
    "plain": "#bdbdbd",
}
SPARE = ("#5f7a8c", "#9c6b98", "#7a8450", "#b5651d", "#4f6d7a", "#a0a0a0")
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "svg.hashsalt": "cowfs",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}


def colour(subject: str) -> str:
    return COLOURS.get(subject) or SPARE[sum(subject.encode()) % len(SPARE)]


def draw(claim: Claim, result: Result, folder: Path) -> str | None:
    """Draws a claim's picture to ``folder``; returns its stem, or None when there is nothing to draw."""
    shown = [m for m in claim.metrics if any(key[0] == m.name for key in result.samples)]
    if not shown or not claim.picture:
        return None
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    tallest = max(len(result.subjects(m.name)) for m in shown)
    height = 3.4 if any(m.xs for m in shown) else max(1.6, 0.42 * tallest + 0.9)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(5.6 * columns, height * rows + 0.5), squeeze=False, layout="constrained"
        )
        cells = [axes for line in grid for axes in line]
        for axes, metric in zip(cells, shown, strict=False):
            (_lines if metric.xs else _bars)(axes, metric, result)
        for axes in cells[len(shown) :]:
            axes.set_visible(False)
        figure.suptitle(claim.title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{claim.name}.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
    return claim.name


def _spread(metric: Metric, result: Result, subject: str, x: float | None) -> tuple[float, float, float]:
    low, mid, high = result.spread(metric.name, subject, x) or (0.0, 0.0, 0.0)
    return mid, mid - low, high - mid


def _bars(axes: Axes, metric: Metric, result: Result) -> None:
    subjects = result.subjects(metric.name)[::-1]
    for at, subject in enumerate(subjects):
        mid, below, above = _spread(metric, result, subject, None)
        axes.barh(
            at,
            mid,
            color=colour(subject),
            height=0.68,
            xerr=[[below], [above]],
            error_kw={"ecolor": "#222222", "capsize": 2.5, "lw": 1},
        )
        axes.annotate(
            show(mid, metric.unit),
            (mid + above, at),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(subjects)), subjects)
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value, metric.unit) if value else "0"))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_title(
        f"{metric.title or metric.name} ({'more' if metric.higher_is_better else 'less'} is better)", loc="left"
    )


def _lines(axes: Axes, metric: Metric, result: Result) -> None:
    everything: list[float] = []
    ticks: set[float] = set()
    for subject in result.subjects(metric.name):
        xs = result.xs(metric.name, subject)
        points = [_spread(metric, result, subject, x) for x in xs]
        mids = [point[0] for point in points]
        everything += mids
        ticks |= set(xs)
        axes.errorbar(
            xs,
            mids,
            yerr=[[p[1] for p in points], [p[2] for p in points]],
            color=colour(subject),
            marker="o",
            markersize=3.5,
            lw=1.6,
            capsize=2.5,
            label=subject,
            ls="-" if subject.split()[0] in ("cowfs", "row", "overlay", "vfs") else "--",
        )
    positive = [value for value in everything if value > 0]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value, metric.x_unit)))
    if positive and max(positive) / min(positive) > 30:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value, metric.unit) if value else "0"))
    axes.set_xlabel(metric.x_title)
    axes.grid(color="#e6e6e6")
    axes.set_title(
        f"{metric.title or metric.name} ({'more' if metric.higher_is_better else 'less'} is better)", loc="left"
    )
    axes.legend(fontsize=8, frameon=False, loc="best")


def markdown(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headings), "|" + "---|" * len(headings), *(line(row) for row in rows)])


def host_text(described: dict[str, Any]) -> str:
    d = described
    return (
        f"{d['processor']}, {d['cores']} cores, {d['memory_MiB'] / 1024:.0f} GiB; "
        f"{d['system']}, Linux {d['kernel']}, Python {d['python']}; "
        f"work folder {d['work']}; commit {d['commit'] or 'unknown'}; {d['time']}; "
        f"load at start {d['load_at_start']:.2f}."
    )


def write(folder: Path, described: dict[str, Any], profile: str, results: Sequence[tuple[Claim, Result]]) -> None:
    """Writes ``index.md`` and the pictures to ``folder``; pictures of earlier runs are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# cowfs benchmark report",
        f"Profile `{profile}`. {host_text(described)}",
        "Figures are medians; the spread is the quartiles, or the extremes where fewer than four samples were taken. "
        "Subjects were measured interleaved (A B C, A B C). Made by `python -m benchmarks`; do not edit.",
        "## Verdicts",
        markdown(verdict_rows(results), HEADINGS),
        "## When to choose which backend",
        advice({claim.name: result for claim, result in results}),
        "## Claim by claim",
    ]
    for claim, result in results:
        stem = draw(claim, result, folder)
        parts += [f"### {claim.title}", claim.why]
        if stem:
            parts.append(f"![{claim.title}]({stem}.png)")
        if result.samples:
            parts.append(
                markdown(
                    [row[1:] for row in medians_rows([(claim, result)])], ("metric", "subject", "median", "spread")
                )
            )
        parts += [f"Not measured: {subject}: {reason}." for subject, reason in result.skipped.items()]
        parts += [f"Note: {note}." for note in result.notes]
    (folder / "index.md").write_text("\n\n".join(parts) + "\n")
