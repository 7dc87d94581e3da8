"""Draw a line chart as inline SVG: evenly spaced x, whiskers for the spread, names at the lines' ends."""

import math
from dataclasses import dataclass
from html import escape

from leaderboard.sections import LineChart, Point, Series

WIDTH, LEFT, RIGHT, TOP = 440, 34, 112, 10  # of the picture and its margins
HEIGHT = 210  # of the plot, at least
LABEL = 15  # from one name to the next
LONGEST = 16  # characters of a name
COLOURS = 6  # of page.css: .line0, .line1, ...
DODGE, WIDEST = 3.0, 15.0  # between the whiskers of two lines, and of all lines


@dataclass(frozen=True)
class Frame:
    """The plot: where each x is drawn, the ends of the y axis, and the height in pixels."""

    xs: dict[float, float]
    low: float
    high: float
    step: float
    height: int

    def y(self, value: float) -> float:
        """Return where a value is drawn."""
        return round(TOP + (self.high - value) / (self.high - self.low) * self.height, 1)


def draw_lines(chart: LineChart, label: str) -> str:
    """Return the chart as an SVG element, the baseline in grey. `label` is its escaped alternative text."""
    frame = _build_frame(chart)
    others = [series.name for series in chart.series if not series.is_baseline]
    ends = _spread_labels(
        {series.name: frame.y(series.points[-1].mean) for series in chart.series}, TOP + frame.height
    )
    parts = [_draw_axes(frame, chart.x_label)]
    for i, series in enumerate(chart.series):
        kind = "plainline" if series.is_baseline else f"line{others.index(series.name) % COLOURS}"
        shift = (i - (len(chart.series) - 1) / 2) * min(DODGE, WIDEST / len(chart.series))
        content = _draw_series(frame, series, i, shift, ends[series.name])
        parts.append(f'<g class="{kind}">{content}</g>')
    view = f"0 0 {WIDTH} {TOP + frame.height + 40}"
    return f'<svg viewBox="{view}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def starts_at_zero(chart: LineChart) -> bool:
    """Return whether the vertical axis starts at 0."""
    return _build_frame(chart).low == 0


def _build_frame(chart: LineChart) -> Frame:
    points = [point for series in chart.series for point in series.points]
    xs = sorted({point.x for point in points})
    low, high, step = _find_limits(points)
    height = max(HEIGHT, LABEL * len(chart.series))
    return Frame(dict(zip(xs, _space_evenly(len(xs)), strict=True)), low, high, step, height)


def _space_evenly(count: int) -> list[float]:
    """Return places on the x axis at even steps, whatever the numbers are, as the paper draws them."""
    left, right = LEFT + 14, WIDTH - RIGHT - 14
    return [left + (right - left) * i / max(1, count - 1) for i in range(count)]


def _find_limits(points: list[Point]) -> tuple[float, float, float]:
    """Return round ends of the y axis, and the step between its four to eight lines."""
    bottom = min(point.mean - (point.std or 0) for point in points)
    top = max(point.mean + (point.std or 0) for point in points)
    rough = max(top - bottom, 1e-6) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    low, high = math.floor(bottom / step) * step, math.ceil(top / step) * step
    return low, high if high > low else low + step, step


def _spread_labels(places: dict[str, float], bottom: float) -> dict[str, float]:
    """Move the names apart, as close to the ends of their lines as they can be without overlap."""
    spread: dict[str, float] = {}
    last = -math.inf
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        last = spread[name] = max(place, last + LABEL)
    limit = bottom
    for name in reversed(spread):
        limit = spread[name] = min(spread[name], limit)
        limit -= LABEL
    return spread


def _draw_axes(frame: Frame, x_label: str) -> str:
    right, bottom = WIDTH - RIGHT, TOP + frame.height
    parts = []
    for i in range(round((frame.high - frame.low) / frame.step) + 1):
        value = frame.low + i * frame.step
        y = frame.y(value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.6g}</text>')
    for value, x in frame.xs.items():
        place = f'x="{round(x, 1)}" y="{bottom + 16}"'
        parts.append(f'<text class="tick" {place} text-anchor="middle">{value:g}</text>')
    place = f'x="{(LEFT + right) / 2}" y="{bottom + 34}"'
    parts.append(f'<text class="tick" {place} text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _draw_series(frame: Frame, series: Series, shape: int, shift: float, name_at: float) -> str:
    """Return the line, its whiskers and markers, and its name with a leader to it."""
    spots = [(round(frame.xs[point.x] + shift, 1), frame.y(point.mean)) for point in series.points]
    parts = [f'<polyline points="{" ".join(f"{x},{y}" for x, y in spots)}"/>']
    for (x, _), point in zip(spots, series.points, strict=True):
        if point.std:
            y1, y2 = frame.y(point.mean - point.std), frame.y(point.mean + point.std)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y1}" y2="{y2}"/>')
    parts += [_draw_marker(shape, x, y) for x, y in spots]
    end_x, end_y = spots[-1]
    label_x = WIDTH - RIGHT + 10
    ends = f'x1="{end_x + 5}" x2="{label_x - 3}" y1="{end_y}" y2="{round(name_at, 1)}"'
    name = series.name if len(series.name) <= LONGEST else f"{series.name[: LONGEST - 1]}…"
    parts.append(f'<line class="leader" {ends}/>')
    parts.append(f'<text x="{label_x}" y="{round(name_at + 4, 1)}">{escape(name)}</text>')
    return "".join(parts)


def _draw_marker(shape: int, x: float, y: float) -> str:
    """Return a circle, square, diamond or triangle in turn, so that lines differ in more than colour."""
    if shape % 4 == 0:
        return f'<circle cx="{x}" cy="{y}" r="3.5"/>'
    corners = {
        1: ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        2: ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
        3: ((0, -4.5), (4.5, 3.5), (-4.5, 3.5)),
    }[shape % 4]
    return f'<polygon points="{" ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in corners)}"/>'
