"""Partial fine-tuning: train only the last n blocks, for several n (arXiv 2111.06377, Figure 9)."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backbones.load import translate
from backbones.reading.source import open_source
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.job import STATES, Job, Outcome
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.seal import BrokenSeal, read_sealed_json, seal_json
from tasks.imagenet import linear_probe
from tasks.imagenet.config import PartialFinetuneConfig
from tasks.imagenet.finetune import fine_tune

CURVE_FILE = "curve.json"
OUTCOME_FILE = "outcome.json"
SUMMED_COSTS = ("seconds_train", "seconds_eval")


def run(config: PartialFinetuneConfig, job: Job, progress: Progress) -> Outcome:
    """Compute top1 per number of tuned blocks (`top1_blocks_N`).

    top1, top5 and loss are those of config.score. Each number of blocks is trained in its own folder below
    the job's; finished ones are not trained again.
    """
    depth = translate(open_source(job.backbone))[2].depth
    counts = sorted({count for count in config.blocks if count <= depth})
    if config.score not in counts:
        raise UserError(
            f"score {config.score:g} with a backbone of {depth} blocks", expected=f"one of {counts}"
        )
    outcomes = {}
    for number, count in enumerate(counts, 1):
        progress.note(f"{count:g} of {depth} blocks, {number} of {len(counts)}")
        outcomes[count] = _train(config, job, progress, count)
    curve = {f"{count:g}": outcome.metrics["top1"].value for count, outcome in outcomes.items()}
    if world().is_main:
        write_json(job.dir / CURVE_FILE, {"depth": depth, "top1": curve})
    scored = outcomes[config.score]
    folder = get_folder_name(config.score)
    artefacts = {name: f"{folder}/{path}" for name, path in scored.artefacts.items()}
    summed = {name: sum(outcome.cost[name] for outcome in outcomes.values()) for name in SUMMED_COSTS}
    kept = {
        f"trained_blocks_{count:g}": f"{get_folder_name(count)}/{outcome.artefacts['trained']}"
        for count, outcome in outcomes.items()
        if "trained" in outcome.artefacts
    }
    return replace(
        scored,
        metrics=scored.metrics | {f"top1_blocks_{count}": Metric(top1) for count, top1 in curve.items()},
        cost=scored.cost | summed,
        artefacts=artefacts | kept | {"curve": CURVE_FILE},
    )


def get_folder_name(count: float) -> str:
    """Return the name of the folder, in the job's, for this number of blocks."""
    return f"blocks-{count:g}"


def _train(config: PartialFinetuneConfig, job: Job, progress: Progress, count: float) -> Outcome:
    """Train with this number of blocks, or return the outcome of a run that is already finished."""
    name = get_folder_name(count)
    part = replace(job, dir=job.dir / name, earlier=tuple(cell / name for cell in job.earlier))
    part.dir.mkdir(exist_ok=True)
    path = part.dir / OUTCOME_FILE
    finished = gather_over_ranks(_read_outcome(path, progress) if world().is_main else None)[0]
    if finished:
        return _parse_outcome(finished)
    if count:
        # Only this number of blocks decides the training
        alone = config.model_copy(update={"blocks": [count], "score": count, "linear": {}})
        outcome = fine_tune(alone, part, progress, count)
    else:
        outcome = linear_probe.run(config.build_probe_config(), part, progress)
    if world().is_main:
        write_json(path, seal_json(asdict(outcome)))
        shutil.rmtree(part.dir / STATES, ignore_errors=True)
    return outcome


def _read_outcome(path: Path, progress: Progress) -> dict[str, Any] | None:
    """Return the outcome of a finished run; None if there is none, or with a note if it is damaged."""
    try:
        return read_sealed_json(path)
    except FileNotFoundError:
        return None
    except BrokenSeal as error:
        progress.note(f"{error.given}; these blocks are trained again")
        return None


def _parse_outcome(value: dict[str, Any]) -> Outcome:
    metrics = {name: Metric(**metric) for name, metric in value["metrics"].items()}
    return Outcome(**value | {"metrics": metrics})
