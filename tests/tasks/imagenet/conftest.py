"""The toy set and backbone, built once per module; each test has its own feature cache."""

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
    """The source that each of PROTOCOLS starts from."""
    classifier = write_classifier(tmp_path_factory.mktemp("classifier"))
    sources = dict.fromkeys(PROTOCOLS, backbone)
    return sources | {"eval_only": classifier, "supervised": ""}


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training and 11 validation images of hard classes, for scores between chance and 100."""
    return write_images(tmp_path_factory.mktemp("faint"), 26, 11, signal=12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache"))
