"""The toy set and backbone, made once a module; the cache of features is the test's own."""

from pathlib import Path

import pytest

from tests.tasks.imagenet.toy import PROTOCOLS, write_backbone, write_classifier, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 9 validation images of three classes."""
    return write_images(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, backbone: str) -> dict[str, str]:
    """What each of PROTOCOLS starts from."""
    classifier = write_classifier(tmp_path_factory.mktemp("classifier"))
    return {
        name: classifier if name == "eval_only" else "" if name == "supervised" else backbone
        for name in PROTOCOLS
    }


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training and 11 validation images whose classes can hardly be told apart: scores between chance and 100."""
    return write_images(tmp_path_factory.mktemp("faint"), 26, 11, signal=12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache"))
