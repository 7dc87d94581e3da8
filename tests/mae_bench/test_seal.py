"""A sealed folder or JSON file is what was written, or an error names the difference."""

import json
import os
import random
from pathlib import Path

import pytest

from mae_bench.files import write_json
from mae_bench.seal import (
    BrokenSeal,
    States,
    check_seal,
    read_sealed_json,
    seal,
    seal_json,
    write_sealed,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sealed"
    with write_sealed(folder) as part:
        (part / "weights").write_bytes(bytes(range(256)))
        (part / "inner").mkdir()
        (part / "inner" / ".values").write_text("1.5")
    return folder


def test_a_folder_as_written_is_intact_and_its_digests_are_known(folder: Path) -> None:
    check_seal(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["weights"] == {  # SHA-256 of the bytes 0 to 255
        "bytes": 256,
        "sha256": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880",
    }
    assert files.keys() == {"weights", "inner/.values"}


def test_missing_additional_and_changed_files_are_named(folder: Path) -> None:
    (folder / "inner" / ".values").write_text("1.6")
    with pytest.raises(BrokenSeal, match=r"inner/\.values has SHA-256") as error:
        check_seal(folder, fix="write it again")
    assert error.value.fix == "write it again"
    (folder / "new").touch()
    with pytest.raises(BrokenSeal, match="new is not among the sealed files"):
        check_seal(folder)
    (folder / "new").unlink()
    (folder / "weights").write_bytes(b"")
    with pytest.raises(BrokenSeal, match="weights has 0 bytes") as error:
        check_seal(folder)
    assert error.value.expected == "256 bytes, as written"
    (folder / "weights").unlink()
    with pytest.raises(BrokenSeal, match="weights is missing"):
        check_seal(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(BrokenSeal, match=r"has no manifest\.json"):
        check_seal(folder)


def test_every_flipped_byte_of_a_manifest_is_found_or_means_the_same(folder: Path) -> None:
    path = folder / "manifest.json"
    written = path.read_bytes()
    draw = random.Random(0)
    for place in range(len(written)):
        damaged = bytearray(written)
        damaged[place] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            check_seal(folder)
        except BrokenSeal:
            continue
        assert json.loads(damaged) == json.loads(written)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "ü"]}, {}])
def test_a_sealed_json_file_comes_back(tmp_path: Path, value: dict[str, object]) -> None:
    write_json(tmp_path / "file.json", seal_json(value))
    assert read_sealed_json(tmp_path / "file.json") == value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[1]", "has no seal"),
        (b'{"a": 1}', "has no seal"),
        (b'{"a": 1, "seal": "0"}', "has digest"),
        (b'{"a": 9e999, "seal": "0"}', "is damaged"),
    ],
)
def test_a_json_file_without_its_seal_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(BrokenSeal, match=problem):
        read_sealed_json(tmp_path / "file.json")


def test_an_interrupted_write_leaves_the_earlier_folder_and_nothing_else(folder: Path) -> None:
    def write() -> None:
        with write_sealed(folder) as part:
            (part / "weights").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    check_seal(folder)
    assert os.listdir(folder.parent) == ["sealed"]


def test_a_folder_is_replaced_as_a_whole(folder: Path) -> None:
    with write_sealed(folder) as part:
        (part / "other").touch()
    check_seal(folder)
    assert sorted(os.listdir(folder)) == ["manifest.json", "other"]


def test_a_folder_that_was_changed_on_purpose_can_be_sealed_again(folder: Path) -> None:
    (folder / "weights").write_bytes(b"new")
    seal(folder)
    check_seal(folder)


def write_states(states: States, *steps: int) -> None:
    for step in steps:
        with states.write(step) as part:
            (part / "step").write_text(str(step))


def test_the_last_states_are_kept_and_the_newest_intact_one_is_read(tmp_path: Path) -> None:
    notes: list[str] = []
    states = States(tmp_path, 2, notes.append)
    assert list(states.find_intact()) == []
    write_states(states, 1, 2, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]
    (states.path(3) / "step").write_text("4")
    assert next(states.find_intact()) == states.path(2)
    assert "step-00000003 cannot be read" in notes[0]
    write_states(states, 4)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000004"], "a damaged one does not count"
    assert list(states.find_intact()) == [states.path(4), states.path(2)]


def test_states_of_which_none_is_intact_are_not_written_over(tmp_path: Path) -> None:
    states = States(tmp_path, 2, lambda note: None)
    write_states(states, 1, 2)
    (states.path(1) / "manifest.json").write_text("")
    (states.path(2) / "step").unlink()
    with pytest.raises(BrokenSeal, match=r"no training state .* can be read: .*manifest\.json") as error:
        next(states.find_intact())
    assert "remove" in error.value.fix
    assert len(os.listdir(tmp_path)) == 2


def test_what_a_killed_job_left_half_written_is_removed(tmp_path: Path) -> None:
    states = States(tmp_path, 2, lambda note: None)
    write_states(states, 1)
    (tmp_path / ".step-00000002.part").mkdir()
    assert list(states.find_intact()) == [states.path(1)]
    write_states(states, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]
