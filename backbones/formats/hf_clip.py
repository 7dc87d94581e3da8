"""hf_clip: image tower of transformers' CLIP (CLIPVisionModel, with a projection, or inside CLIPModel)."""

from backbones.families import family
from backbones.formats.clip import add_axes
from backbones.reading.source import CONFIG_FILE, Checkpoint
from backbones.translating.hugging_face import get_model_type, note_missing_files, read_facts
from backbones.translating.naming import Naming
from backbones.translating.translation import Translation

# Of CLIPVisionConfig, which writes only what differs when nested in another config.
DEFAULT_EPS, DEFAULT_HEADS = 1e-5, 12
NAMES = Naming(
    top={
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "pre_layrnorm": "norm_pre",  # spelt like this in its files
        "post_layernorm": "norm",
    },
    block={
        "layer_norm1": "norm1",
        "self_attn.out_proj": "attn.proj",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    blocks=("encoder.layers.{}.",),
    qkv=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
    drop={r"embeddings\.position_ids$": "the numbers 0 to L: not weights"},
)


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has the names of CLIP's image tower (SigLIP has no class embedding)."""
    if not {"embeddings.class_embedding", "pre_layrnorm.weight"} <= set(checkpoint.tensors):
        return False
    return get_model_type(checkpoint) in (None, "clip", "clip_vision_model")


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the image tower.

    The final norm applies to all tokens, as in timm; in transformers only to the class token.

    Without config.json the user must state whether the activation is gelu or quick_gelu.
    """
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    add_axes(result)
    result.outside = dict.fromkeys(checkpoint.outside, "text tower, projections and logits' scale")
    result.assumed, result.needed = family("clip"), ("act_layer",)
    result.facts = read_facts(checkpoint, DEFAULT_EPS, hidden_act="quick_gelu")
    options = {"pre_norm": True} | result.facts.get("options", {})
    if CONFIG_FILE in checkpoint.beside:
        result.facts = {"num_heads": DEFAULT_HEADS} | result.facts
        options = {"act_layer": "gelu"} | options
    result.facts["options"] = options
    result.notes = note_missing_files(checkpoint, "CLIP", DEFAULT_EPS)
    return result
