"""mae_bench: the export folder that every job writes and reads (safetensors and backbone.json)."""

from pathlib import Path
from typing import Any

import torch

from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation, keep_names
from mae_bench.errors import UserError
from mae_bench.export import SPEC_FILE, write_export
from mae_bench.spec import BackboneSpec


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is a backbone.json."""
    return SPEC_FILE in checkpoint.beside


def read(checkpoint: Checkpoint) -> Translation:
    """Read an export, which has timm's names.

    Raise UserError unless the weights are the ones that backbone.json describes.
    """
    description = checkpoint.beside.get(SPEC_FILE, {})
    if not isinstance(description.get("spec"), dict):
        raise UserError(
            f"{checkpoint.source} has no {SPEC_FILE} with a spec next to it",
            expected="a folder that mae-bench wrote",
        )
    if description.get("digest") != checkpoint.digest:
        raise UserError(
            f"{checkpoint.source} has SHA-256 {checkpoint.digest}",
            expected=f"{description.get('digest')}, as in {SPEC_FILE}",
            fix="export the backbone again; these weights are not the ones described",
        )
    result = keep_names(checkpoint.tensors, drop={})
    result.facts = vars(BackboneSpec.from_dict(description["spec"])).copy()
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write a folder with weights, spec, provenance and digest."""
    write_export(out, weights, spec, provenance)
