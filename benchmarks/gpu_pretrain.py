"""Pretraining on a GPU: throughput, MFU and memory of our trainer against a reference-style loop."""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Table, find_device, positive_int, run_main, write_table
from benchmarks.peers import MASK_RATIO, TimmMAE, decoder_depth_of, vit_spec
from mae_bench.data.batches.loader import Batch, TrainingOrder, load_training_batches
from mae_bench.data.pack import pack_set
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImages
from mae_bench.engine.meters import peak_flops
from mae_bench.engine.optim import adamw_builder, pretrain_no_decay
from mae_bench.engine.trainer import BatchesExhausted, Trainer
from mae_bench.job import Job
from mae_bench.models.cost import training_flops
from mae_bench.pretrain.config import PretrainConfig
from mae_bench.pretrain.job import PretrainLoss, build_mae, build_transform
from mae_bench.progress import Progress

BATCHES = {"toy": 4, "base": 1024, "large": 512, "huge": 256}
TARGETS = {"base": 5700, "large": 3200, "huge": 1450}  # images per second on an H200
MIN_RATIO = 1.8  # target: times the rate of the reference-style loop
MIN_SHARE = 0.9  # target: share of the synthetic rate when reading a packed set
OURS = "ours"
WARMUP, STEPS = 5, 30
NEVER = 10**9
PHOTO = (256, 341)  # height and width: ImageNet's mean aspect at short side 256


@dataclass(frozen=True)
class Rate:
    """Throughput after the warm-up and memory (nan on the CPU).

    peak_gib: peak memory of the device.
    mib_per_image: memory of the step itself, without model and optimizer.
    """

    images_per_second: float
    peak_gib: float
    mib_per_image: float
    warmup_seconds: float


class Stopwatch:
    """Yields batches and times the steps that use them, without the warm-up, with a synchronised device."""

    def __init__(self, device: torch.device, warmup: int, steps: int):
        self.device, self.warmup, self.steps = device, warmup, steps
        self.start_time = self.end_time = self.created = time.perf_counter()

    def measure(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the first warmup + steps batches."""
        for number in range(self.warmup + self.steps):
            if number == self.warmup:
                self.start_time = self._now()
            yield next(batches)
        self.end_time = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rate(self, batch_size: int) -> Rate:
        """Return what was measured. Call it while the model and its optimizer still exist."""
        speed = self.steps * batch_size / (self.end_time - self.start_time)
        if self.device.type != "cuda":
            return Rate(speed, float("nan"), float("nan"), self.start_time - self.created)
        peak, rest = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return Rate(speed, peak / 2**30, (peak - rest) / 2**20 / batch_size, self.start_time - self.created)


@dataclass(frozen=True)
class Bench:
    """Device, length and folder of the measurements."""

    device: torch.device
    warmup: int
    steps: int
    folder: Path

    def start_watch(self) -> Stopwatch:
        """Free the device's memory and return a stopwatch that starts now."""
        torch.compiler.reset()  # compiled code may keep the last model alive
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return Stopwatch(self.device, self.warmup, self.steps)


def build_config(size: str, batch_size: int, data: str = "none", num_workers: int = 0) -> PretrainConfig:
    """Build the config of the published pretraining (Table 8), in bfloat16; compiled on a GPU."""
    spec = vit_spec(size)
    shape = {key: getattr(spec, key) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    values = {
        "kind": "pretrain",
        "protocol": "benchmark",
        "data": data,
        "model": shape,
        "mask_ratio": MASK_RATIO,
        "decoder_depth": decoder_depth_of(size),
        "epochs": 1000,
        "base_lr": 1e-5,
        "global_batch_size": batch_size,
        "betas": (0.9, 0.95),
        "amp_dtype": "bfloat16",
        "checkpoint_seconds": NEVER,
        "num_workers": num_workers,
    }
    return PretrainConfig.model_validate(values)


def measure_ours(
    bench: Bench, size: str, batch_size: int, data: Path | None = None, num_workers: int = 0
) -> Rate:
    """Measure our Trainer on uint8 images on the device, or on a packed set read by workers."""
    watch, config = bench.start_watch(), build_config(size, batch_size, str(data), num_workers)
    spec = vit_spec(size)
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    job = Job("benchmark", "pretrain", config.model_dump(), folder, seed=0, device=bench.device.type)
    model = build_mae(config, spec).to(bench.device)
    trainer = Trainer(
        job, config, model, adamw_builder(config, pretrain_no_decay), NEVER, Progress(), BadImages(0.0, 1)
    )
    feed: Callable[[int, int], Iterator[Batch]] = partial(repeat_synthetic, bench.device, size, batch_size)
    if data:
        images = open_images(data, "train")
        order = TrainingOrder(len(images), batch_size, 0, 0, 1)
        feed = partial(
            load_training_batches, images, build_transform(config, spec), order, num_workers=num_workers
        )
    stop = bench.warmup + bench.steps
    with suppress(BatchesExhausted):  # the watch stops long before the training would end
        trainer.fit(lambda first, last: watch.measure(feed(0, stop + 1)), PretrainLoss(config, spec, job))
    return watch.rate(batch_size)


def repeat_synthetic(
    device: torch.device, size: str, batch_size: int, start: int, stop: int
) -> Iterator[Batch]:
    """Yield the same uint8 images on the device at every step, channels last in memory like the loader's."""
    spec = vit_spec(size)
    imgs = torch.randint(
        0, 256, (batch_size, *spec.img_size, spec.in_chans), dtype=torch.uint8, device=device
    )
    imgs = imgs.permute(0, 3, 1, 2)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    for _ in range(start, stop):
        yield Batch(imgs, labels, labels)


def measure_reference_style(bench: Bench, size: str, batch_size: int, fused_attention: bool) -> Rate:
    """Measure an eager loop like the reference's.

    It uses float16 with a GradScaler, and loss.item() and a device synchronisation at every step.

    fused_attention: use that of current timm; else the reference's product, softmax, product.
    """
    watch, spec = bench.start_watch(), vit_spec(size)
    model = TimmMAE(spec, decoder_depth_of(size)).to(bench.device).train()
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attention
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05)
    on_gpu = bench.device.type == "cuda"
    scaler = torch.amp.GradScaler(bench.device.type, enabled=on_gpu)
    for batch in watch.measure(
        repeat_synthetic(bench.device, size, batch_size, 0, bench.warmup + bench.steps + 1)
    ):
        imgs = (batch.imgs.float() / 255 - 0.45) / 0.225
        noise = torch.rand(batch_size, spec.num_patches, device=bench.device)
        with torch.autocast(bench.device.type, torch.float16 if on_gpu else torch.bfloat16):
            loss = model(imgs, noise)
        loss.item()
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
    return watch.rate(batch_size)


def make_packed_set(folder: Path, count: int, num_workers: int) -> Path:
    """Write a packed set of JPEGs (q95) of smooth noise, which decode like photographs of equal size."""
    draw = np.random.default_rng(0)
    files = folder / "files" / "train" / "all"
    files.mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PHOTO[::-1], Image.Resampling.BICUBIC))
        pixels = smooth + draw.normal(0, 6, (*PHOTO, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files / f"{number:05}.jpg", quality=95)
    pack_set(folder / "files", folder / "packed", num_workers=num_workers)
    return folder / "packed"


class Results:
    """Collects rates and prints each at once, so that an aborted run leaves what it measured."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.start_time = args, device, time.monotonic()
        self.rates: dict[tuple[str, str], Rate] = {}
        self.failures: dict[tuple[str, str], str] = {}

    def measure(self, size: str, what: str, call: Callable[[], Rate]) -> None:
        """Run one measurement. An error becomes a cell of the table, and the others go ahead."""
        if time.monotonic() - self.start_time > self.args.seconds:
            self.failures[size, what] = "skipped: no time"
            return
        try:
            self.rates[size, what] = call()
        except Exception as error:  # of any kind: GPU time is short, and the next measurement may work
            self.failures[size, what] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        print(size, what, self.rates.get((size, what)) or self.failures[size, what], flush=True)

    def write(self) -> None:
        """Write the table."""
        header = [
            "model",
            "what",
            "batch",
            "img/s",
            "target",
            "MFU",
            "ours relative to it",
            "peak GiB",
            "MiB per image",
            "warm-up s",
        ]
        rows = [self._format_row(size, what) for size, what in (*self.rates, *self.failures)]
        note = (
            f"One device, mask ratio {MASK_RATIO}, decoder 512 wide, 8 deep; {self.args.steps} steps after "
            f"{self.args.warmup}. Ours: bfloat16 (compiled on a GPU), uint8 images on the device. Targets: "
            f"{MIN_RATIO}x the reference-style loop, and {MIN_SHARE:.0%} of the synthetic rate from a packed "
            "set. MFU counts the operations of our model."
        )
        data = {f"{size}, {what}": vars(rate) for (size, what), rate in self.rates.items()}
        write_table(
            "Pretraining on one device", [Table("Throughput", header, rows, note)], data, self.args.out
        )

    def _format_row(self, size: str, what: str) -> list[object]:
        rate = self.rates.get((size, what))
        if rate is None:
            return [size, what, "-", self.failures[size, what], *["-"] * 6]
        relative, ours = "-", self.rates.get((size, OURS))
        if ours and what != OURS:
            quotient = rate.images_per_second / ours.images_per_second
            relative = f"{quotient:.0%} of synthetic" if what.startswith(OURS) else f"{1 / quotient:.2f}x"
        return [
            size,
            what,
            self.args.batch_size or BATCHES[size],
            f"{rate.images_per_second:.0f}",
            TARGETS.get(size, "-") if what == OURS else "-",
            self._format_mfu(size, what, rate),
            relative,
            f"{rate.peak_gib:.1f}",
            f"{rate.mib_per_image:.1f}",
            f"{rate.warmup_seconds:.0f}",
        ]

    def _format_mfu(self, size: str, what: str, rate: Rate) -> str:
        peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if self.device.type == "cuda" else None
        if not peak or not what.startswith(OURS):
            return "-"
        with torch.device("meta"):
            model = build_mae(build_config(size, 1), vit_spec(size))
        return f"{rate.images_per_second * training_flops(model, MASK_RATIO) / peak:.1%}"


def main() -> None:
    """Measure every size on synthetic images, then one from a packed set."""
    args = _parse_arguments()
    device = torch.device(args.device)
    results = Results(args, device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, args.warmup, args.steps, Path(folder))
        for size in args.sizes:
            batch_size = args.batch_size or BATCHES[size]
            results.measure(size, OURS, partial(measure_ours, bench, size, batch_size))
            for name, fused in (("reference-style loop", False), ("reference-style loop, SDPA", True)):
                results.measure(size, name, partial(measure_reference_style, bench, size, batch_size, fused))
        size = "large" if "large" in args.sizes else args.sizes[0]
        fed = partial(_measure_packed, bench, size, args)
        results.measure(size, f"{OURS}, packed set, {args.workers} workers", fed)
    results.write()


def _measure_packed(bench: Bench, size: str, args: argparse.Namespace) -> Rate:
    batch_size = args.batch_size or BATCHES[size]
    data = args.packed or make_packed_set(bench.folder, 4 * batch_size, args.workers)
    return measure_ours(bench, size, batch_size, data, args.workers)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=find_device, default="cuda", help="cuda or cpu")
    parser.add_argument("--sizes", nargs="+", choices=BATCHES, default=["base", "large", "huge"])
    parser.add_argument("--batch-size", type=positive_int, help="for all sizes; by default each has its own")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="loader processes for the packed set"
    )
    parser.add_argument(
        "--packed", type=Path, help="a packed set with a split train; by default one is made of noise"
    )
    parser.add_argument("--steps", type=positive_int, default=STEPS)
    parser.add_argument("--warmup", type=positive_int, default=WARMUP)
    parser.add_argument("--seconds", type=float, default=420, help="start no measurement after this time")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy model and three steps, to check that everything runs"
    )
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    args = parser.parse_args()
    if args.packed and not args.packed.exists():
        parser.error(f"--packed {args.packed} does not exist")
    if args.workers < 0:
        parser.error(f"--workers {args.workers} is negative")
    if args.tiny:
        args.sizes, args.steps, args.warmup, args.workers = ["toy"], 2, 1, 0
    return args


if __name__ == "__main__":
    run_main(main)
