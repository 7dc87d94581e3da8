"""sam: the image encoder of facebookresearch/segment-anything, with windows and relative positions."""

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.structure import has_timm_description
from backbones.translating.translation import Translation, explain
from backbones.translating.windows import infer_window_facts
from mae_bench.export import SPEC_FILE

NAMES = Naming(
    top={},  # timm's, including the neck
    block={"mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"},
    blocks=("blocks.{}.",),
)
MARKS = {
    "patch_embed.proj.weight",
    "neck.0.weight",
    "blocks.0.attn.rel_pos_h",
    "blocks.0.attn.rel_pos_w",
    "pos_embed",
}
OUTSIDE = {
    r".*prompt_encoder\.": "prompt encoder: not part of the image backbone",
    r".*mask_decoder\.": "mask decoder: not part of the image backbone",
    r".*pixel_": "pixel mean and std: ImageNet's, as in its code",
}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there are relative positions and a convolutional neck, in SAM's or timm's names."""
    described = SPEC_FILE in checkpoint.beside or has_timm_description(checkpoint)
    return set(checkpoint.tensors) >= MARKS and not described


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder; its tokens are those after the neck. Shapes show windows, heads and neck."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = explain(checkpoint.outside, OUTSIDE)
    result.assumed = {"norm_eps": 1e-6} | family("sam")
    result.facts = infer_window_facts(result, checkpoint.source)
    return result
