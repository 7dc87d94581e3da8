"""mae_bench: the export folder that every job writes and reads (safetensors beside backbone.json)."""

from pathlib import Path
from typing import Any

import torch

from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation, keep_names
from mae_bench.errors import UserError
from mae_bench.export import SPEC_FILE, write_export
from mae_bench.spec import BackboneSpec


def fits(checkpoint: Checkpoint) -> bool:
    """backbone.json decides."""
    return SPEC_FILE in checkpoint.beside


def read(checkpoint: Checkpoint) -> Translation:
    """The names are ours already; the weights must be the ones that backbone.json describes."""
    described = checkpoint.beside.get(SPEC_FILE, {})
    if not isinstance(described.get("spec"), dict):
        raise UserError(
            f"{checkpoint.source} has no {SPEC_FILE} with a spec beside it",
            expected="a folder that mae-bench wrote",
        )
    if described.get("digest") != checkpoint.digest:
        raise UserError(
            f"{checkpoint.source} has SHA-256 {checkpoint.digest}",
            expected=f"{described.get('digest')}, which {SPEC_FILE} names",
            fix="export the backbone again; these weights are not the ones described",
        )
    result = keep_names(checkpoint.tensors, drop={})
    result.facts = vars(BackboneSpec.from_dict(described["spec"])).copy()
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """A folder with weights, spec, provenance and digest."""
    write_export(out, weights, spec, provenance)
