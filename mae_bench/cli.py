"""The command line `mae-bench`: a roof that nobody imports; each command imports what it needs when it is chosen."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mae_bench.errors import Interrupted, UserError

if TYPE_CHECKING:
    from mae_bench.data.checks.layouts import LayoutReport
    from mae_bench.record import Failure, ResultRecord
    from mae_bench.runner.launcher import Company
    from mae_bench.suite.cell import Cell
    from mae_bench.suite.config import SuiteConfig

FAILED, WRONG_USE, STOPPED = 1, 2, 130  # exit codes; 130 is the shell's for SIGINT
DEMO = "suites/demo.yaml"
WIDTH = 100  # columns of a table that goes into a file

app = typer.Typer(
    name="mae-bench", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare, pack and check data.")
prepare_app = typer.Typer(no_args_is_help=True, help="Make a layout from what its publisher offers.")
app.add_typer(data_app, name="data")
data_app.add_typer(prepare_app, name="prepare")

Source = (
    str | Callable[[], dict[str, Any]]
)  # a suite's file, or what makes its content: the ranks that follow need neither

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the config, e.g. tasks.linear.epochs=10."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Where everything is written; by default runs/NAME.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Worker processes at a time.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON for a program to read, and nothing else, on stdout.")
]


def _known_format(name: str | None) -> str | None:
    """Asked before torch is imported."""
    from backbones.translating.detect import check_format

    if name is not None:
        check_format(name)
    return name


Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        callback=_known_format,
        help="The checkpoint's format, where the file alone cannot decide.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="Which set of weights, where the file holds several; `inspect` lists them."
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Run the pickle of a file that is more than data, in a process without network."
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="What the file does not tell of the backbone, e.g. num_heads=6."
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A path, file:PATH, run:DIR (a cell's folder), official:NAME, timm:NAME or hf:REPO@REVISION.",
    ),
]


def main() -> None:
    """The entry point. Exit codes: 0 done, 1 some cell failed, 2 wrong use, 130 stopped."""
    try:
        app()
    except UserError as error:
        _refuse(error)
    except OSError as error:  # what the system refuses, a folder that cannot be written for example; its text names the path
        _refuse(UserError(str(error)))
    except Interrupted:
        if os.environ.get("RANK", "0") == "0":
            print("Stopped; what is done is saved. The same command goes on from here.", file=sys.stderr)
        sys.exit(STOPPED)


def _refuse(error: UserError) -> NoReturn:
    """Wrong use, for a person, and where JSON was asked for, for a program too."""
    print(f"Error: {error}", file=sys.stderr)
    if "--json" in sys.argv:
        _print_json({"error": error.given, "expected": error.expected, "fix": error.fix})
    sys.exit(WRONG_USE)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"mae-bench {version('mae_bench')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Downstream transfer benchmark for masked autoencoders: pretrain, transfer, compare.

    Exit codes: 0 done, 1 some cell failed (the others still ran), 2 wrong use.
    """


@app.command()
def demo(overrides: Overrides = None, out: Out = None, jobs: Jobs = None, as_json: Json = False) -> None:
    """The whole way once, on data that is made on the spot: three backbones, four transfers, a leaderboard."""
    _run(DEMO, overrides, out, jobs, as_json)


@app.command()
def run(
    suite: Annotated[
        str,
        typer.Argument(metavar="SUITE", help="A suite's YAML: a path, or a packaged one (suites/demo.yaml)."),
    ],
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    as_json: Json = False,
) -> None:
    """Run every cell of a suite that is not finished, then render the comparison."""
    _run(suite, overrides, out, jobs, as_json)


@app.command()
def pretrain(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A job that makes a backbone, e.g. pretrain/demo.yaml.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the weights and of the order of the images.")] = 0,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="That train it together; else all GPUs.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where it is made.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Make one backbone; its folder then holds `export/`, which every other command reads as a checkpoint.

    On several machines: torchrun ... -m mae_bench pretrain CONFIG ..., or the same by srun, with --out on a disk that all share.
    """
    from mae_bench.config import load_yaml
    from mae_bench.suite.config import complete_job

    name = Path(config).stem

    def suite() -> dict[str, Any]:
        job = complete_job(config, load_yaml(config, overrides or []))
        chosen = {"processes": processes} if processes else {}
        return {"name": name, "backbones": {name: job}, "backbone_seed": seed, "device": device} | chosen

    _run(suite, None, out, None, as_json)


@app.command()
def evaluate(
    checkpoint: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            help="What `inspect` reads, a pattern in quotes ('ckpts/*.pth'), or a YAML list; repeatable.",
        ),
    ],
    tasks: Annotated[
        str, typer.Option("--tasks", help="Names below configs/tasks, or YAML files, separated by commas.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    format: Format = None,
    weights: Weights = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Transfer given checkpoints to given tasks; where the data is: data.root=PATH, or data.imagenet=PATH and its like.

    --format, --weights and --trust hold for all that is no YAML list; a list's rows have their own.
    """
    options: dict[str, Any] = {"format": format, "weights": weights, "trust": trust or None}
    chosen = {key: value for key, value in options.items() if value is not None}
    _run(lambda: _suite_of(checkpoint, tasks, chosen), overrides, out, jobs, as_json)


def _suite_of(checkpoints: list[str], tasks: str, options: dict[str, Any]) -> dict[str, Any]:
    from mae_bench.config import task_file
    from mae_bench.suite.rows import rows_of

    named = [name.strip() for name in tasks.split(",") if name.strip()]
    files = {Path(name).stem: task_file(name) for name in named}
    if len(files) < len(named):
        raise UserError(
            f"--tasks {tasks}: two of one name",
            expected="files whose names differ",
            fix="copy one to another name",
        )
    return {
        "name": "evaluate",
        "backbones": rows_of(checkpoints, options),
        "tasks": {name: {"base": file} for name, file in files.items()},
    }


@app.command()
def plan(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A suite's YAML.")],
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show the cells of a suite: what is done, what is left, what would fail and why. Nothing is run.

    Exit codes: 0 all can run, 1 some would fail.
    """
    from mae_bench.runner.plan import plan_of, render
    from mae_bench.suite.config import load_suite

    found = plan_of(load_suite(suite, overrides or [], out))
    _answer(found, render(found), as_json)
    if any(cell["state"] == "would fail" for cell in found["cells"]):
        raise typer.Exit(FAILED)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder of runs, at any depth.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the report is written; by default RUNS/report.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", help="What the others are compared with; by default the suite's, else supervised."
        ),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Of the page.")] = "mae_bench leaderboard",
    as_json: Json = False,
) -> None:
    """Render the leaderboard of all records below a folder: terminal, Markdown, CSV, JSON and HTML."""
    from mae_bench.suite.config import baseline_of

    files = _report(
        runs,
        out or runs / "report",
        baseline or baseline_of(runs) or "supervised",
        title,
        None,
        quiet=as_json,
    )
    if as_json:
        _print_json({"report": files})
    else:
        print(*files, sep="\n")


@app.command()
def inspect(
    ckpt: Checkpoint,
    fields: Fields = None,
    format: Format = None,
    weights: Weights = None,
    trust: Trust = False,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", help="Try on these images how the weights want them fed and pooled: a suggestion."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what is in a checkpoint: format, architecture, sizes, digests, the spec with its origins, what becomes of each key.

    A file with several sets of weights is answered with the list of them.
    """
    from backbones.inspection import inspect_checkpoint, render, render_published

    found = inspect_checkpoint(ckpt, format, _values(fields), weights, trust=trust)
    if images is None:
        _answer(found, render(found), as_json)
        return
    if "sets" in found:
        raise UserError(
            f"{ckpt} holds {len(found['sets'])} sets of ViT weights", fix="say which with --weights NAME"
        )
    from rich.console import Group

    from backbones.preprocessing import render as render_probe
    from backbones.preprocessing import suggest

    tried = suggest(ckpt, images, format=format, weights=weights, trust=trust, overrides=_values(fields))
    shown = Group(render(found), "", render_probe(tried), "", render_published(found["published"]))
    _answer(found | {"suggestion": tried.to_dict()}, shown, as_json)


@app.command()
def convert(
    ckpt: Checkpoint,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file or folder to write; it must not exist.")
    ],
    to: Annotated[str, typer.Option("--to", help="A format that is written; any other word lists them.")],
    fields: Fields = None,
    format: Format = None,
    weights: Weights = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's backbone in another format; what is written is read back and must be bit-equal."""
    from backbones.target import check_target

    check_target(out, to)  # before torch is imported
    from backbones.convert import convert as write_as

    done = write_as(ckpt, out, to, format, weights=weights, trust=trust, overrides=_values(fields))
    counts = f"{len(done.renamed)} keys carried over, {len(done.dropped)} dropped with a reason, {len(done.new)} new"
    _answer(
        {"out": str(out), "to": to, "report": done.to_dict()},
        f"{ckpt} ({done.format}) -> {out} ({to}): {counts}",
        as_json,
    )


@app.command()
def verify(
    ckpt: Checkpoint,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="MODULE:CALLABLE",
            help="Your own code, which is run: it returns a torch module.",
        ),
    ],
    fields: Fields = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="A folder of images; by default random ones.")
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="How many of them.")] = 2,
    seed: Annotated[
        int, typer.Option("--seed", help="Of random images, or of the choice among those of a folder.")
    ] = 0,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0, help="Largest difference that passes, by the layer's largest value."
        ),
    ] = 1e-5,
    format: Format = None,
    weights: Weights = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run a checkpoint and another implementation on the same images and print how far apart they are, layer by layer.

    CALLABLE, in MODULE (from here, or installed), is called with CKPT's path if it takes an argument without a default. Its
    blocks are its first ModuleList or Sequential of as many members as ours. Exit code 1 for a difference above --tolerance.
    """
    from backbones.user_code import callable_named

    callable_named(against)  # before torch is imported, unless their code does
    from backbones.parity import render
    from backbones.parity import verify as compared

    options: dict[str, Any] = {
        "format": format,
        "weights": weights,
        "trust": trust,
        "overrides": _values(fields),
    }
    found = compared(
        ckpt, against, images=images, count=num_images, seed=seed, tolerance=tolerance, **options
    )
    chosen = {
        "source": ckpt,
        "against": against,
        "images": str(images or "random"),
        "num_images": num_images,
        "seed": seed,
    }
    _answer(chosen | found.to_dict(), render(found), as_json)
    if not found.equal:
        raise typer.Exit(FAILED)


def _values(fields: list[str] | None) -> dict[str, Any]:
    from mae_bench.config import resolve

    return resolve({}, Path.cwd(), fields or [])


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files.")],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="A pretraining's folder, or its mae.safetensors.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")],
    mask_ratio: Annotated[
        float, typer.Option("--mask-ratio", min=0.01, max=0.99, help="Share of patches removed.")
    ] = 0.75,
    seed: Annotated[int, typer.Option("--seed", help="Of the masks.")] = 0,
) -> None:
    """Draw what a masked autoencoder makes of images: original, masked, reconstructed, a row an image."""
    from backbones.mae import load_mae
    from mae_bench.pretrain.reconstruct import reconstruct_files

    reconstruct_files(load_mae(checkpoint), images, out, mask_ratio, seed)
    print(out)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Print versions, devices, which optional parts are there, and the command for what is missing."""
    from mae_bench.environment.doctor import examine, render

    found = examine()
    _answer(found, render(found), as_json)
    if found["problems"]:
        raise typer.Exit(FAILED)


@data_app.command("check")
def data_check(
    layout: Annotated[
        str, typer.Argument(metavar="LAYOUT", help="imagenet or its like; any other word lists them.")
    ],
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="The folder, or the pattern of shards, that should hold it.")
    ],
    thorough: Annotated[
        bool, typer.Option("--thorough", help="List every file again, also of sets that are known.")
    ] = False,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Decode every image (imagenet, images); exit code 1 if one fails."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that a folder holds data in a layout; name what was expected and what was found where it does not."""
    from dataclasses import asdict

    from mae_bench.data.checks.layouts import check_layout

    found = check_layout(layout, path, thorough=thorough)
    bad = _bad_images(layout, path, list(found.splits)) if decode else {}
    splits = ", ".join(f"{split}: {count} images" for split, count in found.splits.items())
    lines = [
        f"{found.name} ({layout}): {splits}; {len(found.classes)} classes",
        f"digest {found.digest}",
        *found.notes,
    ]
    told = _told(layout, path, found)
    lines += told
    lines += [
        f"{split}: {name} does not decode: {reason}"
        for split, names in bad.items()
        for name, reason in names.items()
    ]
    value = asdict(found) | {"notes": [*found.notes, *told]} | ({"bad_images": bad} if decode else {})
    _answer(value, "\n".join(lines), as_json)
    if any(bad.values()):
        raise typer.Exit(FAILED)


def _told(layout: str, path: str, found: "LayoutReport") -> list[str]:
    """What looks odd in a set of labelled images: it is nearly ImageNet-1k, or its splits share images."""
    from mae_bench.data.sets.open import open_images
    from tasks.imagenet.data import doubt, overlap_of

    if layout not in ("imagenet", "imagenet_val"):
        return []
    shared = (
        overlap_of(found, open_images(path, "train"), open_images(path, "val"))
        if layout == "imagenet"
        else ""
    )
    return [note for note in (doubt(found), shared) if note]


def _bad_images(layout: str, path: str, splits: list[str]) -> dict[str, dict[str, str]]:
    """For each split the images that do not decode, and why."""
    from rich.console import Console

    from mae_bench.data.checks.verify import bad_images
    from mae_bench.data.sets.open import open_images
    from mae_bench.environment.provenance import num_cores
    from mae_bench.runner.live import counting

    if layout not in ("imagenet", "images"):
        raise UserError(f"--decode with the layout {layout}", expected="imagenet or images")
    with counting(Console(stderr=True)) as progress:
        return {
            split: bad_images(open_images(path, split), num_cores(), partial(progress, split))
            for split in splits
        }


Images = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Images in any form that pretraining reads: a folder, shards, a URL."),
]
NewFolder = Annotated[
    Path, typer.Argument(metavar="OUT", help="The folder to write; a call that was stopped goes on in it.")
]


@data_app.command("pack")
def data_pack(
    source: Images,
    out: NewFolder,
    short_side: Annotated[
        int | None, typer.Option("--short-side", min=1, help="Pixels to reduce larger images to; 256.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option("--quality", min=1, max=100, help="Of the JPEGs; 90 where resized.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Store pixels: the fastest to read and the largest.")
    ] = False,
    original: Annotated[
        bool, typer.Option("--original", help="Store each image's bytes as they are.")
    ] = False,
    num_workers: Annotated[
        int | None, typer.Option("--num-workers", min=0, help="Processes; by default one a core.")
    ] = None,
) -> None:
    """Write a packed set: one file a split that every loader reads, smaller and faster than the images themselves."""
    from rich.console import Console

    from mae_bench.data.pack import pack_set
    from mae_bench.environment.provenance import num_cores
    from mae_bench.runner.live import counting

    if original and (raw or quality is not None or short_side is not None):
        raise UserError(
            "--original with --raw, --quality or --short-side",
            expected="--original alone: it keeps each image's bytes",
        )
    workers = num_cores() if num_workers is None else num_workers
    with counting(Console(stderr=True)) as progress:
        header = pack_set(source, out, short_side=None if original else short_side or 256, quality=quality, raw=raw,
                      num_workers=workers, progress=progress)  # fmt: skip
    for split, made in header["splits"].items():
        for name, reason in made["left_out"]:
            print(f"left out of {split}: {name}: {reason}", file=sys.stderr)
        print(f"{split}: {made['images']} images, {len(made['left_out'])} that do not decode left out")
    print(out)


@prepare_app.command("imagenet")
def data_prepare_imagenet(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="The folder with the archives as image-net.org publishes them."),
    ],
    out: NewFolder,
    val_classes: Annotated[
        Path | None,
        typer.Option(
            "--val-classes", help="A line a validation image: name and WNID; else the devkit tells."
        ),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Make a packed set instead, without unpacking the archives.")
    ] = False,
    short_side: Annotated[
        int | None, typer.Option("--short-side", min=1, help="Of a packed set; else images stay.")
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Take archives that are not the published ones.")
    ] = False,
) -> None:
    """Make the folders train/ and val/ of ImageNet-1K from the ILSVRC2012 archives, or a packed set."""
    from rich.console import Console

    from mae_bench.data.prepare import prepare_imagenet
    from mae_bench.data.sets.packed import How
    from mae_bench.environment.provenance import num_cores
    from mae_bench.runner.live import counting

    if short_side and not packed:
        raise UserError(
            "--short-side without --packed",
            expected="both, or none: class folders keep the images as they are",
        )
    how = How(short_side=short_side) if packed else None
    with counting(Console(stderr=True)) as progress:
        made = prepare_imagenet(
            source,
            out,
            progress,
            check=not no_check,
            val_classes=val_classes,
            packed=how,
            num_workers=num_cores(),
        )
    print(f"{out}: train: {made.train} images, val: {made.val} images; {made.classes} classes")


def _run(
    source: Source, overrides: list[str] | None, out: Path | None, jobs: int | None, as_json: bool
) -> None:
    """Runs a suite here; or, where a launcher started several processes, on rank 0 with the others' help."""
    from mae_bench.runner.launcher import Company, launched
    from mae_bench.runner.runner import stop_requests

    changes = [*(overrides or []), *([f"jobs={jobs}"] if jobs else [])]
    if not launched():
        _run_suite(source, changes, out, as_json, None)
        return
    if os.environ.get("RANK") == "0":
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(f"{os.environ['WORLD_SIZE']} processes were launched; they meet at {place}", file=sys.stderr)
    company = Company()
    if company.rank:
        with stop_requests() as stop:
            company.follow(stop)
        return
    try:
        _run_suite(source, changes, out, as_json, company)
    finally:
        company.dismiss()


def _run_suite(
    source: Source, changes: list[str], out: Path | None, as_json: bool, company: "Company | None"
) -> None:
    from rich.console import Console

    from mae_bench.environment.provenance import command_line
    from mae_bench.runner.live import view_for
    from mae_bench.runner.runner import run_suite
    from mae_bench.suite.config import load_suite

    suite = load_suite(source() if callable(source) else source, changes, out)
    with view_for(Console(stderr=True)) as view:
        results = run_suite(suite, view, command_line(), company)
    folder, only = Path(suite.out), {cell.dir for cell, _ in results}
    files = _report(
        folder, folder / "report", suite.row_of_baseline, suite.name, only, quiet=as_json or not suite.tasks
    )
    _conclude(suite, results, files, as_json)


def _conclude(
    suite: "SuiteConfig",
    results: "list[tuple[Cell, ResultRecord | Failure]]",
    files: list[str],
    as_json: bool,
) -> None:
    """The last words of a run, and its exit code."""
    from mae_bench.job import EXPORT
    from mae_bench.runner.plan import as_dict, counts
    from mae_bench.suite.cell import BACKBONE

    cells = [as_dict(cell, result) for cell, result in results]
    exports = [cell.dir / EXPORT for cell, _ in results if (cell.dir / EXPORT).is_dir()]
    if as_json:
        _print_json({"suite": suite.name, "out": suite.out, "cells": cells, "report": files})
    else:
        print(f"\n{counts(cells)}, in {suite.out}")
        print("\n".join(map(str, [*exports, *files])))
    lost = [
        cell
        for cell in cells
        if cell["state"] == "failed" or (cell["task"] == BACKBONE and cell["state"] != "done")
    ]
    if lost:  # a transfer that is not installed was known to be left out; a backbone was asked for
        raise typer.Exit(FAILED)


def _report(
    runs: Path, out: Path, baseline: str, title: str, only: set[Path] | None, *, quiet: bool
) -> list[str]:
    """Writes the report, prints its table unless `quiet`, returns the files' paths."""
    from leaderboard.compare import compare
    from leaderboard.index import load_runs
    from leaderboard.render.terminal import print_comparison
    from leaderboard.report import write_report

    files = write_report(runs, out, baseline, title, only)
    if not quiet:
        from rich.console import Console

        width = None if sys.stdout.isatty() else WIDTH
        print_comparison(compare(load_runs(runs, only), baseline), Console(width=width))
    return [str(file) for file in files]


def _answer(value: Any, rendered: Any, as_json: bool) -> None:
    """Prints one answer: for a program, or for a person."""
    if as_json:
        _print_json(value)
    else:
        from rich.console import Console

        console = Console(highlight=False, markup=False, soft_wrap=isinstance(rendered, str))
        console.print(rendered, crop=False)  # a line to copy is whole


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


if __name__ == "__main__":
    main()
