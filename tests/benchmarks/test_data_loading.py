"""The loading benchmark at toy size, and its errors for bad arguments."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_loading
from mae_bench.errors import UserError


def test_it_compares_every_route_and_reports_the_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (38, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((520, 400), Image.Resampling.BICUBIC).save(
            tmp_path / "photos" / f"{number}.jpg"
        )
    given = ["--photos", str(tmp_path / "photos"), "--images", "4", "--batch-size", "2", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["benchmarks/data_loading.py", *given, "--out", str(tmp_path / "found")])
    monkeypatch.setattr(data_loading, "PROCESSES", (1,))
    data_loading.main()
    tables = {
        table["title"]: table["rows"] for table in json.loads((tmp_path / "found.json").read_text())["tables"]
    }
    routes = [row[0] for row in tables["One core"]]
    assert routes[0] == data_loading.REFERENCE
    assert set(data_loading.TARGETS) < set(routes)
    errors = {row[0]: float(row[1]) for row in tables["Pixels"]}
    assert errors["random crops, fast, from the files"] < 0.05
    assert errors["centre crops, fast, from the packed q95 set"] > 0.05, "another JPEG has other pixels"


def test_photographs_that_are_too_small_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "small.jpg")
    with pytest.raises(UserError, match="no photographs of 500 x 375"):
        data_loading.make_photos(tmp_path / "out", tmp_path, 1)
