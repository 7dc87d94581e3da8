"""hf_ijepa: transformers' I-JEPA, a ViT without a class token, as its save_pretrained writes it."""

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.hugging_face import VIT, get_model_type, is_hf_vit, note_missing_files, read_facts
from backbones.translating.naming import Naming
from backbones.translating.translation import HEAD, Translation

DEFAULT_EPS = 1e-12  # of IJepaConfig; the authors train with 1e-6
NAMES = Naming(
    VIT.top, VIT.block, VIT.blocks, VIT.qkv,
    drop={
        r"pooler\.": "pooler: a layer in front of a classifier",
        r"embeddings\.mask_token$": "mask token: no part of the backbone",
    },
)  # fmt: skip


def fits(checkpoint: Checkpoint) -> bool:
    """The names of transformers' ViT without a class token."""
    return (
        is_hf_vit(checkpoint)
        and "embeddings.cls_token" not in checkpoint.tensors
        and get_model_type(checkpoint) in (None, "ijepa")
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Query, key and value are stacked to qkv; a classifier is dropped; its authors average the patch tokens."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = {name: HEAD for name in checkpoint.outside if name.startswith("classifier.")}
    result.assumed = {"norm_eps": DEFAULT_EPS} | family("ijepa")
    result.facts = read_facts(checkpoint, DEFAULT_EPS)
    result.notes = note_missing_files(checkpoint, "I-JEPA", DEFAULT_EPS)
    return result
