"""No flipped byte of a file that is read back changes a result unnoticed: a few flips per file."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.faults import (
    HARMLESS,
    LEFT_OUT,
    RECOVERED,
    TRACEBACK,
    UNNOTICED,
    Flips,
    classify,
    flip,
    main,
    restore,
)
from benchmarks.read_back import Observed


def test_no_flip_is_unnoticed() -> None:
    flips = flip(per_file=5, seed=1)
    assert len(flips) >= 30
    for each in flips:
        assert not each.outcomes[UNNOTICED] + each.outcomes[TRACEBACK], (each.file, each.tracebacks)
        if each.case not in ("packed set", "report of a folder of runs"):
            assert not each.outcomes[LEFT_OUT], f"{each.file}: read or computed again, it is the same"
        if each.case in ("state of a training", "trained model of another cell"):
            assert each.outcomes[RECOVERED] == 5


def test_the_table_is_written_with_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flips = [Flips("state", "values.json", 9, Counter({RECOVERED: 4, UNNOTICED: 1}), [])]
    monkeypatch.setattr("benchmarks.faults.flip", lambda per_file, seed: flips)
    monkeypatch.setattr("sys.argv", ["faults", "flip", "--out", str(tmp_path / "flips")])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1, "one is unnoticed"
    written = json.loads((tmp_path / "flips.json").read_text())["data"]["flips"]
    assert written[0]["outcomes"] == {"recovered": 4, "unnoticed": 1}
    assert "| state | values.json | 9 | 4 | 0 | 0 | 0 | 1 | 0 |" in capsys.readouterr().out


def test_outcomes_are_told_apart() -> None:
    expected = Observed(1, ("resumed",))
    assert classify(expected, Observed(1, ("resumed",))) == HARMLESS
    assert classify(expected, Observed(2, ("resumed",))) == UNNOTICED
    assert classify(expected, Observed(2)) == UNNOTICED
    assert classify(expected, Observed(1, ("resumed", "damaged"))) == RECOVERED
    assert classify(expected, Observed(2, ("damaged",))) == LEFT_OUT
    assert classify(expected, Observed(1, traceback="KeyError")) == TRACEBACK


def test_all_changes_are_undone(tmp_path: Path) -> None:
    kept, changed = tmp_path / "a" / "kept", tmp_path / "b" / "changed"
    for path in (kept, changed):
        path.parent.mkdir()
        path.write_bytes(b"old")
    tree = {kept: b"old", changed: b"old"}
    before = kept.stat().st_ctime_ns
    changed.unlink()
    changed.parent.rmdir()
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "file").touch()
    restore(tmp_path, tree)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == tree
    assert not (tmp_path / "new").exists()
    assert kept.stat().st_ctime_ns == before
