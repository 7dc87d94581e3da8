"""The table of checkpoint formats, and detection of a file's format from its keys and shapes."""

from importlib import import_module
from typing import TYPE_CHECKING, cast

from backbones.translating.other_models import check_is_vit
from mae_bench.errors import UserError, did_you_mean

if TYPE_CHECKING:  # the tables are used before torch is imported
    from backbones.reading.source import Checkpoint
    from backbones.translating.translation import Format

FORMATS: dict[str, str] = {
    "mae_bench": "backbones.formats.mae_bench",
    "official_mae": "backbones.formats.official_mae",
    "crossmae": "backbones.formats.crossmae",
    "timm": "backbones.formats.timm",
    "dino": "backbones.formats.dino",
    "ibot": "backbones.formats.ibot",
    "moco_v3": "backbones.formats.moco_v3",
    "deit": "backbones.formats.deit",
    "deit3": "backbones.formats.deit3",
    "ijepa": "backbones.formats.ijepa",
    "maskfeat": "backbones.formats.maskfeat",
    "lightly": "backbones.formats.lightly",
    "solo_learn": "backbones.formats.solo_learn",
    "hf_vitmae": "backbones.formats.hf_vitmae",
    "beit": "backbones.formats.beit",
    "beitv2": "backbones.formats.beitv2",
    "data2vec": "backbones.formats.data2vec",
    "simmim": "backbones.formats.simmim",
    "eva02": "backbones.formats.eva02",
    "hf_beit": "backbones.formats.hf_beit",
    "dinov2": "backbones.formats.dinov2",
    "dinov3": "backbones.formats.dinov3",
    "hf_dinov2": "backbones.formats.hf_dinov2",
    "hf_dinov3": "backbones.formats.hf_dinov3",
    "hf_vit": "backbones.formats.hf_vit",
    "hf_ijepa": "backbones.formats.hf_ijepa",
    "hf_clip": "backbones.formats.hf_clip",
    "hf_siglip": "backbones.formats.hf_siglip",
    "hf_sam": "backbones.formats.hf_sam",
    "clip": "backbones.formats.clip",
    "sam": "backbones.formats.sam",
    "mmpretrain": "backbones.formats.mmpretrain",
    "mmseg": "backbones.formats.mmseg",
    "detectron2": "backbones.formats.detectron2_vit",
}

TORCH_FILE = (".pth", ".pt")
WRITABLE: dict[
    str, tuple[str, ...]
] = {  # formats that `convert` writes -> suffixes of the file; () for a folder
    "mae_bench": (),
    "official_mae": TORCH_FILE,
    "timm": (".safetensors",),
    "hf_vitmae": (),
    "hf_beit": (),
    "hf_dinov2": (),
    "hf_dinov3": (),
    "hf_vit": (),
    "mmseg": TORCH_FILE,
    "detectron2": TORCH_FILE,
}


def check_format(name: str) -> None:
    """Raise UserError for an unknown format name."""
    if name not in FORMATS:
        raise UserError(
            f"unknown format {name!r}",
            expected=f"one of {', '.join(FORMATS)}",
            fix=did_you_mean(name, FORMATS),
        )


def get_format(name: str) -> "Format":
    """Return the module of a format; raise UserError for an unknown name."""
    check_format(name)
    return cast("Format", import_module(FORMATS[name]))


def find_formats(checkpoint: "Checkpoint") -> list[str]:
    """Return the names of the formats that the checkpoint fits, from its keys, shapes and JSON files."""
    return [name for name in FORMATS if get_format(name).fits(checkpoint)]


def detect(checkpoint: "Checkpoint") -> str:
    """Return the format of the checkpoint; raise UserError unless exactly one format fits."""
    formats = find_formats(checkpoint)
    check_is_vit(checkpoint, formats)
    if len(formats) == 1:
        return formats[0]
    keys = list(checkpoint.tensors)
    found = ", ".join(keys)
    if len(keys) > 4:
        found = f"{len(keys)} tensors, {', '.join(keys[:4])} ... {keys[-1]}"
    if checkpoint.label:
        found += f" under {checkpoint.label!r} next to {sorted(checkpoint.extras)}"
    if formats:
        fit, fix = f"fits {' and '.join(formats)}", "choose one with --format NAME"
    else:
        fit = "fits no known format"
        fix = "`mae-bench list formats` lists them; if it is one with other names, rename its keys first"
    expected = f"one of {', '.join(formats)}" if formats else f"one of {len(FORMATS)} formats"
    raise UserError(f"{checkpoint.source} {fit}: {found}", expected=expected, fix=fix)
