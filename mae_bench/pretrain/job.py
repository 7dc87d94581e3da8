"""The pretraining job: trains an MAE on images and exports backbone, autoencoder and reconstructions.

Legend: N batch, L patches, C channels.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from mae_bench.data.batches.crops import resample_batch
from mae_bench.data.batches.loader import (
    Batch,
    Images,
    TrainingOrder,
    draw_epoch_order,
    load_training_batches,
)
from mae_bench.data.batches.transforms import PretrainTransform, normalize
from mae_bench.data.checks.layouts import LayoutReport, check_layout
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.data.sets.open import open_images
from mae_bench.data.sets.source import BadImages, ImageSource
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.engine.optim import adamw_builder, pretrain_no_decay
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.export import EXPORT, write_export
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import backbone_gmacs, num_params, training_flops
from mae_bench.models.mae import MAE
from mae_bench.models.masking import count_kept, sample_noise
from mae_bench.models.targets import PCA
from mae_bench.models.tokenizer import Tokenizer, load_tokenizer
from mae_bench.models.vit import build_vit
from mae_bench.pretrain.config import PretrainConfig, RandomConfig
from mae_bench.pretrain.reconstruct import (
    EVAL_BATCH,
    MAE_FILE,
    draw_reconstructions,
    evaluate_loss,
    read_spread,
    save_mae,
)
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec

RECONSTRUCTION = "reconstruction.png"
NUM_PCA_IMAGES = 512  # training images, one crop each, to whose patches the PCA is fitted


@dataclass
class Data:
    """Training and validation images, if there are any, and counters of undecodable ones."""

    report: LayoutReport
    train: ImageSource
    val: ImageSource | None
    bad_train: BadImages
    bad_val: BadImages

    @property
    def held_out(self) -> ImageSource:
        """Images used for reconstructions."""
        return self.val or self.train


def run(config: PretrainConfig, job: Job, progress: Progress) -> Outcome:
    """Pretrain an MAE and export it.

    Writes `export/` (backbone), `mae.safetensors` (with the decoder) and `reconstruction.png`. The metric
    is the loss over the validation images, each seen once with a fixed mask (to compare runs of one
    config), or the training loss without validation images. Every process of a distributed run returns the
    same outcome.
    """
    data = open_data(config)
    spec = config.model.spec(pretrain_method="mae", pretrain_data=data.report.name)
    count_kept(spec.num_patches, config.mask_ratio)  # fail early for an impossible mask_ratio
    loss = PretrainLoss(config, spec, job)
    trainer = train(config, job, spec, data, loss, progress)

    progress.stage("export")
    model = trainer.full_model()
    assert isinstance(model, MAE)
    digest = _export(config, job, data, model)
    metrics, num_samples = _evaluate(config, data, model, trainer, loss.tokenizer, progress)
    drawn = {"reconstruction": RECONSTRUCTION} if model.can_reconstruct else {}
    return Outcome(
        task="pretrain",
        dataset=data.report.name,
        split="val" if data.val else "train",
        num_samples=num_samples,
        main_metric="loss" if data.val else "train_loss",
        metrics=metrics,
        data_digest=data.report.digest,
        backbone_spec=spec.to_dict(),
        backbone_digest=digest,
        cost=_cost(trainer, model, spec),
        notes=[
            str(trainer.accumulation),
            *(note for note in (data.bad_train.note(), data.bad_val.note()) if note),
        ],
        artefacts={**drawn, "mae": MAE_FILE},
    )


def open_data(config: PretrainConfig) -> Data:
    """Open the images of config.data, in any supported form."""
    report = check_layout("images", config.data)  # a string: it may be a pattern or a URL
    train = open_images(config.data, "train")
    val = open_images(config.data, "val") if "val" in report.splits else None
    bad = (BadImages(config.max_bad_images, len(images) if images else 0) for images in (train, val))
    return Data(report, train, val, *bad)


def train(
    config: PretrainConfig, job: Job, spec: BackboneSpec, data: Data, loss: "PretrainLoss", progress: Progress
) -> Trainer:
    """Run the remaining steps; return the trainer, which holds weights, times and meters."""
    device = torch.device(job.device)
    order = TrainingOrder(len(data.train), config.global_batch_size, job.seed, world().rank, world().size)
    transform = build_transform(config, spec)
    seed_everything(derive_seed(job.seed, 0, -3))
    model = build_mae(config, spec, loss.tokenizer)
    if isinstance(model.target, PCA):
        fit_targets(model, model.target, data.train, transform, job.seed)
    trainer = Trainer(
        job,
        config,
        model.to(device),
        adamw_builder(config, pretrain_no_decay),
        order.steps_per_epoch,
        progress,
        data.bad_train,
        ema_decay=config.ema_decay,
        flops_per_image=training_flops(model, config.mask_ratio),
    )
    if config.reconstruct_epochs and model.can_reconstruct:
        trainer.every_epochs(config.reconstruct_epochs, Reconstructions(config, job, data.held_out))
    order = replace(order, sizes=trainer.accumulation.sizes)
    trainer.fit(
        lambda start, stop: load_training_batches(
            data.train, transform, order, start, stop, config.num_workers
        ),
        loss,
    )
    return trainer


def build_mae(config: PretrainConfig, spec: BackboneSpec, tokenizer: Tokenizer | None = None) -> MAE:
    """Build the autoencoder of a config with fresh weights; the tokenizer sets the vocabulary size."""
    options = config.mae_options()
    return MAE(spec, replace(options, num_tokens=tokenizer.num_tokens) if tokenizer else options)


def build_transform(config: PretrainConfig, spec: BackboneSpec) -> PretrainTransform:
    """Build the augmentation of a pretraining config."""
    return PretrainTransform(
        spec.img_size,
        config.augment,
        config.crop_scale,
        config.color_jitter,
        spec.interpolation,
        config.decode,
        spec.in_chans,
        config.crop_on,
    )


def fit_targets(
    model: MAE, target: PCA, images: ImageSource, transform: PretrainTransform, seed: int
) -> None:
    """Fit the PCA to patches of training images, the same on every process and after every resume."""
    chosen = draw_epoch_order(len(images), seed, 0)[:NUM_PCA_IMAGES].tolist()
    dataset = Images(images, transform, seed, replace_bad=True)
    batch = dataset.__getitems__([(0, index, 0) for index in chosen])
    if isinstance(batch, UserError):
        raise batch
    imgs = _crop(batch, model.spec, torch.device("cpu"))
    patches = model.patchify(normalize(imgs, model.spec.mean, model.spec.std))  # (N, L, p p C)
    target.fit(patches.flatten(0, 1))


def _crop(batch: Batch, spec: BackboneSpec, device: torch.device) -> torch.Tensor:
    """Return the images (N, C, *img_size) of a batch on the device, cropped but not normalised."""
    imgs = batch.imgs.to(device, non_blocking=True)
    if batch.crops is None:
        return imgs
    return resample_batch(imgs, batch.crops, spec.img_size, spec.interpolation)


class PretrainLoss:
    """Loss of a micro-batch: crop and normalise it on the device, draw its masks and tokenize it if needed.

    Masks are drawn for the global batch of a step, so they do not depend on processes or accumulation.
    """

    def __init__(self, config: PretrainConfig, spec: BackboneSpec, job: Job):
        self.config, self.spec, self.seed, self.device = config, spec, job.seed, torch.device(job.device)
        self._noise: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer for the target "tokens", else None."""
        return load_tokenizer(self.config.tokenizer).to(self.device) if self.config.tokenizer else None

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """Return the mean loss () of the batch."""
        imgs = _crop(batch, self.spec, self.device)
        targets = self.tokenizer(imgs, self.spec.grid_size) if self.tokenizer else None
        noise = self._draw_noise(step)[batch.start : batch.start + len(imgs)].to(
            self.device, non_blocking=True
        )
        inputs = normalize(imgs, self.spec.mean, self.spec.std)
        loss: torch.Tensor = model(inputs, self.config.mask_ratio, noise, targets, scored_only=True)[0]
        return loss

    def _draw_noise(self, step: int) -> torch.Tensor:
        """Return noise (global_batch_size, L), drawn once for all micro-batches of a step."""
        if self._noise[0] != step:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, step))
            config, grid_size = self.config, self.spec.grid_size
            noise = sample_noise(
                config.mask_sampling, config.global_batch_size, grid_size, config.mask_ratio, generator
            )
            # Without pinned memory, the copy to the GPU would wait for its queued work
            self._noise = step, noise.pin_memory() if self.device.type == "cuda" else noise
        return self._noise[1]


class Reconstructions:
    """Hook that draws the same images with the same masks at each call, to `reconstructions/`."""

    def __init__(self, config: PretrainConfig, job: Job, images: ImageSource):
        self.config, self.folder, self.images = config, job.dir / "reconstructions", images

    def __call__(self, model: nn.Module, step: int) -> None:
        """Draw the reconstructions after `step`, as a hook of `Trainer.every_epochs`."""
        assert isinstance(model, MAE)
        self.folder.mkdir(exist_ok=True)
        self.draw(model, self.folder / f"step-{step:08d}.png")

    def draw(self, model: MAE, out: Path) -> None:
        """Write one picture with `num_reconstructions` images."""
        imgs = read_spread(self.images, self.config.num_reconstructions, model.spec)
        draw_reconstructions(model, imgs, self.config.mask_ratio, out)


def _export(config: PretrainConfig, job: Job, data: Data, model: MAE) -> str:
    """Write backbone, autoencoder and picture on the main process; return the backbone's digest on all."""
    provenance = {"config": job.config, "seed": job.seed, "data_digest": data.report.digest}
    folder = job.dir / EXPORT
    digest = ""
    if world().is_main:
        digest = write_export(folder, model.encoder.state_dict(), model.spec, provenance)
        save_mae(model, job.dir)
        if model.can_reconstruct:
            Reconstructions(config, job, data.held_out).draw(model, job.dir / RECONSTRUCTION)
    return str(gather_over_ranks(digest)[0])


def _evaluate(
    config: PretrainConfig,
    data: Data,
    model: MAE,
    trainer: Trainer,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> tuple[dict[str, Metric], int]:
    """Return the losses, and the number of images of the first."""
    unit = "nats" if config.target == "tokens" else "mse"
    metrics = {"train_loss": Metric(trainer.final_loss, unit, "lower")}
    if not data.val:
        return metrics, len(data.train)
    loss, num_samples = evaluate_loss(
        model,
        data.val,
        data.bad_val,
        config.mask_ratio,
        progress,
        config.num_workers,
        tokenizer=tokenizer,
        batch_size=min(EVAL_BATCH, config.device_batch_size or EVAL_BATCH),
        amp_dtype=config.amp_dtype,
    )
    return {"loss": Metric(loss, unit, "lower"), **metrics}, num_samples


def _cost(trainer: Trainer, model: MAE, spec: BackboneSpec) -> dict[str, float]:
    """Return the cost of the pretraining; mfu only if the device's peak is known."""
    mfu = {} if trainer.meters.mfu is None else {"mfu": trainer.meters.mfu}
    return {
        "seconds_train": trainer.seconds,
        "images_per_second": trainer.images_per_second,
        "data_wait": trainer.meters.data_wait_share,
        **mfu,
        "params": num_params(model),
        "gmacs": backbone_gmacs(spec),
        "peak_memory_mib": trainer.meters.peak_memory_mib,
    }


def run_random(config: RandomConfig, job: Job, progress: Progress) -> Outcome:
    """Export a randomly initialised ViT; the only metric of its record is its number of parameters."""
    progress.stage("export")
    seed_everything(derive_seed(job.seed, 0, -3))
    spec = config.model.spec(pretrain_method="none", pretrain_data="none", global_pool=config.global_pool)
    model = build_vit(spec)
    digest = write_export(
        job.dir / EXPORT, model.state_dict(), spec, {"config": job.config, "seed": job.seed}
    )
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
