"""Test that every renderer draws every kind of block, and that each medium shows its sections."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

import pytest
from rich.console import Console

from leaderboard.render.html import render_html
from leaderboard.render.markdown import render_markdown
from leaderboard.render.terminal import print_report
from leaderboard.report import build_report, load_results
from leaderboard.scores import MOST_COLUMNS
from leaderboard.sections import (
    Bar,
    BarChart,
    Block,
    Bullets,
    Code,
    Facts,
    Figure,
    Figures,
    Fold,
    Header,
    Line,
    Link,
    Paragraph,
    Report,
    Section,
    Table,
    TableCell,
)

if TYPE_CHECKING:
    from tests.leaderboard.conftest import Folder

CELL = TableCell("12.3", " ± 0.4", (Line("-1.0 [-2.0, 0.0]", "worse", "worse"),), value=12.3, is_best=True)
TABLE = Table(
    "Scores",
    (Header("backbone", align="left"), Header("top1", ("val",)), Header("source", align="left")),
    ((TableCell("a_b"), CELL, TableCell("He et al.", url="https://arxiv.org")),),
    "A caption.",
    "Red: worse.",
)
CHART = Figure("Chart", "val", "mae 1.0", BarChart((Bar("mae", "1.0", (1.0,), 1.0),)))
BLOCKS: tuple[Block, ...] = (
    Paragraph("A sentence."),
    Bullets(("one", Link("two", "https://arxiv.org"))),
    TABLE,
    Figures((CHART,), "A legend."),
    Facts({"seed": "0", "notes": ""}),
    Code("lr: 0.1"),
    Fold("More", (Paragraph("folded"),)),
)


def render_text(report: Report) -> str:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_blocks_of_this_test_are_all_kinds() -> None:
    assert {type(block) for block in BLOCKS} == set(get_args(Block))


@pytest.mark.parametrize("render", [render_html, render_markdown, render_text])
def test_every_renderer_draws_every_kind_of_block(render: Callable[[Report], str]) -> None:
    text = render(Report("Title", "Lead", (Section("Section", BLOCKS, medium="terminal"),)))
    for part in (
        "A sentence.",
        "two",
        "12.3",
        "± 0.4",
        "A caption.",
        "He et al.",
        "seed",
        "lr: 0.1",
        "folded",
    ):
        assert part in text
    assert "notes" not in text.split("</style>")[-1]


def test_html_marks_up_a_table_for_everyone() -> None:
    page = render_html(Report("Title", "Lead", (Section("Section", (TABLE,)),)))
    assert "<caption>A caption. Red: worse.</caption>" in page
    assert '<th scope="col">top1<small>val</small></th>' in page
    assert '<th scope="row">a_<wbr>b</th>' in page
    assert '<td data-value="12.3" class="best">' in page
    assert '<small class="worse">\N{MINUS SIGN}1.0 [\N{MINUS SIGN}2.0, 0.0] worse</small>' in page
    assert '<td class="text"><a href="https://arxiv.org">He et al.</a></td>' in page


def test_larger_media_show_the_sections_of_smaller_ones() -> None:
    report = Report(
        "Title",
        "Lead",
        (
            Section("everywhere", (), medium="terminal"),
            Section("written", (), medium="document"),
            Section("drawn", (), medium="page"),
        ),
    )
    titles = [section.title for section in report.sections]
    assert [section.title for section in report.select_sections("terminal")] == titles[:1]
    assert [section.title for section in report.select_sections("document")] == titles[:2]
    assert [section.title for section in report.select_sections("page")] == titles


@pytest.mark.parametrize(
    ("num_columns", "sizes"),
    [
        ({"imagenet": 4}, [4]),
        ({"imagenet": 6}, [3, 3]),
        ({"imagenet": 3, "coco": 1, "ade20k": 1}, [3, 2]),
        ({"imagenet": 5, "coco": 2, "ade20k": 2}, [3, 2, 4]),
        ({"imagenet": 9}, [3, 3, 3]),
    ],
)
def test_wide_comparisons_are_divided_between_tasks(
    folder: Folder, num_columns: dict[str, int], sizes: list[int]
) -> None:
    for task, count in num_columns.items():
        for i in range(count):
            folder.add("mae", 50.0, task=task, protocol=f"linear-{i}")
    report = build_report(load_results(folder.root))
    (section,) = (section for section in report.sections if section.title == "Comparison")
    tables = [block for block in section.blocks if isinstance(block, Table)]
    assert [len(table.headers) - 1 for table in tables] == sizes
    assert max(sizes) <= MOST_COLUMNS
    assert len({table.name for table in tables}) == len(tables)
