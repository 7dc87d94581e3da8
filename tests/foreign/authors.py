"""Toy models built by their authors' own code, which is imported from folders given on the command line.

Each function takes the folder of a checked-out repository and yields the toys of one family. None of that
code is part of this project; what is missing in today's libraries (`torch._six`, `np.float`) is replaced in
memory by `make_golden.py`.

Legend: N batch, L patches, D width, C channels, H W image, h w grid of patches, p patch side.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.foreign.drawing import INDEX

Size = tuple[int, int]
Forward = Callable[[Any, torch.Tensor], torch.Tensor]
NORM = partial(nn.LayerNorm, eps=1e-6)
NUM_CLASSES = 7
HEAD = {"hidden_dim": 16, "bottleneck_dim": 8}  # of DINO's projection head


@dataclass
class Toy:
    """One model of the authors and what its features are.

    module: what the training script saves, so its state dict has the names of the file.
    vit: the name before the ViT's parameters there.
    tokens: features of images in float64. output: "tokens" (N, prefix + L, D), "patches" without the prefix,
    "pooled" (N, D).
    size: of the images; img_size: what the table was made for, if another one.
    num_heads: of the encoder. tables: fixed tables, see `drawing.draw_state`. dtype: in which the file stores
    its numbers.
    decoder: predictions of a masked autoencoder for images and noise. note: what the toy shows.
    copies_table: its training takes the table from a pretrained file, not from its own constructor.
    prepare: changes a drawn state before it is loaded, as the authors' own scripts do for another image size.
    """

    name: str
    module: nn.Module
    tokens: Forward
    size: Size
    num_heads: int
    vit: str = ""
    output: str = "tokens"
    patch: int = 16
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtype: str = "float32"
    decoder: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    decoder_heads: int = 0
    img_size: Size | None = None
    prepare: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    shapes_from: nn.Module | None = None
    copies_table: bool = False
    note: str = ""


def sine(grid: Size, prefix: int = 1, kind: str = "mae") -> dict[str, Any]:
    return {"kind": kind, "grid": list(grid), "prefix": prefix}


def indices(module: nn.Module, grid: Size) -> dict[str, dict[str, Any]]:
    """Return BEiT's index buffers as tables."""
    return {
        name: {"kind": "index", "grid": list(grid)} for name in module.state_dict() if name.endswith(INDEX)
    }


def run_features(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """Features before the classifier, pooled or of the class token."""
    return model.forward_features(imgs)


# facebookresearch/mae, MAE-Lite and CrossMAE


def build_mae_encoder(
    size: Size = (64, 64), width: int = 48, heads: int = 4, depth: int = 2, **kwargs: Any
) -> dict[str, Any]:
    """Keywords of MaskedAutoencoderViT."""
    return {
        "img_size": size,
        "patch_size": 16,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "norm_layer": NORM,
        "decoder_embed_dim": 32,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        **kwargs,
    }


def encode_mae(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """Features of all patches: nothing is removed, and the noise keeps them in raster order."""
    with mock.patch("torch.rand", return_value=sort_nothing(model, imgs)):
        return model.forward_encoder(imgs, 0.0)[0]


def sort_nothing(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """Return noise (N, L) in the order of the patches."""
    return torch.arange(model.patch_embed.num_patches, dtype=torch.float64).expand(len(imgs), -1)


def reconstruct_mae(model: Any, imgs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Predictions (N, L, p p C) with three quarters of the patches removed, in the order of `noise`."""
    with mock.patch("torch.rand", return_value=noise):
        latent, _, ids_restore, *_ = model.forward_encoder(imgs, 0.75)
    return model.forward_decoder(latent, ids_restore)


def make_mae_toys(mae: Any, vit: Any, pos_embed: Any) -> Iterator[Toy]:
    """Toys of a MaskedAutoencoderViT `mae` and of the VisionTransformer `vit` that it is fine-tuned as."""

    def pretrained(
        name: str, grid: Size = (4, 4), learned: bool = False, dtype: str = "float32", **kwargs: Any
    ) -> Toy:
        patch = kwargs.get("patch_size", 16)
        size = (grid[0] * patch, grid[1] * patch)
        options = build_mae_encoder(size, **kwargs)
        tables = {} if learned else {"pos_embed": sine(grid), "decoder_pos_embed": sine(grid)}
        return Toy(
            name,
            mae(**options),
            encode_mae,
            size,
            options["num_heads"],
            patch=patch,
            tables=tables,
            dtype=dtype,
            decoder=reconstruct_mae,
            decoder_heads=options["decoder_num_heads"],
        )

    yield pretrained("base")
    for dtype in ("float16", "bfloat16"):
        yield pretrained(dtype, dtype=dtype)
    yield pretrained("heads-2", heads=2)
    yield pretrained("heads-12", heads=12)
    yield pretrained("decoder-8-heads", decoder_num_heads=8)
    yield pretrained("decoder-16-heads", decoder_num_heads=16)
    yield pretrained("depth-1", depth=1)
    yield pretrained("depth-3", depth=3)
    yield pretrained("decoder-deep", decoder_depth=2, decoder_embed_dim=48, decoder_num_heads=4)
    yield pretrained("patch-8", grid=(4, 4), patch_size=8)
    yield pretrained("patch-14", grid=(3, 3), patch_size=14)
    yield pretrained("width-192-3-heads", width=192, heads=3, depth=1)
    yield pretrained("width-192-12-heads", width=192, heads=12, depth=1)
    yield pretrained("width-384-12-heads", width=384, heads=12, depth=1)
    yield pretrained("mlp-2", mlp_ratio=2.0)
    yield pretrained("grid-4x9-sine", grid=(4, 9))
    yield pretrained("grid-9x4-sine", grid=(9, 4))
    yield pretrained("grid-2x8-learned", grid=(2, 8), learned=True)
    yield pretrained("grid-4x9-learned", grid=(4, 9), learned=True)
    yield from make_fine_tuned_toys(vit)
    if pos_embed is not None:
        yield from make_resized_toys(vit, pos_embed)


def make_fine_tuned_toys(vit: Any) -> Iterator[Toy]:
    """Fine-tuned with average pooling, with the class token, and as a linear probe."""
    options = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 48,
        "depth": 2,
        "qkv_bias": True,
        "norm_layer": NORM,
        "num_classes": NUM_CLASSES,
    }
    for heads in (4, 6):
        name = "fine" if heads == 4 else f"fine-{heads}-heads"
        yield Toy(
            name,
            vit(global_pool=True, num_heads=heads, **options),
            run_features,
            (64, 64),
            heads,
            output="pooled",
        )
    yield Toy(
        "fine-cls", vit(global_pool=False, num_heads=4, **options), run_features, (64, 64), 4, output="class"
    )
    probe = vit(global_pool=False, num_heads=4, **options)
    probe.head = nn.Sequential(nn.BatchNorm1d(48, affine=False, eps=1e-6), probe.head)  # main_linprobe.py
    yield Toy(
        "probe",
        probe,
        run_features,
        (64, 64),
        4,
        output="class",
        tables={"pos_embed": sine((4, 4))},
        copies_table=True,
    )


def make_resized_toys(vit: Any, pos_embed: Any) -> Iterator[Toy]:
    """The table of 64 pixels taken to other sizes by the authors' interpolate_pos_embed."""
    options = {
        "patch_size": 16,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 4,
        "qkv_bias": True,
        "norm_layer": NORM,
    }
    for side in (32, 96, 112):
        model = vit(global_pool=False, img_size=side, num_classes=NUM_CLASSES, **options)
        origin = vit(global_pool=False, img_size=64, num_classes=NUM_CLASSES, **options)

        def prepare(state: dict[str, torch.Tensor], model: Any = model) -> dict[str, torch.Tensor]:
            pos_embed.interpolate_pos_embed(model, state)
            return state

        yield Toy(
            f"resized-{side}",
            model,
            run_features,
            (side, side),
            4,
            output="class",
            img_size=(64, 64),
            prepare=prepare,
            shapes_from=origin,
        )


def mae() -> Iterator[Toy]:
    models, vits = import_module("models_mae"), import_module("models_vit")
    yield from make_mae_toys(
        models.MaskedAutoencoderViT, vits.VisionTransformer, import_module("util.pos_embed")
    )


def mae_lite() -> Iterator[Toy]:
    models, vits = import_module("models_mae"), import_module("mae_lite.models.models_vit")
    for toy in make_mae_toys(models.MaskedAutoencoderViT, vits.VisionTransformer, None):
        if toy.name != "probe":
            yield toy
    for name, width, decoder, heads in (("tiny", 192, 96, 3), ("small", 384, 192, 6)):
        model = getattr(models, f"mae_vit_{name}_patch16")(img_size=32)
        yield Toy(
            f"released-{name}",
            model,
            encode_mae,
            (32, 32),
            12,
            tables={"pos_embed": sine((2, 2)), "decoder_pos_embed": sine((2, 2))},
            decoder=reconstruct_mae,
            decoder_heads=heads,
            note=f"{width} channels in 12 heads, a decoder of {decoder} in {heads}",
        )


def crossmae() -> Iterator[Toy]:
    """CrossMAE with weighted feature maps: the encoder has no final norm."""
    models, vits = import_module("models_cross"), import_module("models_vit")

    def encode(model: Any, imgs: torch.Tensor) -> torch.Tensor:
        with mock.patch("torch.rand", return_value=sort_nothing(model, imgs)):
            return model.forward_encoder(imgs, 0.0, 0.0)[0][-1]

    def pretrained(
        name: str, grid: Size = (4, 4), learned: bool = False, dtype: str = "float32", **kwargs: Any
    ) -> Toy:
        patch = kwargs.get("patch_size", 16)
        size = (grid[0] * patch, grid[1] * patch)
        options = build_mae_encoder(size, weight_fm=True, **kwargs)
        tables = {} if learned else {"pos_embed": sine(grid), "decoder_pos_embed": sine(grid)}
        model = models.MaskedAutoencoderViT(**options)
        return Toy(name, model, encode, size, options["num_heads"], patch=patch, tables=tables, dtype=dtype)

    yield pretrained("base")
    for dtype in ("float16", "bfloat16"):
        yield pretrained(dtype, dtype=dtype)
    for heads in (2, 6, 12):
        yield pretrained(f"heads-{heads}", heads=heads)
    yield pretrained("depth-1", depth=1)
    yield pretrained("depth-3", depth=3)
    yield pretrained("use-input", use_input=True)
    yield pretrained("last-map", use_fm=[0, -1])
    yield pretrained("self-attention", self_attn=True)
    yield pretrained("decoder-deep", decoder_depth=2, decoder_embed_dim=48, decoder_num_heads=4)
    yield pretrained("patch-8", patch_size=8)
    yield pretrained("width-192-3-heads", width=192, heads=3, depth=1)
    yield pretrained("width-192-12-heads", width=192, heads=12, depth=1)
    yield pretrained("grid-4x9-sine", grid=(4, 9))
    for toy in make_fine_tuned_toys(vits.VisionTransformer):
        if toy.name != "probe":
            tail = "pooled" if toy.output == "pooled" else "class"
            toy.tokens = partial(pool_crossmae, output=tail)
            yield toy


def pool_crossmae(model: Any, imgs: torch.Tensor, output: str) -> torch.Tensor:
    """Features before the classifier of the fine-tuned model; its timm leaves the pooling to forward_head."""
    feats = model.forward_features(imgs)
    if feats.ndim == 2:
        return feats
    return model.forward_head(feats, pre_logits=True) if output == "pooled" else feats[:, 0]


# DINO, iBOT, DINOv2


def make_square_toy(
    name: str, module: nn.Module, forward: Forward, options: dict[str, Any], side: int, imgs: Size | None
) -> Toy:
    """Return a toy whose table is square, for images of `side` pixels or of another size `imgs`."""
    return Toy(
        name,
        module,
        forward,
        imgs or (side, side),
        options["num_heads"],
        vit="backbone.",
        patch=options["patch_size"],
        img_size=(side, side) if imgs else None,
    )


def dino() -> Iterator[Toy]:
    vits, utils = import_module("vision_transformer"), import_module("utils")

    def make(name: str, side: int = 64, imgs: Size | None = None, **kwargs: Any) -> Toy:
        options = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4, **kwargs}
        vit = vits.VisionTransformer(img_size=[side], qkv_bias=True, norm_layer=NORM, **options)
        head = vits.DINOHead(options["embed_dim"], 24, **HEAD)

        def forward(model: Any, imgs: torch.Tensor) -> torch.Tensor:
            return model.backbone.get_intermediate_layers(imgs, 1)[0]

        return make_square_toy(name, utils.MultiCropWrapper(vit, head), forward, options, side, imgs)

    yield from make_plain_toys(make)


def make_plain_toys(make: Callable[..., Toy]) -> Iterator[Toy]:
    """The toys of a family whose code takes square tables to other sizes by itself."""
    yield make("base")
    for heads in (1, 2, 3, 6, 8, 12):
        yield make(f"heads-{heads}", num_heads=heads)
    yield make("depth-1", depth=1)
    yield make("depth-3", depth=3)
    yield make("mlp-2", mlp_ratio=2.0)
    yield make("patch-8", side=32, patch_size=8)
    yield make("patch-14", side=42, patch_size=14)
    yield make("width-64", embed_dim=64)
    yield make("width-192-3-heads", embed_dim=192, num_heads=3, depth=1)
    yield make("width-192-12-heads", embed_dim=192, num_heads=12, depth=1)
    for side in (32, 96, 112):
        yield make(f"resized-{side}", imgs=(side, side))
    yield make("resized-32x96", imgs=(32, 96))
    yield make("resized-32x128", imgs=(32, 128))
    yield make("resized-96x48", imgs=(96, 48))


def ibot() -> Iterator[Toy]:
    vits, heads = import_module("models.vision_transformer"), import_module("models.head")
    utils = import_module("utils")

    def make(name: str, side: int = 64, imgs: Size | None = None, shared: bool = False, **kwargs: Any) -> Toy:
        options = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4, **kwargs}
        vit = vits.VisionTransformer(img_size=[side], qkv_bias=True, return_all_tokens=True, **options)
        head = heads.iBOTHead(options["embed_dim"], 24, patch_out_dim=24, shared_head=shared, **HEAD)

        def forward(model: Any, imgs: torch.Tensor) -> torch.Tensor:
            grid = (imgs.shape[2] // options["patch_size"], imgs.shape[3] // options["patch_size"])
            mask = torch.zeros((len(imgs), *grid), dtype=torch.bool)
            masks = {"mask": mask} if kwargs.get("masked_im_modeling") else {}
            return model.backbone(imgs, **masks)

        return make_square_toy(name, utils.MultiCropWrapper(vit, head), forward, options, side, imgs)

    yield from make_plain_toys(make)
    yield make("student", masked_im_modeling=True)
    yield make("shared-head", shared=True)
    yield make("layer-scale", init_values=0.1)
    yield make("layer-scale-student", init_values=0.1, masked_im_modeling=True)


def dinov2() -> Iterator[Toy]:
    vits, heads = import_module("dinov2.models.vision_transformer"), import_module("dinov2.layers.dino_head")

    def forward(model: Any, imgs: torch.Tensor) -> torch.Tensor:
        found = model["backbone"].forward_features(imgs)
        tokens = [found["x_norm_clstoken"][:, None], found["x_norm_regtokens"], found["x_norm_patchtokens"]]
        return torch.cat(tokens, dim=1)

    def make(name: str, side: int = 56, imgs: Size | None = None, ibot: bool = True, **kwargs: Any) -> Toy:
        options = {
            "patch_size": 14,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 4,
            "init_values": 1.0,
            "block_chunks": 0,
            **kwargs,
        }
        vit = vits.DinoVisionTransformer(img_size=side, **options)
        parts: dict[str, nn.Module] = {"backbone": vit}
        for head in ("dino_head", "ibot_head") if ibot else ("dino_head",):
            parts[head] = heads.DINOHead(options["embed_dim"], 24, **HEAD)
        return make_square_toy(name, nn.ModuleDict(parts), forward, options, side, imgs)

    registers: dict[str, Any] = {
        "num_register_tokens": 4,
        "interpolate_antialias": True,
        "interpolate_offset": 0.0,
    }
    yield make("base")
    for heads_ in (1, 2, 3, 6, 12):
        yield make(f"heads-{heads_}", num_heads=heads_)
    yield make("width-64", embed_dim=64, num_heads=1)
    yield make("width-128", embed_dim=128, num_heads=2)
    yield make("width-192-3-heads", embed_dim=192, num_heads=3, depth=1)
    yield make("width-192-12-heads", embed_dim=192, num_heads=12, depth=1)
    yield make("registers", **registers)
    yield make("registers-1", **{**registers, "num_register_tokens": 1})
    yield make("gated", ffn_layer="swiglufused")
    yield make("gated-registers", ffn_layer="swiglufused", **registers)
    yield make("chunks", depth=4, block_chunks=2)
    yield make("chunks-of-one", depth=2, block_chunks=2)
    yield make("depth-1", depth=1)
    yield make("patch-16", side=64, patch_size=16)
    yield make("no-scale", init_values=None)
    yield make("no-ibot-head", ibot=False)
    yield make("no-qkv-bias", qkv_bias=False)
    for side in (28, 84, 98):
        yield make(f"resized-{side}", imgs=(side, side))
        yield make(f"registers-resized-{side}", imgs=(side, side), **registers)
    yield make("resized-28x84", imgs=(28, 84))
    yield make("registers-resized-28x84", imgs=(28, 84), **registers)


# MoCo v3, DeiT, I-JEPA


def moco_v3() -> Iterator[Toy]:
    vits, builder = import_module("vits"), import_module("moco.builder")

    def forward(model: Any, imgs: torch.Tensor) -> torch.Tensor:
        return run_timm_blocks(model.base_encoder, imgs)

    def make(name: str, grid: Size = (4, 4), dtype: str = "float32", **kwargs: Any) -> Toy:
        options = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 12, **kwargs}
        size = (grid[0] * options["patch_size"], grid[1] * options["patch_size"])
        build = partial(vits.VisionTransformerMoCo, img_size=size, qkv_bias=True, norm_layer=NORM, **options)
        model = builder.MoCo_ViT(build, 8, 16)
        tables = {f"{part}_encoder.pos_embed": sine(grid, kind="moco") for part in ("base", "momentum")}
        return Toy(
            name,
            model,
            forward,
            size,
            options["num_heads"],
            vit="base_encoder.",
            patch=options["patch_size"],
            tables=tables,
            dtype=dtype,
        )

    yield make("base")
    for dtype in ("float16", "bfloat16"):
        yield make(dtype, dtype=dtype)
    for heads in (2, 3, 4, 6):
        yield make(f"heads-{heads}", num_heads=heads)
    yield make("depth-1", depth=1)
    yield make("depth-3", depth=3)
    yield make("mlp-2", mlp_ratio=2.0)
    yield make("patch-8", patch_size=8)
    yield make("patch-14", grid=(3, 3), patch_size=14)
    yield make("width-192-12-heads", embed_dim=192, num_heads=12, depth=1)
    yield make("width-192-3-heads", embed_dim=192, num_heads=3, depth=1)
    yield make("grid-4x9", grid=(4, 9))
    yield make("grid-9x4", grid=(9, 4))
    yield make("grid-2x3", grid=(2, 3))
    yield make("conv-stem", embed_layer=vits.ConvStem, depth=1)
    for heads in (12, 4):
        probe = vits.VisionTransformerMoCo(
            img_size=64,
            patch_size=16,
            embed_dim=48,
            depth=2,
            num_heads=heads,
            qkv_bias=True,
            norm_layer=NORM,
            num_classes=NUM_CLASSES,
        )
        yield Toy(
            f"probe-{heads}-heads",
            probe,
            run_timm_blocks,
            (64, 64),
            heads,
            tables={"pos_embed": sine((4, 4), kind="moco")},
        )


def run_timm_blocks(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """All tokens of a timm 0.4 ViT, whose forward_features keeps only the class token."""
    kept: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, args, output: kept.append(output))
    model.forward_features(imgs)
    hook.remove()
    return kept[0]


def deit() -> Iterator[Toy]:
    models, timm_vit = import_module("models"), import_module("timm.models.vision_transformer")

    def make(name: str, side: int = 64, distilled: bool = False, width_: int = 0, **kwargs: Any) -> Toy:
        options = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4, **kwargs}
        size = kwargs.pop("img_size", (side, side))
        options["img_size"] = size
        build = models.DistilledVisionTransformer if distilled else timm_vit.VisionTransformer
        model = build(qkv_bias=True, norm_layer=NORM, num_classes=NUM_CLASSES, **options)
        return Toy(name, model, run_timm_blocks, size, options["num_heads"], patch=options["patch_size"])

    for stem, distilled in (("base", False), ("distilled", True)):
        prefix = "" if stem == "base" else "distilled-"
        yield make(stem, distilled=distilled)
        for heads in (2, 3, 6, 12):
            yield make(f"{prefix}heads-{heads}", distilled=distilled, num_heads=heads)
        yield make(f"{prefix}depth-1", distilled=distilled, depth=1)
        yield make(f"{prefix}patch-8", side=32, distilled=distilled, patch_size=8)
        yield make(f"{prefix}width-192-12-heads", distilled=distilled, embed_dim=192, num_heads=12, depth=1)
        yield make(f"{prefix}grid-4x9", distilled=distilled, img_size=(64, 144))
        yield make(f"{prefix}grid-2x3", distilled=distilled, img_size=(32, 48))
    yield make("width-192-3-heads", embed_dim=192, num_heads=3, depth=1)
    yield make("mlp-2", mlp_ratio=2.0)


def deit3() -> Iterator[Toy]:
    models = import_module("models_v2")

    def make(name: str, size: Size = (64, 64), block: str = "Layer_scale_init_Block", **kwargs: Any) -> Toy:
        options = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4, **kwargs}
        model = models.vit_models(
            img_size=size,
            qkv_bias=True,
            norm_layer=NORM,
            num_classes=NUM_CLASSES,
            block_layers=getattr(models, block),
            **options,
        )
        return Toy(name, model, run_timm_blocks, size, options["num_heads"], patch=options["patch_size"])

    yield make("base")
    for heads in (1, 2, 3, 6, 8, 12):
        yield make(f"heads-{heads}", num_heads=heads)
    yield make("depth-1", depth=1)
    yield make("depth-3", depth=3)
    yield make("mlp-2", mlp_ratio=2.0)
    yield make("patch-8", size=(32, 32), patch_size=8)
    yield make("patch-14", size=(42, 42), patch_size=14)
    yield make("width-192-3-heads", embed_dim=192, num_heads=3, depth=1)
    yield make("width-192-12-heads", embed_dim=192, num_heads=12, depth=1)
    yield make("grid-4x9", size=(64, 144))
    yield make("grid-9x4", size=(144, 64))
    yield make("grid-2x3", size=(32, 48))
    yield make("unscaled", block="Block")
    yield make("parallel", block="Layer_scale_init_Block_paralx2")
    yield make("parallel-unscaled", block="Block_paralx2")


def ijepa() -> Iterator[Toy]:
    vits = import_module("src.models.vision_transformer")

    def make(name: str, side: int = 64, learned: bool = False, dtype: str = "float32", **kwargs: Any) -> Toy:
        options = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4, **kwargs}
        vit = vits.VisionTransformer(img_size=[side], norm_layer=NORM, **options)
        patch = options["patch_size"]
        predictor = vits.VisionTransformerPredictor(
            (side // patch) ** 2,
            options["embed_dim"],
            predictor_embed_dim=24,
            depth=1,
            num_heads=2,
            norm_layer=NORM,
        )
        grid = (side // patch, side // patch)
        tables = (
            {}
            if learned
            else {"target_encoder.pos_embed": sine(grid, 0), "predictor.predictor_pos_embed": sine(grid, 0)}
        )
        module = nn.ModuleDict({"target_encoder": vit, "predictor": predictor})
        return Toy(
            name,
            module,
            lambda model, imgs: model["target_encoder"](imgs),
            (side, side),
            options["num_heads"],
            vit="target_encoder.",
            patch=patch,
            tables=tables,
            dtype=dtype,
        )

    yield make("base")
    for dtype in ("float16", "bfloat16"):
        yield make(dtype, dtype=dtype)
    for heads in (1, 2, 3, 6, 8, 12):
        yield make(f"heads-{heads}", num_heads=heads)
    yield make("depth-1", depth=1)
    yield make("depth-3", depth=3)
    yield make("mlp-2", mlp_ratio=2.0)
    yield make("patch-8", side=32, patch_size=8)
    yield make("patch-14", side=42, patch_size=14)
    yield make("side-96", side=96)
    yield make("width-96", embed_dim=96)
    yield make("width-192-3-heads", embed_dim=192, num_heads=3, depth=1)
    yield make("width-192-12-heads", embed_dim=192, num_heads=12, depth=1)
    yield make("learned", learned=True)


# BEiT and SimMIM

BIASES = {
    "shared": {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "own": {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": False},
    "absolute": {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": False},
}

BEIT_SIZES = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4, "init_values": 0.1}


def make_beit_toys(make: Callable[..., Toy], fine: Callable[..., Toy]) -> Iterator[Toy]:
    """Pretrained and fine-tuned toys with bias tables per block, one shared table, or a position table."""
    yield make("base", "shared")
    for heads in (1, 2, 3, 6, 8, 12):
        yield make(f"heads-{heads}", "shared", num_heads=heads)
    yield make("own", "own")
    yield make("absolute", "absolute")
    yield make("absolute-heads-2", "absolute", num_heads=2)
    yield make("absolute-192-3-heads", "absolute", embed_dim=192, num_heads=3, depth=1)
    yield make("absolute-192-12-heads", "absolute", embed_dim=192, num_heads=12, depth=1)
    yield make("absolute-grid-4x9", "absolute", size=(64, 144))
    yield make("absolute-grid-2x3", "absolute", size=(32, 48))
    yield make("no-scale", "shared", init_values=None)
    yield make("depth-1", "shared", depth=1)
    yield make("depth-3", "shared", depth=3)
    yield make("patch-8", "shared", size=(32, 32), patch_size=8)
    yield make("grid-2x3", "shared", size=(32, 48))
    yield make("grid-5x14", "shared", size=(80, 224))
    for pooling in ("pooled", "class"):
        yield fine(f"fine-{pooling}", "own", pooling)
        yield fine(f"fine-{pooling}-shared", "shared", pooling)
    yield fine("fine-pooled-2-heads", "own", "pooled", num_heads=2)
    yield fine("fine-pooled-absolute", "absolute", "pooled")
    yield fine("fine-grid-2x3", "own", "pooled", size=(32, 48))


def beit() -> Iterator[Toy]:
    pretrain, finetune = import_module("modeling_pretrain"), import_module("modeling_finetune")

    def make(name: str, bias: str, size: Size = (64, 64), **kwargs: Any) -> Toy:
        options = {**BEIT_SIZES, **kwargs}
        model = pretrain.VisionTransformerForMaskedImageModeling(
            img_size=size, qkv_bias=True, norm_layer=NORM, vocab_size=40, **BIASES[bias], **options
        )
        grid = (size[0] // options["patch_size"], size[1] // options["patch_size"])

        def forward(model: Any, imgs: torch.Tensor) -> torch.Tensor:
            return model.forward_features(imgs, torch.zeros((len(imgs), grid[0] * grid[1]), dtype=torch.bool))

        return Toy(
            name,
            model,
            forward,
            size,
            options["num_heads"],
            patch=options["patch_size"],
            tables=indices(model, grid),
        )

    yield from make_beit_toys(make, partial(make_fine_tuned_beit, finetune.VisionTransformer))


def make_fine_tuned_beit(
    build: Any, name: str, bias: str, output: str, size: Size = (64, 64), **kwargs: Any
) -> Toy:
    options = {**BEIT_SIZES, **kwargs}
    model = build(
        img_size=size,
        qkv_bias=True,
        norm_layer=NORM,
        num_classes=NUM_CLASSES,
        use_mean_pooling=output == "pooled",
        **BIASES[bias],
        **options,
    )
    grid = (size[0] // options["patch_size"], size[1] // options["patch_size"])
    return Toy(
        name,
        model,
        run_features,
        size,
        options["num_heads"],
        output=output,
        patch=options["patch_size"],
        tables=indices(model, grid),
    )


def simmim() -> Iterator[Toy]:
    models, vits = import_module("models.simmim"), import_module("models.vision_transformer")

    def make(name: str, bias: str, size: Size = (64, 64), **kwargs: Any) -> Toy:
        options = {**BEIT_SIZES, **kwargs}
        encoder = models.VisionTransformerForSimMIM(
            img_size=size,
            in_chans=3,
            num_classes=0,
            qkv_bias=True,
            norm_layer=NORM,
            use_mean_pooling=False,
            **BIASES[bias],
            **options,
        )
        grid = (size[0] // options["patch_size"], size[1] // options["patch_size"])
        model = models.SimMIM(encoder, encoder_stride=options["patch_size"])

        def forward(model: Any, imgs: torch.Tensor) -> torch.Tensor:
            kept: list[torch.Tensor] = []
            hook = model.encoder.norm.register_forward_hook(lambda module, args, output: kept.append(output))
            with suppress(RuntimeError):  # behind the norm it arranges the patches in a square
                model.encoder(imgs, torch.zeros((len(imgs), *grid)))
            hook.remove()
            return kept[0]

        return Toy(
            name,
            model,
            forward,
            size,
            options["num_heads"],
            vit="encoder.",
            patch=options["patch_size"],
            tables=indices(model, grid),
        )

    yield from make_beit_toys(make, partial(make_fine_tuned_beit, vits.VisionTransformer))


# timm 0.3.2, whose vit_small is 768 channels in 8 heads


def timm_032() -> Iterator[Toy]:
    vits = import_module("timm.models.vision_transformer")

    def make(name: str, **kwargs: Any) -> Toy:
        options = {"patch_size": 16, "embed_dim": 768, "depth": 1, "num_heads": 8, "mlp_ratio": 3.0, **kwargs}
        model = vits.VisionTransformer(img_size=32, num_classes=NUM_CLASSES, **options)
        return Toy(name, model, run_timm_blocks, (32, 32), options["num_heads"])

    yield make("vit-small", norm_layer=nn.LayerNorm, qkv_bias=False)
    yield make(
        "width-384-12-heads", norm_layer=NORM, qkv_bias=True, num_heads=12, mlp_ratio=4.0, embed_dim=384
    )


FAMILIES: dict[str, Callable[[], Iterator[Toy]]] = {
    "mae": mae,
    "mae_lite": mae_lite,
    "crossmae": crossmae,
    "dino": dino,
    "ibot": ibot,
    "dinov2": dinov2,
    "moco_v3": moco_v3,
    "deit": deit,
    "deit3": deit3,
    "ijepa": ijepa,
    "beit": beit,
    "simmim": simmim,
    "timm_032": timm_032,
}
