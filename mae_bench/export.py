"""Write the exported checkpoint: safetensors weights, BackboneSpec and provenance in one folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mae_bench.files import file_digest, write_atomic, write_json
from mae_bench.job import EXPORT as EXPORT
from mae_bench.job import SPEC_FILE as SPEC_FILE
from mae_bench.seal import seal_json
from mae_bench.spec import BackboneSpec

WEIGHTS_FILE = "backbone.safetensors"


def write_export(
    folder: str | Path, weights: dict[str, torch.Tensor], spec: BackboneSpec, provenance: dict[str, Any]
) -> str:
    """Write the weights, then `backbone.json` (spec, provenance, digest); return the digest of the weights.

    The JSON is sealed and written last: an export that has it is complete.
    """
    folder = Path(folder)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomic(folder / WEIGHTS_FILE, lambda file: file.write(save(contiguous, metadata={"format": "pt"})))
    digest = file_digest(folder / WEIGHTS_FILE)
    described = {"spec": spec.to_dict(), "digest": digest, "provenance": provenance}
    write_json(folder / SPEC_FILE, seal_json(described))
    return digest
