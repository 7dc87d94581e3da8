"""Write the exported checkpoint: safetensors weights, BackboneSpec and provenance in one folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mae_bench.files import file_digest, json_digest, write_atomic, write_json
from mae_bench.job import EXPORT as EXPORT
from mae_bench.job import SPEC_FILE as SPEC_FILE
from mae_bench.seal import SEAL, BrokenSeal, seal_json
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


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over the names, shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal_metadata(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the metadata of a safetensors file with the digest of both under the key `seal`."""
    return {**metadata, SEAL: json_digest([dict(metadata), digest_tensors(tensors)])}


def check_metadata_seal(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise BrokenSeal if a file has a seal that is not of its content; files of others have none."""
    content = {key: value for key, value in metadata.items() if key != SEAL}
    if SEAL in metadata and metadata != seal_metadata(content, tensors):
        raise BrokenSeal(
            f"{path} is not as it was written: its content does not have the digest in its metadata",
            expected="the file as mae-bench wrote it",
            fix=f"write it again; if you changed it on purpose, remove {SEAL!r} from its metadata",
        )
