"""Trackers: TensorBoard contains each step once over resumes; W&B and MLflow are only used on request."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_run import STEPS_PER_EPOCH, Run, signals_restored, train

from mae_bench.engine.trackers import Log
from mae_bench.errors import Interrupted, NotInstalled

RARELY = {"checkpoint_seconds": 1e6}
TOTAL = 3 * STEPS_PER_EPOCH


def test_tensorboard_has_each_step_once_though_some_were_run_twice(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, stop_at=2, **RARELY)
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, crash_at=7, **RARELY)  # steps 3 to 6 were drawn, but no state holds them
    train(tmp_path, **RARELY)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    points = curves.Scalars("loss")
    assert [point.step for point in points] == list(range(TOTAL))
    assert [point.value for point in points] == pytest.approx([line["loss"] for line in logged])
    assert {"loss", "lr", "images_per_second", "data_wait", "peak_memory_mib"} <= set(
        curves.Tags()["scalars"]
    )


def test_what_a_killed_run_logged_after_its_state_is_taken_out(tmp_path: Path) -> None:
    first = Log(tmp_path, 0)
    first.log(0, {"loss": 1.0})
    size = first.size()
    first.log(1, {"loss": 2.0})
    first.close()
    second = Log(tmp_path, size)
    second.log(1, {"loss": 3.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 3.0}]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_missing_is_named_with_its_command(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_bench.engine.trackers.importlib.util.find_spec", lambda name: None)
    with signals_restored(), pytest.raises(NotInstalled, match=f"{name} is not installed") as error:
        Run(tmp_path, trackers=[name])
    assert error.value.fix == f"pip install {name}"


def test_no_tracker_is_imported_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    assert train(tmp_path, epochs=1, **RARELY).step == STEPS_PER_EPOCH


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> "FakeWandb":
        self.runs.append(settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(Interrupted):
        train(tmp_path, trackers=["wandb"], stop_at=4, **RARELY)
    train(tmp_path, trackers=["wandb"], **RARELY)
    assert [step for step, _ in fake.logged] == list(range(TOTAL))
    assert len({run["id"] for run in fake.runs}) == 1
    assert [run["resume"] for run in fake.runs] == ["allow", "allow"]
    assert fake.finished == 2
    assert "loss" in fake.logged[0][1]


class FakeMLflow(ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.started: list[str | None] = []
        self.logged: list[int] = []
        self.open = 0

    def set_experiment(self, name: str) -> None:
        assert name == "mae_bench"

    def start_run(self, run_id: str | None, run_name: str) -> Any:
        self.started.append(run_id)
        self.open += 1

        class Active:
            class info:  # noqa: N801 - MLflow's own name
                run_id = "one"

        return Active

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append(step)

    def end_run(self) -> None:
        self.open -= 1


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with pytest.raises(Interrupted):
        train(tmp_path, trackers=["mlflow"], stop_at=4, **RARELY)
    train(tmp_path, trackers=["mlflow"], **RARELY)
    assert fake.started == [None, "one"]
    assert fake.logged == list(range(TOTAL))
    assert fake.open == 0
