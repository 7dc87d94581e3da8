"""UperNet on ADE20K's layout with a pretrained ViT: trained by mmengine's Runner, scored by mmsegmentation's IoUMetric."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import backbones.adapters.mmseg  # noqa: F401 - first of all: it names what is not installed
from backbones.load import load_backbone
from mae_bench.data.checks.layouts import check_layout
from mae_bench.files import write_atomic, write_json
from mae_bench.job import Job, Outcome
from mae_bench.logs import log_to
from mae_bench.models.cost import num_params, peak_memory_mib
from mae_bench.progress import Progress
from tasks.ade20k.config import UPerNetConfig
from tasks.ade20k.metrics import MAIN_METRIC, Areas, metrics, per_class
from tasks.ade20k.mmseg_config import bad_file, mmseg_config
from tasks.ade20k.training import CHECKPOINT_FILE, LOG_FILE, JobHook, JobRunner, build_runner, dump_config

CONFIG_FILE = "mmseg_config.py"
PER_CLASS_FILE = "per_class.json"
PER_IMAGE_FILE = "per_image.npz"

Seconds = float


def run(config: UPerNetConfig, job: Job, progress: Progress) -> Outcome:
    """Trains on training, scores on validation (mIoU, mAcc, aAcc in %); the same job run again goes on from its last checkpoint.

    Raises UserError for data not in ADE20K's layout, too many images that do not decode or a loss that is not finite; Interrupted
    on request, after saving.
    """
    progress.stage("check data")
    layout = check_layout("ade20k", config.data)
    classes = list(layout.classes)
    job.dir.mkdir(parents=True, exist_ok=True)
    with log_to(job.dir / LOG_FILE):
        _, spec, report = load_backbone(job.backbone)
        parts = mmseg_config(config, job, spec, classes)
        dump_config(parts, job.dir / CONFIG_FILE)
        runner, seconds_train = _train(config, job, progress, parts)
        areas, seconds_eval = _evaluate(runner, progress)
    _write_artefacts(job.dir, runner, areas, classes)
    (job.dir / CHECKPOINT_FILE).unlink()  # nobody goes on from here
    return Outcome(
        task="ade20k", dataset=layout.name, split="validation", num_samples=len(areas), metrics=metrics(areas),
        main_metric=MAIN_METRIC, data_digest=layout.digest, backbone_spec=spec.to_dict(), backbone_digest=report.digest,
        conversion_report=report.to_dict(),
        cost={
            "seconds_train": seconds_train, "seconds_eval": seconds_eval,
            "images_per_second": config.iterations * config.global_batch_size / seconds_train,
            "params": float(num_params(runner.model)), "peak_memory_mib": peak_memory_mib(torch.device(job.device)),
        },
        notes=_notes(runner),
        artefacts={"per_class": PER_CLASS_FILE, "per_image": PER_IMAGE_FILE, "mmseg_config": CONFIG_FILE, "log": LOG_FILE},
    )  # fmt: skip


def _train(
    config: UPerNetConfig, job: Job, progress: Progress, parts: dict[str, Any]
) -> tuple[JobRunner, Seconds]:
    checkpoint = job.dir / CHECKPOINT_FILE
    bad_file(job, "validation").unlink(missing_ok=True)  # it is looked through anew
    if not checkpoint.exists():
        bad_file(job, "training").unlink(missing_ok=True)
    runner, seconds = build_runner(parts, checkpoint)
    hook = JobHook(
        progress, checkpoint, runner.train_dataloader.dataset.bad, seed=job.seed,
        checkpoint_seconds=config.checkpoint_seconds, seconds=seconds,
    )  # fmt: skip
    runner.register_hook(hook)
    progress.stage("train", config.iterations)
    runner.train()
    return runner, hook.seconds


def _evaluate(runner: JobRunner, progress: Progress) -> tuple[Areas, Seconds]:
    progress.stage("evaluate", len(runner.val_dataloader))
    began = time.perf_counter()
    runner.val()
    (metric,) = runner.val_evaluator.metrics
    return metric.areas, time.perf_counter() - began


def _notes(runner: JobRunner) -> list[str]:
    """For the record: the images that did not decode, which no training and no score has seen."""
    loaders = {"training": runner.train_dataloader, "validation": runner.val_dataloader}
    found = {split: loader.dataset.bad.check().note() for split, loader in loaders.items()}
    return [f"{split}: {note} (left out)" for split, note in found.items() if note]


def _write_artefacts(folder: Path, runner: JobRunner, areas: Areas, classes: list[str]) -> None:
    """IoU a class, and the pixel sums an image, from which any subset's score or an interval follows."""
    dataset = runner.val_dataloader.dataset
    names = np.array([Path(dataset.get_data_info(i)["img_path"]).name for i in range(len(dataset))])
    write_json(folder / PER_CLASS_FILE, per_class(areas, classes))
    write_atomic(folder / PER_IMAGE_FILE, lambda file: np.savez_compressed(file, names=names, areas=areas))
