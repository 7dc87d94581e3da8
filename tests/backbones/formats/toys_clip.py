"""Toy image towers of CLIP: OpenAI's state_dict, OpenCLIP's training state, its folders with their config."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.backbones.formats.reference import Files, Shapes, fill, pair, prefixed

WIDTH, SIZE, PATCH = 192, 32, 8
GELU = {"overrides": {"options": {"act_layer": "gelu"}}}


def tower(
    width: int = WIDTH,
    depth: int = 2,
    patch: int = PATCH,
    grid: int = SIZE // PATCH,
    hidden: int = 4 * WIDTH,
    out: int = 24,
) -> Shapes:
    """Return the shapes of `VisionTransformer` in openai/CLIP clip/model.py, and in OpenCLIP's."""
    shapes: Shapes = {
        "class_embedding": (width,),
        "positional_embedding": (grid**2 + 1, width),
        "proj": (width, out),
        "conv1.weight": (width, 3, patch, patch),
        **pair("ln_pre", width),
        **pair("ln_post", width),
    }
    for i in range(depth):
        block: Shapes = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            **pair("attn.out_proj", width, width),
            **pair("ln_1", width),
            **pair("ln_2", width),
            **pair("mlp.c_fc", hidden, width),
            **pair("mlp.c_proj", width, hidden),
        }
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


TEXT: Shapes = {
    "positional_embedding": (77, 16),
    "text_projection": (16, 24),
    "logit_scale": (),
    "token_embedding.weight": (50, 16),
    "transformer.resblocks.0.attn.in_proj_weight": (48, 16),
    **pair("ln_final", 16),
}


def visual(**options: int) -> dict[str, torch.Tensor]:
    return prefixed("visual.", fill(tower(**options)))


def openai() -> dict[str, torch.Tensor]:
    """Return the state_dict of a released archive: float16 weights and three buffers."""
    weights = {name: tensor.half() for name, tensor in (visual() | fill(TEXT)).items()}
    return weights | {
        "input_resolution": torch.tensor(SIZE),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(50),
    }


def open_clip_folder(
    folder: Path, weights: dict[str, torch.Tensor], vision: dict[str, Any], **model: Any
) -> Path:
    folder.mkdir()
    save_file(weights, folder / "open_clip_model.safetensors")
    vision = {"image_size": SIZE, "layers": 2, "width": WIDTH, "patch_size": PATCH} | vision
    feed = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.4, 0.4, 0.4],
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    }
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}} | model,
        "preprocess_cfg": feed,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def clipa() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in visual().items() if "ln_pre" not in name}


def write(folder: Path) -> Files:
    torch.save(openai(), folder / "openai.pt")
    training = prefixed("module.", visual() | fill(TEXT))
    state = {
        "epoch": 3,
        "name": "run",
        "state_dict": training,
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(state, folder / "epoch_3.pt")
    save_file(fill(tower()), folder / "tower.safetensors")
    blocks = [f"visual.transformer.resblocks.{i}" for i in (0, 1)]
    scales: Shapes = {}
    for block in blocks:
        scales |= {f"{block}.ls_1.gamma": (WIDTH,), f"{block}.ls_2.gamma": (WIDTH,)}
    pooling = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    return {
        "openai": (folder / "openai.pt", {}),
        "training": (folder / "epoch_3.pt", GELU),
        "tower": (folder / "tower.safetensors", {"overrides": {"options": {"act_layer": "quick_gelu"}}}),
        "open_clip": (
            open_clip_folder(folder / "open_clip", visual() | fill(scales), {"head_width": 32}),
            {},
        ),
        "quickgelu": (open_clip_folder(folder / "dfn", visual(), {}, quick_gelu=True), {}),
        "clipa": (open_clip_folder(folder / "clipa", clipa(), pooling), {}),
    }
