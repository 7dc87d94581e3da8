"""Reads weight files as data only: nothing in a file is ever run, and a file that is not what it says is refused."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mae_bench.digest import file_digest
from mae_bench.errors import UserError

# What files need beyond tensors, containers, numbers and strings, which torch allows by itself; each with its reason.
ALLOWED: dict[Any, str] = {
    argparse.Namespace: "facebookresearch/mae saves its command line as `args` (util/misc.py); it only holds values",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_INFLATION = 4  # bytes of tensors over bytes of the file; honest files have 1
_NAMED_GLOBAL = re.compile(r"GLOBAL ([\w.]+) (?:was|whose)")  # in torch's message
_LOOKS = {b"version https://git-lfs": "a Git LFS pointer, not the file", b"<!DOCTYPE": "a web page", b"<html": "a web page"}


def read_file(path: Path, sha256: str | None = None) -> tuple[Any, dict[str, str], str]:
    """Content (for safetensors: a dict of tensors), safetensors metadata and SHA-256 of a weight file.

    UserError for a file that is missing, truncated, no checkpoint, pickled code, or not the one that `sha256` pins.
    """
    if not path.is_file():
        raise UserError(f"no weight file {path}", expected="a .safetensors, .pth, .pt or .bin file")
    digest = file_digest(path)
    if sha256 and sha256.lower() != digest:
        raise UserError(
            f"{path} has SHA-256 {digest}",
            expected=sha256,
            fix="fetch the file again, or pin the digest above if this is the file that you mean",
        )
    with path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":
        return *_read_safetensors(path), digest
    return _read_pickle(path, start), {}, digest


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _broken(path, f"a damaged safetensors file: {error}") from error


def _read_pickle(path: Path, start: bytes) -> Any:
    if looks := next((what for magic, what in _LOOKS.items() if start.startswith(magic)), None):
        raise _broken(path, looks)
    is_zip = start.startswith(b"PK\x03\x04")
    if not is_zip and not start.startswith(b"\x80"):
        raise _broken(path, "neither safetensors nor a file of torch.save" if start else "empty")
    if is_zip:
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a hostile or damaged pickle ends in any error type; all mean that this file holds no weights
        raise _broken(path, f"a damaged checkpoint: {type(error).__name__}: {_first_line(str(error))}") from error


def _check_zip(path: Path) -> None:
    """torch stores uncompressed entries; a compressed one could unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise _broken(path, f"a truncated or damaged checkpoint: {error}") from error
    if packed or claimed > path.stat().st_size:
        raise _broken(path, f"a zip archive that torch.save did not write (compressed or overlapping entries: {packed[:3]})")


def _refusal(path: Path, message: str) -> UserError:
    if not (named := _NAMED_GLOBAL.search(message)):
        reason = message.rpartition("WeightsUnpickler error:")[2]  # what stands before it advises to switch the safety off
        return _broken(path, f"a pickle that cannot be read as data: {_first_line(reason)}")
    return UserError(
        f"{path} wants to build {named[1]!r} while it is read; nothing of it was run",
        expected=f"tensors, containers, numbers and strings{''.join(f', {a.__module__}.{a.__qualname__}' for a in ALLOWED)}",
        fix="ask its author for safetensors, or save only the state_dict in the environment that the file comes from",
    )


def _broken(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is {what}", expected="a whole safetensors or torch.save file", fix="fetch the file again and compare its SHA-256"
    )


def _first_line(message: str) -> str:
    return message.strip().split("\n")[0][:200]


def check_tensors(tensors: dict[str, torch.Tensor], path: Path | str, file_size: int) -> None:
    """Refuses tensors that claim more memory than the file has bytes for (shapes are made up in a line of pickle)."""
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{path}: {name} is {tensor.layout} on {tensor.device}", expected="dense tensors, not quantised")
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > tensor.untyped_storage().nbytes() or total > MAX_INFLATION * file_size:
            raise UserError(
                f"{path}: {name} claims the shape {tuple(tensor.shape)}, more than the file's {file_size} bytes hold",
                expected="tensors whose values stand in the file",
            )


def check_values(tensors: dict[str, torch.Tensor], source: str) -> None:
    """Weights must be finite floating-point numbers of 16, 32 or 64 bits."""
    if other := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]:
        raise UserError(
            f"{source}: weights of unusual types: {', '.join(other[:5])}", expected="float32, float16, bfloat16 or float64",
            fix="export the weights unquantised",
        )  # fmt: skip
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{source}: {len(bad)} weights hold NaN or infinity: {', '.join(bad[:5])}", expected="finite weights",
            fix="take an earlier checkpoint of that training",
        )  # fmt: skip
