"""Every protocol gives the same weights, metrics and predictions after being stopped or killed repeatedly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_bench.errors import Interrupted
from mae_bench.job import Outcome
from mae_bench.progress import Progress
from tests.tasks.imagenet.toy import PROTOCOLS, predictions_of, run_protocol, state_of

TRAINS = [name for name, values in PROTOCOLS.items() if "epochs" in values]


class Killed(Exception):
    """End a run without any clean-up."""


class Stopping(Progress):
    """Ask for a stop, or kill the run, at the `limit`-th step of any stage."""

    def __init__(self, limit: int, kills: bool):
        super().__init__()
        self.left, self.kills = limit, kills

    @property
    def should_stop(self) -> bool:
        return self.left <= 0 and not self.kills

    def step(self, done: float, **values: float | str) -> None:
        self.left -= 1
        if self.kills and not self.left:
            raise Killed
        super().step(done, **values)


def in_pieces(name: str, data: Path, folder: Path, source: str, kills: bool) -> tuple[Outcome, int]:
    """Run the protocol, each time a little longer, until it ends; return how often it was stopped."""
    for stops in range(40):
        try:
            progress = Stopping(4 + 5 * stops, kills)
            return run_protocol(name, data, folder, source, progress, **often(name)), stops
        except (Interrupted, Killed):
            pass
    raise AssertionError("it never ended")


def often(name: str) -> dict[str, Any]:
    return {"checkpoint_seconds": 0} if name in TRAINS else {}


@pytest.mark.parametrize("kills", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_run_in_pieces_equals_a_whole_one(faint, tmp_path, sources, name, kills, monkeypatch):
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache whole"))
    whole = run_protocol(name, faint, tmp_path / "whole", sources[name], **often(name))
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache pieces"))
    pieces, stops = in_pieces(name, faint, tmp_path / "pieces", sources[name], kills)
    assert stops, "it was stopped"
    assert replace(pieces, cost={}) == replace(whole, cost={})
    assert pieces.cost.keys() == whole.cost.keys()
    places = [tmp_path / place / whole.artefacts["predictions"] for place in ("whole", "pieces")]
    found = [predictions_of(place.parent) for place in places]
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
    for file in [*tmp_path.glob("whole/**/*.json")]:
        if "checkpoints" not in file.parts and file.name in (
            "epochs.json",
            "heads.json",
            "draws.json",
            "curve.json",
        ):
            assert (
                file.read_text() == (tmp_path / "pieces" / file.relative_to(tmp_path / "whole")).read_text()
            ), file
    if name in TRAINS and name != "partial":
        one, other = state_of(tmp_path / "whole"), state_of(tmp_path / "pieces")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
