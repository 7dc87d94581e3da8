"""Encode masks as in COCO: exact polygons of the visible outline, and run lengths for crowds."""

from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
# Right, down, left, up in (x, y): each is a right turn from the one before.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def trace_polygons(mask: Mask) -> list[list[float]]:
    """Return the outlines of a mask along pixel edges, each as [x0, y0, x1, y1, ...].

    Filling the polygons restores the mask. There is one polygon per connected part. COCO's polygons have no
    holes: a mask with a hole is cut in two through it.
    """
    loops = _trace_loops(mask)
    hole = next((loop for loop in loops if _compute_signed_area(loop) < 0), None)
    if hole is None:
        return [np.array(loop, float).ravel().tolist() for loop in loops]
    columns = [x for x, _ in hole]
    left, right = mask.copy(), mask.copy()
    cut = (min(columns) + max(columns)) // 2
    left[:, cut:] = False
    right[:, :cut] = False
    return trace_polygons(left) + trace_polygons(right)


def encode_run_lengths(mask: Mask) -> dict[str, Any]:
    """Return COCO's uncompressed encoding: run lengths of 0, 1, 0, ... by column, and (height, width)."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    ends = np.concatenate([[0], changes, [mask.size]])
    return {"counts": np.diff(ends).tolist(), "size": list(mask.shape)}


def find_box(mask: Mask) -> list[float]:
    """Return the smallest box around a non-empty mask: x, y, width, height in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = columns[0], rows[0]
    return [float(x), float(y), float(columns[-1] - x + 1), float(rows[-1] - y + 1)]


def _trace_loops(mask: Mask) -> list[list[tuple[int, int]]]:
    """Return closed walks along the mask's border: clockwise around parts, counterclockwise around holes."""
    edges = _find_edges(mask)
    loops = []
    while edges:
        loops.append(_walk(edges, min(edges, key=lambda point: point[::-1])))
    return loops


def _walk(edges: dict[tuple[int, int], set[int]], start: tuple[int, int]) -> list[tuple[int, int]]:
    """Remove one loop from `edges` and return its corners; it ends at `start`, which only one edge leaves."""
    point, direction, corners = start, -1, []
    while point in edges:
        directions = edges[point]
        right = (direction + 1) % 4
        turn = (
            right if right in directions else min(directions)
        )  # where pixels touch at a corner, stay on this one
        directions.discard(turn)
        if not directions:
            del edges[point]
        if turn != direction:
            corners.append(point)
        point, direction = (point[0] + STEPS[turn][0], point[1] + STEPS[turn][1]), turn
    return corners


def _find_edges(mask: Mask) -> dict[tuple[int, int], set[int]]:
    """Return the directions of the border's edges that leave each corner (x, y)."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    borders = (  # direction, pixels with a border edge on that side, start of the edge
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


def _compute_signed_area(loop: list[tuple[int, int]]) -> float:
    """Return the area, positive for a clockwise loop (y points down)."""
    edges = zip(loop, [*loop[1:], loop[0]], strict=True)
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in edges) / 2
