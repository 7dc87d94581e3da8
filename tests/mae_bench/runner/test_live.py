"""The view: what it reads from events, what it prints, and what it draws."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mae_bench.progress import EVENTS_FILE
from mae_bench.record import Failure, Metric, ResultRecord
from mae_bench.runner.live import LiveView, View, WorkerStatus, clock, counting, row, view_for

FAILURE = Failure("mae", "coco", "maskrcnn", 0, "not installed", "no [detectron2]", "make setup")
RECORD = ResultRecord(
    backbone="mae",
    task="imagenet",
    protocol="linear",
    dataset="toy",
    split="val",
    num_samples=10,
    metrics={"top1": Metric(61.54321)},
    main_metric="top1",
    seed=0,
    backbone_spec={},
    backbone_digest="",
    config={},
    config_digest="",
    data_digest="",
)


def add(path: Path, time: float = 0.0, **event: Any) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time, "stage": "train", "total": 100, **event}) + "\n")


def test_a_tail_follows_stage_steps_and_values(tmp_path: Path) -> None:
    path = tmp_path / EVENTS_FILE
    tail = WorkerStatus("mae", path)
    assert tail.poll() == []
    add(path, done=0)
    add(path, done=10, values={"loss": 0.5})
    add(path, note="resumed")
    assert tail.poll() == ["resumed"]
    assert (tail.stage, tail.done, tail.total, tail.values) == ("train", 10, 100, {"loss": 0.5})
    assert tail.poll() == []
    add(path, stage="evaluate", total=7, done=0)
    tail.poll()
    assert (tail.stage, tail.done, tail.total, tail.values) == ("evaluate", 0, 7, {})


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / EVENTS_FILE
    add(path, done=5)
    whole = path.read_bytes()
    tail = WorkerStatus("mae", path)
    path.write_bytes(whole[:20])
    tail.poll()
    assert tail.done == 0
    path.write_bytes(whole)
    tail.poll()
    assert tail.done == 5


def test_the_time_that_is_left_follows_the_pace_since_the_stage_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / EVENTS_FILE
    tail = WorkerStatus("mae", path)
    add(path, time=1000, done=0)
    add(path, time=1002, done=60)  # resumed there
    tail.poll()
    assert tail.seconds_left is None
    add(path, time=1012, done=80)
    tail.poll()
    monkeypatch.setattr("time.time", lambda: 1012.0)
    assert tail.seconds_left == pytest.approx(10.0)


def printed(view_class: type[View], tmp_path: Path, **options: Any) -> str:
    text = StringIO()
    with view_class(Console(file=text, width=120, **options)) as view:
        view.begin(3, 1)
        view.start(tmp_path, "mae · linear")
        add(tmp_path / EVENTS_FILE, done=40, values={"loss": 0.123456, "lr": 1e-4})
        add(tmp_path / EVENTS_FILE, note="an image is [bad]")
        view.tick()
        view.end(tmp_path, "mae · linear", RECORD)
        view.end(tmp_path / "other", "mae · maskrcnn", FAILURE)
    return text.getvalue()


def test_lines_are_one_an_event(tmp_path: Path) -> None:
    lines = printed(View, tmp_path).splitlines()
    assert lines[0] == "3 cells, 1 already finished, 2 to run"
    assert lines[1].split() == ["start", "mae", "·", "linear"]
    assert "an image is [bad]" in lines[2]
    assert "top1 61.543 %" in lines[3]
    assert "not installed" in lines[4]
    assert lines[5].strip() == "no [detectron2]"
    assert lines[6].strip() == "Next: make setup"
    assert len(lines) == 7


def test_the_live_view_draws_bars_and_keeps_results(tmp_path: Path) -> None:
    text = printed(LiveView, tmp_path, force_terminal=True, legacy_windows=False)
    assert "loss 0.1235 lr 0.0001" in text
    assert "40/100" in text
    assert "1 of 3 cells" in text
    assert "61.543" in text
    assert "start" not in text, "the bar says so"


def test_several_processes_are_counted_and_so_are_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = StringIO()
    view = View(Console(file=text, width=120))
    view.start(tmp_path, "mae", processes=8, imgs_per_step=4096)
    assert "mae · 8 processes" in text.getvalue()
    add(tmp_path / EVENTS_FILE, time=1000, done=60)
    add(tmp_path / EVENTS_FILE, time=1010, done=80, values={"loss": 0.5})
    view.tick()
    monkeypatch.setattr("time.time", lambda: 1010.0)
    tail = view._tails[tmp_path]
    assert tail.shown == {"loss": 0.5, "img/s": 8192}
    add(tmp_path / EVENTS_FILE, time=1011, stage="evaluate", done=1)
    add(tmp_path / EVENTS_FILE, time=1012, stage="evaluate", done=9)
    view.tick()
    assert "img/s" not in tail.shown, "its steps are no training steps"


def test_counting_says_what_is_whole_once() -> None:
    text = StringIO()
    with counting(Console(file=text)) as show:
        for done in (0, 5, 9, 9):
            show("train", done, 9)
        show("val", 2, 2)
    assert text.getvalue().splitlines() == ["train: 9", "val: 2"]


def test_a_row_without_a_total_has_no_count(tmp_path: Path) -> None:
    assert len(row(WorkerStatus("mae", tmp_path / "none"))) == 7


def test_a_file_gets_lines_and_a_terminal_bars() -> None:
    assert type(view_for(Console(file=StringIO()))) is View
    assert type(view_for(Console(file=StringIO(), force_terminal=True))) is LiveView


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.9, "1:15"), (3600, "1:00:00"), (-1, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
