"""No flipped byte of a file that is read back changes a result unnoticed: a few flips per file."""

from pathlib import Path

from benchmarks.faults import HARMLESS, LEFT_OUT, RECOVERED, TRACEBACK, UNNOTICED, classify, flip, restore
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
