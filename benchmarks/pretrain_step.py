"""One whole MAE pretraining step (forward, backward, optimizer), ours and the peers in turns."""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import Ratio, Table, Times, interleave, ratio, write_table
from benchmarks.peers import MASK_RATIO, SIZES, build_hf, build_ours, build_timm, decoder_depth_of, vit_spec
from mae_bench.engine.optim import build_adamw, build_param_groups, pretrain_no_decay
from mae_bench.models.mae import MAE

LR, WEIGHT_DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)
OURS, HF_SDPA = "ours", "Hugging Face sdpa"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative, of the losses of all models on the same batch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Samples = dict[str, dict[str, Times]]  # of each configuration, of each contender


class Contender:
    """A model, its optimizer and its whole training step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, dtype: str):
        self.model, self.optimizer, self.loss, self.dtype = model, optimizer, loss, getattr(torch, dtype)

    def forward(self, imgs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The loss, under autocast unless in float32."""
        with torch.autocast(imgs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.loss(imgs, noise)

    def step(self, imgs: torch.Tensor, noise: torch.Tensor) -> None:
        """Forward, backward, optimizer."""
        self.forward(imgs, noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def contenders(size: str, dtype: str, compiled: bool) -> dict[str, Contender]:
    """Ours with its fused AdamW, then the peers with AdamW as it comes; all have the same weights."""
    ours = build_ours(vit_spec(size), decoder_depth_of(size))
    built: dict[str, nn.Module] = {
        HF_SDPA: build_hf(ours, "sdpa"),
        "Hugging Face eager": build_hf(ours, "eager"),
    }
    built["timm blocks"] = build_timm(ours)
    found = {OURS: Contender(ours, our_optimizer(ours), _ours(_compile(ours, compiled)), dtype)}
    for name, model in built.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
        loss = _hf(_compile(model, compiled)) if "Face" in name else _compile(model, compiled)
        found[name] = Contender(model, optimizer, loss, dtype)
    return found


def our_optimizer(model: MAE) -> torch.optim.Optimizer:
    """The optimizer of our pretraining job."""
    return build_adamw(
        build_param_groups(model.named_parameters(), WEIGHT_DECAY, pretrain_no_decay), LR, BETAS
    )


def _compile(model: nn.Module, compiled: bool) -> Callable:
    return torch.compile(model) if compiled else model


def _ours(model: Callable) -> Loss:
    return lambda imgs, noise: model(imgs, MASK_RATIO, noise, scored_only=True)[0]


def _hf(model: Callable) -> Loss:
    return lambda imgs, noise: model(imgs, noise=noise).loss


def batch_of(size: str, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noise; every contender gets the same."""
    spec, draw = vit_spec(size), torch.Generator().manual_seed(0)
    imgs = torch.randn(batch_size, spec.in_chans, *spec.img_size, generator=draw)
    return imgs, torch.rand(batch_size, spec.num_patches, generator=draw)


def require_equal_losses(
    found: dict[str, Contender], imgs: torch.Tensor, noise: torch.Tensor, tolerance: float
) -> None:
    """Like is compared with like: raises AssertionError unless all losses are those of the first model."""
    with torch.no_grad():
        losses = {name: float(one.forward(imgs, noise)) for name, one in found.items()}
    expected = next(iter(losses.values()))
    wrong = {
        name: loss for name, loss in losses.items() if not abs(loss - expected) <= tolerance * abs(expected)
    }
    assert not wrong, f"losses differ from {expected}: {wrong}"


def measure_steps(size: str, dtype: str, compiled: bool, batch_size: int, repeats: int) -> dict[str, Times]:
    """Samples of each contender's step."""
    torch.manual_seed(0)
    found = contenders(size, dtype, compiled)
    imgs, noise = batch_of(size, batch_size)
    require_equal_losses(found, imgs, noise, TOLERANCE[dtype])
    return interleave({name: partial(one.step, imgs, noise) for name, one in found.items()}, repeats)


def measure_optimizer(size: str, repeats: int) -> dict[str, Times]:
    """Samples of the optimizer's step alone: ours, and AdamW as it comes."""
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
    return interleave({OURS: our_optimizer(models[OURS]).step, "default AdamW": default.step}, repeats)


def ratios(samples: dict[str, Times]) -> dict[str, tuple[Ratio, Ratio]]:
    """How many times faster ours is than each peer, in CPU and in wall time."""
    ours = samples[OURS]
    return {
        name: (ratio(times.cpu, ours.cpu), ratio(times.wall, ours.wall))
        for name, times in samples.items()
        if times is not ours
    }


def rows_of(name: str, samples: dict[str, Times]) -> list[list[object]]:
    """A row a peer: what, peer, both ratios, the medians of CPU milliseconds."""
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
        for peer, (cpu, wall) in ratios(samples).items()
    ]


def main() -> None:
    """Measures every configuration asked for and writes the tables."""
    args = _arguments()
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
        _tables(samples, optimizer, args),
        {"steps": samples, "optimizer": optimizer},
        args.out,
    )


def _tables(
    samples: dict[str, dict[str, Times]], optimizer: dict[str, dict[str, Times]], args: argparse.Namespace
) -> list[Table]:
    header = [
        "what",
        "against",
        "ratio, CPU time",
        "ratio, wall time",
        "ours, CPU ms",
        "theirs, CPU ms",
        "rounds",
    ]
    about = f"ViT, 224 pixels, batch {args.batch_size}, mask ratio {MASK_RATIO}, normalised pixels, decoder 512 wide and 8 deep."
    how = "Ratio of medians [95 % interval over rounds]; above 1, ours is faster. Losses agreed before the timing."
    tables = [
        Table(
            "Step",
            header,
            [row for name, of in samples.items() for row in rows_of(name, of)],
            f"{about} {how}",
        ),
        Table(
            "Optimizer's step alone",
            header,
            [row for name, of in optimizer.items() for row in rows_of(name, of)],
        ),
    ]
    return [*tables, *_added(samples, args.sizes)]


def _added(samples: Samples, sizes: list[str]) -> list[Table]:
    """What bf16 and compile add to each contender's eager float32, as ratios of medians (the runs are not interleaved)."""
    rows: list[list[object]] = []
    for size in sizes:
        base = samples.get(f"{size}, float32")
        for name, of in samples.items():
            if base and name.startswith(f"{size}, ") and of is not base:
                rows += [[name, who, f"{ratio(base[who].cpu, of[who].cpu).median:.2f}"] for who in of]
    note = "Runs one after another, so the load of the machine may differ between them."
    return (
        [Table("Against eager float32 of the same model", ["what", "whose", "ratio, CPU time"], rows, note)]
        if rows
        else []
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32", "bfloat16"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="measure torch.compile of all models too (needs a C++ compiler)",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds of a configuration")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="FILE: FILE.md and FILE.json are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
