"""Find images that are in both splits, byte for byte."""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mae_bench.data.sets.cache import load_or_compute
from mae_bench.data.sets.source import ImageSource

log = logging.getLogger(__name__)

BLOCK = 4096  # bytes: more than the identical headers that a camera or program writes into every image
NUM_THREADS = 16  # they wait for the disk
CHUNK = 64  # images per task of a thread
MAX_SHOWN = 5

Pairs = list[tuple[str, str]]  # (image of val, the same image in train)


def load_or_find_overlap(train: ImageSource, val: ImageSource, digest: str) -> Pairs:
    """Load the overlap cached for a set's digest, or find and cache it; other processes wait."""
    return load_or_compute(
        "overlap",
        digest,
        lambda: find_overlap(train, val),
        lambda pairs: [(val_name, name) for val_name, name in pairs],
    )


def find_overlap(train: ImageSource, val: ImageSource) -> Pairs:
    """Return each image of val that is also in train, with its first occurrence in train, in val's order.

    Candidates have the size of an image in the other split. Their first blocks are compared, and then the
    whole content of those that agree. Unreadable and empty images match no other image.
    """
    train_sizes, val_sizes = train.stored_sizes(), val.stored_sizes()
    train_rows = np.flatnonzero(np.isin(train_sizes, val_sizes) & (train_sizes > 0)).tolist()
    val_rows = np.flatnonzero(np.isin(val_sizes, train_sizes) & (val_sizes > 0)).tolist()
    log.info(
        "searching val for images of train (once): %d of %d have the size of an image in val",
        len(train_rows),
        len(train),
    )
    train_digests, val_digests = dict.fromkeys(train_rows, b""), dict.fromkeys(val_rows, b"")
    for length in (BLOCK, None):
        train_digests = _digest_images(train, list(train_digests), length)
        val_digests = _digest_images(val, list(val_digests), length)
        shared = set(train_digests.values()) & set(val_digests.values())
        train_digests = {i: digest for i, digest in train_digests.items() if digest in shared}
        val_digests = {i: digest for i, digest in val_digests.items() if digest in shared}
    first = {digest: i for i, digest in reversed(train_digests.items())}
    return [(val.name(i), train.name(first[digest])) for i, digest in val_digests.items()]


def _digest_images(images: ImageSource, rows: list[int], length: int | None) -> dict[int, bytes]:
    """Return the digest of the first `length` bytes (None: all) of each readable image, by row."""

    def digest_chunk(chunk: list[int]) -> list[bytes]:
        return [_digest_image(images, i, length) for i in chunk]

    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    digests: list[bytes] = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for found in pool.map(digest_chunk, chunks):
            digests += found
    return {i: digest for i, digest in zip(rows, digests, strict=True) if digest}


def _digest_image(images: ImageSource, i: int, length: int | None) -> bytes:
    """Return the digest of the first bytes of an image; b"" if it is empty or cannot be read."""
    try:
        data = images.stored(i, length)
    except OSError:
        return b""
    return hashlib.blake2b(data, digest_size=16).digest() if data else b""


def note_overlap(pairs: Pairs, num_val: int) -> str:
    """Return a note for the record on images of val that are also in train; "" if there are none."""
    if not pairs:
        return ""
    shown = ", ".join(f"{val_name} is {name}" for val_name, name in pairs[:MAX_SHOWN])
    if len(pairs) > MAX_SHOWN:
        shown += ", ..."
    return f"{len(pairs)} of {num_val} images of val are also in train, byte for byte: {shown}"
