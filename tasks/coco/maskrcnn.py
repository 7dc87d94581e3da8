"""Mask R-CNN on COCO with a pretrained ViT: trained by detectron2's trainer, scored by its COCOEvaluator."""

import time
from functools import partial
from pathlib import Path

from backbones.adapters.detectron2 import (
    load_vit_backbone,  # imported first: it reports what is not installed
)
from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.seeds import seed_everything
from mae_bench.data.sets.source import BadImages
from mae_bench.job import Job, Outcome
from mae_bench.logs import log_to
from mae_bench.models.cost import num_params
from mae_bench.progress import Progress
from tasks.coco.ceiling import load_or_compute_ceiling
from tasks.coco.config import MaskRCNNConfig
from tasks.coco.data import (
    build_train_loader,
    build_val_loader,
    find_unreadable,
    get_annotations,
    register,
)
from tasks.coco.evaluation import DETECTIONS_FILE, evaluate
from tasks.coco.lazy_config import build, build_lazy_config, dump
from tasks.coco.metrics import MAIN_METRIC
from tasks.coco.training import train
from tasks.context import TaskContext
from tasks.trained import add_training, train_once

TRAIN, VAL = "train2017", "val2017"
LOG_FILE = "detectron2.log"


def run(config: MaskRCNNConfig, job: Job, progress: Progress) -> Outcome:
    """Train on train2017, from the job's last state if there is one, and score val2017.

    The metrics are box and mask AP in percent. Raise UserError for data not in COCO's layout, too many
    unreadable images or a loss that is not finite, and Interrupted on request.
    """
    progress.stage("check data")
    layout = check_layout("coco", config.data)
    job.dir.mkdir(parents=True, exist_ok=True)
    with log_to(job.dir / LOG_FILE, "detectron2", "fvcore"):
        backbone = load_vit_backbone(job.backbone)
        context = TaskContext(config, job, progress, layout, backbone.spec, backbone.report)
        names = register(Path(config.data), layout.digest, job.dir / "annotations")
        ceiling = load_or_compute_ceiling(get_annotations(names.val))
        setup = build_lazy_config(config, context.spec, job.backbone, names.num_classes)
        dump(setup, job.dir)
        seed_everything(job.seed)
        model, optimizer, lr_multiplier = build(setup, job.device)
        bad = {split: BadImages(config.max_bad_images, layout.splits[split]) for split in (TRAIN, VAL)}
        find_unreadable(names.val, bad[VAL])
        batches = partial(build_train_loader, config, names.train, bad[TRAIN], job.seed)
        trained, training = train_once(
            context,
            TRAIN,
            model,
            lambda: train(context, model, optimizer, lr_multiplier, batches, bad[TRAIN]),
        )
        for name, reason in training.bad_images.items():
            bad[TRAIN].add(name, reason)
        began = time.perf_counter()
        loader = build_val_loader(config, names.val, bad[VAL])
        metrics, num_detections = evaluate(trained, loader, names.val, job.dir / "detections", progress)
        seconds_eval = time.perf_counter() - began
    outcome = context.build_outcome(
        "coco",
        VAL,
        layout.splits[VAL],
        metrics,
        MAIN_METRIC,
        num_params=num_params(trained),
        cost={"seconds_eval": seconds_eval},
        notes=[
            *layout.notes,
            *([ceiling.describe(VAL)] if ceiling.is_lowered else []),
            *_build_notes(bad, num_detections),
        ],
        artefacts={"detections": f"detections/{DETECTIONS_FILE}", "log": LOG_FILE},
    )
    return add_training(context, outcome, training)


def _build_notes(bad: dict[str, BadImages], num_detections: int) -> list[str]:
    notes = [f"{split}: {images.note()}" for split, images in bad.items() if images.count]
    if bad[VAL].count:
        notes.append(f"unread images of {VAL} count as images without detections")
    if not num_detections:
        notes.append("nothing was detected above score_threshold: the AP is 0 by definition")
    return notes
