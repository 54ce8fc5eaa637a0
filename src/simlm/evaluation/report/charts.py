"""Charts as inline SVG. Colours come from classes of the page's style sheet, so that they follow its light and dark schemes.

Bars stretch with the page and hold no text; line charts are drawn for about the width they are shown at, so that text stays legible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from simlm.evaluation.report.steps import Point, StepRecord

# Pixels of a line chart's own coordinates.
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 26
_MAX_POINTS = 240
_MAX_SERIES = 4
_MAX_DECIMALS = 6


@dataclass(frozen=True)
class Series:
    """One line of a chart. points: (x, y), x rising; dots: mark each point (few points)."""

    label: str
    points: list[Point]
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One line chart with its title and, for more than one line, its legend: (class of the line, label)."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]]


def bar(fraction: float, *, style: str, reference: float | None = None, label: str = "") -> Markup:
    """A horizontal bar over `fraction` of the width; reference: a line across, at this fraction."""
    line = ""
    if reference is not None:
        at = _percent(reference)
        line = f'<line class="reference" x1="{at}" x2="{at}" y1="-6" y2="16" vector-effect="non-scaling-stroke"/>'
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<rect class="track" width="100" height="10"/><rect class="{}" width="{}" height="10"/>{}</svg>'
    ).format(label, style, _percent(fraction), Markup(line))


def stacked_bar(counts: Sequence[int], *, labels: Sequence[str], label: str = "") -> Markup:
    """Shares of a whole side by side, classes band0, band1 ...; labels: of each part, shown when pointed at."""
    total = sum(counts)
    parts = []
    start = 0.0
    for index, number in enumerate(counts):
        width = number / total * 100 if total else 0.0
        if width:
            title = Markup("<title>{}: {} ({}%)</title>").format(labels[index], f"{number:,}", f"{width:.1f}")
            parts.append(
                Markup('<rect class="band{}" x="{}" width="{}" height="10">{}</rect>').format(index, f"{start:.3f}", f"{width:.3f}", title)
            )
        start += width
    return Markup('<svg class="bar tall" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>').format(
        label, Markup("").join(parts)
    )


def training_panels(step: StepRecord) -> list[Panel]:
    """Line charts of a training step: its losses, then what was measured on dev queries or held-out passages, like with like.

    Empty where the step has no log.
    """
    losses = [Series(_spoken(name), points) for (kind, name), points in _ordered(step) if kind == "train" and _is_loss(name)]
    losses += [
        Series(f"dev {_spoken(name)}", points, dots=True) for (kind, name), points in _ordered(step) if kind == "dev" and _is_loss(name)
    ]
    groups: dict[str, list[Series]] = {}
    for (kind, name), points in _ordered(step):
        if kind == "dev" and not _is_loss(name):
            groups.setdefault(_subject(name), []).append(Series(_spoken(name), points, dots=True))
    panels = [_panel("loss", losses[:_MAX_SERIES])] if losses else []
    for subject, series in groups.items():
        panels.append(_panel(subject or ("dev " + series[0].label if len(series) == 1 else "dev measures"), series[:_MAX_SERIES]))
    return panels


def _subject(name: str) -> str:
    """What a measure of pre-training is about; empty for measures of dev queries."""
    if name.startswith("probe_"):
        return "retrieval probe on held-out passages"
    if name.startswith("cls_"):
        return "spread of [CLS] on held-out passages"
    if "accuracy_at_" in name:
        return "accuracy on held-out passages"
    return "share of tokens replaced" if name.endswith("_replaced") else ""


def line_chart(series: Sequence[Series], *, label: str = "") -> Markup:
    """A chart of lines with axes: x starts at 0, y spans the values; `label` is read out in place of the picture."""
    points = [point for one in series for point in one.points]
    assert points, "a chart needs a point"
    x_high = max(x for x, _ in points) or 1.0
    levels = ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = levels[0], levels[-1]

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + point[0] / x_high * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - (point[1] - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_horizontal(place((0, level))[1], tick_text(level, levels[1] - levels[0])) for level in levels]
    for x in (0.0, x_high / 2, x_high):
        at = place((x, low))[0]
        anchor = "start" if x == 0 else "end" if x == x_high else "middle"
        drawn.append(Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(f"{at:.1f}", _HEIGHT - 8, anchor, f"{x:,.0f}"))
    for index, one in enumerate(series):
        drawn.append(_line(index, one, [place(point) for point in thin(one.points)]))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, Markup("").join(drawn)
    )


def thin(points: list[Point], most: int = _MAX_POINTS) -> list[Point]:
    """At most `most` points: the means of equal runs of neighbours, the last point as it is."""
    if len(points) <= most:
        return points
    run = math.ceil((len(points) - 1) / (most - 1))
    parts = [points[start : min(start + run, len(points) - 1)] for start in range(0, len(points) - 1, run)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts] + [points[-1]]


def _panel(title: str, series: list[Series]) -> Panel:
    ends = "; ".join(f"{one.label} from {one.points[0][1]:.3g} to {one.points[-1][1]:.3g}" for one in series)
    legend = [(f"s{index}", one.label) for index, one in enumerate(series)] if len(series) > 1 else []
    return Panel(title, line_chart(series, label=f"{title} over training steps: {ends}"), legend)


def _ordered(step: StepRecord) -> list[tuple[tuple[str, str], list[Point]]]:
    """The curves, the whole loss first."""
    return sorted(step.curves.items(), key=lambda item: (item[0][1] != "loss", list(step.curves).index(item[0])))


def _is_loss(name: str) -> bool:
    return "loss" in name or name in ("kl", "rdrop", "listwise", "contrastive")


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _line(index: int, series: Series, placed: list[tuple[float, float]]) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    last = Markup("<title>{}: {}</title>").format(series.label, f"{series.points[-1][1]:.4g}")
    drawn = Markup('<polyline class="line s{}" points="{}">{}</polyline>').format(index, path, last)
    if series.dots or len(placed) == 1:
        for (x, y), (step, value) in zip(placed, thin(series.points), strict=True):
            title = Markup("<title>{} at step {}: {}</title>").format(series.label, f"{step:,.0f}", f"{value:.4g}")
            drawn += Markup('<circle class="dot s{}" cx="{}" cy="{}" r="3">{}</circle>').format(index, f"{x:.1f}", f"{y:.1f}", title)
    return drawn


def _horizontal(y: float, text: str) -> Markup:
    at = f"{y:.1f}"
    return Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text x="{}" y="{}" text-anchor="end">{}</text>').format(
        _LEFT, _WIDTH - _RIGHT, at, at, _LEFT - 7, f"{y + 4:.1f}", text
    )


def ticks(low: float, high: float) -> list[float]:
    """Three to six round values, equally far apart, that enclose low..high."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A value of an axis with the decimals that its step needs: 0.075 where ticks lie 0.025 apart, 0.08 where 0.02."""
    decimals = next((number for number in range(_MAX_DECIMALS) if abs(round(step, number) - step) < 1e-6 * step), _MAX_DECIMALS)
    return f"{value + 0.0:.{decimals}f}" if abs(value) < 1e5 else f"{value:.1e}"


def _percent(fraction: float) -> str:
    return f"{100 * min(1.0, max(0.0, fraction)):.3f}"


__all__ = ["Panel", "Series", "bar", "line_chart", "stacked_bar", "thin", "tick_text", "ticks", "training_panels"]
