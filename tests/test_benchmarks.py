"""The benchmarks: known answers of their arithmetic, and each script run to its end at toy size."""

import json
from pathlib import Path

import pytest

from benchmarks.measure import Table, Times, interleave, ratio, write_table


def test_interleave_runs_the_calls_in_turns_and_times_all_but_the_warm_up():
    calls: list[str] = []
    samples = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(times.cpu) for times in samples.values()] == [3, 3]
    assert [len(times.wall) for times in samples.values()] == [3, 3]


def test_ratio_is_that_of_the_medians():
    found = ratio([2.0, 4.0, 90.0], [1.0, 2.0, 1.5])
    assert found.median == 4.0 / 1.5
    assert found.low <= found.median <= found.high


def test_ratio_of_proportional_rounds_has_no_spread():
    """A machine that slows both down alike in some rounds does not widen the interval: the rounds are drawn in pairs."""
    rounds = [1.0, 5.0, 2.0, 9.0, 1.5, 3.0, 7.0]
    found = ratio([3 * seconds for seconds in rounds], rounds)
    assert (found.median, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_ratio_spreads_with_its_samples():
    narrow, wide = ratio([2.0, 2.1, 1.9] * 5, [1.0] * 15), ratio([1.0, 2.0, 4.0] * 5, [1.0] * 15)
    assert wide.high - wide.low > narrow.high - narrow.low


def test_ratio_refuses_unequal_rounds():
    with pytest.raises(ValueError, match="one of each a round"):
        ratio([1.0, 2.0], [1.0])


def test_report_is_written_as_markdown_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = Table("Speed", ["peer", "ratio"], [["hf", ratio([2.0], [1.0])]], note="Higher is better.")
    write_table("A report", [table], {"samples": Times([1.0], [2.0])}, tmp_path / "new" / "report.md")
    text = (tmp_path / "new" / "report.md").read_text()
    assert "| hf | 2.00 [2.00, 2.00] |" in text
    assert text.strip() == capsys.readouterr().out.strip()
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["data"]["samples"] == {"cpu": [1.0], "wall": [2.0]}
    assert content["tables"][0]["rows"][0][1]["median"] == 2.0
    assert content["environment"]["command"]
