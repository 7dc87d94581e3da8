"""Read weight files as data only: no code in a file is run, and inconsistent content is refused."""

import io
import json
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from backbones.reading.no_weights import FETCH, FIRST, describe_archive, describe_content, is_text
from backbones.reading.pickled import Refused, build_value, scan_pickle
from backbones.reading.stand_ins import ALLOWED
from mae_bench.errors import UserError
from mae_bench.export import check_metadata_seal

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_INFLATION = 4  # bytes of tensors per byte of the file; 1 in files as libraries write them
MAX_ENTRIES = 20_000  # tensors and other members of a file
MAX_HEADER = 2 << 20  # bytes of a safetensors header; a ViT-H's has about 100 KiB
# What torch.save writes to its zip archive besides data/KEY, below one folder.
RECORDS = {
    "data.pkl",
    "version",
    "byteorder",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
}
PROGRAM_RECORDS = ("constants.pkl", "attributes.pkl", "model.json")  # of TorchScript archives
ENCRYPTED = 0x1 | 0x40 | 0x2000  # flag bits of a zip entry
END_OF_ZIP = 22  # bytes of the record that ends a zip archive without a comment
FOREIGN_ZIP = "a zip archive that torch.save did not write"
MAX_LISTED = 5  # names in an error message
MAX_CLASSES = 20  # classes and functions in an error message
# What to do with a file that holds more than data.
CONVERT = (
    "ask its author for safetensors, or convert it in a container without network: "
    "docs/checkpoints.md, section Safe reading"
)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in torch files from before the zip format
LEGACY_PICKLES = 5  # magic number, version, system, content, keys of the storages
# Parts of torch's own messages that do not help the user.
INTERNAL = re.compile(r"\[enforce fail at [^\]]*\][ .]*|\(Could this error message be improved.*")

State = tuple[int, int, int]  # a file's size in bytes, and its modification and change times in nanoseconds


@dataclass(frozen=True)
class WeightFile:
    """The content of a weight file.

    content: a dictionary of tensors for safetensors, any value for a pickle. metadata: of safetensors.
    digest: SHA-256. size: bytes.
    states: the state of each file when its digest was taken. Tensors may be memory-mapped: later writes show
    in them.
    """

    content: Any
    metadata: dict[str, str]
    digest: str
    size: int
    states: Mapping[Path, State] = field(default_factory=dict)


def read_file(path: Path, sha256: str | None = None) -> WeightFile:
    """Read a weight file as data.

    The file is opened once, its digest is taken first, and it must not change until it is read. Raises
    UserError if it is missing, truncated, not a checkpoint, pickled code, or does not have the digest
    `sha256`.
    """
    if not path.is_file():
        raise UserError(f"no weight file {path}", expected="a .safetensors, .pth, .pt or .bin file")
    with path.open("rb") as file:
        state = _get_state(file.fileno())
        digest = file_digest(file, "sha256").hexdigest()
        if sha256 and sha256.lower() != digest:
            raise UserError(
                f"{path} has SHA-256 {digest}",
                expected=sha256,
                fix="download the file again, or pin the digest above if this is the right file",
            )
        content, metadata = _read(file, path)
        if _get_state(file.fileno()) != state:
            raise _changed(path)
        return WeightFile(content, metadata, digest, state[0], {path: state})


def _get_state(file: int | Path) -> State:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_unchanged(states: Mapping[Path, State]) -> None:
    """Raise UserError if a file has changed since its digest was taken; call it after copying the tensors."""
    for path, before in states.items():
        if not path.exists() or _get_state(path) != before:
            raise _changed(path)


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} changed while it was read", expected="a file that is completely written", fix="read it again"
    )


def _read(file: IO[bytes], path: Path) -> tuple[Any, dict[str, str]]:
    """Return the content and the metadata of an open file."""
    file.seek(0)
    start = file.read(FIRST)
    if start[8:9] == b"{" and not is_text(start[:8]):
        return _read_safetensors(file, path)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise _broken(path, *describe_content(start))
    return _read_pickle(file, path, start.startswith(b"PK")), {}


def _get_path(file: IO[bytes]) -> str:
    """Return a path to the open file itself, even if another file has taken its name since."""
    return f"/dev/fd/{file.fileno()}" if os.path.exists("/dev/fd") else str(file.name)


def _read_safetensors(file: IO[bytes], path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        _check_header(file)
        with safe_open(_get_path(file), framework="pt") as opened:
            names = opened.keys()
            content = {name: opened.get_tensor(name) for name in names}
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise _broken(path, f"a damaged safetensors file: {_first_line(str(error))}") from error
    check_metadata_seal(metadata, content, path)
    return content, metadata


def _check_header(file: IO[bytes]) -> None:
    """Raise ValueError for a header that is too long, not JSON or names a tensor twice."""

    def check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header has two entries with the same name")
        return found

    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes, more than {MAX_HEADER}")
    if len(json.loads(file.read(length), object_pairs_hook=check_unique)) > MAX_ENTRIES:
        raise ValueError(f"it has more than {MAX_ENTRIES} tensors")


def _read_pickle(file: IO[bytes], path: Path, is_zip: bool) -> Any:
    """Scan, then read a torch.save file, or a bare pickle of numpy arrays (detectron2's .pkl)."""
    try:
        if is_zip:
            _check_zip(file, path)
        else:
            bare = _check_legacy(file)
            if bare is not None:
                return bare
        stand_ins: list[Any] = [(stand_in, name) for name, (stand_in, _) in ALLOWED.items()]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(_get_path(file), map_location="cpu", weights_only=True, mmap=is_zip)
    except Refused as error:
        raise _refusal(path, error) from error
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # torch's message starts with advice to switch the safety off
        reason = str(error).rpartition("WeightsUnpickler error:")[2]
        raise _broken(path, f"a pickle that cannot be read as data: {_first_line(reason)}") from error
    except Exception as error:  # a hostile or damaged pickle can raise any type
        reason = f"{type(error).__name__}: {_first_line(str(error))}"
        raise _broken(path, f"a damaged checkpoint: {reason}") from error


def _check_zip(file: IO[bytes], path: Path) -> None:
    """Refuse an archive that torch.save did not write: it stores entries uncompressed, without overlap."""
    # 1. List the entries.
    size = os.fstat(file.fileno()).st_size
    if _count(file, b"PK\x01\x02") > MAX_ENTRIES:
        raise _broken(path, f"a zip archive of more than {MAX_ENTRIES} entries")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError, UnicodeError) as error:
        raise _broken(path, f"a truncated or damaged checkpoint: {error}") from error
    names = [entry.filename for entry in entries]
    lengths = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    if any(name in lengths for name in PROGRAM_RECORDS):
        raise _program(path)
    if "data.pkl" not in lengths and len(set(names)) == len(names):
        raise _broken(path, *describe_archive(names))

    # 2. Refuse entries that could unpack to any size, or that share bytes.
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    spans = sorted((entry.header_offset, entry.header_offset + entry.file_size) for entry in entries)
    starts = [start for start, _ in spans[1:]] + [size]
    overlap = any(end > start for (_, end), start in zip(spans, starts, strict=True))
    if packed or overlap:
        raise _broken(path, f"{FOREIGN_ZIP} (compressed or overlapping entries: {packed[:3]})")
    if len(set(names)) < len(names):
        raise _broken(path, f"{FOREIGN_ZIP} (two entries with the same name)")
    _check_entries(file, path, entries)

    # 3. Scan the pickle, as torch's own reader finds it.
    prefix = "data/"
    records = {name[len(prefix) :]: length for name, length in lengths.items() if name.startswith(prefix)}
    data = torch._C.PyTorchFileReader(_get_path(file)).get_record("data.pkl")
    stream = io.BytesIO(data)
    _, storages = scan_pickle(stream, size, records)
    _check_end(stream.tell(), len(data), "pickle")
    unused = sorted(set(records) - set(storages))
    if unused:
        raise _broken(path, f"{FOREIGN_ZIP} (no tensor uses its entry data/{unused[0][:50]})")


def _check_entries(file: IO[bytes], path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Refuse entries of other names, headers that contradict the directory, and bytes around the archive.

    Scanners were evaded by each of these: readers disagree about what such an archive holds.
    """
    folders = {entry.filename.partition("/")[0] for entry in entries}
    for entry in entries:
        name = entry.filename.partition("/")[2]
        if len(folders) > 1 or not (name in RECORDS or re.fullmatch(r"data/[^/]+", name)):
            raise _broken(path, f"{FOREIGN_ZIP} (it holds {entry.filename[:50]!r})")
        file.seek(entry.header_offset)
        header = file.read(30)
        if not header.startswith(b"PK\x03\x04") or len(header) < 30:
            raise _broken(path, f"{FOREIGN_ZIP} (no entry at byte {entry.header_offset})")
        flags, method = struct.unpack_from("<HH", header, 6)
        (length,) = struct.unpack_from("<H", header, 26)
        is_same = file.read(length) == entry.orig_filename.encode() and method == entry.compress_type
        if not is_same or (flags | entry.flag_bits) & ENCRYPTED:
            raise _broken(
                path,
                f"{FOREIGN_ZIP} (two descriptions of its entry {entry.filename[:50]!r}, or an encrypted one)",
            )
    file.seek(-END_OF_ZIP, os.SEEK_END)
    end = file.read()
    if not end.startswith(b"PK\x05\x06") or not end.endswith(b"\0\0"):
        raise _broken(path, f"{FOREIGN_ZIP} (bytes after its end)")
    if min(entry.header_offset for entry in entries) > 0:
        raise _broken(path, f"{FOREIGN_ZIP} (bytes before its first entry)")


def _check_end(end: int, size: int, what: str) -> None:
    """Refuse bytes after the end of a pickle: readers that go on would unpickle them too."""
    if end < size:
        raise Refused(f"a checkpoint with {size - end} bytes after the end of its {what} at byte {end}")


def _count(file: IO[bytes], signature: bytes) -> int:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count, position = 0, data.find(signature)
        while position >= 0 and count <= MAX_ENTRIES:
            count, position = count + 1, data.find(signature, position + 4)
    return count


def _check_legacy(file: IO[bytes]) -> Any:
    """Scan the pickles of torch's old format; return the content of a bare pickle, else None."""
    size = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        value, _ = scan_pickle(data, size)  # type: ignore[arg-type]
        if value != LEGACY_MAGIC:
            _check_end(data.tell(), size, "pickle")
            return build_value(value)
        stored: dict[str, int] = {}
        for _ in range(LEGACY_PICKLES - 1):
            value, storages = scan_pickle(data, size)  # type: ignore[arg-type]
            stored |= storages
        if sorted(stored) != sorted(value.parts):
            raise Refused("a checkpoint that does not hold the storages of all its tensors")
        end = data.tell() + sum(8 + nbytes for nbytes in stored.values())
        if end > size:
            raise Refused("truncated: it holds fewer bytes than its tensors need")
        _check_end(end, size, "tensors")
    return None


def _refusal(path: Path, error: Refused) -> UserError:
    if not error.names:
        return _broken(path, str(error))
    names = ", ".join(map(repr, error.names[:MAX_CLASSES]))
    more = len(error.names) - MAX_CLASSES
    if more > 0:
        names += f" and {more} more"
    return UserError(
        f"{path} wants to build {names} when it is read; none of it was run",
        expected="tensors, containers, numbers, strings and the settings of known training scripts "
        "(backbones/reading/stand_ins.py)",
        fix=CONVERT,
    )


def _program(path: Path) -> UserError:
    return UserError(
        f"{path} is a TorchScript archive: a program with its weights, as OpenAI's CLIP is published",
        expected="weights without a program",
        fix=CONVERT,
    )


def _broken(path: Path, what: str, fix: str = FETCH) -> UserError:
    return UserError(f"{path} is {what}", expected="a complete safetensors or torch.save file", fix=fix)


def _first_line(message: str) -> str:
    return INTERNAL.sub("", message.strip().split("\n")[0])[:200].strip()


def check_tensors(tensors: dict[str, torch.Tensor], path: Path | str, file_size: int) -> None:
    """Raise UserError for tensors that claim more bytes than the file has: a pickle can state any shape."""
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
                f"{path}: {name} claims the shape {tuple(tensor.shape)}, "
                f"more than the file's {file_size} bytes hold",
                expected="tensors whose values are all in the file",
            )


def check_values(tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raise UserError unless the weights are finite floating-point numbers of 16, 32 or 64 bits."""
    other = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if other:
        raise UserError(
            f"{source}: weights of unsupported types: {', '.join(other[:MAX_LISTED])}",
            expected="float32, float16, bfloat16 or float64",
            fix="export the weights unquantised",
        )
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(
            f"{source}: {len(bad)} weights hold NaN or infinity: {', '.join(bad[:MAX_LISTED])}",
            expected="finite weights",
            fix="use an earlier checkpoint of that training",
        )
