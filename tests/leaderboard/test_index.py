"""Test that a folder of runs is read completely and that every ignored file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leaderboard.index import load_runs
from mae_bench.record import RecordError

ROOT = Path(__file__).parents[2]

if TYPE_CHECKING:
    from tests.leaderboard.conftest import Folder


def test_reads_records_and_failures_at_any_depth(folder: Folder) -> None:
    folder.add("mae", 60)
    folder.fail("random")
    runs = load_runs(folder.root)
    assert [run.record.backbone for run in runs.records] == ["mae"]
    assert [failure.backbone for failure in runs.failures] == ["random"]
    assert runs.problems == []
    assert runs.name(runs.records[0].path) == "cells/001/record.json"


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"seed": "0"},
        {"backbone": ["mae"]},
        {"cost": {"seconds_train": "long"}},
        {"metrics": {"top1": {"value": 1.0, "unit": "%", "direction": "up"}}},
        {"metrics": {}},
        {"config": None},
        {"config": {"lr": float("nan")}},
        {"cost": {"seconds_train": float("inf")}},
        {"notes": 5},
        {"command": "\ud800"},
    ],
)
def test_a_broken_record_is_named_and_the_rest_is_shown(folder: Folder, change: dict) -> None:
    folder.add("supervised", 60)
    path = folder.add("mae", 61)
    value = json.loads(path.read_text())
    del value["digest"]
    path.write_text(json.dumps(value | {"schema_version": 1} | change))
    runs = load_runs(folder.root)
    assert [run.record.backbone for run in runs.records] == ["supervised"]
    assert len(runs.problems) == 1
    assert "cells/002/record.json" in runs.problems[0]
    assert "edited" not in runs.problems[0]


@pytest.mark.parametrize(("old", "new"), [("61.5", "250.0"), ('"seed": 0', '"seed": 1'), ('"d', '"\\ud800')])
def test_an_edited_record_is_no_score(folder: Folder, old: str, new: str) -> None:
    folder.add("supervised", 60)
    path = folder.add("mae", 61.5)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    runs = load_runs(folder.root)
    assert [run.record.backbone for run in runs.records] == ["supervised"]
    assert runs.problems == [
        "ignored: cells/002/record.json was edited or damaged after it was written "
        "(next: re-run the cell or restore the file)"
    ]


def test_an_edited_failure_is_named(folder: Folder) -> None:
    folder.add("supervised", 60)
    path = folder.fail("mae")
    path.write_text(path.read_text().replace("no such module", "all is well"))
    runs = load_runs(folder.root)
    assert runs.failures == []
    assert "cells/002/failure.json was edited or damaged" in runs.problems[0]


def test_the_failure_of_a_cell_whose_record_is_damaged_is_shown(folder: Folder) -> None:
    path = folder.add("mae", 61)
    path.write_text(path.read_text().replace("61", "91"))
    folder.fail("mae").rename(path.parent / "failure.json")
    runs = load_runs(folder.root)
    assert [failure.backbone for failure in runs.failures] == ["mae"]
    assert ["record.json" in problem for problem in runs.problems] == [True]


def test_committed_records_of_schema_1_are_shown() -> None:
    runs = load_runs(ROOT / "benchmarks" / "results")
    old = [run for run in runs.records if run.record.schema_version == 1]
    assert len(old) >= 87
    assert {run.record.protocol_version for run in old} == {None}
    assert {run.record.code_digest for run in old} == {""}
    assert runs.problems == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"null"])
def test_files_that_are_not_records_are_named(folder: Folder, content: bytes) -> None:
    folder.add("supervised", 60)
    folder.add("mae", 61).write_bytes(content)
    folder.fail("mae").write_bytes(content)
    runs = load_runs(folder.root)
    assert len(runs.records) == 1
    assert [("cells/002/record.json" in p, "cells/003/failure.json" in p) for p in runs.problems] == [
        (True, False),
        (False, True),
    ]


def test_a_failure_next_to_a_record_is_ignored(folder: Folder) -> None:
    path = folder.add("mae", 61)
    folder.fail("mae").rename(path.parent / "failure.json")
    runs = load_runs(folder.root)
    assert runs.failures == []
    assert "holds a record, which is used" in runs.problems[0]


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_folder_is_an_error_with_a_next_step(folder: Folder, exists: bool) -> None:
    if exists:
        folder.root.mkdir()
    with pytest.raises(RecordError) as caught:
        load_runs(folder.root)
    assert str(folder.root) in caught.value.given
    assert "record.json" in caught.value.expected
    assert "mae-bench demo" in caught.value.fix


def test_only_broken_records_are_an_error_that_names_them(folder: Folder) -> None:
    folder.add("mae", 61).write_text("{")
    with pytest.raises(RecordError, match="cells/001/record.json"):
        load_runs(folder.root)
