"""The options that several commands share, each defined once."""

from pathlib import Path
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Config overrides, e.g. tasks.linear.epochs=10; tasks.NAME=null leaves a task out.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Output folder; runs/NAME by default.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Number of concurrent worker processes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and run nothing, as `plan` does.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON, and only that, to stdout.")]


def _check_format(name: str | None) -> str | None:
    """Raise UserError for an unknown format before torch is imported."""
    from backbones.translating.detect import check_format

    if name is not None:
        check_format(name)
    return name


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A path, file:PATH, run:DIR (a cell's folder), official:NAME, timm:NAME or hf:REPO@REVISION.",
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Backbone fields that cannot be inferred from the file, e.g. num_heads=6."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        callback=_check_format,
        help="Checkpoint format, if it cannot be inferred from the file.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="Which set of weights to read, if the file has several; `inspect` lists them."
    ),
]


def reading_options(format: str | None, weights: str | None, fields: list[str] | None) -> dict[str, Any]:
    """Return the options above as the keywords of every function that reads a checkpoint."""
    from mae_bench.config import resolve

    overrides = resolve({}, Path.cwd(), fields or [])
    return {"format": format, "weights": weights, "overrides": overrides}
