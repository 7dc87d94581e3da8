"""Every kind of file that mae-bench reads back, at toy size, and what reads it."""

import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from backbones.classifier import load_head, write_head
from backbones.config import CheckpointConfig
from backbones.describe import describe
from backbones.load import load_backbone
from backbones.mae import load_mae
from leaderboard.render.json import render_json
from leaderboard.report import load_results
from mae_bench.config import build
from mae_bench.data.pack import pack_set
from mae_bench.data.sets import index, packing
from mae_bench.data.sets.open import open_images
from mae_bench.errors import Interrupted, UserError
from mae_bench.export import digest_tensors
from mae_bench.files import write_json
from mae_bench.job import STATES, Job, Outcome
from mae_bench.progress import EVENTS_FILE, Progress
from mae_bench.record import FAILURE_FILE, write_failure
from mae_bench.registry import kind, load_object
from mae_bench.runner.status import WorkerStatus
from mae_bench.runner.worker import Order, work
from mae_bench.suite.cell import Cell
from mae_bench.suite.config import SUITE_FILE, baseline_of
from tasks.imagenet.evaluate import select_best_epoch

ANSWERS = ("cells/*/*/record.json", "cells/*/*/failure.json")  # of cells, in a folder of runs
MODEL = {"img_size": (16, 16), "patch_size": (8, 8), "embed_dim": 16, "depth": 1, "num_heads": 2}
PRETRAIN = {
    "kind": "pretrain",
    "protocol": "toy",
    "model": MODEL,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "epochs": 2,
    "base_lr": 0.01,
    "global_batch_size": 4,
    "num_reconstructions": 1,
    "checkpoint_seconds": 0,
    "num_workers": 0,
}
EVALUATE = {"protocol": "toy", "crop_pct": 1.0, "eval_batch_size": 1, "num_workers": 0}
KNN = {"kind": "knn", **EVALUATE, "ks": [3], "k": 3}
FINETUNE = {
    "kind": "finetune",
    **EVALUATE,
    "epochs": 2,
    "warmup_epochs": 0.5,
    "base_lr": 0.3,
    "global_batch_size": 4,
    "crop_scale": (0.9, 1.0),
    "auto_augment": None,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
}


@dataclass(frozen=True)
class Case:
    """Files below `folder` and what reads them.

    read: returns a result to compare; raises UserError if it refuses a file. Messages go to `Listener`.
    files: patterns of the files to damage.
    """

    name: str
    folder: Path
    read: Callable[[], object]
    files: tuple[str, ...]

    def list_files(self) -> list[Path]:
        """Return the files to damage, in order, without empty ones and locks."""
        found = {path for pattern in self.files for path in self.folder.glob(pattern)}
        return sorted(
            path for path in found if path.is_file() and path.stat().st_size and path.suffix != ".lock"
        )


@dataclass(frozen=True)
class Observed:
    """What came of reading: a result and messages, or a refusal, or the traceback of an unexpected error."""

    result: object = None
    messages: tuple[str, ...] = ()
    is_refused: bool = False
    traceback: str = ""


class Listener(Progress, logging.Handler):
    """Collect what a user would be told: notes of jobs and warnings in the log."""

    def __init__(self) -> None:
        Progress.__init__(self)
        logging.Handler.__init__(self, logging.WARNING)
        self.messages: list[str] = []

    def note(self, message: str) -> None:
        self.messages.append(message)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class StopsAt(Listener):
    """Ask the job to stop after a number of steps."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def step(self, done: float, **values: float | str) -> None:
        self._stop = done >= self.number
        super().step(done, **values)


def observe(case: Case, listener: Listener) -> Observed:
    """Read the files of a case."""
    listener.messages.clear()
    os.environ["MAE_BENCH_CACHE"] = str(case.folder / "cache")
    try:
        result = case.read()
    except UserError as error:
        return Observed(messages=(str(error),), is_refused=True)
    except Exception:
        return Observed(traceback=traceback.format_exc())
    return Observed(result, tuple(listener.messages))


def write_images(root: Path) -> None:
    """Write 12 training and 6 validation images of 16 x 16 pixels in three classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def run_job(
    values: dict[str, Any], images: Path, folder: Path, progress: Progress, backbone: str = "", *earlier: Path
) -> Outcome:
    """Run a job in a folder, as the worker does; return its outcome without times."""
    table = kind(values["kind"])
    config = build(load_object(table.config), {**values, "data": str(images)}, "faults")
    folder.mkdir(parents=True, exist_ok=True)
    outcome: Outcome = load_object(table.run)(
        config, Job("toy", values["kind"], {}, folder, 0, backbone, earlier=earlier), progress
    )
    return replace(outcome, cost={})


def build_cases(root: Path, listener: Listener) -> list[Case]:
    """Write all files that are read back, each kind in its own folder; return their readers."""
    images, backbone = root / "images", root / "backbone"
    write_images(images)
    run_job(PRETRAIN, images, backbone, listener)
    source = str(backbone / "export")
    builders = [build_state, build_caches, build_exports, build_description, build_packed, build_part]
    builders += [build_epochs, build_blocks, build_trained]
    cases = [builder(root, images, source, listener) for builder in builders]
    return [*cases, *build_runs(root, images, source, listener)]


def build_state(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """A pretraining that was stopped; resumed, it ends with the same weights and losses."""
    folder = root / "state"
    with suppress(Interrupted):
        run_job(PRETRAIN, images, folder, StopsAt(4))
    newest = sorted(folder.glob("checkpoints/step-*"))[-1].name
    return Case(
        "state of a training",
        folder,
        lambda: run_job(PRETRAIN, images, folder, listener),
        (f"checkpoints/{newest}/*",),
    )


def build_caches(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """Features, indexes, digests and overlap that an evaluation takes from the cache."""
    folder = root / "caches"
    case = Case(
        "cache of an evaluation",
        folder,
        lambda: run_job(KNN, images, folder / "cell", listener, source),
        ("cache/**/*",),
    )
    observe(case, listener)
    return case


def build_exports(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """The backbone, its head and the autoencoder that transfers and pictures start from."""
    folder = root / "exports"
    shutil.copytree(Path(source).parent, folder)
    vit, spec, _ = load_backbone(folder / "export")
    head = torch.nn.Linear(spec.embed_dim, 3)
    write_head(folder / "export", head, ["a", "b", "c"], spec)

    def digest_of(module: torch.nn.Module) -> str:
        return digest_tensors(module.state_dict())

    def read() -> object:
        vit, spec, _ = load_backbone(folder / "export")
        head, classes = load_head(folder / "export")
        mae, _, _ = load_mae(folder)
        return [*map(digest_of, (vit, head, mae)), spec, classes, mae.options]

    return Case("export", folder, read, ("export/*", "*.safetensors"))


def build_description(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """What is kept about a checkpoint that was described before."""
    folder = root / "description"
    values = {"kind": "checkpoint", "source": source, "spec": {"pretrain_data": "toy"}}
    config = build(CheckpointConfig, values, "faults")
    case = Case("description of a checkpoint", folder, lambda: describe(config), ("cache/specs/*",))
    observe(case, listener)
    return case


def build_packed(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """A packed set; an image that cannot be read is reported by name and left out."""
    folder = root / "packed"
    pack_set(images, folder / "set")

    def read() -> object:
        found = open_images(folder / "set", "train")
        content = []
        for i in range(len(found)):
            try:
                content.append((found.name(i), found.read(i), int(found.targets[i])))
            except OSError as error:
                listener.note(f"{found.name(i)}: {error}")
        return found.digest, found.classes, content

    return Case("packed set", folder, read, ("set/packed.json", "set/train.*"))


def build_part(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """A pack that was stopped; resumed, it ends with the same files."""
    folder = root / "part"

    def stop(split: str, done: int, total: int) -> None:
        if done > packing.WINDOW:
            raise Interrupted

    with suppress(Interrupted):
        pack_set(images, folder / "set", progress=stop)
    return Case("pack in progress", folder, lambda: pack_set(images, folder / "set"), ("set/*",))


def build_epochs(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """The evaluations made during a fine-tuning."""
    folder = root / "epochs"
    run_job(FINETUNE | {"eval_epochs": 1}, images, folder, listener, source)
    job = Job("toy", "finetune", {}, folder, 0, source)
    return Case("evaluations of epochs", folder, lambda: select_best_epoch(job, 9.0, 0.0), ("epochs.json",))


def build_blocks(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """The finished part of a partial fine-tuning."""
    folder = root / "blocks"
    values = FINETUNE | {"kind": "partial_finetune", "blocks": [1], "score": 1}
    case = Case(
        "part of a partial fine-tuning",
        folder,
        lambda: run_job(values, images, folder, listener, source),
        ("*/outcome.json",),
    )
    observe(case, listener)
    return case


def build_trained(root: Path, images: Path, source: str, listener: Listener) -> Case:
    """A trained model that another cell evaluates; a damaged one is trained again."""
    folder = root / "trained"
    run_job(FINETUNE, images, folder / "earlier", listener, source)
    shutil.rmtree(folder / "earlier" / STATES)

    def read() -> object:
        shutil.rmtree(folder / "cell", ignore_errors=True)
        return run_job(FINETUNE, images, folder / "cell", listener, source, folder / "earlier").metrics

    return Case("trained model of another cell", folder, read, ("earlier/trained/*",))


def build_runs(root: Path, images: Path, source: str, listener: Listener) -> list[Case]:
    """A folder of runs: record, failure and suite for the report, order and events for the runner."""
    folder = root / "runs"
    cells = []
    for name in ("mae", "other"):
        place = folder / "cells" / name / "knn-s0-0"
        place.mkdir(parents=True)
        config = {**KNN, "data": str(images)}
        upstream = Path(source).parent
        cell = Cell(name, "knn", "imagenet", "knn", config, 0, "key", place, upstream)
        cells.append(Order(cell, kind("knn"), "cpu", 1, "mae-bench run suite"))
        cells[-1].write()
    done, failed = cells
    os.environ["MAE_BENCH_CACHE"] = str(root / "caches" / "cache")
    work(done, Progress(done.cell.dir / EVENTS_FILE))
    write_failure(failed.cell.failure("no memory"), failed.cell.dir / FAILURE_FILE)
    write_json(folder / SUITE_FILE, {"baseline": "mae", "backbones": {"mae": {}, "other": {}}})

    def report() -> object:
        results = load_results(folder, baseline_of(folder))
        listener.messages += [*results.runs.problems, *results.comparison.notes]
        return render_json(results.comparison, "")

    def follow() -> object:
        status = WorkerStatus("mae", done.cell.dir / EVENTS_FILE)
        return status.poll() and None  # shown once, and no result depends on it

    return [
        Case(
            "report of a folder of runs",
            folder,
            report,
            ("suite.json", "cells/*/*/record.json", "cells/*/*/failure.json"),
        ),
        Case("order to a worker", folder, lambda: Order.read(done.cell.dir), ("cells/mae/*/cell.json",)),
        Case("events of a worker (display only)", folder, follow, ("cells/mae/*/events.jsonl",)),
    ]


@contextmanager
def small_caches() -> Iterator[None]:
    """Cache the index of any set, and pack few images between two entries of the journal."""
    before = index.MIN_CACHED, index.SETTLED_SECONDS, packing.WINDOW
    index.MIN_CACHED, index.SETTLED_SECONDS, packing.WINDOW = 1, 0.0, 4
    try:
        yield
    finally:
        index.MIN_CACHED, index.SETTLED_SECONDS, packing.WINDOW = before
