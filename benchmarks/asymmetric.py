"""MAE's asymmetric design against an encoder with mask tokens: time of forward and backward pass, FLOPs."""

import argparse
import ctypes
import gc
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Table, Times, interleave, positive_int, ratio, run_main, write_table
from benchmarks.peers import MASK_RATIO, SIZES, TimmMAE, build_ours, vit_spec
from mae_bench.models.cost import training_flops
from mae_bench.models.mae import MAE

# Speed-ups in wall time on TPUs (arXiv 2111.06377, Table 2), by encoder and number of decoder blocks
PAPER = {("large", 8): 2.8, ("large", 1): 3.7, ("huge", 8): 3.5, ("huge", 1): 4.1}
# Ratios of FLOPs (2 x multiply-adds) of the reference's layers at 224 pixels
ANALYTIC = {
    ("small", 8): 1.54,
    ("base", 8): 2.36,
    ("large", 8): 3.23,
    ("huge", 8): 3.60,
    ("base", 1): 3.58,
    ("large", 1): 3.88,
    ("huge", 1): 3.97,
}
MIN_SHARE = 0.9  # of the FLOP ratio that the measured speed-up should reach
ASYMMETRIC, FULL = "asymmetric", "mask tokens in the encoder"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the process keep freed memory (glibc only), so that steps do not pay page faults for all gradients.

    Batches of real training hide these faults; in a tiny batch they would be charged to the design that
    computes less.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)


def run_step(model: MAE, imgs: torch.Tensor, noise: torch.Tensor) -> None:
    """Run a forward and backward pass.

    The optimizer is left out: it does the same work for both designs, and would dominate the time of a tiny
        batch.
    """
    model(imgs, MASK_RATIO, noise, scored_only=True)[0].backward()
    model.zero_grad(set_to_none=True)


def measure(size: str, decoder_depth: int, batch_size: int, repeats: int) -> dict[str, Times]:
    """Return samples of both designs on the same images and noise; they share all blocks to save memory."""
    spec, draw = vit_spec(size), torch.Generator().manual_seed(0)
    imgs = torch.randn(batch_size, spec.in_chans, *spec.img_size, generator=draw)
    noise = torch.rand(batch_size, spec.num_patches, generator=draw)
    models = {
        ASYMMETRIC: build_ours(spec, decoder_depth),
        FULL: build_ours(spec, decoder_depth, encoder_mask_tokens=True),
    }
    models[FULL].encoder = models[ASYMMETRIC].encoder
    models[FULL].decoder_blocks = models[ASYMMETRIC].decoder_blocks
    return interleave(
        {name: partial(run_step, model, imgs, noise) for name, model in models.items()}, repeats
    )


def count_gflops(size: str, decoder_depth: int) -> dict[str, float]:
    """Return GFLOPs of one image's forward and backward pass, for both designs and the reference."""
    spec = vit_spec(size)
    with torch.device("meta"):
        models = {
            ASYMMETRIC: build_ours(spec, decoder_depth),
            FULL: build_ours(spec, decoder_depth, encoder_mask_tokens=True),
        }
        reference = TimmMAE(spec, decoder_depth)
        imgs, noise = torch.empty(1, spec.in_chans, *spec.img_size), torch.empty(1, spec.num_patches)
        with FlopCounterMode(display=False) as counter:
            reference(imgs, noise)
    counted = {name: training_flops(model, MASK_RATIO) / 1e9 for name, model in models.items()}
    return {**counted, "reference": 3 * counter.get_total_flops() / 1e9}


def format_row(size: str, depth: int, samples: dict[str, Times], counted: dict[str, float]) -> list[object]:
    """Return one row of the table."""
    cpu = ratio(samples[FULL].cpu, samples[ASYMMETRIC].cpu)
    wall = ratio(samples[FULL].wall, samples[ASYMMETRIC].wall)
    by_flops = ANALYTIC.get((size, depth))
    share = f"{cpu.median / by_flops:.0%}" if by_flops else "-"
    return [
        f"ViT-{size}, {depth} blocks",
        cpu,
        wall,
        f"{counted[FULL] / counted[ASYMMETRIC]:.2f}",
        by_flops or "-",
        share,
        PAPER.get((size, depth), "-"),
        f"{counted[ASYMMETRIC]:.1f}",
        f"{counted[FULL]:.1f}",
        f"{counted['reference']:.1f}",
        len(samples[FULL].cpu),
    ]


HEADER = [
    "encoder, decoder",
    "speed-up, CPU time",
    "speed-up, wall time",
    "FLOP ratio of ours",
    "FLOP ratio, analytic",
    "share of the analytic",
    "paper, Table 2",
    "GFLOP asymmetric",
    "GFLOP with mask tokens",
    "GFLOP reference",
    "rounds",
]


def main() -> None:
    """Measure each encoder with each decoder and write the table."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows, data = [], {}
    for size in args.sizes:
        for depth in args.decoder_depths:
            samples, counted = measure(size, depth, args.batch_size, args.repeats), count_gflops(size, depth)
            rows.append(format_row(size, depth, samples, counted))
            data[f"{size}-{depth}"] = {"samples": samples, "gflops": counted}
            gc.collect()
    note = (
        f"Forward and backward pass, no optimizer, float32, 224 pixels, batch {args.batch_size}, "
        f"mask ratio {MASK_RATIO}, decoder 512 wide. Ratio of medians [95 % interval over rounds]; target: "
        f"{MIN_SHARE:.0%} of the analytic FLOP ratio. GFLOP: of one image's forward and backward pass; the "
        "reference embeds and predicts every patch. "
        "The paper's figures are wall time on 128 TPU-v3 cores."
    )
    write_table(
        "Asymmetric design against mask tokens in the encoder",
        [Table("Step", HEADER, rows, note)],
        data,
        args.out,
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["large", "huge"])
    parser.add_argument("--decoder-depths", nargs="+", type=positive_int, default=[8, 1])
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, help="below 8, writing gradients takes a visible share"
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed rounds of each pair")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
