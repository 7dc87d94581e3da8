"""Finds images of one split that are, byte for byte, images of the other too."""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from mae_bench.data.sets.fetch import file_lock
from mae_bench.data.sets.index import cache_path, try_to_cache
from mae_bench.data.sets.source import ImageSource

log = logging.getLogger(__name__)

BLOCK = 4096  # bytes: more than the headers that a camera or a program writes the same into every image
THREADS = 16  # they wait for the disk
CHUNK = 64  # images that a thread is given at once
MOST_NAMED = 5

Pairs = list[tuple[str, str]]  # an image of val, the same image of train


def known_overlap(train: ImageSource, val: ImageSource, digest: str) -> Pairs:
    """`overlap`, once for each digest of a set: the cache keeps it, and of several processes one looks while the rest wait."""
    path = cache_path("overlap", digest, ".json")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(path))
        except OSError as error:
            log.info("%s cannot be locked, so each process looks for itself: %s", path, error)
        try:
            return [(theirs, ours) for theirs, ours in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            found = overlap(train, val)
            try_to_cache(path, json.dumps(found).encode())
            return found


def overlap(train: ImageSource, val: ImageSource) -> Pairs:
    """Every image of val that train has too, with the first such image of train, in val's order.

    Candidates are of one size with an image of the other split; of these the first block is read, and of those that agree in
    it the whole. An image that cannot be read, or is empty, is like no other.
    """
    sizes = train.stored_sizes(), val.stored_sizes()
    ours, theirs = (np.flatnonzero(np.isin(own, other) & (own > 0)) for own, other in (sizes, sizes[::-1]))
    log.info(
        "looking for images of train in val, once: %d of %d have the size of one in val",
        len(ours),
        len(train),
    )
    alike, others = dict.fromkeys(ours.tolist(), b""), dict.fromkeys(theirs.tolist(), b"")
    for length in (BLOCK, None):
        alike, others = _digests(train, list(alike), length), _digests(val, list(others), length)
        shared = set(alike.values()) & set(others.values())
        alike, others = (
            {i: digest for i, digest in found.items() if digest in shared} for found in (alike, others)
        )
    first = {digest: i for i, digest in reversed(alike.items())}
    return [(val.name(i), train.name(first[digest])) for i, digest in others.items()]


def _digests(images: ImageSource, rows: list[int], length: int | None) -> dict[int, bytes]:
    """Row -> digest of the first `length` bytes (None: of all) of each image that can be read, in the rows' order."""

    def digest(i: int) -> bytes:
        try:
            data = images.stored(i, length)
        except OSError:
            data = b""
        return hashlib.blake2b(data, digest_size=16).digest() if data else b""

    with ThreadPoolExecutor(THREADS) as pool:
        chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        digests = [
            each for chunk in pool.map(lambda chunk: [digest(i) for i in chunk], chunks) for each in chunk
        ]
    return {i: each for i, each in zip(rows, digests, strict=True) if each}


def overlap_note(pairs: Pairs, num_val: int) -> str:
    """For the record: how many images of val a model may have been trained on, and some of them; "" for none."""
    if not pairs:
        return ""
    shown = ", ".join(f"{theirs} is {ours}" for theirs, ours in pairs[:MOST_NAMED]) + (
        ", ..." if len(pairs) > MOST_NAMED else ""
    )
    return f"{len(pairs)} of {num_val} images of val are in train too, byte for byte: {shown}"
