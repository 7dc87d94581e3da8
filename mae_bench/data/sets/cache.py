"""Compute a JSON value once per key and keep it in the cache."""

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from mae_bench.data.sets.index import cache_path, read_cached, try_to_cache
from mae_bench.locks import file_lock

log = logging.getLogger(__name__)

T = TypeVar("T")


def load_or_compute(
    kind: str, key: str, compute: Callable[[], Any], parse: Callable[[Any], T], refresh: bool = False
) -> T:
    """Load the value cached as (kind, key), or compute and cache it, and return it parsed.

    Other processes wait for the one that computes. A cached value that `parse` fails on is computed again; an
    exception of `compute` passes through, and nothing is cached.

    compute: returns a JSON value. refresh: compute in any case.
    """
    path = cache_path(kind, key, ".json")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(path))
        except OSError as error:
            log.info("%s cannot be locked, so each process computes it on its own: %s", path, error)
        cached = None if refresh else read_cached(path)
        if cached is not None:
            try:
                return parse(json.loads(cached))
            except (ValueError, TypeError, KeyError):  # of another version
                pass
        value = compute()
        try_to_cache(path, json.dumps(value).encode())
        return parse(value)
