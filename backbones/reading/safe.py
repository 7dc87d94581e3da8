"""Reads weight files as data only: nothing in a file is ever run, and a file that is not what it says is refused."""

import io
import json
import mmap
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from backbones.reading import trust as trusting
from backbones.reading.no_weights import FETCH, FIRST, describe_archive, describe_content, is_text
from backbones.reading.pickled import Refused, build_value, scan_pickle
from backbones.reading.stand_ins import ALLOWED
from mae_bench.errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_INFLATION = 4  # bytes of tensors over bytes of the file; honest files have 1
MAX_ENTRIES = 20_000  # tensors and other members of a file
MAX_HEADER = 2 << 20  # bytes of a safetensors header; a ViT-H's has about 100 KiB
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's files from before its zip archives
LEGACY_PICKLES = 5  # magic, version, system, content, keys of the storages
_INTERNAL = re.compile(
    r"\[enforce fail at [^\]]*\][ .]*|\(Could this error message be improved.*"
)  # of torch's own messages


State = tuple[
    int, int, int
]  # of a file: its bytes, and in nanoseconds when it was written to and when anything of it changed


@dataclass(frozen=True)
class WeightFile:
    """What was read. content: for safetensors a dict of tensors. metadata: of safetensors. digest: SHA-256. size: bytes.

    states: of each file when its digest was taken. Tensors may be mapped: what is written into a file later shows in them.
    """

    content: Any
    metadata: dict[str, str]
    digest: str
    size: int
    trusted: bool = False  # its pickle was run, in a subprocess without network (`backbones.reading.trust`)
    states: Mapping[Path, State] = field(default_factory=dict)


def read_file(path: Path, sha256: str | None = None, trust: bool = False) -> WeightFile:
    """Reads a weight file as data; with `trust`, what cannot be read so is unpickled in a subprocess without network.

    The digest is taken first, of the very file that is then read: it is opened once, and must not change meanwhile.
    UserError for a file that is missing, truncated, no checkpoint, pickled code, or not the one that `sha256` pins.
    """
    if not path.is_file():
        raise UserError(f"no weight file {path}", expected="a .safetensors, .pth, .pt or .bin file")
    with path.open("rb") as file:
        state = _state(file.fileno())
        digest = file_digest(file, "sha256").hexdigest()
        if sha256 and sha256.lower() != digest:
            raise UserError(
                f"{path} has SHA-256 {digest}",
                expected=sha256,
                fix="fetch the file again, or pin the digest above if this is the file that you mean",
            )
        content, metadata, trusted = _read(file, path, trust)
        if _state(file.fileno()) != state:
            raise _changed(path)
        return WeightFile(content, metadata, digest, state[0], trusted, {path: state})


def _state(file: int | Path) -> State:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_unchanged(states: Mapping[Path, State]) -> None:
    """UserError if a file is not as it was when its digest was taken: that would not be the digest of its tensors.

    For whoever has copied them or written them elsewhere.
    """
    for path, before in states.items():
        if not path.exists() or _state(path) != before:
            raise _changed(path)


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} changed while it was read", expected="a file that is written wholly", fix="read it again"
    )


def _read(file: IO[bytes], path: Path, trust: bool) -> tuple[Any, dict[str, str], bool]:
    """Content, metadata and whether a pickle was run for them."""
    file.seek(0)
    start = file.read(FIRST)
    if start[8:9] == b"{" and not is_text(start[:8]):
        return *_read_safetensors(file, path), False
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise _broken(path, *describe_content(start))
    try:
        return _read_pickle(file, path, start.startswith(b"PK")), {}, False
    except NeedsTrust:
        if not trust:
            raise
    with trusting.unpickled(file, path) as made:
        tensors, told = _read_safetensors(made, f"what the pickle of {path} made")
        return trusting.rebuild(tensors, told.get(trusting.CONTENT), path), {}, True


class NeedsTrust(UserError):
    """The file is whole, but holds more than data."""


def _named(file: IO[bytes]) -> str:
    """A path to the open file itself, whatever its own path names by now."""
    return f"/dev/fd/{file.fileno()}" if os.path.exists("/dev/fd") else str(file.name)


def _read_safetensors(file: IO[bytes], path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        _check_header(file)
        with safe_open(_named(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise _broken(path, f"a damaged safetensors file: {_first_line(str(error))}") from error


def _check_header(file: IO[bytes]) -> None:
    """ValueError for a header that is long, no JSON (RecursionError for a deep one), or that names a tensor twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("its header has two entries of one name")
        return found

    file.seek(0)
    if (length := int.from_bytes(file.read(8), "little")) > MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes, more than {MAX_HEADER}")
    if len(json.loads(file.read(length), object_pairs_hook=unique)) > MAX_ENTRIES:
        raise ValueError(f"it has more than {MAX_ENTRIES} tensors")


def _read_pickle(file: IO[bytes], path: Path, is_zip: bool) -> Any:
    """A file of torch.save, or a bare pickle of numpy arrays (detectron2's .pkl): looked through first, then read."""
    try:
        if is_zip:
            _check_zip(file, path)
        elif (bare := _check_legacy(file)) is not None:
            return bare
        with (
            torch.serialization.safe_globals([(made, name) for name, (made, _) in ALLOWED.items()]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return torch.load(_named(file), map_location="cpu", weights_only=True, mmap=is_zip)
    except Refused as error:
        raise _refusal(path, error) from error
    except UserError:
        raise
    except (
        pickle.UnpicklingError
    ) as error:  # what torch says before its reason advises to switch the safety off
        reason = str(error).rpartition("WeightsUnpickler error:")[2]
        raise _broken(path, f"a pickle that cannot be read as data: {_first_line(reason)}") from error
    except Exception as error:  # a hostile or damaged pickle ends in any error type; all mean that this file holds no weights
        raise _broken(
            path, f"a damaged checkpoint: {type(error).__name__}: {_first_line(str(error))}"
        ) from error


def _check_zip(file: IO[bytes], path: Path) -> None:
    """torch stores uncompressed entries one after the other; others could unpack to any size."""
    size = os.fstat(file.fileno()).st_size
    if _count(file, b"PK\x01\x02") > MAX_ENTRIES:
        raise _broken(path, f"a zip archive of more than {MAX_ENTRIES} entries")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError, UnicodeError) as error:
        raise _broken(path, f"a truncated or damaged checkpoint: {error}") from error
    names = [entry.filename for entry in entries]
    inside = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    if "constants.pkl" in inside:
        raise _program(path)
    if "data.pkl" not in inside and len(set(names)) == len(names):
        raise _broken(path, *describe_archive(names))
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    at = sorted((entry.header_offset, entry.file_size) for entry in entries)
    ends = [offset + length for offset, length in at]
    if packed or any(
        end > start for end, start in zip(ends, [offset for offset, _ in at[1:]] + [size], strict=True)
    ):
        raise _broken(
            path,
            f"a zip archive that torch.save did not write (compressed or overlapping entries: {packed[:3]})",
        )
    if len(set(names)) < len(names):
        raise _broken(path, "a zip archive that torch.save did not write (two entries of one name)")
    records = {
        name.removeprefix("data/"): length for name, length in inside.items() if name.startswith("data/")
    }
    data = torch._C.PyTorchFileReader(_named(file)).get_record(
        "data.pkl"
    )  # by torch's own reader: what it will read
    scan_pickle(io.BytesIO(data), size, records)


def _count(file: IO[bytes], signature: bytes) -> int:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found, at = 0, data.find(signature)
        while at >= 0 and found <= MAX_ENTRIES:
            found, at = found + 1, data.find(signature, at + 4)
    return found


def _check_legacy(file: IO[bytes]) -> Any:
    """Looks through the pickles of torch's old format; of a bare pickle, gives the content."""
    size = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        value, _ = scan_pickle(data, size)  # type: ignore[arg-type]
        if value != LEGACY_MAGIC:
            return build_value(value)
        stored: dict[str, int] = {}
        for _ in range(LEGACY_PICKLES - 1):
            value, storages = scan_pickle(data, size)  # type: ignore[arg-type]
            stored |= storages
        if sorted(stored) != sorted(value.parts):
            raise Refused("a checkpoint that does not hold the numbers of all its tensors")
        if data.tell() + sum(8 + nbytes for nbytes in stored.values()) > size:
            raise Refused("truncated: it holds fewer numbers than its tensors have")
    return None


def _refusal(path: Path, error: Refused) -> UserError:
    if not error.names:
        return _broken(path, str(error))
    named = ", ".join(map(repr, error.names[:5])) + (
        f" and {len(error.names) - 5} more" if len(error.names) > 5 else ""
    )
    return NeedsTrust(
        f"{path} wants to build {named} while it is read; nothing of it was run",
        expected="tensors, containers, numbers, strings and the settings of known training scripts (backbones/reading/stand_ins.py)",
        fix="ask its author for safetensors, or save only its state_dict where it comes from; --trust runs its code, in a "
        "subprocess without network",
    )


def _program(path: Path) -> UserError:
    return NeedsTrust(
        f"{path} is a TorchScript archive: a program with its weights, as OpenAI's CLIP is published",
        expected="weights without a program",
        fix="save its state_dict (torch.jit.load in a place that you can lose); --trust does so in a subprocess without network",
    )


def _broken(path: Path | str, what: str, fix: str = FETCH) -> UserError:
    return UserError(f"{path} is {what}", expected="a whole safetensors or torch.save file", fix=fix)


def _first_line(message: str) -> str:
    return _INTERNAL.sub("", message.strip().split("\n")[0])[:200].strip()


def check_tensors(tensors: dict[str, torch.Tensor], path: Path | str, file_size: int) -> None:
    """Refuses tensors that claim more memory than the file has bytes for (shapes are made up in a line of pickle)."""
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(
                f"{path}: {name} is {tensor.layout} on {tensor.device}",
                expected="dense tensors, not quantised",
            )
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > tensor.untyped_storage().nbytes() or total > MAX_INFLATION * file_size:
            raise UserError(
                f"{path}: {name} claims the shape {tuple(tensor.shape)}, more than the file's {file_size} bytes hold",
                expected="tensors whose values stand in the file",
            )


def check_values(tensors: dict[str, torch.Tensor], source: str) -> None:
    """Weights must be finite floating-point numbers of 16, 32 or 64 bits."""
    if other := [
        f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in FLOATS
    ]:
        raise UserError(
            f"{source}: weights of unusual types: {', '.join(other[:5])}", expected="float32, float16, bfloat16 or float64",
            fix="export the weights unquantised",
        )  # fmt: skip
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{source}: {len(bad)} weights hold NaN or infinity: {', '.join(bad[:5])}", expected="finite weights",
            fix="take an earlier checkpoint of that training",
        )  # fmt: skip
