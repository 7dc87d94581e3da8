"""Exports of every kind of ViT at toy size for the adapters, and the expected lr scale per parameter name."""

from importlib import import_module
from pathlib import Path

import pytest

from backbones.load import load_backbone
from mae_bench.export import write_export
from mae_bench.spec import BackboneSpec

KINDS = {  # format -> toy: bias tables, rotations, windows, registers, a first norm, no class token
    "beit": "pretrained",
    "eva02": "fine",
    "sam": "sam.pth",
    "detectron2": "windows",
    "dinov3": "own",
    "dinov2": "registers",
    "clip": "openai",
    "ijepa": "target",
}
DECAY = 0.5
UNUSED = ("norm.", "fc_norm.", "neck.")  # behind the last block: maps are taken before


@pytest.fixture(scope="module", params=KINDS)
def exported(request, toy_heads, tmp_path_factory) -> tuple[Path, BackboneSpec]:
    """A toy's export and its spec."""
    toys = import_module(f"tests.backbones.formats.toys_{request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    path, options = toys.write(folder)[KINDS[request.param]]
    model, spec, _ = load_backbone(path, **options)
    write_export(folder / "export", model.state_dict(), spec, {})
    return folder / "export", spec


def rate(name: str, depth: int) -> float:
    """Of a parameter inside a ViT over the base rate: less by DECAY with each layer from the top."""
    if name.startswith("blocks."):
        return DECAY ** (depth - int(name.split(".")[1]))
    at_the_top = (*UNUSED, "rel_pos_bias.")  # BEiT's shared table too (microsoft/unilm beit/optim_factory.py)
    return 1.0 if name.startswith(at_the_top) else DECAY ** (depth + 1)
