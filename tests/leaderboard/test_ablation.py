"""Test that measured and published results of an ablation are paired, and that differences are named."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from leaderboard.ablation import PRETRAINING, build_table, describe_settings
from leaderboard.compare import compare
from leaderboard.index import load_runs
from leaderboard.published import load_published
from leaderboard.render.terminal import print_report
from leaderboard.report import build_report, load_results, write_report
from leaderboard.table import Comparison

if TYPE_CHECKING:
    from tests.leaderboard.conftest import Folder

LARGE = {"embed_dim": 1024, "depth": 24, "patch_size": [16, 16], "img_size": [224, 224]}
FINETUNE: dict[str, Any] = {"protocol": "finetune-50ep", "num_samples": 50_000, "backbone_spec": LARGE}
LINEAR: dict[str, Any] = {**FINETUNE, "protocol": "linear-90ep"}
PRETRAIN: dict[str, Any] = {
    "task": "pretrain",
    "protocol": "mae-800ep",
    "main_metric": "loss",
    "backbone_spec": LARGE,
}


@pytest.fixture
def ablation(folder: Folder, seeds: Callable) -> Folder:
    """Rows with the settings of the paper's Table 1, and a row that it does not have."""
    folder.add("default", 0.4, config={"kind": "pretrain", **PRETRAINING}, **PRETRAIN)
    for row, ft, lin in (
        ("default", 84.7, 73.4),
        ("decoder_depth_1", 84.5, 65.0),
        ("decoder_depth_12", 84.1, 73.0),
        ("mine", 1, 2),
    ):
        seeds(row, ft, **FINETUNE)
        seeds(row, lin, **LINEAR)
    return folder


def read(folder: Folder) -> Comparison:
    return compare(load_runs(folder.root), "default")


def lines(comparison: Comparison) -> list[list[str]]:
    return [[cell.text for cell in row] for row in build_table(comparison).rows]


def test_measured_and_published_scores_are_paired_in_the_order_of_the_paper(ablation: Folder) -> None:
    assert lines(read(ablation)) == [
        ["default", "84.7", "84.9", "73.4", "73.5", "Table 1"],
        ["decoder_depth_1", "84.5 (-0.2)", "84.8 (-0.1)", "65.0 (-8.4)", "65.5 (-8.0)", "Table 1a"],
        ["decoder_depth_12", "84.1 (-0.6)", "84.4 (-0.5)", "73.0 (-0.4)", "73.3 (-0.2)", "Table 1a"],
        ["mine", "1.0 (-83.7)", "-", "2.0 (-71.4)", "-", "-"],
    ]


def test_the_setting_of_the_paper_is_comparable(ablation: Folder) -> None:
    comparison = read(ablation)
    assert [published.differs for published in comparison.published_comparisons] == [(), ()]
    assert not [sentence for sentence in describe_settings(comparison) if "not comparable" in sentence]


@pytest.mark.parametrize(
    ("transfer", "pretraining", "named"),
    [
        ({"protocol": "finetune-demo"}, {}, "protocol finetune-demo, published finetune-50ep"),
        ({"num_samples": 1000}, {}, "images 1000, published 50000"),
        ({"backbone_spec": LARGE | {"depth": 4}}, {}, "depth 4, published 24"),
        ({"backbone_spec": LARGE | {"patch_size": [8, 8]}}, {}, "patch_size 8 x 8, published 16 x 16"),
        ({}, {"epochs": 100}, "pretraining epochs 100, published 800"),
        ({}, {"norm_pix_loss": True}, "pretraining norm_pix_loss True, published False"),
    ],
)
def test_differences_from_the_paper_are_named(
    folder: Folder, seeds: Callable, transfer: dict[str, Any], pretraining: dict[str, Any], named: str
) -> None:
    folder.add("default", 0.4, config={"kind": "pretrain", **PRETRAINING, **pretraining}, **PRETRAIN)
    for row in ("default", "mask_grid_75"):
        seeds(row, 50.0, **FINETUNE | transfer)
    (published,) = read(folder).published_comparisons
    assert published.differs == (named,)
    assert "not comparable" in " ".join(describe_settings(read(folder)))


def test_without_a_recorded_pretraining_nothing_is_comparable(folder: Folder, seeds: Callable) -> None:
    for row in ("default", "mask_grid_75"):
        seeds(row, 50.0, **FINETUNE)
    (published,) = read(folder).published_comparisons
    assert "pretraining epochs not recorded, published 800" in published.differs


def test_a_single_matching_name_is_no_ablation(folder: Folder, seeds: Callable, tmp_path: Path) -> None:
    for row in ("default", "supervised"):
        seeds(row, 50.0, **FINETUNE)
    assert read(folder).published_comparisons == []
    assert not any("Ablation" in path.read_text() for path in write_report(folder.root, tmp_path / "out"))


def test_a_row_without_a_score_keeps_its_published_number(ablation: Folder) -> None:
    ablation.fail("encoder_mask_tokens", protocol="finetune-50ep")
    line = next(line for line in lines(read(ablation)) if line[0] == "encoder_mask_tokens")
    assert line == ["encoder_mask_tokens", "failed", "84.2 (-0.7)", "-", "59.6 (-13.9)", "Table 1c"]


def test_a_published_number_keeps_its_decimals_next_to_small_scores(folder: Folder, seeds: Callable) -> None:
    for row, score in (("default", 7.5), ("mask_grid_75", 7.25)):
        seeds(row, score, **FINETUNE)
    assert lines(read(folder))[1][1:3] == ["7.25 (-0.25)", "84.0 (-0.9)"]


def test_every_rendering_has_the_published_numbers(ablation: Folder, tmp_path: Path) -> None:
    texts = {
        path.suffix: path.read_text(encoding="utf-8")
        for path in write_report(ablation.root, tmp_path / "out", "default")
    }
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_report(build_report(load_results(ablation.root, "default")), console)
    terminal = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, terminal.splitlines())) <= 100
    assert "84.8 (-0.1)" in terminal
    assert (
        "| decoder\\_depth\\_1 | 84.5 (-0.2) | 84.8 (-0.1) | 65.0 (-8.4) | 65.5 (-8.0) | Table 1a |"
        in texts[".md"]
    )
    assert ">84.8 (\N{MINUS SIGN}0.1)<" in texts[".html"]
    (line,) = (
        row
        for row in csv.DictReader(io.StringIO(texts[".csv"]))
        if (row["backbone"], row["protocol"]) == ("decoder_depth_1", "linear-90ep")
    )
    assert (line["published"], line["published_in"], line["published_differs"]) == (
        "65.5",
        "He et al. 2022, Table 1a",
        "",
    )
    published = json.loads(texts[".json"])["published_comparisons"]
    assert published[0]["values"]["decoder_depth_1"] == 84.8
    assert json.loads(texts[".json"])["cells"]["decoder_depth_1"][0]["mean"] == 84.5, (
        "the published number is in no cell"
    )


def test_table_1_of_the_paper_is_complete() -> None:
    """Compare the fine-tuning and linear probing scores per sub-table; the default row is quoted once."""
    rows = [row for row in load_published() if row.ablation and row.place.startswith("Table 1")]
    linear = {row.ablation: row.value for row in rows if row.protocol == "linear-90ep"}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.protocol == "finetune-50ep":
            found.setdefault(row.place.removeprefix("Table "), []).append((row.value, linear[row.ablation]))
    assert found == {
        "1": [(84.9, 73.5)],
        "1a": [(84.8, 65.5), (84.9, 70.0), (84.9, 71.9), (84.4, 73.3)],
        "1b": [(84.9, 69.1), (84.8, 71.3), (84.4, 73.1), (84.3, 73.1)],
        "1c": [(84.2, 59.6)],
        "1d": [(85.4, 73.9), (84.6, 72.3), (85.3, 71.6)],
        "1e": [(84.0, 65.7), (84.7, 73.1), (84.3, 71.9)],
        "1f": [(83.9, 72.3), (82.8, 63.9), (84.0, 66.0)],
    }
