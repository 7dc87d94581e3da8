"""The backbone: a timm VisionTransformer built from a BackboneSpec."""

from functools import partial
from typing import Any

import torch
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_bench.models.pos_embed import sincos_2d
from mae_bench.spec import BackboneSpec


def build_vit(
    spec: BackboneSpec,
    *,
    num_classes: int = 0,
    global_pool: str = "token",
    drop_path_rate: float = 0.0,
    dynamic_img_size: bool = False,
) -> VisionTransformer:
    """A timm VisionTransformer of the spec's shape, freshly initialised as MAE does (xavier uniform, paper A.1).

    `forward_features(imgs)` (N, C, H, W) -> (N, prefix + L, D), after the final norm. With `global_pool` "avg" timm moves the
    norm behind the pooling as `fc_norm`, the layout of MAE's fine-tuned files. `dynamic_img_size` accepts any image size that
    the patch divides.
    """
    args: dict[str, Any] = {
        "img_size": spec.img_size,
        "num_classes": num_classes,
        "global_pool": global_pool,
        "drop_path_rate": drop_path_rate,
        "dynamic_img_size": dynamic_img_size,
    }
    if spec.arch != "vit":
        named: Any = create_model(spec.arch, pretrained=False, in_chans=spec.in_chans, **args)
        return named
    model = VisionTransformer(
        **args,
        patch_size=spec.patch_size,
        in_chans=spec.in_chans,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_ratio,
        class_token=spec.num_prefix_tokens > 0,
        reg_tokens=max(0, spec.num_prefix_tokens - 1),
        norm_layer=partial(nn.LayerNorm, eps=spec.norm_eps),
        weight_init="skip",
    )
    init_weights(model, spec)
    return model


@torch.no_grad()
def init_weights(model: VisionTransformer, spec: BackboneSpec) -> None:
    """MAE's initialisation: xavier uniform for every Linear (the patch embedding as one), zero biases, normal(0.02) for the
    class token. The patch embedding's bias stays as torch draws it, as in the reference (models_mae.py).

    A sin-cos table stays a Parameter, frozen or not by whoever trains (MAE freezes it in pretraining and trains it in
    fine-tuning).
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
