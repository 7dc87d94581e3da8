"""One door for whole autoencoders: `load_mae(PATH)` gives an MAE with its decoder, from our file or anyone's."""

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from backbones.formats import hf_vitmae
from backbones.load import check_fit, translate
from backbones.reading.safe import check_tensors, check_values, read_file
from backbones.reading.source import CONFIG_FILE, Checkpoint, open_source
from mae_bench.errors import UserError
from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.models.resampling import resize_table
from mae_bench.pretrain.reconstruct import MAE_FILE
from mae_bench.spec import BackboneSpec

DECODER = re.compile(r"decoder_|mask_token$|target\.")
REFERENCE_HEADS = 16  # of the decoder of every size in facebookresearch/mae; its files do not say
HF_LAYER = re.compile(
    r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\."
)  # transformers before 5, and as 5 writes it
Weights = dict[str, torch.Tensor]


def load_mae(
    path: str | Path,
    *,
    norm_pix_loss: bool | None = None,
    img_size: int | tuple[int, int] | None = None,
    decoder_num_heads: int | None = None,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> MAE:
    """The whole autoencoder, in eval mode and float32, of a file or folder: ours, facebookresearch/mae's, transformers'.

    path: `mae.safetensors`, the folder of the pretraining that wrote it (also as run:DIR), a .pth, a Hugging Face folder.
    norm_pix_loss: by default what the file says (our metadata, the reference's saved arguments, transformers' config); where
    it is silent False, the reference constructor's own default: its released *_full.pth were trained with True.
    decoder_num_heads: by default what the file says, else the reference's 16. weights: which set of weights, where the file
    holds several (model_ema ...). overrides: fields of the BackboneSpec.
    img_size: another one than the file's resamples both position tables (bicubic), as MAE is taken to 448 pixels.
    Raises UserError for a file without a decoder and for whatever does not fit: nothing is loaded in part.
    """
    spec, options, tensors = _read(_file(path), weights, overrides or {})
    told = {"norm_pix_loss": norm_pix_loss, "decoder_num_heads": decoder_num_heads}
    options |= {key: value for key, value in told.items() if value is not None}
    if img_size is not None:
        spec, tensors = _resize(
            spec, tensors, (img_size, img_size) if isinstance(img_size, int) else img_size
        )
    model = _hollow(spec, options, path)
    ours = {
        name if DECODER.match(name) else f"encoder.{name}": tensor.float() for name, tensor in tensors.items()
    }
    check_fit(model, ours, str(path), "a masked autoencoder")
    model.load_state_dict({name: tensor.clone() for name, tensor in ours.items()}, assign=True)
    return model.eval()


def _hollow(spec: BackboneSpec, options: Mapping[str, Any], path: str | Path) -> MAE:
    """The model without memory for its weights: those of the file take their place."""
    try:
        with torch.device("meta"):
            return MAE(spec, MAEOptions(**options))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its description cannot be read: {error}", expected="the fields of MAEOptions"
        ) from error


def _file(path: str | Path) -> Path:
    found = Path(str(path).removeprefix("run:"))
    if not found.exists():
        raise UserError(
            f"{found} holds no masked autoencoder: there is no such file",
            expected="a checkpoint with its decoder",
        )
    return found / MAE_FILE if (found / MAE_FILE).is_file() else found


def _read(
    path: Path, weights: str | None, overrides: Mapping[str, Any]
) -> tuple[BackboneSpec, dict[str, Any], Weights]:
    """Spec, keywords of MAE and weights, the encoder's without prefix."""
    if _is_ours(path):
        return _read_ours(path)
    checkpoint = open_source(path, weights=weights)
    root = checkpoint.prefix.removesuffix(
        "vit."
    )  # transformers' decoder stands beside the encoder, not inside
    named = checkpoint.tensors | {
        name.removeprefix(root): tensor for name, tensor in checkpoint.outside.items()
    }
    decoder = {name: t for name, t in named.items() if DECODER.match(name) or name.startswith("decoder.")}
    if not any(name.endswith("mask_token") for name in decoder):
        raise _no_decoder(path)
    check_values(decoder, checkpoint.source)
    format, translation, spec = translate(checkpoint, overrides=overrides)
    if format == "hf_vitmae":
        options, decoder = _hf_options(checkpoint), _hf_decoder(checkpoint, decoder)
    else:
        options = _reference_options(checkpoint)
    return spec, options | _shapes(decoder, path), translation.weights | decoder


def _is_ours(path: Path) -> bool:
    """Whether the file's metadata describe a decoder; a file that cannot be read is told apart by who reads it next."""
    try:
        with safe_open(path, framework="pt") as file:
            return "decoder" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _read_ours(path: Path) -> tuple[BackboneSpec, dict[str, Any], Weights]:
    read = read_file(path)
    weights, metadata = read.content, read.metadata
    check_tensors(weights, path, read.size)
    check_values(weights, str(path))
    try:
        return (
            BackboneSpec.from_dict(json.loads(metadata["spec"])),
            dict(json.loads(metadata["decoder"])),
            weights,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: its description cannot be read: {error}", expected="a file that a pretraining wrote"
        ) from error


def _no_decoder(path: Path) -> UserError:
    return UserError(
        f"{path} holds no masked autoencoder: it has no decoder",
        expected=f"encoder and decoder: {MAE_FILE} of a pretraining, a *_full.pth, or a ViTMAEForPreTraining folder",
        fix="a backbone alone cannot reconstruct; backbones.load.load_backbone loads it",
    )


def _shapes(decoder: Weights, path: Path) -> dict[str, Any]:
    try:
        width = decoder["decoder_embed.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise _no_decoder(path) from error
    depth = len({name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")})
    return {"decoder_embed_dim": width, "decoder_depth": depth}


def _reference_options(checkpoint: Checkpoint) -> dict[str, Any]:
    args = checkpoint.extras.get("args")
    said = vars(args).get("norm_pix_loss", False) if isinstance(args, Namespace) else False
    return {"norm_pix_loss": bool(said), "decoder_num_heads": REFERENCE_HEADS}


def _hf_options(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.beside.get(CONFIG_FILE, {})
    return {
        "norm_pix_loss": bool(config.get("norm_pix_loss", False)),
        "decoder_num_heads": config.get("decoder_num_attention_heads", REFERENCE_HEADS),
    }


def _hf_decoder(checkpoint: Checkpoint, decoder: Weights) -> Weights:
    """The decoder's layers have the encoder's names, so its translator reads them."""
    layers = {
        HF_LAYER.sub("encoder.layer.", name): tensor
        for name, tensor in decoder.items()
        if HF_LAYER.match(name)
    }
    blocks = hf_vitmae.read(replace(checkpoint, tensors=layers)).weights
    rest = {
        name.removeprefix("decoder."): tensor for name, tensor in decoder.items() if not HF_LAYER.match(name)
    }
    return {f"decoder_{name}": tensor for name, tensor in blocks.items()} | rest


def _resize(spec: BackboneSpec, weights: Weights, img_size: tuple[int, int]) -> tuple[BackboneSpec, Weights]:
    """Spec and weights for images of another size; a resampled table is no sine-cosine table of its new grid."""
    if tuple(img_size) == spec.img_size:
        return spec, weights
    new = replace(spec, img_size=(img_size[0], img_size[1]), pos_embed="learned")
    tables = {
        name: resize_table(weights[name].float(), spec.grid_size, new.grid_size, spec.pos_resample)
        for name in ("pos_embed", "decoder_pos_embed")
    }
    return new, weights | tables
