"""Evaluations during training: they change nothing, and the best one is reported next to the score."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_bench.files import write_json
from mae_bench.job import Outcome
from mae_bench.seal import read_sealed_json, seal_json
from tasks.imagenet.evaluate import read_epochs, select_best_epoch
from tests.tasks.imagenet.toy import job, predictions_of, run_protocol, state_of


@pytest.fixture(scope="module")
def outcomes(
    faint: Path, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Outcome]]:
    """Run finetune and probe with and without evaluations during training."""
    folder, found = tmp_path_factory.mktemp("epochs"), {}
    for name in ("finetune", "probe"):
        for often, period in (("watched", 0.8), ("plain", None)):
            place = folder / f"{name} {often}"
            outcome = run_protocol(
                name, faint, place, sources[name], eval_epochs=period, epochs=4, base_lr=1.0
            )
            found[f"{name} {often}"] = place, outcome
    return found


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_evaluating_changes_no_weight(outcomes: dict[str, tuple[Path, Outcome]], name: str) -> None:
    watched, plain = (state_of(outcomes[f"{name} {often}"][0]) for often in ("watched", "plain"))
    assert watched.keys() == plain.keys()
    assert all(torch.equal(watched[key], plain[key]) for key in watched)


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_the_last_and_the_best_epoch_are_both_reported(
    outcomes: dict[str, tuple[Path, Outcome]], name: str
) -> None:
    folder, outcome = outcomes[f"{name} watched"]
    epochs: list[dict[str, Any]] = read_sealed_json(folder / "epochs.json")["epochs"]
    assert [entry["step"] for entry in epochs] == [3, 5, 8, 10, 12], "0.8, 1.6 ... epochs of 3 steps"
    assert [entry["epoch"] for entry in epochs] == [step / 3 for step in (3, 5, 8, 10, 12)]
    last, best = epochs[-1], max(epochs, key=lambda entry: entry["top1"])
    assert {name: outcome.metrics[name].value for name in ("top1", "top5", "loss")} == {
        k: last[k] for k in ("top1", "top5", "loss")
    }
    assert (outcome.metrics["best_top1"].value, outcome.metrics["best_epoch"].value) == (
        best["top1"],
        best["epoch"],
    )
    assert "the score is the last epoch's" in outcome.notes[0]
    assert outcome.artefacts["epochs"] == "epochs.json"
    _, plain = outcomes[f"{name} plain"]
    assert plain.metrics == {
        key: value for key, value in outcome.metrics.items() if not key.startswith("best_")
    }


@pytest.mark.parametrize(
    ("last", "best", "of"),
    [(70.0, 70.0, 3.0), (60.0, 60.0, 1.0), (50.0, 60.0, 1.0)],
    ids=["last", "first of equals", "earlier"],
)
def test_the_last_epoch_may_be_the_best(tmp_path: Path, last: float, best: float, of: float) -> None:
    """Although no evaluation during training fell on it."""
    epochs = [{"epoch": 1.0, "top1": 60.0}, {"epoch": 2.5, "top1": 60.0}]
    write_json(tmp_path / "epochs.json", seal_json({"epochs": epochs}))
    metrics, notes = select_best_epoch(job(tmp_path), 3.0, last)
    assert (metrics["best_top1"].value, metrics["best_epoch"].value) == (best, of)
    assert f"epoch {of:g}" in notes[0]


def test_entries_of_an_earlier_run_are_dropped(faint: Path, sources: dict[str, str], tmp_path: Path) -> None:
    stale = [
        {"step": step, "epoch": step / 3, "top1": 100.0, "top5": 100.0, "loss": 0.0} for step in (1, 4, 99)
    ]
    for period in (1, None):
        write_json(tmp_path / "epochs.json", seal_json({"epochs": stale}))
        outcome = run_protocol("finetune", faint, tmp_path, sources["finetune"], eval_epochs=period)
        if period:
            assert all(entry["loss"] > 0 for entry in read_epochs(job(tmp_path)))
        assert ("best_top1" in outcome.metrics) == bool(period)
        assert outcome.artefacts.keys() - {"epochs"} == {"predictions", "trained"}
        assert ("epochs" in outcome.artefacts) == bool(period)
        shutil.rmtree(tmp_path / "checkpoints")


def test_predictions_of_two_models_are_compared_image_by_image(
    outcomes: dict[str, tuple[Path, Outcome]],
) -> None:
    """McNemar's counts, from the files only, agree with the difference of the scores."""
    one, other = (predictions_of(outcomes[f"{name} plain"][0]) for name in ("finetune", "probe"))
    assert (one["indices"] == other["indices"]).all()
    assert (one["targets"] == other["targets"]).all()
    right = [found["top5"][:, 0] == found["targets"] for found in (one, other)]
    only_one, only_other = (int((right[a] & ~right[b]).sum()) for a, b in ((0, 1), (1, 0)))
    top1 = [outcomes[f"{name} plain"][1].metrics["top1"].value for name in ("finetune", "probe")]
    assert top1[0] - top1[1] == pytest.approx(100 * (only_one - only_other) / 11)
    assert only_one + only_other > 0, "two models that differ"
