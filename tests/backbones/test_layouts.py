"""The published files of ViT-B/16, L/16 and H/14: every key and shape is known, without their gigabytes.

Counts of tensors and parameters: facebookresearch/mae models_mae.py and models_vit.py, by arithmetic.
"""

import pytest
import torch

from backbones.load import check_fit, translate
from backbones.reading.source import Checkpoint
from backbones.translating.structure import infer_global_pool
from mae_bench.models.vit import build_vit

# width, depth, heads, patch, tensors (encoder, with decoder), parameters (encoder, decoder)
SIZES = {
    "B": (768, 12, 12, 16, 150, 254, 85_798_656, 26_109_184),
    "L": (1024, 24, 16, 16, 294, 398, 303_301_632, 26_240_256),
    "H": (1280, 32, 16, 14, 390, 494, 630_764_800, 26_309_708),
}


def hollow(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of those shapes over one stored zero each."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_every_key_of_the_published_sizes_finds_its_place(layouts, size):
    width, depth, heads, patch, num_encoder, num_full, params, decoder_params = SIZES[size]
    encoder = layouts[0](width, depth, 224, patch)
    decoder = layouts[1](width, 512, 8, 224, patch)
    assert (len(encoder), len(encoder) + len(decoder)) == (num_encoder, num_full)
    checkpoint = Checkpoint("released.pth", "0" * 64, hollow({**encoder, **decoder}), wrapper="model")
    name, translation, spec = translate(checkpoint)
    assert name == "official_mae"
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.img_size, spec.mlp_ratio) == (
        width,
        depth,
        heads,
        (224, 224),
        4.0,
    )
    assert set(translation.dropped) == set(decoder)
    with torch.device("meta"):
        check_fit(
            build_vit(spec, global_pool=infer_global_pool(translation.weights)),
            translation.weights,
            "released.pth",
            name,
        )
    assert sum(tensor.numel() for tensor in translation.weights.values()) == params
    assert sum(tensor.numel() for tensor in checkpoint.tensors.values()) == params + decoder_params
