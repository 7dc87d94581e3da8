"""UperNet on the ADE20K layout with a pretrained ViT, trained by mmengine and scored by mmsegmentation."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import backbones.adapters.mmseg  # noqa: F401 - imported first: it reports what is not installed
from backbones.load import load_backbone
from mae_bench.data.checks.layouts import check_layout
from mae_bench.files import write_atomic, write_json
from mae_bench.job import Job, Outcome
from mae_bench.logs import log_to
from mae_bench.models.cost import num_params
from mae_bench.progress import Progress
from tasks.ade20k.config import UPerNetConfig
from tasks.ade20k.metrics import MAIN_METRIC, Areas, compute_metrics, score_per_class
from tasks.ade20k.mmseg_config import build_mmseg_config, get_bad_file
from tasks.ade20k.training import LOG_FILE, JobHook, JobRunner, build_runner, dump_config
from tasks.context import TaskContext
from tasks.states import TrainerStates
from tasks.trained import Training, add_training, train_once

CONFIG_FILE = "mmseg_config.py"
PER_CLASS_FILE = "per_class.json"
PER_IMAGE_FILE = "per_image.npz"

Seconds = float


def run(config: UPerNetConfig, job: Job, progress: Progress) -> Outcome:
    """Train on training, from the job's last state if there is one, and score validation.

    The metrics are mIoU, mAcc and aAcc in percent. Raise UserError for data not in ADE20K's layout, too many
    images that do not decode or a loss that is not finite, and Interrupted, after saving, on request.
    """
    progress.stage("check data")
    layout = check_layout("ade20k", config.data)
    job.dir.mkdir(parents=True, exist_ok=True)
    with log_to(job.dir / LOG_FILE):
        _, spec, report = load_backbone(job.backbone)
        context = TaskContext(config, job, progress, layout, spec, report)
        parts = build_mmseg_config(context)
        dump_config(parts, job.dir / CONFIG_FILE)
        runner, training = _train(context, parts)
        areas, seconds_eval = _evaluate(runner, progress)
    _write_artefacts(job.dir, runner, areas, list(layout.classes))
    outcome = context.build_outcome(
        "ade20k",
        "validation",
        len(areas),
        compute_metrics(areas),
        MAIN_METRIC,
        num_params=num_params(runner.model),
        cost={"seconds_eval": seconds_eval},
        notes=_build_notes(runner),
        artefacts={
            "per_class": PER_CLASS_FILE,
            "per_image": PER_IMAGE_FILE,
            "mmseg_config": CONFIG_FILE,
            "log": LOG_FILE,
        },
    )
    return add_training(context, outcome, training)


def _train(context: TaskContext[UPerNetConfig], parts: dict[str, Any]) -> tuple[JobRunner, Training]:
    """Return the Runner with the trained model."""
    config, job = context.config, context.job
    states = TrainerStates(context)
    state = states.find()
    get_bad_file(job, "validation").unlink(missing_ok=True)  # all its images are read again
    if state is None:
        get_bad_file(job, "training").unlink(missing_ok=True)
    runner, seconds = build_runner(parts, state)
    bad = runner.train_dataloader.dataset.bad
    hook = JobHook(context, states, bad, seconds)
    runner.register_hook(hook)

    def train() -> tuple[nn.Module, Training]:
        context.progress.stage("train", config.iterations)
        runner.train()
        images_per_second = config.iterations * config.global_batch_size / hook.seconds
        return runner.model, Training(hook.seconds, images_per_second, bad.check().names)

    _, training = train_once(context, "training", runner.model, train)
    if training.reused:
        runner.skip_resuming()
    for name, reason in training.bad_images.items():
        bad.add(name, reason)
    return runner, training


def _evaluate(runner: JobRunner, progress: Progress) -> tuple[Areas, Seconds]:
    progress.stage("evaluate", len(runner.val_dataloader))
    began = time.perf_counter()
    runner.val()
    (metric,) = runner.val_evaluator.metrics
    return metric.areas, time.perf_counter() - began


def _build_notes(runner: JobRunner) -> list[str]:
    """Return notes on the images that did not decode, which were neither trained on nor scored."""
    loaders = {"training": runner.train_dataloader, "validation": runner.val_dataloader}
    notes = {split: loader.dataset.bad.check().note() for split, loader in loaders.items()}
    return [f"{split}: {note} (left out)" for split, note in notes.items() if note]


def _write_artefacts(folder: Path, runner: JobRunner, areas: Areas, classes: list[str]) -> None:
    """Write the IoU per class, and the pixel sums per image, which give the score of any subset."""
    dataset = runner.val_dataloader.dataset
    names = np.array([Path(dataset.get_data_info(i)["img_path"]).name for i in range(len(dataset))])
    write_json(folder / PER_CLASS_FILE, score_per_class(areas, classes))
    write_atomic(folder / PER_IMAGE_FILE, lambda file: np.savez_compressed(file, names=names, areas=areas))
