"""Toy checkpoints in the exact layout of each format, made without the code under test."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mae_bench.models.pos_embed import sincos_2d

WIDTH, DEPTH, HEADS, SIZE, PATCH, DECODER = 192, 2, 3, 32, 8, 16  # 192 is a standard width: 3 heads


def block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """One block of facebookresearch/mae and timm."""
    return {
        "norm1.weight": (width,), "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip


def encoder_shapes(width: int, depth: int, size: int, patch: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (size // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block_shapes(width).items()}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def decoder_shapes(width: int, decoder: int, depth: int, size: int, patch: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, (size // patch) ** 2 + 1, decoder),
        "decoder_embed.weight": (decoder, width), "decoder_embed.bias": (decoder,),
        "decoder_norm.weight": (decoder,), "decoder_norm.bias": (decoder,),
        "decoder_pred.weight": (patch * patch * 3, decoder), "decoder_pred.bias": (patch * patch * 3,),
    }  # fmt: skip
    for i in range(depth):
        shapes |= {f"decoder_blocks.{i}.{name}": shape for name, shape in block_shapes(decoder).items()}
    return shapes


def fill(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Random weights; LayerNorm scales around 1, so that a norm that is forgotten or misplaced shows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    return {name: tensor + 1 if "norm" in name and name.endswith("weight") else tensor for name, tensor in drawn.items()}


@pytest.fixture(scope="session")
def layouts():
    """The two functions that list the official keys and shapes."""
    return encoder_shapes, decoder_shapes


@pytest.fixture
def encoder(toys) -> dict[str, torch.Tensor]:
    """A copy that a test may change."""
    return {name: tensor.clone() for name, tensor in toys["encoder"].items()}


@pytest.fixture(scope="session")
def toys() -> dict[str, dict[str, torch.Tensor]]:
    """The toy weights that the files are made of; not to be changed.

    fine: as main_finetune.py saves it (global pooling, fc_norm, a trained position table).
    probe: as main_linprobe.py saves it (BatchNorm without affine parameters, then a linear layer).
    """
    encoder = fill(encoder_shapes(WIDTH, DEPTH, SIZE, PATCH), 0)
    encoder["pos_embed"] = sincos_2d(WIDTH, (SIZE // PATCH, SIZE // PATCH))
    head = fill({"head.weight": (10, WIDTH), "head.bias": (10,)}, 2)
    fine = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in encoder.items()}
    fine["pos_embed"] = fine["pos_embed"] + fill({"table": (1, 17, WIDTH)}, 3)["table"]
    norm = {"head.0.running_mean": torch.zeros(WIDTH), "head.0.running_var": torch.ones(WIDTH)}
    count = {"head.0.num_batches_tracked": torch.tensor(7)}
    probe_head = {**norm, **count, "head.1.weight": head["head.weight"], "head.1.bias": head["head.bias"]}
    decoder = fill(decoder_shapes(WIDTH, DECODER, 1, SIZE, PATCH), 1)
    return {
        "encoder": encoder,
        "full": {**encoder, **decoder},
        "fine": {**fine, **head},
        "probe": {**encoder, **probe_head},
        "classifier": {**encoder, **head},
    }


@pytest.fixture(scope="session")
def files(toys, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Name -> (path, format) of a toy file of every layout that is read."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("encoder", "full", "fine", "probe"):
        torch.save({"model": toys[name]}, folder / f"{name}.pth")
    args = argparse.Namespace(model="mae_vit_toy", blr=1.5e-4, norm_pix_loss=True, resume="", gpu=0)
    training = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}, "epoch": 7}
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    torch.save({"model": toys["full"], **training, "scaler": scaler, "args": args}, folder / "checkpoint-7.pth")
    save_file(toys["classifier"], folder / "timm.safetensors")
    torch.save(toys["encoder"], folder / "timm.bin")
    torch.save({"state_dict": toys["classifier"], "epoch": 3, "arch": "vit"}, folder / "timm.pth")
    official = {name: (folder / f"{name}.pth", "official_mae") for name in ("encoder", "full", "fine", "probe", "checkpoint-7")}
    in_timm = {f"timm{suffix}": (folder / f"timm{suffix}", "timm") for suffix in (".safetensors", ".bin", ".pth")}
    return {**official, **in_timm, "hf": (write_hf(folder / "hf", toys["encoder"]), "hf_vitmae")}


def write_hf(folder: Path, encoder: dict[str, torch.Tensor]) -> Path:
    """The layout of transformers' ViTMAEForPreTraining files, with a part of its decoder."""
    folder.mkdir()
    theirs = {
        "vit.embeddings.cls_token": encoder["cls_token"],
        "vit.embeddings.position_embeddings": encoder["pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": encoder["patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": encoder["patch_embed.proj.bias"],
        "vit.layernorm.weight": encoder["norm.weight"],
        "vit.layernorm.bias": encoder["norm.bias"],
        "decoder.mask_token": torch.zeros(1, 1, DECODER),
    }
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            for part, tensor in zip(("query", "key", "value"), encoder[f"blocks.{i}.attn.qkv.{kind}"].split(WIDTH), strict=True):
                theirs[f"vit.encoder.layer.{i}.attention.attention.{part}.{kind}"] = tensor.clone()
            theirs[f"vit.encoder.layer.{i}.attention.output.dense.{kind}"] = encoder[f"blocks.{i}.attn.proj.{kind}"]
            theirs[f"vit.encoder.layer.{i}.intermediate.dense.{kind}"] = encoder[f"blocks.{i}.mlp.fc1.{kind}"]
            theirs[f"vit.encoder.layer.{i}.output.dense.{kind}"] = encoder[f"blocks.{i}.mlp.fc2.{kind}"]
            theirs[f"vit.encoder.layer.{i}.layernorm_before.{kind}"] = encoder[f"blocks.{i}.norm1.{kind}"]
            theirs[f"vit.encoder.layer.{i}.layernorm_after.{kind}"] = encoder[f"blocks.{i}.norm2.{kind}"]
    save_file(theirs, folder / "model.safetensors")
    config = {"model_type": "vit_mae", "num_attention_heads": HEADS, "layer_norm_eps": 1e-12, "image_size": SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
