"""Safetensors bytes that carry a BackboneSpec and where it came from; the same content is the same bytes."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

from backbones.source import SPEC_KEY
from mae_bench.spec import BackboneSpec

ALIGNMENT = 8  # of the header's length, so that tensors lie where a mapped file can be read in place


def to_safetensors(weights: Mapping[str, torch.Tensor], spec: BackboneSpec, provenance: Mapping[str, Any]) -> bytes:
    """The file's bytes. The library writes metadata in an order of its own at every call; here the header is sorted."""
    metadata = {"format": "pt", SPEC_KEY: json.dumps(spec.to_dict()), "provenance": json.dumps(provenance)}
    data = save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata=metadata)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
