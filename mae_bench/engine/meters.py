"""How fast a run trains: images a second, the share of the device's peak that this makes, the share of time spent waiting."""

import re
import time
from collections.abc import Iterator
from typing import Any

import torch

from mae_bench.data.batches.loader import Batch
from mae_bench.engine.distributed import world
from mae_bench.models.cost import peak_memory_mib

TERA = 1e12
PEAK_TFLOPS = (  # name of the device, TFLOP/s of dense products in bfloat16, float16, float32 (no TF32); NVIDIA's data sheets
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
    """The floating-point operations a second that a device can do at most; None where no source says."""
    if amp_dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32 or less: another peak
    column = ("bfloat16", "float16", "float32").index(amp_dtype)
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    peaks = [columns[column] for pattern, *columns in PEAK_TFLOPS if re.fullmatch(pattern, name)]
    return peaks[0] * TERA if peaks and peaks[0] is not None else None


class Meters:
    """Seconds and steps of a run, over its resumes; `read` closes a stretch and tells of it, the properties tell of the whole.

    flops_per_image: of the forward and backward pass of one image, for MFU; without them it stays unknown.
    """

    def __init__(
        self, device: torch.device, amp_dtype: str, images_per_step: int, flops_per_image: float | None = None
    ):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, amp_dtype)
        self._device, self._images_per_step = device, images_per_step
        self._flops_share = flops_per_image / peak / world().size if flops_per_image and peak else None
        self.steps, self.seconds, self.wait_seconds = 0, 0.0, 0.0
        self._began, self._steps = time.monotonic(), 0
        self._waits: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Training begins now: what came before does not count."""
        self._began = time.monotonic()

    def waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes the batches on and measures how long the device has nothing to do for the want of them."""
        while True:
            asked = self._mark()
            batch = next(batches, None)
            if batch is None:
                return
            self._waits.append((asked, self._mark()))
            yield batch

    def count_step(self) -> None:
        """A step is done."""
        self._steps += 1

    def _mark(self) -> Any:
        """Now; on a GPU once it has done what it was given so far: it is behind this process, and works while this one waits."""
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """images_per_second, data_wait (share of the time), mfu where it is known, peak_memory_mib; since the last reading.

        On a GPU it waits for the last batch's arrival there, so it is called where the device was waited for anyway.
        """
        waited = sum(_seconds_between(*wait) for wait in self._waits)
        now = time.monotonic()
        steps, seconds = self._steps, max(now - self._began, 1e-9)
        self.steps, self.seconds, self.wait_seconds = (
            self.steps + steps,
            self.seconds + seconds,
            self.wait_seconds + waited,
        )
        self._began, self._steps = now, 0
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
        """Trained images a second on all devices together, loading included."""
        return self.steps * self._images_per_step / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Share of the devices' peak that went into the model's own products; None where the peak or the products are unknown."""
        return self.images_per_second * self._flops_share if self._flops_share else None

    @property
    def data_wait_share(self) -> float:
        """Share of the time in which the device waited for batches."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def peak_memory_mib(self) -> float:
        """Of this process so far: device memory on a GPU, resident memory on the CPU."""
        return peak_memory_mib(self._device)

    def state(self) -> dict[str, float]:
        """What a resumed run goes on from."""
        return {"steps": self.steps, "seconds": self.seconds, "wait_seconds": self.wait_seconds}

    def resume(self, state: dict[str, float]) -> None:
        """Takes up what `state` gave."""
        self.steps, self.seconds, self.wait_seconds = (
            int(state["steps"]),
            state["seconds"],
            state["wait_seconds"],
        )


def _seconds_between(begin: Any, end: Any) -> float:
    """Of two marks."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
