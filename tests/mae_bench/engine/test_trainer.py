"""The training loop: exact resume, accumulation, schedules, EMA, and what happens at a non-finite loss."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mae_bench.config import TrainConfig
from mae_bench.data.images import BadImages
from mae_bench.data.loader import Batch
from mae_bench.engine.optim import finetune_no_decay, make_adamw, param_groups, pretrain_no_decay
from mae_bench.engine.schedule import absolute_lr, cosine_lr
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import Interrupted, UserError
from mae_bench.job import Job
from mae_bench.progress import Progress

CONFIG = {
    "kind": "test",
    "protocol": "test",
    "data": "",
    "epochs": 3,
    "warmup_epochs": 1,
    "base_lr": 0.32,
    "global_batch_size": 8,
    "checkpoint_seconds": 0,
}
STEPS_PER_EPOCH = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def batches(start: int, stop: int) -> Iterator[Batch]:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        yield Batch(torch.randn(8, 6, generator=generator), torch.arange(8) % 3, torch.arange(8))


def train(folder: Path, stop_at: int | None = None, poison: int | None = None, **changes: object) -> Trainer:
    """Trains Net; at step `stop_at` the process is sent SIGTERM, at step `poison` the loss becomes NaN."""
    folder.mkdir(exist_ok=True)
    config = TrainConfig(**{**CONFIG, **changes})  # type: ignore[arg-type]
    model = Net()
    progress = Progress()
    progress.stop_on_signals()
    job = Job("test", "test", {}, folder, seed=5)
    optimizer = make_adamw(config, pretrain_no_decay)
    trainer = Trainer(job, config, model, optimizer, STEPS_PER_EPOCH, progress, BadImages(0.1, 100), ema_decay=0.9)

    def loss_of(model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return F.cross_entropy(model(batch.imgs), batch.targets) * (float("nan") if step == poison else 1.0)

    trainer.fit(batches, loss_of)
    return trainer


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def plain_loss(model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
    return F.cross_entropy(model(batch.imgs), batch.targets)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.ema is not None
    return {**trainer.model.state_dict(), **{f"ema.{name}": tensor for name, tensor in trainer.ema.weights.items()}}


@pytest.mark.parametrize("stop_at", [0, 3, 6, 10])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop_at=stop_at)
    resumed = train(tmp_path / "parts")
    assert resumed.step == whole.step == 12
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(12)), "each step is in the log once"


def test_two_runs_of_one_seed_are_equal(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nan at step 7"):
        train(tmp_path, poison=7)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 7, "seven steps were good"
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert train(tmp_path).step == 12, "without the cause it goes on from there"


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    results = []
    for device_batch_size in (None, 3):  # 8 images in parts of 3, 3, 2: each image weighs the same
        torch.manual_seed(0)
        model = Plain()
        folder = tmp_path / str(device_batch_size)
        folder.mkdir()
        config = TrainConfig(**{**CONFIG, "device_batch_size": device_batch_size})  # type: ignore[arg-type]
        trainer = Trainer(Job("t", "t", {}, folder, 0), config, model, sgd, STEPS_PER_EPOCH, Progress(), BadImages(0.1, 100))
        trainer.fit(batches, plain_loss)
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_state_of_another_architecture_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["model"]["body.0.weight"] = torch.zeros(5, 5)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UserError, match="another architecture"):
        train(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_damaged_state_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(damage)
    with pytest.raises(UserError, match="cannot be read"):
        train(tmp_path)


def test_full_disk_leaves_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path)
    before = (tmp_path / "state.pt").read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mae_bench.engine.state.torch.save", full)
    with pytest.raises(UserError, match="No space left"):
        train(tmp_path, epochs=4)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_schedule_known_answers() -> None:
    shape = {"lr": 2.0, "min_lr": 0.5, "warmup_epochs": 2, "epochs": 10}
    assert [cosine_lr(e, **shape) for e in (0, 0.5, 1, 2, 6, 10, 12)] == pytest.approx([0, 0.5, 1, 2, 1.25, 0.5, 0.5])
    assert absolute_lr(1.5e-4, 4096) == pytest.approx(2.4e-3), "the paper's pretraining"
    assert absolute_lr(0.1, 16384) == pytest.approx(6.4), "the paper's linear probe"


def test_lr_scale_multiplies_the_groups_lr(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    trainer.optimizer.param_groups[0]["lr_scale"] = 0.1
    trainer.step = 6
    trainer._train_step(next(batches(6, 7)), lambda model, batch, step: model(batch.imgs).sum())
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates[0] == pytest.approx(0.1 * trainer.lr_at(6))
    assert rates[1] == pytest.approx(trainer.lr_at(6))


def test_weight_decay_rules_of_the_reference() -> None:
    matrix, vector, token = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1, 2))
    assert not pretrain_no_decay("cls_token", token), "pretraining decays the class and mask tokens"
    assert not pretrain_no_decay("mask_token", token)
    assert finetune_no_decay("vit.cls_token", token), "fine-tuning does not"
    assert finetune_no_decay("vit.pos_embed", token)
    for rule in (pretrain_no_decay, finetune_no_decay):
        assert rule("blocks.0.norm1.weight", vector)
        assert rule("head.bias", vector)
        assert not rule("head.weight", matrix)


def test_frozen_parameters_are_in_no_group() -> None:
    model = Net()
    model.body[0].requires_grad_(False)
    groups = param_groups(model.named_parameters(), 0.05, pretrain_no_decay)
    assert sum(len(group["params"]) for group in groups) == 4
