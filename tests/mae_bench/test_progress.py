"""Progress: the events that it writes, and when it asks a job to stop."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_bench.errors import Interrupted
from mae_bench.progress import STOP_SIGNALS, Progress


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_say_stage_steps_and_values(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "events.jsonl")
    progress.stage("train", 2)
    progress.step(1, loss=0.5)
    progress.step(2, loss=0.25)
    progress.note("resumed")
    kept = [
        {key: value for key, value in event.items() if key != "time"}
        for event in events(tmp_path / "events.jsonl")
    ]
    assert kept == [
        {"stage": "train", "total": 2, "done": 0},
        {"stage": "train", "total": 2, "done": 1, "values": {"loss": 0.5}},
        {"stage": "train", "total": 2, "done": 2, "values": {"loss": 0.25}},
        {"stage": "train", "total": 2, "note": "resumed"},
    ]


def test_many_steps_are_few_events_and_the_last_is_among_them(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "events.jsonl")
    progress.stage("train", 5000)
    for step in range(1, 5001):
        progress.step(step)
    written = events(tmp_path / "events.jsonl")
    assert len(written) < 1000
    assert written[-1]["done"] == 5000


def test_a_second_run_adds_to_the_events_of_the_first(tmp_path: Path) -> None:
    for name in ("first", "second"):
        Progress(tmp_path / "events.jsonl").stage(name)
    assert [event["stage"] for event in events(tmp_path / "events.jsonl")] == ["first", "second"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_for_a_stop_at_the_next_step(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    try:
        progress = Progress()
        progress.stop_on_signals()
        progress.step(1)
        os.kill(os.getpid(), number)
        assert progress.should_stop
        with pytest.raises(Interrupted):
            progress.step(2)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_job_whose_parent_is_gone_stops(tmp_path: Path) -> None:
    child = (
        "import sys, time; from mae_bench.progress import Progress; p = Progress(); print('up', flush=True)\n"
        "while not p.should_stop: time.sleep(0.01)\n"
        f"open({str(tmp_path / 'stopped')!r}, 'w').close()"
    )
    parent = (
        "import subprocess, sys\n"
        f"c = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "c.stdout.readline()"
    )
    subprocess.run([sys.executable, "-c", parent], check=True, timeout=60)
    for _ in range(500):
        if (tmp_path / "stopped").exists():
            return
        signal.sigtimedwait([], 0.02)
    raise AssertionError("the job went on without its parent")


def test_a_stop_is_deferred_for_those_who_agree_on_it_with_others() -> None:
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    try:
        progress = Progress()
        progress.stop_on_signals()
        with progress.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            progress.step(1)
            progress.stage("another")
            assert progress.should_stop
        with pytest.raises(Interrupted):
            progress.check()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
