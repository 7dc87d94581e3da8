"""Test that every published number has its source, and that the best-known ones are right."""

import csv
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from leaderboard.compare import compare
from leaderboard.index import load_runs
from leaderboard.published import (
    FOLDER,
    RESULTS,
    PublishedRow,
    load_published,
    load_results,
    select_published,
)
from leaderboard.table import Column

HIGHEST = {"%": 100.0, "m": 10.0}  # RMSE of depth in metres
COLUMNS = (
    "method,architecture,data,epochs,task,dataset,split,protocol,metric,value,unit,direction,source,place,url,"
    "verification,note"
)


def test_the_file_is_well_formed() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    assert "\r" not in text
    assert text.endswith("\n")
    header, *lines = list(csv.reader(text.splitlines(), strict=True))
    assert ",".join(header) == COLUMNS
    assert {len(line) for line in lines} == {len(header)}
    assert all(cell == cell.strip() for line in lines for cell in line)
    assert len(lines) == len(load_results()) == 982


def test_every_file_is_part_of_the_package() -> None:
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["leaderboard.published"]
    packed = {path for pattern in patterns for path in FOLDER.glob(pattern)}
    assert packed == set(FOLDER.iterdir())


def test_every_row_has_its_source() -> None:
    for row in load_published():
        assert row.url.startswith("https://")
        names = ("method", "backbone", "task", "protocol", "dataset", "split", "source", "title", "place")
        assert all(getattr(row, name) for name in names), row
        assert 0 < row.value <= HIGHEST[row.unit]
        assert row.direction == ("lower" if row.metric in ("mCE", "RMSE") else "higher")
        assert row.epochs is None or row.epochs > 0


def test_every_source_states_where_it_was_read() -> None:
    """A file of a repository is cited at its commit, a paper by its number and title."""
    known = (
        "full text of the paper",
        "text of the paper, its tables not included",
        "a copy of the paper's tables",
        "secondary: a reading note of the paper",
        "thread of the issue",
    )
    for row in load_results():
        if row.source.startswith("arXiv "):
            assert row.url == f"https://arxiv.org/abs/{row.source.removeprefix('arXiv ')}"
            assert row.title != row.source
        else:
            assert row.url.startswith(f"https://github.com/{row.source}/")
        commit = row.place.partition(" at ")[2]
        assert row.verification == f"repository at commit {commit}" if commit else row.verification in known
        assert not commit or f"/{commit}" in row.url


def test_no_number_is_quoted_twice() -> None:
    names = (
        "method",
        "backbone",
        "data",
        "epochs",
        "protocol",
        "dataset",
        "split",
        "metric",
        "source",
        "place",
        "note",
        "ablation",
        "blocks",
    )
    keys = [tuple(getattr(row, name) for name in names) for row in load_published()]
    assert len(keys) == len(set(keys))


def group_results(*names: str) -> list[list[PublishedRow]]:
    groups = defaultdict(list)
    for row in load_results():
        groups[tuple(getattr(row, name) for name in names)].append(row)
    return list(groups.values())


def test_a_second_value_of_one_source_has_a_note() -> None:
    names = ("method", "backbone", "data", "epochs", "protocol", "dataset", "split", "metric", "source")
    for rows in group_results(*names):
        if len({row.value for row in rows}) > 1:
            assert all(row.note for row in rows), rows


def test_sources_that_disagree_name_each_other() -> None:
    names = ("method", "backbone", "data", "epochs", "protocol", "dataset", "metric")
    found = 0
    for rows in group_results(*names):
        for row in rows:
            for other in rows:
                if other.source != row.source and other.value != row.value:
                    assert other.source in row.note, (row, other)
                    found += 1
    assert found > 40


def test_table_3_of_the_paper() -> None:
    place = ("arXiv 2111.06377", "Table 3")
    rows = [row for row in load_results() if (row.source, row.place) == place]
    assert {(row.method, row.backbone): row.value for row in rows} == {
        ("supervised from scratch", "ViT-B/16"): 82.3,
        ("supervised from scratch", "ViT-L/16"): 82.6,
        ("supervised from scratch", "ViT-H/14"): 83.1,
        ("DINO", "ViT-B/16"): 82.8,
        ("MoCo v3", "ViT-B/16"): 83.2,
        ("MoCo v3", "ViT-L/16"): 84.1,
        ("BEiT", "ViT-B/16"): 83.2,
        ("BEiT", "ViT-L/16"): 85.2,
        ("MAE", "ViT-B/16"): 83.6,
        ("MAE", "ViT-L/16"): 85.9,
        ("MAE", "ViT-H/14"): 86.9,
        ("MAE", "ViT-H/14 at 448"): 87.8,
    }


@pytest.mark.parametrize(
    ("backbone", "protocol", "metric", "dataset", "place", "value"),
    [
        ("ViT-B/16", "finetune-100ep", "top1", "ImageNet-1K", "Table 3", 83.6),
        ("ViT-L/16", "linear-90ep", "top1", "ImageNet-1K", "Table 12", 75.8),
        ("ViT-B/16", "maskrcnn-li2021-100ep", "AP_box", "COCO", "Table 4", 50.3),
        ("ViT-L/16", "maskrcnn-vitdet-100ep", "AP_mask", "COCO", "Table 5", 49.2),
        ("ViT-L/16", "upernet-100ep", "mIoU", "ADE20K", "Table 5", 53.6),
        ("ViT-H/14", "imagenet-c", "mCE", "ImageNet-C", "Table 13", 33.8),
        ("ViT-L/16", "transfer", "top1", "iNaturalist 2018", "Table 6", 80.1),
        ("ViT-H/14 at 448", "transfer-448", "top1", "Places365", "Table 6", 60.3),
    ],
)
def test_the_mae_rows_match_the_papers(
    backbone: str, protocol: str, metric: str, dataset: str, place: str, value: float
) -> None:
    key = ("MAE", backbone, protocol, metric, dataset, place)
    found = [
        r.value
        for r in load_published()
        if (r.method, r.backbone, r.protocol, r.metric, r.dataset, r.place) == key
    ]
    assert found == [value]


def test_points_of_curves_and_rows_of_ablations_are_not_selected() -> None:
    assert any(row.blocks is not None for row in load_published())
    rows = select_published([Column("imagenet", "partial-50ep"), Column("imagenet", "finetune-50ep")])
    assert rows
    assert all(row.blocks is None and not row.ablation for row in rows)


def test_only_kinds_of_protocol_that_were_run_are_selected() -> None:
    rows = select_published([Column("coco", "maskrcnn-small"), Column("pretrain", "linear-90ep")])
    assert {(row.task, row.kind) for row in rows} == {("coco", "maskrcnn")}


def test_a_report_quotes_the_protocols_of_its_columns(seeds: Callable[..., None], tmp_path: Path) -> None:
    seeds("mae", 60.0, protocol="knn-small")
    columns = compare(load_runs(tmp_path / "runs"), "supervised").columns
    assert {row.kind for row in select_published(columns)} == {"knn"}
