"""Files appear whole or not at all; digests have known answers."""

import hashlib
import json
import math
from pathlib import Path
from typing import BinaryIO

import pytest

from mae_bench.files import file_digest, json_digest, write_atomic, write_json, write_text


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_folders_are_made_and_others_may_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    write_json(path, {"ü": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, None]}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", value)
    with pytest.raises(ValueError, match="JSON compliant"):
        json_digest([value])


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert (
        file_digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2, B.1
    assert (
        json_digest({"b": [1, 2.5], "a": "ü"}) == hashlib.sha256('{"a":"ü","b":[1,2.5]}'.encode()).hexdigest()
    )
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
