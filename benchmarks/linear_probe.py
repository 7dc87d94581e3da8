"""Training step of a linear probe: a grid of heads against one head on the same frozen ViT."""

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import (
    Table,
    Times,
    find_device,
    interleave,
    positive_int,
    ratio,
    run_main,
    write_table,
)
from benchmarks.peers import SIZES, vit_spec
from mae_bench.config import build
from mae_bench.models.vit import build_vit
from mae_bench.spec import BackboneSpec
from tasks.imagenet.config import LinearProbeConfig
from tasks.imagenet.features import FrozenFeatures
from tasks.imagenet.linear_probe import Probe, build_heads, build_lars, sum_losses

MAX_RATIO = 1.10  # target for the cost of 32 heads over that of one head
LRS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
GRIDS: dict[str, dict[str, list[Any]]] = {
    "1 head": {},
    "8 heads (8 lrs)": {"lrs": LRS},
    "32 heads (16 lrs x 2 poolings)": {
        "lrs": [scale * lr for scale, lr in product((1.0, 1.4), LRS)],
        "pools": ["token", "avg"],
    },
    "32 heads (8 lrs x 2 poolings x last 1 or 4 blocks)": {
        "lrs": LRS,
        "pools": ["token", "avg"],
        "layers": [1, 4],
    },
}
COMMON = {
    "kind": "linear_probe",
    "protocol": "benchmark",
    "data": "",
    "epochs": 1,
    "base_lr": 0.1,
    "global_batch_size": 256,
    "global_pool": "token",
    "holdout": 0.02,
}


def build_probe(
    vit: nn.Module, spec: BackboneSpec, grid: dict[str, list[Any]], num_classes: int
) -> tuple[Probe, torch.optim.Optimizer]:
    """Build the probe and its optimizer, as the protocol does."""
    within = {"layers": [min(count, spec.depth) for count in grid["layers"]]} if "layers" in grid else {}
    config = build(LinearProbeConfig, COMMON | grid | within, "benchmark")
    heads = build_heads(config, spec)
    sets = list(dict.fromkeys(head.features for head in heads))
    extract = FrozenFeatures(vit, spec, sets)  # type: ignore[arg-type]
    probe = Probe(heads, sets, extract.widths, num_classes, seed=0).attach(extract)
    return probe, build_lars(probe, config, heads)


def run_step(
    probe: Probe, optimizer: torch.optim.Optimizer, imgs: torch.Tensor, targets: torch.Tensor
) -> None:
    """Run one training step: backbone, heads, their gradients, LARS."""
    torch.autograd.backward(sum_losses(probe(imgs), targets))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(
    spec: BackboneSpec, batch_size: int, num_classes: int, repeats: int, device: torch.device
) -> dict[str, Times]:
    """Return samples of every grid, on the same images and the same backbone."""
    draw = torch.Generator().manual_seed(0)
    imgs = torch.randn(batch_size, spec.in_chans, *spec.img_size, generator=draw).to(device)
    targets = torch.randint(0, num_classes, (batch_size,), generator=draw).to(device)
    vit = build_vit(spec).to(device)
    contenders = {}
    for name, grid in GRIDS.items():
        probe, optimizer = build_probe(vit, spec, grid, num_classes)
        contenders[name] = partial(run_step, probe.to(device).train(), optimizer, imgs, targets)
    return interleave(
        contenders, repeats, synchronize=torch.cuda.synchronize if device.type == "cuda" else None
    )


def main() -> None:
    """Measure one size and write the table."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    samples = measure(
        vit_spec(args.size), args.batch_size, args.classes, args.repeats, torch.device(args.device)
    )
    base = samples["1 head"]
    rows = [
        [name, ratio(times.cpu, base.cpu), ratio(times.wall, base.wall), len(times.cpu)]
        for name, times in samples.items()
        if times is not base
    ]
    note = (
        f"A training step of ViT-{args.size} at batch {args.batch_size}, {args.classes} classes, float32, "
        f"{args.device}. Time over that of one head, ratio of medians [95 % interval over rounds]; "
        f"target: at most {MAX_RATIO:.2f} for 32 heads. The reference gives a GPU 512 images."
    )
    header = ["grid", "CPU time over one head", "wall time over one head", "rounds"]
    write_table(
        "A grid of linear heads in one pass",
        [Table("Training step", header, rows, note)],
        {"samples": samples},
        args.out,
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--classes", type=positive_int, default=1000)
    parser.add_argument("--repeats", type=positive_int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--device", type=find_device, default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
