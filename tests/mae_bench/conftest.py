"""A suite of fake jobs on a toy data set."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mae_bench.registry import KINDS


@pytest.fixture
def fake_kinds(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register the fake kinds here and in child processes; return `mae-bench` with them as a script."""
    here = Path(__file__).parent
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent.parent)]))
    from fake_kinds import FAKES  # type: ignore[import-not-found]

    for name, kind in FAKES.items():
        monkeypatch.setitem(KINDS, name, kind)
    return here / "fake_kinds.py"


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with `imagenet/`: two classes, one image each and split."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for number, name in enumerate(("a", "b")):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (99 * number, 0, 0)).save(folder / f"{split}.png")
    return root


@pytest.fixture
def suite(fake_kinds: Path, toy_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Two backbones, one task, as `load_suite` reads it."""
    return {
        "name": "toy",
        "out": str(tmp_path / "out"),
        "data": {"root": str(toy_data)},
        "backbones": {"good": {"kind": "fake_maker"}, "base": {"kind": "fake_maker"}},
        "tasks": {"probe": {"kind": "fake_transfer", "protocol": "probe"}},
        "jobs": 2,
        "device": "cpu",
    }
