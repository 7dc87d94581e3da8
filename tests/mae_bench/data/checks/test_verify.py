"""Images that do not decode are found with their reasons, for any number of processes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mae_bench.data.checks import verify
from mae_bench.data.sets.open import open_images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_bad_ones_are_named(
    tmp_path: Path, picture: Callable[..., bytes], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CHUNK", 3)
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number) if number % 4 else picture(number)[:40])
    np.save(tmp_path / "9.npy", np.zeros((4, 4, 7), np.uint8))
    seen: list[tuple[int, int]] = []
    found = verify.find_bad_images(
        open_images(tmp_path, "train"), num_workers, lambda done, total: seen.append((done, total))
    )
    assert list(found) == ["0.jpg", "4.jpg"]
    assert all(found.values())
    assert seen == [(3, 9), (6, 9), (9, 9)]
