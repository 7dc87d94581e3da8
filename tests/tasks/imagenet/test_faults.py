"""Faults while a protocol runs are reported with their fix and never leave a record."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_bench.data.batches.loader import TrainingOrder
from mae_bench.engine.distributed import World
from mae_bench.errors import UserError
from mae_bench.progress import Progress
from mae_bench.registry import kind
from mae_bench.runner.worker import Order, run_and_report, work
from mae_bench.suite.cell import Cell
from tasks.imagenet import features, few_shot, knn, linear_probe
from tasks.imagenet.classify import Classifier
from tasks.imagenet.evaluate import predict
from tasks.imagenet.features import FrozenFeatures
from tests.tasks.imagenet.toy import PROTOCOLS, run_protocol


def work_on(name: str, data: Path, folder: Path, backbone: str, **changes: Any) -> dict[str, Any]:
    """Run the protocol as the runner's worker does; return the failure or the record that it writes."""
    config = {**PROTOCOLS[name], **changes, "data": str(data)}
    (folder / "upstream").mkdir(parents=True, exist_ok=True)
    if not (folder / "upstream/export").exists():
        (folder / "upstream/export").symlink_to(backbone)
    cell = Cell(
        "mae", name, "imagenet", config["kind"], config, 0, "key", folder / "cell", folder / "upstream"
    )
    cell.dir.mkdir(exist_ok=True)
    order = Order(cell, kind(config["kind"]), "cpu", 1, "mae-bench run x")
    (cell.dir / "failure.json").unlink(missing_ok=True)
    code = run_and_report(order, lambda: work(order, Progress()))
    left = {path.name for path in cell.dir.glob("*.json")} & {"failure.json", "record.json"}
    assert left == ({"record.json"} if code == 0 else {"failure.json"})
    found: dict[str, Any] = json.loads((cell.dir / left.pop()).read_text())
    return found


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return no_room(owner, name, when): the function runs out of memory if `when(first argument)`."""

    def patch(owner: Any, name: str, when: Callable[[Any], bool] = lambda _: True) -> None:
        real = getattr(owner, name)

        def fail(first: Any, *args: Any, **kwargs: Any) -> Any:
            if when(first):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(first, *args, **kwargs)

        monkeypatch.setattr(owner, name, fail)

    return patch


def test_no_memory_in_training(data, tmp_path, backbone, no_room):
    no_room(Classifier, "forward_features", lambda model: model.training)
    failure = work_on("finetune", data, tmp_path, backbone)
    assert "does not hold a training step on 8 images at once (step 0)" in failure["reason"]
    assert "device_batch_size=4" in failure["fix"]


def test_no_memory_in_evaluation_and_resumed_with_a_smaller_batch(
    data, tmp_path, backbone, monkeypatch, no_room
):
    with monkeypatch.context() as patch:
        real = Classifier.forward_features

        def fail(self, imgs):
            if not self.training and len(imgs) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, imgs)

        patch.setattr(Classifier, "forward_features", fail)
        failure = work_on("finetune", data, tmp_path, backbone, eval_epochs=None, eval_batch_size=5)
        assert "an evaluation of 5 images at once" in failure["reason"]
        assert "eval_batch_size=2; the scores do not change" in failure["fix"]
    record = work_on("finetune", data, tmp_path, backbone, eval_epochs=None, eval_batch_size=2)
    assert record["metrics"]["top1"]["value"] >= 0


@pytest.mark.parametrize(
    ("name", "owner", "function", "fix"),
    [
        ("grid", FrozenFeatures, "_forward_layers", "device_batch_size=4"),
        ("cached", FrozenFeatures, "_forward_layers", "eval_batch_size=1"),
        ("knn", knn, "find_nearest", "chunk=32768"),
        ("few_shot", few_shot, "fit_classifiers", "largest of shares"),
    ],
)
def test_no_memory_in_protocols_on_features(data, tmp_path, backbone, no_room, name, owner, function, fix):
    no_room(owner, function)
    failure = work_on(name, data, tmp_path, backbone)
    assert "memory does not hold" in failure["reason"]
    assert fix in failure["fix"]


def test_no_memory_anywhere_else(data, tmp_path, backbone, no_room):
    """For example if another process fills the device before the model is loaded."""
    no_room(linear_probe, "load_at_size")
    failure = work_on("probe", data, tmp_path, backbone)
    assert failure["reason"].startswith("the device's memory is full: CUDA out of memory")
    assert "eval_batch_size" in failure["fix"]


@pytest.mark.parametrize("name", ["finetune", "grid", "cached"])
def test_training_that_ends_early_leaves_no_record(data, tmp_path, backbone, monkeypatch, name):
    real = TrainingOrder.batches

    def some(self: TrainingOrder, start: int, stop: int) -> Iterator[Any]:
        yield from real(self, start, min(stop, 3))

    monkeypatch.setattr(TrainingOrder, "batches", some)
    failure = work_on(name, data, tmp_path, backbone, num_workers=0)
    assert "the batches ended at step 3 of" in failure["reason"]


def test_a_loss_that_is_not_finite_is_reported(data, tmp_path, backbone):
    failure = work_on("finetune", data, tmp_path, backbone, base_lr=1e30, warmup_epochs=0)
    assert (
        "not finite" in failure["reason"]
        or "no longer finite" in failure["reason"]
        or "became nan" in failure["reason"]
    )
    assert "lower base_lr (now 1e+30)" in failure["fix"]


def test_logits_that_are_not_finite_give_no_score():
    logits = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [0.0, 1.0]])
    batch = (torch.arange(3), torch.tensor([0, 1, 1]), logits)
    with pytest.raises(UserError, match="loss of 1 of 3 evaluated images is not finite"):
        predict(lambda inputs: inputs, [batch], 3, Progress())


class TestHeadsThatDiverge:
    def test_they_are_reported_and_not_chosen(self, data, tmp_path, backbone):
        outcome = run_protocol(
            "grid", data, tmp_path, backbone, lrs=[100.0, 1e12], pools=[], layers=[1], epochs=30
        )
        diverged = {
            head["head"]: head["diverged"]
            for head in json.loads((tmp_path / "heads.json").read_text())["heads"]
        }
        assert diverged == {"avg-1, base_lr 100": False, "avg-1, base_lr 1e+12": True}
        assert "1 of 2 heads diverged and were not chosen from: avg-1, base_lr 1e+12" in outcome.notes
        assert outcome.notes[0].startswith("avg-1, base_lr 100: the best of 2 heads")

    @pytest.mark.parametrize("changes", [{"base_lr": 1e12}, {"lrs": [1e12, 1e13], "holdout": 0.25}])
    def test_no_score_if_all_diverge(self, data, tmp_path, backbone, changes):
        failure = work_on("probe", data, tmp_path, backbone, eval_epochs=None, epochs=30, **changes)
        assert failure["reason"].startswith("every head diverged")
        assert failure["fix"] == "lower base_lr, or lrs"


def test_one_image_has_no_variance(data, tmp_path, backbone):
    with pytest.raises(UserError, match="device_batch_size 1: the BatchNorm"):
        run_protocol("probe", data, tmp_path / "a", backbone, device_batch_size=1)
    with pytest.raises(UserError, match="a single image before a BatchNorm"):
        run_protocol("probe", data, tmp_path / "b", backbone, global_batch_size=5, device_batch_size=2)


def test_a_cache_that_machines_do_not_share_is_reported(data, tmp_path, backbone, monkeypatch):
    """A rank on another machine does not see the files of the first rank."""
    monkeypatch.setattr(features, "world", lambda: World(1, 2))
    with pytest.raises(UserError, match="is not on this machine"):
        run_protocol("knn", data, tmp_path, backbone)
