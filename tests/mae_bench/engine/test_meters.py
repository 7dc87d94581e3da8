"""Meters: known answers under a simulated clock, and peaks of devices."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy_run import STEPS_PER_EPOCH, Run, signals_restored, train

from mae_bench.data.batches.loader import Batch
from mae_bench.engine.meters import Meters, peak_flops
from mae_bench.errors import Interrupted

RARELY = {"checkpoint_seconds": 1e6}


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr("mae_bench.engine.meters.time.monotonic", lambda: self.now)

    def batches(self, count: int, seconds: float) -> Iterator[Batch]:
        for _ in range(count):
            self.now += seconds
            yield Batch(torch.empty(0), torch.empty(0), torch.empty(0))


def test_rates_are_counts_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meters = Meters(torch.device("cpu"), "float32", images_per_step=64)
    clock.now += 1000
    meters.start()
    for _ in meters.measure_waits(clock.batches(4, seconds=1)):
        clock.now += 3
        meters.count_step()
    first = meters.read()
    assert first["images_per_second"] == pytest.approx(64 / 4)
    assert first["data_wait"] == pytest.approx(1 / 4)
    assert first["peak_memory_mib"] > 1
    assert "mfu" not in first
    assert meters.mfu is None
    for _ in meters.measure_waits(clock.batches(4, seconds=0)):
        clock.now += 1
        meters.count_step()
    assert meters.read()["images_per_second"] == pytest.approx(64), "of the stretch since the last reading"
    assert meters.images_per_second == pytest.approx(8 * 64 / 20), "of the whole"
    assert meters.data_wait_share == pytest.approx(4 / 20)


def test_a_gpu_waits_only_once_it_has_nothing_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    busy_until = 0.0

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = max(clock.now, busy_until)

        def synchronize(self) -> None:
            clock.now = max(clock.now, self.at)

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("mae_bench.engine.meters.peak_memory_mib", lambda device: 1.0)
    meters = Meters(torch.device("cuda"), "float32", images_per_step=1)
    meters.start()
    for _ in meters.measure_waits(clock.batches(4, seconds=3)):
        busy_until = max(clock.now, busy_until) + 2  # the device works on while the next batch is waited for
    clock.now = busy_until
    assert meters.read()["data_wait"] == pytest.approx((3 + 3 * 1) / 14)
    for _ in meters.measure_waits(clock.batches(4, seconds=1)):
        busy_until = max(clock.now, busy_until) + 2
    clock.now = busy_until
    assert meters.read()["data_wait"] == pytest.approx(1 / 9), "the first batch alone"


def test_rates_go_on_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    parts = [Meters(torch.device("cpu"), "float32", 10) for _ in range(2)]
    for meters in parts:
        meters.start()
        for _ in meters.measure_waits(clock.batches(2, seconds=1)):
            clock.now += 1
            meters.count_step()
        meters.read()
        parts[1].resume(json.loads(json.dumps(parts[0].state()))) if meters is parts[0] else None
        clock.now += 500  # between two runs
    assert parts[1].seconds == 8
    assert parts[1].images_per_second == pytest.approx(4 * 10 / 8)


def test_mfu_is_the_products_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("mae_bench.engine.meters.peak_flops", lambda name, amp_dtype: 1e12)
    meters = Meters(torch.device("cpu"), "bfloat16", images_per_step=100, flops_per_image=1e9)
    meters.start()
    for _ in meters.measure_waits(clock.batches(5, seconds=0)):
        clock.now += 1
        meters.count_step()
    assert meters.read()["mfu"] == pytest.approx(0.1)
    assert meters.mfu == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "amp_dtype", "tflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA H100 80GB HBM3", "float16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A10", "bfloat16", 125),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100-SXM2-32GB", "float32", 15.7),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H200 NVL", "bfloat16", None),
        ("", "float32", None),
    ],
)
def test_peaks_are_known_or_absent_never_guessed(name: str, amp_dtype: str, tflops: float | None) -> None:
    assert peak_flops(name, amp_dtype) == (pytest.approx(tflops * 1e12) if tflops else None)


def test_float32_has_no_known_peak_once_it_is_not_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") is None


def test_the_log_has_the_meters_of_each_step_and_the_trainer_those_of_the_run(tmp_path: Path) -> None:
    with signals_restored():
        first = Run(tmp_path, stop_at=4, **RARELY)
        with pytest.raises(Interrupted):
            first.fit()
    trainer = train(tmp_path, **RARELY)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["peak_memory_mib"] > 1
    assert trainer.meters.steps == 3 * STEPS_PER_EPOCH
    assert trainer.seconds > first.trainer.seconds > 0
    assert trainer.images_per_second == pytest.approx(8 * 3 * STEPS_PER_EPOCH / trainer.seconds)
    assert math.isclose(sum(8 / line["images_per_second"] for line in lines), trainer.seconds, rel_tol=1e-6)
