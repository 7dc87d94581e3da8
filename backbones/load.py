"""One door for every checkpoint: `load_backbone(SOURCE)` gives a timm model, its BackboneSpec and a ConversionReport."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from backbones.reading.safe import check_values
from backbones.reading.source import Checkpoint, open_source
from backbones.reading.trust import TRUSTED
from backbones.translating.detect import detect, find_formats, get_format
from backbones.translating.infer import infer_spec
from backbones.translating.report import ConversionReport
from backbones.translating.resample import resample
from backbones.translating.structure import infer_global_pool
from backbones.translating.translation import Translation
from mae_bench.errors import UserError
from mae_bench.models.create import Size, parse_size
from mae_bench.models.vit import ARCHS, ViT, build_vit
from mae_bench.spec import BackboneSpec

NUMBERED = re.compile(r"(.*\b(?:blocks|layers?|resblocks))\.(\d{1,4})\.")
FILLED = (
    "vit",
    "eva",
)  # wholly, by weights and computed buffers: random numbers for billions of weights would take minutes

SURPLUS = "if the unexpected ones are no part of the backbone, save the state_dict without them"
ANOTHER = "if it is of another family, --format NAME reads it as another format"


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
    trust: bool = False,
) -> tuple[ViT, BackboneSpec, ConversionReport]:
    """Loads any known checkpoint into a timm ViT without a head, in float32.

    `forward_features` gives prefix and patch tokens after the final norm; weights whose norm stands behind the average pooling
    (`fc_norm`) keep it there, and `forward_head(..., pre_logits=True)` applies it. `global_pool` "avg" asks for that layout:
    a final norm is then dropped and a new one put behind the pooling, as MAE fine-tunes.
    source: a path, file:PATH, run:DIR, timm:NAME, official:NAME, hf:REPO@REVISION; or what `open_source` made of one (with
    its weights, sha256 and trust). format: a name of `backbones.translating.detect.FORMATS` where detection cannot decide. weights:
    which set of weights, where the file holds several (teacher, model_ema ...).
    img_size, patch_size: (height, width) in pixels, or one number for both, where a task needs others than the weights were
    trained at: tables and patch embedding are resampled (`backbones.translating.resample`), the latter by
    `patch_resample` "pinv" or "bicubic".
    sha256: the weight file's digest, which must match. overrides: spec fields that the file does not tell (num_heads, ...).
    trust: unpickle what cannot be read as data, in a subprocess without network; the report says so.
    Raises UserError for whatever is wrong with the file: nothing is loaded in part.
    """
    checkpoint = (
        source if isinstance(source, Checkpoint) else open_source(source, sha256, weights, trust=trust)
    )
    name, translation, spec = translate(checkpoint, format, overrides)
    translation.weights = {key: tensor.float() for key, tensor in translation.weights.items()}
    layout = _fit_pooling(translation, global_pool, checkpoint.source, spec)
    spec = resample(
        translation, spec, _pair(img_size, "img_size"), _pair(patch_size, "patch_size"), patch_resample
    )
    options: Any = {"drop_path_rate": drop_path_rate, "dynamic_img_size": dynamic_img_size}
    with torch.device("meta" if spec.arch in FILLED else "cpu"):
        model = build_vit(spec, global_pool=layout, **options)
    check_fit(model, translation.weights, checkpoint.source, name)
    model.load_state_dict({key: tensor.clone() for key, tensor in translation.weights.items()}, assign=True)
    checkpoint.check_unchanged()
    _fill_buffers(model)
    return model, spec, make_report(checkpoint, name, translation)


def _pair(size: Size | None, what: str) -> tuple[int, int] | None:
    return None if size is None else parse_size(size, what)


def _fill_buffers(model: torch.nn.Module) -> None:
    """Buffers that no file holds (rotary embeddings, the missing bias of keys) are computed by the modules that have them."""
    for module in model.modules():
        hollow = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in hollow.items():
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        if hollow:
            cast(Any, module).init_non_persistent_buffers()


def translate(
    checkpoint: Checkpoint, format: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[str, Translation, BackboneSpec]:
    """Format, translation (weights still in the stored precision, all finite) and spec of an opened checkpoint.

    The account names the tensors as the file does: with their prefix, and with those that stand outside of it.
    """
    name = format or checkpoint.format or detect(checkpoint)
    translation = get_format(name).read(checkpoint)
    _check_blocks(checkpoint, translation)
    if lost := sorted(set(checkpoint.tensors) - set(translation.renamed) - set(translation.dropped)):
        raise UserError(
            f"{checkpoint.source}: {name} does not explain {', '.join(lost)}",
            expected="a reason for every key",
        )
    check_values(translation.weights, checkpoint.source)
    if format and (by_itself := checkpoint.format or _only_fit(checkpoint)) not in ("", format):
        translation.notes.append(
            f"by itself this file would be read as {by_itself}; it was read as {format}, as was asked for"
        )
    if other := sorted({str(tensor.dtype) for tensor in translation.weights.values()} - {"torch.float32"}):
        translation.notes.append(f"stored as {', '.join(other)}; loaded as torch.float32")
    if checkpoint.wrapper or checkpoint.prefix:
        translation.notes.append(f"read from {checkpoint.label!r}")
    translation.renamed = {
        checkpoint.prefix + theirs: ours for theirs, ours in translation.renamed.items()
    } | translation.taken
    translation.dropped = {
        checkpoint.prefix + theirs: reason for theirs, reason in translation.dropped.items()
    }
    for theirs in (name for name in checkpoint.outside if name not in translation.taken):
        translation.dropped[theirs] = translation.outside.get(
            theirs, f"outside of {checkpoint.label!r}, where the ViT is"
        )
    return name, translation, infer_spec(translation, checkpoint.source, checkpoint.stated_spec, overrides)


def _only_fit(checkpoint: Checkpoint) -> str:
    found = find_formats(checkpoint)
    return found[0] if len(found) == 1 else ""


def _check_blocks(checkpoint: Checkpoint, translation: Translation) -> None:
    """UserError where blocks stand outside that go on where the ViT's end: one model in two parts, of which one would be lost."""
    depth = len({name.split(".")[1] for name in translation.weights if name.startswith("blocks.")})
    numbers: dict[str, set[int]] = {}
    for name in set(checkpoint.outside) - set(translation.taken):
        if match := NUMBERED.match(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    if split := sorted(stem for stem, found in numbers.items() if 0 not in found and depth in found):
        raise UserError(
            f"{checkpoint.source}: the ViT under {checkpoint.label!r} ends with block {depth - 1}, and {split[0]} goes on",
            expected="all blocks of a model under one prefix", fix="join its parts under the same names",
        )  # fmt: skip


def _fit_pooling(translation: Translation, global_pool: str | None, source: str, spec: BackboneSpec) -> str:
    """timm's pooling for the model; moves the final norm behind the pooling where that is asked for."""
    weights = translation.weights
    if global_pool == "token" and "cls_token" not in weights:
        raise UserError(
            f"{source}: global_pool token of a ViT without a class token", expected="global_pool avg"
        )
    if "fc_norm.weight" in weights:
        if global_pool == "token":
            raise UserError(
                f"{source}: its last norm was trained behind the average pooling (fc_norm)", expected="global_pool avg",
            )  # fmt: skip
        return "avg"
    if global_pool == "avg" and "norm.weight" in weights:
        for key in [key for key in ("weight", "bias") if f"norm.{key}" in weights]:  # an RMSNorm has no bias
            del weights[f"norm.{key}"]
            stored = next(name for name, ours in translation.renamed.items() if ours == f"norm.{key}")
            del translation.renamed[stored]
            translation.dropped[stored] = (
                "average pooling was asked for: MAE puts a new norm behind it (fc_norm)"
            )
            translation.new[f"fc_norm.{key}"] = "a fresh LayerNorm behind the average pooling"
            weights[f"fc_norm.{key}"] = torch.full((spec.embed_dim,), 1.0 if key == "weight" else 0.0)
    return global_pool or infer_global_pool(weights)


def check_fit(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str, format: str) -> None:
    """Every weight of the model is filled by one of its shape, and none is left over; else UserError lists them."""
    target = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    differ = {key for key in set(found) & set(target) if found[key] != target[key]}
    problems = {
        "missing": sorted(set(target) - set(found)),
        "unexpected": sorted(set(found) - set(target)),
        "of another shape": [f"{key} {found[key]} for {target[key]}" for key in sorted(differ)],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise UserError(
            f"{source}, read as {format}, does not fill the model that it describes{_sizes(model)}: {told}",
            expected="one tensor for every weight, and a reason for each that is left out",
            fix="; ".join([*([SURPLUS] if problems["unexpected"] else []), ANOTHER]),
        )


def _sizes(model: Any) -> str:
    """In brackets what a ViT is (vit, width 192, depth 2); nothing for another model."""
    arch = next((arch for arch, kind in ARCHS.items() if type(model) is kind), type(model).__name__)
    return f" ({arch}, width {model.embed_dim}, depth {len(model.blocks)})" if isinstance(model, ViT) else ""


def _listed(keys: list[str], limit: int = 12) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def make_report(checkpoint: Checkpoint, format: str, translation: Translation) -> ConversionReport:
    """The account of a translated checkpoint."""
    return ConversionReport(
        source=checkpoint.source,
        format=format,
        digest=checkpoint.digest,
        renamed=translation.renamed,
        reshaped=translation.reshaped,
        dropped=translation.dropped,
        new=translation.new,
        files=checkpoint.files,
        notes=[*checkpoint.notes, *([TRUSTED] if checkpoint.trusted else []), *translation.notes],
    )
