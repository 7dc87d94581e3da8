"""Costs against sums computed by hand."""

from mae_bench.models.cost import backbone_gmacs, training_flops
from mae_bench.models.create import create_mae


def block_macs(tokens: int, queries: int, width: int) -> int:
    """Multiply-adds of a block with `queries` of its tokens as queries and all as keys and values."""
    return (
        2 * tokens * width**2 + 2 * queries * width**2 + 2 * queries * tokens * width + 8 * queries * width**2
    )


def test_training_counts_three_forward_passes_of_what_is_computed() -> None:
    model = create_mae("mae_vit_tiny_patch16", decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4)
    kept, removed, width, decoder, values = 49, 147, 192, 64, 768
    forward = (
        kept * values * width
        + 12 * block_macs(1 + kept, 1 + kept, width)
        + (1 + kept) * width * decoder
        + block_macs(197, 197, decoder)
        + block_macs(197, removed, decoder)
        + removed * decoder * values
    )
    assert training_flops(model, 0.75) == 3 * 2 * forward


def test_a_backbone_computes_all_patches() -> None:
    spec = create_mae("mae_vit_base_patch16").spec
    assert backbone_gmacs(spec) == (196 * 768 * 768 + 12 * block_macs(197, 197, 768)) / 1e9
