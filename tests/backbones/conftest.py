"""Toy checkpoints in the exact layout of each format, made without the code under test."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from backbones.translating.grids import RELEASED
from backbones.translating.heads import SIZES
from tests.backbones.formats import toys_official_mae
from tests.backbones.formats.plain_vit import DEPTH, PATCH, SIZE, WIDTH, encoder_shapes
from tests.backbones.formats.toys_official_mae import DECODER, decoder_shapes

TOY_HIDDEN = (4 * WIDTH, 2 * WIDTH, 488, 512)  # MLP widths of the toys
HEADS = 3  # of the toys, whose files do not state it


@pytest.fixture(scope="module")
def toy_grids() -> Iterator[None]:
    """State the grid of the toys, as each family's released files have theirs.

    Without this fixture, every reader asks for the image size of a toy with a learned table.
    """
    stated = {family: (*sides, SIZE // PATCH) for family, sides in RELEASED.items()}
    with mock.patch.dict(RELEASED, stated):
        yield


@pytest.fixture(scope="module")
def toy_heads(toy_grids) -> Iterator[None]:
    """State the number of heads of the toys' sizes, as each family's code states that of its own sizes.

    Without this fixture, the toys of depth 2 are no size of any family, and every reader asks.
    """
    stated = {}
    for family, sizes in SIZES.items():
        num_heads = 12 if family in ("moco_v3", "solo_learn, fixed positions") else HEADS
        stated[family] = sizes | {(WIDTH, DEPTH, hidden): num_heads for hidden in TOY_HIDDEN}
    with mock.patch.dict(SIZES, stated):
        yield


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
    """The toy weights that the files are made of; not to be changed."""
    return toys_official_mae.models()


@pytest.fixture(scope="session")
def files(toys, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Name -> (path, format) of toy files with a detected format: the reference's, timm's, transformers'."""
    folder = tmp_path_factory.mktemp("checkpoints")
    written = toys_official_mae.write(folder)
    official = {name: (path, "official_mae") for name, (path, options) in written.items() if not options}
    save_file(toys["classifier"], folder / "timm.safetensors")
    torch.save(toys["encoder"], folder / "timm.bin")
    torch.save({"state_dict": toys["classifier"], "epoch": 3, "arch": "vit"}, folder / "timm.pth")
    in_timm = {
        f"timm{suffix}": (folder / f"timm{suffix}", "timm") for suffix in (".safetensors", ".bin", ".pth")
    }
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
            for part, tensor in zip(
                ("query", "key", "value"), encoder[f"blocks.{i}.attn.qkv.{kind}"].split(WIDTH), strict=True
            ):
                theirs[f"vit.encoder.layer.{i}.attention.attention.{part}.{kind}"] = tensor.clone()
            theirs[f"vit.encoder.layer.{i}.attention.output.dense.{kind}"] = encoder[
                f"blocks.{i}.attn.proj.{kind}"
            ]
            theirs[f"vit.encoder.layer.{i}.intermediate.dense.{kind}"] = encoder[f"blocks.{i}.mlp.fc1.{kind}"]
            theirs[f"vit.encoder.layer.{i}.output.dense.{kind}"] = encoder[f"blocks.{i}.mlp.fc2.{kind}"]
            theirs[f"vit.encoder.layer.{i}.layernorm_before.{kind}"] = encoder[f"blocks.{i}.norm1.{kind}"]
            theirs[f"vit.encoder.layer.{i}.layernorm_after.{kind}"] = encoder[f"blocks.{i}.norm2.{kind}"]
    save_file(theirs, folder / "model.safetensors")
    config = {
        "model_type": "vit_mae",
        "num_attention_heads": HEADS,
        "layer_norm_eps": 1e-12,
        "image_size": SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
