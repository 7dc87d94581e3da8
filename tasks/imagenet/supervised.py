"""The supervised baseline: train the same ViT from scratch with labels (arXiv 2111.06377, Table 11)."""

from dataclasses import replace

from backbones.translating.report import ConversionReport
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.engine.optim import adamw_builder, finetune_no_decay
from mae_bench.export import EXPORT, write_export
from mae_bench.job import Job, Outcome
from mae_bench.models.vit import build_vit
from mae_bench.progress import Progress
from tasks.context import TaskContext
from tasks.imagenet.classify import Classifier, require_pool, train_classifier
from tasks.imagenet.config import SupervisedConfig
from tasks.imagenet.data import open_data
from tasks.imagenet.evaluate import score
from tasks.imagenet.fit import resolve_img_size


def run(config: SupervisedConfig, job: Job, progress: Progress) -> Outcome:
    """Train from scratch with labels and export the backbone with its final norm.

    The export has the EMA weights if there are any. The top1 in the record is the baseline's own; transfers
    start from the export.
    """
    data = open_data(config)
    seed_everything(derive_seed(job.seed, 0, -3))
    spec = config.model.spec(
        pretrain_method="supervised", pretrain_data=data.layout.name, global_pool=config.global_pool
    )
    resolve_img_size(config, spec)
    require_pool(config.global_pool, spec)
    report = ConversionReport(source="trained here", format="mae_bench", digest="")
    context = TaskContext(config, job, progress, data.layout, spec, report)
    vit = build_vit(spec, global_pool="token", drop_path_rate=config.drop_path)
    model = Classifier(vit, spec, data.num_classes, config.global_pool, fc_norm=False).to(context.device)
    optimizer = adamw_builder(config, finetune_no_decay)
    trained, training = train_classifier(context, data, model, optimizer)
    digest = ""
    if world().is_main:
        provenance = {"config": job.config, "seed": job.seed, "data_digest": data.layout.digest}
        digest = write_export(job.dir / EXPORT, trained.vit.state_dict(), spec, provenance)
    exported = replace(report, digest=gather_over_ranks(digest)[0])
    outcome = score(replace(context, report=exported), data, trained, training)
    return replace(outcome, task="pretrain")
