"""Weights that are split over several files, as an index lists them: all are read, and none from another folder."""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from backbones.reading.description import read_json
from backbones.reading.safe import WeightFile, read_file
from mae_bench.errors import UserError

INDEX_SUFFIX = ".index.json"  # model.safetensors.index.json, pytorch_model.bin.index.json
MAX_INDEX = 16 << 20  # bytes; an index has a line a tensor


def read_shards(
    index: Path, sha256: str | None = None, trust: bool = False
) -> tuple[WeightFile, dict[str, str]]:
    """Every tensor of the shards that an index lists, and each shard's SHA-256 by name.

    The digest of the whole is the SHA-256 of what `sha256sum` prints for the shards in the order of their names; `sha256` pins
    it. UserError for a shard that is missing, in another folder, or holds other tensors than the index says.
    """
    placed = _placed(index)
    shards = {name: read_file(index.parent / name, None, trust) for name in sorted(set(placed.values()))}
    digests = {name: shard.digest for name, shard in shards.items()}
    digest = hashlib.sha256(
        "".join(f"{each}  {name}\n" for name, each in digests.items()).encode()
    ).hexdigest()
    if sha256 and sha256.lower() != digest:
        raise UserError(
            f"the shards of {index} have together SHA-256 {digest}", expected=sha256,
            fix="pin the digest above if these are the files that you mean: sha256sum SHARDS | sha256sum",
        )  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for name, shard in shards.items():
        _check(index, name, shard.content, {tensor for tensor, place in placed.items() if place == name})
        tensors |= shard.content
    states = {path: state for shard in shards.values() for path, state in shard.states.items()}
    size, trusted = (
        sum(shard.size for shard in shards.values()),
        any(shard.trusted for shard in shards.values()),
    )
    return WeightFile(tensors, {}, digest, size, trusted, states), digests


def _placed(index: Path) -> dict[str, str]:
    """Tensor -> name of its shard."""
    placed = read_json(index, MAX_INDEX).get("weight_map")
    if (
        not isinstance(placed, dict)
        or not placed
        or not all(isinstance(name, str) for name in placed.values())
    ):
        raise UserError(f"{index} has no weight_map", expected="an index that names a shard for each tensor")
    for name in placed.values():
        if name in ("", "..") or PurePosixPath(name).name != name or "\\" in name or "\0" in name:
            raise UserError(f"{index} names the shard {name!r}", expected="files beside the index")
        if not (index.parent / name).is_file():
            raise UserError(
                f"{index} names the shard {name}, which is missing", expected=f"all {len(set(placed.values()))} shards beside it",
                fix="fetch the missing shard into the same folder",
            )  # fmt: skip
    return placed


def _check(index: Path, name: str, content: Any, listed: set[str]) -> None:
    held = {str(key) for key in content} if isinstance(content, dict) else set()
    if odd := sorted(held ^ listed):
        raise UserError(
            f"{index.parent / name} and {index.name} differ in {len(odd)} tensors: {', '.join(odd[:5])}",
            expected="exactly the tensors that the index lists for a shard", fix="fetch index and shards from one revision",
        )  # fmt: skip
