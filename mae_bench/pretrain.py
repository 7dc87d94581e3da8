"""The pretraining job: images in; an exported backbone, the full autoencoder and a picture of its reconstructions out."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from mae_bench.cost import backbone_gmacs, num_params, peak_memory_mib
from mae_bench.data.images import BadImages, ImageSet
from mae_bench.data.layouts import check_layout
from mae_bench.data.loader import Batch, TrainingOrder, seed_everything, seed_of, training_batches
from mae_bench.data.transforms import normalize, train_transform
from mae_bench.engine.optim import make_adamw, pretrain_no_decay
from mae_bench.engine.trainer import Trainer, clear_state
from mae_bench.export import EXPORT, write_export
from mae_bench.job import Job, Outcome
from mae_bench.models.mae import MAE
from mae_bench.models.vit import build_vit
from mae_bench.pretrain_config import PretrainConfig, RandomConfig
from mae_bench.progress import Progress
from mae_bench.reconstruct import draw_reconstructions, evaluation_loss, first_readable, save_mae
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec


def run(config: PretrainConfig, job: Job, progress: Progress) -> Outcome:
    """Pretrains, exports `export/` (backbone), `mae.safetensors` (with the decoder) and `reconstruction.png`.

    Metrics: the loss over the validation images, each seen once with a fixed mask (a number to compare runs of one config by).
    """
    data = check_layout("imagenet", Path(config.data))
    spec = config.model.spec(pretrain_method="mae", pretrain_data=data.name)
    train, val = ImageSet(Path(config.data), "train"), ImageSet(Path(config.data), "val")
    bad_train, bad_val = BadImages(config.max_bad_images, len(train)), BadImages(config.max_bad_images, len(val))
    model, trainer = _train(config, job, spec, train, bad_train, progress)

    progress.stage("export")
    provenance = {"config": job.config, "seed": job.seed, "data_digest": data.digest}
    digest = write_export(job.dir / EXPORT, model.encoder.state_dict(), spec, provenance)
    save_mae(model, job.dir)
    loss, num_samples = evaluation_loss(model, val, bad_val, config.mask_ratio, progress, config.num_workers)
    draw_reconstructions(
        model, first_readable(val, config.num_reconstructions), config.mask_ratio, job.dir / "reconstruction.png"
    )
    clear_state(job.dir)
    return Outcome(
        task="pretrain",
        dataset=data.name,
        split="val",
        num_samples=num_samples,
        main_metric="loss",
        metrics={"loss": Metric(loss, "mse", "lower"), "train_loss": Metric(trainer.final_loss, "mse", "lower")},
        data_digest=data.digest,
        backbone_spec=spec.to_dict(),
        backbone_digest=digest,
        cost={
            "seconds_train": trainer.seconds,
            "images_per_second": trainer.images_per_second,
            "params": num_params(model),
            "gmacs": backbone_gmacs(spec),
            "peak_memory_mib": peak_memory_mib(trainer.device),
        },
        notes=[note for note in (bad_train.note(), bad_val.note()) if note],
        artefacts={"reconstruction": "reconstruction.png", "mae": "mae.safetensors"},
    )


def _train(
    config: PretrainConfig, job: Job, spec: BackboneSpec, images: ImageSet, bad_images: BadImages, progress: Progress
) -> tuple[MAE, Trainer]:
    device = torch.device(job.device)
    order = TrainingOrder(len(images), config.global_batch_size, job.seed)
    seed_everything(seed_of(job.seed, 0, -3))
    model = build_mae(config, spec).to(device)
    optimizer = make_adamw(config, pretrain_no_decay)
    trainer = Trainer(job, config, model, optimizer, order.steps_per_epoch, progress, bad_images)
    transform = train_transform(spec.img_size, config.crop_scale, spec.interpolation)
    trainer.fit(
        lambda start, stop: training_batches(images, transform, order, start, stop, config.num_workers),
        partial(_loss, config, spec, job.seed, device),
    )
    return model, trainer


def build_mae(config: PretrainConfig, spec: BackboneSpec) -> MAE:
    """The autoencoder of a pretraining config."""
    return MAE(
        spec,
        decoder_embed_dim=config.decoder_embed_dim,
        decoder_depth=config.decoder_depth,
        decoder_num_heads=config.decoder_num_heads,
        norm_pix_loss=config.norm_pix_loss,
    )


def _loss(
    config: PretrainConfig, spec: BackboneSpec, seed: int, device: torch.device, model: nn.Module, batch: Batch, step: int
) -> torch.Tensor:
    imgs = normalize(batch.imgs.to(device, non_blocking=True), spec.mean, spec.std)
    generator = torch.Generator().manual_seed(seed_of(seed, step))  # of the global batch: masks do not depend on its parts
    noise = torch.rand(config.global_batch_size, spec.num_patches, generator=generator)
    noise = noise[batch.start : batch.start + len(imgs)].to(device, non_blocking=True)
    return model(imgs, config.mask_ratio, noise)[0]


def run_random(config: RandomConfig, job: Job, progress: Progress) -> Outcome:
    """Exports the ViT as it is initialised. It has learned nothing: its record's only metric is its size."""
    progress.stage("export")
    seed_everything(seed_of(job.seed, 0, -3))
    spec = config.model.spec(pretrain_method="none", pretrain_data="none", global_pool=config.global_pool)
    model = build_vit(spec)
    digest = write_export(job.dir / EXPORT, model.state_dict(), spec, {"config": job.config, "seed": job.seed})
    return Outcome(
        task="pretrain",
        dataset="none",
        split="none",
        num_samples=1,
        main_metric="params",
        metrics={"params": Metric(num_params(model), "parameters", "lower")},
        data_digest="",
        backbone_spec=spec.to_dict(),
        backbone_digest=digest,
        cost={"params": num_params(model), "gmacs": backbone_gmacs(spec)},
    )
