"""beitv2: files of microsoft/unilm's BEiT v2 (pretrained with vector-quantised tokens, fine-tuned), in BEiT's layout."""

from backbones.formats.beit import possible_families, read_as
from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation


def fits(checkpoint: Checkpoint) -> bool:
    """BEiT's layout with beitv2's marks, or with none."""
    return "beitv2" in possible_families(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """BEiT v2: what pretrains its class token is dropped; its scripts all take ImageNet's mean and std."""
    return read_as("beitv2", checkpoint)
