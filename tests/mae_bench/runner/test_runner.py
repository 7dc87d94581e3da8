"""The runner on fake jobs: what is run, what is not run again, and what becomes of a cell that fails."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from leaderboard.compare import compare
from leaderboard.index import load_runs
from mae_bench.environment.provenance import num_cores
from mae_bench.errors import UserError
from mae_bench.record import FAILURE_FILE, RECORD_FILE, Failure, ResultRecord
from mae_bench.runner.live import View
from mae_bench.runner.runner import MAX_JOBS, Capacity, DeviceSlot, Runner, capacity_of, locked, run_suite
from mae_bench.suite.cell import CELL_FILE, Cell
from mae_bench.suite.config import expand, load_suite

Results = dict[tuple[str, str, int], ResultRecord | Failure]


def run(suite: dict[str, Any], *overrides: str) -> tuple[Results, str]:
    """Runs the suite here; returns the results and what the view printed."""
    text = StringIO()
    results = run_suite(
        load_suite(suite, overrides), View(Console(file=text, width=300)), "mae-bench run toy.yaml"
    )
    return {(cell.backbone, cell.row, cell.seed): result for cell, result in results}, text.getvalue()


def times_run(suite: dict[str, Any]) -> dict[str, int]:
    """How often each cell's job was started, by its folder below `cells`, less the key."""
    files = Path(suite["out"]).rglob("runs.txt")
    return {
        f"{f.parent.parent.name}/{f.parent.name.rsplit('-', 1)[0]}": len(f.read_text().split()) for f in files
    }


def test_every_cell_gets_a_record_that_explains_itself(suite: dict[str, Any]) -> None:
    results, printed = run(suite, "seeds=[0,3]")
    assert set(results) == {(b, "backbone", 0) for b in ("good", "base")} | {
        (b, "probe", seed) for b in ("good", "base") for seed in (0, 3)
    }
    record = results["good", "probe", 3]
    assert isinstance(record, ResultRecord)
    assert record.score.value == 4.0
    assert (record.backbone, record.protocol, record.seed, record.task) == ("good", "probe", 3, "imagenet")
    assert record.command == "mae-bench run toy.yaml"
    assert record.config["score"] == 1.0, "a default that nobody wrote is in the record too"
    assert len(record.config_digest) == 64
    assert record.versions["python"].startswith("3.")
    assert record.hardware["cores"] == num_cores()
    assert record.started <= record.finished
    assert record.backbone_digest.startswith("good · fake_maker"), (
        "the transfer was given its own backbone's export"
    )
    assert record.conversion_report == {"source": "run:good"}, "no path of this machine"
    assert record.hardware["threads"] == 1
    assert printed.count("done") == 6


def test_finished_cells_are_not_run_again(suite: dict[str, Any]) -> None:
    run(suite)
    _, printed = run(suite)
    assert times_run(suite) == {
        "good/backbone-s0": 1,
        "base/backbone-s0": 1,
        "good/probe-s0": 1,
        "base/probe-s0": 1,
    }
    assert "4 already finished, 0 to run" in printed


def test_records_of_schema_1_count_as_done(suite: dict[str, Any]) -> None:
    run(suite)
    for path in Path(suite["out"]).rglob(RECORD_FILE):
        value = json.loads(path.read_text())
        for name in ("digest", "protocol_version", "code_digest", "artefact_digests"):
            del value[name]
        path.write_text(json.dumps(value | {"schema_version": 1}))
    _, printed = run(suite, "seeds=[0,1]")
    assert "4 already finished, 2 to run" in printed
    assert set(times_run(suite).values()) == {1}
    comparison = compare(load_runs(suite["out"]))
    assert [cell.seeds for cell in comparison.cells["good"]] == [(0, 1)], "the order states the version"
    assert [column.protocol_version for column in comparison.columns] == [1]


def test_an_edited_record_is_named_and_its_cell_runs_again(suite: dict[str, Any]) -> None:
    run(suite)
    (path,) = Path(suite["out"], "cells", "good").glob(f"probe-*/{RECORD_FILE}")
    text = path.read_text()
    path.write_text(text.replace('"value": 1.0', '"value": 99.0'))
    (problem,) = load_runs(suite["out"]).problems
    assert f"{path.parent.name}/record.json was edited or damaged" in problem
    results, _ = run(suite)
    assert times_run(suite)["good/probe-s0"] == 2
    assert isinstance(record := results["good", "probe", 0], ResultRecord)
    assert record.score.value == 1.0
    assert load_runs(suite["out"]).problems == []


def test_a_changed_config_runs_what_depends_on_it_and_nothing_else(suite: dict[str, Any]) -> None:
    run(suite)
    results, printed = run(suite, "backbones.good.score=5")
    assert "4 cells, 2 already finished, 2 to run" in printed
    assert isinstance(record := results["good", "backbone", 0], ResultRecord)
    assert record.score.value == 5.0
    assert times_run(suite)["base/probe-s0"] == 1


@pytest.mark.parametrize(
    ("behave", "status", "reason", "fix"),
    [
        ("user error", "failed", "a given thing (expected: another thing)", "mend it"),
        ("not installed", "not installed", "the module 'x' is not installed", "pip install x"),
        ("exception", "failed", "ZeroDivisionError: what nobody foresaw", "log.txt"),
        (
            "SIGKILL",
            "failed",
            "killed by SIGKILL, most often because the system ran out of memory",
            "device_batch_size",
        ),
        ("exit 3", "failed", "ended with exit code 3", "log.txt"),
    ],
)
def test_a_cell_that_fails_says_why_and_the_others_still_run(
    suite: dict[str, Any], behave: str, status: str, reason: str, fix: str
) -> None:
    suite["tasks"]["bad"] = {"kind": "fake_transfer", "protocol": "bad", "behave": behave}
    del suite["backbones"]["base"]
    results, printed = run(suite)
    failure = results["good", "bad", 0]
    assert isinstance(failure, Failure)
    assert (failure.status, failure.backbone, failure.task, failure.protocol) == (
        status,
        "good",
        "imagenet",
        "bad",
    )
    assert reason in failure.reason
    assert fix in failure.fix
    assert isinstance(results["good", "probe", 0], ResultRecord)
    assert reason in printed
    assert "Traceback" not in printed + failure.reason


def test_the_log_keeps_what_a_failure_leaves_out(suite: dict[str, Any]) -> None:
    suite["backbones"] = {
        "good": {"kind": "fake_maker", "behave": "exception"},
        "base": {"kind": "fake_maker", "behave": "SIGKILL"},
    }
    results, _ = run(suite)
    logs = {path.parent.parent.name: path.read_text() for path in Path(suite["out"]).rglob("log.txt")}
    assert "Traceback" in logs["good"]
    assert isinstance(failure := results["base", "backbone", 0], Failure)
    assert "last words" in failure.reason


def test_transfers_of_another_backbone_than_the_one_that_is_there_are_run_again(
    suite: dict[str, Any],
) -> None:
    run(suite)
    (made,) = [path for path in Path(suite["out"]).rglob(RECORD_FILE) if "good/backbone" in str(path)]
    made.unlink()  # and so made again, with other weights
    results, _ = run(suite)
    maker, transfer = results["good", "backbone", 0], results["good", "probe", 0]
    assert isinstance(maker, ResultRecord)
    assert isinstance(transfer, ResultRecord)
    assert transfer.backbone_digest == maker.backbone_digest == "good · fake_maker · seed 0, run 2"
    assert times_run(suite) == {
        "good/backbone-s0": 2,
        "base/backbone-s0": 1,
        "good/probe-s0": 2,
        "base/probe-s0": 1,
    }


def test_environment_variables_stay_literal_until_the_data_is_read(
    suite: dict[str, Any], toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite["data"]["root"] = "$TOY_DATA"
    with pytest.raises(UserError, match="not set: TOY_DATA"):
        run(suite)
    monkeypatch.setenv("TOY_DATA", str(toy_data))
    results, _ = run(suite)
    record = results["good", "probe", 0]
    assert isinstance(record, ResultRecord)
    assert record.config["data"] == "$TOY_DATA/imagenet"
    assert record.notes == [f"{toy_data}/imagenet"], "where the job read it"
    orders = [
        path.read_text()
        for path in Path(suite["out"]).rglob("*.json")
        if path.name in ("suite.json", CELL_FILE)
    ]
    assert len(orders) == 5
    assert not [text for text in orders if str(toy_data) in text]


@pytest.mark.parametrize("behave", ["user error", "not installed"])
def test_cells_of_a_backbone_that_failed_refer_to_its_reason(suite: dict[str, Any], behave: str) -> None:
    results, _ = run(suite, f"backbones.good.behave={behave}")
    maker, transfer = results["good", "backbone", 0], results["good", "probe", 0]
    assert isinstance(maker, Failure)
    assert isinstance(transfer, Failure)
    assert transfer.reason == "its backbone could not be made ('good'): see the reason given for it"
    assert (transfer.status, transfer.fix) == (maker.status, ""), "the reason is reported once"
    assert isinstance(results["base", "probe", 0], ResultRecord)


def test_what_failed_is_tried_again(suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    suite["tasks"]["probe"]["behave"] = "user error"
    run(suite)
    (failed,) = [path.parent for path in Path(suite["out"]).rglob(FAILURE_FILE) if "good" in path.parts]
    run(suite)
    assert (failed / "runs.txt").read_text().split() == ["run", "run"]
    assert times_run(suite)["good/backbone-s0"] == 1


def test_a_damaged_record_does_not_count(suite: dict[str, Any]) -> None:
    run(suite)
    (path,) = [path for path in Path(suite["out"]).rglob(RECORD_FILE) if "good/probe" in str(path)]
    path.write_text(path.read_text()[:100])
    results, _ = run(suite)
    assert isinstance(results["good", "probe", 0], ResultRecord)
    assert times_run(suite)["good/probe-s0"] == 2


def test_missing_data_is_named_before_anything_runs(suite: dict[str, Any], tmp_path: Path) -> None:
    suite["tasks"]["other"] = {"kind": "fake_transfer", "data": str(tmp_path / "elsewhere")}
    suite["data"]["root"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError) as error:
        run(suite)
    assert "nowhere/imagenet" in str(error.value)
    assert "elsewhere" in str(error.value), "all of it at once"
    assert times_run(suite) == {}


def test_one_runner_a_folder(suite: dict[str, Any]) -> None:
    holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since 20\S+ runs a suite there"
    with locked(Path(suite["out"])), pytest.raises(UserError, match=holder):
        run(suite)
    run(suite)


def test_a_disk_without_locks_is_not_taken_for_a_lock_that_another_holds(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"\.lock cannot be locked: .*No locks available") as error:
        run(suite)
    assert "--out DIR" in error.value.fix


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(suite: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(suite | {"out": str(tmp_path / "file" / "out")})


def slots(suite: dict[str, Any], *overrides: str) -> list[DeviceSlot]:
    return capacity_of(load_suite(suite, overrides)).slots


def test_slots(suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots(suite, "jobs=3") == [DeviceSlot("cpu")] * 3
    assert len(slots(suite, "jobs=auto")) == min(MAX_JOBS, num_cores())
    monkeypatch.setattr("mae_bench.runner.runner.visible_gpus", lambda: ["2", "5"])
    assert slots(suite, "jobs=auto", "device=auto") == [DeviceSlot("cuda", "2"), DeviceSlot("cuda", "5")]
    assert slots(suite, "device=auto", "jobs=3")[2] == DeviceSlot("cuda", "2")
    monkeypatch.setattr("mae_bench.runner.runner.visible_gpus", list)
    with pytest.raises(UserError, match="no GPU"):
        slots(suite, "device=cuda")


def test_a_run_of_one_cell_takes_all_gpus_for_it(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = suite | {
        "backbones": {"mae": {"kind": "fake_pretraining"}},
        "tasks": {},
        "jobs": 1,
        "device": "auto",
    }
    assert capacity_of(load_suite(alone)).processes == 1, "on a CPU"
    monkeypatch.setattr("mae_bench.runner.runner.visible_gpus", lambda: ["2", "5", "7"])
    assert capacity_of(load_suite(suite, ["device=auto"])).processes == 1, "several cells share the GPUs"
    assert capacity_of(load_suite(alone)) == Capacity(
        [DeviceSlot("cuda", "2"), DeviceSlot("cuda", "5"), DeviceSlot("cuda", "7")], 1, 3
    )
    assert capacity_of(load_suite(alone, ["processes=2"])).processes == 2


def placed(
    suite: dict[str, Any], capacity: Capacity, started: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Runner:
    """A runner whose cells run until `kill`; `started` gets each cell's name and its GPUs."""

    def start(self: Runner, cell: Cell, slots: list[DeviceSlot], count: int) -> Any:
        started.append((cell.backbone, ",".join(slot.visible for slot in slots)))
        return MagicMock(poll=lambda: None)

    monkeypatch.setattr(Runner, "_process", start)
    return Runner(expand(load_suite(suite), {}), capacity, 1, "", View(Console(file=StringIO())))


def test_a_cell_of_several_processes_takes_as_many_gpus(
    suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"a": "fake_maker", "b": "fake_pretraining", "c": "fake_maker"}
    suite |= {"backbones": {name: {"kind": kind} for name, kind in kinds.items()}, "tasks": {}}
    started: list[tuple[str, str]] = []
    three = Capacity([DeviceSlot("cuda", gpu) for gpu in "0112"], 4, 2)
    runner = placed(suite, three, started, monkeypatch)
    runner._start_ready()
    assert started == [("a", "0"), ("b", "1,2"), ("c", "1")], "its processes share no GPU"
    started.clear()
    placed(suite, Capacity(three.slots, 1, 2), started, monkeypatch)._start_ready()
    assert started == [("a", "0")], "one cell at a time, though there are more slots"
    started.clear()
    runner = placed(
        suite, Capacity([DeviceSlot("cuda", "0"), DeviceSlot("cuda", "1")], 2, 2), started, monkeypatch
    )
    runner._start_ready()
    assert started == [("a", "0")], "it waits for both, and nobody overtakes it"


def start(script: Path, suite: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    path = Path(suite["out"]).with_name("toy.yaml")
    path.write_text(json.dumps(suite))
    command = [sys.executable, str(script), "run", str(path), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )


def hear_interrupts() -> None:
    """A background job inherits an ignored SIGINT, and the runner respects that; here it must hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def waiting_worker(suite: dict[str, Any], process: subprocess.Popen[str]) -> Path:
    """The folder of the cell that waits, once its job has begun to train."""
    for _ in range(600):
        for events in Path(suite["out"]).rglob("events.jsonl"):
            if '"train"' in events.read_text():
                return events.parent
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no job began to train")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_run_saves_and_goes_on(
    fake_kinds: Path, suite: dict[str, Any], number: signal.Signals
) -> None:
    suite["backbones"]["good"]["behave"] = "wait"
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored by every child
    process = start(fake_kinds, suite)
    signal.signal(number, inherited)
    folder = waiting_worker(suite, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Re-run the same command to resume" in err
    assert "Traceback" not in err
    assert (folder / "state").is_file()
    assert not list(Path(suite["out"]).rglob(FAILURE_FILE))

    answer, err = start(fake_kinds, suite, "--json").communicate(timeout=60)
    assert {cell["state"] for cell in json.loads(answer)["cells"]} == {"done"}, err
    assert times_run(suite)["good/backbone-s0"] == 2, "it went on from its state"


def test_a_runner_that_is_killed_leaves_no_worker_behind_and_goes_on(
    fake_kinds: Path, suite: dict[str, Any]
) -> None:
    suite["backbones"]["good"]["behave"] = "wait"
    process = start(fake_kinds, suite)
    waiting_worker(suite, process)
    process.kill()
    process.communicate()
    answer, err = start(fake_kinds, suite, "--json").communicate(timeout=60)
    assert {cell["state"] for cell in json.loads(answer)["cells"]} == {"done"}, err
    assert times_run(suite)["good/backbone-s0"] == 2, "the second waited for the first, then found its state"


def test_a_worker_that_others_stop_is_a_failure_and_goes_on(fake_kinds: Path, suite: dict[str, Any]) -> None:
    suite["backbones"]["good"]["behave"] = "wait"
    process = start(fake_kinds, suite, "--json")
    folder = waiting_worker(suite, process)
    os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
    answer, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    cells = {(cell["backbone"], cell["task"]): cell for cell in json.loads(answer)["cells"]}
    assert "another process stopped it" in cells["good", "backbone"]["reason"]
    results, _ = run(suite)
    assert isinstance(results["good", "backbone", 0], ResultRecord)


def test_cells_know_their_place(suite: dict[str, Any]) -> None:
    cell = Cell(
        "mae", "linear", "imagenet", "fake_transfer", {"protocol": "linear-90ep"}, 1, "key", Path("there")
    )
    assert cell.name == "mae · linear · seed 1"
    assert cell.result() is None
    assert cell.failure("why").protocol == "linear-90ep"
