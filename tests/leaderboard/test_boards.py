"""Reference boards: which rows they show, in which order, and how a command prints and writes them."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from leaderboard.boards import BOARDS, build_board, select_board, write_board
from leaderboard.published import load_results
from leaderboard.render.markdown import render_markdown
from leaderboard.sections import Table, TableCell
from mae_bench.cli.app import app
from mae_bench.errors import UserError


def find_table(board: str, title: str) -> Table:
    (section,) = [section for section in build_board(board).sections if section.title == title]
    table = section.blocks[0]
    assert isinstance(table, Table)
    return table


def read_numbers(table: Table) -> list[tuple[str, ...]]:
    """Return method and backbone with the numbers of each line."""
    numbers = [i for i, header in enumerate(table.headers) if header.align == "right"]
    return [(row[0].text, row[1].text, *(row[i].text for i in numbers)) for row in table.rows]


def test_every_row_is_on_a_board_of_its_task() -> None:
    for row in load_results():
        assert any(board.shows(row) for board in BOARDS.values() if not board.by_place), row


def test_every_row_of_a_board_is_in_one_table() -> None:
    for name in BOARDS:
        shown = 0
        for section in build_board(name).sections:
            table = section.blocks[0]
            if isinstance(table, Table):
                shown += sum(cell.value is not None for row in table.rows for cell in row)
        assert shown == len(select_board(name)) > 0


def test_an_unknown_board_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="nope") as error:
        build_board("nope")
    assert all(name in str(error.value) for name in BOARDS)


def test_table_4_of_vitdet_has_no_relative_positions_and_table_5_has() -> None:
    """The two differ by 0.4 to 1 point at one schedule, so they never share a table or a name."""
    without = find_table("coco", "COCO val2017, maskrcnn-vitdet-100ep-norelpos")
    assert read_numbers(without) == [("MAE", "ViT-L/16", "54.6", "48.6"), ("MAE", "ViT-B/16", "51.2", "45.5")]
    own = find_table("coco", "COCO val2017, maskrcnn-vitdet-100ep")
    paper = [row for row in own.rows if row[-1].text == "arXiv 2203.16527, Table 5"]
    found = [tuple(cell.text for cell in row[3:5]) for row in paper]
    assert found == [("55.6", "49.2"), ("51.6", "45.9")]
    named = {row.place for row in select_board("vitdet") if row.protocol.endswith("-norelpos")}
    assert named == {"Table 4"}


def test_table_3_of_mae_is_one_table_best_first() -> None:
    numbers = read_numbers(find_table("mae", "Table 3: ImageNet-1K val"))
    assert [line for line in numbers if line[0] == "MAE"] == [
        ("MAE", "ViT-H/14 at 448", "87.8"),
        ("MAE", "ViT-H/14", "86.9"),
        ("MAE", "ViT-L/16", "85.9"),
        ("MAE", "ViT-B/16", "83.6"),
    ]
    assert len(numbers) == 12
    assert [float(line[2]) for line in numbers] == sorted((float(line[2]) for line in numbers), reverse=True)


def test_the_tables_of_a_paper_are_in_its_order() -> None:
    titles = [section.title.partition(":")[0] for section in build_board("vitdet").sections]
    assert list(dict.fromkeys(titles)) == [
        *(f"Table {number}" for number in (2, 4, 5, 6, 7, 8, 10)),
        "Sources",
    ]


def test_a_lower_error_comes_first() -> None:
    numbers = read_numbers(find_table("imagenet-robust", "ImageNet-C all, imagenet-c"))
    assert numbers[0] == ("MAE", "ViT-H/14", "33.8")
    assert numbers[-1] == ("MAE", "ViT-B/16", "51.7")


def test_a_second_value_of_one_model_has_a_line_of_its_own() -> None:
    """Two sets of weights with one name: box and mask AP stay together."""
    table = find_table("coco", "COCO val2017, maskrcnn-vitdet-100ep-mmdet")
    assert [line[2:] for line in read_numbers(table)] == [("51.1", "45.5"), ("51.1", "45.4")]


def test_frozen_dense_probes() -> None:
    numbers = read_numbers(find_table("frozen-dense", "ADE20K validation, frozen-dpt-pixio"))
    assert numbers[0] == ("Pixio", "ViT-H/16", "53.6")
    assert numbers[-1] == ("MAE", "ViT-H/14", "37.6")


def test_a_note_is_referred_to_beside_a_linked_source() -> None:
    text = render_markdown(build_board("imagenet-linear"))
    assert "(https://github.com/facebookresearch/mae/blob/2f170f23/FINETUNE.md) \\[" in text


def test_a_board_is_written_with_all_its_rows(tmp_path: Path) -> None:
    paths = write_board("lvis", tmp_path)
    assert [path.name for path in paths] == [
        f"published-lvis.{kind}" for kind in ("md", "csv", "json", "html")
    ]
    rows = select_board("lvis")
    with paths[1].open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["value"]) for line in lines] == [row.value for row in rows]
    value = json.loads(paths[2].read_text(encoding="utf-8"))
    assert [row["place"] for row in value["rows"]] == [row.place for row in rows]


def test_the_command_prints_a_board_as_a_table_or_json(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["report", "--published", "mae"])
    assert shown.exit_code == 0
    assert "Table 3: ImageNet-1K val" in shown.stdout
    assert "87.8" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    told = runner.invoke(app, ["report", "--published", "coco", "--out", str(tmp_path), "--json"])
    value = json.loads(told.stdout)
    assert len(value["rows"]) == len(select_board("coco"))
    assert sorted(value["report"]) == sorted(str(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["runs", "--published", "coco"]])
def test_a_report_is_of_runs_or_of_a_board(arguments: list[str]) -> None:
    refused = CliRunner().invoke(app, ["report", *arguments])
    assert refused.exit_code == 2
    assert "--published" in refused.output


def test_cells_of_unstated_pretraining_are_not_empty() -> None:
    table = find_table("frozen-dense", "ADE20K validation, frozen-unstated")
    assert all(isinstance(cell, TableCell) and cell.text for row in table.rows for cell in row)
