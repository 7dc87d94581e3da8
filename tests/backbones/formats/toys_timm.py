"""Toy files of timm: state dicts of its own small models, folders as its push_to_hf_hub writes them."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from tests.backbones.formats.reference import Files, randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
# What timm's config.json says: the architecture, and the arguments that its entry point does not set.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "registers": ("test_vit2", {}),
    "token-free": ("test_vit3", {}),
    "rms-norm": ("test_vit4", {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", SMALL),
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "dinov3-gated": ("vit_small_plus_patch16_dinov3_qkvb", SMALL),
    "clip": ("vit_base_patch32_clip_quickgelu_224", SMALL),
    "siglip": ("vit_base_patch32_siglip_256", SMALL),
    "siglip-gap": ("vit_base_patch32_siglip_gap_256", SMALL),
    "beit": ("beit_base_patch16_224", SMALL),
    "eva02": ("eva02_base_patch14_224", SMALL),
    "eva02-tiny": ("eva02_tiny_patch14_224", SMALL),
    "eva02-clip": ("eva02_base_patch16_clip_224", SMALL),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", SMALL),
    "sam": ("samvit_base_patch16", SMALL | {"window_size": 2, "global_attn_indexes": [1], "neck_chans": 24}),
}
BARE: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "beit-bare": ("beitv2_base_patch16_224", {}),
}


def build(name: str) -> Any:
    architecture, options = FOLDERS[name] if name in FOLDERS else BARE[name]
    return randomise(
        timm.create_model(architecture, num_classes=7, **(options if name in FOLDERS else SMALL))
    )


def write(folder: Path) -> Files:
    files: Files = {}
    for name, (architecture, options) in FOLDERS.items():
        model = build(name)
        (folder / name).mkdir()
        save_file(model.state_dict(), folder / name / "model.safetensors")
        cfg = {
            "mean": list(model.pretrained_cfg["mean"]),
            "std": list(model.pretrained_cfg["std"]),
            "interpolation": "bicubic",
        }
        config = {
            "architecture": architecture,
            "num_classes": 7,
            "pretrained_cfg": cfg,
            "model_args": options,
        }
        (folder / name / "config.json").write_text(json.dumps(config))
        files[name] = (folder / name, {})
    for name in BARE:
        torch.save(
            {"state_dict": build(name).state_dict(), "epoch": 3, "arch": BARE[name][0]},
            folder / f"{name}.pth.tar",
        )
        files[name] = (folder / f"{name}.pth.tar", {})
    return files
