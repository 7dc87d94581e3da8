"""sam: the image encoder of Segment Anything (facebookresearch/segment-anything), with windows and relative positions."""

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.naming import Naming
from backbones.translating.structure import has_timm_description
from backbones.translating.translation import Translation
from backbones.translating.windows import infer_window_facts
from mae_bench.export import SPEC_FILE

NAMES = Naming(
    top={},  # timm's, the neck included
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
    "prompt_encoder.": "prompt encoder: no part of the image backbone",
    "mask_decoder.": "mask decoder: no part of the image backbone",
    "pixel_": "pixel mean and std: of ImageNet, as its code says",
}


def fits(checkpoint: Checkpoint) -> bool:
    """Relative positions in the blocks and a convolutional neck behind them, with the names of SAM's repository or of timm."""
    return (
        set(checkpoint.tensors) >= MARKS
        and SPEC_FILE not in checkpoint.beside
        and not has_timm_description(checkpoint)
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Two layers of the MLP are renamed; windows, heads and neck are told by shapes. Tokens are those behind the neck."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    for name in checkpoint.outside:
        if reason := next((reason for start, reason in OUTSIDE.items() if start in name), None):
            result.outside[name] = reason
    result.assumed = {"norm_eps": 1e-6} | family("sam")
    result.facts = infer_window_facts(result, checkpoint.source)
    return result
