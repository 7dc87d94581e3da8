"""Read packed sets: one indexed file of images per split, with a checksum per image."""

import json
from pathlib import Path
from typing import Any

from mae_bench.data.sets.index import IndexedImages, read_index
from mae_bench.errors import UserError
from mae_bench.files import file_digest, json_digest
from mae_bench.seal import SEAL, BrokenSeal, check_json_seal

VERSION = 2
UNSEALED = 1  # an earlier version, without seal and checksums
HEADER = "packed.json"  # written last: a folder without it is not a packed set
FIX = "pack or copy the images again"


def is_packed(root: Path) -> bool:
    """Return whether the folder holds a complete packed set."""
    return (root / HEADER).is_file()


def read_header(root: Path) -> dict[str, Any]:
    """Read the header of a packed set; raise UserError if it is damaged or of another version."""
    path = root / HEADER
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = header["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenSeal(f"{path} is not the header of a packed set: {error!r}", fix=FIX) from error
    if version == UNSEALED and SEAL not in header:
        return header
    if version not in (VERSION, UNSEALED):
        raise BrokenSeal(f"{path} has version {version}", expected=f"version {VERSION}", fix=FIX)
    return check_json_seal(header, path, fix=FIX)


def open_packed(root: Path, split: str) -> IndexedImages:
    """Open one split of a packed set; each image is compared with its checksum when it is read.

    Raise UserError if the size of the images or the content of another file has changed.
    """
    header = read_header(root)
    if split not in header["splits"]:
        raise UserError(f"{root} has no split {split}", expected=f"one of {', '.join(header['splits'])}")
    entry, data = header["splits"][split], root / f"{split}.data"
    size = data.stat().st_size if data.is_file() else None
    if size != entry["bytes"]:
        raise BrokenSeal(
            f"{data} is missing or has another size ({size} bytes)",
            expected=f"{entry['bytes']} bytes, as written",
            fix=FIX,
        )
    digests = _list_digests(root, split, entry)
    del digests[data]
    for path, digest in digests.items():
        _verify_file(path, digest)
    index = read_index(root / f"{split}.index")
    if index is None:
        raise BrokenSeal(f"{root / f'{split}.index'} cannot be read", expected="an index", fix=FIX)
    checksums = root / f"{split}.checksums"
    return IndexedImages(
        index,
        root,
        raw=header["how"]["raw"],
        digest=digest_split(entry),
        checksums=checksums.name if checksums in digests else "",
    )


def verify_packed(root: Path) -> None:
    """Read the whole set; raise UserError if a file differs from what was written."""
    for split, entry in read_header(root)["splits"].items():
        for path, digest in _list_digests(root, split, entry).items():
            _verify_file(path, digest)


def digest_split(entry: dict[str, Any]) -> str:
    """Return the digest of a split: over its images, and their names and labels."""
    return json_digest([entry["sha256"], entry["index_sha256"]])


def _list_digests(root: Path, split: str, entry: dict[str, Any]) -> dict[Path, str]:
    """Return the SHA-256 of each file of a split; sets of version 1 have no checksums."""
    digests = {f"{split}.data": entry["sha256"], f"{split}.index": entry["index_sha256"]}
    if "checksums_sha256" in entry:
        digests[f"{split}.checksums"] = entry["checksums_sha256"]
    return {root / name: digest for name, digest in digests.items()}


def _verify_file(path: Path, expected: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        raise BrokenSeal(f"{path} cannot be read: {error}", expected="a file of the set", fix=FIX) from error
    if found != expected:
        raise BrokenSeal(f"{path} has SHA-256 {found}", expected=f"{expected}, as written", fix=FIX)
