"""One MAE pretraining step (forward, backward, optimizer), ours against its peers."""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import (
    Ratio,
    Table,
    Times,
    interleave,
    positive_int,
    ratio,
    run_main,
    write_table,
)
from benchmarks.peers import MASK_RATIO, SIZES, build_hf, build_ours, build_timm, decoder_depth_of, vit_spec
from mae_bench.engine.optim import build_adamw, build_param_groups, pretrain_no_decay
from mae_bench.models.mae import MAE

LR, WEIGHT_DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)
OURS, HF_SDPA = "ours", "Hugging Face sdpa"
TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 2e-2,
}  # relative, between the losses of all models on the same batch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Samples = dict[str, dict[str, Times]]  # by configuration, then by contender


class Contender:
    """A model with its optimizer and training step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, dtype: str):
        self.model, self.optimizer, self.loss, self.dtype = model, optimizer, loss, getattr(torch, dtype)

    def forward(self, imgs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the loss, under autocast unless in float32."""
        with torch.autocast(imgs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.loss(imgs, noise)

    def step(self, imgs: torch.Tensor, noise: torch.Tensor) -> None:
        """Run forward, backward and optimizer."""
        torch.autograd.backward(self.forward(imgs, noise))
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_contenders(size: str, dtype: str, compiled: bool) -> dict[str, Contender]:
    """Build ours with fused AdamW and the peers with the default AdamW, all with the same weights."""
    ours = build_ours(vit_spec(size), decoder_depth_of(size))
    built: dict[str, nn.Module] = {
        HF_SDPA: build_hf(ours, "sdpa"),
        "Hugging Face eager": build_hf(ours, "eager"),
    }
    built["timm blocks"] = build_timm(ours)
    found = {OURS: Contender(ours, build_our_optimizer(ours), _wrap_ours(_compile(ours, compiled)), dtype)}
    for name, model in built.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
        loss = _wrap_hf(_compile(model, compiled)) if "Face" in name else _compile(model, compiled)
        found[name] = Contender(model, optimizer, loss, dtype)
    return found


def build_our_optimizer(model: MAE) -> torch.optim.Optimizer:
    """Build the optimizer of our pretraining job."""
    return build_adamw(
        build_param_groups(model.named_parameters(), WEIGHT_DECAY, pretrain_no_decay), LR, BETAS
    )


def _compile(model: nn.Module, compiled: bool) -> Callable[..., Any]:
    return torch.compile(model) if compiled else model


def _wrap_ours(model: Callable[..., Any]) -> Loss:
    return lambda imgs, noise: model(imgs, MASK_RATIO, noise, scored_only=True)[0]


def _wrap_hf(model: Callable[..., Any]) -> Loss:
    return lambda imgs, noise: model(imgs, noise=noise).loss


def draw_batch(size: str, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and noise, the same for every contender."""
    spec, draw = vit_spec(size), torch.Generator().manual_seed(0)
    imgs = torch.randn(batch_size, spec.in_chans, *spec.img_size, generator=draw)
    return imgs, torch.rand(batch_size, spec.num_patches, generator=draw)


def require_equal_losses(
    found: dict[str, Contender], imgs: torch.Tensor, noise: torch.Tensor, tolerance: float
) -> None:
    """Raise AssertionError unless all losses equal that of the first model."""
    with torch.no_grad():
        losses = {name: float(one.forward(imgs, noise)) for name, one in found.items()}
    expected = next(iter(losses.values()))
    wrong = {
        name: loss for name, loss in losses.items() if not abs(loss - expected) <= tolerance * abs(expected)
    }
    assert not wrong, f"losses differ from {expected}: {wrong}"


def measure_steps(size: str, dtype: str, compiled: bool, batch_size: int, repeats: int) -> dict[str, Times]:
    """Return samples of each contender's step."""
    torch.manual_seed(0)
    found = build_contenders(size, dtype, compiled)
    imgs, noise = draw_batch(size, batch_size)
    require_equal_losses(found, imgs, noise, TOLERANCE[dtype])
    return interleave({name: partial(one.step, imgs, noise) for name, one in found.items()}, repeats)


def measure_optimizer(size: str, repeats: int) -> dict[str, Times]:
    """Return samples of the optimizer's step only: ours, and the default AdamW."""
    models = {
        OURS: build_ours(vit_spec(size), decoder_depth_of(size)),
        "default AdamW": build_ours(vit_spec(size), decoder_depth_of(size)),
    }
    for model in models.values():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None
    default = torch.optim.AdamW(
        models["default AdamW"].parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    return interleave({OURS: build_our_optimizer(models[OURS]).step, "default AdamW": default.step}, repeats)


def compare(samples: dict[str, Times]) -> dict[str, tuple[Ratio, Ratio]]:
    """Return how many times faster ours is than each peer, in CPU and in wall time."""
    ours = samples[OURS]
    return {
        name: (ratio(times.cpu, ours.cpu), ratio(times.wall, ours.wall))
        for name, times in samples.items()
        if times is not ours
    }


def format_rows(name: str, samples: dict[str, Times]) -> list[list[object]]:
    """Return one row per peer: what, peer, both ratios, medians of CPU milliseconds."""
    middle = {who: sorted(times.cpu)[len(times.cpu) // 2] for who, times in samples.items()}
    return [
        [
            name,
            peer,
            cpu,
            wall,
            f"{1e3 * middle[OURS]:.0f}",
            f"{1e3 * middle[peer]:.0f}",
            len(samples[peer].cpu),
        ]
        for peer, (cpu, wall) in compare(samples).items()
    ]


def main() -> None:
    """Measure every requested configuration and write the tables."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    samples: Samples = {}
    for size in args.sizes:
        for dtype in args.dtypes:
            for compiled in (False, True) if args.compile else (False,):
                name = f"{size}, {dtype}" + (", compiled" if compiled else "")
                samples[name] = measure_steps(size, dtype, compiled, args.batch_size, args.repeats)
                gc.collect()
    optimizer = {size: measure_optimizer(size, 3 * args.repeats) for size in args.sizes}
    write_table(
        "One pretraining step",
        _build_tables(samples, optimizer, args),
        {"steps": samples, "optimizer": optimizer},
        args.out,
    )


def _build_tables(
    samples: dict[str, dict[str, Times]], optimizer: dict[str, dict[str, Times]], args: argparse.Namespace
) -> list[Table]:
    header = [
        "what",
        "against",
        "ratio, CPU time",
        "ratio, wall time",
        "ours, CPU ms",
        "peer, CPU ms",
        "rounds",
    ]
    about = (
        f"ViT, 224 pixels, batch {args.batch_size}, mask ratio {MASK_RATIO}, normalised pixels, "
        "decoder 512 wide and 8 deep. Ratio of medians [95 % interval over rounds]; above 1, ours is faster. "
        "Losses agreed before the timing."
    )
    steps: list[list[object]] = []
    for name, times in samples.items():
        steps += format_rows(name, times)
    updates: list[list[object]] = []
    for name, times in optimizer.items():
        updates += format_rows(name, times)
    tables = [Table("Step", header, steps, about), Table("Optimizer's step only", header, updates)]
    return [*tables, *_compare_with_eager(samples, args.sizes)]


def _compare_with_eager(samples: Samples, sizes: list[str]) -> list[Table]:
    """Compare bfloat16 and compile with eager float32 of each contender (the runs are not interleaved)."""
    rows: list[list[object]] = []
    for size in sizes:
        base = samples.get(f"{size}, float32")
        for name, of in samples.items():
            if base and name.startswith(f"{size}, ") and of is not base:
                rows += [[name, who, f"{ratio(base[who].cpu, of[who].cpu).median:.2f}"] for who in of]
    note = "Runs one after another: the load of the machine may have differed."
    if not rows:
        return []
    return [
        Table("Against eager float32 of the same model", ["what", "whose", "ratio, CPU time"], rows, note)
    ]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32", "bfloat16"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also measure all models with torch.compile (needs a C++ compiler)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=8)
    parser.add_argument("--repeats", type=positive_int, default=15, help="timed rounds per configuration")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
