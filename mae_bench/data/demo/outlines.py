"""Masks as COCO writes them: exact polygons of the visible outline, and run-length codes for crowds."""

from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
STEPS = (
    (1, 0),
    (0, 1),
    (-1, 0),
    (0, -1),
)  # right, down, left, up in (x, y): each a turn to the right of the one before


def polygons(mask: Mask) -> list[list[float]]:
    """Outlines of a mask along its pixels' edges, each [x0, y0, x1, y1, ...]; filled, they give back the same pixels.

    One polygon a connected part. COCO's polygons have no holes: a mask with one is cut in two through the hole.
    """
    loops = _loops(mask)
    hole = next((loop for loop in loops if _signed_area(loop) < 0), None)
    if hole is None:
        return [[float(value) for point in loop for value in point] for loop in loops]
    columns = [x for x, _ in hole]
    left, right = mask.copy(), mask.copy()
    cut = (min(columns) + max(columns)) // 2
    left[:, cut:] = False
    right[:, :cut] = False
    return polygons(left) + polygons(right)


def run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed code: lengths of the runs of 0, 1, 0, ... down the columns, and the size as (height, width)."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    ends = np.concatenate([[0], changes, [mask.size]])
    return {"counts": np.diff(ends).tolist(), "size": list(mask.shape)}


def box(mask: Mask) -> list[float]:
    """The smallest box around a mask that is not empty: x, y, width, height in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = columns[0], rows[0]
    return [float(x), float(y), float(columns[-1] - x + 1), float(rows[-1] - y + 1)]


def _loops(mask: Mask) -> list[list[tuple[int, int]]]:
    """Closed walks along the mask's border with the mask on the right: clockwise around parts, the other way around holes."""
    edges = _edges(mask)
    loops = []
    while edges:
        loops.append(_walk(edges, min(edges, key=lambda point: point[::-1])))
    return loops


def _walk(edges: dict[tuple[int, int], set[int]], start: tuple[int, int]) -> list[tuple[int, int]]:
    """Takes one loop's edges out of `edges`; its corners. From the topmost point only one edge leaves, so that it ends there."""
    point, direction, corners = start, -1, []
    while ways := edges.get(point):
        right = (direction + 1) % 4
        turn = right if right in ways else min(ways)  # where two pixels touch by a corner, stay with this one
        ways.discard(turn)
        if not ways:
            del edges[point]
        if turn != direction:
            corners.append(point)
        point, direction = (point[0] + STEPS[turn][0], point[1] + STEPS[turn][1]), turn
    return corners


def _edges(mask: Mask) -> dict[tuple[int, int], set[int]]:
    """Corner (x, y) -> directions of the border's edges that leave it."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    borders = (  # direction, pixels whose edge on that side is border, where that edge starts
        (0, inside & ~padded[:-2, 1:-1], (0, 0)),
        (1, inside & ~padded[1:-1, 2:], (1, 0)),
        (2, inside & ~padded[2:, 1:-1], (1, 1)),
        (3, inside & ~padded[1:-1, :-2], (0, 1)),
    )
    edges: dict[tuple[int, int], set[int]] = {}
    for direction, border, (dx, dy) in borders:
        for y, x in np.argwhere(border).tolist():
            edges.setdefault((x + dx, y + dy), set()).add(direction)
    return edges


def _signed_area(loop: list[tuple[int, int]]) -> float:
    """Positive for a clockwise loop (y points down)."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, [*loop[1:], loop[0]], strict=True)) / 2
