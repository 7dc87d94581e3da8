"""Write safetensors files that carry a BackboneSpec and their provenance; equal content gives equal bytes."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from backbones.reading.source import PROVENANCE_KEY, SPEC_KEY
from mae_bench.export import seal_metadata
from mae_bench.files import write_atomic
from mae_bench.spec import BackboneSpec

ALIGNMENT = 8  # bytes; the header is padded to it, so that the tensors of a mapped file can be read in place


def write_safetensors(
    out: Path, weights: Mapping[str, torch.Tensor], spec: BackboneSpec, provenance: Mapping[str, Any]
) -> None:
    """Write the file atomically with a sorted header: the library's order of metadata varies."""
    metadata = {"format": "pt", SPEC_KEY: json.dumps(spec.to_dict()), PROVENANCE_KEY: json.dumps(provenance)}
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    data = memoryview(save(contiguous, metadata=seal_metadata(metadata, contiguous)))
    (length,) = struct.unpack("<Q", data[:8])
    described = json.loads(bytes(data[8 : 8 + length]))
    header = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    parts = (struct.pack("<Q", len(header)), header, data[8 + length :])
    write_atomic(out, lambda file: file.writelines(parts))
