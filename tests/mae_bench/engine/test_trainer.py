"""Trainer in one process: exact resume, accumulation, schedules, EMA, hooks, non-finite losses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy_run import CONFIG, NUM_IMAGES, STEPS_PER_EPOCH, Net, Run, pixels, signals_restored, train, weights

from mae_bench.data.batches.loader import Batch, draw_epoch_order
from mae_bench.engine.ema import Ema
from mae_bench.engine.optim import build_param_groups, finetune_no_decay, pretrain_no_decay
from mae_bench.engine.schedule import absolute_lr, cosine_lr
from mae_bench.errors import Interrupted, UserError
from tests.parity import assert_parity

RARELY = {"checkpoint_seconds": 1e6}
TOTAL = 3 * STEPS_PER_EPOCH


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "step"), [("stop_at", 0), ("stop_at", 3), ("stop_at", 11), ("crash_at", 0), ("crash_at", 6)]
)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, fault: str, step: int
) -> None:
    often = RARELY if fault == "stop_at" else {}
    whole = train(tmp_path / "whole", statistics=True, **RARELY)
    with pytest.raises((Interrupted, RuntimeError)):
        train(tmp_path / "parts", statistics=True, **{fault: step}, **often)
    resumed = train(tmp_path / "parts", statistics=True, **RARELY)
    assert resumed.step == whole.step == TOTAL
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    one, other = log(tmp_path / "whole"), log(tmp_path / "parts")
    assert [line["step"] for line in other] == list(range(TOTAL)), "each step is in the log once"
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert resumed.final_loss == whole.final_loss


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_mixed_precision_resumes_bit_for_bit(tmp_path: Path, amp_dtype: str) -> None:
    whole = train(tmp_path / "whole", amp_dtype=amp_dtype, clip_grad=0.5, **RARELY)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", amp_dtype=amp_dtype, clip_grad=0.5, stop_at=5, **RARELY)
    resumed = train(tmp_path / "parts", amp_dtype=amp_dtype, clip_grad=0.5, **RARELY)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path, **RARELY)
    with signals_restored():
        run = Run(tmp_path, **RARELY)
        run.fit()
    assert run.seen == []
    assert all(torch.equal(tensor, weights(run.trainer)[name]) for name, tensor in weights(first).items())


def test_two_runs_of_one_seed_are_equal(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a", **RARELY), train(tmp_path / "b", **RARELY)
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nan at step 7"):
        train(tmp_path, poison=7)
    states = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert states[-1].name == "step-00000007", "seven steps were good"
    trainer = train(tmp_path, **RARELY)
    assert trainer.step == TOTAL, "without the cause it goes on from there"
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with signals_restored():
        run = Run(tmp_path, epochs=1, **RARELY)

        def breaks(model: nn.Module, step: int) -> None:
            nn.init.constant_(run.trainer.model.stem.bias, float("inf"))

        run.trainer.every_epochs(1, breaks)
        with pytest.raises(UserError, match="weights are no longer finite after step 3"):
            run.fit()
    assert not list(tmp_path.glob("checkpoints/step-*"))


@pytest.mark.parametrize(("device_batch_size", "in_parts"), [(None, False), (3, False), (3, True), (1, True)])
def test_accumulation_equals_plain_training_on_the_whole_batch(
    tmp_path: Path, device_batch_size: int | None, in_parts: bool
) -> None:
    """Against a plain loop: order, schedule, loss, clipping and AdamW by torch's own functions."""
    trainer = train(
        tmp_path,
        dropout=0.0,
        clip_grad=0.5,
        device_batch_size=device_batch_size,
        in_parts=in_parts,
        dtype="float64",
        **RARELY,
    )
    model = Net().double()
    optimizer = torch.optim.AdamW(
        build_param_groups(model.named_parameters(), 0.05, pretrain_no_decay), betas=(0.9, 0.999)
    )
    for step in range(TOTAL):
        epoch, place = divmod(step, STEPS_PER_EPOCH)
        batch = draw_epoch_order(NUM_IMAGES, 5, epoch)[8 * place : 8 * place + 8]
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step / STEPS_PER_EPOCH, lr=0.01, min_lr=0, warmup_epochs=1, epochs=3)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels(batch).double()), batch % 3)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        line = log(tmp_path)[step]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)  # written with six digits
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)  # written with four digits
        assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
    for (name, tensor), other in zip(
        trainer.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert_parity(tensor, other, msg=name)


def test_a_norm_that_overflowed_is_no_number_of_the_log(tmp_path: Path) -> None:
    train(tmp_path, amp_dtype="float16", clip_grad=0.5, overflow=5, on=0, **RARELY)
    lines = log(tmp_path)
    assert [line["step"] for line in lines if "grad_norm" not in line] == [5]
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text(), "which JSON does not have"


@pytest.mark.parametrize("in_parts", [False, True])
def test_every_step_has_a_whole_batch_to_the_end_of_the_epoch(tmp_path: Path, in_parts: bool) -> None:
    """The reference drops the gradients of micro-batches that remain when an epoch ends."""
    with signals_restored():
        run = Run(tmp_path, device_batch_size=3, in_parts=in_parts, **RARELY)
        run.fit()
    sizes = [[len(indices) for s, _, indices in run.seen if s == step] for step in range(TOTAL)]
    assert sizes == [[3, 3, 2]] * TOTAL
    starts = [start for s, start, _ in run.seen if s == 0]
    assert starts == [0, 3, 6]


def test_ema_equals_torchs(tmp_path: Path) -> None:
    model = Net(statistics=True).double()
    ours, torchs = (
        Ema(model, 0.9),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            model(torch.randn(8, 6).double())
        ours.update(model, step)
        torchs.update_parameters(model)
    for name, tensor in torchs.module.state_dict().items():
        if tensor.is_floating_point():
            assert_parity(ours.weights[name], tensor)
    assert ours.weights["norm.num_batches_tracked"] == 5


def test_full_model_has_the_averaged_weights_and_is_not_the_trained_one(tmp_path: Path) -> None:
    trainer = train(tmp_path, statistics=True, **RARELY)
    assert trainer.ema is not None
    full = trainer.full_model()
    assert full.state_dict().keys() == trainer.model.state_dict().keys()
    assert all(torch.equal(tensor, trainer.ema.weights[name]) for name, tensor in full.state_dict().items())
    assert not torch.equal(full.state_dict()["head.weight"], trainer.model.state_dict()["head.weight"])
    full.eval()(torch.randn(2, 6))
    assert all(p.requires_grad for p in full.parameters())


@pytest.mark.parametrize("epochs", [0.5, 0.75, 1])
def test_hooks_run_at_the_same_steps_after_a_resume(tmp_path: Path, epochs: float) -> None:
    with signals_restored():
        whole, first = (
            Run(tmp_path / "whole", hook_epochs=epochs, **RARELY),
            Run(tmp_path / "parts", hook_epochs=epochs, stop_at=4, **RARELY),
        )
        whole.fit()
        with pytest.raises(Interrupted):
            first.fit()
        second = Run(tmp_path / "parts", hook_epochs=epochs, **RARELY)
        second.fit()
    assert whole.hooked == [round(n * epochs * STEPS_PER_EPOCH) for n in range(1, int(3 / epochs) + 1)]
    assert first.hooked + second.hooked == whole.hooked


def test_a_hook_leaves_training_as_it_was(tmp_path: Path) -> None:
    with signals_restored():
        run = Run(tmp_path / "hooked", ema=False, **RARELY)
        run.trainer.every_epochs(0.25, lambda model, step: (model.eval(), torch.rand(7)))
        hooked = run.fit()
    plain = train(tmp_path / "plain", ema=False, **RARELY)
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(hooked).items())


def test_what_hooks_take_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by 1 s per step and 1000 s per hook."""
    now = [0.0]
    with signals_restored():
        run = Run(tmp_path, **RARELY)
        monkeypatch.setattr("mae_bench.engine.meters.time", SimpleNamespace(monotonic=lambda: now[0]))

        def slow(model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
            now[0] += 1
            return run.loss(model, batch, step)

        def evaluate(model: nn.Module, step: int) -> None:
            now[0] += 1000

        run.trainer.every_epochs(1, evaluate)
        run.trainer.fit(run.batches, slow)
    assert now[0] == TOTAL + 3 * 1000
    assert run.trainer.seconds == TOTAL
    assert run.trainer.images_per_second == 8


def test_batches_that_end_early_are_no_end_of_training(tmp_path: Path) -> None:
    with signals_restored():
        run = Run(tmp_path, **RARELY)
        with pytest.raises(RuntimeError, match=f"ended at step 5 of {TOTAL}"):
            run.trainer.fit(lambda start, stop: run.batches(start, 5), run.loss)


def test_out_of_memory_names_the_micro_batch_and_its_half(tmp_path: Path) -> None:
    def full(model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with signals_restored():
        run = Run(tmp_path, device_batch_size=4)
        with pytest.raises(UserError, match="4 images at once") as error:
            run.trainer.fit(run.batches, full)
    assert "device_batch_size=2" in error.value.fix


def test_the_effective_batch_is_told_once(tmp_path: Path) -> None:
    train(tmp_path, device_batch_size=4, **RARELY)
    notes = [line for line in (tmp_path / "events.jsonl").read_text().splitlines() if "global batch" in line]
    assert len(notes) == 1
    assert "global batch 8 = 1 device x 4 images x 2 accumulated" in notes[0]


@pytest.mark.parametrize("compiles", [True, False, None])
def test_compiled_training_is_the_same_and_keeps_the_names(
    tmp_path: Path, compiles: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    real = torch.compile

    def eager(model: nn.Module) -> Any:
        compiled.append(model)
        return real(model, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    trainer = train(tmp_path / "compiled", dropout=0.0, compile=compiles, dtype="float64", **RARELY)
    assert bool(compiled) == (compiles is True), "null compiles on CUDA alone"
    plain = train(tmp_path / "plain", dropout=0.0, compile=False, dtype="float64", **RARELY)
    for name, tensor in weights(plain).items():
        assert_parity(weights(trainer)[name], tensor)
    assert trainer._tensors().keys() == plain._tensors().keys()
    assert not any("_orig_mod" in name or "module." in name for name in trainer._tensors())


def test_the_determinism_switch_holds_in_training_and_not_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def loss(model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        import os

        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return F.cross_entropy(model(batch.imgs), batch.targets)

    for switch in (True, False):
        with signals_restored():
            run = Run(tmp_path / str(switch), deterministic=switch, epochs=1, **RARELY)
            run.trainer.fit(run.batches, loss)
    assert seen == [(True, ":4096:8")] * STEPS_PER_EPOCH + [(False, None)] * STEPS_PER_EPOCH


def test_schedule_known_answers() -> None:
    shape = {"lr": 2.0, "min_lr": 0.5, "warmup_epochs": 2, "epochs": 10}
    assert [cosine_lr(e, **shape) for e in (0, 0.5, 1, 2, 6, 10, 12)] == pytest.approx(
        [0, 0.5, 1, 2, 1.25, 0.5, 0.5]
    )
    assert absolute_lr(1.5e-4, 4096) == pytest.approx(2.4e-3), "the paper's pretraining"
    assert absolute_lr(0.1, 16384) == pytest.approx(6.4), "the paper's linear probe"


def test_the_learning_rate_follows_the_fractional_epoch_of_each_step(tmp_path: Path) -> None:
    train(tmp_path, device_batch_size=2, **RARELY)
    rates = [line["lr"] for line in log(tmp_path)]
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01]), (
        "linear over the steps of the first epoch"
    )
    assert rates == pytest.approx(
        [cosine_lr(s / 4, lr=0.01, min_lr=0, warmup_epochs=1, epochs=3) for s in range(TOTAL)]
    )
    assert CONFIG["base_lr"] == 0.32, "x 8 / 256"


def test_lr_scale_multiplies_the_groups_lr(tmp_path: Path) -> None:
    with signals_restored():
        run = Run(tmp_path, epochs=2, **RARELY)
        run.trainer.optimizer.param_groups[0]["lr_scale"] = 0.1
        trainer = run.fit()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.1 * trainer.lr_at(7), trainer.lr_at(7)])


def test_weight_decay_rules_of_the_reference() -> None:
    matrix, vector, token = (
        nn.Parameter(torch.zeros(2, 2)),
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1, 1, 2)),
    )
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
    model.stem.requires_grad_(False)
    groups = build_param_groups(model.named_parameters(), 0.05, pretrain_no_decay)
    assert sum(len(group["params"]) for group in groups) == 6
