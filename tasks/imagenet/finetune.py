"""End-to-end fine-tuning on the ImageNet layout (arXiv 2111.06377, Table 9)."""

import torch

from backbones.adapters.features import layer_id
from mae_bench.data.loader import seed_everything, seed_of
from mae_bench.engine.optim import finetune_no_decay, make_adamw
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from tasks.imagenet.classify import Classifier, load_at_size, train_classifier
from tasks.imagenet.config import FinetuneConfig
from tasks.imagenet.data import open_data
from tasks.imagenet.evaluate import score


def run(config: FinetuneConfig, job: Job, progress: Progress) -> Outcome:
    """Fine-tunes every weight of job.backbone and scores the last epoch. Main metric top1."""
    data = open_data(config)
    device = torch.device(job.device)
    seed_everything(seed_of(job.seed, 0, -5))
    vit, spec, report = load_at_size(config, job.backbone, config.drop_path)
    model = Classifier(vit, spec, data.num_classes, config.global_pool, fc_norm=config.global_pool == "avg").to(device)
    model.requires_grad_(True)  # the position table too: MAE freezes it in pretraining only

    def lr_scale(name: str) -> float:
        layer = layer_id(name.removeprefix("vit."), spec.depth)
        return config.layer_decay ** (spec.depth + 1 - layer)

    optimizer = make_adamw(config, finetune_no_decay, lr_scale)
    trainer = train_classifier(config, job, progress, data, model, spec, optimizer)
    return score(trainer.full_model(), trainer, data, config, spec, report, job, progress)
