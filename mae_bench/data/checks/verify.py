"""Decodes every image of a set once, to find those that do not."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from mae_bench.data.sets.decode import decode_size
from mae_bench.data.sets.source import BadImage, ImageSource

CHUNK = 64  # images that a process decodes before it reports


def bad_images(
    images: ImageSource, num_workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Name and reason of each image that does not decode. num_workers: processes, 0 decodes in this one."""
    found: dict[str, str] = {}
    starts = range(0, len(images), CHUNK)
    pool = ProcessPoolExecutor(num_workers) if num_workers else None
    try:
        results = (pool.map if pool else map)(_bad_in, repeat(images), starts)
        for done, chunk in enumerate(results, 1):
            found |= chunk
            progress(min(done * CHUNK, len(images)), len(images))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return found


def _bad_in(images: ImageSource, start: int) -> dict[str, str]:
    found = {}
    for i in range(start, min(start + CHUNK, len(images))):
        try:
            if images.pixels(i) is None:
                decode_size(images.read(i))
        except (BadImage, OSError) as error:
            found[images.name(i)] = str(error)
    return found
