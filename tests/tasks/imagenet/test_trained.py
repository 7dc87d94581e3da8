"""A trained model is kept, and evaluated again instead of trained again where only the evaluation differs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mae_bench.environment.code import digest_kind
from mae_bench.errors import Interrupted
from mae_bench.files import file_digest
from mae_bench.progress import Progress
from mae_bench.registry import kind
from mae_bench.runner.worker import Order, work
from mae_bench.suite.cell import Cell
from tests.tasks.imagenet.toy import PROTOCOLS, predictions_of, run_protocol

TRAINS = [name for name, values in PROTOCOLS.items() if "epochs" in values]
EPOCHS = {"best_top1", "best_epoch"}  # of evaluations during training


class Watching(Progress):
    """Count training steps, keep notes, and ask for a stop after `limit` steps."""

    def __init__(self, limit: float = float("inf")):
        super().__init__()
        self.limit, self.steps = limit, 0.0
        self.notes: list[str] = []

    @property
    def should_stop(self) -> bool:
        return self.steps >= self.limit

    def step(self, done: float, **values: float | str) -> None:
        if self._stage == "train":
            self.steps = max(self.steps, done)
        super().step(done, **values)

    def note(self, message: str) -> None:
        self.notes.append(message)


def correct(data: Path, image: str) -> None:
    """Replace an image by another one of its split."""
    path = data / image
    path.write_bytes(sorted(path.parent.parent.rglob("*.png"))[-1].read_bytes())


@pytest.fixture
def own(faint: Path, tmp_path: Path) -> Path:
    """A copy of the set, which the test may change."""
    return Path(shutil.copytree(faint, tmp_path / "data"))


@pytest.mark.parametrize("name", TRAINS)
def test_a_corrected_validation_image_is_scored_without_training(own, tmp_path, sources, name):
    run_protocol(name, own, tmp_path / "first", sources[name], crop_pct=0.9)
    correct(own, "val/class0/0.png")
    progress = Watching()
    earlier = (tmp_path / "missing", tmp_path / "first")
    second = run_protocol(name, own, tmp_path / "second", sources[name], progress, earlier, crop_pct=0.9)
    fresh = run_protocol(name, own, tmp_path / "fresh", sources[name], crop_pct=0.9)
    assert progress.steps == 0
    measured = {key: value for key, value in fresh.metrics.items() if key not in EPOCHS}
    assert second.metrics == measured
    assert second.backbone_digest == fresh.backbone_digest
    assert second.cost.keys() == fresh.cost.keys()
    assert any("first" in note and "trained on" in note for note in second.notes)
    assert any("best_top1 was not measured" in note for note in second.notes) == (measured != fresh.metrics)
    folders = [(tmp_path / place / fresh.artefacts["predictions"]).parent for place in ("second", "fresh")]
    found = [predictions_of(folder) for folder in folders]
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0] | found[1])
    kept = {key: path for key, path in second.artefacts.items() if key.startswith("trained")}
    assert kept == {key: path for key, path in fresh.artefacts.items() if key.startswith("trained")} != {}
    assert all(
        file_digest(tmp_path / "second" / p) == file_digest(tmp_path / "fresh" / p) for p in kept.values()
    )


class TestItIsTrained:
    """Where the training itself would differ, or the kept model is damaged."""

    @pytest.fixture
    def notes_of(self, own, tmp_path, backbone) -> Callable[..., list[str]]:
        """Return a function that trains after a finished cell and returns the notes about its model."""
        run_protocol("finetune", own, tmp_path / "first", backbone)

        def start(**changes: object) -> list[str]:
            progress = Watching(limit=1)
            with pytest.raises(Interrupted):
                run_protocol(
                    "finetune", own, tmp_path / "second", backbone, progress, (tmp_path / "first",), **changes
                )
            shutil.rmtree(tmp_path / "second")
            return [note for note in progress.notes if "not evaluated again" in note]

        return start

    def test_with_another_training_set_or_config(self, own, notes_of):
        assert notes_of(base_lr=0.2) == []
        correct(own, "train/class0/0.png")
        assert notes_of() == []

    @pytest.mark.parametrize("file", ["model.safetensors", "training.json", "manifest.json"])
    def test_if_a_bit_was_flipped(self, tmp_path, notes_of, file):
        path = tmp_path / "first" / "trained" / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert [str(path) in note for note in notes_of()] == [True]

    def test_if_a_file_is_missing(self, tmp_path, notes_of):
        (tmp_path / "first" / "trained" / "training.json").unlink()
        assert ["training.json" in note for note in notes_of()] == [True]


def test_another_crop_of_the_evaluation_needs_no_training(own, tmp_path, backbone):
    run_protocol("finetune", own, tmp_path / "first", backbone, eval_epochs=None)
    for before, folder, crop_pct in (("first", "second", 0.5), ("second", "third", 0.6)):
        progress = Watching()
        outcome = run_protocol(
            "finetune",
            own,
            tmp_path / folder,
            backbone,
            progress,
            (tmp_path / before,),
            eval_epochs=None,
            crop_pct=crop_pct,
        )
        assert progress.steps == 0
        assert f"{tmp_path.name}/first trained on" in outcome.notes[0]


def test_a_model_that_other_code_trained_is_told(own, tmp_path, backbone, monkeypatch):
    run_protocol("finetune", own, tmp_path / "first", backbone)
    correct(own, "val/class0/0.png")
    notes = []
    for folder in ("second", "third"):
        outcome = run_protocol(
            "finetune", own, tmp_path / folder, backbone, None, (tmp_path / "first",), crop_pct=0.9
        )
        notes.append(outcome.notes[0])
        monkeypatch.setattr("tasks.trained.digest_kind", lambda kind: "2" * 64)
    assert notes[0].endswith("what decides the training is the same")
    digest = digest_kind(kind("finetune"))
    assert notes[1].endswith(f"but the code has changed since (digest {digest[:8]})")


def test_a_partial_curve_trains_only_what_it_lacks(own, tmp_path, backbone):
    run_protocol("partial", own, tmp_path / "first", backbone, blocks=[0, 0.5])
    progress = Watching(limit=1)
    with pytest.raises(Interrupted):
        run_protocol("partial", own, tmp_path / "second", backbone, progress, (tmp_path / "first",))
    assert not (tmp_path / "second/blocks-0.5/checkpoints").exists()
    assert (tmp_path / "second/blocks-2/checkpoints").exists()


@pytest.mark.parametrize("name", ["grid", "partial"])
def test_nothing_is_kept_on_request(own, tmp_path, backbone, name):
    outcome = run_protocol(name, own, tmp_path / "job", backbone, keep_weights=False)
    assert not [key for key in outcome.artefacts if key.startswith("trained")]
    assert not list(tmp_path.glob("job/**/trained"))


def test_a_cell_of_a_suite_finds_what_an_earlier_cell_trained(own, tmp_path, backbone):
    config = PROTOCOLS["finetune"] | {"data": str(own)}
    (tmp_path / "upstream").mkdir()
    (tmp_path / "upstream" / "export").symlink_to(backbone)
    first = Cell(
        "mae",
        "tuned",
        "imagenet",
        "finetune",
        config,
        0,
        "a",
        tmp_path / "mae/tuned-s0-a",
        tmp_path / "upstream",
    )
    second = replace(first, key="b", dir=tmp_path / "mae" / "tuned-s0-b")
    for cell, place in ((first, "val/class0/0.png"), (second, "")):
        cell.dir.mkdir(parents=True)
        work(Order(cell, kind("finetune"), "cpu", 1, "mae-bench run x"), Progress(cell.dir / "events.jsonl"))
        if place:
            correct(own, place)
    record = json.loads((second.dir / "record.json").read_text())
    assert "the model that mae/tuned-s0-a trained on" in record["notes"][0]
    events = [json.loads(line) for line in (second.dir / "events.jsonl").read_text().splitlines()]
    assert "train" not in {event["stage"] for event in events}
    assert (second.dir / record["artefacts"]["trained"]).is_file(), "it outlives the training states"
