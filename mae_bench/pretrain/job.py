"""The pretraining job: images in; an exported backbone, the full autoencoder and a picture of its reconstructions out."""

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
    evaluation_loss,
    first_readable,
    save_mae,
)
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec

RECONSTRUCTION = "reconstruction.png"
NUM_PCA_IMAGES = 512  # training images, each in one crop, whose patches the PCA is fitted to


@dataclass
class Data:
    """The images to learn from and those held out, if there are any, with the account of those that do not decode."""

    report: LayoutReport
    train: ImageSource
    val: ImageSource | None
    bad_train: BadImages
    bad_val: BadImages

    @property
    def held_out(self) -> ImageSource:
        """The images that are drawn."""
        return self.val or self.train


def run(config: PretrainConfig, job: Job, progress: Progress) -> Outcome:
    """Pretrains, exports `export/` (backbone), `mae.safetensors` (with the decoder) and `reconstruction.png`.

    Metrics: the loss over the validation images, each seen once with a fixed mask (a number to compare runs of one config by);
    without validation images the training loss alone. Every process of a distributed run returns the same.
    """
    data = open_data(config)
    spec = config.model.spec(pretrain_method="mae", pretrain_data=data.report.name)
    count_kept(
        spec.num_patches, config.mask_ratio
    )  # a ratio that keeps nothing is told before anything is loaded
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
    """The images below config.data, in whatever form they lie there."""
    report = check_layout("images", config.data)  # a string: it may be a pattern or a URL
    train = open_images(config.data, "train")
    val = open_images(config.data, "val") if "val" in report.splits else None
    bad = (BadImages(config.max_bad_images, len(images) if images else 0) for images in (train, val))
    return Data(report, train, val, *bad)


def train(
    config: PretrainConfig, job: Job, spec: BackboneSpec, data: Data, loss: "PretrainLoss", progress: Progress
) -> Trainer:
    """Runs what is left of the pretraining; the trainer that it returns holds the weights, the times and the meters."""
    device = torch.device(job.device)
    order = TrainingOrder(len(data.train), config.global_batch_size, job.seed, world().rank, world().size)
    transform = transform_of(config, spec)
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
    """Build the autoencoder of a pretraining config with fresh weights; the tokenizer sets its vocabulary size."""
    options = config.mae_options()
    return MAE(spec, replace(options, num_tokens=tokenizer.num_tokens) if tokenizer else options)


def transform_of(config: PretrainConfig, spec: BackboneSpec) -> PretrainTransform:
    """The augmentation of a pretraining config."""
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
    """Fits the PCA to patches of training images as the model will see them: the same on every process and at every resume."""
    chosen = draw_epoch_order(len(images), seed, 0)[:NUM_PCA_IMAGES].tolist()
    batch = Images(images, transform, seed, replace_bad=True).__getitems__(
        [(0, index, 0) for index in chosen]
    )
    if isinstance(batch, UserError):
        raise batch
    target.fit(
        model.patchify(
            normalize(_cropped(batch, model.spec, torch.device("cpu")), model.spec.mean, model.spec.std)
        ).flatten(0, 1)
    )


def _cropped(batch: Batch, spec: BackboneSpec, device: torch.device) -> torch.Tensor:
    """The batch's images on the device, (N, C, *img_size), not normalised."""
    imgs = batch.imgs.to(device, non_blocking=True)
    return (
        imgs if batch.crops is None else resample_batch(imgs, batch.crops, spec.img_size, spec.interpolation)
    )


class PretrainLoss:
    """The loss of a micro-batch: crops and normalises it on the device, draws its masks, has its tokens made.

    Masks are drawn for the whole global batch of a step, so they depend on neither the processes nor the accumulation.
    """

    def __init__(self, config: PretrainConfig, spec: BackboneSpec, job: Job):
        self.config, self.spec, self.seed, self.device = config, spec, job.seed, torch.device(job.device)
        self._noise: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """What makes the targets; None for targets that are made of the pixels."""
        return load_tokenizer(self.config.tokenizer).to(self.device) if self.config.tokenizer else None

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """() the mean loss of the batch."""
        imgs = _cropped(batch, self.spec, self.device)
        targets = self.tokenizer(imgs, self.spec.grid_size) if self.tokenizer else None
        noise = self._noise_of(step)[batch.start : batch.start + len(imgs)].to(self.device, non_blocking=True)
        inputs = normalize(imgs, self.spec.mean, self.spec.std)
        loss: torch.Tensor = model(inputs, self.config.mask_ratio, noise, targets, scored_only=True)[0]
        return loss

    def _noise_of(self, step: int) -> torch.Tensor:
        """(global_batch_size, L); drawn once for all micro-batches of a step."""
        if self._noise[0] != step:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, step))
            c = self.config
            noise = sample_noise(
                c.mask_sampling, c.global_batch_size, self.spec.grid_size, c.mask_ratio, generator
            )
            pinned = (
                self.device.type == "cuda"
            )  # else the copy to the GPU would wait for all that it still has to do
            self._noise = step, noise.pin_memory() if pinned else noise
        return self._noise[1]


class Reconstructions:
    """Draws the same images with the same masks each time that it is called, into `reconstructions/`."""

    def __init__(self, config: PretrainConfig, job: Job, images: ImageSource):
        self.config, self.folder, self.images = config, job.dir / "reconstructions", images

    def __call__(self, model: nn.Module, step: int) -> None:
        """The hook of `Trainer.every_epochs`."""
        assert isinstance(model, MAE)
        self.folder.mkdir(exist_ok=True)
        self.draw(model, self.folder / f"step-{step:08d}.png")

    def draw(self, model: MAE, out: Path) -> None:
        """One picture of as many images as the config says."""
        draw_reconstructions(
            model,
            first_readable(self.images, self.config.num_reconstructions, model.spec),
            self.config.mask_ratio,
            out,
        )


def _export(config: PretrainConfig, job: Job, data: Data, model: MAE) -> str:
    """Writes backbone, autoencoder and picture on the main process; returns the backbone's digest, for all of them."""
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
    """The losses, and how many images are behind the first of them."""
    unit = "nats" if config.target == "tokens" else "mse"
    metrics = {"train_loss": Metric(trainer.final_loss, unit, "lower")}
    if not data.val:
        return metrics, len(data.train)
    loss, num_samples = evaluation_loss(
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
    """What the pretraining took; mfu only where the device's peak is known."""
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
    """Exports the ViT as it is initialised. It has learned nothing: its record's only metric is its size."""
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
