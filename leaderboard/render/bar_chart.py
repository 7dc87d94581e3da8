"""Draw a bar chart as inline SVG: the axis includes 0, and every value is a dot."""

import math
from html import escape

from leaderboard.sections import Bar, BarChart

WIDTH, THICKNESS, ROW, TOP = 320, 10, 38, 4
LONGEST = 28  # characters of a name
NICE = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)


def draw_bars(chart: BarChart, label: str) -> str:
    """Return the chart as an SVG element. `label` is its escaped alternative text."""
    limits = _find_limits([value for bar in chart.bars for value in bar.values])
    height = TOP + ROW * len(chart.bars)
    baseline = next((bar.mean for bar in chart.bars if bar.is_baseline), None)
    marks = []
    for i, bar in enumerate(chart.bars):
        y = TOP + ROW * i
        marks.append(_draw_bar(bar, limits, y))
        if baseline is not None:
            x = _scale(baseline, limits)
            marks.append(
                f'<line class="reference" x1="{x}" x2="{x}" y1="{y + 15}" y2="{y + 21 + THICKNESS}"/>'
            )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height + 22}" role="img" aria-label="{label}">'
        f"{''.join(marks)}{_draw_axis(limits, height)}</svg>"
    )


def _find_limits(values: list[float]) -> tuple[float, float]:
    """Return round ends of an axis that includes 0 and all values."""
    low = -_round_up(-min(values)) if min(values) < 0 else 0.0
    high = 0.0 if max(values) <= 0 and low < 0 else _round_up(max(values))
    return low, high


def _round_up(value: float) -> float:
    """Return the smallest round number that is not below a positive value; 1 for 0 and less."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in NICE if step * power >= value * (1 - 1e-9))


def _scale(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return round((value - low) / (high - low) * WIDTH, 1)


def _draw_bar(bar: Bar, limits: tuple[float, float], y: int) -> str:
    name = bar.name if len(bar.name) <= LONGEST else f"{bar.name[: LONGEST - 1]}…"
    weight = ' font-weight="700"' if bar.is_best else ""
    parts = [
        f'<text x="0" y="{y + 12}">{escape(name)}</text>',
        f'<text x="{WIDTH}" y="{y + 12}" text-anchor="end"{weight}>{escape(bar.text)}</text>',
    ]
    if bar.mean is not None:
        start, end = sorted((_scale(0, limits), _scale(bar.mean, limits)))
        kind = "plain" if bar.is_baseline else "bar"
        width = round(end - start, 1)
        parts.append(
            f'<rect class="{kind}" x="{start}" y="{y + 18}" width="{width}" height="{THICKNESS}" rx="2"/>'
        )
    centre = y + 18 + THICKNESS / 2
    for value in bar.values:
        parts.append(f'<circle class="seed" cx="{_scale(value, limits)}" cy="{centre}" r="2.5"/>')
    return "".join(parts)


def _draw_axis(limits: tuple[float, float], height: int) -> str:
    low, high = limits
    ticks = [f'<line class="axis" x1="0" x2="{WIDTH}" y1="{height}" y2="{height}"/>']
    values = (low, (low + high) / 2, high) if low == 0 else (low, 0.0, high)
    for value in dict.fromkeys(values):
        x = _scale(value, limits)
        anchor = {0.0: "start", float(WIDTH): "end"}.get(x, "middle")
        ticks.append(f'<text class="tick" x="{x}" y="{height + 16}" text-anchor="{anchor}">{value:g}</text>')
    return "".join(ticks)
