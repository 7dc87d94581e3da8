"""Says what a file is that holds no weights, by its first bytes, and what to do about it."""

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
FETCH = "fetch the file again and compare its SHA-256"
UNPACK = "unpack it, and give the weight file that is inside"


def describe_content(start: bytes) -> tuple[str, str]:
    """What a file that begins with these FIRST bytes is, and the advice; for files that are no safetensors, zip or pickle."""
    if not start:
        return "empty", FETCH
    if start.startswith(POINTER):
        return "a Git LFS pointer, not the file", "git lfs pull fetches the file itself"
    if start.startswith(PACKED) or start[TAR_AT:].startswith(TAR):
        return "a packed archive", UNPACK
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        return (
            "a web page",
            "it may be a login page, or the page about the file: take the address of the raw file",
        )
    if is_text(start):
        return "text or code", "give the file with the weights: .safetensors, .pth, .pt or .bin"
    return "neither safetensors nor a file of torch.save", FETCH


def is_text(start: bytes) -> bool:
    """Whether these bytes are UTF-8 (the last character may be cut) without what only binary files have."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def describe_archive(names: Sequence[str]) -> tuple[str, str]:
    """What a zip archive of these names is, if torch.save did not write it, and the advice."""
    if names and all(name.endswith(".npy") for name in names):
        return (
            "an archive of numpy arrays, as JAX's weights are saved",
            "convert it with the library that it comes from, for example timm",
        )
    return (
        f"a zip archive of {', '.join(repr(name[:50]) for name in names[:3]) or 'nothing'}, not of torch.save",
        UNPACK,
    )
