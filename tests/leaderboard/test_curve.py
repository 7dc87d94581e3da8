"""Test the curve of partial fine-tuning and its chart, with the published curve apart from it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leaderboard import metrics
from leaderboard.compare import compare
from leaderboard.curve import Curve, build_curves, build_figure, build_published_curves, build_table
from leaderboard.index import load_runs
from leaderboard.render.line_chart import WIDTH, draw_lines
from leaderboard.report import write_report
from leaderboard.sections import LineChart
from leaderboard.table import Measured
from mae_bench.record import Metric

if TYPE_CHECKING:
    from tests.leaderboard.conftest import Folder


def add(folder: Folder, backbone: str, seed: int, points: dict[str, float]) -> None:
    found = {"top1": Metric(50.0), **{f"top1_blocks_{count}": Metric(top1) for count, top1 in points.items()}}
    folder.add(backbone, 0, seed, protocol="partial-small", metrics=found)


@pytest.fixture
def partial(folder: Folder) -> Folder:
    """Two rows, one with a shallower backbone. Sorted as text, 10 blocks would precede 2."""
    for seed, shift in enumerate((-1.0, 0.0, 1.0)):
        add(folder, "mae", seed, {"0": 30 + shift, "0.5": 50 + shift, "2": 60 + shift, "10": 70 + shift})
        add(folder, "supervised", seed, {"0": 40, "0.5": 45, "2": 50})
    folder.add("mae", 9.0, protocol="knn")
    return folder


def drawn(points: dict[str, dict[float, float]], std: float | None = None, baseline: str = "") -> ET.Element:
    measured = {
        row: {n: Measured(v, std, 3, "%", "higher") for n, v in own.items()} for row, own in points.items()
    }
    chart = build_figure(Curve("curve", "here", measured, dict.fromkeys(points, 3)), baseline).drawing
    assert isinstance(chart, LineChart)
    return ET.fromstring(draw_lines(chart, "label"))


def polyline(svg: ET.Element, kind: str) -> list[tuple[float, float]]:
    line = svg.find(f"g[@class='{kind}']/polyline")
    assert line is not None
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.attrib["points"].split())]


def test_points_are_means_over_seeds_in_the_order_of_the_blocks(partial: Folder) -> None:
    (curve,) = build_curves(compare(load_runs(partial.root)))
    table = build_table(curve)
    assert [header.text for header in table.headers] == ["tuned blocks", "0", "0.5", "2", "10"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["supervised", "40.0 ± 0.0", "45.0 ± 0.0", "50.0 ± 0.0", "-"],
        ["mae", "30.0 ± 1.0", "50.0 ± 1.0", "60.0 ± 1.0", "70.0 ± 1.0"],
    ]


def test_numbers_of_blocks_are_sorted_over_all_rows() -> None:
    one = Measured(1.0, None, 1, "%", "higher")
    points: dict[str, dict[float, Measured]] = {
        "deep": {24: one, 12: one},
        "shallow": {0.5: one, 6: one, 0: one},
    }
    assert Curve("", "", points, {}).num_blocks == [0, 0.5, 6, 12, 24]


def test_points_are_only_in_the_table_of_the_curve(partial: Folder) -> None:
    comparison = compare(load_runs(partial.root))
    assert [metrics.build_table(comparison, place) for place in range(2)] == [None, None]


def test_a_single_number_of_blocks_is_not_a_curve(folder: Folder) -> None:
    add(folder, "mae", 0, {"1": 50})
    assert build_curves(compare(load_runs(folder.root))) == []


@pytest.mark.parametrize(
    ("method", "count", "value"),
    [("MAE", 0, 73.5), ("MAE", 0.5, 79.1), ("MAE", 4, 84.2), ("MoCo v3", 4, 81.6)],
)
def test_the_published_curve_matches_the_paper(method: str, count: float, value: float) -> None:
    (curve,) = build_published_curves()
    assert curve.points[method][count].mean == value
    assert "Figure 9" in curve.name
    assert "not comparable with the runs" in curve.place
    assert all(list(own) == sorted(own) for own in curve.points.values())
    assert 0.5 not in curve.points["MoCo v3"]


def test_the_published_curve_has_its_own_chart(partial: Folder, tmp_path: Path) -> None:
    markdown, _, text, html = (
        path.read_text(encoding="utf-8") for path in write_report(partial.root, tmp_path / "out")
    )
    section = html.split("Partial fine-tuning")[1].split("<section")[0]
    own, published = re.findall(r"<figure>.*?</figure>", section)
    assert "MoCo v3" not in own
    assert ">mae<" not in published
    assert re.findall(r'role="img" aria-label="([^"]*)"', own) == [
        "imagenet partial-small, shapes val, top1 (%), higher is better. "
        "supervised: 0 blocks 40.0 ± 0.0, 0.5 blocks 45.0 ± 0.0, 2 blocks 50.0 ± 0.0, 10 blocks -; "
        "mae: 0 blocks 30.0 ± 1.0, 0.5 blocks 50.0 ± 1.0, 2 blocks 60.0 ± 1.0, 10 blocks 70.0 ± 1.0"
    ]
    assert "| mae | 30.0 ± 1.0 | 50.0 ± 1.0 | 60.0 ± 1.0 | 70.0 ± 1.0 |" in markdown
    assert "| MAE | 73.5 | 79.1 |" in markdown
    assert json.loads(text)["cells"]["mae"][1]["metrics"]["top1_blocks_0.5"]["mean"] == 50


def test_without_measured_curves_none_is_quoted(folder: Folder, tmp_path: Path) -> None:
    folder.add("mae", 50.0)
    assert not [
        path
        for path in write_report(folder.root, tmp_path / "out")
        if "tuned blocks" in path.read_text(encoding="utf-8")
    ]


def test_x_is_evenly_spaced_and_y_is_to_scale() -> None:
    spots = polyline(drawn({"mae": {0: 70.0, 1: 75.0, 24: 85.0}}), "line0")
    (x0, y0), (x1, y1), (x2, y2) = spots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y1 - y2) == pytest.approx(2 * (y0 - y1), abs=0.3)


def test_a_missing_point_leaves_its_place_empty() -> None:
    svg = drawn({"whole": {0: 1.0, 1: 2.0, 2: 3.0}, "part": {0: 1.0, 2: 3.0}})
    whole, part = polyline(svg, "line0"), polyline(svg, "line1")
    assert part[1][0] - part[0][0] == pytest.approx(whole[2][0] - whole[0][0], abs=0.2)


def test_the_baseline_is_grey_and_whiskers_are_one_deviation_long() -> None:
    svg = drawn({"supervised": {0: 10.0, 1: 20.0}, "mae": {0: 12.0, 1: 22.0}}, std=2.0, baseline="supervised")
    (_, low), (_, high) = polyline(svg, "plainline")
    whisker = next(line for line in svg.findall("g[@class='line0']/line") if "class" not in line.attrib)
    reach = abs(float(whisker.attrib["y1"]) - float(whisker.attrib["y2"]))
    assert reach == pytest.approx((low - high) * 4 / 10, abs=0.3)


@pytest.mark.parametrize(
    "values", [[50.0] * 5, [50.0 + i / 10 for i in range(14)], [0.0, 100.0, 99.9], [1e-9, 0.0]]
)
def test_names_do_not_overlap_and_everything_is_inside_the_picture(values: list[float]) -> None:
    svg = drawn({f"row {i}": {0: value, 1: value} for i, value in enumerate(values)})
    *_, width, height = map(float, svg.attrib["viewBox"].split())
    names = sorted(float(text.attrib["y"]) for text in svg.findall("g/text"))
    assert len(names) == len(values)
    assert all(second - first > 14 for first, second in zip(names, names[1:], strict=False))
    assert width == WIDTH
    assert all(0 < y < height for y in names)
    for x, y in (spot for i in range(min(6, len(values))) for spot in polyline(svg, f"line{i}")):
        assert 0 <= x <= width
        assert 0 <= y <= height
