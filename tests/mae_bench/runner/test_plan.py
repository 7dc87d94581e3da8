"""The plan: what is done, what is left, what would fail."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mae_bench.record import RECORD_FILE, read_record, write_record
from mae_bench.registry import EXTRAS, KINDS, Extra, Kind
from mae_bench.runner.live import View
from mae_bench.runner.plan import counts, plan_of, render
from mae_bench.runner.runner import run_suite
from mae_bench.suite.cell import CELL_FILE
from mae_bench.suite.config import load_suite


def states(suite: dict[str, Any], *overrides: str) -> dict[tuple[str, str], str]:
    return {
        (cell["backbone"], cell["task"]): cell["state"]
        for cell in plan_of(load_suite(suite, overrides))["cells"]
    }


def text(suite: dict[str, Any], *overrides: str) -> str:
    shown = StringIO()
    Console(file=shown, width=200).print(render(plan_of(load_suite(suite, overrides))))
    return shown.getvalue()


def test_it_follows_a_run_and_runs_nothing(suite: dict[str, Any]) -> None:
    assert set(states(suite).values()) == {"left"}
    assert not Path(suite["out"]).exists()
    run_suite(load_suite(suite, ["tasks.probe.behave=user error"]), View(Console(file=StringIO())), "")
    failed = states(suite, "tasks.probe.behave=user error")
    assert failed["good", "backbone"] == "done"
    assert failed["good", "probe"] == "failed"
    assert states(suite)["good", "probe"] == "left", "with another config it was never tried"
    assert "4 cells: 2 done, 2 failed" in text(suite, "tasks.probe.behave=user error")
    assert "Next: mend it" in text(suite, "tasks.probe.behave=user error")


def test_missing_data_would_fail(suite: dict[str, Any], tmp_path: Path) -> None:
    missing = states(suite, f"data.root={tmp_path}")
    assert missing["good", "probe"] == "would fail"
    assert missing["good", "backbone"] == "left"
    assert f"{tmp_path}/imagenet" in text(suite, f"data.root={tmp_path}")


def test_data_that_the_suite_makes_is_no_reason_to_fail(suite: dict[str, Any], tmp_path: Path) -> None:
    suite["demo_data"] = {"seed": 0}
    assert set(states(suite, f"data.root={tmp_path}").values()) == {"left"}


def test_what_is_not_installed_is_named_with_the_command(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXTRAS, "odd", Extra(("no_such_module",), "odd tasks", "pip install odd"))
    monkeypatch.setitem(KINDS, "fake_transfer", Kind(**vars(KINDS["fake_transfer"]) | {"extra": "odd"}))
    assert states(suite)["good", "probe"] == "not installed"
    assert "no_such_module missing" in text(suite)
    assert "pip install odd" in text(suite)


def test_a_cell_that_is_left_beside_a_finished_one_says_what_differs(suite: dict[str, Any]) -> None:
    assert "is finished, but" not in text(suite)
    run_suite(load_suite(suite, ["tasks.probe.behave=user error"]), View(Console(file=StringIO())), "")
    assert "is finished, but" not in text(suite), "nothing of that name is finished"
    run_suite(load_suite(suite), View(Console(file=StringIO())), "")
    assert "reason" not in plan_of(load_suite(suite))["cells"][2]
    left = plan_of(load_suite(suite, ["backbones.good.score=5"]))["cells"]
    assert [cell["state"] for cell in left] == ["left", "done", "left", "done"]
    assert left[0]["reason"].endswith("is finished, but with score: 1.0 (here 5.0)")
    assert "is finished, but with another backbone, other data, or another version" in left[2]["reason"]
    assert "score: 1.0 (here 5.0)" in text(suite, "backbones.good.score=5")


def test_a_damaged_file_of_a_finished_cell_breaks_no_plan(suite: dict[str, Any]) -> None:
    run_suite(load_suite(suite), View(Console(file=StringIO())), "")
    for damaged in (b"", b'{"cell": {"con', b"[]", b'{"cell": {"config": 3}}', b"\0", b"\xff"):
        for path in Path(suite["out"]).rglob(CELL_FILE):
            path.write_bytes(damaged)
        left = plan_of(load_suite(suite, ["backbones.good.score=5"]))["cells"]
        assert [cell["state"] for cell in left] == ["left", "done", "left", "done"]
        assert "reason" not in left[0]


def test_a_record_that_does_not_count_is_named_with_the_reason(suite: dict[str, Any]) -> None:
    run_suite(load_suite(suite), View(Console(file=StringIO())), "")
    cells = plan_of(load_suite(suite))["cells"]
    backbone, transfer = (Path(cells[i]["dir"]) / RECORD_FILE for i in (0, 2))
    intact = {path: path.read_bytes() for path in (backbone, transfer)}

    transfer.write_bytes(b"{}")
    plan = plan_of(load_suite(suite))["cells"]
    assert [cell["state"] for cell in plan] == ["done", "done", "left", "done"]
    assert str(transfer) in plan[2]["reason"]
    assert str(transfer) in text(suite)

    transfer.write_bytes(intact[transfer])
    backbone.write_bytes(intact[backbone][:-9])
    plan = plan_of(load_suite(suite))["cells"]
    assert [cell["state"] for cell in plan] == ["left", "done", "left", "done"]
    assert str(backbone) in plan[0]["reason"]
    assert f"{transfer} counts only if its backbone" in plan[2]["reason"]

    write_record(replace(read_record(Path(cells[1]["dir"]) / RECORD_FILE), backbone_digest="0"), backbone)
    plan = plan_of(load_suite(suite))["cells"]
    assert [cell["state"] for cell in plan] == ["done", "done", "left", "done"]
    assert f"{transfer} is the record of other weights" in plan[2]["reason"]
    shown = StringIO()
    run_suite(load_suite(suite), View(Console(file=shown)), "")
    assert f"is not done: {transfer} is the record of other weights" in shown.getvalue()


def test_a_pretraining_shows_its_batch_on_the_devices_at_hand(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite["backbones"] = {
        "mae": {"kind": "fake_pretraining", "global_batch_size": 64, "device_batch_size": 4}
    }
    (cell, _) = plan_of(load_suite(suite, ["processes=2"]))["cells"]
    assert (cell["processes"], cell["state"]) == (2, "left")
    assert "mae: global batch 64 = 2 devices x 4 images x 8 accumulated" in text(suite, "processes=2")
    suite["tasks"] = {}
    monkeypatch.setattr("mae_bench.runner.plan.visible_gpus", lambda: ["0", "1", "2", "3"])
    assert "64 = 4 devices x 4 images x 4 accumulated" in text(suite, "device=auto"), (
        "all GPUs for a run of one cell"
    )


def test_a_batch_that_the_devices_cannot_make_would_fail(suite: dict[str, Any]) -> None:
    suite["backbones"] = {"mae": {"kind": "fake_pretraining", "global_batch_size": 64}}
    assert states(suite, "processes=3")["mae", "backbone"] == "would fail"
    assert "global_batch_size=63 or 66" in text(suite, "processes=3")


def test_counts() -> None:
    assert counts([{"state": "left"}, {"state": "done"}, {"state": "left"}]) == "3 cells: 1 done, 2 left"


def test_a_distributed_kind_that_trains_nothing_has_no_batch(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "fake_transfer", replace(KINDS["fake_transfer"], distributed=True))
    assert "left" in text(suite)
    found = [cell for cell in plan_of(load_suite(suite, ["processes=2"]))["cells"] if cell["task"] == "probe"]
    assert [(cell["processes"], "batch" in cell) for cell in found] == [(2, False)] * len(found)
