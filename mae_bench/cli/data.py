"""Commands on data sets: check, pack, prepare."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from mae_bench.cli.options import Json
from mae_bench.cli.output import FAILED, print_answer
from mae_bench.errors import UserError

if TYPE_CHECKING:
    from mae_bench.data.checks.layouts import LayoutReport

app = typer.Typer(no_args_is_help=True, help="Prepare, pack and check data sets.")
prepare_app = typer.Typer(no_args_is_help=True, help="Prepare a data set from its published files.")
app.add_typer(prepare_app, name="prepare")

SHORT_SIDE = 256  # pixels, of the images in a packed set

Images = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Images in any form that pretraining reads: a folder, shards or a URL."
    ),
]
NewFolder = Annotated[
    Path, typer.Argument(metavar="OUT", help="The folder to write; an interrupted call resumes in it.")
]


@app.command()
def check(
    layout: Annotated[
        str, typer.Argument(metavar="LAYOUT", help="For example imagenet; an unknown name lists the layouts.")
    ],
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="The folder of the data set, or a pattern of shards.")
    ],
    thorough: Annotated[
        bool, typer.Option("--thorough", help="List every file again, also for known data sets.")
    ] = False,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Decode every image (imagenet, images); exit code 1 if one fails."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that a folder has the files of a layout; if not, print what was expected and what was found."""
    from mae_bench.data.checks.layouts import check_layout

    found = check_layout(layout, path, thorough=thorough)
    bad_images = _bad_images(layout, path, list(found.splits)) if decode else {}
    notes = [*found.notes, *_label_notes(layout, path, found), *_ceiling_notes(layout, path)]
    splits = ", ".join(f"{split}: {count} images" for split, count in found.splits.items())
    lines = [
        f"{found.name} ({layout}): {splits}; {len(found.classes)} classes",
        f"digest {found.digest}",
        *_label_histogram(found),
        *notes,
    ]
    for split, reasons in bad_images.items():
        lines += [f"{split}: {name} does not decode: {reason}" for name, reason in reasons.items()]
    value = asdict(found) | {"notes": notes}
    if decode:
        value["bad_images"] = bad_images
    print_answer(value, "\n".join(lines), as_json)
    if any(bad_images.values()):
        raise typer.Exit(FAILED)


def _label_histogram(found: "LayoutReport") -> list[str]:
    """Return a table of the labels of ADE20K's maps: the share of each class in each split's pixels."""
    if not found.labels:
        return []
    names = ["0 (ignored)", *(f"{number} {name}" for number, name in enumerate(found.classes, 1))]
    columns = [
        (split, [100 * count / sum(counts) for count in counts]) for split, counts in found.labels.items()
    ]
    width = max(map(len, names))
    lines = ["label".ljust(width) + "".join(f"{split:>14}" for split, _ in columns)]
    for row, name in enumerate(names):
        lines.append(name.ljust(width) + "".join(f"{shares[row]:12.3f} %" for _, shares in columns))
    return lines


def _label_notes(layout: str, path: str, found: "LayoutReport") -> list[str]:
    """Return warnings on a labelled set: it is nearly ImageNet-1k, or its splits share images."""
    from mae_bench.data.sets.open import open_images
    from tasks.imagenet.data import describe_near_imagenet, describe_overlap

    if layout not in ("imagenet", "imagenet_val"):
        return []
    notes = [describe_near_imagenet(found)]
    if layout == "imagenet":
        notes.append(describe_overlap(found, open_images(path, "train"), open_images(path, "val")))
    return [note for note in notes if note]


def _ceiling_notes(layout: str, path: str) -> list[str]:
    """Return what a perfect detector scores on COCO data."""
    if layout != "coco":
        return []
    if find_spec("pycocotools") is None:
        return ["masks are not encoded or scored: pycocotools is not installed (pip install pycocotools)"]
    from tasks.coco.annotations import prepare_annotations
    from tasks.coco.ceiling import load_or_compute_ceiling

    split = "val2017"
    with TemporaryDirectory() as folder:
        annotations = prepare_annotations(Path(path), split, Path(folder))
        return [load_or_compute_ceiling(annotations).describe(split)]


def _bad_images(layout: str, path: str, splits: list[str]) -> dict[str, dict[str, str]]:
    """Return, per split, the images that do not decode and why."""
    from mae_bench.data.checks.verify import find_bad_images
    from mae_bench.data.sets.open import open_images
    from mae_bench.environment.provenance import num_cores

    if layout not in ("imagenet", "images"):
        raise UserError(f"--decode with the layout {layout}", expected="imagenet or images")
    with _progress() as progress:
        return {
            split: find_bad_images(open_images(path, split), num_cores(), partial(progress, split))
            for split in splits
        }


@app.command()
def pack(
    source: Images,
    out: NewFolder,
    short_side: Annotated[
        int | None,
        typer.Option("--short-side", min=1, help=f"Reduce larger images to this many pixels; {SHORT_SIDE}."),
    ] = None,
    quality: Annotated[
        int | None, typer.Option("--quality", min=1, max=100, help="JPEG quality; 90 for resized images.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Store decoded pixels: fastest to read, and largest.")
    ] = False,
    original: Annotated[bool, typer.Option("--original", help="Store the bytes of each image file.")] = False,
    num_workers: Annotated[
        int | None, typer.Option("--num-workers", min=0, help="Worker processes; one per core by default.")
    ] = None,
) -> None:
    """Write a packed set: one file per split, smaller and faster to read than the image files."""
    from mae_bench.data.pack import pack_set
    from mae_bench.environment.provenance import num_cores

    if original and (raw or quality is not None or short_side is not None):
        raise UserError(
            "--original with --raw, --quality or --short-side",
            expected="--original without them: it keeps the bytes of each image",
        )
    with _progress() as progress:
        header = pack_set(
            source,
            out,
            short_side=None if original else short_side or SHORT_SIDE,
            quality=quality,
            raw=raw,
            num_workers=num_cores() if num_workers is None else num_workers,
            progress=progress,
        )
    for split, made in header["splits"].items():
        for name, reason in made["left_out"]:
            print(f"left out of {split}: {name}: {reason}", file=sys.stderr)
        print(
            f"{split}: {made['images']} images, {len(made['left_out'])} left out because they do not decode"
        )
    print(out)


@prepare_app.command("imagenet")
def prepare_imagenet(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="The folder with the archives as published by image-net.org."),
    ],
    out: NewFolder,
    val_classes: Annotated[
        Path | None,
        typer.Option(
            "--val-classes",
            help="A text file with name and WNID of a validation image per line; by default the devkit.",
        ),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Write a packed set instead, without unpacking the archives.")
    ] = False,
    short_side: Annotated[
        int | None,
        typer.Option(
            "--short-side", min=1, help="Reduce the images of a packed set; by default they are kept."
        ),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Accept archives that differ from the published ones.")
    ] = False,
) -> None:
    """Write the folders train/ and val/ of ImageNet-1K, or a packed set, from the ILSVRC2012 archives."""
    from mae_bench.data.prepare import prepare_imagenet as prepare
    from mae_bench.data.sets.packing import PackOptions
    from mae_bench.environment.provenance import num_cores

    if short_side and not packed:
        raise UserError(
            "--short-side without --packed",
            expected="both, or neither: class folders keep the images unchanged",
        )
    with _progress() as progress:
        made = prepare(
            source,
            out,
            progress,
            check=not no_check,
            val_classes=val_classes,
            packed=PackOptions(short_side=short_side) if packed else None,
            num_workers=num_cores(),
        )
    print(f"{out}: train: {made.num_train} images, val: {made.num_val} images; {made.num_classes} classes")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress bars on stderr; yield the function that updates them: name, done, total."""
    from rich.console import Console

    from mae_bench.runner.live import counting

    with counting(Console(stderr=True)) as progress:
        yield progress
