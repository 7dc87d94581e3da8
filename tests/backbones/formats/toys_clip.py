"""Toy image towers of CLIP: OpenAI's state_dict, OpenCLIP's training state, its folders with their config."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.backbones.formats.reference import fill

WIDTH, SIZE, PATCH = 192, 32, 8
GELU = {"overrides": {"options": {"act_layer": "gelu"}}}


def tower(
    width: int = WIDTH,
    depth: int = 2,
    patch: int = PATCH,
    grid: int = SIZE // PATCH,
    hidden: int = 4 * WIDTH,
    out: int = 24,
):
    """Names and shapes of `VisionTransformer` in openai/CLIP clip/model.py, and in OpenCLIP's."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,), "positional_embedding": (grid**2 + 1, width), "proj": (width, out),
        "conv1.weight": (width, 3, patch, patch),
        "ln_pre.weight": (width,), "ln_pre.bias": (width,), "ln_post.weight": (width,), "ln_post.bias": (width,),
    }  # fmt: skip
    for i in range(depth):
        block = {
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "mlp.c_fc.weight": (hidden, width), "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (width, hidden), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


TEXT = {
    "positional_embedding": (77, 16), "text_projection": (16, 24), "logit_scale": (), "token_embedding.weight": (50, 16),
    "transformer.resblocks.0.attn.in_proj_weight": (48, 16), "ln_final.weight": (16,), "ln_final.bias": (16,),
}  # fmt: skip


def visual(**options: int) -> dict[str, torch.Tensor]:
    return {f"visual.{name}": tensor for name, tensor in fill(tower(**options)).items()}


def openai() -> dict[str, torch.Tensor]:
    """The state_dict of a released archive: float16, beside three buffers."""
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


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    torch.save(openai(), folder / "openai.pt")
    training = {f"module.{name}": tensor for name, tensor in (visual() | fill(TEXT)).items()}
    state = {
        "epoch": 3,
        "name": "run",
        "state_dict": training,
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(state, folder / "epoch_3.pt")
    save_file(fill(tower()), folder / "tower.safetensors")
    scales = {f"visual.transformer.resblocks.{i}.ls_{j}.gamma": (WIDTH,) for i in (0, 1) for j in (1, 2)}
    return {
        "openai": (folder / "openai.pt", {}),
        "training": (folder / "epoch_3.pt", GELU),
        "tower": (folder / "tower.safetensors", {"overrides": {"options": {"act_layer": "quick_gelu"}}}),
        "open_clip": (open_clip_folder(folder / "open_clip", visual() | fill(scales), {"head_width": 32}), {}),
        "quickgelu": (open_clip_folder(folder / "dfn", visual(), {}, quick_gelu=True), {}),
        "clipa": (
            open_clip_folder(folder / "clipa", clipa(), {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}), {},
        ),
    }  # fmt: skip
