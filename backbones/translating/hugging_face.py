"""What transformers' ViTs share: tensor names (as its files and, from version 5, its models have them), config and processor."""

from collections.abc import Mapping
from typing import Any

from backbones.reading.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.translation import is_sincos, parse_numbers
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
NORMS = ("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight")
ACTIVATIONS = {  # hidden_act -> option of our spec; the plain GELU needs none
    "gelu": None, "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu",
}  # fmt: skip
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def is_hf_vit(checkpoint: Checkpoint) -> bool:
    """Whether the names are those that transformers' ViT, ViTMAE, DeiT and I-JEPA share (BEiT has more, DINOv2 others)."""
    keys = checkpoint.tensors
    more = any("lambda_" in name or "relative_position" in name for name in keys)
    return (
        ANCHOR in keys
        and any(name in keys for name in NORMS)
        and "embeddings.position_embeddings" in keys
        and not more
    )


def infer_model_type(checkpoint: Checkpoint) -> str | None:
    """What tells ViT's and ViTMAE's files apart without a config: "vit", "vit_mae" or None."""
    keys, outside = checkpoint.tensors, checkpoint.outside
    if any(
        name.startswith(("pooler.", "embeddings.mask_token", "embeddings.distillation_token"))
        for name in keys
    ):
        return "vit"
    if any("classifier." in name for name in outside):
        return "vit"
    table = keys.get("embeddings.position_embeddings")
    if any(name.endswith("decoder.mask_token") for name in outside) or (
        table is not None and table.ndim == 3 and is_sincos(table)
    ):
        return "vit_mae"
    return None


def get_model_type(checkpoint: Checkpoint) -> str | None:
    """What config.json calls the model; None without a config."""
    config = checkpoint.beside.get(CONFIG_FILE)
    return None if config is None else str(config.get("model_type"))


def get_vision_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """config.json, or its part for the image tower; None without a config."""
    config = checkpoint.beside.get(CONFIG_FILE)
    part = config.get("vision_config", config) if config else config
    if part is not None and not isinstance(part, dict):
        raise UserError(f"{checkpoint.source}: vision_config is {part!r}", expected="an object")
    return part


def read_facts(checkpoint: Checkpoint, default_eps: float, hidden_act: str = "gelu") -> dict[str, Any]:
    """Fields of the BackboneSpec that config.json and preprocessor_config.json state.

    default_eps, hidden_act: of the model's config class. UserError for an activation that we do not have."""
    source, facts = checkpoint.source, _read_preprocessing(checkpoint)
    config = get_vision_config(checkpoint)
    if config is None:
        return facts
    activation = config.get("hidden_act", hidden_act)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{source}: hidden_act {activation!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
    options: dict[str, Any] = {"act_layer": layer} if (layer := ACTIVATIONS[activation]) else {}
    if config.get("qkv_bias", True) is False:
        options["qkv_bias"] = False
    size = config.get("image_size", 224)
    facts["norm_eps"] = config.get("layer_norm_eps", default_eps)
    facts["img_size"] = parse_numbers(size if isinstance(size, list) else [size, size], "image_size", source)
    if "num_attention_heads" in config:
        facts["num_heads"] = config["num_attention_heads"]
    if not isinstance(facts["norm_eps"], int | float) or not isinstance(facts.get("num_heads", 1), int):
        raise UserError(
            f"{source}: layer_norm_eps and num_attention_heads in {CONFIG_FILE}", expected="numbers"
        )
    return facts | ({"options": options} if options else {})


def note_missing_files(checkpoint: Checkpoint, model: str, eps: float) -> list[str]:
    """Notes on what is assumed where the JSON files are not beside the weights."""
    notes = {
        CONFIG_FILE: f"eps {eps} is the default of transformers' {model}",
        PREPROCESSOR_FILE: "mean, std and interpolation are its family's",
    }
    return [
        f"no {name} beside the file: {what}" for name, what in notes.items() if name not in checkpoint.beside
    ]


def _read_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """How images are fed, by preprocessor_config.json."""
    processor = checkpoint.beside.get(PREPROCESSOR_FILE, {})
    facts: dict[str, Any] = {
        ours: parse_numbers(processor[theirs], theirs, checkpoint.source)
        for theirs, ours in (("image_mean", "mean"), ("image_std", "std"))
        if theirs in processor
    }
    if isinstance(number := processor.get("resample"), int) and number in RESAMPLE:
        facts["interpolation"] = RESAMPLE[number]
    return facts


def build_config(spec: BackboneSpec, architecture: str, get_model_type: str) -> dict[str, Any]:
    """config.json of a plain ViT; UserError for what is not square."""
    if len(set(spec.img_size)) > 1 or len(set(spec.patch_size)) > 1:
        raise UserError(
            f"images {spec.img_size}, patches {spec.patch_size}",
            expected=f"squares for transformers' {architecture}",
        )
    return {
        "architectures": [architecture],
        "model_type": get_model_type,
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


def build_processor_config(spec: BackboneSpec) -> Mapping[str, Any]:
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
