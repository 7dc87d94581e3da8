"""What `mae-bench list` shows: every name that the other commands take, without importing torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backbones.translating.detect import FORMATS
from mae_bench.config import CONFIGS, list_configs, load_yaml, read_title, task_file
from mae_bench.suite.catalogue import LISTS

ROOT = Path(__file__).parents[3]


def listed(what: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-X", "importtime", "-m", "mae_bench", "list", what, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported, "the imports are seen"
    assert not imported & {"torch", "timm", "detectron2", "mmengine"}
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_tasks_are_listed_under_the_names_that_evaluate_takes() -> None:
    rows = listed("tasks")
    assert len(rows) == len(list_configs("tasks"))
    for row in rows:
        assert load_yaml(task_file(row["name"]))["protocol"] == row["protocol"]


def test_formats_are_listed_without_being_imported() -> None:
    rows = listed("formats")
    assert [row["name"] for row in rows] == list(FORMATS)
    assert sum(row["written"] for row in rows) == 10


@pytest.mark.parametrize("what", LISTS)
def test_every_row_has_its_name_and_a_title(what: str) -> None:
    rows = LISTS[what]()
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert row["title"].endswith("."), row
        assert "{" not in row["title"], row


def test_the_title_of_a_variant_names_its_place_in_the_grid() -> None:
    assert "mask" in read_title(CONFIGS / "ablations" / "mask_ratio_40.yaml")
    assert "40 %" in read_title(CONFIGS / "ablations" / "mask_ratio_40.yaml")


def test_an_unknown_list_is_refused_with_the_known_ones() -> None:
    command = [sys.executable, "-m", "mae_bench", "list", "papers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "recipes" in done.stderr
    assert "Traceback" not in done.stderr
