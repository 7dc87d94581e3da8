"""Several processes for one cell: one record, one failure with its cause, a common stop, no orphans."""

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.orphans import is_alive
from mae_bench.errors import UserError
from mae_bench.record import FAILURE_FILE, Failure, ResultRecord
from mae_bench.runner import processes
from mae_bench.runner.live import View
from mae_bench.runner.processes import Process, Ranks
from mae_bench.runner.runner import run_suite
from mae_bench.runner.worker import INTERRUPTED
from mae_bench.suite.config import load_suite


@pytest.fixture
def pretraining(suite: dict[str, Any]) -> dict[str, Any]:
    """One backbone, made by two processes."""
    return suite | {
        "backbones": {"mae": {"kind": "fake_pretraining"}},
        "tasks": {},
        "processes": 2,
        "jobs": 1,
    }


def run(suite: dict[str, Any], *overrides: str) -> ResultRecord | Failure:
    ((_, result),) = run_suite(
        load_suite(suite, overrides), View(Console(file=StringIO())), "mae-bench run toy.yaml"
    )
    return result


def folder_of(suite: dict[str, Any]) -> Path:
    (file,) = Path(suite["out"]).rglob("cell.json")
    return file.parent


def start(script: Path, suite: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    path = Path(suite["out"]).with_name("toy.yaml")
    path.write_text(json.dumps(suite))
    command = [sys.executable, str(script), "run", str(path), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pids_in_training(suite: dict[str, Any], process: subprocess.Popen[str]) -> list[int]:
    """Of the ranks, once they train together."""
    for _ in range(1200):
        for events in Path(suite["out"]).rglob("events.jsonl"):
            if '"loss"' in events.read_text():
                return [int(path.read_text()) for path in sorted(events.parent.glob("pid-*"))]
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no job began to train")


def test_all_ranks_run_the_job_and_one_writes_the_record(pretraining: dict[str, Any]) -> None:
    record = run(pretraining)
    assert isinstance(record, ResultRecord)
    assert record.score.value == 2.0, "each step was taken by two"
    assert record.hardware["processes"] == 2
    assert (folder_of(pretraining) / "events.jsonl").read_text().count('"load"') == 1, (
        "rank 0 alone writes progress"
    )
    assert run(pretraining | {"processes": 1}) == record, "the number of processes is no part of the cell"


@pytest.mark.parametrize(
    ("behave", "reason", "fix"),
    [
        ("user error", "a given thing (expected: another thing)", "mend it"),
        ("exception on rank 1", "ZeroDivisionError: what nobody foresaw (rank 1 of 2)", "log.txt"),
        ("exit 3 on rank 1", "ended with exit code 3", "log.txt"),
    ],
)
def test_the_failure_of_any_rank_is_the_cells(
    pretraining: dict[str, Any], behave: str, reason: str, fix: str
) -> None:
    failure = run(pretraining, f"backbones.mae.behave={behave}")
    assert isinstance(failure, Failure)
    assert reason in failure.reason
    assert fix in failure.fix
    pids = [int(path.read_text()) for path in folder_of(pretraining).glob("pid-*")]
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize(("number", "resumed_on"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_stopped_pretraining_saves_and_goes_on(
    fake_kinds: Path, pretraining: dict[str, Any], number: signal.Signals, resumed_on: int
) -> None:
    pretraining["backbones"]["mae"]["behave"] = "wait"
    process = start(fake_kinds, pretraining)
    pids = pids_in_training(pretraining, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Re-run the same command to resume" in err
    assert not [pid for pid in pids if is_alive(pid)]
    assert not (folder_of(pretraining) / FAILURE_FILE).exists()
    done = int((folder_of(pretraining) / "state").read_text().split()[0])
    record = run(pretraining, f"processes={resumed_on}")
    assert isinstance(record, ResultRecord)
    assert record.metrics["steps"].value == max(done, 5), "it went on from its state"
    assert len(list(Path(pretraining["out"]).rglob("record.json"))) == 1


def test_a_rank_that_is_killed_ends_the_cell_and_the_same_command_goes_on(
    fake_kinds: Path, pretraining: dict[str, Any]
) -> None:
    pretraining["backbones"]["mae"]["behave"] = "wait"
    process = start(fake_kinds, pretraining, "--json")
    pids = pids_in_training(pretraining, process)
    os.kill(pids[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed by SIGKILL" in out
    assert not [pid for pid in pids if is_alive(pid)]
    (folder_of(pretraining) / "state").write_text("3 6")  # its last checkpoint
    record = run(pretraining, "processes=1")
    assert isinstance(record, ResultRecord)
    assert record.metrics["steps"].value == 5


def test_ranks_whose_runner_is_killed_save_and_end(fake_kinds: Path, pretraining: dict[str, Any]) -> None:
    pretraining["backbones"]["mae"]["behave"] = "wait"
    process = start(fake_kinds, pretraining)
    pids = pids_in_training(pretraining, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_alive(pid)]
    assert (folder_of(pretraining) / "state").is_file()


class Fake:
    """A process that ends when it is told to."""

    def __init__(self, code: int | None = None):
        self.code, self.asked, self.killed = code, 0, 0

    def poll(self) -> int | None:
        return self.code

    def ask_to_stop(self) -> None:
        self.asked += 1

    def kill(self) -> None:
        self.killed += 1


def test_ranks_end_when_all_have_ended() -> None:
    main, other = Fake(), Fake()
    members: list[Process] = [main, other]
    ranks = Ranks(members)
    assert ranks.poll() is None
    other.code = 0
    assert ranks.poll() is None, "the main rank writes what is left to write"
    main.code = 0
    assert ranks.poll() == 0


def test_ranks_do_not_outlive_the_one_that_writes_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
    main, other = Fake(0), Fake()
    assert Ranks([main, other]).poll() == 0
    assert other.killed


def test_a_failed_rank_ends_the_others_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FALL_SECONDS", 0.0)
    waiting = Fake()
    assert Ranks([waiting, Fake(1)]).poll() == 1
    assert (waiting.asked, waiting.killed) == (0, 1)


def test_a_rank_that_was_asked_to_stop_takes_the_others_along() -> None:
    other = Fake()
    ranks = Ranks([other, Fake(INTERRUPTED)])
    assert ranks.poll() is None, "it has time to save"
    assert other.asked == 1
    other.code = 1  # it lost its peer while it saved
    assert ranks.poll() == INTERRUPTED


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ((1, -9), -9),
        ((-6, 1), 1),
        ((1, 3), 3),
        ((INTERRUPTED, 1), INTERRUPTED),
        ((-11, -6), -11),
        ((0, -6), -6),
    ],
)
def test_the_cause_is_told_from_what_follows(codes: tuple[int, int], cause: int) -> None:
    assert Ranks([Fake(code) for code in codes]).poll() == cause


def test_more_processes_than_gpus_are_refused(
    pretraining: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_bench.runner.runner.visible_gpus", lambda: ["0"])
    with pytest.raises(UserError, match="processes=2, but torch sees 1 GPU"):
        run(pretraining | {"device": "cuda"})
