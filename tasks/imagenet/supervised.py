"""The supervised baseline: the same ViT trained from scratch with labels (arXiv 2111.06377, Table 11), then exported."""

from dataclasses import replace
from typing import Any

import torch

from backbones.translating.report import ConversionReport
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.engine.optim import finetune_no_decay, make_adamw
from mae_bench.export import EXPORT, write_export
from mae_bench.job import Job, Outcome
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from tasks.imagenet.classify import Classifier, require_pool, size_of, train_classifier
from tasks.imagenet.config import SupervisedConfig
from tasks.imagenet.data import open_data
from tasks.imagenet.evaluate import score


def run(config: SupervisedConfig, job: Job, progress: Progress) -> Outcome:
    """Trains with labels from scratch and exports the backbone with its final norm (EMA weights if there is an EMA).

    The record's top1 is the baseline's own accuracy; transfers start from the export.
    """
    data = open_data(config)
    device = torch.device(job.device)
    seed_everything(derive_seed(job.seed, 0, -3))
    spec = config.model.spec(
        pretrain_method="supervised", pretrain_data=data.report.name, global_pool=config.global_pool
    )
    size_of(config, spec)
    require_pool(config.global_pool, spec)
    vit = build_vit(spec, global_pool="token", drop_path_rate=config.drop_path)
    model = Classifier(vit, spec, data.num_classes, config.global_pool, fc_norm=False).to(device)
    optimizer = make_adamw(config, finetune_no_decay)
    trainer = train_classifier(config, job, progress, data, model, spec, optimizer)
    best: Any = trainer.full_model()
    provenance = {"config": job.config, "seed": job.seed, "data_digest": data.report.digest}
    written = (
        write_export(job.dir / EXPORT, best.vit.state_dict(), spec, provenance) if world().is_main else ""
    )
    digest = gather_over_ranks(written)[0]
    report = ConversionReport(source="trained here", format="mae_bench", digest=digest)
    outcome = score(best, trainer, data, config, spec, report, job, progress)
    return replace(outcome, task="pretrain")
