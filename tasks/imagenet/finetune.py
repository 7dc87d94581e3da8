"""End-to-end fine-tuning on the ImageNet layout (arXiv 2111.06377, Table 9)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backbones.adapters.features import layer_id
from backbones.classifier import write_head
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.engine.distributed import world
from mae_bench.engine.optim import finetune_no_decay, make_adamw
from mae_bench.export import write_export
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from mae_bench.spec import BackboneSpec
from tasks.imagenet.classify import Classifier, load_at_size, train_classifier
from tasks.imagenet.config import FinetuneConfig
from tasks.imagenet.data import Data, open_data
from tasks.imagenet.evaluate import score

CLASSIFIER = "classifier"  # the folder, inside a job's, of the model that it made


def run(config: FinetuneConfig, job: Job, progress: Progress) -> Outcome:
    """Fine-tunes every weight of job.backbone and scores the last epoch. Main metric top1."""
    return fine_tune(config, job, progress)


def fine_tune(
    config: FinetuneConfig, job: Job, progress: Progress, last_blocks: float | None = None
) -> Outcome:
    """Fine-tunes the head and the `last_blocks` (see Classifier.freeze; None: every weight) and scores the last epoch."""
    data = open_data(config)
    device = torch.device(job.device)
    seed_everything(derive_seed(job.seed, 0, -5))
    vit, spec, report = load_at_size(config, job.backbone, config.drop_path)
    model = Classifier(
        vit, spec, data.num_classes, config.global_pool, fc_norm=config.global_pool == "avg"
    ).to(device)
    model.requires_grad_(True)  # the position table too: MAE freezes it in pretraining only
    if last_blocks is not None:
        model.freeze(last_blocks)

    def lr_scale(name: str) -> float:
        layer = layer_id(name.removeprefix("vit."), spec.depth)
        return config.layer_decay ** (spec.depth + 1 - layer)

    optimizer = make_adamw(config, finetune_no_decay, lr_scale)
    trainer = train_classifier(config, job, progress, data, model, spec, optimizer)
    trained: Any = trainer.full_model()
    if config.export_classifier and world().is_main:
        write_classifier(
            job.dir / CLASSIFIER, trained, replace(spec, global_pool=config.global_pool), data, job
        )
    return score(trained, trainer, data, config, spec, report, job, progress)


def write_classifier(folder: Path, model: Classifier, spec: BackboneSpec, data: Data, job: Job) -> None:
    """The fine-tuned backbone as an export, with its head beside it."""
    weights = model.vit.state_dict() | {
        f"fc_norm.{name}": tensor for name, tensor in model.fc_norm.state_dict().items()
    }
    tuned = replace(spec, pretrain_method=f"{spec.pretrain_method}, fine-tuned")
    write_export(
        folder, weights, tuned, {"config": job.config, "seed": job.seed, "data_digest": data.report.digest}
    )
    write_head(folder, model.head, list(data.report.classes), tuned)
