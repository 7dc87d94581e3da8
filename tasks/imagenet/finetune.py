"""End-to-end fine-tuning on the ImageNet layout (arXiv 2111.06377, Table 9)."""

from dataclasses import replace
from pathlib import Path

from backbones.adapters.features import get_layer_id
from backbones.classifier import write_head
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.engine.distributed import world
from mae_bench.engine.optim import adamw_builder, finetune_no_decay
from mae_bench.export import write_export
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from tasks.context import TaskContext
from tasks.imagenet.classify import Classifier, load_at_size, train_classifier
from tasks.imagenet.config import FinetuneConfig
from tasks.imagenet.data import Data, open_data
from tasks.imagenet.evaluate import score

CLASSIFIER = "classifier"  # folder of the exported classifier, in the job's folder


def run(config: FinetuneConfig, job: Job, progress: Progress) -> Outcome:
    """Fine-tune all weights of job.backbone and score the last epoch. The main metric is top1."""
    return fine_tune(config, job, progress)


def fine_tune(
    config: FinetuneConfig, job: Job, progress: Progress, last_blocks: float | None = None
) -> Outcome:
    """Fine-tune the head and `last_blocks` (see Classifier.freeze; None: all) and score the last epoch."""
    data = open_data(config)
    seed_everything(derive_seed(job.seed, 0, -5))
    vit, spec, report = load_at_size(config, job.backbone, config.drop_path)
    context = TaskContext(config, job, progress, data.layout, spec, report)
    fc_norm = config.global_pool == "avg"
    model = Classifier(vit, spec, data.num_classes, config.global_pool, fc_norm=fc_norm).to(context.device)
    model.requires_grad_(True)  # the position table too: MAE freezes it only in pretraining
    if last_blocks is not None:
        model.freeze(last_blocks)

    def lr_scale(name: str) -> float:
        layer = get_layer_id(name.removeprefix("vit."), spec.depth)
        return config.layer_decay ** (spec.depth + 1 - layer)

    optimizer = adamw_builder(config, finetune_no_decay, lr_scale)
    trained, training = train_classifier(context, data, model, optimizer)
    if config.export_classifier and world().is_main:
        write_classifier(job.dir / CLASSIFIER, context, data, trained)
    return score(context, data, trained, training)


def write_classifier(
    folder: Path, context: TaskContext[FinetuneConfig], data: Data, model: Classifier
) -> None:
    """Write the fine-tuned backbone as an export, and its head next to it."""
    weights = model.vit.state_dict()
    weights |= {f"fc_norm.{name}": tensor for name, tensor in model.fc_norm.state_dict().items()}
    spec = replace(
        context.spec,
        global_pool=context.config.global_pool,
        pretrain_method=f"{context.spec.pretrain_method}, fine-tuned",
    )
    job = context.job
    provenance = {"config": job.config, "seed": job.seed, "data_digest": data.layout.digest}
    write_export(folder, weights, spec, provenance)
    write_head(folder, model.head, list(data.layout.classes), spec)
