"""data2vec: files of facebookresearch/data2vec_vision (pretrained, fine-tuned), in BEiT's layout with one shared bias table."""

from backbones.formats.beit import possible_families, read_as
from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation


def fits(checkpoint: Checkpoint) -> bool:
    """BEiT's layout with data2vec's marks, or with none."""
    return "data2vec" in possible_families(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """The shared bias table stays one. `model` is the student, `model_ema` the teacher; the authors fine-tune the student."""
    return read_as("data2vec", checkpoint)
