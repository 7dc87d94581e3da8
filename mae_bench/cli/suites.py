"""Commands on suites and their results: demo, run, pretrain, evaluate, plan, report."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mae_bench.cli.options import DryRun, Format, Jobs, Json, Out, Overrides, Weights
from mae_bench.cli.output import FAILED, print_answer, print_json
from mae_bench.errors import UserError

if TYPE_CHECKING:
    from mae_bench.record import Failure, ResultRecord
    from mae_bench.runner.launcher import LaunchGroup
    from mae_bench.suite.cell import Cell
    from mae_bench.suite.config import SuiteConfig

DEMO = "suites/demo.yaml"
FILE_WIDTH = 100  # columns of a table that is written to a file

# The file of a suite, or a function that returns its content: launched ranks other than 0 never call it.
Source = str | Callable[[], dict[str, Any]]


def demo(
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run the full benchmark once on generated toy data: three backbones, four tasks, a leaderboard."""
    _run(DEMO, overrides, out, jobs, dry_run, as_json)


def run(
    suite: Annotated[
        str,
        typer.Argument(metavar="SUITE", help="A suite: a YAML file, or a packaged one (suites/demo.yaml)."),
    ],
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run every unfinished cell of a suite, then write the report.

    tasks.NAME=null or backbones.NAME=null leaves a task or a backbone out, for example tasks.maskrcnn=null.
    """
    _run(suite, overrides, out, jobs, dry_run, as_json)


def pretrain(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="The config of a job that trains a backbone, e.g. pretrain/demo.yaml."
        ),
    ],
    overrides: Overrides = None,
    out: Out = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed for weight initialisation and data order.")] = 0,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Number of training processes; one per GPU by default."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option("--device", help="The device to train on.")
    ] = "auto",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train one backbone. Every other command reads the folder `export/` in its output as a checkpoint.

    On several machines: torchrun ... -m mae_bench pretrain CONFIG ..., or the same with srun; --out must be
    on a shared disk.
    """
    from mae_bench.suite.config import suite_of_job

    settings: dict[str, Any] = {"backbone_seed": seed, "device": device}
    if processes:
        settings["processes"] = processes
    _run(lambda: suite_of_job(config, overrides or []) | settings, None, out, None, dry_run, as_json)


def evaluate(
    checkpoint: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            help="A checkpoint, a quoted pattern ('ckpts/*.pth') or a YAML list of them; repeatable.",
        ),
    ],
    tasks: Annotated[
        str, typer.Option("--tasks", help="Names in configs/tasks, or YAML files, separated by commas.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    format: Format = None,
    weights: Weights = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Transfer given checkpoints to given tasks.

    State where the data is: data.root=PATH, or data.imagenet=PATH and so on. --format and --weights
    apply to every checkpoint except the rows of a YAML list, which have their own.
    """
    options: dict[str, Any] = {"format": format, "weights": weights}
    given = {key: value for key, value in options.items() if value is not None}
    _run(lambda: _evaluation_suite(checkpoint, tasks, given), overrides, out, jobs, dry_run, as_json)


def _evaluation_suite(checkpoints: list[str], tasks: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the suite that transfers the checkpoints to the tasks."""
    from mae_bench.config import task_file
    from mae_bench.suite.rows import rows_of

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    files = {Path(name).stem: task_file(name) for name in names}
    if len(files) < len(names):
        raise UserError(
            f"--tasks {tasks}: two of one name",
            expected="files with different names",
            fix="copy one to another name",
        )
    return {
        "name": "evaluate",
        "backbones": rows_of(checkpoints, options),
        "tasks": {name: {"base": file} for name, file in files.items()},
    }


def plan(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE", help="A suite, or a config of `pretrain`, which is planned as it would run."
        ),
    ],
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Print the cells of a suite: which are done, which are left, which would fail and why. Nothing is run.

    Overrides are those of `run`, or of `pretrain` for its configs. Exit codes: 0 all can run, 1 some would
    fail.
    """
    from mae_bench.suite.config import is_job, suite_of_job

    if is_job(suite):
        _print_plan(lambda: suite_of_job(suite, overrides or []), [], out, as_json)
    else:
        _print_plan(suite, overrides or [], out, as_json)


def _print_plan(source: Source, changes: list[str], out: Path | None, as_json: bool) -> None:
    from mae_bench.runner.plan import plan_of, render
    from mae_bench.suite.config import load_suite

    found = plan_of(load_suite(source() if callable(source) else source, changes, out))
    print_answer(found, render(found), as_json)
    if any(cell["state"] == "would fail" for cell in found["cells"]):
        raise typer.Exit(FAILED)


def report(
    runs: Annotated[
        Path | None, typer.Argument(metavar="RUNS", help="A folder that contains runs, at any depth.")
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(
            "--published",
            metavar="NAME",
            help="A board of published results instead of runs: imagenet-finetune, coco, mae ...",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to write; RUNS/report by default, none for --published."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="The backbone to compare with; by default the baseline of the suite, else supervised.",
        ),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Title of the page.")] = "mae_bench leaderboard",
    as_json: Json = False,
) -> None:
    """Write the leaderboard of all records in a folder: terminal, Markdown, CSV, JSON and HTML."""
    from mae_bench.suite.config import baseline_of

    if published is not None and runs is None:
        _report_published(published, out, as_json)
        return
    if runs is None or published is not None:
        raise typer.BadParameter("name either a folder of runs or, with --published, a board")
    baseline = baseline or baseline_of(runs) or "supervised"
    files = _write_report(runs, out or runs / "report", baseline, title, None, quiet=as_json)
    if as_json:
        print_json({"report": files})
    else:
        print(*files, sep="\n")


def _report_published(name: str, out: Path | None, as_json: bool) -> None:
    """Print a board of published results, and write it to a folder if one is named."""
    from rich.console import Console

    from leaderboard.boards import build_board, build_json, write_board
    from leaderboard.render.terminal import print_report

    board = build_board(name)
    files = [str(path) for path in write_board(name, out)] if out else []
    if as_json:
        print_json(build_json(name) | {"report": files})
        return
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, markup=False)
    console.print(f"{board.title}\n{board.lead}\n")
    print_report(board, console)
    if files:
        print(*files, sep="\n")


def _run(
    source: Source,
    overrides: list[str] | None,
    out: Path | None,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a suite; of several launched processes, rank 0 runs it and the others follow its orders."""
    from mae_bench.runner.launcher import LaunchGroup, launched
    from mae_bench.runner.runner import stop_requests

    changes = list(overrides or [])
    if jobs:
        changes.append(f"jobs={jobs}")
    if dry_run:
        _print_plan(source, changes, out, as_json)
        return
    if not launched():
        _run_suite(source, changes, out, as_json, None)
        return
    if os.environ.get("RANK") == "0":
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(f"{os.environ['WORLD_SIZE']} processes launched; rendezvous at {address}", file=sys.stderr)
    group = LaunchGroup()
    if group.rank:
        with stop_requests() as stop:
            group.follow(stop)
        return
    try:
        _run_suite(source, changes, out, as_json, group)
    finally:
        group.dismiss()


def _run_suite(
    source: Source, changes: list[str], out: Path | None, as_json: bool, group: "LaunchGroup | None"
) -> None:
    from rich.console import Console

    from mae_bench.environment.provenance import command_line
    from mae_bench.runner.live import view_for
    from mae_bench.runner.runner import run_suite
    from mae_bench.suite.config import load_suite

    suite = load_suite(source() if callable(source) else source, changes, out)
    with view_for(Console(stderr=True), None if as_json else Console()) as view:
        results = run_suite(suite, view, command_line(), group)
    files = _write_report(
        Path(suite.out),
        Path(suite.out) / "report",
        suite.row_of_baseline,
        suite.name,
        {cell.dir for cell, _ in results},
        quiet=as_json or not suite.tasks,
    )
    _conclude(suite, results, files, as_json)


def _conclude(
    suite: "SuiteConfig",
    results: "list[tuple[Cell, ResultRecord | Failure]]",
    files: list[str],
    as_json: bool,
) -> None:
    """Print the summary of a run; exit with 1 if a cell failed."""
    from mae_bench.job import EXPORT
    from mae_bench.runner.plan import as_dict, counts
    from mae_bench.suite.cell import BACKBONE

    cells = [as_dict(cell, result) for cell, result in results]
    if as_json:
        print_json({"suite": suite.name, "out": suite.out, "cells": cells, "report": files})
    else:
        exports = [cell.dir / EXPORT for cell, _ in results if (cell.dir / EXPORT).is_dir()]
        print(f"\n{counts(cells)}, in {suite.out}")
        print(*exports, *files, sep="\n")
    for cell in cells:
        # A transfer that is "not installed" is skipped; a backbone was requested and must be made.
        if cell["state"] == "failed" or (cell["task"] == BACKBONE and cell["state"] != "done"):
            raise typer.Exit(FAILED)


def _write_report(
    runs: Path, out: Path, baseline: str, title: str, only: set[Path] | None, *, quiet: bool
) -> list[str]:
    """Write the report, print its table unless `quiet`, and return the paths of the files."""
    from leaderboard.render.terminal import print_report
    from leaderboard.report import build_report, load_results, write_files

    results = load_results(runs, baseline, only)
    built = build_report(results, title)
    files = write_files(results, built, out)
    if not quiet:
        from rich.console import Console

        width = None if sys.stdout.isatty() else FILE_WIDTH
        print_report(built, Console(width=width))
    return [str(file) for file in files]
