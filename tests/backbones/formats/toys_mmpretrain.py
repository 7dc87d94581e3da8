"""Files of mmpretrain, mmselfsup, mmclassification: a state_dict of backbone, neck and head, and meta."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.plain_vit import sincos
from tests.backbones.formats.reference import Files, Shapes, fill, pair, prefixed

WIDTH, HEADS, DEPTH, HIDDEN, GRID, PATCH = 192, 3, 2, 768, 4, 8
CONFIG = """
data_preprocessor = dict(
    mean=[
        127.5,
        127.5,
        127.5,
    ], num_classes=7, std=[127.5, 127.5, 127.5], to_rgb=True)
default_scope = 'mmpretrain'
model = dict(
    backbone=dict(
        arch=dict(embed_dims=192, feedforward_channels=768, num_heads=6, num_layers=2),
        norm_cfg=dict(eps=1e-05, type='LN'),
        patch_size=8,
        type='VisionTransformer'),
    type='ImageClassifier')
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.999), lr=-0.1, type='AdamW'))
"""


def shapes(
    attention: Shapes,
    width: int = WIDTH,
    depth: int = DEPTH,
    hidden: int = HIDDEN,
    patch: int = PATCH,
    rows: int = 17,
) -> Shapes:
    """Return the shapes of a backbone without a final norm.

    attention: shapes of a block's attention. rows: of the position embedding.
    """
    found: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        **pair("patch_embed.projection", width, 3, patch, patch),
    }
    for i in range(depth):
        found |= {
            **pair(f"layers.{i}.ln1", width),
            **prefixed(f"layers.{i}.attn.", attention),
            **pair(f"layers.{i}.ln2", width),
            **pair(f"layers.{i}.ffn.layers.0.0", hidden, width),
            **pair(f"layers.{i}.ffn.layers.1", width, hidden),
        }
    return found


def backbone(attention: Shapes, **more: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return random weights; `more` by name, with two underscores for a dot and LAYER for each block."""
    found = shapes(attention)
    for name, shape in more.items():
        named = name.replace("__", ".")
        found |= {named.replace("LAYER", f"layers.{i}"): shape for i in range(DEPTH)}
    # halved, so that tokens stay near 1 where no norm ends the backbone
    return {name: tensor / 2 if tensor.ndim > 1 else tensor for name, tensor in fill(found).items()}


def qkv(width: int) -> Shapes:
    return {**pair("qkv", 3 * width, width), **pair("proj", width, width)}


QKV = qkv(WIDTH)
TABLE = {"relative_position_bias_table": ((2 * GRID - 1) ** 2 + 3, HEADS)}
QV = {"q_bias": (WIDTH,), "v_bias": (WIDTH,), "qkv.weight": (3 * WIDTH, WIDTH), **pair("proj", WIDTH, WIDTH)}
NORM = {"ln1__weight": (WIDTH,), "ln1__bias": (WIDTH,)}
POOLED = {"ln2__weight": (WIDTH,), "ln2__bias": (WIDTH,)}
SCALES = {"LAYER__gamma_1": (WIDTH,), "LAYER__gamma_2": (WIDTH,)}
INDEX = torch.arange((GRID * GRID + 1) ** 2).reshape(GRID * GRID + 1, -1)


def backbones() -> dict[str, dict[str, torch.Tensor]]:
    """Return a backbone of each kind, with the names after `backbone.`."""
    plain = backbone(QKV, **NORM)
    # utils/position_encoding.py
    fixed = {**plain, "pos_embed": sincos(WIDTH, GRID, down_first=True, class_row=True)}
    deit3 = backbone({**QKV, "gamma1.weight": (WIDTH,)}, **NORM, LAYER__ffn__gamma2__weight=(WIDTH,))
    deit3["pos_embed"] = deit3["pos_embed"][:, 1:].clone()
    gated = backbone({**QKV, "gamma1.weight": (WIDTH,)}, **NORM, LAYER__ffn__gamma2__weight=(WIDTH,))
    gated = {name: tensor for name, tensor in gated.items() if "ffn.layers" not in name}
    for i in range(DEPTH):
        gated |= fill(
            {**pair(f"layers.{i}.ffn.w12", 1024, WIDTH), **pair(f"layers.{i}.ffn.w3", WIDTH, 512)}, seed=i
        )
    clip = backbone(QKV, **NORM, pre_norm__weight=(WIDTH,), pre_norm__bias=(WIDTH,))
    del clip["patch_embed.projection.bias"]
    distilled = backbone(QKV, **NORM, dist_token=(1, 1, WIDTH))
    distilled |= fill({"pos_embed": (1, GRID * GRID + 2, WIDTH)})
    beit = backbone({**QV, **TABLE}, **SCALES, **POOLED)
    shared = backbone(
        QV, **SCALES, **NORM, mask_token=(1, 1, WIDTH), rel_pos_bias__relative_position_bias_table=(52, HEADS)
    )
    for each in (beit, shared):
        del each["pos_embed"]
    beit |= {f"layers.{i}.attn.relative_position_index": INDEX for i in range(DEPTH)}
    return {
        "mae": fixed,
        "mocov3": fixed,
        "vit": plain,
        "config": plain,
        "ema": plain,
        "finetuned": backbone(QKV, **POOLED),
        "two_norms": backbone(QKV, **NORM, **POOLED),
        "maskfeat": {**plain, **fill({"mask_token": (1, 1, WIDTH)})},
        "deit3": deit3,
        "dinov2_giant": gated,
        "clip": clip,
        "distilled": distilled,
        "beit": beit,
        "beit_pretraining": shared | {"rel_pos_bias.relative_position_index": INDEX},
    }


OTHERS: dict[str, Shapes] = {  # what is next to `backbone.` in the same dictionary
    "mae": {
        "neck.mask_token": (1, 1, 16),
        "neck.decoder_pos_embed": (1, 17, 16),
        **pair("neck.decoder_embed", 16, WIDTH),
        **pair("neck.decoder_blocks.0.ln1", 16),
        **pair("neck.decoder_blocks.0.attn.qkv", 48, 16),
        **pair("neck.decoder_blocks.0.attn.proj", 16, 16),
        **pair("neck.decoder_blocks.0.ffn.layers.0.0", 32, 16),
        **pair("neck.ln1", 16),
        **pair("neck.decoder_pred", 192, 16),
    },
    "mocov3": {**pair("neck.fc0", 16, WIDTH), **pair("head.predictor.fc0", 16, 16)},
    "maskfeat": {"target_generator.weight_x": (3, 1, 3, 3), **pair("head.fc", 108, WIDTH)},
    "beit_pretraining": pair("head.cls_head", 8192, WIDTH),
    "distilled": {**pair("head.layers.head", 7, WIDTH), **pair("head.layers.head_dist", 7, WIDTH)},
    "vit": pair("head.layers.head", 7, WIDTH),
}


def write(folder: Path) -> Files:
    files: Files = {}
    for name, tensors in backbones().items():
        state = prefixed("backbone.", tensors)
        state |= fill(OTHERS.get(name, pair("head.fc", 7, WIDTH)), seed=1)
        meta = {"epoch": 3, "iter": 40, "mmengine_version": "0.10.7", "dataset_meta": {"classes": ("a", "b")}}
        content: dict[str, Any] = {"meta": meta, "state_dict": state}
        options: dict[str, Any] = {}
        if name == "mocov3":
            state |= {f"momentum_encoder.module.0.{key}": tensor * 0.5 for key, tensor in tensors.items()}
            state["momentum_encoder.steps"] = torch.tensor(5)
            options = {"weights": "backbone"}
        if name == "clip":
            options = {"overrides": {"options": {"act_layer": "gelu"}}}
        if name == "config":
            meta["cfg"] = CONFIG
        if name == "ema":
            averaged = {f"module.{key}": tensor * 0.5 for key, tensor in state.items()}
            content["ema_state_dict"] = averaged | {"steps": torch.tensor(5)}
            content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
            content["message_hub"] = {}
            options = {"weights": "ema_state_dict"}
        files[name] = (folder / f"{name}.pth", options)
        torch.save(content, folder / f"{name}.pth")
    torch.save(backbones()["vit"], folder / "bare.pth")  # as the library's own converters leave it
    return files | {"bare": (folder / "bare.pth", {})}
