"""A curve as inline SVG: one line a row over numbers in even steps, whiskers for the spread, names at the lines' ends."""

import math
from html import escape

from leaderboard.curve import Curve, headers, lines
from leaderboard.table import Measured

WIDTH, LEFT, RIGHT, TOP, HEIGHT = (
    440,
    34,
    112,
    10,
    210,
)  # the plot lies between the margins; HEIGHT is the plot's alone
LABEL = 15  # from one name to the next
LONGEST = 16  # letters of a name
COLOURS = 6  # of page.css, .line0 ...
DODGE, WIDEST = 3.0, 15.0  # between the whiskers of two lines, and of all


def line_chart(curve: Curve, baseline: str = "") -> str:
    """A figure whose y axis ends at round numbers around what is drawn; the baseline's line is grey."""
    rows, others = list(curve.points), [row for row in curve.points if row != baseline]
    low, high, step = _limits([value for own in curve.points.values() for value in own.values()])
    height = max(HEIGHT, LABEL * len(rows))
    xs = dict(zip(curve.counts, _even(len(curve.counts)), strict=True))

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * height, 1)

    parts = [
        _axes(
            curve,
            xs,
            [(low + i * step, y(low + i * step)) for i in range(round((high - low) / step) + 1)],
            height,
        )
    ]
    ends = _apart({row: y(list(own.values())[-1].mean) for row, own in curve.points.items()}, TOP + height)
    for i, (row, own) in enumerate(curve.points.items()):
        shift = (i - (len(rows) - 1) / 2) * min(DODGE, WIDEST / len(rows))
        spots = [(round(xs[count] + shift, 1), y(value.mean), value) for count, value in own.items()]
        kind = "plainline" if row == baseline else f"line{others.index(row) % COLOURS}"
        whiskers = [
            (x, y(value.mean - value.std), y(value.mean + value.std)) for x, _, value in spots if value.std
        ]
        parts.append(_line(row, kind, i, [(x, top) for x, top, _ in spots], whiskers, ends[row]))
    label = f"{curve.name}, {curve.place}. {_spoken(curve)}"
    from_zero = "" if low == 0 else "<br>The vertical axis does not start at 0."
    return (
        f"<figure><figcaption><strong>{escape(curve.name)}</strong><br>{escape(curve.place)}{from_zero}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {TOP + height + 40}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


def _even(count: int) -> list[float]:
    """Places on the x axis: even steps, whatever the numbers are, as the paper draws them."""
    left, right = LEFT + 14, WIDTH - RIGHT - 14
    return [left + (right - left) * i / max(1, count - 1) for i in range(count)]


def _limits(values: list[Measured]) -> tuple[float, float, float]:
    """Round ends of the y axis and the step between its four to eight lines."""
    bottom = min(value.mean - (value.std or 0) for value in values)
    top = max(value.mean + (value.std or 0) for value in values)
    rough = max(top - bottom, 1e-6) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    low, high = math.floor(bottom / step) * step, math.ceil(top / step) * step
    return low, high if high > low else low + step, step


def _apart(places: dict[str, float], bottom: float) -> dict[str, float]:
    """Places of the names: as near to their lines' ends as they can be without overlapping."""
    apart: dict[str, float] = {}
    last = -math.inf
    for row, place in sorted(places.items(), key=lambda item: item[1]):
        last = apart[row] = max(place, last + LABEL)
    limit = bottom
    for row in reversed(apart):
        limit = apart[row] = min(apart[row], limit)
        limit -= LABEL
    return apart


def _axes(curve: Curve, xs: dict[float, float], ticks: list[tuple[float, float]], height: float) -> str:
    right, bottom = WIDTH - RIGHT, TOP + height
    grid = "".join(
        f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.6g}</text>'
        for value, y in ticks
    )
    numbers = "".join(
        f'<text class="tick" x="{round(x, 1)}" y="{bottom + 16}" text-anchor="middle">{count:g}</text>'
        for count, x in xs.items()
    )
    middle = (LEFT + right) / 2
    return f'{grid}{numbers}<text class="tick" x="{middle}" y="{bottom + 34}" text-anchor="middle">tuned blocks</text>'


def _line(
    row: str,
    kind: str,
    shape: int,
    spots: list[tuple[float, float]],
    whiskers: list[tuple[float, float, float]],
    name_at: float,
) -> str:
    path = " ".join(f"{x},{y}" for x, y in spots)
    end_x, end_y = spots[-1]
    name = row if len(row) <= LONGEST else f"{row[: LONGEST - 1]}…"
    label_x = WIDTH - RIGHT + 10
    return (
        f'<g class="{kind}"><polyline points="{path}"/>'
        + "".join(f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>' for x, low, high in whiskers)
        + "".join(_mark(shape, x, y) for x, y in spots)
        + f'<line class="leader" x1="{end_x + 5}" x2="{label_x - 3}" y1="{end_y}" y2="{round(name_at, 1)}"/>'
        f'<text x="{label_x}" y="{round(name_at + 4, 1)}">{escape(name)}</text></g>'
    )


def _mark(shape: int, x: float, y: float) -> str:
    """Circle, square, diamond, triangle in turn: lines are told apart without their colours too."""
    if shape % 4 == 0:
        return f'<circle cx="{x}" cy="{y}" r="3.5"/>'
    corners = {
        1: ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        2: ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
        3: ((0, -4.5), (4.5, 3.5), (-4.5, 3.5)),
    }[shape % 4]
    return f'<polygon points="{" ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in corners)}"/>'


def _spoken(curve: Curve) -> str:
    names = headers(curve)[1:]
    return "; ".join(
        f"{row}: " + ", ".join(f"{name} blocks {text}" for name, text in zip(names, texts, strict=True))
        for row, *texts in lines(curve)
    )
