"""hf_ijepa: transformers' I-JEPA, a ViT without a class token, as its save_pretrained writes it."""

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.hugging_face import VIT, facts_of, is_plain, model_type, silence
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
        is_plain(checkpoint)
        and "embeddings.cls_token" not in checkpoint.tensors
        and model_type(checkpoint) in (None, "ijepa")
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Query, key and value are stacked to qkv; a classifier is dropped; its authors average the patch tokens."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = {name: HEAD for name in checkpoint.outside if name.startswith("classifier.")}
    result.assumed = {"norm_eps": DEFAULT_EPS} | family("ijepa")
    result.facts = facts_of(checkpoint, DEFAULT_EPS)
    result.notes = silence(checkpoint, "I-JEPA", DEFAULT_EPS)
    return result
