"""Load whole autoencoders: `load_mae(PATH)` returns an MAE with its decoder, its spec and a report."""

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
from backbones.load import check_fit, make_report, translate
from backbones.reading.safe import check_tensors, check_values, read_file
from backbones.reading.source import CONFIG_FILE, Checkpoint, open_source
from backbones.translating.heads import Size, get_size
from backbones.translating.infer import MissingHeads
from backbones.translating.report import ConversionReport
from backbones.translating.structure import count_blocks
from mae_bench.errors import UserError
from mae_bench.models.mae import MAE
from mae_bench.models.options import MAEOptions
from mae_bench.models.resampling import resize_table
from mae_bench.pretrain.reconstruct import MAE_FILE
from mae_bench.spec import BackboneSpec

DECODER = re.compile(r"decoder_|mask_token$|target\.")
# (width, depth, MLP width) of a decoder -> heads, from facebookresearch/mae models_mae.py and from
# wangsr126/MAE-Lite projects/mae_lite/models_mae.py.
REFERENCE_HEADS = {(512, 8, 2048): 16}
REFERENCE = "the only number that the reference builds for a decoder of this size"
MAE_LITE_HEADS = {(96, 1, 384): 3, (192, 1, 768): 6, **REFERENCE_HEADS}
HF_DEFAULT_HEADS = 16  # of transformers' ViTMAEConfig
# Names of the decoder's layers in transformers before version 5, and as version 5 writes them.
HF_LAYER = re.compile(r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.")
GIVE_DECODER = "give decoder_num_heads={0} to load_mae, --decoder-num-heads {0} to reconstruct"
Weights = dict[str, torch.Tensor]


def load_mae(
    path: str | Path,
    *,
    norm_pix_loss: bool | None = None,
    img_size: int | tuple[int, int] | None = None,
    decoder_num_heads: int | None = None,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[MAE, BackboneSpec, ConversionReport]:
    """Load a masked autoencoder with its decoder, in float32 and in eval mode.

    Return the model, the spec of its encoder, and the account of every key of the file.

    Args:
        path: `mae.safetensors` or the folder of the pretraining that wrote it (also as run:DIR), a .pth file
            of facebookresearch/mae, or a folder of transformers' ViTMAEForPreTraining.
        norm_pix_loss: by default what the file states (our metadata, the reference's saved arguments,
            transformers' config), else False as in the reference's constructor; its *_full.pth files were
            trained with True.
        img_size: another size than the file's, in pixels. Both position tables are resampled (bicubic).
        decoder_num_heads: by default what the file states, else 16 for the reference's decoder, and for
            MAE-Lite's files what its code builds.
        weights: which set of weights to read from a file with several (model_ema, ...).
        overrides: BackboneSpec fields that cannot be inferred from the file (num_heads, ...).

    Raises UserError for a file without a decoder, for a number of heads that cannot be inferred, and for
    anything that does not fit; nothing is loaded in part.
    """
    # 1. Read the encoder's spec, the decoder's options and all weights.
    spec, options, tensors, report = _read(_find_file(path), weights, overrides or {})
    if norm_pix_loss is not None:
        options["norm_pix_loss"] = norm_pix_loss
    elif "norm_pix_loss" not in options:
        report.assumptions.append("norm_pix_loss False: assumed: the default of the reference's constructor")
    if decoder_num_heads is not None:
        options["decoder_num_heads"] = decoder_num_heads
    elif "decoder_num_heads" not in options:
        options["decoder_num_heads"] = get_reference_heads(tensors, str(path), overrides)
        report.assumptions.append(f"decoder_num_heads {options['decoder_num_heads']}: {REFERENCE}")

    # 2. Resample the position tables to another image size.
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        spec, tensors = _resize(spec, tensors, size)

    # 3. Build the model with a copy of the file's weights.
    copies = {name: tensor.float().clone() for name, tensor in tensors.items()}
    return build_autoencoder(spec, options, copies, str(path)), spec, report


def build_autoencoder(spec: BackboneSpec, options: Mapping[str, Any], weights: Weights, source: str) -> MAE:
    """Build an autoencoder in eval mode whose parameters are these tensors themselves, without copies.

    weights: as in the file, the encoder's names without a prefix. Raise UserError unless they fit exactly.
    """
    try:
        with torch.device("meta"):
            model = MAE(spec, MAEOptions(**options))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: its description cannot be read: {error}", expected="the fields of MAEOptions"
        ) from error
    named = {name if DECODER.match(name) else f"encoder.{name}": tensor for name, tensor in weights.items()}
    check_fit(model, named, source, "a masked autoencoder")
    model.load_state_dict(named, assign=True)
    return model.eval()


def get_reference_heads(weights: Weights, source: str, given: Mapping[str, Any] | None = None) -> int:
    """Return the heads of a decoder of the reference's size; raise MissingHeads for another one.

    given: the overrides so far, as in MissingHeads.
    """
    size = _get_decoder_size(weights)
    if size not in REFERENCE_HEADS:
        raise MissingHeads(source, *size[:2], "decoder_num_heads", GIVE_DECODER.format("N"), given)
    return REFERENCE_HEADS[size]


def _get_decoder_size(weights: Weights) -> Size:
    """Return width, depth and MLP width of a decoder."""
    blocks = {name.removeprefix("decoder_"): t for name, t in weights.items() if name.startswith("decoder_b")}
    return weights["decoder_embed.weight"].shape[0], *get_size(blocks)[1:]


def _find_file(path: str | Path) -> Path:
    found = Path(str(path).removeprefix("run:"))
    if not found.exists():
        raise UserError(
            f"{found} holds no masked autoencoder: no such file", expected="a checkpoint with its decoder"
        )
    return found / MAE_FILE if (found / MAE_FILE).is_file() else found


def _read(
    path: Path, weights: str | None, overrides: Mapping[str, Any]
) -> tuple[BackboneSpec, dict[str, Any], Weights, ConversionReport]:
    if _is_ours(path):
        return _read_ours(path)
    return read_autoencoder(open_source(path, weights=weights), overrides)


def read_autoencoder(
    checkpoint: Checkpoint, overrides: Mapping[str, Any], format: str | None = None
) -> tuple[BackboneSpec, dict[str, Any], Weights, ConversionReport]:
    """Return spec, the stated fields of MAEOptions, weights and report; the encoder's names have no prefix.

    For files of other code than ours. Raise UserError for a checkpoint without a decoder.
    """
    # 1. Find the decoder: in transformers' files it is next to the encoder, whose prefix is "vit.".
    root = checkpoint.prefix.removesuffix("vit.")
    outside = {name.removeprefix(root): tensor for name, tensor in checkpoint.outside.items()}
    tensors = checkpoint.tensors | outside
    decoder = {
        name: tensor for name, tensor in tensors.items() if DECODER.match(name) or name.startswith("decoder.")
    }
    if not any(name.endswith("mask_token") for name in decoder):
        raise _no_decoder(checkpoint.source)
    check_values(decoder, checkpoint.source)

    # 2. Translate the encoder, and the decoder with its format.
    name, translation, spec = translate(checkpoint, format, overrides)
    if name == "hf_vitmae":
        options, decoder = _read_hf_options(checkpoint), _translate_hf_decoder(checkpoint, decoder)
    else:
        options = _read_reference_options(checkpoint)
    options |= _infer_sizes(decoder, checkpoint.source)
    if translation.family == "mae_lite":
        heads = MAE_LITE_HEADS.get(_get_decoder_size(decoder))
        options = ({"decoder_num_heads": heads} if heads else {}) | options
    report = make_report(checkpoint, name, translation)
    _account_for_decoder(report, checkpoint, root)
    return spec, options, translation.weights | decoder, report


def _account_for_decoder(report: ConversionReport, checkpoint: Checkpoint, root: str) -> None:
    """Move the decoder's tensors in the report from the dropped ones to the renamed ones."""
    for name in checkpoint.stored:
        own = name.removeprefix(checkpoint.prefix if name.startswith(checkpoint.prefix) else root)
        if name in report.dropped and (DECODER.match(own) or own.startswith("decoder.")):
            del report.dropped[name]
            report.renamed[name] = own


def _is_ours(path: Path) -> bool:
    """Return whether the file's metadata describe a decoder; an unreadable file is reported by its reader."""
    try:
        with safe_open(path, framework="pt") as file:
            return "decoder" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _read_ours(path: Path) -> tuple[BackboneSpec, dict[str, Any], Weights, ConversionReport]:
    read = read_file(path)
    weights, metadata = read.content, read.metadata
    check_tensors(weights, path, read.size)
    check_values(weights, str(path))
    try:
        spec = BackboneSpec.from_dict(json.loads(metadata["spec"]))
        names = {name: name for name in weights}
        report = ConversionReport(str(path), "mae_bench", read.digest, names)
        return spec, dict(json.loads(metadata["decoder"])), weights, report
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: its description cannot be read: {error}", expected="a file written by a pretraining"
        ) from error


def _no_decoder(source: str) -> UserError:
    return UserError(
        f"{source} holds no masked autoencoder: it has no decoder",
        expected=f"encoder and decoder: {MAE_FILE} of a pretraining, a *_full.pth file, "
        "or a ViTMAEForPreTraining folder",
        fix="a backbone without a decoder cannot reconstruct; load it with backbones.load.load_backbone",
    )


def _infer_sizes(decoder: Weights, source: str) -> dict[str, Any]:
    try:
        width = decoder["decoder_embed.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise _no_decoder(source) from error
    depth = count_blocks(decoder, "decoder_blocks")
    return {"decoder_embed_dim": width, "decoder_depth": depth}


def _read_reference_options(checkpoint: Checkpoint) -> dict[str, Any]:
    args = checkpoint.extras.get("args")
    stated = vars(args) if isinstance(args, Namespace) else {}
    options: dict[str, Any] = {}
    if "norm_pix_loss" in stated:
        options["norm_pix_loss"] = bool(stated["norm_pix_loss"])
    if isinstance(stated.get("decoder_num_heads"), int):
        options["decoder_num_heads"] = stated["decoder_num_heads"]
    return options


def _read_hf_options(checkpoint: Checkpoint) -> dict[str, Any]:
    if CONFIG_FILE not in checkpoint.beside:
        return {}
    config = checkpoint.beside[CONFIG_FILE]
    return {
        "norm_pix_loss": bool(config.get("norm_pix_loss", False)),
        "decoder_num_heads": config.get("decoder_num_attention_heads", HF_DEFAULT_HEADS),
    }


def _translate_hf_decoder(checkpoint: Checkpoint, decoder: Weights) -> Weights:
    """Translate the decoder's layers with the encoder's format: their names are the same."""
    layers, rest = {}, {}
    for name, tensor in decoder.items():
        if HF_LAYER.match(name):
            layers[HF_LAYER.sub("encoder.layer.", name)] = tensor
        else:
            rest[name.removeprefix("decoder.")] = tensor
    blocks = hf_vitmae.read(replace(checkpoint, tensors=layers)).weights
    return {f"decoder_{name}": tensor for name, tensor in blocks.items()} | rest


def _resize(spec: BackboneSpec, weights: Weights, img_size: tuple[int, int]) -> tuple[BackboneSpec, Weights]:
    """Resample both position tables; resampled sine-cosine tables count as learned."""
    if tuple(img_size) == spec.img_size:
        return spec, weights
    new = replace(spec, img_size=(img_size[0], img_size[1]), pos_embed="learned")
    tables = {
        name: resize_table(weights[name].float(), spec.grid_size, new.grid_size, spec.pos_resample)
        for name in ("pos_embed", "decoder_pos_embed")
    }
    return new, weights | tables
