"""The asymmetric design against an encoder that sees mask tokens: forward and backward pass, in turns, beside the FLOP ratio."""

import argparse
import ctypes
import gc
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Table, Times, interleave, ratio, write_table
from benchmarks.peers import MASK_RATIO, SIZES, TimmMAE, build_ours, vit_spec
from mae_bench.models.cost import training_flops
from mae_bench.models.mae import MAE

PAPER = {
    ("large", 8): 2.8,
    ("large", 1): 3.7,
    ("huge", 8): 3.5,
    ("huge", 1): 4.1,
}  # arXiv 2111.06377, Table 2: wall time, TPUs
ANALYTIC = {("small", 8): 1.54, ("base", 8): 2.36, ("large", 8): 3.23, ("huge", 8): 3.60,
            ("base", 1): 3.58, ("large", 1): 3.88, ("huge", 1): 3.97}  # fmt: skip  # 2 x MAC, reference's layers, 224 pixels
LEAST_SHARE = 0.9  # of the FLOP ratio, to be reached
ASYMMETRIC, FULL = "asymmetric", "mask tokens in the encoder"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Freed memory stays with the process (glibc): else every step of a tiny batch pays the page faults of all its gradients.

    A batch of real training hides them, so they would be charged to the design that computes less. Does nothing elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)


def step(model: MAE, imgs: torch.Tensor, noise: torch.Tensor) -> None:
    """Forward and backward pass. The optimizer is left out: it does the same for both, and at a tiny batch it would be most of
    the time."""
    model(imgs, MASK_RATIO, noise, scored_only=True)[0].backward()
    model.zero_grad(set_to_none=True)


def measure(size: str, decoder_depth: int, batch_size: int, repeats: int) -> dict[str, Times]:
    """Samples of both designs on the same images and noise; they share the weights of all blocks, to spare memory."""
    spec, draw = vit_spec(size), torch.Generator().manual_seed(0)
    imgs = torch.randn(batch_size, spec.in_chans, *spec.img_size, generator=draw)
    noise = torch.rand(batch_size, spec.num_patches, generator=draw)
    models = {
        ASYMMETRIC: build_ours(spec, decoder_depth),
        FULL: build_ours(spec, decoder_depth, encoder_mask_tokens=True),
    }
    models[FULL].encoder, models[FULL].decoder_blocks = (
        models[ASYMMETRIC].encoder,
        models[ASYMMETRIC].decoder_blocks,
    )
    return interleave({name: partial(step, model, imgs, noise) for name, model in models.items()}, repeats)


def gflops(size: str, decoder_depth: int) -> dict[str, float]:
    """GFLOPs of one image's forward and backward pass, counted by torch on the meta device: ours twice, and the reference's."""
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


def row_of(size: str, depth: int, samples: dict[str, Times], counted: dict[str, float]) -> list[object]:
    """One line of the table."""
    cpu, wall = (
        ratio(getattr(samples[FULL], clock), getattr(samples[ASYMMETRIC], clock)) for clock in ("cpu", "wall")
    )
    by_flops = ANALYTIC.get((size, depth))
    share = f"{cpu.median / by_flops:.0%}" if by_flops else "-"
    return [
        f"ViT-{size}, {depth} blocks", cpu, wall, f"{counted[FULL] / counted[ASYMMETRIC]:.2f}", by_flops or "-", share,
        PAPER.get((size, depth), "-"), f"{counted[ASYMMETRIC]:.1f}", f"{counted[FULL]:.1f}", f"{counted['reference']:.1f}",
        len(samples[FULL].cpu),
    ]  # fmt: skip


HEADER = ["encoder, decoder", "speed-up, CPU time", "speed-up, wall time", "FLOP ratio of ours", "FLOP ratio, analytic",
          "share of the analytic", "paper, Table 2", "GFLOP asymmetric", "GFLOP with mask tokens", "GFLOP reference",
          "rounds"]  # fmt: skip


def main() -> None:
    """Measures each encoder with each decoder and writes the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows, data = [], {}
    for size in args.sizes:
        for depth in args.decoder_depths:
            samples, counted = measure(size, depth, args.batch_size, args.repeats), gflops(size, depth)
            rows.append(row_of(size, depth, samples, counted))
            data[f"{size}-{depth}"] = {"samples": samples, "gflops": counted}
            gc.collect()
    note = (
        f"Forward and backward pass, no optimizer, float32, 224 pixels, batch {args.batch_size}, mask ratio {MASK_RATIO}, "
        f"decoder 512 wide. Ratio of medians [95 % interval over rounds]; wanted: {LEAST_SHARE:.0%} of the analytic FLOP ratio. "
        "GFLOP: of one image's forward and backward pass; the reference embeds and predicts every patch. "
        "The paper's figures are wall time on 128 TPU-v3 cores."
    )
    write_table(
        "Asymmetric design against mask tokens in the encoder",
        [Table("Step", HEADER, rows, note)],
        data,
        args.out,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["large", "huge"])
    parser.add_argument("--decoder-depths", nargs="+", type=int, default=[8, 1])
    parser.add_argument(
        "--batch-size", type=int, default=8, help="below 8, writing the gradients begins to count"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
