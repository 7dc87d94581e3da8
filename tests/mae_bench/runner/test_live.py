"""The view: what it reads from events, what it prints, and what it draws."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mae_bench.progress import EVENTS_FILE
from mae_bench.record import Failure, Metric, ResultRecord
from mae_bench.runner.estimate import Estimate
from mae_bench.runner.live import LINE_SECONDS, LiveView, View, counting, row, view_for
from mae_bench.runner.status import WorkerStatus, clock
from mae_bench.suite.cell import LOG_FILE, Cell

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


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / EVENTS_FILE
    for damaged in (b'{"time": 1, "stage": "tr\xffin"}', b"7", b'{"sta!e": "train", "time": 1, "total": 2}'):
        with path.open("ab") as file:
            file.write(damaged + b"\n")
    add(path, done=5)
    tail = WorkerStatus("mae", path)
    assert tail.poll() == []
    assert tail.done == 5


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


@pytest.mark.parametrize(
    "line",
    [
        b'{"time": 1, "sta',
        b"\xff\x00\n",
        b"[]",
        b'{"time": 1, "stage": "train", "done": "many"}',
        b'{"time": 1, "stage": "train", "done": 1e999, "total": 2}',
        b'{"time": 1, "done": 5, "total": 100}',
        b"[" * 5000,
    ],
)
def test_a_bad_line_is_ignored(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / EVENTS_FILE
    add(path, done=5)
    with open(path, "ab") as file:
        file.write(line + b"\n")
    add(path, done=6, note="later")
    tail = WorkerStatus("mae", path)
    assert tail.poll() == ["later"]
    assert (tail.stage, tail.done, tail.total) == ("train", 6, 100)


def test_a_loss_that_is_no_number_is_shown(tmp_path: Path) -> None:
    path = tmp_path / EVENTS_FILE
    add(path, done=5, values={"loss": float("nan"), "epoch": 3, "part": "warm-up"})
    tail = WorkerStatus("mae", path)
    tail.poll()
    assert tail.shown == {"loss": "nan", "epoch": "3", "part": "warm-up"}


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr("time.time", lambda: self.now)
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)


def test_without_a_terminal_a_line_tells_every_half_minute_how_far_it_is(
    tmp_path: Path, fake_clock: FakeClock
) -> None:
    lines = StringIO()
    view = View(Console(file=StringIO()), Console(file=lines, width=20))
    view.begin(1, 0)
    view.start(tmp_path, "mae · [linear]", imgs_per_step=256)
    for step in range(0, 70, 10):  # a step a second
        fake_clock.now = 1000.0 + step
        if step:
            add(tmp_path / EVENTS_FILE, time=fake_clock.now, done=step, values={"loss": 0.123456})
        view.tick()
        view.tick()
    expected = [
        "train 30/100, loss 0.1235, img/s 256, ETA 1:10",
        "train 60/100, loss 0.1235, img/s 256, ETA 0:40",
    ]
    assert LINE_SECONDS == 30
    assert lines.getvalue().splitlines() == [f"mae · [linear]: {line}" for line in expected]
    logged = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [line.partition(" ")[2] for line in logged] == expected


def test_on_a_terminal_the_log_alone_gets_the_lines(tmp_path: Path, fake_clock: FakeClock) -> None:
    text = StringIO()
    with LiveView(Console(file=text, width=120, force_terminal=True)) as view:
        view.begin(1, 0)
        view.start(tmp_path, "mae")
        fake_clock.now += LINE_SECONDS
        view.tick()
    assert (tmp_path / LOG_FILE).read_text().endswith(" start, ETA unknown\n")
    assert "start, ETA" not in text.getvalue()


def cell(folder: Path, backbone: str, row: str = "linear", upstream: Path | None = None) -> Cell:
    return Cell(backbone, row, "imagenet", "linear", {"protocol": row}, 0, "", folder, upstream)


def took(seconds: int) -> ResultRecord:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return replace(
        RECORD, started=start.isoformat(), finished=(start + timedelta(seconds=seconds)).isoformat()
    )


def test_the_time_left_is_that_of_the_finished_cells_of_a_kind(tmp_path: Path, fake_clock: FakeClock) -> None:
    cells = [cell(tmp_path / str(number), "mae" if number < 4 else "base") for number in range(6)]
    estimate = Estimate(cells, {}, parallel=2)
    assert estimate.seconds_left({}) is None, "nothing was measured"
    estimate.finish(tmp_path / "0", FAILURE)
    assert estimate.seconds_left({}) is None, "a failure is no measurement"
    estimate.finish(tmp_path / "1", took(100))
    assert estimate.seconds_left({}) == 400 / 2, "of another backbone, but of the same task"
    estimate.finish(tmp_path / "4", took(300))
    assert estimate.seconds_left({}) == 300, "2 of mae at 100 and 1 of base at 300, two at a time"
    begun = WorkerStatus("base", tmp_path / "none", began=fake_clock.now - 280)
    assert estimate.seconds_left({tmp_path / "5": begun}) == (100 + 100 + 20) / 2
    for number in (2, 3, 5):
        estimate.finish(tmp_path / str(number), took(1))
    assert estimate.seconds_left({}) == 0


def test_a_cell_that_trains_is_estimated_from_its_own_pace(tmp_path: Path, fake_clock: FakeClock) -> None:
    estimate = Estimate([cell(tmp_path, "mae")], {}, parallel=1)
    status = WorkerStatus("mae", tmp_path / EVENTS_FILE)
    add(status.path, stage="load", time=980, done=1)
    add(status.path, stage="load", time=990, done=50)
    status.poll()
    assert estimate.seconds_left({tmp_path: status}) is None, "loading says nothing about training"
    add(status.path, time=990, done=10)
    add(status.path, time=1000, done=20)
    status.poll()
    assert estimate.seconds_left({tmp_path: status}) == pytest.approx(80)


def test_transfers_wait_for_their_backbone(tmp_path: Path) -> None:
    maker = cell(tmp_path / "maker", "mae", "backbone")
    transfers = [cell(tmp_path / str(number), "mae", upstream=maker.dir) for number in range(2)]
    done = [cell(tmp_path / "a", "base", "backbone"), cell(tmp_path / "b", "base")]
    results = {done[0].dir: took(60), done[1].dir: took(10)}
    estimate = Estimate([*done, maker, *transfers], results, parallel=8)
    assert estimate.seconds_left({}) == 70


def test_the_whole_run_has_an_estimate_once_every_kind_was_measured(
    tmp_path: Path, fake_clock: FakeClock
) -> None:
    text, cells = StringIO(), [cell(tmp_path / name, name) for name in ("a", "b", "c")]
    with LiveView(Console(file=text, width=120, force_terminal=True)) as view:
        view.begin(3, 0, Estimate(cells, {}, parallel=1))
        view.start(tmp_path / "a", "a")
        view.tick()
        assert "0 of 3 cells, 0:00 so far, ETA unknown" in text.getvalue()
        fake_clock.now += 100
        view.end(tmp_path / "a", "a", took(90))
        view.tick()
        fake_clock.now += 1
        view.tick()
    assert "1 of 3 cells, 1:41 so far, ETA 3:00" in text.getvalue()


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
    assert tail.shown == {"loss": "0.5", "img/s": "8192"}
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


def test_counting_without_a_terminal_says_how_far_it_is(fake_clock: FakeClock) -> None:
    text = StringIO()
    with counting(Console(file=text)) as show:
        for done in range(0, 9):
            show("train", done, 9)
            fake_clock.now += LINE_SECONDS / 3
    assert text.getvalue().splitlines() == ["train: 3 of 9", "train: 6 of 9"]


def test_a_row_without_a_total_has_no_count(tmp_path: Path) -> None:
    assert len(row(WorkerStatus("mae", tmp_path / "none"))) == 7


def test_a_file_gets_lines_and_a_terminal_bars() -> None:
    assert type(view_for(Console(file=StringIO()))) is View
    assert type(view_for(Console(file=StringIO(), force_terminal=True))) is LiveView


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.9, "1:15"), (3600, "1:00:00"), (-1, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
