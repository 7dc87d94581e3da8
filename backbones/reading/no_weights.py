"""Identify files that hold no weights by their first bytes, and say what to do about them."""

import codecs
from collections.abc import Sequence

FIRST = 512  # bytes that are looked at
POINTER = b"version https://git-lfs"
PACKED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"7z\xbc\xaf\x27\x1c",
    b"\x28\xb5\x2f\xfd",
    b"Rar!",
    b"PK\x05\x06",
)
TAR, TAR_AT = b"ustar", 257
FETCH = "download the file again and compare its SHA-256"
UNPACK = "unpack it and give the weight file inside"


def describe_content(start: bytes) -> tuple[str, str]:
    """Return what a file is and what to do about it, by its first `FIRST` bytes."""
    if not start:
        return "empty", FETCH
    if start.startswith(POINTER):
        return "a Git LFS pointer, not the file", "run git lfs pull to download the file itself"
    if start.startswith(PACKED) or start[TAR_AT:].startswith(TAR):
        return "a packed archive", UNPACK
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        fix = "it may be a login page or the page about the file: use the address of the raw file"
        return "a web page", fix
    if is_text(start):
        return "text or code", "give the file with the weights: .safetensors, .pth, .pt or .bin"
    return "neither safetensors nor a torch.save file", FETCH


def is_text(start: bytes) -> bool:
    """Return whether the bytes are printable UTF-8; the last character may be cut off."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def describe_archive(names: Sequence[str]) -> tuple[str, str]:
    """Return what a zip archive that torch.save did not write is, and what to do, by its entries."""
    if names and all(name.endswith(".npy") for name in names):
        return (
            "an archive of numpy arrays, as JAX weights are saved",
            "convert it with the library it comes from, for example timm",
        )
    listed = ", ".join(repr(name[:50]) for name in names[:3]) or "nothing"
    return f"a zip archive of {listed}, not of torch.save", UNPACK
