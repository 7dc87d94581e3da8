"""hf_ijepa: transformers' I-JEPA, a ViT without a class token, from save_pretrained."""

from dataclasses import replace

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.hugging_face import VIT, get_model_type, is_hf_vit, note_missing_files, read_facts
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, explain

DEFAULT_EPS = 1e-12  # of IJepaConfig; the authors train with 1e-6
NAMES = replace(
    VIT,
    drop={
        r"pooler\.": "pooler: a layer before a classifier",
        r"embeddings\.mask_token$": MASK_TOKEN,
    },
)


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has the names of transformers' ViT without a class token."""
    return (
        is_hf_vit(checkpoint)
        and "embeddings.cls_token" not in checkpoint.tensors
        and get_model_type(checkpoint) in (None, "ijepa")
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Translate an I-JEPA: query, key and value are stacked. Its authors average the patch tokens."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = explain(checkpoint.outside, {r"classifier\.": HEAD})
    result.assumed = {"norm_eps": DEFAULT_EPS} | family("ijepa")
    result.facts = read_facts(checkpoint, DEFAULT_EPS)
    result.notes = note_missing_files(checkpoint, "I-JEPA", DEFAULT_EPS)
    return result
