"""Test that the report has every metric of a protocol: label counts, neighbours, best epochs, margins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leaderboard.compare import compare
from leaderboard.index import load_runs
from leaderboard.metrics import build_table
from leaderboard.report import write_report
from leaderboard.sections import Table
from leaderboard.table import Comparison
from mae_bench.record import Metric

if TYPE_CHECKING:
    from tests.leaderboard.conftest import Folder


def read(folder: Folder) -> Comparison:
    return compare(load_runs(folder.root))


def table(comparison: Comparison) -> Table:
    found = build_table(comparison, 0)
    assert found is not None
    return found


def headers(comparison: Comparison) -> list[tuple[str, ...]]:
    return [(header.text, *header.lines) for header in table(comparison).headers]


def lines(comparison: Comparison) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table(comparison).rows]


def test_metrics_keep_the_order_of_the_records_and_show_their_margins(folder: Folder) -> None:
    for seed, shift in enumerate((-1, 1)):
        metrics = {f"top1_{name}": Metric(20.0 + shift) for name in ("1shot", "10shot", "1%")}
        metrics |= {
            f"top1_{name}_margin": Metric(2.0 + shift, "%", "lower") for name in ("1shot", "10shot", "1%")
        }
        folder.add("mae", 0, seed, metrics=metrics, main_metric="top1_1%")
    comparison = read(folder)
    assert headers(comparison) == [
        ("backbone",),
        ("top1_1shot", "%"),
        ("top1_10shot", "%"),
        ("top1_1%", "%"),
    ]
    assert lines(comparison) == [["mae", *["20.0 ± 1.4 (2.0)"] * 3]]
    assert "over the draws of one record" in table(comparison).caption


def test_a_margin_without_its_metric_is_a_metric(folder: Folder) -> None:
    folder.add("mae", 0, metrics={"top1": Metric(5.0), "safety_margin": Metric(1.5, "px")})
    assert lines(read(folder)) == [["mae", "5.00", "1.500"]]


def test_the_best_epoch_is_marked_as_selected_on_the_evaluated_images(folder: Folder) -> None:
    folder.add(
        "mae", 0, metrics={"top1": Metric(60.0), "best_top1": Metric(61.0), "best_epoch": Metric(7, "epochs")}
    )
    comparison = read(folder)
    assert ["best_top1", "%"] in [list(header) for header in headers(comparison)]
    assert "selected on the evaluated images" in table(comparison).caption
    assert "the score is that of the last epoch" in table(comparison).caption
    assert comparison.cells["mae"][0].mean == 60


def test_a_metric_where_lower_is_better_says_so(folder: Folder) -> None:
    for row, error in (("supervised", 60.0), ("mae", 52.0)):
        folder.add(
            row, 0, metrics={"mCE": Metric(error, "%", "lower"), "top1": Metric(50.0)}, main_metric="mCE"
        )
    comparison = read(folder)
    assert headers(comparison)[1:] == [("mCE", "%, lower is better"), ("top1", "%")]
    assert comparison.cells["mae"][0].is_best


def test_a_metric_missing_in_some_records_states_its_number_of_seeds(folder: Folder) -> None:
    folder.add("mae", 0, 0, metrics={"top1": Metric(60.0), "top5": Metric(80.0)})
    folder.add("mae", 0, 1, metrics={"top1": Metric(62.0)})
    folder.add("supervised", 61.0)
    assert lines(read(folder)) == [["supervised", "61.0", "-"], ["mae", "61.0 ± 1.4", "80.0 n=1"]]


def test_a_score_without_further_metrics_has_no_table(folder: Folder, tmp_path: Path) -> None:
    folder.add("mae", 50.0)
    assert build_table(read(folder), 0) is None
    assert not [
        path
        for path in write_report(folder.root, tmp_path)
        if "All metrics" in path.read_text(encoding="utf-8")
    ]


def test_names_of_metrics_are_escaped(folder: Folder, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder.add(
        "mae",
        0,
        protocol=evil,
        metrics={"top1": Metric(60.0), evil: Metric(1.0, evil), f"{evil}_2": Metric(2.0)},
    )
    paths = {path.suffix: path.read_text(encoding="utf-8") for path in write_report(folder.root, tmp_path)}
    assert evil not in paths[".html"]
    assert "<script" not in paths[".md"].replace("\\<script", "")


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_the_report_has_the_table_and_the_chosen_head(folder: Folder, tmp_path: Path, suffix: str) -> None:
    note = "avg-4, base_lr 2: the best of 32 heads on 80 images held out of train (61.25 %)"
    folder.add(
        "mae", 0, metrics={"top1": Metric(60.0), "top1_k20": Metric(58.5)}, notes=[note, "1 <image> lost"]
    )
    text = next(path for path in write_report(folder.root, tmp_path) if path.suffix == suffix).read_text(
        encoding="utf-8"
    )
    assert "58.5" in text.split("All metrics per protocol")[1]
    if suffix == ".html":
        assert f"{note}<br>1 &lt;image&gt; lost" in text
