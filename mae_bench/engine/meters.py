"""Training speed: images per second, model FLOPs utilisation (MFU), share of time spent waiting for data."""

import re
import time
from collections.abc import Iterator
from typing import Any

import torch

from mae_bench.data.batches.loader import Batch
from mae_bench.engine.distributed import world
from mae_bench.models.cost import peak_memory_mib

TERA = 1e12
# Device name and dense TFLOP/s in bfloat16, float16, float32 (no TF32), from NVIDIA's data sheets
PEAK_TFLOPS = (
    (r"V100-SXM2.*", None, 125, 15.7),  # Tesla V100 data sheet, 2020
    (r"V100-PCIE.*", None, 112, 14),
    (r"T4", None, 65, 8.1),  # T4 data sheet, 2019
    (r"A100.*", 312, 312, 19.5),  # A100 data sheet, 2021
    (r"H100 80GB HBM3", 989.5, 989.5, 67),  # H100 data sheet, 2023: SXM5; half of the figures with sparsity
    (r"H100 PCIe", 756.5, 756.5, 51),
    (r"H200", 989.5, 989.5, 67),  # H200 data sheet, 2024: SXM
    (r"L4", 121, 121, 30.3),  # L4 data sheet, 2023
    (r"A10", 125, 125, 31.2),  # A10 data sheet, 2021
    (r"GeForce RTX 4090", 165.2, 165.2, 82.6),  # Ada architecture paper, 2023: float32 accumulation
)


def peak_flops(device_name: str, amp_dtype: str) -> float | None:
    """Return the peak floating-point operations per second of a device, or None if unknown."""
    if amp_dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32 or less, with another peak
    column = ("bfloat16", "float16", "float32").index(amp_dtype)
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    peaks = [columns[column] for pattern, *columns in PEAK_TFLOPS if re.fullmatch(pattern, name)]
    return peaks[0] * TERA if peaks and peaks[0] is not None else None


class Meters:
    """Seconds and steps of a run, accumulated over resumes.

    `read` returns the values since the previous reading, the properties those of the whole run.

    flops_per_image: of the forward and backward pass of one image; needed for MFU.
    """

    def __init__(
        self, device: torch.device, amp_dtype: str, images_per_step: int, flops_per_image: float | None = None
    ):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, amp_dtype)
        self._device, self._images_per_step = device, images_per_step
        self._flops_share = flops_per_image / peak / world().size if flops_per_image and peak else None
        self.steps, self.seconds, self.wait_seconds = 0, 0.0, 0.0
        self._start_time, self._steps = time.monotonic(), 0
        self._waits: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Start measuring; the time before does not count."""
        self._start_time = time.monotonic()

    def measure_waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches and measure how long the device is idle because it waits for them."""
        while True:
            requested = self._record_time()
            batch = next(batches, None)
            if batch is None:
                return
            self._waits.append((requested, self._record_time()))
            yield batch

    def count_step(self) -> None:
        """Count a completed step."""
        self._steps += 1

    def _record_time(self) -> Any:
        """Return the current time, or on a GPU an event that follows its queued work."""
        if self._device.type != "cuda":
            return time.monotonic()
        event_type: Any = torch.cuda.Event  # untyped in torch
        event = event_type(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the values since the last reading.

        They are images_per_second, data_wait (share of time), mfu (if known) and peak_memory_mib.

        On a GPU this waits for the last batch, so call it where the device is synchronised anyway.
        """
        waited = sum(_seconds_between(*wait) for wait in self._waits)
        now = time.monotonic()
        steps, seconds = self._steps, max(now - self._start_time, 1e-9)
        self.steps += steps
        self.seconds += seconds
        self.wait_seconds += waited
        self._start_time, self._steps = now, 0
        self._waits.clear()
        rate = steps * self._images_per_step / seconds
        mfu = {"mfu": rate * self._flops_share} if self._flops_share else {}
        return {
            "images_per_second": rate,
            "data_wait": waited / seconds,
            **mfu,
            "peak_memory_mib": self.peak_memory_mib,
        }

    @property
    def images_per_second(self) -> float:
        """Images per second of all devices together, data loading included."""
        return self.steps * self._images_per_step / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, or None if the device's peak or the model's FLOPs are unknown."""
        return self.images_per_second * self._flops_share if self._flops_share else None

    @property
    def data_wait_share(self) -> float:
        """Share of time that the device waited for batches."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def peak_memory_mib(self) -> float:
        """Peak of this process so far: device memory on a GPU, resident memory on the CPU."""
        return peak_memory_mib(self._device)

    def state(self) -> dict[str, float]:
        """Return the values from which `resume` continues."""
        return {"steps": self.steps, "seconds": self.seconds, "wait_seconds": self.wait_seconds}

    def resume(self, state: dict[str, float]) -> None:
        """Continue from the values of `state`."""
        self.steps = int(state["steps"])
        self.seconds = state["seconds"]
        self.wait_seconds = state["wait_seconds"]


def _seconds_between(begin: Any, end: Any) -> float:
    """Return the seconds between two results of `_record_time`."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
