"""Read weights that are split over several files, as listed by an index in the same folder."""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from backbones.reading.description import read_json
from backbones.reading.safe import WeightFile, read_file
from mae_bench.errors import UserError

INDEX_SUFFIX = ".index.json"  # model.safetensors.index.json, pytorch_model.bin.index.json
MAX_INDEX = 16 << 20  # bytes; an index has one line per tensor


def read_shards(index: Path, sha256: str | None = None) -> tuple[WeightFile, dict[str, str]]:
    """Return every tensor of the shards that an index lists, and the SHA-256 of each shard by name.

    The digest of the whole is the SHA-256 of what `sha256sum` prints for the shards in name order; `sha256`
    pins it. Raises UserError for a shard that is missing, outside the folder, or holds other tensors than the
    index lists.
    """
    shard_of = _read_index(index)
    shards = {name: read_file(index.parent / name) for name in sorted(set(shard_of.values()))}
    digests = {name: shard.digest for name, shard in shards.items()}
    printed = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    digest = hashlib.sha256(printed.encode()).hexdigest()
    if sha256 and sha256.lower() != digest:
        raise UserError(
            f"the shards of {index} have together SHA-256 {digest}",
            expected=sha256,
            fix="pin the digest above if these are the right files: sha256sum SHARDS | sha256sum",
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, shard in shards.items():
        listed = {tensor for tensor, place in shard_of.items() if place == name}
        _check_shard(index, name, shard.content, listed)
        tensors |= shard.content
    states = {path: state for shard in shards.values() for path, state in shard.states.items()}
    size = sum(shard.size for shard in shards.values())
    return WeightFile(tensors, {}, digest, size, states), digests


def _read_index(index: Path) -> dict[str, str]:
    """Return the name of the shard of each tensor."""
    shard_of = read_json(index, MAX_INDEX).get("weight_map")
    is_map = isinstance(shard_of, dict) and all(isinstance(name, str) for name in shard_of.values())
    if not shard_of or not is_map:
        raise UserError(f"{index} has no weight_map", expected="an index that names a shard for each tensor")
    for name in shard_of.values():
        if name in ("", "..") or PurePosixPath(name).name != name or "\\" in name or "\0" in name:
            raise UserError(f"{index} names the shard {name!r}", expected="files in the folder of the index")
        if not (index.parent / name).is_file():
            raise UserError(
                f"{index} names the shard {name}, which is missing",
                expected=f"all {len(set(shard_of.values()))} shards in the same folder",
                fix="download the missing shard into that folder",
            )
    return dict(shard_of)


def _check_shard(index: Path, name: str, content: Any, listed: set[str]) -> None:
    held = {str(key) for key in content} if isinstance(content, dict) else set()
    differ = sorted(held ^ listed)
    if differ:
        raise UserError(
            f"{index.parent / name} and {index.name} differ in {len(differ)} tensors: "
            f"{', '.join(differ[:5])}",
            expected="exactly the tensors that the index lists for the shard",
            fix="download the index and the shards from one revision",
        )
