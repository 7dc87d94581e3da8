"""beitv2: microsoft/unilm's BEiT v2 (vector-quantised tokens; pretrained, fine-tuned), in BEiT's layout."""

from backbones.formats.beit import possible_families, read_as
from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has BEiT's layout, with BEiT v2's marks or without any."""
    return "beitv2" in possible_families(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a BEiT v2 without its pretraining layers; all its scripts use ImageNet's mean and std."""
    return read_as("beitv2", checkpoint)
