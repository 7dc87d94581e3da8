"""Hostile files, built byte by byte: each is refused in one sentence, with little memory and no crash."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backbones import hostile_files

ALLOWANCE = 32 << 20  # bytes that reading any file may take, beyond four times the file
HARMLESS = {  # what is read because nothing is wrong with the bytes
    "nothing of a huge shape": "no values, and no weight of any model",
    "many names": "as many as a file may have",
}
REASONS = {
    "many sets": "far more memory",
    "deep lists": "far more memory",
    "many tensors": "far more memory",
    "a text encoded again and again": "far more memory",
    "a state given again and again": "far more memory",
    "copies of collections.OrderedDict": "far more memory",
    "copies of addict.addict.Dict": "far more memory",
    "copies in torch.Size": "far more memory",
    "nested dictionaries": "repeat or nest without end",
    "doubled tuples": "repeat or nest without end",
    "doubled tuples as a key": "neither names nor numbers",
    "numbers that collide": "neither names nor numbers",
    "a list in itself": "contains itself",
    "a dictionary in itself": "contains itself",
    "bytearray of a size": "wants to build 'builtins.bytearray'",
    "torch.FloatStorage of a size": "of nothing but a size",
    "a shape": "over 16 stored bytes",
    "an offset": "over 16 stored bytes",
    "a far stride": "over 16 stored bytes",
    "a large storage": "claims 4398046511104 bytes",
    "a storage without values": "has no values",
    "compressed": "compressed",
    "overlapping entries": "overlapping",
    "two of one name": "two entries with the same name",
    "many entries": "more than 20000 entries",
    "huge": "more than 2097152",
    "a name twice": "two entries with the same name",
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[tuple[str, str, int, str, int]]:
    """Family, name, bytes of the file, how reading it ended, bytes that it took."""
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-W",
        "ignore",
        hostile_files.__file__,
        str(tmp_path_factory.mktemp("hostile")),
    ]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout
    return [tuple(json.loads(line)) for line in told.splitlines()]


def test_every_file_was_tried(ends):
    assert [(family, what) for family, what, *_ in ends] == [
        (family, what) for family, files in hostile_files.families().items() for what in files
    ]
    assert len(ends) > 150


def test_the_same_bricks_in_good_order_are_read(ends):
    assert {end for family, _, _, end, _ in ends if family == "honest"} == {"read"}


def test_every_hostile_file_is_refused_as_a_users_mistake(ends):
    read = [(family, what, end) for family, what, _, end, _ in ends if family != "honest" and end == "read"]
    assert {what for _, what, _ in read} == set(HARMLESS)
    assert not [end for *_, end, _ in ends if end.startswith("!!")]
    assert not [end for *_, end, _ in ends if "report" in end]  # bugs to PyTorch, as its own messages ask for


@pytest.mark.parametrize(("what", "reason"), REASONS.items(), ids=REASONS)
def test_the_reason_is_told(ends, what, reason):
    found = [end for family, name, _, end, _ in ends if name == what and family != "honest"]
    assert found
    assert all(re.search(reason, end) for end in found), found


def test_no_file_takes_four_times_its_size(ends):
    assert not [(family, what, took) for family, what, size, _, took in ends if took > 4 * size + ALLOWANCE]
