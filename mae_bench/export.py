"""The exported checkpoint: safetensors weights, BackboneSpec and provenance in one folder, known by the weights' SHA-256."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from mae_bench.digest import file_digest
from mae_bench.errors import UserError
from mae_bench.files import write_atomic, write_json
from mae_bench.job import EXPORT as EXPORT
from mae_bench.spec import BackboneSpec

WEIGHTS_FILE = "backbone.safetensors"
SPEC_FILE = "backbone.json"


def write_export(folder: str | Path, weights: dict[str, torch.Tensor], spec: BackboneSpec, provenance: dict[str, Any]) -> str:
    """Writes the weights, then `backbone.json` (spec, provenance, digest); returns the digest. An export with a JSON is whole."""
    folder = Path(folder)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomic(folder / WEIGHTS_FILE, lambda file: file.write(save(contiguous, metadata={"format": "pt"})))
    digest = file_digest(folder / WEIGHTS_FILE)
    write_json(folder / SPEC_FILE, {"spec": spec.to_dict(), "digest": digest, "provenance": provenance})
    return digest


def read_export(folder: str | Path) -> tuple[dict[str, torch.Tensor], BackboneSpec, str, dict[str, Any]]:
    """Weights, spec, digest and provenance of an export; a weight file that is not the one described raises UserError."""
    folder = Path(folder)
    try:
        described = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
        spec, digest = BackboneSpec.from_dict(described["spec"]), described["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not an exported backbone: {error}", expected=f"{SPEC_FILE} and {WEIGHTS_FILE}") from error
    if (found := file_digest(folder / WEIGHTS_FILE)) != digest:
        raise UserError(
            f"{folder / WEIGHTS_FILE} has SHA-256 {found}",
            expected=f"{digest}, which {SPEC_FILE} names",
            fix="export the backbone again; these weights are not the ones described",
        )
    return load_file(folder / WEIGHTS_FILE), spec, digest, described.get("provenance", {})
