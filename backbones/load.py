"""Load any checkpoint by `load_backbone(SOURCE)` as a timm ViT, a BackboneSpec and a ConversionReport."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from backbones.reading.safe import check_values
from backbones.reading.source import Checkpoint, open_source
from backbones.translating.detect import detect, find_formats, get_format
from backbones.translating.grids import find_img_sizes
from backbones.translating.heads import add_num_heads
from backbones.translating.infer import infer_spec
from backbones.translating.origins import find_assumptions
from backbones.translating.report import ConversionReport, read_assumptions
from backbones.translating.resample import resample
from backbones.translating.structure import count_blocks, infer_global_pool
from backbones.translating.translation import Translation
from mae_bench.errors import UserError
from mae_bench.models.create import Size, parse_size
from mae_bench.models.vit import ARCHS, ViT, build_vit
from mae_bench.spec import BackboneSpec

NUMBERED = re.compile(r"(.*\b(?:blocks|layers?|resblocks))\.(\d{1,4})\.")
# Architectures whose tensors all come from the file or are computed buffers: built on the meta device,
# because initialising billions of weights at random takes minutes.
FILLED = ("vit", "eva")
MAX_LISTED = 12  # tensor names in an error message

SURPLUS = "if the unexpected tensors are not part of the backbone, save the state_dict without them"
ANOTHER = "if the file is in another format, name it with --format NAME"


class ReadOptions(TypedDict, total=False):
    """The keywords of every function that reads a checkpoint.

    format: a name in `backbones.translating.detect.FORMATS`; by default it is detected.
    weights: which set of weights to read from a file with several (teacher, model_ema, ...).
    sha256: the expected digest of the weight file.
    overrides: BackboneSpec fields that cannot be inferred from the file (num_heads, mean, ...).
    """

    format: str | None
    weights: str | None
    sha256: str | None
    overrides: Mapping[str, Any] | None


def load_backbone(
    source: str | Path | Checkpoint,
    *,
    global_pool: str | None = None,
    drop_path_rate: float = 0.0,
    dynamic_img_size: bool = False,
    img_size: Size | None = None,
    patch_size: Size | None = None,
    patch_resample: str = "pinv",
    format: str | None = None,
    weights: str | None = None,
    sha256: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ViT, BackboneSpec, ConversionReport]:
    """Load a checkpoint into a timm ViT without a head, in float32 and in eval mode.

    `forward_features` maps images (N, C, H, W) to tokens (N, prefix + L, D) after the final norm. A norm
    trained after average pooling (`fc_norm`) is applied by `forward_head(..., pre_logits=True)`.

    Args:
        source: a path, file:PATH, run:DIR, timm:NAME, official:NAME, hf:REPO@REVISION, or a `Checkpoint`.
        global_pool: "token" or "avg"; by default that of the weights. "avg" replaces a final norm by a new
            one after the pooling, as MAE does for fine-tuning.
        drop_path_rate: stochastic depth rate of the last block; the rate grows linearly with depth.
        dynamic_img_size: accept images of any multiple of the patch size.
        img_size, patch_size: pixels, as (height, width) or one number. Position tables and patch embedding
            are resampled (`backbones.translating.resample`) if the weights were trained at another size.
        patch_resample: "pinv" or "bicubic", how the patch embedding is resampled.
        format, weights, sha256, overrides: see `ReadOptions`.

    Raises UserError for anything wrong with the file; a checkpoint is never loaded in part.
    """
    # 1. Open the source: tensors, metadata and digest.
    checkpoint = source if isinstance(source, Checkpoint) else open_source(source, sha256, weights)

    # 2. Detect the format, rename every tensor to timm's names and infer the spec.
    name, translation, spec = translate(checkpoint, format, overrides)
    translation.weights = {key: tensor.float() for key, tensor in translation.weights.items()}

    # 3. Move the final norm if another pooling is asked for.
    layout = _fit_pooling(translation, global_pool, checkpoint.source, spec)

    # 4. Resample position tables and patch embedding to the requested sizes.
    sizes = _as_pair(img_size, "img_size"), _as_pair(patch_size, "patch_size")
    spec = resample(translation, spec, *sizes, patch_resample)

    # 5. Build the model without allocating weights, and check that each tensor has its place.
    options: Any = {"drop_path_rate": drop_path_rate, "dynamic_img_size": dynamic_img_size}
    with torch.device("meta" if spec.arch in FILLED else "cpu"):
        model = build_vit(spec, global_pool=layout, **options)
    check_fit(model, translation.weights, checkpoint.source, name)

    # 6. Copy the weights: mapped files must not have changed since their digest was taken.
    model.load_state_dict({key: tensor.clone() for key, tensor in translation.weights.items()}, assign=True)
    checkpoint.check_unchanged()
    _fill_buffers(model)
    return model.eval(), spec, make_report(checkpoint, name, translation)


def _as_pair(size: Size | None, what: str) -> tuple[int, int] | None:
    return None if size is None else parse_size(size, what)


def _fill_buffers(model: torch.nn.Module) -> None:
    """Compute the buffers that no file stores: rotary embeddings, the zero bias of keys."""
    for module in model.modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in empty.items():
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        if empty:
            cast(Any, module).init_non_persistent_buffers()


def translate(
    checkpoint: Checkpoint, format: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[str, Translation, BackboneSpec]:
    """Return the format, the translation and the spec of an opened checkpoint.

    The weights are finite and still in the stored precision. The translation accounts for every tensor by its
    name in the file, including the prefix and the tensors outside the ViT.
    """
    name = format or checkpoint.format or detect(checkpoint)
    translation = get_format(name).read(checkpoint)
    _check_blocks(checkpoint, translation)
    unexplained = sorted(set(checkpoint.tensors) - set(translation.renamed) - set(translation.dropped))
    if unexplained:
        raise UserError(
            f"{checkpoint.source}: the format {name} does not explain {', '.join(unexplained)}",
            expected="a reason for every key",
        )
    check_values(translation.weights, checkpoint.source)
    translation.notes += _make_notes(checkpoint, translation, format)
    _restore_names(checkpoint, translation)
    add_num_heads(name, checkpoint, translation)
    translation.img_sizes = find_img_sizes(name, checkpoint, translation)
    spec = infer_spec(translation, checkpoint.source, checkpoint.stated_spec, overrides)
    translation.assumptions = find_assumptions(name, translation, checkpoint, spec, overrides)
    return name, translation, spec


def _make_notes(checkpoint: Checkpoint, translation: Translation, format: str | None) -> list[str]:
    """Return notes on a format that was not the detected one, on the precision and the place in the file."""
    notes = []
    if format:
        detected = checkpoint.format or _detect_only_fit(checkpoint)
        if detected not in ("", format):
            notes.append(f"the file was detected as {detected} and read as {format}, as requested")
    dtypes = sorted({str(tensor.dtype) for tensor in translation.weights.values()} - {"torch.float32"})
    if dtypes:
        notes.append(f"stored as {', '.join(dtypes)}; loaded as torch.float32")
    if checkpoint.wrapper or checkpoint.prefix:
        notes.append(f"read from {checkpoint.label!r}")
    return notes


def _detect_only_fit(checkpoint: Checkpoint) -> str:
    found = find_formats(checkpoint)
    return found[0] if len(found) == 1 else ""


def _restore_names(checkpoint: Checkpoint, translation: Translation) -> None:
    """Rewrite the account with full names, as in the file, and add the tensors outside the ViT."""
    prefix = checkpoint.prefix
    renamed = {prefix + name: target for name, target in translation.renamed.items()}
    dropped = {prefix + name: reason for name, reason in translation.dropped.items()}
    for name in checkpoint.outside:
        if name not in translation.taken:
            reason = f"outside {checkpoint.label!r}, which holds the ViT"
            dropped[name] = translation.outside.get(name, reason)
    translation.renamed = renamed | translation.taken
    translation.dropped = dropped


def _check_blocks(checkpoint: Checkpoint, translation: Translation) -> None:
    """Raise UserError if blocks outside the ViT continue its numbering: part of the model would be lost."""
    depth = count_blocks(translation.weights)
    numbers: dict[str, set[int]] = {}
    for name in set(checkpoint.outside) - set(translation.taken):
        match = NUMBERED.match(name)
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    split = sorted(stem for stem, found in numbers.items() if 0 not in found and depth in found)
    if split:
        raise UserError(
            f"{checkpoint.source}: the ViT under {checkpoint.label!r} ends with block {depth - 1}, "
            f"and {split[0]} continues it",
            expected="all blocks of a model under one prefix",
            fix="save the parts under one prefix",
        )


def _fit_pooling(translation: Translation, global_pool: str | None, source: str, spec: BackboneSpec) -> str:
    """Return timm's pooling for the model; replace the final norm if `global_pool` asks for it."""
    weights = translation.weights
    if global_pool == "token" and "cls_token" not in weights:
        raise UserError(
            f"{source}: global_pool token for a ViT without a class token", expected="global_pool avg"
        )
    if "fc_norm.weight" in weights:
        if global_pool == "token":
            raise UserError(
                f"{source}: its last norm was trained after average pooling (fc_norm)",
                expected="global_pool avg",
            )
        return "avg"
    if global_pool == "avg" and "norm.weight" in weights:
        for key in [key for key in ("weight", "bias") if f"norm.{key}" in weights]:  # an RMSNorm has no bias
            del weights[f"norm.{key}"]
            stored = next(name for name, target in translation.renamed.items() if target == f"norm.{key}")
            del translation.renamed[stored]
            translation.dropped[stored] = (
                "average pooling was requested: MAE puts a new norm after it (fc_norm)"
            )
            translation.new[f"fc_norm.{key}"] = "a new LayerNorm after average pooling"
            weights[f"fc_norm.{key}"] = torch.full((spec.embed_dim,), 1.0 if key == "weight" else 0.0)
    return global_pool or infer_global_pool(weights)


def read_backbone(
    source: str | Path,
    *,
    format: str | None = None,
    weights: str | None = None,
    sha256: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Checkpoint, Translation, BackboneSpec, ConversionReport]:
    """Open and translate a checkpoint, and check that its weights fill the model they describe."""
    checkpoint = open_source(source, sha256, weights)
    name, translation, spec = translate(checkpoint, format, overrides)
    with torch.device("meta" if spec.arch in FILLED else "cpu"):
        model = build_vit(spec, global_pool=infer_global_pool(translation.weights))
    check_fit(model, translation.weights, checkpoint.source, name)
    return checkpoint, translation, spec, make_report(checkpoint, name, translation)


def check_fit(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str, format: str) -> None:
    """Raise UserError unless names and shapes of the weights are exactly those of the model."""
    target = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    differ = sorted(key for key in set(found) & set(target) if found[key] != target[key])
    problems = {
        "missing": sorted(set(target) - set(found)),
        "unexpected": sorted(set(found) - set(target)),
        "wrong shape": [f"{key} {found[key]} instead of {target[key]}" for key in differ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_list(keys)}" for what, keys in problems.items() if keys)
        raise UserError(
            f"{source}, read as {format}, does not match the model it describes{_describe(model)}: {listed}",
            expected="one tensor for every weight, and a reason for each tensor that is dropped",
            fix=f"{SURPLUS}; {ANOTHER}" if problems["unexpected"] else ANOTHER,
        )


def _describe(model: Any) -> str:
    """Return a ViT's class and sizes in brackets: (vit, width 192, depth 2); "" for another model."""
    arch = next((arch for arch, kind in ARCHS.items() if type(model) is kind), type(model).__name__)
    return f" ({arch}, width {model.embed_dim}, depth {len(model.blocks)})" if isinstance(model, ViT) else ""


def _list(keys: list[str]) -> str:
    more = len(keys) - MAX_LISTED
    return ", ".join(keys[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def make_report(checkpoint: Checkpoint, format: str, translation: Translation) -> ConversionReport:
    """Return the account of a translated checkpoint."""
    return ConversionReport(
        source=checkpoint.source,
        format=format,
        digest=checkpoint.digest,
        renamed=translation.renamed,
        reshaped=translation.reshaped,
        dropped=translation.dropped,
        new=translation.new,
        files=checkpoint.files,
        notes=[*checkpoint.notes, *translation.notes],
        assumptions=[*read_assumptions(checkpoint.conversion), *translation.assumptions],
        licence=checkpoint.licence,
    )
