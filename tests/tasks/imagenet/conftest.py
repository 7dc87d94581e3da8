"""The toy set and backbone, made once a module; the cache of features is the test's own."""

from pathlib import Path

import pytest

from tests.tasks.imagenet.toy import write_backbone, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 9 validation images of three classes."""
    return write_images(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache"))
