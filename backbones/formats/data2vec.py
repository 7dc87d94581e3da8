"""data2vec: facebookresearch/data2vec_vision in BEiT's layout, with one bias table shared by all blocks."""

from backbones.formats.beit import possible_families, read_as
from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has BEiT's layout, with data2vec's marks or without any."""
    return "data2vec" in possible_families(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a data2vec model, keeping its bias table shared.

    `model` is the student, `model_ema` the teacher; the authors fine-tune the student.
    """
    return read_as("data2vec", checkpoint)
