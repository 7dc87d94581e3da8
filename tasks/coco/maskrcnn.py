"""Mask R-CNN on COCO with a pretrained ViT: trained by detectron2's trainer, scored by its COCOEvaluator."""

import time
from functools import partial
from pathlib import Path

import torch

from backbones.adapters.detectron2 import load_vit_backbone  # first of all: it names what is not installed
from mae_bench.data.checks.layouts import check_layout
from mae_bench.data.seeds import seed_everything
from mae_bench.data.sets.source import BadImages
from mae_bench.job import Job, Outcome
from mae_bench.logs import log_to
from mae_bench.models.cost import num_params, peak_memory_mib
from mae_bench.progress import Progress
from tasks.coco.config import MaskRCNNConfig
from tasks.coco.data import register, train_loader, val_loader
from tasks.coco.evaluation import DETECTIONS_FILE, evaluate
from tasks.coco.lazy_config import build, dump, lazy_config
from tasks.coco.metrics import MAIN_METRIC
from tasks.coco.training import clear_checkpoints, train

SPLITS = ("train2017", "val2017")
LOG_FILE = "detectron2.log"


def run(config: MaskRCNNConfig, job: Job, progress: Progress) -> Outcome:
    """Trains on train2017, scores on val2017 (box and mask AP, %); the same job run again goes on from its last checkpoint.

    Raises UserError for data not in COCO's layout, too many unreadable images or a loss that is not finite; Interrupted on
    request.
    """
    progress.stage("check data")
    layout = check_layout("coco", config.data)
    job.dir.mkdir(parents=True, exist_ok=True)
    with log_to(job.dir / LOG_FILE, "detectron2", "fvcore"):
        backbone = load_vit_backbone(job.backbone)
        spec, report = backbone.spec, backbone.report
        names = register(Path(config.data), layout.digest)
        setup = lazy_config(config, spec, job.backbone, names.num_classes)
        dump(setup, job.dir)
        seed_everything(job.seed)
        model, optimizer, lr_multiplier = build(setup, job.device)
        bad = {split: BadImages(config.max_bad_images, layout.splits[split]) for split in SPLITS}
        batches = partial(train_loader, config, names.train, bad[SPLITS[0]], job.seed)
        seconds_train = train(model, optimizer, lr_multiplier, batches, config, job, progress, bad[SPLITS[0]])
        began = time.perf_counter()
        loader = val_loader(config, names.val, bad[SPLITS[1]])
        metrics, num_detections = evaluate(model, loader, names.val, job.dir / "detections", progress)
    clear_checkpoints(job.dir)
    return Outcome(
        task="coco", dataset=layout.name, split=SPLITS[1], num_samples=layout.splits[SPLITS[1]], metrics=metrics,
        main_metric=MAIN_METRIC, data_digest=layout.digest, backbone_spec=spec.to_dict(), backbone_digest=report.digest,
        conversion_report=report.to_dict(),
        cost={
            "seconds_train": seconds_train, "seconds_eval": time.perf_counter() - began,
            "images_per_second": config.iterations * config.global_batch_size / seconds_train,
            "params": float(num_params(model)), "peak_memory_mib": peak_memory_mib(torch.device(job.device)),
        },
        notes=[*layout.notes, *_notes(bad, num_detections)],
        artefacts={"detections": f"detections/{DETECTIONS_FILE}", "log": LOG_FILE},
    )  # fmt: skip


def _notes(bad: dict[str, BadImages], num_detections: int) -> list[str]:
    notes = [f"{split}: {images.note()}" for split, images in bad.items() if images.count]
    if bad[SPLITS[1]].count:
        notes.append(f"unread images of {SPLITS[1]} count as images without detections")
    return (
        notes
        if num_detections
        else [*notes, "nothing was detected above score_threshold: the AP is 0 by definition"]
    )
