"""Decode every image of a set once to find those that do not decode."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from mae_bench.data.sets.decode import decode_size
from mae_bench.data.sets.source import BadImage, ImageSource

CHUNK = 64  # images per task of a process


def find_bad_images(
    images: ImageSource, num_workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Return the reason for each image that does not decode, by name.

    num_workers: number of processes; 0 decodes in this process.
    progress: called with (number done, total number).
    """
    found: dict[str, str] = {}
    starts = range(0, len(images), CHUNK)
    pool = ProcessPoolExecutor(num_workers) if num_workers else None
    try:
        results = (pool.map if pool else map)(_check_chunk, repeat(images), starts)
        for done, chunk in enumerate(results, 1):
            found |= chunk
            progress(min(done * CHUNK, len(images)), len(images))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return found


def _check_chunk(images: ImageSource, start: int) -> dict[str, str]:
    found = {}
    for i in range(start, min(start + CHUNK, len(images))):
        try:
            if images.pixels(i) is None:
                decode_size(images.read(i))
        except (BadImage, OSError) as error:
            found[images.name(i)] = str(error)
    return found
