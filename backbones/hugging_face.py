"""What transformers' ViTs share: tensor names (as its files and, from version 5, its models have them), config and processor."""

from collections.abc import Mapping
from typing import Any

from backbones.naming import Naming
from backbones.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translation import numbers
from mae_bench.errors import UserError
from mae_bench.spec import BackboneSpec

BLOCKS = ("encoder.layer.{}.", "layers.{}.")  # in files; in the models of transformers 5
QKV = (
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
}
VIT = Naming(TOP, BLOCK, BLOCKS, QKV)  # ViT, ViTMAE, DeiT and I-JEPA
ANCHOR = "embeddings.patch_embeddings.projection.weight"
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def model_type(checkpoint: Checkpoint) -> str | None:
    """What config.json calls the model; None without a config."""
    config = checkpoint.beside.get(CONFIG_FILE)
    return None if config is None else str(config.get("model_type"))


def facts_of(checkpoint: Checkpoint, default_eps: float) -> dict[str, Any]:
    """Fields of the BackboneSpec that config.json and preprocessor_config.json state; UserError for an activation not GELU."""
    facts: dict[str, Any] = {}
    config, processor = checkpoint.beside.get(CONFIG_FILE), checkpoint.beside.get(PREPROCESSOR_FILE, {})
    if config:
        if (activation := config.get("hidden_act", "gelu")) != "gelu":
            raise UserError(f"{checkpoint.source}: hidden_act {activation!r}", expected="'gelu', as in timm's ViT")
        facts["norm_eps"] = config.get("layer_norm_eps", default_eps)
        size = config.get("image_size", 224)
        facts["img_size"] = numbers(size if isinstance(size, list) else [size, size], "image_size", checkpoint.source)
        if "num_attention_heads" in config:
            facts["num_heads"] = config["num_attention_heads"]
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in processor:
            facts[ours] = numbers(processor[theirs], theirs, checkpoint.source)
    if processor.get("resample") in RESAMPLE:
        facts["interpolation"] = RESAMPLE[processor["resample"]]
    return facts


def config_of(spec: BackboneSpec, architecture: str, model_type: str) -> dict[str, Any]:
    """config.json of a plain ViT; UserError for what is not square."""
    if len(set(spec.img_size)) > 1 or len(set(spec.patch_size)) > 1:
        raise UserError(
            f"images {spec.img_size}, patches {spec.patch_size}", expected=f"squares for transformers' {architecture}"
        )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": round(spec.embed_dim * spec.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": spec.norm_eps,
        "image_size": spec.img_size[0],
        "patch_size": spec.patch_size[0],
        "num_channels": spec.in_chans,
        "qkv_bias": True,
    }


def processor_of(spec: BackboneSpec) -> Mapping[str, Any]:
    """preprocessor_config.json: how images are fed."""
    resample = {name: number for number, name in RESAMPLE.items()}.get(spec.interpolation)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": spec.img_size[0], "width": spec.img_size[1]},
        **({} if resample is None else {"resample": resample}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
