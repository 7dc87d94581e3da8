"""Partial fine-tuning: the last n blocks alone, for several n, as one curve (arXiv 2111.06377, Figure 9)."""

import json
import shutil
from dataclasses import asdict, replace

from backbones.load import translate
from backbones.reading.source import open_source
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.errors import UserError
from mae_bench.files import write_json
from mae_bench.job import STATES, Job, Outcome
from mae_bench.progress import Progress
from mae_bench.record import Metric
from tasks.imagenet import linear_probe
from tasks.imagenet.config import PartialFinetuneConfig
from tasks.imagenet.finetune import fine_tune

CURVE_FILE = "curve.json"
OUTCOME_FILE = "outcome.json"
ADDED_UP = ("seconds_train", "seconds_eval")


def run(config: PartialFinetuneConfig, job: Job, progress: Progress) -> Outcome:
    """top1 for every number of tuned blocks (`top1_blocks_N`); top1, top5 and loss are those of config.score.

    Each is trained in a folder of its own below the job's; what is finished is not trained again.
    """
    depth = translate(open_source(job.backbone))[2].depth
    counts = sorted({count for count in config.blocks if count <= depth})
    if config.score not in counts:
        raise UserError(
            f"score {config.score:g} with a backbone of {depth} blocks", expected=f"one of {counts}"
        )
    found = {}
    for number, count in enumerate(counts, 1):
        progress.note(f"{count:g} of {depth} blocks, {number} of {len(counts)}")
        found[count] = _trained(config, job, progress, count)
    curve = {f"{count:g}": outcome.metrics["top1"].value for count, outcome in found.items()}
    if world().is_main:
        write_json(job.dir / CURVE_FILE, {"depth": depth, "top1": curve})
    scored = found[config.score]
    artefacts = {name: f"{folder_of(config.score)}/{path}" for name, path in scored.artefacts.items()}
    return replace(
        scored,
        metrics=scored.metrics | {f"top1_blocks_{count}": Metric(top1) for count, top1 in curve.items()},
        cost=scored.cost | {name: sum(outcome.cost[name] for outcome in found.values()) for name in ADDED_UP},
        artefacts=artefacts | {"curve": CURVE_FILE},
    )


def folder_of(count: float) -> str:
    """Where so many blocks are trained, below the job's folder."""
    return f"blocks-{count:g}"


def _trained(config: PartialFinetuneConfig, job: Job, progress: Progress, count: float) -> Outcome:
    """The outcome of one number of blocks, trained now or found finished."""
    part = replace(job, dir=job.dir / folder_of(count))
    part.dir.mkdir(exist_ok=True)
    path = part.dir / OUTCOME_FILE
    finished = gather_over_ranks(
        path.read_text(encoding="utf-8") if world().is_main and path.is_file() else ""
    )[0]
    if finished:
        value = json.loads(finished)
        return Outcome(
            **value | {"metrics": {name: Metric(**metric) for name, metric in value["metrics"].items()}}
        )
    outcome = (
        fine_tune(config, part, progress, count)
        if count
        else linear_probe.run(config.probe(), part, progress)
    )
    if world().is_main:
        write_json(path, asdict(outcome))
        shutil.rmtree(part.dir / STATES, ignore_errors=True)
    return outcome
