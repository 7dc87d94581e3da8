"""Fixtures: a cache per test, and small images."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_bench.data.sets import index


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder of the test; the user's cache is neither read nor written."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MAE_BENCH_CACHE", str(folder))
    return folder


@pytest.fixture
def keeps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache that also keeps indexes of small and recently changed sets."""
    monkeypatch.setattr(index, "MIN_CACHED", 1)
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0.0)
    return cache


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """Return a function that encodes images which differ by their number."""

    def encode(number: int, size: tuple[int, int] = (16, 12), form: str = "JPEG") -> bytes:
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, form)
        return file.getvalue()

    return encode
