"""hf_sam: the image encoder of transformers' SAM (SamVisionModel, or inside SamModel)."""

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.hugging_face import (
    get_model_type,
    get_vision_config,
    note_missing_files,
    read_facts,
)
from backbones.translating.naming import Naming
from backbones.translating.translation import Translation
from backbones.translating.windows import infer_window_facts

DEFAULT_EPS = 1e-6  # of SamVisionConfig
NAMES = Naming(
    top={
        "patch_embed.projection": "patch_embed.proj",
        "neck.conv1": "neck.0",
        "neck.layer_norm1": "neck.1",
        "neck.conv2": "neck.2",
        "neck.layer_norm2": "neck.3",
    },
    block={"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"},
    blocks=("layers.{}.",),
)
OUTSIDE = "prompt encoder and mask decoder: not part of the image backbone"
MARKS = {"patch_embed.projection.weight", "pos_embed", "neck.conv1.weight", "layers.0.attn.rel_pos_h"}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has the names of transformers' SAM encoder."""
    return set(checkpoint.tensors) >= MARKS and get_model_type(checkpoint) in (
        None,
        "sam",
        "sam_vision_model",
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder. Shapes show windows, heads and neck; config.json must agree."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = dict.fromkeys(checkpoint.outside, OUTSIDE)
    result.assumed = {"norm_eps": DEFAULT_EPS} | family("sam")
    shapes = infer_window_facts(result, checkpoint.source, get_vision_config(checkpoint))
    stated = read_facts(checkpoint, DEFAULT_EPS)
    result.facts = shapes | stated | {"options": shapes["options"] | stated.get("options", {})}
    result.notes = note_missing_files(checkpoint, "SAM", DEFAULT_EPS)
    return result
