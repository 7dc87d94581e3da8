"""Commands on one checkpoint: inspect, convert, verify, reconstruct."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mae_bench.cli.options import Checkpoint, Fields, Format, Json, Weights, reading_options
from mae_bench.cli.output import FAILED, print_answer

Against = Annotated[
    str,
    typer.Option(
        "--against",
        metavar="MODULE:CALLABLE",
        help="Your own code, which is executed; it returns a torch.nn.Module.",
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        min=0,
        help="Largest difference that passes, relative to the largest value of the layer.",
    ),
]


def inspect(
    ckpt: Checkpoint,
    fields: Fields = None,
    format: Format = None,
    weights: Weights = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            help="A folder of images on which to compare preprocessing and pooling, and the numbers of heads "
            "if the file does not state them; prints suggestions.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint contains: format, architecture, sizes, digests, spec fields and keys.

    For each spec field, print where its value comes from; for each key, what it is converted to. For a file
    with several sets of weights, print the list of sets. With --images, for a file whose number of heads is
    not known, print only the comparison of the numbers.
    """
    from backbones.inspection import inspect_checkpoint, render, render_published

    options = reading_options(format, weights, fields)
    if images is None:
        found = inspect_checkpoint(ckpt, **options)
        print_answer(found, render(found), as_json)
        return
    from rich.console import Group

    from backbones.attention_heads import render as render_heads
    from backbones.attention_heads import suggest_heads
    from backbones.preprocessing import render as render_suggestion
    from backbones.preprocessing import suggest_preprocessing

    heads = suggest_heads(ckpt, images, **options)
    answer: dict[str, Any] = {"source": ckpt, "heads": heads and heads.to_dict()}
    parts = [render_heads(heads)] if heads else []
    if heads is None or "num_heads" not in heads.fields:  # else nothing more can be read
        found = inspect_checkpoint(ckpt, **options)
        suggestion = suggest_preprocessing(ckpt, images, **options)
        answer |= found | {"suggestion": suggestion.to_dict()}
        parts = [render(found), render_suggestion(suggestion), render_published(found["published"]), *parts]
    print_answer(answer, Group(*[line for part in parts for line in (part, "")][:-1]), as_json)


def convert(
    ckpt: Checkpoint,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file or folder to write; it must not exist.")
    ],
    to: Annotated[str, typer.Option("--to", help="The format to write; an unknown name lists the formats.")],
    fields: Fields = None,
    format: Format = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Write the backbone of a checkpoint in another format; it is read back and must be bit-equal."""
    from backbones.target import check_target

    check_target(out, to)  # before torch is imported
    from backbones.convert import convert as write_as

    report = write_as(ckpt, out, to, **reading_options(format, weights, fields))
    counts = (
        f"{len(report.renamed)} keys converted, {len(report.dropped)} dropped with a reason, "
        f"{len(report.new)} new"
    )
    summary = f"{ckpt} ({report.format}) -> {out} ({to}): {counts}"
    print_answer({"out": str(out), "to": to, "report": report.to_dict()}, summary, as_json)


def verify(
    ckpt: Checkpoint,
    against: Against,
    fields: Fields = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="A folder of images; random images by default.")
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="Number of images.")] = 2,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed for random images, or for the choice from a folder.")
    ] = 0,
    tolerance: Tolerance = 1e-5,
    format: Format = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with another implementation, layer by layer, on the same images.

    CALLABLE, in MODULE (in the working folder, or installed), is called with CKPT's path if it has an
    argument without a default. Its blocks are its first ModuleList or Sequential with as many members as the
    backbone has blocks. Exit code 1 if a difference exceeds --tolerance.
    """
    from backbones.user_code import load_callable

    load_callable(against)  # before torch is imported, unless the user's code imports it
    from backbones.parity import render
    from backbones.parity import verify as compare

    parity = compare(
        ckpt,
        against,
        images=images,
        num_images=num_images,
        seed=seed,
        tolerance=tolerance,
        **reading_options(format, weights, fields),
    )
    settings = {
        "source": ckpt,
        "against": against,
        "images": str(images or "random"),
        "num_images": num_images,
        "seed": seed,
    }
    print_answer(settings | parity.to_dict(), render(parity), as_json)
    if not parity.equal:
        raise typer.Exit(FAILED)


def reconstruct(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files.")],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="The folder of a pretraining run, or its mae.safetensors.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")],
    mask_ratio: Annotated[
        float, typer.Option("--mask-ratio", min=0.01, max=0.99, help="Fraction of patches to remove.")
    ] = 0.75,
    seed: Annotated[int, typer.Option("--seed", help="Seed for the masks.")] = 0,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A spec field that the file does not state."),
    ] = None,
    decoder_num_heads: Annotated[
        int | None,
        typer.Option(
            "--decoder-num-heads", min=1, help="Heads of the decoder, if the file does not state them."
        ),
    ] = None,
    norm_pix_loss: Annotated[
        bool | None,
        typer.Option(
            "--norm-pix-loss/--no-norm-pix-loss",
            help="Whether it was trained on normalised pixels, if the file does not state it.",
        ),
    ] = None,
) -> None:
    """Draw what a masked autoencoder reconstructs, one row per image: original, masked, reconstructed.

    Print to stderr what is assumed about the checkpoint.
    """
    from backbones.mae import load_mae
    from mae_bench.pretrain.reconstruct import reconstruct_files

    overrides = reading_options(None, None, fields)["overrides"]
    model, _, report = load_mae(
        checkpoint, norm_pix_loss=norm_pix_loss, decoder_num_heads=decoder_num_heads, overrides=overrides
    )
    for assumption in report.assumptions:
        print(f"{checkpoint}: {assumption}", file=sys.stderr)
    reconstruct_files(model, images, out, mask_ratio, seed)
    print(out)
