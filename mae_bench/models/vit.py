"""The backbone: a timm ViT of one of four classes, built from a BackboneSpec.

Legend: N batch, L patches, D width, C channels, H W image.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.activations import QuickGELU
from timm.layers.mlp import SwiGLUPacked
from timm.models import create_model
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_bench.errors import UserError
from mae_bench.models.any_size import AnySizeBeit, AnySizeEva, AnySizeVisionTransformer
from mae_bench.models.pos_embed import sincos_2d
from mae_bench.models.windowed_vit import WindowedViT
from mae_bench.spec import BackboneSpec

ViT = VisionTransformer | Beit | Eva | WindowedViT
ARCHS: dict[str, Callable[..., ViT]] = {
    "vit": AnySizeVisionTransformer,
    "beit": AnySizeBeit,
    "eva": AnySizeEva,
    "sam": WindowedViT,
}
# Names of layers that a spec's options may use
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "quick_gelu": QuickGELU,
    "swiglu_packed": SwiGLUPacked,
}
# Keywords of each class that a spec's options may set; a checkpoint's description can set no other
OPTIONS: dict[str, tuple[str, ...]] = {
    "vit": (
        *("qkv_bias", "qk_norm", "proj_bias", "init_values", "class_token", "no_embed_class"),
        *("pre_norm", "final_norm", "act_layer", "mlp_layer"),
    ),
    "beit": (
        *("qkv_bias", "swiglu_mlp", "scale_mlp", "init_values", "use_abs_pos_emb", "use_rel_pos_bias"),
        *("use_shared_rel_pos_bias", "final_norm"),
    ),
    "eva": (
        *("qkv_bias", "qkv_fused", "swiglu_mlp", "swiglu_align_to", "scale_mlp", "scale_attn_inner"),
        *("attn_type", "init_values", "class_token", "no_embed_class", "use_abs_pos_emb", "use_rot_pos_emb"),
        *("rope_type", "rope_grid_offset", "rope_grid_indexing", "rope_temperature", "rope_rotate_half"),
        *("ref_feat_shape", "use_post_norm", "use_pre_transformer_norm"),
    ),
    "sam": (
        *("qkv_bias", "use_abs_pos", "use_rel_pos", "window_size", "global_attn_indexes"),
        *("neck_chans", "act_layer"),
    ),
}


def build_vit(
    spec: BackboneSpec,
    *,
    num_classes: int = 0,
    global_pool: str = "token",
    drop_path_rate: float = 0.0,
    dynamic_img_size: bool = False,
) -> Any:
    """Build a timm ViT (one of `ViT`, or the timm model that `spec.arch` names) with fresh weights.

    Its `forward_features(imgs)` maps (N, C, H, W) to (N, prefix + L, D), after the final norm.

    global_pool: with "avg" timm applies the norm after pooling, as `fc_norm`, like MAE's fine-tuned
        checkpoints.
    dynamic_img_size: accept any image size that the patch divides.

    A plain "vit" is initialised as in MAE (xavier uniform, paper A.1), the other classes as in timm.
    Raise UserError for an unknown architecture or option.
    """
    if global_pool == "token" and not has_class_token(spec):
        global_pool = ""  # timm: no pooling, and the norm stays before the head
    args: dict[str, Any] = {
        "img_size": spec.img_size,
        "in_chans": spec.in_chans,
        "num_classes": num_classes,
        "global_pool": global_pool,
        "drop_path_rate": drop_path_rate,
    }
    options = _parse_options(spec)
    if spec.arch not in ARCHS:
        return create_model(spec.arch, pretrained=False, dynamic_img_size=dynamic_img_size, **args, **options)
    args |= {
        "patch_size": spec.patch_size,
        "embed_dim": spec.embed_dim,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        "mlp_ratio": spec.mlp_ratio,
        "norm_layer": partial(nn.LayerNorm, eps=spec.norm_eps),
    }
    if spec.arch != "sam":
        args["dynamic_img_size"] = dynamic_img_size
    if spec.arch in ("vit", "eva"):
        args |= _prefix_tokens(spec)
    if spec.arch == "vit":
        args["weight_init"] = "skip"
    model: Any = ARCHS[spec.arch](**args | options)
    model.pos_resample = spec.pos_resample
    if spec.arch == "vit":
        init_weights(model, spec)
    return model


def quarter_indices(depth: int) -> list[int]:
    """Return the last block of each quarter (from 0): [2, 5, 8, 11] for depth 12 (arXiv 2111.11429)."""
    if depth < 4:
        return [depth - 1] * 4
    return [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]


def has_class_token(spec: BackboneSpec) -> bool:
    """Return whether the prefix tokens start with a class token (for a timm model name: by its pooling)."""
    if spec.arch not in ARCHS:
        return spec.global_pool == "token"
    return spec.num_prefix_tokens > 0 and bool(spec.options.get("class_token", True))


def _prefix_tokens(spec: BackboneSpec) -> dict[str, Any]:
    """Return timm's keywords for the prefix tokens: a class token unless disabled, then registers."""
    class_token = has_class_token(spec)
    registers = spec.num_prefix_tokens - int(class_token)
    return {"class_token": class_token, ("reg_tokens" if spec.arch == "vit" else "num_reg_tokens"): registers}


def _parse_options(spec: BackboneSpec) -> dict[str, Any]:
    """Return the spec's options as keywords, with names of layers replaced by the layers."""
    known = OPTIONS.get(spec.arch, ())
    if unknown := sorted(set(spec.options) - set(known)):
        raise UserError(
            f"the architecture {spec.arch} has no option {' and no option '.join(unknown)}",
            expected=f"only {', '.join(known) or 'none'}",
        )
    return {
        key: _find_layer(key, value) if key.endswith("_layer") else value
        for key, value in spec.options.items()
    }


def _find_layer(key: str, name: Any) -> Callable[..., nn.Module]:
    if name not in LAYERS:
        raise UserError(f"{key} {name!r}", expected=f"one of {', '.join(LAYERS)}")
    return LAYERS[name]


@torch.no_grad()
def init_weights(model: VisionTransformer, spec: BackboneSpec) -> None:
    """Initialise as in MAE (models_mae.py).

    Xavier uniform for every Linear and for the patch embedding as a matrix, zero biases, normal(0.02) for
    the class token. The bias of the patch embedding keeps torch's default, as in the reference.

    A sine-cosine table stays a Parameter; whoever trains the model decides whether to freeze it (MAE
    freezes it in pretraining and trains it in fine-tuning).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = model.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    table = model.pos_embed
    if spec.pos_embed == "sincos" and table is not None:
        table.copy_(sincos_2d(spec.embed_dim, spec.grid_size, spec.num_prefix_tokens))
    elif table is not None:
        nn.init.trunc_normal_(table, std=0.02)
