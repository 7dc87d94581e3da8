"""Our config as mmengine's own: segmentor, pipelines, loaders, optimizer, schedule and metric, for a Runner to build."""

from pathlib import Path
from typing import Any

from backbones.adapters.mmseg import build_neck, build_preprocessor, get_patch_side
from mae_bench.errors import UserError
from mae_bench.job import Job
from mae_bench.spec import BackboneSpec
from tasks.ade20k.config import UPerNetConfig

IGNORE_INDEX = 255
WARMUP_FACTOR = 1e-6  # of the lr at iteration 0, as in BEiT's and MAE's segmentation configs
NORM = {
    "type": "BN",
    "requires_grad": True,
}  # one process has the whole batch: BN is what SyncBN is over several
LOG_INTERVAL = 50
IMPORTS = ["backbones.adapters.mmseg", "tasks.ade20k.data", "tasks.ade20k.metrics"]

Part = dict[str, Any]


def mmseg_config(config: UPerNetConfig, job: Job, spec: BackboneSpec, classes: list[str]) -> Part:
    """All that mmengine's Runner builds from; UserError where the crop does not fit the patch."""
    if config.crop_size % (patch := get_patch_side(spec)):
        raise UserError(f"crop_size {config.crop_size} with a patch of {patch}", expected="a multiple of the patch",
                        fix=f"set crop_size={-(-config.crop_size // patch) * patch}")  # fmt: skip
    return {
        "default_scope": "mmseg", "custom_imports": {"imports": IMPORTS}, "work_dir": str(job.dir / "mmengine"),
        "device": job.device, "randomness": {"seed": job.seed}, "model": _model(config, job.backbone, spec, len(classes)),
        "train_dataloader": {
            "batch_size": config.global_batch_size, "num_workers": config.num_workers,
            "persistent_workers": config.num_workers > 0, "sampler": {"type": "AddressSampler"},
            "dataset": _dataset(config, job, classes, "training", _train_pipeline(config)),
        },
        "val_dataloader": {
            "batch_size": 1, "num_workers": config.num_workers, "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": _dataset(config, job, classes, "validation", _val_pipeline(config)),
        },
        # validation is called for after the training, which a resumed training that is at its end would not do
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": config.iterations, "val_begin": config.iterations + 1},
        "val_cfg": {"type": "ValLoop"}, "val_evaluator": {"type": "ExactIoUMetric", "ignore_index": IGNORE_INDEX},
        "optim_wrapper": _optim_wrapper(config), "param_scheduler": _param_scheduler(config),
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": LOG_INTERVAL, "log_metric_by_epoch": False}, "checkpoint": None,
        },
        "log_processor": {"by_epoch": False},
        "visualizer": {"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
    }  # fmt: skip


def _model(config: UPerNetConfig, source: str, spec: BackboneSpec, num_classes: int) -> Part:
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    head = {
        "dropout_ratio": config.dropout,
        "num_classes": num_classes,
        "norm_cfg": NORM,
        "align_corners": False,
    }
    window = (
        {"crop_size": (config.crop_size,) * 2, "stride": (config.test_stride,) * 2}
        if config.test_mode == "slide"
        else {}
    )
    model = {
        "type": "EncoderDecoder", "data_preprocessor": build_preprocessor(spec, config.crop_size), "neck": build_neck(spec, NORM),
        "backbone": {
            "type": "MAEBenchViT", "source": source, "out_indices": config.out_indices, "drop_path_rate": config.drop_path,
        },
        "decode_head": {
            "type": "UPerHead", "in_channels": [spec.embed_dim] * 4, "in_index": [0, 1, 2, 3], "pool_scales": config.pool_scales,
            "channels": config.head_channels, "loss_decode": loss, **head,
        },
        "train_cfg": {}, "test_cfg": {"mode": config.test_mode, **window},
    }  # fmt: skip
    if config.aux_channels:
        model["auxiliary_head"] = {
            "type": "FCNHead", "in_channels": spec.embed_dim, "in_index": 2, "channels": config.aux_channels, "num_convs": 1,
            "concat_input": False, "loss_decode": {**loss, "loss_weight": config.aux_weight}, **head,
        }  # fmt: skip
    return model


def _dataset(config: UPerNetConfig, job: Job, classes: list[str], split: str, pipeline: list[Part]) -> Part:
    return {
        "type": "ADE20KLayout", "data_root": str(Path(config.data).resolve()), "split": split, "classes": classes,
        "seed": job.seed, "bad_images": str(bad_file(job, split)), "max_bad_images": config.max_bad_images, "pipeline": pipeline,
        "test_mode": split == "validation", "ignore_index": IGNORE_INDEX,
    }  # fmt: skip


def bad_file(job: Job, split: str) -> Path:
    """Where the images of a split that do not decode are named."""
    return job.dir / f"bad_images_{split}.txt"


# Images are decoded by Pillow: OpenCV fills the missing part of a truncated file with grey and says nothing.
LOAD = {"type": "LoadImageFromFile", "imdecode_backend": "pillow"}


def _train_pipeline(config: UPerNetConfig) -> list[Part]:
    return [
        LOAD, {"type": "LoadAnnotations"},
        {"type": "RandomResize", "scale": config.img_scale, "ratio_range": config.ratio_range, "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (config.crop_size,) * 2, "cat_max_ratio": config.cat_max_ratio},
        {"type": "RandomFlip", "prob": 0.5}, {"type": "PhotoMetricDistortion"}, {"type": "PackSegInputs"},
    ]  # fmt: skip


def _val_pipeline(config: UPerNetConfig) -> list[Part]:
    """The labels are loaded after the scaling: predictions are scored at the image's own size."""
    scale = {"type": "Resize", "scale": config.img_scale, "keep_ratio": True}
    return [LOAD, scale, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]


def _optim_wrapper(config: UPerNetConfig) -> Part:
    adamw = {
        "type": "AdamW",
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    return {
        "type": "OptimWrapper" if config.amp_dtype == "float32" else "BFloat16OptimWrapper", "constructor": "MAEBenchLayerDecay",
        "optimizer": adamw, "paramwise_cfg": {"layer_decay": config.layer_decay},
    }  # fmt: skip


def _param_scheduler(config: UPerNetConfig) -> list[Part]:
    warmup = (
        config.warmup_iterations if config.warmup_iterations > 1 else 0
    )  # a LinearLR of one step would never leave its start
    end = config.iterations
    rise = {"type": "LinearLR", "start_factor": WARMUP_FACTOR, "by_epoch": False, "begin": 0, "end": warmup}
    fall = {
        "type": "PolyLR",
        "power": config.poly_power,
        "eta_min": 0.0,
        "by_epoch": False,
        "begin": warmup,
        "end": end,
    }
    return [rise, fall] if warmup else [fall]
