"""Translate our config into mmengine's: segmentor, pipelines, loaders, optimizer, schedule and metric."""

from pathlib import Path
from typing import Any

from backbones.adapters.mmseg import build_neck, build_preprocessor
from mae_bench.job import Job
from mae_bench.spec import BackboneSpec
from tasks.ade20k.config import UPerNetConfig
from tasks.ade20k.fit import fit
from tasks.context import TaskContext

IGNORE_INDEX = 255
WARMUP_FACTOR = 1e-6  # share of the lr at iteration 0, as in BEiT's and MAE's segmentation configs
# One process has the whole batch: BN computes what SyncBN computes over several processes.
NORM = {"type": "BN", "requires_grad": True}
LOG_INTERVAL = 50
IMPORTS = ["backbones.adapters.mmseg", "tasks.ade20k.data", "tasks.ade20k.metrics"]
# Pillow decodes the images: OpenCV silently fills the missing part of a truncated file with grey.
LOAD = {"type": "LoadImageFromFile", "imdecode_backend": "pillow"}

Part = dict[str, Any]


def build_mmseg_config(context: TaskContext[UPerNetConfig]) -> Part:
    """Return the config of mmengine's Runner; raise UserError for a backbone that UperNet does not fit."""
    config, job, spec = fit(context.config, context.spec), context.job, context.spec
    return {
        "default_scope": "mmseg",
        "custom_imports": {"imports": IMPORTS},
        "work_dir": str(job.dir / "mmengine"),
        "device": job.device,
        "randomness": {"seed": job.seed},
        "model": _build_model(config, job.backbone, spec, len(context.layout.classes)),
        **_build_loaders(context),
        # Validation is run after the training: a resumed training that is already at its end would skip it.
        "train_cfg": {
            "type": "IterBasedTrainLoop",
            "max_iters": config.iterations,
            "val_begin": config.iterations + 1,
        },
        "val_cfg": {"type": "ValLoop"},
        "val_evaluator": {"type": "ExactIoUMetric", "ignore_index": IGNORE_INDEX},
        "optim_wrapper": _build_optim_wrapper(config),
        "param_scheduler": _build_param_scheduler(config),
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": LOG_INTERVAL, "log_metric_by_epoch": False},
            "checkpoint": None,
        },
        "log_processor": {"by_epoch": False},
        "visualizer": {"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
    }


def _build_model(config: UPerNetConfig, source: str, spec: BackboneSpec, num_classes: int) -> Part:
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    head = {
        "dropout_ratio": config.dropout,
        "num_classes": num_classes,
        "norm_cfg": NORM,
        "align_corners": False,
    }
    test_cfg: Part = {"mode": config.test_mode}
    if config.test_mode == "slide":
        test_cfg |= {"crop_size": (config.crop_size,) * 2, "stride": (config.test_stride,) * 2}
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": build_preprocessor(spec, config.crop_size),
        "neck": build_neck(spec, NORM),
        "backbone": {
            "type": "MAEBenchViT",
            "source": source,
            "out_indices": config.out_indices,
            "drop_path_rate": config.drop_path,
        },
        "decode_head": {
            "type": "UPerHead",
            "in_channels": [spec.embed_dim] * 4,
            "in_index": [0, 1, 2, 3],
            "pool_scales": config.pool_scales,
            "channels": config.head_channels,
            "loss_decode": loss,
            **head,
        },
        "train_cfg": {},
        "test_cfg": test_cfg,
    }
    if config.aux_channels:
        model["auxiliary_head"] = {
            "type": "FCNHead",
            "in_channels": spec.embed_dim,
            "in_index": 2,
            "channels": config.aux_channels,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": {**loss, "loss_weight": config.aux_weight},
            **head,
        }
    return model


def _build_loaders(context: TaskContext[UPerNetConfig]) -> Part:
    config = context.config
    return {
        "train_dataloader": {
            "batch_size": config.global_batch_size,
            "num_workers": config.num_workers,
            "persistent_workers": config.num_workers > 0,
            "sampler": {"type": "AddressSampler"},
            "dataset": _build_dataset(context, "training", _build_train_pipeline(config)),
        },
        "val_dataloader": {
            "batch_size": 1,
            "num_workers": config.num_workers,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": _build_dataset(context, "validation", _build_val_pipeline(config)),
        },
    }


def _build_dataset(context: TaskContext[UPerNetConfig], split: str, pipeline: list[Part]) -> Part:
    config, job = context.config, context.job
    return {
        "type": "ADE20KLayout",
        "data_root": str(Path(config.data).resolve()),
        "split": split,
        "classes": list(context.layout.classes),
        "seed": job.seed,
        "bad_images": str(get_bad_file(job, split)),
        "max_bad_images": config.max_bad_images,
        "pipeline": pipeline,
        "test_mode": split == "validation",
        "ignore_index": IGNORE_INDEX,
    }


def get_bad_file(job: Job, split: str) -> Path:
    """Return the path of the file that names the images of a split that do not decode."""
    return job.dir / f"bad_images_{split}.txt"


def _build_train_pipeline(config: UPerNetConfig) -> list[Part]:
    return [
        LOAD,
        {"type": "LoadAnnotations"},
        {
            "type": "RandomResize",
            "scale": config.img_scale,
            "ratio_range": config.ratio_range,
            "keep_ratio": True,
        },
        {"type": "RandomCrop", "crop_size": (config.crop_size,) * 2, "cat_max_ratio": config.cat_max_ratio},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]


def _build_val_pipeline(config: UPerNetConfig) -> list[Part]:
    """Load the labels after the scaling: predictions are scored at the image's own size."""
    scale = {"type": "Resize", "scale": config.img_scale, "keep_ratio": True}
    return [LOAD, scale, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]


def _build_optim_wrapper(config: UPerNetConfig) -> Part:
    return {
        "type": "OptimWrapper" if config.amp_dtype == "float32" else "BFloat16OptimWrapper",
        "constructor": "MAEBenchLayerDecay",
        "optimizer": {
            "type": "AdamW",
            "lr": config.lr,
            "betas": config.betas,
            "weight_decay": config.weight_decay,
            "fused": True,
        },
        "paramwise_cfg": {"layer_decay": config.layer_decay},
    }


def _build_param_scheduler(config: UPerNetConfig) -> list[Part]:
    # A LinearLR of one step would never leave its start.
    warmup = config.warmup_iterations if config.warmup_iterations > 1 else 0
    rise = {"type": "LinearLR", "start_factor": WARMUP_FACTOR, "by_epoch": False, "begin": 0, "end": warmup}
    fall = {
        "type": "PolyLR",
        "power": config.poly_power,
        "eta_min": 0.0,
        "by_epoch": False,
        "begin": warmup,
        "end": config.iterations,
    }
    return [rise, fall] if warmup else [fall]
